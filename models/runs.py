"""A run is a folder: its configuration, its record, its checkpoints, its metrics. Made, found again, closed here."""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import signal
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from conf.removed import drop_removed
from models.environment import environment
from models.lightning import DivergedError
from models.trainer import LAST_CHECKPOINT

CONFIG_FILE = "config.yaml"
RECORD_FILE = "run.json"
# Keys that do not change what a run computes: neither compared when it is resumed nor told in its name.
INCIDENTAL = (
    "resume",
    "test",
    "compressors",
    "name",
    "run_root",
    "logger",
    "experiment",
    "debug",
    "sweep",
    "hydra",
    "trainer.accelerator",
    "trainer.progress_bar",
    "trainer.sample_bytes",
    "trainer.val_every",
    "trainer.val_bytes",
    "trainer.log_every",
    "trainer.profile_steps",
    "trainer.data_on_device",
    "data.path",  # what the bytes are is checked by their hash
    "data.cache_dir",
    "data.download",
)
# What decides the shapes and the meaning of the weights: a checkpoint of another model cannot be continued.
MODEL_KEYS = ("seq_len", "model.", "attention.", "norm.")
MODEL_KEYS_THAT_MAY_CHANGE = ("model.dropout", "attention.backend")
# Set by the first process of a multi-GPU run, so that the others, which start the same program, join its folder.
RUN_VARIABLE = "FLASH_COSINE_SIM_RUN"
LONGEST_NAME = 120  # of a folder; file systems take 255 bytes

log = logging.getLogger(__name__)


@dataclass
class Run:
    """An open run.

    Attributes:
        folder: where everything of the run is written.
        checkpoint: what it continues from, or None for a new run.
        resume_step: the optimizer step of that checkpoint, or None.
        record: what is stored in run.json.
        started: whether ``start`` was called; before it, a resumed run's files are as they were.
    """

    folder: Path
    checkpoint: Path | None
    resume_step: int | None
    record: dict[str, Any]
    started: bool = False

    def start(self, config: DictConfig, choices: dict[str, str], **entries: Any) -> None:
        """Stores the configuration and what else is known, once everything is built and training can begin."""
        log.info("run folder %s%s", self.folder, f", continues at step {self.resume_step}" if self.checkpoint else "")
        if self.checkpoint and _is_first_process():
            for key, (before, now) in _changes(self.folder, config).items():
                log.warning("resumed with a change: %s was %s, is %s", key, before, now)
        if _is_first_process():
            _write_text(self.folder / CONFIG_FILE, OmegaConf.to_yaml(config, resolve=True))
        self.started = True
        self.update(choices=choices, **environment(), **entries, status="running", error=None)

    def update(self, **entries: Any) -> None:
        """Adds entries to run.json; only the first process writes."""
        self.record.update(entries)
        if _is_first_process():
            _write_text(self.folder / RECORD_FILE, json.dumps(self.record, indent=2, default=str) + "\n")

    def end(self, status: str, error: BaseException | None = None, *, keep: bool = True) -> None:
        """Marks how the run ended; a new one that never started is removed unless it is to be kept."""
        if self.started or (self.checkpoint is None and keep):
            message = "".join(traceback.format_exception_only(error)).strip() if error else None
            self.update(status=status, error=message)
        elif self.checkpoint is None and _is_first_process():
            shutil.rmtree(self.folder)


