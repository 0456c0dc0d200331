"""Jobs on a Ray cluster: Ray finds the machine and the GPUs, the job there is a process of its own.

What Ray runs does nothing but start the job's command and wait for it. All machines
must see the sweep folder under the same path and have agentft installed as this one has.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from agentft.errors import ConfigError
from agentft.sweeping.jobs import LOG, Job
from agentft.sweeping.places import NodeJob, QueuedAttempt, run_on_node


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
