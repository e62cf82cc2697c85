// Backward, mma.sync:   P = 2^(S - row_sum_log2),  dP = dO V^T,  dS = P * (dP - delta),
//                       dV = P^T dO,  dK^ = dS^T q_hat,  dQ^ = dS k_hat.
//
//                kBlockQ queries
//              +-----------------+      A block owns kBlockK keys of one head and walks over the queries; warp w
//   kBlockK    | S^T, dP^T (regs)|      owns rows [w * kRowsPerWarp, ...). With the keys as rows, P^T and dS^T turn
//   keys       |                 |      from accumulators into operands of dV and dK in registers, and whether a
//              +-----------------+      key is visible is one bit a row for the whole walk.
//
// dQ sums over keys, so over warps: dS goes through shared memory once for it. Blocks of other keys add to the same
// rows of dQ: in global memory, in float32, in any order; or, deterministic, in the order of the keys.
#pragma once

#include "launch.h"
#include "common/band.cuh"
#include "common/rows.cuh"
#include "common/scores.cuh"
#include "sm80/tiles/backward.h"

namespace flash_cosine_sim {

template <Math kMath, int kHeadDim, bool kEightWarps>
struct Backward {
  using Traits = BackwardTraits<kMath, kHeadDim, kEightWarps>;
  using T = Element<kMath>;
  static constexpr int kRowBytes = Traits::kRowBytes, kRowTiles = Traits::kRowTiles, kOutDim = Traits::kOutDim;
  static constexpr int kBlockK = Traits::kBlockK, kBlockQ = Traits::kBlockQ, kChunkQ = Traits::kChunkQ;
  static constexpr int kThreads = Traits::kThreads;
  static constexpr int kSteps = kRowBytes / 32;  // of the contraction over the head dim

  using Scores = float[kRowTiles][kChunkQ / 8][4];
  using Gradient = float[kRowTiles][kOutDim / 8][4];

  // Which keys a block owns, and which of the (head, block of queries) pairs that see them it walks over.
  struct Work {
    int batch, kv_head, block_k, slice, split;
    int first_block_q, num_blocks_q;  // blocks of queries that see these keys, for each head
    int begin, end;                   // of the pairs, head by head
  };

  struct Item {
    int head, block_q;
  };

  // Which tile a block has. Deterministic, a block waits for those of lower keys, and CUDA does not promise that they
  // start before it: so blocks take numbers from a counter, and those of lower numbers, which have lower keys of a
  // head, have been started, whatever else the GPU does.
  // Numbers are kept behind the counter: shared memory, of which two blocks just fit on a 8.0, has no room.
  static __device__ void take_number(const BackwardParams& params) {
    if (params.dq_order == nullptr) return;
    if (threadIdx.x == 0) params.counters[1 + blockIdx.x] = atomic_increment(params.counters);
    __syncthreads();
  }

  // Opaque: found anew, or it would occupy a register through the loop.
  static __device__ unsigned block_number(const BackwardParams& params) {
    const auto block = static_cast<unsigned>(opaque(static_cast<int>(blockIdx.x)));
    return params.dq_order == nullptr ? block : params.counters[1 + block];
  }

  static __device__ Work find_work(const BackwardParams& params, unsigned index) {
    const int num_splits = max(params.plan.num_splits, 1), num_blocks_k = (params.seq_len_k + kBlockK - 1) / kBlockK;
    Work work;
    work.slice = static_cast<int>(index % Traits::kSlices);
    index /= Traits::kSlices;
    work.split = static_cast<int>(index % num_splits);
    index /= num_splits;
    // Where walks are cut there are few tiles, and those of the first keys, under a causal mask the longest, come
    // first: walk_splits.h counts on that. With many, a head's follow each other.
    const unsigned num_heads = params.batch * params.num_kv_heads;
    const bool heads_in_turn = params.plan.num_splits > 1;
    const unsigned head = heads_in_turn ? index % num_heads : index / num_blocks_k;
    work.block_k = static_cast<int>(heads_in_turn ? index / num_heads : index % num_blocks_k);
    work.kv_head = static_cast<int>(head % params.num_kv_heads);
    work.batch = static_cast<int>(head / params.num_kv_heads);
    const Range blocks = walk_of(params, work.block_k, kBlockQ, kBlockK);
    work.first_block_q = blocks.first;
    work.num_blocks_q = blocks.end - blocks.first;
    const int items = params.num_heads / params.num_kv_heads * work.num_blocks_q;
    const int share = items / num_splits, remainder = items % num_splits;
    work.begin = work.split * share + min(work.split, remainder);
    work.end = work.begin + share + (work.split < remainder);
    return work;
  }

