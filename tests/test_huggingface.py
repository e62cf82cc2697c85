"""The adapter for Hugging Face transformers: equal to the models' own eager attention, or an error that says why not.

Models are small and random, made from configurations; nothing is downloaded.
"""

import importlib
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from flash_cosine_sim_attention import plain_cosine_sim_attention

ROOT = Path(__file__).parent.parent

transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "transformers>=5.4"')
masking_utils = importlib.import_module("transformers.masking_utils")
AttentionInterface = importlib.import_module("transformers.modeling_utils").AttentionInterface
huggingface = importlib.import_module("flash_cosine_sim_attention.huggingface")
cosine_sim_attention, cosine_sim_mask = huggingface.cosine_sim_attention, huggingface.cosine_sim_mask

SHARED = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # of 0.02 and so few channels, the norms' eps would be all that is seen
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def nanochat(**changes):
    torch.manual_seed(0)
    return transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**SHARED | {"intermediate_size": 64} | changes))


def llama4(**changes):
    """Its rotary layers alone, unless changes say otherwise."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 2}
    rotary = {"no_rope_layers": [1] * changes.get("num_hidden_layers", 2), "attention_chunk_size": 256}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SHARED | sizes | rotary | changes))


def llama(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHARED | {"intermediate_size": 64} | changes))


def qwen3(**changes):
    """Its norms have weights, a gain for each channel."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHARED | {"intermediate_size": 64} | changes))
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data.uniform_(0.1, 3)
    return model


def modernbert(**changes):
    """It sees both ways, by windows in all layers but one, of one key less than it passes to its attention."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 64, "num_hidden_layers": 3, "local_attention": 8}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SHARED | sizes | changes))


MODELS = [nanochat, llama4]
# What the newest transformers calls a cache, and older ones do.
CACHE = (
    "cache" if "cache" in inspect.signature(transformers.NanoChatForCausalLM.forward).parameters else "past_key_values"
)
models = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


@pytest.fixture(autouse=True)
def registered():
    huggingface.register()
    huggingface.register("cosine_sim_new", allow_new_model=True)
    huggingface.register("cosine_sim_mixed", others="sdpa")


def tokens(batch=2, seq_len=24):
    return torch.randint(3, 64, (batch, seq_len), generator=torch.Generator().manual_seed(1))


def run(model, attention, ids, **arguments):
    """Logits, and the gradient of all parameters in one vector."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    labels = ids.clone()
    if (mask := arguments.get("attention_mask")) is not None and mask.ndim == 2:
        labels[mask == 0] = -100
        labels[:, 1:][mask[:, :-1] == 0] = -100  # what a padded query would have to tell
    out = model(input_ids=ids, labels=labels, **arguments)
    out.loss.backward()
    return out.logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equal(model, ids, rows=slice(None), dtype=torch.float64, name="cosine_sim", **arguments):
    """Eager attention and ours: logits of those rows and all gradients."""
    model = model.to(dtype)
    eager, ours = (run(model, attention, ids, **arguments) for attention in ("eager", name))
    # The norms are in float32, whatever the model is in.
    torch.testing.assert_close(ours[0][rows], eager[0][rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], eager[1], rtol=1e-4, atol=1e-6)
    return eager


@models
def test_training_equals_eager_attention(make):
    logits, gradient = assert_equal(make(), tokens())
    assert logits.abs().max() > 1 and gradient.abs().max() > 0.01


@models
def test_a_causal_model_stays_one(make):
    """What a mask function is for: without one transformers makes no mask, and the future would be seen."""
    model = make()
    model.set_attn_implementation("cosine_sim")
    ids = tokens()
    changed = ids.clone()
    changed[:, 12:] = 5
    first, second = model(input_ids=ids).logits, model(input_ids=changed).logits
    assert torch.equal(first[:, :12], second[:, :12]) and not torch.allclose(first[:, 12:], second[:, 12:])


@models
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_eager_attention_where_there_is_a_token(make, side):
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, slice(0, 7) if side == "left" else slice(17, 24)] = 0
    # In float64 a row that sees nothing is NaN in eager attention: its softmax is in float32.
    assert_equal(make(), tokens(), rows=mask.bool(), dtype=torch.float32, attention_mask=mask)


@models
def test_generation_with_a_cache_equals_eager_attention_and_no_cache(make):
    model, ids = make().eval(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    generated = {}
    for attention in ("eager", "cosine_sim"):
        for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
            model.set_attn_implementation(attention)
            try:
                out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **cache)
            except TypeError as error:
                if attention == "eager":
                    pytest.skip(f"transformers {transformers.__version__} itself cannot: {error}")
                raise
            generated[attention, str(cache)] = out
    first, *others = generated.values()
    assert first.shape == (2, 21) and len(first[0].unique()) > 4
    for name, other in zip([*generated][1:], others, strict=True):
        assert torch.equal(other, first), name


