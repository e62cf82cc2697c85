"""Which runs may be compared, which arm is the best of them, and how far each is from a baseline."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from conf.schema import shown
from models.training.identity import resumed_with
from models.training.report import Results
from scripts.arms import Arm, arms_of, differing, label, option_says, setting

CORPUS = "corpus"  # the term of a comparison that is a hash, and shown by a name
LOSS = "val bpc"  # the heading of the number by which arms are ranked
RATE = "lr"
DIFFERENCE = "difference"  # of the loss, to a baseline
FURTHER = ("tokens/s", "peak GiB")  # headings of numbers beside the loss


@dataclass(frozen=True)
class Comparison:
    """Runs whose bits per byte mean the same: of one corpus, of the same of its bytes, after as many bytes of training.

    Attributes:
        terms: these, None where no run recorded it; the corpus is the SHA-256 of its bytes, whatever their file's name.
        arms: the runs by configuration, sorted by the settings that differ.
    """

    terms: dict[str, Any]
    arms: tuple[Arm, ...]

    @property
    def runs(self) -> list[Results]:
        """Those of all arms."""
        return [run for arm in self.arms for run in arm.runs]

    @property
    def keys(self) -> list[str]:
        """The settings that tell the arms apart."""
        return differing(self.arms)


def comparisons_of(runs: Sequence[Results]) -> list[Comparison]:
    """The runs in as many comparisons as they need, the one of most runs first.

    A run that ended before it recorded what it was about joins the one comparison that its record does not contradict.
    One that has no configuration and did not finish is in none.
    """
    terms = [(run, _terms(run)) for run in runs if run.status == "finished" or run.configured("seed") is not None]
    known = _unique(found for _, found in terms)
    # those that no other run's record adds to: a corpus of one's own may never record some of the terms
    whole = [one for one in known if not any(one != other and _agree(one, other) for other in known)]
    groups: list[tuple[dict[str, Any], list[Results]]] = []
    for run, found in terms:
        fitting = [other for other in whole if _agree(found, other)]
        chosen = fitting[0] if len(fitting) == 1 else found
        for other, members in groups:
            if other == chosen:
                members.append(run)
                break
        else:
            groups.append((chosen, [run]))
    groups.sort(key=lambda group: -len(group[1]))  # a stable sort: of as many runs, the first
    return [Comparison(chosen, tuple(_sorted(arms_of(members)))) for chosen, members in groups]


def _terms(run: Results) -> dict[str, Any]:
    corpus = run.record.get("corpus") or {}
    per_step = run.record.get("tokens_per_step") or run.configured("tokens_per_step")
    steps, minutes = run.configured("max_steps"), run.configured("trainer.budget_minutes")
    trained_on = _trained_on(run, steps, per_step) if steps and per_step else None
    return {
        CORPUS: corpus.get("sha256"),
        # the hash is that of the whole: where the training split ends, the bytes that are validated begin
        "bytes of the training split": corpus.get("train_bytes"),
        "validated bytes": corpus.get("val_scored"),
        # runs by time make as many steps as they can: what they share is the time
        "bytes trained on": trained_on if minutes is None else f"those of {minutes:g} minutes",
    }


def _trained_on(run: Results, steps: int, per_step: int) -> int:
    """The bytes of the run's steps: of per_step each after the last change on the way, before it of as many as then."""
    trained_on = 0
    for entry in reversed(resumed_with(run.record)):
        before, _ = entry["changed"].get("tokens_per_step", (None, None))
        if isinstance(before, int):
            trained_on += (steps - entry["step"]) * per_step
            seq_len = run.configured("seq_len") or 1
            steps, per_step = entry["step"], before // seq_len * seq_len  # as many whole windows as fit
    return trained_on + steps * per_step


