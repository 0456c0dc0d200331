"""Put marks around values before a chat template is rendered, and cut the rendered text at them.

The marks are noncharacters, which Unicode keeps for the inside of a program. They stand just inside the outer blanks of a
value, so that a template trims, tests and splits it as it would without them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from agentft.data.render import CALL_KINDS, Segment, SpanKind

_OPEN = {kind: chr(0xFDD0 + kind) for kind in SpanKind}
_CLOSE = "\ufdef"
_KINDS = {mark: kind for kind, mark in _OPEN.items()}
_VALUE = re.compile(f"([\ufdd0-\ufdee])([^\ufdd0-{_CLOSE}]*){_CLOSE}")
MARK = re.compile(f"[\ufdd0-{_CLOSE}]")
"""Any character that is used as a mark."""
ESCAPED_MARK = re.compile(r"\\u(fd[de][0-9a-f])")
"""A mark as Python's `repr` and ASCII JSON spell it; templates write lists so."""

_CONTENT = {
    "system": SpanKind.system,
    "developer": SpanKind.system,
    "user": SpanKind.user,
    "assistant": SpanKind.text,
    "tool": SpanKind.observation,
}


class Value(NamedTuple):
    """A value in a rendered text."""

    start: int
    stop: int
    kind: SpanKind


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A rendered text, its marks removed, and where its values are."""

    text: str
    values: tuple[Value, ...]
    """In the order of the text."""

    @classmethod
    def read(cls, rendered: str) -> MarkedText | None:
        """Take the marks out of a rendered text; None where a template tore some of them apart."""
        if "\\ufd" in rendered:
            rendered = ESCAPED_MARK.sub(lambda found: chr(int(found[1], 16)), rendered)
        pieces = _VALUE.split(rendered)
        values = []
        end = 0
        for at in range(0, len(pieces) - 1, 3):
            start = end + len(pieces[at])
            end = start + len(pieces[at + 2])
            values.append(Value(start, end, _KINDS[pieces[at + 1]]))
        del pieces[1::3]
        text = "".join(pieces)
        return None if not text.isascii() and MARK.search(text) else cls(text, tuple(values))

    def gaps(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the template's own text between two positions, around the values."""
        stop = len(self.text) if stop is None else stop
        for value in self.values[self._values_before(start) :]:
            if value.start >= stop:
                break
            if value.start > start:
                yield start, value.start
            start = max(start, value.stop)
        if start < stop:
            yield start, stop

    def within(self, start: int, stop: int) -> Sequence[Value]:
        """Return the values between two positions."""
        first = self._values_before(start)
        last = first
        while last < len(self.values) and self.values[last].stop <= stop:
            last += 1
        return self.values[first:last]

    def __add__(self, other: MarkedText) -> MarkedText:
        """Return both texts as one."""
        offset = len(self.text)
        moved = (Value(value.start + offset, value.stop + offset, value.kind) for value in other.values)
        return MarkedText(self.text + other.text, (*self.values, *moved))

    def since(self, start: int) -> MarkedText:
        """Return the text from a position on, which is in no value."""
        values = self.values[self._values_before(start) :]
        return MarkedText(self.text[start:], tuple(Value(a - start, b - start, kind) for a, b, kind in values))

    def _values_before(self, position: int) -> int:
        return bisect_right(self.values, position, key=itemgetter(1))


class StepValues(NamedTuple):
    """What a rendered step must hold."""

    reasoning: str
    text: str
    """Both without outer blanks; empty where there is none."""
    calls: int
    """Values of the calls: their names and the strings among their arguments that are not blank."""
    names: tuple[str, ...] = ()
    """Those of the calls; a template may write each more than once."""

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> StepValues:
        """Read them off an assistant's message as a server hands it over."""
        calls = [call["function"] for call in message.get("tool_calls", ())]
        count = len(calls) + sum(_strings(call["arguments"]) for call in calls)
        reasoning = message.get("reasoning_content") or ""
        return cls(reasoning.strip(), (message.get("content") or "").strip(), count, tuple(c["name"] for c in calls))

    @property
    def size(self) -> int:
        """Number of values."""
        return bool(self.reasoning) + bool(self.text) + self.calls

    def missing(self, text: str, values: Sequence[Value]) -> str | None:
        """Name what a part of a rendered text lacks: reasoning, text or call; None where it holds this and no other."""
        calls: list[str] = []
        found = {SpanKind.reasoning: "", SpanKind.text: ""}
        for start, stop, kind in values:
            if kind is SpanKind.call:
                calls.append(text[start:stop])
            elif kind in found:
                found[kind] += text[start:stop]
        if found[SpanKind.reasoning] != self.reasoning:
            return "reasoning"
        if found[SpanKind.text] != self.text:
            return "text"
        if len(calls) == self.calls:
            return None
        repeated = len(calls) > self.calls and all(calls.count(n) >= self.names.count(n) for n in self.names)
        return None if repeated and self.names else "call"


