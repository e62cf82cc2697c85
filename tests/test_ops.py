"""The registered operators: schemas, fake tensors, autograd, autocast, FLOP formulas, and how they are found."""

import functools
import itertools
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.forked_torch import run_code
from support.operators import cu_seqlens, inputs, packed_inputs, seq_first, settings
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import flash_cosine_sim_attention.interface as interface
import flash_cosine_sim_attention.ops as ops
import flash_cosine_sim_attention.reference as reference
from flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    flash_cosine_sim_attention_varlen,
    plain_cosine_sim_attention,
)
from flash_cosine_sim_attention.call import BACKWARD, GRADIENTS, SCHEMAS, Call

forward = torch.ops.flash_cosine_sim_attention.forward
partials = torch.ops.flash_cosine_sim_attention.partials
backward = torch.ops.flash_cosine_sim_attention.backward


def attend(
    q,
    k,
    v,
    mask=None,
    attn_bias=None,
    scale=8.0,
    distance_bias=None,
    alibi_slopes=None,
    return_partials=False,
    **options,
):
    """The operators as the library calls them."""
    scale, scale_value = (scale, 60.0) if isinstance(scale, torch.Tensor) else (None, scale)
    *decided, _ = settings(**options)
    call = Call(q, k, v, mask, attn_bias, scale, *[None] * 2, distance_bias, alibi_slopes, scale_value, *decided)
    return ops.kernel_attention(tuple(call), return_partials)


