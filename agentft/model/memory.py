"""Estimate the memory of a fine-tuning from config.json alone, before weights are fetched.

Counted is what lives at the end of the forward pass, to a tenth for decoders of the Llama family; the allocator's gaps, the
CUDA context and short-lived buffers take about a tenth more. Weights, gradients and Adam's state as in Rajbhandari et al.,
2020 (ZeRO, arXiv 1910.02054, section 3.1); activations in the manner of Korthikanti et al., 2022 (arXiv 2205.05198, section
4), counted anew for SwiGLU blocks with grouped heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from agentft.errors import ModelError
from agentft.model.adapters import count_parameters, decoder_blocks, find_targets, is_expert, train_last_blocks
from agentft.model.attention import KEEP_UP_TO, TILE
from agentft.model.config import (
    Attention,
    Dtype,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    LoraStart,
    ModelConfig,
    QloraConfig,
    SftConfig,
)
from agentft.model.conversion import LAYOUTS, needs_conversion
from agentft.model.fused import is_gated_mlp, is_rms_norm
from agentft.model.labelled_loss import CHUNK
from agentft.model.quantization import import_peft
from agentft.model.shards import empty_model
from agentft.runtime import Device, cgroup_folders

_CGROUPS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files that hold a control group's limit and what it uses, of both versions."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device."""

    free: int
    total: int


def device_memory(device: Device) -> DeviceMemory:
    """Return the memory of `device`: of the GPU, or of this machine, container or job."""
    if device.is_cuda:
        return DeviceMemory(*torch.cuda.mem_get_info())
    return memory_within(cgroup_folders("memory"))


def memory_within(folders: Sequence[Path]) -> DeviceMemory:
    """Return the memory of this machine within the limits of control groups."""
    machine = psutil.virtual_memory()
    limits = [DeviceMemory(machine.available, machine.total)]
    for folder in folders:
        for limit, used in _CGROUPS:
            if (most := _number(folder / limit)) is not None:
                limits.append(DeviceMemory(most - (_number(folder / used) or 0), most))
    return DeviceMemory(min(each.free for each in limits), min(each.total for each in limits))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or `max`: no limit
        return None


FAR = 1.25
"""Estimates beyond this share of a device's whole memory are refused: they are not that wrong."""

WAYS_OUT = (
    "try training.gradient_checkpointing=true, training.per_device_batch_size=1, a smaller dataset.max_length, "
    "model.dtype=bf16, sft_type=lora or a smaller model"
)

ADAM_BYTES = 8
"""AdamW's mean gradient and mean squared gradient in fp32, for each trained parameter."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device, by what they are for."""

    weights: int
    """What computes: frozen weights, or the bf16 copies of trained ones."""
    trained: int
    """What is trained, in fp32; with a PiSSA start its frozen half too."""
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, kind.name) for kind in fields(self))

    def __str__(self) -> str:
        parts = " + ".join(f"{kind.name} {_gigabytes(getattr(self, kind.name))}" for kind in fields(self))
        return f"{parts} = {_gigabytes(self.total)} GB"


@dataclass(frozen=True, slots=True)
class Workload:
    """What decides the memory of one device besides the model and the method."""

    max_length: int
    per_device_batch_size: int = 1
    compiles: bool = False
    """torch's compiler runs over each block."""
    on_cpu: bool = False
    ranks: int = 1
    zero_stage: int = 0
    """What ranks divide: 1 the optimiser's state, 2 gradients too, 3 weights too; FSDP is stage 3."""
    offloads_optimizer: bool = False
    """The optimiser's state, what it updates and its gradients lie in the machine's memory."""
    offloads_weights: bool = False


