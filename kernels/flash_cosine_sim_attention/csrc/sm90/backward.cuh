// Backward, wgmma and TMA:   P = 2^(S - row_sum_log2),  dP = dO V^T,  dS = P * (dP - delta),
//                            dV = P^T dO,  dK^ = dS^T q_hat,  dQ^ = dS k_hat.
//
//                kBlockQ queries
//              +-----------------+      A block takes one tile of keys after the other and walks over the queries that
//   kBlockK    | S^T, dP^T (regs)|      see them, of all heads that share the keys. Consumer warpgroup w owns keys
//   keys       |                 |      [64w, 64w + 64) of it. The producer, a warp, has TMA bring K, V, Q and dO as
//              +-----------------+      memory becomes free, and writes the queries' statistics beside Q.
//
// As in sm80/backward.cuh the keys are the rows, so that P^T and dS^T turn from accumulators into operands of dV and dK
// in registers, and dS goes through shared memory for dQ alone. There the warpgroups meet: each makes its rows, or its
// columns, of dQ from its own keys first and then from the other's. dS has two stages, and a warpgroup that has seen
// the other's dS of a step knows that the other is through with the step before: nothing more has to be waited for.
//
// Staggered (BackwardSm90Traits), the warpgroups take turns: while one makes P and dS, the other multiplies. The first
// is half a step ahead, and makes dQ of a pair in the step after it, when the other's dS is there.
//
// row_sum_log2 and delta are subtracted, and keys hidden, by the tensor cores: statistics.cuh.
//
// Variant::kScored adds what distances say to S, times c if q and k come without the norm; kScoredGradient also adds dS
// up along its diagonals while the products are under way: distances.cuh.
//
// A warp's part of dQ is added to dq_accumulator by a bulk copy, in the order of the accumulators' registers. Blocks of
// other keys add to the same rows, in any order; or, deterministic, in the order of the keys.
#pragma once

#include <algorithm>
#include <type_traits>

#include "sm90/backward_rows.cuh"
#include "device.h"
#include "launch.h"
#include "sm90/distances.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/statistics.cuh"
#include "common/band.cuh"
#include "common/rows.cuh"
#include "common/scores.cuh"
#include "sm90/tensor_map.h"
#include "sm90/tiles/backward.h"
#include "sm90/wgmma.cuh"

namespace flash_cosine_sim {

struct BackwardTensorMaps {
  CUtensorMap q, dout, k, v, dk, dv;
};

template <Math kMath, int kHeadDim, bool kDeterministic, Variant kVariant>
struct BackwardSm90 {
  static constexpr bool kBanded = kVariant != Variant::kCausal, kScored = kVariant >= Variant::kScored;
  static constexpr bool kSumsDistances = kVariant == Variant::kScoredGradient;
  static constexpr bool kRaw = kVariant == Variant::kScored;  // q and k may come without the norm
  using Traits = BackwardSm90Traits<kMath, kHeadDim>;
  using T = Element<kMath>;
  using Statistics = RowStatistics<T>;
  using Rows = RowPreparer<kMath, kHeadDim>;
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockK = Traits::kBlockK, kStages = Traits::kStages;
  static constexpr int kPanelBytes = Traits::kPanelBytes, kPanels = Traits::kPanels, kPanelDim = Traits::kPanelDim;
  static constexpr int kPanelBytesK = Traits::kPanelBytesK, kPanelDimK = Traits::kPanelDimK;
  static constexpr int kSlices = kBlockQ / 16;
  // Waiting for turns takes the registers that a prefetch would need.
  static constexpr bool kPrefetchScores = Traits::kPrefetchScores && !kDeterministic;
  static constexpr bool kStaggered = Traits::kStaggered && !kDeterministic;
  static constexpr int kSteps = kHeadDim / 16;  // of the contraction over the head dim
  static constexpr bool kHandsOnBlocks = kVariant == Variant::kBanded;
  using Distances = DistancePiece<kBlockQ, kBlockK>;

  struct Work {
    int batch, kv_head, block_k, split;
  };
  static constexpr int kNoMoreTiles = -1;  // as the block of keys

  static __device__ __forceinline__ Work find_work(const BackwardParams& params, const BackwardSchedule& schedule,
                                                   unsigned tile) {
    const unsigned split = tile % schedule.num_splits;
    const HeadSections::Place place = schedule.kv_heads.find(tile / schedule.num_splits, schedule.num_blocks_k);
    return {static_cast<int>(place.head / params.num_kv_heads), static_cast<int>(place.head % params.num_kv_heads),
            static_cast<int>(place.item), static_cast<int>(split)};
  }

  // The (head, block of queries) pairs of a tile, head by head.
  struct Walk {
    int head, block_q;
    int first_block_q, end_block_q;  // of each head
    int count;                       // of the pairs that are left

    // kBanded: `blocks` is walk_of the tile.
    __device__ __forceinline__ Walk(const BackwardParams& params, const BackwardSchedule& schedule, const Work& work,
                                    const Range& blocks) {
      if constexpr (kBanded) {
        first_block_q = blocks.first;
        end_block_q = blocks.end;
        count = 0;
        if (first_block_q == end_block_q) return;
      } else {
        const int first_query = work.block_k * kBlockK - (params.seq_len_k - params.seq_len_q);  // that sees a key
        end_block_q = (params.seq_len_q + kBlockQ - 1) / kBlockQ;
        first_block_q = params.causal ? max(first_query, 0) / kBlockQ : 0;
      }
      const int num_blocks_q = end_block_q - first_block_q, group = params.num_heads / params.num_kv_heads;
      const int share = group * num_blocks_q / schedule.num_splits;
      const int remainder = group * num_blocks_q % schedule.num_splits;
      const int begin = work.split * share + min(work.split, remainder);
      count = share + (work.split < remainder);
      head = work.kv_head * group + begin / num_blocks_q;
      block_q = first_block_q + begin % num_blocks_q;
    }

    // The block of queries, counted through all heads.
    __device__ __forceinline__ int number(const BackwardParams& params, const Work& work) const {
      const int num_blocks_q = kBanded ? params.plan.padded_rows / kBlockQ : end_block_q;
      return (work.batch * params.num_heads + head) * num_blocks_q + block_q;
    }

    __device__ __forceinline__ void advance() {
      --count;
      ++block_q;
      if (block_q == end_block_q) {
        block_q = first_block_q;
        ++head;
      }
    }
  };

  // Addresses in shared memory. Every tile has a barrier for its arrival and one for the end of its use.
  struct Shared {
    uint32_t base;

