"""Load what a run needs, and the engine that computes with it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from agentft import runtime
from agentft.data.prepared import PreparedData
from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.distributed.engines import loads_on_cpu, make_engine
from agentft.errors import ModelError
from agentft.model.adapters import prepare_for_training, rate_factors
from agentft.model.attention import attention_of, take_attention
from agentft.model.config import (
    Attention,
    FullConfig,
    KernelChoice,
    LoraConfig,
    LoraStart,
    ModelConfig,
    QloraConfig,
    SftConfig,
    trains_weights,
)
from agentft.model.labelled_loss import LabelledLoss, causal_model
from agentft.model.load import ChatTokenizer, Compute, load_model, resolve_dtype
from agentft.model.memory import (
    DeviceMemory,
    Fit,
    MemoryEstimate,
    Workload,
    device_memory,
    estimate_memory,
    judge,
    planned_model,
)
from agentft.model.sources import model_settings
from agentft.recipes.config import deciding
from agentft.recipes.probe import Probe, ProbeResult, ask_stock
from agentft.runtime import ALONE, World
from agentft.training.config import MemoryCheck, TrainingConfig
from agentft.training.engine import Engine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a training is expected to need, and whether it therefore computes activations twice."""

    estimate: MemoryEstimate | None
    """None where there is none."""
    checkpointing: bool
    free: int = 0
    """Bytes free on the device."""

    def words(self, device_name: str) -> str:
        """Return the estimate against what the device has."""
        if self.estimate is None:
            return "peak memory not estimated"
        return f"peak memory about {self.estimate.total / 1e9:.2f} of {self.free / 1e9:.2f} GB free on {device_name}"


