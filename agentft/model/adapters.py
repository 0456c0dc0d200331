"""What is trained: adapters on a frozen model, its last blocks, or the model itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.errors import ConfigError
from agentft.model.config import FreezeConfig, FullConfig, LoraConfig, ModelConfig, SftConfig
from agentft.model.freeze import train_last_blocks
from agentft.model.liger import LigerKernels, take_liger_layers
from agentft.model.lora import attach_lora, save_adapter
from agentft.model.native import Kernels
from agentft.model.pissa import is_start

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ParameterCount:
    trained: int
    total: int

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,} parameters are trained ({self.trained / self.total:.2%})"


def prepare_for_training(
    model: Any,
    sft: SftConfig,
    model_config: ModelConfig,
    kernels: Kernels | LigerKernels | None = None,
    *,
    cast: bool = True,
) -> torch.nn.Module:
    """Make `model` trainable as `sft` says; what is trained is kept in fp32. Compiled `kernels` serve what is
    frozen, Liger's every layer that they know.

    Without `cast` a full fine-tuning leaves the weights as they were loaded, for an engine that casts its shards.

    Raises:
        ConfigError: the model has no such layers.
    """
    match sft:
        case LoraConfig():
            trainable = attach_lora(model, sft, model_config, kernels if isinstance(kernels, Kernels) else None)
            _say_reach(trainable)
        case FullConfig():
            trainable = model.float() if cast else model
            trainable.requires_grad_(True)
        case FreezeConfig():
            trainable = train_last_blocks(model, sft)
        case _:
            raise ConfigError(f"sft_type={sft.name}: unknown")
    if isinstance(kernels, LigerKernels):
        take_liger_layers(trainable, kernels)
    module: torch.nn.Module = trainable
    return module


def _say_reach(adapted: Any) -> None:
    """Log how many decoder layers have an adapter, and warn of what the others are made of."""
    import torch
    from peft.tuners.lora import LoraLayer

    model = adapted.get_base_model()
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = (part for part in model.get_decoder().modules() if isinstance(part, torch.nn.ModuleList))
    layers = next((list(part) for part in lists if len(part) == depth), [])  # the outermost: experts lie in layers
    missed = [layer for layer in layers if not any(isinstance(module, LoraLayer) for module in layer.modules())]
    count = count_parameters(adapted)
    reached = f"adapters in {len(layers) - len(missed)} of {len(layers)} layers"
    log.info("%s, %s of %s parameters", reached, f"{count.trained:,}", f"{count.total:,}")
    if missed:
        parts: dict[str, set[str]] = {}
        for layer in missed:
            for module in layer.modules():
                linear = {name for name, child in module.named_children() if isinstance(child, torch.nn.Linear)}
                if linear:
                    parts.setdefault(type(module).__name__, set()).update(linear)
        log.warning(
            "%s: the others stay as they are; they have %s; sft_type.targets names what is adapted",
            reached,
            ", ".join(f"{part} ({', '.join(sorted(names))})" for part, names in sorted(parts.items()))
            or "no linear layer",
        )


def rate_factors(sft: SftConfig) -> Mapping[str, float]:
    """Return by part of a parameter's name what its learning rate is over the others'; empty: all alike."""
    if isinstance(sft, LoraConfig) and sft.learning_rate_ratio != 1.0:
        return {".lora_B.": sft.learning_rate_ratio}
    return {}


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Count parameters, tied ones once."""
    parameters = list(model.parameters())
    return ParameterCount(
        trained=sum(p.numel() for p in parameters if p.requires_grad), total=sum(p.numel() for p in parameters)
    )


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return by name, sharing memory with the model, what a checkpoint keeps: all that the files of the model do not hold."""
    return {name: p.detach() for name, p in kept_parameters(model).items()}


def kept_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return by name the parameters that a checkpoint keeps: the trained ones, and the frozen start of a PiSSA adapter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad or is_start(name)}


def load_trained_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy saved parameters into the model, which must train exactly those.

    Raises:
        ConfigError: names or shapes differ.
    """
    import torch

    current = kept_parameters(model)
    require_same_parameters({name: tuple(p.shape) for name, p in current.items()}, state)
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(state[name])


def require_same_parameters(current: Mapping[str, tuple[int, ...]], state: Mapping[str, torch.Tensor]) -> None:
    """Refuse saved weights that are not those of the kept parameters, given by name and shape.

    Raises:
        ConfigError: names or shapes differ.
    """
    if current.keys() != state.keys():
        odd = sorted(current.keys() ^ state.keys())
        raise ConfigError(f"the saved weights train other parameters than this model: {', '.join(odd[:4])} ...")
    for name, shape in current.items():
        if shape != tuple(state[name].shape):
            raise ConfigError(f"{name}: saved shape {tuple(state[name].shape)}, this model has {shape}")


def save_final(
    model: Any, sft: SftConfig, tokenizer: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter (or the whole model) as safetensors with its tokenizer, loadable without agentft.

    `weights` are the parameters by name (of an adapter the kept ones), where the engine keeps them in shards and the model
    does not have them whole.
    """
    if isinstance(sft, LoraConfig):
        save_adapter(model, sft, folder, weights)
    else:
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