@models
@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_a_prompt_in_pieces_equals_the_whole(make, cache_implementation):
    """Several queries behind a cache: causal is aligned with the last key."""
    model, ids = make().double().eval(), tokens(2, 20)
    model.set_attn_implementation("cosine_sim")
    whole = model(input_ids=ids).logits
    if cache_implementation == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    else:
        cache = transformers.DynamicCache(config=model.config)
    pieces = [
        model(input_ids=piece, use_cache=True, **{CACHE: cache}).logits for piece in ids.split([8, 1, 5, 6], dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


def packed_positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


@models
def test_packed_by_positions_equals_eager_attention(make):
    model, ids = make(), tokens(1, 24)
    packed = assert_equal(model, ids, position_ids=packed_positions(7, 1, 16), use_cache=False)
    whole = run(model, "cosine_sim", ids, use_cache=False)
    difference = (packed[0] - whole[0]).abs().amax((0, 2))  # (24,)
    assert difference[:7].max() < 1e-5 and difference[7:].min() > 1e-3
    both = torch.cat((packed_positions(7, 17), packed_positions(24)))
    assert_equal(model, tokens(2, 24), position_ids=both, use_cache=False)


@pytest.mark.parametrize(
    "arguments", [{}, {"use_cache": False, "attention_mask": torch.ones(1, 24)}], ids=["cache", "mask"]
)
def test_positions_that_skip_are_one_sequence_where_transformers_has_one(arguments):
    """Of a context that tokens were dropped from, say."""
    positions = torch.cat((torch.arange(10), torch.arange(14) + 17))[None]
    assert_equal(nanochat(), tokens(1, 24), position_ids=positions, **arguments)


def test_packing_that_transformers_overlooks_raises():
    """With a cache, which is its default, eager attention sees one sequence where positions begin anew."""
    model = nanochat()
    model.set_attn_implementation("cosine_sim")
    padding = torch.arange(24)[None] < 20
    for arguments in (
        {},
        {"use_cache": False, "attention_mask": torch.ones(1, 24)},
        {"use_cache": False, "attention_mask": padding.long()},
        {"attention_mask": padding.flip(1).long()},
    ):
        with pytest.raises(ValueError, match="layer 0 .* position_ids that begin anew"):
            model(input_ids=tokens(1, 24), position_ids=packed_positions(7, 17), **arguments)
    for mask in (padding, padding.flip(1)):  # padded tokens may have any position
        positions = (mask.cumsum(1) - 1).masked_fill(~mask, 1)
        model(input_ids=tokens(1, 24), position_ids=positions, attention_mask=mask.long())


@models
def test_packed_by_cu_seq_lens_equals_each_sequence_alone(make):
    model, ids, lengths = make().double(), tokens(1, 24), (7, 1, 16)
    model.set_attn_implementation("eager")
    alone = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, dim=1)], 1)
    model.set_attn_implementation("cosine_sim")
    bounds = torch.tensor([0, 7, 8, 24], dtype=torch.int32)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 16, "max_length_k": 16}
    for positions in (packed_positions(*lengths), None):  # rotation is relative: where positions begin has no say
        out = model(input_ids=ids, position_ids=positions, **packing).logits
        torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)