def gradients(*names):
    """need_dq, need_dk, need_dv, need_dattn_bias and so on, in their order; all of them without names."""
    return tuple(not names or name in names for name in GRADIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("operator", [forward, partials])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask, bias, number", [(True, True, False), (False, False, False), (False, True, True)])
def test_opcheck(operator, dtype, mask, bias, number):
    tensors = inputs(dtype, mask=mask, bias=bias, number=number, by_distance=not bias or number)
    torch.library.opcheck(operator.default, (*tensors, *settings(2)))


@pytest.mark.slow
@pytest.mark.parametrize("operator", [forward, partials])
def test_opcheck_of_no_heads(operator):
    """What a rank has where heads are split over more ranks than there are heads."""
    q, k, v, mask, bias, scale, *rest = inputs()
    tensors = [x.detach()[:, :0].requires_grad_() for x in (q, k, v)]
    bias, scale = bias.detach()[:, :0].requires_grad_(), scale.detach()[:0].requires_grad_()
    torch.library.opcheck(operator.default, (*tensors, mask, bias, scale, *rest, *settings(2)))


@pytest.mark.slow
@pytest.mark.parametrize("operator", [forward, partials])
def test_opcheck_of_strided_inputs(operator):
    q, k, v, *rest = inputs()
    strided = [seq_first(tensor).requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(operator.default, (*strided, *rest, *settings(2)))


@pytest.mark.slow
@pytest.mark.parametrize("operator", [forward, partials])
def test_opcheck_of_windows_and_packed_sequences(operator):
    window = settings(window_size=(2, 3), causal=False)
    for tensors in (inputs(), packed_inputs([3, 0, 4], [5, 2, 0], behind=1)):
        torch.library.opcheck(operator.default, (*tensors, *window))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_row_sums_are_made_only_for_a_backward_pass(requires_grad):
    q, k, v, *rest = inputs(requires_grad=requires_grad)
    arguments = q, k, v, *rest, *settings(2)
    torch.library.opcheck(forward.default, (*arguments, False))
    expected_o, expected_rows = forward(*arguments)
    o, row_sum_log2 = forward(*arguments, False)
    torch.testing.assert_close(o, expected_o)
    if requires_grad:  # then the backward pass needs them, whatever the caller says
        torch.testing.assert_close(row_sum_log2, expected_rows)
        o.sum().backward()
        assert q.grad is not None
    else:
        assert row_sum_log2.shape == (0,) and row_sum_log2.dtype == expected_rows.dtype


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_row_sum_grad", [False, True])
@pytest.mark.parametrize("number", [False, True])
def test_opcheck_backward(bias, with_row_sum_grad, number):
    q, k, v, *rest = inputs(requires_grad=False, bias=bias, number=number, by_distance=not bias)
    tensors = seq_first(q), k, seq_first(v), *rest
    o, row_sum_log2 = forward(*tensors, *settings(2))
    drow_sum_log2 = torch.randn_like(row_sum_log2) if with_row_sum_grad else None
    names = {"dq", "dv"} | ({"dk", "dattn_bias"} if bias else {"ddistance_bias"}) | (set() if number else {"dscale"})
    options = *settings(2), *gradients(*names), False
    arguments = torch.randn_like(o), *tensors, o, row_sum_log2, drow_sum_log2, *options
    torch.library.opcheck(backward.default, arguments)


@pytest.mark.slow
def test_opcheck_backward_of_packed_sequences():
    tensors, options = packed_inputs([3, 0, 4], [5, 2, 0], 1, requires_grad=False), settings(window_size=(2, 0))
    o, row_sum_log2 = forward(*tensors, *options)
    assert row_sum_log2.isneginf()[..., 3:].all() and row_sum_log2.isfinite()[..., :3].all()
    arguments = torch.randn_like(o), *tensors, o, row_sum_log2, None, *options, *gradients("dq", "dk", "dv"), False
    torch.library.opcheck(backward.default, arguments)


@pytest.mark.parametrize("number", [False, True])
def test_gradients_that_are_not_needed_are_not_made(number):
    """The operator returns (0,) for them, asked for by what requires a gradient; the others stay the same."""
    tensors = inputs(requires_grad=False, number=number, by_distance=True)
    names = ["dq", "dk", "dv", "dattn_bias", "ddistance_bias"] + ([] if number else ["dscale"])
    o, row_sum_log2 = forward(*tensors, *settings(2))
    do = torch.randn_like(o)

    def run(*names):
        options = *settings(2), *gradients(*names), False
        return dict(zip(GRADIENTS, backward(do, *tensors, o, row_sum_log2, None, *options), strict=True))

    every = run(*names)
    for name in names:
        grads = run(name)
        assert torch.equal(grads.pop(name), every[name])
        assert all(grad.shape == (0,) for grad in grads.values())

    asked = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ARG002
            if function is backward.default:
                asked.append(tuple(getattr(BACKWARD.decode(args), f"need_{name}") for name in GRADIENTS))
            return function(*args, **(kwargs or {}))

    differentiable = dict(zip(GRADIENTS, (*tensors[:3], *tensors[4:6], tensors[8]), strict=True))
    for name in names:
        differentiable[name].requires_grad_()
        with Record():
            forward(*tensors, *settings(2))[0].backward(do)
        assert torch.equal(differentiable[name].grad, every[name])
        assert asked.pop() == gradients(name)
        differentiable[name].requires_grad_(False)


def test_a_number_equals_a_tensor_as_scale():
    q, k, v, mask, attn_bias, *_ = inputs(requires_grad=False)
    number = forward(q, k, v, mask, attn_bias, *[None] * 5, 1.5, *settings(2))
    tensor = forward(q, k, v, mask, attn_bias, torch.tensor([1.5]), *[None] * 4, 7.0, *settings(2))
    torch.testing.assert_close(number, tensor)


@pytest.mark.parametrize(
    "groups, causal, l2norm_qk, window_size",
    [
        (1, False, True, (-1, -1)),
        (4, True, True, (-1, -1)),
        (1, True, False, (-1, -1)),
        (2, True, True, (3, 0)),
        (1, False, True, (1, 2)),
    ],
)
@pytest.mark.parametrize("return_partials", [False, True])
def test_equals_plain_autograd(groups, causal, l2norm_qk, window_size, return_partials):
    """The closed-form backward against autograd through the specification, in float64."""
    q, k, v, mask, attn_bias, scale, *_ = inputs(torch.float64)
    table = torch.randn(4, 7 + 9 - 1, dtype=torch.float64, requires_grad=True)
    differentiable = (q, k, v, attn_bias, scale, table)
    options = {"groups": groups, "causal": causal, "l2norm_qk": l2norm_qk, "window_size": window_size}
    options |= {"return_partials": return_partials, "alibi_slopes": torch.rand(4)}
    plain = plain_cosine_sim_attention(q, k, v, mask, attn_bias, scale, **options, distance_bias=table)
    options |= {"alibi_slopes": options["alibi_slopes"].double()[None], "first_distance": 0 if causal else -6}
    ours = attend(q, k, v, mask, attn_bias, scale, table, **options)
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
    tensors = inputs(torch.float64, seq_len_q=3, seq_len_k=4, by_distance=True)
    q, k, v, mask, attn_bias, scale, _, _, table, slopes, _ = tensors

    def attend(q, k, v, attn_bias, scale, table):
        by_distance = None, None, table, slopes
        o, row_sum_log2 = forward(q, k, v, mask, attn_bias, scale, *by_distance, 60.0, *settings(2))
        return o, row_sum_log2.masked_fill(row_sum_log2.isinf(), 0)

    assert torch.autograd.gradcheck(attend, (q, k, v, attn_bias, scale, table))


def test_row_sum_is_not_shifted():
    tensors = inputs(requires_grad=False)
    _, row_sum_log2 = forward(*tensors, *settings(causal=False))
    _, denominator = partials(*tensors, *settings(causal=False))
    torch.testing.assert_close(row_sum_log2, denominator.log2())
    assert (row_sum_log2[1] == -torch.inf).all()


def test_scale_of_one_element_gets_one_gradient():
    q, k, v, mask, attn_bias, *_ = inputs()
    grads = []
    for shape in ((1,), (4,)):
        scale = torch.full(shape, 8.0, requires_grad=True)
        forward(q, k, v, mask, attn_bias, scale, *[None] * 4, 60.0, *settings())[0].square().sum().backward()
        assert scale.grad.shape == shape
        grads.append(scale.grad.sum())
    torch.testing.assert_close(*grads)


def same_layout(tensor, like):
    return tensor.shape == like.shape and tensor.dtype == like.dtype and tensor.stride() == like.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("peaked", [False, True])
def test_gradient_of_partials_in_any_dtype(dtype, peaked):
    """As accurate as the dtype allows: with dnumerator of one over the row sum, where the rows are all but
    one-hot; and of one, where denominator * dnumerator, its gradient's scale, is far beyond float16's range.
    """
    torch.manual_seed(0)
    q = torch.randn(1, 2, 33, 64)
    k, v = (torch.randn(1, 2, 8000, 64) for _ in range(2))
    if peaked:
        k[:, :, :33] = q + 0.3 * torch.randn_like(q)  # each query has its own key, all but parallel to it
    tensors = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    options = {"scale": 14.0 if peaked else 12.0, "causal": False, "return_partials": True}
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = plain_cosine_sim_attention(*exact, **options)
    row_sum = expected[1].detach()
    do = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    if peaked:
        do = do[0] / row_sum.unsqueeze(-1), do[1] / row_sum
    else:
        assert (row_sum.unsqueeze(-1) * do[0]).abs().max() > 2**16
    ours = attend(*tensors, **options)
    plain = plain_cosine_sim_attention(*tensors, **options)
    grads, plain_grads, expected_grads = (
        torch.autograd.grad(results, leaves, [part.to(results[0].dtype) for part in do])
        for results, leaves in ((ours, tensors), (plain, tensors), (expected, exact))
    )
    for name, grad, plain_grad, expected_grad in zip("qkv", grads, plain_grads, expected_grads, strict=True):
        assert grad.isfinite().all()
        error, plain_error = ((g.double() - expected_grad).norm() for g in (grad, plain_grad))
        # do is rounded as well as the result: sqrt(2). In one-hot rows that cancels from dq and dk, if delta is
        # of the same do and o; else it does not (1.37).
        assert error <= (1.15 if peaked and name != "v" else 1.6) * plain_error, name


@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
def test_outputs_keep_the_layout_of_the_inputs(device):
    *tensors, scale_value = inputs(torch.bfloat16, by_distance=True)
    tensors = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    tensors[:3] = map(seq_first, tensors[:3])
    tensors[4] = tensors[4].mT.contiguous().mT
    with torch._subclasses.FakeTensorMode() as mode:
        if device == "fake":
            tensors = [tensor if tensor is None else mode.from_tensor(tensor) for tensor in tensors]
            o = flash_cosine_sim_attention(*tensors[:6], backend="sdpa")  # reads no value of the scale
            assert o.shape == (2, 4, 7, 16)
    if device == "meta":
        tensors = [tensor if tensor is None else tensor.to("meta") for tensor in tensors]
    q = tensors[0]
    o, row_sum_log2 = forward(*tensors, scale_value, *settings())
    assert same_layout(o, q) and not o.is_contiguous()
    assert row_sum_log2.shape == (2, 4, 7) and row_sum_log2.dtype == torch.float32 and row_sum_log2.is_contiguous()
    do = torch.empty_like(o[..., :1]).expand_as(o)
    rows = o, row_sum_log2, None
    grads = backward(do, *tensors, scale_value, *rows, *settings(), *gradients(), False)
    for grad, tensor in zip(grads, (*tensors[:3], *tensors[4:6], tensors[8]), strict=True):
        assert same_layout(grad, tensor)
    grads = backward(do, *tensors, scale_value, *rows, *settings(), *gradients("dv"), False)
    assert [grad.shape == (0,) for grad in grads] == [True, True, False, True, True, True]
    numerator, denominator = partials(*tensors, scale_value, *settings())
    assert numerator.shape == o.shape and denominator.shape == row_sum_log2.shape
    assert numerator.dtype == denominator.dtype == torch.float32
    assert numerator.is_contiguous() and denominator.is_contiguous()


def test_the_last_dimension_reaches_the_operators_contiguous(monkeypatch):
    seen = []

    def record(*arguments):
        seen.extend(tensor.stride(-1) for tensor in arguments[:3])
        return forward(*arguments)

    monkeypatch.setattr(ops, "_call_forward", record)
    q, k, v, *_ = (t.mT.contiguous().mT for t in inputs()[:3])
    attend(q, k, v)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("setting", ["allow_tf32", "set_float32_matmul_precision", "fp32_precision"])
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_and_backward_get_the_same_tf32_setting(setting, compiled):
    torch._dynamo.reset()
    matmul = torch.backends.cuda.matmul
    switch = {
        "allow_tf32": lambda on: setattr(matmul, "allow_tf32", on),
        "set_float32_matmul_precision": lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
        "fp32_precision": lambda on: setattr(matmul, "fp32_precision", "tf32" if on else "ieee"),
    }[setting]
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ARG002
            if function in (forward.default, backward.default):
                (position,) = [i for i, a in enumerate(function._schema.arguments) if a.name == "allow_tf32"]
                seen.append(args[position])
            return function(*args, **(kwargs or {}))

    call = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    q, k, v, *_ = inputs()
    try:
        for on in (True, False):
            switch(on)
            o = call(q, k, v)
            switch(not on)
            with Record():
                if not compiled:
                    o = call(q, k, v)
                    switch(on)
                o.sum().backward()
    finally:
        switch(False)
    assert seen == ([True, False] if compiled else [False, False, True, True])


def jvp(q, *rest):
    return torch.func.jvp(lambda q: forward(q, *rest, *settings())[0], (q,), (torch.ones_like(q),))


def dual_level(q, *rest):
    with torch.autograd.forward_ad.dual_level():
        forward(q, *rest, *settings())  # no tangent, no error
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        forward(dual, *rest, *settings())


@pytest.mark.parametrize("differentiate", [jvp, dual_level])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_a_clear_error(differentiate, requires_grad):
    with pytest.raises(NotImplementedError, match="no forward-mode derivative; use backend='reference'"):
        differentiate(*inputs(requires_grad=requires_grad))


def test_transforms_get_between_the_call_and_autograd():
    """Eager calls pass the dispatcher by on their way to autograd: nothing else may."""

    tensors = [torch.randn(3, 1, 2, 5, 8, requires_grad=True) for _ in range(3)]
    one_by_one = torch.stack([attend(*example) for example in zip(*tensors, strict=True)])
    at_once = torch.vmap(attend)(*tensors)
    torch.testing.assert_close(at_once, one_by_one)
    grads, expected = (torch.autograd.grad(o.square().sum(), tensors) for o in (at_once, one_by_one))
    torch.testing.assert_close(grads, expected)

    q, k, v = (tensor[0].detach() for tensor in tensors)
    grad = torch.func.grad(lambda q: attend(q, k, v).sum())
    for function, example in ((grad, q), (torch.vmap(grad), tensors[0].detach())):
        with pytest.raises(NotImplementedError, match="under torch.func's .*; use backend='sdpa'"):  # none of zero
            function(example)
    for pre_dispatch in (False, True):
        graph = make_fx(lambda q, k, v: attend(q, k, v), pre_dispatch=pre_dispatch)(q, k, v).graph
        assert forward.default in [node.target for node in graph.nodes]


def test_no_graph_without_a_gradient():
    for tensors, context in ((inputs(requires_grad=False), torch.enable_grad()), (inputs(), torch.no_grad())):
        with context:
            assert not any(part.requires_grad for part in forward(*tensors, *settings()))


def test_operator_exports():
    class Attention(torch.nn.Module):
        def forward(self, *tensors):
            return forward(*tensors, *settings())[0]

    tensors = inputs(requires_grad=False)
    program = torch.export.export(Attention(), tensors)
    torch.testing.assert_close(program.module()(*tensors), Attention()(*tensors))
    assert "flash_cosine_sim_attention.forward" in program.graph_module.code


@pytest.mark.parametrize("operator", [forward, partials])
def test_autocast_keeps_the_scale_in_float32(operator):
    q, k, v, mask, attn_bias, *_ = inputs()
    scale = torch.full((4,), 8.01, requires_grad=True)  # 8.01 is not a bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = operator(q, k, v, mask, attn_bias, scale, *[None] * 4, 60.0, *settings())
    low = [tensor.bfloat16() for tensor in (q, k, v)]
    expected = operator(*low, mask, attn_bias.bfloat16(), scale, *[None] * 4, 60.0, *settings())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True))
    result[0].float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (q, k, v, attn_bias, scale))


