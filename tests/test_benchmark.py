"""The benchmark checks before it times, says what it refuses, and counts what it should."""

import json
import os
import signal
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import flash_cosine_sim_attention
from scripts import benchmark
from scripts.benchmark import Timer, captured, check, main
from scripts.contenders import Case, Contender, cache_normalised_keys, contenders, is_absent, make_inputs
from scripts.profiling import covered

CPU = torch.device("cpu")
SMALL = ["--batch", "1", "--heads", "2", "--head-dim", "16", "--num-times", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(Timer, "WARM_UP_S", 0.0)
    monkeypatch.setattr(Timer, "HOST_CALLS", 3)
    for module in ("flash_attn.cute", "flash_attn_interface"):  # not there, whatever is installed
        monkeypatch.setitem(sys.modules, module, None)


def case(**changes):
    return Case(**{**dict(batch=2, heads=4, kv_heads=4, seq_len=24, head_dim=16, dtype="float32", causal=False,
                          mask_prob=0.0, bias=False), **changes})  # fmt: skip


def report(path, *arguments):
    assert main([*SMALL, *arguments, f"--json={path / 'b.json'}"]) == 0
    return json.loads((path / "b.json").read_text())


# What is right.


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
    found, absent = contenders(["sdpa", "reference"], CPU)
    errors, refused = check(found, case(**options), CPU)
    assert {"ours (sdpa)", "ours (reference)", "naive einsum"} <= {c.name for c in found} - set(refused)
    # the CPU's flash kernel has no gradient for a mask
    assert not refused or options.get("bias")
    assert absent == ["predecessor (--predecessor)", "FlashAttention-4", "FlashAttention-3"]
    results = {"o", "dq", "dk", "dv", *(["dbias"] if options.get("bias") else [])}
    largest = 3e-2 if "dtype" in options else 1e-5
    for name in {c.name for c in found} - set(refused):
        assert errors[name].keys() == results and 0 < max(errors[name].values()) < largest


def test_a_wrong_contender_is_not_timed():
    def half_right(inputs, case):
        return contenders(["sdpa"], CPU)[0][0].attend(inputs, case) + 0.1 * (inputs.k - inputs.k.detach())

    def raises(*_):
        raise NameError("name 'forward' is not defined\nand more")

    wrong = Contender("wrong", lambda inputs, _: inputs.v + 0 * (inputs.q + inputs.k), cosine=True)
    nan = Contender("nan", lambda inputs, _: (inputs.q + inputs.k + inputs.v) * torch.nan, cosine=True)
    found = [wrong, nan, Contender("dk", half_right, True), Contender("raises", raises, False)]
    errors, refused = check([*found, *contenders(["cuda"], CPU)[0][:1]], case(), CPU)
    assert "wrong: relative RMS error" in refused["wrong"] and refused["wrong"].endswith("of o against float64")
    assert "error nan of o" in refused["nan"]
    assert "of dk against" in refused["dk"]
    assert refused["raises"] == "name 'forward' is not defined"
    assert refused["ours (cuda)"].startswith("backend='cuda'")
    assert errors.keys() == {"wrong", "nan", "dk"}


def test_the_check_is_small_and_the_json_has_no_nan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CHECKED_LENGTH", 8)
    nan = Contender("bad", lambda inputs, _: (inputs.q + inputs.k + inputs.v) * torch.nan, cosine=True)
    monkeypatch.setattr(benchmark, "contenders", lambda *_: ([*contenders(["sdpa"], CPU)[0], nan], []))
    found = report(tmp_path, "--batch", "5", "--seq-len", "16", "--dtype", "float32")
    assert {(row["batch"], row["seq_len"]) for row in found["accuracy"]} == {(2, 8)}
    assert {(row["batch"], row["seq_len"]) for row in found["rows"]} == {(5, 16)}
    assert [row["o"] for row in found["accuracy"] if row["contender"] == "bad"] == [None]
    assert "bad" not in {row["contender"] for row in found["rows"]}
    assert "not timed: bad, float32: wrong: relative RMS error nan of o" in capsys.readouterr().out


# A run.


def test_a_run_writes_its_tables_numbers_and_plot(tmp_path, capsys):
    options = ["--seq-len", "32", "16", "--causal", "--backend", "auto", "cuda", "--dtype", "float32", "bfloat16"]
    found = report(tmp_path, *options, "--host", f"--plot={tmp_path / 'new' / 'b.png'}")
    printed = capsys.readouterr().out
    assert "seq_len 16, float32" in printed and "seq_len 32, bfloat16" in printed
    assert "not timed: ours (cuda), bfloat16: backend='cuda'" in printed
    assert "not installed: predecessor (--predecessor), FlashAttention-4, FlashAttention-3" in printed
    names = {"ours (auto)", "naive einsum", "l2norm + SDPA flash", "SDPA flash, no norm"}
    expected = {(dtype, length, name) for dtype in ("float32", "bfloat16") for length in (16, 32) for name in names}
    assert {(row["dtype"], row["seq_len"], row["contender"]) for row in found["rows"]} == expected
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 for row in found["rows"])
    for row in found["rows"]:  # the host's time where it is not the device's
        assert (
            (row["seq_len"] == 16) == ("host_us_grad" in row) == ("host_us_no_grad" in row) == ("host_us_both" in row)
        )
        assert row["cosine"] == ("no norm" not in row["contender"])
    assert {(row["dtype"], row["contender"]) for row in found["accuracy"]} == {(d, n) for d, _, n in expected}
    assert found["refused"].keys() == found["gemm_tflops"].keys() == {"float32", "bfloat16"}
    assert found["versions"]["torch"] == torch.__version__ and "flash-attn-4" in found["versions"]
    assert found["timed_on"] == "cpu" and found["command"] and "git_commit" in found
    assert (tmp_path / "new" / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_stopped_keeps_the_lengths_before(tmp_path, monkeypatch):
    def stopped(inputs, case):
        if (case.dtype, case.seq_len) == ("bfloat16", 32):
            raise KeyboardInterrupt
        return contenders(["sdpa"], CPU)[0][0].attend(inputs, case)

    monkeypatch.setattr(benchmark, "contenders", lambda *_: ([Contender("stopped", stopped, True)], ["some"]))
    path = tmp_path / "b.json"
    assert main([*SMALL, "--seq-len", "16", "32", "--dtype", "float32", "bfloat16", f"--json={path}"]) == 130
    found = json.loads(path.read_text())
    rows = [(row["dtype"], row["seq_len"]) for row in found["rows"]]
    assert rows == [("float32", 16), ("float32", 32), ("bfloat16", 16)]
    assert all(row["both_ms"] > 0 for row in found["rows"]) and len(found["accuracy"]) == 2
    assert found["refused"] == {"float32": {}, "bfloat16": {}}
    assert found["timed_on"] == "cpu" and found["not_installed"] == ["some"]


def test_sustained_load_is_measured_beside_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Timer, "SUSTAINED_S", 0.001)
    for row in report(tmp_path, "--seq-len", "16", "--sustained")["rows"]:
        assert row["forward_ms"] > 0 and row["sustained_forward_ms"] > 0 and row["sustained_both_ms"] > 0
        assert row["forward_ghz"] is row["both_ghz"] is None  # on a CPU
    assert "under continuous load" in capsys.readouterr().out


