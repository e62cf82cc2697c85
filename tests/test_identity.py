"""Importing the package warns once where another of its name is installed, and never otherwise."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest

from flash_cosine_sim_attention import identity
from models.training.environment import environment
from scripts.contenders import predecessors

ROOT = Path(__file__).resolve().parent.parent
MODULE = "flash_cosine_sim_attention"

# sys.path is what the test says, then the standard library alone: neither torch nor this environment's packages.
IMPORT = """
import json, sys, warnings
exec(sys.argv[2])
sys.path[:0] = json.loads(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    exec(compile("import flash_cosine_sim_attention as package", "user", "exec"))
    exec("from flash_cosine_sim_attention import *")
print(json.dumps({
    "loaded": package.__file__,
    "version": package.__version__,
    "warnings": [[w.category.__name__, str(w.message), w.filename, w.lineno] for w in caught],
}))
"""


def write_package(folder: Path) -> Path:
    """The package with its own __init__.py and identity.py; what needs torch is left out."""
    package = folder / MODULE
    package.mkdir(parents=True)
    for name in ("__init__.py", "identity.py"):
        shutil.copy(ROOT / "kernels" / MODULE / name, package)
    names = ("flash_cosine_sim_attention", "flash_cosine_sim_attention_varlen", "plain_cosine_sim_attention")
    (package / "interface.py").write_text(f"{' = '.join(names)} = None\n")
    (package / "reference.py").write_text("l2norm_tensors = None\n")
    (package / "scales.py").write_text("cosine_scale = None\n")
    for name in ("flash_attn_interface.py", "functional.py"):
        (package / name).touch()
    return folder


def write_predecessor(folder: Path) -> Path:
    package = folder / MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the check must not import what it finds')\n")
    return folder


def write_metadata(folder: Path, version: str, kind: str = "dist-info") -> Path:
    metadata = folder / f"{MODULE}-{version}.{kind}"
    metadata.mkdir(parents=True)
    text = f"Metadata-Version: 2.4\nName: {identity.DISTRIBUTION}\nVersion: {version}\n\nVersion: 7\n"
    (metadata / {"dist-info": "METADATA", "egg-info": "PKG-INFO"}[kind]).write_text(text)
    return folder


def import_with(*entries: object, before: str = "") -> dict:
    """What importing the package says with these entries first on sys.path."""
    path = [str(entry) if isinstance(entry, Path) else entry for entry in entries]
    command = [sys.executable, "-I", "-S", "-c", IMPORT, json.dumps(path), before]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["version"] == identity.__version__
    return said


def only_warning(said: dict) -> str:
    """The one warning, which must be of its own category and point at the line that imports the package."""
    ((category, message, filename, line),) = said["warnings"]
    assert (category, filename, line) == ("InstallationWarning", "user", 1)
    assert "\n" not in message and "`pip uninstall flash-cosine-sim-attention`" in message
    return message


# Nothing is wrong


@pytest.mark.parametrize("case", ["source tree", "wheel", "editable", "pytest", "symlink", "egg-info"])
def test_one_installation_is_silent(tmp_path, case):
    kernels, site = write_package(tmp_path / "kernels"), tmp_path / "site"
    if case == "source tree":
        entries = [kernels]
    elif case == "wheel":
        entries = [write_metadata(kernels, identity.__version__)]
    elif case == "editable":
        entries = [write_metadata(site, identity.__version__), kernels]
    elif case == "pytest":  # its pythonpath is the folder that the editable installation adds
        entries = ["", kernels, write_metadata(site, identity.__version__), f"{kernels}{os.sep}", kernels]
    elif case == "symlink":
        (tmp_path / "link").symlink_to(kernels)
        entries = [tmp_path / "link", kernels]
    else:
        entries = [write_metadata(kernels, identity.__version__, "egg-info")]
    assert import_with(*entries)["warnings"] == []


def broken_entries(folder: Path) -> list[object]:
    folder.mkdir()
    (folder / "broken.zip").write_bytes(b"PK\x03\x04 no archive")
    (folder / "file").write_text("")
    (folder / "results" / MODULE).mkdir(parents=True)  # a folder of that name with nothing to import in it
    (folder / "interrupted" / f"{MODULE}-0.2.2.dist-info").mkdir(parents=True)
    names = ("broken.zip", "file", "results", "interrupted", "missing")
    return [None, 7, ["list"], "", *(str(folder / name) for name in names)]


def test_broken_entries_of_sys_path_are_passed_over(tmp_path):
    package = write_metadata(write_package(tmp_path / "site"), identity.__version__)
    broken = broken_entries(tmp_path / "broken")
    assert import_with(package, *broken)["warnings"] == []
    other = write_metadata(write_predecessor(tmp_path / "other"), "0.2.2")
    message = only_warning(import_with(package, *broken, other))
    assert str(other / MODULE) in message and "0.2.2" in message


RAISING_HOOK = """
import importlib.abc, importlib.metadata  # before the hook, which would stop Python itself
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, *arguments): return None
    def find_distributions(self, *arguments): raise RuntimeError("a finder of someone else's")
