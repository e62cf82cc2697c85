"""A run by time: counts the seconds of its training steps, and gives every step the learning rate that they say."""

import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

from models.training.checkpoint_files import TRAINING_TIME, write_text, writing
from models.training.devices import wait_for
from models.training.length import Length
from models.training.run_files import RATES_FILE, csv_text, read_csv
from models.training.schedule import Schedule, TimedFractions
from models.training.stopping import Stopping

log = logging.getLogger(__name__)

COLUMNS = ("step", "seconds", "lr_fraction")
# The host waits until the step before the last one is done on the GPU, so that its clock is at most so many steps
# ahead. The GPU still has a whole step to do meanwhile: nothing is lost while launching one takes less time than that.
STEPS_AHEAD = 2


class TrainingTime(lightning.Callback):
    """The clock of a run with trainer.budget_minutes; must come before the callbacks that read rates or seconds.

    It runs during training steps, logging and what else is between them included, and stands during validations,
    samples and checkpoints, and from a start to the end of the first step, which compiles. The slowest rank's counts.
    A step's rate follows from the seconds at its beginning. Steps, seconds and rates are written to rates.csv in the
    run's folder, from which ``optimizer.rates`` repeats the run. The run ends with the step in which the budget is used
    up, at most STEPS_AHEAD steps late.

    Args:
        run_dir: the run's folder.
        length: of the run; its seconds are set here.
        schedule: the optimizer's.
        stopping: through which ranks agree.
    """

    def __init__(self, run_dir: Path, *, length: Length, schedule: Schedule, stopping: Stopping):
        self.path = run_dir / RATES_FILE
        self.length, self.stopping = length, stopping
        self.fractions = TimedFractions(schedule, length.budget_s)
        self._fraction = 0.0  # of the step that is being made
        self._step: int | None = None  # which that is
        self._since: float | None = None  # when the clock was read last; None while it stands
        self._warm = False  # the first step of this start is done
        self._done: deque[torch.cuda.Event] = deque()  # of the last steps
        self._unwritten: list[tuple[int, float, float]] = []

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._begin_file(trainer.global_step)

    @rank_zero_only
    def _begin_file(self, step: int) -> None:
        rows = [row for row in read_csv(self.path) if int(row["step"]) <= step] if self.path.is_file() and step else []
        if len(rows) != step:
            log.warning("%s has %d of the first %d steps: it cannot repeat the run", self.path, len(rows), step)
        write_text(self.path, csv_text([COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]))

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self._warm and self._since is None:
            self._since = time.perf_counter()
        if trainer.global_step == self._step:  # a further micro-batch
            return
        self._step = trainer.global_step
        self._fraction = self.fractions.fraction(self._step, self.length.seconds)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * self._fraction

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if self._warm:
            self._stay_near(module.device)
            self._count()
        else:
            wait_for(module.device)
            self._warm, self._since = True, time.perf_counter()
        if trainer.is_global_zero:
            self._unwritten.append((trainer.global_step, self.length.seconds, self._fraction))

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._stand(module.device)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        del trainer
        self._stand(module.device)
        self._write()
        checkpoint[TRAINING_TIME] = {"seconds": self.length.seconds, "warmed_up_s": self.fractions.warmed_up_s}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        del trainer, module
        saved = checkpoint[TRAINING_TIME]
        self.length.seconds, self.fractions.warmed_up_s = saved["seconds"], saved["warmed_up_s"]

    def on_train_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and self.length.seconds < self.length.budget_s:
            log.warning(
                "max_steps=%d ended the run after %.2f of trainer.budget_minutes=%g, before the end of its schedule",
                *(self.length.max_steps, self.length.seconds / 60, self.length.budget_s / 60),
            )

    def _count(self) -> None:
        now = time.perf_counter()
        self.length.seconds = self.stopping.largest(self.length.seconds + now - self._since)
        self._since = now

    def _stand(self, device: torch.device) -> None:
        """Stops the clock, with all steps done that were begun."""
        if self._since is not None:
            wait_for(device)
            self._done.clear()
            self._count()
            self._since = None

    def _stay_near(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._done.append(event)
        if len(self._done) > STEPS_AHEAD:
            self._done.popleft().synchronize()

    @rank_zero_only
    def _write(self) -> None:
        """Before a checkpoint: what it continues from is then always in the file, whatever happens in between."""
        with writing(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
            file.write(csv_text(self._unwritten))
        self._unwritten.clear()
