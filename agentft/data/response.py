"""Cut what an agent says at one step into reasoning, text and calls, in training data and in predictions alike.

Response templates are those of transformers (`tokenizer.response_template`), read by a splitter that loses nothing: what
stands in no region is text, a call that cannot be read stays beside the others, and a close mark inside a value closes
nothing. Those of `agentft/data/responses` know more keys of a call: `head_pattern` and `tail_pattern` stand around its
arguments, `results` begins what only a tool can say, and the content `python` is a list of calls as Python writes them.

A text of unknown origin is read by the template in whose marks a call begins in it. Records write calls, results and
thoughts into text in further ways, read here or refused by name, never trained as prose:

| what | written by |
|---|---|
| results in `<tool_response>`, thoughts in `<think>...</think>` before the text | Hermes, Qwen, and so on |
| `[f(a=1), g(b="x")]` | ToolACE |
| `{"name": ..., "parameters": ...}` alone, of a tool that is declared | Llama 3 |
| lines `Thought:`, `Action:`, `Action Input:`, `Observation:`, `Final Answer:` | ReAct, ToolBench |
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import groupby, islice
from typing import Any, Literal, NamedTuple

from agentft.data.calls import (
    ARGUMENTS,
    CALL_FIELDS,
    READERS,
    Bare,
    Call,
    CallFailure,
    Json,
    JsonRefused,
    Said,
    ToolCall,
    Types,
    literal,
    opening_tag,
    parameter_types,
    read_call,
    read_json,
    read_literal,
    read_python,
    typed,
)
from agentft.data.chat_template import any_of
from agentft.data.msagent import MAX_CLOSING_MARKS_TRIED
from agentft.errors import FormatError

LETTERS = "\ufdd2"
"""Stands behind the first character of letters that spell a control token, see `said_text`. A noncharacter."""

Part = Literal["reasoning", "text", "call"]
PARTS: dict[str, Part] = {
    "reasoning_content": "reasoning",
    "thinking": "reasoning",
    "content": "text",
    "tool_calls": "call",
}
_NEVER = re.compile("(?!)")
_BLANKS = re.compile(r"\s*")
_ANY_JSON = json.JSONDecoder(strict=False)
_PLACE = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
MAY_CALL = re.compile(r"<(?:[|｜]|tool_call|TOOLCALL|function|invoke)|\[TOOL_CALLS\]|to=")
"""Every mark of a call holds one of these: looked for first, since few texts do."""
_UNREAD = re.compile(
    r"<\|startof(?:think|exec)\|>\s*(?:```|[{\[])|<invoke name=[^>\n]+>\s*<|<function=[\w.-]+>\s*[{<]|\bto=functions\.\w"
    r"|<\|python_tag\|>\s*[\w.]+\(|<｜tool▁calls?▁begin｜>|<\|tool_calls?(?:_section)?_begin\|>"
)
"""How a call begins that no response template reads, with enough behind the mark that it is no mention of it."""
_RESPONSE = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)\Z", re.DOTALL)
_UNOPENED_THOUGHT = re.compile(r"(.*?)(?:\n\s*</think>|</think>\s*\n)(.*)\Z", re.DOTALL)
_PYTHONIC = re.compile(r"\s*\[\s*[^\[\]\"'{}()=<>]+\(.*\)\s*\]\s*\Z", re.DOTALL)
_REACT_LABEL = re.compile(r"^[ \t]*(Thought|Action Input|Action|Observation|Final Answer)[ \t]*[:：]", re.MULTILINE)
REACT = re.compile(r"^[ \t]*Action[ \t]*[:：].*\n\s*Action Input[ \t]*[:：]", re.MULTILINE)
"""What ReAct text has and other text has not: a line `Action:` followed by a line `Action Input:`."""


class TemplateUnknown(ValueError):  # noqa: N818
    """A response template of a form that is not known here."""


class _Region(NamedTuple):
    """A part of a step between marks, or outside of them."""

    part: Part
    body: str
    closed: bool = True
    attempts: tuple[Call, ...] = ()
    marked: bool = True


class _Field:
    """One entry of a response template's `fields`: where its regions begin and end, and how a call in them is read."""

    def __init__(self, key: str, spec: Mapping[str, Any], *, of_datasets: bool) -> None:
        self.part = PARTS[key]
        self.open = mark_pattern(spec, "open") or _NEVER
        """Never: the field holds what stands in no other."""
        self.close = mark_pattern(spec, "close")
        """None: to the end of its JSON value, or of the step."""
        self.head, self.tail = mark_pattern(spec, "head"), mark_pattern(spec, "tail")
        self.results = mark_pattern(spec, "results")
        self._transform, self._args = spec.get("transform"), spec.get("content_args", {})
        self._read_value = read_literal if of_datasets else read_json
        self._of_datasets = of_datasets
        content = spec.get("content", "text")
        self.narrow = content == "xml-inline"
        """A body that holds the mark of another call is none: its strings have no quotes that would tell."""
        self._begin = self.open
        """The mark with enough behind it that it is no mention of the mark."""
        if self.part == "call":
            self._read_body = READERS[content]
            after = {"json": r"\s*[{\[]", "python": r"\s*\["}.get(content)
            if after is None:
                end = self.tail or self.close
                after = f"(?:{opening_tag(self._args)}|{end.pattern if end is not None else chr(92) + 'Z'})"
            head = self.head.pattern if self.head is not None else ""
            self._begin = re.compile(f"(?:{self.open.pattern})(?={head}{after})", re.DOTALL)

    def begins_in(self, text: str) -> bool:
        """Return whether a region of this field begins in a text, with a mark of more than a sign."""
        return self.part != "reasoning" and any(len(found[0].strip()) > 1 for found in self._begin.finditer(text))

    def read(self, source: str, captures: Mapping[str, str], types: Types) -> tuple[Call, ...]:
        """Read the body of a call's region; `captures` are the named groups of its mark."""
        body = source
        if self.head is not None:
            begun = self.head.match(body)
            if begun is None:
                return (_failed(source, "call_without_name", "the call does not begin as a call of this family"),)
            captures, body = {**captures, **begun.groupdict()}, body[begun.end() :]
        if self.tail is not None:
            ended = re.search(f"(?:{self.tail.pattern})\\Z", body, re.DOTALL)
            if ended is None:
                return (_failed(source, "call_not_json", "the call does not end as a call of this family"),)
            body = body[: ended.start()]
        try:
            items = self._read_body(body, self._args, self._read_value)
        except JsonRefused as refusal:
            return (_failed(source, "call_not_json", str(refusal)),)
        joined: list[Call] = []
        for item in items:
            attempt = item if isinstance(item, Call) else self._attempt(source, item, captures, types)
            if joined and attempt.failure is None and joined[-1].failure is None:  # calls that follow each other
                joined[-1] = replace(joined[-1], requests=joined[-1].requests + attempt.requests)
            else:
                joined.append(attempt)
        return tuple(joined) or (_failed(source, "call_not_json", "no call between the marks"),)

    def _attempt(self, source: str, item: Json, captures: Mapping[str, str], types: Types) -> Call:
        function = _function(_without_letters(item), captures, self._transform)
        as_text = isinstance(function, dict) and any(isinstance(function.get(key), str) for key in ARGUMENTS)
        if as_text and not self._of_datasets:
            return _failed(source, "arguments_not_an_object", "the arguments of a call are text")
        try:
            call = read_call(function)
        except FormatError as refusal:
            return _failed(source, refusal.reason, refusal.detail)
        arguments = {
            key: typed(value, types.get((call.name, key), ())) if isinstance(value, Bare) else value
            for key, value in call.arguments.items()
        }
        whole = replace(call, name=call.name.strip(), arguments=arguments)
        return Call(source.replace(LETTERS, ""), (whole,), None)


