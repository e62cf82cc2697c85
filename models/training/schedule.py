"""The learning rate over a run, as a fraction of its peak: by steps, by training time, or as another run had it."""

import math
from pathlib import Path

from models.training.run_files import RATES_FILE, read_csv

WARM_UP_SHARE = 10  # a short trial run keeps the shape of the schedule: at most a tenth of it is warm-up


class Schedule:
    """A linear warm-up, then the peak, then a cosine or linear decay.

    Args:
        warmup_steps: optimizer steps from 0 to the peak; at most a tenth of the run.
        decay: "cosine" or "linear".
        final_lr_fraction: of the peak, where the decay ends; in [0, 1].
        cooldown_fraction: the share of what follows the warm-up in which the rate decays, at its end; in (0, 1]. Before
            it the rate is at its peak.
        max_steps: the length by steps.
        rates: the file in which a run by time logged its fractions, or its folder, to repeat them; None for the
            schedule that the other arguments describe.
    """

    def __init__(
        self,
        *,
        warmup_steps: int,
        decay: str,
        final_lr_fraction: float,
        cooldown_fraction: float,
        max_steps: int,
        rates: str | None,
    ):
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        if warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be at least 0, got {warmup_steps}")
        if decay not in ("cosine", "linear"):
            raise ValueError(f"optimizer.decay must be cosine or linear, got {decay!r}")
        if not 0 <= final_lr_fraction <= 1:
            raise ValueError(f"optimizer.final_lr_fraction must be in [0, 1], got {final_lr_fraction}")
        if not 0 < cooldown_fraction <= 1:
            raise ValueError(f"optimizer.cooldown_fraction must be above 0 and at most 1, got {cooldown_fraction}")
        self.warmup_steps = min(warmup_steps, max_steps // WARM_UP_SHARE)
        self.decay, self.final_lr_fraction, self.cooldown_fraction = decay, final_lr_fraction, cooldown_fraction
        self.max_steps = max_steps
        self.repeated = None if rates is None else read_rates(rates)
        if self.repeated is not None and len(self.repeated) < max_steps:
            raise ValueError(
                f"optimizer.rates={rates!r} has the rates of {len(self.repeated)} steps: max_steps must be at most "
                f"that, got {max_steps}"
            )

    def fraction(self, step: int) -> float:
        """The learning rate of optimizer step ``step`` (from 0), as a fraction of the peak."""
        if self.repeated is not None:
            return self.repeated[min(step, len(self.repeated) - 1)]  # a scheduler looks one step past the last
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.decayed((step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))

    def decayed(self, progress: float) -> float:
        """The fraction at a share of what follows the warm-up, 0 at the warm-up's end and 1 at the run's."""
        constant = 1 - self.cooldown_fraction
        progress = min(1.0, max(0.0, progress - constant) / self.cooldown_fraction)
        remaining = 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1 - progress
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * remaining


class TimedFractions:
    """A schedule with seconds of training time in place of steps; the warm-up stays one of steps.

    Where the steps are too slow for that, it ends with a tenth of the time, as it would with a tenth of the steps.

    Attributes:
        warmed_up_s: the seconds trained when the warm-up ended; None before that.
    """

    def __init__(self, schedule: Schedule, budget_s: float):
        self.schedule, self.budget_s = schedule, budget_s
        self.warmed_up_s: float | None = None

    def fraction(self, step: int, seconds: float) -> float:
        """Of the optimizer step ``step`` (from 0), which begins after so many seconds of training."""
        if self.warmed_up_s is None:
            by_steps = (step + 1) / (self.schedule.warmup_steps + 1)
            warm = max(by_steps, seconds / (self.budget_s / WARM_UP_SHARE))
            if warm < 1:
                return warm
            self.warmed_up_s = seconds
        left = self.budget_s - self.warmed_up_s
        return self.schedule.decayed((seconds - self.warmed_up_s) / left if left > 0 else 1.0)


def rates_file(source: str | Path) -> Path:
    """The path of a run's rates.csv, given that or its folder."""
    return Path(source) / RATES_FILE if Path(source).is_dir() else Path(source)


def read_rates(source: str | Path) -> list[float]:
    """The fraction of every optimizer step, from the first, that a run by time logged.

    Args:
        source: its rates.csv, or its folder.

    Raises:
        ValueError: there is no such file, or it is not one of these, whole from step 1 on.
    """
    path = rates_file(source)
    if not path.is_file():
        raise ValueError(
            f"optimizer.rates must be null, the {RATES_FILE} of a run with trainer.budget_minutes, or that run's "
            f"folder, got {str(source)!r}, which is no file"
        )
    try:
        rows = [(int(row["step"]), float(row["lr_fraction"])) for row in read_csv(path)]
    except (KeyError, ValueError) as error:
        raise ValueError(f"optimizer.rates: {str(path)!r} is no table of step and lr_fraction: {error}") from error
    if not rows or [step for step, _ in rows] != list(range(1, len(rows) + 1)):
        raise ValueError(f"optimizer.rates: {str(path)!r} must have the steps 1, 2, 3 and so on, each once")
    if not all(0 <= fraction <= 1 for _, fraction in rows):
        raise ValueError(f"optimizer.rates: {str(path)!r} has an lr_fraction outside [0, 1]")
    return [fraction for _, fraction in rows]
