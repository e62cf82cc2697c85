"""scripts.compare: which runs are averaged, what its tables say, how it draws, and its page. Nothing is trained."""

import html
import io
import itertools
import json
import math
import os
import re
import statistics
from pathlib import Path

import pytest
from matplotlib import image
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from conf.schema import values_of
from models.training.report import Results, read_results
from scripts import arms, compare, compare_page, compare_plots
from scripts.comparisons import Difference, at_best_rates, baseline_of, best_of, comparisons_of, difference

pytestmark = pytest.mark.slow  # each quick, together half a minute

PER_STEP, STEPS = 1000, 6
COSINE = {"kind": "cosine", "scale": 12.0}
BOOK = {"name": "book", "sha256": "ab" * 32, "val_scored": 999, "train_bytes": 5000}


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    """For what is not about plots, which take most of the time."""
    monkeypatch.setattr(compare, "draw", lambda *_: [])
    monkeypatch.setattr(compare_plots, "single_panels", lambda *_: {})


def maker(tmp_path):
    """Writes a run's folder and returns it: attention, norm, lr, seed and so on, its loss, and how it ended."""

    def make(name=None, loss=1.5, *, attention="cosine", norm="pre", lr=0.001, seed=0, seq_len=64, max_steps=STEPS,
             speed=2000.0, memory=1.5, config=None, samples=(), under="runs", **record):  # fmt: skip
        folder = tmp_path / under / (name or f"{attention}-{norm}-len{seq_len}-lr{lr}-seed{seed}")
        folder.mkdir(parents=True)
        kept = {"seed": seed, "lr": lr, "seq_len": seq_len, "max_steps": max_steps, "tokens_per_step": PER_STEP}
        kept |= {"attention": COSINE if attention == "cosine" else {"kind": "regular"}, "norm": {"kind": norm}}
        OmegaConf.save(kept | (config or {}), folder / "config.yaml")
        whole = {"status": "finished", "choices": {"attention": attention, "norm": norm}, "tokens_per_step": PER_STEP}
        whole |= {"corpus": BOOK, "device": "a GPU", "git_commit": "c0ffee" * 6, "command": f"train.py seed={seed}"}
        (folder / "run.json").write_text(json.dumps(whole | record))
        rows = ["step,train/loss,train/bpc,throughput/tokens_per_s,memory/peak_allocated_gib,val/bpc"]
        if loss is not None:
            for step in range(2, max_steps + 1, 2):
                now = loss + (max_steps - step) / 10
                last = loss if step == max_steps else ""
                rows.append(f"{step},{now * math.log(2)},{now},{speed},{memory},{last}")
        (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
        if samples:
            text = "".join(f"--- step {step} ---\n{sample}\n" for step, sample in samples)
            (folder / "samples.txt").write_text(text, encoding="utf-8")
        return folder

    return make


def compared(capsys, *arguments):
    assert compare.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


def cells_of(out):
    """The rows of every table that was printed, each the texts of its cells."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line[:1] == "│"]


def comparison(*folders):
    (one,) = comparisons_of([read_results(folder) for folder in folders])
    return one


def refused(capsys, *arguments):
    assert compare.main([str(argument) for argument in arguments]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and all(line.startswith("warning: ") for line in warnings)
    return error


# ---------------------------------------------------------------- arms


@pytest.mark.usefixtures("undrawn")
def test_where_weights_came_from_is_told_by_their_bytes(make, tmp_path, capsys):
    """Not by the path, which may have led to others, and which may be spelled in several ways."""
    for seed, (path, digest) in enumerate([("runs/a", "0"), ("../runs/a", "0"), ("runs/a", "1"), ("runs/b", None)]):
        identity = {"init_from": path if digest is None else f"sha256:{digest * 64}"}
        make(seed=seed, loss=1 + seed, config={"init_from": path}, identity=identity)
    out = compared(capsys, tmp_path / "runs").out
    assert cells_of(out)[:3] == [
        ["runs/a (00000000)", "2", "* 1.5000 ± 0.7071", "2,000 ± 0", "1.50 ± 0.00"],
        ["runs/a (11111111)", "1", "3.0000", "2,000", "1.50"],
        ["runs/b", "1", "4.0000", "2,000", "1.50"],
    ]
    # of an earlier version, which recorded the path: it is the file that others had under it, if that was one
    make(seed=4, loss=3.0, config={"init_from": "../runs/a"}, identity={"init_from": "../runs/a"})
    make(seed=5, loss=9.0, config={"init_from": "runs/a"}, identity=[])
    out = compared(capsys, tmp_path / "runs", "--baseline", "init_from=runs/b").out
    rows = {row[0]: row[1] for row in cells_of(out)[:4]}
    assert rows == {"runs/a (00000000)": "3", "runs/a (11111111)": "1", "runs/a": "1", "runs/b": "1"}


@pytest.mark.usefixtures("undrawn")
def test_seeds_are_one_row_with_mean_deviation_and_n(make, tmp_path, capsys):
    for seed, loss in enumerate((1.0, 1.1, 1.5)):
        make(loss=loss, seed=seed)
    make(loss=1.4, attention="regular")
    out = compared(capsys, tmp_path / "runs").out
    assert out.startswith("4 runs: 4 finished\n")
    assert cells_of(out)[:2] == [
        ["cosine", "3", "* 1.2000 ± 0.2646", "2,000 ± 0", "1.50 ± 0.00"],  # the sample deviation: sqrt(0.14 / 2)
        ["regular", "1", "1.4000", "2,000", "1.50"],
    ]
    assert len(cells_of(out)) == 2 + 4  # a row a run as well, of so few


@pytest.mark.usefixtures("undrawn")
def test_of_a_seed_that_ran_twice_the_later_counts(make, tmp_path, capsys):
    make("b", 1.0, started="2026-01-01T00:00:00+00:00")
    make("a", 3.0, started="2026-01-02T00:00:00+00:00")
    make("c", 2.0, seed=1, started="2026-01-01T00:00:00+00:00")
    out = compared(capsys, tmp_path / "runs").out
    assert cells_of(out)[0][:2] == ["2", "2.5000 ± 0.7071"]
    assert "1 run does not count, for its seed ran again later: b\n" in out


@pytest.mark.usefixtures("undrawn")
def test_runs_that_did_not_finish_are_in_no_mean_and_are_named(make, tmp_path, capsys):
    make(loss=1.0)
    make(loss=1.2, seed=1)
    make(loss=9.0, seed=2, status="diverged", error="DivergedError: the loss was nan at step 4")
    make(loss=9.0, seed=3, status="running")  # owned by nobody
    long = "OutOfMemoryError: " + "no memory " * 40 + "\nline 2"
    for seed in (4, 5):
        make(loss=None, seed=seed, lr=0.5, status="failed", error=long)
    (tmp_path / "runs" / "refused-1").mkdir()
    (tmp_path / "runs" / "refused-1" / "run.json").write_text('{"status": "refused", "error": "lr must be positive"}')
    out = compared(capsys, tmp_path / "runs").out
    assert out.startswith("7 runs: 2 finished, 1 diverged, 2 failed, 1 killed, 1 refused\n")
    assert cells_of(out)[:2] == [
        ["0.001", "2, 1 diverged, 1 killed", "1.1000 ± 0.1414", "2,000 ± 0", "1.50 ± 0.00"],
        ["0.5", "0, 2 failed", "-", "-", "-"],
    ]
    name = "cosine-pre-len64-lr{}-seed{}".format
    assert f"diverged: {name(0.001, 2)}: DivergedError: the loss was nan at step 4\n" in out
    assert f"killed: {name(0.001, 3)}\n" in out and "refused: refused-1: lr must be positive\n" in out
    (line,) = [line for line in out.splitlines() if line.startswith("failed")]
    assert line.startswith(f"failed (2): {name(0.5, 4)}, {name(0.5, 5)}: OutOfMemoryError: no memory")
    assert line.endswith("... (the whole of it: run.json, --html)") and len(line) < 300


def test_arms_are_told_apart_by_options_before_keys_that_only_one_of_them_has(make):
    cosine, regular = make("a"), make("b", attention="regular")
    one = comparison(cosine, regular, make("c", seed=3))
    assert [len(arm.runs) for arm in one.arms] == [2, 1] and one.keys == ["attention"]
    hotter = comparison(cosine, regular, make("d", config={"attention": COSINE | {"scale": 16.0}}))
    assert hotter.keys == ["attention", "attention.scale"]
    assert [arms.label(arm, hotter.keys) for arm in hotter.arms] == ["cosine scale=12", "cosine scale=16", "regular"]
    fixed = make("f", choices={"attention": "cosine_fixed"}, config={"attention": COSINE | {"scale": 10.0}})
    assert comparison(cosine, fixed, regular).keys == ["attention"]  # each option has but one scale
    newer = comparison(cosine, make("e", config={"clip": 1.0}))  # a key that an earlier version did not have
    assert newer.keys == ["clip"] and [arms.setting(arm, "clip") for arm in newer.arms] == ["-", "1"]


@pytest.mark.usefixtures("undrawn")
def test_a_copy_of_a_key_is_a_setting_where_an_earlier_run_set_it_apart(make, tmp_path):
    optimizer = {"kind": "adamw", "lr": 0.001, "max_steps": STEPS}
    plain = make("plain", config={"optimizer": optimizer})
    assert comparison(plain, make("seed", seed=1, config={"optimizer": optimizer})).keys == []
    apart = make("apart", config={"optimizer": optimizer | {"lr": 0.01}})
    one = comparison(plain, apart)
    assert one.keys == ["optimizer.lr"] and [arms.setting(arm, "optimizer.lr") for arm in one.arms] == ["-", "0.01"]
    other = make("other", lr=0.002, config={"optimizer": optimizer | {"lr": 0.002}})
    assert comparison(apart, other).keys == ["lr", "optimizer.lr"]  # though lr tells them apart
    page = tmp_path / "page.html"
    assert compare.main([str(plain), str(apart), "--html", str(page)]) == 0
    assert "optimizer.lr" in page.read_text() and "optimizer.max_steps" not in page.read_text()


def test_a_run_that_was_changed_on_its_way_is_an_arm_of_its_own(make):
    changed = [{"step": 4, "changed": {"lr": [0.01, 0.001], "max_steps": [4, 6]}}]
    pure, mixed = make("pure"), make("mixed", seed=1, resumed_with=changed)
    one = comparison(pure, mixed, make("alike", seed=2, resumed_with=changed))
    assert one.keys == ["resumed_with"] and [len(arm.runs) for arm in one.arms] == [1, 2]
    assert arms.setting(one.arms[1], "resumed_with") == "at step 4 lr 0.01 to 0.001, max_steps 4 to 6"
    assert comparison(mixed, make("other", lr=0.01)).keys == ["lr", "resumed_with"]  # though lr tells them apart
    for index, nothing in enumerate(({}, [], "x", [1, {"step": "4"}, {"step": 4, "changed": {"lr": 1}}])):
        assert comparison(pure, make(f"odd{index}", seed=3, resumed_with=nothing)).keys == []


def test_numbers_are_sorted_as_numbers_and_shown_so_that_they_differ(make):
    rates = [0.0005, 0.01, 0.002, 0.0020000001]
    one = comparison(*(make(f"run{index}", lr=lr) for index, lr in enumerate(rates)))
    assert [arms.setting(arm, "lr") for arm in one.arms] == ["0.0005", "0.002", "0.0020000001", "0.01"]


# ---------------------------------------------------------------- what compares


@pytest.mark.parametrize(
    ("change", "title"),
    [
        ({"corpus": BOOK | {"sha256": "f" * 64}}, "corpus: book (SHA-256 ffffffff)"),
        ({"corpus": BOOK | {"val_scored": 77}}, "validated bytes: 77"),
        # as with another data.test_fraction: as many bytes are validated, and they are others
        ({"corpus": BOOK | {"train_bytes": 4000}}, "bytes of the training split: 4,000"),
        ({"max_steps": 4}, "bytes trained on: 4,000"),
        ({"tokens_per_step": 500}, "bytes trained on: 3,000"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_runs_whose_bits_per_byte_do_not_compare_are_in_tables_of_their_own(make, tmp_path, capsys, change, title):
    for seed in (0, 1):
        make(seed=seed)
    make("another", loss=0.5, seed=2, **change)
    out = compared(capsys, tmp_path / "runs").out
    assert "in 2 tables, because bits per byte of different ones do not compare" in out
    first, second = out.split(title)
    assert "1.5000 ± 0.0000" in first and cells_of(second)[0][:2] == ["1", "0.5000"]


@pytest.mark.usefixtures("undrawn")
def test_one_text_under_two_names_is_one_comparison(make, tmp_path, capsys):
    ways = {"kind": "file", "path": "text.txt", "pattern": "*"}, {"kind": "enwik8", "expected_bytes": 6998}
    for seed, (name, way) in enumerate(zip(("text.txt", "text.txt.gz"), ways, strict=True)):
        make(loss=1.0 + seed, seed=seed, corpus=BOOK | {"name": name}, config={"data": way})
    out = compared(capsys, tmp_path / "runs").out
    assert "tables" not in out and cells_of(out)[0][:2] == ["2", "1.5000 ± 0.7071"]
    make("other", loss=0.5, corpus=BOOK | {"name": "text.txt", "sha256": "f" * 64})
    out = compared(capsys, tmp_path / "runs").out
    assert "corpus: text.txt (SHA-256 abababab)" in out and "corpus: text.txt (SHA-256 ffffffff)" in out


def test_runs_of_as_much_time_compare_whatever_steps_they_made(make):
    ten, five = ({"trainer": {"budget_minutes": minutes}} for minutes in (10, 5))
    folders = [make(config=ten), make(config=ten, seed=1, max_steps=4), make("other", config=ten, tokens_per_step=500)]
    (one,) = comparisons_of([read_results(folder) for folder in folders])
    assert one.terms["bytes trained on"] == "those of 10 minutes"
    folders += [make("shorter", config=five), make("steps")]
    assert len(comparisons_of([read_results(folder) for folder in folders])) == 3


def test_bytes_of_steps_before_a_change_are_counted_by_the_steps_of_then(make):
    changes = [(2, 100, 300), (4, 300, PER_STEP)]
    entries = [{"step": step, "changed": {"tokens_per_step": [old, new], "seed": [1, 0]}} for step, old, new in changes]
    entries.insert(1, {"step": 3, "changed": {"lr": [0.1, 0.001]}})
    one = comparison(make(resumed_with=entries))
    assert one.terms["bytes trained on"] == 2 * 64 + 2 * 256 + 2 * PER_STEP  # in whole windows of 64


def test_a_run_that_could_belong_to_two_comparisons_joins_neither(make):
    folders = [make(), make("other", corpus=BOOK | {"sha256": "0" * 64})]
    folders.append(make(loss=None, seed=1, status="failed", corpus=None))
    found = comparisons_of([read_results(folder) for folder in folders])
    assert [len(one.runs) for one in found] == [1, 1, 1]


def test_rates_of_two_weight_decays_are_two_groups(make):
    runs = [
        make(f"{lr}-{decay}", lr=lr, config={"optimizer": {"kind": "adamw", "weight_decay": decay}})
        for lr in (1e-3, 2e-3)
        for decay in (0.1, 0.2)
    ]
    assert [n for _, n in at_best_rates(comparison(*runs).arms)] == [2, 2]


def test_what_is_no_number_is_in_no_mean(make):
    (arm,) = comparison(make(), make(loss=math.nan, seed=1)).arms
    assert arm.values("val bpc") == [1.5]


def test_a_run_that_ended_early_joins_the_comparison_that_it_can_belong_to(make):
    folders = [make(), make(loss=None, seed=1, status="failed", corpus=None, tokens_per_step=None)]
    (one,) = comparisons_of([read_results(folder) for folder in folders])
    assert one.arms[0].ends() == "1, 1 failed"
    folders.append(make("earlier", seed=2, corpus={key: BOOK[key] for key in BOOK if key != "train_bytes"}))
    (one,) = comparisons_of([read_results(folder) for folder in folders])
    assert one.arms[0].ends() == "2, 1 failed"  # a run of which less was recorded
    shorter = make("shorter", max_steps=4, corpus=BOOK | {"sha256": "0" * 64})
    assert len(comparisons_of([read_results(folder) for folder in (*folders, shorter)])) == 2
    (one,) = comparisons_of([read_results(folder) for folder in folders[1:]])
    assert one.arms[0].ends() == "1, 1 failed"  # though no run recorded all


@pytest.mark.usefixtures("undrawn")
def test_the_best_is_marked_for_each_length(make, tmp_path, capsys):
    for seq_len, attention, loss in (
        (64, "cosine", 1.5),
        (64, "regular", 1.6),
        (512, "cosine", 1.3),
        (512, "regular", 1.2),
    ):
        make(loss=loss, attention=attention, seq_len=seq_len)
    out, err = compared(capsys, tmp_path / "runs")
    marked = [row[:2] for row in cells_of(out) if len(row) > 3 and row[3].startswith("* ")]
    assert marked == [["cosine", "64"], ["regular", "512"]]
    assert "the lowest val bpc is marked for each seq_len" in out and not err
    one = comparison(*sorted((tmp_path / "runs").glob("*-seed0"))[:1])
    assert best_of(one.arms) == []


@pytest.mark.usefixtures("undrawn")
def test_numbers_of_several_machines_are_said_to_be(make, tmp_path, capsys):
    make()
    make(attention="regular", device="another GPU")
    assert (
        "tokens/s and peak GiB are of several machines: a GPU, another GPU" in compared(capsys, tmp_path / "runs").out
    )


def test_runs_of_two_precisions_are_two_arms(make):
    """null is another one on a CPU than on a GPU; a run that logged nothing is taken for one of the others."""

    def on_a_cpu(folder):
        rows = folder / "metrics.csv"
        rows.write_text(rows.read_text().replace("memory/peak_allocated_gib", "memory/rss_gib"))
        return folder

    null, said = ({"trainer": {"precision": precision}} for precision in (None, "bf16-mixed"))
    folders = [make(config=null), make(config=said, seed=1), make(loss=None, seed=2, status="failed", config=null)]
    folders += [on_a_cpu(make(config=null, seed=3)), make(config=null, seed=4)]
    one = comparison(*folders)
    assert one.keys == ["trainer.precision"]
    assert [(arms.setting(arm, "trainer.precision"), len(arm.runs)) for arm in one.arms] == [
        ("32-true", 1),
        ("bf16-mixed", 4),
    ]


# ---------------------------------------------------------------- differences


def test_a_difference_is_that_of_the_seeds_that_both_have(make):
    ours = [make(loss=loss, seed=seed) for seed, loss in enumerate((1.0, 1.1, 1.5))]
    theirs = [make(loss=loss, seed=seed, attention="regular") for seed, loss in enumerate((1.2, 1.4))]
    one = comparison(*ours, *theirs)
    found = difference(*one.arms)
    assert found.mean == pytest.approx(-0.25) and found.n == (2,)
    assert found.deviation == pytest.approx(statistics.stdev([-0.2, -0.3]))
    assert str(found) == "-0.2500 ± 0.0707 (2)"


def test_without_shared_seeds_it_is_that_of_the_means(make):
    ours = [make(loss=loss, seed=seed) for seed, loss in enumerate((1.0, 1.2))]
    theirs = [make(loss=loss, seed=seed, attention="regular") for seed, loss in ((7, 1.5), (8, 1.6), (9, 1.7))]
    found = difference(*comparison(*ours, *theirs).arms)
    assert found.mean == pytest.approx(-0.5) and found.n == (2, 3)
    assert found.deviation == pytest.approx(math.sqrt(0.02 + 0.01))
    alone = difference(*comparison(ours[0], theirs[0]).arms)
    assert (alone.mean, alone.deviation, alone.n) == (-0.5, None, (1, 1))
    same = difference(*comparison(ours[0], make("same", loss=1.5, attention="regular")).arms)
    assert same == Difference(-0.5, None, (1,)) and str(same) == "-0.5000 (1)"
    none = comparison(ours[0], make("none", loss=1.5, attention="regular", status="failed"))
    assert difference(*none.arms) is None


@pytest.mark.usefixtures("undrawn")
def test_a_key_compares_each_arm_with_its_own_baseline(make, tmp_path, capsys):
    for norm, lr, loss in (("pre", 0.001, 1.0), ("post", 0.001, 2.0), ("post", 0.002, 3.0)):
        make(loss=loss, norm=norm, lr=lr)
        if lr == 0.001:
            make(loss=loss + 0.5, norm=norm, lr=lr, attention="regular")
    out = compared(capsys, tmp_path / "runs", "--baseline", "attention=regular").out
    assert [[*row[:3], row[5]] for row in cells_of(out)[:5]] == [
        ["cosine", "post", "0.001", "-0.5000 (1)"],
        ["cosine", "post", "0.002", "-"],  # regular attention did not run at this rate
        ["cosine", "pre", "0.001", "-0.5000 (1)"],
        ["regular", "post", "0.001", "baseline"],
        ["regular", "pre", "0.001", "baseline"],
    ]
    assert "difference: val bpc minus that of the same with attention=regular, below 0 is better" in out
    assert "sample standard deviation of their differences" in out


@pytest.mark.usefixtures("undrawn")
def test_what_was_given_beside_options_is_told_and_must_be_equal(make, tmp_path, capsys):
    """Whatever option it belongs to; an option's own values, as conf/ has them, are the option."""

    def windows(attention, loss, window):
        group = COSINE if attention == "cosine" else {"kind": "regular"}
        make(f"{attention}{window}", loss, attention=attention, config={"attention": group | {"window": window}})

    windows("cosine", 1.0, 8), windows("regular", 2.0, None)
    out = compared(capsys, tmp_path / "runs", "--baseline", "attention=regular").out
    assert [[*row[:2], row[4]] for row in cells_of(out)[:2]] == [
        ["cosine", "8", "-"],
        ["regular", "null", "baseline"],
    ]
    assert "-: of no arm, or of more than one, is attention all that sets it apart from this one\n" in out
    windows("regular", None, 8)  # without a loss
    assert "-: of no arm" not in compared(capsys, tmp_path / "runs", "--baseline", "attention=regular").out
    (tmp_path / "runs" / "regular8").rename(tmp_path / "ended")
    windows("cosine", 1.25, None), windows("regular", 3.0, 8)
    out = compared(capsys, tmp_path / "runs", "--baseline", "attention=regular").out
    assert [[*row[:2], row[4]] for row in cells_of(out)[:4]] == [
        ["cosine", "null", "-0.7500 (1)"],
        ["cosine", "8", "-2.0000 (1)"],
        ["regular", "null", "baseline"],
        ["regular", "8", "baseline"],
    ]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("scale", "columns", "difference"), [(None, 0, "-0.5000 (1)"), (16.0, 1, "-")])
