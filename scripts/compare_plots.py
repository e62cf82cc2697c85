"""The plots of a comparison: losses over bytes and over time, speed and memory, learning rates, two settings at once.

Every figure is made of the same few functions that draw on axes, whether it is a file of its own or a part of a page.
An arm has one colour everywhere. Its seeds are one line, their mean, in a band from the lowest to the highest; a run
that did not finish is a dotted line of its own.
"""

import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from models.training.report import Results
from scripts.arms import Arm, differing, label, setting
from scripts.comparisons import FURTHER, LOSS, RATE, Comparison, at_best_rates, is_number, name_of

INK = "#1f2328"  # of text and axes; a page puts its own in its place
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "svg.fonttype": "path",  # a page looks the same whatever fonts there are
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
PAGE_WIDTH = 5.0  # inches of a figure on a page: its text is still readable on a telephone
MOST_ARMS = 12  # in one figure: more colours nobody tells apart
MOST_POINTS = 300  # of a line
NEAR = 1.25  # times the best loss: what a closer look shows
FAR = 1.5  # times the best loss: what a plot of learning rates has too little room for
UNIFORM = 8.0  # bits a byte of a model that knows nothing
LEAST_WIDTH = 1e-3  # bits a byte that an axis of losses shows: of runs that are closer the rounding would be drawn


@dataclass(frozen=True)
class Shown:
    """An arm as figures show it."""

    arm: Arm
    name: str
    color: Any


def chosen(comparison: Comparison) -> tuple[list[Shown], str]:
    """The arms of the figures, and a sentence on those that are left out where there are many."""
    arms, note = list(comparison.arms), ""
    if len(arms) > MOST_ARMS and (rates := at_best_rates(arms)):
        arms, note = [arm for arm, _ in rates], f"each at its best {RATE}"
    if len(arms) > MOST_ARMS:
        losses = {id(arm): arm.mean(LOSS) for arm in arms}
        ranked = sorted(arms, key=lambda arm: math.inf if losses[id(arm)] is None else losses[id(arm)])
        kept = {id(arm) for arm in ranked[:MOST_ARMS]}
        arms = [arm for arm in arms if id(arm) in kept]
        note = f"{note}; " * bool(note) + f"the {MOST_ARMS} of lowest {LOSS}"
    if note:
        note = f"{len(arms)} of {len(comparison.arms)} arms: {note}"
    keys = differing(arms)
    colors = matplotlib.color_sequences["tab10" if len(arms) <= 10 else "Paired"]
    return [Shown(arm, plain(name_of(arm, keys)), colors[index]) for index, arm in enumerate(arms)], note


def plain(text: str) -> str:
    """Text that matplotlib shows as it is, in a legend, too: no mathematics, no hidden entry, no half a character."""
    text = text.encode(errors="backslashreplace").decode()
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


# ---------------------------------------------------------------- numbers of curves


@dataclass(frozen=True)
class Curve:
    """One line: mean, lowest and highest loss at every place that all of its runs logged, by bytes and by seconds."""

    tokens: list[float]
    seconds: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def curve_of(runs: Sequence[Results]) -> Curve:
    """The training loss of the runs, in bits a byte. Long runs are averaged to MOST_POINTS."""
    losses = [dict(zip(*run.over_tokens("train/bpc"), strict=True)) for run in runs]
    times = [seconds_of(run) for run in runs]
    shared = [token for token in losses[0] if all(token in one for one in losses)] if losses else []
    rows = []
    for token in shared:
        values = [one[token] for one in losses if math.isfinite(one[token])]
        if values:
            seconds = [one[token] for one in times if token in one]
            at = statistics.mean(seconds) if len(seconds) == len(runs) else math.nan
            rows.append((token, at, statistics.mean(values), min(values), max(values)))
    return Curve(*map(list, zip(*_thinned(rows), strict=True))) if rows else Curve([], [], [], [], [])


