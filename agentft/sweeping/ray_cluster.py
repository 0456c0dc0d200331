"""Jobs as tasks of a Ray cluster: Ray finds the machine and the GPUs, the job there is a process of its own.

A task is nothing but the job's command, so that Ray's workers, which are used again, hold nothing of a run. All machines
must see the sweep folder under the same path and have agentft installed as this one has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
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
            raise ConfigError("hydra/launcher=ray needs Ray: pip install 'agentft[ray]'") from None
        self._ray = ray
        self._grace = grace
        here: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"hydra.launcher.address={address}: {error}") from error
        self._task = ray.remote(run_on_node)
        self._needs = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 0}

    def start(self, job: Job, header: str) -> QueuedAttempt:
        """Hand the job to Ray, which starts it as soon as its cores and GPUs are free."""
        log = job.folder / LOG
        task = self._task.options(name=job.name, **self._needs)
        return RayAttempt(self._ray, log, lambda: task.remote(NodeJob.of(job, header, self._grace)))

    def close(self) -> None:
        """Leave the cluster; a Ray that was started here ends."""
        self._ray.shutdown()


class RayAttempt(QueuedAttempt):
    """A task of Ray."""

    def __init__(self, ray: Any, log: Path, submit: Callable[[], Any]) -> None:
        super().__init__(log)
        self._ray = ray
        self._reference = submit()
        self._code: int | None = None

    def _result(self) -> int | None:
        if self._code is None and self._ray.wait([self._reference], timeout=0)[0]:
            try:
                self._code = int(self._ray.get(self._reference))
            except self._ray.exceptions.TaskCancelledError:
                self._code = 1
                self.lost = "cancelled in Ray's queue"
            except Exception as error:
                self._code = 1
                self.lost = f"Ray: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return self._code

    def _cancel(self, *, force: bool) -> None:
        self._ray.cancel(self._reference, force=force)
