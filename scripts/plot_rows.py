"""Draws rows of a benchmark's JSON that do not differ in their length alone: windows, packed sequences, padding.

    python -m scripts.plot_rows docs/results/windows/*.json --plot docs/results/windows/windows.png

A panel a head dim and direction, a group of bars a problem, a bar a contender: TFLOP/s of visible pairs. Of a problem
that several lists of lengths stand for the bar is their median, and a line goes from the lowest to the highest.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import Parser, run_script
from scripts.benchmark import DIRECTIONS
from scripts.contenders import UNMASKED, case_of
from scripts.packing import described

OURS = "ours"


def read_rows(paths: Sequence[Path]) -> dict[int, dict[str, dict[str, list[dict[str, Any]]]]]:
    """The rows by head dim, by problem and by contender; a contender has several where lists of lengths are measured.

    A problem of a later file that an earlier one has, too, does not count. Raises ValueError, OSError.
    """
    found: dict[int, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for path in paths:
        rows = json.loads(path.read_text()).get("rows", [])
        timed = [row for row in rows if "contender" in row and any(key in row for key in DIRECTIONS)]
        if not timed:
            raise ValueError(f"files must be JSON of scripts.benchmark with times, got {path}")
        lists = len({tuple(row["lengths"] or ()) for row in timed})
        own: dict[int, dict[str, dict[str, list[dict[str, Any]]]]] = {}
        for row in timed:
            name = f"{lists} lists of lengths" if lists > 1 else _problem(row, timed)
            own.setdefault(row["head_dim"], {}).setdefault(name, {}).setdefault(row["contender"], []).append(row)
        for head_dim, problems in own.items():
            for name, contenders in problems.items():
                found.setdefault(head_dim, {}).setdefault(name, contenders)
    return found


def _problem(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """What is computed, in two lines; a call without its mask stands beside the one with it."""
    if row["contender"].endswith(UNMASKED):
        row = next(other for other in rows if other["padding"])
    causal = "causal" if row["causal"] else "dense"
    if row["lengths"]:
        return f"{described(row['lengths'])}\n{causal}"
    what = causal
    if row["window"]:
        left, right = row["window"]
        what = f"window {left}" if right == 0 else f"window {left}, {right}"
    if row["padding"]:
        what = f"{causal}, {row['padding'][0]} {row['padding'][1]:.0%} hidden"
    return f"{row['batch']} x {row['seq_len']}\n{what}"


def draw(arguments: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    by_dim = dict(sorted(read_rows(arguments.files).items()))
    rows = [row for problems in by_dim.values() for named in problems.values() for of in named.values() for row in of]
    names = sorted(dict.fromkeys(row["contender"] for row in rows), key=lambda name: not name.startswith(OURS))
    colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    keys = [key for key in DIRECTIONS if any(key in row for row in rows)]
    figure, panels = pyplot.subplots(
        len(by_dim), len(keys), figsize=(5.5 * len(keys), 3.2 * len(by_dim) + 0.8), layout="constrained", squeeze=False
    )
    bars: dict[str, Any] = {}
    for (head_dim, problems), of_dim in zip(by_dim.items(), panels, strict=True):
        for key, axes in zip(keys, of_dim, strict=True):
            for place, contenders in enumerate(problems.values()):
                present = [name for name in names if name in contenders]
                width = 0.85 / len(present)
                for index, name in enumerate(present):
                    speeds = [DIRECTIONS[key][1] * case_of(row).flops() / row[key] / 1e9 for row in contenders[name]]
                    middle = statistics.median(speeds)
                    spread = [[middle - min(speeds)], [max(speeds) - middle]] if len(speeds) > 1 else None
                    bars[name] = axes.bar(
                        place + width * (index - (len(present) - 1) / 2), middle, 0.92 * width, color=colours[name],
                        yerr=spread, hatch=None if contenders[name][0]["cosine"] else "//", edgecolor="white",
                    )  # fmt: skip
            axes.set_xticks(range(len(problems)), list(problems), fontsize="small")
            axes.set(ylabel="TFLOP/s", title=f"{DIRECTIONS[key][0]}, head dim {head_dim}")
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
    figure.legend([bars[name] for name in names], names, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(arguments.plot, dpi=110)
    pyplot.close(figure)
    print(f"plot: {arguments.plot}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(prog="python -m scripts.plot_rows", description="Draw windows, packed sequences or padding.")
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="of scripts.benchmark")
    parser.add_argument("--plot", required=True, type=Path, help="the PNG to write")
    return run_script(parser, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
