"""Draws rows of a benchmark's JSON that do not differ in their length alone: windows, packed sequences, padding.

    python -m scripts.plot_rows docs/results/windows/*.json --plot docs/results/windows/windows.png

A panel a head dim and direction, a group of bars a problem, a bar a contender: TFLOP/s of visible pairs. Of a problem
that several lists of lengths stand for the bar is their median, and a line goes from the lowest to the highest. Where
problems of a head dim differ in their dtype, say, that stands below each.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts import Parser, run_script
from scripts.benchmark import DIRECTIONS
from scripts.contenders import UNMASKED, UNSCORED, Case, case_of
from scripts.packing import described

OURS = "ours"


@dataclass(frozen=True)
class Problem:
    """What a group of bars is of: a case, or, with several lists of lengths, what is the same in the cases of all."""

    case: Case
    lists: tuple[tuple[int, ...], ...]  # none where it is one case

    @property
    def seen(self) -> str:
        """Which pairs, but for padding."""
        if self.case.window:
            left, right = self.case.window
            return f"window {left}" if right == 0 else f"window {left}, {right}"
        return "causal" if self.case.causal else "dense"

    @property
    def label(self) -> str:
        """In two lines, what it is beside others that are the same in `options`."""
        case = self.case
        if self.lists:
            return f"{len(self.lists)} lists of lengths"
        if case.lengths:
            return f"{described(case.lengths)}\n{self.seen}"
        hidden = f", {case.padding[0]} {case.padding[1]:.0%} hidden" if case.padding else ""
        return f"{case.batch} x {case.seq_len}\n{self.seen}{hidden}"

    def options(self) -> tuple[str, ...]:
        """What the label does not say: of each option how this problem has it."""
        case = self.case
        return (
            case.dtype,
            f"{case.heads} heads" if case.kv_heads == case.heads else f"{case.heads} heads on {case.kv_heads}",
            f"{case.seq_len_q} queries" if case.seq_len_q else "all queries",
            f"mask {case.mask_prob:g}",
            "bias" if case.bias else "no bias",
            {None: "no bias by distance", "table": "distance bias", "alibi": "ALiBi"}[case.by_distance],
            self.seen if self.lists else "",
        )


Rows = dict[str, list[dict[str, Any]]]  # by contender; several where lists of lengths are measured


def read_rows(paths: Sequence[Path]) -> dict[int, dict[Problem, Rows]]:
    """The rows by head dim, by problem and by contender.

    A problem of a later file that an earlier one has, too, does not count, which is said. Raises ValueError, OSError.
    """
    found: dict[int, dict[Problem, Rows]] = {}
    for path in paths:
        report = json.loads(path.read_text())
        rows = report.get("rows", []) if isinstance(report, dict) else []
        timed = [row for row in rows if "contender" in row and any(key in row for key in DIRECTIONS)]
        if not timed:
            raise ValueError(f"files must be JSON of scripts.benchmark with times, got {path}")
        own: dict[int, dict[Problem, Rows]] = {}
        for row, problem in zip(timed, _problems(timed), strict=True):
            own.setdefault(row["head_dim"], {}).setdefault(problem, {}).setdefault(row["contender"], []).append(row)
        for head_dim, problems in own.items():
            for problem, contenders in problems.items():
                if found.setdefault(head_dim, {}).setdefault(problem, contenders) is not contenders:
                    what = problem.label.replace("\n", ", ")
                    print(f"left out: head dim {head_dim}, {what} of {path}, for an earlier file has it")
    return found


def _problems(rows: Sequence[dict[str, Any]]) -> list[Problem]:
    """The problem of each row of a file; a call without its mask or its bias stands beside those with it."""
    cases = [case_of(row) for row in rows]
    padding = next((case.padding for case in cases if case.padding), None)  # a file has one
    by_distance = next((case.by_distance for case in cases if case.by_distance), None)
    lists = tuple(sorted({case.lengths for case in cases if case.lengths}))
    problems = []
    for row, case in zip(rows, cases, strict=True):
        if row["contender"].endswith(UNMASKED):
            case = replace(case, padding=padding)
        if row["contender"].endswith(UNSCORED):
            case = replace(case, by_distance=by_distance)
        several = len(lists) > 1
        problems.append(Problem(replace(case, seq_len=0, lengths=()) if several else case, lists if several else ()))
    return problems


def labels_of(problems: Sequence[Problem]) -> list[str]:
    """The labels of a head dim's problems, with the options in which these differ.

    Raises:
        ValueError: two of them are the same, so that nobody could tell which is which.
    """
    options = list(zip(*(problem.options() for problem in problems), strict=True))
    told = [of for of in options if len({*of} - {""}) > 1]
    labels = [
        "\n".join(filter(None, (problem.label, ", ".join(filter(None, differing)))))
        for problem, *differing in zip(problems, *told, strict=True)
    ]
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        what = label.replace("\n", ", ")
        raise ValueError(f"files must have problems that a plot can tell apart, got {count} of {what}: draw them apart")
    return labels


def draw(arguments: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    by_dim = dict(sorted(read_rows(arguments.files).items()))
    rows = [row for problems in by_dim.values() for named in problems.values() for of in named.values() for row in of]
    names = sorted(dict.fromkeys(row["contender"] for row in rows), key=lambda name: not name.startswith(OURS))
    tab20 = pyplot.get_cmap("tab20").colors  # ten dark colours, each followed by a light one
    colours = dict(zip(names, itertools.cycle((*tab20[::2], *tab20[1::2])), strict=False))
    keys = [key for key in DIRECTIONS if any(key in row for row in rows)]
    figure, panels = pyplot.subplots(
        len(by_dim), len(keys), figsize=(5.5 * len(keys), 3.2 * len(by_dim) + 0.8), layout="constrained", squeeze=False
    )
    bars: dict[str, Any] = {}
    for (head_dim, problems), of_dim in zip(by_dim.items(), panels, strict=True):
        labels = labels_of(list(problems))
        for key, axes in zip(keys, of_dim, strict=True):
            for place, (problem, contenders) in enumerate(problems.items()):
                present = [name for name in names if _is_timed(problem, contenders.get(name, []), key)]
                width = 0.85 / max(1, len(present))
                for index, name in enumerate(present):
                    speeds = [DIRECTIONS[key][1] * case_of(row).flops() / row[key] / 1e9 for row in contenders[name]]
                    middle = statistics.median(speeds)
                    spread = [[middle - min(speeds)], [max(speeds) - middle]] if len(speeds) > 1 else None
                    bars[name] = axes.bar(
                        place + width * (index - (len(present) - 1) / 2), middle, 0.92 * width, color=colours[name],
                        yerr=spread, hatch=None if contenders[name][0]["cosine"] else "//", edgecolor="white",
                    )  # fmt: skip
            axes.set_xticks(range(len(problems)), labels, fontsize="small")
            axes.set(ylabel="TFLOP/s", title=f"{DIRECTIONS[key][0]}, head dim {head_dim}")
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
    shown = [name for name in names if name in bars]
    figure.legend([bars[name] for name in shown], shown, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(arguments.plot, dpi=110)
    pyplot.close(figure)
    print(f"plot: {arguments.plot}")


def _is_timed(problem: Problem, rows: Sequence[dict[str, Any]], key: str) -> bool:
    """Whether a contender has a bar: it may have run out of memory, and with some lists alone has none, which is said,
    for the others' medians are over all.
    """
    timed, wanted = len({case_of(row) for row in rows if key in row}), max(1, len(problem.lists))
    if 0 < timed < wanted:
        print(
            f"no bar: {DIRECTIONS[key][0]} of {rows[0]['contender']}, timed with {timed} of {wanted} lists of lengths"
        )
    return timed == wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(prog="python -m scripts.plot_rows", description="Draw windows, packed sequences or padding.")
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="of scripts.benchmark")
    parser.add_argument("--plot", required=True, type=Path, help="the PNG to write")
    return run_script(parser, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
