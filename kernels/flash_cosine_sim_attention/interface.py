"""The public functions: validate once, bring the arguments to one form, choose the back end; nothing else."""

import logging
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import ops
from .call import Call, clipped_window
from .reference import (
    check_cu_seqlens,
    check_groups,
    compute_dtype,
    dtype_or_type,
    has_readable_values,
    reference_attention,
)
from .sdpa import sdpa_attention
from .sharding import is_dtensor, sharded_attention

BACKENDS = ("auto", "cuda", "sdpa", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ANY_DTYPES = (*DTYPES, torch.float64)  # float64 not in the kernels
MAX_HEAD_DIM = 256
# exp(60) = 2^86.6: row sums over 2^20 keys and |v| up to 2^15 still fit into float32 without any shift.
MAX_LOGIT = 60
ROUNDING = 2.0**-23  # 60 / groups may be rounded up, in float32 by as much as this
# Where PyTorch's fused attention behind an l2norm should take less time than the kernels: compute capability, and why.
# By published times of attention without the l2norm; nobody has run the kernels there.
FASTER_BY_SDPA = {
    10: "on compute capability 10.x the kernels have Ampere's instructions alone, and cuDNN's attention is published "
    "to be some 3 times as fast; backend='cuda' takes the kernels"
}
FASTER_FROM_LENGTH = 1024  # with fewer queries or keys an l2norm of its own takes longer than the attention
FASTER_TO_HEAD_DIM = 128  # which is what cuDNN's kernels for these GPUs take

Result = Tensor | tuple[Tensor, Tensor]  # the output, or numerator and denominator

logger = logging.getLogger("flash_cosine_sim_attention")
_logged_reasons: set[str] = set()
# By device index: asking a GPU in every call would cost host time.
_gpu_reasons: dict[int, str | None] = {}
_sdpa_reasons: dict[int, str | None] = {}


@overload
def flash_cosine_sim_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = ..., attn_bias: Tensor | None = ...,
    scale: float | Tensor = ..., groups: int = ..., causal: bool = ..., l2norm_qk: bool = ...,
    attn_bias_batch_dim: bool = ..., *, window_size: Sequence[int] | None = ..., distance_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., max_scale: float | None = ..., backend: str = ...,
    return_partials: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flash_cosine_sim_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = ..., attn_bias: Tensor | None = ...,
    scale: float | Tensor = ..., groups: int = ..., causal: bool = ..., l2norm_qk: bool = ...,
    attn_bias_batch_dim: bool = ..., *, window_size: Sequence[int] | None = ..., distance_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., max_scale: float | None = ..., backend: str = ...,
    return_partials: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flash_cosine_sim_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = ..., attn_bias: Tensor | None = ...,
    scale: float | Tensor = ..., groups: int = ..., causal: bool = ..., l2norm_qk: bool = ...,
    attn_bias_batch_dim: bool = ..., *, window_size: Sequence[int] | None = ..., distance_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., max_scale: float | None = ..., backend: str = ...,
    return_partials: bool,
) -> Result: ...  # fmt: skip
def flash_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | Tensor = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
    *,
    window_size: Sequence[int] | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    max_scale: float | None = None,
    backend: str = "auto",
    return_partials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * l2norm(q) l2norm(k)^T + bias) v per head, without materialising the scores.

    Cosine-similarity attention after Henry et al. 2020 (arXiv:2010.04245), in float32, float16 and bfloat16. A row
    that sees no key yields zeros, with zero gradients.

    Args:
        q: (batch, num_heads, seq_len_q, head_dim), or (batch * num_heads, seq_len_q, head_dim) with k and v
            merged likewise. head_dim is a multiple of 8 up to 256. Any strides will do.
        k, v: (batch, num_kv_heads, seq_len_k, head_dim) where num_kv_heads divides num_heads; or
            (batch, seq_len_k, head_dim), one head shared by all of a 4-D q; or merged like q. They must be
            finite at masked positions too: 0 * NaN is NaN.
        mask: bool (batch, seq_len_k), True = attend; (batch * num_heads, seq_len_k) if merged; or
            (1, seq_len_k).
        attn_bias: (num_heads, seq_len_q, seq_len_k), or (seq_len_q, seq_len_k), or 4-D broadcastable to
            (batch, num_heads, seq_len_q, seq_len_k), or (batch * num_heads, seq_len_q, seq_len_k) if merged.
            Differentiable. Rounded to q's dtype, even from float32.
        scale: a number, or a tensor of shape () or (num_heads,) on q's device: a learned temperature,
            differentiable and kept in float32. scale * groups bounds the logits without a bias: 0 or less and
            above 60 are a ValueError, and with a bias scale * groups + the largest bias must stay at 60 or below,
            attn_bias and distance_bias together (a bias may be as negative as one likes, or -inf, where the row sees
            another key: the CUDA kernels take a row whose logits all are below -87 for one without a key). The values
            of a CUDA tensor are not checked, for that would synchronise, nor those of a DTensor, nor of any tensor
            under torch.compile: beyond 60 / groups they count as that, with a gradient of 0, as where max_scale is
            given; 0 and less count as they are, down to minus that bound. Learn the logarithm.
        groups: l2-normalise head_dim in so many equal parts; |cos| then reaches `groups`.
        causal: query i sees key j iff j <= i + seq_len_k - seq_len_q.
        l2norm_qk: False takes q and k as they are (normalised earlier, say, and rotated since). If they are
            not of unit norm the bound on the logits is void, and row sums may overflow in the CUDA kernels.
        attn_bias_batch_dim: a 3-D attn_bias is (batch, seq_len_q, seq_len_k).
        window_size: (left, right), a sliding window: query i sees the keys from i + off - left to i + off + right,
            both included, where off = seq_len_k - seq_len_q. -1 is unlimited, and None is (-1, -1). With causal,
            right counts as 0. By "cuda" and "sdpa" the time goes with the window. Under torch.compile, other
            numbers may compile anew.
        distance_bias: a table that is added to the logits by the distance t = i + off - j of query i from key j, with
            off as above, in memory that grows with the length and not with its square. With causal it is
            (num_heads, at least seq_len_k), entry t; else (num_heads, seq_len_q + seq_len_k - 1), entry
            t + seq_len_q - 1. float32, or in q's dtype, and read in float32. Differentiable: its gradient, of shape
            and dtype of the table, is summed in float32. Merged heads share one table, (1, ...).
        alibi_slopes: float32 (num_heads,) or (batch, num_heads); -slope * |t| is added to the logits, as by
            FlashAttention. It has no gradient, and one that requires it is a ValueError; slopes that are learned are a
            distance_bias, -slopes[:, None] * t.abs().
        max_scale: a number above 0 and at most 60 / groups. A larger scale counts as this one, and a learned one then
            has gradient 0, as behind torch.clamp. With max_scale * groups of at most 10, and no bias, a learned scale
            in float16 stays on Hopper's kernels, for its exp(logits) are then known to fit.
        backend: "cuda"; "sdpa", PyTorch's scaled_dot_product_attention; "reference", plain PyTorch for any
            head_dim; or "auto": "cuda" where it serves, else "sdpa", with the reason logged once, and "sdpa" for long
            16-bit calls without mask, bias or window, not packed, and causal only with as many queries as keys, on
            compute capability 10.x. A named back end that cannot serve
            raises. "sdpa" and "reference" take float64 too, to check gradients.
        return_partials: return (numerator, denominator), whose quotient is the output. They are not shifted,
            so shards over the keys merge by plain addition, and logits beyond the range, by a larger bias
            say, overflow.

    Returns:
        The output, in q's shape, (batch, num_heads, seq_len_q, head_dim) or merged, and in q's dtype, or autocast's.
        With return_partials two tensors in float32 (float64 for float64): numerator, in q's shape, and denominator,
        (batch, num_heads, seq_len_q) or merged.

    Raises:
        ValueError: a shape, a value, a device or the back end is not as above. This message and the others say what
            was got and what is accepted.
        TypeError: a type or a dtype is not as above.
        ImportError: backend="cuda" without the compiled kernels.
        NotImplementedError, RuntimeError: a derivative that the back end does not have (forward mode, a derivative of
            a derivative); "reference" has all.
    """
    attend = _choose_backend(backend, q)
    q, k, v, attn_bias, leave_autocast = _autocast(q, k, v, attn_bias)
    _check_tensors(q, k, v)
    if not type(causal) is type(l2norm_qk) is type(attn_bias_batch_dim) is type(return_partials) is bool:
        check_flag("causal", causal)
        check_flag("l2norm_qk", l2norm_qk)
        check_flag("attn_bias_batch_dim", attn_bias_batch_dim)
        check_flag("return_partials", return_partials)
    merged, given = q.ndim == 3, (q, k, v)
    if k.ndim == 3:
        q, k, v = q.unsqueeze(1) if merged else q, k.unsqueeze(1), v.unsqueeze(1)
    _check_shapes(q, k, given, any_head_dim=backend == "reference")
    if groups != 1 or type(groups) is not int:
        check_groups(groups, q.shape[-1], "head_dim")
    mask = _as_2d_mask(mask, q, k)
    attn_bias = _as_4d_bias(attn_bias, q, k, attn_bias_batch_dim or merged)
    scale_tensor, scale_value = _as_scale(scale, max_scale, groups, q, merged)
    first_distance = 0
    if distance_bias is not None or alibi_slopes is not None:
        lengths = ("seq_len_q", q.shape[-2]), ("seq_len_k", k.shape[-2])
        distance_bias, first_distance = _as_table(distance_bias, causal, q, lengths, leave_autocast)
        alibi_slopes = _as_slopes(alibi_slopes, q)
    if window_size is None:
        left, right = -1, 0 if causal else -1
    else:
        causal, left, right = _as_window(window_size, causal, q, k)
    if backend == "auto" and attend is ops.kernel_attention and (reason := _why_sdpa(q.get_device())) is not None:
        plain = mask is attn_bias is distance_bias is alibi_slopes is None and not return_partials
        plain = plain and (left, right) in ((-1, -1), (-1, 0))
        if plain and _is_faster_by_sdpa(q, k, causal):
            _log_fallback_once(reason, logging.INFO)
            attend = sdpa_attention
    # A Call's values in its order, but no Call: see call.py.
    call = (
        q, k, v, mask, attn_bias, scale_tensor, None, None, distance_bias, alibi_slopes, scale_value, groups, causal,
        left, right, first_distance, l2norm_qk,
    )  # fmt: skip
    if leave_autocast:
        with torch.autocast(q.device.type, enabled=False):
            result = attend(call, return_partials)
    else:
        result = attend(call, return_partials)
    return _squeeze_heads(result) if merged else result


@overload
def plain_cosine_sim_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = ..., attn_bias: Tensor | None = ...,
    scale: float | Tensor = ..., groups: int = ..., causal: bool = ..., l2norm_qk: bool = ...,
    attn_bias_batch_dim: bool = ..., *, window_size: Sequence[int] | None = ..., distance_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., max_scale: float | None = ..., return_partials: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def plain_cosine_sim_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = ..., attn_bias: Tensor | None = ...,
    scale: float | Tensor = ..., groups: int = ..., causal: bool = ..., l2norm_qk: bool = ...,
    attn_bias_batch_dim: bool = ..., *, window_size: Sequence[int] | None = ..., distance_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., max_scale: float | None = ..., return_partials: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def plain_cosine_sim_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = ..., attn_bias: Tensor | None = ...,
    scale: float | Tensor = ..., groups: int = ..., causal: bool = ..., l2norm_qk: bool = ...,
    attn_bias_batch_dim: bool = ..., *, window_size: Sequence[int] | None = ..., distance_bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ..., max_scale: float | None = ..., return_partials: bool,
) -> Result: ...  # fmt: skip
def plain_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | Tensor = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
    *,
    window_size: Sequence[int] | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    max_scale: float | None = None,
    return_partials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Like flash_cosine_sim_attention with backend="reference": plain PyTorch, the specification.

    It materialises the scores, takes any head_dim and float64, and has every derivative. Arguments, results and errors
    are the same, but that it has no `backend`.
    """
    return flash_cosine_sim_attention(
        q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim,
        window_size=window_size, distance_bias=distance_bias, alibi_slopes=alibi_slopes, max_scale=max_scale,
        backend="reference", return_partials=return_partials,
    )  # fmt: skip


