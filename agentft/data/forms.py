"""Records of other layouts -> turns in MSAgent form: OpenAI `messages`, ShareGPT, ReAct text.

| form | how it is recognised | what it is |
|---|---|---|
| `openai` | a field `messages`, or turns with `role` and `content` | roles system/developer, user, assistant with `tool_calls` (or the older `function_call`), tool; also `tool_call` / `tool_response` turns; `tools` as JSON schema |
| `sharegpt` | a turn from `human`, `gpt`, `function_call` or `observation` | the same with `from` / `value`; `tools` is a JSON text, `system` may stand beside |
| `react` | never by itself: it must be named | assistant text with lines `Thought:`, `Action:`, `Action Input:`, `Observation:`, `Final Answer:` |

Names, arguments, observations and texts come through unchanged; the words Thought, Action, ... are layout and do not. Of a tool's
JSON schema the properties and `required` come through. Results that arrive in another order than their parallel calls are put
in the order of the calls. Each assistant value is parsed again and compared with what went in, so a text can never turn into
a call or a tool's output: where it would, the record is refused.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from typing import Any, Literal

from agentft.data.literal_text import LiteralError, read_literal
from agentft.data.turn_builder import FormError, TurnBuilder
from agentft.data.untrained import understood_fields, untrained_field

Form = Literal["auto", "msagent", "openai", "sharegpt", "react"]
"""How records are laid out; `auto` is every form that a record shows by its fields and roles."""

OtherForm = Literal["openai", "sharegpt", "react"]

_SHAREGPT_ROLES = ("human", "gpt", "function_call", "observation")
_OPENAI_FIELDS = frozenset(
    {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", "id", "from", "value"}
)
_REACT_TEXT = re.compile(r"^[ \t]*Action[ \t]*[:：].*\n\s*Action Input[ \t]*[:：]", re.MULTILINE)
_REACT_LABEL = re.compile(r"^[ \t]*(Thought|Action Input|Action|Observation|Final Answer)[ \t]*[:：]", re.MULTILINE)

_TURN_FIELDS = frozenset({"from", "value"})

Quirk = tuple[str, str]


def recognise(record: dict[Any, Any]) -> Literal["msagent", "openai", "sharegpt"]:
    """The form that the fields and the first roles of a record show; `msagent` where they show no other."""
    turns = record.get("conversations")
    if turns is None:
        return "openai" if record.get("messages") is not None else "msagent"
    if isinstance(turns, list):
        for turn in turns[:2]:
            if not isinstance(turn, dict):
                break
            role = turn.get("from")
            if isinstance(role, str):
                if role in _SHAREGPT_ROLES:
                    return "sharegpt"
            elif role is None and "from" not in turn and isinstance(turn.get("role"), str) and "content" in turn:
                return "openai"
    return "msagent"


def is_react_text(value: str) -> bool:
    """True where a text has a line `Action:` followed by a line `Action Input:`."""
    return "Action Input" in value and _REACT_TEXT.search(value) is not None


def convert(record: dict[Any, Any], form: OtherForm) -> tuple[list[dict[str, str]], list[Quirk]]:
    """The record's turns in MSAgent form, and what was understood but not carried over as (code, detail).

    Raises:
        FormError: the record does not follow the form, or cannot be said in MSAgent form.
    """
    try:
        if form == "openai":
            return _convert_openai(record)
        if form == "sharegpt":
            return _convert_sharegpt(record)
        return _convert_react(record)
    except RecursionError:
        raise FormError("too_deep", "nested too deep to be converted") from None


def _convert_openai(record: dict[Any, Any]) -> tuple[list[dict[str, str]], list[Quirk]]:
    messages = record.get("messages", record.get("conversations"))
    if isinstance(messages, str):
        messages = _literal(messages, "messages_unreadable_text")
    if not isinstance(messages, list) or not messages:
        raise FormError("messages_not_a_list", "'messages' is no list with at least one message")
    quirks: list[Quirk] = []
    turns = TurnBuilder()
    tools = _read_tools(record.get("tools", record.get("functions")))
    results = _Results(turns)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise FormError("turn_not_an_object", f"message {number} is no object")
        role = message.get("role")
        quirks += _not_carried(f"message {number}", message, _OPENAI_FIELDS, agent=role in ("assistant", "tool_call"))
        turns.trained = untrained_field(message) is None
        if number == 1:
            is_system = role in ("system", "developer")
            turns.system(_content(message, number) if is_system else "", tools)
            if is_system:
                continue
        if role in ("tool", "tool_response", "function"):
            results.add(message.get("tool_call_id"), _content(message, number))
            continue
        if role == "tool_call":
            results.expect(
                [(None, *_name_and_arguments(_literal(_content(message, number), "call_not_json")))], more=True
            )
            continue
        results.finish()
        if role == "user":
            turns.user(_content(message, number))
        elif role == "assistant":
            calls = _openai_calls(message, number)
            text = _content(message, number) if message.get("content") is not None else ""
            if not text.strip() and not calls:
                raise FormError("empty_assistant", f"message {number} has neither content nor calls")
            if text.strip():
                turns.say(text)
            results.expect(calls)
        elif role in ("system", "developer"):
            raise FormError("system_in_middle", f"message {number} is a system message; only the first may be")
        else:
            raise FormError("unknown_role", f"message {number} has the role {_shown(role)}")
    results.finish()
    turns.end_assistant()
    return turns.turns, quirks


class _Results:
    """Brings the results of parallel calls into the order of the calls, by id where there are ids."""

    def __init__(self, turns: TurnBuilder) -> None:
        self._turns = turns
        self._ids: list[object] = []
        self._results: list[str | None] = []

    def expect(self, calls: list[tuple[object, object, object]], *, more: bool = False) -> None:
        """Calls as (id, name, arguments). `more`: they belong to the group before, unless that has results already."""
        if not more or any(result is not None for result in self._results):
            self.finish()
        for call_id, name, arguments in calls:
            self._turns.call(name, arguments)
            self._ids.append(call_id)
            self._results.append(None)

    def add(self, call_id: object, text: str) -> None:
        place = None
        if call_id is not None and any(known is not None for known in self._ids):
            place = self._ids.index(call_id) if call_id in self._ids else None
        elif None in self._results:
            place = self._results.index(None)
        if place is None or self._results[place] is not None:
            raise FormError("observation_without_call", f"no call awaits the tool result with id {_shown(call_id)}")
        self._results[place] = text

    def finish(self) -> None:
        given = [result for result in self._results if result is not None]
        if self._results[: len(given)] != given:
            raise FormError("result_missing", "a call has no result, while a parallel call after it has one")
        for result in given:
            self._turns.observe(result)
        self._ids, self._results = [], []


def _openai_calls(message: dict[Any, Any], number: int) -> list[tuple[object, object, object]]:
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [{"function": message["function_call"]}]
    if not isinstance(calls, list):
        raise FormError("call_not_an_object", f"tool_calls of message {number} is no list")
    read: list[tuple[object, object, object]] = []
    for call in calls:
        if not isinstance(call, dict):
            raise FormError("call_not_an_object", f"a tool call of message {number} is no object")
        function = call.get("function", call)
        call_id = call.get("id")
        read.append((call_id if isinstance(call_id, str) else None, *_name_and_arguments(function)))
    return read


def _name_and_arguments(call: object) -> tuple[object, object]:
    if not isinstance(call, dict):
        raise FormError("call_not_an_object", "a call is no object with name and arguments")
    return call.get("name"), call.get("arguments", call.get("parameters", {}))


def _content(message: dict[Any, Any], number: int) -> str:
    """The text of a message; of a list of parts, the text parts joined."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(text, str) for text in texts):
            return "".join(text for text in texts if isinstance(text, str))
    raise FormError("value_not_text", f"the content of message {number} is neither text nor a list of text parts")


