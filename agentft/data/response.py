"""Cut what an agent says at one step into reasoning, text and calls, by a response template, and find the template.

Response templates are those of transformers (`tokenizer.response_template`), read by a splitter that loses nothing: what
stands in no region is text, a call that cannot be read stays beside the others, and a close mark inside a value closes
nothing. Those of `agentft/data/responses` know more keys of a call: `head_pattern` and `tail_pattern` stand around its
arguments, `results` begins what only a tool can say, and the content `python` is a list of calls as Python writes them.

A layout's template is the first that reads back what the layout says. A text of unknown origin is read by the template in
whose marks a call begins in it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import groupby, islice, takewhile
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from agentft.data.calls import (
    ARGUMENTS,
    READERS,
    Attempt,
    Bare,
    CallFailure,
    Json,
    JsonRefused,
    ToolCall,
    Types,
    opening_tag,
    parameter_types,
    read_call,
    read_json,
    read_literal,
    typed,
)
from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import ChatTemplate
from agentft.data.conversation import Conversation, Message, Origin
from agentft.data.msagent import MAX_CLOSING_MARKS_TRIED
from agentft.data.render import LaidOut, MsagentTemplate, SpanKind
from agentft.errors import FormatError

log = logging.getLogger(__name__)

_OWN = "of the tokenizer"
LETTERS = "\ufdd2"
"""Stands behind the first character of letters that spell a control token, see `said_text`. A noncharacter."""

Part = Literal["reasoning", "text", "call"]
_PARTS: dict[str, Part] = {
    "reasoning_content": "reasoning",
    "thinking": "reasoning",
    "content": "text",
    "tool_calls": "call",
}
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
    def attempts(self) -> tuple[Attempt, ...]:
        """Return what was meant as calls, in order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Attempt))

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
        return any(texts[texts.index(False) :]) if False in texts else False


class Region(NamedTuple):
    """A part of a step between marks, or outside of them."""

    part: Part
    body: str
    closed: bool = True
    attempts: tuple[Attempt, ...] = ()
    marked: bool = False
    """Marks stand around it."""


@dataclass(frozen=True, slots=True)
class _Field:
    part: Part
    open: re.Pattern[str]
    close: re.Pattern[str] | None
    """None: to the end of its JSON value, or of the step."""
    begin: re.Pattern[str]
    """The mark with enough behind it that it is no mention of the mark."""
    head: re.Pattern[str] | None
    narrow: bool
    """A body that holds the mark of another call is none: its strings have no quotes that would tell."""
    results: re.Pattern[str] | None
    read: Callable[[str, Mapping[str, str], Types], tuple[Attempt, ...]]

    def begins_in(self, text: str) -> bool:
        """Return whether a region of this field begins in a text, with a mark of more than a sign."""
        return self.part != "reasoning" and any(len(found[0].strip()) > 1 for found in self.begin.finditer(text))


@dataclass(frozen=True, slots=True)
class ResponseTemplate:
    """A way to write reasoning, text and calls."""

    name: str
    fields: tuple[_Field, ...]
    spec: Mapping[str, Any]
    """As it is written."""
    anchor: re.Pattern[str] | None = None
    """Begins what the agent says, unless the prompt ends with it."""

    @classmethod
    def of(cls, name: str, spec: Mapping[str, Any], *, of_datasets: bool = False) -> ResponseTemplate:
        """Read a response template.

        Args:
            of_datasets: Calls may be Python literals, and their arguments JSON text, as some datasets write them.

        Raises:
            TemplateUnknown: it has a field, a content or a pattern that is not known.
        """
        try:
            read = [_field(key, field, of_datasets) for key, field in spec["fields"].items()]
            anchor = _anchor(spec, "start_anchor")
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            raise TemplateUnknown(f"response template {name}: {error}") from None
        return cls(name, tuple(field for field in read if field is not None), spec, anchor)

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

    def split(self, text: str, prompt: str, types: Types) -> Iterator[Region]:
        """Cut a step into its regions, in order; with the marks between them they are the text."""
        begun = self.anchor.match(text) if self.anchor is not None else None
        position = outside = begun.end() if begun is not None else 0
        said = called = False
        closes = (f.close for f in self.fields if f.part == "call" and f.close is not None)
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
            called = called or field.part == "call"
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
            if field.part != "reasoning":
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
        if field.part != "call":
            found = field.close.search(text, start) if field.close is not None else None
            stop, end = found.span() if found is not None else (len(text), len(text))
            return Region(field.part, text[start:stop], found is not None or field.close is None, marked=True), end
        again = next((m.start() for m in field.open.finditer(text, start) if m.end() > m.start()), len(text))
        if field.close is None:
            stop = _end_of_json(text, field.head.match(text, start) if field.head is not None else None, start)
            attempts = field.read(text[start:stop], captures, types)
            if all(attempt.failure is not None for attempt in attempts):
                stop = min(stop, again)  # a broken call takes no good one behind it along
                attempts = field.read(text[start:stop], captures, types)
            return Region("call", text[start:stop], True, attempts, True), stop
        first: tuple[Attempt, ...] = ()
        found_closes = field.close.finditer(text, start) if start <= last else iter(())
        closes = list(islice(found_closes, MAX_CLOSING_MARKS_TRIED))
        for close in closes:
            if field.narrow and close.start() > again:
                break
            body = text[start : close.start()]
            attempts = field.read(body, captures, types)
            if all(attempt.failure is None for attempt in attempts):
                return Region("call", body, True, attempts, True), close.end()
            first = first or attempts
        # No close makes calls of all of it: it ends at the first one, or where the next call begins.
        stop, end = closes[0].span() if closes else (len(text), len(text))
        if again < stop or not first:
            stop = end = min(again, len(text))
            first = (_failed(text[start:stop], "call_never_closed", "no mark after the call"),)
        return Region("call", text[start:stop], True, first, True), end