  static __device__ Item find_item(const BackwardParams& params, const Work& work, int index) {
    const int head = work.kv_head * (params.num_heads / params.num_kv_heads) + index / work.num_blocks_q;
    return {head, work.first_block_q + index % work.num_blocks_q};
  }

  template <int kRows>
  static __device__ void load_rows(const BackwardParams& params, uint32_t tile, const Tensor& tensor, int batch,
                                   int head, int first_row, int num_rows) {
    const T* source = static_cast<const T*>(tensor.data) + batch * tensor.stride_batch + head * tensor.stride_head +
                      int64_t(first_row) * tensor.stride_row;
    load_tile<kRows, kRowBytes, kThreads>(tile, reinterpret_cast<const char*>(source), tensor.stride_row * sizeof(T),
                                          num_rows - first_row, params.head_dim * static_cast<int>(sizeof(T)));
  }

  static __device__ void load_queries(const BackwardParams& params, uint32_t stage, int batch, const Item& item) {
    const int row = item.block_q * kBlockQ;
    load_rows<kBlockQ>(params, stage, params.q_hat, batch, item.head, row, params.seq_len_q);
    load_rows<kBlockQ>(params, stage + Traits::kTileBytesQ, params.dout, batch, item.head, row, params.seq_len_q);
  }

  // row_sum_log2 in the first kBlockQ threads' hands, delta in the next ones'. +inf makes P exactly 0 in rows that
  // are empty or do not exist.
  static __device__ float load_row_statistic(const BackwardParams& params, int batch, const Item& item) {
    const int which = static_cast<int>(threadIdx.x) / kBlockQ;
    const int query = item.block_q * kBlockQ + static_cast<int>(threadIdx.x) % kBlockQ;
    if (which > 1) return 0.f;
    if (query >= params.seq_len_q) return which == 0 ? infinity() : 0.f;
    const int64_t row = (int64_t(batch) * params.num_heads + item.head) * params.seq_len_q + query;
    if (which == 1) return params.delta[row];
    const float row_sum_log2 = params.row_sum_log2[row];
    return row_sum_log2 == -infinity() ? infinity() : row_sum_log2;
  }

  static __device__ void store_row_statistic(float* statistics, float value) {
    static_assert(2 * kBlockQ <= kThreads);
    if (threadIdx.x < 2 * kBlockQ) statistics[threadIdx.x] = value;
  }

  // Rows [row, ...) of a b^T, for a tile of keys a and queries [column, ...) of a tile b.
  static __device__ void multiply_scores(Scores& scores, uint32_t tile_a, uint32_t tile_b, int row, int column) {
    // Unrolled further, loads would be hoisted until registers run out.
    constexpr int kUnroll = kSteps >= 4 ? (sizeof(T) == 4 && kHeadDim <= 64 ? 4 : 2) : kSteps;
    multiply<kMath, kSteps, kUnroll>(
        scores, [&](uint32_t (&a)[4], int m, int step) { load_a<kRowBytes>(a, tile_a, row + 16 * m, step); },
        [&](uint32_t (&b)[4], int n, int step) { load_b<kRowBytes>(b, tile_b, column + 8 * n, step); });
  }