def test_sustained_load_over_rounds_is_without_a_clock_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Timer, "SUSTAINED_S", 0.001)
    some = ("--contenders", "ours", "--seq-len", "16", "32")
    rows = report(tmp_path, *some, "--sustained", "--rounds", "2")["rows"]
    assert [(row["seq_len"], row["forward_ghz"], row["both_ghz"]) for row in rows] == [
        (16, None, None),
        (32, None, None),
    ]
    assert all(row["sustained_both_ms"] > 0 and len(row["rounds"]["both_ms"]) == 2 for row in rows)
    assert capsys.readouterr().out.count("under continuous load") == 2


def test_few_queries_are_judged_by_what_they_read(tmp_path, capsys):
    found = report(tmp_path, "--seq-len", "32", "--seq-len-q", "2", "--kv-heads", "1")
    assert all(row["seq_len_q"] == 2 and row["forward_ms"] > 0 for row in found["rows"]) and found["rows"]
    assert "reading keys and values" in capsys.readouterr().out
    assert found["copy_tb_s"] == {"bfloat16": None}  # on a CPU
    assert case(seq_len=32, seq_len_q=2).flops() == 4 * 2 * 4 * 2 * 32 * 16


@pytest.mark.parametrize(("flag", "key"), [("--only-forwards", "forward_ms"), ("--only-backwards", "backward_ms")])
def test_one_direction_alone(tmp_path, flag, key):
    for row in report(tmp_path, "--seq-len", "16", flag)["rows"]:
        assert {name for name in row if name.endswith("_ms")} == {key}


def test_each_direction(tmp_path):
    for row in report(tmp_path, "--seq-len", "16", "--each-direction")["rows"]:
        assert {name for name in row if name.endswith("_ms")} == {"forward_ms", "backward_ms", "both_ms"}


def test_some_contenders_alone(tmp_path, capsys):
    rows = report(tmp_path, "--seq-len", "16", "--contenders", "NAIVE", "sdpa flash,")["rows"]
    assert {row["contender"] for row in rows} == {"naive einsum", "SDPA flash, no norm"}
    assert main([*SMALL, "--seq-len", "16", "--contenders", "flash", "FlashAttention-9"]) == 2
    assert "--contenders must be parts of names, got 'FlashAttention-9'; accepted here" in capsys.readouterr().err


def test_keys_that_were_normalised_when_cached_are_so_once_and_outside_the_time():
    made = []

    def prepare(inputs):
        made.append(inputs)
        return cache_normalised_keys(inputs)

    decoding = {c.name: c for c in contenders(["sdpa"], CPU, decoding=True)[0]}
    assert decoding.keys() - {c.name for c in contenders(["sdpa"], CPU)[0]} == {
        "ours (sdpa), keys normalised when cached", "SDPA flash, keys normalised when cached"
    }  # fmt: skip
    one_query = case(seq_len_q=1, kv_heads=2)
    for name in decoding:
        if "when cached" in name:
            errors, refused = check([decoding[name]], one_query, CPU)  # gradients too, through the cached keys' norm
            assert not refused and 0 < max(errors[name].values()) < 1e-5
            contender = replace(decoding[name], prepare=prepare)
            benchmark.measure(contender, one_query, Timer(CPU, 4), {"forward_ms"}, host=False)
    assert len(made) == 2 and not torch.equal(made[0].k, cache_normalised_keys(made[0]).k)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_compiled_norms_are_right_and_in_one_compilation(dtype):
    torch.compiler.reset()
    found = [c for c in contenders(["cuda"], torch.device("cuda"), decoding=True)[0] if c.name != "naive einsum"]
    assert {"compiled l2norm + SDPA cudnn", "SDPA cudnn, keys normalised when cached"} <= {c.name for c in found}
    for options in ({}, {"seq_len": 96, "batch": 1}, {"seq_len_q": 1}):
        errors, refused = check(found, case(head_dim=64, dtype=dtype, **options), torch.device("cuda"))
        serves = {c.name for c in found} - set(refused)
        expected = "SDPA efficient" if dtype == "float32" else "compiled l2norm + SDPA cudnn"
        assert any(expected in name for name in serves), refused
        assert not [reason for reason in refused.values() if reason.startswith("wrong")]


