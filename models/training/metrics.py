"""The columns of metrics.csv: what each means, and where people see it. One entry here shows it in all of these places.

Tables of runs (on a terminal and as Markdown), tables over seeds, a run's plot and the progress bar read METRICS; so
does docs/training.md, by its test.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import SupportsFloat


@dataclass(frozen=True)
class Number:
    """A column as one number of a run, in tables.

    Attributes:
        heading: where it stands. Under a heading that several columns share stands the largest of theirs.
        of: which of the column's values it is, a method of ``Results``: last, best (the smallest), largest, median, or
            current (the last, unless training went on after it).
        form: how it is written, a format string.
        compared: it also stands in the tables over seeds, as mean and deviation.
    """

    heading: str
    of: str
    form: str
    compared: bool = False


@dataclass(frozen=True)
class Curve:
    """A column as a line over tokens, in a run's plot.

    Attributes:
        panel: one of PANELS.
        style: matplotlib's keywords.
        named: the line carries the run's name.
    """

    panel: str
    style: dict[str, str | float]
    named: bool = False


@dataclass(frozen=True)
class Metric:
    """What is known of a column.

    Attributes:
        meaning: in words, with its unit.
        numbers: the numbers that tables have of it.
        curve: its line in a run's plot.
        bar: how the progress bar writes its newest value, of those that ``GPTModule.report`` names as watched.
    """

    meaning: str
    numbers: tuple[Number, ...] = ()
    curve: Curve | None = None
    bar: str | None = None


# By panel of a run's plot: the axis, and the title.
PANELS = {
    "loss": ("bits per byte", "validation (dots) and training loss"),
    "memory": ("GiB", "peak allocated (dotted: reserved), or resident on a CPU"),
}
# By column; "layerN" is layer0, layer1 and so on. Tables have their numbers in this order.
METRICS = {
    "step": Metric("finished optimizer steps", (Number("steps", "last", "{:.0f}"),)),
    "train/loss": Metric("training loss in nats a byte, the mean since the last row"),
    "train/bpc": Metric(
        "the same in bits a byte", curve=Curve("loss", {"alpha": 0.35, "linewidth": 1}), bar="{:.3f} bpc"
    ),
    "train/lr": Metric("learning rate of that step"),
    "train/grad_norm": Metric("l2 norm of that step's gradient, before clipping"),
    "train/tokens": Metric("bytes trained on so far"),
    "train/seconds": Metric("seconds of training steps so far, with `trainer.budget_minutes`"),
    "val/bpc": Metric(
        "bits a byte of the validation split",
        (Number("val bpc", "last", "{:.4f}", compared=True), Number("best", "best", "{:.4f}")),
        curve=Curve("loss", {"marker": "o", "markersize": 3}, named=True),
    ),
    "val/bytes": Metric("bytes of it that were scored"),
    "test/bpc": Metric("bits a byte of the test split, at the end", (Number("test bpc", "current", "{:.4f}"),)),
    "throughput/tokens_per_s": Metric(
        "bytes a second, without validations, samples, checkpoints and the first step",
        (Number("tokens/s", "median", "{:,.0f}", compared=True),),
    ),
    "throughput/model_tflops_per_s": Metric("the model's floating-point operations a second, in 10^12"),
    "throughput/mfu": Metric(
        "the same as a share of the GPU's dense bf16 peak, where that is known", (Number("MFU", "median", "{:.1%}"),)
    ),
    "memory/peak_allocated_gib": Metric(
        "most memory that tensors had since the last row, on a GPU",
        (Number("peak GiB", "largest", "{:.2f}", compared=True),),
        curve=Curve("memory", {"linestyle": "-"}),
    ),
    "memory/peak_reserved_gib": Metric(
        "most memory that PyTorch held since the last row, on a GPU", curve=Curve("memory", {"linestyle": ":"})
    ),
    "memory/rss_gib": Metric(
        "memory of the process, on a CPU",
        (Number("peak GiB", "largest", "{:.2f}", compared=True),),
        curve=Curve("memory", {"linestyle": "-"}),
    ),
    "scale/mean": Metric("learned scale, the mean over all heads"),
    "scale/min": Metric("the smallest of them"),
    "scale/max": Metric("the largest of them"),
    "scale/clamped": Metric(
        "share of heads whose scale is held at its bound, 60 / `attention.groups` (44 with dynamic positions)"
    ),
    "scale/layerN/mean": Metric("learned scale, the mean over the heads of one layer"),
    "scale/layerN/min": Metric("the smallest of them"),
    "scale/layerN/max": Metric("the largest of them"),
    "logit/max": Metric(
        "largest absolute logit of a visible pair in one window of validation data, without a bias by distance"
    ),
    "logit/layerN/max": Metric("the same of one layer"),
}


def metric_of(column: str) -> Metric | None:
    """What is known of a column of metrics.csv, or None."""
    return METRICS.get(re.sub(r"(?<=/)layer\d+(?=/)", "layerN", column))


def headings(*, compared: bool = False) -> list[str]:
    """Those of the numbers of a run, in order; or of those alone that are compared over seeds."""
    every = (number for metric in METRICS.values() for number in metric.numbers)
    return list(dict.fromkeys(number.heading for number in every if number.compared or not compared))


def numbers_under(heading: str) -> list[tuple[str, Number]]:
    """The columns that stand under a heading, each with its number there."""
    every = ((name, number) for name, metric in METRICS.items() for number in metric.numbers)
    return [(name, number) for name, number in every if number.heading == heading]


def form_of(heading: str) -> str:
    """How the numbers under a heading are written."""
    return numbers_under(heading)[0][1].form


def curves_in(panel: str) -> Iterator[tuple[str, Curve]]:
    """The columns that a panel of a run's plot shows, each with its line there."""
    for name, metric in METRICS.items():
        if metric.curve is not None and metric.curve.panel == panel:
            yield name, metric.curve


def bar_texts(values: Mapping[str, SupportsFloat]) -> list[str]:
    """What the progress bar writes of the newest values, by column."""
    shown = [(name, metric.bar) for name, metric in METRICS.items() if metric.bar and name in values]
    return [form.format(float(values[name])) for name, form in shown]


def markdown() -> str:
    """The columns and their meanings, as docs/training.md has them."""
    rows = "".join(f"| `{name}` | {metric.meaning} |\n" for name, metric in METRICS.items())
    return f"| column of `metrics.csv` | |\n|---|---|\n{rows}"
