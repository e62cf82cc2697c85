"""Whole trainings on a CPU: every combination, exact resume after SIGKILL, divergence, sweeps, several processes."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_config import configure

from conf.schema import validate
from models.lightning import DivergedError
from models.report import read_results
from train import build_module, train

ROOT = Path(__file__).parent.parent
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


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text"
    words = b"the cat sat on the mat and the dog lay by the log while it rained "
    path.write_bytes(b"".join(words[i % 60 :] for i in range(1000)))
    return path


def overrides(text, root, *changes):
    return [*TINY, f"data.path={text}", f"run_root={root}", *changes]


def fit(text, root, *changes):
    """Trains in this process; returns the run's folder."""
    config = validate(configure(*overrides(text, root, "name=run", *changes)))
    train(config, choices={"attention": "cosine"})
    return Path(root) / "run"


def command(text, root, *changes, flags=(), code=None):
    """The same in a process of its own, as a user starts it; code runs before it."""
    start = (
        ["-c", code + "\nimport sys; sys.argv[0] = 'train.py'; import train; train.main()"] if code else ["train.py"]
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HOME": str(root)}
    return subprocess.run(
        [sys.executable, *start, *flags, *overrides(text, root, *changes)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


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


def test_sigkill_and_resume_repeat_the_uninterrupted_run_bit_for_bit(text, tmp_path):
    # the checkpoint of step 4 falls inside the log interval of steps 4 to 6
    changes = ["name=run", "max_steps=12", "norm=post", "trainer.log_every=3"]
    whole = command(text, tmp_path / "whole", *changes)
    assert whole.returncode == 0, whole.stderr
    kill = """
import os, signal
import models.callbacks as callbacks
report = callbacks.TrainingMetrics.on_train_batch_end
def report_and_die(self, trainer, *rest):
    report(self, trainer, *rest)
    if trainer.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
callbacks.TrainingMetrics.on_train_batch_end = report_and_die
"""
    killed = command(text, tmp_path / "killed", *changes, code=kill)
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in metrics(tmp_path / "killed/run")] == ["3", "4", "6"]
    assert json.loads((tmp_path / "killed/run/run.json").read_text())["status"] == "running"
    resumed = command(text, tmp_path / "killed", *changes, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr

    before, after = weights(tmp_path / "whole/run"), weights(tmp_path / "killed/run")
    assert before["global_step"] == after["global_step"] == 12
    for name, value in before["state_dict"].items():
        assert torch.equal(value, after["state_dict"][name]), name
    for first, second in zip(
        before["optimizer_states"][0]["state"].values(), after["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(first[key], second[key]) for key in first)
    columns = ("step", "train/loss", "train/bpc", "train/lr", "train/grad_norm", "train/tokens", "val/bpc")
    rows = [
        [{key: row[key] for key in columns} for row in metrics(tmp_path / f"{run}/run")] for run in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == ["3", "4", "6", "8", "9", "12"]
    samples = [(tmp_path / f"{run}/run/samples.txt").read_text() for run in ("whole", "killed")]
    assert samples[0] == samples[1]


def test_a_new_run_never_overwrites_one(text, tmp_path):
    first = fit(text, tmp_path)
    before = (first / "metrics.csv").read_bytes()
    fit(text, tmp_path, "max_steps=4")
    assert (first / "metrics.csv").read_bytes() == before
    assert read_results(tmp_path / "run-2").last("step") == 4


def test_a_resumed_run_says_what_changed(text, tmp_path, caplog):
    folder = fit(text, tmp_path)
    fit(text, tmp_path, "resume=auto", "max_steps=12", "optimizer.weight_decay=0.2")
    assert "resumed with a change: optimizer.weight_decay was 0.1, is 0.2" in caplog.text
    assert read_results(folder).last("step") == 12


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_resuming_from_what_is_no_run_is_refused(text, tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="resume must be null, auto, a run's folder"):
        fit(text, tmp_path / "runs", f"resume={tmp_path / path}")


def test_divergence_is_marked_and_raised(text, tmp_path):
    with pytest.raises(DivergedError, match="the training loss is"):
        fit(text, tmp_path, "lr=1e30", "trainer.clip_norm=null", "max_steps=20")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "diverged"
    assert "nan" in record["error"] or "inf" in record["error"]


def test_failure_is_marked_and_its_empty_folder_taken_again(text, tmp_path):
    with pytest.raises(Exception, match="must divide model.width"):
        fit(text, tmp_path, "model.num_heads=3")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "failed" and "must divide model.width" in record["error"]
    assert fit(text, tmp_path).name == "run"
    assert not (tmp_path / "run-2").exists()


def test_a_sweep_runs_every_job_and_marks_those_that_fail(text, tmp_path):
    # with 1e30 every job diverges; a width that heads do not divide fails: neither stops the others
    swept = command(text, tmp_path, "sweep=attention_norm", "lr=1e-3", "max_steps=4", flags=["-m"])
    assert swept.returncode == 0, swept.stderr
    folders = sorted(path.name for path in tmp_path.iterdir() if (path / "run.json").exists())
    told = "-model.num_layers=1-model.width=32-model.num_heads=2-model.dropout=0.1"
    expected = [f"{a}-{n}-tiny-file-len32-lr0.001-seed0{told}" for a in ("cosine", "regular") for n in ("post", "pre")]
    assert folders == expected
    assert {read_results(tmp_path / name).status for name in folders} == {"finished"}

    changes = ["model.num_heads=3,2", "lr=1e30,1e-3", "trainer.clip_norm=null", "max_steps=20", "trainer.val_bytes=100"]
    broken = command(text, tmp_path / "broken", *changes, flags=["-m"])
    assert broken.returncode != 0
    statuses = {path.name: read_results(path).status for path in (tmp_path / "broken").glob("*-lr*")}
    assert sorted(statuses.values()) == ["diverged", "failed", "failed", "finished"], statuses


def test_validation_is_bits_per_scored_byte(text, tmp_path):
    folder = fit(text, tmp_path, "model.dropout=0")
    config = validate(configure(*overrides(text, tmp_path)))
    module = build_module(config)
    module.load_state_dict(weights(folder)["state_dict"])
    content = text.read_bytes()
    val = content[int(len(content) * 0.9) :][:600]
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


def test_two_processes_share_the_step_and_score_every_byte_once(text, tmp_path):
    changes = ["name=run", "model.dropout=0", "max_steps=4"]
    done = command(text, tmp_path, *changes, "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run-2").exists()
    folder = tmp_path / "run"
    record = json.loads((folder / "run.json").read_text())
    assert (record["micro_batch_size"], record["accumulate"], record["tokens_per_step"]) == (4, 1, 256)
    assert [row["step"] for row in metrics(folder)] == ["2", "4"]
    module = build_module(validate(configure(*overrides(text, tmp_path))))
    module.load_state_dict(weights(folder)["state_dict"])
    alone = fit(text, tmp_path / "alone", "model.dropout=0", "max_steps=4")
    assert weights(folder)["state_dict"].keys() == weights(alone)["state_dict"].keys()
    # other windows, the same corpus: close, not equal
    assert read_results(folder).last("val/bpc") == pytest.approx(read_results(alone).last("val/bpc"), abs=0.3)


def test_wandb_writes_offline_without_an_account_and_resumes_under_its_id(text, tmp_path):
    changes = ["name=run", "logger=wandb", "max_steps=4", "compressors=true"]
    first = command(text, tmp_path, *changes)
    assert first.returncode == 0, first.stderr
    second = command(text, tmp_path, *changes, "resume=auto", "max_steps=8")
    assert second.returncode == 0, second.stderr
    offline = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(offline) == 2 and len({path.name.split("-", 3)[3] for path in offline}) == 1
    assert all(any(path.glob("*.wandb")) for path in offline)
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["2", "4", "6", "8"]
    for expected in ("wandb sync", "gzip -9", "xz -9e", "loss_and_memory.png", "a sample after step 8", "finished"):
        assert expected in second.stdout, expected
