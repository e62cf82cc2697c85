"""A corpus is three arrays of bytes; ByteDataModule cuts training and evaluation windows from it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

IGNORE_INDEX = -100  # the default ignore_index of torch.nn.functional.cross_entropy


@runtime_checkable
class Corpus(Protocol):
    """What is trained on, and where it is from: what data=OPTION builds.

    Attributes:
        name: in messages and in the run's record.
        train, val, test: the splits, each a 1-D array of uint8, a memmap too; longer than the context.
        provenance: JSON-able; at least sha256, which changes with any byte of a split, and bytes, their number.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    provenance: dict[str, str | int]


@dataclass(frozen=True, eq=False)  # eq=False: == on arrays has no single truth value
class ByteCorpus:
    """Three splits of raw bytes, each 1-D uint8 (a memmap will do), and a JSON-able record of origin."""

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    provenance: dict[str, str | int]

    def __post_init__(self) -> None:
        _check_arrays(self)

    @classmethod
    def cut(
        cls, name: str, data: np.ndarray, *, num_val: int, num_test: int, provenance: dict[str, str | int]
    ) -> "ByteCorpus":
        """Cut `data` into train, val (num_val bytes) and test (the last num_test bytes).

        Counts and the SHA-256 of `data` join the provenance. Raises ValueError if a split is under 2 bytes.
        """
        num_train = len(data) - num_val - num_test
        for split, size in (("train", num_train), ("val", num_val), ("test", num_test)):
            if size < 2:
                raise ValueError(
                    f"{name}: the {split} split must have at least 2 bytes (one to predict the other), "
                    f"got {size} of {len(data)} bytes; use a longer file or a larger fraction"
                )
        record = {
            **provenance,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "train_bytes": num_train,
            "val_bytes": num_val,
            "test_bytes": num_test,
        }
        train, val, test = np.split(data, [num_train, num_train + num_val])
        return cls(name, train, val, test, record)


class ByteDataModule(LightningDataModule):
    """Windows of seq_len bytes, for training at random and for evaluation in order.

    corpus: the bytes; each split must be longer than seq_len.
    seq_len: bytes a model is fed at once.
    micro_batch_size: windows in one train_batch.
    accumulate: train_batches that each rank takes of one optimizer step.
    windows_per_step: windows of one optimizer step over all ranks, a multiple of micro_batch_size * accumulate.
    num_micro_batches: length of the dummy train loader, and so of one Lightning epoch.
    seed: selects the sequence of training windows, 0 <= seed < 2**32.
    eval_batch_size: windows in one validation or test batch, on each rank.
    val_bytes: validate on the first val_bytes bytes of the val split; None, or more than it has, is all.
    on_device: keep the train split on the device and gather there; False gathers on the CPU, copies windows.
    overfit: train on the windows of step 0 at every step.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        micro_batch_size: int,
        accumulate: int,
        windows_per_step: int,
        num_micro_batches: int,
        seed: int,
        eval_batch_size: int,
        val_bytes: int | None = None,
        on_device: bool = True,
        overfit: bool = False,
    ) -> None:
        super().__init__()
        _check_int("seq_len", seq_len, 1)
        _check_splits(corpus, seq_len)
        _check_int("micro_batch_size", micro_batch_size, 1)
        _check_int("accumulate", accumulate, 1)
        _check_int("windows_per_step", windows_per_step, 1)
        if windows_per_step % (micro_batch_size * accumulate):
            raise ValueError(
                f"windows_per_step must be a multiple of micro_batch_size * accumulate = {micro_batch_size} * "
                f"{accumulate}, got {windows_per_step}"
            )
        _check_int("num_micro_batches", num_micro_batches, 1)
        # One 32-bit word: a longer seed would take up two and shift the others, and could meet another's key.
        _check_int("seed", seed, 0, 2**32 - 1)
        _check_int("eval_batch_size", eval_batch_size, 1)
        if not isinstance(on_device, bool):
            raise TypeError(f"on_device must be True or False, got {on_device!r}")
        if val_bytes is not None:
            _check_int("val_bytes", val_bytes, seq_len + 1)
        self.corpus = corpus
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.accumulate = accumulate
        self.windows_per_step = windows_per_step
        self.num_micro_batches = num_micro_batches
        self.seed = seed
        self.eval_batch_size = eval_batch_size
        self.val = corpus.val[:val_bytes]
        self.on_device = on_device
        self.overfit = overfit
        self._train_on: dict[torch.device, Tensor] = {}

    @property
    def tokens_per_step(self) -> int:
        """Bytes that an optimizer step is trained on, over all ranks."""
        return self.windows_per_step * self.seq_len

    @property
    def val_scored(self) -> int:
        """Bytes that validation scores: all of the val split, or of its first val_bytes, but byte 0.

        Byte 0 has nothing before it to be predicted from.
        """
        return len(self.val) - 1

    def train_batch(self, step: int, micro_step: int, rank: int, device: torch.device) -> Tensor:
        """Return a share of the step's random windows, (micro_batch_size, seq_len + 1) int64 on `device`.

        The step's windows are a pure function of (seed, step), under one version of NumPy, which does not promise
        its draws across versions: a resumed run draws the same with no state to restore. Ranks and, within a rank,
        micro-steps take equal slices of them, so that a step is the same however many devices and micro-batches it
        is cut into. Every window of the split is equally likely. With on_device the first call for a device waits
        for the copy of the split; no later call makes the host wait.
        """
        starts = self._window_starts(step, micro_step, rank)  # (micro_batch_size,)
        if not self.on_device:
            # Slices, not one fancy index: a memmap then reads each window as one run of pages.
            windows = np.stack([self.corpus.train[start : start + self.seq_len + 1] for start in starts])
            return _copy_to(torch.from_numpy(windows), device).long()
        offsets = torch.arange(self.seq_len + 1, device=device)
        # (micro_batch_size, 1) + (seq_len + 1,) -> (micro_batch_size, seq_len + 1)
        index = _copy_to(torch.from_numpy(starts), device)[:, None] + offsets
        return self._train_split(device)[index].long()

    def train_dataloader(self) -> DataLoader:
        """Count to num_micro_batches: Lightning wants a loader, and a counter has no state to lose."""
        return _ordered_loader(range(self.num_micro_batches))

    def val_dataloader(self) -> DataLoader:
        """Batches of EvalBatches over the val split, or over its first val_bytes bytes."""
        return self._eval_loader(self.val)

    def test_dataloader(self) -> DataLoader:
        """Batches of EvalBatches over the whole test split."""
        return self._eval_loader(self.corpus.test)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Lets go of the train split on devices: the next run of a sweep is in the same process."""
        self._train_on.clear()

    def _window_starts(self, step: int, micro_step: int, rank: int) -> np.ndarray:
        first = (rank * self.accumulate + micro_step) * self.micro_batch_size
        if not (0 <= micro_step < self.accumulate and 0 <= first < self.windows_per_step):
            raise IndexError(
                f"micro_step {micro_step} of {self.accumulate} on rank {rank} is not within a step of "
                f"{self.windows_per_step} windows in micro-batches of {self.micro_batch_size}"
            )
        # The zeros: what the first micro-batch of the first rank was drawn from when each drew its own.
        rng = np.random.default_rng([self.seed, 0 if self.overfit else step, 0, 0])
        starts = rng.integers(0, len(self.corpus.train) - self.seq_len, size=self.windows_per_step)
        return starts[first : first + self.micro_batch_size]

    def _train_split(self, device: torch.device) -> Tensor:
        if device not in self._train_on:
            train = self.corpus.train
            # Nothing here writes, but torch cannot know and warns about read-only memory: give it a copy.
            train = train if train.flags.writeable else train.copy()
            self._train_on[device] = torch.from_numpy(train).to(device)  # (len(train),) uint8
        return self._train_on[device]

    def _eval_loader(self, data: np.ndarray) -> DataLoader:
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return _ordered_loader(EvalBatches(data, self.seq_len, self.eval_batch_size, rank, world_size))


