"""Where a job trains: on a device that no other job has, by a lock file a device.

Launchers that run several jobs at once give all of them the same devices. A job takes one of them before it trains,
and waits where all are taken; a lone run takes its own without waiting, so that jobs stay off it.
"""

import logging
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from models.training.locks import Lock, holder, try_lock

# Names with commas between: where jobs of a sweep train on the CPU, each takes one of these, and no two the same.
CPU_PLACES_VARIABLE = "FLASH_COSINE_SIM_CPU_PLACES"
LOCK_ROOT = Path("/tmp")  # not TMPDIR, of which a user may have several: all processes on the machine must meet here
POLL_SECONDS = 0.2
SAY_EVERY_SECONDS = 60.0

log = logging.getLogger(__name__)


# ${num_places:} in conf/hydra/launcher/
OmegaConf.register_new_resolver("num_places", lambda: num_places(), replace=True)


@dataclass(frozen=True)
class Place:
    """A device as jobs take it.

    Attributes:
        name: what messages call it, such as "GPU 1".
        key: what its lock file is named after, the same in every process on the machine.
        index: the GPU's among those that PyTorch sees; None on a CPU.
    """

    name: str
    key: str
    index: int | None = None


def places(*, cuda: bool) -> list[Place]:
    """The devices that jobs may take: every GPU that PyTorch sees; on a CPU those that CPU_PLACES_VARIABLE names."""
    if cuda:
        # by UUID: with CUDA_VISIBLE_DEVICES processes count the same GPUs differently
        uuids = [torch.cuda.get_device_properties(index).uuid for index in range(torch.cuda.device_count())]
        return [Place(f"GPU {index}", f"gpu-{uuid}", index) for index, uuid in enumerate(uuids)]
    return [Place(f"CPU place {name}", f"cpu-{name}") for name in cpu_places()]


def cpu_places() -> list[str]:
    """The names in CPU_PLACES_VARIABLE, in order; none where it is not set.

    Raises:
        ValueError: a name is empty, has other characters than letters, digits, '.', '_' and '-', or stands twice.
    """
    given = os.environ.get(CPU_PLACES_VARIABLE, "")
    names = given.split(",") if given else []
    if not all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"{CPU_PLACES_VARIABLE} must be different names of letters, digits, '.', '_' and '-' with commas between, "
            f"got {given!r}"
        )
    return names


def num_places() -> int:
    """How many jobs can train at once, each on a device of its own; 1 where nothing bounds them."""
    return max(1, torch.cuda.device_count() or len(cpu_places()))


def lock_file(place: Place) -> Path:
    """The file whose lock means that a place is taken, in a folder of the user's own.

    Raises:
        ValueError: the folder is somebody else's, or no folder.
    """
    folder = LOCK_ROOT / f"flash_cosine_sim_attention-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(f"{folder} must be a folder of user {os.getuid()}, for the locks of devices; it is not")
    return folder / f"{place.key}.lock"


def take(among: Sequence[Place], what: str, *, on_wait: Callable[[], None]) -> tuple[Place, Lock]:
    """One of several places and its lock, as soon as one is free; says at once, and every minute, that it waits.

    Args:
        among: the places, at least one; the first that is free is taken.
        what: what for; others are told.
        on_wait: called while waiting, several times a second; ends the waiting by raising.
    """
    began = time.monotonic()
    said = None
    while True:
        for place in among:
            lock = try_lock(lock_file(place), what)
            if lock is not None:
                if said is not None:
                    log.info("%s is free, after %.0f s", place.name, time.monotonic() - began)
                return place, lock
        if said is None or time.monotonic() - said >= SAY_EVERY_SECONDS:
            said = time.monotonic()
            taken = "; ".join(f"{place.name} by {holder(lock_file(place))}" for place in among)
            log.info("waiting for a device, all are taken: %s", taken)
        on_wait()
        time.sleep(POLL_SECONDS)


def hold(devices: int, what: str) -> list[Lock]:
    """Locks a lone run's GPUs, the first ones. It waits for none: of one that is taken it says so, and shares it."""
    locks = []
    for place in places(cuda=True)[:devices]:
        lock = try_lock(lock_file(place), what)
        if lock is None:
            log.warning(
                "%s is shared with %s: both are slower, and their speeds mean little; CUDA_VISIBLE_DEVICES=N chooses "
                "another GPU",
                *(place.name, holder(lock_file(place))),
            )
        else:
            locks.append(lock)
    return locks