def flash_cosine_sim_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | Tensor = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    window_size: Sequence[int] | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    max_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Like flash_cosine_sim_attention, of sequences of different lengths, packed one behind the other.

    Each attends to itself alone. Names and order of the first seven arguments are those of flash_attn_varlen_func.
    q, k, v and the output's gradient must be finite in all rows, those behind the last sequence included: the kernels
    multiply what belongs to another sequence by 0, and 0 * NaN is NaN.

    It is made for many queries a sequence, as in training. For a few queries beside many keys, as in decoding, it is
    faster to pad: call flash_cosine_sim_attention with each sequence as an element of the batch, and a mask.

    Args:
        q: (total_q, num_heads, head_dim), the rows of all sequences. Any strides will do.
        k, v: (total_k, num_kv_heads, head_dim) where num_kv_heads divides num_heads.
        cu_seqlens_q, cu_seqlens_k: int32 (num_sequences + 1,) on q's device, of one length, at least 2: sequence s has
            the rows from cu_seqlens[s] up to cu_seqlens[s + 1]. The first entry is 0, none is less than the one before
            it, and the last is at most total. A sequence may have no queries or no keys. Rows behind the last
            sequence belong to none: such queries yield zeros, with zero gradients. Values on the CPU are checked.
            Those on a GPU are not, for that would synchronise, nor those of a DTensor, nor anything under
            torch.compile: there wrong ones
            give wrong results, but nothing is read or written outside the tensors. "sdpa" attends to one sequence
            after the other, for which it reads the values on a GPU, too, and checks them; under torch.compile it
            does not, and takes the time of total_q x total_k scores.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length, and checked like cu_seqlens; nothing else
            depends on them but distance_bias.
        causal: in a sequence of n queries and m keys, its query i sees its key j iff j <= i + m - n.
        window_size: (left, right), as there, with off = m - n in each sequence.
        distance_bias: as there, with off = m - n in each sequence, and of a length that the longest sequences decide:
            with causal (num_heads, at least max_seqlen_k), entry t; else (num_heads, max_seqlen_q + max_seqlen_k - 1),
            entry t + max_seqlen_q - 1. All sequences share it. Here max_seqlen_q decides where t = 0 is.
        alibi_slopes: float32 (num_heads,), the same for all sequences.

    Returns:
        The output, contiguous, in q's shape, (total_q, num_heads, head_dim), and in q's dtype, or autocast's.

    Raises:
        ValueError, TypeError, ImportError, NotImplementedError, RuntimeError: as there.
    """
    attend = _choose_backend(backend, q)
    q, k, v, _, leave_autocast = _autocast(q, k, v, None)
    _check_packed(q, k, v)
    check_flag("causal", causal)
    check_flag("l2norm_qk", l2norm_qk)
    given = q, k, v
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in given)  # (1, heads, total, head_dim)
    _check_shapes(q, k, given, any_head_dim=backend == "reference")
    check_groups(groups, q.shape[-1], "head_dim")
    cu_seqlens_q, cu_seqlens_k = _as_cu_seqlens(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    scale_tensor, scale_value = _as_scale(scale, max_scale, groups, q, merged=False)
    lengths = ("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)
    distance_bias, first_distance = _as_table(distance_bias, causal, q, lengths, leave_autocast)
    alibi_slopes = _as_slopes(alibi_slopes, q, packed=True)
    causal, left, right = _as_window((-1, -1) if window_size is None else window_size, causal, q, k)
    call = Call(
        q=q, k=k, v=v, mask=None, attn_bias=None, scale=scale_tensor, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, distance_bias=distance_bias, alibi_slopes=alibi_slopes, scale_value=scale_value,
        groups=groups, causal=causal, window_left=left, window_right=right, first_distance=first_distance,
        l2norm_qk=l2norm_qk,
    )  # fmt: skip
    if leave_autocast:
        with torch.autocast(q.device.type, enabled=False):
            o = attend(call, False)
    else:
        o = attend(call, False)
    # As from the kernels it is contiguous for such a q, and can be viewed as (total_q, num_heads * head_dim).
    return o.squeeze(0).transpose(0, 1).contiguous()  # type: ignore[union-attr]  # of no partials it is one tensor


def _squeeze_heads(result: Result) -> Result:
    """Undo the dimension of one head that merged q, k and v got."""
    return result.squeeze(1) if isinstance(result, Tensor) else (result[0].squeeze(1), result[1].squeeze(1))


def _choose_backend(backend: str, q: Tensor) -> Callable[[tuple[Any, ...], bool], Result]:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if type(q) is not Tensor and is_dtensor(q):
        return _choose_for_dtensors(backend, q)
    if backend == "reference":
        return reference_attention
    if backend == "sdpa":
        return sdpa_attention
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    if backend == "cuda":
        _require_cuda(q)
        return ops.kernel_attention
    reason = _why_not_cuda(q)
    if reason is None:
        return ops.kernel_attention
    # On the CPU it is no surprise; on a GPU the user may be missing the point of the library.
    _log_fallback_once(reason, logging.WARNING if q.is_cuda else logging.INFO)
    return sdpa_attention


def _choose_for_dtensors(backend: str, q: Tensor) -> Callable[[tuple[Any, ...], bool], Result]:
    """The operators alone have a sharding rule; on the CPU they compute what "reference" does."""
    if backend in ("sdpa", "reference"):
        raise ValueError(
            f"backend={backend!r} takes no DTensors, and q is one: use backend='auto', or call it with each rank's "
            "part (torch.distributed.tensor.experimental.local_map does that)"
        )
    if backend == "cuda" or q.is_cuda:
        _require_cuda(q)
    return sharded_attention


@ops.constant_when_compiled  # torch.compile cannot trace logging: it calls this while it traces
def _log_fallback_once(reason: str, level: int) -> None:
    if reason not in _logged_reasons:
        _logged_reasons.add(reason)
        logger.log(level, "backend='auto' uses PyTorch's SDPA: %s", reason)


def _why_not_cuda(q: Tensor) -> str | None:
    if not q.is_cuda:
        return f"the CUDA kernels take CUDA tensors, q is on {q.device.type}"
    if not ops.kernels_available():
        return f"the CUDA kernels are not available ({ops.kernels_error()})"
    if q.dtype == torch.float64:
        return "the CUDA kernels have no float64"
    return _why_not_gpu(q.get_device())


@ops.constant_when_compiled  # torch.compile traces neither the cache nor the queries
def _why_not_gpu(index: int) -> str | None:
    if index not in _gpu_reasons:
        _gpu_reasons[index] = None
        if index < torch.cuda.device_count():  # else its tensors are fake, and nothing will run
            major, minor = torch.cuda.get_device_capability(index)
            if major < 8:
                gpu = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
                _gpu_reasons[index] = (
                    f"the CUDA kernels need compute capability 8.0 or newer, {gpu} has {major}.{minor}"
                )
    return _gpu_reasons[index]


@ops.constant_when_compiled
def _why_sdpa(index: int) -> str | None:
    """Why SDPA should be faster on a GPU, for calls that it takes as they are."""
    if index not in _sdpa_reasons:
        there = 0 <= index < torch.cuda.device_count()
        _sdpa_reasons[index] = FASTER_BY_SDPA.get(torch.cuda.get_device_capability(index)[0]) if there else None
    return _sdpa_reasons[index]


def _is_faster_by_sdpa(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Of a call without mask, bias or window: whether SDPA's fastest kernels take it, and it is long enough."""
    seq_len_q, seq_len_k = q.shape[-2], k.shape[-2]
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= FASTER_TO_HEAD_DIM
        and min(seq_len_q, seq_len_k) >= FASTER_FROM_LENGTH
        and (seq_len_q == seq_len_k or not causal)
    )


