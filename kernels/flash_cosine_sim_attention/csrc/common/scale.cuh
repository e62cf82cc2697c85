// The scale of a head. One on the device may be any number, since reading it would wait for the GPU; it counts as no
// further from zero than scale_value, which bounds the logits. NaN stays.
#pragma once

#include "attention.h"

namespace flash_cosine_sim {

__device__ __forceinline__ float bounded_scale(const float* scale, int64_t stride, float scale_value, int64_t head) {
  if (scale == nullptr) return scale_value;
  const float x = scale[head * stride];
  return fabsf(x) > scale_value ? copysignf(scale_value, x) : x;
}

__device__ __forceinline__ float bounded_scale(const Attention& params, int64_t head) {
  return bounded_scale(params.scale, params.scale_stride, params.scale_value, head);
}

}  // namespace flash_cosine_sim
