"""A sweep, where it was started: what becomes of its jobs is listed as it happens, and summed up at the end."""

import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from conf.secrets import redact_words
from models.training.checkpoint_files import write_text
from models.training.environment import ROOT, command, utc_now
from models.training.jobs import (
    RUNNING,
    STOPPED_FILE,
    SWEEP_FILE,
    SWEEP_VARIABLE,
    JobError,
    labels_of,
    line_of,
    one_line,
    read_records,
    set_variable,
)
from models.training.run_files import read_record
from models.training.stopping import SIGNALS
from models.training.tables import print_line, show

WRONG = ("failed", "refused", "diverged", "interrupted", "not started")  # with which a sweep's exit code is not 0
STYLES = {"finished": "green", "skipped": "cyan", "interrupted": "yellow", "not started": "yellow"}
WATCH_SECONDS = 0.3


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether a command line of train.py, as Hydra is to see it, starts a sweep."""
    return any(word in ("-m", "--multirun") or word == "hydra.mode=MULTIRUN" for word in arguments)


def best_jobs(records: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The record of lowest val/bpc, beside an empty text; where jobs validated several texts, others of their bytes, or
    in windows of several lengths, the best of each, beside what it is of: their numbers do not compare.
    """
    best: dict[tuple, dict[str, Any]] = {}
    for record in records:
        if record.get("val_bpc") is not None:
            of = _validated(record)
            best[of] = min(best.get(of, record), record, key=lambda one: one["val_bpc"])
    several = len(best) > 1
    return [
        (f" of {text or 'a text'} ({val_scored or '?'} bytes), seq_len {seq_len or '?'}" if several else "", record)
        for (text, val_scored, seq_len), record in best.items()
    ]


def _validated(record: dict[str, Any]) -> tuple:
    """The hash and the bytes of what a job validated, and in windows of which length, as far as its run says."""
    try:
        run = read_record(Path(record["folder"]))
    except (KeyError, TypeError, ValueError, OSError):
        run = {}
    corpus, identity = run.get("corpus") or {}, run.get("identity") or {}
    text = f"the text of SHA-256 {corpus['sha256'][:8]}" if corpus.get("sha256") else corpus.get("name")
    return text, corpus.get("val_scored"), identity.get("seq_len")


