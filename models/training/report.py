"""What a run's files say: read back, as a table and as plots."""

import csv
import dataclasses
import logging
import math
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from data.bytes import Corpus
from data.compressors import compressor_bits_per_byte
from models.training.run_files import METRICS_FILE, RECORD_FILE, is_owned, read_csv, read_record
from models.training.runs import Run
from models.training.tables import console, print_line, show

PLOT_FILE = "loss_and_memory.png"
MEMORY_COLUMNS = ("memory/peak_allocated_gib", "memory/rss_gib")  # GPU, CPU
HEADINGS = ("run", "status", "steps", "val bpc", "best", "test bpc", "tokens/s", "MFU", "peak GiB")
STATUS_STYLES = {"finished": "green", "running": "cyan", "interrupted": "yellow", "diverged": "red"}

log = logging.getLogger(__name__)


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

    @property
    def status(self) -> str:
        """running, finished, failed, diverged, interrupted, or killed: running by its record, and owned by nobody."""
        status = self.record.get("status", "unknown")
        return "killed" if status == "running" and not is_owned(self.folder) else status

    def series(self, column: str, against: str = "step") -> tuple[list[float], list[float]]:
        """The filled values of a column and, first, where they stand."""
        rows = [row for row in self.rows if column in row and against in row]
        return [row[against] for row in rows], [row[column] for row in rows]

    def over_tokens(self, column: str) -> tuple[list[float], list[float]]:
        """The filled values of a column and, first, the tokens trained on until then."""
        per_step = self.record.get("tokens_per_step", 1)
        rows = [row for row in self.rows if column in row]
        return [row.get("train/tokens", row["step"] * per_step) for row in rows], [row[column] for row in rows]

    def last(self, column: str) -> float | None:
        """The last value of a column, or None."""
        values = self.series(column)[1]
        return values[-1] if values else None

    def test_bpc(self) -> float | None:
        """The last test's bits per byte, or None where training went on after it."""
        steps, values = self.series("test/bpc")
        return values[-1] if values and steps[-1] >= (self.last("step") or 0) else None

    def best(self, column: str) -> float | None:
        """The smallest finite value of a column, or None."""
        values = [value for value in self.series(column)[1] if math.isfinite(value)]
        return min(values) if values else None

    def median(self, column: str) -> float | None:
        """The median of a column, or None."""
        values = sorted(self.series(column)[1])
        return values[len(values) // 2] if values else None

    def peak_memory_gib(self) -> float | None:
        """Largest memory of any interval: allocated on the GPU, or resident on a CPU."""
        values = [value for column in MEMORY_COLUMNS for value in self.series(column)[1]]
        return max(values) if values else None


def read_results(folder: str | Path) -> Results:
    """Reads a run's folder. A run that has logged nothing yet has no rows.

    Raises:
        ValueError: the folder is no run, or one of its files cannot be read; names the file.
    """
    folder = Path(folder)
    return Results(folder, read_record(folder), _read_rows(folder / METRICS_FILE))


def table(runs: list[Results], title: str) -> Table:
    """One line a run: bits per byte, throughput, memory."""
    columns = Table(title=title)
    for heading in HEADINGS:
        columns.add_column(heading, justify="left" if heading in ("run", "status") else "right")
    for run in runs:
        name, status, *numbers = map(escape, _cells(run))
        columns.add_row(name, f"[{STATUS_STYLES.get(run.status, 'red')}]{status}[/]", *numbers)
    return columns


def markdown(runs: list[Results]) -> str:
    """The same table for a README."""
    rule = ["---" if heading in ("run", "status") else "---:" for heading in HEADINGS]
    lines = [list(HEADINGS), rule, *([cell.replace("|", "\\|") for cell in _cells(run)] for run in runs)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _read_rows(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    try:
        return [{key: float(cell) for key, cell in row.items()} for row in read_csv(path)]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is no table of numbers: {error}") from error


def _cells(run: Results) -> list[str]:
    """The texts under HEADINGS."""
    return [
        run.name,
        run.status,
        _cell(run.last("step"), "{:.0f}"),
        _cell(run.last("val/bpc"), "{:.4f}"),
        _cell(run.best("val/bpc"), "{:.4f}"),
        _cell(run.test_bpc(), "{:.4f}"),
        _cell(run.median("throughput/tokens_per_s"), "{:,.0f}"),
        _cell(run.median("throughput/mfu"), "{:.1%}"),
        _cell(run.peak_memory_gib(), "{:.2f}"),
    ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def plot(runs: list[Results], path: Path) -> None:
    """Draws bits per byte and memory against tokens, every run a line, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    figure, (loss, memory) = pyplot.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for index, run in enumerate(runs):
        color = f"C{index % 10}"
        loss.plot(*run.over_tokens("train/bpc"), color=color, alpha=0.35, linewidth=1)
        loss.plot(*run.over_tokens("val/bpc"), color=color, marker="o", markersize=3, label=_legend(run))
        for column, style in (("memory/peak_reserved_gib", ":"), *((name, "-") for name in MEMORY_COLUMNS)):
            memory.plot(*run.over_tokens(column), style, color=color)
    loss.set(xlabel="tokens (bytes)", ylabel="bits per byte", title="validation (dots) and training loss")
    memory.set(xlabel="tokens (bytes)", ylabel="GiB", title="peak allocated (dotted: reserved), or resident on a CPU")
    memory.set_ylim(0, 1.1 * memory.get_ylim()[1])
    for axes in (loss, memory):
        axes.grid(alpha=0.3)
    if runs:
        loss.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _legend(run: Results) -> str:
    return run.name if run.status == "finished" else f"{run.name} ({run.status})"


def conclude(run: Run, config: DictConfig, corpus: Corpus) -> None:
    """Prints the summary of a finished run and where everything is, and draws its plot."""
    if config.compressors:
        run.update(compressors_val_bpc=compressor_bits_per_byte(corpus, "val"))
    results = read_results(run.folder)
    plot([results], run.folder / PLOT_FILE)
    out = console()
    sample = run.folder / "samples.txt"
    if sample.is_file():
        last = sample.read_text(encoding="utf-8").rsplit("--- step ", 1)[-1]
        out.rule("a sample after step " + last.split(" ", 1)[0])
        out.print(last.split("\n", 1)[-1], markup=False, highlight=False)
        out.rule()
    show(table([results], title="summary"))
    record = run.record["corpus"]
    out.print(
        f"val bpc: bits per byte of {record['val_scored']:,} bytes of {corpus.name}, non-overlapping windows of "
        f"{config.seq_len}; data SHA-256 {record['sha256'][:16]}",
        highlight=False,
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


def print_places(run: Run) -> None:
    """Where everything of a run is, and what can be done with it."""
    folder, quoted = run.folder, shlex.quote(str(run.folder))
    places = {
        "plot": folder / PLOT_FILE,
        "metrics": folder / METRICS_FILE,
        "samples": folder / "samples.txt",
        "checkpoints": folder / "checkpoints",
        "log": folder / "train.log",
        "record": folder / RECORD_FILE,
    }
    for name, path in places.items():
        if path.exists():
            print_line(f"  {name:<12} {path}")
    print_line(f"  text         python -m scripts.generate {quoted}")
    print_line(f"  evaluation   python -m scripts.evaluate {quoted}")
    if run.record.get("wandb_folder"):  # of this start: the clock may have stepped back since the last one
        print_line(f"  upload       wandb sync {shlex.quote(str(folder / 'wandb' / run.record['wandb_folder']))}")
