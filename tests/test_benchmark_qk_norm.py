"""The benchmark of models with QK-norm: it checks before it times, and compares ours with the fastest of theirs."""

import json
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend

from scripts import benchmark_qk_norm
from scripts.benchmark import Timer
from scripts.benchmark_qk_norm import (
    Contender,
    _theirs,
    check,
    contenders,
    main,
    measure,
    ratios,
    region_call,
    sdpa,
)
from scripts.qk_norm_models import MODELS, make_inputs, ours, results, theirs

CPU = torch.device("cpu")
SMALL = ["--tokens", "48", "--rounds", "2", "--num-times", "1", "--device", "cpu"]
BY_NAME = {model.name: model.smaller(48) for model in MODELS}


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(Timer, "WARM_UP_S", 0.0)
    monkeypatch.setattr(Timer, "FEWEST", 1)
    monkeypatch.setattr(benchmark_qk_norm, "COMPILER", "eager")  # traced into one graph, and not compiled
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_run_compares_every_model_and_writes_it_down(tmp_path, monkeypatch, capsys):
    """Of the models four: tracing each region takes a second."""
    names = ("nanochat d12", "parameter-golf 1024", "modded-nanogpt, key offset", "modded-nanogpt, paired heads")
    monkeypatch.setattr(benchmark_qk_norm, "MODELS", [model for model in MODELS if model.name in names])
    path = tmp_path / "new" / "b.json"
    assert main([*SMALL, "--json", str(path)]) == 0, capsys.readouterr().err
    found = json.loads(path.read_text())
    assert {entry["name"] for entry in found["models"]} == set(names)
    for entry in found["models"]:
        opponent = "norms + SDPA flash" if entry["window"] is None else "norms + SDPA, masked"
        assert [row["contender"] for row in entry["rows"]] == ["ours (auto)", opponent], entry["refused"]
        for row in entry["rows"]:
            assert 0 < row["errors"]["o"] < 0.02 and len(row["eager_rounds_ms"]) == len(row["region_rounds_ms"]) == 2
        for mode in ("eager", "region"):
            pair, (own, other) = entry["ratios"][mode], (row[f"{mode}_ms"] for row in entry["rows"])
            assert pair == {"fastest": opponent, "ours_ms": own, "theirs_ms": other, "ratio": other / own}
        assert entry["scale"] > 10
    assert "FlashAttention-3" in found["not_installed"]  # looked for, though a CPU could not run it
    assert found["timed_on"] == "cpu" and found["command"] and "git_commit" in found
    assert "flash-attn-4" in found["versions"] and found["dtype"] == "bfloat16"
    printed = capsys.readouterr().out
    assert "modded-nanogpt, paired heads, region: norms + SDPA, masked takes" in printed


def test_models_and_modes_are_picked(tmp_path, capsys):
    path = tmp_path / "b.json"
    assert main([*SMALL, "--models", "Golf 1024", "--only-eager", "--json", str(path)]) == 0
    (entry,) = json.loads(path.read_text())["models"]
    assert entry["name"] == "parameter-golf 1024" and entry["ratios"].keys() == {"eager"}
    assert "region_ms" not in entry["rows"][0] and "dgain_q" in entry["rows"][0]["errors"]
    assert main([*SMALL, "--models", "gpt-5"]) == 2
    assert "--models must be parts of names, got 'gpt-5'; accepted here: 'nanochat d12'" in capsys.readouterr().err


def test_a_run_that_is_stopped_keeps_the_models_before(tmp_path, monkeypatch, capsys):
    def stopped(model, inputs, rotary=True):
        if model.name == "parameter-golf 2048":
            raise KeyboardInterrupt
        return theirs(model, inputs, sdpa, rotary)

    found = contenders(BY_NAME["parameter-golf 1024"], "sdpa", CPU)[0][:1] + [Contender("stopped", stopped)]
    monkeypatch.setattr(benchmark_qk_norm, "contenders", lambda *_: (found, ["FlashAttention-4"]))
    path = tmp_path / "b.json"
    assert main([*SMALL, "--models", "golf", "--only-eager", "--json", str(path)]) == 130
    report = json.loads(path.read_text())
    (entry,) = report["models"]
    assert entry["name"] == "parameter-golf 1024" and [row["contender"] for row in entry["rows"]][1] == "stopped"
    assert report["timed_on"] == "cpu" and report["not_installed"] == ["FlashAttention-4"]
    assert "interrupted" in capsys.readouterr().err


def test_what_is_wrong_or_cannot_serve_is_not_timed(capsys):
    model = BY_NAME["nanochat d12"]
    right, fused = contenders(model, "sdpa", CPU)[0]
    wrong = Contender("wrong", lambda model, inputs, rotary=True: ours(model, inputs, "sdpa", rotary) * 1.1)
    errors, refused = check([right, fused, wrong, Contender("raises", lambda *_: 1 / 0)], model, CPU, "bfloat16")
    assert refused.keys() == {"wrong", "raises"} and errors.keys() == {right.name, fused.name, "wrong"}
    assert "relative RMS error" in refused["wrong"] and refused["raises"] == "division by zero"
    assert main([*SMALL, "--models", "d12", "--backend", "cuda", "--only-eager"]) == 2
    printed = capsys.readouterr()
    assert "not timed: ours (cuda), nanochat d12: backend='cuda'" in printed.out
    assert "nothing was compared" in printed.err


