"""The specification against an independent softmax in float64, and the facts that every back end shares."""

import inspect
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.gates import BACKENDS, attend, backend_name
from support.operators import cu_seqlens
from support.packed import attend_packed
from torch.nn.attention.bias import causal_lower_right

from flash_cosine_sim_attention import (
    __version__,
    flash_cosine_sim_attention,
    flash_cosine_sim_attention_varlen,
    l2norm_tensors,
    plain_cosine_sim_attention,
)
from flash_cosine_sim_attention.flash_attn_interface import flash_attn_func
from flash_cosine_sim_attention.functional import scaled_dot_product_attention
from flash_cosine_sim_attention.reference import key_ranges


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def naive_attention(q, k, v, visible, bias, scale, groups):
    """One head at a time, in the textbook form. visible, bias: (batch, num_heads, seq_len_q, seq_len_k)."""
    batch, num_heads, _, head_dim = q.shape
    group_size = num_heads // k.shape[1]
    o = torch.zeros_like(q)
    for b in range(batch):
        for head in range(num_heads):
            parts = zip(q[b, head].chunk(groups, -1), k[b, head // group_size].chunk(groups, -1), strict=True)
            sim = sum(F.normalize(qs, dim=-1) @ F.normalize(ks, dim=-1).T for qs, ks in parts)
            logits = (sim * scale[head] + bias[b, head]).masked_fill(~visible[b, head], -math.inf)
            o[b, head] = logits.softmax(-1).nan_to_num(0) @ v[b, head // group_size]
    return o


def inputs(batch=2, num_heads=4, num_kv_heads=4, seq_len_q=13, seq_len_k=17, head_dim=16, **kwargs):
    kwargs = {"dtype": torch.float64, **kwargs}
    q = torch.randn(batch, num_heads, seq_len_q, head_dim, **kwargs)
    k, v = (torch.randn(batch, num_kv_heads, seq_len_k, head_dim, **kwargs) for _ in range(2))
    return q, k, v


def test_public_signature_is_the_predecessors():
    names = "q k v mask attn_bias scale groups causal l2norm_qk attn_bias_batch_dim".split()
    defaults = [None, None, 8, 1, False, True, False]
    for function in (flash_cosine_sim_attention, plain_cosine_sim_attention):
        parameters = inspect.signature(function).parameters.values()
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional] == names
        assert [p.default for p in positional[3:]] == defaults
        assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("seq_len_q, seq_len_k", [(13, 17), (17, 13), (11, 11), (1, 9), (9, 1)])
def test_equals_naive(num_kv_heads, groups, seq_len_q, seq_len_k):
    q, k, v = inputs(num_kv_heads=num_kv_heads, seq_len_q=seq_len_q, seq_len_k=seq_len_k)
    scale = torch.tensor([0.5, 4.0, 8.0, 15.0], dtype=torch.float64)
    bias = torch.randn(2, 4, seq_len_q, seq_len_k, dtype=torch.float64)
    mask = torch.rand(2, seq_len_k) > 0.3
    mask[1] = False
    # Bottom-right aligned: the last query sees every key.
    below = torch.ones(seq_len_q, seq_len_k, dtype=torch.bool).tril(seq_len_k - seq_len_q)
    visible = (mask[:, None, None, :] & below).expand(2, 4, -1, -1)
    o = plain_cosine_sim_attention(q, k, v, mask, bias, scale, groups, True)
    expected = naive_attention(q, k, v, visible, bias, scale, groups)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


def in_window(seq_len_q, seq_len_k, left, right):
    """Whether query i sees key j, from the definition, (seq_len_q, seq_len_k)."""
    ahead = torch.arange(seq_len_q)[:, None] + seq_len_k - seq_len_q - torch.arange(seq_len_k)
    return ((ahead <= left) | (left == -1)) & ((-ahead <= right) | (right == -1))


@pytest.mark.parametrize("seq_len_q, seq_len_k", [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)])
def test_a_window_is_a_mask_by_distance(seq_len_q, seq_len_k):
    q, k, v = inputs(1, 2, 1, seq_len_q, seq_len_k, 8)
    for left, right, causal in itertools.product((-1, 0, 1, 3, 8, 100), (-1, 0, 1, 3, 8, 100), (False, True)):
        visible = in_window(seq_len_q, seq_len_k, left, 0 if causal else right)
        bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -math.inf)
        o = plain_cosine_sim_attention(q, k, v, causal=causal, window_size=(left, right))
        assert torch.equal(o, plain_cosine_sim_attention(q, k, v, attn_bias=bias)), (left, right, causal)
        assert torch.equal((o == 0).all(-1), ~visible.any(-1).expand(1, 2, -1))


