"""Choose the layout of a run: the model's own chat template, if small conversations with tools come out of it, or MSAgent's."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from agentft.data.calls import ToolCall
from agentft.data.chat_layout import ChatLayout, ends_of, thought_end
from agentft.data.chat_template import (
    CallIds,
    ChatMessage,
    ChatTemplate,
    Manner,
    MarkedText,
    Traits,
    answer_to,
    handed_over,
    marked_message,
    server_messages,
)
from agentft.data.conversation import Conversation, Message, Origin, chat_messages
from agentft.data.render import LaidOut, MsagentTemplate, SpanKind
from agentft.errors import ConfigError, FormatError

OURS = ("chatml", "qwen2.5", "qwen3", "llama3")
NAMES = ("auto", "native", "msagent", *OURS)
"""Values of `model.template`; a path that ends in `.jinja` is another."""

_CHATML = {
    "chatml": ("", ""),
    "qwen2.5": ("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", ""),
    "qwen3": ("", "<think>\\n\\n</think>\\n\\n"),
}
"""Layouts that share `chatml.jinja`: the system text where a conversation has none, and how an answer opens."""

Layout = MsagentTemplate | ChatLayout

log = logging.getLogger(__name__)


def choose_template(
    name: str,
    tokenizer: Any,
    stop_token: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    *,
    stable: bool = False,
) -> Layout:
    """Return the layout `name` for a model with this tokenizer.

    Args:
        stop_token: ends every step in `msagent`; None: the tokenizer's end-of-sequence token.
        template_args: for a chat template, as `apply_chat_template` takes them.
        stable: where a chat template rewrites history, one example whose prompts may differ, see `ChatLayout`.

    Raises:
        ConfigError: no layout of that name, or the tokenizer lacks what it needs.
    """
    if name == "auto":
        native = _native(tokenizer, template_args, stable=stable)
        if native is not None and stop_token is None:
            return native
        name = "msagent" if native is None else "native"
    if name == "msagent":
        stop_token = stop_token or tokenizer.eos_token
        if stop_token is None:
            raise ConfigError("the tokenizer has no end-of-sequence token; set model.stop_token")
        marks = {"<think>", "</think>"} <= tokenizer.get_vocab().keys()
        return MsagentTemplate(str(stop_token), thought_tokens=marks, beginning=_beginning(tokenizer))
    if stop_token is not None:
        raise ConfigError(
            f"model.stop_token={stop_token!r} is for model.template=msagent; a chat template writes its own"
        )
    text = None
    if name in OURS:
        text = template_text(name)
    elif name.endswith(".jinja"):
        if not Path(name).is_file():
            raise ConfigError(f"model.template={name}: there is no such file in {Path.cwd()}")
        text = Path(name).read_text(encoding="utf-8")
    elif name != "native":
        raise ConfigError(f"model.template={name!r}: unknown; expected one of {', '.join(NAMES)}, or a file *.jinja")
    template = ChatTemplate(tokenizer, text, template_args)
    traits = probe(template)
    if not traits.stops:
        raise ConfigError(
            "model.template: no token of the tokenizer ends an answer in this chat template; keep model.template=msagent"
        )
    return ChatLayout(template, traits, "stable" if stable else "exact")


def template_text(name: str) -> str:
    """Return one of our own chat templates."""
    if name not in _CHATML:
        return _template_file(name)
    system, opening = _CHATML[name]
    return f"{{%- set SYSTEM = '{system}' -%}}\n{{%- set OPENING = '{opening}' -%}}\n{_template_file('chatml')}"


def _template_file(name: str) -> str:
    return files("agentft.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def stop_tokens(layout: Layout) -> tuple[str, ...]:
    """Return the tokens that end a step of the agent, that of a text first."""
    if isinstance(layout, MsagentTemplate):
        return (layout.stop_token,)
    return tuple(dict.fromkeys((*layout.traits.stops, *layout.traits.call_stops)))


def exported_template(layout: Layout) -> str:
    """Return the chat template by which a server writes the prompts of this layout."""
    if isinstance(layout, ChatLayout):
        return layout.template.source
    beginning = f"{{{{- '{layout.beginning}' -}}}}\n" if layout.beginning else ""
    return f"{{%- set STOP = '{layout.stop_token}' -%}}\n{beginning}{_template_file('msagent')}"


def _native(tokenizer: Any, template_args: Mapping[str, Any] | None, *, stable: bool) -> ChatLayout | None:
    """Return the layout of the tokenizer's own chat template; None, with a line in the log, where it cannot say tools."""
    if not tokenizer.chat_template:
        return None
    try:
        layout = choose_template("native", tokenizer, None, template_args, stable=stable)
        assert isinstance(layout, ChatLayout)
        if layout.traits.tools and layout.traits.declarations:
            return layout
        problem = "it leaves out the declarations of tools"
        if not layout.traits.tools:
            problem = f"it cannot say calls and their results ({layout.traits.problem})"
    except ConfigError as error:
        problem = str(error)
    log.info("layout: msagent, since the model's own chat template cannot be used: %s", problem)
    return None