def test_contradictory_or_incomplete_packing_raises():
    model, ids = nanochat(), tokens(1, 24)
    model.set_attn_implementation("cosine_sim")
    bounds = torch.tensor([0, 7, 24])
    for arguments, message in (
        ({"cu_seq_lens_q": bounds}, "both cu_seq_lens_q and cu_seq_lens_k"),
        (
            {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds - 1},
            "cu_seq_lens_k must end with .* layer 0 .* 24, got 23",
        ),
        (
            {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "position_ids": packed_positions(8, 16)},
            "by position_ids",
        ),
        (
            {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "attention_mask": (ids > 9).long()},
            "cu_seq_lens_q and an attention_mask",
        ),
        (
            {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "attention_mask": torch.ones(1, 1, 24, 24).tril() > 0},
            "cu_seq_lens_q and an attention_mask",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, use_cache=False, **arguments)


def test_a_bidirectional_model_equals_eager_attention():
    model = nanochat()
    model.config.is_causal = False
    logits = assert_equal(model, tokens())[0]
    assert not torch.allclose(logits, run(nanochat().double(), "eager", tokens())[0], atol=1e-2)


def test_gradient_checkpointing_equals_eager_attention():
    model = nanochat().train()
    model.gradient_checkpointing_enable()
    assert_equal(model, tokens())


PADDED = {"attention_mask": (torch.arange(48) > 4).view(2, 24).long()}
PACKED = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 7, 48], dtype=torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, changes, attention, arguments",
    [
        (nanochat, {"num_hidden_layers": 1}, "cosine_sim", PACKED),
        (llama4, {"no_rope_layers": [1, 0]}, "cosine_sim_mixed", PADDED),
    ],
)
def test_compiled_in_one_graph_it_computes_the_same(make, changes, attention, arguments):
    model, ids = make(**changes), tokens()
    expected = run(model, attention, ids, **arguments)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, attention, ids, **arguments), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "use_cache, message", [(False, "pass packed sequences as cu_seq_lens_q"), (True, "begin anew, but a mask of one")]
)
def test_compiled_packing_by_positions_is_not_overlooked(use_cache, message):
    """torch.compile cannot look for packed sequences in position_ids: the graph says so when it runs."""
    model, ids = nanochat(num_hidden_layers=1), tokens(1, 24)
    expected = run(model, "cosine_sim", ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = run(compiled, "cosine_sim", ids, position_ids=packed_positions(24), use_cache=use_cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=message):
        run(compiled, "cosine_sim", ids, position_ids=packed_positions(10, 14), use_cache=use_cache)


@pytest.mark.slow
def test_compiled_decoding_with_a_static_cache_is_one_graph():
    """The mask of each token is made ahead, as generate does it, and handed into one compiled forward pass."""
    from torch._dynamo.testing import CompileCounter

    model, ids = nanochat().eval(), tokens(2, 12)
    model.set_attn_implementation("cosine_sim")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model(input_ids=ids[:, :6], **{CACHE: cache})
        for place in range(6, 12):
            prepared = model.prepare_inputs_for_generation(
                ids[:, : place + 1], next_sequence_length=1, attention_mask=torch.ones(2, place + 1), **{CACHE: cache}
            )
            assert isinstance(prepared["attention_mask"], huggingface.Visible)
            logits = compiled(**{name: value for name, value in prepared.items() if value is not None}).logits
            torch.testing.assert_close(logits[:, 0], expected[:, place], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


# What a mask hides. -------------------------------------------------------------------------------------------------


def dense(visible, batch):
    """bool (batch, seq_len_q, seq_len_k), as the call of attention understands it."""
    offset = visible.num_keys - visible.seq_len_q
    distance = torch.arange(visible.seq_len_q)[:, None] + offset - torch.arange(visible.seq_len_k)
    left, right = visible.window
    shown = (distance <= left if left >= 0 else distance < 1 << 30) & (-distance <= right if right >= 0 else True)
    shown = shown & (torch.arange(visible.seq_len_k) < visible.num_keys)
    if visible.causal:
        shown = shown & (distance >= 0)
    shown = shown.expand(batch, -1, -1).clone()
    if visible.keys is not None:
        shown[..., : visible.num_keys] &= visible.keys[:, None]
    if visible.cu_seqlens is not None:
        rows = torch.arange(batch * visible.seq_len_q).view(batch, -1)
        sequence = torch.bucketize(rows, visible.cu_seqlens, right=True)
        shown &= sequence[:, :, None] == sequence[:, None, :]
    return shown


CAUSAL = masking_utils.causal_mask_function
WINDOW = masking_utils.sliding_window_causal_mask_function(3)
CHUNKS = masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 0]))
SEQUENCES = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]] * 2))
PACKING = masking_utils.and_masks(CAUSAL, SEQUENCES)
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # since 5.20 or so positions begin anew there
    POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]] * 2)
    PACKING = masking_utils.and_masks(masking_utils.remap_positions_for_packed_sequence(CAUSAL, POSITIONS), SEQUENCES)
PADDING = torch.tensor([[False] * 3 + [True] * 17, [True] * 20])


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "function, local_size, lengths, offsets",
    [
        (CAUSAL, None, (8, 8), (0, 0)),
        (CAUSAL, None, (3, 8), (5, 0)),  # behind a cache
        (CAUSAL, None, (3, 16), (5, 0)),  # in a static cache
        (CAUSAL, None, (3, 16), (torch.tensor(5), 0)),
        (CAUSAL, None, (1, 8), (7, 0)),
        (CAUSAL, None, (1, 16), (torch.tensor(7), 0)),
        (WINDOW, 3, (8, 8), (0, 0)),
        (WINDOW, 3, (4, 6), (7, 5)),  # behind a cache of a window
        (WINDOW, 3, (1, 3), (12, 10)),
        (WINDOW, 3, (1, 16), (7, 0)),
        (CHUNKS, 4, (4, 4), (0, 0)),
        (CHUNKS, 4, (1, 4), (9, 6)),
        (CHUNKS, 4, (3, 8), (5, 0)),  # in the second chunk, behind a cache that has the first
        (CHUNKS, 4, (3, 16), (5, 0)),
        (CHUNKS, 4, (2, 5), (5, 2)),
        (masking_utils.bidirectional_mask_function, None, (8, 8), (0, 0)),
        (masking_utils.bidirectional_mask_function, None, (3, 8), (0, 0)),
        (masking_utils.bidirectional_mask_function, None, (8, 5), (0, 0)),  # a decoder's, of a shorter encoder
        (masking_utils.sliding_window_bidirectional_mask_function(2), 2, (8, 8), (0, 0)),
    ],
)
def test_a_description_shows_what_the_mask_function_shows(function, local_size, lengths, offsets, padding):
    arguments = {
        "batch_size": 2, "q_length": lengths[0], "kv_length": lengths[1], "q_offset": offsets[0],
        "kv_offset": offsets[1], "mask_function": function, "attention_mask": padding, "local_size": local_size,
        "allow_is_causal_skip": False,
    }  # fmt: skip
    visible = cosine_sim_mask(**arguments)
    expected = masking_utils.sdpa_mask(**arguments)[:, 0]
    assert torch.equal(dense(visible, 2), expected) and expected.any()
    theirs = huggingface.dense(visible, 2, None, "cpu")  # for layers that transformers computes
    if theirs is None:
        assert visible.num_keys == lengths[1] and visible.keys is None
    else:
        assert torch.equal(theirs.expand(2, 1, -1, -1)[:, 0], expected[..., : visible.num_keys])
    assert visible.keys is None or not visible.keys.all()


