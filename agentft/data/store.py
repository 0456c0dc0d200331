"""Keep conversations and tokenised examples on the disk: appended one by one, read one by one, whatever their number.

A stored conversation is a line of JSON: its id, what it is a piece of, its origin, its weight, its tools and its messages.
Of MSAgent text the parts are stored; their calls are read again by what read them the first time.

| file | holds |
|---|---|
| `ids.bin` | the ids of all examples end to end, 2 bytes each where the vocabulary allows it, else 4 |
| `spans.bin` | start, stop and kind of every trained run |
| `names.bin` | the ids that name the examples, UTF-8 |
| `examples.npy` | for each example where its part of those files begins, and its counts; one more row for the ends |
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from copy import copy
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from agentft.data.calls import CallFailure, ToolCall
from agentft.data.config import SpanWeights
from agentft.data.conversation import (
    THINK_CLOSE,
    THINK_OPEN,
    Call,
    Conversation,
    Message,
    Observation,
    Origin,
    Part,
    Text,
)
from agentft.data.msagent import read_call_body, result_message, step_message
from agentft.data.render import SpanKind
from agentft.data.tokens import Example, Span, weigh

Rows = npt.NDArray[np.int64]
T = TypeVar("T", covariant=True)

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
    """Return where the file of starts of a file of conversations lies."""
    return path.with_name(path.name + ".npy")


class _Stored(Sequence[T]):
    """Rows of files in an order in which a row may occur again; each is read when it is asked for."""

    _rows: Rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> T | Self:
        return self.chosen(self._rows[index]) if isinstance(index, slice) else self._read(int(self._rows[index]))

    def chosen(self, rows: Rows) -> Self:
        """Return other rows of the same files."""
        other = copy(self)
        other._rows = rows
        return other

    def _read(self, row: int) -> T:
        raise NotImplementedError


class StoredConversations(_Stored[Conversation]):
    """The conversations of a file."""

    def __init__(self, path: Path, rows: Rows | None = None) -> None:
        """Open `path`, which `ConversationWriter` wrote; `rows`: which of it in which order, default all."""
        self._starts: Rows = np.load(index_of(path))
        self._file = path.open("rb")  # and not mapped: pages read here and there would stay and count as memory
        self._rows = np.arange(len(self._starts) - 1) if rows is None else rows

    def line(self, index: int) -> bytes:
        """Return a conversation as it is stored."""
        return self._line(int(self._rows[index]))

    def _read(self, row: int) -> Conversation:
        return from_line(self._line(row))

    def _line(self, row: int) -> bytes:
        start, stop = self._starts[row : row + 2].tolist()
        return os.pread(self._file.fileno(), stop - start, start)


_COLUMNS = ("token", "span", "name", "context_rounds", "trained", "steps")
_SPAN_NUMBERS = 3


class PackedExample(NamedTuple):
    """An example as it is written: small, and quick to hand from one process to another."""

    name: bytes
    ids: bytes
    spans: bytes
    context_rounds: int
    trained_tokens: int
    steps: int
    digest: bytes
    """SHA-256 of all that is written of it."""


def stored_id_type(largest_id: int) -> type[np.uint16 | np.uint32]:
    """Return in which type ids are stored, of a vocabulary whose greatest id is `largest_id`."""
    return np.uint16 if largest_id < 2**16 else np.uint32


def pack(example: Example, id_type: type[np.uint16 | np.uint32]) -> PackedExample:
    """Lay an example out as it is written. Its span weights are a setting and not written."""
    numbers = [number for span in example.spans for number in span]
    name, ids, spans = example.id.encode(), example.input_ids.astype(id_type).tobytes(), array("i", numbers).tobytes()
    header = f"{len(name)} {len(ids)} {example.context_rounds} ".encode()
    digest = sha256(b"".join((header, name, ids, spans))).digest()
    steps = len(example.steps())
    return PackedExample(name, ids, spans, example.context_rounds, example.trained_tokens, steps, digest)


class ExampleWriter:
    """Appends examples to the files of a folder."""

    def __init__(self, folder: Path, id_type: type[np.uint16 | np.uint32]) -> None:
        """Begin the files; `id_type` as `pack` was given it."""
        self._folder = folder
        self._id_type = np.dtype(id_type)
        self._ids, self._spans, self._names = ((folder / f"{n}.bin").open("wb") for n in ("ids", "spans", "names"))
        self._table = array("q")
        self._token = self._span = self._name = 0
        self.digests: list[bytes] = []
        """Of each example."""

    def append(self, example: PackedExample) -> int:
        """Write an example and return its row."""
        counts = example.context_rounds, example.trained_tokens, example.steps
        self._table.extend((self._token, self._span, self._name, *counts))
        self._ids.write(example.ids)
        self._spans.write(example.spans)
        self._names.write(example.name)
        self._token += len(example.ids) // self._id_type.itemsize
        self._span += len(example.spans) // (_SPAN_NUMBERS * array("i").itemsize)
        self._name += len(example.name)
        self.digests.append(example.digest)
        return len(self.digests) - 1

    def close(self) -> None:
        """Finish the files."""
        for file in (self._ids, self._spans, self._names):
            file.close()
        self._table.extend((self._token, self._span, self._name, 0, 0, self._id_type.itemsize))
        np.save(self._folder / "examples.npy", np.asarray(self._table, dtype=np.int64).reshape(-1, len(_COLUMNS)))


class StoredExamples(_Stored[Example]):
    """The examples of a folder."""

    def __init__(self, folder: Path) -> None:
        """Open what `ExampleWriter` wrote, in the order in which it was."""
        table: npt.NDArray[np.int64] = np.load(folder / "examples.npy")
        self._table = table
        self._ids = _mapped(folder / "ids.bin", np.dtype(f"u{table[-1, -1]}"))
        self._spans = _mapped(folder / "spans.bin", np.dtype(np.int32)).reshape(-1, _SPAN_NUMBERS)
        self._names = _mapped(folder / "names.bin", np.dtype(np.uint8))
        self._rows = np.arange(len(table) - 1)
        self._weights: SpanWeights | None = None

    def weighed(self, weights: SpanWeights) -> StoredExamples:
        """Return the same examples with their spans weighed."""
        other = copy(self)
        other._weights = weights
        return other

    def _read(self, row: int) -> Example:
        token, span, name, context_rounds, _, _ = self._table[row].tolist()
        token_end, span_end, name_end = self._table[row + 1, :3].tolist()
        example = Example(
            id=self._names[name:name_end].tobytes().decode(),
            input_ids=self._ids[token:token_end].astype(np.int32),
            spans=tuple(Span(start, stop, _KINDS[kind]) for start, stop, kind in self._spans[span:span_end].tolist()),
            context_rounds=context_rounds,
        )
        return example if self._weights is None else weigh(example, self._weights)

    @property
    def ids(self) -> list[str]:
        """Names of the examples, in order."""
        names = self._names.tobytes()
        starts, stops = self._table[self._rows, 2].tolist(), self._table[self._rows + 1, 2].tolist()
        return [names[start:stop].decode() for start, stop in zip(starts, stops, strict=True)]

    @property
    def lengths(self) -> Rows:
        """Tokens of each example, in order."""
        lengths: Rows = np.diff(self._table[:, 0])[self._rows]
        return lengths

    @property
    def trained_tokens(self) -> int:
        """Labelled tokens of all examples."""
        return int(self._table[self._rows, 4].sum())

    @property
    def steps(self) -> int:
        """Return how often the agent speaks in all examples."""
        return int(self._table[self._rows, 5].sum())


_KINDS = {int(kind): kind for kind in SpanKind}


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the numbers of a file, read when they are touched; an empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
