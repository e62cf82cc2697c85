"""The attention part of models with QK-norm, as arithmetic: theirs in its order, and ours, which is one call.

Rotary embedding, RMS norms without weights and attention, of nanochat, modded-nanogpt, parameter-golf and Llama-4, as
their sources had it in 2026-08; the shapes are those that they train with on one GPU. All tensors are (batch, seq_len,
heads, head_dim), packed ones (total, heads, head_dim).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_cosine_sim_attention import cosine_scale
from flash_cosine_sim_attention.flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from scripts import packing

ROTARY_BASE = 10_000.0
FEWER = 8  # times fewer packed sequences in a smaller problem: were all kept, they would be of a few tokens each


@dataclass(frozen=True)
class Model:
    """One model's attention part, and a shape of it.

    ``kind`` is "", "key offset" or "paired heads": what modded-nanogpt does with normalised and rotated q and k.
    """

    name: str
    batch: int
    seq_len: int  # of packed sequences the total
    heads: int
    kv_heads: int
    head_dim: int
    norm_first: bool  # before the rotary embedding; else behind it
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    gain_q: float = 1.0
    gain_k: float = 1.0
    learned_gain: bool = False  # gain_q is what a learned gain for each head begins with
    pairs: bool = False  # rotates adjacent channels; else channel i with channel i + head_dim / 2
    rotated: float = 1.0  # the share of the pairs that rotate
    wide_rotary: bool = False  # tables and products of the rotation in float32; else in q's dtype
    eps: float | None = None  # of the norms; None: PyTorch's default
    window: int | None = None  # keys that a query sees before its own
    lengths: tuple[int, ...] | None = None  # of packed sequences
    kind: str = ""

    @property
    def window_size(self) -> tuple[int, int]:
        return (-1 if self.window is None else self.window), 0

    @property
    def scale(self) -> float:
        """Of the cosine; of a learned gain, at its beginning."""
        return cosine_scale(self.head_dim, self.softmax_scale, self.gain_q, self.gain_k)

    def smaller(self, tokens: int) -> "Model":
        """About so many tokens at most: short sequences, of packed ones the first; windows shrink in proportion."""
        if self.lengths is None:
            seq_len = max(2, min(self.seq_len, tokens // 2))
            share = seq_len / self.seq_len
            smaller = replace(self, seq_len=seq_len, batch=min(self.batch, max(1, tokens // seq_len)))
        else:
            share = min(1.0, FEWER * tokens / self.seq_len)
            lengths = packing.scaled(self.lengths, share)
            ends = itertools.accumulate(lengths)
            lengths = lengths[: max(1, sum(end <= tokens for end in ends))]
            smaller = replace(self, seq_len=sum(lengths), lengths=lengths)
        return replace(smaller, window=None if self.window is None else packing.scaled_one(self.window, share))


# Three layers of four have a window of a quarter of the context.
NANOCHAT = {"batch": 16, "seq_len": 2048, "head_dim": 128, "norm_first": False, "gain_q": 1.2, "gain_k": 1.2}
# Of its last stage: 24 times 2048 tokens of documents that are cut there, windows of 6 and 13 blocks of 128.
LENGTHS = tuple(packing.seeded_lengths(count=1, total=24 * 2048, longest=2048)[0])
MODDED = {"batch": 1, "seq_len": sum(LENGTHS), "heads": 6, "kv_heads": 6, "head_dim": 128, "norm_first": True,
          "softmax_scale": 0.1, "pairs": True, "rotated": 0.5, "lengths": LENGTHS}  # fmt: skip
GOLF = {"heads": 8, "kv_heads": 4, "head_dim": 64, "norm_first": True, "gain_q": 1.5, "learned_gain": True}
LLAMA = {"heads": 40, "kv_heads": 8, "head_dim": 128, "norm_first": False, "pairs": True, "wide_rotary": True,
         "eps": 1e-5}  # fmt: skip
MODELS = [
    Model("nanochat d12", heads=6, kv_heads=6, **NANOCHAT),
    Model("nanochat d12, window", heads=6, kv_heads=6, window=512, **NANOCHAT),
    Model("nanochat d20", heads=10, kv_heads=10, **NANOCHAT),
    Model("nanochat d20, window", heads=10, kv_heads=10, window=512, **NANOCHAT),
    Model("nanochat d32", heads=16, kv_heads=16, **NANOCHAT),
    Model("nanochat d32, window", heads=16, kv_heads=16, window=512, **NANOCHAT),
    Model("modded-nanogpt, short window", window=768, **MODDED),
    Model("modded-nanogpt, long window", window=1664, **MODDED),
    Model("modded-nanogpt, key offset", window=1664, kind="key offset", **MODDED),
    Model("modded-nanogpt, paired heads", window=768, kind="paired heads", **MODDED),
    Model("parameter-golf 1024", 64, 1024, **GOLF),
    Model("parameter-golf 2048", 32, 2048, **GOLF),
    Model("Llama-4 2048", 4, 2048, **LLAMA),
    Model("Llama-4 8192", 1, 8192, **LLAMA),
]


@dataclass
class Inputs:
    """q, k and v as projections give them, do in the output's shape, a learned gain (heads,) in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    gain_q: float | Tensor
    cos: Tensor = field(repr=False)  # (seq_len, 1, head_dim / 2); of paired heads (seq_len, 1, 2, head_dim / 2)
    sin: Tensor = field(repr=False)
    cu_seqlens: Tensor | None = None  # of the sequences that attend: paired heads have them twice as long
    longest: int = 0

    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        learned = [self.gain_q] if isinstance(self.gain_q, Tensor) else []
        return [self.q, self.k, self.v, *learned]

    def tensors(self) -> tuple[Tensor, ...]:
        """What enters a compiled region."""
        return (*self.leaves(), self.cos, self.sin)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "Inputs":
        """The same with other tensors in the places of tensors()."""
        q, k, v, *learned, cos, sin = tensors
        return replace(self, q=q, k=k, v=v, gain_q=learned[0] if learned else self.gain_q, cos=cos, sin=sin)


