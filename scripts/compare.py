"""Compares runs in tables, plots and a page: ``python -m scripts.compare runs`` or ``... runs/a runs/b``.

Runs that differ in nothing but their seed are one arm, one row: mean, sample standard deviation, n. Runs whose bits per
byte do not mean the same are in tables of their own.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.training.report import Results, markdown, read_results, table
from models.training.run_files import CONFIG_FILE, RECORD_FILE
from models.training.tables import print_line, show
from scripts import (
    PLOTS,
    Parser,
    check_file,
    compare_page,
    compare_plots,
    compare_tables,
    is_writable,
    non_negative,
    run_script,
)
from scripts.comparisons import Comparison, baseline_of, comparisons_of, counts, titles

PLOT_FILE = "comparison.png"
MOST_RUNS = 12  # that have a row each unless --runs asks for it
LONGEST_ERROR = 120  # characters


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, draws the plots; returns the exit code."""
    parser = Parser(prog="python -m scripts.compare", description="Compare runs in tables, plots and a page.")
    parser.add_argument("runs", metavar="RUNS", nargs="+", type=Path, help="runs' folders, or a folder of such")
    parser.add_argument(
        "--baseline",
        metavar="RUN|KEY=VALUE",
        help="also show differences to a run's arm; or, with attention=regular say, to the arm that is the same but "
        "for that key",
    )
    parser.add_argument(
        "--runs", dest="each", action="store_true", help=f"a row for each run, also of over {MOST_RUNS}"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help=f"of the plots, .png, .svg or .pdf; more plots go beside it (default: {PLOT_FILE} in the folder that all "
        "runs share, or in the current one where that cannot be written to)",
    )
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write one page with everything, and open it anywhere"
    )
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables as Markdown, too")
    parser.add_argument(
        "--within",
        metavar="SHARE",
        type=non_negative,
        help="exit with 1 if a run's train/loss differs by more than this share, 0.005 say, from the first run's at a "
        "step that both logged",
    )
    return run_script(parser, compare, argv)


def compare(arguments: argparse.Namespace) -> None:
    """Reads the runs and reports them. What cannot be read is named and left out; ValueError if all is."""
    _check_files(arguments)
    folders = find_runs(arguments.runs)
    runs = read_runs(folders)
    comparisons = comparisons_of(runs)
    named = titles(comparisons)
    baseline = None if arguments.baseline is None else baseline_of(arguments.baseline, comparisons)
    each = table(runs, title="every run") if arguments.each or len(runs) <= MOST_RUNS else None
    tables = [compare_tables.listings(*pair, baseline) for pair in zip(comparisons, named, strict=True)]
    listings = list(itertools.chain(*tables)) if len(runs) > 1 else []  # a lone run has its own row below
    plot = arguments.plot or default_plot(folders)
    # First what was asked for: whoever reads the tables may stop at any line, which ends this program.
    if arguments.markdown is not None:
        text = "\n".join([*map(compare_tables.markdown, compare_tables.said_once(listings)), markdown(runs)])
        arguments.markdown.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files
    if arguments.html is not None:
        page = compare_page.page(runs, comparisons, tables)
        arguments.html.write_text(page, encoding="utf-8", errors="backslashreplace")
    plots = [] if arguments.plot is None else draw(comparisons, named, plot)
    print_line(counts(runs))
    if len(comparisons) > 1:
        print_line(f"in {len(comparisons)} tables, because bits per byte of different ones do not compare")
    compare_tables.show_listings(listings)
    if each is not None:
        show(each)
    else:
        print_line("--runs shows a row for each run, too")
    for line in unfinished(runs):
        print_line(line)
    for path in plots or draw(comparisons, named, plot):
        print_line(str(path))
    if arguments.html is not None:
        print_line(str(arguments.html))
    if arguments.within is not None:
        for difference in differences(runs):
            warn(f"--within compares losses of other training windows: {difference}")
        if not same_losses(runs, arguments.within):
            raise SystemExit(1)


def _check_files(arguments: argparse.Namespace) -> None:
    """Before minutes of work: whether what is asked for can be written."""
    for option in ("plot", "html", "markdown"):
        check_file(f"--{option}", getattr(arguments, option), PLOTS if option == "plot" else None)


def default_plot(folders: Sequence[Path]) -> Path:
    """In the deepest folder that all runs are in; in the current one, which is said, where that is / or not ours.

    Raises ValueError where that cannot be written to either.
    """
    shared = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    path, here = shared / PLOT_FILE, Path.cwd() / PLOT_FILE
    if shared != Path(shared.anchor) and is_writable(path):
        return path
    if not is_writable(here):
        raise ValueError(
            f"--plot must be a file that can be written to, and neither {str(path)!r} nor {str(here)!r} is"
        )
    reason = "all that the runs share" if shared == Path(shared.anchor) else "not to be written to"
    warn(f"plots are drawn in the current folder, for {str(shared)!r} is {reason}; --plot FILE draws them elsewhere")
    return here


