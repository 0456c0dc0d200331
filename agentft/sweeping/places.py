"""Where the jobs of a sweep run: as processes of this machine, or handed to a cluster's own queue.

Whatever the place, a job is a process of its own with its run folder, `job.json` and `job.log`; what a sweep skips, tries
again, limits and reports is decided by the pool, which sees only attempts.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agentft.errors import RunError
from agentft.sweeping.forks import ForkServer, can_fork, is_forkable
from agentft.sweeping.jobs import LOG, Job
from agentft.sweeping.processes import Attempt, FreshProcess
from agentft.sweeping.slots import Slot


class Place(Protocol):
    """Starts attempts; closed at the end of the sweep."""

    def start(self, job: Job, header: str) -> Attempt:
        """Start an attempt of a job. Raises OSError or RunError where it cannot be started."""

    def close(self) -> None:
        """Leave what was set up for the sweep."""


class ThisMachine:
    """Jobs as processes of this machine: forked from one that has imported the libraries, where that is sound."""

    def __init__(self, modules: Sequence[str], slot: Slot, say: Callable[[str], None]) -> None:
        """`modules` are what forked jobs find imported; none: every job is a fresh interpreter."""
        self._say = say
        self._threads = slot.threads
        self._server: ForkServer | None = None
        if modules and not slot.gpus and can_fork():
            self._server = ForkServer(modules, slot.environment())

    def start(self, job: Job, header: str) -> Attempt:
        """Start the job's command, its output in `job.log`."""
        log = job.folder / LOG
        if self._server is not None and job.threads == self._threads and is_forkable(job.command):
            try:
                return self._server.start(job.command, job.environment, log, header)
            except RunError as error:
                self._say(f"each job imports its libraries itself from here on: {error}")
                self.close()
                header = ""
        return FreshProcess(job.command, job.environment, log, header)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
            self._server = None


class QueuedAttempt:
    """What the attempts of a cluster have in common; whether one has begun is seen in its `job.log`."""

    pid: int | None = None
    lost: str | None = None

    def __init__(self, log: Path) -> None:
        self._log = log
        self._size = _size(log)
        self._began: float | None = None
        self._stop_began: float | None = None
        self._patience = 0.0

    @property
    def seconds(self) -> float:
        """Since the job was seen to have begun; 0 while it waits in the cluster's queue."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def stopping(self) -> bool:
        return self._stop_began is not None

    def stop(self, grace: float) -> None:
        """Cancel it; what runs on the node ends the job within its own grace."""
        self._patience = 0.0 if self.stopping else grace
        self._stop_began = self._stop_began or time.monotonic()
        self._cancel(force=self._patience == 0.0)

    def poll(self) -> int | None:
        """The exit code of the job, negative for a signal; `lost` says why there is none of its own."""
        code = self._result()
        self._notice_begin()
        if code is None and 0.0 < self._patience < self._since_stop() - _SLOWNESS:
            self._patience = 0.0
            self._cancel(force=True)
        return code

    def _notice_begin(self) -> None:
        if self._began is None and _size(self._log) > self._size:
            self._began = time.monotonic()

    def _since_stop(self) -> float:
        return time.monotonic() - (self._stop_began or time.monotonic())

    def _result(self) -> int | None:
        raise NotImplementedError

    def _cancel(self, *, force: bool) -> None:
        raise NotImplementedError


_SLOWNESS = 15.0
"""Seconds that a cluster may take to pass on a cancellation."""


@dataclass(kw_only=True, frozen=True)
class NodeJob:
    """What a node must know to run a job: small, and nothing but text."""

    command: list[str]
    environment: dict[str, str]
    log: str
    header: str
    working_folder: str
    """In which the command's paths are meant."""
    grace: float

    @classmethod
    def of(cls, job: Job, header: str, grace: float) -> NodeJob:
        """The job as any machine with the same files can run it."""
        log, here = str(job.folder / LOG), str(Path.cwd())
        return cls(
            command=list(job.command),
            environment=dict(job.environment),
            log=log,
            header=header,
            working_folder=here,
            grace=grace,
        )


def run_on_node(job: NodeJob, stop: threading.Event) -> int:
    """Run a job on the machine where this is called, and return its exit code; once `stop` is set it is ended first."""
    command = [*_TIED, *job.command] if sys.platform == "linux" else job.command
    process = FreshProcess(command, job.environment, Path(job.log), job.header, job.working_folder)
    while (code := process.poll()) is None:
        if stop.wait(_LOOK_SECONDS):
            if not process.stopping:
                process.stop(job.grace)
            time.sleep(_LOOK_SECONDS)
    return code


_LOOK_SECONDS = 0.1
_TIE = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execvp(sys.argv[1], sys.argv[1:])
"""
_TIED = [sys.executable, "-c", _TIE]
"""Begin of a command that dies with the thread that started it (PR_SET_PDEATHSIG): a queue that has killed our process
would give its cores to the next job. It hears SIGINT, which Ray blocks in its processes."""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
