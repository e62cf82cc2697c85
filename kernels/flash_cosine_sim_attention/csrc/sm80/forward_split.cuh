// Forward for few queries and many keys (decoding, and grids too small to fill a GPU), mma.sync.
//
//   rows     all queries of the heads that share a key: row r is query r / group of head r % group, so that keys and
//            values are read once for all of them
//   blocks   up to kBlockQ rows, and one of num_splits shares of the keys
//   warps    few rows leave warps over: those with the same rows share out the keys of a block
//
// What warps and splits find are plain sums, as P needs no maximum: warps add theirs up in shared memory, splits leave
// theirs in a workspace for merge.cu. Both in a fixed order.
#pragma once

#include "launch.h"
#include "sm80/forward_warp.cuh"
#include "sm80/split_sums.cuh"
#include "sm80/tiles/forward_split.h"

namespace flash_cosine_sim {

template <Math kMath, int kHeadDim>
struct ForwardSplit : Forward<kMath, SplitTraits<kMath, kHeadDim>> {
  using Traits = SplitTraits<kMath, kHeadDim>;
  using Base = Forward<kMath, Traits>;
  using T = Element<kMath>;
  using typename Base::Output;
  using typename Base::QFragments;
  using typename Base::RowSums;
  using typename Base::Scores;
  using Base::kSteps, Base::kUnrollQK;
  static constexpr int kRowBytes = Traits::kRowBytes, kRowTiles = Traits::kRowTiles, kBlockK = Traits::kBlockK;
  static constexpr int kWarpRows = Traits::kWarpRows, kPitch = Traits::kPitch;
  // A number a key, of a lane's own: fragments of 8 keys give lane l a quarter of the channels of key l / 4.
  using KeyNumbers = float[kBlockK / 8];

  struct Work {
    int batch, kv_head, split;
    int first_row, num_rows;  // of the block
  };

  // Blocks that share keys are neighbours.
  static __device__ Work find_work(const ForwardParams& params, unsigned block, int num_tiles, int tile_rows) {
    const unsigned tile = block % num_tiles, rest = block / num_tiles;
    const unsigned kv_head = rest / params.plan.num_splits;
    const int first_row = static_cast<int>(tile) * tile_rows;
    return {static_cast<int>(kv_head / params.num_kv_heads), static_cast<int>(kv_head % params.num_kv_heads),
            static_cast<int>(rest % params.plan.num_splits), first_row,
            min(tile_rows, group_of(params) * params.seq_len_q - first_row)};
  }

  static __device__ int group_of(const ForwardParams& params) { return params.num_heads / params.num_kv_heads; }

  // Of a row of the block, which need not exist: then its query does not, either.
  static __device__ rows::Position position_of(const ForwardParams& params, const Work& work, int row) {
    const int group = group_of(params), query = (work.first_row + row) / group;
    return {work.batch, work.kv_head * group + work.first_row + row - query * group, query};
  }

  // What num_rows rows of the block, from `row` on, see.
  static __device__ Band keys_of_work(const ForwardParams& params, const Work& work, int row, int num_rows) {
    const int group = group_of(params), first = (work.first_row + row) / group;
    return keys_of_rows(params, first, (work.first_row + row + num_rows - 1) / group + 1 - first);
  }

  static __device__ void load_keys(const ForwardParams& params, const Work& work, uint32_t stage, int first_key) {
    constexpr int kBlockKeys = Traits::kBlockKeys;
    const int num_rows = params.seq_len_k - first_key, valid_bytes = params.head_dim * static_cast<int>(sizeof(T));
    load_tile<kBlockKeys, kRowBytes, Traits::kThreads>(stage,
                                                       Base::rows_of(params.k_hat, work.batch, work.kv_head, first_key),
                                                       params.k_hat.stride_row * sizeof(T), num_rows, valid_bytes);
    load_tile<kBlockKeys, kRowBytes, Traits::kThreads>(stage + kBlockKeys * kRowBytes,
                                                       Base::rows_of(params.v, work.batch, work.kv_head, first_key),
                                                       params.v.stride_row * sizeof(T), num_rows, valid_bytes);
  }

