"""Cut conversations into steps: for each thing the agent should say, the context it sees and the reference."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from agentft.data.calls import Call, CallFailure, parameter_types
from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import any_of
from agentft.data.conversation import Conversation, Message
from agentft.data.msagent import GrammarError, as_msagent, read_system
from agentft.data.render import MsagentTemplate
from agentft.data.response import Said, said_text, thought_template
from agentft.data.response_choice import choose_response
from agentft.data.template_choice import Layout
from agentft.data.tokens import Example, Ids
from agentft.evaluation.parse import (
    END_OF_SEQUENCE_TEXTS,
    USER_TAGS,
    msagent_text,
    parse_reply,
    with_msagent_calls,
    without_end,
)
from agentft.evaluation.scoring import OfferedTool, StepRecord

_PROMPT_END = 32
"""Tokens of the prompt that are looked at for a thought that it opens."""


@dataclass(frozen=True)
class ReplyReader:
    """Reads what a model says in the layout of a chat template."""

    layout: ChatLayout

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a completion; letters that spell a control token are told from the token."""
        return said_text(ids, self.layout.template.tokenizer, self._control)

    def prompt_end(self, ids: Sequence[int]) -> str:
        """Return the text of the last tokens of a prompt."""
        text: str = self.layout.template.tokenizer.decode(ids[-_PROMPT_END:], skip_special_tokens=False)
        return text

    def read(self, text: str, prompt: str, types: Mapping[Any, tuple[str, ...]], *, calls: bool) -> Said:
        """Take a completion apart. Where the layout cannot be read, one that should call (`calls`) is a failed call."""
        traits = self.layout.traits
        ends = tuple(dict.fromkeys((*traits.stops, *traits.call_stops, *END_OF_SEQUENCE_TEXTS)))
        kept = without_end(text, ends)
        # Another turn is not what this one says.
        control = self.layout.template.control_tokens
        tags = any_of(tag for tag in USER_TAGS if tag.startswith(control))
        if (other := re.search(f"(?:{any_of(ends)})\\s*(?={any_of(control)})|{tags}", kept)) is not None:
            kept = kept[: other.start()]
        response = choose_response(self.layout)
        if response is not None:
            said = response.read(kept, prompt, types)
            return said if traits.reasoning else replace(said, thought=None)
        return Said(
            (Call(kept, (), CallFailure("not_read", "no response template reads this layout")),) if calls else (kept,)
        )

    @cached_property
    def _control(self) -> dict[int, str]:
        tokens = self.layout.template.control_tokens
        return dict(zip(self.layout.template.tokenizer.convert_tokens_to_ids(list(tokens)), tokens, strict=True))


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a held-out conversation. Its context is everything before it: complete reference history."""

    conversation: Conversation
    index: int
    """0, 1, ... among the steps that are asked for."""
    at: int
    """Position of its message in the conversation."""
    input_ids: Ids
    """The whole conversation, shape [T], shared by its steps."""
    start: int
    """Length of the context: `input_ids[:start]` is the prompt."""
    stop: int
    """Position after the reference's stop token."""
    reference: str
    """In MSAgent form, whatever the layout: scores are comparable across layouts."""
    reader: ReplyReader | None = None
    """Of the layout of a chat template."""

    @property
    def message(self) -> Message:
        """The reference as a message."""
        return self.conversation.messages[self.at]

    @property
    def user(self) -> str:
        """The user's message that this step answers."""
        return next(m.text for m in reversed(self.conversation.messages[: self.at]) if m.role == "user")

    @property
    def observations(self) -> list[str]:
        """Return what tools returned just before this step."""
        results = list(takewhile(lambda m: m.role == "tool", reversed(self.conversation.messages[: self.at])))
        return [each.source_text.strip() or each.text for each in reversed(results)]

    @property
    def context_hash(self) -> str:
        """Digest of the ids of the prompt."""
        return hashlib.sha256(self.input_ids[: self.start].tobytes()).hexdigest()[:16]

    @property
    def key(self) -> tuple[str, int, str]:
        """Name the step: its conversation, its number and its context."""
        return self.conversation.id, self.index, self.context_hash

    def record(self, prediction: str, seen_tools: frozenset[str] | None = None) -> StepRecord:
        """Join the step with a completion, in MSAgent form; `seen_tools` are the tools that training called."""
        conversation = self.conversation
        called = conversation.called_tools
        replies: dict[str, Any] = {}
        reference = self.reference
        if self.reader is not None:
            expected = _said(self.message)
            prompt = self.reader.prompt_end(self.input_ids[: self.start].tolist())
            said = self.reader.read(prediction, prompt, self._types, calls=bool(self.message.tool_calls))
            prediction, reference = msagent_text(said), reference or msagent_text(expected)
            replies = {"prediction_reply": with_msagent_calls(said), "reference_reply": with_msagent_calls(expected)}
        elif any(message.reasoning_content for message in conversation.messages):
            said, expected = thought_template().read(prediction), _said(self.message)
            prediction = "".join(piece for piece in said.pieces if isinstance(piece, str)).strip()
            for name, text, read in (("prediction", prediction, said), ("reference", reference, expected)):
                reply = parse_reply(text)
                replies[f"{name}_reply"] = replace(reply, reasoning=read.reasoning, thought=read.thought)
        return StepRecord(
            conversation_id=conversation.id,
            piece_of=conversation.piece_of,
            step=self.index,
            reference=reference,
            prediction=prediction,
            offered=_offered(conversation),
            language=conversation.language,
            rounds=conversation.rounds,
            seen_tool=called <= seen_tools if seen_tools is not None and called else None,
            **replies,
        )

    @property
    def _types(self) -> dict[Any, tuple[str, ...]]:
        conversation = self.conversation
        tools = conversation.tools or read_system(conversation.system).tools
        return parameter_types(tools, conversation.tool_calls)


def conversation_steps(conversation: Conversation, example: Example, template: Layout) -> list[Step]:
    """Return the steps of one conversation in order; `example` is its tokenised form."""
    reader = None if isinstance(template, MsagentTemplate) else ReplyReader(template)
    # A chat template also says what MSAgent text cannot.
    with suppress(GrammarError) if reader is not None else nullcontext():
        conversation = as_msagent(conversation)
    messages = enumerate(conversation.with_context_only(example.context_rounds))
    asked = [at for at, (message, context_only) in messages if message.role == "assistant" and not context_only]
    return [
        Step(
            conversation, index, at, example.input_ids, start, stop,
            conversation.messages[at].source_text.strip(), reader,
        )
        for index, (at, (start, stop)) in enumerate(zip(asked, example.steps(), strict=True))
    ]  # fmt: skip


def all_steps(conversations: Iterable[Conversation], examples: Sequence[Example], template: Layout) -> list[Step]:
    """Return the steps of many conversations, in order."""
    by_id = {example.id: example for example in examples}
    return [step for c in conversations if c.id in by_id for step in conversation_steps(c, by_id[c.id], template)]


def _said(message: Message) -> Said:
    """Return a message as if it had been read."""
    attempts = [Call("", (call,), None) for call in message.tool_calls]
    pieces: tuple[str | Call, ...] = (*[message.text] * bool(message.text.strip()), *attempts)
    reasoning = (message.reasoning_content or "").strip()
    return Said(pieces, reasoning, True if reasoning else None)


def _offered(conversation: Conversation) -> tuple[OfferedTool, ...] | None:
    if not conversation.offered:
        return None
    return tuple(
        OfferedTool(tool.name, None if tool.parameter_names is None else tuple(sorted(tool.parameter_names)))
        for tool in conversation.offered
    )
