"""A conversation by its rounds, and with its tool results shortened: what fitting takes apart and puts together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from agentft.data.conversation import Conversation, Message
from agentft.data.grammar import EXEC_CLOSE, EXEC_OPEN, Observation
from agentft.data.msagent import result_message

MIN_OBSERVATION_CHARACTERS = 100
"""Tool results are not shortened below this: less would be no evidence for what the agent says next."""

_FENCE = re.compile(r"(\s*```[^\S\n]*\w*\s*)(.*?)(\s*```\s*)", re.DOTALL)


class Rounds:
    """A conversation as its system message and its rounds: a question and what the agent made of it."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        starts = [at for at, message in enumerate(conversation.messages) if message.role == "user"]
        ends = [*starts[1:], len(conversation.messages)]
        self._head = conversation.messages[: starts[0]]
        self._rounds = [conversation.messages[start:end] for start, end in zip(starts, ends, strict=True)]
        self._steps = [sum(message.role == "assistant" for message in messages) for messages in self._rounds]

    def __len__(self) -> int:
        return len(self._rounds)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages of all rounds."""
        return tuple(message for messages in self._rounds for message in messages)

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
        return any(messages[-1].role == "tool" for messages in self._rounds[:-1])


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


def result_length(message: Message) -> int:
    """Return the characters of a tool's result, as `shorten_observations` counts them or a fence more."""
    return max(
        (len(part.body) for part in message.source or () if isinstance(part, Observation)), default=len(message.text)
    )


def count_shortened(conversation: Conversation, parts: Iterable[Conversation]) -> int:
    """Count the tool results of parts of a conversation that are not those of the conversation."""
    whole = {message.text for message in conversation.messages if message.role == "tool"}
    shown = {message.text for part in parts for message in part.messages if message.role == "tool"}
    return len(shown - whole)
