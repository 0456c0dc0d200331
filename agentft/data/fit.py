"""Fitting conversations to `dataset.max_length` by their structure, never by cutting tokens.

What survives in every case: the system text with its tools, the question of the round, and each step that is trained,
whole. What gives way, in this order: long tool results are shortened, visibly; then the oldest rounds go. With `split`
the rounds are spread over several examples instead, so that every step is trained once. What still does not fit is set
aside, and each of these outcomes is counted and listed.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice, pairwise
from typing import NamedTuple, TypeVar

from agentft.data.config import TooLong
from agentft.data.conversation import Conversation
from agentft.data.records import part_id
from agentft.data.render import Template
from agentft.data.rounds import MIN_OBSERVATION_CHARACTERS, Rounds, count_shortened, result_length, shorten_observations
from agentft.data.tokens import Draft, EncodedChunk, Example, SegmentEncoder

_BATCH = 64
_PRECISION = 16
"""Characters: how near the common length of shortened tool results comes to the greatest that fits."""
T = TypeVar("T")


class Outcome(StrEnum):
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
class Piece:
    """An example and the conversation that it renders."""

    conversation: Conversation
    example: Example


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation, what is used of it, and what is not."""

    original: Conversation
    tokens: int
    """Length of the whole conversation, 0 where it cannot be rendered."""
    outcome: Outcome
    pieces: tuple[Piece, ...]
    shortened_observations: int = 0
    steps_left_out: tuple[int, ...] = ()
    """Which of the original's steps, counted from 0, are in no piece."""
    problem: tuple[str, str] | None = None
    """Reason and detail where it is set aside."""


def fit_conversations(
    conversations: Iterable[Conversation],
    template: Template,
    encoder: SegmentEncoder,
    max_length: int,
    too_long: TooLong,
) -> Iterator[Fitted]:
    """Render, tokenise and fit conversations, a batch at a time, in order."""
    fitter = Fitter(template, encoder, max_length)
    items = ((conversation, too_long) for conversation in conversations)
    while batch := list(islice(items, _BATCH)):
        yield from fitter.fit(batch)


class _Attempt(NamedTuple):
    """Something to render and measure."""

    conversation: Conversation
    context_rounds: int = 0


_Known = dict[Hashable, EncodedChunk]

_Way = Generator[list[_Attempt], list[Piece], T]
"""A way to fit: asks for attempts, some at a time, is sent what they gave, and returns what it chose."""


@dataclass(frozen=True, slots=True)
class Fitter:
    """Renders, tokenises and fits batches of conversations."""

    template: Template
    encoder: SegmentEncoder
    max_length: int

    def fit(self, items: Sequence[tuple[Conversation, TooLong]]) -> list[Fitted]:
        """Encode all in one call, then what is too long, all of it together; each is fitted in its own way."""
        drafts: list[Draft | tuple[str, str]] = []
        for conversation, _ in items:
            problem = self.template.problem(conversation)
            drafts.append(problem or self.encoder.draft(conversation.id, self.template.render(conversation)))
        encoded = iter(
            self.encoder.encode_chunks([c for draft in drafts if isinstance(draft, Draft) for c in draft.to_encode])
        )
        fitted: list[Fitted | _Unfitted] = []
        for (conversation, too_long), draft in zip(items, drafts, strict=True):
            if not isinstance(draft, Draft):
                fitted.append(_set_aside(conversation, 0, draft))
                continue
            chunks = draft.to_encode
            found = list(islice(encoded, len(chunks)))
            tokens, labelled = draft.measure(found)
            if not labelled:
                fitted.append(_set_aside(conversation, tokens, ("no_label", _why_no_label(conversation))))
                continue
            if tokens > self.max_length and too_long is TooLong.drop:
                fitted.append(self._too_long(conversation, tokens))
                continue
            settled = self._settle(Piece(conversation, self.encoder.finish(draft, iter(found))), too_long)
            if isinstance(settled, _Unfitted):
                settled.known.update((chunk.key, each) for chunk, each in zip(chunks, found, strict=True))
            fitted.append(settled)
        self._fit_together([each for each in fitted if isinstance(each, _Unfitted)])
        return [
            each
            if isinstance(each, Fitted)
            else each.outcome or self._too_long(each.whole.conversation, len(each.whole.example))
            for each in fitted
        ]

    def _settle(self, whole: Piece, too_long: TooLong) -> Fitted | _Unfitted:
        """What becomes of a conversation that is to be used, or that it is to be fitted."""
        conversation, tokens = whole.conversation, len(whole.example)
        if tokens <= self.max_length:
            return Fitted(conversation, tokens, Outcome.whole, (whole,))
        fit = self._newest_rounds if too_long is TooLong.fit else self._split
        return _Unfitted(whole, fit(whole))

    def _too_long(self, conversation: Conversation, tokens: int) -> Fitted:
        detail = f"{tokens} tokens, dataset.max_length is {self.max_length}"
        return _set_aside(conversation, tokens, ("too_long", detail))

    def _fit_together(self, unfitted: Sequence[_Unfitted]) -> None:
        """Go all their ways side by side, so that the attempts of many conversations are encoded in one call."""
        running = [(each, next(each.way)) for each in unfitted]
        while running:
            answers = self._attempt([(each.known, attempts) for each, attempts in running])
            still_running: list[tuple[_Unfitted, list[_Attempt]]] = []
            for (each, _), pieces in zip(running, answers, strict=True):
                try:
                    still_running.append((each, each.way.send(pieces)))
                except StopIteration as end:
                    each.outcome = end.value
            running = still_running

    def _attempt(self, requests: Sequence[tuple[_Known, list[_Attempt]]]) -> Iterator[list[Piece]]:
        """Render and encode; only chunks that a conversation has not shown before go to the tokenizer."""
        drafts = [
            [
                self.encoder.draft(made.id, self.template.render(made, context_rounds), context_rounds)
                for made, context_rounds in attempts
            ]
            for _, attempts in requests
        ]
        unknown = [
            {chunk.key: chunk for draft in own for chunk in draft.to_encode if chunk.key not in known}
            for (known, _), own in zip(requests, drafts, strict=True)
        ]
        encoded = iter(self.encoder.encode_chunks([chunk for chunks in unknown for chunk in chunks.values()]))
        for (known, attempts), own, chunks in zip(requests, drafts, unknown, strict=True):
            known.update((key, next(encoded)) for key in chunks)
            examples = [self.encoder.finish(draft, (known[chunk.key] for chunk in draft.to_encode)) for draft in own]
            yield [Piece(attempt.conversation, e) for attempt, e in zip(attempts, examples, strict=True)]

    def _newest_rounds(self, whole: Piece) -> _Way[Fitted | None]:
        """As many of the newest rounds as fit with their tool results shortened."""
        conversation, tokens = whole.conversation, len(whole.example)
        rounds = Rounds(conversation)
        least = shorten_observations(conversation, MIN_OBSERVATION_CHARACTERS)
        sizes = yield from _sizes(Rounds(least), (yield [_Attempt(least)])[0])
        for first in range(len(rounds)):
            if first + 1 < len(rounds) and sizes.head + sum(sizes.rounds[first:]) > self.max_length:
                continue
            piece = yield from self._shortened(rounds.part(conversation.id, first, len(rounds)))
            if piece is not None and piece.example.spans:
                outcome = Outcome.rounds_left_out if first else Outcome.shortened
                left_out = tuple(range(rounds.steps_before(first)))
                return Fitted(
                    conversation,
                    tokens,
                    outcome,
                    (piece,),
                    count_shortened(conversation, [piece.conversation]),
                    left_out,
                )
        return None

    def _split(self, whole: Piece) -> _Way[Fitted | None]:
        """Every round in one example, in order; examples begin with as many of the rounds before as fit."""
        conversation = whole.conversation
        rounds = Rounds(conversation)
        sizes = yield from _sizes(rounds, whole)
        pieces: list[Piece] = []
        left_out: list[int] = []
        first = 0
        while first < len(rounds):
            name = part_id(conversation.id, len(pieces) + 1)
            piece = yield from self._longest_from(rounds, sizes, name, first)
            if piece is None:
                piece = yield from self._shortened(rounds.part(name, first, first + 1))
            if piece is None:
                left_out += range(rounds.steps_before(first), rounds.steps_before(first + 1))
                first += 1
                continue
            last = first + piece.conversation.rounds
            if piece.example.spans:
                pieces.append((yield from self._with_context(rounds, sizes, piece, first)))
            first = last
        if not pieces:
            return None
        shortened = count_shortened(conversation, (piece.conversation for piece in pieces))
        return Fitted(conversation, len(whole.example), Outcome.spread, tuple(pieces), shortened, tuple(left_out))

    def _longest_from(self, rounds: Rounds, sizes: _Sizes, name: str, first: int) -> _Way[Piece | None]:
        """The rounds from `first` on, as many as fit unchanged."""
        last = first + 1
        while last < len(rounds) and sizes.head + sum(sizes.rounds[first : last + 1]) <= self.max_length:
            last += 1
        for end in range(last, first, -1):
            (piece,) = yield [_Attempt(rounds.part(name, first, end))]
            if len(piece.example) <= self.max_length:
                return piece
        return None

    def _with_context(self, rounds: Rounds, sizes: _Sizes, piece: Piece, first: int) -> _Way[Piece]:
        """The piece with as many rounds before it as fit, shown and not trained."""
        # The piece's own rounds may have been shortened, so they are taken as they are.
        own = Rounds(piece.conversation).messages
        context = 0
        while (
            context < first and len(piece.example) + sum(sizes.rounds[first - context - 1 : first]) <= self.max_length
        ):
            context += 1
        for count in range(context, 0, -1):
            before = rounds.part(piece.conversation.id, first - count, first)
            (longer,) = yield [_Attempt(replace(before, messages=(*before.messages, *own)), count)]
            if len(longer.example) <= self.max_length:
                return longer
        return piece

    def _shortened(self, conversation: Conversation) -> _Way[Piece | None]:
        """The conversation with its tool results cut to the greatest common length that fits; None where none does."""
        (piece,) = yield [_Attempt(conversation)]
        if len(piece.example) <= self.max_length:
            return piece
        longest = max((result_length(m) for m in conversation.messages if m.role == "tool"), default=0)
        if longest <= MIN_OBSERVATION_CHARACTERS:
            return None
        fitting: Piece | None = None
        low, high = MIN_OBSERVATION_CHARACTERS, longest
        limit = low
        while low <= high and (fitting is None or high - low >= _PRECISION):
            (piece,) = yield [_Attempt(shorten_observations(conversation, limit))]
            if len(piece.example) <= self.max_length:
                fitting, low = piece, limit + 1
            elif fitting is None:
                return None
            else:
                high = limit - 1
            limit = (low + high) // 2
        return fitting