def _require_cuda(q: Tensor) -> None:
    if not ops.kernels_available():
        raise ImportError(
            f"backend='cuda' needs the compiled kernels ({ops.kernels_error()}): build them from a source tree "
            "that has csrc/*.cu, with nvcc on PATH, `pip install --no-build-isolation -e .` (with "
            "FLASH_COSINE_SIM_FORCE_CUDA=1 it says what is missing), or use backend='auto'"
        )
    reason = _why_not_cuda(q)
    if reason is not None:
        raise ValueError(f"backend='cuda' cannot serve: {reason}; use backend='auto', 'sdpa' or 'reference'")


def _autocast(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """Cast to autocast's dtype once, here, so that no back end is cast half-way; the scale stays float32."""
    # is_cuda first: the name of a device costs half a microsecond.
    device_type = "cpu" if not isinstance(q, Tensor) else "cuda" if q.is_cuda else q.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # meta has no autocast to ask for
        return q, k, v, attn_bias, False
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in DTYPES else tensor

    return cast(q), cast(k), cast(v), attn_bias if attn_bias is None else cast(attn_bias), True


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_not_nested(name, tensor)
        if tensor.ndim not in (3, 4):
            raise ValueError(
                f"{name} must be (batch, heads, seq_len, head_dim) or, merged or single-head, (batch, "
                f"seq_len, head_dim); got {tuple(tensor.shape)}"
            )
    _check_alike(q, k, v)
    if q.ndim == 3 and k.ndim == 4:
        raise ValueError(
            f"with merged q (batch * heads, seq_len_q, head_dim), k and v must be (batch * heads, seq_len_k, "
            f"head_dim); got q: {tuple(q.shape)}, k: {tuple(k.shape)}"
        )


def _check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_not_nested(name, tensor)
        if tensor.ndim != 3:
            raise ValueError(f"packed {name} must be (total, heads, head_dim), got {tuple(tensor.shape)}")
    _check_alike(q, k, v)


def _check_alike(q: Tensor, k: Tensor, v: Tensor) -> None:
    dtype = q.dtype
    if not (k.dtype is dtype and v.dtype is dtype and dtype in ANY_DTYPES):
        _refuse_dtypes(q, k, v)
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got q: {q.device}, k: {k.device}, v: {v.device}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got k: {tuple(k.shape)}, v: {tuple(v.shape)}")


def _refuse_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in ANY_DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    raise TypeError(f"q, k and v must have one dtype, got q: {q.dtype}, k: {k.dtype}, v: {v.dtype}")


def check_not_nested(name: str, tensor: Tensor) -> None:
    """Before its shape is read, which may not exist."""
    if tensor.is_nested:
        raise TypeError(
            f"{name} must not be a nested tensor: pack its values, (total, heads, head_dim), for "
            "flash_cosine_sim_attention_varlen with its offsets as cu_seqlens"
        )


def check_no_causal_bias(name: str, bias: Tensor, instead: str) -> None:
    """PyTorch's CausalBias is a tensor without values, for its own function alone."""
    if type(bias).__name__ == "CausalBias":
        raise TypeError(f"{name} must be a tensor with values, got torch's CausalBias: {instead}")


def check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, (bool, torch.SymBool)):
        kind = type(flag)  # whose name may be bool, too: numpy has one
        raise TypeError(
            f"{name} must be a bool, got {f'{kind.__module__}.' * (kind.__name__ == 'bool')}{kind.__name__}"
        )


