"""What people read on a terminal: tables that lose nothing at any width, and output that no character can stop."""

import codecs
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

NOTHING = ("", "-")  # a cell without content
# What stands for characters of our own where the output's encoding lacks them; for every other, a question mark.
PLAIN = {"±": "+-", "…": "...", "─": "-", "━": "-", "│": "|", "•": "*", "×": "x"}


def show_any_character() -> None:
    """From here on characters that stdout or stderr cannot encode are replaced, instead of ending the program."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in text), error.end


def outlive_the_reader() -> None:
    """From here on a pipe whose reader has gone, as `| head` does, ends no program: what follows is dropped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # with python -u the buffer itself
        if isinstance(raw, io.FileIO):
            stream.flush()
            settings = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
            sink = _ToAReader(raw)
            setattr(sys, name, io.TextIOWrapper(sink if raw is buffer else io.BufferedWriter(sink), **settings))


class _ToAReader(io.RawIOBase):
    """A file whose place nothing takes once it is a pipe that nobody reads."""

    def __init__(self, raw: io.RawIOBase):
        self._raw = raw

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: memoryview) -> int | None:
        try:
            return self._raw.write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            with suppress(OSError):
                os.write(2, b"the reader of this program's output has gone: what follows is not shown\n")
            return len(data)


class _Console(Console):
    """Leaves a pipe whose reader has gone to the program; rich's own ends it there, with 1."""

    def on_broken_pipe(self) -> None:
        raise  # what is being handled where rich calls this


def console() -> Console:
    """Where reports are printed: as wide as the terminal; in a file or a pipe lines of text break at 120."""
    return _Console(width=None if sys.stdout.isatty() else 120)


def fits(table: Table, *, names: int = 1) -> bool:
    """Whether ``show`` has room for the table as it is, but for headings that break between words."""
    if not sys.stdout.isatty():
        return True
    whole = _whole(*_texts(table), names)
    return not whole.rows or _broken(whole).width <= console().width


def show(table: Table, *, names: int = 1) -> None:
    """Prints a table on stdout; what a terminal has no room for moves, and is never cut.

    Columns without content go. Where the rest is too wide, and until it is not: headings break between words, names
    are shortened to what differs, they become numbers with a legend below, and columns move to a second table. A file
    or a pipe has room for everything.

    Args:
        table: of texts (rich's markup); of each column its heading and where it is set count.
        names: so many columns, the first, say what a row is; the others are its numbers.
    """
    out = console()
    headings, rows = _texts(table)
    layout = lay_out(headings, rows, names=names, width=out.width if sys.stdout.isatty() else None)
    justify = {heading: column.justify for heading, column in zip(headings, table.columns, strict=True)}
    title = table.title or ""
    for index, part in enumerate(layout.parts):
        # As it is: a title may hold the name of somebody's file.
        shown = Table(title=Text(title if index == 0 else f"{title} (continued)", style="table.title"))
        for heading in part.headings:
            shown.add_column(Text(heading), justify=justify.get(heading.replace("\n", " "), "right"), no_wrap=True)
        for cells in part.rows:
            shown.add_row(*cells)
        # Wider than the terminal where not even one column fits: its lines break, and still nothing is lost.
        _Console(width=max(out.width, part.width)).print(shown)
    for line in layout.legend:
        print_line(line)


def _texts(table: Table) -> tuple[list[str], list[list[Text]]]:
    """Headings and rows."""
    columns = [[_text(column.header), *map(_text, column.cells)] for column in table.columns]
    return [column[0].plain for column in columns], [list(row) for row in zip(*columns, strict=True)][1:]


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text.from_markup(str(cell))


def print_line(text: str) -> None:
    """One line on stdout as it is, however long: no break within a path, which can then be copied."""
    console().print(Text(text), soft_wrap=True)


