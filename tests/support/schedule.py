"""The backward's schedule, simulated: what a choice of splits takes, by the order in which blocks take pieces of walks.

Not what plan.cpp computes, which is a closed form: here blocks take pieces one by one, as on the GPU.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

PAIR_US, TILE_US = 2.0, 5.0  # sm90/backward.cuh, measured: a block of queries, and what a piece takes beside those
NO_PAIR_US = 0.5  # a piece without a share
MERGE_US, BYTES_PER_US = 1.0, 3e6


@dataclass(frozen=True)
class Shape:
    """A backward pass of one batch."""

    num_heads: int
    num_kv_heads: int
    seq_len: int
    head_dim: int
    causal: bool
    block_q: int
    block_k: int

    @property
    def blocks_k(self) -> int:
        return -(-self.seq_len // self.block_k)

    @property
    def tiles(self) -> int:
        return self.num_kv_heads * self.blocks_k

    @property
    def longest(self) -> int:
        return self.pairs(0)

    def pairs(self, block_k: int) -> int:
        """Pairs (head, block of queries) that see a block of keys."""
        first = block_k * self.block_k // self.block_q if self.causal else 0
        return self.num_heads // self.num_kv_heads * (-(-self.seq_len // self.block_q) - first)


def tiles_on_hopper(shape: Shape, num_splits: int, multiprocessors: int) -> Iterator[int]:
    """Blocks of keys in the order of sm90/backward.cuh: HeadSections, by the sizes that its launch gives them."""
    per_section = last = 1
    if shape.causal:
        bytes_per_head = 8 * shape.seq_len * shape.head_dim * shape.num_heads // shape.num_kv_heads + 1
        per_section = min(shape.num_kv_heads, (16 << 20) // bytes_per_head + 1)
        last = -(-3 * multiprocessors // (shape.blocks_k * num_splits))
    in_last = min(shape.num_kv_heads, max(per_section, last))
    equal = (shape.num_kv_heads - in_last) // per_section
    for heads in [per_section] * equal + [shape.num_kv_heads - equal * per_section]:
        for block_k in range(shape.blocks_k):
            yield from [block_k] * heads


def tiles_portable(shape: Shape, num_splits: int) -> Iterator[int]:
    """The order of sm80/backward.cuh: head by head, but the longest first where walks are cut."""
    for tile in range(shape.tiles):
        yield tile // shape.num_kv_heads if num_splits > 0 else tile % shape.blocks_k


def simulated_us(shape: Shape, num_splits: int, at_once: int, portable: bool = False) -> float:
    """From the first piece to the last, with the merge of the partials; num_splits 0 is whole walks without one."""
    pieces = max(num_splits, 1)
    busy_until = [0.0] * at_once
    tiles = tiles_portable(shape, num_splits) if portable else tiles_on_hopper(shape, pieces, at_once)
    pair_us, tile_us = (5.0, 10.0) if portable else (PAIR_US, TILE_US)
    for block_k in tiles:
        share, remainder = divmod(shape.pairs(block_k), pieces)
        for split in range(pieces):
            pairs = share + (split < remainder)
            heapq.heapreplace(busy_until, busy_until[0] + (pair_us * pairs + tile_us if pairs else NO_PAIR_US))
    partials = 2 * 4 * shape.num_kv_heads * shape.seq_len * shape.head_dim * num_splits
    return max(busy_until) + (MERGE_US + partials / (BYTES_PER_US / (1 + portable)) if num_splits else 0)


def filling_once(shape: Shape, multiprocessors: int, portable: bool = False) -> int:
    """The rule until d7844f1: as many pieces as fill the GPU, rounded up, where tiles fill at most half of it."""
    least, least_each, at_once = (8, 4, 2 * multiprocessors) if portable else (4, 2, multiprocessors)
    pairs = shape.num_heads // shape.num_kv_heads * -(-shape.seq_len // shape.block_q)
    if 2 * shape.tiles > multiprocessors or pairs < least:
        return 0
    return min(-(-at_once // shape.tiles), pairs // least_each)
