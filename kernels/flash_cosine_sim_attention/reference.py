"""The specification in plain PyTorch: it materialises the scores, and favours clarity over speed.

    q^ = q / |q|,  k^ = k / |k|                   per group of head_dim / groups channels
    S  = scale * q^ k^T + attn_bias + distance_bias[t] - alibi_slope * |t|
                                                  -inf where the mask, the window or another sequence hides the key
    o  = exp(S) v / rowsum(exp(S))                0 where no key is visible

`reference_attention` is differentiable by autograd. `reference_forward`, `reference_partials` and
`reference_backward` say the same in closed form: they are the specification of the CUDA kernels and the CPU
implementation of the operators in ops.py. float16 and bfloat16 are computed in float32, float64 in float64.

They take a Call, which says the shapes: what interface.py has normalised.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call, scale_of

LOG2_E = math.log2(math.e)


def l2norm_tensors(*tensors: Tensor, groups: int = 1) -> tuple[Tensor, ...]:
    """l2-normalise the last dimension of every tensor, in `groups` equal parts of unit norm each.

    The norm is taken in float32 (float64 for float64) and neither overflows nor underflows. A zero vector stays
    zero, with a zero gradient.

    Args:
        *tensors: (..., head_dim), one or more, of any floating dtype and each of its own shape.
        groups: how many parts; it divides every head_dim.

    Returns:
        A tuple of as many tensors, each in the shape and dtype of its own.

    Raises:
        ValueError: there are no tensors, one has no last dimension or an empty one, or `groups` does not divide it.
        TypeError: a tensor is of no floating dtype, or `groups` is no int.
    """
    if not tensors:
        raise ValueError("l2norm_tensors needs at least one tensor, got none")
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"l2norm_tensors accepts tensors of a floating dtype, got {dtype_or_type(tensor)}")
        if tensor.ndim == 0:
            raise ValueError("l2norm_tensors normalises the last dimension, got a tensor without one")
        if tensor.shape[-1] == 0:
            raise ValueError(f"l2norm_tensors needs a last dimension of at least 1, got {tuple(tensor.shape)}")
        check_groups(groups, tensor.shape[-1], "the last dimension")
    return tuple(l2norm(tensor, groups).to(tensor.dtype) for tensor in tensors)


def check_groups(groups: int, size: int, name: str) -> None:
    if not isinstance(groups, (int, torch.SymInt)) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1 or size % groups:
        raise ValueError(f"groups must divide {name} {size}, got {groups}")


def check_cu_seqlens(name: str, bounds: Sequence[int], total: int, max_seqlen: int | None = None) -> None:
    """Raises ValueError where `bounds` do not cut `total` rows into sequences, of at most max_seqlen if given."""
    accepted = f"{name} must begin with 0, not fall, and end at most at {total}, the number of rows"
    if bounds[0] != 0:
        raise ValueError(f"{accepted}; it begins with {bounds[0]}")
    for place, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end < start:
            raise ValueError(f"{accepted}; entry {place + 1} is {end}, the one before it {start}")
        if max_seqlen is not None and end - start > max_seqlen:
            longest = name.replace("cu_seqlens", "max_seqlen")
            raise ValueError(
                f"{longest} must be at least the longest sequence's length, got {max_seqlen}: "
                f"sequence {place} is of length {end - start}"
            )
    if bounds[-1] > total:
        raise ValueError(f"{accepted}; it ends at {bounds[-1]}")


def dtype_or_type(value: object) -> torch.dtype | str:
    """For messages: a tensor's dtype, or what else a value is."""
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def l2norm(x: Tensor, groups: int) -> Tensor:
    """Normalise (..., head_dim) per group; the result is in `compute_dtype`, not yet rounded to x's dtype."""
    return _unit_groups(x, groups)[0].flatten(-2)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all intermediate results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_readable_values(tensor: Tensor) -> bool:
    """On the CPU, as reading from the GPU would wait for it, and neither fake nor wrapped by torch.func."""
    return tensor.is_cpu and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Neither fake nor wrapped by torch.func; on a GPU reading them waits for it."""
    is_data = not tensor.is_meta and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return is_data and not _is_wrapped(tensor)


def _has_no_memory(tensor: Tensor) -> bool:
    """Whether torch.func wraps a tensor that is neither fake nor on the meta device, by public names alone."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


try:  # it knows functionalize, too
    _is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
except AttributeError:  # PyTorch's own name, which any release may change
    _is_wrapped = _has_no_memory


