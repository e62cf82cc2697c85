"""Positions as biases by distance: the slopes and the network, both attentions with them, whole models, and runs."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.training import fit, metrics, weights

import models.windows
from flash_cosine_sim_attention import sdpa
from models.attention import CosineAttention, RegularAttention
from models.blocks import PostNormBlock, PreNormBlock
from models.gpt import GPT
from models.positions import AlibiBias, DynamicBias
from models.training.callbacks import position_biases
from models.training.load import load_weights
from models.training.optimizer import roles_of
from models.training.report import read_results
from models.training.run_files import read_csv
from models.windows import by_dense_bias, by_flex, tiles_with_a_table, windowed_attention

ATTENTIONS = ["cosine", "regular"]
BIASES = ["alibi", "dynamic"]
FLOAT64 = torch.zeros(0, dtype=torch.float64)  # a q, of which the device and the dtype count


def moved(bias):
    """A learned bias that is no longer 0, large enough to be bent by its bound."""
    if isinstance(bias, DynamicBias):
        torch.nn.init.normal_(bias.out, std=4.0)
    return bias


def attention_of(kind, bias, *, num_heads=4, **options):
    if kind == "cosine":
        options = {"scale": 12.0, "learned_scale": True, "groups": 1, "backend": "auto"} | options
    builder = CosineAttention if kind == "cosine" else RegularAttention
    return builder(num_heads, 16, layer=0, num_layers=2, position_bias=bias, **options).double()


def bias_of(positions, num_heads=4, seq_len=64):
    return AlibiBias(num_heads) if positions == "alibi" else moved(DynamicBias(num_heads, seq_len))


def build(kind="cosine", block=PreNormBlock, *, window=None, **changes):
    options = {"scale": 12.0, "learned_scale": True, "groups": 1, "backend": "auto"} if kind == "cosine" else {}
    builder = partial(CosineAttention if kind == "cosine" else RegularAttention, window=window, **options)
    sizes = {"num_layers": 2, "width": 64, "num_heads": 4, "num_kv_heads": 2, "seq_len": 32, "positions": "dynamic"}
    torch.manual_seed(0)
    gpt = GPT(attention=builder, block=block, tied_head=False, dropout=0.0, **{**sizes, **changes})
    torch.nn.init.normal_(gpt.head.weight, std=0.3)
    for layer in gpt.blocks:
        moved(layer.attention.inner.position_bias)
    return gpt


# The biases


@pytest.mark.parametrize(
    ("num_heads", "powers"),
    [
        (1, [8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),  # section 3: for 8 heads 1/2, 1/4 ... 1/256
        (16, [0.5 * (head + 1) for head in range(16)]),  # and for 16 the same with their geometric means
        (6, [2, 4, 6, 8, 1, 3]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_alibi_has_the_published_slopes(num_heads, powers):
    table = AlibiBias(num_heads)(5, FLOAT64)
    expected = [[-(2.0**-power) * distance for distance in range(5)] for power in powers]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)
    assert AlibiBias(num_heads)(5, FLOAT64.bfloat16()).dtype == torch.float32
    assert not list(AlibiBias(num_heads).parameters())


def test_the_network_starts_at_0_stays_in_its_bound_and_learns_any_slope():
    bias = DynamicBias(3, 1000)
    assert torch.equal(bias(1000, FLOAT64.float()), torch.zeros(3, 1000))
    target = torch.stack((-torch.arange(200.0) / 20, 2 * torch.arange(200.0).log1p(), torch.zeros(200)))
    target[2, :4] = 3.0  # the nearest bytes alone
    optimizer = torch.optim.Adam(bias.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.mse_loss(bias(200, FLOAT64.float()), target)
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * target.var()
    torch.nn.init.constant_(bias.out, 1e6)
    assert bias(1000, FLOAT64.float()).abs().max() == bias.largest == 16


def test_autocast_leaves_the_network_in_float32():
    bias = moved(DynamicBias(3, 64))
    expected = bias(64, FLOAT64.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bias(64, FLOAT64.bfloat16()), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_scale_and_bias_together_stay_in_the_librarys_range(groups):
    inner = attention_of("cosine", moved(DynamicBias(4, 64)), scale=44.0 / groups, groups=groups)
    with torch.no_grad():
        inner.log_scale.fill_(10.0)
    assert inner.scale().max().item() * groups + inner.position_bias.largest == 60
    with pytest.raises(ValueError, match=r"in \(0, 44\] \(the bias of model.positions takes 16 of 60\), got 45"):
        attention_of("cosine", DynamicBias(4, 64), scale=45.0)
    assert attention_of("cosine", AlibiBias(4)).max_scale == 60  # which is never above 0


# Attention with them


def dense(inner, q, k, v):
    """softmax(logits + bias) v with every logit stored, by the formulas."""
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    if isinstance(inner, CosineAttention):
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * inner.scale().to(q.dtype).view(-1, 1, 1)
    else:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
    position = torch.arange(q.shape[-2])
    distance = position[:, None] - position
    logits = logits + inner.position_bias(len(position), q)[:, distance.clamp(min=0)]
    hidden = (distance < 0) | (distance >= (inner.window or len(position)))
    return logits.masked_fill(hidden, -math.inf).softmax(-1) @ v


def inputs(num_kv_heads, seq_len=33):
    torch.manual_seed(0)
    return [torch.randn(2, heads, seq_len, 16, dtype=torch.float64) for heads in (4, num_kv_heads, num_kv_heads)]


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize("positions", BIASES)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_bias_by_distance_is_a_dense_one(monkeypatch, kind, positions, window, num_kv_heads):
    monkeypatch.setattr(sdpa, "ROWS_PER_BLOCK", 8)  # several blocks, the last a single row
    inner = attention_of(kind, bias_of(positions), window=window)
    q, k, v = inputs(num_kv_heads)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, *inner.parameters())]
    o, expected = inner(q, k, v), dense(inner, q, k, v)
    do = torch.randn_like(o)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    for gradient, wanted in zip(*(torch.autograd.grad(each, leaves, do) for each in (o, expected)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-10)  # the scale's is float32
    torch.testing.assert_close(inner(q[:, :, -1:], k, v), expected[:, :, -1:], rtol=0, atol=1e-12)  # from a cache
    torch.testing.assert_close(inner(q[:, :, :5], k[:, :, :5], v[:, :, :5]), expected[:, :, :5], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "num_kv_heads"), [(None, 4), (100, 2)])
def test_flex_attention_with_a_bias_is_a_dense_one(window, num_kv_heads):
    inner = attention_of("regular", bias_of("dynamic", seq_len=300), window=window)
    q, k, v = inputs(num_kv_heads, 200)  # without gradients, which flex_attention does not have on a CPU
    found = by_flex(q, k, v, window or 200, inner.position_bias(window or 200, q))
    torch.testing.assert_close(found, dense(inner, q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "num_kv_heads", "seq_len"), [(None, 4, 33), (9, 2, 33), (40, 1, 33), (1, 4, 7)])
def test_a_bias_for_every_pair_is_that_of_its_distance(window, num_kv_heads, seq_len):
    inner = attention_of("regular", bias_of("dynamic", seq_len=40), window=window)
    q, k, v = (tensor.requires_grad_() for tensor in inputs(num_kv_heads, seq_len))
    leaves = [q, k, v, *inner.parameters()]
    # once with a table as long as the text, once longer
    expected = dense(inner, q, k, v)
    do = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, do)
    for length in (seq_len, 40):
        seen = min(window or seq_len, seq_len)
        found = by_dense_bias(q, k, v, seen, inner.position_bias(length, q))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for gradient, other in zip(torch.autograd.grad(found, leaves, do), wanted, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("longest", [0, 300], ids=["flex_attention", "a bias for every pair"])
@pytest.mark.parametrize("window", [None, 100])
def test_on_a_gpu_a_compiled_bias_has_the_gradients_of_a_dense_one(monkeypatch, window, longest):
    used = spied(monkeypatch)
    monkeypatch.setattr(models.windows, "LONGEST_DENSE_BIAS", longest)
    inner = attention_of("regular", bias_of("dynamic", seq_len=300), window=window).float()
    tensors = [tensor.float().requires_grad_() for tensor in inputs(2, 300)]
    leaves = [*tensors, inner.position_bias.out]
    expected = torch.autograd.grad(dense(inner, *tensors).square().sum(), leaves)
    on_gpu = inner.cuda()
    moved_tensors = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    o = torch.compile(on_gpu, dynamic=False)(*moved_tensors)
    found = torch.autograd.grad(o.square().sum(), [*moved_tensors, on_gpu.position_bias.out])
    assert used == [("by_dense_bias" if longest else "by_flex", window or 300)]
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu() - other).norm() < 5e-3 * other.norm()  # TF32's products, if they are allowed


def spied(monkeypatch):
    """Which function served a call, and its window; also while it is compiled."""
    used = []
    patched = partial(monkeypatch.setattr, models.windows)
    patched("by_flex", lambda *inputs: used.append(("by_flex", inputs[3])) or by_flex(*inputs))
    patched("by_dense_bias", lambda *inputs: used.append(("by_dense_bias", inputs[3])) or by_dense_bias(*inputs))
    return used


def shared_memory(head_dim, dtype, *, table, learned=False, stages, **tiles):
    """Bytes that a block of flex_attention's kernel needs on compute capability 9.0, which needs the most.

    Forward queries, backward keys and values, stay; the other side's rows, two tensors of them, come in `stages`, and
    so does what a score reads of the table, one stage later. Backward there are also the sums of rows, and where the
    table's gradient is wanted its way into other registers. Triton 3.6, asked for kernels of 9.0, named these numbers.
    """
    row = 2 ** (head_dim - 1).bit_length() * dtype.itemsize
    if "BLOCK_N" in tiles:
        stay, come, fixed = tiles["BLOCK_M"], tiles["BLOCK_N"], 0
        rows = stay + 2 * stages * come
    else:
        stay, come, fixed = tiles["BLOCK_N1"], tiles["BLOCK_M1"], 1024 + 3072 * learned
        assert (tiles["BLOCK_M2"], tiles["BLOCK_N2"]) == (stay, come)
        rows = 2 * stay + 2 * stages * come
    return rows * row + (4 * stay * come * (stages - 1) if table else 0) + fixed


def tiles_of(direction, options):
    found = {name[4:]: size for name, size in options.items() if name.startswith(direction)}
    return {"stages": found.pop("num_stages"), **found}


def test_tiles_with_a_table_need_less_shared_memory_than_a_gpu_has():
    # PyTorch's own for a GPU of 227 KiB: what such a GPU said when these did not fit
    forward = {"BLOCK_M": 128, "BLOCK_N": 128, "stages": 3}
    backward = {"BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64, "stages": 3}
    assert shared_memory(64, torch.bfloat16, table=True, **forward) == 245760 > 227 * 1024
    assert shared_memory(128, torch.bfloat16, table=True, learned=True, **backward) == 233472 > 227 * 1024
    # without a table they do
    assert shared_memory(64, torch.bfloat16, table=False, **forward) == 114688
    assert shared_memory(128, torch.bfloat16, table=False, **backward) == 164864
    for head_dim in range(16, 257, 8):
        for dtype in (torch.bfloat16, torch.float16):
            options = tiles_with_a_table(head_dim, dtype)
            for direction in ("fwd_", "bwd_"):
                needed = shared_memory(head_dim, dtype, table=True, learned=True, **tiles_of(direction, options))
                # 99 KiB has a block of the smallest GPUs from compute capability 8.0 on
                assert needed <= (99 if head_dim <= 128 else 104) * 1024, (head_dim, direction, needed)
        options = tiles_with_a_table(head_dim, torch.float32)
        assert all(name.startswith("fwd_") for name in options)
        needed = shared_memory(head_dim, torch.float32, table=True, **tiles_of("fwd_", options))
        assert needed <= (99 if head_dim <= 128 else 132) * 1024, (head_dim, needed)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_tiles_are_chosen_for_a_table_alone(monkeypatch):
    """A window's are PyTorch's own, and a mask has blocks that every tile divides."""
    given = []

    def flex_attention(*inputs, kernel_options, **options):
        given.append(kernel_options)
        return flex(*inputs, kernel_options=kernel_options, **options)

    flex = models.windows.flex_attention
    monkeypatch.setattr(models.windows, "flex_attention", flex_attention)
    q, k, v = (tensor.float() for tensor in inputs(2, 200))
    by_flex(q, k, v, 100)
    for table in (AlibiBias(4)(200, q), moved(DynamicBias(4, 200))(200, q)):  # with a gradient or without
        by_flex(q, k, v, 200, table)
        by_flex(q, k, v, 100, table.detach())
    backend = {"BACKEND": "TRITON"}
    assert given == [backend, *[backend | tiles_with_a_table(16, torch.float32)] * 4]
    for head_dim in (16, 64, 128, 256):
        tiles = tiles_with_a_table(head_dim, torch.bfloat16)
        assert all(models.windows.BLOCK % size == 0 for name, size in tiles.items() if "BLOCK" in name)
        assert tiles["bwd_BLOCK_N1"] % tiles["bwd_BLOCK_M1"] == tiles["bwd_BLOCK_M2"] % tiles["bwd_BLOCK_N2"] == 0


def test_flex_attention_serves_the_head_dims_and_dtypes_that_it_has_tiles_for():
    for head_dim, dtype, serves in [
        (8, torch.bfloat16, False), (16, torch.bfloat16, True), (128, torch.float32, True),
        (256, torch.float16, True), (264, torch.bfloat16, False), (64, torch.float64, False),
    ]:  # fmt: skip
        assert models.windows._flex_serves(torch.zeros(1, 1, 1, head_dim, dtype=dtype), None) == serves


def test_deterministic_algorithms_leave_the_learned_bias_to_the_blocks():
    q, table = torch.zeros(1, 4, 8, 16), torch.zeros(4, 8, requires_grad=True)
    assert models.windows._flex_serves(q, table)
    torch.use_deterministic_algorithms(True)
    try:
        assert not models.windows._flex_serves(q, table) and models.windows._flex_serves(q, table.detach())
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_table_of_the_window_alone_is_enough():
    q, k, v = inputs(4)
    table = torch.randn(4, 33, dtype=torch.float64)
    whole = windowed_attention(q, k, v, 9, table)
    assert torch.equal(windowed_attention(q, k, v, 9, table[:, :9]), whole)


# Models


@pytest.mark.parametrize(("block", "window"), [(PreNormBlock, None), (PostNormBlock, 7)])
@pytest.mark.parametrize("positions", BIASES)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_logits_from_a_cache_are_those_of_the_whole_context(kind, block, positions, window):
    gpt = build(kind, block, positions=positions, window=window).double()
    tokens = torch.randint(0, 256, (2, 32))
    cache = gpt.new_cache(2)
    steps = [gpt(tokens[:, :9], cache=cache)] + [gpt(tokens[:, i : i + 1], cache=cache) for i in range(9, 32)]
    torch.testing.assert_close(torch.cat(steps, dim=1), gpt(tokens), rtol=0, atol=1e-9)
    # 40 bytes run over the 32 positions
    generated = [gpt.generate(tokens[:1, :5], 40, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("positions", BIASES)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_nothing_but_distance_and_order_is_seen(kind, positions):
    """The last of equal bytes has the same logits wherever it stands; another byte has a say by its distance."""
    gpt = build(kind, positions=positions).double()
    tokens = torch.full((1, 32), 7)
    torch.testing.assert_close(gpt(tokens)[0, 31], gpt(tokens)[0, 3], rtol=0, atol=1e-9)
    logits = []
    for place in (30, 20):
        other = tokens.clone()
        other[0, place] = 9
        logits.append(gpt(other)[0, 31])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "positions"), [("cosine", "alibi"), ("regular", "dynamic")])
def test_a_compiled_step_is_that_of_the_model(kind, positions):
    gpt = build(kind, positions=positions, window=7).double()
    tokens = torch.randint(0, 256, (2, 33))
    expected = gpt(tokens[:, :-1], tokens[:, 1:])
    expected.backward()
    gradients = [parameter.grad for parameter in gpt.parameters()]
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    gpt.zero_grad()
    torch.compiler.reset()
    gpt.compile(fullgraph=True, dynamic=False, backend="eager")
    loss = gpt(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for parameter, gradient in zip(gpt.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-10)


def losses_of_steps(gpt, tokens, steps, device_type):
    """The loss before each of some steps of AdamW in bf16-mixed, and after them without gradients, as a validation."""
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
    losses = []
    for step in range(steps + 1):
        with torch.autocast(device_type, torch.bfloat16), torch.set_grad_enabled(step < steps):
            loss = gpt(tokens[:, :-1], tokens[:, 1:])
        losses.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            assert all(parameter.grad.isfinite().all() for parameter in gpt.parameters())
            optimizer.step()
    return losses


@pytest.mark.parametrize("window", [None, 7])
def test_regular_attention_learns_its_biases(window):
    gpt = build("regular", window=window)
    before = [layer.attention.inner.position_bias.out.detach().clone() for layer in gpt.blocks]
    first, *_, last = losses_of_steps(gpt, torch.randint(0, 256, (2, 33)), 4, "cpu")
    assert last < first
    for layer, out in zip(gpt.blocks, before, strict=True):
        assert not torch.equal(layer.attention.inner.position_bias.out, out)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("positions", "window", "seq_len"), [
    ("dynamic", None, 1024), ("alibi", None, 1024), ("dynamic", 300, 1024), ("rotary", 300, 1024), ("dynamic", 40, 96),
])  # fmt: skip
def test_on_a_gpu_regular_attention_trains_compiled(monkeypatch, positions, window, seq_len, head_dim):
    """As the trainer compiles it, with shared memory enough, its validation, too; beside the same uncompiled."""
    used = spied(monkeypatch)
    sizes = {"width": 8 * head_dim, "num_heads": 8, "num_kv_heads": 2, "seq_len": seq_len, "positions": positions}
    tokens = torch.randint(0, 256, (2, seq_len + 1), device="cuda")
    losses = []
    for compiled in (False, True):
        gpt = build("regular", window=window, **sizes).cuda()
        if compiled:
            torch.compiler.reset()
            gpt.compile(dynamic=False)
        losses.append(losses_of_steps(gpt, tokens, 2, "cuda"))
    seen = {window or seq_len} | ({seq_len} if positions != "rotary" else set())  # no window in the last layer
    learned = "by_dense_bias" if positions == "dynamic" else "by_flex"
    assert set(used) == {(function, keys) for function in ("by_flex", learned) for keys in seen}  # it validates by_flex
    torch.testing.assert_close(*(torch.tensor(each) for each in losses), rtol=0, atol=0.05)


@pytest.mark.parametrize("positions", BIASES)
def test_other_weights_flops_and_optimizers_are_those_of_rotary_positions(positions):
    gpt, rotary = build(positions=positions), build(positions="rotary")
    weights = rotary.state_dict()
    own = {name: value for name, value in gpt.state_dict().items() if ".position_bias." not in name}
    assert own.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in own.items())
    assert gpt.flops_per_token(32) == rotary.flops_per_token(32)
    learned = [value for name, value in gpt.named_parameters() if ".position_bias." in name]
    assert len(learned) == (6 if positions == "dynamic" else 0)
    assert {id(value) for value in learned} <= {id(value) for value in roles_of(gpt)["gains"]}


def test_a_model_built_on_the_meta_device_and_loaded_is_the_same_model():
    tokens = torch.randint(0, 256, (1, 20))
    for positions in BIASES:
        gpt = build(positions=positions)
        with torch.device("meta"):
            other = build(positions=positions)
        other.load_state_dict(gpt.state_dict(), assign=True)
        assert torch.equal(other(tokens), gpt(tokens))


def test_what_is_kept_of_the_biases_is_what_they_are():
    gpt = build(num_layers=3, seq_len=11)
    rows = position_biases(gpt)
    assert [row[:2] for row in rows] == [[layer, at] for layer in range(3) for at in (0, 1, 2, 3, 4, 6, 8, 10)]
    table = gpt.blocks[1].attention.inner.position_bias(11, FLOAT64)
    assert rows[8 + 5][2:] == table[:, 6].tolist()
    assert position_biases(build(positions="alibi")) == []


# Runs


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A finished run of 8 steps, with checkpoints at 4 and 8."""
    return fit(text, tmp_path_factory.mktemp("runs"), "model.positions=dynamic", "norm=post", "lr=0.01")


