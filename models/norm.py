"""Layer norm of a residual stream after the addition of a branch."""

import torch
from torch import Tensor, nn

from models.fused import serves
from models.fused.add_norm import AddNormByTriton


class AddNorm(nn.LayerNorm):
    """x + branch, and its layer norm (Ba et al. 2016, arXiv:1607.06450) without a bias.

    A model that is compiled for CUDA does both in one Triton kernel each way (models/fused/add_norm.py), which reads
    and writes every tensor once. Inductor's code rounds the stream's gradient to the branch's dtype in a pass of its
    own, and adds earlier branches again. Everything else, float64 too, follows the formula.
    """

    def __init__(self, width: int):
        super().__init__(width, bias=False)

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and branch (..., width), None for zero -> x + branch in x's dtype, and its norm."""
        if branch is None:
            return x, super().forward(x)
        if serves(x):
            # under autocast the projection that reads the norm would round it to that dtype
            dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
            return AddNormByTriton.apply(x, branch, self.weight, self.eps, dtype)
        x = (x + branch).to(x.dtype)
        return x, super().forward(x)
