"""Attention of DTensors: how the operators of ops.py are sharded over a mesh, by batch or by heads.

PyTorch computes an operator of DTensors on every rank's part, by a rule that says which placements belong together.
What comes with other placements it redistributes first, as it does before its own attention. The rules here are given
to it when the first DTensor comes: importing torch.distributed.tensor takes half a second.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .call import BACKWARD, DIFFERENTIABLE, FORWARD, GRADIENTS, PARTIALS, Call, Operator

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

    Placements = list[Placement | None]  # None: no tensor

BATCH, HEADS = 0, 1  # dimensions of q
_registered: set[str] = set()  # operators


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor: nobody has one who has not imported their module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sharded_attention(call: tuple[Any, ...], return_partials: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by the operators, of the values of a Call whose tensors are DTensors.

    TypeError: one of them is not.
    """
    register_sharding_rules()
    for name, value in zip(Call._fields, call, strict=True):
        if isinstance(value, Tensor) and not is_dtensor(value):
            raise TypeError(
                f"{name} must be a DTensor as q is, got {type(value).__name__}: distribute_tensor makes one of it, "
                "Replicate() where every rank has all of it"
            )
    result: Tensor | tuple[Tensor, Tensor] = ops.kernel_attention(call, return_partials)
    return result


@ops.constant_when_compiled  # torch.compile calls it while it traces
def register_sharding_rules() -> None:
    """Tells PyTorch how the operators are sharded, the first time."""
    if _registered:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for operator in (FORWARD, PARTIALS, BACKWARD):
        overload = getattr(torch.ops.flash_cosine_sim_attention, operator.name).default

        def rule(*arguments: Any, operator: Operator = operator) -> list[tuple["Placements", "Placements"]]:
            return shardings(operator, arguments)

        register_sharding(overload)(rule)
        _registered.add(operator.name)


def shardings(operator: Operator, arguments: Sequence[Any]) -> list[tuple["Placements", "Placements"]]:
    """(placements of the results, placements of the arguments) that belong together on one dimension of a mesh.

    `arguments` are those of the operator, whose tensors are specifications: shape, mesh and placements.
    """
    given = operator.decode(arguments)
    dimensions: list[int | None] = [None]  # first: among choices that cost the same PyTorch takes the first
    if given.cu_seqlens_q is None:
        dimensions.append(BATCH)
    if _heads_can_be_sharded(given):
        dimensions.append(HEADS)
    names = operator.fields[: len(arguments)]
    return [
        (
            [_of_result(name, given, dimension) for name in operator.results],
            [_of_argument(name, getattr(given, name), dimension) for name in names],
        )
        for dimension in dimensions
    ]


def _heads_can_be_sharded(given: Any) -> bool:
    """Whether each rank gets the key/value heads of its query heads.

    With as many of both, every split does that. Otherwise the key/value heads must be split evenly, over all the
    dimensions of the mesh that may come to shard them: those where q, k and v are neither split by batch nor whole.
    """
    q, k, v = given.q, given.k, given.v
    if q.shape[1] == k.shape[1]:
        return True
    parts = 1
    for size, *placements in zip(q.mesh.shape, q.placements, k.placements, v.placements, strict=True):
        if not all(placement.is_replicate() or placement.is_shard(BATCH) for placement in placements):
            parts *= size
    return bool(k.shape[1] % parts == 0)


def _of_argument(name: str, spec: Any, dimension: int | None) -> "Placement | None":
    from torch.distributed.tensor import Replicate, Shard

    if name not in _DIMENSIONS or spec is None:
        return None
    own = _own_dimension(name, spec, dimension)
    return Replicate() if own is None else Shard(own)


def _of_result(name: str, given: Any, dimension: int | None) -> "Placement":
    from torch.distributed.tensor import Partial, Replicate, Shard

    if name not in GRADIENTS:
        absent = name == "row_sum_log2" and not given.need_row_sum_log2
        return Replicate() if absent or dimension is None else Shard(dimension)
    source = DIFFERENTIABLE[GRADIENTS.index(name)]
    if dimension is None or not getattr(given, f"need_{name}"):  # what is not needed has the shape (0,)
        return Replicate()
    own = _own_dimension(source, getattr(given, source), dimension)
    return Partial() if own is None else Shard(own)  # each rank has its share in the gradient of what all of them have


def _own_dimension(name: str, spec: Any, dimension: int | None) -> int | None:
    """The dimension of a tensor that is q's batch or heads; None where it has none, or is broadcast over that."""
    own = None if dimension is None else _DIMENSIONS[name][dimension]
    return None if own is None or (name in _BROADCAST and spec.shape[own] == 1) else own


# Which dimensions of a tensor are batch and heads.
_DIMENSIONS: dict[str, tuple[int | None, int | None]] = {
    **dict.fromkeys(("q", "k", "v", "attn_bias", "o", "do", "row_sum_log2", "drow_sum_log2"), (0, 1)),
    "mask": (0, None),
    "scale": (None, 0),
    "cu_seqlens_q": (None, None),
    "cu_seqlens_k": (None, None),
    "distance_bias": (None, 0),
    "alibi_slopes": (0, 1),
}
_BROADCAST = ("attn_bias", "scale", "alibi_slopes")
