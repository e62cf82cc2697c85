"""Functions shaped like FlashAttention's, for models with QK-norm: q and k come before their RMS norm, not after it.

The module has the name that such functions are imported from: `flash_attn.flash_attn_interface` in FlashAttention 2,
`flash_attn_interface` in FlashAttention 3. Names, layout and alignment are FlashAttention's, and so is softmax_scale:
it stays what the model passes today, after its norms, and what changes is that the model leaves its norms out.

After q, k, v (and what says where packed sequences end) FlashAttention 2, 3 and 4 have their arguments in three
different orders; here they are keyword-only, so that none is taken for another.

There is no flash_attn_with_kvcache: with several queries a sequence and caches filled to different lengths it is
neither a key mask nor packed sequences. docs/doors.md says how to decode.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .interface import check_not_nested, flash_cosine_sim_attention, flash_cosine_sim_attention_varlen
from .scales import scale_by_names

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

# What FlashAttention has and this has not: the value that asks for nothing, and what to do instead.
_ABSENT: dict[str, tuple[float | None, str]] = {
    "dropout_p": (0.0, "probabilities cannot be dropped; drop outputs instead"),
    "softcap": (0.0, "logits are not capped; the scale bounds them"),
    "attention_chunk": (0, "there are no chunks; packed sequences of that length are"),
    "qv": (None, "there is no second query"),
    "q_descale": (None, "there is no 8-bit format"),
    "k_descale": (None, "there is no 8-bit format"),
    "v_descale": (None, "there is no 8-bit format"),
    "seqused_q": (None, "sequences must fill their rows; cu_seqlens_q says where they end"),
    "seqused_k": (None, "sequences must fill their rows; cu_seqlens_k says where they end"),
    "block_table": (None, "there are no paged caches"),
}


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int = 0,
    num_splits: int = 1,  # noqa: ARG001
    pack_gqa: bool | None = None,  # noqa: ARG001
    sm_margin: int = 0,  # noqa: ARG001
    gain_q: float | Tensor = 1.0,
    gain_k: float | Tensor = 1.0,
    l2norm_qk: bool = True,
    backend: str = "auto",
) -> Tensor:
    """softmax(softmax_scale * (gain_q rms_norm(q)) (gain_k rms_norm(k))^T) v per head: QK-norm and attention in one.

    What a model computes that calls FlashAttention's flash_attn_func behind RMS norms without weights: cosine-sim
    attention with the scale softmax_scale * head_dim * gain_q * gain_k. The norms have no epsilon.

    Args:
        q: (batch, seq_len_q, num_heads, head_dim), rotated if the model rotates, and not normalised. Any strides will
            do, and nothing is copied.
        k, v: (batch, seq_len_k, num_kv_heads, head_dim) where num_kv_heads divides num_heads.
        softmax_scale: what the model passes to FlashAttention, after its norms; None is 1 / sqrt(head_dim). A number,
            or a tensor of shape () or (num_heads,), which may be learned.
        causal: query i sees key j iff j <= i + seq_len_k - seq_len_q.
        window_size: (left, right), a sliding window: query i sees the keys from i + off - left to i + off + right, both
            included, where off = seq_len_k - seq_len_q. -1 and None are unlimited.
        gain_q, gain_k: what the model multiplies its normalised q and k by: a number, or a tensor of shape () or
            (num_heads,), gain_k also (num_kv_heads,), which may be learned. A norm to length 1, x / |x|, is an RMS norm
            with the gain head_dim ** -0.5.
        l2norm_qk: False takes q and k as they are: normalised before, and changed since in a way that does not keep
            their lengths. Logits are then softmax_scale * gain_q * gain_k * q . k, as FlashAttention's, and nothing
            bounds them: keep them at 60 or below, beyond it row sums may overflow in the CUDA kernels.
        backend: as in flash_cosine_sim_attention.
        deterministic: True needs torch.use_deterministic_algorithms(True), on until the backward pass has run, and
            raises without it. The forward pass repeats bit for bit anyway.
        return_attn_probs: True raises; return_partials of flash_cosine_sim_attention has the sums of rows.
        alibi_slopes: float32 (num_heads,) or (batch, num_heads); -slope * |i + off - j| is added to the logits, with
            off as above.
        dropout_p, softcap, qv, q_descale, k_descale, v_descale, attention_chunk: not there; what is not
            FlashAttention's default raises.
        num_splits, pack_gqa, sm_margin: how FlashAttention's kernels share their work, not what they compute; taken,
            and not used.

    Returns:
        The output, contiguous, in q's shape, (batch, seq_len_q, num_heads, head_dim), and in q's dtype, or autocast's.

    Raises:
        ValueError: something is asked for that is not there, softmax_scale * head_dim * gain_q * gain_k is not above 0
            and at most 60, or a shape, a device or the back end is not as above.
        TypeError, ImportError, NotImplementedError, RuntimeError: as in flash_cosine_sim_attention.
    """
    off = qv is q_descale is k_descale is v_descale is None
    if not off or dropout_p or softcap or attention_chunk:
        _refuse(
            dropout_p=dropout_p, softcap=softcap, attention_chunk=attention_chunk, qv=qv, q_descale=q_descale,
            k_descale=k_descale, v_descale=v_descale,
        )  # fmt: skip
    _check_results(deterministic, return_attn_probs)
    _check_layout(q, k, v, ("batch", "seq_len", "heads", "head_dim"))
    o = flash_cosine_sim_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        scale=_scale(q, k, softmax_scale, gain_q, gain_k, l2norm_qk),
        causal=causal,
        l2norm_qk=l2norm_qk,
        window_size=_window(window_size),
        alibi_slopes=alibi_slopes,
        backend=backend,
    )
    return o.transpose(1, 2).contiguous()  # the kernels lay it out so already


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int = 0,
    num_splits: int = 1,  # noqa: ARG001
    pack_gqa: bool | None = None,  # noqa: ARG001
    sm_margin: int = 0,  # noqa: ARG001
    gain_q: float | Tensor = 1.0,
    gain_k: float | Tensor = 1.0,
    l2norm_qk: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Like flash_attn_func, of sequences of different lengths, packed one behind the other.

    Each attends to itself alone; causal and window_size count inside each.

    Args:
        q: (total_q, num_heads, head_dim), the rows of all sequences. Any strides will do. Like k, v and the gradient of
            the output it must be finite in all rows, those behind the last sequence included.
        k, v: (total_k, num_kv_heads, head_dim) where num_kv_heads divides num_heads.
        cu_seqlens_q, cu_seqlens_k: int32 (num_sequences + 1,) on q's device: sequence s has the rows from cu_seqlens[s]
            up to cu_seqlens[s + 1]. flash_cosine_sim_attention_varlen says what is checked, and when.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length.
        alibi_slopes: float32 (num_heads,), the same for all sequences.
        block_table, seqused_q, seqused_k: not there; what is not None raises.

    Returns:
        The output, contiguous, in q's shape, (total_q, num_heads, head_dim), and in q's dtype, or autocast's.

    Raises:
        ValueError, TypeError, ImportError, NotImplementedError, RuntimeError: as there.
    """
    _refuse(
        dropout_p=dropout_p, softcap=softcap, block_table=block_table, seqused_q=seqused_q, seqused_k=seqused_k,
        attention_chunk=attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    _check_results(deterministic, return_attn_probs)
    _check_layout(q, k, v, ("total", "heads", "head_dim"))
    return flash_cosine_sim_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=_scale(q, k, softmax_scale, gain_q, gain_k, l2norm_qk),
        causal=causal,
        l2norm_qk=l2norm_qk,
        window_size=_window(window_size),
        alibi_slopes=alibi_slopes,
        backend=backend,
    )


