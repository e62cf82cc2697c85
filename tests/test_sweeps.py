"""Sweeps: every job is listed with its end, finished ones are skipped, several run at once, and all stop together."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import time
import uuid
from pathlib import Path

import hydra_plugins.hydra_joblib_launcher  # noqa: F401 (without it these tests fail, and are not skipped)
import hydra_plugins.hydra_optuna_sweeper  # noqa: F401
import hydra_plugins.hydra_submitit_launcher  # noqa: F401
import pytest
from omegaconf import OmegaConf
from support import ROOT
from support.configuration import configure
from support.training import Popen, command
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from conf import command_line
from conf.schema import ConfigError, validate
from models.training.checkpoint_files import read_checkpoint
from models.training.identity import default_name, identity_of
from models.training.jobs import Job, sweep_group
from models.training.locks import try_lock
from models.training.places import CPU_PLACES_VARIABLE, Place, lock_file
from models.training.processes import find_processes
from models.training.report import read_results
from models.training.run_files import load_config
from models.training.runs import Run, Skipped
from models.training.sweeps import best_jobs
from train import build_module

SWEPT = ("attention_norm", "lr", "scale", "groups", "seq_len", "positions")
FINISHED = re.compile(r"^job #(\d+)(?: \((.*?)\))?: (finished|skipped): val bpc (\d\.\d{4}), ", re.MULTILINE)


def lines_of(output):
    """By job, what the console says of its end, in one line each."""
    found = re.findall(r"^job #(\d+)(?: \(.*?\))?: (?!running)(.*)$", output, re.MULTILINE)
    assert len({number for number, _ in found}) == len(found), found
    return {int(number): line for number, line in found}


def sweeps_of(root):
    """sweep.json of every sweep, the first one first."""
    return [json.loads(path.read_text()) for path in sorted(root.glob(".sweeps/*/sweep.json"))]


def statuses_of(sweep):
    return [job["status"] for job in sweep["jobs"]]


# What conf/ offers


@pytest.mark.parametrize("name", SWEPT)
def test_every_job_of_a_sweep_builds_and_none_is_another(name):
    params = OmegaConf.load(ROOT / "conf" / "sweep" / f"{name}.yaml").hydra.sweeper.params
    (key, values), *more = params.items()
    jobs = [[f"{key}={value}"] for value in str(values).split(",")]
    for key, values in more:
        jobs = [[*job, f"{key}={value}"] for job in jobs for value in str(values).split(",")]
    configs = [validate(configure(f"sweep={name}", "model=tiny", *job)) for job in jobs]
    assert len({json.dumps(identity_of(config, None)) for config in configs}) == len(jobs) >= 3
    for config in configs if name in ("attention_norm", "scale", "groups") else ():  # whose constructors may refuse
        build_module(config)


def test_launchers_and_sweeper_compose_with_what_is_tested():
    def plugin(word, kind):
        from hydra import compose, initialize_config_dir
        from hydra.core.hydra_config import HydraConfig

        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            HydraConfig.instance().set_config(compose("config", [word], return_hydra_config=True))
        return HydraConfig.get()[kind]

    parallel = plugin("hydra/launcher=parallel", "launcher")
    assert (parallel.n_jobs, parallel.batch_size) == (1, "1") and parallel._target_.endswith(".JoblibLauncher")
    processes = plugin("hydra/launcher=processes", "launcher")
    assert processes.timeout_min == 7 * 24 * 60 and processes._target_.endswith(".LocalLauncher")
    slurm = plugin("hydra/launcher=slurm", "launcher")
    assert (slurm.gpus_per_node, slurm.max_num_timeout) == (1, 10) and slurm._target_.endswith(".SlurmLauncher")
    search = plugin("hydra/sweeper=search", "sweeper")
    assert (search.max_failure_rate, search.sampler.seed) == (1.0, 0)
    assert search.sampler._target_ == "optuna.samplers.TPESampler"


@pytest.mark.parametrize("word", command_line.PLUGINS)
def test_a_plugin_that_is_not_installed_is_named_in_one_line(monkeypatch, word):
    line = ["-m", word, "seed=0,1"]
    assert command_line.answer(line) == line
    monkeypatch.setattr(command_line, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"^{word} needs hydra_plugins\.\w+, which is not installed: pip install"):
        command_line.check(line)


def test_the_line_of_a_wandb_sweep_is_one_of_train_py():
    sweep = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "wandb_sweep.yaml"))
    values = {"attention": "regular", "norm": "post", "lr": 0.0003}
    assert set(sweep["parameters"]) == set(values) and sweep["metric"] == {"name": "val/bpc", "goal": "minimize"}
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    words = {"env": ["/usr/bin/env"], "program": [sweep["program"]], "args_no_hyphens": arguments["args_no_hyphens"]}
    line = []
    for word in create_sweep_command(sweep["command"]):  # as wandb's agent does
        line += words[word[2:-1]] if word.startswith("${") else [word]
    assert line[:3] == ["/usr/bin/env", "python", "train.py"] and (ROOT / line[2]).is_file()
    assert command_line.answer(line[3:]) == line[3:]
    config = validate(configure(*line[3:]))
    assert (config.attention.kind, config.norm.kind, config.lr, config.logger.offline) == (
        "regular",
        "post",
        3e-4,
        False,
    )


def test_the_same_sweep_started_again_has_the_same_wandb_group(tmp_path):
    for name, group in (("2026-01-02", "lr_2026-01-01"), ("2026-01-03", None)):
        (tmp_path / name).mkdir()
        if group:
            (tmp_path / name / "sweep.json").write_text(json.dumps({"group": group}))
    assert sweep_group(tmp_path / "2026-01-02", "lr") == "lr_2026-01-01"
    assert sweep_group(tmp_path / "2026-01-03", "lr") == "lr_2026-01-03"


# One process after the other

# From the command line's answer on, and with a kill -9 in the seventh job, after the checkpoint of step 4.
KILLED_IN_THE_SEVENTH = """
import os, signal, sys
from conf.command_line import answer
sys.argv[1:] = answer(sys.argv[1:])
from models.training.callbacks import TrainingMetrics
finished, log = [], TrainingMetrics.on_train_batch_end
def count(self, trainer, *args):
    log(self, trainer, *args)
    if trainer.global_step == 8 and trainer not in finished:
        finished.append(trainer)
    if len(finished) == 6 and trainer.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingMetrics.on_train_batch_end = count