    __device__ __forceinline__ uint32_t k() const { return base; }
    __device__ __forceinline__ uint32_t v() const { return base + Traits::kOffsetV; }
    __device__ __forceinline__ uint32_t q(int stage) const {
      return base + Traits::kOffsetQ + stage * Traits::kTileBytesQ;
    }
    __device__ __forceinline__ uint32_t dout(int stage) const {
      return base + Traits::kOffsetDO + stage * Traits::kTileBytesQ;
    }
    __device__ __forceinline__ uint32_t ds(int stage) const {
      return base + Traits::kOffsetDS + stage * Traits::kTileBytesDS;
    }
    __device__ __forceinline__ uint32_t staging(int warp) const {
      return base + Traits::kOffsetStaging + warp * Traits::kStagingBytes;
    }
    __device__ __forceinline__ uint32_t statistics(int stage) const {
      return base + Traits::kOffsetStatistics + stage * (kBlockQ * kRowStatisticsBytes);
    }
    __device__ __forceinline__ uint32_t factors() const { return base + Traits::kOffsetFactors; }
    __device__ __forceinline__ uint32_t distances(int stage) const {
      return base + Traits::kOffsetDistances + stage * Traits::kDistanceBytes;
    }
    __device__ __forceinline__ uint32_t work() const { return base + Traits::kOffsetWork; }
    __device__ __forceinline__ uint32_t queries_of_row(int row) const { return base + Traits::kOffsetRanges + 8 * row; }
    __device__ __forceinline__ uint32_t blocks() const { return base + Traits::kOffsetBlocks; }
    __device__ __forceinline__ uint32_t rows(int warp) const {
      return base + Traits::kOffsetRows + warp * (Traits::kRowBuffers * Traits::kRowBufferBytes);
    }
    __device__ __forceinline__ uint32_t barrier(int index) const { return base + Traits::kOffsetBarriers + 8 * index; }
    __device__ __forceinline__ uint32_t k_full() const { return barrier(0); }
    __device__ __forceinline__ uint32_t k_empty() const { return barrier(1); }
    __device__ __forceinline__ uint32_t v_full() const { return barrier(2); }
    __device__ __forceinline__ uint32_t v_empty() const { return barrier(3); }
    __device__ __forceinline__ uint32_t q_full(int stage) const { return barrier(4 + stage); }
    __device__ __forceinline__ uint32_t q_empty(int stage) const { return barrier(4 + kStages + stage); }
    __device__ __forceinline__ uint32_t dout_full(int stage) const { return barrier(4 + 2 * kStages + stage); }
    __device__ __forceinline__ uint32_t dout_empty(int stage) const { return barrier(4 + 3 * kStages + stage); }
    __device__ __forceinline__ uint32_t ds_full(int stage, int warpgroup) const {
      return barrier(4 + (4 + warpgroup) * kStages + stage);
    }
  };

  using Stage = RingStage<kStages>;

  static __device__ __forceinline__ void initialise(const Shared& shared) {
    if (threadIdx.x == 0) {
      constexpr int kConsumerWarps = 4 * Traits::kConsumers;  // one lane of each arrives
      mbarrier_init(shared.k_full(), 1);
      mbarrier_init(shared.v_full(), 1);
      mbarrier_init(shared.k_empty(), kConsumerWarps);
      mbarrier_init(shared.v_empty(), kConsumerWarps);
      for (int stage = 0; stage < kStages; ++stage) {
        mbarrier_init(shared.q_full(stage), 2);  // for Q and for its statistics
        mbarrier_init(shared.dout_full(stage), 1);
        mbarrier_init(shared.q_empty(stage), kConsumerWarps);
        mbarrier_init(shared.dout_empty(stage), kConsumerWarps);
        for (int warpgroup = 0; warpgroup < Traits::kConsumers; ++warpgroup) {
          mbarrier_init(shared.ds_full(stage, warpgroup), 1);
        }
      }
      fence_mbarrier_init();
    }
    __syncthreads();
  }

  // A warp. Its first lane alone asks for tiles and waits for memory to become free, but for that of Q, for whose
  // statistics all lanes wait: no barrier may be two phases ahead of a lane that waits for it.
  struct Producer {
    const BackwardParams& params;
    const BackwardTensorMaps& maps;
    const BackwardSchedule& schedule;
    const Shared shared;
    uint32_t k_parity = 0;
    Stage stage;

    static constexpr int kRowsPerLane = kBlockQ / 32;
    struct RowNumbers {  // of queries lane, lane + 32 ... of a block
      float delta[kRowsPerLane], row_sum_log2[kRowsPerLane];
    };

    static __device__ __forceinline__ int lane() { return threadIdx.x & 31; }
    static __device__ __forceinline__ bool is_leader() { return lane() == 0; }

    template <int kRows, int kPanelDim>
    __device__ __forceinline__ void load(const CUtensorMap& map, uint32_t tile, uint32_t full, int row, int head,
                                         int batch) {
      load_panels<kRows, kPanelDim, kHeadDim / kPanelDim>(&map, tile, full, row, head, batch);
    }

    // Until the rows of a block are prepared.
    template <int kRows>
    __device__ __forceinline__ void await_rows(unsigned counter) {
      while (load_acquire(params.counters + counter) < kRows / Traits::kChunkRows) __nanosleep(64);
      fence_proxy_async_global();  // other threads' st.global before TMA, here and in the consumers
    }

    __device__ __forceinline__ void await_queries(int head, int block) {
      if (!params.plan.prepares_rows) return;
      await_rows<kBlockQ>(Rows::queries_counter(params, schedule, head, block));
    }

    __device__ __forceinline__ void await_keys(const Work& work) {
      if (!params.plan.prepares_rows) return;
      const int kv_head = work.batch * params.num_kv_heads + work.kv_head;
      await_rows<kBlockK>(Rows::keys_counter(schedule, kv_head, work.block_k));
    }

    // Nobody sees queries that do not exist.
    __device__ __forceinline__ RowNumbers load_row_numbers(int head, int block) const {
      RowNumbers numbers;
      const int first = block * kBlockQ + lane();
      const int64_t row = int64_t(head) * params.seq_len_q + first;
      const float *delta = params.delta + row, *row_sum_log2 = params.row_sum_log2 + row;
#pragma unroll
      for (int i = 0; i < kRowsPerLane; ++i) {
        const bool exists = first + 32 * i < params.seq_len_q;
        numbers.delta[i] = exists ? delta[32 * i] : 0.f;
        numbers.row_sum_log2[i] = exists ? row_sum_log2[32 * i] : -INFINITY;
        if constexpr (kRaw) numbers.row_sum_log2[i] *= schedule.row_sum_scale;
      }
      return numbers;
    }

