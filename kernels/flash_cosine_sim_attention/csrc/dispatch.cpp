// Which kernels run, in which order: as the plan says.
#include "cuda_check.h"
#include "device.h"
#include "plan.h"

namespace flash_cosine_sim {
namespace {

// On the current device.
Gpu current_gpu() {
  const DeviceProperties& device = current_device();
  return {device.num_multiprocessors, FLASH_COSINE_SIM_HAS_SM90 && device.compute_capability == 90, device.shared_bytes,
          device.threads};
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls function(Constant<the smallest head dim with a kernel that holds head_dim>).
template <typename Function>
void with_head_dim(int head_dim, Function function) {
  switch (padded_head_dim(head_dim)) {
    case 16: return function(Constant<16>());
    case 32: return function(Constant<32>());
    case 64: return function(Constant<64>());
    case 96: return function(Constant<96>());
    case 128: return function(Constant<128>());
    case 256: return function(Constant<256>());
  }
}

template <Math kMath>
struct MathConstant {
  static constexpr Math value = kMath;
};

// Calls function(MathConstant<math>); not with kFp16WideP, which has no backward kernels.
template <typename Function>
void with_math(Math math, Function function) {
  switch (math) {
    case Math::kBf16: return function(MathConstant<Math::kBf16>());
    case Math::kFp16: return function(MathConstant<Math::kFp16>());
    case Math::kFp32: return function(MathConstant<Math::kFp32>());
    case Math::kTf32: return function(MathConstant<Math::kTf32>());
    case Math::kFp16WideP: break;
  }
}

template <typename Function>
void with_forward_math(Math math, Function function) {
  if (math == Math::kFp16WideP) return function(MathConstant<Math::kFp16WideP>());
  with_math(math, function);
}

// Before the main kernel, which may write dk where k_hat is.
void launch_bias_gradients(const BackwardParams& params, cudaStream_t stream) {
  const bool sums_distances = params.ddistance_bias != nullptr && params.plan.variant != Variant::kScoredGradient;
  if (params.dbias.data == nullptr && !sums_distances) return;
  with_math(math_of(params), [&](auto math) {
    with_head_dim(params.head_dim,
                  [&](auto head_dim) { launch_bias_gradient_sm80<math.value, head_dim.value>(params, stream); });
  });
  if (sums_distances) launch_distance_merge(params, stream);
}

#if FLASH_COSINE_SIM_HAS_SM90
// The kernels of sm90/ have none for head dim 16.
template <int kHeadDim>
inline constexpr int kHeadDimSm90 = kHeadDim < 32 ? 32 : kHeadDim;

template <int kHeadDim, Variant kVariant>
void run_backward_sm90(const BackwardParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) return launch_backward_sm90<Math::kFp16, kHeadDim, kVariant>(params, stream);
  launch_backward_sm90<Math::kBf16, kHeadDim, kVariant>(params, stream);
}

template <int kHeadDim>
void run_backward_sm90(const BackwardParams& params, cudaStream_t stream) {
  switch (params.plan.variant) {
    case Variant::kCausal: return run_backward_sm90<kHeadDim, Variant::kCausal>(params, stream);
    case Variant::kBanded: return run_backward_sm90<kHeadDim, Variant::kBanded>(params, stream);
    // These two in bfloat16 alone: plan.cpp.
    case Variant::kScored: return launch_backward_sm90<Math::kBf16, kHeadDim, Variant::kScored>(params, stream);
    case Variant::kScoredGradient:
      return launch_backward_sm90<Math::kBf16, kHeadDim, Variant::kScoredGradient>(params, stream);
  }
}

// Calls function with the constant head dim of sm90/backward.cuh.
template <typename Function>
void with_backward_sm90(int head_dim, Function function) {
  with_head_dim(head_dim, [&](auto padded) {
    if constexpr (padded.value <= 128) function(Constant<kHeadDimSm90<padded.value>>());
  });
}

template <int kHeadDim, Variant kVariant>
void run_forward_sm90(const ForwardParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) return launch_forward_sm90<Math::kFp16, kHeadDim, kVariant>(params, stream);
  launch_forward_sm90<Math::kBf16, kHeadDim, kVariant>(params, stream);
}

template <int kHeadDim>
void run_forward_sm90(const ForwardParams& params, cudaStream_t stream) {
  switch (params.plan.variant) {
    case Variant::kCausal: return run_forward_sm90<kHeadDim, Variant::kCausal>(params, stream);
    case Variant::kBanded: return run_forward_sm90<kHeadDim, Variant::kBanded>(params, stream);
    default: return launch_forward_sm90<Math::kBf16, kHeadDim, Variant::kScored>(params, stream);
  }
}
#endif

}  // namespace