def _beginning(tokenizer: Any) -> str | None:
    """Return the token that the tokenizer itself puts before every text, None where it puts none."""
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and tokenizer("").input_ids[:1] == [bos] else None


# --- What a chat template can say ---

T = TypeVar("T", str, Sequence[str])

_DESCRIPTION = "Tells how hard the wind blows."
_PARAMETERS = {"place": {"type": "string", "description": "A harbour."}}
_SCHEMA = {"type": "object", "properties": _PARAMETERS, "required": ["place"]}
_FUNCTION = {"name": "wind", "description": _DESCRIPTION, "parameters": _SCHEMA}
_TOOL: dict[str, Any] = {"type": "function", "function": _FUNCTION}
_SYSTEM = Message("system", "Be brief.")
_ASK = Message("user", "Is it windy in Husum?")
_CALL = Message("assistant", tool_calls=(ToolCall("wind", {"place": "Husum"}),))
_RESULT = Message("tool", "A storm.", name="wind")
_TELL = Message("assistant", "Yes, it is.")
_THANK = Message("user", "Thanks!")
_BYE = Message("assistant", "You are welcome.")
_BOTH = Message("assistant", tool_calls=(*_CALL.tool_calls, ToolCall("wind", {"place": "Kiel"})))
_THOUGHT = "The tool knows."

_TOOLS = (_SYSTEM, _ASK, _CALL, _RESULT, _TELL, _THANK, _BYE)
_TALK = (_ASK, _TELL, _THANK, _BYE)
_BLANKS = (_ASK, Message("assistant", "  Yes.\n\n"), _THANK, Message("assistant", "\n\nBye \n"))
_PARALLEL = (_ASK, _BOTH, _RESULT, Message("tool", "Calm.", name="wind"), _TELL, _THANK, _BYE)
_BESIDE = (_ASK, replace(_CALL, content="I look."), _RESULT, _TELL, _THANK, _BYE)


def probe(template: ChatTemplate) -> Traits:
    """Find out how a template writes conversations; where it cannot say tools, the other traits are of plain talk."""
    none = (Manner(), Manner())
    traits = Traits(False, False, False, False, False, False, none, (), ())
    for as_text, content, ids in product((False, True), (False, True), get_args(CallIds)):
        trial = replace(traits, arguments_as_text=as_text, content_needed=content, call_ids=ids)
        problem = _tool_problem(ChatLayout(template, trial))
        if not problem:
            traits = replace(trial, tools=True, declarations=_declares(ChatLayout(template, trial)), problem="")
            break
        traits = replace(traits, problem=problem)
    traits = _with_stops(ChatLayout(template, traits))
    if not traits.stops:
        problem = traits.problem or "no token of the tokenizer ends what the agent says"
        return replace(traits, tools=False, problem=problem)
    traits = replace(traits, thought=_thought(ChatLayout(template, traits)))
    hopeful = replace(traits, system=True, parallel_calls=True, text_beside_call=True, reasoning=True)
    first = _TOOLS[1:] if traits.tools else _TALK
    plain, thinking = (_manner(ChatLayout(template, hopeful), some) for some in (first, _thinking(first)))
    hopeful = replace(hopeful, manners=(plain, thinking))

    def can(messages: Sequence[Message]) -> bool:
        laid_out = _lay_out(ChatLayout(template, hopeful), messages)
        return laid_out is not None and not laid_out.left_out

    return replace(
        hopeful,
        system=can((_SYSTEM, *_TALK)),
        parallel_calls=traits.tools and can(_PARALLEL),
        text_beside_call=traits.tools and can(_BESIDE),
        reasoning=can(_thinking(_TALK[:2])) or (traits.tools and can(_thinking(_TOOLS[1:3]))),
    )


def _tool_problem(layout: ChatLayout) -> str:
    """Say why a conversation with tools does not come out whole; empty where it does."""
    with_ids = [
        replace(_CALL, tool_calls=(replace(_CALL.tool_calls[0], id="call_0123456789"),)),
        replace(_RESULT, tool_call_id="call_0123456789"),
    ]
    for call, result in ((_CALL, _RESULT), with_ids):
        conversation = _conversation((_ASK, call, result, _TELL))
        messages = server_messages(conversation, layout.traits)
        try:
            plain = layout.template.render(handed_over(messages, layout.traits), conversation.tools, prompt=False)
        except FormatError as refusal:
            return refusal.detail
        text = _marked(layout, messages, conversation.tools)
        if text is None or text.text != plain:
            return "it changes the texts of messages"
        found = {plain[start:stop] for start, stop, _ in text.values}
        for said in ("wind", "Husum", _RESULT.text, _TELL.text):
            if said not in found:
                return f"it leaves out {said!r} of a call or its result"
    return ""


