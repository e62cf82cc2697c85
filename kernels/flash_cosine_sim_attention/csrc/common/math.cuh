// What differs between dtypes: the element, the tensor core instructions, and how fragments are formed.
//
// A fragment's contraction always spans 32 bytes: 16 elements of 16 bits or 8 of float32. So whatever lies in
// memory with its contraction contiguous is loaded alike for all dtypes (tile.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention.h"
#include "common/ptx.cuh"

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

// x = high + low, where high is x rounded to TF32's 11 significant bits and low, of either sign, the rest, of which
// the tensor core takes 11 bits more. Truncating instead would save an instruction, but leave low * low, which is
// not computed, four times as large and of one sign: 2 to 4 times the error.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& high, uint32_t& low) {
  high = (x + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}

// d += a b for everything but Math::kFp32, which takes three products in an order of its own: see multiply.
template <Math kMath>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kMath != Math::kFp32);
  if constexpr (kMath == Math::kBf16) {
    mma_m16n8k16_bf16(d, a, b0, b1);
  } else if constexpr (kMath == Math::kFp16 || kMath == Math::kFp16WideP) {
    mma_m16n8k16_f16(d, a, b0, b1);
  } else {
    uint32_t rounded[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[i] = cvt_rna_tf32(__uint_as_float(a[i]));
    mma_m16n8k8_tf32(d, rounded, cvt_rna_tf32(__uint_as_float(b0)), cvt_rna_tf32(__uint_as_float(b1)));
  }
}

// How many steps multiply_fp32 takes at once, at most.
inline constexpr int kStepsFp32 = 4;

// The same to float32's accuracy: (a_high + a_low) (b_high + b_low) without low * low.
//
// A tensor core truncates its sums, so errors of one sign pile up with the number of products added to a large sum.
// kGroup steps at a time are therefore added up from zero, the small products first, and join d by an addition that
// rounds.
template <int kSteps, int kGroup, int kRowTiles, int kBlocks, typename LoadA, typename LoadB>
__device__ __forceinline__ void multiply_fp32(float (&d)[kRowTiles][kBlocks][4], LoadA load_a, LoadB load_b) {
  static_assert(kSteps % kGroup == 0);
#pragma unroll(kSteps > 4 ? 1 : kSteps / kGroup)
  for (int first = 0; first < kSteps; first += kGroup) {
    uint32_t a[kGroup][kRowTiles][4];
#pragma unroll
    for (int step = 0; step < kGroup; ++step) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_a(a[step][m], m, first + step);
    }
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t b[kGroup][4];
#pragma unroll
      for (int step = 0; step < kGroup; ++step) load_b(b[step], n, first + step);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum[kRowTiles][4] = {};
#pragma unroll
        for (int large = 0; large < 2; ++large) {
#pragma unroll
          for (int step = 0; step < kGroup; ++step) {
            uint32_t b_high[2], b_low[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) split_tf32(b[step][2 * half + i], b_high[i], b_low[i]);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
              uint32_t a_high[4], a_low[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) split_tf32(a[step][m][i], a_high[i], a_low[i]);
              if (large) {
                mma_m16n8k8_tf32(sum[m], a_high, b_high[0], b_high[1]);
              } else {
                mma_m16n8k8_tf32(sum[m], a_low, b_high[0], b_high[1]);
                mma_m16n8k8_tf32(sum[m], a_high, b_low[0], b_low[1]);
              }
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) d[m][n + half][i] += sum[m][i];
        }
      }
    }
  }
}

// d[m][n] += sum over steps of a[m] b[n], for kRowTiles x kBlocks fragments. load_a(a, m, step) gives an a,
// load_b(b, n, step) the b's of blocks n and n + 1. kUnroll limits how many steps' loads are in registers at a time,
// and in float32 how many steps are added up before they are rounded.
template <Math kMath, int kSteps, int kUnroll, int kRowTiles, int kBlocks, typename LoadA, typename LoadB>
__device__ __forceinline__ void multiply(float (&d)[kRowTiles][kBlocks][4], LoadA load_a, LoadB load_b) {
  if constexpr (kMath != Math::kFp32) {
#pragma unroll kUnroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_a(a[m], m, step);
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        uint32_t b[4];
        load_b(b, n, step);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma<kMath>(d[m][n], a[m], b[0], b[1]);
          mma<kMath>(d[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  } else {
    multiply_fp32<kSteps, (kUnroll < kStepsFp32 ? kUnroll : kStepsFp32)>(d, load_a, load_b);
  }
}

// The two elements that pack put together.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  if constexpr (__is_same(T, __half)) {
    return __half22float2(reinterpret_cast<const __half2&>(packed));
  } else {
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
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