def _convert_sharegpt(record: dict[Any, Any]) -> tuple[list[dict[str, str]], list[Quirk]]:
    given = record.get("conversations")
    if not isinstance(given, list):
        raise FormError("conversations_not_a_list", "'conversations' is no list")
    turns = TurnBuilder()
    quirks: list[Quirk] = []
    tools = _read_tools(record.get("tools"))
    system = record.get("system")
    for number, turn in enumerate(given, 1):
        role, value = _from_and_value(turn, number)
        quirks += _not_carried(f"turn {number}", turn, _TURN_FIELDS, agent=role in ("gpt", "function_call"))
        turns.trained = untrained_field(turn) is None
        if number == 1:
            if role == "system" and system:
                raise FormError("two_system_turns", "a field 'system' and a system turn")
            turns.system(value if role == "system" else (system if isinstance(system, str) else ""), tools)
            if role == "system":
                continue
        if role == "human":
            turns.user(value)
        elif role == "gpt":
            if not value.strip():
                raise FormError("empty_assistant", f"turn {number} (gpt) is blank")
            turns.say(value)
        elif role == "function_call":
            calls = _literal(value, "call_not_json")
            for call in calls if isinstance(calls, list) else [calls]:
                turns.call(*_name_and_arguments(call))
        elif role == "observation":
            turns.observe(value)
        elif role == "system":
            raise FormError("system_in_middle", f"turn {number} is a system turn; only the first may be")
        else:
            names = ", ".join(_SHAREGPT_ROLES)
            raise FormError("unknown_role", f"turn {number} is from {role[:40]!r}; the sharegpt form knows {names}")
    turns.end_assistant()
    return turns.turns, quirks


