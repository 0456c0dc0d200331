"""The body of an agent call: JSON between the think marks, read into requests or into a named failure.

One reader serves the training data and the scoring of predictions, so both agree on what a well-formed call is.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

Json = Any
"""A value as `json.loads` returns it."""

MAX_JSON_DEPTH = 200
"""Deeper nesting is refused before parsing: the stock parser raises RecursionError near 1,000 levels."""

MAX_INTEGER_DIGITS = 4300
"""CPython's own limit for int(str); longer integers are refused instead of raised from inside the parser."""

CallFailureReason = Literal[
    "empty", "not_json", "not_an_object", "no_name", "parameters_not_an_object", "unclosed", "not_read"
]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of one tool."""

    name: str
    arguments: dict[str, Json]
    id: str | None = None
    extras: dict[str, Json] = field(default_factory=dict)
    """Fields beside name and arguments, `url` and `command` in MSAgent-Bench: kept, not scored."""


@dataclass(frozen=True, slots=True)
class CallFailure:
    """Why a call body is no request. A failure of the text, hence a value and not an exception."""

    reason: CallFailureReason
    detail: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One span of a reply: what the model wrote where it meant to call."""

    source: str
    """The text between the marks."""
    requests: tuple[ToolCall, ...]
    """The calls in it, several if the span holds an array; empty if the span cannot be read."""
    failure: CallFailure | None


class JsonRefused(ValueError):  # noqa: N818
    """The text is no JSON document under the limits of this module."""


def strip_fence(text: str) -> str:
    """Return `text` without a surrounding Markdown code fence; the fence may be absent or lack its end."""
    text = text.strip()
    if not text.startswith("```"):
        return text
    end = len(text) - 3 if len(text) >= 6 and text.endswith("```") else len(text)
    start = 3
    while start < end and text[start] in " \t":
        start += 1
    if text[start : start + 4].lower() == "json":
        start += 4
    return text[start:end].strip()


def read_json(text: str) -> Json:
    """Parse one JSON document, allowing raw control characters inside strings (genuine references hold them).

    Raises:
        JsonRefused: not JSON, NaN, Infinity or a number beyond it, deeper than `MAX_JSON_DEPTH`, a number too long to
            hold, a key given twice, or half of a surrogate pair (escaped, it is legal JSON and yet no text).
    """
    if json_depth(text) > MAX_JSON_DEPTH:
        raise JsonRefused(f"nested deeper than {MAX_JSON_DEPTH} levels")
    try:
        value = _DECODER.decode(text)
    except JsonRefused:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonRefused(str(error)) from None
    if _SURROGATE_ESCAPE.search(text) is not None and _holds_surrogate(value):
        raise JsonRefused("a lone surrogate: cannot be written as UTF-8")
    return value


def read_call_body(body: str) -> tuple[ToolCall, ...] | CallFailure:
    """Read what stands between the think marks: one request object or a list of them, fenced or not."""
    text = strip_fence(body)
    if not text:
        return CallFailure("empty", "nothing between the marks")
    try:
        value = read_json(text)
    except JsonRefused as error:
        return CallFailure("not_json", str(error))
    items = value if isinstance(value, list) else [value]
    if not items:
        return CallFailure("empty", "an empty list of calls")
    requests: list[ToolCall] = []
    for item in items:
        request = read_request(item)
        if isinstance(request, CallFailure):
            return request
        requests.append(request)
    return tuple(requests)


def read_request(item: Json, name_key: str = "api_name", arguments_key: str = "parameters") -> ToolCall | CallFailure:
    """Read one call; fields beside name and arguments become its extras."""
    if not isinstance(item, dict):
        return CallFailure(
            "not_an_object", f"a call is an object with {name_key} and {arguments_key}, found {_kind(item)}"
        )
    name = item.get(name_key)
    if not isinstance(name, str) or not name.strip():
        return CallFailure("no_name", f"{name_key} is {_kind(name)}, expected a non-empty string")
    # The runtime of the original reads a call without parameters as a call with none.
    parameters = item.get(arguments_key, {})
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        return CallFailure("parameters_not_an_object", f"{arguments_key} is {_kind(parameters)}, expected an object")
    extras = {key: value for key, value in item.items() if key not in (name_key, arguments_key)}
    return ToolCall(name, parameters, extras=extras)


def _kind(value: Json) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null or absent"}
    return names.get(type(value), "a number")


_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def json_depth(text: str) -> int:
    """How deeply the brackets of a JSON text are nested; 0 where there are too few of them for `MAX_JSON_DEPTH`."""
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:
        return 0
    deepest = depth = 0
    for token in _STRING_OR_BRACKET.findall(text):
        if token in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in "]}":
            depth -= 1
    return deepest


def _refuse_constant(name: str) -> Json:
    raise JsonRefused(f"{name} is no JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise JsonRefused(f"an integer of {len(digits)} digits")
    return int(digits)


def _holds_surrogate(value: Json) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JsonRefused(f"{digits[:40]} is beyond the numbers that can be held")
    return value


def _distinct_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise JsonRefused(f"the key {max(keys, key=keys.count)[:40]!r} is given twice")
    return made


_DECODER = json.JSONDecoder(
    strict=False,
    parse_constant=_refuse_constant,
    parse_int=_bounded_int,
    parse_float=_finite_float,
    object_pairs_hook=_distinct_keys,
)
