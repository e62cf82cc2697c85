"""Bits per byte of a run on a whole split: ``python -m scripts.evaluate runs/quickstart --split val``.

Bits per byte = sum of -ln p over scored bytes / (number of scored bytes * ln 2), summed in float64. Every
byte of the split but byte 0, which nothing precedes, is scored exactly once, in one of two modes; results of
different modes, seq_len or S must not be compared:

chunk    non-overlapping windows of seq_len, as validation in training: 1 to seq_len bytes of context.
slide-S  windows of seq_len that advance by S and score their last S bytes, the first window all of its bytes:
         behind the first window seq_len - S + 1 to seq_len bytes of context. S = seq_len is chunk.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from conf.schema import builder
from data.bytes import IGNORE_INDEX, Corpus, EvalBatches
from models.gpt import GPT
from models.training.batching import default_micro_batch_tokens
from models.training.devices import choose_precision
from models.training.load import find_checkpoint, load_model
from models.training.run_files import read_record
from models.training.tables import print_line, show
from scripts import Parser, autocast, choose_device, integer, run_script

NUM_BUCKETS = 8  # octaves of context length, the shortest holding the rest


def main(argv: Sequence[str] | None = None) -> int:
    """Prints bits per byte and how they fall with the context; returns the exit code."""
    parser = Parser(prog="python -m scripts.evaluate", description="Bits per byte of a run on a split.")
    parser.add_model_arguments()
    parser.add_argument("--split", choices=("val", "test"), default="val", help="default: val")
    parser.add_argument(
        "--seq-len", metavar="N", type=integer(1), help="window in bytes, at most the run's seq_len (default)"
    )
    parser.add_argument(
        "--stride", metavar="S", type=integer(1), help="mode slide-S, S <= seq_len (default: mode chunk)"
    )
    parser.add_argument(
        "--batch-size",
        metavar="B",
        type=integer(1),
        help="windows at once (default: about as many as in training)",
    )
    parser.add_argument("--max-bytes", metavar="N", type=integer(2), help="the first N bytes of the split")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result to FILE, too")
    return run_script(parser, evaluate, argv)


def evaluate(arguments: argparse.Namespace) -> None:
    """Rebuilds model and corpus of the run, scores the split, prints the result and writes it as JSON."""
    device = choose_device(arguments.device)
    gpt, config = load_model(arguments.run, arguments.checkpoint, device)
    seq_len, stride = window(arguments.seq_len, arguments.stride, config.seq_len)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"--json must be a file in an existing folder, got {str(arguments.json)!r}")
    if arguments.split == "test":
        print("reminder: select by val; open test once, for the number you report", file=sys.stderr)
    corpus = rebuild_corpus(arguments.run, config)
    data = getattr(corpus, arguments.split)[: arguments.max_bytes]
    tokens = config.micro_batch_tokens or default_micro_batch_tokens(cuda=device.type == "cuda")
    batch_size = arguments.batch_size or max(1, tokens // seq_len)
    if stride is None:
        batches = EvalBatches(data, seq_len, batch_size, rank=0, world_size=1)
    else:
        batches = SlidingBatches(data, seq_len, stride, batch_size)
    precision = choose_precision(config.trainer.precision, cuda=device.type == "cuda")
    with autocast(device, precision):
        score = score_batches(gpt, batches, seq_len)
    setting = {
        "run": str(arguments.run),
        "checkpoint": str(find_checkpoint(arguments.run, arguments.checkpoint)),
        "corpus": corpus.name,
        "sha256": corpus.provenance["sha256"],
        "split": arguments.split,
        "mode": "chunk" if stride is None else f"slide-{stride}",
        "seq_len": seq_len,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "torch": torch.__version__,
    }
    print_score(setting, score)
    if arguments.json is not None:
        numbers = {"scored_bytes": score.scored_bytes, "bits_per_byte": score.bits_per_byte}
        numbers["by_context"] = [asdict(bucket) for bucket in score.by_context()]
        arguments.json.write_text(json.dumps({**setting, **numbers}, indent=2) + "\n")


def window(seq_len: int | None, stride: int | None, trained_seq_len: int) -> tuple[int, int | None]:
    """The window's length and stride, None for chunk mode. ValueError: more than the model can see."""
    if seq_len is not None and seq_len > trained_seq_len:
        raise ValueError(f"--seq-len must be at most the run's seq_len = {trained_seq_len}, got {seq_len}")
    seq_len = seq_len or trained_seq_len
    if stride is not None and stride > seq_len:
        raise ValueError(f"--stride must be at most the window's seq_len = {seq_len}, got {stride}")
    return seq_len, stride


