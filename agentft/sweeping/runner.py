"""Run jobs on slots until none is left: start, watch, limit, try again, and stop all of them when asked to.

The pool sees only attempts. Here is the executor for this machine; those for SLURM and Ray are in `agentft.sweeping.backends`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from agentft.distributed.forkserver import GONE, SERVER_DIED, can_fork, fork_program
from agentft.errors import ConfigError, RunError
from agentft.runs import utc_now
from agentft.runtime import available_cores
from agentft.settings import Settings
from agentft.signals import STARTED_BY, StopSignals, describe_exit
from agentft.sweeping.jobs import LOG, Display, Job, last_error

_POLL_SECONDS = 0.1
_CONFIG_REFUSED = 2
"""Exit code of `train.py` for settings that cannot run: trying again would not help."""


# --- Slots: the shares of this machine ---


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the places; it holds one job at a time."""

    gpus: tuple[str, ...] | None
    """As `CUDA_VISIBLE_DEVICES` names them; none of them: no GPU; None: the variable is left as it is."""
    threads: int

    def environment(self, threads: int | None = None) -> dict[str, str]:
        """Return the variables that keep a job inside its slot."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        variables = dict.fromkeys(names, str(threads or self.threads))
        if self.gpus is not None:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        # NumPy's pool would start at its import, where jobs are forked; nothing heavy is left to it.
        return variables | {"OPENBLAS_NUM_THREADS": "1"}


Say = Callable[[str], None]
"""Prints a line beside the live table."""


def make_slots(
    slots: int | None, gpus_per_job: int, threads_per_job: int | None, gpus: list[str], cores: int | None = None
) -> list[Slot]:
    """Share GPUs and cores out; no two slots have a GPU in common.

    Raises:
        ConfigError: more is asked for than there is.
    """
    cores = cores or available_cores()
    on_gpu = bool(gpus) and gpus_per_job > 0
    if on_gpu:
        most = len(gpus) // gpus_per_job
        if most == 0 or (slots or 0) > most:
            raise ConfigError(
                f"hydra.launcher: {slots or 1} slot(s) with {gpus_per_job} GPU(s) each, but {len(gpus)} GPU(s) are visible"
            )
        slots = slots or most
    elif gpus_per_job > 1:
        raise ConfigError(f"hydra.launcher.gpus_per_job={gpus_per_job}: no GPU is visible")
    slots = slots or (max(1, cores // threads_per_job) if threads_per_job else 1)
    threads = threads_per_job or max(1, cores // slots)
    if on_gpu:
        return [Slot(tuple(gpus[i * gpus_per_job : (i + 1) * gpus_per_job]), threads) for i in range(slots)]
    # Where no GPU was found, one may be there all the same: only `gpus_per_job=0` hides it.
    return [Slot(None if gpus_per_job else (), threads)] * slots


def visible_gpus(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the GPUs that this process may use, by the names that `CUDA_VISIBLE_DEVICES` takes; asked without torch."""
    named = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = (part.strip() for part in named.split(","))
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))  # CUDA ignores the rest
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    parts = re.findall(r"UUID: (MIG-[^)\s]+)", listed)
    return parts or re.findall(r"^GPU (\d+):", listed, flags=re.MULTILINE)


# --- Attempts, and who starts them ---


class Attempt:
    """One attempt of a job, wherever it runs."""

    job: Job
    slot: Slot
    status_before: tuple[int, int]
    """Last change of `status.json` at the start, which tells an earlier attempt's status from this one's."""
    limit: str | None = None
    """The reason for which it was stopped by us."""
    pid: int | None = None
    """Of the job's process, where it is one of this machine."""
    lost: str | None = None
    """The reason, where it ended because what it ran on is gone."""
    began: float | None = None
    """Monotonic time at which it was seen to begin; None while it waits in a queue."""
    stop_began: float | None = None
    """Monotonic time at which it was last asked to end."""

    @property
    def seconds(self) -> float:
        """Return the seconds since it was seen to begin; 0 while it waits in a queue."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, once it has ended."""
        raise NotImplementedError

    def stop(self, grace: float) -> None:
        """Ask it to end, and see to it that it has ended `grace` seconds later; asked twice: now."""
        raise NotImplementedError


class Executor:
    """Starts attempts; closed at the end of the sweep."""

    def start(self, job: Job) -> Attempt:
        """Start an attempt of a job. Raises OSError or RunError where it cannot be started."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave what was set up for the sweep."""


