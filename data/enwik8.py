"""enwik8: the first 10**8 bytes of an English Wikipedia dump, cut 90/5/5 MB as all published results do."""

import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pooch

from data.bytes import ByteCorpus
from data.files import existing_path, expanded, read_file

URL = "http://mattmahoney.net/dc/enwik8.zip"
NUM_BYTES = 100_000_000
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"  # of the decompressed bytes
FILE_NAMES = ("enwik8", "enwik8.zip", "enwik8.gz")
HOW_TO_SUPPLY = (
    "Give a copy (enwik8, enwik8.zip or enwik8.gz) by data.path=..., "
    "or train without a download on Python's own source by data=pystdlib"
)

log = logging.getLogger(__name__)


def enwik8(
    path: str | None = None,
    cache_dir: str = "data/cache",
    download: bool = True,
    expected_bytes: int = NUM_BYTES,
    expected_sha256: str | None = SHA256,
    url: str = URL,
) -> ByteCorpus:
    """Find enwik8 or download it, verify the decompressed bytes, and split them 90/5/5 percent.

    path: the raw, .zip or .gz file, or a folder that holds one; None looks in cache_dir, then downloads. Of several in
        a folder the first that is whole is taken.
    cache_dir: where a download is kept, decompressed. Processes that start at once may share it: each
        downloads into a folder of its own, and the finished file is moved into place whole.
    expected_bytes: a shorter head of the file has to be asked for by its size.
    expected_sha256: of the decompressed bytes. None skips the check; it has to be asked for, too.
    url: a .zip file; a mirror can be named here.
    Raises ValueError for bytes that are not the expected ones, FileNotFoundError where there are none, and
    ConnectionError if the download fails.
    """
    _check_expected(expected_bytes, expected_sha256)
    place = expanded(cache_dir) if path is None else existing_path(path)
    found = [place] if place.is_file() else [place / name for name in FILE_NAMES if (place / name).is_file()]
    if found:
        try:
            return _first_whole(found, expected_bytes, expected_sha256)
        except ValueError as error:
            raise ValueError(f"{'data.cache_dir' if path is None else 'data.path'}: {error}") from error
    if path is None and download:
        return _download(url, place, expected_bytes, expected_sha256)
    key = f"data.cache_dir={cache_dir!r}" if path is None else f"data.path={path!r}"
    not_allowed = " and data.download=false" if path is None else ""
    raise FileNotFoundError(f"{key} holds none of {', '.join(FILE_NAMES)}{not_allowed}. {HOW_TO_SUPPLY}")


def _first_whole(files: list[Path], num_bytes: int, sha256: str | None) -> ByteCorpus:
    faults = []
    for path in files:
        try:
            corpus = _verified(read_file(path), str(path), num_bytes, sha256)
        except ValueError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            log.warning("%s is used, for %s", path, fault)
        return corpus
    raise ValueError("; ".join(faults))


def _check_expected(expected_bytes: int, expected_sha256: str | None) -> None:
    if isinstance(expected_bytes, bool) or not isinstance(expected_bytes, int) or expected_bytes < 40:
        raise ValueError(
            f"data.expected_bytes must be an integer of at least 40 (2 bytes in 5 percent), got {expected_bytes!r}"
        )
    if expected_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", str(expected_sha256)):
        raise ValueError(
            f"data.expected_sha256 must be 64 lower-case hexadecimal digits or null, got {expected_sha256!r}"
        )
    if expected_bytes != NUM_BYTES and expected_sha256 == SHA256:
        raise ValueError(
            f"data.expected_sha256 must be null or the hash of the {expected_bytes} bytes that data.expected_bytes "
            f"asks for, got that of the full {NUM_BYTES} bytes"
        )


def _verified(data: np.ndarray, source: str, num_bytes: int, sha256: str | None) -> ByteCorpus:
    """Split the bytes if they are the expected ones: at 0.1-0.3 s to hash 100 MB, no start goes without."""
    if len(data) != num_bytes:
        raise ValueError(
            f"{source} has {len(data)} bytes once decompressed, expected {num_bytes}: it is cut short or "
            "another file. To use a head of enwik8, set data.expected_bytes to its size and data.expected_sha256 to "
            "null or its hash; a text of your own is data=file"
        )
    corpus = ByteCorpus.cut(
        "enwik8", data, num_val=num_bytes // 20, num_test=num_bytes // 20, provenance={"source": source}
    )
    got = corpus.provenance["sha256"]
    if sha256 is not None and got != sha256:
        raise ValueError(f"{source} is corrupted or another file: its bytes have SHA-256 {got}, expected {sha256}")
    # A result on other bytes must not pass for one on enwik8.
    return corpus if got == SHA256 else replace(corpus, name=f"enwik8-custom-{num_bytes}")


def _download(url: str, cache_dir: Path, num_bytes: int, sha256: str | None) -> ByteCorpus:
    if url == URL and num_bytes != NUM_BYTES:
        raise ValueError(
            f"data.expected_bytes must be {NUM_BYTES} to download from {URL}, got {num_bytes}; "
            "give the shorter file by data.path=..."
        )
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Everything unfinished lives in the temporary folder, which goes whatever happens.
        with TemporaryDirectory(prefix="download-", dir=cache_dir) as folder:
            archive, unpacked = Path(folder, "enwik8.zip"), Path(folder, "enwik8")
            pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16)(url, str(archive), None)
            corpus = _verified(read_file(archive), url, num_bytes, sha256)
            np.concatenate([corpus.train, corpus.val, corpus.test]).tofile(unpacked)
            os.replace(unpacked, cache_dir / "enwik8")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        reason = _reason(error)
        raise ConnectionError(f"could not download enwik8 from {url} ({reason}). {HOW_TO_SUPPLY}") from error
    return corpus


def _reason(error: Exception) -> str:
    """What went wrong, without the pool, the retries and the objects in between that requests names."""
    innermost = getattr(error.args[0], "reason", error) if error.args else error
    return re.sub(r"^\w+\(host=.*?\): ", "", str(innermost).split("\n", 1)[0])
