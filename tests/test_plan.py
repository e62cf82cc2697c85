"""plan.cpp, compiled by any C++ compiler: for every call one kernel that exists, and workspace for all that it writes.

Where a kernel writes is said again here, from the kernels' own files, so that a plan cannot agree with itself alone.
"""

import ctypes
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path

import pytest
from emulator.build import CSRC, load_setup
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.cases import SM90_EDGES_K, SM90_EDGES_Q
from support.schedule import Shape, filling_once, simulated_us

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++ or g++ on PATH)")

FLOAT32, FLOAT16, BFLOAT16 = range(3)  # attention.h's DType
NONE, PROLOGUE, KERNEL, AHEAD = range(4)  # its Norm
CAUSAL, BANDED, SCORED, SCORED_GRADIENT = range(4)  # its Variant
MATHS = ("bf16", "fp16", "fp16_wide", "fp32", "tf32")  # its Math, as setup.py names them
ROW_SUM_PLACES = 4
SETUP = load_setup()
HEAD_DIMS = {kernel.header: kernel.head_dims for kernel in SETUP.INSTANTIATIONS}


@dataclass(frozen=True)
class Operand:
    exists: bool = True
    expanded: bool = False  # along the heads, with a stride of 0


@dataclass(frozen=True)
class Call:
    """In the order in which plan_library.cpp takes the numbers."""

    num_multiprocessors: int = 132
    runs_sm90: bool = True
    shared_kib: int = 228  # of a multiprocessor, as on a 9.0
    threads: int = 2048
    dtype: int = BFLOAT16
    batch: int = 1
    num_heads: int = 1
    num_kv_heads: int = 1
    seq_len_q: int = 1024
    seq_len_k: int = 1024
    head_dim: int = 64
    groups: int = 1
    causal: bool = False
    l2norm_qk: bool = True
    allow_tf32: bool = False
    scale_on_device: bool = False
    scale_stride: int = 0
    scale_value: int = 8
    bias: bool = False
    mask: bool = False
    window_left: int = -1
    window_right: int = -1  # 0 where causal
    num_sequences: int = -1  # packed, in one batch; -1: not
    one_cu_seqlens: bool = True  # that queries and keys share
    num_distances: int = -1  # of distance_bias; -1: none
    first_distance: int = 0
    slopes: int = 0  # of ALiBi; 1: a number a head, 2: a number a head of each batch
    q: Operand = field(default_factory=Operand)
    k: Operand = field(default_factory=Operand)
    v: Operand = field(default_factory=Operand)

    @property
    def is_scored(self):
        return self.num_distances >= 0 or self.slopes > 0

    @property
    def distances(self):
        """The least and the most that occur; most is less than least where none does."""
        least = 1 - self.seq_len_q if self.window_right < 0 else max(1 - self.seq_len_q, -self.window_right)
        most = self.seq_len_k - 1 if self.window_left < 0 else min(self.seq_len_k - 1, self.window_left)
        if self.num_distances >= 0:
            least, most = max(least, self.first_distance), min(most, self.first_distance + self.num_distances - 1)
        return least, most

    @property
    def group(self):
        return self.num_heads // self.num_kv_heads

    @property
    def heads(self):
        return self.batch * self.num_heads

    @property
    def kv_heads(self):
        return self.batch * self.num_kv_heads


@dataclass(frozen=True)
class Forward(Call):
    o: Operand = field(default_factory=Operand)  # without it, partials are wanted


@dataclass(frozen=True)
class Backward(Call):
    o: Operand = field(default_factory=Operand)
    dq: Operand = field(default_factory=Operand)
    dk: Operand = field(default_factory=Operand)
    dv: Operand = field(default_factory=Operand)
    dscale: bool = False
    deterministic: bool = False
    ddistance_bias: bool = False


@dataclass(frozen=True)
class ForwardPlan:
    sm90: int
    num_splits: int
    split_sums: int
    q_norm: int
    k_norm: int
    num_counters: int
    math: int
    padded_head_dim: int
    variant: int
    mask_words: int
    num_distance_scores: int
    num_diagonals: int
    first_score: int
    num_scores: int
    scores_stride_batch: int
    eight_warps: int


@dataclass(frozen=True)
class BackwardPlan:
    sm90: int
    num_splits: int
    padded_rows: int
    padded_dim: int
    block_q: int
    block_k: int
    dq_accumulator: int
    dq_order: int
    dkv_partials: int
    prepares_rows: int
    num_counters: int
    math: int
    padded_head_dim: int
    needs_main_kernel: int
    variant: int
    num_distance_scores: int
    num_diagonals: int
    first_score: int
    num_scores: int
    scores_stride_batch: int
    first_diagonal: int
    num_diagonal_sums: int
    diagonal_q: int
    diagonal_k: int
    distance_sums: int
    eight_warps: int


@pytest.fixture(scope="module")
def library(make_once):
    def make(folder):
        sources = [Path(__file__).with_name("plan_library.cpp"), CSRC / "plan.cpp"]
        flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
        subprocess.run([COMPILER, *flags, *sources, "-o", folder / "plan.so"], check=True)

    return ctypes.CDLL(make_once("plan", make) / "plan.so")


def numbers_of(call):
    numbers = []
    for value in astuple(call):
        numbers += value if isinstance(value, tuple) else [value]
    return (ctypes.c_int64 * len(numbers))(*map(int, numbers))


def plan_of(library, call):
    kind, function = (
        (ForwardPlan, library.plan_forward_call)
        if isinstance(call, Forward)
        else (BackwardPlan, library.plan_backward_call)
    )
    plan = (ctypes.c_int64 * len(fields(kind)))()
    function(numbers_of(call), plan)
    return kind(*plan)


def tile_sizes(library, kernel, *arguments):
    sizes = (ctypes.c_int * 3)()
    getattr(library, f"{kernel}_tile_sizes")(*arguments, sizes)
    return list(sizes)