def make_inputs(model: Model, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Inputs:
    """Random inputs of a model, rounded to dtype; gradients can be taken of leaves()."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = (model.seq_len,) if model.lengths is not None else (model.batch, model.seq_len)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    q, k, v = (random(*rows, heads, model.head_dim) for heads in (model.heads, model.kv_heads, model.kv_heads))
    do = random(*_paired(q, model).shape)
    gain_q: float | Tensor = model.gain_q
    if model.learned_gain:
        uniform = torch.rand(model.heads, generator=generator, device=device)
        gain_q = (model.gain_q * (1 + uniform)).requires_grad_()
    cos, sin = tables(model, device, torch.float32 if model.wide_rotary else dtype)
    inputs = Inputs(*(tensor.requires_grad_() for tensor in (q, k, v)), do, gain_q, cos, sin)
    if model.lengths is None:
        return inputs
    times = 2 if model.kind == "paired heads" else 1
    ends = F.pad(torch.tensor(model.lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    return replace(inputs, cu_seqlens=times * ends, longest=times * max(model.lengths))


def in_double(inputs: Inputs, model: Model) -> Inputs:
    """The same numbers in float64, and the rotation exact."""
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
    gain_q = inputs.gain_q
    if isinstance(gain_q, Tensor):
        gain_q = gain_q.detach().double().requires_grad_()
    cos, sin = tables(model, q.device, torch.float64)
    return replace(inputs, q=q, k=k, v=v, do=inputs.do.double(), gain_q=gain_q, cos=cos, sin=sin)


def tables(model: Model, device: torch.device | str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation at every position."""
    half = model.head_dim // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    frequency[round(model.rotated * half) :] = 0
    position = torch.arange(model.seq_len, dtype=torch.float64)[:, None, None]
    if model.kind == "paired heads":  # of a pair, the second is a position further
        position = 2 * position.unsqueeze(-1) + torch.arange(2, dtype=torch.float64)[:, None]
    angle = position * frequency
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """Rotary embedding of (..., head_dim) in the tables' dtype, rounded to x's."""
    wide = x.to(cos.dtype)
    if pairs:
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(x.dtype)


def their_operands(model: Model, inputs: Inputs, rotary: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the model passes them to its attention: normalised, rotated, times its gains, in its order."""
    norm = partial(F.rms_norm, normalized_shape=(model.head_dim,), eps=model.eps)
    q, k = inputs.q, inputs.k
    if model.norm_first:
        q, k = norm(q), norm(k)
    if rotary:
        q, k = _rotated(q, inputs, model), _rotated(k, inputs, model)
    if not model.norm_first:
        q, k = norm(q), norm(k)
    if isinstance(inputs.gain_q, Tensor):
        q = q * inputs.gain_q.to(q.dtype).unsqueeze(-1)
    elif model.gain_q != 1:
        q = q * model.gain_q
    if model.gain_k != 1:
        k = k * model.gain_k
    if model.kind == "key offset":
        k = _offset(k)
    return _paired(q, model), _paired(k, model), _paired(inputs.v, model)


def theirs(model: Model, inputs: Inputs, attend: Callable[..., Tensor], rotary: bool = True) -> Tensor:
    """Norms, and attend(q, k, v, model, inputs)."""
    return attend(*their_operands(model, inputs, rotary), model, inputs)


def ours(model: Model, inputs: Inputs, backend: str = "auto", rotary: bool = True) -> Tensor:
    """One call, behind the rotary embedding.

    Shifting half of a key by a token changes its length, so that there the norms stay; pairing heads does not.
    """
    options = {"softmax_scale": model.softmax_scale, "causal": True, "window_size": model.window_size}
    options["backend"] = backend
    if model.kind == "key offset":
        q, k, v = their_operands(model, inputs, rotary)
        options["l2norm_qk"] = False
    else:
        q, k, v = inputs.q, inputs.k, _paired(inputs.v, model)
        if rotary:
            q, k = _rotated(q, inputs, model), _rotated(k, inputs, model)
        q, k = _paired(q, model), _paired(k, model)
        options |= {"gain_q": inputs.gain_q, "gain_k": model.gain_k}
    if inputs.cu_seqlens is None:
        return flash_attn_func(q, k, v, **options)
    ends = (inputs.cu_seqlens, inputs.cu_seqlens, inputs.longest, inputs.longest)
    return flash_attn_varlen_func(q, k, v, *ends, **options)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, model: Model, inputs: Inputs) -> Tensor:
    """Softmax attention with every score in memory, in the operands' dtype."""
    scale = model.head_dim**-0.5 if model.softmax_scale is None else model.softmax_scale
    q, k, v = (tensor.transpose(-3, -2) for tensor in (q, k, v))  # (..., heads, seq_len, head_dim)
    k, v = (tensor.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for tensor in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~visible(model, inputs, q.shape[-2]), -math.inf)
    return (scores.softmax(-1) @ v).transpose(-3, -2)


def visible(model: Model, inputs: Inputs, seq_len: int) -> Tensor:
    """Whether a query may see a key, (seq_len, seq_len)."""
    position = torch.arange(seq_len, device=inputs.q.device)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance <= (seq_len if model.window is None else model.window))
    if inputs.cu_seqlens is not None:
        sequence = torch.bucketize(position, inputs.cu_seqlens[1:], right=True)
        seen &= sequence[:, None] == sequence
    return seen


def results(o: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """The output and the gradients of leaves(), by name."""
    gradients = torch.autograd.grad(o, inputs.leaves(), inputs.do)
    return dict(zip(("o", "dq", "dk", "dv", "dgain_q"), (o.detach(), *gradients), strict=False))


def exact(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """What the model means: its arithmetic in float64, on the same inputs."""
    wide = in_double(inputs, model)
    return results(theirs(model, wide, plain_attention), wide)


def relative_errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """The relative RMS error of each result."""
    return {
        name: ((found[name].double() - value).square().mean() / value.square().mean()).sqrt().item()
        for name, value in right.items()
    }


def _rotated(x: Tensor, inputs: Inputs, model: Model) -> Tensor:
    if model.kind != "paired heads":
        return rotate(x, inputs.cos, inputs.sin, model.pairs)
    return rotate(x.unflatten(-2, (-1, 2)), inputs.cos, inputs.sin, model.pairs).flatten(-3, -2)


def _offset(k: Tensor) -> Tensor:
    """The second half of a key's channels from the token before it."""
    first, second = k.chunk(2, dim=-1)
    return torch.cat((first, torch.cat((second[..., :1, :, :], second[..., :-1, :, :]), dim=-3)), dim=-1)


def _paired(x: Tensor, model: Model) -> Tensor:
    """(tokens, heads, head_dim) as (2 tokens, heads / 2, head_dim), for paired heads."""
    if model.kind != "paired heads":
        return x
    return x.reshape(2 * x.shape[-3], x.shape[-2] // 2, x.shape[-1])
