"""Configurations of one call of attention: their tensors and options, random ones, and inputs that strain a kernel."""

from dataclasses import dataclass, fields

import torch
from hypothesis import strategies as st

from flash_cosine_sim_attention import l2norm_tensors
from flash_cosine_sim_attention.reference import compute_dtype

WIDE = ("scale", "distance_bias")  # float32 beside 16-bit q, k and v
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BIASES = ["heads", "batch", "full", "shared", "per_key", "per_query", "plane", "number"]
MAX_SCORES = 2_500_000  # per case: a float64 forward and backward of that many takes a fraction of a second
HEAD_DIMS = [16, 32, 64, 96, 128, 256]
PADDED_HEAD_DIMS = [8, 24, 40, 80, 160, 200]
# Where tiles of the kernels of compute capability 9.0 end; test_plan.py compares them with the tables of tile sizes.
SM90_EDGES_Q = [edge + step for edge in (64, 128, 192, 256, 384) for step in (-1, 0, 1)]
SM90_EDGES_K = [edge + step for edge in (64, 96, 128, 192, 256) for step in (-1, 0, 1)]
OPTIONS = [
    {},
    {"causal": True},
    {"mask": True},
    {"causal": True, "mask": True, "strided": True},
    {"bias": "heads", "strided": True},
    {"bias": "batch", "mask": True, "num_kv_heads": 2},
    {"bias": "full", "causal": True, "groups": 2},
    {"bias": "shared", "causal": True, "learned_scale": True},
    {"bias": "per_key", "causal": True, "mask": True, "l2norm_qk": False},
    {"bias": "per_query", "learned_scale": "scalar", "groups": 4},
    {"bias": "plane", "mask": True},
    {"bias": "number", "causal": True, "num_kv_heads": 1},
    {"learned_scale": True, "causal": True, "num_kv_heads": 2},
    {"learned_scale": "scalar", "mask": True, "strided": True},
    {"learned_scale": True, "mask": True, "l2norm_qk": False, "num_kv_heads": 2},
    {"groups": 4, "mask": True, "learned_scale": True},
    {"groups": 2, "causal": True, "strided": True, "num_kv_heads": 2},
    {"l2norm_qk": False, "causal": True, "strided": True},
    {"layout": "single_head", "num_kv_heads": 1, "causal": True, "mask": True},
    {"layout": "single_head", "num_kv_heads": 1, "bias": "heads", "groups": 2},
    {"layout": "merged", "num_heads": 1, "num_kv_heads": 1, "batch": 6, "mask": True, "bias": "batch"},
    {"layout": "merged", "num_heads": 1, "num_kv_heads": 1, "batch": 6, "causal": True, "learned_scale": True},
]


