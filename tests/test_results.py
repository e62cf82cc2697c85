"""The tables of windows, packed sequences, padding, distances, biases and trained arms say what made-up reports say."""

import json
from dataclasses import asdict

import pytest
from omegaconf import OmegaConf

from models.training.report import read_results
from scripts import plot_rows, results
from scripts.comparisons import at_best_rates, comparisons_of
from scripts.contenders import Case

OF_A_TEXT = {"sha256": "ab" * 32, "bytes": 999}
NO_NORM, NORM = "FlashAttention-4, no norm", "compiled l2norm + FlashAttention-4"


def row(name, forward, both, backward=None, **changes):
    problem = Case(**{**dict(batch=2, heads=16, kv_heads=16, seq_len=1000, head_dim=128, dtype="bfloat16", causal=True,
                             mask_prob=0.0, bias=False), **changes})  # fmt: skip
    times = {"forward_ms": forward, "both_ms": both, **({} if backward is None else {"backward_ms": backward})}
    return {**asdict(problem), "contender": name, **times}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """files(name=rows, ...) are reports of these rows."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def write(**reports):
        for name, rows in reports.items():
            (tmp_path / name).write_text(json.dumps({"rows": rows}))

    return write


def test_windows(files):
    window = {"window": (99, 0)}
    files(
        one=[row("ours (auto)", 0.2, 0.8, **window), row(NO_NORM, 0.3, 0.72, **window), row(NORM, 0.4, 1.0, **window)],
        two=[row("ours (auto)", 0.25, 1.0, **window), row("flex_attention, no norm", 0.5, 1.5, **window)],
        full=[row("ours (auto)", 0.5, 2.0, seq_len=2048, batch=8)],
    )
    pairs = 1000 * 100 - 99 * 100 // 2  # query 0 sees 1 key, query 99 and those behind it 100
    flops = 4 * 2 * 16 * 128 * pairs
    forward, both = (f"({share * flops / seconds / 1e12:.0f})" for share, seconds in ((1, 0.2e-3), (3.5, 0.8e-3)))
    lines = results.windows("one", "two", "full").splitlines()
    assert lines[0] == (
        "| head dim | seq_len | window | forward | FlashAttention-4 | compiled l2norm + FlashAttention-4 | "
        "flex_attention | forward + backward | FlashAttention-4 | compiled l2norm + FlashAttention-4 | flex_attention |"
    )
    assert lines[2] == (
        f"| 128 | 2 x 1000 | (99, 0) | **0.200** {forward} | 1.50x | 2.00x | 2.00x | "
        f"**0.800** {both} | 0.90x | 1.25x | 1.50x |"
    )
    assert lines[3].startswith("| 128 | 8 x 2048 | causal | **0.500** (") and lines[3].endswith(") | - | - | - |")
    assert len(lines) == 4


def test_trained_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for attention, scale, window, lr, speed, loss in (
        *(("regular", None, 16, 0.002, 150.0, 2.5), ("regular", None, None, 0.002, 100.0, 2.0)),
        *(("cosine", 12.0, None, 0.002, 120.0, 1.75), ("cosine", 12.0, 16, 0.002, 240.0, 1.5)),
        *(("cosine", 12.0, None, 0.004, 110.0, 3.0), ("cosine", 8.0, None, 0.002, 130.0, 1.25)),
    ):
        folder = tmp_path / "runs" / f"{attention}-{scale}-{window}-{lr}"
        folder.mkdir(parents=True)
        settings = {"kind": attention, **({"scale": scale} if scale else {})}
        settings |= {"window": window, "window_pattern": window and "SL"}
        configuration = {"seq_len": 64, "lr": lr, "seed": 0, "attention": settings, "norm": {"kind": "pre"}}
        OmegaConf.save(configuration, folder / "config.yaml")
        choices = {"attention": attention, "norm": "pre"}
        (folder / "run.json").write_text(json.dumps({"status": "finished", "choices": choices}))
        columns = "step,throughput/tokens_per_s,memory/peak_allocated_gib,val/bpc"
        (folder / "metrics.csv").write_text(f"{columns}\n5,{speed},1.5,{loss}\n")
    with pytest.raises(ValueError, match="alone, got others in runs"):  # two scales
        results.trained_windows("runs")
    lines = results.trained_windows("runs", "attention.scale=-,12").splitlines()
    assert lines[0] == (
        "| seq_len | attention | window | peak lr | n | val bpc | tokens/s | speed of full | peak GiB |"
    )
    assert lines[2:] == [  # of 0.004 there is no run with windows
        "| 64 | cosine | full | 0.002 | 1 | 1.7500 | 120 | 1.00x | 1.50 |",
        "| 64 | cosine | 16 SL | 0.002 | 1 | 1.5000 | 240 | 2.00x | 1.50 |",
        "| 64 | regular | full | 0.002 | 1 | 2.0000 | 100 | 1.00x | 1.50 |",
        "| 64 | regular | 16 SL | 0.002 | 1 | 2.5000 | 150 | 1.50x | 1.50 |",
    ]
    lines = results.learning_rates("runs", "64").splitlines()
    assert lines[0] == "| attention | norm | scale | window | window_pattern | 0.002 | 0.004 |"
    assert lines[2:] == [  # none first, then numbers in their order
        "| cosine | pre | 8 | null | null | **1.2500** |  |",
        "| cosine | pre | 12 | null | null | **1.7500** | 3.0000 |",
        "| cosine | pre | 12 | 16 | SL | **1.5000** |  |",
        "| regular | pre | - | null | null | **2.0000** |  |",
        "| regular | pre | - | 16 | SL | **2.5000** |  |",
    ]
    assert len(results.learning_rates("runs", "64", "attention.window=null").splitlines()) == 2 + 3


def test_experiments_that_were_run_and_that_were_not(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    entries = {"status": "finished", "tokens_per_step": 1_000_000}
    for folder, seed, experiment, more, columns, values in (
        ("runs", 0, "long", {"wall_seconds": 90.0}, "val/bpc,test/bpc", "1.5,1.75"),
        ("runs", 1, "long", {}, "val/bpc,test/bpc", "2.5,"),
        ("timed", 0, "ten", {}, "val/bpc,train/seconds", "0.5,600.25"),
        ("timed", 0, None, {}, "val/bpc,test/bpc", "0.1,0.1"),
        ("timed", 0, "other", {}, "val/bpc,test/bpc", "0.1,0.1"),
    ):
        path = tmp_path / folder / f"{experiment}-{seed}"
        path.mkdir(parents=True)
        OmegaConf.save({"seq_len": 64, "lr": 0.002, "seed": seed}, path / "config.yaml")
        (path / "run.json").write_text(json.dumps({**entries, **more, "choices": {"experiment": experiment}}))
        rows = [f"step,throughput/tokens_per_s,memory/peak_allocated_gib,{columns}", f"3,50000,1.5,{values}"]
        (path / "metrics.csv").write_text("\n".join([*rows, ""]))
    assert results.experiments("runs,timed", "never", "long", "ten").splitlines() == [
        "| experiment | n | MB | minutes of training | of the whole run | tokens/s | peak GiB | val bpc | test bpc |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| never |  |  |  |  |  |  |  |  |",
        "| long | 2 | 3 ± 0 | 1.0 ± 0.0 | 1.5 | 50,000 ± 0 | 1.50 ± 0.00 | 2.0000 ± 0.7071 | 1.7500 |",
        "| ten | 1 | 3 | 10.0 | - | 50,000 | 1.50 | 0.5000 | - |",
    ]
    OmegaConf.save({"seq_len": 64, "lr": 0.004, "seed": 1}, tmp_path / "runs" / "long-1" / "config.yaml")
    results._runs.cache_clear()
    with pytest.raises(ValueError, match="of experiment=long in runs,timed must differ in nothing but .* differ in lr"):
        results.experiments("runs,timed", "long")


def test_recipes_that_trained_for_as_long(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name, seed, steps, loss, slid in (
        *(("plain", 0, 1000, 1.0, 0.95), ("plain", 1, 1010, 1.5, 1.05)),
        *(("better", 0, 400, 0.875, None), ("best", 0, 300, 0.5, 0.4), ("lost", 0, 10, None, None)),
    ):
        folder = tmp_path / "ten" / f"{name}-seed{seed}"
        folder.mkdir(parents=True)
        OmegaConf.save({"seq_len": 64, "lr": 0.002, "seed": seed}, folder / "config.yaml")
        status = "finished" if loss else "diverged"
        (folder / "run.json").write_text(json.dumps({"status": status, "tokens_per_step": 100000}))
        columns = "step,throughput/tokens_per_s,memory/peak_allocated_gib,val/bpc"
        (folder / "metrics.csv").write_text(f"{columns}\n{steps},1000,1.5,{loss or ''}\n")
        if slid:
            (folder / "evaluations").mkdir()
            for split, mode, bits in (
                ("val", "slide-512", slid),
                ("val", "chunk", 9.0),
                ("text", "slide-512", 2 * slid),
            ):
                octaves = [(1, 8, 3.0), (9, 16, 2.0), (17, 32, 1 + seed), (33, 64, slid)][: 3 if name == "best" else 4]
                keys = "shortest", "longest", "bits_per_byte"
                curve = [dict(zip(keys, octave, strict=True)) for octave in octaves]
                values = {"split": split, "mode": mode, "bits_per_byte": bits, "by_context": curve, **OF_A_TEXT}
                if name == "best":
                    values["unseen"] = {"string_bytes": 48, "bits_per_byte": 3 * slid}
                (folder / "evaluations" / f"{split}-{mode}.json").write_text(json.dumps(values))
    lines = results.timed("ten", "plain").splitlines()
    assert lines[0] == (
        "| recipe | n | steps | MB | val bpc | of plain | val, sliding | in no string of 48 of train "
        "| second text, sliding | tokens/s | peak GiB |"
    )
    assert lines[2:] == [
        "| plain | 2 | 1,005 | 100 | 1.2500 ± 0.3536 | 1.000 | 1.0000 ± 0.0707 | - | 2.0000 ± 0.1414 | 1,000 ± 0 "
        "| 1.50 ± 0.00 |",
        "| best | 1 | 300 | 30 | 0.5000 | 0.400 | 0.4000 | 1.2000 | 0.8000 | 1,000 | 1.50 |",
        "| better | 1 | 400 | 40 | 0.8750 | 0.700 | - | - | - | 1,000 | 1.50 |",
        "| lost | 0, 1 diverged | - | - | - | - | - | - | - | - | - |",
    ]
    assert results.by_context("ten", "17").splitlines() == [
        "| recipe | 17 to 32 | 33 to 64 |",
        "| --- | ---: | ---: |",
        "| best | 1.0000 | - |",
        "| plain | 1.5000 ± 0.7071 | 1.0000 ± 0.0707 |",
    ]
    with pytest.raises(ValueError, match="shortest must be a number of bytes, got 'x'"):
        results.by_context("ten", "x")
    with pytest.raises(ValueError, match="the baseline must be one of best, better, lost, plain, got other"):
        results.timed("ten", "other")
    path = tmp_path / "ten" / "plain-seed0" / "evaluations" / "val-slide-512.json"
    kept = path.read_text()
    path.write_text(json.dumps({**json.loads(kept), "unseen": {"string_bytes": 100, "bits_per_byte": 1.0}}))
    with pytest.raises(ValueError, match="strings of one length, got 48, 100"):
        results.timed("ten", "plain")
    path.write_text(kept)
    for change, other in (
        ({"mode": "slide-256"}, "slide-256 on 999 bytes of abababab"),
        ({"bytes": 1000}, "slide-512 on 1,000 bytes of abababab"),
        ({"sha256": "cd" * 32}, "slide-512 on 999 bytes of cdcdcdcd"),
    ):
        path.write_text(json.dumps({**json.loads(kept), **change}))
        with pytest.raises(ValueError, match="evaluations of val in ten must be alike, got .*" + other):
            results.timed("ten", "plain")
    path.write_text(kept)
    path.unlink()
    assert "| 1.0500 (1) | - | 2.0000 ± 0.1414 |" in results.timed("ten", "plain").splitlines()[2]
    path.write_text(kept)
    again = json.dumps({"split": "val", "mode": "slide-256", "bits_per_byte": 0.5, **OF_A_TEXT})
    (tmp_path / "ten" / "best-seed0" / "evaluations" / "again.json").write_text(again)
    with pytest.raises(ValueError, match="one evaluation of val by sliding windows, got 2: best-seed0"):
        results.timed("ten", "plain")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """trained(folder, attention, loss, ...) is a run that logged five times: its last loss, then 1 more each before."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def make(under, attention, loss, *, lr=0.001, seed=0, norm="pre", logit=2.0, status="finished", record=None,
             again="", **own):  # fmt: skip
        learned = {"learned_scale": True} if attention == "cosine" else {}
        configuration = {"seq_len": 64, "lr": lr, "seed": seed, "optimizer": {"kind": "adamw", "warmup_steps": 1}}
        configuration |= {"attention": {"kind": "any", **own, **learned}, "norm": {"kind": norm}}
        configuration |= {"model": {"kind": "gpt", "num_layers": 2}}
        name = f"{attention}-{norm}-{lr}-{seed}" + "".join(f"-{key}{value}" for key, value in own.items()) + again
        folder = tmp_path / under / name
        folder.mkdir(parents=True)
        OmegaConf.save(configuration, folder / "config.yaml")
        choices = {"attention": attention, "norm": norm}
        kept = {"status": status, "choices": choices, "tokens_per_step": 1000000} | (record or {})
        (folder / "run.json").write_text(json.dumps(kept))
        lines = ["step,train/bpc,train/grad_norm,throughput/tokens_per_s,memory/peak_allocated_gib,val/bpc,logit/max,"
                 "scale/mean,scale/min,scale/max,scale/layer0/mean,scale/layer1/mean"]  # fmt: skip
        for step in range(1, 6):
            ends = f"{loss},{logit},9,{8 - seed},{10 + seed},8.5,9.5" if step == 5 else ",,,,,,"
            lines.append(f"{step},{loss + 5 - step},{9 / step},500000,1.5,{ends}")
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
        return name

    return make


