"""What one call of attention is, spelled once: the names, types and order of its arguments.

interface.py makes a call, reference.py and sdpa.py compute it, ops.py makes the operators of it: their schemas, what
autograd saves, what the backward pass gets. All of them find an argument by its name; its place is known here alone.

On the way to a kernel a call is a plain tuple in the order of Call's fields: that costs 0.24 us to build, a NamedTuple
0.78 us. Where the time does not count, Call(*values) and Operator.decode give the values their names. Nothing that
torch.compile traces uses a picker or Call._make, which not every release of it knows.
"""

import operator
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class Call(NamedTuple):
    """The arguments that decide what is computed, as interface.py has checked and normalised them.

    Which keys a query may see follows from the windows and cu_seqlens alone; causal says nothing more.

    Packed, with cu_seqlens, batch is 1, there is neither mask nor attn_bias, and sequence s has the queries from
    cu_seqlens_q[s] up to cu_seqlens_q[s + 1] and the keys from cu_seqlens_k[s] up to cu_seqlens_k[s + 1]. Queries
    behind the last sequence see nothing. On a GPU nobody has checked the values of cu_seqlens.
    """

    q: Tensor  # (batch, num_heads, seq_len_q, head_dim)
    k: Tensor  # (batch, num_kv_heads, seq_len_k, head_dim)
    v: Tensor  # as k
    mask: Tensor | None  # bool (batch, seq_len_k), True = attend
    attn_bias: Tensor | None  # in q's dtype, broadcastable to (batch, num_heads, seq_len_q, seq_len_k)
    scale: Tensor | None  # float32, or float64 for float64, (1,) or (num_heads,); None: it is scale_value
    cu_seqlens_q: Tensor | None  # int32 (num_sequences + 1,), contiguous; None: not packed
    cu_seqlens_k: Tensor | None  # the same; both or neither
    # Added to the score of a query at a distance t from a key, t = i + seq_len_k - seq_len_q - j, inside each sequence:
    distance_bias: (
        Tensor | None
    )  # (num_heads, num_distances), entry t - first_distance; float32, or float64 for float64
    alibi_slopes: Tensor | None  # (1 or batch, num_heads), in that dtype: -slope * |t|; it has no gradient
    scale_value: float  # where scale is a tensor the bound of its values: beyond, they count as it, with gradient 0
    groups: int  # divides head_dim
    causal: bool  # True where window_right is 0, and nowhere else
    window_left: int  # query i sees key j iff i + seq_len_k - seq_len_q - j <= window_left, or it is -1: unlimited;
    window_right: int  # and j - (i + seq_len_k - seq_len_q) <= window_right, or -1. Packed: inside each sequence
    first_distance: int  # of distance_bias: 0 if it is causal, else 1 - seq_len_q; packed, 1 - max_seqlen_q
    l2norm_qk: bool


# What has a gradient, in the order in which the backward operator returns them.
DIFFERENTIABLE = ("q", "k", "v", "attn_bias", "scale", "distance_bias")
# What is in q's dtype, and autocast casts.
IN_DTYPE_OF_Q = ("q", "k", "v", "attn_bias")

GRADIENTS = tuple(f"d{name}" for name in DIFFERENTIABLE)
NEEDS = tuple(f"need_d{name}" for name in DIFFERENTIABLE)

# What every operator takes. allow_tf32 permits TF32 products of float32 inputs: it changes how, not what.
SHARED: dict[str, Any] = {**get_type_hints(Call), "allow_tf32": bool}
TENSORS = tuple(name for name, kind in SHARED.items() if kind in (Tensor, Tensor | None))
VALUES = tuple(name for name in SHARED if name not in TENSORS)
_OPTIONS = {name: kind for name, kind in SHARED.items() if kind in (int, bool)}
_INPUTS = {name: kind for name, kind in SHARED.items() if name not in _OPTIONS}
# float32 (batch, num_heads, seq_len_q), but for o, which is like q. drow_sum_log2 is the gradient of row_sum_log2 and
# joins the row statistic delta = rowsum(do * o) - log2(e) * drow_sum_log2; None is zero.
_ROWS = {"o": Tensor, "row_sum_log2": Tensor, "drow_sum_log2": Tensor | None}

