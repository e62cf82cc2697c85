"""Runs by time: they end with their budget, go on where they were stopped, and are repeated step for step."""

import json

import pytest
import torch
from support.configuration import configure
from support.optimizers import Momentum
from support.training import command, fit, killed_in, losses, metrics, overrides, weights

from conf.registry import BUILDERS
from conf.schema import validate
from models.training import stopping
from models.training.report import read_results
from models.training.schedule import read_rates
from models.training.stopping import Stopping
from train import check_timed

pytestmark = pytest.mark.training

TIMED = ["name=run", "max_steps=5000", "trainer.val_every=200", "trainer.log_every=10", "optimizer.warmup_steps=5"]
BUDGET = "trainer.budget_minutes=0.01"  # 0.6 s


def repeated(text, root, run, *changes):
    """The folder of a run by steps with the rates of a run by time."""
    steps = len(read_rates(run))
    line = [f"max_steps={steps}", f"optimizer.rates={run}", "trainer.val_every=200", "trainer.log_every=10"]
    return fit(text, root, *line, *changes)


def test_a_run_by_time_is_stopped_resumed_ended_by_its_budget_and_repeated_bit_for_bit(text, tmp_path, caplog):
    line = [*TIMED, BUDGET, "optimizer=muon", "optimizer.decay=linear", "optimizer.cooldown_fraction=0.5"]
    code = killed_in("step 7").replace("SIGKILL", "SIGTERM")
    stopped = command(text, tmp_path, *line, code=code)
    assert stopped.returncode == 143, stopped.stderr
    first = weights(tmp_path / "run")["training_time"]
    assert first["seconds"] > 0 and len(read_rates(tmp_path / "run")) == 7
    folder = fit(text, tmp_path, *line, "resume=auto")
    results, fractions = read_results(folder), read_rates(folder)
    steps, seconds = int(results.last("step")), results.series("train/seconds")[1]
    assert results.status == "finished" and 7 < steps == len(fractions) < 5000
    assert seconds == sorted(seconds) and seconds[0] > first["seconds"] and 0.6 <= seconds[-1] < 10
    assert weights(folder)["training_time"]["seconds"] >= seconds[-1]
    assert results.series("val/bpc")[0][-1] == steps and fractions[0] == 1 / 6
    assert 0.1 <= fractions[-1] < max(fractions) == 1.0
    assert results.series("train/lr")[1] == pytest.approx([1e-3 * fractions[int(row["step"]) - 1] for row in
                                                           metrics(folder) if row["train/lr"]])  # fmt: skip
    fit(text, tmp_path, *line, "resume=auto")  # nothing is left
    assert read_results(folder).last("step") == steps

    muon = ["optimizer=muon", "optimizer.warmup_steps=77"]  # which rates make meaningless
    again = repeated(text, tmp_path / "again", folder, *muon)
    before, after = weights(folder)["state_dict"], weights(again)["state_dict"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert losses(again)[-1] == losses(folder)[-1]
    assert not (again / "rates.csv").exists() and "training_time" not in weights(again)
    caplog.clear()
    fit(text, tmp_path, *line[:3], "optimizer=muon", BUDGET, "max_steps=3")
    assert "max_steps=3 ended the run after" in caplog.text and "before the end of its schedule" in caplog.text


def test_ranks_have_one_clock(text, tmp_path):
    done = command(text, tmp_path, *TIMED, BUDGET, "model.dropout=0", "trainer.devices=2", "micro_batch_tokens=64")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert read_results(folder).status == "finished" and len(read_rates(folder)) == read_results(folder).last("step")
    again = read_results(repeated(text, tmp_path / "again", folder, "model.dropout=0"))
    assert again.series("train/loss")[1] == pytest.approx(read_results(folder).series("train/loss")[1], rel=1e-4)


@pytest.mark.gpu
def test_a_run_by_time_on_a_gpu_ends_with_its_budget(text, tmp_path):
    budget = ["trainer.budget_minutes=0.05", "compile=false", "trainer.accelerator=gpu", "optimizer=muon"]
    folder = fit(text, tmp_path, *TIMED, *budget)
    results = read_results(folder)
    assert results.status == "finished" and len(read_rates(folder)) == results.last("step")
    assert 3.0 <= weights(folder)["training_time"]["seconds"] < 3.5  # two steps late at most, and these are short


def test_ranks_agree_on_the_largest(monkeypatch):
    state = Stopping()
    assert state.largest(0.1) == 0.1
    state._group = object()
    seen = []

    def reduce(values, op, group):
        seen.append((values.dtype, op, group))
        values.fill_(7.5)

    monkeypatch.setattr(stopping.torch.distributed, "all_reduce", reduce)
    assert state.largest(0.1) == 7.5 and seen == [(torch.float64, torch.distributed.ReduceOp.MAX, state._group)]


def test_budgets_that_cannot_be_are_refused_and_harm_nothing(text, tmp_path):
    folder = fit(text, tmp_path, "max_steps=4")
    before = (folder / "metrics.csv").read_bytes()
    for changes, said in (
        (["trainer.budget_minutes=0"], "trainer.budget_minutes must be positive or null, got 0"),
        ([f"resume={folder}", BUDGET], "trainer.budget_minutes=0.01 counts from a run's first step, .* no time"),
        ([BUDGET, "optimizer.rates=nowhere"], "optimizer.rates must be null, the rates.csv of a run"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(text, tmp_path, *changes)
    (tmp_path / "rates.csv").write_text("step,lr_fraction\n1,1.0\n")
    with pytest.raises(ValueError, match="optimizer.rates repeats a run by steps: trainer.budget_minutes must be null"):
        fit(text, tmp_path, BUDGET, f"optimizer.rates={tmp_path}", "max_steps=1")
    assert (folder / "metrics.csv").read_bytes() == before

    timed = fit(text, tmp_path, "max_steps=4", "trainer.budget_minutes=5")  # another identity, so another folder
    timed = tmp_path / "run-2"
    assert read_results(timed).last("step") == 4
    trained_s = weights(timed)["training_time"]["seconds"]
    with pytest.raises(ValueError, match="trainer.budget_minutes must be at least .*, the minutes of training that"):
        fit(text, tmp_path, f"resume={timed}", f"trainer.budget_minutes={trained_s / 120}")
    fit(text, tmp_path, f"resume={timed}", "trainer.budget_minutes=6", "max_steps=6")
    assert read_results(timed).last("step") == 6


def test_another_optimizer_without_a_schedule_of_its_own_goes_by_steps_alone(text, tmp_path, monkeypatch):
    config = validate(configure(*overrides(text, tmp_path, BUDGET)))
    monkeypatch.setitem(BUILDERS["optimizer"], "sgd", "support.optimizers.Momentum")
    config.optimizer.kind = "sgd"
    with pytest.raises(
        ValueError, match="needs an optimizer whose schedule can go by time, .*; optimizer=sgd has none"
    ):
        check_timed(config, Momentum(lr=0.1, momentum=0.9))


def test_a_run_by_steps_has_nothing_of_this(text, tmp_path):
    folder = fit(text, tmp_path, "max_steps=4")
    assert not (folder / "rates.csv").exists() and "training_time" not in weights(folder)
    assert "train/seconds" not in metrics(folder)[0]
    identity = json.loads((folder / "run.json").read_text())["identity"]
    added = {"trainer.budget_minutes", "optimizer.rates", "optimizer.cooldown_fraction", "model.activation"}
    assert not added & identity.keys()