def test_arms_of_several_folders_and_their_differences(trained):
    for seed, more in ((0, 0.0), (1, 0.25)):
        trained("a", "cosine_fixed", 1.0 + more, seed=seed, scale=10.0)
        trained("b", "cosine_fixed", 1.5 + 2 * more, seed=seed, scale=8.0)
    trained("b", "cosine_fixed", 0.5, scale=8.0, lr=0.002)  # of one seed: others have two
    trained("b", "cosine_fixed", 9.0, scale=8.0, norm="post")
    base = trained("b", "regular", 2.0)
    lines = results.comparison("a,b", "norm=pre").splitlines()
    assert lines[0] == "| seq_len | attention | norm | scale | peak lr | n | val bpc | tokens/s | peak GiB |"
    assert lines[2:] == [
        "| 64 | cosine_fixed | pre | 8 | 0.001 | 2 | 1.7500 ± 0.3536 | 500,000 ± 0 | 1.50 ± 0.00 |",
        "| 64 | cosine_fixed | pre | 10 | 0.001 | 2 | **1.1250 ± 0.1768** | 500,000 ± 0 | 1.50 ± 0.00 |",
        "| 64 | regular | pre | - | 0.001 | 1 | 2.0000 | 500,000 | 1.50 |",
    ]
    lines = results.differences("a,b", f"{base},cosine_fixed-pre-0.001-0-scale10.0", "norm=pre").splitlines()
    assert lines[:2] == [
        "| attention | norm | scale | peak lr | minus regular | minus cosine_fixed scale=10 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    assert lines[2:] == [
        "| cosine_fixed | pre | 8 | 0.001 | -0.2500 (2, 1) | +0.6250 ± 0.1768 (2) |",
        "| cosine_fixed | pre | 10 | 0.001 | -0.8750 (2, 1) |  |",
        "| regular | pre | - | 0.001 |  | +0.8750 (1, 2) |",
    ]
    with pytest.raises(ValueError, match="a baseline must be a run of an arm at its learning rate, got 'nobody'"):
        results.differences("a,b", "nobody")
    assert results.learning_rates("a,b", "64", "norm=pre", "attention.scale=8").splitlines() == [
        "| attention | norm | 0.001 | 0.002 |",
        "| --- | --- | ---: | ---: |",
        "| cosine_fixed | pre | 1.5000 | **0.5000** |",
    ]


