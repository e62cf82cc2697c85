"""What a run says of itself: before the first step, while it trains, in a terminal, and at the end."""

import logging
import os
import re
import select
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from support import ROOT
from support.training import fit, overrides

from models.training import progress
from models.training.length import Length
from models.training.progress import ProgressReport, duration
from models.training.report import read_results
from models.training.run_files import read_samples, sample_section


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (91, "2 min"),
        (7000, "117 min"),
        (7300, "2.0 hours"),
        (172000, "47.8 hours"),
        (172800, "2.0 days"),
    ],
)
def test_durations_are_for_people(seconds, expected):
    assert duration(seconds) == expected


class Clock:
    """A time that moves when told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


class Said:
    """What a ProgressReport says of a training that is made up: steps of so many micro-batches, each of some time."""

    def __init__(self, monkeypatch, caplog, *, accumulate, rank=0, device="cpu", **options):
        self.clock, self.caplog = Clock(), caplog
        monkeypatch.setattr(progress, "time", self.clock)
        caplog.set_level(logging.INFO)
        self.trainer = SimpleNamespace(
            is_global_zero=rank == 0,
            accumulate_grad_batches=accumulate,
            global_step=0,
            callback_metrics={"train/bpc": torch.tensor(2.5)},
            state=SimpleNamespace(fn="fit"),
            num_val_batches=[7],
        )
        self.module = SimpleNamespace(device=torch.device(device), recent_loss=lambda: 1.0)
        length = options.pop("length", None) or Length(options.pop("max_steps"))
        self.report = ProgressReport(bar=False, length=length, **options)
        self.report.on_train_start(self.trainer, self.module)
        self.micro_batches = 0

    def train(self, micro_batches, seconds):
        for _ in range(micro_batches):
            self.report.on_train_batch_start(self.trainer, self.module)
            self.clock.now += seconds
            self.micro_batches += 1
            self.trainer.global_step = self.micro_batches // self.trainer.accumulate_grad_batches
            self.report.on_train_batch_end(self.trainer, self.module)

    def validate(self, seconds):
        self.report.on_validation_start(self.trainer, self.module)
        for index in range(7):
            self.clock.now += seconds / 7
            self.report.on_validation_batch_end(self.trainer, self.module, None, None, index)

    def lines(self):
        return [record.getMessage() for record in self.caplog.records]


SMALL_AT_8192 = {"max_steps": 2000, "tokens_per_step": 65536, "val_every": 250, "val_tokens": 2**20}


def test_a_cpu_is_told_at_once_that_a_run_would_take_days(monkeypatch, caplog):
    """README's second command on a CPU: eight micro-batches a step, half a minute each."""
    said = Said(monkeypatch, caplog, accumulate=8, **SMALL_AT_8192)
    said.train(1, seconds=40)
    said.train(1, seconds=30)
    training, validating = (16000 - 2) * 30, 8 * 16 * 8 * 30 / 3
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"on this CPU the 2,000 steps that are left will take about {(training + validating) / 3600:.0f} hours: use a "
        "GPU, or a size for a CPU: model=tiny seq_len=256 tokens_per_step=2048, as in experiment=quickstart, which "
        "takes minutes"
    ]
    said.train(30, seconds=30)
    assert sum("on this CPU" in line for line in said.lines()) == 1


def test_a_short_run_is_estimated_without_its_first_micro_batch(monkeypatch, caplog):
    said = Said(monkeypatch, caplog, accumulate=1, max_steps=1000, tokens_per_step=100, val_every=500, val_tokens=600)
    said.train(1, seconds=25)  # compiles
    said.train(2, seconds=2)
    assert said.lines() == ["about 33 min for 997 steps, at 50 tokens/s"]