class JobProcess(Attempt):
    """A process of this machine, leader of a group of its own: a Ctrl-C in the terminal does not reach it past us."""

    pid: int

    def __init__(self, process: subprocess.Popen[bytes] | BaseProcess) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self.began = time.monotonic()
        self._process = process
        self._stages: list[tuple[float, signal.Signals]] = []
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; what the job left behind in its group is ended too."""
        if self._code is None:
            while self._stages and time.monotonic() >= self._stages[0][0]:
                self._signal(self._stages.pop(0)[1])
            self._code = self._exit_code()
            if self._code is not None:
                # Data workers, W&B: whatever still holds the GPU would meet the next job of the slot.
                self._signal(signal.SIGKILL if self._code else signal.SIGTERM)
        return self._code

    def stop(self, grace: float) -> None:
        """Ask it to end as Ctrl-C does, so that it marks itself; firmly and then by force within `grace` seconds."""
        grace = grace if self.stop_began is None else 0.0
        self.stop_began = now = time.monotonic()
        # A shell's background job ignores SIGINT, and so do its children: SIGTERM follows.
        self._stages = [(now, signal.SIGINT), (now + grace * 0.6, signal.SIGTERM), (now + grace, signal.SIGKILL)]
        self.poll()

    def _signal(self, number: signal.Signals) -> None:
        family = []
        if number == signal.SIGKILL and self._code is None:  # those that made groups of their own
            with contextlib.suppress(psutil.Error):
                family = psutil.Process(self.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
        for each in family:
            with contextlib.suppress(psutil.Error):
                each.kill()

    def _exit_code(self) -> int | None:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        code = self._process.exitcode
        if code == SERVER_DIED and psutil.pid_exists(self.pid):
            # Nobody will ever know how it ends: it is ended, so that it can be tried again in its folder.
            self._signal(signal.SIGKILL)
            self.lost = GONE
            return -signal.SIGKILL
        return code


def start_interpreter(
    command: Sequence[str], own: Mapping[str, str], log: Path, working_folder: str | None = None
) -> JobProcess:
    """Start a command as a process of its own, with the variables `own`, its output appended to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            env=whole_environment(own),
            cwd=working_folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return JobProcess(process)


class ThisMachine(Executor):
    """Jobs as processes of this machine: forked from one that has imported the libraries, where that is sound."""

    def __init__(self, modules: Sequence[str], slot: Slot, say: Say) -> None:
        """`modules` are what forked jobs find imported; none: every job is a fresh interpreter."""
        self._modules = () if slot.gpus else modules  # CUDA does not survive a fork
        self._slot = slot
        self._say = say

    def start(self, job: Job) -> Attempt:
        """Start the job's command, its output in `job.log`."""
        log = job.folder / LOG
        write_header(log, job.command_line)
        if self._modules and job.threads == self._slot.threads and can_fork(job.command):
            environment, at_import = whole_environment(job.environment), self._slot.environment()
            try:
                return JobProcess(
                    fork_program(job.command, environment, log, modules=self._modules, at_import=at_import)
                )
            except RunError as error:
                self._say(f"each job imports its libraries itself from here on: {error}")
                self._modules = ()
        return start_interpreter(job.command, job.environment, log)


def write_header(log: Path, command_line: str) -> None:
    """Append the command, which stands above the output of an attempt."""
    with log.open("ab") as output:
        output.write(f"$ {command_line}\n".encode("utf-8", errors="backslashreplace"))


def whole_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job: this process's, what suits output into a file, and the job's `own`."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160", STARTED_BY: "launcher", **own}


# --- The pool ---


@dataclass(kw_only=True)
class LaunchOptions(Settings, group="hydra.launcher", affects="nothing"):
    """`hydra.launcher.*` of every launcher of ours."""

    _target_: str = "hydra_plugins.agentft_launcher.AgentftLauncher"
    place: str = "agentft"
    """Where jobs run; set by the choice of the launcher."""
    retry: int = field(default=0, metadata={"minimum": 0, "maximum": 1000})
    time_limit: float | None = field(default=None, metadata={"above": 0, "maximum": 10**6})
    """Minutes of one attempt."""
    grace: float = field(default=20.0, metadata={"minimum": 0, "maximum": 86400})
    """Seconds between asking a job to end and killing it."""
    slots: int | None = field(default=None, metadata={"minimum": 1, "maximum": 10**5})
    """Jobs at a time; null: visible GPUs // gpus_per_job, without a GPU cores // threads_per_job; in a queue, all."""
    eta: int | None = field(default=None, metadata={"minimum": 2, "maximum": 1000})
    """Successive halving: one job in `eta` is promoted from each rung; null: all jobs run to their end."""
    rungs: int = field(default=3, metadata={"minimum": 2, "maximum": 100})
    """Rungs of successive halving; the last is the end, each other at 1 / eta of the steps of the next."""

    def make_slots(self, jobs: int) -> list[Slot]:
        """Return the slots for a sweep of so many jobs."""
        raise NotImplementedError

    def make_executor(self, slot: Slot, sweep: Path, modules: Sequence[str], say: Say) -> Executor:
        """Return what starts the jobs on slots like `slot`; `modules` are those that a job imports."""
        raise NotImplementedError


