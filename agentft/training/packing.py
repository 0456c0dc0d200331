"""Whether conversations are packed into rows, and how long a row is."""

from __future__ import annotations

import logging

from torch import nn

from agentft.errors import ConfigError
from agentft.training.config import TrainingConfig
from agentft.training.loss import causal_model

log = logging.getLogger(__name__)


def choose_row_tokens(config: TrainingConfig, max_length: int, model: nn.Module, *, cuda: bool) -> int | None:
    """Return the tokens of a packed row, or None for padded micro-batches, and say what `auto` took.

    On a CPU, time goes with the tokens that are not padding, whatever row they are in; a longer row only costs cache.

    Raises:
        ConfigError: packing was asked for, and the model's own code decides what a position sees.
    """
    separable = bool(getattr(causal_model(model), "_supports_attention_backend", False))
    match config.packing:
        case "true" if not separable:
            raise ConfigError(
                "training.packing=true: this model has its own attention code, which may let packed conversations see "
                "each other; training.packing=false pads instead"
            )
        case "true":
            packed = True
        case "false":
            packed = False
        case _:
            packed = cuda and separable
            log.info("training.packing=auto: %s", "packed rows" if packed else "one conversation a row")
    return max_length * config.micro_batch if packed else None
