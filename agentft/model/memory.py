"""Estimate the memory of a fine-tuning from the numbers in config.json alone: no weights, no torch.

Sizes as in `memory.py`. Counted from what the steps of autograd there and in `compiled.py` save.

Counted is what lives at the peak, at the end of the forward pass: weights, fp32 copies that are trained, gradients, the
optimiser's state, activations kept for the backward pass, and the logits of the labelled positions. Not counted are
the allocator's gaps, the CUDA context (about 0.5 GB) and short-lived buffers; allow a tenth for them.

Sizes: h width, i inner width, q = heads x head size, k = key heads x head size, b bytes of the computing dtype.
Weights, gradients and Adam's state as in Rajbhandari et al., 2020 (ZeRO, arXiv 1910.02054, section 3.1); activations in
the manner of Korthikanti et al., 2022 (arXiv 2205.05198, section 4), counted anew for SwiGLU blocks with grouped heads.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from agentft.errors import ModelError
from agentft.model.config import (
    ALL_LINEAR,
    Dtype,
    FreezeConfig,
    FullConfig,
    LoraConfig,
    LoraStart,
    QloraConfig,
    SftConfig,
)
from agentft.runtime import Device

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files that hold a container's limit and what it uses, of both versions of control groups."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device."""

    free: int
    total: int


def device_memory(device: Device) -> DeviceMemory | None:
    """Return the memory of `device`: of the GPU, or of this machine or container; None where nobody tells."""
    if device.is_cuda:
        import torch

        return DeviceMemory(*torch.cuda.mem_get_info())
    machine = _machine()
    limits = [machine] if machine is not None else []
    for limit, used in _CGROUPS:
        if (most := _number(Path(limit))) is not None:
            limits.append(DeviceMemory(most - (_number(Path(used)) or 0), most))
    if not limits:
        return None
    return DeviceMemory(min(each.free for each in limits), min(each.total for each in limits))


def _machine() -> DeviceMemory | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    return DeviceMemory(_available(page), os.sysconf("SC_PHYS_PAGES") * page)


def _available(page: int) -> int:
    """Memory that can be had without swapping: Linux's own estimate, else pages that are free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or `max`: no limit
        return None


TILE = 128
KEEP_UP_TO = 1024
"""As in `attention.py`, which cannot be read here without torch; a test holds them equal."""

COMPILED_LOSS_CHUNK = 256
"""Positions whose logits exist at once behind a frozen head in compiled code; in `labelled_loss.py`."""


class Sizes(Protocol):
    """The numbers of a `ModelShape` that count here."""

    @property
    def hidden(self) -> int: ...

    @property
    def inner(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def key_heads(self) -> int: ...

    @property
    def qk_norm(self) -> bool: ...

    @property
    def query_width(self) -> int: ...

    @property
    def key_width(self) -> int: ...

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]: ...


@dataclass(frozen=True, slots=True)
class Layers:
    """Which of the leaner layers compute."""

    compiled: bool = False
    """Row-wise parts in C: no masks of dropout are kept."""
    tiled: bool = False
    """Attention in tiles, whose weights are kept for rows of up to `KEEP_UP_TO` positions."""


def fuses_adapters(sft: LoraConfig) -> bool:
    """Whether the adapters are of the plain kind that `fused.py` computes."""
    return not (sft.dora or sft.start is LoraStart.pissa or isinstance(sft, QloraConfig))


def fused_layer_bytes(
    shape: Sizes, b: int, length: int, sft: LoraConfig, targets: Collection[str], layers: Layers, *, eager: bool = False
) -> int:
    """Bytes kept for each position in one block with frozen weights and plain adapters.

    A norm keeps its input and a number (b h + 4); the MLP gate and up (2 b i); adapters on q, k, v one input, on gate and up
    another, b rank each and with dropout in torch a byte of mask for an input.
    """
    norms = 2 * (b * shape.hidden + 4)
    if shape.qk_norm:
        norms += b * (shape.query_width + shape.key_width) + 4 * (shape.heads + shape.key_heads)
    adapters = b * shape.hidden * (_any(targets, "q_proj", "k_proj", "v_proj") + _any(targets, "gate_proj", "up_proj"))
    adapters += b * shape.inner * _any(targets, "down_proj")
    for name, (inputs, _) in shape.linear_layers.items():
        if name in targets:
            adapters += b * sft.rank + inputs * (sft.dropout > 0 and not layers.compiled)
    return norms + 2 * b * shape.inner + adapters + _attention_bytes(shape, b, length, targets, layers, eager=eager)


def _attention_bytes(
    shape: Sizes, b: int, length: int, targets: Collection[str], layers: Layers, *, eager: bool
) -> int:
    """Rotated q and k, v: b (q + 2 k). In tiles their weights, and the output if an adapter reads it; by torch's kernel the
    output and log-sum-exp; eager the probabilities in fp32 and in b."""
    inputs, output = b * (shape.query_width + 2 * shape.key_width), b * shape.query_width
    if layers.tiled:
        weights = round(b * shape.heads * keys_seen(length)) if length <= KEEP_UP_TO else 0
        return inputs + weights + output * _any(targets, "o_proj")
    return inputs + output + shape.heads * (length * (4 + b) if eager else 4)


def keys_seen(length: int) -> float:
    """Mean number of keys in the tiles of a position's queries."""
    stops = [min(start + TILE, length) for start in range(0, length, TILE)]
    return sum((stop - start) * stop for start, stop in zip(range(0, length, TILE), stops, strict=True)) / length