def _convert_react(record: dict[Any, Any]) -> tuple[list[dict[str, str]], list[Quirk]]:
    given = record.get("conversations")
    if not isinstance(given, list):
        raise FormError("conversations_not_a_list", "'conversations' is no list")
    turns = TurnBuilder()
    quirks: list[Quirk] = []
    for number, turn in enumerate(given, 1):
        role, value = _from_and_value(turn, number)
        quirks += _not_carried(f"turn {number}", turn, _TURN_FIELDS, agent=role in ("assistant", "gpt"))
        turns.trained = untrained_field(turn) is None
        if role == "system":
            turns.turns.append({"from": "system", "value": value})
        elif role in ("user", "human"):
            turns.user(value)
        elif role in ("assistant", "gpt"):
            _convert_react_text(value, turns)
            turns.end_assistant()
        else:
            raise FormError("unknown_role", f"turn {number} is from {role[:40]!r}")
    return turns.turns, quirks


def _convert_react_text(value: str, turns: TurnBuilder) -> None:
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
            raise FormError("react_order", "Action without Action Input")
        if before == "Final Answer" or (expected_before is not None and before not in expected_before):
            raise FormError("react_order", f"{kind} after {before or 'nothing'}")
        if kind in ("Thought", "Final Answer"):
            texts.append(content)
        elif kind == "Action":
            _say_joined(texts, turns)
            texts = []
            action = content
        elif kind == "Action Input":
            turns.call(action, _literal(content, "arguments_not_json"))
        else:
            turns.observe(content)
        before = kind
    if before == "Action":
        raise FormError("react_order", "Action without Action Input")
    _say_joined(texts, turns)


def _say_joined(texts: list[str], turns: TurnBuilder) -> None:
    text = "\n".join(text for text in texts if text)
    if text:
        turns.say(text)


def _not_carried(where: str, turn: dict[Any, Any], known: frozenset[str], *, agent: bool) -> list[Quirk]:
    """A quirk for the fields of a turn that mean nothing here, if it has such."""
    unknown = [key for key, value in turn.items() if key not in known and not _is_blank(value)]
    unknown = [_shown(key) for key in unknown if key not in understood_fields(turn, agent=agent)]
    return [("field_not_carried", f"{where}: {', '.join(unknown)[:80]}")] if unknown else []


def _from_and_value(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise FormError("turn_not_an_object", f"turn {number} is no object with from and value")
    role, value = turn.get("from"), turn.get("value")
    if not isinstance(role, str):
        raise FormError("role_missing", f"turn {number} has no 'from'")
    if not isinstance(value, str):
        raise FormError("value_not_text", f"the value of turn {number} ({role[:40]}) is no text")
    return role, value


def _read_tools(tools: object) -> list[dict[str, Any]]:
    """Tools of a JSON schema (or its text) as entries of the MSAgent list."""
    if isinstance(tools, str):
        tools = _literal(tools, "tools_unreadable") if tools.strip() else []
    if not isinstance(tools, (list, type(None))):
        raise FormError("tools_unreadable", "'tools' is no list")
    entries = [_read_tool(tool) for tool in tools or []]
    try:
        json.dumps(entries)
    except (TypeError, ValueError) as error:
        raise FormError("tools_unreadable", str(error)) from None
    return entries


def _read_tool(tool: object) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = _literal(tool, "tools_unreadable")
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FormError("tools_unreadable", "a tool is no object with a name")
    schema = function.get("parameters") or {}
    properties = schema.get("properties") or {} if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        raise FormError("tools_unreadable", f"parameters of {function['name'][:40]!r} are no JSON schema of an object")
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    parameters = []
    for name, details in properties.items():
        details = details if isinstance(details, dict) else {}
        parameter = {"name": name, "description": details.get("description") or "", "required": name in required}
        # A nested object's own list of required names would hide whether this parameter is required.
        rest = {("required_fields" if key == "required" else key): value for key, value in details.items()}
        parameters.append(
            parameter | {key: value for key, value in rest.items() if key not in parameter and value is not None}
        )
    return {"name": function["name"], "description": function.get("description") or "", "parameters": parameters}


def _literal(text: str, reason: str) -> Any:
    try:
        return read_literal(text)
    except LiteralError as error:
        raise FormError(reason, str(error)) from None


def _shown(value: object) -> str:
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)
