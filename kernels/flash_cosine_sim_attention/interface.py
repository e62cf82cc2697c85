"""The public functions: validate once, bring the arguments to one form, choose the back end; nothing else."""

import logging

import torch
from torch import Tensor

from . import ops
from .reference import compute_dtype, reference_attention
from .sdpa import sdpa_attention

BACKENDS = ("auto", "cuda", "sdpa", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# exp(60) = 2^86.6: row sums over 2^20 keys and |v| up to 2^15 still fit into float32 without any shift.
MAX_LOGIT = 60

logger = logging.getLogger("flash_cosine_sim_attention")
_logged_reasons: set[str] = set()


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
    backend: str = "auto",
    return_partials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * l2norm(q) l2norm(k)^T + attn_bias) v per head, without materialising the scores.

    Cosine-similarity attention after Henry et al. 2020 (arXiv:2010.04245). float32, float16 and bfloat16; the
    output has the inputs' dtype, or autocast's. A row that sees no key yields zeros, with zero gradients.

    Args:
        q: (batch, num_heads, seq_len_q, head_dim), or (batch * num_heads, seq_len_q, head_dim) with k and v
            merged likewise. head_dim is a multiple of 8 up to 256. Any strides will do.
        k, v: (batch, num_kv_heads, seq_len_k, head_dim) where num_kv_heads divides num_heads; or
            (batch, seq_len_k, head_dim), one head shared by all of a 4-D q; or merged like q.
        mask: bool (batch, seq_len_k), True = attend; (batch * num_heads, seq_len_k) if merged.
        attn_bias: (num_heads, seq_len_q, seq_len_k), or 4-D broadcastable to (batch, num_heads, seq_len_q,
            seq_len_k), or (batch * num_heads, seq_len_q, seq_len_k) if merged. Differentiable; used in q's
            dtype.
        scale: a number, or a tensor of shape () or (num_heads,) on q's device: a learned temperature,
            differentiable and kept in float32. scale * groups bounds the logits: up to 40 is the documented
            range, above 60 is a ValueError. The values of a CUDA tensor are not checked, for that would
            synchronise, nor those of any tensor under torch.compile: keep them within the range.
        groups: l2-normalise head_dim in so many equal parts; |cos| then reaches `groups`.
        causal: query i sees key j iff j <= i + seq_len_k - seq_len_q.
        l2norm_qk: False takes q and k as they are (normalised earlier, say, and rotated since). If they are
            not of unit norm the bound on the logits is void, and row sums may overflow in the CUDA kernels.
        attn_bias_batch_dim: a 3-D attn_bias is (batch, seq_len_q, seq_len_k).
        backend: "cuda"; "sdpa", PyTorch's scaled_dot_product_attention; "reference", plain PyTorch for any
            head_dim; or "auto": "cuda" where it serves, else "sdpa", with the reason logged once. A named
            back end that cannot serve raises. "sdpa" and "reference" take float64 too, to check gradients.
        return_partials: return (numerator, denominator) in float32, of shapes (batch, num_heads, seq_len_q,
            head_dim) and (batch, num_heads, seq_len_q), whose quotient is the output. They are not shifted,
            so shards over the keys merge by plain addition.

    Raises:
        ValueError, TypeError: an argument is not as above; the message says what is accepted.
        ImportError: backend="cuda" without the compiled kernels.
    """
    attend = _choose_backend(backend, q)
    options = (causal, l2norm_qk, attn_bias_batch_dim, return_partials)
    any_head_dim = backend == "reference"
    return _attend(attend, q, k, v, mask, attn_bias, scale, groups, *options, any_head_dim=any_head_dim)


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
    return_partials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Like flash_cosine_sim_attention, in plain PyTorch: the specification.

    It materialises the scores, and takes any head_dim.
    """
    options = (causal, l2norm_qk, attn_bias_batch_dim, return_partials)
    return _attend(reference_attention, q, k, v, mask, attn_bias, scale, groups, *options, any_head_dim=True)