def test_values_of_an_options_own_are_the_option(make, tmp_path, capsys, scale, columns, difference):
    own = {option: dict(values_of("attention", option)) for option in ("cosine", "cosine_fixed")}
    assert own["cosine"]["scale"] != own["cosine_fixed"]["scale"]
    own["cosine"]["scale"] = scale or own["cosine"]["scale"]
    for option, loss in (("cosine", 1.0), ("cosine_fixed", 1.5)):
        make(option, loss, choices={"attention": option}, config={"attention": own[option]})
    out = compared(capsys, tmp_path / "runs", "--baseline", "attention=cosine_fixed").out
    assert ("scale" in out.split("cosine")[0]) is bool(columns)
    assert cells_of(out)[0][3 + columns] == difference


@pytest.mark.usefixtures("undrawn")
def test_a_run_compares_all_with_its_arm(make, tmp_path, capsys):
    make(loss=1.0)
    make(loss=1.1, lr=0.002)
    make("chosen", loss=1.5, attention="regular")
    out = compared(capsys, tmp_path / "runs", "--baseline", "chosen").out
    assert [row[4] for row in cells_of(out)[:3]] == ["-0.5000 (1)", "-0.4000 (1)", "baseline"]
    assert "difference: val bpc minus that of chosen, below 0" in out


