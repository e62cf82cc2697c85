// The functions of csrc/common/ptx.cuh without PTX. An access to shared memory beyond the block's own, or to an address
// that is not aligned, is an error, as it is on a GPU.
#pragma once

#include "emulator.h"

namespace flash_cosine_sim {

inline int64_t opaque(int64_t value) { return value; }
inline int opaque(int value) { return value; }
inline float opaque(float value) { return value; }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulator::shared);
}

inline char* shared_memory_at(uint32_t address, uint32_t bytes) {
  if (address % bytes != 0 || address + bytes > emulator::shared_bytes) {
    throw std::logic_error("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(address) + " of " +
                           std::to_string(emulator::shared_bytes));
  }
  return emulator::shared + address;
}

// The bytes arrive when the thread waits for them, and no sooner; until then there is nothing to read.
inline void cp_async_16(uint32_t destination, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) throw std::logic_error("cp.async from an unaligned address");
  emulator::poison(shared_memory_at(destination, 16), 16);
  emulator::Fiber& fiber = emulator::fibers[emulator::current];
  fiber.copies.push_back({destination, source, valid, fiber.num_copy_groups});
  emulator::num_copied_bytes += valid ? 16 : 0;
}

inline void cp_async_commit() { ++emulator::fibers[emulator::current].num_copy_groups; }

// Until none is left but those of the last num_pending groups and those that are in none.
inline void finish_copies(int num_pending) {
  emulator::Fiber& fiber = emulator::fibers[emulator::current];
  const auto is_done = [&](const emulator::Copy& copy) { return copy.group + num_pending < fiber.num_copy_groups; };
  for (const emulator::Copy& copy : fiber.copies) {
    if (!is_done(copy)) continue;
    char* destination = shared_memory_at(copy.destination, 16);
    if (copy.valid) {
      std::memcpy(destination, copy.source, 16);
    } else {
      std::memset(destination, 0, 16);
    }
  }
  std::erase_if(fiber.copies, is_done);
}

template <int kPending>
void cp_async_wait() {
  finish_copies(kPending);
}

inline void cp_async_wait_all() {
  cp_async_commit();
  finish_copies(0);
}

template <bool kTranspose>
void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  struct Load {
    uint32_t address;
    uint32_t* r;
  } mine{address, r};
  emulator::meet_warp(kTranspose ? "ldmatrix.trans" : "ldmatrix", ~0u, mine, [](Load** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t rows[8][8];
      for (int row = 0; row < 8; ++row) {
        std::memcpy(rows[row], shared_memory_at(lanes[8 * matrix + row]->address, 16), 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        const uint32_t low = kTranspose ? rows[column][row] : rows[row][column];
        const uint32_t high = kTranspose ? rows[column + 1][row] : rows[row][column + 1];
        lanes[lane]->r[matrix] = low | high << 16;
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { ldmatrix<false>(r, address); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) { ldmatrix<true>(r, address); }

inline void mark_written(uint32_t address, uint32_t bytes, int thread) {
  for (uint32_t word = address / 4; word < (address + bytes) / 4; ++word) {
    emulator::last_write[word] = {thread, emulator::fibers[thread].num_proxy_fences};
  }
}

inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) {
  struct Store {
    uint32_t address;
    const uint32_t* r;
  } mine{address, r};
  emulator::meet_warp("stmatrix.trans", ~0u, mine, [](Store** lanes) {
    const int first_thread = emulator::current / 32 * 32;
    for (int lane = 0; lane < 32; ++lane) {  // the one with the address
      uint16_t column[8];
      for (int row = 0; row < 8; ++row) {
        column[row] = static_cast<uint16_t>(lanes[4 * row + lane % 8 / 2]->r[lane / 8] >> lane % 2 * 16);
      }
      std::memcpy(shared_memory_at(lanes[lane]->address, 16), column, 16);
      mark_written(lanes[lane]->address, 16, first_thread + lane);
    }
  });
}

inline int load_shared_s32(uint32_t address) {
  int value;
  std::memcpy(&value, shared_memory_at(address, 4), 4);
  return value;
}

inline float load_shared_f32(uint32_t address) {
  float value;
  std::memcpy(&value, shared_memory_at(address, 4), 4);
  return value;
}

template <typename Value>
void store_shared(uint32_t address, const Value& value) {
  std::memcpy(shared_memory_at(address, sizeof(value)), &value, sizeof(value));
  mark_written(address, sizeof(value), emulator::current);
}

inline void load_shared_v2_s32(int (&values)[2], uint32_t address) {
  std::memcpy(values, shared_memory_at(address, 8), 8);
}

inline void load_shared_v4_s32(int (&values)[4], uint32_t address) {
  std::memcpy(values, shared_memory_at(address, 16), 16);
}

inline void load_shared_v4_u32(uint32_t (&values)[4], uint32_t address) {
  std::memcpy(values, shared_memory_at(address, 16), 16);
}

inline void store_shared_b32(uint32_t address, uint32_t value) { store_shared(address, value); }
inline void store_shared_v2_s32(uint32_t address, const int (&values)[2]) { store_shared(address, values); }
inline void store_shared_v4_s32(uint32_t address, const int (&values)[4]) { store_shared(address, values); }
inline void store_shared_v2_f32(uint32_t address, float x, float y) { store_shared(address, float2{x, y}); }

inline void store_shared_v4_f32(uint32_t address, float x, float y, float z, float w) {
  store_shared(address, float4{x, y, z, w});
}

enum class Mma { kBf16, kF16, kTf32 };

void mma(Mma kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);  // products.cpp

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(Mma::kBf16, d, a, b0, b1);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(Mma::kF16, d, a, b0, b1);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(Mma::kTf32, d, a, b0, b1);
}

inline uint32_t cvt_rna_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

inline float ex2_approx_ftz(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}

inline float rcp_approx_ftz(float x) { return 1.f / x; }

inline void red_add_v2_f32(float* address, float x, float y) {
  address[0] += x;
  address[1] += y;
}

inline void red_add_f32(float* address, float x) { *address += x; }

inline int load_acquire(const int* address) { return *address; }
inline uint32_t load_acquire(const uint32_t* address) {
  emulator::fibers[emulator::current].acquired = true;
  return *address;
}
inline uint32_t load_relaxed(const uint32_t* address) { return *address; }
inline void store_release(int* address, int value) { *address = value; }
inline void red_add_release(uint32_t* address, uint32_t value) { *address += value; }
inline uint32_t atomic_increment(uint32_t* address) { return (*address)++; }

// ---- Compute capability 9.0 ----

inline emulator::Barrier& barrier_at(uint32_t address) {
  shared_memory_at(address, 8);
  const auto found = emulator::barriers.find(address);
  if (found == emulator::barriers.end()) throw std::logic_error("no barrier at " + std::to_string(address));
  return found->second;
}

inline void complete_phase_if_done(emulator::Barrier& barrier) {
  if (barrier.still_to_arrive < 0) throw std::logic_error("a thread too many arrives at a barrier");
  if (barrier.still_to_arrive > 0 || barrier.missing_bytes != 0) return;
  barrier.still_to_arrive = barrier.count;
  ++barrier.phase;
  emulator::wake(barrier.waiting);
}

inline void mbarrier_init(uint32_t address, int count) {
  shared_memory_at(address, 8);
  const bool is_new = emulator::barriers
                          .insert({
                              address, {count, count}
  })
                          .second;
  if (!is_new) throw std::logic_error("a barrier is initialised twice");
}

inline void fence_mbarrier_init() {}

inline void mbarrier_arrive(uint32_t address) {
  emulator::Barrier& barrier = barrier_at(address);
  --barrier.still_to_arrive;
  complete_phase_if_done(barrier);
}

inline void mbarrier_arrive_expect_tx(uint32_t address, int bytes) {
  barrier_at(address).missing_bytes += bytes;
  mbarrier_arrive(address);
}

inline void make_loads(emulator::Barrier& barrier) {
  for (const emulator::Deferred& load : std::exchange(barrier.loads, {})) load();
  complete_phase_if_done(barrier);
}

inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  if (parity > 1) throw std::logic_error("the parity of a phase is 0 or 1");
  emulator::Barrier& barrier = barrier_at(address);
  const auto is_complete = [&] { return (barrier.phase & 1) != parity; };
  if (!is_complete() && !barrier.loads.empty()) make_loads(barrier);
  while (!is_complete()) emulator::wait(barrier.waiting);
}

inline void fence_proxy_async() { ++emulator::fibers[emulator::current].num_proxy_fences; }

// TMA sees what other threads wrote to global memory only after a fence of the thread that acquired it.
inline void fence_proxy_async_global() { emulator::fibers[emulator::current].acquired = false; }

// The asynchronous proxy, of TMA and wgmma, sees what st.shared wrote only after a fence of the thread that did.
inline char* asynchronous_memory_at(uint32_t address, uint32_t bytes) {
  char* memory = shared_memory_at(address, bytes);
  for (uint32_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
    const emulator::Write& write = emulator::last_write[word];
    if (write.num_proxy_fences == emulator::fibers[write.thread].num_proxy_fences) {
      throw std::logic_error("no proxy fence between st.shared and TMA or wgmma");
    }
  }
  return memory;
}

// How TMA and wgmma swizzle rows of panel_bytes: 128, 64 or 32.
inline uint32_t swizzled(uint32_t address, uint32_t panel_bytes) {
  return address ^ (address >> 3 & (panel_bytes - 16));
}

inline char* overwritten_by_tma(uint32_t address) {
  std::fill_n(&emulator::last_write[address / 4], 4, emulator::Write{});
  return shared_memory_at(address, 16);
}

// Calls move(address in shared memory, global memory or null where the tensor has ended) for every 16 bytes of a box.
template <typename Move>
void for_each_piece(const emulator::TensorMap& map, uint32_t tile, int column, int row, int head, int batch,
                    Move move) {
  const uint32_t row_bytes = 2 * map.box_columns;
  if (tile % (8 * row_bytes) != 0) throw std::logic_error("a box does not begin where its swizzle does");
  for (int y = 0; y < map.box_rows; ++y) {
    for (int x = 0; x < map.box_columns; x += 8) {
      const bool inside = column + x < map.sizes[0] && row + y < map.sizes[1] && head < map.sizes[2] &&
                          batch < map.sizes[3];
      char* const global = map.data + 2 * (column + x) + (row + y) * map.stride_bytes[0] + head * map.stride_bytes[1] +
                           batch * map.stride_bytes[2];
      move(swizzled(tile + y * row_bytes + 2 * x, row_bytes), inside ? global : nullptr);
    }
  }
}

inline void check_acquired() {
  if (emulator::fibers[emulator::current].acquired) throw std::logic_error("no proxy fence between ld.acquire and TMA");
}

// The bytes arrive when a thread waits for them, and no sooner; until then there is nothing to read.
inline void tma_load_4d(uint32_t tile, const void* tensor_map, uint32_t barrier_address, int column, int row, int head,
                        int batch) {
  const auto& map = *static_cast<const emulator::TensorMap*>(tensor_map);
  emulator::Barrier& barrier = barrier_at(barrier_address);
  check_acquired();
  emulator::num_loaded_bytes += 2 * map.box_columns * map.box_rows;
  for_each_piece(map, tile, column, row, head, batch,
                 [](uint32_t address, const char*) { emulator::poison(overwritten_by_tma(address), 16); });
  barrier.loads.push_back([=, &map, &barrier] {
    for_each_piece(map, tile, column, row, head, batch, [](uint32_t address, const char* global) {
      char* destination = shared_memory_at(address, 16);
      if (global != nullptr) {
        std::memcpy(destination, global, 16);
      } else {
        std::memset(destination, 0, 16);
      }
    });
    barrier.missing_bytes -= 2 * map.box_columns * map.box_rows;
  });
  if (!barrier.waiting.threads.empty()) make_loads(barrier);
}

inline void check_bulk(const void* global, uint32_t shared, int bytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || shared % 16 != 0 || bytes % 16 != 0 || bytes <= 0) {
    throw std::logic_error("a bulk copy of an unaligned address or size");
  }
}

