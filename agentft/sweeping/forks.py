"""Jobs forked from one process that has imported the libraries: each is spared the 5 s that its imports would take.

Only where a fork is safe: on Linux, and where jobs have no GPU, since CUDA does not survive one. A job is a process of its
own all the same; what it shares is memory that nobody writes to.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from agentft.errors import RunError
from agentft.sweeping.processes import JobProcess, whole_environment

_PATIENCE = 120.0
"""Seconds in which the server must have imported, or forked."""

GONE = "the process that jobs are forked from has died"


class ForkServer:
    """A server process for jobs of equal surroundings; `start` forks one."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        """Begin to import `modules`; `environment` is what libraries read while they are imported."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "agentft.sweeping.forkserver", str(theirs.fileno()), *modules],
                env=whole_environment(environment) | {"PYTHONPATH": _with_agentft()},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._codes: dict[int, int] = {}
        self._ready = False
        self.gone: str | None = None
        """Why it cannot be used any more."""

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path, header: str) -> ForkedProcess:
        """Fork a job. Raises RunError where the server cannot, with its reason."""
        with log.open("ab") as output:
            output.write(header.encode("utf-8", errors="backslashreplace"))
        if not self._ready:
            self._expect("ready")
            self._ready = True
        request = {
            "program": list(command[1:]),
            "environment": whole_environment(environment),
            "working_folder": str(Path.cwd()),
            "log": str(log),
        }
        try:
            self._connection.send_bytes(json.dumps(request).encode())
        except OSError:
            self.gone = self.gone or GONE
        return ForkedProcess(self, self._expect("pid"))

    def code_of(self, pid: int) -> int | None:
        """The exit code of a job that has ended."""
        self._listen()
        return self._codes.pop(pid, None)

    def close(self) -> None:
        """Let it end; jobs that still run go on."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)

    def _expect(self, key: str) -> int:
        """Wait for an answer, taking in what else is said before it."""
        while self.gone is None:
            message = self._receive(_PATIENCE)
            if message is None:
                self.gone = self.gone or f"no answer in {_PATIENCE:g} s"
            elif key in message and "code" not in message:
                return int(message[key])
        raise RunError(self.gone)

    def _listen(self) -> None:
        while self.gone is None and self._receive(0.0) is not None:
            pass

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        try:
            if not self._connection.poll(seconds):
                return None
            message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self.gone = self.gone or GONE
            return None
        if "code" in message:
            self._codes[message["pid"]] = message["code"]
        self.gone = message.get("error", self.gone)
        return message


class ForkedProcess(JobProcess):
    """A job that was forked; the server, its parent, tells how it ended."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        super().__init__(pid)
        self._server = server

    def _wait(self) -> int | None:
        code = self._server.code_of(self.pid)
        if code is None and self._server.gone is not None:
            # Nobody will ever know how it ends: it is ended, so that it can be tried again in its folder.
            self._signal(signal.SIGKILL)
            self.lost = self._server.gone
            return -signal.SIGKILL
        return code


def can_fork() -> bool:
    """Whether this system can watch forked processes, and forks of a process with these libraries are sound."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open") and Path("/proc/self/task").is_dir()


def is_forkable(command: Sequence[str]) -> bool:
    """Whether a command is a program of this interpreter, without options for the interpreter itself."""
    return command[0] == sys.executable and (command[1] == "-m" or not command[1].startswith("-"))


def _with_agentft() -> str:
    """PYTHONPATH with the place of this very agentft in front: the server starts from no script beside it."""
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.pathsep.join(paths)
