"""Attention of Hugging Face transformers' models: an attention function, and the mask function that belongs to it.

    from flash_cosine_sim_attention.huggingface import register
    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="cosine_sim")

It computes what the model's eager attention does, softmax(scaling * q k^T) v of the q and k that the model passes. It
serves layers that pass them through an RMS norm without weights first, for these logits are bounded, which is all that
cosine attention asks for. Normalising once more would round q and k once more, and would hide a gain behind the norm,
and the norm's eps: so they are taken as they are (l2norm_qk=False), unless `fold_norms` has moved the norms in here.

A mask in transformers is as large as the scores, so what it hides is passed on as a description instead (`Visible`).
All that is not understood raises: nothing is left out without a word.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .interface import MAX_LOGIT, flash_cosine_sim_attention, flash_cosine_sim_attention_varlen
from .ops import constant_when_compiled
from .reference import l2norm_tensors

try:
    # By name: transformers is optional, and what it says of its types differs between versions.
    _masks: Any = importlib.import_module("transformers.masking_utils")
    _models: Any = importlib.import_module("transformers.modeling_utils")
except ImportError as error:
    raise ImportError(
        f"flash_cosine_sim_attention.huggingface needs transformers, and importing that failed ({error}): "
        'pip install "transformers>=5.4"'
    ) from error

from .flash_attn_interface import check_deterministic
from .huggingface_mask import Visible, cosine_sim_mask, dense

__all__ = [
    "Visible",
    "cosine_sim_attention",
    "cosine_sim_mask",
    "fold_norms",
    "mixed_attention",
    "new_model_attention",
    "register",
]

# Attention classes of transformers whose q and k come out of RMS norms without weights, with nothing behind these but
# a rotation and a gain: the attribute that holds it, "" for none. By class, for norms alone prove nothing: those of
# Dory's layers are followed by a learned gain for each channel.
_NORMALISING: dict[tuple[str, str], str] = {
    ("transformers.models.llama4.modeling_llama4", "Llama4TextAttention"): "",
    ("transformers.models.nanochat.modeling_nanochat", "NanoChatAttention"): "",
    ("transformers.models.muse_glimmer.modeling_muse_glimmer", "MuseGlimmerTextAttention"): "qk_scale_factor",
}
_NORMS = ("qk_norm", "q_norm", "k_norm")  # what these layers call them
# Arguments that models hand through to attention and that change nothing in it.
_HARMLESS = {
    "cache",
    "cache_position",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "return_dict",
    "use_cache",
}
# exp of less is 0 in float32, in which models take their softmax.
_LOG_OF_ZERO = -104.0


class _Logits(NamedTuple):
    """How a layer's logits are computed of its q and k."""

    scale: float
    l2norm_qk: bool
    largest: float  # no logit is further from 0


def register(name: str = "cosine_sim", *, others: str | None = None, allow_new_model: bool = False) -> None:
    """Makes attn_implementation=name known to transformers: the attention function and the mask function.

    Args:
        name: without "flash", "paged", "|" and "/", which mean something to transformers; and none that is taken.
        others: what computes layers that do not normalise q and k: "sdpa", transformers' own; None: they raise.
        allow_new_model: normalise in such layers, too (see new_model_attention). With weights that were trained with
            another attention that gives another, untrained model. Not together with `others`.

    Raises:
        ValueError: an argument is not as above.
    """
    if others not in (None, "sdpa"):
        raise ValueError(f"others must be None or 'sdpa', got {others!r}")
    if others is not None and allow_new_model:
        raise ValueError("others and allow_new_model both say what layers without a norm are: give one of them")
    if not name or any(word in name for word in ("flash", "paged", "|", "/")):
        raise ValueError(f'name must be without "flash", "paged", "|" and "/", got {name!r}')
    taken = {
        _models.AttentionInterface._global_mapping.get(name),
        _masks.AttentionMaskInterface._global_mapping.get(name),
    }
    if not taken <= {None, cosine_sim_mask, *_ours()}:
        raise ValueError(f"name must be one that transformers does not know, got {name!r}")
    attention = mixed_attention if others else new_model_attention if allow_new_model else cosine_sim_attention
    _models.AttentionInterface.register(name, attention)
    _masks.AttentionMaskInterface.register(name, cosine_sim_mask)


def _ours() -> tuple[Any, ...]:
    return cosine_sim_attention, mixed_attention, new_model_attention


