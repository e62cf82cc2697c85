"""The tables of a comparison: what stands in them, on a terminal and as Markdown."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.markup import escape
from rich.table import Table

from models.training import metrics
from models.training.tables import fits, print_line, show
from scripts import arms as of_arms
from scripts.arms import Arm, setting
from scripts.comparisons import (
    DIFFERENCE,
    FURTHER,
    LOSS,
    RATE,
    Baseline,
    Comparison,
    at_best_rates,
    best_of,
    difference,
)

PAIRED = "over the seeds that both have, in brackets how many; ± is the sample standard deviation of their differences"
UNPAIRED = (
    "two numbers in brackets: fewer than two seeds are shared, so it is the difference of the means over as many runs, "
    "± the root of the sum of the two variances"
)


@dataclass(frozen=True)
class Listing:
    """A table of arms, of texts.

    Attributes:
        title: what it shows.
        headings: of the columns.
        rows: the cells, a row an arm.
        names: how many columns, the first, say what a row is.
        best: of which rows LOSS is the lowest.
        notes: sentences that belong below it.
        arms: those of the rows.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int
    best: tuple[int, ...]
    notes: tuple[str, ...]
    arms: tuple[Arm, ...]

    def without(self, headings: Sequence[str]) -> "Listing":
        """Without some columns."""
        kept = [index for index, heading in enumerate(self.headings) if heading not in headings]
        return self._of(lambda row: [row[index] for index in kept], self.names)

    def without_deviations(self, headings: Sequence[str]) -> "Listing":
        """With the means alone under some headings."""
        cut = [heading in headings for heading in self.headings]
        rows = [
            [cell.split(" ± ")[0] if short else cell for cell, short in zip(row, cut, strict=True)] for row in self.rows
        ]
        return replace(self, rows=tuple(map(tuple, rows)))

    def with_short_ends(self) -> "Listing":
        """With ``1 of 3`` in place of how each of the three ended."""
        column = self.headings.index("n")
        rows = [(*row[:column], arm.share(), *row[column + 1 :]) for row, arm in zip(self.rows, self.arms, strict=True)]
        return replace(self, rows=tuple(rows))

    def with_one_name(self) -> "Listing":
        """With what says what a row is in one column."""
        return self._of(lambda row: [" ".join(row[: self.names]), *row[self.names :]], 1) if self.names else self

    def _of(self, change: Callable[[Sequence[str]], list[str]], names: int) -> "Listing":
        rows = tuple(tuple(change(row)) for row in self.rows)
        return replace(self, headings=tuple(change(self.headings)), rows=rows, names=names)


def listings(comparison: Comparison, title: str, baseline: Baseline | None) -> list[Listing]:
    """The table of all arms, and where learning rates differ that of each at the best of its own."""
    spread = "mean ± standard deviation over seeds" if any(len(arm.finished) > 1 for arm in comparison.arms) else ""
    whole = _listing(comparison, comparison.arms, _joined(title, spread), comparison.keys, baseline)
    chosen = at_best_rates(comparison.arms)
    return [whole, _of_best_rates(comparison, chosen, title, baseline)] if len(chosen) > 1 else [whole]


def _of_best_rates(
    comparison: Comparison, chosen: Sequence[tuple[Arm, int]], title: str, baseline: Baseline | None
) -> Listing:
    arms = [arm for arm, _ in chosen]
    keys = [*(key for key in of_arms.differing(arms) if key != RATE), RATE]
    listing = _listing(comparison, arms, _joined(title, f"each at its best {RATE}"), keys, baseline, but=(RATE,))
    after = len(keys)
    rows = [(*row[:after], str(rates), *row[after:]) for row, (_, rates) in zip(listing.rows, chosen, strict=True)]
    headings = (*listing.headings[:after], "rates", *listing.headings[after:])
    note = f"{RATE}: of as many rates as ran, of those with most seeds, that of the lowest mean {LOSS}, on these bytes"
    return replace(listing, headings=headings, rows=tuple(rows), notes=(note, *listing.notes))


def _joined(*texts: str) -> str:
    return "; ".join(filter(None, texts))


def _listing(
    comparison: Comparison,
    arms: Sequence[Arm],
    title: str,
    keys: Sequence[str],
    baseline: Baseline | None,
    *,
    but: Sequence[str] = (),
) -> Listing:
    numbers = metrics.headings(compared=True)
    headings, rows = [*keys, "n", *numbers], [_cells(arm, keys, numbers) for arm in arms]
    best = {id(arm) for arm in best_of(arms)}
    listing = Listing(
        title,
        tuple(headings),
        tuple(map(tuple, rows)),
        len(keys),
        tuple(index for index, arm in enumerate(arms) if id(arm) in best),
        _notes_on(arms),
        tuple(arms),
    )
    return listing if baseline is None else _with_differences(listing, comparison, baseline, but)


def _cells(arm: Arm, keys: Sequence[str], numbers: Sequence[str]) -> list[str]:
    return [*(setting(arm, key) for key in keys), arm.ends(), *map(arm.cell, numbers)]


