"""What decides the losses of a run, so that a checkpoint goes on only where all of it is the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from agentft.data.batches import StepPlan
from agentft.model.attention import attention_of
from agentft.model.causal import causal_model
from agentft.model.config import KernelChoice, QloraConfig, SftConfig
from agentft.model.liger import LigerKernels
from agentft.model.native import Kernels
from agentft.recipes.config import TrainConfig, deciding

if TYPE_CHECKING:
    from agentft.recipes.bench import Bench

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")
"""Packages whose release can change a loss in its last bits."""


def identity(config: TrainConfig, bench: Bench, plan: StepPlan, *, ranks: int = 1) -> dict[str, Any]:
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
