"""scripts.compare, scripts.generate and scripts.evaluate on a tiny run that is trained here, on the CPU."""

import csv
import errno
import gzip
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import train
from conf.schema import CONF
from data.bytes import IGNORE_INDEX, EvalBatches
from models.training.load import load_model
from models.training.report import headings, read_results
from scripts import compare, evaluate, generate
from scripts.evaluate import SlidingBatches, score_batches
from scripts.results import RESULTS

pytestmark = pytest.mark.training

SEQ_LEN = 16
TEXT = bytes(np.random.default_rng(0).integers(97, 105, size=4000, dtype=np.uint8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run: 6 steps of a model of one layer, validated on the whole split."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text").write_bytes(TEXT)
    overrides = [
        *("data=file", f"data.path={root / 'text'}", "model=tiny", "model.num_layers=1", "model.width=32"),
        *(f"seq_len={SEQ_LEN}", "max_steps=6", "tokens_per_step=64", "test=true"),
        *("logger=csv", "trainer.val_every=3", "trainer.val_bytes=null", "trainer.log_every=2", "lr=0.01"),
        *("trainer.accelerator=cpu", "trainer.progress_bar=false", "trainer.sample_bytes=4"),
        *(f"run_root={root / 'runs'}", "name=first"),
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        HydraConfig.instance().set_config(compose("config", overrides, return_hydra_config=True))
        config = compose("config", overrides)
    try:
        train.composed.__wrapped__(config)
    finally:
        HydraConfig.instance().cfg = None
    return root / "runs" / "first"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run as it was trained, to be changed."""
    evaluated = shutil.ignore_patterns("evaluations")
    return shutil.copytree(trained, tmp_path / "runs" / "first", ignore=evaluated)


@pytest.fixture
def undrawn(monkeypatch):
    """For what is not about plots, which take most of the time."""
    monkeypatch.setattr(compare, "draw", lambda *_: [])


def variant(run, name, *, config=None, **record):
    """A copy of a run beside it, with other entries in config.yaml and run.json."""
    folder = shutil.copytree(run, run.parent / name)
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | record))
    path = folder / "config.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(path), config or {}), path)
    return folder


def refusal(capsys, script, *arguments):
    """What the script says when it refuses: one error and the code 2."""
    assert script.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    return " ".join(error.split())


def evaluated(tmp_path, *arguments):
    """The result of an evaluation in one mode, non-overlapping windows unless the arguments say another."""
    path = tmp_path / "result.json"
    mode = [] if "--mode" in arguments else ["--mode", "slide" if "--stride" in arguments else "chunk"]
    assert evaluate.main([*map(str, arguments), *mode, "--device", "cpu", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())
    return result


# ---------------------------------------------------------------- compare


def test_compare_shows_every_run_whatever_became_of_it(run, capsys):
    for status in ("failed", "diverged", "running", "interrupted"):
        error = f"why it {status}" if status in ("failed", "diverged") else None
        variant(run, f"{status}-run", status=status, error=error)
    with open(run.parent / "diverged-run" / "metrics.csv") as file:
        header, *rows = csv.reader(file)
    rows[-1] = [cell if name == "step" else "nan" for name, cell in zip(header, rows[-1], strict=True)]
    with open(run.parent / "diverged-run" / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    (run.parent / "failed-run" / "metrics.csv").unlink()
    assert compare.main([str(run.parent)]) == 0
    out, err = capsys.readouterr()
    lines = {line.split("│")[1].strip(): line for line in out.split("every run")[1].splitlines() if line[:1] == "│"}
    assert set(lines) == {"first", "failed-run", "diverged-run", "running-run", "interrupted-run"}
    for name in lines:
        assert name.removesuffix("-run").replace("first", "finished").replace("running", "killed") in lines[name]
    shown = [heading for heading in headings() if heading != "MFU"]  # which a CPU has none of
    cells = dict(zip(shown, [cell.strip() for cell in lines["first"].split("│")[1:-1]], strict=True))
    results = read_results(run)
    assert cells["steps"] == "6" and "MFU" not in out
    assert cells["val bpc"] == f"{results.last('val/bpc'):.4f}"
    assert cells["test bpc"] == f"{results.last('test/bpc'):.4f}"
    assert out.startswith("5 runs: 1 finished, 1 diverged, 1 failed, 1 interrupted, 1 killed\n")
    assert "failed: failed-run: why it failed\n" in out and "diverged: diverged-run: why it diverged\n" in out
    assert "\ninterrupted: interrupted-run\n" in out and "\nkilled: running-run\n" in out
    assert "failed-run has no metrics yet" in err and "not comparable" not in err


@pytest.mark.usefixtures("undrawn")
def test_compare_tells_runs_of_one_name_apart(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "others" / "first")
    assert compare.main([str(run), str(tmp_path / "others")]) == 0
    out = capsys.readouterr().out
    assert "runs/first" in out and "others/first" in out


@pytest.mark.usefixtures("undrawn")
def test_compare_judges_loss_curves(run, capsys):
    near, far = variant(run, "near"), variant(run, "far")
    for folder, factor in ((near, 1.004), (far, 0.99)):
        with open(folder / "metrics.csv") as file:
            header, *rows = csv.reader(file)
        column = header.index("train/loss")
        logged = [row for row in rows if row[column]]
        logged[1][column] = str(float(logged[1][column]) * factor)
        with open(folder / "metrics.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    assert compare.main([str(run), str(near), "--within", "0.005"]) == 0
    assert "near is within 0.50% of first's at all of 3 logged steps: 0.400% apart at step 4" in capsys.readouterr().out
    assert compare.main([str(run), str(near), str(far), "--within", "0.005"]) == 1
    assert "far is NOT within 0.50% of first's at all of 3 logged steps: 1.000% apart" in capsys.readouterr().out
    for loss in ("nan", "inf"):  # at the last step, as a run has it that diverged
        lost = variant(run, loss)
        with open(lost / "metrics.csv", "w", newline="") as file:
            logged[-1][column] = loss
            csv.writer(file).writerows([header, *rows])
        for pair in ((run, lost), (lost, run), (lost, variant(lost, f"{loss}-again"))):
            assert compare.main([*map(str, pair), "--within", "0.5"]) == 1
            assert "NOT within 50.00%" in (out := capsys.readouterr().out) and "inf% apart at step 6" in out
    assert "give another" in refusal(capsys, compare, run, "--within", "0.005")


@pytest.mark.usefixtures("undrawn")
def test_compare_within_warns_of_other_training_windows(run, capsys):
    corpus = read_results(run).record["corpus"]
    folders = [
        run,
        variant(run, "second", config={"seed": 7}),
        variant(run, "third", corpus=corpus | {"train_bytes": 9}),
    ]
    assert compare.main([str(run), str(folders[1])]) == 0
    assert not capsys.readouterr().err
    for other, said in zip(folders[1:], ("seed is 0 in first, but 7 in second", "but 9 in third"), strict=True):
        assert compare.main([str(run), str(other), "--within", "1"]) == 0
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith("warning: --within compares losses of other training windows: ") and said in warning


@pytest.mark.usefixtures("undrawn")
def test_compare_leaves_out_what_is_no_run(run, capsys):
    (run.parent / "notes.txt").write_text("not a run")
    (run.parent / "empty").mkdir()
    for name, content in (("broken", "{"), ("list", "[]")):
        variant(run, name)
        (run.parent / name / "run.json").write_text(content)
    variant(run, "garbage")
    (run.parent / "garbage" / "metrics.csv").write_text("step,val/bpc\n1,many\n")
    assert compare.main([str(path) for path in sorted(run.parent.iterdir())]) == 0
    out, err = capsys.readouterr()
    assert "1 run" in out and "first" in out
    for name in ("notes.txt", "empty", "broken", "list", "garbage"):
        assert f"{name}' is left out" in err


@pytest.mark.usefixtures("undrawn")
def test_compare_drops_a_line_that_was_cut(run, capsys, caplog):
    path = run / "metrics.csv"
    whole = read_results(run)
    text = path.read_text()
    for cut in (1, 3, len(text.splitlines()[-1])):  # all of the last line but its end, less, one character
        path.write_text(text[:-cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert compare.main([str(run)]) == 0
        assert read_results(run).rows == whole.rows[:-1]
        assert "metrics.csv ends within a line" in caplog.text
    path.write_text("")
    assert compare.main([str(run)]) == 0
    path.write_text("step,train/lo")
    assert compare.main([str(run)]) == 0
    assert "first has no metrics yet" in capsys.readouterr().err


def test_compare_refuses_when_nothing_is_left(tmp_path, capsys):
    assert "RUNS must be runs' folders" in refusal(capsys, compare, tmp_path, tmp_path / "absent")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert "at least one run that can be read" in refusal(capsys, compare, tmp_path)
    assert "RUNS" in refusal(capsys, compare)


# ---------------------------------------------------------------- generate


def generated(capsys, *arguments):
    assert generate.main([*map(str, arguments), "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_generate_repeats_itself_with_a_seed(trained, capsys):
    texts = [
        generated(capsys, trained, "--prompt", "abc", "--num-bytes", 40, "--seed", seed, "--temperature", 1.5)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("abc") and texts[0].endswith("\n")


def test_generate_writes_a_text_a_seed_and_its_speed_elsewhere(trained, capsys):
    options = [trained, "--prompt", "abc", "--num-bytes", 20, "--temperature", 1.5, "--top-p", 0.9, "--device", "cpu"]
    alone = [generated(capsys, *options, "--seed", seed) for seed in (5, 6)]
    assert alone[0] != alone[1]
    assert generate.main([*map(str, options), "--seed", "5", "--num-samples", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == f"--- seed 5 ---\n{alone[0]}--- seed 6 ---\n{alone[1]}"
    assert re.fullmatch(r"40 bytes in \d+\.\d\d s: [\d,]+ tokens/s\n", err)


@pytest.mark.parametrize("checkpoint", ["best", "last", "path"])
def test_generate_is_the_same_with_and_without_cache(trained, capsys, checkpoint):
    checkpoint = trained / "checkpoints" / "last.ckpt" if checkpoint == "path" else checkpoint
    options = (trained, "--checkpoint", checkpoint, "--temperature", 0, "--num-bytes", 3 * SEQ_LEN)
    assert generated(capsys, *options) == generated(capsys, *options, "--no-cache")


def test_generate_takes_the_likeliest_byte(trained, capsys):
    gpt, _ = load_model(trained)
    with torch.no_grad():
        best = gpt(torch.tensor([list(b"abc")]))[0, -1].argmax().item()
    for options in (("--temperature", 0), ("--top-k", 1), ("--top-p", 1e-6)):
        text = generated(capsys, trained, "--prompt", "abc", "--num-bytes", 1, *options)
        assert text == f"abc{chr(best)}\n"


def test_generate_reads_any_prompt(trained, tmp_path, capsys):
    assert generated(capsys, trained, "--num-bytes", 0) == "\n\n"
    (tmp_path / "prompt").write_bytes(b"\xff" + "é".encode() * SEQ_LEN)
    text = generated(capsys, trained, "--prompt-file", tmp_path / "prompt", "--num-bytes", 0)
    assert text == "\N{REPLACEMENT CHARACTER}" + "é" * SEQ_LEN + "\n"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--prompt", ""], "--prompt is empty; accepted: at least one byte"),
        (["--prompt-file", "/absent/prompt"], "--prompt-file must be an existing file, got '/absent/prompt'"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument --prompt"),
        (["--num-bytes", "-1"], "argument --num-bytes: must be an integer of at least 0, got '-1'"),
        (["--temperature", "nan"], "argument --temperature: must be a number of at least 0, got 'nan'"),
        (["--top-k", "0"], "argument --top-k: must be an integer of at least 1, got '0'"),
        (["--top-p", "0"], "argument --top-p: must be a number above 0 and at most 1, got '0'"),
        (["--top-p", "nan"], "argument --top-p: must be a number above 0 and at most 1, got 'nan'"),
        (["--num-samples", "0"], "argument --num-samples: must be an integer of at least 1, got '0'"),
        (["--seed", "x"], "argument --seed: must be an integer of at least 0, got 'x'"),
        (["--seed", str(2**63)], "--seed + --num-samples must be at most 2^63, got 9223372036854775808 + 1"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--checkpoint", "new"], "checkpoint must be best, last or the path of a checkpoint, got 'new'"),
    ],
)
def test_generate_refuses(trained, capsys, arguments, named):
    assert named in refusal(capsys, generate, trained, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_is_refused_where_there_is_none(trained, capsys):
    assert "--device cuda needs a CUDA device" in refusal(capsys, generate, trained, "--device", "cuda")


# ---------------------------------------------------------------- load_model


def test_load_model_restores_every_weight(trained):
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    gpt, config = load_model(trained, "last")
    assert not gpt.training and config.seq_len == SEQ_LEN
    weights = gpt.state_dict()
    assert {f"gpt.{key}" for key in weights} == set(state)
    assert all(torch.equal(weight, state[f"gpt.{key}"]) for key, weight in weights.items())


def test_load_model_refuses_what_it_cannot_load(run, tmp_path, capsys):
    assert "is not a run's folder: it has no config.yaml" in refusal(capsys, generate, tmp_path)
    path = run / "checkpoints" / "best.ckpt"
    content = path.read_bytes()
    for damaged in (b"", b"text", content[:1000], content[: len(content) // 2]):
        path.write_bytes(damaged)
        error = refusal(capsys, generate, run)
        assert "best.ckpt" in error and "is no sound checkpoint" in error
    torch.save({"weights": 1}, path)
    assert "is no sound checkpoint" in refusal(capsys, generate, run)
    path.unlink()
    assert "the run has last" in refusal(capsys, generate, run)
    other = variant(run, "other", config={"model": {"width": 64}})
    assert "weights of another model" in refusal(capsys, generate, other, "--checkpoint", "last")
    damages = {"a: [": "is not YAML", "seq_len: 16": "does not describe a model", "- 1": "must hold keys"}
    for content, named in damages.items():
        (other / "config.yaml").write_text(content)
        assert named in refusal(capsys, generate, other, "--checkpoint", "last")


def test_a_model_is_loaded_where_its_back_end_is_missing(run, caplog, monkeypatch):
    def refuse(*_, backend, **__):
        raise ImportError(f"backend={backend!r} needs the compiled kernels")

    elsewhere = variant(run, "elsewhere", config={"attention": {"backend": "cuda"}})
    monkeypatch.setattr("models.attention.flash_cosine_sim_attention", refuse)
    gpt, config = load_model(elsewhere)
    assert config.attention.backend == "auto" == gpt.blocks[0].attention.inner.backend
    assert "attention.backend is auto here, for the run's own cannot serve: backend='cuda' needs" in caplog.text


def test_ctrl_c_ends_a_script_without_a_traceback(run, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_model", interrupted)
    assert generate.main([str(run), "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_run_of_before_a_key_was_removed_still_loads_unless_it_asks_for_what_is_gone(run, capsys):
    old = variant(run, "old", config={"model": {"residual": "float32"}})
    gpt, config = load_model(old)
    assert "residual" not in config.model
    weights = load_model(run)[0].state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in gpt.state_dict().items())
    assert refusal(capsys, generate, variant(run, "other", config={"model": {"residual": "autocast"}})).endswith(
        "config.yaml': model.residual was removed and means float32 everywhere, got 'autocast'"
    )


def test_the_lines_for_a_notebook_load_a_run_and_generate(trained, capsys):
    page = (CONF.parent / "docs" / "training.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "runs/NAME" in code)
    names = {}
    exec(code.replace("runs/NAME", str(trained)), names)
    assert capsys.readouterr().out.startswith("def ")
    assert names["new"].shape == (1, 100) and names["logits"].shape == (1, 4, 256)


# ---------------------------------------------------------------- evaluate


def test_chunk_mode_is_the_trainers_validation(trained, tmp_path, capsys):
    results = read_results(trained)
    for options, expected in (
        (("--checkpoint", "last"), results.last("val/bpc")),
        (("--checkpoint", "best", "--batch-size", "3"), results.best("val/bpc")),
        (("--split", "test"), results.last("test/bpc")),
    ):
        result = evaluated(tmp_path, trained, *options)
        assert result["bits_per_byte"] == pytest.approx(expected, abs=1e-6)
        assert (result["mode"], result["seq_len"], result["scored_bytes"]) == ("chunk", SEQ_LEN, 199)
        assert result["sha256"] == results.record["corpus"]["sha256"]
        out, err = capsys.readouterr()
        assert ("reminder: select by val" in err) == (options[-1] == "test")
        for shown in ("chunk", result["sha256"], "199", f"{result['bits_per_byte']:.6f}"):
            assert shown in out


@pytest.mark.parametrize("seq_len, stride, batch_size", [(16, 4, 3), (16, 5, 1), (7, 1, 64), (16, 16, 4)])
def test_slide_mode_equals_a_byte_by_byte_oracle(trained, tmp_path, seq_len, stride, batch_size):
    options = ("--seq-len", seq_len, "--stride", stride, "--batch-size", batch_size)
    result = evaluated(tmp_path, trained, *options)
    assert result["mode"] == f"slide-{stride}" and result["scored_bytes"] == 199
    gpt, _ = load_model(trained)
    data = torch.tensor(list(TEXT[3600:3800]))
    nats = 0.0
    with torch.no_grad():
        for position in range(1, 200):  # the window's start is the first from which position is in reach
            start = stride * max(0, math.ceil((position - seq_len) / stride))
            logits = gpt(data[None, start:position])[0, -1].double()
            nats -= logits.log_softmax(dim=0)[data[position]].item()
    assert result["bits_per_byte"] == pytest.approx(nats / (199 * math.log(2)), abs=1e-6)
    if stride == seq_len:
        chunk = evaluated(tmp_path, trained, "--seq-len", seq_len)
        assert chunk["bits_per_byte"] == pytest.approx(result["bits_per_byte"], abs=1e-6)


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("num_bytes", [2, 8, 9, 10, 12, 31])
def test_sliding_windows_score_each_byte_once(num_bytes, stride):
    data = np.arange(num_bytes, dtype=np.uint8)  # each byte is its own position
    batches = list(SlidingBatches(data, seq_len=8, stride=stride, batch_size=2))
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    scored = targets != IGNORE_INDEX
    assert targets[scored].tolist() == list(range(1, num_bytes))
    assert torch.equal(inputs[scored] + 1, targets[scored])
    assert (inputs[:, 0] % stride == 0).all()


def test_curve_by_context_adds_up(trained, tmp_path):
    result = evaluated(tmp_path, trained, "--max-bytes", 50, "--seq-len", 12)
    buckets = result["by_context"]
    lengths = [(bucket["shortest"], bucket["longest"]) for bucket in buckets]
    assert lengths == [(1, 1), (2, 3), (4, 6), (7, 12)]
    assert sum(bucket["scored_bytes"] for bucket in buckets) == result["scored_bytes"] == 49
    bits = sum(bucket["scored_bytes"] * bucket["bits_per_byte"] for bucket in buckets)
    assert bits / 49 == pytest.approx(result["bits_per_byte"])
    gpt, _ = load_model(trained)
    score = score_batches(gpt, EvalBatches(np.frombuffer(TEXT, np.uint8)[:10], 16, 2, 0, 1), 16)
    assert [bucket.longest for bucket in score.by_context()] == [1, 2, 4, 8, 16]
    assert score.scored.tolist() == [1] * 9 + [0] * 7


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--seq-len", "17"], "--seq-len must be at most the run's seq_len = 16, got 17"),
        (["--stride", "17"], "--stride must be at most the window's seq_len = 16, got 17"),
        (["--seq-len", "8", "--stride", "9"], "--stride must be at most the window's seq_len = 8, got 9"),
        (["--stride", "0"], "argument --stride: must be an integer of at least 1, got '0'"),
        (["--max-bytes", "1"], "argument --max-bytes: must be an integer of at least 2, got '1'"),
        (["--batch-size", "1.5"], "argument --batch-size: must be an integer of at least 1, got '1.5'"),
        (["--stride", "4", "--mode", "chunk"], "--mode must be both or slide, got chunk and 4"),
        (["--split", "train"], "argument --split: invalid choice: 'train'"),
        (["--text", "/absent/text"], "--text must be a file, raw, .gz or .zip, got '/absent/text'"),
        (["--text", "x", "--split", "test"], "argument --split: not allowed with argument --text"),
        (["--json", "/absent/result.json"], "--json must be a file in an existing folder"),
        (["--json", "/"], "--json must be a file in an existing folder, got '/'"),  # before minutes of work
        (["--unseen", "0"], "argument --unseen: must be an integer of at least 1, got '0'"),
        (["--unseen", "1"], "--unseen must leave bytes to score, got 1: every byte is in a string of that length"),
        (["--unseen", "5", "--text", "x"], "--unseen is of a split of the run's corpus"),
    ],
)
def test_evaluate_refuses(trained, capsys, arguments, named):
    assert named in refusal(capsys, evaluate, trained, *arguments)


def test_evaluation_has_both_modes_and_keeps_each_in_the_runs_folder(run, capsys):
    whole = [run, "--device", "cpu", "--plot"]
    assert evaluate.main([*map(str, whole)]) == 0
    out = capsys.readouterr().out
    paths = {mode: run / "evaluations" / f"val-200bytes-step6-len16-{mode}.json" for mode in ("chunk", "slide-8")}
    found = {mode: json.loads(path.read_text()) for mode, path in paths.items()}
    assert all(f"result: {path}" in out for path in paths.values())
    assert found["chunk"]["bits_per_byte"] == pytest.approx(read_results(run).last("val/bpc"), abs=1e-6)
    assert [result["scored_bytes"] for result in found.values()] == [199, 199]
    contexts = {mode: [bucket["shortest"] for bucket in result["by_context"]] for mode, result in found.items()}
    assert contexts == {"chunk": [1, 2, 3, 5, 9], "slide-8": [1, 2, 3, 5, 9]}  # the first window has all of them
    scored = [bucket["scored_bytes"] for bucket in found["slide-8"]["by_context"]]
    assert scored == [1, 1, 2, 4, 199 - 8] and {result["step"] for result in found.values()} == {6}
    plot = run / "evaluations" / "val-200bytes-step6-len16.png"
    assert plot.read_bytes().startswith(b"\x89PNG") and f"plot: {plot}" in out
    checkpoint = run / "checkpoints" / "step-3.ckpt"
    assert evaluate.main([str(checkpoint), "--device", "cpu", "--mode", "chunk"]) == 0
    step_3 = json.loads((run / "evaluations" / "val-200bytes-step3-len16-chunk.json").read_text())
    assert step_3["checkpoint"] == str(checkpoint)
    assert step_3["bits_per_byte"] == pytest.approx(read_results(run).series("val/bpc")[1][0], abs=1e-6)
    assert not (run / "evaluations" / "test_split.jsonl").exists()
    assert "--checkpoint must not name another, got 'last'" in refusal(
        capsys, evaluate, checkpoint, "--checkpoint", "last"
    )
    (run / "loose.ckpt").write_bytes(checkpoint.read_bytes())
    assert "RUN must be a run's folder or a checkpoint in its checkpoints/" in refusal(
        capsys, evaluate, run / "loose.ckpt"
    )


@pytest.mark.parametrize("mode", ["chunk", "slide"])
def test_bytes_that_the_training_text_has_can_be_left_out(trained, tmp_path, mode):
    """Of bytes in no string of 5 that stands in the training split, by the losses of a whole evaluation's windows."""
    result = evaluated(tmp_path, trained, "--mode", mode, "--unseen", 5)
    train, val = TEXT[:3600], TEXT[3600:3800]
    seen = {i + j for i in range(len(val) - 4) if val[i : i + 5] in train for j in range(5)}
    new = [i not in seen for i in range(1, len(val))]  # byte 0 is not scored
    gpt, _ = load_model(trained)
    data = np.frombuffer(val, np.uint8)
    losses = {}
    batches = EvalBatches(data, 16, 1, 0, 1) if mode == "chunk" else SlidingBatches(data, 16, 8, 1)
    for window in range(len(batches)):
        inputs, targets = batches[window]
        nats = torch.nn.functional.cross_entropy(gpt(inputs).mT, targets, reduction="none")
        for place in range(16):
            if targets[0, place] != IGNORE_INDEX:
                losses[window * (16 if mode == "chunk" else 8) + place] = nats[0, place].item()
    expected = sum(losses[i] for i in range(199) if new[i]) / sum(new) / math.log(2)
    assert 20 < sum(new) < 199 and len(losses) == 199
    assert result["unseen"]["scored_bytes"] == sum(new) and result["unseen"]["string_bytes"] == 5
    assert result["unseen"]["bits_per_byte"] == pytest.approx(expected, abs=1e-5)
    assert list((trained / "evaluations").glob(f"*{mode}*-unseen5.json"))
    assert result["scored_bytes"] == 199 and "unseen" not in evaluated(tmp_path, trained, "--mode", mode)
    for first in range(20, 60, 3):  # strings of the whole split, however little of it is scored
        result = evaluated(tmp_path, trained, "--mode", mode, "--unseen", 5, "--max-bytes", first)
        assert result["unseen"]["scored_bytes"] == sum(new[: first - 1])


def test_every_look_at_the_test_split_is_logged_in_the_run(run, capsys, monkeypatch):
    line = [str(run), "--split", "test", "--mode", "chunk", "--device", "cpu"]
    assert evaluate.main(line) == 0
    assert "opened" not in capsys.readouterr().err
    assert evaluate.main([*line, "--seq-len", "8"]) == 0
    logged = [json.loads(one) for one in (run / "evaluations" / "test_split.jsonl").read_text().splitlines()]
    begun, chunk, begun_again, shorter = logged
    assert begun["time"] == chunk["time"] < begun_again["time"] == shorter["time"]  # two looks
    assert [(one["step"], one["split"], one["seq_len"]) for one in logged] == [(6, "test", length) for length in
                                                                               (16, 16, 8, 8)]  # fmt: skip
    assert begun["modes"] == [chunk["mode"]] == ["chunk"] and "bits_per_byte" not in begun
    assert chunk["bits_per_byte"] == pytest.approx(read_results(run).last("test/bpc"), abs=1e-6)
    said = f"the test split was opened once before, last on {chunk['time']}: chunk of step 6 had "
    assert said + f"{chunk['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().err
    assert evaluate.main(line) == 0
    assert f"opened 2 times before, last on {shorter['time']}" in capsys.readouterr().err
    monkeypatch.setattr(evaluate.os, "access", lambda path, _: run not in (path, *path.parents))
    monkeypatch.setattr(evaluate, "score_batches", None)
    assert "an evaluation on test is logged in the run's folder" in refusal(
        capsys, evaluate, *line, "--json", run.parent / "j"
    )


def test_a_look_at_test_is_logged_though_it_is_interrupted_or_its_pipe_closes(run, capsys, monkeypatch):
    line = [str(run), "--split", "test", "--max-bytes", "20", "--device", "cpu"]  # both modes
    log, score, calls = run / "evaluations" / "test_split.jsonl", evaluate.score_batches, []

    def interrupted_in(call):
        def scored(*arguments):
            calls.append(log.read_text())
            if len(calls) == call:
                raise KeyboardInterrupt
            return score(*arguments)

        calls.clear()
        monkeypatch.setattr(evaluate, "score_batches", scored)
        assert evaluate.main(line) == 130

    def modes():
        return [json.loads(one).get("mode") for one in log.read_text().splitlines()]

    interrupted_in(1)
    assert modes() == [None] and len(calls[0].splitlines()) == 1  # before the first byte is scored
    assert "opened" not in capsys.readouterr().err
    interrupted_in(2)
    assert modes() == [None, None, "chunk"]
    out, err = capsys.readouterr()
    assert "opened once before" in err and "step 6, which left no result" in err and "bits per byte" in out
    (kept,) = (run / "evaluations").glob("*.json")
    assert kept.name.endswith("-chunk.json")
    monkeypatch.setattr(evaluate, "score_batches", score)

    reading, writing = os.pipe()
    os.close(reading)
    kept.unlink()
    with open(writing, "w", closefd=True) as closed, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", closed)
        assert evaluate.main(line) == 141
    assert modes() == [None, None, "chunk", None, "chunk"] and kept.is_file()
    assert "opened 2 times before" in capsys.readouterr().err
    assert evaluate.main(line) == 0
    assert modes()[5:] == [None, "chunk", "slide-8"]
    assert "opened 3 times before, last on" in capsys.readouterr().err


def test_json_is_written_of_a_run_that_cannot_be_written_to(run, tmp_path, capsys):
    (run / "evaluations").write_text("")  # in place of rights, which an administrator always has
    line = [str(run), "--device", "cpu"]
    assert "with --json FILE, and without --plot, they go there" in refusal(capsys, evaluate, *line)
    path = tmp_path / "mine.json"
    assert "cannot be written: File exists" in refusal(capsys, evaluate, *line, "--json", path, "--plot")
    assert not path.exists()
    assert evaluate.main([*line, "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert f"cannot be written (File exists): results go to {path} alone" in err
    assert [result["mode"] for result in json.loads(path.read_text())] == ["chunk", "slide-8"]
    assert "result: " not in out and out.count("by context length") == 2


def test_a_number_that_cannot_be_kept_is_printed_and_in_the_json(run, tmp_path, capsys, monkeypatch):
    def full(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(evaluate, "write_text", full)
    path = tmp_path / "mine.json"
    assert evaluate.main([str(run), "--device", "cpu", "--json", str(path)]) == 2
    out, err = capsys.readouterr()
    assert "No space left on device" in err and f"{json.loads(path.read_text())[0]['bits_per_byte']:.6f}" in out


def test_the_log_of_the_test_split_counts_commands_and_outlives_a_cut_line(run, capsys):
    line = [str(run), "--split", "test", "--max-bytes", "20", "--device", "cpu"]  # both modes: two results a command
    log = run / "evaluations" / "test_split.jsonl"
    assert evaluate.main(line) == 0
    text = log.read_text()
    text = text.replace(json.loads(text.splitlines()[0])["time"], "2026-11-01T00:00:00+00:00")
    log.write_text(text[:-30])
    capsys.readouterr()
    assert evaluate.main(line) == 0
    error = capsys.readouterr().err
    assert f"line 3 of {log} is damaged\n" in error and "opened once before, last on 2026-11-01T" in error
    assert len(log.read_text().splitlines()) == 6  # what is new stands on lines of its own
    log.write_text("\n".join(['{"time": "2026-10', "[]", *text.splitlines()[1:]]))  # earlier versions had results alone
    assert evaluate.main(line) == 0
    error = capsys.readouterr().err
    assert error.count("is damaged, and is counted as one more time") == 2 and "opened 3 times before" in error


def test_evaluations_of_two_checkpoints_of_one_step_are_two_files(run, tmp_path, capsys):
    """Of steps that the run took back, and one from elsewhere, beside the run's own; and in another precision."""
    folder, line = run / "checkpoints", ["--device", "cpu", "--mode", "chunk"]
    (folder / "index.json").unlink()
    aside, elsewhere = folder / "before-resuming-at-3-step-6.ckpt", tmp_path / "elsewhere" / "step-6.ckpt"
    elsewhere.parent.mkdir()
    for path in (aside, elsewhere):
        shutil.copy(folder / "step-6.ckpt", path)
    own = "val-200bytes-step6-len16-chunk.json"
    for checkpoint in ("best", "last", folder / "step-6.ckpt"):
        assert evaluate.main([str(run), "--checkpoint", str(checkpoint), *line]) == 0
        assert [path.name for path in (run / "evaluations").iterdir()] == [own]
    assert evaluate.main([str(aside), *line]) == evaluate.main([str(run), "--checkpoint", str(elsewhere), *line]) == 0
    config = run / "config.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(config), {"trainer": {"precision": None}}), config)
    rows = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(rows.replace("memory/rss_gib", "memory/peak_allocated_gib"))  # as if on a GPU
    assert evaluate.main([str(run), *line]) == 0
    (run / "metrics.csv").unlink()
    assert evaluate.main([str(run), *line]) == 0
    place = hashlib.sha256(str(elsewhere).encode()).hexdigest()[:8]
    found = {path.name: json.loads(path.read_text())["checkpoint"] for path in (run / "evaluations").iterdir()}
    assert found == {
        own: str(folder / "step-6.ckpt"),
        "val-200bytes-step6-len16-before-resuming-at-3-step-6-chunk.json": str(aside),
        f"val-200bytes-step6-len16-step-6-{place}-chunk.json": str(elsewhere),
        "val-200bytes-step6-len16-32-true-chunk.json": str(folder / "best.ckpt"),
    }
    assert "warning" not in capsys.readouterr().err  # nothing was replaced by another number
    path = run / "evaluations" / own
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bits_per_byte": 1.5}))
    (run / "metrics.csv").write_text(rows)
    assert evaluate.main([str(run), *line]) == 0
    said = f"{path} had 1.500000 bits per byte, of {folder / 'step-6.ckpt'} on cpu, and now has "
    assert said in capsys.readouterr().err


def test_an_evaluation_is_of_the_step_whose_weights_it_read(run, tmp_path, monkeypatch):
    """The run goes on meanwhile, and its best checkpoint becomes another."""
    folder = run / "checkpoints"
    expected = evaluated(tmp_path, folder / "step-3.ckpt")
    (folder / "index.json").unlink()
    shutil.copy(folder / "step-3.ckpt", folder / "best.ckpt")
    text_of = evaluate.text_of

    def meanwhile(*arguments):
        shutil.copy(folder / "step-6.ckpt", folder / "new.ckpt")
        (folder / "new.ckpt").replace(folder / "best.ckpt")
        return text_of(*arguments)

    monkeypatch.setattr(evaluate, "text_of", meanwhile)
    result = evaluated(tmp_path, run)
    assert (result["step"], result["bits_per_byte"]) == (3, expected["bits_per_byte"])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zip"])
def test_any_file_is_a_second_text(run, tmp_path, suffix, capsys):
    content = TEXT[:90][::-1]
    path = tmp_path / f"second text{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("text", content)
    else:
        path.write_bytes(gzip.compress(content) if suffix else content)
    result = evaluated(tmp_path, run, "--text", path)
    assert (result["corpus"], result["split"], result["scored_bytes"]) == (path.name, "text", 89)
    assert result["sha256"] == hashlib.sha256(content).hexdigest()
    gpt, _ = load_model(run)
    score = score_batches(gpt, EvalBatches(np.frombuffer(content, np.uint8), 16, 2, 0, 1), 16)
    assert result["bits_per_byte"] == pytest.approx(score.bits_per_byte, abs=1e-6)
    (kept,) = (run / "evaluations").iterdir()
    assert kept.name == f"second-text{suffix}-{result['sha256'][:8]}-90bytes-step6-len16-chunk.json"
    (run / "run.json").unlink()  # of a copy that somebody was sent
    assert evaluated(tmp_path, run, "--text", path)["bits_per_byte"] == result["bits_per_byte"]
    (tmp_path / "short").write_bytes(b"a")
    assert "--text must have at least 2 bytes, got 1 in" in refusal(capsys, evaluate, run, "--text", tmp_path / "short")


def test_evaluations_that_are_kept_with_the_results_have_the_names_of_ordinary_ones():
    paths = sorted(RESULTS.glob("**/evaluations/*.json"))
    assert len(paths) > 10
    for path in paths:
        run, result = path.parents[1], json.loads(path.read_text())
        checkpoint = run / "checkpoints" / Path(result["checkpoint"]).name
        trained_in = evaluate.trained_precision(run)
        of_unseen = f"-unseen{result['unseen']['string_bytes']}" if "unseen" in result else ""
        name = evaluate.name_of(result, run, checkpoint, trained_in)
        assert (trained_in, f"{name}-{result['mode']}{of_unseen}") == ("bf16-mixed", path.stem)


def test_evaluate_refuses_another_corpus(run, tmp_path, capsys):
    recorded = json.loads((run / "run.json").read_text())["corpus"]["sha256"]
    (tmp_path / "text").write_bytes(TEXT[::-1])
    found = hashlib.sha256(TEXT[::-1]).hexdigest()
    moved = variant(run, "moved", config={"data": {"path": str(tmp_path / "text")}})
    assert f"now has SHA-256 {found}, the run records {recorded}" in refusal(capsys, evaluate, moved)
    absent = variant(run, "absent", config={"data": {"path": str(tmp_path / "absent")}})
    assert "corpus cannot be rebuilt" in refusal(capsys, evaluate, absent)
    assert "does not record its corpus" in refusal(capsys, evaluate, variant(run, "early", corpus={}))


def test_help_names_the_command(capsys):
    for script in (compare, generate, evaluate):
        assert script.main(["--help"]) == 0
        assert f"python -m {script.__name__}" in capsys.readouterr().out
