"""Rotary position embedding of the queries and keys in a packed projection."""

import torch
from torch import Tensor, nn

from models.fused import serves
from models.fused.rotate import RotateByTriton


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34) of adjacent pairs of channels.

    Adjacent pairs (2i, 2i + 1) never straddle a group of even size, so that rotating before the library's
    normalisation equals rotating after it, grouped or not. The half-split pairing has that only for one group.

    A model that is compiled for CUDA rotates by a Triton kernel (models/fused/rotate.py). It needs what torch.compile
    needs anyway, and reads and writes every channel once, which Inductor's code for pairs does not. Everything else,
    float64 too, rotates by ``rotate``, which says what is meant.
    """

    def __init__(self, head_dim: int, seq_len: int, base: float = 10_000.0):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"model.positions=rotary needs an even head_dim, got {head_dim}")
        self.head_dim, self.seq_len, self.base = head_dim, seq_len, base
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(seq_len, head_dim // 2), persistent=False)
        self.fill()

    def fill(self, device: torch.device | None = None) -> None:
        """Computes the tables (seq_len, head_dim / 2) anew, on another device if one is given.

        They are no weights and in no checkpoint, so a model that was built on the meta device needs this once it has
        memory: ``to_empty`` does it below, ``GPT.load_state_dict`` does where it assigns the weights.
        """
        if device is not None:
            self.cos, self.sin = (torch.empty_like(table, device=device) for table in (self.cos, self.sin))
        frequency = self.base ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim)
        angle = torch.outer(torch.arange(self.seq_len, dtype=torch.float64, device="cpu"), frequency)
        self.cos.copy_(angle.cos().float())
        self.sin.copy_(angle.sin().float())

    def _apply(self, *arguments, **options) -> nn.Module:
        super()._apply(*arguments, **options)
        self.fill()  # the same values after to(), and right ones after to_empty()
        return self

    def forward(self, qkv: Tensor, num_heads: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Splits qkv (batch, n, num_heads + 2 num_kv_heads, head_dim), rotating q and k as positions start ...

        Returns:
            q (batch, n, num_heads, head_dim), and k and v (batch, n, num_kv_heads, head_dim); v is a view of qkv.
        """
        positions = slice(start, start + qkv.shape[1])
        cos, sin = self.cos[positions], self.sin[positions]
        num_kv_heads = (qkv.shape[2] - num_heads) // 2
        if serves(qkv):
            return RotateByTriton.apply(qkv, cos, sin, num_heads, num_kv_heads)
        qk, v = qkv.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
        q, k = rotate(qk, cos, sin).split((num_heads, num_kv_heads), dim=2)
        return q, k, v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of channels of x (batch, n, heads, head_dim) by its angle; cos and sin (n, head_dim / 2)."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))  # once: else each product is rounded
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]  # (n, 1, head_dim / 2), for all heads
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