@pytest.mark.gpu
def test_on_a_gpu_the_backward_pass_of_compiled_norms_is_timed_alone():
    torch.compiler.reset()
    device = torch.device("cuda")
    found = [c for c in contenders(["cuda"], device)[0] if c.name == "compiled l2norm + SDPA flash"]
    with benchmark.repeatable_backward():
        timed = benchmark.measure(*found, case(dtype="bfloat16"), Timer(device, 3), set(benchmark.DIRECTIONS), False)
    assert "error" not in timed and set(benchmark.DIRECTIONS) <= set(timed), timed


@pytest.mark.parametrize(
    ("options", "donates"), [([], True), (["--only-forwards"], True), (["--each-direction"], False)]
)
def test_what_is_timed_alone_is_compiled_to_run_again(tmp_path, monkeypatch, options, donates):
    from torch._functorch import config

    found = contenders(["sdpa"], CPU)[0][:1]
    seen = []

    def attend(inputs, problem):
        seen.append(config.donated_buffer)
        return found[0].attend(inputs, problem)

    monkeypatch.setattr(benchmark, "contenders", lambda *_: ([Contender("one", attend, True)], []))
    with config.patch(donated_buffer=True):
        report(tmp_path, "--seq-len", "16", *options)
        assert set(seen) == {donates} and config.donated_buffer


@pytest.mark.gpu
def test_a_graph_replays_what_was_captured():
    device = torch.device("cuda")
    one_query = case(head_dim=64, dtype="bfloat16", seq_len_q=1)
    for contender in contenders(["cuda"], device, decoding=True)[0]:
        inputs = contender.prepared(make_inputs(one_query, device)).detached()
        with contender.setting(), torch.no_grad():
            expected = contender.attend(inputs, one_query)
            replay = captured(lambda c=contender, i=inputs: c.attend(i, one_query))
            replay().zero_()
            torch.testing.assert_close(replay(), expected)


def test_contenders_take_turns_and_medians_are_over_the_rounds(tmp_path, monkeypatch):
    found, order = contenders(["sdpa"], CPU)[0][:2], []
    times = {found[0].name: iter((3.0, 1.0, 2.0)), found[1].name: iter((5.0, 5.0, 4.0))}

    def measured(contender, **how):
        assert how["directions"] == {"forward_ms", "both_ms"} and not how["graphs"]
        order.append(contender.name)
        ms = next(times[contender.name])
        return {"forward_ms": ms, "both_ms": 3 * ms, "peak_mib": 8.0}

    monkeypatch.setattr(benchmark, "contenders", lambda *_: (found, []))
    monkeypatch.setattr(benchmark, "measure", measured)
    rows = report(tmp_path, "--seq-len", "16", "--rounds", "3")["rows"]
    assert order == [contender.name for contender in found] * 3
    assert [(row["forward_ms"], row["both_ms"], row["peak_mib"]) for row in rows] == [(2, 6, 8), (5, 15, 8)]
    assert rows[0]["rounds"] == {"forward_ms": [3, 1, 2], "both_ms": [9, 3, 6]}


def test_who_fails_takes_no_further_turn():
    fine, fails = contenders(["sdpa"], CPU)[0][:2]
    results = {fine: [{"forward_ms": 2.0}] * 3, fails: [{"forward_ms": 1.0}, {"error": "gone"}]}
    left = {contender: list(of) for contender, of in results.items()}
    measured = benchmark.in_turns([fine, fails], lambda contender: left[contender].pop(0), 3)
    assert measured[fails] == {"error": "gone", "rounds": {}} and not any(left.values())
    assert measured[fine] == {"forward_ms": 2, "rounds": {"forward_ms": [2, 2, 2]}}
    assert benchmark.in_turns([fails], lambda _: {"error": "at once"}, 2) == {fails: {"error": "at once"}}


def test_a_contender_that_fails_at_a_length_stops_no_other(tmp_path, monkeypatch, capsys):
    first = contenders(["sdpa"], CPU)[0][:2]

    def limited(inputs, case):
        if case.seq_len > 16:
            raise torch.OutOfMemoryError if inputs.q.requires_grad else RuntimeError("too long")
        return first[0].attend(inputs, case)

    found = [Contender("limited", limited, True), *first]
    monkeypatch.setattr(benchmark, "contenders", lambda *_: (found, []))
    rows = report(tmp_path, "--seq-len", "16", "32", "--dtype", "float32")["rows"]
    assert [row.get("error") for row in rows] == [None] * 3 + ["too long", None, None]
    rows = report(tmp_path, "--seq-len", "16", "32", "--dtype", "float32", "--only-backwards")["rows"]
    assert [row.get("error") for row in rows] == [None] * 3 + ["out of memory", None, None]
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--host", "--sustained", "--each-direction"])
def test_a_contender_whose_backward_pass_fails_has_its_row_in_every_table(tmp_path, monkeypatch, capsys, option):
    """Its forward pass is timed, and dashes stand for the rest."""
    monkeypatch.setattr(Timer, "SUSTAINED_S", 0.001)
    first = contenders(["sdpa"], CPU)[0][0]

    def out_of_memory(_):
        raise torch.OutOfMemoryError

    def attend(inputs, case):
        o = first.attend(inputs, case)
        if o.requires_grad:
            o.register_hook(out_of_memory)
        return o

    limited = Contender("limited", attend, True)
    monkeypatch.setattr(benchmark, "contenders", lambda *_: ([limited, first], []))
    monkeypatch.setattr(benchmark, "check", lambda *_: ({}, {}))
    row, other = report(tmp_path, "--seq-len", "16", option)["rows"]
    assert row["error"] == "out of memory" and "both_ms" in other and "both_ms" not in row
    assert ("host_us_grad" if option == "--host" else "forward_ms") in row
    assert "│ limited" in capsys.readouterr().out


