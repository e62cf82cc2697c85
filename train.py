"""Train a byte-level GPT: ``python train.py attention=cosine seq_len=8192``; ``--help`` shows every key."""

import sys
from collections.abc import Sequence

import hydra
import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from conf.schema import hints, validate
from data.bytes import ByteCorpus, ByteDataModule
from models.callbacks import TextSample, TrainingMetrics
from models.lightning import GPTModule
from models.report import conclude
from models.runs import Run, build_gpt, open_run
from models.trainer import build_trainer, default_micro_batch_tokens, micro_batches, uses_cuda


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    """Trains as configured and returns the validation loss in bits per byte, which a sweeper minimises."""
    hydra_config = HydraConfig.get()
    return train(validate(config), dict(hydra_config.runtime.choices), hydra_config.overrides.task)


def train(config: DictConfig, choices: dict[str, str], overrides: Sequence[str] = ()) -> float:
    """One run: builds model, data and trainer, fits, tests on request, and sums up. Returns the last val/bpc."""
    with open_run(config, choices, overrides) as run:
        lightning.seed_everything(config.seed, verbose=False)
        module = build_module(config)  # before the data: a model that cannot be built needs no download
        corpus = instantiate(config.data)
        data, accumulate = build_data(config, corpus)
        run.update(**describe(config, module, data, accumulate))
        trainer = build_trainer(
            run_dir=run.folder,
            loggers=build_loggers(config, run),
            callbacks=build_callbacks(config, run, data),
            max_steps=config.max_steps,
            accumulate=accumulate,
            options=config.trainer,
        )
        trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint)
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
        compile=cuda if config.compile is None else config.compile,
    )


def build_data(config: DictConfig, corpus: ByteCorpus) -> tuple[ByteDataModule, int]:
    """The windows of the corpus, and how many micro-batches make a step."""
    largest = config.micro_batch_tokens
    if largest is None:
        largest = default_micro_batch_tokens(cuda=uses_cuda(config.trainer.accelerator))
    size, accumulate = micro_batches(config.tokens_per_step, largest, config.seq_len, config.trainer.devices)
    data = ByteDataModule(
        corpus,
        seq_len=config.seq_len,
        micro_batch_size=size,
        num_micro_batches=config.max_steps * accumulate,
        seed=config.seed,
        eval_batch_size=size,
        val_bytes=config.trainer.val_bytes,
        on_device=config.trainer.data_on_device,
    )
    return data, accumulate


def describe(config: DictConfig, module: GPTModule, data: ByteDataModule, accumulate: int) -> dict:
    """What run.json says of a run beyond its configuration."""
    return {
        "corpus": {"name": data.corpus.name, **data.corpus.provenance, "val_scored": data.val_scored},
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
    prompt = data.val[: min(64, config.seq_len)].tobytes()
    return [metrics, TextSample(run.folder, prompt=prompt, num_bytes=options.sample_bytes, seed=config.seed)]


def build_loggers(config: DictConfig, run: Run) -> list[Logger]:
    """The loggers of conf/logger/, told where the run is and what it is."""
    loggers = instantiate(
        config.logger, run_dir=run.folder, resume_step=run.resume_step, wandb_id=run.record["wandb_id"]
    )
    for logger in loggers:
        logger.log_hyperparams({**OmegaConf.to_container(config), "run": run.record})
    return loggers


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            print(*hints(sys.argv[1:]), sep="\n", end="", file=sys.stderr)
        raise