def test_operator_compiles_under_autocast():
    torch._dynamo.reset()
    tensors = inputs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(*tensors, *settings())[0]

    o = attend(*tensors)
    assert o.dtype == torch.bfloat16
    o.float().sum().backward()
    assert tensors[0].grad.dtype == tensors[5].grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("operator", [forward, partials])
def test_operator_through_inductor(operator):
    torch._dynamo.reset()
    grads = []
    compiled = torch.compile(lambda *tensors: operator(*tensors, *settings(2)), fullgraph=True)
    for function in (compiled, lambda *tensors: operator(*tensors, *settings(2))):
        q, k, v, mask, *rest = inputs()
        q = seq_first(q).requires_grad_()
        result = function(q, k, v, mask, *rest)
        result[0].square().sum().backward()
        grads.append([result[0], q.grad, k.grad, v.grad, rest[0].grad, rest[1].grad])
    torch.testing.assert_close(*grads)


def test_deterministic_flag_reaches_the_backward():
    flags = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ARG002
            if function is backward.default:
                flags.append(BACKWARD.decode(args).deterministic)
            return function(*args, **(kwargs or {}))

    tensors = inputs()
    with Record():
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                forward(*tensors, *settings(causal=False))[0].sum().backward()
            finally:
                torch.use_deterministic_algorithms(False)
    assert flags == [False, True]


