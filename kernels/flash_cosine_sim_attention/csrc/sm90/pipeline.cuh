// How the producer and the consumers of sm90/forward.cuh and sm90/backward.cuh hand memory to each other.
#pragma once

#include "common/ptx.cuh"

namespace flash_cosine_sim {

// A place in the ring of stages, and the parity of its barriers' current phase.
template <int kStages>
struct RingStage {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    ++index;
    if (index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }

  __device__ __forceinline__ RingStage previous() const {
    const int before = kStages == 2 ? index ^ 1 : index == 0 ? kStages - 1 : index - 1;
    return {before, index == 0 ? parity ^ 1 : parity};
  }
};

// Starts to copy rows of a head, from `row` on, to a tile: panels of kPanelDim columns, each of kRows rows. Their bytes
// count towards the barrier's phase.
template <int kRows, int kPanelDim, int kPanels>
__device__ __forceinline__ void load_panels(const void* tensor_map, uint32_t tile, uint32_t full, int row, int head,
                                            int batch) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    tma_load_4d(tile + panel * kRows * 2 * kPanelDim, tensor_map, full, panel * kPanelDim, row, head, batch);
  }
}

// Tells the producer that the warp is through with what an "empty" barrier guards.
__device__ __forceinline__ void release(uint32_t empty) {
  if ((threadIdx.x & 31) == 0) mbarrier_arrive(empty);
}

// The four integers that say what a tile is, the same in all lanes and known to be: what depends on them, such as the
// number of blocks, is computed once a warp.
//
// Lane 0 alone reads, as it is the one that will arrive at the "empty" barrier. What other lanes read would be ordered
// before the next write by way of __syncwarp, too, but compute-sanitizer's racecheck follows only who arrives.
__device__ __forceinline__ void read_work(int (&work)[4], uint32_t address) {
#pragma unroll
  for (int& x : work) x = 0;
  if ((threadIdx.x & 31) == 0) load_shared_v4_s32(work, address);
#pragma unroll
  for (int& x : work) x = __shfl_sync(0xffffffffu, x, 0);
}

}  // namespace flash_cosine_sim
