"""Every back end against the specification in float64, over random shapes and all combinations of options.

"operators" is the path of backend="cuda" with the operators' CPU implementation in the place of the kernels.
"""

import functools
import itertools
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flash_cosine_sim_attention.interface as interface
from flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    l2norm_tensors,
    plain_cosine_sim_attention,
)
from flash_cosine_sim_attention.reference import compute_dtype

BACKENDS = ["sdpa", "reference", "operators"]
# The library's accuracy gates for o, as relative RMS against float64 on the same rounded inputs.
GATES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
BIASES = ["heads", "batch", "full", "shared", "per_key", "per_query", "plane", "number"]
MAX_SCORES = 2_500_000  # per case: a float64 forward and backward of that many takes a fraction of a second


@contextmanager
def backend_name(backend):
    """The name to pass as backend=."""
    if backend != "operators":
        yield backend
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "_require_cuda", lambda _: None)
        yield "cuda"


def attend(backend, *args, **kwargs):
    with backend_name(backend) as name:
        return flash_cosine_sim_attention(*args, backend=name, **kwargs)


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
    mask: bool = False
    bias: str | None = None  # a key of bias_shape
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
        return {name: tensor.to(wide if name == "scale" else dtype) for name, tensor in self.make_tensors().items()}

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
        return tensors

    def generator(self, offset):
        """A generator of its own for each `offset`, on the case's device: there, nothing waits for a copy."""
        return torch.Generator(self.device).manual_seed(self.seed + offset)

    def options(self):
        options = {
            "groups": self.groups,
            "causal": self.causal,
            "l2norm_qk": self.l2norm_qk,
            "attn_bias_batch_dim": self.bias == "batch",
        }
        if not self.learned_scale:
            options["scale"] = self.scale / self.groups
        if self.mask:
            batch = self.batch * self.num_heads if self.layout == "merged" else self.batch
            mask = torch.rand(batch, self.seq_len_k, generator=self.generator(1), device=self.device) < 0.7
            mask[:, :2] = True  # two keys: with one, gradients are 0 and nothing is left to compare with
            mask[1:2] = False  # a whole batch element without a visible key
            options["mask"] = mask
        return options


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
        dtype=draw(st.sampled_from(list(GATES))),
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seq_len_q=seq_len_q,
        seq_len_k=seq_len_k,
        head_dim=draw(st.sampled_from([8, 16, 32, 40, 64])),
        layout=layout,
        groups=draw(st.sampled_from([1, 1, 2, 4])),
        causal=draw(st.booleans()),
        mask=draw(st.booleans()),
        bias=bias,
        learned_scale=draw(st.sampled_from([False, True, "scalar"])),
        l2norm_qk=draw(st.sampled_from([True, True, False])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def low_precision_attention(q, k, v, mask=None, attn_bias=None, scale=8, groups=1, causal=False,
                            l2norm_qk=True, attn_bias_batch_dim=False):  # fmt: skip
    """What one writes without a library, every operation rounded to the inputs' dtype: the tolerance."""
    merged = q.ndim == 3
    q, k, v = (tensor.unsqueeze(1) if tensor.ndim == 3 else tensor for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    if l2norm_qk:
        q, k = (F.normalize(t.unflatten(-1, (groups, -1)), dim=-1).flatten(-2) for t in (q, k))
    sim = q @ k.mT * (scale.to(q.dtype).view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale)
    if attn_bias is not None:
        dim = 1 if attn_bias_batch_dim or merged else 0
        sim = sim + (attn_bias.unsqueeze(dim) if attn_bias.ndim == 3 else attn_bias)
    visible = torch.ones(sim.shape[-2:], dtype=torch.bool, device=q.device)
    visible = visible.tril(sim.shape[-1] - sim.shape[-2]) if causal else visible
    visible = visible if mask is None else visible & mask[:, None, None, :]
    weights = sim.masked_fill(~visible, torch.finfo(sim.dtype).min).softmax(-1)
    o = weights.masked_fill(~visible, 0) @ v
    return o.squeeze(1) if merged else o


def results(function, case, dtype):
    """Return o and the gradients of all tensors, by name, in float64."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors(dtype).items()}
    o = function(**tensors, **case.options())
    assert o.dtype == dtype and o.shape == tensors["q"].shape
    do = torch.randn(o.shape, generator=case.generator(2), device=case.device).to(case.dtype)
    o.backward(do.to(dtype))
    for name, tensor in tensors.items():
        assert tensor.grad.dtype == tensor.dtype and tensor.grad.shape == tensor.shape, name
    return {"o": o.detach().double()} | {"d" + name: t.grad.double() for name, t in tensors.items()}


def rms(tensor):
    return tensor.square().mean().sqrt().item()


def cancelling(case, name, o):
    """Size of delta = rowsum(dO * O) in a gradient that holds P * (dP - delta), for dO of unit variance.

    Flash-style backward passes take delta from the rounded o, plain ones from P and dP themselves: where a row
    is all but one-hot, the difference is not small beside the gradient.
    """
    if name in ("o", "dv"):
        return 0.0
    seen = o[o != 0]  # where most rows see no key, the others' gradients are no smaller for it
    delta = case.head_dim**0.5 * rms(seen) if seen.numel() else 0.0
    if name == "dscale":
        return delta * (case.batch * case.seq_len_q) ** 0.5  # a sum over rows, of errors of random sign
    if name == "dattn_bias":
        num_scores = case.batch * case.num_heads * case.seq_len_q * case.seq_len_k
        return delta * (num_scores / math.prod(case.bias_shape())) ** 0.5
    norm = case.head_dim**0.5 if case.l2norm_qk else 1.0
    return abs(case.scale) * delta * case.head_dim**-0.5 / norm  # scale * dS k^ / |q|, element by element


def rounding(case):
    """The rounding of a result, and in float32 that of a logit (16 with its bias), which exp makes relative."""
    return torch.finfo(case.dtype).eps + (max(10, abs(case.scale)) + 6) * torch.finfo(torch.float32).eps


def assert_within_gate(case, backend, exact, sdpa, ours, slack=0.0, largest=2):
    """The contract: relative RMS at most 1.0 times, and the largest error at most 2 times, that of "sdpa".

    On top comes a tenth of a rounding of the result and of what cancels in it (in float32, of a logit up to
    16), as both errors are random; and a whole one for a single row of scores, three for a single number, for
    their averages are all but equal only over many. dq in bfloat16 usually has an error of 0.4 %, and the term is
    0.1 %. `slack` is added to it, for inputs that are not random.
    """
    num_rows = case.batch * case.num_heads * min(case.seq_len_q, case.seq_len_k)
    for name, expected in exact.items():
        chance = rounding(case) * (0.1 + max(num_rows**-0.5, 3 * expected.numel() ** -0.5)) + slack
        cancelled = cancelling(case, name, exact["o"])
        error, sdpa_error = (result[name] - expected for result in (ours, sdpa))
        limit = rms(sdpa_error) + chance * (rms(expected) + cancelled)
        assert rms(error) <= limit, (backend, name, rms(error), limit)
        limit = largest * sdpa_error.abs().max() + chance * (expected.abs().max() + 4 * cancelled)
        assert error.abs().max() <= limit, (backend, name, error.abs().max(), limit)


def assert_near_plain(case, backend, exact, plain, ours):
    """Twice plain PyTorch's own error, and one rounding of the result and of what cancels in it."""
    for name, expected in exact.items():
        assert ours[name].isfinite().all(), (backend, name)
        error, plain_error = rms(ours[name] - expected), rms(plain[name] - expected)
        limit = 2 * plain_error + rounding(case) * (rms(expected) + cancelling(case, name, exact["o"]))
        assert error <= limit, (backend, name, error, limit)


def check(case, backends=BACKENDS):
    exact = results(plain_cosine_sim_attention, case, torch.float64)
    plain = results(low_precision_attention, case, case.dtype)
    sdpa = results(lambda *a, **kw: attend("sdpa", *a, **kw), case, case.dtype)
    for backend in backends:
        ours = sdpa
        if backend != "sdpa":
            ours = results(lambda *a, backend=backend, **kw: attend(backend, *a, **kw), case, case.dtype)
            assert_within_gate(case, backend, exact, sdpa, ours)
        assert_near_plain(case, backend, exact, plain, ours)
        # The gate is for the usual head_dim and scale (shorter vectors have larger cosines) and is a statistic.
        if case.head_dim >= 64 and abs(case.scale) <= 10 and exact["o"].numel() >= 4096:
            error = rms(ours["o"] - exact["o"]) / rms(exact["o"])
            assert error <= GATES[case.dtype], (backend, error)


@pytest.mark.slow
@given(cases())
@settings(max_examples=60, deadline=None, derandomize="RANDOM_CASES" not in os.environ, print_blob=True)
def test_forward_and_gradients(case):
    check(case)


@functools.cache
def right_results():
    """A case, and what the specification, PyTorch and the operators make of it: within the gate."""
    case = Case(dtype=torch.bfloat16, seq_len_q=256, seq_len_k=256, head_dim=64, causal=True)
    exact = results(plain_cosine_sim_attention, case, torch.float64)
    sdpa, ours = (results(lambda *a, b=b, **kw: attend(b, *a, **kw), case, case.dtype) for b in ("sdpa", "operators"))
    assert_within_gate(case, "operators", exact, sdpa, ours)
    return case, exact, sdpa, ours


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
@pytest.mark.parametrize("kind", ["noise", "outlier"])
def test_the_gate_catches_small_errors(name, kind):
    """1.5 % of noise, or one element off by a tenth of the largest, in bfloat16."""
    case, exact, sdpa, ours = right_results()
    wrong = ours[name].clone()
    if kind == "noise":
        wrong *= 1 + 0.015 * torch.randn(wrong.shape, generator=torch.Generator().manual_seed(0))
    else:
        wrong.view(-1)[1000] += 0.1 * wrong.abs().max()
    with pytest.raises(AssertionError, match=f"'{name}'"):
        assert_within_gate(case, "operators", exact, sdpa, ours | {name: wrong})


BLOCKS = {"batch": 1, "num_heads": 2, "seq_len_q": 1029, "seq_len_k": 1030}


@pytest.mark.parametrize("dtype", list(GATES))
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "mask": True},
        {"causal": True, "mask": True, "num_kv_heads": 1, "batch": 2},
        {"bias": "heads", "mask": True, "batch": 2},
        {"bias": "per_key", "causal": True},
        {"causal": True, "seq_len_q": 1030, "seq_len_k": 515, "mask": True},
        {"causal": True, "seq_len_q": 700, "seq_len_k": 300, "num_kv_heads": 1},
        {"causal": True, "bias": "shared", "learned_scale": True, "groups": 2},
    ],
    ids=str,
)
def test_row_blocks(dtype, options):
    """Shapes that "sdpa" serves in several blocks of query rows, or with empty rows above a square."""
    check(Case(dtype=dtype, **{**BLOCKS, "num_kv_heads": 2, **options}), ["sdpa"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"causal": True}, {"mask": True}, {"bias": "full"}], ids=str)
