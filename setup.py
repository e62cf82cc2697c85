"""Package flash_cosine_sim_attention and, where the machine can, compile its CUDA library.

The library `_C.abi3.so` is no Python module: it holds operators registered through LibTorch's stable ABI, and
torch.ops.load_library loads it. It uses no Python symbol, no C++ symbol of torch and its own copy of the CUDA
runtime, so one file serves torch 2.11 and newer on every Python from 3.10 (wheel tag cp310-abi3).

Environment variables
  FLASH_COSINE_SIM_SKIP_CUDA=1    never compile: a pure-Python package
  FLASH_COSINE_SIM_FORCE_CUDA=1   compile or fail; also allows a CPU build of torch, for compiling on one
                                  machine what runs on another
  CUDA_HOME or CUDA_PATH          where bin/nvcc is (else PATH, else /usr/local/cuda)
  TORCH_CUDA_ARCH_LIST            compute capabilities, such as "8.0;9.0a+PTX" (the default); the kernels written for
                                  Hopper come with 9.0a, not with 9.0
  MAX_JOBS                        compilers at once (default: cores, at most one for each 4 GiB of memory)
  NVCC_CCBIN                      the host compiler; nvcc itself reads this
  FLASH_COSINE_SIM_GLIBC          a folder with an older glibc to link against, which scripts/wheel.py makes: the
                                  library then loads on systems that are older than this one
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "flash_cosine_sim_attention"
PACKAGE_DIR = ROOT / "kernels" / PACKAGE
CSRC = PACKAGE_DIR / "csrc"
# Not the folder that setuptools names, which pip makes anew each time: a second build compiles only what changed.
BUILD_DIR = ROOT / "build" / "kernels"

OLDEST_TORCH = (2, 11)  # the first release whose stable ABI has all that binding.cpp calls
OLDEST_NVCC = (12, 1)  # the first whose PTX adds two floats at once (red.v2)
DEFAULT_ARCHS = "8.0;9.0a+PTX"
JOB_MEMORY_GIB = 4  # attention kernels full of templates are known to take 3 to 5 GiB a file in nvcc

# Commands that need to know whether there is a library. Metadata and sdist do not: they must work on any
# machine, at once, so torch is not imported for them.
BUILD_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


class KernelsUnavailable(Exception):
    """The CUDA library cannot be compiled here; says why, and the cure."""

    def __init__(self, reason: str, cure: str):
        again = "install again with --no-build-isolation --no-cache-dir --force-reinstall"  # pip keeps what it built
        super().__init__(f"{reason}; to get them, {cure} and {again}")


@dataclass(frozen=True)
class Instantiations:
    """The instances of a kernel template of csrc/: a file for each of `maths`, so that they compile at once."""

    header: str  # without .cuh; its folder says what the files are compiled for
    launch: str  # template <Math, int head_dim, ...> void launch(const parameters&, cudaStream_t)
    parameters: str
    maths: tuple[str, ...]  # keys of MATHS
    head_dims: dict[str, tuple[int, ...]]  # by key of MATHS, or by variant; "": of those that are not named
    arguments: dict[str, str] | None = None  # VARIANTS or WARPS: the last template argument by variant; None: no such
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)  # beside "", by key of MATHS

    def sources(self) -> dict[str, str]:
        """The text of each file, by its path in csrc/ if it were there."""
        return {
            f"{self.header}_{math}{variant}.cu": self.source(math, variant)
            for math in self.maths
            for variant in ("", *self.variants.get(math, ()))
        }

    def head_dims_of(self, math: str, variant: str = "") -> tuple[int, ...]:
        return self.head_dims.get(variant or math, self.head_dims[""])

    def source(self, math: str, variant: str) -> str:
        arguments = "" if self.arguments is None else f", {self.arguments[variant]}"
        instances = [
            f"template void {self.launch}<Math::{MATHS[math]}, {head_dim}{arguments}>"
            f"(const {self.parameters}&, cudaStream_t);"
            for head_dim in self.head_dims_of(math, variant)
        ]
        namespace = "namespace flash_cosine_sim"
        lines = [f'#include "{self.header}.cuh"', "", f"{namespace} {{", "", *instances, "", f"}}  // {namespace}", ""]
        return "\n".join(lines)


# Names of files, and what attention.h calls them.
MATHS = {"bf16": "kBf16", "fp16": "kFp16", "fp16_wide": "kFp16WideP", "fp32": "kFp32", "tf32": "kTf32"}
PORTABLE = ("bf16", "fp16", "fp32", "tf32")
HEAD_DIMS = (16, 32, 64, 96, 128, 256)
# Names of files, and what attention.h calls a Variant of the kernels of sm90/.
VARIANTS = {
    "": "Variant::kCausal",
    "_banded": "Variant::kBanded",
    "_scored": "Variant::kScored",
    "_scored_gradient": "Variant::kScoredGradient",
}
# The same of sm80/: kEightWarps.
WARPS = {"": "false", "_eight_warps": "true"}
EIGHT_WARPS = {"bf16": ("_eight_warps",), "fp16": ("_eight_warps",)}
# Linked into a library for older systems: what this system's headers take from its glibc and libstdc++, and those lack.
OLD_SYSTEMS_CPP = """#include <sstream>

