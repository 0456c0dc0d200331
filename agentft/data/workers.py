"""Turn batches of rows into conversations and examples, on all cores, with results in order.

Python's part of the work holds the interpreter's lock, so only processes share it out. They are the workers of a `DataLoader`,
forked late and from a quiet process: they find the tokenizers loaded, cost no import, and a short preparation, which would not
repay them, has none.

The work keeps no state between batches and asks for none, so batches can be worked on anywhere and in any order. What needs
their order, ids and duplicates and counts, is done with the results.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from traceback import format_exc
from typing import Any, Generic, NamedTuple, TypeVar

from agentft.data.config import DatasetConfig, Format, TooLong
from agentft.data.conversation import Conversation
from agentft.data.records import ParseWarning, Rejection, read_record
from agentft.data.sources import RawRow, identity
from agentft.data.splits import is_held_out, showing_keys
from agentft.data.store import PackedExample, from_line, pack, stored_id_type, to_line
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder
from agentft.data.truncation import TruncationKind, TruncationResult, Truncator
from agentft.errors import DataError
from agentft.signals import STOPS, die_with

B = TypeVar("B")
R = TypeVar("R")

MOST_PROCESSES = 8
"""Beyond so many, the one that reads the files and writes the results has enough to do."""

_BATCHES_AHEAD = 3
"""Batches a process."""

log = logging.getLogger(__name__)


def process_count(asked: int) -> int:
    """Return how many processes to use where `asked` for, 0 meaning as many as make sense here."""
    if sys.platform != "linux":  # elsewhere a fork is not safe, or there is none
        if asked > 1:
            log.warning("dataset.workers=%d: processes are forked on Linux only, here one prepares the data", asked)
        return 1
    return asked or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def in_order(
    work: Callable[[B], R], batches: Iterable[B], *, processes: int, ready: Callable[[], bool]
) -> Iterator[tuple[B, R]]:
    """Yield each batch with its result.

    Args:
        processes: At most; 1: only this one.
        ready: Asked between two batches until it is true: loads what much work needs, so that forked processes share it.

    Raises:
        DataError: a process was killed. What `work` raises is raised here.
    """
    batches, is_ready = iter(batches), False
    for number, batch in enumerate(batches):
        is_ready = is_ready or (number > 0 and ready())
        if is_ready and processes > 1:
            yield from _in_processes(work, chain([batch], batches), processes)
        else:
            yield batch, work(batch)


def _in_processes(work: Callable[[B], R], batches: Iterator[B], processes: int) -> Iterator[tuple[B, R]]:
    import torch
    from torch.utils.data import DataLoader

    sent: deque[B] = deque()

    def noted() -> Iterator[B]:
        for batch in batches:
            sent.append(batch)
            yield batch

    loader: DataLoader[Any] = DataLoader(
        _Work(work),  # type: ignore[arg-type]  # it is asked for batches in place of indices
        sampler=noted(),
        batch_size=None,
        num_workers=processes,
        prefetch_factor=_BATCHES_AHEAD,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_begin, os.getpid()),
        multiprocessing_context="fork",
        generator=torch.Generator(),  # else it would draw from the one that the training draws from
    )
    before = set(active_children())
    try:
        with killed_worker_in_words():
            for result in loader:
                if isinstance(result, _Raised):
                    raise result.error
                yield sent.popleft(), result
    finally:
        _end(set(active_children()) - before)


def _end(processes: set[BaseProcess]) -> None:
    """End workers whose loader an error keeps alive: it would wait at the exit for processes that ignore its SIGTERM."""
    for _ in range(2):
        with suppress(RuntimeError):  # the loader takes the first of these ends for an accident
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def killed_worker_in_words() -> Iterator[None]:
    """Say what it means that a worker was killed. The news comes as a signal, wherever this process is at the moment."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a process that prepares data was killed, by want of memory perhaps; dataset.workers=1 needs the least"
        ) from error


