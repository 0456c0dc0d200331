"""Load what a run needs, and the engine that computes with it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from agentft import runtime
from agentft.data.batches import StepPlan
from agentft.data.prepare import PreparedData, prepare_data
from agentft.data.template_choice import Layout, stop_tokens
from agentft.data.tokens import SegmentEncoder
from agentft.distributed.engines import loads_on_cpu, make_engine
from agentft.model.adapters import count_parameters, prepare_for_training, rate_factors
from agentft.model.causal import causal_model
from agentft.model.config import Attention, FullConfig, KernelChoice, QloraConfig, SftConfig, trains_weights
from agentft.model.cpu.attention import attention_of
from agentft.model.cpu.native import Kernels
from agentft.model.cuda import LigerKernels
from agentft.model.load import (
    ModelFiles,
    choose_attention,
    choose_dtype,
    choose_kernels,
    choose_layout,
    load_model,
    load_tokenizer,
    locate_model,
    take_attention,
)
from agentft.model.quantization import import_peft, quantization_config
from agentft.recipes.config import TrainConfig, deciding
from agentft.recipes.probe import Ways, ask_stock, probe
from agentft.recipes.ranks import loads_mapped
from agentft.training.compilation import compile_blocks
from agentft.training.engine import Engine
from agentft.training.loss import LabelledLoss
from agentft.world import ALONE, World

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingComponents:
    """Everything that is loaded for a run: where it computes, what it talks with, what it learns from."""

    device: runtime.Device
    dtype: torch.dtype
    files: ModelFiles
    tokenizer: Any
    template: Layout
    stop_ids: tuple[int, ...]
    """Of the tokens that end an answer."""
    data: PreparedData
    model: torch.nn.Module
    ways: Ways
    """What of it is computed in ways of our own, and what as transformers does."""
    kernels: Kernels | LigerKernels | None = None
    """What computes row-wise parts in torch's place, where it serves."""

    @property
    def pad_id(self) -> int:
        return _pad_id(self.tokenizer, self.stop_ids[0])


def _pad_id(tokenizer: Any, stop_id: int) -> int:
    """Any id serves: padding is masked in attention and loss by position, never by id."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_id


def set_up_bench(config: TrainConfig, world: World = ALONE) -> TrainingComponents:
    """Load tokenizer and data first, then the model: a mistake in the data must not wait for the weights."""
    import_peft()
    device = runtime.set_up(config.threads)
    runtime.seed_everything(config.seed)
    dtype = choose_dtype(config.model.dtype, device)
    attention = choose_attention(config.model.attention, device, dtype)
    quantization = quantization_config(config.sft_type, dtype)
    compiled = None if config.training.compile else choose_kernels(config.model, config.sft_type, device, dtype)
    # What is fetched or converted is so once, by rank 0, and then found by the others.
    files = world.first(lambda: locate_model(config.model))
    tokenizer = load_tokenizer(files, config.model)
    template = choose_layout(config.model, tokenizer)
    encoder = SegmentEncoder(tokenizer)
    data = prepare_data(config.dataset, template, encoder)
    # Weights that are trained stay in fp32, so a full fine-tuning loads them so; adapters are fp32 on a frozen base.
    mapped = loads_mapped(config)
    weights_dtype = torch.float32 if isinstance(config.sft_type, FullConfig) else dtype
    place = dataclasses.replace(device, kind="cpu") if loads_on_cpu(config.distributed) and world.size > 1 else device
    model = load_model(
        files,
        config.model,
        device=place,
        dtype=None if mapped else weights_dtype,
        attention=attention,
        quantization=quantization,
    )
    stop_ids = tuple(encoder.special_id(token) for token in stop_tokens(template))
    pad_id, autocast = _pad_id(tokenizer, stop_ids[0]), _autocast(config, dtype)
    stock = ask_stock(model, pad_id=pad_id, autocast=autocast) if world.is_main else None
    runtime.seed_everything(config.seed)
    model = prepare_for_training(model, config.sft_type, config.model, compiled, cast=not mapped)
    log.info("model: %s on %s, %s; %s", config.model.name, device.name, dtype, count_parameters(model))
    ways = None
    if stock is not None:
        # Weights that wait on the CPU for their shards cannot try what runs on a GPU alone.
        tried, asked = (attention, config.model.attention) if place == device else ("sdpa", Attention.auto)
        objective = _objective(config, model, dtype, compiled)
        ways = probe(stock, objective, tried, pad_id=pad_id, asked=asked is not Attention.auto)
        ways = ways if place == device else dataclasses.replace(ways, attention=attention)
    ways = world.broadcast(ways)
    assert ways is not None
    take_attention(model, ways.attention)
    return TrainingComponents(device, dtype, files, tokenizer, template, stop_ids, data, model, ways, compiled)


def set_up_engine(config: TrainConfig, bench: TrainingComponents, world: World, *, checkpointing: bool) -> Engine:
    """Hand the loaded model to the engine of `distributed`."""
    objective = _objective(config, bench.model, bench.dtype, bench.kernels)
    objective.stock_logits = bench.ways.stock_logits
    if checkpointing:
        bench.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if config.training.compile:
        compile_blocks(bench.model)
    fp16 = bench.dtype is torch.float16
    frozen = bench.dtype if loads_mapped(config) else None
    return make_engine(config.distributed, objective, config.training, world, fp16=fp16, frozen=frozen)


def _objective(
    config: TrainConfig, model: torch.nn.Module, dtype: torch.dtype, kernels: Kernels | LigerKernels | None
) -> LabelledLoss:
    # Engines that shard gather the head's weight only around a call of the head.
    sharded = loads_on_cpu(config.distributed)
    return LabelledLoss(
        model,
        autocast=_autocast(config, dtype),
        rate_factors=rate_factors(config.sft_type),
        kernels=None if sharded or isinstance(kernels, LigerKernels) else kernels,
        reads_head=not sharded,
    )


def _autocast(config: TrainConfig, dtype: torch.dtype) -> torch.dtype | None:
    return dtype if trains_weights(config.sft_type) and dtype != torch.float32 else None


_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")
"""Packages whose release can change a loss in its last bits."""


def identity(config: TrainConfig, bench: TrainingComponents, plan: StepPlan, *, ranks: int = 1) -> dict[str, Any]:
    """Return everything that decides the losses of a run, by the words in which a difference is told."""
    settings = deciding(asdict(config))
    return {
        "data": bench.data.fingerprint,
        "model": bench.files.fingerprint,
        "tokenizer": tokenizer_fingerprint(bench.tokenizer),
        "sft_type": settings["sft_type"],
        "dtype": str(bench.dtype),
        "attention": attention_of(causal_model(bench.model)),
        "kernels": str(kernels_of(bench.kernels)),
        "seed": config.seed,
        "engine": config.distributed.name,
        "ranks": ranks,
        "threads": bench.device.threads,
        "device": bench.device.name,
        "versions": versions(config.sft_type, liger=isinstance(bench.kernels, LigerKernels)),
        "total_steps": plan.total_steps,
        "training": {name: str(value) for name, value in settings["training"].items()},
    }


def kernels_of(kernels: Kernels | LigerKernels | None) -> KernelChoice:
    """Return who computes row-wise parts."""
    match kernels:
        case None:
            return KernelChoice.torch
        case LigerKernels():
            return KernelChoice.liger
        case _:
            return KernelChoice.compiled


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
