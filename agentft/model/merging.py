"""Merge what was trained into the weights of its base: tensor by tensor, or whole by peft where files name them otherwise.

transformers keeps the experts of a layer in one tensor, and their files hold each expert by itself; it also reads files whose
names lack a prefix. Only a model that it has loaded says which tensor is which then.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from agentft.errors import ModelError
from agentft.model.adapters import attach_lora, find_targets, load_trained_state, plain_adapter_state
from agentft.model.config import LoraConfig, ModelConfig, QloraConfig, SftConfig
from agentft.model.load import load_model
from agentft.model.quantization import published_as, rounded_weight
from agentft.model.shards import empty_model, read_json, read_names, rewrite_weights, weight_files
from agentft.model.sources import ModelFiles
from agentft.runtime import Device

log = logging.getLogger(__name__)

_PREFIX = "base_model.model."
"""What peft puts before the names of the model's own modules."""


def write_merged(
    base: Path,
    folder: Path,
    state: Mapping[str, torch.Tensor],
    sft: SftConfig,
    config: ModelConfig,
    *,
    computed: torch.dtype,
    stored: torch.dtype,
) -> None:
    """Write config.json and the weights of `base` with the trained `state` in them into `folder`, as safetensors shards.

    A quantised base is written as the plain numbers that it computed with. Memory needed: one shard and one matrix, or the
    whole model where the names in its files are not those in memory.

    Args:
        state: a checkpoint's trained tensors by name.
        config: of the training.
        computed: dtype of the base's weights during the training.
        stored: dtype that is written.

    Raises:
        ModelError: the state does not belong to this base, or the disk is full.
    """
    from transformers import AutoConfig

    trust = {"trust_remote_code": config.trust_remote_code}
    files = weight_files(base, allow_pickle=config.allow_pickle)
    model = empty_model(AutoConfig.from_pretrained(base, **trust), **trust)
    layers, head = _layers(model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != head}
    found = {name for file in files for name in read_names(file) if not _is_left_out(name, head)}
    for code in base.glob("*.py") if config.trust_remote_code else ():
        shutil.copy(code, folder)
    in_tensors = isinstance(sft, LoraConfig) and find_targets(model, sft, config).parameters
    if found != expected.keys() or in_tensors or published_as(read_json(base / "config.json")):
        _merge_whole(base, folder, state, sft, config, computed=computed, stored=stored)
        return
    adapter = plain_adapter_state(dict(state)) if isinstance(sft, LoraConfig) else {}
    adapted = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in adapter}
    trained = {} if isinstance(sft, LoraConfig) else dict(state)
    if odd := sorted(({f"{module}.weight" for module in adapted} | trained.keys()) - expected.keys()):
        raise ModelError(f"{base}: the trained weights belong to another model: it has no {', '.join(odd[:3])}")

    def change(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if _is_left_out(name, head):
            return
        if name in trained:
            yield name, trained[name].to(stored)
            return
        module = name.removesuffix(".weight")
        value = tensor.to(computed)
        if isinstance(sft, QloraConfig) and isinstance(layers.get(module), torch.nn.Linear):
            value = rounded_weight(value, sft)
        if isinstance(sft, LoraConfig) and module in adapted:
            # Conv1D, the linear layer of GPT-2, keeps its weight as [I, O].
            turned = isinstance(layers.get(module), Conv1D)
            weight_OI = value.float().T if turned else value.float()
            merged_OI = _with_adapter(weight_OI, adapter, f"{_PREFIX}{module}.lora_", sft.scaling)
            value = merged_OI.T if turned else merged_OI
        yield name, value.to(stored)

    rewrite_weights(files, folder, change, expected)
    model.config.architectures, model.config.dtype = [type(model).__name__], stored
    model.config.save_pretrained(folder)


def _is_left_out(name: str, tied_head: str | None) -> bool:
    """Return whether a tensor is not written: the head is the embeddings, and frequencies follow from the settings."""
    return name == tied_head or name.endswith("rotary_emb.inv_freq")


def _layers(model: Any) -> tuple[dict[str, torch.nn.Module], str | None]:
    """Return the linear layers but the head by name, and the name of the head's weight if it is tied."""
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    tied = head.weight is model.get_input_embeddings().weight
    return layers, next(f"{name}.weight" for name, module in model.named_modules() if module is head) if tied else None


def _merge_whole(
    base: Path,
    folder: Path,
    state: Mapping[str, torch.Tensor],
    sft: SftConfig,
    config: ModelConfig,
    *,
    computed: torch.dtype,
    stored: torch.dtype,
) -> None:
    """Merge as `write_merged` does, with the whole model in memory."""
    from transformers import GenerationConfig

    cpu = Device("cpu", "CPU", torch.get_num_threads())
    model: Any = load_model(ModelFiles(base, ""), config, device=cpu, dtype=computed, attention="eager")
    size = model.num_parameters() * torch.promote_types(computed, stored).itemsize / 1e9
    log.info("merging with the whole model in memory, %.1f GB: its files have other names than its layers", size)
    if isinstance(sft, QloraConfig):
        layers, _ = _layers(model)
        for module in layers.values():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = rounded_weight(module.weight.data, sft)
    model = model.to(torch.promote_types(computed, stored))
    if isinstance(sft, LoraConfig):
        adapted = attach_lora(model, sft, config)
        load_trained_state(adapted, dict(state))
        model = adapted.merge_and_unload()
    elif odd := sorted(model.load_state_dict(dict(state), strict=False).unexpected_keys):
        raise ModelError(f"{base}: the trained weights belong to another model: it has no {', '.join(odd[:3])}")
    model.generation_config = GenerationConfig()  # the files' own may be one that transformers refuses to write
    # The files of weights that were made dense are named for what they were.
    dense = not published_as(read_json(base / "config.json"))
    model.to(stored).save_pretrained(folder, save_original_format=dense)


def _with_adapter(
    weight_OI: torch.Tensor, adapter: Mapping[str, torch.Tensor], prefix: str, scaling: float
) -> torch.Tensor:
    """Return W + s B A; with DoRA each row scaled to its trained norm (arXiv 2402.09353, equation 5)."""
    a_RI, b_OR = adapter.get(f"{prefix}A.weight"), adapter.get(f"{prefix}B.weight")
    if a_RI is None or b_OR is None:
        raise ModelError("the checkpoint holds half an adapter: lora_A and lora_B belong together")
    summed_OI = weight_OI + scaling * (b_OR.float() @ a_RI.float())
    magnitude_O = adapter.get(f"{prefix}magnitude_vector")
    if magnitude_O is None:
        return summed_OI
    scale_O: torch.Tensor = magnitude_O.float() / summed_OI.norm(dim=1)
    return summed_OI * scale_O[:, None]
