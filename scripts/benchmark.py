"""Speed and memory of attention: ours against what PyTorch and others have, in one run.

    python -m scripts.benchmark --causal --dtype float16 float32
    python -m scripts.benchmark --preset hidden2048 --head-dim 128 --json h200.json --plot h200.png
    python -m scripts.benchmark --preset hidden2048 --seq-len 8192 --causal --window 1024
    python -m scripts.benchmark --preset hidden2048 --causal --packed docs/results/packed/lengths.json
    python -m scripts.benchmark --preset hidden2048 --seq-len 8192 --padding last 0.25 --each-direction
    python -m scripts.benchmark --preset hidden2048 --seq-len 8192 --causal --distance-bias

Contenders: ours by each --backend; naive einsum; l2norm + SDPA, with the norms as they are and compiled into one kernel
each way, and SDPA without norm, by PyTorch's flash, cuDNN and memory-efficient kernels; with --seq-len-q also ours and
SDPA over keys that were normalised once, when they were cached; FlashAttention-4 and -3, without norm, where they are
installed; and the predecessor, whose package has the same name as ours and is therefore loaded out of a folder of its
own: see --predecessor. --contenders picks some of them.

On a GPU FlashAttention is also there with compiled l2norm before it. --window adds flex_attention there, alone and
compiled with the l2norm, its mask made before it is timed, and by FlashAttention-4's kernels where these are installed;
those to which a window is a mask over all pairs are timed with --dense-mask only. --distance-bias and --alibi add
flex_attention with the same score, ours without it, and ours with the dense bias that it stands for, made in every
call, as for naive einsum and SDPA. --packed adds PyTorch's varlen_attn, also by FlashAttention-4's kernels, and ours of
the same tokens as a batch where all lengths are equal. --padding adds ours without the mask, which sees every key.

flex_attention whose tiles need more shared memory than the GPU has, as those of --distance-bias can, is compiled again
with smaller ones: of its forward pass, of its backward pass, or of both.

Before anything is timed, output and gradients of every contender are compared with float64 attention on the same
inputs, at the smallest length (2048 at most, a window shrinking with it, and a batch of two) or the first list of
packed lengths (of 4096 tokens at most, every length shrinking with their sum); one that is wrong, or that cannot serve
the case, is listed with the reason and not timed. The predecessor is checked in a process of its own, which its kernel
can crash, and used in this one only if it is right there. Times are medians of CUDA events (of a clock on a CPU) over
random data after warm-up and a pause, the L2 cache flushed between calls. Ours includes the l2norm of q and k in every
time. TFLOP/s count 4 * batch * heads * head_dim operations for every visible pair of query and key forward, and 2.5
times that backward; what --mask-prob hides counts as visible. The peak of memory is what forward and backward allocate
beyond the inputs and the gradient of the output.

--rounds has the contenders take turns so often, and gives medians over rounds: at its power limit a GPU gives one
contender another clock than the next, and the same one another in the next round. The JSON has every round.

Large GPUs lower their clock after tens of milliseconds of such work, to stay within their power limit. --sustained
measures that, too: the mean over calls one after the other, without a flush, after 0.2 s of them, and the clock then.

A call takes the host some time, more than a short one takes the GPU. --graphs times the replays of a CUDA graph of each
forward pass instead, as a server that captures its decoding step has them. --busy times, in every direction, what the
GPU is busy for, by the profiler: neither the host nor gaps between kernels count, kernels that run at once count once,
copies and memsets count, too. It is a median over 3 rounds, each after a pause, of --num-times calls one after the
other. Nothing is flushed between them: a short call finds in the L2 cache what the one before it left there, so do not
set its time beside one with a flush. --queued times as ever, with the flush, but has the GPU wait before the first call
until the host has queued them all: what a call takes where the host is ahead, as it is in a training whose steps are
long. On a CPU a clock times as ever, which the tables say.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor

from flash_cosine_sim_attention.interface import BACKENDS
from flash_cosine_sim_attention.ops import kernels_error
from models.training.environment import environment
from models.training.tables import print_line, show
from scripts import PLOTS, Parser, check_file, choose_device, integer, packing, profiling, run_script
from scripts.contenders import (
    DTYPES,
    INSTALL_PREDECESSOR,
    SCALE,
    Case,
    Contender,
    Inputs,
    case_of,
    contenders,
    exact,
    make_inputs,
    predecessors,
    versions,
)

Named = TypeVar("Named")  # with a name
# The relative RMS error of output or a gradient beyond which a contender computes something else: several roundings.
LARGEST_ERROR = {"float32": 1e-2, "float16": 1e-2, "bfloat16": 3e-2}
CHECKED_BATCH, CHECKED_LENGTH = 2, 2048  # at most: float64 has every score in memory
LONGEST_CHECK_S = 300.0  # of a process that checks one contender: Triton's compiler is slow
# What is timed: its heading, and its operations over those of a forward pass.
DIRECTIONS = {"forward_ms": ("forward", 1.0), "backward_ms": ("backward", 2.5), "both_ms": ("forward + backward", 3.5)}
LENGTHS = {"predecessor": (128, 256, 512, 1024, 2048, 4096, 8192), "hidden2048": (2048, 4096, 8192, 16384)}
TOKENS, HIDDEN = 16384, 2048  # of --preset hidden2048
# Options that do not go together: the first with those that it takes none of.
APART = {
    "packed": ("seq_len", "seq_len_q", "batch", "mask_prob", "bias", "padding", "plot"),
    "window": ("seq_len_q", "padding"),  # few queries: contenders disagree about which keys the first one sees
    "padding": ("mask_prob",),
    "distance_bias": ("alibi", "bias", "padding", "packed"),
    "alibi": ("bias", "padding", "packed"),
    "only_backwards": ("sustained", "seq_len_q"),  # which have forward passes alone, or with them
    "busy": ("graphs", "host", "sustained", "queued"),
    "queued": ("graphs", "host", "sustained"),
}


class Timer:
    """Medians of repeated calls on one device. ``busy``: call_ms() is busy_ms(); ``queued``: with the host ahead."""

    WARM_UP_S = 0.05  # at least, and at least three calls, or two where one takes SLOW_S
    SLOW_S = 0.3
    # At its power limit a GPU lowers its clock, by up to a fifth: without a pause, a contender would be timed with the
    # clock that the one before has left. Calls of less than a millisecond get less.
    PAUSE_S, PAUSE_CALLS = 0.5, 500
    LONGEST_S = 1.5  # a measurement stops at so much, but not before
    FEWEST = 3  # calls; those of less than SLOW_S get more
    BUSY_ROUNDS = 3
    HOST_ROUNDS, HOST_CALLS = 5, 200
    SUSTAINED_LOAD_S, SUSTAINED_S = 0.2, 0.25  # calls before the measurement and during it
    FASTEST_CLOCK_HZ = 3e9  # of a GPU: a wait of so many cycles is no shorter than a second

    def __init__(self, device: torch.device, num_times: int, busy: bool = False, queued: bool = False):
        self.device, self.num_times, self.busy, self.queued = device, num_times, busy, queued
        self.on_gpu = device.type == "cuda"
        # larger than any L2 cache
        self.flush = torch.empty(2**28, dtype=torch.int8, device=device) if self.on_gpu else None

    @property
    def times(self) -> str:
        """What the times of call_ms() are."""
        return "clock" if not self.on_gpu else "busy" if self.busy else "queued" if self.queued else "events"

    @property
    def note(self) -> str:
        """A line for titles of tables and plots whose times are, or were to be, no call's as it comes; else nothing."""
        if not (self.busy or self.queued):
            return ""
        if not self.on_gpu:
            return f"\nby a clock: only a GPU has {'busy times' if self.busy else 'a queue'}"
        return (
            "\nbusy times of the GPU, by the profiler" if self.busy else "\nevery call queued before the first one runs"
        )

    def call_ms(self, call: Callable[[], object]) -> float:
        """busy_ms() if that is asked for, else median_ms(), with a queue if that is."""
        return self.busy_ms(call) if self.busy else self.median_ms(call, self.queued)

    def median_ms(self, call: Callable[[], object], queued: bool = False) -> float:
        """The median time of a call in ms, the L2 cache flushed before each. ``queued``: the GPU waits before the first
        for as long as the calls take one by one, so that the host, which takes no longer, is ahead of it.
        """
        seconds = self._warm_up(call)
        count = min(self.num_times, max(self.FEWEST, int(self.LONGEST_S / seconds)))
        if not self.on_gpu:
            return 1e3 * statistics.median(self._clock(call) for _ in range(count))
        self._pause(seconds)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        if queued:
            torch.cuda._sleep(int(count * seconds * self.FASTEST_CLOCK_HZ))
        for start, end in events:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        self._synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def busy_ms(self, call: Callable[[], object], rounds: int = BUSY_ROUNDS, calls: int | None = None) -> float:
        """What a call keeps the GPU busy for in ms, by the profiler: the median over rounds of so many calls (default:
        num_times), one after the other and without a flush. On a CPU median_ms().
        """
        if not self.on_gpu:
            return self.median_ms(call)
        seconds = self._warm_up(call)
        fewest = math.ceil(self.FEWEST / rounds)
        count = min(calls or self.num_times, max(fewest, int(self.LONGEST_S / rounds / seconds)))

        def several() -> None:
            for _ in range(count):
                call()

        busy_us = []
        for _ in range(rounds):
            self._pause(seconds)
            spans = [(start, end) for _, start, end in profiling.kernels(several, self.device)]
            busy_us.append(profiling.covered(spans))
        return statistics.median(busy_us) / count / 1e3

    def sustained_ms(self, call: Callable[[], object]) -> tuple[float, float | None]:
        """The mean time of a call in ms under continuous load, and a GPU's clock in GHz at its end."""
        seconds = self._warm_up(call)
        count = max(self.FEWEST, math.ceil(self.SUSTAINED_S / seconds))

        def calls() -> None:
            for _ in range(count):
                call()

        if not self.on_gpu:
            return 1e3 * self._clock(calls) / count, None
        from scripts.sm_clock import start_sm_clock  # by Triton, which only GPU builds of torch come with

        start_sm_clock(self.device)()  # compiles it
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(math.ceil(self.SUSTAINED_LOAD_S / seconds)):
            call()
        start.record()
        calls()
        end.record()
        clock = start_sm_clock(self.device)
        self._synchronize()
        return start.elapsed_time(end) / count, clock()

    def host_us(self, call: Callable[[], object]) -> float:
        """The median time in us that the host needs for a call, the device left to catch up by itself."""

        def calls() -> None:
            for _ in range(self.HOST_CALLS):
                call()

        self._warm_up(call)
        rounds = []
        for _ in range(self.HOST_ROUNDS):
            self._synchronize()
            rounds.append(self._clock(calls))
        self._synchronize()
        return 1e6 * statistics.median(rounds) / self.HOST_CALLS

    def _warm_up(self, call: Callable[[], object]) -> float:
        """Seconds of a call, each waited for; the first, which may compile, does not count."""
        call()
        self._synchronize()
        start, calls, seconds = time.perf_counter(), 0, 0.0
        while seconds < self.WARM_UP_S or (calls < 2 and seconds < self.SLOW_S):
            call()
            self._synchronize()
            calls += 1
            seconds = time.perf_counter() - start
        return seconds / calls

    def _pause(self, seconds: float) -> None:
        """Lets the GPU rest before calls that take so long."""
        time.sleep(min(self.PAUSE_S, self.PAUSE_CALLS * seconds))

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @staticmethod
    def _clock(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def check(candidates: list[Contender], case: Case, device: torch.device) -> tuple[dict[str, dict], dict[str, str]]:
    """The relative RMS errors against float64 of each contender that ran, and why some are not to be timed."""
    inputs = {problem: make_inputs(problem, device) for problem in {c.problem(case) for c in candidates}}
    kinds = {(contender.problem(case), contender.cosine) for contender in candidates}
    expected = {(problem, cosine): exact(inputs[problem], problem, cosine) for problem, cosine in kinds}
    errors, refused = {}, {}
    for contender in candidates:
        name, problem = contender.name, contender.problem(case)
        try:
            if contender.folder is None:
                right = expected[problem, contender.cosine]
                errors[name] = _errors(contender, problem, inputs[problem], right)
            else:
                errors[name] = _errors_apart(contender, case, device)
        except Exception as error:  # other people's code: whatever it raises
            refused[name] = first_line(error)
            continue
        for result, error in errors[name].items():
            if not error <= LARGEST_ERROR[case.dtype]:
                refused[name] = f"wrong: relative RMS error {error:.1e} of {result} against float64"
                break
    return errors, refused


def _errors(contender: Contender, case: Case, inputs: Inputs, expected: list[Tensor]) -> dict[str, float]:
    with contender.setting():
        o = contender.attend(contender.prepared(inputs), case)
        results = [o.detach(), *torch.autograd.grad(o, inputs.leaves(), inputs.do)]
    names = ("o", *inputs.gradients())
    differences = [result.double() - right for result, right in zip(results, expected, strict=True)]
    return {
        name: (difference.square().mean() / right.square().mean()).sqrt().item()
        for name, difference, right in zip(names, differences, expected, strict=True)
    }


def _errors_apart(contender: Contender, case: Case, device: torch.device) -> dict[str, float]:
    """_errors() from a process of its own. Raises RuntimeError where that fails, crashes or does not finish."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other process needs as much
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as stderr:
        arguments = (sender, stderr.name, contender.folder, contender.name, case, device)
        child = context.Process(target=_send_errors, args=arguments, daemon=True)
        child.start()
        child.join(LONGEST_CHECK_S)
        finished = not child.is_alive()
        child.kill()
        child.join()
        lines = stderr.read().decode(errors="replace").split("\n")
    if finished and child.exitcode == 0 and receiver.poll():
        answer = receiver.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer
    if not finished:
        end = f"not finished in {LONGEST_CHECK_S:g} s"
    elif child.exitcode < 0:
        end = signal.strsignal(-child.exitcode)
    else:
        end = f"exit status {child.exitcode}"
    last = [line.strip() for line in lines if line.strip()][-1:]
    raise RuntimeError(": ".join(["crashed", end, *last]))


def _send_errors(sender: Connection, stderr: str, folder: Path, name: str, case: Case, device: torch.device) -> None:
    """Sends _errors() of one of the predecessor's contenders, or why there are none; its stderr goes into a file."""
    with open(stderr, "ab") as file:
        os.dup2(file.fileno(), 2)
    contender = next(contender for contender in predecessors(folder) if contender.name == name)
    inputs = make_inputs(case, device)
    expected = exact(inputs, case, contender.cosine)
    try:
        sender.send(_errors(contender, case, inputs, expected))
    except Exception as error:  # other people's code: whatever it raises
        sender.send(first_line(error))


def measure(
    contender: Contender,
    case: Case,
    timer: Timer,
    directions: set[str],
    host: bool,
    sustained: bool = False,
    graphs: bool = False,
) -> dict[str, Any]:
    """Times in ms (call_ms), peak memory in MiB beyond the inputs, host times in us; `error` says what stopped it."""
    case, result = contender.problem(case), {}
    try:
        with contender.setting():
            _measure(result, contender, case, timer, directions, host, sustained, graphs)
    except torch.OutOfMemoryError:
        result["error"] = "out of memory"
    except Exception as error:  # other people's code: whatever it raises
        result["error"] = first_line(error)
    if timer.on_gpu:
        torch.cuda.empty_cache()
    return result


def in_turns(
    listed: Sequence[Contender], measure_one: Callable[[Contender], dict[str, Any]], rounds: int
) -> dict[Contender, dict[str, Any]]:
    """What is measured of each, round by round: medians over the rounds, and of several rounds each one's times as
    `rounds`. Who fails takes no further turn.
    """
    found: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in listed}
    for _ in range(rounds):
        for contender, results in found.items():
            if not results or "error" not in results[-1]:
                results.append(measure_one(contender))
    return {contender: _over_rounds(results) for contender, results in found.items()}


