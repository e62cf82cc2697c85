// The tile sizes of sm90/backward.cuh.
#pragma once

#include "common/tile_table.h"

namespace flash_cosine_sim {

// What blocks of sm90/backward.cuh count together, as places in an array that begins as zeros. Each of the first few
// has a sector of the L2 cache for itself.
struct BackwardSm90Counters {
  // With BackwardPlan::prepares_rows. The first place: its warps have no register for the sum of two addresses.
  static constexpr int kChunksTaken = 0;
  static constexpr int kTilesTaken = 8;  // beyond every block's first
  static constexpr int kNumWithoutRows = 9;
  static constexpr int kChunksOfBlockDone = 16;  // and so on, for each block of keys and then of queries of each head
};

// How many bytes of a query's statistics, or a key's factors, its tensor cores read: statistics.cuh.
inline constexpr int kRowStatisticsBytes = 32;

// A block, one a multiprocessor, takes tile after tile of kBlockK keys, 64 for each of two warpgroups, and walks over
// the queries in blocks of block_q. One more warpgroup has a warp that keeps Q and dO coming, two blocks of each.
struct BackwardSm90Tile {
  static constexpr int kConsumers = 2;  // warpgroups

  int head_dim;
  int block_q;  // S and dP take block_q registers together, dK and dV head_dim
  // Whether the next S is under way while dK is: measured, 3 % of the tensor cores' time at head dim 64. At 128 there
  // are no registers for it.
  bool prefetch_scores;
  // Whether one warpgroup multiplies dQ a pair later than the other, so that their 2^x alternate instead of coinciding.
  // Up to head dim 64 these take as long as the products: measured, 8 % of the kernel's time. At 128 it costs 3 %.
  bool staggered;

  constexpr int block_k() const { return 64 * kConsumers; }
};

inline constexpr BackwardSm90Tile kBackwardSm90Tiles[] = {
    // head_dim, block_q, prefetch_scores, staggered
    { 32, 128,  true,  true},
    { 64, 128,  true,  true},
    { 96,  64,  true, false},
    {128,  64, false, false},
};

constexpr const BackwardSm90Tile& backward_sm90_tile(int head_dim) { return tile_of(kBackwardSm90Tiles, head_dim); }

template <Math kMath, int kHeadDim>
struct BackwardSm90Traits {
  static_assert(kMath == Math::kBf16 || kMath == Math::kFp16);
  static constexpr BackwardSm90Tile kTile = backward_sm90_tile(kHeadDim);
  static_assert(kTile.head_dim == kHeadDim);
  static constexpr int kBlockQ = kTile.block_q, kBlockK = kTile.block_k(), kConsumers = BackwardSm90Tile::kConsumers;
  static constexpr bool kPrefetchScores = kTile.prefetch_scores, kStaggered = kTile.staggered;
  static constexpr int kStages = 2;  // of Q, of dO and of dS

  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= (kConsumers + 1) * kLaunchRegisters,
                "setmaxnreg would wait for ever");

  // backward_rows.cuh: a warp takes chunks as large as the smallest block, for each costs some 3,000 cycles beside its
  // rows. It has kRowsAtOnce of them in turn, a lane 16 columns of two. Those of q, of o and of dO have a buffer each.
  static constexpr int kChunkRows = 64;
  static constexpr int kLanesPerRow = kHeadDim <= 32 ? 2 : kHeadDim <= 64 ? 4 : 8;
  static constexpr int kRowsAtOnce = 2 * (32 / kLanesPerRow);
  static constexpr int kRowWarps = 3, kRowBuffers = 3, kRowBufferBytes = 2 * 32 * 32;
  static_assert(kBlockK % kChunkRows == 0 && kBlockQ % kChunkRows == 0);

  // Of dQ, kBlockQ x kHeadDim, a warpgroup has 64 rows, or all of them and half of the columns.
  static constexpr bool kSplitRows = kBlockQ == 128;
  static constexpr int kColumnsDQ = kSplitRows ? kHeadDim : kHeadDim / 2;

  // Tiles are panels of so many columns, the widest that TMA swizzles; of K half of dQ's columns have to be whole ones.
  static constexpr int kPanelDim = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kPanels = kHeadDim / kPanelDim;
  static constexpr int kPanelBytes = 2 * kPanelDim;  // of a row
  static constexpr int kPanelDimK = kColumnsDQ % 64 == 0 ? 64 : kColumnsDQ % 32 == 0 ? 32 : 16;
  static constexpr int kPanelsK = kHeadDim / kPanelDimK;
  static constexpr int kPanelBytesK = 2 * kPanelDimK;
  static constexpr int kPanelBytesDS = 128;  // a warpgroup's keys

  static constexpr int kTileBytesK = kBlockK * 2 * kHeadDim;
  static constexpr int kTileBytesQ = kBlockQ * 2 * kHeadDim;
  static constexpr int kPanelTileBytesDS = kBlockQ * kPanelBytesDS;
  static constexpr int kTileBytesDS = kConsumers * kPanelTileBytesDS;
  // What a warp has of dQ, on its way to global memory. A warp's 16 rows of dK or dV, which take the same way, fit.
  static constexpr int kStagingBytes = 16 * kColumnsDQ * 4;
  static_assert(kStagingBytes >= 16 * 2 * kHeadDim && kStagingBytes % 1024 == 0);

  static constexpr int kOffsetV = kTileBytesK;  // after K
  static constexpr int kOffsetQ = kOffsetV + kTileBytesK;
  static constexpr int kOffsetDO = kOffsetQ + kStages * kTileBytesQ;
  static constexpr int kOffsetDS = kOffsetDO + kStages * kTileBytesQ;
  static constexpr int kOffsetStaging = kOffsetDS + kStages * kTileBytesDS;
  static constexpr int kOffsetStatistics = kOffsetStaging + 4 * kConsumers * kStagingBytes;
  static constexpr int kOffsetFactors = kOffsetStatistics + kStages * kBlockQ * kRowStatisticsBytes;
  static constexpr int kOffsetWork = kOffsetFactors + kBlockK * kRowStatisticsBytes;
  static constexpr int kOffsetBarriers = kOffsetWork + 16;  // four integers say what a tile is
  static constexpr int kNumBarriers = 4 + 6 * kStages;
  static constexpr int kOffsetRows = (kOffsetBarriers + 8 * kNumBarriers + 127) / 128 * 128;
  // From Variant::kBanded on: the range of queries that sees each key.
  static constexpr int kOffsetRanges = kOffsetRows + kRowWarps * kRowBuffers * kRowBufferBytes;
  static constexpr int kOffsetBlocks = kOffsetRanges + kBlockK * 8;  // of queries that a tile walks over: two integers
  static constexpr int kSharedBytes = kOffsetBlocks + 16;
  // From Variant::kScored on: pieces of DistanceScores, beside Q.
  static constexpr int kOffsetDistances = kSharedBytes;
  static constexpr int kDistanceBytes = (kBlockQ + kBlockK) * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytesScored = kOffsetDistances + kStages * kDistanceBytes;
  static_assert(kSharedBytes <= kMaxSharedBytesSm90);
  static_assert(kSharedBytesScored <= kMaxSharedBytesSm90 && kOffsetDistances % 16 == 0);
  static_assert(kTileBytesK % 1024 == 0 && kTileBytesQ % 1024 == 0, "a swizzle's pattern begins at a multiple of it");
};

}  // namespace flash_cosine_sim
