"""Examples -> steps of micro-batches: a plan that depends on the seed and the step number alone.

Because step k can be asked for directly, resuming needs no replay: the step number is the data position.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from agentft.data.tokens import IGNORE_INDEX, Example

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded examples. B rows, T positions.

    There is no attention mask: padding stands on the right, where causal attention never looks, and without a mask
    attention takes its fast causal path.
    """

    ids: tuple[str, ...]
    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    tokens: int
    """Positions that hold a token, padding left out."""
    targets: int
    """Labelled positions that some earlier position predicts."""
    weights_BT: torch.Tensor | None = None
    """What each position counts in the loss as a label, fp32; None where all count 1."""
    weight: float = field(kw_only=True)
    """Sum of the weights of the targets: the share of the batch in its step's loss. Equals `targets` without weights."""

    def to(self, device: torch.device) -> Batch:
        """Move the tensors, without waiting for the copy."""
        weights = self.weights_BT
        return Batch(
            ids=self.ids,
            input_ids_BT=self.input_ids_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            tokens=self.tokens,
            targets=self.targets,
            weights_BT=None if weights is None else weights.to(device, non_blocking=True),
            weight=self.weight,
        )


@dataclass(frozen=True)
class StepPlan:
    """Which examples each step trains on.

    Epochs are seeded permutations laid end to end; a step takes the next `examples_per_step` of that stream, so every
    example is seen once per epoch and none is dropped at an epoch's end.
    """

    examples: int
    examples_per_step: int
    epochs: float
    max_steps: int
    seed: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        by_epochs = math.ceil(self._stream_length / self.examples_per_step)
        return by_epochs if self.max_steps < 0 else self.max_steps

    @property
    def _stream_length(self) -> int:
        return max(round(self.examples * self.epochs), 1)

    def step(self, number: int) -> list[int]:
        """Return the indices of step `number`, counted from 0; the last step of the last epoch may be short."""
        start = number * self.examples_per_step
        stop = start + self.examples_per_step
        if self.max_steps < 0:
            stop = min(stop, self._stream_length)
        return [self._permutation(at // self.examples)[at % self.examples] for at in range(start, stop)]

    def epoch(self, number: int) -> float:
        """Passes completed after `number` steps."""
        done = number * self.examples_per_step
        return (done if self.max_steps >= 0 else min(done, self._stream_length)) / self.examples

    def _permutation(self, epoch: int) -> list[int]:
        return _permutation(self.examples, self.seed, epoch)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order


def micro_batches(indices: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut one step into micro-batches of similar length, longest first.

    The step's loss is one sum over its tokens, so which examples share a forward pass changes padding, not the update.
    """
    by_length = sorted(indices, key=lambda index: -lengths[index])
    return [by_length[at : at + size] for at in range(0, len(by_length), size)]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples on the right to the longest of them."""
    import torch

    width = max(len(example) for example in examples)
    ids = np.full((len(examples), width), pad_id, dtype=np.int64)
    labels = np.full((len(examples), width), IGNORE_INDEX, dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = example.input_ids
        labels[row, : len(example)] = example.labels
    targets = int((labels[:, 1:] != IGNORE_INDEX).sum())
    weights = None
    if any(example.span_weights is not None for example in examples):
        weights = np.zeros((len(examples), width), dtype=np.float32)
        for row, example in enumerate(examples):
            weights[row, : len(example)] = example.loss_weights
    return Batch(
        ids=tuple(example.id for example in examples),
        input_ids_BT=torch.from_numpy(ids),
        labels_BT=torch.from_numpy(labels),
        tokens=sum(len(example) for example in examples),
        targets=targets,
        weights_BT=None if weights is None else torch.from_numpy(weights),
        weight=targets if weights is None else float(weights[:, 1:].sum(dtype=np.float64)),
    )


def empty_batch(pad_id: int) -> Batch:
    """Return a batch without a label, for a rank that has no micro-batch left while the others have: its loss is 0."""
    import torch

    return Batch(
        ids=(),
        input_ids_BT=torch.full((1, 2), pad_id),
        labels_BT=torch.full((1, 2), IGNORE_INDEX),
        tokens=0,
        targets=0,
        weight=0,
    )
