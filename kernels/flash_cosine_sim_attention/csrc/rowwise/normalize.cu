// q_hat and k_hat, before a forward pass, in one launch.
#include "attention.h"
#include "cuda_check.h"
#include "rowwise/normalize.cuh"

namespace flash_cosine_sim {
namespace {

template <typename T, bool kGrouped>
__global__ void __launch_bounds__(Normalization::kThreads)
    normalize_kernel(const __grid_constant__ Normalization normalization, uint32_t* counters, int64_t num_counters) {
  zero_counters<Normalization::kThreads>(counters, num_counters);
  normalization.run<T, kGrouped>(blockIdx.x);
}

template <typename T, bool kGrouped>
void launch(const Attention& params, uint32_t* counters, int64_t num_counters, cudaStream_t stream) {
  const Normalization normalization = Normalization::of<T>(params);
  const unsigned blocks = normalization.num_blocks();
  if (blocks == 0) return;
  constexpr size_t kBytes = Normalization::kSharedBytes<T, kGrouped>;
  normalize_kernel<T, kGrouped>
      <<<blocks, Normalization::kThreads, kBytes, stream>>>(normalization, counters, num_counters);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_normalize(const Attention& params, uint32_t* counters, int64_t num_counters, cudaStream_t stream) {
  rows::with_dtype(params.dtype, [&]<typename T>() {
    if (params.groups == 1) return launch<T, false>(params, counters, num_counters, stream);
    launch<T, true>(params, counters, num_counters, stream);
  });
}

}  // namespace flash_cosine_sim