def plan_memory(
    config: ModelConfig,
    sft: SftConfig,
    work: Workload,
    device: runtime.Device,
    *,
    check: MemoryCheck,
    checkpointing: bool | None,
) -> MemoryPlan:
    """Say what the training needs at its peak, and choose gradient checkpointing where that is left open.

    It is then used on CUDA alone, where the estimate does not fit without it or there is none.

    Raises:
        ModelError: it cannot fit by far, and `check` is `refuse`; or the model has no config.json.
    """
    without_estimate = MemoryPlan(None, device.is_cuda if checkpointing is None else checkpointing)
    if check is MemoryCheck.off:
        return without_estimate
    settings, dtype, memory = model_settings(config), resolve_dtype(config.dtype, device), device_memory(device)
    if not device.is_cuda:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the ranks of a machine share its memory
        memory = DeviceMemory(memory.free // here, memory.total // here)
    try:
        model = planned_model(settings)
        plain, twice = (
            estimate_memory(model, config, sft, work, dtype=dtype, checkpointing=again) for again in (False, True)
        )
    except ModelError as error:
        log.info("%s", error)
        return without_estimate
    if checkpointing is None and device.is_cuda:
        fit, line = judge(plain, memory, device.name)
        checkpointing = fit is not Fit.fits
        log.info("training.gradient_checkpointing=null: %s", f"on; without it {line}" if checkpointing else "off")
    estimate = twice if checkpointing else plain  # left open on a CPU it is off, where time is what lacks
    fit, line = judge(estimate, memory, device.name)
    if fit is Fit.impossible and check is MemoryCheck.refuse:
        raise ModelError(
            f"{line}. The estimate is for batches of full length; training.memory_check=warn trains anyway"
        )
    log.log(logging.DEBUG if fit is Fit.fits else logging.WARNING, "%s", line)
    return MemoryPlan(estimate, bool(checkpointing), memory.free)


def workload(
    distributed: DistributedConfig, training: TrainingConfig, *, max_length: int, device: runtime.Device
) -> Workload:
    """Return what one device of a training has to hold, by the engine and the batch."""
    zero = distributed.deepspeed.get("zero_optimization") or {}

    def leaves(offload: object) -> bool:
        return isinstance(offload, dict) and offload.get("device", "none") != "none"

    return Workload(
        max_length=max_length,
        per_device_batch_size=training.per_device_batch_size,
        compiles=training.compile,
        on_cpu=not device.is_cuda,
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
        zero_stage=3 if distributed.engine is EngineKind.fsdp else int(zero.get("stage", 0)),
        offloads_optimizer=leaves(zero.get("offload_optimizer")),
        offloads_weights=leaves(zero.get("offload_param")),
    )


@dataclass(frozen=True, slots=True)
class TrainingComponents:
    """Everything that is loaded for a run: where it computes, what it talks with, what it learns from."""

    compute: Compute
    chat: ChatTokenizer
    data: PreparedData
    objective: LabelledLoss
    """The model as it is trained, and its loss."""
    probed: ProbeResult
    """What of it is computed in ways of our own, and what as transformers does."""
    mapped: bool = False
    """Weights are in the number format of their files, for the engine to cast."""

    @property
    def device(self) -> runtime.Device:
        return self.compute.device

    @property
    def dtype(self) -> torch.dtype:
        return self.compute.dtype

    @property
    def model(self) -> torch.nn.Module:
        return self.objective.model


def load_components(
    config: ModelConfig,
    sft: SftConfig,
    compute: Compute,
    chat: ChatTokenizer,
    data: PreparedData,
    world: World = ALONE,
    *,
    seed: int,
    sharded: bool = False,
    mapped: bool = False,
) -> TrainingComponents:
    """Load the weights, make them trainable as `sft` says, and try agentft's ways of computing on them.

    Args:
        seed: Of the adapters' first weights.
        sharded: An engine cuts the weights into shards, so that they wait for it on the CPU.
        mapped: Weights keep the number format of their files; see `loads_mapped`.

    Raises:
        ModelError: the weights cannot be loaded, or the model does not say here what it says in transformers.
    """
    runtime.seed_everything(seed)
    device, dtype = compute.device, compute.dtype
    # Weights that are trained stay in fp32, so a full fine-tuning loads them so; adapters are fp32 on a frozen base.
    weights_dtype = torch.float32 if isinstance(sft, FullConfig) else dtype
    place = dataclasses.replace(device, kind="cpu") if sharded and world.size > 1 else device
    model = load_model(
        chat.files,
        config,
        device=place,
        dtype=None if mapped else weights_dtype,
        attention=compute.attention,
        quantization=compute.quantization,
    )
    autocast = dtype if trains_weights(sft) and dtype != torch.float32 else None
    stock = ask_stock(model, pad_id=chat.pad_id, autocast=autocast) if world.is_main else None
    runtime.seed_everything(seed)
    objective = LabelledLoss(
        prepare_for_training(model, sft, config, compute.liger, cast=not mapped),
        autocast=autocast,
        rate_factors=rate_factors(sft),
        reads_head=not sharded,  # engines that shard gather the head's weight only around a call of the head
    )
    log.info("model: %s on %s, %s", config.name, device.name, dtype)
    probed = None
    if stock is not None:
        # Weights that wait on the CPU for their shards cannot try what runs on a GPU alone.
        tried, asked = (compute.attention, config.attention) if place == device else ("sdpa", Attention.auto)
        probed = Probe(stock, objective, chat.pad_id).run(tried, asked=asked is not Attention.auto)
        probed = probed if place == device else dataclasses.replace(probed, attention=compute.attention)
    probed = world.broadcast(probed)
    assert probed is not None
    take_attention(objective.model, probed.attention)
    objective.stock_logits = probed.stock_logits
    return TrainingComponents(compute, chat, data, objective, probed, mapped)


def loads_mapped(sft: SftConfig, distributed: DistributedConfig) -> bool:
    """Return whether weights are loaded as the mapped files, for the engine to cast its part: not if they make an adapter."""
    if isinstance(sft, LoraConfig):
        computed = sft.dora or sft.start is LoraStart.pissa or isinstance(sft, QloraConfig)
        return loads_on_cpu(distributed) and not computed
    # DeepSpeed takes fp32 masters from the weights that it computes with, whatever the stage.
    return loads_on_cpu(distributed) or distributed.engine is EngineKind.deepspeed


def set_up_engine(
    distributed: DistributedConfig,
    training: TrainingConfig,
    components: TrainingComponents,
    world: World,
    *,
    checkpointing: bool,
) -> Engine:
    """Hand the loaded model to the engine of `distributed`."""
    model: Any = components.model
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if training.compile:
        log.info("training.compile=true: %d blocks are compiled at their first use", compile_blocks(model))
    fp16 = components.dtype is torch.float16
    frozen = components.dtype if components.mapped else None
    return make_engine(distributed, components.objective, training, world, fp16=fp16, frozen=frozen)


def compile_blocks(model: torch.nn.Module) -> int:
    """Let torch compile every block of the decoder for rows of any length, at its first use; return how many there are.

    Layers get back the forward pass that they came with: the compiler cannot see into steps of autograd written by hand.
    """
    decoder: Any = causal_model(model).get_decoder()
    for module in decoder.modules():
        vars(module).pop("forward", None)
    for block in decoder.layers:
        block.compile(dynamic=True)
    return len(decoder.layers)


_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")
"""Packages whose release can change the last bits of a loss."""


def run_fingerprint(
    sft: SftConfig,
    training: TrainingConfig,
    components: TrainingComponents,
    *,
    seed: int,
    total_steps: int,
    engine: str,
    ranks: int = 1,
) -> dict[str, Any]:
    """Return everything that decides the losses of a run, by the words in which a difference is told."""
    return {
        "data": components.data.fingerprint,
        "model": components.chat.files.fingerprint,
        "tokenizer": tokenizer_fingerprint(components.chat.tokenizer),
        "sft_type": deciding(asdict(sft), "sft_type."),
        "dtype": str(components.dtype),
        "attention": attention_of(causal_model(components.model)),
        "kernels": str(KernelChoice.liger if components.compute.liger else KernelChoice.torch),
        "seed": seed,
        "engine": engine,
        "ranks": ranks,
        "threads": components.device.threads,
        "device": components.device.name,
        "versions": versions(sft, liger=components.compute.liger is not None),
        "total_steps": total_steps,
        "training": {name: str(value) for name, value in deciding(asdict(training), "training.").items()},
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Digest over the vocabulary with its ids, special tokens included."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    text = json.dumps([type(tokenizer).__name__, vocabulary], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def versions(sft: SftConfig, *, liger: bool = False) -> dict[str, str]:
    """Return the releases of what computes a loss; of Python, the two numbers that matter."""
    python = ".".join(platform.python_version_tuple()[:2])
    packages = [*_PACKAGES]
    if isinstance(sft, QloraConfig):
        packages.append("bitsandbytes")
    if liger:
        packages += ["liger-kernel", "triton"]
    return {"python": python} | {name: importlib.metadata.version(name) for name in packages}
