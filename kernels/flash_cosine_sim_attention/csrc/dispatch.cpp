// Which kernels run, in which order: the inputs' dtype, head dim and options decide.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "device.h"
#include "sm80/tiles.h"
#if FLASH_COSINE_SIM_HAS_SM90
#include "sm90/tensor_map.h"
#include "sm90/tiles.h"
#endif

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

template <typename Function>
void with_forward_math(const Attention& params, Function function) {
  if (params.dtype == DType::kFloat16 && exceeds_fp16(params)) return function(MathConstant<Math::kFp16WideP>());
  with_math(params, function);
}

#if FLASH_COSINE_SIM_HAS_SM90
// sm90/forward.cuh has no kernel for head dim 16.
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
         (params.l2norm_qk || (queries_have_tensor_map(params, params.q) && keys_have_tensor_map(params, params.k)));
}

// That kernel normalises rows of q where it has them in registers, but not groups of their channels.
bool can_normalize_q_in_sm90(const ForwardParams& params) {
  bool in_registers = false;
  with_head_dim(params.head_dim, [&](auto head_dim) {
    in_registers = ForwardSm90Traits<Math::kBf16, kHeadDimSm90<head_dim.value>>::kQInRegisters;
  });
  return in_registers && params.groups == 1 && queries_have_tensor_map(params, params.q);
}

// Its idle warps can normalise keys, but not groups of their channels, while it works with those that are done. They
// are slower than the prologue, and hidden if each key is multiplied with many queries.
bool can_normalize_k_ahead_in_sm90(const ForwardParams& params) {
  constexpr int64_t kManyQueries = 256;
  const int64_t num_queries = int64_t(params.num_heads / params.num_kv_heads) * params.seq_len_q;
  return params.groups == 1 && (params.causal ? num_queries / 2 : num_queries) >= kManyQueries;
}

int64_t num_counters_sm90(const ForwardParams& params, Norm k_norm) {
  if (k_norm != Norm::kAhead) return ForwardSm90Counters::kNumWithoutKeys;
  int64_t num_blocks_k = 0;
  with_head_dim(params.head_dim, [&](auto head_dim) {
    constexpr int kBlockK = ForwardSm90Traits<Math::kBf16, kHeadDimSm90<head_dim.value>>::kBlockK;
    num_blocks_k = (params.seq_len_k + kBlockK - 1) / kBlockK;
  });
  return ForwardSm90Counters::kChunksOfBlockDone + int64_t(params.batch) * params.num_kv_heads * num_blocks_k;
}

// What it does not take goes to the portable kernel, as above; so do head dims above 128 and l2norm_qk=False.
bool takes_backward_sm90(const BackwardParams& params) {
  if (current_device().compute_capability != 90 || params.dtype == DType::kFloat32 || !params.l2norm_qk ||
      params.head_dim > 128 || params.bias.data != nullptr || params.seq_len_q == 0 || params.seq_len_k == 0) {
    return false;
  }
  const auto is_written = [](const Tensor& gradient) { return gradient.data != nullptr; };
  return keys_have_tensor_map(params, params.v) && queries_have_tensor_map(params, params.dout) &&
         (!is_written(params.dk) || keys_have_tensor_map(params, params.dk)) &&
         (!is_written(params.dv) || keys_have_tensor_map(params, params.dv)) &&
         (!is_written(params.dq) || queries_have_tensor_map(params, params.dq));
}

// Its idle warps can normalise rows, but not groups of their channels, and make their delta while it works with
// those that are done. They are slower than launches of their own, and hidden if each row is multiplied with many:
// measured, 256 (1 to 3 % faster), not 128 (2 % slower at head dim 64).
bool can_prepare_rows_in_sm90(const BackwardParams& params) {
  constexpr int64_t kManyRows = 256;
  const int64_t num_queries = int64_t(params.num_heads / params.num_kv_heads) * params.seq_len_q;
  const int64_t fewest = std::min<int64_t>(num_queries, params.seq_len_k);
  return params.groups == 1 && (params.causal ? fewest / 2 : fewest) >= kManyRows;
}

