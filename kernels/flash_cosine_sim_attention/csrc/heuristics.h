// The thresholds at which plan.cpp takes one kernel, or one way of using it, instead of another. Times are an H200's.
#pragma once

#include <cstdint>

namespace flash_cosine_sim {

// ---- Forward ----

// float16, unless P is in a wider format: 2^S may leave its range for logits larger than this. 2^(10 log2(e)) = 2^14.4
// is below its largest number, 2^16, and the smallest, 2^-14.4, hardly below its smallest normal one, 2^-14.
inline constexpr float kLargestFp16Logit = 10.f;

// sm80/forward_split.cuh up to so many rows that share a key: with so few, memory decides, and to read keys and values
// once is best.
inline constexpr int64_t kFewRows = 64;
// And with more rows where other kernels would leave two thirds of the GPU idle, with one of their tiles for so many
// multiprocessors: sm90/forward.cuh takes less than half of its time otherwise.
inline constexpr int64_t kIdleShare = 3;
inline constexpr int64_t kIdleTileRows = 128;  // of such a tile

// Keys are split if they are at least so many blocks: a merge takes as long as a multiprocessor does for some 8.
inline constexpr int64_t kBlocksWorthMerging = 8;
// Each split has at least so many blocks of keys: fewer hardly get going.
inline constexpr int64_t kLeastBlocksPerSplit = 2;
// More splits than fill the GPU once are tried up to so many times as many ...
inline constexpr int64_t kMostWaves = 4;
// ... and taken if they shorten the walk to less than this share of the best so far, in percent: a wave more, and a
// longer merge, must be worth a tenth of the time.
inline constexpr int64_t kWorthAWavePercent = 90;

// A launch that writes k_hat takes as long as the normalisation of so many channels within the kernel, and then reads
// and writes them, which takes as long as some four normalisations of each.
inline constexpr int64_t kPrologueLaunchChannels = 1 << 24;
inline constexpr int64_t kPrologueCopies = 4;

// sm80/forward.cuh normalises in its own launch up to one tile of queries. With more, each tile would normalise all
// keys anew, which costs the GPU more than a launch costs the host: 28 us at 512 queries, 22 with the prologue.
inline constexpr int64_t kFewQueries = 128;

// sm90/forward.cuh normalises keys in its idle warps, ahead of where it reads them, from so many queries a key on. They
// are slower than the prologue, and hidden if each key is multiplied with many queries.
inline constexpr int64_t kManyQueriesPerKey = 256;

// ---- Backward ----

// sm90/backward.cuh prepares rows in its idle warps, which are slower than launches of their own, from so many products
// a row on. Measured: 256 (1 to 3 % faster), not 128 (2 % slower at head dim 64).
inline constexpr int64_t kManyProductsPerRow = 256;

// Where blocks of keys are too few for the GPU, or of too different lengths, several share a walk over queries, and
// their sums are added up afterwards: walk_splits.h. What that takes, in microseconds:
struct WalkCosts {
  double pair_us;       // a block of queries in a walk
  double tile_us;       // what a walk, or a share of one, takes beside those
  double merge_us;      // adding up, in the launch that makes dq, and
  double us_per_byte;   // each byte of partials, written and read
  int64_t least_pairs;  // of a share of the longest walk
};
// A pair and a tile as measured at head dim 64 (2.1 and 5.3 us), where a pair has as many products as at 128. With them
// 512 to 4096 queries of 8 to 32 heads took 0.5 to 1.1 times the difference between two numbers of splits that the
// model says. The others are estimates: 3 TB/s, as the L2 cache holds most partials; at most 1 us to add up, for 8 heads
// of 64 with 512 queries took longer whole than in two shares.
inline constexpr WalkCosts kWalkCostsSm90{2, 5, 1, 1 / 3e6, 2};
// A pair as measured on an H200 with two blocks a multiprocessor: 5.31 ms for 993 of them at head dim 64 and length
// 8192, 6.4 us in float32. The others are estimates.
inline constexpr WalkCosts kWalkCostsSm80{5, 10, 2.5, 1 / 1.5e6, 4};
// At most so many pieces for each block that runs at a time, and memory for their partials.
inline constexpr int64_t kMostWavesOfWalks = 4;
// More splits are taken if they need less than this share of the time, in percent: the model is no better than that.
inline constexpr int64_t kWorthMoreSplitsPercent = 97;

}  // namespace flash_cosine_sim
