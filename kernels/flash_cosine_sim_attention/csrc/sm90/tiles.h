// All tile sizes of the kernels for compute capability 9.0. Plain C++, for dispatch.cpp reads it too.
#pragma once

#include "attention.h"

namespace flash_cosine_sim {

inline constexpr int kMaxSharedBytesSm90 = 227 * 1024;

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
// blocks of kBlockK. One more warpgroup has a warp that keeps K and V coming, kStages blocks each.
//
// Up to head dim 64 taking 2^x is as long as the products, so three warpgroups take turns, and each starts its product
// with V slice by slice as P comes out (kSliced). From 96 on, products are longer and tensor cores are never idle: two
// warpgroups with larger blocks, each of which takes 2^x of a block during its product of the block before with V.
template <Math kMath, int kHeadDim>
struct ForwardSm90Traits {
  static_assert(kMath == Math::kBf16 || kMath == Math::kFp16);
  static constexpr bool kSliced = kHeadDim <= 64;
  // Unpacking would be a third to a half of the loop's instructions; wgmma has no room for more than 256 columns.
  static constexpr RoundedSum kRoundedSum = kHeadDim <= 128 ? RoundedSum::kOnes : RoundedSum::kUnpack;
  static constexpr int kConsumers = kSliced ? 3 : 2;  // warpgroups
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // What one launch's registers, 65536 / kThreads each, rounded down to 8, allow when unevenly dealt out.
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 152 : kHeadDim <= 128 ? 224 : 232;
  static constexpr int kProducerRegisters = kHeadDim <= 128 ? 56 : 40;
  static constexpr int kLaunchRegisters = kConsumers == 3 ? 128 : 168;
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= (kConsumers + 1) * kLaunchRegisters,
                "setmaxnreg would wait for ever");
  static constexpr int kBlockQ = 64 * kConsumers;
  // Scores take kBlockK / 2 registers beside O's kHeadDim / 2, P's kBlockK / 4 and q's kHeadDim / 4. At head dim 64
  // that leaves 96; 128 without q in registers measured the same for long rows and less for short ones. At 256 more
  // than 64 spill.
  static constexpr int kBlockK = kHeadDim == 64 ? 96 : kHeadDim == 256 ? 64 : 128;
  static constexpr int kStages = kHeadDim <= 32 ? 6 : kHeadDim == 64 ? 4 : kHeadDim == 96 ? 3 : 2;
  // Measured at 128: 2 to 3 % less energy. It also frees q's memory for the next tile's at once.
  static constexpr bool kQInRegisters = kHeadDim <= 128;

  // Norm::kAhead: a warp normalises a chunk of keys at a time. A lane has 16 columns, which is how rows.cuh cuts a row,
  // of as many rows as kProducerRegisters have room for: the more loads are under way, the faster it is.
  static constexpr int kLanesPerRow = kHeadDim <= 32 ? 2 : kHeadDim <= 64 ? 4 : kHeadDim <= 128 ? 8 : 16;
  static constexpr int kRowsPerLane = kHeadDim <= 128 ? 4 : 2;
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
  static constexpr int kSharedBytes = kOffsetBarriers + 2 * (1 + 2 * kStages) * 8;
  static_assert(kSharedBytes <= kMaxSharedBytesSm90);
  static_assert(kOffsetK % 1024 == 0 && kTileBytesK % 1024 == 0 && kTileBytesV % 1024 == 0,
                "a swizzle's pattern begins at a multiple of it");
};

// The same for sm90/backward.cuh.
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
// the queries in blocks of kBlockQ. One more warpgroup has a warp that keeps Q and dO coming, two blocks of each.
template <Math kMath, int kHeadDim>
struct BackwardSm90Traits {
  static_assert(kMath == Math::kBf16 || kMath == Math::kFp16);
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = 232, kProducerRegisters = 40, kLaunchRegisters = 168;
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= (kConsumers + 1) * kLaunchRegisters,
                "setmaxnreg would wait for ever");
  static constexpr int kBlockK = 64 * kConsumers;
  // S and dP take kBlockQ registers together, dK and dV kHeadDim.
  static constexpr int kBlockQ = kHeadDim <= 64 ? 128 : 64;
  // Whether the next S is under way while dK is: measured, 3 % of the tensor cores' time at head dim 64. At 128 there
  // are no registers for it.
  static constexpr bool kPrefetchScores = kHeadDim <= 96;
  static constexpr int kStages = 2;  // of Q, of dO and of dS
  // Whether one warpgroup multiplies dQ a pair later than the other, so that their 2^x alternate instead of coinciding.
  // Up to head dim 64 these take as long as the products: measured, 8 % of the kernel's time. At 128 it costs 3 %.
  static constexpr bool kStaggered = kHeadDim <= 64;

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
  static constexpr int kSharedBytes = kOffsetRows + kRowWarps * kRowBuffers * kRowBufferBytes;
  static_assert(kSharedBytes <= kMaxSharedBytesSm90);
  static_assert(kTileBytesK % 1024 == 0 && kTileBytesQ % 1024 == 0, "a swizzle's pattern begins at a multiple of it");
};

}  // namespace flash_cosine_sim
