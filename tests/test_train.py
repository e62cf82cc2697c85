"""Whole trainings on a CPU: every combination, exact resume after SIGKILL, divergence, sweeps, several processes."""

import datetime
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import lightning
import pytest
import torch
from omegaconf import OmegaConf
from support.configuration import configure
from support.training import KILL_IN, Popen, command, fit, killed_in, losses, metrics, overrides, same, weights

from conf.registry import BUILDERS
from conf.schema import validate
from models.gpt import GPT
from models.training import checkpoints, runs
from models.training.callbacks import (
    LearnedScales,
    LogitMetrics,
    PositionBiases,
    Profile,
    TextSample,
    TrainingMetrics,
)
from models.training.checkpoint_files import also_named, mend_best, read_checkpoint, write_text
from models.training.checkpoints import AtomicCheckpointIO, Checkpoints
from models.training.devices import peak_flops
from models.training.identity import default_name, recorded_identity
from models.training.load import build_gpt, load_model, load_weights
from models.training.loggers import CSVLogger, wandb_mode
from models.training.metrics import metric_of
from models.training.module import DivergedError, GPTModule
from models.training.report import read_results
from models.training.run_files import is_owned, load_config, read_csv, read_samples
from models.training.runs import Run
from models.training.stopping import NOTED, Interrupted
from models.training.tables import decode
from scripts import benchmark_training
from train import build_module, train

pytestmark = pytest.mark.training


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("attention", ["cosine", "regular"])
def test_every_combination_learns_and_records(text, tmp_path, attention, norm):
    folder = fit(text, tmp_path, f"attention={attention}", f"norm={norm}", "max_steps=30", "lr=0.01", "test=true")
    results = read_results(folder)
    assert results.status == "finished"
    assert results.last("step") == 30
    assert results.series("step")[0] == list(range(2, 31, 2))
    assert results.series("val/bpc")[0] == [4, 8, 12, 16, 20, 24, 28, 30]  # every four steps, and at the end
    assert results.last("val/bpc") < 6 < results.series("train/bpc")[1][0]
    assert results.last("test/bpc") < 6
    assert all(metric_of(column) for row in results.rows for column in row)
    for row in results.rows:
        assert row["train/bpc"] == pytest.approx(row["train/loss"] / math.log(2))
        assert row["train/tokens"] == row["step"] * 256
        assert row["train/grad_norm"] > 0
        assert row["throughput/tokens_per_s"] > 0
        assert row["memory/rss_gib"] > 0
    record = json.loads((folder / "run.json").read_text())
    assert record["corpus"]["bytes"] == text.stat().st_size
    assert record["tokens_per_step"] == 256 and record["accumulate"] == 2
    assert record["versions"]["torch"] and "device" in record and "git_commit" in record
    assert (folder / "samples.txt").read_text().count("--- step ") == 8
    assert (folder / "loss_and_memory.png").read_bytes().startswith(b"\x89PNG")


# the checkpoint of step 4 falls inside the log interval of steps 4 to 6
RESUMED = ["name=run", "max_steps=12", "norm=post", "trainer.log_every=3", "model.positions=learned"]


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """The folder of the run that the killed ones must equal."""
    root = tmp_path_factory.mktemp("whole")
    whole = command(text, root, *RESUMED)
    assert whole.returncode == 0, whole.stderr
    return root / "run"


