// Rows of head_dim channels in the registers of a warp: reading, writing, normalising, and taking the gradient of
// x^ = x / |x| back to x. The arithmetic is that of reference.py, `_unit_groups` and `_unnormalised_grad`.
//
// For kernels outside normalize.cu and postprocess.cu, `project_rows` is the interface. Blocks are one-dimensional,
// with whole warps, and all lanes of a warp call every function here together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "attention.h"
#include "common/math.cuh"

namespace flash_cosine_sim {
namespace rows {

inline constexpr unsigned kWholeWarp = 0xffffffffu;

// 16 bytes in global memory; several at a time where float32 stands beside narrower data.
template <int kChannels>
__device__ inline void load_channels(float* values, const float* source) {
#pragma unroll
  for (int i = 0; i < kChannels; i += 4) {
    const float4 vector = *reinterpret_cast<const float4*>(source + i);
    values[i] = vector.x;
    values[i + 1] = vector.y;
    values[i + 2] = vector.z;
    values[i + 3] = vector.w;
  }
}

template <int kChannels>
__device__ inline void load_channels(float* values, const __half* source) {
  static_assert(kChannels == 8);
  const uint4 vector = *reinterpret_cast<const uint4*>(source);
  const __half2* pairs = reinterpret_cast<const __half2*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <int kChannels>
__device__ inline void load_channels(float* values, const __nv_bfloat16* source) {
  static_assert(kChannels == 8);
  const uint4 vector = *reinterpret_cast<const uint4*>(source);
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

template <int kChannels>
__device__ inline void store_channels(float* target, const float* values) {
#pragma unroll
  for (int i = 0; i < kChannels; i += 4) {
    *reinterpret_cast<float4*>(target + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
  }
}

template <int kChannels>
__device__ inline void store_channels(__half* target, const float* values) {
  static_assert(kChannels == 8);
  uint4 vector;
  __half2* pairs = reinterpret_cast<__half2*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  }
  *reinterpret_cast<uint4*>(target) = vector;
}

template <int kChannels>
__device__ inline void store_channels(__nv_bfloat16* target, const float* values) {
  static_assert(kChannels == 8);
  uint4 vector;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  }
  *reinterpret_cast<uint4*>(target) = vector;
}

// The smallest power of two of lanes that hold `count` channels at `per_lane` each, as its logarithm.
__host__ __device__ constexpr int log2_lanes(int count, int per_lane) {
  int log2 = 0;
  while ((per_lane << log2) < count) {
    ++log2;
  }
  return log2;
}

// How a warp holds rows: neighbouring lanes share one, each with a slice of up to two vectors of 16 bytes of T.
// Two loads per tensor in flight saturate the memory, and the widest rows (256 of float32) just fit a warp.
template <typename T>
struct RowLanes {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kSlice = 2 * kVector;
  using Slice = float[kSlice];

  int head_dim;
  int log2;  // of the number of lanes per row
  int lane;  // among them

  __device__ explicit RowLanes(int head_dim)
      : head_dim(head_dim), log2(log2_lanes(head_dim, kSlice)), lane(threadIdx.x & ((1 << log2) - 1)) {}

  __device__ int lanes() const { return 1 << log2; }
  __device__ int rows_per_warp() const { return 32 >> log2; }
  __device__ int row_in_warp() const { return static_cast<int>(threadIdx.x & 31) >> log2; }

  // The slice is zero beyond head_dim and where the row is not `active`: that adds nothing to any sum.
  template <typename Source>
  __device__ void load(Slice& slice, const Source* row, bool active) const {
#pragma unroll
    for (int vector = 0; vector < 2; ++vector) {
      const int channel = first_channel(vector);
      if (active && channel < head_dim) {
        load_channels<kVector>(slice + vector * kVector, row + channel);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          slice[vector * kVector + i] = 0.f;
        }
      }
    }
  }

  template <typename Target>
  __device__ void store(Target* row, const Slice& slice, bool active) const {
#pragma unroll
    for (int vector = 0; vector < 2; ++vector) {
      const int channel = first_channel(vector);
      if (active && channel < head_dim) {
        store_channels<kVector>(row + channel, slice + vector * kVector);
      }
    }
  }

  // Calls body(index of the slice's element, its channel) for the first of each vector.
  template <typename Body>
  __device__ void for_each_vector(Body body) const {
#pragma unroll
    for (int vector = 0; vector < 2; ++vector) {
      body(vector * kVector, first_channel(vector));
    }
  }

 private:
  __device__ int first_channel(int vector) const { return (lane + (vector << log2)) * kVector; }
};

// Every lane gets the same bits: each step adds the same two numbers on both sides.
__device__ inline float sum_over_lanes(float value, int lanes, unsigned mask = kWholeWarp) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(mask, value, offset);
  }
  return value;
}

