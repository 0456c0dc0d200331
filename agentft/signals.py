"""What asks a process to end: SIGTERM of a scheduler, SIGUSR1 or SIGUSR2 before a time limit, SIGHUP, Ctrl-C.

A training notes the request and saves after the step it is in. Everywhere else (loading, answering) the request ends the
work at once, as Ctrl-C does; what those phases had done so far is on disk already.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

NOTICED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")


class StopSignal(KeyboardInterrupt):
    """A signal asked this process to end. Like Ctrl-C it is no `Exception`, so that no handler of errors swallows it."""

    def __init__(self, number: int, words: str = "") -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name}{words}")

    @property
    def exit_code(self) -> int:
        """By convention 128 and the number: 143 of SIGTERM, 130 of Ctrl-C, 138 of SIGUSR1."""
        return 128 + self.signal

    @property
    def asks_for_another_turn(self) -> bool:
        """SIGUSR1 announces the end of a job's time. SIGTERM may be a user's `scancel`, which means it; on SIGUSR2
        submitit, which sends it, queues the job again itself."""
        return self.signal.name == "SIGUSR1"


class StopSignals:
    """Notices the signals of `NOTICED` inside its `with` block; those that the process was told to ignore stay ignored.

    Outside the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        """The first one that came."""
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in NOTICED:
                number = getattr(signal, name, None)  # Windows has not all of them
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def is_requested(self) -> bool:
        """Whether a signal has come."""
        return self.requested is not None

    def raise_if_requested(self, words: str = "") -> None:
        """Raise the `StopSignal` that was noted while signals were deferred; `words` say what was done about it."""
        if self.requested is not None:
            raise StopSignal(self.requested, words)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted: whoever runs there asks `is_requested` where it can stop."""
        with self._mode(deferred=True):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises, one that was noted before too: for long work within a deferred block."""
        with self._mode(deferred=False):
            self.raise_if_requested()
            yield

    @contextmanager
    def _mode(self, *, deferred: bool) -> Iterator[None]:
        before, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = before

    def _notice(self, number: int, _: FrameType | None) -> None:
        again = self.requested is not None
        if not again:
            self.requested = signal.Signals(number)
        # Schedulers repeat themselves, and a repetition must not disturb the save; a person who presses Ctrl-C twice
        # does not want to wait for it.
        if number == signal.SIGINT if again else not self._deferred:
            raise StopSignal(number)
