"""max_scale, and the bound that a learned scale has without it: beyond, it counts as the bound, with gradient 0."""

import re

import pytest
import torch

from flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    flash_cosine_sim_attention_varlen,
    interface,
    ops,
    plain_cosine_sim_attention,
)

SCALES = [3.0, 20.0, 12.0, 12.5]


@pytest.fixture(params=["reference", "sdpa", "operators"])
def backend(request, monkeypatch):
    """Of the operators, their CPU version: the specification of the kernels in closed form."""
    if request.param == "operators":
        monkeypatch.setattr(interface, "_choose_backend", lambda *_: ops.kernel_attention)
        return "auto"
    return request.param


def results(backend, scale, **options):
    """o, and the gradients of q, k, v and scale."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 7, 16, requires_grad=True) for _ in range(3))
    o = flash_cosine_sim_attention(q, k, v, scale=scale, causal=True, backend=backend, **options)
    if options.get("return_partials"):
        o = o[0] / o[1].unsqueeze(-1)
    wanted = q, k, v, *([scale] if isinstance(scale, torch.Tensor) else [])
    return o, *torch.autograd.grad((o * torch.linspace(-1, 1, 16)).sum(), wanted)


@pytest.mark.parametrize("return_partials", [False, True])
def test_a_learned_scale_counts_as_max_scale_beyond_it(backend, return_partials):
    scale = torch.tensor(SCALES, requires_grad=True)
    *ours, dscale = results(backend, scale, max_scale=12, return_partials=return_partials)
    limited = scale.detach().clamp(max=12).requires_grad_()
    *expected, dlimited = results("reference", limited, return_partials=return_partials)
    torch.testing.assert_close(ours, expected)
    assert dlimited.ne(0).all()
    torch.testing.assert_close(dscale, dlimited * torch.tensor([1, 0, 1, 0]))  # at the bound it has one


def test_one_scale_for_all_heads(backend):
    scale = torch.tensor(13.0, requires_grad=True)
    *ours, dscale = results(backend, scale, max_scale=12)
    torch.testing.assert_close(ours, list(results("reference", 12)))
    assert dscale == 0


def test_beside_biases_by_distance(backend):
    table, slopes = torch.linspace(-1, 1, 28).reshape(4, 7), torch.tensor([0.5, 0.2, 0.1, 0.0])
    biases = {"distance_bias": table, "alibi_slopes": slopes}
    scale = torch.tensor(SCALES, requires_grad=True)
    *ours, dscale = results(backend, scale, max_scale=12, **biases)
    limited = scale.detach().clamp(max=12).requires_grad_()
    *expected, dlimited = results("reference", limited, **biases)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(dscale, dlimited * torch.tensor([1, 0, 1, 0]))


def test_a_number_counts_as_max_scale_beyond_it(backend):
    for scale, counts in ((50, 12), (100, 12), (5, 5)):
        torch.testing.assert_close(results(backend, scale, max_scale=12.0), results("reference", counts))


def test_a_scale_within_the_range_has_the_bits_of_a_call_without_max_scale(backend):
    for scale in (torch.tensor(SCALES, requires_grad=True), 20.0):
        for ours, expected in zip(results(backend, scale, max_scale=60), results(backend, scale), strict=True):
            assert torch.equal(ours, expected)


def test_packed_sequences_and_the_reference_take_it():
    q = torch.randn(8, 2, 16)
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    scale = torch.tensor([3.0, 30.0])
    ours = flash_cosine_sim_attention_varlen(q, q, q, bounds, bounds, 5, 5, scale=scale, max_scale=7)
    for start, end in ((0, 5), (5, 8)):
        one = q[start:end].transpose(0, 1).unsqueeze(0)
        expected = plain_cosine_sim_attention(one, one, one, scale=scale, max_scale=7)
        torch.testing.assert_close(ours[start:end], expected.squeeze(0).transpose(0, 1))
        limited = plain_cosine_sim_attention(one, one, one, scale=torch.tensor([3.0, 7.0]))
        assert torch.equal(expected, limited)


@pytest.mark.parametrize("value", [100.0, 1e30, float("inf")])
def test_a_scale_that_nobody_checked_stays_finite(value):
    """As one on a GPU: there the range holds by a bound, not by an error. Less than -60 is bounded, too; NaN stays."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    options = 1, False, -1, -1, 0, True, False
    forward = torch.ops.flash_cosine_sim_attention.forward
    bound = interface._as_scale(torch.tensor([8.0]), None, 1, q, False)[1]
    assert bound == pytest.approx(60)
    o, row_sum_log2 = forward(q, k, v, None, None, torch.tensor([value, -value]), *[None] * 4, bound, *options)
    limited, rows = forward(q, k, v, None, None, torch.tensor([bound, -bound]), *[None] * 4, bound, *options)
    assert torch.equal(o, limited) and torch.equal(row_sum_log2, rows) and o.isfinite().all()
    nan, _ = forward(q, k, v, None, None, torch.tensor([float("nan"), 1.0]), *[None] * 4, bound, *options)
    assert nan[:, 0].isnan().all() and nan[:, 1].isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"max_scale": 0},
            ValueError,
            "max_scale must be a number above 0 and at most 60 / groups, or None; got 0",
        ),
        ({"max_scale": 61}, ValueError, "got 61 with groups=1"),
        ({"max_scale": 16, "groups": 4}, ValueError, "got 16 with groups=4"),
        ({"max_scale": float("nan")}, ValueError, "got nan"),
        ({"max_scale": True}, TypeError, "got bool"),
        ({"max_scale": "8"}, TypeError, "got str"),
        ({"max_scale": torch.tensor(8.0)}, TypeError, "got Tensor"),
        ({"max_scale": 10, "scale": torch.tensor(-1.0)}, ValueError, "scale must be positive, got -1.0"),
        ({"max_scale": 10, "scale": torch.tensor(float("nan"))}, ValueError, "got nan"),
        ({"scale": torch.tensor(61.0)}, ValueError, "must be at most 60, got 61.0"),
    ],
)
def test_errors(options, error, message):
    q = torch.ones(1, 1, 3, 16)
    with pytest.raises(error, match=re.escape(message)):
        flash_cosine_sim_attention(q, q, q, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; PyTorch sees none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])  # portable kernels, and Hopper's
