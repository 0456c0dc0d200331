"""Choose the engine by name: one process, `ddp`, or one with shards, of which this file has what they share.

FSDP and DeepSpeed are imported when they are chosen: DeepSpeed alone takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.errors import ConfigError
from agentft.model.adapters import kept_parameters, require_same_parameters
from agentft.model.labelled_loss import LabelledLoss, causal_model
from agentft.runtime import World
from agentft.training.config import TrainingConfig
from agentft.training.engine import Engine, SingleEngine, restore_groups, slots_by_parameter


def loads_on_cpu(config: DistributedConfig) -> bool:
    """Return whether weights go to the device in shards, so that the device never has to hold all of them."""
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    return config.engine is EngineKind.fsdp or (config.engine is EngineKind.deepspeed and int(stage) == 3)


def make_engine(
    config: DistributedConfig,
    objective: LabelledLoss,
    training: TrainingConfig,
    world: World,
    *,
    fp16: bool,
    frozen: torch.dtype | None = None,
) -> Engine:
    """Hand the model, as loaded and the same on every rank, and its loss to the engine that the settings name.

    Engines with shards keep frozen weights in `frozen`; None: as they were loaded. `fp16` scales the loss.
    """
    match config.engine:
        case EngineKind.single:
            return SingleEngine(objective, training, fp16=fp16, world=world)
        case EngineKind.ddp:
            return DdpEngine(objective, training, fp16=fp16, world=world)
        case EngineKind.fsdp:
            from agentft.distributed.fsdp import FsdpEngine

            return FsdpEngine(objective, training, world=world, fp16=fp16, frozen=frozen)
        case EngineKind.deepspeed:
            from agentft.distributed.deepspeed import DeepSpeedEngine

            settings = config.deepspeed
            return DeepSpeedEngine(objective, training, world=world, settings=settings, fp16=fp16, frozen=frozen)


class DdpEngine(SingleEngine):
    """Every rank holds the whole model; gradients are summed over ranks while the backward pass still runs.

    Li et al., 2020, PyTorch Distributed (arXiv 2006.15704).
    """

    name = "ddp"

    def __init__(self, objective: LabelledLoss, config: TrainingConfig, *, world: World, fp16: bool = False) -> None:
        super().__init__(objective, config, fp16=fp16, world=world)
        device = next(objective.parameters()).device
        # Every rank has read the same files, so only what is computed or drawn is sent: writing rank 0's frozen weights over
        # those of a mapped file would copy it.
        for parameter in kept_parameters(self.model).values():
            dist.broadcast(parameter.data, src=0)
        self.objective = DistributedDataParallel(
            objective,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            init_sync=False,
        )

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.objective.no_sync()


class ShardedEngine(SingleEngine):
    """The part of an engine with shards that does not ask who cuts the parameters.

    Weights are loaded as the mapped files themselves, and cast once they are cut (FSDP2) or a block at a time before that
    (ZeRO), so a rank never holds more than its shard and the block in work.
    """

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _take_up(
        self, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
    ) -> tuple[dict[str, nn.Parameter], dict[str, dict[str, torch.Tensor]]]:
        """Check what was saved and take up the settings: (kept parameters, the optimiser's slots), both by name."""
        kept = kept_parameters(self.model)
        require_same_parameters({name: whole_shape(p) for name, p in kept.items()}, weights)
        states = slots_by_parameter(optimizer, set(self._trained()))
        restore_groups(self.optimizer, settings["groups"])
        self._scale.load(settings.get("scaler", {}))
        return kept, states


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter before it was cut."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def blocks_of(model: nn.Module, option: str) -> list[nn.Module]:
    """Return the decoder's blocks, in order.

    Raises:
        ConfigError: the model has no list of them; `option` is who asks.
    """
    layers = getattr(causal_model(model).get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"distributed={option}: {type(model).__name__} has no list of blocks to shard; choose ddp")
    return list(layers)


def wanted_dtype(parameter: nn.Parameter, trained: torch.dtype, frozen: torch.dtype | None) -> torch.dtype:
    """Return what a parameter is to be kept in; `frozen` None leaves a frozen one as it was loaded."""
    if not parameter.is_floating_point():
        return parameter.dtype
    return trained if parameter.requires_grad else (frozen or parameter.dtype)


def sharded_dtype(objective: LabelledLoss) -> torch.dtype | None:
    """Return the dtype that trained weights are cast to in shards, before they are gathered, and end the autocast.

    Autocast would keep the cast copy of every gathered weight until the end of the pass, which is the whole model.
    """
    dtype, objective.autocast = objective.autocast, None
    return dtype