"""


@pytest.mark.training
def test_a_killed_sweep_started_again_skips_what_is_finished_and_lists_every_job(text, tmp_path):
    jobs = ["sweep=attention_norm", "seed=0,1,2", "attention.scale=8"]
    killed = command(text, tmp_path, *jobs, flags=["-m"], code=KILLED_IN_THE_SEVENTH)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = command(text, tmp_path, *jobs, flags=["-m"])
    assert again.returncode == 0, again.stderr
    ends = lines_of(again.stdout)
    assert [ends[number].split(":")[0] for number in range(12)] == ["skipped"] * 6 + ["finished"] * 6
    assert "continues at step 4" in again.stdout
    wrong = command(text, tmp_path, "seed=3,-1", "lr=1e30", "trainer.clip_norm=null", flags=["-m"])
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr + wrong.stdout
    ends |= {12 + number: line for number, line in lines_of(wrong.stdout).items()}
    assert len(ends) == 14
    assert ends[12].startswith("diverged: the gradient's norm is ")
    assert ends[13].startswith("refused: seed must be an integer from 0 to 2**32 - 1, got -1, ")

    first, second, third = sweeps_of(tmp_path)
    assert len(first["jobs"]) == 12 and "ended" not in first  # what was to be done, however it ended
    assert first["group"] == second["group"] != third["group"]
    folders = [Path(job["folder"]) for job in (*second["jobs"], *third["jobs"])]
    assert len(set(folders)) == 14 == len(list(tmp_path.glob("*/run.json")))
    assert [read_results(folder).status for folder in folders] == ["finished"] * 12 + ["diverged", "refused"]
    for folder, job in zip(folders, second["jobs"], strict=False):
        scale = OmegaConf.load(folder / "config.yaml").attention.get("scale")
        assert scale == (8.0 if "attention=cosine" in job["overrides"] else None)
        assert job["val_bpc"] == pytest.approx(read_results(folder).last("val/bpc"))
    assert f"compare: python -m scripts.compare {shlex.join(map(str, folders[:12]))}\n" in again.stdout
    best = min(second["jobs"], key=lambda job: job["val_bpc"])
    assert f"best: #{best['job']} {' '.join(best['overrides'][:2])}" in again.stdout
    assert "12 jobs: 6 skipped, 6 finished; records in " in again.stdout


@pytest.mark.training
def test_what_a_job_of_a_sweep_goes_on_with(text, tmp_path):
    def sweep(*changes):
        ended = command(text, tmp_path, "max_steps=4", "seed=0,1", *changes, flags=["-m"])
        return ended, lines_of(ended.stdout)

    _, ends = sweep()
    assert [line.split(":")[0] for line in ends.values()] == ["finished", "finished"]
    first, second = (Path(job["folder"]) for job in sweeps_of(tmp_path)[0]["jobs"])
    # one is tested later, another is being written by this process
    with open(second / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended, ends = sweep("test=true")
    assert ended.returncode == 0, ended.stderr
    assert ends[0].startswith("finished: val bpc") and ends[0].endswith(str(first))
    assert read_results(first).last("test/bpc") > 0 and read_results(second).last("test/bpc") is None
    assert ends[1].startswith("skipped: process ") and ends[1].endswith(f" is at it, {second}")
    assert read_results(first).series("val/bpc")[0] == [4]  # nothing was trained again

    # another length is another run, in a sweep; so is every job with resume=new
    _, ends = sweep("max_steps=2")
    assert [line.split(":")[0] for line in ends.values()] == ["finished", "finished"]
    _, ends = sweep("resume=new", "max_steps=2")
    assert [line.split(":")[0] for line in ends.values()] == ["finished", "finished"]
    names = sorted(path.parent.name for path in tmp_path.glob("*/run.json"))
    assert names == sorted(f"{folder.name}{more}" for folder in (first, second) for more in ("", "-2", "-3"))
    assert read_checkpoint(first / "checkpoints/last.ckpt")["global_step"] == 4
    # with resume=auto the newest run goes on, as in a lone run
    ended, ends = sweep("resume=auto", "max_steps=6", "seed=1,1")
    assert ends[0].startswith("finished") and ends[0].endswith(f"{second}-3") and "continues at step 2" in ended.stdout
    assert ends[1].startswith("skipped: val bpc")  # the same job twice


def test_numbers_of_other_bytes_have_a_best_of_their_own(tmp_path):
    def job(number, bpc, sha256="ab" * 32, val_scored=999, seq_len=64, name="text"):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        corpus = {"name": name, "sha256": sha256, "val_scored": val_scored}
        (folder / "run.json").write_text(json.dumps({"corpus": corpus, "identity": {"seq_len": seq_len}}))
        return {"job": number, "val_bpc": bpc, "folder": str(folder)}

    one, two, failed = job(0, 2.0), job(1, 1.5, name="a copy"), {"job": 2, "status": "failed"}
    assert best_jobs([one, two, failed]) == [("", two)] and best_jobs([failed]) == []
    for change, named in (
        ({"sha256": "cd" * 32}, "the text of SHA-256 cdcdcdcd (999 bytes), seq_len 64"),
        ({"val_scored": 77}, "the text of SHA-256 abababab (77 bytes), seq_len 64"),
        ({"seq_len": 32}, "the text of SHA-256 abababab (999 bytes), seq_len 32"),
    ):
        apart, usual = job(3, 1.0, **change), " of the text of SHA-256 abababab (999 bytes), seq_len 64"
        assert best_jobs([one, apart, two]) == [(usual, two), (f" of {named}", apart)]


@pytest.mark.training
def test_optuna_searches_and_names_the_best(text, tmp_path):
    line = ["hydra/sweeper=search", "hydra.sweeper.n_trials=2", "lr=tag(log,interval(1e-4,1e-2))", "max_steps=4"]
    outputs = []
    for status in ("finished", "skipped"):
        search = command(text, tmp_path, *line, flags=["-m"])
        assert search.returncode == 0, search.stderr
        outputs.append(search.stdout)
        found = FINISHED.findall(search.stdout)
        assert [(number, ended) for number, _, ended, _ in found] == [("0", status), ("1", status)]
    best = min(found, key=lambda job: float(job[3]))
    assert re.fullmatch(r"lr=0\.00\d+", best[1])
    for output in outputs:
        assert f"Best parameters: {{'lr': {best[1].removeprefix('lr=')}}}" in output
        assert f"best: #{best[0]} {best[1]}, val bpc {best[3]}\n" in output
    (stored, _) = (OmegaConf.load(path) for path in tmp_path.glob(".sweeps/*/optimization_results.yaml"))
    assert stored.best_params.lr == float(best[1].removeprefix("lr="))


# Several at once


def named_places(*names):
    """Places on a CPU that no other test has, and what tells jobs of them."""
    found = [Place(name, f"cpu-{name}-{uuid.uuid4().hex}") for name in names]
    return found, {CPU_PLACES_VARIABLE: ",".join(place.key.removeprefix("cpu-") for place in found)}


def waited_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.returncode is None and time.monotonic() < deadline, process.communicate(timeout=10)
        time.sleep(0.1)


def times_of(root):
    """By place, when each run on it was at work: of its log the first and the last line's time."""
    times = {}
    for path in root.glob("*/run.json"):
        stamps = re.findall(r"^(\S+ \S+) (?:INFO|WARNING) ", (path.parent / "train.log").read_text(), re.MULTILINE)
        at_work = [stamp for stamp, line in zip(stamps, _log_lines(path.parent), strict=True) if "device" not in line]
        times.setdefault(json.loads(path.read_text())["place"], []).append((at_work[0], at_work[-1]))
    return times


