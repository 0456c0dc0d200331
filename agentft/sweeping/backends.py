"""Hand the jobs of a sweep to SLURM, by submitit, or to Ray: executors beside `runner.ThisMachine`.

Before SLURM's time limit, and where a job is preempted, submitit puts it into the queue again; it resumes from its last
checkpoint. `cluster=local` runs the same on this machine, with processes standing for nodes.

What Ray runs does nothing but start the job's command and wait for it. All machines must see the sweep folder under the same
path and have agentft installed as this one has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentft.errors import ConfigError, RunError
from agentft.sweeping.jobs import LOG, Job
from agentft.sweeping.runner import Attempt, Executor, descendants, start_interpreter, whole_environment, write_header


class QueuedAttempt(Attempt):
    """An attempt on a cluster; whether it has begun is seen in its `job.log`."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log = log
        self._size = _size(log)
        self._patience = 0.0
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code of the job, negative for a signal; `lost` says why there is none of its own."""
        if self._began is None and _size(self._log) > self._size:
            self._began = time.monotonic()
        if self._code is None and self._has_ended():
            try:
                self._code = self._result()
            except Exception as error:
                self._code = 1
                self.lost = f"{self._describe(error)}: {' '.join(str(error).split())[:300]}"
        elif self._stop_began is not None and 0.0 < self._patience < time.monotonic() - self._stop_began - _SLOWNESS:
            self._patience = 0.0
            self._cancel(force=True)
        return self._code

    def stop(self, grace: float) -> None:
        """Cancel it; what runs on the node ends the job within its own grace."""
        self._patience = 0.0 if self.stopping else grace
        self._stop_began = self._stop_began or time.monotonic()
        self._cancel(force=self._patience == 0.0)

    def _has_ended(self) -> bool:
        raise NotImplementedError

    def _result(self) -> int:
        """Return the job's exit code; raise what the cluster says where it has none."""
        raise NotImplementedError

    def _describe(self, error: Exception) -> str:
        """Return what stands before the cluster's message where the job has no exit code."""
        raise NotImplementedError

    def _cancel(self, *, force: bool) -> None:
        raise NotImplementedError


_SLOWNESS = 15.0
"""Seconds that a cluster may take to pass on a cancellation."""


@dataclass(kw_only=True, frozen=True)
class NodeJob:
    """A job as a node needs it: small, and nothing but text."""

    command: list[str]
    environment: dict[str, str]
    log: str
    header: str
    working_folder: str
    """In which the command's paths are meant."""
    grace: float

    @classmethod
    def of(cls, job: Job, header: str, grace: float) -> NodeJob:
        """Return the job as any machine with the same files can run it."""
        log, here = str(job.folder / LOG), str(Path.cwd())
        return cls(
            command=job.command, environment=job.environment, log=log, header=header, working_folder=here, grace=grace
        )


def run_on_node(job: NodeJob, stop: threading.Event) -> int:
    """Run a job on the machine where this is called, and return its exit code; once `stop` is set it is ended first."""
    command = [*_TIED, *job.command] if sys.platform == "linux" else job.command
    log = Path(job.log)
    write_header(log, job.header)
    process = start_interpreter(command, whole_environment(job.environment), log, job.working_folder)
    while (code := process.poll()) is None:
        if stop.wait(_LOOK_SECONDS):
            if not process.stopping:
                process.stop(job.grace)
            time.sleep(_LOOK_SECONDS)
    return code


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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


FOLDER = ".submitit"
"""In the sweep folder: what submitit keeps of each job, its own log among it."""

_LONGEST_NAME = 80
"""Of a SLURM job, `<sweep>_<job>`: `squeue` cuts it at what its own format asks for."""


class NodeTask:
    """Runs on each node of a job. The first node's log and exit code are the job's."""

    def __init__(self, job: NodeJob) -> None:
        self.job = job

    def __call__(self) -> int:
        import submitit

        node = submitit.JobEnvironment()
        log = self.job.log if node.global_rank == 0 else f"{self.job.log}.node{node.global_rank}"
        stop = threading.Event()
        # SLURM asks a cancelled job by SIGTERM, which submitit would pass over.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        job = dataclasses.replace(self.job, log=log, environment=self.job.environment | nodes_of(node))
        return run_on_node(job, stop)

    def checkpoint(self) -> Any:
        """End the job, which saves, and return what starts again; submitit calls this in the job's last seconds."""
        import submitit

        for child in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)
        until = time.monotonic() + self.job.grace
        with contextlib.suppress(ChildProcessError):  # none is left
            while time.monotonic() < until:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(self)


