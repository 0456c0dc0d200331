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
from enum import IntEnum
from itertools import groupby

from agentft.data.grammar import Call, Observation, Part
from agentft.data.records import Conversation, Message
from agentft.errors import ConfigError


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
    stop = 6
    """The token that ends a step."""


TRAINED_KINDS = frozenset({Kind.text, Kind.call, Kind.stop})
"""The mask law of agentft. Everything else is context and gets `IGNORE_INDEX`."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the training text with one fate."""

    text: str
    kind: Kind
    special: bool = False
    """The text names one special token. All other text is encoded as plain text, whatever marks it contains."""

    @property
    def trained(self) -> bool:
        """Whether these tokens become labels."""
        return self.kind in TRAINED_KINDS


@dataclass(frozen=True, slots=True)
class MsagentTemplate:
    """The layout of the original script, byte for byte, plus a real stop token after every step.

    `<|system|>:...\\n\\n<|user|>:...\\n\\n<|assistant|>:...`; without the stop tokens the text is exactly the original's.
    """

    stop_token: str

    def render(self, conversation: Conversation) -> list[Segment]:
        """Lay the whole conversation out; joined texts without stops are the original text."""
        segments: list[Segment] = []
        for message in conversation.messages:
            separator = "\n\n" if segments else ""
            segments.append(Segment(f"{separator}<|{message.role}|>:", Kind.header))
            segments.extend(self._body(message))
        return segments

    def _body(self, message: Message) -> Iterator[Segment]:
        if message.role == "system":
            yield Segment(message.source, Kind.system)
        elif message.role == "user":
            yield Segment(message.source, Kind.user)
        else:
            yield from render_assistant(message.parts, self.stop_token)


TEMPLATES = {"msagent": MsagentTemplate}
"""Name in `model.template` -> layout."""


def get_template(name: str, stop_token: str) -> MsagentTemplate:
    """Return the layout `name`, ending every step with `stop_token`.

    Raises:
        ConfigError: no layout of that name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"model.template={name!r}: unknown; expected one of {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name](stop_token)


def render_assistant(parts: Sequence[Part], stop_token: str) -> Iterator[Segment]:
    """Lay one assistant turn out, source text kept to the byte.

    White space at the edges of a step is context: a step begins with its first visible character and ends with its last
    one, followed at once by the stop token.
    """
    for observed, group in groupby(parts, key=lambda part: isinstance(part, Observation)):
        if observed:
            yield from (Segment(part.source, Kind.observation) for part in group)
        else:
            yield from _render_step(tuple(group), stop_token)


def _render_step(parts: Sequence[Part], stop_token: str) -> Iterator[Segment]:
    source = "".join(part.source for part in parts)
    start = len(source) - len(source.lstrip())
    stop = len(source.rstrip())
    if start >= stop:
        yield Segment(source, Kind.header)
        return
    if start:
        yield Segment(source[:start], Kind.header)
    yield from _clip(parts, start, stop)
    yield Segment(stop_token, Kind.stop, special=True)
    if stop < len(source):
        yield Segment(source[stop:], Kind.header)


def _clip(parts: Iterable[Part], start: int, stop: int) -> Iterator[Segment]:
    """Yield the parts of a step between two character positions of its joined source."""
    position = 0
    for part in parts:
        end = position + len(part.source)
        text = part.source[max(start - position, 0) : max(stop - position, 0)]
        if text:
            yield Segment(text, Kind.call if isinstance(part, Call) else Kind.text)
        position = end
