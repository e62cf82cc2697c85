"""Continues a prompt with a trained run: ``python -m scripts.generate runs/quickstart --prompt "def "``.

The text is written to stdout, and how fast it came to stderr.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.gpt import GPT
from models.training.devices import choose_precision
from models.training.load import load_model
from models.training.tables import decode
from scripts import Parser, autocast, choose_device, integer, non_negative, run_script, share

DEFAULT_PROMPT = b"\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the prompt and its continuation; returns the exit code."""
    parser = Parser(prog="python -m scripts.generate", description="Continue a prompt by a run.")
    parser.add_model_arguments()
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="default: a newline; of a longer one the last seq_len bytes count"
    )
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="a file with the prompt, any bytes")
    parser.add_argument("--num-bytes", metavar="N", type=integer(0), default=512, help="default: 512")
    parser.add_argument(
        "--temperature", metavar="X", type=non_negative, default=0.8, help="0: the likeliest (default: 0.8)"
    )
    parser.add_argument("--top-k", metavar="K", type=integer(1), help="only the K likeliest bytes")
    parser.add_argument(
        "--top-p", metavar="P", type=share, help="only the fewest likeliest bytes whose probabilities sum to P or more"
    )
    parser.add_argument("--seed", metavar="N", type=integer(0), default=0, help="default: 0")
    parser.add_argument(
        "--num-samples",
        metavar="N",
        type=integer(1),
        default=1,
        help="texts, each with a seed of its own, from --seed upwards (default: 1)",
    )
    parser.add_argument("--no-cache", action="store_true", help="compute the context anew for each byte")
    return run_script(parser, generate, argv)


def generate(arguments: argparse.Namespace) -> None:
    """Loads the run's model, samples, and prints prompt and continuation as text, one text a seed."""
    prompt = read_prompt(arguments.prompt, arguments.prompt_file)
    if arguments.seed + arguments.num_samples > 2**63:
        raise ValueError(f"--seed + --num-samples must be at most 2^63, got {arguments.seed} + {arguments.num_samples}")
    device = choose_device(arguments.device)
    gpt, config = load_model(arguments.run, arguments.checkpoint, device)
    tokens = torch.tensor(list(prompt), device=device)[None]  # (1, n)
    precision = choose_precision(config.trainer.precision, cuda=device.type == "cuda")
    seconds = 0.0
    for seed in range(arguments.seed, arguments.seed + arguments.num_samples):
        start = time.perf_counter()
        with autocast(device, precision):
            new = continued(gpt, tokens, seed, arguments)  # (1, num_bytes)
        text = decode(prompt + bytes(new[0].tolist()))  # which waits for the device
        seconds += time.perf_counter() - start
        if arguments.num_samples > 1:
            print(f"--- seed {seed} ---")
        print(text, flush=True)
    num_bytes = arguments.num_samples * arguments.num_bytes
    if num_bytes:
        print(f"{num_bytes} bytes in {seconds:.2f} s: {num_bytes / seconds:,.0f} tokens/s", file=sys.stderr)


def continued(gpt: GPT, tokens: Tensor, seed: int, arguments: argparse.Namespace) -> Tensor:
    """What one seed makes of the prompt, (1, num_bytes): the same whichever other seeds are asked for."""
    return gpt.generate(
        tokens,
        arguments.num_bytes,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        generator=torch.Generator(tokens.device).manual_seed(seed),
        use_cache=not arguments.no_cache,
    )


def read_prompt(text: str | None, path: Path | None) -> bytes:
    """The bytes of --prompt or of --prompt-file, or a newline. Raises ValueError if there is not one byte."""
    if path is not None:
        if not path.is_file():
            raise ValueError(f"--prompt-file must be an existing file, got {str(path)!r}")
        prompt, source = path.read_bytes(), f"--prompt-file {str(path)!r}"
    elif text is not None:
        prompt, source = os.fsencode(text), "--prompt"  # the very bytes of the command line, UTF-8 or not
    else:
        prompt, source = DEFAULT_PROMPT, "the default"
    if not prompt:
        raise ValueError(f"{source} is empty; accepted: at least one byte to continue")
    return prompt


if __name__ == "__main__":
    sys.exit(main())
