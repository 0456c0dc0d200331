"""Whether a training fits into the device: estimated from config.json, before weights are downloaded or loaded."""

from __future__ import annotations

import dataclasses
import logging
import os

from agentft import runtime
from agentft.errors import ModelError
from agentft.model.config import Attention
from agentft.model.device_memory import DeviceMemory, device_memory
from agentft.model.load import model_settings, resolve_dtype
from agentft.model.memory import Fit, MemoryEstimate, estimate_memory, judge
from agentft.recipes.config import TrainConfig
from agentft.training.config import MemoryCheck

log = logging.getLogger(__name__)


def check_memory(config: TrainConfig) -> MemoryEstimate | None:
    """Say what the training needs at its peak; None where there is no estimate.

    Raises:
        ModelError: it cannot fit by far, and `training.memory_check` is `refuse`; or the model has no config.json.
    """
    if config.training.memory_check is MemoryCheck.off:
        return None
    device = runtime.set_up(config.threads)
    settings = model_settings(config.model)
    try:
        estimate = estimate_training(settings, config, device)
    except ModelError as error:
        log.info("%s", error)
        return None
    memory = device_memory(device)
    if memory is not None and not device.is_cuda:  # the ranks of a machine share its memory
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        memory = DeviceMemory(memory.free // here, memory.total // here)
    fit, line = judge(estimate, memory, device.name)
    if fit is Fit.impossible and config.training.memory_check is MemoryCheck.refuse:
        raise ModelError(
            f"{line}. The estimate is for batches of full length; training.memory_check=warn goes on anyway"
        )
    log.log(logging.INFO if fit is Fit.fits else logging.WARNING, "%s", line)
    return estimate


def estimate_training(settings: dict[str, object], config: TrainConfig, device: runtime.Device) -> MemoryEstimate:
    """Estimate the memory of one device for a composed training.

    Raises:
        ModelError: the architecture or the method is not one of those that are counted.
    """
    checkpointing = config.training.gradient_checkpointing
    shards = sharding(config.distributed)
    estimate = estimate_memory(
        settings,
        config.sft_type,
        lora_targets=config.model.lora_targets,
        dtype=resolve_dtype(config.model.dtype, device),
        max_length=config.dataset.max_length,
        micro_batch=config.training.micro_batch,
        checkpointing=device.is_cuda if checkpointing is None else checkpointing,
        eager=config.model.attention is Attention.eager,
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
        zero_stage=shards.stage,
    )
    if shards.offloads_optimizer:  # to the machine's memory: its state, what it updates, and the gradients for it
        estimate = dataclasses.replace(estimate, optimizer=0, trained=0, gradients=0)
    return dataclasses.replace(estimate, weights=0) if shards.offloads_weights else estimate


@dataclasses.dataclass(frozen=True, slots=True)
class Sharding:
    """What of a training is divided among the ranks, and what of it leaves the device."""

    stage: int = 0
    """As ZeRO counts: 1 the optimiser, 2 gradients too, 3 weights too."""
    offloads_optimizer: bool = False
    offloads_weights: bool = False


def sharding(distributed: object) -> Sharding:
    """Read from the settings of the engine how it divides a training."""
    engine = str(getattr(distributed, "engine", "single"))
    if engine == "fsdp":
        return Sharding(stage=3)
    zero = getattr(distributed, "deepspeed", {}).get("zero_optimization") or {}
    if engine != "deepspeed" or not isinstance(zero, dict):
        return Sharding()
    return Sharding(
        stage=int(zero.get("stage", 0)),
        offloads_optimizer=_leaves(zero.get("offload_optimizer")),
        offloads_weights=_leaves(zero.get("offload_param")),
    )


def _leaves(offload: object) -> bool:
    return isinstance(offload, dict) and offload.get("device", "none") != "none"