    __device__ __forceinline__ void write_statistics(const RowNumbers& numbers) const {
#pragma unroll
      for (int i = 0; i < kRowsPerLane; ++i) {
        Statistics::store(shared.statistics(stage.index), lane() + 32 * i, numbers.delta[i], numbers.row_sum_log2[i]);
      }
      fence_proxy_async();
      __syncwarp();
      if (is_leader()) mbarrier_arrive(shared.q_full(stage.index));
    }

    __device__ __forceinline__ void load_q(const Work& work, const Walk& walk) {
      const uint32_t full = shared.q_full(stage.index);
      const int head = work.batch * params.num_heads + walk.head;
      // First, for each of the two takes almost a microsecond, and memory becomes free meanwhile.
      await_queries(head, walk.block_q);
      const RowNumbers numbers = load_row_numbers(head, walk.block_q);
      mbarrier_wait(shared.q_empty(stage.index), stage.parity ^ 1);
      if (is_leader()) {
        mbarrier_arrive_expect_tx(full, Traits::kTileBytesQ + (kScored ? Distances::kBytes : 0));
        load<kBlockQ, kPanelDim>(maps.q, shared.q(stage.index), full, walk.block_q * kBlockQ, walk.head, work.batch);
      }
      write_statistics(numbers);
      // Last, when the numbers are no longer in registers. Opaque: what is the same for the whole walk is not worth
      // any.
      if constexpr (kScored) {
        if (!is_leader()) return;
        Distances::load(params, shared.distances(stage.index), full, opaque(work.batch), walk.head,
                        walk.block_q * kBlockQ, opaque(work.block_k) * kBlockK);
      }
    }

    __device__ __forceinline__ void load_dout(const Work& work, const Walk& walk) {
      const uint32_t full = shared.dout_full(stage.index);
      mbarrier_wait(shared.dout_empty(stage.index), stage.parity ^ 1);
      mbarrier_arrive_expect_tx(full, Traits::kTileBytesQ);
      load<kBlockQ, kPanelDim>(maps.dout, shared.dout(stage.index), full, walk.block_q * kBlockQ, walk.head,
                               work.batch);
    }

    __device__ __forceinline__ void load_v(const Work& work) {
      mbarrier_wait(shared.v_empty(), k_parity ^ 1);
      mbarrier_arrive_expect_tx(shared.v_full(), Traits::kTileBytesK);
      load<kBlockK, kPanelDim>(maps.v, shared.v(), shared.v_full(), work.block_k * kBlockK, work.kv_head, work.batch);
    }

    // What a tile is shares the barriers of its K: it is there when K is, and no longer read when K is not.
    __device__ __forceinline__ void announce(const Work& work) {
      mbarrier_wait(shared.k_empty(), k_parity ^ 1);
      store_shared_v4_s32(shared.work(), {work.batch, work.kv_head, work.block_k, work.split});
    }

    __device__ __forceinline__ void load_k(const Work& work, const Range& blocks) {
      await_keys(work);
      announce(work);
      if constexpr (kHandsOnBlocks) store_shared_v2_s32(shared.blocks(), {blocks.first, blocks.end});
      mbarrier_arrive_expect_tx(shared.k_full(), Traits::kTileBytesK);
      load<kBlockK, kPanelDimK>(maps.k, shared.k(), shared.k_full(), work.block_k * kBlockK, work.kv_head, work.batch);
    }

    // The answer, which takes a microsecond, is the leader's alone.
    __device__ __forceinline__ unsigned ask_for_tile() const {
      return is_leader() ? atomic_increment(params.counters + BackwardSm90Counters::kTilesTaken) : 0;
    }

    // Whether a mask leaves no key of the tile.
    __device__ __forceinline__ bool is_hidden(const Work& work) const {
      if (params.mask.data == nullptr) return false;
      bool sees = false;
      for (int row = lane(); row < kBlockK; row += 32) {
        const int key = work.block_k * kBlockK + row;
        sees |= key < params.seq_len_k &&
                params.mask.data[work.batch * params.mask.stride_batch + key * params.mask.stride_key];
      }
      return __any_sync(0xffffffffu, sees) == 0;
    }

    // In the order in which memory becomes free. Returns the answer to ask_for_tile, for which it asks when little is
    // left to do, but no sooner: tiles would go to blocks that are not the first to be through.
    __device__ __forceinline__ unsigned load_tile(const Work& work) {
      Range blocks{};
      if constexpr (kBanded) blocks = walk_of(params, work.block_k, kBlockQ, kBlockK);
      Walk walk(params, schedule, work, blocks);
      unsigned answer = 0;
      if (kBanded && !kDeterministic && is_hidden(work)) walk.count = 0;
      if (walk.count <= 1) answer = ask_for_tile();
      // A causal mask leaves to the last keys so few queries that some splits have none; banded, nobody may see a
      // tile's keys. launch_postprocess and launch_unseen know.
      if (walk.count == 0) return answer;
      load_q(work, walk);
      if (is_leader()) {
        load_v(work);
        load_dout(work, walk);
        load_k(work, blocks);
      }
      k_parity ^= 1;
      stage.advance();
      walk.advance();
#pragma unroll 1
      for (; walk.count > 0; walk.advance()) {
        if (walk.count == 1) answer = ask_for_tile();
        load_q(work, walk);
        if (is_leader()) load_dout(work, walk);
        stage.advance();
      }
      return answer;
    }

    // The block's own number is its first tile. Which ones follow depends on how far other blocks are. Where a tile
    // waits for others, the first is no exception: those that it waits for have been begun, whatever else the GPU does.
    __device__ __forceinline__ void load_tiles() {
      const auto receive = [](unsigned answer) { return __shfl_sync(0xffffffffu, answer, 0); };
      unsigned tile = kDeterministic ? receive(ask_for_tile()) : blockIdx.x;
      while (tile < static_cast<unsigned>(schedule.num_tiles)) {
        tile = schedule.num_static_tiles + receive(load_tile(find_work(params, schedule, tile)));
      }
      if (is_leader()) {
        announce({0, 0, kNoMoreTiles, 0});
        mbarrier_arrive(shared.k_full());
      }
    }
  };

  // A warpgroup; what it holds is a warp's share, 16 keys. Of dQ it has 16 queries.
  struct Consumer {
    const BackwardParams& params;
    const BackwardSchedule& schedule;
    const Shared shared;
    const int warp, warpgroup;
    const int offset_ds;  // where in dS the lane stores
    uint32_t k_parity = 0;
    Stage stage;
    int turn = -1;   // kDeterministic: which of dq_order is passed on once the last addition to dQ is done
    int last_block;  // of queries, counted through all heads: that of the tile's pair before, or negative
    Range uncut;     // kKeepsUncut: see find_uncut
    static constexpr bool kKeepsUncut = kBanded && kVariant != Variant::kScoredGradient;  // it has no registers left

