"""A run's checkpoints: written, kept, verified, and found again.

``checkpoints/`` of a run holds ``step-N.ckpt``, the newest few, and two further names of files among those ever
written: ``last.ckpt``, the newest, and ``best.ckpt``, the one with the smallest val/bpc. ``index.json`` has each
file's CRC-32, so that a flipped bit anywhere in it is noticed.
"""

import json
import math
import os
import pickle
import re
import shutil
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from models.training.module import DivergedError, GPTModule
from models.training.stopping import Interrupted, Stopping

FOLDER = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
INDEX_FILE = "index.json"


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
            _note(path, crc32(temporary))
            os.replace(temporary, path)
        except BaseException as error:  # a full disk, or a signal: what is half written would keep the disk full
            with suppress(OSError):
                temporary.unlink()
            # torch reports a write that failed as a RuntimeError of its own
            if not isinstance(error, (OSError, RuntimeError)):
                raise
            earlier = [name for name, _ in sorted(_steps(path.parent).items(), key=lambda item: -item[1])]
            kept = f"the last checkpoint before it, {path.parent / earlier[0]}, stands" if earlier else "there is none"
            reason = str(error).split("\n", 1)[0]
            raise OSError(f"checkpoint {path} could not be written ({reason}); {kept}") from error


def temporary_name(path: Path) -> Path:
    """A name beside path that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def crc32(path: Path) -> str:
    """A file's CRC-32, eight hexadecimal digits."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def read_index(folder: Path) -> dict[str, str]:
    """The CRC-32 of every checkpoint in the folder that has one, by file name."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _note(path: Path, crc: str) -> None:
    # Both the old file's and the new one's, until it is replaced: a kill in between leaves the old file verified.
    index = {name: known for name, known in read_index(path.parent).items() if (path.parent / name).exists()}
    before = index.get(path.name)
    index[path.name] = f"{before.split(',')[-1]},{crc}" if before and path.exists() else crc
    write_text(path.parent / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: a kill leaves the old one or the new one, and a full disk nothing that is half."""
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of train.py holds of a run's progress; mapped, so that only what is used is read.

    Returns:
        global_step, state_dict, and validated_step: the step that was validated last.

    Raises:
        ValueError: the file is cut short, damaged, or something else.
    """
    try:
        verify(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step = checkpoint["global_step"]
        saved = (checkpoint.get("callbacks") or {}).get(Checkpoints.__qualname__, {})
        return {
            "global_step": step,
            "validated_step": saved.get("validated_step", step),  # earlier versions saved after validations alone
            "state_dict": checkpoint["state_dict"],
        }
    except (
        *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, NotImplementedError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
    ) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"{str(path)!r} is no sound checkpoint of a run, as train.py writes them (cut short?): {reason}"
        ) from error


def verify(path: Path) -> None:
    """Raises ValueError if the file's CRC-32 is another than the index says; without an entry, if a record's is."""
    known = read_index(path.parent).get(path.name)
    if known is not None:
        found = crc32(path)
        if found not in known.split(","):
            raise ValueError(f"its CRC-32 is {found}, {known} when it was written: it was damaged or replaced")
    else:  # a checkpoint that was moved here, or of an earlier version: torch.save keeps one of every tensor
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the CRC-32 of its record {damaged!r} is wrong")


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint of a run's folder of checkpoints, or None, and what is wrong with newer ones."""
    paths = {folder / name: step for name, step in _steps(folder).items()}
    candidates = sorted(paths, key=lambda path: -paths[path])
    if (folder / LAST_CHECKPOINT).exists() and not any(_same_file(folder / LAST_CHECKPOINT, c) for c in candidates[:1]):
        candidates.insert(0, folder / LAST_CHECKPOINT)
    if (folder / BEST_CHECKPOINT).exists():
        candidates.append(folder / BEST_CHECKPOINT)
    wrong = []
    for path in candidates:
        try:
            read_checkpoint(path)
        except ValueError as error:
            wrong.append(str(error))
        else:
            return path, wrong
    return None, wrong


def _steps(folder: Path) -> dict[str, int]:
    """The step of every step-N.ckpt in a folder, by file name."""
    found = {path.name: re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in folder.glob("step-*.ckpt")}
    return {name: int(match[1]) for name, match in found.items() if match}


def _same_file(first: Path, second: Path) -> bool:
    return first.samefile(second) or read_index(first.parent).get(first.name, 1) == read_index(second.parent).get(
        second.name, 2
    )


def also_named(path: Path, name: str) -> Path:
    """Gives a checkpoint a second name beside it, replacing what has it; a copy where links are not to be had."""
    other = path.with_name(name)
    temporary = temporary_name(other)
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    index = read_index(path.parent)
    if path.name in index:
        _note(other, index[path.name].split(",")[-1])
    os.replace(temporary, other)
    return other


class Checkpoints(lightning.Callback):
    """Saves checkpoints, and stops at a step where a signal asks for it, on all ranks at the same one.

    A checkpoint follows every validation; further ones come every ``every`` steps and every ``minutes`` minutes.

    Args:
        folder: the run's folder of checkpoints.
        stopping: says whether a signal came, and agrees about it with the other ranks.
        val_every: optimizer steps between validations.
        max_steps: of the run; a validation follows the last one.
        every: optimizer steps between checkpoints, or None for validations alone.
        minutes: minutes between checkpoints, or None.
        keep: how many of step-N.ckpt are kept, at least 1; best.ckpt is kept beside them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stopping: Stopping,
        val_every: int,
        max_steps: int,
        every: int | None,
        minutes: float | None,
        keep: int,
    ):
        self.folder = folder
        self.stopping = stopping
        self.val_every, self.max_steps = val_every, max_steps
        self.every, self.minutes, self.keep = every, minutes, keep
        self.best: float | None = None
        self.saved_step: int | None = None  # of the newest checkpoint
        self.validated_step: int | None = None
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and the step that was validated last."""
        return {"best": self.best, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self.best, self.validated_step = state_dict["best"], state_dict["validated_step"]

    def on_fit_start(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        del module
        self.stopping.begin(world_size=trainer.world_size)
        # Lightning does not begin at all with the last step, where the validation after it may be missing still.
        trainer.fit_loop.epoch_loop.max_steps = -1

    def on_train_start(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        del module
        self._saved_at = time.monotonic()
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
        step = trainer.global_step
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
        score = trainer.callback_metrics["val/bpc"].item()
        is_best = self.best is None or score < self.best
        self.best = score if is_best else self.best
        self.validated_step = trainer.global_step
        self._save(trainer, best=is_best)

    def on_fit_end(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        del trainer, module
        self.stopping.end()

    def _validation_follows(self, step: int) -> bool:
        return step % self.val_every == 0 or step >= self.max_steps

    def _is_late(self) -> bool:
        return self.minutes is not None and time.monotonic() - self._saved_at >= 60 * self.minutes

    def _save(self, trainer: lightning.Trainer, *, best: bool = False) -> None:
        path = self.folder / f"step-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)  # on every rank: state is gathered, and the first one writes
        if trainer.is_global_zero:
            also_named(path, LAST_CHECKPOINT)
            if best:
                also_named(path, BEST_CHECKPOINT)
            by_age = sorted(_steps(self.folder), key=lambda name: -(self.folder / name).stat().st_mtime_ns)
            for name in by_age[self.keep :]:
                (self.folder / name).unlink()
        self.saved_step = trainer.global_step
        self._saved_at = time.monotonic()