def test_calls_are_made_with_one_kernel_and_with_gradient_only_where_it_is_timed():
    seen = []

    def attend(inputs, _):
        seen.append((inputs.q.requires_grad, torch.is_grad_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return inputs.q + inputs.k + inputs.v

    contender = Contender("flash", attend, False, SDPBackend.FLASH_ATTENTION)
    result = benchmark.measure(contender, case(), Timer(CPU, 2), {"forward_ms", "both_ms"}, host=True)
    assert list(result) == ["host_us_no_grad", "host_us_grad", "host_us_both", "forward_ms", "both_ms"]
    host, calls = 3 + Timer.HOST_ROUNDS * Timer.HOST_CALLS, 3 + 2
    assert seen == [(grad, grad, False) for grad, n in ((False, host), (True, 2 * host), (False, calls), (True, calls))
                    for _ in range(n)]  # fmt: skip
    assert torch.backends.cuda.math_sdp_enabled()


def test_nothing_to_time_is_said(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "contenders", lambda *_: (contenders(["cuda"], CPU)[0][:1], []))
    assert main([*SMALL, "--seq-len", "16"]) == 2
    captured = capsys.readouterr()
    assert "not timed: ours (cuda)" in captured.out and "nothing was timed" in captured.err


def test_ratios_are_to_ours_wherever_it_stands():
    times = {"naive einsum": 3.0, "ours (cuda)": 1.5}
    measured = {Contender(name, None, True): {"forward_ms": ms} for name, ms in times.items()}
    table = benchmark._table(case(seq_len=1000), measured, 1.0)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["x ours"] == ["2.00", "1.00"]
    tflops = 4 * 2 * 4 * 1000 * 1000 * 16 / 3e-3 / 1e12
    assert columns["TFLOP/s"][0] == f"{tflops:.1f}" and columns["of GEMM"][0] == f"{tflops:.0%}"


def test_operations_are_counted_as_stated():
    assert case(seq_len=100).flops() == 4 * 2 * 4 * 100 * 100 * 16
    assert case(seq_len=100, causal=True).flops() == 4 * 2 * 4 * 5050 * 16


# The plot.


def test_the_plot_tells_ours_and_no_norm_apart(tmp_path, monkeypatch):
    from matplotlib import pyplot

    names = ["naive einsum", "ours (cuda)", "SDPA flash, no norm", *(f"other {n}" for n in range(10))]
    rows = [
        {**vars(case(seq_len=length)), "contender": name, "cosine": "no norm" not in name, "both_ms": 1.0}
        | ({} if name == "naive einsum" and length == 8192 else {"forward_ms": 2.0})
        for name in names
        for length in (128, 8192)
    ]
    monkeypatch.setattr(pyplot, "close", lambda _: None)
    benchmark.plot(rows, tmp_path / "p.png", "H200, float32: batch 2")
    figure = pyplot.gcf()
    monkeypatch.undo()
    assert figure.get_suptitle() == "H200, float32: batch 2" and len(figure.legends) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    colours = []
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["128", "8192"]
        lines = dict(zip(names, axes.get_lines(), strict=True))
        assert max(lines, key=lambda name: lines[name].get_linewidth()) == "ours (cuda)"
        assert [name for name in names if lines[name].get_linestyle() == "--"] == ["SDPA flash, no norm"]
        colours.append([line.get_color() for line in lines.values()])
    assert len(colours) == 2 and colours[0] == colours[1] and len(set(colours[0])) == len(names)
    forward, both = (axes.get_lines()[1].get_ydata()[1] for axes in figure.axes)
    assert forward == pytest.approx(case(seq_len=8192).flops() / 2e-3 / 1e12)
    assert both == pytest.approx(3.5 * case(seq_len=8192).flops() / 1e-3 / 1e12)
    pyplot.close(figure)


# Arguments.


def cases_of(monkeypatch, *arguments):
    asked = []
    monkeypatch.setattr(benchmark, "contenders", lambda *_: ([], []))
    part = {"accuracy": [], "gemm_tflops": None, "copy_tb_s": None, "refused": {}, "rows": []}
    monkeypatch.setattr(benchmark, "_compare", lambda listed, *_: asked.extend(listed) or [part])
    assert main(["--device", "cpu", *arguments]) == 2  # for nothing was timed
    return asked


def test_presets(monkeypatch):
    old = cases_of(monkeypatch, "--causal", "--dtype", "float16")
    assert {(c.batch, c.heads, c.kv_heads, c.head_dim, c.dtype, c.causal) for c in old} == {
        (4, 8, 8, 64, "float16", True)
    }
    assert [c.seq_len for c in old] == [128, 256, 512, 1024, 2048, 4096, 8192]
    paper = cases_of(monkeypatch, "--preset", "hidden2048", "--head-dim", "128")
    assert [(c.batch, c.seq_len) for c in paper] == [(8, 2048), (4, 4096), (2, 8192), (1, 16384)]
    assert {(c.heads, c.kv_heads, c.head_dim, c.dtype) for c in paper} == {(16, 16, 128, "bfloat16")}
    some = cases_of(monkeypatch, "--preset", "hidden2048", "--seq-len", "1024", "--kv-heads", "8")
    assert [(c.batch, c.heads, c.kv_heads, c.seq_len) for c in some] == [(16, 32, 8, 1024)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-heads", "3"], "--kv-heads must divide --heads 2, got 3"),
        (["--mask-prob", "1.5"], r"must be a number in [0, 1), got '1.5'"),
        (["--seq-len", "0"], "must be an integer of at least 1, got '0'"),
        (["--preset", "hidden2048"], "sets --batch and --heads itself"),
        (["--only-backwards", "--sustained"], "--only-backwards takes no --sustained"),
        (["--only-backwards", "--seq-len-q", "1"], "--only-backwards takes no --seq-len-q"),
        (["--plot", "x.xyz"], "--plot must end in .png, .svg or .pdf, got 'x.xyz'"),
        (["--predecessor", "nowhere"], "--predecessor nowhere has no flash_cosine_sim_attention; pip install"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_few_queries_are_not_causal(capsys):
    assert main([*SMALL, "--seq-len-q", "1", "--causal"]) == 2
    assert "--seq-len-q takes no --causal" in capsys.readouterr().err


def test_graphs_need_a_gpu(capsys):
    assert main([*SMALL, "--only-forwards", "--graphs"]) == 2
    assert "--graphs needs a GPU and --only-forwards" in capsys.readouterr().err


def test_the_preset_refuses_what_does_not_divide(capsys):
    assert main(["--device", "cpu", "--preset", "hidden2048", "--seq-len", "3000"]) == 2
    assert "takes a --seq-len that divides 16384, got 3000" in capsys.readouterr().err


# Timing.


@pytest.fixture
def call(monkeypatch):
    """A call of 10 ms, by a clock that nothing else moves."""

    def call():
        call.count += 1
        call.now += 0.01

    call.count, call.now = 0, 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: call.now)
    return call


@pytest.mark.parametrize(
    ("num_times", "longest_s", "warm_up_s", "calls"),
    [
        (20, 9.0, 0.0, 3 + 20),
        (2, 9.0, 0.0, 3 + 2),
        (20, 0.075, 0.0, 3 + 7),
        (20, 0.001, 0.0, 3 + 3),
        (2, 0.001, 0.0, 3 + 2),
        (2, 9.0, 0.095, 1 + 10 + 2),
    ],
)
def test_the_number_of_calls_follows_their_length(monkeypatch, call, num_times, longest_s, warm_up_s, calls):
    monkeypatch.setattr(Timer, "LONGEST_S", longest_s)
    monkeypatch.setattr(Timer, "WARM_UP_S", warm_up_s)
    assert Timer(CPU, num_times).median_ms(call) == pytest.approx(10)
    assert call.count == calls


@pytest.mark.parametrize(("seconds", "calls"), [(0.09, 3 + 16), (0.29, 3 + 5), (0.31, 2 + 4), (1, 2 + 3), (3.7, 2 + 3)])
def test_slow_calls_are_few(call, seconds, calls):
    def slow():
        call()
        call.now += seconds - 0.01

    assert Timer(CPU, 20).median_ms(slow) == pytest.approx(1e3 * seconds)
    assert call.count == calls


def test_host_time_is_that_of_one_call(call):
    assert Timer(CPU, 1).host_us(call) == pytest.approx(10_000)
    assert call.count == 3 + Timer.HOST_ROUNDS * Timer.HOST_CALLS


def test_sustained_time_is_that_of_one_call(monkeypatch, call):
    monkeypatch.setattr(Timer, "SUSTAINED_S", 0.095)
    assert Timer(CPU, 1).sustained_ms(call) == (pytest.approx(10), None)
    assert call.count == 3 + 10


@pytest.mark.gpu
def test_the_clock_is_one_that_the_gpu_has():
    from scripts.sm_clock import start_sm_clock

    device = torch.device("cuda")
    assert 0.2 < start_sm_clock(device)() < 4


def gpu_timer(monkeypatch, happened, **options):
    """A timer of two calls on a GPU that is not there; happened says what was done, pauses by their seconds."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def elapsed_time(self, _end):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: happened.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append(f"wait {cycles}"))
    monkeypatch.setattr(time, "sleep", lambda seconds: happened.append(seconds))
    timer = Timer(CPU, 2, **options)
    timer.on_gpu, timer.flush = True, types.SimpleNamespace(zero_=lambda: happened.append("flush"))
    return timer


def test_on_a_gpu_events_bracket_the_call_alone(monkeypatch):
    happened = []
    timer = gpu_timer(monkeypatch, happened)
    assert timer.median_ms(lambda: happened.append("call")) == 7.0
    timed = ["flush", "event", "call", "event"] * 2
    pause = happened.pop(6)
    assert happened == ["call", "synchronize"] * 3 + timed + ["synchronize"]
    assert 0 < pause < 0.1  # that call took no time; one of a millisecond or more gets PAUSE_S
    for seconds, expected in ((1e-4, 0.05), (1e-3, Timer.PAUSE_S), (1.0, Timer.PAUSE_S)):
        happened.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Timer, "_warm_up", lambda _timer, _call, seconds=seconds: seconds)
            timer.median_ms(lambda: None)
        assert happened[0] == pytest.approx(expected)
    happened.clear()
    timer.host_us(lambda: happened.append("call"))
    rounds = (["synchronize"] + ["call"] * Timer.HOST_CALLS) * Timer.HOST_ROUNDS
    assert happened == ["call", "synchronize"] * 3 + rounds + ["synchronize"]
    happened.clear()
    clock = types.SimpleNamespace(start_sm_clock=lambda _device: happened.append("clock") or (lambda: 1.5))
    monkeypatch.setitem(sys.modules, "scripts.sm_clock", clock)
    monkeypatch.setattr(Timer, "_warm_up", lambda _timer, _call: 0.05)
    assert timer.sustained_ms(lambda: happened.append("call")) == (7.0 / 5, 1.5)
    load, measured = ["call"] * 4, ["event"] + ["call"] * 5 + ["event"]
    assert happened == ["clock", *load, *measured, "clock", "synchronize"]


def test_kernels_that_run_at_once_keep_the_gpu_busy_once():
    assert covered([(10.0, 14.0), (0.0, 3.0), (12.0, 13.0), (13.5, 20.0), (2.0, 4.0)]) == 4 + 10
    assert covered([(5.0, 6.0)]) == 1


class Profiler:
    """Sees of each call two kernels that overlap, one of them of another stream, after a gap and inside two ranges."""

    happened: list = []
    round_us = 0.0

    def __init__(self, activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self):
        self.happened.append("profile")
        return self

    def __exit__(self, *_):
        self.happened.append("end")

    def events(self):
        calls = self.happened[-self.happened[::-1].index("profile") :].count("call")
        type(self).round_us += 1000.0  # each round is slower
        for start in range(0, calls * 100_000, 100_000):
            yield self.event("one", start + 50, start + 250)
            yield self.event("two", start + 200, start + 250 + self.round_us)
            yield self.event("range", start, start + 90_000, is_user_annotation=True)
            yield self.event("on the host", start, start + 90_000, device_type=torch.autograd.DeviceType.CPU)

    @staticmethod
    def event(name, start, end, device_type=torch.autograd.DeviceType.CUDA, **more):
        time_range = types.SimpleNamespace(start=start, end=end)
        return types.SimpleNamespace(name=name, time_range=time_range, device_type=device_type, **more)


@pytest.fixture
def busy_timer(monkeypatch):
    """A GPU's timer of busy times, by a profiler and a GPU that are not there; profiler.happened says what was done."""
    monkeypatch.setattr(Profiler, "happened", [])
    monkeypatch.setattr(Profiler, "round_us", 0.0)
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: Profiler.happened.append("synchronize"))
    monkeypatch.setattr(time, "sleep", lambda _: Profiler.happened.append("pause"))
    timer = Timer(CPU, 4, busy=True)
    timer.on_gpu = True
    return timer


def test_busy_times_are_those_of_kernels_alone(busy_timer):
    happened = Profiler.happened
    busy = busy_timer.call_ms(lambda: happened.append("call"))
    assert busy == pytest.approx(2.2)  # the second of three rounds: 200 us, and 2000 of the other kernel
    one_round = ["pause", "synchronize", "profile", *["call"] * 4, "synchronize", "end"]
    assert happened == ["call", "synchronize"] * 3 + one_round * 3
    happened.clear()
    assert busy_timer.busy_ms(lambda: happened.append("call"), rounds=1, calls=10) == pytest.approx(4.2)
    assert happened.count("profile") == 1 and happened.count("call") == 3 + 10
    assert busy_timer.times == "busy" and "busy times of the GPU" in busy_timer.note


@pytest.mark.parametrize(("seconds", "rounds", "calls"), [(0.05, 3, 10), (0.3, 3, 1), (3.7, 3, 1), (3.7, 1, 3)])
def test_slow_calls_are_profiled_few_times(busy_timer, monkeypatch, seconds, rounds, calls):
    monkeypatch.setattr(Timer, "_warm_up", lambda *_: seconds)
    busy_timer.num_times = 20
    busy_timer.busy_ms(lambda: Profiler.happened.append("call"), rounds)
    assert Profiler.happened.count("call") == rounds * calls


def test_a_profiler_that_sees_nothing_is_no_busy_time(busy_timer, monkeypatch):
    monkeypatch.setattr(Profiler, "events", lambda _: [])
    with pytest.raises(ValueError, match="the profiler saw no kernel"):
        busy_timer.busy_ms(lambda: None)


def test_busy_times_of_each_direction_are_of_that_alone(busy_timer, monkeypatch):
    happened = Profiler.happened
    monkeypatch.setattr(Profiler, "events", lambda profiler: [profiler.event("one", 0, 1)])
    monkeypatch.setattr(benchmark, "peak_mib", lambda _: 0.0)

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            happened.append("forward")
            return x * x

        @staticmethod
        def backward(_ctx, do):
            happened.append("backward")
            return do

    contender = Contender("square", lambda inputs, _: Square.apply(inputs.q + inputs.k + inputs.v), cosine=False)
    monitored = {"forward_ms": ["forward"], "backward_ms": ["backward"], "both_ms": ["forward", "backward"]}
    for direction, expected in monitored.items():
        happened.clear()
        benchmark._measure({}, contender, case(), busy_timer, {direction}, *[False] * 3)
        profiled = " ".join(happened).split("profile ")[1:]
        assert len(profiled) == 3
        for one in profiled:
            assert one.split(" synchronize end")[0].split() == expected * 4


def test_tables_and_json_say_that_times_are_busy_times(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Timer, "times", "busy")
    monkeypatch.setattr(Timer, "note", property(lambda timer: "\nbusy, it says" if timer.busy else ""))
    titles = []
    monkeypatch.setattr(benchmark, "plot", lambda _rows, _path, title: titles.append(title))
    found = report(tmp_path, "--busy", "--seq-len", "32", "--seq-len-q", "2", f"--plot={tmp_path / 'b.png'}")
    assert found["times"] == "busy" and all(row["forward_ms"] > 0 for row in found["rows"])
    assert capsys.readouterr().out.count("busy, it says") == 2 and titles[0].endswith("\nbusy, it says")
    assert benchmark._lists_table([case()], {}, "\nbusy").title.endswith("\nbusy")


def test_on_a_cpu_busy_times_are_a_clocks_and_said_to_be(tmp_path, capsys):
    found = report(tmp_path, "--busy", "--each-direction", "--seq-len", "16")
    assert found["times"] == found["timed_on"].replace("cpu", "clock") == "clock"
    assert all(row["backward_ms"] > 0 for row in found["rows"])
    assert "by a clock: only a GPU has busy times" in capsys.readouterr().out
    assert report(tmp_path, "--seq-len", "16")["times"] == "clock"
    assert "busy" not in capsys.readouterr().out


@pytest.mark.parametrize("other", ["--graphs", "--host", "--sustained", "--queued"])
def test_busy_goes_with_no_other_way_of_timing(capsys, other):
    assert main([*SMALL, "--only-forwards", "--busy", other]) == 2
    assert f"--busy takes no {other}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--graphs", "--host", "--sustained"])
