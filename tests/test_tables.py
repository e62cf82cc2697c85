"""Tables lose neither a digit nor a name at any width, and no character stops a program."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from models.training import report, tables
from models.training.report import Results

ROOT = Path(__file__).parent.parent
WIDTHS = [40, 60, 80, 120, None]  # None: a file or a pipe
NAMES = [
    "cosine-pre-small-enwik8-len8192-lr0.001-seed0",
    "cosine-post-small-enwik8-len8192-lr0.001-seed0",
    "regular-pre-small-enwik8-len8192-lr0.001-seed0-a_setting_that_makes_it_a_very_long_name_indeed",
]


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """shown(width, print) is what print() wrote to a terminal of so many columns, or to a pipe."""

    def run(width, show):
        out = io.StringIO() if width is None else Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("COLUMNS", str(width or 20))  # a pipe has no columns, whatever the environment says
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", "1")
        show()
        monkeypatch.undo()
        return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())

    return run


def results(name, mfu=None, test=None):
    row = {"step": 100000.0, "val/bpc": 1.2345, "throughput/tokens_per_s": 2016827.0, "memory/rss_gib": 123.45}
    row |= {"throughput/mfu": mfu} if mfu else {}
    row |= {"test/bpc": test} if test else {}
    return Results(Path(name), {"status": "finished"}, [row])


def words(text):
    """What stands in cells and lines, as a person reads it: runs of characters without blanks and lines."""
    return re.split(r"[\s│┃]+", text)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_runs_loses_nothing(shown, width):
    runs = [results(name, mfu=0.4567, test=1.3456) for name in NAMES]
    text = shown(width, lambda: tables.show(report.table(runs, title="3 runs")))
    for number in ("100000", "1.2345", "1.3456", "2,016,827", "45.7%", "123.45"):
        assert words(text).count(number) >= len(runs), number
    assert words(text).count("finished") == len(runs)
    assert all(word in words(text) for heading in report.headings()[1:] for word in heading.split())
    for name in NAMES:
        assert name in text or any(
            line.startswith("run: ") and all(part in name for part in line.removeprefix("run: ").split("*"))
            for line in text.splitlines()
        )
    lines = [line for line in text.splitlines() if line.startswith(("┏", "┃", "┡", "│", "└"))]
    assert lines and (width is None or max(map(len, lines)) <= width)


@pytest.mark.parametrize("width", [60, 80, 120, None])
@pytest.mark.parametrize("name", [NAMES[0], NAMES[2]])
def test_the_summary_of_one_run_loses_nothing(shown, width, name):
    text = shown(width, lambda: tables.show(report.table([results(name)], title="summary")))
    assert name in text
    for number in ("finished", "100000", "1.2345", "2,016,827", "123.45"):
        assert number in words(text), number
    assert "MFU" not in text and "test" not in text  # nothing stands in them


def test_names_are_whole_where_there_is_room_and_else_what_differs_or_a_number(shown):
    def show(names, width):
        return shown(width, lambda: tables.show(report.table([results(name) for name in names], title="runs")))

    pair = [name.replace("-small", "") for name in NAMES[:2]]
    assert all(name in words(show(pair, 120)) for name in pair)
    narrow = show(pair, 80)
    assert {"pre", "post"} <= set(words(narrow))
    assert "run: cosine-*-enwik8-len8192-lr0.001-seed0" in narrow
    assert f"1  {NAMES[0]}\n2  {NAMES[1]}\n3  {NAMES[2]}\n" in show(NAMES, 60)
    many = [f"{'x' * 70}{index}" for index in range(12)]
    assert f" 9  {many[8]}\n10  {many[9]}\n" in show(many, 80)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a-b-c", "a-d-c"], ("a-", "-c")),
        (["runs/a/x", "runs/b/x"], ("runs/", "/x")),
        (["seed0", "seed1"], ("", "")),  # not within a word or a number
        (["a-lr0.001", "a-lr0.01"], ("a-", "")),
        (["run", "run-2"], ("", "")),
        (["run-", "run-2"], ("", "")),
        (["a-a", "a-a-a"], ("a-", "")),
        (["one"], ("", "")),
        (["same", "same"], ("", "")),
    ],
)
def test_shared_parts_are_whole_and_leave_something(names, expected):
    before, after = tables.shared(names)
    assert (before, after) == expected
    assert all(len(name) > len(before) + len(after) for name in names)


@pytest.mark.parametrize("width", WIDTHS)
def test_settings_and_brackets_survive(shown, width):
    table = Table(title="arms")
    for heading in ("attention", "data.path", "n", "val bpc"):
        table.add_column(heading, justify="right" if heading == "val bpc" else "left")
    table.add_row("cosine", "/a/very/long/path/to/a/text/that/nobody/would/cut", "2, 1 diverged", "1.2345 ± 0.0012")
    table.add_row("regular", r"\[bold]", "1", "1.3456")
    text = shown(width, lambda: tables.show(table, names=2))
    for whole in ("/a/very/long/path/to/a/text/that/nobody/would/cut", "[bold]", "2, 1 diverged", "1.2345 ± 0.0012"):
        assert whole in text


def test_a_table_without_rows_or_content_shows(shown):
    assert "run" in shown(60, lambda: tables.show(report.table([], title="none")))
    empty = Results(Path("early"), {"status": "failed"}, [])
    text = shown(60, lambda: tables.show(report.table([empty], title="1 run")))
    assert "early" in text and "failed" in text and "bpc" not in text


# ---------------------------------------------------------------- characters

ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # files are ASCII, too, unless told otherwise
}
CODE = """
import sys
from models.training.tables import print_line, show_any_character
show_any_character()
print("a\\ufffdb \\u4e2d\\xe9")
print_line("1 \\xb1 2")
print("\\u4e2d", file=sys.stderr)
"""


def run(encoding, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **ENCODINGS[encoding]}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=1800)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    assert b"Logging error" not in result.stderr and b"Traceback" not in result.stderr
    return result.stdout.decode("latin-1" if encoding == "latin-1" else "ascii", errors="strict")


def test_what_an_encoding_lacks_is_replaced():
    assert run("ascii", "-c", CODE) == "a?b ??\n1 +- 2\n"
    assert run("latin-1", "-c", CODE) == "a?b ?é\n1 ± 2\n"
    assert run("C", "-c", CODE) == "a?b ??\n1 +- 2\n"


PROGRAMS = """
import runpy, sys
def start(program, *arguments):
    sys.argv = [program, *arguments]
    sys.stdout.reconfigure(errors="strict")
    print("=====", program)
    try:
        if program == "train.py":
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (program, end.code)
options = "model=tiny model.num_layers=1 model.width=32 model.num_heads=2 seq_len=32 tokens_per_step=64 max_steps=2"
options += " data=file trainer.accelerator=cpu trainer.val_bytes=200 trainer.sample_bytes=64 logger=csv"
folder, text = sys.argv[1:]
for seed in (0, 1):
    own = [f"data.path='{folder}/{text}'", f"run_root='{folder}/runs'", f"name=seed{seed}", f"seed={seed}"]
    start("train.py", *options.split(), *own)
start("scripts.generate", f"{folder}/runs/seed0", "--prompt", text, "--num-bytes", "64")
start("scripts.evaluate", f"{folder}/runs/seed0")
start("scripts.compare", f"{folder}/runs", "--markdown", f"{folder}/table.md")
"""


@pytest.mark.training
def test_no_character_stops_a_program(tmp_path):
    """On Chinese text that is hardly learned, so that samples hold any byte, in a file with a Chinese name."""
    (tmp_path / "狐狸").write_bytes("快速的棕色狐狸跳過懶狗。".encode() * 200)
    out = run("C", "-c", PROGRAMS, tmp_path, "狐狸")
    first, second, generated, evaluated, compared = out.split("===== ")[1:]
    for trained in (first, second):
        assert "?" in trained.split("a sample after step 2")[1] and "finished" in trained
    assert "?" in generated and "bits per byte" in evaluated and "mean +- standard" in compared
