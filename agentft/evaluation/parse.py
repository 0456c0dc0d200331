"""Model text -> calls and answer, or the reason why a call is none.

A reply is read in the same way whether it is a prediction or a reference, so a perfect prediction scores 1 by
construction. What stands between the marks is read by `agentft.data.calls`, as in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from agentft.data.calls import CallFailure, ToolRequest, read_call_body

THINK_START = "<|startofthink|>"
THINK_END = "<|endofthink|>"
EXEC_START = "<|startofexec|>"

END_OF_SEQUENCE_TEXTS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
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
    requests: tuple[ToolRequest, ...]
    """The calls in it, several if the span holds an array; empty if the span cannot be read."""
    failure: CallFailure | None


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """A reply taken apart."""

    attempts: tuple[Attempt, ...]
    text: str
    """What stands outside the calls, trimmed; pieces around a call are joined by a line break."""

    @property
    def requests(self) -> tuple[ToolRequest, ...]:
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
