"""One conversation in every format that is read, with the fields and the manners of the datasets that use it."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from agentft.data.calls import JsonRefused, read_literal
from agentft.data.config import Format
from agentft.data.conversation import Origin
from agentft.data.records import Rejection, read_record

CITY = {"type": "string", "description": "where"}
FUNCTION = {
    "name": "weather",
    "description": "the weather",
    "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
}
TOOL = {"type": "function", "function": FUNCTION}
SYSTEM, QUESTION, THOUGHT, RESULT, ANSWER = "Be brief.", "Weather in Rome?", "I look.", '{"sky": "clear"}', "Clear."
ARGUMENTS = {"city": "Rome"}
CALL = {"name": "weather", "arguments": ARGUMENTS}

_HERMES_SYSTEM = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. "
    f"Be brief. Here are the available tools: <tools> {json.dumps([TOOL])} </tools> Use the following pydantic model json "
    "schema for each tool call you will make: {'title': 'FunctionCall', 'type': 'object'} For each function call return "
    "a json object with function name and arguments within <tool_call></tool_call> XML tags as follows:\n<tool_call>\n"
    "{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>"
)
_TOOLACE_SYSTEM = (
    "You are an expert in composing functions. Here is a list of functions in JSON format that you can invoke:\n"
    f"{json.dumps([{**FUNCTION, 'required': None}])}. \nShould you decide to return the function call(s), put it in the "
    "format of [func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n"
)
_TOOLBENCH_SYSTEM = (
    "You are AutoGPT, you can use many tools(functions) to do the following task.\nYour output should follow this format:\n"
    "Thought:\nAction\nAction Input:\n\nAfter the call, you will get the call result.\n"
    f"Specifically, you have access to the following APIs: {[FUNCTION]!r}"
)
_TURNS = [("user", QUESTION), ("call", json.dumps(CALL)), ("result", RESULT), ("assistant", ANSWER)]


def _turns(role: str, content: str, names: dict[str, str]) -> list[dict[str, Any]]:
    return [{role: names.get(said, said), content: text} for said, text in _TURNS]


RECORDS: dict[str, dict[str, Any]] = {
    "openai": {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {**CALL, "arguments": json.dumps(ARGUMENTS)}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": RESULT},
            {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT},
        ],
        "tools": [TOOL],
    },
    "openai, functions": {
        "messages": [
            {"role": "developer", "content": SYSTEM},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "", "function_call": {**CALL, "arguments": json.dumps(ARGUMENTS)}},
            {"role": "function", "name": "weather", "content": RESULT},
            {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"},
        ],
        "functions": [FUNCTION],
    },
    "llama-factory": {
        "conversations": _turns(
            "from",
            "value",
            {"user": "human", "call": "function_call", "result": "observation", "assistant": "gpt"},
        ),
        "system": SYSTEM,
        "tools": json.dumps([FUNCTION]),
    },
    "sharegpt, user and tool": {
        "conversations": _turns("from", "value", {"call": "function_call", "result": "tool"}),
        "system": SYSTEM,
        "tools": [TOOL],
    },
    "hermes": {
        "conversations": [
            {"from": "system", "value": _HERMES_SYSTEM},
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": f"<tool_call>\n{CALL!r}\n</tool_call>"},
            {"from": "tool", "value": f"<tool_response>\n{RESULT}\n</tool_response>"},
            {"from": "gpt", "value": ANSWER},
        ],
        "tools": json.dumps([TOOL]),
        "category": "Weather",
    },
    "xlam": {"id": 7, "query": QUESTION, "tools": json.dumps([FUNCTION]), "answers": json.dumps([CALL])},
    "toolace": {
        "system": _TOOLACE_SYSTEM,
        "conversations": [
            {"from": "user", "value": QUESTION},
            {"from": "assistant", "value": '[weather(city="Rome")]'},
            {"from": "tool", "value": RESULT},
            {"from": "assistant", "value": ANSWER},
        ],
    },
    "toolbench": {
        "id": "Step 1: Weather in Rome?",
        "conversations": [
            {"from": "system", "value": _TOOLBENCH_SYSTEM},
            {"from": "user", "value": QUESTION},
            {"from": "assistant", "value": f"\nThought: \nAction: weather\nAction Input: {json.dumps(ARGUMENTS)}"},
            {"from": "function", "value": RESULT},
            {"from": "assistant", "value": ANSWER},
        ],
    },
    "apigen-mt": {
        "conversations": _turns(
            "from",
            "value",
            {"user": "human", "call": "function_call", "result": "observation", "assistant": "gpt"},
        ),
        "tools": json.dumps([FUNCTION]),
        "system": SYSTEM,
    },
    "toucan": {
        "uuid": "u",
        "subset_name": "single-turn",
        "messages": json.dumps(
            [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": "", "function_call": {**CALL, "arguments": json.dumps(ARGUMENTS)}},
                {"role": "function", "name": "weather", "content": RESULT},
                {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT},
            ]
        ),
        "available_tools": json.dumps([TOOL]),
        "target_tools": "weather",
    },
    "anthropic": {
        "system": [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": QUESTION},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": THOUGHT, "signature": "s"},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": ARGUMENTS},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": RESULT}]}
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ],
        "tools": [{"name": "weather", "description": "the weather", "input_schema": FUNCTION["parameters"]}],
    },
    "ms-swift": {
        "messages": _turns("role", "content", {"call": "tool_call", "result": "tool_response"}),
        "tools": json.dumps([TOOL]),
        "system": SYSTEM,
    },
    "react": {
        "conversations": [
            {"from": "system", "value": SYSTEM},
            {"from": "user", "value": QUESTION},
            {
                "from": "assistant",
                "value": f"Action: weather\nAction Input: {ARGUMENTS!r}\nObservation: {RESULT}\nFinal Answer: {ANSWER}",
            },
        ]
    },
    "msagent": {
        "id": "m",
        "conversations": [
            {
                "from": "system",
                "value": f"{SYSTEM}\n\n1. {json.dumps({'name': 'weather', 'parameters': [{'name': 'city', **CITY}]})}",
            },
            {"from": "user", "value": QUESTION},
            {
                "from": "assistant",
                "value": '<|startofthink|>```JSON\n{"api_name": "weather", "parameters": {"city": "Rome"}}\n```<|endofthink|>'
                f"\n\n<|startofexec|>```JSON\n{RESULT}\n```<|endofexec|>\n{ANSWER}",
            },
        ],
    },
}
"""By the name of the format or of the dataset."""

NAMED = {"react": Format.react}
"""Formats that must be named; `auto` recognises the others."""

Path = tuple[str | int, ...]


def outcomes_of_fields(record: dict[str, Any], form: Format) -> dict[Path, str]:
    """Return for each value of a record what becomes of it, found by altering it alone.

    `carried`: the conversation is another one; `counted`: a notice names its field; `refused`: so is the altered record;
    `lost`: nobody would know. Text that holds JSON is looked into.
    """
    return {path: _outcome(record, form, path, _altered) for path, value in _leaves(record) if value not in (None, "")}


def outcomes_of_unknown_fields(record: dict[str, Any], form: Format) -> dict[Path, str]:
    """Return the same of a field `zz_unknown` put into each object of a record."""
    objects = [path for path, value in _values(record) if isinstance(value, dict)]
    return {path: _outcome(record, form, path, lambda value: {**value, "zz_unknown": "x"}) for path in objects}


def _outcome(record: dict[str, Any], form: Format, path: Path, change: Callable[[Any], Any]) -> str:
    before, after = (read_record(each, Origin("f", 1), form=form) for each in (record, _changed(record, path, change)))
    assert not isinstance(before, Rejection)
    if isinstance(after, Rejection):
        return "refused"
    if before[0] != after[0]:
        return "carried"
    names = {code.partition(":")[2] for code in after[1]}
    return "counted" if names & {"zz_unknown", *map(str, path)} else "lost"


def _altered(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return not value
    return f"{value}~" if isinstance(value, str) else value + 1


def _inside(value: Any) -> Any:
    """Return what a text of JSON or of a Python literal holds, else the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(JsonRefused):
            return read_literal(value)
    return value


def _values(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    value = _inside(value)
    yield path, value
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _values(each, (*path, key))


def _leaves(record: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    return ((path, value) for path, value in _values(record) if not isinstance(value, (dict, list)))


def _changed(value: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """Return a copy with one value changed; what is text stays text."""
    inside = _inside(value)
    if not path:
        made = change(inside)
    elif isinstance(inside, dict):
        made = {key: _changed(each, path[1:], change) if key == path[0] else each for key, each in inside.items()}
    else:
        made = [_changed(each, path[1:], change) if at == path[0] else each for at, each in enumerate(inside)]
    return json.dumps(made) if inside is not value else made
