"""How a job's ranks stop and end: by the word of their agent, the process that a person started, and with it.

A signal to a process group, or to a job of SLURM, reaches agent, server and ranks alike, and torch's agent passes one on. In
the server that ranks are forked from, in them and in what they start all stop signals stay blocked. The agent writes its word
into the folder of the marks; a thread in each rank reads it there and does as the signal would have done.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from agentft.distributed.failures import tells_of_a_loss
from agentft.distributed.hang import kill_ranks, read_marks
from agentft.signals import STOPS, StopSignal, StopSignals, die_with

AGENT_VARIABLE = "AGENTFT_AGENT_PID"
SERVER_VARIABLE = "AGENTFT_SERVER_PID"
"""Read and set by `agentft.distributed.server` in the server that ranks are forked from."""

GAVE_UP = 75
"""Exit code of a rank that could not end by itself."""

_WORD = "stop"
_LEFT = "left"
"""A rank has stopped: another one that waits for it where Python hears no signal would wait for ever."""
_LISTEN_SECONDS = 0.2
_LAST_SECONDS = 5.0
"""What a rank has to say what it saw, once torch's agent ends it since another one has failed."""
_WORD_SECONDS = 3.0
"""How much later than to another rank the word may come to this one."""


def start_server(preload: Sequence[str]) -> None:
    """Start the process that ranks are forked from, if it does not run: deaf to stop signals, and ended with this one."""
    os.environ[AGENT_VARIABLE] = str(os.getpid())
    forkserver.set_forkserver_preload(["agentft.distributed.server", *preload])
    # Blocked and not ignored: one that comes meanwhile waits for this process. Each by itself, as the first unblocks two.
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def telling(marks: Path, *, machines: int) -> Iterator[StopSignals]:
    """Pass a stop signal of this process on to its ranks; they end by themselves, and a second Ctrl-C ends them at once.

    Raises:
        StopSignal: it came before the ranks of several machines had met, which may take for ever.
    """

    def tell(number: signal.Signals, insists: bool) -> None:
        (marks / _WORD).write_text(f"{int(number)}\n", encoding="ascii")
        if insists:
            kill_ranks(read_marks(marks))
        if machines > 1 and not any(marks.glob("rank-*")):
            raise StopSignal(number, " before the machines had met")

    with StopSignals.shared() as signals, signals.deferred(tell):
        signals.raise_if_requested()
        yield signals


@contextmanager
def obeying(agent: int, marks: Path) -> Iterator[StopSignals]:
    """In a rank: end with the server that it was forked from, and stop when the process `agent` says so in `marks`."""
    die_with(int(os.environ.get(SERVER_VARIABLE, os.getppid())))
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    done = threading.Event()
    with StopSignals() as signals:
        threading.Thread(target=_listen, args=(agent, marks, signals, done), name="stops", daemon=True).start()
        try:
            yield signals
        finally:
            done.set()
            if signals.is_requested():
                (marks / _LEFT).touch()


def as_stop(error: BaseException) -> BaseException:
    """Return what ended this rank: the stop, where `error` only tells that another one has stopped a little earlier."""
    if not tells_of_a_loss(str(error)):
        return error
    with StopSignals.shared() as signals, signals.deferred():
        until = time.monotonic() + _WORD_SECONDS
        while signals.requested is None and time.monotonic() < until:
            time.sleep(0.05)
        return error if signals.requested is None else StopSignal(signals.requested)


def _listen(agent: int, marks: Path, signals: StopSignals, done: threading.Event) -> None:
    """Wait for the agent's word; and for the SIGTERM by which torch's agent ends a rank when another one has failed."""
    told, end = False, float("inf")
    while True:
        if _is_ended_by(agent):
            end = min(end, time.monotonic() + (0.0 if done.is_set() else _LAST_SECONDS))
        if told and not signals.is_requested() and end == float("inf") and (marks / _LEFT).exists():
            end = time.monotonic() + _LAST_SECONDS
        if time.monotonic() >= end:
            os._exit(GAVE_UP)
        number = _read(marks / _WORD)
        if number and not told and not done.is_set():
            told = True
            _thread.interrupt_main(signal.Signals(number))  # as if it had come from outside


def _is_ended_by(agent: int) -> bool:
    """Wait a little for SIGTERM, and say whether that process sent one."""
    if sys.platform != "linux":
        time.sleep(_LISTEN_SECONDS)
        return False
    info = signal.sigtimedwait([signal.SIGTERM], _LISTEN_SECONDS)
    return info is not None and info.si_pid == agent


def _read(word: Path) -> int:
    """Return the signal's number; 0 where none came."""
    try:
        return int(word.read_text(encoding="ascii"))
    except (OSError, ValueError):  # none yet, or it is just being written
        return 0
