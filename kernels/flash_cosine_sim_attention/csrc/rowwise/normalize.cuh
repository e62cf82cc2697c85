// q_hat = c * q / |q| and k_hat = k / |k|, c = scale * log2(e): each row is read and written once.
//
// A q_hat that is q itself, or a k_hat that is k, is left to the attention kernel.
#pragma once

#include "attention.h"
#include "common/rows.cuh"
#include "common/scale.cuh"

namespace flash_cosine_sim {

struct Normalization {
  static constexpr int kThreads = 256;

  struct Side {
    Tensor source, unit;
    int64_t num_rows;
    int num_heads, seq_len;
  };

  Side sides[2];                      // queries, keys
  unsigned query_blocks, key_blocks;  // of threads, one after the other
  int head_dim, groups;
  const float* scale;
  int scale_stride;
  float scale_value;

  unsigned num_blocks() const { return query_blocks + key_blocks; }

  template <typename T>
  static Normalization of(const Attention& params) {
    const auto make_side = [&](const Tensor& source, const Tensor& unit, int num_heads, int seq_len) {
      const int64_t num_rows = unit.data == source.data ? 0 : int64_t{params.batch} * num_heads * seq_len;
      return Side{source, unit, num_rows, num_heads, seq_len};
    };
    Normalization result{};
    result.sides[0] = make_side(params.q, params.q_hat, params.num_heads, params.seq_len_q);
    result.sides[1] = make_side(params.k, params.k_hat, params.num_kv_heads, params.seq_len_k);
    result.head_dim = params.head_dim;
    result.groups = params.groups;
    result.scale = params.scale;
    result.scale_stride = params.scale_stride;
    result.scale_value = params.scale_value;
    // A full block writes 4 KiB at least, so no memory is large enough for 2^31 of them.
    const int rows_per_block = kThreads >> rows::log2_lanes(params.head_dim, rows::RowLanes<T>::kSlice);
    const auto blocks_of = [&](const Side& side) {
      return static_cast<unsigned>((side.num_rows + rows_per_block - 1) / rows_per_block);
    };
    result.query_blocks = blocks_of(result.sides[0]);
    result.key_blocks = blocks_of(result.sides[1]);
    return result;
  }

  template <typename T, bool kGrouped>
  static constexpr size_t kSharedBytes = kGrouped ? kThreads * rows::RowLanes<T>::kSlice * sizeof(float) : 0;

  // What block `index` of kThreads threads does, with kSharedBytes of dynamic shared memory. Without kGrouped, one
  // group.
  template <typename T, bool kGrouped>
  __device__ __forceinline__ void run(unsigned index) const {
    const rows::RowLanes<T> lanes(head_dim);
    const bool is_query = index < query_blocks;
    const Side& side = sides[is_query ? 0 : 1];
    const int64_t block = index - (is_query ? 0 : query_blocks);
    const int64_t flat_row = block * (kThreads >> lanes.log2) + (threadIdx.x >> lanes.log2);
    const bool active = flat_row < side.num_rows;
    const rows::Position position = rows::position_of(flat_row, side.num_heads, side.seq_len);

    typename rows::RowLanes<T>::Slice x;
    lanes.load(x, rows::row_of<const T>(side.source, position), active);
    float factor = 1.f;
    if (is_query) {
      // position.head is in range even where the row is not active.
      factor = bounded_scale(scale, scale_stride, scale_value, position.head) * kLog2E;
    }

    if constexpr (kGrouped) {
      extern __shared__ float4 shared_memory[];
      float* warp_tile = reinterpret_cast<float*>(shared_memory) + threadIdx.x / 32 * (32 * lanes.kSlice);
      float* tile_row = warp_tile + lanes.row_in_warp() * head_dim;
      lanes.store(tile_row, x, true);
      __syncwarp();
      const int num_groups = lanes.rows_per_warp() * groups;
      rows::for_each_group(num_groups, head_dim / groups, [&](const auto& channels, int group_lanes) {
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
};

// Being the launch before the main kernel, one that normalises also zeroes that one's counters, which spares a memset.
template <int kThreads>
__device__ __forceinline__ void zero_counters(uint32_t* counters, int64_t num_counters) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_counters; i += int64_t{gridDim.x} * kThreads) {
    counters[i] = 0;
  }
}

}  // namespace flash_cosine_sim
