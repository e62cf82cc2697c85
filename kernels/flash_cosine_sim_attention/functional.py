"""A function shaped like torch.nn.functional's, for models with QK-norm: q and k come before their RMS norm.

Names, order and defaults are those of torch.nn.functional.scaled_dot_product_attention, and `scale` stays what the
model passes today, after its norms.
"""

import math

import torch
from torch import Tensor

from .interface import check_flag, check_no_causal_bias, check_not_nested, flash_cosine_sim_attention
from .reference import dtype_or_type
from .scales import scale_by_names

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    gain_q: float | Tensor = 1.0,
    gain_k: float | Tensor = 1.0,
    l2norm_qk: bool = True,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * (gain_q rms_norm(query)) (gain_k rms_norm(key))^T + attn_mask) value: QK-norm and SDPA in one.

    What a model computes that calls torch's function behind RMS norms without weights: cosine-sim attention with the
    scale `scale` * head_dim * gain_q * gain_k. The norms have no epsilon. A query that sees no key yields zeros.

    Args:
        query: (batch, num_heads, seq_len_q, head_dim), rotated if the model rotates, and not normalised. Any strides
            will do.
        key, value: (batch, num_kv_heads, seq_len_k, head_dim).
        attn_mask: broadcastable to (batch, num_heads, seq_len_q, seq_len_k). bool, True = attend: one by key alone,
            (batch or 1, 1, 1, seq_len_k) or (1, seq_len_k), goes to the kernels as a key mask; any other becomes a bias
            of its size, 0 and -inf. Of a floating dtype: a bias, added to the logits, with a gradient, and rounded to
            query's dtype. flash_cosine_sim_attention says how large it may be beside the scale, and that the CUDA
            kernels take a query whose logits all are below -87 for one that sees no key.
        dropout_p: not there; above 0 raises.
        is_causal: aligned top-left, as torch's: query i sees key j iff j <= i. Not together with attn_mask.
        scale: what the model passes to torch's function, after its norms; None is 1 / sqrt(head_dim). A number, or a
            tensor of shape () or (num_heads,), which may be learned.
        enable_gqa: True takes a num_kv_heads that divides num_heads; with False they are equal.
        gain_q, gain_k: what the model multiplies its normalised query and key by: a number, or a tensor of shape () or
            (num_heads,), gain_k also (num_kv_heads,), which may be learned. A norm to length 1, x / |x|, is an RMS norm
            with the gain head_dim ** -0.5.
        l2norm_qk: False takes query and key as they are, as in flash_attn_func.
        backend: as in flash_cosine_sim_attention.

    Returns:
        The output in query's shape, (batch, num_heads, seq_len_q, head_dim), and in query's dtype, or autocast's.

    Raises:
        ValueError: dropout_p is above 0, attn_mask comes together with is_causal, scale * head_dim * gain_q * gain_k is
            not above 0 and at most 60, or a shape, a device or the back end is not as above.
        TypeError: a type or a dtype is not as above; a flag must be a bool.
        ImportError, NotImplementedError, RuntimeError: as in flash_cosine_sim_attention.
    """
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}: probabilities cannot be dropped; drop outputs instead")
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    _check_layout(query, key, value, enable_gqa)
    seq_len_q, seq_len_k = query.shape[-2], key.shape[-2]
    mask, attn_bias = _as_mask_or_bias(attn_mask, query, seq_len_k, is_causal)
    window_size = None
    if is_causal and seq_len_k > seq_len_q:  # no query sees the keys behind the diagonal
        key, value = key[:, :, :seq_len_q], value[:, :, :seq_len_q]
    elif is_causal and seq_len_k < seq_len_q:
        # Aligned bottom-right, query i is at key i + seq_len_k - seq_len_q, and key i is so many to its right.
        window_size, is_causal = (-1, seq_len_q - seq_len_k), False
    return flash_cosine_sim_attention(
        query,
        key,
        value,
        mask,
        attn_bias,
        scale_by_names("scale", query.shape[-1], scale, gain_q, gain_k, (query.shape[1], key.shape[1]), l2norm_qk),
        causal=is_causal,
        l2norm_qk=l2norm_qk,
        window_size=window_size,
        backend=backend,
    )


def _check_layout(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_not_nested(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, seq_len, head_dim), got {tuple(tensor.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {tuple(key.shape)}, got {tuple(value.shape)}")
    if key.shape[0] != query.shape[0] or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key must have query's batch size and head_dim (query: {tuple(query.shape)}, key: {tuple(key.shape)})"
        )
    if not enable_gqa and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key must have query's {query.shape[1]} heads unless enable_gqa=True, got {key.shape[1]} "
            f"(query: {tuple(query.shape)}, key: {tuple(key.shape)})"
        )


def _as_mask_or_bias(
    attn_mask: Tensor | None, query: Tensor, seq_len_k: int, is_causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask as a key mask (batch or 1, seq_len_k), or as a 4-D bias."""
    if attn_mask is None:
        return None, None
    if is_causal:
        raise ValueError("attn_mask must be None where is_causal=True, as for torch's function; got both")
    if not isinstance(attn_mask, Tensor) or not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        raise TypeError(f"attn_mask must be a tensor, bool or of a floating dtype, got {dtype_or_type(attn_mask)}")
    instead = "is_causal=True is its upper left one, flash_cosine_sim_attention's causal=True the lower right one"
    check_no_causal_bias("attn_mask", attn_mask, instead)
    full = (*query.shape[:-1], seq_len_k)
    sizes = (1,) * (4 - attn_mask.ndim) + attn_mask.shape
    if len(sizes) > 4 or any(a != 1 and a != b for a, b in zip(sizes, full, strict=True)):
        raise ValueError(
            f"attn_mask must be broadcastable to (batch, num_heads, seq_len_q, seq_len_k) = {full}, got "
            f"{tuple(attn_mask.shape)}"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on query's device {query.device}, got {attn_mask.device}")
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if attn_mask.dtype != torch.bool:
        return None, attn_mask
    if attn_mask.shape[1] == attn_mask.shape[2] == 1:
        return attn_mask[:, 0, 0].expand(-1, seq_len_k), None
    bias = torch.zeros_like(attn_mask, dtype=query.dtype)
    return None, bias.masked_fill(~attn_mask, -math.inf)
