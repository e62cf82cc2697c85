"""Self-attention around an inner module: ``CosineAttention`` or ``RegularAttention``.

``SelfAttention`` owns the projections, the rotary embedding and the key/value cache; the inner module turns
q, k, v into o. A new variant of attention is one more inner module, its entry in conf/registry.py and a file in
conf/attention/.
"""

import math
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flash_cosine_sim_attention import flash_cosine_sim_attention, l2norm_tensors
from flash_cosine_sim_attention.interface import BACKENDS, MAX_HEAD_DIM, MAX_LOGIT
from models.positions import PositionBias
from models.rotary import Rotary
from models.windows import window_of_layer, windowed_attention

PRODUCTS_AT_ONCE = 2**22  # 16 MiB of float32
LEAST_SCALE = 1e-37  # of a learned one: at a rate that nothing survives exp would give 0, which the library refuses
# Of a learned scale's bound, what is left free: in float32, the logarithm's rounding and exp's are at most 1e-6 of it.
BELOW_BOUND = 1e-5


def try_backend(backend: str | None, device: torch.device | str) -> None:
    """Raises ValueError, in the library's words, where attention.backend cannot serve on a device at all."""
    if backend != "cuda":  # the others serve everywhere; None: a kind of attention that has none
        return
    q = torch.zeros(1, 1, 1, 8, device=device)
    try:
        flash_cosine_sim_attention(q, q, q, backend=backend)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ValueError(str(error)) from error