class Slurm(Executor):
    """Submits jobs to SLURM's queue."""

    def __init__(self, parameters: Mapping[str, Any], sweep: Path, *, local: bool, grace: float) -> None:
        """Connect to SLURM; `parameters` by submitit's names. Raises ConfigError where either is missing or refuses them."""
        try:
            import submitit
        except ImportError:
            raise ConfigError("hydra/launcher=slurm needs submitit: pip install submitit") from None
        self._local, self._grace = local, grace
        try:
            self._executor = submitit.AutoExecutor(folder=sweep / FOLDER, cluster="local" if local else "slurm")
            self._executor.update_parameters(**parameters)
        except (RuntimeError, NameError, AssertionError) as error:
            raise ConfigError(f"hydra/launcher=slurm: {' '.join(str(error).split())}") from error

    def start(self, job: Job, header: str) -> QueuedAttempt:
        """Put the job into the queue. Raises RunError with the words of `sbatch` where it is refused."""
        log = job.folder / LOG
        task = NodeTask(NodeJob.of(job, header, self._grace))
        attempt = SlurmAttempt(log, local=self._local)
        self._executor.update_parameters(name=f"{job.folder.parent.name}_{job.name}"[:_LONGEST_NAME])
        try:
            attempt.submitted = self._executor.submit(task)
        except Exception as error:  # submitit has no class of its own for `sbatch` said no
            raise RunError(f"not submitted: {' '.join(str(error).split())[:300]}") from error
        return attempt


class SlurmAttempt(QueuedAttempt):
    """A SLURM job."""

    submitted: Any

    def __init__(self, log: Path, *, local: bool) -> None:
        super().__init__(log)
        self._local = local

    def _has_ended(self) -> bool:
        return bool(self.submitted.done())

    def _result(self) -> int:
        return next((int(code) for code in self.submitted.results() if code), 0)

    def _describe(self, error: Exception) -> str:
        return f"SLURM: {self.submitted.state}"

    def _cancel(self, *, force: bool) -> None:
        if self._local and not force:
            # Its stand-in for SLURM would kill a second later; SIGTERM it passes on, as SLURM does.
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.submitted.job_id), signal.SIGTERM)
        else:
            self.submitted.cancel(check=False)


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


class RayCluster(Executor):
    """Connects to a cluster, or starts Ray on this machine."""

    def __init__(self, address: str | None, *, threads: int, gpus: int, grace: float) -> None:
        """Each job takes `threads` cores and `gpus`. Raises ConfigError where Ray is missing or not to be reached."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise ConfigError("hydra/launcher=ray needs Ray: pip install ray") from None
        self._ray = ray
        self._grace = grace
        here: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"hydra.launcher.address={address}: {error}") from error
        self._node = ray.remote(NodeAgent)
        # Two calls at a time: the job, and the request to end it.
        self._needs = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 2}

    def start(self, job: Job, header: str) -> QueuedAttempt:
        """Hand the job to Ray, which starts it as soon as its cores and GPUs are free."""
        agent = self._node.options(**self._needs).remote()
        return RayAttempt(self._ray, agent, job, header, self._grace)

    def close(self) -> None:
        """Leave the cluster; a Ray that was started here ends."""
        self._ray.shutdown()


class NodeAgent:
    """An actor of Ray, one for each job: it has the job's cores and GPUs."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def run(self, job: NodeJob) -> int:
        """Run the job to its end."""
        return run_on_node(job, self._stop)

    def stop(self) -> None:
        """End the job, which ends `run`."""
        self._stop.set()


class RayAttempt(QueuedAttempt):
    """A job of a Ray cluster."""

    def __init__(self, ray: Any, agent: Any, job: Job, header: str, grace: float) -> None:
        super().__init__(job.folder / LOG)
        self._ray = ray
        self._agent = agent
        self._reference = agent.run.remote(NodeJob.of(job, header, grace))

    def _has_ended(self) -> bool:
        return bool(self._ray.wait([self._reference], timeout=0)[0])

    def _result(self) -> int:
        try:
            return int(self._ray.get(self._reference))
        finally:
            self._ray.kill(self._agent)

    def _describe(self, error: Exception) -> str:
        return f"Ray: {type(error).__name__}"

    def _cancel(self, *, force: bool) -> None:
        if force or not self.seconds:  # it may still wait for its cores
            self._ray.kill(self._agent)
        else:
            self._agent.stop.remote()
