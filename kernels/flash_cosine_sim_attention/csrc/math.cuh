// What differs between dtypes: the element, the tensor core instruction, and how fragments are formed.
//
// A fragment's contraction always spans 32 bytes: 16 elements of 16 bits or 8 of float32. So whatever lies in
// memory with its contraction contiguous is loaded alike for all dtypes (tile.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention.h"
#include "ptx.cuh"

namespace flash_cosine_sim {

template <Math kMath>
struct MathTraits {
  using T = float;
};
template <>
struct MathTraits<Math::kBf16> {
  using T = __nv_bfloat16;
};
template <>
struct MathTraits<Math::kFp16> {
  using T = __half;
};
template <>
struct MathTraits<Math::kFp16WideP> {
  using T = __half;
};

template <Math kMath>
using Element = typename MathTraits<kMath>::T;

// Elements of the contraction that one fragment covers.
template <Math kMath>
inline constexpr int kContraction = 32 / sizeof(Element<kMath>);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (__is_same(T, __half)) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two 16-bit elements in a register, x in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  static_assert(sizeof(T) == 2);
  if constexpr (__is_same(T, __half)) {
    const __half2 packed = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(packed);
  } else {
    const __nv_bfloat162 packed = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(packed);
  }
}

// x = high + low, where high has TF32's 11 significant bits and low the next 12 or so. Truncating instead of
// rounding costs an instruction less and is exact all the same: the products' error is that of low, 2^-22.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& high, uint32_t& low) {
  high = x & 0xffffe000u;
  low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}

// d += a b.
template <Math kMath>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kMath == Math::kBf16) {
    mma_m16n8k16_bf16(d, a, b0, b1);
  } else if constexpr (kMath == Math::kFp16 || kMath == Math::kFp16WideP) {
    mma_m16n8k16_f16(d, a, b0, b1);
  } else if constexpr (kMath == Math::kTf32) {
    uint32_t rounded[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[i] = cvt_rna_tf32(__uint_as_float(a[i]));
    mma_m16n8k8_tf32(d, rounded, cvt_rna_tf32(__uint_as_float(b0)), cvt_rna_tf32(__uint_as_float(b1)));
  } else {
    // (a_high + a_low) (b_high + b_low) without low * low, the small terms first.
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(a[i], a_high[i], a_low[i]);
    split_tf32(b0, b_high[0], b_low[0]);
    split_tf32(b1, b_high[1], b_low[1]);
    mma_m16n8k8_tf32(d, a_low, b_high[0], b_high[1]);
    mma_m16n8k8_tf32(d, a_high, b_low[0], b_low[1]);
    mma_m16n8k8_tf32(d, a_high, b_high[0], b_high[1]);
  }
}

// Turns accumulators (16 rows x 8 * kBlocks columns) into a's of a product that contracts over their columns,
// in registers alone. In float32 a lane's columns 2t and 2t + 1 take the places t and t + 4 of the contraction;
// load_b_transposed in tile.cuh orders b alike.
template <Math kMath, int kBlocks>
__device__ __forceinline__ void accumulator_to_a(uint32_t (&a)[4], const float (&c)[kBlocks][4], int step) {
  if constexpr (sizeof(Element<kMath>) == 2) {
    a[0] = pack<Element<kMath>>(c[2 * step][0], c[2 * step][1]);
    a[1] = pack<Element<kMath>>(c[2 * step][2], c[2 * step][3]);
    a[2] = pack<Element<kMath>>(c[2 * step + 1][0], c[2 * step + 1][1]);
    a[3] = pack<Element<kMath>>(c[2 * step + 1][2], c[2 * step + 1][3]);
  } else {
    a[0] = __float_as_uint(c[step][0]);
    a[1] = __float_as_uint(c[step][2]);
    a[2] = __float_as_uint(c[step][1]);
    a[3] = __float_as_uint(c[step][3]);
  }
}

}  // namespace flash_cosine_sim
