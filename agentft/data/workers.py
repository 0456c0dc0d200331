"""Share batches of work out over all cores, with results in order.

Python's part of the work holds the interpreter's lock, so only processes share it out. They are the workers of a `DataLoader`,
forked late and from a quiet process: they find the tokenizers loaded, cost no import, and a short preparation, which would not
repay them, has none. The work keeps no state between batches, so they can be worked on anywhere and in any order.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from traceback import format_exc
from typing import Any, Generic, TypeVar

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
        collate_fn=lambda result: result,
        worker_init_fn=partial(_begin, os.getpid()),
        multiprocessing_context="fork",
        generator=torch.Generator(),  # else it would draw from the one that the training draws from
    )
    before = set(active_children())
    try:
        with killed_worker_in_words():
            for result in loader:
                if isinstance(result, Exception):
                    raise result
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
class _Work(Generic[B, R]):
    """Work as a dataset whose indices are batches. A `DataLoader` would raise an error anew, with other words in it."""

    work: Callable[[B], R]

    def __getitem__(self, batch: B) -> R | Exception:
        try:
            return self.work(batch)
        except Exception as error:
            error.add_note(f"in a process that prepares data:\n{format_exc()}")
            return error


def _begin(parent: int, _: int) -> None:
    # Sent to all processes of a job they ask the parent to end its work, and so its workers'; its handlers are for it alone.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    gc.freeze()  # a collection would touch, and so copy, every page that is shared with the parent
    die_with(parent)
