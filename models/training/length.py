"""How long a run trains."""

import math


class Length:
    """So many optimizer steps, or as many as a budget of training time allows, whichever ends first.

    Attributes:
        max_steps: the most optimizer steps.
        budget_s: seconds of training, or None.
        seconds: those trained so far, over all starts of the run and on all ranks the same; counted with a budget only.
    """

    def __init__(self, max_steps: int, budget_minutes: float | None = None, *, seconds: float = 0.0):
        self.max_steps = max_steps
        self.budget_s = None if budget_minutes is None else 60 * budget_minutes
        self.seconds = seconds

    def is_reached(self, step: int) -> bool:
        """Whether the run is over after so many steps."""
        return step >= self.max_steps or (self.budget_s is not None and self.seconds >= self.budget_s)

    def steps_left(self, step: int, step_seconds: float) -> int:
        """How many steps follow after so many, each of some seconds of training."""
        left = self.max_steps - step
        if self.budget_s is not None:
            left = min(left, math.ceil(max(0.0, self.budget_s - self.seconds) / step_seconds))
        return left

    def place(self, step: int) -> str:
        """Where the run is after so many steps, in words."""
        if self.budget_s is None:
            return f"step {step} of {self.max_steps}"
        return f"step {step}, {self.seconds / 60:.2f} of {self.budget_s / 60:g} min"

    def share(self, step: int) -> tuple[float, float, str]:
        """What of the run is done, of how much, and both in a few letters, for a progress bar."""
        if self.budget_s is None:
            return step, self.max_steps, f"{step}/{self.max_steps}"
        return self.seconds, self.budget_s, f"{step} steps, {self.seconds:.0f}/{self.budget_s:.0f} s"
