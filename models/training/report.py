"""What a run's files say: read back, as a table and as plots."""

import csv
import dataclasses
import functools
import itertools
import math
import shlex
import statistics
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from models.training import metrics
from models.training.identity import flat
from models.training.run_files import (
    LOG_FILE,
    METRICS_FILE,
    POSITION_BIAS_FILE,
    RECORD_FILE,
    SAMPLES_FILE,
    is_owned,
    load_config,
    read_csv,
    read_record,
    read_samples,
)
from models.training.tables import console, print_line, show

if TYPE_CHECKING:  # Lightning takes seconds to import, and whoever reads runs does not need it
    from data.bytes import Corpus
    from models.training.runs import Run

PLOT_FILE = "loss_and_memory.png"
POSITION_BIAS_PLOT = "position_bias.png"
NAMES = ("run", "status")  # the columns of a table of runs before its numbers
STATUS_STYLES = {"finished": "green", "running": "cyan", "interrupted": "yellow", "killed": "yellow"}  # others: red


@dataclasses.dataclass(frozen=True)
class Results:
    """A run's record and metrics.

    Attributes:
        folder: the run's folder.
        record: run.json.
        rows: metrics.csv, a dict a logged step, numbers where a cell is filled.
        label: what tells the run from others where their folders share a name, or None.
    """

    folder: Path
    record: dict[str, Any]
    rows: list[dict[str, float]]
    label: str | None = None

    @property
    def name(self) -> str:
        """The label, or else the folder's name."""
        return self.label or self.folder.name

    @functools.cached_property
    def status(self) -> str:
        """running, finished, failed, diverged, interrupted, or killed: running by its record, and owned by nobody."""
        status = self.record.get("status", "unknown")
        if status != "running" or is_owned(self.folder):
            return status
        with suppress(ValueError, OSError):  # it may have ended since its record was read
            status = read_record(self.folder).get("status", status)
        return "killed" if status == "running" else status

    @functools.cached_property
    def configuration(self) -> dict[str, Any] | None:
        """config.yaml, with the keys of today; None where the run ended before it wrote one that can be read."""
        try:
            return OmegaConf.to_container(load_config(self.folder))
        except ValueError:
            return None

    def configured(self, key: str) -> Any:
        """The value of a dotted key; None where there is no configuration, or no such key."""
        return flat(self.configuration or {}).get(key)

    @functools.cached_property
    def precision(self) -> str | None:
        """What it computed in. Where no key says it, its device does, and that shows in what it logged of memory; None
        where nothing was logged.
        """
        from models.training.devices import choose_precision  # here: it imports torch

        given = self.configured("trainer.precision")
        if given is not None:
            return given
        for row in reversed(self.rows):
            for column, cuda in (("memory/peak_allocated_gib", True), ("memory/rss_gib", False)):
                if column in row:
                    return choose_precision(None, cuda=cuda)
        return None

    def series(self, column: str) -> tuple[list[float], list[float]]:
        """The filled values of a column and, first, their steps."""
        rows = [row for row in self.rows if column in row and "step" in row]
        return [row["step"] for row in rows], [row[column] for row in rows]

    def over_tokens(self, column: str) -> tuple[list[float], list[float]]:
        """The filled values of a column and, first, the tokens trained on until then."""
        per_step = self.record.get("tokens_per_step", 1)
        rows = [row for row in self.rows if column in row]
        return [row.get("train/tokens", row["step"] * per_step) for row in rows], [row[column] for row in rows]

    def last(self, column: str) -> float | None:
        """The last value of a column, or None."""
        values = self.series(column)[1]
        return values[-1] if values else None

    def current(self, column: str) -> float | None:
        """The last value of a column, or None where training went on after it."""
        steps, values = self.series(column)
        return values[-1] if values and steps[-1] >= (self.last("step") or 0) else None

    def best(self, column: str) -> float | None:
        """The smallest finite value of a column, or None; of val/bpc, of scores of as many bytes as the last one."""
        rows = [row for row in self.rows if column in row and "step" in row and math.isfinite(row[column])]
        if column == "val/bpc" and rows and (scored := rows[-1].get("val/bytes")) is not None:
            rows = [row for row in rows if row.get("val/bytes", scored) == scored]  # earlier versions did not log it
        return min((row[column] for row in rows), default=None)

    def median(self, column: str) -> float | None:
        """The median of a column, or None."""
        values = self.series(column)[1]
        return statistics.median(values) if values else None

    def largest(self, column: str) -> float | None:
        """The largest value of a column, or None."""
        return max(self.series(column)[1], default=None)

    def number(self, heading: str) -> float | None:
        """What stands under one of metrics.headings(), or None."""
        found = [getattr(self, number.of)(column) for column, number in metrics.numbers_under(heading)]
        return max((value for value in found if value is not None), default=None)


def read_results(folder: str | Path) -> Results:
    """Reads a run's folder. A run that has logged nothing yet has no rows.

    Raises:
        ValueError: the folder is no run, or one of its files cannot be read; names the file.
    """
    folder = Path(folder)
    return Results(folder, read_record(folder), _read_rows(folder / METRICS_FILE))


def headings() -> list[str]:
    """Those of a table of runs."""
    return [*NAMES, *metrics.headings()]


def table(runs: list[Results], title: str) -> Table:
    """One line a run: its numbers, see metrics.py."""
    columns = Table(title=title)
    for heading in headings():
        columns.add_column(heading, justify="left" if heading in NAMES else "right")
    for run in runs:
        name, status, *numbers = map(escape, cells(run))
        columns.add_row(name, f"[{STATUS_STYLES.get(run.status, 'red')}]{status}[/]", *numbers)
    return columns


