"""A training on several ranks: the settings are checked, the ranks are started, and each runs the recipe with its part."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft import progress
from agentft.distributed.config import DistributedConfig, EngineKind, LaunchTopology, choose_topology, require_engine
from agentft.distributed.engines import loads_on_cpu
from agentft.distributed.launch import Entry, start_ranks
from agentft.errors import ConfigError, RankError
from agentft.model.config import Dtype, QloraConfig, SftConfig, trains_weights
from agentft.runs import RunFolder, read_json
from agentft.runtime import World, available_cores, join_world, leave_world
from agentft.signals import StopSignal

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


def find_places(distributed: DistributedConfig, folder: str) -> LaunchTopology:
    """Return how many ranks there will be, and where they are.

    Raises:
        ConfigError: the settings, the launcher and the devices do not go together.
    """
    return choose_topology(distributed, gpus=_visible_gpus(), job=Path(folder).name)


def run_on_ranks(
    entry: Entry,
    payload: str,
    topology: LaunchTopology,
    distributed: DistributedConfig,
    *,
    folder: str,
    threads: int | None,
) -> Any:
    """Start the ranks of this machine, each with the settings in `payload`, and return what the first of all returns.

    Raises:
        RankError: a rank has died or hung.
    """
    progress.console().print(
        f"starting {topology.nproc} ranks ({distributed.name})"
        + (
            f" on this machine, one of {topology.nnodes}; they meet at {topology.endpoint}"
            if topology.nnodes > 1
            else ""
        ),
        highlight=False,
    )
    try:
        return start_ranks(entry, payload, topology, distributed, folder=Path(folder), threads=threads)
    except (RankError, StopSignal) as error:
        if topology.node <= 0:
            _note_end(Path(folder), error)
        raise


def require_ranks(
    ranks: int, distributed: DistributedConfig, sft: SftConfig, *, dtype: Dtype, gradient_accumulation_steps: int
) -> None:
    """Refuse a training that cannot run on so many ranks.

    Raises:
        ConfigError: says what is missing, or which numbers do not go together.
    """
    fp16_weights = dtype is Dtype.fp16 and trains_weights(sft)
    require_engine(distributed, gpus=_visible_gpus(), fp16_weights=fp16_weights)
    if isinstance(sft, QloraConfig) and loads_on_cpu(distributed):
        raise ConfigError(
            f"distributed={distributed.name} with sft_type={sft.name}: quantised weights cannot be cut into shards; "
            "choose distributed=ddp or deepspeed_zero2"
        )
    if gradient_accumulation_steps % ranks:
        raise ConfigError(
            f"training.gradient_accumulation_steps={gradient_accumulation_steps}: the forward passes of a step cannot be "
            f"shared evenly by {ranks} ranks; choose a multiple of {ranks} (a step stays the same whatever the number of "
            "ranks)"
        )


@contextmanager
def rank_of(distributed: DistributedConfig, folder: str) -> Iterator[World]:
    """Join the other ranks for the body, wherever they were started from; `folder` is where rank 0 will write.

    Raises:
        ConfigError: the ranks were given different folders.
    """
    world = join_world("cuda" if _visible_gpus() else "cpu", distributed.timeout + 60)
    try:
        folders = world.gather(folder)
        if len(set(folders)) > 1:
            raise ConfigError(
                f"run_dir: the machines have different ones ({', '.join(sorted(set(folders)))}); give run_dir=... "
                "alike on each, on a disk that all of them see"
            )
        world.heartbeat("starting")
        yield world
    finally:
        leave_world()


def is_spread(distributed: DistributedConfig) -> bool:
    """Return whether a job runs on ranks that must be started."""
    return distributed.engine is not EngineKind.single


def threads_of_rank() -> int:
    """Return the CPU threads of this rank: what its launcher gave it, else an even share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _note_end(folder: Path, error: RankError | StopSignal) -> None:
    """Say in the run's status how it ended, where the rank that writes it could not."""
    path = RunFolder(folder).status_file
    if not path.is_file() or read_json(path).get("state") != "running":
        return
    with RunFolder.create(folder) as run:
        progress.set_up_logging(run.log_file)
        run.update_status(
            "stopped" if isinstance(error, StopSignal) else "failed", error=f"{type(error).__name__}: {error}"
        )
        log.error("%s", error)