def rebuild_corpus(run: str | Path, config: DictConfig) -> Corpus:
    """The corpus of the run's configuration, if it still is the bytes that the run was trained on.

    Raises:
        ValueError: it cannot be rebuilt, or its SHA-256 is not the one in the run's record.
    """
    trained_on = read_record(run).get("corpus", {}).get("sha256")
    if trained_on is None:
        raise ValueError(f"{str(run)!r} does not record its corpus: it ended before its data was read")
    try:
        corpus = builder(config, "data")()
    except (ValueError, OSError) as error:
        raise ValueError(f"the run's corpus cannot be rebuilt: {error}") from error
    got = corpus.provenance["sha256"]
    if got != trained_on:
        raise ValueError(
            f"the corpus is not the one the run was trained on: {corpus.name} now has SHA-256 {got}, "
            f"the run records {trained_on}"
        )
    return corpus


class SlidingBatches:
    """Batches (inputs, targets), each (batch_size, seq_len) int64, of overlapping windows; see slide-S above.

    Window i is fed bytes [i * stride, i * stride + seq_len) and has that range moved on by one as targets, of
    which those that window i - 1 scored are IGNORE_INDEX. Behind the end of the data it is as in EvalBatches.
    """

    def __init__(self, data: np.ndarray, seq_len: int, stride: int, batch_size: int) -> None:
        self.data = data
        self.seq_len = seq_len
        self.stride = stride
        self.batch_size = batch_size
        behind_first = max(0, len(data) - 1 - seq_len)  # targets that the first window does not reach
        self.num_windows = 1 + -(-behind_first // stride)

    def __len__(self) -> int:
        return -(-self.num_windows // self.batch_size)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        inputs = torch.zeros(self.batch_size, self.seq_len, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        first = index * self.batch_size
        for row, number in enumerate(range(first, min(first + self.batch_size, self.num_windows))):
            start = number * self.stride
            chunk = torch.from_numpy(self.data[start : start + self.seq_len + 1].astype(np.int64))
            length = len(chunk) - 1
            scored_from = self.seq_len - self.stride if number else 0
            inputs[row, :length] = chunk[:-1]
            targets[row, scored_from:length] = chunk[1 + scored_from :]
        return inputs, targets


@dataclass(frozen=True)
class Bucket:
    """Bits per byte of the bytes that were predicted from shortest to longest bytes of context."""

    shortest: int
    longest: int
    scored_bytes: int
    bits_per_byte: float


@dataclass(frozen=True)
class Score:
    """Sums by position in the window; a byte at position p was predicted from p + 1 bytes.

    Attributes:
        nats: (seq_len,) float64, the sum of -ln p.
        scored: (seq_len,) int64, the number of bytes.
    """

    nats: Tensor
    scored: Tensor

    @property
    def scored_bytes(self) -> int:
        """All of them."""
        return int(self.scored.sum())

    @property
    def bits_per_byte(self) -> float:
        """Over all scored bytes."""
        return self.nats.sum().item() / (self.scored_bytes * math.log(2))

    def by_context(self) -> list[Bucket]:
        """The curve by context length: octaves down from seq_len, the shortest joined in one bucket."""
        ends = sorted({len(self.nats) >> octave for octave in range(NUM_BUCKETS)} - {0})
        buckets = []
        for start, end in zip([0, *ends], ends, strict=False):
            part = Score(self.nats[start:end], self.scored[start:end])
            if part.scored_bytes:  # none where the split is shorter than the window
                buckets.append(Bucket(start + 1, end, part.scored_bytes, part.bits_per_byte))
        return buckets


@torch.no_grad()
def score_batches(gpt: GPT, batches: EvalBatches | SlidingBatches, seq_len: int) -> Score:
    """Scores every target that is not IGNORE_INDEX, in the precision of the autocast around the call."""
    device = gpt.embedding.weight.device
    nats = torch.zeros(seq_len, dtype=torch.float64, device=device)
    scored = torch.zeros(seq_len, dtype=torch.int64, device=device)
    progress = Console(stderr=True)
    for inputs, targets in track(
        batches, "evaluating", console=progress, transient=True, disable=not progress.is_terminal
    ):
        targets = targets.to(device)
        logits = gpt(inputs.to(device))  # (batch_size, seq_len, 256) float32
        losses = F.cross_entropy(logits.mT, targets, reduction="none")  # (batch_size, seq_len), 0 if ignored
        nats += losses.sum(dim=0, dtype=torch.float64)
        scored += (targets != IGNORE_INDEX).sum(dim=0)
    return Score(nats.cpu(), scored.cpu())


def print_score(setting: dict[str, str | int], score: Score) -> None:
    """Prints what was measured, the number, and the curve by context length."""
    numbers = {"scored bytes": f"{score.scored_bytes:,}", "bits per byte": f"{score.bits_per_byte:.6f}"}
    for key, value in {**setting, **numbers}.items():
        print_line(f"{key:<14} {value}")
    curve = Table(title=f"by context length, {setting['mode']}")
    for heading in ("bytes of context", "scored bytes", "bits per byte"):
        curve.add_column(heading, justify="right")
    for bucket in score.by_context():
        lengths = " - ".join(map(str, sorted({bucket.shortest, bucket.longest})))
        curve.add_row(lengths, f"{bucket.scored_bytes:,}", f"{bucket.bits_per_byte:.4f}")
    show(curve)


if __name__ == "__main__":
    sys.exit(main())