template <int kHeadDim>
BackwardPlan plan_backward_sm90(const BackwardParams& params, int num_multiprocessors) {
  using Traits = BackwardSm90Traits<Math::kBf16, kHeadDim>;
  BackwardPlan plan;
  plan.sm90 = true;
  const auto blocks = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  const int64_t num_blocks_q = blocks(params.seq_len_q, Traits::kBlockQ);
  const int64_t num_heads = int64_t(params.batch) * params.num_heads;
  plan.padded_rows = static_cast<int>(num_blocks_q * Traits::kBlockQ);
  plan.padded_dim = kHeadDim;
  plan.block_q = Traits::kBlockQ;
  plan.block_k = Traits::kBlockK;
  if (params.dq.data != nullptr || params.dscale != nullptr) {
    plan.dq_accumulator = num_heads * plan.padded_rows * plan.padded_dim;
    // A turn for each warp.
    if (params.deterministic) plan.dq_order = num_heads * num_blocks_q * (4 * Traits::kConsumers);
  }
  const int64_t num_kv_heads = int64_t(params.batch) * params.num_kv_heads;
  const int64_t num_tiles = num_kv_heads * blocks(params.seq_len_k, Traits::kBlockK);
  plan.prepares_rows = can_prepare_rows_in_sm90(params);
  plan.num_counters = plan.prepares_rows
                          ? BackwardSm90Counters::kChunksOfBlockDone + num_tiles + num_heads * num_blocks_q
                          : BackwardSm90Counters::kNumWithoutRows;
  const int64_t items = params.num_heads / params.num_kv_heads * num_blocks_q;  // that each of them walks over
  if (2 * num_tiles <= num_multiprocessors && items >= 4) {
    // Too few tiles to fill the GPU: several blocks share the walk, and their sums are added up afterwards.
    plan.num_splits = static_cast<int>(std::min(blocks(num_multiprocessors, num_tiles), items / 2));
  } else if (params.groups > 1) {
    plan.num_splits = 1;  // the main kernel takes dk through the norm of whole rows only
  }
  plan.dkv_partials = plan.num_splits * 2 * num_kv_heads * params.seq_len_k * params.head_dim;
  return plan;
}

template <int kHeadDim>
void run_backward_sm90(const BackwardParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) return launch_backward_sm90<Math::kFp16, kHeadDim>(params, stream);
  launch_backward_sm90<Math::kBf16, kHeadDim>(params, stream);
}

// Calls function with the constant head dim of sm90/backward.cuh.
template <typename Function>
void with_backward_sm90(int head_dim, Function function) {
  with_head_dim(head_dim, [&](auto padded) {
    if constexpr (padded.value <= 128) function(Constant<kHeadDimSm90<padded.value>>());
  });
}

template <int kHeadDim>
void run_forward_sm90(const ForwardParams& params, cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) return launch_forward_sm90<Math::kFp16, kHeadDimSm90<kHeadDim>>(params, stream);
  launch_forward_sm90<Math::kBf16, kHeadDimSm90<kHeadDim>>(params, stream);
}
#endif

// Every block of queries of sm80/forward.cuh can normalise all keys anew: a launch less pays for that up to some 4
// blocks. Float32's kernels are slower than the launch, and have no registers left.
bool can_normalize_in_sm80(const ForwardParams& params, int64_t most_queries) {
  const int group = params.num_heads / params.num_kv_heads;
  return params.l2norm_qk && params.groups == 1 && params.dtype != DType::kFloat32 &&
         int64_t(group) * params.seq_len_q <= most_queries;
}

// Into how many shares the keys of num_tiles tiles go, on a GPU that has at_once blocks at a time. With so many waves
// of blocks, each has to walk over `length` blocks of keys; a wave more, and a longer merge, must be worth a tenth of
// the time.
int choose_splits(int64_t num_tiles, int64_t num_blocks_k, int64_t at_once) {
  // A merge takes as long as a multiprocessor does for some 8 blocks; a share of less than 2 hardly gets going.
  constexpr int64_t kWorthMerging = 8, kLeastBlocks = 2, kMostWaves = 4;
  const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  if (num_blocks_k < kWorthMerging) return 1;
  int64_t num_splits = 1, shortest = divide(num_tiles, at_once) * num_blocks_k;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t most = std::min(waves * at_once / num_tiles, num_blocks_k / kLeastBlocks);
    if (most < 2) continue;
    const int64_t length = divide(num_blocks_k, most);
    if (10 * waves * length >= 9 * shortest) continue;
    shortest = waves * length;
    num_splits = divide(num_blocks_k, length);
  }
  return static_cast<int>(num_splits);
}

