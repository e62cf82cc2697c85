"""What Lightning's loop costs: its tokens/s against a bare PyTorch loop on the same model, data and optimizer.

    python -m scripts.loop_overhead model=small seq_len=1024 data=pystdlib --steps 200 --json loop.json

Both loops run in this process, in turns, after the model is compiled; every round reports the median over intervals
of ``trainer.log_every`` steps, each ended by waiting for the device. Lightning's side is the whole trainer with its
loggers and callbacks, the bare side does nothing but train.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from conf.schema import CONF, validate
from models.environment import environment
from models.report import read_results
from models.trainer import choose_precision, uses_cuda
from train import build_data, build_module, train


def bare_loop(config: DictConfig) -> list[float]:
    """Trains config.max_steps steps in plain PyTorch and returns tokens/s of every interval but the first."""
    cuda = uses_cuda(config.trainer.accelerator)
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(config.seed)
    module = build_module(config)
    gpt = module.gpt.to(device)
    data, accumulate = build_data(config, instantiate(config.data))
    optimizer, scheduler = module.optimizer.build(gpt)
    autocast = choose_precision(config.trainer.precision, cuda=cuda) == "bf16-mixed"
    tokens_per_interval = data.micro_batch_size * config.seq_len * accumulate * config.trainer.log_every
    rates, start = [], None
    for step in range(config.max_steps):
        for micro_step in range(accumulate):
            tokens = data.train_batch(step, micro_step, 0, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = gpt(tokens[:, :-1], tokens[:, 1:])
            (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), config.trainer.clip_norm or math.inf)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.trainer.log_every == 0:
            if cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if start is not None:
                rates.append(tokens_per_interval / (now - start))
            start = now
    return rates


def lightning_loop(config: DictConfig) -> list[float]:
    """Trains the same through train.py's own path and returns tokens/s of every interval but the first."""
    with tempfile.TemporaryDirectory() as root:
        config.run_root, config.name = root, "loop"
        with contextlib.redirect_stdout(io.StringIO()):  # the summary names files that are gone with the folder
            train(config, choices={})
        return read_results(Path(root) / "loop").series("throughput/tokens_per_s")[1][1:]


def main(argv: list[str] | None = None) -> int:
    """Runs both loops in turns and prints the ratio. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE as for train.py")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps a round (default: 200)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each loop (default: 2)")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args(argv)
    fixed = [f"max_steps={arguments.steps}", f"trainer.val_every={arguments.steps}", "trainer.progress_bar=false"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = validate(compose("config", overrides=[*arguments.overrides, *fixed]))
    if arguments.steps < 3 * config.trainer.log_every:
        parser.error(f"--steps must be at least 3 * trainer.log_every = {3 * config.trainer.log_every}")
    medians: dict[str, list[float]] = {"bare": [], "lightning": []}
    for _ in range(arguments.rounds):
        medians["bare"].append(statistics.median(bare_loop(config.copy())))
        medians["lightning"].append(statistics.median(lightning_loop(config.copy())))
    bare, lightning = (statistics.median(medians[name]) for name in ("bare", "lightning"))
    columns = Table(title=f"tokens/s, {arguments.rounds} rounds of {arguments.steps} steps")
    for heading in ("loop", "median", "rounds"):
        columns.add_column(heading)
    for name, value in (("bare PyTorch", bare), ("Lightning", lightning)):
        rounds = medians["bare" if name.startswith("bare") else "lightning"]
        columns.add_row(name, f"{value:,.0f}", ", ".join(f"{rate:,.0f}" for rate in rounds))
    Console().print(columns, f"Lightning / bare: {lightning / bare:.3f}")
    if arguments.json:
        result = {"tokens_per_s": medians, "ratio": lightning / bare, "overrides": arguments.overrides}
        arguments.json.write_text(json.dumps({**result, **environment()}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
