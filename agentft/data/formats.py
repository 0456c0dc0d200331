"""Read records of the formats people have into messages, without a detour through any text of ours.

| format | how it is recognised | what it is |
|---|---|---|
| `openai` | a field `messages`, or turns with `role` and `content` | OpenAI's chat format and its relatives: Anthropic, ms-swift, Toucan |
| `sharegpt` | roles `human`, `gpt`, `function_call` ...; or a column `tools` or `system`; or calls in other marks | LLaMA-Factory, APIGen-MT, Hermes, ToolBench |
| `xlam` | fields `query` and `answers` | one question and its calls |
| `toolace` | as `sharegpt` or `openai` | the name for it: every text in brackets is a list of calls, refused where it is none |
| `react` | it must be named, but for ToolBench's role `function` | text with lines `Thought:`, `Action:`, `Action Input:` and so on |

Names, arguments, texts and declarations come through unchanged; what has no meaning here is noted by name. Results belong to
calls by id or name where the record has them, else by their order.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentft.data.calls import ToolCall, blank, literal, read_call, read_id
from agentft.data.config import Format
from agentft.data.conversation import Message, Role
from agentft.data.response import (
    REACT,
    read_named_results,
    read_react,
    read_responses,
    read_text_calls,
    split_thought,
)
from agentft.data.tools import Tools, lift_listed, read_tools
from agentft.errors import FormatError

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
SHAREGPT_ROLES = frozenset(_ROLES) - {"system", "developer", "user", "assistant"}
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
TOOL_COLUMNS = ("tools", "functions", "available_tools")
COLUMNS = frozenset({"id", "messages", "conversations", "system", *TOOL_COLUMNS})
XLAM_COLUMNS = frozenset({"id", "query", "tools", "answers"})

Read = tuple[tuple[Message, ...], Tools]
"""The messages of a record and the tools that it declares beside them."""


def is_trained(turn: Mapping[Any, Any]) -> bool:
    """Return False where a field of the turn says that it is shown and not trained."""
    return not any(_is_flag(turn.get(field)) and not turn[field] for field in _FLAGS)


def understood_flags(turn: Mapping[Any, Any], *, agent: bool) -> frozenset[str]:
    """Return which of `_FLAGS` mean something here; on a turn that is not the agent's only that it is not trained."""
    return frozenset(f for f in _FLAGS if turn.get(f) is None or (_is_flag(turn[f]) and (agent or not turn[f])))


