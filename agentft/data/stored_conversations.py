"""Conversations on the disk: appended one by one, read back one by one, so that their number costs no memory.

A stored conversation is a line of JSON: its id, what it is a piece of, its origin, its weight and its turns, an assistant's
cut into parts. Requests and offered tools are read again from the text they stand in, by what read them the first time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from agentft.data.calls import CallFailure, read_call_body
from agentft.data.grammar import THINK_CLOSE, THINK_OPEN, Call, Observation, Part, Text
from agentft.data.offered_tools import read_offered_tools
from agentft.data.records import Conversation, Message, Origin

Rows = npt.NDArray[np.int64]

_LETTERS: dict[type, str] = {Text: "t", Call: "c", Observation: "o"}


def to_line(conversation: Conversation) -> bytes:
    """Write a conversation as one line of JSON."""
    turns = [
        [message.role, [[_LETTERS[type(part)], part.source] for part in message.parts], *_list_of(message.untrained)]
        if message.role == "assistant"
        else [message.role, message.source]
        for message in conversation.messages
    ]
    origin = conversation.origin
    record = [conversation.id, conversation.piece_of, origin.source, origin.line, conversation.weight, turns]
    return _ENCODER.encode(record).encode() + b"\n"


def from_line(line: bytes) -> Conversation:
    """Read what `to_line` wrote: an equal conversation."""
    name, piece_of, source, number, weight, turns = json.loads(line)
    messages = tuple(_message(*turn) for turn in turns)
    offered = read_offered_tools(messages[0].source) if messages[0].role == "system" else ()
    return Conversation(name, messages, Origin(source, number), offered, weight, piece_of)


def _list_of(untrained: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One more field of a turn, where there is something to say."""
    return [untrained] if untrained else []


def _message(role: Any, body: Any, untrained: Any = ()) -> Message:
    if role != "assistant":
        return Message(role, body)
    parts = tuple(_part(letter, source) for letter, source in body)
    return Message(role, "".join(part.source for part in parts), parts, tuple(untrained))


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
