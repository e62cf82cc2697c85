"""Bits per byte of a run or a checkpoint, on a whole split or a file: ``python -m scripts.evaluate runs/quickstart``.

Bits per byte = sum of -ln p over scored bytes / (number of scored bytes * ln 2), summed in float64. Every
byte of the split but byte 0, which nothing precedes, is scored exactly once, in each of two modes; results of
different modes, seq_len or S must not be compared:

chunk    non-overlapping windows of seq_len, as validation in training: 1 to seq_len bytes of context.
slide-S  windows of seq_len that advance by S and score their last S bytes, the first window all of its bytes:
         behind the first window seq_len - S + 1 to seq_len bytes of context. S = seq_len is chunk.

Each result is a JSON file in the run's folder ``evaluations``, written as soon as it is there. Before a byte of the
test split is scored, a line in ``test_split.jsonl`` there says so, and each result is a further line with the same
time, so that it shows how often that was looked at, whatever became of the evaluation.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

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
from data.files import read_file
from models.gpt import GPT
from models.training.batching import default_micro_batch_tokens
from models.training.checkpoint_files import CHECKPOINT_FOLDER, write_text
from models.training.devices import choose_precision
from models.training.identity import plain_name
from models.training.load import find_checkpoint, read_model
from models.training.report import Results
from models.training.run_files import METRICS_FILE, read_csv, read_record
from models.training.tables import print_line, show
from scripts import Parser, autocast, check_file, choose_device, integer, run_script
from scripts.overlap import seen

NUM_BUCKETS = 8  # octaves of context length, the shortest holding the rest
STRIDE = 512  # what published results on enwik8 mostly slide by
FOLDER = "evaluations"  # of a run, where results go
TEST_LOG = "test_split.jsonl"  # in there


def main(argv: Sequence[str] | None = None) -> int:
    """Prints bits per byte and how they fall with the context; returns the exit code."""
    parser = Parser(
        prog="python -m scripts.evaluate",
        description="Bits per byte of a run on a split, by non-overlapping and by sliding windows. RUN may also be a "
        "checkpoint in a run's folder.",
    )
    parser.add_model_arguments()
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--split", choices=("val", "test"), default="val", help="default: val; an evaluation on test is logged"
    )
    text.add_argument("--text", metavar="FILE", type=Path, help="instead of a split all of a file: raw, .gz or .zip")
    parser.add_argument(
        "--seq-len", metavar="N", type=integer(1), help="window in bytes, at most the run's seq_len (default)"
    )
    parser.add_argument(
        "--mode", choices=("both", "chunk", "slide"), default="both", help="which windows (default: both)"
    )
    parser.add_argument(
        "--stride",
        metavar="S",
        type=integer(1),
        help=f"of sliding windows, S <= seq_len (default: {STRIDE}, or half the window where that is less)",
    )
    parser.add_argument(
        "--batch-size",
        metavar="B",
        type=integer(1),
        help="windows at once (default: about as many as in training)",
    )
    parser.add_argument("--max-bytes", metavar="N", type=integer(2), help="the first N bytes of the split")
    parser.add_argument(
        "--unseen",
        metavar="N",
        type=integer(1),
        help="also of those bytes alone that are in no string of N bytes which the training split has: 48, say",
    )
    parser.add_argument("--plot", action="store_true", help="draw bits per byte by context beside the results, too")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        help="write a list of the results to FILE, too; to it alone where the run's folder cannot be written",
    )
    return run_script(parser, evaluate, argv)


def evaluate(arguments: argparse.Namespace) -> None:
    """Rebuilds the model, scores the split or the text, prints the results and writes them into the run's folder."""
    if arguments.unseen is not None and arguments.text is not None:
        raise ValueError("--unseen is of a split of the run's corpus, and cannot be given with --text")
    device = choose_device(arguments.device)
    run, checkpoint = located(arguments.run, arguments.checkpoint)
    gpt, config, step = read_model(run, str(checkpoint), device)
    seq_len, strides = windows(arguments.mode, arguments.seq_len, arguments.stride, config.seq_len)
    check_file("--json", arguments.json)
    whole, source, train = text_of(arguments, run, config)
    data = whole[: arguments.max_bytes]
    folder, on_test = run / FOLDER, source["split"] == "test"
    kept = can_keep(folder, arguments, on_test=on_test)
    tokens = config.micro_batch_tokens or default_micro_batch_tokens(cuda=device.type == "cuda")
    batch_size = arguments.batch_size or max(1, tokens // seq_len)
    precision = choose_precision(config.trainer.precision, cuda=device.type == "cuda")
    setting = {
        "run": str(run),
        "checkpoint": str(checkpoint),
        "step": step,
        **source,
        "bytes": len(data),
        "seq_len": seq_len,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "torch": torch.__version__,
    }
    modes = {"chunk" if stride is None else f"slide-{stride}": stride for stride in strides}
    # All that is logged of one look has one time: to the microsecond, for several commands may start in a second.
    time = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    if on_test:
        remind(folder / TEST_LOG)
        append_line(folder / TEST_LOG, json.dumps({"time": time, **setting, "modes": list(modes)}))
    unseen = None
    if train is not None and arguments.unseen is not None:
        unseen = unseen_bytes(train, whole, arguments.unseen, arguments.max_bytes)
    of_unseen = "" if unseen is None else f"-unseen{arguments.unseen}"
    name, results = name_of(setting, run, checkpoint, trained_precision(run)), []
    try:
        for mode, stride in modes.items():
            cut = partial(_cut, seq_len=seq_len, stride=stride, batch_size=batch_size)
            with autocast(device, precision):
                score = score_batches(gpt, cut(data), seq_len, None if unseen is None else cut(unseen))
            result = result_of({**setting, "mode": mode}, score, arguments.unseen)
            results.append(result)
            path = folder / f"{name}-{mode}{of_unseen}.json"
            try:  # before it is printed: the output may be a pipe that closes
                if kept:
                    keep(path, result, time)
            finally:  # and though it cannot be kept: it took long
                print_score({**setting, "mode": mode}, score, arguments.unseen)
            if kept:
                print_line(f"result: {path}")
    finally:
        if arguments.json is not None and results:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot:
        path = folder / f"{name}.png"
        plot(results, path)
        print_line(f"plot: {path}")


def unseen_bytes(train: np.ndarray, whole: np.ndarray, string_bytes: int, max_bytes: int | None) -> np.ndarray:
    """A 1 for each byte that is in no string of so many bytes which the training split has, else a 0.

    Of the first max_bytes bytes; the strings are those of the whole split.

    Raises:
        ValueError: there is none that can be scored.
    """
    unseen = (~seen(train, whole, string_bytes)).astype(np.uint8)[:max_bytes]
    if not unseen[1:].any():
        raise ValueError(
            f"--unseen must leave bytes to score, got {string_bytes}: every byte is in a string of that length "
            "which the training split has"
        )
    return unseen


def result_of(setting: dict[str, Any], score: "Score", string_bytes: int | None) -> dict[str, Any]:
    """What is written of an evaluation; string_bytes: of --unseen."""
    numbers: dict[str, Any] = {"scored_bytes": score.scored_bytes, "bits_per_byte": score.bits_per_byte}
    if score.unseen is not None:
        numbers["unseen"] = {
            "string_bytes": string_bytes,
            "scored_bytes": score.unseen.scored_bytes,
            "bits_per_byte": score.unseen.bits_per_byte,
        }
    return {**setting, **numbers, "by_context": [asdict(bucket) for bucket in score.by_context()]}


def located(run: str, checkpoint: str) -> tuple[Path, Path]:
    """The folder and the checkpoint that RUN, a folder or a checkpoint in it, and --checkpoint name.

    Raises:
        ValueError: there is no such checkpoint, or two are named.
    """
    path = Path(run)
    if not path.is_file():
        return path, find_checkpoint(path, checkpoint)
    if checkpoint != "best":
        raise ValueError(f"RUN is a checkpoint, {run!r}: --checkpoint must not name another, got {checkpoint!r}")
    if path.parent.name != CHECKPOINT_FOLDER:
        raise ValueError(f"RUN must be a run's folder or a checkpoint in its {CHECKPOINT_FOLDER}/, got {run!r}")
    return path.parent.parent, find_checkpoint(path.parent.parent, run)


def windows(mode: str, seq_len: int | None, stride: int | None, trained_seq_len: int) -> tuple[int, list[int | None]]:
    """The windows' length, and the strides to score with, None for chunk. ValueError: more than the model can see."""
    if seq_len is not None and seq_len > trained_seq_len:
        raise ValueError(f"--seq-len must be at most the run's seq_len = {trained_seq_len}, got {seq_len}")
    seq_len = seq_len or trained_seq_len
    if stride is not None and stride > seq_len:
        raise ValueError(f"--stride must be at most the window's seq_len = {seq_len}, got {stride}")
    if stride is not None and mode == "chunk":
        raise ValueError(f"--stride is of sliding windows: --mode must be both or slide, got chunk and {stride}")
    stride = stride or max(1, min(STRIDE, seq_len // 2))
    return seq_len, {"both": [None, stride], "chunk": [None], "slide": [stride]}[mode]


def _cut(data: np.ndarray, *, seq_len: int, stride: int | None, batch_size: int) -> "EvalBatches | SlidingBatches":
    if stride is None:
        return EvalBatches(data, seq_len, batch_size, rank=0, world_size=1)
    return SlidingBatches(data, seq_len, stride, batch_size)


def text_of(
    arguments: argparse.Namespace, run: Path, config: DictConfig
) -> tuple[np.ndarray, dict[str, str], np.ndarray | None]:
    """The split or text, what it is, and the training split: of the run's corpus, or a file and None.

    Raises:
        ValueError: they cannot be had, or are fewer than the two that it takes to predict one.
    """
    if arguments.text is None:
        corpus = rebuild_corpus(run, config)
        source = {"corpus": corpus.name, "sha256": corpus.provenance["sha256"], "split": arguments.split}
        return getattr(corpus, arguments.split), source, corpus.train
    if not arguments.text.is_file():
        raise ValueError(f"--text must be a file, raw, .gz or .zip, got {str(arguments.text)!r}")
    data = read_file(arguments.text)
    if len(data) < 2:
        raise ValueError(f"--text must have at least 2 bytes, got {len(data)} in {str(arguments.text)!r}")
    source = {"corpus": arguments.text.name, "sha256": hashlib.sha256(data).hexdigest(), "split": "text"}
    return data, source, None


def can_keep(folder: Path, arguments: argparse.Namespace, *, on_test: bool) -> bool:
    """Makes the folder of results; False, with a warning, where it cannot be written and --json has them instead.

    Raises:
        ValueError: it cannot be written, and must be: of the test split, for a plot, or without --json.
    """
    try:
        folder.mkdir(exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        reason = error.strerror
    if reason is None:
        return True
    if on_test:
        raise ValueError(
            f"an evaluation on test is logged in the run's folder, and {str(folder)!r} cannot be written: {reason}"
        )
    if arguments.json is None or arguments.plot:
        raise ValueError(
            f"results go into the run's folder, and {str(folder)!r} cannot be written: {reason}; "
            "with --json FILE, and without --plot, they go there"
        )
    print(f"warning: {folder} cannot be written ({reason}): results go to {arguments.json} alone", file=sys.stderr)
    return False


def remind(log: Path) -> None:
    """Says how often the test split was looked at before."""
    print("reminder: select by val; open test once, for the number you report", file=sys.stderr)
    looks = _read_log(log) if log.is_file() else {}
    if looks:
        times = "once" if len(looks) == 1 else f"{len(looks)} times"
        time, entry = list(looks.items())[-1]
        said = "its line is damaged"
        if "bits_per_byte" in entry:
            said = f"{entry['mode']} of step {entry['step']} had {entry['bits_per_byte']:.4f} bits per byte"
        elif entry:
            said = f"step {entry['step']}, which left no result"
        print(f"warning: the test split was opened {times} before, last on {time}: {said} ({log})", file=sys.stderr)


def _read_log(log: Path) -> dict[str, dict[str, Any]]:
    """Of each look at the test split, by its time, the last line that can be read, if there is one.

    A command logs that it begins, and then each result, all with one time. A line that cannot be read, because its
    command was killed while it wrote it, is of the look that its time tells; without one it counts as one more.
    """
    looks: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(log.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
            looks[entry["time"]] = entry
        except (ValueError, LookupError, TypeError):
            found = re.match(r'\{"time": "([^"]+)"', line)
            looks.setdefault(found[1] if found else f"line {number}", {})
            more = "" if found else ", and is counted as one more time"
            print(f"warning: line {number} of {log} is damaged{more}", file=sys.stderr)
    return looks


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, below what another process was stopped in the middle of, if that is its end."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")


def keep(path: Path, result: dict[str, Any], time: str) -> None:
    """Writes a result into the run's folder, and logs it if it is on test. Says so where another number was there."""
    bits = f"{result['bits_per_byte']:.6f} bits per byte"
    with suppress(OSError, ValueError, LookupError):  # there is none, or none that can be read
        earlier = json.loads(path.read_text())
        had = f"{earlier['bits_per_byte']:.6f} bits per byte"
        if had != bits:
            where = f"{earlier['checkpoint']} on {earlier['device']}"
            print(f"warning: {path} had {had}, of {where}, and now has {bits}", file=sys.stderr)
    write_text(path, json.dumps({**result, "time": time}, indent=2) + "\n")
    if result["split"] == "test":
        append_line(path.parent / TEST_LOG, json.dumps({"time": time, **result}))


def name_of(setting: dict[str, Any], run: Path, checkpoint: Path, trained_in: str | None) -> str:
    """What tells one evaluation from another in the names of files, but for its mode.

    An ordinary one is of what was scored, a step and a length. Of the same step may be: a checkpoint of steps that the
    run took back, one from elsewhere, and the same one in another precision than the run was trained in.
    """
    what = f"{setting['corpus']}-{setting['sha256'][:8]}" if setting["split"] == "text" else setting["split"]
    parts = [what, f"{setting['bytes']}bytes", f"step{setting['step']}", f"len{setting['seq_len']}"]
    if checkpoint.parent.resolve() != (run / CHECKPOINT_FOLDER).resolve():
        place = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:8]
        parts.append(f"{checkpoint.stem}-{place}")
    elif not re.fullmatch(r"(best|last|step-\d+)\.ckpt", checkpoint.name):
        parts.append(checkpoint.name.removesuffix(".ckpt"))
    if setting["precision"] != trained_in:
        parts.append(setting["precision"])
    return plain_name(parts)


def trained_precision(run: Path) -> str | None:
    """``Results.precision`` of a run, of which a copy may have no record."""
    path = run / METRICS_FILE
    return Results(run, {}, read_csv(path) if path.is_file() else []).precision


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws bits per byte over bytes of context, a line a mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        curve = result["by_context"]
        label = f"{result['mode']}: {result['bits_per_byte']:.4f}"
        axes.plot(*([bucket[key] for bucket in curve] for key in ("longest", "bits_per_byte")), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="bytes of context, at most", ylabel="bits per byte", title=path.stem)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


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
        unseen: the same of the bytes that the training split does not have, if that was asked for.
    """

    nats: Tensor
    scored: Tensor
    unseen: "Score | None" = None

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
def score_batches(
    gpt: GPT,
    batches: EvalBatches | SlidingBatches,
    seq_len: int,
    unseen: EvalBatches | SlidingBatches | None = None,
) -> Score:
    """Scores every target that is not IGNORE_INDEX, in the precision of the autocast around the call.

    unseen: cut as `batches` are, of a 1 for each byte of the data that counts as unseen, and a 0 for others.
    """
    device = gpt.embedding.weight.device
    nats, unseen_nats = torch.zeros(2, seq_len, dtype=torch.float64, device=device)
    scored, unseen_scored = torch.zeros(2, seq_len, dtype=torch.int64, device=device)
    progress = Console(stderr=True)
    for index in track(
        range(len(batches)), "evaluating", console=progress, transient=True, disable=not progress.is_terminal
    ):
        inputs, targets = batches[index]
        targets = targets.to(device)
        logits = gpt(inputs.to(device))  # (batch_size, seq_len, 256) float32
        losses = F.cross_entropy(logits.mT, targets, reduction="none")  # (batch_size, seq_len), 0 if ignored
        nats += losses.sum(dim=0, dtype=torch.float64)
        scored += (targets != IGNORE_INDEX).sum(dim=0)
        if unseen is not None:
            counts = unseen[index][1].to(device) == 1
            unseen_nats += (losses * counts).sum(dim=0, dtype=torch.float64)
            unseen_scored += counts.sum(dim=0)
    rest = None if unseen is None else Score(unseen_nats.cpu(), unseen_scored.cpu())
    return Score(nats.cpu(), scored.cpu(), rest)


def print_score(setting: dict[str, str | int], score: Score, string_bytes: int | None) -> None:
    """Prints what was measured, the number, the curve by context length, and the number of unseen bytes, if any."""
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
    if score.unseen is not None:
        print_line(f"{'unseen bytes':<14} {score.unseen.scored_bytes:,}, in no string of {string_bytes} that train has")
        print_line(f"{'bits per byte':<14} {score.unseen.bits_per_byte:.6f} of these")


if __name__ == "__main__":
    sys.exit(main())
