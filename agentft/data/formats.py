"""Read records of the formats people have into messages, without a detour through any text of ours.

| format | how it is recognised | what it is |
|---|---|---|
| `openai` | a field `messages`, or turns with `role` and `content` | OpenAI's chat format and its relatives: `tool_calls`, `function_call`, Anthropic's blocks, ms-swift's `tool_call` / `tool_response`, calls as text in `<tool_call>` |
| `sharegpt` | turns with `from` and `value` from `human`, `gpt`, `function_call`, `observation`, `tool`, `function`; or a column `tools` or `system` beside them | the same with other names |
| `xlam` | fields `query`, `tools` and `answers` | one question and its calls |
| `toolace` | calls such as `[f(a=1)]`, declared in the system text | a dialect of `sharegpt` and `openai`, and a name for it |
| `react` | it must be named; ToolBench's role `function` shows it too | text with lines `Thought:`, `Action:`, `Action Input:`, `Observation:`, `Final Answer:` |

Names, arguments, texts and declarations come through unchanged. Results belong to calls by id or name where the record has
them, else by their order. What a record holds and no reader knows is noted by its name.
"""  # noqa: E501

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agentft.data.calls import Json, JsonRefused, ToolCall, read_json
from agentft.data.conversation import Message, Role
from agentft.data.grammar import Call, GrammarError, Observation, parse_assistant
from agentft.data.literal_text import LiteralError, read_literal
from agentft.data.untrained import understood_fields, untrained_field

Form = Literal["auto", "msagent", "openai", "sharegpt", "xlam", "toolace", "react"]
"""How records are laid out; `auto` is every format that a record shows by its fields and roles."""

Format = Literal["msagent", "openai", "sharegpt", "xlam"]

Note = tuple[str, str]
"""Code and detail of what was understood in a way that a reader should know of."""

_ROLES: dict[str, str] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool_call": "call",
    "function_call": "call",
    "tool": "result",
    "tool_response": "result",
    "observation": "result",
    "function": "result",
    "function_response": "result",
    "ipython": "result",
}
_SHAREGPT_ROLES = frozenset(_ROLES) - {"system", "developer", "user", "assistant"}
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_TURN_FIELDS = frozenset(
    {
        "role",
        "content",
        "from",
        "value",
        "tool_calls",
        "function_call",
        "tool_call_id",
        "name",
        "id",
        *_REASONING_FIELDS,
    }
)
_COLUMNS = frozenset({"id", "messages", "conversations", "tools", "functions", "system"})
_QUESTION_AND_ANSWER = (
    ("query", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
)

_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TOOL_RESPONSE = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.DOTALL)
_TOOLS_BLOCK = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)\Z", re.DOTALL)
_OTHER_MARKS = ("[TOOL_CALLS]", "<|python_tag|>", "<function=", "<|tool_call|>", "<｜tool▁call", "<|tool_call_begin|>")
"""How other families begin a call. A text that holds one is no prose."""
_PYTHONIC = re.compile(r"\s*\[\s*[^\[\]\"'{}()=]+\(.*\)\s*\]\s*\Z", re.DOTALL)
_REACT_TEXT = re.compile(r"^[ \t]*Action[ \t]*[:：].*\n\s*Action Input[ \t]*[:：]", re.MULTILINE)
_REACT_LABEL = re.compile(r"^[ \t]*(Thought|Action Input|Action|Observation|Final Answer)[ \t]*[:：]", re.MULTILINE)


class FormatError(ValueError):
    """A record that does not follow its format; `reason` is a stable snake_case code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Reading:
    """What a record says."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Json], ...]
    notes: tuple[Note, ...]


def recognise(record: Mapping[Any, Any]) -> Format:
    """Return the format that the fields and the first roles of a record show; `msagent` where they show no other."""
    turns = record.get("conversations")
    if turns is None:
        if record.get("messages") is not None:
            return "openai"
        return "xlam" if {"query", "answers"} <= record.keys() else "msagent"
    for turn in turns[:4] if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            break
        role = turn.get("from")
        if isinstance(role, str):
            if role in _SHAREGPT_ROLES:
                return "sharegpt"
        elif role is None and "from" not in turn and isinstance(turn.get("role"), str) and "content" in turn:
            return "openai"
    beside = any(record.get(column) for column in ("tools", "functions", "system"))
    return "sharegpt" if beside and isinstance(turns, list) and not _has_msagent_calls(turns) else "msagent"


