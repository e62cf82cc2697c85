"""Every back end against the specification in float64, over random shapes and all combinations of options.

"operators" is the path of backend="cuda" with the operators' CPU implementation in the place of the kernels.
"""

import functools
import itertools
import math
import os

import pytest
import torch
from hypothesis import given, settings
from support.cases import Case, cases
from support.gates import (
    BACKENDS,
    GATES,
    assert_within_gate,
    attend,
    backend_name,
    check,
    results,
    rms,
)
from support.operators import cu_seqlens
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    flash_cosine_sim_attention_varlen,
    plain_cosine_sim_attention,
    sdpa,
)


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
        {"causal": True, "window_size": (200, 0)},
        {"window_size": (511, 90), "mask": True, "num_kv_heads": 1, "seq_len_k": 700},
    ],
    ids=str,
)
def test_row_blocks(dtype, options):
    """Shapes that "sdpa" serves in several blocks of query rows, or with empty rows above a square."""
    check(Case(dtype=dtype, **{**BLOCKS, "num_kv_heads": 2, **options}), ["sdpa"])


WINDOWS = [(0, -1), (1, 0), (0, 0), (3, 5), (7, -1), (8, 0), (-1, 1), (-1, 7), (9, 16), (100, 3), (20, 100)]
WITH_WINDOWS = [
    {},
    {"mask": True, "num_kv_heads": 2},
    {"bias": "heads", "groups": 2},
    {"bias": "per_key", "mask": True, "learned_scale": True},
    {"num_kv_heads": 1, "l2norm_qk": False, "bias": "per_query"},
    {"layout": "merged", "num_heads": 1, "num_kv_heads": 1, "batch": 4},
]


@pytest.mark.parametrize("seq_len_q, seq_len_k", [(24, 24), (21, 33), (33, 17), (1, 19), (19, 1)])
@pytest.mark.parametrize("options", WITH_WINDOWS, ids=str)
@pytest.mark.parametrize("return_partials", [False, True])
def test_windows_at_the_edges_of_blocks(monkeypatch, seq_len_q, seq_len_k, options, return_partials):
    """Exactly, in float64, of "sdpa" in blocks of eight rows and of the operators."""
    monkeypatch.setattr(sdpa, "ROWS_PER_BLOCK", 8)
    sizes = {"seq_len_q": seq_len_q, "seq_len_k": seq_len_k, "head_dim": 8, "dtype": torch.float64}
    case = Case(**sizes, **options)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    seen = False
    for window_size, causal in itertools.product(WINDOWS, (False, True)):
        chosen = case.options() | {"window_size": window_size, "causal": causal, "return_partials": return_partials}
        found = {}
        for backend in BACKENDS:
            results = attend(backend, **tensors, **chosen)
            results = results if return_partials else (results,)
            loss = sum((part * torch.linspace(0, 1, part.numel()).view_as(part)).sum() for part in results)
            found[backend] = *results, *torch.autograd.grad(loss, list(tensors.values()))
        expected = found.pop("reference")
        seen |= expected[0].any().item()
        for results in found.values():
            torch.testing.assert_close(results, expected)
    assert seen


@pytest.mark.parametrize("causal", [False, True])
def test_windows_of_sdpa_leave_out_the_keys_beside_them(monkeypatch, causal):
    """No block of rows gets more keys than its rows can see, on either side."""
    shapes = []

    def attend(q, k, v, **options):
        shapes.append((q.shape[-2], k.shape[-2]))
        return attention(q, k, v, **options)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    q, k, v = torch.randn(3, 1, 1, 2048, 8).unbind(0)
    flash_cosine_sim_attention(q, k, v, causal=causal, window_size=(100, 40), backend="sdpa")
    right = 0 if causal else 40
    assert shapes == [(512, 512 + right), (512, 612 + right), (512, 612 + right), (512, 612)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"mask": True}, {"bias": "full"}, {"window_size": (90, 40), "mask": True}], ids=str
)
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
    Case(seq_len_q=530, seq_len_k=520, batch=1, num_heads=1, num_kv_heads=1, window_size=(30, 5), mask=True),
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