def _declares(layout: ChatLayout) -> bool:
    with suppress(FormatError):
        asked = handed_over(chat_messages((_ASK,)), layout.traits)
        return _DESCRIPTION in layout.template.render(asked, (_TOOL,), prompt=True)
    return False


def _with_stops(layout: ChatLayout) -> Traits:
    """Find the tokens that end a text and a step of calls."""
    traits = layout.traits
    talk = chat_messages((_ASK, _TELL, _THANK))
    alone, _ = _tokens_after(layout, talk[:2], (), SpanKind.text)
    followed, between = _tokens_after(layout, talk, (), SpanKind.text)
    own = bool(alone)
    if not alone and not followed:
        return traits
    stop = (alone or followed)[0]
    calling: tuple[str, ...] = ()
    if traits.tools:
        asked = server_messages(_conversation((_ASK, _CALL)), traits)
        answered = [*asked, answer_to(asked[1]["tool_calls"][0])]
        ends, _ = _tokens_after(layout, asked, (_TOOL,), SpanKind.call)
        goes_on, _ = _tokens_after(layout, answered, (_TOOL,), SpanKind.call)
        closing = _closing_tokens(layout, ends)
        candidates = ends[closing:] or goes_on[closing:]
        call_stop = stop if stop in ends else candidates[0] if candidates else stop
        calling = (call_stop,) if own else tuple(dict.fromkeys((call_stop, stop)))
    return replace(
        traits,
        stops=(stop,) if own else tuple(dict.fromkeys((stop, *calling))),
        call_stops=calling,
        bare_stop="" if own else between,
        stop_with_next=not own,
    )


def _closing_tokens(layout: ChatLayout, ends: Sequence[str]) -> int:
    """Return how many of the tokens behind a call close it, which are those that another call follows too."""
    text = _marked(layout, server_messages(_conversation((_ASK, _BOTH)), layout.traits), (_TOOL,))
    calls = [value for value in text.values if value.kind is SpanKind.call] if text else []
    if text is None or len(calls) < 4:
        return max(len(ends) - 1, 0)
    between = layout.template.control.findall(text.text, calls[1].stop, calls[2].start)
    return len(_common_prefix([ends, between]))


def _tokens_after(
    layout: ChatLayout, messages: Sequence[ChatMessage], tools: Sequence[Any], kind: SpanKind
) -> tuple[list[str], str]:
    """Return the control tokens between the last value of a kind and the next value, and what stands before the first."""
    text = _marked(layout, messages, tools)
    spoken = [at for at, value in enumerate(text.values) if value.kind is kind] if text else []
    # A tool's result may repeat the name of the call, so calls are counted: a name and a value.
    if text is None or not spoken or (kind is SpanKind.call and len(spoken) < 2):
        return [], ""
    at = spoken[1] if kind is SpanKind.call else spoken[-1]
    start = text.values[at].stop
    stop = next((value.start for value in text.values[at + 1 :] if value.kind is not SpanKind.call), len(text.text))
    found = list(layout.template.control.finditer(text.text, start, stop))
    return [each.group() for each in found], text.text[start : found[0].start()] if found else ""


def _thought(layout: ChatLayout) -> tuple[str, str]:
    """Find the marks around reasoning; where there are none of its own, those of most templates."""
    control = layout.template.control
    opening = re.compile(rf".*((?:{control.pattern}|<\S+>).*)", re.DOTALL)
    for messages in ((_ASK, _TELL), (_ASK, _CALL)):
        conversation = _conversation(_thinking(messages), declared=layout.traits.declarations)
        text = _marked(layout, server_messages(conversation, layout.traits), conversation.tools)
        values = text.values if text else ()
        for before, value, after in zip(values, values[1:], values[2:], strict=False):
            if text is None or value.kind is not SpanKind.reasoning:
                continue
            found = opening.match(text.text, before.stop, value.start)
            close = text.text[value.stop : thought_end(text.text, value.stop, after, control)]
            if found and not close.endswith(found[1]):
                return found[1], close
    return layout.traits.thought


