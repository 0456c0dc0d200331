"""Cut what an agent says at one step into reasoning, text and calls, by a response template.

Response templates are those of transformers (`tokenizer.response_template`), read by a splitter that loses nothing: what
stands in no region is text, a call that cannot be read stays beside the others, and a close mark inside a value closes
nothing. Those of `agentft/data/responses` know more keys of a call: `head_pattern` and `tail_pattern` stand around its
arguments, `results` begins what only a tool can say, and the content `python` is a list of calls as Python writes them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby, islice
from typing import Any, Literal, NamedTuple

from agentft.data.grammar import (
    MAX_CLOSING_MARKS_TRIED,
    Attempt,
    CallFailure,
    Json,
    JsonRefused,
    ToolCall,
    read_json,
    read_request,
)

CallBody = tuple[ToolCall, ...] | CallFailure
Types = Mapping[tuple[str, str], tuple[str, ...]]
"""Schema types of parameters, by the names of tool and parameter."""

LETTERS = "\ufdd2"
"""Stands behind the first character of letters that spell a control token, see `said_text`. A noncharacter."""

_ROLES: dict[str, Literal["reasoning", "text", "call"]] = {
    "reasoning_content": "reasoning",
    "thinking": "reasoning",
    "content": "text",
    "tool_calls": "call",
}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_BLANKS = re.compile(r"\s*")
_PLACE = re.compile(r"\{(\w+)(?:\.(\w+))?\}")


class TemplateUnknown(ValueError):  # noqa: N818
    """A response template of a form that is not known here."""


@dataclass(frozen=True, slots=True)
class Said:
    """One step, taken apart."""

    pieces: tuple[str | Attempt, ...]
    """Texts and calls in their order, nothing stripped."""
    reasoning: str = ""
    thought: bool | None = None
    """Every thought was opened and closed; None: there is none."""

    @property
    def text(self) -> str:
        """The texts, trimmed and joined by line breaks."""
        return "\n".join(piece.strip() for piece in self.pieces if isinstance(piece, str) and piece.strip())

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that can be read."""
        return tuple(call for piece in self.pieces if isinstance(piece, Attempt) for call in piece.requests)


class Region(NamedTuple):
    """A part of a step between marks, or outside of them."""

    role: Literal["reasoning", "text", "call"]
    body: str
    closed: bool = True
    read: CallBody = ()
    marked: bool = False
    """Marks stand around it."""


@dataclass(frozen=True, slots=True)
class _Field:
    role: Literal["reasoning", "text", "call"]
    open: re.Pattern[str]
    close: re.Pattern[str] | None
    """None: to the end of its JSON value, or of the step."""
    read: Callable[[str, Mapping[str, str], Types], CallBody]
    head: re.Pattern[str] | None
    narrow: bool
    """A body that holds the mark of another call is none: its strings have no quotes that would tell."""
    results: re.Pattern[str] | None


