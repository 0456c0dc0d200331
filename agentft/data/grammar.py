"""Read the MSAgent grammar of an assistant value: calls between think marks, observations between exec marks, and text.

One reader serves the training data and the scoring of predictions, so both agree on what a well-formed call is.

value        := (text | call | observation)*
    call         := THINK_OPEN body THINK_CLOSE
    observation  := EXEC_OPEN body EXEC_CLOSE          only while a call before it in the same value is unanswered

What is a mark and what merely looks like one:

* A mark inside a JSON string of a body is data, provided the body reads as JSON; other marks inside a body are errors.
* A *quoted pair* is text: opening and closing mark of one kind, mid-sentence (other text before them on the line), with
  nothing between but a connective such as "and", "和" or a comma. "A call stands between <|startofthink|> and
  <|endofthink|>." is a sentence about the format and no call.
* A mark spelt with other case, spaces or brackets is an error outside of bodies that read as JSON: taken as text, it
  would put a call or a tool's output into the answer.

Whatever is not understood raises `GrammarError`; nothing is guessed, because a guess could train on a tool's output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from agentft.data.calls import CallFailure, ToolCall
from agentft.data.literals import Json, JsonRefused, is_json, kind_of, read_json, strip_fence
from agentft.errors import FormatError

THINK_OPEN = "<|startofthink|>"
THINK_CLOSE = "<|endofthink|>"
EXEC_OPEN = "<|startofexec|>"
EXEC_CLOSE = "<|endofexec|>"

MARK = re.compile(r"<\|(?:start|end)of(?:think|exec)\|>")
"""Any of the four marks, exactly spelt."""

MAX_CLOSING_MARKS_TRIED = 8
"""How many closing marks may stand inside the JSON strings of one body: bounds the work on hostile text."""

_LOOK_ALIKE = re.compile(
    r"[<＜]\s{0,3}[|｜]?\s{0,3}(?:start|end)[\s_-]{0,3}of[\s_-]{0,3}(?:think|exec)\s{0,3}[|｜]?\s{0,3}[>＞]",
    re.IGNORECASE,
)
_CONNECTIVE = re.compile(
    r"""["'`”’」)]?[ ]?(?:and|or|to|,|/|-|\.{3}|…|和|与|及|以及|或|到|至|、|，)[ ]?["'`“‘「(]?""", re.IGNORECASE
)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)', re.DOTALL)
"""A JSON string, closed or not: a pattern that must find the end would look for it again from every quote."""


@dataclass(frozen=True, slots=True)
class Text:
    """Free text of the assistant, white space included."""

    source: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the agent: one request, several (a JSON list), or a body that cannot be read."""

    source: str
    """The exact text, marks included."""
    requests: tuple[ToolCall, ...]
    failure: CallFailure | None

    @property
    def body(self) -> str:
        """The text between the marks."""
        return self.source[len(THINK_OPEN) : -len(THINK_CLOSE)]


@dataclass(frozen=True, slots=True)
class Observation:
    """What a tool returned: context, never trained. Any text is allowed; JSON is usual."""

    source: str
    """The exact text, marks included."""

    @property
    def body(self) -> str:
        """The text between the marks."""
        return self.source[len(EXEC_OPEN) : -len(EXEC_CLOSE)]


Part = Text | Call | Observation


class GrammarError(FormatError):
    """An assistant value that does not follow the grammar."""


def parse_assistant(value: str) -> tuple[Part, ...]:
    """Split an assistant value into parts, whose sources joined are `value` again.

    Raises:
        GrammarError: marks that do not pair up, an empty call, an observation without a call, a misspelt mark.
    """
    marks = list(MARK.finditer(value))
    parts: list[Part] = []
    text_start = 0
    unanswered = 0
    index = 0
    while index < len(marks):
        mark = marks[index]
        name = mark.group()
        if name in (THINK_CLOSE, EXEC_CLOSE):
            raise _stray_closing_mark(value, mark, parts, text_start)
        if _is_quoted_pair(value, text_start, marks, index):
            index += 2
            continue
        if mark.start() > text_start:
            parts.append(_text(value[text_start : mark.start()]))
        if name == THINK_OPEN:
            call, index = _read_call(value, marks, index)
            unanswered += max(1, len(call.requests))
            parts.append(call)
            text_start = mark.start() + len(call.source)
        else:
            if unanswered == 0:
                raise GrammarError("observation_without_call", f"no call before {_at(value, mark)} awaits a result")
            unanswered -= 1
            observation, index = _read_observation(value, marks, index)
            parts.append(observation)
            text_start = mark.start() + len(observation.source)
    if text_start < len(value):
        parts.append(_text(value[text_start:]))
    return tuple(parts)


def read_call_body(body: str) -> tuple[ToolCall, ...] | CallFailure:
    """Read what stands between MSAgent's think marks: one request object or a list of them, fenced or not."""
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
        request = _read_request(item)
        if isinstance(request, CallFailure):
            return request
        requests.append(request)
    return tuple(requests)


