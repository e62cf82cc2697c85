"""What all tests share: a fair share of the cores each, what is slow to make, and the gpu marker."""

import os
import traceback

import pytest

pytest.register_assert_rewrite("support")  # before it is imported: its assertions, too, say what they compared

# Before any test imports torch: workers of pytest-xdist that each take every core slow each other down, small products
# a thousandfold. They inherit what their parent, who comes through here too, has set for itself: that does not count.
_given = os.environ.setdefault("OMP_NUM_THREADS_GIVEN", os.environ.get("OMP_NUM_THREADS", ""))
_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ["OMP_NUM_THREADS"] = _given or str(max(1, min(_cores // _workers, 4)))


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """make_once(name, make) returns a folder that make(folder) has filled, once for all workers of pytest-xdist.

    The first worker that comes makes it, others wait. (They could run all tests of a file in one worker, but the group
    marks of pytest-xdist 3.8 have no effect with pytest 9.2.)
    """

    def run(name, make):
        import fcntl

        folder = tmp_path_factory.getbasetemp()
        folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
        folder.mkdir(exist_ok=True)
        failure = folder / "failure.txt"
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not failure.exists():
                try:
                    make(folder)
                    failure.touch()
                except Exception:
                    failure.write_text(traceback.format_exc())
        if failure.read_text():
            pytest.fail(failure.read_text(), pytrace=False)
        return folder

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file to train on, whose bytes are soon predicted."""
    path = tmp_path_factory.mktemp("corpus") / "text"
    words = b"the cat sat on the mat and the dog lay by the log while it rained "
    path.write_bytes(b"".join(words[i % 60 :] for i in range(1000)))
    return path


# Their tests take many seconds each: first, so that no worker is left with one of them at the end.
LONGEST = ("test_storm.py", "test_sweeps.py", "test_train.py")


_markers = pytest.StashKey[dict[str, list[str]]]()


@pytest.fixture(scope="session")
def all_markers(request):
    """By test, its markers: of every test there is, also those that -m or -k did not choose; None where some of them
    were not even collected, as the command line said.
    """
    config = request.config
    given = {(config.invocation_params.dir / argument).resolve() for argument in config.args}
    everything = {(config.rootpath / path).resolve() for path in config.getini("testpaths")}
    left_out = any(config.getoption(name, None) for name in ("ignore", "ignore_glob", "deselect", "lf"))
    return config.stash[_markers] if given == everything and not left_out else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    config.stash[_markers] = {item.nodeid: [mark.name for mark in item.iter_markers()] for item in items}
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
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