@pytest.mark.parametrize("max_scale", [12, None])
def test_on_a_gpu_a_learned_scale_counts_as_its_bound(dtype, max_scale):
    if not ops.kernels_available():
        pytest.skip(f"needs the CUDA kernels: {ops.kernels_error()}")
    q, k, v, do = torch.randn(4, 2, 4, 300, 64, device="cuda", dtype=dtype).unbind(0)
    bound = max_scale or interface.MAX_LOGIT * (1 + interface.ROUNDING)
    found = []
    for values in ([3.0, 1e5, bound, 2 * bound], [3.0, bound, bound, bound]):
        scale = torch.tensor(values, device="cuda", requires_grad=True)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = flash_cosine_sim_attention(*leaves, scale=scale, causal=True, backend="cuda", max_scale=max_scale)
        found.append((o, *torch.autograd.grad(o, [*leaves, scale], do)))
    (o, *gradients, dscale), (limited_o, *limited, limited_dscale) = found
    assert torch.equal(o, limited_o)
    for one, other in zip(gradients, limited, strict=True):  # added up in no fixed order
        assert one.isfinite().all() and (one - other).norm() <= 1e-2 * other.norm()
    assert (dscale[[1, 3]] == 0).all() and (dscale[[0, 2]] != 0).all() and (limited_dscale != 0).all()


def test_a_tensor_beyond_the_range_counts_as_max_scale(backend):
    *ours, dscale = results(backend, torch.tensor(100.0, requires_grad=True), max_scale=12)
    torch.testing.assert_close(ours, [*results("reference", 12)])
    assert dscale == 0


def test_the_bound_of_values_that_are_not_read_is_that_of_the_groups():
    q = torch.randn(1, 1, 5, 16)
    assert interface._as_scale(torch.tensor([8.0]), None, 4, q, False)[1] == pytest.approx(15)


@pytest.mark.parametrize("named", ["sdpa", "reference"])
def test_a_scale_tensor_is_not_rounded_to_the_dtype_of_q(named):
    q, k, v = torch.randn(3, 1, 2, 40, 16).bfloat16().unbind(0)
    scale = torch.tensor(50.1)  # no bfloat16
    found = flash_cosine_sim_attention(q, k, v, scale=scale, backend=named)
    assert torch.equal(found, flash_cosine_sim_attention(q, k, v, scale=scale.item(), backend=named))


def test_a_bias_is_rounded_to_the_dtype_of_q(backend):
    q, k, v = torch.randn(3, 1, 2, 9, 16).bfloat16().unbind(0)
    bias = torch.randn(2, 9, 9)
    found = flash_cosine_sim_attention(q, k, v, attn_bias=bias, backend=backend)
    assert torch.equal(found, flash_cosine_sim_attention(q, k, v, attn_bias=bias.bfloat16(), backend=backend))
