"""Read one raw record -> a `Conversation`, or a `Rejection` with its reason. What is not understood is not trained.

| format | how it is recognised | what it is |
|---|---|---|
| `msagent` | `conversations` with `from` and `value`, or the text of such a list | system, then user and assistant in turn; calls between marks |
| `openai` | a field `messages`, or turns with `role` and `content` | OpenAI's chat format and its relatives: Anthropic, ms-swift, Toucan |
| `sharegpt` | roles `human`, `gpt`, `function_call` ...; or a column `tools` or `system`; or calls in other marks | LLaMA-Factory, APIGen-MT, Hermes, ToolBench |
| `xlam` | fields `query` and `answers` | one question and its calls |
| `toolace` | as `sharegpt` or `openai` | the name for it: every text in brackets is a list of calls, refused where it is none |
| `react` | it must be named, but for ToolBench's role `function` | text with lines `Thought:`, `Action:`, `Action Input:` and so on |

Names, arguments, texts and declarations come through unchanged; what has no meaning here is noted by name. Results belong to
calls by id or name where the record has them, else by their order.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agentft.data.calls import Call, ToolCall, blank, is_encodable, kind_of, literal, read_call, read_id
from agentft.data.config import Format, Reasoning
from agentft.data.conversation import Conversation, Message, Observation, Origin, Part, Role, Text, chat_messages
from agentft.data.msagent import MARK, call_json, parse_assistant, turn_messages
from agentft.data.response import (
    MAY_CALL,
    REACT,
    read_by_marks,
    read_named_results,
    read_react,
    read_responses,
    read_text_calls,
    split_thought,
)
from agentft.data.tools import Tools, lift_listed, read_tools
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
_MSAGENT_ROLES: dict[object, Role] = {"system": "system", "user": "user", "assistant": "assistant"}

KNOWN = (
    "openai (messages with role and content), sharegpt (conversations with from and value), msagent (the same, calls between "
    "<|startofthink|> marks), xlam (query, tools, answers), toolace, react"
)
"""What a refusal says of the formats."""

_FLAGS = ("weight", "loss", "loss_scale", "train")
"""By 0 or false a turn is shown and not trained, in OpenAI's fine-tuning format, ms-swift (two) and axolotl."""
_ROLES: dict[str, str] = {
    **{role: role for role in ("system", "developer", "user", "assistant")},
    "human": "user",
    "gpt": "assistant",
    **dict.fromkeys(("tool_call", "function_call"), "call"),
    **dict.fromkeys(("tool", "tool_response", "observation", "function", "function_response", "ipython"), "result"),
}
_SHAREGPT_ROLES = frozenset(_ROLES) - {"system", "developer", "user", "assistant"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FIELDS: dict[str, tuple[str, ...]] = {
    "assistant": ("name", "tool_calls", "function_call", *_REASONING),
    "call": _REASONING,
    "result": ("name", "tool_call_id"),
}
"""What a message of a role has beside its role and its content; all others can have a name."""
_TEXTS = ("text", "input_text", "output_text")
_BLOCKS: dict[str, frozenset[str]] = {
    **dict.fromkeys(_TEXTS, frozenset({"text"})),
    "thinking": frozenset({"thinking"}),
    "tool_use": frozenset({"id", "name", "input"}),
    "tool_result": frozenset({"tool_use_id", "content"}),
}
"""Types of the parts of a content, with their fields."""
_TOOL_COLUMNS = ("tools", "functions", "available_tools")
_COLUMNS = frozenset({"id", "messages", "conversations", "system", *_TOOL_COLUMNS})
_XLAM_COLUMNS = frozenset({"id", "query", "tools", "answers"})

Read = tuple[tuple[Message, ...], Tools]
"""The messages of a record and the tools that it declares beside them."""


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


def _recognise(record: Mapping[Any, Any]) -> Literal["msagent", "openai", "sharegpt", "xlam"]:
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
            if role in _SHAREGPT_ROLES:
                return "sharegpt"
        elif role is None and "from" not in turn and isinstance(turn.get("role"), str) and "content" in turn:
            return "openai"
    agent = (turn for turn in turns if isinstance(turn, dict) and turn.get("from") == "assistant")
    said = [turn["value"] for turn in agent if isinstance(turn.get("value"), str)]
    if any(MARK.search(text) for text in said):
        return "msagent"
    beside = any(record.get(column) for column in ("system", *_TOOL_COLUMNS))
    return "sharegpt" if beside or any(MAY_CALL.search(text) and read_by_marks(text) for text in said) else "msagent"


def _read(record: dict[Any, Any], form: Format, notes: list[str]) -> Read:
    turns = record.get("conversations")
    if isinstance(turns, str):
        turns = _read_turns_text(turns)
        record = {**record, "conversations": turns}
    found = _recognise(record)
    if found == "msagent" and form in ("auto", "msagent"):
        if "conversations" not in record:
            raise FormatError("conversations_missing", _what_is_there(record))
        if not isinstance(turns, list):
            raise FormatError("conversations_not_a_list", f"'conversations' is {kind_of(turns)}, expected a list")
        notes += _unused("column_not_used", record, _COLUMNS)
        return _read_msagent(turns, notes), ()
    if form not in ("auto", "react", "toolace", found):
        detail = f"the record has the format {found}, not {form}; select it with dataset.format={found} (or auto)"
        raise FormatError(f"form_{found}", detail)
    xlam = found == "xlam" and form not in (Format.react, Format.toolace)
    notes += _unused("column_not_used", record, _XLAM_COLUMNS if xlam else _COLUMNS)
    messages, tools = _read_xlam(record, notes) if xlam else _read_chat(record, form, notes)
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


# --- MSAgent text ---


def _read_msagent(turns: list[Any], notes: list[str]) -> tuple[Message, ...]:
    """Read the turns of an MSAgent record: at most one system turn, first; then user and assistant in turn."""
    if not turns:
        raise FormatError("conversations_empty", "'conversations' is an empty list")
    values = (turn.get("value") for turn in turns if isinstance(turn, dict))
    _check_size(sum(len(value) for value in values if isinstance(value, str)))
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        try:
            messages += _read_turn(turn, messages, notes)
        except FormatError as refusal:
            raise FormatError(refusal.reason, f"turn {number}: {refusal.detail}") from None
    if messages[-1].role == "system":
        raise FormatError("no_user_turn", "only a system turn")
    if messages[-1].role == "user":
        messages.pop()
        notes.append("last_user_left_out")
        if not any(message.role == "assistant" for message in messages):
            raise FormatError("ends_with_user", "the agent says nothing: there is nothing to train")
    if messages[0].role != "system":
        notes.append("missing_system")
    return tuple(messages)


def _read_turn(turn: object, before: Sequence[Message], notes: list[str]) -> list[Message]:
    """Return the messages of a turn; `before` are those of the turns before it."""
    if not isinstance(turn, dict):
        raise FormatError("turn_not_an_object", f"{kind_of(turn)}, expected an object with from and value")
    if "from" not in turn:
        raise FormatError("role_missing", "no field 'from'")
    given = turn["from"]
    role = _MSAGENT_ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        shown = repr(given[:40]) if isinstance(given, str) else kind_of(given)
        raise FormatError("unknown_role", f"from {shown}, expected exactly system, user or assistant")
    if "value" not in turn:
        raise FormatError("value_missing", f"{role}: no field 'value'")
    value = turn["value"]
    if not isinstance(value, str):
        raise FormatError("value_not_text", f"{role}: the value is {kind_of(value)}, expected text")
    if not is_encodable(value):
        raise FormatError("lone_surrogate", f"{role}: a lone surrogate, which cannot be written as UTF-8")
    last = before[-1].role if before else None
    if role == "assistant" and last in (None, "system"):
        raise FormatError("starts_with_assistant", "it is the assistant's, expected the user's first")
    if role == ("assistant" if last == "tool" else last):
        raise FormatError(f"two_{role}_turns", f"it is the {role}'s as is the turn before it")
    if role == "system" and before:
        raise FormatError("system_in_middle", "a system turn; only the first may be")
    if not value or value.isspace():
        if role != "system":
            raise FormatError(f"empty_{role}", f"{role}: blank")
        notes.append("empty_system")
    trained = True
    if len(turn) > 2:
        known = ("from", "value", *_understood_flags(turn, agent=role == "assistant"))
        notes += sorted(f"field_not_carried:{_key_name(key)}" for key in turn if key not in known)
        trained = _is_trained(turn)
    if role != "assistant":
        return [Message(role, value)]
    messages = turn_messages(_parse_turn(value), trained=trained)
    notes += ["step_not_trained" for message in messages if message.role == "assistant" and not trained]
    return messages


def _parse_turn(value: str) -> tuple[Part, ...]:
    parts = parse_assistant(value)
    if len(parts) == 1 and isinstance(parts[0], Text) and REACT.search(value):
        raise FormatError("form_react", "ReAct text (Action / Action Input), which dataset.format=react reads")
    for part in parts:
        if (
            isinstance(part, Text)
            and MAY_CALL.search(part.source)
            and (found := read_by_marks(part.source)) is not None
        ):
            marks = f"those of {found[0].name}" if found[0] is not None else found[1].failures[0].detail
            raise FormatError("calls_in_text", f"a call in other marks than MSAgent's: {marks}")
    return parts


# --- The other formats ---


def _is_trained(turn: Mapping[Any, Any]) -> bool:
    """Return False where a field of the turn says that it is shown and not trained."""
    return not any(_is_flag(turn.get(field)) and not turn[field] for field in _FLAGS)


def _understood_flags(turn: Mapping[Any, Any], *, agent: bool) -> frozenset[str]:
    """Return which of `_FLAGS` mean something here; on a turn that is not the agent's only that it is not trained."""
    return frozenset(f for f in _FLAGS if turn.get(f) is None or (_is_flag(turn[f]) and (agent or not turn[f])))


def _is_flag(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def _key_name(key: object) -> str:
    """Return a key as a name that can stand in a report."""
    return re.sub(r"[^\w$.-]", "_", key)[:40] if isinstance(key, str) else type(key).__name__


def _unused(kind: str, record: Mapping[Any, Any], known: Collection[str]) -> list[str]:
    """Return a code, `kind` and name, for each field that has a value and no meaning."""
    return [f"{kind}:{_key_name(key)}" for key, value in record.items() if key not in known and not blank(value)]


def _read_xlam(record: Mapping[Any, Any], notes: list[str]) -> Read:
    """Read a question, the tools, and the calls that answer it."""
    chat = _Chat(notes, read_tools(record.get("tools")), Format.xlam)
    chat.add_plain("user", chat.text(record.get("query"), "the column 'query'"))
    answers = record.get("answers")
    answers = literal(answers, "call_not_json") if isinstance(answers, str) else answers
    if not isinstance(answers, list):
        raise FormatError("call_not_json", "'answers' is no list of calls")
    chat.add_step(Message("assistant", tool_calls=tuple(map(read_call, answers))))
    return chat.finish()


def _read_chat(record: Mapping[Any, Any], form: Format, notes: list[str]) -> Read:
    """Read a record of messages, by whatever names; `form` says how calls stand in text where it is react or toolace."""
    field = "messages" if record.get("conversations") is None else "conversations"
    turns = record.get(field)
    if isinstance(turns, str):
        turns = literal(turns, f"{field}_unreadable_text")
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"{field}_not_a_list", f"{field!r} is no list with at least one message")
    first = turns[0] if isinstance(turns[0], dict) else {}
    begins_with_system = _ROLES.get(str(first.get("role", first.get("from")))) in ("system", "developer")
    column = next((column for column in _TOOL_COLUMNS if not blank(record.get(column))), None)
    of_system = column is None and begins_with_system  # some keep the tools in the system message
    if column == "available_tools":
        notes.append(f"tools_from_column:{column}")
    chat = _Chat(notes, read_tools(first.get("tools") if of_system else record.get(column or "")), form)
    chat.toolbench = any(isinstance(turn, dict) and turn.get("from") == "function" for turn in turns)
    system = "" if blank(record.get("system")) else chat.text(record["system"], "the column 'system'")
    if system.strip():
        if not begins_with_system:
            chat.add_plain("system", system)
        elif first.get("content", first.get("value")) != system:
            raise FormatError("two_system_turns", "a column 'system' and a system message")
    for number, turn in enumerate(turns, 1):
        try:
            chat.read(turn, known=("tools",) if of_system and number == 1 else ())
        except FormatError as refusal:
            raise FormatError(refusal.reason, f"message {number}: {refusal.detail}") from None
    return chat.finish()


class _Chat:
    """Reads messages one by one; the words and calls of one step, wherever they stand, become one message."""

    def __init__(self, notes: list[str], tools: Tools, form: Format) -> None:
        self.toolbench = False
        """Texts that look like ReAct are."""
        self._notes = notes
        self._tools = tools
        self._form = form
        self._messages: list[Message] = []
        self._open: list[ToolCall | None] = []
        """The calls of the last step; None once they have their result."""

    def read(self, turn: Any, *, known: Sequence[str] = ()) -> None:
        """Read one message of a record; `known` are further fields with a meaning."""
        if not isinstance(turn, dict):
            raise FormatError("turn_not_an_object", "it is no object")
        given = turn.get("role", turn.get("from"))
        if not isinstance(given, str):
            raise FormatError("role_missing", "it has no role")
        role = _ROLES.get(given)
        if role is None:
            raise FormatError("unknown_role", f"the role {given[:40]!r}; known are {', '.join(_ROLES)}")
        self._note_fields(turn, role, known)
        content = turn.get("content", turn.get("value"))
        name = turn["name"] if isinstance(turn.get("name"), str) and turn["name"] else None
        if role == "call":
            self._read_calls(turn, content)
        elif role == "result":
            self._read_result(content, read_id(turn.get("tool_call_id")), name)
        elif role == "assistant":
            self._read_assistant(turn, content, name)
        elif role == "user":
            self._read_user(content, name)
        else:
            self.add_plain("developer" if role == "developer" else "system", self.text(content), name)

    def add_plain(self, role: Role, text: str, name: str | None = None) -> None:
        """Add a system's or a user's message."""
        last = self._messages[-1].role if self._messages else None
        if role == "user":
            if not text.strip():
                raise FormatError("empty_user", "the user's text is blank")
            if last == "user":
                raise FormatError("two_user_turns", "it is the user's as is the one before it")
        elif last is None and (lifted := lift_listed(text)):
            listed, given = ({tool["function"]["name"] for tool in tools} for tools in (lifted.tools, self._tools))
            if not given or listed == given:
                text, self._tools = lifted.text, self._tools or lifted.tools
                self._notes.append("tools_lifted")
                if lifted.words_left_out:
                    self._notes.append("words_about_calls_left_out")
                if not text:
                    return
            else:
                self._notes.append("tools_in_system_too")
        self._end_step()
        self._messages.append(Message(role, text, name=name))

    def add_step(self, step: Message) -> None:
        """Add what the agent says; a call right after its words, or after another call, belongs to the same step."""
        fields = dict.fromkeys(_key_name(field) for call in step.tool_calls for field in call.extras)
        self._notes += [f"field_not_carried:{field}" for field in fields]
        calls = tuple(replace(call, extras={}) for call in step.tool_calls)
        if not any(message.role == "user" for message in self._messages):
            raise FormatError("starts_with_assistant", "it is the assistant's, expected the user's first")
        if not step.text.strip() and not calls:
            raise FormatError("empty_assistant", "it has neither text nor calls")
        last = self._messages[-1]
        if last.role == "assistant":
            if step.content or (step.reasoning_content and last.reasoning_content) or not calls:
                raise FormatError("two_assistant_turns", "it is the assistant's as is the one before it")
            reasoning, trained = last.reasoning_content or step.reasoning_content, last.trained and step.trained
            calls = last.tool_calls + calls
            self._messages[-1] = replace(last, tool_calls=calls, reasoning_content=reasoning, trained=trained)
        else:
            self._end_step()
            self._messages.append(replace(step, tool_calls=calls))
        self._open = list(calls)
        ids = [call.id for call in calls if call.id is not None]
        if len(set(ids)) < len(ids):
            raise FormatError("call_id_twice", f"two calls of one step have the id {max(ids, key=ids.count)!r}")

    def finish(self) -> Read:
        """Return what was read up to the agent's last message; raise FormatError where it says nothing."""
        self._end_step()
        while self._messages and self._messages[-1].role not in ("assistant", "tool"):
            self._notes.append(f"last_{self._messages.pop().role}_left_out")
        if not any(message.role == "assistant" for message in self._messages):
            raise FormatError("ends_with_user", "the agent says nothing: there is nothing to train")
        return tuple(self._messages), self._tools

    def _read_user(self, content: object, name: str | None) -> None:
        if isinstance(content, list):
            results = [block for block in content if _is_block(block, "tool_result")]
            for block in results:
                self._note_block(block)
                self._add_result(self.text(block.get("content") or ""), read_id(block.get("tool_use_id")), None)
            content = [block for block in content if not _is_block(block, "tool_result")]
            if results and not content:
                return
        text = self.text(content)
        responses = read_responses(text) if any(self._open) else []
        for response in responses:
            self._add_result(response, None, None)
        if not responses:
            self.add_plain("user", text, name)

    def _read_result(self, content: object, call_id: str | None, name: str | None) -> None:
        text = self.text(content)
        waiting = [call for call in self._open if call is not None]
        if call_id is None and name is None and len(waiting) > 1 and (named := read_named_results(text, waiting)):
            for call, response in zip(waiting, named, strict=True):
                self._add_result(response, call.id, call.name)
            return
        for response in read_responses(text) or [text]:
            self._add_result(response, call_id, name)

    def _read_calls(self, turn: Mapping[str, Any], content: object) -> None:
        """Read a message that is one call or several, perhaps behind a thought."""
        thought = None
        if not isinstance(content, dict):
            thought, text = split_thought(self.text(content))
            content = literal(text, "call_not_json")
        calls = tuple(map(read_call, content if isinstance(content, list) else [content]))
        reasoning, trained = self._reasoning(turn, thought), self._is_trained(turn)
        self.add_step(Message("assistant", None, reasoning, calls, trained=trained))

    def _read_assistant(self, turn: Mapping[str, Any], content: object, name: str | None) -> None:
        trained = self._is_trained(turn)
        calls = list(map(read_call, self._tool_calls(turn)))
        thought: str | None = None
        text: str | None = None
        if isinstance(content, list):
            thought, text, more = self._read_blocks(content)
            calls += more
        elif content is not None:
            text = self.text(content)
        if text is not None and not calls and (self._form == "react" or (self.toolbench and REACT.search(text))):
            for kind, said, call in read_react(text):
                if kind == "result":
                    self._add_result(said, None, None)
                else:
                    called = () if call is None else (call,)
                    step = Message("assistant", said or None, tool_calls=called, name=name, trained=trained)
                    self.add_step(step)
            return
        if text is not None and thought is None:
            thought, text = split_thought(text)
        found = None if text is None else read_text_calls(text, self._tools, pythonic=self._form == "toolace")
        if found is not None:
            if found.calls and calls:
                raise FormatError("calls_in_text", "it has calls as a field and in its text")
            if thought and found.reasoning:
                detail = "it holds a thought in <think> and one in other marks"
                raise FormatError("two_reasonings", detail)
            if found.words_after_call:
                self._notes.append("words_after_a_call")
            text, calls, thought = found.text or None, [*calls, *found.calls], thought or found.reasoning
        elif text is not None and REACT.search(text):
            raise FormatError("form_react", "ReAct text (Action / Action Input), which dataset.format=react reads")
        reasoning = self._reasoning(turn, thought)
        if self._messages and self._messages[-1].role == "assistant":
            self._notes.append("messages_joined")
        self.add_step(Message("assistant", text, reasoning, tuple(calls), name=name, trained=trained))

    def _read_blocks(self, content: Sequence[Any]) -> tuple[str | None, str | None, list[ToolCall]]:
        """Return the thoughts, the words and the calls of a content in parts."""
        thoughts: list[str] = []
        words: list[object] = []
        calls: list[ToolCall] = []
        for block in content:
            if _is_block(block, "thinking") and isinstance(block.get("thinking"), str):
                self._note_block(block)
                thoughts.append(block["thinking"])
            elif _is_block(block, "tool_use"):
                calls.append(read_call(block))
            else:
                words.append(block)
                if calls:
                    self._notes.append("words_after_a_call")
        return "\n".join(thoughts) or None, self.text(words) if words else None, calls

    def _tool_calls(self, turn: Mapping[str, Any]) -> list[Any]:
        calls = turn.get("tool_calls") or []
        if isinstance(calls, str):
            calls = literal(calls, "call_not_json")
        older = turn.get("function_call")
        if not blank(older):
            if calls:
                raise FormatError("call_not_an_object", "it has both tool_calls and function_call")
            calls = [literal(older, "call_not_json") if isinstance(older, str) else older]
        if not isinstance(calls, list):
            raise FormatError("call_not_an_object", "tool_calls is no list")
        return calls

    def _reasoning(self, turn: Mapping[str, Any], thought: str | None) -> str | None:
        """Return the reasoning of a message, and note which field or mark it comes from."""
        given = {field: turn[field] for field in _REASONING if isinstance(turn.get(field), str) and turn[field]}
        if thought:
            given["<think>"] = thought
        if len({text.strip() for text in given.values()}) > 1:
            raise FormatError("two_reasonings", f"{' and '.join(given)} say different things")
        for field, text in given.items():
            self._notes.append(f"reasoning_from:{field.strip('<>')}")
            return str(text)
        return None

    def _is_trained(self, turn: Mapping[Any, Any]) -> bool:
        trained = _is_trained(turn)
        self._notes += ["step_not_trained"] * (not trained)
        return trained

    def _add_result(self, text: str, call_id: str | None, name: str | None) -> None:
        """Add a tool's result: to the call of its id, else to the first of its name, else to the first without one."""
        waiting = [(at, call) for at, call in enumerate(self._open) if call is not None]
        if call_id is not None and any(call.id is not None for _, call in waiting):
            waiting = [(at, call) for at, call in waiting if call.id == call_id]
        elif name is not None:
            waiting = [(at, call) for at, call in waiting if call.name == name]
        if not waiting:
            named = f" with id {call_id!r}" if call_id is not None else f" of {name!r}" if name else ""
            raise FormatError("observation_without_call", f"no call awaits the tool result{named}")
        at, call = waiting[0]
        self._open[at] = None
        self._messages.append(Message("tool", text, tool_call_id=call.id, name=name))

    def _end_step(self) -> None:
        """End the step: of parallel calls all have results, or none after the first that lacks one."""
        answered = [call is None for call in self._open]
        if answered != sorted(answered, reverse=True):
            raise FormatError("result_missing", "a call has no result, while a parallel call after it has one")
        self._open = []

    def _note_fields(self, turn: Mapping[Any, Any], role: str, others: Sequence[str]) -> None:
        known = {"role" if "role" in turn else "from", "content" if "content" in turn else "value", *others}
        known |= _understood_flags(turn, agent=role in ("assistant", "call"))
        fields = _FIELDS.get(role, ("name",))
        known.update(field for field in fields if field not in _REASONING or isinstance(turn.get(field), str))
        self._notes += _unused("field_not_carried", turn, known)

    def text(self, content: object, what: str = "its content") -> str:
        """Return the text of a message; of a list of parts the text parts, a line each, as a server joins them."""
        if isinstance(content, str):
            return content
        kind = "null" if content is None else type(content).__name__
        if isinstance(content, list):
            other = [part for part in content if not _is_text_block(part)]
            if not other:
                for part in content:
                    self._note_block(part)
                return "\n".join(part["text"] for part in content)
            kind = (
                f"a part {_key_name(other[0].get('type'))!r}" if isinstance(other[0], dict) else "a part without type"
            )
        raise FormatError("value_not_text", f"{what} is {kind}, expected text or a list of text parts")

    def _note_block(self, block: Mapping[Any, Any]) -> None:
        known = _BLOCKS.get(block.get("type", "text"), frozenset())
        self._notes += _unused("field_not_carried", block, known | {"type"})


def _is_text_block(block: Any) -> bool:
    return isinstance(block, dict) and isinstance(block.get("text"), str) and block.get("type", "text") in _TEXTS


def _is_block(block: Any, kind: str) -> bool:
    return isinstance(block, dict) and block.get("type") == kind
