"""The plan of a training: every example once an epoch, every step reachable directly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from agentft.data.batches import Batch, StepPlan, collate, collate_packed, micro_batches
from agentft.data.config import SpanWeights
from agentft.data.render import TRAINED_KINDS, SpanKind
from agentft.data.tokens import IGNORE_INDEX, Example, weigh
from tests.examples import tokenize


def _plan(examples=10, per_step=4, epochs=3.0, max_steps=-1, seed=1) -> StepPlan:
    return StepPlan(examples=examples, examples_per_step=per_step, epochs=epochs, max_steps=max_steps, seed=seed)


@pytest.mark.parametrize("per_step", [1, 3, 4, 10, 7])
def test_every_example_is_seen_once_per_epoch(per_step):
    plan = _plan(per_step=per_step)
    stream = [index for step in range(plan.total_steps) for index in plan.step(step)]
    assert len(stream) == 30
    for epoch in range(3):
        assert sorted(stream[epoch * 10 : (epoch + 1) * 10]) == list(range(10))


def test_epochs_have_different_orders_and_seeds_too():
    plan = _plan(per_step=10)
    assert len({tuple(plan.step(k)) for k in range(3)}) == 3
    assert plan.step(0) != _plan(per_step=10, seed=2).step(0)


def test_a_step_does_not_depend_on_how_many_come_after():
    assert _plan(epochs=1.0).step(1) == _plan(epochs=9.0).step(1)


def test_max_steps_decides_when_given():
    assert _plan(max_steps=5).total_steps == 5
    assert all(len(_plan(max_steps=50).step(k)) == 4 for k in range(50))


def test_micro_batches_hold_each_index_once_and_pad_little():
    lengths = [5, 900, 7, 880, 6, 890, 8, 870]
    groups = micro_batches(range(8), lengths, 2)
    assert sorted(index for group in groups for index in group) == list(range(8))
    assert all(abs(lengths[a] - lengths[b]) <= 10 for a, b in groups)


def test_padding_stands_on_the_right_and_is_not_labelled(golden_conversations, template, encoder):
    examples = list(tokenize(golden_conversations.values(), template, encoder))
    batch = collate(examples, pad_id=3)
    for row, example in enumerate(examples):
        assert (batch.input_ids_BT[row, len(example) :] == 3).all()
        assert (batch.labels_BT[row, len(example) :] == IGNORE_INDEX).all()
        assert batch.input_ids_BT[row, : len(example)].tolist() == example.input_ids.tolist()


WEIGHTS = SpanWeights(text=1.0, call=2.0, call_syntax=1.5, stop=0.5)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "span weights"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_batchs_labels_are_its_examples_labels(packed, weights, golden_conversations, template, encoder):
    """Position by position, from the spans that rendering made: context stays context, and no label is lost."""
    examples = [
        example if weights is None else weigh(example, weights)
        for example in tokenize(golden_conversations.values(), template, encoder)
    ]
    batch = collate_packed(examples) if packed else collate(examples, pad_id=3)
    assert batch.ids == tuple(example.id for example in examples)
    assert (batch.weights_BT is None) == (weights is None)
    found = _packed_positions(batch) if packed else _padded_positions(batch)
    expected = [_positions(example, weights) for example in examples]
    for name, actual, wanted in zip(batch.ids, found, expected, strict=True):
        assert actual[: len(wanted)] == wanted, name
        assert all(label == IGNORE_INDEX and not weight for _, label, weight in actual[len(wanted) :]), name
    predicted = [weight for each in expected for _, label, weight in each if label != IGNORE_INDEX]
    assert batch.targets == len(predicted)
    assert batch.weight == sum(predicted)
    labels = batch.labels_BT.flatten()
    assert batch.predicting_N.tolist() == [at - 1 for at, label in enumerate(labels) if label != IGNORE_INDEX]


def _positions(example: Example, weights: SpanWeights | None) -> list[tuple[int, int, float]]:
    """(id, label, weight) of every position, from the example's spans alone. No golden example begins with a label."""
    by_kind = {kind: 1.0 if weights is None else getattr(weights, kind.name) for kind in TRAINED_KINDS}
    kinds: list[SpanKind | None] = [None] * len(example)
    for span in example.spans:
        kinds[span.start : span.stop] = [span.kind] * (span.stop - span.start)
    assert kinds[0] is None
    return [
        (int(token), IGNORE_INDEX, 0.0) if kind is None else (int(token), int(token), by_kind[kind])
        for token, kind in zip(example.input_ids, kinds, strict=True)
    ]


def _padded_positions(batch: Batch) -> list[list[tuple[int, int, float]]]:
    weights = (batch.labels_BT != IGNORE_INDEX).float() if batch.weights_BT is None else batch.weights_BT
    rows = zip(batch.input_ids_BT.tolist(), batch.labels_BT.tolist(), weights.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def _packed_positions(batch: Batch) -> list[list[tuple[int, int, float]]]:
    (row,) = _padded_positions(batch)
    starts = batch.boundaries.tolist()
    return [row[start:stop] for start, stop in pairwise(starts)]


def test_packing_takes_the_label_of_a_first_token_which_nothing_predicts(golden_conversations, template, encoder):
    """The same examples without their first context: what stands first in a row of its own is no target either."""
    examples = list(tokenize(golden_conversations.values(), template, encoder))[:3]
    cut = []
    for example in examples:
        start = example.spans[0].start
        spans = tuple(span._replace(start=span.start - start, stop=span.stop - start) for span in example.spans)
        cut.append(Example(example.id, example.input_ids[start:], spans))
    packed, padded = collate_packed(cut), collate(cut, pad_id=3)
    expected = np.concatenate([[IGNORE_INDEX, *example.labels[1:]] for example in cut])
    assert packed.labels_BT[0].tolist() == expected.tolist()
    assert packed.targets == padded.targets == (expected != IGNORE_INDEX).sum()
