// Forward, mma.sync:   P = 2^(q_hat k_hat^T + log2(e) bias),  O = P V / rowsum(P).
//
//                 kBlockK keys
//              +---------------+        A block owns kBlockQ queries of one head; warp w owns rows
//   kBlockQ    |  S, P  (regs) |        [w * kRowsPerWarp, ...) of them, alone: no warp waits for another but for
//   queries    |               |        the next block of keys to arrive, once per block.
//              +---------------+
//
// With bounded scores P needs no row maximum, so nothing is ever rescaled: a slice of keys (16; TF32: 8; float32: all
// of the block) goes from scores to P to the product with V on its own, and the row sums are reduced across lanes
// once, at the end.
//
// There are two sums of a row. O is divided by that of P as rounded for the product with V: in 16 bits a row that
// attends to one key then gives that key's value exactly, as it does where the row maximum makes P = 1. The backward
// pass, whose P is not rounded, needs that of P itself.
#pragma once

#include "launch.h"
#include "sm80/forward_warp.cuh"
#include "sm80/tiles/forward.h"

namespace flash_cosine_sim {

template <Math kMath, int kHeadDim, bool kEightWarps>
__global__ void __launch_bounds__(ForwardTraits<kMath, kHeadDim, kEightWarps>::kThreads,
                                  ForwardTraits<kMath, kHeadDim, kEightWarps>::kMinBlocks)
    forward_sm80_kernel(const __grid_constant__ ForwardParams params, int num_blocks_q, int heads_per_section) {
  using F = Forward<kMath, ForwardTraits<kMath, kHeadDim, kEightWarps>>;
  constexpr int kBlockK = F::kBlockK, kRowBytes = F::kRowBytes, kStageBytes = 2 * kBlockK * kRowBytes;
  extern __shared__ __align__(128) char shared[];
  const uint32_t tile_q = shared_address(shared), stages = tile_q + F::kBlockQ * kRowBytes;
  auto work = F::find_work(params, blockIdx.x, num_blocks_q, heads_per_section);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int row = warp / F::Traits::kWarpsDim * 16 * F::kRowTiles;  // the warp's first
  const int column = warp % F::Traits::kWarpsDim * F::kOutDim;      // and of its columns of O
  const int first_query = work.first_query + row;
  const Range blocks = blocks_of(keys_of_rows(params, work.first_query, F::kBlockQ).any, kBlockK);
  const int first_block = next_visible_block<kBlockK>(params, work.batch, blocks.first, blocks.end);

  load_tile<F::kBlockQ, kRowBytes, F::Traits::kThreads>(
      tile_q, F::rows_of(params.q_hat, work.batch, work.head, work.first_query),
      params.q_hat.stride_row * sizeof(typename F::T), params.seq_len_q - work.first_query,
      params.head_dim * static_cast<int>(sizeof(typename F::T)));
  if (first_block < blocks.end) F::load_keys(params, work, stages, first_block * kBlockK);

  typename F::Output o = {};
  typename F::RowSums sums;
  typename F::QFragments q;

  int stage = 0;
  for (int block = first_block, next; block < blocks.end; block = next) {
    const uint32_t tile_k = stages + stage * kStageBytes;
    const int first_key = block * kBlockK;
    next = next_visible_block<kBlockK>(params, work.batch, block + 1, blocks.end);
    stage ^= 1;
    // This block has arrived for all threads, and all are through with the one before, whose memory is next.
    cp_async_wait_all();
    __syncthreads();
    if (next < blocks.end) F::load_keys(params, work, stages + stage * kStageBytes, next * kBlockK);
    if (sizeof(typename F::T) == 2 && params.plan.k_norm == Norm::kKernel) {
      if (block == first_block)
        F::template normalize_tile<F::kBlockQ>(shared, params.head_dim, scale_log2(params, work.head));
      F::template normalize_tile<kBlockK>(shared + (tile_k - tile_q), params.head_dim, 1.f);
      __syncthreads();
    }
    if constexpr (F::Traits::kQInRegisters) {
      if (block == first_block) {
#pragma unroll
        for (int m = 0; m < F::kRowTiles; ++m) {
#pragma unroll
          for (int step = 0; step < F::kSteps; ++step) load_a<kRowBytes>(q[m][step], tile_q, row + 16 * m, step);
        }
      }
    }
    const Band band = keys_of_rows(params, first_query, 16 * F::kRowTiles);
    if (!band.sees_any(first_key, first_key + kBlockK)) continue;
    uint64_t visible = kAllKeys<kBlockK>;
    if (params.mask.data != nullptr) visible = visible_keys<kBlockK>(params, work.batch, first_key);
    typename F::Scores scores = {};
    F::multiply_qk(scores, q, tile_q, tile_k, row);
    const bool plain = !is_finished_later(params) && visible == kAllKeys<kBlockK>;
    if (!plain || !band.sees_all(first_key, first_key + kBlockK)) {
      F::finish_scores(params, work, scores, first_query, first_key, visible);
    }
    // Whole 128 bytes of columns, which do not take part in the swizzle.
    static_assert(F::Traits::kWarpsDim == 1 || F::kOutDim * sizeof(typename F::T) % 128 == 0);
    F::multiply_pv(o, sums, scores, tile_k + kBlockK * kRowBytes + column * static_cast<int>(sizeof(typename F::T)));
  }
  cp_async_wait_all();  // without any key q may still be on its way into the memory that o goes through

  F::reduce(sums);
  // In float32 found anew, or it would occupy registers through the loop.
  if constexpr (sizeof(typename F::T) == 4) {
    work = F::find_work(params, opaque(static_cast<int>(blockIdx.x)), num_blocks_q, heads_per_section);
  }
  if (params.o.data == nullptr) {
    F::write_partials(params, work, o, sums, row, column);
  } else {
    if (first_block == blocks.end) __syncthreads();  // other threads' copies of q
    F::write_output(params, work, o, sums, tile_q, shared, row, column);
  }
}

template <Math kMath, int kHeadDim, bool kEightWarps>
void launch_forward_sm80(const ForwardParams& params, cudaStream_t stream) {
  using Traits = ForwardTraits<kMath, kHeadDim, kEightWarps>;
  constexpr int64_t kSectionBytes = 16 << 20;  // of keys and values, which the L2 caches of large GPUs hold
  const int num_blocks_q = (params.seq_len_q + Traits::kBlockQ - 1) / Traits::kBlockQ;
  const int64_t num_heads = int64_t(params.batch) * params.num_heads;
  const int64_t bytes_per_head = 2 * int64_t(params.seq_len_k) * Traits::kRowBytes + 1;
  const int heads_per_section = static_cast<int>(kSectionBytes / bytes_per_head) + 1;
  allow_shared_memory<forward_sm80_kernel<kMath, kHeadDim, kEightWarps>, Traits::kSharedBytes>();
  const auto num_blocks = static_cast<unsigned>(num_blocks_q * num_heads);
  forward_sm80_kernel<kMath, kHeadDim, kEightWarps>
      <<<num_blocks, Traits::kThreads, Traits::kSharedBytes, stream>>>(params, num_blocks_q, heads_per_section);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_cosine_sim
