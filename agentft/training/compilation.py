"""torch.compile over each block of a decoder: one compilation serves all blocks, since they are alike."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from agentft.model.causal import causal_model

log = logging.getLogger(__name__)


def compile_blocks(model: nn.Module) -> int:
    """Compile every block of the decoder for rows of any length, at its first use; return how many there are.

    The mathematics is that of the plain blocks; sums may be taken in another order. Layers get the forward pass back that
    they came with: the compiler fuses that itself, and cannot see into steps of autograd written by hand.
    """
    decoder: Any = causal_model(model).get_decoder()
    for module in decoder.modules():
        vars(module).pop("forward", None)
    for block in decoder.layers:
        block.compile(dynamic=True)
    log.info("training.compile=true: %d blocks are compiled at their first use", len(decoder.layers))
    return len(decoder.layers)
