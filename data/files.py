"""Any file or folder as a corpus, and the reading of raw, .gz and .zip files that the other corpora share."""

import gzip
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil

from data.bytes import ByteCorpus

# What gzip, zipfile and its decompressors raise for flipped or missing bytes; RuntimeError: a password.
DECOMPRESSION_ERRORS = (
    *(OSError, EOFError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


def file(path: str, val_fraction: float = 0.05, test_fraction: float = 0.05, pattern: str = "*") -> ByteCorpus:
    """Make a corpus of one file (raw, .gz, or .zip with one member) or of the files in a folder.

    A folder's files are those at any depth whose name matches `pattern` (shell wildcards, case-sensitive),
    without links and hidden files and folders; each is read as a single file would be, and they are joined
    in the byte order of their relative POSIX paths. The whole is cut into train, val and test, in that
    order and wherever the fractions fall. All of it is read into memory, so that a file may change meanwhile; it must
    fit half of what is free.
    Raises FileNotFoundError or ValueError with the path and the reason.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"data.pattern must be a file name pattern such as '*.txt', got {pattern!r}")
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not isinstance(fraction, float) or not 0 < fraction < 1:
            raise ValueError(f"data.{name} must be a number between 0 and 1, got {fraction!r}")
    if val_fraction + test_fraction >= 1:
        raise ValueError(
            f"data.val_fraction + data.test_fraction must be less than 1, got {val_fraction} + {test_fraction}: "
            "nothing would be left to train on"
        )
    source = existing_path(path)
    if pattern != "*" and not source.is_dir():
        raise ValueError(
            f"data.pattern chooses among the files of a folder, and data.path={path!r} is a file: give one"
        )
    try:
        data, num_files = _read_folder(source, pattern) if source.is_dir() else (read_file(source), 1)
        return ByteCorpus.cut(
            source.resolve().name,
            data,
            num_val=round(len(data) * val_fraction),
            num_test=round(len(data) * test_fraction),
            provenance={"source": str(path), "files": num_files},
        )
    except ValueError as error:
        raise ValueError(f"data.path: {error}") from error


def existing_path(path: str) -> Path:
    """Expand ~ and insist that the path is there; what it is, is up to the caller."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise ValueError(f"data.path must name a file or a folder, got {path!r}")
    source = expanded(path)
    if not source.exists():
        raise FileNotFoundError(f"data.path={path!r} does not exist (looked in {Path.cwd()})")
    return source


def expanded(path: str | os.PathLike) -> Path:
    """Expand ~ and ~user; where there is no such user it is a file's name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_file(path: Path) -> np.ndarray:
    """Return the bytes of a raw, .gz or one-member .zip file, decompressed, as a 1-D uint8 array.

    They are read, not mapped: a mapped file that is overwritten while a run trains on it would change its data
    without a word, and one that is cut short would end the process. Raises ValueError for an empty or corrupted file
    and for one that does not fit half of the free memory, naming it.
    """
    limit = _half_of_free_memory()
    try:
        data = _read(path, limit)
    except _TooLargeError as error:
        free = f"{limit:,} bytes, half of the memory that is free"
        raise ValueError(f"{path} {error}, and {free}, is the limit") from error
    if not len(data):
        raise ValueError(f"{path} {'holds no bytes once decompressed' if path.stat().st_size else 'is empty'}")
    return data


def _read(path: Path, limit: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    suffix = path.suffix.lower()
    if suffix not in (".gz", ".zip"):
        if path.stat().st_size > limit:
            raise _TooLargeError(f"has {path.stat().st_size:,} bytes")
        return np.fromfile(path, dtype=np.uint8)
    try:
        content = _unzip(path, limit) if suffix == ".zip" else _gunzip(path, limit)
    except _MembersError as error:
        raise ValueError(f"{path} must hold exactly one file, got {error}") from error
    except DECOMPRESSION_ERRORS as error:
        raise ValueError(f"{path} is not a sound {suffix} file (cut short or corrupted?): {error}") from error
    return np.frombuffer(content, dtype=np.uint8)


class _MembersError(Exception):
    """An archive has another number of files than one; the text says how many, and which."""


class _TooLargeError(Exception):
    """A file has more bytes than the limit; the text says how many."""


def _half_of_free_memory() -> int:
    return psutil.virtual_memory().available // 2


def _inflate(stream: BinaryIO, limit: int) -> bytearray:
    """Reads to the end, but never more than the limit: a few kilobytes can inflate without end."""
    content = bytearray()
    while chunk := stream.read(2**20):
        content += chunk
        if len(content) > limit:
            raise _TooLargeError("inflates to more")
    return content


def _gunzip(path: Path, limit: int) -> bytearray:
    with gzip.open(path) as stream:
        return _inflate(stream, limit)


def list_files(root: Path, keep_folder: Callable[[str], bool], keep_file: Callable[[str], bool]) -> list[str]:
    """List the regular files below `root`, as relative POSIX paths sorted by their bytes, following no links.

    keep_folder and keep_file decide by bare name. Raises OSError for a folder that cannot be read, instead of
    leaving part of a corpus out.
    """
    paths = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = filter(keep_folder, subfolders)
        files = [Path(folder, name) for name in filter(keep_file, names)]
        paths += [path.relative_to(root).as_posix() for path in files if _is_regular(path)]
    return sorted(paths, key=os.fsencode)


def _read_folder(root: Path, pattern: str) -> tuple[np.ndarray, int]:
    paths = list_files(
        root,
        keep_folder=lambda name: not name.startswith("."),
        keep_file=lambda name: not name.startswith(".") and fnmatchcase(name, pattern),
    )
    # The limit is for all of them, and each is added to the others as it is read: never are all there twice.
    limit, content, num_filled = _half_of_free_memory(), bytearray(), 0
    for path in (root / path for path in paths):
        try:
            data = _read(path, limit - len(content))
            content += memoryview(data)
            num_filled += len(data) > 0
        except _TooLargeError as error:
            raise ValueError(
                f"the files of folder {root} that match data.pattern={pattern!r} do not fit {limit:,} bytes, half of "
                f"the memory that is free: {len(content):,} are read, and {path} {error}"
            ) from error
    if not content:
        raise ValueError(f"folder {root} holds no file with content that matches data.pattern={pattern!r}")
    return np.frombuffer(content, dtype=np.uint8), num_filled


def _unzip(path: Path, limit: int) -> bytearray:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            names = [member.filename for member in members[:5]]
            raise _MembersError(f"{len(members)}: {names}")
        with archive.open(members[0]) as stream:
            return _inflate(stream, limit)


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _raise(error: OSError) -> None:
    raise error
