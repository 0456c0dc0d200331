"""Hydra finds the launchers here: the folder above is put on `sys.path`, and `hydra_plugins` has no `__init__.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from agentft.sweeping.launcher import LAUNCHERS, launch, read_options

for _name, _options in LAUNCHERS.items():
    ConfigStore.instance().store(group="hydra/launcher", name=_name, node=_options, provider="agentft")


class AgentftLauncher(Launcher):
    """Each job of a sweep in a process of its own."""

    def __init__(self, **options: Any) -> None:
        self.options = read_options(options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over before `launch`; the task itself runs in the processes."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run what is not finished yet, and return an outcome for each job."""
        from agentft.config.main import environment_as_given  # which has been imported when a sweep begins

        with environment_as_given():
            return launch(self.hydra_context, self.config, self.options, job_overrides, initial_job_idx)
