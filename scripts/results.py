"""The tables of README.md and docs/results/, made from the raw files beside them.

    python -m scripts.results            # checks that every table in the documents is what the raw files say
    python -m scripts.results --write    # writes them anew

A table stands between two comments: ``<!-- table NAME ARGUMENT ... -->`` and ``<!-- end -->``. NAME is a function of
this file; the arguments are paths from docs/results/ or numbers.
"""

import argparse
import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.training.report import Results, read_results
from models.training.schedule import WARM_UP_SHARE
from scripts import Parser, run_script
from scripts.arms import Arm, arms_of, differing, label, markdown, setting
from scripts.benchmark import DIRECTIONS, ratios_by_contender
from scripts.compare import find_runs
from scripts.compare_plots import seconds_of
from scripts.comparisons import comparisons_of, difference, order, rank, titles
from scripts.contenders import AS_BATCH, DENSE_BIAS, DTYPES, UNMASKED, UNSCORED, VARLEN_ATTN, case_of
from scripts.packing import described

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- table (?P<call>[^>]+?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
OURS, FA4 = "ours (auto)", "FlashAttention-4, no norm"
CUDNN, NORM_CUDNN, COMPILED_CUDNN = "SDPA cudnn, no norm", "l2norm + SDPA cudnn", "compiled l2norm + SDPA cudnn"
SHORT = {FA4: "FlashAttention-4, no norm", CUDNN: "cuDNN, no norm", NORM_CUDNN: "l2norm + cuDNN"}
NORM_FA4, FLEX = "compiled l2norm + FlashAttention-4", "flex_attention, no norm"
SHORT |= {COMPILED_CUDNN: "compiled l2norm + cuDNN", NORM_FA4: NORM_FA4, "naive einsum": "naive"}
NORM_FLEX, VARLEN = "compiled l2norm + flex_attention", f"{VARLEN_ATTN}, no norm"
WINDOW = 4  # logged rows of a run over which a training loss is averaged
CUDA, SDPA = "ours (cuda)", "ours (sdpa)"
NORM_EFFICIENT, EFFICIENT = "l2norm + SDPA efficient", "SDPA efficient, no norm"


# The comparison of attention and norm.


def _arms(folders: str, only: Sequence[str] = ()) -> list[Arm]:
    """The arms of folders of runs; of runs that shared their GPU with others, neither times nor memory count.

    Args:
        folders: with commas between them.
        only: KEY=VALUE or KEY=VALUE,VALUE: the arms that have one of these values, for each.
    """
    runs = [run for folder in folders.split(",") for run in _runs(RESULTS / folder)]
    wanted = [(key, values.split(",")) for key, _, values in (one.partition("=") for one in only)]
    arms = [arm for arm in arms_of(runs) if all(setting(arm, key) in values for key, values in wanted)]
    _refuse_several(folders, [run for arm in arms for run in arm.runs])
    return arms


def _refuse_several(folders: str, runs: Sequence[Results]) -> None:
    """Raises ValueError for runs whose bits per byte do not mean the same: a table would rank them."""
    several = comparisons_of(runs)
    if len(several) > 1:
        raise ValueError(f"a table's runs must be of one comparison, got {folders} with {'; '.join(titles(several))}")


@functools.cache  # many tables are of the same runs: check() begins anew
def _runs(folder: Path) -> list[Results]:
    listed = folder / ".." / "shared_gpu.json"
    shared = json.loads(listed.read_text())["runs"] if listed.exists() else []
    runs = [read_results(run) for run in sorted(find_runs([folder]))]
    return [_without_times(run) if run.folder.name in shared else run for run in runs]


def _without_times(run: Results) -> Results:
    rows = [{key: row[key] for key in row if not key.startswith(("throughput/", "memory/"))} for row in run.rows]
    return replace(run, rows=rows)


def _further(arms: Sequence[Arm]) -> list[str]:
    """The settings that tell arms apart, without those that have a column of their own in every table."""
    return [key for key in differing(arms) if key not in ("seq_len", "attention", "norm", "lr")]


def _headings(further: Sequence[str]) -> list[str]:
    return ["attention", "norm", *(key.split(".")[-1] for key in further)]


def _names(arm: Arm, further: Sequence[str]) -> tuple[str, ...]:
    return tuple(setting(arm, key) for key in ("attention", "norm", *further))


def _place(arm: Arm, further: Sequence[str]) -> tuple:
    """Where the arm stands in a table, but for its length and learning rate."""
    return arm.settings["norm"] != "pre", arm.settings["attention"], *(order(arm.settings.get(key)) for key in further)


def _best(arms: Sequence[Arm], further: Sequence[str]) -> list[Arm]:
    """Of arms that differ in their learning rate alone the best by ``rank``."""
    best: dict[tuple, Arm] = {}
    for arm in arms:
        key = arm.settings["seq_len"], *_place(arm, further)
        before = best.get(key)
        if before is None or rank(arm) < rank(before):
            best[key] = arm
    return [best[key] for key in sorted(best)]


def comparison(folders: str, *only: str) -> str:
    """Each arm at its learning rate: mean and standard deviation over seeds."""
    arms = _arms(folders, only)
    further = _further(arms)
    arms = _best(arms, further)
    lowest = {}
    for arm in arms:
        losses = arm.values("val bpc")
        length = arm.settings["seq_len"]
        if losses:
            lowest[length] = min(lowest.get(length, float("inf")), statistics.mean(losses))
    rows = []
    for arm in arms:
        losses, settings = arm.values("val bpc"), arm.settings
        best = bool(losses) and statistics.mean(losses) == lowest[settings["seq_len"]]
        cells = [arm.cell(number) for number in ("val bpc", "tokens/s", "peak GiB")]
        cells[0] = f"**{cells[0]}**" if best else cells[0]
        rows.append([str(settings["seq_len"]), *_names(arm, further), f"{settings['lr']:g}", arm.ends(), *cells])
    return markdown(("seq_len", *_headings(further), "peak lr", "n", "val bpc", "tokens/s", "peak GiB"), rows)


def differences(folders: str, baselines: str, *only: str) -> str:
    """Each arm's loss minus that of some of them, all at their learning rates, over the seeds that both have.

    Args:
        baselines: runs' names, with commas between them: their arms.
    """
    arms = _arms(folders, only)
    further = _further(arms)
    arms = _best(arms, further)
    others = [_arm_of(name, arms) for name in baselines.split(",")]
    rows = []
    for arm in arms:
        found = ["" if other is arm else str(difference(arm, other) or "-") for other in others]
        rows.append([*_names(arm, further), f"{arm.settings['lr']:g}", *found])
    minus = [f"minus {label(other, ['attention', *further])}" for other in others]
    return markdown((*_headings(further), "peak lr", *minus), rows)


def _arm_of(name: str, arms: Sequence[Arm]) -> Arm:
    found = [arm for arm in arms if name in (run.name for run in arm.runs)]
    if not found:
        raise ValueError(f"a baseline must be a run of an arm at its learning rate, got {name!r}")
    return found[0]


def _by_rate(folders: str, seq_len: str, only: Sequence[str]) -> tuple[list[str], dict[tuple, dict[float, Results]]]:
    """The settings beside attention and norm; and of each arm, by its names, seed 0's run of every learning rate.

    Where seed 0 ran several times, the run that counts; where none finished, the last that started.
    """
    arms = [arm for arm in _arms(folders, only) if arm.settings["seq_len"] == int(seq_len)]
    further = _further(arms)
    found: dict[tuple, dict[float, Results]] = {}
    for arm in sorted(arms, key=lambda arm: _place(arm, further)):
        started = sorted(zip(arm.seeds, arm.runs, strict=True), key=lambda pair: pair[1].record.get("started") or "")
        seeds = {**dict(started), **arm.by_seed}
        runs = found.setdefault(_names(arm, further), {})
        if 0 in seeds:
            runs[arm.settings["lr"]] = seeds[0]
    return further, found


def _rates(found: dict[tuple, dict[float, Results]]) -> list[float]:
    return sorted({rate for runs in found.values() for rate in runs})


def learning_rates(folders: str, seq_len: str, *only: str) -> str:
    """Validation loss of seed 0 at every learning rate tried at one length."""
    further, found = _by_rate(folders, seq_len, only)
    rates, lines = _rates(found), []
    for names, runs in found.items():
        cells = [_loss_or_end(runs[rate]) if rate in runs else "" for rate in rates]
        lines.append([*names, *_bold_lowest(cells)])
    return markdown((*_headings(further), *(f"{rate:g}" for rate in rates)), lines)


def _loss_or_end(run: Results) -> str:
    return f"{run.last('val/bpc'):.4f}" if run.status == "finished" else run.status


def sensitivity(folders: str, seq_len: str, *only: str) -> str:
    """What seed 0 loses beside its best learning rate: on average over all rates, at twice and at four times it.

    Rates at which it did not finish are counted apart, and in no average.
    """
    further, found = _by_rate(folders, seq_len, only)
    lines = []
    for names, runs in found.items():
        losses = {rate: run.last("val/bpc") for rate, run in runs.items() if run.status == "finished"}
        ends = Arm({}, tuple(runs.values()), tuple(runs)).ends()
        if not losses:
            lines.append([*names, ends, *["-"] * 5])
            continue
        best = min(losses, key=losses.__getitem__)
        more = {rate: loss - losses[best] for rate, loss in losses.items()}
        above = [f"{more[factor * best]:.3f}" if factor * best in more else "-" for factor in (2, 4)]
        numbers = f"{losses[best]:.4f}", f"{statistics.mean(more.values()):.3f}", *above
        lines.append([*names, ends, f"{best:g}", *numbers])
    numbers = ("lowest val bpc", "mean above it", "at twice the rate", "at four times")
    return markdown((*_headings(further), "rates", "best rate", *numbers), lines)


def stability(folders: str, seq_len: str, *only: str) -> str:
    """Of seed 0 the largest |logit| at the end, by learning rate, and the largest logged gradient after any warm-up."""
    further, found = _by_rate(folders, seq_len, only)
    rates, lines = _rates(found), []
    for names, runs in found.items():
        ends = {rate: run.last("logit/max") for rate, run in runs.items()}
        logits = ["" if rate not in runs else _shown(ends[rate], ",.1f") for rate in rates]
        norms = [norm for norm in map(_largest_gradient, runs.values()) if norm is not None]
        lines.append([*names, *logits, _shown(_largest(norms) if norms else None, ".2f")])
    return markdown((*_headings(further), *(f"{rate:g}" for rate in rates), "gradient norm"), lines)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _largest_gradient(run: Results) -> float | None:
    """None where nothing was logged after the warm-up, which a short run cuts to a tenth of its steps."""
    steps, norms = run.series("train/grad_norm")
    warmup, max_steps = run.configured("optimizer.warmup_steps"), run.configured("max_steps")
    warmup = warmup if max_steps is None else min(warmup, max_steps // WARM_UP_SHARE)
    after = [norm for step, norm in zip(steps, norms, strict=True) if step > warmup]
    return _largest(after) if after else None


def _largest(values: Sequence[float]) -> float:
    """Their maximum; nan if one is, which max() passes over unless it is the first."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def scales(folders: str, *only: str) -> str:
    """Learned scales at the end, over all heads and seeds: mean, lowest, highest, and the mean of each layer."""
    arms = [arm for arm in _arms(folders, only) if arm.settings.get("attention.learned_scale")]
    further = _further(arms)
    arms = sorted(arms, key=lambda arm: (_place(arm, further), arm.settings["lr"]))
    layers = max(arm.settings["model.num_layers"] for arm in arms)
    lines = []
    for arm in arms:
        found = {end: _ends(arm, f"scale/{end}") for end in ("mean", "min", "max")}
        means = [_mean(_ends(arm, f"scale/layer{layer}/mean")) for layer in range(layers)]
        numbers = _mean(found["mean"]), min(found["min"], default=None), max(found["max"], default=None), *means
        settings = *_names(arm, further), f"{arm.settings['lr']:g}", arm.ends()
        lines.append([*settings, *(_shown(number, ".1f") for number in numbers)])
    names = ("mean", "lowest", "highest", *(f"layer {layer}" for layer in range(layers)))
    return markdown((*_headings(further), "peak lr", "n", *names), lines)


def _ends(arm: Arm, column: str) -> list[float]:
    """The last value of each run that finished and has one."""
    return [value for value in (run.last(column) for run in arm.finished) if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def reached(folders: str, bpc: str, *only: str) -> str:
    """MB and seconds of training until the mean of WINDOW logged training losses is at most so many bits a byte."""
    arms = _arms(folders, only)
    further = _further(arms)
    lines = []
    for arm in _best(arms, further):
        found = [_first_below(run, float(bpc)) for run in arm.finished]
        places = [place for place in found if place is not None]
        cells = [_mean_and_spread([place[index] for place in places if place[index] is not None]) for index in (0, 1)]
        lines.append([*_names(arm, further), f"{arm.settings['lr']:g}", f"{len(places)} of {len(found)}", *cells])
    return markdown((*_headings(further), "peak lr", "reached by", "MB", "seconds"), lines)


def _first_below(run: Results, bpc: float) -> tuple[float, float | None] | None:
    """MB, and seconds by the logged tokens/s where these are known."""
    tokens, losses = run.over_tokens("train/bpc")
    seconds = seconds_of(run)
    for end in range(WINDOW, len(losses) + 1):
        if statistics.mean(losses[end - WINDOW : end]) <= bpc:
            return tokens[end - 1] / 1e6, seconds.get(tokens[end - 1])
    return None


def _mean_and_spread(values: Sequence[float], form: str = ".1f") -> str:
    if not values:
        return "-"
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def trained_windows(folder: str, *only: str) -> str:
    """Each attention with full context and with windows, and its speed over full context's, at rates that had both."""
    found = _arms(folder, only)
    arms = {_windowed(arm): arm for arm in found}
    if len(arms) < len(found):
        raise ValueError(f"arms must differ in length, attention, rate and window alone, got others in {folder}")
    both = {place[:-1] for place in arms if place[-1]}
    rows = []
    for (seq_len, attention, lr, window), arm in sorted(arms.items(), key=lambda item: item[0]):
        if (seq_len, attention, lr) not in both:
            continue
        full = arms.get((seq_len, attention, lr, ""))
        speeds = [one and one.mean("tokens/s") for one in (arm, full)]
        factor = f"{speeds[0] / speeds[1]:.2f}x" if all(speeds) else "-"
        loss, speed, memory = (arm.cell(number) for number in ("val bpc", "tokens/s", "peak GiB"))
        settings = str(seq_len), attention, window or "full", f"{lr:g}"
        rows.append([*settings, arm.ends(), loss, speed, factor, memory])
    numbers = ("val bpc", "tokens/s", "speed of full", "peak GiB")
    return markdown(("seq_len", "attention", "window", "peak lr", "n", *numbers), rows)


def _windowed(arm: Arm) -> tuple[int, str, float, str]:
    window, pattern = (arm.settings.get(f"attention.{key}") for key in ("window", "window_pattern"))
    named = "" if window is None else f"{window}{f' {pattern}' if pattern else ''}"
    return arm.settings["seq_len"], arm.settings["attention"], arm.settings["lr"], named


def _recipes(folder: str) -> dict[str, Arm]:
    """The runs of a folder by recipe; a run is NAME-seedN."""
    runs: dict[str, list[Results]] = {}
    for run in _runs(RESULTS / folder):
        runs.setdefault(re.sub(r"-seed\d+$", "", run.folder.name), []).append(run)
    _refuse_several(folder, [run for of in runs.values() for run in of])
    return {name: Arm({}, tuple(of), tuple(one.configured("seed") for one in of)) for name, of in runs.items()}


def timed(folder: str, baseline: str) -> str:
    """Recipes that trained for as long, their losses also over the baseline's mean.

    By windows that slide, of the bytes that the training split does not have, and on a second text, is what
    scripts.evaluate left in a run's folder.
    """
    arms = _recipes(folder)
    if baseline not in arms:
        raise ValueError(f"the baseline must be one of {', '.join(sorted(arms))}, got {baseline}")
    base = arms[baseline].mean("val bpc")
    rows, lengths, evaluated = [], set(), []
    for name, arm in sorted(arms.items(), key=lambda item: (item[0] != baseline, item[1].mean("val bpc") or math.inf)):
        loss, ended = arm.mean("val bpc"), arm.finished
        steps = [run.last("step") or 0 for run in ended]
        megabytes = [run.record.get("tokens_per_step", 0) * step / 1e6 for run, step in zip(ended, steps, strict=True)]
        middle = [f"{statistics.mean(numbers):,.0f}" if numbers else "-" for numbers in (steps, megabytes)]
        ratio = f"{loss / base:.3f}" if loss and base else "-"
        val, text = (_evaluations(ended, split, "slide") for split in ("val", "text"))
        unseen = [found["unseen"] for found in val if "unseen" in found]
        lengths.update(found["string_bytes"] for found in unseen)
        slid = [_of_some([found["bits_per_byte"] for found in of], len(ended)) for of in (val, unseen, text)]
        evaluated += val + text
        speed = [arm.cell(number) for number in ("tokens/s", "peak GiB")]
        rows.append([name, arm.ends(), *middle, arm.cell("val bpc"), ratio, *slid, *speed])
    _refuse_unlike(folder, evaluated)
    if len(lengths) > 1:
        raise ValueError(f"unseen bytes must be by strings of one length, got {', '.join(map(str, sorted(lengths)))}")
    unseen_bytes = f"in no string of {min(lengths)} of train" if lengths else "unseen bytes"
    others = f"of {baseline}", "val, sliding", unseen_bytes, "second text, sliding"
    return markdown(("recipe", "n", "steps", "MB", "val bpc", *others, "tokens/s", "peak GiB"), rows)


def _of_some(values: Sequence[float], of: int) -> str:
    """Mean and deviation, and of how many runs where others have no value."""
    return _mean_and_spread(values, ".4f") + (f" ({len(values)})" if 0 < len(values) < of else "")


def experiments(folders: str, *names: str) -> str:
    """What runs of experiment=NAME made and took; one that nobody has run has an empty row.

    The minutes of a whole run are those of its run.json, which earlier runs lack; those of training are without
    validations, samples and checkpoints.
    """
    found: dict[str, list[Results]] = {name: [] for name in names}
    for run in (run for folder in folders.split(",") for run in _runs(RESULTS / folder)):
        found.setdefault((run.record.get("choices") or {}).get("experiment"), []).append(run)
    rows = []
    for name in names:
        _refuse_several(folders, found[name])
        if len(arms_of(found[name])) > 1:
            raise ValueError(
                f"the runs of experiment={name} in {folders} must differ in nothing but their seed, they differ in "
                f"{', '.join(differing(arms_of(found[name])))}"
            )
        arm = Arm({}, tuple(found[name]), tuple(run.configured("seed") for run in found[name]))
        megabytes = [run.over_tokens("step")[0][-1] / 1e6 for run in arm.finished]
        whole = [run.record["wall_seconds"] / 60 for run in arm.finished if run.record.get("wall_seconds")]
        training = [seconds / 60 for seconds in map(_training_seconds, arm.finished) if seconds is not None]
        minutes = [_mean_and_spread(values) for values in (training, whole)]
        numbers = [arm.cell(number) for number in ("tokens/s", "peak GiB", "val bpc", "test bpc")]
        cells = [arm.ends(), _mean_and_spread(megabytes, ",.0f"), *minutes, *numbers]
        rows.append([name, *(cells if arm.runs else [""] * len(cells))])
    heads = "n", "MB", "minutes of training", "of the whole run", "tokens/s", "peak GiB", "val bpc", "test bpc"
    return markdown(("experiment", *heads), rows)


def _training_seconds(run: Results) -> float | None:
    """By the clock of a run by time, of others by the logged tokens/s."""
    return run.last("train/seconds") or max(seconds_of(run).values(), default=None)


def by_context(folder: str, shortest: str) -> str:
    """Bits per byte of val by bytes of context, of recipes whose runs were evaluated by windows that do not overlap.

    Of the octaves, those from `shortest` bytes on: the shortest ones are joined, at other ends for each seq_len.
    """
    if not shortest.isdecimal():
        raise ValueError(f"shortest must be a number of bytes, got {shortest!r}")
    found: dict[str, dict[tuple[int, int], list[float]]] = {}
    evaluations = {name: _evaluations(arm.finished, "val", "chunk") for name, arm in sorted(_recipes(folder).items())}
    _refuse_unlike(folder, [one for of in evaluations.values() for one in of])
    for name, of in evaluations.items():
        for evaluation in of:
            for bucket in evaluation["by_context"]:
                key = bucket["shortest"], bucket["longest"]
                if key[0] >= int(shortest):
                    found.setdefault(name, {}).setdefault(key, []).append(bucket["bits_per_byte"])
    octaves = sorted({key for of in found.values() for key in of})
    rows = [[name, *(_mean_and_spread(of.get(key, []), ".4f") for key in octaves)] for name, of in found.items()]
    return markdown(("recipe", *(f"{first:,} to {last:,}" for first, last in octaves)), rows)


def _evaluations(runs: Sequence[Results], split: str, mode: str) -> list[dict[str, Any]]:
    """What scripts.evaluate wrote of a split by such windows, of each run that has it.

    Raises:
        ValueError: a run has several.
    """
    evaluations = []
    for run in runs:
        found = [json.loads(path.read_text()) for path in (run.folder / "evaluations").glob("*.json")]
        wanted = [one for one in found if one["split"] == split and one["mode"].startswith(mode)]
        if len(wanted) > 1:
            kind = {"slide": "sliding", "chunk": "non-overlapping"}[mode]
            raise ValueError(
                f"a run must have one evaluation of {split} by {kind} windows, got {len(wanted)}: {run.name}"
            )
        evaluations += wanted
    return evaluations


def _refuse_unlike(folder: str, evaluations: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where those of one split are of several texts, lengths of it, or kinds of windows."""
    for split in {one["split"] for one in evaluations}:
        kinds = {(one["sha256"], one["bytes"], one["mode"]) for one in evaluations if one["split"] == split}
        if len(kinds) > 1:
            found = "; ".join(f"{mode} on {num_bytes:,} bytes of {sha[:8]}" for sha, num_bytes, mode in sorted(kinds))
            raise ValueError(f"evaluations of {split} in {folder} must be alike, got {found}")


def _bold_lowest(cells: Sequence[str]) -> list[str]:
    numbers = [float(cell) for cell in cells if cell[:1].isdigit()]
    return [f"**{cell}**" if numbers and cell == f"{min(numbers):.4f}" else cell for cell in cells]


# Speed of attention.


def _report(path: str) -> dict[str, Any]:
    return json.loads((RESULTS / path).read_text())


def _measured(path: str) -> dict[tuple, dict[str, dict[str, Any]]]:
    """What a benchmark's JSON has, by (dtype, seq_len), of packed sequences with their lengths, and by contender."""
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in _report(path)["rows"]:
        key = row["dtype"], row["seq_len"], *(row.get("lengths") or ())
        found.setdefault(key, {})[row["contender"]] = row
    return found


def _tflops(row: dict[str, Any], key: str) -> float:
    return DIRECTIONS[key][1] * case_of(row).flops() / row[key] / 1e9


def _ratio(row: dict[str, Any] | None, ours: dict[str, Any], key: str) -> str:
    return "-" if row is None or key not in row else f"{row[key] / ours[key]:.2f}x"


def _kind(row: dict[str, Any]) -> str:
    return "causal" if row["causal"] else f"{row['mask_prob']:.0%} masked" if row["mask_prob"] else "dense"


def speed(*arguments: str) -> str:
    """Ours in ms, forward and forward + backward, and the others' times over ours: PATH:LENGTH for each row."""
    rows, others = [], [FA4, CUDNN, NORM_FA4, COMPILED_CUDNN]  # no eager norms: inside a compiled model nobody has them
    picked = []
    for argument in arguments:
        path, _, length = argument.partition(":")
        measured = _measured(path)
        picked += [results for key, results in measured.items() if not length or key[1] == int(length)]
    others = [name for name in others if any(name in results for results in picked)]
    for results in picked:
        ours = results[OURS]
        cells = [str(ours["head_dim"]), f"{ours['seq_len']} {_kind(ours)}"]
        for key in ("forward_ms", "both_ms"):
            cells += [f"{ours[key]:.3f}", *(_ratio(results.get(name), ours, key) for name in others)]
        rows.append(cells)
    names = [SHORT[name] for name in others]
    heads = ["head dim", "seq_len", "forward, ms", *names, "forward + backward, ms", *names]
    return markdown(heads, rows)


def attention(*paths: str) -> str:
    """Times with TFLOP/s of every row of some benchmarks, and the others' times over ours."""
    others = [FA4, CUDNN, NORM_CUDNN, NORM_FA4, COMPILED_CUDNN]
    measured = [(results, results[OURS]) for path in paths for results in _measured(path).values()]
    others = [name for name in others if any(name in results for results, _ in measured)]
    rows = []
    for results, ours in measured:
        cells = [str(ours["head_dim"]), str(ours["seq_len"]), _kind(ours)]
        for key in ("forward_ms", "both_ms"):
            cells.append(f"**{ours[key]:.3f}** ({_tflops(ours, key):.0f})")
            cells += [_ratio(results.get(name), ours, key) for name in others]
        rows.append(cells)
    names = [SHORT[name].replace(", no norm", "") for name in others]
    return markdown(["head dim", "seq_len", "", "forward", *names, "forward + backward", *names], rows)


def sustained(*paths: str) -> str:
    """Under continuous load: times of ours, FlashAttention-4's over ours, and both clocks in forward + backward."""
    rows = []
    for results in (results for path in paths for results in _measured(path).values()):
        ours, fa4 = results[OURS], results[FA4]
        cells = [str(ours["head_dim"]), str(ours["seq_len"]), _kind(ours)]
        for key in ("sustained_forward_ms", "sustained_both_ms"):
            cells += [f"{ours[key]:.3f}", _ratio(fa4, ours, key)]
        rows.append([*cells, f"{ours['both_ghz']:.2f}", f"{fa4['both_ghz']:.2f}"])
    times = ["forward, ms", "FlashAttention-4", "forward + backward, ms", "FlashAttention-4"]
    return markdown(["head dim", "seq_len", "", *times, "GHz, ours", "FlashAttention-4"], rows)


def short(*paths: str) -> str:
    """Ours in ms and the others' time over ours, by length and mask, of benchmarks of the predecessor's shapes."""
    wanted = [NORM_CUDNN, COMPILED_CUDNN, CUDNN]
    measured = [results for path in paths for results in _measured(path).values()]
    wanted = [name for name in wanted if any(name in results for results in measured)]
    rows = []
    for results in sorted(measured, key=lambda results: (results[OURS]["seq_len"], results[OURS]["causal"])):
        ours = results[OURS]
        cells = [str(ours["seq_len"]), _kind(ours)]
        for key in ("forward_ms", "both_ms"):
            cells += [f"{ours[key]:.3f}", *(_ratio(results.get(name), ours, key) for name in wanted)]
        rows.append(cells)
    names = [SHORT[name] for name in wanted]
    return markdown(("seq_len", "", "forward, ms", *names, "forward + backward, ms", *names), rows)


def predecessor(*paths: str) -> str:
    """The predecessor's own tables: ours in ms, and the naive einsum's time over ours, each direction."""
    rows, keys = [], tuple(DIRECTIONS)
    measured = [results for path in paths for results in _measured(path).values()]
    order = {kind: index for index, kind in enumerate(("dense", "causal", "25% masked"))}

    def place(results: dict[str, dict[str, Any]]) -> tuple:
        ours = results[OURS]
        return list(DTYPES).index(ours["dtype"]), order[_kind(ours)], ours["seq_len"]

    for results in sorted(measured, key=place):
        ours = results[OURS]
        cells = [ours["dtype"], _kind(ours), str(ours["seq_len"])]
        for key in keys:
            cells.append(f"{ours[key]:.3f}" if key in ours else "-")
            cells.append(_ratio(results.get("naive einsum"), ours, key) if key in ours else "-")
        rows.append(cells)
    heads = [cell for key in keys for cell in (f"{DIRECTIONS[key][0]}, ms", "naive")]
    return markdown(("dtype", "", "seq_len", *heads), rows)


def decoding(*paths: str) -> str:
    """One query beside many keys: us, and TB/s of keys and values, of every contender."""
    measured = [next(iter(_measured(path).values())) for path in paths]
    names = list(dict.fromkeys(name for results in measured for name in results if name != "naive einsum"))
    rows = []
    for name in names:
        cells = [name]
        for results in measured:
            row = results.get(name)
            if row is None or "forward_ms" not in row:
                cells.append("-")
                continue
            size = 2 * row["batch"] * row["kv_heads"] * row["seq_len"] * row["head_dim"] * DTYPES[row["dtype"]].itemsize
            cells.append(f"{1e3 * row['forward_ms']:.1f} ({size / row['forward_ms'] / 1e9:.2f})")
        rows.append(cells)
    dims = [next(iter(results.values()))["head_dim"] for results in measured]
    return markdown(("contender", *(f"head dim {dim}" for dim in dims)), rows)


def windows(*paths: str) -> str:
    """Windows, and no window: times with TFLOP/s of visible pairs, and the others' times over ours in the same file.

    Files of one problem are one row, with the first one's times.
    """
    others, rows = [FA4, NORM_FA4, FLEX, NORM_FLEX], {}
    for results in (results for path in paths for results in _measured(path).values()):
        ours = results[OURS]
        first, factors = rows.setdefault(case_of(ours), (ours, {}))
        for name in (name for name in others if name in results):
            for key in ("forward_ms", "both_ms"):
                factors.setdefault((name, key), _ratio(results[name], ours, key))
    others = [name for name in others if any((name, "both_ms") in factors for _, factors in rows.values())]
    lines = []
    for case, (ours, factors) in rows.items():
        window = _kind(ours) if case.window is None else f"({case.window[0]}, {case.window[1]})"
        cells = [str(case.head_dim), f"{case.batch} x {case.seq_len}", window]
        for key in ("forward_ms", "both_ms"):
            cells.append(f"**{ours[key]:.3f}** ({_tflops(ours, key):.0f})")
            cells += [factors.get((name, key), "-") for name in others]
        lines.append(cells)
    names = [_short(name) for name in others]
    return markdown(["head dim", "seq_len", "window", "forward", *names, "forward + backward", *names], lines)


def packed(*paths: str) -> str:
    """Packed sequences: a row a file; of several lists of lengths the medians, and each factor's lowest, too."""
    others, reports = [OURS + AS_BATCH, FA4, NORM_FA4, VARLEN], [_report(path)["rows"] for path in paths]
    others = [name for name in others if any(row["contender"] == name for rows in reports for row in rows)]
    lines = []
    for rows in reports:
        ours, ratios = [row for row in rows if row["contender"] == OURS], ratios_by_contender(rows)
        cells = [str(ours[0]["head_dim"]), _lists(ours), _kind(ours[0])]
        for key in ("forward_ms", "both_ms"):
            cells.append(f"{statistics.median(row[key] for row in ours):.3f}")
            cells += [_median_and_lowest(ratios.get(name, {}).get(key, [])) for name in others]
        lines.append(cells)
    names = [_short(name) for name in others]
    heads = ["head dim", "lengths", "", "forward, ms", *names, "forward + backward, ms", *names]
    return markdown(heads, lines)


def _lists(rows: Sequence[dict[str, Any]]) -> str:
    if len(rows) == 1:
        return described(rows[0]["lengths"])
    least, most = (extreme(row["seq_len"] for row in rows) for extreme in (min, max))
    tokens = f"each of {most:,}" if least == most else f"of {least:,} to {most:,}"
    return f"{len(rows)} lists, {tokens} tokens"


def _median_and_lowest(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    lowest = f" ({min(ratios):.2f}x)" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}x{lowest}"


def padding(*paths: str) -> str:
    """A mask that hides padding: ours in ms, and ours without the mask over it."""
    keys, lines = tuple(DIRECTIONS), []
    for results in (results for path in paths for results in _measured(path).values()):
        ours, unmasked = results[OURS], results[OURS + UNMASKED]
        case, whole = case_of(ours), case_of(unmasked)
        hidden = f"{case.padding[0]} {case.padding[1]:.0%}"
        cells = [str(case.head_dim), f"{case.batch} x {case.seq_len}", _kind(ours), hidden]
        cells.append(f"{case.pairs() / whole.pairs():.0%}")
        for key in keys:
            cells += [f"{ours[key]:.3f}", _ratio(unmasked, ours, key)] if key in ours else ["-", "-"]
        lines.append(cells)
    times = [cell for key in keys for cell in (f"{DIRECTIONS[key][0]}, ms", "without mask")]
    return markdown(["head dim", "seq_len", "", "hidden keys", "visible pairs", *times], lines)


def distances(*paths: str) -> str:
    """What distances add: ours in ms, the others' times over ours, and peak memory, that of ours and of two others."""
    others, lines = [OURS + UNSCORED, OURS + DENSE_BIAS, NORM_FLEX, FLEX], []
    added = {"table": "distance_bias", "alibi": "ALiBi"}
    for results in (results for path in paths for results in _measured(path).values()):
        ours = results[OURS]
        case = case_of(ours)
        cells = [str(case.head_dim), f"{case.batch} x {case.seq_len}", _kind(ours), added[case.by_distance]]
        for key in ("forward_ms", "both_ms"):
            cells += [f"{ours[key]:.3f}", *(_ratio(results.get(name), ours, key) for name in others)]
        cells += [f"{results[name]['peak_mib']:,.0f}" for name in (OURS, *others[:2])]
        lines.append(cells)
    names = [_short(name) for name in others]
    heads = ["head dim", "seq_len", "", "added", "forward, ms", *names, "forward + backward, ms", *names]
    return markdown([*heads, "peak MiB", *names[:2]], lines)


def bias(*paths: str) -> str:
    """A bias of every pair: ours in ms, ours without it in ms, SDPA's times over ours, and the peak memory of all.

    Rows without a bias are those of the same problems in other files.
    """
    measured = [results for path in paths for results in _measured(path).values()]
    without = {case_of(results[OURS]): results[OURS] for results in measured}
    others, lines = [NORM_EFFICIENT, EFFICIENT], []
    for results in (results for results in measured if results[OURS]["bias"]):
        ours = results[OURS]
        case = case_of(ours)
        plain = without[replace(case, bias=False)]
        cells = [str(case.head_dim), f"{case.batch} x {case.seq_len}", _kind(ours)]
        for key in DIRECTIONS:
            cells += [f"{row[key]:.3f}" for row in (ours, plain)]
            cells += [_ratio(results.get(name), ours, key) for name in others]
        cells += [f"{row['peak_mib']:,.0f}" for row in (ours, plain, *(results[name] for name in others))]
        lines.append(cells)
    names = ["without it", *map(_short, others)]
    times = [cell for words, _ in DIRECTIONS.values() for cell in (f"{words}, ms", *names)]
    return markdown(["head dim", "seq_len", "", *times, "peak MiB", *names], lines)


def bias_backends(*paths: str) -> str:
    """A bias of every pair: backend "cuda" in ms, the times of "sdpa" over it, and the peak memory of both."""
    lines = []
    for results in (results for path in paths for results in _measured(path).values()):
        ours, other = results[CUDA], results[SDPA]
        case = case_of(ours)
        cells = [str(case.head_dim), f"{case.batch} x {case.seq_len}", _kind(ours)]
        for key in DIRECTIONS:
            cells += [f"{ours[key]:.3f}", _ratio(other, ours, key)]
        lines.append([*cells, *(f"{row['peak_mib']:,.0f}" for row in (ours, other))])
    times = [cell for words, _ in DIRECTIONS.values() for cell in (f"{words}, ms", "sdpa")]
    return markdown(["head dim", "seq_len", "", *times, "peak MiB", "sdpa"], lines)


def _short(name: str) -> str:
    return name.removeprefix(f"{OURS}, ").replace(", no norm", "")


def training(*paths: str) -> str:
    """A training step of the trainer, of a bare loop around the same model, and of nanoGPT's model."""
    names = {
        "lightning": "`train.py`",
        "bare": "our model, bare loop",
        "nanogpt_windows": "nanoGPT with the windows, bare loop",
        "nanogpt_gelu": "nanoGPT with our GELU, bare loop",
        "nanogpt": "nanoGPT, bare loop",
    }
    rows = []
    for path in paths:
        results = {row["contender"]: row for row in _report(path)["rows"]}
        for key, name in names.items():
            if key in results:
                row = results[key]
                speed = row["tokens_per_s"] / results["nanogpt"]["tokens_per_s"]
                numbers = (f"{row['tokens_per_s']:,.0f}", f"{row['ms_per_step']:.1f}", f"{row['peak_gib']:.1f}")
                rows.append([row["model"], str(row["seq_len"]), name, *numbers, f"{speed:.2f}x"])
    return markdown(("model", "seq_len", "", "tokens/s", "ms a step", "peak GiB", "speed of nanoGPT's"), rows)


# Models with QK-norm.


def qk_norm(path: str, aims_path: str) -> str:
    """Each model's attention part: ours and the fastest of theirs in ms, and where a ratio falls short of its aim."""
    aimed, rows = [aim for aim in json.loads((RESULTS / aims_path).read_text()) if path in aim["files"]], []
    for model in _report(path)["models"]:
        pairs, cells = model["ratios"], []
        for mode in ("eager", "region"):
            pair = pairs.get(mode)
            if pair is None:
                cells += ["-"] * 3
                continue
            at_least = max((aim["at_least"] for aim in aimed if _is_of(model, mode, aim)), default=0.0)
            short = _short_by(round(pair["ratio"], 2), at_least)
            cells += [
                f"{pair['ours_ms']:.3f}",
                f"{pair['theirs_ms']:.3f}",
                f"{pair['ratio']:.2f}x{short and f', {short}'}",
            ]
        lengths, heads = model["lengths"], dict.fromkeys((model["heads"], model["kv_heads"]))
        tokens = f"{model['batch']} x {model['seq_len']}" if lengths is None else described(lengths)
        fastest = " / ".join(dict.fromkeys(_attention_of(pair["fastest"]) for pair in pairs.values())) or "-"
        rows.append([model["name"], tokens, "/".join(map(str, heads)), str(model["head_dim"]), fastest, *cells])
    times = ("ms", "theirs", "ratio")
    heads = [f"{mode}, {times[0]}" if time == "ms" else time for mode in ("eager", "region") for time in times]
    return markdown(("model", "tokens", "heads", "head dim", "fastest of theirs", *heads), rows)


def qk_norm_errors(path: str) -> str:
    """Relative RMS errors in thousandths: ours / those of the fastest of theirs; ours bold where it is larger."""
    names, rows = ("o", "dq", "dk", "dv", "dgain_q"), []
    for model in _report(path)["models"]:
        errors = {row["contender"]: row["errors"] for row in model["rows"]}
        ours = errors.get(OURS, {})
        theirs = errors[next(iter(model["ratios"].values()))["fastest"]] if model["ratios"] else {}
        rows.append([model["name"], *(_errors(ours.get(name), theirs.get(name)) for name in names)])
    return markdown(("model", *names), rows)


def qk_norm_others(path: str) -> str:
    """Each attention behind the models' own norms: its time over the fastest one's and over ours."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for model in _report(path)["models"]:
        times = {row["contender"]: [row.get(f"{mode}_ms") for mode in ("eager", "region")] for row in model["rows"]}
        ours, *theirs = times.pop(OURS), *times.values()
        if any(time is None for one in (ours, *theirs) for time in one):
            continue
        fastest = [min(one[mode] for one in theirs) for mode in (0, 1)]
        for name, one in times.items():
            ratios = [one[mode] / other[mode] for other in (fastest, ours) for mode in (0, 1)]
            found.setdefault(_attention_of(name), []).append(tuple(ratios))
    heads = [f"{mode}, over {other}" for other in ("the fastest", "ours") for mode in ("eager", "region")]
    rows = [[name, str(len(models)), *map(_range, zip(*models, strict=True))] for name, models in found.items()]
    return markdown(("attention", "models", *heads), rows)


def _errors(ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None:
        return "-"
    first, second = f"{1e3 * ours:.2f}", f"{1e3 * theirs:.2f}"
    return f"**{first}** / {second}" if float(first) > float(second) else f"{first} / {second}"


def _attention_of(name: str) -> str:
    return name.removeprefix("norms + ")


def _is_of(model: dict[str, Any], mode: str, aim: dict[str, Any]) -> bool:
    return mode in aim["modes"] and model["head_dim"] in aim["head_dims"]


# What was aimed at.


def aims(path: str, folder: str | None = None) -> str:
    """Every aim of a JSON file, or those of a folder; whether what was measured last reaches it, and where that is.

    An aim has what and case (its names), at_least, key, files and seq_lens: every row of these files and lengths has to
    reach it, or, with ``of``, their median or lowest. What is compared is ``over``'s ``key`` over ours, or, without
    ``over``, a training's ``key``. One with ``modes`` is about models with QK-norm: their ratios in these modes, at
    ``head_dims``.
    """
    rows = []
    for aim in json.loads((RESULTS / path).read_text()):
        if folder is not None and folder not in {str(Path(name).parent) for name in aim["files"]}:
            continue
        reports = [_report(name) for name in aim["files"]]
        values = [value for report in reports for value in _values(report, aim)]
        names = aim["what"], aim["case"], _number(aim["at_least"])
        where = _source(aim["files"], reports) if folder is None else _commits(reports)
        rows.append([*names, _verdict(values, aim["at_least"]), _range(values), where])
    return markdown(("what", "case", "at least", "", "measured", "where" if folder is None else "commit"), rows)


def _values(report: dict[str, Any], aim: dict[str, Any]) -> list[float]:
    if "modes" in aim:
        found = [
            (model["ratios"], mode) for model in report["models"] for mode in aim["modes"] if _is_of(model, mode, aim)
        ]
        return [round(pairs[mode]["ratio"], 2) if mode in pairs else 0.0 for pairs, mode in found]
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["seq_len"] in aim["seq_lens"]:
            cases.setdefault((row["seq_len"], *(row.get("lengths") or ())), {})[row["contender"]] = row
    values = [_reached(results, aim) for results in cases.values()]
    if "of" in aim:
        values = [{"median": statistics.median, "lowest": min}[aim["of"]](values)]
    return [round(value, 2) for value in values]


def _reached(results: dict[str, dict[str, Any]], aim: dict[str, Any]) -> float:
    key = aim["key"]
    return results[aim["over"]][key] / results[OURS][key] if "over" in aim else results["lightning"][key]


def _verdict(values: Sequence[float], at_least: float) -> str:
    at_least = round(at_least, 2)  # as the table has it, and the values are
    met = [value >= at_least for value in values]
    if all(met):
        return "met"
    short = _short_by(min(values), at_least)
    return f"{f'met in {sum(met)} of {len(met)}' if any(met) else 'missed'}, {short}"


def _short_by(value: float, at_least: float) -> str:
    return "" if value >= at_least else f"{max(1.0, 100 * (1 - value / at_least)):.0f} % short"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _range(values: Sequence[float]) -> str:
    lowest, highest = _number(min(values)), _number(max(values))
    if lowest == highest:
        return lowest
    return ", ".join(map(_number, values)) if len(values) == 2 else f"{lowest} to {highest}"


def _source(paths: Sequence[str], reports: Sequence[dict[str, Any]]) -> str:
    folder = Path(paths[0]).parent
    return f"[{folder}](../results/{folder}/README.md) {_commits(reports)}"


def _commits(reports: Sequence[dict[str, Any]]) -> str:
    commits = dict.fromkeys(f"{report['started'][:10]} `{report['git_commit'][:7]}`" for report in reports)
    return ", ".join(commits)


TABLES: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        *(comparison, differences, learning_rates, sensitivity, stability, scales, reached),
        *(timed, by_context, experiments),
        *(speed, attention, sustained, short, predecessor, decoding, training),
        *(windows, trained_windows, packed, padding, distances, bias, bias_backends),
        *(qk_norm, qk_norm_others, qk_norm_errors, aims),
    )
}


def documents() -> list[Path]:
    """Every document that may have a table."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def renewed(text: str, place: str) -> str:
    """The text with every table made anew. Raises ValueError for one that cannot be made."""

    def make(block: re.Match[str]) -> str:
        name, *arguments = block["call"].split()
        if name not in TABLES:
            raise ValueError(f"{place}: table must be one of {', '.join(TABLES)}, got {name!r}")
        return f"{block[1]}\n{TABLES[name](*arguments)}\n{block[4]}"

    return BLOCK.sub(make, text)


def check(arguments: argparse.Namespace) -> None:
    """Compares or writes; ValueError names the documents that differ."""
    _runs.cache_clear()
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        new = renewed(text, str(path.relative_to(ROOT)))
        if new == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if arguments.write:
            path.write_text(new, encoding="utf-8")
    if stale and not arguments.write:
        raise ValueError(f"tables of {', '.join(stale)} are not what docs/results/ says; --write makes them anew")
    print(f"written: {', '.join(stale) or 'nothing'}" if arguments.write else "every table is what docs/results/ says")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(prog="python -m scripts.results", description="Check the tables of the documents, or write them.")
    parser.add_argument("--write", action="store_true", help="write the tables into the documents")
    return run_script(parser, check, argv)


if __name__ == "__main__":
    sys.exit(main())
