"""What PyTorch does around a call: shards it over ranks, computes it again, exports it, compiles it ahead of time."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import ROOT
from support.gates import backend_name
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flash_cosine_sim_attention import flash_cosine_sim_attention
from flash_cosine_sim_attention.call import BACKWARD, FORWARD
from flash_cosine_sim_attention.flash_attn_interface import flash_attn_func
from flash_cosine_sim_attention.functional import scaled_dot_product_attention

# As in support/ranks.py, which imports what takes seconds.
RANK_CHECKS = (
    "sharded_by_batch_and_by_heads",
    "other_placements_are_redistributed",
    "heads_that_do_not_split_evenly_stay_with_theirs",
    "what_all_ranks_share_gets_every_share_of_its_gradient",
    "biases_by_distance_go_with_their_heads",
    "what_cannot_be_honoured_says_so",
    "each_ranks_part_by_local_map",
    "compiled",
    "fully_sharded",
)


def found_by_ranks(make_once, num_ranks):
    """What support/ranks.py found, by rank: {check: traceback or ""}."""

    def make(folder):
        paths = [str(ROOT / "kernels"), str(ROOT / "tests")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "support.ranks"]
        logs = [open(folder / f"{rank}.txt", "w") for rank in range(num_ranks)]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(folder), str(num_ranks)], env=environment, stdout=log, stderr=log
            )
            for rank, log in enumerate(logs)
        ]
        codes = [process.wait() for process in processes]
        for log in logs:
            log.close()
        assert codes == [0] * num_ranks, "".join((folder / f"{rank}.txt").read_text() for rank in range(num_ranks))

    folder = make_once(f"ranks{num_ranks}", make)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def ranks(make_once):
    return found_by_ranks(make_once, 2)


@pytest.mark.slow
@pytest.mark.parametrize("check", RANK_CHECKS)
def test_on_two_ranks(ranks, check):
    assert not any(found.pop(check) for found in (dict(rank) for rank in ranks)), [rank[check] for rank in ranks]
    assert all(set(rank) == set(RANK_CHECKS) for rank in ranks)


@pytest.mark.slow
def test_a_rank_may_have_no_heads(make_once):
    assert found_by_ranks(make_once, 3) == [{"a_rank_may_have_no_heads": ""}] * 3


@pytest.mark.slow
def test_heads_are_split_only_where_key_value_heads_stay_with_theirs():
    """On a mesh of 2 x 4: a dimension that is sharded by batch, or not at all, does not count."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    from flash_cosine_sim_attention.sharding import shardings

    def splits(q_heads, kv_heads, *placements):
        mesh = SimpleNamespace(shape=(2, 4))
        q, k = (SimpleNamespace(shape=(8, h, 9, 8), mesh=mesh, placements=placements) for h in (q_heads, kv_heads))
        given = {"q": q, "k": k, "v": k, "need_row_sum_log2": True}
        return [outputs for outputs, _ in shardings(FORWARD, [given.get(name) for name in FORWARD.fields])]

    whole, batch, heads = ([placement, placement] for placement in (Replicate(), Shard(0), Shard(1)))
    assert splits(8, 8, Shard(1), Shard(1)) == splits(8, 4, Shard(0), Shard(1)) == [whole, batch, heads]
    assert splits(8, 4, Replicate(), Shard(1)) == splits(8, 2, Shard(1), Replicate()) == [whole, batch, heads]
    assert splits(8, 4, Shard(1), Shard(1)) == splits(8, 2, Shard(0), Shard(1)) == [whole, batch]
    assert splits(8, 4, Partial(), Shard(1)) == splits(8, 2, Shard(0), Shard(2)) == [whole, batch]


def test_the_rule_knows_every_tensor_of_the_operators():
    from flash_cosine_sim_attention.sharding import _DIMENSIONS

    tensors = {field for operator in (FORWARD, BACKWARD) for field, kind in kinds(operator).items() if "Tensor" in kind}
    assert set(_DIMENSIONS) == tensors


