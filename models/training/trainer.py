"""Builds the Lightning Trainer."""

import logging
import warnings
from pathlib import Path

import lightning
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from models.training.checkpoint_files import CHECKPOINT_FOLDER
from models.training.checkpoints import AtomicCheckpointIO, Checkpoints
from models.training.devices import choose_precision, uses_cuda
from models.training.length import Length
from models.training.processes import Processes
from models.training.started import signals_wait
from models.training.stopping import Stopping


def check_trainer(options: DictConfig) -> None:
    """Raises ValueError for a value of conf/trainer/ that cannot be, before anything is written."""
    least = {"val_every": 1, "log_every": 1, "sample_bytes": 0, "devices": 1}
    least |= {"profile_steps": 0, "num_nodes": 1, "keep_checkpoints": 1, "checkpoint_every": 1}
    for key, smallest in least.items():
        if options[key] is not None and options[key] < smallest:
            raise ValueError(f"trainer.{key} must be at least {smallest}, got {options[key]}")
    for key in ("checkpoint_minutes", "budget_minutes"):
        if options[key] is not None and not options[key] > 0:
            raise ValueError(f"trainer.{key} must be positive or null, got {options[key]}")
    choose_precision(options.precision, cuda=uses_cuda(options.accelerator))


def build_trainer(
    *,
    run_dir: Path,
    loggers: list[Logger],
    callbacks: list[lightning.Callback],
    length: Length,
    accumulate: int,
    options: DictConfig,
    processes: Processes,
    stopping: Stopping,
    gpu: int | None = None,
) -> lightning.Trainer:
    """The Trainer.

    Args:
        run_dir: the run's folder.
        loggers: where metrics go.
        callbacks: what is recorded.
        length: of the run.
        accumulate: micro-batches an optimizer step.
        options: conf/trainer/.
        processes: those that make up the run.
        stopping: says when a signal came.
        gpu: the index of the one GPU to train on; None: the first ones, or the CPU.
    """
    cuda = uses_cuda(options.accelerator)
    _silence_known_lines()
    checkpoints = Checkpoints(
        run_dir / CHECKPOINT_FOLDER,
        stopping=stopping,
        val_every=options.val_every,
        length=length,
        every=options.checkpoint_every,
        minutes=options.checkpoint_minutes,
        keep=options.keep_checkpoints,
    )
    trainer = lightning.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=options.devices if gpu is None else [gpu],
        num_nodes=options.num_nodes,
        strategy="auto" if processes.world_size == 1 else "ddp",
        precision=choose_precision(options.precision, cuda=cuda),
        max_steps=length.max_steps,
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
    launcher = trainer.strategy.launcher
    if launcher is not None:
        # A signal to a process that has no handlers yet would end it, and Lightning this one.
        launcher._call_children_scripts = signals_wait()(launcher._call_children_scripts)
    return trainer


def _silence_known_lines() -> None:
    # Advertisements, and warnings about choices made here on purpose; everything else still shows.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # the loader only counts
        r".*It is recommended to use `self\.log\(.*sync_dist=True.*",  # bits per byte are summed over ranks before
        r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        r".*ended before the epoch ended and your dataloader is not resumable.*",  # nothing to resume: see GPTModule
        r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 against torch 2.13
    ):
        warnings.filterwarnings("ignore", message=message)