  // gradient += x b for x in accumulators (keys, queries [query, ...)) and a slice of columns of the tile b.
  static __device__ void multiply_gradient(Gradient& gradient, const Scores& x, uint32_t tile_b, int query, int slice) {
    // Multiples of 128 bytes do not take part in the swizzle.
    static_assert(Traits::kSlices == 1 || kOutDim * sizeof(T) % 128 == 0);
    tile_b += slice * kOutDim * static_cast<int>(sizeof(T));
    constexpr int kQueries = kContraction<kMath>, kStepsQ = kChunkQ / kQueries;
    multiply<kMath, kStepsQ, kStepsQ>(
        gradient, [&](uint32_t (&a)[4], int m, int step) { accumulator_to_a<kMath>(a, x[m], step); },
        [&](uint32_t (&b)[4], int n, int step) {
          load_b_transposed<kMath, kRowBytes>(b, tile_b, 8 * n, query / kQueries + step);
        });
  }

  // Scale, bias and masks of S^T. `row` is the warp's first key, `visible` a bit for each of its keys.
  static __device__ void finish_scores(const BackwardParams& params, int batch, int head, Scores& scores, int row,
                                       int first_query, unsigned visible) {
    // Opaque: most calls of the loop around this one are skipped, and nothing of it is worth a register there.
    const int lane = opaque(static_cast<int>(threadIdx.x & 31));
    const float score_scale = params.l2norm_qk ? 1.f : scale_log2(params, head);
#pragma unroll
    for (int n = 0; n < kChunkQ / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = first_query + 8 * n + 2 * (lane & 3) + i;
        const BiasRow<T> bias(params, batch, head, query, row + (lane >> 2));
        const Range keys = query < params.seq_len_q ? keys_of(params, query) : Range{0, 0};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int offset = 16 * m + 8 * half + (lane >> 2), key = row + offset;
            float& score = scores[m][n][2 * half + i];
            score *= score_scale;
            if (params.bias.data != nullptr) score += bias[16 * m + 8 * half];
            if (!((visible >> offset) & 1) || key < keys.first || key >= keys.end) score = -infinity();
          }
        }
      }
    }
    if (params.distance_scores.data == nullptr) return;