def test_a_queue_goes_with_no_other_way_of_timing(capsys, option):
    assert main([*SMALL, "--only-forwards", "--queued", option]) == 2
    assert f"--queued takes no {option}" in capsys.readouterr().err


@pytest.mark.parametrize("queued", [False, True])
def test_the_gpu_waits_before_the_first_call_of_a_queue(monkeypatch, queued):
    happened = []
    timer = gpu_timer(monkeypatch, happened, queued=queued)
    monkeypatch.setattr(Timer, "_warm_up", lambda *_: 0.002)
    assert timer.call_ms(lambda: happened.append("call")) == 7.0
    waits = ["wait 12000000"] if queued else []  # two calls of 2 ms: 4 ms at 3 GHz
    assert happened == [Timer.PAUSE_S, *waits, *["flush", "event", "call", "event"] * 2, "synchronize"]
    assert timer.times == ("queued" if queued else "events") and ("queued" in timer.note) == queued


def test_on_a_cpu_there_is_no_queue_which_is_said(tmp_path, capsys):
    assert report(tmp_path, "--queued", "--seq-len", "16")["times"] == "clock"
    assert "by a clock: only a GPU has a queue" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu_a_slow_host_does_not_count_in_a_queue():
    x = torch.ones(1, device="cuda")

    def slow():
        time.sleep(2e-3)
        x.add_(1)

    device = torch.device("cuda")
    assert Timer(device, 10).call_ms(slow) > 2 > 0.2 > Timer(device, 10, queued=True).call_ms(slow)


