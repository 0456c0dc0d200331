"""Choose the response template that reads a layout, by laying conversations out and reading them back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import ChatTemplate
from agentft.data.conversation import Conversation, Message, Origin
from agentft.data.grammar import ToolCall
from agentft.data.render import LaidOut, SpanKind
from agentft.data.response import ResponseTemplate, Said, TemplateUnknown, our_templates, parameter_types

log = logging.getLogger(__name__)

_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "moor",
        "description": "Moors a boat.",
        "parameters": {
            "type": "object",
            "properties": {"boat": {"type": "string"}, "hours": {"type": "integer"}},
            "required": ["boat"],
        },
    },
}
_FIRST = ToolCall("moor", {"boat": "Anna \\n 'II'", "hours": 3})
_SECOND = ToolCall("moor", {"boat": "7"})
_chosen: WeakKeyDictionary[ChatTemplate, ResponseTemplate | None] = WeakKeyDictionary()


class SpokenStep(NamedTuple):
    """One step of a rendered conversation."""

    number: int
    """Among `Conversation.steps`."""
    prompt: str
    text: str
    """What the agent says, without its stop."""


def spoken_steps(layout: ChatLayout, conversation: Conversation) -> Iterator[SpokenStep]:
    """Yield the steps that the renderings of a conversation train; none where it cannot be said."""
    laid_out = layout.lay_out(conversation)
    for rendering in laid_out.renderings if isinstance(laid_out, LaidOut) else ():
        numbers = iter(rendering.steps)
        before = said = ""
        for segment in rendering.segments:
            if segment.trained and segment.kind is SpanKind.stop:
                yield SpokenStep(next(numbers), before, said)
            if segment.trained and segment.kind is not SpanKind.stop:
                said += segment.text
            else:
                before, said = before + said + segment.text, ""


def choose_response(layout: ChatLayout) -> ResponseTemplate | None:
    """Return the first response template that reads back what the layout says: the tokenizer's own, else one of ours.

    None where none does, which is said in one line.
    """
    template = layout.template
    if template not in _chosen:
        probes = [step for conversation in _probes(layout) for step in _with_message(layout, conversation)]
        fitting = (each for each in _candidates(layout) if probes and all(_reads(each, *probe) for probe in probes))
        _chosen[template] = next(fitting, None)
        if _chosen[template] is None:
            log.warning(
                "no response template reads the calls of this chat template: replies that should call count as not read"
            )
    return _chosen[template]


def differs(said: Said, message: Message) -> str:
    """Name what of a message was not read back; empty where all was."""
    if said.reasoning != (message.reasoning_content or "").strip():
        return "reasoning"
    if said.text != message.text.strip():
        return "text"
    if any(not isinstance(piece, str) and piece.failure is not None for piece in said.pieces):
        return "calls"
    return "" if [_plain(call) for call in said.calls] == [_plain(call) for call in message.tool_calls] else "calls"


def _plain(call: ToolCall) -> tuple[str, str]:
    return call.name, repr(sorted(call.arguments.items()))


def _candidates(layout: ChatLayout) -> Iterator[ResponseTemplate]:
    own = getattr(layout.template.tokenizer, "response_template", None)
    if isinstance(own, Mapping):
        try:
            yield ResponseTemplate.of("of the tokenizer", own)
        except TemplateUnknown as unknown:
            log.info("%s", unknown)
    calls = layout.traits.tools
    yield from sorted(our_templates(), key=lambda each: any(f.role == "call" for f in each.fields) != calls)


def _reads(
    template: ResponseTemplate, step: SpokenStep, message: Message, types: Mapping[Any, tuple[str, ...]]
) -> bool:
    return not differs(template.read(step.text, step.prompt, types), message)


def _with_message(layout: ChatLayout, conversation: Conversation) -> Iterator[tuple[SpokenStep, Message, Any]]:
    types = parameter_types(conversation.tools, conversation.tool_calls)
    for step in spoken_steps(layout, conversation):
        yield step, conversation.messages[conversation.steps[step.number]], types


def _probes(layout: ChatLayout) -> Iterator[Conversation]:
    """Yield conversations of what the layout can say, each alone, so that one which it refuses takes no other with it."""
    traits = layout.traits
    talk = (Message("user", "Hello?"), Message("assistant", "Ahoy: {1} [2] (3)!"))
    for thought in (None, "It asks.") if traits.reasoning else (None,):
        yield _conversation(talk, thought)
        for calls in ((_FIRST,), (_FIRST, _SECOND)) if traits.tools else ():
            results = [Message("tool", "Done.", name=call.name) for call in calls]
            asked = (talk[0], Message("assistant", tool_calls=calls), *results, talk[1])
            yield _conversation(asked, thought, (_TOOL,) * traits.declarations)


def _conversation(
    messages: Sequence[Message], thought: str | None, tools: tuple[dict[str, Any], ...] = ()
) -> Conversation:
    thinking = [replace(m, reasoning_content=thought) if m.role == "assistant" else m for m in messages]
    return Conversation("probe", tuple(thinking), tools, Origin("probe", 0))
