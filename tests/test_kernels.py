"""The CUDA kernels under backend="cuda": accuracy, and all that a kernel can get wrong beside it.

The specification in float64 and "sdpa", whose errors the kernels may not exceed, run on the same GPU. The file
takes a minute or two. Its random cases: FUZZ_SEED=7 FUZZ_CASES=1000 pytest tests/test_kernels.py -k random
docs/design/testing.md tells how compute-sanitizer is run on the kernels.
"""

import functools
import os
import random
import time
from dataclasses import replace

import pytest
import torch
from support.cases import (
    BIASES,
    HEAD_DIMS,
    OPTIONS,
    PADDED_HEAD_DIMS,
    SM90_EDGES_K,
    SM90_EDGES_Q,
    Case,
    Hard,
    describe,
)
from support.gates import (
    GATES,
    assert_near_plain,
    assert_within_gate,
    attend,
    check,
    low_precision_attention,
    results,
    rms,
    rounding,
)
from support.gpu import DEVICE, LOW_DTYPES, NEEDS_KERNELS, fill_free_memory, settings  # noqa: F401
from support.operators import seq_first
from support.operators import settings as operator_settings
from torch.utils.checkpoint import checkpoint

from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention

pytestmark = NEEDS_KERNELS

forward = torch.ops.flash_cosine_sim_attention.forward
backward = torch.ops.flash_cosine_sim_attention.backward

DTYPES = list(GATES)


@pytest.fixture
def deterministic(request):
    """No operation of PyTorch but the tested ones may run under it: cuBLAS would complain."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)


def cuda_attention(*args, **kwargs):
    return flash_cosine_sim_attention(*args, backend="cuda", **kwargs)


def cuda_case(**arguments):
    return Case(device=DEVICE, **arguments)


def random_inputs(dtype, *, batch=2, num_heads=4, num_kv_heads=4, seq_len_q=130, seq_len_k=200, head_dim=64):
    q = torch.randn(batch, num_heads, seq_len_q, head_dim, device=DEVICE, dtype=dtype)
    k, v = (torch.randn(batch, num_kv_heads, seq_len_k, head_dim, device=DEVICE, dtype=dtype) for _ in range(2))
    return q, k, v


def gradients(function, differentiable, do, **options):
    """Return o and the gradients of `differentiable`, a dict of arguments; these may share memory."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in differentiable.items()}
    o = function(**leaves, **options)
    return o.detach(), *torch.autograd.grad(o, list(leaves.values()), do)


def assert_equal(ours, expected, what=""):
    """Bit for bit, and finite."""
    for index, (one, other) in enumerate(zip(ours, expected, strict=True)):
        assert one.isfinite().all(), (what, index)
        assert torch.equal(one, other), (what, index, (one.double() - other.double()).abs().max())


# Accuracy. assert_within_gate holds the kernels to the errors of "sdpa"; check adds the contract's gate for o.

SHAPES = [(127, 129), (513, 1024), (33, 47), (128, 384), (1029, 1030), (1, 1), (641, 255)]


def covering_cases():
    """All of dtypes x head dims x options; a shape each, so that every shape meets every one of those."""
    for index, options in enumerate(OPTIONS):
        for dim_index, head_dim in enumerate(HEAD_DIMS):
            for dtype_index, dtype in enumerate(DTYPES):
                seq_len_q, seq_len_k = SHAPES[(3 * index + 2 * dim_index + dtype_index) % len(SHAPES)]
                shape = {"seq_len_q": seq_len_q, "seq_len_k": seq_len_k, "head_dim": head_dim}
                yield cuda_case(dtype=dtype, **shape, **options)


def padded_cases():
    """For every dtype and every head dim without a kernel of its own, a third of the options."""
    for dim_index, head_dim in enumerate(PADDED_HEAD_DIMS):
        for dtype_index, dtype in enumerate(DTYPES):
            for index in range((dim_index + dtype_index) % 3, len(OPTIONS), 3):
                seq_len_q, seq_len_k = SHAPES[(index + dim_index) % len(SHAPES)]
                shape = {"seq_len_q": seq_len_q, "seq_len_k": seq_len_k, "head_dim": head_dim}
                options = OPTIONS[index]
                if head_dim // options.get("groups", 1) < 8:  # see test_groups_of_few_channels
                    options = {**options, "groups": head_dim // 8}
                yield cuda_case(dtype=dtype, **shape, **options)


@pytest.mark.parametrize("case", list(covering_cases()), ids=describe)
def test_options(case):
    check(case, ["cuda"])


@pytest.mark.parametrize("case", list(padded_cases()), ids=describe)
def test_padded_head_dims(case):
    check(case, ["cuda"])


# For the kernels of compute capability 9.0, which take no bias: where their tiles end, in blocks of 128 or 192 queries
# (64 a warpgroup) and 64, 96 or 128 keys.
SM90_HEAD_DIMS = [32, 64, 96, 128, 256, 40, 80, 136]
SM90_OPTIONS = [
    {"causal": True},
    {"mask": True},
    {"num_kv_heads": 1, "strided": True},
    {"causal": True, "num_kv_heads": 2, "groups": 2},
    {"causal": True, "mask": True, "strided": True},
    {"l2norm_qk": False, "causal": True},
    {},
]


def edge_cases():
    """Every number of queries with every head dim and dtype; numbers of keys and options take turns."""
    for dim_index, head_dim in enumerate(SM90_HEAD_DIMS):
        for dtype_index, dtype in enumerate(LOW_DTYPES):
            for index, seq_len_q in enumerate(SM90_EDGES_Q):
                seq_len_k = SM90_EDGES_K[(index + 2 * dim_index + dtype_index) % len(SM90_EDGES_K)]
                options = SM90_OPTIONS[(index + 3 * dim_index + dtype_index) % len(SM90_OPTIONS)]
                yield cuda_case(dtype=dtype, seq_len_q=seq_len_q, seq_len_k=seq_len_k, head_dim=head_dim, **options)


@pytest.mark.parametrize("case", list(edge_cases()), ids=describe)
def test_tile_edges(case):
    check(case, ["cuda"])


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256, 136])
@pytest.mark.parametrize("options", [{"causal": True}, {"mask": True, "num_kv_heads": 8}], ids=str)
def test_many_tiles(dtype, head_dim, options):
    """Several tiles for every multiprocessor, 30 times, with other work on the GPU every other time."""
    need_memory(16 * 2**30)
    shape = {"batch": 4, "num_heads": 40, "num_kv_heads": 40, "seq_len_q": 1100, "seq_len_k": 1100}
    case = cuda_case(**{"dtype": dtype, "head_dim": head_dim, **shape, **options})
    with torch.no_grad():
        tensors, options = case.tensors(dtype), case.options()
        exact = plain_cosine_sim_attention(**case.tensors(), **options)
        sdpa = attend("sdpa", **tensors, **options).double()
        inputs = *tensors.values(), options.get("mask"), *[None] * 6, case.scale, *operator_settings(causal=case.causal)
        first = forward(*inputs)
        ours = first[0].double()
        assert_within_gate(case, "cuda", {"o": exact}, {"o": sdpa}, {"o": ours})
        if head_dim >= 64:
            assert rms(ours - exact) <= GATES[dtype] * rms(exact)
        other_stream, matrix = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
        torch.cuda.synchronize()
        for run in range(30):
            if run % 2:
                with torch.cuda.stream(other_stream):
                    matrix @ matrix
            for one, other in zip(forward(*inputs), first, strict=True):
                assert torch.equal(one, other), run


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS + PADDED_HEAD_DIMS)
def test_one_visible_key_gives_its_value(dtype, head_dim):
    """Bit for bit: what a row's products are divided by is the sum of what was multiplied."""
    q, k, v = random_inputs(dtype, num_kv_heads=2, seq_len_q=300, seq_len_k=300, head_dim=head_dim)
    values = v.repeat_interleave(2, 1)
    assert torch.equal(cuda_attention(q, k[:, :, :1], v[:, :, :1]), values[:, :, :1].expand_as(q))
    assert torch.equal(cuda_attention(q, k, v, causal=True)[:, :, 0], values[:, :, 0])
    for key in (0, 63, 64, 95, 96, 127, 128, 299):
        mask = (torch.arange(300, device=DEVICE) == key).expand(2, -1)
        expected = values[:, :, key : key + 1].expand_as(q)
        assert torch.equal(cuda_attention(q, k, v, mask=mask), expected), key