@pytest.mark.gpu
def test_on_a_gpu_a_long_call_is_busy_for_the_time_of_its_events():
    device, long = torch.device("cuda"), case(heads=16, kv_heads=16, seq_len=8192, head_dim=64, dtype="bfloat16")
    ours = contenders(["cuda"], device)[0][0]
    events, busy = (
        benchmark.measure(ours, long, Timer(device, 10, busy), set(benchmark.DIRECTIONS), host=False)
        for busy in (False, True)
    )
    for key in benchmark.DIRECTIONS:
        assert 0.8 * events[key] < busy[key] < 1.1 * events[key], (key, events, busy)
    assert busy["forward_ms"] + busy["backward_ms"] == pytest.approx(busy["both_ms"], rel=0.1)


def test_the_gpu_is_described(monkeypatch):
    commands = []

    def answer(command, **_):
        commands.append(command)
        return types.SimpleNamespace(stdout="580.1, 700.00 W, 1980 MHz, 345 MHz\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1a-2b"))
    monkeypatch.setattr(benchmark.subprocess, "run", answer)
    gpu = benchmark.machine(torch.device("cuda"))["gpu"]
    assert gpu["driver_version"] == "580.1" and gpu["power.limit"] == "700.00 W" and gpu["clocks.sm"] == "345 MHz"
    assert "--id=GPU-1a-2b" in commands[0]
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="No devices\n"))
    assert benchmark.machine(torch.device("cuda"))["gpu"] is None
    assert benchmark.machine(CPU)["gpu"] is None


