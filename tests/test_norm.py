"""The addition with layer norm: what it means, and that the Triton kernels do the same.

The kernels are compared on a GPU and, where Triton can be imported, on the CPU too, run by its interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.fused.add_norm import AddNormByTriton
from models.norm import AddNorm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
by_triton = (lambda test: test) if INTERPRETED else pytest.mark.gpu

ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of 16 bits one unit in the last place
SHAPES = [(2, 7, 64), (1, 1, 8), (3, 33, 96), (1, 2100, 512), (2, 5, 768), (3, 2, 2500)]
DTYPES = [  # of stream, branch and norm
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16, torch.float16),
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


def test_formula():
    norm = AddNorm(16)
    torch.nn.init.normal_(norm.weight)
    x, branch = torch.randn(2, 3, 5, 16)
    total, y = norm(x, branch)
    assert torch.equal(total, x + branch)
    torch.testing.assert_close(y, F.layer_norm(x + branch, (16,)) * norm.weight)
    alone, y = norm(x, None)
    assert alone is x
    torch.testing.assert_close(y, F.layer_norm(x, (16,)) * norm.weight)


def test_gradient():
    norm = AddNorm(8).double()
    inputs = [torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(norm, inputs)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_sum_keeps_the_dtype_of_the_stream(dtypes):
    x, branch = torch.randn(3, 16).to(dtypes[0]), torch.randn(3, 16).to(dtypes[1])
    total, _ = AddNorm(16).to(dtypes[0])(x, branch)
    assert total.dtype == dtypes[0]


@pytest.fixture
def triton_kernels(monkeypatch):
    if INTERPRETED:  # of which PyTorch knows nothing
        monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)


@by_triton
@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_formula(shape, dtypes):
    of_stream, of_branch, of_norm = dtypes
    generator = torch.Generator(DEVICE).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE)  # noqa: E731
    x, branch = random(*shape).to(of_stream).requires_grad_(), random(*shape).to(of_branch).requires_grad_()
    weight = random(shape[-1]).requires_grad_()
    grads = random(*shape).to(of_stream), random(*shape).to(of_norm)
    total, y = AddNormByTriton.apply(x, branch, weight, 1e-5, of_norm)
    dx, dbranch, dweight = torch.autograd.grad((total, y), (x, branch, weight), grads)
    assert [t.dtype for t in (total, y, dx, dbranch, dweight)] == [
        of_stream,
        of_norm,
        of_stream,
        of_branch,
        weight.dtype,
    ]

    if not INTERPRETED:  # Triton's interpreter rounds to bfloat16 towards zero
        assert torch.equal(total, (x + branch).to(of_stream))
    close(total, x.float() + branch.float())
    stream = total.detach().float().requires_grad_()
    expected = F.layer_norm(stream, shape[-1:], weight, eps=1e-5)
    of_stream, of_weight = torch.autograd.grad(expected, (stream, weight), grads[1].float())
    close(y, expected)
    close(dx, of_stream + grads[0].float())
    close(dbranch, of_stream + grads[0].float())
    torch.testing.assert_close(dweight, of_weight, rtol=1e-5, atol=2e-4)


def close(ours, expected):
    torch.testing.assert_close(ours.float(), expected, rtol=ROUNDING[ours.dtype], atol=1e-5)


@pytest.mark.gpu
def test_compiled_it_runs_one_kernel_each_way():
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    norm = AddNorm(512).cuda()

    @torch.compile(fullgraph=True, dynamic=False)
    def loss(x, branch):
        with torch.autocast("cuda", torch.bfloat16):
            total, y = norm(x, branch)
        assert y.dtype == torch.bfloat16
        return total.square().sum() + y.float().sin().sum()

    x = torch.randn(2, 128, 512, device="cuda", requires_grad=True)
    branch = torch.randn(2, 128, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    _, codes = run_and_get_code(lambda: loss(x, branch).backward())
    assert sum(code.count("_add_norm_kernel_0.run(") for code in codes) == 1
    assert sum(code.count("_add_norm_backward_kernel_0.run(") for code in codes) == 1
    assert torch.equal(branch.grad, x.grad.bfloat16())


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_kernels_interpreted_on_the_cpu():
    pytest.importorskip("triton", reason="needs triton, which PyTorch's CPU builds do not bring")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "kernels_equal"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
