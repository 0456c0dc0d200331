"""Read calls: as objects of JSON or of a dialect of it, between tags, and as Python writes them.

One reader serves training data, predictions and references, so all agree on what a well-formed call is.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentft.data.literals import Json, JsonRefused, end_of_bracket, read_json, read_literal
from agentft.errors import FormatError

ARGUMENTS = ("arguments", "parameters", "args", "input")
"""What formats call the arguments of a call; more than one of them would be a guess."""
CALL_FIELDS = frozenset({"id", "type", "index", "function", "name", *ARGUMENTS})

Types = Mapping[tuple[str, str], tuple[str, ...]]
"""Schema types of parameters, by the names of tool and parameter."""

_CALL_TYPES = (None, "function", "tool_use", "tool_call")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of one tool."""

    name: str
    arguments: dict[str, Json]
    id: str | None = None
    extras: dict[str, Json] = field(default_factory=dict)
    """Fields that have no meaning here, `url` and `command` in MSAgent-Bench: not shown in other layouts, not scored."""


@dataclass(frozen=True, slots=True)
class CallFailure:
    """Why a call body is no request. A failure of the text, hence a value and not an exception."""

    reason: str
    """A stable snake_case code."""
    detail: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One span of a reply: what the model wrote where it meant to call."""

    source: str
    """The text between the marks."""
    requests: tuple[ToolCall, ...]
    """The calls in it, several if the span holds an array; empty if the span cannot be read."""
    failure: CallFailure | None


def blank(value: object) -> bool:
    """Return whether a field says nothing."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def read_id(value: object) -> str | None:
    """Return an id as text; whole numbers are ids too."""
    if isinstance(value, str):
        return value or None
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return f"{value:.0f}" if whole and not isinstance(value, bool) and abs(value) < 1e30 else None  # type: ignore[arg-type]


def read_call(call: object) -> ToolCall:
    """Read a call given as an object, its arguments as an object or JSON text; fields without a meaning are its extras.

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
    extras = {
        key if isinstance(key, str) else type(key).__name__: value
        for part in (call, function)
        for key, value in part.items()
        if key not in CALL_FIELDS and not blank(value)
    }
    given = [key for key in ARGUMENTS if function.get(key) is not None]
    if len(given) > 1 or (not given and extras):
        found = ", ".join(given or extras)[:80]
        raise FormatError("arguments_unclear", f"the arguments of {name[:40]!r} may be {found}")
    arguments = _arguments(function[given[0]] if given else {})
    return ToolCall(name, arguments, read_id(call.get("id")), extras)


def _arguments(value: object) -> dict[str, Json]:
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


def _items(value: Json) -> list[Json]:
    return value if isinstance(value, list) else [value]


class Bare(str):
    """A value that was written without quotes, so that its type must be known."""

    __slots__ = ()


def typed(text: str, types: Sequence[str]) -> Json:
    """Return a bare value as one of some types, in their order.

    Where none is known or fits it is what JSON reads, and else a text.
    """
    try:
        value = read_json(_PYTHON_WORDS.get(text.strip(), text))
    except JsonRefused:
        return str(text)
    if not types:
        return str(text) if isinstance(value, str) else value
    kind = _type_of(value)
    for each in types:
        if each == "string":
            return str(text)
        if each == kind or (each, kind) == ("number", "integer"):
            return value
        if (each, kind) == ("integer", "number") and value == int(value):
            return int(value)
    return str(value) if kind == "string" else value


def parameter_types(tools: Sequence[Mapping[str, Any]], calls: Sequence[ToolCall] = ()) -> dict[Any, tuple[str, ...]]:
    """Return the schema types of parameters; where no schema gives one, those of the values in known calls."""
    found: dict[Any, tuple[str, ...]] = {}
    for call in calls:
        for key, value in call.arguments.items():
            known = found.get((call.name, key), ())
            found[call.name, key] = tuple(dict.fromkeys((*known, _type_of(value))))
    for tool in tools:
        function = tool.get("function", tool)
        schema = function.get("parameters") if isinstance(function, Mapping) else None
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        for key, value in properties.items() if isinstance(properties, Mapping) else ():
            declared = _schema_types(value)
            if declared:
                # Of several that are declared, the one that is used comes first.
                used = found.get((function.get("name"), key), ())
                found[function.get("name"), key] = (*(t for t in used if t in declared), *declared)
    return found


def _type_of(value: Json) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _schema_types(schema: Json) -> tuple[str, ...]:
    """Return the types that a JSON schema allows, empty where it does not say."""
    if not isinstance(schema, dict):
        return ()
    declared = schema.get("type")
    found = [declared] if isinstance(declared, str) else [t for t in declared or () if isinstance(t, str)]
    for union in ("anyOf", "oneOf", "allOf"):
        found += [t for choice in schema.get(union) or () for t in _schema_types(choice)]
    if not found and isinstance(schema.get("enum"), list):
        found += map(_type_of, schema["enum"])
    if found and schema.get("nullable"):
        found.append("null")
    return tuple(dict.fromkeys(found))


Reader = Callable[[str, Mapping[str, Any], Callable[[str], Json]], list[Json | Attempt]]
"""Body, the template's `content_args`, reader of values -> what calls are made of, and attempts that failed.

