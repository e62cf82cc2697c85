// Forward, wgmma and TMA:   P = 2^(q_hat k_hat^T),  O = P V / rowsum(P).
//
//                 kBlockK keys
//              +---------------+        A block takes one tile of queries after the other. Consumer warpgroup w owns
//   kBlockQ    |  S, P  (regs) |        its rows [64w, 64w + 64) and walks over the keys from the last to the first,
//   queries    |               |        which puts blocks that a mask cuts at the start, into a loop of their own.
//              +---------------+        The producer, one thread, has TMA bring q, K and V as memory becomes free. The
//                                       warps beside it can normalise keys meanwhile, for all blocks.
//
// As in sm80/forward.cuh P is 2^S as it comes from the tensor cores, nothing is ever rescaled, O is divided by the sum
// of P as rounded for the product with V, and the backward pass gets the sum of P itself.
//
// A step of a warpgroup. Tensor cores work in the order of issue; | marks where it waits for them.
//   kSliced   16 keys: P = 2^S, start O += P V; the next 16; ...; start the next S = q k^T | its K, this V are free
//   else      start the next S = q k^T and O += P V | S is there: P' = 2^S, in place | P is free: P = P' rounded
//
// Banded, a tile walks over the blocks of keys that one of its queries sees, and whether a block needs more than 2^S is
// asked block by block: windows and packed sequences cut at both ends, a mask anywhere. Only the producer looks at the
// mask, which is in global memory, and ahead of the products: it hands the walk on, step by step. Scored, what
// distances add comes beside V and is added beside the 2^x, or, not kSliced, beside K and as soon as S is there.
#pragma once

#include <algorithm>
#include <type_traits>

#include "device.h"
#include "launch.h"
#include "sm90/pipeline.cuh"
#include "sm90/queue.cuh"
#include "common/band.cuh"
#include "common/rows.cuh"
#include "common/scores.cuh"
#include "sm90/distances.cuh"
#include "sm90/sections.h"
#include "sm90/tensor_map.h"
#include "sm90/tiles/forward.h"
#include "sm90/wgmma.cuh"

namespace flash_cosine_sim {

struct ForwardTensorMaps {
  CUtensorMap q, k, v, o;
};

// Tiles in the order in which they are begun: a block that is through with one takes the next. A section is of heads
// whose keys and values fit into the L2 cache together. A causal mask makes the last queries of a section the longest
// work: they come first, so that short work fills the end.
//
// Norm::kAhead takes chunks of keys in the order in which tiles need them: those that begin together need the last keys
// of all of their heads first.
struct ForwardSchedule {
  HeadSections heads, kv_heads;
  int num_blocks_q, num_tiles;
  int chunks_per_kv_head, num_chunks;
};

// kExactSum: the backward pass will need the sum of P itself. It costs an addition a score, measured as 3.6 % of the
// time at head dim 64.
template <Math kMath, int kHeadDim, bool kExactSum, Variant kVariant>
struct ForwardSm90 {
  static constexpr bool kBanded = kVariant != Variant::kCausal, kScored = kVariant == Variant::kScored;
  using Traits = ForwardSm90Traits<kMath, kHeadDim>;
  using T = Element<kMath>;
  static constexpr int kBlockQ = Traits::kBlockQ, kBlockK = Traits::kBlockK, kStages = Traits::kStages;
  static constexpr int kPanelBytes = Traits::kPanelBytes, kPanels = Traits::kPanels, kPanelDim = Traits::kPanelDim;
  static constexpr bool kOnes = Traits::kOnes;
  static constexpr int kSlices = kBlockK / 16;
  // kScored: entries of distances are added beside the 2^x, 16 keys at a time, and come with V; or all at once as soon
  // as scores are there, and come with K, where V may come too late for that.
  static constexpr bool kAddsInSlices = kScored && Traits::kSliced, kAddsAtOnce = kScored && !Traits::kSliced;
  using Distances = DistancePiece<kBlockQ, kBlockK>;

  struct Work {
    int batch, head, kv_head, first_query;
  };
  static constexpr int kNoMoreTiles = -1;  // as the first query

  static __device__ __forceinline__ Work find_work(const ForwardParams& params, const ForwardSchedule& schedule,
                                                   unsigned tile) {
    const unsigned num_blocks_q = schedule.num_blocks_q;
    const HeadSections::Place place = schedule.heads.find(tile, num_blocks_q);
    const int head = place.head % params.num_heads;
    return {static_cast<int>(place.head / params.num_heads), head, head / (params.num_heads / params.num_kv_heads),
            static_cast<int>(kBanded || params.causal ? num_blocks_q - 1 - place.item : place.item) * kBlockQ};
  }

  // Which counter counts the chunks of a block of k_hat that are there, with Norm::kAhead.
  static __device__ __forceinline__ unsigned chunks_done(const ForwardParams& params, unsigned kv_head, int block) {
    const unsigned num_blocks_k = (params.seq_len_k + kBlockK - 1) / kBlockK;
    return ForwardSm90Counters::kChunksOfBlockDone + kv_head * num_blocks_k + block;
  }

  // How many blocks of keys queries [first_query, first_query + num_queries) see, as far as causality and lengths go.
  static __device__ __forceinline__ int count_blocks(const ForwardParams& params, int first_query, int num_queries) {
    if (first_query >= params.seq_len_q) return 0;
    int num_keys = params.seq_len_k;
    if (params.causal) {
      const int end_query = min(first_query + num_queries, params.seq_len_q);
      num_keys = min(num_keys, max(0, end_query + params.seq_len_k - params.seq_len_q));
    }
    return (num_keys + kBlockK - 1) / kBlockK;
  }

  // How many of them, from the first key on, need nothing between the products but 2^S.
  static __device__ __forceinline__ int count_plain_blocks(const ForwardParams& params, int first_query) {
    if (!params.l2norm_qk) return 0;
    int num_keys = params.seq_len_k;
    if (params.causal) num_keys = min(num_keys, max(0, first_query + 1 + params.seq_len_k - params.seq_len_q));
    return num_keys / kBlockK;
  }

  // kBanded: a step of the walk of a tile, for the consumers: which keys, and whether the mask leaves all of them.
  struct Step {
    int code;

    static __device__ __forceinline__ Step make(int word, bool is_whole) { return {32 * word + (is_whole ? 1 : 0)}; }
    static __device__ __forceinline__ Step none() { return {-(1 << 30)}; }

    __device__ __forceinline__ bool exists() const { return code >= 0; }
    __device__ __forceinline__ int first_key() const { return code & ~31; }  // far below 0: there is none
    __device__ __forceinline__ bool is_whole() const { return (code & 1) != 0; }
  };

