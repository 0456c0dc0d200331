"""Hydra finds the launcher here: the folder above is put on `sys.path`, and `hydra_plugins` has no `__init__.py`.

Hydra imports this module at every start, so the work stays in `agentft.sweeping` until a sweep begins. It executes the
module before it is in `sys.modules`, where a dataclass would look up annotations that are text: no
`from __future__ import annotations` here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class AgentftLauncherConfig:
    """`hydra.launcher.*`: how the jobs of a sweep are started."""

    _target_: str = "hydra_plugins.agentft_launcher.AgentftLauncher"
    slots: int | None = None
    """Jobs at a time; null: visible GPUs // gpus_per_job, without a GPU cores // threads_per_job."""
    gpus_per_job: int = 1
    """GPUs of one job, its own while it runs; 0: jobs see no GPU."""
    threads_per_job: int | None = None
    """CPU threads of one job; null: the cores shared out among the slots (without a GPU: one slot with all)."""
    retry: int = 0
    """Further attempts of a job that failed; it goes on from its last checkpoint."""
    time_limit: float | None = None
    """Minutes that an attempt may take; null: no limit."""
    grace: float = 20.0
    """Seconds that a job has to end by itself when it is stopped, before it is killed."""
    eta: int | None = None
    """Successive halving: one job in `eta` goes on from each rung; null: all jobs run to their end."""
    rungs: int = 3
    """Rungs of successive halving; the last is the end, each other at 1 / eta of the steps of the next."""


ConfigStore.instance().store(group="hydra/launcher", name="agentft", node=AgentftLauncherConfig, provider="agentft")


class AgentftLauncher(Launcher):
    """Each job of a sweep in a process of its own."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`; the task itself runs in the processes."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run what is not finished yet, and return an outcome for each job."""
        from agentft.sweeping.launch import LaunchOptions, launch

        return launch(self.hydra_context, self.config, LaunchOptions(**self.options), job_overrides, initial_job_idx)
