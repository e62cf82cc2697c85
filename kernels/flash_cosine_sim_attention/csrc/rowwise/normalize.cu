// q_hat = c * q / |q| and k_hat = k / |k|, c = scale * log2(e), in one launch: each row is read and written once.
//
// A q_hat that is q itself, or a k_hat that is k, is left to the attention kernel. Being the launch before that one,
// this one also zeroes its counters, which spares a memset.
#include "attention.h"
#include "cuda_check.h"
#include "common/rows.cuh"
#include "common/scale.cuh"

namespace flash_cosine_sim {
namespace {

constexpr int kThreads = 256;

struct Side {
  Tensor source, unit;
  int64_t num_rows;
  int num_heads, seq_len;
};

struct NormalizeParams {
  Side sides[2];          // queries, keys
  unsigned query_blocks;  // how many blocks, the first ones, have rows of queries
  int head_dim, groups;
  const float* scale;
  int scale_stride;
  float scale_value;
  uint32_t* counters;
  int64_t num_counters;
};

template <typename T, bool kGrouped>
__global__ void __launch_bounds__(kThreads) normalize_kernel(const __grid_constant__ NormalizeParams params) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < params.num_counters;
       i += int64_t{gridDim.x} * kThreads) {
    params.counters[i] = 0;
  }
  const rows::RowLanes<T> lanes(params.head_dim);
  const bool is_query = blockIdx.x < params.query_blocks;
  const Side& side = params.sides[is_query ? 0 : 1];
  const int64_t block = blockIdx.x - (is_query ? 0 : params.query_blocks);
  const int64_t flat_row = block * (kThreads >> lanes.log2) + (threadIdx.x >> lanes.log2);
  const bool active = flat_row < side.num_rows;
  const rows::Position position = rows::position_of(flat_row, side.num_heads, side.seq_len);

  typename rows::RowLanes<T>::Slice x;
  lanes.load(x, rows::row_of<const T>(side.source, position), active);
  float factor = 1.f;
  if (is_query) {
    // position.head is in range even where the row is not active.
    factor = bounded_scale(params.scale, params.scale_stride, params.scale_value, position.head) * kLog2E;
  }

  if constexpr (kGrouped) {
    extern __shared__ float4 shared_memory[];
    float* warp_tile = reinterpret_cast<float*>(shared_memory) + threadIdx.x / 32 * (32 * lanes.kSlice);
    float* tile_row = warp_tile + lanes.row_in_warp() * params.head_dim;
    lanes.store(tile_row, x, true);
    __syncwarp();
    const int num_groups = lanes.rows_per_warp() * params.groups;
    rows::for_each_group(num_groups, params.head_dim / params.groups, [&](const auto& channels, int group_lanes) {
      float group[rows::kGroupSlice];
      rows::load_group(group, warp_tile, channels);
      rows::normalize(group, group_lanes);
      rows::store_group(warp_tile, group, channels);
    });
    __syncwarp();
    lanes.load(x, tile_row, true);
  } else {
    rows::normalize(x, lanes.lanes());
  }

#pragma unroll
  for (int i = 0; i < lanes.kSlice; ++i) {
    x[i] *= factor;
  }
  lanes.store(rows::row_of<T>(side.unit, position), x, active);
}

template <typename T>
void launch(const Attention& params, uint32_t* counters, int64_t num_counters, cudaStream_t stream) {
  using Lanes = rows::RowLanes<T>;
  NormalizeParams arguments{};
  const auto make_side = [&](const Tensor& source, const Tensor& unit, int num_heads, int seq_len) {
    const int64_t num_rows = unit.data == source.data ? 0 : int64_t{params.batch} * num_heads * seq_len;
    return Side{source, unit, num_rows, num_heads, seq_len};
  };
  arguments.sides[0] = make_side(params.q, params.q_hat, params.num_heads, params.seq_len_q);
  arguments.sides[1] = make_side(params.k, params.k_hat, params.num_kv_heads, params.seq_len_k);
  arguments.head_dim = params.head_dim;
  arguments.groups = params.groups;
  arguments.scale = params.scale;
  arguments.scale_stride = params.scale_stride;
  arguments.scale_value = params.scale_value;
  arguments.counters = counters;
  arguments.num_counters = num_counters;
  // A full block writes 4 KiB at least, so no memory is large enough for 2^31 of them.
  const int rows_per_block = kThreads >> rows::log2_lanes(params.head_dim, Lanes::kSlice);
  const int64_t query_blocks = (arguments.sides[0].num_rows + rows_per_block - 1) / rows_per_block;
  const int64_t key_blocks = (arguments.sides[1].num_rows + rows_per_block - 1) / rows_per_block;
  arguments.query_blocks = static_cast<unsigned>(query_blocks);
  const unsigned blocks = static_cast<unsigned>(query_blocks + key_blocks);
  if (blocks == 0) {
    return;
  }
  if (params.groups == 1) {
    normalize_kernel<T, false><<<blocks, kThreads, 0, stream>>>(arguments);
  } else {
    const size_t shared_bytes = kThreads * Lanes::kSlice * sizeof(float);
    normalize_kernel<T, true><<<blocks, kThreads, shared_bytes, stream>>>(arguments);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_normalize(const Attention& params, uint32_t* counters, int64_t num_counters, cudaStream_t stream) {
  rows::with_dtype(params.dtype, [&]<typename T>() { launch<T>(params, counters, num_counters, stream); });
}

}  // namespace flash_cosine_sim