def cosine_sim_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling * query key^T) value for a layer that has normalised query and key.

    Args:
        module: the layer. Its class is one of transformers' that normalise without weights, or it has an attribute
            cosine_sim_gain: |query| |key| <= cosine_sim_gain * head_dim for all rows, as after RMS norms with
            gains whose product that is.
        query: (batch, num_heads, seq_len_q, head_dim).
        key, value: (batch, num_kv_heads, seq_len_k, head_dim) where num_kv_heads divides num_heads.
        attention_mask: of cosine_sim_mask. Or a tensor that broadcasts to (batch, num_heads, seq_len_q, seq_len_k),
            the same for all heads, bool or added to the logits, which hides keys, the future, or both. Of those that
            are added, 0 shows a key, and what makes its weight 0 in float32 hides it; a row that hides all keys by
            finite values means what it means in eager attention. Or None: what is_causal says.
        scaling: head_dim ** -0.5 by default.
        dropout: must be 0.
        is_causal: the layer's attribute by default. A mask says it, too; then they must agree.
        sliding_window: each query sees itself and so many keys less one before it. As is_causal.
        cu_seq_lens_q, cu_seq_lens_k: (num_sequences + 1,), packed sequences in the rows of all of the batch, which
            they divide up without a rest; both or neither.
        position_ids: (batch or 1, seq_len_q). q and k are rotated already; but where these begin anew, sequences are
            packed, which transformers itself overlooks if it makes a cache: that raises an error, in the first layer.
        others: those that change nothing in attention, or that are None.

    Returns:
        (batch, seq_len_q, num_heads, head_dim) and None, for there are no weights to return. A query that sees no key,
        such as a padded one, yields zeros.

    Raises:
        ValueError, TypeError: an argument is not as above, or the layer does not normalise.
        NotImplementedError: a mask that is a tensor, under torch.compile.
    """
    _refuse(module, dropout, others)
    logits = _logits(module, query.shape[-1], scaling)
    if logits is None:
        raise ValueError(
            f"{_name(module)} is not known to normalise q and k without weights, so its attention is another function "
            "than cosine attention: take another attn_implementation, such as 'sdpa', for this model. If other layers "
            "of it do normalise, register(others='sdpa') leaves those that do not to sdpa. To train a new model, from "
            "scratch: register(allow_new_model=True). A layer of your own that normalises says so by an attribute, "
            "cosine_sim_gain = 1.0"
        )
    return _attention(
        module, query, key, value, attention_mask, is_causal, sliding_window, cu_seq_lens_q, cu_seq_lens_k,
        position_ids, logits,
    )  # fmt: skip


def new_model_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """cosine_sim_attention for layers that do not normalise, too: as if an RMS norm without weights came before.

    That is softmax(scaling * head_dim * cos(query, key)) value: the lengths of query and key have no say. Layers that
    normalise are computed as they are. A layer that says something by the length of its queries, as Llama-4 does with
    its temperature, raises a ValueError.
    """
    _refuse(module, dropout, others)
    logits = _logits(module, query.shape[-1], scaling) or _new_logits(module, query.shape[-1], scaling)
    return _attention(
        module, query, key, value, attention_mask, is_causal, sliding_window, cu_seq_lens_q, cu_seq_lens_k,
        position_ids, logits,
    )  # fmt: skip


def mixed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """cosine_sim_attention for layers that normalise, and transformers' "sdpa" for others: such as Llama-4's.

    Arguments and results are those of cosine_sim_attention, in other layers, too, but that these may have a dropout.
    Where something but the future is hidden they make a mask as large as the scores of one head.
    """
    if _gain(module) is not None:
        return cosine_sim_attention(
            module, query, key, value, attention_mask, scaling, dropout, is_causal, sliding_window, cu_seq_lens_q,
            cu_seq_lens_k, position_ids, **others,
        )  # fmt: skip
    _refuse(module, 0, others)
    mask: Tensor | None
    if isinstance(attention_mask, Tensor):
        _check_packing(module, attention_mask, None, cu_seq_lens_q, cu_seq_lens_k, position_ids)
        mask, causal = attention_mask, False
    else:
        visible = attention_mask or _without_mask(module, query, key, is_causal, sliding_window)
        _check_agreement(module, visible, query, key, is_causal, sliding_window)
        _check_packing(module, attention_mask, visible, cu_seq_lens_q, cu_seq_lens_k, position_ids)
        key, value = key[:, :, : visible.num_keys], value[:, :, : visible.num_keys]
        cu_seqlens = _packing(module, visible, query, key, cu_seq_lens_q, cu_seq_lens_k)
        mask, causal = dense(visible, query.shape[0], cu_seqlens, query.device), visible.causal
    sdpa = _models.ALL_ATTENTION_FUNCTIONS["sdpa"]
    o: Tensor = sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal)[0]
    return o, None


def fold_norms(model: nn.Module) -> int:
    """Moves the norms of q and k into the attention call, in place: two passes over q and k less, in each direction.

    For layers of transformers whose norms have no weights, under an attn_implementation that `register` has made
    known. The checkpoint stays what it is. Norms lose their eps, which matters to vectors almost as short as it. A
    cache then holds keys before their norm, which each token that is generated normalises again: this is for training.

    Returns:
        The number of layers whose norms were moved, 0 if they all were before.

    Raises:
        ValueError: there is no such layer.
        RuntimeError: attn_implementation is another one.
    """
    layers = [module for module in model.modules() if _has_norms_to_fold(module)]
    if not layers and any(map(_is_folded, model.modules())):
        return 0
    if not layers:
        raise ValueError(f"model must have layers that normalise without weights, {type(model).__name__} has none")
    for layer in layers:
        _require_ours(layer.config)
        for name in _NORMS:
            if hasattr(layer, name):
                setattr(layer, name, _FoldedNorm(layer.config))
    return len(layers)


class _FoldedNorm(nn.Module):
    """Stands where a norm was that cosine_sim_attention now applies."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        _require_ours(self.config)
        return x


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    position_ids: Tensor | None,
    logits: _Logits,
) -> tuple[Tensor, None]:
    visible, lost = _visible(module, attention_mask, query, key, is_causal, sliding_window, logits)
    _check_packing(module, attention_mask, visible, cu_seq_lens_q, cu_seq_lens_k, position_ids)
    o = _attend(module, query, key, value, visible, cu_seq_lens_q, cu_seq_lens_k, logits)
    if lost is not None:
        o = _as_eager(o, query, key, value, attention_mask, lost, logits)
    return o.transpose(1, 2).contiguous(), None