def is_react_text(value: str) -> bool:
    """Return whether a text has a line `Action:` followed by a line `Action Input:`."""
    return "Action Input" in value and _REACT_TEXT.search(value) is not None


def read_messages(record: Mapping[Any, Any], form: str) -> Reading:
    """Read a record of any format but MSAgent's.

    Args:
        form: `react` and `toolace` name how calls stand in text; the others are found out.

    Raises:
        FormatError: the record does not follow the format.
    """
    try:
        return _read_xlam(record) if form == "xlam" else _read_chat(record, form)
    except RecursionError:
        raise FormatError("too_deep", "nested too deep to be read") from None


def _has_msagent_calls(turns: Sequence[Any]) -> bool:
    values = (turn.get("value") for turn in turns if isinstance(turn, dict))
    return any(isinstance(value, str) and "<|startofthink|>" in value for value in values)


class _Messages:
    """Collects messages; the texts and calls of one step, wherever they stand, become one message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.notes: list[Note] = []
        self._open: list[ToolCall | None] = []
        """The calls of the last step; None once they have their result."""

    def plain(self, role: Role, text: str, number: int) -> None:
        """Add a system's or a user's message."""
        if role == "user":
            if not text.strip():
                raise FormatError("empty_user", f"message {number} (user) is blank")
            if self.messages and self.messages[-1].role == "user":
                raise FormatError("two_user_turns", f"message {number} is the user's as is the one before it")
        self._close()
        self.messages.append(Message(role, text))

    def step(
        self, text: str | None, reasoning: str | None, calls: Sequence[ToolCall], number: int, *, trained: bool
    ) -> None:
        """Add what the agent says; a call right after its words, or after another call, belongs to the same step."""
        if not any(message.role == "user" for message in self.messages):
            raise FormatError(
                "starts_with_assistant", f"message {number} is the assistant's, expected the user's first"
            )
        if not (text or "").strip() and not calls:
            raise FormatError("empty_assistant", f"message {number} has neither text nor calls")
        last = self.messages[-1]
        if last.role == "assistant":
            if text or reasoning or not calls:
                raise FormatError("two_assistant_turns", f"message {number} is the assistant's as is the one before it")
            both = (*last.tool_calls, *calls)
            self.messages[-1] = replace(last, tool_calls=both, trained=last.trained and trained)
        else:
            self._close()
            self.messages.append(Message("assistant", text, reasoning, tuple(calls), trained=trained))
        self._open += calls
        _refuse_equal_ids(self.messages[-1].tool_calls)

    def result(self, text: str, call_id: str | None, name: str | None) -> None:
        """Add a tool's result."""
        at = self._call_of(call_id, name)
        if at is None:
            named = f"with id {call_id!r}" if call_id is not None else f"of {name!r}" if name else ""
            raise FormatError("observation_without_call", f"no call awaits the tool result {named}".rstrip())
        call = self._open[at]
        assert call is not None
        self._open[at] = None
        self.messages.append(Message("tool", text, tool_call_id=call.id, name=name))

    def awaits_result(self) -> bool:
        """Return whether a call has no result yet."""
        return any(call is not None for call in self._open)

    def end(self) -> None:
        """Leave out what follows the agent's last message, and refuse what trains nothing."""
        self._close()
        while self.messages and self.messages[-1].role not in ("assistant", "tool"):
            left_out = self.messages.pop()
            self.notes.append((f"last_{left_out.role}_left_out", "nothing of the agent follows it"))
        if not any(message.role == "assistant" for message in self.messages):
            raise FormatError("ends_with_user", "the agent says nothing: there is nothing to train")

    def _call_of(self, call_id: str | None, name: str | None) -> int | None:
        waiting = [(at, call) for at, call in enumerate(self._open) if call is not None]
        if call_id is not None and any(call.id is not None for _, call in waiting):
            return next((at for at, call in waiting if call.id == call_id), None)
        if name is not None and any(call.name == name for _, call in waiting):
            return next(at for at, call in waiting if call.name == name)
        return waiting[0][0] if waiting else None

    def _close(self) -> None:
        """End the step: of parallel calls all have results, or none after the first that lacks one."""
        answered = [call is None for call in self._open]
        if True in answered and False in answered[: len(answered) - answered[::-1].index(True)]:
            raise FormatError("result_missing", "a call has no result, while a parallel call after it has one")
        self._open = []