@pytest.mark.usefixtures("undrawn")
def test_each_is_compared_at_its_own_best_rate(make, tmp_path, capsys):
    losses = {("cosine", 0.001): 1.2, ("cosine", 0.002): 1.0, ("regular", 0.001): 1.3, ("regular", 0.002): 1.9}
    for (attention, lr), loss in losses.items():
        make(loss=loss, attention=attention, lr=lr)
    out = compared(capsys, tmp_path / "runs", "--baseline", "attention=regular").out
    table = out.split("each at its best lr")[1]
    assert [row[:6] for row in cells_of(table)[:2]] == [
        ["cosine", "0.002", "2", "1", "* 1.0000", "-0.3000 (1)"],
        ["regular", "0.001", "2", "1", "1.3000", "baseline"],
    ]
    assert "with attention=regular, at its own lr" in out
    out = compared(capsys, tmp_path / "runs", "--baseline", "lr=0.002").out
    assert [row[:6] for row in cells_of(out.split("each at its best lr")[1])[:2]] == [
        ["cosine", "0.002", "2", "1", "* 1.0000", "baseline"],
        ["regular", "0.001", "2", "1", "1.3000", "-0.6000 (1)"],  # to regular attention at 0.002
    ]
    assert "at its own" not in out
    for seed in (1, 2):
        make(loss=1.21, lr=0.001, seed=seed)
    table = compared(capsys, tmp_path / "runs").out.split("each at its best lr")[1]
    assert [row[:4] for row in cells_of(table)[:2]] == [
        ["cosine", "0.001", "2", "3"],  # 0.002 has one seed, which may be luck
        ["regular", "0.001", "2", "1"],
    ]
    single = comparison(*[folder for folder in (tmp_path / "runs").glob("*-lr0.001-*")])
    assert at_best_rates(single.arms) == []
    make(loss=None, lr=0.004, status="diverged")
    for attention in ("cosine", "regular"):
        make(loss=None, attention=attention, norm="post", status="diverged")
    at_worse = "regular-pre-len64-lr0.002-seed0"
    table = compared(capsys, tmp_path / "runs", "--baseline", at_worse).out.split("each at its best lr")[1]
    assert [row[:6] for row in cells_of(table)[:2]] == [
        ["cosine", "0.001", "3", "3", "* 1.2067 ± 0.0058", "-0.6933 (3, 1)"],  # of three rates one diverged
        ["regular", "0.001", "2", "1", "1.3000", "-0.6000 (1)"],
    ]