sys.meta_path.insert(0, Finder())
def hook(entry):
    if entry == "someone's": raise RuntimeError("a hook of someone else's")
    raise ImportError
sys.path_hooks.insert(0, hook)
"""


def test_finders_that_raise_do_not_stop_the_import(tmp_path):
    package, other = write_package(tmp_path / "site"), write_predecessor(tmp_path / "other")
    message = only_warning(import_with(package, "someone's", other, before=RAISING_HOOK))
    assert str(other / MODULE) in message


# Two of one name


@pytest.mark.parametrize("kind", ["package", "module", "zip"])
def test_another_copy_on_the_path_is_named(tmp_path, kind):
    package, other = write_package(tmp_path / "site"), tmp_path / "other"
    if kind == "package":
        copy = write_predecessor(other) / MODULE
    elif kind == "module":
        other.mkdir()
        copy = other / f"{MODULE}.py"
        copy.write_text("")
    else:
        other = tmp_path / "other.zip"
        with zipfile.ZipFile(other, "w") as archive:
            archive.writestr(f"{MODULE}/__init__.py", "")
        copy = other / MODULE
    message = only_warning(import_with(package, other))
    assert message.startswith(f"{MODULE} {identity.__version__} is loaded from {package / MODULE}, but")
    assert f"another copy of it is in {copy}:" in message
    assert "metadata" not in message


@pytest.mark.parametrize("kind", ["dist-info", "egg-info"])
@pytest.mark.parametrize("place", ["beside", "over"])
def test_metadata_of_another_version_are_named(tmp_path, kind, place):
    package = write_metadata(write_package(tmp_path / "site"), identity.__version__)
    folder = write_metadata(package if place == "over" else tmp_path / "other", "0.2.2", kind)
    message = only_warning(import_with(package, folder))
    assert message.startswith(f"{MODULE} {identity.__version__} is loaded from")
    assert f"{folder} has the metadata of {identity.DISTRIBUTION} 0.2.2:" in message
    assert "another copy" not in message


def test_the_predecessor_beside_ours_is_one_warning(tmp_path):
    package = write_metadata(write_package(tmp_path / "kernels"), identity.__version__)
    other = write_metadata(write_predecessor(tmp_path / "site"), "0.2.2")
    (tmp_path / "link").symlink_to(other)
    message = only_warning(import_with(package, other, other, tmp_path / "link"))
    assert message.count("another copy") == 1 and message.count("0.2.2") == 1
    assert str(other / MODULE) in message


def test_an_interrupted_installation_hides_no_other(tmp_path):
    package = write_package(tmp_path / "site")
    (package / f"{MODULE}-0.1.0.dist-info").mkdir()
    other = write_metadata(tmp_path / "other", "0.2.2")
    assert "0.2.2" in only_warning(import_with(package, other))


# This environment


def test_this_environment_holds_this_package_alone():
    command = [sys.executable, "-W", "error", "-c", f"import torch, {MODULE}; print({MODULE}.__version__)"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stderr}\n`make test` and `pip install -e .` bring it up to date"
    assert result.stdout.strip() == identity.__version__


def test_the_check_takes_no_time():
    elapsed_s = []
    for _ in range(5):
        importlib.invalidate_caches()
        start_time = time.process_time()
        identity.warn_of_others()
        elapsed_s.append(time.process_time() - start_time)
    assert min(elapsed_s) < 0.01, elapsed_s  # 0.6 ms on two cores


def test_the_predecessor_in_a_folder_of_its_own_is_no_mistake(tmp_path):
    write_metadata(tmp_path, "0.2.2")
    (tmp_path / MODULE).mkdir()
    (tmp_path / MODULE / "__init__.py").write_text("def flash_cosine_sim_attention(): pass\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (contender,) = predecessors(tmp_path)
        identity.warn_of_others()
    assert contender.name == "predecessor 0.2.2"


def test_a_record_names_the_version_that_was_imported():
    assert environment()["versions"][identity.DISTRIBUTION] == identity.__version__


def test_a_record_names_no_commit_of_another_repository_and_calls_nothing_clean_unseen(tmp_path, monkeypatch):
    """An archive that was unpacked within a repository; git that is not there."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "archive").mkdir()
    for folder, commits in ((tmp_path, True), (tmp_path / "archive", False)):
        monkeypatch.setattr("models.training.environment.ROOT", folder)
        record = environment()
        assert (record["git_commit"] is not None, record["git_dirty"]) == (commits, False if commits else None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [environment()[key] for key in ("git_commit", "git_dirty")] == [None, None]
