// Which kernels run, in which order: the inputs' dtype, head dim and options decide.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "launch.h"
#if FLASH_COSINE_SIM_HAS_SM90
#include "tensor_map.h"
#endif
#include "traits.h"

namespace flash_cosine_sim {
namespace {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls function(Constant<the smallest head dim with a kernel that holds head_dim>).
template <typename Function>
void with_head_dim(int head_dim, Function function) {
  if (head_dim <= 16) return function(Constant<16>());
  if (head_dim <= 32) return function(Constant<32>());
  if (head_dim <= 64) return function(Constant<64>());
  if (head_dim <= 96) return function(Constant<96>());
  if (head_dim <= 128) return function(Constant<128>());
  if (head_dim <= 256) return function(Constant<256>());
  throw std::runtime_error("head_dim must be at most 256, got " + std::to_string(head_dim));
}

template <Math kMath>
struct MathConstant {
  static constexpr Math value = kMath;
};

template <typename Function>
void with_math(const Attention& params, Function function) {
  switch (params.dtype) {
    case DType::kBFloat16: return function(MathConstant<Math::kBf16>());
    case DType::kFloat16: return function(MathConstant<Math::kFp16>());
    case DType::kFloat32:
      if (params.allow_tf32) return function(MathConstant<Math::kTf32>());
      return function(MathConstant<Math::kFp32>());
  }
  throw std::runtime_error("unknown dtype");
}

// Whether 2^S may leave float16's range: 2^(10 log2(e)) = 2^14.4 is below its largest number, 2^16, and the
// smallest, 2^-14.4, hardly below its smallest normal one, 2^-14. A scale on the device is not known here.
bool exceeds_fp16(const Attention& params) {
  const bool bounded = params.l2norm_qk && params.bias.data == nullptr && params.scale == nullptr;
  return !bounded || std::abs(params.scale_value) * params.groups > 10.f;
}

#if FLASH_COSINE_SIM_HAS_SM90
// forward_sm90.cuh has no kernel for head dim 16.
template <int kHeadDim>
inline constexpr int kHeadDimSm90 = kHeadDim < 32 ? 32 : kHeadDim;

bool queries_have_tensor_map(const Attention& params, const Tensor& queries) {
  return has_tensor_map(queries, params.batch, params.num_heads, params.seq_len_q);
}
bool keys_have_tensor_map(const Attention& params, const Tensor& keys) {
  return has_tensor_map(keys, params.batch, params.num_kv_heads, params.seq_len_k);
}

// What it does not take goes to the portable kernel: a bias, which would have to come by TMA, too; float32; float16
// whose P needs a wider format; memory that TMA cannot describe, to which q_hat and k_hat do not belong.
bool takes_forward_sm90(const ForwardParams& params) {
  if (current_device().compute_capability != 90 || params.bias.data != nullptr) return false;
  if (params.dtype == DType::kFloat32 || (params.dtype == DType::kFloat16 && exceeds_fp16(params))) return false;
  return keys_have_tensor_map(params, params.v) &&
         (params.o.data == nullptr || queries_have_tensor_map(params, params.o)) &&
         (params.l2norm_qk ||
          (queries_have_tensor_map(params, params.q) && keys_have_tensor_map(params, params.k)));
}

// That kernel normalises rows of q where it has them in registers, but not groups of their channels.
bool can_normalize_q_in_sm90(const ForwardParams& params) {
  bool in_registers = false;
  with_head_dim(params.head_dim, [&](auto head_dim) {
    in_registers = ForwardSm90Traits<Math::kBf16, kHeadDimSm90<head_dim.value>>::kQInRegisters;
  });
  return in_registers && params.groups == 1 && queries_have_tensor_map(params, params.q);
}

template <int kHeadDim>
void run_forward_sm90(const ForwardParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) return launch_forward_sm90<Math::kFp16, kHeadDimSm90<kHeadDim>>(params, stream);
  launch_forward_sm90<Math::kBf16, kHeadDimSm90<kHeadDim>>(params, stream);
}
#endif

// Every block of queries of forward_sm80.cuh can normalise all keys anew: a launch less pays for that up to some 4
// blocks. Float32's kernels are slower than the launch, and have no registers left.
bool can_normalize_in_sm80(const ForwardParams& params, int64_t most_queries) {
  const int group = params.num_heads / params.num_kv_heads;
  return params.l2norm_qk && params.groups == 1 && params.dtype != DType::kFloat32 &&
         int64_t(group) * params.seq_len_q <= most_queries;
}

bool needs_main_kernel(const BackwardParams& params) {
  return params.dq.data != nullptr || params.dscale != nullptr || params.dk.data != nullptr ||
         params.dv.data != nullptr;
}

}  // namespace

