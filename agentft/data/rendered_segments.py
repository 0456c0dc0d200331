"""A rendered conversation -> segments: its steps, cut by kind, and all around them as context."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agentft.data.marked_text import MarkedText, Value
from agentft.data.render import Kind, Segment

_NO_THOUGHT = re.compile(r"\s*(?:<think>\s*)?</think>\s*")
"""How templates begin a step without a thought."""


class Region(NamedTuple):
    """Where a step stands in a rendered text."""

    step: int
    """Its number among the steps of the conversation."""
    begin: int
    """The end of its prompt."""
    stop: int
    """The beginning of its stop token."""
    end: int


class _Piece(NamedTuple):
    start: int
    stop: int
    kind: Kind
    template: bool
    """It is the template's own text, in which control tokens are tokens."""


def cut_segments(
    text: MarkedText,
    regions: Sequence[Region],
    calls: Mapping[int, Sequence[Mapping[str, Any]]],
    trained: Iterable[int],
    control: re.Pattern[str],
    silent: Collection[int] = (),
) -> tuple[Segment, ...]:
    """Cut a rendered text up to the end of its last trained step.

    Args:
        regions: the steps that are known, in the order of the text.
        calls: by step, its calls as a server hands them over.
        trained: the steps that become labels.
        control: matches one control token, in a group.
        silent: the steps whose reasoning is shown and not trained.
    """
    wanted = set(trained)
    last = max(region.end for region in regions if region.step in wanted)
    segments: list[Segment] = []
    at = 0
    for region in regions:
        if region.end > last:
            break
        history = region.step not in wanted
        _add(segments, text.text, _context(text, at, region.begin), control, history=True)
        said = _step(text, region, calls[region.step], control)
        _add(segments, text.text, said, control, history=history, silent=region.step in silent)
        segments.append(Segment(text.text[region.stop : region.end], Kind.stop, special=True, history=history))
        at = region.end
    return tuple(segments)


def _context(text: MarkedText, start: int, stop: int) -> Iterator[_Piece]:
    for value in text.within(start, stop):
        if value.start > start:
            yield _Piece(start, value.start, Kind.header, template=True)
        yield _Piece(*value, template=False)
        start = value.stop
    if start < stop:
        yield _Piece(start, stop, Kind.header, template=True)


def _step(
    text: MarkedText, region: Region, calls: Sequence[Mapping[str, Any]], control: re.Pattern[str]
) -> Iterator[_Piece]:
    """Cut a step at its values and its calls' names and parameters; what lies between is of the kind of its neighbours."""
    before: Kind | None = None
    start = region.begin
    values = text.within(region.begin, region.stop)
    places = _call_places(text, region, values, calls)
    for value in (*values, Value(region.stop, region.stop, Kind.frame if calls else Kind.text)):
        if value.start > start:
            if before is None and (thought := _NO_THOUGHT.match(text.text, start, value.start)):
                yield _Piece(start, thought.end(), Kind.reasoning, template=True)
                start = thought.end()
            elif Kind.reasoning in (before, value.kind):
                close = _thought_close(text.text, start, value, control)
                yield _Piece(start, close, Kind.reasoning, template=True)
                start, before = close, None
            yield from _between(text.text, start, value.start, before, value.kind, places)
        if value.stop > value.start:
            yield _Piece(*value, template=False)
        start, before = value.stop, value.kind


def _between(
    text: str, start: int, stop: int, before: Kind | None, after: Kind, places: Sequence[tuple[int, int]]
) -> Iterator[_Piece]:
    if before is not Kind.call and after not in (Kind.call, Kind.frame):
        if start < stop:
            yield _Piece(start, stop, Kind.text, template=True)
        return
    for first, last in places:
        if last <= start or first >= stop:
            continue
        if first > start:
            yield _Piece(start, first, Kind.frame, template=True)
        yield _Piece(max(first, start), min(last, stop), Kind.call, template=True)
        start = min(last, stop)
    if start < stop:
        yield _Piece(start, stop, Kind.frame, template=True)


def _thought_close(text: str, start: int, after: Value, control: re.Pattern[str]) -> int:
    """Return where what closes a thought ends: before a text it is all there is, before a call one mark and its blanks."""
    if after.kind not in (Kind.call, Kind.frame):
        return after.start
    closing = re.compile(rf"\s*(?:{control.pattern}|\S*)\s*").match(text, start, after.start)
    return closing.end() if closing else start


def _call_places(
    text: MarkedText, region: Region, values: Sequence[Value], calls: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """Where the parameters of each call stand: as one JSON object, or its keys and values one by one."""
    places: list[tuple[int, int]] = []
    names = iter([value for value in values if value.kind is Kind.call])
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


def _add(
    segments: list[Segment],
    text: str,
    pieces: Iterable[_Piece],
    control: re.Pattern[str],
    *,
    history: bool,
    silent: bool = False,
) -> None:
    """Add pieces as segments: control tokens of the template each by itself, neighbours of one fate as one."""
    for start, stop, kind, template in pieces:
        shown = Segment("", kind).spoken and (history or (silent and kind is Kind.reasoning))
        words = control.split(text[start:stop]) if template else [text[start:stop]]
        for number, word in enumerate(words):
            if not word:
                continue
            special = number % 2 == 1
            last = segments[-1] if segments else None
            if last and not special and not last.special and last.kind is kind and last.history is shown:
                segments[-1] = last._replace(text=last.text + word)
            else:
                segments.append(Segment(word, kind, special, shown))
