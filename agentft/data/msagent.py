"""Read MSAgent text as messages, write messages as MSAgent text, and lift its list of tools.

An assistant's turn holds calls between think marks, results between exec marks, and text. Reading cuts it into steps and
results. Writing makes such a turn of messages from other formats, and reads it back: where the text would read as anything
else than these messages, it is refused. So a text can never turn into a call or a tool's output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

from agentft.data.calls import ToolCall
from agentft.data.conversation import Conversation, Message
from agentft.data.grammar import (
    EXEC_CLOSE,
    EXEC_OPEN,
    MARK,
    THINK_CLOSE,
    THINK_OPEN,
    Call,
    GrammarError,
    Observation,
    Part,
    parse_assistant,
)
from agentft.data.literals import Json, is_json, strip_fence
from agentft.data.tools import Lifted, clauses, lift_numbered, tool_entry, uncarried_parts

_CALL_WORDS = re.compile(r"api_name|json", re.IGNORECASE)


@lru_cache(maxsize=1536)  # more than are on their way through the tokenizer: each is asked for before and after
def read_system(system: str) -> Lifted:
    """Take the list of tools and the words about marks out of an MSAgent system text, where both are understood."""
    lifted = lift_numbered(system)
    if lifted is None:
        detail = "an entry of the tool list cannot be read as a function declaration"
        return Lifted(system, (), problem=("tools_not_lifted", detail))
    if not lifted.tools:
        return Lifted(system, ())
    text = "".join(clause for clause in clauses(lifted.text) if not _tells_how_to_call(clause))
    if MARK.search(text):
        detail = "the system text names MSAgent marks in words that are not recognised"
        return replace(lifted, text=lifted.text.strip(), problem=("system_names_marks", detail))
    return replace(lifted, text=text.strip())


def _tells_how_to_call(clause: str) -> bool:
    return THINK_OPEN in clause and THINK_CLOSE in clause and _CALL_WORDS.search(clause) is not None


def lift_tools(conversation: Conversation) -> Conversation | tuple[str, str]:
    """Return an MSAgent conversation with the list of its system text as `tools`; others as they are.

    Returned is (reason, detail) where the list cannot be read or the text names marks in words that were not recognised:
    a prompt in another layout must not ask for marks that are not trained.
    """
    if conversation.tools or not any(message.source is not None for message in conversation.messages):
        return conversation
    system = read_system(conversation.system)
    if system.problem is not None or not system.tools:
        return system.problem or conversation
    head = (replace(conversation.messages[0], content=system.text),) if system.text else ()
    return replace(conversation, messages=(*head, *conversation.messages[1:]), tools=system.tools)


TOOLS_INTRODUCTION = (
    "These tools can be called. To call one, write JSON with the fields api_name and parameters between "
    f"{THINK_OPEN} and {THINK_CLOSE}; answer from its result, or answer directly where no tool is needed:"
)
"""Stands before the numbered list of tools that a record of another format declares."""


def step_message(parts: tuple[Part, ...], *, trained: bool = True) -> Message:
    """Return a step of MSAgent text: its texts are the content, its readable calls the tool calls."""
    texts: list[str] = []
    calls: tuple[ToolCall, ...] = ()
    for part in parts:
        if isinstance(part, Call):
            calls += part.requests
        elif text := part.source.strip():
            texts.append(text)
    return Message("assistant", "\n".join(texts) or None, tool_calls=calls, trained=trained, source=parts)


def result_message(observation: Observation, *blanks: Part) -> Message:
    """Return a tool's result of MSAgent text, and the blanks after it."""
    return Message("tool", strip_fence(observation.body), source=(observation, *blanks))


def turn_messages(parts: Iterable[Part], *, trained: bool = True) -> list[Message]:
    """Cut an assistant's turn of MSAgent text into its steps and the results between them.

    Args:
        trained: False where the source shows the turn and does not want its steps trained.
    """
    messages: list[Message] = []
    run: list[Part] = []
    for part in (*parts, None):
        if part is not None and not isinstance(part, Observation):
            run.append(part)
            continue
        if run:
            step = step_message(tuple(run), trained=trained)
            if step.content or any(isinstance(each, Call) for each in run):
                messages.append(step)
            else:  # blanks after a result: no step, and yet letters of the layout
                last = messages[-1]
                messages[-1] = replace(last, source=(*(last.source or ()), *run))
            run = []
        if part is not None:
            messages.append(result_message(part))
    return messages