def _notes_on(arms: Sequence[Arm]) -> tuple[str, ...]:
    notes = []
    lengths = {arm.settings.get("seq_len") for arm in arms}
    if len(lengths) > 1:
        notes.append(f"a longer context makes bytes easier to predict: the lowest {LOSS} is marked for each seq_len")
    devices = {run.record.get("device") for arm in arms for run in arm.finished}
    if len(devices) > 1:
        notes.append(f"{' and '.join(FURTHER)} are of several machines: {', '.join(sorted(map(str, devices)))}")
    again = [run.name for arm in arms for run in arm.repeated]
    if again:
        those = "1 run does not count, for its" if len(again) == 1 else f"{len(again)} runs do not count, for their"
        notes.append(f"{those} seed ran again later: {', '.join(again)}")
    return tuple(notes)


def _with_differences(listing: Listing, comparison: Comparison, baseline: Baseline, but: Sequence[str]) -> Listing:
    after = listing.headings.index(LOSS) + 1
    if baseline.key in but:  # of lr=VALUE the table of best rates may have no arm, or only another one's
        but = ()
    # a run or a rate that is named need not be the best
    among = listing.arms if but and baseline.key is not None else comparison.arms
    found, alone = [], False
    for arm in listing.arms:
        other = baseline.of(arm, among, but=but)
        alone = alone or other is None
        value = None if other is None else difference(arm, other)
        found.append("baseline" if other is arm else "-" if value is None else str(value))
    rows = tuple((*row[:after], cell, *row[after:]) for row, cell in zip(listing.rows, found, strict=True))
    headings = (*listing.headings[:after], DIFFERENCE, *listing.headings[after:])
    against = f"that of {baseline.text}" if baseline.key is None else f"that of the same with {baseline.text}"
    if baseline.key is not None and but:
        against += f", at its own {', '.join(but)}"
    if all(cell == "-" for cell in found):
        return replace(
            listing, notes=(*listing.notes, f"{DIFFERENCE}: none, for no {LOSS} here compares with {against}")
        )
    notes = [f"{DIFFERENCE}: {LOSS} minus {against}, below 0 is better; {PAIRED}"]
    if baseline.key is not None and alone:
        notes.append(f"-: of no arm, or of more than one, is {baseline.key} all that sets it apart from this one")
    if any(cell.endswith(")") and "," in cell.rsplit("(", 1)[-1] for cell in found):
        notes.append(UNPAIRED)
    return replace(listing, headings=headings, rows=rows, notes=(*listing.notes, *notes))


def said_once(listings: Sequence[Listing]) -> list[Listing]:
    """The tables without the notes that stand below one before."""
    said: set[str] = set()
    shown = []
    for listing in listings:
        shown.append(replace(listing, notes=tuple(note for note in listing.notes if note not in said)))
        said |= {*listing.notes}
    return shown


def show_listings(listings: Sequence[Listing]) -> None:
    """Prints them, and says what a narrow terminal has no room for."""
    for listing in said_once([_fitting(listing) for listing in listings]):
        show(_table(listing), names=listing.names)
        for note in listing.notes:
            print_line(note)


def _fitting(listing: Listing) -> Listing:
    """The widest form of the table that fits, with a note on what it lacks."""
    tried = _narrower(listing)
    fitting = (pair for pair in tried if fits(_table(pair[0]), names=pair[0].names))
    shown, cut = next(fitting, tried[-1])
    note = f"not shown for want of room: {cut}; --html, --markdown and a pipe have it"
    return replace(shown, notes=(note, *shown.notes)) if cut else shown


def _narrower(listing: Listing) -> list[tuple[Listing, str]]:
    """The table in ever fewer columns of text, and what each lacks."""
    further = " and ".join(heading for heading in FURTHER if heading in listing.headings)
    short = listing.with_short_ends()  # loses nothing: who did not finish, and how, is said below the tables
    means = short.without_deviations(FURTHER)
    return [
        (listing, ""),
        (short, ""),
        (means, f"the ± of {further}"),
        (means.with_one_name(), f"the ± of {further}"),
        (short.without(FURTHER).with_one_name(), further),
    ]


def _table(listing: Listing) -> Table:
    columns = Table(title=listing.title)
    left = {*listing.headings[: listing.names]}
    for heading in listing.headings:
        columns.add_column(heading, justify="left" if heading in left else "right")
    loss = listing.headings.index(LOSS)
    for index, row in enumerate(listing.rows):
        cells = [escape(cell) for cell in row]
        if index in listing.best:
            cells[loss] = f"[bold]{cells[loss]}[/]" if sys.stdout.isatty() else f"* {cells[loss]}"
        columns.add_row(*cells)
    return columns


def markdown(listing: Listing) -> str:
    """The same for a README, its title and notes too."""
    loss = listing.headings.index(LOSS)
    rows = [
        [f"**{cell}**" if index in listing.best and column == loss else cell for column, cell in enumerate(row)]
        for index, row in enumerate(listing.rows)
    ]
    title = f"{listing.title}\n\n" if listing.title else ""
    notes = "".join(f"\n{note}\n" for note in listing.notes)
    return f"{title}{of_arms.markdown(listing.headings, rows)}{notes}"
