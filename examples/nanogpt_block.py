"""A nanoGPT-style block whose attention is replaced by cosine-sim attention: python examples/nanogpt_block.py

What changes in CausalSelfAttention, besides the import; everything else, c_attn and c_proj included, stays:

    in __init__, one line more: a learned scale for each head (its logarithm, so that it stays positive)
    +   self.log_scale = nn.Parameter(torch.full((config.n_head,), math.log(12.0)))

    in forward (here in attend, where nothing else is), one line replaced by two
    -   y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    +   scale = self.log_scale.exp().clamp(max=60)
    +   y = flash_cosine_sim_attention(q, k, v, scale=scale, causal=True)

The optimizer must not decay log_scale, as that pulls every scale to 1; nanoGPT decays matrices only. Above 60 a scale
has no gradient and stays there: in a long training clamp log_scale itself after each step, as char_gpt.py does. Dropout
of the attention's probabilities (nanoGPT's `dropout` within SDPA, 0 by default) has no counterpart; dropout of outputs
stays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_cosine_sim_attention import flash_cosine_sim_attention


@dataclass
class Config:
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0


class CausalSelfAttention(nn.Module):
    """Regular attention, before the change."""

    def __init__(self, config: Config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_head must divide n_embd = {config.n_embd}, got {config.n_head}")
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seq_len, n_embd) -> the same shape."""
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        y = self.attend(q, k, v)  # all (batch, n_head, seq_len, head_dim)
        return self.dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CosineCausalSelfAttention(CausalSelfAttention):
    """Cosine-sim attention, after the change."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.log_scale = nn.Parameter(torch.full((config.n_head,), math.log(12.0)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = self.log_scale.exp().clamp(max=60)  # the library's bound
        return flash_cosine_sim_attention(q, k, v, scale=scale, causal=True)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: Config, attention: Callable[[Config], nn.Module]):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NormalisedByHand(CosineCausalSelfAttention):
    """The same by SDPA: l2-normalise q and k, multiply the logits by the scale (through q: SDPA takes numbers only)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = F.normalize(q, dim=-1) * self.log_scale.exp()[:, None, None]
        return F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, is_causal=True, scale=1.0)


class QKNorm(CosineCausalSelfAttention):
    """QK-norm as many GPTs have it: RMS norm of q and k without weights, then SDPA with its scale 1 / sqrt(head_dim).

    rms_norm(q) = sqrt(d) q / |q| for head_dim d, likewise k: the logits are d cos(q, k) / sqrt(d) = sqrt(d) cos(q, k).
    That is cosine-sim attention with scale sqrt(d); at head_dim 64 the library's default, 8.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def results(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """The block's output, and the gradient of x; the parameters' gradients are left in the block."""
    x = x.clone().requires_grad_()
    y = block(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def largest_difference(block: Block, other: Block, x: Tensor) -> float:
    """Between the outputs, or between the gradients of x as a share of the largest one, whichever is larger."""
    (y, dx), (other_y, other_dx) = results(block, x), results(other, x)
    return max((y - other_y).abs().max().item(), ((dx - other_dx).abs().max() / dx.abs().max()).item())


def main() -> None:
    torch.manual_seed(0)
    device, config = "cuda" if torch.cuda.is_available() else "cpu", Config()
    kinds = CausalSelfAttention, CosineCausalSelfAttention, NormalisedByHand, QKNorm
    regular, cosine, by_hand, qk_norm = (Block(config, kind).to(device) for kind in kinds)
    x = torch.randn(2, 256, config.n_embd, device=device)
    for name, block in (("regular", regular), ("cosine-sim", cosine)):
        y, _ = results(block, x)
        trained = [p.grad is not None and p.grad.norm().item() > 0 for p in block.parameters()]
        print(f"{name}: output {tuple(y.shape)}, {sum(trained)} of {len(trained)} parameters have a gradient")

    with torch.no_grad():  # scales as they may be after training
        cosine.attn.log_scale.copy_(torch.linspace(4, 30, config.n_head).log())
    by_hand.load_state_dict(cosine.state_dict())
    print(f"l2norm by hand and SDPA, same scales: {largest_difference(cosine, by_hand, x):.1e} apart")

    with torch.no_grad():
        cosine.attn.log_scale.fill_(math.log(config.n_embd / config.n_head) / 2)
    qk_norm.load_state_dict(cosine.state_dict())
    print(f"QK-norm (RMS) and SDPA, scale sqrt(head_dim): {largest_difference(cosine, qk_norm, x):.1e} apart")

    regular.load_state_dict(cosine.state_dict(), strict=False)  # all but log_scale
    print(f"for comparison, regular attention of the same weights: {largest_difference(cosine, regular, x):.1e} apart")


if __name__ == "__main__":
    main()
