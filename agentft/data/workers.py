"""The same work on batch after batch, results in order: in threads at first, on all cores where there is much of it.

Python's part of the work holds the interpreter's lock, so only processes share it out. They are forked, late and from a quiet
process: they find the tokenizers loaded, cost no import, and a short preparation, which would not repay them, has none.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

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
