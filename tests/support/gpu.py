"""What the tests of the kernels on a GPU share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_cosine_sim_attention import flash_cosine_sim_attention, ops

DEVICE = "cuda"
LOW_DTYPES = [torch.bfloat16, torch.float16]
NEEDS_KERNELS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; PyTorch sees none"),
    pytest.mark.skipif(not ops.kernels_available(), reason=f"needs the CUDA kernels: {ops.kernels_error()}"),
]


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


NEEDS_HOPPER = pytest.mark.skipif(not is_hopper(), reason="needs a GPU of compute capability 9.0")
GUARD = 65536  # elements


@pytest.fixture(autouse=True)
def settings():
    """PyTorch's as the tests mean them; where a module imports it, it is each of its tests'."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    # Of SDPA's kernels cuDNN's is left out: it takes a while to plan for every new shape.
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.use_deterministic_algorithms(False)


def assert_repeatable(case):
    """In deterministic mode, for the call under test alone: not all that a check does has a deterministic variant."""
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(case.dtype).items()}
    options, do, first = case.options(), torch.randn_like(tensors["q"]), None
    for _ in range(10):
        torch.use_deterministic_algorithms(True)
        o = flash_cosine_sim_attention(**tensors, **options, backend="cuda")
        found = (o.detach(), *torch.autograd.grad(o, tensors.values(), do))
        torch.use_deterministic_algorithms(False)
        first = first or found
        for one, other in zip(found, first, strict=True):
            assert one.isfinite().all() and torch.equal(one, other)


def kernels_of(function: Callable[[], object]) -> list[str]:
    """The names of the kernels that a call launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


def hopper_variants(names: list[str]) -> tuple[str, str]:
    """attention.h's Variant of the forward and of the backward kernel of sm90/ among them, one of each."""
    variants = []
    for kernel in ("forward_sm90_kernel", "backward_sm90_kernel"):
        (name,) = [name for name in names if kernel in name]
        variants.append(name.split("<")[-1].split(">")[0][-1])  # the last template argument
    return variants[0], variants[1]


def guarded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as leaves that require gradients, each with a page of NaN on either side."""
    found = {}
    for name, tensor in tensors.items():
        memory = torch.full((tensor.numel() + 2 * GUARD,), torch.nan, dtype=tensor.dtype, device=DEVICE)
        memory[GUARD:-GUARD] = tensor.flatten()
        found[name] = memory[GUARD:-GUARD].view(tensor.shape).requires_grad_()
    return found


def fill_free_memory(byte):
    """Leave `byte` everywhere in what the caching allocator hands out next; 0xff is NaN in every dtype."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # From small to large: the small ones also fill the gaps beside memory that is in use.
    kib_and_counts = [(0.5, 4096), (2, 1024), (16, 256), (128, 64), (1024, 16)]  # the allocator's pool of small blocks
    kib_and_counts += [(1100, 16), (4 * 1024, 16), (64 * 1024, 4)]  # and that of large ones
    blocks = [
        torch.full((int(kib * 1024),), byte, dtype=torch.uint8, device=DEVICE)
        for kib, count in kib_and_counts
        for _ in range(count)
    ]
    torch.cuda.synchronize()
    del blocks


def replayed(step: Callable[[], tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """What a CUDA graph of ``step`` gives for other values of ``inputs``, which keep them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    return captured