// GCC 9 and 11 declare these `extern template`: else they would be taken from a libstdc++ that is as new. Of GCC 11 on.
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
template std::string std::ostringstream::str() const&;
template std::string std::ostringstream::str() &&;
template std::string std::stringstream::str() const&;
template std::string std::stringstream::str() &&;

// Since glibc 2.32; false costs shared pointers an atomic operation.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
"""
# Every kernel template of csrc/ that dispatch.cpp launches.
INSTANTIATIONS = (
    Instantiations(
        "sm80/forward",
        "launch_forward_sm80",
        "ForwardParams",
        tuple(MATHS),
        {"": HEAD_DIMS, "_eight_warps": (128,)},
        WARPS,
        EIGHT_WARPS,
    ),
    Instantiations(
        "sm80/forward_split",
        "launch_forward_split_sm80",
        "ForwardParams",
        tuple(MATHS),
        {"": HEAD_DIMS, "fp32": HEAD_DIMS[:-1], "tf32": HEAD_DIMS[:-1]},  # longer rows spill registers
    ),
    Instantiations(
        "sm80/backward",
        "launch_backward_sm80",
        "BackwardParams",
        PORTABLE,
        {"": HEAD_DIMS, "_eight_warps": (64, 96, 128)},
        WARPS,
        EIGHT_WARPS,
    ),
    Instantiations("sm80/bias_gradient", "launch_bias_gradient_sm80", "BackwardParams", PORTABLE, {"": HEAD_DIMS}),
    Instantiations(
        "sm90/forward",
        "launch_forward_sm90",
        "ForwardParams",
        PORTABLE[:2],
        {"": HEAD_DIMS[1:]},
        VARIANTS,
        {"bf16": ("_banded", "_scored"), "fp16": ("_banded",)},
    ),
    Instantiations(
        "sm90/backward",
        "launch_backward_sm90",
        "BackwardParams",
        PORTABLE[:2],
        {"": HEAD_DIMS[1:-1]},
        VARIANTS,
        {"bf16": ("_banded", "_scored", "_scored_gradient"), "fp16": ("_banded",)},
    ),
)


@dataclass(frozen=True)
class Arch:
    """One entry of TORCH_CUDA_ARCH_LIST; number 90 is compute capability 9.0, `specific` that it says 9.0a."""

    number: int
    ptx: bool
    specific: bool


@dataclass(frozen=True)
class Toolchain:
    nvcc: Path
    ninja: str
    torch_include: Path
    archs: tuple[Arch, ...]
    glibc: Path | None = None  # to link against; None: this system's


def main() -> None:
    if next((word for word in sys.argv[1:] if not word.startswith("-")), None) == "test":
        print("setup.py has no test command: `make test` runs lint and the tests that need no GPU", file=sys.stderr)
        raise SystemExit(2)
    toolchain = None
    if not BUILD_COMMANDS.isdisjoint(sys.argv[1:]):
        toolchain = choose_toolchain()
    setup(  # beside what pyproject.toml says
        package_dir={"": "kernels"},
        packages=[PACKAGE],
        package_data={PACKAGE: ["py.typed"]},  # its annotations are for its users' type checkers
        include_package_data=False,  # a wheel needs no csrc/, and no library left behind by an earlier build
        ext_modules=[] if toolchain is None else [kernel_extension()],
        cmdclass={"build_py": BuildModules} | ({} if toolchain is None else {"build_ext": kernel_builder(toolchain)}),
        options={} if toolchain is None else {"bdist_wheel": {"py_limited_api": "cp310"}},
        zip_safe=False,
    )


class BuildModules(build_py):
    """A build_py that begins with nothing: build/lib keeps modules of earlier builds, which would go into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


