"""What a person sees of a run under way: how long it will take, and a line now and then or, in a terminal, a bar."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

import lightning
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from models.training.devices import wait_for
from models.training.length import Length
from models.training.metrics import bar_texts
from models.training.module import GPTModule

log = logging.getLogger(__name__)

LINE_SECONDS = 30.0  # between lines without a terminal
ESTIMATE_SECONDS = 3.0  # of training before the first estimate, and at least one micro-batch after the first
BAR_SECONDS = 0.25  # between changes of the bar
LONG_ON_A_CPU_SECONDS = 3600.0  # what is estimated to take longer there is answered with what to do instead


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.4 hours, 5.1 days."""
    for unit, size, form in (("days", 86400, ".1f"), ("hours", 3600, ".1f"), ("min", 60, ".0f")):
        if seconds >= (2 if size > 60 else 1.5) * size:
            return f"{seconds / size:{form}} {unit}"
    return f"{seconds:.0f} s"


class ProgressReport(lightning.Callback):
    """Says how long the run will take, as soon as that can be told, and then where it is. On the first process only.

    Args:
        length: of the run.
        tokens_per_step: bytes a step.
        val_every: steps between validations.
        val_tokens: bytes that a validation scores.
        bar: draw a bar instead of writing lines; log lines then appear above it.
    """

    def __init__(self, *, length: Length, tokens_per_step: int, val_every: int, val_tokens: int, bar: bool):
        self.length = length
        self.tokens_per_step = tokens_per_step
        self.val_every = val_every
        self.val_tokens = val_tokens
        self.bar = bar
        self._open = ExitStack()  # the bar, while it is drawn
        self._task: tuple[Progress, Any] | None = None
        self._said_at = self._drawn_at = 0.0
        self._step, self._part = -1, 0  # finished steps, and micro-batches of the next one
        self._warm = self._estimated = False
        # Training since the last estimate, without validations: micro-batches, and seconds up to _running_since.
        self._batches, self._seconds = 0, 0.0
        self._running_since: float | None = None
        self._batch_seconds: float | None = None  # a micro-batch, by the last estimate
        self._val_seconds: float | None = None  # the last validation, with its sample and checkpoint
        self._val_since: float | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        del module
        self._said_at, self._step = time.monotonic(), trainer.global_step
        if self.bar and trainer.is_global_zero:
            self._task = self._open.enter_context(_drawn_bar(*self.length.share(trainer.global_step)))

    def on_train_batch_start(self, *_: Any) -> None:
        now = time.monotonic()
        if self._val_since is not None:
            self._val_seconds, self._val_since = now - self._val_since, None
        if self._warm and self._running_since is None:
            self._running_since = now

    def on_train_batch_end(self, trainer: lightning.Trainer, module: GPTModule, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._part = self._part + 1 if trainer.global_step == self._step else 0
        self._step = trainer.global_step
        if self._warm:
            self._batches += 1
        else:  # the first one compiles, and loads what is used for the first time
            wait_for(module.device)
            self._warm, self._running_since = True, time.monotonic()
        now = time.monotonic()
        if not self._estimated and self._batches and self._training_seconds(now) >= ESTIMATE_SECONDS:
            self._first_estimate(trainer, module)
        if self._task is not None:
            if now - self._drawn_at >= BAR_SECONDS or self.length.is_reached(trainer.global_step):
                self._draw(trainer, now)
        elif now - self._said_at >= LINE_SECONDS:
            self._say(trainer, module)

    def on_validation_start(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            if self._running_since is not None:
                wait_for(module.device)
                self._seconds = self._training_seconds(time.monotonic())
            self._running_since, self._val_since = None, time.monotonic()

    def on_validation_batch_end(self, trainer: lightning.Trainer, module: GPTModule, *arguments: Any) -> None:
        del module
        _, _, index, *_ = arguments
        self._scoring(trainer, "validation", index, trainer.num_val_batches)

    def on_test_batch_end(self, trainer: lightning.Trainer, module: GPTModule, *arguments: Any) -> None:
        del module
        _, _, index, *_ = arguments
        self._scoring(trainer, "test", index, trainer.num_test_batches)

    def on_train_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._close()

    def _close(self) -> None:
        self._task = None
        self._open.close()

    def _training_seconds(self, now: float) -> float:
        return self._seconds + (0.0 if self._running_since is None else now - self._running_since)

    def _measure(self, module: GPTModule) -> None:
        """Takes the speed since the last time, and begins the next interval. Waits for the device."""
        if self._batches:
            wait_for(module.device)
            now = time.monotonic()
            self._batch_seconds = self._training_seconds(now) / self._batches
            self._batches, self._seconds = 0, 0.0
            self._running_since = now if self._running_since is not None else None

    def _first_estimate(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        self._measure(module)
        self._estimated = True
        seconds = self._seconds_left(trainer)
        steps = self._steps_left(trainer)
        if module.device.type == "cpu" and seconds >= LONG_ON_A_CPU_SECONDS:
            log.warning(
                "on this CPU the %s steps that are left will take about %.0f hours: use a GPU, or a size for a CPU: "
                "model=tiny seq_len=256 tokens_per_step=2048, as in experiment=quickstart, which takes minutes",
                f"{steps:,}", seconds / 3600,
            )  # fmt: skip
        elif steps:
            log.info("about %s for %s steps, at %s tokens/s", duration(seconds), f"{steps:,}", self._rate(trainer))

    def _rate(self, trainer: lightning.Trainer) -> str:
        per_batch = self.tokens_per_step / trainer.accumulate_grad_batches
        return f"{per_batch / self._batch_seconds:,.0f}" if self._batch_seconds else "?"

    def _steps_left(self, trainer: lightning.Trainer) -> int:
        step_seconds = self._batch_seconds * trainer.accumulate_grad_batches
        return self.length.steps_left(trainer.global_step, step_seconds)

    def _seconds_left(self, trainer: lightning.Trainer) -> float:
        per_step, steps = trainer.accumulate_grad_batches, self._steps_left(trainer)
        batches = steps * per_step - self._part
        validations = math.ceil((trainer.global_step + steps) / self.val_every) - trainer.global_step // self.val_every
        one = self._val_seconds
        if one is None:  # a forward pass is a third of a training step's work
            one = self._batch_seconds * per_step * self.val_tokens / self.tokens_per_step / 3
        return batches * self._batch_seconds + validations * one

    def _left(self, trainer: lightning.Trainer) -> str:
        return f"{duration(self._seconds_left(trainer))} left" if self._batch_seconds else "time left not known yet"

    def _say(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        self._measure(module)
        loss = module.recent_loss() / math.log(2)
        if math.isnan(loss):  # logged at this very step
            loss = float(trainer.callback_metrics.get("train/bpc", math.nan))
        log.info(
            "%s%s: train %.4f bits per byte, %s tokens/s, %s",
            self.length.place(trainer.global_step),
            f" and {self._part} of {trainer.accumulate_grad_batches} micro-batches" if self._part else "",
            loss,
            self._rate(trainer),
            self._left(trainer),
        )
        self._said_at = time.monotonic()

    def _scoring(self, trainer: lightning.Trainer, what: str, index: int, batches: list[int]) -> None:
        now = time.monotonic()
        if not trainer.is_global_zero:
            return
        if self._task is not None:
            if now - self._drawn_at >= BAR_SECONDS:
                self._draw(trainer, now, f"{what} {index + 1}/{sum(batches)}")
        elif now - self._said_at >= LINE_SECONDS:
            place = (self.length.place(trainer.global_step), what, index + 1, sum(batches))
            log.info("%s: %s, batch %d of %d", *place)
            self._said_at = now

    def _draw(self, trainer: lightning.Trainer, now: float, instead: str | None = None) -> None:
        self._drawn_at = now
        if self._estimated and self._batches:
            seconds = self._training_seconds(now)
            # Never waits: a GPU may be behind, by less and less the longer this interval is.
            self._batch_seconds = seconds / self._batches if seconds > LINE_SECONDS else self._batch_seconds
        texts = bar_texts(trainer.callback_metrics)
        texts += [f"{self._rate(trainer)} tokens/s", self._left(trainer)] if self._batch_seconds else []
        progress, task = self._task
        done, _, place = self.length.share(trainer.global_step)
        progress.update(task, completed=done, place=place, said=instead or "  ".join(texts))


@contextmanager
def _drawn_bar(completed: float, total: float, place: str) -> Iterator[tuple[Progress, Any]]:
    """A bar on stdout, and log lines above it."""
    console = Console()
    columns = (
        BarColumn(bar_width=max(5, min(40, console.width - 60))),
        TextColumn("{task.fields[place]}"),
        TextColumn("{task.fields[said]}"),
    )
    streams = (sys.stdout, sys.stderr)
    with (
        Progress(*columns, console=console, refresh_per_second=4, transient=True) as progress,
        _logged_above(console, streams),
    ):
        yield progress, progress.add_task("training", completed=completed, total=total, place=place, said="")


@contextmanager
def _logged_above(console: Console, streams: tuple[TextIO, ...]) -> Iterator[None]:
    """Whatever logs to one of the streams goes through the console, which knows where its bar is."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    moved = {
        handler: handler.setStream(_Above(console))
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams
    }
    try:
        yield
    finally:
        for handler, stream in moved.items():
            handler.setStream(stream)


class _Above:
    """A stream that prints whole lines with a console; they are as long as they are, so that paths can be copied."""

    def __init__(self, console: Console):
        self.console = console
        self._line = ""

    def write(self, text: str) -> int:
        """Prints what is complete."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self.console.print(Text(line), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        """Nothing: lines are printed when they end."""