def test_key_ranges():
    def ranges(*arguments):
        return [bound.tolist() for bound in key_ranges(*arguments)]

    cpu = torch.device("cpu")
    assert key_ranges(5, 7, -1, -1, cpu) is None
    assert ranges(3, 5, 1, 0, cpu) == [[1, 2, 3], [3, 4, 5]]
    assert ranges(5, 3, -1, 1, cpu) == [[0, 0, 0, 0, 0], [0, 1, 2, 3, 3]]
    assert ranges(4, 4, 2, -1, cpu) == [[0, 0, 0, 1], [4, 4, 4, 4]]
    # Two queries and three keys, no queries, one and two, none of the keys, and a query behind them all.
    packing = cu_seqlens([2, 0, 1, 1]), cu_seqlens([3, 1, 2, 0])
    assert ranges(5, 7, -1, -1, cpu, *packing) == [[0, 0, 4, 6, 6], [3, 3, 6, 6, 6]]
    first, end = ranges(5, 7, 1, 0, cpu, *packing)
    assert [list(range(*bounds)) for bounds in zip(first, end, strict=True)] == [[0, 1], [1, 2], [4, 5], [], []]


PACKINGS = {  # lengths of queries and of keys
    "alike": ([3, 1, 6], [3, 1, 6]),
    "one": ([5], [7]),
    "ragged": ([4, 1, 6, 2], [2, 5, 6, 1]),
    "empty": ([0, 3, 2, 0, 4, 0], [0, 2, 0, 3, 5, 0]),
    "tokens": ([1] * 5, [1] * 5),
}


def packed_inputs(lengths_q, lengths_k, behind, **options):
    """q, k, v in float64, with `behind` rows that belong to no sequence."""
    options = {"dtype": torch.float64, "requires_grad": True, **options}
    q = torch.randn(sum(lengths_q) + behind, 4, 8, **options)
    return q, *(torch.randn(sum(lengths_k) + behind, 2, 8, **options) for _ in range(2))


def one_by_one(q, k, v, lengths_q, lengths_k, **options):
    """Packed attention by its definition: sequences in a loop, and zeros behind them."""
    results, start_q, start_k = [], 0, 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        parts = q[start_q : start_q + length_q], *(t[start_k : start_k + length_k] for t in (k, v))
        o = plain_cosine_sim_attention(*(part.transpose(0, 1)[None] for part in parts), **options)
        results.append(o[0].transpose(0, 1))
        start_q, start_k = start_q + length_q, start_k + length_k
    return torch.cat([*results, torch.zeros_like(q[start_q:])])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("behind", [0, 2])
def test_packed_sequences_attend_each_to_itself(backend, packing, behind):
    lengths_q, lengths_k = PACKINGS[packing]
    q, k, v = packed_inputs(lengths_q, lengths_k, behind)
    bounds = cu_seqlens(lengths_q), cu_seqlens(lengths_k), max(lengths_q), max(lengths_k)
    scale = torch.rand(4, dtype=torch.float64, requires_grad=True)
    for causal, window_size, groups in itertools.product(
        (False, True), (None, (0, 0), (2, 1), (-1, 0), (50, 2)), (1, 2)
    ):
        options = {"causal": causal, "window_size": window_size, "groups": groups, "scale": scale}
        with backend_name(backend) as name:
            o = flash_cosine_sim_attention_varlen(q, k, v, *bounds, backend=name, **options)
        expected = one_by_one(q, k, v, lengths_q, lengths_k, **options)
        torch.testing.assert_close(o, expected)
        assert o.shape == q.shape and o.is_contiguous() and not o[sum(lengths_q) :].any()
        do = torch.randn_like(o)
        ours, theirs = (torch.autograd.grad(result, (q, k, v, scale), do) for result in (o, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths_q, lengths_k", [([2, 1], [0, 0]), ([0, 0], [2, 1]), ([2, 0], [0, 3]), ([0], [0])])
@pytest.mark.parametrize("behind", [0, 3])
def test_packed_sequences_without_a_pair(backend, lengths_q, lengths_k, behind):
    """Zeros, and a gradient of zeros for every tensor."""
    q, k, v = packed_inputs(lengths_q, lengths_k, behind, dtype=torch.float32)
    with backend_name(backend) as name:
        bounds = cu_seqlens(lengths_q), cu_seqlens(lengths_k), max(lengths_q), max(lengths_k)
        o = flash_cosine_sim_attention_varlen(q, k, v, *bounds, backend=name)
    assert o.shape == q.shape and not o.any()
    for tensor, grad in zip((q, k, v), torch.autograd.grad(o.sum(), (q, k, v)), strict=True):
        assert grad.shape == tensor.shape and not grad.any()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradcheck_of_packed_sequences(backend):
    bounds = cu_seqlens([2, 0, 1]), cu_seqlens([3, 1, 2]), 2, 3
    q, k, v = (tensor[:, :1] for tensor in packed_inputs([2, 0, 1], [3, 1, 2], behind=1))
    options = {"causal": True, "window_size": (1, 0), "groups": 2, "scale": 4, "backend": backend}
    assert torch.autograd.gradcheck(lambda *t: flash_cosine_sim_attention_varlen(*t, *bounds, **options), (q, k, v))


def test_packed_and_strided():
    """Also as views of one (total, 3, heads, head_dim) tensor, and under autocast."""
    qkv = torch.randn(9, 3, 4, 8)
    q, k, v = qkv.unbind(1)
    bounds = *[cu_seqlens([4, 5])] * 2, 5, 5
    for backend in BACKENDS:
        with backend_name(backend) as name:
            o = flash_cosine_sim_attention_varlen(q, k, v, *bounds, causal=True, backend=name)
            torch.testing.assert_close(o, one_by_one(q, k, v, [4, 5], [4, 5], causal=True))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = flash_cosine_sim_attention_varlen(q, k, v, *bounds, causal=True, backend=name)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), o, rtol=0.05, atol=0.05)


