// Which kernel runs, with how many splits and how much workspace: decided by sizes, options and the GPU alone.
//
// Plain C++ without CUDA, for tests to compile anywhere. plan_forward and plan_backward read what attention.h says of
// their namesakes.
#pragma once

#include "attention.h"

namespace flash_cosine_sim {

struct Gpu {
  int num_multiprocessors = 0;
  bool runs_sm90 = false;  // compute capability 9.0, and the library has the kernels of sm90/
  // What the blocks on a multiprocessor share. Here a 9.0's.
  int shared_bytes = 228 * 1024;
  int threads = 2048;
};

// How many blocks of a kernel a multiprocessor holds at a time, at least one: by threads, shared memory and registers,
// of which every GPU from 8.0 on has 65,536. A kernel's launch bounds leave it no more than a min_blocks-th of them, so
// they allow min_blocks blocks; that fewer are used, and more blocks fit, is left out.
int blocks_held(const Gpu& gpu, int threads, int shared_bytes, int min_blocks);

// Whether the portable kernels, where they are taken, run with blocks of eight warps: where a multiprocessor's shared
// memory holds a single one of four, a warp for each of its schedulers, and the larger block.
bool takes_eight_warps(const ForwardParams& params, const Gpu& gpu);
bool takes_eight_warps(const BackwardParams& params, const Gpu& gpu);

ForwardPlan plan_forward(const ForwardParams& params, const Gpu& gpu);
BackwardPlan plan_backward(const BackwardParams& params, const Gpu& gpu);

// The smallest head dim with a portable kernel that holds head_dim. Throws std::runtime_error if there is none.
int padded_head_dim(int head_dim);

// How the kernels multiply, which the dtype, allow_tf32 and, forward, the largest logit decide.
Math math_of(const Attention& params);
Math forward_math_of(const Attention& params);

// Whether launch_backward_* has something to do.
bool needs_main_kernel(const BackwardParams& params);

}  // namespace flash_cosine_sim