  // What follows takes registers that the producer has up to head dim 128.
  static constexpr bool kSpacious = kHeadDim <= 128;
  // kBanded: the producer looks up the keys of the next tile before the last values of this one. Up to a head dim of 64
  // calls with padding are slower for it, and no others faster.
  static constexpr bool kLooksAhead = kSpacious && kHeadDim > 64;
  static constexpr int kFirstKeyStep = kSpacious ? 32 : kBlockK;  // what blocks of a tile begin with is a multiple of

  // kBanded: the blocks of keys that a tile walks over, from the last to the first, but for those that a mask leaves
  // nothing of. They begin with the first key that the tile sees, rounded down to a word of the mask: where a window or
  // a sequence begins, little of a block is wasted. What the mask says of 1024 keys is kept, for they are ten blocks,
  // and memory is far away.
  struct Walk {
    static constexpr int kWordsPerBlock = kBlockK / 32;  // of bits of keys; each has a bit in `any` and in `all`
    static_assert(kBlockK % 32 == 0);
    const ForwardParams& params;
    int batch, first, end;  // words
    int word;               // the first of the next block
    int kept = -1;          // which 1024 keys `any` and `all` are of
    uint32_t any = ~0u, all = ~0u;

    __device__ __forceinline__ Walk(const ForwardParams& params, const Work& work, const Range& keys)
        : params(params), batch(work.batch) {
      first = keys.first / kFirstKeyStep * (kFirstKeyStep / 32);
      end = keys.first < keys.end ? (keys.end + 31) / 32 : first;
      word = first + (end - first + kWordsPerBlock - 1) / kWordsPerBlock * kWordsPerBlock - kWordsPerBlock;
      leave_out_hidden();
    }

    __device__ __forceinline__ Step step() { return word < first ? Step::none() : Step::make(word, is_whole()); }

    // Whether no block is behind the next one, for certain.
    __device__ __forceinline__ bool ends() const { return word - kWordsPerBlock < first; }

    __device__ __forceinline__ Step next() {
      word -= kWordsPerBlock;
      leave_out_hidden();
      return step();
    }

    // Has `any` and `all` be those of a word.
    __device__ __forceinline__ void look_up(int number) {
      const MaskWords& words = params.mask_words;
      if (kSpacious && number / 32 == kept) return;
      kept = number / 32;
      const int index = batch * words.blocks_per_batch + kept;
      any = words.any[index];
      all = words.all[index];
    }

    __device__ __forceinline__ void leave_out_hidden() {
      if (params.mask_words.any == nullptr) return;
      int last = min(word + kWordsPerBlock, end) - 1;
      while (last >= first) {
        look_up(last);
        const uint32_t bits = any << (31 - last % 32);
        if (bits != 0) {
          last -= __clz(static_cast<int>(bits));
          break;
        }
        last = last / 32 * 32 - 1;
      }
      word = last < first ? first - kWordsPerBlock : first + (last - first) / kWordsPerBlock * kWordsPerBlock;
    }

    // Whether the mask leaves all of the block, as far as the tile sees keys.
    __device__ __forceinline__ bool is_whole() {
      if (params.mask_words.all == nullptr) return true;
      bool whole = true;
#pragma unroll
      for (int i = kWordsPerBlock - 1; i >= 0; --i) {
        if (word + i >= end) continue;
        look_up(word + i);
        whole = whole && ((all >> ((word + i) % 32)) & 1);
      }
      return whole;
    }
  };

  // Addresses in shared memory. Every tile has a barrier for its arrival and one for the end of its use.
  struct Shared {
    uint32_t base;

    __device__ __forceinline__ uint32_t q() const { return base; }
    __device__ __forceinline__ uint32_t o() const { return base + Traits::kOffsetO; }
    __device__ __forceinline__ uint32_t k(int stage) const {
      return base + Traits::kOffsetK + stage * Traits::kTileBytesK;
    }
    __device__ __forceinline__ uint32_t v(int stage) const {
      return base + Traits::kOffsetV + stage * Traits::kTileBytesV;
    }
    __device__ __forceinline__ uint32_t ones(int stage) const {
      return base + Traits::kOffsetOnes + stage * Traits::kTileBytesV;  // stage 0's only, if they are shared
    }
    __device__ __forceinline__ uint32_t distances(int stage) const {
      return base + Traits::kOffsetDistances + stage * Traits::kDistanceBytes;
    }
    // kAddsAtOnce: what a warp multiplies scores by, 1, or c if q_hat does not contain it. A register would spill.
    __device__ __forceinline__ uint32_t scale(int first_row) const {
      return base + Traits::kOffsetScales + first_row / 16 * 4;
    }
    __device__ __forceinline__ uint32_t work() const { return base + Traits::kOffsetWork; }
    // kBanded: the code of the tile's first step; for a block of keys the code of the step behind it and the words of
    // its mask; the keys that a query sees.
    __device__ __forceinline__ uint32_t first_step() const { return base + Traits::kOffsetFirstStep; }
    __device__ __forceinline__ uint32_t mask_words(int stage) const {
      return base + Traits::kOffsetSteps + stage * Traits::kStepBytes;
    }
    __device__ __forceinline__ uint32_t next_step(int stage) const { return mask_words(stage) + 16; }
    __device__ __forceinline__ uint32_t keys_of_row(int row) const {
      if constexpr (Traits::kRangesInOnes) return ones(0) + row * kPanelBytes + (row % 8 ^ 1) * 16;  // swizzled
      return base + Traits::kOffsetRanges + 8 * row;
    }
    __device__ __forceinline__ uint32_t barrier(int index) const { return base + Traits::kOffsetBarriers + 8 * index; }
    __device__ __forceinline__ uint32_t q_full() const { return barrier(0); }
    __device__ __forceinline__ uint32_t q_empty() const { return barrier(1); }
    __device__ __forceinline__ uint32_t k_full(int stage) const { return barrier(2 + stage); }
    __device__ __forceinline__ uint32_t k_empty(int stage) const { return barrier(2 + kStages + stage); }
    __device__ __forceinline__ uint32_t v_full(int stage) const { return barrier(2 + 2 * kStages + stage); }
    __device__ __forceinline__ uint32_t v_empty(int stage) const { return barrier(2 + 3 * kStages + stage); }
  };

  using Stage = RingStage<kStages>;