def mark(text: str, kind: SpanKind) -> str:
    """Return a value with its marks, a blank one as it is."""
    core = text.strip()
    if len(core) == len(text):
        return f"{_OPEN[kind]}{text}{_CLOSE}" if text else text
    start = len(text) - len(text.lstrip())
    return f"{text[:start]}{_OPEN[kind]}{core}{_CLOSE}{text[start + len(core) :]}" if core else text


def marked_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as a server hands it over, arguments as objects, with marks around its values."""
    made = dict(message)
    if content := message.get("content"):
        made["content"] = mark(content, _CONTENT[message["role"]])
    if reasoning := message.get("reasoning_content"):
        made["reasoning_content"] = mark(reasoning, SpanKind.reasoning)
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [
            {
                **_marked_id(call),
                "function": {
                    "name": mark(call["function"]["name"], SpanKind.call),
                    "arguments": marked_strings(call["function"]["arguments"], SpanKind.call),
                },
            }
            for call in calls
        ]
    return made


def _marked_id(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with marks around the name in its id, which is where Kimi's template writes it."""
    name = call["function"]["name"]
    start, found, number = call.get("id", "").partition(f"functions.{name}:")
    return {**call, "id": f"functions.{mark(name, SpanKind.call)}:{number}"} if found and not start else dict(call)


def marked_strings(value: Any, kind: SpanKind) -> Any:
    """Return a JSON value with marks around its strings, which keys are not."""
    if isinstance(value, str):
        return mark(value, kind)
    if isinstance(value, dict):
        return {key: marked_strings(each, kind) for key, each in value.items()}
    if isinstance(value, list):
        return [marked_strings(each, kind) for each in value]
    return value


def _strings(value: Any) -> int:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return sum(map(_strings, value.values()))
    return sum(map(_strings, value)) if isinstance(value, list) else 0


class Region(NamedTuple):
    """Where a step stands in a rendered text."""

    step: int
    """Its number among the steps of the conversation."""
    begin: int
    """The end of its prompt."""
    stop: int
    """The beginning of its stop token."""
    end: int


_Cut = tuple[int, SpanKind]
"""Where a piece of one kind ends; it begins where the one before it does."""


def cut_segments(
    text: MarkedText,
    regions: Sequence[Region],
    calls: Mapping[int, Sequence[Mapping[str, Any]]],
    trained: Iterable[int],
    control: re.Pattern[str],
    silent: Collection[int],
    no_thought: re.Pattern[str],
) -> tuple[Segment, ...]:
    """Cut a rendered text up to the end of its last trained step.

    Args:
        regions: the steps that are known, in the order of the text.
        calls: by step, its calls as a server hands them over.
        trained: the steps that become labels.
        control: matches one control token.
        silent: the steps whose reasoning is shown and not trained.
        no_thought: matches how a step without a thought begins.
    """
    wanted = set(trained)
    last = max(region.end for region in regions if region.step in wanted)
    pieces: list[tuple[int, SpanKind, bool]] = []
    at = 0
    for region in regions:
        if region.end > last:
            break
        shown = region.step not in wanted
        pieces += [(stop, kind, True) for stop, kind in _context(text, at, region.begin)]
        for stop, kind in _step(text, region, calls[region.step], control, no_thought):
            pieces.append((stop, kind, shown or (kind is SpanKind.reasoning and region.step in silent)))
        pieces.append((region.end, SpanKind.stop, shown))
        at = region.end
    return tuple(_join(text, pieces, control))


