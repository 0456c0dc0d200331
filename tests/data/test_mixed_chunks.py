"""Tokens of a call are told apart alike by counting bytes and by the tokenizer's own offsets."""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentft.data.render import MsagentTemplate, Rendering, Segment, SpanKind
from agentft.data.sources import read_conversations, read_local
from agentft.data.tokens import SegmentEncoder, Span, _Job, _Text, vocabulary_bytes


@cache
def tokenizer():
    """One that merges across the borders of a call's parts, and within characters too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ['": "get', 'tide", ', ': {"', ' 2]}}"', '": {},', '"查', "天气", "港口", "你", "好", '"}}', "🙂"] * 3
    trainer = trainers.BpeTrainer(vocab_size=330, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<|im_end|>"])


def spans_by_both(rendering: Rendering) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    encoder = SegmentEncoder(tokenizer())
    text = _Text(rendering)
    job, units = _Job(0, text), encoder._chunks(text)
    counted = encoder._by_bytes(job, [encoder._ids(unit.letters, [unit.text])[0] for unit in units])
    asked = encoder._by_offsets(job, units)
    assert counted is not None
    assert counted.ids.tolist() == asked.ids.tolist()
    return text.spans(counted), text.spans(asked)


PART = st.text(st.sampled_from('ab"{}:, \n查天气你好🙂é'), max_size=10)
CHUNKS = st.lists(st.tuples(st.sampled_from([SpanKind.call_syntax, SpanKind.call]), PART), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(CHUNKS)
def test_bytes_and_offsets_tell_the_same(parts):
    counted, asked = spans_by_both(Rendering(tuple(Segment(text, kind) for kind, text in parts), by_chunks=True))
    assert counted == asked


def test_bytes_and_offsets_tell_the_same_of_real_calls(shared_data):
    template = MsagentTemplate("<|im_end|>")
    calls = 0
    for conversation in islice(read_conversations(read_local(shared_data / "dev.jsonl")), 100):
        counted, asked = spans_by_both(Rendering(tuple(template.render(conversation)), by_chunks=True))
        assert counted == asked
        calls += sum(span.kind is SpanKind.call for span in counted)
    assert calls > 200


@pytest.mark.parametrize(
    ("written", "encoded", "counted"),
    [("caf\u00e9", "caf\u00e9", True), ("cafe\u0301", "cafe\u0301", False), ("abc", "ab", False)],
    ids=["composed", "a letter and its accent apart, which a tokenizer may compose", "a byte is missing"],
)
def test_bytes_are_not_counted_where_the_tokenizer_may_write_another_text(written: str, encoded: str, counted: bool):
    encoder = SegmentEncoder(tokenizer())
    text = _Text(Rendering((Segment(written, SpanKind.user),), by_chunks=True))
    found = encoder._by_bytes(_Job(0, text), encoder._ids("marks", [encoded]))
    assert (found is not None) is counted


@pytest.mark.parametrize("with_added", [False, True])
def test_the_length_of_a_token_is_that_of_its_bytes(with_added: bool):
    made = tokenizer()
    if with_added:
        made.add_tokens(["<工具>"])
    assert SegmentEncoder(made)._lengths.tolist() == [len(token) for token in vocabulary_bytes(made)]
