"""What a run's folder holds, and how it is read back. Nothing of Lightning is imported."""

import csv
import fcntl
import io
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from conf.stored import read_stored

CONFIG_FILE = "config.yaml"
RECORD_FILE = "run.json"
LOG_FILE = "train.log"
METRICS_FILE = "metrics.csv"
SAMPLES_FILE = "samples.txt"
POSITION_BIAS_FILE = "position_bias.csv"  # of each validation, where it is learned
RATES_FILE = "rates.csv"  # of each step, in a run by time
LOCK_FILE = ".lock"

log = logging.getLogger(__name__)


def load_config(folder: Path) -> DictConfig:
    """The resolved configuration of a run, with the keys of today."""
    return read_stored(file_of_run(folder, CONFIG_FILE))


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a run."""
    path = file_of_run(folder, RECORD_FILE)
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(path)!r} must hold an object, got {type(record).__name__}")
    return record


def file_of_run(folder: str | Path, name: str) -> Path:
    """The path of one of a run's files; ValueError if the folder has none of that name."""
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is not a run's folder: it has no {name}")
    return path


def is_owned(folder: Path) -> bool:
    """Whether a process is writing the run."""
    try:
        with open(folder / LOCK_FILE) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a metrics file, without the cells that are empty.

    A last line that does not end is left out, with a warning: its run was killed while writing, or is writing.
    """
    with open(path, newline="") as file:
        lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        log.warning("%s ends within a line, which is left out: its run was killed, or is writing", path)
        lines.pop()
    return [{key: cell for key, cell in row.items() if cell != ""} for row in csv.DictReader(lines)]


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as lines of a CSV file; floats in as many digits as say them exactly."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def sample_section(step: int, text: str) -> str:
    """A sample as samples.txt has it. A line of the text that looks like a heading gets a backslash before it."""
    text = re.sub(r"^(\\*--- step \d+ ---)$", r"\\\1", text, flags=re.MULTILINE)
    return f"--- step {step} ---\n{text}\n"


def read_samples(path: str | Path) -> list[tuple[int, str]]:
    """The samples of a run, each the optimizer step and the text; none if there is no such file."""
    if not Path(path).is_file():
        return []
    sections = re.split(r"^--- step (\d+) ---\n", Path(path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = [re.sub(r"^\\(\\*--- step \d+ ---)$", r"\1", text, flags=re.MULTILINE) for text in sections[2::2]]
    return [(int(step), text.removesuffix("\n")) for step, text in zip(sections[1::2], texts, strict=True)]
