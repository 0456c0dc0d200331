"""Calls, results and thoughts that records write into text: read, or refused by name, never trained as prose.

| what | written by |
|---|---|
| `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, results in `<tool_response>` | Hermes, Qwen |
| `[f(a=1), g(b="x")]` | ToolACE |
| `{"name": ..., "parameters": ...}` alone, of a tool that is declared | Llama 3 |
| lines `Thought:`, `Action:`, `Action Input:`, `Observation:`, `Final Answer:` | ReAct, ToolBench |
| `<think>...</think>` before the text | all that reason |

The marks of other families are known, so that a call in them is refused. A mark with no call behind it is letters.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from agentft.data.grammar import Json, JsonRefused, ToolCall, read_json
from agentft.data.literal_text import LiteralError, read_literal
from agentft.errors import FormatError

_ARGUMENTS = ("arguments", "parameters", "args", "input")
"""What formats call the arguments of a call; more than one of them would be a guess."""
_CALL_FIELDS = frozenset({"id", "type", "index", "function", "name", *_ARGUMENTS})
_CALL_TYPES = (None, "function", "tool_use", "tool_call")
_MAX_PYTHONIC_CHARACTERS = 100_000

_HERMES_OPEN = re.compile(r"<tool_call>\s*(?=[{\[])")
_HERMES_CLOSE = re.compile(r"\s*</tool_call>")
_RESPONSE = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)\Z", re.DOTALL)
_UNOPENED_THOUGHT = re.compile(r"(.*?)(?:\n\s*</think>|</think>\s*\n)(.*)\Z", re.DOTALL)
_PYTHONIC = re.compile(r"\s*\[\s*[^\[\]\"'{}()=<>]+\(.*\)\s*\]\s*\Z", re.DOTALL)
_REACT = re.compile(r"^[ \t]*Action[ \t]*[:：].*\n\s*Action Input[ \t]*[:：]", re.MULTILINE)
_REACT_LABEL = re.compile(r"^[ \t]*(Thought|Action Input|Action|Observation|Final Answer)[ \t]*[:：]", re.MULTILINE)
_FOREIGN = re.compile(
    r"<\|startof(?:think|exec)\|>\s*(?:```|[{\[])"
    r"|<tool_call>\s*<function=|<tool_call>\s*[\w.-]+\s*<arg_key>|<function=[\w.-]+>\s*[{<]"
    r"|\[TOOL_CALLS\]\s*(?:[\[{]|[\w.-]+\s*[\[{])|<\|python_tag\|>\s*(?:[\[{]|[\w.]+\()|<TOOLCALL>\s*\[|<invoke name="
    r"|<\|tool_call\|>\s*[\[{]|<\|tool_call>\s*call:|<\|tool_call_start\|>\s*\["
    r"|<｜tool▁calls?▁begin｜>|<\|tool_calls?(?:_section)?_begin\|>|\bto=functions\.\w"
)
"""How a call of another family begins, with enough behind the mark that it is no mention of it."""


class TextCalls(NamedTuple):
    """An assistant's text taken apart."""

    words: str | None
    """What is no call; None where there is nothing else."""
    calls: tuple[ToolCall, ...]
    words_after: bool = False
    """Words stand behind a call; a message has its words before."""


def read_text_calls(text: str, declared: Collection[str], unknown: list[str], *, pythonic: bool = False) -> TextCalls:
    """Read the calls that are written in a text.

    Args:
        declared: Names of the tools that the record declares.
        unknown: Gets the names of fields of calls that have no meaning here.
        pythonic: A text such as `[f(a=1)]` is a list of calls whatever its names, and refused where it is none.

    Raises:
        FormatError: it holds calls that cannot be read.
    """
    if "<tool_call>" in text and _HERMES_OPEN.search(text):
        return _hermes(text, unknown)
    if _PYTHONIC.match(text):
        calls = _pythonic_calls(text)
        if calls and (pythonic or any(call.name in declared or call.arguments for call in calls)):
            return TextCalls(None, calls)
        if pythonic:
            raise FormatError("call_not_read", "a text in brackets that is no list of calls such as [f(a=1)]")
    if declared and (bare := _bare_calls(text, declared, unknown)):
        return TextCalls(None, bare)
    if (mark := foreign_call(text)) is not None:
        msagent = mark.startswith("<|startof")
        hint = "; MSAgent text needs the names conversations, from, value, user, assistant" if msagent else ""
        raise FormatError("marks_in_text" if msagent else "calls_in_text", f"{mark!r} begins a call in text{hint}")
    if is_react_text(text):
        raise FormatError("form_react", "ReAct text (Action / Action Input), which dataset.format=react reads")
    return TextCalls(text, ())


def foreign_call(text: str) -> str | None:
    """Return how a call begins that is written in the marks of another family; None where there is none."""
    found = _FOREIGN.search(text) if "<" in text or "[T" in text or "to=" in text else None
    return None if found is None else found[0].strip()[:40]


def is_react_text(text: str) -> bool:
    """Return whether a text has a line `Action:` followed by a line `Action Input:`."""
    return "Action Input" in text and _REACT.search(text) is not None