def test_a_name_of_no_characters_is_drawn():
    """A file's name may be any bytes, and a corpus has its file's."""
    figure = Figure()
    figure.suptitle(compare_plots.plain("corpus: n\udcff.txt, $x"))
    figure.savefig(io.BytesIO())


def test_labels_of_learning_rates_do_not_lie_on_each_other():
    assert compare_plots._apart([0.0005, 0.001, 0.002]) == ["0.0005", "0.001", "0.002"]
    assert compare_plots._apart([1e-5, 1e-3, 1.1e-3, 1.2e-3, 0.1]) == ["1e-05", "0.001", "", "", "0.1"]
    assert compare_plots._apart([0.001]) == ["0.001"]


@pytest.mark.usefixtures("undrawn")
def test_a_baseline_without_a_loss_in_the_table_is_said(make, tmp_path, capsys):
    make(loss=1.0), make(loss=1.1, attention="regular"), make("lost", None, norm="post", status="diverged")
    make("shorter", max_steps=4)
    out = compared(capsys, tmp_path / "runs", "--baseline", "lost").out
    assert "difference: none, for no val bpc here compares with that of lost\n" in out
    first, second = compared(capsys, tmp_path / "runs", "--baseline", "shorter").out.split("bytes trained on: 4,000")
    assert "difference: none, for no val bpc here compares with that of shorter\n" in first
    assert "baseline" in second and "difference: none" not in second


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ("nobody", "--baseline must be a run's name or a KEY=VALUE that runs have, got 'nobody'; accepted: attention="),
        ("attention=linear", "got 'attention=linear'; of attention these runs have cosine, regular"),
        ("depth=3", "got 'depth=3'; accepted: attention=cosine|regular; or a run's name"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_baseline_that_is_not_there_is_refused(make, tmp_path, capsys, baseline, said):
    make(), make(attention="regular")
    assert said in refused(capsys, tmp_path / "runs", "--baseline", baseline)


@pytest.mark.parametrize("value", ["true", "null", "False"])
@pytest.mark.usefixtures("undrawn")
def test_true_false_and_null_are_shown_and_taken_as_train_py_takes_them(make, tmp_path, capsys, value):
    for name, option in (("a", True), ("b", False), ("c", None)):
        make(name, config={"compile_it": option})
    out = compared(capsys, tmp_path / "runs", "--baseline", f"compile_it={value}").out
    assert {row[0] for row in cells_of(out)[:3]} == {"true", "false", "null"}
    error = refused(capsys, tmp_path / "runs", "--baseline", "compile_it=yes")
    assert "of compile_it these runs have" in error and "True" not in error and "None" not in error


def test_numbers_name_a_baseline_however_they_are_written(make):
    one = comparison(make(lr=0.001), make(lr=0.002))
    baseline = baseline_of("lr=1e-3", [one])
    assert [baseline.of(arm, one.arms) is one.arms[0] for arm in one.arms] == [True, True]


# ---------------------------------------------------------------- output


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def on_terminal(monkeypatch, width, *arguments):
    """What is printed on a terminal of so many columns, without its colours."""
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    assert compare.main([str(argument) for argument in arguments]) == 0
    monkeypatch.undo()
    return re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())


