"""PyTorch's CUDA kernels under backend="sdpa", against the specification in float64 on the same GPU.

What holds for backend="cuda" in the same words is tested here for both; test_kernels.py has the rest.
"""

import pytest
import torch
from support.cases import Case
from support.gates import check, results, rms

from flash_cosine_sim_attention import flash_cosine_sim_attention, ops, plain_cosine_sim_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; PyTorch sees none"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    {"seq_len_q": 33, "seq_len_k": 47, "head_dim": 64},
    {"seq_len_q": 129, "seq_len_k": 129, "head_dim": 24},
    {"seq_len_q": 1029, "seq_len_k": 1030, "head_dim": 128},
    {"seq_len_q": 641, "seq_len_k": 255, "head_dim": 64},
]
OPTIONS = [
    {},
    {"causal": True},
    {"mask": True},
    {"causal": True, "mask": True},
    {"bias": "heads"},
    {"bias": "batch", "mask": True},
    {"bias": "shared", "causal": True, "learned_scale": True},
    {"bias": "per_key", "causal": True, "mask": True},
    {"bias": "full", "strided": True, "groups": 2},
    {"causal": True, "l2norm_qk": False, "strided": True},
    {"layout": "merged", "num_heads": 1, "num_kv_heads": 1, "batch": 6, "mask": True, "bias": "batch"},
]
KV_HEADS = [{"num_kv_heads": 4}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "layout": "single_head"}]


@pytest.fixture(autouse=True)
def full_float32():
    torch.backends.cuda.matmul.allow_tf32 = False  # no monkeypatch: newer ones delete what __getattr__ gave
    torch.manual_seed(0)


@pytest.fixture(params=["sdpa", "cuda"])
def backend(request):
    if request.param == "cuda" and not ops.kernels_available():
        pytest.skip(f"needs the CUDA kernels: {ops.kernels_error()}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(dtype, shape, options):
    check(Case(**{"dtype": dtype, "device": "cuda", **shape, **options}), ["sdpa"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", KV_HEADS, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_shared_kv_heads(dtype, kv_heads, options):
    check(Case(**{"dtype": dtype, "device": "cuda", **SHAPES[2], **kv_heads, **options}), ["sdpa"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 96, 200, 256])
def test_head_dims(dtype, head_dim):
    for options in ({"causal": True}, {"bias": "heads", "mask": True}):
        check(Case(dtype=dtype, device="cuda", head_dim=head_dim, **options), ["sdpa"])


@pytest.mark.parametrize("options", [{"causal": True}, {"mask": True}, {"bias": "heads"}], ids=str)
def test_partials(options, backend):
    case = Case(device="cuda", seq_len_q=530, seq_len_k=525, num_kv_heads=2, learned_scale=True, **options)

    def quotient(**arguments):
        result = flash_cosine_sim_attention(**arguments, backend=backend, return_partials=True)
        numerator, denominator = result
        return numerator / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)

    exact = results(plain_cosine_sim_attention, case, torch.float64)
    ours = results(quotient, case, case.dtype)
    for name, expected in exact.items():
        assert rms(ours[name] - expected) <= 1e-5 * rms(expected), name


SEQ_LEN, NUM_HEADS = 8192, 16
MEMORY_CASES = [
    {"causal": True, "mask": True},
    {"causal": True, "mask": True, "num_kv_heads": 2},
    {"causal": True, "num_kv_heads": 2},
    {"causal": True, "seq_len_q": 8000},
    {"mask": True, "num_kv_heads": 2},
    {"bias": "shared"},
    {"bias": "shared", "causal": True, "num_kv_heads": 2},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", MEMORY_CASES, ids=str)
def test_scores_are_not_materialised(dtype, options, backend):
    """Forward and backward stay below half of one score matrix; materialising takes several of them."""
    case = {"num_kv_heads": NUM_HEADS, "seq_len_q": SEQ_LEN, "mask": False, "bias": None, **options}
    heads_and_lengths = (NUM_HEADS, case["seq_len_q"]), *[(case["num_kv_heads"], SEQ_LEN)] * 2
    q, k, v = (
        torch.randn(1, heads, seq_len, 64, device="cuda", dtype=dtype, requires_grad=True)
        for heads, seq_len in heads_and_lengths
    )
    mask = torch.rand(1, SEQ_LEN, device="cuda") < 0.9 if case["mask"] else None
    attn_bias = None
    if case["bias"]:
        bias_shape = (1, 1, SEQ_LEN, SEQ_LEN)
        attn_bias = torch.randn(bias_shape, device="cuda", dtype=dtype, requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = flash_cosine_sim_attention(q, k, v, mask, attn_bias, causal=case.get("causal", False), backend=backend)
    o.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    scores = NUM_HEADS * SEQ_LEN * SEQ_LEN * q.element_size()
    print(f"peak {peak / 2**20:.0f} MiB, one score matrix {scores / 2**20:.0f} MiB")
    assert peak < scores / 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"causal": True}, {"bias": "heads", "causal": True, "mask": True}], ids=str)
def test_compile_inductor(options, backend):
    torch._dynamo.reset()
    case = Case(dtype=torch.bfloat16, device="cuda", seq_len_q=600, seq_len_k=600, head_dim=64, **options)
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True)
    ours = results(lambda **kwargs: compiled(**kwargs, backend=backend), case, case.dtype)
    eager = results(lambda **kwargs: flash_cosine_sim_attention(**kwargs, backend=backend), case, case.dtype)
    exact = results(plain_cosine_sim_attention, case, torch.float64)
    for name, expected in exact.items():
        # Fusion rounds less often than eager mode, or elsewhere.
        limit = 1.5 * rms(eager[name] - expected) + torch.finfo(case.dtype).eps * rms(expected)
        assert rms(ours[name] - expected) <= limit, name


