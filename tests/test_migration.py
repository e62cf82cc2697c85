"""Who comes from the predecessor is told the line to use, and docs/migration.md names lines that work."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.configuration import configure
from support.forked import Forked

from conf.legacy import KEYS, translate
from conf.schema import validate
from flash_cosine_sim_attention import identity
from scripts import benchmark
from train import build_module

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "migration.md").read_text()


def run_train(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), **variables}
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--seq-len 8192 --use-cuda-kernel", "seq_len=8192 attention.backend=cuda"),
        ("--use-float32 --seq-len=2048", "trainer.precision=32-true seq_len=2048"),
        ("--use-triton --use-cuda-kernel", "attention.backend=cuda"),
        ("-m --seq-len 8192 seed=0,1 norm=post", "-m seq_len=8192 seed=0,1 norm=post"),
        ("lr=1e-3 '+x=[a b]' --seq-len", "lr=1e-3 '+x=[a b]' seq_len=N"),
    ],
)
def test_train_answers_the_predecessors_flags(tmp_path, arguments, line):
    # The answer must come before the imports that take seconds.
    for name in ("hydra", "torch", "lightning"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('too late')\n")
    result = run_train(*shlex.split(arguments), PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert result.stdout == ""
    answer, page = result.stderr.splitlines()
    assert answer == f"train.py takes KEY=VALUE: python train.py {line}"
    assert "docs/migration.md" in page


def test_every_flag_becomes_a_configuration_that_builds():
    overrides = translate([word for flag in KEYS for word in ((flag, "256") if flag == "--seq-len" else (flag,))])
    config = validate(configure("model=tiny", *overrides))
    assert (config.seq_len, config.attention.backend, config.trainer.precision) == (256, "cuda", "32-true")
    build_module(config)


@pytest.mark.slow
def test_hydras_own_flags_and_unknown_ones_are_left_alone():
    own = "-m --multirun --help -h --hydra-help --version --cfg job -c all --resolve --package x -p x --run -r --info"
    others = "-cn config --config-name=config -cd conf --config-dir conf -sc install=bash --experimental-rerun x --lr 1"
    arguments = f"{own} {others} seq_len=8 +model.x=--seq-len ~norm --seq-length 8".split()
    assert translate(arguments) == arguments
    shown = Forked(["--cfg", "job", "seq_len=24"], {}, None)
    out, errors = shown.communicate()
    assert shown.returncode == 0, errors
    assert "seq_len: 24" in out


# docs/migration.md


def commands(program: str) -> list[list[str]]:
    """The arguments of every `program ...` between backticks."""
    found = [shlex.split(command) for command in re.findall(rf"`{re.escape(program)} ([^`]+)`", PAGE)]
    assert found, f"the page names no line with {program}"
    return found


def test_the_pages_configurations_compose():
    lines = [line for line in commands("python train.py") if not any(word.startswith("--") for word in line)]
    assert ["seq_len=8192", "attention.backend=cuda"] in lines
    keys = "attention.scale=1 attention.groups=8 attention.learned_scale=false attention.backend=reference"
    sizes = "model.width=64 model.num_layers=1 model.num_heads=1 model.positions=learned trainer.sample_bytes=1"
    others = "trainer.precision=32-true trainer.val_every=1 norm=post"
    for line in (*lines, keys.split(), sizes.split(), others.split()):
        assert all(word.split("=")[0] in PAGE for word in line)
        validate(configure(*line))
    windows = validate(configure("experiment=enwik8_predecessor", "seq_len=8192", "tokens_per_step=131072"))
    assert windows.tokens_per_step == 16 * windows.seq_len  # the predecessor's step


def test_the_pages_benchmark_flags_are_accepted(capsys):
    assert benchmark.main(["--help"]) == 0
    usage = capsys.readouterr().out
    for flag in "--causal --mask-prob --num-times --only-forwards --only-backwards --dtype --predecessor".split():
        assert re.search(rf"[`\"| ]{flag}\b", PAGE) and re.search(rf"^  {flag}\b", usage, re.MULTILINE), flag


def test_the_pages_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    here = [line.split(" | ", 1)[1] for line in PAGE.splitlines() if line.startswith("| `make")]
    named = set(re.findall(r"`make ([a-z-]+)", " ".join(here)))
    assert {"benchmark", "train"} <= named <= set(targets)


def test_the_page_and_the_changelog_say_how_to_install_and_who_may_publish():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{identity.__version__}]" in changelog
    for text in (PAGE, changelog):
        assert "Publishing under this name on the package index is for its owner, Phil Wang, to allow" in text
        assert "pip install --no-build-isolation -e ." in text
