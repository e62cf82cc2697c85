"""Metrics on disk: one CSV a run that survives being killed and resumed."""

import csv
import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.csv"


class CSVLogger(Logger):
    """Appends a row of metrics a logged step to ``run_dir/metrics.csv``.

    Lightning's own CSVLogger deletes the earlier file when a run is resumed. This one keeps the rows up to the
    step that is resumed from and drops later ones, which the resumed run writes again.

    Args:
        run_dir: the run's folder.
        resume_step: the optimizer step that the run continues from, or None for a new run.
    """

    def __init__(self, run_dir: str | Path, *, resume_step: int | None):
        super().__init__()
        self.path = Path(run_dir) / METRICS_FILE
        self._rows: list[dict[str, Any]] = []
        self._written = False  # whether the file holds exactly these rows under these columns
        if resume_step is not None and self.path.exists():
            self._rows = [row for row in read_csv(self.path) if int(row["step"]) <= resume_step]
        self._columns: list[str] = ["step"]
        for row in self._rows:
            self._columns += [key for key in row if key not in self._columns]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Nothing: a run is one folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration is stored in the run's folder when it starts."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Writes one row; metrics of a step that already has its row join it."""
        values = {key: value.item() if isinstance(value, Tensor) else value for key, value in metrics.items()}
        new_columns = [key for key in values if key not in self._columns]
        self._columns += new_columns
        joins = bool(self._rows) and int(self._rows[-1]["step"]) == step
        if joins:
            self._rows[-1].update(values)
        else:
            self._rows.append({"step": step, **values})
        if joins or new_columns or not self._written:
            self._rewrite()
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, fieldnames=self._columns).writerow(self._rows[-1])

    def replay(self, logger: Logger) -> None:
        """Logs to another logger every row that was kept from before the run was resumed."""
        for row in self._rows:
            logger.log_metrics({key: float(row[key]) for key in row if key != "step"}, step=int(row["step"]))

    def _rewrite(self) -> None:
        # Written whole and renamed: a kill at any moment leaves either the old file or the new one.
        temporary = self.path.with_suffix(".csv.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self._columns)
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(temporary, self.path)
        self._written = True


def csv_only(*, run_dir: Path, resume_step: int | None, wandb_id: str) -> list[Logger]:  # noqa: ARG001
    """Metrics to ``metrics.csv`` in the run's folder; no id is needed."""
    return [CSVLogger(run_dir, resume_step=resume_step)]


def wandb_and_csv(
    *,
    run_dir: Path,
    resume_step: int | None,
    wandb_id: str,
    project: str,
    entity: str | None,
    offline: bool,
    tags: list[str],
) -> list[Logger]:
    """Metrics to Weights & Biases, and to ``metrics.csv`` beside it.

    Args:
        run_dir: the run's folder; wandb writes below it.
        resume_step: the optimizer step that the run continues from, or None for a new run.
        wandb_id: the run's id, the same when it is resumed.
        project: wandb's project.
        entity: wandb's user or team, None for the account's own.
        offline: write to disk only, no account and no network needed; ``wandb sync`` uploads it later.
        tags: wandb's tags.
    """
    import wandb  # here: it takes a second, and logger=csv needs none of it

    logger = WandbLogger(
        name=run_dir.name,
        id=wandb_id,
        save_dir=run_dir,
        project=project,
        entity=entity,
        offline=offline,
        tags=tags,
        resume="allow",
        log_model=False,
        settings=wandb.Settings(silent=offline),  # offline it would only repeat what the summary says
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning 2.6 always passes it, and wandb warns of it each time
    # wandb's table of runs shows the last value of a metric unless told otherwise; on the first process only
    logger.experiment.define_metric("val/bpc", step_metric="trainer/global_step", summary="min")
    csv_logger = CSVLogger(run_dir, resume_step=resume_step)
    if offline:
        # wandb sync replaces what the server has of this id: the newest offline folder must hold the whole run
        csv_logger.replay(logger)
    return [logger, csv_logger]


def finish(loggers: list[Logger], *, failed: bool) -> None:
    """Closes wandb's run, so that the next job of a sweep gets its own."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=int(failed))


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