def _log_lines(folder):
    return [line for line in (folder / "train.log").read_text().splitlines() if re.match(r"\d{4}-", line)]


@pytest.mark.training
def test_joblib_has_one_job_a_device_and_leaves_one_alone_that_is_taken(text, tmp_path):
    (one, two, busy), variables = named_places("one", "two", "busy")
    held = [try_lock(lock_file(place), "the test") for place in (one, two, busy)]
    line = ["hydra/launcher=parallel", "seed=0,1,2,3"]
    process = Popen(text, tmp_path, *line, flags=["-m"], variables=variables)
    try:
        # both are free at once, while several jobs wait: so two are at work at the same time
        logs = tmp_path.glob
        waited_for(
            lambda: sum("waiting for a device" in path.read_text() for path in logs(".sweeps/*/jobs/*.log")) >= 2,
            process,
        )
        for lock in held[:2]:
            lock.release()
        output, errors = process.communicate(timeout=600)
    finally:
        for lock in held:
            lock.release()
    assert process.returncode == 0, errors
    assert sorted(line.split(":")[0] for line in lines_of(output).values()) == ["finished"] * 4
    times = times_of(tmp_path)
    assert set(times) == {f"CPU place {place.key.removeprefix('cpu-')}" for place in (one, two)}
    for at_work in times.values():
        at_work.sort()
        assert all(end <= begin for (_, end), (begin, _) in zip(at_work, at_work[1:], strict=False)), at_work
    assert f"running: on CPU place {one.key.removeprefix('cpu-')}, " in output
    assert {json.loads(path.read_text())["process"] for path in tmp_path.glob(".sweeps/*/jobs/*.json")} - {process.pid}
    assert "waiting for a device, all are taken: " in "".join(
        path.read_text() for path in tmp_path.glob(".sweeps/*/jobs/*.log")
    )
    assert "steps of 256 bytes" not in output  # each job's own lines are in its own file


