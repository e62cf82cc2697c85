// The tile sizes of sm90/forward.cuh.
#pragma once

#include "common/tile_table.h"

namespace flash_cosine_sim {

// Where the sum of a row's P, as rounded for the product with V, comes from. (The sum of P itself is added up as P is
// made.)
enum class RoundedSum {
  kOnes,    // eight more columns of V, all ones: tensor cores add them up, 4 cycles more for 16 keys
  kUnpack,  // P's registers unpacked: three instructions for two elements
};

// What blocks of sm90/forward.cuh count together, as places in an array that begins as zeros. Each of the first few has
// a sector of the L2 cache for itself.
struct ForwardSm90Counters {
  static constexpr int kTilesTaken = 0;  // beyond every block's first
  static constexpr int kNumWithoutKeys = 1;
  // With Norm::kAhead:
  static constexpr int kChunksTaken = 8;
  static constexpr int kChunksDone = 16;
  static constexpr int kChunksOfBlockDone = 24;  // and so on, for each block of keys of each head
};

// A block, one a multiprocessor, takes tile after tile of kBlockQ queries, 64 a warpgroup, and walks over the keys in
// blocks of block_k. One more warpgroup has a warp that keeps K and V coming, `stages` blocks each.
//
// Up to head dim 64 taking 2^x is as long as the products, so three warpgroups take turns, and each starts its product
// with V slice by slice as P comes out (sliced). From 96 on, products are longer and tensor cores are never idle: two
// warpgroups with larger blocks, each of which takes 2^x of a block during its product of the block before with V.
struct ForwardSm90Tile {
  int head_dim;
  int consumers;  // warpgroups
  bool sliced;
  // Scores take block_k / 2 registers beside O's head_dim / 2, P's block_k / 4 and q's head_dim / 4. At head dim 64
  // that leaves 96; 128 without q in registers measured the same for long rows and less for short ones. At 256 more
  // than 64 spill.
  int block_k;
  int stages;
  bool q_in_registers;  // measured at 128: 2 to 3 % less energy; it also frees q's memory for the next tile's at once
  // Unpacking would be a third to a half of the loop's instructions; wgmma has no room for more than 256 columns.
  RoundedSum rounded_sum;
  // What one launch's registers allow when unevenly dealt out.
  int consumer_registers, producer_registers;
  // Norm::kAhead: a lane's share of a chunk of keys, as many as producer_registers have room for: the more loads are
  // under way, the faster it is.
  int rows_per_lane;
};

inline constexpr ForwardSm90Tile kForwardSm90Tiles[] = {
    // head_dim, consumers, sliced, block_k, stages, q_in_registers, rounded_sum, two of registers, rows_per_lane
    { 32, 3,  true, 128, 6,  true,   RoundedSum::kOnes, 152, 56, 4},
    { 64, 3,  true,  96, 4,  true,   RoundedSum::kOnes, 152, 56, 4},
    { 96, 2, false, 128, 3,  true,   RoundedSum::kOnes, 224, 56, 4},
    {128, 2, false, 128, 2,  true,   RoundedSum::kOnes, 224, 56, 4},
    {256, 2, false,  64, 2, false, RoundedSum::kUnpack, 232, 40, 2},
};

constexpr const ForwardSm90Tile& forward_sm90_tile(int head_dim) { return tile_of(kForwardSm90Tiles, head_dim); }

template <Math kMath, int kHeadDim>
struct ForwardSm90Traits {
  static_assert(kMath == Math::kBf16 || kMath == Math::kFp16);
  static constexpr ForwardSm90Tile kTile = forward_sm90_tile(kHeadDim);
  static_assert(kTile.head_dim == kHeadDim);
  static constexpr int kConsumers = kTile.consumers, kBlockK = kTile.block_k, kStages = kTile.stages;
  static constexpr bool kSliced = kTile.sliced, kQInRegisters = kTile.q_in_registers;
  static constexpr RoundedSum kRoundedSum = kTile.rounded_sum;
  static constexpr int kConsumerRegisters = kTile.consumer_registers, kProducerRegisters = kTile.producer_registers;

  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= (kConsumers + 1) * kLaunchRegisters,
                "setmaxnreg would wait for ever");
  static constexpr int kBlockQ = 64 * kConsumers;
  // Whole words of a mask's bits; at most 32 columns a lane (band.cuh); a piece of DistanceScores (distances.cuh).
  static_assert(kBlockK % 32 == 0 && kBlockK <= 128 && kBlockQ + kBlockK <= DistanceScores::kMargin);

