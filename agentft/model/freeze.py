"""Training of a model's last blocks alone: those in fp32, what is frozen in the dtype that computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentft.errors import ConfigError
from agentft.model.config import FreezeConfig

if TYPE_CHECKING:
    import torch


def train_last_blocks(model: Any, sft: FreezeConfig) -> Any:
    """Freeze `model` but for what `sft` names, which becomes fp32.

    Raises:
        ConfigError: the model has fewer blocks.
    """
    decoder = model.get_decoder()
    blocks = decoder.layers
    if sft.layers > len(blocks):
        raise ConfigError(f"sft_type.layers={sft.layers}: the model has {len(blocks)} blocks; sft_type=full trains all")
    chosen = list(blocks[len(blocks) - sft.layers :])
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if sft.embeddings:
        chosen.append(embeddings)
    if sft.head:
        chosen += [decoder.norm, head]
    model.requires_grad_(False)
    for module in chosen:
        module.float().requires_grad_(True)
    _meet_in_one_dtype([*blocks, decoder.norm, head])
    return model


def _meet_in_one_dtype(modules: list[torch.nn.Module]) -> None:
    """Hand each module its input in its own dtype: where there is no autocast, bf16 would meet fp32."""
    for module in modules:
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def _cast_inputs(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = next(module.parameters()).dtype

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):  # cosines and sines of the positions
            return tuple(cast(item) for item in value)
        return value.to(dtype) if getattr(value, "is_floating_point", bool)() else value

    return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}