template <int kCount>
__device__ inline float dot_over_lanes(const float (&x)[kCount], const float (&y)[kCount], int lanes,
                                       unsigned mask = kWholeWarp) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sum = fmaf(x[i], y[i], sum);
  }
  return sum_over_lanes(sum, lanes, mask);
}

// |x| = largest / inverse: two factors, as |x| or 1 / |x| alone may leave float32.
struct Norm {
  float inverse, largest;
};

// Sums of squares between these bounds: no square that matters has overflowed or lost bits to underflow.
inline constexpr float kSmallestSafe = 1e-30f, kLargestSafe = 1e30f;

// x becomes x / |x|, where |x| runs over `lanes` neighbouring lanes (an aligned power of two of them).
template <int kCount>
__device__ inline Norm normalize(float (&x)[kCount], int lanes) {
  const float direct_square_sum = dot_over_lanes(x, x, lanes);
  Norm norm{__frsqrt_rn(direct_square_sum), 1.f};
  if (direct_square_sum > kSmallestSafe && direct_square_sum < kLargestSafe) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] *= norm.inverse;
    }
    return norm;
  }
  // Only some of a warp's rows may come here, each with all of its lanes.
  const unsigned mask = (kWholeWarp >> (32 - lanes)) << (threadIdx.x & 31 & ~(lanes - 1));
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    largest = fmaxf(largest, fabsf(x[i]));
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(mask, largest, offset));
  }
  // A zero vector divided by infinity stays zero, and so does its gradient. A NaN, which fmaxf passes over, and an
  // infinity make the whole vector NaN through square_sum.
  norm.largest = largest == 0.f ? INFINITY : largest;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] /= norm.largest;
  }
  const float square_sum = dot_over_lanes(x, x, lanes, mask);
  norm.inverse = __frsqrt_rn(square_sum == 0.f ? 1.f : square_sum);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] *= norm.inverse;
  }
  return norm;
}

// The same to float32's last bits for x of 16 bits, without a subroutine or a branch that only some lanes take: beside
// wgmma, either would take what a warp knows to be common to its lanes out of the uniform registers.
// Returns 1 / |x| as two factors; 0 if x is.
template <typename T, int kCount>
__device__ __forceinline__ float2 normalize_together(float (&x)[kCount], int lanes) {
  float square_sum = dot_over_lanes(x, x, lanes), factor = 1.f;
  if constexpr (__is_same(T, __nv_bfloat16)) {  // float16's squares are safe
    const bool too_small = square_sum <= kSmallestSafe, too_large = square_sum >= kLargestSafe;
    if (__any_sync(kWholeWarp, too_small || too_large)) {
      factor = too_small ? 0x1p100f : too_large ? 0x1p-70f : 1.f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[i] *= factor;
      }
      square_sum = dot_over_lanes(x, x, lanes);
    }
  }
  const float inverse = square_sum == 0.f ? 0.f : rsqrtf(square_sum);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] *= inverse;
  }
  return make_float2(inverse, factor);
}

// A lane's share of a row of 16-bit elements as it lies in memory: two vectors of 16 bytes, as RowLanes cuts a row, in
// half the registers of a Slice.
using PackedSlice = uint32_t[8];

template <typename T>
__device__ __forceinline__ float dot_over_lanes(const PackedSlice& x, const PackedSlice& y, int lanes) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 pair_x = unpack<T>(x[i]), pair_y = unpack<T>(y[i]);
    sum = fmaf(pair_x.y, pair_y.y, fmaf(pair_x.x, pair_y.x, sum));
  }
  return sum_over_lanes(sum, lanes);
}

// x a b, rounded as float32 after each factor.
template <typename T>
__device__ __forceinline__ void scale(PackedSlice& x, float a, float b) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 pair = unpack<T>(x[i]);
    x[i] = pack<T>(pair.x * a * b, pair.y * a * b);
  }
}

