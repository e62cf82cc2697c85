"""What all tests share: a fair share of the cores each, and the gpu marker."""

import os

import pytest

# Before any test imports torch: workers of pytest-xdist that each take every core slow each other down.
_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(_cores // _workers, 4))))


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available():
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    skip = pytest.mark.skip(reason=f"needs a CUDA GPU; torch {torch.__version__} ({build} build) sees none")
    for item in gpu_items:
        item.add_marker(skip)
