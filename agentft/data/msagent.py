"""Read MSAgent text as messages, write messages as MSAgent text, and lift its list of tools.

    value        := (text | call | observation)*
    call         := THINK_OPEN body THINK_CLOSE
    observation  := EXEC_OPEN body EXEC_CLOSE          only while a call before it in the same value is unanswered

What is a mark and what merely looks like one:

* A mark inside a JSON string of a body is data, provided the body reads as JSON; other marks inside a body are errors.
* A *quoted pair* is text: opening and closing mark of one kind, mid-sentence (other text before them on the line), with
  nothing between but a connective such as "and", "和" or a comma. "A call stands between <|startofthink|> and
  <|endofthink|>." is a sentence about the format and no call.
* A mark spelt with other case, spaces or brackets is an error outside of bodies that read as JSON: taken as text, it
  would put a call or a tool's output into the answer.

Whatever is not understood raises `GrammarError`; nothing is guessed, because a guess could train on a tool's output. What is
written is read back: where it would read as anything else than the messages, it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, islice

from agentft.data.calls import Call, CallFailure, Json, JsonRefused, ToolCall, is_json, kind_of, read_json, strip_fence
from agentft.data.conversation import (
    EXEC_CLOSE,
    EXEC_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    Conversation,
    Message,
    Observation,
    Part,
    Text,
)
from agentft.data.tools import Lifted, clauses, lift_numbered, tool_entry, uncarried_parts
from agentft.errors import FormatError

MARK = re.compile(r"<\|(?:start|end)of(?:think|exec)\|>")
"""Any of the four marks, exactly spelt."""

MAX_CLOSING_MARKS_TRIED = 8
"""How many closing marks may stand inside the JSON strings of one body: bounds the work on hostile text."""

TOOLS_INTRODUCTION = (
    "These tools can be called. To call one, write JSON with the fields api_name and parameters between "
    f"{THINK_OPEN} and {THINK_CLOSE}; answer from its result, or answer directly where no tool is needed:"
)
"""Stands before the numbered list of tools that a record of another format declares."""

CharSpan = tuple[int, int]
"""First character and the one after the last."""

_LOOK_ALIKE = re.compile(
    r"[<＜]\s{0,3}[|｜]?\s{0,3}(?:start|end)[\s_-]{0,3}of[\s_-]{0,3}(?:think|exec)\s{0,3}[|｜]?\s{0,3}[>＞]",
    re.IGNORECASE,
)
_CONNECTIVE = re.compile(
    r"""["'`”’」)]?[ ]?(?:and|or|to|,|/|-|\.{3}|…|和|与|及|以及|或|到|至|、|，)[ ]?["'`“‘「(]?""", re.IGNORECASE
)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)', re.DOTALL)
"""A JSON string, closed or not: a pattern that must find the end would look for it again from every quote."""
_BETWEEN = re.compile(r"[ \t\r\n,:]*")
_ANY_JSON = json.JSONDecoder(strict=False)
_CALL_WORDS = re.compile(r"api_name|json", re.IGNORECASE)


class GrammarError(FormatError):
    """An assistant value that does not follow the grammar, or messages that it cannot say."""


def parse_assistant(value: str) -> tuple[Part, ...]:
    """Split an assistant value into parts, whose sources joined are `value` again.

    Raises:
        GrammarError: marks that do not pair up, an empty call, an observation without a call, a misspelt mark.
    """
    marks = list(MARK.finditer(value))
    parts: list[Part] = []
    text_start = unanswered = index = 0
    while index < len(marks):
        mark = marks[index]
        name = mark.group()
        if name in (THINK_CLOSE, EXEC_CLOSE):
            raise _stray_closing_mark(value, mark, parts, text_start)
        if _is_quoted_pair(value, text_start, marks, index):
            index += 2
            continue
        if mark.start() > text_start:
            parts.append(_text(value[text_start : mark.start()]))
        part: Call | Observation
        if name == THINK_OPEN:
            part, index = _read_call(value, marks, index)
            unanswered += max(1, len(part.requests))
        elif unanswered == 0:
            raise GrammarError("observation_without_call", f"no call before {_at(value, mark)} awaits a result")
        else:
            part, index = _read_observation(value, marks, index)
            unanswered -= 1
        parts.append(part)
        text_start = mark.start() + len(part.source)
    if text_start < len(value):
        parts.append(_text(value[text_start:]))
    return tuple(parts)