def _unique(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({tuple(terms.values()): terms for terms in found}.values())


def _agree(found: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(value in (None, other[term]) for term, value in found.items())


def _sorted(arms: list[Arm]) -> list[Arm]:
    keys = differing(arms)
    return sorted(arms, key=lambda arm: [order(arm.settings.get(key)) for key in keys])


def order(value: Any) -> tuple[bool, bool, Any]:
    """By which values of one setting are sorted: none first, numbers, words."""
    words = not is_number(value)
    return value is not None, words, str(value) if words else value


def is_number(value: Any) -> bool:
    """Whether a setting is one; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def titles(comparisons: Sequence[Comparison]) -> list[str]:
    """For each, the terms in which it differs from the others; empty texts for a lone one."""
    terms = comparisons[0].terms if comparisons else {}
    names = [term for term in terms if len({one.terms[term] for one in comparisons}) > 1]
    return [", ".join(f"{term}: {_readable(one, term)}" for term in names) for one in comparisons]


def _readable(one: Comparison, term: str) -> str:
    value = one.terms[term]
    if value is None:
        return "unknown"
    if term == CORPUS:
        corpora = (run.record.get("corpus") or {} for run in one.runs)
        name = next(corpus.get("name") for corpus in corpora if corpus.get("sha256") == value)
        return f"{name} (SHA-256 {value[:8]})"
    return f"{value:,}" if isinstance(value, int) else str(value)


def best_of(arms: Sequence[Arm]) -> list[Arm]:
    """The arm of the lowest mean loss of each seq_len; none of a seq_len where only one arm has a loss.

    A longer context makes bytes easier to predict, so that the best of all would be the best of the longest.
    """
    by_length: dict[Any, list[tuple[float, Arm]]] = {}
    for arm in arms:
        mean = arm.mean(LOSS)
        if mean is not None:
            by_length.setdefault(arm.settings.get("seq_len"), []).append((mean, arm))
    return [min(found, key=lambda pair: pair[0])[1] for found in by_length.values() if len(found) > 1]


def at_best_rates(arms: Sequence[Arm]) -> list[tuple[Arm, int]]:
    """Of arms that differ in their learning rate alone the best by ``rank``, and how many they are, with and without a
    loss; nothing of those of which none has one.

    Empty where no two arms differ in their learning rate alone.
    """
    groups: dict[tuple, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(_others(arm, RATE), []).append(arm)
    if all(len(group) == 1 for group in groups.values()):
        return []
    best = [(min(group, key=rank), len(group)) for group in groups.values()]
    return [(arm, rates) for arm, rates in best if arm.values(LOSS)]


def rank(arm: Arm) -> tuple[int, float]:
    """Sorts arms that differ in their learning rate alone, the best first: that of the lowest mean loss, of those of
    which most seeds have one. A single seed's best is often luck, and so is a rate at which the other seeds diverged.
    """
    losses = arm.values(LOSS)
    return -len(losses), statistics.mean(losses) if losses else math.inf


def _others(arm: Arm, key: str) -> tuple:
    """The arm's settings but for one."""
    return tuple(sorted((name, repr(value)) for name, value in arm.settings.items() if name != key))


def _alike(arm: Arm, other: Arm, keys: Sequence[str]) -> bool:
    """Whether two arms differ in nothing but some keys, and in what the options that these name bring along: keys that
    only one of the two has, and of those of both the values of conf/. What was given beside the options must be equal.
    """
    return all(
        name in keys or _same_setting(arm, other, name, any(name.startswith(f"{key}.") for key in keys))
        for name in {**arm.settings, **other.settings}
    )


def _same_setting(arm: Arm, other: Arm, name: str, below: bool) -> bool:
    if name not in arm.settings or name not in other.settings:
        return below
    if repr(arm.settings[name]) == repr(other.settings[name]):
        return True
    return below and option_says(arm, name) and option_says(other, name)


@dataclass(frozen=True)
class Baseline:
    """What arms are compared with: the arm of a run, or for each arm the one that differs from it in one key alone.

    Attributes:
        text: as it was given, a run's name or KEY=VALUE.
        key, value: of KEY=VALUE.
    """

    text: str
    key: str | None = None
    value: str | None = None

    def of(self, arm: Arm, arms: Sequence[Arm], *, but: Sequence[str] = ()) -> Arm | None:
        """The arm's baseline among arms, itself if it is one; None where there is none, or more than one.

        Args:
            but: further keys that it may differ in.
        """
        if self.key is None:
            found = [other for other in arms if self.text in (run.name for run in other.runs)]
        elif self._fits(arm):
            found = [arm]
        else:
            found = [other for other in arms if self._fits(other) and _alike(arm, other, (self.key, *but))]
        return found[0] if len(found) == 1 else None

    def _fits(self, arm: Arm) -> bool:
        return self.key in arm.settings and _same(arm.settings[self.key], str(self.value))


def _same(value: Any, text: str) -> bool:
    if value is None or isinstance(value, bool):
        return text in (shown(value), str(value))
    if not is_number(value):
        return text in (str(value), getattr(value, "path", None))  # of a file, see arms.py, its path will do
    try:
        return float(text) == value
    except ValueError:
        return False


def baseline_of(text: str, comparisons: Sequence[Comparison]) -> Baseline:
    """The baseline that a text names. Raises ValueError if no run is of it."""
    runs = [run.name for one in comparisons for run in one.runs]
    if text in runs:
        return Baseline(text)
    arms = [arm for one in comparisons for arm in one.arms]
    key, is_pair, value = text.partition("=")
    baseline = Baseline(text, key, value)
    if is_pair and any(baseline._fits(arm) for arm in arms):
        return baseline
    values = {key: dict.fromkeys(setting(arm, key) for arm in arms if key in arm.settings) for key in differing(arms)}
    if is_pair and key in values:
        accepted = f"of {key} these runs have {', '.join(values[key])}"
    else:
        pairs = "; ".join(f"{key}={'|'.join(found)}" for key, found in values.items())
        accepted = (
            f"accepted: {pairs or 'no KEY=VALUE, for these runs differ in nothing but their seed'}; or a run's name"
        )
    raise ValueError(f"--baseline must be a run's name or a KEY=VALUE that runs have, got {text!r}; {accepted}")


@dataclass(frozen=True)
class Difference:
    """The loss of one arm minus that of another.

    Attributes:
        mean: over the seeds that both have; or, where they share fewer than two, the difference of the arms' means.
        deviation: the sample standard deviation of the seeds' differences; or the root of the sum of both arms'
            variances; None where there are too few runs for either.
        n: how many seeds that is; or of each arm how many.
    """

    mean: float
    deviation: float | None
    n: tuple[int, ...]

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.4f}"
        return f"{self.mean:+.4f}{spread} ({', '.join(map(str, self.n))})"


def difference(arm: Arm, baseline: Arm) -> Difference | None:
    """Of the arm's loss to the baseline's; None where one of them has none.

    Runs of one seed have read the same windows of the text, so that what these do to both cancels.
    """
    ours, theirs = arm.values_by_seed(LOSS), baseline.values_by_seed(LOSS)
    shared = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(shared) > 1:
        return Difference(statistics.mean(shared), statistics.stdev(shared), (len(shared),))
    if not ours or not theirs:
        return None
    mean = statistics.mean(ours.values()) - statistics.mean(theirs.values())
    if len(ours) == len(theirs) == len(shared):
        return Difference(mean, None, (1,))
    variances = [statistics.variance(losses.values()) for losses in (ours, theirs) if len(losses) > 1]
    deviation = math.sqrt(sum(variances)) if len(variances) == 2 else None
    return Difference(mean, deviation, (len(ours), len(theirs)))


def counts(runs: Sequence[Results]) -> str:
    """How many runs there are and how they ended: ``5 runs: 4 finished, 1 diverged``."""
    ends = Counter(sorted((run.status for run in runs), key=lambda end: (end != "finished", end)))
    return f"{len(runs)} run{'s' * (len(runs) != 1)}: " + ", ".join(f"{n} {end}" for end, n in ends.items())


def name_of(arm: Arm, keys: Sequence[str]) -> str:
    """The arm's name in plots and legends: its settings that differ, or the run's name where none does."""
    return label(arm, keys) or (arm.runs[0].name if len(arm.runs) == 1 else "all runs")
