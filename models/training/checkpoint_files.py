"""A run's checkpoints as files: their names, read back, verified, found again. Nothing of Lightning is imported.

``checkpoints/`` of a run holds ``step-N.ckpt``, the newest few, and two further names of files among those ever
written: ``last.ckpt``, the newest, and ``best.ckpt``, the one with the smallest val/bpc. ``index.json`` has each
file's CRC-32, so that a flipped bit anywhere in it is noticed.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from conf.schema import typed

CHECKPOINT_FOLDER = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
INDEX_FILE = "index.json"
STATE_KEY = "Checkpoints"  # of what the callback that writes checkpoints keeps in them, see checkpoints.py
TRAINING_TIME = "training_time"  # the key of what a run by time keeps in them, see training_time.py


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of train.py holds of a run's progress; mapped, so that only what is used is read.

    Returns:
        global_step, state_dict, validated_step: the step that was validated last; score: the val/bpc of this very step,
        or None; best: the smallest val/bpc until then, and best_step, which had it, each None where it is not known;
        trained_s: the seconds of training that a run by time has counted, None in one by steps.

    Raises:
        ValueError: the file is cut short, damaged, or something else.
    """
    try:
        verify(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step = checkpoint["global_step"]
        saved = (checkpoint.get("callbacks") or {}).get(STATE_KEY, {})
        validated_step = saved.get("validated_step", step)  # earlier versions saved after validations alone
        return {
            "global_step": step,
            "validated_step": validated_step,
            # earlier versions did not keep it: it is that of the one named best.ckpt, and who asks knows which that is
            "score": saved.get("score", saved.get("best")) if validated_step == step else None,
            "best": saved.get("best"),
            "best_step": saved.get("best_step"),
            "state_dict": checkpoint["state_dict"],
            "trained_s": (checkpoint.get(TRAINING_TIME) or {}).get("seconds"),
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
    paths = {folder / name: step for name, step in steps_in(folder).items()}
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


def also_named(path: Path, name: str) -> Path:
    """Gives a checkpoint a second name beside it, replacing what has it; a copy where links are not to be had."""
    other = path.with_name(name)
    temporary = temporary_name(other)
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path.resolve(), temporary)  # not a link to a link: that would dangle once the file has another name
    except OSError:
        try:
            shutil.copyfile(path, temporary)
        except OSError:  # a full disk, which what is half written would keep full
            temporary.unlink(missing_ok=True)
            raise
    index = read_index(path.parent)
    if path.name in index or other.name in index:  # the other name's entry, if it has one, is of other bytes
        note_crc32(other, index[path.name].split(",")[-1] if path.name in index else crc32(path))
    os.replace(temporary, other)
    temporary.unlink(missing_ok=True)  # of two names of one file neither replaces the other
    return other


def mend_best(checkpoint: Path, *, step: int, best: float | None, best_step: int | None) -> bool:
    """Has best.ckpt be of the steps that lead to the checkpoint that a run goes on from.

    It may not be: it is of a later step, which the run takes back; or of an earlier one than it should, because a kill
    or a full disk came between the names of a new best checkpoint. Later ones are put aside. Where the best one is no
    longer there under any name, best.ckpt becomes the checkpoint that the run goes on from. The score of weights that
    are lost must be forgotten then: held on to, it would leave best.ckpt where it is however much better others become.

    Args:
        checkpoint: the one that the run goes on from.
        step: its step.
        best: the smallest val/bpc until then; None before the first.
        best_step: the step that had it; None where it is not known, as in earlier versions.

    Returns:
        whether best.ckpt has the smallest val/bpc, as it should; else it is the checkpoint itself.
    """
    path = checkpoint.with_name(BEST_CHECKPOINT)
    found = _sound(path)
    if found is not None and found["global_step"] > step:
        put_aside(path, step, f"step-{found['global_step']}.ckpt")
        found = None
    if best is None or _is_best(found, best, best_step or (found or {}).get("global_step")):
        return True
    named = checkpoint if best_step == step else checkpoint.with_name(f"step-{best_step}.ckpt")
    is_kept = _is_best(_sound(named), best, best_step)
    also_named(named if is_kept else checkpoint, BEST_CHECKPOINT)
    return is_kept


def _is_best(found: dict[str, Any] | None, best: float, best_step: int | None) -> bool:
    return found is not None and found["global_step"] == best_step and found["score"] == best


def _sound(path: Path) -> dict[str, Any] | None:
    try:
        return read_checkpoint(path)
    except ValueError:
        return None


def put_aside(path: Path, step: int, name: str) -> None:
    """Keeps a checkpoint of steps that a run takes back, which goes on from an earlier one, under another name."""
    os.replace(path, path.with_name(f"before-resuming-at-{step}-{name}"))
    path.unlink(missing_ok=True)  # of two names of one file neither replaces the other


def note_crc32(path: Path, crc: str) -> None:
    """Writes into the index which CRC-32 the checkpoint at path has, or will have once it is replaced."""
    # Both the old file's and the new one's, until it is replaced: a kill in between leaves the old file verified.
    index = {name: known for name, known in read_index(path.parent).items() if (path.parent / name).exists()}
    before = index.get(path.name)
    index[path.name] = f"{before.split(',')[-1]},{crc}" if before and path.exists() else crc
    write_text(path.parent / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def read_index(folder: Path) -> dict[str, str]:
    """The CRC-32 of every checkpoint in the folder that has one, by file name."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def crc32(path: Path) -> str:
    """A file's CRC-32, eight hexadecimal digits."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def write_text(path: Path, text: str) -> None:
    """Writes a file whole: a kill leaves the old one or the new one, and a full disk nothing that is half.

    Raises:
        OSError: with the file's name, which a write that fails does not tell by itself.
    """
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file of a run while it trains: an OSError names the file, and says how to go on."""
    try:
        yield
    except OSError as error:
        folder = path.parent
        kept = (folder / CHECKPOINT_FOLDER / LAST_CHECKPOINT).exists()
        on = (
            f"{typed('resume', folder)} goes on from the last checkpoint"
            if kept
            else "there is no checkpoint yet to go on from"
        )
        raise OSError(f"{path} could not be written ({error.strerror or error}); {on}") from error


def temporary_name(path: Path) -> Path:
    """A name beside path that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def steps_in(folder: Path) -> dict[str, int]:
    """The step of every step-N.ckpt in a folder, by file name."""
    found = {path.name: re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in folder.glob("step-*.ckpt")}
    return {name: int(match[1]) for name, match in found.items() if match}


def _same_file(first: Path, second: Path) -> bool:
    return first.samefile(second) or read_index(first.parent).get(first.name, 1) == read_index(second.parent).get(
        second.name, 2
    )
