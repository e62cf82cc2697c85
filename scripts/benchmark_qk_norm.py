"""Speed of the attention part of models with QK-norm: one call of ours against their norms and the fastest attention.

    python -m scripts.benchmark_qk_norm --json qk_norm.json
    python -m scripts.benchmark_qk_norm --models nanochat --only-region

The models, their shapes and their arithmetic are scripts/qk_norm_models.py's. Theirs are PyTorch's RMS norms, their
gains and, as far as it can serve, each of SDPA by cuDNN's and by PyTorch's flash kernel, FlashAttention-4 and -3 where
they are installed, and for packed sequences PyTorch's varlen_attn. On a CPU, SDPA gets a window as a mask; on a GPU,
where that would be no fair opponent, windows need FlashAttention.

- eager: forward + backward of norms and attention, and of our one call on the same q, k and v, as a median of CUDA
  events (of a clock on a CPU), data random, the L2 cache flushed before each call.
- region: rotary embedding, norms and attention as one function, compiled by torch.compile: what the GPU is busy for a
  forward + backward, by the profiler (on a CPU a clock). No time of the host counts.

Before that, output and gradients of each are compared with float64 attention in the model's order, on fewer tokens; one
that is wrong or cannot serve is listed with the reason and not timed. Contenders take turns, --rounds times; a result
is the median over the rounds. ratio is the fastest of theirs over ours: above 1 we are faster.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_cosine_sim_attention.interface import BACKENDS
from models.training.environment import environment
from models.training.tables import print_line, show
from scripts import Parser, check_file, choose_device, integer, run_script
from scripts.benchmark import LARGEST_ERROR, Timer, first_line, machine, picked
from scripts.contenders import DTYPES, FLASH_ATTENTION, VARLEN_ATTN, VARLEN_MODULE, is_absent, versions
from scripts.qk_norm_models import (
    MODELS,
    Inputs,
    Model,
    exact,
    make_inputs,
    ours,
    relative_errors,
    results,
    theirs,
    visible,
)

CHECKED_TOKENS = 2048
SUMMED = 4  # a gain's gradient is one sum for a head, in which most cancels: it may be so much less exact
PROFILED_CALLS = 10
COMPILER = "inductor"
MODES = ("eager", "region")


@dataclass(frozen=True)
class Contender:
    """A function of (model, inputs, rotary=); ``whole``: torch.compile takes it without a break in the graph."""

    name: str
    call: Callable[..., Tensor]
    kernel: SDPBackend | None = None
    whole: bool = True

    def setting(self) -> AbstractContextManager:
        """What its calls are made in."""
        return nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)


def contenders(model: Model, backend: str, device: torch.device) -> tuple[list[Contender], list[str]]:
    """Ours first, then all that can serve the model; and the names of what is not installed."""
    found = [Contender(f"ours ({backend})", partial(ours, backend=backend))]
    absent = []
    if model.window is None and model.lengths is None:
        kernels = {"flash": SDPBackend.FLASH_ATTENTION}
        kernels |= {"cudnn": SDPBackend.CUDNN_ATTENTION} if device.type == "cuda" else {}
        found += [_theirs(f"norms + SDPA {name}", sdpa, kernel) for name, kernel in kernels.items()]
    elif device.type != "cuda":
        found.append(_theirs("norms + SDPA, masked", sdpa))
    packages = [(name, module, flash_attention) for name, (module, _, _) in FLASH_ATTENTION.items()]
    if model.lengths is not None:
        packages.append((VARLEN_ATTN, VARLEN_MODULE, varlen_attn))
    for name, module, attend in packages:
        try:
            package = import_module(module)
        except Exception as error:  # other people's code: whatever it raises
            absent.append(name if is_absent(error, module) else f"{name} ({first_line(error)})")
            continue
        if device.type == "cuda":
            found.append(_theirs(f"norms + {name}", partial(attend, package=package), whole=False))
    return found, absent


def _theirs(
    name: str, attend: Callable[..., Tensor], kernel: SDPBackend | None = None, whole: bool = True
) -> Contender:
    # Their own kernels are opaque to torch.compile: what is around them is compiled.
    attend = attend if whole else torch.compiler.disable(attend)
    return Contender(name, partial(theirs, attend=attend), kernel, whole)


def sdpa(q: Tensor, k: Tensor, v: Tensor, model: Model, inputs: Inputs) -> Tensor:
    """PyTorch's scaled_dot_product_attention; a window or packed sequences are a mask over all pairs to it."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    plain = model.window is None and model.lengths is None
    if not plain:
        q, k, v = (x if x.ndim == 4 else x.unsqueeze(0) for x in (q, k, v))
    mask = None if plain else visible(model, inputs, q.shape[-2])
    options = {"scale": model.softmax_scale, "enable_gqa": model.kv_heads != model.heads}
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, **options).transpose(-3, -2)
    return o if model.lengths is None else o.squeeze(0)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, model: Model, inputs: Inputs, package: ModuleType) -> Tensor:
    """FlashAttention-3's or -4's functions."""
    options: dict[str, Any] = {"softmax_scale": model.softmax_scale, "causal": True}
    if model.window is not None:
        options["window_size"] = model.window_size
    if model.lengths is None:
        result = package.flash_attn_func(q, k, v, **options)
    else:
        result = package.flash_attn_varlen_func(q, k, v, **_ends(inputs), **options)
    return result[0] if isinstance(result, tuple) else result  # some versions return the log-sum-exp, too


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, model: Model, inputs: Inputs, package: ModuleType) -> Tensor:
    """PyTorch's torch.nn.attention.varlen.varlen_attn; a causal mask is a window to it."""
    options = {} if model.kv_heads == model.heads else {"enable_gqa": True}
    ends = _ends(inputs).values()  # it has other names for them
    return package.varlen_attn(q, k, v, *ends, scale=model.softmax_scale, window_size=model.window_size, **options)


