"""Random streams: masks that follow from what they are for, and the streams themselves as tensors and JSON for a resume.

Dropout needs no stream to be resumed. They are kept for whatever else a model's own code draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def capture() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the states of torch (CPU and every CUDA device) as tensors, of Python and NumPy as JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    plain = {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    return tensors, plain


def restore(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    """Put captured states back; those of GPUs that are not here now, which computed nothing, are left out."""
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := tensors.get(f"cuda.{index}")) is not None:
            torch.cuda.set_rng_state(state, index)
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))


def seed_masks(seed: int, step: int, ids: Sequence[str]) -> None:
    """Let the dropout masks of one micro-batch follow from the step and its conversations, whatever rank it is on."""
    digest = hashlib.sha256(repr((seed, step, *ids)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def torch_streams() -> list[torch.Tensor]:
    """Return the states that dropout draws from: torch's on the CPU and on every CUDA device."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_torch_streams(states: list[torch.Tensor]) -> None:
    """Put back what `torch_streams` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