def as_msagent(conversation: Conversation) -> Conversation:
    """Return the conversation with the MSAgent text of all its messages; one that was read from such text as it is.

    Raises:
        GrammarError: it holds what MSAgent text cannot say.
    """
    if any(message.source is not None for message in conversation.messages):
        return conversation
    messages: list[Message] = []
    for is_agent, group in groupby(conversation.messages, lambda message: message.role in ("assistant", "tool")):
        members = list(group)
        messages += _write_turn(_in_order_of_calls(members)) if is_agent else members
    has_system = messages[0].role in ("system", "developer")
    others = messages[has_system:]
    if any(message.role in ("system", "developer") for message in others):
        raise GrammarError("system_in_middle", "a system message after the first message has no place in MSAgent text")
    text = _system_text(conversation.system, conversation.tools)
    head = [Message("system", text)] if text or has_system else []
    return replace(conversation, messages=(*head, *others))


def not_written(conversation: Conversation) -> tuple[str, ...]:
    """Return codes of what MSAgent text leaves out or changes of a record of another format."""
    if any(message.source is not None for message in conversation.messages):
        return ()
    parts = (name for tool in conversation.tools for name in uncarried_parts(tool))
    codes = dict.fromkeys(f"schema_part_not_written:{name}" for name in parts)
    messages = conversation.messages
    if any(message.name for message in messages if message.role != "tool"):
        codes["name_not_written"] = None
    if _in_order_of_calls(messages) != list(messages):
        codes["results_in_order_of_calls"] = None
    return tuple(codes)


def _system_text(text: str, tools: Sequence[dict[str, Json]]) -> str:
    """Return the system text with the list of tools behind it."""
    if not tools:
        return text
    entries = [f"{number}. {json.dumps(tool_entry(tool), ensure_ascii=False)}" for number, tool in enumerate(tools, 1)]
    return "\n\n".join([text] * bool(text) + [TOOLS_INTRODUCTION, *entries])


def _in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the results of parallel calls in the order of the calls: here results have no ids."""
    ordered: list[Message] = []
    for is_result, group in groupby(messages, lambda message: message.role == "tool"):
        members = list(group)
        ordered += _by_call(members, ordered[-1].tool_calls) if is_result and ordered else members
    return ordered


def _by_call(results: Sequence[Message], calls: Sequence[ToolCall]) -> list[Message]:
    by_id = {call.id: number for number, call in enumerate(calls) if call.id}
    by_name = {call.name: number for number, call in reversed(list(enumerate(calls)))}
    return sorted(results, key=lambda r: by_id.get(r.tool_call_id or "", by_name.get(r.name or "", len(calls))))


def _write_turn(messages: Sequence[Message]) -> list[Message]:
    """Return the steps and results between two users with their MSAgent text."""
    pieces = [piece for message in messages for piece in _pieces(message)]
    value, before = "", ""
    for source in pieces:
        value += ("\n\n" if before.startswith(THINK_OPEN) else "\n") * bool(before) + source
        before = source
    parts = parse_assistant(value)
    if [part.source.strip() for part in parts if part.source.strip()] != [piece.strip() for piece in pieces]:
        raise GrammarError("not_representable", "texts, calls and results of the turn would read as another turn")
    written = turn_messages(parts)
    if [message.role for message in written] != [message.role for message in messages]:
        raise GrammarError("two_assistant_turns", "two messages of the assistant in a row are one step in MSAgent text")
    return [replace(message, source=text.source) for message, text in zip(messages, written, strict=True)]


def _pieces(message: Message) -> list[str]:
    if message.role == "tool":
        _refuse_marks(message.text, "the result of a tool")
        return [
            f"{EXEC_OPEN}```JSON\n{message.text}\n```{EXEC_CLOSE}"
            if is_json(message.text)
            else f"{EXEC_OPEN}{message.text}{EXEC_CLOSE}"
        ]
    _refuse_marks(message.text, "a text of the assistant")
    return [message.text] * bool(message.text.strip()) + [call_text(call) for call in message.tool_calls]


def call_text(call: ToolCall) -> str:
    """Return a call as MSAgent text, marks included."""
    name, arguments = (json.dumps(value, ensure_ascii=False) for value in (call.name, call.arguments))
    body = f'{{"api_name": {name}, "parameters": {arguments}}}'
    if MARK.search(body):
        body = body.replace("<|", "\\u003c|")  # the same JSON; a bracket can stand in its strings only
    return f"{THINK_OPEN}```JSON\n{body}\n```{THINK_CLOSE}"


def _refuse_marks(text: str, what: str) -> None:
    if (found := MARK.search(text)) is not None:
        raise GrammarError("marks_in_text", f"{what} holds the mark {found[0]}: in MSAgent text it would be structure")