#pragma unroll
    for (int n = 0; n < kChunkQ / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = min(first_query + 8 * n + 2 * (lane & 3) + i, params.seq_len_q - 1);  // then hidden
        const DistanceRow distances(params, batch, head, query, row + (lane >> 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) scores[m][n][2 * half + i] += distances[16 * m + 8 * half];
        }
      }
    }
  }

  // S -> P and dP -> dS, in place.
  static __device__ void softmax_gradient(Scores& scores, Scores& dp, const float* statistics) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < kChunkQ / 8; ++n) {
      const float2 row_sum_log2 = *reinterpret_cast<const float2*>(statistics + 8 * n + 2 * (lane & 3));
      const float2 delta = *reinterpret_cast<const float2*>(statistics + kBlockQ + 8 * n + 2 * (lane & 3));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p = ex2_approx_ftz(scores[m][n][i] - (i & 1 ? row_sum_log2.y : row_sum_log2.x));
          scores[m][n][i] = p;
          dp[m][n][i] = p * (dp[m][n][i] - (i & 1 ? delta.y : delta.x));
        }
      }
    }
  }

  // Adds dS k_hat, of one block of queries and this block's keys, to dq_accumulator.
  static __device__ void accumulate_dq(const BackwardParams& params, const Work& work, const Item& item,
                                       uint32_t tile_ds, uint32_t tile_k) {
    const int thread = opaque(static_cast<int>(threadIdx.x)), warp = thread / 32, lane = thread & 31;
    const int row = 16 * (warp % Traits::kWarpsQ);
    const int column = work.slice * kOutDim + warp / Traits::kWarpsQ * Traits::kDimPerWarp;
    // As above: whole 128 bytes go into the address, so that the compiler knows what is left of the column.
    constexpr bool kWhole = Traits::kDimPerWarp * sizeof(T) % 128 == 0;
    tile_k += kWhole ? column * static_cast<int>(sizeof(T)) : 0;
    const int first_column = kWhole ? 0 : column;
    float dq[1][Traits::kDimPerWarp / 8][4] = {};
    multiply<kMath, kBlockK / kContraction<kMath>, (sizeof(T) == 4 && kHeadDim > 64 ? 2 : 4)>(
        dq,
        [&](uint32_t (&a)[4], int, int step) { load_a_transposed<kMath, Traits::kRowBytesDS>(a, tile_ds, row, step); },
        [&](uint32_t (&b)[4], int n, int step) {
          load_b_transposed<kMath, kRowBytes>(b, tile_k, first_column + 8 * n, step);
        });
    const int64_t first_row = (int64_t(work.batch) * params.num_heads + item.head) * params.seq_len_q;
    int* order = dq_order(params, work, item);
    if (order != nullptr) {
      if (threadIdx.x == 0 && !has_first_turn(params, work.block_k, item.block_q, kBlockQ, kBlockK)) {
        while (load_acquire(order) != work.block_k) __nanosleep(32);
      }
      __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = item.block_q * kBlockQ + row + 8 * half + (lane >> 2);
      if (query >= params.seq_len_q) continue;
      float* target = params.dq_accumulator + (first_row + query) * params.head_dim + 2 * (lane & 3);
#pragma unroll
      for (int n = 0; n < Traits::kDimPerWarp / 8; ++n) {
        if (column + 8 * n >= params.head_dim) continue;
        red_add_v2_f32(target + column + 8 * n, dq[0][n][2 * half], dq[0][n][2 * half + 1]);
      }
    }
    if (order != nullptr) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) store_release(order, work.block_k + 1);
    }
  }

  // The counter of a block of queries: the block of keys whose turn it is. nullptr if any order will do.
  static __device__ int* dq_order(const BackwardParams& params, const Work& work, const Item& item) {
    if (params.dq_order == nullptr) return nullptr;
    const int64_t num_blocks_q = (params.seq_len_q + kBlockQ - 1) / kBlockQ;
    const int64_t head = (int64_t(work.slice) * params.batch + work.batch) * params.num_heads + item.head;
    return params.dq_order + head * num_blocks_q + item.block_q;
  }

  // Through shared memory, in float32, to whole rows: dk has to go through the norm. All threads call it.
  static __device__ void write_gradient(const BackwardParams& params, const Work& work, float* shared,
                                        const Gradient& gradient, float factor, int row, const Tensor& target,
                                        bool l2norm, const Tensor& raw) {
    const int lane = threadIdx.x & 31;
    if (target.data == nullptr) return;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kOutDim / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* place = shared + (row + 16 * m + 8 * half + (lane >> 2)) * Traits::kPitch + 8 * n + 2 * (lane & 3);
          *reinterpret_cast<float2*>(place) =
              make_float2(factor * gradient[m][n][2 * half], factor * gradient[m][n][2 * half + 1]);
        }
      }
    }
    __syncthreads();
    const int64_t first_key = int64_t(work.block_k) * kBlockK;
    const auto rows_of = [&](const Tensor& tensor) {
      return static_cast<T*>(tensor.data) + work.batch * tensor.stride_batch + work.kv_head * tensor.stride_head +
             first_key * tensor.stride_row;
    };
    const int num_rows = min(kBlockK, params.seq_len_k - static_cast<int>(first_key));
    project_rows<T>(shared, Traits::kPitch, num_rows, params.head_dim, params.groups, l2norm, rows_of(raw),
                    raw.stride_row, rows_of(target), target.stride_row);
  }

  static __device__ void write_partial(const BackwardParams& params, const Work& work, int which,
                                       const Gradient& gradient, float factor, int row) {
    const int lane = threadIdx.x & 31;
    const int64_t heads = int64_t(params.batch) * params.num_kv_heads;
    const int split = static_cast<int>(block_number(params) / Traits::kSlices % params.plan.num_splits);
    const int64_t head = (int64_t(split) * 2 + which) * heads + int64_t(work.batch) * params.num_kv_heads +
                         work.kv_head;
    const int column = work.slice * kOutDim + 2 * (lane & 3);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = work.block_k * kBlockK + row + 16 * m + 8 * half + (lane >> 2);
        if (key >= params.seq_len_k) continue;
        float* target = params.dkv_partials + (head * params.seq_len_k + key) * params.head_dim;
#pragma unroll
        for (int n = 0; n < kOutDim / 8; ++n) {
          if (column + 8 * n >= params.head_dim) continue;
          *reinterpret_cast<float2*>(target + column + 8 * n) =
              make_float2(factor * gradient[m][n][2 * half], factor * gradient[m][n][2 * half + 1]);
        }
      }
    }
  }
};