def test_a_line_every_30_seconds_and_none_before(monkeypatch, caplog):
    assert progress.LINE_SECONDS == 30
    said = Said(monkeypatch, caplog, accumulate=2, max_steps=40, tokens_per_step=100, val_every=20, val_tokens=600)
    said.train(33, seconds=1)
    assert said.lines() == [
        "about 84 s for 38 steps, at 50 tokens/s",
        "step 15 of 40: train 1.4427 bits per byte, 50 tokens/s, 58 s left",
    ]
    said.train(7, seconds=3)
    said.validate(seconds=35)
    said.train(1, seconds=1)
    assert said.lines()[2:] == ["step 20 of 40: validation, batch 2 of 7"]
    said.module.recent_loss = lambda: float("nan")  # it was logged just now
    said.train(20, seconds=2)
    assert said.lines()[3:] == [
        "step 21 of 40 and 1 of 2 micro-batches: train 2.5000 bits per byte, 22 tokens/s, 2 min left",
        "step 29 of 40: train 2.5000 bits per byte, 25 tokens/s, 79 s left",
    ]


def test_a_run_by_time_says_how_much_of_it_is_left(monkeypatch, caplog):
    length = Length(10**6, 2.0)
    said = Said(monkeypatch, caplog, accumulate=1, length=length, tokens_per_step=100, val_every=40, val_tokens=600)
    said.train(1, seconds=9)
    for _ in range(35):
        length.seconds += 1.0
        said.train(1, seconds=1)
    assert said.lines() == [
        # 117 s of steps are left after 3; four validations of 2 s: a forward pass is a third of a step's work
        "about 2 min for 117 steps, at 100 tokens/s",
        "step 22, 0.35 of 2 min: train 1.4427 bits per byte, 100 tokens/s, 2 min left",
    ]


def test_other_processes_say_nothing(monkeypatch, caplog):
    said = Said(monkeypatch, caplog, accumulate=8, rank=1, **SMALL_AT_8192)
    said.train(20, seconds=30)
    said.validate(seconds=60)
    assert said.lines() == []


@pytest.mark.training
def test_a_run_says_what_it_is_how_it_goes_and_where_it_is(text, tmp_path, monkeypatch, caplog, capsys):  # noqa: F811
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "ESTIMATE_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    folder = fit(text, tmp_path, "max_steps=6", "test=true")
    lines = [record.getMessage() for record in caplog.records]
    opening = next(index for index, line in enumerate(lines) if "parameters on" in line)
    parameters = r"[\d,]+ parameters on CPU in 32-true; 6 steps of 256 bytes, context 32; "
    corpus = f"corpus text, {text.stat().st_size:,} bytes; run folder {re.escape(str(folder))}"
    assert re.fullmatch(parameters + corpus, lines[opening]), lines
    numbers = r"train \d\.\d{4} bits per byte, [\d,?]+ tokens/s, .+"
    told = re.compile(rf"step (\d) of 6( and 1 of 2 micro-batches)?: {numbers}")
    assert [line for line in lines[opening:] if re.match(r"about \d+ s for [56] steps, at [\d,]+ tokens/s", line)]
    steps = [match.group(1, 2) for line in lines if (match := told.fullmatch(line))]
    assert [step for step, part in steps if part is None] == list("123456")
    assert [step for step, part in steps if part] == list("012345")
    assert {"step 4 of 6: validation, batch 1 of 5", "step 6 of 6: test, batch 1 of 15"} <= set(lines)
    assert (folder / "train.log").read_text().count("parameters on CPU") == 1
    out = capsys.readouterr().out
    for name in ("loss_and_memory.png", "metrics.csv", "samples.txt", "checkpoints", "train.log", "run.json"):
        assert f" {folder / name}\n" in out
    assert f"python -m scripts.generate {folder}\n" in out