inline void bulk_load(uint32_t destination, const void* source, int bytes, uint32_t barrier_address) {
  check_bulk(source, destination, bytes);
  check_acquired();
  emulator::Barrier& barrier = barrier_at(barrier_address);
  for (int byte = 0; byte < bytes; byte += 16) emulator::poison(overwritten_by_tma(destination + byte), 16);
  barrier.loads.push_back([=, &barrier] {
    for (int byte = 0; byte < bytes; byte += 16) {
      std::memcpy(shared_memory_at(destination + byte, 16), static_cast<const char*>(source) + byte, 16);
    }
    barrier.missing_bytes -= bytes;
  });
  if (!barrier.waiting.threads.empty()) make_loads(barrier);
}

inline void bulk_add_f32(float* destination, uint32_t source, int bytes) {
  check_bulk(destination, source, bytes);
  emulator::fibers[emulator::current].stores.push_back([=] {
    for (int byte = 0; byte < bytes; byte += 4) {
      float x;
      std::memcpy(&x, asynchronous_memory_at(source + byte, 4), 4);
      destination[byte / 4] += x;
    }
  });
}

// The bytes are read when the thread waits for that, and no sooner.
inline void tma_store_4d(const void* tensor_map, uint32_t tile, int column, int row, int head, int batch) {
  const auto& map = *static_cast<const emulator::TensorMap*>(tensor_map);
  emulator::fibers[emulator::current].stores.push_back([=, &map] {
    for_each_piece(map, tile, column, row, head, batch, [](uint32_t address, char* global) {
      const char* source = asynchronous_memory_at(address, 16);
      if (global != nullptr) std::memcpy(global, source, 16);
    });
  });
}

inline void tma_store_commit() {
  emulator::Fiber& fiber = emulator::fibers[emulator::current];
  fiber.num_committed_stores = fiber.stores.size();
}

inline void tma_store_wait_read() {
  emulator::Fiber& fiber = emulator::fibers[emulator::current];
  const auto end = fiber.stores.begin() + std::exchange(fiber.num_committed_stores, 0);
  std::for_each(fiber.stores.begin(), end, [](const emulator::Deferred& store) { store(); });
  fiber.stores.erase(fiber.stores.begin(), end);
}

inline void tma_store_wait() { tma_store_wait_read(); }

inline void prefetch_tensor_map(const void*) {}

template <int kThreads>
void named_barrier_sync(int number) {
  if (number < 1 || number > 15) throw std::logic_error("named barriers are 1 to 15");
  emulator::NamedBarrier& barrier = emulator::named_barriers[number];
  if (barrier.arrived == 0) barrier.num_threads = kThreads;
  if (barrier.num_threads != kThreads) throw std::logic_error("a named barrier is for different numbers of threads");
  if (++barrier.arrived < kThreads) return emulator::wait(barrier.waiting);
  barrier.arrived = 0;
  emulator::wake(barrier.waiting);
}

// How many registers there are is nothing that an emulation knows.
template <int kRegisters>
void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::syncwarp();
}
template <int kRegisters>
void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::syncwarp();
}

}  // namespace flash_cosine_sim