class Pool:
    """Runs jobs, and shows them as they start and end."""

    def __init__(
        self, slots: Sequence[Slot], options: LaunchOptions, executor: Executor, signals: StopSignals, display: Display
    ) -> None:
        self._free = deque(slots)
        self._options, self._executor, self._signals, self._display = options, executor, signals, display
        self._running: list[Attempt] = []
        self._insisted = False
        """A person has pressed Ctrl-C again and does not want to wait."""

    def run(self, jobs: Sequence[Job]) -> signal.Signals | None:
        """Run all `jobs`; returns the signal that ended the sweep early, if one did."""
        waiting = deque(jobs)
        tries = {id(job): 1 + self._options.retry for job in jobs}
        with self._signals.deferred(self._hear):
            try:
                while self._running or (waiting and not self._signals.is_requested()):
                    while waiting and self._free and not self._signals.is_requested():
                        self._start(waiting.popleft())
                    time.sleep(_POLL_SECONDS)
                    self._stop_what_must_stop()
                    for job, may_help in self._take_ended():
                        tries[id(job)] -= 1
                        if job.state == "failed" and may_help and tries[id(job)] > 0:
                            waiting.append(job)
                    self._display.tick()
            finally:  # after an error of our own something may still run
                while self._running:
                    self._stop_what_must_stop("stopped with the launcher")
                    self._take_ended()
                    time.sleep(_POLL_SECONDS)
        return self._signals.requested

    def _start(self, job: Job) -> None:
        slot = self._free.popleft()
        job.environment |= slot.environment(job.threads)
        job.attempts += 1
        job.state, job.started, job.ended = "running", utc_now(), None
        job.exit_code = job.signal = job.reason = job.seconds = None
        job.folder.mkdir(parents=True, exist_ok=True)
        before = last_change(job.folder / "status.json")
        try:
            attempt = self._executor.start(job)
        except (OSError, RunError) as error:
            self._free.appendleft(slot)
            job.state, job.reason, job.ended = "failed", f"could not be started: {error}", utc_now()
        else:
            job.pid = attempt.pid
            attempt.job, attempt.slot, attempt.status_before = job, slot, before
            self._running.append(attempt)
        job.write()
        self._display.seen(job)

    def _hear(self, _: signal.Signals, insists: bool) -> None:
        self._insisted = insists

    def _stop_what_must_stop(self, because: str | None = None) -> None:
        minutes, requested = self._options.time_limit, self._signals.requested
        insisted, self._insisted = self._insisted, False
        for attempt in self._running:
            if attempt.stop_began is not None:
                if insisted:
                    attempt.stop(0.0)
                continue
            if requested is not None:
                attempt.limit = f"stopped by {requested.name}"
            elif minutes is not None and attempt.seconds > 60 * minutes:
                attempt.limit = f"time limit of {minutes:g} minutes"
            else:
                attempt.limit = because
            if attempt.limit is not None:
                attempt.stop(self._options.grace)

    def _take_ended(self) -> list[tuple[Job, bool]]:
        """Take the jobs that have ended off their slots, and say of each whether another try may help."""
        ended = [(attempt, code) for attempt in self._running if (code := attempt.poll()) is not None]
        for attempt, code in ended:
            self._running.remove(attempt)
            self._free.appendleft(attempt.slot)
            self._conclude(attempt, code)
        return [(attempt.job, attempt.limit is None and code != _CONFIG_REFUSED) for attempt, code in ended]

    def _conclude(self, attempt: Attempt, code: int) -> None:
        job = attempt.job
        words, job.signal = describe_exit(code)
        job.exit_code, job.ended, job.seconds = code, utc_now(), round(attempt.seconds, 3)
        job.seconds_in_all = round(job.seconds_in_all + job.seconds, 3)
        own = job.status if last_change(job.folder / "status.json") != attempt.status_before else {}
        state = own.get("state", "finished" if code == 0 else None)
        if state in ("finished", "paused"):
            # Its results are whole then, even if it was asked to stop, or died, in the last moment.
            job.state, job.reason = state, None
        elif attempt.limit is not None:
            job.state, job.reason = "failed" if attempt.limit.startswith("time") else "stopped", attempt.limit
        elif attempt.lost is not None:
            job.state, job.reason = "failed", attempt.lost
        else:
            # Of a killed job the last line of its log tells how far it was, not why it ended.
            error = str(own.get("error") or ("" if code < 0 else last_error(job.folder / LOG)))
            job.state, job.reason = "failed", f"{words}: {error}" if error else words
        job.write()
        self._display.seen(job)


def last_change(path: Path) -> tuple[int, int]:
    """Return time and size of a file as they are now; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
