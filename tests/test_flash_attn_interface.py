"""Functions shaped like FlashAttention's: names, layout and alignment are theirs, and what is not there raises."""

import inspect
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.gates import backend_name

import flash_cosine_sim_attention as library
from flash_cosine_sim_attention import (
    cosine_scale,
    flash_attn_interface,
    flash_cosine_sim_attention,
    plain_cosine_sim_attention,
)
from flash_cosine_sim_attention.flash_attn_interface import flash_attn_func, flash_attn_varlen_func

# The arguments of FlashAttention 2.8 and 3, in their order.
FLASH_2 = "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
FLASH_3 = (
    "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits "
    "pack_gqa deterministic sm_margin return_attn_probs"
)
PACKED = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
ALL_OFF = {
    "dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
    "qv": None, "q_descale": None, "k_descale": None, "v_descale": None, "attention_chunk": 0, "num_splits": 1,
    "pack_gqa": None, "sm_margin": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(seq_len_q=7, seq_len_k=7, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64):
    q = torch.randn(2, seq_len_q, heads, head_dim, dtype=dtype)
    return q, *torch.randn(2, 2, seq_len_k, kv_heads, head_dim, dtype=dtype).unbind(0)


def by_hand(q, k, v, softmax_scale=None, visible=None, gain_q=1.0, gain_k=1.0):
    """RMS norms without weights, gains, softmax: as the model has it. Rows that see nothing are 0."""
    q, k = (F.rms_norm(x, x.shape[-1:], eps=0.0) for x in (q, k))
    q, k = q * gain_q, k * gain_k
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return (logits.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


def visible_pairs(seq_len_q, seq_len_k, left, right):
    """FlashAttention's rule: keys from i + off - left to i + off + right, off = seq_len_k - seq_len_q."""
    i, j = torch.arange(seq_len_q)[:, None] + seq_len_k - seq_len_q, torch.arange(seq_len_k)
    return ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# Names.


def test_the_module_is_there_once_the_package_is_imported():
    assert library.flash_attn_interface is flash_attn_interface
    assert not hasattr(library, "flash_attn_func")  # who wants another function must ask for it


@pytest.mark.parametrize("names", [FLASH_2, FLASH_3])
def test_names_are_flash_attentions(names):
    parameters = inspect.signature(flash_attn_func).parameters
    assert set(names.split()) <= set(parameters)
    packed = inspect.signature(flash_attn_varlen_func).parameters
    assert {*names.split(), *PACKED.split(), "block_table", "seqused_q", "seqused_k"} <= set(packed)
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["q", "k", "v"] == names.split()[:3]  # what follows has another order in each
    positional = [n for n, p in packed.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["q", "k", "v", *PACKED.split()]


def test_a_fourth_argument_without_its_name_is_refused():
    """It is dropout_p in FlashAttention 2, softmax_scale in 3."""
    with pytest.raises(TypeError, match="3 positional arguments"):
        flash_attn_func(*inputs(), 0.5)


# What is computed.


@pytest.mark.parametrize("softmax_scale", [None, 0.1, 1.5])
@pytest.mark.parametrize("backend", ["sdpa", "reference", "operators"])
def test_norms_and_attention_in_one(softmax_scale, backend):
    q, k, v = inputs()
    with backend_name(backend) as name:
        found = flash_attn_func(q, k, v, softmax_scale=softmax_scale, gain_q=1.2, gain_k=1.3, backend=name)
    same(found, by_hand(q, k, v, softmax_scale, gain_q=1.2, gain_k=1.3))
    assert found.shape == q.shape and found.is_contiguous()


def test_causal_is_aligned_bottom_right():
    """FlashAttention's own example: 2 queries and 5 keys, 5 queries and 2 keys; the first rows see nothing."""
    for sizes in ((2, 5), (5, 2)):
        q, k, v = inputs(*sizes)
        visible = torch.ones(sizes, dtype=torch.bool).tril(sizes[1] - sizes[0])
        same(flash_attn_func(q, k, v, causal=True), by_hand(q, k, v, visible=visible))
    assert visible.tolist() == [[False] * 2] * 3 + [[True, False], [True, True]]


@pytest.mark.parametrize("sizes", [(7, 7), (4, 9), (9, 4)])
@pytest.mark.parametrize(
    "window_size, limits",
    [
        ((2, 1), (2, 1)),
        ([1, 0], (1, 0)),
        ((-1, 2), (-1, 2)),
        ((3, -1), (3, -1)),
        ((None, 1), (-1, 1)),
        ((2, None), (2, -1)),
        ((None, None), (-1, -1)),
        (None, (-1, -1)),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_windows(sizes, window_size, limits, causal):
    q, k, v = inputs(*sizes)
    left, right = limits[0], 0 if causal else limits[1]
    found = flash_attn_func(q, k, v, causal=causal, window_size=window_size)
    same(found, by_hand(q, k, v, visible=visible_pairs(*sizes, left, right)))


def test_packed_sequences_are_each_by_itself():
    lengths_q, lengths_k = (3, 0, 5), (4, 2, 5)
    q, k, v = torch.randn(8, 4, 16, dtype=torch.float64), *torch.randn(2, 11, 2, 16, dtype=torch.float64)
    bounds = [torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    options = {"softmax_scale": 0.3, "causal": True, "window_size": (2, 0), "gain_q": 1.5}
    found = flash_attn_varlen_func(q, k, v, *bounds, 5, 5, **options)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    same(found, torch.cat([flash_attn_func(*(x[None] for x in part), **options)[0] for part in parts]))
    assert found.is_contiguous()


def test_a_norm_to_length_1_is_a_gain():
    """x / |x| = head_dim ** -0.5 * rms_norm(x): then softmax_scale is the scale of the cosine."""
    q, k, v = inputs()
    gain = 16**-0.5
    assert cosine_scale(16, 10.0, gain, gain) == pytest.approx(10)
    found = flash_attn_func(q, k, v, softmax_scale=10.0, gain_q=gain, gain_k=gain)
    unit = [F.normalize(x, dim=-1).transpose(1, 2) for x in (q, k)]
    o = F.scaled_dot_product_attention(*unit, v.transpose(1, 2), scale=10.0, enable_gqa=True)
    same(found, o.transpose(1, 2))


def test_without_the_norm_it_is_flash_attention():
    q, k, v = inputs()
    q, k = q / 2, k * 0.7
    found = flash_attn_func(q, k, v, softmax_scale=0.4, causal=True, gain_q=1.1, l2norm_qk=False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    same(found, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.44, enable_gqa=True).transpose(1, 2))


@pytest.mark.parametrize("shape_q, shape_k", [((), ()), ((4,), (2,)), ((1,), ()), ((4,), (4,))], ids=str)
def test_gains_may_be_learned(shape_q, shape_k):
    """One for all or one a head; of keys, one a key/value head, too. Gradients are those of the arithmetic."""
    q, k, v = inputs()
    learned = [torch.rand(shape, dtype=torch.float64) + 0.5 for shape in (shape_q, shape_k, shape_q)]
    gain_q, gain_k, softmax_scale = (tensor.requires_grad_() for tensor in learned)
    found = flash_attn_func(q, k, v, softmax_scale=softmax_scale, gain_q=gain_q, gain_k=gain_k, causal=True)
    to_q = gain_q * softmax_scale
    to_k = gain_k if shape_k != (4,) else 1.0
    if shape_k == (4,):  # one for each query head: only its product with gain_q counts
        to_q = to_q * gain_k
    to_q, to_k = (gain[..., None] if isinstance(gain, torch.Tensor) else gain for gain in (to_q, to_k))
    expected = by_hand(q, k, v, 1.0, visible_pairs(7, 7, -1, 0), to_q, to_k)
    same(found, expected)
    do = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(o, learned, do) for o in (found, expected)), strict=True):
        same(one, other)


# Layout.


def test_nothing_is_copied(monkeypatch):
    """q, k and v are slices of one projection; the library gets views of them, and its output is the result."""
    qkv = torch.randn(2, 7, 8, 16)
    q, k, v = qkv.split((4, 2, 2), dim=2)
    seen = []

    def attend(*tensors, **_):
        seen.extend(tensors)
        return torch.empty(2, 7, 4, 16).transpose(1, 2)

    monkeypatch.setattr(flash_attn_interface, "flash_cosine_sim_attention", attend)
    o = flash_attn_func(q, k, v)
    for one, given in zip(seen, (q, k, v), strict=True):
        assert one.data_ptr() == given.data_ptr() and one.shape == given.transpose(1, 2).shape
    assert o.shape == q.shape and o.is_contiguous()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_another_layout_is_refused(name):
    tensors = dict(zip("qkv", inputs(), strict=True))
    wrong = tensors | {name: tensors[name][0]}
    with pytest.raises(ValueError, match=rf"{name} must be \(batch, seq_len, heads, head_dim\), got \(7, "):
        flash_attn_func(**wrong)
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        flash_attn_func(**tensors | {name: [1.0]})
    bounds = torch.tensor([0, 7], dtype=torch.int32)
    packed = {key: tensor[0] for key, tensor in tensors.items()} | {name: tensors[name]}
    with pytest.raises(ValueError, match=rf"{name} must be \(total, heads, head_dim\), got \(2, 7, "):
        flash_attn_varlen_func(**packed, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=7, max_seqlen_k=7)


# What is not there.

WRONG = {
    "dropout_p": 0.1, "softcap": 30.0, "return_attn_probs": True, "qv": torch.ones(1),
    "q_descale": torch.ones(1), "k_descale": torch.ones(1), "v_descale": torch.ones(1), "attention_chunk": 8,
    "deterministic": True,
}  # fmt: skip
WRONG_PACKED = {"block_table": torch.zeros(1, 1), "seqused_q": torch.ones(1), "seqused_k": torch.ones(1)}


def packed_inputs():
    q, k, v = (x[0] for x in inputs())
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    return q, k, v, bounds, bounds, 4, 4


@pytest.mark.parametrize("name, value", [*WRONG.items(), *WRONG_PACKED.items()])
def test_what_is_not_there_raises(name, value):
    if name in WRONG:
        with pytest.raises(ValueError, match=name):
            flash_attn_func(*inputs(), **{name: value})
    with pytest.raises(ValueError, match=name):
        flash_attn_varlen_func(*packed_inputs(), **{name: value})


def test_a_refusal_says_what_was_got_and_what_is_accepted():
    with pytest.raises(ValueError, match=r"dropout_p must be 0.0, got 0.1: .*drop outputs instead"):
        flash_attn_func(*inputs(), dropout_p=0.1)
    with pytest.raises(ValueError, match=r"alibi_slopes must be \(num_heads,\) = \(4,\) .*got \(3,\)"):
        flash_attn_func(*inputs(), alibi_slopes=torch.ones(3))


def test_alibi_slopes_are_added_after_the_scale():
    """As by FlashAttention: -slope * |distance|, whatever softmax_scale is; packed, inside each sequence."""
    q, k, v = inputs()
    slopes = torch.rand(q.shape[2])
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    bias = -slopes.double()[:, None, None] * distance.abs()
    expected = plain_cosine_sim_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias, scale=0.1 * q.shape[-1], causal=True
    ).transpose(1, 2)
    o = flash_attn_func(q, k, v, softmax_scale=0.1, causal=True, alibi_slopes=slopes)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    q, k, v, ends, *rest = packed_inputs()
    packed = flash_attn_varlen_func(q, k, v, ends, *rest, causal=True, alibi_slopes=slopes)
    for first, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        alone = flash_attn_func(*(x[None, first:end] for x in (q, k, v)), causal=True, alibi_slopes=slopes)
        torch.testing.assert_close(packed[first:end], alone[0], rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_said_as_they_were_given():
    q, k, v = inputs()  # (2, 7, 4, 16); k, v (2, 7, 2, 16)
    with pytest.raises(ValueError, match=r"num_heads 4, got 3 \(q: \(2, 7, 4, 16\), k: \(2, 9, 3, 16\)\)"):
        flash_attn_func(q, *torch.randn(2, 2, 9, 3, 16))
    for wrong in (torch.randn(2, 7, 2, 8), torch.randn(1, 7, 2, 16)):
        shapes = re.escape(f"q: (2, 7, 4, 16), k: {tuple(wrong.shape)}")
        with pytest.raises(ValueError, match=f"with q's batch and head_dim; got {shapes}"):
            flash_attn_func(q, wrong, wrong)
    with pytest.raises(ValueError, match="k and v must have one shape"):
        flash_attn_func(q, k, v[:, :-1])
    _, packed_k, packed_v, *ends = packed_inputs()
    with pytest.raises(ValueError, match=r"with q's head_dim; got q: \(5, 4, 8\), k"):
        flash_attn_varlen_func(torch.randn(5, 4, 8), packed_k, packed_v, *ends)


def test_what_asks_for_nothing_is_taken():
    """Callers name these with FlashAttention's defaults; how its kernels share their work changes no result."""
    q, k, v = inputs()
    expected = flash_attn_func(q, k, v)
    assert torch.equal(flash_attn_func(q, k, v, **ALL_OFF), expected)
    assert torch.equal(flash_attn_func(q, k, v, num_splits=4, pack_gqa=True, sm_margin=8), expected)
    nothing = dict.fromkeys(("dropout_p", "softcap", "attention_chunk"))  # None, as some callers have it
    assert torch.equal(flash_attn_func(q, k, v, **nothing), expected)
    packed = packed_inputs()
    off = ALL_OFF | dict.fromkeys(WRONG_PACKED)
    assert torch.equal(flash_attn_varlen_func(*packed, softcap=np.float32(0)), flash_attn_varlen_func(*packed))
    assert torch.equal(flash_attn_varlen_func(*packed, **off | nothing), flash_attn_varlen_func(*packed))
    with pytest.raises(ValueError, match=r"alibi_slopes must be \(num_heads,\) = \(4,\); got \(2, 4\)"):
        flash_attn_varlen_func(*packed, alibi_slopes=torch.ones(2, 4))


def test_deterministic_is_pytorchs_setting():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"torch\.use_deterministic_algorithms\(True\)"):
        flash_attn_func(q, k, v, deterministic=True)
    torch.use_deterministic_algorithms(True)
    assert torch.equal(flash_attn_func(q, k, v, deterministic=True), flash_attn_func(q, k, v))


# The scale.


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"softmax_scale": 0},
            r"softmax_scale \* head_dim \(16\) \* gain_q \* gain_k is the cosines' scale, .* positive, got",
        ),
        ({"gain_q": -1.0}, r"got softmax_scale 0.25, gain_q -1, gain_k 1: scale must be positive, got -4"),
        ({"softmax_scale": 4.0}, "must be at most 60, got 64"),
        ({"gain_q": float("nan")}, "scale must be positive, got nan"),
        ({"gain_q": torch.tensor([1.0, 1.0, 99.0, 1.0])}, r"gain_q of shape \(4,\), gain_k 1: .* got 396"),
        (
            {"softmax_scale": 61.0, "l2norm_qk": False},
            r"^softmax_scale \* gain_q \* gain_k is the cosines' scale, .* got 61",
        ),
        ({"gain_k": torch.ones(3)}, "gain_k must have one entry a key/value head of 2, or a head of 4; got 3"),
        ({"gain_q": torch.ones(3)}, r"gain_q must be a number or of shape \(\) or \(4,\), got \(3,\)"),
        ({"softmax_scale": torch.ones(3)}, r"softmax_scale must be a number or of shape \(\) or \(4,\), got \(3,\)"),
        ({"gain_q": torch.ones(2, 2)}, r"gain_q must be a number or of shape \(\) or \(heads,\), got \(2, 2\)"),
    ],
)
def test_a_scale_out_of_range_names_its_factors(options, message):
    with pytest.raises(ValueError, match=message):
        flash_attn_func(*inputs(), **options)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0,), ValueError, "head_dim must be at least 1, got 0"),
        ((-4, 1.0), ValueError, "head_dim must be at least 1, got -4"),
        ((64.0,), TypeError, "head_dim must be an int, got float"),
        ((True,), TypeError, "head_dim must be an int, got bool"),
        (
            (64, None, torch.ones(8), torch.ones(2)),
            ValueError,
            r"gain_k must be .* shape \(\) or \(8,\), as gain_q is, got \(2,\).*num_heads is given",
        ),
        ((64, None, Fraction(100)), ValueError, "gain_q 100, .*must be at most 60"),
        ((64, torch.ones(4), torch.ones(8)), ValueError, r"gain_q must be .* \(4,\), as softmax_scale is, got \(8,\)"),
    ],
)
def test_what_cosine_scale_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        cosine_scale(*arguments)


