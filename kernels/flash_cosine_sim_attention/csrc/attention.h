// The host contract between binding.cpp (torch), plan.cpp (which kernel), dispatch.cpp (in which order) and the .cu
// files (no torch). Plain C++, so that plan.cpp needs no CUDA.
//
//   q^ = q / |q|,  k^ = k / |k|          per group of head_dim / groups channels
//   S  = scale * q^ k^T + attn_bias + what the distance adds      -inf where masked
//   O  = exp(S) V / rowsum(exp(S))       0 where no key is visible
//
// The kernels work in base 2: c = scale * log2(e), P = 2^(c q^ k^T + log2(e) attn_bias). With unit vectors
// |c q^ k^T| <= c * groups, so P is used as it is: no row maximum, no shift, no rescaling. A bias may lift or lower
// that within float32's range: a row whose visible logits all are below -87 counts as empty.
//
// All pointers are device pointers and all strides count elements. The last dimension of every Tensor is
// contiguous and its rows are aligned to 16 bytes. Everything runs on the given stream; nothing synchronises; a
// failed launch throws std::runtime_error.
#pragma once

#include <cstdint>

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // as cuda_runtime_api.h has it

namespace flash_cosine_sim {

inline constexpr float kLog2E = 1.4426950408889634f;

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// (batch, heads, rows, head_dim)
struct Tensor {
  void* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_row = 0;
};

// bool (batch, seq_len_k), true = attend; data == nullptr: all keys are visible
struct Mask {
  const bool* data = nullptr;
  int64_t stride_batch = 0, stride_key = 0;
};

// (batch, num_heads, seq_len_q, seq_len_k) in the inputs' dtype; a broadcast dimension has stride 0
struct Bias {
  void* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_query = 0, stride_key = 0;
};

// [first, end) of rows
struct Range {
  int first = 0, end = 0;
};

// int32 (num + 1,) on the device: where sequences begin among packed rows, and where the last one ends. Wrong ones are
// not refused; whatever they are, nothing outside of the tensors is read.
struct Sequences {
  const int* queries = nullptr;
  const int* keys = nullptr;
  int num = 0;
};

// Which keys a mask leaves, bit by bit; each (batch, words), made by launch_visibility.
struct MaskWords {
  uint32_t* keys = nullptr;                      // a bit a key, keys_per_batch words
  uint32_t *any = nullptr, *all = nullptr;       // a bit for 32 keys, blocks_per_batch words: one is left, all are
  int keys_per_batch = 0, blocks_per_batch = 0;  // blocks of 1024 keys
};

// What is added to a score by the distance t = query + seq_len_k - seq_len_q - key, inside each sequence: scores.cuh
// has the function. All of it is float32, contiguous and on the device; without a pointer it adds nothing.
struct ByDistance {
  const float* bias = nullptr;  // (num_heads, num_distances), entry t - first_distance
  int num_distances = 0, first_distance = 0;
  const float* slopes = nullptr;  // of ALiBi: (num_heads,) each batch stride_batch after the one before, or 0
  int slopes_stride_batch = 0;

  bool exists() const { return bias != nullptr || slopes != nullptr; }
};

// The same as a table in base 2, for every (batch, head): of the distances [least, most], which are all that occur, and
// 0 at others. Entry t - first. The kernels of sm90/ copy pieces of up to kMargin entries, which the table has more at
// both ends, 16 bytes at a time: that is why `first` goes with where tiles begin.
struct DistanceScores {
  static constexpr int kMargin = 320;

  float* data = nullptr;
  int first = 0, num = 0;  // num is a multiple of 4
  int least = 0, most = -1;
  int64_t stride_batch = 0, stride_head = 0;  // 0 where all have the same
  // Of packed sequences, (seq_len_q,): the key at the distance 0 of each query.
  int* diagonal = nullptr;