def read_call(call: object, unknown: list[str], call_id: object = None) -> ToolCall:
    """Read a call given as an object, its arguments as an object or JSON text.

    Raises:
        FormatError: it has no name, or its arguments cannot be told.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise FormatError("call_not_an_object", "a call is no object with name and arguments")
    if call.get("type") not in _CALL_TYPES:
        raise FormatError("call_not_an_object", f"a call is of the type {str(call['type'])[:40]!r}, which is not known")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise FormatError("call_without_name", "a tool call has no name")
    more = [
        key for part in (call, function) for key, value in part.items() if key not in _CALL_FIELDS and not blank(value)
    ]
    given = [key for key in _ARGUMENTS if function.get(key) is not None]
    if len(given) > 1 or (not given and more):
        found = given or [key if isinstance(key, str) else type(key).__name__ for key in more]
        raise FormatError("arguments_unclear", f"the arguments of {name[:40]!r} may be {', '.join(found)[:80]}")
    unknown += [key if isinstance(key, str) else type(key).__name__ for key in dict.fromkeys(more)]
    own_id = call.get("id") if call_id is None else call_id
    return ToolCall(name, _arguments(function[given[0]] if given else {}), read_id(own_id))


def read_id(value: object) -> str | None:
    """Return an id as text; whole numbers are ids too."""
    if isinstance(value, str):
        return value or None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return f"{value:.0f}" if whole and not isinstance(value, bool) and abs(value) < 1e30 else None  # type: ignore[arg-type]


def blank(value: object) -> bool:
    """Return whether a field says nothing."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def literal(text: str, reason: str) -> Any:
    """Read JSON text or a Python literal.

    Raises:
        FormatError: it is neither; with that reason.
    """
    try:
        return read_literal(text)
    except LiteralError as error:
        raise FormatError(reason, str(error)) from None


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


def read_react(text: str, unknown: list[str]) -> Iterator[tuple[Literal["step", "result"], str, ToolCall | None]]:
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
            call = read_call({"name": action, "arguments": literal(content, "arguments_not_json")}, unknown)
            yield "step", "\n".join(filter(None, words)), call
            words = []
        else:
            yield "result", content, None
        before = kind
    if before == "Action":
        raise FormatError("react_order", "Action without Action Input")
    if any(words):
        yield "step", "\n".join(filter(None, words)), None


def end_of_bracket(text: str, start: int) -> int | None:
    """Return the position behind the bracket that closes the one at `start`, strings passed over; None: it is not closed."""
    depth, at = 0, start
    while (found := _BRACKET_OR_STRING.search(text, at)) is not None:
        at = found.end()
        token = found[0]
        if len(token) == 1 and token in "([{":
            depth += 1
        elif len(token) == 1 and token in ")]}":
            depth -= 1
            if depth == 0:
                return at
    return None


_BRACKET_OR_STRING = re.compile(r"""[(\[{)\]}]|"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*'""", re.DOTALL)


def _hermes(text: str, unknown: list[str]) -> TextCalls:
    words: list[str] = []
    calls: list[ToolCall] = []
    end = 0
    while (found := _HERMES_OPEN.search(text, end)) is not None:
        stop = end_of_bracket(text, found.end())
        closed = None if stop is None else _HERMES_CLOSE.match(text, stop)
        if closed is None or stop is None:
            never = "</tool_call>" not in text[found.end() :]
            reason, what = ("call_never_closed", "never closed") if never else ("call_not_json", "no JSON")
            raise FormatError(reason, f"a call that <tool_call> opens is {what}")
        words.append(text[end : found.start()].strip())
        value = literal(text[found.end() : stop], "call_not_json")
        calls += [read_call(call, unknown) for call in (value if isinstance(value, list) else [value])]
        end = closed.end()
    words.append(text[end:].strip())
    return TextCalls("\n".join(filter(None, words)) or None, tuple(calls), words_after=any(words[1:]))


def _bare_calls(text: str, declared: Collection[str], unknown: list[str]) -> tuple[ToolCall, ...]:
    """Read a text that is nothing but JSON of calls of declared tools; () where it is anything else."""
    if text.strip()[:1] not in ("{", "["):
        return ()
    try:
        value = read_json(text.strip())
    except JsonRefused:
        return ()
    items = value if isinstance(value, list) else [value]
    if not all(
        isinstance(item, dict)
        and item.get("name") in declared
        and item.keys() <= _CALL_FIELDS
        and not {"arguments", "parameters"}.isdisjoint(item)
        for item in items
    ):
        return ()
    return tuple(read_call(item, unknown) for item in items)


def _pythonic_calls(text: str) -> tuple[ToolCall, ...]:
    """Read `[name(key=value, ...), ...]`; names may hold blanks. No code is run; () where it is none."""
    body = text.strip()
    if len(body) > _MAX_PYTHONIC_CHARACTERS:
        return ()
    calls: list[ToolCall] = []
    at, end = 1, len(body) - 1
    while body[at:end].strip(" \n\t,"):
        opening = body.find("(", at)
        name = body[at:opening].strip(" \n\t,")
        closing = end_of_bracket(body, opening) if opening >= 0 else None
        if not name or closing is None:
            return ()
        try:
            node = ast.parse(f"f{body[opening:closing]}", mode="eval").body
            assert isinstance(node, ast.Call)
            if node.args or any(keyword.arg is None for keyword in node.keywords):
                return ()
            arguments = {str(keyword.arg): _constant(keyword.value) for keyword in node.keywords}
            json.dumps(arguments, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, AssertionError):
            return ()
        calls.append(ToolCall(name, arguments))
        at = closing
        if body[at:end].strip() and not body[at:end].lstrip().startswith(","):
            return ()
    return tuple(calls)


def _constant(node: ast.expr) -> Json:
    """Return the value of a literal; `true`, `false` and `null` are JSON's."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    return ast.literal_eval(node)


def _arguments(arguments: object) -> dict[str, Json]:
    """Return the arguments of a call, an object or its JSON text, as an object."""
    value = arguments
    try:
        if isinstance(value, str):
            value = read_json(value.strip() or "{}")
        else:
            json.dumps(value, allow_nan=False)
    except (JsonRefused, TypeError, ValueError) as error:
        raise FormatError("arguments_not_json", str(error)) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FormatError("arguments_not_an_object", "the arguments of a call are no object with names")
    return value
