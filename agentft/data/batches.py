"""Examples -> steps of micro-batches: a plan that depends on the seed and the step number alone.

The step number is the data position, so resuming needs no replay. A micro-batch is padded (one example a row) or packed (its
examples end to end in one row, each seeing itself alone); neither changes a step's examples or its loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from agentft.data.tokens import IGNORE_INDEX, Example

if TYPE_CHECKING:
    import torch


Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded examples, or packed ones in a single row. B rows, T positions.

    No attention mask is needed: causal attention never looks right, and `boundaries` tell packed examples apart.
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
    position_ids_BT: torch.Tensor | None = None
    """Of a packed row: positions that start again with each example."""
    boundaries: torch.Tensor | None = None
    """Of a packed row of E examples: where each starts, and the row's end; int32, shape [E + 1]."""
    longest: int = 0
    """Of a packed row: tokens of its longest example."""
    predicting_N: torch.Tensor | None = None
    """Positions of the flattened batch that a label follows: known here, so that a GPU need not be asked for them."""

    @property
    def positions(self) -> int:
        """Positions that are computed, padding included."""
        return self.input_ids_BT.numel()

    def to(self, device: torch.device) -> Batch:
        """Move the tensors, on CUDA from pinned memory and without waiting for the copy."""
        import torch

        def move(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
            return pinned.to(device, non_blocking=True)

        return Batch(**{kind.name: move(getattr(self, kind.name)) for kind in fields(self)})


@dataclass(frozen=True)
class StepPlan:
    """Which examples each step trains on.

    Epochs are seeded permutations laid end to end; a step takes the next `examples_per_step` of that stream.
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
        epochs = (divmod(at, self.examples) for at in range(start, stop))
        return [_permutation(self.examples, self.seed, epoch)[place] for epoch, place in epochs]

    def epoch(self, number: int) -> float:
        """Passes completed after `number` steps."""
        done = number * self.examples_per_step
        return (done if self.max_steps >= 0 else min(done, self._stream_length)) / self.examples


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"order-{seed}-{epoch}").shuffle(order)
    return order


def micro_batches(indices: Sequence[int], lengths: Mapping[int, int] | Sequence[int], size: int) -> list[list[int]]:
    """Cut one step into micro-batches of similar length, longest first.

    The step's loss is one sum over its tokens, so which examples share a forward pass changes padding, not the update.
    """
    by_length = sorted(indices, key=lambda index: -lengths[index])
    return [by_length[at : at + size] for at in range(0, len(by_length), size)]


def pack_rows(indices: Sequence[int], lengths: Mapping[int, int] | Sequence[int], row_tokens: int) -> list[list[int]]:
    """Divide one step over rows of at most `row_tokens` tokens: longest first, each into the fullest row with room.

    Best fit decreasing (Johnson, 1974, SIAM J. Comput. 3(4)): at most 11/9 of the fewest rows possible, plus four. An
    example longer than a row has one to itself.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda index: -lengths[index]):
        fits = [row for row, left in enumerate(room) if left >= lengths[index]]
        if not fits:
            fits = [len(rows)]
            rows.append([])
            room.append(row_tokens)
        row = min(fits, key=lambda row: room[row])
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def step_groups(
    indices: Sequence[int], lengths: Mapping[int, int], *, per_device_batch_size: int, row_tokens: int | None
) -> list[list[int]]:
    """Return which examples of one step share a forward pass: packed into rows of `row_tokens`, or padded where None."""
    if row_tokens is None:
        return micro_batches(indices, lengths, per_device_batch_size)
    return pack_rows(indices, lengths, row_tokens)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples on the right to the longest of them."""
    shape = len(examples), max(len(example) for example in examples)
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = example.input_ids
        labels[row, : len(example)] = example.labels
        weights[row, : len(example)] = example.loss_weights
    return _batch(examples, ids, labels, weights)


def collate_packed(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end in one row, without padding; nothing predicts the first token of an example."""
    import torch

    starts = np.cumsum([0] + [len(example) for example in examples], dtype=np.int32)
    ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    labels = np.concatenate([example.labels for example in examples]).astype(np.int64)
    weights = np.concatenate([example.loss_weights for example in examples])
    labels[starts[:-1]], weights[starts[:-1]] = IGNORE_INDEX, 0.0
    positions = np.concatenate([np.arange(len(example), dtype=np.int64) for example in examples])
    return replace(
        _batch(examples, ids[None], labels[None], weights[None]),
        position_ids_BT=torch.from_numpy(positions)[None],
        boundaries=torch.from_numpy(starts),
        longest=max(len(example) for example in examples),
    )


def _batch(examples: Sequence[Example], ids: Ids, labels: Ids, weights: npt.NDArray[np.float32]) -> Batch:
    """Return the batch of arrays of shape [B, T]; without `weights` where no example has its own."""
    import torch

    weighed = any(example.span_weights is not None for example in examples)
    is_target = labels[:, 1:] != IGNORE_INDEX
    targets = int(is_target.sum())
    return Batch(
        ids=tuple(example.id for example in examples),
        input_ids_BT=torch.from_numpy(ids),
        labels_BT=torch.from_numpy(labels),
        tokens=sum(len(example) for example in examples),
        targets=targets,
        weights_BT=torch.from_numpy(weights) if weighed else None,
        weight=float(weights[:, 1:].sum(dtype=np.float64)) if weighed else targets,
        predicting_N=torch.from_numpy(np.flatnonzero(np.pad(is_target, ((0, 0), (0, 1))))),
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
