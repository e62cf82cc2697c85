"""train.py in processes of their own that need not import torch and Lightning again: forked from one that has."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from support import ROOT

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train", "models.training.progress", "lightning.pytorch.strategies.ddp"])


class Forked:
    """A training, much as ``subprocess.Popen`` has it: ``python train.py ARGUMENTS``, or code and then train.main()."""

    def __init__(self, arguments: list[str], variables: dict[str, str], code: str | None):
        self.args = ["train.py", *arguments]
        self._output = tempfile.TemporaryDirectory()
        self._paths = [Path(self._output.name, name) for name in ("out", "err")]
        self._process = _context.Process(target=_train, args=(self._paths, self.args, variables, code))
        self._process.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """The exit code. Raises TimeoutError, and ends the process, where it does not end by itself."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.args}")
        return self._process.exitcode

    def communicate(self, timeout: float = 1800) -> tuple[str, str]:
        """What it wrote to stdout and stderr, when it has ended."""
        self.wait(timeout)
        return tuple(path.read_text(encoding="utf-8", errors="replace") for path in self._paths)


def _train(paths: list[Path], line: list[str], variables: dict[str, str], code: str | None) -> None:
    for descriptor, path in enumerate(paths, 1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.setsid()
    os.chdir(ROOT)
    os.environ.update(variables)
    sys.argv = line
    sys.stdin = open(os.devnull)
    import train
    from conf.command_line import answer
    from conf.legacy import answer_flags
    from models.training.started import follow_the_first
    from models.training.tables import show_any_character

    if code is None:
        follow_the_first()
        show_any_character()
        answer_flags(sys.argv[1:])
        sys.argv[1:] = answer(sys.argv[1:])
    else:
        exec(code, {"__name__": "__main__"})
    train.main()