    float scores[kBlockQ / 8][4], dp[kBlockQ / 8][4];
    uint32_t p[kSlices][4], ds[kSlices][4];
    float dk[kHeadDim / 8][4], dv[kHeadDim / 8][4];
    struct Nothing {};
    std::conditional_t<kSumsDistances, DiagonalReducer<kBlockQ / 8>, Nothing> diagonals;  // of dS

    // Opaque, or it would be two registers instead of one.
    __device__ __forceinline__ Consumer(const BackwardParams& params, const BackwardSchedule& schedule,
                                        const Shared& shared, int warp)
        : params(params), schedule(schedule), shared(shared), warp(warp), warpgroup(warp / 4),
          offset_ds(opaque(find_offset_ds(warp))) {}

    static __device__ __forceinline__ int find_offset_ds(int warp) {
      const int lane = threadIdx.x & 31;
      const int row = (lane & 7) + ((lane >> 4) << 3), chunk = 2 * (warp % 4) + ((lane >> 3) & 1);
      return warp / 4 * Traits::kPanelTileBytesDS + swizzle<Traits::kPanelBytesDS>(row, chunk);
    }

    // kStaggered: the first warpgroup is ahead of the second, and makes dQ of a pair during the next one.
    __device__ __forceinline__ bool is_ahead() const { return kStaggered && warpgroup == 0; }

    // Until the other warpgroup has written its dS of a pair.
    __device__ __forceinline__ void wait_for_other(const Stage& pair) const {
      mbarrier_wait(shared.ds_full(pair.index, warpgroup ^ 1), pair.parity);
    }

    __device__ __forceinline__ void wait_for_warpgroup() const { named_barrier_sync<128>(1 + warpgroup); }

    // Waits for a tile and its K.
    __device__ __forceinline__ Work receive() {
      mbarrier_wait(shared.k_full(), k_parity);
      int work[4];
      read_work(work, shared.work());
      return {work[0], work[1], work[2], work[3]};
    }

    // kBanded: the blocks of queries that the tile walks over, which the producer has looked up, where there are
    // registers to hand them on: of packed sequences they are in global memory. Lane 0 alone reads: see read_work.
    __device__ __forceinline__ Range walked_blocks(const Work& work) const {
      if constexpr (!kBanded) return {};
      if constexpr (!kHandsOnBlocks) return walk_of(params, work.block_k, kBlockQ, kBlockK);
      int blocks[2] = {0, 0};
      if ((threadIdx.x & 31) == 0) load_shared_v2_s32(blocks, shared.blocks());
      return {__shfl_sync(0xffffffffu, blocks[0], 0), __shfl_sync(0xffffffffu, blocks[1], 0)};
    }

    // The factors of the statistics, a row a key: they hide keys that do not exist or are masked.
    __device__ __forceinline__ void write_factors(const Work& work) const {
      const int thread = opaque(static_cast<int>(threadIdx.x)) % 128, row = 64 * warpgroup + thread % 64;
      const int key = work.block_k * kBlockK + row;
      bool visible = key < params.seq_len_k;
      if (visible && params.mask.data != nullptr) {
        visible = params.mask.data[work.batch * params.mask.stride_batch + key * params.mask.stride_key];
      }
      int words[4];
      Statistics::factors(words, visible);
      // Half of the threads write the columns that are all zeros.
      const bool zeros = thread >= 64;
      // kBanded: the queries that see each key, for all of the tile, as a table may be in global memory. Keys behind
      // the last are like it.
      Range queries{};
      if constexpr (kKeepsUncut) queries = queries_of(params, min(key, params.seq_len_k - 1));
      const uint32_t address = shared.factors() + row / 8 * (8 * kRowStatisticsBytes) + row % 8 * 16;
      wait_for_warpgroup();  // of the tile before nobody is multiplying any more
      store_shared_v4_s32(address + (zeros ? 128 : 0), {zeros ? 0 : words[0], zeros ? 0 : words[1], 0, 0});
      if (kKeepsUncut && !zeros) store_shared_v2_s32(shared.queries_of_row(row), {queries.first, queries.end});
      fence_proxy_async();
      wait_for_warpgroup();
    }

    __device__ __forceinline__ void begin_tile(const Work& work) {
      write_factors(work);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0.f;
      }
      pin(dk);
      pin(dv);
    }

    // Starts x = [a | f] [b | r]^T for the warpgroup's keys in a tile a and the queries in a tile b. `columns` says
    // which of the statistics, where the two matrices of 8 columns are.
    template <int kPanelBytesA>
    __device__ __forceinline__ void start_scores(float (&x)[kBlockQ / 8][4], uint32_t tile_a, uint32_t tile_b,
                                                 uint32_t columns) const {
      // Opaque: a is the same for the whole walk, but its descriptors would occupy registers through it.
      const uint32_t rows_a = opaque(static_cast<int>((tile_a + warpgroup * 64 * kPanelBytesA) / 16));
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        constexpr int kStepsA = kPanelBytesA / 32, kStepsB = kPanelBytes / 32;  // of a panel
        const uint32_t offset_a = step / kStepsA * (kBlockK * kPanelBytesA / 16) + 2 * (step % kStepsA);
        const uint32_t offset_b = step / kStepsB * (kBlockQ * kPanelBytes / 16) + 2 * (step % kStepsB);
        const uint64_t a = make_descriptor<kPanelBytesA>(rows_a + offset_a);
        const uint64_t b = make_descriptor<kPanelBytes>(tile_b / 16 + offset_b);
        if (step == 0) {
          wgmma_ss<T, false, false>(x, a, b);
        } else {
          wgmma_ss<T, true, false>(x, a, b);
        }
      }
      const uint32_t factors = (shared.factors() + warpgroup * 64 * kRowStatisticsBytes) / 16;
      wgmma_ss<T, true, false>(x, make_plain_descriptor(factors | 128 / 16 << 16), make_plain_descriptor(columns));
      wgmma_commit();
    }

    // Starts S for the queries that arrive next in stage `next`.
    __device__ __forceinline__ void start_s(const Stage& next) {
      mbarrier_wait(shared.q_full(next.index), next.parity);
      // The second matrix meets factors of zero: it is the first again.
      start_scores<kPanelBytesK>(scores, shared.k(), shared.q(next.index), (shared.statistics(next.index) + 128) / 16);
    }

