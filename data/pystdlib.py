"""Python's own standard library as a corpus: the one text of megabytes that every machine with Python has."""

import hashlib
import os
import platform
import sysconfig
from pathlib import Path

import numpy as np

from data.bytes import ByteCorpus
from data.files import list_files

# Third-party code and byte code are not the library.
SKIPPED_ALWAYS = {"site-packages", "dist-packages", "__pycache__"}
# Distributions package these separately or not at all; without them sizes agree to a few percent everywhere.
SKIPPED_IN_CORE = {
    *("test", "tests", "idlelib", "idle_test", "tkinter", "turtledemo"),
    *("lib2to3", "distutils", "ensurepip", "pydoc_data"),
}
SUBSETS = ("core", "full")


def pystdlib(subset: str = "core") -> ByteCorpus:
    """Read the running Python's own *.py files: "core", about 9 MB, or "full", 31 MB with the tests.

    Files come in the byte order of their paths, without links, empty files, exact duplicates and
    `_sysconfigdata*` (it holds paths of the machine that built Python). Splits hold whole files, chosen by
    a hash of the path: 18/20 train, 1/20 val, 1/20 test, so that an added file moves no other. The bytes
    differ between Python releases: compare results only where provenance["sha256"] agrees.
    Raises ValueError for another subset, FileNotFoundError where sources (for "full", tests) are missing.
    """
    if subset not in SUBSETS:
        raise ValueError(f"data.subset must be core or full, got {subset!r}")
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise FileNotFoundError(f"the standard library at {root} has no .py files to read (a zipped Python?)")
    # Some distributions ship a `test` folder of helpers without the tests: look for one of the tests.
    if subset == "full" and not (root / "test" / "test_grammar.py").is_file():
        raise FileNotFoundError(
            f"data.subset=full needs the `test` package of the standard library, and {root} has none: "
            "install it (on Debian: libpython3-testsuite) or use data.subset=core"
        )
    splits, num_files = _read_splits(root, _list_sources(root, core=subset == "core"))
    joined = np.frombuffer(b"".join(splits.values()), dtype=np.uint8)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return ByteCorpus.cut(
        f"pystdlib-{subset}",
        joined,
        num_val=len(splits["val"]),
        num_test=len(splits["test"]),
        provenance={"source": f"standard library, {subset}", "python": python, "files": num_files},
    )


def split_of(path: str) -> str:
    """Name the split of a file by its POSIX path relative to the library: "train", "val" or "test"."""
    bucket = int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big") % 20
    return {18: "val", 19: "test"}.get(bucket, "train")


def _list_sources(root: Path, *, core: bool) -> list[str]:
    def keep_folder(name: str) -> bool:
        in_core = name not in SKIPPED_IN_CORE and not name.startswith("config")
        return name not in SKIPPED_ALWAYS and (in_core or not core)

    def keep_file(name: str) -> bool:
        return name.endswith(".py") and not name.startswith("_sysconfigdata")

    return list_files(root, keep_folder, keep_file)


def _read_splits(root: Path, paths: list[str]) -> tuple[dict[str, bytes], int]:
    """Return the bytes of each split and the number of files read; of equal files the first counts."""
    parts: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
    seen = {b""}
    for path in paths:
        content = (root / path).read_bytes()
        if content not in seen:
            seen.add(content)
            parts[split_of(path)].append(content)
    return {split: b"".join(contents) for split, contents in parts.items()}, len(seen) - 1
