"""Records of other layouts come through without loss, or are refused: never as something else."""

import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentft.data.calls import strip_fence
from agentft.data.conversation import Conversation, Origin
from agentft.data.grammar import EXEC_CLOSE, EXEC_OPEN, THINK_CLOSE, THINK_OPEN, Call, Observation, Part, Text
from agentft.data.records import Rejection, read_record

ORIGIN = Origin("forms.jsonl", 1)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "day": {"type": "object", "required": ["x"]},
            },
            "required": ["city"],
        },
    },
}


def read(record: object, form: str = "auto") -> Conversation:
    outcome = read_record(record, ORIGIN, form=form)
    assert not isinstance(outcome, Rejection), outcome
    return outcome[0]


def reason_of(record: object, form: str = "auto") -> str:
    outcome = read_record(record, ORIGIN, form=form)
    assert isinstance(outcome, Rejection)
    return outcome.reason


def tool_call(call_id: str, arguments: object, name: str = "weather") -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def openai(*messages: dict, **fields: object) -> dict:
    return {"id": "o", "messages": list(messages), **fields}


def turn_parts(conversation: Conversation) -> list[list[Part]]:
    """The parts of each turn, none where it is not the agent's."""
    by_turn = groupby(conversation.messages, lambda m: id(m) if m.source is None else None)
    return [[part for message in turn for part in message.source or ()] for _, turn in by_turn]


def said(conversation: Conversation, turn: int = -1) -> list[tuple[str, object]]:
    """What an assistant turn says: texts stripped of the layout's white space, calls and observations by content."""
    found: list[tuple[str, object]] = []
    for part in turn_parts(conversation)[turn]:
        match part:
            case Text(source) if source.strip():
                found.append(("text", source.strip()))
            case Call():
                found += [("call", (request.name, request.arguments)) for request in part.requests]
            case Observation():
                found.append(("observation", strip_fence(part.body)))
    return found


USER = {"role": "user", "content": "Weather in Rome and Oslo?"}
PARALLEL = {
    "role": "assistant",
    "content": "Two calls.",
    "tool_calls": [tool_call("1", '{"city": "Rome"}'), tool_call("2", '{"city": "Oslo"}')],
}


def test_parallel_openai_calls_become_calls_followed_by_their_results_in_the_order_of_the_calls() -> None:
    conversation = read(
        openai(
            {"role": "system", "content": "Be brief."},
            USER,
            PARALLEL,
            {"role": "tool", "tool_call_id": "2", "content": "rain"},
            {"role": "tool", "tool_call_id": "1", "content": '{"sky": "clear"}'},
            {"role": "assistant", "content": "Clear in Rome, rain in Oslo."},
            tools=[TOOL],
        )
    )
    assert said(conversation) == [
        ("text", "Two calls."),
        ("call", ("weather", {"city": "Rome"})),
        ("call", ("weather", {"city": "Oslo"})),
        ("observation", '{"sky": "clear"}'),
        ("observation", "rain"),
        ("text", "Clear in Rome, rain in Oslo."),
    ]
    assert conversation.system.startswith("Be brief.\n\n")
    (tool,) = conversation.offered
    assert (tool.name, tool.problem) == ("weather", None)
    assert tool.parameters is not None
    assert tool.parameters[0] == {"name": "city", "description": "where", "required": True, "type": "string"}
    assert tool.parameters[1] == {
        "name": "day",
        "description": "",
        "required": False,
        "type": "object",
        "required_fields": ["x"],
    }