def planned_model(settings: Mapping[str, Any]) -> Any:
    """Build the model that these contents of a config.json become, without memory for its weights.

    Raises:
        ModelError: transformers has no such architecture, or a setting is missing.
    """
    import_peft()  # before transformers' own models, which look for kernels of a hub as well
    import transformers

    kind = settings.get("model_type")
    try:
        if needs_conversion(settings):
            layout = LAYOUTS[str(kind)]
            hf_config = getattr(transformers, f"{layout.target}Config")(**layout.settings(settings, str(kind)))
        else:
            hf_config = transformers.AutoConfig.for_model(**settings)
        return empty_model(hf_config)
    except Exception as error:  # whatever an architecture's own code makes of its settings
        raise ModelError(f"no memory estimate for model_type {kind!r}: {error}") from error


def estimate_memory(
    model: Any, config: ModelConfig, sft: SftConfig, work: Workload, *, dtype: Dtype, checkpointing: bool
) -> MemoryEstimate:
    """Estimate the memory of one device for batches of full length.

    Of n parameters, t of them trained: weights n b, with b bytes of the computing dtype (of a full fine-tuning in bf16 or fp16
    the copies that autocast makes of matrices), trained 4 t, gradients 4 t, optimiser 8 t, over the ranks by ZeRO's stage.

    Args:
        model: From `planned_model`.
        dtype: bf16, fp16 or fp32, not `auto`.

    Raises:
        ModelError: the method is not one of those that are counted.
        ConfigError: the model has no such layers.
    """
    b = 4 if dtype is Dtype.fp32 else 2
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    if not matrices:
        raise ModelError(f"no memory estimate for {type(model).__name__}: none of its layers is a torch.nn.Linear")
    blocks = decoder_blocks(model)[0] or [model.get_decoder()]
    adapted: set[Any] = set()
    copies, kept_blocks = 1, len(blocks)
    match sft:
        case LoraConfig():
            targets = find_targets(model, sft, config)
            adapted = {*targets.layers.values(), *targets.parameters.values()}
            layers: list[Any] = list(targets.layers.values())
            trained = sum(sft.rank * sum(m.weight.shape) + m.weight.shape[0] * sft.dora for m in layers)
            # An expert's tensor has an adapter for each of the experts.
            trained += sum(sft.rank * p[..., 0, 0].numel() * sum(p.shape[-2:]) for p in targets.parameters.values())
            weights = _frozen_bytes(total, sum(m.weight.numel() for m in matrices), b, sft)
            copies = 2 if sft.start is LoraStart.pissa else 1
        case FullConfig():
            trained = total
            weights = b * sum(m.weight.numel() for m in (*matrices, head)) if b < 4 else 0
        case FreezeConfig():
            trained = count_parameters(train_last_blocks(model, sft)).trained
            weights = (total - trained) * b + (trained * b if b < 4 else 0)
            # Below the first trained block nothing is kept, unless gradients have to reach the embeddings.
            kept_blocks = len(blocks) if sft.embeddings else min(sft.layers, len(blocks))
        case _:
            raise ModelError(f"no memory estimate for sft_type={sft.name}")
    each = [_kept_bytes(model, block, adapted, config, sft, work, b) for block in blocks[len(blocks) - kept_blocks :]]
    layer_input = (b if isinstance(sft, LoraConfig) else 4) * _sizes(model)[0]
    kept = len(each) * layer_input + max(each, default=0) if checkpointing else sum(each)
    # Adapted experts are added up with their adapters, each layer's whole tensor anew, and its gradient is as large.
    merged = [b * sum(p.numel() for p in block.parameters() if p in adapted) for block in blocks]
    at_once = max(merged) + (max(merged) if checkpointing else sum(merged))
    if any(map(_has_sinks, blocks)):  # their gradients and copies in the backward pass of a layer
        at_once += 3 * b * _sizes(model)[2] * work.max_length**2 * work.per_device_batch_size
    tokens = work.max_length * work.per_device_batch_size
    # Logits, their fp32 copy, log-softmax, and the gradients of the first two.
    logits = min(tokens, CHUNK) * model.get_input_embeddings().weight.shape[0] * (2 * b + 12)

    def held(count: int, stage: int, offloaded: bool) -> int:
        """Return what one rank holds of that, which ranks divide from this stage of ZeRO on."""
        return 0 if offloaded else -(-count // work.ranks) if work.zero_stage >= stage else count

    return MemoryEstimate(
        weights=held(weights, 3, work.offloads_weights),
        trained=held(4 * trained * copies, 3, work.offloads_optimizer),
        gradients=held(4 * trained, 2, work.offloads_optimizer),
        optimizer=held(ADAM_BYTES * trained, 1, work.offloads_optimizer),
        activations=round(tokens * (kept + 2 * layer_input)) + at_once,
        logits=logits,
    )


def _frozen_bytes(total: int, quantised: int, b: int, sft: LoraConfig) -> int:
    """Return the bytes of the frozen weights: b each, or those of the blocks' matrices in 4 or 8 bits with their scales."""
    if not isinstance(sft, QloraConfig):
        return total * b
    # 4 bytes for 64 weights, themselves in 8 bits by blocks of 256 with double quantisation; in 8 bits one for each row.
    scale = (8 / 64 + 32 / (64 * 256) if sft.double_quantization else 32 / 64) if sft.bits == 4 else 0.0
    return (total - quantised) * b + round(quantised * (sft.bits + scale) / 8)


def _kept_bytes(
    model: Any, block: nn.Module, adapted: set[Any], config: ModelConfig, sft: SftConfig, work: Workload, b: int
) -> float:
    """Return the bytes that a block keeps of each position.

    The leaner layers of `fused.py` keep about what the matrices put out: the inputs of norms, query, key, value, gate and up,
    and what attention puts out. Stock ones keep gate's SiLU besides, and norms an fp32 copy; adapters of peft compute in
    fp32. Where weights are trained, every matrix keeps its input, under autocast a copy for each.
    """
    hidden, _, heads = _sizes(model)
    matrices = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    inner = max((layer.out_features for layer in matrices.values()), default=0)
    outputs = sum(layer.out_features for layer in matrices.values())
    attention = 0
    if any("Attention" in type(module).__name__ for module in block.modules()):
        attention = _attention_bytes(block, heads, config, work, b)
    mixed = attention + _recurrent_bytes(block, work) + b * _active_expert_outputs(model, block)
    normed = 0
    if any(name.endswith("q_norm") for name, _ in block.named_modules()):  # norms of heads keep what they take in
        normed = sum(layer.out_features for name, layer in matrices.items() if name.endswith(("q_proj", "k_proj")))
    if not isinstance(sft, LoraConfig):
        inputs = 2 * 4 * hidden if b == 4 else 5 * b * hidden
        return b * outputs + 8 * normed + b * (2 * inner - hidden) + 16 * hidden + inputs + mixed
    chosen = {name: layer for name, layer in matrices.items() if layer in adapted}
    if sft.dora or sft.start is LoraStart.pissa or isinstance(sft, QloraConfig) or work.compiles:
        mask = (4 if work.on_cpu else 1) if sft.dropout else 0
        adapters = sum(layer.in_features * (4 + mask) + 4 * sft.rank for layer in chosen.values())
        return b * outputs + 4 * normed + b * (inner - hidden) + 8 * hidden + mixed + adapters
    # Neighbours share their input.
    shared = {(name.rpartition(".")[0], layer.in_features) for name, layer in chosen.items()}
    masks = sum(layer.in_features for layer in chosen.values()) if sft.dropout else 0
    adapters = b * (sum(size for _, size in shared) + sft.rank * len(chosen)) + masks
    if not any(map(is_gated_mlp, block.modules())):
        outputs += inner  # what the activation takes and gives
    if any(map(is_rms_norm, block.modules())):  # `fused.py` serves them
        return b * (outputs + normed + hidden) + mixed + adapters
    norms = [module for module in block.modules() if "Norm" in type(module).__name__]
    wide = sum(next((p.numel() for p in norm.parameters()), 0) == hidden for norm in norms)
    return b * outputs + 4 * normed + 4 * wide * hidden + mixed + adapters


def _attention_bytes(block: nn.Module, heads: int, config: ModelConfig, work: Workload, b: int) -> int:
    """Return the bytes that attention itself keeps of each position."""
    if _has_sinks(block):
        return heads * work.max_length * b
    if config.attention is Attention.eager:
        return heads * work.max_length * (4 + b)
    if work.on_cpu and b == 2 and config.attention in (Attention.auto, Attention.tiled):
        # In tiles of queries, whose weights over the keys that they see are kept in short rows.
        values: list[Any] = [getattr(module, "sliding_window", None) for module in block.modules()]
        windows = [value for value in values if isinstance(value, int)]
        window = min(windows, default=work.max_length)
        seen = min((work.max_length + TILE) // 2, window + TILE)
        return b * heads * seen if work.max_length <= KEEP_UP_TO else 0
    return 4 * heads


def _has_sinks(block: nn.Module) -> bool:
    """Return whether attention weighs sinks too, whose weights over all keys transformers computes at once."""
    return any(name.endswith("sinks") for name, _ in block.named_parameters())


_RECURRENT_KERNELS = ("fla", "mamba_ssm")
"""Packages whose kernels keep about what goes in; without them transformers computes with torch, in fp32 by chunks."""

_DELTA_CHUNK = 64
"""Positions of a chunk in transformers' gated delta rule."""


def _recurrent_bytes(block: nn.Module, work: Workload) -> int:
    """Return the bytes that the scan of a state-space or gated delta layer keeps of each position, counted by trial."""
    if not work.on_cpu and any(find_spec(package) for package in _RECURRENT_KERNELS):
        return 0
    mixers: list[Any] = [module for module in block.modules() if hasattr(module, "A_log")]
    numbers = 0
    for mixer in mixers:
        if hasattr(mixer, "ssm_state_size") and hasattr(
            mixer, "chunk_size"
        ):  # Mamba-2: scores in a chunk, inputs, states
            numbers += mixer.num_heads * (3 * mixer.chunk_size + 6 * mixer.head_dim + 4 * mixer.ssm_state_size)
        elif hasattr(mixer, "num_v_heads"):
            numbers += mixer.num_v_heads * (5 * _DELTA_CHUNK + 6 * (mixer.head_k_dim + mixer.head_v_dim))
    return 4 * numbers


def _active_expert_outputs(model: Any, block: nn.Module) -> int:
    """Return how many numbers the experts of a position take in and put out in a block."""
    settings = model.config.get_text_config(decoder=True)
    active = next((n for name in _ACTIVE if isinstance(n := getattr(settings, name, None), int)), 1)
    experts = (p.shape for name, p in block.named_parameters() if is_expert(block, name))
    return int(sum(min(active, shape[0]) * sum(shape[1:]) for shape in experts))


_ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token")
"""Names that architectures give to the experts of one position."""


def _sizes(model: Any) -> tuple[int, int, int]:
    """Return hidden width, blocks and attention heads; no heads where the architecture has none."""
    settings = model.config.get_text_config(decoder=True)
    width: int = model.get_input_embeddings().weight.shape[1]
    return width, settings.num_hidden_layers, getattr(settings, "num_attention_heads", 0)


class Fit(StrEnum):
    """How an estimate compares with a device."""

    fits = "fits"
    """With a tenth to spare."""
    tight = "tight"
    """Less than that is free."""
    impossible = "impossible"
    """Even an empty device is too small by far, by a quarter of its whole memory and more."""


def judge(estimate: MemoryEstimate, memory: DeviceMemory, device_name: str) -> tuple[Fit, str]:
    """Compare with the device, and say in one line what was found."""
    free, total = _gigabytes(memory.free), _gigabytes(memory.total)
    line = f"memory: {estimate}; free on {device_name}: {free} of {total} GB"
    if estimate.total * 1.1 <= memory.free:
        return Fit.fits, line
    if estimate.total <= memory.total * FAR:
        return Fit.tight, f"{line}; it will hardly fit: {WAYS_OUT}"
    return Fit.impossible, f"{line}; it cannot fit: {WAYS_OUT}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"
