"""A job of a sweep, in whatever process a launcher runs it: what becomes of it is recorded, and said in one line.

A sweep's folder, run_root/.sweeps/DATE, holds sweep.json, which lists the jobs, and of every job that began
jobs/N.json: its status, its run's folder, its val/bpc or what went wrong.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from conf.schema import ConfigError
from conf.secrets import redact_words
from models.training.checkpoint_files import write_text
from models.training.environment import utc_now
from models.training.module import DivergedError
from models.training.runs import Run, Skipped, is_refusal, leave_mark
from models.training.stopping import SIGNALS
from models.training.tables import print_line

SWEEP_FILE = "sweep.json"
JOBS_FOLDER = "jobs"
STOPPED_FILE = "stopped"  # there once the sweep was interrupted: no further job starts
# What the process that conducts a sweep tells those that a launcher starts, as JSON.
SWEEP_VARIABLE = "FLASH_COSINE_SIM_SWEEP"
RUNNING = "running"
LONGEST_REASON = 300


class JobError(RuntimeError):
    """A job did not end with a result; its record says why. One line, which any process can read back."""


def told() -> dict[str, Any]:
    """What the process that conducts the sweep says: process, folder, cuda_visible_devices, gpus; {} without one."""
    return json.loads(os.environ.get(SWEEP_VARIABLE, "{}"))


def job_here(hydra_config: DictConfig) -> "Job":
    """The job that Hydra has begun in this process."""
    folder = Path(told().get("folder") or hydra_config.sweep.dir)
    return Job(folder, int(hydra_config.job.num), [str(line) for line in hydra_config.overrides.task])


class Job:
    """One job, where it runs.

    Args:
        sweep: the sweep's folder.
        number: the job's, as Hydra counts them.
        overrides: its KEY=VALUE.

    Attributes:
        training: its run, once there is one.
    """

    def __init__(self, sweep: Path, number: int, overrides: Sequence[str]):
        self.sweep, self.number, self.overrides = sweep, number, list(overrides)
        self.training: Run | None = None
        self._record: dict[str, Any] = {
            "job": number,
            "overrides": redact_words(self.overrides),
            "process": os.getpid(),
            "host": socket.gethostname(),
        }

    @property
    def is_elsewhere(self) -> bool:
        """Whether a launcher started a process for it."""
        return told().get("process", os.getpid()) != os.getpid()

    @property
    def label(self) -> str:
        """What tells it from the sweep's other jobs."""
        return labels_of(self.sweep).get(self.number, "")

    @property
    def swept(self) -> list[str]:
        """The keys that the sweep has several values of."""
        sweep, values = _read_sweep(self.sweep), {}
        # Of the line, too: a search lists its jobs as it comes to them.
        several = [word for word in sweep.get("overrides", ()) if _has_several(word)]
        for words in [several, *(job["overrides"] for job in sweep.get("jobs", ()))]:
            for word in words:
                key, _, value = word.lstrip("+~").partition("=")
                values.setdefault(key, set()).add(value)
        return [key for key, found in values.items() if len(found) > 1]

    def note(self, **entries: Any) -> None:
        """Adds entries to its record; those that are None are none."""
        self._record |= {key: value for key, value in entries.items() if value is not None}
        folder = self.sweep / JOBS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.number}.json", json.dumps(self._record, indent=2, default=str) + "\n")

    def end_if_stopped(self) -> None:
        """Raises KeyboardInterrupt once the sweep was interrupted."""
        if (self.sweep / STOPPED_FILE).exists():
            raise KeyboardInterrupt

    def check_gpu(self, accelerator: str) -> None:
        """Refuses to train on the CPU because the launcher hides the GPUs.

        Raises:
            ConfigError: the sweep has GPUs, the accelerator is to be found out, and here PyTorch sees none.
        """
        gpus = told().get("gpus", 0)
        if accelerator == "auto" and gpus and not torch.cuda.is_available():
            raise ConfigError(
                f"trainer.accelerator=auto would be the CPU: the sweep has {gpus} GPU{'s' * (gpus > 1)}, and PyTorch "
                f"sees none in this job's process (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}); "
                "accepted: a launcher that gives jobs a GPU, or trainer.accelerator=cpu"
            )

    def run(self, train: Callable[[], float], mark: Callable[[], tuple[Path, str]]) -> float:
        """Trains, and records how that ended.

        Args:
            train: returns val/bpc.
            mark: where the mark of a job belongs that never became a run, if need be: run_root and a name.

        Raises:
            JobError: there is no result.
        """
        with self._surroundings():
            return self._run(train, mark)

    def _run(self, train: Callable[[], float], mark: Callable[[], tuple[Path, str]]) -> float:
        self.note(status=RUNNING, began=utc_now())
        try:
            self.end_if_stopped()
            bits_per_byte = train()
        except Skipped as skipped:
            bits_per_byte = skipped.bits_per_byte
            self._end("skipped", reason=str(skipped), folder=skipped.folder, val_bpc=bits_per_byte)
            if bits_per_byte is None:
                raise JobError(f"job #{self.number} was skipped: {skipped}") from None
            return bits_per_byte
        except (KeyboardInterrupt, SystemExit):
            self._end("interrupted" if self.training else "not started")
            if self.is_elsewhere:  # its launcher would take the others' processes down
                raise JobError(f"job #{self.number} was interrupted") from None
            raise
        except Exception as error:
            self._fail(error, mark)
        self._end("finished", val_bpc=bits_per_byte)
        return bits_per_byte

    def _fail(self, error: Exception, mark: Callable[[], tuple[Path, str]]) -> NoReturn:
        status, reason = "failed", f"{type(error).__name__}: {error}"
        if isinstance(error, DivergedError):
            status, reason = "diverged", str(error)
        elif is_refusal(error) and not (self.training and self.training.started):
            status, reason = "refused", str(error)
        folder = None
        if self.training is None:
            try:
                folder = leave_mark(*mark(), status, error=str(error), overrides=self._record["overrides"])
            except Exception as other:  # whatever it is, the job's own error is to be told
                reason += f" (and no mark could be left: {other})"
        trace = traceback.format_exc() if status == "failed" else None
        if "HYDRA_FULL_ERROR" in os.environ:
            traceback.print_exc()
        self._end(status, reason=reason, folder=folder, traceback=trace)
        raise JobError(f"job #{self.number} {status}: {one_line(reason)}") from None

    def _end(self, status: str, *, folder: Path | None = None, **entries: Any) -> None:
        if folder is None and self.training is not None and self.training.folder is not None:
            folder = self.training.folder if self.training.folder.is_dir() else None
        self.note(status=status, ended=utc_now(), folder=None if folder is None else str(folder), **entries)
        if not self.is_elsewhere:  # else the process that conducts the sweep says it
            sys.stdout.flush()
            print_line(line_of(self._record, labels_of(self.sweep)))

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Of a job in a process of its own: signals end it in order, and what it prints goes to a file."""
        if not self.is_elsewhere:
            yield
            return
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":  # which has overwritten it, so that there is no GPU
            set_variable("CUDA_VISIBLE_DEVICES", told()["cuda_visible_devices"])
        active = True

        def end(signum: int, frame: FrameType | None) -> None:
            del frame
            if active:  # afterwards a late signal must not take the process, and so the launcher, down
                raise SystemExit(128 + signum)

        for signum in SIGNALS:
            signal.signal(signum, end)
        try:
            with self._output_in_file():
                yield
        finally:
            active = False

    @contextmanager
    def _output_in_file(self) -> Iterator[None]:
        if "SUBMITIT_EXECUTOR" in os.environ:  # which has files of its own
            yield
            return
        (self.sweep / JOBS_FOLDER).mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        console = os.dup(1)
        with open(self.sweep / JOBS_FOLDER / f"{self.number}.log", "ab") as file:
            os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(console, 1)
            os.close(console)


def sweep_group(folder: Path, name: str | None) -> str:
    """The wandb group of a sweep's runs: that of the first sweep of the same command line, so that runs stay together.

    Args:
        folder: the sweep's.
        name: the option of conf/sweep/, if one is chosen.
    """
    try:
        return json.loads((Path(told().get("folder") or folder) / SWEEP_FILE).read_text())["group"]
    except (OSError, ValueError, KeyError):  # Hydra was called by another program than train.py
        return f"{name or 'sweep'}_{folder.name}"


def read_records(folder: Path) -> dict[int, dict[str, Any]]:
    records = (json.loads(path.read_text()) for path in (folder / JOBS_FOLDER).glob("*.json"))
    return {record["job"]: record for record in records}


def labels_of(folder: Path) -> dict[int, str]:
    """By job, what tells it from the others: its overrides that neither all jobs have nor the command line says."""
    sweep = _read_sweep(folder)
    jobs = sweep.get("jobs", ())
    common = {word for word in sweep.get("overrides", ()) if not word.startswith("++")}
    if len(jobs) > 1:
        common |= set.intersection(*(set(job["overrides"]) for job in jobs))
    return {
        job["job"]: " ".join(word.removeprefix("++") for word in job["overrides"] if word not in common) for job in jobs
    }


def _has_several(word: str) -> bool:
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:  # a secret was masked in it
        return False


def _read_sweep(folder: Path) -> dict[str, Any]:
    """What sweep.json says; {} where Hydra was called by another program than train.py."""
    try:
        return json.loads((folder / SWEEP_FILE).read_text())
    except OSError:
        return {}


def line_of(record: dict[str, Any], labels: dict[int, str]) -> str:
    """What is said of a job, in one line."""
    label = labels.get(record["job"], "")
    told = [record["status"]]
    if record["status"] == RUNNING and record.get("place"):
        told.append(f"on {record['place']}")
    if record.get("val_bpc") is not None:
        told.append(f"val bpc {record['val_bpc']:.4f}")
    if record.get("reason"):
        told.append(one_line(record["reason"]))
    if record.get("folder"):
        told.append(record["folder"])
    return (
        f"job #{record['job']}{f' ({label})' if label else ''}: {told[0]}{': ' * bool(told[1:])}{', '.join(told[1:])}"
    )


def one_line(text: str) -> str:
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 3]}..."


def set_variable(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