class ResponseTemplate:
    """A way to write reasoning, text and calls."""

    def __init__(self, name: str, spec: Mapping[str, Any], *, of_datasets: bool = False) -> None:
        """Read a response template; raise TemplateUnknown of a field, a content or a pattern that is not known.

        Args:
            of_datasets: Calls may be Python literals, and their arguments JSON text, as some datasets write them.
        """
        self.name = name
        self.spec = spec
        try:
            read = (_Field(key, field, of_datasets=of_datasets) for key, field in spec["fields"].items())
            self.fields = [field for field in read if field.open is not _NEVER]
            self._anchor = mark_pattern(spec, "start_anchor")
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            raise TemplateUnknown(f"response template {name}: {error}") from None

    def read(self, text: str, prompt: str = "", types: Types | None = None) -> Said:
        """Take one step apart.

        Args:
            text: What the agent said, without its stop.
            prompt: The end of the prompt, which may have opened a region.
            types: Schema types of parameters, for families that write strings without quotes.
        """
        pieces: list[str | Call] = []
        thoughts: list[str] = []
        thought: bool | None = None
        for region in self._split(text, prompt, types or {}):
            body = region.body.replace(LETTERS, "")
            if region.part == "reasoning":
                thoughts.append(body)
                thought = region.closed and thought is not False
            elif region.part == "call":
                pieces += region.attempts
            else:
                pieces.append(body)
                if not region.marked and any(f.part == "reasoning" and _closes(f, region.body) for f in self.fields):
                    thought = False
        if not "".join(thoughts).strip() and thought:
            thought = None
        return Said(tuple(pieces), "\n".join(each.strip() for each in thoughts if each.strip()), thought)

    def _split(self, text: str, prompt: str, types: Types) -> Iterator[_Region]:
        """Cut a step into its regions, in order; with the marks between them they are the text."""
        begun = self._anchor.match(text) if self._anchor is not None else None
        at = begun.end() if begun is not None else 0
        closes = (f.close for f in self.fields if f.part == "call" and f.close is not None)
        last = max((match.start() for close in closes for match in close.finditer(text)), default=-1)
        field = next((f for f in self.fields if _ends_with(f.open, prompt)), None)
        if field is not None:
            again = field.open.match(text, at)
            region, at = self._region(field, text, again.end() if again else at, {}, types, last)
            yield region
        said = called = stuck = False
        while True:
            found = None if stuck else self._next(text, at, thinks=not said)
            between = text[at : len(text) if found is None else found[1].start()]
            invented = _results(self.fields, between) if called else None
            if between[:invented]:
                said = said or bool(between.strip())
                yield _Region("text", between[:invented], marked=False)
            if found is None or invented is not None:
                return
            field, mark = found
            region, at = self._region(field, text, mark.end(), mark.groupdict(), types, last)
            yield region
            called = called or field.part == "call"
            stuck = at == mark.start() == mark.end()  # an empty region of no width would open again

    def _next(self, text: str, position: int, *, thinks: bool) -> tuple[_Field, re.Match[str]] | None:
        """Find the next region. A thought comes before all text, so that a text may name its mark."""
        blanks = _BLANKS.match(text, position)
        begin = blanks.end() if blanks is not None else position
        found = []
        for field in self.fields:
            if field.part != "reasoning":
                match = field.open.search(text, position)
            else:
                match = (field.open.match(text, position) or field.open.match(text, begin)) if thinks else None
            if match is not None:
                found.append((field, match))
        return min(found, key=lambda each: (each[1].start(), -each[1].end()), default=None)

    def _region(
        self, field: _Field, text: str, start: int, captures: Mapping[str, str], types: Types, last: int
    ) -> tuple[_Region, int]:
        """Read the region that begins at `start`; return it and where the text goes on. `last` is the last close of a call."""
        if field.part != "call":
            found = field.close.search(text, start) if field.close is not None else None
            stop, end = found.span() if found is not None else (len(text), len(text))
            return _Region(field.part, text[start:stop], found is not None or field.close is None), end
        again = next((m.start() for m in field.open.finditer(text, start) if m.end() > m.start()), len(text))
        if field.close is None:
            stop = _end_of_json(text, field.head.match(text, start) if field.head is not None else None, start)
            attempts = field.read(text[start:stop], captures, types)
            if all(attempt.failure is not None for attempt in attempts):
                stop = min(stop, again)  # a broken call takes no good one behind it along
                attempts = field.read(text[start:stop], captures, types)
            return _Region("call", text[start:stop], True, attempts), stop
        first: tuple[Call, ...] = ()
        found_closes = field.close.finditer(text, start) if start <= last else iter(())
        closes = list(islice(found_closes, MAX_CLOSING_MARKS_TRIED))
        for close in closes:
            if field.narrow and close.start() > again:
                break
            body = text[start : close.start()]
            attempts = field.read(body, captures, types)
            if all(attempt.failure is None for attempt in attempts):
                return _Region("call", body, True, attempts), close.end()
            first = first or attempts
        # No close makes calls of all of it: it ends at the first one, or where the next call begins.
        stop, end = closes[0].span() if closes else (len(text), len(text))
        if again < stop or not first:
            stop = end = min(again, len(text))
            first = (_failed(text[start:stop], "call_never_closed", "no mark after the call"),)
        return _Region("call", text[start:stop], True, first), end