def _require_ours(config: Any) -> None:
    name = config._attn_implementation
    if _models.AttentionInterface._global_mapping.get(name) not in _ours():
        raise RuntimeError(
            f"fold_norms moves norms into cosine attention, and attn_implementation is {name!r}, which does not "
            "normalise: it must be a name that was registered"
        )


def _has_norms_to_fold(module: nn.Module) -> bool:
    return not hasattr(module, "cosine_sim_gain") and _gain(module) is not None and not _is_folded(module)


def _is_folded(module: nn.Module) -> bool:
    return any(isinstance(getattr(module, name, None), _FoldedNorm) for name in _NORMS)


def _logits(module: nn.Module, head_dim: int, scaling: float | None) -> _Logits | None:
    """Of a layer that normalises, or whose norms were folded; None: it is not known to."""
    gain = _gain(module)
    if gain is None:
        return None
    scale = head_dim**-0.5 if scaling is None else scaling
    largest = scale * head_dim * gain
    _check_largest(module, "scaling * head_dim * gain", largest)
    return _Logits(largest, True, largest) if _is_folded(module) else _Logits(scale, False, largest)


def _new_logits(module: nn.Module, head_dim: int, scaling: float | None) -> _Logits:
    """Of a layer that does not normalise."""
    _refuse_temperatures(module)
    scale = (head_dim**-0.5 if scaling is None else scaling) * head_dim
    _check_largest(module, "scaling * head_dim", scale)
    return _Logits(scale, True, scale)


def _check_largest(module: nn.Module, name: str, largest: float) -> None:
    if not 0 < largest <= MAX_LOGIT:
        raise ValueError(
            f"{name}, the largest logit, must be above 0 and at most {MAX_LOGIT}, got {largest} from {_name(module)}"
        )


def _name(module: nn.Module) -> str:
    return f"layer {getattr(module, 'layer_idx', '(without a number)')} ({type(module).__name__})"


def _gain(module: nn.Module) -> float | None:
    """The gain behind RMS norms without weights, of q times of k; None: there may be no such norms."""
    declared = getattr(module, "cosine_sim_gain", None)
    if declared is not None:
        return float(declared)
    norms = [type(getattr(module, name)) for name in _NORMS if hasattr(module, name)]
    attribute = _gain_attribute(type(module), tuple(norms))
    return None if attribute is None else float(getattr(module, attribute)) if attribute else 1.0