@dataclass(frozen=True, slots=True)
class ResponseTemplate:
    """A way to write reasoning, text and calls."""

    name: str
    fields: tuple[_Field, ...]
    anchor: re.Pattern[str] | None = None
    """Begins what the agent says, unless the prompt ends with it."""

    @classmethod
    def of(cls, name: str, spec: Mapping[str, Any]) -> ResponseTemplate:
        """Read a response template.

        Raises:
            TemplateUnknown: it has a field, a content or a pattern that is not known.
        """
        try:
            read = [_field(key, field) for key, field in spec["fields"].items()]
            anchor = _anchor(spec, "start_anchor")
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            raise TemplateUnknown(f"response template {name}: {error}") from None
        return cls(name, tuple(field for field in read if field is not None), anchor)

    def read(self, text: str, prompt: str = "", types: Types | None = None) -> Said:
        """Take one step apart.

        Args:
            text: What the agent said, without its stop.
            prompt: The end of the prompt, which may have opened a region.
            types: Schema types of parameters, for families that write strings without quotes.
        """
        pieces: list[str | Attempt] = []
        thoughts: list[str] = []
        thought: bool | None = None
        for region in self.split(text, prompt, types or {}):
            body = region.body.replace(LETTERS, "")
            if region.role == "reasoning":
                thoughts.append(body)
                thought = region.closed and thought is not False
            elif region.role == "text":
                pieces.append(body)
                if not region.marked and any(f.role == "reasoning" and _closes(f, region.body) for f in self.fields):
                    thought = False
            elif isinstance(region.read, CallFailure):
                pieces.append(Attempt(body, (), region.read))
            else:
                pieces.append(Attempt(body, region.read, None))
        if not "".join(thoughts).strip() and thought:
            thought = None
        return Said(tuple(pieces), "\n".join(each.strip() for each in thoughts if each.strip()), thought)

    def split(self, text: str, prompt: str, types: Types) -> Iterator[Region]:
        """Cut a step into its regions, in order; with the marks between them they are the text."""
        begun = self.anchor.match(text) if self.anchor is not None else None
        position = outside = begun.end() if begun is not None else 0
        said = called = False
        closes = (f.close for f in self.fields if f.role == "call" and f.close is not None)
        last = max((match.start() for close in closes for match in close.finditer(text)), default=-1)
        field = next((f for f in self.fields if _ends_with(f.open, prompt)), None)
        if field is not None:
            again = field.open.match(text, position)
            region, position = self._region(field, text, again.end() if again else position, {}, types, last)
            yield region
            outside = position
        while (found := self._next(text, position, thinks=not said)) is not None:
            field, match = found
            between = text[outside : match.start()]
            if called and (invented := _results(self.fields, between)) is not None:
                yield Region("text", between[:invented])
                return
            if between:
                said = said or bool(between.strip())
                yield Region("text", between)
            region, position = self._region(field, text, match.end(), match.groupdict(), types, last)
            called = called or field.role == "call"
            yield region
            outside = position
            if position == match.start() == match.end():
                break  # an empty region of no width would open again
        rest = text[outside:]
        if called and (invented := _results(self.fields, rest)) is not None:
            rest = rest[:invented]
        if rest:
            yield Region("text", rest)

    def _next(self, text: str, position: int, *, thinks: bool) -> tuple[_Field, re.Match[str]] | None:
        """Find the next region. A thought comes before all text, so that a text may name its mark."""
        blanks = _BLANKS.match(text, position)
        begin = blanks.end() if blanks is not None else position
        found = []
        for field in self.fields:
            if field.role != "reasoning":
                match = field.open.search(text, position)
            else:
                match = (field.open.match(text, position) or field.open.match(text, begin)) if thinks else None
            if match is not None:
                found.append((field, match))
        return min(found, key=lambda each: (each[1].start(), -each[1].end()), default=None)

    def _region(
        self, field: _Field, text: str, start: int, captures: Mapping[str, str], types: Types, last: int
    ) -> tuple[Region, int]:
        """Read the region that begins at `start`; return it and where the text goes on. `last` is the last close of a call."""
        if field.role != "call":
            found = field.close.search(text, start) if field.close is not None else None
            stop, end = found.span() if found is not None else (len(text), len(text))
            return Region(field.role, text[start:stop], found is not None or field.close is None, marked=True), end
        if field.close is None:
            stop = _end_of_json(text, field.head.match(text, start) if field.head is not None else None, start)
            return Region("call", text[start:stop], True, field.read(text[start:stop], captures, types), True), stop
        again = next((m.start() for m in field.open.finditer(text, start) if m.end() > m.start()), len(text))
        failure = None
        found_closes = field.close.finditer(text, start) if start <= last else iter(())
        closes = list(islice(found_closes, MAX_CLOSING_MARKS_TRIED))
        for close in closes:
            if field.narrow and close.start() > again:
                break
            body = text[start : close.start()]
            read = field.read(body, captures, types)
            if not isinstance(read, CallFailure):
                return Region("call", body, True, read, True), close.end()
            failure = failure or read
        # No close makes a call of it: it ends at the first one, or where the next call begins.
        stop, end = closes[0].span() if closes else (len(text), len(text))
        if again < stop or failure is None:
            stop = end = min(again, len(text))
            failure = CallFailure("unclosed", "no mark after the call")
        return Region("call", text[start:stop], True, failure, True), end


def our_templates() -> Iterator[ResponseTemplate]:
    """Yield the response templates of the package."""
    for file in sorted(files("agentft.data").joinpath("responses").iterdir(), key=lambda file: file.name):
        yield ResponseTemplate.of(file.name.removesuffix(".json"), json.loads(file.read_text(encoding="utf-8")))


@cache
def thought_template() -> ResponseTemplate:
    """Return the response template that tells a thought from all else, as in the layout `msagent`."""
    return next(template for template in our_templates() if template.name == "text")


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