@pytest.mark.training
def test_submitit_stops_as_a_whole_and_goes_on(text, tmp_path):
    (place,), variables = named_places("only")
    line = ["hydra/launcher=processes", "seed=0,1", "max_steps=300", "trainer.val_every=300"]
    process = Popen(text, tmp_path, *line, flags=["-m"], variables=variables)
    waited_for(lambda: any(len(path.read_text().splitlines()) > 5 for path in tmp_path.glob("*/metrics.csv")), process)
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 143, errors
    (stopped,) = sweeps_of(tmp_path)
    assert set(statuses_of(stopped)) <= {"interrupted", "not started"} and "interrupted" in statuses_of(stopped)
    assert "to go on: the same command again" in output
    (trained,) = (path.parent for path in tmp_path.glob("*/metrics.csv"))
    step = read_checkpoint(trained / "checkpoints/last.ckpt")["global_step"]
    assert 10 <= step < 300 and read_results(trained).status == "interrupted"

    again = command(text, tmp_path, *line, flags=["-m"], variables=variables)
    assert again.returncode == 0, again.stderr
    assert [line.split(":")[0] for line in lines_of(again.stdout).values()] == ["finished", "finished"]
    assert f"continues at step {step}" in (trained / "train.log").read_text()
    (at_work,) = times_of(tmp_path).values()
    assert len(at_work) == 2


