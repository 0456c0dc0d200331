"""Tokens of a call are told apart alike by counting bytes and by the tokenizer's own offsets."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentft.data.render import MsagentTemplate, Segment, SpanKind
from agentft.data.sources import read_conversations, read_local
from agentft.data.text_ids import byte_level_lengths, vocabulary_bytes
from agentft.data.tokens import MixedChunks, SegmentEncoder


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


def by_both(chunks: list[tuple[str, tuple[Segment, ...]]]):
    backend = tokenizer().backend_tokenizer
    encoded = [(text, segments, np.array(backend.encode(text).ids, dtype=np.int32)) for text, segments in chunks]
    counting, asking = MixedChunks(backend, tokenizer()), MixedChunks(backend, None)
    return counting, counting.kind_runs(encoded), asking.kind_runs(encoded)


PART = st.text(st.sampled_from('ab"{}:, \n查天气你好🙂é'), max_size=10)
CHUNKS = st.lists(st.tuples(st.sampled_from([SpanKind.frame, SpanKind.call]), PART), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(CHUNKS)
def test_bytes_and_offsets_tell_the_same(parts):
    segments = tuple(Segment(text, kind) for kind, text in parts)
    _, counted, asked = by_both([("".join(s.text for s in segments), segments)])
    assert counted == asked


def test_bytes_and_offsets_tell_the_same_of_real_calls(shared_data):
    template = MsagentTemplate("<|im_end|>")
    encoder = SegmentEncoder(tokenizer())
    chunks = [
        (chunk.text, chunk.mixed)
        for conversation in read_conversations(read_local(shared_data / "dev.jsonl"))
        for chunk in encoder.draft(conversation.id, template.render(conversation)).chunks
        if chunk.mixed
    ]
    assert len(chunks) > 500
    _, counted, asked = by_both(chunks)
    assert counted == asked


def test_bytes_are_not_counted_where_the_tokenizer_may_write_another_text():
    """A letter and its accent apart: a tokenizer that composes them has fewer bytes than the text."""
    backend = tokenizer().backend_tokenizer
    counting = MixedChunks(backend, tokenizer())
    composed, apart = "caf\u00e9", "cafe\u0301"
    for text, counted in ((composed, True), (apart, False)):
        ids = np.array(backend.encode(text).ids, dtype=np.int32)
        assert (counting._stops(text, ids) is not None) is counted
    assert counting._stops("abc", np.array(backend.encode("ab").ids, dtype=np.int32)) is None, "a byte is missing"


@pytest.mark.parametrize("with_added", [False, True])
def test_the_length_of_a_token_is_that_of_its_bytes(with_added: bool):
    made = tokenizer()
    if with_added:
        made.add_tokens(["<工具>"])
    assert byte_level_lengths(made).tolist() == [len(token) for token in vocabulary_bytes(made)]
