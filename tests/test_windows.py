"""Windows, packed sequences and masks on a GPU: exact, repeatable, by the kernels that are meant for them."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from support.cases import Case, describe
from support.gates import GATES, check
from support.gpu import (
    DEVICE,
    LOW_DTYPES,
    NEEDS_HOPPER,
    NEEDS_KERNELS,
    assert_repeatable,
    fill_free_memory,
    guarded,
    hopper_variants,
    kernels_of,
    replayed,
    settings,  # noqa: F401
)
from support.packed import PACKED, WINDOWS, WRONG_CU_SEQLENS, Packed, attend_packed, check_packed, in_order

from flash_cosine_sim_attention import flash_cosine_sim_attention

pytestmark = NEEDS_KERNELS

DTYPES = list(GATES)
HEAD_DIMS = [16, 32, 64, 96, 128, 256, 40, 80]
# Many tiles, walks that several blocks share, rows that the kernels prepare ahead of them.
LARGE = {
    "causal": {"window_size": (512, -1), "causal": True},
    "both": {"window_size": (300, 200), "num_kv_heads": 2},
    "masked": {"mask": True, "causal": True},
    "more-keys": {"window_size": (128, 63), "seq_len_q": 700, "learned_scale": True},
    "split": {
        "batch": 1,
        "num_heads": 4,
        "num_kv_heads": 1,
        "seq_len_k": 150,
        "window_size": (600, -1),
        "causal": True,
    },
}


def window_cases():
    for index, (name, options) in enumerate(WINDOWS.items()):
        for dim_index, head_dim in enumerate(HEAD_DIMS):
            for dtype_index, dtype in enumerate(DTYPES):
                if (index + dim_index + dtype_index) % 2:
                    bias = "heads" if (index + dim_index) % 5 == 0 else None
                    yield name, Case(dtype=dtype, head_dim=head_dim, device=DEVICE, bias=bias, **options)


@pytest.mark.parametrize(
    ("_name", "case"), list(window_cases()), ids=lambda x: x if isinstance(x, str) else describe(x)
)
def test_windows(_name, case):
    check(case, ["cuda"])


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 96])
@pytest.mark.parametrize("name", LARGE)
def test_large_windows(name, head_dim, dtype):
    # The largest of the errors is one number's chance, the more so the fewer there are: a batch of six.
    case = Case(**{"dtype": dtype, "head_dim": head_dim, "device": DEVICE, "batch": 6, "num_heads": 8,
                   "num_kv_heads": 8, "seq_len_q": 1300, "seq_len_k": 1300, **LARGE[name]})  # fmt: skip
    check(case, ["cuda"])
    assert_repeatable(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_window_of_a_querys_own_key_gives_its_value(dtype, head_dim):
    q, k, v = torch.randn(3, 2, 4, 300, head_dim, device=DEVICE, dtype=dtype)
    o = flash_cosine_sim_attention(q, k, v, window_size=(0, 0), backend="cuda")
    if dtype == torch.float32:
        assert (o - v).abs().max() <= 1e-6 * v.abs().max()
    else:
        assert torch.equal(o, v)


def packed_cases():
    for index, (name, case) in enumerate(PACKED.items()):
        for dim_index, head_dim in enumerate(HEAD_DIMS):
            dtype = DTYPES[(index + dim_index) % len(DTYPES)]
            yield pytest.param(
                replace(case, head_dim=head_dim, dtype=dtype, device=DEVICE), id=f"{name}-d{head_dim}-{dtype}"
            )


@pytest.mark.parametrize("case", list(packed_cases()))
def test_packed(case):
    groups = case.groups if case.head_dim % (8 * case.groups) == 0 else 1
    check_packed(replace(case, groups=groups), "cuda")


LENGTHS = (700, 64, 1, 333, 2048, 0, 129, 500)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window_size", [None, (256, -1)])
def test_many_packed_tokens(dtype, head_dim, window_size):
    case = Packed(LENGTHS, causal=True, dtype=dtype, head_dim=head_dim, window_size=window_size, device=DEVICE)
    check_packed(replace(case, num_heads=8, num_kv_heads=4, behind=33), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window_size", [None, (100, 30)])
def test_packed_is_repeatable_whatever_memory_holds(dtype, head_dim, window_size, request):
    """The forward pass always, the backward pass in deterministic mode: bit for bit, over NaN and other leftovers."""
    request.addfinalizer(lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", True))
    torch.utils.deterministic.fill_uninitialized_memory = False  # else NaN of PyTorch's own would hide what is left
    case = Packed(LENGTHS[:4], LENGTHS[3::-1], 33, dtype, causal=window_size is None, window_size=window_size)
    case = replace(case, head_dim=head_dim, num_heads=4, device=DEVICE)
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(dtype).items()}
    options, do = case.options(), torch.randn_like(tensors["q"])
    first = None
    for byte in (0xFF, 0x00, 0x7F, 0xFF):
        fill_free_memory(byte)
        torch.use_deterministic_algorithms(True)
        o = attend_packed("cuda", **tensors, **options)
        found = (o.detach(), *torch.autograd.grad(o, tensors.values(), do))
        torch.use_deterministic_algorithms(False)
        assert torch.equal(attend_packed("cuda", **tensors, **options).detach(), found[0])
        first = first or found
        for one, other in zip(found, first, strict=True):
            assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_the_batch(dtype, causal):
    """Equal lengths: packed or as a batch, the same up to the order of float32 sums."""
    case = Packed((256,) * 4, dtype=dtype, causal=causal, device=DEVICE, num_heads=4, num_kv_heads=2)
    tensors, do = case.tensors(dtype), torch.randn(1024, 4, 64, dtype=dtype, device=DEVICE)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    o = attend_packed("cuda", **tensors, **case.options())
    q, k, v = (leaf.unflatten(0, (4, 256)).transpose(1, 2) for leaf in leaves)
    batch = flash_cosine_sim_attention(q, k, v, scale=10.0, causal=causal, backend="cuda").transpose(1, 2).flatten(0, 1)
    found, expected = ((x, *torch.autograd.grad(x, leaves, do)) for x in (o, batch))
    for one, other in zip(found, expected, strict=True):
        error = (one - other).double().square().mean().sqrt() / other.double().square().mean().sqrt()
        assert error <= {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype], error


@NEEDS_HOPPER
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("call", ["window", "packed", "mask", "plain"])
def test_hopper_kernels_run(call, dtype):
    """Calls with a window, packed sequences or a mask run on Hopper's kernels, in both directions."""
    shape = 2, 4, 512, 64
    packed = Packed((200, 312), causal=True, dtype=dtype, device=DEVICE, num_heads=8, num_kv_heads=8)
    q = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 512, device=DEVICE, dtype=torch.bool)
    options = {"window": {"window_size": (100, -1)}, "mask": {"mask": mask}, "plain": {}}
    tensors = {name: tensor.requires_grad_() for name, tensor in packed.tensors(dtype).items()}

    def run():
        if call == "packed":
            o = attend_packed("cuda", **tensors, **packed.options())
        else:
            o = flash_cosine_sim_attention(q, q, q, scale=10.0, causal=True, backend="cuda", **options[call])
        o.sum().backward()

    names = kernels_of(run)
    variant = "0" if call == "plain" else "1"
    assert hopper_variants(names) == (variant, variant), names
    assert not any("sm80" in name for name in names)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("cu_seqlens", WRONG_CU_SEQLENS.values(), ids=WRONG_CU_SEQLENS)
