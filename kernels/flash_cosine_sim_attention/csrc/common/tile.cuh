// Tiles in shared memory: their swizzle, how they are filled, and how fragments are read from them.
//
// Fragments of mma.sync, with g = lane / 4 and t = lane % 4:
//   accumulator d[i], 16 x 8    row g + 8 * (i / 2), column 2t + i % 2
//   a, 16 x contraction         a[i]: row g + 8 * (i % 2), 16 bytes i / 2 of the contraction's 32, word t of them
//   b, contraction x 8          b[i]: 16 bytes i of the contraction's 32, word t of them; column g
#pragma once

#include "common/math.cuh"

namespace flash_cosine_sim {

// Where the 16-byte chunk `chunk` of a row lies. The XOR spreads eight neighbouring rows of one chunk, which is
// what ldmatrix reads, over all 32 banks.
template <int kRowBytes>
__device__ __forceinline__ constexpr int swizzle(int row, int chunk) {
  constexpr int kChunks = kRowBytes / 16;
  static_assert(kRowBytes % 32 == 0);
  if constexpr (kChunks % 8 == 0) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  } else if constexpr (kChunks % 4 == 0) {
    return row * kRowBytes + ((chunk ^ ((row >> 1) & 3)) << 4);
  } else {
    return row * kRowBytes + ((chunk ^ ((row >> 2) & 1)) << 4);
  }
}

// The same for the chunk `even` + `odd`, the first even and known to the compiler, the second 0 or 1. Only the bits
// that the XOR reaches are left to the lane: the rest becomes the constant offset of the access, and addresses that
// differ in it alone share a register.
template <int kRowBytes>
__device__ __forceinline__ constexpr int swizzle(int row, int even, int odd) {
  constexpr int kMask = kRowBytes / 16 % 8 == 0 ? 7 : kRowBytes / 16 % 4 == 0 ? 3 : 1;
  return swizzle<kRowBytes>(row, (even & kMask) + odd) + ((even & ~kMask) << 4);
}

// Starts to copy rows [0, kRows) of a matrix into a tile. Rows from num_rows on and bytes from valid_bytes on
// become zero.
template <int kRows, int kRowBytes, int kThreads>
__device__ __forceinline__ void load_tile(uint32_t tile, const char* source, int64_t row_bytes, int num_rows,
                                          int valid_bytes) {
  constexpr int kChunks = kRowBytes / 16;
  constexpr int kTotal = kRows * kChunks;
  const int thread = opaque(static_cast<int>(threadIdx.x));  // a few instructions once a tile, not registers always
  if constexpr (kThreads % kChunks == 0 && kTotal % kThreads == 0) {
    // A thread keeps to one column of chunks, so one pointer walks down: the loop is in the kernels' inner loop.
    constexpr int kRowsPerPass = kThreads / kChunks;
    const int chunk = thread % kChunks, last_row = chunk * 16 < valid_bytes ? num_rows : 0;
    int row = thread / kChunks;
    const char* address = source + row * row_bytes + chunk * 16;
#pragma unroll(kTotal / kThreads > 8 ? 2 : 8)
    for (int pass = 0; pass < kTotal / kThreads; ++pass) {
      const bool valid = row < last_row;
      cp_async_16(tile + swizzle<kRowBytes>(row, chunk), valid ? address : source, valid);
      row += kRowsPerPass;
      address += kRowsPerPass * row_bytes;
    }
  } else {
    // Unrolled further, the addresses of all passes would be kept in registers.
#pragma unroll(kTotal / kThreads > 8 ? 1 : 8)
    for (int first = 0; first < kTotal; first += kThreads) {
      const int index = first + thread, row = index / kChunks, chunk = index % kChunks;
      if (kTotal % kThreads != 0 && index >= kTotal) break;
      const bool valid = row < num_rows && chunk * 16 < valid_bytes;
      cp_async_16(tile + swizzle<kRowBytes>(row, chunk), valid ? source + row * row_bytes + chunk * 16 : source, valid);
    }
  }
}

// a of rows [row, row + 16), contraction step `step`, from a tile whose rows are contiguous in the contraction.
template <int kRowBytes>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int row, int step) {
  const int lane = threadIdx.x & 31;
  ldmatrix_x4(a, tile + swizzle<kRowBytes>(row + (lane & 15), 2 * step, lane >> 4));
}

// Two b's, of columns [column, column + 8) and the next 8, from a tile [column][contraction].
template <int kRowBytes>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int column, int step) {
  const int lane = threadIdx.x & 31;
  ldmatrix_x4(b, tile + swizzle<kRowBytes>(column + (lane & 7) + ((lane >> 4) << 3), 2 * step, (lane >> 3) & 1));
}

// Two b's, of columns [column, column + 8) and the next 8, from a tile [contraction][column].
template <Math kMath, int kRowBytes>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], uint32_t tile, int column, int step) {
  const int lane = threadIdx.x & 31;
  if constexpr (sizeof(Element<kMath>) == 2) {
    ldmatrix_x4_trans(b, tile + swizzle<kRowBytes>(16 * step + (lane & 15), column / 8, lane >> 4));
  } else {
    // The order of accumulator_to_a: place t of the contraction is row 2t, place t + 4 is row 2t + 1.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * step + 2 * (lane & 3) + (i & 1);
      b[i] = __float_as_uint(load_shared_f32(tile + swizzle<kRowBytes>(row, column / 4 + 2 * (i >> 1), lane >> 4) +
                                             4 * ((lane >> 2) & 3)));
    }
  }
}

// a of rows [row, row + 16) from a tile [contraction][row].
template <Math kMath, int kRowBytes>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], uint32_t tile, int row, int step) {
  const int lane = threadIdx.x & 31;
  if constexpr (sizeof(Element<kMath>) == 2) {
    ldmatrix_x4_trans(a,
                      tile + swizzle<kRowBytes>(16 * step + (lane & 7) + ((lane >> 4) << 3), row / 8, (lane >> 3) & 1));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int line = 8 * step + 2 * (lane & 3) + (i >> 1);
      a[i] = __float_as_uint(
          load_shared_f32(tile + swizzle<kRowBytes>(line, row / 4 + 2 * (i & 1), lane >> 4) + 4 * ((lane >> 2) & 3)));
    }
  }
}

// Writes accumulators of 16 rows x 8 * kBlocks columns, rounded to the element, into a tile of elements.
template <Math kMath, int kRowBytes, int kBlocks>
__device__ __forceinline__ void store_accumulator(uint32_t tile, const float (&c)[kBlocks][4], int row, int column) {
  using T = Element<kMath>;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = row + (lane >> 2) + 8 * half;
      const int byte = (column + 8 * block + 2 * (lane & 3)) * static_cast<int>(sizeof(T));
      const uint32_t address = tile + swizzle<kRowBytes>(line, byte >> 4) + (byte & 15);
      if constexpr (sizeof(T) == 2) {
        store_shared_b32(address, pack<T>(c[block][2 * half], c[block][2 * half + 1]));
      } else {
        store_shared_v2_f32(address, c[block][2 * half], c[block][2 * half + 1]);
      }
    }
  }
}

}  // namespace flash_cosine_sim