def test_cosine_scale_of_heads():
    gain_q, gain_k = torch.rand(8) + 1, torch.rand(2) + 1
    torch.testing.assert_close(cosine_scale(64, None, gain_q, gain_k[:1]), 8 * gain_q * gain_k[0])
    expected = 8 * gain_q * gain_k.repeat_interleave(4)
    torch.testing.assert_close(cosine_scale(64, None, gain_q, gain_k, num_heads=8), expected)
    assert cosine_scale(np.int64(64)) == 8


def test_a_number_of_heads_that_is_none_is_refused():
    with pytest.raises(TypeError, match="num_heads must be an int or None, got float"):
        cosine_scale(64, None, 1.0, torch.ones(2), num_heads=4.0)
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        cosine_scale(64, num_heads=0)


def test_head_dim_0_is_refused_by_its_name():
    empty = torch.ones(1, 4, 2, 0)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        flash_attn_func(empty, empty, empty)


def test_a_gain_for_fewer_heads_than_keys_have_is_refused():
    q, k, v = inputs(kv_heads=4)
    with pytest.raises(ValueError, match="gain_k must have one entry a key/value head of 4, .* got 2"):
        flash_attn_func(q, k, v, gain_k=torch.ones(2, dtype=q.dtype))
    offsets = torch.tensor([0, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match="gain_k must have one entry a key/value head of 4, .* got 2"):
        flash_attn_varlen_func(q[0], k[0], v[0], offsets, offsets, 7, 7, gain_k=torch.ones(2, dtype=q.dtype))


@pytest.mark.parametrize("value", ["1", True, torch.ones(4, dtype=torch.int64)])
@pytest.mark.parametrize("name", ["softmax_scale", "gain_q", "gain_k"])
def test_a_factor_is_a_number_or_a_tensor(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number or a tensor of a floating dtype, got"):
        flash_attn_func(*inputs(), **{name: value})


def test_gains_in_low_precision_are_multiplied_in_float32():
    gain = torch.tensor([1.203125], dtype=torch.bfloat16)
    scale = cosine_scale(64, 0.1, gain, gain)
    assert scale.dtype == torch.float32 and scale.item() == pytest.approx(6.4 * 1.203125**2, rel=1e-6)


def test_it_compiles_into_one_graph():
    q, k, v = inputs(dtype=torch.float32)
    gain = torch.rand(4, requires_grad=True)

    def attend(q, k, v, gain):
        return flash_attn_func(q, k, v, causal=True, window_size=(3, 0), gain_q=1 + gain, backend="sdpa")

    found = torch.compile(attend, backend="eager", fullgraph=True)(q, k, v, gain)
    torch.testing.assert_close(found, attend(q, k, v, gain))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scale", "max_scale", "gain_q"])
def test_a_number_out_of_range_is_named_where_it_is_compiled_in(name):
    """As a number that may be any: in an f-string it stopped the compiler instead."""
    torch._dynamo.reset()
    q, k, v = inputs(dtype=torch.float32)
    ours = name in ("scale", "max_scale")

    def attend(number):
        return (flash_cosine_sim_attention if ours else flash_attn_func)(q, k, v, backend="sdpa", **{name: number})

    compiled = torch.compile(attend, backend="eager", dynamic=True)
    for number in (2.0, 3.0):
        torch.testing.assert_close(compiled(number), attend(number))
    with pytest.raises(ValueError, match="max_scale must be .* got -1.0" if name == "max_scale" else "got -"):
        compiled(-1.0)
    if ours:  # with nothing but the graph there is no number to show
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=f"ValueError.*{name} must be") as error:
            torch.compile(attend, backend="eager", dynamic=True, fullgraph=True)(-1.0)
        assert "BUILD_STRING" not in str(error.value)