def study(make):
    """36 runs: three factors, seeds, another length, and every way to end."""
    ends = {3: "failed", 11: "diverged", 17: "interrupted", 23: "running", 29: "refused"}
    number = 0
    for attention in ("cosine", "regular"):
        for norm in ("pre", "post"):
            for lr in (0.000125, 0.001, 0.016):
                for seed in (0, 1, 2):
                    end = ends.get(number, "finished")
                    length = 4 if number % 12 == 5 else STEPS
                    error = None if end == "finished" else f"{end} because " + "everything went wrong " * 20
                    name = f"{attention}-{norm}-small-enwik8-len1024-lr{lr}-{seed}"
                    own = {"attention": attention, "norm": norm, "lr": lr, "seed": seed, "max_steps": length}
                    make(name, 1 + number / 30, **own, speed=1e6 + number, status=end, error=error)
                    number += 1
    assert number == 36


@pytest.mark.usefixtures("undrawn")
def test_36_mixed_runs_fit_a_terminal(make, tmp_path, monkeypatch):
    study(make)
    out = on_terminal(monkeypatch, 80, tmp_path / "runs", "--baseline", "attention=regular")
    lines = out.splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 80 for line in lines if line[:1] in "┏┃┡│└")
    assert "36 runs: 31 finished, 1 diverged, 1 failed, 1 interrupted, 1 killed, 1 refused" in out
    assert "not shown for want of room: tokens/s and peak GiB" in out  # said, for it is left out
    for end in ("diverged", "failed", "interrupted", "killed", "refused"):
        assert sum(line.startswith(f"{end}: ") for line in lines) == 1
    wide = on_terminal(monkeypatch, 200, tmp_path / "runs", "--baseline", "attention=regular")
    assert "not shown" not in wide and "1,000,001 ± 1" in wide


@pytest.mark.usefixtures("undrawn")
def test_every_run_has_a_row_where_there_are_few_or_it_is_asked_for(make, tmp_path, capsys):
    for seed in range(compare.MOST_RUNS + 1):
        make(f"the-run-{seed}", seed=seed)
    short = compared(capsys, tmp_path / "runs").out
    assert "the-run-3" not in short and "--runs shows a row for each run, too" in short
    assert sum("the-run-" in line for line in compared(capsys, tmp_path / "runs", "--runs").out.splitlines()) == 13


