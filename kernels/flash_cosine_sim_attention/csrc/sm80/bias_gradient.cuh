// Gradients of biases, mma.sync:   dbias = dS = P * (dP - delta), summed over what a bias is broadcast along.
//
// A block owns kBlockQ x kBlockK elements of dbias, makes S and dP again for every (batch, head) that shares them, and
// adds up dS in registers: two more products than a backward pass without a bias, but no atomics, no float32
// copy of dbias, and one order of addition always. Along a broadcast query or key dimension the block walks over
// all blocks of it and reduces the sum at the end.
//
// distance_bias is broadcast along diagonals. There a block owns a diagonal of tiles of one head: all have their
// elements at the same distances, so that they are added up as they are, in registers, and the sum along its diagonals
// at the end. Neighbouring diagonals of tiles share distances: launch_distance_merge adds those up, in order.
#pragma once

#include "launch.h"
#include "common/band.cuh"
#include "common/scores.cuh"
#include "sm80/tiles/bias_gradient.h"

namespace flash_cosine_sim {

template <Math kMath, int kHeadDim>
struct BiasGradient {
  using Traits = BiasGradientTraits<kMath, kHeadDim>;
  using T = Element<kMath>;
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockK = Traits::kBlockK;
  static constexpr int kRowBytes = Traits::kRowBytes, kSteps = kRowBytes / 32;
  using Scores = float[1][kBlockK / 8][4];  // one tile of 16 rows a warp

  // The half-open range of one of four loops: all of a broadcast dimension, else the block's own index.
  struct Loop {
    int begin, end;
  };

  static __device__ Loop take_loop(int64_t& index, int64_t stride, int size) {
    if (stride == 0) return {0, size};
    const int own = static_cast<int>(index % size);
    index /= size;
    return {own, own + 1};
  }

  template <int kRows>
  static __device__ void load_rows(const BackwardParams& params, uint32_t tile, const Tensor& tensor, int batch,
                                   int head, int first_row, int num_rows) {
    const T* source = static_cast<const T*>(tensor.data) + batch * tensor.stride_batch + head * tensor.stride_head +
                      int64_t(first_row) * tensor.stride_row;
    load_tile<kRows, kRowBytes, Traits::kThreads>(tile, reinterpret_cast<const char*>(source),
                                                  tensor.stride_row * sizeof(T), num_rows - first_row,
                                                  params.head_dim * static_cast<int>(sizeof(T)));
  }

  // The same for rows that may begin before the first.
  template <int kRows>
  static __device__ void load_rows_around(const BackwardParams& params, uint32_t tile, const Tensor& tensor, int batch,
                                          int head, int first_row, int num_rows) {
    constexpr int kChunks = kRowBytes / 16;
    const T* source = static_cast<const T*>(tensor.data) + batch * tensor.stride_batch + head * tensor.stride_head;
#pragma unroll 1
    for (int index = threadIdx.x; index < kRows * kChunks; index += Traits::kThreads) {
      const int place = index / kChunks, chunk = index % kChunks, row = first_row + place;
      const bool valid = row >= 0 && row < num_rows && chunk * 16 < params.head_dim * static_cast<int>(sizeof(T));
      const T* address = source + (valid ? row * tensor.stride_row + chunk * 16 / static_cast<int>(sizeof(T)) : 0);
      cp_async_16(tile + swizzle<kRowBytes>(place, chunk), address, valid);
    }
  }

  // Rows of a warp of the tile a times all rows of the tile b.
  static __device__ void multiply_rows(Scores& scores, uint32_t tile_a, uint32_t tile_b, int row) {
    constexpr int kUnroll = kSteps > 4 ? 4 : kSteps;
    multiply<kMath, kSteps, kUnroll>(
        scores, [&](uint32_t (&a)[4], int, int step) { load_a<kRowBytes>(a, tile_a, row, step); },
        [&](uint32_t (&b)[4], int n, int step) { load_b<kRowBytes>(b, tile_b, 8 * n, step); });
  }

  // The first `count` of 64 bits; none of fewer than one.
  static __device__ uint64_t bits_before(int count) {
    return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << max(count, 0)) - 1;
  }

