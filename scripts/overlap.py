"""How much of a text's held-out splits its training split has, too: ``python -m scripts.overlap TEXT``.

A byte counts if it lies in a string of N bytes that also stands in the training split. A model that knows the training
split by heart predicts such bytes for nothing, so a bits per byte of few epochs and one of many say different things
where there are many of them; ``scripts.evaluate --unseen`` has that of the others, too. The splits are those of
``data=file data.path=TEXT``.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.files import file
from scripts import Parser, integer, run_script

LENGTH = 48  # bytes: some eight words
PIECE = 1 << 23  # bytes of the training split at once: what bounds the memory
FACTOR = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)  # odd: no power is 0 modulo 2^64; an array may overflow
TABLE_BITS = 27
SHIFT = np.uint64(64 - TABLE_BITS)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the share of val and of test; returns the exit code."""
    parser = Parser(prog="python -m scripts.overlap", description=__doc__.partition("\n")[0])
    parser.add_argument("text", metavar="TEXT", type=Path, help="a file or a folder, as for data.path")
    parser.add_argument(
        "--length", metavar="N", type=integer(1), default=LENGTH, help=f"of a string, in bytes (default: {LENGTH})"
    )
    return run_script(parser, measure, argv)


def measure(arguments: argparse.Namespace) -> None:
    """Cuts the text as training does, and prints a line a split."""
    if not arguments.text.exists():
        raise ValueError(f"TEXT must be a file or a folder, got {str(arguments.text)!r}")
    corpus = file(str(arguments.text))
    for split in ("val", "test"):
        share = seen(corpus.train, getattr(corpus, split), arguments.length).mean()
        print(f"{split}: {share:.1%} of {len(getattr(corpus, split)):,} bytes, by strings of {arguments.length}")


def seen(train: np.ndarray, held_out: np.ndarray, length: int) -> np.ndarray:
    """Which bytes of held_out lie in a string of `length` bytes that train has: bool; all are 1-D, those two uint8.

    Strings are compared by 64-bit hashes: of 90 million and 5 million, 25 in a million pairs of texts would have one
    that is wrong.
    """
    if length > len(held_out) or length > len(train):
        return np.zeros(len(held_out), dtype=bool)
    strings = hashes(held_out, length)
    wanted = np.unique(strings)
    begins = np.zeros(1 << TABLE_BITS, dtype=bool)  # by the first bits: most of train is ruled out without a search
    begins[wanted >> SHIFT] = True
    found = np.zeros(len(wanted), dtype=bool)
    for piece in pieces(train, length):
        possible = hashes(piece, length)
        possible = possible[begins[possible >> SHIFT]]
        place = np.minimum(np.searchsorted(wanted, possible), len(wanted) - 1)
        found[place[wanted[place] == possible]] = True
    in_train = found[np.searchsorted(wanted, strings)]
    # +1 where a string begins, -1 behind its end: the sum is how many a byte lies in.
    edges = np.zeros(len(held_out) + 1, dtype=np.int64)
    edges[: len(in_train)] += in_train
    edges[length : length + len(in_train)] -= in_train
    return np.cumsum(edges[:-1]) > 0


def pieces(data: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Pieces that overlap by length - 1 bytes, so that each string is whole in one of them."""
    for first in range(0, len(data) - length + 1, PIECE):
        yield data[first : first + PIECE + length - 1]


def hashes(data: np.ndarray, length: int) -> np.ndarray:
    """A polynomial hash modulo 2^64 of each string of `length` bytes: (len(data) - length + 1,) uint64."""
    block, size, factor = data.astype(np.uint64) + np.uint64(1), 1, FACTOR  # of strings of `size`, doubled each time
    result, done = np.zeros(len(data) + 1, dtype=np.uint64), 0
    while True:
        if length & size:
            number = len(data) - done - size + 1
            result, done = result[:number] * factor + block[done : done + number], done + size
        if done == length:
            return result
        block, size, factor = block[:-size] * factor + block[size:], 2 * size, factor * factor


if __name__ == "__main__":
    sys.exit(main())
