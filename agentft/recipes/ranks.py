"""A training on several ranks: the settings are checked, the ranks are started, and each runs the recipe with its part."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft import progress
from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.distributed.engines import loads_on_cpu
from agentft.distributed.launch import Entry, start_ranks
from agentft.distributed.topology import Places, choose_places, require_engine
from agentft.errors import ConfigError, RankError
from agentft.model.config import Dtype, LoraConfig, LoraStart, QloraConfig, trains_weights
from agentft.recipes.config import EvaluateConfig, TrainConfig
from agentft.recipes.saved import config_from_yaml, config_to_yaml, settings_to_yaml
from agentft.runs import RunFolder, read_json
from agentft.runtime import available_cores
from agentft.signals import StopSignal
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
    return _start(entry, config_to_yaml(config), places, config.distributed, Path(config.run_dir), config.threads)


def evaluate_on_ranks(entry: Entry, config: EvaluateConfig) -> Any:
    """Start the ranks of an evaluation and return what its first rank returns.

    Raises:
        ConfigError: the ranks cannot run as asked; nothing has been loaded then.
        RankError: a rank has died or hung.
    """
    distributed, folder = config.distributed, Path(config.output or config.run)
    places = choose_places(distributed, gpus=_visible_gpus(), job=folder.name)
    if distributed.engine is not EngineKind.ddp:
        progress.console().print(
            f"distributed={distributed.name}: answers need no gradients, so each rank holds the model whole, as with ddp",
            highlight=False,
        )
    return _start(entry, settings_to_yaml(config), places, distributed, folder, config.threads)


def _start(
    entry: Entry, payload: str, places: Places, distributed: DistributedConfig, folder: Path, threads: int | None
) -> Any:
    progress.console().print(
        f"starting {places.nproc} ranks ({distributed.name})"
        + (f" on this machine, one of {places.nnodes}; they meet at {places.endpoint}" if places.nnodes > 1 else ""),
        highlight=False,
    )
    try:
        return start_ranks(entry, payload, places, distributed, folder=folder, threads=threads)
    except (RankError, StopSignal) as error:
        if places.node <= 0:
            _note_end(folder, error)
        raise


def require_ranks(config: TrainConfig, ranks: int) -> None:
    """Refuse what cannot run on so many ranks.

    Raises:
        ConfigError: says what is missing, or which numbers do not go together.
    """
    fp16_weights = config.model.dtype is Dtype.fp16 and trains_weights(config.sft_type)
    require_engine(config.distributed, gpus=_visible_gpus(), fp16_weights=fp16_weights)
    if isinstance(config.sft_type, QloraConfig) and loads_on_cpu(config.distributed):
        raise ConfigError(
            f"distributed={config.distributed.name} with sft_type={config.sft_type.name}: quantised weights cannot be cut "
            "into shards; choose distributed=ddp or deepspeed_zero2"
        )
    if config.training.gradient_accumulation_steps % ranks:
        raise ConfigError(
            f"training.gradient_accumulation_steps={config.training.gradient_accumulation_steps}: the "
            f"forward passes of a step cannot be shared evenly by {ranks} ranks; "
            f"choose a multiple of {ranks} (a step stays the same whatever the number of ranks)"
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
        world.mark("starting")
        yield world
    finally:
        leave_world()


def loads_mapped(config: TrainConfig) -> bool:
    """Whether weights are loaded in the files' number format, as the mapped files, for the engine to cast its part of them.

    Not where an adapter is computed from them: it would not be that of a job on one device.
    """
    sft = config.sft_type
    if isinstance(sft, LoraConfig):
        computed = sft.dora or sft.start is LoraStart.pissa or isinstance(sft, QloraConfig)
        return loads_on_cpu(config.distributed) and not computed
    # DeepSpeed takes fp32 masters from the weights that it computes with, whatever the stage.
    return loads_on_cpu(config.distributed) or config.distributed.engine is EngineKind.deepspeed


def resolved(payload: str) -> TrainConfig:
    """Return the settings that the agent sent."""
    return config_from_yaml(payload, TrainConfig)


def is_spread(config: TrainConfig | EvaluateConfig) -> bool:
    """Whether a job runs on ranks that must be started."""
    return config.distributed.engine is not EngineKind.single


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