def said_text(ids: Sequence[int], tokenizer: Any, control: Mapping[int, str]) -> str:
    """Decode what was said; behind the first character of letters that spell a control token stands `LETTERS`.

    Args:
        control: Control tokens by their ids.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    spelt = {token: text.count(token) for token in set(control.values()) if token in text}
    for token in map(control.get, ids):
        if token in spelt:
            spelt[token] -= 1
    if not any(spelt.values()):
        return text
    pattern = re.compile("|".join(map(re.escape, sorted(spelt, key=len, reverse=True))))
    letters: list[bool] = []
    for is_control, members in groupby(ids, control.__contains__):
        run = list(members)
        if is_control:
            letters += [False for each in run if control[each] in spelt]
        else:
            letters += [True] * len(pattern.findall(tokenizer.decode(run, skip_special_tokens=False)))
    flags = iter(letters)
    return pattern.sub(lambda m: m[0][0] + LETTERS + m[0][1:] if next(flags, False) else m[0], text)


def _field(key: str, spec: Mapping[str, Any]) -> _Field | None:
    """Read one field; None for the one that holds what stands in no other."""
    role = _ROLES[key]
    opening, closing = _anchor(spec, "open"), _anchor(spec, "close")
    if opening is None:
        return None
    head, tail, results = (
        re.compile(spec[name], re.DOTALL) if name in spec else None
        for name in ("head_pattern", "tail_pattern", "results")
    )
    args, transform = spec.get("content_args", {}), spec.get("transform")
    reader = _READERS[spec.get("content", "text")] if role == "call" else None

    def read(body: str, captures: Mapping[str, str], types: Types) -> CallBody:
        if head is not None:
            begun = head.match(body)
            if begun is None:
                return CallFailure("no_name", "the call does not begin as a call of this family")
            captures, body = {**captures, **begun.groupdict()}, body[begun.end() :]
        if tail is not None:
            ended = re.search(f"(?:{tail.pattern})\\Z", body, re.DOTALL)
            if ended is None:
                return CallFailure("not_json", "the call does not end as a call of this family")
            body = body[: ended.start()]
        assert reader is not None
        try:
            found = [_call(_without_letters(item), captures, transform, types) for item in reader(body, args)]
        except JsonRefused as refusal:
            return CallFailure("not_json", str(refusal))
        failed = next((each for each in found if isinstance(each, CallFailure)), None)
        if failed is not None or not found:
            return failed or CallFailure("empty", "no call between the marks")
        return tuple(each for each in found if isinstance(each, ToolCall))

    return _Field(role, opening, closing, read, head, spec.get("content") == "xml-inline", results)


def _anchor(spec: Mapping[str, Any], key: str) -> re.Pattern[str] | None:
    if f"{key}_pattern" in spec:
        return re.compile(spec[f"{key}_pattern"], re.DOTALL)
    if key not in spec:
        return None
    texts = [spec[key]] if isinstance(spec[key], str) else spec[key]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _ends_with(pattern: re.Pattern[str], prompt: str) -> bool:
    """Say whether a prompt ends with a mark, and with blanks at most behind it."""
    return any(m.end() > m.start() and not prompt[m.end() :].strip() for m in pattern.finditer(prompt))


def _closes(field: _Field, text: str) -> bool:
    return field.close is not None and any(found.group() for found in field.close.finditer(text))


def _results(fields: Sequence[_Field], text: str) -> int | None:
    """Return where a text goes on with what only a tool says."""
    found = (match.start() for f in fields if f.results is not None and (match := f.results.search(text)) is not None)
    return next(found, None)


def _end_of_json(text: str, head: re.Match[str] | None, start: int) -> int:
    begin = head.end() if head is not None else start
    begin += len(text[begin:]) - len(text[begin:].lstrip())
    try:
        return _ANY_JSON.raw_decode(text, begin)[1]
    except (ValueError, RecursionError):
        return len(text)


def _call(item: Json, captures: Mapping[str, str], transform: Json, types: Types) -> ToolCall | CallFailure:
    """Make the call that a template's `transform` makes of a value."""
    scope = {**captures, **(item if isinstance(item, dict) else {}), "content": item}
    function = transform.get("function", transform) if isinstance(transform, dict) else "{content}"
    if isinstance(function, str):
        function = _filled(function, scope)
        if isinstance(function, dict) and isinstance(function.get("function"), dict):
            function = function["function"]
    elif isinstance(function, dict):
        function = {key: _filled(value, scope) for key, value in function.items()}
    call = read_request(function, "name", "arguments")
    if isinstance(call, CallFailure):
        return call
    typed = {
        k: _typed(v, types.get((call.name, k), ())) if isinstance(v, _Bare) else v for k, v in call.arguments.items()
    }
    return ToolCall(call.name.strip(), typed)


def _filled(value: Json, scope: Mapping[str, Json]) -> Json:
    place = _PLACE.fullmatch(value) if isinstance(value, str) else None
    if place is None:
        return value
    found = scope.get(place[1])
    return (
        found
        if place[2] is None
        else found.get(place[2], {} if place[2] != "name" else None)
        if isinstance(found, dict)
        else None
    )