def test_bias_forms_and_layouts_agree():
    q, k, v = inputs()
    batch, num_heads, seq_len_q, seq_len_k = 2, 4, 13, 17
    heads, batches = torch.randn(num_heads, seq_len_q, seq_len_k), torch.randn(batch, seq_len_q, seq_len_k)
    plain = plain_cosine_sim_attention
    assert torch.equal(plain(q, k, v, attn_bias=heads), plain(q, k, v, attn_bias=heads[None]))
    batched = plain(q, k, v, attn_bias=batches, attn_bias_batch_dim=True)
    assert torch.equal(batched, plain(q, k, v, attn_bias=batches[:, None]))

    full = heads[None] + batches[:, None]
    mask = torch.rand(batch, seq_len_k) > 0.3
    separate = plain(q, k, v, mask, full, causal=True)
    merged = plain(
        *(tensor.flatten(0, 1) for tensor in (q, k, v)),
        mask.repeat_interleave(num_heads, dim=0),
        full.flatten(0, 1),
        causal=True,
    )
    torch.testing.assert_close(merged.unflatten(0, (batch, num_heads)), separate)
    single = plain(q, k[:, 0], v[:, 0])
    torch.testing.assert_close(single, plain(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)))


@pytest.mark.parametrize("causal, window_size", [(False, None), (True, None), (False, (1, 2)), (True, (2, 0))])
@pytest.mark.parametrize("return_partials", [False, True])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradcheck(causal, window_size, return_partials, backend):
    q, k, v = inputs(1, 2, 1, 4, 5, 8, requires_grad=True)
    scale = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True]])

    def attend(q, k, v, bias, scale):
        options = {"groups": 2, "causal": causal, "window_size": window_size, "backend": backend}
        return flash_cosine_sim_attention(q, k, v, mask, bias, scale, return_partials=return_partials, **options)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias, scale))


def test_reference_has_a_double_backward():
    q, k, v = inputs(1, 1, 1, 3, 4, 8, requires_grad=True)
    assert torch.autograd.gradgradcheck(plain_cosine_sim_attention, (q, k, v))