    __device__ __forceinline__ void start_dp() {
      mbarrier_wait(shared.dout_full(stage.index), stage.parity);
      start_scores<kPanelBytes>(dp, shared.v(), shared.dout(stage.index),
                                shared.statistics(stage.index) / 16 | 128 / 16 << 16);
    }

    // Blocks of queries before `first` are cut where a key's range begins, those from `end` on where one ends; others
    // see all of the warpgroup's keys. A range that ends with the last query cuts none.
    __device__ __forceinline__ Range find_uncut() const {
      const int row = 64 * warpgroup;
      int of_first[2], of_last[2];
      load_shared_v2_s32(of_first, shared.queries_of_row(row));
      load_shared_v2_s32(of_last, shared.queries_of_row(row + 63));
      return {(of_last[0] + kBlockQ - 1) / kBlockQ,
              of_first[1] >= params.seq_len_q ? (1 << 30) : of_first[1] / kBlockQ};
    }

    // Whether a key of the warpgroup is hidden from a query of the pair.
    __device__ __forceinline__ bool is_cut(const Work& work, const Walk& walk) const {
      if constexpr (kKeepsUncut) return walk.block_q < uncut.first || walk.block_q >= uncut.end;
      const int first_query = walk.block_q * kBlockQ;
      // Opaque: it is the same for the whole walk, but not worth registers through it.
      const int first_key = opaque(work.block_k * kBlockK + 64 * warpgroup);
      return !queries_of_rows(params, first_key, 64)
                  .sees_all(first_query, min(first_query + kBlockQ, params.seq_len_q));
    }