def markdown(runs: list[Results]) -> str:
    """The same table for a README."""
    rule = ["---" if heading in NAMES else "---:" for heading in headings()]
    lines = [headings(), rule, *([cell.replace("|", "\\|") for cell in cells(run)] for run in runs)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _read_rows(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    try:
        return [{key: float(cell) for key, cell in row.items()} for row in read_csv(path)]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is no table of numbers: {error}") from error


def cells(run: Results) -> list[str]:
    """Of a run's row: the texts under headings()."""
    numbers = [(run.number(heading), metrics.form_of(heading)) for heading in metrics.headings()]
    return [run.name, run.status, *("-" if value is None else form.format(value) for value, form in numbers)]


def plot(runs: list[Results], path: Path) -> None:
    """Draws the curves of metrics.py against tokens, every run in a color, into a PNG."""
    from matplotlib.figure import Figure  # no pyplot: what a notebook draws with stays as it is

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, len(metrics.PANELS))
    for axes, (panel, (unit, title)) in zip(panels, metrics.PANELS.items(), strict=True):
        for (index, run), (column, curve) in itertools.product(enumerate(runs), metrics.curves_in(panel)):
            label = _legend(run) if curve.named else None
            axes.plot(*run.over_tokens(column), color=f"C{index % 10}", label=label, **curve.style)
        axes.set(xlabel="tokens (bytes)", ylabel=unit, title=title)
        axes.grid(alpha=0.3)
        if runs and any(curve.named for _, curve in metrics.curves_in(panel)):
            axes.legend(fontsize="small")
        if panel == "memory":
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    figure.savefig(path, dpi=120)


def plot_position_bias(run: Results, path: Path) -> None:
    """Draws the learned biases of the last validation against the distance, a panel a layer and a line a head."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = _read_rows(run.folder / POSITION_BIAS_FILE)
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    layers = sorted({row["layer"] for row in last})
    columns = min(4, len(layers))
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.6, 2.6 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    heads = [name for name in last[0] if name.startswith("head")]
    for axes in grid.flat[len(layers) :]:
        axes.set_axis_off()
    for layer, axes in zip(layers, grid.flat, strict=False):
        own = [row for row in last if row["layer"] == layer]
        for index, head in enumerate(heads):
            line = [row[head] for row in own]
            color = colormaps["viridis"](index / max(1, len(heads) - 1))
            axes.plot([row["distance"] for row in own], line, color=color, label=head, linewidth=1)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set(title=f"layer {layer:.0f}", xlabel="distance (bytes)", ylabel="bias of a logit")
        axes.label_outer()
        axes.grid(alpha=0.3)
    figure.suptitle(f"{run.name}: biases by distance at step {last[0]['step']:.0f}")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=120)


def _legend(run: Results) -> str:
    return run.name if run.status == "finished" else f"{run.name} ({run.status})"


def conclude(run: "Run", config: DictConfig, corpus: "Corpus") -> None:
    """Prints the summary of a finished run and where everything is, and draws its plot."""
    if config.compressors:
        from data.compressors import compressor_bits_per_byte

        run.update(compressors_val_bpc=compressor_bits_per_byte(corpus, "val"))
    results = read_results(run.folder)
    plot([results], run.folder / PLOT_FILE)
    if (run.folder / POSITION_BIAS_FILE).is_file():
        plot_position_bias(results, run.folder / POSITION_BIAS_PLOT)
    out = console()
    samples = read_samples(run.folder / SAMPLES_FILE)
    if samples:
        step, text = samples[-1]
        out.rule(f"a sample after step {step}")
        out.print(Text(text + "\n"))  # as it is: in a str rich replaces :names: of emoji, too
        out.rule()
    show(table([results], title="summary"))
    record = run.record["corpus"]
    out.print(
        Text(
            f"val bpc: bits per byte of {record['val_scored']:,} bytes of {corpus.name}, non-overlapping windows of "
            f"{config.seq_len}; data SHA-256 {record['sha256'][:16]}"
        )
    )
    if config.compressors:
        sizes = run.record["compressors_val_bpc"]
        out.print(
            "the validation split by compressors, alone (after the training split): "
            f"gzip -9 {sizes['gzip_9']:.3f} ({sizes['gzip_9_given_train']:.3f}), "
            f"xz -9e {sizes['xz_9e']:.3f} ({sizes['xz_9e_given_train']:.3f}) bits per byte",
            highlight=False,
        )
    print_places(run)


def print_places(run: "Run") -> None:
    """Where everything of a run is, and what can be done with it."""
    folder, quoted = run.folder, shlex.quote(str(run.folder))
    places = {
        "plot": folder / PLOT_FILE,
        "positions": folder / POSITION_BIAS_PLOT,
        "metrics": folder / METRICS_FILE,
        "samples": folder / SAMPLES_FILE,
        "checkpoints": folder / "checkpoints",
        "log": folder / LOG_FILE,
        "record": folder / RECORD_FILE,
    }
    for name, path in places.items():
        if path.exists():
            print_line(f"  {name:<12} {path}")
    print_line(f"  text         python -m scripts.generate {quoted}")
    print_line(f"  evaluation   python -m scripts.evaluate {quoted}")
    print_upload(run)


def print_upload(run: "Run") -> None:
    """How an offline run of wandb is uploaded, where there is one."""
    if run.record.get("wandb_folder"):  # of this start: the clock may have stepped back since the last one
        print_line(f"  upload       wandb sync {shlex.quote(str(run.folder / 'wandb' / run.record['wandb_folder']))}")
