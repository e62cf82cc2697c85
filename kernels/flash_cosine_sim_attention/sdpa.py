"""The same attention through PyTorch's scaled_dot_product_attention (SDPA), on normalised queries and keys.

It serves every argument, and its memory grows linearly with the sequence length. The scale is folded into q
before q's only rounding to the input dtype. What SDPA's fused kernels take as it is goes there in one call:
no mask, square causal, key mask. A bias, also one by distance, a window, or causal with a key mask or with a longer k,
needs an explicit mask of seq_len_q x seq_len_k: those run in blocks of query rows, each with the keys that it can see
and recomputed in the backward pass, so that the mask (and the scores, where a kernel stores them) of one block only are
alive. The loop over the blocks is Python's: under torch.compile with dynamic lengths, the explicitly masked path has
one graph per number of blocks; a program of torch.export for more than one length has one block of all rows and keys.

Packed sequences are attended to one after the other: cu_seqlens is read, and on a GPU that waits for it. Under
torch.compile, where its values are not known, they are rows of one sequence under an explicit mask, of all keys.

PyTorch counts the FLOPs of its CUDA kernels, but has no formula for the CPU one
(aten._scaled_dot_product_flash_attention_for_cpu): FlopCounterMode shows 0 for this back end on a CPU.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .call import Call, clipped_window, scale_of
from .ops import constant_when_compiled
from .reference import (
    check_cu_seqlens,
    compute_dtype,
    distance_scores,
    expand_kv_heads,
    has_readable_values,
    has_values,
    key_ranges,
    keys_at_distance_0,
    l2norm,
    reference_attention,
    visible_keys,
)

# One block's mask is 512 x seq_len_k values per head: 1/16 of the whole at 8192 queries, while 512 rows still
# give SDPA's kernels (tiles of 64 to 128 rows) enough to do per head.
ROWS_PER_BLOCK = 512

KEYS_OF_A_CUDNN_TILE = 128

_INSTEAD = "use backend='reference' (or plain_cosine_sim_attention), which is plain PyTorch"
NO_FORWARD_MODE = f"backend='sdpa' has no forward-mode derivative: PyTorch's fused attention has none; {_INSTEAD}"
NO_DOUBLE_BACKWARD = f"backend='sdpa' has no double backward: PyTorch's fused attention has none; {_INSTEAD}"


def sdpa_attention(call: tuple[Any, ...], return_partials: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the values of a Call."""
    call = Call(*call)
    q, k, v, mask, attn_bias = call.q, call.k, call.v, call.mask, call.attn_bias
    if q.numel() == 0 or k.numel() == 0:  # nothing to compute, and not every SDPA kernel takes it
        return reference_attention(call, return_partials)
    packed = call.cu_seqlens_q is not None
    if packed and not torch.compiler.is_compiling() and has_values(call.cu_seqlens_q) and has_values(call.cu_seqlens_k):
        return _each_sequence(call, return_partials)
    seq_len_q, seq_len_k = q.shape[-2], k.shape[-2]
    # A single query, for instance, is aligned with the last key, and sees every key under a causal mask, too.
    window = call.window_left, call.window_right
    if not torch.compiler.is_exporting():  # as in interface.py: that would narrow the program's range of lengths
        window = clipped_window(*window, seq_len_q, seq_len_k)
    # Partial sums are float32 throughout, so there q and k are not rounded.
    dtype = compute_dtype(q.dtype) if return_partials else q.dtype
    q, k = _scaled_and_normalised(call, dtype)
    has_bias = attn_bias is not None or call.distance_bias is not None or call.alibi_slopes is not None
    if not return_partials and not packed and not has_bias:
        if window == (-1, -1):
            return _attend_with_key_mask(q, k, v, mask)
        if window == (-1, 0) and mask is None and _at_least(seq_len_q, seq_len_k):
            return _attend_square_causal(q, k, v)
    ranges = key_ranges(seq_len_q, seq_len_k, *window, q.device, call.cu_seqlens_q, call.cu_seqlens_k)
    if packed:  # which keys a block of rows can see is not known
        window = -1, -1
    by_distance = _by_distance(call)
    if return_partials:
        return _in_row_blocks(_partials_of_rows, q, k, v.to(dtype), mask, attn_bias, by_distance, ranges, window)
    return _in_row_blocks(_attend_rows, q, k, v, mask, attn_bias, by_distance, ranges, window)[0]