def validations_of(runs: Sequence[Results]) -> dict[float, float]:
    """The mean loss of validation by bytes trained on: where all runs have one, and of their ends at the mean of these.

    Runs by time end at bytes of their own, so that their ends are no place that all share.
    """
    series = [found for run in runs if (found := dict(zip(*run.over_tokens("val/bpc"), strict=True)))]
    points = {
        token: statistics.mean(one[token] for one in series)
        for token in (series[0] if series else ())
        if all(math.isfinite(one.get(token, math.nan)) for one in series)
    }
    ends = [(token, loss) for token, loss in (list(one.items())[-1] for one in series) if math.isfinite(loss)]
    if ends:
        tokens, losses = zip(*ends, strict=True)
        points[statistics.mean(tokens)] = statistics.mean(losses)
    return points


def _thinned(rows: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The means of as many neighbours as it takes; bytes and seconds are those of the last."""
    size = -(-len(rows) // MOST_POINTS)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [
        (*group[-1][:2], *(statistics.mean(column) for column in list(zip(*group, strict=True))[2:]))
        for group in groups
    ]


def seconds_of(run: Results) -> dict[float, float]:
    """By bytes trained on the seconds that this took by the logged tokens/s: validations and the like are left out."""
    places, speeds = run.over_tokens("throughput/tokens_per_s")
    found, before, seconds = {}, 0.0, 0.0
    for place, speed in zip(places, speeds, strict=True):
        if not speed > 0:
            continue
        seconds += (place - before) / speed
        found[place], before = seconds, place
    return found


# ---------------------------------------------------------------- on axes


def draw_losses(axes: Axes, shown: Sequence[Shown], against: str) -> None:
    """Training loss against "tokens" or "seconds"; validation as points."""
    unit, size = (_byte_unit if against == "tokens" else _time_unit)(shown)
    for one in shown:
        curve = curve_of(one.arm.finished)
        places = [value / size for value in getattr(curve, against)]
        axes.plot(places, curve.mean, color=one.color, marker="." if len(places) == 1 else "")
        if len(one.arm.finished) > 1:
            axes.fill_between(places, curve.low, curve.high, color=one.color, alpha=0.2, linewidth=0)
        for run in one.arm.runs:
            if run.status != "finished":
                curve = curve_of([run])
                places = [value / size for value in getattr(curve, against)]
                axes.plot(places, curve.mean, color=one.color, linestyle=":", linewidth=1)
        if against == "tokens":
            for token, loss in validations_of(one.arm.finished).items():
                axes.plot([token / size], [loss], color=one.color, marker="o", markersize=4)
    title = "training loss" if against == "tokens" else "training loss over training time"
    axes.set(xlabel=unit, ylabel="bits per byte", title=title)


def _byte_unit(shown: Sequence[Shown]) -> tuple[str, float]:
    last = _last_token(shown)
    for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if last > 3 * size:
            return f"{name} trained on", size
    return "bytes trained on", 1.0


def _last_token(shown: Sequence[Shown]) -> float:
    return max((token for one in shown for run in one.arm.runs for token in run.over_tokens("train/bpc")[0]), default=0)


def _time_unit(shown: Sequence[Shown]) -> tuple[str, float]:
    ends = [max(times.values()) for one in shown for run in one.arm.runs if (times := seconds_of(run))]
    longest = max(ends, default=0.0)
    if longest > 3 * 3600:
        return "hours of training", 3600.0
    return ("minutes of training", 60.0) if longest > 180 else ("seconds of training", 1.0)


def limit(axes: Axes, shown: Sequence[Shown]) -> None:
    """From what is finite, and below what a model that knows nothing has; the end of every arm is to be seen."""
    curves = [run.series("train/bpc")[1] for one in shown for run in one.arm.runs]
    validated = [loss for one in shown for loss in validations_of(one.arm.finished).values()]
    found = [loss for losses in (*curves, validated) for loss in losses if loss < UNIFORM]
    if found:
        ends = [loss for losses in (*curves, validated) for loss in losses[-1:] if loss < UNIFORM]
        low, high = min(found), min(max(found), max([4 * min(found), *(1.5 * end for end in ends)]))
        axes.set_ylim(low - 0.04 * (high - low) - 1e-3, high + 0.04 * (high - low) + 1e-3)


def limit_to_end(axes: Axes, shown: Sequence[Shown]) -> None:
    """To the last third of the arms that end near the best, two at least; the others are in the other panels."""
    last, size = _last_token(shown), _byte_unit(shown)[1]
    ranges = []  # of each arm the highest and the lowest that should be seen
    for one in shown:
        curve = curve_of(one.arm.finished)
        losses = [loss for token, loss in zip(curve.tokens, curve.mean, strict=True) if token >= last * 2 / 3]
        if losses:
            losses += [loss for token, loss in validations_of(one.arm.finished).items() if token >= last * 2 / 3]
            ranges.append((max(losses), min(losses)))
    if ranges:
        ranges.sort()
        near = [ends for ends in ranges if ends[0] <= NEAR * ranges[0][0]]
        near = near if len(near) > 1 else ranges[:2]
        low, high = min(end for _, end in near), max(end for end, _ in near)
        axes.set_xlim(last / size * 2 / 3, last / size * 1.02)
        axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    axes.set_title("its last third, the best arms; points: validation")


def draw_number(axes: Axes, shown: Sequence[Shown], heading: str, *, names: bool) -> None:
    """One number of every arm: seeds as points and their mean for a loss, else a bar with its standard deviation."""
    for index, one in enumerate(shown):
        values = one.arm.values(heading)
        if not values:
            axes.text(0.02, index, one.arm.ends(), transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        elif heading == LOSS:
            axes.scatter(values, [index] * len(values), s=16, color=[one.color], alpha=0.7, linewidths=0)
            axes.scatter([statistics.mean(values)], [index], s=150, color=[one.color], marker="|", linewidths=1.8)
        else:
            deviation = statistics.stdev(values) if len(values) > 1 else 0
            axes.barh(index, statistics.mean(values), xerr=deviation, color=[one.color], height=0.65, ecolor=INK)
    if heading == LOSS:
        low, high = axes.get_xlim()
        middle, half = (low + high) / 2, max(high - low, LEAST_WIDTH) / 2
        axes.set_xlim(middle - half, middle + half)
        axes.ticklabel_format(axis="x", useOffset=False)
    axes.set(title=heading, ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), [one.name for one in shown] if names else [""] * len(shown))
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    if axes.get_xlim()[1] > 1e4:
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))


# ---------------------------------------------------------------- learning rates


@dataclass(frozen=True)
class RatePanel:
    """Lines of val bpc against the learning rate, by their names: the arms at each rate.

    Attributes:
        most: the highest loss that is seen, or None for all.
    """

    title: str
    lines: dict[str, list[Arm]]
    most: float | None = None


def rate_panels(comparison: Comparison) -> list[RatePanel]:
    """What is drawn over learning rates: a panel for each of the other settings but the first, whose values are lines.

    The first one's own keys, as attention.scale, go with it. After a panel whose losses are far apart comes a closer
    look at the low ones. Empty where no two arms differ in their learning rate alone.
    """
    if not at_best_rates(comparison.arms):
        return []
    arms = [arm for arm in comparison.arms if is_number(arm.settings.get(RATE))]
    keys = [key for key in differing(arms) if key != RATE]
    first = [key for key in keys if key == keys[0] or key.startswith(f"{keys[0]}.")]
    others = [key for key in keys if key not in first]
    lines: dict[str, dict[str, list[Arm]]] = {}
    for arm in arms:
        lines.setdefault(label(arm, others), {}).setdefault(label(arm, first) or "all runs", []).append(arm)
    panels = []
    for title, named in lines.items():
        kept = {name: sorted(arms, key=lambda arm: arm.settings[RATE]) for name, arms in named.items()}
        if any(sum(bool(arm.values(LOSS)) for arm in arms) > 1 for arms in kept.values()):
            panels.append(RatePanel(title, kept))
            losses = [loss for arms in kept.values() for arm in arms if (loss := arm.mean(LOSS)) is not None]
            most = NEAR * min(losses)
            if max(losses) > FAR * min(losses):
                panels.append(RatePanel(f"{title}, up to {most:.2f}".removeprefix(", "), kept, most))
    return panels


def _apart(rates: Sequence[float]) -> list[str]:
    """A label for each rate, empty where it would lie on the one before."""
    least = math.log(rates[-1] / rates[0]) / 12
    labels: list[str] = []
    last = -math.inf
    for rate in rates:
        room = math.log(rate) - last >= least
        labels.append(f"{rate:g}" if room else "")
        last = math.log(rate) if room else last
    return labels


def draw_rates(axes: Axes, panel: RatePanel, colors: dict[str, Any]) -> None:
    """Seeds as points, their mean as a line in a band; a rate at which no run finished is a cross at the top."""
    for name, arms in panel.lines.items():
        found = [(arm.settings[RATE], arm.values(LOSS)) for arm in arms if arm.values(LOSS)]
        rates, means = [rate for rate, _ in found], [statistics.mean(values) for _, values in found]
        axes.plot(rates, means, color=colors[name], label=plain(name), marker="" if len(found) > 1 else "_")
        low, high = [min(values) for _, values in found], [max(values) for _, values in found]
        axes.fill_between(rates, low, high, color=colors[name], alpha=0.18, linewidth=0)
        points = [(rate, value) for rate, values in found for value in values]
        axes.scatter(*zip(*points, strict=True), color=[colors[name]], s=14, linewidths=0) if points else None
        lost = [arm.settings[RATE] for arm in arms if not arm.values(LOSS)]
        axes.scatter(lost, [0.98] * len(lost), marker="x", color=[colors[name]], transform=axes.get_xaxis_transform())
    rates = sorted({arm.settings[RATE] for arms in panel.lines.values() for arm in arms})
    axes.set_xscale("log")
    axes.set_xlim(rates[0] / 1.15, rates[-1] * 1.15)
    axes.set_xticks(rates, _apart(rates), rotation=35 if len(rates) > 4 else 0)
    axes.minorticks_off()
    axes.set(xlabel="peak learning rate", ylabel=LOSS, title=plain(panel.title))
    if panel.most is not None:
        low = min(value for arms in panel.lines.values() for arm in arms for value in arm.values(LOSS))
        axes.set_ylim(low - 0.04 * (panel.most - low), panel.most)


def line_names(panels: Sequence[RatePanel]) -> list[str]:
    """The names of all lines, each once."""
    return list(dict.fromkeys(name for panel in panels for name in panel.lines))


def rates_figure(panels: Sequence[RatePanel], columns: int, names: Sequence[str] | None = None) -> Figure:
    """All panels; what they share is in one legend above them.

    Args:
        names: the lines of this and other figures, in the order of their colours; None: of this one alone.
    """
    names = names or line_names(panels)
    colors = dict(zip(names, matplotlib.color_sequences["tab10" if len(names) <= 10 else "tab20"] * 9, strict=False))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.3, 3.2 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        draw_rates(axes, panel, colors)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = {text: line for axes in grid for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if any(not arm.values(LOSS) for panel in panels for arms in panel.lines.values() for arm in arms):
        handles["no run finished"] = Line2D([], [], color=INK, marker="x", linestyle="")
    room = int(11 * figure.get_figwidth() / (6 + max(map(len, handles), default=0)))  # entries of that many characters
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=max(1, min(room, len(handles))))
    return figure


# ---------------------------------------------------------------- two settings at once


@dataclass(frozen=True)
class Map:
    """The mean loss of every combination of two settings, (rows, columns)."""

    title: str
    keys: tuple[str, str]
    labels: tuple[list[str], list[str]]
    losses: list[list[float]]


def maps_of(comparison: Comparison) -> list[Map]:
    """Maps of the two settings that cross fully in most combinations, one for each value of the others.

    Two numbers come before options. Where learning rates differ, each arm is at its best; or the rate is one of the two
    beside another number.
    """
    best = [arm for arm, _ in at_best_rates(comparison.arms)]
    arms = best or list(comparison.arms)
    keys = [key for key in differing(arms) if key != RATE]
    candidates = [_maps(arms, pair, keys) for pair in combinations(keys, 2)]
    if best:
        numbers = [key for key in keys if _is_numeric(comparison.arms, key)]
        candidates += [_maps(comparison.arms, (key, RATE), [*keys, RATE]) for key in numbers]

    def rank(maps: list[Map]) -> tuple[bool, int]:
        numeric = all(_is_numeric(comparison.arms, key) for key in maps[0].keys)
        return numeric, sum(len(one.losses) * len(one.losses[0]) for one in maps)

    return max((maps for maps in candidates if maps), key=rank, default=[])


def _is_numeric(arms: Sequence[Arm], key: str) -> bool:
    return all(is_number(arm.settings[key]) for arm in arms if key in arm.settings)


def _maps(arms: Sequence[Arm], pair: tuple[str, str], keys: Sequence[str]) -> list[Map]:
    others = [key for key in keys if key not in pair]
    facets: dict[str, dict[tuple[str, str], float]] = {}
    for arm in arms:
        loss = arm.mean(LOSS)
        if loss is not None and all(key in arm.settings for key in pair):
            facets.setdefault(label(arm, others), {})[setting(arm, pair[0]), setting(arm, pair[1])] = loss
    return [made for title, cells in facets.items() if (made := _map(title, pair, cells)) is not None]


def _map(title: str, pair: tuple[str, str], cells: dict[tuple[str, str], float]) -> Map | None:
    first, second = (list(dict.fromkeys(values)) for values in zip(*cells, strict=True))
    if len(first) < 2 or len(second) < 2 or len(cells) < len(first) * len(second):
        return None
    return Map(title, pair, (first, second), [[cells[row, column] for column in second] for row in first])


def maps_figure(maps: Sequence[Map], columns: int) -> Figure:
    """All maps; in each the lowest loss is framed."""
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    height = 0.45 * max(len(one.losses) for one in maps) + 1.1
    figure = Figure(figsize=(4.2 * columns + 0.3, rows * height + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, one in zip(grid, maps, strict=False):
        draw_map(axes, one)
    for axes in grid[len(maps) :]:
        axes.set_axis_off()
    figure.suptitle(f"mean {LOSS}; framed: the lowest", fontsize=9.5)
    return figure


def draw_map(axes: Axes, one: Map) -> None:
    """One map; its darkest colour is its own lowest loss."""
    image = axes.imshow(one.losses, cmap="YlGnBu_r", aspect="auto")
    values = [loss for row in one.losses for loss in row]
    for row, losses in enumerate(one.losses):
        for column, loss in enumerate(losses):
            dark = sum(image.cmap(image.norm(loss))[:3]) < 1.6
            axes.text(column, row, f"{loss:.4f}", ha="center", va="center", color="white" if dark else "black")
            if loss == min(values):
                axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, color="crimson", lw=1.8))
    axes.set_yticks(range(len(one.labels[0])), one.labels[0])
    axes.set_xticks(range(len(one.labels[1])), one.labels[1])
    axes.set(ylabel=one.keys[0], xlabel=one.keys[1], title=plain(one.title))
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# ---------------------------------------------------------------- figures


def overview(shown: Sequence[Shown], title: str) -> Figure:
    """Losses over bytes, the end of them, and over time; below them what every arm reached and took."""
    bars = 0.24 * len(shown) + 0.9
    room = 0.4 + 0.07 * max(len(one.name) + 10 for one in shown)  # inches for the names, and for the legend above
    figure = Figure(figsize=(11 + room, 3.6 + bars), layout="constrained")
    (key, whole, end, timed), (names, *numbers) = figure.subplots(
        2, 4, height_ratios=(3.4, bars), width_ratios=(room, 3.6, 3.6, 3.6)
    )
    draw_losses(whole, shown, "tokens")
    draw_losses(end, shown, "tokens")
    draw_losses(timed, shown, "seconds")
    limit(whole, shown)
    limit(timed, shown)
    limit_to_end(end, shown)
    for axes, heading in zip(numbers, (LOSS, *FURTHER), strict=True):
        draw_number(axes, shown, heading, names=False)
    for index, one in enumerate(shown):
        names.text(1, index, one.name, ha="right", va="center")
    names.set(xlim=(0, 1), ylim=numbers[0].get_ylim())
    key.legend(handles=_legend(shown), loc="upper right", borderaxespad=0)
    for axes in (key, names):
        axes.set_axis_off()
    figure.suptitle(plain(title), fontsize=9.5)
    return figure


def _legend(shown: Sequence[Shown]) -> list[Line2D]:
    handles = [Line2D([], [], color=one.color, label=f"{one.name} (n={one.arm.share()})", lw=2) for one in shown]
    if any(run.status != "finished" for one in shown for run in one.arm.runs):
        handles.append(Line2D([], [], color=INK, linestyle=":", label="did not finish"))
    return handles


def single_panels(comparison: Comparison, shown: Sequence[Shown]) -> dict[str, Figure]:
    """The same panels and more, each a figure of its own, by what it shows: for a page, whose text has the legend."""
    panels: dict[str, Figure] = {}

    def add(name: str, height: float, draw: Callable[[Axes], object]) -> None:
        panels[name] = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
        draw(panels[name].subplots())

    add("training loss over bytes", 3.3, lambda axes: (draw_losses(axes, shown, "tokens"), limit(axes, shown)))
    add(
        "the last third of training loss; points: validation",
        3.3,
        lambda axes: (draw_losses(axes, shown, "tokens"), limit_to_end(axes, shown)),
    )
    add("training loss over time", 3.3, lambda axes: (draw_losses(axes, shown, "seconds"), limit(axes, shown)))
    for heading in (LOSS, *FURTHER):
        height = 0.24 * len(shown) + 0.9
        add(heading, height, lambda axes, heading=heading: draw_number(axes, shown, heading, names=True))
    rates = rate_panels(comparison)
    for number, panel in enumerate(rates, start=1):
        name = panel.title or f"panel {number}"
        panels[f"{LOSS} over learning rates: {name}"] = rates_figure([panel], 1, line_names(rates))
    for one in maps_of(comparison):
        panels[f"{LOSS} by {one.keys[0]} and {one.keys[1]} {one.title}".rstrip()] = maps_figure([one], 1)
    return panels


def as_svg(figure: Figure, prefix: str) -> str:
    """The figure as an element of a page, in the page's own colours.

    Args:
        prefix: of its identifiers, which would otherwise be those of another figure of the page.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return text.replace(INK, "currentColor")


def write(comparison: Comparison, title: str, path: Path) -> list[Path]:
    """Draws the comparison into a file and, where there is something to see, rates and maps into others beside it."""
    with matplotlib.rc_context(STYLE):
        shown, note = chosen(comparison)
        figures = {path: overview(shown, "; ".join(filter(None, (title, note))))}
        if panels := rate_panels(comparison):
            figures[path.with_stem(f"{path.stem}_learning_rates")] = rates_figure(panels, 3)
        if maps := maps_of(comparison):
            figures[path.with_stem(f"{path.stem}_map")] = maps_figure(maps, 3)
        for file, figure in figures.items():
            figure.savefig(file, dpi=130)
    return list(figures)
