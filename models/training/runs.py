"""A run is a folder: its configuration, its record, its checkpoints, its metrics. Made, found again, closed here."""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import typed
from models.training.checkpoint_files import (
    CHECKPOINT_FOLDER,
    LAST_CHECKPOINT,
    also_named,
    mend_best,
    newest_good,
    put_aside,
    read_checkpoint,
    steps_in,
    write_text,
)
from models.training.devices import uses_cuda
from models.training.environment import command, environment, utc_now
from models.training.identity import (
    BY_BYTES,
    LENGTH_KEYS,
    RESUMED_WITH,
    apart,
    by_bytes,
    changes_of,
    changing_numbers,
    default_name,
    differing_keys,
    flat,
    identity_of,
    is_hash,
    recorded_identity,
    refuse_another,
    resumed_with,
    was_stretched,
)
from models.training.load import source_checkpoint
from models.training.locks import Lock, holder, try_lock
from models.training.module import DivergedError
from models.training.places import hold, places, take
from models.training.processes import Processes, find_processes
from models.training.run_files import (
    CONFIG_FILE,
    LOCK_FILE,
    LOG_FILE,
    METRICS_FILE,
    RECORD_FILE,
    is_owned,
    load_config,
    read_csv,
    read_record,
)
from models.training.schedule import rates_file
from models.training.started import RUN_VARIABLE
from models.training.stopping import Interrupted, exit_code

SWEEPS_FOLDER = ".sweeps"  # below run_root: what sweeps keep beside their runs
NEW = "new"  # as resume: a new run, also in a sweep, which goes on with earlier runs otherwise

log = logging.getLogger(__name__)

ORIGIN = "init_from_path"  # the entry of run.json that says where init_from led, wherever the run is resumed


class Skipped(Exception):
    """A job of a sweep whose run is there already, or is being made by another process.

    Attributes:
        folder: that run's, or None where it is not known yet.
        bits_per_byte: its val/bpc, or None where it is not finished.
    """

    def __init__(self, message: str, folder: Path | None = None, bits_per_byte: float | None = None):
        super().__init__(message)
        self.folder, self.bits_per_byte = folder, bits_per_byte


