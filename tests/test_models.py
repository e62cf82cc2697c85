"""The GPT: shapes, starts, causality, the cache, and that cosine and regular attention are what they claim."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode

import models.attention
import models.windows
from flash_cosine_sim_attention import l2norm_tensors, plain_cosine_sim_attention, sdpa
from models.attention import CosineAttention, KVCache, RegularAttention, SelfAttention, check_parts, hold_scales
from models.blocks import GELU, PostNormBlock, PreNormBlock, SquaredReLU
from models.gpt import GPT, nucleus
from models.positions import position_bias_of
from models.rotary import Rotary
from models.training.callbacks import largest_logits
from models.windows import block_mask, by_flex, mean_visible_keys, windowed_attention

BLOCKS = [PreNormBlock, PostNormBlock]
ATTENTIONS = ["cosine", "regular"]


def attention_of(kind, **options):
    """Builds it, in the first of two layers unless it is told another."""
    place = {"layer": 0, "num_layers": 2}
    if kind == "regular":
        return partial(RegularAttention, **place, **options)
    if kind != "cosine":
        raise ValueError(f"kind must be cosine or regular, got {kind!r}")
    settings_ = {"scale": 12.0, "learned_scale": True, "groups": 1, "backend": "auto", **options}
    return partial(CosineAttention, **place, **settings_)


def build(kind="cosine", block=PreNormBlock, **changes):
    windows = {key: changes.pop(key) for key in ("window", "window_pattern") if key in changes}
    sizes = {
        "num_layers": 2,
        "width": 64,
        "num_heads": 4,
        "num_kv_heads": None,
        "seq_len": 32,
        "positions": "rotary",
        "tied_head": False,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    return GPT(attention=attention_of(kind, **windows), block=block, **{**sizes, **changes})


def randomise_head(gpt):
    """The head starts at zero; most properties show only with one that is not."""
    if gpt.head.weight is not gpt.embedding.weight:
        torch.nn.init.normal_(gpt.head.weight, std=0.3)
    return gpt


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_first_loss_is_eight_bits_and_a_step_lowers_it(kind, block):
    gpt = build(kind, block)
    tokens = torch.randint(0, 256, (4, 33))
    loss = gpt(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() / math.log(2) == pytest.approx(8.0, abs=1e-5)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        gpt(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert gpt(tokens[:, :-1], tokens[:, 1:]).item() < loss.item() - 1.0
    assert all(parameter.grad is not None for parameter in gpt.parameters())


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_logits_do_not_see_the_future(kind, block, positions):
    gpt = randomise_head(build(kind, block, positions=positions))
    tokens = torch.randint(0, 256, (1, 20))
    before = gpt(tokens)
    for position in (0, 7, 19):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 256
        after = gpt(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-5)
        assert (after[:, position:] - before[:, position:]).abs().amax() > 1e-3


WINDOWED = {"window": 7, "window_pattern": "SLS", "num_layers": 4, "num_kv_heads": 2}


@pytest.mark.parametrize("changes", [{}, {"positions": "learned"}, {"num_kv_heads": 1}, {"tied_head": True}, WINDOWED])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_generation_with_cache_equals_generation_without(kind, block, changes):
    gpt = randomise_head(build(kind, block, **changes)).double()
    prompt = torch.randint(0, 256, (2, 5))
    # 70 bytes run over the 32 positions twice
    generated = [gpt.generate(prompt, 70, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert generated[0].shape == (2, 70)
    assert torch.equal(*generated)
    sampled = [
        gpt.generate(
            prompt, 70, top_k=20, temperature=2.0, generator=torch.Generator().manual_seed(1), use_cache=use_cache
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*sampled)
    assert not torch.equal(generated[0], sampled[0])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.1, [0.5]), (0.5, [0.5]), (0.51, [0.5, 0.25]), (0.75, [0.5, 0.25]), (0.76, [0.5, 0.25, 0.125]), (1, None)],
)
def test_top_p_keeps_the_fewest_bytes_whose_probabilities_reach_it(top_p, kept):
    probabilities = torch.tensor([[0.125, 0.5, 0.0, 0.125, 0.25], [0.0, 0.25, 0.5, 0.125, 0.125]])  # sums are exact
    found = nucleus(probabilities, top_p)
    whole = [[0.125, 0.5, 0.0, 0.125, 0.25], [0.0, 0.25, 0.5, 0.125, 0.125]]
    expected = whole if kept is None else [
        [0.125 if 0.125 in kept else 0.0, 0.5, 0.0, 0.0, 0.25 if 0.25 in kept else 0.0],  # of equals the first
        [0.0, 0.25 if 0.25 in kept else 0.0, 0.5, 0.125 if 0.125 in kept else 0.0, 0.0],
    ]  # fmt: skip
    assert found.tolist() == expected


def test_top_p_draws_from_the_nucleus_alone():
    gpt = randomise_head(build())
    prompt = torch.randint(0, 256, (1, 5)).expand(800, 5)
    options = {"temperature": 5.0, "top_k": 40}
    probabilities = (gpt(prompt[:1])[0, -1] / options["temperature"]).softmax(dim=-1)
    best = probabilities.topk(40)
    nucleus_size = int(((best.values / best.values.sum()).cumsum(0) < 0.3).sum()) + 1
    drawn = gpt.generate(prompt, 1, **options, top_p=0.3, generator=torch.Generator().manual_seed(0))
    assert 1 < nucleus_size < 40
    assert set(drawn.flatten().tolist()) == set(best.indices[:nucleus_size].tolist())


def test_logits_and_loss_are_float32_whatever_the_weights_are():
    gpt = randomise_head(build()).bfloat16()
    tokens = torch.randint(0, 256, (1, 9))
    assert gpt(tokens).dtype == gpt(tokens[:, :-1], tokens[:, 1:]).dtype == torch.float32


def test_the_stream_of_a_tied_head_starts_with_variance_1():
    gpt, seen = build(tied_head=True), []
    gpt.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    gpt(torch.arange(256)[None, :16])
    assert seen[0].var().item() == pytest.approx(1, rel=0.2)


def test_top_k_draws_from_so_many_bytes_also_where_they_are_equally_likely():
    gpt = build()  # whose head is zero
    drawn = gpt.generate(torch.zeros(200, 1, dtype=torch.long), 1, top_k=3, generator=torch.Generator().manual_seed(0))
    assert len(set(drawn.flatten().tolist())) == 3


@pytest.mark.parametrize("temperature", [1e-19, 1e-40, 1e-320])
def test_a_temperature_near_0_takes_the_likeliest(temperature):
    gpt = randomise_head(build())
    prompt = torch.randint(0, 256, (4, 5))
    greedy = gpt.generate(prompt, 12, temperature=0)
    assert torch.equal(gpt.generate(prompt, 12, temperature=temperature), greedy)


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_cached_logits_equal_the_whole_context_at_every_position(kind, window):
    gpt = randomise_head(build(kind, num_kv_heads=2, window=window)).double()
    tokens = torch.randint(0, 256, (2, 32))
    cache = gpt.new_cache(2)
    steps = [gpt(tokens[:, :9], cache=cache)] + [gpt(tokens[:, i : i + 1], cache=cache) for i in range(9, 32)]
    torch.testing.assert_close(torch.cat(steps, dim=1), gpt(tokens), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="seq_len = 32"):
        gpt(tokens[:, :1], cache=cache)


def test_a_long_prompt_is_cut_to_the_context():
    gpt = randomise_head(build())
    prompt = torch.randint(0, 256, (1, 100))
    assert torch.equal(gpt.generate(prompt, 3, temperature=0), gpt.generate(prompt[:, -32:], 3, temperature=0))


def test_generation_keeps_the_training_mode_and_draws_no_global_numbers():
    gpt = build(dropout=0.5).train()
    state = torch.get_rng_state()
    gpt.generate(torch.zeros(1, 1, dtype=torch.int64), 4, generator=torch.Generator().manual_seed(0))
    assert gpt.training
    assert torch.equal(state, torch.get_rng_state())


def test_cosine_attention_is_the_librarys_with_one_learned_scale_a_head():
    inner = attention_of("cosine", scale=10.0)(num_heads=3, head_dim=16)
    q, k, v = torch.randn(3, 2, 3, 11, 16).unbind(0)
    expected = plain_cosine_sim_attention(q, k, v, scale=10.0, causal=True)
    torch.testing.assert_close(inner(q, k, v), expected, rtol=1e-5, atol=1e-5)
    inner(q, k, v).square().sum().backward()
    assert inner.log_scale.grad.shape == (3,)
    assert inner.log_scale.grad.abs().min() > 0
    with torch.no_grad():
        inner.log_scale.fill_(10.0)
    assert inner.scale().tolist() == [60.0] * 3  # held in the range of the kernels
    fixed = attention_of("cosine", learned_scale=False)(num_heads=3, head_dim=16)
    assert not list(fixed.parameters())


@pytest.mark.parametrize("positions", ["rotary", "alibi", "dynamic"])
def test_a_learned_scale_at_its_bound_has_a_gradient(positions):
    """It starts there, is at the bound to float32's accuracy, and is brought back from above it, as far as that."""
    bias = position_bias_of(positions, num_heads=2, seq_len=8)
    bound = 44.0 if positions == "dynamic" else 60.0
    for head_dim in range(8, 257, 8):
        for groups in (number for number in range(1, head_dim + 1) if head_dim % number == 0):
            scale = bound / groups * (1 - 1e-15)  # whose product with groups is never rounded to more than the bound
            inner = attention_of("cosine", scale=scale, groups=groups, position_bias=bias)(
                num_heads=2, head_dim=head_dim
            )
            for _ in range(2):
                inner.log_scale.grad = None
                inner.scale().sum().backward()
                assert inner.scale().tolist() == pytest.approx([scale] * 2, rel=2e-5), (head_dim, groups)
                assert torch.equal(inner.log_scale.grad, inner.scale()), (head_dim, groups)
                with torch.no_grad():
                    inner.log_scale += 0.5
                hold_scales([inner, attention_of("cosine", learned_scale=False)(num_heads=2, head_dim=head_dim)])