def _refuse_equal_ids(calls: Sequence[ToolCall]) -> None:
    ids = [call.id for call in calls if call.id is not None]
    if len(set(ids)) < len(ids):
        raise FormatError("call_id_twice", f"two calls of one step have the id {max(ids, key=ids.count)!r}")


def _read_chat(record: Mapping[Any, Any], form: str) -> Reading:
    turns = _turns(record)
    made = _Messages()
    tools = _tools(record.get("tools") or record.get("functions"))
    _note_columns(record, made)
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        if (
            turns
            and isinstance(turns[0], dict)
            and turns[0].get("role", turns[0].get("from")) in ("system", "developer")
        ):
            raise FormatError("two_system_turns", "a column 'system' and a system message")
        made.plain("system", system, 0)
    dialect = form
    if form != "react" and any(isinstance(turn, dict) and turn.get("from") == "function" for turn in turns):
        dialect = "react"
    for number, turn in enumerate(turns, 1):
        _read_turn(turn, number, made, dialect)
    made.end()
    messages = tuple(made.messages)
    if not tools:
        messages, tools = _lift_tools(messages)
    return Reading(messages, tools, tuple(made.notes))


def _turns(record: Mapping[Any, Any]) -> list[Any]:
    field = "messages" if record.get("conversations") is None else "conversations"
    turns = record.get(field)
    if isinstance(turns, str):
        turns = _literal(turns, f"{field}_unreadable_text")
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"{field}_not_a_list", f"{field!r} is no list with at least one message")
    return turns


def _read_turn(turn: Any, number: int, made: _Messages, dialect: str) -> None:
    if not isinstance(turn, dict):
        raise FormatError("turn_not_an_object", f"message {number} is no object")
    given = turn.get("role", turn.get("from"))
    if not isinstance(given, str):
        raise FormatError("role_missing", f"message {number} has no role")
    role = _ROLES.get(given)
    if role is None:
        known = ", ".join(_ROLES)
        raise FormatError("unknown_role", f"message {number} has the role {given[:40]!r}; known are {known}")
    _note_fields(turn, number, role, made)
    content = turn.get("content", turn.get("value"))
    trained = untrained_field(turn) is None
    if not trained and role in ("assistant", "call"):
        made.notes.append(("step_not_trained", f"message {number}: shown, not trained ({untrained_field(turn)})"))
    if role == "call":
        calls = _literal(_text(content, number), "call_not_json")
        read = [_call(None, call) for call in (calls if isinstance(calls, list) else [calls])]
        made.step(None, None, read, number, trained=trained)
    elif role == "result":
        _read_result(turn, content, number, made)
    elif role == "assistant":
        _read_assistant(turn, content, number, made, dialect, trained=trained)
    elif role == "user" and isinstance(content, list) and any(_is_block(block, "tool_result") for block in content):
        for block in content:
            if _is_block(block, "tool_result"):
                made.result(_text(block.get("content") or "", number), _id(block.get("tool_use_id")), None)
        if words := [block for block in content if not _is_block(block, "tool_result")]:
            made.plain("user", _text(words, number), number)
    else:
        text = _text(content, number)
        if role == "user" and made.awaits_result() and (responses := _responses(text)):
            for response in responses:
                made.result(response, None, None)
        else:
            made.plain("user" if role == "user" else "developer" if role == "developer" else "system", text, number)


def _read_result(turn: Mapping[str, Any], content: object, number: int, made: _Messages) -> None:
    text = _text(content, number)
    name = turn.get("name")
    responses = _responses(text) or [text]
    for response in responses:
        made.result(response, _id(turn.get("tool_call_id")), name if isinstance(name, str) else None)