  static __device__ __forceinline__ void initialise(const Shared& shared) {
    if (threadIdx.x == 0) {
      constexpr int kConsumerWarps = 4 * Traits::kConsumers;  // one lane of each arrives
      mbarrier_init(shared.q_full(), 1);
      mbarrier_init(shared.q_empty(), kConsumerWarps);
      for (int stage = 0; stage < kStages; ++stage) {
        mbarrier_init(shared.k_full(stage), 1);
        mbarrier_init(shared.v_full(stage), 1);
        mbarrier_init(shared.k_empty(stage), kConsumerWarps);
        mbarrier_init(shared.v_empty(stage), kConsumerWarps);
      }
      fence_mbarrier_init();
    }
    if constexpr (kOnes) {
      for (int stage = 0; stage < (Traits::kSharedOnes ? 1 : kStages); ++stage) {
        for (int offset = 4 * threadIdx.x; offset < Traits::kBytesOnes; offset += 4 * Traits::kThreads) {
          store_shared_b32(shared.ones(stage) + offset, pack<T>(1.f, 1.f));
        }
      }
      fence_proxy_async();
    }
    __syncthreads();
  }

  // One thread. Keys are a block ahead of values: a step needs the next block's keys together with its own values.
  struct Producer {
    const ForwardParams& params;
    const ForwardTensorMaps& maps;
    const ForwardSchedule& schedule;
    const Shared shared;
    bool k_hat_done;  // all of it, or it was there before this kernel
    uint32_t q_parity = 0;
    Stage k_stage, v_stage;

    // kMore bytes beside the tile's count towards the barrier's phase, too.
    template <int kRows, int kMore = 0>
    __device__ __forceinline__ void load(const CUtensorMap& map, uint32_t tile, uint32_t full, int row, int head,
                                         int batch) {
      mbarrier_arrive_expect_tx(full, kRows * 2 * kHeadDim + kMore);
      load_panels<kRows, kPanelDim, kPanels>(&map, tile, full, row, head, batch);
    }

    // Looks whether waiting has an end. Once a tile, for it takes almost a microsecond.
    __device__ __forceinline__ void look_for_k_hat() {
      if (k_hat_done) return;
      const uint32_t num_done = load_acquire(params.counters + ForwardSm90Counters::kChunksDone);
      k_hat_done = num_done == static_cast<uint32_t>(schedule.num_chunks);
      fence_proxy_async_global();  // other blocks' st.global before this one's TMA
    }

    __device__ __forceinline__ void await_k_hat(const Work& work, int block) {
      if (k_hat_done) return;
      const uint32_t* done = params.counters +
                             chunks_done(params, work.batch * params.num_kv_heads + work.kv_head, block);
      const int num_rows = min(kBlockK, params.seq_len_k - block * kBlockK);
      const uint32_t num_chunks = (num_rows + Traits::kChunkRows - 1) / Traits::kChunkRows;
      while (load_acquire(done) < num_chunks) __nanosleep(64);
      fence_proxy_async_global();
    }

    __device__ __forceinline__ void load_k(const Work& work, int block) {
      await_k_hat(work, block);
      load_keys(work, block * kBlockK);
    }

    __device__ __forceinline__ void load_keys(const Work& work, int first_key) {
      mbarrier_wait(shared.k_empty(k_stage.index), k_stage.parity ^ 1);
      const uint32_t full = shared.k_full(k_stage.index);
      load<kBlockK, kAddsAtOnce ? Distances::kBytes : 0>(maps.k, shared.k(k_stage.index), full, first_key, work.kv_head,
                                                         work.batch);
      if constexpr (kAddsAtOnce) load_distances(work, first_key, k_stage, full);
      k_stage.advance();
    }

    __device__ __forceinline__ void load_values(const Work& work, int first_key) {
      mbarrier_wait(shared.v_empty(v_stage.index), v_stage.parity ^ 1);
      const uint32_t full = shared.v_full(v_stage.index);
      load<kBlockK, kAddsInSlices ? Distances::kBytes : 0>(maps.v, shared.v(v_stage.index), full, first_key,
                                                           work.kv_head, work.batch);
      if constexpr (kAddsInSlices) load_distances(work, first_key, v_stage, full);
      v_stage.advance();
    }

    __device__ __forceinline__ void load_distances(const Work& work, int first_key, const Stage& stage, uint32_t full) {
      Distances::load(params, shared.distances(stage.index), full, work.batch, work.head, work.first_query, first_key);
    }

    // The keys of a step, the words of their mask, and the step behind it.
    __device__ __forceinline__ void load_step(const Work& work, Step step, Step next) {
      // Its keys are in one or two of the blocks that are counted.
      const int first_block = step.first_key() / kBlockK;
      await_k_hat(work, first_block);
      if (kSpacious && step.first_key() % kBlockK != 0 && (first_block + 1) * kBlockK < params.seq_len_k) {
        await_k_hat(work, first_block + 1);
      }
      int words[4]{-1, -1, -1, -1};
      if (!step.is_whole()) {
        const MaskWords& mask = params.mask_words;
        const int first_word = step.first_key() / 32;
#pragma unroll
        for (int i = 0; i < kBlockK / 32; ++i) {
          if (first_word + i >= mask.keys_per_batch) continue;
          words[i] = static_cast<int>(mask.keys[int64_t{work.batch} * mask.keys_per_batch + first_word + i]);
        }
      }
      mbarrier_wait(shared.k_empty(k_stage.index), k_stage.parity ^ 1);
      store_shared_v4_s32(shared.mask_words(k_stage.index), words);
      store_shared_b32(shared.next_step(k_stage.index), next.code);
      load_keys(work, step.first_key());
    }

    // What a tile is shares the barriers of its q: it is there when q is, and no longer read when q is not.
    __device__ __forceinline__ void announce(const Work& work) {
      mbarrier_wait(shared.q_empty(), q_parity ^ 1);
      store_shared_v4_s32(shared.work(), {work.batch, work.head, work.kv_head, work.first_query});
    }

    // Returns the next tile. It is asked for when little is left to do, as the answer takes a microsecond, but no
    // sooner: tiles would go to blocks that are not the first to be through.
    __device__ __forceinline__ unsigned load_tile(const Work& work) {
      announce(work);
      load_q(work);
      int block = count_blocks(params, work.first_query, kBlockQ) - 1;
      const bool has_keys = block >= 0;
      if (has_keys) load_k(work, block);
#pragma unroll 1
      for (; block > 0; --block) {
        load_k(work, block - 1);
        load_values(work, block * kBlockK);
      }
      const unsigned next = ask_for_tile();
      if (has_keys) load_values(work, 0);
      return next;
    }

    __device__ __forceinline__ void load_q(const Work& work) {
      load<kBlockQ>(maps.q, shared.q(), shared.q_full(), work.first_query, work.head, work.batch);
      q_parity ^= 1;
      look_for_k_hat();
    }

    // kBanded: the keys that a tile sees. Of packed sequences they are looked up in memory.
    __device__ __forceinline__ Range keys_of_tile(unsigned tile) const {
      if (tile >= static_cast<unsigned>(schedule.num_tiles)) return {};
      return keys_of_rows(params, find_work(params, schedule, tile).first_query, kBlockQ).any;
    }

