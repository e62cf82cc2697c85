"""Train a byte-level GPT: ``python train.py attention=cosine seq_len=8192``; ``--help`` shows every key."""

import sys

import hydra
import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from conf.schema import hints, validate
from data.bytes import ByteDataModule
from models.callbacks import TextSample, TrainingMetrics
from models.lightning import GPTModule
from models.report import conclude
from models.runs import Run, open_run
from models.trainer import build_trainer, micro_batches, uses_cuda


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    """Runs one training and returns the validation loss in bits per byte, which a sweeper minimises."""
    config = validate(config)
    lightning.seed_everything(config.seed, verbose=False)
    size, accumulate = micro_batches(
        config.tokens_per_step, config.micro_batch_tokens, config.seq_len, config.trainer.devices
    )
    module = build_module(config)  # before the data: a model that cannot be built should not wait for a download
    corpus = instantiate(config.data)
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
    with open_run(config, dict(HydraConfig.get().runtime.choices)) as run:
        tokens_per_step = size * config.seq_len * accumulate * config.trainer.devices
        run.update(
            corpus={"name": corpus.name, **corpus.provenance, "val_scored": data.val_scored},
            tokens_per_step=tokens_per_step,
            micro_batch_size=size,
            accumulate=accumulate,
            parameters=module.gpt.num_parameters(),
        )
        metrics = TrainingMetrics(
            log_every=config.trainer.log_every,
            max_steps=config.max_steps,
            tokens_per_step=tokens_per_step,
            seq_len=config.seq_len,
        )
        sample = TextSample(
            run.folder,
            prompt=data.val[: min(64, config.seq_len)].tobytes(),
            num_bytes=config.trainer.sample_bytes,
            seed=config.seed,
        )
        trainer = build_trainer(
            run_dir=run.folder,
            loggers=build_loggers(config, run),
            callbacks=[metrics, sample],
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
    gpt = instantiate(config.model, attention=instantiate(config.attention), block=instantiate(config.norm))
    cuda = uses_cuda(config.trainer.accelerator)
    return GPTModule(
        gpt,
        instantiate(config.optimizer),
        seed=config.seed,
        clip_norm=config.trainer.clip_norm,
        compile=cuda if config.compile is None else config.compile,
    )


def build_loggers(config: DictConfig, run: Run) -> list:
    """The loggers of conf/logger/, told where the run is and what it is configured as."""
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
