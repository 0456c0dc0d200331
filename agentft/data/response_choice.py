"""Choose the response template that reads a chat template's layout, and write the one that servers read it by.

A layout's template is the first that reads back what the layout says of a few probe conversations.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import takewhile
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from agentft.data.calls import Attempt, ToolCall, parameter_types, read_call
from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import ChatTemplate
from agentft.data.conversation import Conversation, Message, Origin
from agentft.data.render import LaidOut, MsagentTemplate, SpanKind
from agentft.data.response import PARTS, ResponseTemplate, Said, TemplateUnknown, mark_pattern, our_templates

log = logging.getLogger(__name__)

_OWN = "of the tokenizer"
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
_RESULT = "Done."
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


def servers_template(layout: ChatLayout | MsagentTemplate) -> dict[str, Any] | None:
    """Return the layout's response template for `tokenizer.response_template`, by which transformers reads an answer.

    None where the tokenizer has its own, where no template reads the layout, and where `parse_response` does not read back
    what ours does.
    """
    if isinstance(layout, MsagentTemplate):
        file = files("agentft.data").joinpath("templates", "msagent.response.json")
        own: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        own["fields"]["content"]["close_pattern"] = f"\\s*{re.escape(layout.stop_token)}"
        return own
    response, tokenizer = choose_response(layout), layout.template.tokenizer
    if response is None or response.name == _OWN:
        return None
    probes = [(talk, *step) for talk in _probes(layout) for step in _with_message(layout, talk)]
    spec = _for_transformers(response, layout, [step.prompt for _, step, *_ in probes])
    for talk, step, message, _ in probes:
        text = step.text + layout.traits.stops[0]
        try:
            read = tokenizer.parse_response(text, spec, prefix=step.prompt, tools=list(talk.tools))
        except (ValueError, KeyError) as error:
            log.info("no response template for servers: %s", str(error).partition("\n")[0])
            return None
        calls = tuple(map(read_call, read.get("tool_calls") or ()))
        said = Said(
            (read.get("content") or "", Attempt("", calls, None)), (read.get("reasoning_content") or "").strip()
        )
        if part := differs(said, message):
            log.info("no response template for servers: parse_response reads other %s", part)
            return None
    return spec


def _for_transformers(response: ResponseTemplate, layout: ChatLayout, prompts: Sequence[str]) -> dict[str, Any]:
    """Write a template of the package with the keys that transformers knows."""
    headers = [manner.header for manner in layout.traits.manners if manner.header]
    header = "".join(signs[0] for signs in takewhile(lambda signs: len(set(signs)) == 1, zip(*headers, strict=False)))
    opened = [found.start() for f in response.fields if f.part == "reasoning" and (found := f.open.search(header))]
    anchors = {header[: min(opened, default=None)]: None}
    for prompt in prompts:
        behind = prompt.rpartition(next(iter(anchors)))[2]
        if _RESULT in behind:  # no header stands between a result and the answer
            anchors[behind[[*layout.template.control.finditer(behind)][-1].start() :]] = None
    stops = "|".join(map(re.escape, dict.fromkeys((*layout.traits.stops, *layout.traits.call_stops))))
    fields: dict[str, Any] = {}
    for key, given in response.spec["fields"].items():
        made = {name: value for name, value in given.items() if name in ("content", "content_args", "transform_each")}
        opening, closing = (mark_pattern(given, name) for name in ("open", "close"))
        ends = [closing.pattern] if closing is not None else []
        if PARTS[key] == "call" and opening is not None:
            made["open_pattern"] = f"\\s*(?:{opening.pattern}){given.get('head_pattern', '')}"
            ends = [f"{given.get('tail_pattern', '')}(?:{end})" for end in ends]
            made |= {"repeats": True, "transform": {"type": "function", **given.get("transform", {})}}
        elif opening is not None:
            made["open_pattern"] = opening.pattern
        made["close_pattern"] = "|".join([*ends, f"\\s*(?:{stops})"])
        fields[key] = made
    return {"defaults": {"role": "assistant"}, "start_anchor": list(anchors), "fields": fields}


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
    return call.name, json.dumps(call.arguments, sort_keys=True)


def _candidates(layout: ChatLayout) -> Iterator[ResponseTemplate]:
    own = getattr(layout.template.tokenizer, "response_template", None)
    if isinstance(own, Mapping):
        try:
            yield ResponseTemplate(_OWN, own)
        except TemplateUnknown as unknown:
            log.info("%s", unknown)
    calls = layout.traits.tools
    yield from sorted(our_templates(), key=lambda each: any(f.part == "call" for f in each.fields) != calls)


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
            results = [Message("tool", _RESULT, name=call.name) for call in calls]
            asked = (talk[0], Message("assistant", tool_calls=calls), *results, talk[1])
            yield _conversation(asked, thought, (_TOOL,) * traits.declarations)


def _conversation(
    messages: Sequence[Message], thought: str | None, tools: tuple[dict[str, Any], ...] = ()
) -> Conversation:
    thinking = [replace(m, reasoning_content=thought) if m.role == "assistant" else m for m in messages]
    return Conversation("probe", tuple(thinking), tools, Origin("probe", 0))
