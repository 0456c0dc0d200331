"""Run the jobs of a sweep as processes of this machine on slots, or hand them to SLURM or Ray.

Whatever the place, a job is a process of its own with its run folder, `job.json` and `job.log`; what a sweep skips, tries
again, limits and reports is decided by the pool, which sees only attempts.

Before SLURM's time limit, and where a job is preempted, submitit puts it into the queue again; it goes on from its last
checkpoint. `cluster=local` runs the same on this machine, with processes standing for nodes.

What Ray runs does nothing but start the job's command and wait for it. All machines
must see the sweep folder under the same path and have agentft installed as this one has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agentft.errors import ConfigError, RunError
from agentft.runtime import available_cores
from agentft.sweeping.forks import ForkServer, can_fork, is_forkable
from agentft.sweeping.jobs import LOG, Job
from agentft.sweeping.processes import Attempt, FreshProcess, descendants


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the places; it holds one job at a time."""

    number: int
    gpus: tuple[str, ...] | None
    """As `CUDA_VISIBLE_DEVICES` names them; none of them: no GPU; None: nothing is said to the job."""
    threads: int

    def environment(self, threads: int | None = None) -> dict[str, str]:
        """The variables that keep a job inside its slot."""
        count = str(threads or self.threads)
        devices = {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        # NumPy's pool would start at its import, where jobs are forked; nothing heavy is left to it.
        numpy = {"OPENBLAS_NUM_THREADS": "1"}
        return devices | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "RAYON_NUM_THREADS": count} | numpy