def read_marked_call(source: str) -> Call:
    """Read a call of MSAgent text, marks included."""
    reading = read_call_body(source[len(THINK_OPEN) : -len(THINK_CLOSE)])
    return Call(source, (), reading) if isinstance(reading, CallFailure) else Call(source, reading, None)


def read_call_body(body: str) -> tuple[ToolCall, ...] | CallFailure:
    """Read what stands between MSAgent's think marks: one request object or a list of them, fenced or not."""
    text = strip_fence(body)
    if not text:
        return CallFailure("empty", "nothing between the marks")
    try:
        value = read_json(text)
    except JsonRefused as error:
        return CallFailure("not_json", str(error))
    items = value if isinstance(value, list) else [value]
    if not items:
        return CallFailure("empty", "an empty list of calls")
    requests: list[ToolCall] = []
    for item in items:
        request = _read_request(item)
        if isinstance(request, CallFailure):
            return request
        requests.append(request)
    return tuple(requests)


def _read_request(item: Json) -> ToolCall | CallFailure:
    if not isinstance(item, dict):
        return CallFailure("not_an_object", f"a call is an object with api_name and parameters, found {kind_of(item)}")
    extras = dict(item)
    name, parameters = extras.pop("api_name", None), extras.pop("parameters", None)
    if not isinstance(name, str) or not name.strip():
        return CallFailure("no_name", f"api_name is {kind_of(name)}, expected a non-empty string")
    if parameters is None:  # the runtime of the original reads it as a call with none
        parameters = {}
    if not isinstance(parameters, dict):
        return CallFailure("parameters_not_an_object", f"parameters is {kind_of(parameters)}, expected an object")
    return ToolCall(name, parameters, extras=extras)


def _read_call(value: str, marks: list[re.Match[str]], opening: int) -> tuple[Call, int]:
    """Return the call opened by `marks[opening]`, and the index of the first mark after it."""
    start, body_start = marks[opening].span()
    closing, *later = _closing_marks(value, marks, opening, "think")
    call = read_marked_call(value[start : marks[closing].end()])
    body = value[body_start : marks[closing].start()]
    if _fails_as(call, "not_json") and later and any(not string[1] for string in _STRING.finditer(body)):
        for candidate in later:
            # Never across an opening exec mark: what follows it may be a tool's output, and calls are trained.
            if any(mark.group() == EXEC_OPEN for mark in marks[closing:candidate]):
                break
            longer = read_marked_call(value[start : marks[candidate].end()])
            if not _fails_as(longer, "not_json"):
                call, closing = longer, candidate
                break
    if _fails_as(call, "empty"):
        raise GrammarError("think_empty", f"nothing is called at {_at(value, marks[opening])}")
    if _fails_as(call, "not_json"):
        if closing > opening + 1:
            inner = marks[opening + 1]
            reason = "nested_think" if inner.group() == THINK_OPEN else "exec_inside_think"
            raise GrammarError(reason, f"a call that is no JSON holds another mark at {_at(value, inner)}")
        _refuse_look_alikes(body)
    return call, closing + 1


def _read_observation(value: str, marks: list[re.Match[str]], opening: int) -> tuple[Observation, int]:
    """Return the observation opened by `marks[opening]`, and the index of the first mark after it."""
    start, body_start = marks[opening].span()
    closings = _closing_marks(value, marks, opening, "exec")
    closing = closings[0]
    holds_marks = closing > opening + 1
    closed_twice = len(closings) > 1 and closings[1] == closing + 1
    if holds_marks or closed_twice or (len(closings) > 1 and _looks_cut(value[body_start : marks[closing].start()])):
        for candidate in closings:
            if is_json(strip_fence(value[body_start : marks[candidate].start()])):
                return Observation(value[start : marks[candidate].end()]), candidate + 1
    if holds_marks:
        inner = marks[opening + 1]
        reason = "nested_exec" if inner.group() == EXEC_OPEN else "think_inside_exec"
        raise GrammarError(reason, f"an observation that is no JSON holds another mark at {_at(value, inner)}")
    return Observation(value[start : marks[closing].end()]), closing + 1


def _closing_marks(value: str, marks: list[re.Match[str]], opening: int, kind: str) -> list[int]:
    """Return the indices of the next closing marks of a kind, as many as may be tried."""
    close = f"<|endof{kind}|>"
    found = (index for index in range(opening + 1, len(marks)) if marks[index].group() == close)
    closings = list(islice(found, MAX_CLOSING_MARKS_TRIED))
    if not closings:
        raise GrammarError(f"{kind}_never_closed", f"no {close} after {_at(value, marks[opening])}")
    return closings


