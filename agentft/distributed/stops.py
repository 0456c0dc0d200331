"""Watch and stop ranks: a rank stops when its agent asks, a job that hangs is ended, and the first failure is reported.

Each rank writes a heartbeat whenever it enters a phase (`World.heartbeat`). Ranks that wait for another have named the exchange
they wait in; the one they wait for has the oldest heartbeat.

A signal to a process group, or to a job of SLURM, reaches agent, server and ranks alike, and torch's agent passes one on. In
the server that ranks are forked from, in them and in what they start all stop signals stay blocked. The agent writes a file
into the folder of the heartbeats; a thread in each rank reads it there and does as the signal would have done.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from agentft import errors
from agentft.distributed import forkserver
from agentft.errors import AgentftError, RankError
from agentft.signals import STOPS, StopSignal, StopSignals, die_with


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The progress of a rank at a time."""

    rank: int
    time: float
    pid: int
    where: str


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the newest heartbeat of each rank of this machine."""
    found = []
    for path in folder.glob("rank-*"):
        # One that is just being written is read the next time.
        with suppress(OSError, ValueError):
            moment, pid, where = path.read_text(encoding="utf-8").rstrip("\n").split(" ", 2)
            found.append(Heartbeat(int(path.name.removeprefix("rank-")), float(moment), int(pid), where))
    return sorted(found, key=lambda each: each.rank)


def kill_ranks(heartbeats: Iterable[Heartbeat]) -> None:
    """End the ranks that have written these."""
    for each in heartbeats:
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)


@contextmanager
def hang_watch(folder: Path, timeout: float) -> Iterator[list[str]]:
    """Look at the heartbeats during the body, and end ranks that hang; the list that it yields then says which was slowest."""
    hangs: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            found = read_heartbeats(folder)
            if found and time.time() - max(each.time for each in found) > timeout:
                hangs.append(_describe_hang(found, timeout))
                # The stuck rank would not hear anything gentler, and the others wait for it.
                kill_ranks(found)
                for each in found:
                    (folder / f"rank-{each.rank}").unlink(missing_ok=True)

    thread = threading.Thread(target=watch, name="hang-watch", daemon=True)
    thread.start()
    try:
        yield hangs
    finally:
        done.set()
        thread.join()


def _describe_hang(heartbeats: list[Heartbeat], timeout: float) -> str:
    slowest = min(heartbeats, key=lambda each: each.time)
    others = "; ".join(f"rank {each.rank} at {each.where!r}" for each in heartbeats if each is not slowest)
    return (
        f"no rank got anywhere for {timeout:g} s (distributed.timeout): the slowest is rank {slowest.rank} "
        f"(pid {slowest.pid}), at {slowest.where!r} for {time.time() - slowest.time:.0f} s"
        + (f"; {others}" if others else "")
    )


BROKE_OFF = "another rank broke off"
"""How the message of a rank begins that ends because another one has failed."""

_LOST = (
    BROKE_OFF,
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "Application timeout caused pair closure",
    "NCCL communicator was aborted",
    "remote process exited",
)
"""Parts of the errors of a rank that has lost another: never the cause."""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """The end of one rank."""

    rank: int
    pid: int
    time: float
    kind: str
    """Name of the exception; empty where the process ended without one."""
    message: str
    traceback: str

    @classmethod
    def of_exit(cls, rank: int, pid: int, code: int) -> Self:
        """Return the end of a process that raised nothing, by its exit code; negative: the signal that ended it."""
        reason = f"exit code {code}"
        if code == forkserver.SERVER_DIED:
            reason += ", or the process that ranks are forked from has died"
        if code < 0:
            with suppress(ValueError):
                reason = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                reason += " (out of memory, or somebody killed it)"
        return cls(rank, pid, 0.0, "", f"ended by {reason}", "")

    @property
    def is_consequence(self) -> bool:
        """Return whether it tells no more than that another rank was lost."""
        return tells_of_a_loss(self.message)


def tells_of_a_loss(message: str) -> bool:
    """Return whether an error is no more than the loss of another rank, by its message."""
    return any(words in message for words in _LOST)


def read_failures(folder: Path) -> dict[int, RankFailure]:
    """Return what the ranks of this machine wrote down when they failed, by rank."""
    found = {}
    for path in folder.glob("failure-*.json"):
        with suppress(OSError, ValueError, KeyError):
            record = json.loads(path.read_text(encoding="utf-8"))
            rank = int(path.stem.removeprefix("failure-"))
            found[rank] = RankFailure(
                rank, **{name: record[name] for name in ("pid", "time", "kind", "message", "traceback")}
            )
    return found


def explain(failures: Mapping[int, RankFailure], *, hang: str | None, logs: Path) -> AgentftError:
    """Return the error that the job ends with.

    An error that a rank raised for the user comes back as it was; anything else as a `RankError` that begins with the
    traceback of the rank that failed first.
    """
    if hang is not None:
        return RankError(f"{hang}. The output of the ranks is in {logs}")
    first = min(failures.values(), key=lambda failure: (failure.is_consequence, failure.time, failure.rank))
    raised = getattr(errors, first.kind, None)
    if isinstance(raised, type) and issubclass(raised, AgentftError):
        again: AgentftError = raised(first.message)
        return again
    others = sorted(rank for rank in failures if rank != first.rank)
    seen = f"; then rank {', '.join(map(str, others))} lost the connection to it" if others else ""
    what = f"{first.kind}: {first.message}" if first.kind else first.message
    stack = f"{first.traceback}\n" if first.traceback else ""
    return RankError(
        f"{stack}rank {first.rank} (pid {first.pid}) failed first: {what}{seen}. The output of the ranks is in {logs}"
    )


GAVE_UP = 75
"""Exit code of a rank that could not end by itself."""

_STOP = "stop"
"""File by which the agent tells its ranks the number of the signal."""
_LEFT = "left"
"""File of a rank that has stopped: another one that waits for it where Python hears no signal would wait for ever."""
_LISTEN_SECONDS = 0.2
_LAST_SECONDS = 5.0
"""Time of a rank to write down its error, once torch's agent ends it since another one has failed."""
_LATE_SECONDS = 3.0
"""How much later than another rank this one may be told of a stop."""