@pytest.mark.parametrize("function, local_size", [(PACKING, None), (CHUNKS, 4)], ids=["packed", "chunks"])
def test_packed_sequences_and_chunks_are_described_without_padding(function, local_size):
    arguments = {"batch_size": 2, "q_length": 8, "kv_length": 8, "mask_function": function, "local_size": local_size}
    visible = cosine_sim_mask(**arguments)
    assert visible.cu_seqlens.dtype == torch.int32
    assert torch.equal(dense(visible, 2), masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0])
    with pytest.raises(ValueError, match="neither with padding"):
        cosine_sim_mask(**arguments, attention_mask=PADDING[:, :8])


def test_a_mask_function_that_is_not_understood_raises_and_is_named():
    def prefix(*indices):
        return indices[3] < 4

    functions = {
        "or_masks.<locals>.or_mask": masking_utils.or_masks(CAUSAL, prefix),
        "prefix": masking_utils.and_masks(CAUSAL, prefix),
    }
    if hasattr(masking_utils, "blockwise_overlay"):
        blocks = masking_utils.blockwise_overlay(torch.tensor([[0, 0, -1, -1, -1, -1, -1, -1]]))
        functions["blockwise_overlay"] = masking_utils.and_masks(blocks, CAUSAL)
    for name, function in functions.items():
        with pytest.raises(ValueError, match=f"got one made by .*{name}"):
            cosine_sim_mask(1, 8, 8, mask_function=function)
        cosine_sim_mask(1, 1, 8, q_offset=7, mask_function=function)  # for one query each is a mask by key
    both = masking_utils.and_masks(WINDOW, masking_utils.sliding_window_causal_mask_function(5))
    with pytest.raises(ValueError, match="one window, got sizes 3 and 5"):
        cosine_sim_mask(1, 8, 8, mask_function=both)
    with pytest.raises(TypeError, match="unknown"):
        cosine_sim_mask(1, 8, 8, unknown=1)
    window = masking_utils.sliding_window_bidirectional_mask_function(2)
    for function in (CAUSAL, window):
        with pytest.raises(ValueError, match="queries 0 to 7 cannot have keys 0 to 5"):
            cosine_sim_mask(1, 8, 6, mask_function=function)


def test_muse_glimmer_with_its_gain_and_windows_equals_eager_attention():
    """Norms without weights, queries times 3.87 behind them, windows in all layers but the last."""
    if not hasattr(transformers, "MuseGlimmerTextModel"):
        pytest.skip("needs a transformers that has Muse Glimmer")
    torch.manual_seed(0)
    settings = SHARED | {"intermediate_size": 64, "sliding_window": 5, "num_hidden_layers": 3, "rms_norm_eps": 1e-12}
    model = transformers.MuseGlimmerTextModel(transformers.MuseGlimmerTextConfig(**settings)).double()
    assert model.config.layer_types == ["sliding_attention"] * 2 + ["full_attention"]
    results = []
    for attention in ("eager", "cosine_sim", "folded"):
        model.set_attn_implementation("eager" if attention == "eager" else "cosine_sim")
        assert attention != "folded" or huggingface.fold_norms(model) == 3
        model.zero_grad()
        out = model(input_ids=tokens()).last_hidden_state
        out.square().mean().backward()
        results.append((out.detach(), model.layers[0].self_attn.q_proj.weight.grad))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-4, atol=1e-5)
    model.config.sliding_window = 24
    with pytest.raises(ValueError, match=r"passes sliding_window=5, but its mask has window_size=\(23, 0\)"):
        model(input_ids=tokens())