def draw(comparisons: Sequence[Comparison], named: Sequence[str], path: Path) -> list[Path]:
    """The plots of every comparison: of the first those of path, of the others with a number."""
    files = []
    for number, (comparison, title) in enumerate(zip(comparisons, named, strict=True), start=1):
        own = path if number == 1 else path.with_stem(f"{path.stem}_{number}")
        files += compare_plots.write(comparison, title, own)
    return files


def unfinished(runs: Sequence[Results]) -> list[str]:
    """A line for each way in which runs did not finish: how, why in short, and which."""
    ends: dict[tuple[str, str], list[str]] = defaultdict(list)
    for run in runs:
        if run.status != "finished":
            ends[run.status, _in_short(str(run.record.get("error") or ""))].append(run.name)
    return [
        f"{status}{f' ({len(names)})' if len(names) > 1 else ''}: {', '.join(names)}{f': {error}' if error else ''}"
        for (status, error), names in sorted(ends.items())
    ]


def _in_short(error: str) -> str:
    first = " ".join(error.strip().partition("\n")[0].split())
    cut = first[:LONGEST_ERROR].rstrip()
    return cut if cut == error.strip() else f"{cut} ... (the whole of it: run.json, --html)"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs' folders, each once: a path that is no run stands for the runs right below it.

    A path with neither is named and left out, for a shell's ``runs/*`` matches plots as well. Raises
    ValueError if no run is left.
    """
    folders: dict[Path, Path] = {}  # by the resolved path
    for path in paths:
        below = sorted(record.parent for record in path.glob(f"*/{RECORD_FILE}"))
        found = [path] if (path / RECORD_FILE).is_file() else below
        if not found:
            warn(f"{str(path)!r} is left out: no run, nor a folder of runs (no {RECORD_FILE})")
        folders.update({folder.resolve(): folder for folder in found if folder.resolve() not in folders})
    if not folders:
        raise ValueError(f"RUNS must be runs' folders or a folder of runs, got {' '.join(map(str, paths))}")
    return list(folders.values())


def read_runs(folders: Sequence[Path]) -> list[Results]:
    """The runs that can be read, labelled by enough of their paths to tell them apart."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_results(folder))
        except (ValueError, OSError) as error:
            warn(f"{str(folder)!r} is left out: {error}")
    if not runs:
        raise ValueError("RUNS must hold at least one run that can be read, got none")
    for run in runs:
        if not run.rows:
            warn(f"{run.name} has no metrics yet")
        if run.configuration is None and (run.folder / CONFIG_FILE).exists():
            warn(f"{run.name} is an arm of its own: its {CONFIG_FILE} cannot be read")
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    shared = os.path.commonpath([run.folder.absolute() for run in runs])
    return [replace(run, label=os.path.relpath(run.folder, shared)) for run in runs]


def differences(runs: Sequence[Results]) -> list[str]:
    """For each setting that chooses a step's windows of the text, and in which runs differ: who has which value.

    A run that ended before it recorded a setting takes no part.
    """
    who: dict[str, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for setting, value in _windows(run).items():
            if value is not None:
                who[setting][value].append(run.name)
    return [
        f"{setting} is " + ", but ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
        for setting, values in who.items()
        if len(values) > 1
    ]


def _windows(run: Results) -> dict[str, Any]:
    """See ``ByteDataModule.train_batch``."""
    corpus = run.record.get("corpus") or {}
    return {
        "the corpus (SHA-256)": corpus.get("sha256"),
        "the training split's length": corpus.get("train_bytes"),
        "seq_len": run.configured("seq_len"),
        "tokens_per_step": run.record.get("tokens_per_step"),
        "seed": run.configured("seed"),
    }


def same_losses(runs: Sequence[Results], share: float) -> bool:
    """Whether every run's train/loss stays within a share of the first run's; says by how much each differs."""
    first, *others = runs
    if not others:
        raise ValueError("--within compares with the first run: give another")
    expected = dict(zip(*first.series("train/loss"), strict=True))
    same = True
    for run in others:
        found = dict(zip(*run.series("train/loss"), strict=True))
        errors = {step: _apart(found[step], loss) for step, loss in expected.items() if step in found}
        if not errors:
            raise ValueError(f"--within needs steps that both logged, got none of {first.name} and {run.name}")
        worst = max(errors, key=errors.__getitem__)
        within = errors[worst] <= share
        same = same and within
        print_line(
            f"train/loss of {run.name} {'is' if within else 'is NOT'} within {share:.2%} of {first.name}'s at all of "
            f"{len(errors)} logged steps: {errors[worst]:.3%} apart at step {worst:g}, "
            f"{statistics.mean(errors.values()):.3%} on average"
        )
    return same


def _apart(found: float, expected: float) -> float:
    """As a share; infinitely where one is nan, which would pass for less than any share, or infinite."""
    return abs(found / expected - 1) if math.isfinite(found) and math.isfinite(expected) else math.inf


def warn(message: str) -> None:
    """One line on stderr: the table on stdout stays clean."""
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