def _is_flag(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def key_name(key: object) -> str:
    """Return a key as a name that can stand in a report."""
    return re.sub(r"[^\w$.-]", "_", key)[:40] if isinstance(key, str) else type(key).__name__


def unused(kind: str, record: Mapping[Any, Any], known: Collection[str]) -> list[str]:
    """Return a code, `kind` and name, for each field that has a value and no meaning."""
    return [f"{kind}:{key_name(key)}" for key, value in record.items() if key not in known and not blank(value)]


def read_xlam(record: Mapping[Any, Any], notes: list[str]) -> Read:
    """Read a question, the tools, and the calls that answer it."""
    chat = _Chat(notes, read_tools(record.get("tools")), Format.xlam)
    chat.add_plain("user", chat.text(record.get("query"), 1), None, 1)
    answers = record.get("answers")
    answers = literal(answers, "call_not_json") if isinstance(answers, str) else answers
    if not isinstance(answers, list):
        raise FormatError("call_not_json", "'answers' is no list of calls")
    chat.add_step(Message("assistant", tool_calls=tuple(map(read_call, answers))), 2)
    return chat.finish()


def read_chat(record: Mapping[Any, Any], form: Format, notes: list[str]) -> Read:
    """Read a record of messages, by whatever names; `form` says how calls stand in text where it is react or toolace."""
    field = "messages" if record.get("conversations") is None else "conversations"
    turns = record.get(field)
    if isinstance(turns, str):
        turns = literal(turns, f"{field}_unreadable_text")
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"{field}_not_a_list", f"{field!r} is no list with at least one message")
    first = turns[0] if isinstance(turns[0], dict) else {}
    begins_with_system = _ROLES.get(str(first.get("role", first.get("from")))) in ("system", "developer")
    column = next((column for column in TOOL_COLUMNS if not blank(record.get(column))), None)
    of_system = column is None and begins_with_system  # some keep the tools in the system message
    if column == "available_tools":
        notes.append(f"tools_from_column:{column}")
    chat = _Chat(notes, read_tools(first.get("tools") if of_system else record.get(column or "")), form)
    chat.toolbench = any(isinstance(turn, dict) and turn.get("from") == "function" for turn in turns)
    system = "" if blank(record.get("system")) else chat.text(record["system"], 0)
    if system.strip():
        if not begins_with_system:
            chat.add_plain("system", system, None, 0)
        elif first.get("content", first.get("value")) != system:
            raise FormatError("two_system_turns", "a column 'system' and a system message")
    for number, turn in enumerate(turns, 1):
        chat.read(turn, number, known=("tools",) if of_system and number == 1 else ())
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

    def read(self, turn: Any, number: int, *, known: Sequence[str] = ()) -> None:
        """Read one message of a record; `known` are further fields with a meaning."""
        if not isinstance(turn, dict):
            raise FormatError("turn_not_an_object", f"message {number} is no object")
        given = turn.get("role", turn.get("from"))
        if not isinstance(given, str):
            raise FormatError("role_missing", f"message {number} has no role")
        role = _ROLES.get(given)
        if role is None:
            detail = f"message {number} has the role {given[:40]!r}; known are {', '.join(_ROLES)}"
            raise FormatError("unknown_role", detail)
        self._note_fields(turn, role, known)
        content = turn.get("content", turn.get("value"))
        name = turn["name"] if isinstance(turn.get("name"), str) and turn["name"] else None
        if role == "call":
            self._read_calls(turn, content, number)
        elif role == "result":
            self._read_result(content, read_id(turn.get("tool_call_id")), name, number)
        elif role == "assistant":
            self._read_assistant(turn, content, name, number)
        elif role == "user":
            self._read_user(content, name, number)
        else:
            self.add_plain("developer" if role == "developer" else "system", self.text(content, number), name, number)

    def add_plain(self, role: Role, text: str, name: str | None, number: int) -> None:
        """Add a system's or a user's message."""
        last = self._messages[-1].role if self._messages else None
        if role == "user":
            if not text.strip():
                raise FormatError("empty_user", f"message {number} (user) is blank")
            if last == "user":
                raise FormatError("two_user_turns", f"message {number} is the user's as is the one before it")
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

    def add_step(self, step: Message, number: int) -> None:
        """Add what the agent says; a call right after its words, or after another call, belongs to the same step."""
        fields = dict.fromkeys(key_name(field) for call in step.tool_calls for field in call.extras)
        self._notes += [f"field_not_carried:{field}" for field in fields]
        calls = tuple(replace(call, extras={}) for call in step.tool_calls)
        if not any(message.role == "user" for message in self._messages):
            raise FormatError(
                "starts_with_assistant", f"message {number} is the assistant's, expected the user's first"
            )
        if not step.text.strip() and not calls:
            raise FormatError("empty_assistant", f"message {number} has neither text nor calls")
        last = self._messages[-1]
        if last.role == "assistant":
            if step.content or (step.reasoning_content and last.reasoning_content) or not calls:
                raise FormatError("two_assistant_turns", f"message {number} is the assistant's as is the one before it")
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

    def _read_user(self, content: object, name: str | None, number: int) -> None:
        if isinstance(content, list):
            results = [block for block in content if _is_block(block, "tool_result")]
            for block in results:
                self._note_block(block)
                self._add_result(self.text(block.get("content") or "", number), read_id(block.get("tool_use_id")), None)
            content = [block for block in content if not _is_block(block, "tool_result")]
            if results and not content:
                return
        text = self.text(content, number)
        responses = read_responses(text) if any(self._open) else []
        for response in responses:
            self._add_result(response, None, None)
        if not responses:
            self.add_plain("user", text, name, number)

    def _read_result(self, content: object, call_id: str | None, name: str | None, number: int) -> None:
        text = self.text(content, number)
        waiting = [call for call in self._open if call is not None]
        if call_id is None and name is None and len(waiting) > 1 and (named := read_named_results(text, waiting)):
            for call, response in zip(waiting, named, strict=True):
                self._add_result(response, call.id, call.name)
            return
        for response in read_responses(text) or [text]:
            self._add_result(response, call_id, name)

    def _read_calls(self, turn: Mapping[str, Any], content: object, number: int) -> None:
        """Read a message that is one call or several, perhaps behind a thought."""
        thought = None
        if not isinstance(content, dict):
            thought, text = split_thought(self.text(content, number))
            content = literal(text, "call_not_json")
        calls = tuple(map(read_call, content if isinstance(content, list) else [content]))
        reasoning, trained = self._reasoning(turn, thought, number), self._is_trained(turn)
        self.add_step(Message("assistant", None, reasoning, calls, trained=trained), number)

    def _read_assistant(self, turn: Mapping[str, Any], content: object, name: str | None, number: int) -> None:
        trained = self._is_trained(turn)
        calls = list(map(read_call, self._tool_calls(turn, number)))
        thought: str | None = None
        text: str | None = None
        if isinstance(content, list):
            thought, text, more = self._read_blocks(content, number)
            calls += more
        elif content is not None:
            text = self.text(content, number)
        if text is not None and not calls and (self._form == "react" or (self.toolbench and REACT.search(text))):
            for kind, said, call in read_react(text):
                if kind == "result":
                    self._add_result(said, None, None)
                else:
                    called = () if call is None else (call,)
                    step = Message("assistant", said or None, tool_calls=called, name=name, trained=trained)
                    self.add_step(step, number)
            return
        if text is not None and thought is None:
            thought, text = split_thought(text)
        found = None if text is None else read_text_calls(text, self._tools, pythonic=self._form == "toolace")
        if found is not None:
            if found.calls and calls:
                raise FormatError("calls_in_text", f"message {number} has calls as a field and in its text")
            if thought and found.reasoning:
                detail = f"message {number} holds a thought in <think> and one in other marks"
                raise FormatError("two_reasonings", detail)
            if found.words_after_call:
                self._notes.append("words_after_a_call")
            text, calls, thought = found.text or None, [*calls, *found.calls], thought or found.reasoning
        elif text is not None and REACT.search(text):
            raise FormatError("form_react", "ReAct text (Action / Action Input), which dataset.format=react reads")
        reasoning = self._reasoning(turn, thought, number)
        if self._messages and self._messages[-1].role == "assistant":
            self._notes.append("messages_joined")
        self.add_step(Message("assistant", text, reasoning, tuple(calls), name=name, trained=trained), number)

    def _read_blocks(self, content: Sequence[Any], number: int) -> tuple[str | None, str | None, list[ToolCall]]:
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
        return "\n".join(thoughts) or None, self.text(words, number) if words else None, calls

    def _tool_calls(self, turn: Mapping[str, Any], number: int) -> list[Any]:
        calls = turn.get("tool_calls") or []
        if isinstance(calls, str):
            calls = literal(calls, "call_not_json")
        older = turn.get("function_call")
        if not blank(older):
            if calls:
                raise FormatError("call_not_an_object", f"message {number} has both tool_calls and function_call")
            calls = [literal(older, "call_not_json") if isinstance(older, str) else older]
        if not isinstance(calls, list):
            raise FormatError("call_not_an_object", f"tool_calls of message {number} is no list")
        return calls

    def _reasoning(self, turn: Mapping[str, Any], thought: str | None, number: int) -> str | None:
        """Return the reasoning of a message, and note which field or mark it comes from."""
        given = {field: turn[field] for field in _REASONING if isinstance(turn.get(field), str) and turn[field]}
        if thought:
            given["<think>"] = thought
        if len({text.strip() for text in given.values()}) > 1:
            raise FormatError("two_reasonings", f"message {number}: {' and '.join(given)} say different things")
        for field, text in given.items():
            self._notes.append(f"reasoning_from:{field.strip('<>')}")
            return str(text)
        return None

    def _is_trained(self, turn: Mapping[Any, Any]) -> bool:
        trained = is_trained(turn)
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
        known |= understood_flags(turn, agent=role in ("assistant", "call"))
        fields = _FIELDS.get(role, ("name",))
        known.update(field for field in fields if field not in _REASONING or isinstance(turn.get(field), str))
        self._notes += unused("field_not_carried", turn, known)

    def text(self, content: object, number: int) -> str:
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
            kind = f"a part {key_name(other[0].get('type'))!r}" if isinstance(other[0], dict) else "a part without type"
        where = f"message {number}" if number else "the column 'system'"
        raise FormatError("value_not_text", f"the content of {where} is {kind}, expected text or a list of text parts")

    def _note_block(self, block: Mapping[Any, Any]) -> None:
        known = _BLOCKS.get(block.get("type", "text"), frozenset())
        self._notes += unused("field_not_carried", block, known | {"type"})


def _is_text_block(block: Any) -> bool:
    return isinstance(block, dict) and isinstance(block.get("text"), str) and block.get("type", "text") in _TEXTS


def _is_block(block: Any, kind: str) -> bool:
    return isinstance(block, dict) and block.get("type") == kind