    // Hides keys from the queries that do not see them.
    __device__ __forceinline__ void mask_band(const Work& work, const Walk& walk) {
      if constexpr (kKeepsUncut) {
        // Opaque: nothing of it is worth a register through the walk.
        const int lane = opaque(static_cast<int>(threadIdx.x & 31)), first_query = walk.block_q * kBlockQ;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int queries[2];
          load_shared_v2_s32(queries, shared.queries_of_row(16 * warp + 8 * half + (lane >> 2)));
          const int first = queries[0] - first_query, end = queries[1] - first_query;
          hide(scores, half, lane_columns_outside<kBlockQ>(lane, first, end));
        }
      } else {
        mask_edges(work, walk);
      }
    }

    // The same, one end after the other, each a register. Bits would take all predicates, and registers for what those
    // hold otherwise.
    __device__ __forceinline__ void mask_edges(const Work& work, const Walk& walk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        const bool is_end = i % 2;
        const int edge = edge_of(work, walk, half, is_end);
#pragma unroll
        for (int n = 0; n < kBlockQ / 8; ++n) {
#pragma unroll
          for (int column = 8 * n; column < 8 * n + 2; ++column) {
            if (is_end ? column >= edge : column < edge) scores[n][2 * half + column % 2] = -infinity();
          }
        }
      }
    }

    // The first column of the lane whose query sees the lane's key of a half, or the first behind those.
    __device__ __forceinline__ int edge_of(const Work& work, const Walk& walk, int half, bool is_end) const {
      const int lane = opaque(static_cast<int>(threadIdx.x & 31));
      const int key = work.block_k * kBlockK + 16 * warp + 8 * half + (lane >> 2);
      const Range queries = key < params.seq_len_k ? queries_of(params, key) : Range{0, 0};
      return opaque((is_end ? queries.end : queries.first) - walk.block_q * kBlockQ - 2 * (lane & 3));
    }

    // Hides from queries the keys behind them.
    __device__ __forceinline__ void mask_diagonal(const Work& work, const Walk& walk) {
      // Opaque: most calls of the loop around this one are skipped, and nothing of it is worth a register there.
      const int lane = opaque(static_cast<int>(threadIdx.x & 31)), diagonal = params.seq_len_k - params.seq_len_q;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = work.block_k * kBlockK + 16 * warp + 8 * half + (lane >> 2);
        const int first_column = key - diagonal - walk.block_q * kBlockQ - 2 * (lane & 3);  // that sees the key
#pragma unroll
        for (int n = 0; n < kBlockQ / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (8 * n + i < first_column) scores[n][2 * half + i] = -infinity();
          }
        }
      }
    }

    __device__ __forceinline__ bool is_on_diagonal(const Work& work, const Walk& walk) const {
      const int last_key = work.block_k * kBlockK + 64 * warpgroup + 63;
      return params.causal && last_key > walk.block_q * kBlockQ + params.seq_len_k - params.seq_len_q;
    }

    // S -> P. Its rounding waits until dS has been made of it.
    __device__ __forceinline__ void exponentiate() {
#pragma unroll
      for (auto& columns : scores) {
#pragma unroll
        for (float& x : columns) x = ex2_approx_ftz(x);
      }
      pin(scores);
    }

    // dP - delta -> dS; both rounded, dS also to shared memory, rows of queries.
    __device__ __forceinline__ void make_ds() {
      const uint32_t tile = shared.ds(stage.index) + offset_ds;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
        for (int n = 2 * slice; n < 2 * slice + 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dp[n][i] *= scores[n][i];
          if constexpr (kSumsDistances) diagonals.take(dp[n], n);
        }
        accumulator_to_a<kMath>(p[slice], scores, slice);
        accumulator_to_a<kMath>(ds[slice], dp, slice);
        stmatrix_x4_trans(tile + slice * (16 * Traits::kPanelBytesDS), ds[slice]);
      }
    }

    // Starts gradient += x b for x of the warpgroup's keys and queries, and a tile b of queries.
    __device__ __forceinline__ void start_gradient(float (&gradient)[kHeadDim / 8][4], const uint32_t (&x)[kSlices][4],
                                                   uint32_t tile_b) const {
      const uint32_t first = tile_b / 16 | (kBlockQ * kPanelBytes / 16) << 16;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        wgmma_rs<T, true, true>(gradient, x[slice], make_descriptor<kPanelBytes>(first + slice * kPanelBytes));
      }
      wgmma_commit();
    }

    using GradientQ = float[Traits::kColumnsDQ / 8][4];

    // Starts dQ (+)= dS K for the keys of one warpgroup.
    template <bool kAccumulate>
    __device__ __forceinline__ void start_dq(GradientQ& dq, const Stage& pair, int keys_of) const {
      constexpr int kFirstRow = Traits::kSplitRows ? 64 * Traits::kPanelBytesDS : 0;
      constexpr int kFirstColumn = Traits::kSplitRows ? 0 : Traits::kColumnsDQ / kPanelDimK * kBlockK * kPanelBytesK;
      const uint32_t a = (shared.ds(pair.index) + keys_of * Traits::kPanelTileBytesDS + warpgroup * kFirstRow) / 16;
      const uint32_t b = (shared.k() + keys_of * 64 * kPanelBytesK + warpgroup * kFirstColumn) / 16 |
                         (kBlockK * kPanelBytesK / 16) << 16;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint64_t keys_a = make_descriptor<Traits::kPanelBytesDS>(a + 2 * step);
        const uint64_t keys_b = make_descriptor<kPanelBytesK>(b + step * kPanelBytesK);
        if (step > 0 || kAccumulate) {
          wgmma_ss<T, true, true>(dq, keys_a, keys_b);
        } else {
          wgmma_ss<T, false, true>(dq, keys_a, keys_b);
        }
      }
    }

    // The other's keys come last: if it has not been waited for, its dS may not be there yet.
    __device__ __forceinline__ void start_dq(GradientQ& dq, const Stage& pair) const {
      wgmma_fence();
      start_dq<false>(dq, pair, warpgroup);
      if constexpr (!kStaggered) {
        wgmma_commit();
        wait_for_other(pair);
        wgmma_fence();
      }
      start_dq<true>(dq, pair, warpgroup ^ 1);
      wgmma_commit();
    }

    // The staging memory may be written: what was there has left it.
    __device__ __forceinline__ void reuse_staging() {
      if ((threadIdx.x & 31) == 0) tma_store_wait_read();
      __syncwarp();
    }

    // The last addition to dQ is done, and it is the turn of the next block of keys.
    __device__ __forceinline__ void pass_turn(const Work& work) {
      if (turn >= 0 && (threadIdx.x & 31) == 0) {
        tma_store_wait();
        __threadfence();
        store_release(params.dq_order + turn, work.block_k + 1);
      }
      turn = -1;
    }

    __device__ __forceinline__ void wait_for_turn(const Work& work, int block) {
      turn = block * (4 * Traits::kConsumers) + warp;
      if constexpr (kBanded) {
        const int block_q = block % (params.plan.padded_rows / kBlockQ);
        if (has_first_turn(params, work.block_k, block_q, kBlockQ, kBlockK)) return;
      }
      if ((threadIdx.x & 31) == 0) {
        while (load_acquire(params.dq_order + turn) != work.block_k) __nanosleep(32);
      }
    }

    // Adds the warp's part of dQ to dq_accumulator.
    __device__ __forceinline__ void add_dq(const Work& work, int block, const GradientQ& dq) {
      if (params.dq_accumulator == nullptr || block < 0) return;
      const int lane = threadIdx.x & 31;
      const uint32_t staging = shared.staging(warp);
      if constexpr (kDeterministic) pass_turn(work);
      reuse_staging();
#pragma unroll
      for (int n = 0; n < Traits::kColumnsDQ / 8; ++n) {
        store_shared_v4_f32(staging + n * 512 + lane * 16, dq[n][0], dq[n][1], dq[n][2], dq[n][3]);
      }
      fence_proxy_async();
      __syncwarp();
      if constexpr (kDeterministic) wait_for_turn(work, block);
      if (lane == 0) {
        const int row = Traits::kSplitRows ? 16 * warp : 16 * (warp % 4);
        const int column = Traits::kSplitRows ? 0 : warpgroup * Traits::kColumnsDQ;
        float* target = params.dq_accumulator + (int64_t(block) * kBlockQ + row) * kHeadDim + column * 16;
        bulk_add_f32(target, staging, Traits::kStagingBytes);
        tma_store_commit();
      }
    }

    // kSumsDistances: adds the warp's dS to ddistance_bias.
    __device__ __forceinline__ void add_by_distance(const Work& work, const Walk& walk) const {
      const ByDistance& by_distance = params.by_distance;
      const int diagonal = params.sequences.queries != nullptr ? 0 : params.seq_len_k - params.seq_len_q;
      const int first_key = work.block_k * kBlockK + 16 * warp;
      const int place = walk.block_q * kBlockQ + diagonal - first_key - by_distance.first_distance;
      float* target = params.ddistance_bias + int64_t{walk.head} * by_distance.num_distances;
      diagonals.finish([&](int number, float sum) {
        const unsigned own = place + number;
        if (own < static_cast<unsigned>(by_distance.num_distances)) red_add_f32(target + own, sum);
      });
    }

    // One pair of the walk. With kPrefetchScores its S is there. Ends with dK under way.
    template <bool kLast>
    __device__ __forceinline__ void step(const Work& work, const Walk& walk) {
      if constexpr (!kPrefetchScores) start_s(stage);
      start_dp();
      if constexpr (!kPrefetchScores) {
        wgmma_wait<1>();
        pin(scores);
      }
      if constexpr (kScored) {
        Distances::add_transposed(scores, kRaw ? schedule.score_scale : 1.f, shared.distances(stage.index), 16 * warp);
      }
      if constexpr (kBanded) {
        if (is_cut(work, walk)) mask_band(work, walk);
      } else {
        if (is_on_diagonal(work, walk)) mask_diagonal(work, walk);
      }
      exponentiate();
      // dO came long ago; what counts is the branch in this wait. Without one, ptxas puts the 2^x, which are to run
      // beside the product, behind it.
      mbarrier_wait(shared.dout_full(stage.index), stage.parity);
      const Stage pair_of_dq = is_ahead() ? stage.previous() : stage;
      // So the warpgroups write dS in turn, and whoever does knows that the other has read what was there.
      if constexpr (kStaggered) wait_for_other(pair_of_dq);
      wgmma_wait<0>();
      pin(dp);
      if constexpr (kLast) release(shared.v_empty());
      // Its own warps may still read each other's, which they do after the pair's barrier.
      if (is_ahead()) wait_for_warpgroup();
      make_ds();
      fence_proxy_async();
      wgmma_fence();
      start_gradient(dv, p, shared.dout(stage.index));
      wait_for_warpgroup();
      if (threadIdx.x % 128 == 0) mbarrier_arrive(shared.ds_full(stage.index, warpgroup));
      // Beside dV, for dQ takes the registers; the other warpgroup keeps the tensor cores busy.
      if constexpr (kSumsDistances && kStaggered) add_by_distance(work, walk);
      GradientQ dq;
      // A tile's first pair has none before it: whatever is there is multiplied, for products must not be conditional.
      start_dq(dq, pair_of_dq);
      start_gradient(dk, ds, shared.q(stage.index));
      if constexpr (kSumsDistances && !kStaggered) add_by_distance(work, walk);
      wgmma_wait<kStaggered ? 2 : 3>();
      release(shared.dout_empty(stage.index));
      wgmma_wait<1>();
      pin(dq);
      if (kLast && !is_ahead()) release(shared.k_empty());
      const int block = walk.number(params, work);
      add_dq(work, is_ahead() ? last_block : block, dq);
      last_block = block;
    }

    // dK and dV of a tile.
    __device__ __forceinline__ void multiply(const Work& work) {
      Walk walk(params, schedule, work, walked_blocks(work));
      if constexpr (kKeepsUncut) {
        // Known to be the same in all lanes: they need no registers of theirs.
        uncut = find_uncut();
        uncut = {__shfl_sync(0xffffffffu, uncut.first, 0), __shfl_sync(0xffffffffu, uncut.end, 0)};
      }
      mbarrier_wait(shared.v_full(), k_parity);
      k_parity ^= 1;
      last_block = -1;
      if constexpr (kPrefetchScores) {
        start_s(stage);
        wgmma_wait<0>();
        pin(scores);
      }
#pragma unroll 1
      for (; walk.count > 1; walk.advance()) {
        step<false>(work, walk);
        const uint32_t q_empty = shared.q_empty(stage.index);
        stage.advance();
        if constexpr (kPrefetchScores) {
          start_s(stage);
          wgmma_wait<1>();
          release(q_empty);
          // ptxas gives up on products that are under way when a loop closes, if their results are read in it.
          wgmma_wait<0>();
          pin(scores);
        } else {
          wgmma_wait<0>();
          release(q_empty);
        }
      }
      step<true>(work, walk);
      wgmma_wait<0>();
      pin(dk);
      pin(dv);
      release(shared.q_empty(stage.index));
      stage.advance();
    }

    // is_ahead(): dQ of the tile's last pair.
    __device__ __forceinline__ void finish_dq(const Work& work) {
      // Not is_ahead(): its answer is not worth a register through the walk.
      if (!kStaggered || __shfl_sync(0xffffffffu, opaque(static_cast<int>(threadIdx.x)) / 128, 0) != 0) return;
      wait_for_other(stage.previous());
      GradientQ dq;
      start_dq(dq, stage.previous());
      wgmma_wait<0>();
      pin(dq);
      release(shared.k_empty());
      add_dq(work, last_block, dq);
    }

    // The warp's rows of a gradient, through its staging memory. TMA leaves out what is beyond the last key.
    __device__ __forceinline__ void write_rows(const CUtensorMap& map, const Work& work,
                                               const float (&gradient)[kHeadDim / 8][4]) {
      const uint32_t staging = shared.staging(warp);
      reuse_staging();
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        float columns[kPanelDim / 8][4];
#pragma unroll
        for (int n = 0; n < kPanelDim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) columns[n][i] = gradient[panel * (kPanelDim / 8) + n][i];
        }
        store_accumulator<kMath, kPanelBytes>(staging + panel * (16 * kPanelBytes), columns, 0, 0);
      }
      fence_proxy_async();
      __syncwarp();
      if ((threadIdx.x & 31) == 0) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          tma_store_4d(&map, staging + panel * (16 * kPanelBytes), panel * kPanelDim,
                       work.block_k * kBlockK + 16 * warp, work.kv_head, work.batch);
        }
        tma_store_commit();
      }
    }

    // The warp's rows of k as the user gave it, as pairs of columns in the order of the accumulators.
    __device__ __forceinline__ void load_raw_k(const Work& work, uint32_t (&raw)[kHeadDim / 8][2]) const {
      const int lane = threadIdx.x & 31;
      const T* k = static_cast<const T*>(params.k.data) + work.batch * params.k.stride_batch +
                   work.kv_head * params.k.stride_head;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = work.block_k * kBlockK + 16 * warp + 8 * half + (lane >> 2);
        const T* row = k + key * params.k.stride_row + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          const bool exists = key < params.seq_len_k && 8 * n < params.head_dim;
          raw[n][half] = exists ? *reinterpret_cast<const uint32_t*>(row + 8 * n) : 0;
        }
      }
    }

    // The gradient of k^ becomes that of k. Four neighbouring lanes hold a row.
    __device__ __forceinline__ void project_dk(const Work& work) {
      uint32_t raw[kHeadDim / 8][2];
      load_raw_k(work, raw);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kHeadDim / 4], gradient[kHeadDim / 4];
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          const float2 pair = unpack<T>(raw[n][half]);
          x[2 * n] = pair.x;
          x[2 * n + 1] = pair.y;
