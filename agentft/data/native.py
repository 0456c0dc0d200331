"""The chat layouts of model families, with their own form of tool calls, and the choice among them.

| name | for | calls |
|---|---|---|
| `chatml` | SmolLM2 and other ChatML models | `<tool_call>` JSON `</tool_call>` |
| `qwen2.5` | Qwen2.5 | the same; the marks are tokens of their own |
| `qwen3` | Qwen3, not thinking | the same; an empty `<think>` block stands before every step |
| `llama3` | Llama 3, 3.1, 3.2, 3.3 | bare JSON with `name` and `parameters` |

The wording of the block of tools and of the default system text is part of each format: a model that has seen it a million
times should see it again, letter by letter. Everything a conversation says is kept; what an MSAgent system text says
about its own marks and list of tools is replaced by the block of tools, where both were understood (`read_system`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import groupby
from typing import Any, ClassVar

from agentft.data.calls import ToolRequest, strip_fence
from agentft.data.grammar import MARK, THINK_CLOSE, THINK_OPEN, Call, Observation, Part, Text
from agentft.data.offered_tools import OfferedTool, read_offered_tools
from agentft.data.records import Conversation, Message
from agentft.data.render import CallForm, Kind, MsagentTemplate, Segment, Template, as_history, with_history
from agentft.errors import ConfigError

# --- The system text ---


class SystemReading(StrEnum):
    """What became of an MSAgent system text."""

    none = "none"
    """There is none."""
    no_tools = "no_tools"
    """It offers no tool: kept as it is."""
    tools_native = "tools_native"
    """The tools are in the layout's own block, and what the text said about marks is gone."""
    tools_native_marks_kept = "tools_native_marks_kept"
    """The tools are in the layout's own block; the text mentions marks in words that were not recognised, and keeps them."""
    tools_unreadable = "tools_unreadable"
    """A tool says more than a function declaration holds, or cannot be read: the whole text is kept as it is."""


@dataclass(frozen=True, slots=True)
class NativeSystem:
    """A system text for a native layout."""

    text: str
    """What is left of the text."""
    tools: tuple[str, ...]
    """Function declarations as JSON, one a tool."""
    reading: SystemReading


_ENTRY = re.compile(r"^[ \t]*\d{1,4}[.、)][ \t]*(?=\{)", re.MULTILINE)
_DECODER = json.JSONDecoder(strict=False)
_ENTRY_FIELDS = frozenset({"name", "description", "parameters", "url"})
_CLAUSE = re.compile(r".+?(?:[。；;]\s*|\.(?=\s|\Z)\s*|\n\s*|\Z)", re.DOTALL)
_CALL_WORDS = re.compile(r"api_name|json", re.IGNORECASE)


@lru_cache(maxsize=512)
def read_system(system: str) -> NativeSystem:
    """Take the list of tools and the words about marks out of an MSAgent system text, where both are understood."""
    offered = read_offered_tools(system)
    if not offered:
        return NativeSystem(system, (), SystemReading.no_tools if system.strip() else SystemReading.none)
    remainder = _without_entries(system, offered)
    if remainder is None:
        return NativeSystem(system, (), SystemReading.tools_unreadable)
    tools = tuple(dict.fromkeys(json.dumps(_declaration(tool), ensure_ascii=False) for tool in offered))
    text = _without_words_about_marks(remainder)
    if MARK.search(text):
        return NativeSystem(remainder.strip(), tools, SystemReading.tools_native_marks_kept)
    return NativeSystem(text.strip(), tools, SystemReading.tools_native)


def _without_entries(system: str, offered: Sequence[OfferedTool]) -> str | None:
    """The text around the list of tools; None where an entry is flawed or has fields of its own."""
    if any(tool.problem for tool in offered):
        return None
    pieces: list[str] = []
    position = 0
    for _ in offered:
        entry = _ENTRY.search(system, position)
        if entry is None:
            return None
        value, end = _DECODER.raw_decode(system, entry.end())
        if not _ENTRY_FIELDS.issuperset(value):
            return None
        pieces.append(system[position : entry.start()])
        position = end
    pieces.append(system[position:])
    return "\n\n".join(piece.strip() for piece in pieces if piece.strip())


def _without_words_about_marks(text: str) -> str:
    """Leave out each clause that tells how to write a call between the think marks."""
    clauses = _CLAUSE.findall(text)
    return "".join(c for c in clauses if not (THINK_OPEN in c and THINK_CLOSE in c and _CALL_WORDS.search(c)))


