"""A step that does not fit into memory is made again in smaller micro-batches; its conversations stay the same."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from agentft.errors import TrainingError
from agentft.training import random_state

log = logging.getLogger(__name__)

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
                f"step {step}: out of memory with training.micro_batch={size} ({words}); between several processes it is "
                f"not halved by itself. training.micro_batch={size // 2} with twice the training.accumulation trains the "
                "same, from a new run folder"
            )
        log.warning(
            "step %d: out of memory with training.micro_batch=%d (%s); %d from here on, with the same conversations in a "
            "step",
            *(step, size, words, size // 2),
        )
        size //= 2
