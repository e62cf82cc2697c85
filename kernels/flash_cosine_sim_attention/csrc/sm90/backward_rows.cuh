// What the warps beside the producer's in sm90/backward.cuh do, row by row, for all blocks, while the others multiply:
// ahead of the tiles q -> q_hat, k -> k_hat, delta, and zeros in dq_accumulator.
//
// Launches of their own would do the same at the speed of the memory, which the main kernel hardly uses. Rows are made
// shortly before they are read, so that they are still in the L2 cache.
#pragma once

#include "common/rows.cuh"
#include "common/scores.cuh"
#include "sm90/queue.cuh"
#include "sm90/sections.h"
#include "sm90/tiles/backward.h"

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
  // What is not in q_hat, without the norm: what scores are multiplied by in the variants that add what distances say,
  // and its inverse, for what is taken off before that.
  float score_scale = 1.f, row_sum_scale = 1.f;
};

// A warp. It takes chunks of rows from a counter, and publishes them by a counter for each block of rows.
//
// Who has taken a chunk waits at most until the first tile of the chunk's section has been taken; a tile that needs the
// chunk is none before. So no wait is endless: queue.cuh.
//
// Few warps have little time and few registers. So rows come by asynchronous copies, kRowsAtOnce in turn, the next
// while a warp works on those before: a lane on 16 columns, as rows.cuh cuts a row, of two rows. Products leave little
// of shared memory's time, too, at head dim 64 above all: a row is copied whole by neighbouring lanes.
template <Math kMath, int kHeadDim>
struct RowPreparer {
  using Traits = BackwardSm90Traits<kMath, kHeadDim>;
  using Counters = BackwardSm90Counters;
  using T = Element<kMath>;
  static constexpr int kLanes = Traits::kLanesPerRow, kRowsAtOnce = Traits::kRowsAtOnce;
  static constexpr int kChunkRows = Traits::kChunkRows;
  static constexpr int kNextRow = 32 / kLanes;  // the distance of a lane's two rows
  static constexpr int kVectors = 2 * kLanes;   // of 16 bytes, of a row
  static constexpr int kBuffers = Traits::kRowBuffers, kBufferBytes = Traits::kRowBufferBytes;

  const BackwardParams& params;
  const BackwardSchedule& schedule;
  const uint32_t buffers;  // in shared memory

  struct Chunk {
    bool is_key;
    int batch, head, first_row;
    unsigned counter;     // of the block of rows that it is in
    unsigned first_tile;  // of its section
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

    // Nor does a window need all keys at once; rows of packed sequences lie side by side.
    const bool is_near = params.causal || params.plan.variant != Variant::kCausal;
    const unsigned alternating = is_near ? min(keys, queries) : 0;
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
    return chunk;
  }

  __device__ __forceinline__ unsigned count_tiles_taken() const {
    return schedule.num_static_tiles + load_relaxed(params.counters + Counters::kTilesTaken);
  }

  // Waits until the tiles are no more than a wave away from the chunk's section, else k_hat, q_hat and the zeros would
  // leave the L2 cache and come back. At least num_tiles_taken are taken.
  __device__ __forceinline__ void wait_for_turn(const Chunk& chunk, unsigned num_tiles_taken) const {
    while (chunk.first_tile > num_tiles_taken + gridDim.x) {
      __nanosleep(1000);
      num_tiles_taken = count_tiles_taken();
    }
  }

  static __device__ __forceinline__ int lane() { return threadIdx.x & 31; }

  // What a lane works on: the first of its rows, among those that the warp has in turn, and which of its vectors exist.
  static __device__ __forceinline__ int row() { return lane() / kLanes; }
  __device__ __forceinline__ bool has_vector(int vector) const {
    return lane() % kLanes < params.head_dim / 8 - kLanes * vector;
  }

  template <typename Value>
  __device__ __forceinline__ Value* address(const Tensor& tensor, const Chunk& chunk, int row, int vector) const {
    return rows::row_of<Value>(tensor, {chunk.batch, chunk.head, chunk.first_row + row}) + 8 * vector;
  }

