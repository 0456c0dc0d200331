"""A loss or gradient that is not finite never reaches the optimiser: the training stops, or the step is left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import nn

from agentft.data.batches import Batch
from agentft.errors import TrainingError
from agentft.training.config import NonFinite, TrainingConfig
from agentft.training.engine import Engine

log = logging.getLogger(__name__)


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
