"""Conversation -> segments: the one place that decides what is trained.

Training and evaluation both render through here, so a step's generation prompt is by construction the prefix of the
training text, and a label can only come from a part that the grammar read as the agent's own words.

A *step* is what the agent says between two tool results: text, a call, several calls, or the closing summary. Every
step ends with the stop token, which is trained; parallel calls belong to one step and share its stop, since a stop after
the first would make the second unreachable in generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple, Protocol

from agentft.data.call_places import Place, call_places
from agentft.data.grammar import Call, Observation, Part
from agentft.data.records import Conversation, Message


class Kind(IntEnum):
    """What a segment is. The numbers are stored beside tokens, so they never change meaning."""

    header = 0
    """Role headers and the white space between parts."""
    system = 1
    user = 2
    observation = 3
    text = 4
    """The agent's own words: text before a call, answers, summaries."""
    call = 5
    """Names and parameters of calls."""
    stop = 6
    """The token that ends a step."""
    frame = 7
    """The rest of a call: its marks, fence, braces, field names and other fields."""
    reasoning = 8
    """What the agent thinks before it speaks, with the marks around it."""


TRAINED_KINDS = frozenset({Kind.text, Kind.call, Kind.stop, Kind.frame, Kind.reasoning})
"""The mask law of agentft. Everything else is context and gets `IGNORE_INDEX`."""

CALL_KINDS = frozenset({Kind.call, Kind.frame})
"""What a call is made of: one piece for the tokenizer, so that telling them apart changes no token."""


class Segment(NamedTuple):
    """A piece of the training text with one fate."""

    text: str
    kind: Kind
    special: bool = False
    """The text names one special token. All other text is encoded as plain text, whatever marks it contains."""
    history: bool = False
    """Shown as context only: another example of the conversation trains it, or its source does not want it trained."""

    @property
    def spoken(self) -> bool:
        """Whether the agent says this."""
        return self.kind in TRAINED_KINDS

    @property
    def trained(self) -> bool:
        """Whether these tokens become labels."""
        return self.spoken and not self.history

    @property
    def encoded_with(self) -> Kind | None:
        """Neighbours of which this is the same are one piece for the tokenizer: all context, None here, or a text or call."""
        if self.kind not in TRAINED_KINDS:
            return None
        return Kind.call if self.kind in CALL_KINDS else self.kind


class CallForm(StrEnum):
    """How the calls of a step are written; `agentft.evaluation.parse.to_msagent` reads each of them."""

    msagent = "msagent"
    """JSON with `api_name` and `parameters` between think marks."""
    hermes = "hermes"
    """JSON with `name` and `arguments` between `<tool_call>` and `</tool_call>`."""
    llama = "llama"
    """Bare JSON with `name` and `parameters`; several are joined by `; `, text before them ends with `<|python_tag|>`."""


class Template(Protocol):
    """A layout: conversation -> segments."""

    @property
    def stop_token(self) -> str:
        """The special token that ends every step."""

    @property
    def call_form(self) -> CallForm:
        """How calls are written."""

    def render(self, conversation: Conversation, context_rounds: int = 0) -> list[Segment]:
        """Lay the conversation out; the first `context_rounds` rounds are shown and not trained."""

    def problem(self, conversation: Conversation) -> tuple[str, str] | None:
        """Say, as (reason, detail), why this layout cannot hold the conversation; None where it can."""

    def notes(self, conversation: Conversation) -> list[str]:
        """Codes of what the layout writes otherwise than the source; they are counted."""


