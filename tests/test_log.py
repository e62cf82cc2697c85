"""docs/log and docs/design: the parts of a page, the index, the present without dates, and no number lost on the way.

docs/log/kernel_notes.tsv lists the numbers of docs/kernel_notes.md, which these documents replaced, paragraph by
paragraph and row by row, with the documents in which they are now.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest

from scripts import results

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LOG, DESIGN = DOCS / "log", DOCS / "design"
PAGES = sorted(LOG.glob("[0-9]*.md"))
MOVED = LOG / "kernel_notes.tsv"
LAST_NOTES = "838125e:docs/kernel_notes.md"
PARTS = ["Tried", "Measured", "Verdict", "Commit"]
COMMIT = re.compile(r"`[0-9a-f]{7}`")

# A number that is no part of a name, such as sm90, C7512 or a commit. Several with " / " between them belong together.
NUMBER = r"(?<![\w.`/])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w`]|\.\w)"
NUMBERS = re.compile(rf"{NUMBER}(?: / {NUMBER})*")


def numbers(text: str) -> list[str]:
    """The numbers of a text in their order; what belongs together, such as "1.20 / 1.19 / 1.20", is one of them."""
    return [found.rstrip(",") for found in NUMBERS.findall(re.sub(r"\s+", " ", text))]


def statements(text: str) -> list[tuple[int, str]]:
    """Paragraphs, list items and table rows of a Markdown text, each with the number of its first line."""
    found: list[tuple[int, str]] = []
    continues = False
    for line, content in enumerate(text.splitlines(), 1):
        if continues and content.strip() and not re.match(r"\||- ", content):
            found[-1] = found[-1][0], f"{found[-1][1]} {content.strip()}"
        elif content.strip():
            found.append((line, content))
        continues = bool(content.strip()) and not content.startswith("|")
    return found


def moved() -> list[tuple[int, list[str], list[str]]]:
    """Line, numbers and documents of each row of the list."""
    rows = [line.split("\t") for line in MOVED.read_text().splitlines() if not line.startswith("#")]
    return [(int(line), found.split("; "), documents.split(" ")) for line, found, documents in rows]


def is_in(wanted: str, found: set[str]) -> bool:
    """Whether numbers that belong together are among others, next to each other."""
    return any(f" / {wanted} / " in f" / {other} / " for other in found)


def test_every_number_of_the_notes_is_in_the_document_that_the_list_names():
    known = {path: set(numbers(path.read_text())) for path in DOCS.rglob("*.md")}
    lost = [
        (line, wanted)
        for line, found, documents in moved()
        for wanted in found
        if not any(is_in(wanted, known[DOCS / name]) for name in documents)
    ]
    assert not lost


def test_the_list_has_every_number_of_the_notes():
    show = subprocess.run(["git", "show", LAST_NOTES], capture_output=True, text=True, cwd=ROOT)
    if show.returncode != 0:
        pytest.skip(f"no {LAST_NOTES} in this copy's history")
    of_notes = [(line, numbers(text)) for line, text in statements(show.stdout) if numbers(text)]
    assert of_notes == [(line, found) for line, found, _ in moved()]


def test_numbers_are_told_from_names():
    text = "1.20 / 1.19 /\n1.20 dense, 1,450 cycles (C7512, sm90, `98dc4e6`, 3.8e-6), n72 -> 64."
    assert numbers(text) == ["1.20 / 1.19 / 1.20", "1,450", "3.8e-6", "64"]
    assert not is_in("1.2 / 1.19", {"1.20 / 1.19"}) and is_in("1.19 / 1.20", {"1.20 / 1.19 / 1.20"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_of_the_log_has_its_parts_and_a_verdict_in_its_title(page):
    assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d-[a-z0-9-]+\.md", page.name)
    title, *rest = page.read_text().splitlines()
    assert re.fullmatch(r"# [^:]+: .+", title), "a title is 'what: verdict'"
    parts = re.findall(r"^\*\*(\w+)\.\*\*", "\n".join(rest), re.MULTILINE)
    assert [part for part in parts if part != "Predicted"] == PARTS


def test_the_index_has_every_page_by_its_title():
    listed = re.findall(r"^- (\S+) \[(.+)\]\((.+)\)$", (LOG / "README.md").read_text(), re.MULTILINE)
    expected = [(page.name[:10], page.read_text().splitlines()[0][2:], page.name) for page in PAGES]
    assert sorted(listed) == sorted(expected)
    assert [day for day, *_ in listed] == sorted((day for day, *_ in listed), reverse=True)


@pytest.mark.parametrize("page", sorted(DESIGN.glob("*.md")), ids=lambda page: page.stem)
def test_the_design_says_how_things_are_and_not_when_they_became_so(page):
    if page.name == "aims.md":  # says when and at which commit each was measured
        return
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text())  # links to pages of the log have their day in their names
    assert not re.search(r"20\d\d-\d\d-\d\d|used to |no longer|at present", text) and not COMMIT.search(text)


def test_the_design_names_only_what_the_sources_have():
    """Identifiers in code font; words without an underscore or a capital inside may be anything."""
    sources = [path for folder in ("kernels", "tests", "scripts") for path in (ROOT / folder).rglob("*.*")]
    known = {
        name
        for path in sources
        if path.suffix in {".py", ".h", ".cuh", ".cu", ".cpp"} and path != Path(__file__)
        for name in re.findall(r"\w+", path.read_text())
    }
    pages = "".join(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL) for page in DESIGN.glob("*.md"))
    named = {name.split("::")[-1] for name in re.findall(r"`([A-Za-z_][\w:]*(?:_|[a-z][A-Z])[\w:]*)`", pages)}
    assert named and not named - known


def test_the_design_can_be_read_in_twenty_minutes():
    words = sum(
        bool(re.search(r"[A-Za-z0-9]", word))
        for name in ("overview", "forward", "backward", "portable")  # drawings included
        for word in (DESIGN / f"{name}.md").read_text().split()
    )
    assert words <= 5600  # 280 a minute


def test_an_aim_is_met_where_every_row_reaches_it(tmp_path, monkeypatch):
    def report(ours, other):
        rows = [{"contender": name, "seq_len": 8, "ms": ms} for name, ms in ((results.OURS, ours), ("other", other))]
        return {"rows": rows, "git_commit": "0123456789", "started": "2026-11-29T11:00:00"}

    aim = {"what": "speed", "case": "8", "key": "ms", "over": "other", "at_least": 1.1, "seq_lens": [8]}
    files = {"fast": report(1.0, 1.2), "slow": report(1.0, 1.0)}
    wanted = {"fast": "met | 1.20", "slow": "missed, 9 % short | 1.00"}
    wanted["fast slow"] = "met in 1 of 2, 9 % short | 1.20, 1.00"
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "_report", lambda path: files[Path(path).name])
    for names, cells in wanted.items():
        paths = [f"attention/{name}" for name in names.split()]
        (tmp_path / "aims.json").write_text(json.dumps([{**aim, "files": paths}]))
        row = results.aims("aims.json").splitlines()[-1]
        assert row.startswith(f"| speed | 8 | 1.10 | {cells} | [attention]"), row
