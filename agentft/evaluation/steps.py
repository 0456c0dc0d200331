"""Conversation -> steps: for each thing the agent should say, the context it sees and the reference."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agentft.data.conversation import Conversation
from agentft.data.examples import Rendered
from agentft.data.msagent import as_msagent
from agentft.data.render import CallForm, MsagentTemplate, with_history
from agentft.data.template_choice import Layout
from agentft.data.text_ids import Ids
from agentft.data.tokens import Example
from agentft.evaluation.parse import to_msagent
from agentft.evaluation.step_scores import OfferedTool, StepRecord


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
        called = conversation.called_tools
        return StepRecord(
            conversation_id=conversation.id,
            piece_of=conversation.piece_of,
            step=self.index,
            reference=self.reference,
            prediction=to_msagent(prediction, self.call_form),
            offered=_offered(conversation),
            language=conversation.language,
            rounds=conversation.rounds,
            seen_tool=called <= seen_tools if seen_tools is not None and called else None,
        )


def conversation_steps(conversation: Conversation, example: Example, template: Layout) -> list[Step]:
    """Return the steps of one conversation in order; `example` is its tokenised form."""
    conversation = as_msagent(conversation)
    references = _reference_texts(conversation, example.context_rounds)
    return [
        Step(conversation, index, example.input_ids, start, stop, reference, call_form_of(template))
        for index, ((start, stop), reference) in enumerate(zip(example.steps(), references, strict=True))
    ]


def call_form_of(layout: Layout) -> CallForm:
    """Return how a model writes calls that was trained in this layout."""
    if isinstance(layout, MsagentTemplate):
        return CallForm.msagent
    return CallForm.hermes if "<tool_call>" in layout.template.source else CallForm.llama


def steps_by_number(made: Rendered, layout: Layout) -> dict[int, Step]:
    """Return the steps that the examples of a conversation train, by their number among all steps of the agent."""
    found: dict[int, Step] = {}
    for piece in made.pieces:
        messages = [piece.conversation.messages[at] for at in piece.conversation.steps]
        trained = (number for number, message in enumerate(messages) if message.trained)
        found.update(zip(trained, conversation_steps(piece.conversation, piece.example, layout), strict=True))
    return found


def all_steps(conversations: Iterable[Conversation], examples: Sequence[Example], template: Layout) -> list[Step]:
    """Return the steps of many conversations, in order."""
    by_id = {example.id: example for example in examples}
    return [step for c in conversations if c.id in by_id for step in conversation_steps(c, by_id[c.id], template)]


def _reference_texts(conversation: Conversation, context_rounds: int) -> list[str]:
    """Collect what the agent says, step by step, in the words of the data, without what is only shown."""
    return [
        message.source_text.strip()
        for message, history in with_history(conversation, context_rounds)
        if message.role == "assistant" and not history
    ]


def _offered(conversation: Conversation) -> tuple[OfferedTool, ...] | None:
    if not conversation.offered:
        return None
    return tuple(
        OfferedTool(tool.name, None if tool.parameter_names is None else tuple(sorted(tool.parameter_names)))
        for tool in conversation.offered
    )
