"""Triton kernels for a model that is compiled for CUDA: they read and write each tensor once."""

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # it comes with PyTorch's CUDA builds alone
    triton = None


def serves(x: Tensor) -> bool:
    """Whether these kernels take the place of the formula for x. Never for float64: they compute in float32."""
    return torch.compiler.is_compiling() and triton is not None and x.is_cuda and x.dtype != torch.float64
