"""Jobs as SLURM jobs, by submitit: one agent a node, the job's own command on each, the run folder on a shared disk.

Before SLURM's time limit, and where a job is preempted, submitit puts it into the queue again; it goes on from its last
checkpoint. `cluster=local` runs the same on this machine, with processes standing for nodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentft.errors import ConfigError, RunError
from agentft.sweeping.jobs import LOG, Job
from agentft.sweeping.places import NodeJob, QueuedAttempt, run_on_node
from agentft.sweeping.processes import descendants

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