@contextmanager
def open_run(
    config: DictConfig, choices: dict[str, str], overrides: Sequence[str] = (), *, keep_failed: bool
) -> Iterator[Run]:
    """Finds or makes the run's folder, and marks the run finished, failed, diverged or interrupted when it ends.

    Args:
        config: the validated configuration; resume is null, "auto" or a path.
        choices: the option chosen of every configuration group.
        overrides: the command line's KEY=VALUE, of which the run's name tells those that change what it computes.
        keep_failed: keep the folder of a run that failed before it started, as the mark of a sweep's failed job.

    Raises:
        ValueError: resume names no run, or one of another model.
    """
    run = _start(config, config.name or default_name(config, choices, overrides))
    handler = logging.FileHandler(run.folder / "train.log") if _is_first_process() else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield run
        run.end("finished")
    except DivergedError as error:
        run.end("diverged", error)
        raise
    except (KeyboardInterrupt, SystemExit) as stopped:
        run.end("interrupted", keep=keep_failed)
        raise SystemExit(_exit_code(stopped)) from None
    except BaseException as error:
        run.end("failed", error, keep=keep_failed)
        if isinstance(handler, logging.FileHandler):  # the console shows what the caller makes of it
            handler.emit(logging.makeLogRecord({"msg": "failed", "levelname": "ERROR", "exc_info": _info(error)}))
        raise
    finally:
        os.environ.pop(RUN_VARIABLE, None)
        logging.getLogger().removeHandler(handler)
        handler.close()


def _info(error: BaseException) -> tuple:
    return type(error), error, error.__traceback__


