// The tile sizes of sm80/forward_split.cuh: few queries and many keys.
#pragma once

#include "common/tile_table.h"

namespace flash_cosine_sim {

// All warps of a block copy blocks of block_keys keys; warps_with_rows of them have rows of their own, warp_rows each,
// and the warps / warps_with_rows that have the same rows share out a block's keys, block_keys / warps at a time.
struct SplitTile {
  int head_dim;
  // Mostly 32 KiB of keys and values. A block works on one such stage while the next is on its way, and a
  // multiprocessor of 228 KiB has two or three blocks: more than the fastest memory needs to be busy.
  int block_keys;
  int row_tiles;  // rows of a warp, 16 each
  // In registers q needs shared memory at the start only, which serves keys afterwards, and there is room for three
  // blocks of 168 registers a thread: enough for 16 rows a warp, but where P is wide and takes twice as many.
  bool q_in_registers;
  int min_blocks;

  constexpr int warps() const { return block_keys >= 64 ? 4 : block_keys / 16; }
  constexpr int warp_rows() const { return 16 * row_tiles; }
  constexpr int warps_with_rows(int64_t num_rows) const {
    int result = 1;
    while (result < warps() && result * warp_rows() < num_rows) result *= 2;
    return result;
  }
  constexpr int threads() const { return 32 * warps(); }
  constexpr int stage_bytes(int element_size) const { return 2 * block_keys * head_dim * element_size; }
  // A q that goes into registers is first where the second stage will be.
  constexpr int shared_bytes(int element_size) const {
    const int q_bytes = warp_rows() * warps() * head_dim * element_size;
    return 2 * stage_bytes(element_size) + (q_in_registers ? 0 : q_bytes);
  }
};

inline constexpr SplitTile kSplitTiles16Bit[] = {
    // head_dim, block_keys, row_tiles, q_in_registers, min_blocks
    { 16, 256, 1,  true, 3},
    { 32, 256, 1,  true, 3},
    { 64, 128, 1,  true, 3},
    { 96,  64, 1,  true, 3},
    {128,  64, 1,  true, 3},
    {256,  32, 1, false, 2},
};
inline constexpr SplitTile kSplitTilesWideP[] = {
    // head_dim, block_keys, row_tiles, q_in_registers, min_blocks
    { 16, 256, 1,  true, 2},
    { 32, 256, 1,  true, 2},
    { 64, 128, 1,  true, 2},
    { 96,  64, 1,  true, 2},
    {128,  64, 1,  true, 2},
    {256,  32, 1, false, 2},
};
// Longer rows spill registers; sm80/forward.cuh takes them.
inline constexpr SplitTile kSplitTiles32Bit[] = {
    // head_dim, block_keys, row_tiles, q_in_registers, min_blocks
    { 16, 256, 2, false, 2},
    { 32, 128, 2, false, 2},
    { 64,  64, 1, false, 2},
    { 96,  32, 1, false, 2},
    {128,  32, 1, false, 2},
};

// If has_split_kernel says so.
constexpr const SplitTile& split_tile(Math math, int head_dim) {
  if (element_size(math) == 4) return tile_of(kSplitTiles32Bit, head_dim);
  return tile_of(math == Math::kFp16WideP ? kSplitTilesWideP : kSplitTiles16Bit, head_dim);
}

// 16-bit keys become k_hat as fragments, in each warp that multiplies with them; float32's, whose products leave no
// time and registers for that, in shared memory, once a block.
constexpr bool split_normalizes_fragments(Math math) { return element_size(math) == 2; }

template <Math kMath, int kHeadDim>
struct SplitTraits {
  static_assert(has_split_kernel(kMath, kHeadDim));
  static constexpr SplitTile kTile = split_tile(kMath, kHeadDim);
  static_assert(kTile.head_dim == kHeadDim);
  static constexpr int kBlockKeys = kTile.block_keys, kRowTiles = kTile.row_tiles, kMinBlocks = kTile.min_blocks;
  static constexpr bool kQInRegisters = kTile.q_in_registers;

  static constexpr int kRowBytes = kHeadDim * element_size(kMath);
  static constexpr bool kNormalizesFragments = split_normalizes_fragments(kMath);
  static constexpr int kWarps = kTile.warps();
  static constexpr int kThreads = kTile.threads();
  static constexpr int kBlockK = kBlockKeys / kWarps;
  static constexpr int kOutDim = kHeadDim;
  static constexpr int kWarpRows = kTile.warp_rows();
  static constexpr int kBlockQ = kWarpRows * kWarps;  // at most

  static constexpr int kStageBytes = kTile.stage_bytes(element_size(kMath));
  static constexpr int kTileBytesQ = kBlockQ * kRowBytes;
  static constexpr int kOffsetQ = (kQInRegisters ? 1 : 2) * kStageBytes;
  static constexpr int kSharedBytes = kTile.shared_bytes(element_size(kMath));
  static_assert(!kQInRegisters || (kTileBytesQ <= kStageBytes && element_size(kMath) == 2));
  // After the loop, the warps' sums: O and the two row sums behind it. The pitch spreads eight rows over all banks.
  static constexpr int kPitch = kHeadDim + 8;
  static_assert(kWarps * kWarpRows * kPitch * static_cast<int>(sizeof(float)) <= kSharedBytes);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(kMinBlocks * (kSharedBytes + 1024) <= 228 * 1024, "what a 9.0 has, which takes 1 KiB a block itself");
};

}  // namespace flash_cosine_sim
