"""The registered operators: schemas, fake tensors, autograd, autocast, FLOP formulas, and how they are found."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flash_cosine_sim_attention.interface as interface
import flash_cosine_sim_attention.ops as ops
from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention

forward = torch.ops.flash_cosine_sim_attention.forward
partials = torch.ops.flash_cosine_sim_attention.partials
backward = torch.ops.flash_cosine_sim_attention.backward


def inputs(dtype=torch.float32, requires_grad=True, mask=True, bias=True, seq_len_q=7, seq_len_k=9):
    """Return q, k, v, mask, attn_bias, scale as the operators take them."""
    torch.manual_seed(0)
    options = {"dtype": dtype, "requires_grad": requires_grad}
    q = torch.randn(2, 4, seq_len_q, 16, **options)
    k, v = (torch.randn(2, 2, seq_len_k, 16, **options) for _ in range(2))
    key_mask = torch.rand(2, seq_len_k) > 0.3
    key_mask[1] = False
    attn_bias = torch.randn(1, 4, seq_len_q, seq_len_k, **options)
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=scale_dtype, requires_grad=requires_grad)
    return q, k, v, key_mask if mask else None, attn_bias if bias else None, scale


@pytest.mark.parametrize("operator", [forward, partials])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask, bias", [(True, True), (False, False)])
def test_opcheck(operator, dtype, mask, bias):
    torch.library.opcheck(operator.default, (*inputs(dtype, mask=mask, bias=bias), 2, True, True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_row_sum_grad", [False, True])
def test_opcheck_backward(bias, with_row_sum_grad):
    tensors = inputs(requires_grad=False, bias=bias)
    o, row_sum_log2 = forward(*tensors, 2, True, True)
    drow_sum_log2 = torch.randn_like(row_sum_log2) if with_row_sum_grad else None
    arguments = (torch.randn_like(o), *tensors, o, row_sum_log2, drow_sum_log2, 2, True, True, bias, False)
    torch.library.opcheck(backward.default, arguments)


@pytest.mark.parametrize("groups, causal, l2norm_qk", [(1, False, True), (4, True, True), (1, True, False)])
@pytest.mark.parametrize("return_partials", [False, True])
def test_equals_plain_autograd(groups, causal, l2norm_qk, return_partials):
    """The closed-form backward against autograd through the specification, in float64."""
    q, k, v, mask, attn_bias, scale = inputs(torch.float64)
    differentiable = (q, k, v, attn_bias, scale)
    options = {"groups": groups, "causal": causal, "l2norm_qk": l2norm_qk, "return_partials": return_partials}
    ours = ops.kernel_attention(q, k, v, mask=mask, attn_bias=attn_bias, scale=scale, **options)
    plain = plain_cosine_sim_attention(q, k, v, mask, attn_bias, scale, **options)
    if not return_partials:
        ours, plain = (ours,), (plain,)
    grad_outputs = [torch.randn_like(part) for part in plain]
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, differentiable, grad_outputs),
        torch.autograd.grad(plain, differentiable, grad_outputs),
    )


def test_gradcheck_with_row_sum():
    """row_sum_log2 is differentiable too; -inf, in a row without a visible key, has gradient 0."""
    q, k, v, mask, attn_bias, scale = inputs(torch.float64, seq_len_q=3, seq_len_k=4)

    def attend(q, k, v, attn_bias, scale):
        o, row_sum_log2 = forward(q, k, v, mask, attn_bias, scale, 2, True, True)
        return o, row_sum_log2.masked_fill(row_sum_log2.isinf(), 0)

    assert torch.autograd.gradcheck(attend, (q, k, v, attn_bias, scale))


def test_row_sum_is_not_shifted():
    tensors = inputs(requires_grad=False)
    _, row_sum_log2 = forward(*tensors, 1, False, True)
    _, denominator = partials(*tensors, 1, False, True)
    torch.testing.assert_close(row_sum_log2, denominator.log2())
    assert (row_sum_log2[1] == -torch.inf).all()


def test_scale_of_one_element_gets_one_gradient():
    q, k, v, mask, attn_bias, _ = inputs()
    grads = []
    for shape in ((1,), (4,)):
        scale = torch.full(shape, 8.0, requires_grad=True)
        forward(q, k, v, mask, attn_bias, scale, 1, True, True)[0].square().sum().backward()
        assert scale.grad.shape == shape
        grads.append(scale.grad.sum())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_meta_and_fake_shapes(device):
    tensors = [t if t is None else t.detach() for t in inputs(torch.bfloat16)]
    with torch._subclasses.FakeTensorMode() as mode:
        if device == "fake":
            tensors = [mode.from_tensor(tensor) for tensor in tensors]
            o = flash_cosine_sim_attention(*tensors, backend="sdpa")  # reads no value of the scale
            assert o.shape == (2, 4, 7, 16)
    if device == "meta":
        tensors = [tensor.to("meta") for tensor in tensors]
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors[:3]]
    o, row_sum_log2 = forward(*strided, *tensors[3:], 1, True, True)
    assert o.shape == (2, 4, 7, 16) and o.dtype == torch.bfloat16 and o.is_contiguous()
    assert row_sum_log2.shape == (2, 4, 7) and row_sum_log2.dtype == torch.float32
    grads = backward(o, *strided, *tensors[3:], o, row_sum_log2, None, 1, True, True, True, False)
    for grad, tensor in zip(grads, (*strided, *tensors[4:]), strict=True):
        assert grad.shape == tensor.shape and grad.dtype == tensor.dtype and grad.is_contiguous()
    numerator, denominator = partials(*strided, *tensors[3:], 1, True, True)
    assert numerator.shape == o.shape and denominator.shape == row_sum_log2.shape
    assert numerator.dtype == denominator.dtype == torch.float32


@pytest.mark.parametrize("operator", [forward, partials])
def test_autocast_keeps_the_scale_in_float32(operator):
    q, k, v, mask, attn_bias, _ = inputs()
    scale = torch.full((4,), 8.01, requires_grad=True)  # 8.01 is not a bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = operator(q, k, v, mask, attn_bias, scale, 1, True, True)
    low = [tensor.bfloat16() for tensor in (q, k, v)]
    expected = operator(*low, mask, attn_bias.bfloat16(), scale, 1, True, True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True))
    result[0].float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (q, k, v, attn_bias, scale))


def test_operator_compiles_under_autocast():
    torch._dynamo.reset()
    tensors = inputs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(*tensors, 1, True, True)[0]

    o = attend(*tensors)
    assert o.dtype == torch.bfloat16
    o.float().sum().backward()
    assert tensors[0].grad.dtype == tensors[5].grad.dtype == torch.float32


def test_deterministic_flag_reaches_the_backward():
    flags = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ARG002
            if function is backward.default:
                flags.append(args[-1])
            return function(*args, **(kwargs or {}))

    tensors = inputs()
    with Record():
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                forward(*tensors, 1, False, True)[0].sum().backward()
            finally:
                torch.use_deterministic_algorithms(False)
    assert flags == [False, True]


def test_double_backward_is_a_clear_error():
    tensors = inputs()
    o, _ = forward(*tensors, 1, False, True)
    (dq,) = torch.autograd.grad(o.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward; use backend='reference'"):
        dq.sum().backward()


@pytest.mark.parametrize("seq_len_q, seq_len_k, causal", [(7, 9, False), (7, 9, True), (9, 7, True), (1, 5, True)])
def test_flops(seq_len_q, seq_len_k, causal):
    pairs = seq_len_q * seq_len_k
    if causal:
        pairs = sum(max(0, min(seq_len_k, i + 1 + seq_len_k - seq_len_q)) for i in range(seq_len_q))
    expected = 4 * 2 * 4 * pairs * 16  # 4 b h pairs d
    tensors = inputs(seq_len_q=seq_len_q, seq_len_k=seq_len_k)
    with FlopCounterMode(display=False) as counter:
        o, _ = forward(*tensors, 1, causal, True)
    counts = counter.get_flop_counts()["Global"]
    assert counts[forward] == expected
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_flop_counts()["Global"][backward] == 2.5 * expected
    with FlopCounterMode(display=False) as counter:
        partials(*tensors, 1, causal, True)
    assert counter.get_flop_counts()["Global"][partials] == expected


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(ops, "_kernels_error", "no compiled library in the package directory")
    monkeypatch.setattr(interface, "_logged_reasons", set())


def test_backend_cuda_without_a_build_says_how_to_get_it(no_kernels):  # noqa: ARG001
    q, k, v = inputs()[:3]
    with pytest.raises(ImportError, match="no compiled library.*nvcc on PATH, `pip install --no-build-isolation"):
        flash_cosine_sim_attention(q, k, v, backend="cuda")
    assert not ops.kernels_available()


def test_backend_cuda_refuses_cpu_tensors(monkeypatch):
    monkeypatch.setattr(ops, "_kernels_error", None)
    q, k, v = inputs()[:3]
    with pytest.raises(ValueError, match="backend='cuda' cannot serve: .* q is on cpu; use backend='auto'"):
        flash_cosine_sim_attention(q, k, v, backend="cuda")


def test_backend_auto_logs_its_reason_once(no_kernels, caplog):  # noqa: ARG001
    q, k, v = inputs()[:3]
    with caplog.at_level(logging.INFO, logger="flash_cosine_sim_attention"):
        for _ in range(3):
            o = flash_cosine_sim_attention(q, k, v)
    assert [record.getMessage() for record in caplog.records] == [
        "backend='auto' uses PyTorch's SDPA: the CUDA kernels take CUDA tensors, q is on cpu"
    ]
    assert torch.equal(o, flash_cosine_sim_attention(q, k, v, backend="sdpa"))


def test_a_broken_library_is_reported_where_it_is_used(no_kernels, tmp_path):  # noqa: ARG001
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    ops.load_kernels(tmp_path)
    assert not ops.kernels_available()
    q, k, v = inputs()[:3]
    with pytest.raises(ImportError, match=r"_C.abi3.so does not load"):
        flash_cosine_sim_attention(q, k, v, backend="cuda")
    flash_cosine_sim_attention(q, k, v)


def test_import_is_light():
    """It compiles nothing, initialises no device, needs no NumPy, and is quick next to importing torch."""
    source = """
import sys, time
start_s = time.process_time()
import torch
before = set(sys.modules)
torch_s = time.process_time()
import flash_cosine_sim_attention
library_s = time.process_time() - torch_s
assert not torch.cuda.is_initialized()
assert not {"numpy", "einops", "torch._inductor"} & (set(sys.modules) - before)
assert library_s < 0.2 * (torch_s - start_s), (library_s, torch_s - start_s)
"""
    kernels = Path(interface.__file__).parents[1]
    subprocess.run([sys.executable, "-c", source], check=True, cwd=kernels)
