"""Building the package from a checkout, in processes of their own, and what a built library holds."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

PACKAGE = "flash_cosine_sim_attention"
BUILD_VARIABLES = ["CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH"]


def copy_sources(destination: Path, *, csrc: dict[str, str] | None = None) -> Path:
    """A checkout as setup.py sees it, with the given kernel sources in place of the real ones."""
    destination.mkdir(parents=True)
    for name in ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"]:
        shutil.copy(ROOT / name, destination)
    # Folders of the trainer, which no wheel may pick up.
    for name in ["models", "data", "conf", "scripts", "tests"]:
        (destination / name).mkdir()
        (destination / name / "__init__.py").touch()
    package = destination / "kernels" / PACKAGE
    shutil.copytree(ROOT / "kernels" / PACKAGE, package, ignore=shutil.ignore_patterns("csrc", "*.so", "__pycache__"))
    for name, text in (csrc or {}).items():
        (package / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (package / "csrc" / name).write_text(text)
    return destination


def build_environment(**variables: str) -> dict[str, str]:
    """The environment without what would steer a build, plus `variables`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in BUILD_VARIABLES and not name.startswith("FLASH_COSINE_SIM_")
    }
    return {**kept, **variables}


def compiling_environment(archs: str, **variables: str) -> dict[str, str]:
    """Compiles for `archs`; forced, as torch may be a CPU build."""
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if cuda_home:
        variables["CUDA_HOME"] = cuda_home
    return build_environment(**variables, FLASH_COSINE_SIM_FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=archs)


def run_python(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def build_in_place(tree: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    return run_python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, env=env)


def missing_tool() -> str | None:
    """What this machine lacks for compiling the probe, sought where setup.py seeks it."""
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if not shutil.which("nvcc", path=f"{cuda_home}/bin" if cuda_home else None):
        return "nvcc (in CUDA_HOME/bin or PATH)"
    if not shutil.which("ninja", path=beside_python):
        return "ninja"
    return None if shutil.which("nm") else "nm"


skip_without_nvcc = pytest.mark.skipif(missing_tool() is not None, reason=f"compiling needs {missing_tool()}")


def assert_only_the_stable_abi(library: Path) -> None:
    listing = subprocess.run(["nm", "-DC", str(library)], capture_output=True, text=True, check=True).stdout
    undefined = [line.split(maxsplit=1)[1] for line in listing.splitlines() if line.split()[0] in "Uw"]
    assert [name for name in undefined if name.startswith(("aoti_torch_", "torch_"))]
    foreign = re.compile(r"\b(at|c10|caffe2|torch|pybind11)::|^_?Py|^cuda|^cu[A-Z]")
    assert not [name for name in undefined if foreign.search(name)]


def device_code(library: Path) -> list[tuple[str, int]]:
    """(kind, architecture) of every entry in the library's fat binaries, as cuobjdump would list them."""
    content = library.read_bytes()
    entries = []
    for header in re.finditer(re.escape(b"\x50\xed\x55\xba\x01\x00\x10\x00"), content):
        offset, end = header.end() + 8, header.end() + 8 + struct.unpack_from("<Q", content, header.end())[0]
        while offset < end:
            kind, _, header_size, size = struct.unpack_from("<HHIQ", content, offset)
            (architecture,) = struct.unpack_from("<I", content, offset + 28)
            entries.append(({1: "ptx", 2: "code"}[kind], architecture))
            offset += header_size + size
    return sorted(entries)
