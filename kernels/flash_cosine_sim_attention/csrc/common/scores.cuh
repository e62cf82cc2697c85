// What the kernels do with scores between the two products, beyond taking 2^x.
#pragma once

#include "common/scale.cuh"
#include "common/tile.cuh"

namespace flash_cosine_sim {

inline constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// c = scale * log2(e) of a head.
__device__ __forceinline__ float scale_log2(const Attention& params, int head) {
  return bounded_scale(params, head) * kLog2E;
}

// Which of up to 64 keys from `first` on exist and are not masked, one bit a key. All lanes of a warp call it.
template <int kBlockK>
__device__ __forceinline__ uint64_t visible_keys(const Attention& params, int batch, int first) {
  static_assert(kBlockK <= 64);
  const int lane = threadIdx.x & 31;
  uint64_t visible = 0;
#pragma unroll
  for (int part = 0; part < kBlockK; part += 32) {
    const int key = first + part + lane;
    bool sees = part + lane < kBlockK && key < params.seq_len_k;
    if (sees && params.mask.data != nullptr) {
      sees = params.mask.data[batch * params.mask.stride_batch + key * params.mask.stride_key];
    }
    visible |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, sees)) << part;
  }
  return visible;
}

// The first block of keys from `block` on that the mask leaves one of; `end` if there is none before it. All lanes of a
// warp call it.
template <int kBlockK>
__device__ __forceinline__ int next_visible_block(const Attention& params, int batch, int block, int end) {
  if (params.mask.data == nullptr) return min(block, end);
  while (block < end && visible_keys<kBlockK>(params, batch, block * kBlockK) == 0) ++block;
  return min(block, end);
}

// What by_distance adds to a score at distance t, in base 2. This is the one place that says it: launch_visibility
// makes a table of it, which every kernel reads.
__device__ __forceinline__ float score_at(const Attention& params, int batch, int head, int t) {
  const ByDistance& by_distance = params.by_distance;
  float score = 0.f;
  if (by_distance.bias != nullptr) {
    score += by_distance.bias[int64_t{head} * by_distance.num_distances + t - by_distance.first_distance];
  }
  if (by_distance.slopes != nullptr) {
    score -= by_distance.slopes[int64_t{batch} * by_distance.slopes_stride_batch + head] * static_cast<float>(abs(t));
  }
  return kLog2E * score;
}

// The key at the distance 0 of a query, which exists.
__device__ __forceinline__ int diagonal_of(const Attention& params, int query) {
  const int* diagonal = params.distance_scores.diagonal;
  return diagonal == nullptr ? query + params.seq_len_k - params.seq_len_q : diagonal[query];
}

// Whether a score is more than the product of q_hat and k_hat.
__device__ __forceinline__ bool is_finished_later(const Attention& params) {
  return !params.l2norm_qk || params.bias.data != nullptr || params.distance_scores.data != nullptr;
}

// attn_bias of one query for keys from `first_key` on, in base 2; 0 outside of the matrix. `key` counts from first_key.
template <typename T>
struct BiasRow {
  const T* first;
  int64_t stride;
  int num_keys;

  __device__ __forceinline__ BiasRow(const Attention& params, int batch, int head, int query, int first_key) {
    const Bias& bias = params.bias;
    first = static_cast<const T*>(bias.data) + batch * bias.stride_batch + head * bias.stride_head +
            query * bias.stride_query + first_key * bias.stride_key;
    stride = opaque(bias.stride_key);
    num_keys = query < params.seq_len_q ? params.seq_len_k - first_key : 0;
  }

  __device__ __forceinline__ float operator[](int key) const {
    return key < num_keys ? kLog2E * to_float(first[key * stride]) : 0.f;
  }
};

// What distances add to the scores of one query, which exists, for keys from `first_key` on. `key` counts from
// first_key. It is a pass of its own over scores, behind scale, bias and mask, so that none of it is in registers then.
struct DistanceRow {
  const float* entries;
  unsigned num;
  int place;  // of first_key's

  __device__ __forceinline__ DistanceRow(const Attention& params, int batch, int head, int query, int first_key) {
    const DistanceScores& scores = params.distance_scores;
    // Opaque: what is the same for a whole walk is not worth registers through it.
    entries = scores.data + opaque(batch) * scores.stride_batch + head * scores.stride_head;
    num = scores.num;
    place = diagonal_of(params, query) - first_key - scores.first;
  }

  // 0 where the table has no entry, as may be for hidden keys.
  __device__ __forceinline__ float operator[](int key) const {
    const unsigned own = place - key;
    return own < num ? entries[own] : 0.f;
  }
};

// The bits of a block of keys when all are visible.
template <int kBlockK>
inline constexpr uint64_t kAllKeys = ~uint64_t{0} >> (64 - kBlockK);

}  // namespace flash_cosine_sim
