// The operators' CUDA implementations: they allocate, fill in the parameters of attention.h and call dispatch.cpp.
// ops.py defines the schemas and says what an implementation may rely on.
//
// The only file that includes torch, and of torch only the stable ABI, so that one library serves every release
// from 2.11 on. The host time of every call counts: nothing here asks the device or goes through torch's
// dispatcher where the C shim has a direct way.

#include "attention.h"
#include "cuda_check.h"
#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <tuple>

// Weak: a CPU build of torch has no such symbol, and must load the library nevertheless.
#pragma weak aoti_torch_get_current_cuda_stream
// In torch from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace flash_cosine_sim {
namespace {

using torch::headeronly::ScalarType;
using TorchTensor = torch::stable::Tensor;
using OptionalTensor = std::optional<TorchTensor>;

constexpr int64_t kAlignmentBytes = 16;   // of the rows of a Tensor
constexpr int64_t kWorkspaceBytes = 256;  // alignment of the pieces of a workspace

DType dtype_of(const TorchTensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, "q must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

// The kernels count rows in int, up to two tiles beyond the last.
constexpr int64_t kMostRows = std::numeric_limits<int>::max() - 255;
// How many entries a table of distances has at most beyond one for each query and key.
constexpr int64_t kMostMoreDistances = 2 * DistanceScores::kMargin + 8;

int to_int(int64_t size, const char* name) {
  STD_TORCH_CHECK(size <= kMostRows, name, " must be at most ", kMostRows, ", got ", size);
  return static_cast<int>(size);
}

// Where one call runs, and how it allocates. While it lives, q's device is the current one.
class Call {
 public:
  const int device_index;
  const DType dtype;
  const int64_t itemsize;

  explicit Call(const TorchTensor& q)
      : device_index(q.get_device_index()), dtype(dtype_of(q)), itemsize(dtype == DType::kFloat32 ? 4 : 2),
        guard_(device_index) {
    const int capability = current_device().compute_capability;
    STD_TORCH_CHECK(capability >= 80, "the CUDA kernels need compute capability 8.0 or newer, cuda:", device_index,
                    " has ", capability / 10, ".", capability % 10);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &torch_dtype_));
  }

  cudaStream_t stream() const { return stream_; }

  // Uninitialised and contiguous, in q's dtype.
  TorchTensor empty(std::initializer_list<int64_t> sizes) const { return allocate(sizes, torch_dtype_); }
  TorchTensor empty_float32(std::initializer_list<int64_t> sizes) const {
    return allocate(sizes, aoti_torch_dtype_float32());
  }

  TorchTensor empty_like(const TorchTensor& tensor) const {
    if (!is_dense(tensor)) return with_reason([&] { return torch::stable::empty_like(tensor); });
    // The same without the dispatcher, at half the host time.
    int32_t torch_dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &torch_dtype));
    return empty_strided(tensor.dim(), tensor.sizes().data(), tensor.strides().data(), torch_dtype);
  }

  // `tensor` where attention.h can describe it, else a contiguous copy.
  TorchTensor with_aligned_rows(const TorchTensor& tensor) const {
    if (has_aligned_rows(tensor)) return tensor;
    TorchTensor copy = empty({tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)});
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), tensor.get(), /*non_blocking=*/0));
    return copy;
  }

  bool has_aligned_rows(const TorchTensor& tensor) const {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    bool aligned = strides[3] == 1 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kAlignmentBytes == 0;
    for (int dim = 0; dim < 3; ++dim) {
      aligned &= sizes[dim] <= 1 || strides[dim] * itemsize % kAlignmentBytes == 0;
    }
    return aligned;
  }

 private:
  const torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int32_t torch_dtype_ = 0;

  TorchTensor allocate(std::initializer_list<int64_t> sizes, int32_t torch_dtype) const {
    int64_t strides[4];
    int64_t stride = 1;
    for (int dim = static_cast<int>(sizes.size()) - 1; dim >= 0; --dim) {
      strides[dim] = stride;
      stride *= std::max<int64_t>(sizes.begin()[dim], 1);  // of nothing, too, those of torch.empty
    }
    return empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, torch_dtype);
  }

  TorchTensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t torch_dtype) const {
    return with_reason([&] {
      AtenTensorHandle handle = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, torch_dtype, aoti_torch_device_type_cuda(),
                                                      device_index, &handle));
      return TorchTensor(handle);
    });
  }

  // Whether empty_like keeps the strides, for the layouts that models have: contiguous, or (batch, seq_len, heads,
  // head_dim) storage.
  static bool is_dense(const TorchTensor& tensor) {
    if (tensor.is_contiguous()) return true;
    if (tensor.dim() != 4) return false;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    return strides[3] == 1 && strides[1] == sizes[3] && strides[2] == sizes[1] * sizes[3] &&
           strides[0] == sizes[2] * strides[2];
  }

  // The C shim says that an allocation failed, but not why. Programs that catch the error look for these words.
  template <typename Allocate>
  TorchTensor with_reason(Allocate allocate) const {
    try {
      return allocate();
    } catch (const std::runtime_error&) {
      if (torch_exception_get_what_without_backtrace) {
        throw std::runtime_error(torch_exception_get_what_without_backtrace());
      }
      // An earlier kernel's failure surfaces in an allocation, too: then this call fails with its name.
      size_t free_bytes = 0, total_bytes = 0;
      CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
      throw std::runtime_error("CUDA out of memory, most likely. What torch said is on stderr");
    }
  }
};