  // What distances add to scores, which are multiplied with score_scale before.
  static __device__ void add_distances(const BackwardParams& params, int batch, int head, Scores& scores,
                                       float score_scale, int query, int first_key) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = limit(query + 8 * half + (lane >> 2), 0, params.seq_len_q - 1);  // no others count
      const DistanceRow distances(params, batch, head, row, first_key + 2 * (lane & 3));
#pragma unroll
      for (int n = 0; n < kBlockK / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[0][n][2 * half + i];
          score = fmaf(score, score_scale, distances[8 * n + i]);
        }
      }
    }
  }

  // Adds dS of the warp's rows, those of `queries` from `query` on, and keys [first_key, ...) of a head to `sum`.
  static __device__ void add_gradient(const BackwardParams& params, int batch, int head, Scores& sum, Scores& scores,
                                      const Scores& dp, int query, int first_key, const Range& queries) {
    const int lane = threadIdx.x & 31;
    const uint64_t not_masked = visible_keys<kBlockK>(params, batch, first_key);
    float score_scale = params.l2norm_qk ? 1.f : scale_log2(params, head);
    if (params.distance_scores.data != nullptr) {
      add_distances(params, batch, head, scores, score_scale, query, first_key);
      score_scale = 1.f;
    }
    const int64_t first_row = (int64_t(batch) * params.num_heads + head) * params.seq_len_q;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + 8 * half + (lane >> 2);
      const bool exists = queries.first <= row && row < queries.end;
      const float row_sum_log2 = exists ? params.row_sum_log2[first_row + row] : -infinity();
      if (row_sum_log2 == -infinity()) continue;  // no such row, or an empty one
      const float delta = params.delta[first_row + row];
      const Range keys = keys_of(params, row);
      const uint64_t visible = not_masked & bits_before(keys.end - first_key) & ~bits_before(keys.first - first_key);
      const BiasRow<T> bias(params, batch, head, row, first_key + 2 * (lane & 3));
#pragma unroll
      for (int n = 0; n < kBlockK / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int offset = 8 * n + 2 * (lane & 3) + i;
          if (!((visible >> offset) & 1)) continue;
          float score = scores[0][n][2 * half + i] * score_scale;
          if (params.bias.data != nullptr) score += bias[8 * n + i];
          sum[0][n][2 * half + i] += ex2_approx_ftz(score - row_sum_log2) * (dp[0][n][2 * half + i] - delta);
        }
      }
    }
  }

  static __device__ int divide_down(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

  // The rows of packed queries that a sequence has, whatever cu_seqlens hold.
  static __device__ Range queries_of_sequence(const BackwardParams& params, int sequence) {
    const int* bounds = params.sequences.queries + sequence;
    return {limit(bounds[0], 0, params.seq_len_q), limit(bounds[1], 0, params.seq_len_q)};
  }

  // Sums `sum` along its diagonals, in order, the upper right element's first. `tile` is shared memory for it.
  static __device__ void write_by_distance(const Scores& sum, float* tile, float* target, int row) {
    constexpr int kPitch = Traits::kDistancePitch;
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < kBlockK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        tile[(row + 8 * (i / 2) + (lane >> 2)) * kPitch + 8 * n + 2 * (lane & 3) + i % 2] = sum[0][n][i];
      }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < kBlockQ + kBlockK - 1; index += Traits::kThreads) {
      const int distance = index - (kBlockK - 1);  // of the row from the column
      float total = 0.f;
#pragma unroll 1
      for (int line = max(distance, 0); line < min(kBlockQ, kBlockK + distance); ++line) {
        total += tile[line * kPitch + line - distance];
      }
      target[index] = total;
    }
  }

  // Sums `sum` over its rows or columns where dbias has but one, and writes it. `partial` is shared memory for
  // kBlockK floats a warp.
  static __device__ void write(const BackwardParams& params, Scores& sum, float* partial, T* target, int row,
                               int first_query, int first_key) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const bool one_query = params.dbias.stride_query == 0, one_key = params.dbias.stride_key == 0;
    if (one_key) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < kBlockK / 8; ++n) total += sum[0][n][2 * half] + sum[0][n][2 * half + 1];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
#pragma unroll
        for (int n = 0; n < kBlockK / 8; ++n) sum[0][n][2 * half] = sum[0][n][2 * half + 1] = 0.f;
        if ((lane & 3) == 0) sum[0][0][2 * half] = total;
      }
    }
    if (one_query) {
#pragma unroll
      for (int n = 0; n < kBlockK / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float total = sum[0][n][i] + sum[0][n][2 + i];
#pragma unroll
          for (int distance = 4; distance < 32; distance *= 2) {
            total += __shfl_xor_sync(0xffffffffu, total, distance);
          }
          if (lane < 4) partial[warp * kBlockK + 8 * n + 2 * lane + i] = total;
        }
      }
      __syncthreads();
      for (int offset = threadIdx.x; offset < kBlockK; offset += Traits::kThreads) {
        float total = 0.f;
        for (int other = 0; other < Traits::kWarps; ++other) total += partial[other * kBlockK + offset];
        const int key = first_key + offset;
        if (one_key ? offset == 0 : key < params.seq_len_k) {
          target[one_key ? 0 : key * params.dbias.stride_key] = from_float<T>(total);
        }
      }
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + row + 8 * half + (lane >> 2);
      if (query >= params.seq_len_q) continue;
