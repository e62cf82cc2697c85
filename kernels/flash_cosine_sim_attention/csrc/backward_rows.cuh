// What the warps beside the producer's in backward_sm90.cuh do, row by row, for all blocks, while the others multiply:
// ahead of the tiles q -> q_hat, k -> k_hat, delta, and zeros in dq_accumulator.
//
// Launches of their own would do the same at the speed of the memory, which the main kernel hardly uses. Rows are made
// shortly before they are read, so that they are still in the L2 cache.
#pragma once

#include "rows.cuh"
#include "scores.cuh"
#include "sections.h"
#include "traits.h"

namespace flash_cosine_sim {

// Tiles in the order in which they are begun, in sections of heads whose Q, dO and dQ fit into the L2 cache together. A
// causal mask makes the first keys the longest work: they come first. A tile comes after those of lower keys of its
// head, for which it waits in deterministic mode.
//
// Chunks of rows are prepared in sections of heads, too, each begun when there is little left to do in the one before.
struct BackwardSchedule {
  HeadSections kv_heads, prepared_kv_heads;
  int num_blocks_k, num_splits, num_tiles;
  int num_static_tiles;  // which begin without being asked for: every block's first
  int num_chunks;
};

// A warp. It takes chunks of rows from a counter, and publishes them by a counter for each block of rows.
//
// None waits for ever, even if the GPU does not run all blocks at a time. A producer waits for chunks. One that has
// been taken was taken by a running warp, which waits at most until the first tile of the chunk's section has been
// taken; a tile that needs the chunk is none before. One that has not will be, by warps beside the very producer.
template <Math kMath, int kHeadDim>
struct RowPreparer {
  using Traits = BackwardSm90Traits<kMath, kHeadDim>;
  using Counters = BackwardSm90Counters;
  using T = Element<kMath>;
  static constexpr int kLanes = Traits::kLanesPerRow, kRowsAtOnce = 32 / kLanes, kChunkRows = Traits::kChunkRows;
  static_assert(kChunkRows == 32, "a lane has a row's delta");

  const BackwardParams& params;
  const BackwardSchedule& schedule;
  unsigned num_tiles_taken = 0;  // at least so many

  struct Chunk {
    bool is_key;
    int batch, head, first_row;
    unsigned counter;     // of the block of rows that it is in
    unsigned first_tile;  // of its section
    int lane;             // opaque, for there are no registers for what depends on it from chunk to chunk
  };

  // Which counter counts the chunks of a block of keys or queries that are there. Heads are those of all batches.
  static __device__ __forceinline__ unsigned keys_counter(const BackwardSchedule& schedule, int kv_head, int block) {
    return Counters::kChunksOfBlockDone + kv_head * schedule.num_blocks_k + block;
  }
  static __device__ __forceinline__ unsigned queries_counter(const BackwardParams& params,
                                                             const BackwardSchedule& schedule, int head, int block) {
    const unsigned first = keys_counter(schedule, params.batch * params.num_kv_heads, 0);
    return first + head * (params.plan.padded_rows / Traits::kBlockQ) + block;
  }

  // Section by section; in each the first chunk of all of its heads, then the second. Without a causal mask tiles that
  // begin together need all keys at once, but only the first queries; with one, the first of both.
  __device__ __forceinline__ Chunk find_chunk(unsigned index) const {
    const unsigned keys = schedule.num_blocks_k * (Traits::kBlockK / kChunkRows);
    const unsigned queries = params.plan.padded_rows / kChunkRows;
    const unsigned group = params.num_heads / params.num_kv_heads;
    const unsigned per_head = keys + group * queries;
    const auto [first_head, kv_head, place] = schedule.prepared_kv_heads.find(index, per_head);

    const unsigned alternating = params.causal ? min(keys, queries) : 0;
    Chunk chunk;
    unsigned number;
    if (place < 2 * alternating) {
      chunk.is_key = place % 2 == 0;
      number = place / 2;
    } else {
      chunk.is_key = place < alternating + keys;
      number = place - (chunk.is_key ? alternating : keys);
    }
    chunk.batch = kv_head / params.num_kv_heads;
    chunk.head = kv_head % params.num_kv_heads;
    if (chunk.is_key) {
      chunk.first_row = number * kChunkRows;
      chunk.counter = keys_counter(schedule, kv_head, chunk.first_row / Traits::kBlockK);
    } else {
      chunk.head = chunk.head * group + number / queries;
      chunk.first_row = number % queries * kChunkRows;
      chunk.counter = queries_counter(params, schedule, chunk.batch * params.num_heads + chunk.head,
                                      chunk.first_row / Traits::kBlockQ);
    }
    chunk.first_tile = first_head * schedule.num_blocks_k * schedule.num_splits;
    chunk.lane = opaque(static_cast<int>(threadIdx.x & 31));
    return chunk;
  }

