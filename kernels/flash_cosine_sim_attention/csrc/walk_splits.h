// Into how many shares the backward's walks over queries are cut: by a model of the time, which no GPU is asked for.
// Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "heuristics.h"

namespace flash_cosine_sim {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of keys, which walk over pairs (head, block of queries). Blocks of the kernel take them one by one, the longest
// first or nearly so.
struct Walks {
  int64_t num_alike;             // tiles of each length: of all heads and slices
  std::vector<int64_t> lengths;  // in pairs, falling; those of a head
  int64_t pairs;                 // their sum
  int64_t partial_bytes;         // what a split leaves of dK and dV
  bool always_merged;            // the kernel writes partials even where a walk is whole

  int64_t num_tiles() const { return num_alike * static_cast<int64_t>(lengths.size()); }
  int64_t longest() const { return lengths.empty() ? 0 : lengths.front(); }
};

// When the last of at_once blocks is through, in microseconds, about: a lower bound that list scheduling comes near.
inline double time_of_walks(const Walks& walks, int64_t num_splits, int64_t at_once, const WalkCosts& costs) {
  const int64_t num_pieces = walks.num_tiles() * num_splits;
  const double work = costs.pair_us * walks.num_alike * walks.pairs + costs.tile_us * num_pieces;
  double time = work / at_once;
  if (num_pieces > at_once && walks.lengths.front() != walks.lengths.back()) {
    // The blocks do not end together: those that take the last, shortest pieces are half of one later than the mean.
    time += (costs.pair_us * divide_up(walks.lengths.back(), num_splits) + costs.tile_us) / 2;
  }
  // Of the first wave * at_once + 1 pieces one block has wave + 1, none shorter than the last of them.
  for (int64_t wave = 0; wave * at_once < num_pieces; ++wave) {
    const int64_t length = walks.lengths[wave * at_once / (num_splits * walks.num_alike)];
    const int64_t share = divide_up(length, num_splits);
    time = std::max(time, (wave + 1) * (costs.pair_us * share + costs.tile_us));
  }
  const bool merged = num_splits > 1 || walks.always_merged;
  return time + (merged ? costs.merge_us + costs.us_per_byte * num_splits * walks.partial_bytes : 0);
}

// The number of splits, each of which has something to do in the longest walk; 0: walks stay whole.
//
// Where all walks are alike, whole waves of pieces are best, with a causal mask about twice as many pieces as blocks:
// the longest is then no longer than what a block has to do. Quarters of waves are tried, too, up to kMostWavesOfWalks.
inline int64_t choose_walk_splits(const Walks& walks, int64_t at_once, const WalkCosts& costs) {
  const int64_t num_tiles = walks.num_tiles(), longest = walks.longest();
  const int64_t most =
      std::min(kMostWavesOfWalks * at_once / std::max<int64_t>(num_tiles, 1), longest / costs.least_pairs);
  if (most < 2) return 0;
  int64_t best = 0;
  double least = time_of_walks(walks, 1, at_once, costs);
  for (int64_t quarter = 1; quarter <= 4 * kMostWavesOfWalks; ++quarter) {
    const int64_t wanted = std::min(quarter * at_once / (4 * num_tiles), most);
    if (wanted < 2) continue;
    // Fewer do if no share becomes longer.
    const int64_t num_splits = divide_up(longest, divide_up(longest, wanted));
    const double time = time_of_walks(walks, num_splits, at_once, costs);
    if (100 * time > kWorthMoreSplitsPercent * least) continue;
    best = num_splits;
    least = time;
  }
  return best;
}

}  // namespace flash_cosine_sim