@cache
def our_templates(*, of_datasets: bool = False) -> tuple[ResponseTemplate, ...]:
    """Return the response templates of the package, see `ResponseTemplate.of`."""
    folder = files("agentft.data").joinpath("responses")
    specs = {file.name.removesuffix(".json"): json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir()}
    return tuple(ResponseTemplate.of(name, specs[name], of_datasets=of_datasets) for name in sorted(specs))


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
        of_datasets: See `ResponseTemplate.of`.
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


def _field(key: str, spec: Mapping[str, Any], of_datasets: bool) -> _Field | None:
    """Read one field; None for the one that holds what stands in no other."""
    part = _PARTS[key]
    opening, closing = _anchor(spec, "open"), _anchor(spec, "close")
    if opening is None:
        return None
    head, tail, results = (
        re.compile(spec[name], re.DOTALL) if name in spec else None
        for name in ("head_pattern", "tail_pattern", "results")
    )
    args, transform, content = spec.get("content_args", {}), spec.get("transform"), spec.get("content", "text")
    reader = READERS[content] if part == "call" else None
    begin = opening.pattern
    if part == "call":
        after = {"json": r"\s*[{\[]", "python": r"\s*\["}.get(content)
        if after is None:
            after = f"(?:{opening_tag(args)}|{tail.pattern if tail else closing.pattern if closing else chr(92) + 'Z'})"
        begin = f"(?:{begin})(?={head.pattern if head else ''}{after})"

    def call(source: str, item: Json, captures: Mapping[str, str], types: Types) -> Attempt:
        function = _function(_without_letters(item), captures, transform)
        if not of_datasets and isinstance(function, dict) and any(isinstance(function.get(k), str) for k in ARGUMENTS):
            return _failed(source, "arguments_not_an_object", "the arguments of a call are text")
        try:
            read = read_call(function)
        except FormatError as refusal:
            return _failed(source, refusal.reason, refusal.detail)
        arguments = {
            key: typed(value, types.get((read.name, key), ())) if isinstance(value, Bare) else value
            for key, value in read.arguments.items()
        }
        whole = replace(read, name=read.name.strip(), arguments=arguments)
        return Attempt(source.replace(LETTERS, ""), (whole,), None)

    def read(body: str, captures: Mapping[str, str], types: Types) -> tuple[Attempt, ...]:
        source = body
        if head is not None:
            begun = head.match(body)
            if begun is None:
                return (_failed(source, "call_without_name", "the call does not begin as a call of this family"),)
            captures, body = {**captures, **begun.groupdict()}, body[begun.end() :]
        if tail is not None:
            ended = re.search(f"(?:{tail.pattern})\\Z", body, re.DOTALL)
            if ended is None:
                return (_failed(source, "call_not_json", "the call does not end as a call of this family"),)
            body = body[: ended.start()]
        assert reader is not None
        try:
            items = reader(body, args, read_literal if of_datasets else read_json)
        except JsonRefused as refusal:
            return (_failed(source, "call_not_json", str(refusal)),)
        made = [each if isinstance(each, Attempt) else call(source, each, captures, types) for each in items]
        return _joined(made) or (_failed(source, "call_not_json", "no call between the marks"),)

    return _Field(part, opening, closing, re.compile(begin, re.DOTALL), head, content == "xml-inline", results, read)