def test_scales_within_their_bound_are_held_at_what_they_are():
    inner = attention_of("cosine")(num_heads=5, head_dim=16)
    with torch.no_grad():
        inner.log_scale.copy_(torch.tensor([-30.0, 0.0, 2.0, 4.09, 5.0]))
    hold_scales([inner])
    assert inner.log_scale.tolist()[:4] == torch.tensor([-30.0, 0.0, 2.0, 4.09]).tolist()
    assert inner.log_scale[4].exp().item() == pytest.approx(60, rel=2e-5)


def attention_in_parts(groups, rotary, head_dim=24):
    torch.manual_seed(0)
    inner = attention_of("cosine", groups=groups, scale=2.0)(num_heads=2, head_dim=head_dim)
    return SelfAttention(2 * head_dim, 2, 2, inner=inner, rotary=rotary, dropout=0.0).double()


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_rotary_positions_are_relative_in_every_number_of_parts(groups):
    attention = attention_in_parts(groups, Rotary(24, 64))
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    o, moved = (attention.inner(*attention.project(x, start=start)) for start in (0, 20))
    torch.testing.assert_close(moved, o, rtol=0, atol=1e-6)  # the angles' tables are float32


@pytest.mark.parametrize("groups", [8, 24])
def test_parts_of_odd_size_are_refused_with_rotary_positions(groups):
    said = f"attention.groups must cut the head_dim 24 into parts of even size with .*: 1, 2, 3, 4, 6, 12; got {groups}"
    attention = attention_in_parts(groups, Rotary(24, 64))  # as runs of earlier versions have it
    with pytest.raises(ValueError, match=said):
        check_parts(attention)
    check_parts(attention_in_parts(groups, None))


