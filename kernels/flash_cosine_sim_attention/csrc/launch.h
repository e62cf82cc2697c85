// What every launch of a kernel with much shared memory needs.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

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

struct DeviceProperties {
  int num_multiprocessors = 0;
  int compute_capability = 0;  // 90 is 9.0
};

// Of the current device. All devices are asked once; a static variable's initialisation is thread-safe.
inline const DeviceProperties& current_device() {
  static const std::vector<DeviceProperties> all = [] {
    int num_devices = 0;
    CUDA_CHECK(cudaGetDeviceCount(&num_devices));
    std::vector<DeviceProperties> result(num_devices);
    for (int index = 0; index < num_devices; ++index) {
      int major = 0, minor = 0;
      CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
      CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
      CUDA_CHECK(
          cudaDeviceGetAttribute(&result[index].num_multiprocessors, cudaDevAttrMultiProcessorCount, index));
      result[index].compute_capability = 10 * major + minor;
    }
    return result;
  }();
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  return all.at(device);
}

}  // namespace flash_cosine_sim
