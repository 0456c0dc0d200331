"""Check whether a training fits into the device: estimated from config.json, before weights are downloaded or loaded."""

from __future__ import annotations

import dataclasses
import logging
import os

from agentft import runtime
from agentft.errors import ModelError
from agentft.model.config import Attention, Dtype, KernelChoice
from agentft.model.load import model_settings, resolve_dtype
from agentft.model.memory import DeviceMemory, Fit, Layers, MemoryEstimate, device_memory, estimate_memory, judge
from agentft.recipes.config import TrainConfig
from agentft.training.config import MemoryCheck

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a training is expected to need, and whether it therefore computes activations twice."""

    estimate: MemoryEstimate | None
    """None where there is none."""
    checkpointing: bool


def check_memory(config: TrainConfig) -> MemoryPlan:
    """Say what the training needs at its peak, and choose gradient checkpointing where that is left open.

    It is then used on CUDA alone: where the estimate does not fit without it, or there is no estimate.

    Raises:
        ModelError: it cannot fit by far, and `training.memory_check` is `refuse`; or the model has no config.json.
    """
    device = runtime.set_up(config.threads)
    wanted = config.training.gradient_checkpointing
    without_estimate = MemoryPlan(None, device.is_cuda if wanted is None else wanted)
    if config.training.memory_check is MemoryCheck.off:
        return without_estimate
    settings = model_settings(config.model)
    memory = _memory_of_this_rank(device)
    try:
        checkpointing = _checkpointing(settings, config, device, memory) if wanted is None else wanted
        estimate = estimate_training(settings, config, device, checkpointing=checkpointing)
    except ModelError as error:
        log.info("%s", error)
        return without_estimate
    fit, line = judge(estimate, memory, device.name)
    if fit is Fit.impossible and config.training.memory_check is MemoryCheck.refuse:
        raise ModelError(
            f"{line}. The estimate is for batches of full length; training.memory_check=warn goes on anyway"
        )
    log.log(logging.INFO if fit is Fit.fits else logging.WARNING, "%s", line)
    return MemoryPlan(estimate, checkpointing)


def _checkpointing(
    settings: dict[str, object], config: TrainConfig, device: runtime.Device, memory: DeviceMemory | None
) -> bool:
    """Whether memory asks for gradient checkpointing; it is never used on a CPU unasked, where time is what lacks."""
    if not device.is_cuda:
        return False
    fit, line = judge(estimate_training(settings, config, device, checkpointing=False), memory, device.name)
    log.info("training.gradient_checkpointing=null: %s", "off" if fit is Fit.fits else f"on; without it {line}")
    return fit is not Fit.fits


def _memory_of_this_rank(device: runtime.Device) -> DeviceMemory | None:
    memory = device_memory(device)
    if memory is None or device.is_cuda:
        return memory
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the ranks of a machine share its memory
    return DeviceMemory(memory.free // here, memory.total // here)


def estimate_training(
    settings: dict[str, object], config: TrainConfig, device: runtime.Device, *, checkpointing: bool
) -> MemoryEstimate:
    """Estimate the memory of one device for a composed training.

    Raises:
        ModelError: the architecture or the method is not one of those that are counted.
    """
    shards = sharding(config.distributed)
    dtype = resolve_dtype(config.model.dtype, device)
    estimate = estimate_memory(
        settings,
        config.sft_type,
        lora_targets=config.model.lora_targets,
        dtype=dtype,
        max_length=config.dataset.max_length,
        per_device_batch_size=config.training.per_device_batch_size,
        checkpointing=checkpointing,
        fused=_layers(config, device, dtype),
        eager=config.model.attention is Attention.eager,
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
        zero_stage=shards.stage,
    )
    if shards.offloads_optimizer:  # to the machine's memory: its state, what it updates, and the gradients for it
        estimate = dataclasses.replace(estimate, optimizer=0, trained=0, gradients=0)
    return dataclasses.replace(estimate, weights=0) if shards.offloads_weights else estimate


def _layers(config: TrainConfig, device: runtime.Device, dtype: Dtype) -> Layers | None:
    """Which layers will compute, as far as that is known before anything is loaded."""
    if config.training.compile:
        return None
    lean = device.kind == "cpu" and dtype is Dtype.bf16
    return Layers(
        compiled=lean and config.model.kernels is not KernelChoice.torch and sharding(config.distributed).stage < 3,
        tiled=lean and config.model.attention in (Attention.auto, Attention.tiled),
    )


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