@pytest.mark.training
def test_a_sweep_whose_folder_cannot_be_made_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "file").write_text("")
    ended = command(text, tmp_path / "file", "seed=0,1", flags=["-m"])
    assert ended.returncode == 1 and "Traceback" not in ended.stdout + ended.stderr
    said = f"error: run_root must be a folder that can be written to, or that can be made, got '{tmp_path / 'file'}': "
    (line,) = ended.stderr.splitlines()
    assert line.startswith(said)


def finished_run(root, text, name, *changes, keys=None, **record):
    """The folder of a run as it is recorded, its config.yaml with further keys; and its configuration."""
    line = ["model=tiny", "data=file", f"data.path={text}", "trainer.accelerator=cpu", f"run_root={root}", *changes]
    config = validate(configure(*line))
    (root / name).mkdir(parents=True)
    stored = OmegaConf.merge(config, OmegaConf.from_dotlist(keys or []))
    OmegaConf.save(stored, root / name / "config.yaml")
    whole = {"status": "finished", "identity": identity_of(config, "0" * 64), **record}
    (root / name / "run.json").write_text(json.dumps(whole))
    (root / name / "metrics.csv").write_text(f"step,val/bpc\n{config.max_steps},2.5\n")
    return root / name, config


def found_by_a_job(config, swept=()):
    """The folder of a sweep's job of a configuration, and whether that run is finished already."""
    job = Run(config, "new", find_processes(devices=1, num_nodes=1), in_sweep=True, swept=swept)
    try:
        job.find("0" * 64)
        return job.folder.name, False
    except Skipped as skipped:
        return skipped.folder.name, True
    finally:
        job.close()


def test_a_run_whose_schedule_was_set_apart_is_another(text, tmp_path):
    """Earlier versions took optimizer.max_steps, which no identity has."""
    _, config = finished_run(tmp_path / "plain", text, "whole")
    assert found_by_a_job(config) == ("whole", True)
    _, config = finished_run(tmp_path / "apart", text, "longer", keys=["optimizer.max_steps=9000"])
    assert found_by_a_job(config) == ("new", False)


def test_a_run_that_was_changed_on_its_way_is_another(text, tmp_path):
    changed = [{"step": 9, "changed": {"lr": [1e-3, 2e-3]}}]
    _, config = finished_run(tmp_path / "lr", text, "mixed", "lr=2e-3", resumed_with=changed)
    assert found_by_a_job(config) == ("new", False)
    changed = [{"step": 9, "changed": {"max_steps": [9, 2000]}}]
    _, config = finished_run(tmp_path / "length", text, "longer", resumed_with=changed)
    assert found_by_a_job(config) == ("new", False)
    config.resume = "auto"  # with which a run of another length goes on
    assert found_by_a_job(config) == ("longer", True)


