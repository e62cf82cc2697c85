"""What transformers' models hide from a query, as a description: the mask function of huggingface.py, and `Visible`.

transformers makes a mask once in a forward pass, by a function that says of one query and one key whether the one sees
the other. Evaluated for all, that is as large as the scores. Here it is recognised instead: causal, a sliding window,
packed sequences, chunks, and the padding, which comes beside it.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# By name: transformers is optional, and what it says of its types differs between versions.
_masks: Any = importlib.import_module("transformers.masking_utils")

_IN = "transformers.masking_utils"
_AND = "and_masks.<locals>.and_mask"
# What _AND is known by under torch.compile, which does not know names of functions.
_AND_CODE = _masks.and_masks(_masks.causal_mask_function).__code__
# Mask functions that are made of others, and the name by which they hold these.
_MADE_OF_OTHERS = {_AND: "mask_functions", "remap_positions_for_packed_sequence.<locals>.inner_mask": "mask_function"}
# The others that are understood: what they are, and the name by which they hold its size.
_KINDS = {
    "causal_mask_function": ("causal", ""),
    "bidirectional_mask_function": ("bidirectional", ""),
    "sliding_window_overlay.<locals>.inner_mask": ("window", "sliding_window"),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": ("window", "sliding_window"),
    "chunked_overlay.<locals>.inner_mask": ("chunks", "chunk_size"),
    "packed_sequence_mask_function.<locals>.inner_mask": ("packed", ""),
}


class Visible(NamedTuple):
    """Which keys each query sees. The mask function makes one in a forward pass, and all layers get it."""

    seq_len_q: int
    seq_len_k: int  # as long as the cache
    num_keys: int  # of these the first so many; a static cache is not filled beyond
    causal: bool  # aligned bottom-right: the last query sees all of num_keys
    window: tuple[int, int]  # window_size of flash_cosine_sim_attention
    keys: Tensor | None  # bool (batch, num_keys), True = attend
    cu_seqlens: Tensor | None  # int32: packed sequences, in the rows of all of the batch one behind the other
    one_sequence: Tensor | None  # bool (): under torch.compile, that nothing is packed; it is asserted when run

    # What transformers asks of a mask that it gets a second time, when it has made it ahead of a compiled forward pass.
    @property
    def ndim(self) -> int:
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, 1, self.seq_len_q, self.seq_len_k

    def contiguous(self) -> "Visible":
        return self


def cosine_sim_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = _masks.causal_mask_function,
    attention_mask: Tensor | Visible | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,  # noqa: ARG001  # nothing is made that could be left out
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    dtype: torch.dtype | None = None,  # noqa: ARG001  # of an eager mask
    config: Any = None,
    device: torch.device | str = "cpu",
) -> Visible:
    """What transformers calls, once in a forward pass and kind of layer, with its own description of a mask.

    Raises:
        ValueError: the description is of a mask that is neither causal, nor a sliding window, nor by key, nor packed.
    """
    if isinstance(attention_mask, Visible):  # it was made ahead
        return attention_mask
    if q_length == 1:
        return _of_one_query(
            batch_size, kv_length, q_offset, kv_offset, mask_function, attention_mask, use_vmap, device
        )
    compiling = torch.compiler.is_compiling()
    if compiling:
        bidirectional = allow_is_bidirectional_skip is not None
        sizes = _sizes_by_arguments(mask_function, local_size, use_vmap, config, bidirectional)
    else:
        sizes = _sizes(mask_function)
    q_offset, kv_offset = _as_int("query", q_offset), _as_int("key", kv_offset)
    end = q_offset + q_length
    if sizes.get("chunks", 0) >= end:  # all is in the first one, but for padding before it, which nobody sees
        del sizes["chunks"]
    causal, window = _causal_and_window(sizes)
    beyond = kv_offset + kv_length - end  # keys of a static cache behind the last query
    # Without either, queries and keys are not aligned: a decoder's queries see an encoder's keys.
    if (causal and beyond < 0) or (not causal and "window" in sizes and beyond != 0):
        raise ValueError(
            f"a mask for queries {q_offset} to {end - 1} cannot have keys {kv_offset} to {kv_offset + kv_length - 1}"
        )
    num_keys = kv_length - beyond if causal else kv_length
    keys = _padding(attention_mask, kv_length, kv_offset, num_keys)
    cu_seqlens = one_sequence = None
    if not compiling and ("chunks" in sizes or "packed" in sizes):
        cu_seqlens = _starts(mask_function, batch_size, q_length, q_offset, device)
        if cu_seqlens is None and "chunks" in sizes:
            keys = _of_chunk(mask_function, batch_size, q_offset, kv_offset, num_keys, keys, device)
    if compiling and "packed" in sizes and attention_mask is None:
        one_sequence = _is_one_sequence(mask_function, batch_size, q_length, q_offset, device)
    if cu_seqlens is not None and (keys is not None or num_keys != q_length):
        raise ValueError(
            f"packed sequences, or chunks of {local_size} keys, go neither with padding nor with a cache in front of "
            f"{q_length} queries: take shorter ones, or another attn_implementation"
        )
    if compiling and "chunks" in sizes:
        raise NotImplementedError(
            f"chunks of {local_size} keys cannot be compiled for {end} queries: take at most {local_size}, or, without "
            "torch.compile, more"
        )
    return Visible(q_length, kv_length, num_keys, causal, window, keys, cu_seqlens, one_sequence)


def dense(
    visible: Visible, batch: int, cu_seqlens: tuple[Tensor, Tensor] | None, device: torch.device | str
) -> Tensor | None:
    """bool (batch or 1, 1, seq_len_q, num_keys), True = attend; None: visible.causal says all, of as many queries."""
    seq_len_q, num_keys = visible.seq_len_q, visible.num_keys
    left, right = visible.window
    square = not visible.causal or seq_len_q == num_keys or seq_len_q == 1
    if square and left < 0 and (right < 0 or visible.causal) and visible.keys is None and cu_seqlens is None:
        return None
    queries = torch.arange(seq_len_q, device=device)[:, None] + num_keys - seq_len_q
    distance = queries - torch.arange(num_keys, device=device)
    shown = torch.ones_like(distance, dtype=torch.bool)[None]
    if left >= 0:
        shown = shown & (distance <= left)
    if right >= 0:
        shown = shown & (-distance <= right)
    if cu_seqlens is not None:
        of_q, of_k = (
            torch.bucketize(torch.arange(batch * rows, device=device).view(batch, -1), bounds, right=True)
            for rows, bounds in zip((seq_len_q, num_keys), cu_seqlens, strict=True)
        )
        shown = shown & (of_q[:, :, None] == of_k[:, None])
    if visible.keys is not None:
        shown = shown & visible.keys[:, None]
    return shown[:, None]


def _of_one_query(
    batch_size: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int | Tensor,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    use_vmap: bool,
    device: torch.device | str,
) -> Visible:
    """For one query every mask is one by key, whatever it is made of."""
    keys = _masks.sdpa_mask(
        batch_size=batch_size, q_length=1, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap,
        device=device,
    )[:, 0, 0]  # fmt: skip
    # A static cache, whose offset is a tensor, soon hides some: the next token would compile anew.
    if not torch.compiler.is_compiling() and isinstance(q_offset, int) and bool(keys.all()):
        keys = None
    return Visible(1, kv_length, kv_length, False, (-1, -1), keys, None, None)


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int, num_keys: int) -> Tensor | None:
    """(batch, num_keys), of what the model gets for all its keys; None: all are there.

    Those that are not mentioned are not there yet.
    """
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    keys = attention_mask[:, kv_offset : kv_offset + num_keys].bool()
    return None if not torch.compiler.is_compiling() and bool(keys.all()) else keys


def _causal_and_window(sizes: dict[str, int]) -> tuple[bool, tuple[int, int]]:
    causal = "bidirectional" not in sizes
    if "window" not in sizes:
        return causal, (-1, 0 if causal else -1)
    return causal, (sizes["window"] - 1, 0) if causal else (sizes["window"], sizes["window"])


def _as_int(name: str, offset: int | Tensor) -> int:
    if not isinstance(offset, Tensor):
        return offset
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"several queries beside a static cache, whose {name} offset is a tensor, cannot be compiled: compile "
            "decoding alone, as generate does"
        )
    return int(offset)


def _sizes(mask_function: Callable[..., Any]) -> dict[str, int]:
    """The kinds of masks that a mask function of transformers is the intersection of, and their sizes, or 0."""
    name = mask_function.__qualname__ if getattr(mask_function, "__module__", None) == _IN else repr(mask_function)
    if name not in _KINDS and name not in _MADE_OF_OTHERS:
        raise ValueError(
            f"a mask must be causal, a sliding window, by key, in chunks or packed, got one made by {name}: take "
            "another attn_implementation"
        )
    cells = zip(mask_function.__code__.co_freevars, mask_function.__closure__ or (), strict=True)
    held = {variable: cell.cell_contents for variable, cell in cells}
    if name in _KINDS:
        kind, size = _KINDS[name]
        return {kind: held[size] if size else 0}
    others = held[_MADE_OF_OTHERS[name]]
    found: dict[str, int] = {}
    for other in others if isinstance(others, tuple) else (others,):
        for part, length in _sizes(other).items():
            if found.setdefault(part, length) != length:
                raise ValueError(f"a mask must have one {part}, got sizes {found[part]} and {length}")
    return found


def _sizes_by_arguments(
    mask_function: Callable[..., Any], local_size: int | None, use_vmap: bool, config: Any, bidirectional: bool
) -> dict[str, int]:
    """As _sizes, where torch.compile cannot look into a function: by what transformers says beside it.

    What that leaves open, whether sequences are packed, _is_one_sequence says when it runs.
    """
    plain = mask_function in (_masks.causal_mask_function, _masks.bidirectional_mask_function)
    if use_vmap or not (plain or mask_function.__code__ is _AND_CODE):
        raise ValueError(
            "under torch.compile a mask must be causal, a sliding window, by key or packed, without functions of the "
            "caller's own and without blocks: take another attn_implementation"
        )
    sizes = {"bidirectional" if bidirectional else "causal": 0}
    if not plain and not bidirectional:
        sizes["packed"] = 0  # possibly
    if local_size is None:
        return sizes
    known = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    found = [name for name, size in known.items() if size == local_size]
    if len(found) != 1:
        raise ValueError(
            f"under torch.compile one of {known} must be the size of a window or of a chunk, got {local_size}"
        )
    return {**sizes, "window" if found == ["sliding_window"] else "chunks": local_size}


def _of_chunk(
    mask_function: Callable[..., Any],
    batch_size: int,
    q_offset: int,
    kv_offset: int,
    num_keys: int,
    keys: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    """Those of `keys` that are in the chunk of all queries, (batch, num_keys): a cache holds keys of earlier ones."""
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    key = torch.arange(kv_offset, kv_offset + num_keys, device=device)[None]
    shown = mask_function(batch, head, torch.full_like(key, q_offset), key) | (key > q_offset)
    shown = shown if keys is None else shown & keys
    return None if bool(shown.all()) else shown


def _is_one_sequence(
    mask_function: Callable[..., Any], batch_size: int, q_length: int, q_offset: int, device: torch.device | str
) -> Tensor:
    """bool (): each query sees the key before its own, and not the one behind."""
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    queries = torch.arange(q_offset, q_offset + q_length, device=device)[None]
    before = mask_function(batch, head, queries[:, 1:], queries[:, :-1])
    behind = mask_function(batch, head, queries[:, :-1], queries[:, 1:])
    one: Tensor = before.all() & ~behind.any()
    return one


def _starts(
    mask_function: Callable[..., Any], batch_size: int, q_length: int, q_offset: int, device: torch.device | str
) -> Tensor | None:
    """cu_seqlens of sequences, each of which begins where a query does not see the key before its own.

    None: each row of the batch is one.
    """
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    queries = torch.arange(q_offset, q_offset + q_length, device=device)[None]
    starts = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    starts[:, 1:] = ~mask_function(batch, head, queries[:, 1:], queries[:, :-1])
    if not bool(starts[:, 1:].any()):
        return None
    bounds = starts.flatten().nonzero().flatten()
    return torch.cat((bounds, bounds.new_tensor([starts.numel()]))).int()