def _declaration(tool: OfferedTool) -> dict[str, Any]:
    """One tool as the function declaration that chat layouts share: a name, a description, a JSON schema."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in tool.parameters or ():
        schema = {key: value for key, value in parameter.items() if key not in ("name", "required", "required_fields")}
        if "required_fields" in parameter:  # what the readers of other layouts call a nested object's own list
            schema["required"] = parameter["required_fields"]
        properties[parameter["name"]] = schema
        if parameter.get("required") in (True, "true", "True"):
            required.append(parameter["name"])
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


# --- The layouts ---


HERMES_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

HERMES_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)

LLAMA_TOOLS = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
    'Respond in the format {{"name": function name, "parameters": dictionary of argument name and its value}}.'
    "Do not use variables.\n\n{tools}"
)

LLAMA_CALL_START = re.compile(r'\s*\{\s*"name"\s*:')
"""A Llama step that begins so is a call."""

_MARK_LIKE = re.compile(r"</?\w+>|<\|")


@dataclass(frozen=True, slots=True)
class _NativeTemplate:
    """What all native layouts share: the order of turns, and the laws of a step."""

    stop_token: str
    marks: frozenset[str] = frozenset()
    """Marks of the layout that are tokens of their own in this vocabulary."""
    default_system: str | None = None
    """What the model's own layout says where a conversation has no system message."""

    call_form: ClassVar[CallForm]
    beginning: ClassVar[tuple[Segment, ...]] = ()

    def render(self, conversation: Conversation, context_rounds: int = 0) -> list[Segment]:
        """Lay the whole conversation out."""
        segments = list(self.beginning)
        if conversation.messages[0].role != "system" and self.default_system is not None:
            segments += self._turn("system", [Segment(self.default_system, Kind.system)])
        for message, history in with_history(conversation, context_rounds):
            body = self._message(message)
            segments += as_history(body) if history else body
        return segments

    def problem(self, conversation: Conversation) -> tuple[str, str] | None:
        """A call that cannot be read, or a text that would read as a call, has no native form."""
        for message in conversation.messages:
            for part in message.parts:
                if isinstance(part, Call) and part.failure is not None:
                    return "call_without_native_form", f"{part.failure.reason}: {part.failure.detail}"
                if isinstance(part, Text) and self._reads_as_call(part.source):
                    return "text_reads_as_call", f"{part.source.strip()[:80]!r} would read as a call"
        return None

    def notes(self, conversation: Conversation) -> list[str]:
        """What became of the system text, and whether calls had fields that the native form lacks."""
        codes = [f"system_{read_system(conversation.system).reading}"]
        if any(request.extras for call in conversation.calls for request in call.requests):
            codes.append("call_fields_left_out")
        return codes

    def _message(self, message: Message) -> Iterator[Segment]:
        if message.role == "system":
            yield from self._turn("system", self._system(read_system(message.source)))
        elif message.role == "user":
            yield from self._turn("user", [Segment(message.source, Kind.user)])
        else:
            parts = (part for part in message.parts if not isinstance(part, Text) or part.source.strip())
            for observed, group in groupby(parts, key=lambda part: isinstance(part, Observation)):
                members = list(group)
                yield from self._results(members) if observed else self._step(members)

    def _system(self, system: NativeSystem) -> Iterator[Segment]:
        text = system.text
        if system.tools:
            text += ("\n\n" if text else "") + self._tools(system.tools)
        # Marks in the block's wording are tokens, marks in the text of a conversation are letters.
        split = len(system.text)
        if split:
            yield Segment(system.text, Kind.system)
        yield from self._worded(text[split:], Kind.system)

    def _worded(self, text: str, kind: Kind) -> Iterator[Segment]:
        """Cut the layout's own wording at those of its marks that are tokens."""
        if not self.marks:
            if text:
                yield Segment(text, kind)
            return
        for piece in re.split("(" + "|".join(map(re.escape, sorted(self.marks))) + ")", text):
            if piece:
                yield Segment(piece, kind, special=piece in self.marks)

    def _turn(self, role: str, body: Iterable[Segment]) -> Iterator[Segment]:
        raise NotImplementedError

    def _tools(self, tools: Sequence[str]) -> str:
        raise NotImplementedError

    def _results(self, observations: Iterable[Part]) -> Iterator[Segment]:
        raise NotImplementedError

    def _step(self, parts: Sequence[Part]) -> Iterator[Segment]:
        raise NotImplementedError

    def _reads_as_call(self, text: str) -> bool:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ChatmlTemplate(_NativeTemplate):
    """`<|im_start|>role`, text, `<|im_end|>`; calls and results in the form of Hermes, as Qwen2.5 writes it."""

    call_form = CallForm.hermes

    def _turn(self, role: str, body: Iterable[Segment]) -> Iterator[Segment]:
        yield Segment("<|im_start|>", Kind.header, special=True)
        yield Segment(f"{role}\n", Kind.header)
        yield from body
        yield Segment(self.stop_token, Kind.header, special=True)
        yield Segment("\n", Kind.header)

    def _tools(self, tools: Sequence[str]) -> str:
        return HERMES_TOOLS.format(tools="".join(f"\n{tool}" for tool in tools))

    def _results(self, observations: Iterable[Part]) -> Iterator[Segment]:
        body: list[Segment] = []
        for part in observations:
            if body:
                body.append(Segment("\n", Kind.header))
            body += self._worded("<tool_response>\n", Kind.header)
            body.append(Segment(_result_text(part), Kind.observation))
            body += self._worded("\n</tool_response>", Kind.header)
        yield from self._turn("user", body)

    def _step(self, parts: Sequence[Part]) -> Iterator[Segment]:
        yield Segment("<|im_start|>", Kind.header, special=True)
        yield Segment("assistant\n", Kind.header)
        yield from self._before_step()
        pieces = list(_pieces(parts))
        for number, piece in enumerate(pieces):
            # A line break belongs to what stands before it: there it is tokenised as in the whole text.
            end = "\n" if number + 1 < len(pieces) else ""
            if isinstance(piece, str):
                yield Segment(piece + end, Kind.text)
            else:
                yield from self._worded("<tool_call>\n", Kind.frame)
                yield from _json_call(piece, "arguments")
                yield from self._worded(f"\n</tool_call>{end}", Kind.frame)
        yield Segment(self.stop_token, Kind.stop, special=True)
        yield Segment("\n", Kind.header)

    def _before_step(self) -> Iterator[Segment]:
        yield from ()

    def _reads_as_call(self, text: str) -> bool:
        return "<tool_call>" in text or "<tool_response>" in text or text.lstrip().startswith("<think>")