def _any(targets: Collection[str], *names: str) -> bool:
    return any(name in targets for name in names)


_DECODERS = ("llama", "qwen2", "qwen3", "mistral", "qwen", "baichuan")
"""`model_type`s whose blocks are the ones counted here."""

_FUSED = ("llama", "qwen2", "qwen3", "qwen")
"""Those of them whose layers `fused.py` knows; `qwen` is converted to qwen2."""

_SPELLINGS = {
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
}

FAR = 1.25
"""Estimates beyond this share of a device's whole memory are refused: they are not that wrong."""

WAYS_OUT = (
    "try training.gradient_checkpointing=true, training.per_device_batch_size=1, a smaller dataset.max_length, "
    "model.dtype=bf16, sft_type=lora or a smaller model"
)

ADAM_BYTES = 8
"""AdamW's mean gradient and mean squared gradient in fp32, for each trained parameter."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a decoder with SwiGLU blocks that decide its size."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    inner: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_size

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the matrices in one block, by name."""
        h, q, k, i = self.hidden, self.query_width, self.key_width, self.inner
        attention = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def block_matrices(self) -> int:
        """Number of parameters in the matrices of one block."""
        return sum(a * b for a, b in self.linear_layers.values())

    @property
    def block_parameters(self) -> int:
        """Number of parameters of one block: matrices, biases, norms."""
        biases = (self.query_width + 2 * self.key_width) * self.qkv_bias
        return self.block_matrices + 2 * self.hidden + biases + 2 * self.head_size * self.qk_norm

    @property
    def parameters(self) -> int:
        """Number of parameters: embeddings (once if tied), final norm, blocks."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.layers * self.block_parameters + self.hidden

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Number of parameters of adapters A (rank x in) and B (out x rank) on each target of each block."""
        chosen = [shape for name, shape in self.linear_layers.items() if name in targets]
        return self.layers * rank * sum(a + b for a, b in chosen)


def model_shape(settings: Mapping[str, Any]) -> ModelShape:
    """Read the shape from the contents of a config.json, of today's layouts and of the old ones.

    Raises:
        ModelError: another architecture, or a number is missing.
    """
    kind = settings.get("model_type")
    if kind not in _DECODERS:
        raise ModelError(f"no memory estimate for model_type {kind!r}; there is one for {', '.join(_DECODERS)}")
    found = {}
    for name, spellings in _SPELLINGS.items():
        value = next((settings[spelling] for spelling in spellings if settings.get(spelling) is not None), None)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: expected a positive whole number as {' or '.join(spellings)}")
        found[name] = value
    heads = found["num_attention_heads"]
    return ModelShape(
        vocab=found["vocab_size"],
        hidden=found["hidden_size"],
        layers=found["num_hidden_layers"],
        heads=heads,
        key_heads=settings.get("num_key_value_heads") or heads,
        head_size=settings.get("head_dim") or found["hidden_size"] // heads,
        inner=found["intermediate_size"] // (2 if kind == "qwen" else 1),
        tied=bool(settings.get("tie_word_embeddings", False)),
        qkv_bias=kind in ("qwen", "qwen2") or bool(settings.get("attention_bias", False)),
        qk_norm=kind == "qwen3",
    )


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


