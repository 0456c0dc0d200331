"""`hydra.launcher.*` of each launcher, and the slots and the place that they come to."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from agentft.errors import ConfigError
from agentft.sweeping.backends import Executor, Slot, ThisMachine, make_slots, visible_gpus
from agentft.sweeping.pool import Rules


@dataclass(kw_only=True)
class LaunchOptions(Rules):
    """What every launcher has; the fields are explained in `agentft.plugins`."""

    slots: int | None = field(default=None, metadata={"minimum": 1, "maximum": 10**5})
    eta: int | None = field(default=None, metadata={"minimum": 2, "maximum": 1000})
    rungs: int = field(default=3, metadata={"minimum": 2, "maximum": 100})

    def make_slots(self, jobs: int) -> list[Slot]:
        """The places for jobs, for a sweep of so many."""
        raise NotImplementedError

    def make_place(
        self, slots: Sequence[Slot], sweep: Path, modules: Sequence[str], say: Callable[[str], None]
    ) -> Executor:
        """Where they run; `modules` are those that a job imports."""
        raise NotImplementedError


@dataclass(kw_only=True)
class LocalOptions(LaunchOptions):
    """`hydra/launcher=agentft`."""

    gpus_per_job: int = field(default=1, metadata={"minimum": 0, "maximum": 1024})
    threads_per_job: int | None = field(default=None, metadata={"minimum": 1, "maximum": 1024})
    warm_start: bool = True

    def make_slots(self, jobs: int) -> list[Slot]:
        """GPUs and cores of this machine, shared out."""
        return make_slots(self.slots, self.gpus_per_job, self.threads_per_job, visible_gpus())

    def make_place(
        self, slots: Sequence[Slot], sweep: Path, modules: Sequence[str], say: Callable[[str], None]
    ) -> Executor:
        """Processes of this machine."""
        return ThisMachine(modules if self.warm_start else (), slots[0], say)


@dataclass(kw_only=True)
class _QueueOptions(LaunchOptions):
    """Of launchers that hand jobs to a queue, which knows the machines."""

    threads_per_job: int = field(default=1, metadata={"minimum": 1, "maximum": 1024})

    def make_slots(self, jobs: int) -> list[Slot]:
        """One for each job, unless fewer are wanted: waiting is the queue's work."""
        count = max(1, min(jobs, self.slots or jobs))
        return [Slot(i, None, self.threads_per_job) for i in range(count)]


@dataclass(kw_only=True)
class RayOptions(_QueueOptions):
    """`hydra/launcher=ray`."""

    address: str | None = None
    gpus_per_job: int = field(default=0, metadata={"minimum": 0, "maximum": 1024})

    def make_place(
        self, slots: Sequence[Slot], sweep: Path, modules: Sequence[str], say: Callable[[str], None]
    ) -> Executor:
        """A Ray cluster."""
        from agentft.sweeping.backends import RayCluster

        return RayCluster(self.address, threads=self.threads_per_job, gpus=self.gpus_per_job, grace=self.grace)


@dataclass(kw_only=True)
class SlurmOptions(_QueueOptions):
    """`hydra/launcher=slurm`."""

    cluster: str = "slurm"
    nodes: int = field(default=1, metadata={"minimum": 1, "maximum": 10**5})
    gpus_per_node: int = field(default=0, metadata={"minimum": 0, "maximum": 1024})
    memory_gb: float | None = field(default=None, metadata={"above": 0, "maximum": 10**6})
    minutes: int = field(default=1440, metadata={"minimum": 1, "maximum": 10**6})
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)

    def make_place(
        self, slots: Sequence[Slot], sweep: Path, modules: Sequence[str], say: Callable[[str], None]
    ) -> Executor:
        """The queue of SLURM."""
        from agentft.sweeping.backends import Slurm

        return Slurm(_submitit_parameters(self), sweep, local=self.cluster == "local", grace=self.grace)


def _submitit_parameters(options: SlurmOptions) -> dict[str, Any]:
    """By the names of submitit; None is left out."""
    local = options.cluster == "local"
    shared = {
        "nodes": 1 if local else options.nodes,
        "tasks_per_node": options.nodes if local else 1,
        "cpus_per_task": options.threads_per_job,
        "gpus_per_node": options.gpus_per_node or None,
        "mem_gb": options.memory_gb,
        "timeout_min": options.minutes,
    }
    if local:
        return shared
    return shared | {
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "slurm_qos": options.qos,
        "slurm_constraint": options.constraint,
        "slurm_setup": options.setup or None,
        "slurm_additional_parameters": options.parameters or None,
    }


_KINDS: dict[str, type[LaunchOptions]] = {"agentft": LocalOptions, "ray": RayOptions, "slurm": SlurmOptions}


def read_options(place: str, values: Mapping[str, Any]) -> LaunchOptions:
    """Return the options of the launcher `place` from Hydra's values for it.

    Raises:
        ConfigError: there is no such place, or a number is outside of its range.
    """
    if place not in _KINDS:
        raise ConfigError(f"hydra.launcher.place={place}: expected one of {', '.join(_KINDS)}")
    plain = {
        name: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value for name, value in values.items()
    }
    return _KINDS[place](**typing.cast("dict[str, Any]", plain))