def test_what_fails_later_is_said_and_the_others_go_on():
    model = BY_NAME["nanochat d12"]
    calls = []

    def twice(model, inputs, rotary=True):
        calls.append(rotary)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("out of memory\nand more")
        return theirs(model, inputs, sdpa, rotary)

    found = [contenders(model, "sdpa", CPU)[0][0], Contender("twice", twice)]
    measured = measure(found, model, Timer(CPU, 1), "bfloat16", ["eager"], rounds=4)
    assert measured["twice"]["error"] == "eager: out of memory" and calls == [False] * 6
    assert len(measured["ours (sdpa)"]["eager_rounds_ms"]) == 4


def test_each_runs_what_was_compiled_for_it(monkeypatch):
    """Also those that call one function in other settings, and beside one that breaks the graph."""
    ran = []

    def compiler(graph, _):
        assert not torch._functorch.config.enable_autograd_cache  # where SDPA's kernels are one to it

        def run(*inputs):
            ran.append(graph)
            return graph(*inputs)

        return run

    monkeypatch.setattr(benchmark_qk_norm, "COMPILER", compiler)
    model = BY_NAME["nanochat d12"]
    inputs = make_inputs(model, CPU)
    found = [_theirs(kernel.name, sdpa, kernel) for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)]
    found.append(_theirs("opaque", lambda *arguments: sdpa(*arguments), whole=False))
    calls = [(contender, region_call(contender, model, inputs)) for contender in found]
    rounds = []
    for _ in range(2):
        for contender, call in calls:
            ran.clear()
            with contender.setting():
                call()
            rounds.append([id(graph) for graph in ran])
    first, again = rounds[: len(found)], rounds[len(found) :]
    assert first == again and all(first)
    assert len({graph for graphs in first for graph in graphs}) == sum(map(len, first))


def test_the_fastest_of_theirs_counts():
    measured = {
        "ours": {"eager_ms": 2.0, "region_ms": 1.0},
        "slow": {"eager_ms": 5.0},
        "fast": {"eager_ms": 3.0},
        "failed": {"error": "out of memory"},
    }
    pair = {"fastest": "fast", "ours_ms": 2.0, "theirs_ms": 3.0, "ratio": 1.5}
    assert ratios(measured) == {"eager": pair}


def test_a_region_is_timed_by_what_the_gpu_is_busy_for(monkeypatch):
    asked = []

    def busy_ms(_timer, _call, rounds, calls):
        asked.append((rounds, calls))
        return 1.0 + len(asked)

    monkeypatch.setattr(Timer, "busy_ms", busy_ms)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = BY_NAME["nanochat d12"]
    found = measure(contenders(model, "sdpa", CPU)[0][:1], model, Timer(CPU, 1), "bfloat16", ["region"], rounds=3)
    assert found == {"ours (sdpa)": {"region_rounds_ms": [2.0, 3.0, 4.0], "region_ms": 3.0}}
    assert asked == [(1, benchmark_qk_norm.PROFILED_CALLS)] * 3


@pytest.mark.parametrize("name", ["nanochat d12", "nanochat d12, window", "modded-nanogpt, long window"])
def test_what_other_packages_get(monkeypatch, name):
    """FlashAttention's functions and varlen_attn, by packages that look like them: theirs, whole and in a region."""
    model, seen = BY_NAME[name], []

    def stand_in(q, k, v, *ends, softmax_scale=None, scale=None, causal=True, window_size=(-1, -1), **named_ends):
        seen.append((len(ends) + len(named_ends), causal, window_size, softmax_scale or scale))
        return sdpa(q, k, v, model, inputs), "log-sum-exp"

    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = package.flash_attn_varlen_func = stand_in
    package.varlen_attn = lambda *arguments, **options: stand_in(*arguments, **options)[0]
    for module in ("flash_attn_interface", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, module, package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    found, absent = contenders(model, "auto", torch.device("cuda"))
    assert absent == ["FlashAttention-4"]
    inputs = make_inputs(model, "cpu")
    right = results(theirs(model, inputs, sdpa), inputs)
    others = [contender for contender in found if not contender.whole]
    assert len(others) == (2 if model.lengths else 1)
    for contender in others:
        one = results(contender.call(model, inputs), inputs)
        assert all(torch.equal(one[key], right[key]) for key in right)
        gradients = benchmark_qk_norm.region_call(contender, model, inputs)()
        assert all(map(torch.equal, gradients, list(right.values())[1:]))
    ends = 4 if model.lengths else 0
    assert {one[:3] for one in seen} == {(ends, True, (-1, -1) if model.window is None else (model.window, 0))}
    assert {one[3] for one in seen} == {model.softmax_scale}