class EvalBatches(Dataset):
    """Batches (inputs, targets), each (batch_size, seq_len) int64, that score each byte but byte 0 once.

    Window i is fed bytes [i * seq_len, (i + 1) * seq_len) and scored on that range moved on by one, so its
    first target is conditioned on the last byte that window i - 1 scored. Behind the end of the data inputs
    are 0 and targets IGNORE_INDEX, so that all batches have one shape. Ranks take batches in turn, each the
    same number.
    """

    def __init__(self, data: np.ndarray, seq_len: int, batch_size: int, rank: int, world_size: int) -> None:
        self.data = data
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        num_scored = len(self.data) - 1
        return -(-num_scored // (self.world_size * self.batch_size * self.seq_len))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        num_targets = self.batch_size * self.seq_len
        first = (index * self.world_size + self.rank) * num_targets
        chunk = torch.from_numpy(self.data[first : first + num_targets + 1].astype(np.int64))
        num_scored = max(len(chunk) - 1, 0)
        inputs = torch.zeros(num_targets, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        inputs[:num_scored] = chunk[:num_scored]
        targets[:num_scored] = chunk[1:]
        return inputs.view(self.batch_size, self.seq_len), targets.view(self.batch_size, self.seq_len)


class _InOrder(DistributedSampler):
    """Its own way makes a list of all indices first: gigabytes for 100 million steps, where a budget ends the run."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.dataset)))


def _ordered_loader(batches: Dataset | range) -> DataLoader:
    """Iterate over ready-made batches in order.

    `batches` is this rank's share already, hence one replica. Lightning leaves a DistributedSampler in place,
    whereas it would deal the items of any other sampler to the ranks once more.
    """
    sampler = _InOrder(batches, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(batches, batch_size=None, sampler=sampler, pin_memory=torch.cuda.is_available())


def _copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without making the host wait: CUDA can only do so from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _check_arrays(corpus: Corpus) -> None:
    for split in ("train", "val", "test"):
        data = getattr(corpus, split)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
            got = f"{data.dtype}, {data.ndim}-D" if isinstance(data, np.ndarray) else type(data).__name__
            raise TypeError(f"{split} must be a 1-D numpy array of uint8, got {got}")


def _check_splits(corpus: Corpus, seq_len: int) -> None:
    if not isinstance(corpus, Corpus):
        raise TypeError(f"corpus must have name, train, val, test and provenance, got {type(corpus).__name__}")
    _check_arrays(corpus)
    for split in ("train", "val", "test"):
        num_bytes = len(getattr(corpus, split))
        if seq_len >= num_bytes:
            raise ValueError(
                f"seq_len must be less than the length of each split, got seq_len {seq_len} and "
                f"a {split} split of {num_bytes} bytes ({corpus.name})"
            )


def _check_int(name: str, value: int, minimum: int, maximum: int | None = None) -> None:
    accepted = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer {accepted}, got {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        raise ValueError(f"{name} must be {accepted}, got {value}")