#pragma unroll
      for (int n = 0; n < kBlockK / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int offset = 8 * n + 2 * (lane & 3) + i, key = first_key + offset;
          if (one_key ? offset != 0 : key >= params.seq_len_k) continue;
          T* place = target + query * params.dbias.stride_query + (one_key ? 0 : key * params.dbias.stride_key);
          *place = from_float<T>(sum[0][n][2 * half + i]);
        }
      }
    }
  }
};

template <Math kMath, int kHeadDim>
__global__ void __launch_bounds__(BiasGradientTraits<kMath, kHeadDim>::kThreads,
                                  BiasGradientTraits<kMath, kHeadDim>::kMinBlocks)
    bias_gradient_sm80_kernel(const __grid_constant__ BackwardParams params) {
  using G = BiasGradient<kMath, kHeadDim>;
  constexpr int kBlockQ = G::kBlockQ, kBlockK = G::kBlockK;
  extern __shared__ __align__(128) char shared[];
  const uint32_t tile_q = shared_address(shared), tile_do = tile_q + kBlockQ * G::kRowBytes;
  const uint32_t tile_k = tile_do + kBlockQ * G::kRowBytes, tile_v = tile_k + kBlockK * G::kRowBytes;
  const int row = static_cast<int>(threadIdx.x / 32) * 16;
  const Bias& dbias = params.dbias;
  int64_t index = blockIdx.x;
  const auto keys = G::take_loop(index, dbias.stride_key, (params.seq_len_k + kBlockK - 1) / kBlockK);
  const auto queries = G::take_loop(index, dbias.stride_query, (params.seq_len_q + kBlockQ - 1) / kBlockQ);
  const auto heads = G::take_loop(index, dbias.stride_head, params.num_heads);
  const auto batches = G::take_loop(index, dbias.stride_batch, params.batch);

  typename G::Scores sum = {};
  for (int batch = batches.begin; batch < batches.end; ++batch) {
    for (int head = heads.begin; head < heads.end; ++head) {
      const int kv_head = head / (params.num_heads / params.num_kv_heads);
      for (int block_q = queries.begin; block_q < queries.end; ++block_q) {
        for (int block_k = keys.begin; block_k < keys.end; ++block_k) {
          const int first_query = block_q * kBlockQ, first_key = block_k * kBlockK;
          if (!keys_of_rows(params, first_query, kBlockQ).sees_any(first_key, first_key + kBlockK)) continue;
          G::template load_rows<kBlockQ>(params, tile_q, params.q_hat, batch, head, first_query, params.seq_len_q);
          G::template load_rows<kBlockQ>(params, tile_do, params.dout, batch, head, first_query, params.seq_len_q);
          G::template load_rows<kBlockK>(params, tile_k, params.k_hat, batch, kv_head, first_key, params.seq_len_k);
          G::template load_rows<kBlockK>(params, tile_v, params.v, batch, kv_head, first_key, params.seq_len_k);
          cp_async_wait_all();
          __syncthreads();
          typename G::Scores scores = {}, dp = {};
          G::multiply_rows(scores, tile_q, tile_k, row);
          G::multiply_rows(dp, tile_do, tile_v, row);
          G::add_gradient(params, batch, head, sum, scores, dp, first_query + row, first_key, {0, params.seq_len_q});
          __syncthreads();  // before the next tiles arrive
        }
      }
    }
  }
  typename G::T* target = static_cast<typename G::T*>(dbias.data) + batches.begin * dbias.stride_batch +
                          heads.begin * dbias.stride_head;
  G::write(params, sum, reinterpret_cast<float*>(shared), target, row, queries.begin * kBlockQ, keys.begin * kBlockK);
}