class Sweep:
    """A sweep, where it was started: watches its jobs, ends them all together, and sums up."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._jobs: dict[int, list[str]] = {}
        self._header: dict[str, Any] = {}
        self._elsewhere = False  # the launcher runs jobs in processes of their own, for now
        self._signal: int | None = None
        self._said: dict[int, str] = {}  # by job, the status that was listed last

    def conduct(self, start: Callable[[], Any]) -> int | str:
        """Runs the whole sweep, and returns the exit code: 0 if every job was finished or skipped.

        Args:
            start: has Hydra run the jobs.
        """
        handlers = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        variables = {name: os.environ.get(name) for name in (SWEEP_VARIABLE, "PYTHONPATH")}
        code: int | str = 0
        try:
            with _launchers_wrapped(self):
                start()
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except SystemExit as ended:
            code = ended.code or 0
            if self._signal is not None:
                code = 128 + self._signal
        finally:
            _end_idle_workers()
            for name, value in variables.items():
                set_variable(name, value)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        if self.folder is None:  # nothing was started: Hydra has said why
            return code
        records = self._conclude()
        return code or int(any(record["status"] in WRONG for record in records))

    def prepare(self, config: DictConfig) -> None:
        """Before Hydra writes what the sweep is, which it would refuse with a traceback.

        Raises:
            SystemExit: nothing can be written in run_root, in one line.
        """
        try:
            Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(
                f"error: run_root must be a folder that can be written to, or that can be made, got "
                f"{str(config.run_root)!r}: {error}"
            ) from error

    def begin(self, config: DictConfig, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Notes a batch of jobs that is about to be launched, and tells their processes where they belong."""
        if self.folder is None:
            self.folder = _own_folder(Path(config.hydra.sweep.dir))
            self._header = self._make_header(config)
        for number, overrides in enumerate(jobs, start=first):
            self._jobs[number] = redact_words([line for line in overrides if not _key(line).startswith("hydra")])
        self._write()
        launcher = config.hydra.launcher
        told = {
            "process": os.getpid(),
            "folder": str(self.folder.resolve()),
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "gpus": max(torch.cuda.device_count(), launcher.get("gpus_per_node") or 0),
        }
        os.environ[SWEEP_VARIABLE] = json.dumps(told)
        # A launcher's process finds the modules here wherever it is started
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))

    def _make_header(self, config: DictConfig) -> dict[str, Any]:
        overrides = redact_words(list(config.hydra.overrides.task))
        name = f"{config.hydra.runtime.choices.get('sweep') or 'sweep'}_{self.folder.name}"
        earlier = [] if config.get("resume") == "new" else _earlier_groups(self.folder, overrides)
        group = earlier[-1] if earlier else name
        return {"command": command(), "began": utc_now(), "overrides": overrides, "group": group}

    @contextmanager
    def watching(self, *, elsewhere: bool) -> Iterator[None]:
        """While a launcher runs jobs in other processes, says what becomes of them; then sees all of them end."""
        self._elsewhere, done = elsewhere, threading.Event()
        watch = threading.Thread(target=self._watch, args=(done,), daemon=True)
        if elsewhere:
            watch.start()
        try:
            yield
        except Exception as error:
            if not elsewhere:
                raise
            # A job's process died. Those of submitit are independent of each other: they go on, and this waits.
            print_line(f"error: the launcher: {one_line(f'{type(error).__name__}: {error}')}")
            _wait_for_submitit()
            raise SystemExit(1) from error
        finally:
            self._elsewhere = False
            done.set()
            if elsewhere:
                watch.join()
                self._say_news()
        if self._signal is not None:
            raise SystemExit(128 + self._signal)

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(WATCH_SECONDS):
            self._say_news()

    def _say_news(self) -> None:
        labels = labels_of(self.folder)
        for number, record in sorted(read_records(self.folder).items()):
            status = record["status"]
            stage = f"{status} {record.get('folder')}" if status == RUNNING else status
            if self._said.get(number) == stage or (status == RUNNING and "folder" not in record):
                continue
            if record["process"] == os.getpid() and record["host"] == socket.gethostname():
                continue  # joblib starts no process for one job at a time: it has said so itself
            self._said[number] = stage
            print_line(line_of(record, labels))
        sys.stdout.flush()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        del frame
        running = self._running() if self._elsewhere and self._signal is None else []
        self._signal = signum
        if self.folder is not None:
            (self.folder / STOPPED_FILE).touch()
        if running:
            os.write(2, b"\nthe sweep ends when its jobs' steps are finished and kept; Ctrl-C ends it at once\n")
            for process in running:
                process.terminate()
            return
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    def _running(self) -> list[psutil.Process]:
        """The processes that a launcher started from here and in which a job runs."""
        pids = {
            record["process"]
            for record in read_records(self.folder).values()
            if record["status"] == RUNNING and record["host"] == socket.gethostname()
        }
        return [child for child in psutil.Process().children(recursive=True) if child.pid in pids]

    def _write(self, **entries: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = [{"job": number, "overrides": overrides} for number, overrides in sorted(self._jobs.items())]
        whole = {**self._header, "jobs": jobs, **entries}
        write_text(self.folder / SWEEP_FILE, json.dumps(whole, indent=2, default=str) + "\n")

    def _conclude(self) -> list[dict[str, Any]]:
        """Shows the table of all jobs, where their runs are, and what to do next. Returns all records."""
        records = self._ended_records()
        self._write(ended=utc_now(), jobs=records)
        labels = labels_of(self.folder)
        show(_table(records, labels), names=1)
        counts = {status: sum(record["status"] == status for record in records) for status in _statuses(records)}
        told = ", ".join(f"{number} {status}" for status, number in counts.items())
        print_line(f"{len(records)} job{'s' if len(records) != 1 else ''}: {told}; records in {self.folder}")
        for of, best in best_jobs(records):
            print_line(f"best{of}: #{best['job']} {labels.get(best['job'], '')}, val bpc {best['val_bpc']:.4f}")
        folders = dict.fromkeys(record["folder"] for record in records if record.get("folder"))
        if folders:
            print_line(f"compare: python -m scripts.compare {shlex.join(folders)}")
        if any(record["status"] in ("interrupted", "not started") for record in records):
            print_line("to go on: the same command again; what is finished is skipped")
        return records

    def _ended_records(self) -> list[dict[str, Any]]:
        found, records = read_records(self.folder), []
        for number, overrides in sorted(self._jobs.items()):
            record = found.get(number, {"job": number, "overrides": overrides, "status": "not started"})
            if record["status"] == RUNNING and record["host"] == socket.gethostname():
                if not self._signal and not psutil.pid_exists(record["process"]):
                    record |= {"status": "failed", "reason": "its process ended without a word, as one that is killed"}
                else:
                    record["status"] = "interrupted"
            records.append(record)
        return records


class _Watched(Launcher):
    """A launcher, with what a sweep does around it."""

    def __init__(self, launcher: Launcher, sweep: Sweep, config: DictConfig):
        self._launcher, self._sweep, self._config = launcher, sweep, config

    def setup(self, **arguments: Any) -> None:
        """Nothing: the launcher is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Has the launcher run a batch of jobs. One without a result stops no other."""
        self._sweep.begin(self._config, job_overrides, initial_job_idx)
        with self._sweep.watching(elsewhere=_class_of(self._config.hydra.launcher) != "BasicLauncher"):
            returns = self._launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        if _class_of(self._config.hydra.sweeper) == "BasicSweeper":  # others want to know, and go on by themselves
            for job in returns:
                if isinstance(vars(job).get("_return_value"), JobError):  # Hydra would show it, and stop
                    job.return_value, job.status = None, JobStatus.COMPLETED
        return returns


@contextmanager
def _launchers_wrapped(sweep: Sweep) -> Iterator[None]:
    """Hydra's launchers, whichever are chosen, with what a sweep does around them."""
    instantiate = Plugins.instantiate_launcher

    def wrapped(self: Plugins, **arguments: Any) -> Launcher:
        sweep.prepare(arguments["config"])
        return _Watched(instantiate(self, **arguments), sweep, arguments["config"])

    Plugins.instantiate_launcher = wrapped
    try:
        yield
    finally:
        Plugins.instantiate_launcher = instantiate


def _own_folder(wanted: Path) -> Path:
    """The folder, or that with a number behind its name: another sweep may have started in the same second."""
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / SWEEP_FILE).touch(exist_ok=False)
            return folder
        except FileExistsError:
            number += 1


