"""Start a recipe on several ranks, and join the others as one of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from agentft import progress
from agentft.distributed.config import DistributedConfig, choose_topology
from agentft.distributed.launch import Entry, start_ranks
from agentft.errors import ConfigError, RankError
from agentft.runs import RunFolder, RunState, read_json
from agentft.runtime import World, available_cores, join_world, leave_world
from agentft.signals import StopSignal

log = logging.getLogger(__name__)


def run_on_ranks(
    entry: Entry,
    payload: str,
    distributed: DistributedConfig,
    *,
    folder: str,
    threads: int | None,
    require: Callable[[int], None] = lambda ranks: None,
) -> Any:
    """Start the ranks of this machine, each with the settings in `payload`, and return what the first of all returns.

    Args:
        folder: Where rank 0 writes.
        threads: CPU threads of a rank; None: an even share of the cores.
        require: Told how many ranks there will be on all machines, before any starts; raises if they cannot run.

    Raises:
        ConfigError: the settings, the launcher and the devices do not go together.
        RankError: a rank has died or hung.
    """
    topology = choose_topology(distributed, gpus=torch.cuda.device_count(), job=Path(folder).name)
    require(topology.ranks)
    told = f"starting {topology.nproc} ranks ({distributed.name})"
    if topology.nnodes > 1:
        told += f" on this machine, one of {topology.nnodes}; they meet at {topology.endpoint}"
    progress.console().print(told, highlight=False)
    try:
        return start_ranks(entry, payload, topology, distributed, folder=Path(folder), threads=threads)
    except (RankError, StopSignal) as error:
        if topology.node <= 0:
            _note_end(RunFolder(Path(folder)), error)
        raise


@contextmanager
def rank_of(distributed: DistributedConfig, folder: str) -> Iterator[World]:
    """Join the other ranks for the body, wherever they were started from; `folder` is where rank 0 will write.

    Raises:
        ConfigError: the ranks were given different folders.
    """
    world = join_world("cuda" if torch.cuda.device_count() else "cpu", distributed.timeout + 60)
    try:
        folders = sorted(set(world.gather(folder)))
        if len(folders) > 1:
            raise ConfigError(
                f"run_dir: the machines have different ones ({', '.join(folders)}); give run_dir=... "
                "alike on each, on a disk that all of them see"
            )
        world.heartbeat("starting")
        yield world
    finally:
        leave_world()


def threads_of_rank() -> int:
    """Return the CPU threads of this rank: what its launcher gave it, else an even share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _note_end(run: RunFolder, error: RankError | StopSignal) -> None:
    """Say in the run's status how it ended, where the rank that writes it could not."""
    if not run.status_file.is_file() or read_json(run.status_file).get("state") != "running":
        return
    with RunFolder.create(run.path) as own:
        progress.set_up_logging(own.log_file)
        state: RunState = "stopped" if isinstance(error, StopSignal) else "failed"
        own.update_status(state, error=f"{type(error).__name__}: {error}")
        log.error("%s", error)
