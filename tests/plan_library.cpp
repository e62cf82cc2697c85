// plan.cpp for test_plan.py: a call as an array of numbers, in the order of its Call, becomes a plan as another.
#include <cstdint>
#include <initializer_list>

#include "plan.h"
#include "sm80/tiles.h"
#include "sm90/tiles.h"

namespace flash_cosine_sim {
namespace {

char something;  // what a tensor's data points to: nobody reads it

class Numbers {
 public:
  explicit Numbers(const int64_t* next) : next_(next) {}
  int64_t take() { return *next_++; }

 private:
  const int64_t* next_;
};

void* data(bool exists) { return exists ? &something : nullptr; }

int* ints(int which) {
  static int some[2];
  return some + which;
}

Tensor tensor(Numbers& numbers, int num_heads, int num_rows, int head_dim) {
  const bool exists = numbers.take(), expanded = numbers.take();
  const int64_t stride_row = head_dim, stride_head = expanded ? 0 : stride_row * num_rows;
  return {data(exists), stride_head * num_heads, stride_head, stride_row};
}

void fill(Attention& params, Gpu& gpu, Numbers& numbers) {
  gpu.num_multiprocessors = numbers.take();
  gpu.runs_sm90 = numbers.take();
  gpu.shared_bytes = 1024 * numbers.take();
  gpu.threads = numbers.take();
  params.dtype = static_cast<DType>(numbers.take());
  for (int* size : {&params.batch, &params.num_heads, &params.num_kv_heads, &params.seq_len_q, &params.seq_len_k,
                    &params.head_dim, &params.groups}) {
    *size = numbers.take();
  }
  for (bool* option : {&params.causal, &params.l2norm_qk, &params.allow_tf32}) *option = numbers.take();
  params.scale = static_cast<float*>(data(numbers.take()));
  params.scale_stride = numbers.take();
  params.scale_value = numbers.take();
  params.bias.data = data(numbers.take());
  params.mask.data = static_cast<bool*>(data(numbers.take()));
  params.window_left = numbers.take();
  params.window_right = numbers.take();
  params.sequences.num = numbers.take();
  const bool one_cu_seqlens = numbers.take();
  if (params.sequences.num >= 0) {
    params.sequences.queries = ints(0);
    params.sequences.keys = ints(one_cu_seqlens ? 0 : 1);
  }
  ByDistance& by_distance = params.by_distance;
  by_distance.num_distances = numbers.take();
  by_distance.bias = static_cast<float*>(data(by_distance.num_distances >= 0));
  by_distance.first_distance = numbers.take();
  const int64_t slopes = numbers.take();  // 0: none, 1: a number a head, 2: a number a head of each batch
  by_distance.slopes = static_cast<float*>(data(slopes > 0));
  by_distance.slopes_stride_batch = slopes == 2 ? params.num_heads : 0;
  params.q = tensor(numbers, params.num_heads, params.seq_len_q, params.head_dim);
  params.k = tensor(numbers, params.num_kv_heads, params.seq_len_k, params.head_dim);
  params.v = tensor(numbers, params.num_kv_heads, params.seq_len_k, params.head_dim);
}

}  // namespace

extern "C" {

void plan_forward_call(const int64_t* call, int64_t* plan) {
  Numbers numbers(call);
  ForwardParams params;
  Gpu gpu;
  fill(params, gpu, numbers);
  params.o = tensor(numbers, params.num_heads, params.seq_len_q, params.head_dim);
  const ForwardPlan found = plan_forward(params, gpu);
  int i = 0;
  for (int64_t x :
       {int64_t(found.sm90), int64_t(found.num_splits), found.split_sums, int64_t(found.q_norm), int64_t(found.k_norm),
        found.num_counters, int64_t(forward_math_of(params)), int64_t(padded_head_dim(params.head_dim)),
        int64_t(found.variant), found.mask_words, found.num_distance_scores, found.num_diagonals,
        int64_t(found.distance_scores.first), int64_t(found.distance_scores.num), found.distance_scores.stride_batch,
        int64_t(found.eight_warps)}) {
    plan[i++] = x;
  }
}

void plan_backward_call(const int64_t* call, int64_t* plan) {
  Numbers numbers(call);
  BackwardParams params;
  Gpu gpu;
  fill(params, gpu, numbers);
  params.o = params.dout = tensor(numbers, params.num_heads, params.seq_len_q, params.head_dim);
  params.dq = tensor(numbers, params.num_heads, params.seq_len_q, params.head_dim);
  params.dk = tensor(numbers, params.num_kv_heads, params.seq_len_k, params.head_dim);
  params.dv = tensor(numbers, params.num_kv_heads, params.seq_len_k, params.head_dim);
  params.dscale = static_cast<float*>(data(numbers.take()));
  params.deterministic = numbers.take();
  params.ddistance_bias = static_cast<float*>(data(numbers.take() && params.by_distance.bias != nullptr));
  const BackwardPlan found = plan_backward(params, gpu);
  int i = 0;
  for (int64_t x :
       {int64_t(found.sm90), int64_t(found.num_splits), int64_t(found.padded_rows), int64_t(found.padded_dim),
        int64_t(found.block_q), int64_t(found.block_k), found.dq_accumulator, found.dq_order, found.dkv_partials,
        int64_t(found.prepares_rows), found.num_counters, int64_t(math_of(params)),
        int64_t(padded_head_dim(params.head_dim)), int64_t(needs_main_kernel(params)), int64_t(found.variant),
        found.num_distance_scores, found.num_diagonals, int64_t(found.distance_scores.first),
        int64_t(found.distance_scores.num), found.distance_scores.stride_batch, int64_t(found.diagonals.first),
        int64_t(found.diagonals.num), int64_t(found.diagonals.block_q), int64_t(found.diagonals.block_k),
        found.distance_sums, int64_t(found.eight_warps)}) {
    plan[i++] = x;
  }
}

// Sizes of a kernel's tiles: the blocks of queries and of keys, then what else the kernels count by.
void forward_sm90_tile_sizes(int head_dim, int* sizes) {
  const ForwardSm90Tile& tile = forward_sm90_tile(head_dim);
  sizes[0] = 64 * tile.consumers;
  sizes[1] = tile.block_k;
}

void backward_sm90_tile_sizes(int head_dim, int* sizes) {
  const BackwardSm90Tile& tile = backward_sm90_tile(head_dim);
  sizes[0] = tile.block_q;
  sizes[1] = tile.block_k();
  sizes[2] = 4 * BackwardSm90Tile::kConsumers;
}

void backward_tile_sizes(int math, int head_dim, bool eight_warps, int* sizes) {
  const BackwardTile& tile = backward_tile(static_cast<Math>(math), head_dim, eight_warps);
  sizes[0] = tile.block_q;
  sizes[1] = tile.block_k();
  sizes[2] = tile.slices();
}

int held_blocks(int num_kib, int num_threads, int threads, int shared_bytes, int min_blocks) {
  Gpu gpu;
  gpu.shared_bytes = 1024 * num_kib;
  gpu.threads = num_threads;
  return blocks_held(gpu, threads, shared_bytes, min_blocks);
}

int forward_held_blocks(int num_kib, int num_threads, int math, int head_dim, bool eight_warps) {
  const ForwardTile& tile = forward_tile(static_cast<Math>(math), head_dim, eight_warps);
  return held_blocks(num_kib, num_threads, tile.threads(), tile.shared_bytes(element_size(static_cast<Math>(math))),
                     tile.min_blocks());
}

int backward_held_blocks(int num_kib, int num_threads, int math, int head_dim, bool eight_warps) {
  const BackwardTile& tile = backward_tile(static_cast<Math>(math), head_dim, eight_warps);
  return held_blocks(num_kib, num_threads, tile.threads(), tile.shared_bytes(element_size(static_cast<Math>(math))),
                     tile.min_blocks());
}

void split_tile_sizes(int math, int head_dim, int64_t num_rows, int* sizes) {
  const SplitTile& tile = split_tile(static_cast<Math>(math), head_dim);
  sizes[0] = tile.warp_rows() * tile.warps_with_rows(num_rows);
  sizes[1] = tile.block_keys;
  sizes[2] = tile.min_blocks;
}

}  // extern "C"
}  // namespace flash_cosine_sim