def portable_tile_sizes(library, plan):
    return tile_sizes(library, "backward", plan.math, plan.padded_head_dim, bool(plan.eight_warps))


def blocks(size, block):
    return -(-size // block)


lengths = st.one_of(st.integers(0, 70), st.integers(0, 1200), st.sampled_from([2048, 8192, 8193, 65536]))
operands = st.builds(Operand, expanded=st.sampled_from([False, False, False, True]))
maybe = st.builds(Operand, exists=st.sampled_from([True, True, False]), expanded=st.just(False))


@st.composite
def calls(draw, kind, **extra):
    groups, num_kv_heads = draw(st.sampled_from([1, 1, 2, 4])), draw(st.sampled_from([1, 2, 3, 8]))
    on_device, causal = draw(st.booleans()), draw(st.booleans())
    num_sequences = draw(st.sampled_from([-1, -1, -1, 0, 1, 3, 100]))
    windows = st.sampled_from([-1, -1, 0, 1, 100, 1023, 40_000])
    seq_len_q, seq_len_k = draw(lengths), draw(lengths)
    num_distances, first_distance = -1, 0
    if draw(st.sampled_from([False, False, True])):
        first_distance = 0 if causal else 1 - seq_len_q
        num_distances = max(seq_len_k - first_distance + (draw(st.integers(0, 9)) if causal else 0), 0)
    return kind(
        num_multiprocessors=draw(st.sampled_from([3, 40, 108, 132])),
        runs_sm90=draw(st.booleans()),
        shared_kib=draw(st.sampled_from([100, 164, 228])),
        dtype=draw(st.sampled_from([FLOAT32, FLOAT16, BFLOAT16])),
        batch=draw(st.integers(0, 9)) if num_sequences < 0 else 1,
        num_heads=num_kv_heads * draw(st.sampled_from([1, 1, 2, 4, 16])),
        num_kv_heads=num_kv_heads,
        seq_len_q=seq_len_q,
        seq_len_k=seq_len_k,
        head_dim=8 * groups * draw(st.integers(1, 32 // groups)),
        groups=groups,
        causal=causal,
        l2norm_qk=draw(st.booleans()),
        allow_tf32=draw(st.booleans()),
        scale_on_device=on_device,
        scale_stride=int(on_device and draw(st.booleans())),
        scale_value=draw(st.sampled_from([1, 8, 10, 11])),
        bias=num_sequences < 0 and draw(st.sampled_from([False, False, True])),
        mask=num_sequences < 0 and draw(st.sampled_from([False, False, True])),
        window_left=draw(windows),
        window_right=0 if causal else draw(windows),
        num_sequences=num_sequences,
        one_cu_seqlens=draw(st.booleans()),
        num_distances=num_distances,
        first_distance=first_distance,
        slopes=draw(st.sampled_from([0, 0, 0, 1, 2])) if num_sequences < 0 else draw(st.sampled_from([0, 0, 1])),
        q=draw(operands),
        k=draw(operands),
        v=draw(operands),
        **{name: draw(strategy) for name, strategy in extra.items()},
    )


forward_calls = calls(Forward, o=maybe)
backward_calls = calls(
    Backward, o=operands, dq=maybe, dk=maybe, dv=maybe, dscale=st.booleans(), deterministic=st.booleans(),
    ddistance_bias=st.booleans(),
)  # fmt: skip
many = settings(max_examples=200, deadline=None)


# Which kernel


def kernel_of(call, plan):
    if isinstance(call, Backward):
        return "sm90/backward" if plan.sm90 else "sm80/backward"
    assert not (plan.sm90 and plan.num_splits), "two kernels at once"
    return "sm90/forward" if plan.sm90 else "sm80/forward_split" if plan.num_splits else "sm80/forward"


def assert_one_kernel(call, plan):
    header, math = kernel_of(call, plan), MATHS[plan.math]
    (kernel,) = [kernel for kernel in SETUP.INSTANTIATIONS if kernel.header == header]
    assert math in kernel.maths, (header, math)
    variant = list(SETUP.VARIANTS)[plan.variant] if plan.sm90 else "_eight_warps" if plan.eight_warps else ""
    assert variant == "" or variant in kernel.variants[math], (header, math, variant)
    head_dims = kernel.head_dims_of(math, variant)
    # As dispatch.cpp pads: the kernels of sm90/ have none for head dim 16.
    head_dim = max(plan.padded_head_dim, 32) if plan.sm90 else plan.padded_head_dim
    assert head_dims.count(head_dim) == 1, (header, math, head_dim)
    assert min(dim for dim in SETUP.HEAD_DIMS if dim >= call.head_dim) == plan.padded_head_dim
    assert {FLOAT32: ("fp32", "tf32"), FLOAT16: ("fp16", "fp16_wide"), BFLOAT16: ("bf16",)}[call.dtype].count(math)
    assert not plan.sm90 or (call.runs_sm90 and call.dtype != FLOAT32 and not call.bias)
    if plan.sm90:
        assert not plan.eight_warps
        assert (plan.variant >= SCORED) == (call.is_scored or multiplies_scores(call, plan))
        if plan.variant >= SCORED:
            assert call.dtype == BFLOAT16 and (call.num_sequences < 0 or call.one_cu_seqlens)
        if multiplies_scores(call, plan):
            assert not (call.scale_on_device or plan.prepares_rows)
            assert not (call.ddistance_bias and call.num_distances >= 0)
    else:
        assert plan.variant == CAUSAL


def multiplies_scores(call, plan):
    """Hopper's backward pass without the norm does so where it would add what distances say."""
    return isinstance(call, Backward) and bool(plan.sm90) and not call.l2norm_qk


def assert_norms(call, plan):
    assert (plan.q_norm == NONE) == (plan.k_norm == NONE) == (not call.l2norm_qk)
    # Kernels normalise whole rows; ahead of where it reads keys, Hopper's alone.
    if call.groups > 1:
        assert {plan.q_norm, plan.k_norm} <= {NONE, PROLOGUE}
    assert plan.q_norm != AHEAD and (plan.k_norm != AHEAD or plan.sm90)
    assert not (plan.sm90 and plan.k_norm == KERNEL)


@many
@given(call=forward_calls)
@example(Forward(dtype=FLOAT32, head_dim=256, seq_len_q=1, seq_len_k=65536))  # no split kernel has such rows
@example(Forward(dtype=FLOAT16, scale_value=11))
def test_forward_takes_one_kernel_that_exists(library, call):
    plan = plan_of(library, call)
    assert_one_kernel(call, plan)
    assert_norms(call, plan)


@many
@given(call=backward_calls)
@example(Backward(head_dim=136))  # longer rows than Hopper's kernel takes
@example(Backward(l2norm_qk=False))
def test_backward_takes_one_kernel_that_exists(library, call):
    plan = plan_of(library, call)
    assert_one_kernel(call, plan)
    assert plan.needs_main_kernel == (call.dq.exists or call.dk.exists or call.dv.exists or call.dscale)
    if not plan.needs_main_kernel or call.batch == 0:
        assert astuple(plan)[:11] == (0,) * 11
    if plan.sm90 and call.ddistance_bias and call.num_distances >= 0:  # in any order, or by the portable kernel
        assert plan.variant == (SCORED if call.deterministic else SCORED_GRADIENT)
        assert not (call.deterministic and plan.prepares_rows)


@pytest.mark.parametrize("runs_sm90", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_nothing_is_planned_for_no_heads(library, runs_sm90, dtype):
    """A rank has none where heads are split over more ranks than there are. In a process of its own, which may die."""
    none = {"runs_sm90": runs_sm90, "dtype": dtype, "num_heads": 0, "num_kv_heads": 0}
    made = [Forward(**none), Forward(**none, seq_len_q=1, slopes=1), Backward(**none, ddistance_bias=True)]

    def plan_all():
        plans = [plan_of(library, call) for call in [*made, Backward(**none, deterministic=True, num_distances=2047)]]
        os._exit(any(plan.num_splits or plan.num_counters or plan.num_distance_scores for plan in plans))

    process = multiprocessing.get_context("fork").Process(target=plan_all)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_hopper_takes_what_the_examples_have(library):
    """The kernels that a bfloat16 training or prefill is to run on, by name."""
    for head_dim in (64, 96, 128):
        forward, backward = (
            plan_of(library, kind(head_dim=head_dim, batch=8, num_heads=16, num_kv_heads=16, causal=True))
            for kind in (Forward, Backward)
        )
        assert (forward.sm90, forward.q_norm, forward.k_norm) == (1, KERNEL, AHEAD)
        assert (backward.sm90, backward.prepares_rows, backward.num_splits) == (1, 1, 0)
    decoding = plan_of(library, Forward(batch=8, num_heads=16, num_kv_heads=16, seq_len_q=1, seq_len_k=8192))
    assert (decoding.sm90, decoding.num_splits > 1, decoding.q_norm, decoding.k_norm) == (0, True, KERNEL, KERNEL)


BANDED_CALLS = {
    "window": {"window_left": 100, "causal": True, "window_right": 0},
    "right": {"window_right": 100},
    "packed": {"num_sequences": 3},
    "mask": {"mask": True},
}


@pytest.mark.parametrize("name", BANDED_CALLS)
def test_hopper_takes_windows_packed_sequences_and_masks(library, name):
    options = {"num_heads": 16, "num_kv_heads": 16, "seq_len_q": 8192, "seq_len_k": 8192, **BANDED_CALLS[name]}
    for kind in (Forward, Backward):
        plan = plan_of(library, kind(**options))
        assert (plan.sm90, plan.variant) == (1, BANDED)
        plain = plan_of(library, kind(**{**options, **dict.fromkeys(("window_left", "num_sequences"), -1)}, bias=True))
        assert (plain.sm90, plain.variant) == (0, CAUSAL)  # the portable kernels have no variants
    assert plan_of(library, Forward(causal=True, window_right=0, num_heads=16, num_kv_heads=16)).variant == CAUSAL


SCORED_CALLS = {
    "causal": {"causal": True, "window_right": 0, "num_distances": 8192},
    "dense": {"num_distances": 16383, "first_distance": -8191},
    "alibi": {"slopes": 2, "causal": True, "window_right": 0},
    "window": {"slopes": 1, "num_distances": 8192, "causal": True, "window_right": 0, "window_left": 500},
    "mask": {"num_distances": 8192, "mask": True, "causal": True, "window_right": 0},
    "packed": {"num_distances": 8192, "num_sequences": 3, "causal": True, "window_right": 0},
}


@pytest.mark.parametrize("name", SCORED_CALLS)
def test_hopper_takes_what_distances_add(library, name):
    options = {"num_heads": 16, "num_kv_heads": 16, "seq_len_q": 8192, "seq_len_k": 8192, **SCORED_CALLS[name]}
    forward, backward = (plan_of(library, kind(**options)) for kind in (Forward, Backward))
    assert (forward.sm90, forward.variant, forward.k_norm) == (1, SCORED, AHEAD)
    assert (backward.sm90, backward.variant, backward.prepares_rows) == (1, SCORED, 1)
    if "num_distances" in options:
        gradient = plan_of(library, Backward(**options, ddistance_bias=True))
        assert (gradient.variant, gradient.prepares_rows, gradient.distance_sums) == (SCORED_GRADIENT, 1, 0)
        ordered = plan_of(library, Backward(**options, ddistance_bias=True, deterministic=True))
        assert (ordered.variant, ordered.prepares_rows) == (SCORED, 0)
        assert 0 < 4 * ordered.distance_sums <= 2**26  # bytes
    # Not in float16, nor where sequences of other lengths on the two sides shift distances within a tile.
    for kind in (Forward, Backward):
        assert plan_of(library, kind(**options, dtype=FLOAT16)).sm90 == 0
        if "num_sequences" in options:
            assert plan_of(library, kind(**options, one_cu_seqlens=False)).sm90 == 0


def test_a_short_walk_is_not_cut_into_shares_without_work(library):
    """As long as the sequences are, a window, or causality, leaves a tile of keys few blocks of queries."""
    long = {"seq_len_q": 65536, "seq_len_k": 256}
    assert plan_of(library, Backward(**long)).num_splits > 8
    assert plan_of(library, Backward(**long, window_left=100, window_right=100)).num_splits == 0
    assert plan_of(library, Backward(**long, causal=True, window_right=0)).num_splits == 0  # 256 queries see a key


# What is written, as places in the workspace


@many
@given(call=forward_calls)
def test_forward_workspace_covers_what_is_written(library, call):
    plan = plan_of(library, call)
    if plan.num_splits > 1:  # split_sums.cuh, store_part: of the last split's last row, the sums behind the channels
        last_row = (plan.num_splits - 1) * call.heads * call.seq_len_q + call.heads * call.seq_len_q - 1
        end = last_row * (call.head_dim + ROW_SUM_PLACES) + call.head_dim + 2
        assert end <= plan.split_sums <= end + ROW_SUM_PLACES
        # float4 and float2 at the beginning of a row
        assert (call.head_dim + ROW_SUM_PLACES) % 4 == 0
    else:
        assert plan.split_sums == 0
    # Of 1024 keys 32 words of a bit each, and two with a bit for each of those: rowwise/visibility.cu
    words = call.batch * blocks(call.seq_len_k, 1024) * 34
    assert plan.mask_words == (words if plan.sm90 and call.mask else 0)
    if plan.sm90:
        counters = {0}  # kTilesTaken
        if plan.k_norm == AHEAD:
            _, block_k, *_ = tile_sizes(library, "forward_sm90", call.head_dim)
            # Chunks taken and done, then sm90/forward.cuh's chunks_done of each block of keys
            counters |= {8, 16}
            if call.kv_heads and call.seq_len_k:
                last_block = (call.seq_len_k - 1) // block_k
                counters.add(24 + (call.kv_heads - 1) * blocks(call.seq_len_k, block_k) + last_block)
        assert max(counters) < plan.num_counters
    else:
        assert plan.num_counters == 0


@many
@given(call=backward_calls)
def test_backward_workspace_covers_what_is_written(library, call):
    plan = plan_of(library, call)
    if not plan.needs_main_kernel or call.batch == 0:
        return
    needs_dq = call.dq.exists or call.dscale
    if plan.sm90:
        block_q, block_k, turns = tile_sizes(library, "backward_sm90", call.head_dim)
        assert (plan.block_q, plan.block_k) == (block_q, block_k)
        # Whole tiles are added to the accumulator, of the last queries, too.
        rows, columns = plan.padded_rows, plan.padded_dim
        assert rows >= blocks(call.seq_len_q, block_q) * block_q and columns >= call.head_dim
    else:
        block_q, block_k, slices = portable_tile_sizes(library, plan)
        rows, columns, turns = call.seq_len_q, call.head_dim, slices  # slices of the head dim are blocks of their own
    num_blocks_q = blocks(call.seq_len_q, block_q)
    assert plan.dq_accumulator == (call.heads * rows * columns if needs_dq else 0)
    # wait_for_turn, dq_order: a number for each block of queries of each head, of each warp or slice
    assert plan.dq_order == (call.heads * num_blocks_q * turns if needs_dq and call.deterministic else 0)
    # write_partial: dk and dv of every split
    assert plan.dkv_partials == plan.num_splits * 2 * call.kv_heads * call.seq_len_k * call.head_dim
    if plan.sm90:
        last = 8  # kTilesTaken
        if plan.prepares_rows:  # RowPreparer: counters of blocks of keys, then of queries
            num_blocks_k = blocks(call.seq_len_k, block_k)
            last = 16 + call.kv_heads * num_blocks_k + (call.heads - 1) * num_blocks_q + num_blocks_q - 1
        assert last < plan.num_counters
    else:
        assert not plan.prepares_rows
        # take_number, deterministic: a counter, and behind it the number of each block
        num_blocks = call.kv_heads * blocks(call.seq_len_k, block_k) * slices * max(plan.num_splits, 1)
        assert plan.num_counters == (1 + num_blocks if plan.dq_order else 0)


@many
@given(call=st.one_of(forward_calls, backward_calls))
def test_the_table_has_every_distance_and_every_piece_that_is_copied(library, call):
    plan = plan_of(library, call)
    zeros = multiplies_scores(call, plan) and not call.is_scored
    if not (call.is_scored or zeros) or call.batch == 0:
        if call.batch > 0:
            assert plan.num_distance_scores == plan.num_diagonals == 0
        return
    assert plan.num_diagonals == (call.seq_len_q if call.is_scored and call.num_sequences >= 0 else 0)
    rows = 1 if zeros else call.num_heads * (call.batch if call.slopes == 2 else 1)
    assert plan.num_distance_scores == rows * plan.num_scores
    assert plan.scores_stride_batch == (call.num_heads * plan.num_scores if call.slopes == 2 else 0)
    least, most = call.distances
    if most < least:
        return
    assert plan.first_score <= least and most < plan.first_score + plan.num_scores
    if not plan.sm90:
        return
    kernel = "forward_sm90" if isinstance(call, Forward) else "backward_sm90"
    block_q, block_k, *_ = tile_sizes(library, kernel, call.head_dim)
    # distances.cuh: as many entries, of 4 bytes, from the distance of a tile's first query from its last key on
    diagonal = 0 if call.num_sequences >= 0 else call.seq_len_k - call.seq_len_q
    assert (diagonal - (block_k - 1) - plan.first_score) % 4 == plan.num_scores % 4 == 0
    assert plan.first_score <= least - (block_q + block_k) + 1
    assert most + block_q + block_k <= plan.first_score + plan.num_scores


@many
@given(call=backward_calls)
def test_every_distance_is_on_a_diagonal_of_tiles(library, call):
    plan = plan_of(library, call)
    least, most = call.distances
    is_summed = call.ddistance_bias and call.num_distances >= 0 and call.batch > 0 and plan.variant != SCORED_GRADIENT
    width = plan.diagonal_q + plan.diagonal_k - 1
    assert plan.distance_sums == call.num_heads * plan.num_diagonal_sums * width * is_summed
    if not is_summed or most < least:
        return
    # attention.h's DiagonalSums: those that a distance is on, of a tile's element in row r and column c
    for t in (least, most, (least + most) // 2):
        first, last = -((plan.diagonal_q - 1 - t) // plan.diagonal_k), (t + plan.diagonal_k - 1) // plan.diagonal_k
        assert plan.first_diagonal <= first <= last < plan.first_diagonal + plan.num_diagonal_sums
    # postprocess.cu's distance_merge_kernel counts from the first
    assert least + plan.diagonal_k - 1 - plan.first_diagonal * plan.diagonal_k >= 0


# Shares of a split


@many
@given(call=forward_calls)
def test_every_split_of_the_keys_has_a_share(library, call):
    plan = plan_of(library, call)
    if plan.num_splits < 2:
        return
    num_rows = call.group * call.seq_len_q
    _, block_keys, *_ = tile_sizes(library, "split", plan.math, plan.padded_head_dim, ctypes.c_int64(num_rows))
    num_blocks = blocks(call.seq_len_k, block_keys)
    # forward_split_sm80_kernel: from first_block to end_block, if no causal mask shortens the keys
    shares = [num_blocks * (split + 1) // plan.num_splits - num_blocks * split // plan.num_splits
              for split in range(plan.num_splits)]  # fmt: skip
    assert min(shares) >= 1 and sum(shares) == num_blocks


@many
@given(call=backward_calls)
@example(Backward(l2norm_qk=False, scale_on_device=True, scale_stride=1, num_heads=16, num_kv_heads=1, seq_len_q=1))
def test_every_split_of_the_queries_has_a_share(library, call):
    plan = plan_of(library, call)
    if plan.num_splits < 2:
        return
    block_q = plan.block_q
    if not plan.sm90:
        block_q, *_ = portable_tile_sizes(library, plan)
    items = call.group * blocks(call.seq_len_q, block_q)
    if not call.l2norm_qk and call.scale_stride:
        assert plan.num_splits == call.group  # a head each, for a split has but one factor
        assert items % plan.num_splits == 0
    else:
        assert items // plan.num_splits >= 1


@many
@given(call=forward_calls)
def test_few_splits_fill_the_gpu(library, call):
    """No more splits than the GPU can run in the waves that heuristics.h allows, and none of few keys."""
    plan = plan_of(library, call)
    if plan.num_splits < 2:
        return
    num_rows = call.group * call.seq_len_q
    sizes = tile_sizes(library, "split", plan.math, plan.padded_head_dim, ctypes.c_int64(num_rows))
    tile_rows, block_keys, min_blocks = sizes  # as many as a multiprocessor holds, at most
    tiles = call.kv_heads * blocks(num_rows, tile_rows)
    most_waves, worth_merging = heuristic("kMostWaves"), heuristic("kBlocksWorthMerging")
    assert plan.num_splits * tiles <= most_waves * min_blocks * call.num_multiprocessors
    assert blocks(call.seq_len_k, block_keys) >= worth_merging


@pytest.mark.parametrize(("head_dim", "splits", "last"), [(64, 2, 1), (128, 4, 2)])
def test_the_emulated_empty_split_is_one(library, head_dim, splits, last):
    """EMPTY_SPLIT of test_emulation.py: more splits than the last keys' walk has pairs."""
    shape, chosen = backward_splits(library, 1, 1, 512, head_dim, True, num_multiprocessors=40)
    assert (chosen, shape.pairs(3)) == (splits, last)


@pytest.mark.parametrize(("bound", "groups", "stays"), [(10, 1, True), (11, 1, False), (60, 1, False), (5, 2, True)])
def test_float16_with_a_learned_scale_stays_on_hopper_where_its_bound_allows(library, bound, groups, stays):
    call = Forward(
        dtype=FLOAT16, batch=8, num_heads=16, num_kv_heads=16, scale_on_device=True, scale_stride=1, scale_value=bound,
        groups=groups,
    )  # fmt: skip
    plan = plan_of(library, call)
    assert (plan.sm90, MATHS[plan.math]) == ((1, "fp16") if stays else (0, "fp16_wide"))


# How many splits of the backward's walks

HEADS = ((8, 8), (16, 2), (32, 8), (8, 1))
GRID = [
    (num_heads, num_kv_heads, seq_len, head_dim)
    for num_heads, num_kv_heads in HEADS
    for seq_len in (512, 1024, 2048, 3072, 4096)
    for head_dim in (64, 96, 128)
]


def backward_splits(library, num_heads, num_kv_heads, seq_len, head_dim, causal, portable=False, **options):
    """The Shape, and how many splits plan.cpp takes for it."""
    window_right = 0 if causal else -1
    call = Backward(
        num_heads=num_heads, num_kv_heads=num_kv_heads, seq_len_q=seq_len, seq_len_k=seq_len, head_dim=head_dim,
        causal=causal, runs_sm90=not portable, window_right=window_right, **options,
    )  # fmt: skip
    plan = plan_of(library, call)
    block_q, block_k = plan.block_q, plan.block_k
    if portable:
        block_q, block_k, _ = portable_tile_sizes(library, plan)
    return Shape(num_heads, num_kv_heads, seq_len, head_dim, causal, block_q, block_k), plan.num_splits


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_splits_are_never_slower_than_filling_the_gpu_once_and_near_the_best(library, causal, portable):
    """By simulation, of 60 shapes: at least as fast as the rule before, but for 2 %; on Hopper within 7 % of the best.

    Whole walks of the portable kernel do not begin with the longest, which the model takes for granted.
    """
    at_once = 264 if portable else 132
    gains, losses = [], []
    for row in GRID:
        shape, chosen = backward_splits(library, *row, causal, portable)
        time = simulated_us(shape, chosen, at_once, portable)
        before = simulated_us(shape, filling_once(shape, 132, portable), at_once, portable)
        assert time <= 1.02 * before, (shape, chosen, time, before)
        most = min(4 * at_once // shape.tiles, shape.longest // (4 if portable else 2))
        best = min(
            simulated_us(shape, splits, at_once, portable) for splits in {0, *range(2, most + 1, 1 + most // 20)}
        )
        losses.append(time / best if not portable or chosen > 0 else 1)
        if 16 <= shape.tiles <= 66:
            gains.append(before / time)
    assert max(losses) <= 1.07 and sorted(losses)[len(losses) // 2] <= 1.01, sorted(losses)[-5:]
    if not portable:
        assert sorted(gains)[len(gains) // 2] >= (1.15 if causal else 1.4)


# Backward passes of batch 1 on an H200, us: with the rule before, and with another number of splits.
MEASURED = [
    # num_heads, num_kv_heads, seq_len, head_dim, causal, splits before, us, splits then, us
    (8, 8, 1024, 64, False, 3, 37.1, 2, 30.4),
    (32, 8, 1024, 128, False, 3, 132.5, 2, 116.5),
    (32, 8, 512, 128, False, 5, 63.0, 4, 50.0),
    (16, 2, 4096, 128, False, 3, 713, 2, 562),
    (8, 1, 4096, 128, False, 5, 436, 4, 302),
    (16, 2, 4096, 128, True, 3, 409, 2, 554),
    (8, 1, 4096, 128, True, 5, 250, 4, 295),
    (32, 8, 1024, 128, True, 3, 100, 2, 119),
]


@pytest.mark.parametrize("row", MEASURED)
def test_the_simulation_says_what_was_measured(library, row):
    """The difference between two numbers of splits; the launches around the kernel are the same in both."""
    *dims, causal, splits_before, before, splits_then, then = row
    shape, chosen = backward_splits(library, *dims, causal)
    assert filling_once(shape, 132) == splits_before
    simulated = simulated_us(shape, splits_before, 132) - simulated_us(shape, splits_then, 132)
    assert 0.5 < (before - then) / simulated < 1.5
    # What won is chosen; what lost under a causal mask is not.
    assert (chosen == splits_then) if before > then else (chosen > splits_before or chosen == splits_before)


def test_splits_by_name(library):
    """Whole waves of pieces where walks are alike, more where they are not, none where there are many."""
    chosen = {
        (row, causal): backward_splits(library, *row, causal)[1]
        for row in [
            (8, 8, 512, 64),
            (8, 8, 1024, 64),
            (16, 2, 4096, 128),
            (8, 1, 4096, 128),
            (32, 8, 2048, 128),
            (64, 64, 2048, 64),
        ]
        for causal in (False, True)
    }
    assert chosen == {
        ((8, 8, 512, 64), False): 2, ((8, 8, 512, 64), True): 2,  # measured: whole they are slower
        ((8, 8, 1024, 64), False): 2, ((8, 8, 1024, 64), True): 2,
        ((16, 2, 4096, 128), False): 2, ((16, 2, 4096, 128), True): 4,
        ((8, 1, 4096, 128), False): 4, ((8, 1, 4096, 128), True): 8,
        ((32, 8, 2048, 128), False): 0, ((32, 8, 2048, 128), True): 2,
        ((64, 64, 2048, 64), False): 0, ((64, 64, 2048, 64), True): 0,
    }  # fmt: skip


def test_portable_splits_go_by_the_blocks_that_a_multiprocessor_holds(library):
    """16 tiles on 16 multiprocessors: where two blocks fit, two splits fill the GPU; where one does, none do.

    But where that has eight warps there are 8 tiles.
    """
    options = {"portable": True, "num_multiprocessors": 16}
    for row, dtype, splits in [((1, 1, 1024, 64), FLOAT32, [2, 0]), ((2, 2, 1024, 64), BFLOAT16, [2, 2])]:
        assert [
            backward_splits(library, *row, False, dtype=dtype, shared_kib=kib, threads=threads, **options)[1]
            for kib, threads in (GPUS["8.0"], GPUS["8.6"])
        ] == splits


def test_a_window_is_known_to_walks(library):
    """A walk of a window's keys is as short as the window, and splits are chosen for that."""
    long = {"num_heads": 8, "num_kv_heads": 2, "seq_len_q": 8192, "seq_len_k": 8192, "causal": True, "window_right": 0}
    assert (
        plan_of(library, Backward(**long, window_left=128)).num_splits == 0
    )  # walks of 12 pairs, almost a wave of them
    few = {**long, "num_heads": 16, "seq_len_q": 2048, "seq_len_k": 2048}
    assert plan_of(library, Backward(**few, window_left=512)).num_splits == 4  # 32 tiles of 40 pairs


# What a multiprocessor holds

GPUS = {"8.0": (164, 2048), "8.6": (100, 1536), "8.9": (100, 1536), "9.0": (228, 2048), "12.0": (100, 1536)}


def test_how_many_blocks_a_multiprocessor_holds(library):
    """By shared memory, of which each block costs a KiB more than it asks for, by threads, and never none."""
    held = library.held_blocks
    assert [held(*GPUS[gpu], 128, 64 * 1024, 3) for gpu in GPUS] == [2, 1, 1, 3, 1]
    assert [held(*GPUS[gpu], 128, 49 * 1024, 2) for gpu in GPUS] == [2, 2, 2, 2, 2]
    assert [held(*GPUS[gpu], 128, 49 * 1024 + 1, 2) for gpu in GPUS] == [2, 1, 1, 2, 1]
    assert [held(*GPUS[gpu], 1024, 1024, 2) for gpu in GPUS] == [2, 1, 1, 2, 1]
    sizes = [
        library.backward_held_blocks(*GPUS[gpu], MATHS.index("bf16"), dim, False) for gpu in GPUS for dim in (64, 128)
    ]
    assert sizes == [2, 2, 1, 1, 1, 1, 2, 2, 1, 1]  # at 64 they fill a 8.0 to the byte
    assert held(*GPUS["8.6"], 128, 99 * 1024, 2) == held(*GPUS["8.6"], 128, 200 * 1024, 2) == 1


@pytest.mark.parametrize(("gpu", "held"), [("9.0", 3), ("8.0", 2), ("8.6", 1), ("12.0", 1)])
def test_decoding_is_planned_for_the_blocks_that_a_multiprocessor_holds(library, gpu, held):
    """12 heads on 108 multiprocessors, 64 KiB a block: where one fits, three times as many splits would be three waves.

    65,536 keys are 512 blocks of 128, in shares as long as the GPU's blocks at a time allow.
    """
    shared_kib, threads = GPUS[gpu]
    call = Forward(
        num_multiprocessors=108, runs_sm90=False, shared_kib=shared_kib, threads=threads, num_heads=12, num_kv_heads=12,
        seq_len_q=1, seq_len_k=65536,
    )  # fmt: skip
    most = 108 * held // 12
    assert plan_of(library, call).num_splits == blocks(512, blocks(512, most))


# Blocks of eight warps

MANY = {"batch": 8, "num_heads": 16, "num_kv_heads": 16, "runs_sm90": False}


@pytest.mark.parametrize("gpu", GPUS)
def test_blocks_of_eight_warps_where_a_multiprocessor_holds_one_of_four(library, gpu):
    shared_kib, threads = GPUS[gpu]
    alone = shared_kib == 100
    for dtype, head_dim in itertools.product((BFLOAT16, FLOAT16, FLOAT32), range(8, 257, 8)):
        options = {**MANY, "dtype": dtype, "head_dim": head_dim, "shared_kib": shared_kib, "threads": threads}
        forward, backward = (plan_of(library, kind(**options)).eight_warps for kind in (Forward, Backward))
        assert forward == (alone and dtype != FLOAT32 and 96 < head_dim <= 128)
        assert backward == (alone and dtype != FLOAT32 and 32 < head_dim <= 128)
    # float16 whose P is wide has a tile of its own, and few queries another kernel.
    wide = {**MANY, "dtype": FLOAT16, "head_dim": 128, "shared_kib": shared_kib, "threads": threads, "bias": True}
    assert [plan_of(library, kind(**wide)).eight_warps for kind in (Forward, Backward)] == [0, alone]
    assert not plan_of(library, Forward(**{**wide, "dtype": BFLOAT16, "seq_len_q": 1})).eight_warps


def test_a_multiprocessor_holds_a_block_of_eight_warps_where_it_holds_one_of_four(library):
    for gpu, (math, dim) in itertools.product(GPUS, itertools.product((0, 1), (64, 96, 128))):
        for held in (library.forward_held_blocks, library.backward_held_blocks)[dim < 128 :]:
            four, eight = (held(*GPUS[gpu], math, dim, is_eight) for is_eight in (False, True))
            assert (four, eight) == ((1, 1) if GPUS[gpu][0] == 100 else (2, 1)), (gpu, math, dim)
    # The larger block is the one that has to fit: 81 KiB are there for the smaller one, or nothing is.
    for shared_kib, eight in [(97, 0), (98, 1), (163, 1), (164, 0)]:
        assert plan_of(library, Backward(**MANY, shared_kib=shared_kib)).eight_warps == eight
    assert not plan_of(library, Backward(**MANY, shared_kib=100, threads=128)).eight_warps


def test_blocks_of_eight_warps_leave_no_multiprocessor_idle_and_no_warp_without_keys(library):
    forward = Forward(num_heads=6, num_kv_heads=6, runs_sm90=False, shared_kib=100, head_dim=128, seq_len_q=513)
    for num_multiprocessors, eight in [(17, 1), (18, 1), (19, 0)]:  # three tiles a head
        plan = plan_of(library, replace(forward, num_multiprocessors=num_multiprocessors))
        assert (plan.num_splits, plan.eight_warps) == (0, eight)
    for head_dim, block_k in [(64, 128), (96, 64), (128, 64)]:  # of four warps
        backward = Backward(**MANY, shared_kib=100, head_dim=head_dim)
        for seq_len_k in (block_k, block_k + 1):
            assert plan_of(library, replace(backward, seq_len_k=seq_len_k)).eight_warps == (seq_len_k > block_k)


# Thresholds


def heuristic(name):
    (value,) = re.findall(rf"\b{name} = ([^;]+);", (CSRC / "heuristics.h").read_text())
    return eval(value.replace("f", ""), {"__builtins__": {}})


# What a call is to be just beyond a threshold, and on it; what differs.
CROSSINGS = {
    "kFewRows": (
        Forward(batch=128, num_heads=8, num_kv_heads=8, runs_sm90=False, seq_len_k=4096),
        lambda call, limit, beyond: replace(call, seq_len_q=limit + beyond),
        lambda plan: plan.num_splits > 0,
    ),
    "kIdleShare": (
        Forward(num_heads=44, num_kv_heads=44, seq_len_q=128, seq_len_k=8192, groups=2),
        lambda call, limit, beyond: replace(call, num_multiprocessors=limit * call.num_heads - beyond),
        lambda plan: plan.num_splits > 0,
    ),
    "kBlocksWorthMerging": (
        Forward(seq_len_q=1),
        lambda call, limit, beyond: replace(call, seq_len_k=128 * (limit - beyond)),
        lambda plan: plan.num_splits > 1,
    ),
    "kLargestFp16Logit": (
        Forward(dtype=FLOAT16),
        lambda call, limit, beyond: replace(call, scale_value=limit + beyond),
        lambda plan: MATHS[plan.math] == "fp16",
    ),
    "kFewQueries": (
        Forward(batch=512, runs_sm90=False),
        lambda call, limit, beyond: replace(call, seq_len_q=limit + beyond),
        lambda plan: plan.k_norm == KERNEL,
    ),
    "kManyQueriesPerKey": (
        Forward(batch=512),
        lambda call, limit, beyond: replace(call, seq_len_q=limit - beyond),
        lambda plan: plan.k_norm == AHEAD,
    ),
    "kManyProductsPerRow": (
        Backward(batch=512),
        lambda call, limit, beyond: replace(call, seq_len_k=limit - beyond),
        lambda plan: plan.prepares_rows == 1,
    ),
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_the_kernel_changes_at_the_threshold(library, name):
    call, at, holds = CROSSINGS[name]
    limit = int(heuristic(name))
    assert holds(plan_of(library, at(call, limit, 0)))
    assert not holds(plan_of(library, at(call, limit, 1)))


def test_a_head_dim_without_a_kernel_is_an_error_of_the_binding_not_a_plan(library):
    assert {dim for dims in HEAD_DIMS.values() for dim in dims[""]} == set(SETUP.HEAD_DIMS)
    padded = {plan_of(library, Forward(head_dim=dim)).padded_head_dim for dim in range(8, 257, 8)}
    assert padded == set(SETUP.HEAD_DIMS)


def test_the_edges_that_other_tests_try_are_those_of_the_tiles(library):
    """support/cases.py spells them out."""
    for head_dim in SETUP.HEAD_DIMS[1:]:
        block_q, block_k, _ = tile_sizes(library, "forward_sm90", head_dim)
        assert {block_q - 1, block_q, block_q + 1} <= set(SM90_EDGES_Q), head_dim
        assert {block_k - 1, block_k, block_k + 1} <= set(SM90_EDGES_K), head_dim


def compile_rows(folder, csrc=CSRC):
    """Compiles what follows from every row of every table, whose static_asserts say what a row must keep to."""
    lines = []
    for kernel in SETUP.INSTANTIATIONS:
        table = f"{kernel.header.replace('/', '/tiles/')}.h"
        (traits,) = re.findall(r"^struct (\w+Traits) {", (csrc / table).read_text(), re.MULTILINE)
        lines.append(f'#include "{table}"')
        for math in kernel.maths:
            variants = kernel.variants.get(math, ()) if kernel.arguments is SETUP.WARPS else ()  # others share a row
            for variant in ("", *variants):
                argument = f", {kernel.arguments[variant]}" if kernel.arguments is SETUP.WARPS else ""
                lines += [
                    f"template struct flash_cosine_sim::{traits}"
                    f"<flash_cosine_sim::Math::{SETUP.MATHS[math]}, {dim}{argument}>;"
                    for dim in kernel.head_dims_of(math, variant)
                ]
    source = folder / "traits.cpp"
    source.write_text("\n".join(lines) + "\n")
    return subprocess.run(
        [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{csrc}", str(source)], capture_output=True, text=True
    )


def test_every_row_fits_the_gpu(tmp_path):
    compiled = compile_rows(tmp_path)
    assert compiled.returncode == 0, compiled.stderr


def rows_in(document, first):
    """The numbers of every row of a document's table, as texts, that begins with this heading."""
    text = (CSRC.parents[2] / "docs" / "design" / document).read_text()
    table = text[text.index(f"| {first} |") :].split("\n\n")[0]
    return [re.findall(r"\d+|yes|no", line) for line in table.splitlines()[2:]]


def test_the_documents_say_what_a_tile_has(tmp_path):
    prints = []
    for dim in (32, 64, 96, 128, 256):
        prints.append(f"forward<ForwardSm90Traits<Math::kBf16, {dim}>>({dim});")
        prints += [f"backward<BackwardSm90Traits<Math::kBf16, {dim}>>({dim});"] * (dim <= 128)
    source = tmp_path / "tiles.cpp"
    source.write_text(
        """#include <cstdio>
#include "sm90/tiles/backward.h"
#include "sm90/tiles/forward.h"
using namespace flash_cosine_sim;
template <typename T>
void forward(int head_dim) {
  std::printf("forward %d %d %d %d %d %d %d %d\\n", head_dim, T::kBlockQ, T::kBlockK, T::kStages, T::kConsumers,
              T::kConsumerRegisters, T::kProducerRegisters, (T::kSharedBytes + 512) / 1024);
}
template <typename T>
void backward(int head_dim) {
  std::printf("backward %d %d %s %s %d\\n", head_dim, T::kBlockQ, T::kStaggered ? "yes" : "no",
              T::kPrefetchScores ? "yes" : "no", (T::kSharedBytes + 512) / 1024);
}
int main() {
"""
        + "\n".join(prints)
        + "\n}\n"
    )
    program = tmp_path / "tiles"
    subprocess.run([COMPILER, "-std=c++20", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    lines = [line.split() for line in subprocess.run([program], capture_output=True, text=True).stdout.splitlines()]
    for document in ("forward", "backward"):
        assert rows_in(f"{document}.md", "head dim") == [line[1:] for line in lines if line[0] == document]


def test_a_row_that_does_not_fit_is_found(tmp_path):
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    table = csrc / "sm90" / "tiles" / "forward.h"
    larger = re.sub(r"^(    {256, 2, false, +)64", r"\g<1>256", table.read_text(), flags=re.MULTILINE)
    assert larger != table.read_text()
    table.write_text(larger)
    compiled = compile_rows(tmp_path, csrc)
    assert compiled.returncode != 0 and "kSharedBytes <= kMaxSharedBytesSm90" in compiled.stderr
