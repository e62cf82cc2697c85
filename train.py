"""Train a byte-level GPT: ``python train.py attention=cosine seq_len=8192``; ``--help`` shows every key."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from conf.legacy import answer_flags
from models.training.started import end_on_interrupt, follow_the_first, raise_on_interrupt
from models.training.tables import outlive_the_reader, show_any_character

if __name__ == "__main__":  # before the imports that take seconds
    end_on_interrupt()
    follow_the_first()
    outlive_the_reader()
    show_any_character()
    answer_flags(sys.argv[1:])

    from conf.command_line import answer

    sys.argv[1:] = answer(sys.argv[1:])

import hydra
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from conf.command_line import of_options
from conf.schema import builder, check_mode, validate
from conf.secrets import redact, redact_file, redact_tree, redacted_command_line
from data.bytes import ByteDataModule, Corpus
from models.attention import check_parts, try_backend
from models.training.batching import default_micro_batch_tokens, micro_batches
from models.training.callbacks import LogitMetrics, PositionBiases, Profile, TextSample, TrainingMetrics
from models.training.checkpoint_files import BEST_CHECKPOINT, CHECKPOINT_FOLDER
from models.training.devices import choose_compile, choose_precision, is_of_compiling, uses_cuda
from models.training.identity import default_name, plain_name
from models.training.jobs import Job, job_here, one_line
from models.training.length import Length
from models.training.load import build_gpt, load_weights, meant_otherwise
from models.training.loggers import finish, group_here, offline_folder, wandb_id_of, wandb_mode
from models.training.module import DivergedError, GPTModule
from models.training.optimizer import OptimizerBuilder
from models.training.processes import end_started, find_processes, join
from models.training.progress import ProgressReport
from models.training.report import conclude, print_upload, read_results
from models.training.runs import Run, open_run
from models.training.stopping import Interrupted, Stopping, stopping
from models.training.sweeps import Sweep, is_sweep
from models.training.trainer import build_trainer, check_trainer
from models.training.training_time import TrainingTime

log = logging.getLogger(__name__)

if __name__ == "__main__":
    raise_on_interrupt()


def main() -> None:
    """Answers the command line: one run, or with -m the jobs of a sweep."""
    if is_sweep(sys.argv[1:]):
        sys.exit(Sweep().conduct(composed))
    composed()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def composed(config: DictConfig) -> float:
    """Trains as configured and returns the validation loss in bits per byte, which a sweeper minimises."""
    hydra_config = HydraConfig.get()
    choices, overrides = dict(hydra_config.runtime.choices), hydra_config.overrides.task
    if hydra_config.mode == RunMode.MULTIRUN:
        redact_file(Path(hydra_config.sweep.dir) / "multirun.yaml")
        job = job_here(hydra_config)
        parts = (config, choices, overrides, job)
        return job.run(train=partial(train_job, *parts), mark=partial(job_mark, *parts))
    try:
        config, overrides = of_options(config, choices, overrides)
        config = validate(config)
        check_mode(config, choices, multirun=False)
        check_backend(config)
        return train(config, choices, overrides)
    except (ValueError, OSError, DivergedError) as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        sys.exit(f"error: {error}")


def train_job(config: DictConfig, choices: dict[str, str], overrides: Sequence[str], job: Job) -> float:
    """A sweep's job."""
    config, overrides = of_options(config, choices, overrides)
    config = validate(config)
    check_mode(config, choices, multirun=True)
    job.check_gpu(config.trainer.accelerator)
    return train(config, choices, overrides, job)


def job_mark(config: DictConfig, choices: dict[str, str], overrides: Sequence[str], job: Job) -> tuple[Path, str]:
    """Where the mark of a job belongs that cannot become a run: run_root, and a name, whatever the configuration is."""
    config, overrides = of_options(config, choices, overrides)
    with suppress(ValueError, TypeError):
        return Path(config.run_root), config.name or default_name(config, choices, overrides, job.swept)
    return Path(config.run_root), plain_name(["refused", job.label])  # a key that names tell has no value for one


def check_backend(config: DictConfig) -> None:
    """Refuses a back end that the command line names and that cannot serve here, before a folder is made for the run.

    Raises:
        ValueError: in the library's words.
    """
    device = "cuda" if uses_cuda(config.trainer.accelerator) else "cpu"
    try:
        try_backend(config.attention.get("backend"), device)
    except ValueError as error:
        raise ValueError(f"attention.{error}") from error


