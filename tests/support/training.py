"""Trainings of a tiny model: in this process or in one of their own, and what their runs hold."""

import csv
import os
import subprocess
from pathlib import Path

import pytest
import torch

from conf.schema import validate
from support import ROOT
from support.configuration import configure
from support.forked import Forked
from train import train

# Small enough for seconds; dropout and accumulation on, because resuming must restore both.
TINY = [
    "model=tiny",
    "model.num_layers=1",
    "model.width=32",
    "model.num_heads=2",
    "model.dropout=0.1",
    "data=file",
    "trainer.accelerator=cpu",
    "trainer.progress_bar=false",
    "trainer.val_bytes=600",
    "trainer.sample_bytes=8",
    "trainer.log_every=2",
    "trainer.val_every=4",
    "logger=csv",
    "seq_len=32",
    "tokens_per_step=256",
    "micro_batch_tokens=128",
    "max_steps=8",
]


def overrides(text, root, *changes):
    return [*TINY, f"data.path={text}", f"run_root={root}", *changes]


def fit(text, root, *changes):
    """Trains in this process; returns the run's folder."""
    config = validate(configure(*overrides(text, root, "name=run", *changes)))
    train(config, choices={"attention": "cosine"})
    return Path(root) / "run"


def command(text, root, *changes, flags=(), code=None, variables=None):
    """The same in a process of its own, as a user starts it; code runs before it."""
    process = Popen(text, root, *changes, flags=flags, code=code, variables=variables)
    out, err = process.communicate(timeout=1800)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def Popen(text, root, *changes, flags=(), code=None, variables=None):
    """That process, started."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "tests"))
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(root), **(variables or {})}
    return Forked([*flags, *overrides(text, root, *changes)], environment, code)


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def losses(folder):
    return [(int(row["step"]), float(row["train/loss"]), row["val/bpc"] != "") for row in metrics(folder)]


def same(found, expected):
    assert [(step, validated) for step, _, validated in found] == [(step, val) for step, _, val in expected]
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in expected], rel=1e-5)


# Where a run is killed: between checkpoints, after a sample and before its checkpoint, while a checkpoint is written.
KILL_IN = {
    "step 7": ("callbacks.TrainingMetrics", "on_train_batch_end", "args[1].global_step == 7"),
    "sample of step 8": ("callbacks.TextSample", "on_validation_end", "args[1].global_step == 8"),
    "checkpoint of step 8": ("checkpoints.os", "fsync", "writes_step_8(args)"),
}


def killed_in(place):
    """Code that kills the process, without any warning, after the named function did its work."""
    owner, name, condition = KILL_IN[place]
    return f"""
import os, signal
import models.training.callbacks as callbacks, models.training.checkpoints as checkpoints
original = {owner}.{name}
def writes_step_8(args):
    return "step-8.ckpt" in os.readlink(f"/proc/self/fd/{{args[0]}}")
def work_and_die(*args):
    original(*args)
    if {condition}:
        os.kill(os.getpid(), signal.SIGKILL)
{owner}.{name} = work_and_die
"""
