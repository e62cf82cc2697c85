"""Which processes make up a run: its own, torchrun's, srun's, and what a scheduler left in the environment."""

import os
import signal
import socket
import time

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from support import ROOT
from support.training import Popen, fit, losses, metrics, same, weights

from models.training.processes import PLACE_VARIABLES, find_processes
from models.training.report import read_results
from models.training.started import RUN_VARIABLE

pytestmark = pytest.mark.training
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
         "SLURM_JOB_ID": "7", "SLURM_NODELIST": "a1", "SLURM_STEP_ID": "0"}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; none of those that tell a process's place is left from elsewhere."""
    for name in (*PLACE_VARIABLES, *TORCHRUN, *SLURM, RUN_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize("stray", [{"RANK": "1"}, {"SLURM_PROCID": "1"}, {**SLURM, "RANK": "3", "WORLD_SIZE": "4"}])
def test_a_stray_rank_makes_no_second_process_of_a_run_of_its_own(environment, stray):
    environment(**stray)
    rank_zero_only.rank = 1  # as Lightning took it from there when it was imported
    processes = find_processes(devices=1, num_nodes=1)
    assert processes.is_first and isinstance(processes.environment, LightningEnvironment)
    assert rank_zero_only.rank == 0 and not {*PLACE_VARIABLES} & {*os.environ}
    assert not processes.environment.creates_processes_externally and processes.share("x") == "x"


def test_torchrun_and_srun_are_recognised(environment):
    environment(**TORCHRUN, WORLD_SIZE="4", RANK="3")
    processes = find_processes(devices=2, num_nodes=2)
    assert isinstance(processes.environment, TorchElasticEnvironment)
    assert (processes.rank, processes.world_size, processes.is_first, rank_zero_only.rank) == (3, 4, False, 3)
    with pytest.raises(ValueError, match="the 4 processes that torchrun started, got 1 .* give trainer.devices=2 "):
        find_processes(devices=1, num_nodes=1)


def test_srun_is_one_run_where_its_tasks_are_the_devices_and_several_runs_where_they_are_not(environment):
    environment(**SLURM)
    processes = find_processes(devices=2, num_nodes=1)
    assert isinstance(processes.environment, SLURMEnvironment) and processes.rank == 1
    assert find_processes(devices=1, num_nodes=1).is_first


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEPID": "4294967290"}])
def test_in_a_batch_script_without_srun_a_run_starts_its_own_processes(environment, step):
    """Nobody else does: to wait for them would be for ever."""
    environment(**{name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"} | step)
    processes = find_processes(devices=2, num_nodes=1)
    assert isinstance(processes.environment, LightningEnvironment) and processes.is_first
    with pytest.raises(ValueError, match="trainer.num_nodes=2 needs torchrun or srun"):
        find_processes(devices=1, num_nodes=2)


@pytest.mark.usefixtures("environment")
def test_several_machines_need_a_launcher():
    with pytest.raises(ValueError, match="trainer.num_nodes=2 needs torchrun or srun"):
        find_processes(devices=2, num_nodes=2)


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launched(kind, rank):
    place = {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    if kind == "torchrun":
        return {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", **place}
    return {**SLURM, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
            "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train"}  # fmt: skip


@pytest.mark.parametrize("kind", ["torchrun", "srun"])
def test_two_launched_processes_are_one_run(text, tmp_path, kind):  # noqa: F811
    """As the launcher starts them; the losses are those of one process."""
    keys = ["name=run", "model.dropout=0", "max_steps=4", "trainer.log_every=1"]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    keys.append("trainer.devices=2")
    started = [Popen(text, tmp_path, *keys, variables={**where, **launched(kind, rank)}) for rank in (0, 1)]
    assert [process.wait(600) for process in started] == [0, 0]
    assert [path.name for path in tmp_path.iterdir() if (path / "run.json").exists()] == ["run"]
    assert read_results(tmp_path / "run").status == "finished" and weights(tmp_path / "run")["global_step"] == 4
    same(losses(tmp_path / "run"), losses(fit(text, tmp_path / "alone", *keys[1:-1])))


def test_a_process_that_waits_for_the_others_says_so_and_hears_signals(text, tmp_path):  # noqa: F811
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    alone = Popen(text, tmp_path, "name=run", "trainer.devices=2", variables={**where, **launched("torchrun", 0)})
    while True:  # until it listens, and waits
        with socket.socket() as other:
            if other.connect_ex(("127.0.0.1", int(where["MASTER_PORT"]))) == 0:
                break
        assert alone.returncode is None
        time.sleep(0.05)
    os.kill(alone.pid, signal.SIGTERM)
    out, errors = alone.communicate(timeout=60)
    assert alone.returncode == 143, errors
    assert f"waiting for 1 more processes of this run at 127.0.0.1:{where['MASTER_PORT']}" in out
    assert not list(tmp_path.glob("*/run.json"))


def test_a_run_of_its_own_logs_whatever_a_scheduler_says(text, tmp_path):  # noqa: F811
    alone = Popen(text, tmp_path, "name=run", "max_steps=2", variables={**SLURM, "RANK": "1"})
    assert alone.wait(600) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["2"] and (tmp_path / "run/samples.txt").exists()


def test_a_signal_that_meets_a_process_before_its_first_line_ends_the_run_in_order(text, tmp_path):
    """Python imports sitecustomize before all else; a Ctrl-C reaches every process of a terminal."""
    begun = tmp_path / "begun"
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, time
if {RUN_VARIABLE!r} in os.environ:
    os.close(os.open({str(begun)!r}, os.O_CREAT))
    time.sleep(2)
""")
    path = os.pathsep.join(str(folder) for folder in (tmp_path, ROOT, ROOT / "kernels", ROOT / "tests"))
    process = Popen(text, tmp_path, "name=run", "trainer.devices=2", variables={"PYTHONPATH": path})
    while not begun.exists():
        time.sleep(0.01)
        assert process.returncode is None
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "terminated with code" not in errors, errors
