"""What a measurement depends on beyond its configuration: machine, versions, commit."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from conf.secrets import redact_words
from flash_cosine_sim_attention.identity import DISTRIBUTION, __version__

ROOT = Path(__file__).resolve().parents[2]


def environment(*, cuda: bool | None = None) -> dict[str, Any]:
    """What a result depends on beyond the configuration.

    Args:
        cuda: whether it is a GPU's; None: wherever there is one.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    packages = ("torch", "lightning", "hydra-core", "wandb", "einops", "numpy")
    return {
        "command": command(),
        "started": utc_now(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None
        if (changes := _git("status", "--porcelain", "--untracked-files=no")) is None
        else bool(changes),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        # torch's own word says which CUDA it was built for, its metadata may not; ours is what was imported
        "versions": {package: _version(package) for package in packages}
        | {"torch": torch.__version__, DISTRIBUTION: __version__},
    }


def utc_now() -> str:
    """The time of day in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def command() -> str:
    """The line that started this process, for a shell, from the repository's root; secrets are masked."""
    try:
        program = Path(sys.argv[0]).resolve().relative_to(ROOT)
    except ValueError:  # a program of somewhere else
        started = [sys.argv[0]]
    else:
        module = ".".join(program.with_suffix("").parts)
        started = ["python", "-m", module] if program.parts[0] == "scripts" else ["python", str(program)]
    return shlex.join([*started, *redact_words(sys.argv[1:])])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    # An archive that was unpacked within another repository is not that one's commit
    here = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    try:
        return subprocess.run(
            ("git", *arguments), cwd=ROOT, env=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, no git, or one that git refuses: the record says null


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
