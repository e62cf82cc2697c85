// Which keys a query sees, as far as causality, windows and packed sequences go: a range of keys. Neither end of it
// falls from one query to the next, so that those of a tile of queries see a range of keys together, too; and a key is
// seen by a range of queries, of which the same is true. A key mask comes on top: scores.cuh.
//
//             keys                    first, end
//          +-------------------+      of all queries of a tile together: first of its first query, end of its last
//  queries |  #####            |      that every one of them sees: first of its last query, end of its first
//          |    #####          |
//          |      #####        |
//          +-------------------+
#pragma once

#include "attention.h"
#include "common/scores.cuh"

namespace flash_cosine_sim {

__device__ __forceinline__ int limit(int x, int least, int most) { return min(max(x, least), most); }

// The keys that a query sees; the query exists.
__device__ __forceinline__ Range keys_of(const Attention& params, int query) {
  if (params.key_ranges != nullptr) return params.key_ranges[query];
  const int own = query + params.seq_len_k - params.seq_len_q;  // at distance 0
  return {params.window_left < 0 ? 0 : limit(own - params.window_left, 0, params.seq_len_k),
          params.window_right < 0 ? params.seq_len_k : limit(own + params.window_right + 1, 0, params.seq_len_k)};
}

// The queries that see a key, which exists.
__device__ __forceinline__ Range queries_of(const Attention& params, int key) {
  if (params.query_ranges != nullptr) return params.query_ranges[key];
  const int own = key - (params.seq_len_k - params.seq_len_q);
  return {params.window_right < 0 ? 0 : limit(own - params.window_right, 0, params.seq_len_q),
          params.window_left < 0 ? params.seq_len_q : limit(own + params.window_left + 1, 0, params.seq_len_q)};
}

// What neighbouring rows see of the other side.
struct Band {
  Range any, all;  // one of them sees, every one of them sees

  __device__ __forceinline__ bool sees_any(int first, int end) const {
    return max(any.first, first) < min(any.end, end);
  }
  __device__ __forceinline__ bool sees_all(int first, int end) const { return all.first <= first && end <= all.end; }
};

// Of rows from one to another.
__device__ __forceinline__ Band band_between(const Range& of_first, const Range& of_last) {
  const Range any{of_first.first, of_last.end}, all{of_last.first, of_first.end};
  return {any, all};
}

// Of num_rows queries from `first` on, as far as they exist.
__device__ __forceinline__ Band keys_of_rows(const Attention& params, int first, int num_rows) {
  if (first >= params.seq_len_q) return {};
  return band_between(keys_of(params, first), keys_of(params, min(first + num_rows, params.seq_len_q) - 1));
}

// Of num_rows keys.
__device__ __forceinline__ Band queries_of_rows(const Attention& params, int first, int num_rows) {
  if (first >= params.seq_len_k) return {};
  return band_between(queries_of(params, first), queries_of(params, min(first + num_rows, params.seq_len_k) - 1));
}

// The blocks of `size` rows that a range reaches into.
__device__ __forceinline__ Range blocks_of(const Range& range, int size) {
  if (range.first >= range.end) return {range.first / size, range.first / size};
  return {range.first / size, (range.end + size - 1) / size};
}

// The blocks of block_q queries that a block of keys walks over.
//
// In deterministic mode blocks of keys take turns at a block of queries, in their order: those that walk over it must
// follow each other. They do if neither end falls from one to the next, which takes an empty range at its word: in the
// middle of a block of queries it has that block.
__device__ __forceinline__ Range walk_of(const BackwardParams& params, int block_k, int block_q, int keys_per_block) {
  const Range queries = queries_of_rows(params, block_k * keys_per_block, keys_per_block).any;
  if (params.dq_order != nullptr) return {queries.first / block_q, (queries.end + block_q - 1) / block_q};
  return blocks_of(queries, block_q);
}

// Whether a block of keys is the first to add to a block of queries, number `block`.
__device__ __forceinline__ bool has_first_turn(const BackwardParams& params, int block_k, int block, int block_q,
                                               int keys_per_block) {
  return block_k == 0 || walk_of(params, block_k - 1, block_q, keys_per_block).end <= block;
}

// Of a row of accumulators of tensor cores a lane has columns 2c, 2c + 1, 2c + 8, 2c + 9 ..., where c = lane % 4. What
// follows has a bit for each of them, in this order: a limit is a shift, and what hides columns is combined by `or`.

// The lane's columns from a limit on, of kColumns.
template <int kColumns>
__device__ __forceinline__ uint32_t lane_columns_from(int lane, int first) {
  static_assert(kColumns % 8 == 0 && kColumns / 4 <= 32);
  const unsigned before = limit(first - 2 * (lane & 3), 0, kColumns);  // counted from the lane's first column
  const unsigned number = (before + 7) / 8 + (before + 6) / 8;         // of first and second ones of pairs
  return static_cast<uint32_t>(~uint64_t{0} << number);
}

// The lane's columns outside of a range.
template <int kColumns>
__device__ __forceinline__ uint32_t lane_columns_outside(int lane, int first, int end) {
  return lane_columns_from<kColumns>(lane, end) | ~lane_columns_from<kColumns>(lane, first);
}

// The lane's eight of the 32 columns that are bits of a word.
__device__ __forceinline__ uint32_t lane_columns_of(int lane, uint32_t word) {
  const uint32_t pairs = word >> (2 * (lane & 3)) & 0x03030303;
  return (pairs * 0x01041040u) >> 24;  // pairs << 24, 18, 12 and 6, of which each gives the upper byte one
}

// Hides the scores of some of the lane's columns in its row of a half. Row by row, and as bits of what is hidden: where
// the bits of a word are asked for in their order, and none the other way round, ptxas makes seven of them predicates
// by one instruction.
template <int kBlocks>
__device__ __forceinline__ void hide(float (&scores)[kBlocks][4], int half, uint32_t columns) {
#pragma unroll
  for (int column = 0; column < 2 * kBlocks; ++column) {
    if ((columns >> column & 1) != 0) scores[column / 2][2 * half + column % 2] = -infinity();
  }
}

}  // namespace flash_cosine_sim
