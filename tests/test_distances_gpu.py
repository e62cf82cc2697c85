"""distance_bias and alibi_slopes on a GPU: exact, repeatable, by the kernels meant for them, in O(n) memory."""

from dataclasses import replace

import pytest
import torch
from support.cases import Case, describe
from support.gates import GATES, attend, check, results
from support.gpu import (
    DEVICE,
    LOW_DTYPES,
    NEEDS_HOPPER,
    NEEDS_KERNELS,
    assert_repeatable,
    guarded,
    hopper_variants,
    kernels_of,
    replayed,
    settings,  # noqa: F401
)
from support.packed import DISTANCES, PACKED_DISTANCES, WRONG_CU_SEQLENS, Packed, attend_packed, check_packed

from flash_cosine_sim_attention import flash_cosine_sim_attention, l2norm_tensors

pytestmark = NEEDS_KERNELS

DTYPES = list(GATES)
HEAD_DIMS = [16, 32, 64, 96, 128, 256, 40, 80]
# Many tiles, walks that several blocks share, rows that the kernels prepare ahead of them.
LARGE = {
    "causal": {"causal": True, "distance_bias": True},
    "dense": {"distance_bias": True, "num_kv_heads": 2},
    "window": {"window_size": (300, -1), "causal": True, "distance_bias": True, "alibi": "batch"},
    "masked": {"mask": True, "causal": True, "distance_bias": True},
    "more-keys": {"seq_len_q": 700, "causal": True, "distance_bias": True, "learned_scale": True},
    "alibi": {"causal": True, "alibi": "heads"},
    "split": {"batch": 1, "num_heads": 4, "num_kv_heads": 1, "seq_len_k": 150, "distance_bias": True},
}


def distance_cases():
    for index, (name, options) in enumerate(DISTANCES.items()):
        for dim_index, head_dim in enumerate(HEAD_DIMS):
            for dtype_index, dtype in enumerate(DTYPES):
                if (index + dim_index + dtype_index) % 2:
                    groups = options.get("groups", 1)
                    bias = "heads" if (index + dim_index) % 5 == 0 else None
                    case = Case(dtype=dtype, head_dim=head_dim, device=DEVICE, bias=bias, **options)
                    yield pytest.param(replace(case, groups=groups), id=f"{name}-{describe(case)}")


@pytest.mark.parametrize("case", list(distance_cases()))
def test_distances(case):
    check(case, ["cuda"])


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 96])
@pytest.mark.parametrize("name", LARGE)
def test_large(name, head_dim, dtype):
    case = Case(**{"dtype": dtype, "head_dim": head_dim, "device": DEVICE, "num_heads": 8, "num_kv_heads": 8,
                   "seq_len_q": 1300, "seq_len_k": 1300, **LARGE[name]})  # fmt: skip
    check(case, ["cuda"])
    assert_repeatable(case)


def packed_cases():
    for index, (name, case) in enumerate(PACKED_DISTANCES.items()):
        for dim_index, head_dim in enumerate(HEAD_DIMS):
            dtype = DTYPES[(index + dim_index) % len(DTYPES)]
            groups = case.groups if head_dim % (8 * case.groups) == 0 else 1
            yield pytest.param(
                replace(case, head_dim=head_dim, dtype=dtype, device=DEVICE, groups=groups),
                id=f"{name}-d{head_dim}-{dtype}",
            )


@pytest.mark.parametrize("case", list(packed_cases()))
def test_packed(case):
    check_packed(case, "cuda")


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_packed_tokens(dtype, head_dim):
    lengths = (700, 64, 1, 333, 2048, 0, 129, 500)
    case = Packed(lengths, causal=True, dtype=dtype, head_dim=head_dim, distance_bias=True, device=DEVICE)
    check_packed(replace(case, num_heads=8, num_kv_heads=4, behind=33), "cuda")


def exact_gradient_by_distance(q, k, v, table, do, scale):
    """float64 sums of dS along its diagonals, causal, (num_heads, seq_len), a block of queries at a time."""
    q, k = l2norm_tensors(q.double(), k.double())
    v, do, table = v.double(), do.double(), table.double()
    seq_len, sums = q.shape[-2], torch.zeros(table.shape, dtype=torch.float64, device=q.device)
    for first in range(0, seq_len, 512):
        rows = slice(first, first + 512)
        t = torch.arange(first, first + 512, device=q.device)[:, None] - torch.arange(seq_len, device=q.device)
        logits = scale * q[..., rows, :] @ k.mT + table[:, t.clamp(min=0)]
        p = logits.masked_fill(t < 0, -torch.inf).softmax(-1)
        dp = do[..., rows, :] @ v.mT
        ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).sum(0)
        sums.index_add_(1, t.clamp(min=0).flatten(), ds.flatten(1))
    return sums


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seq_len", [4096, 16384])
def test_gradient_by_distance_against_float64_sums_along_diagonals(seq_len, deterministic):
    """As exact as that of the dense bias which it replaces, whose elements are each rounded before they are summed."""
    q, k, v, do = torch.randn(4, 1, 2, seq_len, 64, device=DEVICE, dtype=torch.bfloat16).unbind()
    table = torch.randn(2, seq_len, device=DEVICE, requires_grad=True)
    torch.use_deterministic_algorithms(deterministic)
    o = flash_cosine_sim_attention(q, k, v, causal=True, scale=10, distance_bias=table, backend="cuda")
    (found,) = torch.autograd.grad(o, table, do)
    torch.use_deterministic_algorithms(False)
    o = flash_cosine_sim_attention(q, k, v, causal=True, scale=10, distance_bias=table, backend="sdpa")
    (dense,) = torch.autograd.grad(o, table, do)
    exact = exact_gradient_by_distance(q, k, v, table.detach(), do, 10.0)
    error, dense_error = ((x.double() - exact).norm() / exact.norm() for x in (found, dense))
    assert error <= max(dense_error, 1e-3), (error, dense_error)