@dataclass(frozen=True)
class Case:
    """One configuration; printed by hypothesis when it fails, it is all that is needed to repeat it."""

    dtype: torch.dtype = torch.float32
    batch: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    seq_len_q: int = 33
    seq_len_k: int = 47
    head_dim: int = 16
    layout: str = "heads"  # "heads": 4-D; "single_head": 3-D k, v; "merged": 3-D q, k, v
    groups: int = 1
    causal: bool = False
    window_size: tuple[int, int] | None = None
    mask: bool = False
    bias: str | None = None  # a key of bias_shape
    distance_bias: bool = False  # float32, and a few entries more than needed if causal
    alibi: str | None = None  # slopes, "heads" or "batch"
    scale: float = 10.0  # times groups, so a bound on the logits; of learned ones, the largest
    learned_scale: bool | str = False  # True: one for each head, "scalar": one for all
    l2norm_qk: bool = True
    strided: bool = False  # (batch, seq_len, heads, head_dim) storage
    seed: int = 0
    device: str = "cpu"

    def bias_shape(self):
        seq_lens = self.seq_len_q, self.seq_len_k
        return {
            "heads": (self.num_heads, *seq_lens),
            "batch": (self.batch, *seq_lens),
            "full": (self.batch, self.num_heads, *seq_lens),
            "shared": (1, 1, *seq_lens),
            "per_key": (1, self.num_heads, 1, self.seq_len_k),
            "per_query": (self.batch, 1, self.seq_len_q, 1),
            "plane": seq_lens,
            "number": (1, 1, 1, 1),
        }[self.bias]

    def tensors(self, dtype=torch.float64):
        """Return the differentiable tensors by name: of values that the case's dtype has, in `dtype`.

        A learned temperature is a float32 parameter beside low-precision activations.
        """
        wide = compute_dtype(dtype)
        return {name: tensor.to(wide if name in WIDE else dtype) for name, tensor in self.make_tensors().items()}

    def make_tensors(self):
        generator = self.generator(0)

        def randn(*shape):
            values = torch.randn(*shape, generator=generator, device=self.device)
            return values.to(self.dtype).double()

        lengths = self.seq_len_q, self.seq_len_k, self.seq_len_k
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        tensors = {}
        for name, num_heads, seq_len in zip("qkv", heads, lengths, strict=True):
            tensors[name] = randn(self.batch, num_heads, seq_len, self.head_dim)
            if self.layout == "merged" or (self.layout == "single_head" and name != "q"):
                tensors[name] = tensors[name].flatten(0, 1)
            elif self.strided:
                tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
        if not self.l2norm_qk:
            unit = l2norm_tensors(tensors["q"], tensors["k"], groups=self.groups)
            tensors["q"], tensors["k"] = (tensor.to(self.dtype).double() for tensor in unit)
        if self.bias is not None:
            tensors["attn_bias"] = randn(*self.bias_shape())
        if self.learned_scale:
            num_scales = 1 if self.layout == "merged" or self.learned_scale == "scalar" else self.num_heads
            uniform = torch.rand(num_scales, generator=generator, device=self.device)
            tensors["scale"] = self.scale / self.groups * uniform.double()
        if self.distance_bias:
            tensors["distance_bias"] = randn(self.num_heads, self.num_distances()).float().double()
        return tensors

    def num_distances(self):
        return self.seq_len_k + 3 if self.causal else self.seq_len_q + self.seq_len_k - 1

    def generator(self, offset):
        """A generator of its own for each `offset`, on the case's device: there, nothing waits for a copy."""
        return torch.Generator(self.device).manual_seed(self.seed + offset)

    def options(self):
        options = {
            "groups": self.groups,
            "causal": self.causal,
            "l2norm_qk": self.l2norm_qk,
            "attn_bias_batch_dim": self.bias == "batch",
            "window_size": self.window_size,
        }
        if not self.learned_scale:
            options["scale"] = self.scale / self.groups
        if self.alibi is not None:
            shape = (self.num_heads,) if self.alibi == "heads" else (self.batch, self.num_heads)
            options["alibi_slopes"] = 0.2 * torch.rand(shape, generator=self.generator(3), device=self.device)
        if self.mask:
            batch = self.batch * self.num_heads if self.layout == "merged" else self.batch
            mask = torch.rand(batch, self.seq_len_k, generator=self.generator(1), device=self.device) < 0.7
            mask[:, :2] = True  # two keys: with one, gradients are 0 and nothing is left to compare with
            mask[1:2] = False  # a whole batch element without a visible key
            options["mask"] = mask
        return options


def describe(case):
    """The name of a case's test, in characters that -k takes: what every case has, and what is not the default."""
    dtype = str(case.dtype).removeprefix("torch.")
    shown = [f"{dtype}-{case.seq_len_q}x{case.seq_len_k}-d{case.head_dim}"]
    for field in fields(case):
        value = getattr(case, field.name)
        if field.name not in ("dtype", "seq_len_q", "seq_len_k", "head_dim", "device") and value != field.default:
            shown.append(f"{field.name}:{value}".replace(" ", "_"))
    return "-".join(shown)


