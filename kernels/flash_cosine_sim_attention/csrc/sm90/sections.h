// The order in which the Hopper kernels take tiles, and chunks of rows made ahead of them.
#pragma once

#include <algorithm>

namespace flash_cosine_sim {

// Heads are taken in sections whose data fits into the L2 cache together: in each the first item of all of its heads,
// then the second. The last section has all that is left, and more heads than the others if so many are needed to
// balance the end.
//
// Under a causal mask a head's items are sorted by length. If the last section has few, most multiprocessors wait for
// those that have the longest: measured, with the first item asked for too early, as 3 % of the forward pass and as
// 6 to 7 % of the backward pass at head dim 128.
struct HeadSections {
  int num_heads, heads_per_section;
  int num_equal;  // sections before the last

  // Heads are those of all batches.
  static HeadSections make(int num_heads, int heads_per_section, int heads_in_last) {
    const int per_section = std::min(num_heads, heads_per_section);
    const int in_last = std::min(num_heads, std::max(per_section, heads_in_last));
    return {num_heads, per_section, (num_heads - in_last) / per_section};
  }

  struct Place {
    unsigned first_head;  // of the section
    unsigned head, item;
  };

  __device__ __forceinline__ Place find(unsigned index, unsigned items_per_head) const {
    const unsigned last = num_equal;
    const unsigned section = min(index / (items_per_head * heads_per_section), last);
    const unsigned first_head = section * heads_per_section;
    const unsigned section_heads = section < last ? heads_per_section : num_heads - first_head;
    const unsigned rest = index - first_head * items_per_head;
    return {first_head, first_head + rest % section_heads, rest / section_heads};
  }
};

// How many heads the last section needs, where tiles differ in length: three tiles a multiprocessor under a causal mask.
// By simulation the end then costs at most 1 %, and more change nothing. Packed sequences are not sorted: with six the
// end costs 1 % or less, with three up to 6.
inline int heads_to_balance(int tiles_per_head, int num_multiprocessors, bool packed) {
  return ((packed ? 6 : 3) * num_multiprocessors + tiles_per_head - 1) / tiles_per_head;
}

}  // namespace flash_cosine_sim
