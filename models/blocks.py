"""Transformer blocks: where the normalisation sits, how the residual is scaled, how the weights are initialised."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import KVCache, SelfAttention
from models.norm import AddNorm


class GELU(nn.Module):
    """GELU in GPT-2's form, x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).

    The tanh form of Hendrycks & Gimpel 2016 (arXiv:1606.08415, section 2), within 5e-4 of x * Phi(x). Phi itself, and
    tanh in this form, become dozens of instructions an element when compiled, and then hold up a pass over the widest
    tensor of a block that should wait for memory alone. (1 + tanh(u)) / 2 is sigmoid(2 u): one exponential and one
    reciprocal, without a branch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same."""
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")  # the same in one kernel, which saves nothing but x for its gradient
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        linear = 2 * math.sqrt(2 / math.pi)
        return (wide * torch.sigmoid(wide * (linear + linear * 0.044715 * (wide * wide)))).to(x.dtype)


class SquaredReLU(nn.Module):
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668, section 3): larger models learn faster with it than with GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same."""
        return F.relu(x).square()


ACTIVATIONS = {"gelu": GELU, "relu2": SquaredReLU}


class MLP(nn.Module):
    """width -> 4 width -> width.

    Args:
        width: channels of the residual stream.
        dropout: probability of dropping an output channel.
        activation: between the two products: "gelu" or "relu2", ReLU squared.
    """

    def __init__(self, width: int, *, dropout: float, activation: str = "gelu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"model.activation must be {' or '.join(ACTIVATIONS)}, got {activation!r}")
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.activation = ACTIVATIONS[activation]()
        self.down = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n, width) -> (batch, n, width)."""
        return self.dropout(self.down(self.activation(self.up(x))))


class Block(Protocol):
    """A layer of the model: an nn.Module, built from width, num_layers, attention and mlp, which it initialises.

    The residual stream is (batch, n, width), in the dtype of the weights. It is handed on in two parts whose sum it is,
    so that a block may leave its last addition to the norm that reads it.

    Attributes:
        attention: the block's attention, whose ``inner`` is measured while training.
    """

    attention: SelfAttention

    @staticmethod
    def final_norm(width: int) -> nn.Module:
        """What the stream, (batch, n, width), goes through after the last block; of the same shape behind it."""

    def forward(self, x: Tensor, branch: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        """The stream x + branch, branch None for zero, before and after the block.

        Args:
            x: (batch, n, width).
            branch: the same, possibly in a lower dtype, or None.
            cache: keys and values of the positions before these n, which join it; None to start at position 0.
        """


class PreNormBlock(nn.Module):
    """x + f(norm(x)) for attention and MLP.

    Weights are initialised with variance 1 / fan_in, whatever the width; the projections back into the residual stream
    smaller by sqrt(2 num_layers), so that the stream's variance does not grow with depth (Radford et al. 2019,
    section 2.3).
    """

    def __init__(self, width: int, num_layers: int, *, attention: SelfAttention, mlp: MLP):
        super().__init__()
        self.attention_norm = AddNorm(width)
        self.attention = attention
        self.mlp_norm = AddNorm(width)
        self.mlp = mlp
        self._init_weights(num_layers)

    @staticmethod
    def final_norm(width: int) -> nn.Module:
        """The norm between the last block and the head: the stream itself is never normalised before it."""
        return nn.LayerNorm(width, bias=False)

    def _init_weights(self, num_layers: int) -> None:
        for linear in (self.attention.qkv, self.mlp.up):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (self.attention.out, self.mlp.down):
            nn.init.normal_(linear.weight, std=(2 * num_layers * linear.in_features) ** -0.5)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream x + branch, both (batch, n, width), None for zero -> the same: the next norm is to add them."""
        x, y = self.attention_norm(x, branch)
        x, y = self.mlp_norm(x, self.attention(y, cache))
        return x, self.mlp(y)


class PostNormBlock(nn.Module):
    """norm(alpha x + f(x)) for attention and MLP: DeepNorm (Wang et al. 2022, arXiv:2203.00555, section 4).

    For a decoder of N layers alpha = (2N)^(1/4), and Xavier initialisation has gain beta = (8N)^(-1/4) for the weights
    of values, outputs and MLP, and gain 1 for those of queries and keys.
    """

    def __init__(self, width: int, num_layers: int, *, attention: SelfAttention, mlp: MLP):
        super().__init__()
        self.alpha = (2 * num_layers) ** 0.25
        self.attention = attention
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.mlp = mlp
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self._init_weights(num_layers)

    @staticmethod
    def final_norm(width: int) -> nn.Module:
        """Nothing: the last block's output is normalised already."""
        del width
        return nn.Identity()

    def _init_weights(self, num_layers: int) -> None:
        beta = (8 * num_layers) ** -0.25
        q, k, v = self.attention.qkv.weight.detach().split(self.attention.sizes)  # views of the fused weight
        for weight, gain in ((q, 1.0), (k, 1.0), (v, beta)):
            nn.init.xavier_normal_(weight, gain=gain)
        for linear in (self.attention.out, self.mlp.up, self.mlp.down):
            nn.init.xavier_normal_(linear.weight, gain=beta)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As ``PreNormBlock.forward``, but nothing is left to be added: branch is None, in and out."""
        del branch
        x = self.attention_norm(self.alpha * x + self.attention(x, cache))
        return self.mlp_norm(self.alpha * x + self.mlp(x)), None
