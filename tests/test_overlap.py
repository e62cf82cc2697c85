"""scripts.overlap: which bytes of a held-out split lie in strings that the training split has."""

import re

import numpy as np
import pytest

from scripts import overlap


def plain(train, held_out, length):
    """The same, string by string."""
    train, held_out = bytes(train), bytes(held_out)
    inside = set()
    for first in range(len(held_out) - length + 1):
        if held_out[first : first + length] in train:
            inside.update(range(first, first + length))
    return [byte in inside for byte in range(len(held_out))]


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("piece", [5, 1000])  # many pieces, so that strings cross their ends; one
def test_bytes_are_those_of_every_string(length, piece, monkeypatch):
    monkeypatch.setattr(overlap, "PIECE", piece)
    rng = np.random.default_rng(length)
    letters = {1: 200, 3: 12, 8: 4}[length]  # so that some strings are in both, and most are not
    train, held_out = (rng.integers(0, letters, size=n, dtype=np.uint8) for n in (400, 90))
    held_out[30:50] = train[200:220]
    held_out[:20] = letters
    expected = plain(train, held_out, length)
    assert overlap.seen(train, held_out, length).tolist() == expected and any(expected) and not all(expected)


def test_texts_shorter_than_a_string_share_none():
    train, held_out = np.zeros(50, dtype=np.uint8), np.zeros(10, dtype=np.uint8)
    assert not overlap.seen(train, held_out, 11).any() and not overlap.seen(held_out, train, 11).any()
    assert overlap.seen(train, held_out, 10).all() and overlap.seen(held_out, train, 10).all()


def test_command(tmp_path, capsys):
    text = bytes(np.random.default_rng(0).integers(0, 256, size=2000, dtype=np.uint8))
    text = text[:1900] + text[:30] + text[1930:]  # of test, the last 100 bytes, the first 30: 48 is the default length
    (tmp_path / "text").write_bytes(text)
    assert overlap.main([str(tmp_path / "text"), "--length", "20"]) == 0
    found = dict(re.findall(r"(\w+): ([\d.]+)% of 100 bytes, by strings of 20\n", capsys.readouterr().out))
    assert found == {"val": "0.0", "test": "30.0"}
    assert overlap.main([str(tmp_path / "none")]) == 2 and "none" in capsys.readouterr().err