  // q_hat of the block's rows, with the bits that launch_normalize would give it. The other rows of the tile are zero,
  // and so are channels beyond head_dim.
  static __device__ void load_queries(const ForwardParams& params, const Work& work, char* tile) {
    for (int i = threadIdx.x; i < Traits::kBlockQ * kRowBytes / 16; i += Traits::kThreads) {
      reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    using Lanes = rows::RowLanes<T>;
    const Lanes lanes(params.head_dim);
    const int step = Traits::kWarps * lanes.rows_per_warp();
    for (int first = static_cast<int>(threadIdx.x / 32) * lanes.rows_per_warp(); first < work.num_rows; first += step) {
      const int row = first + lanes.row_in_warp();
      const rows::Position position = position_of(params, work, row);
      typename Lanes::Slice x;
      lanes.load(x, rows::row_of<const T>(params.q_hat, position), row < work.num_rows);
      if (params.plan.q_norm == Norm::kKernel) {
        rows::normalize(x, lanes.lanes());
        const float factor = scale_log2(params, static_cast<int>(position.head));
#pragma unroll
        for (int i = 0; i < Lanes::kSlice; ++i) x[i] *= factor;
      }
#pragma unroll
      for (int vector = 0; vector < 2; ++vector) {
        const int chunk = lanes.lane + (vector << lanes.log2);
        if (row < work.num_rows && chunk * Lanes::kVector < params.head_dim) {
          rows::store_channels<Lanes::kVector>(reinterpret_cast<T*>(tile + swizzle<kRowBytes>(row, chunk)),
                                               x + vector * Lanes::kVector);
        }
      }
    }
    __syncthreads();
  }

  static __device__ void finish_scores(const ForwardParams& params, const Work& work, Scores& scores, int row,
                                       int first_key, uint64_t visible) {
    // Opaque: nothing of it is worth a register in the loop around this call.
    const int lane = opaque(static_cast<int>(threadIdx.x & 31));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const rows::Position position = position_of(params, work, row + 16 * m + 8 * half + (lane >> 2));
        const int head = static_cast<int>(position.head), query = static_cast<int>(position.row);
        const float score_scale = params.l2norm_qk ? 1.f : scale_log2(params, head);
        Base::finish_row(params, work.batch, head, query, score_scale, scores[m], half, lane, first_key, visible);
      }
    }
    if (params.distance_scores.data == nullptr) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const rows::Position position = position_of(params, work, opaque(row) + 16 * m + 8 * half + (lane >> 2));
        Base::add_distances(params, work.batch, static_cast<int>(position.head), static_cast<int>(position.row),
                            scores[m], half, lane, first_key);
      }
    }
  }

  // Fragments of 16 keys times a number for each.
  static __device__ void multiply_keys(uint32_t (&b)[4], const float* factors) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(b[i]);
      b[i] = pack<T>(x.x * factors[i / 2], x.y * factors[i / 2]);
    }
  }

  // 1 / |k| of kBlockK keys. Returns whether no square that matters leaves float32; if not, so that powers of two, with
  // which the keys have to be multiplied first, become known.
  template <bool kRescaled>
  static __device__ bool invert_norms(KeyNumbers& inverse, KeyNumbers& powers, uint32_t tile_k) {
    bool safe = true;
#pragma unroll
    for (int n = 0; n < kBlockK / 8; n += 2) {
      float sums[2] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        load_b<kRowBytes>(b, tile_k, 8 * n, step);
        if constexpr (kRescaled) multiply_keys(b, powers + n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(b[i]);
          sums[i / 2] = fmaf(x.y, x.y, fmaf(x.x, x.x, sums[i / 2]));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = rows::sum_over_lanes(sums[half], 4);
        if constexpr (!kRescaled && __is_same(T, __nv_bfloat16)) {  // float16's squares are safe
          const bool too_small = sum <= rows::kSmallestSafe, too_large = sum >= rows::kLargestSafe;
          powers[n + half] = too_small ? 0x1p100f : too_large ? 0x1p-70f : 1.f;
          safe = safe && !too_small && !too_large;
        }
        inverse[n + half] = sum == 0.f ? 0.f : rsqrtf(sum);
      }
    }
    return __is_same(T, __half) || !__any_sync(rows::kWholeWarp, !safe);
  }

  // S = q_hat k_hat^T, where k_hat, k / |k| rounded as launch_normalize does it, is made of k on the way: the backward
  // pass has that k_hat, but for some roundings that float32's last bit decides.
  template <bool kRescaled>
  static __device__ void multiply_normalizing(Scores& scores, const QFragments& q, uint32_t tile_q, uint32_t tile_k,
                                              int row, const KeyNumbers& inverse, const KeyNumbers& powers) {
    multiply<kMath, kSteps, kUnrollQK>(
        scores, [&](uint32_t (&a)[4], int m, int step) { Base::load_q(a, q, tile_q, row, m, step); },
        [&](uint32_t (&b)[4], int n, int step) {
          load_b<kRowBytes>(b, tile_k, 8 * n, step);
          if constexpr (kRescaled) multiply_keys(b, powers + n);
          multiply_keys(b, inverse + n);
        });
  }

  static __device__ void multiply_qk(const ForwardParams& params, Scores& scores, const QFragments& q, uint32_t tile_q,
                                     uint32_t tile_k, int row) {
    if constexpr (Traits::kNormalizesFragments) {
      if (params.plan.k_norm == Norm::kKernel) {
        KeyNumbers inverse, powers;
        if (invert_norms<false>(inverse, powers, tile_k)) {
          multiply_normalizing<false>(scores, q, tile_q, tile_k, row, inverse, powers);
        } else {
          invert_norms<true>(inverse, powers, tile_k);
          multiply_normalizing<true>(scores, q, tile_q, tile_k, row, inverse, powers);
        }
        return;
      }
    }
    Base::multiply_qk(scores, q, tile_q, tile_k, row);
  }

  // A warp's rows [row, row + kWarpRows) and kBlockK keys from first_key on, which are at tile_k and tile_v.
  static __device__ void attend(const ForwardParams& params, const Work& work, Output& o, RowSums& sums,
                                const QFragments& q, uint32_t tile_q, uint32_t tile_k, uint32_t tile_v, int row,
                                const Band& band, int first_key) {
    if (!band.sees_any(first_key, first_key + kBlockK)) return;
    uint64_t visible = kAllKeys<kBlockK>;
    if (params.mask.data != nullptr) {
      visible = visible_keys<kBlockK>(params, work.batch, first_key);
      if (visible == 0) return;
    }
    Scores scores = {};
    multiply_qk(params, scores, q, tile_q, tile_k, row);
    const bool plain = !is_finished_later(params) && visible == kAllKeys<kBlockK>;
    if (!plain || !band.sees_all(first_key, first_key + kBlockK)) {
      finish_scores(params, work, scores, row, first_key, visible);
    }
    Base::multiply_pv(o, sums, scores, tile_v);
  }

  // A warp's sums into its own rows of a tile of float32.
  static __device__ void share_sums(uint32_t tile, const Output& o, const RowSums& sums) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + (lane >> 2);
        const uint32_t address = tile + (row * kPitch + 2 * (lane & 3)) * static_cast<int>(sizeof(float));
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          store_shared_v2_f32(address + 8 * n * sizeof(float), o[m][n][2 * half], o[m][n][2 * half + 1]);
        }
        if ((lane & 3) == 0) {
          store_shared_v2_f32(address + kHeadDim * sizeof(float), sums.exact[m][half],
                              (Base::kRoundsP ? sums.rounded : sums.exact)[m][half]);
        }
      }
    }
  }

  // Adds up the sums of the warps with the same rows, warps_q apart, and writes them.
  static __device__ void write(const ForwardParams& params, const Work& work, const float* tiles, int warps_q) {
    const int num_chunks = params.head_dim / 4;
    for (int i = threadIdx.x; i < work.num_rows * num_chunks; i += Traits::kThreads) {
      const int row = i / num_chunks, channel = 4 * (i - row * num_chunks);
      RowPart sum = {};
      for (int warp = row / kWarpRows; warp < Traits::kWarps; warp += warps_q) {
        const float* part = tiles + (warp * kWarpRows + row % kWarpRows) * kPitch;
        sum += {*reinterpret_cast<const float4*>(part + channel), part[kHeadDim], part[kHeadDim + 1]};
      }
      const rows::Position position = position_of(params, work, row);
      if (params.plan.num_splits > 1) {
        store_part(params, work.split, flat_row_of(params, position), channel, sum);
      } else {
        write_result<T>(params, position, channel, sum);
      }
    }
  }
};