def _over_rounds(results: list[dict[str, Any]]) -> dict[str, Any]:
    if len(results) == 1:
        return results[0]
    every = {key: [result[key] for result in results] for key in results[0] if all(key in result for result in results)}
    # A clock that cannot be read is None in each round, and stays so.
    whole = {key: None if None in of else statistics.median(of) for key, of in every.items()}
    errors = {"error": results[-1]["error"]} if "error" in results[-1] else {}
    each = {key: of for key, of in every.items() if key in DIRECTIONS}
    return {**whole, **errors, "rounds": each}


def _measure(
    result: dict,
    contender: Contender,
    case: Case,
    timer: Timer,
    directions: set[str],
    host: bool,
    sustained: bool,
    graphs: bool,
) -> None:
    inputs = contender.prepared(make_inputs(case, timer.device)).leaf()
    detached, leaves = inputs.detached(), inputs.leaves()

    def attend() -> Tensor:
        return contender.attend(inputs, case)

    def attend_detached() -> Tensor:
        return contender.attend(detached, case)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(), leaves, inputs.do)

    if host:
        with torch.no_grad():
            result["host_us_no_grad"] = timer.host_us(attend_detached)
        result["host_us_grad"] = timer.host_us(attend)
        if "both_ms" in directions:
            result["host_us_both"] = timer.host_us(both)
    if "forward_ms" in directions:
        with torch.no_grad():
            result["forward_ms"] = timer.call_ms(captured(attend_detached) if graphs else attend_detached)
    if "backward_ms" in directions:
        o = attend()
        result["backward_ms"] = timer.call_ms(lambda: torch.autograd.grad(o, leaves, inputs.do, retain_graph=True))
        del o
    if "both_ms" in directions:
        result["both_ms"] = timer.call_ms(both)
        if timer.on_gpu:
            result["peak_mib"] = peak_mib(both)
    if sustained and "forward_ms" in directions:
        with torch.no_grad():
            result["sustained_forward_ms"], result["forward_ghz"] = timer.sustained_ms(attend_detached)
    if sustained and "both_ms" in directions:
        result["sustained_both_ms"], result["both_ghz"] = timer.sustained_ms(both)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A call of a GPU that launches again, as one CUDA graph, all that this one launches."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what compiles or asks for workspaces does so before the capture
        call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        o = call()

    def replay() -> object:
        graph.replay()
        return o  # kept: the graph writes it

    return replay