  // Where row and vector are in a buffer. Rows that lanes read together do not share banks: every other one, or with
  // two lanes a row every other pair, has its halves swapped.
  static __device__ __forceinline__ uint32_t place(int row, int vector) {
    const int swap = kLanes == 8 ? 0 : row / (4 / kLanes) % 2 * kLanes;
    return 16 * (row * kVectors + (vector ^ swap));
  }

  // What a lane copies, so that the warp reads whole rows: of every (32 / kVectors)-th row a vector.
  static __device__ __forceinline__ int copied_row() { return lane() / kVectors; }
  static __device__ __forceinline__ int copied_vector() { return lane() % kVectors; }

  __device__ __forceinline__ const T* copied(const Tensor& tensor, const Chunk& chunk) const {
    return address<const T>(tensor, chunk, copied_row(), copied_vector());
  }

  // Asks for rows of a tensor, of which there are no more than num_rows, and goes on to the next.
  __device__ __forceinline__ void ask_for_rows(uint32_t buffer, const T*& source, int64_t stride_row,
                                               int num_rows) const {
    const int lane = opaque(this->lane());  // there are no registers for what depends on it from pass to pass
    const uint32_t target = buffer + place(lane / kVectors, lane % kVectors);
    const bool exists = lane % kVectors < params.head_dim / 8;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i += 32 / kVectors) {
      cp_async_16(target + 16 * kVectors * i, source, exists && lane / kVectors + i < num_rows);
      source += 32 / kVectors * stride_row;
    }
  }

  // All of the warp's copies but those asked for the last kPending times.
  template <int kPending>
  static __device__ __forceinline__ void await_rows() {
    cp_async_wait<kPending>();
    __syncwarp();
  }

  // The lane's share of its i-th row.
  static __device__ __forceinline__ void load(rows::PackedSlice& slice, uint32_t buffer, int i) {
#pragma unroll
    for (int vector = 0; vector < 2; ++vector) {
      load_shared_v4_u32(reinterpret_cast<uint32_t (&)[4]>(slice[4 * vector]),
                         buffer + place(row() + i * kNextRow, lane() % kLanes + kLanes * vector));
    }
  }

  // Writes the rows in `buffer`, divided by their lengths and multiplied by a factor, and goes on to the next.
  __device__ __forceinline__ void write_units(uint32_t buffer, T*& target, int64_t stride_row, int num_rows,
                                              float factor) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows::PackedSlice x;
      load(x, buffer, i);
      rows::normalize_packed<T>(x, kLanes, factor);
