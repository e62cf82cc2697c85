"""Cosine-similarity attention that never materialises the score matrix.

Queries and keys are l2-normalised, so every logit is bounded by `scale * groups` and the softmax needs
no running maximum (Henry et al. 2020, "Query-Key Normalization for Transformers", arXiv:2010.04245).
"""

from .interface import flash_cosine_sim_attention, plain_cosine_sim_attention
from .reference import l2norm_tensors

__version__ = "0.1.0"

__all__ = ["__version__", "flash_cosine_sim_attention", "l2norm_tensors", "plain_cosine_sim_attention"]