// Whether a launch that writes k_hat takes less time than to normalise each key times_each times within the kernel. It
// takes as long as the normalisation of so many channels, and then reads and writes them, which takes as long as some
// four normalisations of each.
bool is_prologue_faster(const ForwardParams& params, int64_t times_each) {
  constexpr int64_t kLaunch = 1 << 24, kCopy = 4;
  const int64_t num_channels = int64_t(params.batch) * params.num_kv_heads * params.seq_len_k * params.head_dim;
  return (times_each - kCopy) * num_channels > kLaunch;
}

// Plans sm80/forward_split.cuh; without a split if another kernel is faster.
ForwardPlan plan_split(const ForwardParams& params) {
  // Rows that share a key: with so few, memory decides, and to read keys and values once is best. With more the kernel
  // serves where others would leave most of the GPU idle: sm90/forward.cuh takes less than half of its time otherwise.
  constexpr int64_t kFewRows = 64, kIdleShare = 3;
  ForwardPlan plan;
  const int64_t num_kv_heads = int64_t(params.batch) * params.num_kv_heads;
  const int64_t num_rows = int64_t(params.num_heads / params.num_kv_heads) * params.seq_len_q;
  if (num_rows == 0 || num_kv_heads == 0) return plan;
  const int num_multiprocessors = current_device().num_multiprocessors;
  const bool idle = kIdleShare * num_kv_heads * ((num_rows + 127) / 128) <= num_multiprocessors;
  if (num_rows > kFewRows && !idle) return plan;
  with_forward_math(params, [&](auto math) {
    with_head_dim(params.head_dim, [&](auto head_dim) {
      using Traits = SplitTraits<math.value, head_dim.value>;
      if (!Traits::kExists) return;
      const int64_t tile_rows = Traits::kWarpRows * Traits::warps_with_rows(num_rows);
      const int64_t num_tiles = num_kv_heads * ((num_rows + tile_rows - 1) / tile_rows);
      const int64_t num_blocks_k = (params.seq_len_k + Traits::kBlockKeys - 1) / Traits::kBlockKeys;
      const int num_splits = choose_splits(num_tiles, num_blocks_k, int64_t(Traits::kMinBlocks) * num_multiprocessors);
      if (num_rows > kFewRows && num_splits == 1) return;
      plan.num_splits = num_splits;
      if (num_splits > 1) {
        const int64_t num_queries = int64_t(params.batch) * params.num_heads * params.seq_len_q;
        plan.split_sums = num_splits * num_queries * (params.head_dim + kRowSumPlaces);
      }
      if (params.l2norm_qk) {
        const int64_t times_each = (num_rows + tile_rows - 1) / tile_rows *
                                   (Traits::kNormalizesFragments ? tile_rows / Traits::kWarpRows : 1);
        // Partials of two shards of the keys may come from two kernels and are added up: all must have the prologue's
        // bits.
        const bool can = params.groups == 1 && params.o.data != nullptr;
        plan.q_norm = can ? Norm::kKernel : Norm::kPrologue;
        plan.k_norm = can && !is_prologue_faster(params, times_each) ? Norm::kKernel : Norm::kPrologue;
      }
    });
  });
  return plan;
}

bool needs_main_kernel(const BackwardParams& params) {
  return params.dq.data != nullptr || params.dscale != nullptr || params.dk.data != nullptr ||
         params.dv.data != nullptr;
}

}  // namespace

