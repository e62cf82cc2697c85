"""Speed and memory of attention: ours against what PyTorch has, in one run.

    python -m scripts.benchmark --causal --dtype bfloat16
    python -m scripts.benchmark --batch 1 --heads 32 --seq-len 16384 --only-forwards --json h200.json --plot h200.png

Before anything is timed, output and gradients of every contender are compared with float64 attention on the same
inputs, at the smallest length; one that is wrong, or that cannot serve the case, is listed with the reason and not
timed. Times are medians of CUDA events (of a clock on a CPU) over --num-times calls on random data after warm-up, the
L2 cache flushed between calls. Ours includes the l2norm of q and k in every time. TFLOP/s count 4 * batch * heads *
head_dim operations for every visible pair of query and key forward, and 2.5 times that backward.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention
from models.environment import environment
from scripts import Parser, choose_device, integer, run_script

SCALE = 10.0
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The relative RMS error of output or a gradient beyond which a contender computes something else: several roundings.
LARGEST_ERROR = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One problem: shapes and options."""

    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    dtype: str
    causal: bool
    mask_prob: float
    bias: bool

    def flops(self) -> float:
        """Forward operations of the two matrix products, a causal row counting the keys it sees."""
        pairs = self.seq_len * (self.seq_len + 1) / 2 if self.causal else self.seq_len**2
        return 4 * self.batch * self.heads * pairs * self.head_dim


@dataclass
class Inputs:
    """q (batch, heads, seq_len, head_dim); k, v with kv_heads; mask (batch, seq_len); bias (heads, i, j); do like q."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    do: Tensor

    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [tensor for tensor in (self.q, self.k, self.v, self.bias) if tensor is not None]

    def double(self) -> "Inputs":
        """The same numbers in float64, for what is exact."""
        q, k, v, do = (tensor.detach().double() for tensor in (self.q, self.k, self.v, self.do))
        bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
        return Inputs(*(tensor.requires_grad_() for tensor in (q, k, v)), self.mask, bias, do)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random inputs of a case; every batch element keeps its first key."""
    dtype, generator = DTYPES[case.dtype], torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, device=device, dtype=dtype, generator=generator)
    shape = (case.batch, case.heads, case.seq_len, case.head_dim)
    kv_shape = (case.batch, case.kv_heads, case.seq_len, case.head_dim)
    q, k, v = (random(size).requires_grad_() for size in (shape, kv_shape, kv_shape))
    mask = bias = None
    if case.mask_prob:
        mask = torch.rand(case.batch, case.seq_len, device=device, generator=generator) >= case.mask_prob
        mask[:, 0] = True
    if case.bias:
        bias = random((case.heads, case.seq_len, case.seq_len)).requires_grad_()
    return Inputs(q, k, v, mask, bias, random(shape))


def ours(inputs: Inputs, case: Case, backend: str) -> Tensor:
    """flash_cosine_sim_attention."""
    return flash_cosine_sim_attention(
        inputs.q, inputs.k, inputs.v, inputs.mask, inputs.bias, SCALE, causal=case.causal, backend=backend
    )


def naive(inputs: Inputs, case: Case) -> Tensor:
    """Normalise, multiply, mask, softmax, multiply: every score in memory, as one writes it first."""
    q, k, v = F.normalize(inputs.q, dim=-1), F.normalize(inputs.k, dim=-1), inputs.v
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
    hidden = _hidden(inputs, case)
    if inputs.bias is not None:
        scores = scores + inputs.bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def sdpa(inputs: Inputs, case: Case, kernel: SDPBackend, normalise: bool) -> Tensor:
    """PyTorch's scaled_dot_product_attention by one of its kernels, with or without l2norm before it."""
    q, k = inputs.q, inputs.k
    if normalise:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attn_mask, is_causal = inputs.bias, case.causal
    if inputs.mask is not None or inputs.bias is not None:
        hidden, is_causal = _hidden(inputs, case), False
        if attn_mask is None:
            attn_mask = ~hidden
        elif hidden is not None:
            attn_mask = attn_mask.masked_fill(hidden, -math.inf)
    scale = SCALE if normalise else None
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(
            q, k, inputs.v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=case.kv_heads != case.heads
        )


def _hidden(inputs: Inputs, case: Case) -> Tensor | None:
    hidden = None if inputs.mask is None else ~inputs.mask[:, None, None, :]
    if case.causal:
        above = torch.ones(case.seq_len, case.seq_len, dtype=torch.bool, device=inputs.q.device).triu(1)
        hidden = above if hidden is None else hidden | above
    return hidden


