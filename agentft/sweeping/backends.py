"""Hand the jobs of a sweep to SLURM, by submitit, or to Ray: executors beside `runner.ThisMachine`.

Before SLURM's time limit, and where a job is preempted, submitit puts it into the queue again. All machines must see the
sweep folder under the same path and have agentft installed as this one has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agentft.errors import ConfigError, RunError
from agentft.sweeping.jobs import LOG, Job
from agentft.sweeping.runner import Attempt, Executor, JobProcess, last_change, start_interpreter, write_header

# --- On the node ---


class NodeTask:
    """A job as a node runs it. SLURM calls it on each of the job's nodes: the first one's log and exit code are the job's."""

    def __init__(self, job: Job, grace: float) -> None:
        self.job, self._grace = job, grace
        self._folder = str(Path.cwd())
        self._process: JobProcess | None = None

    def run(self, stop: threading.Event, log: str = LOG, more: Mapping[str, str] = MappingProxyType({})) -> int:
        """Return the exit code of the job, run here with `more` in its environment; once `stop` is set it is ended first.

        It dies with the thread that called.
        """
        path, command = self.job.folder / log, self.job.command
        write_header(path, self.job.command_line)
        tied = [*_TIED, *command] if sys.platform == "linux" else command
        self._process = process = start_interpreter(tied, {**self.job.environment, **more}, path, self._folder)
        while (code := process.poll()) is None:
            if stop.wait(_LOOK_SECONDS):
                if process.stop_began is None:
                    process.stop(self._grace)
                time.sleep(_LOOK_SECONDS)
        return code

    def __call__(self) -> int:
        import submitit

        node, stop = submitit.JobEnvironment(), threading.Event()
        # SLURM asks a cancelled job by SIGTERM, which submitit would pass over.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        return self.run(stop, f"{LOG}.node{node.global_rank}" if node.global_rank else LOG, nodes_of(node))

    def checkpoint(self) -> Any:
        """End the job, which saves, and return what starts again; submitit calls this in the job's last seconds."""
        import submitit

        process, self._process = self._process, None
        if process is not None:
            process.stop(self._grace)
            until = time.monotonic() + self._grace
            while process.poll() is None and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)
        return submitit.helpers.DelayedSubmission(self)


_LOOK_SECONDS = 0.1
_TIE = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execvp(sys.argv[1], sys.argv[1:])
"""
_TIED = [sys.executable, "-P", "-c", _TIE]
"""Begin of a command that dies with the thread that started it (PR_SET_PDEATHSIG): a queue that has killed our process
would give its cores to the next job. It hears SIGINT, which Ray blocks in its processes."""


# --- Queues ---


class Queue(Executor):
    """A cluster's queue, which starts jobs when there is room."""

    def __init__(self, grace: float) -> None:
        """`grace`: seconds between asking a job to end and killing it."""
        self._grace = grace

    def start(self, job: Job) -> Attempt:
        """Put the job into the queue. Raises RunError where it is refused."""
        return QueuedAttempt(self, self.submit(NodeTask(job, self._grace)), job.folder / LOG)

    def submit(self, task: NodeTask) -> Any:
        """Put a job into the queue and return what the cluster knows it by."""
        raise NotImplementedError

    def ask(self, handle: Any) -> int | None:
        """Return a job's exit code once it has ended. Raises RunError with the cluster's words where it has none."""
        raise NotImplementedError

    def cancel(self, handle: Any, *, running: bool, force: bool) -> None:
        """End a job: what runs on the node ends it within the grace, or with `force` at once."""
        raise NotImplementedError


class QueuedAttempt(Attempt):
    """An attempt on a cluster; whether it has begun is seen in its `job.log`."""

    def __init__(self, queue: Queue, handle: Any, log: Path) -> None:
        self._queue, self._handle, self._log = queue, handle, log
        self._before = last_change(log)
        self._force_at = float("inf")
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code of the job, negative for a signal; `lost` says why there is none of its own."""
        if self.began is None and last_change(self._log) != self._before:
            self.began = time.monotonic()
        if self._code is None:
            try:
                self._code = self._queue.ask(self._handle)
            except RunError as error:
                self._code, self.lost = 1, str(error)
        if self._code is None and time.monotonic() > self._force_at:
            self._cancel(force=True)
        return self._code

    def stop(self, grace: float) -> None:
        """Cancel it, by force `grace` seconds and the cluster's own slowness later."""
        again, self.stop_began = self.stop_began is not None, time.monotonic()
        self._force_at = self.stop_began + grace + _SLOWNESS
        self._cancel(force=again or grace == 0.0)

    def _cancel(self, *, force: bool) -> None:
        self._force_at = float("inf") if force else self._force_at
        self._queue.cancel(self._handle, running=self.began is not None, force=force)