def _read_request(item: Json) -> ToolCall | CallFailure:
    if not isinstance(item, dict):
        return CallFailure("not_an_object", f"a call is an object with api_name and parameters, found {kind_of(item)}")
    name = item.get("api_name")
    if not isinstance(name, str) or not name.strip():
        return CallFailure("no_name", f"api_name is {kind_of(name)}, expected a non-empty string")
    # The runtime of the original reads a call without parameters as a call with none.
    parameters = item.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        return CallFailure("parameters_not_an_object", f"parameters is {kind_of(parameters)}, expected an object")
    extras = {key: value for key, value in item.items() if key not in ("api_name", "parameters")}
    return ToolCall(name, parameters, extras=extras)


def _read_call(value: str, marks: list[re.Match[str]], opening: int) -> tuple[Call, int]:
    """The call opened by `marks[opening]`, and the index of the first mark after it."""
    start, body_start = marks[opening].span()
    if opening + 1 < len(marks) and marks[opening + 1].group() == THINK_CLOSE:  # the usual case, without a search
        usual = read_call_body(value[body_start : marks[opening + 1].start()])
        if not isinstance(usual, CallFailure):
            return Call(value[start : marks[opening + 1].end()], usual, None), opening + 2
    closings = _closing_marks(marks, opening, THINK_CLOSE)
    if not closings:
        raise GrammarError("think_never_closed", f"no {THINK_CLOSE} after {_at(value, marks[opening])}")
    body = value[body_start : marks[closings[0]].start()]
    reading = read_call_body(body)
    closing = closings[0]
    if _not_json(reading) and len(closings) > 1 and _ends_inside_string(body):
        for candidate in closings[1:MAX_CLOSING_MARKS_TRIED]:
            # Never across an opening exec mark: what follows it may be a tool's output, and calls are trained.
            if any(mark.group() == EXEC_OPEN for mark in marks[closing:candidate]):
                break
            longer = read_call_body(value[body_start : marks[candidate].start()])
            if not _not_json(longer):
                reading, closing = longer, candidate
                break
    if _not_json(reading) and closing > opening + 1:
        inner = marks[opening + 1]
        reason = "nested_think" if inner.group() == THINK_OPEN else "exec_inside_think"
        raise GrammarError(reason, f"a call that is no JSON holds another mark at {_at(value, inner)}")
    source = value[start : marks[closing].end()]
    if not isinstance(reading, CallFailure):
        return Call(source, reading, None), closing + 1
    if reading.reason == "empty":
        raise GrammarError("think_empty", f"nothing is called at {_at(value, marks[opening])}")
    if reading.reason == "not_json":
        _refuse_look_alikes(body)
    return Call(source, (), reading), closing + 1


def _read_observation(value: str, marks: list[re.Match[str]], opening: int) -> tuple[Observation, int]:
    """The observation opened by `marks[opening]`, and the index of the first mark after it."""
    start, body_start = marks[opening].span()
    closings = _closing_marks(marks, opening, EXEC_CLOSE)
    if not closings:
        raise GrammarError("exec_never_closed", f"no {EXEC_CLOSE} after {_at(value, marks[opening])}")
    closing = closings[0]
    holds_marks = closing > opening + 1
    closed_twice = len(closings) > 1 and closings[1] == closing + 1
    if holds_marks or closed_twice or (len(closings) > 1 and _looks_cut(value[body_start : marks[closing].start()])):
        for candidate in closings[:MAX_CLOSING_MARKS_TRIED]:
            if is_json(strip_fence(value[body_start : marks[candidate].start()])):
                return Observation(value[start : marks[candidate].end()]), candidate + 1
    if holds_marks:
        inner = marks[opening + 1]
        reason = "nested_exec" if inner.group() == EXEC_OPEN else "think_inside_exec"
        raise GrammarError(reason, f"an observation that is no JSON holds another mark at {_at(value, inner)}")
    return Observation(value[start : marks[closing].end()]), closing + 1