@dataclass(frozen=True, slots=True)
class _Raised:
    error: Exception


@dataclass(frozen=True, slots=True)
class _Work(Generic[B, R]):
    """Work as a dataset whose indices are batches. A `DataLoader` would raise an error anew, with other words in it."""

    work: Callable[[B], R]

    def __getitem__(self, batch: B) -> R | _Raised:
        try:
            return self.work(batch)
        except Exception as error:
            error.add_note(f"in a process that prepares data:\n{format_exc()}")
            return _Raised(error)


def _as_it_is(result: R) -> R:
    return result


def _begin(parent: int, _: int) -> None:
    # Sent to all processes of a job they ask the parent to end its work, and so its workers'; its handlers are for it alone.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    gc.freeze()  # a collection would touch, and so copy, every page that is shared with the parent
    die_with(parent)


CONVERSATIONS_A_BATCH = 64
_CHARACTERS_A_BATCH = 250_000


class Made(NamedTuple):
    """What became of a conversation that a part wants."""

    outcome: TruncationKind
    examples: tuple[PackedExample, ...]
    pieces: tuple[bytes, ...]
    """Where they are wanted: the conversations that the examples render, as they are stored."""
    content_hashes: tuple[str, ...]
    """Of those."""
    notes: tuple[str, ...]
    tools: frozenset[str]
    change: dict[str, Any] | None
    """What of it is not used."""
    rejection: Rejection | None


class Understood(NamedTuple):
    """A row that was read as a conversation."""

    name: str
    identity: int
    notices: Sequence[ParseWarning]
    weight: float
    content: bytes
    """SHA-256 of all its text."""
    user: bytes
    """SHA-256 of its user turns."""
    tools: tuple[str, ...]
    """Names of the tools it calls, sorted."""
    line: bytes | None
    """The conversation as it is stored, where it waits to be wanted."""
    part: str | None
    """The part it is made for; None where it waits, and where its source's weight leaves it out."""
    made: Made | None = None


@dataclass(frozen=True, slots=True)
class RowsToRead:
    """A batch of one source."""

    rows: Sequence[RawRow | Rejection]
    form: Format
    part: str | None
    """The part that the source is for; None: what a conversation says decides."""
    waiting: bool
    """Only read: conversations are stored, since which of them are wanted shows later."""
    name: str | None = None
    """Of the one conversation, in place of its own."""


@dataclass(frozen=True, slots=True)
class LinesToMake:
    """Stored conversations that a part wants."""

    lines: Sequence[bytes]
    part: str


