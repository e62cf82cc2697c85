"""A run is a folder: its configuration, its record, its checkpoints, its metrics. Made, found again, closed here."""

import datetime
import json
import logging
import os
import pickle
import platform
import re
import subprocess
import sys
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.gpt import GPT
from models.lightning import DivergedError
from models.trainer import BEST_CHECKPOINT, LAST_CHECKPOINT

CONFIG_FILE = "config.yaml"
RECORD_FILE = "run.json"
# Differences of these keys do not change what a resumed run computes.
NOT_COMPARED = ("resume", "test", "name", "run_root", "logger", "trainer.progress_bar", "trainer.sample_bytes")
# Set by the first process of a multi-GPU run, so that the others, which start the same program, join its folder.
RUN_VARIABLE = "FLASH_COSINE_SIM_RUN"

# What torch.load raises for a file that is cut short, damaged or something else.
UNPICKLING_ERRORS = (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError)

log = logging.getLogger(__name__)


@dataclass
class Run:
    """An open run.

    Attributes:
        folder: where everything of the run is written.
        checkpoint: what it continues from, or None for a new run.
        resume_step: the optimizer step of that checkpoint, or None.
        record: what is stored in run.json.
    """

    folder: Path
    checkpoint: Path | None
    resume_step: int | None
    record: dict[str, Any]

    def update(self, **entries: Any) -> None:
        """Adds entries to run.json; only the first process writes."""
        self.record.update(entries)
        if _is_first_process():
            _write_text(self.folder / RECORD_FILE, json.dumps(self.record, indent=2, default=str) + "\n")