@dataclass(frozen=True, slots=True)
class Qwen3Template(ChatmlTemplate):
    """As ChatML; each step follows the empty block by which Qwen3 is told not to think.

    Qwen3's own layout shows that block before the newest step only. Here it stands before every step, so that one pass
    trains all steps of a conversation on the prompts they are asked with.
    """

    def _before_step(self) -> Iterator[Segment]:
        yield from self._worded("<think>\n\n</think>\n\n", Kind.header)


@dataclass(frozen=True, slots=True)
class Llama3Template(_NativeTemplate):
    """`<|start_header_id|>role<|end_header_id|>`, text, `<|eot_id|>`; results come from the role ipython.

    The tools stand in the system message, before its text, and no date does: the dates of Meta's own layout change from
    day to day.
    """

    call_form = CallForm.llama
    beginning = (Segment("<|begin_of_text|>", Kind.header, special=True),)

    def _header(self, role: str) -> Iterator[Segment]:
        yield Segment("<|start_header_id|>", Kind.header, special=True)
        yield Segment(role, Kind.header)
        yield Segment("<|end_header_id|>", Kind.header, special=True)
        yield Segment("\n\n", Kind.header)

    def _turn(self, role: str, body: Iterable[Segment]) -> Iterator[Segment]:
        yield from self._header(role)
        yield from body
        yield Segment(self.stop_token, Kind.header, special=True)

    def _system(self, system: NativeSystem) -> Iterator[Segment]:
        if system.tools:
            yield from self._worded(self._tools(system.tools), Kind.system)
        if system.text:
            yield Segment(system.text, Kind.system)

    def _tools(self, tools: Sequence[str]) -> str:
        indented = (json.dumps(json.loads(tool), ensure_ascii=False, indent=4) for tool in tools)
        return LLAMA_TOOLS.format(tools="".join(f"{tool}\n\n" for tool in indented))

    def _results(self, observations: Iterable[Part]) -> Iterator[Segment]:
        for part in observations:
            yield from self._turn("ipython", [Segment(_result_text(part), Kind.observation)])

    def _step(self, parts: Sequence[Part]) -> Iterator[Segment]:
        yield from self._header("assistant")
        pieces = list(_pieces(parts))
        text = "\n".join(piece for piece in pieces if isinstance(piece, str))
        calls = [piece for piece in pieces if not isinstance(piece, str)]
        if text:
            yield Segment(text, Kind.text)
        if text and calls:
            yield from self._worded("<|python_tag|>", Kind.frame)
        for number, call in enumerate(calls):
            if number:
                yield Segment("; ", Kind.frame)
            yield from _json_call(call, "parameters")
        yield Segment(self.stop_token, Kind.stop, special=True)

    def _reads_as_call(self, text: str) -> bool:
        return LLAMA_CALL_START.match(text) is not None or "<|python_tag|>" in text


