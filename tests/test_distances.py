"""distance_bias and alibi_slopes, in every back end that a CPU has: what they mean, their gradients, errors."""

import itertools

import pytest
import torch
from support.cases import Case, describe
from support.gates import BACKENDS, attend, backend_name, check
from support.operators import cu_seqlens
from support.packed import DISTANCES, PACKED_DISTANCES, attend_packed, check_packed
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import flash_cosine_sim_attention.sdpa as sdpa
from flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    flash_cosine_sim_attention_varlen,
    plain_cosine_sim_attention,
)
from flash_cosine_sim_attention.functional import scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def distances(seq_len_q, seq_len_k):
    """t = i + seq_len_k - seq_len_q - j."""
    return torch.arange(seq_len_q)[:, None] + seq_len_k - seq_len_q - torch.arange(seq_len_k)


def dense(table, slopes, seq_len_q, seq_len_k, causal):
    """The attn_bias (1 or batch, num_heads, seq_len_q, seq_len_k) that the two stand for."""
    t = distances(seq_len_q, seq_len_k)
    bias = table[:, (t if causal else t + seq_len_q - 1).clamp(min=0)].unsqueeze(0)
    return bias if slopes is None else bias - slopes.double().view(-1, len(table), 1, 1) * t.abs()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal, window_size", [(True, None), (False, None), (True, (3, -1)), (False, (-1, 0))])
@pytest.mark.parametrize("seq_len_q, seq_len_k, slopes", [(7, 9, None), (9, 7, (4,)), (600, 550, (2, 4)), (1, 5, (4,))])
def test_they_are_the_dense_bias_of_their_distances(backend, causal, window_size, seq_len_q, seq_len_k, slopes):
    """Values, partials and every gradient; 600 queries are two blocks of sdpa's."""
    q = torch.randn(2, 4, seq_len_q, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, seq_len_k, 8, dtype=torch.float64)
    num_distances = seq_len_k + 3 if causal else seq_len_q + seq_len_k - 1
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4, num_distances, dtype=torch.float64))]
    slopes = None if slopes is None else torch.rand(slopes)
    options = {"causal": causal, "window_size": window_size, "mask": torch.rand(2, seq_len_k) < 0.9}
    bias = dense(leaves[3], slopes, seq_len_q, seq_len_k, causal)
    by_distance = {"distance_bias": leaves[3], "alibi_slopes": slopes}
    for return_partials in (False, True):
        expected = plain_cosine_sim_attention(*leaves[:3], attn_bias=bias, **options, return_partials=return_partials)
        found = attend(backend, *leaves[:3], **options, **by_distance, return_partials=return_partials)
        torch.testing.assert_close(found, expected)
        do = [torch.randn_like(x) for x in (expected if return_partials else (expected,))]
        gradients = (torch.autograd.grad(o, leaves, do, retain_graph=True) for o in (found, expected))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", DISTANCES)
def test_accuracy(name):
    for dtype in (torch.float32, torch.bfloat16):
        check(
            Case(**{"dtype": dtype, "head_dim": 64, "batch": 1, "num_heads": 2, "num_kv_heads": 2, **DISTANCES[name]})
        )


