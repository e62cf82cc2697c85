"""Positions as a bias on the logits: a number a head for each distance of a query from its key, and nothing else.

``AlibiBias`` is fixed, ``DynamicBias`` is learned. Both are used by an inner attention, which adds them to its logits.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

POSITIONS = ("rotary", "learned", "alibi", "dynamic")
# Softmax sees differences alone: within +-16 one distance may weigh e^32 = 8e13 times as much as another.
LARGEST_DYNAMIC_BIAS = 16.0
HIDDEN = 32  # channels of the network over distances


class PositionBias(Protocol):
    """What an inner attention adds to its logits by distance: an nn.Module, one a layer.

    Attributes:
        largest: the most that it adds to a logit.
    """

    largest: float

    def forward(self, num_distances: int, q: Tensor) -> Tensor:
        """What is added at the distances 0 to num_distances - 1, (num_heads, num_distances).

        It is on q's device and in float32, in float64 where q is; autocast has no say.
        """


def position_bias_of(positions: str, *, num_heads: int, seq_len: int) -> PositionBias | None:
    """The bias of a layer for a value of model.positions, or None where positions are told in another way."""
    if positions == "alibi":
        return AlibiBias(num_heads)
    if positions == "dynamic":
        return DynamicBias(num_heads, seq_len)
    return None


class AlibiBias(nn.Module):
    """ALiBi: -slope * distance, a slope a head (Press et al. 2021, arXiv:2108.12409, section 3). It has no weights.

    The n slopes are 2^(-8 i / n) for i = 1 to n where n is a power of two. Any other n has those of the next lower
    power m, followed by the first, third, fifth ... of those of 2 m, as the authors' code does.
    """

    largest = 0.0

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def slopes(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(num_heads,), the steepest first. Computed where they are needed: a copy would make the host wait."""
        power = 1 << (self.num_heads.bit_length() - 1)
        head = torch.arange(self.num_heads, device=device, dtype=dtype)
        between = -4 * (2 * (head - power) + 1) / power  # of the slopes of twice the power every second one
        return torch.where(head < power, -8 * (head + 1) / power, between).exp2()

    def forward(self, num_distances: int, q: Tensor) -> Tensor:
        """As ``PositionBias.forward``."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        return -self.slopes(q.device, dtype)[:, None] * torch.arange(num_distances, device=q.device, dtype=dtype)


class DynamicBias(nn.Module):
    """A network of one hidden layer over log(1 + distance), a number a head, learned.

    As the continuous position bias of Swin Transformer V2 (Liu et al. 2021, arXiv:2111.09883, section 3.3): the
    logarithm makes distances beyond those trained on near ones. Attention here is causal, so a distance has no sign.
    A bias b stays within +-LARGEST_DYNAMIC_BIAS as LARGEST tanh(b / LARGEST): what is left of the range of the
    library's logits, 60, is for the scale.

    It starts as 0 at every distance, and draws no random number: a model has the same other weights with and without
    it. Its weights are no nn.Linear: they are neither decayed nor orthogonalised, and their products, made once a layer
    and not once a token, are in no count of FLOPs.

    Args:
        num_heads: of the layer.
        seq_len: the hidden channels begin as steps at distances spread evenly, by their logarithms, up to this one.
    """

    largest = LARGEST_DYNAMIC_BIAS

    def __init__(self, num_heads: int, seq_len: int):
        super().__init__()
        steps = torch.linspace(0.0, math.log(seq_len), HIDDEN) if seq_len > 1 else torch.linspace(0.0, 1.0, HIDDEN)
        self.weight = nn.Parameter(torch.full((HIDDEN,), 2.0))
        self.bias = nn.Parameter(-2.0 * steps)
        # No bias behind it: softmax does not see what is the same for every distance.
        self.out = nn.Parameter(torch.zeros(num_heads, HIDDEN))

    def forward(self, num_distances: int, q: Tensor) -> Tensor:
        """As ``PositionBias.forward``; the gradient goes to the weights."""
        with torch.autocast(q.device.type, enabled=False):
            distance = torch.arange(num_distances, device=q.device, dtype=self.weight.dtype)
            hidden = (self.weight[:, None] * distance.log1p() + self.bias[:, None]).tanh()  # (HIDDEN, num_distances)
            # By the root, a step of Adam's at the rate lr moves a bias by lr * sqrt(HIDDEN) at most.
            raw = self.out @ hidden / math.sqrt(HIDDEN)
            table = self.largest * (raw / self.largest).tanh()
        if torch.compiler.is_compiling():
            # The same, but stored: Inductor would bend the product's entries where flex_attention reads the table, and,
            # without gradients, fails there (torch 2.11 and 2.13: "convert FlexibleLayout to FixedLayout first").
            table = table.as_strided(table.shape, table.stride())
        return table