def kinds(operator):
    """The types of an operator's arguments, by name, as its schema has them."""
    arguments = operator.schema[operator.schema.index("(") + 1 : operator.schema.index(") ->")]
    return {argument.split("=")[0].split()[1]: argument.split()[0] for argument in arguments.split(", ")}


# torch.compile


def by_flash_attn_func(q, k, v, **options):
    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        *(
            (flash_cosine_sim_attention, shapes)
            for shapes in (
                *({"scale": ("heads",)}, {"scale": (1,)}, {"mask": ("batch", 6)}, {"distance_bias": ("heads", 11)}),
                *({"attn_bias": ("heads", 6, 6)}, {"attn_bias": (1, "heads", 6, 6)}),
                *({"alibi_slopes": ("heads",)}, {"alibi_slopes": ("batch", "heads")}),
            )
        ),
        (scaled_dot_product_attention, {"gain_q": ("heads",), "gain_k": ("heads",)}),
        (scaled_dot_product_attention, {"attn_mask": (1, "heads", 6, 6)}),
        (by_flash_attn_func, {"softmax_scale": ("heads",), "gain_q": ("heads",)}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_belongs_to_a_module_compiles_beside_any_number_of_heads(function, shapes):
    """Dynamo knows the shapes of parameters and buffers as numbers, those of q as symbols, and must compare both."""
    torch.compiler.reset()  # a function is compiled so many times at most
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for batch, heads in ((2, 4), (3, 8), (2, 4)):
        q, k, v = torch.randn(3, batch, heads, 6, 8)
        module = torch.nn.Module()
        for name, shape in shapes.items():
            sizes = [{"batch": batch, "heads": heads}.get(size, size) for size in shape]
            learned = name not in ("mask", "alibi_slopes")
            values = torch.ones(sizes, dtype=torch.bool) if name == "mask" else torch.full(sizes, 0.5)
            setattr(module, name, torch.nn.Parameter(values) if learned else torch.nn.Buffer(values))
        held = {name: getattr(module, name) for name in shapes}
        assert torch.equal(compiled(q, k, v, **held), function(q, k, v, **held))


# Activation checkpointing


class Block(torch.nn.Module):
    """(batch, seq_len, 32), in two heads."""

    def __init__(self, backend="auto"):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.backend = torch.nn.Linear(32, 96), backend
        self.scale = torch.nn.Parameter(torch.tensor([4.0, 9.0]))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).movedim(2, 0).transpose(2, 3)
        o = flash_cosine_sim_attention(q, k, v, scale=self.scale, causal=True, backend=self.backend)
        return o.transpose(1, 2).flatten(2)


def keep_attention(_context, operator, *_arguments, **_options):
    ours = operator == torch.ops.flash_cosine_sim_attention.forward.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of the forward operator."""

    calls = 0

    def __torch_dispatch__(self, operator, _types, arguments=(), options=None):
        self.calls += operator == torch.ops.flash_cosine_sim_attention.forward.default
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("kept", [False, True], ids=["computed again", "kept"])
def test_activation_checkpointing(kept):
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    options = {"context_fn": lambda: create_selective_checkpoint_contexts(keep_attention)} if kept else {}
    with backend_name("operators") as name:
        block = Block(name)
        expected = torch.autograd.grad(block(x).square().sum(), block.parameters())
        with Counted() as counted:
            loss = checkpoint(block, x, use_reentrant=False, **options).square().sum()
            grads = torch.autograd.grad(loss, block.parameters())
    assert all(map(torch.equal, grads, expected))
    assert counted.calls == (1 if kept else 2)


@pytest.mark.parametrize("backend", ["auto", "operators"])
def test_reentrant_checkpointing(backend):
    x = torch.randn(2, 9, 32, requires_grad=True)
    with backend_name(backend) as name:
        block = Block(name)
        expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
        checkpoint(block, x, use_reentrant=True).square().sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in block.parameters())]
    assert all(map(torch.equal, grads, expected))


# Exporting


def exported(block):
    """For any batch and length."""
    shapes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("seq_len", min=2, max=4096)},)
    return torch.export.export(block, (torch.randn(2, 9, 32),), dynamic_shapes=shapes)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "operators"])
def test_export_of_any_batch_and_length(backend):
    with backend_name(backend) as name:
        block = Block(name)
        program = exported(block).module()
        for shape in ((1, 2, 32), (3, 9, 32), (2, 50, 32)):
            x = torch.randn(shape)
            torch.testing.assert_close(program(x), block(x))


class Masked(torch.nn.Module):
    """What sdpa serves under an explicit mask, in eager mode in blocks of rows with their own keys."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, mask=None):
        return flash_cosine_sim_attention(q, k, k, mask, **self.options)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("least, most", [(2, 40), (20, 512), (400, 1100)])