def test_double_backward_is_a_clear_error():
    tensors = inputs()
    o, _ = forward(*tensors, *settings(causal=False))
    (dq,) = torch.autograd.grad(o.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward; use backend='reference'"):
        dq.sum().backward()


def brute_force_pairs(seq_len_q, seq_len_k, left, right):
    diagonal = seq_len_k - seq_len_q
    return sum(
        (left == -1 or i + diagonal - j <= left) and (right == -1 or j - i - diagonal <= right)
        for i, j in itertools.product(range(seq_len_q), range(seq_len_k))
    )


def test_visible_pairs():
    """In closed form, of every window there is and of wider ones."""
    for sizes in itertools.product(range(7), range(7), range(-1, 9), range(-1, 9)):
        assert ops.visible_pairs(*sizes) == brute_force_pairs(*sizes), sizes
    assert ops.visible_pairs(10**6, 10**6, 1023, 0) == 1024 * 10**6 - 1024 * 1023 // 2


@pytest.mark.parametrize(
    "seq_len_q, seq_len_k, causal, window_size",
    [
        (7, 9, False, (-1, -1)),
        (7, 9, True, (-1, -1)),
        (9, 7, True, (-1, -1)),
        (1, 5, True, (-1, -1)),
        (7, 9, True, (3, 0)),
        (9, 7, False, (2, 4)),
    ],
)
def test_flops(seq_len_q, seq_len_k, causal, window_size):
    pairs = brute_force_pairs(seq_len_q, seq_len_k, window_size[0], 0 if causal else window_size[1])
    options = settings(causal=causal, window_size=window_size)
    expected = 4 * 2 * 4 * pairs * 16  # 4 b h pairs d
    tensors = inputs(seq_len_q=seq_len_q, seq_len_k=seq_len_k)
    with FlopCounterMode(display=False) as counter:
        o, _ = forward(*tensors, *options)
    counts = counter.get_flop_counts()["Global"]
    assert counts[forward] == expected
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_flop_counts()["Global"][backward] == 2.5 * expected
    with FlopCounterMode(display=False) as counter:
        partials(*tensors, *options)
    assert counter.get_flop_counts()["Global"][partials] == expected


@pytest.mark.parametrize(
    "needed, num_products",
    [
        (("ddistance_bias",), 2), (("dscale",), 2), (("dattn_bias",), 2), (("dq",), 3), (("dv",), 2),
        (("dv", "ddistance_bias"), 3), (("dq", "dk", "dv", "ddistance_bias"), 5),
    ],
)  # fmt: skip
def test_flops_of_some_gradients(needed, num_products):
    """dS takes two products, q k^T and dO v^T, and each of dq, dk and dv one more; sums of dS take none."""
    tensors = inputs(by_distance=True)
    o, row_sum_log2 = forward(*tensors, *settings())
    given = {"do": torch.ones_like(o), "o": o, "row_sum_log2": row_sum_log2, "drow_sum_log2": None}
    given |= dict(zip((*Call._fields, "allow_tf32"), (*tensors, *settings()), strict=True))
    given |= dict(zip((f"need_{name}" for name in GRADIENTS), gradients(*needed), strict=True))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backward(*({**given, "deterministic": False}[field] for field in BACKWARD.fields))
    assert counter.get_total_flops() == num_products * 2 * 2 * 4 * brute_force_pairs(7, 9, -1, 0) * 16


@pytest.mark.parametrize("causal, window_size", [(False, (-1, -1)), (True, (-1, -1)), (False, (1, 2)), (True, (2, 0))])
def test_flops_of_packed_sequences(causal, window_size):
    """Of the sequences alone where cu_seqlens can be read; of fake ones no less than that."""
    lengths_q, lengths_k = [3, 0, 1, 4, 2], [5, 2, 7, 1, 0]
    window = window_size[0], 0 if causal else window_size[1]
    expected = [brute_force_pairs(*lengths, *window) for lengths in zip(lengths_q, lengths_k, strict=True)]
    tensors, options = packed_inputs(lengths_q, lengths_k, behind=2), settings(causal=causal, window_size=window_size)
    with FlopCounterMode(display=False) as counter:
        forward(*tensors, *options)[0].sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 4 * sum(expected) * 16
    fake = [tensor.to("meta") if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
    with FlopCounterMode(display=False) as counter:
        forward(*fake, *options)
    assert counter.get_total_flops() == 2 * 2 * 4 * brute_force_pairs(12, 17, *window) * 16


def test_fewer_pairs_are_in_sequences_than_in_one_of_all_rows():
    """What makes the count of fake tensors a bound."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        left, right, sequences = torch.randint(-1, 5, (3,), generator=generator).tolist()
        lengths = torch.randint(0, 6, (2, sequences + 2), generator=generator)
        apart = sum(ops.visible_pairs(*pair, left, right) for pair in lengths.T.tolist())
        assert apart <= ops.visible_pairs(*lengths.sum(1).tolist(), left, right)


def test_cu_seqlens_have_no_gradient():
    """Nor are they cast: they reach the backward pass as they are, and autocast leaves them int32."""
    q, k, v, *_ = packed_inputs([2, 3], [4, 1])
    bounds = cu_seqlens([2, 3]), cu_seqlens([4, 1])
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ARG002
            if function in (forward.default, backward.default):
                seen.extend(argument for argument in args if getattr(argument, "dtype", None) == torch.int32)
            return function(*args, **(kwargs or {}))

    with Record(), torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = forward(q, k, v, None, None, None, *bounds, None, None, 1.5, *settings())
        o.float().sum().backward()
    assert len(seen) == 4 and all(map(torch.equal, seen, bounds * 2))
    assert q.grad.dtype == torch.float32 and k.grad.any()


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


@pytest.fixture
def fake_gpus(monkeypatch):
    """Of every generation, by device index; returns the queries they got."""
    queried = []

    def capability(index):
        queried.append(index)
        return [(7, 5), (8, 0), (12, 0), (10, 3)][index]

    monkeypatch.setattr(ops, "_kernels_error", None)
    monkeypatch.setattr(interface, "_gpu_reasons", {})
    monkeypatch.setattr(interface, "_sdpa_reasons", {})
    monkeypatch.setattr(interface, "_logged_reasons", set())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    # It counts devices, too: torch.compile would save the state of their random generators.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    return queried


def test_a_gpu_older_than_the_kernels_is_refused(fake_gpus, caplog):
    reason = r"need compute capability 8.0 or newer, cuda:0 \(GPU 0\) has 7.5"
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 5, 16, device="cuda:0") for _ in range(3))
        for _ in range(3):
            with pytest.raises(ValueError, match=f"backend='cuda' cannot serve: .*{reason}; use backend='auto'"):
                flash_cosine_sim_attention(q, k, v, backend="cuda")
            flash_cosine_sim_attention(q, k, v)
        newer = torch.empty(1, 2, 5, 16, device="cuda:1"), torch.empty(1, 2, 5, 16, device="cuda:2")
        for q in newer:
            flash_cosine_sim_attention(q, q, q, backend="cuda")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert re.search(f"backend='auto' uses PyTorch's SDPA: .*{reason}", caplog.text)
    assert fake_gpus == [0, 1, 2]  # once each


def test_a_gpu_that_is_not_there_is_not_asked(fake_gpus):
    """Fake tensors, on the machine that compiles for another one."""
    with FakeTensorMode():
        q = torch.empty(1, 2, 5, 16, device="cuda:4")
        flash_cosine_sim_attention(q, q, q, backend="cuda")
    assert fake_gpus == []


# What a call has, and whether auto then takes SDPA on compute capability 10.x.
ON_BLACKWELL = {
    "plain": ({}, True),
    "causal": ({"causal": True}, True),
    "a window of all keys": ({"window_size": (4096, 4096)}, True),
    "float32": ({"dtype": torch.float32}, False),
    "head dim 192": ({"head_dim": 192}, False),
    "short": ({"seq_len_q": 1023, "seq_len_k": 1023}, False),
    "decoding": ({"seq_len_q": 1}, False),
    "cross": ({"seq_len_q": 1024}, True),
    "causal with more keys": ({"seq_len_q": 1024, "causal": True}, False),
    "mask": ({"mask": True}, False),
    "bias": ({"attn_bias": True}, False),
    "distance bias": ({"distance_bias": True, "causal": True}, False),
    "ALiBi": ({"alibi_slopes": True, "causal": True}, False),
    "window": ({"window_size": (100, 0)}, False),
    "partials": ({"return_partials": True}, False),
    "named": ({"backend": "cuda"}, False),
}


@pytest.mark.parametrize("name", ON_BLACKWELL)
@pytest.mark.parametrize("index", [1, 2, 3])
def test_auto_prefers_sdpa_where_the_table_says(fake_gpus, caplog, monkeypatch, name, index):
    """On 10.x alone, for calls that SDPA's kernels take as they are; the reason is logged once."""
    options, by_sdpa = ON_BLACKWELL[name]
    options = {"dtype": torch.bfloat16, "head_dim": 64, "seq_len_q": 2048, "seq_len_k": 2048, **options}
    dtype, head_dim, seq_len_q, seq_len_k = (
        options.pop(key) for key in ("dtype", "head_dim", "seq_len_q", "seq_len_k")
    )
    taken = []
    for back_end in ("sdpa", "kernel"):
        module = ops if back_end == "kernel" else interface
        attend = f"{back_end}_attention"
        monkeypatch.setattr(module, attend, lambda call, _, back_end=back_end: taken.append(back_end) or call[0])
    with FakeTensorMode(), caplog.at_level(logging.INFO, logger="flash_cosine_sim_attention"):
        q = torch.empty(1, 2, seq_len_q, head_dim, dtype=dtype, device=f"cuda:{index}")
        k = torch.empty(1, 2, seq_len_k, head_dim, dtype=dtype, device=f"cuda:{index}")
        if options.pop("mask", False):
            options["mask"] = torch.ones(1, seq_len_k, dtype=torch.bool, device=q.device)
        if options.pop("attn_bias", False):
            options["attn_bias"] = torch.zeros(2, seq_len_q, seq_len_k, device=q.device)
        for by_distance, shape in (("distance_bias", (2, seq_len_k)), ("alibi_slopes", (2,))):
            if by_distance in options:
                options[by_distance] = torch.zeros(shape, device=q.device)
        for _ in range(2):
            flash_cosine_sim_attention(q, k, k, **options)
    by_sdpa = by_sdpa and index == 3
    assert taken == ["sdpa" if by_sdpa else "kernel"] * 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == by_sdpa and all("compute capability 10.x" in message for message in messages)
    assert len(fake_gpus) <= 2  # for each question once


def test_packed_sequences_stay_with_the_kernels(fake_gpus, monkeypatch):  # noqa: ARG001
    """SDPA would attend to one after the other, and wait for the GPU to know them."""
    taken = []
    monkeypatch.setattr(ops, "kernel_attention", lambda call, _: taken.append("kernel") or call[0])
    with FakeTensorMode():
        q = torch.empty(4096, 2, 64, dtype=torch.bfloat16, device="cuda:3")
        bounds = torch.empty(3, dtype=torch.int32, device="cuda:3")
        flash_cosine_sim_attention_varlen(q, q, q, bounds, bounds, 4096, 4096)
    assert taken == ["kernel"]


def test_an_old_gpu_under_compile(fake_gpus, caplog):
    torch._dynamo.reset()
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True, backend="eager")
    with FakeTensorMode():
        q = torch.empty(1, 2, 5, 16, device="cuda:0")
        assert compiled(q, q, q).shape == q.shape
    assert "cuda:0 (GPU 0) has 7.5" in caplog.text and fake_gpus == [0]


def test_backend_auto_logs_its_reason_once(no_kernels, caplog):  # noqa: ARG001
    q, k, v = inputs()[:3]
    with caplog.at_level(logging.INFO, logger="flash_cosine_sim_attention"):
        for _ in range(3):
            o = flash_cosine_sim_attention(q, k, v)
    assert [record.getMessage() for record in caplog.records] == [
        "backend='auto' uses PyTorch's SDPA: the CUDA kernels take CUDA tensors, q is on cpu"
    ]
    assert torch.equal(o, flash_cosine_sim_attention(q, k, v, backend="sdpa"))


@pytest.mark.parametrize("compile_backend", ["aot_eager", "eager"])
def test_backend_auto_logs_its_reason_under_compile(no_kernels, caplog, compile_backend):  # noqa: ARG001
    torch._dynamo.reset()
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True, backend=compile_backend)
    with caplog.at_level(logging.INFO, logger="flash_cosine_sim_attention"):
        for seq_len in (5, 6, 7):  # traced more than once
            compiled(*(torch.randn(1, 2, seq_len, 16) for _ in range(3)))
        flash_cosine_sim_attention(*inputs()[:3])
    messages = [r.getMessage() for r in caplog.records if r.name == "flash_cosine_sim_attention"]
    assert len(messages) == 1 and "backend='auto' uses PyTorch's SDPA" in messages[0]


