"""The flags of the predecessor's train.py, each with the keys that say the same here."""

import shlex
import sys
from collections.abc import Sequence

# --seq-len has a value; --use-triton and --use-cuda-kernel both ask for a fused kernel, and here these are CUDA's.
KEYS = {
    "--seq-len": "seq_len",
    "--use-cuda-kernel": "attention.backend=cuda",
    "--use-triton": "attention.backend=cuda",
    "--use-float32": "trainer.precision=32-true",
}


def translate(arguments: Sequence[str]) -> list[str]:
    """The command line with each of the predecessor's flags replaced by what says the same, all else as it is."""
    line, words = [], iter(arguments)
    for word in words:
        flag, _, value = word.partition("=")
        if flag not in KEYS:
            line.append(word)
            continue
        replaced = KEYS[flag] if "=" in KEYS[flag] else f"{KEYS[flag]}={value or next(words, 'N')}"
        if replaced not in line:
            line.append(replaced)
    return line


def answer_flags(arguments: Sequence[str]) -> None:
    """Ends the program, with exit code 2 and the line to use, where it was given one of the predecessor's flags."""
    line = translate(arguments)
    if line != list(arguments):
        print(f"train.py takes KEY=VALUE: python train.py {shlex.join(line)}", file=sys.stderr)
        print("docs/migration.md has the predecessor's other commands", file=sys.stderr)
        sys.exit(2)