def test_partials_of_key_shards_add_up():
    q, k, v = inputs(dtype=torch.float32)
    mask = torch.rand(2, 17) > 0.3
    bias = torch.randn(4, 13, 17)
    whole = plain_cosine_sim_attention(q, k, v, mask, bias)
    numerator, denominator = torch.zeros(2, 4, 13, 16), torch.zeros(2, 4, 13)
    for keys in (slice(0, 5), slice(5, 6), slice(6, 17)):
        shard = k[:, :, keys], v[:, :, keys], mask[:, keys], bias[..., keys]
        shard_numerator, shard_denominator = plain_cosine_sim_attention(q, *shard, return_partials=True)
        numerator += shard_numerator
        denominator += shard_denominator
    torch.testing.assert_close(numerator / denominator.unsqueeze(-1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_partials_are_float32_and_not_shifted(dtype):
    q, k, v = inputs(dtype=dtype)
    numerator, denominator = plain_cosine_sim_attention(q, k, v, return_partials=True)
    assert numerator.dtype == denominator.dtype == torch.float32
    assert numerator.shape == (2, 4, 13, 16) and denominator.shape == (2, 4, 13)
    cos = F.normalize(q.double(), dim=-1) @ F.normalize(k.double(), dim=-1).mT
    torch.testing.assert_close(denominator.double(), (8 * cos).exp().sum(-1), rtol=1e-5, atol=0)
    flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
    merged = plain_cosine_sim_attention(*flat, return_partials=True)
    assert merged[0].shape == (8, 13, 16) and merged[1].shape == (8, 13)


def test_logits_beyond_the_bound_survive():
    """l2norm_qk=False or a large bias voids the bound; the reference shifts by the row maximum."""
    q, k, v = inputs(1, 1, 1, 3, 4, 8, dtype=torch.float32)
    o = plain_cosine_sim_attention(q * 100, k * 100, v, l2norm_qk=False)
    expected = F.scaled_dot_product_attention(q * 100, k * 100, v, scale=8.0)
    torch.testing.assert_close(o, expected)
    o = plain_cosine_sim_attention(q, k, v, attn_bias=torch.full((1, 3, 4), 1e4))
    torch.testing.assert_close(o, plain_cosine_sim_attention(q, k, v), rtol=1e-2, atol=1e-2)


def test_additive_mask_in_the_bias():
    q, k, v = inputs()
    mask = torch.rand(2, 17) > 0.3
    mask[1] = False
    bias = torch.zeros(2, 1, 1, 17).masked_fill(~mask[:, None, None], -math.inf)
    for backend in ("reference", "sdpa"):
        o = flash_cosine_sim_attention(q, k, v, attn_bias=bias, backend=backend)
        torch.testing.assert_close(o, plain_cosine_sim_attention(q, k, v, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [1, 4])
def test_l2norm_tensors(dtype, groups):
    x, y = torch.randn(3, 5, 16, dtype=dtype), torch.randn(2, 32, dtype=dtype)
    results = l2norm_tensors(x, y, groups=groups)
    assert isinstance(results, tuple)
    for tensor, result in zip((x, y), results, strict=True):
        assert result.dtype == dtype and result.shape == tensor.shape
        parts = tensor.double().unflatten(-1, (groups, -1))
        expected = (parts / parts.norm(dim=-1, keepdim=True)).flatten(-2)
        # A norm, a division and a product, each rounded by eps / 2, and the rounding to dtype.
        torch.testing.assert_close(result.double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [1e-39, 1e-30, 1e-20, 1e20, 1e38])
def test_l2norm_of_huge_and_tiny_vectors(dtype, norm):
    x = torch.randn(7, 16, dtype=torch.float64)
    x = (x * norm / x.abs().amax()).to(dtype)
    (unit,) = l2norm_tensors(x)
    expected = F.normalize(x.double(), dim=-1, eps=0)
    torch.testing.assert_close(unit.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_l2norm_of_zero_has_no_gradient():
    x = torch.zeros(3, 8, requires_grad=True)
    (unit,) = l2norm_tensors(x, groups=2)
    unit.sum().backward()
    assert torch.equal(unit, torch.zeros(3, 8)) and torch.equal(x.grad, torch.zeros(3, 8))


def test_l2norm_tensors_errors():
    with pytest.raises(ValueError, match="at least one tensor"):
        l2norm_tensors()
    with pytest.raises(ValueError, match="groups must divide the last dimension 8, got 3"):
        l2norm_tensors(torch.randn(2, 8), groups=3)
    for groups in (2.0, True, "2"):
        with pytest.raises(TypeError, match="groups must be an int, got "):
            l2norm_tensors(torch.randn(2, 8), groups=groups)
    with pytest.raises(ValueError, match="got a tensor without one"):
        l2norm_tensors(torch.tensor(1.0))
    with pytest.raises(TypeError, match="floating dtype, got torch.int64"):
        l2norm_tensors(torch.ones(2, 8, dtype=torch.int64))


def assert_close_to_exact(backend, dtype, q, k, v, floor=0.0, **options):
    """Forward and gradients, within a tolerance times the largest exact value of each, or `floor`."""
    # sdpa rounds scale * q to bfloat16, hence a logit of 30 by up to 30 * eps / 4.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    outcomes = []
    for run_dtype in (torch.float64, dtype):
        tensors = [tensor.detach().to(dtype).to(run_dtype).requires_grad_() for tensor in (q, k, v)]
        o = attend("reference" if run_dtype == torch.float64 else backend, *tensors, **options)
        grads = torch.autograd.grad(o, tensors, torch.linspace(0, 10, o.shape[-1], dtype=run_dtype).expand_as(o))
        outcomes.append([o.detach(), *grads])
    for expected, actual in zip(*outcomes, strict=True):
        assert actual.isfinite().all()
        atol = tolerance * max(expected.abs().max().item(), floor)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adversarial_inputs(backend, dtype):
    q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
    direction = torch.randn(16).expand_as(q)

    def check(*tensors, **options):
        assert_close_to_exact(backend, dtype, *tensors, **options)

    # Gradients that cancel exactly are compared with the size of their terms, scale * |dP| / |q| > 10.
    check(direction, -direction, v, floor=10)  # cos = -1 everywhere
    check(q, direction, v, floor=10)  # all keys equal
    check(k, k, v, floor=10, scale=60)  # one-hot rows, at the largest scale
    check(q, k[:, :, [0, 0, 1, 1, 0, 2]], v, scale=30)  # duplicates
    check(q * 1e-20, k * 1e20, v)
    zeros = torch.zeros_like(q)
    for first, second in ((zeros, k), (q, zeros), (zeros, zeros)):
        check(first, second, v, floor=10)
        tensors = [first.to(dtype, copy=True).requires_grad_(), second.to(dtype, copy=True).requires_grad_()]
        attend(backend, *tensors, v.to(dtype)).sum().backward()
        for tensor, source in zip(tensors, (first, second), strict=True):
            assert source is not zeros or not tensor.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_a_visible_key_are_zero(backend, bias, causal):
    q = torch.randn(3, 2, 9, 8, requires_grad=True)
    k, v = (torch.randn(3, 2, 5, 8, requires_grad=True) for _ in range(2))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    attn_bias = torch.randn(2, 9, 5, requires_grad=True) if bias else None
    o = attend(backend, q, k, v, mask, attn_bias, causal=causal)
    o.backward(torch.randn_like(o))
    empty = torch.zeros(3, 2, 9, 1, dtype=torch.bool)
    empty[1] = True
    empty[:, :, :4] |= causal  # 9 queries and 5 keys, bottom-right: the first 4 see nothing
    assert not o.masked_select(empty).any() and o.masked_select(~empty).all()
    assert not q.grad.masked_select(empty).any()
    assert not k.grad[1].any() and not v.grad[1].any()
    assert all(t.grad.isfinite().all() for t in (q, k, v)) and v.grad[0].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_visible_key(backend, dtype):
    """o is v itself, and the logits have no gradient beyond the rounding of dP - delta (both of size 3)."""
    q, k, v = (torch.randn(1, 2, length, 8, dtype=dtype, requires_grad=True) for length in (7, 1, 1))
    o = attend(backend, q, k, v)
    o.backward(torch.randn_like(o))
    assert torch.equal(o, v.expand_as(o))
    for grad in (q.grad, k.grad):
        assert grad.abs().max() <= 3 * 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, seq_len_q, seq_len_k", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("return_partials", [False, True])
def test_zero_sizes(backend, batch, seq_len_q, seq_len_k, return_partials):
    q = torch.randn(batch, 4, seq_len_q, 8, requires_grad=True)
    k, v = (torch.randn(batch, 2, seq_len_k, 8, requires_grad=True) for _ in range(2))
    bias = torch.randn(4, seq_len_q, seq_len_k, requires_grad=True)
    scale = torch.full((4,), 8.0, requires_grad=True)
    mask = torch.ones(batch, seq_len_k, dtype=torch.bool)
    o = attend(backend, q, k, v, mask, bias, scale, causal=True, return_partials=return_partials)
    parts = o if return_partials else (o,)
    assert parts[0].shape == q.shape and not any(part.any() for part in parts)
    sum(part.sum() for part in parts).backward()
    for tensor in (q, k, v, bias, scale):
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


ALL_BIASES = {
    "attn_bias": torch.randn(1, 1, 5, 7),
    "distance_bias": torch.zeros(0, 11),
    "alibi_slopes": torch.zeros(0),
    "mask": torch.arange(7)[None] > 2,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [4.0, torch.tensor(4.0), torch.zeros(0)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"groups": 2, "window_size": (2, 1)}, ALL_BIASES], ids=list)
@pytest.mark.parametrize("return_partials", [False, True])
def test_no_heads(backend, scale, options, return_partials):
    """What a rank has where heads are split over more ranks than there are heads."""
    q, k, v = (torch.randn(2, 0, length, 8) for length in (5, 7, 7))
    tensors = {"q": q, "k": k, "v": v, "scale": scale, **options}
    for name in ("q", "k", "v", "scale", "attn_bias", "distance_bias"):
        if isinstance(tensors.get(name), torch.Tensor):
            tensors[name] = tensors[name].clone().requires_grad_()
    result = attend(backend, **tensors, return_partials=return_partials)
    parts = result if return_partials else (result,)
    assert [part.shape for part in parts] == [(2, 0, 5, 8), (2, 0, 5)][: len(parts)]
    leaves = [x for x in tensors.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    for leaf, gradient in zip(leaves, torch.autograd.grad(sum(part.sum() for part in parts), leaves), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_no_heads_of_packed_sequences(backend, causal):
    q, k, v = (torch.randn(total, 0, 8, requires_grad=True) for total in (6, 9, 9))
    bounds = cu_seqlens([2, 3]), cu_seqlens([4, 5])
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    o = attend_packed(backend, q=q, k=k, v=v, **dict(zip(names, (*bounds, 3, 5), strict=True)), causal=causal)
    assert o.shape == (6, 0, 8)
    assert [gradient.shape for gradient in torch.autograd.grad(o.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strides", ["seq_first", "sliced", "expanded", "last_dim"])
def test_strides_do_not_matter(backend, strides):
    options = {"mask": torch.rand(2, 21) > 0.2, "causal": True}

    def tensor():
        return {
            "seq_first": lambda: torch.randn(2, 21, 4, 16).transpose(1, 2),
            "sliced": lambda: torch.randn(2, 4, 43, 20)[:, :, 1::2, 3:19],
            "expanded": lambda: torch.randn(2, 1, 21, 16).expand(-1, 4, -1, -1),
            "last_dim": lambda: torch.randn(2, 4, 16, 21).mT,
        }[strides]()

    def run(q, k, v, do):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        o = attend(backend, *leaves, **options)
        grads = torch.autograd.grad(o, leaves, do)
        if backend == "operators" and strides == "seq_first":
            assert o.stride() == q.stride() and all(grad.stride() == q.stride() for grad in grads)
        return o, *grads

    q, k, v = tensor(), tensor(), tensor()
    # A tensor's own strides; those of o; none at all, as out of sum().
    for do in (tensor(), torch.randn(2, 4, 21, 16), torch.ones(()).expand(2, 4, 21, 16)):
        torch.testing.assert_close(run(q, k, v, do), run(*(t.contiguous() for t in (q, k, v, do))))


class Temperature(torch.nn.Parameter):
    pass


Q, K = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16)
ERRORS = [
    (TypeError, "q must be a tensor, got list", {"q": [1.0]}),
    (TypeError, "v must be float32, float16 or bfloat16, got torch.int32", {"v": K.int()}),
    (TypeError, "must have one dtype, got q: torch.float32, k: torch.float16", {"k": K.half()}),
    (ValueError, r"q must be \(batch, heads, seq_len, head_dim\).*got \(5, 16\)", {"q": Q[0, 0]}),
    (ValueError, "k and v must have the same shape", {"v": K[:, :, :6]}),
    (ValueError, "with merged q", {"q": Q[0]}),
    (ValueError, "must have q's batch size 2, got 1", {"k": K[:1], "v": K[:1]}),
    (ValueError, r"q's batch size 2, got 1 \(q: \(2, 4, 5, 16\), k: \(1, 7, 16\)", {"k": K[0, :1], "v": K[0, :1]}),
    (
        ValueError,
        r"q's batch \* heads 4, got 2 \(q: \(4, 5, 16\), k: \(2, 7, 16\)",
        {"q": Q[0], "k": K[0], "v": K[0]},
    ),
    (ValueError, "num_kv_heads must divide num_heads 3, got 2", {"q": Q[:, :3]}),
    (ValueError, "num_kv_heads must divide num_heads 0, got 2", {"q": Q[:, :0]}),
    (ValueError, "num_kv_heads must divide num_heads 4, got 0", {"k": K[:, :0], "v": K[:, :0]}),
    (ValueError, "q's head_dim 8, got 16", {"q": Q[..., :8]}),
    (ValueError, "head_dim must be a multiple of 8 from 8 to 256, got 12", "head_dim 12"),
    (ValueError, "head_dim must be a multiple of 8 from 8 to 256, got 264", "head_dim 264"),
    (ValueError, "groups must divide head_dim 16, got 3", {"groups": 3}),
    (ValueError, "groups must divide head_dim 16, got 0", {"groups": 0}),
    (TypeError, "groups must be an int, got float", {"groups": 2.0}),
    (TypeError, "mask must be a bool tensor, True = attend, got torch.float32", {"mask": torch.ones(2, 7)}),
    (ValueError, r"mask must be .* = \(2, 7\), or .*got \(2, 5\)", {"mask": torch.ones(2, 5) > 0}),
    (ValueError, r"mask must be .* = \(2, 7\), or .*got \(7,\)", {"mask": torch.ones(7) > 0}),
    (TypeError, "causal must be a bool, got int", {"causal": 1}),
    (TypeError, "causal must be a bool, got Tensor", {"causal": torch.ones(2, 7) > 0}),
    (TypeError, "causal must be a bool, got numpy.bool", {"causal": np.bool_(True)}),
    (
        TypeError,
        "attn_bias must be a tensor with values, got torch's CausalBias",
        {"attn_bias": causal_lower_right(5, 7)},
    ),
    (TypeError, "l2norm_qk must be a bool, got NoneType", {"l2norm_qk": None}),
    (TypeError, "attn_bias_batch_dim must be a bool, got str", {"attn_bias_batch_dim": "yes"}),
    (TypeError, "attn_bias must be a tensor of a floating dtype", {"attn_bias": torch.ones(4, 5, 7) > 0}),
    (ValueError, r"\(num_heads, seq_len_q, seq_len_k\) = \(4, 5, 7\)", {"attn_bias": torch.ones(2, 5, 7)}),
    (
        ValueError,
        r"attn_bias must be \(batch, seq_len_q, seq_len_k\) = \(2, 5, 7\).*got \(4, 5, 7\)",
        {"attn_bias": torch.ones(4, 5, 7), "attn_bias_batch_dim": True},
    ),
    (ValueError, r"attn_bias must be .*got \(1, 7\)", {"attn_bias": torch.ones(1, 7)}),
    (ValueError, r"attn_bias must be .*got \(7, 5\)", {"attn_bias": torch.ones(7, 5)}),
    (ValueError, r"attn_bias must be .*got \(7,\)", {"attn_bias": torch.ones(7)}),
    (ValueError, r"must be at most 60, got 61 \* 1", {"scale": 61}),
    (ValueError, r"got 8 \* 8: .*lower scale or groups \(groups=8 with scale=1,", {"groups": 8}),
    (ValueError, "must be at most 60, got 61.0", {"scale": np.float32(61)}),
    (ValueError, "must be at most 60, got 61.0", {"scale": Temperature(torch.tensor(61.0))}),
    (TypeError, "scale must be a number or a tensor, got bool", {"scale": True}),
    (ValueError, "scale must be positive, got nan", {"scale": math.nan}),
    (ValueError, "must be at most 60, got 100.0", {"scale": torch.tensor([1.0, 2.0, 100.0, 3.0])}),
    (ValueError, "scale must be positive, got nan", {"scale": torch.tensor([1.0, 2.0, math.nan, 3.0])}),
    (ValueError, "scale must be positive, got 0", {"scale": 0}),
    (ValueError, "scale must be positive, got -8.0", {"scale": -8.0}),
    (ValueError, "scale must be positive, got -1e-300", {"scale": -1e-300}),
    (ValueError, "scale must be positive, got 0.0", {"scale": torch.zeros(())}),
    (ValueError, "scale must be positive, got -2.0", {"scale": torch.tensor([1.0, -2.0, 3.0, 4.0])}),
    (TypeError, "scale must be a number or a tensor, got str", {"scale": "8"}),
    (TypeError, "floating dtype, got torch.int64", {"scale": torch.tensor(8)}),
    (ValueError, r"shape \(\) or \(num_heads = 4,\), got \(3,\)", {"scale": torch.ones(3)}),
    (ValueError, "backend must be one of .*'reference'.*, got 'cudnn'", {"backend": "cudnn"}),
    (TypeError, r"window_size must be \(left, right\), ints of at least -1.*got int", {"window_size": 4}),
    (TypeError, r"window_size must be \(left, right\).*got \(4.0, 0\)", {"window_size": (4.0, 0)}),
    (TypeError, r"window_size must be \(left, right\).*got \(4, None\)", {"window_size": (4, None)}),
    (TypeError, r"window_size must be \(left, right\).*got \[True, 0\]", {"window_size": [True, 0]}),
    (TypeError, r"window_size must be \(left, right\).*got str", {"window_size": "44"}),
    (ValueError, r"window_size must be \(left, right\).*got \(4, -2\)", {"window_size": (4, -2)}),
    (ValueError, r"window_size must be \(left, right\).*got \(4,\)", {"window_size": (4,)}),
]


@pytest.mark.parametrize("error, message, changes", ERRORS)
def test_errors_say_what_is_accepted(error, message, changes):
    if isinstance(changes, str):
        changes = dict.fromkeys("qkv", torch.randn(1, 1, 2, int(changes.split()[1])))
    with pytest.raises(error, match=message):
        flash_cosine_sim_attention(**{"q": Q, "k": K, "v": K, **changes})


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_nested_tensors_are_refused(backend, layout):
    """Their shape has no length of a sequence, or does not exist."""
    nested = torch.nested.nested_tensor([torch.ones(5, 4, 16), torch.ones(3, 4, 16)], layout=layout)
    with pytest.raises(TypeError, match="q must not be a nested tensor: .*flash_cosine_sim_attention_varlen"):
        attend(backend, *[nested.transpose(1, 2)] * 3)
    with pytest.raises(TypeError, match="k must not be a nested tensor"):
        attend(backend, Q, *[nested.transpose(1, 2)] * 2)
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    with pytest.raises(TypeError, match="q must not be a nested tensor"):
        flash_cosine_sim_attention_varlen(*[nested] * 3, bounds, bounds, 5, 5)
    for door in (scaled_dot_product_attention, flash_attn_func):
        with pytest.raises(TypeError, match="(q|query) must not be a nested tensor"):
            door(*[nested] * 3)


BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)
PACKED_ERRORS = [
    (TypeError, "k must be a tensor, got NoneType", {"k": None}),
    (ValueError, r"packed q must be \(total, heads, head_dim\), got \(1, 5, 4, 16\)", {"q": torch.ones(1, 5, 4, 16)}),
    (ValueError, "k and v must have the same shape", {"v": torch.ones(6, 2, 16)}),
    (TypeError, "must have one dtype", {"v": torch.ones(7, 2, 16).half()}),
    (
        ValueError,
        r"num_kv_heads must divide num_heads 3, got 2 \(q: \(5, 3, 16\), k: \(7, 2, 16\), v: \(7, 2, 16\)\)",
        {"q": torch.ones(5, 3, 16)},
    ),
    (ValueError, r"q's head_dim 8, got 16 \(q: \(5, 4, 8\)", {"q": torch.ones(5, 4, 8)}),
    (ValueError, "groups must divide head_dim 16, got 3", {"groups": 3}),
    (TypeError, "causal must be a bool, got int", {"causal": 1}),
    (TypeError, "l2norm_qk must be a bool, got str", {"l2norm_qk": "no"}),
    (ValueError, "must be at most 60, got 61", {"scale": 61}),
    (ValueError, "backend must be one of", {"backend": "cudnn"}),
    (TypeError, "window_size must be .*got int", {"window_size": 4}),
    (
        TypeError,
        r"cu_seqlens_q must be an int32 tensor, got torch.int64: call .int\(\) on it",
        {"cu_seqlens_q": BOUNDS.long()},
    ),
    (TypeError, "cu_seqlens_k must be an int32 tensor, got list$", {"cu_seqlens_k": [0, 2, 5]}),
    (ValueError, r"cu_seqlens_k must be \(num_sequences \+ 1,\).*got \(1, 3\)", {"cu_seqlens_k": BOUNDS[None]}),
    (
        ValueError,
        r"cu_seqlens_q must be \(num_sequences \+ 1,\), of at least one.*got \(1,\)",
        {"cu_seqlens_q": BOUNDS[:1]},
    ),
    (ValueError, "must be of one length, the number of sequences plus 1, got 3 and 2", {"cu_seqlens_k": BOUNDS[:2]}),
    (ValueError, "cu_seqlens_q must be on q's device cpu, got meta", {"cu_seqlens_q": BOUNDS.to("meta")}),
    (ValueError, "cu_seqlens_q must begin with 0.*; it begins with 1", {"cu_seqlens_q": BOUNDS + 1}),
    (ValueError, "cu_seqlens_k must .*not fall.*entry 2 is 1, the one before it 2", {"cu_seqlens_k": BOUNDS % 4}),
    (
        ValueError,
        "cu_seqlens_q must .*end at most at 5, the number of rows; it ends at 10",
        {"cu_seqlens_q": BOUNDS * 2},
    ),
    (TypeError, "max_seqlen_q must be an int, got Tensor", {"max_seqlen_q": torch.tensor(5)}),
    (TypeError, "max_seqlen_k must be an int, got float", {"max_seqlen_k": 5.0}),
    (
        ValueError,
        "max_seqlen_k must be at least the longest sequence's length, got 2: sequence 1 is of length 3",
        {"max_seqlen_k": 2},
    ),
]


@pytest.mark.parametrize("error, message, changes", PACKED_ERRORS)
def test_errors_of_packed_sequences_say_what_is_accepted(error, message, changes):
    given = {"q": torch.ones(5, 4, 16), "k": torch.ones(7, 2, 16), "v": torch.ones(7, 2, 16)}
    given |= {"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS, "max_seqlen_q": 10, "max_seqlen_k": 3}
    flash_cosine_sim_attention_varlen(**given)
    with pytest.raises(error, match=message):
        flash_cosine_sim_attention_varlen(**given | changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shorthands(backend):
    """A mask or a bias for the whole batch, and any kind of number as scale."""
    mask, bias = torch.rand(1, 7) > 0.3, torch.randn(5, 7)
    expected = attend(backend, Q, K, K, mask.expand(2, -1), bias.expand(4, -1, -1), 4.0)
    for scale in (4, np.float32(4), np.int64(4), Temperature(torch.tensor(4.0))):
        torch.testing.assert_close(attend(backend, Q, K, K, mask, bias, scale), expected)
    merged = attend(backend, Q.flatten(0, 1), *[K.repeat_interleave(2, dim=1).flatten(0, 1)] * 2, mask, bias, 4.0)
    torch.testing.assert_close(merged.unflatten(0, (2, 4)), expected)


@pytest.mark.parametrize("groups", [11, 29])
def test_a_bound_divided_by_groups_is_within_the_bound(groups):
    """60 / 11 is rounded up in float32, and 60 / 29 in float64."""
    q, k, v = torch.randn(3, 1, 1, 5, 8 * groups).unbind(0)
    assert torch.tensor(60 / groups).item() * groups > 60 or 60 / groups * groups > 60
    for scale in (60 / groups, torch.tensor(60 / groups), torch.tensor([60 / groups])):
        assert plain_cosine_sim_attention(q, k, v, scale=scale, groups=groups).isfinite().all()
    with pytest.raises(ValueError, match="must be at most 60"):
        plain_cosine_sim_attention(q, k, v, scale=60.001 / groups, groups=groups)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # SDPA has no batching rule
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_scale_under_torch_func(backend):
    def loss(scale):
        return flash_cosine_sim_attention(Q, K, K, scale=scale, backend=backend).square().sum()

    scale = torch.full((4,), 4.0, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(scale), scale)
    torch.testing.assert_close(torch.func.grad(loss)(scale.detach()), expected)
    scales = torch.rand(3, 4)
    expected = torch.stack([loss(scale) for scale in scales])
    torch.testing.assert_close(torch.vmap(loss)(scales), expected)


def test_reference_takes_any_head_dim():
    q, k, v = inputs(head_dim=12)
    plain_cosine_sim_attention(q, k, v, groups=3)
    flash_cosine_sim_attention(q, k, v, groups=3, backend="reference")


def test_nothing_has_a_direction_in_no_dimensions():
    q, k, v = inputs(head_dim=0)
    for function in (plain_cosine_sim_attention, flash_cosine_sim_attention):
        with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
            function(q, k, v)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        flash_cosine_sim_attention(q, k, v, backend="reference", l2norm_qk=False)
    with pytest.raises(ValueError, match=r"a last dimension of at least 1, got \(2, 4, 13, 0\)"):
        l2norm_tensors(q)
