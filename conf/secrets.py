"""What looks like a secret is not written down."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MASK = "***"
# The last part of a name: api_key, WANDB_API_KEY and hf-token, but not tokens_per_step.
WORD = r"(?:api[_-]?key|access[_-]?key|private[_-]?key|token|passwd|password|secret)"
NAME = re.compile(rf"(?:.*[^A-Za-z])?{WORD}", re.IGNORECASE)
# NAME=VALUE or NAME: VALUE inside a value, as in {WANDB_API_KEY:abc} and https://host/?token=abc
PAIR = re.compile(
    rf"(?<![A-Za-z])({WORD}[\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&}}\]]+)",
    re.IGNORECASE,
)
USER = re.compile(r"(?<=://)[^/\s]*@")  # https://user:password@host


def redact(text: str) -> str:
    """The text, with *** for each value whose name says that it is secret, and for the user of an address."""
    name, equals, _ = text.partition("=")
    if equals and NAME.fullmatch(name):  # a whole KEY=VALUE: the value may hold any character
        return f"{name}={MASK}"
    return USER.sub(f"{MASK}@", PAIR.sub(rf"\g<1>{MASK}", text))


def redact_words(words: Sequence[str]) -> list[str]:
    """A command line's words; of ``--token VALUE`` the value is the next one."""
    hidden = [False, *(word.startswith("-") and bool(NAME.fullmatch(word)) for word in words)]
    return [MASK if hide else redact(word) for word, hide in zip(words, hidden, strict=False)]


def redact_tree(tree: Any) -> Any:
    """Nested dicts and lists, with *** for what looks like a secret by its key or in itself."""
    if isinstance(tree, dict):
        secret = {key for key in tree if isinstance(key, str) and NAME.fullmatch(key)}
        return {key: MASK if key in secret else redact_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact_tree(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def redact_file(path: Path) -> None:
    """The lines of a file that Hydra wrote, of its own configuration, redacted in place."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        redacted = "\n".join(map(redact, text.split("\n")))
        if redacted != text:
            path.write_text(redacted, encoding="utf-8")


@contextmanager
def redacted_command_line() -> Iterator[None]:
    """For what records sys.argv on its own, as wandb does."""
    words = sys.argv
    sys.argv = [words[0], *redact_words(words[1:])]
    try:
        yield
    finally:
        sys.argv = words