#pragma unroll
          for (int i = 0; i < 2; ++i) gradient[2 * n + i] = dk[n][2 * half + i];
        }
        rows::project_together<T>(x, gradient, 4);
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) dk[n][2 * half + i] = gradient[2 * n + i];
        }
      }
    }

    __device__ __forceinline__ void write_partial(const Work& work, int which,
                                                  const float (&gradient)[kHeadDim / 8][4]) const {
      const int lane = threadIdx.x & 31;
      const int64_t heads = int64_t(params.batch) * params.num_kv_heads;
      const int64_t head = (int64_t(work.split) * 2 + which) * heads + int64_t(work.batch) * params.num_kv_heads +
                           work.kv_head;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = work.block_k * kBlockK + 16 * warp + 8 * half + (lane >> 2);
        if (key >= params.seq_len_k) continue;
        // Opaque: the halves of their signs would occupy registers through the walk.
        const int num_keys = opaque(params.seq_len_k), head_dim = opaque(params.head_dim);
        float* row = params.dkv_partials + (head * num_keys + key) * head_dim + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          if (8 * n >= params.head_dim) continue;
          *reinterpret_cast<float2*>(row + 8 * n) = make_float2(gradient[n][2 * half], gradient[n][2 * half + 1]);
        }
      }
    }

    __device__ __forceinline__ void write_gradients(const BackwardTensorMaps& maps, const Work& work) {
      const bool is_whole = params.plan.num_splits == 0;
      if constexpr (kDeterministic) pass_turn(work);
      // dK^ = scale dS^T q^, and q_hat = scale log2(e) q^.
      const float factor = kRaw ? kLn2 * schedule.score_scale : kLn2;
#pragma unroll
      for (auto& columns : dk) {
#pragma unroll
        for (float& x : columns) x *= factor;
      }
      if (is_whole) {
        if (params.dv.data != nullptr) write_rows(maps.dv, work, dv);
        finish_dq(work);  // the other warpgroup has come so far by now
        if (params.dk.data == nullptr) return;
        if (!kRaw || params.l2norm_qk) project_dk(work);
        write_rows(maps.dk, work, dk);
      } else {
        finish_dq(work);
        write_partial(work, 0, dk);
        write_partial(work, 1, dv);
      }
    }
  };
};

