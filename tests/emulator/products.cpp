// What tensor cores compute: mma and wgmma. Compiled once, for these products are half of what an emulation does.
// Not -O1, as the rest: it saves a tenth.
#pragma GCC optimize("O2")

#include <utility>

#include "common/ptx.cuh"
#include "sm90/wgmma.cuh"

namespace flash_cosine_sim {
namespace {

// Eight at once, which the compiler makes of what the host has, and of loops with -O3 alone.
using Floats [[gnu::vector_size(32)]] = float;

Floats load(const float* eight) { return *reinterpret_cast<const Floats*>(eight); }
void store(float* eight, Floats values) { *reinterpret_cast<Floats*>(eight) = values; }

// A conversion of float16 is a call where the host has no instruction for it.
const std::vector<float> float_of_half = [] {
  std::vector<float> values(1 << 16);
  for (unsigned i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(i)));
  }
  return values;
}();

float to_float(bool is_half, uint16_t bits) {
  return is_half ? float_of_half[bits] : __uint_as_float(uint32_t{bits} << 16);
}

// Element `part` of a register, which holds 2 of 16 bits or one TF32.
float element(Mma kind, uint32_t bits, int part) {
  if (kind == Mma::kTf32) return __uint_as_float(bits & 0xffffe000u);
  return to_float(kind == Mma::kF16, static_cast<uint16_t>(bits >> 16 * part));
}

struct WgmmaRegisters {
  uint32_t of_lane[32][4];
};

// Elements of the contraction k to k + 7 in row (of a) or column (of b) n; if it is transposed, whose rows in memory
// are k's and not n's, n to n + 7 at k. They are 16 bytes, which a swizzle leaves together. Without one a panel is a
// core matrix wide.
void read_piece(float (&elements)[8], bool is_half, bool is_transposed, uint64_t descriptor, int n, int k) {
  const auto field = [&](int first_bit) { return static_cast<uint32_t>(descriptor >> first_bit & 0x3fff) * 16; };
  const uint32_t start = field(0), next_panel = field(16), next_rows = field(32);
  const int mode = static_cast<int>(descriptor >> 62);
  const uint32_t panel_bytes = mode == 0 ? 16 : 256 >> mode;
  if (mode == 0 && is_transposed) throw std::logic_error("not emulated");
  const int row = is_transposed ? k : n, column = is_transposed ? n : k;
  const int panel_columns = static_cast<int>(panel_bytes) / 2;
  const uint32_t address = start + column / panel_columns * next_panel + row / 8 * next_rows + row % 8 * panel_bytes +
                           column % panel_columns * 2;
  uint16_t bits[8];
  std::memcpy(bits, asynchronous_memory_at(swizzled(address, panel_bytes), 16), 16);
  for (int i = 0; i < 8; ++i) elements[i] = to_float(is_half, bits[i]);
}

// The 16 rows of a that are this warp's: a column of the contraction after the other.
void read_a(float (&a)[16][16], WgmmaKind kind, const std::vector<WgmmaOperands>& lanes,
            const WgmmaRegisters& registers, int warp) {
  if (lanes[0].a == nullptr) {
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; k += 8) {
        float piece[8];
        read_piece(piece, kind.is_half, false, lanes[0].a_descriptor, 16 * (warp % 4) + row, k);
        for (int i = 0; i < 8; ++i) a[k + i][row] = piece[i];
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
        a[2 * (lane % 4) + 8 * (i / 2) + part][lane / 4 + 8 * (i % 2)] = to_float(kind.is_half, bits);
      }
    }
  }
}

