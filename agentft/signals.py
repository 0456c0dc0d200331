"""Handle the signals that ask a process to end: SIGTERM, SIGUSR1 or SIGUSR2 before a time limit, SIGHUP, Ctrl-C.

A training saves after the step it is in; everywhere else the request ends the work at once. SLURM and terminals signal every
process of a job: the one that a person started answers, and those that it started obey it (`distributed/launch.py`,
`sweeping/runner.py`).
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

log = logging.getLogger(__name__)

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
STOPS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)  # Windows has not all
"""The signals that ask for an end."""

STARTED_BY = "AGENTFT_STARTED_BY"
"""Environment variable by which a launcher marks the processes that it starts, and ends, itself."""

Tell = Callable[[signal.Signals, bool], None]
"""Told the signal that came first, and whether a person insists; it raises where the work is to end at once."""


class StopSignal(KeyboardInterrupt):
    """Raised where a signal asks this process to end. Like Ctrl-C it is no `Exception`: no handler of errors swallows it."""

    def __init__(self, number: int, words: str = "") -> None:
        self.signal, self._words = signal.Signals(number), words
        super().__init__(f"stopped by {self.signal.name}{words}")

    def __reduce__(self) -> tuple[type[StopSignal], tuple[int, str]]:
        return type(self), (int(self.signal), self._words)

    @property
    def exit_code(self) -> int:
        """Return, by convention, 128 and the number: 143 of SIGTERM, 130 of Ctrl-C, 138 of SIGUSR1."""
        return 128 + self.signal


class StopSignals:
    """Notices `STOPS` inside its `with` block, in the main thread; those that the process ignores stay ignored."""

    _standing: ClassVar[StopSignals | None] = None

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        """The first one that came."""
        self._deferred = False
        self._tell: Tell | None = None
        self._from_person = not os.environ.keys() & {STARTED_BY, "TORCHELASTIC_RUN_ID"}
        self._before: dict[signal.Signals, Any] = {}
        self._outer: StopSignals | None = None

    def __enter__(self) -> Self:
        self._outer, StopSignals._standing = StopSignals._standing, self
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        StopSignals._standing = self._outer
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @classmethod
    @contextmanager
    def shared(cls) -> Iterator[StopSignals]:
        """Give those that stand since the program's start, so that a signal after the first is known for one; else new ones."""
        if cls._standing is not None:
            yield cls._standing
            return
        with cls() as signals:
            yield signals

    def is_requested(self) -> bool:
        """Return whether a signal has come."""
        return self.requested is not None

    def agree(self, heard: Iterable[signal.Signals | None]) -> None:
        """Take over what another process of the job has heard, where this one has heard nothing yet."""
        self.requested = self.requested or next((number for number in heard if number is not None), None)

    def raise_if_requested(self, words: str = "") -> None:
        """Raise the `StopSignal` that was noted while signals were deferred; `words` say what was done about it."""
        if self.requested is not None:
            raise StopSignal(self.requested, words)

    @contextmanager
    def deferred(self, tell: Tell | None = None) -> Iterator[None]:
        """Inside, a signal is only noted, and `tell` called: whoever runs there asks `is_requested` where it can stop."""
        with self._mode(deferred=True, tell=tell):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises, one that was noted before too: for long work within a deferred block."""
        with self._mode(deferred=False, tell=None):
            self.raise_if_requested()
            yield

    @contextmanager
    def _mode(self, *, deferred: bool, tell: Tell | None) -> Iterator[None]:
        before = self._deferred, self._tell
        self._deferred, self._tell = deferred, tell
        try:
            yield
        finally:
            self._deferred, self._tell = before

    def _notice(self, number: int, _: FrameType | None) -> None:
        # Schedulers repeat themselves, and a repetition must not disturb the save; a person who presses Ctrl-C twice
        # does not want to wait for it.
        again, first = self.requested is not None, self.requested or signal.Signals(number)
        insists = again and self._from_person and number == first == signal.SIGINT
        self.requested = first
        if self._tell is not None:
            if insists or not again:
                self._tell(first, insists)
        elif insists or not (again or self._deferred):
            raise StopSignal(number)


def describe_exit(code: int) -> tuple[str, str | None]:
    """Return an exit code in words, negative for a signal, and the name of the signal if it was one."""
    if code >= 0:
        return f"exit code {code}", None
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""), name


def die_with(parent: int) -> None:
    """Have the kernel end this process when the thread of `parent` that started it ends. Linux only; else nothing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


# --- A job of SLURM ---

REQUEUED_BY_LAUNCHER = "AGENTFT_REQUEUED_WITH"
"""Set by a sweep's launcher for its jobs: the SLURM job that the launcher itself queues again, once for all of them."""


def slurm_job_id() -> str | None:
    """Return what `scontrol` calls this job: `1234`, of a job array `1234_7`; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID") or None


def is_slurm_batch_job() -> bool:
    """Return whether this is a job that SLURM can start again by itself: not a session of `salloc`."""
    return slurm_job_id() is not None and os.environ.get("SLURM_JOB_NAME") != "interactive"


def requeue_slurm_job() -> bool:
    """Ask SLURM, by the first task or a sweep's launcher, to queue this job again; return whether it agreed."""
    job = slurm_job_id()
    if job is None or os.environ.get(REQUEUED_BY_LAUNCHER) == job or os.environ.get("SLURM_PROCID", "0") != "0":
        return False
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip()
        log.error("SLURM job %s is not queued again: %s; submit it again by hand", job, words)
        return False
    log.warning("SLURM job %s is queued again", job)
    return True
