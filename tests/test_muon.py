"""Muon with AdamW as one optimizer: which parameter is whose, and each step against others' implementations."""

import copy
import math

import pytest
import torch
from support.configuration import configure
from torch import nn

from conf.schema import builder, validate
from models.training.load import build_gpt
from models.training.muon import MuonAndAdamW, orthogonalized, orthogonalized_alike
from models.training.optimizer import place_steps, roles_of

TINY = ["model=tiny", "model.num_layers=2", "model.width=32", "model.num_heads=4", "seq_len=16", "max_steps=40"]


def built(*changes):
    """A model whose every gradient is another from step to step, its optimizer and scheduler."""
    config = validate(configure(*TINY, "optimizer=muon", "trainer.accelerator=cpu", *changes))
    torch.manual_seed(0)
    gpt = build_gpt(config)
    return gpt, *builder(config, "optimizer")().build(gpt)


def give_gradients(gpt, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in gpt.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_adamw_has_what_is_configured():
    config = validate(configure(*TINY, "optimizer=adamw", "optimizer.eps=1e-3", "optimizer.betas=[0.8,0.9]"))
    optimizer, _ = builder(config, "optimizer")().build(build_gpt(config))
    assert {(group["eps"], tuple(group["betas"])) for group in optimizer.param_groups} == {(1e-3, (0.8, 0.9))}


def test_muon_has_what_is_configured():
    _, optimizer, _ = built("optimizer.momentum=0.5", "optimizer.eps=1e-3")
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert {group["eps"] for group in optimizer.param_groups[1:]} == {1e-3}


def test_on_a_cpu_the_iteration_is_in_float32():
    matrix = torch.randn(24, 40)
    assert torch.equal(orthogonalized_alike([matrix])[0], orthogonalized(matrix[None])[0])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_fused_kernel_finds_its_counts_of_steps_beside_the_parameters(kind):
    """A checkpoint of a run on a CPU has them there, where the kernel of a GPU would read outside of its memory."""
    weight, gain = nn.Parameter(torch.empty(4, 4, device="meta")), nn.Parameter(torch.empty(4, device="meta"))
    matrices = {"params": [weight], "role": "matrices", "lr": 0.1, "momentum": 0.9, "weight_decay": 0, "splits": [(4,)]}
    gains = {"params": [gain], "role": "gains", "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0}
    optimizer = MuonAndAdamW([matrices, gains], fused=False) if kind == "muon" else torch.optim.AdamW([gain])
    optimizer.state[gain] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(gain)}
    place_steps(optimizer)
    assert optimizer.state[gain]["step"] == 3 and set(optimizer.state) == {gain}
    optimizer.param_groups[-1]["fused"] = True
    place_steps(optimizer)
    assert optimizer.state[gain]["step"].is_meta


# Whose parameter it is.


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("attention", ["cosine", "regular"])
def test_every_parameter_has_one_role_by_what_it_is_for(attention, norm):
    gpt, optimizer, _ = built(f"attention={attention}", f"norm={norm}", "model.positions=learned")
    names = {id(parameter): name for name, parameter in gpt.named_parameters()}
    found = {group["role"]: [names[id(one)] for one in group["params"]] for group in optimizer.param_groups}
    listed = [name for role in found.values() for name in role]
    assert sorted(listed) == sorted(names.values()) and len(listed) == len(set(listed))
    assert list(found) == ["matrices", "embeddings", "head", "gains"]
    assert found["embeddings"] == ["embedding.weight", "positions.weight"] and found["head"] == ["head.weight"]
    kinds = ["attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight"]
    assert sorted(found["matrices"]) == sorted(f"blocks.{layer}.{kind}" for layer in (0, 1) for kind in kinds)
    assert all("norm" in name or name.endswith("log_scale") for name in found["gains"])


def test_a_head_that_shares_the_embeddings_weights_is_an_embedding():
    gpt, optimizer, _ = built("model.tied_head=true")
    assert [group["role"] for group in optimizer.param_groups] == ["matrices", "embeddings", "gains"]
    assert roles_of(gpt)["embeddings"] == [gpt.head.weight]


def test_each_role_has_its_own_rate_and_one_schedule():
    changes = ["lr=0.5", "optimizer.embedding_lr=0.25", "optimizer.head_lr=2", "optimizer.gain_lr=0.125"]
    _, optimizer, scheduler = built(*changes, "optimizer.warmup_steps=4", "optimizer.decay=linear")
    peaks = {"matrices": 0.5, "embeddings": 0.25, "head": 2.0, "gains": 0.125}
    for step in range(41):
        fraction = (step + 1) / 5 if step < 4 else 1 - 0.9 * (step - 4) / 36
        rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({role: peak * fraction for role, peak in peaks.items()})
        optimizer.step()
        scheduler.step()


def test_splits_that_do_not_add_up_are_refused():
    weight = nn.Parameter(torch.zeros(6, 4))
    group = {"params": [weight], "role": "matrices", "lr": 1.0, "momentum": 0.9, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"shape \(6, 4\) and the splits \[2, 2\]"):
        MuonAndAdamW([{**group, "splits": [(2, 2)]}], fused=False)


# What a step does.


@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_steps_are_those_of_torchs_muon_and_adamw(num_kv_heads):
    """torch.optim.Muon with q, k and v as matrices of their own, its products in bfloat16; AdamW bit for bit."""
    gpt, ours, scheduler = built(f"model.num_kv_heads={num_kv_heads}", "lr=0.02")
    start = copy.deepcopy(gpt)
    pieces = {}
    for layer, block in enumerate(start.blocks):
        attention, mlp = block.attention, block.mlp
        parts = zip("qkv", attention.qkv.weight.detach().split(attention.sizes), strict=True)
        whole = {"out": attention.out.weight, "up": mlp.up.weight, "down": mlp.down.weight}
        for name, weight in {**dict(parts), **whole}.items():
            pieces[layer, name] = nn.Parameter(weight.detach().clone())
    theirs = torch.optim.Muon(pieces.values(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    roles = roles_of(start)
    rates = {"embeddings": 1e-2, "head": 2e-3, "gains": 1e-2}
    rest = [{"params": roles[role], "lr": rate} for role, rate in rates.items()]
    adamw = torch.optim.AdamW(rest, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    peaks = [group["lr"] for group in (*theirs.param_groups, *adamw.param_groups)]
    for step in range(6):
        fraction = scheduler.get_last_lr()[0] / 0.02
        for group, peak in zip((*theirs.param_groups, *adamw.param_groups), peaks, strict=True):
            group["lr"] = peak * fraction
        give_gradients(gpt, step)
        for one, other in zip(gpt.parameters(), start.parameters(), strict=True):
            other.grad = one.grad.clone()
        for (layer, name), piece in pieces.items():
            block = gpt.blocks[layer]
            qkv = dict(zip("qkv", block.attention.qkv.weight.grad.split(block.attention.sizes), strict=True))
            whole = {"out": block.attention.out, "up": block.mlp.up, "down": block.mlp.down}
            piece.grad = (qkv[name] if name in qkv else whole[name].weight.grad).clone()
        for optimizer in (ours, theirs, adamw):
            optimizer.step()
        scheduler.step()
    for role in rates:
        assert all(map(torch.equal, roles_of(gpt)[role], roles[role])), role
    for (layer, name), piece in pieces.items():
        block = gpt.blocks[layer]
        qkv = dict(zip("qkv", block.attention.qkv.weight.split(block.attention.sizes), strict=True))
        whole = {"out": block.attention.out, "up": block.mlp.up, "down": block.mlp.down}
        found = qkv[name] if name in qkv else whole[name].weight
        moved = (piece - pieces_start(start, layer, name)).norm()
        assert (found - piece).norm() < 0.02 * moved, (layer, name)


def pieces_start(start, layer, name):
    """The matrix as it was: torch's AdamW above never stepped the matrices of ``start``."""
    block = start.blocks[layer]
    qkv = dict(zip("qkv", block.attention.qkv.weight.split(block.attention.sizes), strict=True))
    whole = {"out": block.attention.out, "up": block.mlp.up, "down": block.mlp.down}
    return qkv[name] if name in qkv else whole[name].weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_become_about_one_and_nothing_else_changes(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 8, 20, dtype=torch.float64) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalized(x.to(dtype)).double()
    inner = u.mT @ y @ v.mT  # diagonal, but for rounding
    values = inner.diagonal(dim1=1, dim2=2)
    assert 0.6 < values.min() and values.max() < 1.3
    rounding = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert (inner - torch.diag_embed(values)).abs().max() < rounding
    assert orthogonalized(torch.zeros(2, 3, 4)).abs().max() == 0


def test_a_batch_is_each_matrix_alone_lying_or_standing():
    torch.manual_seed(0)
    matrices = [torch.randn(4, 6), torch.randn(6, 4), torch.randn(4, 6)]
    for found, matrix in zip(orthogonalized_alike(matrices), matrices, strict=True):
        (alone,) = orthogonalized_alike([matrix.mT])
        assert found.shape == matrix.shape
        torch.testing.assert_close(found, alone.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_matrices_but_for_bfloat16():
    torch.manual_seed(0)
    matrices = [torch.randn(size) for size in ((64, 128), (128, 64), (64, 128))]
    found = orthogonalized_alike([matrix.cuda() for matrix in matrices])
    for one, expected in zip(found, orthogonalized_alike(matrices), strict=True):
        assert one.dtype == torch.float32 and (one.cpu() - expected).norm() < 0.03 * expected.norm()


def test_a_step_has_adamws_size_whatever_the_shape():
    gpt, optimizer, _ = built("lr=1e-3", "optimizer.weight_decay=0", "optimizer.warmup_steps=0")
    before = [weight.detach().clone() for weight in optimizer.param_groups[0]["params"]]
    give_gradients(gpt, 0)
    optimizer.step()
    for old, new in zip(before, optimizer.param_groups[0]["params"], strict=True):
        assert (new - old).square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.25)


def test_weights_in_bfloat16_are_stepped_and_stay_so():
    gpt, optimizer, _ = built()
    gpt.to(torch.bfloat16)  # in place: the optimizer has these parameters
    before = copy.deepcopy(gpt.state_dict())
    give_gradients(gpt, 0)
    optimizer.step()
    changed = {name for name, value in gpt.state_dict().items() if not torch.equal(value, before[name])}
    assert all(f"blocks.{layer}.mlp.up.weight" in changed for layer in (0, 1)) and "embedding.weight" in changed
    assert {value.dtype for name, value in gpt.named_parameters()} == {torch.bfloat16}


def test_state_goes_through_a_checkpoint_bit_for_bit(tmp_path):
    gpt, optimizer, scheduler = built()

    def advance(gpt, optimizer, scheduler, steps):
        for step in steps:
            give_gradients(gpt, step)
            optimizer.step()
            scheduler.step()

    advance(gpt, optimizer, scheduler, range(3))
    parts = {"gpt": gpt, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state")
    other, other_optimizer, other_scheduler = built("seed=1")
    saved = torch.load(tmp_path / "state", weights_only=True)
    other.load_state_dict(saved["gpt"])
    other_optimizer.load_state_dict(saved["optimizer"])
    other_scheduler.load_state_dict(saved["scheduler"])
    advance(gpt, optimizer, scheduler, range(3, 6))
    advance(other, other_optimizer, other_scheduler, range(3, 6))
    assert all(map(torch.equal, gpt.parameters(), other.parameters()))
    assert len(other_optimizer.state) == len(list(gpt.parameters()))
    gain = roles_of(other)["gains"][0]
    assert other_optimizer.state[gain]["step"] == 6 and math.isfinite(gain.detach().sum())


def test_what_has_no_gradient_is_left():
    gpt, optimizer, _ = built()
    give_gradients(gpt, 0)
    frozen = [gpt.blocks[0].mlp.up.weight, gpt.embedding.weight]
    before = [weight.detach().clone() for weight in frozen]
    for weight in frozen:
        weight.grad = None
    optimizer.step()
    assert all(map(torch.equal, frozen, before)) and not any(weight in optimizer.state for weight in frozen)
    optimizer.zero_grad()
    assert optimizer.step(lambda: 7.0) == 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lr=0", "lr must be a positive number, got 0"),
        ("optimizer.embedding_lr=-1", "optimizer.embedding_lr must be a positive number, got -1"),
        ("optimizer.head_lr=0", "optimizer.head_lr must be a positive number, got 0"),
        ("optimizer.gain_lr=0", "optimizer.gain_lr must be a positive number, got 0"),
        ("optimizer.momentum=1", r"optimizer.momentum must be in \[0, 1\), got 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be two numbers"),
        ("optimizer.cooldown_fraction=0", "optimizer.cooldown_fraction must be above 0 and at most 1, got 0"),
        ("optimizer.rates=nowhere", "optimizer.rates must be null, the rates.csv of a run .* got 'nowhere'"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_key(change, message):
    with pytest.raises(ValueError, match=message):
        built(change)