def _read_assistant(
    turn: Mapping[str, Any], content: object, number: int, made: _Messages, dialect: str, *, trained: bool
) -> None:
    reasoning = next((turn[field] for field in _REASONING_FIELDS if isinstance(turn.get(field), str)), None)
    calls = _tool_calls(turn, number)
    text: str | None
    if isinstance(content, list) and any(_is_block(block, "tool_use", "thinking") for block in content):
        thoughts = [block.get("thinking") for block in content if _is_block(block, "thinking")]
        reasoning = "\n".join(thought for thought in thoughts if isinstance(thought, str)) or reasoning
        for block in content:
            if _is_block(block, "tool_use"):
                calls.append(_call(block.get("id"), {"name": block.get("name"), "arguments": block.get("input")}))
        words = [block for block in content if not _is_block(block, "tool_use", "thinking")]
        text = _text(words, number) if words else None
    else:
        text = None if content is None else _text(content, number)
    if dialect == "react" and text is not None and not calls:
        _read_react(text, number, made, trained=trained)
        return
    if reasoning is None and text is not None:
        reasoning, text = _split_thought(text, number)
    if text is not None and not calls:
        text, calls = _calls_in_text(text, number, dialect)
    made.step(text, reasoning or None, calls, number, trained=trained)


def _split_thought(text: str, number: int) -> tuple[str | None, str]:
    """Return the thought that a text begins with, and the text after it."""
    if "</think>" not in text:
        if text.lstrip().startswith("<think>"):
            raise FormatError("thought_never_closed", f"message {number} opens <think> and never closes it")
        return None, text
    found = _THOUGHT.match(text)
    thought, after = (found[1], found[2]) if found else text.split("</think>", 1)
    if not found and "<think>" in thought:  # somewhere inside a sentence: letters
        return None, text
    return thought.strip("\n") or None, after.lstrip("\n")


def _calls_in_text(text: str, number: int, dialect: str) -> tuple[str | None, list[ToolCall]]:
    """Return the words of a text and the calls that are written in it.

    Raises:
        FormatError: it holds calls that no reader understands.
    """
    if "<tool_call>" in text:
        bodies = _TOOL_CALL.findall(text)
        words = _TOOL_CALL.sub("", text)
        if "<tool_call>" not in words and bodies:
            return words.strip() or None, [_call(None, _literal(body.strip(), "call_not_json")) for body in bodies]
        raise FormatError("call_never_closed", f"message {number} opens <tool_call> and never closes it")
    if dialect == "toolace" or _PYTHONIC.match(text):
        calls = _pythonic_calls(text)
        if calls:
            return None, calls
        if dialect == "toolace" and _PYTHONIC.match(text):
            raise FormatError("call_not_read", f"message {number} is no list of calls such as [f(a=1)]")
    for mark in _OTHER_MARKS:
        if mark in text:
            raise FormatError(
                "calls_in_text", f"message {number} holds {mark!r}, by which a call of another family begins"
            )
    if "<|startof" in text:
        try:
            parts = parse_assistant(text)
        except GrammarError as error:
            raise FormatError("marks_in_text", f"message {number}: {error.detail}") from None
        if any(isinstance(part, Call | Observation) for part in parts):
            names = "conversations, from, value, user, assistant"
            raise FormatError(
                "marks_in_text", f"message {number} is MSAgent text; such a record needs the names {names}"
            )
    return text, []


def _pythonic_calls(text: str) -> list[ToolCall]:
    """Read `[name(key=value, ...), ...]`; names may hold blanks, as ToolACE's do. No code is run; [] where it is none."""
    body = text.strip()
    if not (body.startswith("[") and body.endswith(")]")):
        return []
    calls: list[ToolCall] = []
    position, end = 1, len(body) - 1
    while position < end:
        opening = body.find("(", position)
        name = body[position:opening].strip(" \n\t,")
        closing = _closing(body, opening)
        if opening < 0 or not name or closing is None or len(body) > 100_000:
            return []
        try:
            node = ast.parse(f"f({body[opening + 1 : closing]})", mode="eval").body
            assert isinstance(node, ast.Call)
            if node.args or any(keyword.arg is None for keyword in node.keywords):
                return []
            arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            json.dumps(arguments, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, AssertionError):
            return []
        calls.append(ToolCall(name, arguments))
        position = closing + 1
        if body[position:end].strip() and not body[position:end].lstrip().startswith(","):
            return []
    return calls


def _closing(text: str, opening: int) -> int | None:
    """Return where the bracket that opens at `opening` is closed, quoted ones passed over."""
    depth, quote, at = 0, "", opening
    while 0 <= at < len(text):
        letter = text[at]
        if quote:
            if letter == "\\":
                at += 1
            elif letter == quote:
                quote = ""
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return None


