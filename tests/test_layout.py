"""Which way imports go: from what is run down to the model and the kernels, and from test files to tests/support/."""

import ast
import subprocess
import sys

import pytest
from support import ROOT
from support.runs import untrained_run

KERNELS = "flash_cosine_sim_attention"
NEEDS = {"models": {"torch", "einops"}, "models.fused": {"torch", "triton"}}  # beside Python itself
# By room, the longest that a module's name begins with: the rooms that it may import from. Any may import its own.
ROOMS = {
    KERNELS: set(),
    "models": {KERNELS, "models.fused"},
    "models.fused": set(),
    "models.training": {KERNELS, "models", "conf", "data"},
    "conf": set(),
    "data": {KERNELS},
    "scripts": {KERNELS, "models", "models.training", "conf", "data", "train"},
    "train": {KERNELS, "models", "models.training", "conf", "data"},
}


def sources():
    """The path of every module of the repository, by the name under which it is imported."""
    paths = [ROOT / "train.py", *(ROOT / "kernels" / KERNELS).rglob("*.py")]
    paths += [path for folder in ("models", "conf", "data", "scripts") for path in (ROOT / folder).rglob("*.py")]
    named = {}
    for path in paths:
        inside = path.relative_to(ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts else ROOT)
        parts = inside.with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


SOURCES = sources()


def imported(name, path):
    """The modules that a module names in its imports, wherever in the file they stand; of the repository, its files."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            submodules = {f"{module}.{alias.name}" for alias in node.names} & set(SOURCES)
            found |= submodules or {module}
    return found


def room(name):
    rooms = [room for room in ROOMS if name == room or name.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def wrong_imports(name, path):
    """Imports that go up, or sideways."""
    wrong = [one for one in imported(name, path) if room(one) not in (None, room(name), *ROOMS[room(name)])]
    if room(name) in NEEDS:
        outside = {one for one in imported(name, path) if room(one) is None}
        wrong += [one for one in outside if one.split(".")[0] not in NEEDS[room(name)] | sys.stdlib_module_names]
    return sorted(wrong)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name):
    assert not wrong_imports(name, SOURCES[name])


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("models.gpt", "from models.training.tables import show", "models.training.tables"),
        ("models.gpt", "import lightning", "lightning"),
        ("models.fused.rotate", "from models import rotary", "models.rotary"),
        ("models.training.load", "def f():\n    import train", "train"),
        ("models.training.load", "from scripts import arms", "scripts.arms"),
        ("data.bytes", "from models import gpt", "models.gpt"),
        (f"{KERNELS}.ops", "import conf.schema", "conf.schema"),
        ("conf.schema", "from models.gpt import GPT", "models.gpt"),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path, name, line, wrong):
    (tmp_path / "module.py").write_text(f"import os\nfrom . import {name.rpartition('.')[2]}\n{line}\n")
    assert wrong_imports(name, tmp_path / "module.py") == [wrong]


def circle(imports):
    """The modules that no order puts behind all that they import: those in a circle, and those that import one."""
    left = {name: used & set(imports) - {name} for name, used in imports.items()}
    while free := [name for name, used in left.items() if not used & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_imports_run_in_a_circle():
    assert not circle({name: imported(name, path) for name, path in SOURCES.items()})
    assert circle({"a": {"b"}, "b": {"c", "torch"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_test_files_import_no_other_test_file(path):
    names = {other.stem for other in (ROOT / "tests").glob("test_*.py")}
    assert not {part for one in imported("tests", path) for part in one.split(".")} & names


LOADED = """
import sys
import torch
from models.training.load import load_model
gpt, config = load_model(sys.argv[1])
assert gpt.generate(torch.tensor([[97, 98]]), 3, temperature=0).shape == (1, 3)
import scripts.generate
print(*sorted({"lightning", "hydra", "wandb", "matplotlib"} & {name.split(".")[0] for name in sys.modules}))
"""


def test_a_trained_model_is_loaded_and_used_without_what_trains_it(tmp_path):
    run = untrained_run(tmp_path, bytes(range(97, 107)) * 40)
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n{LOADED}"
    command = [sys.executable, "-W", "ignore", "-c", code, str(run)]
    loaded = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == []
