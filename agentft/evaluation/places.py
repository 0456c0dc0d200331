"""Where each step stands in its conversation: what the user asked, what tools had just returned, and the agent's words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from agentft.data.grammar import Call, Observation, Part
from agentft.data.records import Conversation
from agentft.data.tokens import Example


@dataclass(frozen=True, slots=True)
class StepPlace:
    """One step: parts `start` to `stop` (exclusive) of assistant message `message`."""

    message: int
    start: int
    stop: int

    def parts(self, conversation: Conversation) -> tuple[Part, ...]:
        """What the agent says at this step, in the reference."""
        return conversation.messages[self.message].parts[self.start : self.stop]

    def calls(self, conversation: Conversation) -> tuple[Call, ...]:
        """The reference calls of this step."""
        return tuple(part for part in self.parts(conversation) if isinstance(part, Call))

    def user(self, conversation: Conversation) -> str:
        """The user turn that this step answers."""
        return conversation.messages[self.message - 1].source

    def observations(self, conversation: Conversation) -> tuple[Observation, ...]:
        """What tools returned just before this step."""
        return _observations(conversation.messages[self.message].parts[: self.start][::-1])[::-1]

    def results(self, conversation: Conversation) -> tuple[Observation, ...]:
        """What tools returned just after this step."""
        return _observations(conversation.messages[self.message].parts[self.stop :])


def step_places(conversation: Conversation) -> list[StepPlace]:
    """Return the places of the steps of a conversation in order; what is blank is no step.

    A step that its source does not want trained is no reference of what to say: it is history, here and in the exam.
    """
    places: list[StepPlace] = []
    for number, message in enumerate(conversation.messages):
        start = 0
        untrained = message.untrained_parts
        for observed, group in groupby(message.parts, key=lambda part: isinstance(part, Observation)):
            parts = list(group)
            if not observed and start not in untrained and any(part.source.strip() for part in parts):
                places.append(StepPlace(number, start, start + len(parts)))
            start += len(parts)
    return places


def shown_steps(conversations: Iterable[Conversation], examples: Iterable[Example]) -> dict[str, int]:
    """Return, by conversation id, how many steps at its start are shown and not asked; 0 is left out.

    A long conversation is an exam in several pieces, each with some earlier rounds as context: step 0 of such a piece
    stands behind them.
    """
    asked = {example.id: len(example.steps()) for example in examples}
    shown = {each.id: len(step_places(each)) - asked[each.id] for each in conversations if each.id in asked}
    return {name: steps for name, steps in shown.items() if steps}


def _observations(parts: Sequence[Part]) -> tuple[Observation, ...]:
    """The observations at the head of `parts`, blanks between them passed over."""
    found: list[Observation] = []
    for part in parts:
        if isinstance(part, Observation):
            found.append(part)
        elif part.source.strip():
            break
    return tuple(found)
