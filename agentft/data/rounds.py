"""A conversation by its rounds, and with its tool results shortened: what fitting takes apart and puts together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from agentft.data.grammar import EXEC_CLOSE, EXEC_OPEN, Observation, Part, segment_steps
from agentft.data.records import Conversation, Message

MIN_OBSERVATION_CHARACTERS = 100
"""Tool results are not shortened below this: less would be no evidence for what the agent says next."""

_FENCE = re.compile(r"(\s*```[^\S\n]*\w*\s*)(.*?)(\s*```\s*)", re.DOTALL)


class Rounds:
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

    def ends_with_result(self) -> bool:
        """Whether a round before the last ends with a tool's result, on which the agent says nothing."""
        turns = (round_[-1].parts for round_ in self._rounds[:-1])
        return any(isinstance(next(_visible(reversed(parts)), None), Observation) for parts in turns)


def _visible(parts: Iterable[Part]) -> Iterator[Part]:
    return (part for part in parts if part.source.strip())


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


def count_shortened(conversation: Conversation, parts: Iterable[Conversation]) -> int:
    """How many tool results of parts of a conversation are not those of the conversation."""
    whole = {part.source for message in conversation.messages for part in message.parts}
    shown = [p.source for c in parts for m in c.messages for p in m.parts if isinstance(p, Observation)]
    return len(set(shown) - whole)