class InnerAttention(Protocol):
    """What turns q, k and v into o inside ``SelfAttention``: an nn.Module.

    It is built from num_heads and head_dim, from layer, counted from 0, and num_layers of the model it is in, and from
    position_bias, which it adds to its logits by distance; None where positions are told in another way.

    q is (batch, num_heads, seq_len_q, head_dim), k and v are (batch, num_kv_heads, seq_len_k, head_dim), of one dtype;
    num_kv_heads divides num_heads, and each key head serves num_heads / num_kv_heads query heads in a row.
    Attention is causal: the last query sees every key, the one before it every key but the last; within a window each
    of them sees no more than the last ``window`` of these.

    One that learns its scale also has log_scale, the logarithms (num_heads,), and max_scale, their common bound: both
    are logged while training, and ``hold_scales`` keeps the first below the second. One that normalises q and k in
    equal parts of a head also has groups, their number: rotary positions need parts of even size.

    Attributes:
        window: the most keys that a query sees, itself among them, which the count of FLOPs goes by; None for all.
    """

    window: int | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o, of the shape and dtype of q; seq_len_q is seq_len_k, or 1 when keys come from a cache."""

    def largest_logit(self, q: Tensor, k: Tensor) -> Tensor:
        """The largest magnitude that a visible pair of a query and a key brings to the softmax, a float32 scalar.

        Without the position_bias, which the pair's distance brings, and not its vectors.
        """


class CosineAttention(nn.Module):
    """o = softmax(scale * cos(q, k)) v, causal (query-key normalisation, Henry et al. 2020, arXiv:2010.04245).

    Args:
        num_heads: query heads.
        head_dim: a multiple of 8 up to 256, what the library's back ends serve.
        layer: counted from 0.
        num_layers: of the model.
        scale: the fixed temperature, or the initial one of every head if ``learned_scale``.
        learned_scale: one temperature per head, learned as its logarithm and held at 60 / groups at most; with a
            position_bias at (60 - position_bias.largest) / groups.
        groups: l2-normalise the head dimension in this many equal parts; logits then reach scale * groups.
        backend: "auto", "cuda", "sdpa" or "reference", as in ``flash_cosine_sim_attention``.
        window: the most keys that a query sees, itself among them, or None; not in the last layer.
        window_pattern: the layers that have the window, as in ``window_of_layer``.
        position_bias: added to the logits by distance, or None.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        layer: int,
        num_layers: int,
        position_bias: PositionBias | None = None,
        scale: float,
        learned_scale: bool,
        groups: int,
        backend: str,
        window: int | None = None,
        window_pattern: str | None = None,
    ):
        super().__init__()
        if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"model.width / model.num_heads is the head_dim; attention=cosine accepts a multiple of 8 up to "
                f"{MAX_HEAD_DIM}, got {head_dim}"
            )
        if groups < 1 or head_dim % groups:
            raise ValueError(f"attention.groups must divide the head_dim {head_dim}, got {groups}")
        largest_bias = 0.0 if position_bias is None else position_bias.largest
        if not 0 < scale * groups <= MAX_LOGIT - largest_bias:
            left = f" (the bias of model.positions takes {largest_bias:g} of {MAX_LOGIT:g})" if largest_bias else ""
            raise ValueError(
                f"attention.scale * attention.groups bounds the logits and must be in (0, {MAX_LOGIT - largest_bias:g}]"
                f"{left}, got {scale:g} * {groups}"
            )
        if backend not in BACKENDS:
            raise ValueError(f"attention.backend must be auto, cuda, sdpa or reference, got {backend!r}")
        self.window = window_of_layer(window, window_pattern, layer=layer, num_layers=num_layers)
        self.fixed_scale = scale
        self.groups = groups
        self.backend = backend
        self.max_scale = (MAX_LOGIT - largest_bias) / groups
        self.position_bias = position_bias
        # The logarithm keeps the scale positive and makes a step of the optimizer a relative change of it.
        start = min(math.log(scale), largest_log_scale(self.max_scale))
        self.log_scale = nn.Parameter(torch.full((num_heads,), start)) if learned_scale else None

    def scale(self) -> float | Tensor:
        """The temperature: a number, or a float32 tensor (num_heads,)."""
        if self.log_scale is None:
            return self.fixed_scale
        return self.log_scale.float().exp().clamp(min=LEAST_SCALE, max=self.max_scale)

    def largest_logit(self, q: Tensor, k: Tensor) -> Tensor:
        """The largest |scale * cos(q, k)| of a visible pair, a float32 scalar; shapes as in ``forward``."""
        q, k = l2norm_tensors(q.float(), k.float(), groups=self.groups)
        scale = torch.as_tensor(self.scale(), device=q.device)
        return (largest_products(q, k, self.window) * scale).amax()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (batch, num_heads, seq_len_q, head_dim), k and v (batch, num_kv_heads, seq_len_k, head_dim) -> like q."""
        window_size = None if self.window is None else (self.window - 1, 0)
        table = None if self.position_bias is None else self.position_bias(k.shape[-2], q)
        return flash_cosine_sim_attention(
            q, k, v, scale=self.scale(), groups=self.groups, causal=True, window_size=window_size, distance_bias=table,
            backend=self.backend,
        )  # fmt: skip


class RegularAttention(nn.Module):
    """o = softmax(q k^T / sqrt(head_dim)) v, causal: PyTorch's scaled_dot_product_attention (Vaswani et al. 2017).

    Layers with a window or a position_bias take ``windowed_attention``, which says by what it is computed. Arguments as
    those of ``CosineAttention``.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        layer: int,
        num_layers: int,
        position_bias: PositionBias | None = None,
        window: int | None = None,
        window_pattern: str | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.position_bias = position_bias
        self.window = window_of_layer(window, window_pattern, layer=layer, num_layers=num_layers)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Shapes as in ``CosineAttention``; seq_len_q is 1 (decoding) or seq_len_k (everything at once)."""
        seq_len_q, seq_len_k = q.shape[-2], k.shape[-2]
        if seq_len_q != 1 and seq_len_q != seq_len_k:  # not `in`: it goes wrong under torch.compile
            # PyTorch aligns is_causal to the top left corner, which would hide the cached keys.
            raise ValueError(f"seq_len_q must be 1 or seq_len_k = {seq_len_k}, got {seq_len_q}")
        window = seq_len_k if self.window is None else min(self.window, seq_len_k)
        table = None if self.position_bias is None else self.position_bias(window, q)  # (num_heads, window)
        if seq_len_q > 1 and (window < seq_len_k or table is not None):
            return windowed_attention(q, k, v, window, table)
        if window < seq_len_k:
            k, v = k[:, :, -window:], v[:, :, -window:]
        # The last key is at the distance 0 of the one query.
        bias = None if table is None else table.flip(-1)[None, :, None].to(q.dtype)  # (1, num_heads, 1, window)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=seq_len_q > 1, enable_gqa=q.shape[1] != k.shape[1]
        )

    def largest_logit(self, q: Tensor, k: Tensor) -> Tensor:
        """The largest |q k^T| / sqrt(head_dim) of a visible pair, a float32 scalar; shapes as in ``forward``."""
        return largest_products(q.float(), k.float(), self.window).amax() / math.sqrt(self.head_dim)


def largest_log_scale(max_scale: float) -> float:
    """The logarithm of a learned scale at its bound: so little below that exp gives no more, and has a gradient."""
    return math.log(max_scale * (1 - BELOW_BOUND))


@torch.no_grad()
def hold_scales(attentions: Iterable[InnerAttention]) -> None:
    """Takes learned scales that are above their bound back to it, without waiting for the device; others keep their
    bits.

    Above it a scale has no gradient, and would never come back.
    """
    learned = [inner for inner in attentions if getattr(inner, "log_scale", None) is not None]
    if learned:  # in one kernel: this is done before every step
        largest = [largest_log_scale(inner.max_scale) for inner in learned]
        torch._foreach_clamp_max_([inner.log_scale for inner in learned], largest)


def largest_products(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """The largest |q_i . k_j| that is visible in each head, float32 (num_heads,): query rows in turn, in little memory.

    q (batch, num_heads, seq_len, head_dim), k (batch, num_kv_heads, seq_len, head_dim), both float32. Visible is
    j <= i, with a window i - window < j <= i.
    """
    batch, num_heads, seq_len, _ = q.shape
    k = k.repeat_interleave(num_heads // k.shape[1], dim=1)
    rows = max(1, PRODUCTS_AT_ONCE // (batch * num_heads * seq_len))
    largest = q.new_zeros(num_heads)
    for start in range(0, seq_len, rows):
        end = min(start + rows, seq_len)
        products = q[:, :, start:end] @ k[:, :, :end].mT  # (batch, num_heads, rows, end)
        visible = products.abs().tril(start)
        if window is not None:
            visible = visible.triu(start - window + 1)
        largest = torch.maximum(largest, visible.amax((0, 2, 3)))
    return largest


class KVCache:
    """Rotated keys and values of one layer, filled from the left: two (batch, num_kv_heads, seq_len, head_dim).

    A layer with a window keeps all of them, too, and reads those of its window.
    """

    def __init__(self, shape: tuple[int, int, int, int], *, device: torch.device, dtype: torch.dtype):
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k, v (batch, num_kv_heads, n, head_dim) and returns views of all that is held."""
        end = self.length + k.shape[-2]
        if end > self.k.shape[-2]:
            raise ValueError(f"the cache holds {self.k.shape[-2]} positions, got {end}")
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class SelfAttention(nn.Module):
    """Projections, rotary embedding and cache around an inner attention module.

    Args:
        width: channels of the residual stream.
        num_heads: query heads; head_dim = width / num_heads.
        num_kv_heads: key/value heads; divides num_heads (grouped-query attention), 1 is multi-query.
        inner: the attention itself, q, k, v -> o.
        rotary: position embedding of q and k, or None when positions are told elsewhere.
        dropout: probability of dropping an output channel of the layer.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        inner: InnerAttention,
        rotary: Rotary | None,
        dropout: float,
    ):
        super().__init__()
        self.head_dim = width // num_heads
        self.sizes = (width, num_kv_heads * self.head_dim, num_kv_heads * self.head_dim)  # channels of q, k, v
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.inner = inner
        self.rotary = rotary
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (batch, n, width) -> (batch, n, width); with a cache, x continues what the cache holds."""
        q, k, v = self.project(x, start=cache.length if cache else 0)
        if cache is not None:
            k, v = cache.append(k, v)
        o = self.inner(q, k, v)  # (batch, num_heads, n, head_dim)
        return self.dropout(self.out(rearrange(o, "b h n d -> b n (h d)")))

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (batch, num_heads, n, head_dim) and k, and v (batch, num_kv_heads, n, head_dim).

        In memory all three stay (batch, n, heads, head_dim), as the projection left them: nothing is transposed, and o
        and the gradients have that order, too.
        """
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (batch, n, num_heads + 2 num_kv_heads, head_dim)
        heads = [size // self.head_dim for size in self.sizes]
        q, k, v = qkv.split(heads, dim=2) if self.rotary is None else self.rotary(qkv, heads[0], start)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def check_parts(attention: SelfAttention) -> None:
    """Of a model that is to be trained: whether positions come in as distances alone.

    ``Rotary`` turns neighbouring channels (2i, 2i + 1) together. Where they lie in two parts that are normalised apart,
    the length of each part depends on the position.

    Raises:
        ValueError: attention.groups leaves parts of odd size, and the positions are rotary.
    """
    head_dim, groups = attention.head_dim, getattr(attention.inner, "groups", 1)
    if attention.rotary is not None and head_dim // groups % 2:
        accepted = [number for number in range(1, head_dim + 1) if head_dim % (2 * number) == 0]
        raise ValueError(
            f"attention.groups must cut the head_dim {head_dim} into parts of even size with model.positions=rotary, "
            f"which turns channels by pairs: {', '.join(map(str, accepted))}; got {groups}"
        )