    // `keys` are those of the tile and then, kLooksAhead, of the next one: they are looked up before the last values,
    // which have to wait. The next tile itself is asked for a step sooner, as the answer takes a microsecond.
    __device__ __forceinline__ unsigned load_band(unsigned tile, Range& keys) {
      const Work work = find_work(params, schedule, tile);
      if constexpr (!kLooksAhead) keys = keys_of_tile(tile);
      Walk walk(params, work, keys);
      const Step first = walk.step();
      announce(work);
      store_shared_b32(shared.first_step(), first.code);
      load_q(work);
      Step step = first, behind = Step::none();
      if (first.exists()) {
        behind = walk.next();
        load_step(work, step, behind);
      }
      const auto advance = [&] {
        const Step last = step;
        step = behind;
        behind = walk.next();
        load_step(work, step, behind);
        load_values(work, last.first_key());
      };
#pragma unroll 1
      while (behind.exists() && !(kLooksAhead && walk.ends())) advance();
      const unsigned next = ask_for_tile();
      if constexpr (kLooksAhead) {
#pragma unroll 1
        while (behind.exists()) advance();
        keys = keys_of_tile(next);
      }
      if (first.exists()) load_values(work, step.first_key());
      return next;
    }

    __device__ __forceinline__ unsigned ask_for_tile() const {
      return gridDim.x + atomic_increment(params.counters + ForwardSm90Counters::kTilesTaken);
    }

    // The block's own number is its first tile. Which ones follow depends on how far other blocks are; results do not.
    __device__ __forceinline__ void load_tiles() {
      unsigned tile = blockIdx.x;
      Range keys{};
      if constexpr (kBanded && kLooksAhead) keys = keys_of_tile(tile);
      while (tile < static_cast<unsigned>(schedule.num_tiles)) {
        if constexpr (kBanded) {
          tile = load_band(tile, keys);
        } else {
          tile = load_tile(find_work(params, schedule, tile));
        }
      }
      announce({0, 0, 0, kNoMoreTiles});
      mbarrier_arrive(shared.q_full());
    }
  };

  // Norm::kAhead: a warp beside the producer's. It writes k_hat, chunk by chunk; producers of all blocks wait for it.
  //
  // Who has taken a chunk waits for nobody before it has written it, which is why no wait is endless: queue.cuh.
  struct KeyNormalizer {
    static constexpr int kLanes = Traits::kLanesPerRow, kRowsAtOnce = 32 / kLanes, kRows = Traits::kRowsPerLane;

    const ForwardParams& params;
    const ForwardSchedule& schedule;
    // A lane's share of the chunk: kRows rows, kRowsAtOnce from each other.
    int row;  // the first
    T* target;
    rows::PackedSlice slices[kRows];
    unsigned counter = 0;  // of the chunk's block

    // Whether the lane's i-th row has the first or second of the lane's vectors.
    __device__ __forceinline__ bool has_vector(int i, int vector) const {
      const int column = 8 * (threadIdx.x % kLanes + kLanes * vector);
      return row + i * kRowsAtOnce < params.seq_len_k && column < params.head_dim;
    }

    __device__ __forceinline__ void load(unsigned chunk) {
      const HeadSections::Place place = schedule.kv_heads.find(chunk, schedule.chunks_per_kv_head);
      const unsigned first_row = (schedule.chunks_per_kv_head - 1 - place.item) * Traits::kChunkRows;
      const unsigned first_column = 8 * (threadIdx.x % kLanes);
      row = first_row + (threadIdx.x & 31) / kLanes;
      counter = chunks_done(params, place.head, first_row / kBlockK);
      const rows::Position position{place.head / params.num_kv_heads, place.head % params.num_kv_heads, row};
      target = rows::row_of<T>(params.k_hat, position) + first_column;
      const T* source = rows::row_of<const T>(params.k, position) + first_column;
#pragma unroll
      for (int i = 0; i < kRows; ++i, source += kRowsAtOnce * params.k.stride_row) {
#pragma unroll
        for (int vector = 0; vector < 2; ++vector) {
          uint4 x{};
          if (has_vector(i, vector)) x = reinterpret_cast<const uint4*>(source)[kLanes * vector];
          reinterpret_cast<uint4&>(slices[i][4 * vector]) = x;
        }
      }
    }

    __device__ __forceinline__ void normalize_and_store() {
#pragma unroll
      for (int i = 0; i < kRows; ++i, target += kRowsAtOnce * params.k_hat.stride_row) {
        rows::normalize_packed<T>(slices[i], kLanes);
#pragma unroll
        for (int vector = 0; vector < 2; ++vector) {
          if (!has_vector(i, vector)) continue;
          reinterpret_cast<uint4*>(target)[kLanes * vector] = reinterpret_cast<const uint4&>(slices[i][4 * vector]);
        }
      }
    }

    __device__ __forceinline__ void normalize_chunks() {
      unsigned num_written = 0;
      unsigned next = ask_for_chunk(params, ForwardSm90Counters::kChunksTaken);
      while (true) {
        const unsigned chunk = __shfl_sync(0xffffffffu, next, 0);
        const bool exists = chunk < static_cast<unsigned>(schedule.num_chunks);
        const unsigned counter_before = counter;
        if (exists) load(chunk);
        if (num_written > 0) publish(params, counter_before, 1);  // takes as long as the loads
        if (!exists) break;
        next = ask_for_chunk(params, ForwardSm90Counters::kChunksTaken);
        normalize_and_store();
        ++num_written;
      }
      publish(params, ForwardSm90Counters::kChunksDone, num_written);
    }
  };

  // What hides scores of a block. They are compared: bits as below would be a dozen instructions less, but take all of
  // the predicates, so that plain steps would make theirs anew.
  struct Finish {
    int last_column[2];  // that the lane's rows see, counted from the lane's own first column

    __device__ __forceinline__ Finish(const ForwardParams& params, const Work& work, int first_row, int block) {
      const int lane = threadIdx.x & 31, first_column = block * kBlockK + 2 * (lane & 3);
      const int diagonal = params.seq_len_k - params.seq_len_q;  // the last key that query 0 sees, if causal
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = work.first_query + first_row + 8 * half + (lane >> 2), last_key = params.seq_len_k - 1;
        last_column[half] = (params.causal ? min(query + diagonal, last_key) : last_key) - first_column;
      }
    }

