"""Values with marks around them: what tells them from the template's own text after a chat template was rendered.

The marks are noncharacters, which Unicode keeps for the inside of a program. They stand just inside the outer blanks of a
value, so that a template trims, tests and splits it as it would without them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from agentft.data.render import Kind

_OPEN = {kind: chr(0xFDD0 + kind) for kind in Kind}
_CLOSE = "\ufdef"
_KINDS = {mark: kind for kind, mark in _OPEN.items()}
_VALUE = re.compile(f"([\ufdd0-\ufdee])([^\ufdd0-{_CLOSE}]*){_CLOSE}")
MARK = re.compile(f"[\ufdd0-{_CLOSE}]")
"""Any character that is used as a mark."""

_CONTENT = {
    "system": Kind.system,
    "developer": Kind.system,
    "user": Kind.user,
    "assistant": Kind.text,
    "tool": Kind.observation,
}


class Value(NamedTuple):
    """A value in a rendered text."""

    start: int
    stop: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A rendered text, its marks removed, and where its values are."""

    text: str
    values: tuple[Value, ...]
    """In the order of the text."""

    @classmethod
    def read(cls, rendered: str) -> MarkedText | None:
        """Take the marks out of a rendered text; None where a template tore some of them apart."""
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

    def cut(self, stop: int) -> MarkedText:
        """Return the text up to a position."""
        return MarkedText(self.text[:stop], tuple(self.within(0, stop)))

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
        found = {Kind.reasoning: "", Kind.text: ""}
        for start, stop, kind in values:
            if kind is Kind.call:
                calls.append(text[start:stop])
            elif kind in found:
                found[kind] += text[start:stop]
        if found[Kind.reasoning] != self.reasoning:
            return "reasoning"
        if found[Kind.text] != self.text:
            return "text"
        if len(calls) == self.calls:
            return None
        repeated = len(calls) > self.calls and all(calls.count(n) >= self.names.count(n) for n in self.names)
        return None if repeated and self.names else "call"


def mark(text: str, kind: Kind) -> str:
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
        made["reasoning_content"] = mark(reasoning, Kind.reasoning)
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [
            {
                **call,
                "function": {
                    "name": mark(call["function"]["name"], Kind.call),
                    "arguments": marked_strings(call["function"]["arguments"], Kind.call),
                },
            }
            for call in calls
        ]
    return made


def marked_strings(value: Any, kind: Kind) -> Any:
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
