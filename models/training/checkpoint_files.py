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

CHECKPOINT_FOLDER = "checkpoints"
LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
INDEX_FILE = "index.json"
STATE_KEY = "Checkpoints"  # of what the callback that writes checkpoints keeps in them, see checkpoints.py
TRAINING_TIME = "training_time"  # the key of what a run by time keeps in them, see training_time.py


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of train.py holds of a run's progress; mapped, so that only what is used is read.

    Returns:
        global_step, state_dict, validated_step: the step that was validated last, and trained_s: the seconds of
        training that a run by time has counted, None in one by steps.

    Raises:
        ValueError: the file is cut short, damaged, or something else.
    """
    try:
        verify(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step = checkpoint["global_step"]
        saved = (checkpoint.get("callbacks") or {}).get(STATE_KEY, {})
        return {
            "global_step": step,
            "validated_step": saved.get("validated_step", step),  # earlier versions saved after validations alone
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
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    index = read_index(path.parent)
    if path.name in index:
        note_crc32(other, index[path.name].split(",")[-1])
    os.replace(temporary, other)
    return other


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
        on = f"resume={folder} goes on from the last checkpoint" if kept else "there is no checkpoint yet to go on from"
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
