"""The name and the parameters of a call are found exactly; telling them apart changes no token."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentft.data.calls import Call
from agentft.data.msagent import call_places, parse_assistant
from agentft.data.render import CALL_KINDS, Rendering, Segment, SpanKind, step_segments
from agentft.data.tokens import Example, SegmentEncoder, vocabulary_bytes


def encoded(tokenizer, *texts: list[Segment]) -> list[Example]:
    renderings = [("c", Rendering(tuple(segments), by_chunks=True)) for segments in texts]
    return [example for ((example, _),) in SegmentEncoder(tokenizer).encode(renderings)]


def call_of(body: str) -> Call:
    (call,) = parse_assistant(f"<|startofthink|>{body}<|endofthink|>")
    assert isinstance(call, Call)
    return call


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ('{"api_name": "a", "parameters": {"x": 1}}', ["a", '{"x": 1}']),
        ('```JSON\n{"api_name":"a","parameters":{}}\n```', ["a", "{}"]),
        (
            '```\n{"parameters" : {"x": {"api_name": "b"}} , "url": "u", "api_name" : "a"}',
            ['{"x": {"api_name": "b"}}', "a"],
        ),
        ('{"command": "execute", "api_name": "a\\"b", "parameters": null}', ['a\\"b', "null"]),
        ('{"api_name": "a"}', ["a"]),
        # A key given twice is refused, so nothing of such a call can be told apart.
        (
            '{"api_name": "a", "api_name": "b", "parameters": {}}',
            ['{"api_name": "a", "api_name": "b", "parameters": {}}'],
        ),
        (
            '[{"api_name": "a", "parameters": {}} , {"api_name": "b", "parameters": {"y": []}}]',
            ["a", "{}", "b", '{"y": []}'],
        ),
        ('{"api_name": "查天气", "parameters": {"城市": "杭\n州"}}', ["查天气", '{"城市": "杭\n州"}']),
        ("```JSON\nno json at all\n```", ["```JSON\nno json at all\n```"]),
    ],
)
def test_name_and_parameters_stand_at_their_places(body: str, found: list[str]):
    call = call_of(body)
    assert [call.source[start:stop] for start, stop in call_places(call)] == found


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
REQUESTS = st.lists(
    st.tuples(NAMES, st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3)), min_size=1, max_size=3
)


@given(REQUESTS, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_what_stands_there_reads_as_name_and_parameters(requests, indent, ascii_only):
    items = [{"api_name": name, "parameters": parameters, "url": "u"} for name, parameters in requests]
    call = call_of(json.dumps(items, indent=indent, ensure_ascii=ascii_only))
    if call.failure is not None:  # half a surrogate
        return
    places = call_places(call)
    read = [call.source[start:stop] for start, stop in places]
    assert [json.loads(f'"{name}"', strict=False) for name in read[::2]] == [r.name for r in call.requests]
    assert [json.loads(parameters, strict=False) for parameters in read[1::2]] == [r.arguments for r in call.requests]


def pieces(value: str) -> list[tuple[str, str]]:
    return [(segment.kind.name, segment.text) for segment in step_segments(parse_assistant(value), "<|im_end|>")]


def test_a_call_is_cut_into_syntax_and_call():
    said = 'Wait.<|startofthink|>```JSON\n{"api_name": "a", "parameters": {"x": 1}}\n```<|endofthink|>'
    assert pieces(said) == [
        ("text", "Wait."),
        ("call_syntax", '<|startofthink|>```JSON\n{"api_name": "'),
        ("call", "a"),
        ("call_syntax", '", "parameters": '),
        ("call", '{"x": 1}'),
        ("call_syntax", "}\n```<|endofthink|>"),
        ("stop", "<|im_end|>"),
    ]


SAID = (
    'Let me see.\n<|startofthink|>[{"api_name": "get_tide", "parameters": {"harbour": "Husum <b>", "days": [1, 2]}}, '
    '{"parameters": {}, "api_name": "查天气"}]<|endofthink|>'
)


@pytest.fixture(scope="module")
def merging_tokenizer():
    """A byte-level tokenizer that has learned to merge across the borders of names and parameters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    straddling = [': "get', 'tide", ', ': {"', " 2]}}", ": {},", '"查']
    trainer = trainers.BpeTrainer(vocab_size=400, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(straddling, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<|im_end|>"])


def test_a_token_with_any_letter_of_name_or_parameters_is_of_the_call(merging_tokenizer):
    segments = list(step_segments(parse_assistant(SAID), "<|im_end|>"))
    (example,) = encoded(merging_tokenizer, segments)
    kind_of_byte = [segment.kind for segment in segments for _ in segment.text.encode()]
    kind_of_token = [span.kind for span in example.spans for _ in range(span.start, span.stop)]
    table = vocabulary_bytes(merging_tokenizer)
    at = straddling = 0
    for kind, index in zip(kind_of_token, example.input_ids, strict=True):
        under = kind_of_byte[at : at + len(table[index])]
        at += len(under)
        assert kind is (SpanKind.call if SpanKind.call in under else under[0])
        straddling += len(set(under)) > 1
    assert at == len(kind_of_byte)
    assert straddling >= 3, "the tokenizer was made to merge across the borders"


def test_telling_syntax_and_call_apart_changes_no_token(merging_tokenizer):
    segments = list(step_segments(parse_assistant(SAID), "<|im_end|>"))
    coarse = [s._replace(kind=SpanKind.call_syntax) if s.kind in CALL_KINDS else s for s in segments]
    fine, whole = encoded(merging_tokenizer, segments, coarse)
    assert fine.input_ids.tolist() == whole.input_ids.tolist()
    assert fine.labels.tolist() == whole.labels.tolist()
    assert fine.steps() == whole.steps()
    assert len(fine.spans) > len(whole.spans)
