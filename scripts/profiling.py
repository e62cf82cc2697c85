"""What a GPU runs and how long it is busy, by PyTorch's profiler."""

from collections.abc import Callable, Iterable

import torch


def kernels(call: Callable[[], object], device: torch.device) -> list[tuple[str, float, float]]:
    """Name, start and end, in microseconds, of all that a call has the GPU do: kernels, copies and memsets.

    Raises ValueError where the profiler saw nothing.
    """
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    found = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not found:
        raise ValueError("the profiler saw no kernel: is another one attached to this GPU?")
    return found


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the time (start, end) spans cover: where kernels run at once, it counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
