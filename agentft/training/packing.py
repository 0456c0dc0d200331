"""Whether conversations are packed into rows, and how long a row is."""

from __future__ import annotations

import logging

from agentft.errors import ConfigError
from agentft.training.config import TrainingConfig

log = logging.getLogger(__name__)


def choose_row_tokens(config: TrainingConfig, max_length: int, leak: str | None, *, cuda: bool) -> int | None:
    """Return the tokens of a packed row, or None for padded micro-batches, and say what `auto` took.

    On a CPU, time goes with the tokens that are not padding, whatever row they are in; a longer row only costs cache.

    Args:
        leak: What packed conversations do to each other in this model, in words; None: nothing.

    Raises:
        ConfigError: packing was asked for, and packed conversations would not be computed as if each were alone.
    """
    match config.packing:
        case "true" if leak is not None:
            raise ConfigError(f"training.packing=true: {leak}; training.packing=false pads instead")
        case "true":
            packed = True
        case "false":
            packed = False
        case _:
            packed = cuda and leak is None
            log.info("training.packing=auto: %s", "packed rows" if packed else "one conversation a row")
    return max_length * config.per_device_batch_size if packed else None
