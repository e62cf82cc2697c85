// The tile sizes of sm80/bias_gradient.cuh.
#pragma once

#include "common/tile_table.h"

namespace flash_cosine_sim {

// A block owns block_q() x block_k elements of dbias, a warp 16 rows of them, and walks over what it is broadcast
// along.
struct BiasGradientTile {
  int head_dim;
  int warps;
  int block_k;  // three accumulators of 4 * block_k / 8 registers: S, dP and the sum of dS

  constexpr int block_q() const { return 16 * warps; }
};

inline constexpr BiasGradientTile kBiasGradientTiles16Bit[] = {
    // head_dim, warps, block_k
    { 16, 4, 32},
    { 32, 4, 32},
    { 64, 4, 32},
    { 96, 4, 32},
    {128, 4, 32},
    {256, 4, 32},
};
inline constexpr BiasGradientTile kBiasGradientTiles32Bit[] = {
    // head_dim, warps, block_k
    { 16, 4, 32},
    { 32, 4, 32},
    { 64, 4, 32},
    { 96, 4, 32},
    {128, 4, 32},
    {256, 2, 16},
};

constexpr const BiasGradientTile& bias_gradient_tile(Math math, int head_dim) {
  return tile_of(element_size(math) == 4 ? kBiasGradientTiles32Bit : kBiasGradientTiles16Bit, head_dim);
}

template <Math kMath, int kHeadDim>
struct BiasGradientTraits {
  static constexpr BiasGradientTile kTile = bias_gradient_tile(kMath, kHeadDim);
  static_assert(kTile.head_dim == kHeadDim);
  static constexpr int kWarps = kTile.warps, kBlockK = kTile.block_k;
  static constexpr int kMinBlocks = 2;

  static constexpr int kRowBytes = kHeadDim * element_size(kMath);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockQ = kTile.block_q();
  static constexpr int kSharedBytes = 2 * (kBlockQ + kBlockK) * kRowBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes);
  // Of distance_bias: at the end, the sum of a block's tiles as float32.
  static constexpr int kDistancePitch = kBlockK + 1;
  static constexpr int kDistanceTileBytes = kBlockQ * kDistancePitch * static_cast<int>(sizeof(float));
  static constexpr int kDistanceSharedBytes = kSharedBytes > kDistanceTileBytes ? kSharedBytes : kDistanceTileBytes;
  static_assert(kBlockQ % kBlockK == 0, "tiles of a diagonal are at the same distances");
};

}  // namespace flash_cosine_sim
