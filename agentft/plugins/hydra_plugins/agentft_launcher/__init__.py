"""Hydra finds the launchers here: the folder above is put on `sys.path`, and `hydra_plugins` has no `__init__.py`."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from agentft.sweeping.launcher import LAUNCHERS, SweepLauncher

for _name, _options in LAUNCHERS.items():
    ConfigStore.instance().store(group="hydra/launcher", name=_name, node=_options, provider="agentft")


class AgentftLauncher(SweepLauncher):
    """Hydra takes only classes that are defined here."""