@pytest.mark.training
def test_a_run_keeps_its_biases_and_resumes_with_them_bit_for_bit(text, run):
    kept, before = (run / "position_bias.csv").read_text(), weights(run)
    rows = read_csv(run / "position_bias.csv")
    assert list(rows[0]) == ["step", "layer", "distance", "head0", "head1"]
    assert {row["step"] for row in rows} == {"4", "8"} and {row["layer"] for row in rows} == {"0"}
    assert any(float(row["head0"]) != 0 for row in rows)
    assert (run / "position_bias.png").read_bytes().startswith(b"\x89PNG")
    columns = [{key: row[key] for key in ("step", "train/loss", "val/bpc", "scale/mean")} for row in metrics(run)]
    resume = f"resume={run}/checkpoints/step-4.ckpt"
    fit(text, run.parent, resume, "model.positions=dynamic", "norm=post", "lr=0.01")
    after = weights(run)
    assert any("position_bias" in name for name in after["state_dict"])
    assert all(torch.equal(value, after["state_dict"][name]) for name, value in before["state_dict"].items())
    assert (run / "position_bias.csv").read_text() == kept
    again = [{key: row[key] for key in columns[0]} for row in metrics(run)]
    assert again == columns
    with pytest.raises(ValueError, match="another model: model.positions was 'dynamic', is 'alibi'"):
        fit(text, run.parent, resume, "model.positions=alibi", "norm=post", "lr=0.01")


@pytest.mark.training
def test_a_longer_model_takes_the_weights_of_a_run_its_biases_too(run):
    gpt = build(num_layers=1, width=32, num_heads=2, num_kv_heads=2, seq_len=64, block=PostNormBlock)
    assert load_weights(gpt, run) == []
    bias = gpt.blocks[0].attention.inner.position_bias
    last = [row for row in read_csv(run / "position_bias.csv") if row["step"] == "8"]
    assert read_results(run).status == "finished" and len(last) == 11
    for row in last:
        found = bias(64, FLOAT64.float())[:, int(row["distance"])].tolist()
        assert found == pytest.approx([float(row["head0"]), float(row["head1"])], abs=1e-6)
