"""How exact a back end has to be: its results and gradients against the specification in float64, and sdpa's errors."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import flash_cosine_sim_attention.interface as interface
from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention

BACKENDS = ["sdpa", "reference", "operators"]
# The library's accuracy gates for o, as relative RMS against float64 on the same rounded inputs.
GATES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


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


def low_precision_attention(q, k, v, mask=None, attn_bias=None, scale=8, groups=1, causal=False,
                            l2norm_qk=True, attn_bias_batch_dim=False, window_size=None, distance_bias=None,
                            alibi_slopes=None):  # fmt: skip
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
    distance = torch.arange(sim.shape[-2], device=q.device)[:, None] - torch.arange(sim.shape[-1], device=q.device)
    distance = distance + sim.shape[-1] - sim.shape[-2]
    if distance_bias is not None:
        sim = sim + distance_bias[:, (distance + (0 if causal else sim.shape[-2] - 1)).clamp(min=0)].to(sim.dtype)
    if alibi_slopes is not None:
        sim = sim - (alibi_slopes.view(-1, q.shape[1], 1, 1) * distance.abs()).to(sim.dtype)
    left, right = window_size or (-1, -1)
    diagonal = sim.shape[-1] - sim.shape[-2]
    visible = torch.ones(sim.shape[-2:], dtype=torch.bool, device=q.device)
    visible = visible.tril(diagonal) if causal else visible.tril(diagonal + right) if right >= 0 else visible
    visible = visible.triu(diagonal - left) if left >= 0 else visible
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
    num_scores = case.batch * case.num_heads * case.seq_len_q * case.seq_len_k
    if name == "dattn_bias":
        return delta * (num_scores / math.prod(case.bias_shape())) ** 0.5
    if name == "ddistance_bias":
        return delta * (num_scores / (case.num_heads * (case.seq_len_q + case.seq_len_k))) ** 0.5
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
    """Returns the last back end's results."""
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
    return ours
