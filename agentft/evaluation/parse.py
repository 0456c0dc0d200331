"""Model text -> calls and answer, or the reason why a call is none.

A reply is read in the same way whether it is a prediction or a reference, so a perfect prediction scores 1 by
construction. What stands between the marks is read by `agentft.data.calls`, as in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from agentft.data.calls import CallFailure, CallFailureReason, JsonRefused, ToolCall, read_call_body, read_json
from agentft.data.grammar import MAX_CLOSING_MARKS_TRIED
from agentft.data.render import CallForm
from agentft.data.text_calls import end_of_bracket, foreign_call, read_call
from agentft.errors import FormatError

THINK_START = "<|startofthink|>"
THINK_END = "<|endofthink|>"
EXEC_START = "<|startofexec|>"

END_OF_SEQUENCE_TEXTS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
"""How the end tokens of common models read when they are decoded to text."""

USER_TAGS = ("<|user|>", "<|im_start|>user", "<|start_header_id|>user")
"""A model that goes on after its own turn writes the next question itself; nothing from there on is its answer."""

_ROLE_HEADER = re.compile(
    r"\A\s*(?:<\|assistant\|>[ \t]*[:：]?"
    r"|<\|im_start\|>assistant\b"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>)"
)
_CALL_OPEN = re.compile(re.escape(THINK_START) + r"|<tool_call>\s*(?=[{\[])")
_THINK_CLOSE = re.compile(re.escape(THINK_END))
_HERMES_CLOSE = re.compile(r"\s*</tool_call>")
_FAILURES: dict[str, CallFailureReason] = {
    "call_not_an_object": "not_an_object",
    "call_without_name": "no_name",
    "arguments_not_an_object": "parameters_not_an_object",
}
"""What is wrong with a call between `<tool_call>` marks, as MSAgent's has it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One think span of a reply: what the model wrote where it meant to call."""

    source: str
    """The text between the marks."""
    requests: tuple[ToolCall, ...]
    """The calls in it, several if the span holds an array; empty if the span cannot be read."""
    failure: CallFailure | None


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """A reply taken apart."""

    attempts: tuple[Attempt, ...]
    text: str
    """What stands outside the calls, trimmed; pieces around a call are joined by a line break."""

    @property
    def requests(self) -> tuple[ToolCall, ...]:
        """Every well-formed call, in order."""
        return tuple(request for attempt in self.attempts for request in attempt.requests)

    @property
    def malformed(self) -> int:
        """Spans that are no call."""
        return sum(attempt.failure is not None for attempt in self.attempts)

    @property
    def has_call(self) -> bool:
        """Whether a call was attempted, well formed or not."""
        return bool(self.attempts)


def parse_reply(text: str, *, stop_texts: Sequence[str] = ()) -> ParsedReply:
    """Read one assistant step: strip the role header, cut what is not the agent's, separate calls and text.

    Args:
        text: Raw text of the step, of the model or of the data.
        stop_texts: End-of-sequence texts of this model, besides `END_OF_SEQUENCE_TEXTS`.

    Never raises: whatever a model writes is data.
    """
    own_words = without_stops(_ROLE_HEADER.sub("", text, count=1), stop_texts)
    ends = (EXEC_START, *_INVENTED[CallForm.hermes][:1], *USER_TAGS, *stop_texts)
    attempts: list[Attempt] = []
    pieces: list[str] = []
    at = 0
    while (found := _CALL_OPEN.search(own_words, at)) is not None:
        before = own_words[at : found.start()]
        if _cut(before, ends) != before:  # what follows is invented, calls too
            break
        read = _read_msagent if found[0] == THINK_START else _read_hermes
        attempt, end = read(own_words, found.end())
        pieces.append(before)
        attempts.append(attempt)
        at = end
    rest = without_stops(_cut(own_words[at:], ends), stop_texts)
    pieces.append(rest)
    if not attempts and (mark := foreign_call(rest)) is not None:
        attempts.append(
            Attempt(rest, (), CallFailure("not_json", f"{mark!r} begins a call in marks that are not read"))
        )
    return ParsedReply(tuple(attempts), "\n".join(piece.strip() for piece in pieces if piece.strip()))


def without_stops(text: str, stop_texts: Sequence[str] = ()) -> str:
    """Return a text without the names of end tokens at its very end; elsewhere they are letters."""
    stops = (*END_OF_SEQUENCE_TEXTS, *filter(None, stop_texts))
    while (shorter := text.rstrip()).endswith(stops):
        text = shorter[: -len(next(stop for stop in stops if shorter.endswith(stop)))]
    return text


def _read_msagent(text: str, start: int) -> tuple[Attempt, int]:
    """Read the call that a think mark before `start` opens; a closing mark inside a JSON string is data."""
    closings = [found.start() for found in islice(_THINK_CLOSE.finditer(text, start), MAX_CLOSING_MARKS_TRIED)]
    for closing in closings:
        attempt = _read_attempt(text[start:closing], closed=True)
        if attempt.failure is None:
            return attempt, closing + len(THINK_END)
    if not closings:
        return _read_attempt(text[start:], closed=False), len(text)
    return _read_attempt(text[start : closings[0]], closed=True), closings[0] + len(THINK_END)


