// CUDA's threads, barriers and shared memory on the CPU, for the sources of csrc/ as test_emulation.py rewrites them.
//
// A block at a time runs, each of its threads as a fiber: a stack of its own, and a switch wherever it waits for
// others. What a warp does together (a barrier, a shuffle, ldmatrix, mma) happens when the last of its lanes arrives,
// for all of them. A warp runs until all of its lanes wait at a barrier of the block, in turn the first or the last
// warp first: so a warp gets as far ahead of the others as the barriers let it, and a missing one shows. For the same
// reason what is asynchronous (cp.async, TMA, wgmma) happens as late as possible, when a thread waits for it; and when
// a thread lets others go on through an mbarrier, these run before it does anything more.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace emulator {

struct Index {
  unsigned x;
};

// Threads that meet: all of a block, or those lanes of a warp that a mask names.
struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
};

// Threads that wait until another lets them go on.
struct Waiting {
  std::vector<int> threads;
};

struct Copy {  // of cp.async
  uint32_t destination;
  const void* source;
  bool valid;
  int group;
};

using Deferred = std::function<void()>;

// An mbarrier. A phase is complete when nobody is left to arrive and as many bytes came as were announced.
struct Barrier {
  int count, still_to_arrive;
  int missing_bytes = 0;
  uint32_t phase = 0;
  std::vector<Deferred> loads;  // that TMA has not made yet
  Waiting waiting;
};

struct NamedBarrier {
  int num_threads = 0, arrived = 0;
  Waiting waiting;
};

// A warp's share of wgmma: groups in the order in which they were committed, and what has not been.
struct Products {
  std::deque<std::vector<Deferred>> groups;
  std::vector<Deferred> uncommitted;
};

// What cuTensorMapEncodeTiled puts into a CUtensorMap, for 4 dimensions of 16-bit elements, columns first.
struct TensorMap {
  char* data;
  int64_t sizes[4], stride_bytes[3];  // the stride of a column is 2
  int box_columns, box_rows;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf place;  // where it waits: unlike swapcontext, longjmp makes no system call
  bool started;
  void* argument;  // of what it does together with others
  std::vector<Copy> copies;
  int num_copy_groups;
  std::vector<Deferred> stores;  // by TMA
  size_t num_committed_stores;
  uint32_t num_proxy_fences;
  bool acquired;  // from global memory, without a proxy fence since
};

inline constexpr int kMaxThreads = 640, kMaxWarps = kMaxThreads / 32, kMaxSharedBytes = 227 * 1024;
inline constexpr size_t kStackBytes = 256 * 1024;
inline Fiber fibers[kMaxThreads];
inline uint32_t ready[kMaxWarps], running[kMaxWarps];  // a bit a lane
inline Meeting whole_block, whole_warp[kMaxWarps];
inline std::map<std::pair<int, unsigned>, Meeting> part_of_warp;
inline std::map<uint32_t, Barrier> barriers;  // by address
inline NamedBarrier named_barriers[16];
inline Products products[kMaxWarps];
inline Waiting asleep;
inline unsigned num_sleeps;  // since a thread did anything else
inline unsigned num_threads, num_blocks, block_index;
inline int current, num_launches, num_wgmmas;
inline bool last_block_first;
inline int64_t num_loaded_bytes;                    // by TMA
inline int64_t num_copied_bytes;                    // by cp.async, of rows that exist
inline std::map<unsigned, int> num_large_launches;  // of blocks with more than 48 KiB, by their threads
inline std::function<void()> body;
inline std::exception_ptr error;
inline jmp_buf host;
alignas(1024) inline char shared[kMaxSharedBytes];
inline uint32_t shared_bytes;
// Who wrote 4 bytes of shared memory last, with st.shared, and how many proxy fences that thread had made by then.
struct Write {
  int thread = 0;
  uint32_t num_proxy_fences = 0;
};
inline Write last_write[kMaxSharedBytes / 4];
inline std::map<const void*, int> allowed_shared_bytes;

// 16-bit and 32-bit floats of these bytes are NaNs.
inline void poison(void* memory, size_t bytes) { std::memset(memory, 0xff, bytes); }

inline bool ascending() { return (num_launches + block_index) % 2 == 0; }

// Runs a thread that is ready, of this warp if there is one.
[[noreturn]] inline void resume_next(int warp = current / 32) {
  const int num_warps = static_cast<int>(num_threads) / 32;
  if (error) _longjmp(host, 1);
  for (int step = 0; step <= num_warps; ++step) {
    const int next = step == 0 ? warp : ascending() ? step - 1 : num_warps - step;
    if (ready[next] == 0) continue;
    const uint32_t later = current % 32 == 31 || next != current / 32 ? 0 : ready[next] & (~0u << (current % 32 + 1));
    current = 32 * next + std::countr_zero(later ? later : ready[next]);
    if (fibers[current].started) _longjmp(fibers[current].place, 1);
    fibers[current].started = true;
    setcontext(&fibers[current].start);
  }
  if (!asleep.threads.empty()) {
    for (int thread : asleep.threads) ready[thread / 32] |= 1u << thread % 32;
    asleep.threads.clear();
    resume_next(warp);
  }
  _longjmp(host, 1);
}

