// How the blocks of sm90/forward.cuh and sm90/backward.cuh share out the chunks of rows that their idle warps prepare
// ahead of the tiles: by counters in global memory, which begin as zeros.
//
// A producer waits for chunks, and no wait is endless, even if the GPU does not run all blocks at a time. A chunk that
// has been taken was taken by a running warp. An untaken chunk is taken by the idle warps of the waiting block itself,
// which take chunks until none is left.
#pragma once

#include "common/ptx.cuh"

namespace flash_cosine_sim {

// Takes the next chunk. The answer, which takes a microsecond, is lane 0's alone.
//
// Counters are places in params.counters, here and below: an address made before the branch would be two registers
// more.
template <typename Params>
__device__ __forceinline__ unsigned ask_for_chunk(const Params& params, unsigned chunks_taken) {
  if ((threadIdx.x & 31) != 0) return 0;
  return atomic_increment(params.counters + chunks_taken);
}

// Adds to a counter; who acquires that sees what the warp has written.
template <typename Params>
__device__ __forceinline__ void publish(const Params& params, unsigned counter, unsigned count) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) red_add_release(params.counters + counter, count);
}

}  // namespace flash_cosine_sim