def _at_least(seq_len_q: int, seq_len_k: int) -> bool:
    """Whether seq_len_q >= seq_len_k; False where an exported program may get either."""
    if not torch.compiler.is_exporting():
        return seq_len_q >= seq_len_k
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which imports sympy

    return bool(statically_known_true(seq_len_q >= seq_len_k))


def _may_be_any(seq_len_q: int, seq_len_k: int) -> bool:
    """Whether an exported program is for more than these lengths."""
    if not torch.compiler.is_exporting():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not (has_static_value(seq_len_q) and has_static_value(seq_len_k))


class ByDistance(NamedTuple):
    """What is added to the scores by distance, in the names of a Call, and where distance 0 is."""

    distance_bias: Tensor | None
    alibi_slopes: Tensor | None
    first_distance: int
    # The distance of the first row from the first key, where each row is at one more than the row before it; packed,
    # int64 (rows,), the key at each row's distance 0.
    diagonal: int | Tensor

    def of(self, first_row: int, end_row: int, first_key: int) -> "ByDistance":
        """The same for some of the rows, and keys from first_key on."""
        rows = self.diagonal[first_row:end_row] if isinstance(self.diagonal, Tensor) else self.diagonal + first_row
        return self._replace(diagonal=rows - first_key)


def _by_distance(call: Call) -> ByDistance | None:
    if call.distance_bias is None and call.alibi_slopes is None:
        return None
    lengths = call.q.shape[-2], call.k.shape[-2]
    diagonal: int | Tensor = lengths[1] - lengths[0]
    if call.cu_seqlens_q is not None:
        diagonal = keys_at_distance_0(*lengths, call.q.device, call.cu_seqlens_q, call.cu_seqlens_k)
    return ByDistance(call.distance_bias, call.alibi_slopes, call.first_distance, diagonal)


def _scores_by_distance(by_distance: ByDistance, num_rows: int, num_keys: int) -> Tensor:
    """(1 or batch, num_heads, num_rows, num_keys), of as many rows and keys as by_distance begins with."""
    bias, slopes, first_distance, diagonal = by_distance
    if torch.compiler.is_compiling() and not isinstance(diagonal, Tensor):
        # The sizes of unfold, below, would be constants of the graph.
        diagonal = diagonal + torch.arange(num_rows, device=bias.device if bias is not None else slopes.device)
    if isinstance(diagonal, Tensor):
        key = torch.arange(num_keys, device=diagonal.device)
        return distance_scores(bias, slopes, first_distance, diagonal[:, None] - key)
    # All that the rows need, the last row's distance from the first key first: a row's are num_keys neighbours, and a
    # gradient adds those up faster than it would add to places of the table.
    device = bias.device if bias is not None else slopes.device
    distance = diagonal + num_rows - 1 - torch.arange(num_rows + num_keys - 1, device=device)
    scores = distance_scores(bias, slopes, first_distance, distance[None]).squeeze(-2)  # (1 or batch, num_heads, all)
    return scores.unfold(-1, num_keys, 1).flip(-2)