def choose_toolchain() -> Toolchain | None:
    """What compiles the library, or None for a pure-Python package; prints the reason for None."""
    skip, force = env_flag("FLASH_COSINE_SIM_SKIP_CUDA"), env_flag("FLASH_COSINE_SIM_FORCE_CUDA")
    if skip and force:
        raise SystemExit("FLASH_COSINE_SIM_SKIP_CUDA=1 contradicts FLASH_COSINE_SIM_FORCE_CUDA=1: set one")
    if skip:
        say("pure-Python build without CUDA kernels, as FLASH_COSINE_SIM_SKIP_CUDA=1 asks")
        return None
    try:
        return find_toolchain(allow_cpu_torch=force)
    except KernelsUnavailable as error:
        if force:
            raise SystemExit(f"{PACKAGE}: cannot build the CUDA kernels because {error}") from None
        say(f"pure-Python build without CUDA kernels because {error}")
        return None


def find_toolchain(*, allow_cpu_torch: bool) -> Toolchain:
    if not kernel_sources():
        raise KernelsUnavailable(f"{CSRC} has no .cu files", "use a version that ships some; backend='sdpa' works")
    if sys.platform != "linux":
        raise KernelsUnavailable(f"the platform is {sys.platform} and they build on linux only", "use Linux")
    torch = import_torch()
    nvcc = find_nvcc()
    check_cuda_versions(torch, nvcc_version(nvcc), nvcc, allow_cpu_torch=allow_cpu_torch)
    # pip puts ninja beside python, which is not on PATH in a virtual environment that is not activated.
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    ninja = shutil.which("ninja", path=os.pathsep.join(path))
    if ninja is None:
        raise KernelsUnavailable("ninja was not found", "run `pip install ninja`")
    archs = parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
    glibc = os.environ.get("FLASH_COSINE_SIM_GLIBC")
    if glibc and not Path(glibc, "libc.so").is_file():
        raise SystemExit(f"FLASH_COSINE_SIM_GLIBC must be a folder with a libc.so, got {glibc!r}")
    include = Path(torch.__file__).resolve().parent / "include"
    return Toolchain(nvcc, ninja, include, archs, Path(glibc).resolve() if glibc else None)


def kernel_sources() -> list[Path]:
    """The sources in csrc/."""
    cuda = sorted(CSRC.rglob("*.cu"))
    return cuda + sorted(CSRC.rglob("*.cpp")) if cuda else []


def write_instantiations(csrc: Path, folder: Path) -> list[Path]:
    """Write the sources of INSTANTIATIONS whose header is in csrc, touching none that says so already."""
    sources = []
    for kernel in INSTANTIATIONS:
        if not (csrc / f"{kernel.header}.cuh").exists():
            continue
        for name, text in kernel.sources().items():
            source = folder / name
            write_if_new(source, text)
            sources.append(source)
    return sources


def write_schemas(folder: Path) -> Path:
    """Write a source with the operators' schemas, for ops.py to see that the library was built for its own."""
    spec = importlib.util.spec_from_file_location("call", PACKAGE_DIR / "call.py")
    call = importlib.util.module_from_spec(spec)
    sys.modules["call"] = call  # where typing looks its names up
    spec.loader.exec_module(call)
    source = folder / "schemas.cpp"
    text = 'extern "C" __attribute__((visibility("default"))) const char flash_cosine_sim_schemas[] = "%s";\n'
    write_if_new(source, text % call.SCHEMAS)
    return source


def write_if_new(source: Path, text: str) -> None:
    """Leaves a file alone that says so already: it would be compiled again."""
    source.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.read_text(encoding="utf-8") != text:
        source.write_text(text, encoding="utf-8")


def is_for_sm90(source: Path) -> bool:
    """The folder of a source says what it is compiled for."""
    return source.parent.name == "sm90"


