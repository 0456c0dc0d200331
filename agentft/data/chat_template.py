"""A tokenizer's chat template: rendered as a server renders it, its arguments and its date fixed.

`apply_chat_template` of transformers writes. Marks around the values that it is handed show where each stands in its text.
They are noncharacters, which Unicode keeps for the inside of a program, and stand just inside the outer blanks of a value, so
that a template trims, tests and splits it as it would without them.
"""

from __future__ import annotations

import datetime
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from agentft.data.conversation import Conversation, chat_messages
from agentft.data.render import SpanKind
from agentft.errors import ConfigError, FormatError

DEFAULT_DATE = "2026-01-01"
"""The day that templates are shown which ask for one: data, cache and resumed runs must not change at midnight."""

ChatMessage = dict[str, Any]
"""A message as a server hands it to a chat template."""

CallIds = Literal["given", "made", "nine", "named"]
"""Ids of calls as the record has them, made where it has none, nine letters and digits, or `functions.<name>:<number>`."""

DATE = "strftime_now"
"""Template argument: the day, as YYYY-MM-DD, that a template sees which asks for the current date."""

_FORMAT = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_TESTED = re.compile(r"""(?:startswith|endswith|split|replace)\(\s*(['"])(.*?)\1|(['"])([^'"]*)\3 +(?:not +)?in """)
_TELLING = re.compile(r"(?=.*\W)\S.+\S")
_NINE = re.compile(r"[a-zA-Z0-9]{9}")


class ChatTemplate:
    """A tokenizer's chat template with its arguments, which are the same wherever it is used."""

    def __init__(
        self, tokenizer: Any, chat_template: str | None = None, template_args: Mapping[str, Any] | None = None
    ) -> None:
        """Take the template of `tokenizer`, a tokenizer of transformers, unless another is given; one there must be."""
        self.tokenizer = tokenizer
        self.args = dict(template_args or {})
        """What is recorded: the given arguments, and the day where the template asks for the date."""
        try:
            source: str = tokenizer.get_chat_template(chat_template, tools=[{}])
        except ValueError:
            raise ConfigError("the tokenizer has no chat template; set model.template to a layout or a file") from None
        if DATE in source:
            self.args.setdefault(DATE, DEFAULT_DATE)
        self.source = _with_date(source, str(self.args.get(DATE)))
        """The template, its date fixed."""
        self.control_tokens = _control_tokens(tokenizer, source)
        """Added tokens that are letters within a value; as `sanitize_control_tokens` of transformers finds them."""
        self.control = re.compile(any_of(self.control_tokens))
        self.control_in_json = re.compile(
            any_of(json.dumps(token, ensure_ascii=False)[1:-1] for token in self.control_tokens)
        )
        self.tested = tuple({json.dumps(text)[1:-1] for text in _tested_texts(source)})
        """What the template looks for in values, as JSON."""

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]],
        *,
        prompt: bool,
        args: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of messages, for `prompt` with the generation prompt; raise FormatError where the template raises."""
        from jinja2 import TemplateError

        given = {**self.args, **(args or {})}
        given.pop(DATE, None)
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
                **given,
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise FormatError("template_refuses", " ".join(str(error).split())) from None
        return text


@dataclass(frozen=True, slots=True)
class Manner:
    """How a template writes conversations with reasoning, or those without."""

    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that keep the prompts prefixes of the whole, where some do."""
    header: str = ""
    """The generation prompt."""
    shared_header: str = ""
    """What it has in common with how history begins a step."""
    whole: bool = False
    """The prompts of all steps are prefixes of the whole, and each ends with the header: one marked rendering tells all."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a template can say and how it says it; `template_choice.probe` finds out."""

    tools: bool
    """Calls and their results."""
    declarations: bool
    """The list of tools."""
    system: bool
    parallel_calls: bool
    text_beside_call: bool
    reasoning: bool
    manners: tuple[Manner, Manner]
    """Without reasoning and with."""
    stops: tuple[str, ...]
    """Tokens that end a text."""
    call_stops: tuple[str, ...]
    """Tokens that end a step of calls."""
    bare_stop: str = ""
    """What stands between a text and its stop where a template writes a stop only with the next message; empty else."""
    stop_with_next: bool = False
    """A step has no stop of its own: the header of the next message ends it."""
    arguments_as_text: bool = False
    content_needed: bool = False
    """A step of calls without text is handed over with an empty text."""
    call_ids: CallIds = "given"
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    """What stands before reasoning, from the last mark on, and between it and what is said next."""
    problem: str = ""
    """Why a conversation with tools cannot be said, in the template's words."""