def test_llama4_in_chunks_equals_eager_attention():
    model, ids = llama4(attention_chunk_size=8), tokens(2, 21)
    assert model.config.layer_types == ["chunked_attention"] * 2
    chunks = assert_equal(model, ids)[0]
    whole = run(llama4().double(), "cosine_sim", ids)[0]
    assert torch.allclose(chunks[:, :8], whole[:, :8], atol=1e-5) and not torch.allclose(chunks[:, 8:], whole[:, 8:])
    generated = []
    for attention in ("eager", "cosine_sim"):
        model.set_attn_implementation(attention)
        generated.append(model.generate(ids[:, :5], max_new_tokens=14, do_sample=False))
    assert torch.equal(*generated)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    assert_equal(model, ids[:, :8], rows=padding[:, :8].bool(), dtype=torch.float32, attention_mask=padding[:, :8])
    pieces = []
    model = model.double()
    for attention in ("eager", "cosine_sim"):
        model.set_attn_implementation(attention)
        cache = transformers.DynamicCache(config=model.config)
        outputs = [model(input_ids=piece, **{CACHE: cache}).logits for piece in ids.split([8, 5, 3, 5], 1)]
        pieces.append(torch.cat(outputs, 1))
    torch.testing.assert_close(*pieces, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="chunks of 8 keys, go neither with padding"):
        model(input_ids=ids, attention_mask=padding)


def llama4_mixed(**changes):
    """A rotary layer, then one without a norm, whose queries get a temperature that changes every 4 tokens."""
    return llama4(no_rope_layers=[1, 0], floor_scale=4, **changes)


def test_other_layers_by_sdpa_equal_eager_attention():
    """As in the published models of 16 experts: one layer in four has neither rotation nor norm."""
    model, ids = llama4_mixed(), tokens()
    assert [hasattr(layer.self_attn, "qk_norm") for layer in model.model.layers] == [True, False]
    logits = assert_equal(model, ids, name="cosine_sim_mixed")[0]
    still = llama4_mixed(attn_temperature_tuning=False).double()
    assert not torch.allclose(run(still, "eager", ids)[0][:, 4:], logits[:, 4:], atol=1e-2)
    padding = torch.ones(2, 24, dtype=torch.int64)
    padding[1, :5] = 0
    kept = {"rows": padding.bool(), "dtype": torch.float32, "attention_mask": padding}
    assert_equal(llama4_mixed(), ids, name="cosine_sim_mixed", **kept)
    packed = {"position_ids": packed_positions(7, 17), "use_cache": False}
    assert_equal(llama4_mixed(), ids[:1], name="cosine_sim_mixed", **packed)
    bounds = torch.tensor([0, 7, 24])
    by_bounds = run(model, "cosine_sim_mixed", ids[:1], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, **packed)
    torch.testing.assert_close(by_bounds, run(model, "eager", ids[:1], **packed), rtol=1e-4, atol=1e-5)
    model.eval()
    generated = []
    for attention in ("eager", "cosine_sim_mixed"):
        model.set_attn_implementation(attention)
        generated.append(model.generate(ids[:, :7], max_new_tokens=10, do_sample=False))
    assert torch.equal(*generated)


# Masks of the caller's own. -----------------------------------------------------------------------------------------


def four_dimensional(shown, value, dtype):
    return torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, value)[:, None]


LOW = {torch.float32: [-1e9, -1e5, -math.inf], torch.float16: [-1e4, -65504, -math.inf], torch.bfloat16: [-1e9, -1e30]}


@pytest.mark.parametrize("dtype, value", [(dtype, value) for dtype, values in LOW.items() for value in values])
def test_a_finite_mask_means_what_it_means_in_eager_attention(dtype, value):
    model, ids = nanochat().to(dtype), tokens()
    padding = torch.ones(2, 24, dtype=torch.bool)
    padding[1, 19:] = False  # on the right: each row sees a key
    mask = four_dimensional(padding[:, None] & torch.ones(24, 24, dtype=torch.bool).tril(), value, dtype)
    eager, ours = (run(model, attention, ids, attention_mask=mask)[0] for attention in ("eager", "cosine_sim"))
    tolerance = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)
    short = run(model, "cosine_sim", ids[1:, :19])[0]
    torch.testing.assert_close(ours[1:, :19], short, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("summed", [False, True], ids=["once", "twice"])
def test_a_row_that_is_hidden_finitely_means_what_it_means_in_eager_attention(dtype, summed):
    """The keys that are hidden least share the row: what padded queries tell, and their gradients, with it."""
    model, ids = nanochat().to(dtype), tokens()
    low = torch.finfo(dtype).min
    low = low / 2 if summed else low
    past = torch.ones(24, 24, dtype=torch.bool).tril()
    padding = torch.ones(2, 24, dtype=torch.bool)
    padding[1, :5] = False
    mask = four_dimensional(padding[:, None] & past, low, dtype)
    if summed:  # the future and the padding, one by one
        mask = four_dimensional(past[None], low, dtype) + four_dimensional(padding[:, None], low, dtype)
    eager, ours = (run(model, attention, ids, attention_mask=mask) for attention in ("eager", "cosine_sim"))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)
    by_key = run(model, "cosine_sim", ids, attention_mask=padding.long())[0]
    assert (ours[0][1, 4] - by_key[1, 4]).abs().max() > 0.1  # which the latter computes of zeros