ForwardPlan plan_forward(const ForwardParams& params) {
  // Up to one tile of queries forward_sm80.cuh normalises in its own launch. With more, each tile would normalise all
  // keys anew, which costs the GPU more than a launch costs the host: 28 us at 512 queries, 22 with the prologue.
  constexpr int64_t kFewQueries = 128;
  const auto norm = [&](bool in_kernel) {
    return !params.l2norm_qk ? Norm::kNone : in_kernel ? Norm::kKernel : Norm::kPrologue;
  };
  ForwardPlan plan;
#if FLASH_COSINE_SIM_HAS_SM90
  if (takes_forward_sm90(params) && !can_normalize_in_sm80(params, kFewQueries)) {
    plan.sm90 = plan.tile_counter = true;
    plan.q_norm = norm(can_normalize_q_in_sm90(params));
    plan.k_norm = norm(false);
    return plan;
  }
#endif
  plan.q_norm = plan.k_norm = norm(can_normalize_in_sm80(params, kFewQueries));
  return plan;
}

void run_forward(const ForwardParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.seq_len_q == 0) return;
  if (params.plan.k_norm == Norm::kPrologue) {
    launch_normalize(params, params.tile_counter, stream);
  } else if (params.tile_counter != nullptr) {
    CUDA_CHECK(cudaMemsetAsync(params.tile_counter, 0, sizeof(*params.tile_counter), stream));
  }
  with_head_dim(params.head_dim, [&](auto head_dim) {
#if FLASH_COSINE_SIM_HAS_SM90
    if (params.plan.sm90) return run_forward_sm90<head_dim.value>(params, stream);
#endif
    if (params.dtype == DType::kFloat16 && exceeds_fp16(params)) {
      launch_forward_sm80<Math::kFp16WideP, head_dim.value>(params, stream);
    } else {
      with_math(params,
                [&](auto math) { launch_forward_sm80<math.value, head_dim.value>(params, stream); });
    }
  });
}

BackwardPlan plan_backward(const BackwardParams& params, int num_multiprocessors) {
  BackwardPlan plan;
  if (!needs_main_kernel(params) || params.batch == 0) return plan;
  const int64_t num_heads = int64_t(params.batch) * params.num_heads;
  const int64_t num_kv_heads = int64_t(params.batch) * params.num_kv_heads;
  const int group = params.num_heads / params.num_kv_heads;
  const bool needs_dq = params.dq.data != nullptr || params.dscale != nullptr;
  if (needs_dq) plan.dq_accumulator = num_heads * params.seq_len_q * params.head_dim;
  with_math(params, [&](auto math) {
    with_head_dim(params.head_dim, [&](auto head_dim) {
      using Traits = BackwardTraits<math.value, head_dim.value>;
      const int64_t num_blocks_k = (params.seq_len_k + Traits::kBlockK - 1) / Traits::kBlockK;
      const int64_t num_blocks_q = (params.seq_len_q + Traits::kBlockQ - 1) / Traits::kBlockQ;
      if (needs_dq && params.deterministic) plan.dq_order = Traits::kSlices * num_heads * num_blocks_q;
      const int64_t num_blocks = num_kv_heads * num_blocks_k;
      const int64_t items = group * num_blocks_q;  // that each of them walks over
      if (num_blocks == 0) return;
      if (!params.l2norm_qk && params.scale_stride != 0) {
        // A factor per head, which a split has but one of. No split may be without a share, for it has no head.
        plan.num_splits = group > 1 || Traits::kSlices > 1 ? group : 0;
      } else if (2 * num_blocks <= num_multiprocessors && items >= 8) {
        // Too few blocks to fill the GPU: several share the walk, and their sums are added up afterwards.
        const int64_t wanted = (2 * num_multiprocessors + num_blocks - 1) / num_blocks;
        plan.num_splits = static_cast<int>(std::min(wanted, items / 4));
      } else if (Traits::kSlices > 1) {
        plan.num_splits = 1;  // no block has a whole row of dk to take through the norm
      }
    });
  });
  plan.dkv_partials = plan.num_splits * 2 * num_kv_heads * params.seq_len_k * params.head_dim;
  return plan;
}

void run_backward(const BackwardParams& params, cudaStream_t stream) {
  if (params.batch == 0) return;
  if (params.l2norm_qk) launch_normalize(params, nullptr, stream);
  launch_delta(params, stream);
  with_math(params, [&](auto math) {
    with_head_dim(params.head_dim, [&](auto head_dim) {
      // First, for the main kernel may write dk where k_hat is.
      if (params.dbias.data != nullptr) launch_bias_gradient_sm80<math.value, head_dim.value>(params, stream);
      if (!needs_main_kernel(params)) return;
      const BackwardPlan plan = plan_backward(params, 0);
      if (params.dq_accumulator != nullptr) {
        CUDA_CHECK(cudaMemsetAsync(params.dq_accumulator, 0, plan.dq_accumulator * sizeof(float), stream));
      }
      if (params.dq_order != nullptr) {
        CUDA_CHECK(cudaMemsetAsync(params.dq_order, 0, plan.dq_order * sizeof(int), stream));
      }
      if (params.seq_len_k > 0) launch_backward_sm80<math.value, head_dim.value>(params, stream);
    });
  });
  launch_dkv_merge(params, stream);
  launch_dq(params, stream);
}

}  // namespace flash_cosine_sim