def test_regular_attention_scales_by_the_root_of_head_dim():
    q, k, v = torch.randn(3, 1, 2, 9, 16).unbind(0)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = (q @ k.mT / 4).masked_fill(hidden, float("-inf")).softmax(-1) @ v
    inner = attention_of("regular")(num_heads=2, head_dim=16)
    torch.testing.assert_close(inner(q, k, v), expected)
    with pytest.raises(ValueError, match="seq_len_q must be 1 or seq_len_k = 9"):
        inner(q[:, :, :3], k, v)


# Windows


@pytest.mark.parametrize(
    ("window", "pattern", "expected"),
    [
        (8, None, [8, 8, 8, None]),
        (8, "SSSL", [8, 8, 8, None, 8, 8, 8, None]),
        (8, "SL", [8, None, 8, None, None]),
        (8, "LS", [None, 8, None, None]),
        (8, "LLLLS", [None, None]),
        (8, "S", [None]),
        (None, None, [None, None, None]),
    ],
)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_pattern_says_which_layers_have_the_window_and_the_last_has_none(kind, window, pattern, expected):
    gpt = build(kind, window=window, window_pattern=pattern, num_layers=len(expected))
    assert [block.attention.inner.window for block in gpt.blocks] == expected


def visible_within(seq_len, window):
    """bool (seq_len, seq_len), written as the words are: j is i or before it, and one of the last `window` of these."""
    return torch.tensor([[max(0, i - window + 1) <= j <= i for j in range(seq_len)] for i in range(seq_len)])


