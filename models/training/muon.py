"""Muon for the matrices of a model and AdamW for the rest, as one optimizer.

Muon (Keller Jordan 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix's gradient by a matrix of
the same singular vectors whose singular values are all about 1. The size of a step is that of AdamW's: its elements
have a root mean square of about 0.2, whatever the shape (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that
learning rates and weight decay have AdamW's scale. ``torch.optim.Muon`` does the same one matrix at a time, and cannot
split a fused projection.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Of the quintic in ``orthogonalized``: Jordan's, chosen for the steepest slope at 0 that still converges; singular
# values end between 0.7 and 1.2, which is as good as 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7
UPDATE_RMS = 0.2  # of AdamW's steps, by Liu et al.'s measurement

MATRICES = "matrices"  # the role of the groups that Muon serves


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the groups of role "matrices", ``torch.optim.AdamW`` for all others.

    Each process of a distributed run computes every step whole: gradients are equal on all, and so are the results.

    Args:
        groups: of parameters. One of role "matrices" has lr, momentum, weight_decay, and splits: for each of its
            parameters the numbers of rows of the matrices that it consists of. Others have a role of another name, lr,
            betas, eps and weight_decay.
        fused: AdamW in one kernel, for parameters on a GPU.
    """

    def __init__(self, groups: list[dict[str, Any]], *, fused: bool):
        for group in groups:
            if group["role"] == MATRICES:
                _check_splits(group)
            else:
                group["fused"] = fused
        super().__init__(groups, {})
        self._share_with_adamw()

    def _share_with_adamw(self) -> None:
        """An AdamW that works on the groups and on the state of this optimizer: there is one of each."""
        self._adamw = torch.optim.AdamW([group for group in self.param_groups if group["role"] != MATRICES])
        self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what ``load_state_dict`` ends with: groups and state are other objects from here on."""
        super().__setstate__(state)
        self._share_with_adamw()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient; returns what closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.step()
        for group in self.param_groups:
            if group["role"] == MATRICES:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        having = [(weight, rows) for weight, rows in zip(group["params"], group["splits"], strict=True)
                  if weight.grad is not None]  # fmt: skip
        if not having:
            return
        weights = [weight for weight, _ in having]
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        matrices = [matrix for weight, rows in having for matrix in weight.split(rows)]
        directions = [matrix for update, (_, rows) in zip(ahead, having, strict=True) for matrix in update.split(rows)]
        for size, places in _by_size(directions).items():
            steps = orthogonalized_alike([directions[place] for place in places])
            factor = UPDATE_RMS * math.sqrt(max(size))
            torch._foreach_add_([matrices[place] for place in places], steps, alpha=-group["lr"] * factor)


def _check_splits(group: dict[str, Any]) -> None:
    for weight, rows in zip(group["params"], group["splits"], strict=True):
        if weight.ndim != 2 or sum(rows) != len(weight):
            raise ValueError(
                f"Muon takes matrices whose rows the splits add up to, got the shape {tuple(weight.shape)} and the "
                f"splits {list(rows)}"
            )


def _by_size(matrices: Sequence[Tensor]) -> dict[tuple[int, int], list[int]]:
    """Which of the matrices are of each size, the smaller side first."""
    places = defaultdict(list)
    for place, matrix in enumerate(matrices):
        places[min(matrix.shape), max(matrix.shape)].append(place)
    return dict(places)


def orthogonalized_alike(matrices: Sequence[Tensor]) -> list[Tensor]:
    """``orthogonalized`` of matrices of one size, lying or standing, in one batch; of their shapes and dtype."""
    lying = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices]
    # Products in bfloat16, as Jordan has them: the iteration forgives rounding. CPUs mostly emulate it.
    dtype = torch.bfloat16 if lying[0].is_cuda else torch.float32
    done = orthogonalized(torch.stack(lying).to(dtype)).to(matrices[0].dtype)
    return [one if matrix.shape[0] <= matrix.shape[1] else one.mT for one, matrix in zip(done, matrices, strict=True)]


def orthogonalized(x: Tensor) -> Tensor:
    """Nearly U V^T of each U S V^T, by Newton-Schulz iterations x <- a x + b (x x^T) x + c (x x^T)^2 x.

    Not through torch.compile: that saves 0.09 ms of a step's 3.2 (docs/log/2026-12-01-muon-compiled.md).

    Args:
        x: (n, rows, columns), rows <= columns: products are as large as the smaller side. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)  # singular values at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
