"""Hydra finds the launchers here: the folder above is put on `sys.path`, and `hydra_plugins` has no `__init__.py`.

Hydra imports this module at every start, so the work stays in `agentft.sweeping` until a sweep begins. It executes the
module before it is in `sys.modules`, where a dataclass would look up annotations that are text: no
`from __future__ import annotations` here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class _EveryLauncher:
    """What `hydra.launcher.*` has with each of our launchers."""

    _target_: str = "hydra_plugins.agentft_launcher.AgentftLauncher"
    place: str = "agentft"
    """Where jobs run; set by the choice of the launcher."""
    slots: int | None = None
    """Jobs at a time; null: visible GPUs // gpus_per_job, without a GPU cores // threads_per_job; in a queue, all."""
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


@dataclass
class AgentftLauncherConfig(_EveryLauncher):
    """`hydra/launcher=agentft`: processes of this machine."""

    gpus_per_job: int = 1
    """GPUs of one job, its own while it runs; 0: jobs see no GPU."""
    threads_per_job: int | None = None
    """CPU threads of one job; null: the cores shared out among the slots (without a GPU: one slot with all)."""
    warm_start: bool = True
    """Without a GPU, on Linux: fork jobs from one process that has imported the libraries; false: never."""


@dataclass
class RayLauncherConfig(_EveryLauncher):
    """`hydra/launcher=ray`: tasks of a Ray cluster."""

    place: str = "ray"
    address: str | None = None
    """Of the cluster (`auto`, `ray://host:10001`); null: RAY_ADDRESS, else Ray is started on this machine."""
    threads_per_job: int = 1
    """Cores of one job."""
    gpus_per_job: int = 0
    """GPUs of one job."""


@dataclass
class SlurmLauncherConfig(_EveryLauncher):
    """`hydra/launcher=slurm`: jobs in SLURM's queue, by submitit."""

    place: str = "slurm"
    cluster: str = "slurm"
    """`slurm`, or `local`: processes of this machine stand for nodes."""
    nodes: int = 1
    """Nodes of one job; its command is started once on each."""
    threads_per_job: int = 1
    """Cores of one job on each node."""
    gpus_per_node: int = 0
    """GPUs of one job on each node."""
    memory_gb: float | None = None
    """Memory of one job on each node; null: SLURM's default."""
    minutes: int = 1440
    """SLURM's time limit; shortly before it a job goes back into the queue and on from its last checkpoint."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the job, such as `module load cuda`."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Further options of `sbatch` by their long names."""


for _name, _config in (("agentft", AgentftLauncherConfig), ("ray", RayLauncherConfig), ("slurm", SlurmLauncherConfig)):
    ConfigStore.instance().store(group="hydra/launcher", name=_name, node=_config, provider="agentft")


class AgentftLauncher(Launcher):
    """Each job of a sweep in a process of its own."""

    def __init__(self, place: str, **options: Any) -> None:
        self.place = place
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`; the task itself runs in the processes."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run what is not finished yet, and return an outcome for each job."""
        from agentft.sweeping.launcher import launch
        from agentft.sweeping.options import read_options

        options = read_options(self.place, self.options)
        return launch(self.hydra_context, self.config, options, job_overrides, initial_job_idx)
