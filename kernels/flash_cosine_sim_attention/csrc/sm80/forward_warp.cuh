// What a warp does with its rows and some keys: the steps of sm80/forward.cuh, whose head describes them, and of
// sm80/forward_split.cuh.
#pragma once

#include "common/band.cuh"
#include "common/rows.cuh"
#include "common/scores.cuh"

namespace flash_cosine_sim {

// TileTraits are ForwardTraits or SplitTraits.
template <Math kMath, typename TileTraits>
struct Forward {
  using Traits = TileTraits;
  using T = Element<kMath>;
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockK = Traits::kBlockK, kRowBytes = Traits::kRowBytes;
  static constexpr int kRowTiles = Traits::kRowTiles, kOutDim = Traits::kOutDim;
  static constexpr int kSteps = kRowBytes / 32;                  // of the contraction over the head dim
  static constexpr int kSlices = kBlockK / kContraction<kMath>;  // of the contraction over keys
  // Unrolled further, loads would be hoisted until registers run out.
  static constexpr int kUnrollQK = kSteps > 8 ? 4 : kSteps;

  using Scores = float[kRowTiles][kBlockK / 8][4];
  using Output = float[kRowTiles][kOutDim / 8][4];  // of the warp's columns
  struct RowSums {
    float exact[kRowTiles][2] = {};
    float rounded[kRowTiles][2] = {};  // 16-bit elements only: float32 does not round P
  };
  static constexpr bool kRoundsP = sizeof(T) == 2;
  using QFragments = uint32_t[kRowTiles][Traits::kQInRegisters ? kSteps : 1][4];

  // Which tile of which head a block works on.
  struct Work {
    int batch, head, first_query;
  };

  // Heads are taken in sections whose keys and values fit into the L2 cache together. Within a section a causal
  // mask makes the last queries the longest work: they come first, so that short work fills the end.
  static __device__ Work find_work(const ForwardParams& params, unsigned block, int num_blocks_q,
                                   int heads_per_section) {
    const int64_t num_heads = int64_t(params.batch) * params.num_heads;
    const int64_t section = block / (int64_t(num_blocks_q) * heads_per_section);
    const int64_t first_head = section * heads_per_section;
    const int64_t remaining = num_heads - first_head;
    const int section_heads = remaining < heads_per_section ? static_cast<int>(remaining) : heads_per_section;
    const int64_t index = block - first_head * num_blocks_q;
    const int block_q = static_cast<int>(index / section_heads);
    const int64_t head = first_head + index % section_heads;
    return {static_cast<int>(head / params.num_heads), static_cast<int>(head % params.num_heads),
            (params.causal ? num_blocks_q - 1 - block_q : block_q) * kBlockQ};
  }

  static __device__ const char* rows_of(const Tensor& tensor, int batch, int head, int64_t row) {
    return reinterpret_cast<const char*>(static_cast<const T*>(tensor.data) + batch * tensor.stride_batch +
                                         head * tensor.stride_head + row * tensor.stride_row);
  }

  static __device__ void load_keys(const ForwardParams& params, const Work& work, uint32_t stage, int first_key) {
    const int head = work.head / (params.num_heads / params.num_kv_heads);
    const int num_rows = params.seq_len_k - first_key, valid_bytes = params.head_dim * static_cast<int>(sizeof(T));
    load_tile<kBlockK, kRowBytes, Traits::kThreads>(stage, rows_of(params.k_hat, work.batch, head, first_key),
                                                    params.k_hat.stride_row * sizeof(T), num_rows, valid_bytes);
    load_tile<kBlockK, kRowBytes, Traits::kThreads>(stage + kBlockK * kRowBytes,
                                                    rows_of(params.v, work.batch, head, first_key),
                                                    params.v.stride_row * sizeof(T), num_rows, valid_bytes);
  }

  // Rows of a tile become factor * x / |x|, in place and with the bits that launch_normalize would give them: the
  // backward pass has those.
  template <int kRows>
  static __device__ void normalize_tile(char* tile, int head_dim, float factor) {
    using Lanes = rows::RowLanes<T>;
    const Lanes lanes(opaque(head_dim));  // nothing of it is worth a register in the loop around
    const int step = Traits::kWarps * lanes.rows_per_warp();
    for (int first = static_cast<int>(threadIdx.x / 32) * lanes.rows_per_warp(); first < kRows; first += step) {
      const int row = first + lanes.row_in_warp();
      T* vectors[2];
#pragma unroll
      for (int vector = 0; vector < 2; ++vector) {
        const int chunk = lanes.lane + (vector << lanes.log2);
        const bool exists = row < kRows && chunk * Lanes::kVector < head_dim;
        vectors[vector] = exists ? reinterpret_cast<T*>(tile + swizzle<kRowBytes>(row, chunk)) : nullptr;
      }
      typename Lanes::Slice x = {};
#pragma unroll
      for (int vector = 0; vector < 2; ++vector) {
        if (vectors[vector]) rows::load_channels<Lanes::kVector>(x + vector * Lanes::kVector, vectors[vector]);
      }
      rows::normalize(x, lanes.lanes());
#pragma unroll
      for (int i = 0; i < Lanes::kSlice; ++i) x[i] *= factor;
#pragma unroll
      for (int vector = 0; vector < 2; ++vector) {
        if (vectors[vector]) rows::store_channels<Lanes::kVector>(vectors[vector], x + vector * Lanes::kVector);
      }
    }
  }