    __device__ __forceinline__ void operator()(float (&scores)[kBlockK / 8][4]) const {
#pragma unroll
      for (int n = 0; n < kBlockK / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * n + i % 2 > last_column[i / 2]) scores[n][i] = -infinity();
        }
      }
    }
  };

  // kBanded: which scores of a block are hidden, a bit for each of the lane's columns (band.cuh) in its row of either
  // half. It is made while S is, so that little is left to do then.
  struct Hidden {
    uint32_t columns[2];

    // `stage` is where the keys of the step are.
    __device__ __forceinline__ Hidden(const Shared& shared, int first_row, Step step, int stage) {
      const int lane = threadIdx.x & 31, first_key = step.first_key();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int keys[2];
        load_shared_v2_s32(keys, shared.keys_of_row(first_row + 8 * half + (lane >> 2)));
        columns[half] = lane_columns_outside<kBlockK>(lane, keys[0] - first_key, keys[1] - first_key);
      }
      if (step.is_whole()) return;
      uint32_t left = 0;  // by the mask
#pragma unroll
      for (int i = 0; i < kBlockK / 32; ++i) {
        int word = 0;
        if (lane == 0) word = load_shared_s32(shared.mask_words(stage) + 4 * i);  // see read_work
        left |= lane_columns_of(lane, __shfl_sync(0xffffffffu, word, 0)) << (8 * i);
      }
#pragma unroll
      for (uint32_t& bits : columns) bits |= ~left;
    }
  };

  // A warpgroup; what it holds is a warp's share, 16 rows.
  struct Consumer {
    const ForwardParams& params;
    const Shared shared;
    const int first_row;  // of the warp in the tile
    uint32_t q_parity = 0;
    Stage k_stage, v_stage;
    Step next;  // kBanded: the step behind that of the block of keys that came last; a tile begins with its first

    uint32_t q[Traits::kQInRegisters ? kHeadDim / 16 : 1][4];
    float scores[kBlockK / 8][4];
    uint32_t p[kSlices][4];
    float o[kHeadDim / 8 + (kOnes ? 1 : 0)][4];  // the last, if ones: the rounded row sums
    float exact_sums[2], rounded_sums[2];
    struct Nothing {};
    std::conditional_t<kAddsInSlices, typename Distances::Slices, Nothing> entries;  // of the block that S is made of

    // Waits for a tile and its q.
    __device__ __forceinline__ Work receive() {
      mbarrier_wait(shared.q_full(), q_parity);
      q_parity ^= 1;
      int work[4];
      read_work(work, shared.work());
      if constexpr (kBanded) next = read_step(shared.first_step());
      return {work[0], work[1], work[2], work[3]};
    }

    // See read_work.
    __device__ __forceinline__ Step read_step(uint32_t address) const {
      Step step{};
      if ((threadIdx.x & 31) == 0) step.code = load_shared_s32(address);
      step.code = __shfl_sync(0xffffffffu, step.code, 0);
      return step;
    }

    // q becomes q_hat, as launch_normalize makes it but for float32's last bits. Four neighbouring lanes hold a row.
    __device__ __forceinline__ void normalize_q(const Work& work) {
      const float factor = scale_log2(params, work.head);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float row[kHeadDim / 4];
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
          const float2 x = unpack<T>(q[i / 2][half + i % 2 * 2]);
          row[2 * i] = x.x;
          row[2 * i + 1] = x.y;
        }
        rows::normalize_together<T>(row, 4);
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
          q[i / 2][half + i % 2 * 2] = pack<T>(row[2 * i] * factor, row[2 * i + 1] * factor);
        }
      }
      pin(q);
    }

    __device__ __forceinline__ void begin_tile(const Work& work) {
      Range keys{};  // asked for now, and noted at the end: a table may be in global memory
      if constexpr (kBanded) keys = keys_of(params, min(work.first_query + noted_row(), params.seq_len_q - 1));
#pragma unroll
      for (auto& columns : o) {
#pragma unroll
        for (float& x : columns) x = 0.f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) exact_sums[half] = rounded_sums[half] = 0.f;
      if constexpr (kAddsAtOnce) {
        const float scale = params.l2norm_qk ? 1.f : scale_log2(params, work.head);
        if ((threadIdx.x & 31) == 0) store_shared_b32(shared.scale(first_row), __float_as_uint(scale));
        __syncwarp();
      }
      if constexpr (Traits::kQInRegisters) {
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
          constexpr int kSteps = kPanelDim / 16;
          load_a<kPanelBytes>(q[step], shared.q() + step / kSteps * kBlockQ * kPanelBytes, first_row, step % kSteps);
        }
        pin(q);
        fence_proxy_async();  // TMA may write there after what has been read
        __syncwarp();
        release(shared.q_empty());
        if (params.plan.q_norm == Norm::kKernel) normalize_q(work);
      }
      if constexpr (kBanded) note_keys(keys);
    }

    // The keys that each of the warpgroup's queries sees, for all of the tile. Rows behind the last query are like it.
    __device__ __forceinline__ int noted_row() const { return first_row + (threadIdx.x & 15); }
    __device__ __forceinline__ void note_keys(const Range& keys) const {
      wait_for_warpgroup();  // all have read those of the tile before
      if ((threadIdx.x & 31) < 16) store_shared_v2_s32(shared.keys_of_row(noted_row()), {keys.first, keys.end});
      wait_for_warpgroup();
    }

    __device__ __forceinline__ void wait_for_warpgroup() const { named_barrier_sync<128>(1 + first_row / 64); }

    // The keys that the warpgroup's queries see, as noted. They are known to be the same in all lanes: what depends on
    // them is computed once a warp, and where it branches, what is in uniform registers stays there.
    __device__ __forceinline__ Band read_band() const {
      int of_first[2], of_last[2];
      load_shared_v2_s32(of_first, shared.keys_of_row(first_row / 64 * 64));
      load_shared_v2_s32(of_last, shared.keys_of_row(first_row / 64 * 64 + 63));
      const auto known = [](int x) { return __shfl_sync(0xffffffffu, x, 0); };
      return band_between({known(of_first[0]), known(of_first[1])}, {known(of_last[0]), known(of_last[1])});
    }

    // Starts S = q k^T for the block that arrives next.
    __device__ __forceinline__ void start_qk() {
      mbarrier_wait(shared.k_full(k_stage.index), k_stage.parity);
      const uint32_t tile = shared.k(k_stage.index) / 16;
      pin(scores);
      pin(p);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        constexpr int kSteps = kPanelDim / 16;
        const int panel = step / kSteps, offset = 2 * (step % kSteps);
        const uint64_t b = make_descriptor<kPanelBytes>(tile + panel * (kBlockK * kPanelBytes / 16) + offset);
        if constexpr (Traits::kQInRegisters) {
          if (step == 0) {
            wgmma_rs<T, false, false>(scores, q[step], b);
          } else {
            wgmma_rs<T, true, false>(scores, q[step], b);
          }
        } else {
          const uint32_t tile_q = (shared.q() + first_row / 64 * 64 * kPanelBytes) / 16;
          const uint64_t a = make_descriptor<kPanelBytes>(tile_q + panel * (kBlockQ * kPanelBytes / 16) + offset);
          if (step == 0) {
            wgmma_ss<T, false, false>(scores, a, b);
          } else {
            wgmma_ss<T, true, false>(scores, a, b);
          }
        }
      }
      wgmma_commit();
    }

    // Waits for S, and scores it; kPending groups of products started later may go on.
    template <int kPending>
    __device__ __forceinline__ void finish_qk() {
      finish_qk<kPending>(k_stage);
      k_stage.advance();
    }

    // `stage` is where its keys are.
    template <int kPending>
    __device__ __forceinline__ void finish_qk(const Stage& stage) {
      wgmma_wait<kPending>();
      pin(scores);
      if constexpr (kAddsAtOnce) {
        const float scale = load_shared_f32(shared.scale(first_row));
        Distances::add(scores, scale, shared.distances(stage.index), first_row);
        __syncwarp();  // all lanes have read it before the first releases it
      }
      release(shared.k_empty(stage.index));
    }

    __device__ __forceinline__ void finish_pv() {
      if constexpr (kAddsInSlices) __syncwarp();  // all lanes have read the entries
      release(shared.v_empty(v_stage.index));
      v_stage.advance();
    }

    // kAddsInSlices: reads the first entries of distances, while S is made, to which they are added.
    __device__ __forceinline__ void begin_entries() {
      if constexpr (kAddsInSlices) {
        mbarrier_wait(shared.v_full(v_stage.index), v_stage.parity);
        entries.begin(shared.distances(v_stage.index), first_row);
      }
    }

    // P = 2^S of 16 keys, in place.
    __device__ __forceinline__ void exponentiate(int slice) {
#pragma unroll
      for (int n = 2 * slice; n < 2 * slice + 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[n][i] = ex2_approx_ftz(scores[n][i]);
          if constexpr (kExactSum) exact_sums[i >> 1] += scores[n][i];
        }
      }
    }

    __device__ __forceinline__ void round(int slice) { accumulator_to_a<kMath>(p[slice], scores, slice); }

    __device__ __forceinline__ void add_rounded(int slice) {
      if constexpr (!kOnes) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(p[slice][i]);
          rounded_sums[i & 1] += x.x + x.y;
        }
      }
    }

    // Starts O += P V for 16 keys.
    __device__ __forceinline__ void start_pv(int slice) {
      // If the next panel is the ones, it stays where it is while the address moves on: its distance shrinks.
      constexpr uint32_t kMove = Traits::kSharedOnes ? 1u - (1u << 16) : 1u;
      constexpr uint32_t kNextPanel = Traits::kSharedOnes ? Traits::kOffsetOnes - Traits::kOffsetV
                                                          : kBlockK * kPanelBytes;
      const uint32_t first_stage = shared.v(0) / 16 | kNextPanel / 16 << 16;
      const uint32_t first = first_stage + v_stage.index * (Traits::kTileBytesV / 16 * kMove);
      wgmma_rs<T, true, true>(o, p[slice], make_descriptor<kPanelBytes>(first + slice * (kPanelBytes * kMove)));
    }

    __device__ __forceinline__ void start_pv_as_p_is_made() {
      if constexpr (!kAddsInSlices) mbarrier_wait(shared.v_full(v_stage.index), v_stage.parity);
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        if constexpr (kAddsInSlices) entries.add(scores, slice);
        exponentiate(slice);
        round(slice);
        add_rounded(slice);
        wgmma_fence();
        start_pv(slice);
        wgmma_commit();
      }
    }

    __device__ __forceinline__ void start_whole_pv() {
      mbarrier_wait(shared.v_full(v_stage.index), v_stage.parity);
      wgmma_fence();
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) start_pv(slice);
      wgmma_commit();
    }

    // Multiplies scores, which are there, by c if q_hat does not contain it.
    __device__ __forceinline__ void scale_scores(const Work& work) {
      if (kAddsAtOnce || params.l2norm_qk) return;
      const float score_scale = scale_log2(params, work.head);
#pragma unroll
      for (auto& columns : scores) {
#pragma unroll
        for (float& x : columns) x *= score_scale;
      }
    }

    // The scores of a block that is not plain.
    __device__ __forceinline__ void finish_scores(const Work& work, const Finish& finish) {
      scale_scores(work);
      finish(scores);
    }

    // kBanded: returns the step of which S is made, and reads the one behind it. That takes time, so ptxas must not put
    // it between products: a wait for as many groups as are under way, which is over as it begins, keeps it from that.
    template <int kUnderWay>
    __device__ __forceinline__ Step take_step() {
      wgmma_wait<kUnderWay>();
      const Step step = next;
      next = read_step(shared.next_step(k_stage.index));
      return step;
    }

    // kBanded: waits for S of a step, and hides what its queries do not see. Returns whether the walk goes on.
    //
    // All that has to be decided is decided while S is made, for between S and 2^S a warp has nothing else to do. ptxas
    // would put it behind the wait. It cannot if the wait is in the branches that depend on it; what the end of the
    // loop depends on has a wait of its own, which is over as it begins.
    template <int kPending, typename Reaches>
    __device__ __forceinline__ bool finish_band_qk(const Work& work, Step step, bool plain, Reaches reaches) {
      const Stage stage = k_stage;
      k_stage.advance();
      const bool goes_on = reaches(next);
      if (goes_on) wgmma_wait<kPending + 1>();
      if (plain) {
        finish_qk<kPending>(stage);
      } else {
        const Hidden hidden(shared, first_row, step, stage.index);
        finish_qk<kPending>(stage);
        scale_scores(work);
#pragma unroll
        for (int half = 0; half < 2; ++half) hide(scores, half, hidden.columns[half]);
      }
      return goes_on;
    }

    // S of `block` is there. Ends with S of the block before it there and no product under way.
    template <bool kPlain>
    __device__ __forceinline__ void step_sliced(const Work& work, int block) {
      if constexpr (!kPlain) finish_scores(work, {params, work, first_row, block});
      start_pv_as_p_is_made();
      start_qk();
      wgmma_wait<1>();
      finish_pv();
      finish_qk<0>();
    }

    // P of `block` + 1 is there. Ends with that of `block` there and no product under way.
    template <bool kPlain>
    __device__ __forceinline__ void step_whole(const Work& work, int block) {
      if constexpr (kPlain) {
        start_qk();
        start_whole_pv();
        finish_qk<1>();
      } else {
        const Finish finish(params, work, first_row, block);
        start_qk();
        start_whole_pv();
        finish_qk<1>();
        finish_scores(work, finish);
      }
      make_p();
    }

    // kBanded: the same. Returns whether the walk goes on.
    template <typename IsPlain, typename Reaches>
    __device__ __forceinline__ bool step_whole(const Work& work, IsPlain is_plain, Reaches reaches) {
      start_qk();
      start_whole_pv();
      const Step step = take_step<2>();
      const bool goes_on = finish_band_qk<1>(work, step, is_plain(step), reaches);
      make_p();
      return goes_on;
    }

    // P of the scores that are there, beside the product of the block before with V.
    __device__ __forceinline__ void make_p() {
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        exponentiate(slice);
        add_rounded(slice);  // of the block before
      }
      pin(scores);
      // V came long ago; what counts is the branch in this wait. Without one, ptxas puts two thirds of the 2^x, which
      // the products were to hide, behind the products.
      mbarrier_wait(shared.v_full(v_stage.index), v_stage.parity);
      wgmma_wait<0>();
      pin(o);
      finish_pv();
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) round(slice);
    }

    // O and the row sums of a tile.
    __device__ __forceinline__ void attend_band(const Work& work) {
      // Its rows may all be behind the last query.
      const bool has_rows = work.first_query + first_row / 64 * 64 < params.seq_len_q;
      const Band band = has_rows ? read_band() : Band{};
      const Range own = band.any;
      const auto reaches = [&](Step step) { return step.first_key() + kBlockK > own.first; };
      const auto is_plain = [&](Step step) {
        const Range all = kHeadDim >= 128 ? read_band().all : band.all;  // no registers are left to keep it in
        const int first_key = step.first_key();
        // Not &&: none of it is worth a branch.
        return ((params.l2norm_qk || kAddsAtOnce) & step.is_whole() & (all.first <= first_key) &
                (first_key + kBlockK <= all.end)) != 0;
      };
      // Blocks that only warpgroups with later queries see.
      while (next.exists() && next.first_key() >= own.end) skip_block();
      if (own.first < own.end && reaches(next)) {
        start_qk();
        Step step = take_step<1>();
        begin_entries();
        bool goes_on = finish_band_qk<0>(work, step, is_plain(step), reaches);
        if constexpr (Traits::kSliced) {
#pragma unroll 1
          while (goes_on) {
            start_pv_as_p_is_made();
            start_qk();
            // No wait counts beyond 7: up to head dim 32 it is for the first slices' products, too.
            step = take_step<(kSlices < 7 ? kSlices + 1 : 7)>();
            wgmma_wait<1>();
            finish_pv();
            begin_entries();
            goes_on = finish_band_qk<0>(work, step, is_plain(step), reaches);
          }
          start_pv_as_p_is_made();
        } else {
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice) {
            exponentiate(slice);
            round(slice);
          }
#pragma unroll 1
          while (goes_on) goes_on = step_whole(work, is_plain, reaches);
          start_whole_pv();
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice) add_rounded(slice);
        }
        wgmma_wait<0>();
        pin(o);
        finish_pv();
      }
      // And those that only warpgroups with earlier ones see.
      while (next.exists()) skip_block();
    }

    __device__ __forceinline__ void attend(const Work& work) {
      if constexpr (kBanded) return attend_band(work);
      const int first_query = work.first_query + first_row / 64 * 64;
      const int num_blocks = count_blocks(params, first_query, 64);
      const int num_plain = min(count_plain_blocks(params, first_query), num_blocks);
      // Blocks that only warpgroups with later queries see.
      for (int block = count_blocks(params, work.first_query, kBlockQ); block > num_blocks; --block) skip_block();
      if (num_blocks == 0) return;
      start_qk();
      finish_qk<0>();
      int block = num_blocks - 1;
      if constexpr (Traits::kSliced) {
        for (; block > 0 && block >= num_plain; --block) step_sliced<false>(work, block);
        for (; block > 0; --block) step_sliced<true>(work, block);
        if (num_plain == 0) finish_scores(work, {params, work, first_row, 0});
        start_pv_as_p_is_made();
      } else {
        if (block >= num_plain) finish_scores(work, {params, work, first_row, block});
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
          exponentiate(slice);
          round(slice);
        }
        for (--block; block >= num_plain; --block) step_whole<false>(work, block);
        for (; block >= 0; --block) step_whole<true>(work, block);
        start_whole_pv();
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) add_rounded(slice);
      }
      wgmma_wait<0>();
      pin(o);
      finish_pv();
    }

    __device__ __forceinline__ void skip_block() {
      mbarrier_wait(shared.k_full(k_stage.index), k_stage.parity);
      if constexpr (kBanded) next = read_step(shared.next_step(k_stage.index));
      __syncwarp();  // lane 0 must not let the next phase begin while another lane waits for this one
      release(shared.k_empty(k_stage.index));
      k_stage.advance();
      mbarrier_wait(shared.v_full(v_stage.index), v_stage.parity);
      __syncwarp();
      release(shared.v_empty(v_stage.index));
      v_stage.advance();
    }

    __device__ __forceinline__ void reduce_sums() {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int distance = 1; distance <= 2; ++distance) {
          if constexpr (kExactSum) exact_sums[half] += __shfl_xor_sync(0xffffffffu, exact_sums[half], distance);
          if constexpr (!kOnes) rounded_sums[half] += __shfl_xor_sync(0xffffffffu, rounded_sums[half], distance);
        }
        if constexpr (kOnes) rounded_sums[half] = o[kHeadDim / 8][2 * half];
      }
    }

    // Divides by the row sums; the warp's rows go through its own part of shared memory, from where TMA takes them. If
    // that is q's, no warp of the warpgroup may be multiplying any more.
    __device__ __forceinline__ void write_output(const ForwardTensorMaps& maps, const Work& work) {
      const int lane = threadIdx.x & 31;
      const auto staging = [&](int panel) { return shared.o() + (panel * kBlockQ + first_row) * kPanelBytes; };
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float inverse = rounded_sums[half] == 0.f ? 0.f : rcp_approx_ftz(rounded_sums[half]);
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          o[n][2 * half] *= inverse;
          o[n][2 * half + 1] *= inverse;
        }
        const int query = work.first_query + first_row + 8 * half + (lane >> 2);
        if (kExactSum && (lane & 3) == 0 && query < params.seq_len_q) {
          const int64_t first = (int64_t(work.batch) * params.num_heads + work.head) * params.seq_len_q;
          params.row_sum_log2[first + query] = log2f(exact_sums[half]);
        }
      }
      if constexpr (Traits::kQInRegisters) {
        if (lane == 0) tma_store_wait_read();  // the tile before has left
        __syncwarp();
      } else {
        wait_for_warpgroup();
      }
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        float columns[kPanelDim / 8][4];
#pragma unroll
        for (int n = 0; n < kPanelDim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) columns[n][i] = o[panel * (kPanelDim / 8) + n][i];
        }
        store_accumulator<kMath, kPanelBytes>(staging(panel), columns, 0, 0);
      }
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          tma_store_4d(&maps.o, staging(panel), panel * kPanelDim, work.first_query + first_row, work.head, work.batch);
        }
        tma_store_commit();
        if constexpr (!Traits::kQInRegisters) tma_store_wait_read();  // q comes there next
      }
    }

    __device__ __forceinline__ void write_partials(const Work& work) {
      const int lane = threadIdx.x & 31;
      const int64_t first = (int64_t(work.batch) * params.num_heads + work.head) * params.seq_len_q;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = work.first_query + first_row + 8 * half + (lane >> 2);
        if (query >= params.seq_len_q) continue;
        if ((lane & 3) == 0) params.denominator[first + query] = rounded_sums[half];
        float* numerator = params.numerator + (first + query) * params.head_dim + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          if (8 * n >= params.head_dim) continue;
          *reinterpret_cast<float2*>(numerator + 8 * n) = make_float2(o[n][2 * half], o[n][2 * half + 1]);
        }
      }
    }
  };
};

