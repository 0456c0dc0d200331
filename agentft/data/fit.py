"""Fitting conversations to `dataset.max_length` by their structure, never by cutting tokens.

What survives in every case: the system text with its tools, the question of the round, and each step that is trained,
whole. What gives way, in this order: long tool results are shortened, visibly; then the oldest rounds go. With `split`
the rounds are spread over several examples instead, so that every step is trained once. What still does not fit is set
aside, and each of these outcomes is counted and listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice

from agentft.data.config import TooLong
from agentft.data.grammar import EXEC_CLOSE, EXEC_OPEN, Observation, Part, segment_steps
from agentft.data.records import Conversation, Message
from agentft.data.render import Template
from agentft.data.tokens import Example, SegmentEncoder

MIN_OBSERVATION_CHARACTERS = 100
"""Tool results are not shortened below this: less would be no evidence for what the agent says next."""

_BATCH = 512
_PRECISION = 16
"""Characters: how near the common length of shortened tool results comes to the greatest that fits."""
_FENCE = re.compile(r"(\s*```[^\S\n]*\w*\s*)(.*?)(\s*```\s*)", re.DOTALL)


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
    fitter = _Fitter(template, encoder, max_length)
    iterator = iter(conversations)
    while batch := list(islice(iterator, _BATCH)):
        problems = [template.problem(conversation) for conversation in batch]
        sound = [c for c, problem in zip(batch, problems, strict=True) if problem is None]
        examples = iter(encoder.encode([(c.id, template.render(c)) for c in sound]))
        for conversation, problem in zip(batch, problems, strict=True):
            if problem is not None:
                yield _set_aside(conversation, 0, problem)
            else:
                yield fitter.fit(Piece(conversation, next(examples)), too_long)


@dataclass(frozen=True, slots=True)
class _Fitter:
    template: Template
    encoder: SegmentEncoder
    max_length: int
    known: dict[str, list[int]] = field(default_factory=dict)
    """Ids of the chunks of the conversation at hand, most of which every attempt shares."""

    def fit(self, whole: Piece, too_long: TooLong) -> Fitted:
        conversation, tokens = whole.conversation, len(whole.example)
        if not whole.example.spans:
            return _set_aside(conversation, tokens, ("no_label", "the agent says nothing in this conversation"))
        if tokens <= self.max_length:
            return Fitted(conversation, tokens, Outcome.whole, (whole,))
        self.known.clear()
        fitted: Fitted | None = None
        match too_long:
            case TooLong.fit:
                fitted = self._newest_rounds(conversation, tokens)
            case TooLong.split:
                fitted = self._split(conversation, tokens)
            case TooLong.drop:
                pass
        return fitted or _set_aside(
            conversation, tokens, ("too_long", f"{tokens} tokens, dataset.max_length is {self.max_length}")
        )

    def _newest_rounds(self, conversation: Conversation, tokens: int) -> Fitted | None:
        """As many of the newest rounds as fit with their tool results shortened."""
        rounds = _Rounds(conversation)
        sizes = self._sizes(_Rounds(shorten_observations(conversation, MIN_OBSERVATION_CHARACTERS)))
        for first in range(len(rounds)):
            if first + 1 < len(rounds) and sizes.head + sum(sizes.rounds[first:]) > self.max_length:
                continue
            piece = self._shortened(rounds.part(conversation.id, first, len(rounds)))
            if piece is not None and piece.example.spans:
                outcome = Outcome.rounds_left_out if first else Outcome.shortened
                left_out = tuple(range(rounds.steps_before(first)))
                return Fitted(
                    conversation, tokens, outcome, (piece,), _count_shortened(conversation, [piece]), left_out
                )
        return None

    def _split(self, conversation: Conversation, tokens: int) -> Fitted | None:
        """Every round in one example, in order; examples begin with as many of the rounds before as fit."""
        rounds = _Rounds(conversation)
        sizes = self._sizes(rounds)
        pieces: list[Piece] = []
        left_out: list[int] = []
        first = 0
        while first < len(rounds):
            name = f"{conversation.id}/{len(pieces) + 1}"
            piece = self._longest_from(rounds, sizes, name, first)
            piece = piece or self._shortened(rounds.part(name, first, first + 1))
            if piece is None:
                left_out += range(rounds.steps_before(first), rounds.steps_before(first + 1))
                first += 1
                continue
            last = first + piece.conversation.rounds
            if piece.example.spans:
                pieces.append(self._with_context(rounds, sizes, piece, first))
            first = last
        if not pieces:
            return None
        shortened = _count_shortened(conversation, pieces)
        return Fitted(conversation, tokens, Outcome.spread, tuple(pieces), shortened, tuple(left_out))

    def _sizes(self, rounds: _Rounds) -> _Sizes:
        """Tokens of each round and of the system message before them, from encoding each round alone."""
        alone = [rounds.part("", at, at + 1) for at in range(len(rounds))]
        encoded = self.encoder.encode([("", self.template.render(c)) for c in alone], known=self.known)
        lengths = [len(example) for example in encoded]
        if len(rounds) < 2:
            return _Sizes(0, lengths)
        head = lengths[0] + lengths[1] - len(self._piece(rounds.part("", 0, 2)).example)
        return _Sizes(head, [length - head for length in lengths])

    def _longest_from(self, rounds: _Rounds, sizes: _Sizes, name: str, first: int) -> Piece | None:
        """The rounds from `first` on, as many as fit unchanged."""
        last = first + 1
        while last < len(rounds) and sizes.head + sum(sizes.rounds[first : last + 1]) <= self.max_length:
            last += 1
        for end in range(last, first, -1):
            piece = self._piece(rounds.part(name, first, end))
            if len(piece.example) <= self.max_length:
                return piece
        return None

    def _with_context(self, rounds: _Rounds, sizes: _Sizes, piece: Piece, first: int) -> Piece:
        """The piece with as many rounds before it as fit, shown and not trained."""
        # The piece's own rounds may have been shortened, so they are taken as they are.
        own = piece.conversation.messages[-2 * piece.conversation.rounds :]
        context = 0
        while (
            context < first and len(piece.example) + sum(sizes.rounds[first - context - 1 : first]) <= self.max_length
        ):
            context += 1
        for count in range(context, 0, -1):
            before = rounds.part(piece.conversation.id, first - count, first)
            longer = self._piece(replace(before, messages=(*before.messages, *own)), count)
            if len(longer.example) <= self.max_length:
                return longer
        return piece

    def _shortened(self, conversation: Conversation) -> Piece | None:
        """The conversation with its tool results cut to the greatest common length that fits; None where none does."""
        piece = self._piece(conversation)
        if len(piece.example) <= self.max_length:
            return piece
        longest = max(
            (len(o.body) for m in conversation.messages for o in m.parts if isinstance(o, Observation)), default=0
        )
        if longest <= MIN_OBSERVATION_CHARACTERS:
            return None
        fitting: Piece | None = None
        low, high = MIN_OBSERVATION_CHARACTERS, longest
        limit = low
        while low <= high and (fitting is None or high - low >= _PRECISION):
            piece = self._piece(shorten_observations(conversation, limit))
            if len(piece.example) <= self.max_length:
                fitting, low = piece, limit + 1
            elif fitting is None:
                return None
            else:
                high = limit - 1
            limit = (low + high) // 2
        return fitting

    def _piece(self, conversation: Conversation, context_rounds: int = 0) -> Piece:
        segments = self.template.render(conversation, context_rounds)
        (example,) = self.encoder.encode([(conversation.id, segments)], context_rounds, self.known)
        return Piece(conversation, example)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Lengths in tokens, to choose what to try: rounds tokenised together may differ from their sum by a token or two."""

    head: int
    rounds: list[int]