def _attend(
    attend, q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim, return_partials,
    *, any_head_dim: bool,
):  # fmt: skip
    """Validate, normalise the arguments' shapes and dtypes, call the back end `attend`, restore q's shape."""
    q, k, v, attn_bias, leave_autocast = _autocast(q, k, v, attn_bias)
    _check_tensors(q, k, v)
    merged = q.ndim == 3
    q, k, v = (tensor.unsqueeze(1) if tensor.ndim == 3 else tensor for tensor in (q, k, v))
    _check_shapes(q, k, v, any_head_dim)
    _check_groups(groups, q.shape[-1])
    _check_mask(mask, q, k)
    options = {
        "mask": mask,
        "attn_bias": _as_4d_bias(attn_bias, q, k, attn_bias_batch_dim or merged),
        "scale": _as_number_or_vector(scale, groups, q, merged),
        "groups": groups,
        "causal": causal,
        "l2norm_qk": l2norm_qk,
        "return_partials": return_partials,
    }
    if leave_autocast:
        with torch.autocast(q.device.type, enabled=False):
            result = attend(q, k, v, **options)
    else:
        result = attend(q, k, v, **options)
    if not merged:
        return result
    return tuple(part.squeeze(1) for part in result) if return_partials else result.squeeze(1)


def _choose_backend(backend: str, q: Tensor):
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
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
    if not torch.compiler.is_compiling() and reason not in _logged_reasons:
        _logged_reasons.add(reason)
        # On the CPU it is no surprise; on a GPU the user may be missing the point of the library.
        level = logging.WARNING if q.is_cuda else logging.INFO
        logger.log(level, "backend='auto' uses PyTorch's SDPA: %s", reason)
    return sdpa_attention


def _why_not_cuda(q: Tensor) -> str | None:
    if not q.is_cuda:
        return f"the CUDA kernels take CUDA tensors, q is on {q.device.type}"
    if not ops.kernels_available():
        return f"the CUDA kernels are not available ({ops.kernels_error()})"
    if q.dtype == torch.float64:
        return "the CUDA kernels have no float64"
    return None


def _require_cuda(q: Tensor) -> None:
    if not ops.kernels_available():
        raise ImportError(
            f"backend='cuda' needs the compiled kernels ({ops.kernels_error()}): build them from source with "
            "nvcc on PATH, `pip install --no-build-isolation -e .`, or use backend='auto'"
        )
    reason = _why_not_cuda(q)
    if reason is not None:
        raise ValueError(f"backend='cuda' cannot serve: {reason}; use backend='auto', 'sdpa' or 'reference'")


def _autocast(q, k, v, attn_bias):
    """Cast to autocast's dtype once, here, so that no back end is cast half-way; the scale stays float32."""
    tensors = (q, k, v, attn_bias)
    device_type = q.device.type if isinstance(q, Tensor) else "cpu"
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # meta has no autocast to ask for
        return *tensors, False
    dtype = torch.get_autocast_dtype(device_type)
    return *(t.to(dtype) if isinstance(t, Tensor) and t.dtype in DTYPES else t for t in tensors), True


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (*DTYPES, torch.float64):
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got q: {q.dtype}, {name}: {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got q: {q.device}, {name}: {tensor.device}")
        if tensor.ndim not in (3, 4):
            raise ValueError(
                f"{name} must be (batch, heads, seq_len, head_dim) or, merged or single-head, (batch, "
                f"seq_len, head_dim); got {tuple(tensor.shape)}"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got k: {tuple(k.shape)}, v: {tuple(v.shape)}")
    if q.ndim == 3 and k.ndim == 4:
        raise ValueError(
            f"with merged q (batch * heads, seq_len_q, head_dim), k and v must be (batch * heads, seq_len_k, "
            f"head_dim); got q: {tuple(q.shape)}, k: {tuple(k.shape)}"
        )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, any_head_dim: bool) -> None:
    """q (batch, num_heads, seq_len_q, head_dim); k, v (batch, num_kv_heads, seq_len_k, head_dim)."""
    shapes = f"(q: {tuple(q.shape)}, k: {tuple(k.shape)}, v: {tuple(v.shape)})"
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"k and v must have q's batch size {q.shape[0]}, got {k.shape[0]} {shapes}")
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads {num_heads}, got {num_kv_heads} {shapes}")
    head_dim = q.shape[-1]
    if k.shape[-1] != head_dim:
        raise ValueError(f"k and v must have q's head_dim {head_dim}, got {k.shape[-1]} {shapes}")
    if not any_head_dim and (head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM):
        raise ValueError(
            f"head_dim must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {head_dim} {shapes}; "
            "backend='reference' takes any"
        )


