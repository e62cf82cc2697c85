"""Speed of whole training steps in one run: train.py's, a bare loop's on the same model, and nanoGPT's.

    python -m scripts.benchmark_training data=pystdlib --model small base --seq-len 1024 8192 --json training.json
    python -m scripts.benchmark_training data=pystdlib --nanogpt PATH/model.py --profile

Contenders, for every --model at every --seq-len, all other keys as for train.py (trainer.log_every, tokens_per_step),
but without validations before the end and without a progress bar:

- lightning: train.py's own path, the whole trainer with its loggers and callbacks.
- bare: the same model, data and optimizer in a loop that does nothing but train. What it is faster by is Lightning's.
- nanogpt: nanoGPT's model (https://github.com/karpathy/nanoGPT, a model.py that --nanogpt names) of the same size over
  the same bytes, in the bare loop, as its train.py sets it up: SDPA, no biases, its own AdamW groups (fused on a GPU),
  gradients clipped at 1, bf16 autocast and torch.compile wherever ours has them.
- nanogpt_gelu: the same with ours in place of its GELU: its exact form takes more instructions than ours, tanh's.
- nanogpt_windows: the same as nanogpt with the windows of attention.window and attention.window_pattern, if they are
  given: in layers with one, flex_attention in place of SDPA (not compiled, or on a CPU: SDPA under an explicit mask).

They take turns, --rounds times. A result is the median over intervals of trainer.log_every steps, each ended by waiting
for the device; the first interval, which compiles and warms up, does not count. --profile also lists the kernels of a
bare step by the GPU's time in them, and the share of a step in which the GPU has nothing to do.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import io
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from conf.command_line import check, of_options
from conf.schema import CONF, builder, validate
from data.bytes import Corpus
from models.attention import RegularAttention
from models.blocks import GELU
from models.gpt import VOCABULARY
from models.training.callbacks import GIB
from models.training.devices import choose_compile, choose_precision, uses_cuda, wait_for
from models.training.environment import environment
from models.training.report import read_results
from models.training.tables import show
from scripts import Parser, autocast, check_file, integer, profiling, run_script
from scripts.benchmark import machine
from train import build_data, build_module, train

# The last is what the others are compared with.
CONTENDERS = ("lightning", "bare", "nanogpt_windows", "nanogpt_gelu", "nanogpt")
PROFILED_STEPS = 5
KERNELS_SHOWN = 25
DEFAULT_STEPS = 200


@dataclass
class Trainee:
    """What a bare loop trains."""

    loss: Callable[[Tensor], Tensor]  # of tokens (micro_batch_size, seq_len + 1)
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    update_lr: Callable[[], None]  # after every step
    clip_norm: float


Build = Callable[[DictConfig, torch.device], Trainee]


def our_trainee(config: DictConfig, device: torch.device) -> Trainee:
    """What train.py trains, without Lightning."""
    module = build_module(config)
    gpt = module.gpt.to(device)
    optimizer, scheduler = module.optimizer.build(gpt)
    return Trainee(
        loss=lambda tokens: gpt(tokens[:, :-1], tokens[:, 1:]),
        parameters=list(gpt.parameters()),
        optimizer=optimizer,
        update_lr=scheduler.step,
        clip_norm=config.trainer.clip_norm or math.inf,
    )


def nanogpt_trainee(
    path: Path, config: DictConfig, device: torch.device, *, windows: bool = False, gelu: bool = False
) -> Trainee:
    """NanoGPT's model of the same size, with the settings of its own train.py; on request with the same windows, or
    with our GELU.
    """
    code = load_nanogpt(path)
    sizes = {"n_layer": config.model.num_layers, "n_head": config.model.num_heads, "n_embd": config.model.width}
    settings = {"block_size": config.seq_len, "vocab_size": VOCABULARY, "dropout": config.model.dropout, "bias": False}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        gpt = code.GPT(code.GPTConfig(**sizes, **settings)).to(device)
        optimizer = gpt.configure_optimizers(
            weight_decay=0.1, learning_rate=6e-4, betas=(0.9, 0.95), device_type=device.type
        )
    if windows:
        give_windows(gpt, config)
    if gelu:
        for block in gpt.transformer.h:
            block.mlp.gelu = GELU()
    parameters = list(gpt.parameters())
    forward = torch.compile(gpt) if _compiles(config) else gpt
    return Trainee(
        loss=lambda tokens: forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1],
        parameters=parameters,
        optimizer=optimizer,
        update_lr=lambda: None,
        clip_norm=1.0,
    )


class WindowedAttention(nn.Module):
    """The attention of one of nanoGPT's layers, with the weights that it has there, within a window."""

    def __init__(self, attention: nn.Module, inner: RegularAttention):
        super().__init__()
        self.attention = attention
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seq_len, width) -> the same."""
        parts = self.attention.c_attn(x).chunk(3, dim=-1)  # q, k, v
        o = self.inner(*(part.unflatten(-1, (self.inner.num_heads, -1)).transpose(1, 2) for part in parts))
        return self.attention.resid_dropout(self.attention.c_proj(o.transpose(1, 2).flatten(2)))


def give_windows(gpt: nn.Module, config: DictConfig) -> None:
    """Gives the layers of nanoGPT's model the windows of the configuration; a layer without one stays as it is."""
    num_layers, num_heads = config.model.num_layers, config.model.num_heads
    sizes = {"num_heads": num_heads, "head_dim": config.model.width // num_heads, "num_layers": num_layers}
    windows = {"window": config.attention.window, "window_pattern": config.attention.window_pattern}
    for layer, block in enumerate(gpt.transformer.h):
        inner = RegularAttention(**sizes, **windows, layer=layer)
        if inner.window is not None:
            block.attn = WindowedAttention(block.attn, inner)


def load_nanogpt(path: Path) -> Any:
    """The module of nanoGPT's model.py. Raises ValueError where path is something else."""
    if not path.is_file():
        raise ValueError(f"--nanogpt must be the path of nanoGPT's model.py, got {str(path)!r}")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if spec is None:
        raise ValueError(f"--nanogpt must be the path of nanoGPT's model.py, {str(path)!r} is no Python")
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code  # its dataclass looks itself up there
    try:
        spec.loader.exec_module(code)
    except Exception as error:  # other people's code: whatever it raises
        said = f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0]
        raise ValueError(f"--nanogpt must be the path of nanoGPT's model.py, {str(path)!r} raises {said}") from error
    if not (hasattr(code, "GPT") and hasattr(code, "GPTConfig")):
        raise ValueError(f"--nanogpt must be the path of nanoGPT's model.py, {str(path)!r} has no GPT and GPTConfig")
    return code


