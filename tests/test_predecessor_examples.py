"""Every usage example of the original flash-cosine-sim-attention's README, with the output shape it gives.

The sequences are shorter where float64 would take long; batch sizes, heads and head_dim are the README's.
Each output is compared with the specification in float64.
"""

import pytest
import torch

from flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    l2norm_tensors,
    plain_cosine_sim_attention,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check(out, shape, q, k, v, **options):
    assert out.shape == shape
    assert out.dtype == torch.float32
    expected = plain_cosine_sim_attention(q.double(), k.double(), v.double(), **options)
    error = (out - expected).norm() / expected.norm()
    assert error <= 1e-5  # the library's accuracy gate for float32


def test_self_attention():
    q = torch.randn(1, 8, 1024, 64)
    k = torch.randn(1, 8, 1024, 64)
    v = torch.randn(1, 8, 1024, 64)
    out = flash_cosine_sim_attention(q, k, v)
    check(out, (1, 8, 1024, 64), q, k, v)


def test_cross_attention():
    q = torch.randn(1, 8, 512, 64)
    k = torch.randn(1, 8, 1024, 64)
    v = torch.randn(1, 8, 1024, 64)
    out = flash_cosine_sim_attention(q, k, v)
    check(out, (1, 8, 512, 64), q, k, v)


@pytest.mark.parametrize("num_masked", [0, 300])
def test_key_value_mask(num_masked):
    q = torch.randn(1, 8, 512, 64)
    k = torch.randn(1, 8, 1024, 64)
    v = torch.randn(1, 8, 1024, 64)
    mask = torch.ones(1, 1024).bool()
    mask[:, 1024 - num_masked :] = False
    out = flash_cosine_sim_attention(q, k, v, mask=mask)
    check(out, (1, 8, 512, 64), q, k, v, mask=mask)


def test_autoregressive():
    q = torch.randn(4, 8, 256, 64)
    k = torch.randn(4, 8, 256, 64)
    v = torch.randn(4, 8, 256, 64)
    out = flash_cosine_sim_attention(q, k, v, causal=True)
    check(out, (4, 8, 256, 64), q, k, v, causal=True)


def test_single_headed_key_values():
    q = torch.randn(4, 8, 256, 64)
    k = torch.randn(4, 256, 64)
    v = torch.randn(4, 256, 64)
    out = flash_cosine_sim_attention(q, k, v, causal=True)
    check(out, (4, 8, 256, 64), q, k, v, causal=True)


def rotate(x):
    """Rotary position embedding of (..., seq_len, head_dim)."""
    seq_len, head_dim = x.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=x.dtype) / head_dim)
    angle = torch.arange(seq_len, dtype=x.dtype).unsqueeze(-1) * frequency  # (seq_len, head_dim / 2)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(rotated, dim=-1).flatten(-2)


def test_rotation_between_l2norm_and_attention():
    q = torch.randn(4, 8, 256, 64)
    k = torch.randn(4, 256, 64)
    v = torch.randn(4, 256, 64)
    q_hat, k_hat = l2norm_tensors(q, k)
    out = flash_cosine_sim_attention(rotate(q_hat), rotate(k_hat), v, l2norm_qk=False)
    # A rotation keeps the norm, so rotating first and normalising inside is the same.
    check(out, (4, 8, 256, 64), rotate(q.double()), rotate(k.double()), v)


def test_causal_cross_attention():
    q = torch.randn(1, 8, 512, 64)
    k = torch.randn(1, 8, 1024, 64)
    v = torch.randn(1, 8, 1024, 64)
    out = flash_cosine_sim_attention(q, k, v, causal=True)
    check(out, (1, 8, 512, 64), q, k, v, causal=True)


def test_merged_batch_and_heads():
    q = torch.randn(32, 128, 64)
    k = torch.randn(32, 256, 64)
    v = torch.randn(32, 256, 64)
    out = flash_cosine_sim_attention(q, k, v, causal=True)
    check(out, (32, 128, 64), q, k, v, causal=True)


def test_runs_and_differentiates_on_the_cpu():
    """The original raised on the CPU where a gradient was needed."""
    q, k, v = (torch.randn(1, 8, 128, 64, requires_grad=True) for _ in range(3))
    out = flash_cosine_sim_attention(q, k, v, causal=True)
    assert out.device.type == "cpu"
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    plain = plain_cosine_sim_attention(q.double(), k.double(), v.double(), causal=True)
    expected = torch.autograd.grad(plain.sum(), (q, k, v))
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