def reference_attention(call: tuple[Any, ...], return_partials: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by autograd, of the values of a Call: o in q's dtype, or (numerator, denominator) in float32 before
    the division.
    """
    call = Call(*call)
    q_hat, k_hat, value = _operands(call)
    logits = _logits(q_hat @ k_hat.mT, call)
    if return_partials:
        # Unshifted by definition: only then do shards over the keys merge by plain addition.
        weights = logits.exp()  # (batch, num_heads, seq_len_q, seq_len_k)
        return weights @ value, weights.sum(-1)
    # The shift changes nothing within the documented range of logits; beyond it, it keeps the oracle finite.
    weights = (logits - _finite_row_max(logits)).exp()
    row_sum = weights.sum(-1, keepdim=True)
    o = (weights @ value) / row_sum.masked_fill(row_sum == 0, 1)  # 0 / 1 in a row without a visible key
    return o.to(call.q.dtype)


def reference_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Return o (batch, num_heads, seq_len_q, head_dim) and row_sum_log2 (batch, num_heads, seq_len_q).

    row_sum_log2 = log2(rowsum(exp(S))), in float32, is all that the backward pass needs to restore the
    probabilities. It is -inf, and o is 0, in a row without a visible key.
    """
    q_hat, k_hat, value = _operands(call)
    logits = _logits(q_hat @ k_hat.mT, call)
    row_max = _finite_row_max(logits)
    weights = (logits - row_max).exp()
    row_sum = weights.sum(-1, keepdim=True)
    o = (weights @ value) / row_sum.masked_fill(row_sum == 0, 1)
    row_sum_log2 = row_sum.log2() + row_max * LOG2_E
    return _laid_out_like(call.q, o.to(call.q.dtype)), row_sum_log2.squeeze(-1).contiguous()


def reference_partials(call: Call) -> tuple[Tensor, Tensor]:
    """Return exp(S) v (batch, num_heads, seq_len_q, head_dim) and rowsum(exp(S)), in float32."""
    q_hat, k_hat, value = _operands(call)
    weights = _logits(q_hat @ k_hat.mT, call).exp()
    return (weights @ value).contiguous(), weights.sum(-1)


def reference_backward(
    do: Tensor, call: Call, o: Tensor, row_sum_log2: Tensor, drow_sum_log2: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Return the gradients in the order of DIFFERENTIABLE, each in its input's dtype and layout; (0,) if not needed.

    The row statistics replace the softmax's Jacobian as in Dao et al. 2022, "FlashAttention", appendix B,
    arXiv:2205.14135; the scores are computed again instead of being stored.
    """
    q_hat, k_hat, value = _operands(call)
    do, o = do.to(q_hat.dtype), o.to(q_hat.dtype)
    cos = q_hat @ k_hat.mT  # (batch, num_heads, seq_len_q, seq_len_k)
    logits = _logits(cos, call)

    # P = exp(S) / rowsum(exp(S)). +inf in place of log2(0) makes P exactly 0 in an empty row.
    row_sum_log2 = row_sum_log2.masked_fill(row_sum_log2 == -math.inf, math.inf)
    probabilities = torch.exp2(logits * LOG2_E - row_sum_log2.unsqueeze(-1))
    # dP = dO V^T;  delta = rowsum(dO * O) = rowsum(P * dP);  dS = P * (dP - delta)
    delta = (do * o).sum(-1, keepdim=True)
    if drow_sum_log2 is not None:
        # d row_sum_log2 / dS = P * log2(e), so its gradient joins the row statistic.
        delta = delta - LOG2_E * drow_sum_log2.unsqueeze(-1)
    dlogits = probabilities * (do @ value.mT - delta)

    # S = scale * cos + bias:  dq^ = scale * dS k^;  dk^ = scale * dS^T q^;  dbias = dS;  dscale = sum(dS cos);
    # ddistance_bias[t] = sum of dS at the distance t
    need_dq, need_dk, need_dv, need_dattn_bias, need_dscale, need_ddistance_bias = needs
    dcos = dlogits * _per_head(scale_of(call))
    # Each its own tensor: an operator's outputs must not share memory.
    dq, dk, dv, dattn_bias = (call.q.new_empty(0) for _ in range(4))
    dscale, ddistance_bias = (call.q.new_empty(0, dtype=q_hat.dtype) for _ in range(2))
    if need_dq:
        dq = _laid_out_like(call.q, _unnormalised_grad(dcos @ k_hat, call.q, call))
    if need_dk:
        dk_hat = _sum_head_group(dcos.mT @ q_hat, call.k.shape[1])
        dk = _laid_out_like(call.k, _unnormalised_grad(dk_hat, call.k, call))
    if need_dv:
        dv = _sum_head_group(probabilities.mT @ do, call.v.shape[1])
        dv = _laid_out_like(call.v, dv.to(call.v.dtype))
    if need_dattn_bias:
        dattn_bias = dlogits.sum_to_size(call.attn_bias.shape)
        dattn_bias = _laid_out_like(call.attn_bias, dattn_bias.to(call.attn_bias.dtype))
    if need_dscale:
        dscale = (dlogits * cos).sum((0, 2, 3))  # (num_heads,)
        dscale = dscale.masked_fill(call.scale.abs() > call.scale_value, 0)
        dscale = (dscale.sum(0, keepdim=True) if call.scale.numel() == 1 else dscale).to(call.scale.dtype)
    if need_ddistance_bias:
        ddistance_bias = _sum_by_distance(dlogits, call)
    return dq, dk, dv, dattn_bias, dscale, ddistance_bias


def expand_kv_heads(kv: Tensor, num_heads: int) -> Tensor:
    """Repeat (batch, num_kv_heads, seq_len_k, head_dim) to num_heads heads; a view if num_kv_heads is 1."""
    num_kv_heads = kv.shape[1]
    if num_kv_heads == num_heads:  # 0 of 0, too: a rank's part of fewer heads than ranks
        return kv
    return kv.unsqueeze(2).expand(-1, -1, num_heads // num_kv_heads, -1, -1).flatten(1, 2)


def key_ranges(
    seq_len_q: int,
    seq_len_k: int,
    window_left: int,
    window_right: int,
    device: torch.device,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The keys that each query's window and sequence leave: first and end, int64 (seq_len_q,); None where all are.

    Query i sees the keys from first[i] up to, not including, end[i]: none where end[i] <= first[i].
    """
    if window_left < 0 and window_right < 0 and cu_seqlens_q is None:
        return None
    first, end, diagonal = _sequence_of_queries(seq_len_q, seq_len_k, device, cu_seqlens_q, cu_seqlens_k)
    if window_left >= 0:
        first = torch.maximum(first, diagonal - window_left)
    if window_right >= 0:
        end = torch.minimum(end, diagonal + window_right + 1)
    return first, end


def keys_at_distance_0(
    seq_len_q: int,
    seq_len_k: int,
    device: torch.device,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """The key at the distance 0 of each query, int64 (seq_len_q,); it may lie outside of the sequence."""
    return _sequence_of_queries(seq_len_q, seq_len_k, device, cu_seqlens_q, cu_seqlens_k)[2]


def _sequence_of_queries(
    seq_len_q: int, seq_len_k: int, device: torch.device, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first key and the end of the keys of each query's sequence, and the key at its distance 0."""
    query = torch.arange(seq_len_q, device=device)
    if cu_seqlens_q is None:
        first, end = torch.zeros_like(query), torch.full_like(query, seq_len_k)
        last_query = seq_len_q
    else:
        ends_q, bounds_k = cu_seqlens_q[1:].long(), cu_seqlens_k.long()
        sequence = torch.bucketize(query, ends_q, right=True)
        # Behind the last sequence both are its end: no keys.
        following = (sequence + 1).clamp(max=ends_q.shape[0])
        first, end = bounds_k[sequence], bounds_k[following]
        last_query = ends_q[following - 1]
    # Bottom-right aligned: the last query is at the last key, as key/value caches need.
    return first, end, query + end - last_query


def distance_scores(
    distance_bias: Tensor | None, alibi_slopes: Tensor | None, first_distance: int, distance: Tensor
) -> Tensor:
    """What is added to the scores at `distance`, int64 (rows, keys): (1 or batch, num_heads, rows, keys).

    distance_bias, alibi_slopes and first_distance are those of a Call; one of the two is there.
    """
    scores = None
    if distance_bias is not None:  # only hidden keys are at distances that it does not have
        if distance_bias.shape[1] == 0:  # all keys are hidden
            distance_bias = torch.nn.functional.pad(distance_bias, (0, 1))
        scores = distance_bias[:, (distance - first_distance).clamp(0, distance_bias.shape[1] - 1)][None]
    if alibi_slopes is not None:
        alibi = -alibi_slopes[:, :, None, None] * distance.abs()
        scores = alibi if scores is None else scores + alibi
    assert scores is not None
    return scores


def visible_keys(mask: Tensor | None, ranges: tuple[Tensor, Tensor] | None, seq_len_k: int) -> Tensor | None:
    """True where a query may see a key, (batch or 1, 1, seq_len_q or 1, seq_len_k); None where all may.

    mask is (batch, seq_len_k), ranges as key_ranges says.
    """
    visible = None if mask is None else mask[:, None, None, :]
    if ranges is not None:
        first, end = (bound.unsqueeze(-1) for bound in ranges)
        key = torch.arange(seq_len_k, device=first.device)
        inside = ((first <= key) & (key < end))[None, None]
        visible = inside if visible is None else visible & inside
    return visible


def _operands(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q^, k^ and v in `compute_dtype`, each with num_heads heads."""
    dtype = compute_dtype(call.q.dtype)
    q_hat = l2norm(call.q, call.groups) if call.l2norm_qk else call.q.to(dtype)
    k_hat = l2norm(call.k, call.groups) if call.l2norm_qk else call.k.to(dtype)
    num_heads = call.q.shape[1]
    return q_hat, expand_kv_heads(k_hat, num_heads), expand_kv_heads(call.v.to(dtype), num_heads)


def _logits(cos: Tensor, call: Call) -> Tensor:
    seq_len_q, seq_len_k = cos.shape[-2:]
    logits = cos * _per_head(scale_of(call))
    if call.attn_bias is not None:
        logits = logits + call.attn_bias.to(cos.dtype)
    if call.distance_bias is not None or call.alibi_slopes is not None:
        by_distance = call.distance_bias, call.alibi_slopes, call.first_distance
        logits = logits + distance_scores(*by_distance, _distances(call))
    window, packing = (call.window_left, call.window_right), (call.cu_seqlens_q, call.cu_seqlens_k)
    ranges = key_ranges(seq_len_q, seq_len_k, *window, cos.device, *packing)
    visible = visible_keys(call.mask, ranges, seq_len_k)
    return logits if visible is None else logits.masked_fill(~visible, -math.inf)


def _distances(call: Call) -> Tensor:
    """int64 (seq_len_q, seq_len_k)"""
    lengths = call.q.shape[-2], call.k.shape[-2]
    diagonal = keys_at_distance_0(*lengths, call.q.device, call.cu_seqlens_q, call.cu_seqlens_k)
    return diagonal[:, None] - torch.arange(call.k.shape[-2], device=call.q.device)


def _sum_by_distance(dlogits: Tensor, call: Call) -> Tensor:
    """Sums (batch, num_heads, seq_len_q, seq_len_k) to the shape of call.distance_bias."""
    assert call.distance_bias is not None
    num_heads, num_distances = call.distance_bias.shape
    if num_distances == 0:  # all keys are hidden
        return dlogits.new_zeros(num_heads, 0)
    place = (_distances(call) - call.first_distance).clamp(0, num_distances - 1)  # hidden keys, at others, have zeros
    sums = dlogits.new_zeros(num_heads, num_distances)
    return sums.index_add_(1, place.flatten(), dlogits.sum(0).flatten(1))


def _per_head(scale: float | Tensor) -> float | Tensor:
    return scale.view(-1, 1, 1) if isinstance(scale, Tensor) else scale


def _laid_out_like(like: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` with the strides of torch.empty_like(like), as the operators promise."""
    empty = torch.empty_like(like, dtype=tensor.dtype)
    return tensor if tensor.stride() == empty.stride() else empty.copy_(tensor)


def _finite_row_max(logits: Tensor) -> Tensor:
    if logits.shape[-1] == 0:
        return logits.new_zeros((*logits.shape[:-1], 1))
    row_max = logits.detach().amax(-1, keepdim=True)
    # -inf - (-inf) would be NaN in a row without a visible key.
    return row_max.masked_fill(row_max == -math.inf, 0)


def _unit_groups(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x / |x| as (..., groups, head_dim / groups), and |x| as two factors that are each in range.

    Dividing by the largest magnitude first keeps the squares of 1e-20 or 1e20 inside float32. Its gradient is
    zero by homogeneity, so it is detached. A zero vector is divided by inf: it stays zero, with gradient 0.
    """
    grouped = x.to(compute_dtype(x.dtype)).unflatten(-1, (groups, x.shape[-1] // groups))
    largest = grouped.detach().abs().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == 0, math.inf)
    bounded = grouped / largest
    square_sum = bounded.square().sum(-1, keepdim=True)  # in [1, head_dim / groups], or 0
    inverse_norm = square_sum.masked_fill(square_sum == 0, 1).rsqrt()
    return bounded * inverse_norm, inverse_norm, largest


def _unnormalised_grad(dx_hat: Tensor, x: Tensor, call: Call) -> Tensor:
    """Project the gradient of x^ = x / |x| onto the tangent plane: dx = (dx^ - x^ (x^.dx^)) / |x|."""
    if not call.l2norm_qk:
        return dx_hat.to(x.dtype)
    x_hat, inverse_norm, largest = _unit_groups(x, call.groups)
    dx_hat = dx_hat.unflatten(-1, x_hat.shape[-2:])
    tangent = dx_hat - x_hat * (x_hat * dx_hat).sum(-1, keepdim=True)
    return (tangent * inverse_norm / largest).flatten(-2).to(x.dtype)


def _sum_head_group(dkv: Tensor, num_kv_heads: int) -> Tensor:
    """Sum (batch, num_heads, seq_len_k, head_dim) over the query heads that share a key/value head."""
    if dkv.shape[1] == num_kv_heads:
        return dkv
    return dkv.unflatten(1, (num_kv_heads, dkv.shape[1] // num_kv_heads)).sum(2)