def _join(
    text: MarkedText, pieces: Iterable[tuple[int, SpanKind, bool]], control: re.Pattern[str]
) -> Iterator[Segment]:
    """Yield pieces, each with whether it is shown only, as segments: neighbours of one fate joined, control tokens apart."""
    runs: list[tuple[int, SpanKind, bool]] = []
    end = 0
    for piece in pieces:
        if piece[0] > end:
            end = piece[0]
            if runs and runs[-1][1:] == piece[1:]:
                runs[-1] = piece
            else:
                runs.append(piece)
    words = text.text
    tokens = (found for start, stop in text.gaps(0, end) for found in control.finditer(words, start, stop))
    token = next(tokens, None)
    start = 0
    for stop, kind, context_only in runs:
        while token is not None and token.start() < stop:
            if token.start() > start:
                yield Segment(words[start : token.start()], kind, False, context_only)
            yield Segment(token[0], kind, True, context_only)
            start = token.end()
            token = next(tokens, None)
        if start < stop:
            yield Segment(words[start:stop], kind, False, context_only)
            start = stop


def _context(text: MarkedText, start: int, stop: int) -> Iterator[_Cut]:
    for value in text.within(start, stop):
        yield value.start, SpanKind.header
        yield value.stop, value.kind
    yield stop, SpanKind.header


def _step(
    text: MarkedText,
    region: Region,
    calls: Sequence[Mapping[str, Any]],
    control: re.Pattern[str],
    no_thought: re.Pattern[str],
) -> Iterator[_Cut]:
    """Cut a step at its values and its calls' names and parameters; what lies between is of the kind of its neighbours."""
    before: SpanKind | None = None
    start = region.begin
    values = text.within(region.begin, region.stop)
    places = _call_places(text, region, values, calls)
    for value in (*values, Value(region.stop, region.stop, SpanKind.call_syntax if calls else SpanKind.text)):
        if value.start > start:
            if before is None and (thought := no_thought.match(text.text, start, value.start)):
                start = thought.end()
                yield start, SpanKind.reasoning
            elif SpanKind.reasoning in (before, value.kind):
                start, before = thought_end(text.text, start, value, control), None
                yield start, SpanKind.reasoning
            if before is not SpanKind.call and value.kind not in CALL_KINDS:
                yield value.start, SpanKind.text
            else:
                for first, last in places:
                    if last > start and first < value.start:
                        yield max(first, start), SpanKind.call_syntax
                        start = min(last, value.start)
                        yield start, SpanKind.call
                yield value.start, SpanKind.call_syntax
        yield value.stop, value.kind
        start, before = value.stop, value.kind


def thought_end(text: str, start: int, after: Value, control: re.Pattern[str]) -> int:
    """Return where the close of a thought ends: before a text it is all there is, before a call one mark and its blanks."""
    if after.kind not in CALL_KINDS:
        return after.start
    closing = re.compile(rf"\s*(?:{control.pattern}|\S*)\s*").match(text, start, after.start)
    return closing.end() if closing else start


def _call_places(
    text: MarkedText, region: Region, values: Sequence[Value], calls: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """Where the parameters of each call stand: as one JSON object, or its keys and values one by one."""
    places: list[tuple[int, int]] = []
    names = iter([value for value in values if value.kind is SpanKind.call])
    for call in calls:
        function = call["function"]
        name = next((v for v in names if text.text[v.start : v.stop] == function["name"].strip()), None)
        if name is None:
            break
        written = json.dumps(function["arguments"], ensure_ascii=False)
        start = text.text.find(written, name.stop, region.stop)
        if start >= 0:
            places.append((start, start + len(written)))
        else:
            places += _words(text, name.stop, region.stop, function["arguments"])
    return sorted(places)


def _words(text: MarkedText, start: int, stop: int, arguments: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Find the keys of some arguments, in any order, and behind each its value where that is not a string."""
    for key, value in arguments.items():
        place = _word(text, key, start, stop)
        if place is None:
            continue
        yield place
        if not isinstance(value, str):
            spelt = json.dumps(value, ensure_ascii=False)
            place = _word(text, spelt, place[1], stop) or _word(text, str(value), place[1], stop)
            if place is not None:
                yield place


def _word(text: MarkedText, word: str, start: int, stop: int) -> tuple[int, int] | None:
    """Find a word in the template's own text."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
    for first, last in text.gaps(start, stop):
        if found := pattern.search(text.text, first, last):
            return found.span()
    return None
