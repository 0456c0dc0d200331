"""What is trained: adapters on a frozen model, or the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.errors import ConfigError
from agentft.model.config import FullConfig, LoraConfig, ModelConfig, SftConfig
from agentft.model.fused import fuse_layers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ParameterCount:
    trained: int
    total: int

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,} parameters are trained ({self.trained / self.total:.2%})"


def prepare_for_training(model: Any, sft: SftConfig, model_config: ModelConfig) -> torch.nn.Module:
    """Make `model` trainable as `sft` says; what is trained is kept in fp32.

    Raises:
        ConfigError: no linear layer has a name in `sft_type.targets`.
    """

    match sft:
        case LoraConfig():
            trainable = _attach_lora(model, sft, model_config)
            fuse_layers(trainable)
        case FullConfig():
            trainable = model.float()
            trainable.requires_grad_(True)
        case _:
            raise ConfigError(f"sft_type={sft.name}: unknown")
    module: torch.nn.Module = trainable
    return module


def _attach_lora(model: Any, sft: LoraConfig, model_config: ModelConfig) -> Any:
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType, get_peft_model

    targets = sft.targets or model_config.lora_targets
    linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    unknown = sorted(set(targets) - linear)
    if unknown:
        raise ConfigError(
            f"sft_type.targets: no linear layer is called {', '.join(unknown)}; model={model_config.name} has: "
            f"{', '.join(sorted(linear))}"
        )
    return get_peft_model(
        model,
        PeftLoraConfig(
            r=sft.rank,
            lora_alpha=sft.alpha,
            lora_dropout=sft.dropout,
            target_modules=sorted(targets),
            bias="none",
            task_type=TaskType.CAUSAL_LM,
        ),
    )


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Count parameters, tied ones once."""
    parameters = list(model.parameters())
    return ParameterCount(
        trained=sum(p.numel() for p in parameters if p.requires_grad), total=sum(p.numel() for p in parameters)
    )


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters by name, sharing memory with the model."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy saved parameters into the model, which must train exactly those.

    Raises:
        ConfigError: names or shapes differ.
    """
    import torch

    current = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if current.keys() != state.keys():
        odd = sorted(current.keys() ^ state.keys())
        raise ConfigError(f"the saved weights train other parameters than this model: {', '.join(odd[:4])} ...")
    with torch.no_grad():
        for name, parameter in current.items():
            if parameter.shape != state[name].shape:
                raise ConfigError(
                    f"{name}: saved shape {tuple(state[name].shape)}, this model has {tuple(parameter.shape)}"
                )
            parameter.copy_(state[name])


def save_final(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the adapter (or the whole model) as safetensors with its tokenizer, loadable without agentft."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