  // Norm::kAhead: a warp normalises a chunk of keys at a time. A lane has 16 columns, which is how rows.cuh cuts a row.
  static constexpr int kLanesPerRow = kHeadDim <= 32 ? 2 : kHeadDim <= 64 ? 4 : kHeadDim <= 128 ? 8 : 16;
  static constexpr int kRowsPerLane = kTile.rows_per_lane;
  static constexpr int kChunkRows = kRowsPerLane * (32 / kLanesPerRow);
  static_assert(kBlockK % kChunkRows == 0);

  // Tiles are panels of so many columns, the widest that TMA swizzles.
  static constexpr int kPanelDim = kHeadDim % 64 == 0 ? 64 : kHeadDim % 32 == 0 ? 32 : 16;
  static constexpr int kPanels = kHeadDim / kPanelDim;
  static constexpr int kPanelBytes = 2 * kPanelDim;  // of a row
  static constexpr int kTileBytesQ = kBlockQ * 2 * kHeadDim;
  static constexpr int kTileBytesK = kBlockK * 2 * kHeadDim;
  // The ones are V's last panel. As the second, 16 rows of them serve all of V (start_pv tells how); as a later one, it
  // has to be as far from its neighbour as others are, so that every stage needs its own.
  static constexpr bool kOnes = kRoundedSum == RoundedSum::kOnes, kSharedOnes = kOnes && kPanels == 1;
  static constexpr int kBytesOnes = !kOnes ? 0 : (kSharedOnes ? 16 : kBlockK) * kPanelBytes;
  static constexpr int kTileBytesV = kTileBytesK + (kSharedOnes ? 0 : kBytesOnes);

  static constexpr int kOffsetO = kQInRegisters ? kTileBytesQ : 0;  // else O goes where q was
  static constexpr int kOffsetK = kOffsetO + kTileBytesQ;
  static constexpr int kOffsetV = kOffsetK + kStages * kTileBytesK;
  static constexpr int kOffsetOnes = kOffsetV + (kSharedOnes ? kStages : 1) * kTileBytesK;
  static constexpr int kOffsetWork = kOffsetV + kStages * kTileBytesV + (kSharedOnes ? kBytesOnes : 0);
  static constexpr int kOffsetBarriers = kOffsetWork + 16;  // four integers say what a tile is
  // From Variant::kBanded on: what a step of a tile's walk is, for each stage of K, and the tile's first step.
  static constexpr int kStepBytes = 32;
  static constexpr int kOffsetSteps = (kOffsetBarriers + 2 * (1 + 2 * kStages) * 8 + 15) / 16 * 16;
  static constexpr int kOffsetFirstStep = kOffsetSteps + kStages * kStepBytes;
  // And the range of keys that each query sees. At head dim 128 there is no more room for them: of the ones' panel
  // tensor cores read 8 columns, 16 bytes of a row, and the next 16 bytes are theirs.
  static constexpr bool kRangesInOnes = kOnes && !kSharedOnes && kPanelBytes == 128 && kBlockQ <= kBlockK;
  static constexpr int kOffsetRanges = kOffsetFirstStep + 16;
  static constexpr int kSharedBytes = kOffsetRanges + (kRangesInOnes ? 0 : kBlockQ * 8);
  // Variant::kScored: pieces of DistanceScores, beside K.
  static constexpr int kOffsetDistances = kSharedBytes;
  static constexpr int kDistanceBytes = (kBlockQ + kBlockK) * static_cast<int>(sizeof(float));
  static constexpr int kOffsetScales = kOffsetDistances + kStages * kDistanceBytes;  // a number a warp
  static constexpr int kSharedBytesScored = kOffsetScales + 4 * kConsumers * static_cast<int>(sizeof(float));
  static_assert(kSharedBytes <= kMaxSharedBytesSm90);
  static_assert(kSharedBytesScored <= kMaxSharedBytesSm90 && kOffsetDistances % 16 == 0);
  static_assert(kOffsetK % 1024 == 0 && kTileBytesK % 1024 == 0 && kTileBytesV % 1024 == 0,
                "a swizzle's pattern begins at a multiple of it");
};

}  // namespace flash_cosine_sim
