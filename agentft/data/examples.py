"""Make examples of conversations in a layout: render, encode, and say which steps each example trains.

Most conversations are one example. Where a chat template rewrites history, a conversation is several; each is a piece of
its own, whose conversation marks the steps that its example trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from agentft.data.conversation import Conversation
from agentft.data.records import part_id
from agentft.data.render import LaidOut, Segment, with_context_only
from agentft.data.template_choice import Layout
from agentft.data.tokens import EncodedRendering, Example, KnownIds, SegmentEncoder

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """An example and the conversation that it renders: of its steps it trains those that are marked so."""

    conversation: Conversation
    example: Example
    segments: tuple[Segment, ...] = ()
    """What the example was encoded from."""


class Attempt(NamedTuple):
    """A conversation to make examples of; its first `context_rounds` rounds are shown and not trained."""

    conversation: Conversation
    context_rounds: int = 0


class Rendered(NamedTuple):
    """What a conversation became."""

    conversation: Conversation
    pieces: tuple[Piece, ...]
    problem: tuple[str, str] | None = None
    """Reason and detail where the layout cannot hold it."""
    notes: tuple[str, ...] = ()
    """Codes of what the layout writes otherwise than the source; they are counted."""

    @property
    def tokens(self) -> int:
        """Length of the longest example."""
        return max((len(piece.example) for piece in self.pieces), default=0)

    @property
    def trains(self) -> bool:
        """Return whether any token is a label."""
        return any(piece.example.spans for piece in self.pieces)


def make_examples(
    conversations: Iterable[Conversation], template: Layout, encoder: SegmentEncoder
) -> Iterator[Rendered]:
    """Render and encode conversations, a batch at a time, in order."""
    iterator = iter(conversations)
    while batch := list(islice(iterator, _BATCH)):
        for made in render_all(template, encoder, [[Attempt(conversation)] for conversation in batch], {}):
            yield from made


def render_all(
    template: Layout, encoder: SegmentEncoder, requests: Sequence[Sequence[Attempt]], known: KnownIds
) -> Iterator[list[Rendered]]:
    """Yield for each request what its attempts became; all of them are encoded together, texts in `known` not again."""
    attempts = [attempt for own in requests for attempt in own]
    laid_out = [template.lay_out(attempt.conversation, attempt.context_rounds) for attempt in attempts]
    renderings = [
        (attempt.conversation.id, rendering)
        for attempt, each in zip(attempts, laid_out, strict=True)
        if isinstance(each, LaidOut)
        for rendering in each.renderings
    ]
    encoded = iter(encoder.encode(renderings, known))
    made: list[Rendered] = []
    for attempt, each in zip(attempts, laid_out, strict=True):
        if isinstance(each, LaidOut):
            found = [(one, rendering.segments) for rendering in each.renderings for one in next(encoded)]
            made.append(Rendered(attempt.conversation, tuple(_pieces(each, attempt, found)), None, each.notes))
        else:
            made.append(Rendered(attempt.conversation, (), each))
    results = iter(made)
    for own in requests:
        yield list(islice(results, len(own)))


def _pieces(
    laid_out: LaidOut, attempt: Attempt, found: Sequence[tuple[EncodedRendering, tuple[Segment, ...]]]
) -> Iterator[Piece]:
    """Yield the examples of a conversation, each with a conversation that marks the steps that it trains."""
    conversation = laid_out.conversation
    agent = [shown for m, shown in with_context_only(conversation, attempt.context_rounds) if m.role == "assistant"]
    if len(found) == 1 and found[0][0].steps == tuple(step for step, shown in enumerate(agent) if not shown):
        (((example, _), segments),) = found
        example = replace(example, context_rounds=attempt.context_rounds) if attempt.context_rounds else example
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
