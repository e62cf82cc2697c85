"""Programs around finished runs, started as ``python -m scripts.NAME``, and the command line they share."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from omegaconf.errors import OmegaConfBaseException

from models.training.tables import show_any_character

PLOTS = (".png", ".svg", ".pdf")  # what a plot's file may end in


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: ``error: ...`` and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows what is accepted\n")

    def add_model_arguments(self) -> None:
        """RUN, --checkpoint and --device: which model, and where it runs."""
        self.add_argument("run", metavar="RUN", help="a run's folder, as train.py writes it")
        self.add_argument(
            "--checkpoint", default="best", metavar="best|last|PATH", help="weights to load (default: best)"
        )
        self.add_argument(
            "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one"
        )


def run_script(parser: Parser, action: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parses argv (None: the command line), runs action, and returns the exit code.

    An error that the user can mend (a ValueError, an OSError, a key that config.yaml lacks) is written to
    stderr without its traceback, and the code is 2. Ctrl-C ends without one, too, and with 130; a pipe that nobody
    reads any more ends with 141, as a signal would.
    """
    show_any_character()
    try:
        action(parser.parse_args(argv))
        sys.stdout.flush()
    except SystemExit as stopped:  # --help or a refused argument
        return int(stopped.code or 0)
    except BrokenPipeError:  # the reader has seen enough; what is left in the buffer would raise again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def integer(minimum: int) -> Callable[[str], int]:
    """The type of an argument that is an integer of at least minimum."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum}, got {text!r}")
        return value

    return convert


def non_negative(text: str) -> float:
    """The type of an argument that is a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def share(text: str) -> float:
    """The type of an argument that is a number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {text!r}")
    return value


def check_file(option: str, path: Path | None, suffixes: Sequence[str] | None = None) -> None:
    """Raises ValueError, before minutes of work, for a file that is asked for and cannot be written, or with another
    suffix than it may have.
    """
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{option} must be a file in an existing folder, got {str(path)!r}")
    if not is_writable(path):
        raise ValueError(f"{option} must be a file that can be written to, got {str(path)!r}")
    if suffixes is not None and path.suffix not in suffixes:
        raise ValueError(f"{option} must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}, got {str(path)!r}")


def is_writable(path: Path) -> bool:
    """Whether a file can be written, or made."""
    return os.access(path if path.exists() else path.absolute().parent, os.W_OK)


def choose_device(name: str) -> torch.device:
    """The device of --device. Raises ValueError for cuda where PyTorch sees none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda needs a CUDA device, and PyTorch sees none; accepted here: auto, cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context that computes in precision, named as ``models.training.devices.choose_precision`` does."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16-mixed")
