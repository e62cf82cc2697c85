"""Metrics on disk: one CSV a run that survives being killed and resumed; and, from it, wandb and TensorBoard."""

import csv
import io
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from torch import Tensor

from flash_cosine_sim_attention.identity import DISTRIBUTION
from models.training.checkpoint_files import write_text, writing
from models.training.jobs import sweep_group
from models.training.metrics import METRICS
from models.training.run_files import METRICS_FILE, SAMPLES_FILE, read_csv, read_samples

log = logging.getLogger(__name__)

# WANDB_MODE as wandb takes it, with its older names, in its newer ones.
WANDB_MODES = {
    "online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline",
}  # fmt: skip
EXIT_CODES = {"finished": 0, "interrupted": 255}  # as wandb itself says it; anything else is 1, a failure


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
        """Writes one row; metrics of a step that already has its row join it. Raises OSError that names the file."""
        values = {key: value.item() if isinstance(value, Tensor) else value for key, value in metrics.items()}
        new_columns = [key for key in values if key not in self._columns]
        self._columns += new_columns
        joins = bool(self._rows) and int(self._rows[-1]["step"]) == step
        if joins:
            self._rows[-1].update(values)
        else:
            self._rows.append({"step": step, **values})
        with writing(self.path):
            if joins or new_columns or not self._written:
                self._rewrite()
            else:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, fieldnames=self._columns).writerow(self._rows[-1])

    @rank_zero_only
    def replay(self, logger: Logger) -> None:
        """Logs to another logger all that was kept from before the run was resumed: metrics, and samples of text.

        A run that was killed leaves another logger's files without their last minutes, or with steps that the resumed
        run takes again.
        """
        samples = read_samples(self.path.with_name(SAMPLES_FILE))
        for row in self._rows:
            step = int(row["step"])
            logger.log_metrics({key: float(row[key]) for key in row if key != "step"}, step=step)
            while samples and samples[0][0] <= step:
                log_sample(logger, *samples.pop(0))

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=self._columns)
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path, text.getvalue())
        self._written = True


def csv_only(*, run_dir: Path, resume_step: int | None, wandb_id: str) -> list[Logger]:  # noqa: ARG001
    """Metrics to ``metrics.csv`` in the run's folder and nowhere else: logger=csv, and logger=none.

    A run without it could be neither compared nor plotted nor resumed, so no option leaves it out.
    """
    return [CSVLogger(run_dir, resume_step=resume_step)]


class TextBoardLogger(TensorBoardLogger):
    """TensorBoard's event files, with the configuration and the samples of text."""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:
        """The configuration as text: TensorBoard shows hyperparameters only beside numbers that one run has once."""
        self._add_text("config", OmegaConf.to_yaml(OmegaConf.create(params)), 0)

    @rank_zero_only
    def save(self) -> None:
        """What was logged goes to disk; no file beside it, which a resumed run would leave as it was."""
        self.experiment.flush()

    @rank_zero_only
    def log_text(self, key: str, *, columns: list[str], data: list[list[Any]], step: int) -> None:
        """The last column of each row, as it is: TensorBoard would render Markdown, so it is indented as code."""
        del columns
        for *_, text in data:
            self._add_text(key, text, step)

    def _add_text(self, key: str, text: str, step: int) -> None:
        self.experiment.add_text(key, re.sub("^", "    ", text, flags=re.MULTILINE), step)


def tensorboard_and_csv(*, run_dir: Path, resume_step: int | None, wandb_id: str) -> list[Logger]:  # noqa: ARG001
    """Metrics and samples to TensorBoard's event files in the run's folder, and metrics to ``metrics.csv``.

    A resumed run writes them anew from ``metrics.csv``: every step is there, and none twice.
    """
    logger = TextBoardLogger(run_dir, name="tensorboard", version="", default_hp_metric=False)
    csv_logger = CSVLogger(run_dir, resume_step=resume_step)
    _remove_events(Path(logger.log_dir))
    csv_logger.replay(logger)
    return [logger, csv_logger]


@rank_zero_only
def _remove_events(folder: Path) -> None:
    for path in (*folder.glob("events.out.tfevents.*"), *folder.glob("hparams.yaml")):  # the latter of earlier versions
        path.unlink()