def peak_mib(call: Callable[[], object]) -> float:
    """What a call allocates on the GPU at most, beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def gemm_tflops(timer: Timer, dtype: str) -> float | None:
    """TFLOP/s of an 8192^3 matrix product of random numbers: what attention could at best reach."""
    if not timer.on_gpu:
        return None
    a, b = torch.randn(2, 8192, 8192, device=timer.device, dtype=DTYPES[dtype]).unbind(0)
    return 2 * 8192**3 / timer.call_ms(lambda: a @ b) / 1e9


def copy_tb_s(timer: Timer) -> float | None:
    """TB/s, read and written, of a copy of 1 GiB: what attention of few queries could at best read."""
    if not timer.on_gpu:
        return None
    a, b = torch.empty(2, 2**30, dtype=torch.int8, device=timer.device).unbind(0)
    return 2 * 2**30 / timer.call_ms(lambda: b.copy_(a)) / 1e9


def first_line(error: Exception) -> str:
    """What an error says first, or else what it is."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def cases(arguments: argparse.Namespace, dtype: str) -> list[Case]:
    """One case a length, from the smallest, or a list of packed lengths, in their order."""
    _check_together(arguments)
    window, padding, found = window_of(arguments), padding_of(arguments), []
    lists = [lengths for text in arguments.packed or () for lengths in packing.read_lengths(text)]
    lists = list(dict.fromkeys(lists))
    for lengths in lists or sorted(set(arguments.seq_len or LENGTHS[arguments.preset])):
        seq_len = lengths if isinstance(lengths, int) else sum(lengths)
        batch, heads = _batch_and_heads(arguments, seq_len)
        kv_heads = arguments.kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"--kv-heads must divide --heads {heads}, got {kv_heads}")
        options = (arguments.causal, arguments.mask_prob, arguments.bias, arguments.seq_len_q)
        case = Case(batch, heads, kv_heads, seq_len, arguments.head_dim, dtype, *options, window=window)
        case = replace(case, batch=1, lengths=lengths) if lists else replace(case, padding=padding)
        case = replace(case, by_distance="table" if arguments.distance_bias else "alibi" if arguments.alibi else None)
        if case.padding and not 0 < case.hidden_keys < seq_len:
            hidden = f"{case.hidden_keys} of {seq_len} keys"
            raise ValueError(f"--padding must hide some keys, not all: {padding[1]:g} hides {hidden}")
        found.append(case)
    return found


