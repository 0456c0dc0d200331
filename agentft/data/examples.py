"""Make examples of conversations in a layout: render, encode, and say which steps each example trains.

Most conversations are one example. Where a chat template rewrites history, a conversation is several; each is a piece of
its own, whose conversation marks the steps that its example trains.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from agentft.data.chat_layout import ChatLayout, LaidOut
from agentft.data.conversation import Conversation
from agentft.data.msagent import lift_tools, not_written
from agentft.data.records import part_id
from agentft.data.render import MsagentTemplate, Segment
from agentft.data.template_choice import Layout
from agentft.data.tokens import Draft, EncodedChunk, Example, SegmentEncoder

_BATCH = 64

Known = dict[Hashable, EncodedChunk]
"""The chunks that a conversation has shown before, and what they became."""


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
        """Whether any token is a label."""
        return any(piece.example.spans for piece in self.pieces)


def make_examples(
    conversations: Iterable[Conversation], template: Layout, encoder: SegmentEncoder
) -> Iterator[Rendered]:
    """Render and encode conversations, a batch at a time, in order."""
    iterator = iter(conversations)
    while batch := list(islice(iterator, _BATCH)):
        for made in render_all(template, encoder, [({}, [Attempt(conversation)]) for conversation in batch]):
            yield from made


def render_all(
    template: Layout, encoder: SegmentEncoder, requests: Sequence[tuple[Known, list[Attempt]]]
) -> Iterator[list[Rendered]]:
    """Yield for each request what its attempts became; all of them are encoded together."""
    if isinstance(template, ChatLayout):
        yield from _by_chat_template(template, encoder, requests)
    else:
        yield from _by_segments(template, encoder, requests)


def _by_segments(
    template: MsagentTemplate, encoder: SegmentEncoder, requests: Sequence[tuple[Known, list[Attempt]]]
) -> Iterator[list[Rendered]]:
    """Only chunks that a conversation has not shown before go to the tokenizer."""
    drafts = [[_draft(template, encoder, attempt) for attempt in attempts] for _, attempts in requests]
    unknown = [
        {chunk.key: chunk for _, draft in own if draft for chunk in draft.to_encode if chunk.key not in known}
        for (known, _), own in zip(requests, drafts, strict=True)
    ]
    encoded = iter(encoder.encode_chunks([chunk for chunks in unknown for chunk in chunks.values()]))
    for (known, attempts), own, chunks in zip(requests, drafts, unknown, strict=True):
        known.update((key, next(encoded)) for key in chunks)
        made: list[Rendered] = []
        for (conversation, _), (found, draft) in zip(attempts, own, strict=True):
            if draft is None:
                made.append(Rendered(conversation, (), (str(found[0]), str(found[1]))))
            else:
                example = encoder.finish(draft, (known[chunk.key] for chunk in draft.to_encode))
                piece = Piece(conversation, example, tuple(found))
                made.append(Rendered(conversation, (piece,), None, not_written(conversation)))
        yield made


def _draft(template: MsagentTemplate, encoder: SegmentEncoder, attempt: Attempt) -> tuple[Sequence[Any], Draft | None]:
    """Return the segments of an attempt and their draft, or why there is none."""
    conversation, context_rounds = attempt
    problem = template.problem(conversation)
    if problem is not None:
        return problem, None
    segments = template.render(conversation, context_rounds)
    return segments, encoder.draft(conversation.id, segments, context_rounds)


def _by_chat_template(
    layout: ChatLayout, encoder: SegmentEncoder, requests: Sequence[tuple[Known, list[Attempt]]]
) -> Iterator[list[Rendered]]:
    attempts = [attempt for _, own in requests for attempt in own]
    lifted = [lift_tools(attempt.conversation) for attempt in attempts]
    laid_out = [
        each if isinstance(each, tuple) else layout.lay_out(each, attempt.context_rounds)
        for each, attempt in zip(lifted, attempts, strict=True)
    ]
    texts = [
        (attempt.conversation.id, rendering)
        for attempt, each in zip(attempts, laid_out, strict=True)
        if isinstance(each, LaidOut)
        for rendering in each.renderings
    ]
    encoded = iter(encoder.renderings(layout.template.control).encode(texts))
    made: list[Rendered] = []
    for attempt, conversation, each in zip(attempts, lifted, laid_out, strict=True):
        if not isinstance(each, LaidOut) or isinstance(conversation, tuple):
            assert isinstance(each, tuple)
            made.append(Rendered(attempt.conversation, (), each))
            continue
        found = [(*one, rendering.segments) for rendering in each.renderings for one in next(encoded)]
        notes = (f"step_left_out_{step.reason}" for step in each.left_out)
        rewritten = ("prompt_not_as_served",) * each.prompts_differ
        pieces = tuple(
            _piece(conversation, example, steps, segments, number if len(found) > 1 else None)
            for number, (example, steps, segments) in enumerate(found, 1)
        )
        made.append(Rendered(attempt.conversation, pieces, None, (*notes, *rewritten)))
    results = iter(made)
    for _, own in requests:
        yield list(islice(results, len(own)))


def _piece(
    conversation: Conversation,
    example: Example,
    steps: Sequence[int],
    segments: tuple[Segment, ...],
    number: int | None,
) -> Piece:
    """Return a piece whose conversation marks the steps that the example trains."""
    wanted = {conversation.steps[step] for step in steps}
    messages = tuple(
        message if message.role != "assistant" or message.trained == (at in wanted) else replace(message, trained=False)
        for at, message in enumerate(conversation.messages)
    )
    if number is not None:
        whole = conversation.piece_of or conversation.id
        name = part_id(conversation.id, number)
        conversation = replace(conversation, id=name, piece_of=whole)
    return Piece(replace(conversation, messages=messages), replace(example, id=conversation.id), segments)