def dense(inner, q, k, v, window):
    """softmax(logits) v with every logit stored, by the formula of the inner attention's kind."""
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    if isinstance(inner, CosineAttention):
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * inner.scale().to(q.dtype).view(-1, 1, 1)
    else:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
    hidden = ~visible_within(q.shape[-2], window).to(q.device)
    return logits.masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("window", [1, 2, 8, 9, 32, 33, 10**12])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_window_is_a_dense_mask(monkeypatch, kind, window, num_kv_heads):
    monkeypatch.setattr(sdpa, "ROWS_PER_BLOCK", 8)  # several blocks, the last a single row
    inner = attention_of(kind, window=window)(num_heads=4, head_dim=16).double()
    assert inner.window == window
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 33, 16, dtype=torch.float64) for heads in (4, num_kv_heads, num_kv_heads))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, *inner.parameters())]
    o, expected = inner(q, k, v), dense(inner, q, k, v, window)
    do = torch.randn_like(o)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    for gradient, wanted in zip(*(torch.autograd.grad(each, leaves, do) for each in (o, expected)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-10)  # the scale's is float32
    torch.testing.assert_close(inner(q[:, :, -1:], k, v), expected[:, :, -1:], rtol=0, atol=1e-12)  # from a cache


class Dense(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, q, k, v):
        return dense(self.inner, q, k, v, self.inner.window or q.shape[-2])


@pytest.mark.parametrize(("kind", "compiled"), [("cosine", False), ("regular", False), ("regular", True)])
def test_a_step_of_a_model_with_windows_is_that_of_dense_masks(monkeypatch, kind, compiled):
    monkeypatch.setattr(sdpa, "ROWS_PER_BLOCK", 16)
    gpt = randomise_head(build(kind, **{**WINDOWED, "num_layers": 3})).double()
    tokens = torch.randint(0, 256, (2, 33))
    if compiled:
        torch.compiler.reset()
        gpt.compile(fullgraph=True, dynamic=False, backend="eager")
    loss = gpt(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    found = [parameter.grad for parameter in gpt.parameters()]
    gpt.zero_grad()
    for block in gpt.blocks:
        block.attention.inner = Dense(block.attention.inner)
    expected = gpt.forward(tokens[:, :-1], tokens[:, 1:])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for gradient, parameter in zip(found, gpt.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-10)  # the scale's is float32


@pytest.mark.parametrize("window", [1, 2, 128, 129, 130, 255, 256, 257, 384, 1000])
def test_the_block_mask_is_that_of_every_pair(window):
    for seq_len in (1, 100, 128, 300, 640):
        expected = create_block_mask(
            lambda _batch, _head, i, j, window=window: (j <= i) & (j > i - window), None, None, seq_len, seq_len, "cpu"
        )
        found = block_mask(seq_len, window, torch.device("cpu"))
        assert found.seq_lengths == (seq_len, seq_len) and found.BLOCK_SIZE == expected.BLOCK_SIZE
        for kind in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
            for name in (kind, f"full_{kind}"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), (seq_len, name)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_flex_attention_within_a_window_is_a_dense_mask(num_kv_heads):
    q, k, v = (torch.randn(2, heads, 300, 16, dtype=torch.float64) for heads in (4, num_kv_heads, num_kv_heads))
    for window in (1, 100, 257):
        torch.testing.assert_close(by_flex(q, k, v, window), dense(None, q, k, v, window), rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("seq_len", [300, 1024])
def test_on_a_gpu_a_window_is_a_dense_mask_compiled_or_not(monkeypatch, caplog, seq_len):
    used = []
    monkeypatch.setattr(models.windows, "by_flex", lambda *inputs: used.append(inputs[3]) or by_flex(*inputs))
    models.windows._say_that_it_is_not_compiled.cache_clear()
    torch.manual_seed(0)
    qkv = torch.randn(2, seq_len, 12, 64, device="cuda", requires_grad=True)  # as the projection leaves them
    for attend, window in ((windowed_attention, 100), (torch.compile(windowed_attention, dynamic=False), 257)):
        results = []
        for function in (attend, partial(dense, None)):
            q, k, v = (part.transpose(1, 2) for part in qkv.split((8, 2, 2), dim=2))
            o = function(q, k, v, window)
            results.append((o, *torch.autograd.grad(o.square().sum(), qkv)))
        for found, expected in zip(*results, strict=True):
            assert (found - expected).norm() < 2e-3 * expected.norm()  # TF32's products, if they are allowed
    assert used == [257]
    windowed_attention(q, k, v, 100)
    assert caplog.text.count("is not compiled here") == 1


def test_visible_keys_are_half_a_key_below_the_pairs_at_most():
    for window in (1, 5, 64, 100):
        pairs = visible_within(64, window).sum().item()
        assert pairs / 64 - mean_visible_keys(64, window) == min(window, 64) / 128
    assert mean_visible_keys(64, None) == mean_visible_keys(64, 64) == 32


@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize("at_once", [1, 500, 2**22])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_the_largest_logit_is_that_of_all_visible_pairs(monkeypatch, num_kv_heads, at_once, window):
    monkeypatch.setattr(models.attention, "PRODUCTS_AT_ONCE", at_once)
    q, k = torch.randn(1, 4, 33, 16), torch.randn(1, num_kv_heads, 33, 16)
    k[:, :, 20] = 9 * q[:, :1, 3]  # most alike, but that query does not see this key
    k[:, :, 5] = 9 * q[:, :1, 30]  # nor this one within a window
    hidden = ~visible_within(33, window or 33)
    every = k.repeat_interleave(4 // num_kv_heads, dim=1)
    regular = (q @ every.mT / 4).masked_fill(hidden, 0).abs().amax()
    torch.testing.assert_close(attention_of("regular", window=window)(4, 16).largest_logit(q, k), regular)
    cosine = attention_of("cosine", groups=2, window=window)(num_heads=4, head_dim=16)
    with torch.no_grad():
        cosine.log_scale.copy_(torch.tensor([1.0, 2.0, 20.0, 0.5]).log())
    unit_q, unit_k = l2norm_tensors(q, every, groups=2)
    logits = (unit_q @ unit_k.mT).masked_fill(hidden, 0) * cosine.scale().view(-1, 1, 1)
    torch.testing.assert_close(cosine.largest_logit(q, k), logits.abs().amax())
    fixed = attention_of("cosine", learned_scale=False)(num_heads=4, head_dim=16)
    assert 0 < fixed.largest_logit(q, k) <= 12.0001


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_measuring_logits_leaves_the_model_as_it_was(kind):
    gpt = randomise_head(build(kind, dropout=0.5)).train()
    state = torch.get_rng_state()
    layers = largest_logits(gpt, torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0)))
    assert len(layers) == 2 and min(layers) > 0
    assert gpt.training and torch.equal(state, torch.get_rng_state())
    assert not any(block.attention.inner._forward_pre_hooks for block in gpt.blocks)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_stream_between_blocks_stays_in_the_weights_dtype_under_autocast(block):
    gpt = randomise_head(build("cosine", block))
    seen = []
    for module in gpt.blocks:
        module.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].dtype))
    gpt.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    tokens = torch.randint(0, 256, (2, 33))
    exact = gpt(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt(tokens[:, :-1], tokens[:, 1:])
    assert seen == [torch.float32] * 6
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    loss.backward()
    assert {parameter.grad.dtype for parameter in gpt.parameters()} == {torch.float32}


@pytest.mark.parametrize("num_kv_heads", [None, 1])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_nothing_around_the_attention_is_transposed_in_memory(positions, num_kv_heads):
    """q, k, v, o and the gradients stay (batch, n, heads, head_dim), as the projections have them."""
    seen = {}

    class Inner(torch.nn.Module):
        def forward(self, q, k, v):
            seen.update(q=q, k=k, v=v)
            return torch.empty_like(q).copy_(q + v.mean(1, keepdim=True) * k.mean(1, keepdim=True))

    gpt = build("regular", PreNormBlock, num_layers=1, positions=positions, num_kv_heads=num_kv_heads)
    attention = gpt.blocks[0].attention
    attention.inner = Inner()
    attention.out.register_forward_pre_hook(lambda _, arguments: seen.update(o=arguments[0]))
    attention(torch.randn(2, 5, attention.out.in_features))
    for name in "qkv":
        batch, head, position, channel = seen[name].stride()
        assert (head, channel) == (attention.head_dim, 1) and batch == 5 * position
    assert seen["o"]._is_view() and seen["o"].is_contiguous()


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 1e-5, 3e-6),  # 1 + tanh(u), PyTorch's own, cancels where x is far below 0
        (torch.bfloat16, 2**-8, 3e-6),  # rounded once, from float32
    ],
)
def test_gelu_is_the_tanh_form_compiled_or_not(backend, dtype, rtol, atol):
    torch.compiler.reset()
    gelu = GELU() if backend is None else torch.compile(GELU(), fullgraph=True, backend=backend)
    far = torch.tensor([30.0, 1e3, 1e4])
    x = torch.cat((torch.linspace(-12, 12, 4001), far, -far)).to(dtype).requires_grad_()
    y = gelu(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    exact = x.detach().double().requires_grad_()
    inner = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)
    expected = 0.5 * exact * (1 + torch.tanh(inner))
    (expected_dx,) = torch.autograd.grad(expected.sum(), exact)
    assert y.dtype == dx.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=rtol, atol=atol)
    torch.testing.assert_close(F.gelu(exact), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_squared_relu_and_its_gradient(dtype):
    x = torch.tensor([-3.0, -0.0, 0.0, 0.5, 2.0], dtype=dtype, requires_grad=True)
    y = SquaredReLU()(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.dtype == dtype and y.tolist() == [0, 0, 0, 0.25, 4] and dx.tolist() == [0, 0, 0, 1, 4]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_mlp_has_the_activation_and_the_weights_are_the_same(block):
    gelu, relu2 = build(block=block), build(block=block, activation="relu2")
    assert [type(layer.mlp.activation) for layer in gelu.blocks] == [GELU] * 2
    assert [type(layer.mlp.activation) for layer in relu2.blocks] == [SquaredReLU] * 2
    weights = gelu.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in relu2.state_dict().items())
    x = torch.randn(3, 64)
    mlp = relu2.blocks[0].mlp
    torch.testing.assert_close(mlp(x), (x @ mlp.up.weight.T).clamp(min=0) ** 2 @ mlp.down.weight.T)


def test_deepnorm_scales_the_residual_and_starts_as_the_paper_says():
    torch.manual_seed(0)
    gpt = build("regular", PostNormBlock, num_layers=8, width=256, num_heads=4)
    block = gpt.blocks[0]
    beta = (8 * 8) ** -0.25
    assert block.alpha == pytest.approx((2 * 8) ** 0.25)
    q, k, v = block.attention.qkv.weight.split(256)
    xavier = math.sqrt(2 / (256 + 256))
    for weight, gain in ((q, 1), (k, 1), (v, beta), (block.attention.out.weight, beta)):
        assert weight.std().item() == pytest.approx(gain * xavier, rel=0.05)
    assert block.mlp.up.weight.std().item() == pytest.approx(beta * math.sqrt(2 / (256 + 1024)), rel=0.05)
    x = torch.randn(2, 5, 256)
    inside = F.layer_norm(block.alpha * x + block.attention(x), (256,))
    expected = F.layer_norm(block.alpha * inside + block.mlp(inside), (256,))
    x, branch = block(x)
    assert branch is None
    torch.testing.assert_close(x, expected)


def test_flops_of_a_token_count_every_matrix_product():
    gpt = build("cosine", seq_len=64)
    tokens = torch.randint(0, 256, (2, 65))
    with FlopCounterMode(display=False) as counter:
        gpt(tokens[:, :-1], tokens[:, 1:]).backward()
    # attention's own products hide in an operator that PyTorch does not count on a CPU
    attention = 6 * 2 * 64 * 64
    assert gpt.flops_per_token(64) - attention == counter.get_total_flops() / (2 * 64)
    windowed = build("cosine", seq_len=64, window=16)  # in the first of two layers
    hidden_pairs = 64 * 32 - 16 * (64 - 8)  # of the triangle of 64
    assert gpt.flops_per_token(64) - windowed.flops_per_token(64) == 12 * 64 * hidden_pairs / 64
    assert gpt.flops_per_token(16) == windowed.flops_per_token(16)


@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_a_model_built_on_the_meta_device_and_loaded_is_the_same_model(way):
    gpt = randomise_head(build())
    tokens = torch.randint(0, 256, (1, 20))
    with torch.device("meta"):
        other = build()
        assert other(tokens.to("meta")).is_meta
    if way == "to_empty":
        other.to_empty(device="cpu")
        other.blocks[0].attention.rotary.cos.fill_(7.0)  # whatever the memory held
        other.to_empty(device="cpu")
    other.load_state_dict(gpt.state_dict(), assign=way == "assign")
    assert torch.equal(other(tokens), gpt(tokens))
    assert torch.equal(other.double()(tokens), gpt.double()(tokens))


def test_tied_head_shares_the_embedding():
    tied, untied = build(tied_head=True), build()
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == 256 * 64


def test_sizes_of_the_predecessor():
    small = build(num_layers=8, width=512, num_heads=8, seq_len=1024)
    assert small.head_dim == 64
    assert small.num_parameters() == pytest.approx(25.4e6, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "model.num_heads must divide model.width = 64, got 5"),
        ({"num_kv_heads": 3}, "model.num_kv_heads must divide model.num_heads = 4, got 3"),
        ({"num_layers": 0}, "model.num_layers must be at least 1, got 0"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"positions": "t5"}, "model.positions must be rotary, learned, alibi or dynamic, got 't5'"),
        ({"dropout": 1.0}, r"model.dropout must be in \[0, 1\), got 1.0"),
        ({"activation": "relu"}, "model.activation must be gelu or relu2, got 'relu'"),
        ({"width": 48, "num_heads": 4}, "multiple of 8 up to 256, got 12"),
        ({"width": 1056, "num_heads": 4}, "multiple of 8 up to 256, got 264"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 61.0}, r"attention.scale \* attention.groups .* got 61 \* 1"),
        ({"scale": 0.0}, "must be in"),
        ({"groups": 3}, "attention.groups must divide the head_dim 16, got 3"),
        ({"backend": "triton"}, "attention.backend must be auto, cuda, sdpa or reference, got 'triton'"),
    ],
)
def test_bad_attention_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention_of("cosine", **options)(num_heads=4, head_dim=16)


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "attention.window must be null or at least 1, got 0"),
        ({"window": 8, "window_pattern": "SSG"}, "_pattern must be null or letters S and L, e.g. SSSL, got 'SSG'"),
        ({"window": 8, "window_pattern": "ssl"}, "_pattern must be null or letters S and L, e.g. SSSL, got 'ssl'"),
        ({"window": 8, "window_pattern": ""}, "_pattern must be null or letters S and L, e.g. SSSL, got ''"),
        ({"window_pattern": "SL"}, "_pattern needs attention.window, .* at least 1, got 'SL' with .*window=null"),
    ],
)
def test_bad_windows_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        attention_of(kind, **options)(num_heads=4, head_dim=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": torch.zeros(4, dtype=torch.int64)}, r"prompt must be \(batch, n\)"),
        ({"num_bytes": -1}, "num_bytes must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_sampling_is_refused(arguments, message):
    defaults = {"prompt": torch.zeros(1, 1, dtype=torch.int64), "num_bytes": 1}
    with pytest.raises(ValueError, match=message):
        build().generate(**{**defaults, **arguments})


def test_a_full_cache_refuses_more():
    cache = KVCache((1, 1, 4, 8), device=torch.device("cpu"), dtype=torch.float32)
    cache.append(*torch.zeros(2, 1, 1, 4, 8))
    with pytest.raises(ValueError, match="holds 4 positions, got 5"):
        cache.append(*torch.zeros(2, 1, 1, 1, 8))
