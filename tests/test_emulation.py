"""The CUDA kernels without a GPU: csrc/ compiled for the CPU, under emulator/, against the specification in float64.

What a wrong index, swizzle, fragment, mask, split or wait does shows here; what only a GPU knows does not: its
rounding, races within a warp, occupancy, time. Emulated kernels would replace the operators' CPU implementation in
this process, so processes of their own, one or more for each of GPUS, run all checks; each test looks at the outcome
of one.
"""

import contextlib
import ctypes
import functools
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulator.build import build
from support.cases import HEAD_DIMS, OPTIONS, PADDED_HEAD_DIMS, Case, Hard, describe
from support.gates import GATES, assert_within_gate, attend, check, results, rms
from support.packed import (
    DISTANCES,
    PACKED,
    PACKED_DISTANCES,
    WINDOWS,
    WRONG_CU_SEQLENS,
    Packed,
    check_packed,
    in_order,
)

from flash_cosine_sim_attention import plain_cosine_sim_attention
from flash_cosine_sim_attention.call import GRADIENTS, Call
from flash_cosine_sim_attention.reference import reference_backward, reference_forward

CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
NVCC = shutil.which("nvcc", path=f"{CUDA_HOME}/bin" if CUDA_HOME else None)

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(NVCC is None, reason="emulation needs CUDA's headers, and no nvcc (CUDA_HOME/bin or PATH)"),
]

# What emulator/runtime.cpp reads. Few multiprocessors, unless the environment says how many: the kernels of 9.0 run one
# block on each, which takes tile after tile.
GPUS = {
    "sm80": {"EMULATED_CAPABILITY": "8"},
    # So few that no walk is cut: each part would load what it begins with once more.
    "sm80-3": {"EMULATED_CAPABILITY": "8", "EMULATED_MULTIPROCESSORS": "3"},
    # A multiprocessor's shared memory holds one block of the portable kernels in 16 bits, which then has eight warps.
    "sm86": {
        **{"EMULATED_CAPABILITY": "8", "EMULATED_MULTIPROCESSORS": "3"},
        **{"EMULATED_SHARED_KIB": "100", "EMULATED_THREADS": "1536"},
    },
    "sm90": {
        "EMULATED_CAPABILITY": "9",
        "EMULATED_MULTIPROCESSORS": os.environ.get("EMULATED_MULTIPROCESSORS", "3"),
    },
    # Walks are cut into more shares, so that some are empty: what 3 multiprocessors' model of the time has no use for.
    "sm90-40": {"EMULATED_CAPABILITY": "9", "EMULATED_MULTIPROCESSORS": "40"},
}
SHAPES = [(33, 70), (70, 33), (66, 130), (5, 200), (129, 65)]
RUN = "import sys, test_emulation; test_emulation.run_parts(*sys.argv[1:])"


def wide(options):
    """Whether float16 takes the forward kernel with probabilities in TF32, as plan.cpp decides."""
    return "bias" in options or "learned_scale" in options or not options.get("l2norm_qk", True)


