"""Composition by Hydra without running, and without its checks in our words."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from hydra import version
from hydra._internal import utils as hydra_utils
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from agentft.config.groups import conf_dir
from agentft.config.registration import register_schemas

VERSION_BASE = "1.3"


def compose(
    config_name: str = "train",
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    with_hydra: bool = False,
) -> DictConfig:
    """Compose without running, for tests, notebooks and the check before a run; raises what Hydra raises.

    `config_dir` is searched besides `conf/`, as `--config-dir` does; `with_hydra` keeps Hydra's own node.
    """
    register_schemas()
    version.setbase(VERSION_BASE)
    search_path = hydra_utils.create_config_search_path(str(conf_dir()))
    if config_dir is not None:
        # As --config-dir does. `hydra.searchpath` would not do: the primary config is looked for before it is read.
        path = f"file://{Path(config_dir).resolve()}"
        search_path.prepend(provider="command-line", path=path, anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        composer = Hydra.create_main_hydra2(task_name=config_name, config_search_path=search_path)
        composed = composer.compose_config(config_name, list(overrides), RunMode.RUN, from_shell=False)
    finally:
        GlobalHydra.instance().clear()
    return composed if with_hydra else without_hydra(composed)


def without_hydra(composed: DictConfig) -> DictConfig:
    """A copy without Hydra's own node."""
    settings_only = copy.deepcopy(composed)
    with open_dict(settings_only):
        settings_only.pop("hydra", None)
    return settings_only
