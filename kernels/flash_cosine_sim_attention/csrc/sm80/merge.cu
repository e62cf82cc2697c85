// The end of a forward pass whose keys were split: adds up the splits' sums, in order, and writes what was asked for.
#include "attention.h"
#include "cuda_check.h"
#include "sm80/split_sums.cuh"

namespace flash_cosine_sim {
namespace {

constexpr int kThreads = 256;

// A row has 2^log2_lanes threads for its channels, four each, 2^log2_teams times: teams, that take turns at the splits.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_merge_kernel(const __grid_constant__ ForwardParams params, int log2_lanes, int log2_teams) {
  extern __shared__ float4 shared_memory[];
  RowPart* parts = reinterpret_cast<RowPart*>(shared_memory);
  const int thread = static_cast<int>(threadIdx.x), num_teams = 1 << log2_teams;
  const int channel = 4 * (thread & ((1 << log2_lanes) - 1));
  const int team = (thread >> log2_lanes) & (num_teams - 1);
  const int log2_row_threads = log2_lanes + log2_teams;
  const int64_t flat_row = int64_t(blockIdx.x) * (kThreads >> log2_row_threads) + (thread >> log2_row_threads);
  const int64_t num_rows = int64_t(params.batch) * params.num_heads * params.seq_len_q;
  const bool active = flat_row < num_rows && channel < params.head_dim;

  RowPart sum = {};
  if (active) {
#pragma unroll 4
    for (int split = team; split < params.plan.num_splits; split += num_teams) {
      sum += load_part(params, split, flat_row, channel);
    }
  }
  parts[thread] = sum;
  __syncthreads();
  if (!active || team != 0) return;
  for (int other = 1; other < num_teams; ++other) sum += parts[thread + (other << log2_lanes)];
  write_result<T>(params, rows::position_of(flat_row, params.num_heads, params.seq_len_q), channel, sum);
}

template <typename T>
void launch(const ForwardParams& params, cudaStream_t stream) {
  const int64_t num_rows = int64_t(params.batch) * params.num_heads * params.seq_len_q;
  const int log2_lanes = rows::log2_lanes(params.head_dim, 4);
  // As many loads as a thread has on their way at once. More teams would only add up more of each other's sums.
  constexpr int kSplitsEach = 4;
  int log2_teams = 0;
  while (1 << (log2_lanes + log2_teams) < kThreads && kSplitsEach << log2_teams < params.plan.num_splits) ++log2_teams;
  const int rows_per_block = kThreads >> (log2_lanes + log2_teams);
  const auto num_blocks = static_cast<unsigned>((num_rows + rows_per_block - 1) / rows_per_block);
  forward_merge_kernel<T><<<num_blocks, kThreads, kThreads * sizeof(RowPart), stream>>>(params, log2_lanes, log2_teams);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_forward_merge(const ForwardParams& params, cudaStream_t stream) {
  rows::with_dtype(params.dtype, [&]<typename T>() { launch<T>(params, stream); });
}

}  // namespace flash_cosine_sim