def _failed(source: str, reason: str, detail: str) -> Attempt:
    return Attempt(source.replace(LETTERS, ""), (), CallFailure(reason, detail))


def _joined(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """Return attempts in which the calls that follow each other are one."""
    joined: list[Attempt] = []
    for attempt in attempts:
        if joined and attempt.failure is None and joined[-1].failure is None:
            joined[-1] = replace(joined[-1], requests=joined[-1].requests + attempt.requests)
        else:
            joined.append(attempt)
    return tuple(joined)


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


def _function(item: Json, captures: Mapping[str, str], transform: Json) -> Json:
    """Return the function that a template's `transform` makes of a value.

    An object that names its tool is one already: so no field of it is lost.
    """
    if not captures and isinstance(item, dict) and "name" in item:
        return item
    scope = {**captures, **(item if isinstance(item, dict) else {}), "content": item}
    function = transform.get("function", transform) if isinstance(transform, dict) else "{content}"
    if isinstance(function, dict):
        return {key: _filled(value, scope) for key, value in function.items()}
    return _filled(function, scope)


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


_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "moor",
        "description": "Moors a boat.",
        "parameters": {
            "type": "object",
            "properties": {"boat": {"type": "string"}, "hours": {"type": "integer"}},
            "required": ["boat"],
        },
    },
}
_FIRST = ToolCall("moor", {"boat": "Anna \\n 'II'", "hours": 3})
_SECOND = ToolCall("moor", {"boat": "7"})
_RESULT = "Done."
_chosen: WeakKeyDictionary[ChatTemplate, ResponseTemplate | None] = WeakKeyDictionary()


class SpokenStep(NamedTuple):
    """One step of a rendered conversation."""

    number: int
    """Among `Conversation.steps`."""
    prompt: str
    text: str
    """What the agent says, without its stop."""


def spoken_steps(layout: ChatLayout, conversation: Conversation) -> Iterator[SpokenStep]:
    """Yield the steps that the renderings of a conversation train; none where it cannot be said."""
    laid_out = layout.lay_out(conversation)
    for rendering in laid_out.renderings if isinstance(laid_out, LaidOut) else ():
        numbers = iter(rendering.steps)
        before = said = ""
        for segment in rendering.segments:
            if segment.trained and segment.kind is SpanKind.stop:
                yield SpokenStep(next(numbers), before, said)
            if segment.trained and segment.kind is not SpanKind.stop:
                said += segment.text
            else:
                before, said = before + said + segment.text, ""


def choose_response(layout: ChatLayout) -> ResponseTemplate | None:
    """Return the first response template that reads back what the layout says: the tokenizer's own, else one of ours.

    None where none does, which is said in one line.
    """
    template = layout.template
    if template not in _chosen:
        probes = [step for conversation in _probes(layout) for step in _with_message(layout, conversation)]
        fitting = (each for each in _candidates(layout) if probes and all(_reads(each, *probe) for probe in probes))
        _chosen[template] = next(fitting, None)
        if _chosen[template] is None:
            log.warning(
                "no response template reads the calls of this chat template: replies that should call count as not read"
            )
    return _chosen[template]


def servers_template(layout: ChatLayout | MsagentTemplate) -> dict[str, Any] | None:
    """Return the layout's response template for `tokenizer.response_template`, by which transformers reads an answer.

    None where the tokenizer has its own, where no template reads the layout, and where `parse_response` does not read back
    what ours does.
    """
    if isinstance(layout, MsagentTemplate):
        file = files("agentft.data").joinpath("templates", "msagent.response.json")
        own: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        own["fields"]["content"]["close_pattern"] = f"\\s*{re.escape(layout.stop_token)}"
        return own
    response, tokenizer = choose_response(layout), layout.template.tokenizer
    if response is None or response.name == _OWN:
        return None
    probes = [(talk, *step) for talk in _probes(layout) for step in _with_message(layout, talk)]
    spec = _for_transformers(response, layout, [step.prompt for _, step, *_ in probes])
    for talk, step, message, _ in probes:
        text = step.text + layout.traits.stops[0]
        try:
            read = tokenizer.parse_response(text, spec, prefix=step.prompt, tools=list(talk.tools))
        except (ValueError, KeyError) as error:
            log.info("no response template for servers: %s", str(error).partition("\n")[0])
            return None
        calls = tuple(map(read_call, read.get("tool_calls") or ()))
        said = Said(
            (read.get("content") or "", Attempt("", calls, None)), (read.get("reasoning_content") or "").strip()
        )
        if part := differs(said, message):
            log.info("no response template for servers: parse_response reads other %s", part)
            return None
    return spec


