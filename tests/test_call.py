"""call.py: that the operators, the library compiled from csrc/ and the public functions all follow it."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import flop_registry

import flash_cosine_sim_attention.interface as interface
from flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    flash_cosine_sim_attention_varlen,
    plain_cosine_sim_attention,
)
from flash_cosine_sim_attention.call import BACKWARD, DIFFERENTIABLE, FORWARD, NEEDS, PARTIALS, Call, picker

PACKAGE = Path(interface.__file__).parent
OPERATORS = [FORWARD, PARTIALS, BACKWARD]
# The library's C++ types, by those of a schema.
CPP_TYPES = {"Tensor": "TorchTensor", "Tensor?": "OptionalTensor", "float": "double", "int": "int64_t", "bool": "bool"}


def overload(operator):
    return getattr(torch.ops.flash_cosine_sim_attention, operator.name).default


def schema_arguments(operator):
    return [(argument.name, str(argument.type)) for argument in overload(operator)._schema.arguments]


def arguments_of(operator, **given):
    """Arguments of the operator for small tensors, in its order."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 16) for heads in (4, 2, 2))
    bias, scale = torch.randn(1, 4, 5, 5), torch.linspace(1, 8, 4)
    values = {"q": q, "k": k, "v": v, "mask": torch.rand(2, 5) > 0.3, "attn_bias": bias, "scale": scale}
    values |= {"cu_seqlens_q": None, "cu_seqlens_k": None, "scale_value": 1.0, "groups": 2, "causal": True}
    values |= {"distance_bias": torch.randn(4, 6), "alibi_slopes": torch.rand(2, 4), "first_distance": 0}
    values |= {"window_left": 3, "window_right": 0, "l2norm_qk": True, "allow_tf32": False}
    values |= {"need_row_sum_log2": True, "do": torch.randn_like(q), "o": torch.randn_like(q)}
    values |= {"row_sum_log2": torch.randn(2, 4, 5), "drow_sum_log2": None, "deterministic": False}
    values |= dict.fromkeys(NEEDS, True) | given
    return tuple(values[field] for field in operator.fields)


# One spelling


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_schemas_hold_the_fields_of_a_call_in_their_order(operator):
    names = [name for name, _ in schema_arguments(operator)]
    assert names == list(operator.fields)
    assert [name for name in names if name in Call._fields] == list(Call._fields)
    kinds = typing.get_type_hints(Call)
    for argument in overload(operator)._schema.arguments:
        if argument.name in kinds:
            optional = type(None) in typing.get_args(kinds[argument.name])
            assert isinstance(argument.type, torch.OptionalType) == optional


def test_the_public_function_makes_a_call(monkeypatch):
    """A plain tuple with every value in the place that Call gives its name."""
    seen = []
    monkeypatch.setattr(interface, "_choose_backend", lambda *_: lambda *call: seen.append(call) or torch.zeros(()))
    *tensors, mask, bias = *torch.randn(3, 1, 2, 5, 8), torch.ones(1, 5, dtype=torch.bool), torch.randn(1, 2, 5, 5)
    for scale, causal in ((torch.ones(2), True), (3, False)):
        options = {"groups": 2, "causal": causal, "l2norm_qk": not causal}
        flash_cosine_sim_attention(*tensors, mask, bias, scale, **options, return_partials=causal)
        values, return_partials = seen.pop()
        assert type(values) is tuple and return_partials is causal
        call = Call._make(values)
        for name, value in zip(("q", "k", "v", "mask", "attn_bias"), (*tensors, mask, bias), strict=True):
            assert torch.equal(getattr(call, name), value)
        if isinstance(scale, torch.Tensor):
            assert torch.equal(call.scale, scale)
        else:
            assert call.scale is None and call.scale_value == scale
        assert {name: getattr(call, name) for name in options} == options
        assert (call.window_left, call.window_right) == (-1, 0 if causal else -1)
        assert call.cu_seqlens_q is None and call.cu_seqlens_k is None