def server_messages(conversation: Conversation, traits: Traits) -> list[ChatMessage]:
    """Return the messages as a server gets them, call ids in the form that the template demands."""
    messages = chat_messages(conversation.messages)
    if traits.content_needed:
        messages = [message if "content" in message else {**message, "content": ""} for message in messages]
    if traits.call_ids == "given":
        return messages
    ids: dict[str, str] = {}
    waiting: list[str] = []
    count = 0
    for message in messages:
        if message["role"] == "assistant":
            waiting = []
        for call in message.get("tool_calls", ()):
            given = call.get("id")
            made = f"call{count:05d}"
            if traits.call_ids == "named":
                made = f"functions.{call['function']['name']}:{count}"
            elif given is not None and (traits.call_ids == "made" or _NINE.fullmatch(given)):
                made = given
            call["id"] = made
            if given is not None:
                ids[given] = made
            waiting.append(made)
            count += 1
        if message["role"] == "tool":
            position = waiting.pop(0) if waiting else f"call{count:05d}"
            given = message.get("tool_call_id")
            message["tool_call_id"] = position if given is None else ids.get(given, given)
    return messages


def handed_over(messages: Sequence[ChatMessage], traits: Traits) -> list[ChatMessage]:
    """Return messages with the arguments of calls as JSON text where the template wants them so."""
    if not traits.arguments_as_text:
        return list(messages)
    return [{**m, "tool_calls": [_as_text(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


def answer_to(call: Mapping[str, Any]) -> ChatMessage:
    """Return a tool's message that answers a call."""
    answer = {"role": "tool", "content": "0", "name": call["function"]["name"]}
    return {**answer, "tool_call_id": call["id"]} if "id" in call else answer


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def any_of(texts: Iterable[str]) -> str:
    """Return a pattern that matches any of some texts, the longest first."""
    return "|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or "(?!)"


def _control_tokens(tokenizer: Any, source: str) -> tuple[str, ...]:
    chosen = getattr(tokenizer, "chat_control_tokens", None)
    added = tokenizer.added_tokens_decoder.values()
    if chosen is not None:
        return tuple(t.content for t in added if t.special or t.content in set(chosen))
    return tuple(t.content for t in added if t.special or (t.content in source and not t.content.isspace()))


def _tested_texts(source: str) -> set[str]:
    """Return the literal texts that a template looks for in values; words that name keys are left out."""
    found = {second or fourth for _, second, _, fourth in _TESTED.findall(source)}
    return {text.encode().decode("unicode_escape") if "\\" in text else text for text in found if _TELLING.search(text)}


def _with_date(source: str, day: str) -> str:
    """Return a template in which `strftime_now` gives one day."""
    formats = {found[2] for found in _FORMAT.finditer(source)}
    if not formats:
        return source
    try:
        date = datetime.date.fromisoformat(day)
    except ValueError:
        raise ConfigError(f"model.template_args.{DATE}={day!r}: expected a date like 2026-11-30") from None
    cases = "".join(f"{{%- elif format == {json.dumps(f)} -%}}{date.strftime(f)}" for f in sorted(formats))
    macro = f"{{%- macro {DATE}(format) -%}}{{%- if false -%}}{cases}{{%- endif -%}}{{%- endmacro %}}"
    return macro + ("\n" if source.startswith("\n") else "") + source


# --- Marks around values ---

_OPEN = {kind: chr(0xFDD0 + kind) for kind in SpanKind}
_CLOSE = "\ufdef"
_KINDS = {mark: kind for kind, mark in _OPEN.items()}
_VALUE = re.compile(f"([\ufdd0-\ufdee])([^\ufdd0-{_CLOSE}]*){_CLOSE}")
MARK = re.compile(f"[\ufdd0-{_CLOSE}]")
"""Any character that is used as a mark."""
ESCAPED_MARK = re.compile(r"\\u(fd[de][0-9a-f])")
"""A mark as Python's `repr` and ASCII JSON spell it; templates write lists so."""

_CONTENT = {
    "system": SpanKind.system,
    "developer": SpanKind.system,
    "user": SpanKind.user,
    "assistant": SpanKind.text,
    "tool": SpanKind.observation,
}


class Value(NamedTuple):
    """A value in a rendered text."""

    start: int
    stop: int
    kind: SpanKind


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A rendered text, its marks removed, and where its values are."""

    text: str
    values: tuple[Value, ...]
    """In the order of the text."""

    @classmethod
    def read(cls, rendered: str) -> MarkedText | None:
        """Take the marks out of a rendered text; None where a template tore some of them apart."""
        if "\\ufd" in rendered:
            rendered = ESCAPED_MARK.sub(lambda found: chr(int(found[1], 16)), rendered)
        pieces = _VALUE.split(rendered)
        values = []
        end = 0
        for at in range(0, len(pieces) - 1, 3):
            start = end + len(pieces[at])
            end = start + len(pieces[at + 2])
            values.append(Value(start, end, _KINDS[pieces[at + 1]]))
        del pieces[1::3]
        text = "".join(pieces)
        return None if not text.isascii() and MARK.search(text) else cls(text, tuple(values))

    def gaps(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the template's own text between two positions, around the values."""
        stop = len(self.text) if stop is None else stop
        for value in self.values[self._values_before(start) :]:
            if value.start >= stop:
                break
            if value.start > start:
                yield start, value.start
            start = max(start, value.stop)
        if start < stop:
            yield start, stop

    def within(self, start: int, stop: int) -> Sequence[Value]:
        """Return the values between two positions."""
        first = self._values_before(start)
        last = first
        while last < len(self.values) and self.values[last].stop <= stop:
            last += 1
        return self.values[first:last]

    def __add__(self, other: MarkedText) -> MarkedText:
        """Return both texts as one."""
        offset = len(self.text)
        moved = (Value(value.start + offset, value.stop + offset, value.kind) for value in other.values)
        return MarkedText(self.text + other.text, (*self.values, *moved))

    def since(self, start: int) -> MarkedText:
        """Return the text from a position on, which is in no value."""
        values = self.values[self._values_before(start) :]
        return MarkedText(self.text[start:], tuple(Value(a - start, b - start, kind) for a, b, kind in values))

    def _values_before(self, position: int) -> int:
        return bisect_right(self.values, position, key=itemgetter(1))


class StepValues(NamedTuple):
    """What a rendered step must hold."""

    reasoning: str
    text: str
    """Both without outer blanks; empty where there is none."""
    calls: int
    """Values of the calls: their names and the strings among their arguments that are not blank."""
    names: tuple[str, ...] = ()
    """Those of the calls; a template may write each more than once."""

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> StepValues:
        """Read them off an assistant's message as a server hands it over."""
        calls = [call["function"] for call in message.get("tool_calls", ())]
        count = len(calls) + sum(_strings(call["arguments"]) for call in calls)
        reasoning = message.get("reasoning_content") or ""
        return cls(reasoning.strip(), (message.get("content") or "").strip(), count, tuple(c["name"] for c in calls))

    @property
    def size(self) -> int:
        """Number of values."""
        return bool(self.reasoning) + bool(self.text) + self.calls

    def missing(self, text: str, values: Sequence[Value]) -> str | None:
        """Name what a part of a rendered text lacks: reasoning, text or call; None where it holds this and no other."""
        calls: list[str] = []
        found = {SpanKind.reasoning: "", SpanKind.text: ""}
        for start, stop, kind in values:
            if kind is SpanKind.call:
                calls.append(text[start:stop])
            elif kind in found:
                found[kind] += text[start:stop]
        if found[SpanKind.reasoning] != self.reasoning:
            return "reasoning"
        if found[SpanKind.text] != self.text:
            return "text"
        if len(calls) == self.calls:
            return None
        repeated = len(calls) > self.calls and all(calls.count(n) >= self.names.count(n) for n in self.names)
        return None if repeated and self.names else "call"


def mark(text: str, kind: SpanKind) -> str:
    """Return a value with its marks, a blank one as it is."""
    core = text.strip()
    if len(core) == len(text):
        return f"{_OPEN[kind]}{text}{_CLOSE}" if text else text
    start = len(text) - len(text.lstrip())
    return f"{text[:start]}{_OPEN[kind]}{core}{_CLOSE}{text[start + len(core) :]}" if core else text


def marked_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as a server hands it over, arguments as objects, with marks around its values."""
    made = dict(message)
    if content := message.get("content"):
        made["content"] = mark(content, _CONTENT[message["role"]])
    if reasoning := message.get("reasoning_content"):
        made["reasoning_content"] = mark(reasoning, SpanKind.reasoning)
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [
            {
                **_marked_id(call),
                "function": {
                    "name": mark(call["function"]["name"], SpanKind.call),
                    "arguments": map_strings(call["function"]["arguments"], lambda text: mark(text, SpanKind.call)),
                },
            }
            for call in calls
        ]
    return made


def _marked_id(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with marks around the name in its id, which is where Kimi's template writes it."""
    name = call["function"]["name"]
    start, found, number = call.get("id", "").partition(f"functions.{name}:")
    return {**call, "id": f"functions.{mark(name, SpanKind.call)}:{number}"} if found and not start else dict(call)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with its strings changed, but for its keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_strings(each, change) for key, each in value.items()}
    return [map_strings(each, change) for each in value] if isinstance(value, list) else value


def _strings(value: Any) -> int:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return sum(map(_strings, value.values()))
    return sum(map(_strings, value)) if isinstance(value, list) else 0
