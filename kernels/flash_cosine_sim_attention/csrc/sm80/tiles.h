// All tile sizes of the kernels for compute capability 8.0 and newer. Plain C++, for dispatch.cpp reads it too.
//
// Every block of the mma.sync kernels fits into 99 KiB of shared memory, the most that GPUs of compute capability 8.6,
// 8.9 and 12.0 give to one; a 9.0 then holds two or three blocks a multiprocessor.
#pragma once

#include "attention.h"

namespace flash_cosine_sim {

inline constexpr int kMaxSharedBytes = 99 * 1024;

constexpr int element_size(Math math) { return math == Math::kFp32 || math == Math::kTf32 ? 4 : 2; }

// A block of kWarps warps owns kBlockQ queries, a warp 16 * kRowTiles of them, and walks over the keys in blocks of
// kBlockK, two of which are in shared memory: one in use, one on its way.
template <Math kMath, int kHeadDim>
struct ForwardTraits {
  static constexpr int kElementSize = element_size(kMath);
  static constexpr int kRowBytes = kHeadDim * kElementSize;
  // 32 rows a warp use every b twice, which halves the reads of shared memory; their accumulators (O: kHeadDim a
  // lane, scores: kBlockK) must leave room in 255 registers.
  static constexpr bool kWideP = kMath == Math::kFp16WideP;  // takes twice the registers for P
  static constexpr int kRowTiles = kRowBytes <= (kWideP ? 192 : 256) ? 2 : 1;
  // The longest rows are shared by two warps, each with half of the columns of O; both make the scores.
  static constexpr int kWarpsDim = kRowBytes <= 512 ? 1 : 2;
  static constexpr int kOutDim = kHeadDim / kWarpsDim;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockQ = 16 * kRowTiles * kWarps / kWarpsDim;
  static constexpr int kBlockK = kRowBytes > (kWideP ? 256 : 512) ? 16 : kElementSize == 4 || kHeadDim >= 96 ? 32 : 64;
  static constexpr int kSharedBytes = (kBlockQ + 2 * 2 * kBlockK) * kRowBytes;  // K and V, two blocks of each
  // Short rows leave registers for q; longer ones read it from shared memory for every block of keys.
  static constexpr bool kQInRegisters = kElementSize == 2 && kHeadDim <= 64;
  static constexpr int kMinBlocks = 2;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// Few queries and many keys. All warps of a block copy blocks of kBlockKeys keys; warps_with_rows of them have rows of
// their own, kWarpRows each, and the kWarps / warps_with_rows that have the same rows share out a block's keys, kBlockK
// at a time.
template <Math kMath, int kHeadDim>
struct SplitTraits {
  static constexpr int kElementSize = element_size(kMath);
  static constexpr int kRowBytes = kHeadDim * kElementSize;
  // Longer rows spill registers; sm80/forward.cuh takes them.
  static constexpr bool kExists = kRowBytes <= 512;
  // Mostly 32 KiB of keys and values. A block works on one such stage while the next is on its way, and a
  // multiprocessor has two or three blocks: more than the fastest memory needs to be busy.
  static constexpr int kBlockKeys = kRowBytes <= 64 ? 256 : kRowBytes <= 128 ? 128 : kRowBytes <= 256 ? 64 : 32;
  static constexpr int kWarps = kBlockKeys >= 64 ? 4 : kBlockKeys / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockK = kBlockKeys / kWarps;
  static constexpr bool kQInRegisters = kElementSize == 2 && kHeadDim <= 128;
  // Then q's shared memory serves keys as well, and there is room for three blocks of 168 registers a thread: enough
  // for 16 rows a warp, but where P is wide and takes twice as many.
  static constexpr int kMinBlocks = kQInRegisters && kMath != Math::kFp16WideP ? 3 : 2;
  static constexpr int kRowTiles = kElementSize == 4 && kRowBytes <= 128 ? 2 : 1;
  // 16-bit keys become k_hat as fragments, in each warp that multiplies with them; float32's, whose products leave no
  // time and registers for that, in shared memory, once a block.
  static constexpr bool kNormalizesFragments = kElementSize == 2;
  static constexpr int kOutDim = kHeadDim;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kBlockQ = kWarpRows * kWarps;  // at most
  static constexpr int warps_with_rows(int64_t num_rows) {
    int warps = 1;
    while (warps < kWarps && warps * kWarpRows < num_rows) warps *= 2;
    return warps;
  }

