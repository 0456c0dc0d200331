"""Low-rank adapters and their relatives: attached to a model, and written as plain peft reads them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.errors import ConfigError
from agentft.model.config import ALL_LINEAR, LoraConfig, LoraStart, ModelConfig
from agentft.model.fused import fuse_layers
from agentft.model.native import Kernels
from agentft.model.pissa import START, begin_with_principal_part, fold_start, is_start

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def attach_lora(model: Any, sft: LoraConfig, model_config: ModelConfig, kernels: Kernels | None = None) -> Any:
    """Freeze `model` and put adapters beside the layers that `sft.targets` names.

    Raises:
        ConfigError: no linear layer has such a name, or peft does not adapt it.
    """
    from peft import get_peft_model

    try:
        adapted = get_peft_model(model, peft_config(sft, find_targets(model, sft, model_config)))
    except ValueError as error:  # a layer that the library does not adapt in this architecture
        raise ConfigError(f"sft_type.targets: {error}") from error
    if sft.start is LoraStart.pissa:
        begin_with_principal_part(adapted, sft)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if sft.start is not LoraStart.pissa:
        _draw(adapted)
    fuse_layers(adapted, kernels)
    _say_what_is_not_fused(adapted)
    return adapted


def _draw(adapted: Any) -> None:
    """Draw A anew as peft does, which rounds it to the dtype of the layer beside it: here that dtype, and the device,
    decide nothing, so an engine that casts the layer later begins with the same adapters."""
    import torch
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            weight_RI = module.lora_A["default"].weight
            drawn_RI = torch.nn.init.kaiming_uniform_(torch.empty(weight_RI.shape), a=math.sqrt(5))
            weight_RI.data.copy_(drawn_RI)


def peft_config(sft: LoraConfig, targets: list[str]) -> Any:
    """Return peft's settings for adapters as `sft` says."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType

    return PeftLoraConfig(
        r=sft.rank,
        lora_alpha=sft.alpha,
        lora_dropout=sft.dropout,
        target_modules=targets,
        bias="none",
        use_rslora=sft.rslora,
        use_dora=sft.dora,
        task_type=TaskType.CAUSAL_LM,
    )


def find_targets(model: Any, sft: LoraConfig, model_config: ModelConfig) -> list[str]:
    """Return the last names of the layers to adapt, sorted.

    Raises:
        ConfigError: no linear layer has such a name.
    """
    import torch

    head = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    targets = sft.targets or model_config.lora_targets
    if targets == [ALL_LINEAR]:
        return sorted(linear)
    if unknown := sorted(set(targets) - linear):
        raise ConfigError(
            f"sft_type.targets: no linear layer is called {', '.join(unknown)}; model={model_config.name} has: "
            f"{', '.join(sorted(linear))}, or {ALL_LINEAR}"
        )
    return sorted(set(targets))


def _say_what_is_not_fused(model: Any) -> None:
    from peft.tuners.lora import LoraLayer

    plain = [module for module in model.modules() if isinstance(module, LoraLayer) and "forward" not in vars(module)]
    if not plain:
        return
    reasons = []
    if any(module.use_dora.get("default") for module in plain):
        reasons.append("DoRA")
    if any(START in module.lora_A for module in plain):
        reasons.append("a PiSSA start")
    if any(type(module.get_base_layer()).__module__.startswith("bitsandbytes") for module in plain):
        reasons.append("a quantised base")
    log.info("%d adapted layers run as peft wrote them: %s", len(plain), " and ".join(reasons) or "of another shape")


def save_adapter(model: Any, sft: LoraConfig, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter as peft reads it beside the model as it came; a PiSSA start is folded into twice the rank.

    `weights` are its parameters by name; null: as the model has them.
    """
    if START not in model.peft_config:
        model.save_pretrained(folder, state_dict=weights)
        return
    held = dict(model.named_parameters()) if weights is None else weights
    state = {name: tensor.detach().cpu() for name, tensor in held.items() if ".lora_" in name}
    write_adapter(state, sft, folder, base=model.peft_config["default"].base_model_name_or_path)


def write_adapter(
    state: dict[str, torch.Tensor],
    sft: LoraConfig,
    folder: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
) -> None:
    """Write a checkpoint's adapter as plain peft reads it.

    Args:
        state: tensors by their names in training.
        base: what peft loads the model from.
        revision: of that base on its hub.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    plain = plain_adapter_state(state)
    save_file({k: v.contiguous() for k, v in plain.items()}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    targets = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in plain})
    config = peft_config(sft, targets)
    if sft.start is LoraStart.pissa:
        # Twice the rank with the same factor: alpha / r, or alpha / sqrt(r).
        config.r, config.lora_alpha = 2 * sft.rank, sft.alpha * (math.sqrt(2) if sft.rslora else 2)
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = base, revision
    config.save_pretrained(str(folder))


def plain_adapter_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the names that peft saves."""
    if any(is_start(name) for name in state):
        return fold_start(state)
    return {
        name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default.", "."): tensor
        for name, tensor in state.items()
    }