def make_slots(
    slots: int | None, gpus_per_job: int, threads_per_job: int | None, gpus: list[str], cores: int | None = None
) -> list[Slot]:
    """Share GPUs and cores out; no two slots have a GPU in common.

    Raises:
        ConfigError: more is asked for than there is.
    """
    cores = cores or available_cores()
    on_gpu = bool(gpus) and gpus_per_job > 0
    if not on_gpu and gpus_per_job > 1:
        raise ConfigError(f"hydra.launcher.gpus_per_job={gpus_per_job}: no GPU is visible")
    if on_gpu:
        most = len(gpus) // gpus_per_job
        if most == 0 or (slots or 0) > most:
            raise ConfigError(
                f"hydra.launcher: {slots or 1} slot(s) with {gpus_per_job} GPU(s) each, but {len(gpus)} GPU(s) are visible"
            )
        slots = slots or most
    slots = slots or (max(1, cores // threads_per_job) if threads_per_job else 1)
    threads = threads_per_job or max(1, cores // slots)

    def share(i: int) -> tuple[str, ...] | None:
        if on_gpu:
            return tuple(gpus[i * gpus_per_job : (i + 1) * gpus_per_job])
        # Where no GPU was found, one may be there all the same: only `gpus_per_job=0` hides it.
        return () if gpus_per_job == 0 else None

    return [Slot(i, share(i), threads) for i in range(slots)]


def visible_gpus(environ: Mapping[str, str] | None = None) -> list[str]:
    """The GPUs that this process may use, by the names that `CUDA_VISIBLE_DEVICES` takes; asked without torch."""
    named = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        found = []
        for name in (part.strip() for part in named.split(",")):
            if not name or name.startswith("-"):  # CUDA ignores the rest
                break
            found.append(name)
        return found
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    parts = re.findall(r"UUID: (MIG-[^)\s]+)", listed)
    return parts or re.findall(r"^GPU (\d+):", listed, flags=re.MULTILINE)


class Executor(Protocol):
    """Starts attempts; closed at the end of the sweep."""

    def start(self, job: Job, header: str) -> Attempt:
        """Start an attempt of a job. Raises OSError or RunError where it cannot be started."""

    def close(self) -> None:
        """Leave what was set up for the sweep."""


class ThisMachine:
    """Jobs as processes of this machine: forked from one that has imported the libraries, where that is sound."""

    def __init__(self, modules: Sequence[str], slot: Slot, say: Callable[[str], None]) -> None:
        """`modules` are what forked jobs find imported; none: every job is a fresh interpreter."""
        self._say = say
        self._threads = slot.threads
        self._server: ForkServer | None = None
        if modules and not slot.gpus and can_fork():
            self._server = ForkServer(modules, slot.environment())

    def start(self, job: Job, header: str) -> Attempt:
        """Start the job's command, its output in `job.log`."""
        log = job.folder / LOG
        if self._server is not None and job.threads == self._threads and is_forkable(job.command):
            try:
                return self._server.start(job.command, job.environment, log, header)
            except RunError as error:
                self._say(f"each job imports its libraries itself from here on: {error}")
                self.close()
                header = ""
        return FreshProcess(job.command, job.environment, log, header)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
            self._server = None


class QueuedAttempt:
    """What the attempts of a cluster have in common; whether one has begun is seen in its `job.log`."""

    pid: int | None = None
    lost: str | None = None

    def __init__(self, log: Path) -> None:
        self._log = log
        self._size = _size(log)
        self._began: float | None = None
        self._stop_began: float | None = None
        self._patience = 0.0

    @property
    def seconds(self) -> float:
        """Since the job was seen to have begun; 0 while it waits in the cluster's queue."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def stopping(self) -> bool:
        return self._stop_began is not None

    def stop(self, grace: float) -> None:
        """Cancel it; what runs on the node ends the job within its own grace."""
        self._patience = 0.0 if self.stopping else grace
        self._stop_began = self._stop_began or time.monotonic()
        self._cancel(force=self._patience == 0.0)

    def poll(self) -> int | None:
        """The exit code of the job, negative for a signal; `lost` says why there is none of its own."""
        code = self._result()
        self._notice_begin()
        if code is None and 0.0 < self._patience < self._since_stop() - _SLOWNESS:
            self._patience = 0.0
            self._cancel(force=True)
        return code

    def _notice_begin(self) -> None:
        if self._began is None and _size(self._log) > self._size:
            self._began = time.monotonic()

    def _since_stop(self) -> float:
        return time.monotonic() - (self._stop_began or time.monotonic())

    def _result(self) -> int | None:
        raise NotImplementedError

    def _cancel(self, *, force: bool) -> None:
        raise NotImplementedError


_SLOWNESS = 15.0
"""Seconds that a cluster may take to pass on a cancellation."""


@dataclass(kw_only=True, frozen=True)
class NodeJob:
    """What a node must know to run a job: small, and nothing but text."""

    command: list[str]
    environment: dict[str, str]
    log: str
    header: str
    working_folder: str
    """In which the command's paths are meant."""
    grace: float

    @classmethod
    def of(cls, job: Job, header: str, grace: float) -> NodeJob:
        """The job as any machine with the same files can run it."""
        log, here = str(job.folder / LOG), str(Path.cwd())
        return cls(
            command=list(job.command),
            environment=dict(job.environment),
            log=log,
            header=header,
            working_folder=here,
            grace=grace,
        )


def run_on_node(job: NodeJob, stop: threading.Event) -> int:
    """Run a job on the machine where this is called, and return its exit code; once `stop` is set it is ended first."""
    command = [*_TIED, *job.command] if sys.platform == "linux" else job.command
    process = FreshProcess(command, job.environment, Path(job.log), job.header, job.working_folder)
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
_TIED = [sys.executable, "-c", _TIE]
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
    """What each node of a job runs. The first node's log and exit code are the job's."""

    def __init__(self, job: NodeJob) -> None:
        self.job = job

    def __call__(self) -> int:
        import submitit

        place = submitit.JobEnvironment()
        log = self.job.log if place.global_rank == 0 else f"{self.job.log}.node{place.global_rank}"
        stop = threading.Event()
        # SLURM asks a cancelled job by SIGTERM, which submitit would pass over.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        job = dataclasses.replace(self.job, log=log, environment=self.job.environment | nodes_of(place))
        return run_on_node(job, stop)

    def checkpoint(self) -> Any:
        """Called by submitit, within the job's last seconds: end the job, which saves, and say what starts again."""
        import submitit

        for child in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGINT)
        until = time.monotonic() + self.job.grace
        with contextlib.suppress(ChildProcessError):  # none is left
            while time.monotonic() < until:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(self)


class Slurm:
    """Submits jobs."""

    def __init__(self, parameters: Mapping[str, Any], sweep: Path, *, local: bool, grace: float) -> None:
        """`parameters` by the names of submitit. Raises ConfigError where it or SLURM is missing, or refuses them."""
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

    def close(self) -> None:
        """Nothing is held."""


class SlurmAttempt(QueuedAttempt):
    """A SLURM job."""

    submitted: Any

    def __init__(self, log: Path, *, local: bool) -> None:
        super().__init__(log)
        self._local = local
        self._code: int | None = None

    def _result(self) -> int | None:
        if self._code is None and self.submitted.done():
            try:
                codes = self.submitted.results()
                self._code = next((code for code in codes if code), 0)
            except Exception as error:
                self._code = 1
                self.lost = f"SLURM: {self.submitted.state}: {' '.join(str(error).split())[:300]}"
        return self._code

    def _cancel(self, *, force: bool) -> None:
        if self._local and not force:
            # Its stand-in for SLURM would kill a second later; SIGTERM it passes on, as SLURM does.
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.submitted.job_id), signal.SIGTERM)
        else:
            self.submitted.cancel(check=False)


def nodes_of(place: Any) -> dict[str, str]:
    """The variables by which a job of several nodes finds the others; empty for one node."""
    if place.num_tasks == 1:
        return {}
    return {
        "AGENTFT_NODES": str(place.num_tasks),
        "AGENTFT_NODE": str(place.global_rank),
        "AGENTFT_FIRST_HOST": place.hostnames[0],
        "AGENTFT_JOB_ID": str(place.job_id),
    }


class RayCluster:
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
        # Two calls at a time: the job, and the word to end it.
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
        self._code: int | None = None

    def _result(self) -> int | None:
        if self._code is None and self._ray.wait([self._reference], timeout=0)[0]:
            try:
                self._code = int(self._ray.get(self._reference))
            except Exception as error:
                self._code = 1
                self.lost = f"Ray: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self._ray.kill(self._agent)
        return self._code

    def _cancel(self, *, force: bool) -> None:
        if force or not self.seconds:  # it may still wait for its cores
            self._ray.kill(self._agent)
        else:
            self._agent.stop.remote()