@constant_when_compiled  # which does not know names of functions
def _gain_attribute(layer: type[nn.Module], norms: tuple[type[nn.Module], ...]) -> str | None:
    """What _NORMALISING says of a layer with such norms; None if it is not there, or has none.

    The class that forward comes from counts: a subclass that only shards the layer is no other layer.
    """
    forward: Any = layer.forward
    place = forward.__module__, forward.__qualname__.removesuffix(".forward")
    # Llama-4 has no norms where it does not rotate, or by its configuration. And somebody may have replaced them.
    own = all(norm is _FoldedNorm or norm.__module__ == place[0] for norm in norms)
    return _NORMALISING.get(place) if norms and own else None


def _refuse_temperatures(module: nn.Module) -> None:
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        raise ValueError(
            f"{_name(module)} multiplies its queries by a temperature for each position, which the norm would undo: "
            "set attn_temperature_tuning=False in the configuration"
        )
    rotation = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if rotation.get("llama_4_scaling_beta"):
        raise ValueError(
            f"{_name(module)} multiplies its queries by a temperature for each position, which the norm would undo: "
            "set llama_4_scaling_beta=0 in the configuration's rope_parameters"
        )


def _refuse(module: nn.Module, dropout: float, others: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"dropout must be 0, got {dropout} from {_name(module)}: cosine attention has none. Set the "
            "configuration's attention_dropout to 0"
        )
    if others.pop("output_attentions", None):
        raise ValueError(
            f"output_attentions must be false, got true for {_name(module)}: the weights are never there as a whole. "
            "Take attn_implementation='eager' to look at them"
        )
    check_deterministic(others.pop("deterministic", None))  # ModernBERT's deterministic_flash_attn
    unknown = {name for name, argument in others.items() if argument is not None} - _HARMLESS
    if unknown:
        raise ValueError(
            f"{_name(module)} passes {', '.join(sorted(unknown))} to its attention, which cosine attention does not "
            "know; it must be None"
        )


def _check_packing(
    module: nn.Module,
    mask: Visible | Tensor | None,
    visible: Visible | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    position_ids: Tensor | None,
) -> None:
    """That packed sequences are said once, and are not overlooked."""
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if cu_seq_lens_q is None or cu_seq_lens_k is None:
            raise ValueError(f"{_name(module)} must get both cu_seq_lens_q and cu_seq_lens_k, or neither")
        if visible is None or visible.keys is not None or isinstance(mask, Tensor):
            raise ValueError(f"{_name(module)} gets cu_seq_lens_q and an attention_mask: it must be one of them")
        return
    if visible is None or isinstance(mask, Tensor):  # which says it all
        return
    told = visible.cu_seqlens is not None or visible.one_sequence is not None
    if told or position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return
    if getattr(module, "layer_idx", 0) != 0:  # all get the same, and on a GPU this waits for it
        return
    rising = position_ids.diff() > 0
    if visible.keys is not None:  # what is padded may have any positions
        if visible.keys.shape[1] < position_ids.shape[1]:  # another sequence's: a decoder's queries, its encoder's keys
            return
        seen = visible.keys[:, -position_ids.shape[1] :]
        rising = rising | ~(seen[:, 1:] & seen[:, :-1])
    rising = rising.all()
    message = (
        f"{_name(module)} gets position_ids that begin anew, but a mask of one sequence: with a cache or an "
        "attention_mask transformers overlooks packed sequences. Pass use_cache=False and no attention_mask, or "
        "cu_seq_lens_q and cu_seq_lens_k"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(rising, message)
    elif not rising:
        raise ValueError(message)


def _visible(
    module: nn.Module,
    mask: Visible | Tensor | None,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
    logits: _Logits,
) -> tuple[Visible, Tensor | None]:
    """What each query sees; and which of them see nothing, but by finite values (see _of_tensor)."""
    if isinstance(mask, Visible):
        _check_agreement(module, mask, query, key, is_causal, sliding_window)
        return mask, None
    if mask is None:
        return _without_mask(module, query, key, is_causal, sliding_window), None
    return _of_tensor(module, mask, query, key, sliding_window, logits.largest)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    logits: _Logits,
) -> Tensor:
    """(batch, num_heads, seq_len_q, head_dim)."""
    key, value = key[:, :, : visible.num_keys], value[:, :, : visible.num_keys]
    cu_seqlens = _packing(module, visible, query, key, cu_seq_lens_q, cu_seq_lens_k)
    if cu_seqlens is not None:
        return _attend_packed(query, key, value, visible, cu_seqlens, logits)
    return flash_cosine_sim_attention(
        query, key, value, visible.keys, scale=logits.scale, causal=visible.causal, l2norm_qk=logits.l2norm_qk,
        window_size=visible.window,
    )  # fmt: skip