def decode(text: bytes) -> str:
    """Bytes as text; what is not UTF-8, or would steer a terminal, shows as the replacement character."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.decode("utf-8", errors="replace"))


@dataclass(frozen=True)
class Part:
    """One table, of text that fits: headings may hold line ends; names is how many columns, the first, are names."""

    headings: list[str]
    rows: list[list[Text]]
    names: int

    @property
    def width(self) -> int:
        """Of the table as rich draws it: a line and two spaces a column, and a last line."""
        cells = [[cell.plain for cell in row] for row in self.rows]
        columns = [[*heading.split("\n"), *column] for heading, *column in zip(self.headings, *cells, strict=True)]
        return sum(max(map(cell_len, column)) + 3 for column in columns) + 1


@dataclass(frozen=True)
class Layout:
    """The tables of one, and lines below them that give back what was shortened."""

    parts: list[Part]
    legend: list[str]


def lay_out(headings: Sequence[str], rows: Sequence[Sequence[Text]], *, names: int, width: int | None) -> Layout:
    """How a table is shown in so many columns of text (None: any number); see ``show``."""
    whole = _whole(headings, rows, names)
    if width is None or not rows:
        return Layout([whole], [])
    short, short_legend = _shortened(whole)
    numbered, legend = _numbered(whole)
    for part, lines in ((whole, []), (short, short_legend), (numbered, legend)):
        for tried in (part, _broken(part)):
            if tried.width <= width:
                return Layout([tried], lines)
    return Layout(_split(_broken(numbered), width), legend)


def _whole(headings: Sequence[str], rows: Sequence[Sequence[Text]], names: int) -> Part:
    """All columns but those of numbers without content."""
    kept = [
        index
        for index in range(len(headings))
        if index < names or not rows or any(row[index].plain not in NOTHING for row in rows)
    ]
    return Part([headings[index] for index in kept], [[row[index] for index in kept] for row in rows], names)


def _broken(part: Part) -> Part:
    """With headings of one word a line."""
    return Part([heading.replace(" ", "\n") for heading in part.headings], part.rows, part.names)


def _shortened(part: Part) -> tuple[Part, list[str]]:
    """With names without the beginning and the end that all share, and a line that gives these back."""
    if part.names != 1:
        return part, []
    names = [row[0].plain for row in part.rows]
    before, after = shared(names)
    if not before and not after:
        return part, []
    cut = [Text(name[len(before) : len(name) - len(after)]) for name in names]
    rows = [[name, *row[1:]] for name, row in zip(cut, part.rows, strict=True)]
    return Part(part.headings, rows, 1), [f"{part.headings[0]}: {before}*{after}"]


def shared(names: Sequence[str]) -> tuple[str, str]:
    """The beginning and the end that all names have in common, in whole parts between - and /; something is left."""
    if len(set(names)) < 2:
        return "", ""
    before, after = names[0], names[0]
    for name in names:
        while not name.startswith(before):
            before = before[:-1]
        while not name.endswith(after):
            after = after[1:]
    before = before[: max(before.rfind(mark) for mark in "-/") + 1]
    starts = [index for index, character in enumerate(after) if character in "-/"]
    after = after[starts[0] :] if starts else ""
    room = min(map(len, names)) - 1
    if len(before) > room:  # one name is the beginning of another
        return "", ""
    return before, after if len(before) + len(after) <= room else ""


def _numbered(part: Part) -> tuple[Part, list[str]]:
    """With numbers for names, and a line a number; without either where there is one row, whose name stands below."""
    if not part.names:
        return part, []
    names = [[cell.plain for cell in row[: part.names]] for row in part.rows]
    if part.names == 1:
        texts = [name for (name,) in names]
    else:
        pairs = [[pair for pair in zip(part.headings, cells, strict=False) if pair[1] != "-"] for cells in names]
        texts = [", ".join(f"{heading} {cell}" for heading, cell in named) for named in pairs]
    rest = [row[part.names :] for row in part.rows]
    if len(rest) == 1:
        line = f"{part.headings[0]}: {texts[0]}" if part.names == 1 else texts[0]
        return Part(part.headings[part.names :], rest, 0), [line]
    rows = [[Text(str(index)), *row] for index, row in enumerate(rest, start=1)]
    digits = len(str(len(rows)))
    return (
        Part(["", *part.headings[part.names :]], rows, 1),
        [f"{index:{digits}}  {text}" for index, text in enumerate(texts, start=1)],
    )


def _split(part: Part, width: int) -> list[Part]:
    """As many tables as it takes, each with the names, of as many columns as fit and at least one."""

    def take(columns: list[int]) -> Part:
        chosen = [*range(part.names), *columns]
        rows = [[row[index] for index in chosen] for row in part.rows]
        return Part([part.headings[index] for index in chosen], rows, part.names)

    parts: list[list[int]] = [[]]
    for column in range(part.names, len(part.headings)):
        if parts[-1] and take([*parts[-1], column]).width > width:
            parts.append([])
        parts[-1].append(column)
    return [take(columns) for columns in parts]
