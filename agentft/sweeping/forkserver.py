"""The process that jobs are forked from: it imports the libraries once and then does nothing but fork and wait.

    python -P -m agentft.sweeping.forkserver FD MODULE...

Started by `agentft.sweeping.forks`, which speaks to it over the socket `FD` in JSON. A forked job is the program that its
command names, run as the interpreter would run it: its own session, environment, output file, arguments and exit code.
The server runs no operation of the libraries and holds no thread, lock or device that a copy of it could inherit.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from agentft.signals import STOPS

Request = dict[str, Any]
"""`program`: the command without its interpreter; `environment`: all of it; `working_folder`; `log`: appended to."""


def serve(connection: Connection, modules: Sequence[str]) -> Request | None:
    """Import `modules`, then fork a job for each request. Returns twice over: the request in a job, None at the end."""
    try:
        for name in modules:
            importlib.import_module(name)
        if (threads := thread_count()) > 1:
            raise RuntimeError(f"{threads} threads run after importing {', '.join(modules)}")
    except Exception as error:
        _send(connection, error=f"{type(error).__name__}: {error}")
        return None
    gc.collect()
    gc.freeze()  # a collection in a job would touch, and so copy, every shared page
    _send(connection, ready=True)
    return _fork_jobs(connection)


def _fork_jobs(connection: Connection) -> Request | None:
    with selectors.DefaultSelector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        jobs: dict[int, int] = {}  # descriptor of a job's process -> its pid
        listening = True
        while listening or jobs:
            for key, _ in selector.select():
                if key.fd in jobs:
                    _, status = os.waitpid(jobs[key.fd], 0)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _send(connection, pid=jobs.pop(key.fd), code=os.waitstatus_to_exitcode(status))
                    continue
                try:
                    request: Request = json.loads(connection.recv_bytes())
                except (EOFError, OSError):  # the launcher is gone; its jobs go on, as fresh processes would
                    selector.unregister(key.fd)
                    listening = False
                    continue
                pid = os.fork()
                if pid == 0:
                    for descriptor in jobs:
                        os.close(descriptor)
                    connection.close()
                    return request
                watched = os.pidfd_open(pid)
                jobs[watched] = pid
                selector.register(watched, selectors.EVENT_READ)
                _send(connection, pid=pid)
    return None


def become(request: Request, handlers: Mapping[signal.Signals, Any]) -> None:
    """Turn this copy of the server into the job: what is left to do is to run its program, and to end as it ends."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["working_folder"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    program = list(request["program"])
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(program[0]).resolve().parent))
        runpy.run_path(program[0], run_name="__main__")


def thread_count() -> int:
    """Threads of this process, also those that Python does not know."""
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208  # names, not paths, and there is no folder to walk


def _send(connection: Connection, **message: object) -> None:
    with contextlib.suppress(OSError):  # where nobody is left to be told
        connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    # Nothing may follow: the job ends with the exit code, the traceback and the clean-up of its program.
    # SLURM signals it with the jobs; without it, nobody would know how they end.
    heard = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    if (due := serve(Connection(int(sys.argv[1])), sys.argv[2:])) is not None:
        become(due, heard)