@pytest.mark.parametrize("place", KILL_IN)
def test_sigkill_and_resume_repeat_the_uninterrupted_run_bit_for_bit(text, tmp_path, uninterrupted, place):
    killed = command(text, tmp_path, *RESUMED, code=killed_in(place))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert metrics(tmp_path / "run")[-1]["step"] == ("6" if place == "step 7" else "8")
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "running"
    resumed = command(text, tmp_path, *RESUMED, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "continues at step 4" in resumed.stdout

    equal_runs(uninterrupted, tmp_path / "run")


def equal_runs(whole, run):
    """Weights, optimizer state, logged values and samples of two runs of 12 steps."""
    before, after = weights(whole), weights(run)
    assert before["global_step"] == after["global_step"] == 12
    for name, value in before["state_dict"].items():
        assert torch.equal(value, after["state_dict"][name]), name
    for first, second in zip(
        before["optimizer_states"][0]["state"].values(), after["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(first[key], second[key]) for key in first)
    columns = ("step", "train/loss", "train/bpc", "train/lr", "train/grad_norm", "train/tokens", "val/bpc")
    rows = [[{key: row[key] for key in columns} for row in metrics(folder)] for folder in (whole, run)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == ["3", "4", "6", "8", "9", "12"]
    assert (whole / "samples.txt").read_text() == (run / "samples.txt").read_text()


def test_a_new_run_never_overwrites_one(text, tmp_path):
    first = fit(text, tmp_path)
    before = (first / "metrics.csv").read_bytes()
    fit(text, tmp_path, "max_steps=4")
    assert (first / "metrics.csv").read_bytes() == before
    assert read_results(tmp_path / "run-2").last("step") == 4


def test_a_resumed_run_says_and_does_what_changed(text, tmp_path, caplog):
    folder = fit(text, tmp_path)
    changes = ["max_steps=12", "lr=0.5", "optimizer.weight_decay=0.2", "optimizer.betas=[0.8,0.9]"]
    fit(text, tmp_path, f"resume={folder}", *changes)
    assert "max_steps was 8, is 12: from here on the learning rate follows the schedule of 12 steps" in caplog.text
    assert "resumed with a change: optimizer.weight_decay was 0.1, is 0.2" in caplog.text
    assert "resumed with a change: lr was 0.001, is 0.5" in (folder / "train.log").read_text()
    optimizer = build_module(validate(configure(*overrides(text, tmp_path, *changes)))).optimizer
    rates = {row["step"]: float(row["train/lr"]) for row in metrics(folder)}
    assert rates["10"] == pytest.approx(optimizer.lr_at(9)) and rates["12"] == pytest.approx(optimizer.lr_at(11))
    group = weights(folder)["optimizer_states"][0]["param_groups"][0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.2, (0.8, 0.9))


def test_another_optimizer_trains_and_resumes_with_what_is_configured(text, tmp_path, monkeypatch):
    monkeypatch.setitem(BUILDERS["optimizer"], "sgd", "support.optimizers.Momentum")

    def fit_by_sgd(**changes):
        settings = {"max_steps": 8, "resume": None, "lr": 0.1, "momentum": 0.5} | changes
        optimizer = {"kind": "sgd", "lr": settings["lr"], "momentum": settings.pop("momentum")}
        config = configure(*overrides(text, tmp_path, "name=run"))
        config = validate(OmegaConf.create({**OmegaConf.to_container(config), **settings, "optimizer": optimizer}))
        train(config, choices={"attention": "cosine"})

    fit_by_sgd()
    state = weights(tmp_path / "run")["optimizer_states"][0]
    assert state["param_groups"][0]["momentum"] == 0.5 and "betas" not in state["param_groups"][0]
    fit_by_sgd(resume=str(tmp_path / "run"), max_steps=12, lr=0.05, momentum=0.25)
    resumed = weights(tmp_path / "run")
    group = resumed["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["momentum"]) == (pytest.approx(0.05 * 0.99**12), 0.25) and resumed["global_step"] == 12
    assert read_results(tmp_path / "run").last("val/bpc") < 8


def test_another_optimizer_is_an_entry_and_a_file_and_resumes_bit_for_bit(text, tmp_path):
    """Its file in a folder of options, its entry in the registry; what it remembers is in the checkpoints."""
    options = tmp_path / "options" / "optimizer"
    options.mkdir(parents=True)
    (options / "sgd.yaml").write_text("kind: sgd\nlr: ${lr}\nmomentum: 0.9\n")
    entry = "from conf.registry import BUILDERS\nBUILDERS['optimizer']['sgd'] = 'support.optimizers.Momentum'\n"
    line = [*RESUMED, "optimizer=sgd", "lr=0.05"]

    def run(root, *changes, code=""):
        return command(text, root, *line, *changes, flags=["--config-dir", str(options.parent)], code=entry + code)

    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", code=killed_in("step 7"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path / "killed", "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "continues at step 4" in resumed.stdout
    equal_runs(tmp_path / "whole" / "run", tmp_path / "killed" / "run")
    (state, *_) = weights(tmp_path / "killed" / "run")["optimizer_states"][0]["state"].values()
    assert state["momentum_buffer"].abs().sum() > 0


def test_muon_resumes_bit_for_bit_and_trains_the_same_on_two_ranks(text, tmp_path):
    """One optimizer for two methods: one step count, one schedule, one state, whose parts all resume."""
    line = ["name=run", "max_steps=12", "trainer.log_every=3", "optimizer=muon", "lr=0.01", "model.dropout=0"]
    whole = command(text, tmp_path / "whole", *line)
    assert whole.returncode == 0, whole.stderr
    killed = command(text, tmp_path / "killed", *line, code=killed_in("step 7"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = command(text, tmp_path / "killed", *line, "resume=auto")
    assert resumed.returncode == 0 and "continues at step 4" in resumed.stdout, resumed.stderr
    equal_runs(tmp_path / "whole" / "run", tmp_path / "killed" / "run")
    ranks = command(text, tmp_path / "ranks", *line, "micro_batch_tokens=64", "trainer.devices=2")
    assert ranks.returncode == 0, ranks.stderr
    results, divided = (read_results(tmp_path / root / "run") for root in ("whole", "ranks"))
    for column in ("train/loss", "val/bpc"):  # to rounding, which the iteration enlarges
        assert divided.series(column)[1] == pytest.approx(results.series(column)[1], rel=1e-4)
    state = weights(tmp_path / "killed" / "run")["optimizer_states"][0]
    assert [group["role"] for group in state["param_groups"]] == ["matrices", "embeddings", "head", "gains"]
    assert {tuple(one) for one in state["state"].values()} == {("momentum",), ("step", "exp_avg", "exp_avg_sq")}
    rate = build_module(validate(configure(*overrides(text, tmp_path, *line)))).optimizer.lr_at
    assert results.series("train/lr")[1] == pytest.approx([rate(step - 1) for step in (3, 6, 9, 12)])
    assert results.last("val/bpc") < results.series("val/bpc")[1][0] < 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; PyTorch sees none")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_of_a_cpu_goes_on_on_a_gpu(text, tmp_path, optimizer):
    line = ["name=run", "max_steps=8", f"optimizer={optimizer}"]
    killed = command(text, tmp_path, *line, code=killed_in("step 7"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = command(text, tmp_path, *line, "resume=auto", "trainer.accelerator=gpu")
    assert resumed.returncode == 0 and "continues at step 4" in resumed.stdout, resumed.stderr
    results = read_results(tmp_path / "run")
    assert results.last("step") == 8 and results.last("val/bpc") < results.series("val/bpc")[1][0] < 8.5


def test_resuming_a_finished_run_trains_nothing_and_tests(text, tmp_path):
    folder = fit(text, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".ckpt", ".yaml", ".csv")}
    assert len(before) >= 5
    fit(text, tmp_path, "resume=auto", "trainer.val_bytes=300")  # another score of val, were it validated again
    assert before == {path: path.read_bytes() for path in before}
    fit(text, tmp_path, "resume=auto", "test=true")
    results = read_results(folder)
    assert results.status == "finished" and results.current("test/bpc") < 8 and results.series("test/bpc")[0] == [8]
    assert all(path.read_bytes() == content for path, content in before.items() if path.suffix != ".csv")
    fit(text, tmp_path, "resume=auto", "max_steps=12")
    assert read_results(folder).last("test/bpc") and read_results(folder).current("test/bpc") is None  # of step 8


def test_the_record_says_how_long_all_starts_took_together(text, tmp_path):
    def record():
        kept = json.loads((folder / "run.json").read_text())
        started, ended = (datetime.datetime.fromisoformat(kept[key]) for key in ("started", "ended"))
        return kept["wall_seconds"], (ended - started).total_seconds()

    began = time.monotonic()
    folder = fit(text, tmp_path)
    first, by_the_clock = record()
    assert 0 < first <= time.monotonic() - began + 0.1 and abs(first - by_the_clock) <= 2  # the clock has whole seconds
    began = time.monotonic()
    fit(text, tmp_path, f"resume={folder}", "max_steps=12")
    both, by_the_clock = record()
    assert first < both <= first + time.monotonic() - began + 0.1 and abs(both - first - by_the_clock) <= 2
    began = time.monotonic()
    fit(text, tmp_path, f"resume={folder}", "max_steps=12", "test=true")  # nothing is left to train
    tested, _ = record()
    assert both <= tested <= both + time.monotonic() - began + 0.1


def test_fewer_steps_than_there_are_is_refused(text, tmp_path):
    folder = fit(text, tmp_path)
    before = (folder / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match="max_steps must be at least 8, the steps that .* has, got 2"):
        fit(text, tmp_path, f"resume={folder}", "max_steps=2")
    assert (folder / "metrics.csv").read_bytes() == before
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_a_finished_run_cannot_be_relabelled(text, tmp_path):
    keys = ["trainer.keep_checkpoints=9", "max_steps=12"]
    folder = fit(text, tmp_path, *keys)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "train.log")]
    before = [path.read_bytes() for path in files]
    named = f"nothing is left to train after step 12, and the run in '{folder}' was another: "
    first = folder / "checkpoints" / "step-4.ckpt"
    for changes, said in {
        (
            "lr=0.5",
            "model.dropout=0",
            f"resume={folder}",
        ): f"{named}lr was 0.001, is 0.5; model.dropout was 0.1, is 0.0; ",
        ("max_steps=4", "test=true", f"resume={first}"): f"nothing is left to train after step 4, and the run in "
        f"'{folder}' goes to step 12; python -m scripts.evaluate {first} scores an earlier one",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            fit(text, tmp_path, *keys, *changes)
    assert before == [path.read_bytes() for path in files]
    fit(text, tmp_path, *keys, f"resume={folder}", "micro_batch_tokens=256", "trainer.val_every=2", "test=true")
    assert read_results(folder).last("test/bpc") > 0 and read_results(folder).series("val/bpc")[0] == [4, 8, 12]


def test_a_run_that_ended_early_is_not_finished_by_a_smaller_max_steps(text, tmp_path):
    folder = fit(text, tmp_path, "max_steps=4")
    config = OmegaConf.load(folder / "config.yaml")
    config.max_steps = config.optimizer.max_steps = 8  # as one that was stopped after its first validation
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(ValueError, match="was another: max_steps was 8, is 4; give the same keys again"):
        fit(text, tmp_path, f"resume={folder}", "max_steps=4")


def test_what_a_run_was_resumed_with_is_recorded_until_it_is_undone(text, tmp_path, monkeypatch):
    keys = ["trainer.keep_checkpoints=9"]
    folder = fit(text, tmp_path, *keys)
    pure = recorded_identity(folder)
    assert "resumed_with" not in json.loads((folder / "run.json").read_text()) and pure["lr"] == 0.001

    def resume(checkpoint, *changes):
        fit(text, tmp_path, *keys, f"resume={folder / 'checkpoints' / checkpoint}", *changes)
        return json.loads((folder / "run.json").read_text()).get("resumed_with")

    longer = {"step": 8, "changed": {"max_steps": [8, 10]}}
    assert resume("step-8.ckpt", "max_steps=10", "trainer.val_every=2") == [longer]
    assert recorded_identity(folder) == pure
    other = {"step": 10, "changed": {"lr": [0.001, 0.5], "max_steps": [10, 12]}}
    assert resume("step-10.ckpt", "max_steps=12", "lr=0.5") == [longer, other]
    assert recorded_identity(folder) == pure | {"lr": 0.5, "optimizer.lr": 0.5, "resumed_with": [other]}

    # going on before a change undoes it, also where a kill left run.json newer than config.yaml
    def killed(path, content):
        if path.name == "config.yaml":
            raise KeyboardInterrupt
        write_text(path, content)

    monkeypatch.setattr(runs, "write_text", killed)
    for changes in (["lr=0.1"], ["lr=0.2"]):
        with pytest.raises(SystemExit):
            resume("step-4.ckpt", *changes)
    monkeypatch.undo()
    assert resume("step-4.ckpt", "lr=0.2", "max_steps=6") == [
        {"step": 4, "changed": {"lr": [0.001, 0.2], "max_steps": [8, 6]}}
    ]
    assert resume("step-4.ckpt") is None and recorded_identity(folder) == pure


def test_another_model_or_corpus_is_refused_and_harms_nothing(text, tmp_path):
    folder = fit(text, tmp_path)
    files = ("config.yaml", "run.json", "metrics.csv", "samples.txt", "checkpoints/last.ckpt")
    before = [(folder / name).read_bytes() for name in files]
    other = tmp_path / "other"
    other.write_bytes(text.read_bytes()[::-1])
    for change, message in {
        "model.width=64": "has another model: model.width was 32, is 64.* init_from=",
        "optimizer=muon": "has another optimizer, .*: optimizer.kind was 'adamw', is 'muon'; .* init_from=",
        f"data.path={other}": "the corpus changed",
        "data.val_fraction=0.2": "the splits of the run .* were others: data.val_fraction was 0.05, is 0.2",
    }.items():
        with pytest.raises(ValueError, match=message):
            fit(text, tmp_path, f"resume={folder}", change)
    assert before == [(folder / name).read_bytes() for name in files]
    fit(text, tmp_path, "resume=auto", "attention.backend=sdpa", "max_steps=10")
    assert read_results(folder).last("step") == 10


# Whose run it is.


def test_auto_continues_the_run_of_the_same_identity_and_no_other(text, tmp_path):
    """The name is for people: another experiment that took it, a number, or another corpus, is another run."""
    first = fit(text, tmp_path, "max_steps=4")
    second = tmp_path / "run-2"
    fit(text, tmp_path, "max_steps=4", "lr=1e-4")
    assert read_results(second).last("step") == 4
    other = tmp_path / "other"
    other.write_bytes(text.read_bytes()[::-1])
    fit(text, tmp_path, "max_steps=4", f"data.path={other}")
    assert read_results(tmp_path / "run-3").last("step") == 4
    fit(text, tmp_path, "resume=auto", "trainer.val_every=2")
    assert [read_results(folder).last("step") for folder in (first, second, tmp_path / "run-3")] == [8, 4, 4]
    fit(text, tmp_path, "resume=auto", "seed=5")
    assert read_results(tmp_path / "run-4").last("step") == 8 and read_results(first).last("step") == 8


def test_a_run_from_before_there_were_windows_is_the_same_run(text, tmp_path):
    """Neither its config.yaml nor the identity in its run.json has the keys."""
    folder = fit(text, tmp_path, "max_steps=4", "model.num_layers=2")
    config, record = OmegaConf.load(folder / "config.yaml"), json.loads((folder / "run.json").read_text())
    for key in ("window", "window_pattern"):
        assert config.attention.pop(key, "absent") is None and f"attention.{key}" not in record["identity"]
    assert config.model.pop("activation") == "gelu" and "model.activation" not in record["identity"]
    assert {"attention.scale", "trainer.overfit", "init_from"} & record["identity"].keys() == {"attention.scale"}
    record["identity"] |= {"trainer.overfit": False, "init_from": None}  # which were written at that time
    OmegaConf.save(config, folder / "config.yaml")
    (folder / "run.json").write_text(json.dumps(record))
    gpt, _ = load_model(folder)
    assert [block.attention.inner.window for block in gpt.blocks] == [None, None]
    for change, said in {
        "attention.window=8": "attention.window was None, is 8",
        "attention.window=8 attention.window_pattern=LS": "attention.window was None, is 8",
        "model.activation=relu2": "model.activation was 'gelu', is 'relu2'",
    }.items():
        with pytest.raises(ValueError, match=f"has another model: {said}"):
            fit(text, tmp_path, f"resume={folder}", "model.num_layers=2", *change.split())
    fit(text, tmp_path, "resume=auto", "model.num_layers=2", "attention.window=8", "max_steps=2")
    assert read_results(tmp_path / "run-2").last("step") == 2
    fit(text, tmp_path, "resume=auto", "model.num_layers=2", "max_steps=6")
    assert read_results(folder).last("step") == 6


@pytest.mark.parametrize("attention", ["cosine", "regular"])
def test_a_run_with_windows_is_sampled_from_resumed_and_read(text, tmp_path, attention):
    changes = [f"attention={attention}", "attention.window=8", "attention.window_pattern=SL", "model.num_layers=3"]
    fit(text, tmp_path, *changes, "max_steps=4")
    folder = fit(text, tmp_path, *changes, "resume=auto")
    results = read_results(folder)
    assert results.last("step") == 8 and results.last("logit/layer2/max") > 0
    assert (folder / "samples.txt").read_text().count("--- step ") == 2
    gpt, config = load_model(folder, checkpoint="last")
    assert [block.attention.inner.window for block in gpt.blocks] == [8, None, None]
    assert "window8-window_patternSL" in default_name(config, {"attention": attention}, changes)
    flops = results.last("throughput/model_tflops_per_s") * 1e12 / results.last("throughput/tokens_per_s")
    assert flops == pytest.approx(gpt.flops_per_token(32)) and gpt.flops_per_token(32) == 6 * (
        3 * 12 * 32**2 + 32 * 256 + 2 * 32 * (8 * (1 - 8 / 64) + 16 + 16)
    )


def test_auto_takes_up_a_folder_that_has_no_checkpoint_yet(text, tmp_path):
    killed = command(text, tmp_path, "name=run", code=killed_in("step 7").replace("== 7", "== 3"))
    assert killed.returncode == -signal.SIGKILL
    assert read_results(tmp_path / "run").status == "killed"
    resumed = command(text, tmp_path, "name=run", "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in tmp_path.iterdir() if (path / "run.json").exists()] == ["run"]
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["2", "4", "6", "8"]


@pytest.mark.parametrize("more", [[], ["train.log", ".config.yaml.7.tmp"], ["config.yaml", ".run.json.7.tmp"]])
def test_a_folder_in_which_nothing_was_begun_is_taken(text, tmp_path, more):
    (tmp_path / "run").mkdir()  # as a run leaves it that is killed before it has its record
    for name in (".lock", *more):
        (tmp_path / "run" / name).write_text("process 1 on nowhere")
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / "config.yaml").write_text("somebody's")
    assert fit(text, tmp_path, "max_steps=1") == tmp_path / "run"
    assert read_results(tmp_path / "run").last("step") == 1
    fit(text, tmp_path, "max_steps=1")
    assert read_results(tmp_path / "run-3").last("step") == 1 and len(list((tmp_path / "run-2").iterdir())) == 1


def test_one_process_owns_a_run(text, tmp_path):
    folder = fit(text, tmp_path, "max_steps=4")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with open(folder / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for resume in ("auto", str(folder)):
            with pytest.raises(ValueError, match="is being written by process .*: wait for its end, or give another"):
                fit(text, tmp_path, f"resume={resume}")
        assert before == {path: path.read_bytes() for path in before}
        assert not is_owned(tmp_path / "nowhere") and is_owned(folder)
    assert not is_owned(folder)
    fit(text, tmp_path, "resume=auto")
    assert read_results(folder).last("step") == 8


def test_runs_of_one_name_that_start_at_once_get_folders_of_their_own(text, tmp_path):
    # However long each takes to start: the first to be there waits for the others.
    code = f"""
import os, pathlib, time
from models.training.run_files import load_config
from models.training.runs import Run
own = Run._own
def together(*arguments):
    place = pathlib.Path({str(tmp_path / "started")!r})
    place.mkdir(exist_ok=True)
    (place / str(os.getpid())).touch()
    while len(list(place.iterdir())) < 3:
        time.sleep(0.01)
    return own(*arguments)
Run._own = together
"""
    started = [Popen(text, tmp_path, "name=run", "max_steps=2", code=code) for _ in range(3)]
    assert [process.wait(300) for process in started] == [0, 0, 0]
    for name in ("run", "run-2", "run-3"):
        assert read_results(tmp_path / name).last("step") == 2


def test_names_have_no_characters_that_hydra_or_a_shell_reads(text, tmp_path):
    config = validate(configure(*overrides(text, tmp_path)))
    choices = {"attention": "cosine", "norm": "pre", "model": "tiny", "data": "file", "experiment": "a/b"}
    told = ["lr=1e-3", "max_steps=9", "micro_batch_tokens=64", "optimizer.betas=[0.8,0.9]", "model.positions=learned",
            "data.path='my notes/é'", "+trainer.devices=2", "attention.scale=8.5", "optimizer=muon"]  # fmt: skip
    name = default_name(config, choices, told)
    assert name == "a-b-cosine-pre-tiny-file-len32-lr0.001-seed0-betas-0.8-0.9-positionslearned-scale8.5-optimizermuon"
    long = default_name(config, choices, [f"model.x{index}=1" for index in range(60)])
    assert len(long) <= 120 and re.fullmatch(r"[A-Za-z0-9._-]+", long)
    for name in ("a=b", "a,b", "a b", "é", "-x", "../x"):
        with pytest.raises(ValueError, match="name must be a plain folder name"):
            fit(text, tmp_path, f"name='{name}'")
    assert not list(tmp_path.iterdir())


# How a step is cut.


CUTS = {"whole": ["micro_batch_tokens=256"], "quarters": ["micro_batch_tokens=64"],
        "ranks": ["micro_batch_tokens=64", "trainer.devices=2"]}  # fmt: skip
CUT = ["model.dropout=0", "name=run", "trainer.log_every=1"]


@pytest.fixture(scope="module")
def uncut(text, tmp_path_factory):
    """The losses of a run whose steps are one micro-batch."""
    root = tmp_path_factory.mktemp("uncut")
    assert command(text, root, *CUT, *CUTS["whole"]).returncode == 0
    return losses(root / "run")


@pytest.mark.parametrize("cut", ["quarters", "ranks"])
def test_losses_do_not_depend_on_how_a_step_is_cut(text, tmp_path, uncut, cut):
    done = command(text, tmp_path, *CUT, *CUTS[cut])
    assert done.returncode == 0, done.stderr
    same(losses(tmp_path / "run"), uncut)


@pytest.mark.parametrize(
    "before, after", [("whole", "quarters"), ("quarters", "whole"), ("quarters", "ranks"), ("ranks", "whole")]
)
def test_a_run_goes_on_with_its_steps_cut_another_way(text, tmp_path, uncut, before, after):
    """Its checkpoint, of step 4, lies within the steps 4 to 6, whose mean is a row: each counts as much as another."""
    rows = "trainer.log_every=3"
    killed = command(text, tmp_path, *CUT, *CUTS[before], rows, code=killed_in("step 7"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = command(text, tmp_path, *CUT, *CUTS[after], rows, "resume=auto")
    assert resumed.returncode == 0 and "continues at step 4" in resumed.stdout, resumed.stderr
    steps, means = read_results(tmp_path / "run").series("train/loss")
    each = [loss for _, loss, _ in uncut]
    assert steps == [3, 6, 8]
    assert means == pytest.approx([sum(part) / len(part) for part in (each[:3], each[3:6], each[6:])], rel=1e-5)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_checkpoint_between_two_rows_keeps_their_losses_bit_for_bit(text, tmp_path, earlier):
    """Also one that does not say into how many micro-batches a step was cut."""
    line = [
        "trainer.log_every=3",
        "micro_batch_tokens=32",
        "tokens_per_step=96",
        "max_steps=6",
        "trainer.val_bytes=100",
    ]
    folder = fit(text, tmp_path, *line, "trainer.val_every=2")
    path, before = folder / "checkpoints" / "step-4.ckpt", losses_of_rows(folder)
    if earlier:
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["loss_since_last_log"]["a_step"]
        torch.save(checkpoint, path)
        (folder / "checkpoints" / "index.json").unlink()
    fit(text, tmp_path, *line, "trainer.val_every=2", f"resume={path}")
    assert losses_of_rows(folder) == before


def losses_of_rows(folder):
    return [(row["step"], row["train/loss"]) for row in metrics(folder) if row["train/loss"]]


# Checkpoints.


def test_checkpoints_have_an_interval_of_their_own_and_some_are_kept(text, tmp_path, monkeypatch):
    folder = fit(text, tmp_path, "trainer.checkpoint_every=3", "trainer.val_every=6", "max_steps=10")
    names = sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))
    assert names == ["best.ckpt", "last.ckpt", "step-10.ckpt", "step-9.ckpt"]
    assert weights(folder)["global_step"] == 10
    monkeypatch.setattr(Checkpoints, "_is_late", lambda _: True)
    fit(text, tmp_path, "name=late", "trainer.keep_checkpoints=3")
    kept = sorted(path.name for path in (tmp_path / "late" / "checkpoints").glob("step-*.ckpt"))
    assert kept == ["step-6.ckpt", "step-7.ckpt", "step-8.ckpt"]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(text, tmp_path, caplog, indexed):
    folder = fit(text, tmp_path)
    newest, before = (folder / "checkpoints" / name for name in ("step-8.ckpt", "step-4.ckpt"))
    for name in ("last.ckpt", "best.ckpt"):
        (folder / "checkpoints" / name).unlink()
    newest.write_bytes(newest.read_bytes()[:1000])
    if not indexed:
        (folder / "checkpoints" / "index.json").unlink()
    with pytest.raises(ValueError, match=f"step-8.ckpt' is no sound checkpoint.*resume={before}"):
        fit(text, tmp_path, f"resume={newest}")
    with caplog.at_level("INFO"):
        fit(text, tmp_path, "resume=auto")
    assert "step-8.ckpt' is no sound checkpoint" in caplog.text and "continues at step 4" in caplog.text
    assert read_results(folder).last("step") == 8
    for path in (folder / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="has no sound checkpoint left"):
        fit(text, tmp_path, "resume=auto", "max_steps=12")


def test_every_flipped_bit_of_a_checkpoint_is_noticed(text, tmp_path):
    path = fit(text, tmp_path, "max_steps=4") / "checkpoints" / "step-4.ckpt"
    read_checkpoint(path)
    content = path.read_bytes()
    generator = random.Random(0)
    for _ in range(200):
        bit = generator.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="its CRC-32 is"):
            read_checkpoint(path)
    path.write_bytes(content)
    assert read_checkpoint(path)["global_step"] == 4


def test_a_full_disk_is_said_and_the_last_checkpoint_stands(text, tmp_path, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if "step-8.ckpt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="step-8.ckpt could not be written .*No space left.*step-4.ckpt, stands"):
        fit(text, tmp_path)
    folder = tmp_path / "run"
    assert not list(folder.rglob("*.tmp"))
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "failed" and "No space left" in record["error"]
    monkeypatch.undo()
    fit(text, tmp_path, "resume=auto")
    assert read_results(folder).last("step") == 8


@pytest.mark.parametrize("name", ["metrics.csv", "samples.txt", "position_bias.csv", "rates.csv"])
def test_a_disk_that_fills_up_names_the_file_and_how_to_go_on(text, tmp_path, monkeypatch, name):
    save = Checkpoints._save

    def save_and_fill(self, *arguments, **options):
        save(self, *arguments, **options)
        (self.folder.parent / name).unlink()
        (self.folder.parent / name).symlink_to("/dev/full")

    monkeypatch.setattr(Checkpoints, "_save", save_and_fill)
    with pytest.raises(OSError) as caught:
        fit(text, tmp_path, "model.positions=dynamic", "trainer.budget_minutes=9")
    path = tmp_path / "run" / name
    said = (
        f"{path} could not be written (No space left on device); resume={path.parent} goes on from the last checkpoint"
    )
    assert str(caught.value) == said and said in json.loads((path.parent / "run.json").read_text())["error"]


@pytest.mark.parametrize("name", ["samples.txt", "position_bias.csv"])
def test_what_a_resumed_run_drops_from_a_file_takes_nothing_else_with_it(tmp_path, monkeypatch, name):
    """A kill in the midst of it leaves the file as it was."""
    kept, dropped = {
        "samples.txt": ("--- step 4 ---\na\n", "--- step 8 ---\nb\n"),
        "position_bias.csv": ("step,layer\n4,0\n", "8,0\n"),
    }[name]
    (tmp_path / name).write_text(kept + dropped)

    def begin():
        if name == "samples.txt":
            TextSample(tmp_path, prompt=b"a", num_bytes=1, seed=0, keep_to=4)
        else:
            PositionBiases(tmp_path, keep_to=4)

    class Killed(Exception):
        pass

    def replace(*_):
        assert (tmp_path / name).read_text() == kept + dropped
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            begin()
    begin()
    assert (tmp_path / name).read_text() == kept


def test_weights_alone_start_another_run(text, tmp_path, caplog):
    folder = fit(text, tmp_path)
    trained = weights(folder)["state_dict"]
    caplog.set_level("INFO")
    changes = ["attention=regular", "seq_len=16", "name=warm", "max_steps=1", "lr=1e-9", "optimizer.weight_decay=0"]
    fit(text, tmp_path, f"init_from={folder}", *changes, "trainer.val_bytes=600")
    started = weights(tmp_path / "warm")["state_dict"]
    assert started.keys() == {name for name in trained if "log_scale" not in name}
    for name, value in started.items():
        torch.testing.assert_close(value, trained[name], rtol=0, atol=1e-6)
    assert f"weights taken from {folder}" in caplog.text and "as they start" not in caplog.text
    assert "left behind: blocks.0.attention.inner.log_scale; used otherwise" in caplog.text
    fit(text, tmp_path, f"init_from={tmp_path / 'warm'}", "name=back", "max_steps=1", "lr=1e-9")
    assert "as they start: blocks.0.attention.inner.log_scale" in caplog.text
    assert "used otherwise than they were trained: attention was 'regular', is 'cosine'" in caplog.text
    assert "left behind" not in caplog.text.split("weights taken from")[2]
    with pytest.raises(ValueError, match="init_from=.* has the weights of another model: blocks.0"):
        fit(text, tmp_path, f"init_from={folder}", "name=wide", "model.width=64")
    for change, said in (
        ("num_heads=1", "model.num_heads was 2, is 1, model.num_kv_heads was 2, is 1"),
        ("tied_head=true", "model.tied_head was False, is True"),
    ):
        with pytest.raises(ValueError, match=f"init_from=.* has the weights of another model: {said}"):
            fit(text, tmp_path, f"init_from={folder}", "name=other", f"model.{change}")
    with pytest.raises(ValueError, match="init_from must be null, a run's folder or a checkpoint, got"):
        fit(text, tmp_path, f"init_from={tmp_path / 'nowhere'}", "name=none")


@pytest.mark.parametrize(
    ("source", "changes", "said"),
    [
        (["attention.scale=20"], [], "attention.scale=12.0 has no effect: learned scales go on from what they are"),
        (["attention.scale=20"], ["attention.scale=20", "attention.backend=sdpa"], None),
        (
            ["attention.scale=50"],
            ["attention.scale=9", "attention.groups=2"],
            "held at their bound: blocks.0.attention.inner.log_scale; used otherwise than they were trained: "
            "attention.groups was 1, is 2; attention.scale=9.0 has no effect: learned scales go on from what they are",
        ),
        (
            [],
            ["attention=cosine_fixed", "attention.scale=4", "attention.groups=2"],
            "left behind: blocks.0.attention.inner.log_scale; used otherwise than they were trained: "
            "attention.learned_scale was True, is False, attention.groups was 1, is 2",
        ),
        (
            ["attention=cosine_fixed"],
            ["attention=cosine_fixed", "attention.scale=4", "attention.window=8"],
            "used otherwise than they were trained: attention.scale was 10.0, is 4.0, attention.window was None, is 8",
        ),
        (
            ["attention=cosine_fixed"],
            [],
            "as they start: blocks.0.attention.inner.log_scale; used otherwise than they were trained: "
            "attention.learned_scale was False, is True",
        ),
    ],
)
def test_a_warm_start_says_what_its_attention_does_otherwise(text, tmp_path, caplog, source, changes, said):
    short = ["max_steps=1", "trainer.val_bytes=600", "lr=1e-4"]
    folder = fit(text, tmp_path, *short, *source)
    caplog.set_level("INFO")
    fit(text, tmp_path, *short, f"init_from={folder}", "name=warm", *changes)
    (line,) = [record.getMessage() for record in caplog.records if "weights taken from" in record.getMessage()]
    assert line == f"weights taken from {folder}" + (f"; {said}" if said else "")


def test_a_scale_that_is_taken_into_a_smaller_range_can_be_learned(text, tmp_path):
    folder = fit(text, tmp_path, "max_steps=1", "attention.scale=50")
    config = validate(configure(*overrides(text, tmp_path, "attention.groups=2")))
    gpt = build_gpt(config)
    load_weights(gpt, folder)
    scale = gpt.blocks[0].attention.inner.scale()
    scale.sum().backward()
    assert scale.tolist() == pytest.approx([30, 30], rel=2e-5)
    assert torch.equal(gpt.blocks[0].attention.inner.log_scale.grad, scale)


def test_a_scale_that_left_its_range_in_training_comes_back(text, tmp_path):
    """Also in a run whose last checkpoint has it far beyond, from before it was held."""
    folder = fit(text, tmp_path, "max_steps=4")
    path, name = folder / "checkpoints" / "step-4.ckpt", "gpt.blocks.0.attention.inner.log_scale"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"][name].copy_(torch.tensor([math.log(70), math.log(20)]))
    torch.save(checkpoint, path)
    (folder / "checkpoints" / "index.json").unlink()
    fit(text, tmp_path, "max_steps=5", f"resume={path}", "optimizer.warmup_steps=0", "lr=1e-2")
    high, low = weights(folder)["state_dict"][name].exp().tolist()
    assert 60 * math.exp(-0.02) < high < 60 * math.exp(0.02) and low == pytest.approx(20, rel=0.02)
    assert abs(high - 60) > 0.01  # it has a gradient


def test_resuming_from_the_best_checkpoint_goes_on_from_there(text, tmp_path):
    keys = ["trainer.keep_checkpoints=9", "max_steps=12"]
    folder = fit(text, tmp_path, *keys)
    fit(text, tmp_path, f"resume={folder / 'checkpoints' / 'step-4.ckpt'}", *keys)
    results = read_results(folder)
    assert results.last("step") == 12 and results.series("val/bpc")[0] == [4, 8, 12]
    kept = sorted(path.name for path in (folder / "checkpoints").glob("before-*"))
    assert kept == [f"before-resuming-at-4-step-{step}.ckpt" for step in (12, 8)]


def worse_from(monkeypatch, steps):
    """Validations of steps for which steps() is true score worse than all others."""
    score = GPTModule.validation_step

    def worse(self, batch, batch_idx):
        score(self, batch, batch_idx)
        if steps(self.global_step):
            self._nats += 1e6 + self.global_step

    monkeypatch.setattr(GPTModule, "validation_step", worse)


def best_of(folder):
    return torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)


def test_the_best_checkpoint_of_steps_that_are_taken_back_is_put_aside(text, tmp_path, monkeypatch):
    keys = ["trainer.keep_checkpoints=9", "max_steps=12"]
    folder = fit(text, tmp_path, *keys)
    first = folder / "checkpoints" / "step-4.ckpt"
    assert best_of(folder)["global_step"] == 12
    worse_from(monkeypatch, lambda step: step > 4)
    fit(text, tmp_path, f"resume={first}", *keys, "test=true")
    assert best_of(folder)["global_step"] == 4 and first.samefile(first.with_name("best.ckpt"))
    assert weights(folder)["callbacks"]["Checkpoints"]["best_step"] == 4
    kept = sorted(path.name for path in (folder / "checkpoints").glob("before-*"))
    assert kept == [f"before-resuming-at-4-step-{step}.ckpt" for step in (12, 8)]


def test_scores_of_other_bytes_do_not_compare(text, tmp_path, monkeypatch, caplog):
    """Of the first bytes of a split a worse model may have fewer bits than a better one of all of them."""
    folder = fit(text, tmp_path, "max_steps=8", "trainer.val_bytes=100", "trainer.keep_checkpoints=9")
    worse_from(monkeypatch, lambda step: step > 8)

    def go_on(checkpoint, steps, scored, *more):
        keys = [f"max_steps={steps}", f"trainer.val_bytes={scored}", "trainer.keep_checkpoints=9", *more]
        caplog.clear()
        fit(text, tmp_path, f"resume={checkpoint}", *keys)
        best, results = best_of(folder), read_results(folder)
        scores = dict(zip(*results.series("val/bpc"), strict=True))
        assert scores[best["global_step"]] == results.best("val/bpc")
        assert best["callbacks"]["Checkpoints"]["best"] == pytest.approx(results.best("val/bpc"))
        return best["global_step"], scores

    best, scores = go_on(folder, 16, 300, "test=true")
    assert best == 12 and scores[12] > scores[8] and read_results(folder).current("test/bpc") is not None
    assert "val/bpc up to step 8 is of 99 bytes, then of 299: they do not compare" in caplog.text
    assert go_on(folder, 20, 300)[0] == 12 and "do not compare" not in caplog.text  # the same bytes go on
    first = folder / "checkpoints" / "step-4.ckpt"
    assert go_on(first, 12, 300)[0] == 8 and "up to step 4 is of 99 bytes" in caplog.text  # back, and other bytes
    assert go_on(first, 12, 100)[0] in (4, 8) and "do not compare" not in caplog.text  # and the same ones again


@pytest.mark.parametrize(("before", "after"), [(10**6, "null"), (100, 99 + 1)])
def test_another_way_to_say_as_many_bytes_is_no_change(text, tmp_path, caplog, before, after):
    folder = fit(text, tmp_path, "max_steps=8", f"trainer.val_bytes={before}")
    fit(text, tmp_path, f"resume={folder}", "max_steps=12", f"trainer.val_bytes={after}")
    assert "do not compare" not in caplog.text


def test_a_validation_that_was_missing_may_be_of_other_bytes(text, tmp_path, monkeypatch):
    """Stopped between the last step and its validation, which then is the first of its bytes, and the best."""
    worse_from(monkeypatch, lambda step: step == 8)

    def stop(self, trainer, *_):
        if trainer.global_step == 8:
            self._save(trainer)
            raise Interrupted(signal.SIGTERM, 8)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoints.Checkpoints, "on_validation_batch_end", stop)
        fit(text, tmp_path, "max_steps=8", "trainer.val_bytes=100")
    folder = tmp_path / "run"
    assert best_of(folder)["global_step"] == 4
    fit(text, tmp_path, f"resume={folder}", "max_steps=8", "trainer.val_bytes=300", "test=true")
    assert best_of(folder)["global_step"] == 8
    assert read_results(folder).best("val/bpc") == read_results(folder).last("val/bpc")


@pytest.mark.parametrize("at", [8, 12])  # at the last step nothing is left to train, and its test is to be of it
def test_a_best_checkpoint_that_did_not_get_its_name_has_it_when_the_run_goes_on(text, tmp_path, monkeypatch, at):
    worse_from(monkeypatch, lambda step: step > at)
    named = checkpoints.also_named

    def full(path, name):
        if (path.name, name) == (f"step-{at}.ckpt", "best.ckpt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return named(path, name)

    monkeypatch.setattr(checkpoints, "also_named", full)
    with pytest.raises(OSError, match="No space left"):
        fit(text, tmp_path, "max_steps=12")
    folder = tmp_path / "run"
    assert best_of(folder)["global_step"] == at - 4
    monkeypatch.setattr(checkpoints, "also_named", named)
    fit(text, tmp_path, "max_steps=12", "resume=auto", "test=true")
    assert best_of(folder)["global_step"] == at and read_results(folder).last("step") == 12
    assert read_results(folder).last("test/bpc") > 0


def write_checkpoint(path, step, **state):
    torch.save({"global_step": step, "state_dict": {}, "callbacks": {"Checkpoints": state}}, path)


LATE = {"best": 2.0, "best_step": 8, "score": 2.5, "validated_step": 12}  # of a run that was best at step 8
AT_8 = {"best": 2.0, "best_step": 8, "score": 2.0, "validated_step": 8}


@pytest.mark.parametrize(
    ("resumed", "others", "expected", "is_best", "aside"),
    [
        (LATE, {"best": (8, AT_8)}, 8, True, []),
        (LATE, {"best": (16, LATE), "step-8": (8, AT_8)}, 8, True, ["before-resuming-at-12-step-16.ckpt"]),
        (LATE, {"best": (16, LATE)}, 12, False, ["before-resuming-at-12-step-16.ckpt"]),  # its weights are lost
        (LATE, {"step-8": (8, AT_8 | {"score": 2.1})}, 12, False, []),  # of another way there
        (LATE, {"best": (8, AT_8 | {"best": 3.0, "score": 3.0})}, 12, False, []),
        (LATE | {"best_step": 12, "best": 2.5}, {"best": (8, AT_8)}, 12, True, []),
        (LATE, {"best": b"cut", "step-8": (8, AT_8)}, 8, True, []),
        (LATE, {"best": b"cut", "step-8": b"short"}, 12, False, []),
        ({"best": None, "best_step": None, "score": None, "validated_step": None}, {}, None, True, []),
        # as earlier versions kept it
        ({"best": 2.0, "validated_step": 12}, {"best": (8, {"best": 2.0, "validated_step": 8})}, 8, True, []),
        ({"best": 2.0, "validated_step": 12}, {"best": (8, {"best": 2.1, "validated_step": 8})}, 12, False, []),
        ({"best": 2.0, "validated_step": 12}, {}, 12, False, []),
    ],
)
def test_best_is_of_the_way_to_the_checkpoint_that_a_run_goes_on_from(
    tmp_path, resumed, others, expected, is_best, aside
):
    last = tmp_path / "last.ckpt"
    write_checkpoint(last, 12, **resumed)
    for name, content in others.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content) if isinstance(content, bytes) else write_checkpoint(path, content[0], **content[1])
    state = {"best": resumed["best"], "best_step": resumed.get("best_step")}
    assert mend_best(last, step=12, **state) == is_best
    path = tmp_path / "best.ckpt"
    assert (torch.load(path)["global_step"] if path.exists() else None) == expected
    assert [path.name for path in tmp_path.glob("before-*")] == aside and not list(tmp_path.glob("*.tmp"))


def test_a_name_that_a_checkpoint_has_already_leaves_nothing_beside_it(tmp_path):
    write_checkpoint(tmp_path / "step-1.ckpt", 1)
    for _ in range(2):
        assert also_named(tmp_path / "step-1.ckpt", "last.ckpt").samefile(tmp_path / "step-1.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step-1.ckpt"]


def stopped_at_once(monkeypatch, text, tmp_path, *keys):
    """A run that is resumed, and stopped before it trains a step."""
    with monkeypatch.context() as stopped, pytest.raises(SystemExit):
        stopped.setattr(lightning.Trainer, "fit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        fit(text, tmp_path, *keys)


def test_a_finished_run_whose_extension_was_stopped_at_once_is_what_it_was(text, tmp_path, monkeypatch):
    folder = fit(text, tmp_path, "max_steps=4", "lr=0.01")
    stopped_at_once(monkeypatch, text, tmp_path, "max_steps=8", "lr=0.02", f"resume={folder}")
    record = json.loads((folder / "run.json").read_text())
    assert set(record["resumed_with"][0]["changed"]) == {"lr", "max_steps"}
    with pytest.raises(ValueError, match="was another: lr was 0.01, is 0.03"):
        fit(text, tmp_path, "max_steps=4", "lr=0.03", f"resume={folder}")
    fit(text, tmp_path, "max_steps=4", "lr=0.01", f"resume={folder}", "test=true")
    record, config = json.loads((folder / "run.json").read_text()), OmegaConf.load(folder / "config.yaml")
    assert "resumed_with" not in record and (record["identity"]["lr"], record["status"]) == (0.01, "finished")
    assert (config.max_steps, config.lr) == (4, 0.01) and read_results(folder).last("test/bpc") > 0


def test_a_checkpoint_that_was_put_aside_is_resumed_like_any_other(text, tmp_path, monkeypatch, caplog):
    keys = ["trainer.keep_checkpoints=9", "max_steps=12"]
    folder = fit(text, tmp_path, *keys)
    fit(text, tmp_path, f"resume={folder / 'checkpoints' / 'step-4.ckpt'}", *keys)
    worse_from(monkeypatch, lambda step: step > 8)
    fit(text, tmp_path, f"resume={folder / 'checkpoints' / 'before-resuming-at-4-step-8.ckpt'}", *keys)
    assert "was not kept" not in caplog.text
    for name, step in (("best.ckpt", 8), ("last.ckpt", 12)):
        assert read_checkpoint(folder / "checkpoints" / name)["global_step"] == step  # sound by its CRC-32


def test_a_finished_runs_best_checkpoint_that_is_lost_is_said(text, tmp_path, monkeypatch, caplog):
    worse_from(monkeypatch, lambda step: step > 4)
    folder = fit(text, tmp_path, "max_steps=12", "trainer.keep_checkpoints=1")
    (folder / "checkpoints" / "best.ckpt").unlink()
    fit(text, tmp_path, "max_steps=12", "resume=auto", "test=true")
    assert "best.ckpt is that of step 12: the best one until then was not kept" in caplog.text


def test_what_a_run_began_with_need_not_be_said_again(text, tmp_path):
    source = fit(text, tmp_path / "source", "max_steps=4")
    folder = fit(text, tmp_path, "max_steps=8", f"init_from={source}")
    checkpoint = folder / "checkpoints" / "step-4.ckpt"
    ended = weights(folder)["state_dict"]
    fit(text, tmp_path, "max_steps=8", f"resume={checkpoint}")
    record = json.loads((folder / "run.json").read_text())
    assert "resumed_with" not in record and record["identity"]["init_from"] == hashed(source / "checkpoints/best.ckpt")
    assert all(torch.equal(ended[name], value) for name, value in weights(folder)["state_dict"].items())
    assert load_config(folder).init_from == str(source)
    fit(text, tmp_path, "max_steps=8", f"resume={folder}", "test=true")


def hashed(path):
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_is_found_by_the_weights_that_it_began_with_wherever_they_are(text, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    source = fit(text, tmp_path / "source", "max_steps=4")
    line = [f"init_from={source}", "resume=auto"]
    folder = fit(text, tmp_path, *line, "max_steps=1")
    monkeypatch.chdir(tmp_path)
    assert fit(text, tmp_path, "init_from=source/run", "resume=auto", "max_steps=2") == folder
    kept = source.rename(tmp_path / "elsewhere")
    assert fit(text, tmp_path, f"init_from={kept}", "resume=auto", "max_steps=3") == folder
    assert fit(text, tmp_path, *line, "max_steps=4") == folder  # they are gone: by the path
    assert read_results(folder).last("step") == 4 and not (tmp_path / "run-2").exists()

    fit(text, tmp_path / "source", "max_steps=4", "lr=0.01")  # others, under the same path
    caplog.clear()
    fit(text, tmp_path, *line, "max_steps=4")
    assert f"{folder} is the same but for the bytes of a file that it began with" in caplog.text
    other = tmp_path / "run-2"
    assert read_results(other).last("step") == 4 and read_results(folder).last("step") == 4
    identities = [json.loads((run / "run.json").read_text())["identity"] for run in (folder, other)]
    assert identities[0].pop("init_from") == hashed(kept / "checkpoints/best.ckpt")
    assert identities[1].pop("init_from") == hashed(source / "checkpoints/best.ckpt")
    assert identities[0] == identities[1]


def test_weights_that_were_replaced_while_a_run_waited_are_recorded_as_they_were_read(text, tmp_path, monkeypatch):
    source = fit(text, tmp_path / "source", "max_steps=4")
    found = hashed(source / "checkpoints/best.ckpt")
    take = Run.take_devices

    def wait(run, **options):
        monkeypatch.setattr(Run, "take_devices", take)
        fit(text, tmp_path / "source", "max_steps=4", "lr=0.01", f"run_root={tmp_path / 'other'}")
        source.rename(tmp_path / "before")
        (tmp_path / "other/run").rename(source)
        return take(run, **options)

    monkeypatch.setattr(Run, "take_devices", wait)
    folder = fit(text, tmp_path, f"init_from={source}", "max_steps=1")
    recorded = json.loads((folder / "run.json").read_text())["identity"]["init_from"]
    assert recorded == hashed(source / "checkpoints/best.ckpt") != found


def test_a_mark_of_a_refused_job_is_no_run(text, tmp_path):
    """Which asked for weights that were not there yet: its record has their path, and it has no configuration."""
    source = fit(text, tmp_path / "source", "max_steps=4")
    folder = fit(text, tmp_path, f"init_from={source}", "max_steps=1")
    identity = json.loads((folder / "run.json").read_text())["identity"] | {"init_from": str(source)}
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2/run.json").write_text(json.dumps({"status": "refused", "identity": identity}))
    fit(text, tmp_path, f"init_from={source}", "max_steps=2", "resume=auto")
    assert read_results(folder).last("step") == 2


def test_rates_that_are_repeated_are_told_apart_by_their_bytes(text, tmp_path):
    rates = tmp_path / "rates.csv"
    rates.write_text("step,lr_fraction\n1,1.0\n2,0.5\n")
    line = [f"optimizer.rates={rates}", "max_steps=2", "resume=auto"]
    folder = fit(text, tmp_path, *line)
    fit(text, tmp_path, *line)
    assert not (tmp_path / "run-2").exists()
    assert json.loads((folder / "run.json").read_text())["identity"]["optimizer.rates"] == hashed(rates)
    elsewhere = [f"optimizer.rates={rates.rename(tmp_path / 'same.csv')}", *line[1:]]
    fit(text, tmp_path, *elsewhere, "test=true")  # the same under another path
    assert not (tmp_path / "run-2").exists() and load_config(folder).optimizer.rates == str(rates)
    rates.write_text("step,lr_fraction\n1,1.0\n2,0.25\n3,0.25\n")
    before = (folder / "run.json").read_bytes()
    with pytest.raises(ValueError, match="optimizer.rates=.* has other bytes than when the run"):
        fit(text, tmp_path, line[0], "max_steps=3", f"resume={folder}")
    assert (folder / "run.json").read_bytes() == before
    fit(text, tmp_path, *line)
    assert [float(row["train/lr"]) for row in metrics(tmp_path / "run-2") if row["train/lr"]][-1] == 0.25e-3


def test_a_resumed_run_keeps_where_its_weights_came_from(text, tmp_path, monkeypatch):
    source, other = fit(text, tmp_path / "source"), fit(text, tmp_path / "other", "seed=1")
    folder = fit(text, tmp_path, "max_steps=4", f"init_from={source}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".json", ".yaml", ".csv")}
    changed = [f"resume={folder}", f"init_from={other}"]
    with pytest.raises(ValueError, match=rf"init_from is read where a run begins, got '{other}'.* began with the wei"):
        fit(text, tmp_path, *changed)
    with pytest.raises(ValueError, match=rf"got '{source}', and the run in .* began without other weights"):
        fit(text, tmp_path, f"resume={other}", f"init_from={source}", "seed=1", "max_steps=12")
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.chdir(tmp_path)
    fit(text, tmp_path, f"resume={folder}", "init_from=source/run")  # the same by another path
    assert load_config(folder).init_from == str(source)
    named = fit(text, tmp_path / "named", "max_steps=4", "init_from=source/run")
    monkeypatch.chdir(text.parent)
    fit(text, tmp_path / "named", f"resume={named}", f"init_from={source}", "test=true", "max_steps=4")
    assert load_config(named).init_from == "source/run"  # as it was given: seeds of one line are one arm
    moved = tmp_path.rename(tmp_path.parent / "moved")
    monkeypatch.chdir(moved)
    fit(text, moved / "named", "resume=auto", "init_from=source/run", "max_steps=8")
    assert read_results(moved / "named" / "run").last("step") == 8


def test_an_origin_that_an_earlier_version_lost_is_found_again(text, tmp_path, caplog):
    source = fit(text, tmp_path / "source")
    folder = fit(text, tmp_path, "max_steps=4", f"init_from={source}")
    stored = load_config(folder)
    stored.init_from = None
    OmegaConf.save(stored, folder / "config.yaml")
    record = json.loads((folder / "run.json").read_text())
    record["identity"]["init_from"] = str(source)  # as they had it
    (folder / "run.json").write_text(json.dumps(record))
    fit(text, tmp_path, f"resume={folder}")
    assert load_config(folder).init_from == str(source) and "init_from was" not in caplog.text


def test_a_run_with_parts_of_odd_size_goes_on_and_none_begins(text, tmp_path, monkeypatch):
    odd = ["attention.groups=16", "attention.scale=3"]  # of 16 channels a head
    with pytest.raises(ValueError, match="attention.groups must cut the head_dim 16 into parts of even size"):
        fit(text, tmp_path, *odd)
    with monkeypatch.context() as earlier:
        earlier.setattr("train.check_parts", lambda _: None)
        folder = fit(text, tmp_path, *odd, "max_steps=4")
    fit(text, tmp_path, *odd, f"resume={folder}")
    assert read_results(folder).last("step") == 8


def test_of_a_lost_best_checkpoint_the_score_is_forgotten(text, tmp_path, monkeypatch, caplog):
    worse_from(monkeypatch, lambda step: step > 4)
    folder = fit(text, tmp_path)
    for name in ("best.ckpt", "step-4.ckpt"):
        (folder / "checkpoints" / name).unlink()
    monkeypatch.undo()
    worse_from(monkeypatch, lambda step: step in (8, 16))  # better than at step 8 is better than what is left
    fit(text, tmp_path, "resume=auto", "max_steps=12")
    assert "best.ckpt is that of step 8: the best one until then was not kept" in caplog.text
    assert best_of(folder)["global_step"] == 12
    fit(text, tmp_path, "resume=auto", "max_steps=16")
    assert best_of(folder)["global_step"] == 12


def test_a_moved_run_keeps_its_best_score(text, tmp_path):
    folder = fit(text, tmp_path / "before")
    score = read_results(folder).best("val/bpc")
    moved = tmp_path / "after" / "run"
    moved.parent.mkdir()
    folder.rename(moved)
    fit(text, tmp_path / "after", "resume=auto", "max_steps=12")
    assert weights(moved)["callbacks"]["Checkpoints"]["best"] <= score


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_step_and_says_how_to_go_on(text, tmp_path, sent, devices):
    """The first process alone is signalled: the others learn of it."""
    code = killed_in("step 7").replace("SIGKILL", sent.name)
    stopped = command(text, tmp_path, "name=run", "max_steps=400", f"trainer.devices={devices}", code=code)
    assert stopped.returncode == 128 + sent, stopped.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted", stopped.stderr
    assert "Traceback" not in stopped.stderr and stopped.stderr.count(NOTED[sent].decode()) == 1
    assert f"interrupted by {sent.name} at step 7; the checkpoint of step 7 is kept" in stopped.stdout
    assert f"resume={tmp_path / 'run'}" in stopped.stdout
    assert weights(tmp_path / "run")["global_step"] == 7


@pytest.mark.parametrize("at", [8, 12])  # the last step, too
def test_a_signal_during_validation_ends_it_and_the_resumed_run_validates(at, text, tmp_path, uninterrupted):
    code = f"""
import os, signal
from models.training.metrics import metric_of
from models.training.module import GPTModule
original, seen = GPTModule.validation_step, []
def step(module, *args):
    original(module, *args)
    seen.append(1)
    if module.global_step == {at} and len(seen) == {at // 4 * 5 - 2}:
        os.kill(os.getpid(), signal.SIGTERM)
GPTModule.validation_step = step
"""
    stopped = command(text, tmp_path, *RESUMED, code=code)
    assert stopped.returncode == 143, stopped.stderr
    assert weights(tmp_path / "run")["global_step"] == at
    assert read_results(tmp_path / "run").series("val/bpc")[0] == [step for step in (4, 8) if step < at]
    resumed = command(text, tmp_path, *RESUMED, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(rf"step {at} of 12: val \d\.\d+ bits per byte", resumed.stdout) and "nan" not in resumed.stdout
    equal_runs(uninterrupted, tmp_path / "run")


def test_a_validation_that_is_made_twice_leaves_one_sample_and_one_table_of_biases(text, tmp_path):
    line = ["name=run", "model.positions=dynamic"]
    code = killed_in("step 7").replace("== 7", "== 8").replace("SIGKILL", "SIGTERM")  # before its validation
    stopped = command(text, tmp_path, *line, code=code)
    assert stopped.returncode == 143, stopped.stderr
    killed = command(text, tmp_path, *line, "resume=auto", code=killed_in("sample of step 8"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = command(text, tmp_path, *line, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert [step for step, _ in read_samples(tmp_path / "run/samples.txt")] == [4, 8]
    rows = [(row["step"], row["distance"]) for row in read_csv(tmp_path / "run/position_bias.csv")]
    assert len(rows) == len(set(rows)) and {step for step, _ in rows} == {"4", "8"}


def test_a_signal_ends_a_sweep(text, tmp_path):
    code = killed_in("step 7").replace("SIGKILL", "SIGTERM")
    stopped = command(text, tmp_path, "seed=0,1,2", "max_steps=40", flags=["-m"], code=code)
    assert stopped.returncode == 143, stopped.stderr
    assert [read_results(path.parent).status for path in tmp_path.glob("*/run.json")] == ["interrupted"]


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_resuming_from_what_is_no_run_is_refused(text, tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="resume must be null, auto, new, a run's folder"):
        fit(text, tmp_path / "runs", f"resume={tmp_path / path}")


def test_a_checkpoint_elsewhere_in_a_run_is_refused(text, tmp_path):
    """What is put aside, and what best.ckpt is, would be decided in the wrong folder."""
    folder = fit(text, tmp_path, "max_steps=4")
    (folder / "checkpoints").rename(folder / "kept")
    with pytest.raises(ValueError, match=f"resume must be a checkpoint in {folder}/checkpoints, got .*step-4.ckpt'"):
        fit(text, tmp_path, f"resume={folder / 'kept' / 'step-4.ckpt'}")


@pytest.mark.parametrize("rate", ["1e3", "1e30"])  # by the first learned scales get to exp(-1000)
def test_divergence_is_marked_and_raised(text, tmp_path, rate):
    with pytest.raises(DivergedError, match="the gradient's norm is"):
        fit(text, tmp_path, f"lr={rate}", "trainer.clip_norm=null", "max_steps=60", "trainer.log_every=1")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "diverged"
    assert "nan" in record["error"] or "inf" in record["error"]
    logged = [int(row["step"]) for row in metrics(tmp_path / "run") if row["train/grad_norm"]]
    assert int(re.search(r"at step (\d+)", record["error"])[1]) == 1 + max(logged, default=0)


def test_a_validation_that_is_not_finite_stops_before_its_checkpoint(text, tmp_path, monkeypatch):
    score = GPTModule.validation_step

    def broken(self, batch, batch_idx):
        score(self, batch, batch_idx)
        if self.global_step == 8:
            self._nats += math.nan

    monkeypatch.setattr(GPTModule, "validation_step", broken)
    with pytest.raises(DivergedError, match="val/bpc is nan at step 8"):
        fit(text, tmp_path)
    assert weights(tmp_path / "run")["global_step"] == 4
    assert (tmp_path / "run/samples.txt").read_text().count("--- step") == 1


def test_a_run_that_cannot_start_leaves_nothing_and_one_line(text, tmp_path):
    failed = command(text, tmp_path, "name=run", "model.num_heads=3")
    assert failed.returncode == 1
    assert failed.stderr.strip() == "error: model.num_heads must divide model.width = 32, got 3"
    for wrong, said in {
        "seed=-1": "seed must be an integer from 0",
        "trainer.val_bytes=4": "trainer.val_bytes must be null or more than seq_len = 32, got 4",
        "trainer.val_every=0": "trainer.val_every must be at least 1, got 0",
        "trainer.log_every=0": "trainer.log_every must be at least 1, got 0",
        "trainer.precision=16-mixed": "trainer.precision must be null or one of",
        "trainer.keep_checkpoints=0": "trainer.keep_checkpoints must be at least 1, got 0",
        "trainer.checkpoint_every=0": "trainer.checkpoint_every must be at least 1, got 0",
        "trainer.checkpoint_minutes=0": "trainer.checkpoint_minutes must be positive or null, got 0",
        "trainer.num_nodes=2": "trainer.num_nodes=2 needs torchrun or srun",
        "name=../x": "name must be a plain folder name",
    }.items():
        with pytest.raises(ValueError, match=said):
            fit(text, tmp_path, wrong)
    assert not list(tmp_path.glob("*/run.json"))


def test_a_failure_in_training_is_marked_and_its_traceback_kept(text, tmp_path, monkeypatch):
    monkeypatch.setattr(GPTModule, "on_validation_epoch_end", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(text, tmp_path)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "failed" and "ZeroDivisionError" in record["error"]
    kept = (tmp_path / "run/train.log").read_text()
    assert "Traceback" in kept and "compile=false" not in kept


def test_a_step_that_does_not_compile_has_a_way_out(text, tmp_path, monkeypatch):
    from torch._inductor.exc import InductorError

    def training_step(_self, _batch, _index):
        raise InductorError(RuntimeError("No valid triton configs"), None)

    monkeypatch.setattr(GPTModule, "training_step", training_step)
    with pytest.raises(InductorError):
        fit(text, tmp_path)
    assert "compile=false trains it without" in (tmp_path / "run/train.log").read_text()


def test_a_sweep_runs_every_job_and_marks_those_that_fail(text, tmp_path):
    # with 1e30 every job diverges; a width that heads do not divide fails: neither stops the others
    swept = command(text, tmp_path, "sweep=attention_norm", "lr=1e-3", "max_steps=4", flags=["-m"])
    assert swept.returncode == 0, swept.stderr
    folders = sorted(path.name for path in tmp_path.iterdir() if (path / "run.json").exists())
    expected = [f"{a}-{n}-tiny-file-len32-lr0.001-seed0-" for a in ("cosine", "regular") for n in ("post", "pre")]
    assert [name[: len(start)] for name, start in zip(folders, expected, strict=True)] == expected
    assert {read_results(tmp_path / name).status for name in folders} == {"finished"}

    changes = ["model.num_heads=3,2", "lr=1e30,1e-3", "trainer.clip_norm=null", "max_steps=20", "trainer.val_bytes=100"]
    broken = command(text, tmp_path / "broken", *changes, flags=["-m"])
    assert broken.returncode != 0
    statuses = {path.name: read_results(path).status for path in (tmp_path / "broken").glob("*-lr*")}
    assert sorted(statuses.values()) == ["diverged", "finished", "refused", "refused"], statuses


def test_a_sweep_needs_its_flag_and_one_process_a_job(text, tmp_path):
    alone = command(text, tmp_path, "sweep=attention_norm")
    assert alone.returncode == 1 and "sweep=attention_norm needs -m" in alone.stderr
    several = command(text, tmp_path, "seed=0,1", "trainer.devices=2", flags=["-m"])
    assert several.returncode == 1 and several.stdout.count("refused: -m runs jobs with trainer.devices=1") >= 2
    assert not list(tmp_path.glob("*/metrics.csv"))


def test_validation_is_bits_per_scored_byte(text, tmp_path):
    folder = fit(text, tmp_path, "model.dropout=0")
    config = validate(configure(*overrides(text, tmp_path)))
    module = build_module(config)
    module.load_state_dict(weights(folder)["state_dict"])
    content = text.read_bytes()
    record = json.loads((folder / "run.json").read_text())["corpus"]
    start = record["train_bytes"]
    val = torch.tensor(list(content[start : start + 600]))
    nats, scored = 0.0, 0
    for first in range(0, 599, 32):
        window = val[first : first + 33]
        logits = module.gpt.eval()(window[None, :-1])[0].double()
        nats -= logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]].sum().item()
        scored += len(window) - 1
    assert scored == record["val_scored"] == 599
    assert read_results(folder).last("val/bpc") == pytest.approx(nats / scored / math.log(2), rel=1e-5)


def test_gradient_is_clipped_and_its_norm_kept(text, tmp_path):
    module = build_module(validate(configure(*overrides(text, tmp_path, "trainer.clip_norm=0.5"))))
    for parameter in module.gpt.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.configure_gradient_clipping(optimizer=None)
    norm = math.sqrt(module.gpt.num_parameters())
    assert module.grad_norm.item() == pytest.approx(norm, rel=1e-4)
    clipped = sum(parameter.grad.square().sum() for parameter in module.gpt.parameters()).sqrt()
    assert clipped.item() == pytest.approx(0.5, rel=1e-4)


def test_optimizer_decays_weights_of_products_only(text, tmp_path):
    module = build_module(validate(configure(*overrides(text, tmp_path, "model.tied_head=true"))))
    optimizer, _ = module.optimizer.build(module.gpt)
    decayed, rest = optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in module.gpt.named_parameters()}
    assert sorted(names[id(p)].split(".")[-2] for p in decayed["params"]) == ["down", "out", "qkv", "up"]
    assert {"embedding.weight", "blocks.0.attention.inner.log_scale"} <= {names[id(p)] for p in rest["params"]}


@pytest.mark.parametrize(("decay", "halfway"), [("cosine", 0.55), ("linear", 0.55)])
def test_schedule_warms_up_and_decays_to_the_end(text, tmp_path, decay, halfway):
    changes = [f"optimizer.decay={decay}", "optimizer.warmup_steps=10", "max_steps=1000", "lr=1.0"]
    optimizer = build_module(validate(configure(*overrides(text, tmp_path, *changes)))).optimizer
    rates = [optimizer.lr_at(step) for step in range(1001)]
    assert rates[:10] == [pytest.approx((step + 1) / 11) for step in range(10)]
    assert max(rates) == rates[10] == 1.0
    assert rates[505] == pytest.approx(halfway, abs=0.01)
    assert rates[1000] == pytest.approx(0.1)
    assert (rates[250] > 0.85) == (decay == "cosine")
    assert all(earlier >= later for earlier, later in zip(rates[10:], rates[11:], strict=False))


def test_compiled_training_keeps_clean_keys_and_the_same_losses(text, tmp_path):
    plain = fit(text, tmp_path / "plain", "compile=false", "model.dropout=0", "max_steps=4")
    compiled = fit(text, tmp_path / "compiled", "compile=true", "model.dropout=0", "max_steps=4")
    assert weights(plain)["state_dict"].keys() == weights(compiled)["state_dict"].keys()
    losses = [read_results(folder).series("train/loss")[1] for folder in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_sweep_compiles_however_many_variants_it_has(monkeypatch):
    # torch.compile's own limit is eight; beyond it, it would go on uncompiled
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(GPT, "compile", lambda gpt, **options: torch.nn.Module.compile(gpt, backend="eager", **options))
    config = validate(configure("model=tiny", "model.num_layers=1", "model.width=32", "seq_len=32", "compile=true"))
    lengths = range(8, 20)
    for seed in range(2):
        torch.manual_seed(seed)
        gpt = build_module(config).gpt
        for length in lengths:
            gpt(torch.zeros(1, length, dtype=torch.long), torch.zeros(1, length, dtype=torch.long))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(lengths)  # another seed compiles nothing
    torch.compiler.reset()


# What scripts.benchmark_training takes of nanoGPT's model.py.
NANOGPT = """
import types
import torch

GPTConfig = types.SimpleNamespace

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert (config.vocab_size, config.bias) == (256, False)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)
        block = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"gelu": torch.nn.GELU()})})
        self.transformer = torch.nn.ModuleDict({"h": torch.nn.ModuleList([block])})

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("said")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, tokens, targets):
        logits = self.head(self.transformer.h[0].mlp.gelu(self.embedding(tokens)))
        return logits, torch.nn.functional.cross_entropy(logits.view(-1, 256), targets.view(-1))
"""


def test_all_contenders_train_the_same_in_turns(text, tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT)
    changes = overrides(text, tmp_path, "trainer.clip_norm=null")
    options = ["--model", "tiny", "--steps", "8", "--json", str(tmp_path / "report.json")]
    changes = [change for change in changes if not change.startswith(("model=", "seq_len="))]

    def rows(*more):
        assert benchmark_training.main([*changes, *options, *more]) == 0
        return json.loads((tmp_path / "report.json").read_text())["rows"]

    def found(rows):
        return [(row["seq_len"], row["contender"], len(row["rates"])) for row in rows]

    lengths = rows("--seq-len", "32", "16", "--contenders", "bare")
    assert found(lengths) == [(32, "bare", 3), (16, "bare", 3)]
    capsys.readouterr()
    rows = rows("--seq-len", "32", "--rounds", "2", "--nanogpt", str(tmp_path / "model.py"))
    assert found(rows) == [(32, name, 6) for name in ("lightning", "bare", "nanogpt_gelu", "nanogpt")]
    assert all(row["ms_per_step"] == pytest.approx(256e3 / row["tokens_per_s"]) for row in rows)
    out = capsys.readouterr().out
    assert out.count("x nanogpt") == 1 and "said" not in out


# Blocks as nanoGPT's, as far as windows take them; mask is the tests' own.
NANOGPT_WITH_BLOCKS = """
import types
import torch
from torch import nn

GPTConfig = types.SimpleNamespace

class Attention(nn.Module):
    mask = None

    def __init__(self, config):
        super().__init__()
        self.n_head, self.resid_dropout = config.n_head, nn.Dropout(config.dropout)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        batch, length, width = x.size()
        q, k, v = (y.view(batch, length, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(width, dim=2))
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None)
        return self.resid_dropout(self.c_proj(o.transpose(1, 2).reshape(batch, length, width)))

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        mlps = (nn.ModuleDict({"gelu": nn.GELU()}) for _ in range(config.n_layer))
        blocks = (nn.ModuleDict({"attn": Attention(config), "mlp": mlp}) for mlp in mlps)
        wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict({"wte": wte, "h": nn.ModuleList(blocks)})
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, tokens, targets):
        x = self.transformer.wte(tokens)
        for block in self.transformer.h:
            x = x + block.mlp.gelu(block.attn(x))
        logits = self.head(x)
        return logits, nn.functional.cross_entropy(logits.view(-1, 256), targets.reshape(-1))
"""
WINDOWS = ["attention.window=5", "attention.window_pattern=LSS", "model.num_layers=4", "model.dropout=0"]


def test_nanogpt_is_given_the_same_windows(text, tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT_WITH_BLOCKS)
    config = validate(configure(*overrides(text, tmp_path, *WINDOWS)))
    code = benchmark_training.load_nanogpt(tmp_path / "model.py")
    gpt = code.GPT(code.GPTConfig(n_layer=4, n_head=2, n_embd=32, vocab_size=256, dropout=0, bias=False)).double()
    tokens, targets = torch.randint(0, 256, (2, 2, 32))
    plain = gpt(tokens, targets)[1]
    i = torch.arange(32)
    for layer in (1, 2):
        gpt.transformer.h[layer].attn.mask = (i[:, None] >= i) & (i[:, None] - i < 5)
    expected = gpt(tokens, targets)[1]
    assert (plain - expected).abs() > 1e-4
    weights_before = {id(weight) for weight in gpt.parameters()}
    benchmark_training.give_windows(gpt, config)
    torch.testing.assert_close(gpt(tokens, targets)[1], expected, rtol=0, atol=1e-12)
    assert {id(weight) for weight in gpt.parameters()} == weights_before  # trained by the same optimizer


def test_nanogpt_is_given_our_gelu(text, tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT_WITH_BLOCKS)
    config = validate(configure(*overrides(text, tmp_path, "model.num_layers=2", "model.dropout=0")))
    losses = []
    for gelu in (False, True):
        torch.manual_seed(0)
        options = {"gelu": gelu}
        trainee = benchmark_training.nanogpt_trainee(tmp_path / "model.py", config, torch.device("cpu"), **options)
        losses.append(trainee.loss(torch.arange(66).view(2, 33)).item())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=1e-3)  # tanh's form of the same


def test_windows_give_nanogpt_a_row_of_its_own(text, tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT_WITH_BLOCKS)
    line = [word for word in overrides(text, tmp_path, *WINDOWS) if word != "max_steps=8"]
    line += ["--steps", "8", "--json", str(tmp_path / "report.json"), "--nanogpt", str(tmp_path / "model.py")]
    assert benchmark_training.main(line) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == ["lightning", "bare", "nanogpt_windows", "nanogpt_gelu", "nanogpt"]
    assert all(row["tokens_per_s"] > 0 for row in rows) and capsys.readouterr().out.count("x nanogpt") == 1
    for change, named in (
        ("attention.window=null attention.window_pattern=null", "nanogpt_windows needs attention.window"),
        ("model.dropout=0.1", "model.dropout must be 0 for nanoGPT with the windows, got 0.1"),
    ):
        changed = [*change.split(), *(word for word in line if word.split("=")[0] not in change)]
        assert benchmark_training.main([*changed, "--contenders", "nanogpt_windows"]) == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("model.txt", "GPT = GPTConfig = None", "model.txt' is no Python"),
        ("model.py", "import no_such_module", "model.py' raises ModuleNotFoundError: No module named 'no_such_module'"),
        ("model.py", "GPT = ", "model.py' raises SyntaxError: invalid syntax"),
    ],
)
def test_what_is_no_model_of_nanogpt_is_named(tmp_path, name, content, named):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="^--nanogpt must be the path of nanoGPT's model.py, .*" + re.escape(named)):
        benchmark_training.load_nanogpt(tmp_path / name)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--contenders", "nanogpt_windows"], "--contenders nanogpt_windows needs --nanogpt"),
        (["seq_len=32", "attention.window=0", "--contenders", "bare"], "attention.window must be null or at least 1"),
        (["--steps", "5"], "--steps or max_steps must be at least 3 * trainer.log_every = 6, got 5"),
        (["max_steps=0"], "--steps or max_steps must be at least 3 * trainer.log_every = 6, got 0"),
        (["max_steps=1e3"], "max_steps must be an integer, got '1e3'"),
        (["max_steps="], "max_steps must be an integer, got ''"),
        (["--nanogpt", "absent.py"], "must be the path of nanoGPT's model.py, got 'absent.py'"),
        (["--nanogpt", __file__], "has no GPT and GPTConfig"),
        (["trainer.devices=2"], "trainer.devices and trainer.num_nodes must be 1: the bare loops run on one device"),
        (["--contenders", "nanogpt"], "needs --nanogpt"),
        (["--profile"], "--profile needs a CUDA device"),
        (["--model", "huge"], "model must be one of base, small, tiny, got 'huge'"),
        (["logger.project=x"], "logger.project is a key of logger=wandb"),
        (["model=tiny", "--model", "small"], "model=tiny and --model small contradict each other"),
        (["seq_len=64", "--seq-len", "64", "32"], "seq_len=64 and --seq-len 64 32 contradict each other"),
        (["max_steps=9", "--steps", "8"], "max_steps=9 and --steps 8 contradict each other"),
        (["seq_len=none"], "seq_len"),
    ],
)
def test_benchmark_training_refuses(text, tmp_path, capsys, arguments, named):
    left_out = ("model", "seq_len=", "max_steps=")
    changes = [change for change in overrides(text, tmp_path) if not change.startswith(left_out)]
    assert benchmark_training.main([*changes, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and "Traceback" not in error


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["model=tiny", "seq_len=64"], {("tiny", 64): 200}),
        (["model=tiny", "seq_len=64", "max_steps=90"], {("tiny", 64): 90}),
        (["experiment=long_context"], {("small", 8192): 200}),
        (["experiment=quickstart", "--steps", "75"], {("tiny", 256): 75}),
        (["model=tiny", "--seq-len", "32", "64", "32"], {("tiny", 32): 200, ("tiny", 64): 200}),
        (["seq_len=64", "--model", "base", "tiny"], {("base", 64): 200, ("tiny", 64): 200}),
        ([], {("small", 1024): 200}),
    ],
)
def test_benchmark_training_measures_what_it_was_told(monkeypatch, arguments, expected):
    measured = {}

    def measure(_, config, *__, **___):
        measured[config.model.width, config.seq_len] = config.max_steps
        return {}

    monkeypatch.setattr(benchmark_training, "measure", measure)
    monkeypatch.setattr(benchmark_training, "builder", lambda *_: lambda: None)
    monkeypatch.setattr(benchmark_training, "table", lambda rows, _: rows)
    monkeypatch.setattr(benchmark_training, "show", lambda *_, **__: None)
    assert benchmark_training.main(arguments) == 0
    widths = {"tiny": 128, "small": 512, "base": 768}
    assert measured == {(widths[model], length): steps for (model, length), steps in expected.items()}


def test_profile_sums_kernels_and_finds_the_idle_time():
    kernels = [("b", 60.0, 100.0), ("a", 0.0, 10.0), ("a", 5.0, 25.0), ("c", 12.0, 20.0)]  # two streams overlap
    found = benchmark_training.summed_up(kernels, steps=2)
    assert found["ms"] == pytest.approx(0.05) and found["idle_share"] == pytest.approx(0.35)
    assert [(row["kernel"], row["calls"], row["ms"]) for row in found["kernels"]] == [
        ("b", 0.5, pytest.approx(0.02)),
        ("a", 1, pytest.approx(0.015)),
        ("c", 0.5, pytest.approx(0.004)),
    ]


def test_dropout_is_another_in_every_step_micro_batch_and_rank(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for step, micro_step, rank in itertools.product((0, 1), repeat=3):
        data = SimpleNamespace(train_batch=lambda *_: torch.zeros(1, 3, dtype=torch.long))
        trainer = SimpleNamespace(accumulate_grad_batches=2, datamodule=data, world_size=2)
        gpt = Mock(return_value=torch.zeros(()), blocks=[])
        state = {"trainer": trainer, "global_step": step, "global_rank": rank, "seed": 0, "device": "cpu"}
        module = SimpleNamespace(**state, tokens=0, gpt=gpt, _add_loss=lambda _: None)
        GPTModule.training_step(module, None, micro_step)
    assert len(set(seeds)) == 8


def test_two_processes_share_the_step_and_score_every_byte_once(text, tmp_path):
    changes = ["name=run", "model.dropout=0", "max_steps=4"]
    done = command(text, tmp_path, *changes, "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run-2").exists()
    for said in ("parameters on 2 x CPU", "step 4 of 4: train", "summary"):  # by one of the two
        assert done.stdout.count(said) == 1, done.stdout
    folder = tmp_path / "run"
    record = json.loads((folder / "run.json").read_text())
    assert (record["micro_batch_size"], record["accumulate"], record["tokens_per_step"]) == (4, 1, 256)
    assert [row["step"] for row in metrics(folder)] == ["2", "4"]
    assert [row["train/tokens"] for row in metrics(folder)] == ["512", "1024"]  # of both
    module = build_module(validate(configure(*overrides(text, tmp_path))))
    module.load_state_dict(weights(folder)["state_dict"])
    alone = fit(text, tmp_path / "alone", "model.dropout=0", "max_steps=4")
    assert weights(folder)["state_dict"].keys() == weights(alone)["state_dict"].keys()
    assert read_results(folder).last("val/bpc") == pytest.approx(read_results(alone).last("val/bpc"), rel=1e-5)


def test_throughput_counts_logging_and_leaves_out_validation(text, tmp_path, monkeypatch):
    log, score = CSVLogger.log_metrics, GPTModule.on_validation_epoch_end
    monkeypatch.setattr(CSVLogger, "log_metrics", lambda *a, **k: (time.sleep(0.3), log(*a, **k)))
    monkeypatch.setattr(GPTModule, "on_validation_epoch_end", lambda self: (time.sleep(3), score(self)))
    results = read_results(fit(text, tmp_path, "max_steps=4", "trainer.val_every=2", "trainer.log_every=1"))
    rates = dict(zip(*results.series("throughput/tokens_per_s"), strict=True))
    assert 1 not in rates  # the first step compiles
    assert rates[4] < 256 / 0.3  # the step before was logged inside this interval
    assert rates[3] > 256 / 3  # a validation lies just before


def test_throughput_leaves_out_checkpoints(text, tmp_path, monkeypatch):
    save = AtomicCheckpointIO.save_checkpoint
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", lambda *a, **k: (time.sleep(1), save(*a, **k)))
    changes = ["max_steps=5", "trainer.val_every=5", "trainer.log_every=4", "trainer.checkpoint_every=1"]
    results = read_results(fit(text, tmp_path, *changes))
    rates = dict(zip(*results.series("throughput/tokens_per_s"), strict=True))
    assert sorted(rates) == [4, 5]
    assert rates[4] > 3 * 256 / 1  # the three steps that it is of have two checkpoints between them, and one before
    assert rates[5] > 256 / 1  # the interval begins with one


def debug(name, root, *changes):
    """Trains by conf/debug/ as it is, with its own small corpus; returns the run's folder."""
    given = ["trainer.accelerator=cpu", "trainer.progress_bar=false", "name=run", f"run_root={root}"]
    train(validate(configure(f"debug={name}", *given, *changes)), choices={})
    return Path(root) / "run"


def test_debug_fast_goes_through_everything(tmp_path):
    folder = debug("fast", tmp_path)
    results = read_results(folder)
    assert results.status == "finished" and results.series("train/loss")[0] == [1, 2, 3, 4]
    assert results.series("val/bpc")[0] == [2, 4]
    assert [step for step, _ in read_samples(folder / "samples.txt")] == [2, 4]
    assert (folder / "checkpoints/best.ckpt").is_file() and (folder / "checkpoints/last.ckpt").is_file()


def test_debug_overfit_learns_one_batch_by_heart(tmp_path):
    results = read_results(debug("overfit", tmp_path))
    losses = results.series("train/loss")[1]
    assert losses[0] > 2 and losses[-1] < 0.1


def test_debug_profile_prints_a_table_and_writes_a_trace(tmp_path, capsys):
    small = ["model=tiny", "seq_len=64", "tokens_per_step=256", "micro_batch_tokens=128"]
    folder = debug("profile", tmp_path, *small)
    out = capsys.readouterr().out
    assert "Self CPU time total" in out and "profile of 5 steps" in out
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in events) == 5
    assert read_results(folder).last("step") == 16
    shorter = debug("profile", tmp_path / "short", *small, "max_steps=3")
    assert (shorter / "trace.json").is_file() and "profile of 3 steps" in capsys.readouterr().out


def test_a_profile_of_a_run_that_ends_before_it_has_all_steps_is_written(tmp_path, capsys, caplog):
    """By a budget of time, or a signal: nobody knew before."""
    module, interrupted = SimpleNamespace(device=torch.device("cpu")), Interrupted(signal.SIGTERM, 12)
    ends = {
        "budget": lambda profile, trainer: profile.on_train_end(trainer, module),
        "signal": lambda profile, trainer: profile.on_exception(trainer, module, interrupted),
    }
    for name, end in ends.items():
        (tmp_path / name).mkdir()
        profile, trainer = Profile(tmp_path / name, 5, 100), SimpleNamespace(global_step=0)
        profile.on_train_start(trainer)
        for trainer.global_step in (10, 11):
            profile.on_train_batch_start(trainer, module)
            torch.ones(2) + 1
        trainer.global_step = 12
        end(profile, trainer)
        assert (tmp_path / name / "trace.json").is_file() and "profile of 2 steps" in capsys.readouterr().out
    early = Profile(tmp_path, 5, 100)
    early.on_train_start(SimpleNamespace(global_step=0))
    early.on_train_end(SimpleNamespace(global_step=3), module)
    assert "no step was profiled: training ended before step 11" in caplog.text


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_learned_scales_are_logged_at_every_step_and_are_those_of_the_model(text, tmp_path, norm, monkeypatch):
    told, log = [], GPTModule.log

    def note(module, key, *arguments, **options):
        told.append(key)
        log(module, key, *arguments, **options)

    monkeypatch.setattr(GPTModule, "log", note)
    changes = ["model.num_layers=2", "lr=0.1", "attention.scale=59", f"norm={norm}"]
    folder = fit(text, tmp_path, *changes)
    results = read_results(folder)
    state = weights(folder)["state_dict"]
    layers = [state[f"gpt.blocks.{i}.attention.inner.log_scale"].exp() for i in range(2)]
    every = torch.cat(layers)
    assert results.last("scale/clamped") == (every > 60).float().mean()
    for name, values in (("scale", every), ("scale/layer0", layers[0]), ("scale/layer1", layers[1])):
        held = values.clamp(max=60)
        expected = [held.mean(), held.min(), held.max()]
        found = [results.last(f"{name}/{column}") for column in ("mean", "min", "max")]
        assert found == pytest.approx([value.item() for value in expected], rel=1e-6)
        assert results.series(f"{name}/mean")[0] == [2, 4, 6, 8]
    # What Lightning is told costs a millisecond of the GPU's time a metric: 2 % of a step, when all of these were.
    assert set(told) == {"train/bpc", "val/bpc"}
    assert results.series("logit/max")[0] == [4, 8] and 0 < results.last("logit/layer1/max") <= 60.001
    columns = metrics(fit(text, tmp_path / "regular", "attention=regular", "max_steps=4"))[-1]
    assert not any(column.startswith("scale") for column in columns) and float(columns["logit/max"]) > 0


def test_a_held_scale_counts_as_clamped(text, tmp_path):
    gpt = build_module(validate(configure(*overrides(text, tmp_path, "model.num_layers=2")))).gpt
    with torch.no_grad():
        gpt.blocks[1].attention.inner.log_scale.copy_(torch.tensor([61.0, 20.0]).log())
    scales = LearnedScales.of(gpt)
    columns = scales.summary(torch.cat(scales.values).tolist())
    assert columns["scale/clamped"] == 0.25
    assert columns["scale/max"] == columns["scale/layer1/max"] == 60
    assert columns["scale/layer1/mean"] == pytest.approx(40) and columns["scale/layer0/max"] == pytest.approx(12)


def test_measuring_attention_changes_no_weight_and_waits_for_the_device_no_more_often(text, tmp_path, monkeypatch):
    reads = []
    for name in ("item", "tolist"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, read=read: (reads.append(1), read(*a))[1])
    report = TrainingMetrics._report

    def count(self, trainer, module):
        reads.clear()
        report(self, trainer, module)
        counts.append(len(reads))

    monkeypatch.setattr(TrainingMetrics, "_report", count)
    folders, counts = [], []
    for measured in (True, False):
        if not measured:
            monkeypatch.setattr(LearnedScales, "of", lambda _: LearnedScales([], []))
            monkeypatch.setattr(LogitMetrics, "on_validation_end", lambda *_: None)
        folders.append(fit(text, tmp_path / str(measured)))
    assert "scale/mean" in metrics(folders[0])[-1] and "scale/mean" not in metrics(folders[1])[-1]
    first, second = (weights(folder)["state_dict"] for folder in folders)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 500e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        # the same silicon with other clocks or fewer units
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA H20-3e", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA Unheard-of", None),
    ],
)
def test_the_peak_is_the_named_gpus_own_or_unknown(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_a_sample_cannot_steer_the_terminal():
    assert decode(b"a\x1b[2J\x00b\r\n\tc \xc3\xa9 \xff") == "a\ufffd[2J\ufffdb\ufffd\n\tc é \ufffd"


@pytest.fixture(scope="module")
def resumed_with_wandb(text, tmp_path_factory):
    """A run of 8 steps that was resumed at its fourth; the clock stepped back before that."""
    root = tmp_path_factory.mktemp("wandb")
    changes = ["name=run", "logger=wandb", "max_steps=4", "logger.notes=said", "logger.job_type=trial"]
    first = command(text, root, *changes, "compressors=true", "logger.tags=[a,b]", "logger.group=mine")
    assert first.returncode == 0, first.stderr
    (folder,) = (root / "run/wandb").glob("offline-run-*")
    later = folder.with_name(re.sub(r"run-\d{8}_", "run-29991231_", folder.name))
    folder.rename(later)
    second = command(text, root, *changes, "compressors=true", "resume=auto", "max_steps=8")
    assert second.returncode == 0, second.stderr
    (newest,) = (path for path in (root / "run/wandb").glob("offline-run-*") if path != later)
    return root / "run", later, newest, first, second


def test_wandb_writes_offline_without_an_account_and_resumes_under_its_id(resumed_with_wandb):
    run, before, newest, first, second = resumed_with_wandb
    assert before.name.split("-", 3)[3] == newest.name.split("-", 3)[3]
    assert logged_steps(before) == {2, 4}
    assert logged_steps(newest) == {2, 4, 6, 8}  # whole: the server replaces what it has of the id
    assert [row["step"] for row in metrics(run)] == ["2", "4", "6", "8"]
    for expected in ("wandb sync", "gzip -9", "xz -9e", "loss_and_memory.png", "a sample after step 8", "finished"):
        assert expected in second.stdout, expected
    assert "WARNING" not in first.stdout + first.stderr
    assert summary_of(newest)["status"] == '"finished"' and "error" not in summary_of(newest)
    lines = " ".join(second.stdout.split())  # the folder of this start, though the other's name is a later one
    assert f"wandb sync {run}/wandb/{newest.name}" in lines and before.name not in lines


def test_the_newest_wandb_folder_has_the_samples_of_the_whole_run(resumed_with_wandb):
    run, _, newest, _, _ = resumed_with_wandb
    tables = [json.loads(path.read_text())["data"] for path in newest.glob("files/media/table/sample_*.json")]
    samples = read_samples(run / "samples.txt")
    assert [step for step, _ in samples] == [4, 8]
    assert sorted(row for table in tables for row in table) == [list(sample) for sample in samples]


def test_wandb_gets_group_job_type_tags_and_notes(resumed_with_wandb):
    _, before, newest, _, _ = resumed_with_wandb
    started = run_record(before)
    assert (started.run_group, started.job_type, started.notes) == ("mine", "trial", "said")
    assert list(started.tags) == ["a", "b"]
    assert run_record(newest).run_group == ""  # a single run has none unless it is given one


def test_every_job_of_a_sweep_has_its_own_wandb_run_and_they_share_a_group(text, tmp_path):
    secret = "hunter2" * 6
    jobs = ["logger=wandb", "seed=0,1", "max_steps=4", "trainer.sample_bytes=0"]
    jobs.append(f"+hydra.job.env_set.WANDB_API_KEY={secret}")
    swept = command(text, tmp_path, *jobs, flags=["-m"])
    assert swept.returncode == 0, swept.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    folders = list(tmp_path.glob("*/wandb/offline-run-*"))
    first, second = (run_record(folder).run_group for folder in folders)
    assert first == second and re.fullmatch(r"sweep_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", first)
    again = command(text, tmp_path, *jobs, "resume=auto", flags=["-m"])
    assert again.returncode == 0, again.stderr
    groups = {run_record(folder).run_group for folder in tmp_path.glob("*/wandb/offline-run-*")}
    assert groups == {first}  # that of its first start


@pytest.mark.parametrize(
    ("variable", "offline", "mode"),
    [
        (None, True, "offline"),
        (None, False, "online"),
        ("", True, "offline"),
        ("offline", False, "offline"),
        ("online", True, "online"),
        ("disabled", True, "disabled"),
        ("dryrun", False, "offline"),
    ],
)
def test_wandb_mode_counts_where_it_is_set(monkeypatch, variable, offline, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_mode(offline=offline) == mode


def test_wandb_mode_disabled_writes_the_csv_alone_and_a_wrong_one_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ValueError, match="WANDB_MODE must be online, offline or disabled, got 'ofline'"):
        fit(text, tmp_path, "logger=wandb")
    assert not list(tmp_path.glob("*/run.json"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder = fit(text, tmp_path, "logger=wandb", "max_steps=4")
    assert [row["step"] for row in metrics(folder)] == ["2", "4"] and not (folder / "wandb").exists()


def test_wandb_mode_overrules_the_configuration_in_a_run(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = fit(text, tmp_path, "logger=wandb", "logger.offline=false", "max_steps=4")
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert os.environ["WANDB_MODE"] == "offline"


def test_none_is_the_runs_own_record_alone(text, tmp_path):
    folder = fit(text, tmp_path, "logger=none", "max_steps=4")
    assert [row["step"] for row in metrics(folder)] == ["2", "4"]
    assert not (folder / "wandb").exists() and not (folder / "tensorboard").exists()


def test_tensorboard_has_every_step_once_however_the_run_ended(text, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = ["name=run", "logger=tensorboard", "max_steps=12"]
    killed = command(text, tmp_path, *changes, code=killed_in("sample of step 8"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = command(text, tmp_path, *changes, "resume=auto", "test=true")
    assert resumed.returncode == 0 and "continues at step 4" in resumed.stdout, resumed.stderr
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), purge_orphaned_data=False).Reload()
    rows = metrics(tmp_path / "run")
    for column in ("train/loss", "val/bpc", "test/bpc"):
        expected = [(int(row["step"]), pytest.approx(float(row[column]))) for row in rows if row[column]]
        assert [(event.step, event.value) for event in events.Scalars(column)] == expected
    samples = events.Tensors("sample/text_summary")
    assert [event.step for event in samples] == [step for step, _ in read_samples(tmp_path / "run/samples.txt")]
    assert [event.step for event in samples] == [4, 8, 12]
    (config,) = events.Tensors("config/text_summary")
    assert b"    max_steps: 12\n" in config.tensor_proto.string_val[0]
    assert not list((tmp_path / "run/tensorboard").glob("hparams.yaml"))


def run_record(folder):
    """What an offline run's own file says of the run."""
    from wandb.proto import wandb_internal_pb2

    read = map(wandb_internal_pb2.Record.FromString, records(next(folder.glob("*.wandb")).read_bytes()))
    return next(record.run for record in read if record.WhichOneof("record_type") == "run")


def summary_of(folder):
    """What an offline run's own file has in its summary, as JSON by key; of later records the last."""
    from wandb.proto import wandb_internal_pb2

    read = map(wandb_internal_pb2.Record.FromString, records(next(folder.glob("*.wandb")).read_bytes()))
    return {item.key: item.value_json for record in read for item in record.summary.update}


def logged_steps(folder):
    """The optimizer steps in an offline run's own file."""
    from wandb.proto import wandb_internal_pb2

    steps = set()
    for data in records(next(folder.glob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        for item in record.history.item:
            if "trainer/global_step" in (item.key, *item.nested_key):
                steps.add(int(float(item.value_json)))
    return steps


def records(content, block=32768):
    """The records of wandb's file: LevelDB's log format after 7 bytes, (crc, length, type) before each fragment."""
    offset, parts = 7, []
    while offset + 7 <= len(content):
        if block - offset % block < 7:  # the rest of a block that holds no header
            offset += block - offset % block
            continue
        length, kind = struct.unpack_from("<HB", content, offset + 4)
        parts.append(content[offset + 7 : offset + 7 + length])
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []
