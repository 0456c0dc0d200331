"""Make examples of conversations in a layout, and fit them to `dataset.max_length` by their structure, never by cutting tokens.

The system text with its tools, the question of a round and each step that is trained stay whole. Long tool results are
shortened, visibly; then the oldest rounds go. With `split` the rounds are spread over several examples instead, so that every
step is trained once. What still does not fit is set aside. Each outcome is counted and listed.

A conversation is one example, or several where a chat template rewrites history; each marks the steps that it trains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice

from agentft.data.config import TooLong
from agentft.data.conversation import EXEC_CLOSE, EXEC_OPEN, Conversation, Message, Observation
from agentft.data.msagent import result_message
from agentft.data.records import part_id
from agentft.data.render import LaidOut, Segment
from agentft.data.template_choice import Layout
from agentft.data.tokens import EncodedRendering, Example, KnownIds, SegmentEncoder

MIN_OBSERVATION_CHARACTERS = 100
"""Tool results are not shortened below this: less would be no evidence for what the agent says next."""

_PRECISION = 16
"""Characters: how near the common length of shortened tool results comes to the greatest that fits."""
_BATCH = 64
_FENCE = re.compile(r"(\s*```[^\S\n]*\w*\s*)(.*?)(\s*```\s*)", re.DOTALL)


# --- Conversation -> examples ---


@dataclass(frozen=True, slots=True)
class Piece:
    """An example and the conversation that it renders: of its steps it trains those that are marked so."""

    conversation: Conversation
    example: Example
    segments: tuple[Segment, ...] = ()
    """What the example was encoded from."""


class TruncationKind(StrEnum):
    """What became of a conversation."""

    whole = "whole"
    shortened = "shortened"
    """Every step is there; long tool results are not."""
    rounds_left_out = "rounds_left_out"
    """The oldest rounds are gone, and their steps with them."""
    spread = "split"
    """Several examples, or one that lacks a round which fits nowhere."""
    set_aside = "set_aside"
    """Nothing of it is used; `problem` says why."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation, what is used of it, and what is not."""

    conversation: Conversation
    tokens: int = 0
    """Length of the longest example of the whole conversation, 0 where it cannot be rendered."""
    outcome: TruncationKind = TruncationKind.whole
    pieces: tuple[Piece, ...] = ()
    shortened_observations: int = 0
    steps_left_out: tuple[int, ...] = ()
    """Which steps of the conversation, counted from 0, are in no piece."""
    problem: tuple[str, str] | None = None
    """Reason and detail where it is set aside."""
    notes: tuple[str, ...] = ()
    """Codes of what the layout writes otherwise than the source; they are counted."""

    @property
    def trains(self) -> bool:
        """Return whether any token is a label."""
        return any(piece.example.spans for piece in self.pieces)

    def set_aside(self, reason: str, detail: str) -> Rendered:
        """Return it with nothing used."""
        steps = tuple(range(len(self.conversation.steps)))
        kind = TruncationKind.set_aside
        return Rendered(self.conversation, self.tokens, kind, steps_left_out=steps, problem=(reason, detail))


def make_examples(
    conversations: Iterable[Conversation], template: Layout, encoder: SegmentEncoder
) -> Iterator[Rendered]:
    """Render and encode conversations, a batch at a time, in order."""
    iterator = iter(conversations)
    while batch := list(islice(iterator, _BATCH)):
        yield from render_all(batch, template, encoder, {})


def render_all(
    conversations: Sequence[Conversation],
    template: Layout,
    encoder: SegmentEncoder,
    known: KnownIds,
    context_rounds: int = 0,
) -> Iterator[Rendered]:
    """Yield what each conversation becomes; all are encoded together, texts in `known` not again.

    Args:
        context_rounds: Rounds at the start of each that are shown and not trained.
    """
    laid_out = [template.lay_out(conversation, context_rounds) for conversation in conversations]
    renderings = [
        (conversation.id, rendering)
        for conversation, each in zip(conversations, laid_out, strict=True)
        if isinstance(each, LaidOut)
        for rendering in each.renderings
    ]
    encoded = iter(encoder.encode(renderings, known))
    for conversation, each in zip(conversations, laid_out, strict=True):
        if isinstance(each, LaidOut):
            found = [(one, rendering.segments) for rendering in each.renderings for one in next(encoded)]
            pieces = tuple(_pieces(each, context_rounds, found))
            tokens = max((len(piece.example) for piece in pieces), default=0)
            yield Rendered(conversation, tokens, pieces=pieces, notes=each.notes)
        else:
            yield Rendered(conversation).set_aside(*each)


def _pieces(
    laid_out: LaidOut, context_rounds: int, found: Sequence[tuple[EncodedRendering, tuple[Segment, ...]]]
) -> Iterator[Piece]:
    """Yield the examples of a conversation, each with a conversation that marks the steps that it trains."""
    conversation = laid_out.conversation
    agent = [shown for m, shown in conversation.with_context_only(context_rounds) if m.role == "assistant"]
    if len(found) == 1 and found[0][0].steps == tuple(step for step, shown in enumerate(agent) if not shown):
        (((example, _), segments),) = found
        example = replace(example, context_rounds=context_rounds) if context_rounds else example
        yield Piece(conversation, example, segments)
        return
    for number, ((example, steps), segments) in enumerate(found, 1):
        wanted = {conversation.steps[step] for step in steps}
        messages = tuple(
            message
            if message.role != "assistant" or message.trained == (at in wanted)
            else replace(message, trained=False)
            for at, message in enumerate(conversation.messages)
        )
        part = replace(conversation, messages=messages)
        if len(found) > 1:
            part = replace(part, id=part_id(part.id, number), piece_of=part.piece_of or part.id)
        yield Piece(part, replace(example, id=part.id), segments)


# --- Parts of a conversation ---


class Rounds:
    """A conversation as its system message and its rounds: a question and what the agent made of it."""

    def __init__(self, conversation: Conversation) -> None:
        self._whole = conversation
        starts = [at for at, message in enumerate(conversation.messages) if message.role == "user"]
        self._borders = [*starts, len(conversation.messages)]
        self.head = starts[0]
        """Messages before the first question."""

    def __len__(self) -> int:
        return len(self._borders) - 1

    def part(self, name: str, first: int, last: int, after: Sequence[Message] = ()) -> Conversation:
        """Return the rounds `first` to `last`, exclusive, under the system message, and `after` behind them."""
        messages, borders = self._whole.messages, self._borders
        shown = (*messages[: self.head], *messages[borders[first] : borders[last]], *after)
        piece_of = None if name == self._whole.id else self._whole.id
        return replace(self._whole, id=name, messages=shown, piece_of=piece_of)

    def steps(self, first: int, last: int) -> range:
        """Return the numbers of the steps of some rounds."""
        border = self._borders
        return range(*(sum(at < border[number] for at in self._whole.steps) for number in (first, last)))


def shorten_observations(conversation: Conversation, limit: int) -> Conversation:
    """Cut every tool result after `limit` characters and say there how much is missing."""
    messages = tuple(
        message if message.role != "tool" else _shorten_result(message, limit) for message in conversation.messages
    )
    return replace(conversation, messages=messages)


def _shorten_result(message: Message, limit: int) -> Message:
    if message.source is None:
        return replace(message, content=_shortened(message.text, limit))
    observation, *blanks = message.source
    assert isinstance(observation, Observation)
    fence = _FENCE.fullmatch(observation.body)
    before, text, after = fence.groups() if fence else ("", observation.body, "")
    shortened = _shortened(text, limit)
    if shortened == text:
        return message
    return result_message(Observation(f"{EXEC_OPEN}{before}{shortened}{after}{EXEC_CLOSE}"), *blanks)


def _shortened(text: str, limit: int) -> str:
    missing = len(text) - limit
    note = f"... [{missing} characters left out]"
    return text if missing <= len(note) else f"{text[:limit]}{note}"


def _result_length(message: Message) -> int:
    """Return the characters of a tool's result, as `shorten_observations` counts them or a fence more."""
    return max(
        (len(part.body) for part in message.source or () if isinstance(part, Observation)), default=len(message.text)
    )


# --- Fitting to a length ---