def _without_mask(
    module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, sliding_window: int | None
) -> Visible:
    seq_len_q, seq_len_k = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if is_causal and seq_len_q != 1 and seq_len_q != seq_len_k:
        raise ValueError(
            f"{_name(module)} is causal and passes no attention_mask: then it must have 1 query or as many as keys, "
            f"got {seq_len_q} and {seq_len_k}"
        )
    if sliding_window is not None and not is_causal:
        raise ValueError(f"{_name(module)} passes sliding_window={sliding_window} without causality or attention_mask")
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    return Visible(seq_len_q, seq_len_k, seq_len_k, is_causal, window, None, None, None)


def _check_agreement(
    module: nn.Module,
    visible: Visible,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
) -> None:
    lengths = query.shape[2], key.shape[2]
    if lengths != (visible.seq_len_q, visible.seq_len_k):
        raise ValueError(
            f"attention_mask is for {visible.seq_len_q} queries and {visible.seq_len_k} keys, {_name(module)} has "
            f"{lengths[0]} and {lengths[1]}"
        )
    if lengths[0] == 1:  # the keys say all
        return
    if is_causal is not None and is_causal is not visible.causal:
        raise ValueError(f"{_name(module)} passes is_causal={is_causal}, but its mask is for {visible.causal}")
    furthest = lengths[1] - 1  # that a key can be away
    left = furthest if visible.window[0] < 0 else min(visible.window[0], furthest)
    if sliding_window is None:
        return
    # Two ways, so many keys or one less: transformers' mask has sliding_window, its FlashAttention one less, and models
    # follow either. Which it is, the mask says.
    passed = {sliding_window - 1} if visible.causal else {sliding_window - 1, sliding_window}
    if left not in {min(size, furthest) for size in passed}:
        raise ValueError(
            f"{_name(module)} passes sliding_window={sliding_window}, but its mask has window_size={visible.window}"
        )


def _packing(
    module: nn.Module,
    visible: Visible,
    query: Tensor,
    key: Tensor,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Where the sequences begin among queries and among keys, if they are packed: what the model says itself, first."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        if visible.one_sequence is not None:
            torch._assert_async(
                visible.one_sequence,
                "position_ids that begin anew, chunks and blocks cannot be seen under torch.compile: pass packed "
                "sequences as cu_seq_lens_q and cu_seq_lens_k, too",
            )
        return None if visible.cu_seqlens is None else (visible.cu_seqlens, visible.cu_seqlens)
    bounds = []
    for name, cu_seqlens, rows in (("cu_seq_lens_q", cu_seq_lens_q, query), ("cu_seq_lens_k", cu_seq_lens_k, key)):
        total = rows.shape[0] * rows.shape[2]
        complete = cu_seqlens[-1] == total
        message = f"{name} must end with the number of rows of {_name(module)}, {total}"
        if torch.compiler.is_compiling():
            torch._assert_async(complete, message)
        elif not complete:
            raise ValueError(f"{message}, got {cu_seqlens[-1].item()}")
        bounds.append(cu_seqlens.int())
    if visible.cu_seqlens is not None and not torch.equal(visible.cu_seqlens, bounds[0]):
        raise ValueError(
            f"{_name(module)} gets cu_seq_lens_q {bounds[0].tolist()}, but its mask, by position_ids, has sequences at "
            f"{visible.cu_seqlens.tolist()}"
        )
    return bounds[0], bounds[1]


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    cu_seqlens: tuple[Tensor, Tensor],
    logits: _Logits,
) -> Tensor:
    batch, num_heads, seq_len_q, head_dim = query.shape
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (total, heads, head_dim)
    o = flash_cosine_sim_attention_varlen(
        q, k, v, *cu_seqlens, q.shape[0], k.shape[0], scale=logits.scale, causal=visible.causal,
        l2norm_qk=logits.l2norm_qk, window_size=visible.window,
    )  # fmt: skip
    return o.view(batch, seq_len_q, num_heads, head_dim).transpose(1, 2)


