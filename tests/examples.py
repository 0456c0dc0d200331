"""Make the examples of conversations that are one each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agentft.data.conversation import Conversation
from agentft.data.render import MsagentTemplate
from agentft.data.tokens import Example, SegmentEncoder
from agentft.data.truncation import render_all


def tokenize(
    conversations: Iterable[Conversation], template: MsagentTemplate, encoder: SegmentEncoder, context_rounds: int = 0
) -> Iterator[Example]:
    """Yield the example of each conversation in the layout `msagent`, whatever its length."""
    for made in render_all(list(conversations), template, encoder, {}, context_rounds):
        (piece,) = made.pieces
        yield piece.example