def wandb_and_csv(
    *,
    run_dir: Path,
    resume_step: int | None,
    wandb_id: str,
    project: str | None,
    entity: str | None,
    offline: bool,
    group: str | None,
    job_type: str | None,
    tags: list[str],
    notes: str | None,
) -> list[Logger]:
    """Metrics to Weights & Biases, and to ``metrics.csv`` beside it.

    Args:
        run_dir: the run's folder; wandb writes below it.
        resume_step: the optimizer step that the run continues from, or None for a new run.
        wandb_id: the run's id, the same when it is resumed.
        project: wandb's project; None: the variable WANDB_PROJECT, or flash-cosine-sim-attention.
        entity: wandb's user or team, None for the account's own.
        offline: write to disk only, no account and no network needed; ``wandb sync`` uploads it later. Where the
            variable WANDB_MODE is set, it counts instead.
        group: wandb's group.
        job_type: wandb's job type.
        tags: wandb's tags; none: the variable WANDB_TAGS.
        notes: wandb's notes.
    """
    mode = wandb_mode(offline=offline)
    csv_logger = CSVLogger(run_dir, resume_step=resume_step)
    if mode == "disabled":
        log.info("WANDB_MODE=disabled: metrics go to %s alone", csv_logger.path)
        return [csv_logger]
    import wandb  # here: it takes a second, and logger=csv needs none of it

    logger = WandbLogger(
        name=run_dir.name,
        id=wandb_id,
        save_dir=run_dir,
        project=project or os.environ.get("WANDB_PROJECT") or DISTRIBUTION,
        entity=entity,
        mode=mode,  # not Lightning's offline, which would set WANDB_MODE for all that follows in this process
        group=group,
        job_type=job_type,
        tags=tags or None,
        notes=notes,
        resume="allow",
        log_model=False,
        # Offline it would only repeat what the summary says. A terminal has the progress bar, every state of which
        # wandb would keep.
        settings=wandb.Settings(silent=mode == "offline", console="off" if sys.stdout.isatty() else "auto"),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning 2.6 always passes it, and wandb warns of it each time
    # wandb's table of runs shows the last value of a metric unless told otherwise; on the first process only
    for name in (name for name, metric in METRICS.items() if any(number.of == "best" for number in metric.numbers)):
        logger.experiment.define_metric(name, step_metric="trainer/global_step", summary="min,last")
    if mode == "offline":
        # wandb sync replaces what the server has of this id: the newest offline folder must hold the whole run
        csv_logger.replay(logger)
    return [logger, csv_logger]


def wandb_mode(*, offline: bool) -> str:
    """online, offline or disabled: as WANDB_MODE says, or else the configuration. ValueError for any other word."""
    asked = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
    if asked not in WANDB_MODES:
        raise ValueError(f"WANDB_MODE must be online, offline or disabled, got {asked!r}")
    return WANDB_MODES[asked]


def group_here() -> str | None:
    """What the runs of a sweep have in common, and of the same one started again. None for a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    hydra = HydraConfig.get()
    return sweep_group(Path(hydra.sweep.dir), hydra.runtime.choices.get("sweep"))


@rank_zero_only
def offline_folder(loggers: list[Logger]) -> str | None:
    """The name of the folder below wandb/ that an offline run writes to; None if none does."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger.experiment.offline:
            return Path(logger.experiment.dir).parent.name
    return None


@rank_zero_only
def wandb_id_of(loggers: list[Logger]) -> str | None:
    """The id that wandb's run has; under `wandb agent` it is the agent's choice. None without wandb."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            return logger.experiment.id
    return None


def finish(loggers: list[Logger], *, status: str, error: str | None = None) -> None:
    """Closes wandb's run, so that the next job of a sweep gets its own, and TensorBoard's file.

    Args:
        status: how the run ended, as run.json has it; with the error it stands in wandb's summary.
        error: why, of one that failed or diverged.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _summarise(logger, {"status": status, **({"error": error} if error else {})})
            logger.experiment.finish(exit_code=EXIT_CODES.get(status, 1))
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.close()


@rank_zero_only
def _summarise(logger: WandbLogger, ends: dict[str, str]) -> None:
    logger.experiment.summary.update(ends)


def log_sample(logger: Logger, step: int, text: str) -> None:
    """One sample of text to a logger that takes text."""
    if hasattr(logger, "log_text"):
        logger.log_text("sample", columns=["step", "text"], data=[[step, text]], step=step)
