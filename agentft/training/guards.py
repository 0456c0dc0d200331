"""Guard a training: no number that is not finite reaches the optimiser, and a step too large for memory is cut smaller."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from agentft.data.batches import Batch
from agentft.errors import TrainingError
from agentft.training import random_state
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


T = TypeVar("T")

_CPU_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch says it on a CPU in a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_WORDS)


def accumulate_within_memory(
    attempt: Callable[[int], T], size: int, forget: Callable[[], None], *, step: int, alone: bool = True
) -> tuple[int, T]:
    """Run `attempt` on one step's micro-batches of `size`, or of half of it, and so on: (the size that fits, its result).

    `attempt` makes gradients and changes nothing else; `forget` drops those of a failed one. The random streams go back
    to the start of the step, so the result is that of a run that had the smaller size all along.

    Raises:
        TrainingError: one conversation at a time is too much, or other ranks wait in the middle of the step.
    """
    while True:
        streams = random_state.torch_streams()
        try:
            return size, attempt(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            words = " ".join(str(error).split())[:200] or type(error).__name__
        # After the except clause: the traceback holds the tensors of the attempt.
        forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        random_state.set_torch_streams(streams)
        if size == 1:
            raise TrainingError(
                f"step {step}: out of memory with one conversation, or one packed row, at a time ({words}). "
                "training.gradient_checkpointing=true, training.packing=false or a smaller dataset.max_length needs less"
            )
        if not alone:
            raise TrainingError(
                f"step {step}: out of memory with training.per_device_batch_size={size} ({words}); between several "
                f"processes it is not halved by itself. training.per_device_batch_size={size // 2} with twice the "
                "training.gradient_accumulation_steps trains the same, from a new run folder"
            )
        log.warning(
            "step %d: out of memory with training.per_device_batch_size=%d (%s); %d from here on, with the same "
            "conversations in a step",
            *(step, size, words, size // 2),
        )
        size //= 2


class NumberGuard:
    """Looks at the numbers of each step before the optimiser does."""

    def __init__(self, engine: Engine, config: TrainingConfig, *, fp16: bool) -> None:
        self._engine = engine
        self._config = config
        self._fp16 = fp16

    def refuses(
        self,
        step: int,
        batches: Sequence[Batch],
        losses_M: torch.Tensor,
        *,
        weight: float,
        loss: float,
        grad_norm: float,
    ) -> bool:
        """Return whether step `step`, counted from 1, must not change the weights; every rank decides the same.

        `losses_M` are the summed losses of this rank's M micro-batches; `loss` is their sum and `weight` the step's weight,
        over all ranks; `grad_norm` is the norm before clipping. Under fp16 a gradient that overflows is the business of
        the gradient scaler, which leaves the step out and lowers its scale.

        Raises:
            TrainingError: `training.nonfinite=stop`, or the weights themselves are not finite.
        """
        world = self._engine.world
        if weight > 0 and math.isfinite(loss) and (math.isfinite(grad_norm) or self._fp16):
            return False
        reason = _joined("; ", world.gather([_reason(batches, losses_M, grad_norm)]))
        if damaged := _joined(", ", world.gather(_damaged_parameters(self._engine.model))):
            raise TrainingError(
                f"step {step}: {reason}. The weights are not finite before the update: {damaged}; no later step can be "
                "better. Look at the model's files, or go on from an earlier checkpoint"
            )
        if self._config.nonfinite is NonFinite.stop:
            raise TrainingError(
                f"step {step}: {reason}. Not finite, so the weights were not changed. A lower training.learning_rate or "
                "model.dtype=fp32 may help; training.nonfinite=skip leaves such steps out"
            )
        log.warning("step %d left out, the weights were not changed: %s", step, reason)
        return True

    def require_end(self, in_a_row: int) -> None:
        """Raise TrainingError where more steps in a row were left out than `training.nonfinite_limit` allows."""
        if in_a_row > self._config.nonfinite_limit:
            raise TrainingError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite, more than "
                f"training.nonfinite_limit={self._config.nonfinite_limit} allows: this is the training and not its data; "
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