  constexpr int64_t num_rows(int batch, int num_heads) const {
    return stride_head == 0 ? 1 : int64_t{num_heads} * (stride_batch == 0 ? 1 : batch);
  }
};

// What forward and backward share.
struct Attention {
  DType dtype = DType::kBFloat16;
  int batch = 0, num_heads = 0, num_kv_heads = 0, seq_len_q = 0, seq_len_k = 0, head_dim = 0;
  int groups = 1;
  bool causal = false;  // with window_right == 0; decides in which order work is done
  // Key j is visible to query i iff -window_right <= i + seq_len_k - seq_len_q - j <= window_left, where negative ones
  // are unlimited.
  int window_left = -1, window_right = -1;
  // Packed sequences, of which each has lengths of its own in what the window says, and sees no other: batch is 1.
  Sequences sequences;
  bool l2norm_qk = true;
  bool allow_tf32 = false;  // float32: one TF32 product instead of three
  // scale: float32 of one element (stride 0) or one per head (stride 1) on the device, which scale_value bounds:
  // common/scale.cuh; nullptr: scale_value
  const float* scale = nullptr;
  int scale_stride = 0;
  float scale_value = 1.f;
  Tensor q, k, v;  // as the user gave them
  // What enters the products. With l2norm_qk, buffers that a launch before the kernel fills: q_hat = c * q^ and
  // k_hat = k^, each rounded once; but see ForwardPlan. Without it q_hat is q and k_hat is k, and the kernels multiply
  // scores by c.
  Tensor q_hat, k_hat;
  Mask mask;
  Bias bias;
  ByDistance by_distance;
  DistanceScores distance_scores;  // by_distance as the kernels read it: workspace, which launch_visibility fills
  // Workspace, which launch_visibility fills. Of packed sequences, the keys that each query sees, (seq_len_q,), and,
  // for the backward pass, the queries that see each key, (seq_len_k,).
  Range *key_ranges = nullptr, *query_ranges = nullptr;
  MaskWords mask_words;  // if the plan has any
};

// Whether something but causality and the mask hides keys.
inline bool is_banded(const Attention& params) {
  return params.window_left >= 0 || (params.window_right >= 0 && !params.causal) || params.sequences.queries != nullptr;
}

// What a kernel of sm90/ can do; each also does what those before it do.
enum class Variant : int {
  kCausal,          // causality hides keys, and, backward, a mask
  kBanded,          // so do windows and packed sequences, and masks by block
  kScored,          // distances add to scores
  kScoredGradient,  // backward: ddistance_bias, summed in any order
};

// Where q or k is normalised.
enum class Norm : int {
  kNone,      // it comes as it is to be: without l2norm_qk
  kPrologue,  // launch_normalize writes q_hat or k_hat, which needs memory
  kKernel,    // q_hat is q, or k_hat is k, and the attention kernel normalises what it loads
  kAhead,     // keys in sm90/forward.cuh: that kernel writes k_hat, too, ahead of where it reads
};

// Of the row sums in a row of split_sums: two, and two more for its alignment.
inline constexpr int kRowSumPlaces = 4;

// Which kernel a forward pass takes, and what that needs. plan.cpp decides, binding.cpp allocates.
struct ForwardPlan {
  bool sm90 = false;                   // sm90/forward.cuh, else one of the portable kernels
  bool eight_warps = false;            // sm80/forward.cuh with blocks of eight warps, not four
  Variant variant = Variant::kCausal;  // sm90
  int64_t mask_words = 0;              // elements of workspace
  // sm80/forward_split.cuh with the keys in so many shares, whose sums launch_forward_merge adds up if there are two or
  // more; 0: sm80/forward.cuh
  int num_splits = 0;
  int64_t split_sums = 0;                              // elements of workspace
  DistanceScores distance_scores;                      // without its pointers
  int64_t num_distance_scores = 0, num_diagonals = 0;  // elements of workspace
  Norm q_norm = Norm::kNone, k_norm = Norm::kNone;
  int64_t num_counters = 0;
};

struct ForwardParams : Attention {
  ForwardPlan plan;
  // Workspace, if the plan has any: sm90/tiles/forward.h says what of. run_forward zeroes them.
  uint32_t* counters = nullptr;
  // Workspace, if the plan has it: float32 (num_splits, batch, num_heads, seq_len_q, head_dim + kRowSumPlaces):
  // split_sums.cuh
  float* split_sums = nullptr;
  Tensor o;  // in the inputs' dtype; data == nullptr: partials are wanted
  // (batch, num_heads, seq_len_q), -inf in an empty row; with o. nullptr: no backward pass will need it.
  float* row_sum_log2 = nullptr;
  // Partials: (batch, num_heads, seq_len_q, head_dim) and (batch, num_heads, seq_len_q), contiguous.
  float* numerator = nullptr;
  float* denominator = nullptr;
};

// Tiles of dS along a diagonal have their elements at the same distances, so that sums of such tiles are sums by
// distance. Diagonal `first` + i has its upper right element at the distance block_k * (first + i) - (block_k - 1), and
// so many distances from there on as block_q rows and block_k columns have; each is on several diagonals.
struct DiagonalSums {
  int first = 0, num = 0;  // of a head
  int block_q = 0, block_k = 0;