def _check_shapes(q: Tensor, k: Tensor, given: tuple[Tensor, Tensor, Tensor], any_head_dim: bool) -> None:
    """q (batch, num_heads, seq_len_q, head_dim); k (batch, num_kv_heads, seq_len_k, head_dim); q, k, v as given."""
    batch, num_heads, _, head_dim = q.shape
    kv_batch, num_kv_heads, _, kv_head_dim = k.shape
    if batch != kv_batch:
        what = "batch * heads" if given[0].ndim == 3 else "batch size"
        raise ValueError(f"k and v must have q's {what} {batch}, got {kv_batch} {_shapes(*given)}")
    # 0 of 0 is a rank's part of fewer heads than ranks.
    if num_heads != num_kv_heads and (num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(f"num_kv_heads must divide num_heads {num_heads}, got {num_kv_heads} {_shapes(*given)}")
    if kv_head_dim != head_dim:
        raise ValueError(f"k and v must have q's head_dim {head_dim}, got {kv_head_dim} {_shapes(*given)}")
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        if head_dim < 1:  # nothing has a direction there
            raise ValueError(f"head_dim must be at least 1, got {head_dim} {_shapes(*given)}")
        if not any_head_dim:
            raise ValueError(
                f"head_dim must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {head_dim} "
                f"{_shapes(*given)}; backend='reference' takes any"
            )


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"(q: {tuple(q.shape)}, k: {tuple(k.shape)}, v: {tuple(v.shape)})"


def _as_2d_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return mask as (batch, seq_len_k)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True = attend, got {dtype_or_type(mask)}")
    batch, seq_len_k = k.shape[0], k.shape[-2]
    # `==` one by one, here and below: of a number and (1, a symbolic number) torch.compile takes `in` for False.
    if mask.ndim != 2 or not (mask.shape[0] == 1 or mask.shape[0] == batch) or mask.shape[1] != seq_len_k:
        raise ValueError(
            f"mask must be (batch, seq_len_k) = {(batch, seq_len_k)}, or (1, seq_len_k); got {tuple(mask.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"mask must be on q's device {q.device}, got {mask.device}")
    return mask if mask.shape[0] == batch else mask.expand(batch, -1)


def _as_4d_bias(attn_bias: Tensor | None, q: Tensor, k: Tensor, batch_dim: bool) -> Tensor | None:
    """Return attn_bias as 4-D, broadcastable to (batch, num_heads, seq_len_q, seq_len_k), in q's dtype."""
    if attn_bias is None:
        return None
    if not isinstance(attn_bias, Tensor) or not attn_bias.is_floating_point():
        raise TypeError(f"attn_bias must be a tensor of a floating dtype, got {dtype_or_type(attn_bias)}")
    check_no_causal_bias("attn_bias", attn_bias, "causal=True is its lower right one")
    if attn_bias.device != q.device:
        raise ValueError(f"attn_bias must be on q's device {q.device}, got {attn_bias.device}")
    shape = attn_bias.shape
    if attn_bias.ndim == 2:
        attn_bias = attn_bias[None, None]
    elif attn_bias.ndim == 3:
        attn_bias = attn_bias.unsqueeze(1 if batch_dim else 0)
    full = (*q.shape[:-1], k.shape[-2])
    sizes = zip(attn_bias.shape, full, strict=False)
    # A 2-D one is not broadcast further: (1, seq_len_k) would more likely be meant as a mask.
    broadcastable = attn_bias.ndim == 4 and all(a == 1 or a == b for a, b in sizes)
    if not broadcastable or (len(shape) == 2 and shape != full[2:]):
        batch, num_heads, seq_len_q, seq_len_k = full
        first = batch if batch_dim else num_heads
        raise ValueError(
            f"attn_bias must be ({'batch' if batch_dim else 'num_heads'}, seq_len_q, seq_len_k) = "
            f"{(first, seq_len_q, seq_len_k)}, or (seq_len_q, seq_len_k), or 4-D and broadcastable to (batch, "
            f"num_heads, seq_len_q, seq_len_k) = {full}; got {tuple(shape)}"
        )
    return attn_bias.to(q.dtype)


def _as_scale(
    scale: float | Tensor, max_scale: float | None, groups: int, q: Tensor, merged: bool
) -> tuple[Tensor | None, float]:
    """Return a scale tensor as (1,) or (num_heads,) in float32 (float64 for float64), and its bound; a number as None
    and it.

    A number stays one: no tensor is made for it, and no gradient.
    """
    if max_scale is not None:
        _check_max_scale(max_scale, groups)
    if not isinstance(scale, Tensor):
        plain = type(scale) is float or type(scale) is int  # first: the others take longer to ask for
        if not plain:
            number = isinstance(scale, (numbers.Real, torch.SymInt, torch.SymFloat))
            if isinstance(scale, bool) or not number:
                raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
        if max_scale is not None and scale > max_scale:
            return None, float(max_scale)
        check_range(scale, groups)
        return None, float(scale) if plain else torch.sym_float(scale)  # type: ignore[no-untyped-call]
    num_heads = q.shape[1]
    if not scale.is_floating_point():
        raise TypeError(f"a scale tensor must be of a floating dtype, got {scale.dtype}")
    if scale.ndim > 1 or not (scale.numel() == 1 or scale.numel() == num_heads):
        heads = "1 (batch and heads are merged)" if merged else f"num_heads = {num_heads}"
        raise ValueError(f"a scale tensor must be of shape () or ({heads},), got {tuple(scale.shape)}")
    if scale.device != q.device:
        raise ValueError(f"a scale tensor must be on q's device {q.device}, got {scale.device}")
    if not torch.compiler.is_compiling() and has_readable_values(scale):
        for value in scale.reshape(-1).tolist():
            check_range(value if max_scale is None else min(value, max_scale), groups)
    scale = scale.to(compute_dtype(q.dtype))
    bound = MAX_LOGIT * (1 + ROUNDING) / groups if max_scale is None else float(max_scale)
    return scale if scale.ndim == 1 else scale.reshape(1), bound


def _as_table(
    distance_bias: Tensor | None,
    causal: bool,
    q: Tensor,
    lengths: tuple[tuple[str, int], tuple[str, int]],
    autocast: bool,
) -> tuple[Tensor | None, int]:
    """Return distance_bias in float32 (float64 for float64), and the distance of its first entry.

    lengths are the names and numbers of queries and keys that decide how many distances there are. Under autocast q is
    no longer in the dtype that it was given in, and the table may be in any.
    """
    if distance_bias is None:
        return None, 0
    wide = compute_dtype(q.dtype)
    dtypes = (*DTYPES, wide) if autocast else (torch.float32, wide, q.dtype)
    if not isinstance(distance_bias, Tensor) or distance_bias.dtype not in dtypes:
        got = dtype_or_type(distance_bias)
        accepted = f"float32 tensor, or in q's dtype {q.dtype}"
        if autocast:
            accepted = "float32, float16 or bfloat16 tensor" + (", or float64 as q" if wide == torch.float64 else "")
        raise TypeError(f"distance_bias must be a {accepted}; got {got}")
    (name_q, num_queries), (name_k, num_keys) = lengths
    shape, num_heads = tuple(distance_bias.shape), q.shape[1]
    if causal:
        fits = len(shape) == 2 and shape[0] == num_heads and shape[1] >= num_keys
    else:
        num_distances = max(num_queries + num_keys - 1, 0)
        fits = len(shape) == 2 and shape[0] == num_heads and shape[1] == num_distances
    if not fits:  # not before: in an f-string a length becomes a constant of a compiled graph
        accepted = f"(num_heads, at least {name_k}) = ({num_heads}, at least {num_keys}) with causal"
        if not causal:
            accepted = f"(num_heads, {name_q} + {name_k} - 1) = {(num_heads, num_distances)} without causal"
        raise ValueError(f"distance_bias must be {accepted}; got {shape}")
    if distance_bias.device != q.device:
        raise ValueError(f"distance_bias must be on q's device {q.device}, got {distance_bias.device}")
    return distance_bias.to(wide).contiguous(), 0 if causal else 1 - num_queries


def _as_slopes(alibi_slopes: Tensor | None, q: Tensor, packed: bool = False) -> Tensor | None:
    """Return alibi_slopes as (1 or batch, num_heads), in float32 (float64 for float64)."""
    if alibi_slopes is None:
        return None
    if not isinstance(alibi_slopes, Tensor) or alibi_slopes.dtype not in (torch.float32, compute_dtype(q.dtype)):
        raise TypeError(f"alibi_slopes must be a float32 tensor, got {dtype_or_type(alibi_slopes)}")
    batch, num_heads = q.shape[:2]
    shape = tuple(alibi_slopes.shape)
    if not (shape == (num_heads,) or shape == (batch, num_heads)):
        or_batch = "" if packed else f" or (batch, num_heads) = {(batch, num_heads)}"
        raise ValueError(f"alibi_slopes must be (num_heads,) = {(num_heads,)}{or_batch}; got {shape}")
    if alibi_slopes.device != q.device:
        raise ValueError(f"alibi_slopes must be on q's device {q.device}, got {alibi_slopes.device}")
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "alibi_slopes has no gradient, got a tensor that requires one: detach it, or, to learn slopes, pass "
            "distance_bias=-alibi_slopes[:, None] * distances.abs() instead"
        )
    slopes = alibi_slopes.to(compute_dtype(q.dtype)).contiguous()
    return slopes if slopes.ndim == 2 else slopes.unsqueeze(0)


def _as_window(window_size: Sequence[int], causal: bool, q: Tensor, k: Tensor) -> tuple[bool, int, int]:
    """Return causal, window_left and window_right of a Call."""
    accepted = "window_size must be (left, right), ints of at least -1, which is unlimited, or None"
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(f"{accepted}; got {type(window_size).__name__}")
    if len(window_size) != 2:
        raise ValueError(f"{accepted}; got {window_size!r}")
    left, right = window_size
    for side in (left, right):
        if not isinstance(side, (int, torch.SymInt)) or isinstance(side, bool):
            raise TypeError(f"{accepted}; got {window_size!r}")
        if side < -1:
            raise ValueError(f"{accepted}; got {window_size!r}")
    # An exported program is for all lengths of its range: there, a comparison with one would narrow that.
    if not torch.compiler.is_exporting():
        left, right = clipped_window(left, right, q.shape[-2], k.shape[-2])
    if causal:  # after clipping, which makes -1 of it for a single query
        right = 0
    return right == 0, left, right


def _as_cu_seqlens(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both contiguous. q is (1, num_heads, total_q, head_dim), k likewise."""
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_cu_seqlens_tensor(name, cu_seqlens, q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be of one length, the number of sequences plus 1, got "
            f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )
    for name, max_seqlen in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool):
            raise TypeError(f"{name} must be an int, got {type(max_seqlen).__name__}")
    readable = not torch.compiler.is_compiling() and all(map(has_readable_values, (cu_seqlens_q, cu_seqlens_k)))
    if readable:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q.tolist(), q.shape[-2], max_seqlen_q)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k.tolist(), k.shape[-2], max_seqlen_k)
    return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()


def _check_cu_seqlens_tensor(name: str, cu_seqlens: Tensor, device: torch.device) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = dtype_or_type(cu_seqlens)
        hint = ": call .int() on it" if got == torch.int64 else ""
        raise TypeError(f"{name} must be an int32 tensor, got {got}{hint}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name} must be (num_sequences + 1,), of at least one sequence; got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {cu_seqlens.device}")


def _check_max_scale(max_scale: float, groups: int) -> None:
    accepted = f"max_scale must be a number above 0 and at most {MAX_LOGIT} / groups, or None"
    if isinstance(max_scale, bool) or not isinstance(max_scale, numbers.Real):
        raise TypeError(f"{accepted}; got {type(max_scale).__name__}")
    if not 0 < max_scale * groups <= MAX_LOGIT * (1 + ROUNDING):
        raise ValueError(f"{accepted}; got {shown(max_scale)} with groups={groups}")


def check_range(scale: float, groups: int) -> None:
    if 0 < scale * groups <= MAX_LOGIT * (1 + ROUNDING):
        return
    if not scale > 0:  # NaN too
        raise ValueError(
            f"scale must be positive, got {shown(scale)}: 0 would forget the keys, less seek the least similar"
        )
    raise ValueError(
        f"scale * groups bounds the logits and must be at most {MAX_LOGIT}, got {shown(scale)} * {groups}: "
        "softmax is all but argmax there; lower scale or groups (groups=8 with scale=1, for instance)"
    )


def shown(number: float) -> str:
    """As an f-string has it: torch.compile, whose graphs have numbers without a value, traces this and not that."""
    return "{}".format(number)  # noqa: UP032
