"""Calls, results and thoughts that records write into text: read, or refused by name, never trained as prose.

| what | written by |
|---|---|
| calls between the marks of any family in `agentft/data/responses`, results in `<tool_response>` | Hermes, Qwen, and so on |
| `[f(a=1), g(b="x")]` | ToolACE |
| `{"name": ..., "parameters": ...}` alone, of a tool that is declared | Llama 3 |
| lines `Thought:`, `Action:`, `Action Input:`, `Observation:`, `Final Answer:` | ReAct, ToolBench |
| `<think>...</think>` before the text | all that reason |

A mark with no call behind it is letters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from agentft.data.calls import (
    CALL_FIELDS,
    Attempt,
    Json,
    JsonRefused,
    ToolCall,
    literal,
    read_call,
    read_json,
    read_python,
)
from agentft.data.response import Said, read_by_marks
from agentft.errors import FormatError

_RESPONSE = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)\Z", re.DOTALL)
_UNOPENED_THOUGHT = re.compile(r"(.*?)(?:\n\s*</think>|</think>\s*\n)(.*)\Z", re.DOTALL)
_PYTHONIC = re.compile(r"\s*\[\s*[^\[\]\"'{}()=<>]+\(.*\)\s*\]\s*\Z", re.DOTALL)
_REACT_LABEL = re.compile(r"^[ \t]*(Thought|Action Input|Action|Observation|Final Answer)[ \t]*[:：]", re.MULTILINE)


def read_text_calls(text: str, tools: Sequence[dict[str, Json]], *, pythonic: bool = False) -> Said | None:
    """Read a text in which calls are written; None: there is none in it.

    Args:
        tools: The declarations of the record.
        pythonic: A text such as `[f(a=1)]` is a list of calls whatever its names, and refused where it is none.

    Raises:
        FormatError: it holds calls that cannot be read.
    """
    if (found := read_by_marks(text, tools, of_datasets=True)) is not None:
        said = found[1]
        if said.failures:
            raise FormatError(said.failures[0].reason, said.failures[0].detail)
        if said.thought is False:
            raise FormatError("thought_never_closed", "a text opens a thought and never closes it")
        return said
    declared = {tool["function"]["name"] for tool in tools}
    if calls := _pythonic_calls(text) or _bare_calls(text, declared):
        if pythonic or any(call.name in declared or call.arguments for call in calls):
            return Said((Attempt(text, calls, None),))
    elif pythonic and _PYTHONIC.match(text):
        raise FormatError("call_not_read", "a text in brackets that is no list of calls such as [f(a=1)]")
    return None


def split_thought(text: str) -> tuple[str | None, str]:
    """Return the thought that a text begins with, and the text after it.

    Raises:
        FormatError: the thought has no end.
    """
    if "</think>" not in text:
        if text.lstrip().startswith("<think>"):
            raise FormatError("thought_never_closed", "a text opens <think> and never closes it")
        return None, text
    # Where the generation prompt opens the thought, the text has its end alone; inside a sentence the mark is letters.
    found = _THOUGHT.match(text) or (None if "<think>" in text else _UNOPENED_THOUGHT.match(text))
    return (None, text) if found is None else (found[1].strip("\n") or None, found[2].lstrip("\n"))


def read_responses(text: str) -> list[str]:
    """Return the results in a text that is made of `<tool_response>` blocks alone, none where it is not."""
    if not text.lstrip().startswith("<tool_response>") or _RESPONSE.sub("", text):
        return []
    return [body.strip("\n") for body in _RESPONSE.findall(text)]


def read_named_results(text: str, calls: Sequence[ToolCall]) -> list[str]:
    """Return the results of several calls that are written as one list of objects with their names, as ToolACE does."""
    if not text.lstrip().startswith("["):
        return []
    try:
        values: Json = read_json(text.strip())
    except JsonRefused:
        return []
    names = [value.get("name") if isinstance(value, dict) else None for value in values]
    if names != [call.name for call in calls]:
        return []
    return [json.dumps(value, ensure_ascii=False) for value in values]


def read_react(text: str) -> Iterator[tuple[Literal["step", "result"], str, ToolCall | None]]:
    """Yield the steps and results of ReAct text: an observation follows its action, the final answer ends.

    Raises:
        FormatError: the lines are in another order, or an action cannot be read.
    """
    labels = list(_REACT_LABEL.finditer(text))
    ends = [label.start() for label in labels[1:]] + [len(text)] * bool(labels)
    words = [text[: labels[0].start()].strip() if labels else text.strip()]
    action: str | None = None
    before = ""
    for label, end in zip(labels, ends, strict=True):
        kind, content = label[1], text[label.end() : end].strip()
        needed = {"Action Input": "Action", "Observation": "Action Input"}.get(kind)
        if before == "Action" and kind != "Action Input":
            raise FormatError("react_order", "Action without Action Input")
        if before == "Final Answer" or (needed is not None and before != needed):
            raise FormatError("react_order", f"{kind} after {before or 'nothing'}")
        if kind in ("Thought", "Final Answer"):
            words.append(content)
        elif kind == "Action":
            action = content
        elif kind == "Action Input":
            call = read_call({"name": action, "arguments": literal(content, "arguments_not_json")})
            yield "step", "\n".join(filter(None, words)), call
            words = []
        else:
            yield "result", content, None
        before = kind
    if before == "Action":
        raise FormatError("react_order", "Action without Action Input")
    if any(words):
        yield "step", "\n".join(filter(None, words)), None


def _pythonic_calls(text: str) -> tuple[ToolCall, ...]:
    """Read a text that is nothing but a list of calls as Python writes it; () where it is anything else."""
    if _PYTHONIC.match(text) is None:
        return ()
    try:
        calls = read_python(text, {})
    except JsonRefused:
        return ()
    return () if any(isinstance(call, Attempt) for call in calls) else tuple(map(read_call, calls))


def _bare_calls(text: str, declared: Collection[str]) -> tuple[ToolCall, ...]:
    """Read a text that is nothing but JSON of calls of declared tools; () where it is anything else."""
    if not declared or text.lstrip()[:1] not in ("{", "["):
        return ()
    try:
        value = read_json(text.strip())
    except JsonRefused:
        return ()
    items = value if isinstance(value, list) else [value]
    if not all(
        isinstance(item, dict)
        and item.get("name") in declared
        and item.keys() <= CALL_FIELDS
        and not {"arguments", "parameters"}.isdisjoint(item)
        for item in items
    ):
        return ()
    return tuple(map(read_call, items))
