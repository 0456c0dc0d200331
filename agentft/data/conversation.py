"""The conversation as a value: messages with the fields of the OpenAI chat format, and the user's own tool declarations.

Readers make it once, from whatever layout a record has; rendering, truncation, splits, evaluation and audit only look at it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, Literal

from agentft.data.calls import CallFailure, Json
from agentft.data.grammar import Part

Role = Literal["system", "developer", "user", "assistant", "tool"]

_CJK = re.compile("[㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f]")


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
class ToolCall:
    """One call of one tool."""

    name: str
    arguments: dict[str, Json]
    id: str | None = None
    failure: CallFailure | None = None
    """Why it cannot be read. Such a call has no name and no arguments; its text stands in `Message.source`."""


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
    source: tuple[Part, ...] | None = None
    """The parts of MSAgent text that it was read from, blanks around them included; None for other formats."""

    @property
    def text(self) -> str:
        """The content, empty where there is none."""
        return self.content or ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that can be trained on: the last message is the agent's or a tool's."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Json], ...]
    """The declarations as the record has them; empty for MSAgent records, whose list stands in the system text."""
    origin: Origin
    weight: float = 1.0
    """How often an epoch shows it, by the source it came from; see `agentft.data.source_weights`."""
    piece_of: str | None = None
    """Id of the conversation that this is a part of, where one too long was split; None: it is whole."""

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
        """SHA-256 of all that is said and of what is not trained; equal for equal conversations, whatever their ids.

        An MSAgent record is hashed by its own turns, so its hash does not depend on how it is taken apart.
        """
        if any(message.source is not None for message in self.messages):
            turns = ",".join(self._msagent_turns())
            return hashlib.sha256(f"[{turns}]".encode()).hexdigest()
        said = {"messages": [_hashed(message) for message in self.messages], "tools": self.tools}
        return hashlib.sha256(json.dumps(said, ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    def _msagent_turns(self) -> Iterator[str]:
        """Yield each turn of the record as JSON: role, text, and which steps of it are not trained."""
        text, step = "", 0
        untrained: list[int] = []
        for at, message in enumerate(self.messages):
            if message.source is None:
                yield f'["{message.role}",{encode_basestring(message.text)}]'
                continue
            text += "".join([part.source for part in message.source])
            if message.role == "assistant":
                if not message.trained:
                    untrained.append(step)
                step += 1
            if at + 1 == len(self.messages) or self.messages[at + 1].source is None:
                turn = ["assistant", text, untrained] if untrained else ["assistant", text]
                yield json.dumps(turn, ensure_ascii=False, separators=(", ", ": ") if untrained else (",", ":"))
                text, step, untrained = "", 0, []


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


def _hashed(message: Message) -> dict[str, Any]:
    said = _chat_message(message)
    return said if message.trained else {**said, "trained": False}