@contextmanager
def open_run(config: DictConfig, choices: dict[str, str], overrides: Sequence[str] = ()) -> Iterator[Run]:
    """Finds or makes the run's folder, and marks the run finished, failed, diverged or interrupted when it ends.

    Args:
        config: the validated configuration; resume is null, "auto" or a path.
        choices: the option chosen of every configuration group.
        overrides: the command line's KEY=VALUE, of which the run's name tells those of model and optimizer.
    """
    first = _is_first_process()
    if first:
        name = config.name or default_name(config, choices, overrides)
        folder, checkpoint = find_folder(Path(config.run_root), name, config.resume)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[RUN_VARIABLE] = json.dumps([str(folder), str(checkpoint) if checkpoint else None])
    else:
        folder, checkpoint = (path and Path(path) for path in json.loads(os.environ[RUN_VARIABLE]))
    record = read_record(folder) if checkpoint else {}
    if checkpoint:
        _warn_of_changes(folder, config)
    record.setdefault("wandb_id", f"{re.sub('[^A-Za-z0-9_-]', '_', folder.name)[:100]}-{uuid.uuid4().hex[:8]}")
    resume_step = _step_of(checkpoint) if checkpoint else None
    run = Run(folder, checkpoint, resume_step, record)
    if first:
        _write_text(folder / CONFIG_FILE, OmegaConf.to_yaml(config, resolve=True))
    run.update(choices=choices, **environment(), status="running", error=None)
    handler = logging.FileHandler(folder / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        log.info("run folder %s%s", folder, f", continues at step {resume_step}" if checkpoint else "")
        yield run
        run.update(status="finished")
    except DivergedError as error:
        run.update(status="diverged", error=str(error))
        raise
    except KeyboardInterrupt:
        run.update(status="interrupted")
        raise
    except BaseException as error:
        run.update(status="failed", error="".join(traceback.format_exception_only(error)).strip())
        log.error("the run failed", exc_info=error)
        raise
    finally:
        os.environ.pop(RUN_VARIABLE, None)
        logging.getLogger().removeHandler(handler)
        handler.close()


def default_name(config: DictConfig, choices: dict[str, str], overrides: Sequence[str] = ()) -> str:
    """A name that says what the run is, so that the same command finds it again and a sweep's jobs differ."""
    parts = [choices.get(group) or "none" for group in ("attention", "norm", "model", "data")]
    parts += [f"len{config.seq_len}", f"lr{config.lr:g}", f"seed{config.seed}"]
    told = ("attention.", "norm.", "model.", "optimizer.")
    parts += [override for override in overrides if override.lstrip("+").startswith(told)]
    return re.sub(r"[^\w.,=-]", "_", "-".join(parts))


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
    candidates = [root / name]
    while _holds_a_run(candidates[-1]):
        candidates.append(root / f"{name}-{len(candidates) + 1}")
    *existing, new = candidates
    if resume == "auto":
        for folder in reversed(existing):
            checkpoint = folder / "checkpoints" / LAST_CHECKPOINT
            if checkpoint.exists():
                return folder, checkpoint
        log.info("resume=auto: no checkpoint under %s*, a new run starts", root / name)
    return new, None


def _holds_a_run(folder: Path) -> bool:
    """Whether anything there is worth keeping; a run that failed before its first step left nothing."""
    if not folder.exists():
        return False
    record = read_record(folder) if (folder / RECORD_FILE).is_file() else {}
    recorded = (folder / "metrics.csv").exists() or (folder / "checkpoints").exists()
    return recorded or record.get("status") not in ("failed", "interrupted")


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
    """The resolved configuration of a run."""
    path = _file_of_run(folder, CONFIG_FILE)
    try:
        config = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{str(path)!r} must hold keys and values, got a list")
    return config


def build_gpt(config: DictConfig) -> GPT:
    """The model that a configuration describes, freshly initialised."""
    return instantiate(config.model, attention=instantiate(config.attention), block=instantiate(config.norm))


def load_model(
    folder: str | Path, checkpoint: str = "best", device: torch.device | str | None = None
) -> tuple[GPT, DictConfig]:
    """The trained model of a run, in evaluation mode, and the run's configuration.

    Args:
        folder: the run's folder.
        checkpoint: "best", "last" or the path of a checkpoint.
        device: where the model goes, None for the CPU.

    Raises:
        ValueError: folder is no run, or its checkpoint is missing, damaged or another model's.
    """
    path = find_checkpoint(folder, checkpoint)
    config_path = Path(folder) / CONFIG_FILE
    config = load_config(folder)
    try:
        gpt = build_gpt(config)
    except (OmegaConfBaseException, InstantiationException) as error:
        raise ValueError(f"{str(config_path)!r} does not describe a model: {error}") from error
    try:
        gpt.load_state_dict(_read_weights(path))
    except RuntimeError as error:  # strict: every weight is there and no other
        raise ValueError(
            f"{str(path)!r} holds the weights of another model than {str(config_path)!r}: {error}"
        ) from error
    return gpt.to(device or "cpu").eval(), config


def find_checkpoint(folder: str | Path, checkpoint: str) -> Path:
    """The path of a run's checkpoint "best" or "last", or of any other given by its path."""
    _file_of_run(folder, CONFIG_FILE)
    names = {"best": BEST_CHECKPOINT, "last": LAST_CHECKPOINT}
    path = Path(folder) / "checkpoints" / names[checkpoint] if checkpoint in names else Path(checkpoint)
    if not path.is_file():
        existing = [name for name, file in names.items() if (Path(folder) / "checkpoints" / file).is_file()]
        raise ValueError(
            f"checkpoint must be best, last or the path of a checkpoint, got {checkpoint!r}: "
            f"{str(path)!r} is no file; the run has {' and '.join(existing) or 'no checkpoint yet'}"
        )
    return path


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds under ``gpt.``; mapped, so that the optimizer's state is never read."""
    prefix = "gpt."
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        return {key.removeprefix(prefix): weight for key, weight in state.items() if key.startswith(prefix)}
    except (*UNPICKLING_ERRORS, LookupError, TypeError, AttributeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"{str(path)!r} is no sound checkpoint of a run, as train.py writes them (cut short?): {reason}"
        ) from error


def read_record(folder: Path) -> dict[str, Any]:
    path = _file_of_run(folder, RECORD_FILE)
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(path)!r} must hold an object, got {type(record).__name__}")
    return record


def _file_of_run(folder: Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is not a run's folder: it has no {name}")
    return path


def _step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]


def _warn_of_changes(folder: Path, config: DictConfig) -> None:
    before = _flat(OmegaConf.to_container(load_config(folder)))
    now = _flat(OmegaConf.to_container(config, resolve=True))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(NOT_COMPARED):
            log.warning("resumed with a change: %s was %s, is %s", key, before.get(key), now.get(key))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def environment() -> dict[str, Any]:
    """What a result depends on beyond the configuration."""
    packages = ("torch", "lightning", "hydra-core", "wandb", "einops", "numpy", "flash-cosine-sim-attention")
    return {
        "command": " ".join(sys.argv),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent
    try:
        return subprocess.run(
            ("git", *arguments), cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git: the record says null


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _is_first_process() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