def _compiles(config: DictConfig) -> bool:
    return choose_compile(config.compile, cuda=uses_cuda(config.trainer.accelerator))


def bare_loop(build: Build, config: DictConfig, corpus: Corpus, *, profiled: bool) -> dict[str, Any]:
    """Trains config.max_steps steps in plain PyTorch.

    Returns:
        tokens/s of every interval but the first (rates), peak_gib on a GPU, and profile if asked for.
    """
    cuda = uses_cuda(config.trainer.accelerator)
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(config.seed)
    data = build_data(config, corpus)
    trainee = build(config, device)
    precision = choose_precision(config.trainer.precision, cuda=cuda)

    def take_step(step: int) -> None:
        for micro_step in range(data.accumulate):
            tokens = data.train_batch(step, micro_step, 0, device)
            with autocast(device, precision):
                loss = trainee.loss(tokens)
            (loss / data.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters, trainee.clip_norm)
        trainee.optimizer.step()
        trainee.update_lr()
        trainee.optimizer.zero_grad(set_to_none=True)

    tokens_per_interval = data.tokens_per_step * config.trainer.log_every
    rates, start = [], None
    for step in range(config.max_steps):
        take_step(step)
        if (step + 1) % config.trainer.log_every == 0:
            wait_for(device)
            now = time.perf_counter()
            if start is not None:
                rates.append(tokens_per_interval / (now - start))
            start = now
    result = {"rates": rates, "peak_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None}
    if profiled:
        result["profile"] = profile(take_step, device)
    return result


def lightning_loop(config: DictConfig) -> dict[str, Any]:
    """Trains the same through train.py's own path; returns what ``bare_loop`` does."""
    with tempfile.TemporaryDirectory() as root:
        config.run_root, config.name = root, "run"
        with contextlib.redirect_stdout(io.StringIO()):  # the summary names files that are gone with the folder
            train(config, choices={})
        results = read_results(Path(root) / "run")
    peaks = results.series("memory/peak_allocated_gib")[1][1:]
    rates = results.series("throughput/tokens_per_s")[1][1:]
    return {"rates": rates, "peak_gib": max(peaks) if peaks else None}


def profile(take_step: Callable[[int], None], device: torch.device) -> dict[str, Any]:
    """The kernels of a step by the GPU's time in them, and the share of the time in which it runs none."""

    def steps() -> None:
        for step in range(PROFILED_STEPS):
            take_step(step)

    return summed_up(profiling.kernels(steps, device), PROFILED_STEPS)


def summed_up(kernels: Iterable[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """The profile of kernels (name, start, end), in microseconds, of so many steps."""
    times: dict[str, list[float]] = defaultdict(list)
    spans = []
    for name, start, end in kernels:
        times[name].append(end - start)
        spans.append((start, end))
    span, busy = max(end for _, end in spans) - min(start for start, _ in spans), profiling.covered(spans)
    rows = [
        {"kernel": name, "calls": len(durations) / steps, "ms": sum(durations) / steps / 1e3}
        for name, durations in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
    return {"ms": span / steps / 1e3, "idle_share": 1 - busy / span, "kernels": rows}


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    configs = cases_of(arguments)
    some = next(iter(configs.values()))
    builders = choose_contenders(arguments, some)
    cuda = uses_cuda(some.trainer.accelerator)
    if arguments.profile and not cuda:
        raise ValueError("--profile needs a CUDA device: it lists a GPU's kernels")
    corpus = builder(some, "data")()
    report = {**environment(), **machine(torch.device("cuda" if cuda else "cpu"))}
    report |= {"overrides": arguments.overrides, "steps": some.max_steps, "rows": []}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        check_file("--json", arguments.json)
    for (model, seq_len), config in configs.items():
        results = measure(builders, config, corpus, arguments.rounds, profiled=arguments.profile)
        rows = [{"model": model, "seq_len": seq_len, "contender": name, **result} for name, result in results.items()]
        show(table(rows, config))
        for row in rows:
            if "profile" in row:
                show(profile_table(row), names=0)
        report["rows"] += rows
        if arguments.json:  # after each case: what is measured is kept, whatever becomes of the next
            arguments.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def cases_of(arguments: argparse.Namespace) -> dict[tuple[str, int], DictConfig]:
    """The configurations to measure, by model and length: the options', or else what the keys say.

    Raises ValueError where a key and an option say different things, or max_steps is no number of steps.
    """
    given = dict(override.lstrip("+").partition("=")[::2] for override in arguments.overrides)
    for key, option, values in (
        ("model", "--model", arguments.model),
        ("seq_len", "--seq-len", arguments.seq_len),
        ("max_steps", "--steps", [arguments.steps]),
    ):
        if key in given and values not in (None, [None]) and [given[key]] != [str(value) for value in values]:
            said = " ".join(map(str, values))
            raise ValueError(f"{key}={given[key]} and {option} {said} contradict each other: give one of them")
    # An experiment's max_steps is a training's length: only what the command line says counts here.
    try:
        steps = arguments.steps or int(given.get("max_steps", DEFAULT_STEPS))
    except ValueError:
        raise ValueError(f"max_steps must be an integer, got {given['max_steps']!r}") from None
    found = {}
    for model, seq_len in itertools.product(arguments.model or [None], arguments.seq_len or [None]):
        config, chosen = configure(arguments.overrides, model, seq_len, steps)
        found[chosen, config.seq_len] = config
    return found


def choose_contenders(arguments: argparse.Namespace, config: DictConfig) -> dict[str, Build | None]:
    """By name: what the bare loop trains; None is Lightning's loop.

    Raises ValueError without nanoGPT's code, and for its windows where the configuration has none, or has dropout.
    """
    builders: dict[str, Build | None] = {"lightning": None, "bare": our_trainee}
    if arguments.nanogpt is not None:
        load_nanogpt(arguments.nanogpt)  # a wrong path shows before anything is timed
        if config.attention.get("window") is not None:
            builders["nanogpt_windows"] = functools.partial(nanogpt_trainee, arguments.nanogpt, windows=True)
        builders["nanogpt_gelu"] = functools.partial(nanogpt_trainee, arguments.nanogpt, gelu=True)
        builders["nanogpt"] = functools.partial(nanogpt_trainee, arguments.nanogpt)
    chosen = list(dict.fromkeys(arguments.contenders or builders))
    for name in chosen:
        if name.startswith("nanogpt") and arguments.nanogpt is None:
            raise ValueError(f"--contenders {name} needs --nanogpt, the path of its model.py")
        if name not in builders:
            raise ValueError(f"--contenders {name} needs attention.window, the windows that it is given")
    if "nanogpt_windows" in chosen and config.model.dropout:
        # nanoGPT drops probabilities of its attention, too, which flex_attention cannot
        raise ValueError(f"model.dropout must be 0 for nanoGPT with the windows, got {config.model.dropout}")
    return {name: builders[name] for name in chosen}


def configure(overrides: list[str], model: str | None, seq_len: int | None, steps: int) -> tuple[DictConfig, str]:
    """The configuration of one case, and its option of conf/model/.

    Raises ValueError for a key or value that train.py does not take.
    """
    fixed = [f"{key}={value}" for key, value in (("model", model), ("seq_len", seq_len)) if value is not None]
    fixed += [f"max_steps={steps}", f"trainer.val_every={steps}", "trainer.progress_bar=false"]
    fixed += ["trainer.budget_minutes=null"]  # an experiment's: a benchmark is of so many steps
    check([*overrides, *fixed])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            composed = compose("config", overrides=[*overrides, *fixed], return_hydra_config=True)
        except HydraException as error:
            raise ValueError(str(error).strip().split("\n", 1)[0]) from error
    choices = composed.hydra.runtime.choices
    with open_dict(composed):
        del composed["hydra"]
    config = validate(of_options(composed, choices, ())[0])
    if config.trainer.devices * config.trainer.num_nodes != 1:
        raise ValueError("trainer.devices and trainer.num_nodes must be 1: the bare loops run on one device")
    if steps < 3 * config.trainer.log_every:
        fewest = 3 * config.trainer.log_every
        raise ValueError(f"--steps or max_steps must be at least 3 * trainer.log_every = {fewest}, got {steps}")
    return config, choices["model"]


def measure(
    builders: dict[str, Build | None], config: DictConfig, corpus: Corpus, rounds: int, *, profiled: bool
) -> dict[str, dict[str, Any]]:
    """The results of all contenders, which take turns."""
    results: dict[str, dict[str, Any]] = {}
    for index in range(rounds):
        for name, build in builders.items():
            _forget()
            if build is None:
                result = lightning_loop(config.copy())
            else:
                result = bare_loop(build, config, corpus, profiled=profiled and index == rounds - 1)
            earlier = results[name]["rates"] if name in results else []
            results[name] = {**result, "rates": earlier + result["rates"]}
    for result in results.values():
        result["tokens_per_s"] = statistics.median(result["rates"])
        result["ms_per_step"] = 1e3 * _tokens_per_step(config) / result["tokens_per_s"]
    return results


def _forget() -> None:
    """Leaves nothing of the contender before: neither memory nor compiled code, of which PyTorch keeps but so many."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _tokens_per_step(config: DictConfig) -> int:
    return config.tokens_per_step // config.seq_len * config.seq_len


def table(rows: list[dict[str, Any]], config: DictConfig) -> Table:
    """The contenders of one case."""
    baseline = next((row for row in reversed(rows) if row["contender"] != "lightning"), rows[-1])
    title = f"model={rows[0]['model']}, seq_len {rows[0]['seq_len']}, {_tokens_per_step(config):,} tokens a step"
    columns = Table(title=f"{title}\nmedian of {len(rows[0]['rates'])} intervals of {config.trainer.log_every} steps")
    headings = ("tokens/s", "lowest", "highest", "ms/step", "peak GiB", f"x {baseline['contender']}")
    columns.add_column("contender")
    for heading in headings:
        columns.add_column(heading, justify="right")
    for row in rows:
        rates = (row["tokens_per_s"], min(row["rates"]), max(row["rates"]))
        columns.add_row(
            row["contender"],
            *(f"{rate:,.0f}" for rate in rates),
            f"{row['ms_per_step']:.2f}",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}",
            f"{row['tokens_per_s'] / baseline['tokens_per_s']:.3f}",
        )
    return columns


def profile_table(row: dict[str, Any]) -> Table:
    """Where a step's time goes on the GPU."""
    found = row["profile"]
    title = f"{row['contender']}, model={row['model']}, seq_len {row['seq_len']}: kernels of a step"
    columns = Table(title=f"{title}\n{found['ms']:.2f} ms, the GPU idle {found['idle_share']:.1%} of it")
    for heading in ("ms", "share", "calls"):
        columns.add_column(heading, justify="right")
    columns.add_column("kernel")
    for kernel in found["kernels"][:KERNELS_SHOWN]:
        share = kernel["ms"] / found["ms"]
        columns.add_row(f"{kernel['ms']:.3f}", f"{share:.1%}", f"{kernel['calls']:g}", escape(kernel["kernel"]))
    return columns


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(
        prog="python -m scripts.benchmark_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py; before the options")
    parser.add_argument("--model", nargs="+", help="options of conf/model/ (default: what the keys say, or else small)")
    parser.add_argument(
        "--seq-len", type=integer(1), nargs="+", metavar="N", help="(default: what the keys say, or else 1024)"
    )
    parser.add_argument(
        "--steps", type=integer(1), help=f"optimizer steps a round (default: max_steps=, or else {DEFAULT_STEPS})"
    )
    parser.add_argument("--rounds", type=integer(1), default=1, help="rounds of each contender (default: 1)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="(default: all)")
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="nanoGPT's model.py")
    parser.add_argument(
        "--profile", action="store_true", help="also list the GPU's kernels in a step of the bare loops"
    )
    parser.add_argument("--json", type=Path, help="write the numbers, machine and versions here")
    return run_script(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