@dataclass(frozen=True, slots=True)
class MsagentTemplate:
    """The layout of the original script, byte for byte, plus a real stop token after every step.

    `<|system|>:...\\n\\n<|user|>:...\\n\\n<|assistant|>:...`; without the stop tokens the text is exactly the original's.
    """

    stop_token: str
    call_form = CallForm.msagent

    def render(self, conversation: Conversation, context_rounds: int = 0) -> list[Segment]:
        """Lay the whole conversation out; joined texts without stops are the original text."""
        segments: list[Segment] = []
        for message, history in with_history(conversation, context_rounds):
            separator = "\n\n" if segments else ""
            segments.append(Segment(f"{separator}<|{message.role}|>:", Kind.header))
            segments.extend(shown_as(self._body(message), message, history=history))
        return segments

    def problem(self, conversation: Conversation) -> tuple[str, str] | None:
        """Nothing: this is the layout that conversations are read from."""
        return None

    def notes(self, conversation: Conversation) -> list[str]:
        """Nothing: every byte is kept."""
        return []

    def _body(self, message: Message) -> list[Segment]:
        if message.role == "system":
            return [Segment(message.source, Kind.system)]
        if message.role == "user":
            return [Segment(message.source, Kind.user)]
        return render_assistant(message.parts, self.stop_token)


def with_history(conversation: Conversation, context_rounds: int) -> Iterator[tuple[Message, bool]]:
    """Yield the messages, each with whether it belongs to the first `context_rounds` rounds."""
    rounds = 0
    for message in conversation.messages:
        rounds += message.role == "user"
        yield message, 0 < rounds <= context_rounds


def shown_as(segments: Iterable[Segment], message: Message, *, history: bool) -> Iterable[Segment]:
    """Return a message's segments, as context where the agent's words are only shown.

    They are in a round that is history, and in a step that the source does not want trained.
    """
    return segments if not history and not message.untrained else _as_history(segments, message, history=history)


def _as_history(segments: Iterable[Segment], message: Message, *, history: bool) -> Iterator[Segment]:
    step = 0
    for segment in segments:
        only_shown = segment.spoken and (history or step in message.untrained)
        yield segment._replace(history=True) if only_shown else segment
        step += segment.kind is Kind.stop


def render_assistant(parts: Sequence[Part], stop_token: str) -> list[Segment]:
    """Lay one assistant turn out, source text kept to the byte.

    White space at the edges of a step is context: a step begins with its first visible character and ends with its last
    one, followed at once by the stop token.
    """
    segments: list[Segment] = []
    step: list[Part] = []
    for part in parts:
        if not isinstance(part, Observation):
            step.append(part)
            continue
        if step:
            _render_step(step, stop_token, segments)
            step = []
        segments.append(Segment(part.source, Kind.observation))
    if step:
        _render_step(step, stop_token, segments)
    return segments


def _render_step(parts: Sequence[Part], stop_token: str, segments: list[Segment]) -> None:
    source = parts[0].source if len(parts) == 1 else "".join([part.source for part in parts])
    start = len(source) - len(source.lstrip())
    stop = len(source.rstrip())
    if start >= stop:
        segments.append(Segment(source, Kind.header))
        return
    if start:
        segments.append(Segment(source[:start], Kind.header))
    _clip(parts, start, stop, segments)
    segments.append(Segment(stop_token, Kind.stop, special=True))
    if stop < len(source):
        segments.append(Segment(source[stop:], Kind.header))


def _clip(parts: Iterable[Part], start: int, stop: int, segments: list[Segment]) -> None:
    """Add the parts of a step between two character positions of its joined source, which cut texts only."""
    position = 0
    for part in parts:
        end = position + len(part.source)
        if isinstance(part, Call):
            segments += call_segments(part.source, call_places(part))
        elif text := part.source[max(start - position, 0) : max(stop - position, 0)]:
            segments.append(Segment(text, Kind.text))
        position = end


def call_segments(text: str, places: Iterable[Place]) -> list[Segment]:
    """Cut the text of a call into its names and parameters, which stand at `places`, and its frame."""
    segments: list[Segment] = []
    end = 0
    for start, stop in places:
        if start > end:
            segments.append(Segment(text[end:start], Kind.frame))
        if stop > start:
            segments.append(Segment(text[start:stop], Kind.call))
        end = stop
    if end < len(text):
        segments.append(Segment(text[end:], Kind.frame))
    return segments
