"""Cut conversations into steps: for each thing the agent should say, the context it sees and the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from agentft.data.grammar import Call, Observation, Part
from agentft.data.records import Conversation
from agentft.data.render import CallForm, Template, render_assistant, shown_as, with_history
from agentft.data.text_ids import Ids
from agentft.data.tokens import Example
from agentft.evaluation.parse import quote_ends, to_msagent
from agentft.evaluation.scoring import OfferedTool, StepRecord


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


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a held-out conversation. Its context is everything before it: complete reference history."""

    conversation: Conversation
    index: int
    input_ids: Ids
    """The whole conversation, shape [T], shared by its steps."""
    start: int
    """Length of the context: `input_ids[:start]` is the prompt."""
    stop: int
    """Position after the reference's stop token."""
    reference: str
    """In MSAgent form, whatever the layout: scores are comparable across layouts."""
    call_form: CallForm = CallForm.msagent
    """How the model was asked to write calls."""

    @property
    def context_hash(self) -> str:
        """Digest of the prompt's ids: equal hashes mean equal exams."""
        return hashlib.sha256(self.input_ids[: self.start].tobytes()).hexdigest()[:16]

    def record(self, prediction: str, seen_tools: frozenset[str] | None = None) -> StepRecord:
        """Join the step with what a model answered, in MSAgent form; `seen_tools` are the tools that training called."""
        conversation = self.conversation
        called = {request.name for call in conversation.calls for request in call.requests}
        return StepRecord(
            conversation_id=conversation.id,
            piece_of=conversation.piece_of,
            step=self.index,
            reference=quote_ends(self.reference),
            prediction=to_msagent(prediction, self.call_form),
            offered=_offered(conversation),
            language=conversation.language,
            rounds=conversation.rounds,
            seen_tool=called <= seen_tools if seen_tools is not None and called else None,
        )


def conversation_steps(conversation: Conversation, example: Example, template: Template) -> list[Step]:
    """Return the steps of one conversation in order; `example` is its tokenised form."""
    references = _reference_texts(conversation, example.context_rounds)
    return [
        Step(conversation, index, example.input_ids, start, stop, reference, template.call_form)
        for index, ((start, stop), reference) in enumerate(zip(example.steps(), references, strict=True))
    ]


def all_steps(conversations: Iterable[Conversation], examples: Sequence[Example], template: Template) -> list[Step]:
    """Return the steps of many conversations, in order."""
    by_id = {example.id: example for example in examples}
    return [step for c in conversations if c.id in by_id for step in conversation_steps(c, by_id[c.id], template)]


def _reference_texts(conversation: Conversation, context_rounds: int) -> list[str]:
    """Collect what the agent says, step by step, in the words of the data, without what is only shown."""
    texts: list[str] = []
    for message, history in with_history(conversation, context_rounds):
        open_step = False
        for segment in shown_as(render_assistant(message.parts, ""), message, history=history):
            if not segment.trained:
                continue
            if segment.special:
                open_step = False
            elif open_step:
                texts[-1] += segment.text
            else:
                texts.append(segment.text)
                open_step = True
    return texts


def _offered(conversation: Conversation) -> tuple[OfferedTool, ...] | None:
    if not conversation.offered:
        return None
    return tuple(
        OfferedTool(tool.name, None if tool.parameter_names is None else tuple(sorted(tool.parameter_names)))
        for tool in conversation.offered
    )
