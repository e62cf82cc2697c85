"""A storm over training: runs killed and stopped at random moments, resumed, and compared with one left in peace.

    python -m tests.storm                         # 100 SIGKILLs, 30 SIGTERMs, 30 SIGINTs, one process and two
    python -m tests.storm --kills 2 --terms 2 --ints 2 --seed 1

Every case is a run of a small model that is sent a signal at a random moment, or at the moment when a checkpoint is
being written, and then run again with resume=auto until it ends. It must end with the weights, the optimizer's state
and the logged losses of a run that nobody disturbed, bit for bit, in the folder where it began, and without ever
hanging. Exit code 1 if one case does not.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24
KEYS = [
    *("model=tiny", "model.num_layers=1", "model.width=32", "model.num_heads=2", "model.dropout=0.1", "data=file"),
    *("trainer.accelerator=cpu", "trainer.val_bytes=600", "trainer.sample_bytes=4", "trainer.log_every=2"),
    *("trainer.val_every=8", "trainer.checkpoint_every=3", "logger=csv", "seq_len=32", "tokens_per_step=256"),
    *("micro_batch_tokens=64", f"max_steps={STEPS}", "name=run"),
]
LONGEST_S = 30  # from a SIGTERM or SIGINT to the end of the process, or the time of two undisturbed runs: of two
# processes the first hears no signal before the second has begun, which a loaded machine may take a minute for
PATIENCE_S = 600  # for a run to end by itself, on a loaded machine
COLUMNS = ("step", "train/loss", "train/lr", "train/grad_norm", "train/tokens", "val/bpc")


@dataclass(frozen=True)
class Case:
    """One disturbed run: which signals it gets, on how many processes, and to whom they are sent."""

    signals: tuple[signal.Signals, ...]
    devices: int
    whole_group: bool
    while_writing: bool


def make_cases(kills: int, terms: int, ints: int, rng: random.Random) -> list[Case]:
    """So many runs of each signal, half of them of two processes; a third of the kills while a checkpoint is saved."""
    cases = []
    for signum, count in ((signal.SIGKILL, kills), (signal.SIGTERM, terms), (signal.SIGINT, ints)):
        for _ in range(count):
            devices = 1 + len(cases) % 2
            # Ctrl-C reaches every process of a terminal's group; a scheduler may signal the first one alone
            whole = signum == signal.SIGINT or (devices == 2 and rng.random() < 0.5)
            writing = signum == signal.SIGKILL and rng.random() < 1 / 3
            cases.append(Case((signum,) * rng.choice((1, 1, 2)), devices, whole, writing))
    return cases


class Training:
    """A training in a process of its own, forked from this one, which has imported all that it needs."""

    def __init__(self, root: Path, text: Path, devices: int):
        sys.stdout.flush()
        self.pid = os.fork()
        self.code: int | None = None
        if self.pid == 0:
            try:
                os.setsid()  # a group of its own, as a terminal's or a scheduler's job has one
                with open(root / "output", "ab") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                os._exit(_train([f"run_root={root}", f"data.path={text}", f"trainer.devices={devices}", "resume=auto"]))
            finally:
                os._exit(99)

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, longest_s: float) -> int:
        """The exit code. Raises TimeoutError."""
        deadline = time.monotonic() + longest_s
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.005)
        return self.code


def _train(keys: list[str]) -> int:
    os.chdir(ROOT)
    sys.argv = ["train.py", *KEYS, *keys]
    # What a second process of the run is started as: python train.py
    sys.modules["__main__"].__spec__ = None
    import train

    try:
        train.main()
    except SystemExit as ended:
        sys.stdout.flush()
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return 130
    sys.stdout.flush()
    return 0


def half_written(root: Path) -> set[str]:
    """The names of checkpoints that are being written, or were when their writer was killed."""
    try:
        return {name for name in os.listdir(root / "run" / "checkpoints") if name.endswith(".tmp") and "step" in name}
    except OSError:
        return set()


def disturb(root: Path, text: Path, case: Case, signum: signal.Signals, longest_s: float, rng: random.Random) -> str:
    """Runs until the signal, and sees the run end. Returns what became of it."""
    process = Training(root, text, case.devices)
    deadline = time.monotonic() + PATIENCE_S
    if case.while_writing:
        earlier = half_written(root)
        while process.poll() is None and not half_written(root) - earlier:
            if time.monotonic() > deadline:
                raise RuntimeError("no checkpoint was written")
            time.sleep(0.0005)
    else:
        wait = time.monotonic() + rng.uniform(0, longest_s)
        while process.poll() is None and time.monotonic() < wait:
            time.sleep(0.001)
    send = os.killpg if case.whole_group or signum == signal.SIGKILL else os.kill
    while True:
        if process.poll() is not None:
            return "had ended"
        with contextlib.suppress(ProcessLookupError):  # a process that has only just begun leads no group yet
            send(process.pid, signum)
            break
        time.sleep(0.0005)
    sent = time.monotonic()
    limit_s = max(LONGEST_S, 2 * longest_s)
    try:
        code = process.wait(PATIENCE_S if signum == signal.SIGKILL else limit_s)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        raise RuntimeError(f"{signum.name}: still running {limit_s:.0f} s later") from None
    if code not in (0, -signum, 128 + signum):
        raise RuntimeError(f"{signum.name}: exit code {code}")
    _wait_for_group(process.pid, sent + limit_s)
    return f"ended with {code} after {time.monotonic() - sent:.1f} s"


def _wait_for_group(group: int, deadline: float) -> None:
    """Until no process of the group is left: one that hangs would write on beside the next."""
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            raise RuntimeError("a process that the run had started outlived it")
        time.sleep(0.01)


def finish(root: Path, text: Path, devices: int) -> None:
    """Goes on until the run ends by itself."""
    process = Training(root, text, devices)
    code = process.wait(PATIENCE_S)
    if code != 0:
        raise RuntimeError(f"the resumed run ended with {code}")


def result(root: Path) -> tuple[dict, list[dict[str, str]], str]:
    """What must be equal: weights and optimizer state, the logged rows, the samples."""
    folders = [path.name for path in root.iterdir() if (path / "run.json").exists()]
    if folders != ["run"]:
        raise RuntimeError(f"it ended in another folder: {sorted(folders)}")
    status = json.loads((root / "run" / "run.json").read_text())["status"]
    if status != "finished":
        raise RuntimeError(f"its status is {status}")
    checkpoint = torch.load(root / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    with open(root / "run" / "metrics.csv", newline="") as file:
        rows = [{key: row.get(key, "") for key in COLUMNS} for row in csv.DictReader(file)]
    leftovers = [path.name for path in (root / "run").rglob("*.tmp")]
    if leftovers:
        raise RuntimeError(f"half-written files are left: {leftovers}")
    return checkpoint, rows, (root / "run" / "samples.txt").read_text()


def difference(found: tuple, expected: tuple) -> str | None:
    """Where two results differ, or None."""
    for name, value in expected[0]["state_dict"].items():
        if not torch.equal(value, found[0]["state_dict"][name]):
            return f"the weights {name}"
    states = (checkpoint[0]["optimizer_states"][0]["state"] for checkpoint in (found, expected))
    for first, second in zip(*(state.values() for state in states), strict=True):
        if any(not torch.equal(first[key], second[key]) for key in second):
            return "the optimizer's state"
    if found[1] != expected[1]:
        return f"the metrics: {[pair for pair in zip(found[1], expected[1], strict=False) if pair[0] != pair[1]][:1]}"
    return None if found[2] == expected[2] else "the samples"


def run_case(folder: Path, text: Path, case: Case, expected: tuple, longest_s: float, rng: random.Random) -> str:
    """Disturbs, resumes and compares one run. Returns what happened; raises RuntimeError for a fault."""
    folder.mkdir()
    happened = [disturb(folder, text, case, signum, longest_s, rng) for signum in case.signals]
    finish(folder, text, case.devices)
    differs = difference(result(folder), expected)
    if differs:
        raise RuntimeError(f"not equal to the undisturbed run: {differs}")
    return "; ".join(happened)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if every case ended as the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=30)
    parser.add_argument("--ints", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="also write the lines here")
    arguments = parser.parse_args(argv)
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    os.environ.update(PYTHONPATH=path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    sys.path[:0] = path.split(os.pathsep)
    import train  # noqa: F401 (once, for all the processes that are forked)
    from models.training.environment import environment

    rng = random.Random(arguments.seed)
    lines = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if arguments.log:
            arguments.log.write_text("\n".join(lines) + "\n")

    about = environment()
    commit = f"commit {about['git_commit']}{' with changes' if about['git_dirty'] else ''}"
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "lightning"))
    say(f"{about['command'].replace('python tests/storm.py', 'python -m tests.storm')}; {about['started']}")
    say(f"{commit}; {about['device']}; Python {about['python']}, {versions}")
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        text = base / "text"
        words = b"the cat sat on the mat and the dog lay by the log while it rained "
        text.write_bytes(b"".join(words[index % 60 :] for index in range(1000)))
        expected, longest_s = {}, {}
        for devices in (1, 2):
            undisturbed = base / f"undisturbed-{devices}"
            undisturbed.mkdir()
            began = time.monotonic()
            finish(undisturbed, text, devices)
            longest_s[devices] = time.monotonic() - began
            expected[devices] = result(undisturbed)
            say(f"undisturbed, {devices} process(es): {longest_s[devices]:.1f} s")
        cases = make_cases(arguments.kills, arguments.terms, arguments.ints, rng)
        for number, case in enumerate(cases, 1):
            to = "group" if case.whole_group else "first process"
            what = f"{'+'.join(s.name for s in case.signals)} to the {to}, {case.devices} process(es)"
            what += ", while a checkpoint is written" * case.while_writing
            folder = base / f"case-{number}"
            try:
                happened = run_case(folder, text, case, expected[case.devices], longest_s[case.devices], rng)
                counts["equal"] += 1
                say(f"{number:3} of {len(cases)}: {what}: equal ({happened})")
                shutil.rmtree(folder)
            except RuntimeError as fault:
                counts["FAULT"] += 1
                output = (folder / "output").read_text(errors="replace")[-2000:]
                say(f"{number:3} of {len(cases)}: {what}: FAULT: {fault}\n{output}")
        say(f"{counts['equal']} of {len(cases)} ended as the undisturbed run, seed {arguments.seed}")
    return 1 if counts["FAULT"] else 0


if __name__ == "__main__":
    sys.exit(main())
