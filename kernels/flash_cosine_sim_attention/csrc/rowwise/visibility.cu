// What the attention kernels look up of packed sequences and of masks: for each query the keys that it sees, for each
// key the queries that see it, for each key a bit, and for each distance what it adds to a score.
#include <algorithm>

#include "attention.h"
#include "common/band.cuh"
#include "common/scores.cuh"
#include "cuda_check.h"

namespace flash_cosine_sim {
namespace {

constexpr int kThreads = 256;

// Where a row's sequence and the one behind it begin, on the row's own side and on the other.
struct Starts {
  int own, next, other, other_next;
};

// cu_seqlens, whatever its numbers are, are read as starts that neither fall nor leave the side's rows: the largest so
// far. So every row is in one sequence, or before the first or behind the last, where it sees nothing. A warp calls this
// with rows that follow one another: it passes over 32 numbers at a time, until one of them is beyond its first row.
__device__ Starts find_sequence(const int* own, const int* other, int num, int row, int own_rows, int other_rows) {
  constexpr unsigned kWholeWarp = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x & 31), first_row = __shfl_sync(kWholeWarp, row, 0);
  Starts starts{};
  int begin = 0;
  for (; begin <= num; begin += 32) {
    const int i = begin + lane;
    const int start = i <= num ? own[i] : 0;
    if (__any_sync(kWholeWarp, start > first_row)) break;
    starts.own = max(starts.own, start);
    if (i <= num) starts.other = max(starts.other, min(other[i], other_rows));
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    starts.own = max(starts.own, __shfl_xor_sync(kWholeWarp, starts.own, distance));
    starts.other = max(starts.other, __shfl_xor_sync(kWholeWarp, starts.other, distance));
  }
  starts.next = starts.own;
  starts.other_next = starts.other;
  for (int i = begin; i <= num; ++i) {
    starts.next = max(starts.own, min(own[i], own_rows));
    starts.other_next = max(starts.other, min(other[i], other_rows));
    if (starts.next > row) return i == 0 ? Starts{} : starts;
    starts.own = starts.next;
    starts.other = starts.other_next;
  }
  return starts;
}

// Where a row's own place is on the other side, counted from where that sequence begins there.
__device__ int place_of(const Starts& starts, int row) {
  return row - starts.own + (starts.other_next - starts.other) - (starts.next - starts.own);
}

// The rows of the other side within `before` and `behind` of the row's own place there; negative: unlimited.
__device__ Range range_of(const Starts& starts, int row, int before, int behind) {
  const int num_other = starts.other_next - starts.other, place = place_of(starts, row);
  return {starts.other + (before < 0 ? 0 : limit(place - before, 0, num_other)),
          starts.other + (behind < 0 ? num_other : limit(place + behind + 1, 0, num_other))};
}

// So that no warp has queries and keys.
__host__ __device__ constexpr int64_t whole_warps(int num_rows) { return (int64_t{num_rows} + 31) / 32 * 32; }

__global__ void __launch_bounds__(kThreads)
    ranges_kernel(const __grid_constant__ Attention params, Range* key_ranges, Range* query_ranges, int* diagonal) {
  const int num_queries = params.seq_len_q, num_keys = params.seq_len_k;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, first_key = whole_warps(num_queries);
  const Sequences& sequences = params.sequences;
  if (index < first_key) {
    const int query = static_cast<int>(index);
    const Starts starts = find_sequence(sequences.queries, sequences.keys, sequences.num, query, num_queries, num_keys);
    if (query >= num_queries) return;
    key_ranges[query] = range_of(starts, query, params.window_left, params.window_right);
    if (diagonal != nullptr) diagonal[query] = starts.other + place_of(starts, query);
  } else if (query_ranges != nullptr && index - first_key < whole_warps(num_keys)) {
    const int key = static_cast<int>(index - first_key);
    const Starts starts = find_sequence(sequences.keys, sequences.queries, sequences.num, key, num_keys, num_queries);
    if (key >= num_keys) return;
    query_ranges[key] = range_of(starts, key, params.window_right, params.window_left);
  }
}

// A warp makes the 32 words of 1024 keys.
__global__ void __launch_bounds__(kThreads)
    mask_words_kernel(const __grid_constant__ Attention params, uint32_t* keys, uint32_t* any, uint32_t* all) {
  const MaskWords& words = params.mask_words;
  const int index = static_cast<int>(blockIdx.x * (kThreads / 32) + threadIdx.x / 32), lane = threadIdx.x & 31;
  if (index >= params.batch * words.blocks_per_batch) return;
  const int batch = index / words.blocks_per_batch, block = index % words.blocks_per_batch;
  uint32_t own = 0;
#pragma unroll 4
  for (int word = 0; word < 32; ++word) {
    const int64_t key = int64_t{block} * 1024 + 32 * word + lane;
    const bool sees = key < params.seq_len_k &&
                      params.mask.data[batch * params.mask.stride_batch + key * params.mask.stride_key];
    const uint32_t bits = __ballot_sync(0xffffffffu, sees);
    if (lane == word) own = bits;
  }
  keys[int64_t{batch} * words.keys_per_batch + 32 * block + lane] = own;
  const uint32_t any_bits = __ballot_sync(0xffffffffu, own != 0);
  const uint32_t all_bits = __ballot_sync(0xffffffffu, own == 0xffffffffu);
  if (lane == 0) {
    any[index] = any_bits;
    all[index] = all_bits;
  }
}

__global__ void __launch_bounds__(kThreads) distance_scores_kernel(const __grid_constant__ Attention params) {
  const DistanceScores& scores = params.distance_scores;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = index / scores.num;
  if (row >= scores.num_rows(params.batch, params.num_heads)) return;
  const int t = scores.first + static_cast<int>(index - row * scores.num);
  const int batch = static_cast<int>(row / params.num_heads), head = static_cast<int>(row % params.num_heads);
  const bool occurs = scores.least <= t && t <= scores.most;
  scores.data[index] = occurs ? score_at(params, batch, head, t) : 0.f;
}

}  // namespace

void launch_visibility(const Attention& params, cudaStream_t stream) {
  if (params.key_ranges != nullptr) {
    const int64_t num_threads =
        whole_warps(params.seq_len_q) + (params.query_ranges == nullptr ? 0 : whole_warps(params.seq_len_k));
    const auto blocks = static_cast<unsigned>((num_threads + kThreads - 1) / kThreads);
    ranges_kernel<<<blocks, kThreads, 0, stream>>>(params, params.key_ranges, params.query_ranges,
                                                   params.distance_scores.diagonal);
    CUDA_CHECK(cudaGetLastError());
  }
  if (params.mask_words.keys != nullptr) {
    const int64_t num_warps = int64_t{params.batch} * params.mask_words.blocks_per_batch;
    const auto blocks = static_cast<unsigned>((num_warps + kThreads / 32 - 1) / (kThreads / 32));
    mask_words_kernel<<<blocks, kThreads, 0, stream>>>(params, params.mask_words.keys, params.mask_words.any,
                                                       params.mask_words.all);
    CUDA_CHECK(cudaGetLastError());
  }
  if (params.distance_scores.data != nullptr) {
    const DistanceScores& scores = params.distance_scores;
    const int64_t entries = scores.num_rows(params.batch, params.num_heads) * scores.num;
    distance_scores_kernel<<<static_cast<unsigned>((entries + kThreads - 1) / kThreads), kThreads, 0, stream>>>(params);
    CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace flash_cosine_sim
