"""Triton kernels of the rotary embedding: ``Rotary`` of a model compiled for CUDA."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's CUDA builds alone
    triton = None


class RotateByTriton(torch.autograd.Function):
    """What ``Rotary.forward`` does. The gradients of q, k and v become that of qkv in one pass, without a cat."""

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int):
        """As ``Rotary.forward``, with the positions' rows of the tables."""
        ctx.save_for_backward(cos, sin)
        qk, v = qkv.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
        q, k = rotate_packed(qk, cos, sin).split((num_heads, num_kv_heads), dim=2)
        return q, k, v

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        """The gradient of qkv."""
        return pack_gradients(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


if triton is not None:
    ELEMENTS = 1024  # of a head in a tile: 16 bytes of 16-bit channels a thread, the widest access there is
    HEADS = 8  # of a tile, which a thread loads before it stores any: one at a time does not keep the memory busy

    @triton.jit
    def _rotate_kernel(
        q, k, v, out, cos, sin,
        tokens, seq_len,
        q_batch, q_token, q_head,
        k_batch, k_token, k_head,
        v_batch, v_token, v_head,
        Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
        INVERSE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """Packs q and k, rotated, and v into out (tokens, heads, HEAD_DIM); TOKENS tokens a program, HEADS at a time.

        All heads of a token share their angles, which are read once.
        """
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
        batch, position = (token // seq_len).to(tl.int64), token % seq_len  # offsets may pass 2^31
        pair = tl.arange(0, CHANNELS // 2)[None, None, :]
        angle = position * (HEAD_DIM // 2) + pair
        known = (token < tokens) & (pair < HEAD_DIM // 2)
        cos = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)
        sin = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)
        if INVERSE:
            sin = -sin
        channel = tl.arange(0, CHANNELS)[None, None, :]
        inside = (token < tokens) & (channel < HEAD_DIM)
        q += batch * q_batch + position * q_token + channel
        k += batch * k_batch + position * k_token + channel
        v += batch * v_batch + position * v_token + channel
        out += token.to(tl.int64) * ((Q_HEADS + K_HEADS + V_HEADS) * HEAD_DIM) + channel
        heads = tl.arange(0, HEADS)[None, :, None]
        for first in range(0, Q_HEADS, HEADS):
            head = first + heads
            _rotate_tile(q + head * q_head, out + head * HEAD_DIM, cos, sin, inside & (head < Q_HEADS))
        out += Q_HEADS * HEAD_DIM
        for first in range(0, K_HEADS, HEADS):
            head = first + heads
            _rotate_tile(k + head * k_head, out + head * HEAD_DIM, cos, sin, inside & (head < K_HEADS))
        out += K_HEADS * HEAD_DIM
        for first in range(0, V_HEADS, HEADS):
            head = first + heads
            tile = tl.load(v + head * v_head, mask=inside & (head < V_HEADS))
            tl.store(out + head * HEAD_DIM, tile, mask=inside & (head < V_HEADS))

    @triton.jit
    def _rotate_tile(source, target, cos, sin, inside):
        tile = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # (TOKENS, HEADS, CHANNELS)
        even, odd = tl.split(tile.reshape(tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2))
        turned = tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(tile.shape)
        tl.store(target, turned.to(target.dtype.element_ty), mask=inside)

    def _launch(q: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
        """One tensor (batch, n, heads of all, head_dim) of q and k, rotated, and v."""
        batch, n, q_heads, head_dim = q.shape
        k_heads, v_heads = (0 if x is None else x.shape[2] for x in (k, v))
        k, v = (q if x is None else x for x in (k, v))  # of no head nothing is read
        out = q.new_empty(batch, n, q_heads + k_heads + v_heads, head_dim)
        channels = triton.next_power_of_2(head_dim)
        tokens_each = max(1, ELEMENTS // channels)
        torch.library.wrap_triton(_rotate_kernel)[(triton.cdiv(batch * n, tokens_each),)](
            q, k, v, out, cos, sin,
            batch * n, n,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            Q_HEADS=q_heads, K_HEADS=k_heads, V_HEADS=v_heads, HEAD_DIM=head_dim,
            INVERSE=inverse, TOKENS=tokens_each, HEADS=HEADS, CHANNELS=channels,
        )  # fmt: skip
        return out

    @torch.library.triton_op("flash_cosine_sim_models::rotate_packed", mutates_args=())
    def rotate_packed(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``rotate``; contiguous, whatever the strides of qk."""
        return _launch(_rows(qk), None, None, cos, sin, inverse=False)

    @torch.library.triton_op("flash_cosine_sim_models::pack_gradients", mutates_args=())
    def pack_gradients(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The gradient of qkv, contiguous: dq and dk turned back, and dv, whatever their strides."""
        return _launch(_rows(dq), _rows(dk), _rows(dv), cos, sin, inverse=True)

    def _rows(x: Tensor) -> Tensor:
        return x if x.stride(-1) == 1 else x.contiguous()
