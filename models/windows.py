"""Sliding windows: which layers have one, how many keys it leaves, and regular attention within one.

A window of w keys: query i sees the keys i - w + 1 to i. It counts the query's own key, as the sliding_window of
Mistral, Gemma and Hugging Face does; FlashAttention's and the library's window_size, which do not, say (w - 1, 0).
"""

import functools
import logging
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flash_cosine_sim_attention import flash_cosine_sim_attention

# flex_attention's own tile of its mask; its kernels want multiples of their tiles, which are up to 128.
BLOCK = 128
SMALLEST_FLEX_HEAD_DIM = 16  # of its kernels' products
LARGEST_FLEX_HEAD_DIM = 256  # beyond, PyTorch's own tiles need more shared memory than a GPU has
# A learned bias trains slowly by flex_attention, which adds up a table's gradient pair by pair, in few places. A bias
# for every pair, with batch * num_heads * seq_len^2 numbers of gradient, trains seven times as fast at 1024; that it is
# the lesser evil up to this length is an estimate (docs/log/2026-11-30-a-learned-bias-for-every-pair-trained.md).
LONGEST_DENSE_BIAS = 2048

log = logging.getLogger(__name__)


def window_of_layer(window: int | None, pattern: str | None, *, layer: int, num_layers: int) -> int | None:
    """The most keys that a query of this layer sees, or None for all before it and itself.

    Args:
        window: the configured number of keys, itself among them; None: no layer has a window.
        pattern: S (with the window) and L (without) for the layers in turn, from the first; None: S for all.
        layer: from 0. The last layer sees everything, whatever the pattern says: what it cannot see no later layer
            could bring to the output.
        num_layers: of the model.

    Raises:
        ValueError: window is below 1, pattern has other letters or none, or there is a pattern without a window, or a
            window that no layer of the pattern has.
    """
    if pattern is not None and not re.fullmatch("[SL]+", pattern):
        raise ValueError(f"attention.window_pattern must be null or letters S and L, e.g. SSSL, got {pattern!r}")
    if window is None:
        if pattern is not None:
            raise ValueError(
                f"attention.window_pattern needs attention.window, which must be at least 1, got {pattern!r} with "
                "attention.window=null"
            )
        return None
    if window < 1:
        raise ValueError(f"attention.window must be null or at least 1, got {window}")
    if pattern is not None and "S" not in pattern:
        raise ValueError(f"attention.window={window} is for the layers S of attention.window_pattern, got {pattern!r}")
    if layer == num_layers - 1 or (pattern is not None and pattern[layer % len(pattern)] == "L"):
        return None
    return window