Raises `JsonRefused` where nothing can be told apart.
"""


def _read_json_body(body: str, args: Mapping[str, Any], read_value: Callable[[str], Json]) -> list[Json | Attempt]:
    """Read JSON, or a dialect with other quotes or bare keys."""
    delims = args.get("string_delims", ())
    if delims or args.get("unquoted_keys"):
        quoted = "|".join(f"{re.escape(start)}(.*?){re.escape(end)}" for start, end in delims) or "(?!)"
        bare = (
            r"""(?<=[{,])(\s*)([^\s:{}\[\],"']+)(\s*:)|\b(None|True|False)\b"""
            if args.get("unquoted_keys")
            else "(?!)()()()()"
        )
        body = re.sub(f"{quoted}|{bare}", _as_json, body, flags=re.DOTALL)
    return _items(read_value(body)) if body.strip() else []


def _as_json(found: re.Match[str]) -> str:
    *strings, blanks, key, colon, word = found.groups()
    if word is not None:
        return _PYTHON_WORDS[word]
    if key is not None:
        return f"{blanks}{json.dumps(key)}{colon}"
    return json.dumps(next(each for each in strings if each is not None))


def _read_tags(body: str, args: Mapping[str, Any], _: Callable[[str], Json]) -> list[Json | Attempt]:
    """Read arguments between tags; a value ends at the close behind which only another argument or the end stands."""
    pattern = args["tag_pattern"]
    tag = re.compile(f"\\s*{pattern}(?=\\s*(?:\\Z|{opening_tag(args)}))", re.DOTALL)
    arguments: dict[str, Json] = {}
    position = 0
    while body[position:].strip():
        found = tag.match(body, position)
        if found is None:
            raise JsonRefused("what stands between the marks are no arguments")
        if found["key"] in arguments:
            raise JsonRefused(f"the key {found['key']!r} twice")
        arguments[found["key"]] = Bare(found["value"])
        position = found.end()
    return [arguments]


def opening_tag(args: Mapping[str, Any]) -> str:
    """Return the pattern of how an argument between tags begins."""
    return str(args["tag_pattern"]).split("(?P<key>")[0]


_NAME = r"""[^\s\[\](){}"'=<>,][^\[\](){}"'=<>,]*?"""
_CALL = re.compile(rf"({_NAME})\s*\(\s*")
_KEY = re.compile(r"(\w+)\s*=\s*")
_END_OF_LIST = re.compile(r"\s*\]\s*\Z")
_END_OF_CALL = re.compile(rf"(?<=\))\s*,\s*|,\s*(?={_NAME}\s*\()|\s*(?=\]\s*\Z)")
_BARE = re.compile(r"[^,()\[\]{}'\"\s]+")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_RAW = re.compile(r"""'.*?'(?=\s*(?:,\s*\w+\s*=|\)\s*(?:\]\s*\Z|,)))|"[^"]*\"""", re.DOTALL)
_MAX_PYTHON_CHARACTERS = 100_000


def read_python(body: str, args: Mapping[str, Any], _: object = None) -> list[Json | Attempt]:
    """Read a list of calls as Python writes it: `[name(key='text', other=1)]`. No code is run.

    A call that cannot be read is an attempt beside the others.

    Raises:
        JsonRefused: it is no list, or one too long to be read.
    """
    if len(body) > _MAX_PYTHON_CHARACTERS:
        raise JsonRefused(f"a list of calls of {len(body):,} characters")
    calls: list[Json | Attempt] = []
    position = _skip(body, 0, r"\s*\[\s*")
    while _END_OF_LIST.match(body, position) is None:
        start = position
        try:
            call, position = _python_call(body, start, escapes=args.get("escapes", True))
            calls.append(call)
        except JsonRefused as refusal:
            ended = _END_OF_CALL.search(body, start)
            if ended is None:
                raise
            position = ended.end()
            calls.append(Attempt(body[start : ended.start()], (), CallFailure("call_not_json", str(refusal))))
    return calls


def _python_call(body: str, start: int, *, escapes: bool) -> tuple[Json, int]:
    name = _CALL.match(body, start)
    if name is None:
        raise JsonRefused(f"no call as Python writes it, at character {start}")
    arguments: dict[str, Json] = {}
    position = name.end()
    while (key := _KEY.match(body, position)) is not None:
        if key[1] in arguments:
            raise JsonRefused(f"the key {key[1]!r} twice")
        arguments[key[1]], position = _python_value(body, key.end(), escapes=escapes)
        position = _skip(body, position, r"\s*(?:,\s*|(?=\)))")
    position = _skip(body, position, r"\s*\)\s*(?:,\s*|(?=\]))")
    return {"name": name[1], "arguments": arguments}, position


def _python_value(body: str, start: int, *, escapes: bool) -> tuple[Json, int]:
    if (quoted := (_QUOTED if escapes else _RAW).match(body, start)) is not None:
        if not escapes:
            return quoted[0][1:-1], quoted.end()
        try:
            return ast.literal_eval(quoted[0].replace("\n", "\\n").replace("\r", "\\r")), quoted.end()
        except (ValueError, SyntaxError) as error:
            raise JsonRefused(str(error)) from None
    bare = _BARE.match(body, start)
    end = bare.end() if bare is not None else end_of_bracket(body, start) if body[start : start + 1] in "([{" else None
    if end is None:
        raise JsonRefused("an argument without a value")
    return read_literal(body[start:end]), end


def _skip(body: str, position: int, pattern: str) -> int:
    found = re.compile(pattern).match(body, position)
    if found is None:
        raise JsonRefused(f"no call as Python writes it, at character {position}")
    return found.end()


READERS: dict[str, Reader] = {"json": _read_json_body, "xml-inline": _read_tags, "python": read_python}
"""Of the contents that a response template may name."""
