"""The plan of a training: every example once an epoch, every step reachable directly."""

from __future__ import annotations

import pytest

from agentft.data.batches import StepPlan, collate, micro_batches
from agentft.data.tokens import IGNORE_INDEX, tokenize


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
