"""The optimizer and its schedule."""

import math
from typing import Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


class OptimizerBuilder(Protocol):
    """How a model is optimised, apart from any model: what optimizer=OPTION builds.

    Attributes:
        lr: the peak learning rate, of all parameters.
    """

    lr: float

    def build(self, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """An optimizer of every parameter of model, and its scheduler, which is stepped after every optimizer step.

        The optimizer keeps what it remembers in its state_dict, and its settings in its groups: a resumed run restores
        the first, and takes the second from the configuration.
        """

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0: what the scheduler sets."""


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with a linear warm-up, then a cosine or linear decay.

    Args:
        lr: the peak learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: applied to weights of matrix products only, not to embeddings, norms or attention scales.
        warmup_steps: steps from 0 to lr.
        decay: "cosine" or "linear", from lr to final_lr_fraction * lr at max_steps.
        final_lr_fraction: in [0, 1].
        max_steps: the length of the schedule, in optimizer steps.
    """

    def __init__(
        self,
        lr: float,
        betas: list[float],
        eps: float,
        weight_decay: float,
        warmup_steps: int,
        decay: str,
        final_lr_fraction: float,
        max_steps: int,
    ):
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be a positive number, got {lr}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {list(betas)}")
        if eps <= 0:
            raise ValueError(f"optimizer.eps must be positive, got {eps}")
        if weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay must be at least 0, got {weight_decay}")
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        if warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be at least 0, got {warmup_steps}")
        if decay not in ("cosine", "linear"):
            raise ValueError(f"optimizer.decay must be cosine or linear, got {decay!r}")
        if not 0 <= final_lr_fraction <= 1:
            raise ValueError(f"optimizer.final_lr_fraction must be in [0, 1], got {final_lr_fraction}")
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        # A short trial run keeps the shape of the schedule: never more than a tenth of it is warm-up.
        self.warmup_steps = min(warmup_steps, max_steps // 10)
        self.decay, self.final_lr_fraction, self.max_steps = decay, final_lr_fraction, max_steps

    def build(self, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer of the model's parameters and the scheduler that is stepped once an optimizer step."""
        decayed = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
        decayed -= {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}  # tied head
        rest = [parameter for parameter in model.parameters() if parameter not in decayed]
        groups = [
            {"params": [parameter for parameter in model.parameters() if parameter in decayed]},
            {"params": rest, "weight_decay": 0.0},
        ]
        on_cuda = rest[0].is_cuda
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=on_cuda
        )
        return optimizer, LambdaLR(optimizer, self.lr_fraction)

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        return self.lr * self.lr_fraction(step)

    def lr_fraction(self, step: int) -> float:
        """The learning rate of optimizer step ``step`` (from 0), as a fraction of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        remaining = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * remaining