@dataclass(slots=True)
class _Unfitted:
    """A conversation that is too long, while a way to fit it is sought."""

    whole: Piece
    way: _Way[Fitted | None]
    known: _Known = field(default_factory=dict)
    """What its chunks became, most of which every attempt shares."""
    outcome: Fitted | None = None


def _sizes(rounds: Rounds, whole: Piece) -> _Way[_Sizes]:
    """Tokens of each round and of the system message before them."""
    length = len(whole.example)
    if len(rounds) < 2:
        return _Sizes(0, [length])
    if rounds.ends_with_result() or not all(message.trained for message in whole.conversation.messages):
        # Where the last thing in a round is a tool's result, its tokens run on into the next question; where a step is
        # not trained, no label says where it ends: measured apart.
        attempts = [_Attempt(rounds.part("", at, at + 1)) for at in range(len(rounds))]
        *alone, both = yield [*attempts, _Attempt(rounds.part("", 0, 2))]
        sizes = [len(piece.example) for piece in alone]
        head = sizes[0] + sizes[1] - len(both.example)
        return _Sizes(head, [size - head for size in sizes])
    steps = whole.example.steps()
    ends = [steps[rounds.steps_before(last) - 1][1] for last in range(1, len(rounds))]
    lengths = [stop - start for start, stop in pairwise([0, *ends, length])]
    (second,) = yield [_Attempt(rounds.part("", 1, 2))]
    head = len(second.example) - lengths[1]
    return _Sizes(head, [lengths[0] - head, *lengths[1:]])


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Lengths in tokens, to choose what to try: rounds tokenised together may differ from their sum by a token or two."""

    head: int
    rounds: list[int]


def _why_no_label(conversation: Conversation) -> str:
    if not all(message.trained for message in conversation.messages):
        return "nothing that the agent says here is to be trained, as its messages say"
    return "the agent says nothing in this conversation"


def _set_aside(conversation: Conversation, tokens: int, problem: tuple[str, str]) -> Fitted:
    steps = tuple(range(len(conversation.steps)))
    return Fitted(conversation, tokens, Outcome.set_aside, (), 0, steps, problem)
