"""Say what is wrong with a step that is not finite, and end the training or continue; record what held a GPU's memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agentft.data.batches import Batch
from agentft.errors import TrainingError
from agentft.training.config import NonFinite, TrainingConfig
from agentft.training.engine import Engine

log = logging.getLogger(__name__)

NAME = "out_of_memory-gpu{device}.pickle"
"""A file a device: ranks of one run share its folder."""


def snapshot_on_out_of_memory(folder: Path) -> None:
    """Record allocations from here on, and write them to `folder` at the moment when CUDA's memory runs out."""

    memory: Any = torch.cuda.memory

    def write(device: int, asked: int, total: int, free: int) -> None:
        path = folder / NAME.format(device=device)
        try:
            memory._dump_snapshot(str(path))
        except OSError as error:  # the allocator called this: its own error is the one to be heard
            log.warning("GPU %d is out of memory, and %s could not be written: %s", device, path, error)
            return
        log.warning(
            "GPU %d is out of memory: %.2f GB were asked for, %.2f of %.2f GB are free; %s shows what holds the rest at "
            "https://pytorch.org/memory_viz",
            *(device, asked / 1e9, free / 1e9, total / 1e9, path),
        )

    # PyTorch documents these names for users as they are.
    memory._record_memory_history(max_entries=100_000, stacks="python")
    # Present in CUDA builds alone.
    attach: Any = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is not None:
        attach(write)


def report_nonfinite(
    engine: Engine,
    config: TrainingConfig,
    batches: Sequence[Batch],
    losses_M: torch.Tensor,
    grad_norm: float,
    *,
    step: int,
    in_a_row: int,
) -> None:
    """Say why step `step`, counted from 1, does not change the weights: the same on every rank.

    Args:
        losses_M: Summed losses of this rank's `batches`.
        in_a_row: Steps left out one after the other, this one among them.

    Raises:
        TrainingError: `training.nonfinite=stop`, too many steps in a row, or the weights themselves are not finite.
    """
    world = engine.world
    reason = _joined("; ", world.gather([_reason(batches, losses_M, grad_norm)]))
    if damaged := _joined(", ", world.gather(_damaged_parameters(engine.model))):
        raise TrainingError(
            f"step {step}: {reason}. The weights are not finite before the update: {damaged}; no later step can be "
            "better. Look at the model's files, or resume from an earlier checkpoint"
        )
    if config.nonfinite is NonFinite.stop:
        raise TrainingError(
            f"step {step}: {reason}. Not finite, so the weights were not changed. A lower training.learning_rate or "
            "model.dtype=fp32 may help; training.nonfinite=skip leaves such steps out"
        )
    log.warning("step %d left out, the weights were not changed: %s", step, reason)
    if in_a_row > config.nonfinite_limit:
        raise TrainingError(
            f"{in_a_row} steps in a row had a loss or gradient that is not finite, more than "
            f"training.nonfinite_limit={config.nonfinite_limit} allows: this is the training and not its data; "
            "a lower training.learning_rate or model.dtype=fp32 may help"
        )


def _reason(batches: Sequence[Batch], losses_M: torch.Tensor, grad_norm: float) -> str:
    """Say what is wrong in this rank's share of a step; empty where nothing is."""
    if sum(batch.weight for batch in batches) <= 0:
        return f"no token of it is labelled, conversations {_ids(batches)}"
    losses = losses_M.tolist()
    bad = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
    if bad:
        shown = sorted({str(loss) for loss in losses if not math.isfinite(loss)})
        return f"loss {' and '.join(shown)} in the micro-batches of conversations {_ids(bad)}"
    if not math.isfinite(grad_norm):
        return f"gradient norm {grad_norm}, conversations {_ids(batches)}"
    return ""


def _joined(between: str, of_ranks: Sequence[Sequence[str]]) -> str:
    return between.join(sorted({words for words_of_rank in of_ranks for words in words_of_rank if words}))


def _ids(batches: Sequence[Batch]) -> str:
    return ", ".join(name for batch in batches for name in batch.ids)


def _damaged_parameters(model: nn.Module) -> list[str]:
    """Name up to three parameters that hold a NaN or an infinity, of this rank's shards where they are sharded."""
    found: list[str] = []
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if len(found) < 3 and not bool(torch.isfinite(local).all()):
            found.append(name)
    return found