def _closing_marks(marks: list[re.Match[str]], opening: int, name: str) -> list[int]:
    """Indices of the next closing marks, as many as may be tried."""
    found: list[int] = []
    for index in range(opening + 1, len(marks)):
        if marks[index].group() == name:
            found.append(index)
            if len(found) == MAX_CLOSING_MARKS_TRIED:
                break
    return found


def _is_quoted_pair(value: str, text_start: int, marks: list[re.Match[str]], index: int) -> bool:
    if index + 1 == len(marks):
        return False
    first, second = marks[index], marks[index + 1]
    if second.start() - first.end() > 12 or second.group() != first.group().replace("start", "end"):
        return False
    if not _CONNECTIVE.fullmatch(value, first.end(), second.start()):
        return False
    before = value[max(text_start, first.start() - 200) : first.start()]  # bounded: a line can be megabytes long
    return bool(before[before.rfind("\n") + 1 :].strip())


def _stray_closing_mark(value: str, mark: re.Match[str], parts: list[Part], text_start: int) -> GrammarError:
    kind, part_type = ("think", Call) if mark.group() == THINK_CLOSE else ("exec", Observation)
    twice = bool(parts) and isinstance(parts[-1], part_type) and not value[text_start : mark.start()].strip()
    if twice:
        return GrammarError(f"{kind}_closed_twice", f"a second closing mark at {_at(value, mark)}")
    return GrammarError(f"{kind}_never_opened", f"no opening mark before {_at(value, mark)}")


def _text(source: str) -> Text:
    _refuse_look_alikes(source)
    return Text(source)


def _refuse_look_alikes(text: str) -> None:
    if "<" not in text and "＜" not in text:
        return
    for found in _LOOK_ALIKE.finditer(text):
        if not MARK.fullmatch(found.group()):
            raise GrammarError(
                "mark_misspelt", f"{found.group()!r} resembles a mark; marks are written like {THINK_OPEN}"
            )


def _not_json(reading: tuple[ToolCall, ...] | CallFailure) -> bool:
    return isinstance(reading, CallFailure) and reading.reason == "not_json"


def _ends_inside_string(body: str) -> bool:
    return any(not string[1] for string in _STRING.finditer(body))


def _looks_cut(body: str) -> bool:
    """True where a fence or bracket was opened and the body does not end with one: the closing mark may be data."""
    text = body.strip()
    return text.startswith(("```", "{", "[")) and not text.endswith(("```", "}", "]"))


def _at(value: str, mark: re.Match[str]) -> str:
    around = value[max(0, mark.start() - 20) : mark.end() + 20]
    return f"character {mark.start()} ({around!r})"


_PLACES_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"[ \t\r\n]*")

CharSpan = tuple[int, int]
"""First character and the one after the last."""


def call_places(call: Call) -> list[CharSpan]:
    """Names, without their quotes, and parameters of the requests of a call, as places in its source, in order.

    In a call that cannot be read nothing can be told apart: its body is one place.
    """
    text = strip_fence(call.body)
    start = call.source.index(text, len(THINK_OPEN))
    if call.failure is not None:
        return [(len(THINK_OPEN), len(call.source) - len(THINK_CLOSE))]
    return [(start + first, start + last) for first, last in _places(text)]


def _places(text: str) -> Iterator[CharSpan]:
    """The places in the JSON text of one request or of a list of them; the text is known to be sound."""
    at = 0
    if text.startswith("["):
        at = _after_space(text, 1)
    while text.startswith("{", at):
        places, at = _object_places(text, at)
        yield from sorted(places.values())
        at = _after_space(text, at)
        if text.startswith(",", at):
            at = _after_space(text, at + 1)


def _object_places(text: str, at: int) -> tuple[dict[str, CharSpan], int]:
    """By key the places of one request, and where its object ends. Of a key given twice the last counts, as in reading."""
    places: dict[str, CharSpan] = {}
    at = _after_space(text, at + 1)
    while not text.startswith("}", at):
        key, at = _PLACES_DECODER.raw_decode(text, at)
        start = _after_space(text, _after_space(text, at) + 1)  # behind the colon
        _, at = _PLACES_DECODER.raw_decode(text, start)
        if key == "api_name":
            places[key] = (start + 1, at - 1)
        elif key == "parameters":
            places[key] = (start, at)
        at = _after_space(text, at)
        if text.startswith(",", at):
            at = _after_space(text, at + 1)
    return places, at + 1


def _after_space(text: str, at: int) -> int:
    if text[at : at + 1] not in " \t\r\n":  # most often there is none; beyond the end "" is in every text
        return at
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()
