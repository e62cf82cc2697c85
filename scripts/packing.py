"""Lengths of packed sequences: those that are measured, and how a command line names them."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIST = re.compile(r"\d+(x\d+)?(,\d+(x\d+)?)*")
ACCEPTED = "lengths such as 8x2048 or 300,0,700, of which one is not 0, or a JSON file with lists of lengths"


def seeded_lengths(
    seed: int = 0, count: int = 10, total: int = 16384, shortest: int = 64, longest: int = 4096
) -> list[list[int]]:
    """``count`` lists of lengths that add up to ``total``: docs/results/packed/lengths.json has those of seed 0.

    As texts are, many are short and few are long: the logarithm is uniform from ``shortest`` to ``longest``, but of the
    last one, which is what is left.
    """
    generator = random.Random(seed)
    lists = []
    for _ in range(count):
        lengths, left = [], total
        while left:
            length = int(shortest * (longest / shortest) ** generator.random())
            if left - length < shortest:  # too short, or less than nothing
                length = left if left <= longest else left - shortest
            lengths.append(length)
            left -= length
        lists.append(lengths)
    return lists


def read_lengths(text: str) -> list[tuple[int, ...]]:
    """The lists that an argument names: one that it spells, or those of a JSON file. Raises ValueError, OSError."""
    if LIST.fullmatch(text):
        lists: Any = [[int(length) for part in text.split(",") for length in _repeated(part)]]
    else:
        try:
            lists = json.loads(Path(text).read_text())
        except FileNotFoundError:
            raise ValueError(f"--packed must be {ACCEPTED}; got {text!r}, and there is no such file") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"--packed must be {ACCEPTED}; {text} is not JSON: {error}") from None
    if not isinstance(lists, list) or not lists or not all(map(_are_lengths, lists)):
        raise ValueError(f"--packed must be {ACCEPTED}; got {text}")
    return [tuple(lengths) for lengths in lists]


def _repeated(part: str) -> list[str]:
    count, _, length = part.rpartition("x")
    return [length] * int(count or 1)


def _are_lengths(lengths: Any) -> bool:
    return isinstance(lengths, list) and all(type(length) is int and length >= 0 for length in lengths) and any(lengths)


def scaled(lengths: Sequence[int], share: float) -> tuple[int, ...]:
    """Shorter ones in proportion; what is longer than 0 stays so."""
    return tuple(scaled_one(length, share) for length in lengths)


def scaled_one(length: int, share: float) -> int:
    """One of them; -1, which is unlimited, stays so, too."""
    return max(1, round(share * length)) if length > 0 else length


def described(lengths: Sequence[int]) -> str:
    """``8 x 2048``, or ``17 of 64 to 3710``."""
    shortest, longest = min(lengths), max(lengths)
    return f"{len(lengths)} x {longest}" if shortest == longest else f"{len(lengths)} of {shortest} to {longest}"