def test_the_older_function_call_and_split_call_messages_are_openai_too() -> None:
    older = openai(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        {"role": "function", "name": "weather", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    )
    split = openai(
        USER,
        {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"role": "tool_response", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    )
    expected = [("call", ("weather", {"city": "Rome"})), ("observation", "sun"), ("text", "Sun.")]
    assert said(read(older)) == said(read(split)) == expected
    assert said(read({"conversations": older["messages"]})) == expected
    assert said(read(openai() | {"messages": json.dumps(older["messages"])})) == expected


def test_sharegpt_with_its_tools_as_text_becomes_the_same() -> None:
    conversation = read(
        {
            "conversations": [
                {"from": "human", "value": "Weather in Rome?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": '{"sky": "clear"}'},
                {"from": "gpt", "value": "Clear."},
                {"from": "human", "value": "Thanks"},
                {"from": "gpt", "value": "Welcome."},
            ],
            "system": "Be brief.",
            "tools": json.dumps([TOOL["function"]]),
        }
    )
    expected = [("call", ("weather", {"city": "Rome"})), ("observation", '{"sky": "clear"}'), ("text", "Clear.")]
    assert said(conversation, 2) == expected
    assert said(conversation, 4) == [("text", "Welcome.")]
    assert [tool.name for tool in conversation.offered] == ["weather"]
    assert conversation.rounds == 2


REACT = (
    "Thought: I should look it up.\nAction: weather\nAction Input: {'city': 'Rome'}\nObservation: clear\n and warm\n"
    "Thought: I know.\nFinal Answer: Clear."
)


def test_react_text_is_converted_only_when_asked_for() -> None:
    record = {"conversations": [{"from": "user", "value": "Weather?"}, {"from": "assistant", "value": REACT}]}
    assert reason_of(record) == "form_react"
    assert said(read(record, form="react")) == [
        ("text", "I should look it up."),
        ("call", ("weather", {"city": "Rome"})),
        ("observation", "clear\n and warm"),
        ("text", "I know.\nClear."),
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("Action: a\nObservation: b", "react_order"),
        ("Action: a", "react_order"),
        ("Observation: b", "react_order"),
        ("Action: a\nAction Input: {}\nObservation: b\nFinal Answer: c\nAction: a\nAction Input: {}", "react_order"),
        ("Action: a\nAction Input: rm -rf", "arguments_not_json"),
        ("Action: a\nAction Input: [1]", "arguments_not_an_object"),
        ("Action:\nAction Input: {}", "call_without_name"),
        (f"Action: a\nAction Input: {{}}\nObservation: x{EXEC_CLOSE}y", "marks_in_text"),
    ],
)
def test_react_text_out_of_order_is_refused(value: str, reason: str) -> None:
    record = {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": value}]}
    assert reason_of(record, form="react") == reason


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (openai(USER, {"role": "assistant", "content": f"a{THINK_OPEN}b"}), "marks_in_text"),
        (
            openai(USER, PARALLEL, {"role": "tool", "tool_call_id": "1", "content": f"x{EXEC_CLOSE}leak"}),
            "marks_in_text",
        ),
        (openai(USER, PARALLEL, {"role": "tool", "tool_call_id": "9", "content": "x"}), "observation_without_call"),
        (openai(USER, PARALLEL, {"role": "tool", "tool_call_id": "2", "content": "x"}), "result_missing"),
        (openai(USER, {"role": "tool", "content": "x"}), "observation_without_call"),
        (openai(USER, {"role": "assistant", "tool_calls": [tool_call("1", "{broken")]}), "arguments_not_json"),
        (openai(USER, {"role": "assistant", "tool_calls": [tool_call("1", "[]")]}), "arguments_not_an_object"),
        (
            openai(USER, {"role": "assistant", "tool_calls": [tool_call("1", {"x": float("nan")})]}),
            "arguments_not_json",
        ),
        (openai(USER, {"role": "assistant", "tool_calls": [tool_call("1", {}, name="")]}), "call_without_name"),
        (openai(USER, {"role": "assistant", "tool_calls": ["x"]}), "call_not_an_object"),
        (openai(USER, {"role": "assistant", "content": None}), "empty_assistant"),
        (
            openai(USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}),
            "two_assistant_turns",
        ),
        (openai(USER, USER, {"role": "assistant", "content": "a"}), "two_user_turns"),
        (openai(USER, {"role": "assistant", "content": "a"}, {"role": "system", "content": "s"}), "system_in_middle"),
        (
            openai({"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "a"}),
            "value_not_text",
        ),
        (openai(USER, {"role": "bot", "content": "a"}), "unknown_role"),
        (openai(USER, {"role": "assistant", "content": "a"}, tools="{"), "tools_unreadable"),
        (openai(USER, {"role": "assistant", "content": "a"}, tools=[{"function": {"name": 1}}]), "tools_unreadable"),
        (openai(USER, {"role": "assistant", "content": "<|StartOfExec|>"}), "mark_misspelt"),
        (openai(), "messages_not_a_list"),
        ({"messages": [None]}, "turn_not_an_object"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]}, "unknown_role"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]},
            "call_not_json",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]},
            "observation_without_call",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "ends_with_user"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_a_reason(record: dict, reason: str) -> None:
    assert reason_of(record) == reason


def test_fields_that_are_not_carried_over_are_noticed() -> None:
    outcome = read_record(openai(USER, {"role": "assistant", "content": "a", "reasoning_content": "hm"}), ORIGIN)
    assert not isinstance(outcome, Rejection)
    assert "field_not_carried" in [notice.code for notice in outcome[1]]


marks = st.sampled_from([THINK_OPEN, THINK_CLOSE, EXEC_OPEN, EXEC_CLOSE])
pieces = (
    marks
    | st.sampled_from(["\n", '"', "\\", "{", "}", "```", "and", "Action: a\nAction Input: {}", "1. {", "谢", " "])
    | st.text(max_size=5)
)
soup = st.lists(pieces, max_size=8).map("".join)
calls = st.lists(
    st.tuples(st.text(min_size=1, max_size=5), st.dictionaries(st.text(max_size=4), soup, max_size=3)), max_size=3
)


@given(user=soup, texts=st.tuples(soup, soup), calls=calls, results=st.lists(soup, max_size=3), system=soup)
@settings(max_examples=300, deadline=None)
def test_a_converted_record_says_exactly_what_it_said_before(
    user: str, texts: tuple[str, str], calls: list, results: list[str], system: str
) -> None:
    results = results[: len(calls)]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    messages.append(
        {
            "role": "assistant",
            "content": texts[0],
            "tool_calls": [tool_call(str(n), json.dumps(a), f) for n, (f, a) in enumerate(calls)],
        }
    )
    messages += [{"role": "tool", "tool_call_id": str(n), "content": result} for n, result in enumerate(results)]
    if results:
        messages.append({"role": "assistant", "content": texts[1]})
    outcome = read_record({"messages": messages}, ORIGIN)
    if isinstance(outcome, Rejection):
        return
    conversation = outcome[0]
    expected: list[tuple[str, object]] = [("text", texts[0].strip())] if texts[0].strip() else []
    expected += [("call", (name, arguments)) for name, arguments in calls]
    observed = [part.body for part in turn_parts(conversation)[-1] if isinstance(part, Observation)]
    assert observed == [r if body == r else f"```JSON\n{r}\n```" for r, body in zip(results, observed, strict=True)]
    expected += [("observation", strip_fence(body)) for body in observed]
    expected += [("text", texts[1].strip())] if results else []
    assert said(conversation) == expected
    assert next(m.content for m in conversation.messages if m.role == "user") == user