def _without_letters(value: Json) -> Json:
    """Return a value without the signs behind letters that spell a control token."""
    if isinstance(value, str):
        return type(value)(value.replace(LETTERS, ""))
    if isinstance(value, dict):
        return {key.replace(LETTERS, ""): _without_letters(each) for key, each in value.items()}
    return [_without_letters(each) for each in value] if isinstance(value, list) else value


class _Bare(str):
    """A value that was written without quotes, so that its type must be known."""

    __slots__ = ()


def _typed(text: str, types: Sequence[str]) -> Json:
    """Return a bare value as one of some types, in their order; as a text where none fits.

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


def _items(value: Json) -> list[Json]:
    return value if isinstance(value, list) else [value]


def _read_json_body(body: str, args: Mapping[str, Any]) -> list[Json]:
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
    if not body.strip():
        return []
    return _items(read_json(body))


def _as_json(found: re.Match[str]) -> str:
    *strings, blank, key, colon, word = found.groups()
    if word is not None:
        return _PYTHON_WORDS[word]
    if key is not None:
        return f"{blank}{json.dumps(key)}{colon}"
    return json.dumps(next(each for each in strings if each is not None))


def _read_tags(body: str, args: Mapping[str, Any]) -> list[Json]:
    """Read arguments between tags; a value ends at the close behind which only another argument or the end stands."""
    pattern = args["tag_pattern"]
    opening = pattern.split("(?P<key>")[0]
    tag = re.compile(f"\\s*{pattern}(?=\\s*(?:\\Z|{opening}))", re.DOTALL)
    arguments: dict[str, Json] = {}
    position = 0
    while body[position:].strip():
        found = tag.match(body, position)
        if found is None:
            raise JsonRefused("what stands between the marks are no arguments")
        if found["key"] in arguments:
            raise JsonRefused(f"the key {found['key']!r} twice")
        arguments[found["key"]] = _Bare(found["value"])
        position = found.end()
    return [arguments]


def _read_python(body: str, args: Mapping[str, Any]) -> list[Json]:
    """Read a list of calls as Python writes it: `[name(key='text', other=1)]`."""
    string = re.compile(
        r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""" if args.get("escapes", True) else _RAW_STRING, re.DOTALL
    )
    calls: list[Json] = []
    position = _skip(body, 0, r"\s*\[\s*")
    while (name := re.compile(r"([\w.-]+)\(\s*").match(body, position)) is not None:
        arguments: dict[str, Json] = {}
        position = name.end()
        while (key := re.compile(r"(\w+)\s*=\s*").match(body, position)) is not None:
            if key[1] in arguments:
                raise JsonRefused(f"the key {key[1]!r} twice")
            arguments[key[1]], position = _python_value(body, key.end(), string, escapes=args.get("escapes", True))
            position = _skip(body, position, r"\s*(?:,\s*|(?=\)))")
        position = _skip(body, position, r"\s*\)\s*(?:,\s*)?")
        calls.append({"name": name[1], "arguments": arguments})
    _skip(body, position, r"\s*\]\s*\Z")
    return calls


_RAW_STRING = r"""'.*?'(?=\s*(?:,\s*\w+\s*=|\)\s*(?:\]\s*\Z|,)))|"[^"]*\""""


def _python_value(body: str, start: int, string: re.Pattern[str], *, escapes: bool) -> tuple[Json, int]:
    if (quoted := string.match(body, start)) is not None:
        if not escapes:
            return quoted[0][1:-1], quoted.end()
        try:
            return ast.literal_eval(quoted[0].replace("\n", "\\n").replace("\r", "\\r")), quoted.end()
        except (ValueError, SyntaxError) as error:
            raise JsonRefused(str(error)) from None
    if body[start : start + 1] in ("{", "["):
        end = _end_of_json(body, None, start)
        return read_json(body[start:end]), end
    bare = re.compile(r"[^,()\[\]{}'\"\s]+").match(body, start)
    if bare is None:
        raise JsonRefused("an argument without a value")
    return _typed(bare[0], ()), bare.end()


def _skip(body: str, position: int, pattern: str) -> int:
    found = re.compile(pattern).match(body, position)
    if found is None:
        raise JsonRefused(f"no call as Python writes it, at character {position}")
    return found.end()


_READERS: dict[str, Callable[[str, Mapping[str, Any]], list[Json]]] = {
    "json": _read_json_body,
    "xml-inline": _read_tags,
    "python": _read_python,
}
_ANY_JSON = json.JSONDecoder(strict=False)