template <Math kMath, int kHeadDim, bool kExactSum, Variant kVariant>
__global__ void __launch_bounds__(ForwardSm90Traits<kMath, kHeadDim>::kThreads, 1)
    forward_sm90_kernel(const __grid_constant__ ForwardParams params, const __grid_constant__ ForwardTensorMaps maps,
                        const __grid_constant__ ForwardSchedule schedule) {
  using F = ForwardSm90<kMath, kHeadDim, kExactSum, kVariant>;
  extern __shared__ __align__(1024) char memory[];
  const typename F::Shared shared{shared_address(memory)};
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be a warp's
  F::initialise(shared);

  if (warp >= 4 * F::Traits::kConsumers) {
    setmaxnreg_dec<F::Traits::kProducerRegisters>();
    const bool keys_ahead = params.plan.k_norm == Norm::kAhead;
    if (warp > 4 * F::Traits::kConsumers) {
      if (keys_ahead) typename F::KeyNormalizer{params, schedule}.normalize_chunks();
      return;
    }
    if (threadIdx.x % 32 != 0) return;
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v}) prefetch_tensor_map(map);
    typename F::Producer{params, maps, schedule, shared, !keys_ahead}.load_tiles();
  } else {
    setmaxnreg_inc<F::Traits::kConsumerRegisters>();
    typename F::Consumer consumer{params, shared, 16 * warp};
    for (auto work = consumer.receive(); work.first_query != F::kNoMoreTiles; work = consumer.receive()) {
      consumer.begin_tile(work);
      consumer.attend(work);
      consumer.reduce_sums();
      if (params.o.data == nullptr) {
        consumer.write_partials(work);
      } else {
        consumer.write_output(maps, work);
      }
      if constexpr (!F::Traits::kQInRegisters) release(shared.q_empty());
    }
    tma_store_wait_read();  // this block's shared memory lives until then
  }
}