@dataclass(frozen=True, slots=True)
class RowWork:
    """The work, with all that decides its results."""

    config: DatasetConfig
    template: Layout
    encoder: SegmentEncoder
    keeps_pieces: bool = False
    """Store the conversations that training examples render, too."""

    def read(self, batch: RowsToRead) -> list[Understood | Rejection]:
        """Read rows, and make what is wanted of them."""
        results: list[Understood | Rejection] = []
        wanted: list[tuple[Conversation, str]] = []
        for row in batch.rows:
            outcome = row if isinstance(row, Rejection) else self._read_row(row, batch.form)
            if isinstance(outcome, Rejection):
                results.append(outcome)
                continue
            conversation, notices = outcome
            if batch.name is not None:
                conversation = replace(conversation, id=batch.name)
            understood = self._understood(conversation, notices, batch)
            results.append(understood)
            if understood.part is not None:
                wanted.append((conversation, understood.part))
        made = iter(self._make(wanted))
        return [
            each if isinstance(each, Rejection) or each.part is None else each._replace(made=next(made))
            for each in results
        ]

    def make(self, batch: LinesToMake) -> list[Made]:
        """Make what is wanted of stored conversations."""
        return list(self._make([(from_line(line), batch.part) for line in batch.lines]))

    def _read_row(self, row: RawRow, form: Format) -> tuple[Conversation, list[ParseWarning]] | Rejection:
        return read_record(row.value, row.origin, form=form, weight=row.weight, reasoning=self.config.reasoning)

    def _understood(self, conversation: Conversation, notices: list[ParseWarning], batch: RowsToRead) -> Understood:
        content_hash, user_hash = conversation.content_hash, conversation.user_hash
        return Understood(
            conversation.id,
            identity(content_hash),
            notices,
            conversation.weight,
            bytes.fromhex(content_hash),
            bytes.fromhex(user_hash),
            tuple(sorted(conversation.called_tools)),
            to_line(conversation) if batch.waiting else None,
            None if batch.waiting else self._part(batch.part, conversation.weight, content_hash, user_hash),
        )

    def _part(self, part: str | None, weight: float, content_hash: str, user_hash: str) -> str | None:
        """Return the part that a conversation belongs to; None where no epoch shows it."""
        seed = self.config.seed
        part = part or ("heldout" if is_held_out(user_hash, seed, self.config.test_ratio) else "train")
        return None if part == "train" and weight < 1 and not showing_keys(content_hash, weight, seed) else part

    def _make(self, wanted: Sequence[tuple[Conversation, str]]) -> Iterator[Made]:
        fitter = Truncator(self.template, self.encoder, self.config.max_length)
        parts = (
            (_to_ask(each) if part == "heldout" else each, policy_of(part, self.config.too_long))
            for each, part in wanted
        )
        fitted = fitter.fit(list(parts))
        id_type = stored_id_type(self.encoder.largest_id)
        for each, (_, part) in zip(fitted, wanted, strict=True):
            shown = each.pieces if part == "heldout" or self.keeps_pieces else ()
            yield Made(
                each.outcome,
                tuple([pack(piece.example, id_type) for piece in each.pieces]),
                tuple([to_line(piece.conversation) for piece in shown]),
                tuple([piece.conversation.content_hash for piece in shown]),
                each.notes if each.problem is None else (),
                frozenset().union(*(piece.conversation.called_tools for piece in each.pieces)),
                None if each.outcome is TruncationKind.whole else _change(each, part),
                each.problem and Rejection(each.original.origin, *each.problem, id=each.original.id),
            )


def policy_of(part: str, too_long: TooLong) -> TooLong:
    """Return what a part does with long conversations.

    A round that training would leave out is still asked in the evaluation: held-out conversations are split unless dropped.
    """
    return too_long if part == "train" or too_long is TooLong.drop else TooLong.split


def _to_ask(conversation: Conversation) -> Conversation:
    """Return a held-out conversation whose reasoning is part of what is asked: no prompt may show the thought of its step."""
    if all(message.reasoning_trained for message in conversation.messages):
        return conversation
    messages = tuple(replace(message, reasoning_trained=True) for message in conversation.messages)
    return replace(conversation, messages=messages)


def _change(fitted: TruncationResult, part: str) -> dict[str, Any]:
    return {
        "id": fitted.original.id,
        "part": part,
        "outcome": str(fitted.outcome),
        "tokens": fitted.tokens,
        "examples": [piece.conversation.id for piece in fitted.pieces],
        "shortened_observations": fitted.shortened_observations,
        "steps_left_out": list(fitted.steps_left_out),
    }


def batches_of(rows: Iterable[RawRow | Rejection]) -> Iterator[list[RawRow | Rejection]]:
    """Cut a stream by number and, since whole batches are in memory, by characters."""
    batch: list[RawRow | Rejection] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += 0 if isinstance(row, Rejection) else _characters(row.value)
        if len(batch) == CONVERSATIONS_A_BATCH or characters >= _CHARACTERS_A_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(value: object, depth: int = 5) -> int:
    """Return about how much text a raw value holds; what lies deeper than a turn's fields counts nothing."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum([_characters(each, depth - 1) for each in inner]) if depth else 0
