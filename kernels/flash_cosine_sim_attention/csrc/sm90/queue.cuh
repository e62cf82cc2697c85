// How the blocks of sm90/forward.cuh and sm90/backward.cuh share out tiles, and the chunks of rows that their idle
// warps prepare ahead of the tiles: by counters in global memory, which begin as zeros.
//
// A producer waits for chunks, and no wait is endless, even if the GPU does not run all blocks at a time. A chunk that
// has been taken was taken by a running warp. An untaken chunk is taken by the idle warps of the waiting block itself,
// which take chunks until none is left.
#pragma once

#include "common/ptx.cuh"

namespace flash_cosine_sim {

// Takes the next item. The answer, which takes a microsecond, is lane 0's alone.
__device__ __forceinline__ unsigned ask_in_lane_0(uint32_t* num_taken) {
  if ((threadIdx.x & 31) != 0) return 0;
  return atomic_increment(num_taken);
}

// Adds to a counter; who acquires that sees what the warp has written.
__device__ __forceinline__ void publish(uint32_t* num_done, unsigned count) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) red_add_release(num_done, count);
}

// Until so many are published. What other threads have written to global memory, TMA may then read or add to, here and
// in the block's consumers.
__device__ __forceinline__ void await_published(const uint32_t* num_done, uint32_t count) {
  while (load_acquire(num_done) < count) __nanosleep(64);
  fence_proxy_async_global();
}

}  // namespace flash_cosine_sim