def import_torch():
    oldest = ".".join(map(str, OLDEST_TORCH))
    cure = f"run `pip install 'torch>={oldest}'`"
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's is missing
        raise KernelsUnavailable(f"torch cannot be imported by {sys.executable} ({error})", cure) from error
    if version_tuple(torch.__version__) < OLDEST_TORCH:
        raise KernelsUnavailable(f"torch is {torch.__version__} and {oldest} or newer is needed", cure)
    return torch


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:  # an explicit choice is never passed over for another toolkit
        nvcc, searched = Path(home, "bin", "nvcc"), f"{home}/bin, as CUDA_HOME or CUDA_PATH says"
    else:
        nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
        searched = "PATH and /usr/local/cuda/bin"
    if not nvcc.is_file():
        cure = "correct or unset CUDA_HOME or CUDA_PATH" if home else "install the CUDA toolkit or set CUDA_HOME"
        raise KernelsUnavailable(f"nvcc is not in {searched}", cure)
    return nvcc


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise KernelsUnavailable(f"`{nvcc} --version` names no release", "set CUDA_HOME to a working toolkit")
    return version_tuple(match[1])


def check_cuda_versions(torch, release: tuple[int, int], nvcc: Path, *, allow_cpu_torch: bool) -> None:
    found = f"{nvcc} is release {release[0]}.{release[1]}"
    if release < OLDEST_NVCC:
        raise KernelsUnavailable(f"{found} and 12.1 or newer is needed", "install a newer CUDA toolkit")
    if torch.version.cuda is None:
        if not allow_cpu_torch:
            raise KernelsUnavailable(
                f"torch {torch.__version__} is not a CUDA build and could not run them",
                "install a CUDA build of torch (or, to compile for another machine, set FLASH_COSINE_SIM_FORCE_CUDA=1)",
            )
    elif version_tuple(torch.version.cuda)[0] != release[0]:
        major = version_tuple(torch.version.cuda)[0]
        raise KernelsUnavailable(
            f"{found} but torch {torch.__version__} was built with CUDA {torch.version.cuda}",
            f"point CUDA_HOME to a CUDA {major} toolkit",
        )


def parse_archs(text: str) -> tuple[Arch, ...]:
    """'8.0;9.0a+PTX' becomes Arch(80, ptx=False, specific=False), Arch(90, ptx=True, specific=True)."""
    archs: dict[int, Arch] = {}
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a, 9.0+PTX, got {text!r}")
        number = int(match[1] + match[2])
        if number < 80:
            say(f"leaving out compute capability {entry}: the kernels need 8.0 or newer")
            continue
        before = archs.get(number, Arch(number, ptx=False, specific=False))
        archs[number] = Arch(number, ptx=bool(match[4]) or before.ptx, specific=match[3] == "a" or before.specific)
    if not archs:
        raise KernelsUnavailable(
            f"TORCH_CUDA_ARCH_LIST={text!r} has no compute capability of 8.0 or newer",
            "add one, such as 8.0, 9.0a or 9.0+PTX,",
        )
    if 90 in archs and not archs[90].specific:
        say("leaving out the kernels written for Hopper: TORCH_CUDA_ARCH_LIST has 9.0, and they need 9.0a")
    return tuple(archs[number] for number in sorted(archs))


def kernel_extension() -> Extension:
    sources = [str(source.relative_to(ROOT)) for source in kernel_sources()]
    return Extension(f"{PACKAGE}._C", sources, py_limited_api=True)


def kernel_builder(toolchain: Toolchain) -> type[build_ext]:
    """A build_ext that compiles with nvcc through ninja.

    torch's BuildExtension is not used: it gives every file the same targets, links libraries that a CPU build
    of torch lacks, and offers torch's headers to .cu files, which are to compile without them.
    """

    class BuildKernels(build_ext):
        def build_extension(self, ext: Extension) -> None:
            library = Path(self.get_ext_fullpath(ext.name)).resolve()
            library.parent.mkdir(parents=True, exist_ok=True)
            BUILD_DIR.mkdir(parents=True, exist_ok=True)
            sources = kernel_sources() + write_instantiations(CSRC, BUILD_DIR)
            sources.append(write_schemas(BUILD_DIR))
            if toolchain.glibc is not None:
                sources.append(BUILD_DIR / "old_systems.cpp")
                write_if_new(sources[-1], OLD_SYSTEMS_CPP)
            if not has_sm90(toolchain):
                sources = [source for source in sources if not is_for_sm90(source)]
            (BUILD_DIR / "build.ninja").write_text(ninja_file(toolchain, sources, library), encoding="utf-8")
            jobs = max_jobs(len(sources))
            targets = " ".join(
                f"{arch.number / 10}{'a' if arch.specific else ''}{'+PTX' if arch.ptx else ''}"
                for arch in toolchain.archs
            )
            say(f"compiling {len(sources)} files for {targets}, {jobs} at once, with {toolchain.nvcc}")
            result = subprocess.run([toolchain.ninja, "-C", str(BUILD_DIR), "-j", str(jobs)], check=False)
            if result.returncode != 0:
                raise SystemExit(f"{PACKAGE}: the CUDA kernels did not compile; the compiler's message is above")

    return BuildKernels


