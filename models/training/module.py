"""GPTModule: what one step of training and of evaluation is."""

import math
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from data.bytes import IGNORE_INDEX
from models.attention import hold_scales
from models.gpt import GPT
from models.training.optimizer import OptimizerBuilder, place_steps


class DivergedError(RuntimeError):
    """The training loss is no longer a finite number."""


class GPTModule(lightning.LightningModule):
    """Trains a GPT on windows of bytes.

    A step's windows are a pure function of (seed, step), its dropout masks of (seed, step, micro-step, rank). A resumed
    run therefore repeats the uninterrupted one without any loader state; the Lightning data loader merely counts.

    Args:
        gpt: the model.
        optimizer: builds optimizer and schedule.
        seed: of windows and dropout.
        clip_norm: the gradient is scaled down to this l2 norm; None leaves it.
        compile: run the model through torch.compile.
    """

    def __init__(self, gpt: GPT, optimizer: OptimizerBuilder, *, seed: int, clip_norm: float | None, compile: bool):
        super().__init__()
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"trainer.clip_norm must be positive or null, got {clip_norm}")
        self.gpt = gpt
        self.optimizer = optimizer
        self.seed = seed
        self.clip_norm = clip_norm
        self.grad_norm: Tensor | None = None  # of the last step, before clipping
        self.tokens = 0  # trained on so far, by all ranks
        self._loss_sum: Tensor | None = None  # over micro-batches since the last take_loss, on the device
        self._loss_count = 0
        if compile:
            _never_stop_compiling()
            # In place and on the inner module: a wrapper would write _orig_mod into every checkpoint key.
            self.gpt.compile(dynamic=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002 (the loader only counts)
        micro_step = batch_idx % self.trainer.accumulate_grad_batches
        step, rank = self.global_step, self.global_rank
        if micro_step == 0:
            hold_scales(block.attention.inner for block in self.gpt.blocks)
        torch.manual_seed(_mix(self.seed, step, micro_step, rank))  # dropout
        tokens = self.trainer.datamodule.train_batch(step, micro_step, rank, self.device)
        loss = self.gpt(tokens[:, :-1], tokens[:, 1:])  # tokens (micro_batch_size, seq_len + 1)
        self.tokens += (tokens.numel() - len(tokens)) * self.trainer.world_size
        self._add_loss(loss.detach())
        return loss

    def _add_loss(self, loss: Tensor) -> None:
        # Summed on the device: reading a loss every step would make the host wait for the GPU.
        self._loss_sum = loss.double() if self._loss_sum is None else self._loss_sum + loss
        self._loss_count += 1

    def take_loss(self) -> float:
        """The mean training loss since the last call, in nats a byte, over all ranks. Waits for the device."""
        if self._loss_sum is None:
            return math.nan
        mean = self.trainer.strategy.reduce(self._loss_sum / self._loss_count, reduce_op="mean").item()
        self._loss_sum, self._loss_count = None, 0
        return mean

    def recent_loss(self) -> float:
        """What ``take_loss`` would give of this rank alone, left to be taken. Waits for the device."""
        return math.nan if self._loss_sum is None else (self._loss_sum / self._loss_count).item()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,  # noqa: ARG002
        gradient_clip_val: float | None = None,  # noqa: ARG002
        gradient_clip_algorithm: str | None = None,  # noqa: ARG002
    ) -> None:
        # Clipped here, not by the Trainer: it refuses a fused optimizer under bf16-mixed, and would compute the
        # norm that is logged a second time.
        max_norm = math.inf if self.clip_norm is None else self.clip_norm
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), max_norm)
        if self.grad_norm.device.type == "cpu" and not math.isfinite(self.grad_norm):
            # at once where reading it is free; on a GPU at the next log step or validation
            raise DivergedError(f"the gradient's norm is {self.grad_norm.item()} at step {self.global_step + 1}")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, scheduler = self.optimizer.build(self.gpt)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        # A checkpoint restores the optimizer's own settings. The configuration's count: they are what is recorded,
        # and a resumed run that was told another learning rate must use it.
        built, scheduler = self.optimizer.build(self.gpt)
        rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        groups = zip(self.trainer.optimizers[0].param_groups, built.param_groups, rates, strict=True)
        for group, configured, (peak, fraction) in groups:
            group.update({key: value for key, value in configured.items() if key != "params"})
            group["lr"] = peak * fraction(self.global_step)
        place_steps(self.trainer.optimizers[0])
        self.lr_schedulers().base_lrs = scheduler.base_lrs

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # runs on every rank: each has its own sum, and all are restored from this one
        loss_sum = None
        if self._loss_sum is not None:
            loss_sum = self.trainer.strategy.reduce(self._loss_sum.clone(), reduce_op="mean").item()
        pieces = self.trainer.accumulate_grad_batches
        checkpoint["loss_since_last_log"] = {"sum": loss_sum, "count": self._loss_count, "a_step": pieces}
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["loss_since_last_log"]
        # A step that is cut into other pieces from here on has another number of losses, and counts as much as before.
        # Earlier checkpoints do not say into how many theirs were cut.
        pieces = self.trainer.accumulate_grad_batches
        before = saved.get("a_step", pieces)
        self._loss_count = saved["count"] * pieces // before
        if saved["sum"] is not None:
            loss_sum = saved["sum"] * (pieces / before)  # the same bits where both are
            self._loss_sum = torch.tensor(loss_sum, dtype=torch.float64, device=self.device)
        self.tokens = checkpoint.get("tokens", 0)
        # Lightning counts micro-batches and goes on from its count: a step that is cut into other pieces now would
        # begin in its middle, and validations move. The count is also one short in a checkpoint between validations.
        batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        loops = checkpoint["loops"]["fit_loop"]
        # A validation that was stopped is begun again, not gone on with: its sums are lost.
        for loop, count in (("epoch_loop", batches), ("epoch_loop.val_loop", 0)):
            progress = loops[f"{loop}.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts.update(dict.fromkeys(counts, count))
            progress["is_last_batch"] = False

    def on_validation_epoch_start(self) -> None:
        self._nats = torch.zeros((), dtype=torch.float64, device=self.device)
        self._scored = torch.zeros((), dtype=torch.int64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        inputs, targets = batch  # (eval_batch_size, seq_len) each
        scored = (targets != IGNORE_INDEX).sum()
        mean = self.gpt(inputs, targets)  # not a number where nothing is scored
        self._nats += torch.where(scored > 0, mean.double() * scored, 0.0)
        self._scored += scored

    def on_validation_epoch_end(self) -> None:
        self._log_bits_per_byte("val")

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_bits_per_byte("test")

    def _log_bits_per_byte(self, split: str) -> None:
        # Sum of -ln p over scored bytes / (number of scored bytes * ln 2): never a mean of batch means.
        nats = self.trainer.strategy.reduce(self._nats, reduce_op="sum")
        scored = self.trainer.strategy.reduce(self._scored, reduce_op="sum")
        bits_per_byte = (nats / (scored * math.log(2))).item()
        name = f"{split}/bpc"
        more = {"val/bytes": scored.item(), "train/tokens": self.tokens} if split == "val" else {}
        self.report({name: bits_per_byte, **more}, watched=name)
        if not math.isfinite(bits_per_byte):  # before a sample is drawn from these weights, or a checkpoint written
            raise DivergedError(f"{split}/bpc is {bits_per_byte} at step {self.global_step}")

    def report(self, metrics: dict[str, float], watched: str) -> None:
        """Sends metrics to the loggers, at the number of finished optimizer steps.

        Lightning's own route counts steps from 0, and what it is told costs it host time then and after every
        micro-batch, logged or not: it is told one metric, watched, which its callback_metrics then have.
        """
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step)
        # A CPU tensor: Lightning reads it after every micro-batch, and one on the GPU would make the host wait.
        self.log(watched, torch.tensor(float(metrics[watched])), logger=False)


def _never_stop_compiling() -> None:
    """Lets a process compile as many variants of the model as a sweep has, and raises where that ends, too.

    Jobs of a sweep share a process and what it compiled: another seed compiles nothing. But after eight variants
    (of attention, norm and length, for training and for validation) torch.compile by default goes on uncompiled, with
    a line of warning, and the jobs that come late in a sweep would look slow.
    """
    from torch._dynamo import config  # here: it takes a second, and compile=false needs none of it

    config.recompile_limit = config.accumulated_recompile_limit = 1024
    config.fail_on_recompile_limit_hit = True


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers, without the collisions that adding them would have."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
