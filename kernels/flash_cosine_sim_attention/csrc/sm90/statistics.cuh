// A query's -delta and -row_sum_log2 as columns of matrices, so that the products of sm90/backward.cuh subtract them.
// Reading them as numbers would be the largest part of what that kernel reads of shared memory.
//
// dP - delta = [V | f] [dO | d]^T,  S - row_sum_log2 = [k_hat | f] [q_hat | r]^T, with 8 more columns each:
//   d: -delta as three numbers of 16 bits, 0 ...           f: three factors, what hides the key or 0, 0 ...
//   r: -row_sum_log2 as three numbers, 1, 0 ...
// In shared memory, for 8 queries each, 8 rows of d and then 8 of r: the core matrices of wgmma without a swizzle.
#pragma once

#include "common/math.cuh"
#include "common/ptx.cuh"
#include "sm90/tiles/backward.h"

namespace flash_cosine_sim {

template <typename T>
struct RowStatistics {
  // The first factor extends float16's range beyond any sum that is to be finite, the third its precision.
  static __device__ __forceinline__ constexpr float factor(int i) {
    return !__is_same(T, __half) || i == 1 ? 1.f : i == 0 ? 0x1p12f : 0x1p-12f;
  }
  // Added to a score: 2 to the sum is 0. Finite, for it is multiplied by zeros, too.
  static constexpr float kHidden = __is_same(T, __half) ? -65504.f : -0x1p100f;
  static constexpr float kLargest = __is_same(T, __half) ? 65504.f * 0x1p12f : 0x1p127f;

  // The words of a row of f.
  static __device__ __forceinline__ void factors(int (&words)[4], bool visible) {
    words[0] = pack<T>(factor(0), factor(1));
    words[1] = pack<T>(factor(2), visible ? 0.f : kHidden);
    words[2] = words[3] = 0;
  }

  // The words of a row of d or r. Each number has what the ones before left.
  static __device__ __forceinline__ void split(int (&words)[4], float x, float last) {
    x = x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
    float parts[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      parts[i] = unpack<T>(pack<T>(x * (1.f / factor(i)), 0.f)).x;
      x -= parts[i] * factor(i);
    }
    words[0] = pack<T>(parts[0], parts[1]);
    words[1] = pack<T>(parts[2], last);
    words[2] = words[3] = 0;
  }

  // row_sum_log2 is -inf in an empty row, which no key is to see.
  static __device__ __forceinline__ float subtracted(float row_sum_log2) {
    return row_sum_log2 == -INFINITY ? kHidden : -row_sum_log2;
  }

  // Both rows of a query, at the address of its block's matrices.
  static __device__ __forceinline__ void store(uint32_t matrices, int query, float delta, float row_sum_log2) {
    int d[4], r[4];
    split(d, -delta, 0.f);
    split(r, subtracted(row_sum_log2), 1.f);
    const uint32_t address = matrices + query / 8 * (8 * kRowStatisticsBytes) + query % 8 * 16;
    store_shared_v4_s32(address, d);
    store_shared_v4_s32(address + 128, r);
  }
};

}  // namespace flash_cosine_sim