def test_a_table_is_of_one_corpus_whatever_its_file_is_called(trained):
    book = {"name": "book", "sha256": "ab" * 32, "val_scored": 999, "train_bytes": 5000}
    for seed, name in enumerate(("book", "book.gz")):
        trained("a", "regular", 1.0 + seed, seed=seed, record={"corpus": book | {"name": name}})
    assert results.comparison("a").splitlines()[2:] == [
        "| 64 | regular | pre | 0.001 | 2 | **1.5000 ± 0.7071** | 500,000 ± 0 | 1.50 ± 0.00 |"
    ]
    for lr, size in ((0.001, 5000), (0.002, 4000)):
        trained("b", "cosine", 0.5, lr=lr, record={"corpus": book | {"train_bytes": size}})
    assert results.comparison("a,b", "lr=0.001").count("| 64 |") == 2
    with pytest.raises(ValueError, match="one comparison, got a,b with bytes of the training split: 5,000; bytes of"):
        results.comparison("a,b")
    with pytest.raises(ValueError, match="of one comparison, got b with"):
        results.timed("b", "cosine-pre-0.001-0")


def test_sensitivity_and_stability(trained):
    for lr, loss, logit in ((0.001, 1.5, 3.0), (0.002, 1.0, 5.0), (0.004, 1.25, 1234.5)):
        trained("a", "regular", loss, lr=lr, logit=logit)
    trained("a", "regular", 0.1, lr=0.008, status="diverged")
    trained("a", "regular", 0.1, lr=0.002, seed=1)  # another seed takes no part
    assert results.sensitivity("a", "64").splitlines() == [
        "| attention | norm | rates | best rate | lowest val bpc | mean above it | at twice the rate | at four times |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| regular | pre | 3, 1 diverged | 0.002 | 1.0000 | 0.250 | 0.250 | - |",
    ]
    trained("lost", "regular", 0.1, status="diverged")
    assert results.sensitivity("lost", "64").splitlines()[2] == "| regular | pre | 0, 1 diverged | - | - | - | - | - |"
    assert results.stability("a", "64").splitlines()[::2] == [
        "| attention | norm | 0.001 | 0.002 | 0.004 | 0.008 | gradient norm |",
        "| regular | pre | 3.0 | 5.0 | 1,234.5 | 2.0 | 4.50 |",  # of step 1, in the warm-up, it is 9
    ]
    for lr in (0.001, 0.002):
        name = trained("c", "regular", 1.5, lr=lr)
    path = results.RESULTS / "c" / name / "metrics.csv"
    path.write_text(path.read_text().replace(",1.8,", ",nan,"))  # the gradient of its last step
    assert results.stability("c", "64").splitlines()[2] == "| regular | pre | 2.0 | 2.0 | nan |"
    path = results.RESULTS / "early" / trained("early", "regular", 0.1, status="diverged") / "metrics.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")  # before its first validation
    assert results.stability("early", "64").splitlines()[2] == "| regular | pre | - | - |"