def test_a_broken_library_is_reported_where_it_is_used(no_kernels, tmp_path):  # noqa: ARG001
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    ops.load_kernels(tmp_path)
    assert not ops.kernels_available()
    q, k, v = inputs()[:3]
    with pytest.raises(ImportError, match=r"_C.abi3.so does not load"):
        flash_cosine_sim_attention(q, k, v, backend="cuda")
    flash_cosine_sim_attention(q, k, v)


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_library_built_for_other_operators_is_not_available(no_kernels, tmp_path, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    declared = 'const char flash_cosine_sim_schemas[] = "%s";'
    for number, (source, error) in enumerate((
        (declared % SCHEMAS, None),
        ("int nothing;", None),  # it does not say
        (declared % SCHEMAS.replace("bool causal", "int causal"), "_C.abi3.so was built for another version"),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "library.c").write_text(source)
        subprocess.run(["gcc", "-shared", "-o", folder / "_C.abi3.so", folder / "library.c"], check=True)
        ops.load_kernels(folder)
        assert ops.kernels_available() == (error is None)
        assert error is None or error in ops.kernels_error()


@pytest.mark.parametrize("missing", [["forward", "partials", "backward"], ["backward"], []])
def test_a_library_without_kernels_is_not_available(no_kernels, tmp_path, monkeypatch, caplog, missing):  # noqa: ARG001
    (tmp_path / "_C.abi3.so").touch()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)  # noqa: ARG005
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda name, key: has_kernel(name, "CPU") and key == "CUDA" and name.split("::")[1] not in missing,
    )
    ops.load_kernels(tmp_path)
    assert ops.kernels_available() == (not missing)
    if missing:
        q, k, v = inputs()[:3]
        with pytest.raises(ImportError, match=f"_C.abi3.so loads, but has no CUDA kernel for {', '.join(missing)};"):
            flash_cosine_sim_attention(q, k, v, backend="cuda")
        monkeypatch.setattr(interface, "_why_not_cuda", lambda _: f"not available ({ops.kernels_error()})")
        with caplog.at_level(logging.INFO, logger="flash_cosine_sim_attention"):
            flash_cosine_sim_attention(q, k, v)
        assert "has no CUDA kernel for" in caplog.text