class _Rounds:
    """A conversation as its system message and its rounds: a question and what the agent made of it."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._head = conversation.messages[:1] if conversation.messages[0].role == "system" else ()
        turns = conversation.messages[len(self._head) :]
        self._rounds = [turns[at : at + 2] for at in range(0, len(turns), 2)]
        self._steps = [sum(len(segment_steps(message.parts)) for message in turns) for turns in self._rounds]

    def __len__(self) -> int:
        return len(self._rounds)

    def part(self, name: str, first: int, last: int) -> Conversation:
        """The rounds `first` to `last`, exclusive, under the system message."""
        turns = (message for round_ in self._rounds[first:last] for message in round_)
        whole = self._conversation.id
        piece_of = None if name == whole else whole
        return replace(self._conversation, id=name, messages=(*self._head, *turns), piece_of=piece_of)

    def steps_before(self, first: int) -> int:
        """How many steps the rounds before `first` hold."""
        return sum(self._steps[:first])


def shorten_observations(conversation: Conversation, limit: int) -> Conversation:
    """Cut every tool result after `limit` characters and say there how much is missing."""
    messages = tuple(
        message if message.role != "assistant" else _shorten_message(message, limit)
        for message in conversation.messages
    )
    return replace(conversation, messages=messages)


def _shorten_message(message: Message, limit: int) -> Message:
    parts: tuple[Part, ...] = tuple(
        _shorten(part, limit) if isinstance(part, Observation) else part for part in message.parts
    )
    return replace(message, source="".join(part.source for part in parts), parts=parts)


def _shorten(observation: Observation, limit: int) -> Observation:
    fence = _FENCE.fullmatch(observation.body)
    before, text, after = fence.groups() if fence else ("", observation.body, "")
    missing = len(text) - limit
    note = f"... [{missing} characters left out]"
    if missing <= len(note):
        return observation
    return Observation(f"{EXEC_OPEN}{before}{text[:limit]}{note}{after}{EXEC_CLOSE}")


def _count_shortened(conversation: Conversation, pieces: Sequence[Piece]) -> int:
    """How many tool results of the pieces are not those of the conversation."""
    whole = {part.source for message in conversation.messages for part in message.parts}
    shown = [p.source for c in pieces for m in c.conversation.messages for p in m.parts if isinstance(p, Observation)]
    return len(set(shown) - whole)


def _set_aside(conversation: Conversation, tokens: int, problem: tuple[str, str]) -> Fitted:
    steps = sum(len(segment_steps(message.parts)) for message in conversation.messages)
    return Fitted(conversation, tokens, Outcome.set_aside, (), 0, tuple(range(steps)), problem)