template <Math kMath, int kHeadDim>
__global__ void __launch_bounds__(BiasGradientTraits<kMath, kHeadDim>::kThreads,
                                  BiasGradientTraits<kMath, kHeadDim>::kMinBlocks)
    distance_gradient_sm80_kernel(const __grid_constant__ BackwardParams params) {
  using G = BiasGradient<kMath, kHeadDim>;
  constexpr int kBlockQ = G::kBlockQ, kBlockK = G::kBlockK, kRatio = kBlockQ / kBlockK;
  extern __shared__ __align__(128) char shared[];
  const uint32_t tile_q = shared_address(shared), tile_do = tile_q + kBlockQ * G::kRowBytes;
  const uint32_t tile_k = tile_do + kBlockQ * G::kRowBytes, tile_v = tile_k + kBlockK * G::kRowBytes;
  const int row = static_cast<int>(threadIdx.x / 32) * 16;
  const DiagonalSums& diagonals = params.plan.diagonals;
  const int head = static_cast<int>(blockIdx.x % params.num_heads);
  const int kv_head = head / (params.num_heads / params.num_kv_heads);
  const int diagonal = diagonals.first + static_cast<int>(blockIdx.x / params.num_heads);
  const int num_blocks_k = (params.seq_len_k + kBlockK - 1) / kBlockK;
  const bool is_packed = params.sequences.queries != nullptr;

  typename G::Scores sum = {};
  const int num_sequences = is_packed ? params.sequences.num : 1;
  for (int sequence = 0; sequence < num_sequences * params.batch; ++sequence) {
    const int batch = is_packed ? 0 : sequence;
    const Range queries = is_packed ? G::queries_of_sequence(params, sequence) : Range{0, params.seq_len_q};
    if (queries.first >= queries.end) continue;
    // Rows are counted by their keys at distance 0, so that distances are rows less keys.
    const int before = diagonal_of(params, queries.first) - queries.first;
    const int first_block =
        max(G::divide_down(queries.first + before, kBlockQ), G::divide_down(diagonal + kRatio - 1, kRatio));
    const int last_block =
        min(G::divide_down(queries.end - 1 + before, kBlockQ), G::divide_down(num_blocks_k - 1 + diagonal, kRatio));
    for (int block = first_block; block <= last_block; ++block) {
      const int first_query = block * kBlockQ - before, first_key = (kRatio * block - diagonal) * kBlockK;
      const int first_real = max(first_query, queries.first), end_real = min(first_query + kBlockQ, queries.end);
      if (!keys_of_rows(params, first_real, end_real - first_real).sees_any(first_key, first_key + kBlockK)) continue;
      G::template load_rows_around<kBlockQ>(params, tile_q, params.q_hat, batch, head, first_query, params.seq_len_q);
      G::template load_rows_around<kBlockQ>(params, tile_do, params.dout, batch, head, first_query, params.seq_len_q);
      G::template load_rows<kBlockK>(params, tile_k, params.k_hat, batch, kv_head, first_key, params.seq_len_k);
      G::template load_rows<kBlockK>(params, tile_v, params.v, batch, kv_head, first_key, params.seq_len_k);
      cp_async_wait_all();
      __syncthreads();
      typename G::Scores scores = {}, dp = {};
      G::multiply_rows(scores, tile_q, tile_k, row);
      G::multiply_rows(dp, tile_do, tile_v, row);
      G::add_gradient(params, batch, head, sum, scores, dp, first_query + row, first_key, queries);
      __syncthreads();  // before the next tiles arrive
    }
  }
  const int64_t place = int64_t{head} * diagonals.num + diagonal - diagonals.first;
  G::write_by_distance(sum, reinterpret_cast<float*>(shared), params.distance_sums + place * diagonals.distances(),
                       row);
}

template <Math kMath, int kHeadDim>
void launch_bias_gradient_sm80(const BackwardParams& params, cudaStream_t stream) {
  using Traits = BiasGradientTraits<kMath, kHeadDim>;
  if (params.distance_sums != nullptr) {
    const auto num_blocks = static_cast<unsigned>(params.num_heads * params.plan.diagonals.num);
    allow_shared_memory<distance_gradient_sm80_kernel<kMath, kHeadDim>, Traits::kDistanceSharedBytes>();
    distance_gradient_sm80_kernel<kMath, kHeadDim>
        <<<num_blocks, Traits::kThreads, Traits::kDistanceSharedBytes, stream>>>(params);
    CUDA_CHECK(cudaGetLastError());
  }
  if (params.dbias.data == nullptr) return;
  const auto blocks = [](int64_t stride, int64_t size, int64_t block) {
    return stride == 0 ? 1 : (size + block - 1) / block;
  };
  const int64_t num_blocks = blocks(params.dbias.stride_batch, params.batch, 1) *
                             blocks(params.dbias.stride_head, params.num_heads, 1) *
                             blocks(params.dbias.stride_query, params.seq_len_q, Traits::kBlockQ) *
                             blocks(params.dbias.stride_key, params.seq_len_k, Traits::kBlockK);
  allow_shared_memory<bias_gradient_sm80_kernel<kMath, kHeadDim>, Traits::kSharedBytes>();
  bias_gradient_sm80_kernel<kMath, kHeadDim>
      <<<static_cast<unsigned>(num_blocks), Traits::kThreads, Traits::kSharedBytes, stream>>>(params);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_cosine_sim
