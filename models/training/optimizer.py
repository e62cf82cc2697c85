"""The optimizers, each with its schedule."""

import math
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from models.attention import SelfAttention
from models.training.muon import MATRICES, MuonAndAdamW
from models.training.schedule import Schedule


class OptimizerBuilder(Protocol):
    """How a model is optimised, apart from any model: what optimizer=OPTION builds.

    One that a run by time (trainer.budget_minutes) can use also has ``schedule``, a ``Schedule``, by which all of its
    learning rates go.

    Attributes:
        lr: the peak learning rate of the optimizer's first group, which is the one that is logged.
    """

    lr: float

    def build(self, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """An optimizer of every parameter of model, and its scheduler, which is stepped after every optimizer step.

        The optimizer keeps what it remembers in its state_dict, and its settings in its groups: a resumed run restores
        the first, and takes the second from the configuration.
        """

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0: what the scheduler sets for the first group."""


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) with a linear warm-up, then a cosine or linear decay.

    Args:
        lr: the peak learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: applied to weights of matrix products only, not to embeddings, norms or attention scales.
        warmup_steps, decay, final_lr_fraction, max_steps, cooldown_fraction, rates: as in ``Schedule``.
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
        cooldown_fraction: float = 1.0,
        rates: str | None = None,
    ):
        _check_rate("lr", lr)
        _check_adam(betas, eps, weight_decay)
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.schedule = Schedule(
            warmup_steps=warmup_steps,
            decay=decay,
            final_lr_fraction=final_lr_fraction,
            cooldown_fraction=cooldown_fraction,
            max_steps=max_steps,
            rates=rates,
        )

    def build(self, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer of the model's parameters and the scheduler that is stepped once an optimizer step."""
        decayed = _linear_weights(model)
        rest = [parameter for parameter in model.parameters() if parameter not in decayed]
        groups = [
            {"params": [parameter for parameter in model.parameters() if parameter in decayed]},
            {"params": rest, "weight_decay": 0.0},
        ]
        on_cuda = rest[0].is_cuda
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=on_cuda
        )
        return optimizer, LambdaLR(optimizer, self.schedule.fraction)

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        return self.lr * self.schedule.fraction(step)


def place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Puts AdamW's counts of steps where its kernels read them: beside the parameter if it is fused, else on the CPU.

    A checkpoint has them where the run that wrote it needed them, and neither Lightning nor PyTorch moves them.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device if group.get("fused") else "cpu")


class Muon:
    """Muon for the matrices of the blocks, AdamW for all else: see ``MuonAndAdamW``. All rates have one schedule.

    Args:
        lr: the peak learning rate of the matrices, on AdamW's scale.
        momentum: decay rate of the matrices' momentum, Nesterov's.
        weight_decay: of the matrices; nothing else decays.
        embedding_lr: of embeddings, of a head that shares their weights, too.
        head_lr: of the head.
        gain_lr: of everything else: gains of norms, scales of attention, networks over distances.
        betas, eps: AdamW's, as in ``AdamW``.
        warmup_steps, decay, final_lr_fraction, max_steps, cooldown_fraction, rates: as in ``Schedule``.
    """

    def __init__(
        self,
        lr: float,
        momentum: float,
        weight_decay: float,
        embedding_lr: float,
        head_lr: float,
        gain_lr: float,
        betas: list[float],
        eps: float,
        warmup_steps: int,
        decay: str,
        final_lr_fraction: float,
        max_steps: int,
        cooldown_fraction: float = 1.0,
        rates: str | None = None,
    ):
        _check_rate("lr", lr)
        for name, rate in (("embedding_lr", embedding_lr), ("head_lr", head_lr), ("gain_lr", gain_lr)):
            _check_rate(f"optimizer.{name}", rate)
        if not 0 <= momentum < 1:
            raise ValueError(f"optimizer.momentum must be in [0, 1), got {momentum}")
        _check_adam(betas, eps, weight_decay)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.rates = {"embeddings": embedding_lr, "head": head_lr, "gains": gain_lr}
        self.betas, self.eps = tuple(betas), eps
        self.schedule = Schedule(
            warmup_steps=warmup_steps,
            decay=decay,
            final_lr_fraction=final_lr_fraction,
            cooldown_fraction=cooldown_fraction,
            max_steps=max_steps,
            rates=rates,
        )

    def build(self, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer of the model's parameters and the scheduler that is stepped once an optimizer step."""
        roles = roles_of(model)
        fused = {module.qkv.weight: module.sizes for module in model.modules() if isinstance(module, SelfAttention)}
        matrices = roles.pop(MATRICES)
        groups: list[dict[str, Any]] = [
            {
                "params": matrices,
                "role": MATRICES,
                "splits": [tuple(fused.get(weight, (len(weight),))) for weight in matrices],
                "lr": self.lr,
                "momentum": self.momentum,
                "weight_decay": self.weight_decay,
            }
        ]
        for role, parameters in roles.items():
            adamw = {"lr": self.rates[role], "betas": self.betas, "eps": self.eps, "weight_decay": 0.0}
            groups.append({"params": parameters, "role": role, **adamw})
        optimizer = MuonAndAdamW(groups, fused=matrices[0].is_cuda)
        return optimizer, LambdaLR(optimizer, self.schedule.fraction)

    def lr_at(self, step: int) -> float:
        """The learning rate of the matrices at optimizer step ``step``, counted from 0."""
        return self.lr * self.schedule.fraction(step)


def roles_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter of a model once, by what it is for; roles that nothing has are left out.

    "matrices" are weights of the blocks' matrix products, "head" is the last one's, which makes logits: its rows are
    bytes, of different meaning and frequency, as those of "embeddings". "gains" are all others: vectors, and the
    networks over distances.
    """
    head = getattr(model, "head", None)
    linear = _linear_weights(model)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    roles: dict[str, list[nn.Parameter]] = {MATRICES: [], "embeddings": [], "head": [], "gains": []}
    for parameter in model.parameters():
        if parameter in embeddings:
            role = "embeddings"
        elif head is not None and parameter is head.weight:
            role = "head"
        else:
            role = MATRICES if parameter in linear else "gains"
        roles[role].append(parameter)
    return {role: parameters for role, parameters in roles.items() if parameters}


def _linear_weights(model: nn.Module) -> set[nn.Parameter]:
    """The weights of matrix products, but for one that an embedding shares."""
    weights = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return weights - {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}


def _check_rate(name: str, rate: float) -> None:
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"{name} must be a positive number, got {rate}")


def _check_adam(betas: list[float], eps: float, weight_decay: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {list(betas)}")
    if eps <= 0:
        raise ValueError(f"optimizer.eps must be positive, got {eps}")
    if weight_decay < 0:
        raise ValueError(f"optimizer.weight_decay must be at least 0, got {weight_decay}")
