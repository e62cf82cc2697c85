"""What an installation consists of, and how setup.py behaves where torch, nvcc or both are missing."""

import ast
import json
import os
import re
import shutil
import statistics
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import ROOT
from support.building import (
    PACKAGE,
    assert_only_the_stable_abi,
    build_environment,
    build_in_place,
    compiling_environment,
    copy_sources,
    device_code,
    run_python,
    skip_without_nvcc,
)

from flash_cosine_sim_attention.call import SCHEMAS

pytestmark = pytest.mark.slow  # most build the package, in processes of their own

PROBE_CU = """
__global__ void double_kernel(float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] *= 2;
}
int launch_double(float* x, int n, void* stream) {
  double_kernel<<<(n + 255) / 256, 256, 0, static_cast<cudaStream_t>(stream)>>>(x, n);
  return int(cudaGetLastError());
}
"""

# sm_90 has no setmaxnreg, sm_90a has: this compiles only if setup.py gives the files of sm90/ their own target.
PROBE_SM90_CU = """
__global__ void registers_kernel() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }
int launch_registers() {
  registers_kernel<<<1, 128>>>();
  return int(cudaGetLastError());
}
"""

BINDING_CPP = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if FLASH_COSINE_SIM_HAS_SM90
int launch_registers();
#endif
int launch_double(float* x, int n, void* stream);

// Weak: a CPU build of torch has no such symbol, and must load the library nevertheless.
#pragma weak aoti_torch_get_current_cuda_stream

using torch::stable::Tensor;

Tensor doubled(const Tensor& x) {
  Tensor out = torch::stable::clone(x);
  if (x.device().type() == torch::headeronly::DeviceType::CPU) {
    float* data = out.mutable_data_ptr<float>();
    for (int64_t i = 0; i < out.numel(); ++i) data[i] *= 2;
    return out;
  }
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0, "no stream");
  STD_TORCH_CHECK(launch_double(out.mutable_data_ptr<float>(), out.numel(), stream) == 0, "launch failed");
#if FLASH_COSINE_SIM_HAS_SM90
  STD_TORCH_CHECK(launch_registers() == 0, "launch failed");
#endif
  return out;
}

