"""What is on the disk is what was written: conversations and examples, equal in every field."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from agentft.data.config import SpanWeights
from agentft.data.conversation import Conversation, Origin
from agentft.data.prepared import (
    ExampleWriter,
    RecordWriter,
    StoredConversations,
    StoredExamples,
    from_line,
    pack,
    to_line,
)
from agentft.data.sources import read_conversations, read_local
from agentft.data.tokens import weigh
from tests.examples import tokenize

WEIGHTS = SpanWeights(text=1.0, call=2.0, stop=0.5)


def test_a_conversation_comes_back_equal(golden_conversations):
    for conversation in golden_conversations.values():
        assert from_line(to_line(conversation)) == conversation
        other = dataclasses.replace(conversation, weight=2.5, piece_of="whole", origin=Origin("a\u2028b", 7))
        assert from_line(to_line(other)) == other


def test_every_conversation_that_is_kept_of_the_malformed_set_comes_back_equal(shared_data):
    """Quirks, failed calls and marks inside strings included."""
    items = read_conversations(read_local([shared_data / "malformed.jsonl", shared_data / "dev.jsonl"]))
    kept = [item for item in items if isinstance(item, Conversation)]
    assert any(message.malformed_calls for c in kept for message in c.messages)
    for conversation in kept:
        assert from_line(to_line(conversation)) == conversation


def test_conversations_are_read_by_number_and_slice_in_a_chosen_order(tmp_path, golden_conversations):
    conversations = list(golden_conversations.values())
    writer = RecordWriter(tmp_path / "lines")
    for conversation in conversations:
        writer.append(to_line(conversation))
    writer.close()
    stored = StoredConversations(tmp_path / "lines")
    assert list(stored) == conversations
    chosen = StoredConversations(tmp_path / "lines", np.array([2, 0, 2]))
    assert list(chosen) == [conversations[2], conversations[0], conversations[2]]
    assert list(chosen[:2]) == [conversations[2], conversations[0]]
    assert chosen[-1] == conversations[2]
    with pytest.raises(IndexError):
        chosen[3]


@pytest.mark.parametrize("largest_id", [257, 2**16])
def test_an_example_comes_back_equal_whatever_the_width_of_its_ids(
    tmp_path, golden_conversations, template, encoder, largest_id
):
    examples = list(tokenize(golden_conversations.values(), template, encoder))
    writer = ExampleWriter(tmp_path / "part")
    for example, conversation in zip(examples, golden_conversations.values(), strict=True):
        writer.append(pack(example, largest_id, conversation))
    order = [*reversed(range(len(examples))), 0]
    writer.close(order)
    stored = StoredExamples(tmp_path / "part")
    assert list(stored.conversations()) == [list(golden_conversations.values())[row] for row in order]
    for row, example in zip(order, stored, strict=True):
        assert_equal(example, examples[row])
    chosen = stored.chosen(np.array([3, 1, 3])).weighed(WEIGHTS)
    assert_equal(chosen[0], weigh(examples[3], WEIGHTS))
    assert [example.id for example in chosen[1:]] == chosen.ids[1:] == [examples[1].id, examples[3].id]
    assert chosen.lengths.tolist() == [len(examples[k]) for k in (3, 1, 3)]
    assert chosen.trained_tokens == sum(examples[k].trained_tokens for k in (3, 1, 3))
    assert chosen.steps == sum(len(examples[k].steps()) for k in (3, 1, 3))


def assert_equal(one, other):
    assert (one.id, one.spans, one.context_rounds, one.span_weights) == (
        *(other.id, other.spans, other.context_rounds, other.span_weights),
    )
    assert one.input_ids.dtype == other.input_ids.dtype
    assert np.array_equal(one.input_ids, other.input_ids)
    assert np.array_equal(one.labels, other.labels)