def test_masks_that_are_neither_causal_nor_by_key_raise():
    model, ids = nanochat(), tokens(1, 8)
    model.set_attn_implementation("cosine_sim")
    past = torch.ones(8, 8, dtype=torch.bool).tril()
    blocks = past & (torch.arange(8) // 4 == torch.arange(8)[:, None] // 4)
    bias = torch.zeros(1, 1, 8, 8)
    bias[..., 0] = -5
    heads = four_dimensional(past[None], -math.inf, torch.float32).repeat(1, 4, 1, 1)
    heads[:, 3] = 0
    for mask, message in (
        (blocks[None, None], "layer 0 .* something else"),
        (past.triu(-2)[None, None], "layer 0 .* something else"),
        (bias, "got -5.0 in layer 0 .* a bias is not honoured"),
        (heads, "the same for all heads"),
        (torch.full((1, 1, 8, 8), math.nan), "without NaN"),
        (torch.zeros(1, 1, 4, 8), r"must broadcast to .* = \(1, 4, 8, 8\), got \(1, 1, 4, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, attention_mask=mask)
    with pytest.raises(TypeError, match="bool or of a floating dtype"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.int64))
    causal = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=past[None, None]).logits, causal)


# The layer and its arguments. ---------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer of one's own that normalises, as nanochat's original does: each of q and k times 1.2."""

    layer_idx = 7
    is_causal = True
    cosine_sim_gain = 1.44


def rows(*shape):
    generator = torch.Generator().manual_seed(2)
    return [torch.nn.functional.rms_norm(torch.randn(shape, generator=generator), shape[-1:]) * 1.2 for _ in range(3)]


def test_a_layer_of_ones_own_says_its_gain():
    q, k, v = rows(2, 4, 6, 32)
    o, weights = cosine_sim_attention(Layer(), q, k, v, None)
    expected = plain_cosine_sim_attention(q, k, v, scale=1.44 * 32**0.5, causal=True)
    torch.testing.assert_close(o, expected.transpose(1, 2))
    assert weights is None and o.is_contiguous()
    window = cosine_sim_attention(Layer(), q, k, v, None, sliding_window=3)[0]
    expected = plain_cosine_sim_attention(q, k, v, scale=1.44 * 32**0.5, causal=True, window_size=(2, 0))
    torch.testing.assert_close(window, expected.transpose(1, 2))
    one = cosine_sim_attention(Layer(), q[:, :, -1:], k, v, None)[0]
    torch.testing.assert_close(one, o[:, -1:])
    every = cosine_sim_attention(Layer(), q, k, v, None, is_causal=False)[0]
    torch.testing.assert_close(every[:, -1:], o[:, -1:])
    assert not torch.allclose(every[:, 0], o[:, 0])


def test_arguments_that_are_not_understood_raise_and_are_named():
    q, k, v = rows(1, 4, 6, 32)
    visible = cosine_sim_mask(1, 6, 6)
    for arguments, message in (
        ({"dropout": 0.1}, "dropout must be 0, got 0.1 from layer 7"),
        ({"softcap": 30.0}, "layer 7 .* passes softcap"),
        ({"s_aux": v, "position_bias": v}, "passes position_bias, s_aux"),
        ({"output_attentions": True}, "output_attentions must be false"),
        ({"deterministic": True}, r"deterministic=True needs torch\.use_deterministic_algorithms"),
        ({"is_causal": False}, "passes is_causal=False, but its mask is for True"),
        ({"sliding_window": 3}, "passes sliding_window=3, but its mask"),
        ({"scaling": 2.0}, "at most 60, got 92"),
        ({"scaling": -1.0}, "must be above 0"),
        ({"attention_mask": cosine_sim_mask(1, 5, 5)}, "for 5 queries and 5 keys, layer 7 .* has 6 and 6"),
        ({"attention_mask": None, "key": k[:, :, :5], "value": v[:, :, :5]}, "1 query or as many as keys"),
        ({"attention_mask": None, "is_causal": False, "sliding_window": 3}, "without causality"),
    ):
        with pytest.raises(ValueError, match=message):
            cosine_sim_attention(Layer(), **{"query": q, "key": k, "value": v, "attention_mask": visible} | arguments)
    harmless = {"use_cache": True, "softcap": None, "output_attentions": False, "sliding_window": 6, "is_causal": True}
    harmless["deterministic"] = False
    cosine_sim_attention(Layer(), q, k, v, visible, **harmless)


def test_dropout_of_a_model_raises():
    model = nanochat(attention_dropout=0.1)
    model.set_attn_implementation("cosine_sim")
    with pytest.raises(ValueError, match="dropout must be 0, got 0.1 from layer 0"):
        model.train()(input_ids=tokens())
    model.eval()(input_ids=tokens())


