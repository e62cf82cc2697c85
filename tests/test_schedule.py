"""Learning rates by steps, by training time, and repeated from a run's file; and how long a run goes on."""

import math
from types import SimpleNamespace

import pytest
import torch

from models.training import training_time
from models.training.length import Length
from models.training.schedule import Schedule, TimedFractions, read_rates
from models.training.stopping import Stopping
from models.training.training_time import TrainingTime

SHAPE = {"warmup_steps": 10, "decay": "linear", "final_lr_fraction": 0.1, "cooldown_fraction": 1.0}


def schedule(**changes):
    return Schedule(**{**SHAPE, "max_steps": 1000, "rates": None, **changes})


def test_a_short_run_warms_up_for_a_tenth_of_its_steps():
    short = schedule(warmup_steps=100, max_steps=40)
    assert short.warmup_steps == 4 and short.fraction(4) == 1.0


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_cooldown_over_everything_is_the_plain_decay(decay):
    whole = schedule(decay=decay)
    for step in range(10, 1001):
        progress = (step - 10) / 990
        remaining = 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
        assert whole.fraction(step) == 0.1 + 0.9 * remaining  # to the bit
    assert [whole.fraction(step) for step in range(10)] == [(step + 1) / 11 for step in range(10)]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_cooldown_leaves_the_peak_for_the_last_part(decay):
    late = schedule(decay=decay, cooldown_fraction=0.4)
    assert {late.fraction(step) for step in range(10, 605)} == {1.0}  # 10 + 0.6 * 990 = 604
    assert late.fraction(604 + 198) == pytest.approx(0.55)
    assert late.fraction(1000) == pytest.approx(0.1) == late.fraction(5000)
    assert all(late.fraction(step) > late.fraction(step + 1) for step in range(605, 1000))


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("cooldown", [1.0, 0.5])
def test_at_constant_speed_time_gives_the_rates_of_as_many_steps(decay, cooldown):
    """1000 steps of 0.6 s in a budget of 10 minutes."""
    by_steps = schedule(decay=decay, cooldown_fraction=cooldown)
    timed = TimedFractions(schedule(decay=decay, cooldown_fraction=cooldown, max_steps=10**6), budget_s=600)
    rates = [timed.fraction(step, 0.6 * step) for step in range(1000)]
    assert rates == pytest.approx([by_steps.fraction(step) for step in range(1000)], abs=1e-9)
    assert timed.warmed_up_s == pytest.approx(6) and timed.fraction(1000, 600) == timed.fraction(1003, 601)


def test_a_slow_warm_up_ends_with_a_tenth_of_the_time():
    timed = TimedFractions(schedule(warmup_steps=100), budget_s=600)
    rates = [timed.fraction(step, 20.0 * step) for step in range(30)]
    assert rates[:3] == pytest.approx([1 / 101, 1 / 3, 2 / 3]) and rates[3] == 1.0
    assert rates[4:] == pytest.approx([1 - 0.9 * 20 * after / 540 for after in range(1, 27)])


def test_a_resumed_schedule_by_time_needs_no_more_than_when_its_warm_up_ended():
    whole, resumed = (TimedFractions(schedule(), budget_s=100) for _ in range(2))
    rates = [whole.fraction(step, step / 2) for step in range(200)]
    resumed.warmed_up_s = whole.warmed_up_s
    assert [resumed.fraction(step, step / 2) for step in range(50, 200)] == rates[50:]


def test_rates_are_repeated_from_a_file_or_its_folder(tmp_path):
    fractions = [1 / 3, 1.0, 0.1 + 0.2]
    lines = [f"{step},{step * 0.5},{fraction!r}\n" for step, fraction in enumerate(fractions, 1)]
    (tmp_path / "rates.csv").write_text("step,seconds,lr_fraction\n" + "".join(lines))
    for source in (tmp_path, tmp_path / "rates.csv"):
        again = schedule(max_steps=3, rates=str(source))
        assert [again.fraction(step) for step in range(4)] == [*fractions, fractions[-1]]
    assert schedule(max_steps=2, rates=str(tmp_path)).fraction(1) == 1.0
    with pytest.raises(ValueError, match="has the rates of 3 steps: max_steps must be at most that, got 4"):
        schedule(max_steps=4, rates=str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "optimizer.rates must be null, the rates.csv of a run with trainer.budget_minutes"),
        ("step,lr\n1,0.5\n", "is no table of step and lr_fraction: 'lr_fraction'"),
        ("step,lr_fraction\n1,many\n", "is no table of step and lr_fraction: could not convert"),
        ("step,lr_fraction\n", "must have the steps 1, 2, 3"),
        ("step,lr_fraction\n1,0.5\n3,0.5\n", "must have the steps 1, 2, 3"),
        ("step,lr_fraction\n1,0.5\n2,nan\n", r"has an lr_fraction outside \[0, 1\]"),
        ("step,lr_fraction\n1,0.5\n2,1.5\n", r"has an lr_fraction outside \[0, 1\]"),
    ],
)
def test_files_without_whole_rates_are_refused(tmp_path, content, message):
    path = tmp_path / "rates.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rates(path)


