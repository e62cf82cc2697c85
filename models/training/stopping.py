"""SIGTERM and SIGINT: a flag in the handler, a checkpoint and an orderly end at the next step, on all ranks alike."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed

from models.training.started import SIGNALS

# A step may take minutes: that the signal was heard is said at once.
NOTED = {
    signal.SIGTERM: b"\nSIGTERM: the run ends when this step is finished and kept\n",
    signal.SIGINT: b"\nCtrl-C: the run ends when this step is finished and kept; once more ends it at once\n",
}


class Interrupted(Exception):
    """Training stopped at a step because of a signal, its checkpoint written."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name} at step {step}")
        self.signum, self.step = signum, step


class Stopping:
    """What the signals' handler notes, and how ranks come to one mind about it.

    While training runs, the first signal is only noted; outside of it, it ends the process at once: SIGTERM as
    SystemExit, SIGINT as KeyboardInterrupt. A second SIGINT always does: who presses Ctrl-C twice will not wait.

    Args:
        follows: another process started this one, and decides about the run's end: signals are noted, whenever.
    """

    def __init__(self, *, follows: bool = False) -> None:
        self.signal: int | None = None
        self._follows = follows
        self._training = False
        self._group: torch.distributed.ProcessGroup | None = None

    def begin(self, world_size: int) -> None:
        """Training begins: signals are noted from here on."""
        self._training = True
        if world_size > 1 and self._group is None:
            # Gloo, whatever the gradients go by: its sums are the CPU's, and no GPU is waited for.
            self._group = torch.distributed.new_group(backend="gloo")

    def end(self) -> None:
        """Training is over."""
        self._training = False

    def agree(self, wish: bool) -> tuple[bool, bool]:
        """Whether any rank got a signal, and whether any has the wish. Called by all ranks, at the same step."""
        if self._group is None:
            return self.signal is not None, wish
        state = torch.tensor([self.signal or 0, int(wish)])
        torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MAX, group=self._group)
        if state[0]:
            self.signal = int(state[0])
        return bool(state[0]), bool(state[1])

    def largest(self, value: float) -> float:
        """The largest of all ranks' values. Called by all of them, at the same step."""
        if self._group is None:
            return value
        values = torch.tensor([value], dtype=torch.float64)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group)
        return values.item()

    def _take_over(self) -> None:
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self._follows or (self._training and (self.signal is None or signum == signal.SIGTERM)):
            if self.signal is None and not self._follows:
                os.write(2, NOTED[signum])  # not by logging, in whose midst this may be
            self.signal = self.signal or signum
            return
        self.signal = signum
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)


@contextmanager
def stopping(*, follows: bool) -> Iterator[Stopping]:
    """Handles the signals until the end of the block, then as before; elsewhere than in the main thread, not at all."""
    state = Stopping(follows=follows)
    try:
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        state._take_over()
    except ValueError:  # not the main thread
        before = {}
    try:
        yield state
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def exit_code(stopped: BaseException) -> int:
    """128 + the signal, as a shell has it."""
    if isinstance(stopped, Interrupted):
        return 128 + stopped.signum
    if isinstance(stopped, KeyboardInterrupt) or isinstance(stopped.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT
    code = getattr(stopped, "code", None)
    return code or 128 + signal.SIGTERM
