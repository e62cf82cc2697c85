"""Checkpoints of a run: when they are saved, and how they are written. Their files: checkpoint_files.py."""

import logging
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from models.training.checkpoint_files import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    STATE_KEY,
    also_named,
    crc32,
    mend_best,
    note_crc32,
    steps_in,
    temporary_name,
)
from models.training.length import Length
from models.training.module import DivergedError, GPTModule
from models.training.stopping import Interrupted, Stopping

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a kill leaves either the old one or the new one.

    Lightning's own writes to the system's temporary folder; from another file system that ends in a plain copy over
    the only checkpoint there is.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves checkpoint under path, and its CRC-32 in the folder's index. Raises OSError that names the path."""
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            note_crc32(path, crc32(temporary))
            os.replace(temporary, path)
        except BaseException as error:  # a full disk, or a signal: what is half written would keep the disk full
            with suppress(OSError):
                temporary.unlink()
            # torch reports a write that failed as a RuntimeError of its own
            if not isinstance(error, (OSError, RuntimeError)):
                raise
            earlier = [name for name, _ in sorted(steps_in(path.parent).items(), key=lambda item: -item[1])]
            kept = f"the last checkpoint before it, {path.parent / earlier[0]}, stands" if earlier else "there is none"
            reason = str(error).split("\n", 1)[0]
            raise OSError(f"checkpoint {path} could not be written ({reason}); {kept}") from error


class Checkpoints(lightning.Callback):
    """Saves checkpoints, and stops at a step where a signal asks for it, on all ranks at the same one.

    A checkpoint follows every validation; further ones come every ``every`` steps and every ``minutes`` minutes.

    Args:
        folder: the run's folder of checkpoints.
        stopping: says whether a signal came, and agrees about it with the other ranks.
        val_every: optimizer steps between validations.
        length: of the run; a validation follows its last step.
        every: optimizer steps between checkpoints, or None for validations alone.
        minutes: minutes between checkpoints, or None.
        keep: how many of step-N.ckpt are kept, at least 1; best.ckpt is kept beside them.
    """

    state_key = STATE_KEY  # Lightning's own is the class's name, under which earlier versions saved

    def __init__(
        self,
        folder: Path,
        *,
        stopping: Stopping,
        val_every: int,
        length: Length,
        every: int | None,
        minutes: float | None,
        keep: int,
    ):
        self.folder = folder
        self.stopping = stopping
        self.val_every, self.length = val_every, length
        self.every, self.minutes, self.keep = every, minutes, keep
        self.score: float | None = None  # the last one
        self.best: float | None = None
        self.best_step: int | None = None
        self.validated_step: int | None = None
        self.val_scored: int | None = None  # bytes that a score is of
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The best score so far and its step, the last score and its step, and of how many bytes they are."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "score": self.score,
            "validated_step": self.validated_step,
            "val_scored": self.val_scored,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self.best, self.validated_step = state_dict["best"], state_dict["validated_step"]
        self.best_step, self.score = state_dict.get("best_step"), state_dict.get("score")  # earlier versions had none
        self.val_scored = state_dict.get("val_scored")

    def on_fit_start(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        del module
        self.stopping.begin(world_size=trainer.world_size)
        # Lightning does not begin at all with the last step, where the validation after it may be missing still.
        trainer.fit_loop.epoch_loop.max_steps = -1

    def on_train_start(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        del module
        self._saved_at = time.monotonic()
        step = trainer.global_step
        scored = trainer.datamodule.val_scored
        if trainer.is_global_zero and self._are_others(scored):
            log.warning(
                "val/bpc up to step %d is of %d bytes, then of %d: they do not compare, and best.ckpt begins anew",
                *(step, self.val_scored, scored),
            )
        trainer.fit_loop.epoch_loop.max_steps = step if self.length.is_reached(step) else self.length.max_steps
        if step and trainer.is_global_zero:
            self._mend_best(step)
        if step and self._validation_follows(step) and self.validated_step != step:
            # stopped between a step and the validation that follows it
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: lightning.Trainer, module: GPTModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        step = trainer.global_step
        stop, late = self.stopping.agree(self._is_late())
        due = late or (self.every is not None and step % self.every == 0)
        if stop or (due and not self._validation_follows(step)):
            if not math.isfinite(module.grad_norm):  # waits for the GPU, as saving does anyway
                raise DivergedError(f"the gradient's norm is {module.grad_norm.item()} at step {step}")
            self._save(trainer)
        if stop:
            raise Interrupted(self.stopping.signal, step)

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit" and self.stopping.agree(False)[0]:
            self._save(trainer)
            raise Interrupted(self.stopping.signal, trainer.global_step)

    def on_validation_end(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        del module
        if trainer.state.fn != "fit":
            return
        score, scored = trainer.callback_metrics["val/bpc"].item(), trainer.datamodule.val_scored
        is_best = self.best is None or score < self.best or self._are_others(scored)
        self.score, self.validated_step, self.val_scored = score, trainer.global_step, scored
        if is_best:
            self.best, self.best_step = score, trainer.global_step
        self._save(trainer, best=is_best)

    def on_fit_end(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        del trainer, module
        self.stopping.end()

    def _are_others(self, scored: int) -> bool:
        """Whether the scores until now are of other bytes; False where an earlier version did not keep of how many."""
        return self.val_scored is not None and self.val_scored != scored

    def _mend_best(self, step: int) -> None:
        if mend_best(self.folder / LAST_CHECKPOINT, step=step, best=self.best, best_step=self.best_step):
            return
        log.warning("%s is that of step %d: the best one until then was not kept", BEST_CHECKPOINT, step)
        self.best = self.score if self.validated_step == step else None
        self.best_step = None if self.best is None else step

    def _validation_follows(self, step: int) -> bool:
        return step % self.val_every == 0 or self.length.is_reached(step)

    def _is_late(self) -> bool:
        return self.minutes is not None and time.monotonic() - self._saved_at >= 60 * self.minutes

    def _save(self, trainer: lightning.Trainer, *, best: bool = False) -> None:
        path = self.folder / f"step-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)  # on every rank: state is gathered, and the first one writes
        if trainer.is_global_zero:
            also_named(path, LAST_CHECKPOINT)
            if best:
                also_named(path, BEST_CHECKPOINT)
            by_age = sorted(steps_in(self.folder), key=lambda name: -(self.folder / name).stat().st_mtime_ns)
            for name in by_age[self.keep :]:
                (self.folder / name).unlink()
        self._saved_at = time.monotonic()
