"""The GPT: shapes, starts, causality, the cache, and that cosine and regular attention are what they claim."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import models.attention
from flash_cosine_sim_attention import l2norm_tensors, plain_cosine_sim_attention
from models.attention import CosineAttention, KVCache, RegularAttention
from models.blocks import GELU, PostNormBlock, PreNormBlock
from models.gpt import GPT, nucleus
from models.training.callbacks import largest_logits

BLOCKS = [PreNormBlock, PostNormBlock]
ATTENTIONS = ["cosine", "regular"]


def attention_of(kind, **options):
    if kind == "regular":
        return RegularAttention
    settings_ = {"scale": 12.0, "learned_scale": True, "groups": 1, "backend": "auto", **options}
    return lambda num_heads, head_dim: CosineAttention(num_heads, head_dim, **settings_)


def build(kind="cosine", block=PreNormBlock, **changes):
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
    return GPT(attention=attention_of(kind), block=block, **{**sizes, **changes})


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


@pytest.mark.parametrize("changes", [{}, {"positions": "learned"}, {"num_kv_heads": 1}, {"tied_head": True}])
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


def test_cached_logits_equal_the_whole_context_at_every_position():
    gpt = randomise_head(build(num_kv_heads=2)).double()
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
    assert inner.scale().tolist() == [40.0] * 3  # held in the range of the kernels
    fixed = attention_of("cosine", learned_scale=False)(num_heads=3, head_dim=16)
    assert not list(fixed.parameters())


def test_regular_attention_scales_by_the_root_of_head_dim():
    q, k, v = torch.randn(3, 1, 2, 9, 16).unbind(0)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = (q @ k.mT / 4).masked_fill(hidden, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(RegularAttention(2, 16)(q, k, v), expected)
    with pytest.raises(ValueError, match="seq_len_q must be 1 or seq_len_k = 9"):
        RegularAttention(2, 16)(q[:, :, :3], k, v)


@pytest.mark.parametrize("at_once", [1, 500, 2**22])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_the_largest_logit_is_that_of_all_visible_pairs(monkeypatch, num_kv_heads, at_once):
    monkeypatch.setattr(models.attention, "PRODUCTS_AT_ONCE", at_once)
    q, k = torch.randn(1, 4, 33, 16), torch.randn(1, num_kv_heads, 33, 16)
    k[:, :, 20] = 9 * q[:, :1, 3]  # most alike, but that query does not see this key
    hidden = torch.ones(33, 33, dtype=torch.bool).triu(1)
    every = k.repeat_interleave(4 // num_kv_heads, dim=1)
    regular = (q @ every.mT / 4).masked_fill(hidden, 0).abs().amax()
    torch.testing.assert_close(RegularAttention(4, 16).largest_logit(q, k), regular)
    cosine = attention_of("cosine", groups=2)(num_heads=4, head_dim=16)
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
        ({"positions": "alibi"}, "model.positions must be rotary or learned, got 'alibi'"),
        ({"dropout": 1.0}, r"model.dropout must be in \[0, 1\), got 1.0"),
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
        ({"scale": 50.0}, r"attention.scale \* attention.groups .* got 50 \* 1"),
        ({"scale": 0.0}, "must be in"),
        ({"groups": 3}, "attention.groups must divide the head_dim 16, got 3"),
        ({"backend": "triton"}, "attention.backend must be auto, cuda, sdpa or reference, got 'triton'"),
    ],
)
def test_bad_attention_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention_of("cosine", **options)(num_heads=4, head_dim=16)


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
