"""What is recorded while training: loss, throughput, memory, and a sample of text at each validation."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import psutil
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from models.attention import BELOW_BOUND
from models.gpt import GPT
from models.positions import DynamicBias
from models.training.checkpoint_files import write_text, writing
from models.training.devices import peak_flops, wait_for
from models.training.length import Length
from models.training.loggers import log_sample
from models.training.module import DivergedError, GPTModule
from models.training.run_files import POSITION_BIAS_FILE, SAMPLES_FILE, csv_text, read_csv, read_samples, sample_section
from models.training.stopping import Interrupted
from models.training.tables import decode

log = logging.getLogger(__name__)

GIB = 2**30


class TrainingMetrics(lightning.Callback):
    """Every ``log_every`` steps: loss, learning rate, gradient norm, throughput and memory of the interval.

    Columns: train/, throughput/, memory/ and, with a learned scale, scale/; metrics.py says what each means.
    Throughput leaves out validation, samples, checkpoints and the first step, which compiles.
    """

    def __init__(self, *, log_every: int, length: Length, tokens_per_step: int, seq_len: int):
        self.log_every = log_every
        self.length = length
        self.tokens_per_step = tokens_per_step
        self.seq_len = seq_len
        self._clock: float | None = None  # running since, or None while stopped
        self._elapsed_s = 0.0
        self._timed_steps = 0
        self._seen_first_step = False

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # of this step; its end already sets the next one's
        if self._clock is None and self._seen_first_step:
            self._clock = time.perf_counter()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: GPTModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        step = trainer.global_step
        self._timed_steps += self._clock is not None
        self._seen_first_step = True
        over = self.length.is_reached(step)
        if step % self.log_every == 0 or over:
            self._report(trainer, module)
        if over:
            trainer.should_stop = True  # a validation follows, wherever the last step falls in its interval

    def on_validation_start(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        del trainer
        self._stand(module.device)

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: GPTModule, checkpoint: dict[str, Any]) -> None:
        del trainer, checkpoint
        self._stand(module.device)

    def on_validation_end(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            seen = trainer.callback_metrics  # without a training loss where a resumed run begins with its validation
            losses = [f"{name} {seen[f'{name}/bpc']:.4f}" for name in ("train", "val") if f"{name}/bpc" in seen]
            log.info("%s: %s bits per byte", self.length.place(trainer.global_step), ", ".join(losses))
        del module

    def _stand(self, device: torch.device) -> None:
        """Stops the clock, with all steps done that were begun, until the next one begins."""
        wait_for(device)
        self._lap()
        self._clock = None

    def _lap(self) -> None:
        # The clock goes on: what is done between steps, logging too, is part of the price of a step.
        now = time.perf_counter()
        if self._clock is not None:
            self._elapsed_s += now - self._clock
            self._clock = now

    def _report(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        scales = LearnedScales.of(module.gpt)  # computed, not read: the host does not wait
        loss = module.take_loss()  # waits for the device, so that the clock below is honest
        self._lap()
        grad_norm, *values = torch.cat((module.grad_norm.float().reshape(1), *scales.values)).tolist()  # one transfer
        metrics = {
            "train/loss": loss,
            "train/bpc": loss / math.log(2),
            "train/lr": self._lr,
            "train/grad_norm": grad_norm,
            "train/tokens": module.tokens,
            **({} if self.length.budget_s is None else {"train/seconds": self.length.seconds}),
            **self._throughput(trainer, module),
            **_memory(module.device),
            **scales.summary(values),
        }
        module.report(metrics, watched="train/bpc")
        self._elapsed_s, self._timed_steps = 0.0, 0
        if not math.isfinite(loss):
            raise DivergedError(f"the training loss is {loss} at step {trainer.global_step}")

    def _throughput(self, trainer: lightning.Trainer, module: GPTModule) -> dict[str, float]:
        if not self._timed_steps:
            return {}
        tokens_per_s = self._timed_steps * self.tokens_per_step / self._elapsed_s
        flops_per_s = tokens_per_s * module.gpt.flops_per_token(self.seq_len)
        metrics = {
            "throughput/tokens_per_s": tokens_per_s,
            "throughput/model_tflops_per_s": flops_per_s / 1e12,
        }
        peak = peak_flops(module.device)
        if peak is not None:
            metrics["throughput/mfu"] = flops_per_s / (peak * trainer.world_size)
        return metrics


@dataclass(frozen=True)
class LearnedScales:
    """The learned scales of a model, still on its device.

    Attributes:
        values: those of each layer, float32 (num_heads,), before they are held below their bound.
        bounds: the bound of each layer.
    """

    values: list[Tensor]
    bounds: list[float]

    @classmethod
    @torch.no_grad()
    def of(cls, gpt: GPT) -> "LearnedScales":
        """Of a model whose attention may learn its scale."""
        inner = [block.attention.inner for block in gpt.blocks]
        inner = [module for module in inner if getattr(module, "log_scale", None) is not None]
        return cls([module.log_scale.float().exp() for module in inner], [module.max_scale for module in inner])

    def summary(self, values: list[float]) -> dict[str, float]:
        """The columns of metrics, from what was read of ``values``, one layer's heads after the other's."""
        columns, used, clamped = {}, [], 0
        for layer, (tensor, bound) in enumerate(zip(self.values, self.bounds, strict=True)):
            heads = values[len(used) : len(used) + len(tensor)]
            clamped += sum(value >= bound * (1 - 2 * BELOW_BOUND) for value in heads)
            heads = [min(value, bound) for value in heads]
            columns.update(_spread(f"scale/layer{layer}", heads))
            used += heads
        return {**_spread("scale", used), "scale/clamped": clamped / len(used), **columns} if used else {}


def _spread(prefix: str, values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    return {f"{prefix}/mean": mean, f"{prefix}/min": min(values), f"{prefix}/max": max(values)}


def _memory(device: torch.device) -> dict[str, float]:
    """Memory of the interval that ends now, in GiB; starts the next interval."""
    if device.type != "cuda":
        return {"memory/rss_gib": psutil.Process().memory_info().rss / GIB}
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory/peak_allocated_gib": allocated / GIB, "memory/peak_reserved_gib": reserved / GIB}


class LogitMetrics(lightning.Callback):
    """At each validation the largest |logit| that one window of the validation split makes.

    Columns: logit/. A logit is scale * cos(q, k), or q k / sqrt(head_dim) with regular attention, without a bias by
    distance; counted are all heads, and the pairs of a query and a key that it sees.

    Args:
        window: the bytes, at most the model's seq_len.
    """

    def __init__(self, window: bytes):
        self.window = window

    @rank_zero_only
    def on_validation_end(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        if trainer.state.fn != "fit":
            return
        with trainer.precision_plugin.forward_context():
            layers = largest_logits(module.gpt, torch.tensor(list(self.window), device=module.device)[None])
        metrics = {"logit/max": max(layers), **{f"logit/layer{i}/max": value for i, value in enumerate(layers)}}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


@torch.no_grad()
def largest_logits(gpt: GPT, tokens: Tensor) -> list[float]:
    """The largest |logit| of every layer for tokens (1, n)."""
    found: list[Tensor] = []

    def measure(inner: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        q, k, _ = arguments
        with torch.autocast(q.device.type, enabled=False):  # products of float32
            found.append(inner.largest_logit(q, k))

    hooks = [block.attention.inner.register_forward_pre_hook(measure) for block in gpt.blocks]
    was_training = gpt.training
    try:
        gpt.eval().forward(tokens)  # forward, not __call__: a compiled model would be compiled for the hooks
    finally:
        gpt.train(was_training)
        for hook in hooks:
            hook.remove()
    return torch.stack(found).tolist()


class PositionBiases(lightning.Callback):
    """At each validation keeps the learned biases by distance of model.positions=dynamic.

    ``run_dir/position_bias.csv`` has a row for each step, layer and distance, with a column a head.

    Args:
        run_dir: the run's folder.
        keep_to: the step that a resumed run validated last, or 0: rows of later ones are dropped.
    """

    def __init__(self, run_dir: str | Path, *, keep_to: int | None = None):
        self.path = Path(run_dir) / POSITION_BIAS_FILE
        if keep_to is not None and self.path.exists():
            self._drop_after(keep_to)

    @rank_zero_only
    def _drop_after(self, step: int) -> None:
        # as samples: a run killed between a validation and its checkpoint validates again
        kept = [row for row in read_csv(self.path) if int(row["step"]) <= step]
        if kept:
            write_text(self.path, csv_text([list(kept[0]), *(list(row.values()) for row in kept)]))
        else:
            self.path.unlink()

    @rank_zero_only
    def on_validation_end(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        if trainer.state.fn != "fit":
            return
        rows = [[trainer.global_step, *row] for row in position_biases(module.gpt)]
        heads = [f"head{head}" for head in range(len(rows[0]) - 3)]
        self._append(rows, header=["step", "layer", "distance", *heads])

    def _append(self, rows: list[list[Any]], header: list[str]) -> None:
        is_new = not self.path.exists()
        with writing(self.path), open(self.path, "a", newline="") as file:
            file.write(csv_text([header, *rows] if is_new else rows))


@torch.no_grad()
def position_biases(gpt: GPT) -> list[list[float]]:
    """Layer, distance, and the learned bias of each head there; of two distances an octave, and the largest."""
    distances = _told_distances(gpt.seq_len)
    rows = []
    for layer, block in enumerate(gpt.blocks):
        bias = block.attention.inner.position_bias
        if isinstance(bias, DynamicBias):
            table = bias(gpt.seq_len, gpt.embedding.weight).T[distances].tolist()  # a row a distance, a number a head
            rows += [[layer, distance, *heads] for distance, heads in zip(distances, table, strict=True)]
    return rows


def _told_distances(seq_len: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12 ... below seq_len, and seq_len - 1."""
    octaves = [1 << octave for octave in range(seq_len.bit_length())]
    steps = {0, *octaves, *(step + step // 2 for step in octaves), seq_len - 1}
    return sorted(step for step in steps if step < seq_len)


class Profile(lightning.Callback):
    """Profiles some training steps: a table of what took longest on the console, ``trace.json`` in the run's folder.

    Of fewer where training ends before, by a budget of time or a signal.

    Args:
        run_dir: the run's folder.
        num_steps: steps to profile, behind the first ten of this start where there are as many: those compile.
        max_steps: steps of the run.
    """

    def __init__(self, run_dir: str | Path, num_steps: int, max_steps: int):
        self.path = Path(run_dir) / "trace.json"
        self.num_steps = num_steps
        self.max_steps = max_steps
        self._profiler: torch.profiler.profile | None = None
        self._written = False

    @rank_zero_only
    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        left = self.max_steps - trainer.global_step
        self._first = trainer.global_step + max(0, min(10, left - self.num_steps))

    @rank_zero_only
    def on_train_batch_start(self, trainer: lightning.Trainer, module: GPTModule, *_: Any) -> None:
        if self._profiler is None and not self._written and trainer.global_step == self._first:
            wait_for(module.device)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if module.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()

    @rank_zero_only
    def on_train_batch_end(self, trainer: lightning.Trainer, module: GPTModule, *_: Any) -> None:
        if self._profiler is not None and trainer.global_step >= self._first + self.num_steps:
            self._write(trainer, module)

    @rank_zero_only
    def on_train_end(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        if self._profiler is not None:
            self._write(trainer, module)
        if not self._written:
            log.warning("no step was profiled: training ended before step %d", self._first + 1)

    @rank_zero_only
    def on_exception(self, trainer: lightning.Trainer, module: GPTModule, exception: BaseException) -> None:
        if self._profiler is not None and isinstance(exception, Interrupted):
            self._write(trainer, module)

    def _write(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        wait_for(module.device)
        self._profiler.stop()
        by = "self_cuda_time_total" if module.device.type == "cuda" else "self_cpu_time_total"
        print(self._profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60))
        self._profiler.export_chrome_trace(str(self.path))
        print(f"profile of {trainer.global_step - self._first} steps: {self.path}")
        self._profiler, self._written = None, True  # once a run


class TextSample(lightning.Callback):
    """At each validation continues the first bytes of the validation split and keeps the text.

    Written to ``run_dir/samples.txt`` and, where the logger takes text, logged as a table. Samples of a resumed run
    behind ``keep_to``, the step that it validated last, or 0, are dropped.
    """

    def __init__(self, run_dir: str | Path, *, prompt: bytes, num_bytes: int, seed: int, keep_to: int | None = None):
        self.path = Path(run_dir) / SAMPLES_FILE
        self.prompt = prompt
        self.num_bytes = num_bytes
        self.seed = seed
        if keep_to is not None and self.path.exists():
            self._drop_after(keep_to)

    @rank_zero_only
    def _drop_after(self, step: int) -> None:
        # a run killed between a sample and its checkpoint draws that sample again
        kept = [sample_section(*sample) for sample in read_samples(self.path) if sample[0] <= step]
        write_text(self.path, "".join(kept))

    @rank_zero_only
    def on_validation_end(self, trainer: lightning.Trainer, module: GPTModule) -> None:
        if not self.num_bytes or trainer.state.fn != "fit":
            return
        text = self.sample(trainer, module)
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(sample_section(trainer.global_step, text))
        for logger in trainer.loggers:
            log_sample(logger, trainer.global_step, text)

    def sample(self, trainer: lightning.Trainer, module: GPTModule) -> str:
        """The prompt and its continuation, with its own random numbers: training's are not touched."""
        device = module.device
        prompt = torch.tensor(list(self.prompt), device=device)[None]  # (1, n)
        generator = torch.Generator(device).manual_seed(self.seed)
        with trainer.precision_plugin.forward_context():
            new = module.gpt.generate(prompt, self.num_bytes, temperature=0.8, generator=generator)
        return decode(self.prompt + bytes(new[0].tolist()))