def test_wrong_cu_seqlens_end_and_touch_nothing_else(cu_seqlens, is_deterministic, head_dim):
    """And are read as the largest so far."""
    case = Packed((100, 30), causal=True, window_size=(20, -1), head_dim=head_dim, device=DEVICE)
    wrong = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    tensors = guarded(case.tensors(case.dtype))
    options = {**case.options(), "cu_seqlens_q": wrong, "cu_seqlens_k": wrong}
    torch.use_deterministic_algorithms(is_deterministic)
    o = attend_packed("cuda", **tensors, **options)
    gradients = torch.autograd.grad(o, tensors.values(), torch.ones_like(o))
    torch.cuda.synchronize()
    assert all(result.isfinite().all() for result in (o, *gradients))
    right = in_order(wrong, 130)
    assert o.equal(attend_packed("cuda", **tensors, **{**options, "cu_seqlens_q": right, "cu_seqlens_k": right}))


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_hidden_keys_may_be_anything_finite(dtype):
    """Keys outside a window, of other sequences and behind the last: o and the other gradients do not know them."""
    lengths = (300, 200)
    case = Packed(lengths, behind=100, causal=True, window_size=(90, -1), dtype=dtype, device=DEVICE)
    tensors = case.tensors(dtype)
    o = attend_packed("cuda", **tensors, **case.options())
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in "kv":
        changed[name][:209] = 1e4  # the last query of the first sequence sees keys from 209 on
        changed[name][500:] = -1e4
    again = attend_packed("cuda", **changed, **case.options())
    assert torch.equal(o[299:], again[299:])
    starts = [0, *accumulate(lengths)]
    assert starts[1] == 300 and (o[500:] == 0).all()


@pytest.mark.parametrize("options", [{"window_size": (200, -1)}, {"mask": True}], ids=str)
def test_cuda_graph(options):
    q = torch.randn(2, 4, 600, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    if "mask" in options:
        options = {"mask": torch.rand(2, 600, device=DEVICE) < 0.7}

    def step():
        o = flash_cosine_sim_attention(q, q, q, causal=True, backend="cuda", **options)
        return o.detach(), *torch.autograd.grad(o, q, torch.ones_like(o))

    captured = replayed(step, q)
    assert torch.equal(captured[0], step()[0])
