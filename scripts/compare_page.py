"""A comparison as one HTML file that needs nothing else: tables, plots, texts, configurations, failures, versions."""

import datetime
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.colors import to_hex
from omegaconf import OmegaConf

from conf.secrets import redact_tree
from models.training.identity import flat, is_said_above
from models.training.report import Results, cells, headings
from models.training.run_files import SAMPLES_FILE, read_samples
from scripts import compare_plots
from scripts.compare_tables import Listing, said_once
from scripts.comparisons import LOSS, Comparison, counts

TEMPLATE = "compare_page.html"


def page(runs: Sequence[Results], comparisons: Sequence[Comparison], listings: Sequence[Sequence[Listing]]) -> str:
    """The page.

    Args:
        runs: all of them, also those that are in no comparison.
        listings: of each comparison its tables.
    """
    # autoescape: names, texts and errors are anybody's; the plots alone are marked as safe in the template
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    configurations = [redact_tree(run.configuration) for run in runs]
    return environment.get_template(TEMPLATE).render(
        title=counts(runs),
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        parts=_parts(comparisons, listings),
        unfinished=[_end(run) for run in runs if run.status != "finished"],
        headings=headings(),
        runs=[_run(run, configuration) for run, configuration in zip(runs, configurations, strict=True)],
        common=_common(configurations),
        differing=_differing(configurations),
        places=_places(runs),
    )


def _parts(comparisons: Sequence[Comparison], listings: Sequence[Sequence[Listing]]) -> list[dict[str, Any]]:
    once = iter(said_once(list(itertools.chain(*listings))))
    own = [[next(once).with_short_ends() for _ in tables] for tables in listings]
    return [_part(number, *pair) for number, pair in enumerate(zip(comparisons, own, strict=True), start=1)]


def _part(number: int, comparison: Comparison, listings: Sequence[Listing]) -> dict[str, Any]:
    """What the template shows of one comparison."""
    with matplotlib.rc_context(compare_plots.STYLE):
        shown, note = compare_plots.chosen(comparison)
        figures = compare_plots.single_panels(comparison, shown)
        plots = [
            (name, compare_plots.as_svg(figure, f"plot-{number}-{index}"))
            for index, (name, figure) in enumerate(figures.items())
        ]
    colors = {id(one.arm): to_hex(one.color) for one in shown}
    return {
        "tables": [_table(listing, colors) for listing in listings],
        "plots": plots,
        "note": note,
        "legend": [(to_hex(one.color), one.name, one.arm.share()) for one in shown],
        "dotted": any(run.status != "finished" for one in shown for run in one.arm.runs),
    }


def _table(listing: Listing, colors: dict[int, str]) -> dict[str, Any]:
    loss = listing.headings.index(LOSS)
    rows = [
        {"color": colors.get(id(arm)), "cells": cells, "best": loss if index in listing.best else None}
        for index, (arm, cells) in enumerate(zip(listing.arms, listing.rows, strict=True))
    ]
    return {
        "title": listing.title,
        "headings": listing.headings,
        "names": listing.names,
        "rows": rows,
        "notes": listing.notes,
    }


def _end(run: Results) -> dict[str, Any]:
    step = run.last("step")
    return {
        "name": run.name,
        "status": run.status,
        "step": "-" if step is None else f"{step:.0f}",
        "error": str(run.record.get("error") or ""),
    }


def _run(run: Results, configuration: dict[str, Any] | None) -> dict[str, Any]:
    seconds = run.record.get("wall_seconds")  # runs of earlier versions have none
    return {
        "name": run.name,
        "status": run.status,
        "cells": cells(run),
        "command": run.record.get("command") or "not recorded",
        "started": run.record.get("started") or "not recorded",
        "minutes": f"{seconds / 60:.1f}" if seconds else None,
        "configuration": None if configuration is None else OmegaConf.to_yaml(configuration),
        "sample": _sample(run),
    }


def _sample(run: Results) -> dict[str, Any] | None:
    """The last text that the run wrote, or what is wrong with the file; None if there is none."""
    try:
        samples = read_samples(run.folder / SAMPLES_FILE)
    except (ValueError, OSError) as error:
        return {"step": None, "text": f"{SAMPLES_FILE} cannot be read: {error}"}
    return {"step": samples[-1][0], "text": samples[-1][1]} if samples else None


def _values(configurations: Sequence[dict[str, Any] | None]) -> dict[str, list[str]]:
    """By dotted key the values that runs have, each once; a run that lacks the key has -."""
    known = [flat(configuration) for configuration in configurations if configuration is not None]
    keys = dict.fromkeys(key for one in known for key in one if not is_said_above(one, key))
    return {key: list(dict.fromkeys(str(one.get(key, "-")) for one in known)) for key in keys}


def _common(configurations: Sequence[dict[str, Any] | None]) -> list[tuple[str, str]]:
    return [(key, values[0]) for key, values in _values(configurations).items() if len(values) == 1]


def _differing(configurations: Sequence[dict[str, Any] | None]) -> list[tuple[str, str]]:
    return [(key, ", ".join(values)) for key, values in _values(configurations).items() if len(values) > 1]


def _places(runs: Sequence[Results]) -> list[dict[str, Any]]:
    """Commit, machine and versions, and which runs have them."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for run in runs:
        record = run.record
        commit = record.get("git_commit") or "not recorded"
        versions = {"python": record.get("python"), "CUDA": record.get("cuda"), **(record.get("versions") or {})}
        place = {
            "commit": f"{commit}{' and changes that were not committed' if record.get('git_dirty') else ''}",
            "machine": record.get("device") or "not recorded",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version)
            or "not recorded",
            "corpus": _corpus(record.get("corpus") or {}),
        }
        found[tuple(place.items())].append(run.name)
    return [{"facts": facts, "runs": names} for facts, names in found.items()]


def _corpus(corpus: dict[str, Any]) -> str:
    if not corpus.get("sha256"):
        return "not recorded"
    sizes = [
        f"{corpus[f'{split}_bytes']:,} {split}" for split in ("train", "val", "test") if f"{split}_bytes" in corpus
    ]
    return f"{corpus.get('name')}, SHA-256 {corpus['sha256']}, bytes: {', '.join(sizes)}"
