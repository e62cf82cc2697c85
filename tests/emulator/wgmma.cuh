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

template <typename T>
float wgmma_element(uint16_t bits) {
  if constexpr (__is_same(T, __half)) return static_cast<float>(std::bit_cast<_Float16>(bits));
  return __uint_as_float(uint32_t{bits} << 16);
}

// Element k of the contraction in row (of a) or column (of b) n. With kTransposed the rows in memory are k's, not n's.
// Without a swizzle a panel is a core matrix wide.
template <typename T, bool kTransposed>
float wgmma_element(uint64_t descriptor, int n, int k) {
  const auto field = [&](int first_bit) { return static_cast<uint32_t>(descriptor >> first_bit & 0x3fff) * 16; };
  const uint32_t start = field(0), next_panel = field(16), next_rows = field(32);
  const int mode = static_cast<int>(descriptor >> 62);
  const uint32_t panel_bytes = mode == 0 ? 16 : 256 >> mode;
  if (mode == 0 && kTransposed) throw std::logic_error("not emulated");
  const int row = kTransposed ? k : n, column = kTransposed ? n : k;
  const int panel_columns = static_cast<int>(panel_bytes) / 2;
  const uint32_t address = start + column / panel_columns * next_panel + row / 8 * next_rows + row % 8 * panel_bytes +
                           column % panel_columns * 2;
  uint16_t bits;
  std::memcpy(&bits, asynchronous_memory_at(swizzled(address, panel_bytes), 2), 2);
  return wgmma_element<T>(bits);
}

// A lane's operands; a is in its registers, or in shared memory if `a` is null.
struct WgmmaOperands {
  float (*d)[4];
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
};

struct WgmmaRegisters {
  uint32_t of_lane[32][4];
};

// The 16 rows of a that are this warp's.
template <typename T>
void read_a(float (&a)[16][16], const std::vector<WgmmaOperands>& lanes, const WgmmaRegisters& registers, int warp) {
  if (lanes[0].a == nullptr) {
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        a[row][k] = wgmma_element<T, false>(lanes[0].a_descriptor, 16 * (warp % 4) + row, k);
      }
    }
    return;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (std::memcmp(lanes[lane].a, registers.of_lane[lane], sizeof(registers.of_lane[lane])) != 0) {
      throw std::logic_error("the registers of a are written before wgmma has read them");
    }
    for (int i = 0; i < 4; ++i) {
      for (int part = 0; part < 2; ++part) {
        const auto bits = static_cast<uint16_t>(registers.of_lane[lane][i] >> 16 * part);
        a[lane / 4 + 8 * (i % 2)][2 * (lane % 4) + 8 * (i / 2) + part] = wgmma_element<T>(bits);
      }
    }
  }
}

template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
void multiply(const std::vector<WgmmaOperands>& lanes, const WgmmaRegisters& registers, int warp) {
  float a[16][16];
  read_a<T>(a, lanes, registers, warp);
  for (int n = 0; n < 8 * kBlocks; ++n) {
    float b[16], sums[16];
    for (int k = 0; k < 16; ++k) b[k] = wgmma_element<T, kTransposed>(lanes[0].b_descriptor, n, k);
    const auto d = [&](int row) -> float& { return lanes[row % 8 * 4 + n % 8 / 2].d[n / 8][row / 8 * 2 + n % 2]; };
    for (int row = 0; row < 16; ++row) sums[row] = kAccumulate ? d(row) : 0.f;
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; ++row) sums[row] += a[row][k] * b[k];
    }
    for (int row = 0; row < 16; ++row) d(row) = sums[row];
  }
}

template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
void issue_wgmma(const char* what, WgmmaOperands mine) {
  emulator::meet_warp(what, ~0u, mine, [](WgmmaOperands** arguments) {
    std::vector<WgmmaOperands> lanes;
    WgmmaRegisters registers{};
    for (int lane = 0; lane < 32; ++lane) {
      lanes.push_back(*arguments[lane]);
      if (lanes[lane].a != nullptr) std::memcpy(registers.of_lane[lane], lanes[lane].a, 16);
      if (lanes[lane].a_descriptor != lanes[0].a_descriptor || lanes[lane].b_descriptor != lanes[0].b_descriptor) {
        throw std::logic_error("the lanes of a warp have different descriptors");
      }
    }
    const int warp = emulator::current / 32;
    emulator::products[warp].uncommitted.push_back([=, lanes = std::move(lanes)] {
      multiply<T, kAccumulate, kTransposed, kBlocks>(lanes, registers, warp);
    });
    ++emulator::num_wgmmas;
  });
}

template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
void wgmma_rs(float (&d)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  issue_wgmma<T, kAccumulate, kTransposed, kBlocks>("wgmma of registers", {d, a, 0, b});
}

template <typename T, bool kAccumulate, bool kTransposed, int kBlocks>
void wgmma_ss(float (&d)[kBlocks][4], uint64_t a, uint64_t b) {
  issue_wgmma<T, kAccumulate, kTransposed, kBlocks>("wgmma of shared memory", {d, nullptr, a, b});
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
