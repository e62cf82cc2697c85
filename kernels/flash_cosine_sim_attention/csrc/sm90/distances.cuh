// What distances add to scores, in the kernels of sm90/: a piece of DistanceScores for each tile of scores.
//
// A tile of kQueries x kKeys scores has kQueries + kKeys - 1 distances. TMA brings their entries beside what the tile
// is multiplied of, on the same barrier; the first is that of the first query and the last key. In accumulators lane 4g
// + c has rows g and g + 8 and columns 2c, 2c + 1, 2c + 8, 2c + 9 ..., so that eight columns away row g + 8 is at the
// distances of row g: it takes one pair of entries for four scores.
#pragma once

#include "common/ptx.cuh"
#include "common/scores.cuh"

namespace flash_cosine_sim {

template <int kQueries, int kKeys>
struct DistancePiece {
  static constexpr int kEntries = kQueries + kKeys, kBytes = kEntries * static_cast<int>(sizeof(float));
  static_assert(kEntries <= DistanceScores::kMargin && kQueries % 4 == 0 && kKeys % 4 == 0);

  // Starts to copy that of a tile of a head, for which the barrier expects kBytes.
  static __device__ __forceinline__ void load(const Attention& params, uint32_t destination, uint32_t barrier,
                                              int batch, int head, int first_query, int first_key) {
    const DistanceScores& scores = params.distance_scores;
    // Packed, one cu_seqlens serves queries and keys: plan.cpp.
    const int diagonal = params.sequences.queries != nullptr ? 0 : params.seq_len_k - params.seq_len_q;
    const int first = first_query + diagonal - (first_key + kKeys - 1) - scores.first;
    // Wherever a distance occurs, the margins hold the rest of the piece; elsewhere all scores are hidden.
    const int place = min(max(first, 0), scores.num - kEntries);
    const float* source = scores.data + batch * scores.stride_batch + head * scores.stride_head + place;
    bulk_load(destination, source, kBytes, barrier);
  }

  // Where the entry of a query and a key of the tile is.
  static __device__ __forceinline__ uint32_t entry(uint32_t piece, int query, int key) {
    return piece + (query - key + kKeys - 1) * static_cast<int>(sizeof(float));
  }

  // x = scale * x + the entry of each element, for rows that are queries, from `row` on.
  template <int kBlocks>
  static __device__ __forceinline__ void add(float (&x)[kBlocks][4], float scale, uint32_t piece, int row) {
    const int lane = opaque(static_cast<int>(threadIdx.x & 31));  // not worth a register through the walk
    const uint32_t first = entry(piece, row + (lane >> 2), 2 * (lane & 3));
    float before[2] = {load_shared_f32(first + 32), load_shared_f32(first + 28)};
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float here[2] = {load_shared_f32(first - 32 * n), load_shared_f32(first - 32 * n - 4)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[n][i] = fmaf(x[n][i], scale, here[i]);
        x[n][2 + i] = fmaf(x[n][2 + i], scale, before[i]);
        before[i] = here[i];
      }
    }
  }

  // x += the entry of each element, for rows that are queries, from `row` on, 16 columns at a time, in this order. What
  // the next 16 take is read ahead.
  struct Slices {
    uint32_t first;
    float before[2], ahead[2][2];

    __device__ __forceinline__ void begin(uint32_t piece, int row) {
      const int lane = opaque(static_cast<int>(threadIdx.x & 31));  // not worth a register through the walk
      first = entry(piece, row + (lane >> 2), 2 * (lane & 3));
      load(before, -1);
      load_slice(0);
    }

