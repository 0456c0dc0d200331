"""From composed settings to checked dataclasses: no unknown key, no missing value, no secret."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agentft.config.composing import without_hydra
from agentft.config.known_settings import dotted
from agentft.config.wording import KEEP_IN_ENVIRONMENT, first_line, missing_value, unknown_setting
from agentft.errors import ConfigError
from agentft.recipes.config import AuditConfig, EvaluateConfig, ExportConfig, TrainConfig
from agentft.recipes.saved import SCHEMAS
from agentft.secrets import is_secret_name

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
