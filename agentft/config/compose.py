"""Compose settings by Hydra and turn them into checked dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import version
from hydra._internal import utils as hydra_utils
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from agentft import slurm
from agentft.config.errors import KEEP_IN_ENVIRONMENT, first_line, missing_value, unknown_setting
from agentft.config.settings import conf_dir, dotted
from agentft.errors import ConfigError
from agentft.recipes.config import AuditConfig, EvaluateConfig, ExportConfig, TrainConfig
from agentft.recipes.saved import ROOTS, SCHEMAS
from agentft.secrets import is_secret_name


def register_schemas() -> None:
    """Make the dataclasses known to Hydra as `schema_train`, `model/schema_model`, `sft_type/schema_lora`, ..."""
    plugins = str(Path(__file__).resolve().parent.parent / "plugins")
    if plugins not in sys.path:  # Hydra finds our launcher in the namespace package `hydra_plugins` there.
        sys.path.append(plugins)
    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(name=name, node=root, provider="agentft")
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=name, node=schema, provider="agentft")
    register_resolvers(swept=None)


def register_resolvers(swept: frozenset[str] | None) -> None:
    """The resolvers that YAML files use; `swept` names the settings of a sweep, None where all overrides count."""
    OmegaConf.register_new_resolver("start_stamp", _start_stamp, replace=True)
    OmegaConf.register_new_resolver("run_slug", _run_slug, replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)
    OmegaConf.register_new_resolver("sweep_slug", functools.partial(_sweep_slug, swept), replace=True)
    # As text and back, 1e-4 x 10 is 0.001 and not 0.0010000000000000002.
    OmegaConf.register_new_resolver("product", lambda a, b: float(f"{a * b:.12g}"), replace=True)


def _start_stamp(now: str) -> str:
    """The time of the start; in a batch job of SLURM its id, which stays when the job is queued again."""
    return f"slurm-{slurm.job_id()}" if slurm.is_batch_job() else now


_NOT_IN_NAMES = {"output_dir", "run_dir", "tracking", "experiment", "hydra"}


def _run_slug(*, _root_: DictConfig) -> str:
    """Choices and overridden values, `smollm2-135m_lora_synthetic_rank-4`: what tells one run folder from the next."""
    names = [str(_root_[group]["name"]) for group in ("model", "sft_type", "dataset")]
    return _slug(names + _overridden(_root_, None))


def _sweep_name(*, _root_: DictConfig) -> str:
    """The program and, where one was chosen for all jobs, the experiment: `train_msagent_7b_lora`."""
    chosen = _root_.hydra.runtime.choices.get("experiment")
    return _slug([str(_root_.hydra.job.config_name), *([str(chosen)] if chosen else [])])


def _sweep_slug(swept: frozenset[str] | None, *, _root_: DictConfig) -> str:
    """The swept values of one job, `rank-4_learning_rate-0.001`."""
    return _slug(_overridden(_root_, swept))


def _overridden(composed: DictConfig, only: frozenset[str] | None) -> list[str]:
    """`name-value` of each override in the order given; choices of groups only where `only` names them as swept."""
    if "hydra" in composed:
        hydra_node = composed.hydra
    elif HydraConfig.initialized():
        hydra_node = HydraConfig.get()
    else:
        return []
    parts = []
    for text in hydra_node.overrides.task:
        key, _, value = str(text).lstrip("+~").partition("=")
        if key.split(".")[0] in _NOT_IN_NAMES or (only is not None and key not in only):
            continue
        if key not in hydra_node.runtime.choices:
            # A path says little, and its slashes would make folders.
            parts.append(f"{key.split('.')[-1]}-{value.rstrip('/').split('/')[-1]}")
        elif only is not None:
            parts.append(value)
    return parts


def _slug(parts: Sequence[str]) -> str:
    clean = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._") for part in parts]
    return "_".join(part for part in clean if part)[:100].rstrip("-._") or "defaults"


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


C = TypeVar("C", TrainConfig, EvaluateConfig, AuditConfig, ExportConfig)


def to_train_config(composed: DictConfig) -> TrainConfig:
    """The composed settings of a training run as checked dataclasses; `ConfigError` says what is wrong."""
    return to_config(composed, TrainConfig)


def to_config(composed: DictConfig, root: type[C]) -> C:
    """The composed settings as `root`: no unknown key, no missing value, every value allowed by its room."""
    settings_only = without_hydra(composed)
    refuse_unknown_keys(settings_only, root)
    if missing := [key for key, value in _values_in(settings_only) if value == "???"]:
        raise ConfigError(missing_value(missing, root))
    try:
        config = OmegaConf.to_object(settings_only)
    except OmegaConfBaseException as error:
        # What it says of an interpolation: `Interpolation key 'sft_type.lr' not found`.
        raise ConfigError(f"{error.full_key!s}: {first_line(error)}") from error
    if not isinstance(config, root):
        raise ConfigError(f"--config-name: names a {type(config).__name__}, this program takes a {root.__name__}")
    return config


def refuse_unknown_keys(node: DictConfig, root: type) -> None:
    """A `+` adds keys even to a dataclass node: refuse whatever no dataclass has, and secrets by interpolation."""
    for key, container in _containers(node, ""):
        schema = OmegaConf.get_type(container)
        if schema is dict:
            continue  # another program's settings, given through
        known = {field.name for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else set()
        for name in container:
            if name not in known:
                raise ConfigError(unknown_setting(dotted(key, str(name)), root, _schemas_of(node)))
    for key, value in _values_in(node):
        if isinstance(value, str) and (found := re.search(r"\$\{oc\.env:([^},]+)", value)) and is_secret_name(found[1]):
            raise ConfigError(f"{key}: takes {found[1]} into the config; {KEEP_IN_ENVIRONMENT}")


def _containers(node: DictConfig, key: str) -> Iterator[tuple[str, DictConfig]]:
    yield key, node
    for name, child in node.items_ex(resolve=False):
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _containers(child, dotted(key, str(name)))


def _values_in(node: DictConfig) -> Iterator[tuple[str, Any]]:
    """Every value by its dotted name as it was written: `???` where missing, `${...}` where it refers to another."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        match value:
            case dict():
                for name, item in value.items():
                    yield from walk(item, dotted(key, str(name)))
            case list():
                for i, item in enumerate(value):
                    yield from walk(item, f"{key}[{i}]")
            case _:
                yield key, value

    return walk(OmegaConf.to_container(node, resolve=False), "")


def _schemas_of(node: DictConfig) -> dict[str, str]:
    """Schema of each group in a composed config, from the classes of its nodes."""
    return {
        group: name
        for group, schemas in SCHEMAS.items()
        for name, schema in schemas.items()
        if group in node and OmegaConf.get_type(node, group) is schema
    }
