"""What scripts.benchmark compares: the problem, its inputs, and every attention that can solve it."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    flash_cosine_sim_attention_varlen,
    plain_cosine_sim_attention,
)
from flash_cosine_sim_attention.ops import visible_pairs
from models.windows import bias_of_pairs, tiles_with_a_table

SCALE = 10.0
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# name: module that has flash_attn_func and flash_attn_varlen_func, distribution, a window's unlimited side
FLASH_ATTENTION: dict[str, tuple[str, str, int | None]] = {
    "FlashAttention-4": ("flash_attn.cute", "flash-attn-4", None),
    "FlashAttention-3": ("flash_attn_interface", "flash-attn-3", -1),
}
# flex_attention's passes that get the smaller tiles of the trainer's models, one after the other where the GPU has too
# little shared memory for PyTorch's own choice.
SMALLER = ((), ("fwd_",), ("bwd_",), ("fwd_", "bwd_"))
BY_FLASH = ("FlashAttention-4",)  # instead of one of these: by that one's kernels, which PyTorch knows, too
NO_SHARED_MEMORY = "No valid triton configs"  # what PyTorch's compiler says then, of either pass
VARLEN_ATTN, VARLEN_MODULE = "varlen_attn", "torch.nn.attention.varlen"
PREDECESSOR = "flash_cosine_sim_attention"  # 0.1 and 0.2 on PyPI: a module of the same name as ours
INSTALL_PREDECESSOR = "pip install --no-deps --no-build-isolation --target PATH flash-cosine-sim-attention==0.2.2"


@dataclass(frozen=True)
class Case:
    """One problem: shapes and options. Packed sequences are a batch of 1 whose seq_len is the total."""

    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    dtype: str
    causal: bool
    mask_prob: float
    bias: bool
    seq_len_q: int | None = None  # seq_len, unless queries are fewer than keys
    window: tuple[int, int] | None = None  # keys that a query sees to its left and right; -1 is all
    lengths: tuple[int, ...] | None = None  # of packed sequences
    padding: tuple[str, float] | None = None  # "last" or "first", and the share of keys there that a mask hides
    by_distance: str | None = None  # what distances add: "table", with gradient, or "alibi"

    @property
    def queries(self) -> int:
        return self.seq_len_q or self.seq_len

    @property
    def hidden_keys(self) -> int:
        """How many keys the padding is."""
        return 0 if self.padding is None else round(self.padding[1] * self.seq_len)

    def limits(self) -> tuple[int, int]:
        """The window that is left, right being 0 under a causal mask; -1 is unlimited."""
        left, right = self.window or (-1, -1)
        return left, 0 if self.causal else right

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head; mask_prob hides none here, for it is not exact."""
        if self.lengths is not None:
            return sum(visible_pairs(length, length, *self.limits()) for length in self.lengths)
        if self.padding is None:
            return self.batch * visible_pairs(self.queries, self.seq_len, *self.limits())
        seen = self.seq_len - self.hidden_keys
        if not self.causal:
            return self.batch * self.queries * seen
        # Queries of padding see every key before a padding at the end; those of one at the start see none.
        rest = self.hidden_keys * seen if self.padding[0] == "last" else 0
        return self.batch * (visible_pairs(seen, seen, -1, 0) + rest)

    def flops(self) -> int:
        """Forward operations of the two matrix products, a row counting the keys it sees."""
        return 4 * self.heads * self.pairs() * self.head_dim