def mean_visible_keys(seq_len: int, window: int | None) -> float:
    """Visible keys a query, the mean over seq_len queries: seq_len / 2 without a window, w - w^2 / (2 seq_len) with w.

    That is the area below the diagonal, half a key a query below the number of pairs at most.
    """
    visible = seq_len if window is None else min(window, seq_len)
    return visible * (1 - visible / (2 * seq_len))


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, distance_bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v of all positions at once, causal, a query seeing `window` keys at most.

    In a model compiled for a GPU by flex_attention, which leaves out the blocks that nobody sees; while a bias is
    learned, up to LONGEST_DENSE_BIAS, by scaled_dot_product_attention with that bias for every pair. Anywhere else by
    PyTorch's scaled_dot_product_attention under an explicit mask, in blocks of rows without the keys beside their
    windows: the library's own "sdpa" back end, which serves attention=cosine there, too. flex_attention that is not
    compiled would store every score.

    Args:
        q: (batch, num_heads, seq_len, head_dim).
        k, v: (batch, num_kv_heads, seq_len, head_dim).
        window: from 1 to seq_len, the query's own key among them.
        distance_bias: (num_heads, at least window), entry t added to the logits of keys t positions before their query;
            None: nothing is. Differentiable.
    """
    if torch.compiler.is_compiling() and q.is_cuda and _flex_serves(q, distance_bias):
        learned = distance_bias is not None and distance_bias.requires_grad
        if learned and q.shape[-2] <= LONGEST_DENSE_BIAS and q.shape[-1] % 8 == 0:  # its kernel's head dims
            return by_dense_bias(q, k, v, window, distance_bias)
        return by_flex(q, k, v, window, distance_bias)
    if not torch.compiler.is_compiling() and q.is_cuda and q.requires_grad:
        _say_that_it_is_not_compiled()
    scale = 1 / math.sqrt(q.shape[-1])
    # Without its l2norm this is attention with any queries and keys; SDPA, not exp alone, holds the logits in range.
    if distance_bias is not None:  # the library's is for every distance there is
        distance_bias = F.pad(distance_bias, (0, max(0, k.shape[-2] - distance_bias.shape[-1])))
    return flash_cosine_sim_attention(
        q, k, v, scale=scale, causal=True, l2norm_qk=False, window_size=(window - 1, 0), distance_bias=distance_bias,
        backend="sdpa",
    )  # fmt: skip


def _flex_serves(q: Tensor, distance_bias: Tensor | None) -> bool:
    if distance_bias is not None and distance_bias.requires_grad and torch.are_deterministic_algorithms_enabled():
        return False  # its gradient there is summed in no fixed order
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return SMALLEST_FLEX_HEAD_DIM <= q.shape[-1] <= LARGEST_FLEX_HEAD_DIM


@functools.cache
def _say_that_it_is_not_compiled() -> None:
    log.warning(
        "attention=regular with attention.window, or with model.positions=alibi or dynamic, is not compiled here: it "
        "trains by an explicit mask, slower than the flex_attention of compile=true"
    )


def by_flex(q: Tensor, k: Tensor, v: Tensor, window: int, distance_bias: Tensor | None = None) -> Tensor:
    """The same by flex_attention, to be compiled."""

    def biased(score: Tensor, _batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # The score of a pair that the mask hides is computed, too, and must not read outside of the table.
        return score + distance_bias[head, (i - j).clamp(0, distance_bias.shape[-1] - 1)]

    blocks = block_mask(q.shape[-2], window, q.device)
    # Not "AUTO": the kernel for decoding, which that takes below 128 queries, has no tile for many grouped heads, and
    # would take forward tiles that it is not made for.
    options: dict[str, str | int] = {"BACKEND": "TRITON"}
    score_mod = None
    if distance_bias is not None:
        options |= tiles_with_a_table(q.shape[-1], q.dtype)
        score_mod = biased
    return flex_attention(
        q, k, v, score_mod=score_mod, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options
    )


def by_dense_bias(q: Tensor, k: Tensor, v: Tensor, window: int, distance_bias: Tensor) -> Tensor:
    """The same by scaled_dot_product_attention with a bias for every pair, -inf where there is nothing to see."""
    bias = bias_of_pairs(distance_bias[:, :window], q.shape[-2]).to(q.dtype)
    group = q.shape[1] // k.shape[1]
    if group > 1:  # of the kernels that take a bias none has grouped heads
        k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    # PyTorch prefers cuDNN on a Hopper, whose backward pass under a mask returns NaN at some lengths:
    # pytorch/pytorch#196678.
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if q.is_cuda else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(q), -1, -1, -1))


def bias_of_pairs(distance_bias: Tensor, seq_len: int) -> Tensor:
    """(num_heads, seq_len, seq_len): entry i - j of the table at query i and key j, -inf where it has none.

    As Transformer-XL shifts its rows (Dai et al. 2019, appendix B): rows of 2 seq_len numbers, read as rows of one
    fewer, move by one from row to row. So the table's gradient is a sum over rows, not one pair's after the other.
    """
    num_heads, length = distance_bias.shape
    table = F.pad(distance_bias[:, :seq_len], (0, max(0, seq_len - length)), value=-math.inf)
    row = F.pad(table.flip(-1), (0, seq_len), value=-math.inf)  # of the last query: keys from the first, then none
    rows = row[:, None].expand(-1, seq_len, -1).reshape(num_heads, -1)
    shifted = rows[:, seq_len - 1 : seq_len - 1 + seq_len * (2 * seq_len - 1)]
    return shifted.view(num_heads, seq_len, 2 * seq_len - 1)[..., :seq_len]


def tiles_with_a_table(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """kernel_options of flex_attention by which a score that reads a table has the shared memory that it needs.

    PyTorch has tiles for each head dim and dtype, made for scores that read nothing: where there is no table they are
    left to it. Triton copies what the scores of a tile read into shared memory ahead of time, as it does keys, so a
    table takes 4 BLOCK_M BLOCK_N (stages - 1) bytes more. On a GPU of compute capability 9.0, which has 227 KiB, that
    makes 240 KiB of PyTorch's 112 at head dim 64 forward, and 228 of 161 at 128 backward.

    These need 96 KiB at most up to head dim 128 in 16 bits, and 102 at 256, on any GPU that was compiled for.
    """
    wide = head_dim * dtype.itemsize > 256
    forward = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 16 if wide else 64, "fwd_num_stages": 2}
    if dtype == torch.float32:
        return forward  # PyTorch's own backward has tiles of 16 x 16 and one stage, which copies nothing ahead
    step = 16 if wide else 32  # rows at a time, beside 64 of the other side that stay
    backward = {"bwd_BLOCK_M1": step, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": step, "bwd_num_stages": 2}
    return forward | backward


def block_mask(seq_len: int, window: int, device: torch.device) -> BlockMask:
    """Which BLOCK x BLOCK pairs flex_attention skips, masks, or takes whole.

    From the distances of the blocks, where create_block_mask tries every pair. Compiled, the layers' equal masks are
    made once a step, in operations on (seq_len / BLOCK)^2 numbers.
    """

    def visible(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    index = torch.arange(-(-seq_len // BLOCK), device=device)
    apart = index[:, None] - index  # (blocks of queries, blocks of keys)
    # A query and a key of two blocks are (apart - 1) * BLOCK + 1 to (apart + 1) * BLOCK - 1 positions from each other.
    seen = (apart == 0) | ((apart > 0) & ((apart - 1) * BLOCK + 1 < window))
    whole = (apart > 0) & ((apart + 1) * BLOCK <= window) & ((index[:, None] + 1) * BLOCK <= seq_len)
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(seq_len, seq_len),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool (rows, columns): how many are True in each row, (1, 1, rows), and these columns first, as int32."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