@contextmanager
def telling(folder: Path, *, machines: int) -> Iterator[StopSignals]:
    """Pass a stop signal of this process on to its ranks; they end by themselves, and a second Ctrl-C ends them at once.

    Raises:
        StopSignal: it came before the ranks of several machines had met, which may take for ever.
    """

    def tell(number: signal.Signals, insists: bool) -> None:
        (folder / _STOP).write_text(f"{int(number)}\n", encoding="ascii")
        if insists:
            kill_ranks(read_heartbeats(folder))
            raise StopSignal(number)
        if machines > 1 and not any(folder.glob("rank-*")):
            raise StopSignal(number, " before the machines had met")

    with StopSignals.shared() as signals, signals.deferred(tell):
        signals.raise_if_requested()
        yield signals


@contextmanager
def obeying(agent: int, folder: Path) -> Iterator[StopSignals]:
    """In a rank: end with the server that it was forked from, and stop when the process `agent` says so in `folder`."""
    die_with(forkserver.server_pid or os.getppid())
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    done = threading.Event()
    with StopSignals() as signals:
        threading.Thread(target=_listen, args=(agent, folder, signals, done), name="stops", daemon=True).start()
        try:
            yield signals
        finally:
            done.set()
            if signals.is_requested():
                (folder / _LEFT).touch()


def as_stop(error: BaseException) -> BaseException:
    """Return what ended this rank: the stop, where `error` only tells that another one has stopped a little earlier."""
    if not tells_of_a_loss(str(error)):
        return error
    with StopSignals.shared() as signals, signals.deferred():
        until = time.monotonic() + _LATE_SECONDS
        while signals.requested is None and time.monotonic() < until:
            time.sleep(0.05)
        return error if signals.requested is None else StopSignal(signals.requested)


def _listen(agent: int, folder: Path, signals: StopSignals, done: threading.Event) -> None:
    """Wait for the agent's file; and for the SIGTERM by which torch's agent ends a rank when another one has failed."""
    told, end = False, float("inf")
    while True:
        if _is_ended_by(agent):
            end = min(end, time.monotonic() + (0.0 if done.is_set() else _LAST_SECONDS))
        if told and not signals.is_requested() and end == float("inf") and (folder / _LEFT).exists():
            end = time.monotonic() + _LAST_SECONDS
        if time.monotonic() >= end:
            os._exit(GAVE_UP)
        number = _read(folder / _STOP)
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


def _read(file: Path) -> int:
    """Return the signal's number; 0 where none came."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # none yet, or it is just being written
        return 0