    template <int kBlocks>
    __device__ __forceinline__ void add(float (&x)[kBlocks][4], int slice) {
      float here[2][2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        here[n][0] = ahead[n][0];
        here[n][1] = ahead[n][1];
      }
      if (2 * slice + 2 < kBlocks) load_slice(slice + 1);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          x[2 * slice + n][i] += here[n][i];
          x[2 * slice + n][2 + i] += before[i];
          before[i] = here[n][i];
        }
      }
    }

   private:
    __device__ __forceinline__ void load(float (&entries)[2], int n) const {
      entries[0] = load_shared_f32(first - 32 * n);
      entries[1] = load_shared_f32(first - 32 * n - 4);
    }

    __device__ __forceinline__ void load_slice(int slice) {
      load(ahead[0], 2 * slice);
      load(ahead[1], 2 * slice + 1);
    }
  };

  // x = scale * x + the entry of each element, for rows that are keys, from `row` on.
  template <int kBlocks>
  static __device__ __forceinline__ void add_transposed(float (&x)[kBlocks][4], float scale, uint32_t piece, int row) {
    const int lane = opaque(static_cast<int>(threadIdx.x & 31));  // not worth a register through the walk
    const uint32_t first = entry(piece, 2 * (lane & 3), row + (lane >> 2));
    float before[2] = {load_shared_f32(first - 32), load_shared_f32(first - 28)};
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float here[2] = {load_shared_f32(first + 32 * n), load_shared_f32(first + 32 * n + 4)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[n][i] = fmaf(x[n][i], scale, here[i]);
        x[n][2 + i] = fmaf(x[n][2 + i], scale, before[i]);
        before[i] = here[i];
      }
    }
  }
};

// The sums of a warp's 16 rows x 8 * kBlocks columns along the diagonals, column - row, as accumulators have them.
//
// Lane 4g + c has an element on diagonal 8m + w, w = 2c + i - g, for i = 0, 1 and m = -1 ... kBlocks - 1, once rows g
// and g + 8 are added up. With M = m, or m - 1 where w is negative, that is 8M + w % 8, and the four lanes with the
// same remainder, one for each c, have all there is of it. They share the sums out in two exchanges: each gives away
// half of what it has and gets the others' share of the other half. All else that lanes do differently is a select.
template <int kBlocks>
struct DiagonalReducer {
  static constexpr int kSums = kBlocks / 2 + 1;  // a lane's own, each 8 diagonals from the next

  float pairs[kBlocks + 1][2];  // m + 1, i

  // Takes in columns [8n, 8n + 8), in this order.
  __device__ __forceinline__ void take(const float (&x)[4], int n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pairs[n][i] = opaque(n == 0 ? x[2 + i] : pairs[n][i] + x[2 + i]);  // now, not when x is long needed elsewhere
      pairs[n + 1][i] = opaque(x[i]);
    }
  }

  // Calls add(diagonal, sum) for each of the lane's own. All lanes of the warp call it.
  template <typename Add>
  __device__ __forceinline__ void finish(Add add) const {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    constexpr int kPlaces = 2 * kSums;  // M + 2
    const bool is_second = c & 2;       // has i = 1 in the end
    float sums[kPlaces];
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) {
      float aligned[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float of_m = place == 0 ? 0.f : pairs[place - 1][i];
        const float of_next = place == kPlaces - 1 ? 0.f : pairs[place][i];
        aligned[i] = 2 * c + i < g ? of_next : of_m;
      }
      // The partner is c ^ 2, and g 4 away.
      const float given = __shfl_xor_sync(0xffffffffu, is_second ? aligned[0] : aligned[1], 4 * 4 + 2);
      sums[place] = (is_second ? aligned[1] : aligned[0]) + given;
    }
    // The partner is c ^ 1, and g 2 away.
    const bool is_upper = c & 1;
    const int partner = ((g + (is_upper ? 6 : 2)) % 8) * 4 + (c ^ 1);
    const int first = 8 * ((is_upper ? kSums : 0) - 2) + (2 * c + is_second - g + 8) % 8;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      const float given = __shfl_sync(0xffffffffu, is_upper ? sums[k] : sums[kSums + k], partner);
      add(first + 8 * k, (is_upper ? sums[kSums + k] : sums[k]) + given);
    }
  }
};

}  // namespace flash_cosine_sim
