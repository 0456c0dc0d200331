"""What a block of `fused.py` keeps for its backward pass, in bytes for each position: the counterpart of `lora_layer_bytes`.

Sizes as in `memory.py`. Counted from what the steps of autograd there and in `compiled.py` save.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from agentft.model.config import LoraConfig, LoraStart, QloraConfig

TILE = 128
KEEP_UP_TO = 1024
"""As in `attention.py`, which cannot be read here without torch; a test holds them equal."""

COMPILED_LOSS_CHUNK = 256
"""Positions whose logits exist at once behind a frozen head in compiled code; in `training/loss.py`."""


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