def estimate_memory(
    settings: Mapping[str, Any],
    sft: SftConfig,
    *,
    lora_targets: Sequence[str],
    dtype: Dtype,
    max_length: int,
    per_device_batch_size: int,
    checkpointing: bool,
    eager: bool = False,
    logit_positions: int = 1024,
    mask_bytes: int = 1,
    ranks: int = 1,
    zero_stage: int = 0,
    fused: Layers | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one device for full-length batches; every number can be set by hand.

    Of n parameters, t of them trained: weights n b (of a full fine-tuning in bf16 or fp16 the copies that autocast
    makes of matrices), trained 4 t, gradients 4 t, optimiser 8 t. ZeRO divides by `ranks` the optimiser's state from
    stage 1, gradients from 2, weights from 3 (arXiv 1910.02054, figure 1).

    Args:
        settings: contents of config.json.
        lora_targets: the model's layers for LoRA where `sft.targets` is null.
        dtype: bf16, fp16 or fp32, not `auto`.
        eager: attention probabilities are kept, heads x length of them for each position.
        logit_positions: labelled positions whose logits exist at once; the loss works in chunks.
        mask_bytes: bytes of a dropout mask's element: 1 on CUDA, 4 on the CPU.
        zero_stage: 0 to 3; FSDP is stage 3.
        fused: which of the leaner layers compute on a frozen model; None: the layers as they come.

    Raises:
        ModelError: the architecture or the method is not one of those that are counted.
    """
    shape = model_shape(settings)
    b = 4 if dtype is Dtype.fp32 else 2
    tokens = max_length * per_device_batch_size
    layers = shape.layers
    final_norm = 8 * shape.hidden
    # Logits, their fp32 copy, log-softmax, and the gradients of the first two.
    logits = min(tokens, logit_positions) * shape.vocab * (2 * b + 12)
    if fused is not None and fused.compiled:
        logits = min(tokens, COMPILED_LOSS_CHUNK) * shape.vocab * b
    match sft:
        case LoraConfig():
            targets = adapted_layers(shape, sft, lora_targets)
            trained = shape.lora_parameters(sft.rank, targets)
            weights = frozen_bytes(shape, b, sft)
            if fused is not None and fuses_adapters(sft) and settings["model_type"] in _FUSED:
                layer = fused_layer_bytes(shape, b, max_length, sft, targets, fused, eager=eager)
                final_norm = b * shape.hidden + 4
            else:
                layer = lora_layer_bytes(shape, b, max_length, sft, targets, eager=eager, mask_bytes=mask_bytes)
            layer_input = b * shape.hidden
        case FullConfig():
            trained = shape.parameters
            weights = (layers * shape.block_matrices + shape.vocab * shape.hidden) * b if b < 4 else 0
            layer = full_layer_bytes(shape, b, max_length, eager=eager)
            layer_input = 4 * shape.hidden
        case FreezeConfig():
            trained = trained_parameters(shape, sft)
            weights = (shape.parameters - trained) * b + (trained * b if b < 4 else 0)
            layer = full_layer_bytes(shape, b, max_length, eager=eager)
            layer_input = 4 * shape.hidden
            # Below the first trained block nothing is kept, unless gradients have to reach the embeddings.
            layers = shape.layers if sft.embeddings else min(sft.layers, shape.layers)
        case _:
            raise ModelError(f"no memory estimate for sft_type={sft.name}")
    copies = 2 if isinstance(sft, LoraConfig) and sft.start is LoraStart.pissa else 1
    per_token = layers * layer_input + layer * min(layers, 1) if checkpointing else layers * layer
    return MemoryEstimate(
        weights=_shared(weights, ranks, zero_stage >= 3),
        trained=_shared(4 * trained * copies, ranks, zero_stage >= 3),
        gradients=_shared(4 * trained, ranks, zero_stage >= 2),
        optimizer=_shared(ADAM_BYTES * trained, ranks, zero_stage >= 1),
        activations=tokens * (per_token + final_norm),
        logits=logits,
    )


def adapted_layers(shape: ModelShape, sft: LoraConfig, lora_targets: Sequence[str]) -> list[str]:
    """Return the names of the matrices that adapters stand beside."""
    chosen = sft.targets or lora_targets
    return [name for name in shape.linear_layers if name in chosen or ALL_LINEAR in chosen]


def frozen_bytes(shape: ModelShape, b: int, sft: LoraConfig) -> int:
    """Bytes of the frozen weights: b each, or those of the blocks' matrices in 4 or 8 bits with their scales.

    A scale of 4 bytes for 64 weights (0.5 bits each), itself in 8 bits by blocks of 256 with double quantisation (0.127
    bits); in 8 bits one for each row.
    """
    if not isinstance(sft, QloraConfig):
        return shape.parameters * b
    matrices = shape.layers * shape.block_matrices
    scale = (8 / 64 + 32 / (64 * 256) if sft.double_quantization else 32 / 64) if sft.bits == 4 else 0.0
    return (shape.parameters - matrices) * b + round(matrices * (sft.bits + scale) / 8)


def trained_parameters(shape: ModelShape, sft: FreezeConfig) -> int:
    """Number of parameters that are trained when the rest is frozen; tied embeddings once."""
    embedding = shape.vocab * shape.hidden
    both = sft.embeddings + sft.head if not shape.tied else min(sft.embeddings + sft.head, 1)
    return min(sft.layers, shape.layers) * shape.block_parameters + both * embedding + sft.head * shape.hidden


def lora_layer_bytes(
    shape: ModelShape,
    b: int,
    length: int,
    sft: LoraConfig,
    targets: Sequence[str],
    *,
    eager: bool = False,
    mask_bytes: int = 1,
) -> int:
    """Bytes kept for each position in one block with frozen weights and adapters.

    Frozen matrices keep nothing; a norm keeps its input in fp32 (4 h each). An adapter computes in fp32: it keeps its
    dropped input (4 bytes an element), the mask, and A's output (4 x rank).
    """
    adapters = 0
    for name, (inputs, _) in shape.linear_layers.items():
        if name in targets:
            adapters += inputs * (4 + (mask_bytes if sft.dropout > 0 else 0)) + 4 * sft.rank
    norms = 2 * 4 * shape.hidden + 4 * (shape.query_width + shape.key_width) * shape.qk_norm
    return _block_bytes(shape, b, length, eager=eager) + norms + adapters


def full_layer_bytes(shape: ModelShape, b: int, length: int, *, eager: bool = False) -> int:
    """Bytes kept for each position in one block whose weights are all trained in fp32, computing in b bytes.

    A norm keeps its input and its normalised input in fp32 (8 h each); a matrix keeps its input: in fp32 one for q, k, v
    and one for gate and up (2 x 4 h), under autocast a copy for each of the five (5 b h); `down_proj` keeps b i.
    """
    norms = 2 * 8 * shape.hidden + 8 * (shape.query_width + shape.key_width) * shape.qk_norm
    inputs = 2 * 4 * shape.hidden if b == 4 else 5 * b * shape.hidden
    return _block_bytes(shape, b, length, eager=eager) + norms + inputs + b * shape.inner


def _block_bytes(shape: ModelShape, b: int, length: int, *, eager: bool) -> int:
    """What every block keeps: gate, its SiLU and up (3 b i); rotated q and k, v, attention's output (2 b q + 2 b k);
    log-sum-exp of attention (4 heads), or with eager attention its probabilities in fp32 and in b; two norms' scales."""
    attention = shape.heads * (length * (4 + b) if eager else 4)
    return 3 * b * shape.inner + 2 * b * (shape.query_width + shape.key_width) + attention + 8


class Fit(StrEnum):
    """How an estimate compares with a device."""

    fits = "fits"
    """With a tenth to spare; also where nobody tells how much there is."""
    tight = "tight"
    """Less than that is free."""
    impossible = "impossible"
    """Even an empty device is too small by far, by a quarter of its whole memory and more."""


def judge(estimate: MemoryEstimate, memory: DeviceMemory | None, device_name: str) -> tuple[Fit, str]:
    """Compare with the device, and say in one line what was found."""
    line = f"memory: {estimate}"
    if memory is None:
        return Fit.fits, line
    line += f"; free on {device_name}: {_gigabytes(memory.free)} of {_gigabytes(memory.total)} GB"
    if estimate.total * 1.1 <= memory.free:
        return Fit.fits, line
    if estimate.total <= memory.total * FAR:
        return Fit.tight, f"{line}; it will hardly fit: {WAYS_OUT}"
    return Fit.impossible, f"{line}; it cannot fit: {WAYS_OUT}"


def _shared(count: int, ranks: int, shared: bool) -> int:
    return -(-count // ranks) if shared else count


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"