// An output with the strides of empty_like, or, where the kernels cannot write those, a contiguous stand-in.
struct Output {
  TorchTensor result, rows;

  Output(const Call& call, const TorchTensor& like)
      : result(call.empty_like(like)), rows(call.has_aligned_rows(result) ? result : make_rows(call, like)) {}

  void finish() const {
    if (rows.get() != result.get()) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(result.get(), rows.get(), /*non_blocking=*/0));
    }
  }

 private:
  static TorchTensor make_rows(const Call& call, const TorchTensor& like) {
    return call.empty({like.size(0), like.size(1), like.size(2), like.size(3)});
  }
};

TorchTensor as_contiguous(const TorchTensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor as_tensor(const TorchTensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  // The stride of a dimension of size 1 may be anything; head_dim is a multiple of the alignment.
  const auto stride = [&](int dim) { return sizes[dim] <= 1 ? sizes[3] : strides[dim]; };
  return {tensor.data_ptr(), stride(0), stride(1), stride(2)};
}

Tensor contiguous_tensor(void* data, const TorchTensor& shape) {
  const auto sizes = shape.sizes();
  return {data, sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3]};
}

Bias as_bias(const TorchTensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const auto stride = [&](int dim) { return sizes[dim] == 1 ? 0 : strides[dim]; };
  return {tensor.data_ptr(), stride(0), stride(1), stride(2), stride(3)};
}

ByDistance as_by_distance(const Attention& params, const OptionalTensor& bias, const OptionalTensor& slopes,
                          int64_t first_distance) {
  ByDistance by_distance;
  if (bias) {
    by_distance.bias = static_cast<const float*>(bias->data_ptr());
    by_distance.num_distances = to_int(bias->size(1), "the number of distances");
    by_distance.first_distance = static_cast<int>(first_distance);
  }
  if (slopes) {
    by_distance.slopes = static_cast<const float*>(slopes->data_ptr());
    by_distance.slopes_stride_batch = slopes->size(0) == 1 ? 0 : params.num_heads;
  }
  if (by_distance.exists())
    to_int(int64_t{params.seq_len_q} + params.seq_len_k + kMostMoreDistances, "seq_len_q + seq_len_k");
  return by_distance;
}

// A window beyond all rows of the other side is none; added to a row, it would not fit into an int.
int to_window(int64_t size, int rows) { return size < 0 || size >= rows ? -1 : static_cast<int>(size); }

// All of Attention but q_hat and k_hat. q, k, v, scale and what the distance adds are replaced by copies where
// attention.h asks for it, and must outlive the launch.
void fill(Attention& params, const Call& call, TorchTensor& q, TorchTensor& k, TorchTensor& v,
          const OptionalTensor& mask, const OptionalTensor& attn_bias, OptionalTensor& scale,
          const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, OptionalTensor& distance_bias,
          OptionalTensor& alibi_slopes, double scale_value, int64_t groups, bool causal, int64_t window_left,
          int64_t window_right, int64_t first_distance, bool l2norm_qk, bool allow_tf32) {
  params.dtype = call.dtype;
  params.batch = to_int(q.size(0), "batch");
  params.num_heads = to_int(q.size(1), "num_heads");
  params.num_kv_heads = to_int(k.size(1), "num_kv_heads");
  params.seq_len_q = to_int(q.size(2), "seq_len_q");
  params.seq_len_k = to_int(k.size(2), "seq_len_k");
  params.head_dim = to_int(q.size(3), "head_dim");
  params.groups = static_cast<int>(groups);  // divides head_dim
  params.causal = causal;
  params.window_left = to_window(window_left, params.seq_len_k);
  params.window_right = causal ? 0 : to_window(window_right, params.seq_len_q);
  if (cu_seqlens_q) {
    params.sequences = {static_cast<const int*>(cu_seqlens_q->data_ptr()),
                        static_cast<const int*>(cu_seqlens_k->data_ptr()), static_cast<int>(cu_seqlens_q->numel()) - 1};
  }
  params.l2norm_qk = l2norm_qk;
  params.allow_tf32 = allow_tf32;
  if (scale) {
    scale = as_contiguous(*scale);
    params.scale = static_cast<const float*>(scale->data_ptr());
    params.scale_stride = scale->numel() == 1 ? 0 : 1;
  }
  params.scale_value = static_cast<float>(scale_value);
  q = call.with_aligned_rows(q);
  k = call.with_aligned_rows(k);
  v = call.with_aligned_rows(v);
  params.q = as_tensor(q);
  params.k = as_tensor(k);
  params.v = as_tensor(v);
  if (mask) params.mask = {static_cast<const bool*>(mask->data_ptr()), mask->stride(0), mask->stride(1)};
  if (attn_bias) params.bias = as_bias(*attn_bias);
  if (distance_bias) distance_bias = as_contiguous(*distance_bias);
  if (alibi_slopes) alibi_slopes = as_contiguous(*alibi_slopes);
  params.by_distance = as_by_distance(params, distance_bias, alibi_slopes, first_distance);
}

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

