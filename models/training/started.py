"""How the first process of a run starts the others, and what these do first. Imports nothing that takes time."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

# Set by the first process of a run for those that it starts, which join its folder.
RUN_VARIABLE = "FLASH_COSINE_SIM_RUN"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Signals wait for the end of the block; for a process that is started in it, until it follows the first."""
    if sys.platform == "win32":  # has no such mask
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_on_interrupt() -> None:
    """From here on a Ctrl-C ends the process, in one line: a KeyboardInterrupt would show the inside of an import."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """From here on a Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signum: int, _frame: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(128 + signum)


def follow_the_first() -> None:
    """In a process that another started: ends with that one, and leaves signals to it until training begins.

    A Ctrl-C reaches all processes of a terminal. Had this one ended by it while it imports its modules, Lightning
    would kill the first process, too, which is about to end in order.
    """
    if RUN_VARIABLE not in os.environ:
        return
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see signals_wait
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