def _check_groups(groups: int, head_dim: int) -> None:
    if not isinstance(groups, (int, torch.SymInt)) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1 or head_dim % groups:
        raise ValueError(f"groups must divide head_dim {head_dim}, got {groups}")


def _check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True = attend, got {got}")
    expected = (k.shape[0], k.shape[-2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask must be (batch, seq_len_k) = {expected}, got {tuple(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"mask must be on q's device {q.device}, got {mask.device}")


def _as_4d_bias(attn_bias: Tensor | None, q: Tensor, k: Tensor, batch_dim: bool) -> Tensor | None:
    """Return attn_bias as 4-D, broadcastable to (batch, num_heads, seq_len_q, seq_len_k), in q's dtype."""
    if attn_bias is None:
        return None
    if not isinstance(attn_bias, Tensor) or not attn_bias.is_floating_point():
        got = attn_bias.dtype if isinstance(attn_bias, Tensor) else type(attn_bias).__name__
        raise TypeError(f"attn_bias must be a tensor of a floating dtype, got {got}")
    if attn_bias.device != q.device:
        raise ValueError(f"attn_bias must be on q's device {q.device}, got {attn_bias.device}")
    got = tuple(attn_bias.shape)
    if attn_bias.ndim == 3:
        attn_bias = attn_bias.unsqueeze(1 if batch_dim else 0)
    full = (*q.shape[:-1], k.shape[-2])
    sizes = zip(attn_bias.shape, full, strict=False)
    if attn_bias.ndim != 4 or any(size not in (1, full_size) for size, full_size in sizes):
        batch, num_heads, seq_len_q, seq_len_k = full
        first = batch if batch_dim else num_heads
        raise ValueError(
            f"attn_bias must be ({'batch' if batch_dim else 'num_heads'}, seq_len_q, seq_len_k) = "
            f"{(first, seq_len_q, seq_len_k)}, or 4-D and broadcastable to (batch, num_heads, seq_len_q, "
            f"seq_len_k) = {full}; got {got}"
        )
    return attn_bias.to(q.dtype)


def _as_number_or_vector(scale: float | Tensor, groups: int, q: Tensor, merged: bool) -> float | Tensor:
    """Return scale as a number, or as a tensor (1,) or (num_heads,) in float32 (float64 for float64)."""
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
        _check_range(scale, groups)
        return scale
    num_heads = q.shape[1]
    if not scale.is_floating_point():
        raise TypeError(f"a scale tensor must be of a floating dtype, got {scale.dtype}")
    if scale.ndim > 1 or scale.numel() not in (1, num_heads):
        heads = "1 (batch and heads are merged)" if merged else f"num_heads = {num_heads}"
        raise ValueError(f"a scale tensor must be of shape () or ({heads},), got {tuple(scale.shape)}")
    if scale.device != q.device:
        raise ValueError(f"a scale tensor must be on q's device {q.device}, got {scale.device}")
    # Reading a value from the GPU would wait for it. A fake tensor (a subclass of Tensor) has none.
    has_value = type(scale) in (Tensor, torch.nn.Parameter) and scale.device.type == "cpu"
    if has_value and not torch.compiler.is_compiling():
        _check_range(scale.detach().abs().max().item(), groups)
    return scale.to(compute_dtype(q.dtype)).reshape(-1)


def _check_range(scale: float, groups: int) -> None:
    bound = abs(scale) * groups
    if not bound <= MAX_LOGIT:  # NaN too
        raise ValueError(
            f"scale * groups bounds the logits and must be at most {MAX_LOGIT}, got {scale} * {groups}: "
            "softmax is all but argmax there; lower scale or groups"
        )