def _check_together(arguments: argparse.Namespace) -> None:
    if arguments.causal and arguments.seq_len_q:
        raise ValueError("--seq-len-q takes no --causal: contenders disagree about which keys the first query sees")
    for name, others in APART.items():
        for other in others:
            if getattr(arguments, name) and getattr(arguments, other):
                raise ValueError(f"--{name.replace('_', '-')} takes no --{other.replace('_', '-')}")
    if arguments.dense_mask and not arguments.window:
        raise ValueError("--dense-mask needs --window: it is how some contenders get one")


def window_of(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """--window LEFT [RIGHT]; RIGHT is 0 with --causal, else LEFT."""
    if arguments.window is None:
        return None
    left, *rest = arguments.window
    right = rest[0] if rest else 0 if arguments.causal else left
    if len(rest) > 1 or left == right == -1 or (arguments.causal and right):
        accepted = "LEFT [RIGHT], of which one is not -1, RIGHT being 0 with --causal"
        raise ValueError(f"--window must be {accepted}; got {' '.join(map(str, arguments.window))}")
    return left, right


def padding_of(arguments: argparse.Namespace) -> tuple[str, float] | None:
    """--padding last|first FRACTION."""
    if arguments.padding is None:
        return None
    place, text = arguments.padding
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if place not in ("last", "first") or not 0 < share < 1:
        raise ValueError(f"--padding must be last or first and a number in (0, 1), got {place} {text}")
    return place, share


def _batch_and_heads(arguments: argparse.Namespace, seq_len: int) -> tuple[int, int]:
    if arguments.preset == "predecessor":
        return arguments.batch or 4, arguments.heads or 8
    if arguments.batch or arguments.heads:
        raise ValueError("--preset hidden2048 sets --batch and --heads itself: leave them out")
    if arguments.packed and seq_len != TOKENS:
        raise ValueError(f"--preset hidden2048 takes --packed lengths that add up to {TOKENS}, got {seq_len}")
    for flag, whole, part in (("--seq-len", TOKENS, seq_len), ("--head-dim", HIDDEN, arguments.head_dim)):
        if whole % part:
            raise ValueError(f"--preset hidden2048 takes a {flag} that divides {whole}, got {part}")
    return TOKENS // seq_len, HIDDEN // arguments.head_dim


def run(arguments: argparse.Namespace) -> None:
    """Checks, times, prints, writes."""
    device = choose_device(arguments.device)
    problems = [cases(arguments, dtype) for dtype in dict.fromkeys(arguments.dtype)]
    if arguments.graphs and not (device.type == "cuda" and arguments.only_forwards):
        raise ValueError("--graphs needs a GPU and --only-forwards: it times CUDA graphs of forward passes")
    every = [case for listed in problems for case in listed]
    candidates, absent = contenders(arguments.backend, device, arguments.predecessor, bool(arguments.seq_len_q), every)
    candidates = picked(candidates, arguments.contenders, "--contenders")
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        check_file(option, path, PLOTS if option == "--plot" else None)
    timer = Timer(device, arguments.num_times, arguments.busy, arguments.queued)
    report = {**environment(), "scale": SCALE, "not_installed": absent}
    report["times"] = "graphs" if arguments.graphs else timer.times
    report["versions"] |= versions(arguments.predecessor)
    parts: dict[str, dict[str, Any]] = {}
    with repeatable_backward() if "backward_ms" in directions_of(arguments) else nullcontext():
        for listed in problems:
            for part in _compare(listed, candidates, timer, arguments):
                parts[listed[0].dtype] = part
                report |= _joined(parts)
                if arguments.json:  # after each problem: what is measured is kept, whatever becomes of the next
                    report |= machine(device)
                    arguments.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    for dtype, part in parts.items():
        for name, reason in part["refused"].items():
            print_line(f"not timed: {name}, {dtype}: {reason}")
    print_line(f"not installed: {', '.join(absent) or 'none'}")
    if not any(key in row for row in report["rows"] for key in DIRECTIONS):
        raise ValueError("nothing was timed: no contender is right and serves this case")
    if arguments.plot:
        name = torch.cuda.get_device_name() if timer.on_gpu else "CPU"
        plot(report["rows"], arguments.plot, f"{name}, {', '.join(parts)}: {_shapes(problems[0])}{timer.note}")


def _joined(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report's parts on several dtypes as one."""
    joined = {
        key: {dtype: part[key] for dtype, part in parts.items()} for key in ("gemm_tflops", "copy_tb_s", "refused")
    }
    return joined | {key: [row for part in parts.values() for row in part[key]] for key in ("accuracy", "rows")}


def picked(candidates: Sequence[Named], parts: Sequence[str] | None, option: str) -> list[Named]:
    """Those whose name has one of the parts, or all. Raises ValueError for a part that is in none."""
    for part in parts or ():
        if not any(part.lower() in one.name.lower() for one in candidates):
            names = ", ".join(repr(one.name) for one in candidates)
            raise ValueError(f"{option} must be parts of names, got {part!r}; accepted here: {names}")
    return [one for one in candidates if parts is None or any(part.lower() in one.name.lower() for part in parts)]


def directions_of(arguments: argparse.Namespace) -> set[str]:
    """Which of DIRECTIONS are timed."""
    if arguments.only_forwards:
        return {"forward_ms"}
    if arguments.only_backwards:
        return {"backward_ms"}
    return set(DIRECTIONS) if arguments.each_direction else {"forward_ms", "both_ms"}


def repeatable_backward() -> AbstractContextManager:
    """What torch.compile compiles meanwhile has a backward pass that can be timed alone, again and again. Otherwise it
    writes over what the forward pass saved, and refuses to run twice.
    """
    from torch._functorch import config  # torch does not import it by itself

    return config.patch(donated_buffer=False)


def _compare(
    listed: list[Case], candidates: list[Contender], timer: Timer, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The report's part on one dtype as far as it has come: what was checked, then more after each problem."""
    smallest, too_slow = listed[0], {}
    if smallest.window and not arguments.dense_mask:
        reason = "a window is a mask over all pairs to it, which --dense-mask times"
        too_slow = {contender.name: reason for contender in candidates if contender.dense_mask}
        candidates = [contender for contender in candidates if contender.name not in too_slow]
    checked = checked_case(smallest)
    errors, refused = check(candidates, checked, timer.device)
    refused |= too_slow
    show(_accuracy_table(checked, errors))
    peak = gemm_tflops(timer, smallest.dtype)
    copy = copy_tb_s(timer) if smallest.seq_len_q else None
    directions = directions_of(arguments)
    accuracy, rows = [], []
    for name, results in errors.items():
        numbers = {key: error if math.isfinite(error) else None for key, error in results.items()}  # JSON has no nan
        accuracy.append({**asdict(checked), "contender": name, **numbers})
    part = {"accuracy": accuracy, "gemm_tflops": peak, "copy_tb_s": copy, "refused": refused, "rows": rows}
    yield part
    for case in listed:
        host = arguments.host and case is smallest
        how = {"host": host, "sustained": arguments.sustained, "graphs": arguments.graphs}
        measure_one = partial(measure, case=case, timer=timer, directions=directions, **how)
        serving = [contender for contender in candidates if contender.name not in refused]
        measured = in_turns(serving, measure_one, arguments.rounds)
        if not measured:
            break
        results = {contender.name: result for contender, result in measured.items()}
        show(_table(case, measured, peak, timer.note))
        if case.seq_len_q:
            show(_bandwidth_table(case, results, copy, timer.note))
        if arguments.sustained:
            show(_sustained_table(case, measured))
        if host:
            show(_host_table(case, results))
        for contender, result in measured.items():
            names = {"contender": contender.name, "cosine": contender.cosine}
            rows.append({**asdict(contender.problem(case)), **names, **result})
        yield part
    ratios = ratios_by_contender(rows)
    if smallest.lengths and len(listed) > 1 and ratios:
        show(_lists_table(listed, ratios, timer.note))


def checked_case(case: Case) -> Case:
    """The problem that is checked in place of a larger one: a smaller batch, shorter, with a narrower window."""
    if case.lengths is None:
        seq_len = min(case.seq_len, CHECKED_LENGTH)
        smaller = replace(case, batch=min(case.batch, CHECKED_BATCH), seq_len=seq_len)
    else:
        lengths = packing.scaled(case.lengths, min(1.0, CHECKED_BATCH * CHECKED_LENGTH / case.seq_len))
        smaller = replace(case, seq_len=sum(lengths), lengths=lengths)
    if case.window is None:
        return smaller
    left, right = (packing.scaled_one(side, smaller.seq_len / case.seq_len) for side in case.window)
    return replace(smaller, window=(left, right))


def machine(device: torch.device) -> dict[str, Any]:
    """What environment() does not say: the kind of device timed, its driver, power limit and clocks, and settings."""
    gpu = None
    if device.type == "cuda":
        fields = ("driver_version", "power.limit", "clocks.max.sm", "clocks.sm")
        uuid = torch.cuda.get_device_properties(device).uuid
        command = ("nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
            gpu = dict(zip(fields, text.strip().split(", "), strict=True))
        except (OSError, ValueError, subprocess.SubprocessError):
            pass  # no nvidia-smi, or not for this device: the record says null
    return {
        "timed_on": device.type,
        "gpu": gpu,
        "cudnn": torch.backends.cudnn.version(),
        "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
        "kernels": kernels_error() or "loaded",
    }


def _shapes(listed: list[Case]) -> str:
    case = listed[0]
    heads = f"{case.heads}" if case.kv_heads == case.heads else f"{case.heads}/{case.kv_heads}"
    batch = f"batch {case.batch}" if len({c.batch for c in listed}) == 1 else f"batch x seq_len {TOKENS}"
    options = ("causal",) * case.causal + (f"mask {case.mask_prob:g}",) * bool(case.mask_prob) + ("bias",) * case.bias
    if case.by_distance is not None:
        options += ({"table": "distance_bias", "alibi": "ALiBi"}[case.by_distance],)
    if case.window is not None:
        options += (f"window {case.window}",)
    if case.padding is not None:
        options += (f"{case.padding[0]} {case.padding[1]:g} of the keys hidden",)
    if case.lengths is not None:
        several = len({c.lengths for c in listed}) > 1
        batch = f"{len(listed)} lists" if several else f"packed {packing.described(case.lengths)}"
    queries = (f"seq_len_q {case.seq_len_q}",) if case.seq_len_q else ()
    return ", ".join((batch, f"heads {heads}", f"head_dim {case.head_dim}", *queries, *options))


def _accuracy_table(case: Case, errors: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"relative RMS error against float64\n{case.dtype}, seq_len {case.seq_len}, {_shapes([case])}")
    table.add_column("contender")
    names = next(iter(errors.values()), {})
    for name in names:
        table.add_column(name, justify="right")
    for contender, results in errors.items():
        table.add_row(contender, *(f"{error:.1e}" for error in results.values()))
    return table


def _host_table(case: Case, measured: dict[str, dict]) -> Table:
    table = Table(title=f"host time of a call in us\nseq_len {case.seq_len}, {case.dtype}, {_shapes([case])}")
    table.add_column("contender")
    columns = {"host_us_no_grad": "without gradient", "host_us_grad": "with gradient", "host_us_both": "and backward"}
    columns = {key: head for key, head in columns.items() if any(key in result for result in measured.values())}
    for head in columns.values():
        table.add_column(head, justify="right")
    for name, result in measured.items():
        if "host_us_grad" in result:
            table.add_row(name, *(f"{result[key]:.1f}" if key in result else "-" for key in columns))
    return table


def _bandwidth_table(case: Case, measured: dict[str, dict], copy: float | None, note: str = "") -> Table:
    shapes = f"seq_len {case.seq_len}, {case.dtype}, {_shapes([case])}"
    table = Table(title=f"reading keys and values, forward\n{shapes}{note}")
    table.add_column("contender")
    table.add_column("us", justify="right")
    table.add_column("TB/s", justify="right")
    table.add_column("of a copy", justify="right")
    size = 2 * case.batch * case.kv_heads * case.seq_len * case.head_dim * DTYPES[case.dtype].itemsize
    for name, result in measured.items():
        if "forward_ms" in result:
            tb_s = size / result["forward_ms"] / 1e9
            share = "-" if copy is None else f"{tb_s / copy:.0%}"
            table.add_row(name, f"{1e3 * result['forward_ms']:.1f}", f"{tb_s:.2f}", share)
    return table


def _lists_table(listed: list[Case], ratios: dict[str, dict[str, list[float]]], note: str = "") -> Table:
    """Others' times over ours: the median over the lists of lengths, and the lowest."""
    table = Table(title=f"x ours, over all lists: median, lowest\n{listed[0].dtype}, {_shapes(listed)}{note}")
    table.add_column("contender")
    keys = [key for key in DIRECTIONS if any(key in found for found in ratios.values())]
    for key in keys:
        table.add_column(DIRECTIONS[key][0], justify="right")
    for name, found in ratios.items():
        several = [found.get(key) for key in keys]
        table.add_row(name, *(f"{statistics.median(some):.2f}, {min(some):.2f}" if some else "-" for some in several))
    return table


def ratios_by_contender(rows: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Of the rows of several problems every other contender's times over ours, by contender and key of DIRECTIONS."""
    found: dict[str, dict[str, list[float]]] = {}
    ours = {case_of(row): row for row in reversed(rows) if row["contender"].startswith("ours")}  # the first back end's
    for row in rows:
        own = ours.get(case_of(row), row)
        for key in DIRECTIONS:
            if own is not row and key in row and key in own:
                found.setdefault(row["contender"], {}).setdefault(key, []).append(row[key] / own[key])
    return found


def _sustained_table(case: Case, measured: dict[Contender, dict]) -> Table:
    table = Table(title=f"under continuous load\nseq_len {case.seq_len}, {case.dtype}, {_shapes([case])}")
    table.add_column("contender")
    keys = [key for key in ("forward", "both") if any(f"sustained_{key}_ms" in result for result in measured.values())]
    for key in keys:
        for heading in (f"{DIRECTIONS[f'{key}_ms'][0]} ms", "TFLOP/s", "GHz"):
            table.add_column(heading, justify="right")
    for contender, result in measured.items():
        cells = []
        for key in keys:
            if f"sustained_{key}_ms" not in result:
                cells += ["-"] * 3
                continue
            ms, ghz = result[f"sustained_{key}_ms"], result[f"{key}_ghz"]
            tflops = DIRECTIONS[f"{key}_ms"][1] * contender.problem(case).flops() / ms / 1e9
            cells += [f"{ms:.3f}", f"{tflops:.1f}", "-" if ghz is None else f"{ghz:.2f}"]
        table.add_row(contender.name, *cells)
    return table


def _table(case: Case, measured: dict[Contender, dict], peak: float | None, note: str = "") -> Table:
    table = Table(title=f"seq_len {case.seq_len}, {case.dtype}, {_shapes([case])}{note}")
    table.add_column("contender")
    ours = next((result for contender, result in measured.items() if contender.name.startswith("ours")), {})
    times = [key for key in DIRECTIONS if any(key in result for result in measured.values())]
    for key in times:
        for heading in (f"{DIRECTIONS[key][0]} ms", "x ours", "TFLOP/s", *(["of GEMM"] if peak else [])):
            table.add_column(heading, justify="right")
    table.add_column("peak MiB", justify="right")
    for contender, result in measured.items():
        cells = []
        for key in times:
            if key not in result:
                cells += ["-"] * (4 if peak else 3)
                continue
            tflops = DIRECTIONS[key][1] * contender.problem(case).flops() / result[key] / 1e9
            ratio = f"{result[key] / ours[key]:.2f}" if key in ours else "-"
            cells += [f"{result[key]:.3f}", ratio, f"{tflops:.1f}", *([f"{tflops / peak:.0%}"] if peak else [])]
        memory = result.get("error") or (f"{result['peak_mib']:.0f}" if "peak_mib" in result else "-")
        table.add_row(contender.name, *cells, memory)
    return table


def plot(rows: list[dict], path: Path, title: str) -> None:
    """TFLOP/s against length into a PNG: a panel a direction (a row of them a dtype), a colour a contender."""
    import matplotlib

    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    tab20 = pyplot.get_cmap("tab20").colors  # ten dark colours, each followed by a light one
    names, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("contender", "dtype"))
    colours = dict(zip(names, itertools.cycle((*tab20[::2], *tab20[1::2])), strict=False))
    lengths, several = sorted({row["seq_len"] for row in rows}), len(dtypes) > 1
    directions = [key for key in DIRECTIONS if any(key in row for row in rows)]
    size = (5 * len(directions) + 2.5, 4.2 * len(dtypes) + 0.3)
    figure, panels = pyplot.subplots(len(dtypes), len(directions), figsize=size, layout="constrained", squeeze=False)
    lines = {}
    for dtype, panels_of_dtype in zip(dtypes, panels, strict=True):
        for axes, key in zip(panels_of_dtype, directions, strict=True):
            for name in names:
                points = [row for row in rows if (row["contender"], row["dtype"]) == (name, dtype) and key in row]
                if points:
                    (lines[name],) = _draw(axes, points, key, colours[name])
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [str(length) for length in lengths])
            axes.minorticks_off()
            axes.set(xlabel="seq_len", ylabel="TFLOP/s", title=DIRECTIONS[key][0] + several * f", {dtype}")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(lines.values(), lines, loc="outside right center", fontsize="small", handlelength=3.5)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(axes: Any, points: list[dict], key: str, colour: tuple) -> list:
    """One contender's line: thick if it is ours, dashed if it does not normalise."""
    operations = [DIRECTIONS[key][1] * case_of(row).flops() for row in points]
    return axes.plot(
        [row["seq_len"] for row in points],
        [flops / row[key] / 1e9 for flops, row in zip(operations, points, strict=True)],
        color=colour,
        linestyle="-" if points[0]["cosine"] else "--",
        linewidth=3.5 if points[0]["contender"].startswith("ours") else 1.5,
        marker="o",
        markersize=4,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=LENGTHS,
        default="predecessor",
        help="predecessor (default): batch 4, heads 8, lengths from 128 to 8192; hidden2048: the FlashAttention-3 "
        "paper's shapes, 16384 tokens of width 2048, batch and heads following from --seq-len and --head-dim",
    )
    parser.add_argument("--batch", type=integer(1))
    parser.add_argument("--heads", type=integer(1))
    parser.add_argument("--kv-heads", type=integer(1), help="default: as many as heads")
    parser.add_argument("--head-dim", type=integer(1), default=64)
    parser.add_argument("--seq-len", type=integer(1), nargs="+", metavar="N")
    parser.add_argument(
        "--seq-len-q", type=integer(1), metavar="N", help="queries, where fewer than keys: how fast are these read?"
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"])
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--mask-prob", type=_probability, default=0.0, help="share of keys that a key mask hides")
    parser.add_argument("--bias", action="store_true", help="a bias a head, with gradient")
    parser.add_argument("--distance-bias", action="store_true", help="a table by distance a head, with gradient")
    parser.add_argument("--alibi", action="store_true", help="ALiBi's slopes a head")
    parser.add_argument(
        "--window",
        type=integer(-1),
        nargs="+",
        metavar=("LEFT", "RIGHT"),
        help="a sliding window: a query sees LEFT keys before its own and RIGHT after it, -1 being all; RIGHT is 0 "
        "with --causal, else by default LEFT",
    )
    parser.add_argument(
        "--dense-mask", action="store_true", help="with --window also those that get a mask over all pairs, made before"
    )
    parser.add_argument(
        "--packed",
        nargs="+",
        metavar="FILE|LIST",
        help="packed sequences: lengths such as 8x2048 or 300,0,700, or a JSON file with lists of them, as "
        "docs/results/packed/lengths.json has; over several lists others' times over ours are summed up",
    )
    parser.add_argument(
        "--padding",
        nargs=2,
        metavar=("last|first", "FRACTION"),
        help="a key mask that hides so many of the keys, at the end or at the start of each sequence",
    )
    parser.add_argument("--backend", nargs="+", default=["auto"], choices=BACKENDS)
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="PART",
        help="only those whose name has one of these parts, such as ours, 'compiled l2norm', cudnn",
    )
    parser.add_argument(
        "--predecessor",
        type=Path,
        metavar="PATH",
        help=f"a folder that it was put into by {INSTALL_PREDECESSOR}; 0.2 compiles its CUDA kernel at import",
    )
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--only-forwards", action="store_true")
    direction.add_argument("--only-backwards", action="store_true")
    direction.add_argument("--each-direction", action="store_true", help="also time the backward pass alone")
    parser.add_argument(
        "--num-times",
        type=integer(1),
        default=20,
        help="timed calls (default: 20), with --busy a round; fewer, down to 3 in all, where they take long",
    )
    parser.add_argument("--rounds", type=integer(1), default=1, help="so often the contenders take turns (default: 1)")
    parser.add_argument("--host", action="store_true", help="also time the host's part of a call, at the least length")
    parser.add_argument("--sustained", action="store_true", help="also measure under continuous load, with the clock")
    parser.add_argument("--graphs", action="store_true", help="time CUDA graphs of forward passes: no host")
    parser.add_argument(
        "--busy", action="store_true", help="time what the GPU is busy for, by the profiler: no host, no gaps, no flush"
    )
    parser.add_argument(
        "--queued", action="store_true", help="have the GPU wait until the host has queued all calls that are timed"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers, machine and versions here, after each length")
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