def train(config: DictConfig, choices: dict[str, str], overrides: Sequence[str] = (), job: Job | None = None) -> float:
    """One run: builds model, data and trainer, fits, tests on request, and sums up. Returns the last val/bpc.

    Raises:
        Skipped: a sweep's job that is done already, or is being done.
    """
    processes = find_processes(devices=config.trainer.devices, num_nodes=config.trainer.num_nodes)
    if not processes.is_first:
        logging.getLogger().setLevel(logging.ERROR)  # each would say what the first one says
    with (
        stopping(follows=processes.is_started_by_first) as stop,
        open_run(
            config,
            choices,
            overrides,
            processes=processes,
            in_sweep=job is not None,
            swept=job.swept if job else (),
        ) as run,
    ):
        if job is not None:
            job.training = run
        try:
            bits_per_byte, corpus = fit(config, choices, run, stop, job)
        except (Interrupted, DivergedError):
            if processes.is_first:
                print_upload(run)
            raise
        finally:
            processes.leave()
    if processes.is_first:
        conclude(run, config, corpus)
    return bits_per_byte


def fit(
    config: DictConfig, choices: dict[str, str], run: Run, stop: Stopping, job: Job | None = None
) -> tuple[float, Corpus]:
    """Trains an open run to its last step. Returns the last val/bpc, and the bytes."""
    lightning.seed_everything(config.seed, verbose=False)
    check_trainer(config.trainer)
    if "offline" in config.logger:
        wandb_mode(offline=config.logger.offline)  # refused before anything is written
    module = build_module(config)  # before the data: a model that cannot be built needs no download
    corpus = builder(config, "data")()
    data = build_data(config, corpus)
    join(run.processes, cuda=uses_cuda(config.trainer.accelerator))
    run.find(corpus.provenance["sha256"])
    gpu = take_devices(config, run, job)
    if run.checkpoint is None:
        for block in module.gpt.blocks:
            check_parts(block.attention)
        if config.init_from is not None:
            start_from(module, config)
            run.note_files()
    validated = run.resume_step is not None and run.resume_step == run.validated_step
    if validated and length_of(config, run).is_reached(run.resume_step):
        return repeat(config, run, module, data, stop, gpu), corpus
    run.start(choices, **describe(module, data))
    log.info(opening_line(config, run))
    with loggers_of(config, run) as loggers:
        trainer = trainer_of(config, run, data, stop, loggers, gpu)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
        except BaseException as error:
            end_started(trainer, patience_s=20 if isinstance(error, Interrupted) else 2)
            if is_of_compiling(error):
                log.error("torch.compile could not make this model's step; compile=false trains it without, slower")
            raise
        bits_per_byte = trainer.callback_metrics["val/bpc"].item()
        if config.test:
            best = run.folder / CHECKPOINT_FOLDER / BEST_CHECKPOINT
            trainer.test(module, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)
    return bits_per_byte, corpus


def take_devices(config: DictConfig, run: Run, job: Job | None) -> int | None:
    """Locks what the run trains on. Returns the index of the GPU that a sweep's job got, which is CUDA's from here."""
    cuda = uses_cuda(config.trainer.accelerator)
    on_wait = (lambda: None) if job is None else job.end_if_stopped
    gpu = run.take_devices(cuda=cuda, devices=config.trainer.devices, on_wait=on_wait)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    if job is not None:
        check_backend(config)  # not before: it would put something on the first GPU, which may be another job's
        job.note(folder=str(run.folder), place=run.record.get("place"))
    return gpu