@cache
def our_templates(*, of_datasets: bool = False) -> tuple[ResponseTemplate, ...]:
    """Return the response templates of the package, see `ResponseTemplate`."""
    folder = files("agentft.data").joinpath("responses")
    specs = {file.name.removesuffix(".json"): json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir()}
    return tuple(ResponseTemplate(name, specs[name], of_datasets=of_datasets) for name in sorted(specs))


@cache
def thought_template() -> ResponseTemplate:
    """Return the response template that tells a thought from all else, as in the layout `msagent`."""
    return next(template for template in our_templates() if template.name == "text")


def read_by_marks(
    text: str, tools: Sequence[Mapping[str, Any]] = (), *, of_datasets: bool = False
) -> tuple[ResponseTemplate | None, Said] | None:
    """Read a text by the template of the package in whose marks a call begins in it; None: in none does one.

    Of several templates it is the one that reads most. A call in marks that no template reads is an attempt that failed.

    Args:
        tools: Declarations, for families that write strings without quotes.
        of_datasets: See `ResponseTemplate`.
    """
    if MAY_CALL.search(text) is None:
        return None
    begun = [each for each in our_templates(of_datasets=of_datasets) if any(f.begins_in(text) for f in each.fields)]
    if begun:
        types = parameter_types(tools)
        return min(((each, each.read(text, types=types)) for each in begun), key=lambda each: len(each[1].failures))
    if (found := _UNREAD.search(text)) is None:
        return None
    mark = found[0].strip()[:40]
    msagent = mark.startswith("<|startof")
    hint = "; MSAgent text needs the names conversations, from, value, user, assistant" if msagent else ""
    detail = f"{mark!r} begins a call in text{hint}"
    return None, Said((_failed(text, "marks_in_text" if msagent else "calls_in_text", detail),))


