"""The CUDA kernels without a GPU: csrc/ compiled for the CPU, under emulator/, against the specification in float64.

What a wrong index, swizzle, fragment, mask, split or wait does shows here; what only a GPU knows does not: its
rounding, races within a warp, occupancy, time. Emulated kernels would replace the operators' CPU implementation in
this process, so a process of its own runs all cases; each test looks at the outcome of one.
"""

import contextlib
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
import traceback
from dataclasses import replace

import pytest
import torch
from emulator.build import build
from test_backends import GATES, Case, attend, check, results, rms
from test_kernels import HEAD_DIMS, OPTIONS, PADDED_HEAD_DIMS, describe

from flash_cosine_sim_attention import plain_cosine_sim_attention
from flash_cosine_sim_attention.reference import reference_backward, reference_forward

CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
NVCC = shutil.which("nvcc", path=f"{CUDA_HOME}/bin" if CUDA_HOME else None)

# All tests need one build and run, of 20 and 45 seconds, hence one worker: see test_compile.py.
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="emulation needs CUDA's headers, and no nvcc (CUDA_HOME/bin or PATH)"),
    pytest.mark.xdist_group("emulation"),
]

SHAPES = [(33, 70), (70, 33), (66, 130), (5, 200), (129, 65)]
RUN = "import sys, test_emulation; test_emulation.run_all(sys.argv[1])"


def wide(options):
    """Whether float16 takes the forward kernel with probabilities in TF32, as dispatch.cpp decides."""
    return "bias" in options or "learned_scale" in options or not options.get("l2norm_qk", True)