MaskWords mask_words_in(uint32_t* words, const ForwardParams& params) {
  const int blocks = static_cast<int>(round_up(params.seq_len_k, 1024) / 1024);
  uint32_t* any = words + int64_t{params.batch} * blocks * 32;
  return {words, any, any + int64_t{params.batch} * blocks, 32 * blocks, blocks};
}

// Sets the plan of a forward pass, q_hat and k_hat, and its workspace: pieces of one allocation, which is returned and
// must outlive the launch.
OptionalTensor allocate_workspace(ForwardParams& params, const Call& call, const TorchTensor& q, const TorchTensor& k) {
  params.plan = plan_forward(params);
  const auto padded = [](int64_t bytes) { return round_up(bytes, kWorkspaceBytes); };
  const auto needs_memory = [](Norm norm) { return norm == Norm::kPrologue || norm == Norm::kAhead; };
  const int64_t counters = padded(params.plan.num_counters * sizeof(*params.counters));
  const int64_t q_hat = needs_memory(params.plan.q_norm) ? padded(q.numel() * call.itemsize) : 0;
  const int64_t k_hat = needs_memory(params.plan.k_norm) ? padded(k.numel() * call.itemsize) : 0;
  const int64_t split_sums = padded(params.plan.split_sums * sizeof(*params.split_sums));
  const bool is_packed = params.sequences.queries != nullptr;
  const int64_t ranges = is_packed ? padded(params.seq_len_q * sizeof(*params.key_ranges)) : 0;
  const int64_t mask_words = padded(params.plan.mask_words * sizeof(uint32_t));
  params.q_hat = params.q;
  params.k_hat = params.k;
  const int64_t distance_scores = padded(params.plan.num_distance_scores * sizeof(float));
  const int64_t diagonals = padded(params.plan.num_diagonals * sizeof(int));
  const int64_t bytes = counters + q_hat + k_hat + split_sums + ranges + mask_words + distance_scores + diagonals;
  if (bytes == 0) return std::nullopt;
  TorchTensor workspace = call.empty({bytes / call.itemsize});
  char* data = static_cast<char*>(workspace.data_ptr());
  if (counters > 0) params.counters = reinterpret_cast<uint32_t*>(data);
  if (q_hat > 0) params.q_hat = contiguous_tensor(data + counters, q);
  if (k_hat > 0) params.k_hat = contiguous_tensor(data + counters + q_hat, k);
  data += counters + q_hat + k_hat;
  if (split_sums > 0) params.split_sums = reinterpret_cast<float*>(data);
  if (ranges > 0) params.key_ranges = reinterpret_cast<Range*>(data + split_sums);
  if (mask_words > 0) {
    params.mask_words = mask_words_in(reinterpret_cast<uint32_t*>(data + split_sums + ranges), params);
  }
  data += split_sums + ranges + mask_words;
  params.distance_scores = params.plan.distance_scores;
  if (distance_scores > 0) params.distance_scores.data = reinterpret_cast<float*>(data);
  if (diagonals > 0) params.distance_scores.diagonal = reinterpret_cast<int*>(data + distance_scores);
  return workspace;
}