  static constexpr int kStageBytes = 2 * kBlockKeys * kRowBytes;
  // A q that goes into registers is first where the second stage will be.
  static constexpr int kTileBytesQ = kBlockQ * kRowBytes;
  static constexpr int kOffsetQ = (kQInRegisters ? 1 : 2) * kStageBytes;
  static constexpr int kSharedBytes = 2 * kStageBytes + (kQInRegisters ? 0 : kTileBytesQ);
  static_assert(!kQInRegisters || kTileBytesQ <= kStageBytes);
  // After the loop, the warps' sums: O and the two row sums behind it. The pitch spreads eight rows over all banks.
  static constexpr int kPitch = kHeadDim + 8;
  static_assert(kWarps * kWarpRows * kPitch * static_cast<int>(sizeof(float)) <= kSharedBytes);
  static_assert(!kExists || kSharedBytes <= kMaxSharedBytes);
  static_assert(!kExists || kMinBlocks * (kSharedBytes + 1024) <= 228 * 1024,
                "what a 9.0 has, which takes 1 KiB a block itself");
};

// A block owns kBlockK keys, each warp 16 * kRowTiles of them, and walks over queries in blocks of kBlockQ. It adds
// up kOutDim columns of dK and dV in registers; where kHeadDim has more, other blocks do the rest.
template <Math kMath, int kHeadDim>
struct BackwardTraits {
  static constexpr int kElementSize = element_size(kMath);
  static constexpr int kRowBytes = kHeadDim * kElementSize;
  static constexpr int kOutDim = kRowBytes >= 512 && kElementSize == 4 ? 64 : kHeadDim <= 128 ? kHeadDim : 128;
  static constexpr int kSlices = kHeadDim / kOutDim;
  static constexpr int kWarps = kRowBytes <= 512 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kElementSize == 2 && kRowBytes <= 128 ? 2 : 1;
  static constexpr int kBlockK = 16 * kRowTiles * kWarps;
  static constexpr int kBlockQ = kRowBytes <= 192 ? 64 : kHeadDim <= 128 && kRowBytes <= 384 ? 32 : 16;
  // Scores are made for so many queries at a time: 2 * kChunkQ * kRowTiles / 2 registers for S and dP.
  static constexpr int kChunkQ = kBlockQ < 32 || (kElementSize == 4 && kHeadDim > 64) ? 16 : 32;
  static constexpr int kStages = kElementSize == 4 && kHeadDim >= 96 ? 1 : 2;
  // The warps share out dQ, kBlockQ x kOutDim: so many along the queries, the others along the head dim.
  static constexpr int kWarpsQ = kBlockQ / 16 < kWarps ? kBlockQ / 16 : kWarps;
  static constexpr int kWarpsDim = kWarps / kWarpsQ;
  static constexpr int kDimPerWarp = kOutDim / kWarpsDim;

  static constexpr int kTileBytesK = kBlockK * kRowBytes;
  static constexpr int kTileBytesQ = kBlockQ * kRowBytes;
  static constexpr int kRowBytesDS = kBlockQ * kElementSize;
  static constexpr int kOffsetQ = 2 * kTileBytesK;                        // after K and V
  static constexpr int kOffsetDS = kOffsetQ + 2 * kStages * kTileBytesQ;  // after Q and dO
  static constexpr int kOffsetRows = kOffsetDS + kBlockK * kRowBytesDS;   // row statistics, two stages
  static constexpr int kLoopBytes = kOffsetRows + 2 * 2 * kBlockQ * static_cast<int>(sizeof(float));
  // After the loop the same memory holds dV, then dK, as float32.
  static constexpr int kPitch = kHeadDim + 4;
  static constexpr int kEpilogueBytes = kSlices == 1 ? kBlockK * kPitch * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kSharedBytes = kLoopBytes > kEpilogueBytes ? kLoopBytes : kEpilogueBytes;
  static constexpr int kMinBlocks = 2;
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(kWarpsQ * 16 == kBlockQ && kDimPerWarp % 16 == 0);
};

// A block owns kBlockQ x kBlockK elements of dbias, a warp 16 rows of them, and walks over what it is broadcast along.
template <Math kMath, int kHeadDim>
struct BiasGradientTraits {
  static constexpr int kRowBytes = kHeadDim * element_size(kMath);
  static constexpr int kWarps = kRowBytes <= 512 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockQ = 16 * kWarps;
  // Three accumulators of 4 * kBlockK / 8 registers: S, dP and the sum of dS.
  static constexpr int kBlockK = kRowBytes <= 512 ? 32 : 16;
  static constexpr int kSharedBytes = 2 * (kBlockQ + kBlockK) * kRowBytes;
  static constexpr int kMinBlocks = 2;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

}  // namespace flash_cosine_sim