def repeat(
    config: DictConfig,
    run: Run,
    module: GPTModule,
    data: ByteDataModule,
    stop: Stopping,
    gpu: int | None,
) -> float:
    """Nothing is left to train: tests where that is asked for, and leaves all else as it is. Returns val/bpc.

    Raises:
        ValueError: see Run.check_complete.
    """
    run.check_complete()
    bits_per_byte = read_results(run.folder).last("val/bpc")
    if bits_per_byte is None:
        raise ValueError(f"{run.folder} has no val/bpc, although its checkpoint has all {run.resume_step} steps")
    log.info("run folder %s has all of its %d steps: nothing is left to train", run.folder, run.resume_step)
    run.begin()
    run.mend()
    if config.test:
        with loggers_of(config, run) as loggers:
            trainer = trainer_of(config, run, data, stop, loggers, gpu)
            checkpoint = run.folder / CHECKPOINT_FOLDER / BEST_CHECKPOINT
            trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = (
                run.resume_step  # what the test is logged at
            )
            trainer.test(module, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    return bits_per_byte


def start_from(module: GPTModule, config: DictConfig) -> None:
    """Warm start, and a word about what could not be taken over, or is used otherwise than it was trained."""
    used = meant_otherwise(config.init_from, config)  # first: it refuses more
    notes = [*load_weights(module.gpt, config.init_from), *used]
    log.info("%s", "; ".join([f"weights taken from {config.init_from}", *notes]))


def trainer_of(
    config: DictConfig,
    run: Run,
    data: ByteDataModule,
    stop: Stopping,
    loggers: list[Logger],
    gpu: int | None,
) -> lightning.Trainer:
    """The run's trainer."""
    length = length_of(config, run)
    callbacks = build_callbacks(config, run, data, length)
    if config.trainer.budget_minutes is not None:
        schedule = builder(config, "optimizer")().schedule
        clock = TrainingTime(run.folder, length=length, schedule=schedule, stopping=stop)
        callbacks.insert(0, clock)  # the others read what it sets
    return build_trainer(
        run_dir=run.folder,
        loggers=loggers,
        callbacks=callbacks,
        length=length,
        accumulate=data.accumulate,
        options=config.trainer,
        processes=run.processes,
        stopping=stop,
        gpu=gpu,
    )


def length_of(config: DictConfig, run: Run) -> Length:
    """How long the run trains, and has trained."""
    return Length(config.max_steps, config.trainer.budget_minutes, seconds=run.trained_s or 0.0)


def build_module(config: DictConfig) -> GPTModule:
    """The model and how it is trained."""
    cuda = uses_cuda(config.trainer.accelerator)
    optimizer = builder(config, "optimizer")()
    if config.trainer.budget_minutes is not None:
        check_timed(config, optimizer)
    return GPTModule(
        build_gpt(config),
        optimizer,
        seed=config.seed,
        clip_norm=config.trainer.clip_norm,
        compile=choose_compile(config.compile, cuda=cuda),
    )


def check_timed(config: DictConfig, optimizer: OptimizerBuilder) -> None:
    """Raises ValueError where a budget of time cannot go with an optimizer's schedule."""
    if not hasattr(optimizer, "schedule"):
        raise ValueError(
            f"trainer.budget_minutes needs an optimizer whose schedule can go by time, adamw or muon; "
            f"optimizer={config.optimizer.kind} has none"
        )
    if optimizer.schedule.repeated is not None:
        raise ValueError(
            "optimizer.rates repeats a run by steps: trainer.budget_minutes must be null, and max_steps their number; "
            f"got trainer.budget_minutes={config.trainer.budget_minutes:g}"
        )


def build_data(config: DictConfig, corpus: Corpus) -> ByteDataModule:
    """The windows of the corpus, cut into steps and micro-batches."""
    largest = config.micro_batch_tokens
    if largest is None:
        largest = default_micro_batch_tokens(cuda=uses_cuda(config.trainer.accelerator))
    devices, num_nodes = config.trainer.devices, config.trainer.num_nodes
    size, accumulate = micro_batches(config.tokens_per_step, largest, config.seq_len, devices, num_nodes)
    val_bytes = config.trainer.val_bytes
    if val_bytes is not None and val_bytes <= config.seq_len:
        raise ValueError(f"trainer.val_bytes must be null or more than seq_len = {config.seq_len}, got {val_bytes}")
    return ByteDataModule(
        corpus,
        seq_len=config.seq_len,
        micro_batch_size=size,
        accumulate=accumulate,
        windows_per_step=size * accumulate * devices * num_nodes,
        num_micro_batches=config.max_steps * accumulate,
        seed=config.seed,
        eval_batch_size=size,
        val_bytes=val_bytes,
        on_device=config.trainer.data_on_device,
        overfit=config.trainer.overfit,
    )


def describe(module: GPTModule, data: ByteDataModule) -> dict:
    """What run.json says of a run beyond its configuration."""
    return {
        "corpus": {"name": data.corpus.name, **data.corpus.provenance, "val_scored": data.val_scored},
        "parameters": module.gpt.num_parameters(),
        "micro_batch_size": data.micro_batch_size,
        "accumulate": data.accumulate,
        "tokens_per_step": data.tokens_per_step,
    }


def opening_line(config: DictConfig, run: Run) -> str:
    """What is about to be trained, on what, for how long and where."""
    record, cuda = run.record, uses_cuda(config.trainer.accelerator)
    corpus, processor = record["corpus"], record["device"] if cuda else "CPU"
    devices = processor if config.trainer.devices == 1 else f"{config.trainer.devices} x {processor}"
    begun = f" from step {run.resume_step:,}" if run.resume_step else ""
    minutes = config.trainer.budget_minutes
    timed = "" if minutes is None else f"{minutes:g} minutes of training, at most "
    return (
        f"{record['parameters']:,} parameters on {devices} in {choose_precision(config.trainer.precision, cuda=cuda)}; "
        f"{timed}{config.max_steps:,} steps{begun} of {record['tokens_per_step']:,} bytes, context {config.seq_len:,}; "
        f"corpus {corpus['name']}, {corpus['bytes']:,} bytes; run folder {run.folder}"
    )


def build_callbacks(config: DictConfig, run: Run, data: ByteDataModule, length: Length) -> list[lightning.Callback]:
    """What is recorded while training."""
    options = config.trainer
    # A run stopped before a validation, and then killed in it, made that step's sample, and makes it again.
    keep_to = None if run.resume_step is None else run.validated_step or 0
    metrics = TrainingMetrics(
        log_every=options.log_every,
        length=length,
        tokens_per_step=data.tokens_per_step,
        seq_len=config.seq_len,
    )
    sample = TextSample(
        run.folder,
        prompt=data.val[: min(64, config.seq_len)].tobytes(),
        num_bytes=options.sample_bytes,
        seed=config.seed,
        keep_to=keep_to,
    )
    progress = ProgressReport(
        length=length,
        tokens_per_step=data.tokens_per_step,
        val_every=options.val_every,
        val_tokens=data.val_scored,
        bar=options.progress_bar and sys.stdout.isatty(),  # in a file it would be one long line
    )
    logits = LogitMetrics(data.val[: config.seq_len].tobytes())
    profile = [Profile(run.folder, options.profile_steps, config.max_steps)] if options.profile_steps else []
    is_learned = config.model.positions == "dynamic"
    biases = [PositionBiases(run.folder, keep_to=keep_to)] if is_learned else []
    return [*profile, metrics, logits, *biases, sample, progress]


@contextmanager
def loggers_of(config: DictConfig, run: Run) -> Iterator[list[Logger]]:
    """The loggers of conf/logger/, told where the run is and what it is, and closed at the end."""
    with redacted_command_line():
        loggers = _open_loggers(config, run)
    run.update(wandb_folder=offline_folder(loggers), wandb_id=wandb_id_of(loggers) or run.record["wandb_id"])
    # what the record will say of the run's end is in wandb's summary
    ends = ("status", "error", "ended", "wall_seconds")
    record = {key: value for key, value in run.record.items() if key not in ends}
    for logger in loggers:
        logger.log_hyperparams(redact_tree({**OmegaConf.to_container(config), "run": record}))
    status, error = "finished", None
    try:
        yield loggers
    except (Interrupted, KeyboardInterrupt, SystemExit):
        status = "interrupted"
        raise
    except BaseException as stopped:
        status, error = "diverged" if isinstance(stopped, DivergedError) else "failed", redact(one_line(str(stopped)))
        raise
    finally:
        finish(loggers, status=status, error=error)


def _open_loggers(config: DictConfig, run: Run) -> list[Logger]:
    open_loggers, options = builder(config, "logger"), {}
    if "group" in config.logger:
        run.record.setdefault("wandb_group", group_here())  # the same when it is resumed
        options["group"] = config.logger.group or run.record["wandb_group"]
    for key in ("notes", "tags", "job_type"):
        if config.logger.get(key):
            options[key] = redact_tree(OmegaConf.to_container(config.logger)[key])
    try:
        return open_loggers(run_dir=run.folder, resume_step=run.resume_step, wandb_id=run.record["wandb_id"], **options)
    except Exception as error:  # a service's own errors: no account, no network
        raise ValueError(f"logger={config.logger.kind} does not start: {error}") from error


if __name__ == "__main__":
    main()