@NEEDS_HOPPER
@pytest.mark.parametrize("call", ["table", "alibi", "window", "mask", "packed", "deterministic", "raw"])
def test_hopper_kernels_run(call):
    """Scored ones, in both directions; the gradient of the table from the backward kernel itself, in any order.

    Without the norm the backward pass multiplies scores where it would add what distances say.
    """
    q = torch.randn(2, 4, 512, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(4, 512, device=DEVICE, requires_grad=call not in ("alibi", "raw"))
    options = {"distance_bias": table, "causal": True}
    options |= {
        "alibi": {"distance_bias": None, "alibi_slopes": torch.rand(4, device=DEVICE)},
        "raw": {"distance_bias": None, "l2norm_qk": False, "scale": 0.1},
        "window": {"window_size": (100, -1)},
        "mask": {"mask": torch.ones(2, 512, device=DEVICE, dtype=torch.bool)},
    }.get(call, {})
    packed = Packed((200, 312), causal=True, device=DEVICE, distance_bias=True)
    tensors = {name: tensor.requires_grad_() for name, tensor in packed.tensors(torch.bfloat16).items()}

    def run():
        torch.use_deterministic_algorithms(call == "deterministic")
        if call == "packed":
            o = attend_packed("cuda", **tensors, **packed.options())
        else:
            o = flash_cosine_sim_attention(q, q, q, **options, backend="cuda")
        o.sum().backward()
        torch.use_deterministic_algorithms(False)

    names = kernels_of(run)
    variants = {"alibi": ("2", "2"), "deterministic": ("2", "2"), "raw": ("0", "2")}.get(call, ("2", "3"))
    assert hopper_variants(names) == variants, names
    portable = [name for name in names if "sm80" in name]
    assert len(portable) == (call == "deterministic") and all("distance_gradient" in name for name in portable)


@pytest.mark.parametrize("name", ["causal", "dense", "alibi"])
def test_memory_is_that_of_a_plain_call(name):
    """Within 2 MB, forward and backward; a dense bias of this length would take 256 MB a head."""
    q, k, v = torch.randn(3, 1, 4, 8192, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True).unbind()
    causal = name != "dense"
    table = torch.randn(4, 8192 if causal else 16383, device=DEVICE, requires_grad=True)
    options = {"alibi_slopes": torch.rand(4, device=DEVICE)} if name == "alibi" else {"distance_bias": table}

    def peak(**options):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        flash_cosine_sim_attention(q, k, v, causal=causal, backend="cuda", **options).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak()
    assert peak(**options) - peak() <= 2e6


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("entry", [-torch.inf, -1e4])
def test_entries_may_hide_keys(dtype, entry):
    """A table that is -inf from a distance on is a window."""
    q, k, v = torch.randn(3, 2, 4, 400, 64, device=DEVICE, dtype=dtype, requires_grad=True).unbind()
    table = torch.zeros(4, 400, device=DEVICE)
    table[:, 51:] = entry
    found = attend("cuda", q, k, v, causal=True, distance_bias=table)
    expected = attend("cuda", q, k, v, causal=True, window_size=(50, -1))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    (gradient,), (right,) = (torch.autograd.grad(o.sum(), k) for o in (found, expected))
    torch.testing.assert_close(gradient, right, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("cu_seqlens", WRONG_CU_SEQLENS.values(), ids=WRONG_CU_SEQLENS)
def test_wrong_cu_seqlens_and_lengths_end_and_touch_nothing_else(cu_seqlens, deterministic, head_dim):
    case = Packed((100, 30), causal=True, head_dim=head_dim, device=DEVICE, distance_bias=True, alibi=True)
    wrong = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    tensors = guarded(case.tensors(case.dtype))
    for ends_k in (wrong, wrong.clone()):
        options = {**case.options(), "cu_seqlens_q": wrong, "cu_seqlens_k": ends_k}
        torch.use_deterministic_algorithms(deterministic)
        o = attend_packed("cuda", **tensors, **options)
        gradients = torch.autograd.grad(o, tensors.values(), torch.ones_like(o))
        torch.cuda.synchronize()
        torch.use_deterministic_algorithms(False)
        assert all(result.isfinite().all() for result in (o, *gradients))


def test_cuda_graph():
    q = torch.randn(2, 4, 600, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(4, 600, device=DEVICE, requires_grad=True)

    def step():
        o = flash_cosine_sim_attention(q, q, q, causal=True, distance_bias=table, backend="cuda")
        return o.detach(), *torch.autograd.grad(o, (q, table), torch.ones_like(o))

    captured = replayed(step, q, table)
    o, _, gradient = step()
    assert torch.equal(captured[0], o)
    torch.testing.assert_close(captured[2], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    case = Case(dtype=dtype, head_dim=64, seq_len_q=200, seq_len_k=200, causal=True, distance_bias=True, device=DEVICE)
    compiled = torch.compile(lambda **arguments: attend("cuda", **arguments), fullgraph=True)
    found, expected = (results(function, case, dtype) for function in (compiled, lambda **a: attend("cuda", **a)))
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-3)
