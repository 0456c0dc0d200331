"""Keep prepared data on the disk and read it from there: conversations, and tokenised examples.

A stored conversation is a line of JSON. Of MSAgent text the parts are stored, and their calls are read again.

Each part of a dataset has a folder:

| file | holds |
|---|---|
| `examples.bin` | name, ids and spans of each example |
| `conversations.jsonl` | the conversation that each example renders, where it is kept |
| `*.npy` beside them | where each record begins, and the end of the last |
| `counts.npy` | tokens, labelled tokens and steps of each example |
| `order.npy` | the examples by number in the order of the part; one that is shown more than once occurs again |
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from agentft.data.calls import Call, ToolCall
from agentft.data.config import SMALL_EXAM, DatasetConfig, SpanWeights
from agentft.data.conversation import Conversation, Message, Observation, Origin, Part, Text, message_fields
from agentft.data.msagent import read_marked_call, result_message, step_message
from agentft.data.render import SpanKind
from agentft.data.sources import PreparationStats
from agentft.data.tokens import Example, Span, weigh
from agentft.data.truncation import TruncationKind
from agentft.runs import RunFolder

EXAMPLES, CONVERSATIONS = "examples.bin", "conversations.jsonl"

Rows = npt.NDArray[np.int64]
T = TypeVar("T", covariant=True)

log = logging.getLogger(__name__)

# --- Conversations ---

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
    return [message.role, message_fields(message)]


def _read(role: Any, body: Any, trained: bool = True) -> Message:
    if isinstance(body, dict):
        calls = tuple(ToolCall(**call["function"], id=call.get("id")) for call in body.pop("tool_calls", ()))
        return Message(**body, tool_calls=calls)
    parts = tuple(_part(letter, source) for letter, source in body)
    if role == "assistant":
        return step_message(parts, trained=trained)
    observation, *blanks = parts
    assert isinstance(observation, Observation)
    return result_message(observation, *blanks)


def _part(letter: str, source: str) -> Part:
    if letter == "t":
        return Text(source)
    return Observation(source) if letter == "o" else read_marked_call(source)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

# --- Records in files ---


class RecordWriter:
    """Appends records to `<path>`; `close` writes beside it, as `<path>.npy`, where each begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._starts = array("q", [0])

    def append(self, record: bytes) -> None:
        """Write a record."""
        self._starts.append(self._starts[-1] + self._file.write(record))

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        np.save(_index_of(self._path), np.asarray(self._starts, dtype=np.int64))


def _index_of(path: Path) -> Path:
    return path.with_name(path.name + ".npy")


class _Stored(Sequence[T]):
    """Records of a file in an order in which one may occur again; each is read when it is asked for."""

    def __init__(self, path: Path, rows: Rows | None = None) -> None:
        """Open what `RecordWriter` wrote; `rows`: which records in which order, default all."""
        self._starts: Rows = np.load(_index_of(path))
        self._file = path.open("rb")  # and not mapped: pages read here and there would stay and count as memory
        self._rows = np.arange(len(self._starts) - 1) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> T | Self:
        if isinstance(index, slice):
            return self.chosen(self._rows[index])
        return self._read(int(self._rows[index]))

    def chosen(self, rows: Rows) -> Self:
        """Return other records of the same file."""
        other = copy(self)
        other._rows = rows
        return other

    def record(self, row: int) -> bytes:
        """Return a record as it was written."""
        start, stop = self._starts[row : row + 2].tolist()
        return os.pread(self._file.fileno(), stop - start, start)

    def _read(self, row: int) -> T:
        raise NotImplementedError


class StoredConversations(_Stored[Conversation]):
    """The conversations of a file of lines that `to_line` made."""

    def _read(self, row: int) -> Conversation:
        return from_line(self.record(row))


# --- Examples ---


class PackedExample(NamedTuple):
    """An example as it is written: small, and quick to hand from one process to another."""

    record: bytes
    """Its name, ids and spans, and how many rounds are context; the ids take 2 bytes where the vocabulary allows it, else 4."""
    counts: tuple[int, int, int]
    """Tokens, labelled tokens and steps."""
    conversation: bytes
    """The conversation that it renders, as `to_line` writes it; empty where it is not kept."""


def pack(example: Example, largest_id: int, rendered: Conversation | None = None) -> PackedExample:
    """Lay an example out as it is written, without span weights; `largest_id`: of its vocabulary."""
    numbers = [number for span in example.spans for number in span]
    ids = example.input_ids.astype(np.uint16 if largest_id < 2**16 else np.uint32).tobytes()
    name = example.id.encode()
    header = f"{len(name)} {len(ids)} {example.context_rounds} ".encode()
    record = b"".join((header, name, ids, array("i", numbers).tobytes()))
    counts = len(example), example.trained_tokens, len(example.steps())
    return PackedExample(record, counts, b"" if rendered is None else to_line(rendered))


