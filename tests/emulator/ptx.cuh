// The functions of csrc/ptx.cuh without PTX. An access to shared memory beyond the block's own, or to an address that is
// not aligned, is an error, as it is on a GPU.
#pragma once

#include "emulator.h"

namespace flash_cosine_sim {

inline int64_t opaque(int64_t value) { return value; }
inline int opaque(int value) { return value; }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulator::shared);
}

inline char* shared_memory_at(uint32_t address, uint32_t bytes) {
  if (address % bytes != 0 || address + bytes > emulator::shared_bytes) {
    throw std::logic_error("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
                           " of " + std::to_string(emulator::shared_bytes));
  }
  return emulator::shared + address;
}

// The bytes arrive when the thread waits for them, and no sooner; until then there is nothing to read.
inline void cp_async_16(uint32_t destination, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) throw std::logic_error("cp.async from an unaligned address");
  emulator::poison(shared_memory_at(destination, 16), 16);
  emulator::fibers[emulator::current].copies.push_back({destination, source, valid});
}

inline void cp_async_wait_all() {
  for (const emulator::Copy& copy : emulator::fibers[emulator::current].copies) {
    char* destination = shared_memory_at(copy.destination, 16);
    if (copy.valid) {
      std::memcpy(destination, copy.source, 16);
    } else {
      std::memset(destination, 0, 16);
    }
  }
  emulator::fibers[emulator::current].copies.clear();
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

inline float load_shared_f32(uint32_t address) {
  float value;
  std::memcpy(&value, shared_memory_at(address, 4), 4);
  return value;
}

inline void store_shared_b32(uint32_t address, uint32_t value) { std::memcpy(shared_memory_at(address, 4), &value, 4); }

inline void store_shared_v2_f32(uint32_t address, float x, float y) {
  const float values[] = {x, y};
  std::memcpy(shared_memory_at(address, 8), values, 8);
}

// kPerRegister elements of the contraction lie in a register: 2 of 16 bits, or one TF32. Sums are rounded, where a
// tensor core truncates them.
template <int kPerRegister, typename Decode>
void mma(const char* what, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Decode decode) {
  constexpr int kContraction = 8 * kPerRegister;
  struct Product {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulator::meet_warp(what, ~0u, mine, [decode](Product** lanes) {
    float a[16][kContraction], b[kContraction][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, place = lane % 4;
      for (int i = 0; i < 4; ++i) {
        d[group + 8 * (i / 2)][2 * place + i % 2] = lanes[lane]->d[i];
        for (int part = 0; part < kPerRegister; ++part) {
          const int k = (i / 2 * 4 + place) * kPerRegister + part;
          a[group + 8 * (i % 2)][k] = decode(lanes[lane]->a[i], part);
        }
      }
      for (int i = 0; i < 2; ++i) {
        for (int part = 0; part < kPerRegister; ++part) {
          b[(i * 4 + place) * kPerRegister + part][group] = decode(lanes[lane]->b[i], part);
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < kContraction; ++k) {
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
    }
  });
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<2>("mma bf16", d, a, b0, b1, [](uint32_t x, int part) {
    return __uint_as_float(part == 0 ? x << 16 : x & 0xffff0000u);
  });
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<2>("mma f16", d, a, b0, b1, [](uint32_t x, int part) {
    return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(x >> 16 * part)));
  });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<1>("mma tf32", d, a, b0, b1, [](uint32_t x, int) { return __uint_as_float(x & 0xffffe000u); });
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

inline int load_acquire(const int* address) { return *address; }
inline void store_release(int* address, int value) { *address = value; }

}  // namespace flash_cosine_sim