// The same in T's own arithmetic, for a power of two that T has.
template <typename T>
__device__ __forceinline__ void multiply_packed(PackedSlice& x, float power_of_two) {
  using Pair = std::conditional_t<__is_same(T, __half), __half2, __nv_bfloat162>;
  const uint32_t factors = pack<T>(power_of_two, power_of_two);
#pragma unroll
  for (uint32_t& pair : x) {
    const Pair product = __hmul2(reinterpret_cast<const Pair&>(pair), reinterpret_cast<const Pair&>(factors));
    pair = reinterpret_cast<const uint32_t&>(product);
  }
}

// 1 / sqrt(x) to within a hair of half a unit in the last place, so it hardly ever differs from __frsqrt_rn, which
// branches.
__device__ __forceinline__ float rsqrt_refined(float x) {
  const float y = rsqrtf(x);
  const float square = y * y;
  const float residual = fmaf(-x, fmaf(y, y, -square), fmaf(-x, square, 1.f));
  return fmaf(0.5f * y, residual, y);
}

// Like normalize_together, but to the bits of normalize: where no square sum is out of range, and all but always. The
// result is multiplied by a factor.
template <typename T>
__device__ __forceinline__ void normalize_packed(PackedSlice& x, int lanes, float result_factor = 1.f) {
  constexpr float kEnlarge = __is_same(T, __nv_bfloat16) ? 0x1p100f : 0x1p10f, kReduce = 0x1p-70f;
  float square_sum = dot_over_lanes<T>(x, x, lanes);
  const float factor = square_sum <= kSmallestSafe ? kEnlarge : square_sum >= kLargestSafe ? kReduce : 1.f;
  // float16 comes here with zeros only. But for the branch, the compiler would unpack x once, into 16 registers more.
  if (__any_sync(kWholeWarp, factor != 1.f)) {
    multiply_packed<T>(x, factor);
    square_sum = dot_over_lanes<T>(x, x, lanes);
  }
  scale<T>(x, square_sum == 0.f ? 0.f : rsqrt_refined(square_sum), result_factor);
}

// x becomes x^ = x / |x|; gradient, the one of x^, becomes that of x: (dx^ - x^ (x^.dx^)) / |x|.
template <int kCount>
__device__ inline void project(float (&x)[kCount], float (&gradient)[kCount], int lanes) {
  const Norm norm = normalize(x, lanes);
  const float dot = dot_over_lanes(x, gradient, lanes);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    gradient[i] = fmaf(-x[i], dot, gradient[i]) * norm.inverse;
  }
  if (norm.largest != 1.f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gradient[i] /= norm.largest;
    }
  }
}

// The lanes of a warp that share one of `count` groups of `size` channels, with the groups one behind the other in
// memory. Rows are cut anew, as a group may begin and end within a vector. With two groups or more, size is at most
// 128, so that a warp holds a group.
inline constexpr int kGroupSlice = 4;

template <typename Body>
__device__ inline void for_each_group(int count, int size, Body body) {
  const int log2 = log2_lanes(size, kGroupSlice);
  const int lane = static_cast<int>(threadIdx.x & 31);
  for (int first = 0; first < count; first += 32 >> log2) {
    const int group = first + (lane >> log2);
    int channels[kGroupSlice];
#pragma unroll
    for (int i = 0; i < kGroupSlice; ++i) {
      const int channel = (lane & ((1 << log2) - 1)) + (i << log2);
      channels[i] = group < count && channel < size ? group * size + channel : -1;  // -1: none
    }
    body(channels, 1 << log2);
  }
}

template <typename Source>
__device__ inline void load_group(float (&slice)[kGroupSlice], const Source* source,
                                  const int (&channels)[kGroupSlice]) {
#pragma unroll
  for (int i = 0; i < kGroupSlice; ++i) {
    slice[i] = channels[i] < 0 ? 0.f : to_float(source[channels[i]]);
  }
}

__device__ inline void store_group(float* target, const float (&slice)[kGroupSlice],
                                   const int (&channels)[kGroupSlice]) {
#pragma unroll
  for (int i = 0; i < kGroupSlice; ++i) {
    if (channels[i] >= 0) {
      target[channels[i]] = slice[i];
    }
  }
}

// Where a row is in a (batch, num_heads, seq_len, head_dim) tensor.
struct Position {
  int64_t batch, head, row;
};