std::tuple<TorchTensor, TorchTensor> forward(TorchTensor q, TorchTensor k, TorchTensor v, OptionalTensor mask,
                                             OptionalTensor attn_bias, OptionalTensor scale,
                                             OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                             OptionalTensor distance_bias, OptionalTensor alibi_slopes,
                                             double scale_value, int64_t groups, bool causal, int64_t window_left,
                                             int64_t window_right, int64_t first_distance, bool l2norm_qk,
                                             bool allow_tf32, bool need_row_sum_log2) {
  const Call call(q);
  Output o(call, q);
  TorchTensor row_sum_log2 = need_row_sum_log2 ? call.empty_float32({q.size(0), q.size(1), q.size(2)})
                                               : call.empty_float32({0});
  ForwardParams params;
  fill(params, call, q, k, v, mask, attn_bias, scale, cu_seqlens_q, cu_seqlens_k, distance_bias, alibi_slopes,
       scale_value, groups, causal, window_left, window_right, first_distance, l2norm_qk, allow_tf32);
  params.o = as_tensor(o.rows);
  if (need_row_sum_log2) params.row_sum_log2 = static_cast<float*>(row_sum_log2.data_ptr());
  if (q.numel() > 0) {  // else the pointer to o is null, which asks for partials
    const OptionalTensor workspace = allocate_workspace(params, call, q, k);
    run_forward(params, call.stream());
    o.finish();
  }
  return {o.result, row_sum_log2};
}

std::tuple<TorchTensor, TorchTensor> partials(TorchTensor q, TorchTensor k, TorchTensor v, OptionalTensor mask,
                                              OptionalTensor attn_bias, OptionalTensor scale,
                                              OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                              OptionalTensor distance_bias, OptionalTensor alibi_slopes,
                                              double scale_value, int64_t groups, bool causal, int64_t window_left,
                                              int64_t window_right, int64_t first_distance, bool l2norm_qk,
                                              bool allow_tf32) {
  const Call call(q);
  TorchTensor numerator = call.empty_float32({q.size(0), q.size(1), q.size(2), q.size(3)});
  TorchTensor denominator = call.empty_float32({q.size(0), q.size(1), q.size(2)});
  ForwardParams params;
  fill(params, call, q, k, v, mask, attn_bias, scale, cu_seqlens_q, cu_seqlens_k, distance_bias, alibi_slopes,
       scale_value, groups, causal, window_left, window_right, first_distance, l2norm_qk, allow_tf32);
  params.numerator = static_cast<float*>(numerator.data_ptr());
  params.denominator = static_cast<float*>(denominator.data_ptr());
  if (q.numel() > 0) {
    const OptionalTensor workspace = allocate_workspace(params, call, q, k);
    run_forward(params, call.stream());
  }
  return {numerator, denominator};
}

