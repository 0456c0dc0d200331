"""Decide what is trained, and render conversations as segments in the layout `msagent`.

Training and evaluation both render through here, so the prompt of a step is by construction the prefix of the training text.

A *step* is what the agent says between two tool results: text, a call, several calls, or the closing summary. Every step ends
with the stop token, which is trained; a stop after the first of parallel calls would make the second unreachable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from agentft.data.calls import Call
from agentft.data.conversation import Conversation, Observation, Part
from agentft.data.msagent import CharSpan, GrammarError, as_msagent, call_places, not_written


class SpanKind(IntEnum):
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
    call_syntax = 7
    """The rest of a call: its marks, fence, braces, field names and other fields."""
    reasoning = 8
    """What the agent thinks before it speaks, with the marks around it."""


TRAINED_KINDS = frozenset({SpanKind.text, SpanKind.call, SpanKind.stop, SpanKind.call_syntax, SpanKind.reasoning})
"""The mask law of agentft. Everything else is context and gets `IGNORE_INDEX`."""

CALL_KINDS = frozenset({SpanKind.call, SpanKind.call_syntax})
"""What a call is made of: one piece for the tokenizer, so that telling them apart changes no token."""


class Segment(NamedTuple):
    """A piece of the training text with one fate."""

    text: str
    kind: SpanKind
    special: bool = False
    """The text names one special token. All other text is encoded as plain text, whatever marks it contains."""
    context_only: bool = False
    """Another example of the conversation trains it, or its source does not want it trained."""

    @property
    def is_assistant(self) -> bool:
        """Return whether the agent says this."""
        return self.kind in TRAINED_KINDS

    @property
    def trained(self) -> bool:
        """Return whether these tokens become labels."""
        return not self.context_only and self.kind in TRAINED_KINDS

    @property
    def encoded_with(self) -> SpanKind | None:
        """Neighbours of which this is the same are one piece for the tokenizer: all context, None here, or a text or call."""
        return _ENCODED_WITH[self.kind]


_ENCODED_WITH = {k: None if k not in TRAINED_KINDS else SpanKind.call if k in CALL_KINDS else k for k in SpanKind}


class Rendering(NamedTuple):
    """The text of one example."""

    segments: tuple[Segment, ...]
    steps: tuple[int, ...] = ()
    """The steps that it trains, by their numbers among `Conversation.steps`."""
    as_letters: re.Pattern[str] | None = None
    """Matches a control token; those that a value spells are letters. None: no value spells one."""
    by_chunks: bool = False
    """All text is letters, and the context and each text and call of the agent may be encoded by themselves."""


class LeftOut(NamedTuple):
    """A step that no rendering trains."""

    step: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A conversation in a layout."""

    conversation: Conversation
    """As it is laid out, the tools of an MSAgent record lifted where the layout writes them itself."""
    renderings: tuple[Rendering, ...]
    left_out: tuple[LeftOut, ...] = ()
    prompts_differ: int = 0
    """Steps whose prompt is not what a server would send; `stable` alone has such."""
    not_written: tuple[str, ...] = ()
    """Codes of what the layout leaves out or writes otherwise than the source."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Codes of all that is not as in the source; they are counted."""
        left_out = [f"step_left_out_{step.reason}" for step in self.left_out]
        return (*self.not_written, *left_out, *("prompt_not_as_served",) * self.prompts_differ)