STABLE_TORCH_LIBRARY(flash_cosine_sim_attention_probe, m) { m.def("doubled(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(flash_cosine_sim_attention_probe, CompositeExplicitAutograd, m) {
  m.impl("doubled", TORCH_BOX(&doubled));
}
"""

LOAD_AND_CALL = """
import sys
import torch
library, device = sys.argv[1:]
torch.ops.load_library(library)
out = torch.ops.flash_cosine_sim_attention_probe.doubled(torch.arange(4.0, device=device))
assert out.tolist() == [0.0, 2.0, 4.0, 6.0], out
"""

PEP_517_HOOK = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def bare_environment(folder: Path) -> dict[str, str]:
    """A machine without torch, nvcc and ninja, though the Python that runs this has them."""
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('no torch here')\n")
    return build_environment(PATH=str(blocked), CUDA_HOME=str(blocked), PYTHONPATH=str(blocked))


def run_hook(hook: str, tree: Path, env: dict[str, str]) -> str:
    """Call a PEP 517 hook as pip does; what it makes lies in tree/out. Returns what it printed."""
    (tree / "out").mkdir(exist_ok=True)
    result = run_python("-c", PEP_517_HOOK, hook, "out", cwd=tree, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def bare_wheel(tmp_path_factory):
    """The wheel that a machine without torch, nvcc and ninja builds from a checkout with CUDA sources."""
    folder = tmp_path_factory.mktemp("bare")
    tree = copy_sources(folder / "tree", csrc={"probe.cu": PROBE_CU})
    output = run_hook("build_wheel", tree, bare_environment(folder))
    (wheel,) = (tree / "out").glob("*.whl")
    return wheel, output


@pytest.fixture(scope="module")
def metadata(bare_wheel):
    with zipfile.ZipFile(bare_wheel[0]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def package_constant(name: str) -> str:
    tree = ast.parse((ROOT / "kernels" / PACKAGE / "identity.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"identity.py sets no {name}")


def package_version() -> str:
    return package_constant("__version__")


# Without torch, nvcc and ninja


def test_metadata_builds_without_torch_or_nvcc(tmp_path):
    tree = copy_sources(tmp_path / "tree", csrc={"probe.cu": PROBE_CU})
    output = run_hook("prepare_metadata_for_build_wheel", tree, bare_environment(tmp_path))
    assert list((tree / "out").glob("*.dist-info/METADATA"))
    assert "CUDA kernels" not in output  # nothing was decided, so nothing is announced


def test_pure_wheel_holds_the_package_and_nothing_else(bare_wheel):
    wheel, output = bare_wheel
    assert wheel.name == f"{PACKAGE}-{package_version()}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
    expected = [f"{PACKAGE}/{path.name}" for path in (ROOT / "kernels" / PACKAGE).glob("*.py")]
    assert sorted(files) == sorted([*expected, f"{PACKAGE}/py.typed"])
    assert f"{PACKAGE}/__init__.py" in files
    assert output.count("pure-Python build without CUDA kernels because torch cannot be imported") == 1


def test_a_wheel_has_no_modules_of_earlier_builds(tmp_path):
    """pip builds a folder in place, and setuptools leaves build/lib as it was."""
    tree, environment = copy_sources(tmp_path / "tree"), bare_environment(tmp_path)
    gone = tree / "kernels" / PACKAGE / "gone.py"
    gone.touch()
    for there in (True, False):
        shutil.rmtree(tree / "out", ignore_errors=True)
        run_hook("build_wheel", tree, environment)
        (wheel,) = (tree / "out").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            assert (f"{PACKAGE}/gone.py" in archive.namelist()) == there
        gone.unlink(missing_ok=True)


def test_sdist_holds_what_compiles_the_kernels(tmp_path):
    tree = copy_sources(tmp_path / "tree")
    csrc = f"kernels/{PACKAGE}/csrc"
    shutil.copytree(ROOT / csrc, tree / csrc)
    run_hook("build_sdist", tree, bare_environment(tmp_path))
    (sdist,) = (tree / "out").glob("*.tar.gz")
    # Python has had the filter since 3.11.4 and 3.10.12, and from 3.12 on warns without one.
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(sdist, tmp_path / "unpacked", **options)
    (root,) = (tmp_path / "unpacked").iterdir()
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / csrc).rglob("*") if path.is_file()}
    others = {"setup.py", "pyproject.toml", "LICENSE", "README.md", f"kernels/{PACKAGE}/py.typed"}
    assert others | sources <= files
    assert {f"{csrc}/{name}" for name in ["binding.cpp", "rowwise/normalize.cu", "sm90/forward.cuh"]} <= sources
    assert not {name.split("/")[0] for name in files} & {"models", "data", "conf", "scripts", "tests"}


def test_the_sdist_installs_and_works_without_torch_to_build_with_nor_a_gpu(tmp_path):
    tree = copy_sources(tmp_path / "tree")
    shutil.copytree(ROOT / "kernels" / PACKAGE / "csrc", tree / "kernels" / PACKAGE / "csrc")
    bare = bare_environment(tmp_path)
    run_hook("build_sdist", tree, bare)
    (sdist,) = (tree / "out").glob("*.tar.gz")
    pip = "-m pip install --disable-pip-version-check -q --no-index --no-deps --no-build-isolation --target".split()
    result = run_python(*pip, str(tmp_path / "site"), str(sdist), cwd=tmp_path, env=bare)
    assert result.returncode == 0, result.stderr
    installed = build_environment(PYTHONPATH=str(tmp_path / "site"), CUDA_VISIBLE_DEVICES="")
    command = "-W ignore -m flash_cosine_sim_attention.doctor --no-speed --json -".split()
    result = run_python(*command, cwd=tmp_path, env=installed)
    report = json.loads(result.stdout)
    assert (result.returncode, report["library"]["file"], report["gpus"]) == (1, None, [])
    assert all(one["right"] for one in report["self_test"])
    code = f"import {PACKAGE}; print({PACKAGE}.__file__)"
    result = run_python("-W", "ignore", "-c", code, cwd=tmp_path, env=installed)
    assert result.stdout.strip() == str(tmp_path / "site" / PACKAGE / "__init__.py")


def test_editable_install_exposes_kernels_folder_alone(tmp_path):
    tree = copy_sources(tmp_path / "tree")
    run_hook("build_editable", tree, bare_environment(tmp_path))
    (wheel,) = (tree / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (pth,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert archive.read(pth).decode().split() == [str(tree / "kernels")]


def test_setup_py_test_names_the_command_that_runs_the_tests(tmp_path):
    """The predecessor's README says `python setup.py test`, a command that setuptools no longer has."""
    tree, environment = copy_sources(tmp_path / "tree"), bare_environment(tmp_path)
    for arguments in (["test"], ["-q", "test", "--addopts=-x"]):
        result = run_python("setup.py", *arguments, cwd=tree, env=environment)
        assert result.returncode == 2
        assert "`make test`" in result.stderr and len(result.stderr.splitlines()) == 1
    result = run_python("setup.py", "--version", cwd=tree, env=environment)
    assert result.stdout.strip() == package_version()


# Metadata


def test_version_has_one_source(metadata):
    assert metadata["Version"] == package_version()
    assert package_version() not in (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()


def test_name_of_the_distribution_is_the_codes(metadata):
    """pyproject.toml must state its name, and the code reads identity.py's; no other file has it."""
    name = package_constant("DISTRIBUTION")
    assert metadata["Name"] == name
    for file in ["setup.py", "models/training/environment.py", f"kernels/{PACKAGE}/__init__.py"]:
        assert name not in (ROOT / file).read_text(), file


def test_metadata_has_the_readme_and_the_licence(metadata):
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")


def test_version_is_beyond_the_predecessors(metadata):
    """`pip install --upgrade` takes the highest version of a name, and 0.2.2 is the predecessor's last."""
    assert Version(metadata["Version"]) > Version("0.2.2")


def test_pulling_another_version_installs_again():
    rules = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("$(INSTALLED):")]
    assert [rule for rule in rules if f"kernels/{PACKAGE}/identity.py" in rule.split()]


def test_library_requires_torch_alone_and_does_not_pin_it(metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    plain = [str(requirement) for requirement in requirements if requirement.marker is None]
    (oldest,) = re.findall(r"^OLDEST_TORCH = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert plain == [f"torch>={'.'.join(oldest)}"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert sorted(metadata.get_all("Provides-Extra")) == ["huggingface", "sweep", "test", "train"]


def test_malicious_lightning_releases_are_refused(metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    lightning = [requirement for requirement in requirements if requirement.name == "lightning"]
    assert lightning
    for requirement in lightning:
        assert not any(requirement.specifier.contains(version) for version in ["2.6.2", "2.6.3"])


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_cover_every_requirement(metadata, python_version):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python_version}):
            (specifier,) = pin.specifier
            assert specifier.operator == "==", f"constraints.txt must pin exactly, got {line!r}"
            assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice for {python_version}"
            pins[canonicalize_name(pin.name)] = specifier.version
    for text in metadata.get_all("Requires-Dist"):
        requirement = Requirement(text)
        if requirement.name == metadata["Name"]:  # one extra that includes another
            assert requirement.extras <= set(metadata.get_all("Provides-Extra"))
            continue
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt has no version for {requirement}"
        assert requirement.specifier.contains(version), f"{requirement} refuses the tested version {version}"


# Importing


def test_import_starts_no_process():
    code = f"""
import sys, torch
started = []
watched = {{"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn"}}
sys.addaudithook(lambda event, arguments: started.append((event, arguments)) if event in watched else None)
import {PACKAGE}
assert not started, started
"""
    result = run_python("-c", code, cwd=ROOT, env=build_environment(PYTHONPATH=str(ROOT / "kernels")))
    assert result.returncode == 0, result.stderr


def test_import_is_quick():
    code = f"""
import time, torch
start_time = time.process_time()
import {PACKAGE}
print(time.process_time() - start_time)
"""
    env = build_environment(PYTHONPATH=str(ROOT / "kernels"))
    elapsed_s = []
    for _ in range(3):
        result = run_python("-c", code, cwd=ROOT, env=env)
        assert result.returncode == 0, result.stderr
        elapsed_s.append(float(result.stdout))
    assert statistics.median(elapsed_s) < 0.2, elapsed_s


# Where the library is compiled, and where not


def fake_nvcc(folder: Path, release: str) -> Path:
    """A CUDA_HOME whose nvcc only states its release."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc.parent.parent


def fake_torch(folder: Path, version: str, cuda: str | None) -> Path:
    package = folder / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"from . import version\n__version__ = {version!r}\n")
    (package / "version.py").write_text(f"cuda = {cuda!r}\n")
    return package.parent


@pytest.mark.parametrize(
    "torch_version, torch_cuda, release, archs, reason",
    [
        ("2.10.1", "13.0", "13.0", "9.0a", "torch is 2.10.1 and 2.11 or newer is needed"),
        ("2.13.0+cu126", "12.6", "13.0", "9.0a", "13.0 but torch 2.13.0+cu126 was built with CUDA 12.6"),
        ("2.13.0+cu130", "13.0", "11.8", "9.0a", "is release 11.8 and 12.1 or newer is needed"),
        ("2.13.0+cu130", "13.0", None, "9.0a", "nvcc is not in"),
        ("2.13.0+cpu", None, "13.0", "9.0a", "torch 2.13.0+cpu is not a CUDA build"),
        ("2.13.0+cu130", "13.0", "13.0", "7.0 7.5+PTX", "has no compute capability of 8.0 or newer"),
    ],
)
def test_missing_precondition_is_one_sentence_or_an_error_when_forced(
    tmp_path, torch_version, torch_cuda, release, archs, reason
):
    tree = copy_sources(tmp_path / "tree", csrc={"probe.cu": PROBE_CU})
    cuda_home = fake_nvcc(tmp_path, release) if release else tmp_path / "no_cuda"
    variables = {
        "CUDA_HOME": str(cuda_home),
        "PYTHONPATH": str(fake_torch(tmp_path, torch_version, torch_cuda)),
        "TORCH_CUDA_ARCH_LIST": archs,
    }
    pure = build_in_place(tree, build_environment(**variables))
    assert pure.returncode == 0, pure.stderr
    said = [line for line in pure.stdout.splitlines() if "build without CUDA kernels because" in line]
    assert len(said) == 1 and reason in said[0] and "to get them, " in said[0]
    assert not list(tree.rglob("*.so"))

    if torch_cuda is not None:  # a CPU build of torch is accepted when forced: compiled_wheel may use one
        forced = build_in_place(tree, build_environment(**variables, FLASH_COSINE_SIM_FORCE_CUDA="1"))
        assert forced.returncode != 0
        assert reason in forced.stderr and "Traceback" not in forced.stderr


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"FLASH_COSINE_SIM_SKIP_CUDA": "yes"}, "FLASH_COSINE_SIM_SKIP_CUDA must be 0 or 1, got 'yes'"),
        ({"FLASH_COSINE_SIM_SKIP_CUDA": "1", "FLASH_COSINE_SIM_FORCE_CUDA": "1"}, "contradicts"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "TORCH_CUDA_ARCH_LIST must hold entries like 8.0"),
        (
            {"FLASH_COSINE_SIM_GLIBC": "missing"},
            "FLASH_COSINE_SIM_GLIBC must be a folder with a libc.so, got 'missing'",
        ),
    ],
)
def test_wrong_build_variable_is_an_error(tmp_path, variables, message):
    tree = copy_sources(tmp_path / "tree", csrc={"probe.cu": PROBE_CU})
    cuda_home = fake_nvcc(tmp_path, "13.0")
    (cuda_home / "bin" / "ninja").touch(mode=0o755)
    env = build_environment(
        CUDA_HOME=str(cuda_home),
        PATH=os.pathsep.join([str(cuda_home / "bin"), os.environ["PATH"]]),
        PYTHONPATH=str(fake_torch(tmp_path, "2.13.0", "13.0")),
        **variables,
    )
    result = build_in_place(tree, env)
    assert result.returncode != 0
    assert message in result.stderr and "Traceback" not in result.stderr


def test_skip_cuda_builds_pure_python(tmp_path):
    tree = copy_sources(tmp_path / "tree", csrc={"probe.cu": "#error must not be compiled"})
    result = build_in_place(tree, build_environment(FLASH_COSINE_SIM_SKIP_CUDA="1"))
    assert result.returncode == 0, result.stderr
    assert "as FLASH_COSINE_SIM_SKIP_CUDA=1 asks" in result.stdout
    assert not list(tree.rglob("*.so"))


def needs_nvcc(test):
    return pytest.mark.nvcc(skip_without_nvcc(test))


@pytest.fixture(scope="module")
def compiled_wheel(tmp_path_factory):
    """(wheel, its library unpacked) of a probe compiled for 9.0a."""
    folder = tmp_path_factory.mktemp("compiled")
    sources = {"probe.cu": PROBE_CU, "sm90/probe.cu": PROBE_SM90_CU, "binding.cpp": BINDING_CPP}
    tree = copy_sources(folder / "tree with spaces", csrc=sources)
    run_hook("build_wheel", tree, compiling_environment("9.0a+PTX"))
    (wheel,) = (tree / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    (library,) = (folder / "unpacked" / PACKAGE).glob("_C*.so")
    return wheel, library


@needs_nvcc
def test_compiled_wheel_serves_every_python(compiled_wheel):
    wheel, library = compiled_wheel
    assert library.name == "_C.abi3.so"
    assert re.fullmatch(rf"{PACKAGE}-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "csrc" in name or name.endswith((".cu", ".cpp"))]


@needs_nvcc
def test_compiled_library_says_what_schemas_it_was_built_for(compiled_wheel):
    assert SCHEMAS.encode() + b"\0" in compiled_wheel[1].read_bytes()


@needs_nvcc
def test_compiled_library_uses_only_the_stable_abi(compiled_wheel):
    assert_only_the_stable_abi(compiled_wheel[1])


@needs_nvcc
def test_compiled_library_has_native_code_and_ptx(compiled_wheel):
    _, library = compiled_wheel
    # probe.cu: code for 9.0, and PTX for what comes after. sm90/probe.cu: code for 9.0a, and no PTX, which
    # could run nowhere else.
    assert device_code(library) == [("code", 90), ("code", 90), ("ptx", 90)]
    assert b"sm_90a" in library.read_bytes()


@needs_nvcc
def test_without_the_a_of_9_0a_no_hopper_kernel_is_compiled(tmp_path):
    sources = {"probe.cu": PROBE_CU, "sm90/probe.cu": "#error must not be compiled", "binding.cpp": BINDING_CPP}
    tree = copy_sources(tmp_path / "tree", csrc=sources)
    result = build_in_place(tree, compiling_environment("9.0"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("leaving out the kernels written for Hopper") == 1
    (library,) = (tree / "kernels" / PACKAGE).glob("_C*.so")
    assert device_code(library) == [("code", 90)]
    result = run_python("-c", LOAD_AND_CALL, str(library), "cpu", cwd=tree, env=build_environment())
    assert result.returncode == 0, result.stderr


@needs_nvcc
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_library_loads_and_runs_on_this_torch(compiled_wheel, device):
    _, library = compiled_wheel
    result = run_python("-c", LOAD_AND_CALL, str(library), device, cwd=library.parent, env=build_environment())
    assert result.returncode == 0, result.stderr
