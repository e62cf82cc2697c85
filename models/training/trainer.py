"""Builds the Lightning Trainer, and says how a step's tokens are cut into micro-batches."""

import logging
import os
import shutil
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from models.training.checkpoints import FOLDER, AtomicCheckpointIO, Checkpoints
from models.training.processes import Processes
from models.training.stopping import Stopping

log = logging.getLogger(__name__)

PRECISIONS = ("32-true", "bf16-mixed")


def micro_batches(
    tokens_per_step: int, micro_batch_tokens: int, seq_len: int, devices: int, num_nodes: int = 1
) -> tuple[int, int]:
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
    processes = devices * num_nodes
    if sequences % processes:
        nodes = f" * trainer.num_nodes = {devices} * {num_nodes}" if num_nodes > 1 else f" = {devices}"
        raise ValueError(
            f"tokens_per_step // seq_len = {sequences} sequences a step must be a multiple of trainer.devices{nodes}"
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
    per_device = sequences // processes
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
    least = {"val_every": 1, "log_every": 1, "sample_bytes": 0, "devices": 1}
    least |= {"profile_steps": 0, "num_nodes": 1, "keep_checkpoints": 1, "checkpoint_every": 1}
    for key, smallest in least.items():
        if options[key] is not None and options[key] < smallest:
            raise ValueError(f"trainer.{key} must be at least {smallest}, got {options[key]}")
    minutes = options.checkpoint_minutes
    if minutes is not None and not minutes > 0:
        raise ValueError(f"trainer.checkpoint_minutes must be positive or null, got {minutes}")
    choose_precision(options.precision, cuda=uses_cuda(options.accelerator))


def build_trainer(
    *,
    run_dir: Path,
    loggers: list[Logger],
    callbacks: list[lightning.Callback],
    max_steps: int,
    accumulate: int,
    options: DictConfig,
    processes: Processes,
    stopping: Stopping,
) -> lightning.Trainer:
    """The Trainer.

    Args:
        run_dir: the run's folder.
        loggers: where metrics go.
        callbacks: what is recorded.
        max_steps: optimizer steps.
        accumulate: micro-batches an optimizer step.
        options: conf/trainer/.
        processes: those that make up the run.
        stopping: says when a signal came.
    """
    cuda = uses_cuda(options.accelerator)
    _silence_known_lines()
    checkpoints = Checkpoints(
        run_dir / FOLDER,
        stopping=stopping,
        val_every=options.val_every,
        max_steps=max_steps,
        every=options.checkpoint_every,
        minutes=options.checkpoint_minutes,
        keep=options.keep_checkpoints,
    )
    trainer = lightning.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy="auto" if processes.world_size == 1 else "ddp",
        precision=choose_precision(options.precision, cuda=cuda),
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=options.val_every * accumulate,  # Lightning counts micro-batches
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=0,  # GPTModule.report logs: Lightning would gather metrics after every step
        logger=loggers,
        callbacks=[*callbacks, checkpoints],
        enable_checkpointing=False,  # Lightning's own, beside ours
        enable_progress_bar=False,  # Lightning's: models/training/progress.py has one
        enable_model_summary=False,
        use_distributed_sampler=False,  # it would repeat evaluation windows to fill its last batch
        deterministic=options.deterministic,
        inference_mode=False,  # under no_grad, as fit validates: torch.compile need not compile a third time for test
        default_root_dir=run_dir,
        plugins=[AtomicCheckpointIO(), processes.environment],
    )
    # Before every micro-batch Lightning asks all processes for a SIGTERM and waits for the GPU to read the answer.
    # Checkpoints asks once a step, by the CPU.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    # Its handler of SIGTERM waits for the other processes from within the handler, wherever these are: for ever.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def _silence_known_lines() -> None:
    # Advertisements, and warnings about choices made here on purpose; everything else still shows.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # the loader only counts
        r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        r".*ended before the epoch ended and your dataloader is not resumable.*",  # nothing to resume: see GPTModule
        r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 against torch 2.13
    ):
        warnings.filterwarnings("ignore", message=message)