template <Math kMath, int kHeadDim, Variant kVariant>
void launch_forward_sm90(const ForwardParams& params, cudaStream_t stream) {
  using Traits = ForwardSm90Traits<kMath, kHeadDim>;
  constexpr int64_t kSectionBytes = 16 << 20;  // of keys and values: measured, 7 to 13 % faster than all heads at once
  const auto make_map = [&](const Tensor& tensor, int num_heads, int num_rows, int box_rows) {
    return make_tensor_map(tensor, params.dtype, params.batch, num_heads, num_rows, params.head_dim, Traits::kPanelDim,
                           box_rows);
  };
  ForwardTensorMaps maps{};
  maps.q = make_map(params.q_hat, params.num_heads, params.seq_len_q, Traits::kBlockQ);
  maps.k = make_map(params.k_hat, params.num_kv_heads, params.seq_len_k, Traits::kBlockK);
  maps.v = make_map(params.v, params.num_kv_heads, params.seq_len_k, Traits::kBlockK);
  if (params.o.data != nullptr) maps.o = make_map(params.o, params.num_heads, params.seq_len_q, 16);

  ForwardSchedule schedule;
  schedule.num_blocks_q = (params.seq_len_q + Traits::kBlockQ - 1) / Traits::kBlockQ;
  const int64_t num_tiles = int64_t(params.batch) * params.num_heads * schedule.num_blocks_q;
  schedule.num_tiles = static_cast<int>(num_tiles);
  const int64_t bytes_per_head =
      4 * int64_t(params.seq_len_k) * params.head_dim * params.num_kv_heads / params.num_heads + 1;
  const int num_multiprocessors = current_device().num_multiprocessors;
  const auto num_blocks = static_cast<unsigned>(std::min<int64_t>(num_tiles, num_multiprocessors));
  const int group = params.num_heads / params.num_kv_heads, num_kv_heads = params.batch * params.num_kv_heads;
  const bool packed = params.sequences.queries != nullptr;
  if (packed || (params.causal && params.window_left < 0)) {
    const int per_section = static_cast<int>(kSectionBytes / bytes_per_head) + 1;
    const int in_last = heads_to_balance(schedule.num_blocks_q, num_multiprocessors, packed);
    schedule.heads = HeadSections::make(params.batch * params.num_heads, per_section, in_last);
    schedule.kv_heads =
        HeadSections::make(num_kv_heads, (per_section + group - 1) / group, (in_last + group - 1) / group);
  } else {
    // All tiles are alike, and a head's follow each other.
    schedule.heads = HeadSections::make(params.batch * params.num_heads, 1, 1);
    const int heads_at_once = static_cast<int>(num_blocks) / schedule.num_blocks_q + 1;
    schedule.kv_heads = HeadSections::make(num_kv_heads, (heads_at_once + group - 1) / group, 1);
  }
  schedule.chunks_per_kv_head = (params.seq_len_k + Traits::kChunkRows - 1) / Traits::kChunkRows;
  schedule.num_chunks = num_kv_heads * schedule.chunks_per_kv_head;
  const auto launch = [&]<bool kExactSum>() {
    constexpr auto kKernel = forward_sm90_kernel<kMath, kHeadDim, kExactSum, kVariant>;
    constexpr int kBytes = kVariant == Variant::kScored ? Traits::kSharedBytesScored : Traits::kSharedBytes;
    allow_shared_memory<kKernel, kBytes>();
    kKernel<<<num_blocks, Traits::kThreads, kBytes, stream>>>(params, maps, schedule);
    CUDA_CHECK(cudaGetLastError());
  };
  if (params.row_sum_log2 == nullptr) {
    launch.template operator()<false>();
  } else {
    launch.template operator()<true>();
  }
}

}  // namespace flash_cosine_sim
