"""Runs that differ in nothing but their seed, as one arm of a comparison: mean, standard deviation, n."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conf.schema import COPIES, GROUPS, shown, values_of
from models.training import metrics
from models.training.identity import (
    BY_BYTES,
    HASH,
    INCIDENTAL,
    RESUMED_WITH,
    flat,
    is_hash,
    is_one_of,
    is_said_above,
    resumed_with,
)
from models.training.report import Results

PRECISION = "trainer.precision"
ALWAYS_TOLD = (*COPIES, RESUMED_WITH)


@dataclass(frozen=True)
class Arm:
    """What was run with one configuration and several seeds.

    Attributes:
        settings: the configuration: of a group that names an option, that option, and every other key.
        runs: its runs, also those that did not finish.
        seeds: theirs.
    """

    settings: dict[str, Any]
    runs: tuple[Results, ...]
    seeds: tuple[Any, ...]

    @property
    def by_seed(self) -> dict[Any, Results]:
        """The runs whose numbers count: of each seed the one that finished, and of several the last that started."""
        pairs = [(seed, run) for seed, run in zip(self.seeds, self.runs, strict=True) if run.status == "finished"]
        return dict(sorted(pairs, key=lambda pair: pair[1].record.get("started") or ""))

    @property
    def finished(self) -> list[Results]:
        """Those runs."""
        return list(self.by_seed.values())

    @property
    def repeated(self) -> list[Results]:
        """Runs that finished and do not count, because one of the same seed finished that started later."""
        counted = {id(run) for run in self.finished}
        return [run for run in self.runs if run.status == "finished" and id(run) not in counted]

    def values_by_seed(self, number: str) -> dict[Any, float]:
        """What stands under a heading of the numbers that are compared, of every run that counts and has it."""
        found = {seed: run.number(number) for seed, run in self.by_seed.items()}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}

    def values(self, number: str) -> list[float]:
        """The same without the seeds."""
        return list(self.values_by_seed(number).values())

    def mean(self, number: str) -> float | None:
        """Their mean, or None where there are none."""
        values = self.values(number)
        return statistics.mean(values) if values else None

    def cell(self, number: str) -> str:
        """Mean and, of two seeds or more, the sample standard deviation."""
        values, form = self.values(number), metrics.form_of(number)
        if not values:
            return "-"
        mean = form.format(statistics.mean(values))
        return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"

    def ends(self) -> str:
        """How many runs count, and how the others ended: ``2, 1 diverged``."""
        others = [run.status for run in self.runs if run.status != "finished"]
        return ", ".join([str(len(self.finished)), *(f"{others.count(end)} {end}" for end in dict.fromkeys(others))])

    def share(self) -> str:
        """How many runs count, in short: ``2``, or ``2 of 3`` where others did not finish."""
        others = sum(run.status != "finished" for run in self.runs)
        return f"{len(self.finished)} of {len(self.finished) + others}" if others else str(len(self.finished))


def arms_of(runs: Sequence[Results]) -> list[Arm]:
    """The runs by configuration, in the order in which the first of each stands. Each run without one is its own.

    The corpus is no setting: whether runs are of one, and of the same splits of it, tells the record of its bytes, see
    ``comparisons_of``, and neither its name nor how it was read.
    """
    arms: dict[Any, Arm] = {}
    precisions = [run.precision for run in runs if run.precision is not None]
    usual = max(precisions, key=precisions.count) if precisions else None
    hashes = _hashes_by_path(runs)
    for run in runs:
        config = flat(run.configuration or {"run": run.name})
        settings = _settings(run, config, hashes)
        if run.configuration is not None:  # null is float32 on a CPU; a run that logged nothing is as most are
            settings[PRECISION] = run.precision or usual
        key = tuple(sorted((name, repr(value)) for name, value in settings.items()))
        before = arms.get(key, Arm(settings, (), ()))
        arms[key] = Arm(before.settings, (*before.runs, run), (*before.seeds, config.get("seed")))
    return list(arms.values())


class _File(str):
    """A file that a run began with: shown by its path, told apart by the hash of its bytes."""

    def __new__(cls, path: str, identity: str):
        text = super().__new__(cls, f"{path} ({identity.removeprefix(HASH)[:8]})")
        text.path, text.identity = path, identity
        return text

    def __repr__(self) -> str:
        return self.identity


def _hash_of(run: Results, key: str) -> str | None:
    identity = run.record.get("identity")
    value = identity.get(key) if isinstance(identity, dict) else None
    return value if is_hash(value) else None


def _hashes_by_path(runs: Sequence[Results]) -> dict[tuple[str, Any], str]:
    """The hash of what stood under each key and path, where the runs know one alone: others recorded the path only."""
    found: dict[tuple[str, Any], set[str]] = {}
    for run in runs:
        config = flat(run.configuration or {})
        for key in BY_BYTES:
            if digest := _hash_of(run, key):
                found.setdefault((key, config.get(key)), set()).add(digest)
    return {place: hashes.pop() for place, hashes in found.items() if len(hashes) == 1}


def _settings(run: Results, config: dict[str, Any], hashes: dict[tuple[str, Any], str]) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in config.items()
        if key != "seed"
        and not key.startswith("data.")
        and not is_said_above(config, key)
        and not is_one_of(key, INCIDENTAL)
        and not key.endswith(".kind")
    }
    for key in BY_BYTES:
        if kept.get(key) is not None and (found := _hash_of(run, key) or hashes.get((key, kept[key]))):
            kept[key] = _File(kept[key], found)
    choices = run.record.get("choices") or {}
    options = {group: choices[group] for group in GROUPS if choices.get(group) and group not in ("logger", "data")}
    changed = "; ".join(map(_change, resumed_with(run.record)))
    return {
        **options,
        **kept,
        **({RESUMED_WITH: changed} if changed else {}),
    }


def _change(entry: dict[str, Any]) -> str:
    values = (f"{key} {before} to {now}" for key, (before, now) in entry["changed"].items())
    return f"at step {entry['step']} {', '.join(values)}"


def differing(arms: Sequence[Arm]) -> list[str]:
    """The settings that tell the arms apart: those with several values among the arms that have them.

    Of an option's own keys, as attention.scale, those with several values among the arms of one option, or with a value
    that is not the option's own, as its file in conf/ has it: otherwise the option says it. Where these settings leave
    two arms alike, keys that only one of the two has are among them. What few runs have, and no option says, is always
    among them: a copy with a value of its own, and changes on the way.
    """
    values: dict[str, dict[Any, set[str]]] = {}  # of each key by the option that it belongs to
    given: set[str] = set()
    for arm in arms:
        for key, value in arm.settings.items():
            option = arm.settings.get(key.partition(".")[0]) if "." in key else None
            values.setdefault(key, {}).setdefault(repr(option), set()).add(repr(value))
            if not option_says(arm, key):
                given.add(key)
    found = [
        key
        for key, seen in values.items()
        if key in ALWAYS_TOLD
        or any(len(texts) > 1 for texts in seen.values())
        or (key in given and len(set().union(*seen.values())) > 1)
    ]
    alike: dict[tuple, list[Arm]] = {}
    for arm in arms:
        alike.setdefault(tuple(repr(arm.settings.get(key)) for key in found), []).append(arm)
    lacking = {
        key
        for same in alike.values()
        for arm in same
        for key in values
        if (key in arm.settings) != (key in same[0].settings)
    }
    return [key for key in values if key in found or key in lacking]


def option_says(arm: Arm, key: str) -> bool:
    """Whether the arm's value of a key is what its option's file in conf/ has."""
    group, _, name = key.partition(".")
    own = values_of(group, str(arm.settings.get(group))) if group in GROUPS else {}
    return name in own and own[name] == arm.settings[key]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are set to the right."""
    rule = ["---:" if all(_is_number(row[index]) for row in rows) else "---" for index in range(len(headings))]
    lines = [headings, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _is_number(cell: str) -> bool:
    return cell.strip("*-+")[:1].isdigit() or cell in ("", "-")


def setting(arm: Arm, key: str) -> str:
    """The arm's value of a setting as it is shown, - where it has none: true, false and null as train.py takes them."""
    value = arm.settings.get(key, "-")
    if value is None or isinstance(value, bool):
        return shown(value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def label(arm: Arm, keys: Sequence[str]) -> str:
    """The arm's name in a plot: its values of the settings that differ, groups' options without their key."""
    return " ".join(
        setting(arm, key) if key in GROUPS else f"{key.split('.')[-1]}={setting(arm, key)}"
        for key in keys
        if key in arm.settings
    )
