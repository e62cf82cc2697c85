"""From the numbers of a model with QK-norm to the scale of cosine-sim attention.

Such a model attends with a = gain_q rms_norm(q) and b = gain_k rms_norm(k), and its logits are softmax_scale a . b.
Without a weight for each channel rms_norm(x) = sqrt(head_dim) x / |x|, so that

    softmax_scale a . b = softmax_scale * head_dim * gain_q * gain_k * cos(q, k)

and what stands before the cosine is the scale here.
"""

import numbers

import torch
from torch import Tensor

from .interface import MAX_LOGIT, check_range, shown
from .reference import has_readable_values


def cosine_scale(
    head_dim: int,
    softmax_scale: float | Tensor | None = None,
    gain_q: float | Tensor = 1.0,
    gain_k: float | Tensor = 1.0,
    *,
    num_heads: int | None = None,
    l2norm_qk: bool = True,
) -> float | Tensor:
    """softmax_scale * head_dim * gain_q * gain_k: the `scale` with which cosine-sim attention is QK-norm attention.

    Args:
        head_dim: of q and k, at least 1.
        softmax_scale: what the model passes to its attention, which gets normalised q and k; None is
            1 / sqrt(head_dim), the default of FlashAttention and SDPA.
        gain_q, gain_k: what the model multiplies its normalised q and k by. A norm to length 1, x / |x|, is an RMS norm
            with the gain head_dim ** -0.5. All three are numbers, or tensors of shape () or (num_heads,), gain_k also
            (num_kv_heads,) if num_heads is given; tensors may be learned, and are multiplied in float32 at least.
        num_heads: heads of q; each of gain_k's is then repeated for the query heads that share its keys.
        l2norm_qk: False leaves head_dim out: q and k come normalised, and it is in their product already.

    Returns:
        A number, or a tensor of shape () or (num_heads,).

    Raises:
        ValueError: the result is not above 0 and at most 60 (values of tensors are checked on the CPU alone, and not
            under torch.compile), head_dim or num_heads is not at least 1, or a shape is not as above.
        TypeError: head_dim or num_heads is no int, or something else neither a number nor a tensor of a floating dtype.
    """
    if not isinstance(head_dim, (numbers.Integral, torch.SymInt)) or isinstance(head_dim, bool):
        raise TypeError(f"head_dim must be an int, got {type(head_dim).__name__}")
    if num_heads is not None:
        if not isinstance(num_heads, (numbers.Integral, torch.SymInt)) or isinstance(num_heads, bool):
            raise TypeError(f"num_heads must be an int or None, got {type(num_heads).__name__}")
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    return scale_by_names("softmax_scale", head_dim, softmax_scale, gain_q, gain_k, (num_heads, None), l2norm_qk)


def scale_by_names(
    name: str,
    head_dim: int,
    softmax_scale: float | Tensor | None,
    gain_q: float | Tensor,
    gain_k: float | Tensor,
    heads: tuple[int | None, int | None],
    l2norm_qk: bool,
) -> float | Tensor:
    """cosine_scale, for so many heads of q and of k if they are known; errors call softmax_scale by `name`."""
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5
    num_heads, num_kv_heads = heads
    if not type(softmax_scale) is type(gain_q) is type(gain_k) is float:  # what follows takes longer
        softmax_scale = _checked(name, softmax_scale, num_heads)
        gain_q, gain_k = _checked("gain_q", gain_q, num_heads), _checked("gain_k", gain_k, None)
        if isinstance(gain_k, Tensor) and num_heads is not None:
            gain_k = _for_each_head(gain_k, num_heads, num_kv_heads)
        _check_alike({name: softmax_scale, "gain_q": gain_q, "gain_k": gain_k})
    scale = softmax_scale * (head_dim if l2norm_qk else 1) * gain_q * gain_k
    if type(scale) is not float or not 0 < scale <= MAX_LOGIT:
        factors = {name: softmax_scale, "gain_q": gain_q, "gain_k": gain_k}
        _check_product(scale, head_dim if l2norm_qk else None, factors)
    return scale


def _checked(name: str, factor: float | Tensor, num_heads: int | None) -> float | Tensor:
    if isinstance(factor, Tensor):
        if not factor.is_floating_point():
            raise TypeError(f"{name} must be a number or a tensor of a floating dtype, got {factor.dtype}")
        if factor.ndim > 1:
            raise ValueError(f"{name} must be a number or of shape () or (heads,), got {tuple(factor.shape)}")
        if num_heads is not None and not (factor.numel() == 1 or factor.numel() == num_heads):
            raise ValueError(f"{name} must be a number or of shape () or ({num_heads},), got {tuple(factor.shape)}")
        return factor if factor.dtype == torch.float64 else factor.float()
    if isinstance(factor, bool) or not isinstance(factor, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number or a tensor of a floating dtype, got {type(factor).__name__}")
    return factor


def _for_each_head(gain_k: Tensor, num_heads: int, num_kv_heads: int | None) -> Tensor:
    """gain_k of the key/value heads as (num_heads,)."""
    count = gain_k.numel()
    if count == 1 or count == num_heads:  # see interface._as_2d_mask
        return gain_k
    if count == 0 or num_heads % count or (num_kv_heads is not None and num_kv_heads != count):
        of = "" if num_kv_heads is None else f" of {num_kv_heads}"
        raise ValueError(f"gain_k must have one entry a key/value head{of}, or a head of {num_heads}; got {count}")
    return gain_k.repeat_interleave(num_heads // count)


def _check_alike(factors: dict[str, float | Tensor]) -> None:
    """Raises ValueError where two are for different numbers of heads."""
    first, count = "", 1
    for name, factor in factors.items():
        size = factor.numel() if isinstance(factor, Tensor) else 1
        if count == 1:
            first, count = name, size
        elif size != 1 and size != count:
            raise ValueError(
                f"{name} must be a number or of shape () or ({count},), as {first} is, got ({size},); gain_k may also "
                "be (num_kv_heads,) where num_heads is given"
            )


def _check_product(scale: float | Tensor, head_dim: int | None, factors: dict[str, float | Tensor]) -> None:
    """Raises ValueError as the call would, and names what the scale was made of."""
    if not isinstance(scale, Tensor):
        values = [scale]
    elif torch.compiler.is_compiling() or not has_readable_values(scale):
        return
    else:
        values = scale.reshape(-1).tolist()
    for value in values:
        try:
            check_range(value, groups=1)
        except ValueError as error:
            first, *others = factors
            names = [first, *([] if head_dim is None else [f"head_dim ({shown(head_dim)})"]), *others]
            given = ", ".join(f"{name} {_shown(factor)}" for name, factor in factors.items())
            raise ValueError(f"{' * '.join(names)} is the cosines' scale, got {given}: {error}") from None


def _shown(factor: float | Tensor) -> str:
    if isinstance(factor, Tensor):
        return f"of shape {tuple(factor.shape)}"
    return shown(factor) if torch.compiler.is_compiling() else f"{float(factor):g}"