def _read_react(value: str, number: int, made: _Messages, *, trained: bool) -> None:
    """Strictly ordered: an observation follows its action input, that follows its action; the final answer ends."""
    labels = list(_REACT_LABEL.finditer(value))
    ends = [label.start() for label in labels[1:]] + [len(value)] * bool(labels)
    texts = [value[: labels[0].start()].strip()] if labels else [value.strip()]
    action: str | None = None
    before = ""
    for label, end in zip(labels, ends, strict=True):
        kind, content = label[1], value[label.end() : end].strip()
        expected_before = {"Action Input": ("Action",), "Observation": ("Action Input",)}.get(kind)
        if before == "Action" and kind != "Action Input":
            raise FormatError("react_order", "Action without Action Input")
        if before == "Final Answer" or (expected_before is not None and before not in expected_before):
            raise FormatError("react_order", f"{kind} after {before or 'nothing'}")
        if kind in ("Thought", "Final Answer"):
            texts.append(content)
        elif kind == "Action":
            action = content
        elif kind == "Action Input":
            call = _call(None, {"name": action, "arguments": _literal(content, "arguments_not_json")})
            made.step("\n".join(filter(None, texts)) or None, None, [call], number, trained=trained)
            texts = []
        else:
            made.result(content, None, None)
        before = kind
    if before == "Action":
        raise FormatError("react_order", "Action without Action Input")
    if any(texts):
        made.step("\n".join(filter(None, texts)), None, [], number, trained=trained)


def _read_xlam(record: Mapping[Any, Any]) -> Reading:
    """Read a row of xLAM's data: a question, the tools, and the calls that answer it."""
    made = _Messages()
    _note_columns(record, made, {"query", "answers"})
    made.plain("user", _text(record.get("query"), 1), 1)
    answers = record.get("answers")
    answers = _literal(answers, "call_not_json") if isinstance(answers, str) else answers
    if not isinstance(answers, list):
        raise FormatError("call_not_json", "'answers' is no list of calls")
    made.step(None, None, [_call(None, answer) for answer in answers], 2, trained=True)
    made.end()
    return Reading(tuple(made.messages), _tools(record.get("tools")), tuple(made.notes))


def question_and_answer_fields(record: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Return the two fields of a record that is a question and an answer, and no conversation."""
    return next((pair for pair in _QUESTION_AND_ANSWER if record.keys() >= set(pair)), None)


def _tool_calls(turn: Mapping[str, Any], number: int) -> list[ToolCall]:
    calls = turn.get("tool_calls") or []
    if turn.get("function_call"):
        calls = [{"function": turn["function_call"]}]
    if isinstance(calls, str):
        calls = _literal(calls, "call_not_json")
    if not isinstance(calls, list):
        raise FormatError("call_not_an_object", f"tool_calls of message {number} is no list")
    read: list[ToolCall] = []
    for call in calls:
        if not isinstance(call, dict):
            raise FormatError("call_not_an_object", f"a tool call of message {number} is no object")
        read.append(_call(call.get("id"), call.get("function", call)))
    return read


def _call(call_id: object, call: object) -> ToolCall:
    if not isinstance(call, dict):
        raise FormatError("call_not_an_object", "a call is no object with name and arguments")
    name = call.get("name")
    if not isinstance(name, str) or not name.strip():
        raise FormatError("call_without_name", "a tool call has no name")
    return ToolCall(name, _arguments(call.get("arguments", call.get("parameters", {}))), _id(call_id))


def _arguments(arguments: object) -> dict[str, Json]:
    """Return the arguments of a call, an object or its JSON text, as an object."""
    value = {} if arguments is None else arguments
    try:
        if isinstance(value, str):
            value = read_json(value.strip() or "{}")
        else:
            json.dumps(value, allow_nan=False)
    except (JsonRefused, TypeError, ValueError) as error:
        raise FormatError("arguments_not_json", str(error)) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FormatError("arguments_not_an_object", "the arguments of a call are no object with names")
    return value


def _id(value: object) -> str | None:
    """Return an id as text; integers are ids too."""
    if isinstance(value, str):
        return value or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _text(content: object, number: int) -> str:
    """Return the text of a message; of a list of parts the text parts, a line each, as a server joins them."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") if _is_block(part, "text") else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(text for text in texts if isinstance(text, str))
    raise FormatError("value_not_text", f"the content of message {number} is neither text nor a list of text parts")


