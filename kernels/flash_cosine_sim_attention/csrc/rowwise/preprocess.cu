// What the backward pass does row by row before its main kernel, in one launch: q_hat, k_hat and delta.
#include "attention.h"
#include "common/rows.cuh"
#include "cuda_check.h"
#include "rowwise/normalize.cuh"

namespace flash_cosine_sim {
namespace {

constexpr int kThreads = Normalization::kThreads;

// How many rows of a head have a delta here: sm90/backward.cuh adds to whole tiles of dq_accumulator.
__host__ __device__ int rows_of_delta(const BackwardParams& params) {
  return params.plan.sm90 ? params.plan.padded_rows : params.seq_len_q;
}

template <typename T>
__device__ __forceinline__ void write_delta(const BackwardParams& params, unsigned block) {
  const rows::RowLanes<T> lanes(params.head_dim);
  const int64_t flat_row = int64_t{block} * (kThreads >> lanes.log2) + (threadIdx.x >> lanes.log2);
  const rows::Position position = rows::position_of(flat_row, params.num_heads, rows_of_delta(params));
  const bool exists = position.batch < params.batch;
  const bool active = exists && position.row < params.seq_len_q;
  typename rows::RowLanes<T>::Slice o, dout;
  lanes.load(o, rows::row_of<const T>(params.o, position), active);
  lanes.load(dout, rows::row_of<const T>(params.dout, position), active);
  const float sum = rows::dot_over_lanes(dout, o, lanes.lanes());
  if (exists && params.plan.sm90 && params.dq_accumulator) {
    // Which row's tiles put here does not matter.
    float4* zeros = reinterpret_cast<float4*>(params.dq_accumulator + flat_row * params.plan.padded_dim);
    for (int i = lanes.lane; i < params.plan.padded_dim / 4; i += lanes.lanes()) {
      zeros[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  if (active && lanes.lane == 0) {
    const int64_t row = (position.batch * params.num_heads + position.head) * params.seq_len_q + position.row;
    params.delta[row] = params.drow_sum_log2 ? fmaf(-kLog2E, params.drow_sum_log2[row], sum) : sum;
  }
}

// The first blocks normalise.
template <typename T, bool kNormalizes, bool kGrouped>
__global__ void __launch_bounds__(kThreads)
    preprocess_kernel(const __grid_constant__ BackwardParams params,
                      const __grid_constant__ Normalization normalization, int64_t num_counters) {
  zero_counters<kThreads>(params.counters, num_counters);
  if constexpr (kNormalizes) {
    const unsigned num_blocks = normalization.query_blocks + normalization.key_blocks;
    if (blockIdx.x < num_blocks) return normalization.run<T, kGrouped>(blockIdx.x);
    write_delta<T>(params, blockIdx.x - num_blocks);
  } else {
    write_delta<T>(params, blockIdx.x);
  }
}

template <typename T, bool kNormalizes, bool kGrouped>
void launch(const BackwardParams& params, int64_t num_counters, cudaStream_t stream) {
  const Normalization normalization = kNormalizes ? Normalization::of<T>(params) : Normalization{};
  const int rows_per_block = kThreads >> rows::log2_lanes(params.head_dim, rows::RowLanes<T>::kSlice);
  const int64_t num_rows = int64_t{params.batch} * params.num_heads * rows_of_delta(params);
  // A full block reads 4 KiB at least of a contiguous tensor, so no memory is large enough for 2^31 of them.
  const auto delta_blocks = static_cast<unsigned>((num_rows + rows_per_block - 1) / rows_per_block);
  const unsigned blocks = normalization.num_blocks() + delta_blocks;
  if (blocks == 0) return;
  constexpr size_t kBytes = Normalization::kSharedBytes < T, kNormalizes && kGrouped > ;
  preprocess_kernel<T, kNormalizes, kGrouped>
      <<<blocks, kThreads, kBytes, stream>>>(params, normalization, num_counters);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_preprocess(const BackwardParams& params, int64_t num_counters, cudaStream_t stream) {
  rows::with_dtype(params.dtype, [&]<typename T>() {
    if (!params.l2norm_qk) return launch<T, false, false>(params, num_counters, stream);
    if (params.groups == 1) return launch<T, true, false>(params, num_counters, stream);
    launch<T, true, true>(params, num_counters, stream);
  });
}

}  // namespace flash_cosine_sim
