"""A watch over ranks that hang: when none has got anywhere for too long, the job is ended and the slowest is named.

Each rank leaves a mark whenever it enters a phase (`World.mark`). Ranks that wait for another have marked the exchange they
wait in; the one they wait for has the oldest mark.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a rank was, and when it said so."""

    rank: int
    time: float
    pid: int
    where: str


def read_marks(folder: Path) -> list[Mark]:
    """Return the newest mark of each rank of this machine."""
    marks = []
    for path in folder.glob("rank-*"):
        # A mark that is just being written is read the next time.
        with suppress(OSError, ValueError):
            moment, pid, where = path.read_text(encoding="utf-8").rstrip("\n").split(" ", 2)
            marks.append(Mark(int(path.name.removeprefix("rank-")), float(moment), int(pid), where))
    return sorted(marks, key=lambda mark: mark.rank)


def kill_ranks(marks: Iterable[Mark]) -> None:
    """End the ranks that have left these marks."""
    for mark in marks:
        with suppress(ProcessLookupError):
            os.kill(mark.pid, signal.SIGKILL)


class HangWatch:
    """Looks at the marks while the ranks run; a context manager. `verdict` says what it did."""

    def __init__(self, folder: Path, timeout: float, *, interval: float = 0.5) -> None:
        self.verdict: str | None = None
        self._folder = folder
        self._timeout = timeout
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            marks = read_marks(self._folder)
            if marks and time.time() - max(mark.time for mark in marks) > self._timeout:
                self._cut(marks)

    def _cut(self, marks: list[Mark]) -> None:
        now = time.time()
        slowest = min(marks, key=lambda mark: mark.time)
        others = ", ".join(f"rank {mark.rank} at {mark.where!r}" for mark in marks if mark is not slowest)
        self.verdict = (
            f"no rank got anywhere for {self._timeout:g} s (distributed.timeout): the slowest is rank {slowest.rank} "
            f"(pid {slowest.pid}), at {slowest.where!r} for {now - slowest.time:.0f} s"
            + (f"; {others}" if others else "")
        )
        # The stuck rank would not hear anything gentler, and the others wait for it.
        kill_ranks(marks)
        for mark in marks:
            (self._folder / f"rank-{mark.rank}").unlink(missing_ok=True)