// Sets the plan and the workspace of a backward pass: pieces of one allocation, which is returned.
TorchTensor allocate_workspace(BackwardParams& params, const Call& call) {
  static_assert(sizeof(int) == sizeof(float), "dq_order lies in a float32 tensor");
  params.plan = plan_backward(params, current_device().num_multiprocessors);
  const BackwardPlan& plan = params.plan;
  const int64_t delta = int64_t(params.batch) * params.num_heads * params.seq_len_q;
  const auto padded = [](int64_t size) { return round_up(size, kWorkspaceBytes / sizeof(float)); };
  constexpr int64_t kFloatsPerRange = sizeof(Range) / sizeof(float);
  const bool is_packed = params.sequences.queries != nullptr;
  const int64_t key_ranges = is_packed ? kFloatsPerRange * params.seq_len_q : 0;
  const int64_t query_ranges = is_packed ? kFloatsPerRange * params.seq_len_k : 0;
  TorchTensor workspace =
      call.empty_float32({padded(delta) + padded(plan.dq_accumulator) + padded(plan.dkv_partials) +
                          padded(plan.num_counters + plan.dq_order) + padded(key_ranges) + padded(query_ranges) +
                          padded(plan.num_distance_scores) + padded(plan.num_diagonals) + padded(plan.distance_sums)});
  float* next = static_cast<float*>(workspace.data_ptr());
  const auto take = [&](int64_t size) {
    float* piece = size == 0 ? nullptr : next;
    next += padded(size);
    return piece;
  };
  params.delta = take(delta);
  params.dq_accumulator = take(plan.dq_accumulator);
  params.dkv_partials = take(plan.dkv_partials);
  params.counters = reinterpret_cast<uint32_t*>(take(plan.num_counters + plan.dq_order));
  if (plan.dq_order > 0) params.dq_order = reinterpret_cast<int*>(params.counters + plan.num_counters);
  params.key_ranges = reinterpret_cast<Range*>(take(key_ranges));
  params.query_ranges = reinterpret_cast<Range*>(take(query_ranges));
  params.distance_scores = plan.distance_scores;
  params.distance_scores.data = take(plan.num_distance_scores);
  params.distance_scores.diagonal = reinterpret_cast<int*>(take(plan.num_diagonals));
  params.distance_sums = take(plan.distance_sums);
  return workspace;
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor> backward(
    TorchTensor dout, TorchTensor q, TorchTensor k, TorchTensor v, OptionalTensor mask, OptionalTensor attn_bias,
    OptionalTensor scale, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor distance_bias,
    OptionalTensor alibi_slopes, double scale_value, TorchTensor o, TorchTensor row_sum_log2,
    OptionalTensor drow_sum_log2, int64_t groups, bool causal, int64_t window_left, int64_t window_right,
    int64_t first_distance, bool l2norm_qk, bool allow_tf32, bool need_dq, bool need_dk, bool need_dv,
    bool need_dattn_bias, bool need_dscale, bool need_ddistance_bias, bool deterministic) {
  const Call call(q);
  // In the layouts of q, k and v as they came, before fill() copies them.
  std::optional<Output> dq, dk, dv;
  if (need_dq) dq.emplace(call, q);
  if (need_dk) dk.emplace(call, k);
  if (need_dv) dv.emplace(call, v);

  BackwardParams params;
  fill(params, call, q, k, v, mask, attn_bias, scale, cu_seqlens_q, cu_seqlens_k, distance_bias, alibi_slopes,
       scale_value, groups, causal, window_left, window_right, first_distance, l2norm_qk, allow_tf32);
  params.deterministic = deterministic;
  if (dq) params.dq = as_tensor(dq->rows);
  if (dk) params.dk = as_tensor(dk->rows);
  if (dv) params.dv = as_tensor(dv->rows);
  params.q_hat = params.q;
  params.k_hat = params.k;
  OptionalTensor q_hat, k_hat;  // where no gradient lends its memory
  if (l2norm_qk) {
    if (!dq) q_hat = call.empty({q.size(0), q.size(1), q.size(2), q.size(3)});
    if (!dk) k_hat = call.empty({k.size(0), k.size(1), k.size(2), k.size(3)});
    params.q_hat = dq ? params.dq : as_tensor(*q_hat);
    params.k_hat = dk ? params.dk : as_tensor(*k_hat);
  }

  o = call.with_aligned_rows(o);
  dout = call.with_aligned_rows(dout);
  row_sum_log2 = as_contiguous(row_sum_log2);
  params.o = as_tensor(o);
  params.dout = as_tensor(dout);
  params.row_sum_log2 = static_cast<const float*>(row_sum_log2.data_ptr());
  if (drow_sum_log2) {
    drow_sum_log2 = as_contiguous(*drow_sum_log2);
    params.drow_sum_log2 = static_cast<const float*>(drow_sum_log2->data_ptr());
  }
  TorchTensor dattn_bias = need_dattn_bias ? call.empty_like(*attn_bias) : call.empty({0});
  if (need_dattn_bias) params.dbias = as_bias(dattn_bias);
  TorchTensor dscale = need_dscale ? call.empty_like(*scale) : call.empty_float32({0});
  if (need_dscale) params.dscale = static_cast<float*>(dscale.data_ptr());
  TorchTensor ddistance_bias = need_ddistance_bias
                                   ? call.empty_float32({distance_bias->size(0), distance_bias->size(1)})
                                   : call.empty_float32({0});
  if (need_ddistance_bias) params.ddistance_bias = static_cast<float*>(ddistance_bias.data_ptr());

  const auto result = [&](const std::optional<Output>& output) { return output ? output->result : call.empty({0}); };
  const TorchTensor grads[] = {result(dq), result(dk), result(dv), dattn_bias, dscale, ddistance_bias};
  if (q.numel() > 0 && k.numel() > 0) {
    const TorchTensor workspace = allocate_workspace(params, call);
    run_backward(params, call.stream());
    for (const std::optional<Output>* output : {&dq, &dk, &dv}) {
      if (*output) (*output)->finish();
    }
  } else {
    // There is no score, hence no gradient; but a broadcast bias and a scale are not empty, nor need q or k be.
    for (const TorchTensor& grad : grads) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(grad.get()));
  }
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

}  // namespace
}  // namespace flash_cosine_sim

STABLE_TORCH_LIBRARY_IMPL(flash_cosine_sim_attention, CUDA, m) {
  m.impl("forward", TORCH_BOX(&flash_cosine_sim::forward));
  m.impl("partials", TORCH_BOX(&flash_cosine_sim::partials));
  m.impl("backward", TORCH_BOX(&flash_cosine_sim::backward));
}