def _manner(layout: ChatLayout, messages: Sequence[Message]) -> Manner:
    """Choose the arguments that make the fewest renderings of a conversation, and describe how it comes out with them."""
    thinks: list[dict[str, Any]] = [{}]
    if "enable_thinking" in layout.template.source and "enable_thinking" not in layout.template.args:
        thinks.append({"enable_thinking": any(message.reasoning_content for message in messages)})
    best: tuple[tuple[int, int, bool], Manner] | None = None
    for args in thinks:
        manner = _described(_with_manner(layout, Manner(args)), messages)
        laid_out = _lay_out(_with_manner(layout, manner), messages) if manner else None
        if manner is None or laid_out is None:
            continue
        # Where no value makes it one rendering, the mode without thoughts is meant for conversations without them.
        cost = (len(laid_out.left_out), len(laid_out.renderings), not args and len(laid_out.renderings) > 1)
        if best is None or cost < best[0]:
            best = cost, manner
    return best[1] if best else Manner()


def _described(layout: ChatLayout, messages: Sequence[Message]) -> Manner | None:
    """Describe how the steps of some conversations begin; None where the first cannot be rendered."""
    manner = layout.traits.manners[0]
    if (shown := _Rendered.of(layout, messages)) is None:
        return None
    if not shown.prompts[0].startswith(shown.before):
        return manner
    header = shown.prompts[0].removeprefix(shown.before)
    talk = _Rendered.of(layout, _TALK)
    shared = _common_prefix([header, shown.history, talk.history if talk else ""])
    whole = bool(header) and not any(message.reasoning_content for message in messages)
    if whole:
        others = ((_SYSTEM, *_TALK), _BLANKS, *((_PARALLEL, _BESIDE, _TOOLS) if layout.traits.tools else ()))
        tried = (shown, talk, *(_Rendered.of(layout, other) for other in others))
        whole = all(each.is_whole(header) for each in tried if each)  # What is refused here is refused later too.
    return replace(manner, header=header, shared_header=shared, whole=whole)


def _common_prefix(texts: Sequence[T]) -> T:
    first = texts[0]
    length = 0
    for place in zip(*texts, strict=False):
        if any(each != place[0] for each in place):
            break
        length += 1
    return first[:length]


class _Rendered(NamedTuple):
    """A conversation and a dummy question as a template writes them, plain and marked."""

    before: str
    """What stands before the first step, without the generation prompt."""
    prompts: list[str]
    """By step."""
    text: MarkedText
    plain: str

    @classmethod
    def of(cls, layout: ChatLayout, messages: Sequence[Message]) -> _Rendered | None:
        """Render a conversation; None where the template refuses it or changes its values."""
        conversation = _conversation((*messages, Message("user", "?")), declared=layout.traits.declarations)
        handed = server_messages(conversation, layout.traits)
        text = _marked(layout, handed, conversation.tools)

        def render(stop: int | None = None, *, prompt: bool = False) -> str:
            part = handed_over(handed[:stop], layout.traits)
            return layout.template.render(part, conversation.tools, prompt=prompt, args=layout.traits.manners[0].args)

        with suppress(FormatError):
            prompts = [render(at, prompt=True) for at in conversation.steps]
            return None if text is None else cls(render(conversation.steps[0]), prompts, text, render())
        return None

    @property
    def history(self) -> str:
        """The text from the first step on, as it is written once the conversation goes on."""
        return self.text.text[len(self.before) :]

    def is_whole(self, header: str) -> bool:
        """Return whether all prompts are prefixes of the text, and end where its headers do."""
        ends = list(ends_of(header, self.text)) == list(map(len, self.prompts))
        return ends and self.plain == self.text.text and all(map(self.plain.startswith, self.prompts))


def _with_manner(layout: ChatLayout, manner: Manner) -> ChatLayout:
    return replace(layout, traits=replace(layout.traits, manners=(manner, manner)))


def _lay_out(layout: ChatLayout, messages: Sequence[Message]) -> LaidOut | None:
    laid_out = layout.lay_out(_conversation(messages, declared=layout.traits.declarations))
    return laid_out if isinstance(laid_out, LaidOut) else None


def _marked(layout: ChatLayout, messages: Sequence[ChatMessage], tools: Sequence[Any]) -> MarkedText | None:
    """Render messages with marks around their values; None where the template refuses them or tears a mark apart."""
    marked = handed_over([marked_message(message) for message in messages], layout.traits)
    with suppress(FormatError):
        args = layout.traits.manners[0].args
        return MarkedText.read(layout.template.render(marked, tools, prompt=False, args=args))
    return None


def _thinking(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(replace(m, reasoning_content=_THOUGHT) if m.role == "assistant" else m for m in messages)


def _conversation(messages: Sequence[Message], *, declared: bool = True) -> Conversation:
    tools = (_TOOL,) if declared and any(message.tool_calls for message in messages) else ()
    return Conversation("probe", tuple(messages), tools, Origin("probe", 0))
