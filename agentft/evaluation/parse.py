"""Model text -> calls and answer, or the reason why a call is none.

A reply is read in the same way whether it is a prediction or a reference, so a perfect prediction scores 1 by
construction. What stands between the marks is read by `agentft.data.calls`, as in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agentft.data.calls import CallFailure, JsonRefused, ToolCall, read_call_body, read_json
from agentft.data.render import CallForm

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
# Non-greedy: a second, invented call must not swallow a correct first one.
_THINK_SPAN = re.compile(
    re.escape(THINK_START) + r"(?P<body>.*?)(?:(?P<closed>" + re.escape(THINK_END) + r")|\Z)", re.DOTALL
)


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
    own_words = _cut(_ROLE_HEADER.sub("", text, count=1), (*END_OF_SEQUENCE_TEXTS, *stop_texts, EXEC_START, *USER_TAGS))
    attempts: list[Attempt] = []
    pieces: list[str] = []
    end = 0
    for span in _THINK_SPAN.finditer(own_words):
        pieces.append(own_words[end : span.start()])
        attempts.append(_read_attempt(span["body"], closed=span["closed"] is not None))
        end = span.end()
    pieces.append(own_words[end:])
    return ParsedReply(tuple(attempts), "\n".join(piece.strip() for piece in pieces if piece.strip()))


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
    as it is, but for `quote_ends`.
    """
    if form is CallForm.msagent:
        return quote_ends(text)
    own_words = _cut(_ROLE_HEADER.sub("", text, count=1), (*END_OF_SEQUENCE_TEXTS, *_INVENTED[form]))
    if form is CallForm.llama:
        return "\n".join(_llama_pieces(own_words))
    own_words = _EMPTY_THOUGHT.sub("", own_words, count=1)
    return _HERMES_SPAN.sub(_hermes_call, own_words)


def quote_ends(text: str) -> str:
    """Escape what names the end of a sequence inside the strings of readable calls: the same JSON, and no end of an answer.

    For texts that were ended by token ids already, where such a name is letters. A raw text ends at its first one.
    """
    return _THINK_SPAN.sub(_quoted_call, text)


def _quoted_call(span: re.Match[str]) -> str:
    body = span["body"]
    if span["closed"] is None or not any(end in body for end in END_OF_SEQUENCE_TEXTS):
        return span[0]
    if isinstance(read_call_body(body), CallFailure):
        return span[0]
    # In a readable call a bracket can stand in a string only.
    return THINK_START + body.replace("<", "\\u003c") + THINK_END


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