@dataclass(frozen=True)
class Contender:
    """A function of (inputs, case); ``cosine`` says whether it normalises q and k."""

    name: str
    attend: Callable[[Inputs, Case], Tensor]
    cosine: bool


def contenders(backends: list[str], device: torch.device) -> list[Contender]:
    """Ours first, by each back end asked for, then everything that this installation has to offer."""
    found = [Contender(f"ours ({backend})", partial(ours, backend=backend), True) for backend in backends]
    found.append(Contender("naive einsum", naive, True))
    kernels = [("flash", SDPBackend.FLASH_ATTENTION)]
    if device.type == "cuda":
        kernels += [("cudnn", SDPBackend.CUDNN_ATTENTION), ("efficient", SDPBackend.EFFICIENT_ATTENTION)]
    for name, kernel in kernels:
        found.append(Contender(f"l2norm + SDPA {name}", partial(sdpa, kernel=kernel, normalise=True), True))
    for name, kernel in kernels:
        found.append(Contender(f"SDPA {name}, no norm", partial(sdpa, kernel=kernel, normalise=False), False))
    return found


def reason_not_to_time(contender: Contender, case: Case, device: torch.device) -> str | None:
    """Why a contender cannot be timed on a case: what it raised, or how far off it is; None if it is right."""
    inputs = make_inputs(case, device)
    wide = inputs.double()
    if contender.cosine:
        o = plain_cosine_sim_attention(wide.q, wide.k, wide.v, wide.mask, wide.bias, SCALE, causal=case.causal)
    else:
        o = sdpa(wide, case, SDPBackend.MATH, normalise=False)
    expected = [o, *torch.autograd.grad(o, wide.leaves(), wide.do)]
    try:
        o = contender.attend(inputs, case)
        results = [o, *torch.autograd.grad(o, inputs.leaves(), inputs.do)]
    except (RuntimeError, ValueError, ImportError) as error:
        return str(error).strip().split("\n", 1)[0]
    for name, result, exact in zip(("o", "dq", "dk", "dv", "dbias"), results, expected, strict=False):
        error = ((result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
        if not error <= LARGEST_ERROR[inputs.q.dtype]:
            return f"wrong: relative RMS error {error:.1e} of {name} against float64"
    return None


def measure(contender: Contender, case: Case, device: torch.device, only: str | None, num_times: int) -> dict:
    """Median times in ms and peak memory in MiB beyond the inputs."""
    inputs = make_inputs(case, device)
    result = {}
    if only != "backwards":
        with torch.no_grad():
            result["forward_ms"] = median_ms(lambda: contender.attend(inputs, case), device, num_times)
    if only == "backwards":
        o = contender.attend(inputs, case)
        result["backward_ms"] = median_ms(
            lambda: torch.autograd.grad(o, inputs.leaves(), inputs.do, retain_graph=True), device, num_times
        )
    if only is None:
        both = lambda: torch.autograd.grad(contender.attend(inputs, case), inputs.leaves(), inputs.do)  # noqa: E731
        result["both_ms"] = median_ms(both, device, num_times)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            torch.cuda.synchronize()
            result["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result


def median_ms(call: Callable[[], object], device: torch.device, num_times: int) -> float:
    """The median time of a call in ms, the L2 cache flushed before each."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return 1e3 * statistics.median(_clock(call) for _ in range(num_times))
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)  # larger than any L2 cache
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_times)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gemm_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """TFLOP/s of an 8192^3 matrix product of random numbers: what attention could at best reach."""
    if device.type != "cuda":
        return None
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=dtype).unbind(0)
    return 2 * 8192**3 / median_ms(lambda: a @ b, device, 10) / 1e9


def cases(arguments: argparse.Namespace) -> list[Case]:
    """One case a length."""
    kv_heads = arguments.kv_heads or arguments.heads
    if arguments.heads % kv_heads:
        raise ValueError(f"--kv-heads must divide --heads {arguments.heads}, got {kv_heads}")
    return [
        Case(
            arguments.batch,
            arguments.heads,
            kv_heads,
            seq_len,
            arguments.head_dim,
            arguments.dtype,
            arguments.causal,
            arguments.mask_prob,
            arguments.bias,
        )
        for seq_len in sorted(arguments.seq_len)
    ]


def run(arguments: argparse.Namespace) -> None:
    """Checks, times, prints, writes."""
    device = choose_device(arguments.device)
    problems = cases(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    candidates, refused = [], {}
    for contender in contenders(arguments.backend, device):
        reason = reason_not_to_time(contender, problems[0], device)
        if reason:
            refused[contender.name] = reason
        else:
            candidates.append(contender)
    peak = gemm_tflops(device, DTYPES[arguments.dtype])
    only = "forwards" if arguments.only_forwards else "backwards" if arguments.only_backwards else None
    rows = []
    for case in problems:
        measured = {}
        for contender in candidates:
            try:
                measured[contender.name] = measure(contender, case, device, only, arguments.num_times)
            except torch.OutOfMemoryError:
                measured[contender.name] = {"error": "out of memory"}
        console.print(_table(case, measured, peak))
        rows += [{**asdict(case), "contender": name, **result} for name, result in measured.items()]
    for name, reason in refused.items():
        console.print(f"not timed: {name}: {reason}", markup=False, highlight=False)
    report = {**environment(), "gemm_tflops": peak, "scale": SCALE, "refused": refused, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


def _table(case: Case, measured: dict[str, dict], peak: float | None) -> Table:
    options = f"{case.dtype}, batch {case.batch}, heads {case.heads}/{case.kv_heads}, head_dim {case.head_dim}"
    table = Table(title=f"seq_len {case.seq_len}{', causal' if case.causal else ''}: {options}")
    table.add_column("contender")
    first = next(iter(measured.values()))
    factors = {"forward_ms": 1.0, "backward_ms": 2.5, "both_ms": 3.5}
    times = [key for key in factors if any(key in result for result in measured.values())]
    for key in times:
        for heading in (key.replace("_ms", " ms"), "x ours", "TFLOP/s", *(["of GEMM"] if peak else [])):
            table.add_column(heading, justify="right")
    table.add_column("peak MiB", justify="right")
    for name, result in measured.items():
        cells = []
        for key in times:
            if key not in result:
                cells += ["-"] * (4 if peak else 3)
                continue
            tflops = factors[key] * case.flops() / result[key] / 1e9
            ratio = f"{result[key] / first[key]:.2f}" if key in first else "-"
            cells += [f"{result[key]:.3f}", ratio, f"{tflops:.1f}", *([f"{tflops / peak:.0%}"] if peak else [])]
        memory = result.get("error") or (f"{result['peak_mib']:.0f}" if "peak_mib" in result else "-")
        table.add_row(name, *cells, memory)
    return table


def plot(rows: list[dict], path: Path) -> None:
    """TFLOP/s against sequence length, a line a contender, a panel a direction, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    factors = {"forward_ms": 1.0, "backward_ms": 2.5, "both_ms": 3.5}
    directions = [key for key in factors if any(key in row for row in rows)]
    figure, panels = pyplot.subplots(
        1, len(directions), figsize=(6 * len(directions), 4.5), constrained_layout=True, squeeze=False
    )
    fields = Case.__dataclass_fields__
    for axes, key in zip(panels[0], directions, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [row for row in rows if row["contender"] == name and key in row]
            tflops = [factors[key] * Case(**{f: row[f] for f in fields}).flops() / row[key] / 1e9 for row in points]
            axes.plot([row["seq_len"] for row in points], tflops, marker="o", label=name)
        axes.set(xlabel="seq_len", ylabel="TFLOP/s", title=key.removesuffix("_ms"), xscale="log")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=integer(1), default=4)
    parser.add_argument("--heads", type=integer(1), default=8)
    parser.add_argument("--kv-heads", type=integer(1), help="default: as many as heads")
    parser.add_argument("--head-dim", type=integer(1), default=64)
    parser.add_argument(
        "--seq-len", type=integer(1), nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192], metavar="N"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--mask-prob", type=_probability, default=0.0, help="share of keys that a key mask hides")
    parser.add_argument("--bias", action="store_true", help="a bias a head, with gradient")
    parser.add_argument("--backend", nargs="+", default=["auto"], choices=("auto", "cuda", "sdpa", "reference"))
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--only-forwards", action="store_true")
    direction.add_argument("--only-backwards", action="store_true")
    parser.add_argument("--num-times", type=integer(1), default=20, help="timed calls (default: 20)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers, machine and versions here")
    parser.add_argument("--plot", type=Path, help="draw TFLOP/s against length into this PNG")
    return run_script(parser, run, argv)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