inline void run_thread() {
  try {
    body();
  } catch (...) {
    error = std::current_exception();
  }
  num_sleeps = 0;
  ready[current / 32] &= ~(1u << current % 32);
  running[current / 32] &= ~(1u << current % 32);
  resume_next();
}

inline void wait(Waiting& waiting) {
  num_sleeps = 0;
  waiting.threads.push_back(current);
  ready[current / 32] &= ~(1u << current % 32);
  if (_setjmp(fibers[current].place) == 0) resume_next();
}

// They run before this thread does anything more.
inline void wake(Waiting& waiting) {
  if (waiting.threads.empty()) return;
  for (int thread : waiting.threads) ready[thread / 32] |= 1u << thread % 32;
  const int warp = waiting.threads.front() / 32;
  waiting.threads.clear();
  if (_setjmp(fibers[current].place) == 0) resume_next(warp);
}

// Calls act() once all members are here. `what` tells calls apart that must not meet each other.
template <typename Act>
void meet(Meeting& meeting, const char* what, int first_warp, int num_warps, uint32_t lanes, void* argument, Act act) {
  if (meeting.arrived > 0 && meeting.what != what && std::strcmp(meeting.what, what) != 0) {
    throw std::logic_error(std::string(what) + " meets " + meeting.what + ": threads have diverged");
  }
  meeting.what = what;
  num_sleeps = 0;
  fibers[current].argument = argument;
  if (++meeting.arrived == num_warps * std::popcount(lanes)) {
    meeting.arrived = 0;
    act();
    for (int warp = first_warp; warp < first_warp + num_warps; ++warp) ready[warp] |= lanes;
    // After a barrier of the block it is again the first or the last warp's turn, not that of the last to arrive.
    if (num_warps > 1 && _setjmp(fibers[current].place) == 0) resume_next(ascending() ? 0 : num_warps - 1);
    return;
  }
  ready[current / 32] &= ~(1u << current % 32);
  if (_setjmp(fibers[current].place) == 0) resume_next();
}

template <typename Act>
void meet_block(const char* what, void* argument, Act act) {
  meet(whole_block, what, 0, static_cast<int>(num_threads) / 32, ~0u, argument, act);
}

// act(lane's argument for each of 32 lanes); those outside of the mask have whatever they last had.
template <typename Argument, typename Act>
void meet_warp(const char* what, unsigned mask, Argument& argument, Act act) {
  const int warp = current / 32;
  Meeting& meeting = mask == ~0u ? whole_warp[warp] : part_of_warp[{warp, mask}];
  meet(meeting, what, warp, 1, mask, &argument, [&] {
    Argument* arguments[32];
    for (int lane = 0; lane < 32; ++lane) arguments[lane] = static_cast<Argument*>(fibers[32 * warp + lane].argument);
    act(arguments);
  });
}

inline void run_block() {
  // What a block finds in shared memory is nothing that it may read.
  poison(shared, sizeof(shared));
  part_of_warp.clear();
  barriers.clear();
  std::fill(std::begin(named_barriers), std::end(named_barriers), NamedBarrier{});
  whole_block = {};
  asleep = {};
  num_sleeps = 0;
  // What an earlier block wrote, one of more threads perhaps, is no matter of this one.
  for (Fiber& fiber : fibers) ++fiber.num_proxy_fences;
  for (unsigned thread = 0; thread < num_threads; ++thread) {
    Fiber& fiber = fibers[thread];
    if (!fiber.stack) fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, run_thread, 0);
    fiber.started = false;
    fiber.copies.clear();
    fiber.num_copy_groups = 0;
    fiber.stores.clear();
    fiber.num_committed_stores = 0;
    fiber.acquired = false;
    whole_warp[thread / 32] = {};
    products[thread / 32] = {};
    ready[thread / 32] = running[thread / 32] = ~0u;
  }
  current = 0;
  if (_setjmp(host) == 0) resume_next();
  if (error) std::rethrow_exception(std::exchange(error, nullptr));
  for (unsigned warp = 0; warp < num_threads / 32; ++warp) {
    if (running[warp] != 0) throw std::logic_error("threads wait for others that never come");
    if (!products[warp].uncommitted.empty() || !products[warp].groups.empty()) {
      throw std::logic_error("a warp ends before its wgmma");
    }
  }
  for (const auto& [address, barrier] : barriers) {
    if (!barrier.loads.empty()) throw std::logic_error("a block ends before its TMA loads");
  }
  for (unsigned thread = 0; thread < num_threads; ++thread) {
    if (!fibers[thread].stores.empty()) throw std::logic_error("a thread ends before its TMA stores");
  }
}