  // The answer, which takes a microsecond, is lane 0's alone.
  __device__ __forceinline__ unsigned ask_for_chunk() const {
    if ((threadIdx.x & 31) != 0) return 0;
    return atomic_increment(params.counters + Counters::kChunksTaken);
  }

  // Waits until the tiles are no more than a wave away from the chunk's section, else k_hat, q_hat and the zeros would
  // leave the L2 cache and come back.
  __device__ __forceinline__ void wait_for_turn(const Chunk& chunk) {
    const auto is_early = [&] { return chunk.first_tile > num_tiles_taken + 2 * gridDim.x; };
    while (is_early()) {
      num_tiles_taken = schedule.num_static_tiles + load_relaxed(params.counters + Counters::kTilesTaken);
      if (is_early()) __nanosleep(1000);
    }
  }

  // A lane's place in rows that a warp has in turn: 16 columns, as rows.cuh cuts a row, of every kRowsAtOnce-th row.
  __device__ __forceinline__ int first_row(const Chunk& chunk) const {
    return chunk.first_row + chunk.lane / kLanes;
  }
  __device__ __forceinline__ int column(const Chunk& chunk, int vector) const {
    return 8 * (chunk.lane % kLanes + kLanes * vector);
  }

  // Of the lane's row and first column.
  template <typename Value>
  __device__ __forceinline__ Value* address(const Tensor& tensor, const Chunk& chunk) const {
    return rows::row_of<Value>(tensor, {chunk.batch, chunk.head, first_row(chunk)}) + column(chunk, 0);
  }

  // Asks for a tensor's rows of the chunk, all at once: there are not enough registers to have them all under way.
  __device__ __forceinline__ void prefetch(const Tensor& tensor, const Chunk& chunk, int num_rows) const {
    // A lane has neighbouring columns here, a sector of the L2 cache.
    const T* source = address<const T>(tensor, chunk) + chunk.lane % kLanes * 8;
    const bool exists = chunk.lane % kLanes * 16 < params.head_dim;
    const int rows_left = exists ? num_rows - first_row(chunk) : 0;
#pragma unroll 1
    for (int row = 0; row < kChunkRows; row += kRowsAtOnce) {
      if (row < rows_left) prefetch_l2(source);
      source += kRowsAtOnce * tensor.stride_row;
    }
  }

  __device__ __forceinline__ void load(rows::PackedSlice& slice, const T* row, const Chunk& chunk, bool exists) const {
#pragma unroll
    for (int vector = 0; vector < 2; ++vector) {
      uint4 x{};
      if (exists && column(chunk, vector) < params.head_dim) x = reinterpret_cast<const uint4*>(row)[kLanes * vector];
      reinterpret_cast<uint4&>(slice[4 * vector]) = x;
    }
  }

  __device__ __forceinline__ void store(T* row, const rows::PackedSlice& slice, const Chunk& chunk, bool exists) const {
#pragma unroll
    for (int vector = 0; vector < 2; ++vector) {
      if (!exists || column(chunk, vector) >= params.head_dim) continue;
      reinterpret_cast<uint4*>(row)[kLanes * vector] = reinterpret_cast<const uint4&>(slice[4 * vector]);
    }
  }

