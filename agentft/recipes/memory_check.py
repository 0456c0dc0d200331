"""Check whether a training fits into the device: estimated from config.json, before weights are downloaded or loaded."""

from __future__ import annotations

import dataclasses
import logging
import os

from agentft import runtime
from agentft.errors import ModelError
from agentft.model.config import Attention, Dtype, KernelChoice, ModelConfig, SftConfig
from agentft.model.load import resolve_dtype
from agentft.model.memory import DeviceMemory, Fit, Layers, MemoryEstimate, device_memory, estimate_memory, judge
from agentft.model.sources import model_settings
from agentft.training.config import MemoryCheck

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a training is expected to need, and whether it therefore computes activations twice."""

    estimate: MemoryEstimate | None
    """None where there is none."""
    checkpointing: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What decides the memory of a training besides the model and the method."""

    max_length: int
    per_device_batch_size: int = 1
    sharding: Sharding = dataclasses.field(default_factory=lambda: Sharding())
    compiles: bool = False
    """torch's compiler runs over each block."""


def plan_memory(
    config: ModelConfig,
    sft: SftConfig,
    load: Load,
    device: runtime.Device,
    *,
    check: MemoryCheck,
    checkpointing: bool | None,
) -> MemoryPlan:
    """Say what the training needs at its peak, and choose gradient checkpointing where that is left open.

    It is then used on CUDA alone: where the estimate does not fit without it, or there is no estimate.

    Raises:
        ModelError: it cannot fit by far, and `check` is `refuse`; or the model has no config.json.
    """
    without_estimate = MemoryPlan(None, device.is_cuda if checkpointing is None else checkpointing)
    if check is MemoryCheck.off:
        return without_estimate
    settings = model_settings(config)
    memory = _memory_of_this_rank(device)
    try:
        estimates = {
            twice: estimate_training(settings, config, sft, load, device, checkpointing=twice)
            for twice in (False, True)
        }
    except ModelError as error:
        log.info("%s", error)
        return without_estimate
    if checkpointing is None:
        checkpointing = False  # on a CPU time is what lacks
        if device.is_cuda:
            fit, line = judge(estimates[False], memory, device.name)
            checkpointing = fit is not Fit.fits
            log.info("training.gradient_checkpointing=null: %s", f"on; without it {line}" if checkpointing else "off")
    fit, line = judge(estimates[checkpointing], memory, device.name)
    if fit is Fit.impossible and check is MemoryCheck.refuse:
        raise ModelError(
            f"{line}. The estimate is for batches of full length; training.memory_check=warn goes on anyway"
        )
    log.log(logging.INFO if fit is Fit.fits else logging.WARNING, "%s", line)
    return MemoryPlan(estimates[checkpointing], checkpointing)


def _memory_of_this_rank(device: runtime.Device) -> DeviceMemory | None:
    memory = device_memory(device)
    if memory is None or device.is_cuda:
        return memory
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the ranks of a machine share its memory
    return DeviceMemory(memory.free // here, memory.total // here)


def estimate_training(
    settings: dict[str, object],
    config: ModelConfig,
    sft: SftConfig,
    load: Load,
    device: runtime.Device,
    *,
    checkpointing: bool,
) -> MemoryEstimate:
    """Estimate the memory of one device for a training of the model with these contents of config.json.

    Raises:
        ModelError: the architecture or the method is not one of those that are counted.
    """
    shards = load.sharding
    dtype = resolve_dtype(config.dtype, device)
    lean = device.kind == "cpu" and dtype is Dtype.bf16
    layers = Layers(
        compiled=lean and config.kernels is not KernelChoice.torch and shards.stage < 3,
        tiled=lean and config.attention in (Attention.auto, Attention.tiled),
    )
    estimate = estimate_memory(
        settings,
        sft,
        lora_targets=config.lora_targets,
        dtype=dtype,
        max_length=load.max_length,
        per_device_batch_size=load.per_device_batch_size,
        checkpointing=checkpointing,
        fused=None if load.compiles else layers,
        eager=config.attention is Attention.eager,
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