_SLOWNESS = 15.0
"""Seconds that a cluster may take to pass on a cancellation."""


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# --- SLURM ---

FOLDER = ".submitit"
"""In the sweep folder: what submitit keeps of each job, its own log among it."""


class Slurm(Queue):
    """SLURM's queue, by submitit."""

    def __init__(self, parameters: Mapping[str, Any], sweep: Path, *, local: bool, grace: float) -> None:
        """Connect to SLURM; `parameters` by submitit's names. Raises ConfigError where either is missing or refuses them."""
        super().__init__(grace)
        try:
            import submitit
        except ImportError:
            raise ConfigError("hydra/launcher=slurm needs submitit: pip install submitit") from None
        self._local = local
        try:
            self._executor = submitit.AutoExecutor(folder=sweep / FOLDER, cluster="local" if local else "slurm")
            self._executor.update_parameters(**parameters)
        except (RuntimeError, NameError, AssertionError) as error:
            raise ConfigError(f"hydra/launcher=slurm: {_words(error)}") from error

    def submit(self, task: NodeTask) -> Any:
        self._executor.update_parameters(name=f"{task.job.folder.parent.name}_{task.job.name}"[:80])
        try:
            return self._executor.submit(task)
        except Exception as error:  # submitit has no class of its own for `sbatch` said no
            raise RunError(f"not submitted: {_words(error)}") from error

    def ask(self, handle: Any) -> int | None:
        try:
            return next((int(code) for code in handle.results() if code), 0) if handle.done() else None
        except Exception as error:
            raise RunError(f"SLURM: {handle.state}: {_words(error)}") from error

    def cancel(self, handle: Any, *, running: bool, force: bool) -> None:
        if self._local and not force:
            # Its stand-in for SLURM would kill a second later; SIGTERM it passes on, as SLURM does.
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(handle.job_id), signal.SIGTERM)
        else:
            handle.cancel(check=False)


def nodes_of(node: Any) -> dict[str, str]:
    """Return the variables by which a job of several nodes finds the others; empty for one node."""
    if node.num_tasks == 1:
        return {}
    return {
        "AGENTFT_NODES": str(node.num_tasks),
        "AGENTFT_NODE": str(node.global_rank),
        "AGENTFT_FIRST_HOST": node.hostnames[0],
        "AGENTFT_JOB_ID": str(node.job_id),
    }


# --- Ray ---


class RayCluster(Queue):
    """A cluster of Ray, or Ray started on this machine."""

    def __init__(self, address: str | None, *, threads: int, gpus: int, grace: float) -> None:
        """Each job takes `threads` cores and `gpus`. Raises ConfigError where Ray is missing or not to be reached."""
        super().__init__(grace)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise ConfigError("hydra/launcher=ray needs Ray: pip install ray") from None
        self._ray = ray
        here: dict[str, Any] = {} if address else {"include_dashboard": False}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"hydra.launcher.address={address}: {error}") from error
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, which would end the launcher at once
        # Two calls at a time: the job, and the request to end it.
        needs = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 2}
        self._agent = ray.remote(NodeAgent).options(**needs)

    def submit(self, task: NodeTask) -> Any:
        agent = self._agent.remote()
        return agent, agent.run.remote(task)

    def ask(self, handle: Any) -> int | None:
        agent, reference = handle
        if not self._ray.wait([reference], timeout=0)[0]:
            return None
        try:
            return int(self._ray.get(reference))
        except Exception as error:
            raise RunError(f"Ray: {type(error).__name__}: {_words(error)}") from error
        finally:
            self._ray.kill(agent)

    def cancel(self, handle: Any, *, running: bool, force: bool) -> None:
        if force or not running:  # it may still wait for its cores
            self._ray.kill(handle[0])
        else:
            handle[0].stop.remote()

    def close(self) -> None:
        """Leave the cluster; a Ray that was started here ends."""
        self._ray.shutdown()


class NodeAgent:
    """An actor of Ray, one for each job: it has the job's cores and GPUs."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def run(self, task: NodeTask) -> int:
        """Run the job to its end."""
        return task.run(self._stop)

    def stop(self) -> None:
        """End the job, which ends `run`."""
        self._stop.set()