@pytest.mark.usefixtures("undrawn")
def test_markdown_has_the_tables_and_marks_the_best(make, tmp_path, capsys):
    make(loss=1.0)
    make(loss=1.25, attention="regular")
    compared(capsys, tmp_path / "runs", "--markdown", tmp_path / "table.md")
    tables = (tmp_path / "table.md").read_text()
    assert "| cosine | 1 | **1.0000** | 2,000 | 1.50 |\n| regular | 1 | 1.2500 | 2,000 | 1.50 |\n" in tables
    assert "| regular-pre-len64-lr0.001-seed0 | finished | 6 |" in tables


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_done_is_refused_before_anything_is_read(make, tmp_path, capsys):
    make()
    (tmp_path / "nothing").mkdir()
    assert str(tmp_path / "nothing") in refused(capsys, tmp_path / "nothing")
    assert "--html must be a file in an existing folder, got '/absent/x.html'" in refused(
        capsys, tmp_path / "runs", "--html", "/absent/x.html"
    )
    assert "--plot must end in .png, .svg or .pdf" in refused(capsys, tmp_path / "runs", "--plot", tmp_path / "x.jpg")


@pytest.mark.usefixtures("undrawn")
def test_a_configuration_that_cannot_be_read_is_said(make, tmp_path, capsys):
    make()
    (make("broken") / "config.yaml").write_text("a: [")
    out, err = compared(capsys, tmp_path / "runs")
    assert "broken is an arm of its own: its config.yaml cannot be read" in err and "2 runs: 2 finished" in out


# ---------------------------------------------------------------- plots


def axes_of(one, draw):
    shown, _ = compare_plots.chosen(one)
    axes = Figure().subplots()
    draw(axes, shown)
    return axes, shown


def test_seeds_are_a_mean_line_in_a_band(make):
    one = comparison(*(make(loss=loss, seed=seed) for seed, loss in enumerate((1.0, 2.0))), make(attention="regular"))
    axes, shown = axes_of(one, lambda axes, shown: compare_plots.draw_losses(axes, shown, "tokens"))
    cosine = [line for line in axes.lines if line.get_color() == shown[0].color]
    assert list(cosine[0].get_xdata()) == [2, 4, 6] and axes.get_xlabel() == "kB trained on"
    assert list(cosine[0].get_ydata()) == pytest.approx([1.9, 1.7, 1.5])
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().y0 == pytest.approx(1.0)
    assert band.get_paths()[0].get_extents().y1 == pytest.approx(2.4)
    assert [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"] == pytest.approx([1.5, 1.5])


def test_the_last_validation_of_runs_by_time_is_their_mean(make):
    folders = [make(loss=1.0), make(loss=2.0, seed=1)]
    for folder, end in zip(folders, (8, 10), strict=True):
        lines = (folder / "metrics.csv").read_text().splitlines()
        lines[1] += "3.0" if end == 8 else "4.0"  # both validate after step 2, too
        last = lines[-1].split(",")
        (folder / "metrics.csv").write_text("\n".join([*lines[:-1], ",".join([str(end), *last[1:]])]) + "\n")
    for order in (folders, folders[::-1]):
        axes, _ = axes_of(comparison(*order), lambda axes, shown: compare_plots.draw_losses(axes, shown, "tokens"))
        points = [line.get_xydata()[0].tolist() for line in axes.lines if line.get_marker() == "o"]
        assert points == [pytest.approx([2, 3.5]), pytest.approx([9, 1.5])]


def test_time_is_bytes_over_speed(make):
    run = read_results(make(speed=500.0))
    assert compare_plots.seconds_of(run) == {2000: 4.0, 4000: 8.0, 6000: 12.0}
    axes, _ = axes_of(comparison(run.folder), lambda axes, shown: compare_plots.draw_losses(axes, shown, "seconds"))
    assert list(axes.lines[0].get_xdata()) == [4, 8, 12] and axes.get_xlabel() == "seconds of training"


def test_limits_come_from_what_is_finite_and_near_the_best(make):
    folders = [make(loss=1.0), make(loss=1.1, lr=0.002), make(loss=4.9, lr=0.5), make(lr=0.9, status="diverged")]
    text = (folders[-1] / "metrics.csv").read_text().splitlines()
    (folders[-1] / "metrics.csv").write_text("\n".join([*text[:2], "4,nan,nan,1,1,", "6,3e10,4e10,1,1,inf"]) + "\n")
    one = comparison(*folders)
    whole, shown = axes_of(one, compare_plots.limit)
    assert 0.7 < whole.get_ylim()[0] < 1.0 and 4.0 <= whole.get_ylim()[1] < 5.5
    end, _ = axes_of(one, compare_plots.limit_to_end)
    assert 0.9 < end.get_ylim()[0] < 1.0 and 1.3 < end.get_ylim()[1] < 1.5 and end.get_xlim()[0] == pytest.approx(4)


def test_limits_leave_out_neither_a_validation_nor_an_arm_beside_one_that_overfits(make):
    overfits, other = make(loss=0.02), make(loss=2.0, lr=0.002)
    lines = (overfits / "metrics.csv").read_text().splitlines()
    (overfits / "metrics.csv").write_text("\n".join([*lines[:-1], lines[-1].rpartition(",")[0] + ",1.75"]) + "\n")
    for one in (comparison(overfits, other), comparison(overfits)):
        whole, _ = axes_of(one, compare_plots.limit)
        assert whole.get_ylim()[0] < 0.02 and whole.get_ylim()[1] > (2.4 if len(one.arms) == 2 else 1.75)
        end, _ = axes_of(one, compare_plots.limit_to_end)
        assert end.get_ylim()[1] > 1.75
    below = make("below", loss=1.6, lr=0.003)  # with dropout validation is below training
    lines = (below / "metrics.csv").read_text().splitlines()
    (below / "metrics.csv").write_text("\n".join([*lines[:-1], lines[-1].rpartition(",")[0] + ",1.25"]) + "\n")
    for limits in (compare_plots.limit, compare_plots.limit_to_end):
        axes, _ = axes_of(comparison(below), limits)
        assert axes.get_ylim()[0] < 1.25


def test_losses_that_are_all_but_equal_are_drawn_so(make):
    one = comparison(make(loss=1.5), make(loss=1.5 + 5e-8, lr=0.002))
    axes, _ = axes_of(one, lambda axes, shown: compare_plots.draw_number(axes, shown, "val bpc", names=False))
    low, high = axes.get_xlim()
    assert low < 1.5 < high and high - low >= 0.999e-3


def test_a_run_that_ends_while_it_is_read_is_what_it_became(make):
    read = read_results(make(status="running"))
    assert read.status == "killed"
    read = read_results(make("ends", lr=0.002, status="running"))
    path = read.folder / "run.json"
    path.write_text(path.read_text().replace('"running"', '"diverged"'))
    assert read.status == "diverged"


def test_long_runs_are_averaged_and_not_thinned_out(tmp_path):
    rows = [{"step": step, "train/bpc": 2.0 + step % 2, "throughput/tokens_per_s": 1.0} for step in range(1, 1201)]
    curve = compare_plots.curve_of([Results(tmp_path, {"tokens_per_step": 1}, rows)])
    assert len(curve.mean) == compare_plots.MOST_POINTS and set(curve.mean) == {2.5} and curve.tokens[-1] == 1200


def test_many_arms_are_reduced_to_what_can_be_told_apart_and_it_is_said(make):
    one = comparison(*(make(loss=1 + 10 * lr, norm=norm, lr=lr) for norm in ("pre", "post") for lr in
                       [0.001 * 2**power for power in range(7)]))  # fmt: skip
    shown, note = compare_plots.chosen(one)
    assert [one.name for one in shown] == ["post", "pre"] and note == "2 of 14 arms: each at its best lr"
    many = comparison(*(make(f"depth{depth}", loss=1 + depth, config={"depth": depth}) for depth in range(15)))
    shown, note = compare_plots.chosen(many)
    assert [one.name for one in shown] == [f"depth={depth}" for depth in range(12)]
    assert note == "12 of 15 arms: the 12 of lowest val bpc"
    assert len({to_hex(one.color) for one in shown}) == 12


def test_rates_are_lines_of_means_and_a_rate_that_nobody_finished_is_marked(make, tmp_path):
    make(loss=1.2, lr=0.001), make(loss=1.0, lr=0.002), make(loss=1.4, lr=0.002, seed=1)
    make(loss=None, lr=0.004, status="diverged")
    make(loss=1.3, lr=0.001, attention="regular")
    one = comparison(*(tmp_path / "runs").iterdir())
    (panel,) = compare_plots.rate_panels(one)
    axes = Figure().subplots()
    compare_plots.draw_rates(axes, panel, {"cosine": "C0", "regular": "C1"})
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.001, 0.002], [0.001]]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([1.2, 1.2])
    crosses = [points.get_offsets()[:, 0].tolist() for points in axes.collections if len(points.get_offsets()) == 1]
    assert [0.004] in crosses
    assert compare_plots.rate_panels(comparison(*(tmp_path / "runs").glob("*lr0.001*"))) == []
    figure = compare_plots.rates_figure([panel], 1)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1  # whole, in a narrow figure too
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cosine", "regular", "no run finished"]


