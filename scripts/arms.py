"""Runs that differ in nothing but their seed, as one arm of a comparison: mean, standard deviation, n."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.markup import escape
from rich.table import Table

from conf.schema import GROUPS
from models.training import metrics
from models.training.identity import INCIDENTAL, flat, is_one_of
from models.training.report import Results
from models.training.run_files import load_config

# Resolved copies of a key above them, which would be shown twice.
COPIES = ("optimizer.lr", "optimizer.max_steps", "model.seq_len")


@dataclass(frozen=True)
class Arm:
    """What was run with one configuration and several seeds.

    Attributes:
        settings: the configuration: of a group that names an option, that option, and every other key.
        runs: its runs, also those that did not finish.
        seeds: theirs.
    """

    settings: dict[str, Any]
    runs: tuple[Results, ...]
    seeds: tuple[Any, ...]

    @property
    def finished(self) -> list[Results]:
        """The runs whose numbers count: those that finished, and of a seed that was run twice the later one."""
        pairs = zip(self.seeds, self.runs, strict=True)
        return list({seed: run for seed, run in pairs if run.status == "finished"}.values())

    def values(self, number: str) -> list[float]:
        """What stands under a heading of the numbers that are compared, of every finished run that has it."""
        found = (run.number(number) for run in self.finished)
        return [value for value in found if value is not None and math.isfinite(value)]

    def cell(self, number: str) -> str:
        """Mean and, of two seeds or more, the sample standard deviation."""
        values, form = self.values(number), metrics.form_of(number)
        if not values:
            return "-"
        mean = form.format(statistics.mean(values))
        return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"

    def ends(self) -> str:
        """How many runs count, and how the others ended: ``2, 1 diverged``."""
        others = [run.status for run in self.runs if run.status != "finished"]
        return ", ".join([str(len(self.finished)), *(f"{others.count(end)} {end}" for end in dict.fromkeys(others))])


def arms_of(runs: Sequence[Results]) -> list[Arm]:
    """The runs by configuration, in the order in which the first of each stands. Each run without one is its own."""
    arms: dict[Any, Arm] = {}
    for run in runs:
        try:
            config = flat(OmegaConf.to_container(load_config(run.folder)))
        except ValueError:  # no config.yaml: it failed before it could say what it is
            config = {"run": run.name}
        settings = _settings(run, config)
        key = tuple(sorted((name, repr(value)) for name, value in settings.items()))
        before = arms.get(key, Arm(settings, (), ()))
        arms[key] = Arm(settings, (*before.runs, run), (*before.seeds, config.get("seed")))
    return list(arms.values())


def _settings(run: Results, config: dict[str, Any]) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in config.items()
        if key != "seed" and key not in COPIES and not is_one_of(key, INCIDENTAL) and not key.endswith(".kind")
    }
    choices = run.record.get("choices") or {}
    options = {group: choices[group] for group in GROUPS if choices.get(group) and group not in ("logger", "data")}
    corpus = (run.record.get("corpus") or {}).get("name")
    return {**options, **({"data": corpus} if corpus else {}), **kept}


def differing(arms: Sequence[Arm]) -> list[str]:
    """The settings that tell the arms apart: those with several values among the arms that have them.

    A key that only one of two options has, as attention.scale, does not tell them apart: the option does.
    """
    values: dict[str, set[str]] = {}
    for arm in arms:
        for key, value in arm.settings.items():
            values.setdefault(key, set()).add(repr(value))
    return [key for key, found in values.items() if len(found) > 1]


def headings(arms: Sequence[Arm]) -> list[str]:
    """Those of the table of arms."""
    return [*differing(arms), "n", *metrics.headings(compared=True)]


def rows(arms: Sequence[Arm]) -> list[list[str]]:
    """The cells under headings()."""
    keys, numbers = differing(arms), metrics.headings(compared=True)
    return [[*(str(arm.settings.get(key, "-")) for key in keys), arm.ends(), *map(arm.cell, numbers)] for arm in arms]


def table(arms: Sequence[Arm]) -> Table:
    """One line an arm, for a terminal."""
    columns = Table(title="mean ± standard deviation over seeds")
    numbers = metrics.headings(compared=True)
    for heading in headings(arms):
        columns.add_column(heading, justify="right" if heading in numbers else "left")
    for cells in rows(arms):
        columns.add_row(*map(escape, cells))
    return columns


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are set to the right."""
    rule = ["---:" if all(_is_number(row[index]) for row in rows) else "---" for index in range(len(headings))]
    lines = [headings, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _is_number(cell: str) -> bool:
    return cell.strip("*-")[:1].isdigit() or cell in ("", "-")


def label(arm: Arm, keys: Sequence[str]) -> str:
    """The arm's name in a plot: its values of the settings that differ, groups' options without their key."""
    return " ".join(
        str(arm.settings[key]) if key in GROUPS else f"{key.split('.')[-1]}={_short(arm.settings[key])}"
        for key in keys
        if key in arm.settings
    )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def plot(arms: Sequence[Arm], path: Path) -> None:
    """Draws loss against tokens, the end of it, and what every arm reached and took; the legend beside the axes."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    keys = differing(arms)
    colors = pyplot.get_cmap("tab10" if len(arms) <= 10 else "tab20").colors
    shown = [(arm, label(arm, keys), colors[index % len(colors)]) for index, arm in enumerate(arms)]
    height = max(4.2, 0.22 * len(arms) + 1.5)
    numbers = metrics.headings(compared=True)
    ratios = (3, 3, *(2 for _ in numbers))
    width = 1.75 * sum(ratios)
    figure, axes = pyplot.subplots(1, len(ratios), figsize=(width, height), width_ratios=ratios, layout="constrained")
    whole, end, *bars = axes
    lines = {}
    for arm, name, color in shown:
        drawn = [line for run in arm.runs for axis in (whole, end) for line in _draw_losses(axis, run, color)]
        if drawn:
            lines[f"{name} (n={arm.ends()})".lstrip()] = drawn[0]
    whole.set(xlabel="tokens (bytes)", ylabel="bits per byte", title="training loss, every seed a line")
    end.set(xlabel="tokens (bytes)", title="its last third, and validation (dots)")
    _limit(whole, end, [run for arm in arms for run in arm.runs])
    for axis, number in zip(bars, numbers, strict=True):
        for index, (arm, _, color) in enumerate(shown):
            values = arm.values(number)
            axis.scatter(values, [index] * len(values), s=18, color=color, alpha=0.7)
            if values:
                axis.scatter([statistics.mean(values)], [index], s=160, color=color, marker="|")
        axis.set(title=f"{number}: seeds and mean", yticks=range(len(shown)), yticklabels=[""] * len(shown))
        axis.set_ylim(len(shown) - 0.5, -0.5)
    for axis in axes:
        axis.grid(alpha=0.3)
    if lines:
        figure.legend(lines.values(), lines, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_losses(axes: Any, run: Results, color: tuple[float, ...]) -> list:
    tokens, losses = run.over_tokens("train/bpc")
    drawn = axes.plot(tokens, losses, color=color, alpha=0.6, linewidth=1, marker="." if len(tokens) == 1 else "")
    axes.plot(*run.over_tokens("val/bpc"), color=color, marker="o", markersize=4, linestyle="")
    return drawn


def _limit(whole: Any, end: Any, runs: Sequence[Results]) -> None:
    """Limits from what is finite and, in the first panel, below what a uniform guess costs, 8 bits a byte."""
    series = [zip(*run.over_tokens("train/bpc"), strict=True) for run in runs]
    points = [(token, loss) for run in series for token, loss in run if math.isfinite(token) and math.isfinite(loss)]
    last = max((token for token, _ in points), default=0.0)
    finite = [loss for _, loss in points if loss < 8]
    late = [loss for token, loss in points if token >= last * 2 / 3]
    late += [value for run in runs if (value := run.best("val/bpc")) is not None]
    if finite:
        whole.set_ylim(0.95 * min(finite), 1.05 * min(max(finite), 4 * min(finite)))
    if late and last:
        low, usual = min(late), statistics.median(late)
        end.set_xlim(last * 2 / 3, last * 1.03)
        end.set_ylim(low - 0.1 * (usual - low) - 1e-3, usual + 2 * (usual - low) + 1e-3)


def plot_learning_rates(arms: Sequence[Arm], path: Path) -> bool:
    """Draws val bpc against the learning rate, a line for arms that differ in it alone; False where none do."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = [key for key in differing(arms) if key != "lr"]
    curves: dict[str, list[tuple[float, list[float]]]] = {}
    for arm in arms:
        values = arm.values("val bpc")
        if "lr" in arm.settings and values:
            curves.setdefault(label(arm, keys) or "all runs", []).append((arm.settings["lr"], values))
    curves = {name: sorted(points) for name, points in curves.items() if len(points) > 1}
    if not curves:
        return False
    figure, axes = pyplot.subplots(figsize=(8.5, 4.2), layout="constrained")
    for index, (name, points) in enumerate(curves.items()):
        color = f"C{index % 10}"
        axes.plot([lr for lr, _ in points], [statistics.mean(v) for _, v in points], "-", color=color, label=name)
        for lr, values in points:
            axes.plot([lr] * len(values), values, "o", color=color, markersize=4)
    axes.set_xscale("log", base=2)
    rates = sorted({lr for points in curves.values() for lr, _ in points})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set(xlabel="peak learning rate", ylabel="val bpc", title="validation, bits per byte: seeds and mean")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