WITHOUT_A_PRIVATE_NAME = """
import sys, types
import torch
import torch._library.autograd

real, (*path, name) = torch._C, sys.argv[1].split(".")

class Renamed(types.ModuleType):
    def __init__(self, real, path):
        self.real, self.path = real, path

    def __getattr__(self, attribute):
        if not self.path and attribute == name:
            raise AttributeError(f"no {name}")
        found = getattr(self.real, attribute)
        return Renamed(found, self.path[1:]) if self.path[:1] == [attribute] else found

torch._C = Renamed(real, path)
from flash_cosine_sim_attention import flash_cosine_sim_attention, interface, ops
for backend in ("auto", "sdpa", "reference"):  # no call asks for the name, either
    q = torch.ones(1, 1, 3, 8, requires_grad=True)
    o = flash_cosine_sim_attention(q, q, q, scale=torch.tensor(8.0), backend=backend)
    torch.testing.assert_close(o, q)
torch._C = real

def results(attend, partials):
    interface._choose_backend = lambda *_: attend
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    scale = torch.tensor([8.0, 9.0], requires_grad=True)
    run = lambda: flash_cosine_sim_attention(q, k, v, scale=scale, causal=True, return_partials=partials)
    with torch.no_grad():
        without = run()
    o = run()
    if partials:
        o, without = o[0] / o[1].unsqueeze(-1), without[0] / without[1].unsqueeze(-1)
    return o, without, *torch.autograd.grad(o.square().sum(), (q, k, v, scale))

for partials in (False, True):
    torch.testing.assert_close(
        results(ops.kernel_attention, partials), results(interface.reference_attention, partials)
    )
interface._choose_backend = lambda *_: ops.kernel_attention
q = torch.ones(1, 1, 3, 8)
try:
    torch.func.jvp(lambda q: flash_cosine_sim_attention(q, q, q), (q,), (q,))
except NotImplementedError as error:
    assert "no forward-mode derivative" in str(error)
else:
    raise AssertionError("a tangent was lost")
q.requires_grad_()
(gradient,) = torch.autograd.grad(flash_cosine_sim_attention(q, q, q).sum(), q, create_graph=True)
try:
    gradient.sum().backward()
except RuntimeError as error:
    assert "no double backward" in str(error), error
else:
    raise AssertionError("a double backward was made up")
"""