@pytest.mark.parametrize("seq_len_k", [2, 63, 65, 1000, 4096, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding(dtype, seq_len_k):
    shape = {"seq_len_q": 1, "seq_len_k": seq_len_k, "head_dim": 64}
    for options in ({"causal": True, "num_kv_heads": 2}, {"mask": True}, {"bias": "heads", "head_dim": 128}):
        check(cuda_case(**{"dtype": dtype, **shape, **options}), ["cuda"])


# Few queries that share many keys: the keys are split, from 8 blocks of 32 KiB on.
FEW_QUERIES = [
    {"causal": True, "num_kv_heads": 2},
    {"seq_len_q": 4, "causal": True, "num_kv_heads": 1, "mask": True},
    {"seq_len_q": 3, "num_kv_heads": 2, "bias": "heads", "learned_scale": True, "strided": True},
    {"seq_len_q": 7, "num_kv_heads": 2, "causal": True, "l2norm_qk": False, "learned_scale": True, "strided": True},
    {"seq_len_q": 2, "num_kv_heads": 2, "groups": 2, "mask": True},
    {"seq_len_q": 16, "causal": True, "batch": 1},
    {"seq_len_q": 33, "causal": True, "num_kv_heads": 2, "bias": "per_key", "mask": True},
    {"seq_len_q": 200, "causal": True, "num_kv_heads": 2, "batch": 1},
    {"seq_len_q": 333, "mask": True, "batch": 1, "num_heads": 2, "num_kv_heads": 2},
    # So many rows that a launch of its own normalises the keys, at most head dims; the kernel normalises the queries.
    {"seq_len_q": 1100, "causal": True, "batch": 1, "num_heads": 2, "num_kv_heads": 2},
]


def few_query_cases():
    """For every dtype and head dim a third of the options."""
    for dim_index, head_dim in enumerate([*HEAD_DIMS, 8, 40, 200]):
        for dtype_index, dtype in enumerate(DTYPES):
            for options in FEW_QUERIES[(dim_index + dtype_index) % 3 :: 3]:
                yield cuda_case(**{"dtype": dtype, "seq_len_q": 1, "seq_len_k": 2500, "head_dim": head_dim, **options})


@pytest.mark.parametrize("case", list(few_query_cases()), ids=describe)
def test_few_queries(case):
    check(case, ["cuda"])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("options", FEW_QUERIES[:6], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_partials_of_few_queries(dtype, options, head_dim):
    case = cuda_case(**{"dtype": dtype, "seq_len_q": 1, "seq_len_k": 2500, "head_dim": head_dim, **options})
    exact = plain_cosine_sim_attention(**case.tensors(), **case.options(), return_partials=True)
    ours = cuda_attention(**case.tensors(dtype), **case.options(), return_partials=True)
    for part, expected in zip(ours, exact, strict=True):
        assert part.dtype == torch.float32 and part.shape == expected.shape
        assert rms(part - expected) <= 2 * GATES[dtype] * rms(expected)


@pytest.mark.parametrize("options", [{"causal": True}, {"num_kv_heads": 1, "mask": True, "bias": "heads"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_one_sum_takes(dtype, options):
    """The gradient of a scale is a sum over batch * seq_len_q rows, here over 6000."""
    check(cuda_case(dtype=dtype, batch=20, seq_len_q=300, seq_len_k=40, learned_scale=True, **options), ["cuda"])


def normalised_gradients(case, found):
    """The same with dq and dk times the norms of the groups of q and k, as if these were of unit norm."""
    found = dict(found)
    for name in "qk":
        groups = case.tensors()[name].unflatten(-1, (case.groups, -1))
        gradient = found[f"d{name}"].unflatten(-1, (case.groups, -1))
        found[f"d{name}"] = (gradient * groups.norm(dim=-1, keepdim=True)).flatten(-2)
    return found


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [16, 40, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_few_channels(dtype, head_dim, channels):
    """Up to groups = head_dim, where q^ and k^ are signs and their gradients 0.

    Some norms are tiny there, so that 1 / |q| would hide all but a few gradients. And signs times a number have
    errors that are no statistic: "sdpa" rounds scale, which may be exact, and the kernels scale * log2(e).
    """
    case = cuda_case(dtype=dtype, seq_len_q=70, seq_len_k=130, head_dim=head_dim, groups=head_dim // channels)
    exact, plain, ours = (
        normalised_gradients(case, results(function, case, low))
        for function, low in (
            (plain_cosine_sim_attention, torch.float64),
            (low_precision_attention, dtype),
            (cuda_attention, dtype),
        )
    )
    assert_near_plain(case, "cuda", exact, plain, ours)


ROW_SUMS = [
    {},
    {"causal": True, "mask": True},
    {"bias": "heads", "groups": 2},
    {"causal": True, "num_kv_heads": 1, "seq_len_q": 700, "seq_len_k": 500},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("options", ROW_SUMS, ids=str)
def test_row_sums(dtype, head_dim, options):
    """row_sum_log2 against float64: what merges of shards and the backward pass rest on."""
    case = cuda_case(dtype=dtype, head_dim=head_dim, **{"seq_len_q": 130, "seq_len_k": 100, **options})
    tensors, options = case.tensors(), case.options()
    del options["attn_bias_batch_dim"]
    if "attn_bias" in tensors:
        tensors["attn_bias"] = tensors["attn_bias"].unsqueeze(0)
    _, row_sum = plain_cosine_sim_attention(**tensors, **options, return_partials=True)
    q, k, v, bias = (tensors[name].to(dtype) if name in tensors else None for name in ("q", "k", "v", "attn_bias"))
    arguments = case.scale / case.groups, *operator_settings(case.groups, case.causal, case.l2norm_qk)
    o, row_sum_log2 = forward(q, k, v, options.get("mask"), bias, *[None] * 5, *arguments)
    assert row_sum_log2.dtype == torch.float32 and row_sum_log2.is_contiguous()
    empty = row_sum == 0
    assert torch.equal(row_sum_log2 == -torch.inf, empty) and (o[empty] == 0).all()
    assert empty.any() == (case.causal or case.mask)
    error = (row_sum_log2.double() - row_sum.log2())[~empty].abs().max()
    # A logit of up to 10 (14.4 in base 2) from q^ and k^ that were rounded, which averages out over the channels.
    limit = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype] * max(1, (64 / head_dim) ** 0.5)
    assert error <= limit, error


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tf32(head_dim):
    """Without it the contract's full float32; with it faster products, whose errors show that they are used."""
    case = cuda_case(seq_len_q=300, seq_len_k=333, head_dim=head_dim, causal=True, num_kv_heads=2)
    exact = results(plain_cosine_sim_attention, case, torch.float64)
    full = results(cuda_attention, case, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = True  # `settings` restores it
    tf32 = results(cuda_attention, case, torch.float32)
    for name, expected in exact.items():
        full_error, tf32_error = (rms(found[name] - expected) / rms(expected) for found in (full, tf32))
        assert full_error <= 1e-5, (name, full_error)
        assert 5 * full_error < tf32_error <= (2e-3 if name == "o" else 5e-3), (name, full_error, tf32_error)


HARD = [
    {"kind": "zero vectors"},
    {"kind": "zero vectors", "causal": True, "mask": True, "groups": 2},
    {"kind": "duplicates"},
    {"kind": "duplicates", "causal": True, "scale": 40},
    {"kind": "equal keys"},
    {"kind": "equal keys", "causal": True, "scale": 40},
    {"kind": "opposite keys"},
    {"kind": "opposite keys", "scale": 40, "causal": True},
    {"kind": "opposite keys", "scale": 60, "learned_scale": True},
    {"kind": "one visible key", "scale": 40},
    {"kind": "magnitudes"},
    {"kind": "magnitudes", "causal": True, "mask": True, "groups": 4},
    {"scale": 40},
    {"scale": 40, "learned_scale": True, "causal": True},
    {"scale": 60, "causal": True},
    {"scale": 60, "groups": 4, "mask": True},
    {"scale": 60, "l2norm_qk": False},
    *[
        {"scale": 60, "seq_len_q": 600, "seq_len_k": 700, "head_dim": head_dim, "learned_scale": learned, **options}
        for head_dim in (64, 128, 256)
        for learned, options in (
            (True, {"causal": True, "num_kv_heads": 2}),
            (False, {"mask": True}),
            (True, {"groups": 8}),
        )
    ],
    {"scale": 1e-6},
    {"scale": 1e-6, "learned_scale": True, "causal": True},
    {"scale": 1e-6, "learned_scale": "scalar"},
    {"kind": "large bias", "bias": "heads"},
    {"kind": "large bias", "bias": "number", "scale": 40, "causal": True},
    {"kind": "infinite bias", "bias": "full"},
    {"kind": "infinite bias", "bias": "shared", "causal": True, "mask": True},
    {"kind": "negative bias", "bias": "batch"},
    {"kind": "large values"},
    {"kind": "large values", "scale": 40, "causal": True},
    # The kernel for few queries normalises keys on their way to the tensor cores.
    *[
        {"seq_len_q": 4, "seq_len_k": 2100, "num_kv_heads": 2, **options}
        for options in (
            {"kind": "zero vectors"},
            {"kind": "magnitudes"},
            {"kind": "one visible key", "scale": 40},
            {"kind": "opposite keys", "scale": 60},
            {"kind": "infinite bias", "bias": "full"},
        )
    ],
]


def hard_cases():
    for options in HARD:
        for dtype in DTYPES:
            shape = {"batch": 2, "seq_len_q": 130, "seq_len_k": 200, "head_dim": 64}
            yield Hard(**{"dtype": dtype, "device": DEVICE, **shape, **options})


@pytest.mark.parametrize("case", list(hard_cases()), ids=describe)
def test_hard_inputs(case):
    exact = results(plain_cosine_sim_attention, case, torch.float64)
    sdpa, ours = (results(functools.partial(attend, name), case, case.dtype) for name in ("sdpa", "cuda"))
    if case.kind == "magnitudes":
        for found in (exact, sdpa, ours):
            found["dq"] *= case.magnitudes("q")
            found["dk"] *= case.magnitudes("k")
    # The float32 rounding of the largest logit, which exp makes a relative error, is there for all.
    largest_logit = abs(case.scale) + (25 if case.kind == "large bias" else 5)
    slack = largest_logit * torch.finfo(torch.float32).eps
    if case.kind == "large values" and case.dtype == torch.float16:
        # Gradients of 1e4 * do overflow, in SDPA too, where P is near 1.
        exact = {name: tensor for name, tensor in exact.items() if sdpa[name].isfinite().all()}
        assert "o" in exact and "dv" in exact
    assert all(ours[name].isfinite().all() for name in exact)
    assert_within_gate(case, "cuda", exact, sdpa, ours, slack)
    if case.kind == "infinite bias":
        hidden = case.tensors()["attn_bias"] == -torch.inf
        assert (ours["dattn_bias"][hidden] == 0).all()
        assert (ours["o"][:, :, 3] == 0).all() and (ours["dq"][:, :, 3] == 0).all()
        assert (ours["dk"][..., -1, :] == 0).all() and (ours["dv"][..., -1, :] == 0).all()
    if case.kind == "zero vectors":
        assert (ours["dq"][:, :, ::3] == 0).all() and (ours["dk"][:, :, ::3] == 0).all()


# Random cases. FUZZ_SEED and FUZZ_CASES repeat or extend them; a test's name tells seed and index, its message the
# case, and index 17 of seed 3 is the same case whatever FUZZ_CASES is.

FUZZ_SEED = int(os.environ.get("FUZZ_SEED", "0"))
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", "80"))
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "20" if FUZZ_CASES <= 80 else "3600"))
MAX_SCORES = 6_000_000
_fuzz_end = []  # when the first random case starts, the time at which the last may


def random_case(seed, index):
    """A case and the layouts of q, k, v and do."""
    choose = random.Random(f"{seed}/{index}")

    def length():
        return choose.choice([choose.randint(1, 70), choose.randint(1, 300), choose.randint(1, 1300)])

    seq_len_q, seq_len_k = length(), length()
    most = max(1, MAX_SCORES // (seq_len_q * seq_len_k))
    batch = choose.randint(1, min(3, most))
    num_heads = choose.choice([h for h in (1, 2, 3, 4, 6, 8, 12) if batch * h <= most] or [1])
    layout = choose.choice(["heads", "heads", "heads", "single_head", "merged"])
    divisors = [h for h in range(1, num_heads + 1) if num_heads % h == 0]
    num_kv_heads = {"single_head": 1, "heads": choose.choice([*divisors, num_heads])}.get(layout, num_heads)
    bias = choose.choice([None, None, *BIASES])
    if layout == "merged":
        batch, num_heads, num_kv_heads = batch * num_heads, 1, 1
        bias = "batch" if bias == "heads" else bias
    head_dim = choose.choice([8 * choose.randint(1, 32), *HEAD_DIMS])
    case = cuda_case(
        dtype=choose.choice(DTYPES),
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seq_len_q=seq_len_q,
        seq_len_k=seq_len_k,
        head_dim=head_dim,
        layout=layout,
        groups=choose.choice([g for g in range(1, 33) if head_dim % g == 0 and (g == 1 or head_dim // g >= 8)]),
        causal=choose.random() < 0.5,
        mask=seq_len_k > 1 and choose.random() < 0.4,
        bias=bias,
        scale=choose.choice([1.0, 8.0, 10.0, 10.0, 16.0, 40.0, 60.0]),
        learned_scale=choose.choice([False, False, True, "scalar"]),
        l2norm_qk=choose.random() < 0.75,
        strided=choose.random() < 0.3,
        seed=choose.randint(0, 2**31),
    )
    layouts = {name: choose.choice([None, None, *LAYOUTS]) for name in ("q", "k", "v", "do")}
    if choose.random() < 0.4:
        # Not so narrow that most queries see one key: gradients are 0 there, and nothing is left to compare with.
        sides = [choose.choice([-1, choose.randint(10, 70), choose.randint(10, 700)]) for _ in range(2)]
        case = replace(case, window_size=tuple(sides))
    return case, layouts


def in_layouts(layouts):
    """The kernels on inputs, and a gradient of the output, in other layouts than the case has."""

    def run(**arguments):
        for name, layout in layouts.items():
            if layout is not None and name in arguments:
                arguments[name] = LAYOUTS[layout](arguments[name])
        o = cuda_attention(**arguments)
        return o if layouts["do"] is None else LaidOutGradient.apply(o, LAYOUTS[layouts["do"]])

    return run


class LaidOutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layout(grad), None


@pytest.mark.parametrize("index", range(FUZZ_CASES), ids=lambda index: f"seed{FUZZ_SEED}-{index}")
def test_random_case(index):
    if not _fuzz_end:
        _fuzz_end.append(time.monotonic() + FUZZ_SECONDS)
    if time.monotonic() > _fuzz_end[0]:
        pytest.skip(f"random cases had {FUZZ_SECONDS:.0f} s; FUZZ_SECONDS gives them more")
    case, layouts = random_case(FUZZ_SEED, index)
    print(f"FUZZ_SEED={FUZZ_SEED}, index {index}: {case}, layouts {layouts}")
    exact = results(plain_cosine_sim_attention, case, torch.float64)
    sdpa = results(functools.partial(attend, "sdpa"), case, case.dtype)
    ours = results(in_layouts(layouts), case, case.dtype)
    assert all(tensor.isfinite().all() for tensor in ours.values())
    # The largest of random errors is a matter of luck: in one of a hundred such cases it is 2 to 2.5 times SDPA's.
    assert_within_gate(case, "cuda", exact, sdpa, ours, largest=3)


# Layouts. Each holds the same values in other memory, so in deterministic mode nothing may change, bit for bit.


def _in_view(tensor, extra, view):
    """`tensor` in a view of a buffer whose rows are longer by `extra`; the rest of the buffer is NaN."""
    buffer = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + extra), torch.nan)
    view(buffer).copy_(tensor)
    return view(buffer)


def _permuted(tensor, *dims):
    """`tensor` in memory where its dimensions come in the order `dims`."""
    if tensor.ndim != len(dims):
        return tensor
    inverse = sorted(range(len(dims)), key=dims.__getitem__)
    return tensor.permute(dims).contiguous().permute(inverse)


LAYOUTS = {
    "seq_first": lambda x: _permuted(x, 0, 2, 1, 3),
    "batch_third": lambda x: _permuted(x, 1, 2, 0, 3),
    "longer_rows": lambda x: _in_view(x, 8, lambda buffer: buffer[..., :-8]),
    "odd_rows": lambda x: _in_view(x, 1, lambda buffer: buffer[..., :-1]),
    "offset_by_one": lambda x: _in_view(x, 8, lambda buffer: buffer[..., 1:-7]),
    "channels_third": lambda x: x.mT.contiguous().mT,
    "every_second_channel": lambda x: _in_view(x, x.shape[-1], lambda buffer: buffer[..., 1::2]),
    "every_second_row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "every_second_head": lambda x: x.repeat_interleave(2, 1)[:, ::2] if x.ndim == 4 else x,
}


MASK_LAYOUTS = {
    "transposed": lambda mask: mask.T.contiguous().T,
    "every_second": lambda mask: mask.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda mask: torch.cat([~mask[:, :1], mask], 1)[:, 1:],
}


def laid_out_inputs(dtype, bias=True, **sizes):
    q, k, v = random_inputs(dtype, num_kv_heads=2, **sizes)
    differentiable = {"q": q, "k": k, "v": v}
    if bias:
        differentiable["attn_bias"] = torch.randn(2, 4, q.shape[-2], k.shape[-2], device=DEVICE, dtype=dtype)
    mask = torch.rand(2, k.shape[-2], device=DEVICE) < 0.7
    return differentiable, mask, torch.randn_like(q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_layouts(dtype, layout, head_dim, bias, deterministic):  # noqa: ARG001
    # Without a bias, too many queries for the kernels that take few.
    differentiable, mask, do = laid_out_inputs(dtype, bias, head_dim=head_dim, seq_len_q=130 if bias else 390)
    options = {"mask": mask, "causal": True}
    expected = gradients(cuda_attention, differentiable, do, **options)
    everything = {name: LAYOUTS[layout](tensor) for name, tensor in differentiable.items()}
    for name, tensor in everything.items():
        assert torch.equal(tensor, differentiable[name]) and tensor.stride() != differentiable[name].stride()
        ours = gradients(cuda_attention, {**differentiable, name: tensor}, do, **options)
        assert_equal(ours, expected, name)
    assert_equal(gradients(cuda_attention, differentiable, LAYOUTS[layout](do), **options), expected, "do")
    ours = gradients(cuda_attention, everything, LAYOUTS[layout](do), **options)
    assert_equal(ours, expected, "everything")
    for gradient, tensor in zip(ours[1:], everything.values(), strict=True):
        if tensor.stride(-1) == 1:  # else a copy of it reached the operators
            assert gradient.stride() == torch.empty_like(tensor).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_len", [128, 77])
def test_packed_qkv(dtype, seq_len, deterministic):  # noqa: ARG001
    """q, k and v as views of one (batch, seq_len, 3, heads, head_dim) projection; with and without RoPE's halves."""
    packed = torch.randn(2, seq_len, 3, 4, 64, device=DEVICE, dtype=dtype)
    views = dict(zip("qkv", packed.permute(2, 0, 3, 1, 4), strict=True))
    do = torch.randn_like(views["q"])
    ours = gradients(cuda_attention, views, do, causal=True)
    copies = {name: view.contiguous() for name, view in views.items()}
    assert_equal(ours, gradients(cuda_attention, copies, do.contiguous(), causal=True))
    assert ours[0].stride() == torch.empty_like(views["q"]).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_inputs(dtype, dim, deterministic):  # noqa: ARG001
    """Stride 0 in batch, heads or sequence of each argument; in do it is what o.sum().backward() gives."""
    differentiable, mask, do = laid_out_inputs(dtype)
    options = {"mask": mask, "causal": True}
    for name in (*differentiable, "do", "mask"):
        if name == "mask":
            if dim > 0:
                continue
            expanded = mask[:1].expand_as(mask)
        else:
            tensor = do if name == "do" else differentiable[name]
            expanded = tensor.narrow(dim, 0, 1).expand_as(tensor)
        found = []
        for version in (expanded, expanded.contiguous()):
            arguments, replaced_do, replaced_options = dict(differentiable), do, dict(options)
            if name == "do":
                replaced_do = version
            elif name == "mask":
                replaced_options["mask"] = version
            else:
                arguments[name] = version
            found.append(gradients(cuda_attention, arguments, replaced_do, **replaced_options))
        assert_equal(*found, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_inputs_without_a_bias(dtype, head_dim, dim):
    """Another kernel may take them than copies of them; it is as right."""
    q, k, v = random_inputs(dtype, num_kv_heads=2, seq_len_q=390, head_dim=head_dim)
    tensors = {"q": q, "k": k, "v": v}
    for name, tensor in tensors.items():
        expanded = {**tensors, name: tensor.narrow(dim, 0, 1).expand_as(tensor)}
        expected = plain_cosine_sim_attention(**{key: value.double() for key, value in expanded.items()}, causal=True)
        copied = cuda_attention(**{**expanded, name: expanded[name].contiguous()}, causal=True)
        for found in (cuda_attention(**expanded, causal=True), copied):
            assert rms(found.double() - expected) <= GATES[dtype] * rms(expected), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_summed_output(dtype, deterministic):  # noqa: ARG001
    """do has stride 0 in every dimension."""
    differentiable, mask, do = laid_out_inputs(dtype)
    expected = gradients(cuda_attention, differentiable, torch.ones_like(do), mask=mask)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in differentiable.items()}
    o = cuda_attention(**leaves, mask=mask)
    o.sum().backward()
    assert_equal((o.detach(), *(leaf.grad for leaf in leaves.values())), expected)


@pytest.mark.parametrize("layout", MASK_LAYOUTS)
@pytest.mark.parametrize("seq_len_k", [200, 77])
def test_mask_layouts(layout, seq_len_k, deterministic):  # noqa: ARG001
    differentiable, mask, do = laid_out_inputs(torch.bfloat16, seq_len_k=seq_len_k)
    replaced = MASK_LAYOUTS[layout](mask)
    assert torch.equal(mask, replaced)
    expected = gradients(cuda_attention, differentiable, do, mask=mask)
    assert_equal(gradients(cuda_attention, differentiable, do, mask=replaced), expected)


# Memory that nobody wrote, and keys that nobody sees.


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 64, "causal": True, "seq_len_q": 200, "seq_len_k": 130},
        {"head_dim": 40, "mask": True, "bias": "heads", "learned_scale": True},
        {"head_dim": 128, "num_kv_heads": 1, "bias": "shared", "causal": True, "seq_len_q": 33, "seq_len_k": 1000},
        {"head_dim": 256, "num_kv_heads": 2, "groups": 2, "mask": True},
        {"head_dim": 96, "causal": True, "num_kv_heads": 1, "seq_len_q": 260, "seq_len_k": 260},
        {"head_dim": 136, "seq_len_q": 700, "batch": 1},
        {"head_dim": 64, "causal": True, "window_size": (50, -1)},
        {"head_dim": 128, "mask": True, "window_size": (40, 70), "learned_scale": True},
    ],
    ids=str,
)
def test_outputs_do_not_depend_on_uninitialised_memory(dtype, options, is_deterministic, request):
    case = cuda_case(**{"dtype": dtype, "seq_len_q": 129, "seq_len_k": 191, **options})
    # In deterministic mode torch.empty would give NaN of its own accord, and hide what fill_free_memory leaves.
    request.addfinalizer(lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", True))
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(is_deterministic)
    tensors = case.tensors(dtype)
    options = case.options()
    do = torch.randn_like(tensors["q"])
    found = []
    fill_free_memory(0xFF)
    probes = [torch.empty_like(tensor) for tensor in (*tensors.values(), do.float(), do, do, do)]
    assert all(probe.isnan().all() for probe in probes)
    del probes
    for byte in (0x00, 0xFF, 0x7F):
        fill_free_memory(byte)
        found.append(gradients(cuda_attention, tensors, do, **options))
        fill_free_memory(byte)
        found[-1] += cuda_attention(**tensors, **options, return_partials=True)
    for again in found[1:]:
        if is_deterministic:
            assert_equal(again, found[0])
            continue
        assert_equal(again[:1] + again[-2:], found[0][:1] + found[0][-2:])  # o and the partials
        for one, other in zip(again, found[0], strict=True):
            assert rms(one.double() - other.double()) <= rounding(case) * rms(other.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_by", ["mask", "causal"])
def test_hidden_keys_do_not_matter(dtype, hidden_by, deterministic):  # noqa: ARG001
    """However large they are: o and the gradients stay the same, and theirs are 0."""
    q, k, v = random_inputs(dtype)
    do = torch.randn_like(q)
    visible = torch.rand(2, 200, device=DEVICE) < 0.5
    options = {"mask": visible}
    if hidden_by == "causal":  # the last 70 keys come after the last of the queries that are looked at
        visible = (torch.arange(200, device=DEVICE) < 130).expand(2, -1)
        q, do = torch.cat([q, q[:, :, :70]], 2), torch.cat([do, torch.zeros_like(do[:, :, :70])], 2)
        options = {"causal": True}
    shown = visible[:, None, :, None]
    expected = gradients(cuda_attention, {"q": q, "k": k, "v": v}, do, **options)
    changed = [torch.where(shown, tensor, 1e4 * tensor.sign()) for tensor in (k, v)]
    ours = gradients(cuda_attention, {"q": q, "k": changed[0], "v": changed[1]}, do, **options)
    for one, other in zip(ours[:2], expected[:2], strict=True):
        assert torch.equal(one[:, :, :130], other[:, :, :130])
    for one, other in zip(ours[2:], expected[2:], strict=True):
        assert torch.equal(one, other)
        assert (one.masked_select(~shown) == 0).all()


# Rows without a visible key, and nothing at all


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_without_a_visible_key(dtype, head_dim, bias):
    """A batch element that is masked as a whole, and causal rows before the first key."""
    q, k, v = random_inputs(dtype, batch=3, seq_len_q=150, seq_len_k=70, head_dim=head_dim)
    mask = torch.ones(3, 70, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    attn_bias = torch.randn(1, 4, 150, 70, device=DEVICE, dtype=dtype) if bias else None
    o, row_sum_log2 = forward(q, k, v, mask, attn_bias, *[None] * 5, 8.0, *operator_settings())
    empty = torch.zeros(3, 4, 150, dtype=torch.bool, device=DEVICE)
    empty[1] = True
    empty[:, :, :80] = True
    assert torch.equal(row_sum_log2 == -torch.inf, empty) and row_sum_log2[~empty].isfinite().all()
    assert (o[empty] == 0).all() and (o[~empty] != 0).any(-1).all()
    differentiable = {"q": q, "k": k, "v": v} | ({"attn_bias": attn_bias} if bias else {})
    _, dq, dk, dv, *dbias = gradients(cuda_attention, differentiable, torch.randn_like(q), mask=mask, causal=True)
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv, *dbias))
    assert (dq[empty] == 0).all() and (dk[1] == 0).all() and (dv[1] == 0).all()
    assert (dq[~empty] != 0).any() and (dk[0] != 0).any() and (dv[2] != 0).any()
    for gradient in dbias:
        assert (gradient[:, :, :80] == 0).all()
    numerator, denominator = cuda_attention(q, k, v, mask, attn_bias, causal=True, return_partials=True)
    assert (numerator[empty] == 0).all() and torch.equal(denominator == 0, empty)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"seq_len_q": 0}, {"seq_len_k": 0}, {"seq_len_q": 0, "seq_len_k": 0}], ids=str
)
@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_nothing_to_attend_to(dtype, sizes, num_kv_heads):
    q, k, v = random_inputs(dtype, num_kv_heads=num_kv_heads, **sizes)
    bias = torch.randn(1, 4, q.shape[-2], k.shape[-2], device=DEVICE, dtype=dtype)
    scale = torch.full((4,), 8.0, device=DEVICE)
    mask = torch.ones(q.shape[0], k.shape[-2], dtype=torch.bool, device=DEVICE)
    for extra in ({}, {"attn_bias": bias, "scale": scale}):
        tensors = {"q": q, "k": k, "v": v, **extra}
        for options in ({}, {"causal": True, "mask": mask}):
            found = gradients(cuda_attention, tensors, torch.randn_like(q), **options)
            for result, tensor in zip(found, (q, *tensors.values()), strict=True):
                assert result.shape == tensor.shape and result.dtype == tensor.dtype and (result == 0).all()
            numerator, denominator = cuda_attention(**tensors, **options, return_partials=True)
            assert numerator.shape == q.shape and (numerator == 0).all()
            assert denominator.shape == q.shape[:-1] and (denominator == 0).all()
    _, row_sum_log2 = forward(q, k, v, *[None] * 7, 8.0, *operator_settings())
    assert row_sum_log2.shape == q.shape[:-1] and (row_sum_log2 == -torch.inf).all()


# Partials


def shards(arguments, options, at):
    """The arguments of the keys before `at`, and of those from there on."""
    for keys in (slice(None, at), slice(at, None)):
        shard = {**arguments, "k": arguments["k"][..., keys, :], "v": arguments["v"][..., keys, :], **options}
        if options.get("mask") is not None:
            shard["mask"] = options["mask"][:, keys]
        if arguments.get("attn_bias") is not None:
            shard["attn_bias"] = arguments["attn_bias"][..., keys]
        yield shard


def merged_partials(**arguments):
    """Attention as the sum of two shards over the keys."""
    names = ("q", "k", "v", "attn_bias", "scale")
    tensors = {name: arguments.pop(name) for name in names if name in arguments}
    causal = arguments.pop("causal")
    seq_len_q, seq_len_k = tensors["q"].shape[-2], tensors["k"].shape[-2]
    at = seq_len_k - seq_len_q if causal else seq_len_k // 3  # causal: all queries see the first shard
    first, second = shards(tensors, arguments, at)
    one = cuda_attention(**first, return_partials=True)
    other = cuda_attention(**second, causal=causal, return_partials=True)
    return [a + b for a, b in zip(one, other, strict=True)]


def quotient(numerator, denominator, dtype):
    return (numerator / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)).to(dtype)


PARTIALS = [
    {},
    {"mask": True, "num_kv_heads": 2, "learned_scale": True},
    {"bias": "heads", "strided": True},
    {"causal": True, "seq_len_q": 130, "seq_len_k": 390, "groups": 2},
    {"layout": "merged", "num_heads": 1, "num_kv_heads": 1, "batch": 6, "mask": True},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", PARTIALS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 40, 256])
def test_partials_of_shards_add_up(dtype, options, head_dim):
    case = cuda_case(**{"dtype": dtype, "seq_len_q": 130, "seq_len_k": 333, "head_dim": head_dim, **options})
    tensors = case.tensors(dtype)
    whole = cuda_attention(**tensors, **case.options(), return_partials=True)
    merged = merged_partials(**tensors, **case.options())
    for one, other in zip(merged, whole, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        # Without a shift each key's share is the same in both; only the order of the sums is not.
        assert rms(one.double() - other.double()) <= 1e-5 * rms(other.double())

    exact = results(plain_cosine_sim_attention, case, torch.float64)
    sdpa = results(functools.partial(attend, "sdpa"), case, dtype)
    for function in (merged_partials, functools.partial(cuda_attention, return_partials=True)):
        ours = results(lambda function=function, **kw: quotient(*function(**kw), dtype), case, dtype)
        assert all(tensor.isfinite().all() for tensor in ours.values())
        # The gradient of partials is rounded as do is, and then that of each shard: three roundings instead of one.
        assert_within_gate(case, "cuda", exact, sdpa, ours, slack=torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peaked", [False, True])
def test_partials_beyond_the_range_of_float16(dtype, peaked):
    """Numerators, and gradients of partials times the row sums, far above 65504.

    Peaked, the rows are all but one-hot and the gradients of partials carry one over the row sum.
    """
    q, k, v = random_inputs(torch.float32, batch=1, num_heads=2, num_kv_heads=2, seq_len_q=33, seq_len_k=8000)
    if peaked:
        k[:, :, :33] = q + 0.3 * torch.randn_like(q)
    scale = 14.0 if peaked else 12.0
    tensors = {name: tensor.to(dtype) for name, tensor in zip("qkv", (q, k, v), strict=True)}
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    expected = plain_cosine_sim_attention(**exact, scale=scale, return_partials=True)
    row_sum = expected[1].detach()
    do = [torch.randn_like(part) for part in expected]
    if peaked:
        assert expected[0].abs().max() > 2**17
        do = [do[0] / row_sum.unsqueeze(-1), do[1] / row_sum]
    else:
        assert (row_sum.unsqueeze(-1) * do[0]).abs().max() > 2**16
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    ours = cuda_attention(**leaves, scale=scale, return_partials=True)
    grads = torch.autograd.grad(ours, list(leaves.values()), [part.float() for part in do])
    expected_grads = torch.autograd.grad(expected, list(exact.values()), do)
    # Relative RMS: for o the gates are 1, 2 and 6 in a thousand.
    limit = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    names = ("numerator", "denominator", *leaves)
    for name, one, other in zip(names, (*ours, *grads), (*expected, *expected_grads), strict=True):
        assert one.isfinite().all(), name
        error = rms(one.double() - other) / rms(other)
        assert error <= limit, (name, error)


# Repeatability


REPEATED = [
    {"causal": True, "num_kv_heads": 2, "bias": "heads", "learned_scale": True},
    {"num_kv_heads": 1, "mask": True, "bias": "shared", "learned_scale": "scalar", "head_dim": 128},
    {"causal": True, "bias": "per_key", "mask": True, "head_dim": 256, "num_kv_heads": 2, "batch": 1},
    {"causal": True, "batch": 1, "num_heads": 1, "num_kv_heads": 1, "seq_len_q": 4000, "seq_len_k": 4000},
    {"causal": True, "num_kv_heads": 2, "learned_scale": True},
    {"mask": True, "head_dim": 128, "strided": True},
    {"causal": True, "head_dim": 256, "groups": 2},
    {"causal": True, "num_kv_heads": 2, "seq_len_q": 2, "seq_len_k": 9000, "head_dim": 128},
    {"batch": 1, "num_heads": 2, "num_kv_heads": 2, "mask": True, "seq_len_q": 256, "seq_len_k": 9000},
]


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", REPEATED, ids=str)
def test_bitwise_repeatable(dtype, options, is_deterministic, request):
    """The forward pass always, the backward pass in deterministic mode; with other work on the GPU every other time."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    case = cuda_case(**{"dtype": dtype, "seq_len_q": 700, "seq_len_k": 900, "head_dim": 64, **options})
    tensors = case.tensors(dtype)
    options, do = case.options(), torch.randn_like(tensors["q"])
    other_stream, matrix = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    torch.cuda.synchronize()
    first = None
    for run in range(30):
        if run % 2:
            with torch.cuda.stream(other_stream):
                matrix @ matrix
        torch.use_deterministic_algorithms(is_deterministic)
        found = gradients(cuda_attention, tensors, do, **options)
        torch.use_deterministic_algorithms(False)
        if not is_deterministic:
            found = (*found[:1], *cuda_attention(**tensors, **options, return_partials=True))
        first = first or found
        assert_equal(found, first, run)


def test_modes_agree():
    """Deterministic or not, the gradients are the same but for the order of float32 sums."""
    case = cuda_case(dtype=torch.bfloat16, seq_len_q=700, seq_len_k=900, causal=True, num_kv_heads=2, bias="shared")
    found = []
    for is_deterministic in (False, True):
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            found.append(results(cuda_attention, case, case.dtype))
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0]["o"], found[1]["o"])
    for name, expected in found[0].items():
        assert rms(found[1][name] - expected) <= 0.1 * rounding(case) * rms(expected), name


# Streams, graphs, devices


def trained_inputs(dtype, bias=True, seq_len=300):
    """Differentiable arguments (without a bias also without a scale), options, and do."""
    q, k, v = random_inputs(dtype, num_kv_heads=2, seq_len_q=seq_len, seq_len_k=seq_len)
    tensors = {"q": q, "k": k, "v": v}
    if bias:
        tensors["attn_bias"] = torch.randn(4, seq_len, seq_len, device=DEVICE, dtype=dtype)
        tensors["scale"] = torch.rand(4, device=DEVICE) * 10
    mask = torch.rand(2, seq_len, device=DEVICE) < 0.7
    return tensors, {"mask": mask, "causal": True}, torch.randn_like(q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_side_stream(dtype, bias, deterministic):  # noqa: ARG001
    """Behind a long kernel and the inputs' arrival, on a stream that no other stream waits for."""
    tensors, options, do = trained_inputs(dtype, bias)
    expected = gradients(cuda_attention, tensors, do, **options)
    late = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for name, tensor in late.items():
            tensor.copy_(tensors[name])
        ours = gradients(cuda_attention, late, do, **options)
        partials = cuda_attention(**late, **options, return_partials=True)
    torch.cuda.synchronize()
    assert_equal(ours, expected)
    assert_equal(partials, cuda_attention(**tensors, **options, return_partials=True))


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_streams_at_once(dtype, head_dim):
    """Forward passes that share the GPU share nothing else."""
    sizes = {"num_heads": 8, "num_kv_heads": 8, "seq_len_q": 1100, "seq_len_k": 1100, "head_dim": head_dim}
    inputs = [random_inputs(dtype, **sizes) for _ in range(2)]
    expected = [cuda_attention(*tensors, causal=True) for tensors in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = []
    for _ in range(30):
        for stream, tensors, o in zip(streams, inputs, expected, strict=True):
            with torch.cuda.stream(stream):
                found.append((cuda_attention(*tensors, causal=True), o))
    torch.cuda.synchronize()
    for run, (one, other) in enumerate(found):
        assert torch.equal(one, other), run


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_never_waits_for_the_gpu(dtype, bias, is_deterministic, request):
    """Forward and backward return while the GPU is still busy with what came before."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    torch.use_deterministic_algorithms(is_deterministic)
    tensors, options, do = trained_inputs(dtype, bias)
    for _ in range(2):  # memory is in the cache, kernels are loaded
        gradients(cuda_attention, tensors, do, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    torch.cuda._sleep(500_000_000)  # a quarter of a second
    slept = torch.cuda.Event()
    slept.record()
    gradients(cuda_attention, tensors, do, **options)
    is_busy = not slept.query()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert is_busy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("return_partials", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_cuda_graph(dtype, return_partials, bias, deterministic):  # noqa: ARG001
    """Forward and backward, captured once and replayed with other inputs and with what replays left in memory."""
    tensors, options, do = trained_inputs(dtype, bias)
    static = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}

    def step():
        result = cuda_attention(**static, **options, return_partials=return_partials)
        o = quotient(*result, dtype) if return_partials else result
        return o, *torch.autograd.grad(o, list(static.values()), do)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for name, tensor in static.items():
                tensor.copy_(torch.rand_like(tensor) * 10 if name == "scale" else torch.randn_like(tensor))
            do.copy_(torch.randn_like(do))
            options["mask"].copy_(torch.rand_like(do[:, 0, :, 0].float()) < 0.7)
        graph.replay()
        replayed = [tensor.detach().clone() for tensor in captured]
        assert_equal(replayed, [tensor.detach() for tensor in step()])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_another_device_than_the_current_one(deterministic):  # noqa: ARG001
    tensors, options, do = trained_inputs(torch.bfloat16)
    expected = gradients(cuda_attention, tensors, do, **options)
    far = {name: tensor.to("cuda:1") for name, tensor in tensors.items()}
    options["mask"] = options["mask"].to("cuda:1")
    ours = gradients(cuda_attention, far, do.to("cuda:1"), **options)
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in ours)
    assert_equal([tensor.to("cuda:0") for tensor in ours], expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, deterministic):  # noqa: ARG001
    tensors, options, do = trained_inputs(torch.bfloat16)

    def checkpointed(q, k, v, attn_bias, scale, **options):
        def run(*differentiable):
            return cuda_attention(*differentiable[:3], attn_bias=differentiable[3], scale=differentiable[4], **options)

        return checkpoint(run, q, k, v, attn_bias, scale, use_reentrant=use_reentrant)

    def with_backward(function):  # reentrant checkpointing does not support torch.autograd.grad
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        o = function(**leaves, **options)
        o.backward(do)
        return o.detach(), *(leaf.grad for leaf in leaves.values())

    assert_equal(with_backward(checkpointed), with_backward(cuda_attention))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize("l2norm_qk", [True, False])
def test_every_subset_of_the_gradients(dtype, num_kv_heads, l2norm_qk):
    q, k, v = random_inputs(dtype, num_kv_heads=num_kv_heads)
    if not l2norm_qk:
        q, k = (torch.nn.functional.normalize(tensor, dim=-1) for tensor in (q, k))
    bias = torch.randn(1, 4, 130, 200, device=DEVICE, dtype=dtype)
    table = torch.randn(4, 130 + 200 - 1, device=DEVICE)
    inputs = q, k, v, None, bias, torch.full((4,), 8.0, device=DEVICE), None, None, table, None, 1.0
    options = operator_settings(causal=False, l2norm_qk=l2norm_qk, first_distance=-129)
    o, row_sum_log2 = forward(*inputs, *options)
    do, drow_sum_log2 = torch.randn_like(o), torch.randn_like(row_sum_log2)
    every = backward(do, *inputs, o, row_sum_log2, drow_sum_log2, *options, *[True] * 6, True)
    for subset in range(2**6):
        needs = [bool(subset >> index & 1) for index in range(6)]
        grads = backward(do, *inputs, o, row_sum_log2, drow_sum_log2, *options, *needs, True)
        for index, (grad, needed) in enumerate(zip(grads, needs, strict=True)):
            assert grad.dtype == every[index].dtype
            if not needed:
                assert grad.shape == (0,)
                continue
            error = rms(grad.double() - every[index].double())
            assert error <= torch.finfo(dtype).eps * rms(every[index].double()), (needs, index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"causal": True, "num_kv_heads": 2, "seq_len_q": 150}, {"mask": True}], ids=str)
def test_gradient_of_the_row_sums(dtype, options):
    """With gradients of both o and row_sum_log2, as partials have them; in rows without a key neither counts."""
    case = cuda_case(**{"dtype": dtype, "seq_len_q": 130, "seq_len_k": 140, "head_dim": 64, **options})
    mask = case.options().get("mask")
    exact, tensors = ([t.requires_grad_() for t in case.tensors(low).values()] for low in (torch.float64, dtype))
    numerator, denominator = plain_cosine_sim_attention(
        *exact, mask, scale=case.scale, causal=case.causal, return_partials=True
    )
    is_empty = denominator == 0
    assert is_empty.any()
    expected = quotient(numerator, denominator, torch.float64), denominator.masked_fill(is_empty, 1).log2()
    found = forward(*tensors, mask, *[None] * 6, case.scale, *operator_settings(causal=case.causal))
    do = torch.randn_like(found[0]), 3 * torch.randn_like(found[1])
    expected_grads = torch.autograd.grad(expected, exact, [part.double() for part in do])
    limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for name, one, other in zip("qkv", torch.autograd.grad(found, tensors, do), expected_grads, strict=True):
        error = rms(one.double() - other) / rms(other)
        assert one.isfinite().all() and error <= limit, (name, error)


# Size and memory


def need_memory(num_bytes):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes / 2**30:.0f} GiB of free GPU memory, there are {free / 2**30:.0f}")


MANY_HEADS = [
    {"batch": 70_000, "num_heads": 1, "num_kv_heads": 1, "learned_scale": True},
    {"batch": 1, "num_heads": 70_000, "num_kv_heads": 70_000, "learned_scale": True, "causal": True},
    {"batch": 2, "num_heads": 35_000, "num_kv_heads": 17_500, "mask": True, "head_dim": 64},
    {"batch": 17_500, "num_heads": 4, "num_kv_heads": 1, "bias": "shared", "causal": True},
    {"batch": 7, "num_heads": 10_000, "num_kv_heads": 10_000, "bias": "full", "dtype": torch.float32},
]


@pytest.mark.parametrize("options", MANY_HEADS, ids=str)
def test_many_heads(options):
    """batch * heads = 70,000, more than a grid has in y and z."""
    need_memory(8 * 2**30)
    case = cuda_case(**{"dtype": torch.bfloat16, "seq_len_q": 16, "seq_len_k": 16, "head_dim": 16, **options})
    exact, plain, ours = (
        results(function, case, low)
        for function, low in (
            (plain_cosine_sim_attention, torch.float64),
            (low_precision_attention, case.dtype),
            (cuda_attention, case.dtype),
        )
    )
    assert_near_plain(case, "cuda", exact, plain, ours)  # not every kernel of SDPA takes as many


def assert_slice_is_right(tensors, do, found, limit=2e-2, **options):
    """`found` is o and the gradients of q, k, v (and attn_bias), all cut to the same few heads."""
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected = gradients(plain_cosine_sim_attention, exact, do.double(), **options)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = rms(one.double() - other) / rms(other)
        assert error <= limit, (index, error)


@pytest.mark.parametrize("num_kv_heads", [64, 8])
def test_more_than_2_to_the_31_elements(num_kv_heads):
    """q, o and their gradients, and k and v too where they have as many heads."""
    need_memory(56 * 2**30)
    batch, num_heads, seq_len, head_dim = 520, 64, 1024, 64
    assert batch * num_heads * seq_len * head_dim > 2**31
    sizes = {"batch": batch, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    inputs = random_inputs(torch.bfloat16, **sizes, seq_len_q=seq_len, seq_len_k=seq_len)
    tensors, do = dict(zip("qkv", inputs, strict=True)), torch.randn_like(inputs[0])
    found = gradients(cuda_attention, tensors, do, causal=True)
    for element in (0, batch // 2, batch - 1):

        def last_heads(tensor, element=element):
            return tensor[element : element + 1, -tensor.shape[1] // 8 :]

        some = {name: last_heads(tensor) for name, tensor in tensors.items()}
        assert_slice_is_right(some, last_heads(do), list(map(last_heads, found)), causal=True)
    del inputs
    del tensors, do, found
    torch.cuda.empty_cache()


def test_rows_far_apart():
    """(seq_len, heads) storage of keys in which rows of one head lie more than 2^31 elements apart."""
    need_memory(32 * 2**30)
    num_heads, seq_len_k, head_dim = 2048, 16_640, 64
    assert num_heads * (seq_len_k - 1) * head_dim > 2**31
    q = torch.randn(1, 128, num_heads, head_dim, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (
        torch.randn(1, seq_len_k, num_heads, head_dim, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(2)
    )
    tensors, do = {"q": q, "k": k, "v": v}, torch.randn_like(q)
    found = gradients(cuda_attention, tensors, do, causal=True)
    assert found[2].stride() == k.stride()
    for cut in (slice(0, 2), slice(num_heads - 2, num_heads)):
        some = {name: tensor[:, cut] for name, tensor in tensors.items()}
        assert_slice_is_right(some, do[:, cut], [result[:, cut] for result in found], causal=True)
    del q, k, v, tensors, do, found
    torch.cuda.empty_cache()


def test_a_bias_of_more_than_2_to_the_31_elements():
    need_memory(24 * 2**30)
    batch, num_heads, seq_len_q, seq_len_k = 2, 16, 8192, 8200
    assert batch * num_heads * seq_len_q * seq_len_k > 2**31
    sizes = {"num_heads": num_heads, "num_kv_heads": num_heads, "seq_len_q": seq_len_q, "seq_len_k": seq_len_k}
    tensors = dict(zip("qkv", random_inputs(torch.bfloat16, **sizes, head_dim=16), strict=True))
    tensors["attn_bias"] = torch.randn(batch, num_heads, seq_len_q, seq_len_k, device=DEVICE, dtype=torch.bfloat16)
    do = torch.randn_like(tensors["q"])
    found = gradients(cuda_attention, tensors, do)
    for element, head in ((0, 0), (batch - 1, num_heads - 1)):
        cut = (slice(element, element + 1), slice(head, head + 1))
        some = {name: tensor[cut] for name, tensor in tensors.items()}
        assert_slice_is_right(some, do[cut], [result[cut] for result in found])
    del tensors, do, found
    torch.cuda.empty_cache()


def peak_requested(function):
    """What `function` allocates at its peak beyond what is allocated now, as requested: without any rounding."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_peak_memory(dtype, causal):
    """Forward: o, q^, k^ and the row sums. Backward: o, the gradients (q^ and k^ are in those of q and k), dq's
    float32 accumulator and two numbers a row.
    """
    num_heads, seq_len, head_dim = 32, 4096, 64
    sizes = {"batch": 1, "num_heads": num_heads, "num_kv_heads": num_heads, "head_dim": head_dim}
    q, k, v = random_inputs(dtype, **sizes, seq_len_q=seq_len, seq_len_k=seq_len)
    do = torch.randn_like(q)
    gradients(cuda_attention, {"q": q, "k": k, "v": v}, do, causal=causal)
    torch.cuda.empty_cache()
    numel, rows = q.numel(), num_heads * seq_len
    small = 64 * 1024  # alignment, and whatever does not grow with the tensors

    peak, _ = peak_requested(lambda: cuda_attention(q, k, v, causal=causal))
    limit = 3 * numel * q.element_size() + 4 * rows + small
    assert peak <= limit, (peak / 2**20, limit / 2**20)
    peak, _ = peak_requested(lambda: gradients(cuda_attention, {"q": q, "k": k, "v": v}, do, causal=causal))
    limit = 4 * numel * q.element_size() + 4 * numel + 2 * 4 * rows + small
    print(f"peak {peak / 2**20:.1f} MiB of {limit / 2**20:.1f}")
    assert peak <= limit, (peak / 2**20, limit / 2**20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_what_is_saved_for_the_backward_pass(dtype, strided):
    """The inputs as they are, o, and one float32 number a row."""
    tensors, options, _ = trained_inputs(dtype)
    if strided:
        for name in "qkv":
            tensors[name] = seq_first(tensors[name])
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (*leaves.values(), options["mask"])}
    saved = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        o = cuda_attention(**leaves, **options)
    num_rows = o.numel() // o.shape[-1]
    assert sorted(saved.values()) == sorted([o.nbytes, 4 * num_rows])
    assert o.untyped_storage().data_ptr() in saved
