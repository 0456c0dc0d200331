"""`run_dir=<run>`: the run's own settings in place of the defaults, with the command line on top of them."""

from __future__ import annotations

import argparse

from hydra.core.config_store import ConfigStore

from agentft.config.preflight import parse_overrides
from agentft.errors import ConfigError
from agentft.recipes.saved import SCHEMAS, primary_config, saved_config
from agentft.runs import RunFolder
from agentft.training.config import Resume

OF_THE_RUN = "settings_of_the_run"
"""Name that a run's own settings are composed by."""


def own_settings(arguments: argparse.Namespace) -> RunFolder | None:
    """Store the settings of the run that `run_dir=` names as the config `OF_THE_RUN`; None where it names none.

    Typed with --config-name, settings come from there. How far to go and whether to go on are not the run's, but asked
    anew each time.

    Raises:
        ConfigError: the run's settings cannot be read, or its experiment is another.
    """
    overrides = parse_overrides(arguments.overrides)
    typed = {o.key_or_group: str(o.value()) for o in overrides if not o.is_sweep_override()}
    if arguments.config_name is not None or arguments.multirun or not typed.get("run_dir"):
        return None
    run = RunFolder(typed["run_dir"])
    if not run.has_run():
        return None
    saved = saved_config(run.path)
    if typed.get("experiment", saved.experiment) != saved.experiment:
        raise ConfigError(
            f"experiment={typed['experiment']}: the run in {typed['run_dir']} is of experiment={saved.experiment or 'null'}; "
            "give another run_dir, or single settings"
        )
    saved.training.pause_at_fraction, saved.training.resume, saved.training.allow_changes = 1.0, Resume.auto, False
    node = primary_config(saved)
    node["defaults"].insert(-2, {"optional experiment": None})
    for group in typed.keys() & SCHEMAS.keys():
        # Its own option again means the run's own values; of another they would hide what it brings.
        if typed[group] != getattr(getattr(saved, group), "name", None):
            del node[group]
    ConfigStore.instance().store(name=OF_THE_RUN, node=node, provider="agentft")
    return run