def _each_sequence(call: Call, return_partials: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed sequences, one after the other; then of the queries behind the last one, without keys."""
    lengths_q = _lengths("cu_seqlens_q", call.cu_seqlens_q, call.q.shape[-2])
    lengths_k = _lengths("cu_seqlens_k", call.cu_seqlens_k, call.k.shape[-2])
    # split, not slices: see _in_row_blocks.
    q, k, v = call.q.split(lengths_q, -2), call.k.split(lengths_k, -2), call.v.split(lengths_k, -2)
    k, v = (*k[:-1], k[-1][..., :0, :]), (*v[:-1], v[-1][..., :0, :])
    results = []
    for sequence in zip(q, k, v, strict=True):
        one = (
            *sequence, None, None, call.scale, None, None, call.distance_bias, call.alibi_slopes, call.scale_value,
            call.groups, call.causal, call.window_left, call.window_right, call.first_distance, call.l2norm_qk,
        )  # fmt: skip
        results.append(sdpa_attention(one, return_partials))
    if return_partials:
        return tuple(torch.cat(parts, dim=2) for parts in zip(*results, strict=True))
    return torch.cat(results, dim=2)


def _lengths(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """The number of rows of each sequence, and of those behind the last one."""
    bounds = cu_seqlens.tolist()
    check_cu_seqlens(name, bounds, total)  # on a GPU nobody has
    return [end - start for start, end in zip(bounds, [*bounds[1:], total], strict=True)]


def _scaled_and_normalised(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale * q^ and k^, each rounded once to dtype."""
    wide = compute_dtype(call.q.dtype)
    q_hat = l2norm(call.q, call.groups) if call.l2norm_qk else call.q.to(wide)
    k_hat = l2norm(call.k, call.groups) if call.l2norm_qk else call.k.to(wide)
    scale = scale_of(call)
    scale = scale.to(wide).view(-1, 1, 1) if isinstance(scale, Tensor) else scale
    return (q_hat * scale).to(dtype), k_hat.to(dtype)


def _attend_with_key_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return _sdpa(q, k, v)
    # SDPA's kernels disagree on a row without a visible key (NaN, or the mean of v). Such a batch element
    # attends everywhere, finitely, and its output is then replaced: no NaN can reach a gradient.
    empty = ~mask.any(-1, keepdim=True)  # (batch, 1)
    o = _sdpa(q, k, v, attn_mask=(mask | empty)[:, None, None, :])
    return o.masked_fill(empty[:, :, None, None], 0)


def _attend_square_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal with seq_len_q >= seq_len_k: the first rows see nothing, the rest is square."""
    num_empty = q.shape[-2] - k.shape[-2]
    o = _sdpa(q[..., num_empty:, :], k, v, is_causal=True)
    return F.pad(o, (0, 0, num_empty, 0)) if num_empty > 0 else o


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    num_heads = q.shape[1]
    enable_gqa = False
    if k.shape[1] != num_heads:
        # On CUDA the 16-bit flash kernel shares k and v between heads. The memory-efficient one does not, and
        # it alone takes float32 (or, where cuDNN's does not serve, a mask): PyTorch would materialise the
        # scores instead, 4.2 GB where expanded k and v take 0.1 (4096 x 4096, 16 heads, float32, an H100).
        enable_gqa = attn_mask is None and q.dtype in (torch.float16, torch.bfloat16)
        if not enable_gqa:
            k, v = expand_kv_heads(k, num_heads), expand_kv_heads(v, num_heads)
    if attn_mask is not None and attn_mask.requires_grad and not any(x.requires_grad for x in (q, k, v)):
        # On CUDA the memory-efficient kernel keeps what its backward pass needs only if q, k or v wants a gradient,
        # and that pass then raises. The sum over nothing is 0, but wants one.
        q = q + attn_mask[..., :0].sum()
    try:
        with _kernels_to_trust(q, k, v, attn_mask):
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=1.0, enable_gqa=enable_gqa
            )
    except NotImplementedError as error:
        if "forward AD" not in str(error):
            raise
        raise NotImplementedError(NO_FORWARD_MODE) from error
    if not torch.compiler.is_compiling() and o.grad_fn is not None:  # compiled, PyTorch refuses it in words of its own
        o.grad_fn.register_hook(_differentiable_once)
    return o if q.is_cuda else _nan_where_logits_are(o, q, k, is_causal=is_causal, masked=attn_mask is not None)


def _kernels_to_trust(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> AbstractContextManager:
    """What SDPA is called in: under a mask on CUDA its kernel is the memory-efficient one, where cuDNN's may be wrong.

    On compute capability 9.0 PyTorch prefers cuDNN's, whose backward pass returns NaN for a query with no logit above
    -88 (2^-126, float32's smallest, is e^-87.3) if the number of keys is 64 above a multiple of 128:
    pytorch/pytorch#196678. At multiples of 128 it was right; what it does at others nobody has tried, so that they go
    without it, too.
    """
    if attn_mask is None or not q.is_cuda or k.shape[-2] % KEYS_OF_A_CUDNN_TILE == 0:
        return nullcontext()
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v, attn_mask)):
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _differentiable_once(grad_inputs: tuple[Tensor | None, ...], _grad_outputs) -> tuple[Tensor | None, ...] | None:
    """A hook behind SDPA's backward pass: where PyTorch cannot differentiate that, says what can."""
    if not torch.is_grad_enabled():  # no create_graph
        return None
    once = (grad is not None and type(grad.grad_fn).__name__ == "NotImplemented" for grad in grad_inputs)
    return tuple(_DifferentiableOnce.apply(g) if is_once else g for g, is_once in zip(grad_inputs, once, strict=True))


class _DifferentiableOnce(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(_ctx, _grad: Tensor):
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def _nan_where_logits_are(o: Tensor, q: Tensor, k: Tensor, *, is_causal: bool, masked: bool) -> Tensor:
    """Puts NaN into the rows of o that softmax would.

    The CPU kernel takes the largest of few logits by a comparison, which passes NaN by: a row of nothing else looks
    like one without a key, and becomes zeros.
    """
    if not torch.compiler.is_compiling() and has_readable_values(o) and not (o.select(-1, 0) == 0).any():
        return o
    lost = q.isnan().any(-1, keepdim=True)  # (batch, num_heads, seq_len_q, 1)
    if not masked:  # a masked key may be anything
        keys = expand_kv_heads(k.isnan().any(-1, keepdim=True), q.shape[1])
        lost = lost | (keys.cumsum(-2) > 0 if is_causal else keys.any(-2, keepdim=True))
    return o.masked_fill(lost, math.nan)


def _in_row_blocks(
    attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    by_distance: ByDistance | None,
    ranges: tuple[Tensor, Tensor] | None,
    window: tuple[int, int],
) -> tuple[Tensor, ...]:
    """Concatenate `attend(q_rows, k, v, mask, attn_bias_rows, by_distance_of_rows, ranges_of_rows)` over blocks of
    query rows.

    ranges are those of key_ranges; window says which keys a block gets, that is, can see at all.
    """
    seq_len_q, seq_len_k = q.shape[-2], k.shape[-2]
    if _may_be_any(seq_len_q, seq_len_k):  # how many blocks there are, and of which keys, would depend on the lengths
        return attend(q, k, v, mask, attn_bias, by_distance, ranges)
    table = None if by_distance is None else by_distance.distance_bias
    differentiable = [t for t in (q, k, v, attn_bias, table) if t is not None and t.requires_grad]
    add_up = seq_len_q > ROWS_PER_BLOCK and torch.is_grad_enabled() and len(differentiable) > 0
    recompute = add_up and _can_recompute()
    if add_up:
        # The blocks' dk and dv add up; in float32 the number of blocks costs no accuracy.
        k, v = k.to(compute_dtype(k.dtype)), v.to(compute_dtype(v.dtype))
        if attn_bias is not None and attn_bias.shape[-2] != seq_len_q:  # so does the gradient of a shared row
            attn_bias = attn_bias.to(compute_dtype(attn_bias.dtype))
    # split, not slices: its backward is one concatenation instead of a padded copy of the whole per block.
    q_blocks = q.split(ROWS_PER_BLOCK, dim=-2)
    bias_blocks = _split_bias_rows(attn_bias, seq_len_q, len(q_blocks))
    results = []
    for index, (q_block, bias_block) in enumerate(zip(q_blocks, bias_blocks, strict=True)):
        rows = index * ROWS_PER_BLOCK, index * ROWS_PER_BLOCK + q_block.shape[-2]
        first, end = _keys_of_rows(*rows, seq_len_q, seq_len_k, window)
        arguments = (
            q_block,
            k[..., first:end, :],
            v[..., first:end, :],
            None if mask is None else mask[:, first:end],
            _keys_of_bias(bias_block, first, end),
            None if by_distance is None else by_distance.of(*rows, first),
            None if ranges is None else tuple(bound[slice(*rows)] - first for bound in ranges),
        )
        if recompute and end > first:
            results.append(checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(attend(*arguments))
    if len(results) == 1:
        return results[0]
    return tuple(torch.cat(parts, dim=2) for parts in zip(*results, strict=True))


@constant_when_compiled  # asked while it is traced, inside of the transforms that are traced, too
def _can_recompute() -> bool:
    """Not under torch.func's grad, vjp and jacrev: checkpoint saves tensors by hooks, which they allow nobody."""
    # PyTorch's own name, which any release may change: without it, it is as it was before anyone asked.
    allowed = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", None)
    return allowed is None or bool(allowed())


def _keys_of_rows(
    first_row: int, end_row: int, seq_len_q: int, seq_len_k: int, window: tuple[int, int]
) -> tuple[int, int]:
    """From the first key that the first of these rows can see to the end of those that the last can."""
    left, right = window
    diagonal = seq_len_k - seq_len_q
    end = seq_len_k if right < 0 else min(seq_len_k, max(0, end_row + diagonal + right))
    first = 0 if left < 0 else min(end, max(0, first_row + diagonal - left))
    return first, end


def _split_bias_rows(attn_bias: Tensor | None, seq_len_q: int, num_blocks: int) -> list[Tensor | None]:
    if attn_bias is None or attn_bias.shape[-2] != seq_len_q:  # the latter is broadcast over the queries
        return [attn_bias] * num_blocks
    return list(attn_bias.split(ROWS_PER_BLOCK, dim=-2))


def _keys_of_bias(attn_bias: Tensor | None, first: int, end: int) -> Tensor | None:
    if attn_bias is None or attn_bias.shape[-1] == 1:  # the latter is broadcast over the keys
        return attn_bias
    return attn_bias[..., first:end]


def _attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    by_distance: ByDistance | None,
    ranges: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor]:
    """One block of query rows under an explicit mask; a row without a visible key yields zeros."""
    seq_len_k = k.shape[-2]
    if seq_len_k == 0:
        return (torch.zeros_like(q),)
    visible = visible_keys(mask, ranges, seq_len_k)
    if by_distance is not None:
        scores = _scores_by_distance(by_distance, q.shape[-2], seq_len_k)
        attn_bias = scores if attn_bias is None else scores + attn_bias
        if attn_bias.dtype != q.dtype:  # rounded once, to what SDPA takes
            attn_bias = _relative_to_largest(attn_bias, visible).to(q.dtype)
    if attn_bias is None:  # then one of mask and ranges is given
        empty = ~visible.any(-1, keepdim=True)
        attn_mask = visible | empty
    else:
        attn_bias = attn_bias.to(q.dtype)
        if attn_bias.requires_grad:
            # One expansion, hence one reduction of the gradient (PyTorch sums in float32 and rounds once).
            attn_bias = attn_bias.expand(*q.shape[:-1], seq_len_k)
        if visible is not None:
            attn_bias = attn_bias.masked_fill(~visible, -math.inf)
        empty = (attn_bias == -math.inf).all(-1, keepdim=True)
        attn_mask = attn_bias.masked_fill(empty, 0)
    o = _sdpa(q, k.to(q.dtype), v.to(q.dtype), attn_mask=attn_mask)
    return (o.masked_fill(empty, 0),)


def _relative_to_largest(attn_bias: Tensor, visible: Tensor | None) -> Tensor:
    """attn_bias less the largest of what each row sees: softmax stays what it is.

    To be rounded after that: what weighs most is then near 0, where low precision is fine. At a distance of 700 ALiBi
    is 350 for a slope of 0.5, and bfloat16's numbers are 2 apart there.
    """
    seen = attn_bias.detach()
    seen = seen if visible is None else seen.masked_fill(~visible, -math.inf)
    largest = seen.amax(-1, keepdim=True)
    return attn_bias - largest.masked_fill(largest == -math.inf, 0)  # -inf - (-inf) would be NaN


def _partials_of_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    by_distance: ByDistance | None,
    ranges: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of one block of query rows; SDPA does not return the sum of a row."""
    num_heads = q.shape[1]
    k, v = expand_kv_heads(k, num_heads), expand_kv_heads(v, num_heads)
    logits = q @ k.mT  # (batch, num_heads, rows, seq_len_k)
    if attn_bias is not None:
        logits = logits + attn_bias.to(q.dtype)
    if by_distance is not None:
        logits = logits + _scores_by_distance(by_distance, *logits.shape[-2:])
    visible = visible_keys(mask, ranges, logits.shape[-1])
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    weights = logits.exp()
    return weights @ v, weights.sum(-1)
