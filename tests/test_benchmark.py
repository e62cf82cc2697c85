"""The benchmark checks before it times, says what it refuses, and counts what it should."""

import json

import pytest
import torch

from scripts import benchmark
from scripts.benchmark import Case, Contender, contenders, main, reason_not_to_time

CPU = torch.device("cpu")
SMALL = ["--batch", "1", "--heads", "2", "--head-dim", "16", "--num-times", "2", "--device", "cpu"]


def case(**changes):
    return Case(**{**dict(batch=2, heads=4, kv_heads=4, seq_len=24, head_dim=16, dtype="float32", causal=False,
                          mask_prob=0.0, bias=False), **changes})  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"mask_prob": 0.3},
        {"mask_prob": 0.3, "causal": True},
        {"bias": True, "causal": True},
        {"kv_heads": 2},
        {"dtype": "bfloat16"},
    ],
)
def test_every_contender_is_right_or_says_why_not(options):
    reasons = {c.name: reason_not_to_time(c, case(**options), CPU) for c in contenders(["sdpa", "reference"], CPU)}
    assert [reasons[name] for name in ("ours (sdpa)", "ours (reference)", "naive einsum")] == [None] * 3
    # the CPU's flash kernel has no gradient for a mask
    assert all(reason is None for reason in reasons.values()) or options.get("bias")


def test_a_wrong_contender_is_not_timed():
    wrong = Contender("wrong", lambda inputs, _: inputs.v + 0 * (inputs.q + inputs.k), cosine=True)
    assert "wrong: relative RMS error" in reason_not_to_time(wrong, case(), CPU)
    ours = contenders(["cuda"], CPU)[0]
    assert "backend='cuda'" in reason_not_to_time(ours, case(), CPU)


def test_a_run_writes_its_table_numbers_and_plot(tmp_path, capsys):
    files = [f"--json={tmp_path / 'b.json'}", f"--plot={tmp_path / 'b.png'}"]
    assert main([*SMALL, "--seq-len", "32", "16", "--causal", "--backend", "auto", "cuda", *files]) == 0
    printed = capsys.readouterr().out
    assert "seq_len 16, causal" in printed and "seq_len 32, causal" in printed
    assert "not timed: ours (cuda): backend='cuda'" in printed
    report = json.loads((tmp_path / "b.json").read_text())
    assert {row["seq_len"] for row in report["rows"]} == {16, 32}
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 for row in report["rows"])
    assert report["versions"]["torch"] == torch.__version__
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("flag", "key"), [("--only-forwards", "forward_ms"), ("--only-backwards", "backward_ms")])
def test_one_direction_alone(tmp_path, flag, key):
    assert main([*SMALL, "--seq-len", "16", flag, f"--json={tmp_path / 'b.json'}"]) == 0
    for row in json.loads((tmp_path / "b.json").read_text())["rows"]:
        assert {name for name in row if name.endswith("_ms")} == {key}


def test_operations_are_counted_as_stated():
    assert case(seq_len=100).flops() == 4 * 2 * 4 * 100 * 100 * 16
    assert case(seq_len=100, causal=True).flops() == 4 * 2 * 4 * 5050 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-heads", "3"], "--kv-heads must divide --heads 2, got 3"),
        (["--mask-prob", "1.5"], r"must be a number in [0, 1), got '1.5'"),
        (["--seq-len", "0"], "must be an integer of at least 1, got '0'"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_median_leaves_out_the_warm_up():
    calls = []
    benchmark.median_ms(lambda: calls.append(1), CPU, 5)
    assert len(calls) == 8