@dataclass(frozen=True, slots=True)
class MsagentTemplate:
    """The layout of the original script, byte for byte, plus a real stop token after every step.

    `<|system|>:...\\n\\n<|user|>:...\\n\\n<|assistant|>:...`; without the stop tokens the text is exactly the original's.
    """

    stop_token: str
    thought_tokens: bool = False
    """`<think>` and `</think>` are tokens of the tokenizer; else they are letters."""
    beginning: str | None = None
    """Token that a text begins with, where the tokenizer puts one before every text."""

    def render(self, conversation: Conversation, context_rounds: int = 0) -> list[Segment]:
        """Lay the whole conversation out; joined texts without stops are the original text."""
        segments = [Segment(self.beginning, SpanKind.header, special=True)] if self.beginning else []
        agent_speaks = False
        for message, context_only in as_msagent(conversation).with_context_only(context_rounds):
            if message.source is None or not agent_speaks:
                separator = "\n\n" if len(segments) > bool(self.beginning) else ""
                role = message.role if message.source is None else "assistant"
                segments.append(Segment(f"{separator}<|{role}|>:", SpanKind.header))
            agent_speaks = message.source is not None
            if message.role == "assistant":
                step = step_segments(message.source or (), self.stop_token)
                if message.reasoning_content:
                    first = step[0].kind is SpanKind.header  # white space before the step
                    thought = self._thought(message.reasoning_content)
                    step[first:first] = mask_history(thought, context_only=not message.reasoning_trained)
                segments += mask_history(step, context_only=context_only)
            elif message.source is not None:
                for part in message.source:  # the result, and the blanks after it
                    kind = SpanKind.observation if isinstance(part, Observation) else SpanKind.header
                    segments.append(Segment(part.source, kind))
            else:
                segments.append(Segment(message.text, SpanKind.system if message.role == "system" else SpanKind.user))
        return segments

    def _thought(self, reasoning: str) -> list[Segment]:
        """Lay out what the agent thinks before it speaks."""
        opening, closing = "<think>", "</think>"
        if not self.thought_tokens:
            return [Segment(thought_text(reasoning), SpanKind.reasoning)]
        return [
            Segment(opening, SpanKind.reasoning, special=True),
            Segment(f"\n{reasoning}\n", SpanKind.reasoning),
            Segment(closing, SpanKind.reasoning, special=True),
            Segment("\n\n", SpanKind.reasoning),
        ]

    def lay_out(self, conversation: Conversation, context_rounds: int = 0) -> LaidOut | tuple[str, str]:
        """Render a conversation whose first `context_rounds` rounds are shown only; else say why not: (reason, detail)."""
        try:
            segments = self.render(conversation, context_rounds)
        except GrammarError as error:
            return error.reason, error.detail
        agent = (
            context_only
            for message, context_only in conversation.with_context_only(context_rounds)
            if message.role == "assistant"
        )
        steps = tuple(number for number, context_only in enumerate(agent) if not context_only)
        rendering = Rendering(tuple(segments), steps, by_chunks=True)
        return LaidOut(conversation, (rendering,), not_written=not_written(conversation))


def thought_text(reasoning: str) -> str:
    """Return a thought as the layout `msagent` writes it."""
    return f"<think>\n{reasoning}\n</think>\n\n"


def mask_history(segments: Iterable[Segment], *, context_only: bool) -> Iterable[Segment]:
    """Return the segments of a message, what the agent says as context alone where it is `context_only`."""
    return [segment._replace(context_only=segment.is_assistant) for segment in segments] if context_only else segments


def step_segments(parts: Sequence[Part], stop_token: str) -> list[Segment]:
    """Lay one step out, source text kept to the byte: the blanks at its edges are context, the stop follows its last word."""
    segments: list[Segment] = []
    source = parts[0].source if len(parts) == 1 else "".join([part.source for part in parts])
    start = len(source) - len(source.lstrip())
    stop = len(source.rstrip())
    if start:
        segments.append(Segment(source[:start], SpanKind.header))
    position = 0
    for part in parts:
        if isinstance(part, Call):
            segments += call_segments(part.source, call_places(part))
        elif text := part.source[max(start - position, 0) : max(stop - position, 0)]:
            segments.append(Segment(text, SpanKind.text))
        position += len(part.source)
    segments.append(Segment(stop_token, SpanKind.stop, special=True))
    if stop < len(source):
        segments.append(Segment(source[stop:], SpanKind.header))
    return segments


def call_segments(text: str, places: Iterable[CharSpan]) -> list[Segment]:
    """Cut the text of a call into its names and parameters, which stand at `places`, and its syntax."""
    segments: list[Segment] = []
    end = 0
    for start, stop in places:
        if start > end:
            segments.append(Segment(text[end:start], SpanKind.call_syntax))
        if stop > start:
            segments.append(Segment(text[start:stop], SpanKind.call))
        end = stop
    if end < len(text):
        segments.append(Segment(text[end:], SpanKind.call_syntax))
    return segments
