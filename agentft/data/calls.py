"""Read values and calls that arrive as text: JSON, Python literals, and calls as families of models write them.

Nothing is ever evaluated. A Python literal goes to `ast.literal_eval` only when it is short enough, flat enough and made of
literal tokens alone. One reader serves training data, predictions and references, so all agree on what a well-formed call is.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentft.errors import FormatError

Json = Any
"""A value as `json.loads` returns it."""

MAX_JSON_DEPTH = 200
"""Deeper nesting is refused before parsing: the stock parser raises RecursionError near 1,000 levels."""

MAX_LITERAL_CHARACTERS = 4 * 1024 * 1024
"""Longer Python literals are refused: parsing takes about thirty times their size in memory."""

MAX_LITERAL_DEPTH = 40
MAX_PYTHON_CALL_CHARACTERS = 100_000

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_BRACKET_OR_STRING = re.compile(r"""[(\[{)\]}]|"[^"\\]*(?:\\.[^"\\]*)*"?|'[^'\\]*(?:\\.[^'\\]*)*'?""", re.DOTALL)
"""A string may be open: a pattern that must find the end would look for it again from every quote."""
_STRING = r"""(?:'[^'\\\n]*(?:\\.[^'\\\n]*)*'|"[^"\\\n]*(?:\\.[^"\\\n]*)*")"""
_LITERAL_TOKENS = re.compile(
    rf"(?:{_STRING}|[\[\]{{}}(),:\s]|(?:None|True|False)\b|-?\d[\d.]*(?:[eE][+-]?\d+)?(?![\w.]))*+", re.DOTALL
)
_TURN = re.compile(r"\{'from': ('[^'\\\n]*'), 'value': (" + _STRING + r")\}(, |\]\Z)", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


class JsonRefused(ValueError):  # noqa: N818
    """The text is no JSON document, nor a Python literal where one may stand, under the limits of this module."""


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
class Call:
    """What was written as a call: one request, several (a JSON list), or a text that cannot be read."""

    source: str
    """The exact text; in a part of MSAgent text the marks are included."""
    requests: tuple[ToolCall, ...]
    failure: CallFailure | None


@dataclass(frozen=True, slots=True)
class Said:
    """One step, taken apart."""

    pieces: tuple[str | Call, ...]
    """Texts and calls in their order, nothing stripped."""
    reasoning: str = ""
    thought: bool | None = None
    """Every thought was opened and closed; None: there is none."""

    @property
    def text(self) -> str:
        """The texts, trimmed and joined by line breaks."""
        return "\n".join(piece.strip() for piece in self.pieces if isinstance(piece, str) and piece.strip())

    @property
    def attempts(self) -> tuple[Call, ...]:
        """Return what was meant as calls, in order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Call))

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that can be read."""
        return tuple(call for attempt in self.attempts for call in attempt.requests)

    @property
    def failures(self) -> tuple[CallFailure, ...]:
        """Return why the others cannot."""
        return tuple(attempt.failure for attempt in self.attempts if attempt.failure is not None)

    @property
    def words_after_call(self) -> bool:
        """Return whether words stand behind a call."""
        texts = [isinstance(piece, str) for piece in self.pieces if not isinstance(piece, str) or piece.strip()]
        return False in texts and any(texts[texts.index(False) :])


def strip_fence(text: str) -> str:
    """Return `text` without a surrounding Markdown code fence; the fence may be absent or lack its end."""
    text = text.strip()
    if not text.startswith("```"):
        return text
    inner = text[3:].removesuffix("```").lstrip(" \t")
    return inner[4 if inner[:4].lower() == "json" else 0 :].strip()


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
    if _SURROGATE_ESCAPE.search(text) and not is_encodable(json.dumps(value, ensure_ascii=False)):
        raise JsonRefused("a lone surrogate: cannot be written as UTF-8")
    return value


def is_json(text: str) -> bool:
    """Return whether `read_json` reads a text."""
    try:
        read_json(text)
    except JsonRefused:
        return False
    return True


def json_depth(text: str) -> int:
    """Return how deeply the brackets of a text are nested; 0 where there are too few of them for `MAX_JSON_DEPTH`."""
    if text.count("[") + text.count("{") <= MAX_JSON_DEPTH:
        return 0
    return max((depth for depth, _ in _brackets(text, 0)), default=0)


def end_of_bracket(text: str, start: int) -> int | None:
    """Return the position behind the bracket that closes the one at `start`, strings passed over; None: it is not closed."""
    return next((end for depth, end in _brackets(text, start) if depth == 0), None)


def _brackets(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Yield the depth after each bracket outside of strings, and the position behind it."""
    depth = 0
    for found in _BRACKET_OR_STRING.finditer(text, start):
        if found[0] in ("(", "[", "{"):
            depth += 1
        elif found[0] in (")", "]", "}"):
            depth -= 1
        else:
            continue
        yield depth, found.end()


def _refuse_constant(name: str) -> Json:
    raise JsonRefused(f"{name} is no JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JsonRefused(f"{digits[:40]} is beyond the numbers that can be held")
    return value


def _distinct_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) < len(pairs):
        _refuse_key_twice([key for key, _ in pairs])
    return made


def _refuse_key_twice(keys: Sequence[object]) -> None:
    raise JsonRefused(f"the key {str(max(keys, key=keys.count))[:40]!r} is given twice")


_DECODER = json.JSONDecoder(
    strict=False, parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_distinct_keys
)


def is_encodable(text: str) -> bool:
    """Return whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def read_literal(text: str) -> Any:
    """Read JSON text, or else a Python literal; raise JsonRefused where it is neither of both, or over a limit."""
    if (turns := _read_turns_repr(text)) is not None:
        return turns
    try:
        return read_json(text)
    except JsonRefused as error:
        not_json = str(error)
    if len(text) > MAX_LITERAL_CHARACTERS:
        raise JsonRefused(f"no JSON ({not_json}), and {len(text):,} characters are too many for a Python literal")
    # Names, operators, prefixes and deep nesting never reach the parser: it can exhaust the C stack.
    tokens = _LITERAL_TOKENS.match(text)
    end = tokens.end() if tokens is not None else 0
    if end < len(text):
        raise JsonRefused(f"neither JSON ({not_json}) nor a literal: {text[end : end + 40]!r} at character {end}")
    if any(depth > MAX_LITERAL_DEPTH for depth, _ in _brackets(text, 0)):
        raise JsonRefused(f"nested deeper than {MAX_LITERAL_DEPTH} levels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a `\d` in a string is a SyntaxWarning, not worth a line per record
            parsed = ast.parse(text.strip(), mode="eval")
            for node in ast.walk(parsed):
                keys = (
                    [key.value for key in node.keys if isinstance(key, ast.Constant)]
                    if isinstance(node, ast.Dict)
                    else []
                )
                if len(set(keys)) < len(keys):
                    _refuse_key_twice(keys)
            # As JSON: a tuple is a list, and a number as a key is its digits.
            return json.loads(json.dumps(ast.literal_eval(parsed), allow_nan=False))
    except JsonRefused:
        raise
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise JsonRefused(f"neither JSON ({not_json}) nor a Python literal ({type(error).__name__})") from None


def literal(text: str, reason: str) -> Any:
    """Read JSON text or a Python literal; raise FormatError with the `reason` where it is neither."""
    try:
        return read_literal(text)
    except JsonRefused as error:
        raise FormatError(reason, str(error)) from None


def _read_turns_repr(text: str) -> list[dict[str, str]] | None:
    """Return the list of turns written by `repr`, five times as fast as by its syntax tree; None: it is written otherwise."""
    if not text.startswith("[{'from': "):
        return None
    turns: list[dict[str, str]] = []
    position = 1
    while (match := _TURN.match(text, position)) is not None:
        try:
            value = _ESCAPE.sub(lambda found: _ESCAPES[found[1]], match[2][1:-1])
        except KeyError:  # an escape that `repr` rarely writes
            return None
        turns.append({"from": match[1][1:-1], "value": value})
        position = match.end()
    return turns if position == len(text) and text.endswith("]") else None


def kind_of(value: Json) -> str:
    """Return what a value is, for a message about it."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


ARGUMENTS = ("arguments", "parameters", "args", "input")
"""What formats call the arguments of a call; more than one of them would be a guess."""
CALL_FIELDS = frozenset({"id", "type", "index", "function", "name", *ARGUMENTS})

Types = Mapping[tuple[str, str], tuple[str, ...]]
"""Schema types of parameters, by the names of tool and parameter."""

PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


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
    """Read a call given as an object, arguments as an object or JSON text; raise FormatError where they cannot be told."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise FormatError("call_not_an_object", "a call is no object with name and arguments")
    if call.get("type") not in (None, "function", "tool_use", "tool_call"):
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


class Bare(str):
    """A value that was written without quotes, so that its type must be known."""

    __slots__ = ()


def typed(text: str, types: Sequence[str]) -> Json:
    """Return a bare value as the first of some types that it can be, else as what JSON reads in it, else as text."""
    try:
        value = read_json(PYTHON_WORDS.get(text.strip(), text))
    except JsonRefused:
        return str(text)
    kind = _type_of(value)
    for each in types or (kind,):
        if each == "string":
            return str(text)
        if each == kind or (each, kind) == ("number", "integer"):
            return value
        if (each, kind) == ("integer", "number") and value == int(value):
            return int(value)
    return str(value) if kind == "string" else value


def parameter_types(tools: Sequence[Mapping[str, Any]], calls: Sequence[ToolCall] = ()) -> dict[Any, tuple[str, ...]]:
    """Return the types of parameters: those of the values in known calls first, then those of the schema."""
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
                # The one that is used comes first, even against the schema: what was said is read back as it was said.
                used = found.get((function.get("name"), key), ())
                found[function.get("name"), key] = (*(t for t in used if t in declared), *used, *declared)
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


Reader = Callable[[str, Mapping[str, Any], Callable[[str], Json]], list[Json | Call]]
"""Body, the template's `content_args`, reader of values -> what calls are made of, and attempts that failed.

Raises `JsonRefused` where nothing can be told apart.
"""


def _read_json_body(body: str, args: Mapping[str, Any], read_value: Callable[[str], Json]) -> list[Json | Call]:
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
    value = read_value(body) if body.strip() else []
    return value if isinstance(value, list) else [value]


def _as_json(found: re.Match[str]) -> str:
    *strings, blanks, key, colon, word = found.groups()
    if word is not None:
        return PYTHON_WORDS[word]
    if key is not None:
        return f"{blanks}{json.dumps(key)}{colon}"
    return json.dumps(next(each for each in strings if each is not None))


def _read_tags(body: str, args: Mapping[str, Any], _: Callable[[str], Json]) -> list[Json | Call]:
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


def read_python(body: str, args: Mapping[str, Any], _: object = None) -> list[Json | Call]:
    """Read a list of calls such as `[name(key='text', other=1)]`, running no code; raise JsonRefused where it is no list."""
    if len(body) > MAX_PYTHON_CALL_CHARACTERS:
        raise JsonRefused(f"a list of calls of {len(body):,} characters")
    calls: list[Json | Call] = []
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
            calls.append(Call(body[start : ended.start()], (), CallFailure("call_not_json", str(refusal))))
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
    quoted = (_QUOTED if escapes else _RAW).match(body, start)
    if quoted is not None and not escapes:
        return quoted[0][1:-1], quoted.end()
    if quoted is not None:
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