@pytest.mark.parametrize(("status", "loss"), [("diverged", 1.0), ("finished", float("nan"))])
def test_a_rate_at_which_most_seeds_diverged_is_nobodys_best(trained, status, loss):
    for seed in (0, 1, 2):
        trained("a", "regular", 1.5, lr=0.002, seed=seed)
        trained("a", "regular", loss if seed else 1.0, lr=0.004, seed=seed, status=status if seed else "finished")
    assert results.comparison("a").splitlines()[2:] == [
        "| 64 | regular | pre | 0.002 | 3 | **1.5000 ± 0.0000** | 500,000 ± 0 | 1.50 ± 0.00 |"
    ]
    (one,) = comparisons_of([read_results(folder) for folder in sorted((results.RESULTS / "a").iterdir())])
    ((best, rates),) = at_best_rates(one.arms)
    assert best.settings["lr"] == 0.002 and rates == 2  # scripts.compare says the same


def test_of_a_seed_that_ran_twice_the_run_that_finished_counts(trained):
    for number, (status, loss) in enumerate((("finished", 1.5), ("interrupted", 2.0), ("failed", 2.5))):
        record = {"started": f"2026-01-0{3 - number}T00:00:00+00:00"}
        trained("ended", "regular", loss, status=status, record=record, again=f"-{number}")
        if status != "finished":
            trained("open", "regular", loss, status=status, record=record, again=f"-{number}")
    assert results.learning_rates("ended", "64").splitlines()[2] == "| regular | pre | **1.5000** |"
    assert (
        results.learning_rates("open", "64").splitlines()[2] == "| regular | pre | interrupted |"
    )  # the last to start


def test_learned_scales_and_when_a_loss_was_reached(trained):
    trained("lost", "cosine", 1.0, status="diverged")
    assert results.scales("lost").splitlines()[2] == "| cosine | pre | 0.001 | 0, 1 diverged | - | - | - | - | - |"
    for seed, loss in ((0, 1.0), (1, 2.0)):
        trained("a", "cosine", loss, seed=seed)
    trained("a", "regular", 2.0)
    assert results.scales("a").splitlines()[::2] == [
        "| attention | norm | peak lr | n | mean | lowest | highest | layer 0 | layer 1 |",
        "| cosine | pre | 0.001 | 2 | 9.0 | 7.0 | 11.0 | 8.5 | 9.5 |",
    ]
    # the mean of the last four of five losses, 4 3 2 1 more than the last one, is 1.5 above it, of the first four 2.5
    for bpc, cosine, regular in (
        *(("3.5", "2 of 2 | 4.5 ± 0.7 | 9.0 ± 1.4", "1 of 1 | 5.0 | 10.0"),),
        *(("2.5", "1 of 2 | 5.0 | 10.0", "0 of 1 | - | -"),),
    ):
        assert results.reached("a", bpc).splitlines()[2:] == [
            f"| cosine | pre | 0.001 | {cosine} |",
            f"| regular | pre | 0.001 | {regular} |",
        ]