@pytest.mark.parametrize(
    "window_size, causal, limits",
    [
        (None, False, (False, -1, -1)),
        (None, True, (True, -1, 0)),
        ((-1, -1), False, (False, -1, -1)),
        ((2, 3), False, (False, 2, 3)),
        ([2, 3], True, (True, 2, 0)),
        ((2, -1), True, (True, 2, 0)),
        ((6, 1), False, (False, 6, 1)),
        ((7, 4), False, (False, -1, -1)),  # of 5 queries and 8 keys, neither hides any
        ((6, 3), False, (False, 6, 3)),
        ((0, 0), False, (True, 0, 0)),  # which is causal
        ((10**12, 10**12), True, (True, -1, 0)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_window_of_a_call(monkeypatch, window_size, causal, limits, packed):
    """causal is window_right == 0, and a side that hides nothing of the call's lengths is -1."""
    seen = []
    monkeypatch.setattr(interface, "_choose_backend", lambda *_: lambda call, _: seen.append(Call(*call)) or call[0])
    q, k, v = torch.randn(5, 2, 8), *torch.randn(2, 8, 2, 8)
    options = {"causal": causal, "window_size": window_size}
    if packed:
        bounds = [torch.tensor([0, 2, end], dtype=torch.int32) for end in (5, 8)]
        assert flash_cosine_sim_attention_varlen(q, k, v, *bounds, 3, 6, **options).shape == q.shape
        assert all(map(torch.equal, (seen[0].cu_seqlens_q, seen[0].cu_seqlens_k), bounds))
    else:
        flash_cosine_sim_attention(*(tensor.transpose(0, 1)[None] for tensor in (q, k, v)), **options)
    (call,) = seen
    assert (call.causal, call.window_left, call.window_right) == limits
    for tensor, given in zip((call.q, call.k, call.v), (q, k, v), strict=True):  # views, also of packed tensors
        assert tensor.shape == (1, 2, len(given), 8) and tensor.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_cpu_and_fake_agree_with_the_fields(operator):
    """With every value that has an effect of its own on the results' sizes and values."""
    arguments = arguments_of(operator)
    results = overload(operator)(*arguments)
    fakes = overload(operator)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    assert len(results) == len(overload(operator)._schema.returns)
    for result, fake in zip(results, fakes, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (result.shape, result.dtype, result.stride())
    call = operator.call(arguments)
    assert call == Call(**{name: operator.decode(arguments)._asdict()[name] for name in Call._fields})
    others = {"window_left": 1, "window_right": 1, "groups": 1, "l2norm_qk": False, "mask": None, "attn_bias": None}
    others |= {"distance_bias": None, "alibi_slopes": None, "first_distance": -1}
    for name, other in others.items():
        needs = {f"need_d{bias}": name != bias for bias in ("attn_bias", "distance_bias")}
        changed = overload(operator)(*arguments_of(operator, **{name: other}, **needs))
        assert not torch.equal(changed[0], results[0]), name
    number = arguments_of(operator, scale=None, scale_value=1.5, need_dscale=False)
    tensor = arguments_of(operator, scale=torch.tensor([1.5]), scale_value=7.0, need_dscale=False)
    assert torch.equal(overload(operator)(*number)[0], overload(operator)(*tensor)[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("needed", NEEDS)
def test_each_need_makes_the_gradient_of_its_name(needed, device):
    arguments = arguments_of(BACKWARD, **(dict.fromkeys(NEEDS, False) | {needed: True}))
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    for name, grad in zip(DIFFERENTIABLE, overload(BACKWARD)(*arguments), strict=True):
        shape = getattr(BACKWARD.decode(arguments), name).shape if needed == f"need_d{name}" else (0,)
        assert grad.shape == shape, name


def test_flop_formulas_see_the_fields_by_name():
    packet = torch.ops.flash_cosine_sim_attention
    for operator in OPERATORS:
        pairs = 5 * 6 // 2 - 1  # causal, and the last query does not see the first key
        products = 5 if operator is BACKWARD else 2
        count = flop_registry[getattr(packet, operator.name)](*arguments_of(operator), out_val=None)
        assert count == products * 2 * 2 * 4 * pairs * 16


def test_a_picker_finds_values_by_name():
    assert picker("abcd", "bc")((1, 2, 3, 4)) == (2, 3)
    assert picker("abcd", "b")((1, 2, 3, 4)) == (2,)
    assert picker("abcd", "dab")((1, 2, 3, 4)) == (4, 1, 2)
    assert picker("abcd", "aad")((1, 2, 3, 4)) == (1, 1, 4)
    with pytest.raises(ValueError, match=r"names must be one or more of \('a', 'b'\), got \('c',\)"):
        picker("ab", "c")
    with pytest.raises(ValueError, match="names must be one or more of"):
        picker("ab", "")


# The compiled library


def cpp_arguments(text, name):
    """(name, schema type) of the parameters of the function that csrc/ registers as the operator `name`."""
    (function,) = re.findall(rf'm\.impl\("{name}", TORCH_BOX\(&(?:\w+::)*(\w+)\)\)', text)
    (parameters,) = re.findall(rf"\b{function}\(([^()]*)\)\s*\{{", text)
    types = {cpp: schema for schema, cpp in CPP_TYPES.items()}
    pairs = [parameter.split() for parameter in parameters.split(",")]
    names = {"dout": "do"}  # a word of C++'s own
    return [(names.get(parameter, parameter), types[cpp]) for cpp, parameter in pairs]


def schema_pairs(operator):
    """(name, type) of the arguments in the operator's schema; LibTorch's stable ABI hands a SymInt over as an int."""
    texts = operator.schema.partition("(")[2].partition(")")[0].split(", ")
    pairs = (text.replace("SymInt ", "int ").split() for text in texts)
    return [(name.partition("=")[0], kind) for kind, name in pairs]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_the_library_unpacks_what_the_schema_says(operator):
    """By name, type and order. PyTorch compares no more than the number, when the library is first called."""
    text = (PACKAGE / "csrc" / "binding.cpp").read_text()
    assert cpp_arguments(text, operator.name) == schema_pairs(operator)
    swapped = re.sub(r"int64_t window_left,\s+int64_t window_right", "int64_t window_right, int64_t window_left", text)
    assert swapped != text and cpp_arguments(swapped, operator.name) != schema_pairs(operator)


# One more argument


# All that a bias by distance takes without kernels of its own: (file, what is there, what comes in its place).
SLOPE = [
    (
        "call.py",
        "    groups: int",
        "    slope: float  # added to a logit for each key between it and the query's\n    groups: int",
    ),
    (
        "interface.py",
        '    backend: str = "auto",\n    ret',
        '    slope: float = 0.0,\n    backend: str = "auto",\n    ret',
    ),
    ("interface.py", "scale_value, groups, causal,", "scale_value, slope, groups, causal,"),
    ("interface.py", "scale_value=scale_value,", "scale_value=scale_value, slope=0.0,"),
    (
        "reference.py",
        "    visible = visible_keys(call.mask, ranges, seq_len_k)\n",
        "    visible = visible_keys(call.mask, ranges, seq_len_k)\n"
        "    steps = torch.arange(seq_len_k, device=cos.device) - torch.arange(seq_len_q, device=cos.device)[:, None]\n"
        "    logits = logits + call.slope * (steps - seq_len_k + seq_len_q)\n",
    ),
    ("sdpa.py", "    if q.numel() == 0", "    if call.slope != 0 or q.numel() == 0"),
]
SLOPED = """
import torch
from flash_cosine_sim_attention import call, flash_cosine_sim_attention, interface, plain_cosine_sim_attention
names = [argument.name for argument in torch.ops.flash_cosine_sim_attention.backward.default._schema.arguments]
assert names == list(call.BACKWARD.fields) and names.index("slope") == names.index("scale_value") + 1
interface._require_cuda = lambda _: None  # backend="cuda" with the operators' CPU implementation
torch.manual_seed(0)
tensors = [torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
bias = 0.5 * (torch.arange(7.0) - torch.arange(7.0)[:, None]).double()
for return_partials in (False, True):
    expected = plain_cosine_sim_attention(*tensors, attn_bias=bias, causal=True, return_partials=return_partials)
    for backend in ("cuda", "sdpa", "reference"):
        options = {"causal": True, "slope": 0.5, "return_partials": return_partials}
        found = flash_cosine_sim_attention(*tensors, backend=backend, **options)
        torch.testing.assert_close(found, expected)
        first, also = (result[0] if return_partials else result for result in (found, expected))
        gradients = (torch.autograd.grad(o.square().sum(), tensors, retain_graph=True) for o in (first, also))
        torch.testing.assert_close(*gradients)
        meta = flash_cosine_sim_attention(*(t.to("meta") for t in tensors), backend=backend, **options)
        assert (meta[0] if return_partials else meta).shape == first.shape
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = flash_cosine_sim_attention(*(t.detach().float() for t in tensors), backend=backend, **options)
        assert (low[0] if return_partials else low).dtype == (torch.float32 if return_partials else torch.bfloat16)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    flash_cosine_sim_attention(*tensors, backend="cuda", causal=True, slope=0.5).sum().backward()
assert counter.get_total_flops() == 7 * 2 * 2 * 3 * 28 * 8
"""


@pytest.mark.slow
def test_one_more_argument_is_six_edits(tmp_path):
    """A slope works with gradients, fake tensors, autocast and FLOP counts; csrc/ and the overloads are not needed."""
    package = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("csrc", "*.so", "__pycache__"))
    for name, old, new in SLOPE:
        text = (package / name).read_text()
        # Of a signature in interface.py that is the function itself: overloads and the others read otherwise.
        assert text.count(old) == 1, (name, old)
        (package / name).write_text(text.replace(old, new))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", "import torch.utils.flop_counter" + SLOPED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_no_argument_is_found_by_its_place():
    """Outside call.py nothing slices or indexes a tuple of arguments."""
    found = []
    for name in ("ops.py", "interface.py", "reference.py", "sdpa.py"):
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
                if node.value.id in ("arguments", "call", "inputs", "options", "shapes", "values", "tensors"):
                    found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not found


# Types


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in Python 3.11")
@pytest.mark.parametrize("function", [flash_cosine_sim_attention, plain_cosine_sim_attention])
def test_overloads_have_the_signature_of_the_function(function):
    expected = inspect.signature(function).parameters
    overloads = typing.get_overloads(function)
    results = [inspect.signature(one).return_annotation for one in overloads]
    pair = tuple[torch.Tensor, torch.Tensor]
    assert results == [torch.Tensor, pair, torch.Tensor | pair]  # of False, True, and a variable
    for one in overloads:
        parameters = inspect.signature(one).parameters
        assert list(parameters) == list(expected)
        for name, parameter in parameters.items():
            assert parameter.kind == expected[name].kind
            if name != "return_partials":
                assert parameter.annotation == expected[name].annotation
                assert (parameter.default is ...) == (expected[name].default is not parameter.empty)
