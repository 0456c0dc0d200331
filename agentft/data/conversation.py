"""The conversation as a value: messages with the fields of the OpenAI chat format, and the user's own tool declarations."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple

from agentft.data.calls import Call, Json, ToolCall
from agentft.data.tools import OfferedTool, declared_tools, read_offered_tools

Role = Literal["system", "developer", "user", "assistant", "tool"]

THINK_OPEN = "<|startofthink|>"
THINK_CLOSE = "<|endofthink|>"
EXEC_OPEN = "<|startofexec|>"
EXEC_CLOSE = "<|endofexec|>"

_CJK = re.compile("[㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f]")


@dataclass(frozen=True, slots=True)
class Text:
    """Free text in an assistant's turn of MSAgent text, white space included."""

    source: str


@dataclass(frozen=True, slots=True)
class Observation:
    """A tool's result in MSAgent text: context, never trained. Any text is allowed; JSON is usual."""

    source: str
    """The exact text, marks included."""

    @property
    def body(self) -> str:
        """The text between the marks."""
        return self.source[len(EXEC_OPEN) : -len(EXEC_CLOSE)]


Part = Text | Call | Observation


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record comes from."""

    source: str
    """Path or dataset id, as the user wrote it; for a folder the path of the file."""
    line: int
    """Line of a line-based file, else row; from 1. 0 is the file as a whole."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One message. An assistant's message is one *step*: what the agent says between two tool results."""

    role: Role
    content: str | None = None
    """None: the record has no text here, which some chat templates tell from an empty one."""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a tool's message: the call that it answers. None: calls are answered in their order."""
    name: str | None = None
    trained: bool = True
    """Of an assistant's message: False where its source shows it and does not want it trained."""
    reasoning_trained: bool = True
    """False where the reasoning is shown and not trained."""
    source: tuple[Part, ...] | None = None
    """The parts of MSAgent text that it was read from, blanks around them included; None for other formats."""

    @property
    def text(self) -> str:
        """The content, empty where there is none."""
        return self.content or ""

    @property
    def malformed_calls(self) -> tuple[Call, ...]:
        """The calls of an MSAgent step that cannot be read: they are in `source` alone."""
        return tuple(part for part in self.source or () if isinstance(part, Call) and part.failure is not None)

    @property
    def source_text(self) -> str:
        """The MSAgent text that it was read from, empty where there is none."""
        return "".join([part.source for part in self.source or ()])


class Turn(NamedTuple):
    """One turn of an MSAgent record."""

    role: Role
    text: str
    untrained: tuple[int, ...] = ()
    """Which of its steps, counted from 0, its source shows and does not want trained."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that can be trained on: the last message is the agent's or a tool's."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Json], ...]
    """The declarations as the record has them; empty for MSAgent records, whose list stands in the system text."""
    origin: Origin
    weight: float = 1.0
    """How often an epoch shows it, by the source it came from; see `agentft.data.entries`."""
    piece_of: str | None = None
    """Id of the conversation that this is a part of, where one too long was split; None: it is whole."""

    @property
    def is_msagent(self) -> bool:
        """Return whether it was read from MSAgent text, or written as such."""
        return any(message.source is not None for message in self.messages)

    @property
    def steps(self) -> tuple[int, ...]:
        """Positions of the assistant's messages."""
        return tuple(at for at, message in enumerate(self.messages) if message.role == "assistant")

    @property
    def system(self) -> str:
        """The leading system text, empty where there is none."""
        return self.messages[0].text if self.messages[0].role in ("system", "developer") else ""

    @property
    def rounds(self) -> int:
        """Number of user messages."""
        return sum(message.role == "user" for message in self.messages)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """All calls, in order."""
        return tuple(call for message in self.messages for call in message.tool_calls)

    @property
    def called_tools(self) -> frozenset[str]:
        """Names of the tools that are called."""
        return frozenset(call.name for call in self.tool_calls)

    @property
    def offered(self) -> tuple[OfferedTool, ...]:
        """The tools that are declared, or that an MSAgent system text lists."""
        return declared_tools(self.tools) if self.tools else read_offered_tools(self.system)

    def with_context_only(self, rounds: int) -> Iterator[tuple[Message, bool]]:
        """Yield the messages, each with whether it is context alone: of the first `rounds` rounds, or not to be trained."""
        begun = 0
        for message in self.messages:
            begun += message.role == "user"
            yield message, 0 < begun <= rounds or not message.trained

    @property
    def language(self) -> str:
        """`zh` where a user's message holds a Chinese character, else `en`."""
        return "zh" if any(m.role == "user" and _CJK.search(m.text) for m in self.messages) else "en"

    @property
    def user_hash(self) -> str:
        """SHA-256 of all user messages, white space collapsed."""
        turns = [" ".join(m.text.split()) for m in self.messages if m.role == "user"]
        return hashlib.sha256(f"[{', '.join(map(encode_basestring, turns))}]".encode()).hexdigest()

    @property
    def content_hash(self) -> str:
        """SHA-256 of all that is said and of what is not trained, whatever the id; an MSAgent record is hashed by its turns."""
        if self.is_msagent:
            turns = [
                json.dumps(turn, ensure_ascii=False)
                if turn.untrained
                else f'["{turn.role}",{encode_basestring(turn.text)}]'
                for turn in self.turns
            ]
            return hashlib.sha256(f"[{','.join(turns)}]".encode()).hexdigest()
        everything = {"messages": [message_fields(message) for message in self.messages], "tools": self.tools}
        return hashlib.sha256(json.dumps(everything, ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    @property
    def turns(self) -> list[Turn]:
        """The turns of an MSAgent record: the steps and results between two users are one."""
        turns: list[Turn] = []
        for is_agent, group in groupby(self.messages, lambda message: message.source is not None):
            if not is_agent:
                turns += [Turn(message.role, message.text) for message in group]
                continue
            members = list(group)
            text = "".join([part.source for message in members for part in message.source or ()])
            steps = [message.trained for message in members if message.role == "assistant"]
            untrained = () if all(steps) else tuple(at for at, trained in enumerate(steps) if not trained)
            turns.append(Turn("assistant", text, untrained))
        return turns


def chat_messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Return the messages as a server hands them to a chat template: arguments as objects, keys without value left out."""
    return [_chat_message(message) for message in messages]


def _chat_message(message: Message) -> dict[str, Any]:
    calls = [
        {
            **({} if call.id is None else {"id": call.id}),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in message.tool_calls
    ]
    fields = {
        "role": message.role,
        "content": message.content,
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    return {key: value for key, value in fields.items() if value is not None}


def message_fields(message: Message) -> dict[str, Any]:
    """Return what distinguishes a message without MSAgent text from others, by the names of the chat format."""
    flags = {"trained": message.trained, "reasoning_trained": message.reasoning_trained}
    return _chat_message(message) | {key: value for key, value in flags.items() if not value}
