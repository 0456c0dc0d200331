"""A job as a process group: started with its output in a file, watched, ended with everything it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from agentft.signals import STARTED_BY


class Attempt(Protocol):
    """One attempt of a job, wherever it runs."""

    @property
    def pid(self) -> int | None:
        """Of the job's process, where it is one of this machine."""

    @property
    def seconds(self) -> float:
        """Since it began to run; 0 while it waits in a queue."""

    @property
    def stopping(self) -> bool:
        """It was asked to end."""

    @property
    def lost(self) -> str | None:
        """Why its end is not its own doing: what it ran on is gone."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal, once it has ended."""

    def stop(self, grace: float) -> None:
        """Ask it to end, and see to it that it has ended `grace` seconds later; asked twice: now."""


class JobProcess:
    """A process of this machine, leader of a group of its own: a Ctrl-C in the terminal does not reach it past us."""

    lost: str | None = None

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._began = time.monotonic()
        self._stop_began: float | None = None
        self._stages: list[tuple[float, signal.Signals]] = []
        self._code: int | None = None

    def _wait(self) -> int | None:
        """The exit code once it has ended; never blocks."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._began

    @property
    def stopping(self) -> bool:
        return self._stop_began is not None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, once it has ended; what it left behind in its group is ended too."""
        if self._code is not None:
            return self._code
        if self.stopping:
            self._push()
        code = self._wait()
        if code is not None:
            self._code = code
            # Data workers, W&B: whatever still holds the GPU would meet the next job of the slot.
            self._signal(signal.SIGKILL if code else signal.SIGTERM)
        return code

    def stop(self, grace: float) -> None:
        """Ask it to end as Ctrl-C does, so that it marks itself; firmly and then by force within `grace` seconds."""
        if self.stopping:
            grace = 0.0  # asked twice: now
        self._stop_began = time.monotonic()
        # A shell's background job ignores SIGINT, and so do its children: SIGTERM follows.
        self._stages = [(0.0, signal.SIGINT), (grace * 0.6, signal.SIGTERM), (grace, signal.SIGKILL)]
        self._push()

    def _push(self) -> None:
        assert self._stop_began is not None
        while self._stages and time.monotonic() - self._stop_began >= self._stages[0][0]:
            self._signal(self._stages.pop(0)[1])

    def _signal(self, number: signal.Signals) -> None:
        family = descendants(self.pid) if self._code is None else []
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
        if number == signal.SIGKILL:
            for pid in family:  # those that made groups of their own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)


class FreshProcess(JobProcess):
    """A job in an interpreter of its own, started from its command."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        header: str,
        working_folder: str | None = None,
    ) -> None:
        with log.open("ab") as output:
            output.write(header.encode("utf-8", errors="backslashreplace"))
            output.flush()
            self._process = subprocess.Popen(
                list(command),
                env=whole_environment(environment),
                cwd=working_folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        super().__init__(self._process.pid)

    def _wait(self) -> int | None:
        return self._process.poll()


def whole_environment(own: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job: this process's, what suits output into a file, and the job's `own`."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160", STARTED_BY: "launcher", **own}


def describe_exit(code: int) -> tuple[str, str | None]:
    """An exit code in words, and the name of the signal if it was one."""
    if code >= 0:
        return f"exit code {code}", None
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""), name


def descendants(pid: int) -> list[int]:
    """Processes started by `pid` and by those, as Linux lists them; elsewhere none."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name, in parentheses, may hold spaces and parentheses itself.
            parent = int(path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
