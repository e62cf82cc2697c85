// The tile sizes of sm80/forward.cuh.
#pragma once

#include "common/tile_table.h"

namespace flash_cosine_sim {

// A block of four warps owns kBlockQ queries, and walks over the keys in blocks of block_k, two of which are in shared
// memory: one in use, one on its way.
struct ForwardTile {
  int head_dim;
  // Rows of a warp, 16 each: 32 rows use every b twice, which halves the reads of shared memory; their accumulators (O:
  // the head dim a lane, scores: block_k) must leave room in 255 registers.
  int row_tiles;
  int warps_dim;  // warps that share rows, each with its part of the columns of O; all of them make the scores
  int block_k;
  bool q_in_registers;  // for which short rows leave room; longer q is read from shared memory for every block of keys
};

inline constexpr ForwardTile kForwardTiles16Bit[] = {
    // head_dim, row_tiles, warps_dim, block_k, q_in_registers
    { 16, 2, 1, 64,  true},
    { 32, 2, 1, 64,  true},
    { 64, 2, 1, 64,  true},
    { 96, 2, 1, 32, false},
    {128, 2, 1, 32, false},
    {256, 1, 1, 32, false},
};
// Math::kFp16WideP: P takes twice the registers.
inline constexpr ForwardTile kForwardTilesWideP[] = {
    // head_dim, row_tiles, warps_dim, block_k, q_in_registers
    { 16, 2, 1, 64,  true},
    { 32, 2, 1, 64,  true},
    { 64, 2, 1, 64,  true},
    { 96, 2, 1, 32, false},
    {128, 1, 1, 32, false},
    {256, 1, 1, 16, false},
};
inline constexpr ForwardTile kForwardTiles32Bit[] = {
    // head_dim, row_tiles, warps_dim, block_k, q_in_registers
    { 16, 2, 1, 32, false},
    { 32, 2, 1, 32, false},
    { 64, 2, 1, 32, false},
    { 96, 1, 1, 32, false},
    {128, 1, 1, 32, false},
    {256, 1, 2, 16, false},
};

constexpr const ForwardTile& forward_tile(Math math, int head_dim) {
  if (element_size(math) == 4) return tile_of(kForwardTiles32Bit, head_dim);
  return tile_of(math == Math::kFp16WideP ? kForwardTilesWideP : kForwardTiles16Bit, head_dim);
}

template <Math kMath, int kHeadDim>
struct ForwardTraits {
  static constexpr ForwardTile kTile = forward_tile(kMath, kHeadDim);
  static_assert(kTile.head_dim == kHeadDim);
  static constexpr int kRowTiles = kTile.row_tiles, kWarpsDim = kTile.warps_dim, kBlockK = kTile.block_k;
  static constexpr bool kQInRegisters = kTile.q_in_registers;
  static constexpr int kMinBlocks = 2;
  static constexpr int kWarps = 4;

  static constexpr int kRowBytes = kHeadDim * element_size(kMath);
  static constexpr int kOutDim = kHeadDim / kWarpsDim;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockQ = 16 * kRowTiles * kWarps / kWarpsDim;
  static constexpr int kSharedBytes = (kBlockQ + 2 * 2 * kBlockK) * kRowBytes;  // K and V, two blocks of each
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(!kQInRegisters || element_size(kMath) == 2);
};

}  // namespace flash_cosine_sim