def test_rates_of_one_attention_at_several_scales_are_lines_of_one_panel(make, tmp_path):
    for lr, far in ((0.001, 1.4), (0.002, 1.6)):
        for norm, loss in (("pre", 1.0), ("post", far)):
            for scale in (8.0, 16.0):
                own = COSINE | {"scale": scale}
                make(f"{norm}-{scale}-{lr}", loss, norm=norm, lr=lr, config={"attention": own})
            make(loss=1.0, norm=norm, lr=lr, attention="regular")
    panels = compare_plots.rate_panels(comparison(*(tmp_path / "runs").iterdir()))
    assert [(panel.title, panel.most) for panel in panels] == [
        ("post", None),
        ("post, up to 1.25", 1.25),
        ("pre", None),
    ]
    assert all(list(panel.lines) == ["cosine scale=8", "cosine scale=16", "regular"] for panel in panels)
    axes = Figure().subplots()
    compare_plots.draw_rates(axes, panels[1], dict.fromkeys(panels[1].lines, "C0"))
    assert axes.get_ylim() == pytest.approx((0.99, 1.25))


def test_a_map_needs_every_combination(make, tmp_path):
    for scale in (8.0, 16.0):
        for lr in (0.001, 0.002, 0.004):
            make(f"s{scale}-{lr}", loss=scale / 10 + lr * 100, lr=lr, config={"attention": COSINE | {"scale": scale}})
    one = comparison(*(tmp_path / "runs").iterdir())
    (found,) = compare_plots.maps_of(one)
    assert found.keys == ("attention.scale", "lr") and found.labels == (["8", "16"], ["0.001", "0.002", "0.004"])
    assert [pytest.approx(row) for row in found.losses] == [[0.9, 1.0, 1.2], [1.7, 1.8, 2.0]]
    (tmp_path / "runs" / "s8.0-0.004" / "metrics.csv").unlink()
    assert compare_plots.maps_of(comparison(*(tmp_path / "runs").iterdir())) == []


def test_plots_are_written_where_asked(make, tmp_path, capsys):
    for attention in ("cosine", "regular"):
        for norm in ("pre", "post"):
            for lr in (0.001, 0.002):
                make(attention=attention, norm=norm, lr=lr, config={"note": "$a_b$"})
    plot = tmp_path / "plot.png"
    out = compared(capsys, tmp_path / "runs", "--plot", plot).out
    files = [plot, tmp_path / "plot_learning_rates.png", tmp_path / "plot_map.png"]
    assert all(f"{file}\n" in out for file in files) and sorted(tmp_path.glob("*.png")) == sorted(files)
    for file in files:
        pixels = image.imread(file)
        assert pixels.ndim == 3 and pixels[..., :3].std() > 0.01


def test_the_page_is_written_of_runs_that_cannot_be_written_to(make, tmp_path, monkeypatch, capsys):
    make(), make(attention="regular")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    denied = [tmp_path / "runs"]  # to whoever is not root, which tests may be
    access = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode: access(path, mode) and not any(map(Path(path).is_relative_to, denied))
    )
    out, err = compared(capsys, tmp_path / "runs", "--html", "r.html", "--markdown", "r.md")
    (warning,) = err.splitlines()
    assert (
        f"plots are drawn in the current folder, for '{tmp_path / 'runs'}' is not to be written to; --plot" in warning
    )
    assert {path.name for path in Path().iterdir()} == {"r.html", "r.md", "comparison.png"}
    assert f"{tmp_path / 'here' / 'comparison.png'}\n" in out and not list((tmp_path / "runs").glob("*.png"))
    assert not compared(capsys, tmp_path / "runs", "--plot", "mine.png").err  # which asks for no other place
    denied.append(tmp_path / "here")
    assert "--plot must be a file that can be written to, and neither" in refused(capsys, tmp_path / "runs")
    for option in ("--plot", "--html", "--markdown"):
        error = refused(capsys, tmp_path / "runs", option, "other.png")
        assert f"{option} must be a file that can be written to, got 'other.png'" in error