@pytest.mark.slow
def test_compile_with_changing_sizes_and_scales():
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True, backend="aot_eager")
    for seq_len, scale in ((9, 8), (10, 8.0), (11, 8.5), (600, 9.5), (12, 10)):
        q, k, v = (torch.randn(1, 2, seq_len, 16) for _ in range(3))
        o = compiled(q, k, v, scale=scale, causal=True)
        torch.testing.assert_close(o, flash_cosine_sim_attention(q, k, v, scale=scale, causal=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "operators"])
def test_compile_a_window_with_changing_sizes(backend):
    """One graph for all lengths that the window is shorter than, after that of the first."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    with backend_name(backend) as name:
        compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True, backend=counter)
        for seq_len in (9, 10, 30):
            q, k, v = (torch.randn(1, 2, seq_len, 16, requires_grad=True) for _ in range(3))
            options = {"causal": True, "window_size": (4, 0), "backend": name}
            results = [attention(q, k, v, **options) for attention in (compiled, flash_cosine_sim_attention)]
            torch.testing.assert_close(*results)
            torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in results))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_packed_sequences_with_changing_sizes(monkeypatch, backend):
    monkeypatch.setattr(sdpa, "ROWS_PER_BLOCK", 8)
    torch._dynamo.reset()
    torch.manual_seed(0)
    with backend_name(backend) as name:
        compiled = torch.compile(flash_cosine_sim_attention_varlen, fullgraph=True, backend="aot_eager")
        for lengths in ([4, 5], [6, 0, 3, 2]):
            shape = sum(lengths) + 2, 2, 16
            q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
            bounds = cu_seqlens(lengths), cu_seqlens(lengths[::-1]), max(lengths), max(lengths)
            options = {"causal": True, "window_size": (3, 0), "backend": name}
            results = [attend(q, k, v, *bounds, **options) for attend in (compiled, flash_cosine_sim_attention_varlen)]
            torch.testing.assert_close(*results)
            torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in results))


@pytest.mark.slow
def test_compile_inductor():
    torch._dynamo.reset()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 33, 16) for _ in range(3))
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), flash_cosine_sim_attention(q, k, v))


@pytest.mark.parametrize("backend", ["reference", "operators"])
def test_export_a_window_of_any_length(backend):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_cosine_sim_attention(q, k, v, causal=True, window_size=(6, 0), backend=name)

    with backend_name(backend) as name:
        example = torch.randn(3, 1, 2, 9, 16).unbind(0)
        shapes = dict.fromkeys("qkv", {2: torch.export.Dim("seq_len", min=2, max=4096)})
        program = torch.export.export(Attention(), example, dynamic_shapes=shapes).module()
        for seq_len in (3, 9, 50):
            tensors = torch.randn(3, 1, 2, seq_len, 16).unbind(0)
            torch.testing.assert_close(program(*tensors), Attention()(*tensors))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # SDPA has no batching rule
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_of_windows_and_packed_sequences(backend):
    bounds = cu_seqlens([2, 4]), cu_seqlens([3, 3]), 4, 3
    with backend_name(backend) as name:
        options = {"causal": True, "window_size": (2, 0), "backend": name}
        for attend, shape in (
            (lambda *t: flash_cosine_sim_attention(*t, **options), (3, 1, 2, 6, 8)),
            (lambda *t: flash_cosine_sim_attention_varlen(*t, *bounds, **options), (3, 6, 2, 8)),
        ):
            tensors = [torch.randn(shape) for _ in range(3)]
            expected = torch.stack([attend(*one) for one in zip(*tensors, strict=True)])
            torch.testing.assert_close(torch.vmap(attend)(*tensors), expected)


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
    "seq_len_q, use_mask, use_bias, window",
    [(8192, True, False, None), (8000, False, False, None), (8000, True, True, None), (8192, False, True, 300)],
)
def test_sdpa_memory_is_linear(seq_len_q, use_mask, use_bias, window):
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
            window_size = None if window is None else (window, 0)
            o = flash_cosine_sim_attention(q, k, v, mask, bias, causal=True, window_size=window_size, backend="sdpa")
        o.sum().backward()
    assert largest.numel <= 512 * (seq_len_k if window is None else 512 + window)  # one block of rows
    assert sum(saved.values()) <= 100 * q.nbytes


LOST = {  # where NaN is put: rows of q, and of k
    "a row of q": ([(0, 1, -1)], []),
    "a channel of q": ([(0, 1, -1, 3)], []),
    "q and k": ([...], [...]),
    "the first key": ([], [(0, 0, 0)]),
    "every key": ([], [...]),
}


@pytest.mark.parametrize(
    ("masked", "seq_len_k", "wanted", "allowed"),
    [
        (True, 192, True, False), (True, 200, True, False), (True, 256, True, True), (True, 192, False, True),
        (False, 192, True, True),
    ],
)  # fmt: skip
def test_sdpa_leaves_cudnn_out_where_it_may_return_nan(masked, seq_len_k, wanted, allowed):
    """test_library_gpu.py has the gradients; a bias alone that wants one is enough."""
    with FakeTensorMode():
        q, k = (torch.empty(1, 2, n, 64, device="cuda", dtype=torch.bfloat16) for n in (40, seq_len_k))
        mask = torch.empty(40, seq_len_k, device="cuda", dtype=q.dtype, requires_grad=wanted) if masked else None
        q.requires_grad_(wanted and not masked)
        with sdpa._kernels_to_trust(q, k, k, mask):
            assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
            assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


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
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64).unbind(0)
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


IN_BLOCKS = [
    {"window_size": (40, 10)},
    {"attn_bias": torch.linspace(-1, 1, 600 * 600, dtype=torch.float64).view(600, 600).sin()},
    {"mask": (torch.arange(600) % 7 > 0)[None], "causal": True},
    {"alibi_slopes": torch.tensor([0.5, 0.1]), "causal": True},
]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # SDPA has no batching rule
@pytest.mark.parametrize("options", IN_BLOCKS, ids=lambda options: " ".join(options))
@pytest.mark.parametrize("name", ["grad", "vjp", "jacrev", "vmap of grad"])
def test_sdpa_in_blocks_under_torch_func(name, options):
    """Which has no hooks of saved tensors, so that no block is computed again there."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 600, 8, dtype=torch.float64).unbind(0)
    found, expected = (
        derivatives(lambda q, b=b: flash_cosine_sim_attention(q, k, v, **options, backend=b))[name](q)
        for b in ("sdpa", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_sdpa_in_blocks_under_torch_func_compiled():
    """Each is computed again where torch.func is not there, and only there."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 600, 8, dtype=torch.float64).unbind(0)

    def loss(q, k, v, backend="sdpa"):
        return flash_cosine_sim_attention(q, k, v, window_size=(40, 10), backend=backend).square().sum()

    def attend(q, k, v):
        return torch.func.grad(loss, (0, 1, 2))(q, k, v)

    expected = torch.func.grad(lambda *x: loss(*x, backend="reference"), (0, 1, 2))(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    recorded = []
    for function, tensors, again in ((attend, [x.detach() for x in leaves], 0), (loss, leaves, 2)):
        backend = EagerAndRecordGraphs()
        found = torch.compile(function, fullgraph=True, backend=backend)(*tensors)
        recorded.append(found if function is attend else torch.autograd.grad(found, leaves))
        (graph,) = backend.graphs
        assert sum("checkpoint" in str(node.target) for node in graph.graph.nodes) == again
    for gradients in recorded:
        torch.testing.assert_close(gradients, expected)


def test_sdpa_keeps_the_double_backward_of_pytorchs_own_formula():
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64).unbind(0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        ours = derivatives(lambda q: flash_cosine_sim_attention(q, k, v, backend="sdpa"))["double backward"](q)
    theirs = derivatives(lambda q: plain_cosine_sim_attention(q, k, v))["double backward"](q)
    torch.testing.assert_close(ours, theirs)