ForwardPlan plan_forward(const ForwardParams& params) {
  // Up to one tile of queries sm80/forward.cuh normalises in its own launch. With more, each tile would normalise all
  // keys anew, which costs the GPU more than a launch costs the host: 28 us at 512 queries, 22 with the prologue.
  constexpr int64_t kFewQueries = 128;
  const auto norm = [&](bool in_kernel) {
    return !params.l2norm_qk ? Norm::kNone : in_kernel ? Norm::kKernel : Norm::kPrologue;
  };
  ForwardPlan plan = plan_split(params);
  if (plan.num_splits > 0) return plan;
#if FLASH_COSINE_SIM_HAS_SM90
  if (takes_forward_sm90(params) && !can_normalize_in_sm80(params, kFewQueries)) {
    plan.sm90 = true;
    plan.q_norm = norm(can_normalize_q_in_sm90(params));
    plan.k_norm = params.l2norm_qk && can_normalize_k_ahead_in_sm90(params) ? Norm::kAhead : norm(false);
    plan.num_counters = num_counters_sm90(params, plan.k_norm);
    return plan;
  }
#endif
  plan.q_norm = plan.k_norm = norm(can_normalize_in_sm80(params, kFewQueries));
  return plan;
}

void run_forward(const ForwardParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.seq_len_q == 0) return;
  const ForwardPlan& plan = params.plan;
  if (plan.q_norm == Norm::kPrologue || plan.k_norm == Norm::kPrologue) {
    Attention prologue = params;
    if (plan.k_norm == Norm::kAhead) prologue.k_hat = prologue.k;  // nothing to do
    launch_normalize(prologue, params.counters, plan.num_counters, stream);
  } else if (plan.num_counters > 0) {
    CUDA_CHECK(cudaMemsetAsync(params.counters, 0, plan.num_counters * sizeof(*params.counters), stream));
  }
  with_head_dim(params.head_dim, [&](auto head_dim) {
#if FLASH_COSINE_SIM_HAS_SM90
    if (plan.sm90) return run_forward_sm90<head_dim.value>(params, stream);
#endif
    with_forward_math(params, [&](auto math) {
      if constexpr (SplitTraits<math.value, head_dim.value>::kExists) {
        if (plan.num_splits > 0) return launch_forward_split_sm80<math.value, head_dim.value>(params, stream);
      }
      launch_forward_sm80<math.value, head_dim.value>(params, stream);
    });
  });
  if (plan.num_splits > 1) launch_forward_merge(params, stream);
}

BackwardPlan plan_backward(const BackwardParams& params, int num_multiprocessors) {
  BackwardPlan plan;
  if (!needs_main_kernel(params) || params.batch == 0) return plan;
#if FLASH_COSINE_SIM_HAS_SM90
  if (takes_backward_sm90(params)) {
    with_backward_sm90(params.head_dim,
                       [&](auto head_dim) { plan = plan_backward_sm90<head_dim.value>(params, num_multiprocessors); });
    return plan;
  }
#endif
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
  const BackwardPlan& plan = params.plan;
  const int64_t num_counters = plan.num_counters + plan.dq_order;
  if (params.l2norm_qk && !plan.prepares_rows) {
    launch_normalize(params, params.counters, num_counters, stream);
  } else if (num_counters > 0) {
    CUDA_CHECK(cudaMemsetAsync(params.counters, 0, num_counters * sizeof(*params.counters), stream));
  }
#if FLASH_COSINE_SIM_HAS_SM90
  if (plan.sm90) {
    if (!plan.prepares_rows) launch_delta(params, stream);
    with_backward_sm90(params.head_dim, [&](auto head_dim) { run_backward_sm90<head_dim.value>(params, stream); });
    launch_dkv_merge(params, stream);
    launch_dq(params, stream);
    return;
  }
#endif
  launch_delta(params, stream);
  with_math(params, [&](auto math) {
    with_head_dim(params.head_dim, [&](auto head_dim) {
      // First, for the main kernel may write dk where k_hat is.
      if (params.dbias.data != nullptr) launch_bias_gradient_sm80<math.value, head_dim.value>(params, stream);
      if (!needs_main_kernel(params)) return;
      if (params.dq_accumulator != nullptr) {
        CUDA_CHECK(cudaMemsetAsync(params.dq_accumulator, 0, params.plan.dq_accumulator * sizeof(float), stream));
      }
      if (params.seq_len_k > 0) launch_backward_sm80<math.value, head_dim.value>(params, stream);
    });
  });
  launch_dkv_merge(params, stream);
  launch_dq(params, stream);
}

}  // namespace flash_cosine_sim
