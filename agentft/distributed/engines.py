"""The engines by name. Each is imported when it is chosen: DeepSpeed alone takes seconds."""

from __future__ import annotations

import torch

from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.model.labelled_loss import LabelledLoss
from agentft.training.config import TrainingConfig
from agentft.training.engine import Engine, SingleEngine
from agentft.world import World


def loads_on_cpu(config: DistributedConfig) -> bool:
    """Whether weights go to the device in shards, so that the device never has to hold them whole."""
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
    """Hand the model and its loss to the engine that the settings name.

    Args:
        config: Which engine, and its settings.
        objective: The model as loaded, the same on every rank, and its loss. Its `autocast` says what a full fine-tuning
            computes in; engines with shards cast the weights themselves then and clear it.
        training: The optimiser's settings.
        world: The ranks.
        fp16: Scale the loss, for fp16.
        frozen: What frozen weights are kept in, where the engine cuts them into shards; None: as they were loaded.
    """
    match config.engine:
        case EngineKind.single:
            return SingleEngine(objective, training, fp16=fp16, world=world)
        case EngineKind.ddp:
            from agentft.distributed.ddp import DdpEngine

            return DdpEngine(objective, training, fp16=fp16, world=world)
        case EngineKind.fsdp:
            from agentft.distributed.fsdp import FsdpEngine

            return FsdpEngine(objective, training, world=world, fp16=fp16, frozen=frozen)
        case EngineKind.deepspeed:
            from agentft.distributed.deepspeed import DeepSpeedEngine

            settings = config.deepspeed
            return DeepSpeedEngine(objective, training, world=world, settings=settings, fp16=fp16, frozen=frozen)
