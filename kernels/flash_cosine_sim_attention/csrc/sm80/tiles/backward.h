// The tile sizes of sm80/backward.cuh.
#pragma once

#include "common/tile_table.h"

namespace flash_cosine_sim {

// A block owns kBlockK keys, and walks over queries in blocks of block_q.
struct BackwardTile {
  int head_dim;
  int out_dim;  // columns of dK and dV that a block adds up in registers; other blocks do those that are left
  int warps;
  int row_tiles;  // keys of a warp, 16 each
  int block_q;
  int chunk_q;  // scores are made for so many queries at a time: chunk_q * row_tiles registers for S and dP
  int stages;   // of Q and dO

  constexpr int block_k() const { return 16 * row_tiles * warps; }
  constexpr int slices() const { return head_dim / out_dim; }

  constexpr int threads() const { return 32 * warps; }
  constexpr int min_blocks() const { return warps > 4 ? 1 : 2; }  // for which registers are left
  // Shared memory: K and V, then stages of Q and dO, then dS, then two stages of row statistics. After the loop the
  // same memory holds dV, then dK, as float32.
  constexpr int offset_q(int element_size) const { return 2 * block_k() * head_dim * element_size; }
  constexpr int offset_ds(int element_size) const {
    return offset_q(element_size) + 2 * stages * block_q * head_dim * element_size;
  }
  constexpr int offset_rows(int element_size) const {
    return offset_ds(element_size) + block_k() * block_q * element_size;
  }
  constexpr int pitch() const { return head_dim + 4; }
  constexpr int shared_bytes(int element_size) const {
    const int loop_bytes = offset_rows(element_size) + 2 * 2 * block_q * static_cast<int>(sizeof(float));
    const int epilogue_bytes = slices() == 1 ? block_k() * pitch() * static_cast<int>(sizeof(float)) : 0;
    return loop_bytes > epilogue_bytes ? loop_bytes : epilogue_bytes;
  }
};

inline constexpr BackwardTile kBackwardTiles16Bit[] = {
    // head_dim, out_dim, warps, row_tiles, block_q, chunk_q, stages
    { 16,  16, 4, 2, 64, 32, 2},
    { 32,  32, 4, 2, 64, 32, 2},
    { 64,  64, 4, 2, 64, 32, 2},
    { 96,  96, 4, 1, 64, 32, 2},
    {128, 128, 4, 1, 32, 32, 2},
    {256, 128, 4, 1, 16, 16, 2},
};
inline constexpr BackwardTile kBackwardTiles32Bit[] = {
    // head_dim, out_dim, warps, row_tiles, block_q, chunk_q, stages
    { 16, 16, 4, 1, 64, 32, 2},
    { 32, 32, 4, 1, 64, 32, 2},
    { 64, 64, 4, 1, 32, 32, 2},
    { 96, 96, 4, 1, 32, 16, 1},
    {128, 64, 4, 1, 16, 16, 1},
    {256, 64, 2, 1, 16, 16, 1},
};

// 16 bits, where a multiprocessor's shared memory holds one block of the above, and its schedulers a warp each: one
// with twice the warps, and as many keys a warp, for which block_q or stages give way. Which is taken: plan.cpp.
inline constexpr BackwardTile kBackwardTilesEightWarps[] = {
    // head_dim, out_dim, warps, row_tiles, block_q, chunk_q, stages
    { 64,  64, 8, 2, 32, 32, 2},
    { 96,  96, 8, 1, 64, 32, 1},
    {128, 128, 8, 1, 16, 16, 2},
};

// With eight_warps, if has_backward_eight_warps says so.
constexpr const BackwardTile& backward_tile(Math math, int head_dim, bool eight_warps) {
  if (eight_warps) return tile_of(kBackwardTilesEightWarps, head_dim);
  return tile_of(element_size(math) == 4 ? kBackwardTiles32Bit : kBackwardTiles16Bit, head_dim);
}

template <Math kMath, int kHeadDim, bool kEightWarps>
struct BackwardTraits {
  static_assert(!kEightWarps || has_backward_eight_warps(kMath, kHeadDim));
  static constexpr BackwardTile kTile = backward_tile(kMath, kHeadDim, kEightWarps);
  static_assert(kTile.head_dim == kHeadDim);
  static constexpr int kOutDim = kTile.out_dim, kWarps = kTile.warps, kRowTiles = kTile.row_tiles;
  static constexpr int kBlockQ = kTile.block_q, kChunkQ = kTile.chunk_q, kStages = kTile.stages;
  static constexpr int kMinBlocks = kTile.min_blocks();

  static constexpr int kElementSize = element_size(kMath);
  static constexpr int kRowBytes = kHeadDim * kElementSize;
  static constexpr int kSlices = kTile.slices();
  static constexpr int kThreads = kTile.threads();
  static constexpr int kBlockK = kTile.block_k();
  // The warps share out dQ, kBlockQ x kOutDim: so many along the queries, the others along the head dim.
  static constexpr int kWarpsQ = kBlockQ / 16 < kWarps ? kBlockQ / 16 : kWarps;
  static constexpr int kWarpsDim = kWarps / kWarpsQ;
  static constexpr int kDimPerWarp = kOutDim / kWarpsDim;

  static constexpr int kTileBytesK = kBlockK * kRowBytes;
  static constexpr int kTileBytesQ = kBlockQ * kRowBytes;
  static constexpr int kRowBytesDS = kBlockQ * kElementSize;
  static constexpr int kOffsetQ = kTile.offset_q(kElementSize);
  static constexpr int kOffsetDS = kTile.offset_ds(kElementSize);
  static constexpr int kOffsetRows = kTile.offset_rows(kElementSize);
  static constexpr int kPitch = kTile.pitch();
  static constexpr int kSharedBytes = kTile.shared_bytes(kElementSize);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(kSlices * kOutDim == kHeadDim && kBlockQ % kChunkQ == 0);
  static_assert(kWarpsQ * 16 == kBlockQ && kDimPerWarp % 16 == 0);
};

}  // namespace flash_cosine_sim