def _scale(
    q: Tensor, k: Tensor, softmax_scale: float | Tensor | None, gain_q: float | Tensor, gain_k: float | Tensor,
    l2norm_qk: bool,
) -> float | Tensor:  # fmt: skip
    heads = q.shape[-2], k.shape[-2]
    return scale_by_names("softmax_scale", q.shape[-1], softmax_scale, gain_q, gain_k, heads, l2norm_qk)


def _refuse(**given: Any) -> None:
    """Raises ValueError for the first argument that asks for something; None never does."""
    for name, value in given.items():
        off, instead = _ABSENT[name]
        if value is not None and not (isinstance(value, numbers.Real) and value == off):
            got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} must be {off}, got {got}: {instead}")


def _check_results(deterministic: bool, return_attn_probs: bool) -> None:
    if return_attn_probs:
        raise ValueError(
            f"return_attn_probs must be False, got {return_attn_probs!r}: probabilities are never all in memory; "
            "flash_cosine_sim_attention has return_partials, with the sum of each row"
        )
    check_deterministic(deterministic)


def check_deterministic(deterministic: bool | None) -> None:
    if deterministic and not torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "deterministic=True needs torch.use_deterministic_algorithms(True), which must stay on until the backward "
            "pass has run: that pass reads it"
        )


def _check_layout(q: Tensor, k: Tensor, v: Tensor, dimensions: tuple[str, ...]) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_not_nested(name, tensor)
        if tensor.ndim != len(dimensions):
            raise ValueError(f"{name} must be ({', '.join(dimensions)}), got {tuple(tensor.shape)}")
    # Found here, where shapes are as they were given.
    shape_q, shape_k = q.shape, k.shape
    if shape_k != v.shape or shape_k[-1] != shape_q[-1] or (q.ndim == 4 and shape_k[0] != shape_q[0]):
        same = "batch and head_dim" if q.ndim == 4 else "head_dim"
        raise ValueError(
            f"k and v must have one shape, with q's {same}; got q: {tuple(shape_q)}, k: {tuple(shape_k)}, "
            f"v: {tuple(v.shape)}"
        )
    num_heads, num_kv_heads = shape_q[-2], shape_k[-2]
    if num_heads != num_kv_heads and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(
            f"num_kv_heads must divide num_heads {num_heads}, got {num_kv_heads} (q: {tuple(shape_q)}, "
            f"k: {tuple(shape_k)})"
        )


def _window(window_size: Sequence[int | None] | None) -> Sequence[int] | None:
    """With -1 for None, as FlashAttention 4 has it; the rest is checked where it is used."""
    if not isinstance(window_size, (tuple, list)):
        return window_size  # type: ignore[return-value]  # which raises for anything but None
    if window_size == (-1, -1):  # the default: spares checking it
        return None
    return tuple(-1 if side is None else side for side in window_size)