  __device__ __forceinline__ void normalize(const Tensor& x, const Tensor& unit, const Chunk& chunk, int num_rows,
                                            float factor) const {
    constexpr int kRows = 2;  // under way
    static_assert(kLanes % kRows == 0);
    const T* source = address<const T>(x, chunk);
    T* target = address<T>(unit, chunk);
    const int rows_left = num_rows - first_row(chunk);
#pragma unroll 1
    for (int row = 0; row < kChunkRows; row += kRows * kRowsAtOnce) {
      rows::PackedSlice slices[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        load(slices[i], source, chunk, row + i * kRowsAtOnce < rows_left);
        source += kRowsAtOnce * x.stride_row;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        rows::normalize_packed<T>(slices[i], kLanes, factor);
        store(target, slices[i], chunk, row + i * kRowsAtOnce < rows_left);
        target += kRowsAtOnce * unit.stride_row;
      }
    }
  }

  // rowsum(dO * O) of row kRowsAtOnce * (lane % kLanes) + lane / kLanes of the chunk.
  __device__ __forceinline__ float row_products(const Chunk& chunk) const {
    const T* o = address<const T>(params.o, chunk);
    const T* dout = address<const T>(params.dout, chunk);
    const int rows_left = params.seq_len_q - first_row(chunk);
    float result = 0.f;
#pragma unroll 1
    for (int pass = 0; pass < kLanes; ++pass) {
      rows::PackedSlice x, y;
      load(x, dout, chunk, pass * kRowsAtOnce < rows_left);
      load(y, o, chunk, pass * kRowsAtOnce < rows_left);
      o += kRowsAtOnce * params.o.stride_row;
      dout += kRowsAtOnce * params.dout.stride_row;
      const float sum = rows::dot_over_lanes<T>(x, y, kLanes);
      if (chunk.lane % kLanes == pass) result = sum;
    }
    return result;
  }

  __device__ __forceinline__ void write_delta(const Chunk& chunk) const {
    float delta = row_products(chunk);
    const int row_in_head = first_row(chunk) + chunk.lane % kLanes * kRowsAtOnce;
    if (row_in_head >= params.seq_len_q) return;
    const int64_t row = (int64_t(chunk.batch) * params.num_heads + chunk.head) * params.seq_len_q + row_in_head;
    if (params.drow_sum_log2) delta = fmaf(-kLog2E, params.drow_sum_log2[row], delta);
    params.delta[row] = delta;
  }

  __device__ __forceinline__ void clear_dq(const Chunk& chunk) const {
    if (params.dq_accumulator == nullptr) return;
    const int64_t head = int64_t(chunk.batch) * params.num_heads + chunk.head;
    float4* zeros = reinterpret_cast<float4*>(params.dq_accumulator +
                                              (head * params.plan.padded_rows + chunk.first_row) * kHeadDim) +
                    chunk.lane;
#pragma unroll
    for (int i = 0; i < kChunkRows * kHeadDim / 4; i += 32) zeros[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  __device__ __forceinline__ void prepare(const Chunk& chunk) const {
    const bool is_key = chunk.is_key;
    const Tensor x = is_key ? params.k : params.q, unit = is_key ? params.k_hat : params.q_hat;
    const int num_rows = is_key ? params.seq_len_k : params.seq_len_q;
    prefetch(x, chunk, num_rows);
    if (!is_key) {
      prefetch(params.dout, chunk, num_rows);
      prefetch(params.o, chunk, num_rows);
      clear_dq(chunk);
    }
    normalize(x, unit, chunk, num_rows, is_key ? 1.f : scale_log2(params, chunk.head));
    if (!is_key) write_delta(chunk);
  }

  // Who acquires the counter sees what the warp has written.
  __device__ __forceinline__ void publish(const Chunk& chunk) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) red_add_release(params.counters + chunk.counter, 1);
  }

  __device__ __forceinline__ void prepare_chunks() {
    unsigned next = ask_for_chunk();
    while (true) {
      const unsigned index = __shfl_sync(0xffffffffu, next, 0);
      if (index >= static_cast<unsigned>(schedule.num_chunks)) return;
      const Chunk chunk = find_chunk(index);
      wait_for_turn(chunk);
      next = ask_for_chunk();
      prepare(chunk);
      publish(chunk);
    }
  }
};

}  // namespace flash_cosine_sim
