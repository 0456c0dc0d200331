"""Read one raw record -> a `Conversation`, or a `Rejection` with its reason. What is not understood is not trained.

A record of MSAgent's format is `{"id": ..., "conversations": [{"from": role, "value": text}, ...]}`: at most one system turn,
first; then user and assistant in turn; none of these blank. `conversations` may also be the text of such a list. Only
assistant values are parsed: marks in a system or user text are letters like any others. Others are read by `formats`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from agentft.data.calls import Call, is_encodable, kind_of, literal
from agentft.data.config import Format, Reasoning
from agentft.data.conversation import Conversation, Message, Observation, Origin, Part, Text, chat_messages
from agentft.data.formats import (
    COLUMNS,
    SHAREGPT_ROLES,
    TOOL_COLUMNS,
    XLAM_COLUMNS,
    Read,
    is_trained,
    key_name,
    read_chat,
    read_xlam,
    understood_flags,
    unused,
)
from agentft.data.msagent import MARK, GrammarError, call_json, parse_assistant, turn_messages
from agentft.data.response import MAY_CALL, REACT, read_by_marks
from agentft.errors import FormatError

MAX_RECORD_CHARACTERS = 16 * 1024 * 1024
"""A larger record is set aside: the longest genuine conversation has a thousandth of it."""

_MAX_ID_CHARACTERS = 200
_PART_ID = re.compile(r"/part-[0-9]+\Z")
_QUESTION_AND_ANSWER = {"query": "response", "instruction": "output", "prompt": "completion", "question": "answer"}
_MARK_INSIDE: dict[type, str] = {
    Call: "mark_inside_call",
    Text: "marks_quoted_in_text",
    Observation: "mark_inside_observation",
}
_MSAGENT_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Rejection:
    """A record, line or file that was set aside."""

    origin: Origin
    reason: str
    """A stable snake_case code, the key under which it is counted."""
    detail: str
    id: str | None = None


def part_id(whole: str, number: int) -> str:
    """Return the id of a part of a conversation that is split, counted from 1. No record has such an id: see `_read_id`."""
    return f"{whole}/part-{number}"


def read_record(
    value: object,
    origin: Origin,
    *,
    form: Format = Format.auto,
    weight: float = 1.0,
    reasoning: Reasoning = Reasoning.keep,
) -> tuple[Conversation, list[str]] | Rejection:
    """Read one record, with a code for each oddity. Never raises: what cannot be used, whatever it is, is a `Rejection`.

    Args:
        form: `auto` takes every format that a record shows; the name of one takes that format alone. ReAct text is read
            only when named, since ordinary prose can hold its keywords.
        reasoning: What becomes of reasoning: trained, left out and counted, or shown as context.
    """
    notes: list[str] = []
    record_id: str | None = None
    try:
        if not isinstance(value, dict):
            raise FormatError("not_an_object", f"a record is an object, found {kind_of(value)}")
        record_id = _read_id(value.get("id"), notes)
        messages, tools = _read(value, form, notes)
        messages = _with_reasoning(messages, reasoning, notes)
        conversation = Conversation(record_id or "", messages, tools, origin, weight)
        notes += _oddities(conversation)
        _check_texts(conversation)
        if record_id is None:
            conversation = replace(conversation, id="content-" + conversation.content_hash[:16])
    except RecursionError:
        return Rejection(origin, "too_deep", "nested too deep to be read", record_id)
    except FormatError as refusal:
        return Rejection(origin, refusal.reason, _writable(refusal.detail), record_id)
    return conversation, notes


def recognise(record: Mapping[Any, Any]) -> Literal["msagent", "openai", "sharegpt", "xlam"]:
    """Return the format that the fields and the first roles of a record show; `msagent` where they show no other."""
    turns = record.get("conversations")
    if turns is None:
        if record.get("messages") is not None:
            return "openai"
        return "xlam" if {"query", "answers"} <= record.keys() else "msagent"
    if not isinstance(turns, list):
        return "msagent"
    for turn in turns[:4]:
        if not isinstance(turn, dict):
            break
        role = turn.get("from")
        if isinstance(role, str):
            if role in SHAREGPT_ROLES:
                return "sharegpt"
        elif role is None and "from" not in turn and isinstance(turn.get("role"), str) and "content" in turn:
            return "openai"
    agent = (turn for turn in turns if isinstance(turn, dict) and turn.get("from") == "assistant")
    said = [turn["value"] for turn in agent if isinstance(turn.get("value"), str)]
    if any(MARK.search(text) for text in said):
        return "msagent"
    beside = any(record.get(column) for column in ("system", *TOOL_COLUMNS))
    return "sharegpt" if beside or any(MAY_CALL.search(text) and read_by_marks(text) for text in said) else "msagent"


def _read(record: dict[Any, Any], form: Format, notes: list[str]) -> Read:
    turns = record.get("conversations")
    if isinstance(turns, str):
        turns = _read_turns_text(turns)
        record = {**record, "conversations": turns}
    found = recognise(record)
    if found == "msagent" and form in ("auto", "msagent"):
        if "conversations" not in record:
            raise FormatError("conversations_missing", _what_is_there(record))
        if not isinstance(turns, list):
            raise FormatError("conversations_not_a_list", f"'conversations' is {kind_of(turns)}, expected a list")
        notes += unused("column_not_used", record, COLUMNS)
        return _read_msagent(turns, notes), ()
    if form not in ("auto", "react", "toolace", found):
        detail = f"the record has the format {found}, not {form}; select it with dataset.format={found} (or auto)"
        raise FormatError(f"form_{found}", detail)
    xlam = found == "xlam" and form not in (Format.react, Format.toolace)
    notes += unused("column_not_used", record, XLAM_COLUMNS if xlam else COLUMNS)
    messages, tools = read_xlam(record, notes) if xlam else read_chat(record, form, notes)
    if not any(message.role in ("system", "developer") for message in messages):
        notes.append("missing_system")
    return messages, tools


def _read_id(value: object, notes: list[str]) -> str | None:
    """Return the id as text, or None where the content must give one."""
    if isinstance(value, str) and value and len(value) <= _MAX_ID_CHARACTERS and is_encodable(value):
        if _PART_ID.search(value) is None:
            return value
        notes.append("id_of_a_part")
        return None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**30:
        notes.append("id_number")
        return str(value)
    notes.append("id_missing" if value is None or value == "" else "id_unusable")
    return None


def _with_reasoning(messages: tuple[Message, ...], reasoning: Reasoning, notes: list[str]) -> tuple[Message, ...]:
    """Apply `dataset.reasoning` to messages, each change noted."""
    if reasoning is Reasoning.keep:
        return messages
    code = "reasoning_dropped" if reasoning is Reasoning.drop else "reasoning_not_trained"
    change: Any = {"reasoning_content": None} if reasoning is Reasoning.drop else {"reasoning_trained": False}
    notes += [code] * sum(message.reasoning_content is not None for message in messages)
    return tuple(m if m.reasoning_content is None else replace(m, **change) for m in messages)


def _what_is_there(record: dict[Any, Any]) -> str:
    fields = ", ".join(repr(key) for key in record if isinstance(key, str))[:200] or "no field"
    pair = next((pair for pair in _QUESTION_AND_ANSWER.items() if record.keys() >= set(pair)), None)
    hint = f"; {pair[0]} and {pair[1]} are a question and an answer: write them as two messages" if pair else ""
    for key, rows in record.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and isinstance(key, str):
            hint = f"; {key[:40]!r} is a list of {len(rows):,} objects: if these are the records, write that list alone"
            break
    return f"no field 'messages' and no field 'conversations', found {fields}{hint}"


def _read_turns_text(text: str) -> object:
    _check_size(len(text))
    turns = literal(text, "conversations_unreadable_text")
    if isinstance(turns, str):
        raise FormatError("conversations_text_twice", "'conversations' is the text of a text of a list: encoded twice")
    return turns


def _check_size(characters: int) -> None:
    if characters > MAX_RECORD_CHARACTERS:
        raise FormatError("too_long", f"more than {MAX_RECORD_CHARACTERS:,} characters")


def _read_msagent(turns: list[Any], notes: list[str]) -> tuple[Message, ...]:
    """Read the turns of an MSAgent record: at most one system turn, first; then user and assistant in turn."""
    if not turns:
        raise FormatError("conversations_empty", "'conversations' is an empty list")
    messages: list[Message] = []
    characters = 0
    expected = "user"
    for number, turn in enumerate(turns, 1):
        role, value = _read_turn(turn, number)
        characters += len(value)
        _check_size(characters)
        trained = True
        if len(turn) > 2:
            known = ("from", "value", *understood_flags(turn, agent=role == "assistant"))
            notes += sorted(f"field_not_carried:{key_name(key)}" for key in turn if key not in known)
            trained = is_trained(turn)
        empty = not value or value.isspace()
        if role == "system":
            if messages:
                reason = "two_system_turns" if number == 2 and messages[0].role == "system" else "system_in_middle"
                raise FormatError(reason, f"turn {number} is a system turn; only the first may be")
            if empty:
                notes.append("empty_system")
            messages.append(Message("system", value))
            continue
        if role != expected:
            if not messages or messages[-1].role == "system":
                detail = f"turn {number} is the assistant's, expected the user's first"
                raise FormatError("starts_with_assistant", detail)
            raise FormatError(f"two_{role}_turns", f"turn {number} is the {role}'s as is the turn before it")
        if empty:
            raise FormatError(f"empty_{role}", f"turn {number} ({role}) is blank")
        if role == "user":
            messages.append(Message("user", value))
            expected = "assistant"
            continue
        read = turn_messages(_parse_turn(value, number), trained=trained)
        messages += read
        expected = "user"
        notes += ["step_not_trained" for message in read if message.role == "assistant" and not trained]
    if expected == "assistant":
        messages.pop()
        notes.append("last_user_left_out")
        if not any(message.role == "assistant" for message in messages):
            raise FormatError("ends_with_user", "the agent says nothing: there is nothing to train")
    if messages[-1].role == "system":
        raise FormatError("no_user_turn", "only a system turn")
    if messages[0].role != "system":
        notes.append("missing_system")
    return tuple(messages)


def _read_turn(turn: object, number: int) -> tuple[str, str]:
    if not isinstance(turn, dict):
        detail = f"turn {number} is {kind_of(turn)}, expected an object with from and value"
        raise FormatError("turn_not_an_object", detail)
    if "from" not in turn:
        raise FormatError("role_missing", f"turn {number} has no field 'from'")
    role = turn["from"]
    if not isinstance(role, str) or role not in _MSAGENT_ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else kind_of(role)
        raise FormatError("unknown_role", f"turn {number} is from {shown}, expected exactly system, user or assistant")
    if "value" not in turn:
        raise FormatError("value_missing", f"turn {number} ({role}) has no field 'value'")
    value = turn["value"]
    if not isinstance(value, str):
        raise FormatError("value_not_text", f"the value of turn {number} ({role}) is {kind_of(value)}, expected text")
    if not is_encodable(value):
        detail = f"turn {number} ({role}) holds a lone surrogate: it cannot be written as UTF-8"
        raise FormatError("lone_surrogate", detail)
    return role, value


def _parse_turn(value: str, number: int) -> tuple[Part, ...]:
    try:
        parts = parse_assistant(value)
    except GrammarError as error:
        raise FormatError(error.reason, f"turn {number}: {error.detail}") from None
    if len(parts) == 1 and isinstance(parts[0], Text) and REACT.search(value):
        detail = f"turn {number} is ReAct text (Action / Action Input), which dataset.format=react reads"
        raise FormatError("form_react", detail)
    for part in parts:
        if not isinstance(part, Text) or MAY_CALL.search(part.source) is None:
            continue
        if (found := read_by_marks(part.source)) is not None:
            marks = f"those of {found[0].name}" if found[0] is not None else found[1].failures[0].detail
            raise FormatError("calls_in_text", f"turn {number} has a call in other marks than MSAgent's: {marks}")
    return parts


def _oddities(conversation: Conversation) -> Iterator[str]:
    """Yield a code for everything that a tool-call metric or a native chat template must cope with."""
    offered = conversation.offered
    tools = {tool.name: tool for tool in offered}
    yield from ("tool_entry_flawed" for tool in offered if tool.problem)
    for call in conversation.tool_calls if offered else ():
        if (tool := tools.get(call.name)) is None:
            yield "unknown_tool"
        elif (declared := tool.parameter_names) is not None and not declared.issuperset(call.arguments):
            yield "undeclared_parameter"
    for message in conversation.messages:
        for part in message.source or ():
            yield from _text_oddities(part)


def _text_oddities(part: Part) -> Iterator[str]:
    """Yield what is odd about the MSAgent text of a part."""
    source = part.source
    own = 0 if isinstance(part, Text) else 2  # marks of the part itself, which need no search
    if source.count("<|") > own and len(MARK.findall(source)) > own:
        yield _MARK_INSIDE[type(part)]
    if not isinstance(part, Call):
        return
    if part.failure is not None:
        yield f"call_{part.failure.reason}"
        return
    if 0 <= source.find("[") < source.find("{"):
        yield "call_is_a_list"
    if source.count("\n") > 2 and not _is_strict_json(call_json(part)):  # two belong to the fence
        yield "raw_control_character_in_call"
    for call in part.requests:
        if not call.arguments and '"parameters"' not in source:
            yield "call_without_parameters"


def _check_texts(conversation: Conversation) -> None:
    """Refuse what is too large or cannot be written; MSAgent turns are checked one by one as they are read."""
    if conversation.is_msagent:
        return
    try:
        said = [chat_messages(conversation.messages), conversation.tools]
        text = json.dumps(said, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError("value_not_json", f"an argument or a declaration is no JSON: {error}") from None
    _check_size(len(text))
    if not is_encodable(text):
        raise FormatError("lone_surrogate", "a message holds a lone surrogate: it cannot be written as UTF-8")


def _is_strict_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _writable(detail: str) -> str:
    """Return a detail that can be written as UTF-8, whatever was quoted from the record."""
    return detail.encode("utf-8", "backslashreplace").decode()
