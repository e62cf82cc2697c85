// What a share of the keys adds to a row: sm80/forward_split.cuh makes shares, merge.cu adds them up.
#pragma once

#include "common/math.cuh"
#include "common/rows.cuh"

namespace flash_cosine_sim {

// Four channels of the numerator, and both row sums (see sm80/forward.cuh).
struct RowPart {
  float4 numerator;
  float exact, rounded;

  __device__ void operator+=(const RowPart& other) {
    numerator.x += other.numerator.x;
    numerator.y += other.numerator.y;
    numerator.z += other.numerator.z;
    numerator.w += other.numerator.w;
    exact += other.exact;
    rounded += other.rounded;
  }
};

__device__ inline int64_t flat_row_of(const ForwardParams& params, const rows::Position& position) {
  return (position.batch * params.num_heads + position.head) * params.seq_len_q + position.row;
}

// A row of the workspace: the numerator, then the row sums.
__device__ inline float* split_row(const ForwardParams& params, int split, int64_t flat_row) {
  const int64_t num_rows = int64_t(params.batch) * params.num_heads * params.seq_len_q;
  return params.split_sums + (split * num_rows + flat_row) * (params.head_dim + kRowSumPlaces);
}

__device__ inline void store_part(const ForwardParams& params, int split, int64_t flat_row, int channel,
                                  const RowPart& part) {
  float* row = split_row(params, split, flat_row);
  *reinterpret_cast<float4*>(row + channel) = part.numerator;
  if (channel == 0) *reinterpret_cast<float2*>(row + params.head_dim) = make_float2(part.exact, part.rounded);
}

__device__ inline RowPart load_part(const ForwardParams& params, int split, int64_t flat_row, int channel) {
  const float* row = split_row(params, split, flat_row);
  const float2 sums = *reinterpret_cast<const float2*>(row + params.head_dim);
  return {*reinterpret_cast<const float4*>(row + channel), sums.x, sums.y};
}

// Writes what the call asked for of a row's four channels from `channel` on.
template <typename T>
__device__ inline void write_result(const ForwardParams& params, const rows::Position& position, int channel,
                                    const RowPart& sum) {
  const int64_t flat_row = flat_row_of(params, position);
  if (params.o.data == nullptr) {
    *reinterpret_cast<float4*>(params.numerator + flat_row * params.head_dim + channel) = sum.numerator;
    if (channel == 0) params.denominator[flat_row] = sum.rounded;
    return;
  }
  const float inverse = sum.rounded == 0.f ? 0.f : rcp_approx_ftz(sum.rounded);
  const float4 o = make_float4(sum.numerator.x * inverse, sum.numerator.y * inverse, sum.numerator.z * inverse,
                               sum.numerator.w * inverse);
  T* target = rows::row_of<T>(params.o, position) + channel;
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(target) = o;
  } else {
    *reinterpret_cast<uint2*>(target) = make_uint2(pack<T>(o.x, o.y), pack<T>(o.z, o.w));
  }
  if (channel == 0 && params.row_sum_log2 != nullptr) params.row_sum_log2[flat_row] = log2f(sum.exact);
}

}  // namespace flash_cosine_sim