@st.composite
def cases(draw):
    length = st.one_of(st.integers(2, 70), st.sampled_from([127, 129, 255, 511, 513, 641, 1024, 1029, 1030]))
    seq_len_q, seq_len_k = draw(length), draw(length)
    most = max(1, MAX_SCORES // (seq_len_q * seq_len_k))
    batch = draw(st.integers(1, min(3, most)))
    num_heads = draw(st.sampled_from([h for h in (1, 2, 4, 6) if batch * h <= most]))
    layout = draw(st.sampled_from(["heads", "heads", "single_head", "merged"]))
    divisors = [h for h in (1, 2, 3, num_heads) if num_heads % h == 0]
    num_kv_heads = {"single_head": 1, "merged": num_heads, "heads": draw(st.sampled_from(divisors))}[layout]
    bias = draw(st.sampled_from([None, *BIASES]))
    if layout == "merged":  # one head as far as the library can tell, and (batch * heads, ...) biases
        batch, num_heads, num_kv_heads = batch * num_heads, 1, 1
        bias = "batch" if bias == "heads" else bias
    return Case(
        dtype=draw(st.sampled_from(DTYPES)),
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seq_len_q=seq_len_q,
        seq_len_k=seq_len_k,
        head_dim=draw(st.sampled_from([8, 16, 32, 40, 64])),
        layout=layout,
        groups=draw(st.sampled_from([1, 1, 2, 4])),
        causal=draw(st.booleans()),
        window_size=draw(st.sampled_from([None, None, (40, -1), (-1, 30), (17, 9), (130, 64)])),
        mask=draw(st.booleans()),
        bias=bias,
        distance_bias=draw(st.sampled_from([False, False, True])),
        alibi=draw(st.sampled_from([None, None, None, "heads", "batch"])),
        learned_scale=draw(st.sampled_from([False, True, "scalar"])),
        l2norm_qk=draw(st.sampled_from([True, True, False])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass(frozen=True)
class Hard(Case):
    """Inputs that strain what exponentials without a shift, and norms in float32, rest on."""

    kind: str = ""

    def make_tensors(self):
        tensors = super().make_tensors()
        q, k, v = (tensors[name] for name in "qkv")
        if self.learned_scale:
            tensors["scale"].fill_(self.scale / self.groups)
        if self.kind == "zero vectors":
            for tensor in (q, k, v):
                tensor[..., ::3, :] = 0
        elif self.kind == "duplicates":
            k[..., 1::2, :] = k[..., : k.shape[-2] // 2 * 2 : 2, :]
            rows = min(q.shape[-2], k.shape[-2]) // 2
            q[..., :rows, :] = k[..., :rows, :]
        elif self.kind == "equal keys":
            k.copy_(k[..., :1, :].expand_as(k).clone())
        elif self.kind == "opposite keys":  # cos = -1 everywhere
            group = q.shape[1] // k.shape[1]  # of heads that share keys
            k.copy_(-q[:, ::group, :1])
            q.copy_(-k[:, :, :1].repeat_interleave(group, 1))
        elif self.kind == "magnitudes":
            q.mul_(self.magnitudes("q"))
            k.mul_(self.magnitudes("k"))
        elif self.kind == "large values":
            v.mul_(2048)  # up to 1e4
        elif self.kind == "large bias":
            tensors["attn_bias"].add_(20)
        elif self.kind == "infinite bias":
            hidden = tensors["attn_bias"] > 0.5
            hidden[..., 3, :] = True  # a query that sees no key
            hidden[..., -1] = True  # a key that no query sees
            tensors["attn_bias"].masked_fill_(hidden, -torch.inf)
        elif self.kind == "negative bias":
            bias = tensors["attn_bias"]
            bias.masked_fill_(bias > 0.5, -1e4)
        else:
            assert self.kind in ("", "one visible key")
        return {name: tensor if name in WIDE else tensor.to(self.dtype).double() for name, tensor in tensors.items()}

    def magnitudes(self, name):
        """A factor for each row of q or k: around 1e-20, 1 and 1e20 where the dtype has such numbers."""
        exponents = (-6, 0, 5) if self.dtype == torch.float16 else (-66, 0, 66)
        num_rows = {"q": self.seq_len_q, "k": self.seq_len_k}[name]
        factors = torch.tensor([2.0**e for e in exponents], dtype=torch.float64, device=self.device)
        return factors[torch.arange(num_rows, device=self.device) % 3].unsqueeze(-1)

    def options(self):
        options = super().options()
        if self.kind == "one visible key":
            options["mask"] = torch.arange(self.seq_len_k, device=self.device).expand(self.batch, -1) == 65
        return options