@pytest.mark.parametrize("backend", ["sdpa", "reference", "cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, backend):
    q, k, v = (torch.randn(2, 4, 77, 64, device="cuda", requires_grad=True) for _ in range(3))
    bias = torch.randn(4, 77, 77, device="cuda", requires_grad=True)
    scale = torch.full((4,), 8.0, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=dtype):
        o = flash_cosine_sim_attention(q, k, v, None, bias, scale, backend=backend)
    assert o.dtype == dtype
    low = (tensor.to(dtype) for tensor in (q, k, v))
    cast = flash_cosine_sim_attention(*low, None, bias.to(dtype), scale, backend=backend)
    assert torch.equal(o, cast)
    o.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (q, k, v, bias, scale))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("seq_len_k", [192, 200, 256, 704])
def test_logits_that_are_all_low_have_gradients(seq_len_k, masked, compiled):
    """-200 everywhere changes nothing, whichever kernel PyTorch prefers: cuDNN's returns NaN at 192 and 704 keys."""
    q, k, v, do = (torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16) for n in (70, *[seq_len_k] * 2, 70))
    mask = torch.rand(2, seq_len_k, device="cuda") < 0.7 if masked else None
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]

    def gradients(value):
        bias = torch.full((4, 70, seq_len_k), value, device="cuda", dtype=q.dtype)
        o = flash_cosine_sim_attention(q, k, v, mask, bias, backend="sdpa")
        return (o, *torch.autograd.grad(o, tensors, do))

    wanted = gradients(0.0)
    found = torch.compile(gradients, dynamic=False)(-200.0) if compiled else gradients(-200.0)
    for one, other in zip(found, wanted, strict=True):
        assert rms(one.double() - other.double()) <= 0.02 * rms(other.double())


@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_never_waits_for_the_gpu(options):
    case = Case(dtype=torch.bfloat16, device="cuda", seq_len_q=600, seq_len_k=600, learned_scale=True, **options)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(case.dtype).items()}
    arguments = {**tensors, **case.options(), "backend": "sdpa"}
    do = torch.randn_like(tensors["q"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_cosine_sim_attention(**arguments).backward(do)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "mask": True}], ids=str)
def test_cuda_graph(options):
    case = Case(dtype=torch.bfloat16, device="cuda", seq_len_q=600, seq_len_k=600, **options)
    q, k, v = case.tensors(case.dtype).values()
    arguments = {**case.options(), "backend": "sdpa"}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        flash_cosine_sim_attention(q, k, v, **arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = flash_cosine_sim_attention(q, k, v, **arguments)
    v.mul_(2)
    graph.replay()
    torch.testing.assert_close(o, flash_cosine_sim_attention(q, k, v, **arguments))


def test_tensors_on_two_devices_are_refused():
    q = torch.randn(1, 2, 5, 16, device="cuda")
    with pytest.raises(ValueError, match="q, k and v must be on one device, got q: cuda:0, k: cpu"):
        flash_cosine_sim_attention(q, q.cpu(), q.cpu())
    with pytest.raises(ValueError, match="scale tensor must be on q's device cuda:0, got cpu"):
        flash_cosine_sim_attention(q, q, q, scale=torch.tensor(8.0))