class ExampleWriter:
    """Appends examples, and the conversations that they render, to the files of a new folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._examples, self._conversations = RecordWriter(folder / EXAMPLES), RecordWriter(folder / CONVERSATIONS)
        self._counts = array("q")
        self.digests: list[bytes] = []
        """SHA-256 of each record."""

    def append(self, example: PackedExample) -> None:
        """Write an example."""
        self._examples.append(example.record)
        self._conversations.append(example.conversation)
        self._counts.extend(example.counts)
        self.digests.append(sha256(example.record).digest())

    def close(self, order: Sequence[int]) -> None:
        """Finish the files; `order`: the examples by number, counted from 0, as they are to be read."""
        self._examples.close()
        self._conversations.close()
        np.save(self._folder / "counts.npy", np.asarray(self._counts, dtype=np.int64).reshape(-1, 3))
        np.save(self._folder / "order.npy", np.asarray(order, dtype=np.int64))


class StoredExamples(_Stored[Example]):
    """The examples of a folder."""

    def __init__(self, folder: Path) -> None:
        """Open what `ExampleWriter` wrote, in the order that it was given."""
        super().__init__(folder / EXAMPLES, np.load(folder / "order.npy"))
        self._counts: Rows = np.load(folder / "counts.npy")
        self._weights: SpanWeights | None = None

    def weighed(self, weights: SpanWeights) -> StoredExamples:
        """Return the same examples with their spans weighed."""
        other = copy(self)
        other._weights = weights
        return other

    def conversations(self) -> StoredConversations:
        """Return the conversations that the examples render, in the same order."""
        return StoredConversations(Path(self._file.name).with_name(CONVERSATIONS), self._rows)

    def _read(self, row: int) -> Example:
        name_bytes, ids_bytes, context_rounds, rest = self.record(row).split(b" ", 3)
        ids, spans = int(name_bytes), int(name_bytes) + int(ids_bytes)
        width = int(ids_bytes) // max(int(self._counts[row, 0]), 1)
        numbers = np.frombuffer(rest[spans:], dtype=np.int32).reshape(-1, 3).tolist()
        example = Example(
            id=rest[:ids].decode(),
            input_ids=np.frombuffer(rest[ids:spans], dtype=f"u{width or 2}").astype(np.int32),
            spans=tuple(Span(start, stop, SpanKind(kind)) for start, stop, kind in numbers),
            context_rounds=int(context_rounds),
        )
        return example if self._weights is None else weigh(example, self._weights)

    @property
    def ids(self) -> list[str]:
        """Names of the examples, in order."""
        heads = (self.record(row).split(b" ", 3) for row in self._rows.tolist())
        return [rest[: int(name_bytes)].decode() for name_bytes, _, _, rest in heads]

    @property
    def lengths(self) -> Rows:
        """Tokens of each example, in order."""
        lengths: Rows = self._counts[self._rows, 0]
        return lengths

    @property
    def trained_tokens(self) -> int:
        """Labelled tokens of all examples."""
        return int(self._counts[self._rows, 1].sum())

    @property
    def steps(self) -> int:
        """How often the agent speaks in all examples."""
        return int(self._counts[self._rows, 2].sum())


# --- Prepared data ---


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What a run trains on and what it is measured by."""

    train: StoredExamples
    heldout: StoredConversations
    heldout_examples: StoredExamples
    train_tools: frozenset[str]
    """Names of the tools that training conversations call."""
    fingerprint: str
    """Digest of the training ids, labels and weights in their order, and of the held-out ones."""
    heldout_content_hashes: list[str]
    rewritten_history: dict[str, int]
    """What it costs that a chat template rewrites history, as `rewritten_history` counts it: names are read once for it."""
    stats: PreparationStats


def write_about(
    folder: Path, stats: PreparationStats, fingerprint: str, train_tools: Iterable[str], content_hashes: list[str]
) -> None:
    """Write what `PreparedData` holds beside the examples."""
    about = {"fingerprint": fingerprint, "train_tools": sorted(train_tools), "heldout_content_hashes": content_hashes}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "stats.json").write_text(stats.to_json(), encoding="utf-8")