__device__ inline Position position_of(int64_t flat_row, int num_heads, int seq_len) {
  // Unsigned 64-bit divisions: the compiler takes the 32-bit one whenever the numbers allow it.
  const uint64_t flat_head = static_cast<uint64_t>(flat_row) / static_cast<uint32_t>(seq_len);
  const uint64_t batch = flat_head / static_cast<uint32_t>(num_heads);
  return {static_cast<int64_t>(batch), static_cast<int64_t>(flat_head - batch * num_heads),
          static_cast<int64_t>(flat_row - flat_head * seq_len)};
}

template <typename T>
__device__ inline T* row_of(const Tensor& tensor, const Position& position) {
  return static_cast<T*>(tensor.data) + position.batch * tensor.stride_batch + position.head * tensor.stride_head +
         position.row * tensor.stride_row;
}

// Where sm90/backward.cuh keeps an element of dq_accumulator, counted from its head's first, for `dim` columns: 16 rows
// after 16, 8 columns after 8, and those as a warp has them in wgmma's accumulators, four of each lane together.
__device__ inline int64_t tiled_offset(int row, int column, int dim) {
  return int64_t(row & ~15) * dim + (column & ~7) * 16 + (row & 7) * 16 + (column & 6) * 2 + (row & 8) / 4 +
         (column & 1);
}

// x becomes x^ and the gradient that of x, as `project` does it, under the conditions of normalize_together.
template <typename T, int kCount>
__device__ __forceinline__ void project_together(float (&x)[kCount], float (&gradient)[kCount], int lanes) {
  const float2 inverse = normalize_together<T>(x, lanes);
  const float dot = dot_over_lanes(x, gradient, lanes);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    gradient[i] = fmaf(-x[i], dot, gradient[i]) * inverse.x * inverse.y;
  }
}

// Call body.template operator()<T>() with the type of the tensors' elements.
template <typename Body>
void with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body.template operator()<float>();
    case DType::kFloat16: return body.template operator()<__half>();
    case DType::kBFloat16: return body.template operator()<__nv_bfloat16>();
  }
}

}  // namespace rows

// The end of a kernel that has the gradient of x^ of num_rows rows in shared memory: write that of x, in T.
//
// tile: row i at tile + i * pitch; overwritten. 16-byte aligned, with a pitch that is a multiple of 4. `raw` (x
// itself, unused without l2norm_qk) and `out` point at the first row; strides count elements; rows beyond num_rows
// are not touched. Called by all threads of a block, after a __syncthreads() that made the tile visible; needs
// blockDim.x to be a multiple of 32 and has no __syncthreads() within. Not inlined: its registers would be the
// caller's, who holds accumulators.
template <typename T>
__device__ __noinline__ void project_rows(float* tile, int pitch, int num_rows, int head_dim, int groups,
                                          bool l2norm_qk, const T* raw, int64_t raw_row_stride, T* out,
                                          int64_t out_row_stride) {
  const rows::RowLanes<T> lanes(head_dim);
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  for (int first = warp * lanes.rows_per_warp(); first < num_rows; first += num_warps * lanes.rows_per_warp()) {
    if (l2norm_qk && groups > 1) {
      for (int row = first; row < min(first + lanes.rows_per_warp(), num_rows); ++row) {
        const T* raw_row = raw + row * raw_row_stride;
        float* tile_row = tile + row * pitch;
        rows::for_each_group(groups, head_dim / groups, [&](const auto& channels, int group_lanes) {
          float x[rows::kGroupSlice], gradient[rows::kGroupSlice];
          rows::load_group(x, raw_row, channels);
          rows::load_group(gradient, tile_row, channels);
          rows::project(x, gradient, group_lanes);
          rows::store_group(tile_row, gradient, channels);
        });
      }
      __syncwarp();
    }
    const int row = first + lanes.row_in_warp();
    const bool active = row < num_rows;
    typename rows::RowLanes<T>::Slice gradient;
    lanes.load(gradient, tile + row * pitch, active);
    if (l2norm_qk && groups == 1) {
      typename rows::RowLanes<T>::Slice x;
      lanes.load(x, raw + row * raw_row_stride, active);
      rows::project(x, gradient, lanes.lanes());
    }
    lanes.store(out + row * out_row_stride, gradient, active);
  }
}

}  // namespace flash_cosine_sim