@dataclass(frozen=True, slots=True)
class Truncator:
    """Renders, tokenises and fits a batch of conversations."""

    template: Layout
    encoder: SegmentEncoder
    max_length: int
    _known: KnownIds = field(default_factory=dict, init=False)
    """Texts of the batch are encoded once, however often a way to fit them is tried."""

    def fit(self, items: Sequence[tuple[Conversation, TooLong]]) -> list[Rendered]:
        """Encode all in one call; each that is too long is fitted in its own way."""
        made = render_all([conversation for conversation, _ in items], self.template, self.encoder, self._known)
        return [self._fit(whole, too_long) for whole, (_, too_long) in zip(made, items, strict=True)]

    def _fit(self, whole: Rendered, too_long: TooLong) -> Rendered:
        if whole.problem is not None:
            return whole
        if not whole.trains:
            return whole.set_aside("no_label", "the agent says nothing here that is to be trained")
        if whole.tokens <= self.max_length:
            return whole
        found = None
        if too_long is not TooLong.drop:
            found = (self._newest_rounds if too_long is TooLong.fit else self._split)(whole)
        return found or whole.set_aside("too_long", f"{whole.tokens} tokens, dataset.max_length is {self.max_length}")

    def _render(self, conversation: Conversation, context_rounds: int = 0) -> Rendered:
        (made,) = render_all([conversation], self.template, self.encoder, self._known, context_rounds)
        return made

    def _most(
        self, low: int, high: int, make: Callable[[int], Rendered], precision: int = 0
    ) -> tuple[int, Rendered] | None:
        """Return the greatest number of which what is made fits, to a precision; None where not even the lowest does."""
        found = None
        number = low
        while low <= high and (found is None or high - low >= precision):
            made = make(number)
            if made.tokens <= self.max_length:
                found, low = (number, made), number + 1
            elif found is None:
                return None
            else:
                high = number - 1
            number = (low + high) // 2
        return found

    def _newest_rounds(self, whole: Rendered) -> Rendered | None:
        """Keep as many of the newest rounds as fit with their tool results shortened."""
        conversation, rounds = whole.conversation, Rounds(whole.conversation)
        last = len(rounds)
        shortest = Rounds(shorten_observations(conversation, MIN_OBSERVATION_CHARACTERS))
        most = self._most(1, last, lambda count: self._render(shortest.part(conversation.id, last - count, last)))
        if most is None:
            return None
        first = last - most[0]
        made = self._shortened(rounds.part(conversation.id, first, last))
        if made is None or not made.trains:
            return None
        outcome = TruncationKind.rounds_left_out if first else TruncationKind.shortened
        return _used(whole, outcome, [made], rounds.steps(0, first))

    def _split(self, whole: Rendered) -> Rendered | None:
        """Put every round in one example, in order; examples begin with as many of the rounds before as fit."""
        rounds = Rounds(whole.conversation)
        parts: list[Rendered] = []
        left_out: list[int] = []
        first = 0
        while first < len(rounds):
            count, made = self._next_part(rounds, part_id(whole.conversation.id, len(parts) + 1), first)
            if made is None:
                left_out += rounds.steps(first, first + 1)
            elif made.trains:
                parts.append(made)
            first += count
        return _used(whole, TruncationKind.spread, parts, left_out) if parts else None

    def _next_part(self, rounds: Rounds, name: str, first: int) -> tuple[int, Rendered | None]:
        """Return how many rounds from `first` on share an example, and the example; None: one alone is too long."""
        most = self._most(1, len(rounds) - first, lambda n: self._render(rounds.part(name, first, first + n)))
        count, made = most or (1, self._shortened(rounds.part(name, first, first + 1)))
        if made is None or not made.trains:
            return count, made
        own = made.conversation.messages[rounds.head :]  # which may be shortened
        longer = self._most(1, first, lambda n: self._render(rounds.part(name, first - n, first, own), n))
        return count, longer[1] if longer else made

    def _shortened(self, conversation: Conversation) -> Rendered | None:
        """Cut the tool results to the greatest common length that fits; None where none does."""
        made = self._render(conversation)
        if made.tokens <= self.max_length:
            return made
        longest = max((_result_length(m) for m in conversation.messages if m.role == "tool"), default=0)
        if longest <= MIN_OBSERVATION_CHARACTERS:
            return None
        most = self._most(
            MIN_OBSERVATION_CHARACTERS,
            longest,
            lambda limit: self._render(shorten_observations(conversation, limit)),
            _PRECISION,
        )
        return most[1] if most else None


def _used(whole: Rendered, outcome: TruncationKind, parts: Sequence[Rendered], left_out: Iterable[int]) -> Rendered:
    """Return a conversation of which parts are used."""
    results, shown = (
        {m.text for part in each for m in part.conversation.messages if m.role == "tool"} for each in ([whole], parts)
    )
    return Rendered(
        whole.conversation,
        whole.tokens,
        outcome,
        tuple(piece for part in parts for piece in part.pieces),
        len(shown - results),
        tuple(left_out),
        notes=tuple(note for part in parts for note in part.notes),
    )
