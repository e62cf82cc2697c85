"""Checks that need ranks, each a process of `python -m support.ranks RANK FOLDER NUM_RANKS`, which meet in FOLDER.

Each rank runs every check of CHECKS for so many ranks and leaves FOLDER/RANK.json: {name: the traceback, or ""}.
"""

import functools
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.experimental import local_map

from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention

NUM_RANKS = 2
BATCH, HEADS, ROWS = Shard(0), Shard(1), Shard(2)


def compare(q_shape, kv_shape, placements, expected, mesh_shape=(NUM_RANKS,), shared=None, **options):
    """Output and gradients of DTensors are those of the whole tensors, and have the expected placements.

    shared: tensors among the arguments, whole on every rank. Returns the gradients of q, k, v and of these.
    """
    mesh = init_device_mesh("cpu", mesh_shape)
    torch.manual_seed(0)
    shapes = {"q": q_shape, "k": kv_shape, "v": kv_shape}
    whole = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    parts = {name: distribute_tensor(tensor, mesh, placements) for name, tensor in whole.items()}
    for name, tensor in (shared or {}).items():
        whole[name], parts[name] = tensor, distribute_tensor(tensor, mesh)
    results = []
    for attend, tensors in ((flash_cosine_sim_attention, parts), (plain_cosine_sim_attention, whole)):
        for tensor in tensors.values():
            tensor.requires_grad_(tensor.is_floating_point() and tensor is not tensors.get("alibi_slopes"))
        outputs = attend(**tensors, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(output.square().sum() for output in outputs)
        grads = torch.autograd.grad(loss, [tensor for tensor in tensors.values() if tensor.requires_grad])
        results.append((*outputs, *grads))
    assert all(output.placements == tuple(expected) for output in results[0][: len(outputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs)
    return results[0][len(outputs) :]


def sharded_by_batch_and_by_heads():
    for placement in (BATCH, HEADS, Replicate()):
        for kv_heads in (4, 2):
            grads = compare((4, 4, 9, 8), (4, kv_heads, 9, 8), [placement], [placement], causal=True)
            assert all(grad.placements == (placement,) for grad in grads)
    compare((2, 4, 9, 8), (2, 2, 9, 8), [BATCH, HEADS], [BATCH, HEADS], mesh_shape=(1, 2), window_size=(3, 1))


def other_placements_are_redistributed():
    compare((2, 4, 8, 8), (2, 4, 8, 8), [ROWS], [Replicate()], causal=True)
    compare((2, 4, 8, 8), (2, 1, 8, 8), [ROWS], [Replicate()])


def heads_that_do_not_split_evenly_stay_with_theirs():
    compare((2, 4, 9, 8), (2, 1, 9, 8), [HEADS], [Replicate()])  # one head of k for four of q
    compare((2, 6, 9, 8), (2, 3, 9, 8), [HEADS], [Replicate()])  # 3 + 3 heads of q would meet 2 + 1 of k
    compare((2, 3, 9, 8), (2, 3, 9, 8), [HEADS], [HEADS])  # 2 + 1 of both


def a_rank_may_have_no_heads():
    """4 heads over 3 ranks are 2 + 2 + 0."""
    one = {"scale": torch.full((1,), 4.0, dtype=torch.float64), "attn_bias": torch.randn(1, 9, 9, dtype=torch.float64)}
    table = {"distance_bias": torch.randn(4, 17, dtype=torch.float64), "alibi_slopes": torch.rand(4).double()}
    for options in ({"causal": True}, {"return_partials": True}, {"shared": one}, {"shared": table}):
        compare((2, 4, 9, 8), (2, 4, 9, 8), [HEADS], [HEADS], mesh_shape=(3,), **options)


def what_all_ranks_share_gets_every_share_of_its_gradient():
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    for placement, of_scale in ((BATCH, Partial()), (HEADS, Shard(0))):
        shared = {"mask": mask, "scale": torch.linspace(2, 8, 4, dtype=torch.float64)}
        *_, dscale = compare((4, 4, 9, 8), (4, 2, 9, 8), [placement], [placement], shared=shared)
        assert dscale.placements == (of_scale,)
        bias = {"attn_bias": torch.randn(4, 9, 9, dtype=torch.float64)}
        compare((4, 4, 9, 8), (4, 2, 9, 8), [placement], [placement], shared=bias)
        one = {"scale": torch.tensor(3.0, dtype=torch.float64)}
        compare((4, 4, 9, 8), (4, 4, 9, 8), [placement], [placement], shared=one, return_partials=True)


def biases_by_distance_go_with_their_heads():
    for placement in (BATCH, HEADS):
        for slopes in (torch.rand(4, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)):  # (batch, heads)
            shared = {"distance_bias": torch.randn(4, 9, dtype=torch.float64), "alibi_slopes": slopes}
            *_, gradient = compare((4, 4, 9, 8), (4, 2, 9, 8), [placement], [placement], shared=shared, causal=True)
            assert gradient.placements == (Partial() if placement == BATCH else Shard(0),)


def what_cannot_be_honoured_says_so():
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    q = distribute_tensor(torch.randn(2, 4, 9, 8), mesh, [BATCH])
    for options, message in (
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, "mask must be a DTensor as q is, got Tensor"),
        ({"backend": "sdpa"}, "backend='sdpa' takes no DTensors"),
        ({"backend": "reference"}, "backend='reference' takes no DTensors"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ):
        try:
            flash_cosine_sim_attention(q, q, q, **options)
        except (TypeError, ValueError, ImportError) as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{options} raised nothing")


def each_ranks_part_by_local_map():
    """For a back end that takes no DTensors."""
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    torch.manual_seed(0)
    whole = torch.randn(2, 4, 9, 8)
    q = distribute_tensor(whole, mesh, [HEADS])
    attend = functools.partial(flash_cosine_sim_attention, causal=True, backend="sdpa")
    o = local_map(attend, out_placements=[HEADS], in_placements=([HEADS],) * 3, device_mesh=mesh)(q, q, q)
    torch.testing.assert_close(o.full_tensor(), attend(whole, whole, whole))


def compiled():
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    torch.manual_seed(0)
    whole = torch.randn(2, 4, 9, 8)
    q = distribute_tensor(whole, mesh, [HEADS])
    attend = torch.compile(flash_cosine_sim_attention, backend="aot_eager", fullgraph=True)
    o = attend(q, q, q, causal=True)
    assert isinstance(o, DTensor) and o.placements == (HEADS,)
    torch.testing.assert_close(o.full_tensor(), plain_cosine_sim_attention(whole, whole, whole, causal=True))


class Attention(nn.Module):
    """(batch, seq_len, 16), with four heads and a learned scale for each."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.scale = nn.Parameter(torch.linspace(4, 10, 4))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).movedim(2, 0).transpose(2, 3)
        q, k, v = (nn.functional.pad(tensor, (0, 4)) for tensor in (q, k, v))  # head_dim 8
        o = flash_cosine_sim_attention(q, k, v, scale=self.scale, causal=True)[..., :4]
        return self.out(o.transpose(1, 2).flatten(2))


def fully_sharded():
    """FSDP2: loss and gradients of a batch that is split over the ranks are those of one process."""
    torch.manual_seed(0)
    alone, model, x = Attention(), Attention(), torch.randn(4, 9, 16)
    model.load_state_dict(alone.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (NUM_RANKS,)))
    loss = model(x.chunk(NUM_RANKS)[dist.get_rank()]).square().mean()
    loss.backward()
    alone(x).square().mean().backward()
    for (name, parameter), (_, right) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert isinstance(parameter, DTensor), name
        torch.testing.assert_close(parameter.grad.full_tensor(), right.grad)
    model = Attention()
    model.scale = nn.Parameter(torch.tensor(8.0))
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (NUM_RANKS,)))
    except ValueError as error:  # docs/doors.md says so
        assert "scalar parameters" in str(error), error
    else:
        raise AssertionError("FSDP2 takes a scale of shape () now: docs/doors.md says that it does not")


CHECKS = {
    NUM_RANKS: (
        sharded_by_batch_and_by_heads,
        other_placements_are_redistributed,
        heads_that_do_not_split_evenly_stay_with_theirs,
        what_all_ranks_share_gets_every_share_of_its_gradient,
        biases_by_distance_go_with_their_heads,
        what_cannot_be_honoured_says_so,
        each_ranks_part_by_local_map,
        compiled,
        fully_sharded,
    ),
    3: (a_rank_may_have_no_heads,),
}


def main(rank: int, folder: Path, num_ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_ranks)
    results = {}
    for check in CHECKS[num_ranks]:
        try:
            check()
            results[check.__name__] = ""
        except Exception:
            results[check.__name__] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