def _is_quoted_pair(value: str, text_start: int, marks: list[re.Match[str]], index: int) -> bool:
    if index + 1 == len(marks):
        return False
    first, second = marks[index], marks[index + 1]
    if second.start() - first.end() > 12 or second.group() != first.group().replace("start", "end"):
        return False
    if not _CONNECTIVE.fullmatch(value, first.end(), second.start()):
        return False
    before = value[max(text_start, first.start() - 200) : first.start()]  # bounded: a line can be megabytes long
    return bool(before[before.rfind("\n") + 1 :].strip())


def _stray_closing_mark(value: str, mark: re.Match[str], parts: list[Part], text_start: int) -> GrammarError:
    kind, part_type = ("think", Call) if mark.group() == THINK_CLOSE else ("exec", Observation)
    if parts and isinstance(parts[-1], part_type) and not value[text_start : mark.start()].strip():
        return GrammarError(f"{kind}_closed_twice", f"a second closing mark at {_at(value, mark)}")
    return GrammarError(f"{kind}_never_opened", f"no opening mark before {_at(value, mark)}")


def _text(source: str) -> Text:
    _refuse_look_alikes(source)
    return Text(source)


def _refuse_look_alikes(text: str) -> None:
    if "<" not in text and "＜" not in text:
        return
    for found in _LOOK_ALIKE.finditer(text):
        if not MARK.fullmatch(found.group()):
            detail = f"{found.group()!r} resembles a mark; marks are written like {THINK_OPEN}"
            raise GrammarError("mark_misspelt", detail)


def _fails_as(call: Call, reason: str) -> bool:
    return call.failure is not None and call.failure.reason == reason


def _looks_cut(body: str) -> bool:
    """Return whether a fence or bracket was opened and the body ends with none: the closing mark may be data."""
    text = body.strip()
    return text.startswith(("```", "{", "[")) and not text.endswith(("```", "}", "]"))


def _at(value: str, mark: re.Match[str]) -> str:
    around = value[max(0, mark.start() - 20) : mark.end() + 20]
    return f"character {mark.start()} ({around!r})"


def call_places(call: Call) -> list[CharSpan]:
    """Return where a call's names, without quotes, and parameters stand in its source; all of it if it cannot be read."""
    if call.failure is not None:
        return [(len(THINK_OPEN), len(call.source) - len(THINK_CLOSE))]
    text = call_json(call)
    start = call.source.index(text, len(THINK_OPEN))
    return [(start + first, start + last) for first, last in _places(text)]


def call_json(call: Call) -> str:
    """Return what stands between the marks of a call, without its fence."""
    return strip_fence(call.source[len(THINK_OPEN) : -len(THINK_CLOSE)])


def _places(text: str) -> Iterator[CharSpan]:
    """Yield the places in the JSON text of one request or of a list of them; the text is known to be sound."""
    at = _behind(text, 1 if text.startswith("[") else 0)
    while text.startswith("{", at):
        places: list[CharSpan] = []
        at = _behind(text, at + 1)
        while not text.startswith("}", at):
            key, at = _ANY_JSON.raw_decode(text, at)
            start = _behind(text, at)
            _, at = _ANY_JSON.raw_decode(text, start)
            if key == "api_name":
                places.append((start + 1, at - 1))
            elif key == "parameters":
                places.append((start, at))
            at = _behind(text, at)
        yield from places
        at = _behind(text, at + 1)


def _behind(text: str, at: int) -> int:
    """Return where a text goes on behind blanks, commas and colons."""
    found = _BETWEEN.match(text, at)
    return found.end() if found is not None else at


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
    """Cut an assistant's turn of MSAgent text into its steps, `trained` or only shown, and the results between them."""
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
    """Return the conversation with MSAgent text in all its messages; raise GrammarError where that cannot say it."""
    if conversation.is_msagent:
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
    if conversation.is_msagent:
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
    """Return an MSAgent conversation with the list of its system text as `tools`, or why it cannot be: (reason, detail)."""
    if conversation.tools or not conversation.is_msagent:
        return conversation
    system = read_system(conversation.system)
    if system.problem is not None or not system.tools:
        return system.problem or conversation
    head = (replace(conversation.messages[0], content=system.text),) if system.text else ()
    return replace(conversation, messages=(*head, *conversation.messages[1:]), tools=system.tools)