def _read_hermes(text: str, start: int) -> tuple[Attempt, int]:
    """Read the call that `<tool_call>` before `start` opens."""
    stop = end_of_bracket(text, start)
    closed = None if stop is None else _HERMES_CLOSE.match(text, stop)
    end = closed.end() if closed else text.find("</tool_call>", start) + len("</tool_call>")
    if closed is None or stop is None:
        end = end if end >= start + len("</tool_call>") else len(text)
        return Attempt(text[start:end], (), CallFailure("unclosed", "no </tool_call> after the call")), end
    source = text[start:stop]
    try:
        value = read_json(source)
        calls = tuple(read_call(item, []) for item in (value if isinstance(value, list) else [value]))
    except JsonRefused as error:
        return Attempt(source, (), CallFailure("not_json", str(error))), end
    except FormatError as error:
        return Attempt(source, (), CallFailure(_FAILURES.get(error.reason, "not_json"), error.detail)), end
    empty = None if calls else CallFailure("empty", "an empty list of calls")
    return Attempt(source, calls, empty), end


LLAMA_CALL_START = re.compile(r'\s*\{\s*"name"\s*:')
"""A Llama step that begins so is a call."""

_HERMES_SPAN = re.compile(r"<tool_call>(?P<body>.*?)(?:(?P<closed></tool_call>)|\Z)", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
_INVENTED = {
    CallForm.hermes: ("<tool_response>", "<|im_start|>"),
    CallForm.llama: ("<|start_header_id|>", "<|eom_id|>"),
}
"""What no agent says itself: from here on a result or another turn is invented."""
_DECODER = json.JSONDecoder(strict=False)


def to_msagent(text: str, form: CallForm) -> str:
    """Write one step that a model said in a native form with MSAgent marks, so that one reader scores all layouts.

    A call that is malformed in its own form is malformed after it, for the same reason where both forms have it. Text is
    kept, MSAgent marks in it too: a model that answers with them called all the same. A text in MSAgent's own form stays
    as it is.
    """
    if form is CallForm.msagent:
        return text
    own_words = without_stops(_cut(_ROLE_HEADER.sub("", text, count=1), _INVENTED[form]))
    if form is CallForm.llama:
        return "\n".join(_llama_pieces(own_words))
    own_words = _EMPTY_THOUGHT.sub("", own_words, count=1)
    return _HERMES_SPAN.sub(_hermes_call, own_words)


def _hermes_call(span: re.Match[str]) -> str:
    if span["closed"] is None:
        return THINK_START + _unreadable(span["body"])
    return _msagent_call(span["body"], "arguments")


def _llama_pieces(text: str) -> Iterator[str]:
    before, tag, calls = text.partition("<|python_tag|>")
    if not tag:
        if not LLAMA_CALL_START.match(text):
            yield text
            return
        before, calls = "", text
    yield before
    if not calls.strip():
        yield THINK_START + THINK_END
    position = 0
    while rest := calls[position:].lstrip(" \t\r\n;"):
        position = len(calls) - len(rest)
        try:
            _, end = _DECODER.raw_decode(calls, position)
        except (ValueError, RecursionError):
            # Words behind a call are words; a call that is broken off, or words alone where a call was announced, are not.
            broken = rest.startswith(("{", "[")) or position == len(calls) - len(calls.lstrip())
            yield THINK_START + _unreadable(rest) + THINK_END if broken else rest
            return
        yield _msagent_call(calls[position:end], "parameters")
        position = end


def _msagent_call(body: str, arguments: str) -> str:
    try:
        value = read_json(body)
    except JsonRefused:
        return THINK_START + _unreadable(body) + THINK_END
    renamed = [_renamed(item, arguments) for item in value] if isinstance(value, list) else _renamed(value, arguments)
    # The same JSON; a bracket can stand in its strings only, where a reader must not take it for a mark.
    text = json.dumps(renamed, ensure_ascii=False).replace("<", "\\u003c")
    return f"{THINK_START}```JSON\n{text}\n```{THINK_END}"


def _renamed(item: Any, arguments: str) -> Any:
    """The request under MSAgent's names; what is missing or of a wrong type stays so."""
    if not isinstance(item, dict):
        return item
    return {"api_name": item.get("name"), "parameters": item.get(arguments, {})}


def _unreadable(body: str) -> str:
    """The body of a malformed call, so that it is no call in MSAgent form either."""
    body = body.replace("<|", "< |")
    return body if isinstance(read_call_body(body), CallFailure) else f"malformed: {body}"


def _cut(text: str, marks: Sequence[str]) -> str:
    found = (text.find(mark) for mark in marks if mark)
    return text[: min((position for position in found if position >= 0), default=len(text))]


def _read_attempt(body: str, *, closed: bool) -> Attempt:
    if not closed:
        return Attempt(body, (), CallFailure("unclosed", f"no {THINK_END} after the call"))
    result = read_call_body(body)
    if isinstance(result, CallFailure):
        return Attempt(body, (), result)
    return Attempt(body, result, None)