void multiply(WgmmaKind kind, const std::vector<WgmmaOperands>& lanes, const WgmmaRegisters& registers, int warp) {
  alignas(32) float a[16][16];  // k, row
  read_a(a, kind, lanes, registers, warp);
  const uint64_t descriptor = lanes[0].b_descriptor;
  for (int block = 0; block < kind.num_blocks; ++block) {
    float b[16][8];  // k, column
    for (int i = 0; i < 16; ++i) {
      if (kind.is_transposed) {
        read_piece(b[i], kind.is_half, true, descriptor, 8 * block, i);
      } else {
        float piece[8];
        read_piece(piece, kind.is_half, false, descriptor, 8 * block + i / 2, i % 2 * 8);
        for (int k = 0; k < 8; ++k) b[i % 2 * 8 + k][i / 2] = piece[k];
      }
    }
    // A lane has two columns of rows lane / 4 and lane / 4 + 8.
    alignas(32) float sums[8][16]{};  // column, row
    if (kind.accumulates) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) sums[lane % 4 * 2 + i % 2][lane / 4 + 8 * (i / 2)] = lanes[lane].d[block][i];
      }
    }
    for (int n = 0; n < 8; ++n) {
      Floats upper = load(&sums[n][0]), lower = load(&sums[n][8]);
      for (int k = 0; k < 16; ++k) {
        upper += load(&a[k][0]) * b[k][n];
        lower += load(&a[k][8]) * b[k][n];
      }
      store(&sums[n][0], upper);
      store(&sums[n][8], lower);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) lanes[lane].d[block][i] = sums[lane % 4 * 2 + i % 2][lane / 4 + 8 * (i / 2)];
    }
  }
}

// Sums are rounded, where a tensor core truncates them.
template <Mma kKind>
void mma(const char* what, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr int kPerRegister = kKind == Mma::kTf32 ? 1 : 2, kContraction = 8 * kPerRegister;
  struct Product {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{
      d, a, {b0, b1}
  };
  emulator::meet_warp(what, ~0u, mine, [](Product** lanes) {
    float a[16][kContraction];
    alignas(32) float b[kContraction][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, place = lane % 4;
      for (int i = 0; i < 4; ++i) {
        d[group + 8 * (i / 2)][2 * place + i % 2] = lanes[lane]->d[i];
        for (int part = 0; part < kPerRegister; ++part) {
          const int k = (i / 2 * 4 + place) * kPerRegister + part;
          a[group + 8 * (i % 2)][k] = element(kKind, lanes[lane]->a[i], part);
        }
      }
      for (int i = 0; i < 2; ++i) {
        for (int part = 0; part < kPerRegister; ++part) {
          b[(i * 4 + place) * kPerRegister + part][group] = element(kKind, lanes[lane]->b[i], part);
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      Floats sums = load(d[row]);
      for (int k = 0; k < kContraction; ++k) sums += a[row][k] * load(b[k]);
      store(d[row], sums);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
    }
  });
}

}  // namespace

void mma(Mma kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  switch (kind) {
    case Mma::kBf16: return mma<Mma::kBf16>("mma bf16", d, a, b0, b1);
    case Mma::kF16: return mma<Mma::kF16>("mma f16", d, a, b0, b1);
    case Mma::kTf32: return mma<Mma::kTf32>("mma tf32", d, a, b0, b1);
  }
}

void issue_wgmma(const char* what, WgmmaKind kind, const WgmmaOperands& mine) {
  WgmmaOperands operands = mine;
  emulator::meet_warp(what, ~0u, operands, [kind](WgmmaOperands** arguments) {
    std::vector<WgmmaOperands> lanes;
    lanes.reserve(32);
    WgmmaRegisters registers{};
    for (int lane = 0; lane < 32; ++lane) {
      lanes.push_back(*arguments[lane]);
      if (lanes[lane].a != nullptr) std::memcpy(registers.of_lane[lane], lanes[lane].a, 16);
      if (lanes[lane].a_descriptor != lanes[0].a_descriptor || lanes[lane].b_descriptor != lanes[0].b_descriptor) {
        throw std::logic_error("the lanes of a warp have different descriptors");
      }
    }
    const int warp = emulator::current / 32;
    emulator::products[warp].uncommitted.push_back(
        [=, lanes = std::move(lanes)] { multiply(kind, lanes, registers, warp); });
    ++emulator::num_wgmmas;
  });
}

}  // namespace flash_cosine_sim
