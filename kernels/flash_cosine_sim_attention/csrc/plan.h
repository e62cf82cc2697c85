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
};

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
