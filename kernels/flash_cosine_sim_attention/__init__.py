"""Cosine-similarity attention that never materialises the score matrix.

Queries and keys are l2-normalised, so every logit is bounded by `scale * groups` and the softmax needs
no running maximum (Henry et al. 2020, "Query-Key Normalization for Transformers", arXiv:2010.04245).
"""

from . import flash_attn_interface as flash_attn_interface
from . import functional as functional
from .identity import __version__, warn_of_others
from .interface import (
    flash_cosine_sim_attention,
    flash_cosine_sim_attention_varlen,
    plain_cosine_sim_attention,
)
from .reference import l2norm_tensors
from .scales import cosine_scale

__all__ = [
    "__version__",
    "cosine_scale",
    "flash_cosine_sim_attention",
    "flash_cosine_sim_attention_varlen",
    "l2norm_tensors",
    "plain_cosine_sim_attention",
]

warn_of_others()