def test_partials(backend, options):
    case = Case(num_kv_heads=2, seq_len_q=530, seq_len_k=525, learned_scale=True, **options)

    def quotient(function):
        def run(**arguments):
            numerator, denominator = function(**arguments, return_partials=True)
            return numerator / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)

        return run

    exact = results(plain_cosine_sim_attention, case, torch.float64)
    ours = results(quotient(lambda **kwargs: attend(backend, **kwargs)), case, case.dtype)
    for name, expected in exact.items():
        assert rms(ours[name] - expected) <= 1e-5 * rms(expected), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 19, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(4, 19, 19, requires_grad=True)
    scale = torch.full((4,), 8.0, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attend(backend, q, k, v, None, bias, scale)
        cast = attend(backend, *(t.bfloat16() for t in (q, k, v)), None, bias.bfloat16(), scale)
        double = attend("sdpa", q.double(), k.double(), v.double())
    assert o.dtype == torch.bfloat16 and torch.equal(o, cast) and double.dtype == torch.float64
    o.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (q, k, v, bias, scale))
    exact = plain_cosine_sim_attention(q.double(), k.double(), v.double(), None, bias, scale)
    # The inputs are rounded as well here: half an eps each for q, k, v and the bias.
    assert rms(o.double() - exact) <= 2 * GATES[torch.bfloat16] * rms(exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_bitwise_repeatable(backend, deterministic, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(deterministic)
    case = Case(dtype=torch.bfloat16, num_kv_heads=2, seq_len_q=70, causal=True, mask=True, bias="heads")
    first = results(lambda **kwargs: attend(backend, **kwargs), case, case.dtype)
    for _ in range(30):
        again = results(lambda **kwargs: attend(backend, **kwargs), case, case.dtype)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, use_reentrant):
    # Masked and causal, "sdpa" runs in blocks of rows, each with a checkpoint of its own inside this one.
    shape = {"batch": 1, "num_heads": 1, "num_kv_heads": 1, "seq_len_q": 1100, "seq_len_k": 1100}
    case = Case(**shape, mask=True, causal=True)

    def checkpointed(q, k, v, **options):
        return checkpoint(lambda *x: attend(backend, *x, **options), q, k, v, use_reentrant=use_reentrant)

    direct = results(lambda **kwargs: attend(backend, **kwargs), case, case.dtype)
    recomputed = results(checkpointed, case, case.dtype)
    assert all(torch.equal(direct[name], recomputed[name]) for name in direct)


COMPILED = [
    Case(causal=True, learned_scale=True, num_kv_heads=2),
    Case(seq_len_q=530, batch=1, num_heads=1, num_kv_heads=1, causal=True, mask=True, bias="heads"),
    Case(layout="merged", num_heads=1, num_kv_heads=1, mask=True, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compile_fullgraph(backend, case):
    torch._dynamo.reset()
    with backend_name(backend) as name:
        compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True, backend="aot_eager")
        ours = results(lambda **kwargs: compiled(**kwargs, backend=name), case, case.dtype)
        eager = results(lambda **kwargs: attend(backend, **kwargs), case, case.dtype)
    for name, expected in eager.items():
        assert rms(ours[name] - expected) <= torch.finfo(case.dtype).eps * rms(expected), name


def test_compile_with_changing_sizes_and_scales():
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True, backend="aot_eager")
    for seq_len, scale in ((9, 8), (10, 8.0), (11, 8.5), (600, 9.5), (12, 10)):
        q, k, v = (torch.randn(1, 2, seq_len, 16) for _ in range(3))
        o = compiled(q, k, v, scale=scale, causal=True)
        torch.testing.assert_close(o, flash_cosine_sim_attention(q, k, v, scale=scale, causal=True))


@pytest.mark.slow
def test_compile_inductor():
    torch._dynamo.reset()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 33, 16) for _ in range(3))
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), flash_cosine_sim_attention(q, k, v))