def said_text(ids: Sequence[int], tokenizer: Any, control: Mapping[int, str]) -> str:
    """Decode what was said; behind the first character of letters that spell a control token stands `LETTERS`.

    Args:
        control: Control tokens by their ids.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    spelt = [token for token in set(control.values()) if token in text]
    if sum(map(text.count, spelt)) == sum(control.get(each) in spelt for each in ids):
        return text
    pattern = re.compile(any_of(spelt))
    letters: list[bool] = []
    for is_control, members in groupby(ids, control.__contains__):
        run = list(members)
        if is_control:
            letters += [False for each in run if control[each] in spelt]
        else:
            letters += [True] * len(pattern.findall(tokenizer.decode(run, skip_special_tokens=False)))
    flags = iter(letters)
    return pattern.sub(lambda m: m[0][0] + LETTERS + m[0][1:] if next(flags, False) else m[0], text)


def _failed(source: str, reason: str, detail: str) -> Call:
    return Call(source.replace(LETTERS, ""), (), CallFailure(reason, detail))


def mark_pattern(spec: Mapping[str, Any], key: str) -> re.Pattern[str] | None:
    """Return the pattern of a mark that a template gives as a pattern, a text or texts; None: it gives none."""
    if f"{key}_pattern" in spec:
        return re.compile(spec[f"{key}_pattern"], re.DOTALL)
    if key not in spec:
        return None
    texts = [spec[key]] if isinstance(spec[key], str) else spec[key]
    return re.compile(any_of(texts))


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


def _function(item: Json, captures: Mapping[str, str], transform: Json) -> Json:
    """Return the function that a template's `transform` makes of a value; an object that names its tool is one already."""
    if not captures and isinstance(item, dict) and "name" in item:
        return item
    # What was captured comes last: an argument may be called "name", too.
    scope = {**(item if isinstance(item, dict) else {}), **captures, "content": item}
    function = transform.get("function", transform) if isinstance(transform, dict) else "{content}"
    if isinstance(function, dict):
        return {key: _filled(value, scope) for key, value in function.items()}
    return _filled(function, scope)


def _filled(value: Json, scope: Mapping[str, Json]) -> Json:
    place = _PLACE.fullmatch(value) if isinstance(value, str) else None
    if place is None:
        return value
    found = scope.get(place[1])
    if place[2] is None:
        return found
    return found.get(place[2], None if place[2] == "name" else {}) if isinstance(found, dict) else None


def _without_letters(value: Json) -> Json:
    """Return a value without the signs behind letters that spell a control token."""
    if isinstance(value, str):
        return type(value)(value.replace(LETTERS, ""))
    if isinstance(value, dict):
        return {key.replace(LETTERS, ""): _without_letters(each) for key, each in value.items()}
    return [_without_letters(each) for each in value] if isinstance(value, list) else value


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
            return Said((Call(text, calls, None),))
    elif pythonic and _PYTHONIC.match(text):
        raise FormatError("call_not_read", "a text in brackets that is no list of calls such as [f(a=1)]")
    return None


def split_thought(text: str) -> tuple[str | None, str]:
    """Return the thought that a text begins with, and the text after it; raise FormatError where it has no end."""
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
    values = _json_of(text, "[") or ()
    names = [value.get("name") if isinstance(value, dict) else None for value in values]
    return [json.dumps(value, ensure_ascii=False) for value in values] if names == [call.name for call in calls] else []


def _json_of(text: str, brackets: str) -> Json | None:
    """Return what a text holds that is nothing but JSON and begins with one of some brackets; None: it is anything else."""
    text = text.strip()
    try:
        return read_json(text) if text and text[0] in brackets else None
    except JsonRefused:
        return None


def read_react(text: str) -> Iterator[tuple[Literal["step", "result"], str, ToolCall | None]]:
    """Yield the steps and results of ReAct text; raise FormatError where its lines are in another order, or unreadable."""
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
    return () if any(isinstance(call, Call) for call in calls) else tuple(map(read_call, calls))


def _bare_calls(text: str, declared: Collection[str]) -> tuple[ToolCall, ...]:
    """Read a text that is nothing but JSON of calls of declared tools; () where it is anything else."""
    value = _json_of(text, "{[") if declared else None
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