@pytest.mark.parametrize(
    "options", [{"window_size": (7, 3)}, {"window_size": (7, 0)}, {"causal": True}, "mask"], ids=str
)
def test_export_of_explicit_masks(options, least, most, strict):
    """One program for all lengths of the range, and for q and k of different ones."""
    torch.manual_seed(0)
    has_mask = options == "mask"
    module = Masked(**{"causal": True} if has_mask else options, backend="sdpa")

    def arguments(seq_len_q, seq_len_k):
        q, k = (torch.randn(1, 2, length, 8) for length in (seq_len_q, seq_len_k))
        return (q, k, torch.rand(1, seq_len_k) < 0.8) if has_mask else (q, k)

    seq_len_q, seq_len_k = (torch.export.Dim(name, min=least, max=most) for name in ("seq_len_q", "seq_len_k"))
    shapes = ({2: seq_len_q}, {2: seq_len_k}, {1: seq_len_k})[: 2 + has_mask]
    example = arguments(least + 5, least + 9)
    program = torch.export.export(module, example, dynamic_shapes=shapes, strict=strict).module()
    for lengths in ((least, most), (most, least), (least + 5, least + 5)):
        tensors = arguments(*lengths)
        torch.testing.assert_close(program(*tensors), module(*tensors))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_one_length_has_blocks(strict):
    """Each with the keys that its rows see, as in eager mode: memory stays linear."""
    module, (q, k) = Masked(window_size=(40, 0), backend="sdpa"), torch.randn(2, 1, 2, 1100, 8)
    shapes = ({0: torch.export.Dim("batch", max=8)},) * 2
    example = tuple(torch.randn(2, 2, 2, 1100, 8))
    program = torch.export.export(module, example, dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.scaled_dot_product_attention.default") == 3
    torch.testing.assert_close(program.module()(q, k), module(q, k))


def test_what_export_traces_on_a_cpu_stays_in_the_program(tmp_path):
    """ "auto" is PyTorch's SDPA there, whatever the program then runs on; the operators are in it by their name."""
    code = exported(Block("auto")).graph_module.code
    assert "scaled_dot_product_attention" in code and "flash_cosine_sim_attention" not in code
    with backend_name("operators") as name:
        program = exported(Block(name))
    assert "flash_cosine_sim_attention.forward" in program.graph_module.code
    torch.export.save(program, tmp_path / "program.pt2")
    x, again = torch.randn(3, 7, 32), torch.export.load(tmp_path / "program.pt2").module()
    torch.testing.assert_close(again(x), program.module()(x))
    with pytest.raises((ImportError, ValueError), match="backend='cuda' (needs the compiled kernels|cannot serve)"):
        exported(Block("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference", "operators"])
def test_it_compiles_ahead_of_time(tmp_path, backend):
    """By AOTInductor, for any batch and length."""
    with backend_name(backend) as name, torch.no_grad():
        block = Block(name).eval()
        package = torch._inductor.aoti_compile_and_package(exported(block), package_path=str(tmp_path / "block.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for shape in ((1, 2, 32), (3, 9, 32), (2, 50, 32)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), block(x))