def _earlier_groups(folder: Path, overrides: list[str]) -> list[str]:
    groups = []
    for path in sorted(folder.parent.glob(f"*/{SWEEP_FILE}")):
        try:
            sweep = json.loads(path.read_text())
        except (OSError, ValueError):  # cut short, by a full disk say: it groups nothing
            continue
        if _same(sweep.get("overrides", []), overrides) and "group" in sweep:
            groups.append(sweep["group"])
    return groups


def _table(records: Sequence[dict[str, Any]], labels: dict[int, str]) -> Table:
    table = Table(title="sweep")
    for heading in ("job", "status", "val bpc", "folder", "why"):
        table.add_column(heading, justify="right" if heading == "val bpc" else "left")
    for record in records:
        status, score = record["status"], record.get("val_bpc")
        reason = one_line(record.get("reason") or "")
        cells = [
            f"#{record['job']} {labels.get(record['job'], '')}".strip(),
            record.get("folder") or "-",
            reason or "-",
        ]
        name, folder, why = map(escape, cells)
        table.add_row(
            name, f"[{STYLES.get(status, 'red')}]{status}[/]", "-" if score is None else f"{score:.4f}", folder, why
        )
    return table


def _statuses(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(record["status"] for record in records))


def _same(line: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two command lines ask for the same jobs."""
    return sorted(word for word in line if _key(word) != "resume") == sorted(
        word for word in other if _key(word) != "resume"
    )


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]


def _class_of(plugin: DictConfig) -> str:
    return plugin._target_.rsplit(".", 1)[-1]


def _end_idle_workers() -> None:
    """Ends joblib's processes, which would wait for more to do, for five minutes."""
    if "hydra_plugins.hydra_joblib_launcher._core" in sys.modules:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor(reuse=True).shutdown(wait=True)


def _wait_for_submitit() -> None:
    def is_job(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and any("submitit" in word for word in process.cmdline())
        except psutil.Error:
            return False

    while any(is_job(child) for child in psutil.Process().children(recursive=True)):
        time.sleep(WATCH_SECONDS)
