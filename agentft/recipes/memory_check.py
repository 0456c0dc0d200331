"""Whether a training fits into the device: estimated from config.json, before weights are downloaded or loaded."""

from __future__ import annotations

import logging

from agentft import runtime
from agentft.errors import ModelError
from agentft.model.config import Attention
from agentft.model.device_memory import device_memory
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
    fit, line = judge(estimate, device_memory(device), device.name)
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
    return estimate_memory(
        settings,
        config.sft_type,
        lora_targets=config.model.lora_targets,
        dtype=resolve_dtype(config.model.dtype, device),
        max_length=config.dataset.max_length,
        micro_batch=config.training.micro_batch,
        checkpointing=device.is_cuda if checkpointing is None else checkpointing,
        eager=config.model.attention is Attention.eager,
    )
