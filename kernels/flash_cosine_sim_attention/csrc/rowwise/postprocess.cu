// What the backward pass does row by row after its main kernel: dq and the sums of the partial dk and dv in one launch,
// then dscale; what keys nobody sees get; the gradient by distance.
#include "attention.h"
#include "common/band.cuh"
#include "common/rows.cuh"
#include "common/scale.cuh"
#include "cuda_check.h"

namespace flash_cosine_sim {
namespace {

constexpr int kThreads = 256;

template <typename T>
int rows_per_block(int head_dim) {
  return kThreads >> rows::log2_lanes(head_dim, rows::RowLanes<T>::kSlice);
}

// A full block reads 4 KiB at least of a contiguous tensor, so no memory is large enough for 2^31 of them.
template <typename T>
unsigned blocks_for(int64_t num_rows, int head_dim) {
  return static_cast<unsigned>((num_rows + rows_per_block<T>(head_dim) - 1) / rows_per_block<T>(head_dim));
}

template <typename T>
__device__ int64_t flat_row_of_thread(const rows::RowLanes<T>& lanes, int64_t block) {
  return block * (kThreads >> lanes.log2) + (threadIdx.x >> lanes.log2);
}

// Without kGrouped, one group. With it, x and gradient change hands through shared memory, as the lanes that have a
// group's channels are not those that load them.
template <bool kGrouped, typename T>
__device__ void project(const rows::RowLanes<T>& lanes, typename rows::RowLanes<T>::Slice& x,
                        typename rows::RowLanes<T>::Slice& gradient, int groups) {
  if constexpr (kGrouped) {
    extern __shared__ float4 shared_memory[];
    constexpr int kTileSize = 32 * rows::RowLanes<T>::kSlice;
    float* x_tile = reinterpret_cast<float*>(shared_memory) + threadIdx.x / 32 * (2 * kTileSize);
    float* gradient_tile = x_tile + kTileSize;
    const int tile_row = lanes.row_in_warp() * lanes.head_dim;
    lanes.store(x_tile + tile_row, x, true);
    lanes.store(gradient_tile + tile_row, gradient, true);
    __syncwarp();
    const int num_groups = lanes.rows_per_warp() * groups;
    rows::for_each_group(num_groups, lanes.head_dim / groups, [&](const auto& channels, int group_lanes) {
      float group_x[rows::kGroupSlice], group_gradient[rows::kGroupSlice];
      rows::load_group(group_x, x_tile, channels);
      rows::load_group(group_gradient, gradient_tile, channels);
      rows::project(group_x, group_gradient, group_lanes);
      rows::store_group(x_tile, group_x, channels);
      rows::store_group(gradient_tile, group_gradient, channels);
    });
    __syncwarp();
    lanes.load(x, x_tile + tile_row, true);
    lanes.load(gradient, gradient_tile + tile_row, true);
  } else {
    rows::project(x, gradient, lanes.lanes());
  }
}

template <typename T>
constexpr size_t shared_bytes(bool grouped) {
  return grouped ? 2 * kThreads * rows::RowLanes<T>::kSlice * sizeof(float) : 0;
}

// A slice of a row of dq_accumulator, in order.
template <typename T>
__device__ void load_accumulator(const BackwardParams& params, const rows::RowLanes<T>& lanes,
                                 typename rows::RowLanes<T>::Slice& slice, int64_t flat_row,
                                 const rows::Position& position, bool active) {
  if (params.plan.padded_dim == 0) {
    lanes.load(slice, params.dq_accumulator + flat_row * params.head_dim, active);
    return;
  }
  const int dim = params.plan.padded_dim;
  const float* head = params.dq_accumulator +
                      (position.batch * params.num_heads + position.head) * params.plan.padded_rows * dim;
  lanes.for_each_vector([&](int first, int channel) {
#pragma unroll
    for (int i = 0; i < lanes.kVector; i += 2) {
      const bool there = active && channel < params.head_dim;
      const float* pair = head + rows::tiled_offset(static_cast<int>(position.row), channel + i, dim);
      const float2 x = there ? *reinterpret_cast<const float2*>(pair) : make_float2(0.f, 0.f);
      slice[first + i] = x.x;
      slice[first + i + 1] = x.y;
    }
  });
}

template <typename T, bool kGrouped>
__device__ __forceinline__ void write_dq(const BackwardParams& params, unsigned block) {
  const rows::RowLanes<T> lanes(params.head_dim);
  const int64_t flat_row = flat_row_of_thread(lanes, block);
  const bool active = flat_row < int64_t{params.batch} * params.num_heads * params.seq_len_q;
  const rows::Position position = rows::position_of(flat_row, params.num_heads, params.seq_len_q);

  typename rows::RowLanes<T>::Slice q, accumulator, gradient;
  load_accumulator(params, lanes, accumulator, flat_row, position, active);
  if (params.l2norm_qk || params.dscale) {
    lanes.load(q, rows::row_of<const T>(params.q, position), active);
  }
  // position.head is in range even where the row is not active.
  const float scale = bounded_scale(params, position.head);
#pragma unroll
  for (int i = 0; i < lanes.kSlice; ++i) {
    gradient[i] = scale * accumulator[i];
  }
  if (params.l2norm_qk) {
    project<kGrouped>(lanes, q, gradient, params.groups);
  }
  if (params.dscale) {
    // q is q^ by now; the accumulator is without the factor scale.
    float share = rows::dot_over_lanes(q, accumulator, lanes.lanes());
    // A scale beyond its bound does not move what is computed.
    if (fabsf(params.scale[position.head * params.scale_stride]) > params.scale_value) share = 0.f;
    if (active && lanes.lane == 0) {
      params.delta[flat_row] = share;
    }
  }
  if (params.dq.data) {
    lanes.store(rows::row_of<T>(params.dq, position), gradient, active);
  }
}

// The gradients of the scale are sums over the rows of all batches, of one head or of all. Each is taken as a tree:
// a level adds up chunks of kChunk numbers in fixed order and leaves every sum where its chunk began, which no other
// block reads. So it needs no workspace, and its error grows with the depth and not with the number of rows.
constexpr int kChunk = 4096;

struct ShareSums {
  float* shares;  // (batch, num_sums, seq_len_q)
  float* result;  // nullptr but at the last level
  int64_t seq_len_q;
  int64_t num_sums;
  int64_t count;  // of numbers that this level adds up for each sum
  int64_t step;   // how many rows apart they are
  int64_t chunks_per_sum;
};

__global__ void __launch_bounds__(kThreads) sum_shares_kernel(const __grid_constant__ ShareSums params) {
  const int64_t sum_index = blockIdx.x / params.chunks_per_sum;
  const int64_t first = (blockIdx.x - sum_index * params.chunks_per_sum) * kChunk;
  const auto share = [&](int64_t index) -> float& {
    const uint64_t row = static_cast<uint64_t>(index * params.step);
    const uint64_t batch = row / static_cast<uint64_t>(params.seq_len_q);
    return params.shares[(batch * params.num_sums + sum_index) * params.seq_len_q + (row - batch * params.seq_len_q)];
  };
  float sum = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < kChunk; i += kThreads) {
    sum += first + i < params.count ? share(first + i) : 0.f;
  }
  sum = rows::sum_over_lanes(sum, 32);
  __shared__ float warp_sums[kThreads / 32];
  if (threadIdx.x % 32 == 0) {
    warp_sums[threadIdx.x / 32] = sum;
  }
  __syncthreads();  // also: all of the chunk has been read before its first number is replaced
  if (threadIdx.x == 0) {
    sum = 0.f;
    for (const float warp_sum : warp_sums) {
      sum += warp_sum;
    }
    (params.result ? params.result[sum_index] : share(first)) = sum;
  }
}

void sum_shares(const BackwardParams& params, cudaStream_t stream) {
  const bool per_head = params.scale_stride != 0;
  const int64_t num_rows = int64_t{params.batch} * params.num_heads * params.seq_len_q;
  ShareSums arguments{};
  arguments.shares = params.delta;
  arguments.seq_len_q = params.seq_len_q;
  arguments.num_sums = per_head ? params.num_heads : 1;
  if (num_rows == 0) {
    CUDA_CHECK(cudaMemsetAsync(params.dscale, 0, arguments.num_sums * sizeof(float), stream));
    return;
  }
  arguments.step = 1;
  for (int64_t count = num_rows / arguments.num_sums; !arguments.result; count = arguments.chunks_per_sum) {
    arguments.count = count;
    arguments.chunks_per_sum = (count + kChunk - 1) / kChunk;
    arguments.result = arguments.chunks_per_sum == 1 ? params.dscale : nullptr;
    const unsigned blocks = static_cast<unsigned>(arguments.num_sums * arguments.chunks_per_sum);
    sum_shares_kernel<<<blocks, kThreads, 0, stream>>>(arguments);
    CUDA_CHECK(cudaGetLastError());
    arguments.step *= kChunk;
  }
}

// Whether a query sees a key.
__device__ bool is_seen(const BackwardParams& params, const rows::Position& position) {
  const Mask& mask = params.mask;
  const int key = static_cast<int>(position.row);
  if (mask.data != nullptr && !mask.data[position.batch * mask.stride_batch + key * mask.stride_key]) return false;
  const Range queries = queries_of(params, key);
  return queries.first < queries.end;
}

// How many splits have a share of the walk over queries that see a key. sm80/backward.cuh's write zeros without one.
__device__ int splits_of_key(const BackwardParams& params, int key) {
  const auto& plan = params.plan;
  if (!plan.sm90) return plan.num_splits;
  const Range blocks = walk_of(params, key / plan.block_k, plan.block_q, plan.block_k);
  return min(plan.num_splits, params.num_heads / params.num_kv_heads * (blocks.end - blocks.first));
}

// The first key_blocks blocks have rows of dk, the others of dv.
template <typename T, bool kGrouped>
__device__ __forceinline__ void merge_dkv(const BackwardParams& params, unsigned block, unsigned key_blocks) {
  const rows::RowLanes<T> lanes(params.head_dim);
  const bool is_key = block < key_blocks;
  const int64_t flat_row = flat_row_of_thread(lanes, block - (is_key ? 0 : key_blocks));
  const int64_t num_rows = int64_t{params.batch} * params.num_kv_heads * params.seq_len_k;
  const bool active = flat_row < num_rows;
  const rows::Position position = rows::position_of(flat_row, params.num_kv_heads, params.seq_len_k);

  const float* partial = params.dkv_partials + ((is_key ? 0 : num_rows) + flat_row) * params.head_dim;
  // Of a key that nobody sees there is no gradient, and there may be no walk.
  const bool seen = active && is_seen(params, position);
  const int num_splits = seen ? splits_of_key(params, static_cast<int>(position.row)) : 0;
  typename rows::RowLanes<T>::Slice gradient;
  lanes.load(gradient, partial, num_splits > 0);
#pragma unroll 2
  for (int split = 1; split < params.plan.num_splits; ++split) {
    partial += 2 * num_rows * params.head_dim;
    typename rows::RowLanes<T>::Slice next;
    lanes.load(next, partial, split < num_splits);
#pragma unroll
    for (int i = 0; i < lanes.kSlice; ++i) {
      gradient[i] += next[i];
    }
  }
  if (is_key && params.l2norm_qk) {
    typename rows::RowLanes<T>::Slice k;
    lanes.load(k, rows::row_of<const T>(params.k, position), active);
    project<kGrouped>(lanes, k, gradient, params.groups);
  }
  lanes.store(rows::row_of<T>(is_key ? params.dk : params.dv, position), gradient, active);
}

// The first dq_blocks blocks have rows of dq; with kMerges others add up dk and dv.
template <typename T, bool kGrouped, bool kMerges>
__global__ void __launch_bounds__(kThreads)
    postprocess_kernel(const __grid_constant__ BackwardParams params, unsigned dq_blocks, unsigned key_blocks) {
  if (!kMerges || blockIdx.x < dq_blocks) return write_dq<T, kGrouped>(params, blockIdx.x);
  if constexpr (kMerges) merge_dkv<T, kGrouped>(params, blockIdx.x - dq_blocks, key_blocks);
}

// Zeros for keys that nobody sees: sm90/backward.cuh leaves out tiles of nothing else. Most often there are none: a
// lane looks at a key, and the warp writes the rows that it finds.
template <typename T>
__global__ void __launch_bounds__(kThreads) unseen_kernel(const __grid_constant__ BackwardParams params) {
  const int64_t num_rows = int64_t{params.batch} * params.num_kv_heads * params.seq_len_k;
  const int64_t first_row = int64_t{blockIdx.x} * kThreads + threadIdx.x / 32 * 32;
  const int lane = static_cast<int>(threadIdx.x & 31);
  const auto position_of = [&](int64_t row) { return rows::position_of(row, params.num_kv_heads, params.seq_len_k); };
  const bool unseen = first_row + lane < num_rows && !is_seen(params, position_of(first_row + lane));
  for (unsigned left = __ballot_sync(0xffffffffu, unseen); left != 0;) {
    const int last = 31 - __clz(static_cast<int>(left));
    left ^= 1u << last;
    const rows::Position position = position_of(first_row + last);
    if (8 * lane >= params.head_dim) continue;
    for (const Tensor* gradient : {&params.dk, &params.dv}) {
      if (gradient->data == nullptr) continue;
      reinterpret_cast<uint4*>(rows::row_of<T>(*gradient, position))[lane] = uint4{};
    }
  }
}

template <typename T, bool kGrouped>
void launch_postprocess_as(const BackwardParams& params, cudaStream_t stream) {
  const bool needs_dq = params.dq.data != nullptr || params.dscale != nullptr;
  const int64_t num_queries = int64_t{params.batch} * params.num_heads * params.seq_len_q;
  const int64_t num_keys = int64_t{params.batch} * params.num_kv_heads * params.seq_len_k;
  const unsigned dq_blocks = needs_dq ? blocks_for<T>(num_queries, params.head_dim) : 0;
  const unsigned blocks_per_tensor = params.plan.num_splits == 0 ? 0 : blocks_for<T>(num_keys, params.head_dim);
  const unsigned key_blocks = params.dk.data != nullptr ? blocks_per_tensor : 0;
  const unsigned merge_blocks = key_blocks + (params.dv.data != nullptr ? blocks_per_tensor : 0);
  if (dq_blocks + merge_blocks == 0) return;
  const auto kernel = merge_blocks > 0 ? postprocess_kernel<T, kGrouped, true> : postprocess_kernel<T, kGrouped, false>;
  const size_t bytes = shared_bytes<T>(kGrouped);
  kernel<<<dq_blocks + merge_blocks, kThreads, bytes, stream>>>(params, dq_blocks, key_blocks);
  CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void launch_unseen_as(const BackwardParams& params, cudaStream_t stream) {
  if (params.dk.data == nullptr && params.dv.data == nullptr) return;
  const int64_t num_rows = int64_t{params.batch} * params.num_kv_heads * params.seq_len_k;
  if (num_rows == 0) return;
  unseen_kernel<T><<<static_cast<unsigned>((num_rows + kThreads - 1) / kThreads), kThreads, 0, stream>>>(params);
  CUDA_CHECK(cudaGetLastError());
}

// Each distance is on a few diagonals of tiles: attention.h's DiagonalSums.
__global__ void __launch_bounds__(kThreads) distance_merge_kernel(const __grid_constant__ BackwardParams params) {
  const int num_distances = params.by_distance.num_distances;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, head = index / num_distances;
  if (head >= params.num_heads) return;
  const int t = params.by_distance.first_distance + static_cast<int>(index - head * num_distances);
  const DiagonalSums& diagonals = params.plan.diagonals;
  const float* sums = params.distance_sums + head * diagonals.num * diagonals.distances();
  float total = 0.f;
  if (params.distance_scores.least <= t && t <= params.distance_scores.most) {
    const int place = t + (diagonals.block_k - 1) - diagonals.first * diagonals.block_k;  // on the first
    const int last = min(diagonals.num - 1, place / diagonals.block_k);
    for (int i = max(0, last - diagonals.block_q / diagonals.block_k); i <= last; ++i) {
      const int own = place - i * diagonals.block_k;
      if (own < diagonals.distances()) total += sums[i * diagonals.distances() + own];
    }
  }
  params.ddistance_bias[index] = total;
}

}  // namespace

void launch_distance_merge(const BackwardParams& params, cudaStream_t stream) {
  const int64_t entries = int64_t{params.num_heads} * params.by_distance.num_distances;
  if (entries == 0) return;
  distance_merge_kernel<<<static_cast<unsigned>((entries + kThreads - 1) / kThreads), kThreads, 0, stream>>>(params);
  CUDA_CHECK(cudaGetLastError());
}

void launch_unseen(const BackwardParams& params, cudaStream_t stream) {
  // Without a mask the query at distance 0 sees a key, if there is one.
  const bool all_seen = params.mask.data == nullptr && params.sequences.queries == nullptr &&
                        params.seq_len_q >= params.seq_len_k;
  if (all_seen || params.plan.num_splits > 0) {
    return;  // launch_postprocess writes all rows
  }
  rows::with_dtype(params.dtype, [&]<typename T>() { launch_unseen_as<T>(params, stream); });
}

void launch_postprocess(const BackwardParams& params, cudaStream_t stream) {
  const bool grouped = params.l2norm_qk && params.groups > 1;
  rows::with_dtype(params.dtype, [&]<typename T>() {
    if (grouped) return launch_postprocess_as<T, true>(params, stream);
    launch_postprocess_as<T, false>(params, stream);
  });
  if (params.dscale != nullptr) sum_shares(params, stream);
}

}  // namespace flash_cosine_sim