# Packages that may be there.


def by_name(found, name):
    return next(contender for contender in found if contender.name == name)


def test_flash_attention_is_taken_along(monkeypatch):
    shapes = []

    def flash_attn_func(q, k, v, causal=False):
        shapes.append(q.shape)
        o = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v)), is_causal=causal)
        return o.transpose(1, 2), None

    modules = {name: types.ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface")}
    modules["flash_attn.cute"].flash_attn_func = flash_attn_func
    modules["flash_attn_interface"].flash_attn_func = lambda *qkv, **options: flash_attn_func(*qkv, **options)[0]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found, absent = contenders(["sdpa"], CPU)
    assert absent == ["predecessor (--predecessor)"]
    names = ["FlashAttention-4, no norm", "FlashAttention-3, no norm"]
    two = [by_name(found, name) for name in names]
    errors, refused = check(two, case(dtype="bfloat16", causal=True), CPU)
    assert set(errors) == set(names) and not refused
    assert set(shapes) == {(2, 24, 4, 16)}
    for options in ({"dtype": "float32"}, {"dtype": "float16", "mask_prob": 0.5}, {"dtype": "float16", "bias": True}):
        assert "float16 and bfloat16, no mask" in check(two, case(**options), CPU)[1][names[0]]


def test_a_package_that_does_not_import_says_why(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    found, absent = contenders(["sdpa"], CPU)
    assert "FlashAttention-4" in absent and "FlashAttention-3" not in absent
    refused = check([by_name(found, "FlashAttention-3, no norm")], case(dtype="float16"), CPU)[1]
    assert refused["FlashAttention-3, no norm"] == "No module named 'no_such_dependency'"


@pytest.mark.parametrize(
    ("name", "absent"), [("a", True), ("a.b", True), ("a.b.c", False), ("ab", False), (None, False)]
)
def test_absent_is_the_module_or_a_package_that_it_is_in(name, absent):
    assert is_absent(ModuleNotFoundError(name=name), "a.b") == absent
    assert not is_absent(ImportError(name=name), "a.b")


def write_predecessor(folder, scale="scale"):
    """A package like the predecessor's: its own name, absolute imports, a compiled extension beside it."""
    package = folder / "flash_cosine_sim_attention"
    package.mkdir()
    (folder / "flash_cosine_sim_attention_cuda_9_9.py").write_text("from torch import einsum\n")
    (folder / "flash_cosine_sim_attention-9.9.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: flash-cosine-sim-attention\nVersion: 9.9\n"
    (folder / "flash_cosine_sim_attention-9.9.dist-info" / "METADATA").write_text(metadata)
    (package / "__init__.py").write_text(
        "from flash_cosine_sim_attention.flash_cosine_sim_attention import flash_cosine_sim_attention\n"
        "from flash_cosine_sim_attention.other import triton_flash_cosine_sim_attention\n"
    )
    (package / "other.py").write_text(
        "from flash_cosine_sim_attention.flash_cosine_sim_attention import flash_cosine_sim_attention\n"
        "def triton_flash_cosine_sim_attention(q, *others, **options):\n"
        "    return flash_cosine_sim_attention(0.5 * q.abs(), *others, **options)\n"
    )
    (package / "flash_cosine_sim_attention.py").write_text(
        "import importlib, torch\n"
        "einsum = importlib.import_module('flash_cosine_sim_attention_cuda_9_9').einsum\n"
        "def flash_cosine_sim_attention(q, k, v, mask=None, scale=8, groups=1, causal=False, l2norm_qk=True):\n"
        "    assert not (causal and mask is not None), 'mask should not be supplied'\n"
        "    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))\n"
        f"    s = einsum('bhid,bhjd->bhij', q, k) * {scale}\n"
        "    if causal:\n"
        "        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -1e30)\n"
        "    if mask is not None:\n"
        "        s = s.masked_fill(~mask[:, None, None], -1e30)\n"
        "    return s.softmax(-1) @ v\n"
    )


def test_the_predecessor_is_loaded_beside_ours(tmp_path):
    write_predecessor(tmp_path)
    ours = {name: module for name, module in sys.modules.items() if name.startswith("flash_cosine_sim_attention")}
    path = list(sys.path)
    found, absent = contenders(["sdpa"], CPU, tmp_path)
    extension = sys.modules.pop("flash_cosine_sim_attention_cuda_9_9")
    now = {name: module for name, module in sys.modules.items() if name.startswith("flash_cosine_sim_attention")}
    assert now == ours and sys.path == path and extension
    assert sys.modules["flash_cosine_sim_attention"] is flash_cosine_sim_attention
    assert "predecessor (--predecessor)" not in absent
    old = [by_name(found, name) for name in ("predecessor 9.9", "predecessor 9.9 Triton")]
    assert all(contender.folder == tmp_path for contender in old)
    old = [replace(contender, folder=None) for contender in old]  # checked here, which is faster
    for options in ({"causal": True}, {"mask_prob": 0.4}):
        refused = check(old, case(**options), CPU)[1]
        assert refused.keys() == {"predecessor 9.9 Triton"} and "wrong" in refused["predecessor 9.9 Triton"]
    refused = check(old, case(mask_prob=0.4, causal=True), CPU)[1]
    assert refused["predecessor 9.9"] == "mask should not be supplied"
    assert "unexpected keyword argument 'attn_bias'" in check(old, case(bias=True), CPU)[1]["predecessor 9.9"]


def test_a_predecessor_that_does_not_import_says_why(tmp_path):
    write_predecessor(tmp_path)
    (tmp_path / "flash_cosine_sim_attention_cuda_9_9.py").unlink()
    path = list(sys.path)
    found, _ = contenders(["sdpa"], CPU, tmp_path)
    assert sys.modules["flash_cosine_sim_attention"] is flash_cosine_sim_attention and sys.path == path
    refused = check([by_name(found, "predecessor 9.9")], case(), CPU)[1]
    assert refused["predecessor 9.9"] == "No module named 'flash_cosine_sim_attention_cuda_9_9'"


@pytest.mark.slow
def test_a_predecessor_that_crashes_takes_no_other_with_it(tmp_path, capsys):
    write_predecessor(tmp_path)
    package = tmp_path / "flash_cosine_sim_attention"
    (package / "__init__.py").write_text(
        "import os, sys, torch\n"
        "from flash_cosine_sim_attention.flash_cosine_sim_attention import flash_cosine_sim_attention as right\n"
        "def flash_cosine_sim_attention(q, *others, **options):\n"
        "    if q.dtype == torch.float32:\n"
        "        return right(q, *others, **options)\n"
        f"    assert os.getpid() != {os.getpid()}, 'not apart'\n"
        "    os.write(2, b'CUDA Error at: kernel.cu:25\\nan illegal memory access\\n')\n"
        "    os.abort() if q.dtype == torch.float16 else os._exit(3)\n"
    )
    dtypes = ("float32", "float16", "bfloat16")
    found = report(tmp_path, "--seq-len", "16", "--dtype", *dtypes, f"--predecessor={tmp_path}")
    sys.modules.pop("flash_cosine_sim_attention_cuda_9_9")
    aborted = f"crashed: {signal.strsignal(signal.SIGABRT)}: an illegal memory access"
    left = "crashed: exit status 3: an illegal memory access"
    refused = [found["refused"][dtype].get("predecessor 9.9") for dtype in dtypes]
    assert refused == [None, aborted, left]
    assert f"not timed: predecessor 9.9, float16: {aborted}" in capsys.readouterr().out
    assert found["versions"]["predecessor"] == "9.9"
    for key in ("rows", "accuracy"):
        timed = {(row["contender"], row["dtype"]) for row in found[key]}
        assert {dtype for name, dtype in timed if name == "predecessor 9.9"} == {"float32"}
        assert {dtype for name, dtype in timed if name == "naive einsum"} == set(dtypes)


@pytest.mark.slow
def test_a_predecessor_that_does_not_finish_or_raises_is_refused(tmp_path, monkeypatch):
    write_predecessor(tmp_path)
    old = [by_name(contenders(["sdpa"], CPU, tmp_path)[0], "predecessor 9.9")]
    sys.modules.pop("flash_cosine_sim_attention_cuda_9_9")
    assert check(old, case(mask_prob=0.4, causal=True), CPU)[1] == {"predecessor 9.9": "mask should not be supplied"}
    monkeypatch.setattr(benchmark, "LONGEST_CHECK_S", 0.01)
    assert check(old, case(), CPU)[1] == {"predecessor 9.9": "crashed: not finished in 0.01 s"}