def _is_block(block: object, *types: str) -> bool:
    return isinstance(block, dict) and block.get("type") in types


def _responses(text: str) -> list[str]:
    """Return the results in a text that is made of `<tool_response>` blocks alone, none where it is not."""
    if not text.lstrip().startswith("<tool_response>") or _TOOL_RESPONSE.sub("", text):
        return []
    return [body.strip("\n") for body in _TOOL_RESPONSE.findall(text)]


def _tools(tools: object) -> tuple[dict[str, Json], ...]:
    """Return declarations: OpenAI's as they are, others in OpenAI's shape."""
    if isinstance(tools, str):
        tools = _literal(tools, "tools_unreadable") if tools.strip() else []
    if not isinstance(tools, (list, type(None))):
        raise FormatError("tools_unreadable", "'tools' is no list")
    read = tuple(_tool(tool) for tool in tools or [])
    try:
        json.dumps(read)
    except (TypeError, ValueError) as error:
        raise FormatError("tools_unreadable", str(error)) from None
    return read


def _tool(tool: object) -> dict[str, Json]:
    if isinstance(tool, str):
        tool = _literal(tool, "tools_unreadable")
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FormatError("tools_unreadable", "a tool is no object with a name")
    schema = function.get("parameters")
    if not isinstance(schema, (dict, type(None))) or not isinstance((schema or {}).get("properties", {}), dict):
        raise FormatError(
            "tools_unreadable", f"parameters of {function['name'][:40]!r} are no JSON schema of an object"
        )
    if "function" in tool:
        return {"type": "function", **tool} if "type" not in tool else dict(tool)
    declared = {key: value for key, value in tool.items() if key != "type"}
    if "input_schema" in declared:  # Anthropic's name
        declared["parameters"] = declared.pop("input_schema")
    elif schema and "properties" not in schema and all(isinstance(value, dict) for value in schema.values()):
        declared["parameters"] = {"type": "object", "properties": schema}  # xLAM writes the properties alone
    return {"type": "function", "function": declared}


def _lift_tools(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[dict[str, Json], ...]]:
    """Take declarations out of a system text that holds them between `<tools>` marks or as a JSON list."""
    head = messages[0]
    if head.role != "system" or not any(message.tool_calls for message in messages):
        return messages, ()
    for text, before, after in _lists_in(head.text):
        try:
            tools = _tools(text)
        except FormatError:
            continue
        if tools:
            left = "\n\n".join(piece.strip() for piece in (before, after) if piece.strip())
            return ((replace(head, content=left), *messages[1:]) if left else messages[1:]), tools
    return messages, ()


def _lists_in(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield what may be a list of tools, and the text before and after it."""
    if found := _TOOLS_BLOCK.search(text):
        body = found[1].strip()
        listed = body if body.startswith("[") else f"[{','.join(body.splitlines())}]"
        yield listed, text[: found.start()], text[found.end() :]
    start = text.find("[{")
    if start >= 0:
        try:
            _, end = json.JSONDecoder(strict=False).raw_decode(text, start)
        except (ValueError, RecursionError):
            return
        yield text[start:end], text[:start], text[end:]


def _note_columns(record: Mapping[Any, Any], made: _Messages, known: set[str] = set()) -> None:  # noqa: B006
    for key, value in record.items():
        if key not in _COLUMNS and key not in known and not _is_blank(value):
            made.notes.append((f"column_not_used:{_name(key)}", f"column {_name(key)!r}"))


def _note_fields(turn: Mapping[Any, Any], number: int, role: str, made: _Messages) -> None:
    understood = understood_fields(turn, agent=role in ("assistant", "call"))
    for key, value in turn.items():
        if key not in _TURN_FIELDS and key not in understood and not _is_blank(value):
            made.notes.append((f"field_not_carried:{_name(key)}", f"message {number}: {_name(key)}"))


def _name(key: object) -> str:
    """Return a key as a name that can stand in a report."""
    return re.sub(r"[^\w.-]", "_", key)[:40] if isinstance(key, str) else type(key).__name__


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _literal(text: str, reason: str) -> Any:
    try:
        return read_literal(text)
    except LiteralError as error:
        raise FormatError(reason, str(error)) from None