def test_what_a_transform_leaves_behind_is_the_tensor_in_it():
    """In eager mode nobody else looks for such wrappers: see _register_autograd_fast."""
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    left = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(q)
    k.requires_grad_()
    found, expected = (attend(rows, k, v) for rows in (left[0], q))
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(o.square().sum(), k)[0] for o in (found, expected)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        assert torch.equal(attend(left[0], k, v), expected)


@pytest.mark.parametrize(
    "name",
    ["_AutoDispatchBelowAutograd", "_any_requires_grad", "_dispatch_tls_local_include_set",
     "_functorch.is_functorch_wrapped_tensor"],
)  # fmt: skip
def test_a_renamed_private_of_torch_costs_time_alone(name):
    """Import says so and takes torch.library.register_autograd: the same gradients, and the same refusals."""
    kernels = Path(interface.__file__).parents[1]
    process = run_code(WITHOUT_A_PRIVATE_NAME, name, cwd=kernels)
    assert process.returncode == 0, process.stderr
    assert f"has not all private names that make calls fast (no {name.split('.')[-1]})" in process.stderr


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_public_name_tells_what_torch_func_wraps(transform):
    """What stands in where PyTorch's own name for it is another one."""
    seen = []

    def look(x):
        seen.append([reference._has_no_memory(x), torch._C._functorch.is_functorch_wrapped_tensor(x)])
        return x.sum()

    getattr(torch.func, transform)(look)(torch.ones(2, 3))
    assert seen == [[True, True]]
    assert not any(map(reference._has_no_memory, (torch.ones(2), torch.ones(0), torch.ones(2, requires_grad=True))))


