"""Train a byte-level GPT: ``python train.py attention=cosine seq_len=8192``; ``--help`` shows every key."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from conf.legacy import answer_flags

if __name__ == "__main__":
    answer_flags(sys.argv[1:])  # before the imports that take seconds

import hydra
import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from conf.schema import check_mode, hints, validate
from data.bytes import ByteCorpus, ByteDataModule
from models.callbacks import LogitMetrics, Profile, TextSample, TrainingMetrics
from models.lightning import DivergedError, GPTModule
from models.load import build_gpt
from models.loggers import finish, offline_folder, sweep_group, wandb_mode
from models.report import conclude
from models.runs import Run, open_run
from models.trainer import (
    build_trainer,
    check_trainer,
    compiles_by_default,
    default_micro_batch_tokens,
    micro_batches,
    uses_cuda,
)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    """Trains as configured and returns the validation loss in bits per byte, which a sweeper minimises."""
    hydra_config = HydraConfig.get()
    choices, multirun = dict(hydra_config.runtime.choices), hydra_config.mode == RunMode.MULTIRUN
    try:
        config = validate(config)
        check_mode(config, choices, multirun=multirun)
        return train(config, choices, hydra_config.overrides.task, keep_failed=multirun)
    except (ValueError, OSError, DivergedError, InstantiationException) as error:
        if multirun or "HYDRA_FULL_ERROR" in os.environ:
            raise  # Hydra reports it when the other jobs are done
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        sys.exit(f"error: {cause}")


def train(
    config: DictConfig, choices: dict[str, str], overrides: Sequence[str] = (), *, keep_failed: bool = False
) -> float:
    """One run: builds model, data and trainer, fits, tests on request, and sums up. Returns the last val/bpc."""
    with open_run(config, choices, overrides, keep_failed=keep_failed) as run:
        lightning.seed_everything(config.seed, verbose=False)
        module = build_module(config)  # before the data: a model that cannot be built needs no download
        corpus = instantiate(config.data)
        data, accumulate = build_data(config, corpus)
        check_trainer(config.trainer)
        if "offline" in config.logger:
            wandb_mode(offline=config.logger.offline)  # refused before anything is written
        run.start(config, choices, **describe(config, run, module, data, accumulate))
        with loggers_of(config, run) as loggers:
            trainer = build_trainer(
                run_dir=run.folder,
                loggers=loggers,
                callbacks=build_callbacks(config, run, data),
                max_steps=config.max_steps,
                accumulate=accumulate,
                options=config.trainer,
            )
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint)
            if "val/bpc" not in trainer.callback_metrics:  # resumed at its last step: nothing was left to train
                trainer.validate(module, datamodule=data, verbose=False)
            bits_per_byte = trainer.callback_metrics["val/bpc"].item()
            if config.test:
                trainer.test(module, datamodule=data, ckpt_path="best", verbose=False)
    if trainer.is_global_zero:
        conclude(run, config, corpus)
    return bits_per_byte


def build_module(config: DictConfig) -> GPTModule:
    """The model and how it is trained."""
    cuda = uses_cuda(config.trainer.accelerator)
    return GPTModule(
        build_gpt(config),
        instantiate(config.optimizer),
        seed=config.seed,
        clip_norm=config.trainer.clip_norm,
        compile=compiles_by_default(cuda=cuda) if config.compile is None else config.compile,
    )


def build_data(config: DictConfig, corpus: ByteCorpus) -> tuple[ByteDataModule, int]:
    """The windows of the corpus, and how many micro-batches make a step."""
    largest = config.micro_batch_tokens
    if largest is None:
        largest = default_micro_batch_tokens(cuda=uses_cuda(config.trainer.accelerator))
    size, accumulate = micro_batches(config.tokens_per_step, largest, config.seq_len, config.trainer.devices)
    val_bytes = config.trainer.val_bytes
    if val_bytes is not None and val_bytes <= config.seq_len:
        raise ValueError(f"trainer.val_bytes must be null or more than seq_len = {config.seq_len}, got {val_bytes}")
    data = ByteDataModule(
        corpus,
        seq_len=config.seq_len,
        micro_batch_size=size,
        num_micro_batches=config.max_steps * accumulate,
        seed=config.seed,
        eval_batch_size=size,
        val_bytes=val_bytes,
        on_device=config.trainer.data_on_device,
        overfit=config.trainer.overfit,
    )
    return data, accumulate


def describe(config: DictConfig, run: Run, module: GPTModule, data: ByteDataModule, accumulate: int) -> dict:
    """What run.json says of a run beyond its configuration. Raises ValueError if a resumed run's corpus changed."""
    corpus = data.corpus
    before = run.record.get("corpus", {}).get("sha256")
    if before not in (None, corpus.provenance["sha256"]):
        raise ValueError(
            f"the corpus changed: the run was trained on bytes of SHA-256 {before}, {corpus.name} now has "
            f"{corpus.provenance['sha256']}"
        )
    return {
        "corpus": {"name": corpus.name, **corpus.provenance, "val_scored": data.val_scored},
        "parameters": module.gpt.num_parameters(),
        "micro_batch_size": data.micro_batch_size,
        "accumulate": accumulate,
        "tokens_per_step": data.micro_batch_size * config.seq_len * accumulate * config.trainer.devices,
    }


def build_callbacks(config: DictConfig, run: Run, data: ByteDataModule) -> list[lightning.Callback]:
    """What is recorded while training."""
    options = config.trainer
    metrics = TrainingMetrics(
        log_every=options.log_every,
        max_steps=config.max_steps,
        tokens_per_step=run.record["tokens_per_step"],
        seq_len=config.seq_len,
    )
    sample = TextSample(
        run.folder,
        prompt=data.val[: min(64, config.seq_len)].tobytes(),
        num_bytes=options.sample_bytes,
        seed=config.seed,
        resume_step=run.resume_step,
    )
    profile = [Profile(run.folder, options.profile_steps, config.max_steps)] if options.profile_steps else []
    return [*profile, metrics, LogitMetrics(data.val[: config.seq_len].tobytes()), sample]


@contextmanager
def loggers_of(config: DictConfig, run: Run) -> Iterator[list[Logger]]:
    """The loggers of conf/logger/, told where the run is and what it is, and closed at the end."""
    options = {}
    if "group" in config.logger:
        run.record.setdefault("wandb_group", sweep_group())  # the same when it is resumed
        options["group"] = config.logger.group or run.record["wandb_group"]
    loggers = instantiate(
        config.logger, run_dir=run.folder, resume_step=run.resume_step, wandb_id=run.record["wandb_id"], **options
    )
    run.update(wandb_folder=offline_folder(loggers))
    for logger in loggers:
        logger.log_hyperparams({**OmegaConf.to_container(config), "run": run.record})
    failed = True
    try:
        yield loggers
        failed = False
    finally:
        finish(loggers, failed=failed)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            print(*hints(sys.argv[1:]), sep="\n", end="", file=sys.stderr)
        raise