// kernel<<<...>>>(...) becomes Launch{kernel, ...}(...). Blocks run in the order of their indices, or the last first.
template <typename... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  unsigned blocks, threads;
  size_t bytes = 0;
  cudaStream_t stream = nullptr;

  void operator()(Parameters... arguments) const {
    const auto allowed = allowed_shared_bytes.find(reinterpret_cast<const void*>(kernel));
    const size_t most = allowed == allowed_shared_bytes.end() ? 48 * 1024 : allowed->second;
    if (blocks == 0 || threads == 0 || threads % 32 != 0 || threads > kMaxThreads || bytes > most) {
      throw std::logic_error("invalid launch");
    }
    num_threads = threads;
    num_blocks = blocks;
    shared_bytes = static_cast<uint32_t>(bytes);
    body = [&] { kernel(arguments...); };
    for (unsigned i = 0; i < blocks; ++i) {
      block_index = last_block_first ? blocks - 1 - i : i;
      run_block();
    }
    ++num_launches;
    num_large_launches[threads] += bytes > 48 * 1024;
  }
};

template <typename Value>
Value shuffle(const char* what, unsigned mask, Value value, int source) {
  struct Shuffle {
    Value value, result;
    int source;
  } mine{value, value, source};
  meet_warp(what, mask, mine, [mask](Shuffle** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!((mask >> lane) & 1)) continue;
      const int source = lanes[lane]->source;
      if (!((mask >> source) & 1)) throw std::logic_error("shfl reads a lane outside of its mask");
      lanes[lane]->result = lanes[source]->value;
    }
  });
  return mine.result;
}

template <typename Value>
Value shuffle_xor(unsigned mask, Value value, int distance) {
  return shuffle("shfl.bfly", mask, value, (current % 32) ^ distance);
}

template <typename Value>
Value shuffle_index(unsigned mask, Value value, int lane) {
  return shuffle("shfl.idx", mask, value, lane % 32);
}

inline unsigned ballot(unsigned mask, bool predicate) {
  struct Vote {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  meet_warp("ballot", mask, mine, [](Vote** lanes) {
    unsigned result = 0;
    for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(lanes[lane]->predicate) << lane;
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->result = result;
  });
  return mine.result;
}

inline int syncthreads_or(bool predicate) {
  int mine = predicate;
  meet_block("syncthreads_or", &mine, [] {
    int result = 0;
    for (unsigned i = 0; i < num_threads; ++i) result |= *static_cast<int*>(fibers[i].argument);
    for (unsigned i = 0; i < num_threads; ++i) *static_cast<int*>(fibers[i].argument) = result;
  });
  return mine;
}

inline void syncwarp() {
  int nothing = 0;
  meet_warp("syncwarp", ~0u, nothing, [](int**) {});
}

inline void syncthreads() {
  meet_block("syncthreads", nullptr, [] {});
}

// A thread waits for what another writes to global memory, and goes on when no other can. If all that do only sleep
// again, they wait for another block: but those before it have run, and the others will not before it has.
inline void nanosleep(unsigned) {
  if (++num_sleeps > 2 * num_threads) throw std::logic_error("a block waits for one after it");
  asleep.threads.push_back(current);
  ready[current / 32] &= ~(1u << current % 32);
  if (_setjmp(fibers[current].place) == 0) resume_next();
}

}  // namespace emulator

template <typename Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute, int bytes) {
  emulator::allowed_shared_bytes[reinterpret_cast<const void*>(kernel)] = bytes;
  return bytes <= emulator::kMaxSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

// What nvcc knows without a header. The macros come after CUDA's own headers, which have their empty ones.
using std::max;
using std::min;
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline void __threadfence() {}
#define threadIdx (emulator::Index{static_cast<unsigned>(emulator::current)})
#define blockIdx (emulator::Index{emulator::block_index})
#define blockDim (emulator::Index{emulator::num_threads})
#define gridDim (emulator::Index{emulator::num_blocks})
#define __shfl_sync emulator::shuffle_index
#define __shfl_xor_sync emulator::shuffle_xor
#define __ballot_sync emulator::ballot
#define __any_sync emulator::ballot
#define __syncthreads_or emulator::syncthreads_or
#define __syncwarp emulator::syncwarp
#define __syncthreads emulator::syncthreads
#define __nanosleep emulator::nanosleep
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