def test_packed(files):
    lists = [(600, 400), (10, 990), (1000,)]
    several = [
        row(name, forward, both, batch=1, lengths=lengths)
        for lengths, ours, other in zip(lists, (1.0, 2.0, 4.0), (1.1, 1.8, 4.8), strict=True)
        for name, forward, both in (("ours (auto)", ours, 3 * ours), (NO_NORM, other, 6 * other))
    ]
    equal = [
        row(name, forward, 2.0, batch=1, lengths=(500, 500), causal=False)
        for name, forward in (("ours (auto)", 1.0), ("ours (auto), as a batch", 0.97), ("varlen_attn, no norm", 1.5))
    ]
    files(
        several=several, equal=equal, unequal=[several[0], row("ours (auto)", 1, 1, batch=1, lengths=(9,), seq_len=9)]
    )
    lines = results.packed("equal", "several").splitlines()
    names = "as a batch | FlashAttention-4 | varlen_attn"
    assert lines[0] == f"| head dim | lengths |  | forward, ms | {names} | forward + backward, ms | {names} |"
    assert lines[2:] == [
        "| 128 | 2 x 500 | dense | 1.000 | 0.97x | - | 1.50x | 2.000 | 1.00x | - | 1.00x |",
        "| 128 | 3 lists, each of 1,000 tokens | causal | 2.000 | - | 1.10x (0.90x) | - | 6.000 | - | 2.20x (1.80x) | "
        "- |",
    ]
    assert "| 2 lists, of 9 to 1,000 tokens |" in results.packed("unequal")


def test_padding(files):
    masked = {"padding": ("last", 0.25)}
    files(
        dense=[row("ours (auto)", 0.8, 2.0, 1.5, causal=False, **masked),
               row("ours (auto), unmasked", 1.0, 2.5, 1.8, causal=False)],
        causal=[row("ours (auto)", 0.5, 2.0, **masked), row("ours (auto), unmasked", 0.45, 1.9)],
    )  # fmt: skip
    lines = results.padding("dense", "causal").splitlines()
    assert lines[0] == (
        "| head dim | seq_len |  | hidden keys | visible pairs | forward, ms | without mask | backward, ms | "
        "without mask | forward + backward, ms | without mask |"
    )
    assert lines[2:] == [
        "| 128 | 2 x 1000 | dense | last 25% | 75% | 0.800 | 1.25x | 1.500 | 1.20x | 2.000 | 1.25x |",
        "| 128 | 2 x 1000 | causal | last 25% | 94% | 0.500 | 0.90x | - | - | 2.000 | 0.95x |",
    ]


def test_distances(files):
    def rows(added, ours, **others):
        yield {**row("ours (auto)", *ours[:2], by_distance=added), "peak_mib": ours[2]}
        yield {**row("ours (auto), without it", 0.8, 3.0), "peak_mib": 388.0}
        yield {**row("ours (auto), a dense bias", 20.0, 1600.0, by_distance=added), "peak_mib": 9092.4}
        yield from (row(f"{name}, no norm", *times, by_distance=added) for name, times in others.items())

    files(
        table=list(rows("table", (1.0, 4.0, 390.1))),
        alibi=list(rows("alibi", (0.8, 3.0, 389.0), flex_attention=(2.0, 6.0))),
    )
    lines = results.distances("table", "alibi").splitlines()
    names = "without it | a dense bias | compiled l2norm + flex_attention | flex_attention"
    assert lines[0] == (
        f"| head dim | seq_len |  | added | forward, ms | {names} | forward + backward, ms | {names} | peak MiB | "
        "without it | a dense bias |"
    )
    assert lines[2:] == [
        "| 128 | 2 x 1000 | causal | distance_bias | 1.000 | 0.80x | 20.00x | - | - | 4.000 | 0.75x | 400.00x | - | - "
        "| 390 | 388 | 9,092 |",
        "| 128 | 2 x 1000 | causal | ALiBi | 0.800 | 1.00x | 25.00x | - | 2.50x | 3.000 | 1.00x | 533.33x | - | 2.00x "
        "| 389 | 388 | 9,092 |",
    ]


def test_bias(files):
    def rows(bias, **times):
        for name, (forward, backward, memory) in times.items():
            name = {"ours": results.OURS, "norm": results.NORM_EFFICIENT, "plain": results.EFFICIENT}[name]
            yield {**row(name, forward, forward + backward, backward, bias=bias), "peak_mib": memory}

    files(
        with_it=list(rows(True, ours=(2.0, 6.0, 514.2), norm=(1.5, 9.0, 1604.0), plain=(1.0, 3.0, 1474.0))),
        without=list(rows(False, ours=(0.25, 0.75, 386.0), norm=(1.0, 3.0, 580.0), plain=(0.9, 2.0, 450.0))),
    )
    lines = results.bias("with_it", "without").splitlines()
    names = "without it | l2norm + SDPA efficient | SDPA efficient"
    assert lines[0] == (
        f"| head dim | seq_len |  | forward, ms | {names} | backward, ms | {names} | "
        f"forward + backward, ms | {names} | peak MiB | {names} |"
    )
    assert lines[2:] == [
        "| 128 | 2 x 1000 | causal | 2.000 | 0.250 | 0.75x | 0.50x | 6.000 | 0.750 | 1.50x | 0.50x | "
        "8.000 | 1.000 | 1.31x | 0.50x | 514 | 386 | 1,604 | 1,474 |"
    ]


