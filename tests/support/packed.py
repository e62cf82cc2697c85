"""Packed sequences: a list of lengths as one call, its tensors and options; and windows worth a test."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from flash_cosine_sim_attention import flash_cosine_sim_attention_varlen, l2norm_tensors
from flash_cosine_sim_attention.reference import compute_dtype
from support.cases import WIDE
from support.gates import assert_within_gate, backend_name, results


@dataclass(frozen=True)
class Packed:
    """Lengths of sequences, and how a call attends within them. What gates.py reads of a Case is here, too."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None  # None: those of the queries
    behind: int = 0  # rows of q, k and v that belong to no sequence, behind the last
    dtype: torch.dtype = torch.bfloat16
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 64
    groups: int = 1
    causal: bool = False
    window_size: tuple[int, int] | None = None
    scale: float = 10.0
    learned_scale: bool = False
    l2norm_qk: bool = True
    distance_bias: bool = False
    alibi: bool = False
    seed: int = 0
    device: str = "cpu"
    batch: int = 1

    @property
    def lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.lengths_q, self.lengths_q if self.lengths_k is None else self.lengths_k

    @property
    def seq_len_q(self) -> int:
        return sum(self.lengths[0]) + self.behind

    @property
    def seq_len_k(self) -> int:
        return sum(self.lengths[1]) + self.behind

    def generator(self, offset):
        return torch.Generator(self.device).manual_seed(self.seed + offset)

    def tensors(self, dtype=torch.float64):
        generator = self.generator(0)
        sizes = {"q": (self.seq_len_q, self.num_heads)} | dict.fromkeys("kv", (self.seq_len_k, self.num_kv_heads))
        tensors = {
            name: torch.randn(*size, self.head_dim, generator=generator, device=self.device).to(self.dtype).double()
            for name, size in sizes.items()
        }
        if not self.l2norm_qk:
            unit = l2norm_tensors(tensors["q"], tensors["k"], groups=self.groups)
            tensors["q"], tensors["k"] = (tensor.to(self.dtype).double() for tensor in unit)
        if self.learned_scale:
            uniform = torch.rand(self.num_heads, generator=generator, device=self.device)
            tensors["scale"] = self.scale / self.groups * (0.5 + uniform.double() / 2)
        if self.distance_bias:
            longest_q, longest_k = map(max, self.lengths)
            num_distances = longest_k + 2 if self.causal else max(longest_q + longest_k - 1, 0)
            table = torch.randn(self.num_heads, num_distances, generator=generator, device=self.device)
            tensors["distance_bias"] = table.double()
        wide = compute_dtype(dtype)
        return {name: tensor.to(wide if name in WIDE else dtype) for name, tensor in tensors.items()}

    def options(self):
        q, k = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device) for lengths in self.lengths
        )
        k = q if self.lengths_k is None else k  # as models have it: by_distance takes Hopper's kernels for that alone
        options = {
            "cu_seqlens_q": q,
            "cu_seqlens_k": k,
            "max_seqlen_q": max(self.lengths[0]),
            "max_seqlen_k": max(self.lengths[1]),
            "groups": self.groups,
            "causal": self.causal,
            "window_size": self.window_size,
            "l2norm_qk": self.l2norm_qk,
        }
        if self.alibi:
            slopes = torch.rand(self.num_heads, generator=self.generator(3), device=self.device)
            options["alibi_slopes"] = 0.2 * slopes
        return options if self.learned_scale else {**options, "scale": self.scale / self.groups}


def attend_packed(backend, **arguments):
    with backend_name(backend) as name:
        return flash_cosine_sim_attention_varlen(**arguments, backend=name)


def check_packed(case, backend):
    """The gate for o and every gradient, as for a Case."""

    def of(name):
        return lambda **arguments: attend_packed(name, **arguments)

    exact = results(of("reference"), case, torch.float64)
    sdpa = results(of("sdpa"), case, case.dtype)
    assert_within_gate(case, backend, exact, sdpa, results(of(backend), case, case.dtype))


