"""A training on several ranks: the settings are checked, the ranks are started, and each runs the recipe with its part."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft import progress
from agentft.distributed.config import EngineKind
from agentft.distributed.engines import loads_on_cpu
from agentft.distributed.launch import Entry, start_ranks
from agentft.distributed.places import choose_places, require_engine
from agentft.errors import ConfigError, RankError
from agentft.model.config import Dtype, QloraConfig
from agentft.recipes.config import TrainConfig
from agentft.recipes.saved import config_from_yaml, config_to_yaml
from agentft.runs import RunFolder, read_json
from agentft.runtime import available_cores
from agentft.world import World, join_world, leave_world

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


def on_ranks(entry: Entry, config: TrainConfig) -> Any:
    """Start the ranks of a training and return what its first rank returns.

    Raises:
        ConfigError: the ranks cannot run as asked; nothing has been loaded then.
        RankError: a rank has died or hung.
    """
    places = choose_places(config.distributed, gpus=_visible_gpus(), job=Path(config.run_dir).name)
    require_ranks(config, places.ranks)
    folder = Path(config.run_dir)
    progress.console().print(
        f"starting {places.nproc} ranks ({config.distributed.name})"
        + (f" on this machine, one of {places.nnodes}; they meet at {places.endpoint}" if places.nnodes > 1 else ""),
        highlight=False,
    )
    try:
        return start_ranks(
            entry, config_to_yaml(config), places, config.distributed, folder=folder, threads=config.threads
        )
    except RankError as error:
        if places.node <= 0:
            _note_end(folder, error)
        raise


def require_ranks(config: TrainConfig, ranks: int) -> None:
    """Refuse what cannot run on so many ranks.

    Raises:
        ConfigError: says what is missing, or which numbers do not go together.
    """
    require_engine(config.distributed, gpus=_visible_gpus(), fp16=config.model.dtype is Dtype.fp16)
    if isinstance(config.sft_type, QloraConfig) and loads_on_cpu(config.distributed):
        raise ConfigError(
            f"distributed={config.distributed.name} with sft_type={config.sft_type.name}: quantised weights cannot be cut "
            "into shards; choose distributed=ddp or deepspeed_zero2"
        )
    if config.training.accumulation % ranks:
        raise ConfigError(
            f"training.accumulation={config.training.accumulation}: the forward passes of a step cannot be shared evenly "
            f"by {ranks} ranks; choose a multiple of {ranks} (a step stays the same whatever the number of ranks)"
        )


@contextmanager
def rank_of(config: TrainConfig) -> Iterator[World]:
    """Join the other ranks for the body, wherever they were started from.

    Raises:
        ConfigError: the ranks cannot run as asked, or were given different run folders.
    """
    world = join_world("cuda" if _visible_gpus() else "cpu", config.distributed.timeout + 60)
    try:
        require_ranks(config, world.size)
        folders = world.gather(config.run_dir)
        if len(set(folders)) > 1:
            raise ConfigError(
                f"run_dir: the machines have different ones ({', '.join(sorted(set(folders)))}); give run_dir=... "
                "alike on each, on a disk that all of them see"
            )
        world.mark("starting")
        yield world
    finally:
        leave_world()


def resolved(payload: str) -> TrainConfig:
    """Return the settings that the agent sent."""
    return config_from_yaml(payload, TrainConfig)


def is_spread(config: TrainConfig) -> bool:
    """Whether a training runs on ranks that must be started."""
    return config.distributed.engine is not EngineKind.single


def threads_of_rank() -> int:
    """Return the CPU threads of this rank: what its launcher gave it, else an even share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _note_end(folder: Path, error: RankError) -> None:
    """Say in the run's status how it ended, where the rank that writes it could not."""
    path = RunFolder(folder).status_file
    if not path.is_file() or read_json(path).get("state") != "running":
        return
    with RunFolder.create(folder) as run:
        progress.set_up_logging(run.log_file)
        run.update_status("failed", error=f"{type(error).__name__}: {error}")
        log.error("%s", error)
