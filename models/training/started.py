"""What a process does first that the first process of a run has started. Imports nothing that takes time."""

import ctypes
import os
import signal
import sys

# Set by the first process of a run for those that it starts, which join its folder.
RUN_VARIABLE = "FLASH_COSINE_SIM_RUN"
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


def follow_the_first() -> None:
    """In a process that another started: ends with that one, and leaves signals to it until training begins.

    A Ctrl-C reaches all processes of a terminal. Had this one ended by it while it imports its modules, Lightning
    would kill the first process, too, which is about to end in order.
    """
    if RUN_VARIABLE not in os.environ:
        return
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