@pytest.mark.parametrize(
    "value", ["attention.backend=sdpa", "compile=true", "micro_batch_tokens=4096", "trainer.log_every=7", "logger=none"]
)
def test_a_key_that_changes_no_numbers_tells_jobs_apart_where_it_is_swept(text, tmp_path, value):
    key = value.partition("=")[0]
    _, config = finished_run(tmp_path, text, "plain")
    changed = validate(configure("model=tiny", "data=file", f"data.path={text}", "trainer.accelerator=cpu",
                                 f"run_root={tmp_path}", value))  # fmt: skip
    assert found_by_a_job(config) == found_by_a_job(changed) == ("plain", True)
    assert found_by_a_job(config, ["lr", key]) == ("plain", True)
    assert found_by_a_job(changed, ["lr", key]) == ("new", False)


def test_a_mark_that_a_refused_job_left_is_no_run(text, tmp_path):
    folder, config = finished_run(tmp_path, text, "refused")
    (folder / "config.yaml").unlink()
    assert found_by_a_job(config, ["compile"]) == ("new", False)


def test_where_the_bytes_are_tells_no_jobs_apart_but_their_names(text, tmp_path):
    _, config = finished_run(tmp_path, text, "plain")
    config.data.path = "moved"
    assert found_by_a_job(config, ["data.path"]) == ("plain", True)
    names = [default_name(config, {}, [f"data.path={path}"], ["data.path"]) for path in ("one.txt", "two.txt")]
    assert names[0] != names[1]


@pytest.mark.parametrize(
    "line, words, swept",
    [
        (["compile=true,false", "lr=1e-3"], [["compile=true", "lr=1e-3"], ["compile=false", "lr=1e-3"]], ["compile"]),
        (["compile=choice(true,false)", "lr=1e-3"], [["compile=true", "lr=1e-3"]], ["compile"]),  # a search's first
        (["compile=true", "lr=1e-3"], [["compile=True", "lr=1e-3", "++seed=1"]], []),
        (["logger.tags=[a, b]", "name='a,b'"], [["logger.tags=[a,b]", "name='a,b'"]], []),
    ],
)
def test_a_sweeps_keys_of_several_values(tmp_path, line, words, swept):
    jobs = [{"job": number, "overrides": overrides} for number, overrides in enumerate(words)]
    (tmp_path / "sweep.json").write_text(json.dumps({"overrides": line, "jobs": jobs}))
    assert Job(tmp_path, 0, words[0]).swept == swept
    assert Job(tmp_path / "none", 0, words[0]).swept == []


def test_jobs_that_differ_in_a_key_that_changes_no_numbers_each_run(text, tmp_path):
    line = ["attention.backend=sdpa,reference", "seed=0,1", "max_steps=4"]
    for status in ("finished", "skipped"):
        swept = command(text, tmp_path, *line, flags=["-m"])
        assert swept.returncode == 0, swept.stderr
        jobs = [json.loads(path.read_text()) for path in sorted(max(tmp_path.glob(".sweeps/2*")).glob("jobs/*.json"))]
        assert [job["status"] for job in jobs] == [status] * 4
        backends = [load_config(Path(job["folder"])).attention.backend for job in jobs]
        assert backends == ["sdpa", "sdpa", "reference", "reference"]
        names = [Path(job["folder"]).name for job in jobs]
        assert ["backendsdpa" in name for name in names] == [True, True, False, False]
    assert len(set(names)) == 4


def test_a_job_that_another_sweep_claims_is_skipped(text, tmp_path):
    config = validate(
        configure("model=tiny", "data=file", f"data.path={text}", "trainer.accelerator=cpu", f"run_root={tmp_path}")
    )
    runs = [Run(config, name, find_processes(devices=1, num_nodes=1), in_sweep=True) for name in ("x", "y")]
    runs[0].find("0" * 64)
    with pytest.raises(Skipped, match=rf"^process {os.getpid()} on \S+, of x is at it$"):
        runs[1].find("0" * 64)
    runs[1].find("1" * 64)  # of other bytes it is another run
    for run in runs:
        run.close()
    assert not list(tmp_path.glob(".sweeps/claims/*"))