def _for_transformers(response: ResponseTemplate, layout: ChatLayout, prompts: Sequence[str]) -> dict[str, Any]:
    """Write a template of the package with the keys that transformers knows."""
    headers = [manner.header for manner in layout.traits.manners if manner.header]
    header = "".join(signs[0] for signs in takewhile(lambda signs: len(set(signs)) == 1, zip(*headers, strict=False)))
    opened = [found.start() for f in response.fields if f.part == "reasoning" and (found := f.open.search(header))]
    anchors = {header[: min(opened, default=None)]: None}
    for prompt in prompts:
        behind = prompt.rpartition(next(iter(anchors)))[2]
        if _RESULT in behind:  # no header stands between a result and the answer
            anchors[behind[[*layout.template.control.finditer(behind)][-1].start() :]] = None
    stops = "|".join(map(re.escape, dict.fromkeys((*layout.traits.stops, *layout.traits.call_stops))))
    fields: dict[str, Any] = {}
    for key, given in response.spec["fields"].items():
        made = {name: value for name, value in given.items() if name in ("content", "content_args", "transform_each")}
        opening, closing = (_anchor(given, name) for name in ("open", "close"))
        ends = [closing.pattern] if closing is not None else []
        if _PARTS[key] == "call" and opening is not None:
            made["open_pattern"] = f"\\s*(?:{opening.pattern}){given.get('head_pattern', '')}"
            ends = [f"{given.get('tail_pattern', '')}(?:{end})" for end in ends]
            made |= {"repeats": True, "transform": {"type": "function", **given.get("transform", {})}}
        elif opening is not None:
            made["open_pattern"] = opening.pattern
        made["close_pattern"] = "|".join([*ends, f"\\s*(?:{stops})"])
        fields[key] = made
    return {"defaults": {"role": "assistant"}, "start_anchor": list(anchors), "fields": fields}


def differs(said: Said, message: Message) -> str:
    """Name what of a message was not read back; empty where all was."""
    if said.reasoning != (message.reasoning_content or "").strip():
        return "reasoning"
    if said.text != message.text.strip():
        return "text"
    if any(not isinstance(piece, str) and piece.failure is not None for piece in said.pieces):
        return "calls"
    return "" if [_plain(call) for call in said.calls] == [_plain(call) for call in message.tool_calls] else "calls"


def _plain(call: ToolCall) -> tuple[str, str]:
    return call.name, repr(sorted(call.arguments.items()))


def _candidates(layout: ChatLayout) -> Iterator[ResponseTemplate]:
    own = getattr(layout.template.tokenizer, "response_template", None)
    if isinstance(own, Mapping):
        try:
            yield ResponseTemplate.of(_OWN, own)
        except TemplateUnknown as unknown:
            log.info("%s", unknown)
    calls = layout.traits.tools
    yield from sorted(our_templates(), key=lambda each: any(f.part == "call" for f in each.fields) != calls)


def _reads(
    template: ResponseTemplate, step: SpokenStep, message: Message, types: Mapping[Any, tuple[str, ...]]
) -> bool:
    return not differs(template.read(step.text, step.prompt, types), message)


def _with_message(layout: ChatLayout, conversation: Conversation) -> Iterator[tuple[SpokenStep, Message, Any]]:
    types = parameter_types(conversation.tools, conversation.tool_calls)
    for step in spoken_steps(layout, conversation):
        yield step, conversation.messages[conversation.steps[step.number]], types


def _probes(layout: ChatLayout) -> Iterator[Conversation]:
    """Yield conversations of what the layout can say, each alone, so that one which it refuses takes no other with it."""
    traits = layout.traits
    talk = (Message("user", "Hello?"), Message("assistant", "Ahoy: {1} [2] (3)!"))
    for thought in (None, "It asks.") if traits.reasoning else (None,):
        yield _conversation(talk, thought)
        for calls in ((_FIRST,), (_FIRST, _SECOND)) if traits.tools else ():
            results = [Message("tool", _RESULT, name=call.name) for call in calls]
            asked = (talk[0], Message("assistant", tool_calls=calls), *results, talk[1])
            yield _conversation(asked, thought, (_TOOL,) * traits.declarations)


def _conversation(
    messages: Sequence[Message], thought: str | None, tools: tuple[dict[str, Any], ...] = ()
) -> Conversation:
    thinking = [replace(m, reasoning_content=thought) if m.role == "assistant" else m for m in messages]
    return Conversation("probe", tuple(thinking), tools, Origin("probe", 0))