def _as_eager(o: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, lost: Tensor, logits: _Logits) -> Tensor:
    """o with its lost rows, (batch or 1, seq_len_q), as eager attention computes them, with their gradients.

    To add a large value to all logits of a row rounds away how they differ, but hides none: keys that have the largest
    value share the row.
    """
    rows = lost.any(0).nonzero().flatten()
    query = query[:, :, rows]
    if logits.l2norm_qk:
        query, key = l2norm_tensors(query, key)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = mask.expand(-1, -1, o.shape[2], -1)[:, :, rows]
    weights = (query @ key.mT * logits.scale + mask).softmax(-1, dtype=torch.float32).to(value.dtype)
    lost = lost[:, None, rows, None]
    return o.index_copy(2, rows, torch.where(lost, weights @ value, o[:, :, rows]))


def _of_tensor(
    module: nn.Module, mask: Tensor, query: Tensor, key: Tensor, sliding_window: int | None, largest_logit: float
) -> tuple[Visible, Tensor | None]:
    """What a mask of the caller's own shows; and which rows it hides all of by finite values.

    The latter are bool (batch or 1, seq_len_q), or None, if there is none.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{_name(module)} gets an attention_mask for each query and key, whose values cannot be read under "
            "torch.compile: pass (batch, seq_len), or cu_seq_lens_q and cu_seq_lens_k"
        )
    shape = (*query.shape[:3], key.shape[2])
    if mask.ndim != 4 or any(a != 1 and a != b for a, b in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"attention_mask must broadcast to (batch, num_heads, seq_len_q, seq_len_k) = {shape}, got "
            f"{tuple(mask.shape)} in {_name(module)}"
        )
    mask = mask.expand(-1, -1, *shape[2:])
    if not bool((mask == mask[:, :1]).all()):  # not NaN either
        raise ValueError(f"attention_mask must be the same for all heads and without NaN, in {_name(module)} it is not")
    mask = mask[:, 0]
    shown, lost = (mask, None) if mask.dtype == torch.bool else _shown(module, mask, largest_logit)
    keys = shown.any(-2)  # (batch or 1, seq_len_k)
    causal, window = _structure(module, shown, keys, sliding_window)
    keys = keys.expand(shape[0], -1)
    visible = Visible(shape[2], shape[3], shape[3], causal, window, None if bool(keys.all()) else keys, None, None)
    return visible, lost


def _shown(module: nn.Module, mask: Tensor, largest_logit: float) -> tuple[Tensor, Tensor | None]:
    """As _of_tensor, of a mask that is added to the logits, (batch or 1, seq_len_q, seq_len_k)."""
    if not mask.is_floating_point():
        raise TypeError(f"attention_mask must be bool or of a floating dtype, got {mask.dtype} in {_name(module)}")
    shown, hidden = mask == 0, mask <= _LOG_OF_ZERO - 2 * largest_logit
    if not bool((shown | hidden).all()):
        raise ValueError(
            f"attention_mask must be 0 where a key is seen and at most {_LOG_OF_ZERO - 2 * largest_logit:.0f} where it "
            f"is not, got {mask[~(shown | hidden)][0].item()} in {_name(module)}: a bias is not honoured"
        )
    lost = hidden.all(-1) & mask.isfinite().any(-1)
    return shown, lost if bool(lost.any()) else None


def _structure(
    module: nn.Module, shown: Tensor, keys: Tensor, sliding_window: int | None
) -> tuple[bool, tuple[int, int]]:
    """causal and window_size of a mask, (batch or 1, seq_len_q, seq_len_k), that shows `keys` to some query."""
    seq_len_q, seq_len_k = shown.shape[1:]
    if torch.equal(shown, keys[:, None].expand_as(shown)):
        return False, (-1, -1)
    past = torch.ones_like(shown[0]).tril(seq_len_k - seq_len_q)
    if torch.equal(shown, keys[:, None] & past):
        return True, (-1, 0)
    if sliding_window is not None and torch.equal(
        shown, keys[:, None] & past.triu(seq_len_k - seq_len_q - sliding_window + 1)
    ):
        return True, (sliding_window - 1, 0)
    raise ValueError(
        f"attention_mask must hide keys, the future, or both, aligned with the last key, in {_name(module)} it does "
        "something else. Pass (batch, seq_len) for padding; for packed sequences position_ids that begin anew, or "
        "cu_seq_lens_q and cu_seq_lens_k"
    )