@pytest.mark.training
def test_a_sample_and_a_files_name_are_shown_as_they_are(text, tmp_path, capsys):  # noqa: F811
    """Rich would make pictures of :names: and drop [brackets]; and a line may look like a sample's heading."""
    line = "d[:x:] k=:key: [bold]a[/bold]\n--- step 7 ---\n\\--- step 8 ---\n"
    named = tmp_path / "text[final].txt"
    named.write_text(line * 400)
    keys = "max_steps=2", "trainer.val_every=2", "trainer.sample_bytes=1", "seq_len=32", f"data.path='{named}'"
    folder = fit(text, tmp_path, *keys)
    out = capsys.readouterr().out
    (sample,) = read_samples(folder / "samples.txt")
    assert sample[0] == 2 and len(sample[1]) > 20
    assert "a sample after step 2" in out and sample[1].splitlines()[0] in out
    assert "text[final].txt" in " ".join(out.split())


def test_samples_are_read_as_they_were_written(tmp_path):
    samples = [
        (2, "a\n--- step 7 ---\nb\n"),
        (4, "--- step 9 ---"),
        (6, "\\--- step 1 ---\n\n--- step x ---\n"),
        (8, ""),
    ]
    path = tmp_path / "samples.txt"
    path.write_text("".join(sample_section(*sample) for sample in samples))
    assert read_samples(path) == samples


def in_a_terminal(command, environment, seconds=240):
    """What a program writes to a terminal of 80 columns."""
    import pty

    main, terminal = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        out, end = b"", time.monotonic() + seconds
        while time.monotonic() < end and select.select([main], [], [], end - time.monotonic())[0]:
            try:
                out += os.read(main, 65536)
            except OSError:  # the program ended
                break
        else:
            process.kill()
    os.close(main)
    assert process.returncode == 0, out.decode()
    return out.decode()


@pytest.mark.training
def test_a_run_outlives_the_reader_of_its_output(text, tmp_path):  # noqa: F811
    """As `python train.py ... | head -n 1`: the run goes on, and says once that nobody reads it."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "train.py", *overrides(text, tmp_path, "name=run", "max_steps=4", "trainer.log_every=1")]
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read()
    said = "the reader of this program's output has gone: what follows is not shown\n"
    assert run.returncode == 0 and errors.count(said) == 1, errors
    assert "Traceback" not in errors and "Logging error" not in errors, errors
    assert read_results(tmp_path / "run").status == "finished"
    line = [sys.executable, "-m", "scripts.generate", str(tmp_path / "run"), "--num-bytes", "3"]
    with subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as generated:
        generated.stdout.close()
        errors = generated.stderr.read().decode()
    assert "Traceback" not in errors and "Broken pipe" not in errors, errors
    assert generated.returncode == 141
    line = [sys.executable, "-m", "scripts.compare", *[str(tmp_path / "run")] * 2, "--within", "0.5"]
    with subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as compared:
        compared.stdout.close()
        errors = compared.stderr.read().decode()
    assert compared.returncode == 141 and not errors  # not 1, which says that they differ


def test_an_interrupt_while_modules_are_imported_is_one_line():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    code = (
        "import os, runpy, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lightning': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "sys.argv = ['train.py', 'model=tiny']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (130, "", "interrupted")


@pytest.mark.training
def test_log_lines_stand_above_the_bar(text, tmp_path):  # noqa: F811
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    changes = overrides(text, tmp_path, "trainer.progress_bar=true", "max_steps=240", "trainer.val_every=60")
    code = "import sys, models.training.progress as progress; progress.BAR_SECONDS = progress.ESTIMATE_SECONDS = 0\n"
    code += "sys.argv[0] = 'train.py'; import train; train.main()"
    out = in_a_terminal([sys.executable, "-c", code, *changes], environment)
    assert re.search(r"━ \d+/240 +\d\.\d{3} bpc +[\d,]+ tokens/s +\d+ s left", re.sub(r"\x1b\[[0-9;]*m", "", out))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    said = [match.start() for match in re.finditer("INFO step", plain)]
    assert len(said) == 4
    assert all(plain[start - 1] in "\r\n" for start in said), plain
    line = r"INFO step \d+ of 240: train \d\.\d+, val \d\.\d+ bits per byte *\r?\n"
    assert all(re.match(line, plain[start:]) for start in said), plain
