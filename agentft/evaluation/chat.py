"""Steps as messages of a chat-completions endpoint, and its answers as the text that agentft scores.

A step's history becomes messages with native tool calls; the tools that the system text lists become `tools`, and its
words about marks go. Where the list cannot be read, everything is said in the marks of the text instead. What comes back,
content and tool calls, becomes one text in MSAgent's layout, read and scored like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import Any

from agentft.data.calls import JsonRefused, read_json
from agentft.data.conversation import Message
from agentft.data.grammar import MARK, THINK_CLOSE, THINK_OPEN, Call, Observation
from agentft.data.native_system import read_system
from agentft.evaluation.places import step_places
from agentft.evaluation.steps import Step

_TYPES = {"string", "number", "integer", "boolean", "array", "object", "null"}
_PYTHON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "dict": "object",
}
_LONGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class ChatStep:
    """What is sent for one step."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    names: Mapping[str, str]
    """Name of a tool as it is sent -> its own: endpoints allow letters, digits, `_` and `-` only."""


def chat_step(step: Step, shown: int = 0, *, as_recorded: bool = False) -> ChatStep:
    """Lay out the context of a step; its own reference is not in it.

    Args:
        step: What is asked.
        shown: Steps at the start of the conversation that are context only, see `shown_steps`.
        as_recorded: Leave everything in the record's own marks, the list of tools in the system text too: for a model
            that was trained on them, such as an exported run. Results are messages of role `tool`.
    """
    conversation = step.conversation
    system = read_system(conversation.system)
    if as_recorded:
        system = dataclasses.replace(system, text=conversation.system or "", tools=())
    tools = [json.loads(tool) for tool in system.tools]
    called = [call.name for call in conversation.tool_calls]
    sent = _safe_names([*(tool["function"]["name"] for tool in tools), *called])
    place = step_places(conversation)[shown + step.index]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system.text}] if system.text else []
    for number, message in enumerate(conversation.messages[: place.at]):
        if message.role == "user":
            messages.append({"role": "user", "content": message.text})
        elif message.role == "assistant":
            results = list(takewhile(lambda m: m.role == "tool", conversation.messages[number + 1 : place.at]))
            exchange = _exchange(message, results, sent, f"{number}", native=bool(tools))
            messages += _with_tool_role(exchange) if as_recorded else exchange
    return ChatStep(messages, [_declared(tool, sent) for tool in tools], {safe: name for name, safe in sent.items()})


def answer_text(message: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return an endpoint's message as one text: its words, then its calls between marks."""
    pieces = [words] if (words := _content(message.get("content"))) else []
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            pieces.append(_call_text(function, names))
    return "\n".join(pieces)


def _exchange(
    said: Message, results: Sequence[Message], sent: Mapping[str, str], prefix: str, *, native: bool
) -> Iterator[dict[str, Any]]:
    """Yield what the agent said at one step and what its tools returned.

    Without tools in the request there is no native call: then everything is said in the marks of the text.
    """
    if not native or not results or not said.tool_calls or said.malformed_calls:
        yield {"role": "assistant", "content": said.source_text.strip()}
        if results:
            yield {"role": "user", "content": "\n".join(result.source_text.strip() for result in results)}
        return
    words = "".join(part.source for part in said.source or () if not isinstance(part, Call)).strip()
    ids = [f"call_{prefix}_{i}" for i in range(len(said.tool_calls))]
    yield {
        "role": "assistant",
        "content": words or None,
        "tool_calls": [
            {
                "id": name,
                "type": "function",
                "function": {
                    "name": sent.get(call.name, call.name),
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for name, call in zip(ids, said.tool_calls, strict=True)
        ],
    }
    # Every call must be answered once: results beyond the last call stand with it, a call without one gets an empty text.
    bodies = [_body(result) for result in results]
    bodies[len(ids) - 1 :] = ["\n".join(bodies[len(ids) - 1 :])] if len(bodies) >= len(ids) else []
    for name, body in zip_longest(ids, bodies, fillvalue=""):
        yield {"role": "tool", "tool_call_id": name, "content": body}


def _body(result: Message) -> str:
    """Return what a tool returned, its fence included."""
    return "".join(part.body for part in result.source or () if isinstance(part, Observation)).strip()


def _with_tool_role(turn: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Results in marks as messages of their role, which a template of the record's own layout writes in their place."""
    for number, message in enumerate(turn):
        if message["role"] == "assistant":
            yield message
        else:
            yield {"role": "tool", "tool_call_id": f"result_{number}", "content": message["content"]}


def _safe_names(names: Sequence[str]) -> dict[str, str]:
    safe: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:_LONGEST_NAME] or "tool"
        number, candidate = 2, plain
        while candidate in safe.values():
            suffix = f"_{number}"
            candidate, number = plain[: _LONGEST_NAME - len(suffix)] + suffix, number + 1
        safe[name] = candidate
    return safe


def _declared(tool: Mapping[str, Any], sent: Mapping[str, str]) -> dict[str, Any]:
    function = tool["function"]
    parameters = _valid_types(function["parameters"])
    return {"type": "function", "function": {**function, "name": sent[function["name"]], "parameters": parameters}}


def _valid_types(schema: Any) -> Any:
    """A schema with the types that JSON schema knows: datasets also write Python's, which endpoints refuse."""
    if isinstance(schema, list):
        return [_valid_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    valid = {key: value if key in ("default", "enum") else _valid_types(value) for key, value in schema.items()}
    if isinstance(valid.get("type"), str):
        kind = _PYTHON_TYPES.get(valid["type"].lower(), valid["type"].lower())
        valid.pop("type")
        return valid | ({"type": kind} if kind in _TYPES else {})
    return valid


def _content(content: object) -> str:
    """The words of a message: a text, or the text parts of a list."""
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in parts if isinstance(text, str)).strip()
    return ""


def _call_text(function: Mapping[str, Any], names: Mapping[str, str]) -> str:
    name = function.get("name")
    own = names.get(name, name) if isinstance(name, str) else ""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # What is no JSON stays a text: parameters that are no object, and never read as other fields of the call.
        with contextlib.suppress(JsonRefused):
            arguments = read_json(arguments) if arguments.strip() else {}
    body = {"api_name": own, "parameters": {} if arguments is None else arguments}
    return _between_marks(json.dumps(body, ensure_ascii=False))


def _between_marks(body: str) -> str:
    if MARK.search(body):
        body = body.replace("<|", "\\u003c|")  # the same JSON: a bracket stands in strings only
    return f"{THINK_OPEN}```JSON\n{body}\n```{THINK_CLOSE}"
