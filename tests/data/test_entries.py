"""The exam stays the same whatever the sample."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from agentft.data.config import Split
from agentft.data.conversation import Conversation, Origin
from agentft.data.entries import divide
from agentft.data.records import read_record
from agentft.errors import DataError


def _conversations(count: int, *, tools: int = 12) -> list[Conversation]:
    found = []
    for number in range(count):
        call = f'<|startofthink|>{{"api_name": "tool_{number % tools}", "parameters": {{}}}}<|endofthink|>'
        record = {
            "id": f"c{number}",
            "conversations": [
                {"from": "user", "value": f"question {number // 2}"},
                {"from": "assistant", "value": call if number % 3 else f"answer {number}"},
            ],
        }
        outcome = read_record(record, Origin("test", number))
        assert isinstance(outcome, tuple)
        found.append(outcome[0])
    return found


def _ids(conversations) -> list[str]:
    return [c.id for c in conversations]


def test_the_held_out_part_does_not_depend_on_order_or_company():
    pool = _conversations(400)
    parts = divide(pool, split=Split.content, test_ratio=0.1, seed=1)
    shuffled = random.Random(3).sample(pool, len(pool))
    assert _ids(divide(shuffled, split=Split.content, test_ratio=0.1, seed=1).heldout) == _ids(parts.heldout)
    half = divide(pool[:200], split=Split.content, test_ratio=0.1, seed=1)
    assert set(_ids(half.heldout)) <= set(_ids(parts.heldout))


def test_samples_are_nested():
    train = _ids(divide(_conversations(400), split=Split.content, test_ratio=0.1, seed=1).train)
    assert len(train) == len(set(train))
    smaller_pool = _ids(divide(_conversations(300), split=Split.content, test_ratio=0.1, seed=1).train)
    assert [name for name in train if name in set(smaller_pool)] == smaller_pool


def test_the_order_of_samples_does_not_depend_on_the_test_ratio():
    pool = _conversations(400)
    wide = _ids(divide(pool, split=Split.content, test_ratio=0.3, seed=1).train)
    narrow = _ids(divide(pool, split=Split.content, test_ratio=0.1, seed=1).train)
    assert [name for name in narrow if name in set(wide)] == wide


def test_equal_questions_never_straddle_the_parts():
    parts = divide(_conversations(400), split=Split.content, test_ratio=0.2, seed=1)
    assert not {c.user_hash for c in parts.train} & {c.user_hash for c in parts.heldout}


def test_the_share_held_out_is_about_what_was_asked():
    parts = divide(_conversations(4000), split=Split.content, test_ratio=0.1, seed=1)
    assert 0.07 < len(parts.heldout) / 4000 < 0.13


def test_unseen_tools_are_called_in_one_part_only():
    parts = divide(_conversations(600), split=Split.unseen_tools, test_ratio=0.2, seed=1)
    called = [{call.name for c in part for call in c.tool_calls} for part in (parts.train, parts.heldout)]
    assert called[0]
    assert called[1]
    assert not called[0] & called[1]


def test_seeds_choose_different_exams():
    pool = _conversations(400)
    one, two = (divide(pool, split=Split.content, test_ratio=0.1, seed=seed) for seed in (1, 2))
    assert _ids(one.heldout) != _ids(two.heldout)


def test_an_empty_part_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match="held-out part is empty.*dataset.test_ratio"):
        divide(_conversations(4), split=Split.content, test_ratio=0.0001, seed=1)


@pytest.mark.parametrize(("conversations", "least"), [(4, 1), (10, 2), (30, 6), (100, 20), (800, 30)])
def test_a_small_dataset_still_has_an_exam(conversations: int, least: int):
    pool = _conversations(conversations)
    parts = divide(pool, split=Split.content, test_ratio=None, seed=1)
    typed = divide(pool, split=Split.content, test_ratio=0.02, seed=1) if conversations == 800 else None
    assert least <= len(parts.heldout) <= least + 1  # equal questions come in pairs
    assert not {c.user_hash for c in parts.train} & {c.user_hash for c in parts.heldout}
    if typed is not None:
        assert set(_ids(typed.heldout)) < set(_ids(parts.heldout)), "what is below the threshold stays held out"
        assert not typed.joined
        assert len(parts.heldout) - len(typed.heldout) == sum(c.user_hash in parts.joined for c in parts.heldout)


def test_what_joined_the_exam_may_be_trained_on_when_the_data_grows():
    """No other conversation changes sides, and none ever goes from training to the exam."""
    small, large = (
        divide(_conversations(count), split=Split.content, test_ratio=None, seed=1) for count in (200, 4000)
    )
    moved = set(_ids(small.heldout)) & set(_ids(large.train))
    assert moved
    assert {c.user_hash for c in small.heldout if c.id in moved} <= small.joined
    assert not set(_ids(small.train)) & set(_ids(large.heldout))
    assert not large.joined
    assert _ids(large.heldout) == _ids(
        divide(_conversations(4000), split=Split.content, test_ratio=0.02, seed=1).heldout
    )


def test_a_user_side_that_most_have_is_trained_on():
    pool = [*_conversations(40), *[replace(each, id=f"{each.id}b") for each in _conversations(2) * 40]]
    parts = divide(pool, split=Split.content, test_ratio=None, seed=1)
    assert len(parts.heldout) <= len(pool) / 2


def test_a_ratio_of_0_holds_nothing_out():
    pool = _conversations(40)
    parts = divide(pool, split=Split.content, test_ratio=0, seed=1)
    assert (len(parts.train), parts.heldout) == (40, [])


def test_unseen_tools_of_few_conversations_are_held_out_too():
    parts = divide(_conversations(60), split=Split.unseen_tools, test_ratio=None, seed=1)
    assert sum(bool(c.called_tools) for c in parts.heldout) >= 8
