// What is decided: tile sizes come from the tables, thresholds from heuristics.h.
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "heuristics.h"
#include "walk_splits.h"
#include "sm80/tiles.h"
#include "sm90/tiles.h"

namespace flash_cosine_sim {
namespace {

constexpr int kReservedBytes = 1024;  // which the system takes of each block's shared memory

int64_t group_of(const Attention& params) { return params.num_heads / params.num_kv_heads; }

// How many keys a query sees at most, and queries a key, as far as is known here: of packed sequences' lengths no more
// than their mean is.
int64_t longest_row(const Attention& params, int64_t num_rows) {
  if (params.sequences.queries != nullptr) num_rows = divide_up(num_rows, std::max(params.sequences.num, 1));
  const bool limited = params.window_left >= 0 && params.window_right >= 0;
  return limited ? std::min(num_rows, int64_t{params.window_left} + params.window_right + 1) : num_rows;
}
int64_t keys_of_query(const Attention& params) { return longest_row(params, params.seq_len_k); }
int64_t queries_of_key(const Attention& params) { return longest_row(params, params.seq_len_q); }

// Whether causality alone hides keys; then a row sees half of what it might.
bool is_triangular(const Attention& params) { return params.causal && params.window_left < 0; }

// Whether 2^S may leave float16's range. Of a scale on the device scale_value is the bound. Biases are not known here:
// a positive one lifts P out of it, and of a row whose visible keys all are far away ALiBi leaves nothing.
bool exceeds_fp16(const Attention& params) {
  const bool bounded = params.l2norm_qk && params.bias.data == nullptr && !params.by_distance.exists();
  return !bounded || std::abs(params.scale_value) * params.groups > kLargestFp16Logit;
}

// Whether a tensor map, TMA's view of it, can describe a tensor: a broadcast dimension has no place in one, nor has an
// empty tensor.
bool has_tensor_map(const Tensor& tensor, int batch, int num_heads, int num_rows) {
  return num_rows > 0 && (tensor.stride_batch > 0 || batch == 1) && (tensor.stride_head > 0 || num_heads == 1) &&
         (tensor.stride_row > 0 || num_rows == 1);
}
bool queries_have_tensor_map(const Attention& params, const Tensor& queries) {
  return has_tensor_map(queries, params.batch, params.num_heads, params.seq_len_q);
}
bool keys_have_tensor_map(const Attention& params, const Tensor& keys) {
  return has_tensor_map(keys, params.batch, params.num_kv_heads, params.seq_len_k);
}

int divide_down(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Which distances occur, and a table for them whose entries for a tile begin at a multiple of 16 bytes, wherever
// queries and keys of tiles begin, which is at multiples of 4.
DistanceScores distance_scores_of(const Attention& params) {
  const ByDistance& by_distance = params.by_distance;
  DistanceScores scores;
  scores.least = params.window_right < 0 ? 1 - params.seq_len_q : std::max(1 - params.seq_len_q, -params.window_right);
  scores.most = params.window_left < 0 ? params.seq_len_k - 1 : std::min(params.seq_len_k - 1, params.window_left);
  if (by_distance.bias != nullptr) {
    scores.least = std::max(scores.least, by_distance.first_distance);
    scores.most = std::min(scores.most, by_distance.first_distance + by_distance.num_distances - 1);
  }
  const int diagonal = params.sequences.queries != nullptr ? 0 : params.seq_len_k - params.seq_len_q;
  const int first_of_tile = diagonal + 1;  // that of the last of a multiple of 4 keys
  scores.first = scores.least - DistanceScores::kMargin;
  scores.first -= (scores.first - first_of_tile) & 3;
  const int num = std::max(scores.most - scores.least + 1, 0) + 2 * DistanceScores::kMargin + 3;
  scores.num = (num + 3) / 4 * 4;
  scores.stride_head = by_distance.exists() ? scores.num : 0;
  scores.stride_batch = by_distance.slopes_stride_batch == 0 ? 0 : int64_t(params.num_heads) * scores.num;
  return scores;
}

// What both plans say of by_distance.
template <typename Plan>
void plan_distance_scores(Plan& plan, const Attention& params) {
  if (!params.by_distance.exists() && plan.variant < Variant::kScored) return;
  plan.distance_scores = distance_scores_of(params);
  plan.num_distance_scores = plan.distance_scores.num_rows(params.batch, params.num_heads) * plan.distance_scores.num;
  if (params.by_distance.exists() && params.sequences.queries != nullptr) plan.num_diagonals = params.seq_len_q;
}

// They are there for bfloat16 alone: float16's forward pass, in which P might leave its range, is the portable
// kernel's, and two more files to compile are too many for its backward pass. A step from a query of a tile to the next
// has to be a step in distance, too: where packed sequences have other lengths on the two sides it need not be.
bool adds_distances_in_sm90(const Attention& params) {
  return params.dtype == DType::kBFloat16 && params.sequences.queries == params.sequences.keys;
}

// Of the kernels of sm90/.
Variant variant_of(const Attention& params) {
  if (params.by_distance.exists()) return Variant::kScored;
  return is_banded(params) || params.mask.data != nullptr ? Variant::kBanded : Variant::kCausal;
}

Norm norm_of(const Attention& params, bool in_kernel) {
  return !params.l2norm_qk ? Norm::kNone : in_kernel ? Norm::kKernel : Norm::kPrologue;
}

// A tile of sm80/forward.cuh or sm80/backward.cuh.
template <typename Tile>
int tiles_held(const Gpu& gpu, const Tile& tile, Math math) {
  return blocks_held(gpu, tile.threads(), tile.shared_bytes(element_size(math)), tile.min_blocks());
}
template <typename Tile>
bool fits(const Gpu& gpu, const Tile& tile, Math math) {
  return tile.shared_bytes(element_size(math)) + kReservedBytes <= gpu.shared_bytes && tile.threads() <= gpu.threads;
}

// ---- Forward ----

// What it does not take goes to the portable kernel: a bias, which would have to come by TMA, too; float32; float16
// whose P needs a wider format; memory that TMA cannot describe, to which q_hat and k_hat do not belong.
bool takes_forward_sm90(const ForwardParams& params, const Gpu& gpu) {
  if (!gpu.runs_sm90 || params.bias.data != nullptr) return false;
  const Math math = forward_math_of(params);
  if (math != Math::kBf16 && math != Math::kFp16) return false;
  if (params.by_distance.exists() && !adds_distances_in_sm90(params)) return false;
  return keys_have_tensor_map(params, params.v) &&
         (params.o.data == nullptr || queries_have_tensor_map(params, params.o)) &&
         (params.l2norm_qk || (queries_have_tensor_map(params, params.q) && keys_have_tensor_map(params, params.k)));
}

// That kernel normalises rows of q where it has them in registers, but not groups of their channels.
bool can_normalize_q_in_sm90(const ForwardParams& params, const ForwardSm90Tile& tile) {
  return tile.q_in_registers && params.groups == 1 && queries_have_tensor_map(params, params.q);
}

// Its idle warps can normalise keys, but not groups of their channels, while it works with those that are done.
bool can_normalize_k_ahead_in_sm90(const ForwardParams& params) {
  const int64_t num_queries = group_of(params) * queries_of_key(params);
  return params.groups == 1 && (is_triangular(params) ? num_queries / 2 : num_queries) >= kManyQueriesPerKey;
}

ForwardPlan plan_forward_sm90(const ForwardParams& params) {
  const ForwardSm90Tile& tile = forward_sm90_tile(params.head_dim);
  ForwardPlan plan;
  plan.sm90 = true;
  plan.variant = variant_of(params);
  if (params.mask.data != nullptr) plan.mask_words = params.batch * divide_up(params.seq_len_k, 1024) * (32 + 1 + 1);
  plan.q_norm = norm_of(params, can_normalize_q_in_sm90(params, tile));
  plan.k_norm = norm_of(params, false);
  plan.num_counters = ForwardSm90Counters::kNumWithoutKeys;
  if (params.l2norm_qk && can_normalize_k_ahead_in_sm90(params)) {
    const int64_t num_blocks_k = divide_up(params.seq_len_k, tile.block_k);
    plan.k_norm = Norm::kAhead;
    plan.num_counters = ForwardSm90Counters::kChunksOfBlockDone +
                        int64_t(params.batch) * params.num_kv_heads * num_blocks_k;
  }
  return plan;
}

// Every block of queries of sm80/forward.cuh can normalise all keys anew. Float32's kernels are slower than the launch
// that this saves, and have no registers left.
bool can_normalize_in_sm80(const ForwardParams& params) {
  return params.l2norm_qk && params.groups == 1 && params.dtype != DType::kFloat32 &&
         group_of(params) * params.seq_len_q <= kFewQueries;
}

// Into how many shares the keys of num_tiles tiles go, on a GPU that has at_once blocks at a time. With so many waves
// of blocks, each has to walk over `length` blocks of keys.
int choose_splits(int64_t num_tiles, int64_t num_blocks_k, int64_t at_once) {
  if (num_blocks_k < kBlocksWorthMerging) return 1;
  int64_t num_splits = 1, shortest = divide_up(num_tiles, at_once) * num_blocks_k;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t most = std::min(waves * at_once / num_tiles, num_blocks_k / kLeastBlocksPerSplit);
    if (most < 2) continue;
    const int64_t length = divide_up(num_blocks_k, most);
    if (100 * waves * length >= kWorthAWavePercent * shortest) continue;
    shortest = waves * length;
    num_splits = divide_up(num_blocks_k, length);
  }
  return static_cast<int>(num_splits);
}

// Whether a launch that writes k_hat takes less time than to normalise each key times_each times within the kernel.
bool is_prologue_faster(const ForwardParams& params, int64_t times_each) {
  const int64_t num_channels = int64_t(params.batch) * params.num_kv_heads * params.seq_len_k * params.head_dim;
  return (times_each - kPrologueCopies) * num_channels > kPrologueLaunchChannels;
}

// Plans sm80/forward_split.cuh; without a split if another kernel is faster, or there is none.
ForwardPlan plan_split(const ForwardParams& params, const Gpu& gpu) {
  const int64_t num_kv_heads = int64_t(params.batch) * params.num_kv_heads;
  const int64_t num_rows = group_of(params) * params.seq_len_q;  // that share a key
  const Math math = forward_math_of(params);
  if (num_rows == 0 || num_kv_heads == 0 || !has_split_kernel(math, padded_head_dim(params.head_dim))) return {};
  const bool idle = kIdleShare * num_kv_heads * divide_up(num_rows, kIdleTileRows) <= gpu.num_multiprocessors;
  if (num_rows > kFewRows && !idle) return {};

  const SplitTile& tile = split_tile(math, params.head_dim);
  const int64_t tile_rows = tile.warp_rows() * tile.warps_with_rows(num_rows);
  const int64_t tiles_per_head = divide_up(num_rows, tile_rows);
  const int held = blocks_held(gpu, tile.threads(), tile.shared_bytes(element_size(math)), tile.min_blocks);
  const int num_splits = choose_splits(num_kv_heads * tiles_per_head, divide_up(keys_of_query(params), tile.block_keys),
                                       int64_t(held) * gpu.num_multiprocessors);
  if (num_rows > kFewRows && num_splits == 1) return {};

  ForwardPlan plan;
  plan.num_splits = num_splits;
  if (num_splits > 1) {
    const int64_t num_queries = int64_t(params.batch) * params.num_heads * params.seq_len_q;
    plan.split_sums = num_splits * num_queries * (params.head_dim + kRowSumPlaces);
  }
  const int64_t times_each = tiles_per_head * (split_normalizes_fragments(math) ? tile_rows / tile.warp_rows() : 1);
  // Partials of two shards of the keys may come from two kernels and are added up: all must have the prologue's bits.
  const bool can = params.groups == 1 && params.o.data != nullptr;
  plan.q_norm = norm_of(params, can);
  plan.k_norm = norm_of(params, can && !is_prologue_faster(params, times_each));
  return plan;
}

// ---- Backward ----

bool needs_dq(const BackwardParams& params) { return params.dq.data != nullptr || params.dscale != nullptr; }

// Whether they take q and k as they are: scores are then multiplied by c where what a distance says is added, so that
// there is a table by distance, of zeros if need be. With sums by distance, registers are left for neither. A learned
// scale may be another for each head that shares a key, and dk would be a sum over heads.
bool takes_raw_rows_in_sm90(const BackwardParams& params) {
  return adds_distances_in_sm90(params) && params.ddistance_bias == nullptr && params.scale == nullptr &&
         queries_have_tensor_map(params, params.q) && keys_have_tensor_map(params, params.k);
}

// What it does not take goes to the portable kernel, as above; so do head dims above 128.
bool takes_backward_sm90(const BackwardParams& params, const Gpu& gpu) {
  if (!gpu.runs_sm90 || params.dtype == DType::kFloat32 || params.head_dim > 128 || params.bias.data != nullptr ||
      params.seq_len_q == 0 || params.seq_len_k == 0 || (!params.l2norm_qk && !takes_raw_rows_in_sm90(params))) {
    return false;
  }
  if (params.by_distance.exists() && !adds_distances_in_sm90(params)) return false;
  const auto is_written = [](const Tensor& gradient) { return gradient.data != nullptr; };
  return keys_have_tensor_map(params, params.v) && queries_have_tensor_map(params, params.dout) &&
         (!is_written(params.dk) || keys_have_tensor_map(params, params.dk)) &&
         (!is_written(params.dv) || keys_have_tensor_map(params, params.dv)) &&
         (!is_written(params.dq) || queries_have_tensor_map(params, params.dq));
}

// Its idle warps can normalise rows, but not groups of their channels, and make their delta while it works with
// those that are done.
bool can_prepare_rows_in_sm90(const BackwardParams& params) {
  const int64_t fewest = std::min(group_of(params) * queries_of_key(params), keys_of_query(params));
  return params.l2norm_qk && params.groups == 1 && (is_triangular(params) ? fewest / 2 : fewest) >= kManyProductsPerRow;
}

// The gradients of k and v of every split.
int64_t dkv_partials_of(const BackwardParams& params, int num_splits) {
  return int64_t(num_splits) * 2 * params.batch * params.num_kv_heads * params.seq_len_k * params.head_dim;
}

// How many blocks of queries a block of keys walks over in a head. Of packed sequences, about: they all have the mean
// length.
int64_t blocks_walked(const Attention& params, int64_t first_key, int64_t block_k, int64_t block_q) {
  if (params.sequences.queries != nullptr) {
    const int64_t seen = queries_of_key(params);
    const bool limited = seen < divide_up(params.seq_len_q, std::max(params.sequences.num, 1));
    return divide_up(limited ? std::min<int64_t>(seen + block_k, params.seq_len_q) : seen, block_q);
  }
  const int64_t last_key = std::min<int64_t>(first_key + block_k, params.seq_len_k) - 1;
  const int64_t offset = params.seq_len_k - params.seq_len_q, num_queries = params.seq_len_q;
  const int64_t first = params.window_right < 0 ? 0 : first_key - offset - params.window_right;
  const int64_t end = params.window_left < 0 ? num_queries : last_key - offset + params.window_left + 1;
  const int64_t first_block = std::clamp<int64_t>(first, 0, num_queries) / block_q;
  return std::max<int64_t>(divide_up(std::clamp<int64_t>(end, 0, num_queries), block_q) - first_block, 0);
}

// What walks over queries there are, where num_alike tiles have each block of keys.
Walks walks_of(const BackwardParams& params, int64_t num_alike, int64_t block_k, int64_t block_q, bool always_merged) {
  Walks walks{num_alike, {}, 0, dkv_partials_of(params, 1) * int64_t{sizeof(float)}, always_merged};
  walks.lengths.resize(divide_up(params.seq_len_k, block_k));
  for (size_t i = 0; i < walks.lengths.size(); ++i) {
    walks.lengths[i] = group_of(params) * blocks_walked(params, static_cast<int64_t>(i) * block_k, block_k, block_q);
    walks.pairs += walks.lengths[i];
  }
  // They are, but for windows.
  if (!std::is_sorted(walks.lengths.rbegin(), walks.lengths.rend())) {
    std::sort(walks.lengths.rbegin(), walks.lengths.rend());
  }
  return walks;
}

// Whether there are so many tiles that no walk is cut; their lengths, which may be many, need not be known then.
bool are_many(int64_t num_tiles, int64_t at_once) { return 2 * num_tiles > kMostWavesOfWalks * at_once; }

int choose_splits_sm90(const BackwardParams& params, const BackwardSm90Tile& tile, const Gpu& gpu, bool always_merged) {
  const int64_t num_heads = int64_t(params.batch) * params.num_kv_heads;
  if (are_many(num_heads * divide_up(params.seq_len_k, tile.block_k()), gpu.num_multiprocessors)) return 0;
  const Walks walks = walks_of(params, num_heads, tile.block_k(), tile.block_q, always_merged);
  return static_cast<int>(choose_walk_splits(walks, gpu.num_multiprocessors, kWalkCostsSm90));
}

BackwardPlan plan_backward_sm90(const BackwardParams& params, const Gpu& gpu) {
  const BackwardSm90Tile& tile = backward_sm90_tile(params.head_dim);
  const int64_t num_heads = int64_t(params.batch) * params.num_heads;
  const int64_t num_blocks_q = divide_up(params.seq_len_q, tile.block_q);
  const int64_t num_tiles = int64_t(params.batch) * params.num_kv_heads * divide_up(params.seq_len_k, tile.block_k());
  BackwardPlan plan;
  plan.sm90 = true;
  plan.variant = params.l2norm_qk ? variant_of(params) : Variant::kScored;
  // Its sums by distance are in any order.
  if (params.ddistance_bias != nullptr && !params.deterministic) plan.variant = Variant::kScoredGradient;
  plan.padded_rows = static_cast<int>(num_blocks_q * tile.block_q);
  plan.padded_dim = tile.head_dim;
  plan.block_q = tile.block_q;
  plan.block_k = tile.block_k();
  if (needs_dq(params)) {
    plan.dq_accumulator = num_heads * plan.padded_rows * plan.padded_dim;
    // A turn for each warp.
    if (params.deterministic) plan.dq_order = num_heads * num_blocks_q * (4 * BackwardSm90Tile::kConsumers);
  }
  // Where another kernel needs the rows before this one, a prologue makes them.
  const bool needs_rows_before = params.ddistance_bias != nullptr && plan.variant != Variant::kScoredGradient;
  plan.prepares_rows = can_prepare_rows_in_sm90(params) && !needs_rows_before;
  plan.num_counters = plan.prepares_rows
                          ? BackwardSm90Counters::kChunksOfBlockDone + num_tiles + num_heads * num_blocks_q
                          : BackwardSm90Counters::kNumWithoutRows;
  const bool always_merged = params.groups > 1;  // the main kernel takes dk through the norm of whole rows only
  plan.num_splits = choose_splits_sm90(params, tile, gpu, always_merged);
  if (always_merged) plan.num_splits = std::max(plan.num_splits, 1);
  plan.dkv_partials = dkv_partials_of(params, plan.num_splits);
  return plan;
}

int choose_splits_sm80(const BackwardParams& params, const BackwardTile& tile, const Gpu& gpu) {
  const int64_t num_tiles = int64_t(params.batch) * params.num_kv_heads * divide_up(params.seq_len_k, tile.block_k());
  if (num_tiles == 0) return 0;
  const int64_t group = group_of(params);
  if (!params.l2norm_qk && params.scale_stride != 0) {
    // A factor per head, which a split has but one of. No split may be without a share, for it has no head.
    return static_cast<int>(group > 1 || tile.slices() > 1 ? group : 0);
  }
  // Where a row of dk is in slices, no block has a whole one to take through the norm.
  const bool always_merged = tile.slices() > 1;
  const int least = always_merged ? 1 : 0;
  const int64_t at_once = int64_t(tiles_held(gpu, tile, math_of(params))) * gpu.num_multiprocessors;
  if (are_many(num_tiles * tile.slices(), at_once)) return least;
  const int64_t num_alike = int64_t(params.batch) * params.num_kv_heads * tile.slices();
  const Walks walks = walks_of(params, num_alike, tile.block_k(), tile.block_q, always_merged);
  return std::max(static_cast<int>(choose_walk_splits(walks, at_once, kWalkCostsSm80)), least);
}

BackwardPlan plan_backward_sm80(const BackwardParams& params, const Gpu& gpu) {
  const int64_t num_heads = int64_t(params.batch) * params.num_heads;
  BackwardPlan plan;
  plan.eight_warps = takes_eight_warps(params, gpu);
  const BackwardTile& tile = backward_tile(math_of(params), padded_head_dim(params.head_dim), plan.eight_warps);
  if (needs_dq(params)) {
    plan.dq_accumulator = num_heads * params.seq_len_q * params.head_dim;
    if (params.deterministic) plan.dq_order = tile.slices() * num_heads * divide_up(params.seq_len_q, tile.block_q);
  }
  plan.num_splits = choose_splits_sm80(params, tile, gpu);
  if (plan.dq_order > 0) {
    const int64_t num_tiles = int64_t(params.batch) * params.num_kv_heads * divide_up(params.seq_len_k, tile.block_k());
    plan.num_counters = 1 + num_tiles * std::max(plan.num_splits, 1) * tile.slices();  // a number for each block
  }
  plan.dkv_partials = dkv_partials_of(params, plan.num_splits);
  return plan;
}

// Of the portable kernel of bias gradients: every diagonal of its tiles that has a distance which occurs.
void plan_diagonal_sums(BackwardPlan& plan, const BackwardParams& params) {
  const BiasGradientTile& tile = bias_gradient_tile(math_of(params), padded_head_dim(params.head_dim));
  const int least = plan.distance_scores.least, most = plan.distance_scores.most;
  DiagonalSums& diagonals = plan.diagonals;
  diagonals.block_q = tile.block_q();
  diagonals.block_k = tile.block_k;
  if (most < least) return;
  diagonals.first = divide_down(least - tile.block_q() + tile.block_k, tile.block_k);
  diagonals.num = divide_down(most + tile.block_k - 1, tile.block_k) - diagonals.first + 1;
  plan.distance_sums = int64_t(params.num_heads) * diagonals.num * diagonals.distances();
}

}  // namespace

int blocks_held(const Gpu& gpu, int threads, int shared_bytes, int min_blocks) {
  const int by_memory = gpu.shared_bytes / (shared_bytes + kReservedBytes);
  return std::max(std::min({min_blocks, by_memory, gpu.threads / threads}), 1);
}

int padded_head_dim(int head_dim) {
  for (const int padded : {16, 32, 64, 96, 128, 256}) {
    if (head_dim <= padded) return padded;
  }
  throw std::runtime_error("head_dim must be at most 256, got " + std::to_string(head_dim));
}

Math math_of(const Attention& params) {
  switch (params.dtype) {
    case DType::kBFloat16: return Math::kBf16;
    case DType::kFloat16: return Math::kFp16;
    case DType::kFloat32: return params.allow_tf32 ? Math::kTf32 : Math::kFp32;
  }
  throw std::runtime_error("unknown dtype");
}

Math forward_math_of(const Attention& params) {
  return params.dtype == DType::kFloat16 && exceeds_fp16(params) ? Math::kFp16WideP : math_of(params);
}

bool needs_main_kernel(const BackwardParams& params) {
  return needs_dq(params) || params.dk.data != nullptr || params.dv.data != nullptr;
}

// Not where half as many blocks would leave multiprocessors idle. Warps without a query have nothing to multiply.
bool takes_eight_warps(const ForwardParams& params, const Gpu& gpu) {
  const Math math = forward_math_of(params);
  const int head_dim = padded_head_dim(params.head_dim);
  if (!has_forward_eight_warps(math, head_dim)) return false;
  const ForwardTile &four = forward_tile(math, head_dim, false), &eight = forward_tile(math, head_dim, true);
  const int64_t num_tiles = int64_t(params.batch) * params.num_heads * divide_up(params.seq_len_q, eight.block_q());
  return tiles_held(gpu, four, math) == 1 && fits(gpu, eight, math) && num_tiles >= gpu.num_multiprocessors;
}

// However few tiles are, for their walks are cut. Not where four warps hold all keys: those without one multiply, too.
bool takes_eight_warps(const BackwardParams& params, const Gpu& gpu) {
  const Math math = math_of(params);
  const int head_dim = padded_head_dim(params.head_dim);
  if (!has_backward_eight_warps(math, head_dim)) return false;
  const BackwardTile &four = backward_tile(math, head_dim, false), &eight = backward_tile(math, head_dim, true);
  return tiles_held(gpu, four, math) == 1 && fits(gpu, eight, math) && params.seq_len_k > four.block_k();
}

ForwardPlan plan_forward(const ForwardParams& params, const Gpu& gpu) {
  if (params.num_heads == 0) return {};  // a rank's part of fewer heads than ranks
  ForwardPlan plan = plan_split(params, gpu);
  const bool in_kernel = can_normalize_in_sm80(params);
  if (plan.num_splits > 0) {
  } else if (takes_forward_sm90(params, gpu) && !in_kernel) {
    plan = plan_forward_sm90(params);
  } else {
    plan.eight_warps = takes_eight_warps(params, gpu);
    plan.q_norm = plan.k_norm = norm_of(params, in_kernel);
  }
  plan_distance_scores(plan, params);
  return plan;
}

BackwardPlan plan_backward(const BackwardParams& params, const Gpu& gpu) {
  if (params.batch == 0 || params.num_heads == 0) return {};
  BackwardPlan plan;
  if (needs_main_kernel(params)) {
    plan = takes_backward_sm90(params, gpu) ? plan_backward_sm90(params, gpu) : plan_backward_sm80(params, gpu);
  }
  plan_distance_scores(plan, params);
  if (params.ddistance_bias != nullptr && plan.variant != Variant::kScoredGradient) plan_diagonal_sums(plan, params);
  return plan;
}

}  // namespace flash_cosine_sim
