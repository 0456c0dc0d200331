"""Where each step stands in its conversation: what the user asked, what tools had just returned, and the agent's words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from agentft.data.conversation import Conversation, Message
from agentft.data.tokens import Example


@dataclass(frozen=True, slots=True)
class StepPlace:
    """One step: the assistant's message at position `at`."""

    at: int

    def message(self, conversation: Conversation) -> Message:
        """Return what the agent says at this step, in the reference."""
        return conversation.messages[self.at]

    def user(self, conversation: Conversation) -> str:
        """Return the user's message that this step answers."""
        return next(m.text for m in reversed(conversation.messages[: self.at]) if m.role == "user")

    def observations(self, conversation: Conversation) -> tuple[Message, ...]:
        """Return what tools returned just before this step."""
        return _results(conversation.messages[: self.at][::-1])[::-1]

    def results(self, conversation: Conversation) -> tuple[Message, ...]:
        """Return what tools returned just after this step."""
        return _results(conversation.messages[self.at + 1 :])


def step_places(conversation: Conversation) -> list[StepPlace]:
    """Return the places of the steps of a conversation in order.

    A step that its source does not want trained is no reference of what to say: it is history, here and in the exam.
    """
    return [StepPlace(at) for at in conversation.steps if conversation.messages[at].trained]


def shown_steps(conversations: Iterable[Conversation], examples: Iterable[Example]) -> dict[str, int]:
    """Return, by conversation id, how many steps at its start are shown and not asked; 0 is left out.

    A long conversation is an exam in several pieces, each with some earlier rounds as context: step 0 of such a piece
    stands behind them.
    """
    asked = {example.id: len(example.steps()) for example in examples}
    shown = {each.id: len(step_places(each)) - asked[each.id] for each in conversations if each.id in asked}
    return {name: steps for name, steps in shown.items() if steps}


def _results(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(takewhile(lambda message: message.role == "tool", messages))