_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}
# These may be computed from lengths: as an int, each of its values would be a graph of torch.compile. A kernel gets an
# int either way.
_FROM_LENGTHS = ("window_left", "window_right", "first_distance")


def picker(fields: Sequence[str], names: Sequence[str]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Returns a function that picks from a tuple of values, one for each of `fields`, those of `names`, in that order.

    Names become places once, here: a pick costs a tenth of a microsecond. ValueError: a name is not in `fields`.
    """
    missing = [name for name in names if name not in fields]
    if missing or len(names) == 0:
        raise ValueError(f"names must be one or more of {tuple(fields)}, got {tuple(names)}")
    places = [fields.index(name) for name in names]
    neighbours = slice(places[0], places[-1] + 1)
    if places == list(range(neighbours.start, neighbours.stop)):
        return operator.itemgetter(neighbours)
    return operator.itemgetter(*places)


class Operator:
    """An operator: its arguments by name and type, in the order of its schema, and the names of its results.

    Arguments with a default come last; PyTorch may leave them out of a tuple of arguments.
    """

    def __init__(
        self, name: str, arguments: Mapping[str, Any], results: Sequence[str], defaults: Mapping[str, Any] | None = None
    ) -> None:
        defaults = defaults or {}
        self.name = name
        self.fields = tuple(arguments)
        self.results = tuple(results)
        self.required = tuple(field for field in self.fields if field not in defaults)
        types = {
            field: "SymInt" if field in _FROM_LENGTHS else _SCHEMA_TYPES[kind] for field, kind in arguments.items()
        }
        texts = [f"{kind} {field}" for field, kind in types.items()]
        texts = [f"{text}={defaults[f]}" if f in defaults else text for f, text in zip(arguments, texts, strict=True)]
        self.schema = f"{name}({', '.join(texts)}) -> ({', '.join(f'Tensor {result}' for result in results)})"
        self._arguments = namedtuple(name, self.fields, defaults=tuple(defaults.values()))  # type: ignore[misc]
        self._pick_call = picker(self.fields, Call._fields)

    def decode(self, arguments: Sequence[Any]) -> Any:
        """The arguments, by name: decode(arguments).groups."""
        return self._arguments(*arguments)

    def call(self, arguments: Sequence[Any]) -> Call:
        """The Call among the arguments."""
        return Call._make(self._pick_call(arguments))


# Without gradients nobody needs the row sums: they cost the kernels an addition a score.
FORWARD = Operator(
    "forward", {**SHARED, "need_row_sum_log2": bool}, ("o", "row_sum_log2"), defaults={"need_row_sum_log2": True}
)
PARTIALS = Operator("partials", SHARED, ("numerator", "denominator"))
BACKWARD = Operator(
    "backward",
    {"do": Tensor, **_INPUTS, **_ROWS, **_OPTIONS, **dict.fromkeys(NEEDS, bool), "deterministic": bool},
    GRADIENTS,
)
# What a compiled library is built for.
SCHEMAS = "; ".join(operator.schema for operator in (FORWARD, PARTIALS, BACKWARD))


def clipped_window(window_left: int, window_right: int, seq_len_q: int, seq_len_k: int) -> tuple[int, int]:
    """The window for these lengths: a side that hides nothing is -1."""
    return (
        -1 if window_left >= seq_len_k - 1 else window_left,  # the last query is as far as this from the first key
        -1 if window_right >= seq_len_q - 1 else window_right,
    )


def scale_of(call: Call) -> float | Tensor:
    """The scale, a number or a tensor (1,) or (num_heads,), within its bound."""
    return call.scale_value if call.scale is None else call.scale.clamp(-call.scale_value, call.scale_value)
