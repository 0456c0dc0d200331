"""Fork ranks and sweep jobs from one process that has imported the libraries: `multiprocessing`'s fork server, made safe.

The server looks for modules where this process does and never in its working directory, where `multiprocessing` itself would
import a `grp.py`. Stop signals, which SLURM and terminals send to every process of a job, stay blocked in it: who started it
decides. It runs no operation of the libraries, so it has no thread, lock or device that a fork could inherit.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

from agentft.errors import RunError
from agentft.settings import environment_variables, set_variables
from agentft.signals import STOPS, die_with

GONE = "the process that jobs are forked from has died"

SERVER_DIED = 255
"""Exit code that `multiprocessing` gives to processes whose server has died: nobody can say any more how they end."""

LIBRARIES = ("peft", "transformers.models.auto")
"""What every rank and job imports; only where there is no GPU, as CUDA does not survive a fork."""

_ORDERS = "AGENTFT_FORK_SERVER"
"""Environment variable that tells the server what to do, as JSON."""

server_pid: int | None = None
"""In the server and in the processes forked from it: the server's process id."""


@contextmanager
def fork_server(
    modules: Sequence[str], *, for_ranks: bool, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Start the server, which imports `modules` in `environment`, if none runs; `multiprocessing` uses it within the body.

    One for ranks ends with this process. Any other outlives it for as long as a job runs, and refuses to start where the
    modules have started threads.
    """
    orders = {
        "modules": list(modules),
        "agent": os.getpid() if for_ranks else None,
        "environment": {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")},
    }
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    safe = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", _ORDERS: json.dumps(orders)}
    forkserver.set_forkserver_preload([__name__])
    with environment_variables({**(environment or {}), **safe}):
        # Blocked and not ignored: one that comes meanwhile waits for this process. Each by itself, as the first unblocks two.
        for start in (resource_tracker.ensure_running, forkserver.ensure_running):
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            try:
                start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield


def fork_program(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    modules: Sequence[str],
    at_import: Mapping[str, str],
) -> BaseProcess:
    """Start a Python program by a fork, its output appended to `log`; it runs and ends as in an interpreter of its own.

    Raises:
        RunError: the server could not start, or has died.
    """
    arguments = (list(command[1:]), dict(environment), str(Path.cwd()), str(log))
    process = multiprocessing.get_context("forkserver").Process(target=_run_program, args=arguments)
    # `multiprocessing` would import this process's main program into the new one.
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        with fork_server(modules, for_ranks=False, environment=at_import):
            process.start()
    except (OSError, EOFError) as error:
        raise RunError(GONE) from error
    finally:
        sys.modules["__main__"] = main
    return process


def can_fork(command: Sequence[str]) -> bool:
    """Return whether a command is a plain program of this interpreter, on a system where libraries survive a fork."""
    return sys.platform == "linux" and command[0] == sys.executable and (command[1] == "-m" or command[1][0] != "-")


def _run_program(arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """Turn this fork into the program, and end the process as the interpreter would."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _redirect(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
    multiprocessing.current_process().name = "MainProcess"
    interrupts: list[BaseException] = []
    atexit.register(_end_by_interrupt, interrupts)  # the first one registered is called last
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[:] = arguments[1:], [folder, *_search_path]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:] = arguments, [str(Path(arguments[0]).resolve().parent), *_search_path]
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if not isinstance(stop.code, int | None):
            sys.stderr.write(f"{stop.code}\n")
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        interrupts += [error] if isinstance(error, KeyboardInterrupt) else []
    # `multiprocessing` would leave out what programs register for their end; this is the interpreter's own end.
    ctypes.pythonapi.Py_Exit(code)


def _end_by_interrupt(interrupts: list[BaseException]) -> None:
    """End as the interpreter does after a Ctrl-C that nobody caught: by the signal, so that a shell sees it."""
    if interrupts:
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _redirect(descriptor: int) -> None:
    """Send the process's output there, and close the descriptor."""
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _serve(modules: Sequence[str], agent: int | None, environment: Mapping[str, str | None]) -> None:
    """Prepare this process, the server, before `multiprocessing` takes requests in it."""
    global server_pid
    server_pid = os.getpid()
    set_variables(environment)
    if agent is not None:
        die_with(agent)
    with _silence():
        for name in modules:
            with contextlib.suppress(Exception):  # left to the programs that need it
                importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir())) if agent is None else 1
    if threads > 1:
        sys.stderr.write(f"jobs are not forked: {threads} threads run after importing {', '.join(modules)}\n")
        raise SystemExit(1)
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, every shared page


@contextmanager
def _silence() -> Iterator[None]:
    """Discard what libraries print while they are imported, by descriptor: some keep `sys.stderr` for later."""
    kept = [os.dup(1), os.dup(2)]
    _redirect(os.open(os.devnull, os.O_WRONLY))
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


_search_path = list(sys.path)
"""In the server: where the interpreter looks for modules, before any program has added its own folder."""

if _ORDERS in os.environ:  # in the server alone: it imports this module first, and no other process has the variable
    _serve(**json.loads(os.environ.pop(_ORDERS)))