@dataclass
class Run:
    """A run, from before its folder is known to its end.

    Attributes:
        processes: those that make it up, and this one's place among them.
        in_sweep: it is a sweep's job: what is there already is not done again, and a failure leaves a mark.
        swept: the keys that this sweep has several values of.
        folder: where everything of the run is written; None until ``find``.
        checkpoint: what it continues from, or None for a new run.
        resume_step: the optimizer step of that checkpoint, or None.
        validated_step: the step that was validated last before it, or None.
        trained_s: the seconds of training that a run by time had until then, or None.
        record: what is stored in run.json.
        identity: what the configuration computes, once the bytes are known.
        started: whether ``start`` was called; before it, a resumed run's files are as they were.
    """

    config: DictConfig
    name: str
    processes: Processes
    in_sweep: bool = False
    swept: Sequence[str] = ()
    folder: Path | None = None
    checkpoint: Path | None = None
    resume_step: int | None = None
    validated_step: int | None = None
    trained_s: float | None = None
    record: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    started: bool = False
    _began: float | None = None  # by the monotonic clock, when its time began to count
    _made: bool = False  # the folder is this process's own doing, and holds nothing that was there before
    _lock: IO[str] | None = None
    _devices: list[Lock] = field(default_factory=list)
    _claim: Lock | None = None  # on being the one sweep's job that makes this run
    _handler: logging.Handler | None = None

    def find(self, corpus_sha256: str | None) -> None:
        """Finds or makes the folder, and the checkpoint to continue from; from here on this process owns it.

        Raises:
            ValueError: resume names no run, one of another model or corpus, or one that another process owns.
            Skipped: in a sweep, such a run is finished, or another process is at it.
        """
        self.identity = identity = by_bytes(identity_of(self.config, corpus_sha256), self._files())
        if RUN_VARIABLE in os.environ:
            folder, checkpoint, error = json.loads(os.environ[RUN_VARIABLE])
        else:
            folder = checkpoint = error = None
            if self.processes.is_first:
                try:
                    self._find(identity)
                    folder, checkpoint = str(self.folder), self.checkpoint and str(self.checkpoint)
                except (ValueError, OSError) as refused:
                    error = refused
                    if not self.processes.joined:
                        raise
            folder, checkpoint, message = self.processes.share((folder, checkpoint, error and str(error)))
            if message is not None:
                raise ValueError(message)  # on every rank: none waits for the others
            if self.processes.world_size > 1 and not self.processes.joined:
                os.environ[RUN_VARIABLE] = json.dumps([folder, checkpoint, None])
        self.folder, self.checkpoint = Path(folder), Path(checkpoint) if checkpoint else None
        if self.checkpoint is not None:
            self.record = read_record(self.folder)
            progress = read_checkpoint(self.checkpoint)
            self.resume_step, self.validated_step = progress["global_step"], progress["validated_step"]
            self.trained_s = progress["trained_s"]
            if self.resume_step > self.config.max_steps:
                raise ValueError(
                    f"max_steps must be at least {self.resume_step}, the steps that {str(self.checkpoint)!r} has, "
                    f"got {self.config.max_steps}"
                )
            self._check_budget()
            self._keep_origin()
            self._keep_rates()
        else:
            self.record["identity"] = identity
        # wandb takes ids of up to 64 characters
        plain = re.sub("[^A-Za-z0-9_-]", "_", self.folder.name)
        self.record.setdefault("wandb_id", f"{plain[:50]}-{uuid.uuid4().hex[:8]}")
        self._log_into_folder()

    def check_complete(self) -> None:
        """Of a run in which nothing is left to train: that it is the one that is asked for, and stays what it is.

        Raises:
            ValueError: the folder goes on behind the checkpoint, or the run had other values of keys that change it.
        """
        steps = [*steps_in(self.checkpoint.parent).values()]
        with suppress(ValueError):  # not there, or damaged; rows of metrics.csv alone are of steps that a kill lost
            steps.append(read_checkpoint(self.checkpoint.with_name(LAST_CHECKPOINT))["global_step"])
        latest = max(steps, default=0)
        if latest > self.resume_step:
            raise ValueError(
                f"nothing is left to train after step {self.resume_step}, and the run in {str(self.folder)!r} goes to "
                f"step {latest}; python -m scripts.evaluate {self.checkpoint} scores an earlier one"
            )
        changed = changing_numbers(changes_of(self.folder, self.config, step=self.resume_step), timed=self._is_timed)
        if changed:
            told = "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
            raise ValueError(
                f"nothing is left to train after step {self.resume_step}, and the run in {str(self.folder)!r} was "
                f"another: {told}; give the same keys again, a larger max_steps, or another name"
            )

    def mend(self) -> None:
        """Where nothing is trained: makes the folder what it was at the checkpoint, if the run was stopped in between.

        That is, before a new best checkpoint had the name best.ckpt; or after a resume with other keys had written
        these, and before the first checkpoint with them.
        """
        if not self.processes.is_first:
            return
        found = read_checkpoint(self.checkpoint)
        if not mend_best(self.checkpoint, step=self.resume_step, best=found["best"], best_step=found["best_step"]):
            log.warning("best.ckpt is that of step %d: the best one until then was not kept", self.resume_step)
        if changing_numbers(changes_of(self.folder, self.config), timed=self._is_timed):
            self._store(self._note({}))
            self.update()

    def _files(self) -> dict[str, Path]:
        """The files that the keys of BY_BYTES name, where they are there."""
        found, rates = {}, self.config.optimizer.get("rates")
        if self.config.init_from is not None:
            with suppress(ValueError, OSError):  # gone, which matters to a new run alone
                found["init_from"] = source_checkpoint(self.config.init_from)
        if isinstance(rates, str) and rates_file(rates).is_file():
            found["optimizer.rates"] = rates_file(rates)
        return found

    def note_files(self) -> None:
        """Records the files of BY_BYTES as they are now, when a new run has read them: while it waited for a device
        they may have been replaced."""
        self.identity = self.record["identity"] = by_bytes(self.identity, self._files())

    @property
    def _is_timed(self) -> bool:
        return self.config.trainer.budget_minutes is not None

    def _keep_origin(self) -> None:
        """A run that goes on keeps where its weights came from, which need not be said again.

        Raises:
            ValueError: another init_from is given, which only a new run would read.
        """
        origin, given = _value_of(self.folder, self.record, "init_from"), self.config.init_from
        recorded = (self.record.get("identity") or {}).get("init_from")
        same = is_hash(recorded) and recorded == self.identity.get("init_from")
        if given is not None and not same and not self._names_the_same("init_from", self.folder, self.record):
            began = "without other weights" if origin is None else f"with the weights of {str(origin)!r}"
            raise ValueError(
                f"init_from is read where a run begins, got {str(given)!r}, and the run in {str(self.folder)!r} began "
                f"{began} and goes on with its own: leave init_from out, or start a new run with it"
            )
        self.config.init_from = origin

    def _keep_rates(self) -> None:
        """The file of optimizer.rates may be found under another path, and must be what it was under its own.

        Raises:
            ValueError: it has other bytes than when the run began.
        """
        now, began = self.identity.get("optimizer.rates"), (self.record.get("identity") or {}).get("optimizer.rates")
        if not (is_hash(now) and is_hash(began)):
            return
        before = _value_of(self.folder, self.record, "optimizer.rates")
        if now == began:
            self.config.optimizer.rates = before
        elif self.config.optimizer.rates == before:
            raise ValueError(
                f"optimizer.rates={before!r} has other bytes than when the run in {str(self.folder)!r} began: give the "
                "file that it was, or start a new run"
            )

    def _check_budget(self) -> None:
        budget = self.config.trainer.budget_minutes
        if budget is None:
            return
        if self.trained_s is None:
            raise ValueError(
                f"trainer.budget_minutes={budget:g} counts from a run's first step, and the run in "
                f"{str(self.folder)!r} counted no time; give null, or take its weights alone: "
                f"{typed('init_from', self.folder)}"
            )
        before = load_config(self.folder).trainer.budget_minutes
        if before is not None and budget < before and 60 * budget < self.trained_s:
            raise ValueError(
                f"trainer.budget_minutes must be at least {self.trained_s / 60:.4g}, the minutes of training that "
                f"{str(self.checkpoint)!r} has, got {budget:g}"
            )

    def _find(self, identity: dict[str, Any]) -> None:
        root, resume = Path(self.config.run_root), self.config.resume
        if self.in_sweep:
            self._claim_it(root, identity)
        if self.in_sweep and resume in (None, "auto"):
            self._find_of_sweep(root, identity)
        elif resume == "auto":
            self._find_own(self._runs_of(root, identity))
        elif resume not in (None, NEW):
            folder, self.checkpoint = _checkpoint_at(Path(resume))
            self._own(folder)
            refuse_another(self.folder, self.config, identity)
        if self.folder is None:
            self._make(root)

    def _claim_it(self, root: Path, identity: dict[str, Any]) -> None:
        """From here on no other sweep's job makes the same run. Raises Skipped if one does."""
        folder = root / SWEEPS_FOLDER / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        what = [identity, self.config.max_steps, self.config.trainer.val_bytes]
        if other := apart(self.config, self.swept):
            what.append(other)
        text = json.dumps(what, default=str)
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.lock"
        self._claim = try_lock(path, f"of {self.name}")
        if self._claim is None:
            raise Skipped(f"{holder(path)} is at it")

    def _find_of_sweep(self, root: Path, identity: dict[str, Any]) -> None:
        """The run that a sweep's job goes on with; Skipped if there is nothing left to do in it.

        With resume=auto a run of another max_steps may go on, as it does in a lone run; else it is another run, and so
        is one that went on so.
        """
        runs, auto = self._runs_of(root, identity), self.config.resume == "auto"
        wanted = apart(self.config, self.swept)
        runs = [folder for folder in runs if not wanted or _apart_in(folder, self.swept) == wanted]
        as_long = [folder for folder in runs if _length_of(folder) == self._length]
        as_long = [folder for folder in as_long if auto or not was_stretched(folder)]
        for folder in as_long:
            if is_owned(folder):
                raise Skipped(f"{holder(folder / LOCK_FILE)} is at it", folder)
            if read_record(folder).get("status") == "finished":
                bits_per_byte, tested = _scores(folder)
                if tested or not self.config.test:
                    raise Skipped("finished before", folder, bits_per_byte)
                runs = as_long = [folder]  # what is left is its test
                break
        self._find_own(runs if auto else as_long)

    @property
    def _length(self) -> tuple[int, int | None]:
        return self.config.max_steps, self.config.trainer.val_bytes

    def _runs_of(self, root: Path, identity: dict[str, Any]) -> list[Path]:
        """The runs of this identity, of the configured name if there is one, the newest first."""
        given = self.config.name
        pattern = re.compile(rf"{re.escape(given)}(-[1-9]\d{{0,5}})?") if given else re.compile(".*")
        found = [path.parent for path in root.glob(f"*/{RECORD_FILE}") if pattern.fullmatch(path.parent.name)]
        found.sort(key=lambda folder: -(folder / RECORD_FILE).stat().st_mtime_ns)
        runs = [folder for folder in found if self._is_of(folder, identity)]
        if not runs and (others := [folder for folder in found if self._is_of(folder, identity, any_bytes=True)]):
            log.warning(
                "the run in %s is the same but for the bytes of a file that it began with (%s), and is passed over",
                *(others[0], " or ".join(BY_BYTES)),
            )
        return runs

    def _is_of(self, folder: Path, identity: dict[str, Any], *, any_bytes: bool = False) -> bool:
        """Whether a run has this identity. Files are told apart by their bytes; where those are not known, by path.

        Args:
            any_bytes: by path in any case.
        """
        recorded = recorded_identity(folder)
        if recorded is None or not (differing := differing_keys(recorded, identity)) <= set(BY_BYTES):
            return False
        known = {key for key in differing if is_hash(recorded.get(key)) and is_hash(identity.get(key))}
        if known and not any_bytes:
            return False
        try:
            return all(self._names_the_same(key, folder, read_record(folder)) for key in differing)
        except (ValueError, OSError, OmegaConfBaseException):  # a mark that a job left has no configuration
            return False

    def _names_the_same(self, key: str, folder: Path, record: dict[str, Any]) -> bool:
        """Whether a key names the file that it named where a run began.

        By the words, in a folder that was moved, or by where they lead and led then.
        """
        given, before = flat(OmegaConf.to_container(self.config)).get(key), _value_of(folder, record, key)
        if given is None or before is None:
            return given == before
        led_to = record.get(ORIGIN) if key == "init_from" else None
        return given == before or Path(given).resolve() == Path(led_to or before).resolve()

    def _find_own(self, runs: Sequence[Path]) -> None:
        """Goes on with the first of several runs, if there is one."""
        for folder in runs[:1]:
            self._own(folder)
            self.checkpoint, wrong = newest_good(folder / CHECKPOINT_FOLDER)
            for sentence in wrong:
                log.warning("resume=auto: %s", sentence)
            if self.checkpoint is None and wrong:
                raise ValueError(f"resume=auto: the run in {str(folder)!r} has no sound checkpoint left: {wrong[0]}")
            if self.checkpoint is None:
                log.info("resume=auto: the run in %s ended before its first checkpoint and starts anew there", folder)
            return
        if self.config.resume == "auto":
            log.info(
                "resume=auto: no run of this configuration and corpus under %s, a new one starts", self.config.run_root
            )

    def _make(self, root: Path) -> None:
        """A new folder: the name, or the name and a number; no earlier run is overwritten, nor another's at work."""
        number = 1
        while True:
            folder = root / (self.name if number == 1 else f"{self.name}-{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                number += 1
                if not _left_nothing(folder):
                    continue
            try:
                self._own(folder)
            except ValueError:  # another process was faster
                continue
            self._made = True
            return

    def _own(self, folder: Path) -> None:
        """Takes the folder's lock, and the folder with it. Raises ValueError if another process has it."""
        lock = open(folder / LOCK_FILE, "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise ValueError(
                f"the run in {str(folder)!r} is being written by {owner}: wait for its end, or give another name"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self.folder, self._lock = folder, lock
        for half_written in folder.rglob(".*.tmp"):  # by an owner that was killed
            half_written.unlink()

    def take_devices(self, *, cuda: bool, devices: int, on_wait: Callable[[], None]) -> int | None:
        """Locks what the run trains on, so that a sweep's jobs keep off it; a sweep's job waits for a free device.

        Args:
            cuda: the run trains on GPUs, of which a sweep's job takes one.
            devices: how many GPUs a lone run has.
            on_wait: called while waiting, several times a second; ends the waiting by raising.

        Returns:
            the index of the GPU that a sweep's job took; None otherwise.
        """
        what = f"run {self.folder}"
        if not self.in_sweep:
            if cuda and self.processes.is_first:
                self._devices = hold(devices, what)
            return None
        among = places(cuda=cuda)
        if not among:
            return None
        place, lock = take(among, what, on_wait=on_wait)
        self._devices, self.record["place"] = [lock], place.name
        return place.index

    def _log_into_folder(self) -> None:
        if self.processes.is_first:
            # whatever the locale's encoding is, and with names of files that have none
            log_file = self.folder / LOG_FILE
            self._handler = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logging.getLogger().addHandler(self._handler)

    def start(self, choices: dict[str, str], **entries: Any) -> None:
        """Stores the configuration and what else is known, once everything is built and training can begin."""
        if self.processes.is_first:
            if self.checkpoint:
                log.info("%s continues at step %s", self.folder, self.resume_step)
            if not self.checkpoint and not self._made:
                _empty(self.folder)
            changes, lasting = {}, []
            if self.config.init_from is not None and not self.checkpoint:
                self.record[ORIGIN] = str(Path(self.config.init_from).absolute())
            if self.checkpoint:
                changes = changes_of(self.folder, self.config, step=self.resume_step)
                self._say(changes)
                self.checkpoint = _make_last(self.checkpoint)
                lasting = self._note(changes)
            self._store(lasting)
        elif self.checkpoint:
            self.checkpoint = self.checkpoint.with_name(LAST_CHECKPOINT)
        self.begin()
        cuda = uses_cuda(self.config.trainer.accelerator)
        self.update(choices=choices, **environment(cuda=cuda), **entries, status="running", error=None, ended=None)

    def begin(self) -> None:
        """From here on the run's end is recorded, and its time counts."""
        self.started, self._began = True, time.monotonic()

    def _say(self, changes: dict[str, tuple[Any, Any]]) -> None:
        for key, (before, now) in changes.items():
            if key == "init_from":  # see _keep_origin
                continue
            if key not in LENGTH_KEYS:
                log.warning("resumed with a change: %s was %s, is %s", key, before, now)
            elif not self._is_timed:
                log.warning(
                    "%s was %s, is %s: from here on the learning rate follows the schedule of %s steps",
                    *(key, before, now, now),
                )

    def _note(self, changes: dict[str, tuple[Any, Any]]) -> list[dict[str, Any]]:
        """Writes into run.json, before config.yaml is replaced, what is changed from the resumed step on.

        A kill between the two files then loses no change. Returns the entries that are to stay: those of steps behind
        the resumed one were undone with them.
        """
        changed = changing_numbers(changes, timed=self._is_timed)
        new = [{"step": self.resume_step, "changed": {key: list(pair) for key, pair in changed.items()}}]
        new = new if changed else []
        earlier = resumed_with(self.record)
        identity = {key: value for key, value in self.identity.items() if key != "init_from"}
        recorded = self.record.get("identity") or {}  # what it began with stays what it began with
        identity |= {"init_from": recorded["init_from"]} if "init_from" in recorded else {}
        self.update(**{RESUMED_WITH: earlier + new}, identity=identity, status="running")
        return [entry for entry in earlier if entry["step"] < self.resume_step] + new

    def _store(self, lasting: list[dict[str, Any]]) -> None:
        """Writes the configuration; update() then writes which changes are to stay."""
        write_text(self.folder / CONFIG_FILE, OmegaConf.to_yaml(self.config, resolve=True))
        self.record[RESUMED_WITH] = lasting
        if not lasting:
            del self.record[RESUMED_WITH]

    def update(self, **entries: Any) -> None:
        """Adds entries to run.json; only the first process writes."""
        self.record.update(entries)
        if self.processes.is_first:
            write_text(self.folder / RECORD_FILE, json.dumps(self.record, indent=2, default=str) + "\n")

    def end(self, status: str, error: BaseException | None = None) -> None:
        """Marks how the run ended; a new one that never started is removed, unless it is a sweep's job."""
        message = "".join(traceback.format_exception_only(error)).strip() if error else None
        if self.folder is None and self.in_sweep:
            with suppress(OSError):  # as the mark of a sweep's failed job
                self._make(Path(self.config.run_root))
        if self.folder is None:
            return
        if self.started or (self._made and self.in_sweep):
            if self._began is not None:  # of all starts but those that were killed
                until_then = self.record.get("wall_seconds") or 0.0
                self.record["wall_seconds"] = round(until_then + time.monotonic() - self._began, 1)
            else:
                self.record["command"] = command()
            try:
                self.update(status=status, error=message, ended=utc_now())
            except OSError as full:
                log.error("%s could not be written (%s); the run's end: %s, %s", RECORD_FILE, full, status, message)
        elif self._made:
            shutil.rmtree(self.folder)

    def close(self) -> None:
        """Gives the folder free."""
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        for lock in (*self._devices, *([self._claim] if self._claim else [])):
            lock.release()
        if not self.processes.is_started_by_first:
            os.environ.pop(RUN_VARIABLE, None)

    def keep_reason(self, error: BaseException) -> None:
        """Writes it into the run's log in one line; the console shows what the caller makes of it."""
        if self._handler is not None:
            with suppress(OSError):
                self._handler.emit(logging.makeLogRecord({"msg": str(error), "levelname": "ERROR"}))

    def keep_traceback(self, error: BaseException) -> None:
        """Writes it into the run's log; the console shows what the caller makes of it."""
        if self._handler is not None:
            info = (type(error), error, error.__traceback__)
            with suppress(OSError):
                self._handler.emit(logging.makeLogRecord({"msg": "failed", "levelname": "ERROR", "exc_info": info}))


@contextmanager
def open_run(
    config: DictConfig,
    choices: dict[str, str],
    overrides: Sequence[str] = (),
    *,
    processes: Processes,
    in_sweep: bool = False,
    swept: Sequence[str] = (),
) -> Iterator[Run]:
    """A run whose folder is yet to be found; marked finished, failed, diverged or interrupted when it ends.

    A sweep's job that is refused before it starts is marked, too, as refused.

    Args:
        config: the validated configuration; resume is null, "auto" or a path.
        choices: the option chosen of every configuration group.
        overrides: the command line's KEY=VALUE, for the run's name, see default_name.
        processes: those that make up the run.
        in_sweep: it is a sweep's job.
        swept: the keys that this sweep has several values of.

    Raises:
        ValueError: name is no plain folder name.
        Skipped: in a sweep, see Run.find.
    """
    name = config.name or default_name(config, choices, overrides, swept)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name must be a plain folder name (letters, digits, '.', '_' and '-'), got {name!r}")
    run = Run(config, name, processes, in_sweep, swept)
    try:
        yield run
        run.end("finished")
    except Skipped:
        raise
    except DivergedError as error:
        run.end("diverged", error)
        run.keep_reason(error)
        raise
    except Interrupted as stopped:
        run.end("interrupted")
        if processes.is_first:
            log.warning(
                "interrupted by %s; the checkpoint of step %d is kept. To go on, with the same keys: "
                "python train.py %s",
                *(stopped, stopped.step, typed("resume", run.folder)),
            )
        # Those that the first process started report through it: it would take any other code for a crash
        raise SystemExit(0 if processes.is_started_by_first else exit_code(stopped)) from None
    except (KeyboardInterrupt, SystemExit) as stopped:
        run.end("interrupted")
        raise SystemExit(exit_code(stopped)) from None
    except BaseException as error:
        run.end("refused" if is_refusal(error) and not run.started else "failed", error)
        run.keep_traceback(error)
        raise
    finally:
        run.close()


def is_refusal(error: BaseException) -> bool:
    """Whether an error, before anything started, says that what was asked for cannot be."""
    return isinstance(error, ValueError | OSError)


def leave_mark(root: Path, name: str, status: str, **entries: Any) -> Path:
    """A folder with no more than a record, for a sweep's job that never became a run; an earlier mark is replaced."""
    mark = Run(OmegaConf.create({"run_root": str(root)}), name, find_processes(devices=1, num_nodes=1))
    mark._make(root)
    try:
        mark.update(status=status, command=command(), **entries)
    finally:
        mark.close()
    return mark.folder


def _value_of(folder: Path, record: dict[str, Any], key: str) -> Any:
    """A key of a run's configuration. init_from was lost by earlier versions, but for the record."""
    value = flat(OmegaConf.to_container(load_config(folder))).get(key)
    if value is None and not is_hash(recorded := (record.get("identity") or {}).get(key)):
        return recorded
    return value


def _apart_in(folder: Path, swept: Sequence[str]) -> dict[str, Any] | None:
    """See ``apart``; None where the folder is a mark that a job left, which has no configuration."""
    try:
        return apart(load_config(folder), swept)
    except (ValueError, OSError, OmegaConfBaseException):
        return None


def _length_of(folder: Path) -> tuple[int, int | None] | None:
    """max_steps and trainer.val_bytes of a run; None where its files do not say, or its schedule had another length."""
    try:
        config = load_config(folder)
        of_schedule = config.optimizer.get("max_steps", config.max_steps)  # which earlier runs could set apart
        return (config.max_steps, config.trainer.val_bytes) if of_schedule == config.max_steps else None
    except (ValueError, OSError, OmegaConfBaseException):
        return None


def _scores(folder: Path) -> tuple[float | None, bool]:
    """The last val/bpc of a run, and whether it was tested after its last step."""
    rows = read_csv(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    scores = [float(row["val/bpc"]) for row in rows if "val/bpc" in row]
    return scores[-1] if scores else None, bool(rows) and "test/bpc" in rows[-1]


def _left_nothing(folder: Path) -> bool:
    """Whether there is nothing worth keeping, and nobody at work: a run that ended before its first step."""
    try:
        status = read_record(folder).get("status") if (folder / RECORD_FILE).is_file() else None
        names = {path.name for path in folder.iterdir()}
    except (ValueError, OSError):
        return False
    left = {name for name in names - {LOCK_FILE, LOG_FILE} if not (name.startswith(".") and name.endswith(".tmp"))}
    if LOCK_FILE in names and left == {CONFIG_FILE}:  # killed between its configuration and its record
        left = set()
    recorded = METRICS_FILE in left or CHECKPOINT_FOLDER in left
    return (not left or (not recorded and status in ("failed", "interrupted", "refused"))) and not is_owned(folder)


def _empty(folder: Path) -> None:
    """Removes what a run wrote before its first checkpoint, which it writes again."""
    for path in folder.iterdir():
        if path.name in (LOCK_FILE, LOG_FILE):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _make_last(checkpoint: Path) -> Path:
    """Makes the chosen checkpoint the one that the run goes on from, also if it is killed before the next one.

    Later ones are kept under other names.
    """
    step = read_checkpoint(checkpoint)["global_step"]
    last = checkpoint.with_name(LAST_CHECKPOINT)
    later = [path for path in checkpoint.parent.glob("step-*.ckpt") if int(re.sub(r"\D", "", path.stem) or 0) > step]
    for path in later:
        put_aside(path, step, path.name)
    if checkpoint != last:
        also_named(checkpoint, LAST_CHECKPOINT)
    return last


def _checkpoint_at(path: Path) -> tuple[Path, Path]:
    """The run's folder and the checkpoint that a path, to a run or to a checkpoint in it, stands for."""
    if path.is_dir() and (path / RECORD_FILE).is_file():
        checkpoint, wrong = newest_good(path / CHECKPOINT_FOLDER)
        for sentence in wrong:
            log.warning("resume: %s", sentence)
        if checkpoint is not None:
            return path, checkpoint
        if wrong:
            raise ValueError(f"the run in {str(path)!r} has no sound checkpoint: {wrong[0]}")
    if not path.is_file():
        raise ValueError(
            f"resume must be null, auto, new, a run's folder with a checkpoint, or a checkpoint in it, got "
            f"{str(path)!r}, which has none"
        )
    folder = path.parent.parent
    if not (folder / RECORD_FILE).is_file():
        raise ValueError(f"resume={str(path)!r} is no checkpoint in a run's folder: {folder} has no {RECORD_FILE}")
    if path.absolute().parent.name != CHECKPOINT_FOLDER:
        raise ValueError(f"resume must be a checkpoint in {folder / CHECKPOINT_FOLDER}, got {str(path)!r}")
    try:
        read_checkpoint(path)
    except ValueError as error:
        other, _ = newest_good(path.parent)
        hint = f"; the newest sound one is {other}: {typed('resume', other)}" if other else ""
        raise ValueError(f"{error}{hint}") from error
    return folder, path
