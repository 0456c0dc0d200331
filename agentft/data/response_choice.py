"""Choose the response template that reads back what a layout says of probe conversations, and write the servers' one."""

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

from agentft.data.calls import Call, Said, ToolCall, parameter_types, read_call
from agentft.data.chat_layout import ChatLayout
from agentft.data.chat_template import ChatTemplate
from agentft.data.conversation import Conversation, Message, Origin
from agentft.data.render import LaidOut, MsagentTemplate, SpanKind
from agentft.data.response import PARTS, ResponseTemplate, TemplateUnknown, mark_pattern, our_templates
from agentft.errors import FormatError

log = logging.getLogger(__name__)

_OWN = "of the tokenizer"
_PARAMETERS = {"boat": {"type": "string"}, "hours": {"type": "integer"}}
_SCHEMA = {"type": "object", "properties": _PARAMETERS, "required": ["boat"]}
_FUNCTION = {"name": "moor", "description": "Moors a boat.", "parameters": _SCHEMA}
_TOOL: dict[str, Any] = {"type": "function", "function": _FUNCTION}
_FIRST = ToolCall("moor", {"boat": "Anna \\n 'II'", "hours": 3})
_SECOND = ToolCall("moor", {"boat": "7"})
_RESULT = "Done."
_chosen: WeakKeyDictionary[ChatTemplate, ResponseTemplate | None] = WeakKeyDictionary()


class TrainedStep(NamedTuple):
    """One step of a rendered conversation."""

    number: int
    """Among `Conversation.steps`."""
    prompt: str
    text: str
    """Of the agent, without its stop."""


def trained_steps(layout: ChatLayout, conversation: Conversation) -> Iterator[TrainedStep]:
    """Yield the steps that the renderings of a conversation train; none where it cannot be said."""
    laid_out = layout.lay_out(conversation)
    for rendering in laid_out.renderings if isinstance(laid_out, LaidOut) else ():
        numbers = iter(rendering.steps)
        before = said = ""
        for segment in rendering.segments:
            if segment.trained and segment.kind is SpanKind.stop:
                yield TrainedStep(next(numbers), before, said)
            if segment.trained and segment.kind is not SpanKind.stop:
                said += segment.text
            else:
                before, said = before + said + segment.text, ""


def choose_response(layout: ChatLayout) -> ResponseTemplate | None:
    """Return the first response template that reads back what the layout says, the tokenizer's own first; None: none does."""
    template = layout.template
    if template not in _chosen:
        probes = list(_probes(layout))
        fitting = (each for each in _candidates(layout) if probes and all(probe.is_read_by(each) for probe in probes))
        _chosen[template] = next(fitting, None)
        if _chosen[template] is None:
            log.warning("no response template reads this chat template: replies that should call count as not read")
    return _chosen[template]


def servers_template(layout: ChatLayout | MsagentTemplate) -> dict[str, Any] | None:
    """Return a response template by which `parse_response` reads the layout back; None: the tokenizer has one, or none does."""
    if isinstance(layout, MsagentTemplate):
        file = files("agentft.data").joinpath("templates", "msagent.response.json")
        own: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        own["fields"]["content"]["close_pattern"] = f"\\s*{re.escape(layout.stop_token)}"
        return own
    response, tokenizer = choose_response(layout), layout.template.tokenizer
    if response is None or response.name == _OWN:
        return None
    probes = list(_probes(layout))
    spec = _for_transformers(response, layout, [probe.step.prompt for probe in probes])
    for step, message, tools in probes:
        text = step.text + layout.traits.stops[0]
        try:
            read = tokenizer.parse_response(text, spec, prefix=step.prompt, tools=list(tools))
            calls = tuple(map(read_call, read.get("tool_calls") or ()))
        except (ValueError, KeyError, FormatError) as error:
            log.info("no response template for servers: %s", str(error).partition("\n")[0])
            return None
        pieces = (read.get("content") or "", Call("", calls, None))
        said = Said(pieces, (read.get("reasoning_content") or "").strip())
        if part := differs(said, message):
            log.info("no response template for servers: parse_response reads other %s", part)
            return None
    return spec


def _for_transformers(response: ResponseTemplate, layout: ChatLayout, prompts: Sequence[str]) -> dict[str, Any]:
    """Write a template of the package with the keys that transformers knows."""
    headers = [manner.header for manner in layout.traits.manners if manner.header]
    header = "".join(signs[0] for signs in takewhile(lambda signs: len(set(signs)) == 1, zip(*headers, strict=False)))
    opened = [found.start() for f in response.fields if f.part == "reasoning" and (found := f.open.search(header))]
    header = header[: min(opened, default=None)]
    anchors = {header: None} if header else {}
    for prompt in prompts:
        behind = prompt.rpartition(header)[2] if header else prompt
        if not header or _RESULT in behind:  # no header stands between a result, or a user, and the answer
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
    said_calls, calls = (
        [(call.name, json.dumps(call.arguments, sort_keys=True)) for call in each]
        for each in (said.calls, message.tool_calls)
    )
    return "calls" if said.failures or said_calls != calls else ""


def _candidates(layout: ChatLayout) -> Iterator[ResponseTemplate]:
    own = getattr(layout.template.tokenizer, "response_template", None)
    if isinstance(own, Mapping):
        try:
            yield ResponseTemplate(_OWN, own)
        except TemplateUnknown as unknown:
            log.info("%s", unknown)
    calls = layout.traits.tools
    yield from sorted(our_templates(), key=lambda each: any(f.part == "call" for f in each.fields) != calls)


class _Probe(NamedTuple):
    step: TrainedStep
    message: Message
    tools: tuple[dict[str, Any], ...]

    def is_read_by(self, template: ResponseTemplate) -> bool:
        types = parameter_types(self.tools, self.message.tool_calls)
        return not differs(template.read(self.step.text, self.step.prompt, types), self.message)


def _probes(layout: ChatLayout) -> Iterator[_Probe]:
    """Yield the steps of conversations that the layout can say, each alone: one which it refuses takes no other with it."""
    traits = layout.traits
    question, answer = Message("user", "Hello?"), Message("assistant", "Ahoy: {1} [2] (3)!")
    for thought in (None, "It asks.") if traits.reasoning else (None,):
        for calls in ((), (_FIRST,), (_FIRST, _SECOND)) if traits.tools else ((),):
            called = [Message("assistant", tool_calls=calls)] if calls else []
            results = [Message("tool", _RESULT, name=call.name) for call in calls]
            said = (question, *called, *results, answer)
            messages = tuple(replace(m, reasoning_content=thought) if m.role == "assistant" else m for m in said)
            tools = (_TOOL,) if calls and traits.declarations else ()
            conversation = Conversation("probe", messages, tools, Origin("probe", 0))
            for step in trained_steps(layout, conversation):
                yield _Probe(step, messages[conversation.steps[step.number]], tools)
