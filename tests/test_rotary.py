"""The rotary embedding: what it means, and that the Triton kernels do the same.

The kernels are compared on a GPU and, where Triton can be imported, on the CPU too, run by its interpreter.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.fused.rotate import RotateByTriton
from models.rotary import Rotary, rotate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
by_triton = (lambda test: test) if INTERPRETED else pytest.mark.gpu

ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # one unit in the last place

# batch, n, num_heads, num_kv_heads, head_dim, start
CASES = [
    (2, 7, 4, 4, 64, 0),
    (3, 33, 6, 2, 64, 5),
    (1, 1, 2, 1, 8, 40),
    (5, 1, 4, 2, 24, 3),
    (2, 7, 3, 1, 96, 1),
    (1, 37, 2, 2, 128, 0),
    (2, 9, 2, 1, 256, 2),
]
LARGE_CASES = [(2, 1000, 8, 8, 64, 0), (3, 1000, 6, 2, 96, 24), (1, 1000, 4, 1, 256, 7)]


def test_each_pair_is_turned_as_a_complex_number():
    x = torch.randn(2, 9, 3 + 2 * 2, 16)
    frequency = 10_000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    turn = torch.polar(torch.ones(9, 1, 8).double(), torch.arange(5, 14).view(9, 1, 1) * frequency)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (8, 2)))
    expected = torch.view_as_real(pairs * turn).flatten(-2).float()
    q, k, v = Rotary(16, 64)(x, num_heads=3, start=5)
    torch.testing.assert_close(q, expected[:, :, :3])
    torch.testing.assert_close(k, expected[:, :, 3:5])
    assert torch.equal(v, x[:, :, 5:]) and v.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@given(groups=st.sampled_from([1, 2, 4, 8]), start=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_rotation_keeps_group_norms_and_depends_on_distance_only(groups, start):
    rotary = Rotary(32, 256).double()
    x = torch.randn(1, 6, 1, 32, dtype=torch.float64)

    def rotated_at(start):
        positions = slice(start, start + 6)
        return rotate(x, rotary.cos[positions], rotary.sin[positions])[:, :, 0]

    rotated, again, still = rotated_at(start), rotated_at(start + 40), x[:, :, 0]
    norm = lambda t: t.unflatten(-1, (groups, -1)).norm(dim=-1)  # noqa: E731
    torch.testing.assert_close(norm(rotated), norm(still))
    torch.testing.assert_close(again @ again.mT, rotated @ rotated.mT, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rotated @ rotated.mT, still @ still.mT)


def test_gradient():
    rotary = Rotary(8, 16).double()
    qkv = torch.randn(2, 3, 2 + 2 * 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda qkv: rotary(qkv, 2, start=4), qkv)


def test_an_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="model.positions=rotary needs an even head_dim, got 7"):
        Rotary(7, 16)


@pytest.fixture
def triton_kernels(monkeypatch):
    if INTERPRETED:  # of which PyTorch knows nothing
        monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)


def gradients_of(kind, outputs):
    """Of q, k and v, laid out as an attention may return them."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    grads = []
    for output in outputs:
        batch, n, heads, head_dim = output.shape
        shape = {"heads first": (batch, heads, n, head_dim), "channels first": (batch, heads, head_dim, n)}
        grad = torch.randn(shape.get(kind, output.shape), generator=generator, device=DEVICE).to(output.dtype)
        order = {"heads first": (0, 2, 1, 3), "channels first": (0, 3, 1, 2)}
        grad = grad.permute(order.get(kind, (0, 1, 2, 3)))
        grads.append(grad[:, :1, :1].expand(output.shape) if kind == "expanded" else grad)
    return grads


def compare(rotated, formula, case, dtype, layout="packed"):
    batch, n, num_heads, num_kv_heads, head_dim, start = case
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (batch, n, num_heads + 2 * num_kv_heads, head_dim)
    inputs = [torch.randn(shape, generator=generator, device=DEVICE).to(dtype).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    ours, expected = rotated(inputs[0], num_heads, start), formula(inputs[1], num_heads, start)
    grads = gradients_of(layout, expected)
    torch.autograd.backward(ours, grads)
    torch.autograd.backward(expected, grads)
    for one, other in zip((*ours, inputs[0].grad), (*expected, inputs[1].grad), strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING[dtype], atol=1e-5)
    assert torch.equal(ours[2], expected[2])


@by_triton
@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("layout", ["packed", "heads first", "channels first", "expanded"])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("case", CASES + ([] if INTERPRETED else LARGE_CASES))
def test_kernels_equal_the_formula(case, dtype, layout):
    rotary = Rotary(case[4], 1024).to(DEVICE)

    def by_kernels(qkv, num_heads, start):
        positions = slice(start, start + qkv.shape[1])
        num_kv_heads = (qkv.shape[2] - num_heads) // 2
        cos, sin = rotary.cos[positions], rotary.sin[positions]
        return RotateByTriton.apply(qkv, cos, sin, num_heads, num_kv_heads)

    compare(by_kernels, rotary, case, dtype, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("case", CASES + LARGE_CASES)
def test_compiled_it_equals_the_formula(case, dtype):
    torch.compiler.reset()
    rotary = Rotary(case[4], 1024).cuda()
    compare(torch.compile(rotary, fullgraph=True, dynamic=False), rotary, case, dtype)


@pytest.mark.gpu
def test_compiled_it_runs_one_kernel_each_way_and_no_cat():
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    rotary = Rotary(64, 128).cuda()

    @torch.compile(fullgraph=True, dynamic=False)
    def loss(qkv):
        return sum(part.float().square().sum() for part in rotary(qkv, 4, 0))

    qkv = torch.randn(2, 128, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    _, codes = run_and_get_code(lambda: loss(qkv).backward())
    assert [code.count("_rotate_kernel_0.run(") for code in codes] == [1, 1]
    assert not any(re.search(r"def triton_\w*_cat_|aten\.cat", code) for code in codes)


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_kernels_interpreted_on_the_cpu():
    pytest.importorskip("triton", reason="needs triton, which PyTorch's CPU builds do not bring")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "kernels_equal"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