#pragma unroll
      for (int vector = 0; vector < 2; ++vector) {
        if (row() + i * kNextRow >= num_rows || !has_vector(vector)) continue;
        *reinterpret_cast<uint4*>(target + 8 * kLanes * vector) = reinterpret_cast<const uint4&>(x[4 * vector]);
      }
      target += kNextRow * stride_row;
    }
    __syncwarp();  // nobody needs the buffer any more
  }

  __device__ __forceinline__ void prepare_keys(const Chunk& chunk) const {
    const T* source = copied(params.k, chunk);
    T* target = address<T>(params.k_hat, chunk, row(), lane() % kLanes);
    const int num_rows = min(params.seq_len_k - chunk.first_row, kChunkRows);
#pragma unroll
    for (int i = 0; i < kBuffers; ++i) {
      ask_for_rows(buffers + i * kBufferBytes, source, params.k.stride_row, num_rows - i * kRowsAtOnce);
      cp_async_commit();
    }
#pragma unroll 1
    for (int first = 0; first < kChunkRows; first += kRowsAtOnce) {
      const uint32_t buffer = buffers + first / kRowsAtOnce % kBuffers * kBufferBytes;
      await_rows<kBuffers - 1>();
      write_units(buffer, target, params.k_hat.stride_row, num_rows - first, 1.f);
      ask_for_rows(buffer, source, params.k.stride_row, num_rows - first - kBuffers * kRowsAtOnce);
      cp_async_commit();
    }
  }

  __device__ __forceinline__ void clear_dq(const Chunk& chunk) const {
    if (params.dq_accumulator == nullptr) return;
    const int64_t head = int64_t(chunk.batch) * params.num_heads + chunk.head;
    float4* zeros = reinterpret_cast<float4*>(params.dq_accumulator +
                                              (head * params.plan.padded_rows + chunk.first_row) * kHeadDim) +
                    lane();
#pragma unroll
    for (int i = 0; i < kChunkRows * kHeadDim / 4; i += 32) zeros[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  // delta = rowsum(dO * O): the first two of a row's lanes write that of one of their two rows each.
  __device__ __forceinline__ void write_delta(uint32_t o, uint32_t dout, int head, int first_row, int num_rows) const {
    const int mine = lane() % kLanes;
    float delta = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows::PackedSlice x, y;
      load(x, dout, i);
      load(y, o, i);
      const float sum = rows::dot_over_lanes<T>(x, y, kLanes);
      if (mine == i) delta = sum;
    }
    __syncwarp();
    const int row_in_turn = row() + mine * kNextRow;
    if (mine >= 2 || row_in_turn >= num_rows) return;
    const int64_t place = int64_t(head) * params.seq_len_q + first_row + row_in_turn;
    if (params.drow_sum_log2) delta = fmaf(-kLog2E, params.drow_sum_log2[place], delta);
    params.delta[place] = delta;
  }

  // q of the next rows comes while delta is made, their o and dO while q_hat is.
  __device__ __forceinline__ void prepare_queries(const Chunk& chunk) const {
    static_assert(kBuffers == 3);
    const uint32_t q = buffers, o = q + kBufferBytes, dout = o + kBufferBytes;
    const T *source_q = copied(params.q, chunk), *source_o = copied(params.o, chunk);
    const T* source_dout = copied(params.dout, chunk);
    T* target = address<T>(params.q_hat, chunk, row(), lane() % kLanes);
    int num_rows = min(params.seq_len_q - chunk.first_row, kChunkRows);
    const int head = chunk.batch * params.num_heads + chunk.head;
    int first_row = chunk.first_row;
    const auto ask_for_q = [&](int num_rows) {
      ask_for_rows(q, source_q, params.q.stride_row, num_rows);
      cp_async_commit();
    };
    const auto ask_for_products = [&](int num_rows) {
      ask_for_rows(o, source_o, params.o.stride_row, num_rows);
      ask_for_rows(dout, source_dout, params.dout.stride_row, num_rows);
      cp_async_commit();
    };
    ask_for_q(num_rows);
    ask_for_products(num_rows);
    clear_dq(chunk);
#pragma unroll 1
    for (int pass = 0; pass < kChunkRows / kRowsAtOnce; ++pass) {
      await_rows<1>();
      write_units(q, target, params.q_hat.stride_row, num_rows, scale_log2(params, chunk.head));
      ask_for_q(num_rows - kRowsAtOnce);
      await_rows<1>();
      write_delta(o, dout, head, first_row, num_rows);
      first_row += kRowsAtOnce;
      num_rows -= kRowsAtOnce;
      ask_for_products(num_rows);
    }
  }

  __device__ __forceinline__ void prepare(const Chunk& chunk) const {
    if (chunk.is_key) {
      prepare_keys(chunk);
    } else {
      prepare_queries(chunk);
    }
    cp_async_wait<0>();  // zeros for rows behind the chunk's, where the next chunk's go
  }

  __device__ __forceinline__ void prepare_chunks() {
    unsigned next = ask_for_chunk(params, Counters::kChunksTaken);
    while (true) {
      const unsigned index = __shfl_sync(0xffffffffu, next, 0);
      if (index >= static_cast<unsigned>(schedule.num_chunks)) return;
      const unsigned num_tiles_taken = count_tiles_taken();  // in a microsecond, while the chunk is found
      const Chunk chunk = find_chunk(index);
      wait_for_turn(chunk, num_tiles_taken);
      next = ask_for_chunk(params, Counters::kChunksTaken);
      prepare(chunk);
      publish(params, chunk.counter, 1);
    }
  }
};

}  // namespace flash_cosine_sim