def _pieces(parts: Sequence[Part]) -> Iterator[str | ToolRequest]:
    """The texts of a step, trimmed, and its requests, in order; blank texts left out."""
    for part in parts:
        if isinstance(part, Call):
            yield from part.requests
        elif part.source.strip():
            yield part.source.strip()


def _json_call(request: ToolRequest, arguments: str) -> Iterator[Segment]:
    """A request as JSON, its name and its parameters apart from the rest."""
    name, parameters = (json.dumps(value, ensure_ascii=False) for value in (request.name, request.parameters))
    if _MARK_LIKE.search(name) or _MARK_LIKE.search(parameters):
        # The same JSON; a bracket can stand in its strings only, where a reader must not take it for a mark.
        name, parameters = (text.replace("<", "\\u003c") for text in (name, parameters))
    yield Segment('{"name": "', Kind.frame)
    yield Segment(name[1:-1], Kind.call)
    yield Segment(f'", "{arguments}": ', Kind.frame)
    yield Segment(parameters, Kind.call)
    yield Segment("}", Kind.frame)


def _result_text(observation: Part) -> str:
    assert isinstance(observation, Observation)
    return strip_fence(observation.body)


# --- The choice ---

NAMES = ("msagent", "native", "chatml", "qwen2.5", "qwen3", "llama3")
"""Values of `model.template`; `native` is one of the four behind it, by the tokenizer."""

_FAMILIES: dict[str, tuple[type[_NativeTemplate], str, tuple[str, ...], str | None]] = {
    "chatml": (ChatmlTemplate, "<|im_end|>", HERMES_MARKS, None),
    "qwen2.5": (
        ChatmlTemplate,
        "<|im_end|>",
        HERMES_MARKS,
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": (Qwen3Template, "<|im_end|>", HERMES_MARKS, None),
    "llama3": (Llama3Template, "<|eot_id|>", ("<|python_tag|>",), None),
}


def choose_template(name: str, tokenizer: Any, stop_token: str | None = None) -> Template:
    """Return the layout `name` for a model with this tokenizer.

    Args:
        stop_token: ends every step; None: the layout's own, for `msagent` the tokenizer's end-of-sequence token.

    Raises:
        ConfigError: no layout of that name, or the tokenizer lacks a token that the layout is made of.
    """
    if name not in NAMES:
        raise ConfigError(f"model.template={name!r}: unknown; expected one of {', '.join(NAMES)}")
    if name == "msagent":
        stop = stop_token or tokenizer.eos_token
        if stop is None:
            raise ConfigError("the tokenizer has no end-of-sequence token; set model.stop_token")
        return MsagentTemplate(str(stop))
    family = detect_family(tokenizer) if name == "native" else name
    layout, own_stop, marks, default_system = _FAMILIES[family]
    added = tokenizer.get_added_vocab()
    needed = ("<|im_start|>",) if layout is not Llama3Template else ("<|start_header_id|>", "<|end_header_id|>")
    missing = [token for token in (*needed, stop_token or own_stop) if token not in tokenizer.get_vocab()]
    if missing:
        raise ConfigError(f"model.template={name}: the tokenizer has no {' and no '.join(missing)}")
    own_system = _own_default_system(tokenizer) if layout is ChatmlTemplate else None
    return layout(
        stop_token or own_stop,
        frozenset(mark for mark in marks if mark in added),
        own_system or default_system,
    )


def detect_family(tokenizer: Any) -> str:
    """Name the family whose layout a tokenizer's tokens and chat template show.

    Raises:
        ConfigError: they show none.
    """
    tokens = tokenizer.get_added_vocab()
    if "<|start_header_id|>" in tokens and "<|eot_id|>" in tokens:
        return "llama3"
    if "<|im_start|>" in tokens and "<|im_end|>" in tokens:
        own = str(tokenizer.chat_template or "")
        if "enable_thinking" in own or ("<think>" in tokens and (not own or "<think>" in own)):
            return "qwen3"
        if "<think>" in tokens:  # Qwen3 of July 2025, which never thinks and has no default system text
            return "chatml"
        return "qwen2.5" if "<tool_call>" in tokens or "created by Alibaba Cloud" in own else "chatml"
    raise ConfigError(
        "model.template=native: the tokenizer has neither <|im_start|> nor <|start_header_id|>, so its layout is not known; "
        f"name one of {', '.join(NAMES[2:])}, or keep model.template=msagent"
    )


def _own_default_system(tokenizer: Any) -> str | None:
    """The system text that the model's own ChatML template puts where a conversation has none."""
    if not tokenizer.chat_template:
        return None
    from jinja2 import TemplateError

    try:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateError:
        return None  # a template that wants more than a user's message
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", shown, re.DOTALL)
    return found[1] if found else None
