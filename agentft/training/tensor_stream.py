"""Tensors made one at a time and written as they come, so that gathering a sharded model never holds it whole.

A safetensors file is a JSON header of names, dtypes, shapes and offsets, then the bytes; all of the header is known before
the first tensor is made (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a tensor will be, before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorStream:
    """Named tensors that exist one at a time.

    Making one may be collective: then every rank goes through the stream, and only rank 0 gets tensors.
    """

    kinds: Mapping[str, Kind]
    make: Callable[[str], torch.Tensor | None]
    """Name -> tensor on any device; None on a rank that only takes part."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield rank 0's tensors, on the CPU."""
        for name in self.kinds:
            tensor = self.make(name)
            if tensor is not None:
                yield name, tensor.detach().cpu()

    def take_part(self) -> None:
        """Make every tensor and keep none: what ranks other than 0 do while rank 0 writes."""
        for _ in self:
            pass


def stream_of(tensors: Mapping[str, torch.Tensor]) -> TensorStream:
    """Return tensors that are there already as a stream."""
    return TensorStream({name: Kind(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.__getitem__)


def write_stream(stream: TensorStream, path: Path) -> None:
    """Write a stream as one safetensors file, holding one tensor at a time."""
    # Wide numbers first, so that every tensor is aligned.
    names = sorted(stream.kinds, key=lambda name: -stream.kinds[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        kind = stream.kinds[name]
        header[name] = {"dtype": _CODES[kind.dtype], "shape": list(kind.shape), "data_offsets": [at, at + kind.bytes]}
        at += kind.bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        ordered = TensorStream({name: stream.kinds[name] for name in names}, stream.make)
        for name, tensor in ordered:
            if tuple(tensor.shape) != stream.kinds[name].shape or tensor.dtype != stream.kinds[name].dtype:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, announced as {stream.kinds[name]}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
