"""The chat layouts of model families, with their own form of tool calls.

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
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

from agentft.data.calls import ToolCall, strip_fence
from agentft.data.conversation import Conversation, Message
from agentft.data.grammar import Call, GrammarError, Observation, Part, Text
from agentft.data.msagent import as_msagent
from agentft.data.native_system import NativeSystem, read_system
from agentft.data.render import CallForm, Kind, Segment, shown_as, with_history

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
_JSON = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class NativeTemplate:
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
        conversation = as_msagent(conversation)
        if conversation.messages[0].role != "system" and self.default_system is not None:
            segments += self._turn("system", [Segment(self.default_system, Kind.system)])
        for message, history in _joined_results(conversation, context_rounds):
            segments += shown_as(self._message(message), history=history)
        return segments

    def problem(self, conversation: Conversation) -> tuple[str, str] | None:
        """A call that cannot be read, or a text that would read as a call, has no native form."""
        try:
            conversation = as_msagent(conversation)
        except GrammarError as error:
            return error.reason, error.detail
        for message in conversation.messages:
            for part in message.source or ():
                if isinstance(part, Call) and part.failure is not None:
                    return "call_without_native_form", f"{part.failure.reason}: {part.failure.detail}"
                if isinstance(part, Text) and self._reads_as_call(part.source):
                    return "text_reads_as_call", f"{part.source.strip()[:80]!r} would read as a call"
        return None

    def notes(self, conversation: Conversation) -> list[str]:
        """What became of the system text, and whether calls had fields that the native form lacks."""
        codes = [f"system_{read_system(as_msagent(conversation).system).reading}"]
        if any(call.extras for call in conversation.tool_calls):
            codes.append("call_fields_left_out")
        return codes

    def _message(self, message: Message) -> Iterator[Segment]:
        if message.role == "system":
            yield from self._turn("system", self._system(read_system(message.text)))
        elif message.role == "user":
            yield from self._turn("user", [Segment(message.text, Kind.user)])
        else:
            parts = [part for part in message.source or () if not isinstance(part, Text) or part.source.strip()]
            yield from self._results(parts) if message.role == "tool" else self._step(parts)

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
class ChatmlTemplate(NativeTemplate):
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
class Llama3Template(NativeTemplate):
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


def _joined_results(conversation: Conversation, context_rounds: int) -> Iterator[tuple[Message, bool]]:
    """Yield the messages as `with_history` does, neighbouring results as one: these layouts write them in one turn."""
    for is_result, group in groupby(with_history(conversation, context_rounds), lambda each: each[0].role == "tool"):
        members = list(group)
        if not is_result:
            yield from members
            continue
        source = tuple(part for message, _ in members for part in message.source or ())
        yield replace(members[0][0], source=source), members[0][1]


def _pieces(parts: Sequence[Part]) -> Iterator[str | ToolCall]:
    """The texts of a step, trimmed, and its requests, in order; blank texts left out."""
    for part in parts:
        if isinstance(part, Call):
            yield from part.requests
        elif part.source.strip():
            yield part.source.strip()


def _json_call(request: ToolCall, arguments: str) -> Iterator[Segment]:
    """A request as JSON, its name and its parameters apart from the rest."""
    name, parameters = _JSON.encode(request.name), _JSON.encode(request.arguments)
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