ForwardPlan plan_forward(const ForwardParams& params) { return plan_forward(params, current_gpu()); }

BackwardPlan plan_backward(const BackwardParams& params, int num_multiprocessors) {
  Gpu gpu = current_gpu();
  gpu.num_multiprocessors = num_multiprocessors;
  return plan_backward(params, gpu);
}

void run_forward(const ForwardParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.num_heads == 0 || params.seq_len_q == 0) return;
  const ForwardPlan& plan = params.plan;
  launch_visibility(params, stream);
  if (plan.q_norm == Norm::kPrologue || plan.k_norm == Norm::kPrologue) {
    Attention prologue = params;
    if (plan.k_norm == Norm::kAhead) prologue.k_hat = prologue.k;  // nothing to do
    launch_normalize(prologue, params.counters, plan.num_counters, stream);
  } else if (plan.num_counters > 0) {
    CUDA_CHECK(cudaMemsetAsync(params.counters, 0, plan.num_counters * sizeof(*params.counters), stream));
  }
  with_head_dim(params.head_dim, [&](auto head_dim) {
#if FLASH_COSINE_SIM_HAS_SM90
    constexpr int kPadded = kHeadDimSm90<head_dim.value>;
    if (plan.sm90) return run_forward_sm90<kPadded>(params, stream);
#endif
    with_forward_math(forward_math_of(params), [&](auto math) {
      if constexpr (has_split_kernel(math.value, head_dim.value)) {
        if (plan.num_splits > 0) return launch_forward_split_sm80<math.value, head_dim.value>(params, stream);
      }
      if constexpr (has_forward_eight_warps(math.value, head_dim.value)) {
        if (plan.eight_warps) return launch_forward_sm80<math.value, head_dim.value, true>(params, stream);
      }
      launch_forward_sm80<math.value, head_dim.value, false>(params, stream);
    });
  });
  if (plan.num_splits > 1) launch_forward_merge(params, stream);
}

void run_backward(const BackwardParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.num_heads == 0) return;
  const BackwardPlan& plan = params.plan;
  const int64_t num_counters = plan.num_counters + plan.dq_order;
  launch_visibility(params, stream);
  if (!plan.prepares_rows) {
    launch_preprocess(params, num_counters, stream);
  } else if (num_counters > 0) {
    CUDA_CHECK(cudaMemsetAsync(params.counters, 0, num_counters * sizeof(*params.counters), stream));
  }
#if FLASH_COSINE_SIM_HAS_SM90
  if (plan.sm90) {
    if (plan.variant == Variant::kScoredGradient) {
      const int64_t entries = int64_t{params.num_heads} * params.by_distance.num_distances;
      CUDA_CHECK(cudaMemsetAsync(params.ddistance_bias, 0, entries * sizeof(float), stream));
    }
    launch_bias_gradients(params, stream);
    with_backward_sm90(params.head_dim, [&](auto head_dim) { run_backward_sm90<head_dim.value>(params, stream); });
    if (plan.variant != Variant::kCausal) launch_unseen(params, stream);
    launch_postprocess(params, stream);
    return;
  }
#endif
  launch_bias_gradients(params, stream);
  with_math(math_of(params), [&](auto math) {
    with_head_dim(params.head_dim, [&](auto head_dim) {
      if (!needs_main_kernel(params)) return;
      if (params.dq_accumulator != nullptr) {
        CUDA_CHECK(cudaMemsetAsync(params.dq_accumulator, 0, params.plan.dq_accumulator * sizeof(float), stream));
      }
      if (params.seq_len_k == 0) return;
      if constexpr (has_backward_eight_warps(math.value, head_dim.value)) {
        if (plan.eight_warps) return launch_backward_sm80<math.value, head_dim.value, true>(params, stream);
      }
      launch_backward_sm80<math.value, head_dim.value, false>(params, stream);
    });
  });
  launch_postprocess(params, stream);
}

}  // namespace flash_cosine_sim