def test_weights_of_attention_are_not_returned():
    model = nanochat()
    model.set_attn_implementation("cosine_sim")
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=tokens(), output_attentions=True)


@pytest.mark.parametrize(
    "make, changes, layer",
    [
        (llama4, {"no_rope_layers": [1, 0]}, "layer 1 .Llama4TextAttention"),
        (llama4, {"use_qk_norm": False}, "layer 0 .Llama4TextAttention"),
        (llama, {}, "layer 0 .LlamaAttention"),
        (qwen3, {}, "layer 0 .Qwen3Attention"),
    ],
)
def test_a_layer_without_such_a_norm_raises_and_is_named(make, changes, layer):
    model = make(**changes)
    model.set_attn_implementation("cosine_sim")
    with pytest.raises(ValueError, match=f"{layer}.* is not known to normalise"):
        model(input_ids=tokens())


def test_a_subclass_with_a_forward_of_its_own_is_another_layer():
    model = nanochat()
    model.set_attn_implementation("cosine_sim")
    attention = model.model.layers[0].self_attn
    sharded = type("Sharded", (type(attention),), {})
    other = type("Other", (type(attention),), {"forward": Layer.forward})
    assert huggingface._gain(attention) == 1
    attention.__class__ = sharded
    assert huggingface._gain(attention) == 1
    attention.__class__ = other
    assert huggingface._gain(attention) is None
    attention.__class__, attention.q_norm = sharded, nn.Identity()
    assert huggingface._gain(attention) is None


# New models. --------------------------------------------------------------------------------------------------------