def open_prepared(folder: Path, config: DatasetConfig) -> PreparedData:
    """Open the files of a prepared dataset; they may lose their names afterwards."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    stats = PreparationStats.from_json((folder / "stats.json").read_text(encoding="utf-8"))
    train, heldout = StoredExamples(folder / "train"), StoredExamples(folder / "heldout")
    return PreparedData(
        train=train.weighed(config.span_weights),
        heldout=heldout.conversations(),
        heldout_examples=heldout,
        train_tools=frozenset(about["train_tools"]),
        fingerprint=about["fingerprint"],
        heldout_content_hashes=about["heldout_content_hashes"],
        rewritten_history=rewritten_history(train, stats),
        stats=stats,
    )


def rewritten_history(train: StoredExamples, stats: PreparationStats) -> dict[str, int]:
    """Count the conversations that a chat template renders several times, and the tokens of all and of the longest."""
    fitted = {name for change in stats.changed for name in change["examples"]}
    lengths = dict(zip(train.ids, train.lengths.tolist(), strict=True))
    by_whole: dict[str, list[int]] = {}
    for name, tokens in lengths.items():
        whole, part, _ = name.rpartition("/part-")
        if part and name not in fitted:
            by_whole.setdefault(whole, []).append(tokens)
    return {
        "conversations": len(by_whole),
        "examples": sum(map(len, by_whole.values())),
        "tokens": sum(map(sum, by_whole.values())),
        "tokens_of_the_longest": sum(map(max, by_whole.values())),
    }


def small_exam(conversations: int) -> str:
    """Return a warning where so few conversations are held out that scores say little, else an empty text."""
    if conversations >= SMALL_EXAM:
        return ""
    if not conversations:
        return "no conversation is held out, nothing can be measured"
    return (
        f"an exam of {conversations} conversations is small: differences between models may be chance, whatever the "
        f"intervals say; hold out at least {SMALL_EXAM} (dataset.test_ratio, dataset.test_path)"
    )


def log_summary(prepared: PreparedData, seconds: float) -> None:
    """Log what was prepared, what was set aside and what it costs."""
    stats, files = prepared.stats, prepared.stats.files
    tokens = int(prepared.train.lengths.sum())
    log.info(
        "data: %d rows%s%s -> %d training and %d held-out conversations; %s tokens, %.0f %% of them labelled (%.1f s)",
        stats.rows,
        f" of {files[0]}" if files else "",
        f" and {len(files) - 1} more files" if len(files) > 1 else "",
        stats.used("train"),
        stats.used("heldout"),
        f"{tokens:,}",
        100 * prepared.train.trained_tokens / tokens,
        seconds,
    )
    if words := small_exam(stats.used("heldout")):
        log.warning("data: %s", words)
    if stats.rejections:
        log.warning("data: %d rows set aside: %s", len(stats.rejections), stats.reasons())
    for part, outcomes in stats.fitted.items():
        if set(outcomes) - {str(TruncationKind.whole)}:
            steps = sum(len(change["steps_left_out"]) for change in stats.changed if change["part"] == part)
            log.warning("data: fitting to dataset.max_length, %s: %s; %d steps left out", part, dict(outcomes), steps)
    if (cost := prepared.rewritten_history)["conversations"]:
        once = tokens - cost["tokens"] + cost["tokens_of_the_longest"]
        log.log(
            logging.WARNING if tokens > 1.5 * once else logging.INFO,
            "data: the chat template rewrites history, so %d conversations are %d examples: %.1f x the tokens of one "
            "rendering of each; bounded by model.rewritten_history=stable or dataset.reasoning=drop",
            cost["conversations"],
            cost["examples"],
            tokens / once,
        )
    for words, counts in (
        ("written otherwise by model.template", stats.layout),
        ("in neither part", stats.left_out),
        ("kept, and noted", stats.notices),
    ):
        if counts:
            log.info("data: %s: %s", words, dict(counts.most_common()))


def write_manifest(prepared: PreparedData, run: RunFolder) -> None:
    """Write what the run trains on and is measured by, and every row that was set aside, into the run folder."""
    stats = prepared.stats
    run.write_json(
        run.data_manifest,
        {
            "fingerprint": prepared.fingerprint,
            "rows": stats.rows,
            "files": stats.files,
            "sources": [{"source": name} | counts for name, counts in stats.sources.items()],
            "skipped_files": stats.skipped_files,
            "blank_lines": stats.blank_lines,
            "set_aside": stats.reasons(),
            "in_neither_part": dict(stats.left_out),
            "notices": dict(stats.notices),
            "layout": dict(stats.layout),
            "rewritten_history": prepared.rewritten_history,
            "fitting": {"outcomes": stats.fitted, "changed": stats.changed},
            "train": {
                "examples": len(prepared.train),
                "conversations": stats.used("train"),
                "tokens": int(prepared.train.lengths.sum()),
                "labelled_tokens": prepared.train.trained_tokens,
                "steps": prepared.train.steps,
                "tools_called": len(prepared.train_tools),
                "ids": prepared.train.ids,
            },
            "heldout": {
                "examples": len(prepared.heldout),
                "conversations": stats.used("heldout"),
                "may_be_trained_on_when_the_data_grows": stats.joined,
                "steps": prepared.heldout_examples.steps,
                "ids": prepared.heldout_examples.ids,
                "content_hashes": prepared.heldout_content_hashes,
            },
        },
    )
    run.write_text(run.rejected_file, stats.rejected_lines())
