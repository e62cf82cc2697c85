"""Which processes make up a run, and which of them this one is.

A run of several devices starts its own processes, or is started by torchrun or srun, one process a device. What a
scheduler's variables say otherwise is not believed: several runs may be packed into one job, each a run of its own.
"""

import datetime
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import lightning
import torch
import torch.distributed
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.distributed_c10d import default_pg_timeout

from models.training.started import RUN_VARIABLE

log = logging.getLogger(__name__)

PATIENCE = datetime.timedelta(minutes=10)  # for the other processes, which may still read their text
SPECIAL_STEPS = 2**32 - 16  # from here on Slurm's numbers are not srun's: a batch script's, an interactive shell's

# What Lightning, at import or later, takes a process's place in a run from.
PLACE_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"),
)


@dataclass
class Processes:
    """The processes of a run.

    Attributes:
        environment: how Lightning finds its place among them.
        rank: this process's, 0 for the one that writes.
        world_size: how many there are.
        joined: whether this module opened the process group.
    """

    environment: ClusterEnvironment
    rank: int
    world_size: int
    joined: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def is_started_by_first(self) -> bool:
        """Whether the first process of the run started this one, and reports for it."""
        return RUN_VARIABLE in os.environ and not self.is_first

    def share(self, value: Any) -> Any:
        """What the first process says, on all of those that torchrun or srun started."""
        if not self.joined:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def leave(self) -> None:
        """Closes the process group if it was opened here."""
        if self.joined and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self.joined = False


def find_processes(*, devices: int, num_nodes: int) -> Processes:
    """This process's place in a run on num_nodes machines with so many devices each.

    Raises:
        ValueError: torchrun started another number of processes, or nothing starts those on other machines.
    """
    expected = devices * num_nodes
    if RUN_VARIABLE in os.environ:  # started by the first process, which has set the rest
        environment = LightningEnvironment()
        return _place(environment, int(os.environ["LOCAL_RANK"]), expected)
    if TorchElasticEnvironment.detect() and (expected > 1 or int(os.environ["WORLD_SIZE"]) > 1):
        environment = TorchElasticEnvironment()
        if environment.world_size() != expected:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            raise ValueError(
                f"trainer.devices * trainer.num_nodes must be the {environment.world_size()} processes that torchrun "
                f"started, got {devices} * {num_nodes}; give trainer.devices={local} "
                f"trainer.num_nodes={environment.world_size() // local}"
            )
        return _place(environment, environment.global_rank(), expected)
    if expected > 1 and _is_srun_task() and os.environ.get("SLURM_NTASKS") == str(expected):
        try:
            environment = SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:  # Lightning wants --ntasks-per-node
            raise ValueError(f"srun started {expected} processes, but {error}") from error
        return _place(environment, environment.global_rank(), expected)
    if num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={num_nodes} needs torchrun or srun to start {devices} processes on each of the machines"
        )
    for name in PLACE_VARIABLES:  # a run of its own, whatever a scheduler put there for something else
        os.environ.pop(name, None)
    return _place(LightningEnvironment(), 0, expected)


def _is_srun_task() -> bool:
    """Whether srun started this process. In a batch script or a shell of salloc the same variables stand, but for the
    number of a step, and no other process would ever come.
    """
    step = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", ""))
    return SLURMEnvironment.detect() and step.isdigit() and int(step) < SPECIAL_STEPS


def _place(environment: ClusterEnvironment, rank: int, world_size: int) -> Processes:
    rank_zero_only.rank = rank  # Lightning took it from the variables above when it was imported
    return Processes(environment, rank, world_size)


def join(processes: Processes, *, cuda: bool) -> None:
    """Opens the process group of a run that torchrun or srun started, before Lightning does, which then takes it.

    The first process decides about the run's folder, and the others have to know before they can build a trainer.

    Raises:
        ValueError: they did not all come.
    """
    if processes.world_size == 1 or isinstance(processes.environment, LightningEnvironment):
        return
    environment = processes.environment
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    if cuda:
        torch.cuda.set_device(environment.local_rank())
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_meet(processes),
        rank=processes.rank,
        world_size=processes.world_size,
    )
    processes.joined = True


def _meet(processes: Processes) -> torch.distributed.Store:
    """Where the processes find each other, once all have come. Waits in a thread: PyTorch would hear no signal."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    log.info("waiting for %d more processes of this run at %s", processes.world_size - 1, where)
    found: list[torch.distributed.Store | Exception] = []

    def meet() -> None:
        try:
            met = torch.distributed.rendezvous("env://", processes.rank, processes.world_size, timeout=PATIENCE)
            found.append(next(met)[0])
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    (store,) = found
    if isinstance(store, Exception):
        raise ValueError(
            f"the {processes.world_size} processes of this run did not meet at {where}: {store}"
        ) from store
    store.set_timeout(default_pg_timeout)
    return torch.distributed.PrefixStore("default_pg", store)


def end_started(trainer: lightning.Trainer, *, patience_s: float) -> None:
    """Sees the processes end that a trainer has started, and kills those that do not in time.

    One that waits for this process would wait on when it is gone. Lightning watches them and, where one is gone, kills
    this process, which has yet to say how the run ended: its watch is over.
    """
    started = getattr(trainer.strategy.launcher, "procs", [])
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._run = lambda: True
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and any(process.poll() is None for process in started):
        time.sleep(0.05)
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
