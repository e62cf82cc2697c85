"""Locks and devices: no two jobs on one, whoever dies; waiting is said, and a lone run waits for nobody."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import lightning
import pytest
import torch
from support import ROOT
from support.configuration import configure

from conf.schema import ConfigError, validate
from models.training import places as places_module
from models.training import trainer as trainer_module
from models.training.jobs import SWEEP_VARIABLE, Job
from models.training.length import Length
from models.training.locks import holder, try_lock
from models.training.places import CPU_PLACES_VARIABLE, Place, cpu_places, hold, lock_file, num_places, places, take
from models.training.processes import find_processes
from models.training.runs import Run
from models.training.stopping import Stopping


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(places_module, "LOCK_ROOT", tmp_path)
    monkeypatch.setattr(places_module, "POLL_SECONDS", 0.01)


@pytest.fixture(name="gpus")
def two_gpus(monkeypatch):
    """Two GPUs, as PyTorch shows them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"0000-{index + 6}")
    )
    return places(cuda=True)


# Locks


def test_a_lock_is_held_once_and_says_by_whom(tmp_path):
    path = tmp_path / "x.lock"
    lock = try_lock(path, "for one")
    assert try_lock(path, "for two") is None and holder(path).endswith(", for one")
    assert holder(path).startswith(f"process {os.getpid()} on ")
    lock.release()
    assert not path.exists() and holder(path) == "another process"
    assert try_lock(path, "for two") is not None


def test_a_killed_process_holds_nothing(tmp_path):
    code = f"""
import time
from pathlib import Path
from models.training.locks import try_lock
lock = try_lock(Path({str(tmp_path / "x.lock")!r}), "a job")
print("held", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        assert try_lock(tmp_path / "x.lock", "mine") is None
        assert holder(tmp_path / "x.lock").startswith(f"process {process.pid} on ")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert try_lock(tmp_path / "x.lock", "mine") is not None


def _count(path, counter, rounds):
    for _ in range(rounds):
        while (lock := try_lock(path, "counting")) is None:
            pass
        counter.write_text(str(int(counter.read_text()) + 1))  # loses some where two are at it
        lock.release()


def test_removing_the_file_lets_no_two_in(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count, args=(tmp_path / "x.lock", counter, 200)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert counter.read_text() == "800"


# Places


def test_gpus_are_known_by_uuid_and_cpu_places_by_name(gpus, monkeypatch):
    assert gpus == [Place("GPU 0", "gpu-0000-6", 0), Place("GPU 1", "gpu-0000-7", 1)] and num_places() == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert places(cuda=False) == [] and num_places() == 1
    monkeypatch.setenv(CPU_PLACES_VARIABLE, "left,right,r2.d-2")
    assert [place.key for place in places(cuda=False)] == ["cpu-left", "cpu-right", "cpu-r2.d-2"] and num_places() == 3


@pytest.mark.parametrize("given", ["a,", "a,a", "a b", "../a", ","])
def test_wrong_names_of_places_are_refused(monkeypatch, given):
    monkeypatch.setenv(CPU_PLACES_VARIABLE, given)
    with pytest.raises(ValueError, match=rf"{CPU_PLACES_VARIABLE} must be different names of letters, .* got "):
        cpu_places()


def test_somebody_elses_folder_of_locks_is_refused(tmp_path):
    (tmp_path / f"flash_cosine_sim_attention-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="must be a folder of user"):
        lock_file(Place("GPU 0", "gpu-0", 0))


def test_the_first_free_place_is_taken_and_waiting_is_said(caplog):
    among = [Place("GPU 0", "gpu-a", 0), Place("GPU 1", "gpu-b", 1)]
    caplog.set_level(logging.INFO)
    place, first = take(among, "run one", on_wait=pytest.fail)
    assert place.index == 0
    place, second = take(among, "run two", on_wait=pytest.fail)
    assert place.index == 1 and not caplog.messages
    waits = []

    def on_wait():
        waits.append(None)
        if len(waits) == 3:
            second.release()

    assert take(among, "run three", on_wait=on_wait)[0].index == 1 and len(waits) == 3
    waiting, free = caplog.messages
    me = f"process {os.getpid()} on "
    assert waiting.startswith(f"waiting for a device, all are taken: GPU 0 by {me}") and ", run one; GPU 1" in waiting
    assert free.startswith("GPU 1 is free, after ")
    first.release()


def test_a_lone_run_keeps_jobs_off_its_gpus_and_shares_one_that_is_taken(gpus, caplog):
    locks = hold(1, "run lone")
    assert [lock.path for lock in locks] == [lock_file(gpus[0])]
    assert take(gpus, "a job", on_wait=pytest.fail)[0].index == 1
    assert hold(1, "run other") == []
    (message,) = caplog.messages
    assert message.startswith("GPU 0 is shared with process ") and "run lone: both are slower" in message


# Runs


def run_on(options, *, in_sweep):
    run = Run(validate(configure(*options)), "x", find_processes(devices=1, num_nodes=1), in_sweep=in_sweep)
    run.folder = Path("runs/x")
    return run


@pytest.mark.usefixtures("gpus")
def test_a_job_trains_on_the_gpu_that_it_took(monkeypatch):
    first = run_on([], in_sweep=True)
    second = run_on([], in_sweep=True)
    assert [run.take_devices(cuda=True, devices=1, on_wait=pytest.fail) for run in (first, second)] == [0, 1]
    assert second.record["place"] == "GPU 1"
    lone = run_on([], in_sweep=False)
    assert lone.take_devices(cuda=True, devices=1, on_wait=pytest.fail) is None
    first.close()
    third = run_on([], in_sweep=True)
    assert third.take_devices(cuda=True, devices=1, on_wait=pytest.fail) == 0

    seen = {}

    class Stop(Exception):
        pass

    def build(**options):
        seen.update(options)
        raise Stop

    monkeypatch.setattr(lightning, "Trainer", build)
    for gpu, devices in ((1, [1]), (None, 1)):
        with pytest.raises(Stop):
            trainer_module.build_trainer(
                run_dir=Path("unused"), loggers=[], callbacks=[], length=Length(1), accumulate=1,
                options=validate(configure()).trainer, processes=find_processes(devices=1, num_nodes=1),
                stopping=Stopping(), gpu=gpu,
            )  # fmt: skip
        assert (seen["accelerator"], seen["devices"]) == ("gpu", devices)


def test_a_job_does_not_fall_to_the_cpu_without_a_word(monkeypatch, tmp_path):
    told = {"process": 1, "folder": str(tmp_path), "cuda_visible_devices": "2,3", "gpus": 2}
    monkeypatch.setenv(SWEEP_VARIABLE, json.dumps(told))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = Job(tmp_path, 0, [])
    with pytest.raises(ConfigError, match=r"would be the CPU: the sweep has 2 GPUs, .*\(CUDA_VISIBLE_DEVICES=''\)"):
        job.check_gpu("auto")
    job.check_gpu("cpu")
    # submitit's local executor leaves no GPU: the sweep's own count again
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        seen = job.run(lambda: float(os.environ["CUDA_VISIBLE_DEVICES"].replace(",", ".")), pytest.fail)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert seen == 2.3
    monkeypatch.setenv(SWEEP_VARIABLE, json.dumps({**told, "gpus": 0}))
    job.check_gpu("auto")