def test_bias_backends(files):
    def rows(causal, **times):
        for name, (forward, backward, memory) in times.items():
            row_of = row(f"ours ({name})", forward, forward + backward, backward, bias=True, causal=causal)
            yield {**row_of, "peak_mib": memory}

    files(
        dense=list(rows(False, cuda=(2.0, 6.0, 514.2), sdpa=(1.5, 9.0, 1604.0))),
        causal=list(rows(True, cuda=(1.0, 3.0, 514.2), sdpa=(1.25, 7.5, 1474.0))),
    )
    assert results.bias_backends("dense", "causal").splitlines() == [
        "| head dim | seq_len |  | forward, ms | sdpa | backward, ms | sdpa | forward + backward, ms | sdpa | peak MiB "
        "| sdpa |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 128 | 2 x 1000 | dense | 2.000 | 0.75x | 6.000 | 1.50x | 8.000 | 1.31x | 514 | 1,604 |",
        "| 128 | 2 x 1000 | causal | 1.000 | 1.25x | 3.000 | 2.50x | 4.000 | 2.19x | 514 | 1,474 |",
    ]


def test_qk_norm(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    sizes = {"batch": 2, "seq_len": 8, "heads": 4, "kv_heads": 4, "head_dim": 128, "lengths": None}

    def model(name, eager, region, mine=0.003, other=0.004, **changes):
        pairs = {
            mode: {"fastest": f"norms + {fastest}", "ours_ms": 2.0, "theirs_ms": 2 * ratio, "ratio": ratio}
            for mode, fastest, ratio in (("eager", "slow", eager), ("region", "fast", region))
            if ratio is not None
        }
        rows = [{"contender": "ours (auto)", "errors": {"o": mine, "dq": 0.005, "dk": 0.005, "dv": 0.004}}]
        rows.append({"contender": "norms + slow", "errors": {"o": other, "dq": 0.005, "dk": 0.006, "dv": 0.004}})
        return {"name": name, **sizes, **changes, "rows": rows, "ratios": pairs}

    (tmp_path / "qk").mkdir()
    models = [
        model("a", 1.5, 1.04),
        model("b", 1.26, 1.046, mine=0.0045, kv_heads=2, lengths=[5, 5, 5]),
        model("c", 1.6, None, head_dim=64),
    ]
    report = {"models": models, "started": "2026-11-29T11:00:00", "git_commit": "0123456789"}
    (tmp_path / "qk" / "qk.json").write_text(json.dumps(report))
    aim = {"what": "norms", "case": "all", "modes": ["eager"], "head_dims": [64, 128], "at_least": 1.4}
    aims = [aim | {"files": ["qk/qk.json"]}, aim | {"files": ["other/qk.json"], "at_least": 9.0}]
    aims.append(aims[0] | {"case": "128", "modes": ["region"], "head_dims": [128], "at_least": 1.05})
    aims.append(aims[0] | {"case": "64", "modes": ["region"], "head_dims": [64], "at_least": 1.1})
    (tmp_path / "aims.json").write_text(json.dumps(aims))
    lines = results.qk_norm("qk/qk.json", "aims.json").splitlines()
    assert lines[2:] == [
        "| a | 2 x 8 | 4 | 128 | slow / fast | 2.000 | 3.000 | 1.50x | 2.000 | 2.080 | 1.04x, 1 % short |",
        "| b | 3 x 5 | 4/2 | 128 | slow / fast | 2.000 | 2.520 | 1.26x, 10 % short | 2.000 | 2.092 | 1.05x |",
        "| c | 2 x 8 | 4 | 64 | slow | 2.000 | 3.200 | 1.60x | - | - | - |",
    ]
    assert results.aims("aims.json", "qk").splitlines()[2:] == [
        "| norms | all | 1.40 | met in 2 of 3, 10 % short | 1.26 to 1.60 | 2026-11-29 `0123456` |",
        "| norms | 128 | 1.05 | met in 1 of 2, 1 % short | 1.04, 1.05 | 2026-11-29 `0123456` |",
        "| norms | 64 | 1.10 | missed, 100 % short | 0.00 | 2026-11-29 `0123456` |",  # what has no ratio is no success
    ]
    assert results.qk_norm_errors("qk/qk.json").splitlines()[2:4] == [
        "| a | 3.00 / 4.00 | 5.00 / 5.00 | 5.00 / 6.00 | 4.00 / 4.00 | - |",
        "| b | **4.50** / 4.00 | 5.00 / 5.00 | 5.00 / 6.00 | 4.00 / 4.00 | - |",
    ]


def test_the_others_behind_the_models_norms(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def model(*times):
        names = ("ours (auto)", "norms + SDPA cudnn", "norms + FlashAttention-4")
        rows = [{"contender": n, "eager_ms": e, "region_ms": r} for n, e, r in zip(names, *times, strict=False)]
        return {"rows": rows}

    # The last was timed eager alone, as with --only-eager, and says nothing of what is compared.
    models = [model((2, 6, 4), (2, 3, 2)), model((2, 3, 2), (2, 2.2, 2)), model((2, 9, 9), (None, None, None))]
    (tmp_path / "qk.json").write_text(json.dumps({"models": models}))
    assert results.qk_norm_others("qk.json").splitlines()[2:] == [
        "| SDPA cudnn | 2 | 1.50 | 1.50, 1.10 | 3.00, 1.50 | 1.50, 1.10 |",
        "| FlashAttention-4 | 2 | 1.00 | 1.00 | 2.00, 1.00 | 1.00 |",
    ]


def test_an_aim_of_three_digits_is_compared_as_the_table_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    report = {"started": "2026-11-29T11:00:00", "git_commit": "0123456789"}
    aim = {"what": "a", "case": "b", "key": "forward_ms", "over": NO_NORM, "seq_lens": [1000], "files": ["x/r.json"]}
    (tmp_path / "aims.json").write_text(json.dumps([aim | {"at_least": 0.833}]))
    (tmp_path / "x").mkdir()
    for other, verdict in ((0.834, "met | 0.83"), (0.82, "missed, 1 % short | 0.82")):
        rows = [row("ours (auto)", 1.0, 1.0), row(NO_NORM, other, 1.0)]
        (tmp_path / "x" / "r.json").write_text(json.dumps(report | {"rows": rows}))
        assert results.aims("aims.json").splitlines()[2].startswith(f"| a | b | 0.83 | {verdict} | [x]")


def test_documents_can_have_these_tables():
    assert {
        "windows",
        "trained_windows",
        "packed",
        "padding",
        "distances",
        "bias",
        "bias_backends",
        "qk_norm",
        "qk_norm_others",
        "qk_norm_errors",
        *("comparison", "differences", "learning_rates", "sensitivity", "stability", "scales", "reached"),
        "timed",
    } <= results.TABLES.keys()


# The plots of the same rows.


def test_a_plot_has_a_group_a_problem_and_a_bar_a_contender(tmp_path, files, monkeypatch, capsys):
    from matplotlib import pyplot

    def normed(name, *times, **changes):
        return {**row(name, *times, **changes), "cosine": "no norm" not in name}

    lists = [{"lengths": lengths, "seq_len": sum(lengths)} for lengths in ([600, 400], [1000], [500, 500])]
    padding = {"padding": ("last", 0.5)}
    files(
        window=[normed("ours (auto)", 0.2, 0.8, window=(99, 0)), normed(NO_NORM, 0.3, 0.72, window=(99, 0))],
        lists=[normed("ours (auto)", time, 1.0, **one) for time, one in zip((0.5, 0.2, 0.4), lists, strict=True)],
        one=[normed("ours (auto)", 0.2, 1.0, lengths=[500, 500])],
        padding=[normed("ours (auto)", 0.4, 1.0, **padding), normed("ours (auto), unmasked", 0.5, 2.0)],
        again=[normed("ours (auto)", 9.0, 9.0, window=(99, 0)), normed("ours (auto)", 0.1, 0.1, head_dim=64)],
        none=[],
    )
    monkeypatch.setattr(pyplot, "close", lambda _: None)
    paths = [str(tmp_path / name) for name in ("window", "lists", "one", "padding", "again")]
    assert plot_rows.main([*paths, "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    figure = pyplot.gcf()
    monkeypatch.undo()
    titles = [f"{direction}, head dim {dim}" for dim in (64, 128) for direction in ("forward", "forward + backward")]
    assert [axes.get_title() for axes in figure.axes] == titles
    names = ["ours (auto)", "ours (auto), unmasked", NO_NORM]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    forward = figure.axes[2]
    groups = ["2 x 1000\nwindow 99", "3 lists of lengths", "2 x 500\ncausal", "2 x 1000\ncausal, last 50% hidden"]
    assert [label.get_text() for label in forward.get_xticklabels()] == groups
    flops = [
        results.case_of(row("", 1, 1, **changes)).flops() for changes in ({"window": (99, 0)}, *lists, padding, {})
    ]
    speeds = [flops[0] / 0.2, flops[0] / 0.3, *(sorted((flops[1] / 0.5, flops[2] / 0.2, flops[3] / 0.4))[1:2])]
    speeds += [flops[3] / 0.2, flops[4] / 0.4, flops[5] / 0.5]
    assert [bar.get_height() for bar in forward.patches] == pytest.approx([speed / 1e9 for speed in speeds])
    assert [bar.get_hatch() for bar in forward.patches] == [None, "//", None, None, None, None]
    pyplot.close(figure)
    (tmp_path / "lengths.json").write_text("[[3, 4]]")  # what packed sequences were measured with lies beside them
    for other in ("none", "lengths.json"):
        assert plot_rows.main([str(tmp_path / other), "--plot", str(tmp_path / "q.png")]) == 2
        assert "files must be JSON of scripts.benchmark with times, got" in capsys.readouterr().err


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(rows, ...) are the axes of a plot of files with these rows."""
    from matplotlib import pyplot

    def draw(*files):
        pyplot.close("all")
        paths = [tmp_path / f"{number}.json" for number in range(len(files))]
        for path, rows in zip(paths, files, strict=True):
            path.write_text(json.dumps({"rows": [{"cosine": True, **one} for one in rows]}))
        with monkeypatch.context() as patched:
            patched.setattr(pyplot, "close", lambda _: None)
            assert plot_rows.main([*map(str, paths), "--plot", str(tmp_path / "p.png")]) == 0
        return pyplot.gcf().axes

    yield draw
    pyplot.close("all")


def groups(axes):
    """The heights of the bars by the label of their group."""
    labels = [label.get_text() for label in axes.get_xticklabels()]
    places = [[bar.get_height() for bar in axes.patches if abs(bar.get_center()[0] - place) < 0.5] for place in
              range(len(labels))]  # fmt: skip
    return dict(zip(labels, places, strict=True))


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"dtype": "float32"}, ("bfloat16", "float32")),
        ({"kv_heads": 4}, ("16 heads", "16 heads on 4")),
        ({"mask_prob": 0.25}, ("mask 0", "mask 0.25")),
        ({"bias": True}, ("no bias", "bias")),
        ({"by_distance": "alibi"}, ("no bias by distance", "ALiBi")),
        ({"seq_len_q": 8}, ("all queries", "8 queries")),
    ],
)
@pytest.mark.parametrize("files", [1, 2])
def test_rows_of_two_dtypes_are_two_groups(drawn, changes, told, files):
    """In one file or two, and whatever else they differ in."""
    window = {"window": (99, 0)}
    first, second = row("ours (auto)", 0.2, 0.8, **window), row("ours (auto)", 0.4, 2.0, **window, **changes)
    forward, both = drawn([first, second]) if files == 1 else drawn([first], [second])
    labels = [f"2 x 1000\nwindow 99\n{option}" for option in told]
    for axes, key, share in ((forward, "forward_ms", 1), (both, "both_ms", 3.5)):
        speeds = [[share * results.case_of(one).flops() / one[key] / 1e9] for one in (first, second)]
        assert groups(axes) == {label: pytest.approx(speed) for label, speed in zip(labels, speeds, strict=True)}
        assert not axes.containers[0].errorbar  # they are no lists of lengths


def test_lists_of_lengths_are_one_group_of_one_dtype_and_window(drawn, capsys):
    def lists(**changes):
        return [row("ours (auto)", 0.1 * time, 1.0, lengths=lengths, **changes) for time, lengths in
                enumerate(([600, 400], [500, 500], [1000]), start=1)]  # fmt: skip

    forward, _ = drawn([*lists(), *lists(dtype="float32")], lists(window=(99, 0)))
    labels = [f"3 lists of lengths\n{of}" for of in ("bfloat16, causal", "float32, causal", "bfloat16, window 99")]
    assert {label: len(bars) for label, bars in groups(forward).items()} == dict.fromkeys(labels, 1)
    capsys.readouterr()
    some = [row("some", 0.1, 1.0, lengths=[1000])]
    forward, _ = drawn([*lists(), *some])
    assert [len(bars) for bars in groups(forward).values()] == [1]
    assert "no bar: forward of some, timed with 1 of 3 lists of lengths" in capsys.readouterr().out


def test_each_unmasked_call_stands_beside_the_masked_one_of_its_length(drawn):
    rows = [
        row(name, 0.1, 1.0, seq_len=length, **padding)
        for length in (1000, 2000)
        for name, padding in (("ours (auto)", {"padding": ("last", 0.5)}), ("ours (auto), unmasked", {}))
    ]
    forward, _ = drawn(rows)
    assert {label: len(bars) for label, bars in groups(forward).items()} == {
        "2 x 1000\ncausal, last 50% hidden": 2, "2 x 2000\ncausal, last 50% hidden": 2,
    }  # fmt: skip
    table = {"by_distance": "table"}
    rows = [row("ours (auto)", 0.1, 1.0, **table), row("ours (auto), without it", 0.1, 1.0)]
    assert [len(bars) for bars in groups(drawn(rows)[0]).values()] == [2]


def test_a_contender_without_a_direction_has_no_bar_there(drawn):
    """Its backward pass ran out of memory, or its file does not have that direction."""
    limited = row("limited", 0.2, 1.0) | {"error": "out of memory"}
    del limited["both_ms"]
    rows = [row("ours (auto)", 0.2, 0.8, backward=0.5), limited]
    other = [row(name, 0.2, 0.8, window=(99, 0)) for name in ("ours (auto)", "limited")]
    panels = drawn(rows, other)
    assert [[len(bars) for bars in groups(axes).values()] for axes in panels] == [[2, 2], [1, 0], [1, 2]]
    assert [axes.get_title().split(",")[0] for axes in panels] == ["forward", "backward", "forward + backward"]


def test_more_contenders_than_colours_are_drawn(drawn):
    names = [f"number {number}" for number in range(25)]
    forward, _ = drawn([row(name, 0.2, 0.8) for name in names])
    assert len(forward.patches) == 25 and len({bar.get_facecolor() for bar in forward.patches}) == 20


def test_problems_that_no_label_tells_apart_are_refused_and_a_second_time_is_said_to_be_left_out(
    drawn, tmp_path, capsys
):
    drawn([row("ours (auto)", 0.2, 0.8)], [row("ours (auto)", 0.4, 0.9)])
    assert f"left out: head dim 128, 2 x 1000, causal of {tmp_path / '1.json'}, for" in capsys.readouterr().out
    for number, lengths in enumerate(([300, 700], [300, 400, 300])):
        rows = [row("ours (auto)", 0.2, 0.8, lengths=of) for of in (lengths, [1000])]
        (tmp_path / f"{number}.json").write_text(json.dumps({"rows": rows}))
    paths = [str(tmp_path / f"{number}.json") for number in range(2)]
    assert plot_rows.main([*paths, "--plot", str(tmp_path / "p.png")]) == 2
    said = "files must have problems that a plot can tell apart, got 2 of 2 lists of lengths: draw them apart"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["windows", "packed", "padding"])
def test_the_pages_of_windows_packed_sequences_and_padding_show_a_plot(folder):
    page = results.RESULTS / folder / "README.md"
    assert f"]({folder}.png)" in page.read_text() and (page.parent / f"{folder}.png").exists()


def test_the_page_of_the_study_has_every_run():
    study = results.RESULTS / "study"
    page = (study / "report.html").read_text(encoding="utf-8")
    runs = [path.parent.name for path in study.glob("*/*/run.json")]
    assert len(runs) > 100 and [name for name in runs if name not in page] == []
    assert f"<title>{len(runs)} runs: {len(runs)} finished</title>" in page