def covering_cases():
    """Every kernel, and padding in each, with two sets of options; every set with every dtype."""
    for dtype in GATES:
        taken = dict.fromkeys((False, True, None), 0)
        for head_dim in sorted(HEAD_DIMS + PADDED_HEAD_DIMS):
            for kind in (False, True) if dtype == torch.float16 else (None, None):
                candidates = [options for options in OPTIONS if kind is None or wide(options) == kind]
                options = dict(candidates[taken[kind] % len(candidates)])
                if "groups" in options:
                    options["groups"] = min(options["groups"], head_dim // 8)
                seq_len_q, seq_len_k = SHAPES[sum(taken.values()) % len(SHAPES)]
                taken[kind] += 1
                yield Case(dtype=dtype, head_dim=head_dim, seq_len_q=seq_len_q, seq_len_k=seq_len_k, **options)


@contextlib.contextmanager
def determinism():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_emulated(case, deterministic=False):
    with determinism() if deterministic else contextlib.nullcontext():
        check(case, ["operators"])


def check_tf32(case):
    exact = results(plain_cosine_sim_attention, case, torch.float64)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        ours = results(lambda **arguments: attend("operators", **arguments), case, torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    for name, expected in exact.items():
        error = rms(ours[name] - expected) / rms(expected)
        assert 1e-5 < error <= (2e-3 if name == "o" else 5e-3), (name, error)  # above: TF32 was used


def check_partials(case):
    def quotient(function):
        def run(**arguments):
            numerator, denominator = function(**arguments, return_partials=True)
            assert numerator.dtype == denominator.dtype != case.dtype or case.dtype == torch.float32
            return (numerator / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)).to(arguments["q"].dtype)

        return run

    exact = results(quotient(plain_cosine_sim_attention), case, torch.float64)
    ours = results(quotient(functools.partial(attend, "operators")), case, case.dtype)
    for name, expected in exact.items():
        limit = 2 * GATES[case.dtype] * (3 if name != "o" else 1)
        assert rms(ours[name] - expected) <= limit * rms(expected), (name, rms(ours[name] - expected) / rms(expected))


def check_operators(case):
    """row_sum_log2, its gradient, and every gradient alone, with the operators' own arguments."""
    tensors, options = case.tensors(case.dtype), case.options()
    q, k, v, bias, scale = (tensors.get(name) for name in ("q", "k", "v", "attn_bias", "scale"))
    scale_value, mask = options.pop("scale", 1.0), options.pop("mask", None)
    settings = case.groups, case.causal, case.l2norm_qk
    bias = None if bias is None else bias.expand(1, *bias.shape)
    inputs = q, k, v, mask, bias
    exact_inputs = *(tensor.double() for tensor in (q, k, v)), mask, None if bias is None else bias.double()
    exact_scale = scale_value if scale is None else scale.double()
    exact_o, exact_rows = reference_forward(*exact_inputs, exact_scale, *settings)
    operators = torch.ops.flash_cosine_sim_attention
    o, rows = operators.forward(*inputs, scale, scale_value, *settings, False)
    seen = exact_rows.isfinite()
    assert torch.equal(rows.isneginf(), ~seen) and (o[~seen] == 0).all()
    assert (rows[seen] - exact_rows[seen]).abs().max() <= GATES[case.dtype]
    do, drow = torch.randn(q.shape, dtype=case.dtype), torch.randn(rows.shape)
    names = ["dq", "dk", "dv"] + ["dattn_bias"] * (bias is not None) + ["dscale"] * (scale is not None)
    # All gradients, then each alone.
    for wanted in [names, *([name] for name in names)]:
        needs = [name in wanted for name in ("dq", "dk", "dv", "dattn_bias", "dscale")]
        rows_exact = exact_o, exact_rows, drow.double()
        exact = reference_backward(do.double(), *exact_inputs, exact_scale, *rows_exact, *settings, needs)
        ours = operators.backward(do, *inputs, scale, scale_value, o, rows, drow, *settings, False, *needs, True)
        for need, gradient, expected in zip(needs, ours, exact, strict=True):
            assert gradient.shape == expected.shape
            error = rms(gradient.double() - expected) / rms(expected) if need else 0
            assert error <= 4 * GATES[case.dtype], (wanted, error)


def named_checks():
    """Name -> a function without arguments that raises where a kernel is wrong."""
    checks = {describe(case): functools.partial(check_emulated, case) for case in covering_cases()}
    for head_dim in HEAD_DIMS:
        case = Case(head_dim=head_dim, seq_len_k=70, causal=True, num_kv_heads=2, bias="heads")
        checks[f"tf32-d{head_dim}"] = functools.partial(check_tf32, case)
    for dtype in GATES:
        name = str(dtype).removeprefix("torch.")
        case = Case(dtype=dtype, head_dim=64, seq_len_q=70, seq_len_k=130, num_kv_heads=2, mask=True)
        for label, options in {
            "biased": {"bias": "heads", "learned_scale": True, "causal": True},
            "grouped": {"groups": 4, "causal": True, "learned_scale": "scalar", "head_dim": 40},
            "raw": {"l2norm_qk": False, "learned_scale": True, "head_dim": 32},
        }.items():
            checks[f"operators-{label}-{name}"] = functools.partial(check_operators, replace(case, **options))
        checks[f"partials-{name}"] = functools.partial(check_partials, replace(case, causal=True))
        checks[f"partials-d256-{name}"] = functools.partial(check_partials, replace(case, head_dim=256))
        checks[f"deterministic-{name}"] = functools.partial(check_emulated, replace(case, bias="full"), True)
        checks[f"deterministic-d256-{name}"] = functools.partial(check_emulated, replace(case, head_dim=256), True)
        # So few blocks and so long walks over the queries that plan_backward splits them; with a factor for each
        # head, always.
        few = replace(case, batch=1, num_kv_heads=1, num_heads=8, seq_len_q=130, seq_len_k=33)
        checks[f"split-{name}"] = functools.partial(check_emulated, replace(few, mask=False, causal=True))
        raw = {"l2norm_qk": False, "learned_scale": True, "seq_len_q": 33}
        checks[f"split-by-head-{name}"] = functools.partial(check_emulated, replace(few, **raw), True)
    return checks


CHECKS = named_checks()


def run_all(library):
    """What the other process does: print, as JSON, why each check failed, or null."""
    torch.ops.load_library(library)
    outcomes = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            outcomes[name] = function()
        except Exception:
            outcomes[name] = traceback.format_exc()
    json.dump(outcomes, sys.stdout)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of run_all: the first worker of pytest-xdist that comes here builds and runs, any other waits for it."""
    workers = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent / "emulation" if workers else tmp_path_factory.mktemp("emulation")
    folder.mkdir(exist_ok=True)
    found = folder / "outcomes.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not found.exists():
            found.write_text(build_and_run(folder))
    return json.loads(found.read_text())


def build_and_run(folder):
    library = build(folder, NVCC)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", RUN, str(library)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", CHECKS)
def test_kernels(outcomes, name):
    assert outcomes[name] is None, outcomes[name]