def _ends(inputs: Inputs) -> dict[str, Any]:
    ends, longest = inputs.cu_seqlens, inputs.longest
    return {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}


def check(
    candidates: Sequence[Contender], model: Model, device: torch.device, dtype: str
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The relative RMS errors of each contender that ran, and why some are not to be timed."""
    smaller = model.smaller(CHECKED_TOKENS)
    inputs = make_inputs(smaller, device, DTYPES[dtype])
    right, errors, refused = exact(smaller, inputs), {}, {}
    for contender in candidates:
        try:
            with contender.setting():
                found = results(contender.call(smaller, inputs), inputs)
        except Exception as error:  # other people's code: whatever it raises
            refused[contender.name] = first_line(error)
            continue
        errors[contender.name] = relative_errors(found, right)
        for name, error in errors[contender.name].items():
            if not error <= LARGEST_ERROR[dtype] * (SUMMED if name == "dgain_q" else 1):
                refused[contender.name] = f"wrong: relative RMS error {error:.1e} of {name} against float64"
                break
    return errors, refused


def eager_call(contender: Contender, model: Model, inputs: Inputs) -> Callable[[], object]:
    """Forward + backward of norms and attention."""
    leaves = inputs.leaves()
    return lambda: torch.autograd.grad(contender.call(model, inputs, rotary=False), leaves, inputs.do)


def region_call(contender: Contender, model: Model, inputs: Inputs) -> Callable[[], object]:
    """Forward + backward of rotary embedding, norms and attention, compiled as one function."""

    def region(*tensors: Tensor) -> Tensor:
        return contender.call(model, inputs.with_tensors(tensors))

    # torch.compile keeps what it made by code object, and its guards do not see which contender this is: with one code
    # for all, one would run what was compiled for another, or not at all where the other breaks the graph.
    region.__code__ = region.__code__.replace()
    compiled = torch.compile(region, backend=COMPILER, fullgraph=contender.whole, dynamic=False)
    leaves, tensors = inputs.leaves(), inputs.tensors()

    def call() -> object:
        # The cache of AOTAutograd does not see SDPA's kernel: cuDNN's region would be the flash kernel's.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return torch.autograd.grad(compiled(*tensors), leaves, inputs.do)

    return call


def measure(
    candidates: Sequence[Contender], model: Model, timer: Timer, dtype: str, modes: Sequence[str], rounds: int
) -> dict[str, dict[str, Any]]:
    """Times in ms by contender: of each mode the median and every round's; `error` says what stopped one."""
    inputs = make_inputs(model, timer.device, DTYPES[dtype])
    busy_ms = partial(timer.busy_ms, rounds=1, calls=PROFILED_CALLS)  # the rounds are those of the contenders here
    makers = {"eager": (eager_call, timer.median_ms), "region": (region_call, busy_ms)}
    measured: dict[str, dict[str, Any]] = {contender.name: {} for contender in candidates}
    for mode in modes:
        torch._dynamo.reset()
        make_call, time = makers[mode]
        calls = {contender.name: make_call(contender, model, inputs) for contender in candidates}
        for _ in range(rounds):
            for contender in candidates:
                result = measured[contender.name]
                if "error" in result:
                    continue
                try:
                    with contender.setting():
                        result.setdefault(f"{mode}_rounds_ms", []).append(time(calls[contender.name]))
                except Exception as error:  # other people's code: whatever it raises
                    result["error"] = f"{mode}: {first_line(error)}"
        for result in measured.values():
            if f"{mode}_rounds_ms" in result:
                result[f"{mode}_ms"] = statistics.median(result[f"{mode}_rounds_ms"])
    return measured


def ratios(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By mode the fastest of theirs, its time, ours, and their ratio; modes that one side lacks are left out."""
    name, *others = measured
    found = {}
    for mode in MODES:
        key = f"{mode}_ms"
        times = {other: measured[other][key] for other in others if key in measured[other]}
        if times and key in measured[name]:
            fastest = min(times, key=times.__getitem__)
            pair = {"ours_ms": measured[name][key], "theirs_ms": times[fastest]}
            found[mode] = {"fastest": fastest, **pair, "ratio": pair["theirs_ms"] / pair["ours_ms"]}
    return found


def run(arguments: argparse.Namespace) -> None:
    """Checks, times, prints, writes."""
    device = choose_device(arguments.device)
    models = picked(MODELS, arguments.models, "--models")
    modes = [mode for mode in MODES if mode in (arguments.only or MODES)]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        check_file("--json", arguments.json)
    report: dict[str, Any] = {**environment(), "rounds": arguments.rounds, "dtype": arguments.dtype, "models": []}
    report["versions"] |= versions(None)
    timer = Timer(device, arguments.num_times)
    missing: set[str] = set()
    for model in models:
        model = model if arguments.tokens is None else model.smaller(arguments.tokens)
        found, absent = contenders(model, arguments.backend, device)
        missing.update(absent)
        entry = _compare(found, model, timer, arguments.dtype, modes, arguments.rounds)
        report["models"].append(entry)
        if arguments.json:  # after each model: what is measured is kept, whatever becomes of the next
            report |= {"not_installed": sorted(missing), **machine(device)}
            arguments.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print_line(f"not installed: {', '.join(sorted(missing)) or 'none'}")
    if not any(entry["ratios"] for entry in report["models"]):
        raise ValueError("nothing was compared: either side has no contender that is right and serves these models")


def _compare(
    found: Sequence[Contender], model: Model, timer: Timer, dtype: str, modes: Sequence[str], rounds: int
) -> dict[str, Any]:
    """The report's part on one model."""
    errors, refused = check(found, model, timer.device, dtype)
    right = [contender for contender in found if contender.name not in refused]
    measured = measure(right, model, timer, dtype, modes, rounds)
    # Ours must come first: without it there is nothing to compare with.
    compared = ratios(measured) if right and right[0] is found[0] else {}
    show(_table(model, measured, errors, modes))
    for mode, pair in compared.items():
        print_line(f"{model.name}, {mode}: {pair['fastest']} takes {pair['ratio']:.2f} times our time")
    for name, reason in refused.items():
        print_line(f"not timed: {name}, {model.name}: {reason}")
    rows = [{"contender": name, "errors": errors[name], **result} for name, result in measured.items()]
    return {**asdict(model), "scale": model.scale, "rows": rows, "refused": refused, "ratios": compared}


def _table(
    model: Model, measured: dict[str, dict[str, Any]], errors: dict[str, dict[str, float]], modes: Sequence[str]
) -> Table:
    heads = model.heads if model.heads == model.kv_heads else f"{model.heads}/{model.kv_heads}"
    shape = f"{model.batch} x {model.seq_len}, heads {heads}, head_dim {model.head_dim}"
    window = "" if model.window is None else f", window {model.window}"
    table = Table(title=f"{model.name}: {shape}{window}, forward + backward")
    table.add_column("contender")
    for heading in (*(f"{mode} ms" for mode in modes), "error of o", "of dq", "of dk", "of dv"):
        table.add_column(heading, justify="right")
    for name, result in measured.items():
        times = [f"{result[f'{mode}_ms']:.3f}" if f"{mode}_ms" in result else "-" for mode in modes]
        found = [f"{errors[name][key]:.1e}" for key in ("o", "dq", "dk", "dv")]
        table.add_row(f"{name}: {result['error']}" if "error" in result else name, *times, *found)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", metavar="PART", help="only those whose name has one of these parts, such as golf"
    )
    only = parser.add_mutually_exclusive_group()
    for mode in MODES:
        only.add_argument(f"--only-{mode}", dest="only", action="store_const", const=(mode,))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--tokens", type=integer(4), metavar="N", help="at most so many tokens, to try it out")
    parser.add_argument("--rounds", type=integer(1), default=5, help="turns that contenders take (default: 5)")
    parser.add_argument(
        "--num-times", type=integer(1), default=20, help="eager calls a turn (default: 20); fewer where they take long"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers, machine and versions here, after each model")
    return run_script(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