def case_of(row: dict[str, Any]) -> Case:
    """The problem of a row of a benchmark's JSON; older ones lack the newer fields."""
    found = {field.name: row[field.name] for field in fields(Case) if field.name in row}
    return Case(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


@dataclass
class Inputs:
    """q (batch, heads, i, head_dim); k, v (batch, kv_heads, j, head_dim); mask (batch, j); bias (heads, i, j); do;
    table (heads, distances) and slopes (heads,), float32, as distance_bias and alibi_slopes.

    Packed sequences have batch 1 and lie in memory as (total, heads, head_dim); cu_seqlens is int32 (sequences + 1,).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    do: Tensor
    cu_seqlens: Tensor | None = None
    table: Tensor | None = None
    slopes: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [tensor for tensor in (self.q, self.k, self.v, self.bias, self.table) if tensor is not None]

    def gradients(self) -> list[str]:
        """Their names."""
        names = {"dq": self.q, "dk": self.k, "dv": self.v, "dbias": self.bias, "dtable": self.table}
        return [name for name, tensor in names.items() if tensor is not None]

    def detached(self) -> "Inputs":
        """The same tensors, of which no gradient can be taken."""
        bias, table = (None if tensor is None else tensor.detach() for tensor in (self.bias, self.table))
        return replace(self, q=self.q.detach(), k=self.k.detach(), v=self.v.detach(), bias=bias, table=table)

    def leaf(self) -> "Inputs":
        """The same tensors as leaves, of which gradients can be taken."""
        bias, table = (None if x is None else x.detach().requires_grad_() for x in (self.bias, self.table))
        q, k, v = (tensor.detach().requires_grad_() for tensor in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, bias=bias, table=table)

    def double(self) -> "Inputs":
        """The same numbers in float64, for what is exact."""
        q, k, v, do = (tensor.detach().double() for tensor in (self.q, self.k, self.v, self.do))
        bias, table = (None if x is None else x.detach().double().requires_grad_() for x in (self.bias, self.table))
        q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
        return replace(self, q=q, k=k, v=v, bias=bias, do=do, table=table)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random inputs of a case; every batch element keeps its first key, unless that is padding."""
    dtype, generator = DTYPES[case.dtype], torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, device=device, dtype=dtype, generator=generator)

    def rows(heads: int, seq_len: int) -> Tensor:
        if case.lengths is not None:
            return _unpacked(random((seq_len, heads, case.head_dim)))
        return random((case.batch, heads, seq_len, case.head_dim))

    sizes = ((case.heads, case.queries), (case.kv_heads, case.seq_len), (case.kv_heads, case.seq_len))
    q, k, v = (rows(*size).requires_grad_() for size in sizes)
    mask = bias = cu_seqlens = None
    if case.mask_prob:
        mask = torch.rand(case.batch, case.seq_len, device=device, generator=generator) >= case.mask_prob
        mask[:, 0] = True
    if case.padding is not None:
        mask = torch.ones(case.batch, case.seq_len, dtype=torch.bool, device=device)
        start = case.seq_len - case.hidden_keys if case.padding[0] == "last" else 0
        mask[:, start : start + case.hidden_keys] = False
    if case.bias:
        bias = random((case.heads, case.queries, case.seq_len)).requires_grad_()
    if case.lengths is not None:
        cu_seqlens = F.pad(torch.tensor(case.lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    inputs = Inputs(q, k, v, mask, bias, rows(case.heads, case.queries), cu_seqlens)
    if case.by_distance == "table":
        distances = case.seq_len if case.causal else case.queries + case.seq_len - 1
        inputs.table = torch.randn(case.heads, distances, device=device, generator=generator).requires_grad_()
    elif case.by_distance == "alibi":
        inputs.slopes = torch.exp2(-8 * torch.arange(1, case.heads + 1, device=device) / case.heads)
    return inputs


def _packed(tensor: Tensor) -> Tensor:
    """(1, heads, total, head_dim) as (total, heads, head_dim)."""
    return tensor.squeeze(0).transpose(0, 1)


def _unpacked(tensor: Tensor) -> Tensor:
    """(total, heads, head_dim) as (1, heads, total, head_dim)."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _sequences(inputs: Inputs, case: Case) -> Iterator[tuple[Inputs, Case]]:
    """Each packed sequence as a problem of its own; the problem itself where nothing is packed."""
    if case.lengths is None:
        yield inputs, case
        return
    start = 0
    for length in filter(None, case.lengths):
        q, k, v, do = (tensor[:, :, start : start + length] for tensor in (inputs.q, inputs.k, inputs.v, inputs.do))
        yield replace(inputs, q=q, k=k, v=v, do=do), replace(case, seq_len=length, lengths=None)
        start += length


def exact(inputs: Inputs, case: Case, cosine: bool) -> list[Tensor]:
    """Output and gradients in float64."""
    wide = inputs.double()
    attend = _exact_cosine if cosine else _exact_regular
    o = torch.cat([attend(*sequence) for sequence in _sequences(wide, case)], dim=2)
    return [o.detach(), *torch.autograd.grad(o, wide.leaves(), wide.do)]


def _exact_cosine(inputs: Inputs, case: Case) -> Tensor:
    options = {"causal": case.causal, "window_size": case.window, **_by_distance(inputs)}
    return plain_cosine_sim_attention(inputs.q, inputs.k, inputs.v, inputs.mask, inputs.bias, SCALE, **options)


def _exact_regular(inputs: Inputs, case: Case) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(inputs, case, normalise=False)


def ours(inputs: Inputs, case: Case, backend: str) -> Tensor:
    """flash_cosine_sim_attention, or flash_cosine_sim_attention_varlen of packed sequences."""
    options = {"scale": SCALE, "causal": case.causal, "window_size": case.window, "backend": backend}
    options |= _by_distance(inputs)
    if case.lengths is None:
        return flash_cosine_sim_attention(inputs.q, inputs.k, inputs.v, inputs.mask, inputs.bias, **options)
    q, k, v = map(_packed, (inputs.q, inputs.k, inputs.v))
    return _unpacked(flash_cosine_sim_attention_varlen(q, k, v, **_sequence_ends(inputs, case), **options))


def ours_as_batch(inputs: Inputs, case: Case, backend: str) -> Tensor:
    """flash_cosine_sim_attention of packed sequences of one length as a batch, where they lie in memory."""
    count, length = len(case.lengths), case.lengths[0]
    q, k, v = (
        tensor.squeeze(0).unflatten(1, (count, length)).transpose(0, 1) for tensor in (inputs.q, inputs.k, inputs.v)
    )  # (count, heads, length, head_dim)
    o = flash_cosine_sim_attention(q, k, v, scale=SCALE, causal=case.causal, window_size=case.window, backend=backend)
    return o.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _by_distance(inputs: Inputs) -> dict[str, Tensor | None]:
    return {"distance_bias": inputs.table, "alibi_slopes": inputs.slopes}


def ours_with_dense_bias(inputs: Inputs, case: Case, backend: str) -> Tensor:
    """flash_cosine_sim_attention with what distances add as an attn_bias of every pair."""
    return ours(replace(inputs, bias=dense_bias(inputs, case), table=None, slopes=None), case, backend)


def dense_bias(inputs: Inputs, case: Case) -> Tensor | None:
    """The bias of every pair, (heads, i, j) in q's dtype: that of the inputs, or what distances add."""
    if case.by_distance is None:
        return inputs.bias
    if inputs.table is not None and case.causal and case.queries == case.seq_len:
        # as the trainer makes it: by an index its gradient would be one pair's after the other, by far the slowest
        return bias_of_pairs(inputs.table.to(inputs.q.dtype), case.seq_len)
    query, key = (torch.arange(size, device=inputs.q.device) for size in (case.queries, case.seq_len))
    distance = query.unsqueeze(1) + case.seq_len - case.queries - key
    if inputs.table is None:
        return (-inputs.slopes.view(-1, 1, 1) * distance.abs()).to(inputs.q.dtype)
    first = 0 if case.causal else case.queries - 1
    return inputs.table.to(inputs.q.dtype)[:, (distance + first).clamp(min=0)]


def naive(inputs: Inputs, case: Case) -> Tensor:
    """Normalise, multiply, mask, softmax, multiply: every score in memory, as one writes it first."""
    _refuse_packed(case)
    q, k, v = F.normalize(inputs.q, dim=-1), F.normalize(inputs.k, dim=-1), inputs.v
    if case.kv_heads != case.heads:
        k, v = (tensor.repeat_interleave(case.heads // case.kv_heads, dim=1) for tensor in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
    hidden, bias = _hidden(inputs, case), dense_bias(inputs, case)
    if bias is not None:
        scores = scores + bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def l2norm(*tensors: Tensor) -> list[Tensor]:
    """Each tensor's rows of length 1."""
    return [F.normalize(tensor, dim=-1) for tensor in tensors]


@cache
def compiled_l2norm() -> Callable[..., list[Tensor]]:
    """l2norm() as torch.compile makes it for each shape: one kernel for all tensors each way."""
    # With dynamic=True the kernel loops over rows of a length that it does not know, and takes four times as long.
    torch._dynamo.config.recompile_limit = 64  # each number of rows compiles twice, with and without gradients

    @torch.compile(fullgraph=True, dynamic=False)
    def rows(*flat: Tensor) -> list[Tensor]:
        return l2norm(*flat)

    def normalise(*tensors: Tensor) -> list[Tensor]:
        # as rows: one compilation serves every batch, number of heads and length of as many rows
        flat = rows(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors))
        return [part.view(tensor.shape) for part, tensor in zip(flat, tensors, strict=True)]

    return normalise


def sdpa(inputs: Inputs, case: Case, normalise: bool, norm: Callable[..., list[Tensor]] = l2norm) -> Tensor:
    """PyTorch's scaled_dot_product_attention, with or without l2norm before it."""
    _refuse_packed(case)
    q, k = norm(inputs.q, inputs.k) if normalise else (inputs.q, inputs.k)
    attn_mask, is_causal = dense_bias(inputs, case), case.causal
    if inputs.mask is not None or attn_mask is not None or case.window is not None:
        is_causal = False
        if attn_mask is None and inputs.mask is None:
            attn_mask = _within_window(case.queries, case.seq_len, case.limits(), inputs.q.device)
        elif attn_mask is None:
            attn_mask = ~_hidden(inputs, case)
        elif (hidden := _hidden(inputs, case)) is not None:
            attn_mask = attn_mask.masked_fill(hidden, -math.inf)
    scale = SCALE if normalise else None
    return F.scaled_dot_product_attention(
        q, k, inputs.v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=case.kv_heads != case.heads
    )


def compiled_norm_sdpa(inputs: Inputs, case: Case) -> Tensor:
    """The same with the norms compiled: what to write today for cosine-sim attention without a kernel for it."""
    return sdpa(inputs, case, normalise=True, norm=compiled_l2norm())


def cache_normalised_keys(inputs: Inputs) -> Inputs:
    """The keys normalised, as a key/value cache may keep them: once for all the queries to come."""
    return replace(inputs, k=F.normalize(inputs.k, dim=-1))


def ours_cached(inputs: Inputs, case: Case, backend: str) -> Tensor:
    """flash_cosine_sim_attention over a cache of normalised keys."""
    (q,) = _norm_of_query(inputs.q)
    return flash_cosine_sim_attention(
        q, inputs.k, inputs.v, inputs.mask, inputs.bias, SCALE, causal=case.causal, l2norm_qk=False, backend=backend,
        **_by_distance(inputs),
    )  # fmt: skip


def sdpa_cached(inputs: Inputs, case: Case) -> Tensor:
    """PyTorch's scaled_dot_product_attention over a cache of normalised keys."""
    return sdpa(inputs, case, normalise=True, norm=lambda q, k: [*_norm_of_query(q), k])


def _norm_of_query(q: Tensor) -> list[Tensor]:
    # one kernel on a GPU; a CPU starts none, and may have no compiler
    return compiled_l2norm()(q) if q.is_cuda else l2norm(q)


def flash_attention(
    inputs: Inputs,
    case: Case,
    package: ModuleType,
    unlimited: int | None,
    norm: Callable[..., list[Tensor]] | None = None,
) -> Tensor:
    """FlashAttention-3's or -4's function, which takes (batch, seq_len, heads, head_dim), or that of packed sequences.

    With ``norm`` q and k are normalised before, and the scale is ours.
    """
    if inputs.q.dtype == torch.float32 or inputs.mask is not None or inputs.bias is not None or case.by_distance:
        raise ValueError("it takes float16 and bfloat16, no mask and no bias")
    q, k, v = inputs.q, inputs.k, inputs.v
    options: dict[str, Any] = {"causal": case.causal}
    if norm is not None:
        options["softmax_scale"] = SCALE
    if case.window is not None:
        options["window_size"] = tuple(unlimited if side < 0 else side for side in case.limits())
    if case.lengths is not None:
        q, k, v = map(_packed, (q, k, v))
        q, k = norm(q, k) if norm else (q, k)
        result = package.flash_attn_varlen_func(q, k, v, **_sequence_ends(inputs, case), **options)
        return _unpacked(_output(result))
    q, k = norm(q, k) if norm else (q, k)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return _output(package.flash_attn_func(q, k, v, **options)).transpose(1, 2)


def _sequence_ends(inputs: Inputs, case: Case) -> dict[str, Any]:
    """The arguments of functions of packed sequences that say where these end, in the order that all have."""
    ends, longest = inputs.cu_seqlens, max(case.lengths)
    return {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _output(result: Tensor | tuple) -> Tensor:
    """Some versions return the log-sum-exp with the output."""
    return result[0] if isinstance(result, tuple) else result


def varlen_attn(inputs: Inputs, case: Case, package: ModuleType) -> Tensor:
    """PyTorch's torch.nn.attention.varlen.varlen_attn; a causal mask is a window to it."""
    q, k, v = map(_packed, (inputs.q, inputs.k, inputs.v))
    options = {} if case.kv_heads == case.heads else {"enable_gqa": True}
    ends = _sequence_ends(inputs, case).values()  # it has other names for them
    return _unpacked(package.varlen_attn(q, k, v, *ends, window_size=case.limits(), **options))


def flex(inputs: Inputs, case: Case, normalise: bool, package: ModuleType | None = None) -> Tensor:
    """PyTorch's flex_attention, compiled, with or without l2norm in front in the same compilation; with ``package``,
    FlashAttention-4's, by that one's kernels.
    """
    if inputs.mask is not None or inputs.bias is not None or case.lengths is not None:
        raise ValueError("here it takes no mask, no bias and no packed sequences")
    if package is not None:
        return _flex(inputs, case, normalise, BY_FLASH)
    gradient = inputs.q.requires_grad and torch.is_grad_enabled()
    return _flex(inputs, case, normalise, _tiles_that_fit(case, normalise, gradient, inputs.q.device))


@cache
def _tiles_that_fit(case: Case, normalise: bool, gradient: bool, device: torch.device) -> tuple[str, ...]:
    """The first of SMALLER that the GPU has the shared memory for: found in the first call, which no time counts."""
    inputs = make_inputs(case, device)
    inputs = inputs if gradient else inputs.detached()
    *others, last = SMALLER
    for smaller in others:
        try:
            o = _flex(inputs, case, normalise, smaller)
            if gradient:  # its kernel is compiled when it first runs
                torch.autograd.grad(o, inputs.leaves(), inputs.do)
            return smaller
        except Exception as error:
            if NO_SHARED_MEMORY not in str(error):
                raise
    return last  # where that does not fit either, the call itself raises


def _flex(inputs: Inputs, case: Case, normalise: bool, smaller: tuple[str, ...]) -> Tensor:
    attend = compiled_flex(normalise, case.kv_heads != case.heads, smaller)
    blocks = block_mask(case.queries, case.seq_len, case.limits(), inputs.q.device)
    first = 0 if case.causal else case.queries - 1
    return attend(inputs.q, inputs.k, inputs.v, blocks, inputs.table, inputs.slopes, first)


@cache
def compiled_flex(normalise: bool, grouped: bool, smaller: tuple[str, ...]) -> Callable[..., Tensor]:
    """flex_attention of (q, k, v, block_mask, table, slopes, entry of distance 0) as torch.compile makes it for each
    shape, l2norm and the score of a distance with it, by one of SMALLER or BY_FLASH.
    """
    # Each length compiles twice, with and without gradients; beyond torch's limit of 8 it would raise.
    torch._dynamo.config.recompile_limit = 64

    @torch.compile(fullgraph=True, dynamic=False)
    def attend(
        q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, table: Tensor | None, slopes: Tensor | None, first: int
    ) -> Tensor:
        scale, diagonal = None, k.shape[-2] - q.shape[-2]

        def score(value: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = query + diagonal - key
            if table is not None:
                value = value + table[head, (distance + first).clamp(min=0)]
            return value if slopes is None else value - slopes[head] * distance.abs()

        score_mod = None if table is None and slopes is None else score
        if normalise:
            (q, k), scale = l2norm(q, k), SCALE
        tiles = tiles_with_a_table(q.shape[-1], q.dtype)
        options: dict[str, Any] = {name: size for name, size in tiles.items() if name[:4] in smaller}
        options = {"BACKEND": "FLASH"} if smaller == BY_FLASH else options
        return flex_attention(
            q, k, v, score_mod, block_mask=blocks, scale=scale, enable_gqa=grouped, kernel_options=options
        )

    return attend


@cache
def block_mask(queries: int, keys: int, limits: tuple[int, int], device: torch.device) -> BlockMask:
    """flex_attention's mask of a window, made once: its first call, which no time counts, makes it."""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _within(query + keys - queries - key, limits, queries, keys)

    return create_block_mask(visible, None, None, queries, keys, device)


def _within(distance: Tensor, limits: tuple[int, int], queries: int, keys: int) -> Tensor:
    """Whether a key so far to the left of a query is in its window."""
    left, right = limits
    return (distance <= (keys if left < 0 else left)) & (distance >= -(queries if right < 0 else right))


def predecessor(inputs: Inputs, case: Case, attend: Callable) -> Tensor:
    """The predecessor's function; 0.2 has no argument for a bias."""
    if case.window is not None or case.lengths is not None or case.by_distance:
        raise ValueError("it takes no window, no packed sequences and nothing by distance")
    bias = {} if inputs.bias is None else {"attn_bias": inputs.bias}
    return attend(inputs.q, inputs.k, inputs.v, mask=inputs.mask, scale=SCALE, causal=case.causal, **bias)


def unavailable(_inputs: Inputs, _case: Case, error: Exception) -> Tensor:
    """Stands for a package that is installed and could not be imported."""
    raise error


def _refuse_packed(case: Case) -> None:
    if case.lengths is not None:
        raise ValueError("it takes no packed sequences")


@lru_cache(maxsize=1)  # as large as the scores of a head
def _within_window(queries: int, keys: int, limits: tuple[int, int], device: torch.device) -> Tensor:
    """True where a query's window has a key, (queries, keys), made once and outside the time of a call."""
    query, key = torch.arange(queries, device=device).unsqueeze(1), torch.arange(keys, device=device)
    return _within(query + keys - queries - key, limits, queries, keys)


@lru_cache(maxsize=1)
def _outside_window(queries: int, keys: int, limits: tuple[int, int], device: torch.device) -> Tensor:
    """The opposite, made once, too."""
    return ~_within_window(queries, keys, limits, device)


def _hidden(inputs: Inputs, case: Case) -> Tensor | None:
    hidden = None if inputs.mask is None else ~inputs.mask[:, None, None, :]
    if case.window is not None:
        outside = _outside_window(case.queries, case.seq_len, case.limits(), inputs.q.device)
        hidden = outside if hidden is None else hidden | outside
    elif case.causal:
        above = torch.ones(case.seq_len, case.seq_len, dtype=torch.bool, device=inputs.q.device).triu(1)
        hidden = above if hidden is None else hidden | above
    return hidden


@dataclass(frozen=True)
class Contender:
    """A function of (inputs, case).

    ``cosine``: it normalises q and k; ``kernel``: the one that SDPA is held to; ``folder``: the predecessor's, whose
    calls can crash the process, so that another one tries them first; ``prepare``: what is made of the inputs once,
    before its calls and outside their time; ``dense_mask``: a window is a mask over all pairs to it; ``unmasked``: it
    solves the problem without its padding, which says what a mask costs; ``unscored``: without what distances add;
    ``flash``: the implementation that PyTorch's own flash attention is given in its calls.
    """

    name: str
    attend: Callable[[Inputs, Case], Tensor]
    cosine: bool
    kernel: SDPBackend | None = None
    folder: Path | None = None
    prepare: Callable[[Inputs], Inputs] | None = None
    dense_mask: bool = False
    unmasked: bool = False
    unscored: bool = False
    flash: str | None = None

    def problem(self, case: Case) -> Case:
        """The problem that it solves where the others solve this one."""
        if self.unscored:
            return replace(case, by_distance=None)
        return replace(case, padding=None) if self.unmasked else case

    def prepared(self, inputs: Inputs) -> Inputs:
        """What its calls are given."""
        return inputs if self.prepare is None else self.prepare(inputs)

    def setting(self) -> AbstractContextManager:
        """What its calls are made in, entered once around many of them, for entering takes time."""
        if self.flash is not None:
            return flash_implementation(self.flash)
        return nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)


@contextmanager
def flash_implementation(name: str) -> Iterator[None]:
    """PyTorch's flash attention by another implementation that is installed, "FA4" for one, meanwhile."""
    torch.nn.attention.activate_flash_attention_impl(name)
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


CACHED = ", keys normalised when cached"
AS_BATCH, UNMASKED = ", as a batch", ", unmasked"
DENSE_BIAS, UNSCORED = ", a dense bias", ", without it"


def contenders(
    backends: list[str],
    device: torch.device,
    predecessor_folder: Path | None = None,
    decoding: bool = False,
    problems: Sequence[Case] = (),
) -> tuple[list[Contender], list[str]]:
    """Ours first, by each back end asked for, then all that is installed; and the names of what is not installed.

    ``decoding`` adds those that find their keys normalised: a query comes after the keys of many others. ``problems``
    adds those that only windows, packed sequences, padding or what distances add need.
    """
    windows, packed = any(case.window for case in problems), any(case.lengths for case in problems)
    found = _ours(backends, decoding, problems)
    found.append(Contender("naive einsum", naive, True, dense_mask=True))
    absent = []
    if predecessor_folder is None:
        absent.append("predecessor (--predecessor)")
    else:
        found += predecessors(predecessor_folder)
    found += _sdpas(device, decoding)
    compiles = device.type == "cuda"
    if (windows or any(case.by_distance for case in problems)) and compiles:  # flex_attention has no gradient on a CPU
        found.append(Contender("compiled l2norm + flex_attention", partial(flex, normalise=True), True))
        found.append(Contender("flex_attention, no norm", partial(flex, normalise=False), False))
    packages = []
    for name, (module, _, unlimited) in FLASH_ATTENTION.items():
        attend = partial(flash_attention, unlimited=unlimited)
        added = [(f"{name}, no norm", attend, False)]
        if compiles:
            added.insert(0, (f"compiled l2norm + {name}", partial(attend, norm=compiled_l2norm()), True))
        packages.append((name, module, added))
    if packed:
        packages.append((VARLEN_ATTN, VARLEN_MODULE, [(f"{VARLEN_ATTN}, no norm", varlen_attn, False)]))
    for package, module, added in packages:
        installed = [_installed(module, *contender) for contender in added]
        found += filter(None, installed)
        absent += [package] * (None in installed)
    if compiles:
        found += _by_flash_attention_4(windows or any(case.by_distance for case in problems), packed)
    return found, absent


def _by_flash_attention_4(flexes: bool, packed: bool) -> list[Contender]:
    """PyTorch's own functions by FlashAttention-4's kernels, if that is installed and PyTorch knows how."""
    name, module = "FlashAttention-4", FLASH_ATTENTION["FlashAttention-4"][0]
    added = []
    if flexes:
        added += [
            _installed(module, f"compiled l2norm + flex_attention by {name}", partial(flex, normalise=True), True),
            _installed(module, f"flex_attention by {name}, no norm", partial(flex, normalise=False), False),
        ]
    if (
        packed
        and hasattr(torch.nn.attention, "activate_flash_attention_impl")
        and _installed(module, name, flex, False)
    ):
        by_flash = _installed(VARLEN_MODULE, f"{VARLEN_ATTN} by {name}, no norm", varlen_attn, False)
        added.append(by_flash and replace(by_flash, flash="FA4"))
    return [contender for contender in added if contender is not None]


def _ours(backends: Sequence[str], decoding: bool, problems: Sequence[Case]) -> list[Contender]:
    found = [Contender(f"ours ({backend})", partial(ours, backend=backend), True) for backend in backends]
    for backend in backends:
        if decoding:
            attend = partial(ours_cached, backend=backend)
            found.append(Contender(f"ours ({backend}){CACHED}", attend, True, prepare=cache_normalised_keys))
        if problems and all(case.lengths and len(set(case.lengths)) == 1 for case in problems):
            found.append(Contender(f"ours ({backend}){AS_BATCH}", partial(ours_as_batch, backend=backend), True))
        if any(case.padding for case in problems):
            attend = partial(ours, backend=backend)
            found.append(Contender(f"ours ({backend}){UNMASKED}", attend, True, unmasked=True))
        if any(case.by_distance for case in problems):
            attend = partial(ours, backend=backend)
            found.append(Contender(f"ours ({backend}){UNSCORED}", attend, True, unscored=True))
            attend = partial(ours_with_dense_bias, backend=backend)
            found.append(Contender(f"ours ({backend}){DENSE_BIAS}", attend, True))
    return found


def _sdpas(device: torch.device, decoding: bool) -> list[Contender]:
    kernels, found = [("flash", SDPBackend.FLASH_ATTENTION)], []
    if device.type == "cuda":
        kernels += [("cudnn", SDPBackend.CUDNN_ATTENTION), ("efficient", SDPBackend.EFFICIENT_ATTENTION)]
    add = partial(Contender, dense_mask=True)
    for name, kernel in kernels:
        found.append(add(f"l2norm + SDPA {name}", partial(sdpa, normalise=True), True, kernel))
        if device.type == "cuda" and name != "efficient":
            found.append(add(f"compiled l2norm + SDPA {name}", compiled_norm_sdpa, True, kernel))
        if decoding:
            found.append(add(f"SDPA {name}{CACHED}", sdpa_cached, True, kernel, prepare=cache_normalised_keys))
    found += [add(f"SDPA {name}, no norm", partial(sdpa, normalise=False), False, kernel) for name, kernel in kernels]
    return found


def _installed(module: str, name: str, attend: Callable[..., Tensor], cosine: bool) -> Contender | None:
    """A contender whose function gets a package; None where that is not installed."""
    try:
        call = partial(attend, package=importlib.import_module(module))
    except Exception as error:
        if is_absent(error, module):
            return None
        call = partial(unavailable, error=error)
    return Contender(name, call, cosine)


def is_absent(error: Exception, module: str) -> bool:
    """Whether importing a module failed because it, or a package that it is in, is not installed."""
    return isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")


def predecessors(folder: Path) -> list[Contender]:
    """The predecessor's contenders: its CUDA kernel, and its Triton one if it has that.

    Raises ValueError where the folder has no such package.
    """
    spec = PathFinder.find_spec(PREDECESSOR, [str(folder)])
    if spec is None or spec.origin is None:
        raise ValueError(f"--predecessor {folder} has no {PREDECESSOR}; {INSTALL_PREDECESSOR} puts it there")
    name = f"predecessor {installed_version(PREDECESSOR, path=[str(folder)]) or ''}".rstrip()
    try:
        package = _import_apart(spec, folder)
    except Exception as error:
        return [Contender(name, partial(unavailable, error=error), True)]
    functions = [(name, package.flash_cosine_sim_attention)]
    triton = getattr(package, "triton_flash_cosine_sim_attention", None)
    if triton is not None:
        functions.append((f"{name} Triton", triton))
    return [Contender(name, partial(predecessor, attend=attend), True, folder=folder) for name, attend in functions]


def _import_apart(spec: ModuleSpec, folder: Path) -> ModuleType:
    """Imports the package of the same name as ours that lies in ``folder``, beside ours.

    While it is imported, the name is its own, so that it finds its modules; then sys.modules has ours again. What it
    depends on comes from this environment, and from the folder only what is nowhere else: its compiled extension.
    """
    saved = _take_modules()
    sys.path.append(str(folder))
    try:
        package = sys.modules[PREDECESSOR] = module_from_spec(spec)
        spec.loader.exec_module(package)
        return package
    finally:
        sys.path.remove(str(folder))
        _take_modules()
        sys.modules.update(saved)


def _take_modules() -> dict[str, ModuleType]:
    """Removes the package and its submodules from sys.modules."""
    names = [name for name in sys.modules if name == PREDECESSOR or name.startswith(f"{PREDECESSOR}.")]
    return {name: sys.modules.pop(name) for name in names}


def versions(predecessor_folder: Path | None) -> dict[str, str | None]:
    """The versions of what is compared with ours."""
    packages = ("triton", *(distribution for _, distribution, _ in FLASH_ATTENTION.values()))
    found = {package: installed_version(package) for package in packages}
    if predecessor_folder is not None:
        found["predecessor"] = installed_version(PREDECESSOR, path=[str(predecessor_folder)])
    return found


def installed_version(package: str, **where: list[str]) -> str | None:
    """The version of an installed package, looked for on ``path`` (default: sys.path); None where there is none."""
    return next((distribution.version for distribution in distributions(name=package, **where)), None)
