"""Do the same work on batch after batch of rows, on all cores, with results in order.

Python's part of the work holds the interpreter's lock, so only processes share it out. They are forked, late and from a quiet
process: they find the tokenizers loaded, cost no import, and a short preparation, which would not repay them, has none.

It keeps no state between batches and asks for none, so batches can be worked on anywhere and in any order. What needs
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
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

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

log = logging.getLogger(__name__)

_THREADS = 2
_PATIENCE = 2.0
"""Seconds without a result after which it is looked whether all processes live."""
_BATCHES_AHEAD = 3
"""Batches a thread or process."""


@dataclass(frozen=True, slots=True)
class Workers:
    """How work is shared out."""

    processes: int
    """At most; 1: only threads of this process."""
    ready: Callable[[], bool]
    """Asked between two batches until it is true: loads what much work needs, so that forked processes share it."""

    def in_order(self, work: Callable[[B], R], batches: Iterable[B]) -> Iterator[tuple[B, R]]:
        """Each batch with its result.

        Raises:
            DataError: a process was killed. What `work` raises is raised here.
        """
        waiting: deque[tuple[B, Future[R]]] = deque()
        pool: Executor = ThreadPoolExecutor(_THREADS, "rows")
        do, ahead, ready = work, _BATCHES_AHEAD * _THREADS, False
        try:
            for number, batch in enumerate(batches):
                if number and not ready and (ready := self.ready()) and self.processes > 1:
                    while waiting:  # a thread at work could hold a lock, which would stay locked in a fork
                        yield _next(waiting, pool)
                    pool.shutdown()
                    pool, do, ahead = _forked(work, self.processes), _do, _BATCHES_AHEAD * self.processes
                waiting.append((batch, pool.submit(do, batch)))
                if len(waiting) > ahead:
                    yield _next(waiting, pool)
            while waiting:
                yield _next(waiting, pool)
        except BrokenProcessPool as error:
            _kill(pool)  # those that are left ignore the SIGTERM by which the pool would end them
            raise DataError(
                "a process that prepares data was killed, by want of memory perhaps; dataset.workers=1 needs the least"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def process_count(asked: int) -> int:
    """How many processes to use where `asked` for, 0 meaning as many as make sense here."""
    if sys.platform != "linux":  # elsewhere a fork is not safe, or there is none
        if asked > 1:
            log.warning("dataset.workers=%d: processes are forked on Linux only, here one prepares the data", asked)
        return 1
    return asked or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def _next(waiting: deque[tuple[B, Future[R]]], pool: Executor) -> tuple[B, R]:
    batch, future = waiting.popleft()
    while True:
        try:
            return batch, future.result(timeout=_PATIENCE)
        except TimeoutError:
            if future.done():
                raise
            # The pool does not see a process that died while it wrote: it waits for the rest of the result.
            if not all(process.is_alive() for process in _processes(pool)):
                raise BrokenProcessPool("a process died while it wrote a result") from None


def _forked(work: Callable[[Any], Any], processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        processes, mp_context=get_context("fork"), initializer=_begin, initargs=(work, os.getpid())
    )


def _processes(pool: Executor) -> list[BaseProcess]:
    return list((getattr(pool, "_processes", None) or {}).values())


def _kill(pool: Executor) -> None:
    for process in _processes(pool):
        process.kill()
    results = getattr(pool, "_result_queue", None)
    if results is not None:
        results._writer.close()  # the last end to write to: who still reads finds that nothing more will come


_work: Callable[[Any], Any] | None = None
"""Of a forked process."""


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    # Sent to all processes of a job they ask the parent to end its work, and so its workers'; its handlers are for it alone.
    # One that died while it writes a result would leave the parent waiting for the rest of it.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    gc.freeze()  # a collection would touch, and so copy, every page that is shared with the parent
    die_with(parent)


def _do(batch: Any) -> Any:
    assert _work is not None
    return _work(batch)


CONVERSATIONS_A_BATCH = 64
_CHARACTERS_A_BATCH = 250_000


class Made(NamedTuple):
    """What became of a conversation that a part wants."""

    outcome: TruncationKind
    examples: tuple[PackedExample, ...]
    talks: tuple[bytes, ...]
    """Of a held-out one the conversations that the examples render, as they are stored."""
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
    made: Made | None
    """None where it waits, and where its source's weight leaves it out."""


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

    def read(self, batch: RowsToRead) -> list[Understood | Rejection]:
        """Read rows, and make what is wanted of them."""
        read = [self._read(row, batch) for row in batch.rows]
        made = iter(self._make([(r.conversation, r.part) for r in read if isinstance(r, _Read) and r.part is not None]))
        return [
            each if isinstance(each, Rejection) else each.understood(None if each.part is None else next(made))
            for each in read
        ]

    def _read(self, row: RawRow | Rejection, batch: RowsToRead) -> _Read | Rejection:
        if isinstance(row, Rejection):
            return row
        outcome = read_record(
            row.value, row.origin, form=batch.form, weight=row.weight, reasoning=self.config.reasoning
        )
        if isinstance(outcome, Rejection):
            return outcome
        conversation, notices = outcome
        if batch.name is not None:
            conversation = replace(conversation, id=batch.name)
        hashes = conversation.content_hash, conversation.user_hash
        part = None if batch.waiting else self._part(batch.part, conversation.weight, *hashes)
        return _Read(conversation, notices, *hashes, part, to_line(conversation) if batch.waiting else None)

    def make(self, batch: LinesToMake) -> list[Made]:
        """Make what is wanted of stored conversations."""
        return list(self._make([(from_line(line), batch.part) for line in batch.lines]))

    def _part(self, part: str | None, weight: float, content_hash: str, user_hash: str) -> str | None:
        """The part that a conversation belongs to; None where no epoch shows it."""
        seed = self.config.seed
        part = part or ("heldout" if is_held_out(user_hash, seed, self.config.test_ratio) else "train")
        return None if part == "train" and weight < 1 and not showing_keys(content_hash, weight, seed) else part

    def _make(self, wanted: Sequence[tuple[Conversation, str]]) -> Iterator[Made]:
        fitter = Truncator(self.template, self.encoder, self.config.max_length)
        fitted = fitter.fit([(conversation, self._too_long(part)) for conversation, part in wanted])
        id_type = stored_id_type(self.encoder.largest_id)
        for each, (_, part) in zip(fitted, wanted, strict=True):
            shown = each.pieces if part == "heldout" else ()
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

    def _too_long(self, part: str) -> TooLong:
        how = self.config.too_long
        return how if part == "train" else how.of_heldout


class _Read(NamedTuple):
    """A conversation before anything is made of it."""

    conversation: Conversation
    notices: list[ParseWarning]
    content_hash: str
    user_hash: str
    part: str | None
    line: bytes | None

    def understood(self, made: Made | None) -> Understood:
        """What is handed on of it."""
        conversation = self.conversation
        return Understood(
            conversation.id,
            identity(self.content_hash),
            self.notices,
            conversation.weight,
            bytes.fromhex(self.content_hash),
            bytes.fromhex(self.user_hash),
            tuple(sorted(conversation.called_tools)),
            self.line,
            made,
        )


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
    """About how much text a raw value holds; what lies deeper than a turn's fields counts nothing."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum([_characters(each, depth - 1) for each in inner]) if depth else 0