def test_import_is_light():
    """It compiles nothing, initialises no device, works without NumPy, and is quick next to importing torch."""
    source = """
import sys, time
sys.modules["numpy"] = None  # importing it fails, for torch too, which does without
start_s = time.process_time()
import torch
before = set(sys.modules)
torch_s = time.process_time()
import flash_cosine_sim_attention
library_s = time.process_time() - torch_s
assert not torch.cuda.is_initialized()
assert not {"einops", "torch._dynamo", "torch._inductor"} & (set(sys.modules) - before)
q = torch.ones(1, 1, 3, 8)
assert torch.equal(flash_cosine_sim_attention.flash_cosine_sim_attention(q, q, q), q)
assert library_s < 0.2 * (torch_s - start_s), (library_s, torch_s - start_s)
"""
    kernels = Path(interface.__file__).parents[1]
    subprocess.run([sys.executable, "-W", "ignore", "-c", source], check=True, cwd=kernels)


# The same of the kernels


def on_gpu(test):
    """The same test with every tensor that it makes on the GPU."""

    @pytest.mark.gpu
    @pytest.mark.skipif(not ops.kernels_available(), reason=f"needs the CUDA kernels: {ops.kernels_error()}")
    @functools.wraps(test)
    def run(*args, **kwargs):
        with torch.device("cuda"):
            test(*args, **kwargs)

    return run


test_opcheck_on_gpu = on_gpu(test_opcheck)
test_opcheck_of_strided_inputs_on_gpu = on_gpu(test_opcheck_of_strided_inputs)
test_opcheck_backward_on_gpu = on_gpu(test_opcheck_backward)
test_opcheck_of_windows_and_packed_sequences_on_gpu = on_gpu(test_opcheck_of_windows_and_packed_sequences)
test_opcheck_backward_of_packed_sequences_on_gpu = on_gpu(test_opcheck_backward_of_packed_sequences)
test_row_sums_are_made_only_for_a_backward_pass_on_gpu = on_gpu(test_row_sums_are_made_only_for_a_backward_pass)
test_a_number_equals_a_tensor_as_scale_on_gpu = on_gpu(test_a_number_equals_a_tensor_as_scale)
test_row_sum_is_not_shifted_on_gpu = on_gpu(test_row_sum_is_not_shifted)
test_scale_of_one_element_gets_one_gradient_on_gpu = on_gpu(test_scale_of_one_element_gets_one_gradient)
test_double_backward_is_a_clear_error_on_gpu = on_gpu(test_double_backward_is_a_clear_error)


@on_gpu
def test_outputs_keep_the_layout_of_the_inputs_on_gpu():
    test_outputs_keep_the_layout_of_the_inputs("cpu")  # neither "meta" nor "fake"