template <Math kMath, int kHeadDim, bool kDeterministic, Variant kVariant>
__global__ void __launch_bounds__(BackwardSm90Traits<kMath, kHeadDim>::kThreads, 1)
    backward_sm90_kernel(const __grid_constant__ BackwardParams params, const __grid_constant__ BackwardTensorMaps maps,
                         const __grid_constant__ BackwardSchedule schedule) {
  using B = BackwardSm90<kMath, kHeadDim, kDeterministic, kVariant>;
  extern __shared__ __align__(1024) char memory[];
  const typename B::Shared shared{shared_address(memory)};
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be a warp's
  B::initialise(shared);

  if (warp >= 4 * B::Traits::kConsumers) {
    setmaxnreg_dec<B::Traits::kProducerRegisters>();
    if (warp > 4 * B::Traits::kConsumers) {
      const uint32_t buffers = shared.rows(warp - (4 * B::Traits::kConsumers + 1));
      if (params.plan.prepares_rows) typename B::Rows{params, schedule, buffers}.prepare_chunks();
      return;
    }
    if (threadIdx.x % 32 == 0) {
      for (const CUtensorMap* map : {&maps.q, &maps.dout, &maps.k, &maps.v}) prefetch_tensor_map(map);
    }
    typename B::Producer{params, maps, schedule, shared}.load_tiles();
  } else {
    setmaxnreg_inc<B::Traits::kConsumerRegisters>();
    typename B::Consumer consumer(params, schedule, shared, warp);
    for (auto work = consumer.receive(); work.block_k != B::kNoMoreTiles; work = consumer.receive()) {
      consumer.begin_tile(work);
      consumer.multiply(work);
      consumer.write_gradients(maps, work);
    }
    tma_store_wait_read();  // this block's shared memory lives until then
  }
}

template <Math kMath, int kHeadDim, Variant kVariant>
void launch_backward_sm90(const BackwardParams& params, cudaStream_t stream) {
  using Traits = BackwardSm90Traits<kMath, kHeadDim>;
  constexpr int64_t kSectionBytes = 16 << 20;  // of Q, dO and dq_accumulator
  const auto make_map = [&](const Tensor& tensor, int num_heads, int num_rows, int box_columns, int box_rows) {
    return make_tensor_map(tensor, params.dtype, params.batch, num_heads, num_rows, params.head_dim, box_columns,
                           box_rows);
  };
  const auto keys_map = [&](const Tensor& tensor, int box_columns, int box_rows) {
    return make_map(tensor, params.num_kv_heads, params.seq_len_k, box_columns, box_rows);
  };
  BackwardTensorMaps maps{};
  maps.q = make_map(params.q_hat, params.num_heads, params.seq_len_q, Traits::kPanelDim, Traits::kBlockQ);
  maps.dout = make_map(params.dout, params.num_heads, params.seq_len_q, Traits::kPanelDim, Traits::kBlockQ);
  maps.k = keys_map(params.k_hat, Traits::kPanelDimK, Traits::kBlockK);
  maps.v = keys_map(params.v, Traits::kPanelDim, Traits::kBlockK);
  if (params.dk.data != nullptr) maps.dk = keys_map(params.dk, Traits::kPanelDim, 16);
  if (params.dv.data != nullptr) maps.dv = keys_map(params.dv, Traits::kPanelDim, 16);

  BackwardSchedule schedule;
  if (!params.l2norm_qk) {
    schedule.score_scale = params.scale_value * kLog2E;
    schedule.row_sum_scale = 1.f / schedule.score_scale;
  }
  schedule.num_blocks_k = (params.seq_len_k + Traits::kBlockK - 1) / Traits::kBlockK;
  schedule.num_splits = std::max(params.plan.num_splits, 1);
  const int64_t num_tiles = int64_t(params.batch) * params.num_kv_heads * schedule.num_blocks_k * schedule.num_splits;
  schedule.num_tiles = static_cast<int>(num_tiles);
  const int64_t bytes_per_head =
      8 * int64_t(params.seq_len_q) * params.head_dim * params.num_heads / params.num_kv_heads + 1;
  const int num_kv_heads = params.batch * params.num_kv_heads;
  const int num_multiprocessors = current_device().num_multiprocessors;
  const auto num_blocks = static_cast<unsigned>(std::min<int64_t>(num_tiles, num_multiprocessors));
  const int tiles_per_head = schedule.num_blocks_k * schedule.num_splits;
  schedule.num_static_tiles = params.dq_order == nullptr ? num_blocks : 0;
  const bool packed = params.sequences.queries != nullptr;
  if (packed || (params.causal && params.window_left < 0)) {
    schedule.kv_heads = HeadSections::make(num_kv_heads, static_cast<int>(kSectionBytes / bytes_per_head) + 1,
                                           heads_to_balance(tiles_per_head, num_multiprocessors, packed));
    schedule.prepared_kv_heads = schedule.kv_heads;
  } else {
    // All tiles are alike, and a head's follow each other. Rows are prepared for the heads that begin together.
    schedule.kv_heads = HeadSections::make(num_kv_heads, 1, 1);
    schedule.prepared_kv_heads = HeadSections::make(num_kv_heads, num_blocks / tiles_per_head + 1, 1);
  }
  const int64_t chunks_per_kv_head = int64_t(schedule.num_blocks_k) * (Traits::kBlockK / Traits::kChunkRows) +
                                     int64_t(params.num_heads / params.num_kv_heads) *
                                         (params.plan.padded_rows / Traits::kChunkRows);
  schedule.num_chunks = static_cast<int>(num_kv_heads * chunks_per_kv_head);
  const auto launch = [&]<bool kDeterministic>() {
    constexpr auto kKernel = backward_sm90_kernel<kMath, kHeadDim, kDeterministic, kVariant>;
    constexpr int kBytes = kVariant >= Variant::kScored ? Traits::kSharedBytesScored : Traits::kSharedBytes;
    allow_shared_memory<kKernel, kBytes>();
    kKernel<<<num_blocks, Traits::kThreads, kBytes, stream>>>(params, maps, schedule);
    CUDA_CHECK(cudaGetLastError());
  };
  if constexpr (kVariant == Variant::kScoredGradient) {
    launch.template operator()<false>();
  } else if (params.dq_order == nullptr) {
    launch.template operator()<false>();
  } else {
    launch.template operator()<true>();
  }
}

}  // namespace flash_cosine_sim