def test_plots_of_runs_that_share_no_folder_are_not_drawn_in_the_root(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare.default_plot([Path("/one/run"), Path("/other/run")]) == tmp_path / "comparison.png"
    assert "for '/' is all that the runs share" in capsys.readouterr().err


def test_what_is_asked_for_is_written_though_nobody_reads_the_tables(make, tmp_path):
    make(), make(attention="regular")
    files = [tmp_path / name for name in ("r.html", "r.md", "r.png")]
    read, write = os.pipe()
    os.close(read)  # as head does once it has seen enough
    with pytest.MonkeyPatch.context() as patch, open(write, "w") as closed:
        patch.setattr("sys.stdout", closed)
        options = zip(("--html", "--markdown", "--plot"), map(str, files), strict=True)
        assert compare.main([str(tmp_path / "runs"), *itertools.chain(*options)]) == 141
    assert all(file.stat().st_size > 100 for file in files)


def test_each_comparison_has_plots_of_its_own(make, tmp_path, capsys):
    make(), make("shorter", max_steps=4)
    compared(capsys, tmp_path / "runs")  # which writes where all runs are
    assert {path.name for path in (tmp_path / "runs").glob("*.png")} == {"comparison.png", "comparison_2.png"}


def test_runs_of_which_nothing_is_known_are_counted_and_drawn_as_nothing(make, tmp_path, capsys):
    for number in (1, 2):
        (tmp_path / "none" / f"refused-{number}").mkdir(parents=True)
        (tmp_path / "none" / f"refused-{number}" / "run.json").write_text(
            '{"status": "refused", "error": "no such lr"}'
        )
    out = compared(capsys, tmp_path / "none", "--html", tmp_path / "none.html").out
    assert out.startswith("2 runs: 2 refused\n") and "refused (2): refused-1, refused-2: no such lr\n" in out
    assert "no such lr" in (tmp_path / "none.html").read_text() and not list(tmp_path.rglob("*.png"))
    for seed in (0, 1):
        make(loss=None, seed=seed, status="failed")
    assert "2 runs: 2 failed" in compared(capsys, tmp_path / "runs", "--plot", tmp_path / "failed.png").out
    assert (tmp_path / "failed.png").is_file()


# ---------------------------------------------------------------- page

LOADS = re.compile(
    r"""(?:src|action|poster)\s*=|href\s*=\s*["']?[^"'#]|url\([^#]|@import|<(?:script|link|iframe|object|img)""",
    re.IGNORECASE,
)
EVIL = "<script>alert('&')</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with plots, of runs that hold markup in every place that is theirs; and the names of the runs."""
    root = tmp_path_factory.mktemp("page")
    make = maker(root)
    make("fine", samples=[(3, "early"), (6, f"a text with {EVIL}")])
    make("again", seed=1, started="2026-01-02T03:04:05+00:00", wall_seconds=93.4)
    make(EVIL.replace("/", ":"), attention="regular", choices={"attention": EVIL, "norm": "pre"})
    make("gone", seed=2, loss=None, status="failed", error=f"ValueError: {EVIL} " + "why " * 100)
    make("other", max_steps=4, git_dirty=True, device=EVIL)
    folders = sorted((root / "runs").iterdir())
    path = root / "page.html"
    options = ["--html", str(path), "--plot", str(root / "plot.svg"), "--baseline", "fine"]
    assert compare.main([*map(str, folders), *options]) == 0
    return path.read_text(encoding="utf-8"), [folder.name for folder in folders]


def test_the_page_has_every_run_and_needs_nothing_else(page):
    text, names = page
    assert len(names) == 5
    for name in names:
        assert text.count(html.escape(name).replace("&#x27;", "&#39;")) >= 3, name  # its row, configuration and place
    assert not LOADS.findall(text) and "http" not in text
    for said in (
        *("a text with", "after step 6", "5 runs: 4 finished, 1 failed", "ValueError", "the whole of it"),
        *("bytes trained on: 4,000", "and changes that were not committed", "c0ffee", "tokens_per_step"),
        *("train.py seed=1", "1.5000 ± 0.0000", "baseline", "Started 2026-01-02T03:04:05+00:00; 1.6 minutes in all<"),
    ):
        assert said in text, said
    assert text.count("<svg") == 12 and 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_the_page_escapes_whatever_a_run_holds(page):
    text, _ = page
    assert "<script" not in text.lower()
    assert text.count("&lt;script&gt;alert(&#39;&amp;&#39;)") >= 6  # the name, a text, an option, an error, a machine


@pytest.mark.parametrize("load", ['<img src="x">', "url(http://x)", 'href="x.css"', "@import 'x'", "<SCRIPT>"])
def test_a_page_that_loads_something_would_be_found(load):
    assert LOADS.search(load)


def test_the_plots_of_a_page_share_no_identifier(page):
    text, _ = page
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names)) > 100
    assert set(re.findall(r"""(?:href="|url\()#([^")]+)""", text)) <= set(names)


@pytest.mark.usefixtures("undrawn")
def test_the_page_hides_what_looks_like_a_secret(make, tmp_path, capsys):
    make(config={"logger": {"api_key": "abc123"}})
    compared(capsys, tmp_path / "runs", "--html", tmp_path / "page.html")
    assert "abc123" not in (tmp_path / "page.html").read_text()


def test_a_sample_that_cannot_be_read_is_said_in_its_place(make):
    folder = make(samples=[(1, "x")])
    (folder / "samples.txt").write_bytes(b"--- step 1 ---\n\xff\n")
    found = compare_page._sample(read_results(folder))
    assert found["step"] is None and found["text"].startswith("samples.txt cannot be read: ")


@pytest.mark.usefixtures("undrawn")
def test_the_first_comparison_still_reads(capsys, tmp_path):
    folder = Path(__file__).parent.parent / "docs" / "results" / "first_comparison" / "runs"
    out = compared(capsys, folder, "--plot", tmp_path / "x.png", "--baseline", "attention=regular").out
    assert "54 runs: 54 finished" in out and len(out.splitlines()) <= 60
    assert "│ cosine    │ pre  │ 1024    │ 0.002    │ 3 │ * 1.2758 ± 0.0073 │ -0.0529 ± 0.0020 (3) │" in out
