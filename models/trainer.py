"""Builds the Lightning Trainer, and says how a step's tokens are cut into micro-batches."""

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig

from models.callbacks import ProgressBar

log = logging.getLogger(__name__)

LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
PRECISIONS = ("32-true", "bf16-mixed")


def micro_batches(tokens_per_step: int, micro_batch_tokens: int, seq_len: int, devices: int) -> tuple[int, int]:
    """Cuts a step of tokens_per_step tokens into equal micro-batches.

    The step holds tokens_per_step // seq_len sequences, shared by the devices and accumulated over as few
    micro-batches of at most micro_batch_tokens tokens (but at least one sequence) as divide them evenly.

    Returns:
        (sequences in a micro-batch of one device, micro-batches in a step).
    """
    if devices < 1:
        raise ValueError(f"trainer.devices must be at least 1, got {devices}")
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    sequences = tokens_per_step // seq_len
    if sequences < 1:
        raise ValueError(
            f"tokens_per_step must be at least seq_len = {seq_len}, one sequence a step, got {tokens_per_step}"
        )
    if sequences % devices:
        raise ValueError(
            f"tokens_per_step // seq_len = {sequences} sequences a step must be a multiple of trainer.devices = "
            f"{devices}"
        )
    if micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, got {micro_batch_tokens}")
    if sequences * seq_len != tokens_per_step:
        log.warning(
            "tokens_per_step=%d is no multiple of seq_len=%d: a step has %d",
            tokens_per_step,
            seq_len,
            sequences * seq_len,
        )
    per_device = sequences // devices
    largest = max(1, micro_batch_tokens // seq_len)
    size = next(size for size in range(min(largest, per_device), 0, -1) if per_device % size == 0)
    return size, per_device // size


def default_micro_batch_tokens(*, cuda: bool) -> int:
    """What keeps a large GPU busy, or fits the memory of a small CPU machine at model=small."""
    return 65536 if cuda else 8192


def compiles_by_default(*, cuda: bool) -> bool:
    """Whether compile=null means true: torch.compile pays on a GPU, and needs a C compiler to build its launchers."""
    if not cuda:
        return False
    found = os.environ.get("CC") or any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang"))
    if not found:
        log.warning("compile=null: no C compiler was found (cc, gcc, clang, CC), so the model is not compiled")
    return bool(found)


def uses_cuda(accelerator: str) -> bool:
    """Whether training will run on a GPU."""
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"trainer.accelerator must be auto, cpu or gpu, got {accelerator!r}")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=gpu needs a CUDA device, and PyTorch sees none")
    return accelerator != "cpu" and torch.cuda.is_available()


def choose_precision(precision: str | None, *, cuda: bool) -> str:
    """Lightning's name of the precision: bf16 autocast over float32 weights on a GPU, float32 on a CPU."""
    if precision is None:
        return "bf16-mixed" if cuda else "32-true"
    if precision not in PRECISIONS:
        # fp16 would need its gradients unscaled before they are clipped and logged
        raise ValueError(f"trainer.precision must be null or one of {PRECISIONS}, got {precision!r}")
    return precision


def check_trainer(options: DictConfig) -> None:
    """Raises ValueError for a value of conf/trainer/ that cannot be, before anything is written."""
    for key, least in (("val_every", 1), ("log_every", 1), ("sample_bytes", 0), ("profile_steps", 0), ("devices", 1)):
        if options[key] < least:
            raise ValueError(f"trainer.{key} must be at least {least}, got {options[key]}")
    choose_precision(options.precision, cuda=uses_cuda(options.accelerator))


def build_trainer(
    *,
    run_dir: Path,
    loggers: list[Logger],
    callbacks: list[lightning.Callback],
    max_steps: int,
    accumulate: int,
    options: DictConfig,
) -> lightning.Trainer:
    """The Trainer.

    Checkpoints are written at the end of each validation: ``last.ckpt`` always, ``best.ckpt`` where val/bpc improved.

    Args:
        run_dir: the run's folder.
        loggers: where metrics go.
        callbacks: what is recorded.
        max_steps: optimizer steps.
        accumulate: micro-batches an optimizer step.
        options: conf/trainer/.
    """
    cuda = uses_cuda(options.accelerator)
    _silence_known_lines()
    checkpoint_dir = run_dir / "checkpoints"
    checkpoints = [  # best before last: what last.ckpt holds of the best score must be up to date
        _checkpoint(checkpoint_dir, BEST_CHECKPOINT, monitor="val/bpc"),
        _checkpoint(checkpoint_dir, LAST_CHECKPOINT, monitor=None),
    ]
    bar = options.progress_bar and sys.stdout.isatty()  # in a file it would be one long line; the log has the rest
    trainer = lightning.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=options.devices,
        strategy="auto" if options.devices == 1 else "ddp",
        precision=choose_precision(options.precision, cuda=cuda),
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=options.val_every * accumulate,  # Lightning counts micro-batches
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=0,  # GPTModule.report logs: Lightning would gather metrics after every step
        logger=loggers,
        callbacks=[*callbacks, *([ProgressBar(refresh_rate=10)] if bar else []), *checkpoints],
        enable_progress_bar=bar,
        enable_model_summary=False,
        use_distributed_sampler=False,  # it would repeat evaluation windows to fill its last batch
        deterministic=options.deterministic,
        inference_mode=False,  # under no_grad, as fit validates: torch.compile need not compile a third time for test
        default_root_dir=run_dir,
        # Started by hand or by this process, never by whatever scheduler the shell happens to run under.
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],
    )
    # Before every micro-batch Lightning asks all processes for a SIGTERM and waits for the GPU to read the answer.
    # Each process has its own handler, and a group of processes is signalled together.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def _silence_known_lines() -> None:
    # Advertisements, and warnings about choices made here on purpose; everything else still shows.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # the loader only counts
        r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        r".*ended before the epoch ended and your dataloader is not resumable.*",  # nothing to resume: see GPTModule
        r".*configured with multiple `ModelCheckpoint` callbacks.*",  # the first is best.ckpt, which is meant
        r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 against torch 2.13
    ):
        warnings.filterwarnings("ignore", message=message)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a kill leaves either the old one or the new one.

    Lightning's own writes to the system's temporary folder; from another file system that ends in a plain copy over
    the only checkpoint there is.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves checkpoint under path."""
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


class Checkpoint(ModelCheckpoint):
    """Lightning's, which forgets the best score when the run's folder was moved; this one takes its paths along."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best score, under this run's folder."""
        before, now = str(state_dict["dirpath"]), str(self.dirpath)

        def moved(value: Any) -> Any:
            return value.replace(before, now, 1) if isinstance(value, str) else value

        state = {key: moved(value) for key, value in state_dict.items()}
        state["best_k_models"] = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state)


def _checkpoint(folder: Path, filename: str, *, monitor: str | None) -> ModelCheckpoint:
    return Checkpoint(
        dirpath=folder,
        filename=filename.removesuffix(".ckpt"),
        monitor=monitor,
        mode="min",
        save_top_k=1,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
