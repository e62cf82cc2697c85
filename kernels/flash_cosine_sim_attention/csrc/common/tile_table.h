// Tables of tile sizes: a row a head dim that has a kernel, in ascending order. Plain C++, as plan.cpp reads them, too.
//
// A table is in a header of its own, with what follows from it, so that another size compiles its kernels alone.
#pragma once

#include "attention.h"

namespace flash_cosine_sim {

// The row for a head dim: the first that holds it. There has to be one.
template <typename Tile, int kRows>
constexpr const Tile& tile_of(const Tile (&table)[kRows], int head_dim) {
  int row = 0;
  while (table[row].head_dim < head_dim) ++row;
  return table[row];
}

// Of a block of the kernels in sm80/: the most that GPUs of compute capability 8.6, 8.9 and 12.0 give to one; a 9.0
// then holds two or three blocks a multiprocessor.
inline constexpr int kMaxSharedBytes = 99 * 1024;
// Of a block of those in sm90/.
inline constexpr int kMaxSharedBytesSm90 = 227 * 1024;

}  // namespace flash_cosine_sim
