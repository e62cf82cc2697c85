"""The function shaped like SDPA: torch's names, defaults and alignment, with the norms inside."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from flash_cosine_sim_attention import functional
from flash_cosine_sim_attention.functional import scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(seq_len_q=7, seq_len_k=7, heads=4, kv_heads=4, head_dim=16):
    q = torch.randn(2, heads, seq_len_q, head_dim, dtype=torch.float64)
    return q, *torch.randn(2, 2, kv_heads, seq_len_k, head_dim, dtype=torch.float64).unbind(0)


def normed(q, k):
    return (F.rms_norm(x, x.shape[-1:], eps=0.0) for x in (q, k))


def check(q, k, v, **options):
    """The same call of torch's function behind RMS norms: output and gradients."""
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = scaled_dot_product_attention(q, k, v, **options)
    expected = F.scaled_dot_product_attention(*normed(q, k), v, **options)
    do = torch.randn_like(found)
    for one, other in zip(
        (found, *torch.autograd.grad(found, leaves, do)),
        (expected, *torch.autograd.grad(expected, leaves, do)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_names_order_and_defaults_are_torchs():
    theirs = torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
    ours = list(inspect.signature(scaled_dot_product_attention).parameters.values())[: len(theirs)]
    for one, other in zip(ours, theirs, strict=True):
        assert one.name == other.name
        assert (one.kind is one.KEYWORD_ONLY) == other.kwarg_only
        if other.has_default_value():
            assert one.default == other.default_value
        else:
            assert one.default is one.empty


@pytest.mark.parametrize("sizes", [(7, 7), (4, 9), (9, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_alignment_is_torchs(sizes, is_causal):
    """Top-left, whichever is longer."""
    check(*inputs(*sizes), is_causal=is_causal)


@pytest.mark.parametrize("scale", [None, 0.1, 2.0])
def test_the_scale_is_what_the_model_passes(scale):
    check(*inputs(), scale=scale)


def test_grouped_queries():
    check(*inputs(kv_heads=2), enable_gqa=True, is_causal=True)
    with pytest.raises(ValueError, match="key must have query's 4 heads unless enable_gqa=True, got 2"):
        scaled_dot_product_attention(*inputs(kv_heads=2))


KEYS = torch.tensor([[True, False, True, True, False, True, True], [True] * 6 + [False]])
BAND = torch.ones(7, 7, dtype=torch.bool).tril(2).triu(-1)


@pytest.mark.parametrize(
    "attn_mask",
    [
        KEYS[:, None, None],
        KEYS[:1, None, None],
        KEYS[:1],
        torch.ones(2, 1, 1, 1, dtype=torch.bool),
        BAND,
        BAND[None],
        BAND & KEYS[:, None, None],
        torch.stack([BAND, ~BAND, BAND.T, KEYS[:1].expand(7, 7)]),
        torch.stack([KEYS[:1], ~KEYS[:1], KEYS[1:], torch.ones_like(KEYS[:1])]),  # (heads, 1, keys)
    ],
    ids=lambda mask: "x".join(map(str, mask.shape)),
)
@pytest.mark.parametrize("additive", [False, True])
def test_masks(attn_mask, additive):
    if additive:
        attn_mask = torch.zeros(attn_mask.shape, dtype=torch.float64).masked_fill(~attn_mask, -torch.inf)
    check(*inputs(), attn_mask=attn_mask)


def test_a_mask_by_key_becomes_no_bias(monkeypatch):
    seen = []
    monkeypatch.setattr(functional, "flash_cosine_sim_attention", lambda *tensors, **_: seen.append(tensors))
    scaled_dot_product_attention(*inputs(), KEYS[:, None, None])
    assert seen[0][4] is None and torch.equal(seen[0][3], KEYS)
    scaled_dot_product_attention(*inputs(), BAND)
    assert seen[1][3] is None and seen[1][4].shape == (1, 1, 7, 7)


def test_a_bias_has_its_gradient():
    q, k, v = inputs()
    bias = torch.randn(4, 7, 7, dtype=torch.float64, requires_grad=True)
    do = torch.randn_like(q)
    found = scaled_dot_product_attention(q, k, v, bias)
    expected = F.scaled_dot_product_attention(*normed(q, k), v, bias)
    for one, other in zip(*(torch.autograd.grad(o, bias, do) for o in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_query_that_sees_no_key_yields_zeros():
    q, k, v = inputs()
    hidden = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    hidden[1] = False
    o = scaled_dot_product_attention(q, k, v, hidden)
    assert o[0].abs().min() > 0 and not o[1].any()


def test_gains_are_as_in_flash_attn_func():
    q, k, v = inputs(kv_heads=2)
    gain_q, gain_k = 1 + torch.rand(4, dtype=torch.float64), 1 + torch.rand(2, dtype=torch.float64)
    found = scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.2, gain_q=gain_q, gain_k=gain_k)
    a, b = normed(q, k)
    a, b = a * gain_q.view(-1, 1, 1), b * gain_k.view(-1, 1, 1)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(a, b, v, scale=0.2, enable_gqa=True))
    found = scaled_dot_product_attention(a, b, v, enable_gqa=True, scale=0.2, l2norm_qk=False)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(a, b, v, scale=0.2, enable_gqa=True))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0, got 0.1"),
        ({"attn_mask": BAND, "is_causal": True}, ValueError, "attn_mask must be None where is_causal=True"),
        (
            {"attn_mask": BAND.int()},
            TypeError,
            "attn_mask must be a tensor, bool or of a floating dtype, got torch.int32",
        ),
        ({"attn_mask": causal_upper_left(7, 7)}, TypeError, "got torch's CausalBias: is_causal=True"),
        ({"attn_mask": causal_lower_right(7, 7)}, TypeError, "CausalBias: .*causal=True the lower right one"),
        ({"attn_mask": [True]}, TypeError, "attn_mask must be a tensor, .* got list"),
        ({"attn_mask": BAND[:5]}, ValueError, r"attn_mask must be broadcastable to .* = \(2, 4, 7, 7\), got \(5, 7\)"),
        ({"attn_mask": BAND[None, None, None]}, ValueError, "attn_mask must be broadcastable"),
        ({"attn_mask": BAND.to("meta")}, ValueError, "attn_mask must be on query's device cpu, got meta"),
        ({"scale": 5.0}, ValueError, "^scale .* got scale 5, .* must be at most 60, got 80"),
        ({"scale": "1"}, TypeError, "^scale must be a number or a tensor"),
        ({"scale": torch.ones(3)}, ValueError, r"^scale must be a number or of shape \(\) or \(4,\), got \(3,\)"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool, got int"),
        ({"is_causal": "False"}, TypeError, "is_causal must be a bool, got str"),
        ({"enable_gqa": None}, TypeError, "enable_gqa must be a bool, got NoneType"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*inputs(), **options)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_another_layout_is_refused(name):
    tensors = dict(zip(("query", "key", "value"), inputs(), strict=True))
    with pytest.raises(ValueError, match=rf"{name} must be \(batch, heads, seq_len, head_dim\), got \(4, 7, 16\)"):
        scaled_dot_product_attention(**tensors | {name: tensors[name][0]})
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
        scaled_dot_product_attention(**tensors | {name: None})


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", [{"seq_len_k": 9}, {"seq_len_k": 20}, {"kv_heads": 2}, {"head_dim": 8}], ids=str)
def test_a_value_of_another_shape_than_the_key_is_refused(is_causal, sizes):
    """Causal, both are cut to the query's length: a difference behind it must not go unseen."""
    (query, key, _), (*_, value) = inputs(seq_len_k=10), inputs(**{"seq_len_k": 10, **sizes})
    shapes = ["\\(" + ", ".join(map(str, tensor.shape)) + "\\)" for tensor in (key, value)]
    with pytest.raises(ValueError, match="value must have key's shape {}, got {}".format(*shapes)):
        scaled_dot_product_attention(query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("shape", [(1, 4, 7, 16), (2, 4, 7, 8)])
def test_a_key_of_another_batch_or_head_dim_is_refused_by_its_name(shape):
    query, key = torch.randn(2, 4, 7, 16), torch.randn(shape)
    with pytest.raises(
        ValueError, match=r"key must have query's batch size and head_dim \(query: \(2, 4, 7, 16\), key:"
    ):
        scaled_dot_product_attention(query, key, key)


def test_head_dim_0_is_refused_by_its_name():
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        scaled_dot_product_attention(*inputs(head_dim=0))