class LargestTensor(TorchDispatchMode):
    """Record the largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(output, torch.Tensor):
                # An expanded view has many elements and little memory.
                self.numel = max(self.numel, output.untyped_storage().nbytes() // output.element_size())
        return outputs


@pytest.mark.parametrize(
    "seq_len_q, use_mask, use_bias", [(8192, True, False), (8000, False, False), (8000, True, True)]
)
def test_sdpa_memory_is_linear(seq_len_q, use_mask, use_bias):
    """Nothing of seq_len_q x seq_len_k is made, forward or backward, nor are blocks kept in between."""
    seq_len_k = 8192
    q = torch.randn(1, 1, seq_len_q, 8, requires_grad=True)
    k, v = (torch.randn(1, 1, seq_len_k, 8, requires_grad=True) for _ in range(2))
    mask = torch.rand(1, seq_len_k) < 0.9 if use_mask else None
    # As small as a bias gets: a bias of seq_len_q x seq_len_k and its gradient would take that anyway.
    bias = torch.randn(1, 1, 1, seq_len_k, requires_grad=True) if use_bias else None
    saved = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            o = flash_cosine_sim_attention(q, k, v, mask, bias, causal=True, backend="sdpa")
        o.sum().backward()
    assert largest.numel <= 512 * seq_len_k  # one block of rows
    assert sum(saved.values()) <= 100 * q.nbytes


LOST = {  # where NaN is put: rows of q, and of k
    "a row of q": ([(0, 1, -1)], []),
    "a channel of q": ([(0, 1, -1, 3)], []),
    "q and k": ([...], [...]),
    "the first key": ([], [(0, 0, 0)]),
    "every key": ([], [...]),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sdpa_loses_no_nan(lost, dtype):
    """The CPU kernel makes zeros of a row whose logits are all NaN, where it has few keys."""
    for seq_len, num_kv_heads, causal, l2norm_qk, mask in itertools.product(
        (1, 2, 9, 40), (2, 4), (False, True), (False, True), (None, "ones", "half")
    ):
        q = torch.randn(2, 4, seq_len, 16, dtype=dtype)
        k, v = (torch.randn(2, num_kv_heads, seq_len, 16, dtype=dtype) for _ in range(2))
        for tensor, places in zip((q, k), LOST[lost], strict=True):
            for place in places:
                tensor[place] = math.nan
        visible = torch.ones(2, seq_len, dtype=torch.bool)
        if mask == "half":
            visible[:, (seq_len + 1) // 2 :] = False
        options = {"scale": 1, "causal": causal, "l2norm_qk": l2norm_qk, "mask": None if mask is None else visible}
        o, expected = (
            flash_cosine_sim_attention(q, k, v, backend=backend, **options).isnan().any(-1)
            for backend in ("sdpa", "reference")
        )
        assert torch.equal(o, expected), (seq_len, num_kv_heads, options)
        assert expected.any()


def test_sdpa_loses_no_nan_compiled():
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 2, 9, 16).unbind(0)
    q[0, 0, 4] = math.nan
    attend = torch.compile(flash_cosine_sim_attention, fullgraph=True, backend="aot_eager")
    lost = attend(q, k, v, causal=True, backend="sdpa").isnan().any(-1)
    assert lost.nonzero().tolist() == [[0, 0, 4]]


def derivatives(attend):
    """Each of torch.func and each beyond the first order, of a sum over attend(q)."""

    def loss(q):
        return attend(q).square().sum()

    def double(q):
        q = q.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(q), q, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), q)[0]

    func = torch.func
    return {
        "double backward": double,
        "grad": func.grad(loss),
        "vjp": lambda q: func.vjp(loss, q)[1](torch.ones(()))[0],
        "jacrev": func.jacrev(lambda q: attend(q).sum((1, 2, 3))),
        "vmap": lambda q: func.vmap(attend)(q[None])[0],
        "vmap of grad": lambda q: func.vmap(func.grad(loss))(q[None])[0],
        "grad of grad": func.grad(lambda q: func.grad(loss)(q).square().sum()),
        "jvp": lambda q: func.jvp(loss, (q,), (q,))[1],
        "jacfwd": func.jacfwd(lambda q: attend(q).sum((1, 2, 3))),
        "hessian": lambda q: func.hessian(loss)(q).sum(),
    }


BEYOND_SDPA = {
    "double backward": "no double backward",
    "grad of grad": "no double backward",
    "jvp": "no forward-mode derivative",
    "jacfwd": "no forward-mode derivative",
    "hessian": "no forward-mode derivative",
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # SDPA has no batching rule
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", derivatives(lambda q: q))
def test_sdpa_differentiates_like_the_reference_or_names_it(name, mask):
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    key_mask = torch.tensor([[True, True, False, True, True]]) if mask else None

    def of(backend):
        def attend(q):
            return flash_cosine_sim_attention(q, k, v, key_mask, causal=True, backend=backend)

        return derivatives(attend)[name]

    expected = of("reference")(q)
    if name not in BEYOND_SDPA:
        torch.testing.assert_close(of("sdpa")(q), expected)
        return
    with pytest.raises(RuntimeError, match=f"{BEYOND_SDPA[name]}.*; use backend='reference'"):
        of("sdpa")(q)


def test_sdpa_keeps_the_double_backward_of_pytorchs_own_formula():
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64).unbind(0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        ours = derivatives(lambda q: flash_cosine_sim_attention(q, k, v, backend="sdpa"))["double backward"](q)
    theirs = derivatives(lambda q: plain_cosine_sim_attention(q, k, v))["double backward"](q)
    torch.testing.assert_close(ours, theirs)
