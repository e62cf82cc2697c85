"""scripts/wheel.py and what setup.py does for it: linking for systems that are older than this one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulator.build import load_setup
from support import ROOT

from scripts import wheel

setup = load_setup()
needs_gcc = pytest.mark.skipif(not (shutil.which("g++") and shutil.which("readelf")), reason="needs g++ and readelf")
# What libraries of C and C++ of 2018, glibc 2.28 and GCC 8, have.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def compiled(folder, name, text, *options):
    (folder / f"{name}.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-Os", "-fPIC", *options, str(folder / f"{name}.cpp"), "-o"]
    output = folder / f"{name}{'.so' if '-shared' in options else '.o'}"
    subprocess.run([*command, str(output)], check=True)
    return output


def newer(library):
    """The symbols that a library takes from a C or C++ library that is newer than NEWEST."""
    listing = wheel.run(["readelf", "-W", "--dyn-syms", str(library)])
    found = re.findall(r"UND (\S+)@+([A-Z]+)_([\d.]+)", listing)
    return [name for name, kind, number in found if tuple(map(int, number.split("."))) > NEWEST[kind]]


def test_an_older_glibc_comes_first_and_brings_what_newer_headers_need(tmp_path):
    toolchain = setup.Toolchain(Path("nvcc"), "ninja", Path("torch/include"), setup.parse_archs(wheel.ARCHS))
    old = setup.Toolchain(**vars(toolchain) | {"glibc": tmp_path})
    sources, library = [setup.BUILD_DIR / "old_systems.cpp"], Path("_C.so")
    (command,) = re.findall(r"rule link\n  command = (.*)", setup.ninja_file(old, sources, library))
    assert f"-L{tmp_path} " in command and command.index(f"-L{tmp_path}") < command.index("-Ltorch/lib")
    (command,) = re.findall(r"rule link\n  command = (.*)", setup.ninja_file(toolchain, [], library))
    assert str(tmp_path) not in command


def test_the_wheel_is_for_every_generation():
    flags = setup.file_flags(Path("sm80/forward_bf16.cu"), setup.Toolchain(
        Path("nvcc"), "ninja", Path("torch/include"), setup.parse_archs(wheel.ARCHS)
    ))  # fmt: skip
    codes = re.findall(r"arch=compute_(\d+),code=\[(\S+?)\]", flags.replace("'", ""))
    assert codes == [("80", "sm_80"), ("90", "sm_90"), ("100", "sm_100"), ("120", "sm_120,compute_120")]


@needs_gcc
def test_what_newer_headers_take_from_newer_libraries_is_compiled_in(tmp_path):
    """A library that uses them (-Os: and inlines few) asks for nothing newer than the tag's libraries have."""
    program = """
    #include <memory>
    #include <sstream>
    __attribute__((visibility("default"))) std::string said(std::shared_ptr<int> number) {
      std::ostringstream out;
      std::stringstream both;
      out << *number;
      both << out.str();
      return std::move(both).str() + std::move(out).str();
    }
    """
    user = compiled(tmp_path, "user", program, "-c", "-fvisibility=hidden")
    compat = compiled(tmp_path, "old_systems", setup.OLD_SYSTEMS_CPP, "-c", "-fvisibility=hidden", "-Wall", "-Werror")
    library = tmp_path / "both.so"
    subprocess.run(["g++", "-shared", "-o", library, user, compat], check=True)
    assert not newer(library)
    subprocess.run(["g++", "-shared", "-o", library, user], check=True)
    version = wheel.run(["g++", "-dumpversion"]).split(".")[0]
    assert bool(newer(library)) == (int(version) >= 9)  # what is newer than GCC 8 takes something newer


@needs_gcc
def test_a_symbol_that_nobody_has_is_found(tmp_path):
    text = """
    #include <cstdlib>
    extern "C" { void newer_than_the_stubs(); int aoti_torch_zero_(void*); void torch_call_dispatcher(); }
    __attribute__((weak)) void perhaps();
    void f(void* p) { std::free(p); aoti_torch_zero_(p); torch_call_dispatcher(); newer_than_the_stubs(); perhaps(); }
    """
    assert wheel.unknown_symbols(compiled(tmp_path, "library", text, "-shared")) == ["newer_than_the_stubs"]


def test_what_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(wheel, "find_spec", lambda name: None)  # noqa: ARG005
    assert wheel.main([]) == 2
    assert capsys.readouterr().err == "error: `make wheel` installs what is missing here: ziglang, auditwheel\n"
    with pytest.raises(ValueError, match="no-such-program was not found, and a wheel needs it"):
        wheel.run(["no-such-program"])
    with pytest.raises(ValueError, match=r"`sh -c echo no >&2; exit 3 ...` failed: no"):
        wheel.run(["sh", "-c", "echo no >&2; exit 3"])


def test_the_record_is_of_a_wheel_for_the_tag_and_the_architectures():
    report = (ROOT / "docs" / "results" / "wheel" / "auditwheel.txt").read_text()
    assert re.search(rf"^flash_cosine_sim_attention-\S+-cp310-abi3-{wheel.PLATFORM}\.whl$", report, re.MULTILINE)
    assert f"compiled for: {wheel.ARCHS}\n" in report
    for name, number in re.findall(r"'(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)'", report):
        assert tuple(map(int, number.split("."))) <= NEWEST[name], (name, number)
    assert re.search(r"^commit: [0-9a-f]{40}$", report, re.MULTILINE)