template <Math kMath, int kHeadDim, bool kEightWarps>
__global__ void __launch_bounds__(BackwardTraits<kMath, kHeadDim, kEightWarps>::kThreads,
                                  BackwardTraits<kMath, kHeadDim, kEightWarps>::kMinBlocks)
    backward_sm80_kernel(const __grid_constant__ BackwardParams params) {
  using B = Backward<kMath, kHeadDim, kEightWarps>;
  using Traits = typename B::Traits;
  // Biases of 32 keys a warp, found while dP is there, too, take more registers than there are on a 12.0.
  constexpr bool kFinishesAlone = kEightWarps && B::kRowTiles > 1;
  extern __shared__ __align__(128) char shared[];
  const uint32_t tile_k = shared_address(shared), tile_v = tile_k + Traits::kTileBytesK;
  const uint32_t stages = tile_k + Traits::kOffsetQ, tile_ds = tile_k + Traits::kOffsetDS;
  float* statistics = reinterpret_cast<float*>(shared + Traits::kOffsetRows);  // [stage][which][query]

  B::take_number(params);
  auto work = B::find_work(params, B::block_number(params));
  const int first_key = work.block_k * B::kBlockK;
  const int row = static_cast<int>(threadIdx.x / 32) * 16 * B::kRowTiles;  // the warp's first
  const unsigned all_keys = ~0u >> (32 - 16 * B::kRowTiles);
  const unsigned visible = static_cast<unsigned>(visible_keys<32>(params, work.batch, first_key + row)) & all_keys;
  // Keys that nobody sees have no gradient and give none, but in order they must pass their turn on.
  if (__syncthreads_or(visible != 0) == 0 && params.dq_order == nullptr) work.end = work.begin;

  typename B::Gradient dk = {}, dv = {};
  if (work.begin < work.end) {
    B::template load_rows<B::kBlockK>(params, tile_k, params.k_hat, work.batch, work.kv_head, first_key,
                                      params.seq_len_k);
    B::template load_rows<B::kBlockK>(params, tile_v, params.v, work.batch, work.kv_head, first_key, params.seq_len_k);
    if constexpr (Traits::kStages == 2) {
      const auto item = B::find_item(params, work, work.begin);
      B::load_queries(params, stages, work.batch, item);
      B::store_row_statistic(statistics, B::load_row_statistic(params, work.batch, item));
    }
  }
  for (int index = work.begin; index < work.end; ++index) {
    const auto item = B::find_item(params, work, index);
    const int stage = Traits::kStages == 2 ? (index - work.begin) & 1 : 0;
    const uint32_t tile_q = stages + stage * 2 * Traits::kTileBytesQ, tile_do = tile_q + Traits::kTileBytesQ;
    const float* row_statistics = statistics + stage * 2 * B::kBlockQ;
    const bool has_next = Traits::kStages == 2 && index + 1 < work.end;
    if constexpr (Traits::kStages == 1) {
      __syncthreads();
      B::load_queries(params, stages, work.batch, item);
      B::store_row_statistic(statistics, B::load_row_statistic(params, work.batch, item));
    }
    // These queries have arrived for all threads, and all are through with the ones before, whose memory is next.
    cp_async_wait_all();
    __syncthreads();
    float next_statistic = 0.f;
    if (has_next) {
      const auto next = B::find_item(params, work, index + 1);
      B::load_queries(params, stages + (stage ^ 1) * 2 * Traits::kTileBytesQ, work.batch, next);
      next_statistic = B::load_row_statistic(params, work.batch, next);
    }
    // Not unrolled: the accumulators of one chunk leave no register for the addresses of another.
#pragma unroll 1
    for (int chunk = 0; chunk < B::kBlockQ; chunk += B::kChunkQ) {
      const int first_query = item.block_q * B::kBlockQ + chunk;
      typename B::Scores scores = {}, dp = {};
      B::multiply_scores(scores, tile_k, tile_q, row, chunk);
      if constexpr (!kFinishesAlone) B::multiply_scores(dp, tile_v, tile_do, row, chunk);
      const bool plain = !is_finished_later(params) && visible == all_keys;
      const int end_query = min(first_query + B::kChunkQ, params.seq_len_q);
      if (!plain || !queries_of_rows(params, first_key + row, 16 * B::kRowTiles).sees_all(first_query, end_query)) {
        B::finish_scores(params, work.batch, item.head, scores, first_key + row, first_query, visible);
      }
      if constexpr (kFinishesAlone) B::multiply_scores(dp, tile_v, tile_do, row, chunk);
      B::softmax_gradient(scores, dp, row_statistics + chunk);
#pragma unroll
      for (int m = 0; m < B::kRowTiles; ++m) {
        store_accumulator<kMath, Traits::kRowBytesDS>(tile_ds, dp[m], row + 16 * m, chunk);
      }
      B::multiply_gradient(dv, scores, tile_do, chunk, work.slice);
      B::multiply_gradient(dk, dp, tile_q, chunk, work.slice);
    }
    if (has_next) B::store_row_statistic(statistics + (stage ^ 1) * 2 * B::kBlockQ, next_statistic);
    if (params.dq_accumulator != nullptr) {
      __syncthreads();  // dS of all warps
      B::accumulate_dq(params, work, item, tile_ds, tile_k);
    }
  }

  // In float32 found anew, or it would occupy registers through the loop.
  if constexpr (sizeof(typename B::T) == 4) {
    work = B::find_work(params, B::block_number(params));
  }
  // dK^ = scale dS^T q^. With the norm q_hat = scale log2(e) q^, else it is q^ itself; splits of a group of heads
  // with a scale each then have one head each (plan_backward).
  float factor = kLn2;
  if (!params.l2norm_qk && work.num_blocks_q > 0) {
    factor *= scale_log2(params, B::find_item(params, work, work.begin).head);
  }
  if (params.plan.num_splits > 0) {
    B::write_partial(params, work, 0, dk, factor, row);
    B::write_partial(params, work, 1, dv, 1.f, row);
  } else if constexpr (Traits::kSlices == 1) {
    float* tile = reinterpret_cast<float*>(shared);
    B::write_gradient(params, work, tile, dv, 1.f, row, params.dv, false, params.v);
    B::write_gradient(params, work, tile, dk, factor, row, params.dk, params.l2norm_qk, params.k);
  }
}

template <Math kMath, int kHeadDim, bool kEightWarps>
void launch_backward_sm80(const BackwardParams& params, cudaStream_t stream) {
  using Traits = BackwardTraits<kMath, kHeadDim, kEightWarps>;
  const int64_t num_blocks_k = (params.seq_len_k + Traits::kBlockK - 1) / Traits::kBlockK;
  const int64_t num_splits = params.plan.num_splits > 0 ? params.plan.num_splits : 1;
  const int64_t num_blocks = int64_t(params.batch) * params.num_kv_heads * num_blocks_k * num_splits * Traits::kSlices;
  allow_shared_memory<backward_sm80_kernel<kMath, kHeadDim, kEightWarps>, Traits::kSharedBytes>();
  backward_sm80_kernel<kMath, kHeadDim, kEightWarps>
      <<<static_cast<unsigned>(num_blocks), Traits::kThreads, Traits::kSharedBytes, stream>>>(params);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_cosine_sim
