"""The documents: tables are what the raw files say, links lead somewhere, the Python in them runs."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from support.forked_torch import run_code

from models.training.identity import recorded_identity
from models.training.report import read_results
from models.training.run_files import read_record
from scripts import results
from scripts.arms import arms_of

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kernels" / "flash_cosine_sim_attention"
DOCUMENTS = results.documents()
PYTHON = [
    pytest.param(code, id=f"{path.relative_to(ROOT)}-{index}")
    for path in DOCUMENTS
    if path.name != "migration.md"  # which shows what the predecessor does
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    if "runs/NAME" not in code  # which needs a trained run: see tests/test_scripts.py
]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.slow
def test_every_table_is_what_the_raw_files_say(capsys):
    assert results.main([]) == 0, capsys.readouterr().err
    tables = [match["call"] for path in DOCUMENTS for match in results.BLOCK.finditer(path.read_text())]
    assert any(call.startswith("comparison ") for call in tables) and any(call.startswith("speed ") for call in tables)
    for path in DOCUMENTS:  # none that is opened and not closed, or the other way round
        text = path.read_text()
        assert text.count("<!-- table ") == text.count("<!-- end -->") == len(results.BLOCK.findall(text)), path


def test_a_number_that_was_changed_by_hand_is_found_and_put_right(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "docs" / "results" / "training", tmp_path / "docs" / "results" / "training")
    page = tmp_path / "docs" / "results" / "training" / "README.md"
    right = page.read_text()
    page.write_text(right.replace("2,016,827", "2,916,827"))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "docs" / "results")
    assert results.main([]) == 2
    assert "tables of docs/results/training/README.md are not what docs/results/ says" in capsys.readouterr().err
    assert results.main(["--write"]) == 0 and page.read_text() == right
    page.write_text(right.replace("<!-- table training ", "<!-- table trainings "))
    assert results.main([]) == 2
    assert "table must be one of comparison" in capsys.readouterr().err


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    dead = [link for link in LINK.findall(path.read_text()) if not (path.parent / unquote(link)).exists()]
    assert not dead


def misnamed(text):
    """The files named in code font that are not there, or are there although marked as new."""
    named = re.findall(r"`((?:[\w.]+/)*[\w*]+\.(?:py|yaml|md|h|cuh|cpp))`( \(new\))?", text)
    assert named
    return [name for name, new in named if exists(name) is bool(new)]


def exists(pattern):
    return next(ROOT.glob(pattern), None) is not None or next(PACKAGE.rglob(pattern), None) is not None


def test_adding_names_files_that_are_there():
    assert not misnamed((ROOT / "docs" / "adding.md").read_text())
    there = "`models/attention.py` `plan.cpp` `sm80/tiles/*.h` `conf/data/own.yaml` (new)"
    assert not misnamed(there)
    wrong = ["models/atention.py", "plans.cpp", "conf/data/file.yaml"]
    assert misnamed(f"{there} `{wrong[0]}` `{wrong[1]}` `{wrong[2]}` (new)") == wrong


def test_adding_quotes_a_function_of_the_distance_from_the_sources():
    """Line by line, but for where they are indented; and it names every file of the library that has the example."""
    page = (ROOT / "docs" / "adding.md").read_text()
    (section,) = re.findall(r"\n## A function of the distance\n(.*?)\n## ", page, re.DOTALL)
    sources = [path for path in PACKAGE.rglob("*.*") if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu")]
    lines = {line.strip() for path in sources for line in path.read_text().splitlines()}
    quoted = re.findall(r"```(?:py|cpp)\n(.*?)```", section, re.DOTALL)
    assert len(quoted) == 3
    assert [line for text in quoted for line in text.splitlines() if line.strip() not in lines] == []
    have = {path.name for path in sources if re.search(r"alibi_slopes|slopes_stride_batch", path.read_text())}
    doors = {"flash_attn_interface.py"}  # whose arguments are another library's
    assert have - doors == {name for name in have if f"{name}`" in section}


def test_raw_files_say_where_they_come_from():
    made = ("shared_gpu.json", "lengths.json")  # by hand, and by scripts/packing.py
    reports = [path for path in sorted((ROOT / "docs" / "results").glob("*/*.json")) if path.name not in made]
    records = sorted((ROOT / "docs" / "results").glob("*/*/*/run.json"))
    assert reports and records
    for path in (*reports, *records):
        report = json.loads(path.read_text())
        assert re.fullmatch("[0-9a-f]{40}", report["git_commit"]), path
        assert report["device"] and report["versions"]["torch"] and report["command"], path
        assert not re.search(r"(^|[ =\"'])/", report["command"]), f"{path}: a path of the machine in its command"


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON)
def test_the_python_in_the_documents_runs(code):
    names = "import torch\nq, k, v = torch.randn(3, 1, 2, 16, 64).unbind(0)\n"  # what a lone call refers to
    run = run_code(names + code, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_runs_of_two_commits_that_compute_the_same_are_one_arm():
    folder = results.RESULTS / "first_comparison" / "runs"
    runs = [folder / f"regular-post-small-file-len1024-lr0.00025-seed0{again}" for again in ("", "-2")]
    assert len({read_record(run)["git_commit"] for run in runs}) == 2
    first, second = (recorded_identity(run) for run in runs)
    assert first == second
    (arm,) = arms_of([read_results(run) for run in runs])
    assert arm.finished[0].folder == runs[1]  # the later one counts
