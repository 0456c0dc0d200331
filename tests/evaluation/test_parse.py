"""How a reply is taken apart: what is the agent's own, what is a call, what is a failed one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentft.evaluation.parse import END_OF_SEQUENCE_TEXTS, own_words, parse_reply, repair_call_body


def call(name: str, **parameters: object) -> str:
    body = json.dumps({"api_name": name, "parameters": parameters}, ensure_ascii=False)
    return f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>"


@pytest.mark.parametrize(
    "header", ["\n\n<|assistant|>:", "<|assistant|>: ", "<|im_start|>assistant\n", "\n<|assistant|>：", ""]
)
def test_role_header_is_no_part_of_the_answer(header: str) -> None:
    assert parse_reply(f"{header}今天晴").text == "今天晴"


@pytest.mark.parametrize("end", END_OF_SEQUENCE_TEXTS)
def test_an_end_of_sequence_is_a_stop_at_the_end_and_before_another_turn_and_a_text_elsewhere(end: str) -> None:
    assert parse_reply(f"yes{end}").text == "yes"
    assert parse_reply(f"yes {end}\n{end}\n").text == "yes"
    assert parse_reply(f"yes{end}\n<|im_start|>assistant\n{call('invented')}").text == "yes"
    assert parse_reply(f"Write {end} at the end.{end}").text == f"Write {end} at the end."
    assert not bool(parse_reply(f"yes{end}\n<|assistant|>:{call('invented')}").attempts)


@pytest.mark.parametrize("mark", [*END_OF_SEQUENCE_TEXTS, "<|user|>:", "<|startofexec|>", "<|im_start|>user"])
def test_a_mark_in_a_string_of_a_readable_call_is_letters(mark: str) -> None:
    text = f"I look. {call('explain', token=f'what is {mark}?')}"
    reply = parse_reply(f"{text}</s>")
    assert reply.calls[0].arguments == {"token": f"what is {mark}?"}
    assert reply.text == "I look."
    assert own_words(text) == text
    broken = parse_reply(f"<|startofthink|>{{broken <|user|>: {mark}<|endofthink|> and more")
    assert (len(broken.failures), broken.text) == (1, "")


def test_invented_tool_result_and_second_call_are_cut() -> None:
    reply = parse_reply(call("weather", city="北京") + "\n\n<|startofexec|>{}<|endofexec|>\n" + call("invented"))
    assert [request.name for request in reply.calls] == ["weather"]
    assert reply.text == ""


@pytest.mark.parametrize("tag", ["\n\n<|user|>:", "<|im_start|>user\n"])
def test_invented_user_turn_is_cut(tag: str) -> None:
    assert parse_reply(f"晴。{tag}谢谢").text == "晴。"


def test_spans_are_not_greedy() -> None:
    reply = parse_reply("查一下 " + call("a", x=1) + "\n\n" + call("b") + " 好")
    assert [request.name for request in reply.calls] == ["a", "b"]
    assert reply.text == "查一下\n好"


def test_fence_is_optional_and_an_array_is_several_calls() -> None:
    bare = '<|startofthink|>[{"api_name": "a", "parameters": {}}, {"api_name": "b"}]<|endofthink|>'
    reply = parse_reply(bare)
    assert [request.name for request in reply.calls] == ["a", "b"]
    assert len(reply.attempts) == 1
    assert len(reply.failures) == 0


def test_raw_line_feed_inside_a_json_string_is_read() -> None:
    reply = parse_reply('<|startofthink|>{"api_name": "a", "parameters": {"x": "1\n2"}}<|endofthink|>')
    assert reply.calls[0].arguments == {"x": "1\n2"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "empty"),
        ("[]", "empty"),
        ("I think", "not_json"),
        ('{"api_name": "a", "parameters": {"x": NaN}}', "not_json"),
        ('{"api_name": "a", "parameters": [1]}', "parameters_not_an_object"),
        ('{"api_name": null}', "no_name"),
        ('"a"', "not_an_object"),
        ('[{"api_name": "a"}, 3]', "not_an_object"),
        ('{"api_name": "a", "parameters": ' + '{"x": ' * 800 + "1" + "}" * 801, "not_json"),
        ('{"api_name": "a", "parameters": {"x": ' + "9" * 5000 + "}}", "not_json"),
    ],
)
def test_unreadable_span_is_one_malformed_attempt(body: str, reason: str) -> None:
    reply = parse_reply(f"<|startofthink|>{body}<|endofthink|>")
    assert (len(reply.failures), reply.calls, bool(reply.attempts)) == (1, (), True)
    assert reply.attempts[0].failure is not None
    assert reply.attempts[0].failure.reason == reason


def test_unclosed_span_is_one_malformed_attempt_even_if_its_json_is_whole() -> None:
    reply = parse_reply(call("a") + '<|startofthink|>{"api_name": "b", "parameters": {}}')
    assert [request.name for request in reply.calls] == ["a"]
    assert len(reply.failures) == 1
    assert reply.attempts[1].failure is not None
    assert reply.attempts[1].failure.reason == "unclosed"


def test_a_call_may_lack_parameters() -> None:
    assert parse_reply('<|startofthink|>{"api_name": "a"}<|endofthink|>').calls[0].arguments == {}


MARKS = [
    "<|startofthink|>",
    "<|endofthink|>",
    "<|startofexec|>",
    "<|assistant|>:",
    "</s>",
    "```JSON\n",
    "{",
    "}",
    '"',
    "x",
    "\n",
    "[",
    ",",
    ":",
]


@given(st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=5)), max_size=40).map("".join))
def test_parsing_never_raises(text: str) -> None:
    reply = parse_reply(text)
    assert bool(reply.attempts) == bool(reply.calls or len(reply.failures))
    for attempt in reply.attempts:
        repair_call_body(attempt.source)


@pytest.mark.parametrize(
    "body",
    [
        '{"api_name": "a", "parameters": {"x": "1", "y": [true, null],}}',
        "{'api_name': 'a', 'parameters': {'x': '1', 'y': [True, None]}}",
        '```JSON\n{"api_name": "a", "parameters": {"x": "1", "y": [true, null',
        "{“api_name”：“a”，“parameters”：{“x”：“1”，“y”：[true，null]}}",
        'call: {"api_name": "a", "parameters": {"x": "1", "y": [true, null]}} and then',
        '{"api_name": "a", "parameters": {"x": "1", "y": [true, null]}}',
    ],
)
def test_modest_repair_wins_nearly_json_back(body: str) -> None:
    requests = repair_call_body(body)
    assert requests is not None
    assert requests[0].name == "a"
    assert requests[0].arguments == {"x": "1", "y": [True, None]}


@pytest.mark.parametrize("body", ["", "no call here", "{]", '{"x": 1}', '{"api_name": a b}'])
def test_repair_does_not_invent_calls(body: str) -> None:
    assert repair_call_body(body) is None