def has_sm90(toolchain: Toolchain) -> bool:
    return any(arch.number == 90 and arch.specific for arch in toolchain.archs)


def ninja_file(toolchain: Toolchain, sources: list[Path], library: Path) -> str:
    compile_flags = "-O3 -std=c++20 -DNDEBUG --expt-relaxed-constexpr -lineinfo".split()
    compile_flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    compile_flags += [f"-I{CSRC}"]
    # dispatch.cpp must not name what the files of sm90/ define when they are left out.
    compile_flags += [f"-DFLASH_COSINE_SIM_HAS_SM90={int(has_sm90(toolchain))}"]
    # -nodlink: no file uses relocatable device code; linking it adds an empty image for nvcc's oldest target.
    link_flags = "-shared -nodlink -cudart static -Xlinker --exclude-libs,ALL".split()
    if toolchain.glibc is not None:
        link_flags.append(f"-L{toolchain.glibc}")  # before the system's
    # torch loads its own libraries privately: unless libtorch.so is named here, the symbols of its C shim
    # would not be found. CPU and CUDA builds both have one; it brings in what they consist of, but defines
    # nothing itself, hence --no-as-needed.
    link_flags += ["-Xlinker", "--no-as-needed", f"-L{toolchain.torch_include.parent / 'lib'}", "-ltorch"]
    compile_command = ninja_command([str(toolchain.nvcc), *compile_flags])
    link_command = ninja_command([str(toolchain.nvcc), *link_flags])
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compile_command} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f"  command = {link_command} -o $out $in",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        folder = CSRC if source.is_relative_to(CSRC) else BUILD_DIR
        objects.append(f"{source.relative_to(folder)}.o")
        lines.append(f"build {objects[-1]}: compile {ninja_path(source)}")
        lines.append(f"  flags = {file_flags(source, toolchain)}")
    lines += [f"build {ninja_path(library)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def file_flags(source: Path, toolchain: Toolchain) -> str:
    if source.suffix == ".cpp":
        # The only files that see torch, and of it only the part that stays the same from 2.11 on.
        version = "".join(f"{part:02x}" for part in OLDEST_TORCH).ljust(16, "0")
        flags = [f"-DTORCH_TARGET_VERSION=0x{version}", "-DPy_LIMITED_API=0x030a0000"]
        flags += ["-DUSE_CUDA"]  # torch's C shim declares the current CUDA stream only then
        return ninja_command([*flags, "-isystem", str(toolchain.torch_include)])
    if is_for_sm90(source):
        # wgmma exists for 9.0a alone, and code for 9.0a runs on 9.0 alone: no other target, and no PTX.
        return ninja_command(["-gencode", "arch=compute_90a,code=sm_90a"])
    flags = []
    for arch in toolchain.archs:
        codes = f"sm_{arch.number},compute_{arch.number}" if arch.ptx else f"sm_{arch.number}"
        flags += ["-gencode", f"arch=compute_{arch.number},code=[{codes}]"]
    return ninja_command(flags)


def ninja_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def max_jobs(num_files: int) -> int:
    text = os.environ.get("MAX_JOBS")
    if text:
        if not text.isdigit() or int(text) < 1:
            raise SystemExit(f"MAX_JOBS must be a positive integer, got {text!r}")
        return int(text)
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, num_files, int(available_memory_gib() // JOB_MEMORY_GIB)))


def available_memory_gib() -> float:
    """Memory that may still be used: of the machine, and of the container if it has a limit."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        limits += [int(kib) * 1024 for kib in re.findall(r"MemAvailable:\s+(\d+)", meminfo.read_text())]
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and container.read_text().strip().isdigit():
        limits.append(int(container.read_text()))
    return min(limits, default=JOB_MEMORY_GIB * 2**30) / 2**30


def say(sentence: str) -> None:
    print(f"{PACKAGE}: {sentence}", flush=True)  # ahead of what the compilers print


def env_flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


def version_tuple(version: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


if __name__ == "__main__":
    main()