  constexpr int distances() const { return block_q + block_k - 1; }
};

// Which kernel a backward pass takes, and how much workspace, in elements.
struct BackwardPlan {
  bool sm90 = false;                   // sm90/backward.cuh, else sm80/backward.cuh
  bool eight_warps = false;            // sm80/backward.cuh with blocks of eight warps, not four
  Variant variant = Variant::kCausal;  // sm90
  int num_splits = 0;                  // of the walk over queries; 0: the main kernel writes dk and dv itself
  // sm90: the rows of a head and the columns that dq_accumulator has, whole tiles of them. 0: no more than dq.
  int padded_rows = 0, padded_dim = 0;
  int block_q = 0, block_k = 0;  // sm90: how many queries and keys a tile has
  int64_t dq_accumulator = 0, dq_order = 0, dkv_partials = 0;
  DistanceScores distance_scores;                      // without its pointers
  int64_t num_distance_scores = 0, num_diagonals = 0;  // elements of workspace
  DiagonalSums diagonals;      // ddistance_bias by launch_bias_gradient_sm80 and launch_distance_merge
  int64_t distance_sums = 0;   // elements of workspace
  bool prepares_rows = false;  // sm90: the main kernel makes q_hat, k_hat, delta and the accumulator's zeros
  int64_t num_counters = 0;
};

struct BackwardParams : Attention {
  BackwardPlan plan;
  Tensor o, dout;
  const float* row_sum_log2 = nullptr;   // (batch, num_heads, seq_len_q)
  const float* drow_sum_log2 = nullptr;  // the same, or nullptr for zero
  // Outputs; data == nullptr: not needed. q_hat may be the memory of dq and k_hat that of dk: each is read for
  // the last time before the gradient is written.
  Tensor dq, dk, dv;
  Bias dbias;                       // its own memory; stride 0 in the dimensions along which attn_bias is broadcast
  float* ddistance_bias = nullptr;  // as by_distance.bias
  float* dscale = nullptr;          // (1,) or (num_heads,), as scale
  bool deterministic = false;
  // Workspace, in the sizes that plan_backward gives; contiguous.
  float* delta = nullptr;  // (batch, num_heads, seq_len_q): rowsum(dO * O) - log2(e) * drow_sum_log2
  // sum_j dS_ij k^_j, (batch, num_heads, seq_len_q, head_dim): the gradient of q^ but for the factor scale.
  // run_backward sets it to zero. nullptr if neither dq nor dscale is needed. sm90/backward.cuh's is padded, and its
  // elements are in the order of rows.cuh's `tiled_offset`.
  float* dq_accumulator = nullptr;
  // deterministic: whose turn it is at each block of queries. Lies behind the counters; run_backward zeroes both.
  int* dq_order = nullptr;
  // sm90/backward.cuh: sm90/tiles/backward.h says what of; sm80/backward.cuh, deterministic: of blocks begun, then each
  // block's number
  uint32_t* counters = nullptr;
  // The gradients of k^ and v, float32 (num_splits, 2, batch, num_kv_heads, seq_len_k, head_dim), which
  // launch_postprocess adds up in order; nullptr if num_splits is 0. sm90/backward.cuh leaves out splits without a
  // share.
  float* dkv_partials = nullptr;
  // What launch_bias_gradient_sm80 leaves for launch_distance_merge: bias_gradient.cuh.
  float* distance_sums = nullptr;
};

// dispatch.cpp: all that binding.cpp calls; the plans are plan.cpp's for the current device. With l2norm_qk a backward
// pass always normalises q and k into q_hat and k_hat; a forward pass does as its plan says.
//
// Reads shapes, strides and options, and which outputs are wanted; neither q_hat nor k_hat nor a workspace pointer.
ForwardPlan plan_forward(const ForwardParams& params);
void run_forward(const ForwardParams& params, cudaStream_t stream);
// Reads shapes, strides and options, and which outputs are needed; neither q_hat nor k_hat nor a workspace pointer.
BackwardPlan plan_backward(const BackwardParams& params, int num_multiprocessors);
void run_backward(const BackwardParams& params, cudaStream_t stream);

// normalize.cu: q_hat = c * q^ and k_hat = k^ in one launch, unless they are q and k themselves. Also zeroes counters
// for the launch that follows.
void launch_normalize(const Attention& params, uint32_t* counters, int64_t num_counters, cudaStream_t stream);

// visibility.cu: key_ranges, query_ranges, mask_words and distance_scores, where they have memory.
void launch_visibility(const Attention& params, cudaStream_t stream);

// preprocess.cu: q_hat and k_hat as launch_normalize makes them, delta, and zeros in the counters; for
// sm90/backward.cuh also in dq_accumulator. One launch.
void launch_preprocess(const BackwardParams& params, int64_t num_counters, cudaStream_t stream);

// postprocess.cu
// dq from dq_accumulator, through the factor scale and the norm; dk and dv from dkv_partials, if there are any, dk
// through the norm. One launch. The rows' shares of dscale go into delta, which nobody reads any more, and are then
// added up in order.
void launch_postprocess(const BackwardParams& params, cudaStream_t stream);
// ddistance_bias from distance_sums.
void launch_distance_merge(const BackwardParams& params, cudaStream_t stream);
// Zeros in dk and dv where nobody sees a key, after sm90/backward.cuh's banded variant.
void launch_unseen(const BackwardParams& params, cudaStream_t stream);

// How a kernel multiplies. The inputs' dtype decides, but for two options.
enum class Math : int {
  kBf16,
  kFp16,       // probabilities in float16: they must not exceed 65504
  kFp16WideP,  // forward only: probabilities in TF32, which has float16's precision and float32's range
  kFp32,       // each product as three of TF32, so to float32's accuracy
  kTf32,
};

constexpr int element_size(Math math) { return math == Math::kFp32 || math == Math::kTf32 ? 4 : 2; }

// merge.cu: the output, or the partials, from split_sums
void launch_forward_merge(const ForwardParams& params, cudaStream_t stream);

// sm80/forward.cuh, sm80/forward_split.cuh, sm80/backward.cuh: mma.sync, compute capability 8.0 and newer. With blocks
// of eight warps, not four, if has_forward_eight_warps or has_backward_eight_warps says so.
template <Math kMath, int kHeadDim, bool kEightWarps>
void launch_forward_sm80(const ForwardParams& params, cudaStream_t stream);
constexpr bool has_forward_eight_warps(Math math, int head_dim) {
  return (math == Math::kBf16 || math == Math::kFp16) && head_dim == 128;
}
template <Math kMath, int kHeadDim>  // if has_split_kernel says so
void launch_forward_split_sm80(const ForwardParams& params, cudaStream_t stream);
constexpr bool has_split_kernel(Math math, int head_dim) { return head_dim * element_size(math) <= 512; }
template <Math kMath, int kHeadDim, bool kEightWarps>
void launch_backward_sm80(const BackwardParams& params, cudaStream_t stream);  // dq_accumulator, dk, dv
constexpr bool has_backward_eight_warps(Math math, int head_dim) {
  return element_size(math) == 2 && (head_dim == 64 || head_dim == 96 || head_dim == 128);
}
template <Math kMath, int kHeadDim>
void launch_bias_gradient_sm80(const BackwardParams& params, cudaStream_t stream);  // dbias, distance_sums

// sm90/forward.cuh, sm90/backward.cuh: wgmma and TMA, compute capability 9.0 alone; Math::kBf16 and Math::kFp16, no
// attn_bias, at least a key; backward without the norm in Math::kBf16 alone, by a number as scale, without
// ddistance_bias.
template <Math kMath, int kHeadDim, Variant kVariant>
void launch_forward_sm90(const ForwardParams& params, cudaStream_t stream);
template <Math kMath, int kHeadDim, Variant kVariant>
void launch_backward_sm90(const BackwardParams& params, cudaStream_t stream);  // dq_accumulator, dk, dv

}  // namespace flash_cosine_sim
