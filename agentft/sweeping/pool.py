"""Jobs onto slots until none is left: starts, watches, limits, tries again, and stops everything when asked to."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from agentft.errors import RunError
from agentft.settings import Settings
from agentft.sweeping.backends import Executor, Slot
from agentft.sweeping.jobs import LOG, Job, last_words
from agentft.sweeping.processes import Attempt, describe_exit

POLL_SECONDS = 0.1

CONFIG_REFUSED = 2
"""Exit code of `train.py` for settings that cannot run: trying again would not help."""


@dataclass(kw_only=True)
class Rules(Settings, group="hydra.launcher", affects="nothing"):
    """What holds for every job."""

    retry: int = field(default=0, metadata={"minimum": 0, "maximum": 1000})
    time_limit: float | None = field(default=None, metadata={"above": 0, "maximum": 10**6})
    """Minutes of one attempt."""
    grace: float = field(default=20.0, metadata={"minimum": 0, "maximum": 86400})
    """Seconds between asking a job to end and killing it."""


@dataclass
class Running:
    """A job on its slot."""

    job: Job
    slot: Slot
    process: Attempt
    status_before: int
    """mtime of `status.json` at the start, which tells an earlier attempt's word from this one's."""
    limit: str | None = None
    """The reason for which it was stopped by us."""


class Pool:
    """Runs jobs; `seen` is called whenever one starts or ends, `tick` about ten times a second."""

    def __init__(
        self,
        slots: Sequence[Slot],
        rules: Rules,
        place: Executor,
        *,
        seen: Callable[[Job], None] = lambda job: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._free = deque(slots)
        self._rules = rules
        self._place = place
        self._seen = seen
        self._tick = tick
        self._stop: signal.Signals | None = None
        self._stops = 0
        self.running: list[Running] = []

    def run(self, jobs: Sequence[Job]) -> signal.Signals | None:
        """Run all `jobs`; returns the signal that ended the sweep early, if one did."""
        waiting = deque(jobs)
        tries = {id(job): 1 + self._rules.retry for job in jobs}
        with self._signals_noticed():
            try:
                while self.running or (waiting and self._stop is None):
                    while waiting and self._free and self._stop is None:
                        self._start(waiting.popleft(), tries)
                    time.sleep(POLL_SECONDS)
                    self._stop_what_must_stop()
                    for entry in list(self.running):
                        code = entry.process.poll()
                        if code is None:
                            continue
                        self.running.remove(entry)
                        self._free.appendleft(entry.slot)
                        self._conclude(entry, code)
                        tries[id(entry.job)] -= 1
                        if entry.job.state == "failed" and tries[id(entry.job)] > 0 and _worth_another(entry):
                            waiting.append(entry.job)
                    self._tick()
            finally:
                self._leave_nothing_behind()
        return self._stop

    def _start(self, job: Job, tries: dict[int, int]) -> None:
        slot = self._free.popleft()
        job.environment |= slot.environment(job.threads)
        job.attempts += 1
        job.state, job.started, job.ended = "running", _now(), None
        job.exit_code = job.signal = job.reason = job.seconds = None
        job.folder.mkdir(parents=True, exist_ok=True)
        header = f"$ {job.command_line}\n"
        try:
            process = self._place.start(job, header)
        except (OSError, RunError) as error:
            self._free.appendleft(slot)
            tries[id(job)] = 0
            job.state, job.reason, job.ended = "failed", f"could not be started: {error}", _now()
        else:
            job.pid = process.pid
            self.running.append(Running(job, slot, process, _changed(job.folder / "status.json")))
        job.write()
        self._seen(job)

    def _stop_what_must_stop(self) -> None:
        stops, self._stops = self._stops, 0
        for entry in self.running:
            minutes = self._rules.time_limit
            if stops and self._stop is not None:
                if entry.limit is None:
                    entry.limit = f"stopped by {self._stop.name}"
                for _ in range(stops):
                    entry.process.stop(self._rules.grace)
            elif minutes is not None and entry.process.seconds > 60 * minutes and not entry.process.stopping:
                entry.limit = f"time limit of {minutes:g} minutes"
                entry.process.stop(self._rules.grace)

    def _conclude(self, entry: Running, code: int) -> None:
        job = entry.job
        words, job.signal = describe_exit(code)
        job.exit_code, job.ended, job.seconds = code, _now(), round(entry.process.seconds, 3)
        job.seconds_in_all = round(job.seconds_in_all + job.seconds, 3)
        own = job.status if _changed(job.folder / "status.json") != entry.status_before else {}
        own = own if "state" in own else {}
        said = str(own.get("error") or "")
        if (own["state"] in ("finished", "paused")) if own else (code == 0):
            # Its results are whole then, even if it was asked to stop, or died, in the last moment.
            job.state, job.reason = ("paused" if own.get("state") == "paused" else "finished"), None
        elif entry.process.lost is not None and entry.limit is None:
            job.state, job.reason = "failed", entry.process.lost
        elif entry.limit is not None:
            job.state = "failed" if entry.limit.startswith("time") else "stopped"
            job.reason = entry.limit
        else:
            job.state = "failed"
            # Of a killed job the last line of its log tells how far it was, not why it ended.
            said = said or ("" if code < 0 else last_words(job.folder / LOG))
            job.reason = f"{words}: {said}" if said else words
        job.write()
        self._seen(job)

    def _leave_nothing_behind(self) -> None:
        """Only after an error of our own is anything left to end here."""
        for entry in self.running:
            entry.process.stop(self._rules.grace)
        while self.running:
            for entry in list(self.running):
                if (code := entry.process.poll()) is not None:
                    self.running.remove(entry)
                    entry.limit = entry.limit or "stopped with the launcher"
                    self._conclude(entry, code)
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _signals_noticed(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def notice(number: int, _: FrameType | None) -> None:
            self._stop = signal.Signals(number)
            self._stops += 1

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        before = {number: signal.signal(number, notice) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _worth_another(entry: Running) -> bool:
    return entry.limit is None and entry.job.exit_code != CONFIG_REFUSED


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