# At and beside edges of tiles, which have 64 to 192 queries and 16 to 128 keys; empty tiles; beyond the lengths.
WINDOWS = {
    "narrow": {"seq_len_q": 200, "seq_len_k": 200, "window_size": (1, 1)},
    "left": {"seq_len_q": 300, "seq_len_k": 300, "window_size": (70, -1)},
    "right": {"seq_len_q": 150, "seq_len_k": 300, "window_size": (-1, 64)},
    "both": {"seq_len_q": 330, "seq_len_k": 330, "window_size": (95, 33), "num_kv_heads": 1},
    "causal": {"seq_len_q": 400, "seq_len_k": 400, "window_size": (127, -1), "causal": True},
    "causal-edge": {"seq_len_q": 260, "seq_len_k": 260, "window_size": (128, 9), "causal": True, "learned_scale": True},
    "more-keys": {"seq_len_q": 70, "seq_len_k": 500, "window_size": (30, 5)},  # of which most are seen by nobody
    "more-queries": {"seq_len_q": 500, "seq_len_k": 90, "window_size": (30, 40), "groups": 2},
    "masked": {"seq_len_q": 200, "seq_len_k": 300, "window_size": (100, 50), "mask": True},
    "masked-causal": {"seq_len_q": 300, "seq_len_k": 300, "window_size": (150, -1), "mask": True, "causal": True},
    "one-query": {"seq_len_q": 1, "seq_len_k": 300, "window_size": (99, -1), "causal": True},
    "strided": {"seq_len_q": 200, "seq_len_k": 230, "window_size": (20, -1), "strided": True, "l2norm_qk": False},
}
PACKED = {
    "training": Packed((100, 1, 260, 64, 128), causal=True),
    "dense": Packed((33, 200, 0, 90), num_kv_heads=1),
    "window": Packed((300, 70, 150), window_size=(64, -1), causal=True, learned_scale=True),
    "other-keys": Packed((50, 0, 130, 7), (120, 40, 0, 200), causal=True, groups=2),
    "one-token-each": Packed((1,) * 40, causal=True),
    "rows-behind": Packed((90, 61), behind=140, causal=True),
    "both-windows": Packed((129, 65, 191), (190, 65, 128), window_size=(31, 17), l2norm_qk=False),
    "raw": Packed((150, 90, 41), num_kv_heads=1, window_size=(64, -1), causal=True, l2norm_qk=False, behind=9),
    "empty": Packed((0, 0), behind=70),
    "many": Packed(tuple(i * i % 7 for i in range(99)), tuple(i * i % 5 for i in range(99)), causal=True),
}
# cu_seqlens for 130 rows that fall or leave them, few and more than a warp has lanes.
WRONG_CU_SEQLENS = {
    "falls": [0, 90, 40, 130],
    "outside": [5, -7, 200, 60],
    "extreme": [0, 1 << 30, -(1 << 30), 100],
    "ends-at-0": [130, 0, 0, 0],
    "many": [5] * 40 + [-1, 33, 20] + [60, 50] * 20 + [300, 1, 130],
    "many-falls": [*range(0, 105, 3), 20, *range(90, 130)],
}


def in_order(cu_seqlens, num_rows):
    """What wrong ones are read as: the largest so far, within the rows."""
    return cu_seqlens.clamp(0, num_rows).cummax(0).values.to(cu_seqlens.dtype)


# What distances add: at, below and above the edges of tiles, with all that it goes together with.
DISTANCES = {
    "causal": {"seq_len_q": 300, "seq_len_k": 300, "causal": True, "distance_bias": True},
    "dense": {"seq_len_q": 193, "seq_len_k": 257, "distance_bias": True, "num_kv_heads": 1},
    "alibi": {"seq_len_q": 260, "seq_len_k": 260, "causal": True, "alibi": "heads"},
    "alibi-dense": {"seq_len_q": 129, "seq_len_k": 200, "alibi": "batch", "batch": 2},
    "both": {"seq_len_q": 150, "seq_len_k": 331, "causal": True, "distance_bias": True, "alibi": "batch", "batch": 2},
    "window": {"seq_len_q": 330, "seq_len_k": 330, "causal": True, "distance_bias": True, "window_size": (95, -1)},
    "right": {"seq_len_q": 200, "seq_len_k": 127, "window_size": (-1, 33), "distance_bias": True, "alibi": "heads"},
    "mask": {"seq_len_q": 200, "seq_len_k": 300, "mask": True, "distance_bias": True, "batch": 2},
    "empty-rows": {"seq_len_q": 270, "seq_len_k": 130, "causal": True, "distance_bias": True, "learned_scale": True},
    "one-query": {"seq_len_q": 1, "seq_len_k": 400, "causal": True, "distance_bias": True},
    "few-keys": {"seq_len_q": 200, "seq_len_k": 17, "distance_bias": True},
    "groups": {"seq_len_q": 140, "seq_len_k": 190, "distance_bias": True, "groups": 2, "batch": 2},
    "raw": {"seq_len_q": 200, "seq_len_k": 230, "distance_bias": True, "l2norm_qk": False, "strided": True},
}
PACKED_DISTANCES = {
    "training": Packed((100, 1, 260, 64, 128), causal=True, distance_bias=True),
    "dense": Packed((33, 200, 0, 90), num_kv_heads=1, distance_bias=True, alibi=True),
    "window": Packed((300, 70, 150), window_size=(64, -1), causal=True, distance_bias=True, behind=40),
    "alibi": Packed((90, 61, 200), causal=True, alibi=True, groups=2),
    "other-keys": Packed((50, 0, 130, 7), (120, 40, 0, 200), causal=True, distance_bias=True, alibi=True),
    "empty": Packed((0, 0), behind=70, alibi=True),
}