def _exit_code(stopped: BaseException) -> int:
    # Lightning turns Ctrl-C into SystemExit(1) and SIGTERM into a SystemExit without a code, which means success
    if isinstance(stopped, KeyboardInterrupt) or isinstance(stopped.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return stopped.code or 128 + signal.SIGTERM


def _start(config: DictConfig, name: str) -> Run:
    """The folder, found or made by the first process and told to the others."""
    if _is_first_process():
        folder, checkpoint = find_folder(Path(config.run_root), name, config.resume)
        if checkpoint is None:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            _refuse_another_model(folder, config)
            checkpoint = _make_last(checkpoint)
        os.environ[RUN_VARIABLE] = json.dumps([str(folder), str(checkpoint) if checkpoint else None])
    elif RUN_VARIABLE not in os.environ:
        raise ValueError("train.py starts its own processes: use trainer.devices=N, not torchrun")
    else:
        folder, checkpoint = (path and Path(path) for path in json.loads(os.environ[RUN_VARIABLE]))
    record = read_record(folder) if checkpoint else {}
    # wandb takes ids of up to 64 characters
    record.setdefault("wandb_id", f"{re.sub('[^A-Za-z0-9_-]', '_', folder.name)[:50]}-{uuid.uuid4().hex[:8]}")
    return Run(folder, checkpoint, read_checkpoint(checkpoint)["global_step"] if checkpoint else None, record)


def default_name(config: DictConfig, choices: dict[str, str], overrides: Sequence[str] = ()) -> str:
    """A name that says what the run is, so that the same command finds it again and a sweep's jobs differ."""
    groups = ("attention", "norm", "model", "data")
    parts = [choices[group] for group in ("experiment", "debug") if choices.get(group)]
    parts += [choices.get(group) or "none" for group in groups]
    parts += [f"len{config.seq_len}", f"lr{config.lr:g}", f"seed{config.seed}"]
    told = {*groups, "optimizer", "trainer", "seq_len", "lr", "seed"}
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        if key not in told and not key.startswith(INCIDENTAL):
            parts.append(override)
    name = re.sub(r"[^\w.,=-]", "_", "-".join(parts))
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def find_folder(root: Path, name: str, resume: str | None) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint it continues from.

    resume=None takes a folder of its own: ``root/name``, or ``root/name-2`` and so on where that exists, so that no
    earlier run is overwritten. "auto" takes the newest of these that has a checkpoint, and else a new one. A path
    is a run's folder or a checkpoint in it.
    """
    if resume not in (None, "auto"):
        checkpoint = _checkpoint_at(Path(resume))
        return checkpoint.parent.parent, checkpoint
    if not re.fullmatch(r"[\w.,=+@-]+", name) or name in (".", ".."):
        raise ValueError(f"name must be a plain folder name (letters, digits and .,=+@_-), got {name!r}")
    numbered = {1: root / name} if (root / name).exists() else {}
    for folder in root.glob(f"{name}-*"):
        if re.fullmatch(r"[1-9]\d{0,5}", number := folder.name[len(name) + 1 :]):
            numbered[int(number)] = folder
    if resume == "auto":
        for _, folder in sorted(numbered.items(), reverse=True):
            checkpoint = folder / "checkpoints" / LAST_CHECKPOINT
            if checkpoint.exists():
                return folder, checkpoint
        log.info("resume=auto: no checkpoint under %s*, a new run starts", root / name)
    for _, folder in sorted(numbered.items()):
        if not _holds_a_run(folder):
            return folder, None
    number = max(numbered, default=0) + 1
    return (root / name if number == 1 else root / f"{name}-{number}"), None


def _holds_a_run(folder: Path) -> bool:
    """Whether anything there is worth keeping; a run that failed before its first step left nothing."""
    record = read_record(folder) if (folder / RECORD_FILE).is_file() else {}
    recorded = (folder / "metrics.csv").exists() or (folder / "checkpoints").exists()
    return recorded or record.get("status") not in ("failed", "interrupted")


def _make_last(checkpoint: Path) -> Path:
    """Makes the chosen checkpoint the one that the run goes on from, also if it is killed before the next one.

    What was last.ckpt before is kept under another name.
    """
    last = checkpoint.parent / LAST_CHECKPOINT
    if checkpoint.resolve() == last.resolve():
        return checkpoint
    read_checkpoint(checkpoint)
    if last.exists():
        os.replace(last, last.with_name(f"last-before-resuming-{checkpoint.name}"))
    copy = last.with_name(LAST_CHECKPOINT + ".tmp")
    shutil.copyfile(checkpoint, copy)
    os.replace(copy, last)
    return last


def _checkpoint_at(path: Path) -> Path:
    checkpoint = path / "checkpoints" / LAST_CHECKPOINT if path.is_dir() else path
    if not checkpoint.is_file():
        raise ValueError(
            f"resume must be null, auto, a run's folder with checkpoints/{LAST_CHECKPOINT} or a checkpoint in it, "
            f"got {str(path)!r}, which has none"
        )
    if not (checkpoint.parent.parent / RECORD_FILE).is_file():
        raise ValueError(
            f"resume={str(path)!r} is no checkpoint in a run's folder: {checkpoint.parent.parent} has no {RECORD_FILE}"
        )
    return checkpoint


def load_config(folder: Path) -> DictConfig:
    """The resolved configuration of a run, without the keys that were removed since. ValueError if it has none."""
    path = file_of_run(folder, CONFIG_FILE)
    try:
        config = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{str(path)!r} must hold keys and values, got a list")
    try:
        return drop_removed(config)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as train.py writes it; mapped, so that only what is used is read.

    Raises:
        ValueError: the file is cut short, damaged or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {key: checkpoint[key] for key in ("global_step", "state_dict")}
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"{str(path)!r} is no sound checkpoint of a run, as train.py writes them (cut short?): {reason}"
        ) from error


def _changes(folder: Path, config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose value is another than when the run was last started: before and now."""
    before = flat(OmegaConf.to_container(load_config(folder)))
    now = flat(OmegaConf.to_container(config, resolve=True))
    keys = [key for key in sorted(before.keys() | now.keys()) if not key.startswith(INCIDENTAL)]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _refuse_another_model(folder: Path, config: DictConfig) -> None:
    changed = [
        f"{key} was {before!r}, is {now!r}"
        for key, (before, now) in _changes(folder, config).items()
        if key.startswith(MODEL_KEYS) and key not in MODEL_KEYS_THAT_MAY_CHANGE
    ]
    if changed:
        raise ValueError(
            f"the run in {str(folder)!r} has another model: {'; '.join(changed)}; give the same keys again"
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys and values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return values


def _is_first_process() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
