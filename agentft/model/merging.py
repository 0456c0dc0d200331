"""Trained weights joined with the base they were trained on, tensor by tensor, so that no model is ever whole in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.errors import ModelError
from agentft.model.config import LoraConfig, QloraConfig, SftConfig
from agentft.model.lora import plain_adapter_state
from agentft.model.quantization import rounded_weight
from agentft.model.shards import check_free_disk, rewrite_weights, weight_files

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
"""What peft puts before the names of the model's own modules."""


@dataclass(slots=True)
class _Adapter:
    """The parts of one layer's adapter."""

    a_RI: torch.Tensor | None = None
    b_OR: torch.Tensor | None = None
    magnitude_O: torch.Tensor | None = None


def write_merged(
    base: Path,
    folder: Path,
    state: Mapping[str, torch.Tensor],
    sft: SftConfig,
    *,
    computed: torch.dtype,
    stored: torch.dtype,
    allow_pickle: bool = False,
) -> None:
    """Write the weights of `base` with the trained `state` in them into `folder`, as safetensors shards.

    A quantised base is written as the plain numbers that it computed with. Memory needed: one shard and one matrix.

    Args:
        state: a checkpoint's trained tensors by name.
        computed: dtype of the base's weights during the training.
        stored: dtype that is written.

    Raises:
        ModelError: the state does not belong to this base, or the disk is full.
    """
    files = weight_files(base, allow_pickle=allow_pickle)
    check_free_disk(folder, sum(file.stat().st_size for file in files), "the merged model")
    expected, matrices, head = _layout(base)
    adapters = _adapters(state) if isinstance(sft, LoraConfig) else {}
    trained = {} if isinstance(sft, LoraConfig) else dict(state)
    if odd := sorted(({f"{name}.weight" for name in adapters} | trained.keys()) - expected.keys()):
        raise ModelError(f"{base}: the trained weights belong to another model: it has no {', '.join(odd[:3])}")

    def change(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if name == head or name.endswith("rotary_emb.inv_freq"):
            return  # the head is the embeddings; frequencies follow from the settings
        if name in trained:
            yield name, trained[name].to(stored)
            return
        module = name.removesuffix(".weight")
        value = tensor.to(computed)
        if isinstance(sft, QloraConfig) and module in matrices:
            value = rounded_weight(value, sft)
        if isinstance(sft, LoraConfig) and module in adapters:
            value = _adapted(value.float(), adapters[module], sft.scaling)
        yield name, value.to(stored)

    rewrite_weights(files, folder, change, expected)


def _layout(base: Path) -> tuple[dict[str, tuple[int, ...]], set[str], str | None]:
    """Return the shapes of all tensors by name, the modules that bitsandbytes quantises, and the head's name if it is tied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    head = model.get_output_embeddings()
    matrices = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    tied = None
    if head.weight is model.get_input_embeddings().weight:
        tied = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != tied}
    return shapes, matrices, tied


def _adapters(state: Mapping[str, torch.Tensor]) -> dict[str, _Adapter]:
    found: dict[str, _Adapter] = {}
    for name, tensor in plain_adapter_state(dict(state)).items():
        module, _, part = name.removeprefix(_PREFIX).rpartition(".lora_")
        adapter = found.setdefault(module, _Adapter())
        if part == "A.weight":
            adapter.a_RI = tensor
        elif part == "B.weight":
            adapter.b_OR = tensor
        else:
            adapter.magnitude_O = tensor
    return found


def _adapted(weight_OI: torch.Tensor, adapter: _Adapter, scaling: float) -> torch.Tensor:
    """W + s B A; with DoRA each row scaled to its trained norm (arXiv 2402.09353, equation 5)."""
    if adapter.a_RI is None or adapter.b_OR is None:
        raise ModelError("the checkpoint holds half an adapter: lora_A and lora_B belong together")
    summed_OI = weight_OI + scaling * (adapter.b_OR.float() @ adapter.a_RI.float())
    if adapter.magnitude_O is None:
        return summed_OI
    scale_O: torch.Tensor = adapter.magnitude_O.float() / summed_OI.norm(dim=1)
    return summed_OI * scale_O[:, None]