def written_out(_module, query, key, value, attention_mask, scaling, **_others):
    """The norm that a new model gets, and then softmax, in plain PyTorch."""
    groups = query.shape[1] // key.shape[1]
    query, key = (nn.functional.rms_norm(rows, rows.shape[-1:], eps=0) for rows in (query, key))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.mT * scaling
    weights = (logits if attention_mask is None else logits + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


@pytest.mark.parametrize(
    "make, changes",
    [
        (llama, {}),
        (qwen3, {}),
        (qwen3, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        (llama4, {"use_qk_norm": False}),
        (llama4, {"no_rope_layers": [1, 0], "attn_temperature_tuning": False}),
        (modernbert, {}),
    ],
)
def test_a_new_model_equals_the_norm_written_out(make, changes):
    AttentionInterface.register("written_out", written_out)
    masking_utils.AttentionMaskInterface.register("written_out", masking_utils.eager_mask)
    model, ids = make(**changes).double(), tokens()
    if not model._can_set_attn_implementation():
        pytest.skip(f"{type(model).__name__} of this transformers has attention of its own alone")
    expected, found = (run(model, attention, ids) for attention in ("written_out", "cosine_sim_new"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (run(model, "eager", ids)[0] - found[0]).abs().max() > 0.1


def test_a_new_model_computes_layers_that_normalise_as_they_are():
    model = nanochat().double()
    for expected, found in zip(run(model, "cosine_sim", tokens()), run(model, "cosine_sim_new", tokens()), strict=True):
        assert torch.equal(expected, found)


def test_a_new_model_with_temperatures_raises():
    """Llama-4 multiplies the queries of layers without rotation by a factor for each position."""
    model = llama4(no_rope_layers=[1, 0])
    model.set_attn_implementation("cosine_sim_new")
    with pytest.raises(ValueError, match="layer 1 .Llama4TextAttention. multiplies its queries by a temperature"):
        model(input_ids=tokens())
    config = transformers.Ministral3Config(**SHARED | {"intermediate_size": 64})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="cosine_sim_new")
    with pytest.raises(ValueError, match="layer 0 .Ministral3Attention. .* set llama_4_scaling_beta=0"):
        model(input_ids=tokens())
    model.config.rope_parameters["llama_4_scaling_beta"] = 0
    model(input_ids=tokens())


# Norms. -------------------------------------------------------------------------------------------------------------


def relative_rms(found, exact):
    return ((found.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def test_normalised_rows_are_taken_as_they_are():
    """The eps of the model's norm shortens short rows; to normalise once more would undo that."""
    raw = 0.01 * torch.randn(3, 2, 4, 32, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q, k, v = raw * (raw.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = (q @ k.mT * 64**-0.5).softmax(-1) @ v
    found = cosine_sim_attention(Layer(), q, k, v, None, is_causal=False)[0].transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    again = plain_cosine_sim_attention(q, k, v, scale=64**0.5)
    assert relative_rms(again, expected) > 0.01


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_error_in_bfloat16_is_below_eager_attentions(head_dim):
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(3, 2, 4, 128, head_dim, generator=generator)
    q, k, v = (raw / raw.square().mean(-1, keepdim=True).sqrt()).bfloat16()
    exact = ((q.double() @ k.double().mT) * head_dim**-0.5).softmax(-1) @ v.double()
    ours = cosine_sim_attention(Layer(), q, k, v, None, is_causal=False)[0].transpose(1, 2)
    eager = (q @ k.mT * head_dim**-0.5).softmax(-1, dtype=torch.float32).bfloat16() @ v
    assert relative_rms(ours, exact) < 0.6 * relative_rms(eager, exact) < 0.01


@models
def test_folded_norms_equal_eager_attention(make):
    model, ids = make(rms_norm_eps=1e-12), tokens()
    expected = run(model, "eager", ids)
    model.set_attn_implementation("cosine_sim")
    weights = model.state_dict().keys()
    assert huggingface.fold_norms(model) == 2 and model.state_dict().keys() == weights
    torch.testing.assert_close(run(model, "cosine_sim", ids), expected, rtol=1e-3, atol=1e-4)
    generated = [m.generate(ids[:, :6], max_new_tokens=6, do_sample=False) for m in (model, make(rms_norm_eps=1e-12))]
    assert torch.equal(*generated)
    assert huggingface.fold_norms(model) == 0
    with pytest.raises(RuntimeError, match="attn_implementation is 'eager'"):
        run(model, "eager", ids)


def test_norms_are_folded_under_our_attention_alone():
    model = nanochat()
    with pytest.raises(RuntimeError, match="it must be a name that was registered"):
        huggingface.fold_norms(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
        huggingface.fold_norms(llama())


# Registering. -------------------------------------------------------------------------------------------------------


def test_registering_takes_no_name_that_means_something_else():
    for name in ("sdpa", "eager", "my_flash", "paged|sdpa", "owner/kernel", ""):
        with pytest.raises(ValueError, match="name must be"):
            huggingface.register(name)
    assert AttentionInterface._global_mapping["sdpa"] is not cosine_sim_attention
    with pytest.raises(ValueError, match="others must be None or 'sdpa', got 'eager'"):
        huggingface.register(others="eager")
    with pytest.raises(ValueError, match="give one of them"):
        huggingface.register(others="sdpa", allow_new_model=True)


def test_a_model_is_made_with_it():
    config = nanochat().config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="cosine_sim")
    assert model.config._attn_implementation == "cosine_sim"
    model(input_ids=tokens())


def test_the_code_of_the_page_runs():
    (code,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "huggingface.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["model"].config._attn_implementation == "cosine_sim"


@pytest.mark.slow
def test_the_package_does_not_import_transformers_and_says_how_to_get_it():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import flash_cosine_sim_attention\n"
        "try:\n    import flash_cosine_sim_attention.huggingface\n"
        "except ImportError as error:\n    print(error)"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        f"sys_path = {str(ROOT / 'kernels')!r}\nimport sys; sys.path.insert(0, sys_path)\n{code}",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "needs transformers" in result.stdout and "pip install" in result.stdout


# On a GPU. ----------------------------------------------------------------------------------------------------------


LONG = {
    "whole": {},
    "padded": {"attention_mask": (torch.arange(1024) > 99).view(4, 256).long()},
    "packed": {"position_ids": torch.arange(256).remainder(100)[None].expand(4, -1), "use_cache": False},
}


@pytest.mark.gpu
@models
@pytest.mark.parametrize("arguments", LONG.values(), ids=[*LONG])
@pytest.mark.parametrize("folded", [False, True], ids=["as_they_are", "folded"])
def test_on_a_gpu_the_error_in_bfloat16_is_about_eager_attentions(make, arguments, folded):
    """Of a whole model, against float64 on the CPU: most of it comes from other layers, and it varies by a tenth."""
    model, ids = make(head_dim=64).bfloat16(), tokens(4, 256)
    exact = run(make(head_dim=64).bfloat16().double(), "cosine_sim", ids, **arguments)
    seen = arguments.get("attention_mask", torch.ones_like(ids)).bool()
    arguments = {name: value.cuda() if torch.is_tensor(value) else value for name, value in arguments.items()}
    model, ids = model.cuda(), ids.cuda()
    errors = {}
    for attention in ("eager", "cosine_sim"):
        model.set_attn_implementation(attention)
        if folded and attention == "cosine_sim":
            huggingface.fold_norms(model)
        logits, gradient = (found.cpu() for found in run(model, attention, ids, **arguments))
        errors[attention] = relative_rms(logits[seen], exact[0][seen]), relative_rms(gradient, exact[1])
    for ours, eager in zip(errors["cosine_sim"], errors["eager"], strict=True):
        assert ours <= 1.2 * eager < 0.1, errors


@pytest.mark.gpu
def test_on_a_gpu_a_compiled_model_trains_and_generates():
    model, ids = nanochat(head_dim=64).cuda().bfloat16(), tokens().cuda()
    expected = run(model, "cosine_sim", ids)
    compiled = torch.compile(model, fullgraph=True)
    found = run(compiled, "cosine_sim", ids)
    assert relative_rms(found[0], expected[0].double()) < 0.02
    model.float().eval()
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")  # compiles decoding
    assert torch.equal(plain, static)