def covering_cases():
    """Every kernel, and padding in each, with two sets of options; every set with every dtype."""
    for dtype in GATES:
        taken = dict.fromkeys((False, True, None), 0)
        for head_dim in sorted(HEAD_DIMS + PADDED_HEAD_DIMS):
            for kind in (False, True) if dtype == torch.float16 else (None, None):
                candidates = [options for options in OPTIONS if kind is None or wide(options) == kind]
                options = dict(candidates[taken[kind] % len(candidates)])
                if "groups" in options:
                    options["groups"] = min(options["groups"], head_dim // 8)
                seq_len_q, seq_len_k = SHAPES[sum(taken.values()) % len(SHAPES)]
                taken[kind] += 1
                yield Case(dtype=dtype, head_dim=head_dim, seq_len_q=seq_len_q, seq_len_k=seq_len_k, **options)


@contextlib.contextmanager
def determinism():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_emulated(case, deterministic=False):
    with determinism() if deterministic else contextlib.nullcontext():
        return check(case, ["operators"])


def check_last_block_first(case):
    """Deterministic, the portable backward's blocks wait for others, in whatever order the GPU starts them."""
    set_order = ctypes.CDLL(sys.argv[1]).emulated_last_block_first
    set_order(1)
    try:
        check_emulated(case, deterministic=True)
    finally:
        set_order(0)


def check_tf32(case):
    exact = results(plain_cosine_sim_attention, case, torch.float64)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        ours = results(lambda **arguments: attend("operators", **arguments), case, torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    for name, expected in exact.items():
        error = rms(ours[name] - expected) / rms(expected)
        assert 1e-5 < error <= (2e-3 if name == "o" else 5e-3), (name, error)  # above: TF32 was used


def check_partials(case):
    def quotient(function):
        def run(**arguments):
            numerator, denominator = function(**arguments, return_partials=True)
            assert numerator.dtype == denominator.dtype != case.dtype or case.dtype == torch.float32
            return (numerator / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)).to(arguments["q"].dtype)

        return run

    exact = results(quotient(plain_cosine_sim_attention), case, torch.float64)
    ours = results(quotient(functools.partial(attend, "operators")), case, case.dtype)
    for name, expected in exact.items():
        limit = 2 * GATES[case.dtype] * (3 if name != "o" else 1)
        assert rms(ours[name] - expected) <= limit * rms(expected), (name, rms(ours[name] - expected) / rms(expected))


def check_forward(case):
    exact = plain_cosine_sim_attention(**case.tensors(), **case.options())
    ours = attend("operators", **case.tensors(case.dtype), **case.options())
    assert rms(ours - exact) <= GATES[case.dtype] * rms(exact), rms(ours - exact) / rms(exact)


def check_operators(case, rows_limit=1, bound=60.0):
    """row_sum_log2, its gradient, and every gradient alone, with the operators' own arguments.

    `bound` is a learned scale's: what is beyond counts as it, with gradient 0.
    """
    tensors, options = case.tensors(case.dtype), case.options()
    q, k, v, bias, scale = (tensors.get(name) for name in ("q", "k", "v", "attn_bias", "scale"))
    assert bound == 60 or (scale > bound).any() and (scale < bound).any()
    scale_value, mask = options.pop("scale", bound), options.pop("mask", None)
    settings = case.groups, case.causal, -1, 0 if case.causal else -1, 0, case.l2norm_qk
    bias = None if bias is None else bias.expand(1, *bias.shape)
    inputs = q, k, v, mask, bias
    exact_inputs = *(tensor.double() for tensor in (q, k, v)), mask, None if bias is None else bias.double()
    call = Call(*exact_inputs, None if scale is None else scale.double(), *[None] * 4, scale_value, *settings)
    exact_o, exact_rows = reference_forward(call)
    operators = torch.ops.flash_cosine_sim_attention
    o, rows = operators.forward(*inputs, scale, *[None] * 4, scale_value, *settings, False)
    seen = exact_rows.isfinite()
    assert torch.equal(rows.isneginf(), ~seen) and (o[~seen] == 0).all()
    assert (rows[seen] - exact_rows[seen]).abs().max() <= rows_limit * GATES[case.dtype]
    do, drow = torch.randn(q.shape, dtype=case.dtype), torch.randn(rows.shape)
    names = ["dq", "dk", "dv"] + ["dattn_bias"] * (bias is not None) + ["dscale"] * (scale is not None)
    # All gradients, then each alone.
    for wanted in [names, *([name] for name in names)]:
        needs = [name in wanted for name in GRADIENTS]
        rows_exact = exact_o, exact_rows, drow.double()
        exact = reference_backward(do.double(), call, *rows_exact, needs)
        rows_ours = o, rows, drow
        arguments = do, *inputs, scale, *[None] * 4, scale_value, *rows_ours, *settings, False, *needs, True
        ours = operators.backward(*arguments)
        for need, gradient, expected in zip(needs, ours, exact, strict=True):
            assert gradient.shape == expected.shape
            error = rms(gradient.double() - expected) / rms(expected) if need else 0
            assert error <= 4 * GATES[case.dtype], (wanted, error)


def check_no_heads(dtype):
    """A rank's part of fewer heads than ranks: nothing is computed, and what is not empty gets zeros."""
    for seq_len_q, options in itertools.product((1, 200), ({}, {"causal": True}, {"l2norm_qk": False})):
        q, k, v = (torch.randn(2, 0, n, 64, dtype=dtype, requires_grad=True) for n in (seq_len_q, 300, 300))
        bias = torch.randn(1, 1, seq_len_q, 300, dtype=dtype, requires_grad=True)
        scale = torch.tensor(4.0, requires_grad=True)
        for return_partials in (False, True):
            results = attend("operators", q, k, v, None, bias, scale, **options, return_partials=return_partials)
            results = results if return_partials else (results,)
            assert results[0].shape == q.shape
            # as of torch.empty, and of the fake tensors that torch.compile plans with
            assert all(result.stride() == torch.empty(result.shape).stride() for result in results)
            gradients = torch.autograd.grad(sum(result.sum() for result in results), (q, k, v, bias, scale))
            for tensor, gradient in zip((q, k, v, bias, scale), gradients, strict=True):
                assert gradient.shape == tensor.shape and not gradient.any()


def check_windows_beyond_all_rows(dtype):
    """Sides just below 2^31, which hide nothing, as an exported program passes them on: none, bit for bit."""
    q, k, v = torch.randn(3, 1, 2, 300, 64, dtype=dtype).unbind(0)
    sequences = torch.tensor([0, 10, 300], dtype=torch.int32)
    for ends in (None, sequences):
        tensors = (q, k, v, *[None] * 3, ends, ends, None, None)
        wide, plain = (
            torch.ops.flash_cosine_sim_attention.forward(*tensors, 10.0, 1, False, *window, 0, True, False)
            for window in ((2**31 - 257, 2**31 - 257), (-1, -1))
        )
        assert all(map(torch.equal, wide, plain)) and wide[0].any()


def portable_checks():
    """Name -> a function without arguments that raises where a kernel is wrong."""
    checks = {describe(case): functools.partial(check_emulated, case) for case in covering_cases()}
    checks |= {f"no-heads-{str(dtype)[6:]}": functools.partial(check_no_heads, dtype) for dtype in GATES}
    for dtype in GATES:
        checks[f"window-beyond-{str(dtype)[6:]}"] = functools.partial(check_windows_beyond_all_rows, dtype)
    for head_dim in HEAD_DIMS:
        case = Case(head_dim=head_dim, seq_len_k=70, causal=True, num_kv_heads=2, bias="heads")
        checks[f"tf32-d{head_dim}"] = functools.partial(check_tf32, case)
    for dtype in GATES:
        name = str(dtype).removeprefix("torch.")
        case = Case(dtype=dtype, head_dim=64, seq_len_q=70, seq_len_k=130, num_kv_heads=2, mask=True)
        for label, options in {
            "biased": {"bias": "heads", "learned_scale": True, "causal": True},
            "grouped": {"groups": 4, "causal": True, "learned_scale": "scalar", "head_dim": 40},
            "raw": {"l2norm_qk": False, "learned_scale": True, "head_dim": 32},
        }.items():
            checks[f"operators-{label}-{name}"] = functools.partial(check_operators, replace(case, **options))
        bounded = replace(case, l2norm_qk=dtype != torch.bfloat16, learned_scale=True)
        checks[f"bounded-scale-{name}"] = functools.partial(check_operators, bounded, bound=4.0)
        checks[f"partials-{name}"] = functools.partial(check_partials, replace(case, causal=True))
        checks[f"partials-d256-{name}"] = functools.partial(check_partials, replace(case, head_dim=256))
        checks[f"deterministic-{name}"] = functools.partial(check_emulated, replace(case, bias="full"), True)
        checks[f"deterministic-d256-{name}"] = functools.partial(check_emulated, replace(case, head_dim=256), True)
        keys = replace(case, batch=1, seq_len_k=290, mask=False, causal=True)
        for label, options in {"": {"seq_len_q": 60}, "-split": {"num_heads": 4, "num_kv_heads": 1}}.items():
            checks[f"last-block-first{label}-{name}"] = functools.partial(
                check_last_block_first, replace(keys, **options)
            )
        # So few blocks and so long walks over the queries that plan_backward splits them; with a factor for each
        # head, always.
        few = replace(case, batch=1, num_kv_heads=1, num_heads=8, seq_len_q=130, seq_len_k=33)
        checks[f"split-{name}"] = functools.partial(check_emulated, replace(few, mask=False, causal=True))
        raw = {"l2norm_qk": False, "learned_scale": True, "seq_len_q": 33}
        checks[f"split-by-head-{name}"] = functools.partial(check_emulated, replace(few, **raw), True)
        # Few queries that share many keys: sm80/forward_split.cuh, with 2 to 8 splits.
        query = replace(few, num_heads=4, num_kv_heads=2, seq_len_q=1, seq_len_k=1100, mask=False)
        for label, options in {
            "causal": {"causal": True, "mask": True},
            "rows": {"seq_len_q": 9, "causal": True, "bias": "heads", "learned_scale": True, "head_dim": 128},
            "raw": {"seq_len_q": 3, "l2norm_qk": False, "learned_scale": True, "strided": True, "head_dim": 40},
            "grouped": {"seq_len_q": 2, "groups": 4, "mask": True, "batch": 2},
            "tiles": {"seq_len_q": 70, "causal": True},
            "one": {"seq_len_q": 4, "seq_len_k": 90, "causal": True},
        }.items():
            checks[f"decoding-{label}-{name}"] = functools.partial(check_emulated, replace(query, **options))
        checks[f"decoding-partials-{name}"] = functools.partial(check_partials, replace(query, mask=True))
        distances = replace(query, seq_len_q=5, distance_bias=True, alibi="heads")
        checks[f"decoding-distances-{name}"] = functools.partial(check_emulated, distances)
        window = {"seq_len_q": 70, "seq_len_k": 180, "window_size": (60, 9), "mask": True, "batch": 2}
        checks[f"partials-window-{name}"] = functools.partial(check_partials, replace(query, **window))
        checks[f"decoding-partials-window-{name}"] = functools.partial(
            check_partials, replace(query, window_size=(500, 0))
        )
        checks[f"partials-distances-{name}"] = functools.partial(check_partials, replace(distances, seq_len_q=70))
        for kind in ("magnitudes", "zero vectors"):
            hard = Hard(**{**vars(query), "kind": kind, "seq_len_q": 3})
            checks[f"decoding-{kind.replace(' ', '-')}-{name}"] = functools.partial(check_forward, hard)
        # Half of them: the next dtype has the others.
        for index, (label, options) in list(enumerate(WINDOWS.items()))[len(name) % 2 :: 2]:
            case = Case(dtype=dtype, head_dim=(32, 64, 128)[index % 3], batch=1, num_heads=2, num_kv_heads=2)
            case = replace(case, **options, bias="heads" if index % 4 == 0 else None)
            checks[f"window-{label}-{name}"] = functools.partial(check_emulated, case, index % 2 == 0)
        for index, (label, case) in list(enumerate(PACKED.items()))[len(name) % 2 :: 2]:
            case = replace(case, dtype=dtype, head_dim=(64, 128, 32)[index % 3])
            checks[f"packed-{label}-{name}"] = functools.partial(check_packed_emulated, case, index % 2 == 0)
        # A third of them, and so on.
        for index, (label, options) in list(enumerate(DISTANCES.items()))[len(name) % 3 :: 3]:
            case = Case(dtype=dtype, head_dim=(64, 128, 32, 40)[index % 4], batch=1, num_heads=2, num_kv_heads=2)
            case = replace(case, **options, bias="heads" if index % 4 == 1 else None)
            checks[f"distances-{label}-{name}"] = functools.partial(check_emulated, case, index % 2 == 0)
        for index, (label, case) in list(enumerate(PACKED_DISTANCES.items()))[len(name) % 3 :: 3]:
            case = replace(case, dtype=dtype, head_dim=(128, 32, 256)[index % 3])
            checks[f"packed-distances-{label}-{name}"] = functools.partial(check_packed_emulated, case, index % 2 == 0)
        for head_dim in (8, 16, 32, 96, 256):
            case = replace(query, seq_len_q=2, head_dim=head_dim, causal=True)
            case = replace(case, seq_len_k=max(300, 70_000 // head_dim))
            checks[f"decoding-d{head_dim}-{name}"] = functools.partial(check_emulated, case)
    return checks


# The portable kernels with blocks of eight warps

# Tiles are of 256 queries (forward, head dim 128), and of 256, 128 and 128 keys beside blocks of 32, 64 and 16 queries
# (backward, head dims 64, 96 and 128). Other head dims are padded. A tile has all options in three kernels.
EIGHT_WARPS_KERNELS = [
    *[(64, torch.bfloat16), (96, torch.float16), (128, torch.bfloat16)],
    *[(128, torch.float16), (40, torch.float16), (80, torch.bfloat16)],
    *[(96, torch.bfloat16), (104, torch.bfloat16), (64, torch.float16)],
]
EIGHT_WARPS_OPTIONS = {
    "edges": {"seq_len_q": 257, "seq_len_k": 257},
    "dense": {"seq_len_q": 127, "seq_len_k": 255, "strided": True},
    "causal": {"seq_len_q": 256, "seq_len_k": 256, "causal": True, "num_heads": 2},
    "more-keys": {"seq_len_q": 130, "seq_len_k": 331, "causal": True},
    "empty-rows": {"seq_len_q": 331, "seq_len_k": 129, "causal": True},
    "mask": {"batch": 2, "seq_len_q": 70, "seq_len_k": 270, "mask": True},
    "GQA": {"seq_len_q": 79, "seq_len_k": 140, "num_heads": 6, "causal": True},
    "bias": {"seq_len_q": 143, "seq_len_k": 150, "bias": "heads", "causal": True},
    "bias-full": {"batch": 2, "seq_len_q": 66, "seq_len_k": 130, "bias": "full", "mask": True},
    "raw": {"seq_len_q": 97, "seq_len_k": 200, "l2norm_qk": False, "causal": True, "strided": True},
    "learned-scale": {"seq_len_q": 130, "seq_len_k": 140, "learned_scale": True},
    "raw-learned-scale": {"seq_len_q": 65, "seq_len_k": 140, "learned_scale": True, "l2norm_qk": False, "num_heads": 4},
    "groups": {"seq_len_q": 130, "seq_len_k": 140, "groups": 2, "learned_scale": "scalar"},
    "split": {"num_heads": 8, "num_kv_heads": 1, "seq_len_q": 90, "seq_len_k": 140, "causal": True},
    "window": {"seq_len_q": 280, "seq_len_k": 280, "window_size": (95, 33)},
    "window-causal": {"seq_len_q": 260, "seq_len_k": 300, "window_size": (127, -1), "causal": True, "mask": True},
    "distances": {"seq_len_q": 260, "seq_len_k": 260, "causal": True, "distance_bias": True},
    "alibi": {"seq_len_q": 129, "seq_len_k": 200, "alibi": "heads", "window_size": (150, 20)},
}
EIGHT_WARPS_PACKED = {
    "training": Packed((100, 1, 160, 64), causal=True),
    "other-keys": Packed((50, 0, 130, 7), (120, 40, 0, 200), causal=True, groups=2),
    "raw": Packed((150, 90), num_kv_heads=1, window_size=(64, -1), causal=True, l2norm_qk=False, behind=9),
    "distances": Packed((33, 200, 0, 90), distance_bias=True, alibi=True),
}


def launched_with_eight_warps():
    """Attention kernels, since the library was loaded."""
    return ctypes.CDLL(sys.argv[1]).emulated_large_launches(256)


def check_eight_warps(function, case, *arguments, num_backward=1):
    """That the backward pass has such blocks, and the forward pass at head dim 128 where P is in the inputs' dtype."""
    adds = getattr(case, "bias", None) or case.distance_bias or case.alibi or case.learned_scale
    forward = case.head_dim > 96 and (case.dtype == torch.bfloat16 or (case.l2norm_qk and not adds))
    before = launched_with_eight_warps()
    function(case, *arguments)
    assert launched_with_eight_warps() - before == num_backward + forward


def eight_warps_checks():
    checks = {}
    for index, (head_dim, dtype) in enumerate(EIGHT_WARPS_KERNELS):
        kernel = {"head_dim": head_dim, "dtype": dtype}
        label = f"d{head_dim}-{str(dtype).removeprefix('torch.')}"
        for place, (name, options) in enumerate(EIGHT_WARPS_OPTIONS.items()):
            # A third of them: the next kernels have the others. Every second in order.
            if (place - index) % 3 == 0:
                case = Case(**{"batch": 1, "num_heads": 2, "num_kv_heads": 2, **kernel, **options})
                # As many blocks as multiprocessors, or the forward pass keeps to four warps.
                if case.batch * case.num_heads * -(-case.seq_len_q // 256) < 3:
                    case = replace(case, num_heads=4)
                check = check_last_block_first if place // 3 % 4 == 0 else check_emulated
                ordered = (place // 3 % 4 == 2,) * (check == check_emulated)
                checks[f"{name}-{label}"] = functools.partial(check_eight_warps, check, case, *ordered)
        for name, case in list(EIGHT_WARPS_PACKED.items())[(index + index // 3) % 2 :: 2]:
            case = replace(case, num_heads=4, **kernel)
            check = functools.partial(check_eight_warps, check_packed_emulated, case, index // 2 % 2 == 0)
            checks[f"packed-{name}-{label}"] = check
    case = Case(num_heads=4, num_kv_heads=2, seq_len_q=70, seq_len_k=140, head_dim=128, causal=True, batch=1)
    for dtype in SM90_DTYPES:
        name = str(dtype).removeprefix("torch.")
        checks[f"partials-{name}"] = functools.partial(check_eight_warps, check_partials, replace(case, dtype=dtype))
    case = replace(case, dtype=torch.bfloat16, learned_scale=True)
    checks["operators"] = functools.partial(check_eight_warps, check_operators, case, num_backward=5)  # all, each alone
    return checks


# The kernels of compute capability 9.0

SM90_HEAD_DIMS = [32, 64, 96, 128, 256, 40, 80, 136]  # the last are padded
SM90_DTYPES = [torch.bfloat16, torch.float16]
SM90_GROUP_OF_HEADS = {"num_heads": 4, "num_kv_heads": 1}
# Tiles are of 128 or 192 queries, 64 a warpgroup, and of 64, 96 or 128 keys.
EDGES_Q = [edge + step for edge in (64, 128, 192, 256) for step in (-1, 0, 1)]
EDGES_K = [edge + step for edge in (64, 96, 128) for step in (-1, 0, 1)]
SM90_OPTIONS = {
    "dense": {"seq_len_q": 140, "seq_len_k": 300},
    "causal": {"seq_len_q": 300, "seq_len_k": 300, "causal": True},
    "causal-more-keys": {"seq_len_q": 130, "seq_len_k": 331, "causal": True, "num_kv_heads": 2},
    "causal-empty-rows": {"seq_len_q": 331, "seq_len_k": 130, "causal": True},
    "one-key": {"seq_len_q": 200, "seq_len_k": 1},
    "one-query": {"seq_len_q": 1, "seq_len_k": 300, "causal": True},
    "mask-with-an-empty-batch": {"seq_len_q": 70, "seq_len_k": 270, "mask": True},
    "mask-causal": {"seq_len_q": 150, "seq_len_k": 170, "mask": True, "causal": True, "strided": True},
    "GQA": {"seq_len_q": 70, "seq_len_k": 140, "num_heads": 6, "num_kv_heads": 2, "causal": True},
    "strided": {"seq_len_q": 200, "seq_len_k": 140, "strided": True},
    "not-normalised": {"seq_len_q": 130, "seq_len_k": 200, "l2norm_qk": False, "causal": True},
    "scale-of-heads": {"seq_len_q": 130, "seq_len_k": 140, "learned_scale": True},
    "groups": {"seq_len_q": 130, "seq_len_k": 140, "groups": 4, "strided": True},
    "small-scale": {"seq_len_q": 130, "seq_len_k": 140, "scale": 1.0},
}


# Walks over the queries of several heads, by one block or by several; tiles are of 128 keys and 64 or 128 queries.
SM90_BACKWARD_HEAD_DIMS = [32, 64, 96, 128, 24, 40, 80, 104]
SM90_BACKWARD_OPTIONS = {
    "dense": {"seq_len_q": 270, "seq_len_k": 150},
    "causal": {"seq_len_q": 200, "seq_len_k": 200, "causal": True, "num_heads": 4},
    "causal-more-keys": {"seq_len_q": 130, "seq_len_k": 331, "causal": True, "strided": True},
    "causal-empty-rows": {"seq_len_q": 331, "seq_len_k": 130, "causal": True},
    "one-key": {"seq_len_q": 200, "seq_len_k": 1},
    "one-query": {"seq_len_q": 1, "seq_len_k": 300, "causal": True},
    "mask": {"seq_len_q": 130, "seq_len_k": 270, "mask": True, "num_heads": 4, "num_kv_heads": 2},
    "mask-causal": {"seq_len_q": 150, "seq_len_k": 170, "mask": True, "causal": True, "strided": True},
    "GQA": {"seq_len_q": 140, "seq_len_k": 260, "num_heads": 6, "num_kv_heads": 2, "causal": True, "batch": 1},
    "many-keys": {"seq_len_q": 70, "seq_len_k": 700, "num_heads": 2, "num_kv_heads": 1},
    "split": {"batch": 1, "seq_len_q": 300, "seq_len_k": 100, **SM90_GROUP_OF_HEADS, "causal": True},
    # So many rows either way that the kernel itself makes q_hat, k_hat and the statistics.
    "rows-ahead": {"seq_len_q": 300, "seq_len_k": 260, "learned_scale": True, "num_heads": 4},
    "rows-ahead-causal": {
        **{"batch": 1, "seq_len_q": 515, "seq_len_k": 530, "num_heads": 2, "num_kv_heads": 1},
        **{"causal": True, "mask": True, "strided": True},
    },
    "scale-of-heads": {"seq_len_q": 130, "seq_len_k": 140, "learned_scale": True},
    "one-scale": {"seq_len_q": 130, "seq_len_k": 140, "learned_scale": "scalar", "causal": True},
    "groups": {"seq_len_q": 130, "seq_len_k": 140, "groups": 4, "num_heads": 2, "num_kv_heads": 1},
    "small-scale": {"seq_len_q": 130, "seq_len_k": 140, "scale": 1.0},
}

# The same without the norm, and with a scale that is a number: what distances are added to is multiplied by it.
SM90_RAW_OPTIONS = {
    "dense": {"seq_len_q": 150, "seq_len_k": 270, "strided": True},
    "causal": {"seq_len_q": 200, "seq_len_k": 200, "causal": True, "num_heads": 4},
    "causal-more-keys": {"seq_len_q": 130, "seq_len_k": 331, "causal": True, "scale": 0.5},
    "causal-empty-rows": {"seq_len_q": 231, "seq_len_k": 130, "causal": True, "groups": 2},
    "mask": {"seq_len_q": 130, "seq_len_k": 270, "mask": True, "num_heads": 4, "num_kv_heads": 2},
    "window": {"seq_len_q": 280, "seq_len_k": 280, "causal": True, "window_size": (70, -1), "scale": 20},
    "alibi": {"seq_len_q": 150, "seq_len_k": 150, "causal": True, "alibi": "heads"},
    "split": {"batch": 1, "seq_len_q": 300, "seq_len_k": 100, **SM90_GROUP_OF_HEADS, "causal": True},
}


def multiplied_with_wgmma():
    """Of how many warps, since the library was loaded."""
    return ctypes.CDLL(sys.argv[1]).emulated_wgmmas()


def check_sm90(case, is_sm90=False, expand_v=False):
    """o and row_sum_log2, twice: the second time the warps take turns in another order; and partials."""
    with torch.no_grad():
        tensors, options = case.tensors(case.dtype), case.options()
        q, k, v, scale, mask = *(tensors[name] for name in "qkv"), tensors.get("scale"), options.get("mask")
        exact_tensors = {name: tensor.double() for name, tensor in tensors.items()}
        if expand_v:
            v = v[:, :1].expand_as(v)
            exact_tensors["v"] = v.double()
        numerator, denominator = plain_cosine_sim_attention(**exact_tensors, **options, return_partials=True)
        exact = quotient(numerator, denominator)
        sdpa = attend("sdpa", **{**tensors, "v": v}, **options).double()

        operators = torch.ops.flash_cosine_sim_attention
        window = -1, 0 if case.causal else -1
        settings = *[None] * 4, options.get("scale", 60.0), case.groups, case.causal, *window, 0, case.l2norm_qk, False
        before = multiplied_with_wgmma()
        results_of = []
        for order in (True, False):
            first_warp_first(order)
            results_of.append(operators.forward(q, k, v, mask, None, scale, *settings))
        (o, rows), again = results_of
        assert not is_sm90 or multiplied_with_wgmma() > before, "the kernel of 9.0 was not launched"
        assert torch.equal(o, again[0]) and torch.equal(rows, again[1])
        parts = operators.partials(q, k, v, mask, None, scale, *settings)

    assert o.stride() == torch.empty_like(q).stride()
    ours = {"o": o.double()}
    assert_within_gate(case, "operators", {"o": exact}, {"o": sdpa}, ours)
    assert_within_gate(case, "operators", {"o": exact}, {"o": sdpa}, {"o": quotient(*parts).to(case.dtype).double()})
    if case.head_dim >= 64 and o.numel() >= 4096:
        assert rms(ours["o"] - exact) <= GATES[case.dtype] * rms(exact)
    empty = denominator == 0
    assert torch.equal(rows.isneginf(), empty) and torch.equal(parts[1] == 0, empty)
    assert (o[empty] == 0).all() and (parts[0][empty] == 0).all()
    # As in test_kernels.test_row_sums, and more where short vectors have larger cosines.
    limit = {torch.float16: 5e-3, torch.bfloat16: 4e-2}[case.dtype] * max(1, (64 / case.head_dim) ** 0.5)
    assert (rows.double() - denominator.log2())[~empty].abs().max() <= limit
    assert (parts[1].double().log2() - denominator.log2())[~empty].abs().max() <= limit
    # A row that sees one key has the value of that, exactly.
    values = v.repeat_interleave(case.num_heads // case.num_kv_heads, 1)
    if case.seq_len_k == 1 and not case.causal:
        assert torch.equal(o, values.expand_as(o))
    if case.causal and not case.mask and case.seq_len_q >= case.seq_len_k:
        assert torch.equal(o[:, :, case.seq_len_q - case.seq_len_k], values[:, :, 0])


def first_warp_first(order):
    """Whether warps take turns from the first on in the next launch's first block, or from the last on."""
    ctypes.CDLL(sys.argv[1]).emulated_first_warp_first(order)


def check_twice(case, deterministic):
    """The gate, and the same o and gradients where warps take turns in the other order; o without gradients, too.

    Returns how many warps multiplied with wgmma in the forward and in the backward pass.
    """
    counts = []

    def counted(**arguments):
        counts.append(multiplied_with_wgmma())
        o = attend("operators", **arguments)
        counts.append(multiplied_with_wgmma())
        return o

    first_warp_first(True)
    first = check_emulated(case, deterministic)
    first_warp_first(False)
    with determinism() if deterministic else contextlib.nullcontext():
        again = results(counted, case, case.dtype)
    counts.append(multiplied_with_wgmma())
    # Blocks run one after the other here, so that sums of dq in any order are repeatable, too.
    for name, one in first.items():
        if name == "ddistance_bias" and not deterministic:  # warps add to it in any order
            torch.testing.assert_close(one, again[name], rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(one, again[name]), name
    with torch.no_grad():  # a variant of the kernels that makes no exact sum of a row
        o = attend("operators", **case.tensors(case.dtype), **case.options())
    assert torch.equal(o.double(), first["o"])
    before, between, after = counts
    return between - before, after - between


def check_sm90_gradients(case, deterministic=False):
    """The gate, and gradients with the kernel of 9.0, in both orders of the warps."""
    assert check_twice(case, deterministic)[1] > 0, "the kernel of 9.0 was not launched"


def check_packed_emulated(case, deterministic=False):
    with determinism() if deterministic else contextlib.nullcontext():
        check_packed(case, "operators")


def check_window_sm90(case, deterministic=False):
    """The gate, o and gradients twice, and a window of nothing but the query's own key gives its value."""
    check_sm90_gradients(case, deterministic)
    tensors, options = case.tensors(case.dtype), case.options()
    if case.seq_len_q == case.seq_len_k and not case.mask:
        with torch.no_grad():
            own = attend("operators", **tensors, **{**options, "window_size": (0, 0)})
            assert torch.equal(own, tensors["v"].repeat_interleave(case.num_heads // case.num_kv_heads, 1))


def check_distances_sm90(case, deterministic=False):
    """The gate, o and gradients twice, and that the kernels of 9.0 made them: each where it can."""
    forward, backward = check_twice(case, deterministic)
    assert (forward > 0) == (case.seq_len_q > 1)  # few queries have another kernel
    takes = case.l2norm_qk or not (case.distance_bias or case.learned_scale)
    assert (backward > 0) == (takes and case.head_dim <= 128)


# By head dim: queries, keys. With other tiles in the tables the check fails, and these follow.
FORWARD_TILES = {64: (192, 96), 128: (128, 128)}
BACKWARD_TILES = {64: (128, 128), 128: (64, 128)}


def pairs_in_reach(case):
    """(seq_len_q, seq_len_k): which keys a query sees as far as causality and windows go."""
    distance = torch.arange(case.seq_len_q)[:, None] + case.seq_len_k - case.seq_len_q - torch.arange(case.seq_len_k)
    left, right = case.window_size or (-1, -1)
    right = 0 if case.causal else right
    return ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))


def check_loads_sm90(case):
    """What TMA brings: q of every tile of queries, K and V of every block of keys that one of the tile's queries sees,
    blocks being counted from the tile's own first key; in the backward pass K and V of every tile of keys that a query
    sees, q and dO of every block of queries in reach.
    """
    tensors, options = case.tensors(case.dtype), case.options()
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    in_reach = pairs_in_reach(case).expand(case.batch, -1, -1)
    not_masked = options["mask"][:, None] if case.mask else torch.tensor(True)

    def blocks_with_any(pairs, block_q, block_k):
        """(batch, blocks of queries, blocks of keys)"""
        padded = torch.nn.functional.pad(pairs, (0, -case.seq_len_k % block_k, 0, -case.seq_len_q % block_q))
        return padded.unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q)).any(-1).any(2)

    def assert_loaded(function, rows):
        before = loaded_bytes()
        result = function()
        assert loaded_bytes() - before == 2 * case.head_dim * rows
        return result

    block_q, block_k = FORWARD_TILES[case.head_dim]
    rows = 0
    for reach, seen in zip(in_reach, in_reach & not_masked, strict=True):
        for of_tile, seen_of_tile in zip(reach.split(block_q), seen.split(block_q), strict=True):
            first = of_tile.any(0).int().argmax() // 32 * 32  # blocks begin at the word of the first key in reach
            blocks = seen_of_tile.any(0)[first:].split(block_k)
            rows += case.num_heads * (block_q + 2 * block_k * sum(block.any().item() for block in blocks))
    o = assert_loaded(lambda: attend("operators", **tensors, **options), rows)
    block_q, block_k = BACKWARD_TILES[case.head_dim]
    blocks = blocks_with_any(in_reach, block_q, block_k)
    blocks &= blocks_with_any(in_reach & not_masked, block_q, block_k).any(1, keepdim=True)
    rows = case.num_kv_heads * 2 * blocks.any(1).sum().item() * block_k
    rows += case.num_heads * 2 * blocks.sum().item() * block_q
    assert_loaded(lambda: o.backward(torch.randn_like(o)), rows)


def loaded_bytes(by="loaded"):
    """By TMA, or by cp.async if by is "copied", since the library was loaded."""
    function = getattr(ctypes.CDLL(sys.argv[1]), f"emulated_{by}_bytes")
    function.restype = ctypes.c_int64
    return function()


# The portable kernels, in 16 bits. By head dim: queries, keys; of few queries keys alone.
PORTABLE_FORWARD_TILES = {64: (128, 64), 128: (128, 32)}
PORTABLE_BACKWARD_TILES = {64: (64, 128), 128: (32, 64)}
PORTABLE_SPLIT_KEYS = {64: 128, 128: 64}


def check_loads_portable(case):
    """What cp.async brings, in rows that exist: q of every tile of queries, K and V of every block of keys in which one
    of the tile's queries sees a key; in the backward pass K and V of every block of keys that a query sees, q and dO of
    every block of queries in its reach. With few queries K and V alone.
    """
    tensors, options = case.tensors(case.dtype), case.options()
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    in_reach = pairs_in_reach(case)
    mask = torch.ones(case.batch, case.seq_len_k, dtype=torch.bool)
    if case.mask:  # padding behind and before, of which whole blocks are
        mask[0, 200:] = mask[1, :170] = False
        options["mask"] = mask

    def rows_of(function):
        before = loaded_bytes("copied")
        result = function()
        return result, (loaded_bytes("copied") - before) / (2 * case.head_dim)

    few = case.seq_len_q == 1
    block_q, block_k = (1, PORTABLE_SPLIT_KEYS[case.head_dim]) if few else PORTABLE_FORWARD_TILES[case.head_dim]
    rows = 0
    for visible in mask:
        for of_tile in in_reach.split(block_q):
            blocks = zip(of_tile.split(block_k, 1), visible.split(block_k), strict=True)
            keys = sum(len(v) for reach, v in blocks if reach.any() and v.any())
            rows += case.num_kv_heads * 2 * keys if few else case.num_heads * (len(of_tile) + 2 * keys)
    o, loaded = rows_of(lambda: attend("operators", **tensors, **options))
    assert loaded == rows, (loaded, rows)
    block_q, block_k = PORTABLE_BACKWARD_TILES[case.head_dim]
    rows = 0
    for visible in mask:
        for of_tile, v in zip(in_reach.split(block_k, 1), visible.split(block_k), strict=True):
            queries = sum(len(reach) for reach in of_tile.split(block_q) if reach.any() and v.any())
            rows += case.num_heads * 2 * queries + case.num_kv_heads * 2 * len(v) * (queries > 0)
    loaded = rows_of(lambda: o.backward(torch.randn_like(o)))[1]
    assert loaded == rows, (loaded, rows)


def check_wrong_cu_seqlens(dtype):
    """They end, in order or not, and touch nothing else: the emulator would see a row outside of q, k and v."""
    for cu_seqlens in WRONG_CU_SEQLENS.values():
        case = Packed((100, 30), dtype=dtype, causal=True, window_size=(20, -1))
        tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(dtype).items()}
        wrong = torch.tensor(cu_seqlens, dtype=torch.int32)
        q, k, v = (tensor.unsqueeze(0).transpose(1, 2) for tensor in tensors.values())

        def forward(ends, qkv=(q, k, v)):
            arguments = *qkv, None, None, None, ends, ends, None, None, 10.0, 1, True, 20, 0, 0, True, False
            return torch.ops.flash_cosine_sim_attention.forward(*arguments, True)[0]

        o = forward(wrong)
        assert o.equal(forward(in_order(wrong, 130))), cu_seqlens
        for deterministic in (False, True):
            with determinism() if deterministic else contextlib.nullcontext():
                gradients = torch.autograd.grad(o, tensors.values(), torch.ones_like(o), retain_graph=True)
            assert all(gradient.isfinite().all() for gradient in (o, *gradients))


def quotient(numerator, denominator):
    return numerator / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)


def sm90_checks():
    checks = {f"no-heads-{str(dtype)[6:]}": functools.partial(check_no_heads, dtype) for dtype in SM90_DTYPES}
    for dtype in SM90_DTYPES:
        checks[f"window-beyond-{str(dtype)[6:]}"] = functools.partial(check_windows_beyond_all_rows, dtype)

    def add(name, case, function=check_sm90, **arguments):
        dtype = str(case.dtype).removeprefix("torch.")
        checks[f"{name}-d{case.head_dim}-{dtype}"] = functools.partial(function, case, **arguments)

    kernels = list(itertools.product(SM90_HEAD_DIMS, SM90_DTYPES))
    for index, (head_dim, dtype) in enumerate(kernels):
        case = Case(dtype=dtype, head_dim=head_dim, num_heads=2, num_kv_heads=2)
        # More rows than plan.cpp's paths for few queries take.
        many = replace(case, **SM90_GROUP_OF_HEADS, seq_len_q=193, seq_len_k=129)
        add("many-tiles", replace(many, causal=True), is_sm90=True)
        # So many queries for each key that the kernel itself writes k_hat; as it does in the case before.
        add("keys-ahead", replace(many, seq_len_q=70, seq_len_k=300, mask=True, strided=True), is_sm90=True)
        add("gradients", replace(case, seq_len_q=70, seq_len_k=100, causal=True, groups=2), check_emulated)
        # A third of the options, and half of the edges: the next kernels have the others.
        for name, options in list(SM90_OPTIONS.items())[index % 3 :: 3]:
            add(name, replace(case, **options))
        for edge in range(index % 2, len(EDGES_Q), 2):
            seq_len_q, seq_len_k = EDGES_Q[edge], EDGES_K[(edge + index // 2) % len(EDGES_K)]
            edges = replace(case, batch=1, num_heads=1, num_kv_heads=1, seq_len_q=seq_len_q, seq_len_k=seq_len_k)
            # With groups, q and k are normalised by a launch of its own.
            options = {"causal": edge // 2 % 2 == 0, "groups": 1 + (edge // 4 + index // 2) % 2}
            add(f"edges-{seq_len_q}x{seq_len_k}", replace(edges, **options))
    kernels = list(itertools.product(SM90_BACKWARD_HEAD_DIMS, SM90_DTYPES))
    for index, (head_dim, dtype) in enumerate(kernels):
        case = Case(dtype=dtype, head_dim=head_dim, num_heads=2, num_kv_heads=2)
        for name, options in list(SM90_BACKWARD_OPTIONS.items())[index % 3 :: 3]:
            add(f"gradients-{name}", replace(case, **options), check_sm90_gradients)
        # In order: one block after the other, and tiles that several share.
        for name in ("causal", "GQA", "split", "rows-ahead-causal")[index % 2 :: 2]:
            ordered = replace(case, **SM90_BACKWARD_OPTIONS[name])
            add(f"deterministic-{name}", ordered, check_sm90_gradients, deterministic=True)
        alone = replace(case, seq_len_q=129, seq_len_k=127, causal=True, mask=True, learned_scale=True)
        add("operators", alone, check_operators, rows_limit=8)  # short vectors have larger cosines
        if head_dim == 64:
            bounded = replace(alone, num_heads=4, num_kv_heads=2)
            add("bounded-scale", bounded, check_operators, rows_limit=8, bound=4.0)
    for index, head_dim in enumerate((64, 128, 40, 96)):
        case = Case(dtype=torch.bfloat16, head_dim=head_dim, num_heads=2, num_kv_heads=2, l2norm_qk=False)
        for place, (name, options) in list(enumerate(SM90_RAW_OPTIONS.items()))[index % 2 :: 2]:
            ordered = (place + index) % 3 == 0
            add(f"raw-{name}", replace(case, **options), check_sm90_gradients, deterministic=ordered)
    kernels = [(64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float16), (128, torch.float16)]
    kernels += [(32, torch.bfloat16), (96, torch.float16)]
    for index, (head_dim, dtype) in enumerate(kernels):
        case = Case(dtype=dtype, head_dim=head_dim, batch=1, num_heads=2, num_kv_heads=2)
        for place, (name, options) in enumerate(WINDOWS.items()):
            if place % 2 != index // 2 % 2 or name in ("one-query", "strided"):
                continue
            add(f"window-{name}", replace(case, **options), check_window_sm90, deterministic=place % 3 == 0)
        for place, (name, packed) in enumerate(PACKED.items()):
            if place % 2 == index // 2 % 2:
                packed = replace(packed, dtype=dtype, head_dim=head_dim)
                add(f"packed-{name}", packed, check_packed_emulated, deterministic=place % 3 == 0)
    for index, head_dim in enumerate((64, 128, 96, 32, 256, 64, 128, 40)):
        case = Case(dtype=torch.bfloat16, head_dim=head_dim, batch=1, num_heads=2, num_kv_heads=2)
        for place, (name, options) in list(enumerate(DISTANCES.items()))[index // 2 % 4 :: 4]:
            determined = (place + index) % 3 == 0
            add(f"distances-{name}", replace(case, **options), check_distances_sm90, deterministic=determined)
        for place, (name, packed) in list(enumerate(PACKED_DISTANCES.items()))[index // 2 % 4 :: 4]:
            packed = replace(packed, head_dim=head_dim)
            add(f"packed-distances-{name}", packed, check_packed_emulated, deterministic=(place + index) % 3 == 0)
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.float16, 128)):
        case = Case(dtype=dtype, head_dim=head_dim, num_heads=2, num_kv_heads=2, seq_len_q=600, seq_len_k=600)
        for name, options in {
            "causal": {"window_size": (100, -1), "causal": True},
            "both": {"window_size": (200, 64), "num_kv_heads": 1, "batch": 1},
            "more-keys": {"window_size": (40, 20), "seq_len_q": 300},
            "mask": {"mask": True},
        }.items():
            add(f"loads-{name}", replace(case, **options), check_loads_sm90)
            add(f"partials-{name}", replace(case, **options), check_partials)
        checks[f"wrong-cu-seqlens-{head_dim}"] = functools.partial(check_wrong_cu_seqlens, dtype)
    for dtype in SM90_DTYPES:
        case = Case(dtype=dtype, seq_len_q=70, seq_len_k=140, head_dim=64)
        add("v-expanded", case, expand_v=True)
    return checks


# On 40 multiprocessors two splits, or with blocks of 64 queries four: the last keys' walk has one pair, or two.
EMPTY_SPLIT = {"batch": 1, "seq_len_q": 512, "seq_len_k": 512, "num_heads": 1, "num_kv_heads": 1, "causal": True}


def empty_split_checks():
    checks = {}
    for index, (head_dim, dtype) in enumerate(itertools.product((32, 64, 96, 128), SM90_DTYPES)):
        case = Case(dtype=dtype, head_dim=head_dim, **EMPTY_SPLIT)
        name = f"d{head_dim}-{str(dtype).removeprefix('torch.')}"
        checks[f"empty-split-{name}"] = functools.partial(check_sm90_gradients, case, index % 3 == 0)
    return checks


def portable_loads_checks():
    checks = {}
    for head_dim in PORTABLE_FORWARD_TILES:
        case = Case(dtype=torch.bfloat16, head_dim=head_dim, num_heads=4, num_kv_heads=4, seq_len_q=420, seq_len_k=450)
        for name, options in {
            "causal": {"window_size": (100, -1), "causal": True},
            "both": {"window_size": (60, 20), "num_heads": 8, "seq_len_q": 300},
            "mask": {"mask": True},
            "mask-causal": {"mask": True, "causal": True},
            "one-query": {"window_size": (100, 0), "seq_len_q": 1, "num_heads": 8},
        }.items():
            checks[f"loads-{name}-d{head_dim}"] = functools.partial(check_loads_portable, replace(case, **options))
    return checks


CHECKS = {
    "sm80": portable_checks(),
    "sm80-3": portable_loads_checks(),
    "sm86": eight_warps_checks(),
    "sm90": sm90_checks(),
    "sm90-40": empty_split_checks(),
}


def run_parts(library, folder):
    """What another process does: each of PARTS in a fork of it, which imports and loads nothing again.

    Writes ends.json, by GPU and part null or how its process ended, and at which check.
    """
    torch.ops.load_library(library)
    gc.freeze()  # what was imported is not searched for garbage, again and again
    waiting, running, ends = list(PARTS), {}, {}
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            part = waiting.pop(0)
            running[fork(part, Path(folder))] = part
        process, status = os.wait()
        gpu, part, _ = running.pop(process)
        ends[f"{gpu}-{part}"] = end_of(gpu, os.waitstatus_to_exitcode(status), Path(folder, f"{gpu}-{part}"))
    Path(folder, "ends.json").write_text(json.dumps(ends))


def fork(part, folder):
    """The number of a process that runs a part of the checks, with what it prints in files."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        gpu, number, parts = part
        for descriptor, kind in enumerate(("txt", "err"), 1):
            with open(folder / f"{gpu}-{number}.{kind}", "wb") as file:
                os.dup2(file.fileno(), descriptor)
        seconds = resource.getrlimit(resource.RLIMIT_CPU)[1]
        limit = CPU_SECONDS if seconds == resource.RLIM_INFINITY else min(CPU_SECONDS, seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, seconds))
        os.environ.update(GPUS[gpu])
        run_all(gpu, number, parts)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(gpu, code, files):
    """None, or how the process ended, and at which check."""
    if code == 0:
        return None
    lines = files.with_suffix(".txt").read_text().splitlines()
    end = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
    at = f"in {lines[-1]}" if len(lines) % 2 else "between two checks"
    return f"the process of {gpu} ended with {end} {at}\n{files.with_suffix('.err').read_text()}"


def run_all(gpu, part, parts):
    """What a process does with one part of the checks: print, a line of JSON each, its name, then why it failed.

    The second line of a check says null where it did not. A process that dies thereby names the check that it was at.
    """
    for name, function in list(CHECKS[gpu].items())[part::parts]:
        torch.manual_seed(0)
        print(json.dumps(name), flush=True)
        outcome = None
        try:
            function()
        except Exception:
            outcome = traceback.format_exc()
        print(json.dumps(outcome), flush=True)


# (GPU, part, of how many). CHECKS of 9.0 are more, and slower; the least work comes last, so that no core is left idle.
PARTS = [*(("sm90", part, 4) for part in range(4)), *(("sm80", part, 3) for part in range(3))]
PARTS += [("sm86", 0, 1), ("sm80-3", 0, 1), ("sm90-40", 0, 1)]
CPU_SECONDS = (
    3600  # of one process: a kernel that waits for ever burns it. Not a time by the clock: that is the load's.
)


@pytest.fixture(scope="module")
def emulation(make_once):
    """(why the emulator could not be built, or None; how each process ended; the outcomes of the checks by GPU)."""

    def make(folder):
        try:
            library = build(folder, NVCC)
        except Exception:
            (folder / "build.txt").write_text(traceback.format_exc())
            return
        path = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", RUN, str(library), str(folder)]
        process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert process.returncode == 0, process.stderr

    folder = make_once("emulation", make)
    if (folder / "build.txt").exists():
        return (folder / "build.txt").read_text(), {}, {gpu: {} for gpu in GPUS}
    outcomes = {gpu: {} for gpu in GPUS}
    for gpu, part, _ in PARTS:
        lines = [json.loads(line) for line in (folder / f"{gpu}-{part}.txt").read_text().splitlines()]
        outcomes[gpu] |= dict(zip(lines[::2], lines[1::2], strict=False))
    return None, json.loads((folder / "ends.json").read_text()), outcomes


def test_the_emulator_is_built(emulation):
    assert emulation[0] is None, emulation[0]


def test_every_check_is_run_to_its_end(emulation):
    why, ends, outcomes = emulation
    if why is not None:
        pytest.skip("the emulator was not built: see test_the_emulator_is_built")
    assert not any(ends.values()), "\n".join(filter(None, ends.values()))
    assert set(ends) == {f"{gpu}-{part}" for gpu, part, _ in PARTS}
    assert {gpu: set(found) for gpu, found in outcomes.items()} == {gpu: set(found) for gpu, found in CHECKS.items()}


@pytest.mark.parametrize("gpu, name", [(gpu, name) for gpu in CHECKS for name in CHECKS[gpu]])
def test_kernels(emulation, gpu, name):
    outcomes = emulation[2][gpu]
    if name not in outcomes:
        pytest.skip("not run: see test_the_emulator_is_built and test_every_check_is_run_to_its_end")
    assert outcomes[name] is None, outcomes[name]
