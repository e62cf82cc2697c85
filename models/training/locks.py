"""Locks between the processes of one machine: each ends with its process, however that ends."""

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass
class Lock:
    """An exclusive lock on a file, held until ``release`` or the end of the process."""

    path: Path
    _file: IO[str]

    def release(self) -> None:
        """Gives it free, and removes the file."""
        if not self._file.closed:
            self.path.unlink(missing_ok=True)  # while it is held: see try_lock
            self._file.close()


def try_lock(path: Path, what: str) -> Lock | None:
    """The lock on a file, which is made where there is none; None if it is held, be it in this very process.

    Args:
        path: the file, in a folder that is there.
        what: what it is held for, which ``holder`` tells others.
    """
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        if _is_at(path, file):
            break
        file.close()  # its last holder removed it in between: whoever comes next locks another file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, {what}")
    file.flush()
    return Lock(path, file)


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def holder(path: Path) -> str:
    """Who holds the lock and what for, for messages."""
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"
