"""The loss on held-out conversations: the same mask, no generation, cheap enough for every evaluation in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentft.data.batches import collate
from agentft.data.tokens import Example
from agentft.errors import DataError
from agentft.training.loss import LabelledLoss


def held_out_loss(
    objective: LabelledLoss, examples: Sequence[Example], *, batch: int, pad_id: int, device: torch.device
) -> float:
    """Mean cross-entropy per labelled token (nats) over `examples`, without dropout; random streams are not touched.

    Raises:
        DataError: the examples hold no label.
    """
    was_training = objective.training
    objective.eval()
    by_length = sorted(examples, key=len, reverse=True)
    total, targets = 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(by_length), batch):
            piece = collate(by_length[at : at + batch], pad_id)
            total += float(objective(piece.to(device)))
            targets += piece.targets
    objective.train(was_training)
    if not targets:
        raise DataError("the held-out conversations have no labelled token")
    return total / targets
