"""Conversations on the disk: appended one by one, read back one by one, so that their number costs no memory.

A stored conversation is a line of JSON: its id, what it is a piece of, its origin, its weight, its tools and its messages.
Of MSAgent text the parts are stored; their calls are read again by what read them the first time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from agentft.data.calls import CallFailure, ToolCall, read_call_body
from agentft.data.conversation import Conversation, Message, Origin
from agentft.data.grammar import THINK_CLOSE, THINK_OPEN, Call, Observation, Part, Text
from agentft.data.msagent import result_message, step_message

Rows = npt.NDArray[np.int64]

_LETTERS: dict[type, str] = {Text: "t", Call: "c", Observation: "o"}


def to_line(conversation: Conversation) -> bytes:
    """Write a conversation as one line of JSON."""
    origin = conversation.origin
    messages = [_stored(message) for message in conversation.messages]
    head = [conversation.id, conversation.piece_of, origin.source, origin.line, conversation.weight, conversation.tools]
    return _ENCODER.encode([*head, messages]).encode() + b"\n"


def from_line(line: bytes) -> Conversation:
    """Read what `to_line` wrote: an equal conversation."""
    name, piece_of, source, number, weight, tools, messages = json.loads(line)
    read = tuple(_read(*message) for message in messages)
    return Conversation(name, read, tuple(tools), Origin(source, number), weight, piece_of)


def _stored(message: Message) -> list[Any]:
    """Return the role and, for MSAgent text, its parts; else the fields that have a value."""
    if message.source is not None:
        parts = [[_LETTERS[type(part)], part.source] for part in message.source]
        return [message.role, parts] if message.trained else [message.role, parts, False]
    fields = {
        "content": message.content,
        "reasoning_content": message.reasoning_content,
        "tool_calls": [[call.name, call.arguments, call.id] for call in message.tool_calls] or None,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "trained": None if message.trained else False,
        "reasoning_trained": None if message.reasoning_trained else False,
    }
    return [message.role, {key: value for key, value in fields.items() if value is not None}]


def _read(role: Any, body: Any, trained: bool = True) -> Message:
    if isinstance(body, dict):
        calls = tuple(ToolCall(*call) for call in body.pop("tool_calls", ()))
        return Message(role, tool_calls=calls, **body)
    parts = tuple(_part(letter, source) for letter, source in body)
    if role == "assistant":
        return step_message(parts, trained=trained)
    observation, *blanks = parts
    assert isinstance(observation, Observation)
    return result_message(observation, *blanks)


def _part(letter: str, source: str) -> Part:
    if letter == "t":
        return Text(source)
    if letter == "o":
        return Observation(source)
    reading = read_call_body(source[len(THINK_OPEN) : -len(THINK_CLOSE)])
    return Call(source, (), reading) if isinstance(reading, CallFailure) else Call(source, reading, None)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class ConversationWriter:
    """Appends conversations to `<path>`; `close` writes beside it, as `<path>.npy`, where each begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._starts = [0]

    def append(self, line: bytes) -> int:
        """Write a conversation, as `to_line` makes it, and return its row."""
        self._starts.append(self._starts[-1] + self._file.write(line))
        return len(self._starts) - 2

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        np.save(index_of(self._path), np.asarray(self._starts, dtype=np.int64))


def index_of(path: Path) -> Path:
    """Where the file of starts of a file of conversations lies."""
    return path.with_name(path.name + ".npy")


class StoredConversations(Sequence[Conversation]):
    """The conversations of a file, in the order of `rows`; each is read when it is asked for."""

    def __init__(self, path: Path, rows: Rows | None = None) -> None:
        """Open `path`, which `ConversationWriter` wrote; `rows`: which of it in which order, default all."""
        self._starts: Rows = np.load(index_of(path))
        self._file = path.open("rb")  # and not mapped: pages read here and there would stay and count as memory
        self._rows = np.arange(len(self._starts) - 1) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> StoredConversations: ...

    def __getitem__(self, index: int | slice) -> Conversation | StoredConversations:
        if isinstance(index, slice):
            return self.chosen(self._rows[index])
        return from_line(self.line(index))

    def line(self, index: int) -> bytes:
        """A conversation as it is stored."""
        row = self._rows[index]
        start, stop = self._starts[row : row + 2].tolist()
        return os.pread(self._file.fileno(), stop - start, start)

    def __iter__(self) -> Iterator[Conversation]:
        for index in range(len(self)):
            yield self[index]

    def chosen(self, rows: Rows) -> StoredConversations:
        """Other rows of the same file."""
        other = object.__new__(StoredConversations)
        other._starts, other._file, other._rows = self._starts, self._file, rows
        return other