def relative_error(q, k, v, **options):
    """That of "sdpa" against float64: by RMS, and the largest."""
    exact = plain_cosine_sim_attention(q.double(), k.double(), v.double(), **options)
    error = flash_cosine_sim_attention(q, k, v, backend="sdpa", **options).double() - exact
    return torch.stack((error.square().mean().sqrt(), error.abs().amax())) / exact.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sdpa_is_as_exact_with_large_biases_as_without(dtype):
    """Rounded at their full size they would be 2 off in bfloat16, at a distance of 700 with the slope 0.5."""
    q, k, v = (torch.randn(4, 8, n, 64).to(dtype) for n in (1, 1024, 1024))
    mask = torch.arange(1024) < torch.tensor([700, 20, 333, 900])[:, None]
    slopes = 2.0 ** -torch.arange(1, 9)
    plain = relative_error(q, k, v, mask=mask)
    for bias in (
        {"alibi_slopes": slopes},
        {"alibi_slopes": 512 * slopes},
        {"distance_bias": 300 - torch.rand(8, 1024)},
    ):
        assert (relative_error(q, k, v, mask=mask, **bias) <= 2 * plain).all(), bias
    q, k, v = torch.randn(3, 1, 4, 700, 64).to(dtype).unbind(0)
    dense = torch.randn(1, 1, 700, 700).to(dtype)
    tables = {"distance_bias": 20 + torch.randn(4, 700), "alibi_slopes": slopes[:4]}
    for options in ({"causal": True}, {"causal": True, "attn_bias": dense}, {"causal": True, "window_size": (40, 0)}):
        error = relative_error(q, k, v, **options, **tables)
        assert (error <= 2 * relative_error(q, k, v, **options)).all(), options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sdpas_gradient_of_a_large_bias_is_that_of_a_small_one(dtype):
    """Of a number on top, bit for bit; partials alone know it, and keep what it does to them."""
    q, k, v = torch.randn(3, 1, 2, 600, 8).to(dtype).unbind(0)
    small = torch.randint(-2, 3, (2, 600)).float()
    dense, mask = torch.randint(-2, 3, (600, 600)).to(dtype), torch.rand(1, 600) < 0.9
    found, sums = [], []
    for table in (small, small + 32):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, dense, table)]
        arguments = (*leaves[:3], mask, leaves[3])
        options = {"causal": True, "distance_bias": leaves[4], "backend": "sdpa"}
        o = flash_cosine_sim_attention(*arguments, **options)
        found.append((o, *torch.autograd.grad(o.float().square().sum(), leaves)))
        sums.append(flash_cosine_sim_attention(*arguments, **options, return_partials=True))
    assert all(map(torch.equal, *found)) and found[0][-1].any()
    for one, other in zip(*sums, strict=True):
        assert one.dtype == torch.float32
        atol = 1e-5 * one.abs().max().item()
        torch.testing.assert_close(other / torch.tensor(32.0).exp(), one, rtol=1e-4, atol=atol)
    wide = [x.detach().float() for x in leaves]
    expected = plain_cosine_sim_attention(*wide[:3], mask, wide[3], causal=True, distance_bias=wide[4])
    torch.testing.assert_close(sums[1][0] / sums[1][1].clamp(min=1e-30).unsqueeze(-1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PACKED_DISTANCES)
@pytest.mark.parametrize("backend", ["reference", "operators"])
def test_accuracy_of_packed_sequences(name, backend):
    check_packed(PACKED_DISTANCES[name], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_each_by_itself(backend, causal):
    """They share a table, whose distance 0 is where max_seqlen_q says."""
    lengths_q, lengths_k, longest = [5, 0, 9], [7, 3, 4], (11, 8)
    q, k, v = (torch.randn(total, 2, 8, dtype=torch.float64) for total in (14, 14, 14))
    table = torch.randn(2, longest[1] if causal else sum(longest) - 1, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2)
    bounds = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
    options = {"causal": causal, "alibi_slopes": slopes}
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    o = attend_packed(
        backend, q=q, k=k, v=v, **dict(zip(names, (*bounds, *longest), strict=True)), **options, distance_bias=table
    )
    rows = zip(*(x.split(n) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))), strict=True)
    expected = []
    for one_q, one_k, one_v in rows:
        first = 0 if causal else longest[0] - len(one_q)
        end = len(one_k) if causal else first + max(len(one_q) + len(one_k) - 1, 0)
        one = (x.transpose(0, 1)[None] for x in (one_q, one_k, one_v))
        one_o = plain_cosine_sim_attention(*one, **options, distance_bias=table[:, first:end])
        expected.append(one_o[0].transpose(0, 1))
    expected = torch.cat(expected)
    torch.testing.assert_close(o, expected)
    do = torch.randn_like(o)
    torch.testing.assert_close(*(torch.autograd.grad(x, table, do) for x in (o, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_sequences_before_other_rows_need_no_distance(backend, causal):
    q, k, v = (torch.randn(3, 2, 8, requires_grad=True) for _ in range(3))
    table, ends = torch.zeros(2, 0, requires_grad=True), cu_seqlens([0])
    o = attend_packed(
        backend, q=q, k=k, v=v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=0, max_seqlen_k=0, causal=causal,
        distance_bias=table,
    )  # fmt: skip
    assert o.shape == q.shape and not o.any()
    for gradient in torch.autograd.grad(o.sum(), (q, k, v, table), materialize_grads=True):
        assert not gradient.any()


@pytest.mark.parametrize("function", [plain_cosine_sim_attention, flash_cosine_sim_attention])
def test_gradcheck(function):
    tensors = [torch.randn(1, 2, n, 4 if function is plain_cosine_sim_attention else 8).double() for n in (3, 4, 4)]
    tensors += [torch.randn(2, 6).double()]
    backend = {} if function is plain_cosine_sim_attention else {"backend": "sdpa"}

    def attend(q, k, v, table):
        return function(q, k, v, scale=2.0, distance_bias=table, alibi_slopes=torch.tensor([0.3, 0.1]), **backend)

    assert torch.autograd.gradcheck(attend, [tensor.requires_grad_() for tensor in tensors])
    if function is plain_cosine_sim_attention:
        assert torch.autograd.gradgradcheck(attend, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_is_summed_in_float32(backend):
    """In bfloat16, whose 8 bits would lose most of 4096 equal terms; entries that no pair has get zeros."""
    seq_len = 512
    q, k = (torch.zeros(8, 1, seq_len, 8, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(8, 1, seq_len, 8).bfloat16()
    table = torch.zeros(1, seq_len + 7, requires_grad=True)
    o = attend(backend, q, k, v, causal=True, distance_bias=table)
    do = torch.randn(o.shape).bfloat16()
    (gradient,) = torch.autograd.grad(o, table, do)
    wide = [x.double() for x in (q, k, v)]
    exact_table = table.detach().double().requires_grad_()
    exact = plain_cosine_sim_attention(*wide, causal=True, distance_bias=exact_table)
    (expected,) = torch.autograd.grad(exact, exact_table, do.double())
    assert gradient.dtype == torch.float32 and (gradient[:, seq_len:] == 0).all()
    assert (gradient - expected).norm() <= 1e-2 * expected.norm()


def test_sdpa_expands_them_a_block_of_queries_at_a_time(monkeypatch):
    seen = []
    expand = sdpa._scores_by_distance

    def record(by_distance, num_rows, num_keys):
        seen.append((num_rows, num_keys))
        return expand(by_distance, num_rows, num_keys)

    monkeypatch.setattr(sdpa, "_scores_by_distance", record)
    monkeypatch.setattr(sdpa, "ROWS_PER_BLOCK", 16)
    q = torch.randn(1, 1, 70, 8, requires_grad=True)
    table = torch.randn(1, 70, requires_grad=True)
    flash_cosine_sim_attention(q, q, q, causal=True, distance_bias=table, backend="sdpa").sum().backward()
    assert len(seen) == 2 * 5 and max(seen) == (16, 64)  # once more in the backward pass


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_table_in_float32(backend):
    q, k, v = torch.randn(3, 1, 2, 9, 8, requires_grad=True).unbind()
    table = torch.randn(2, 17, requires_grad=True)
    options = {"distance_bias": table, "alibi_slopes": torch.rand(2)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attend(backend, q, k, v, **options)
    low = attend(backend, *(x.bfloat16() for x in (q, k, v)), **options)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o, low)
    (gradient,) = torch.autograd.grad(o.float().sum(), table)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_a_table_may_be_in_the_dtype_that_q_was_given_in(backend):
    q, k, v = torch.randn(3, 1, 2, 9, 8).half().unbind()
    table = torch.randn(2, 17).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attend(backend, q, k, v, distance_bias=table)
        with pytest.raises(
            TypeError, match="distance_bias must be a float32, float16 or bfloat16 tensor; got torch.int32"
        ):
            attend(backend, q, k, v, distance_bias=table.int())
    torch.testing.assert_close(o, attend(backend, *(x.bfloat16() for x in (q, k, v)), distance_bias=table.float()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float64_and_its_table(backend):
    q, k, v = torch.randn(3, 1, 2, 9, 8).double().unbind()
    table = torch.randn(2, 17).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attend(backend, q, k, v, distance_bias=table)
        with pytest.raises(TypeError, match="bfloat16 tensor, or float64 as q; got torch.int32"):
            attend(backend, q, k, v, distance_bias=table.int())
    torch.testing.assert_close(o, attend(backend, q, k, v, distance_bias=table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_in_qs_dtype(dtype):
    q = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    table = torch.randn(2, 5).bfloat16()
    o = plain_cosine_sim_attention(q, q, q, causal=True, distance_bias=table.to(dtype).requires_grad_())
    torch.testing.assert_close(o, plain_cosine_sim_attention(q, q, q, causal=True, distance_bias=table.float()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "operators"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_compiled_without_a_break(backend, is_packed):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 12, 2, 8).unbind()
    table, slopes = torch.randn(2, 12, requires_grad=True), torch.rand(2)
    bounds = cu_seqlens([5, 7])

    def call(q, k, v, table):
        options = {"causal": True, "distance_bias": table, "alibi_slopes": slopes}
        if is_packed:
            names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
            ends = dict(zip(names, (bounds, bounds, 7, 7), strict=True))
            return attend_packed(backend, q=q, k=k, v=v, **ends, **options)
        return attend(backend, *(x.transpose(0, 1)[None] for x in (q, k, v)), **options)

    found = []
    name = {"operators": "cuda"}.get(backend, backend)

    def run(q, k, v, table):
        options = {"causal": True, "distance_bias": table, "alibi_slopes": slopes, "backend": name}
        if is_packed:
            return flash_cosine_sim_attention_varlen(q, k, v, bounds, bounds, 7, 7, **options)
        return flash_cosine_sim_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flash_cosine_sim_attention.interface._require_cuda", lambda _: None)
        o = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, table)
        found = o, *torch.autograd.grad(o.square().sum(), table)
    o = call(q, k, v, table)
    torch.testing.assert_close(found, (o, *torch.autograd.grad(o.square().sum(), table)))


def test_they_cost_no_operations():
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    counts = []
    for options in ({}, {"distance_bias": torch.zeros(2, 9, requires_grad=True), "alibi_slopes": torch.rand(2)}):
        with FlopCounterMode(display=False) as counter:
            attend("operators", q, q, q, causal=True, **options).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_alibi_is_a_table_in_closed_form():
    """As FlashAttention's: -slope * |i + seq_len_k - seq_len_q - j|."""
    q, k, v = torch.randn(1, 3, 6, 8), *torch.randn(2, 1, 3, 8, 8)
    slopes = torch.tensor([0.5, 0.25, 0.125])
    for causal in (False, True):
        t = torch.arange(0 if causal else -5, 8)
        table = -slopes[:, None] * t.abs()
        o = plain_cosine_sim_attention(q, k, v, causal=causal, alibi_slopes=slopes)
        torch.testing.assert_close(o, plain_cosine_sim_attention(q, k, v, causal=causal, distance_bias=table))


def test_merged_heads_share_a_table():
    q = torch.randn(6, 5, 8)
    table = torch.randn(1, 5)
    o = plain_cosine_sim_attention(q, q, q, causal=True, distance_bias=table, alibi_slopes=torch.rand(6, 1))
    assert o.shape == q.shape


def test_shards_of_the_keys_add_up():
    """A shard that ends `behind` keys before the last has the distances from there on: its table begins later."""
    q, k, v = torch.randn(1, 2, 6, 8).double(), *torch.randn(2, 1, 2, 10, 8).double()
    table = torch.randn(2, 6 + 10 - 1).double()
    whole = plain_cosine_sim_attention(q, k, v, distance_bias=table, return_partials=True)
    parts = []
    for first, end in ((0, 4), (4, 10)):
        behind = 10 - end
        part = table[:, behind : behind + 6 + end - first - 1]
        shard = k[:, :, first:end], v[:, :, first:end]
        parts.append(plain_cosine_sim_attention(q, *shard, distance_bias=part, return_partials=True))
    torch.testing.assert_close(tuple(map(sum, zip(*parts, strict=True))), whole)


def test_an_attention_sink_is_a_term_of_the_denominator():
    """docs/library.md: a learned logit a head that takes weight and has no value."""
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    sink = torch.randn(3, dtype=torch.float64, requires_grad=True)
    numerator, denominator = plain_cosine_sim_attention(q, k, v, return_partials=True)
    o = numerator / (denominator + sink.exp().view(-1, 1)).unsqueeze(-1)
    logits = 8 * torch.einsum("bhid,bhjd->bhij", *(x / x.norm(dim=-1, keepdim=True) for x in (q, k)))
    weights = torch.cat((logits, sink.view(1, -1, 1, 1).expand(2, -1, 5, 1)), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(o, weights @ v)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), sink) for x in (o, weights @ v)))


def count_graphs(function, calls):
    """How many graphs torch.compile makes for these arguments; the results are those without it."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    return counter.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["alibi_slopes", "distance_bias"])
def test_one_graph_serves_all_lengths(backend, causal, name):
    def arguments(seq_len_q, seq_len_k):
        bias = torch.rand(2) if name == "alibi_slopes" else torch.randn(2, seq_len_k + (0 if causal else seq_len_q - 1))
        return torch.randn(1, 2, seq_len_q, 8), torch.randn(1, 2, seq_len_k, 8), bias

    with backend_name(backend) as chosen:

        def attend(q, k, bias):
            return flash_cosine_sim_attention(q, k, k, causal=causal, backend=chosen, **{name: bias})

        assert count_graphs(attend, (arguments(n, 2 * n - 30) for n in range(40, 60))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_one_graph_serves_packed_sequences_of_all_lengths(backend, causal):
    def arguments(n):
        return torch.randn(n + 20, 2, 8), cu_seqlens([n, 11]), n, torch.randn(2, n if causal else 2 * n - 1)

    with backend_name(backend) as chosen:

        def attend(q, ends, longest, table):
            options = {"causal": causal, "distance_bias": table, "backend": chosen}
            return flash_cosine_sim_attention_varlen(q, q, q, ends, ends, longest, longest, **options)

        assert count_graphs(attend, map(arguments, range(20, 28))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_serves_all_windows(backend):
    """As where they follow from lengths, or from what torch's function aligns top-left."""
    with backend_name(backend) as chosen:

        def attend(q, k, window):
            wide = flash_cosine_sim_attention(q, k, k, window_size=(window, q.shape[-2] - 30), backend=chosen)
            return wide + scaled_dot_product_attention(q, k, k, is_causal=True, backend=chosen)

        calls = ((torch.randn(1, 2, n, 8), torch.randn(1, 2, 2 * n - 60, 8), n // 3) for n in range(40, 50))
        assert count_graphs(attend, calls) == 1


@pytest.mark.slow
def test_gradients_compiled():
    """There entries are looked up at each pair's distance; in eager mode neighbours are a view."""
    torch._dynamo.reset()
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq_len in (9, 14):
        leaves = [*torch.randn(3, 1, 2, seq_len, 8).unbind(0), torch.randn(2, 2 * seq_len - 1)]
        q, k, v, table = (leaf.requires_grad_() for leaf in leaves)
        options = {"distance_bias": table, "alibi_slopes": torch.rand(2), "window_size": (5, 3), "backend": "sdpa"}
        outputs = [attend(q, k, v, **options) for attend in (compiled, flash_cosine_sim_attention)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), (q, k, v, table)) for o in outputs))


WRONG = [
    ({"distance_bias": torch.zeros(2, 4), "causal": True}, ValueError,
     r"distance_bias must be \(num_heads, at least seq_len_k\) = \(2, at least 5\) with causal; got \(2, 4\)"),
    ({"distance_bias": torch.zeros(2, 5)}, ValueError,
     r"distance_bias must be \(num_heads, seq_len_q \+ seq_len_k - 1\) = \(2, 7\) without causal; got \(2, 5\)"),
    ({"distance_bias": torch.zeros(1, 7)}, ValueError, r"distance_bias must be .*got \(1, 7\)"),
    ({"distance_bias": torch.zeros(7)}, ValueError, r"distance_bias must be .*got \(7,\)"),
    ({"distance_bias": torch.zeros(2, 7).half()}, TypeError, "distance_bias must be a float32 tensor.*float16"),
    ({"distance_bias": [0.0] * 7}, TypeError, "distance_bias must be a float32 tensor.*list"),
    ({"distance_bias": torch.zeros(2, 7, device="meta")}, ValueError, "distance_bias must be on q's device cpu"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError,
     r"alibi_slopes must be \(num_heads,\) = \(2,\) or \(batch, num_heads\) = \(3, 2\); got \(3,\)"),
    ({"alibi_slopes": torch.zeros(1, 2)}, ValueError, r"alibi_slopes must be .*got \(1, 2\)"),
    ({"alibi_slopes": torch.zeros(2).half()}, TypeError, "alibi_slopes must be a float32 tensor, got torch.float16"),
    ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes must be a float32 tensor, got float"),
    ({"alibi_slopes": torch.zeros(2, device="meta")}, ValueError, "alibi_slopes must be on q's device cpu, got meta"),
    ({"alibi_slopes": torch.zeros(2, requires_grad=True)}, ValueError, "alibi_slopes has no gradient.*distance_bias=-"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_errors_name_the_argument(options, error, message):
    q, k = torch.randn(3, 2, 3, 8), torch.randn(3, 2, 5, 8)
    for backend in ("sdpa", "reference"):
        with pytest.raises(error, match=message):
            flash_cosine_sim_attention(q, k, k, backend=backend, **options)


def test_errors_of_packed_sequences_name_the_longest():
    q, ends = torch.randn(6, 2, 8), cu_seqlens([2, 4])
    for options, message in (
        ({"distance_bias": torch.zeros(2, 3), "causal": True}, r"at least max_seqlen_k\) = \(2, at least 4\)"),
        ({"distance_bias": torch.zeros(2, 11)}, r"max_seqlen_q \+ max_seqlen_k - 1\) = \(2, 7\)"),
        ({"alibi_slopes": torch.zeros(3, 2)}, r"alibi_slopes must be \(num_heads,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_cosine_sim_attention_varlen(q, q, q, ends, ends, 4, 4, **options)


def test_slopes_that_require_a_gradient_serve_where_none_is_made():
    q = torch.randn(1, 2, 5, 8)
    slopes = torch.rand(2, requires_grad=True)
    with torch.no_grad():
        o = flash_cosine_sim_attention(q, q, q, alibi_slopes=slopes)
    assert torch.equal(o, flash_cosine_sim_attention(q, q, q, alibi_slopes=slopes.detach()))


def test_every_case_has_a_name_of_its_own():
    cases = [Case(**{**options, "head_dim": 64}) for options in DISTANCES.values()]
    assert all(a != b for a, b in itertools.combinations(map(describe, cases), 2))
