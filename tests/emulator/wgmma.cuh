// The functions of csrc/sm90/wgmma.cuh without PTX. Products are made when the warpgroup waits for them, and no sooner:
// who reads an accumulator earlier finds what was there before.
#pragma once

#include "common/ptx.cuh"

namespace flash_cosine_sim {

inline void wgmma_fence() {}

template <int kBlocks>
void pin(float (&)[kBlocks][4]) {}
template <int kBlocks>
void pin(uint32_t (&)[kBlocks][4]) {}

// As PTX defines it, with the panels that csrc/ uses.
template <int kPanelBytes>
uint64_t make_descriptor(uint32_t lower_half) {
  constexpr uint64_t kMode = kPanelBytes == 128 ? 1 : kPanelBytes == 64 ? 2 : 3;
  constexpr uint64_t kUpperHalf = (8 * kPanelBytes / 16) | kMode << 30;
  constexpr uint32_t kUnused = 0b11u << 14 | 0b11u << 30;
  if ((lower_half & kUnused) != 0) throw std::logic_error("an address or distance is too large for a descriptor");
  return kUpperHalf << 32 | lower_half;
}

inline uint64_t make_plain_descriptor(uint32_t lower_half) {
  return (make_descriptor<128>(lower_half) & 0xffffffffu) | uint64_t{256 / 16} << 32;
}

// A lane's operands; a is in its registers, or in shared memory if `a` is null.
struct WgmmaOperands {
  float (*d)[4];
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
};

// How many columns there are, in blocks of 8, and whether b's rows in memory are the contraction's.
struct WgmmaKind {
  bool is_half, accumulates, is_transposed;
  int num_blocks;
};

void issue_wgmma(const char* what, WgmmaKind kind, const WgmmaOperands& mine);  // products.cpp

template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
inline constexpr WgmmaKind kWgmmaKind{std::is_same_v<T, __half>, kAccumulate, kTransposed, kBlocks};

template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
void wgmma_rs(float (&d)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  issue_wgmma("wgmma of registers", kWgmmaKind<T, kAccumulate, kTransposed, kBlocks>, {d, a, 0, b});
}

template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
void wgmma_ss(float (&d)[kBlocks][4], uint64_t a, uint64_t b) {
  issue_wgmma("wgmma of shared memory", kWgmmaKind<T, kAccumulate, kTransposed, kBlocks>, {d, nullptr, a, b});
}

inline void wgmma_commit() {
  int nothing = 0;
  emulator::meet_warp("wgmma commit", ~0u, nothing, [](int**) {
    emulator::Products& products = emulator::products[emulator::current / 32];
    products.groups.push_back(std::exchange(products.uncommitted, {}));
  });
}

template <int kPending>
void wgmma_wait() {
  int nothing = 0;
  emulator::meet_warp("wgmma wait", ~0u, nothing, [](int**) {
    auto& groups = emulator::products[emulator::current / 32].groups;
    for (; groups.size() > kPending; groups.pop_front()) {
      for (const emulator::Deferred& product : groups.front()) product();
    }
  });
}

}  // namespace flash_cosine_sim