def test_a_run_is_over_by_steps_or_by_time():
    steps = Length(100)
    assert [steps.is_reached(step) for step in (0, 99, 100, 101)] == [False, False, True, True]
    assert (steps.steps_left(60, 0.5), steps.place(60), steps.share(60)) == (40, "step 60 of 100", (60, 100, "60/100"))
    timed = Length(100, 2.0, seconds=90.0)
    assert not timed.is_reached(99) and timed.is_reached(100)
    assert (timed.steps_left(10, 0.5), timed.steps_left(90, 0.5)) == (60, 10)
    assert timed.place(10) == "step 10, 1.50 of 2 min" and timed.share(10) == (90, 120, "10 steps, 90/120 s")
    timed.seconds = 120.0
    assert timed.is_reached(1) and timed.steps_left(10, 0.5) == 0


class Times:
    """A clock that moves when told to."""

    now = 50.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """A clock of a run that is made up: two micro-batches a step, with a budget of 100 seconds."""
    clock = Times()
    monkeypatch.setattr(training_time, "time", clock)
    return clock, *made_up(tmp_path)


def made_up(folder):
    length = Length(10**6, 100 / 60)
    callback = TrainingTime(folder, length=length, schedule=schedule(warmup_steps=3), stopping=Stopping())
    group = {"initial_lr": 2.0, "lr": None}
    loop = SimpleNamespace(_should_accumulate=lambda: False)
    trainer = SimpleNamespace(
        global_step=0, optimizers=[SimpleNamespace(param_groups=[group])], state=SimpleNamespace(fn="fit"),
        fit_loop=SimpleNamespace(epoch_loop=loop), is_global_zero=True,
    )  # fmt: skip
    return callback, trainer, SimpleNamespace(device=torch.device("cpu"))


def step(clock, callback, trainer, module, seconds):
    """One optimizer step; returns its rate."""
    callback.on_train_batch_start(trainer, module)
    clock.now += seconds / 2
    loop = trainer.fit_loop.epoch_loop
    loop._should_accumulate = lambda: True
    callback.on_train_batch_end(trainer, module)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    callback.on_train_batch_start(trainer, module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == rate  # within a step it stays
    clock.now += seconds / 2
    trainer.global_step += 1
    loop._should_accumulate = lambda: False
    callback.on_train_batch_end(trainer, module)
    return rate


def test_the_clock_runs_in_training_steps_alone(timed):
    clock, callback, trainer, module = timed
    callback.on_train_start(trainer, module)
    assert step(clock, callback, trainer, module, seconds=40) == 2.0 / 4  # compiles: not counted
    assert callback.length.seconds == 0
    clock.now += 1  # between steps, logging for instance
    step(clock, callback, trainer, module, seconds=4)
    assert callback.length.seconds == 5
    callback.on_validation_start(trainer, module)
    clock.now += 1000
    step(clock, callback, trainer, module, seconds=2)
    assert callback.length.seconds == 7
    clock.now += 3
    checkpoint = {}
    callback.on_save_checkpoint(trainer, module, checkpoint)
    assert checkpoint == {"training_time": {"seconds": 10, "warmed_up_s": None}}
    clock.now += 500  # the writing
    assert step(clock, callback, trainer, module, seconds=90) == 2.0  # step 3 of a warm-up of 3: the peak
    assert callback.length.seconds == 100 and callback.length.is_reached(4)


def test_every_steps_rate_is_written_with_the_checkpoint_and_later_ones_are_dropped(timed, tmp_path, caplog):
    clock, callback, trainer, module = timed
    callback.on_train_start(trainer, module)
    rates = [step(clock, callback, trainer, module, seconds=7.3) for _ in range(3)]
    checkpoint = {}
    callback.on_save_checkpoint(trainer, module, checkpoint)
    rates += [step(clock, callback, trainer, module, seconds=7.3)]
    assert [2.0 * fraction for fraction in read_rates(tmp_path)] == rates[:3]
    callback.on_save_checkpoint(trainer, module, {})
    assert [2.0 * fraction for fraction in read_rates(tmp_path)] == rates

    resumed, trainer, module = made_up(tmp_path)
    resumed.on_load_checkpoint(trainer, module, checkpoint)
    trainer.global_step = 3
    resumed.on_train_start(trainer, module)
    assert len(read_rates(tmp_path)) == 3 and resumed.length.seconds == checkpoint["training_time"]["seconds"]
    rates[3] = step(clock, resumed, trainer, module, seconds=1)  # the first of this start
    resumed.on_save_checkpoint(trainer, module, {})
    assert [2.0 * fraction for fraction in read_rates(tmp_path)] == rates and not caplog.text

    (tmp_path / "rates.csv").unlink()
    again, trainer, module = made_up(tmp_path)
    trainer.global_step = 3
    again.on_train_start(trainer, module)
    assert "has 0 of the first 3 steps: it cannot repeat the run" in caplog.text


def test_on_a_gpu_the_host_waits_for_the_step_before_the_last(timed, monkeypatch):
    clock, callback, trainer, module = timed
    module.device = torch.device("cuda")
    waited: list[int | str] = []

    class Event:
        def record(self):
            self.step = trainer.global_step

        def synchronize(self):
            waited.append(self.step)

    monkeypatch.setattr(training_time.torch.cuda, "Event", Event)
    monkeypatch.setattr(training_time.torch.cuda, "synchronize", lambda _: waited.append("all"))
    callback.on_train_start(trainer, module)
    for _ in range(6):
        step(clock, callback, trainer, module, seconds=1)
    assert waited == ["all", 2, 3, 4]  # the first step ends alone; behind step 6 the GPU has 5 and 6 to do
    callback.on_validation_start(trainer, module)
    step(clock, callback, trainer, module, seconds=1)
    assert waited[4:] == ["all"]
