// The tile sizes of sm80/forward.cuh.
#pragma once

#include "common/tile_table.h"

namespace flash_cosine_sim {

// A block owns block_q() queries, and walks over the keys in blocks of block_k, two of which are in shared memory: one
// in use, one on its way.
struct ForwardTile {
  int head_dim;
  int warps;
  // Rows of a warp, 16 each: 32 rows use every b twice, which halves the reads of shared memory; their accumulators (O:
  // the head dim a lane, scores: block_k) must leave room in 255 registers.
  int row_tiles;
  int warps_dim;  // warps that share rows, each with its part of the columns of O; all of them make the scores
  int block_k;
  bool q_in_registers;  // for which short rows leave room; longer q is read from shared memory for every block of keys

  constexpr int threads() const { return 32 * warps; }
  constexpr int min_blocks() const { return warps > 4 ? 1 : 2; }  // for which registers are left
  constexpr int block_q() const { return 16 * row_tiles * warps / warps_dim; }
  constexpr int shared_bytes(int element_size) const {  // Q; K and V, two blocks of each
    return (block_q() + 2 * 2 * block_k) * head_dim * element_size;
  }
};

inline constexpr ForwardTile kForwardTiles16Bit[] = {
    // head_dim, warps, row_tiles, warps_dim, block_k, q_in_registers
    { 16, 4, 2, 1, 64,  true},
    { 32, 4, 2, 1, 64,  true},
    { 64, 4, 2, 1, 64,  true},
    { 96, 4, 2, 1, 32, false},
    {128, 4, 2, 1, 32, false},
    {256, 4, 1, 1, 32, false},
};
// Math::kFp16WideP: P takes twice the registers.
inline constexpr ForwardTile kForwardTilesWideP[] = {
    // head_dim, warps, row_tiles, warps_dim, block_k, q_in_registers
    { 16, 4, 2, 1, 64,  true},
    { 32, 4, 2, 1, 64,  true},
    { 64, 4, 2, 1, 64,  true},
    { 96, 4, 2, 1, 32, false},
    {128, 4, 1, 1, 32, false},
    {256, 4, 1, 1, 16, false},
};
inline constexpr ForwardTile kForwardTiles32Bit[] = {
    // head_dim, warps, row_tiles, warps_dim, block_k, q_in_registers
    { 16, 4, 2, 1, 32, false},
    { 32, 4, 2, 1, 32, false},
    { 64, 4, 2, 1, 32, false},
    { 96, 4, 1, 1, 32, false},
    {128, 4, 1, 1, 32, false},
    {256, 4, 1, 2, 16, false},
};

// 16 bits, where a multiprocessor's shared memory holds one block of the above, and its schedulers a warp each: one
// with twice the warps. Which is taken: plan.cpp.
inline constexpr ForwardTile kForwardTilesEightWarps[] = {
    // head_dim, warps, row_tiles, warps_dim, block_k, q_in_registers
    {128, 8, 2, 1, 32, false},
};

// With eight_warps, if has_forward_eight_warps says so.
constexpr const ForwardTile& forward_tile(Math math, int head_dim, bool eight_warps) {
  if (eight_warps) return tile_of(kForwardTilesEightWarps, head_dim);
  if (element_size(math) == 4) return tile_of(kForwardTiles32Bit, head_dim);
  return tile_of(math == Math::kFp16WideP ? kForwardTilesWideP : kForwardTiles16Bit, head_dim);
}

template <Math kMath, int kHeadDim, bool kEightWarps>
struct ForwardTraits {
  static_assert(!kEightWarps || has_forward_eight_warps(kMath, kHeadDim));
  static constexpr ForwardTile kTile = forward_tile(kMath, kHeadDim, kEightWarps);
  static_assert(kTile.head_dim == kHeadDim);
  static constexpr int kRowTiles = kTile.row_tiles, kWarpsDim = kTile.warps_dim, kBlockK = kTile.block_k;
  static constexpr bool kQInRegisters = kTile.q_in_registers;
  static constexpr int kMinBlocks = kTile.min_blocks();
  static constexpr int kWarps = kTile.warps;

  static constexpr int kRowBytes = kHeadDim * element_size(kMath);
  static constexpr int kOutDim = kHeadDim / kWarpsDim;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kBlockQ = kTile.block_q();
  static constexpr int kSharedBytes = kTile.shared_bytes(element_size(kMath));
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(!kQInRegisters || element_size(kMath) == 2);
};

}  // namespace flash_cosine_sim