  // a of row tile m of the warp's rows, from `row` on.
  static __device__ void load_q(uint32_t (&a)[4], const QFragments& q, uint32_t tile_q, int row, int m, int step) {
    if constexpr (Traits::kQInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = q[m][step][i];
    } else {
      load_a<kRowBytes>(a, tile_q, row + 16 * m, step);
    }
  }

  // S = q_hat k_hat^T for a warp's rows and a block of keys.
  static __device__ void multiply_qk(Scores& scores, const QFragments& q, uint32_t tile_q, uint32_t tile_k, int row) {
    multiply<kMath, kSteps, kUnrollQK>(
        scores, [&](uint32_t (&a)[4], int m, int step) { load_q(a, q, tile_q, row, m, step); },
        [&](uint32_t (&b)[4], int n, int step) { load_b<kRowBytes>(b, tile_k, 8 * n, step); });
  }

  // Multiplies by c if q_hat does not contain it, adds biases, hides what may not be seen. `row` is the query of the
  // warp's first row.
  static __device__ void finish_scores(const ForwardParams& params, const Work& work, Scores& scores, int row,
                                       int first_key, uint64_t visible) {
    // Opaque: most calls of the loop around this one are skipped, and nothing of it is worth a register there.
    const int lane = opaque(static_cast<int>(threadIdx.x & 31));
    const float score_scale = params.l2norm_qk ? 1.f : scale_log2(params, work.head);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row + 16 * m + 8 * half + (lane >> 2);
        finish_row(params, work.batch, work.head, query, score_scale, scores[m], half, lane, first_key, visible);
      }
    }
    if (params.distance_scores.data == nullptr) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = row + 16 * m + 8 * half + (lane >> 2);
        add_distances(params, work.batch, work.head, query, scores[m], half, lane, first_key);
      }
    }
  }

  // The same for one row of a lane: half 0 or 1 of 16.
  static __device__ void finish_row(const ForwardParams& params, int batch, int head, int query, float score_scale,
                                    float (&scores)[kBlockK / 8][4], int half, int lane, int first_key,
                                    uint64_t visible) {
    const Range keys = query < params.seq_len_q ? keys_of(params, query) : Range{0, 0};
    const BiasRow<T> bias(params, batch, head, query, first_key + 2 * (lane & 3));
#pragma unroll
    for (int n = 0; n < kBlockK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int offset = 8 * n + 2 * (lane & 3) + i;
        float& score = scores[n][2 * half + i];
        score *= score_scale;
        if (params.bias.data != nullptr) score += bias[8 * n + i];
        const bool seen = keys.first <= first_key + offset && first_key + offset < keys.end;
        if (!seen || !((visible >> offset) & 1)) score = -infinity();
      }
    }
  }

  // What distances add to one row of a lane.
  static __device__ void add_distances(const ForwardParams& params, int batch, int head, int query,
                                       float (&scores)[kBlockK / 8][4], int half, int lane, int first_key) {
    const DistanceRow distances(params, batch, head, min(query, params.seq_len_q - 1), first_key + 2 * (lane & 3));
#pragma unroll
    for (int n = 0; n < kBlockK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scores[n][2 * half + i] += distances[8 * n + i];
    }
  }

  // P = 2^S for keys [8 * first_block, 8 * last_block), in place, added to the exact row sums.
  static __device__ void exponentiate(Scores& scores, RowSums& sums, int first_block, int last_block) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = first_block; n < last_block; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[m][n][i] = ex2_approx_ftz(scores[m][n][i]);
          sums.exact[m][i >> 1] += scores[m][n][i];
        }
      }
    }
  }

  // P = 2^S, added to the row sums and multiplied with V, slice by slice.
  static __device__ void multiply_pv(Output& o, RowSums& sums, Scores& scores, uint32_t tile_v) {
    constexpr int kStepsAtOnce = kMath != Math::kFp32 ? 1 : kSlices < kStepsFp32 ? kSlices : kStepsFp32;
    constexpr int kBlocks = kStepsAtOnce * kContraction<kMath> / 8;  // of 8 keys
#pragma unroll
    for (int slice = 0; slice < kSlices; slice += kStepsAtOnce) {
      exponentiate(scores, sums, slice / kStepsAtOnce * kBlocks, (slice / kStepsAtOnce + 1) * kBlocks);
      if constexpr (kMath == Math::kFp16WideP) {
        multiply_wide_slice(o, sums, scores, tile_v, slice);
      } else {
        multiply<kMath, kStepsAtOnce, kStepsAtOnce>(
            o,
            [&](uint32_t (&a)[4], int m, int step) {
              accumulator_to_a<kMath>(a, scores[m], slice + step);
              if constexpr (kRoundsP) add_rounded(sums.rounded[m], a);
            },
            [&](uint32_t (&b)[4], int n, int step) {
              load_b_transposed<kMath, kRowBytes>(b, tile_v, 8 * n, slice + step);
            });
      }
    }
  }

  static __device__ void add_rounded(float (&sums)[2], const uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 p = unpack<T>(a[i]);
      sums[i & 1] += p.x + p.y;
    }
  }

  // The same with P in TF32 and V, whose float16 is exact in TF32, widened on the way: a register of V holds two
  // keys of a column, in the order of accumulator_to_a for float32.
  static __device__ void multiply_wide_slice(Output& o, RowSums& sums, const Scores& scores, uint32_t tile_v,
                                             int slice) {
    uint32_t a[kRowTiles][2][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t wide[4];
        accumulator_to_a<Math::kTf32>(wide, scores[m], 2 * slice + half);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[m][half][i] = cvt_rna_tf32(__uint_as_float(wide[i]));
          sums.rounded[m][i & 1] += __uint_as_float(a[m][half][i]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kOutDim / 8; n += 2) {
      uint32_t b[4];
      load_b_transposed<kMath, kRowBytes>(b, tile_v, 8 * n, slice);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 wide = __half22float2(reinterpret_cast<const __half2&>(b[i]));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_m16n8k8_tf32(o[m][n + i / 2], a[m][i % 2], __float_as_uint(wide.x), __float_as_uint(wide.y));
        }
      }
    }
  }

  // Adds up what the four lanes of a row have.
  static __device__ void reduce(RowSums& sums) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int distance = 1; distance <= 2; ++distance) {
          sums.exact[m][half] += __shfl_xor_sync(0xffffffffu, sums.exact[m][half], distance);
          if constexpr (kRoundsP) {
            sums.rounded[m][half] += __shfl_xor_sync(0xffffffffu, sums.rounded[m][half], distance);
          }
        }
      }
    }
  }

  // Divides by the row sums and writes the warp's rows and columns through shared memory, for whole 16-byte stores:
  // through that of its rows of q, which nobody else reads, but for a warp that shares them.
  static __device__ void write_output(const ForwardParams& params, const Work& work, Output& o, const RowSums& sums,
                                      uint32_t tile_q, const char* shared_q, int row, int column) {
    const int lane = threadIdx.x & 31;
    const int64_t first_row = (int64_t(work.batch) * params.num_heads + work.head) * params.seq_len_q;
    if constexpr (Traits::kWarpsDim > 1) __syncthreads();
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = (kRoundsP ? sums.rounded : sums.exact)[m][half];
        const float inverse = sum == 0.f ? 0.f : rcp_approx_ftz(sum);
#pragma unroll
        for (int n = 0; n < kOutDim / 8; ++n) {
          o[m][n][2 * half] *= inverse;
          o[m][n][2 * half + 1] *= inverse;
        }
        const int query = work.first_query + row + 16 * m + 8 * half + (lane >> 2);
        if ((lane & 3) == 0 && column == 0 && query < params.seq_len_q && params.row_sum_log2 != nullptr) {
          params.row_sum_log2[first_row + query] = log2f(sums.exact[m][half]);
        }
      }
      store_accumulator<kMath, kRowBytes>(tile_q, o[m], row + 16 * m, column);
    }
    __syncwarp();
    constexpr int kChunks = kOutDim * static_cast<int>(sizeof(T)) / 16;
    const int first_chunk = column * static_cast<int>(sizeof(T)) / 16;
    for (int index = lane; index < 16 * kRowTiles * kChunks; index += 32) {
      const int line = row + index / kChunks, chunk = first_chunk + index % kChunks;
      const int query = work.first_query + line;
      if (query >= params.seq_len_q || chunk * 16 >= params.head_dim * static_cast<int>(sizeof(T))) continue;
      const uint4 value = *reinterpret_cast<const uint4*>(shared_q + swizzle<kRowBytes>(line, chunk));
      char* address = const_cast<char*>(rows_of(params.o, work.batch, work.head, query)) + chunk * 16;
      *reinterpret_cast<uint4*>(address) = value;
    }
  }

  static __device__ void write_partials(const ForwardParams& params, const Work& work, const Output& o,
                                        const RowSums& sums, int row, int column) {
    const int lane = threadIdx.x & 31;
    const int64_t first_row = (int64_t(work.batch) * params.num_heads + work.head) * params.seq_len_q;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = work.first_query + row + 16 * m + 8 * half + (lane >> 2);
        if (query >= params.seq_len_q) continue;
        if ((lane & 3) == 0 && column == 0) {
          params.denominator[first_row + query] = (kRoundsP ? sums.rounded : sums.exact)[m][half];
        }
        float* numerator = params.numerator + (first_row + query) * params.head_dim + column + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < kOutDim / 8; ++n) {
          if (column + 8 * n >= params.head_dim) continue;
          *reinterpret_cast<float2*>(numerator + 8 * n) = make_float2(o[m][n][2 * half], o[m][n][2 * half + 1]);
        }
      }
    }
  }
};

}  // namespace flash_cosine_sim
