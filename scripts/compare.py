"""Compares runs in tables and plots: ``python -m scripts.compare runs`` or ``... runs/a runs/b``.

Runs that differ in nothing but their seed are one arm: a second table and the plot have its mean and spread.
"""

import argparse
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from models.training.report import PLOT_FILE, Results, markdown, read_results, table
from models.training.run_files import RECORD_FILE, load_config
from models.training.tables import print_line, show
from scripts import Parser, arms, non_negative, run_script

RATES_FILE = "learning_rates.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, draws the plot; returns the exit code."""
    parser = Parser(prog="python -m scripts.compare", description="Compare runs in tables and plots.")
    parser.add_argument("runs", metavar="RUNS", nargs="+", type=Path, help="runs' folders, or a folder of such")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="of the plots (default: the folder that all runs share)"
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
    folders = find_runs(arguments.runs)
    output = arguments.output or Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    runs = read_runs(folders)
    for difference in differences(runs, _settings):
        warn(f"not comparable: {difference}")
    if arguments.within is not None:
        for difference in differences(runs, _training_windows):
            warn(f"--within compares losses of other training windows: {difference}")
    show(table(runs, title=f"{len(runs)} runs" if len(runs) > 1 else "1 run"))
    for run in runs:
        if run.record.get("error"):
            print_line(f"{run.name} {run.status}: {run.record['error']}")
    groups = arms.arms_of(runs)
    seeds = any(len(arm.finished) > 1 for arm in groups)  # otherwise the second table would repeat the first
    if seeds:
        show(arms.table(groups), names=len(arms.differing(groups)))
    output.mkdir(parents=True, exist_ok=True)
    plots = [output / PLOT_FILE]
    arms.plot(groups, plots[0])
    if arms.plot_learning_rates(groups, output / RATES_FILE):
        plots.append(output / RATES_FILE)
    for path in plots:
        print_line(str(path))
    if arguments.markdown is not None:
        text = markdown(runs)
        if seeds:
            text += "\n" + arms.markdown(arms.headings(groups), arms.rows(groups))
        arguments.markdown.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files
    if arguments.within is not None and not same_losses(runs, arguments.within):
        raise SystemExit(1)


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
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    shared = os.path.commonpath([run.folder.absolute() for run in runs])
    return [replace(run, label=os.path.relpath(run.folder, shared)) for run in runs]


def differences(runs: Sequence[Results], settings: Callable[[Results], dict[str, Any]]) -> list[str]:
    """For each setting in which runs differ: who has which value.

    A run that ended before it recorded a setting takes no part.
    """
    who: dict[str, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for setting, value in settings(run).items():
            if value is not None:
                who[setting][value].append(run.name)
    return [
        f"{setting} is " + ", but ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
        for setting, values in who.items()
        if len(values) > 1
    ]


def _settings(run: Results) -> dict[str, Any]:
    """Without these, bits per byte or curves mean different things."""
    corpus = run.record.get("corpus") or {}
    seq_len = _configured(run, "seq_len")
    sha256 = corpus.get("sha256")
    return {
        "the corpus (SHA-256)": sha256 and f"{corpus.get('name')} {sha256[:16]}",
        "seq_len": seq_len,
        "tokens_per_step": run.record.get("tokens_per_step"),
        "the number of validated bytes (trainer.val_bytes)": corpus.get("val_scored"),
    }


def _training_windows(run: Results) -> dict[str, Any]:
    """What chooses a step's windows, beside the above: ``ByteDataModule.train_batch``."""
    return {"seed": _configured(run, "seed")}


def _configured(run: Results, key: str) -> Any:
    try:
        return OmegaConf.select(load_config(run.folder), key)
    except ValueError:  # no config.yaml: metrics and record still show
        return None


def same_losses(runs: Sequence[Results], share: float) -> bool:
    """Whether every run's train/loss stays within a share of the first run's; says by how much each differs."""
    first, *others = runs
    if not others:
        raise ValueError("--within compares with the first run: give another")
    expected = dict(zip(*first.series("train/loss"), strict=True))
    same = True
    for run in others:
        found = dict(zip(*run.series("train/loss"), strict=True))
        errors = {step: abs(found[step] / loss - 1) for step, loss in expected.items() if step in found}
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


def warn(message: str) -> None:
    """One line on stderr: the table on stdout stays clean."""
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
