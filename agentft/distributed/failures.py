"""What is said when a rank has failed: the rank that failed first, its traceback, and what the others saw of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from agentft import errors
from agentft.errors import AgentftError, RankError

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
"""What a rank says that has lost another: never the cause."""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """How one rank ended."""

    rank: int
    pid: int
    time: float
    kind: str
    """Name of the exception; empty where the process ended without one."""
    message: str
    traceback: str

    @classmethod
    def of_exit(cls, rank: int, pid: int, code: int) -> Self:
        """A process that ended without a word, by its exit code; negative: the signal that ended it."""
        reason = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                reason = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                reason += " (out of memory, or somebody killed it)"
        return cls(rank, pid, 0.0, "", f"ended by {reason}", "")

    @property
    def is_consequence(self) -> bool:
        """Whether it says no more than that another rank was lost."""
        return tells_of_a_loss(self.message)


def tells_of_a_loss(message: str) -> bool:
    """Say by its message whether an error is no more than the loss of another rank."""
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
        return RankError(f"{hang}. What ranks said lies in {logs}")
    first = min(failures.values(), key=lambda failure: (failure.is_consequence, failure.time, failure.rank))
    raised = getattr(errors, first.kind, None)
    if isinstance(raised, type) and issubclass(raised, AgentftError):
        again: AgentftError = raised(first.message)
        return again
    others = sorted(rank for rank in failures if rank != first.rank)
    seen = f"; then rank {', '.join(map(str, others))} lost the connection to it" if others else ""
    what = f"{first.kind}: {first.message}" if first.kind else first.message
    said = f"{first.traceback}\n" if first.traceback else ""
    return RankError(
        f"{said}rank {first.rank} (pid {first.pid}) failed first: {what}{seen}. What ranks said lies in {logs}"
    )
