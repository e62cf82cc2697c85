// What every launch of a kernel with much shared memory needs.
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda_check.h"

namespace flash_cosine_sim {

// Permits a kernel its dynamic shared memory on the current device: more than 48 KiB has to be asked for. The answer
// is remembered, for asking costs a microsecond of each call.
template <auto kKernel, int kSharedBytes>
void allow_shared_memory() {
  if constexpr (kSharedBytes > 48 * 1024) {
    static std::atomic<uint64_t> allowed{0};  // a bit a device
    int device = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if ((allowed.load(std::memory_order_relaxed) & bit) != 0) return;
    CUDA_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    allowed.fetch_or(bit, std::memory_order_relaxed);
  }
}

}  // namespace flash_cosine_sim