template <Math kMath, int kHeadDim>
__global__ void __launch_bounds__(SplitTraits<kMath, kHeadDim>::kThreads, SplitTraits<kMath, kHeadDim>::kMinBlocks)
    forward_split_sm80_kernel(const __grid_constant__ ForwardParams params, int num_tiles, int log2_warps_q) {
  using F = ForwardSplit<kMath, kHeadDim>;
  using Traits = SplitTraits<kMath, kHeadDim>;
  constexpr int kBlockKeys = Traits::kBlockKeys, kBlockK = Traits::kBlockK, kRowBytes = Traits::kRowBytes;
  extern __shared__ __align__(128) char shared[];
  const uint32_t stages = shared_address(shared), tile_q = stages + Traits::kOffsetQ;
  const auto work = F::find_work(params, blockIdx.x, num_tiles, F::kWarpRows << log2_warps_q);
  const int warp = static_cast<int>(threadIdx.x / 32), warps_q = 1 << log2_warps_q;
  const int row = (warp & (warps_q - 1)) * F::kWarpRows;  // the warp's first, as is this key of each block
  const int warp_key = (warp >> log2_warps_q) * kBlockK;

  const Range blocks = blocks_of(F::keys_of_work(params, work, 0, work.num_rows).any, kBlockKeys);
  const int64_t num_blocks = blocks.end - blocks.first;
  const int first_block = blocks.first + static_cast<int>(num_blocks * work.split / params.plan.num_splits);
  const int end_block = blocks.first + static_cast<int>(num_blocks * (work.split + 1) / params.plan.num_splits);

  const auto stage_of = [&](int block) { return stages + ((block - first_block) & 1) * Traits::kStageBytes; };
  if (first_block < end_block) F::load_keys(params, work, stage_of(first_block), first_block * kBlockKeys);
  F::load_queries(params, work, shared + Traits::kOffsetQ);
  typename F::QFragments q;
  if constexpr (Traits::kQInRegisters) {
#pragma unroll
    for (int m = 0; m < F::kRowTiles; ++m) {
#pragma unroll
      for (int step = 0; step < F::kSteps; ++step) load_a<kRowBytes>(q[m][step], tile_q, row + 16 * m, step);
    }
  }

  const Band band = F::keys_of_work(params, work, row, F::kWarpRows);
  typename F::Output o = {};
  typename F::RowSums sums;
  for (int block = first_block; block < end_block; ++block) {
    const uint32_t tile_k = stage_of(block), tile_v = tile_k + kBlockKeys * kRowBytes;
    // This block has arrived for all threads, and all are through with the one before, whose memory is next.
    cp_async_wait_all();
    __syncthreads();
    if (block + 1 < end_block) F::load_keys(params, work, stage_of(block + 1), (block + 1) * kBlockKeys);
    if (!Traits::kNormalizesFragments && params.plan.k_norm == Norm::kKernel) {
      F::template normalize_tile<kBlockKeys>(shared + (tile_k - stages), params.head_dim, 1.f);
      __syncthreads();
    }
    if (row < work.num_rows) {
#pragma unroll 1
      for (int key = warp_key; key < kBlockKeys; key += kBlockKeys >> log2_warps_q) {
        F::attend(params, work, o, sums, q, tile_q, tile_k + key * kRowBytes, tile_v + key * kRowBytes, row, band,
                  block * kBlockKeys + key);
      }
    }
  }

  __syncthreads();  // The sums go where keys, values and q were.
  F::reduce(sums);
  F::share_sums(stages + warp * F::kWarpRows * F::kPitch * static_cast<int>(sizeof(float)), o, sums);
  __syncthreads();
  F::write(params, work, reinterpret_cast<const float*>(shared), warps_q);
}

template <Math kMath, int kHeadDim>
void launch_forward_split_sm80(const ForwardParams& params, cudaStream_t stream) {
  using Traits = SplitTraits<kMath, kHeadDim>;
  const int num_rows = params.num_heads / params.num_kv_heads * params.seq_len_q;
  const int warps_q = Traits::kTile.warps_with_rows(num_rows), tile_rows = warps_q * Traits::kWarpRows;
  const int num_tiles = (num_rows + tile_rows - 1) / tile_rows;
  const int64_t num_kv_heads = int64_t(params.batch) * params.num_kv_heads;
  allow_shared_memory<forward_split_sm80_kernel<kMath, kHeadDim>, Traits::kSharedBytes>();
  const auto num_blocks = static_cast<unsigned>(num_kv_heads * params.plan.num_splits * num_tiles);
  forward_split_sm80_kernel<kMath, kHeadDim>
      <<<num_blocks, Traits::kThreads, Traits::kSharedBytes, stream>>>(params, num_tiles, rows::log2_lanes(warps_q, 1));
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_cosine_sim
