"""Composition whose errors are explained: what Hydra or OmegaConf refused, in one line of our words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException, ValidationError

from agentft.config.composing import compose
from agentft.config.groups import options
from agentft.config.known_settings import Setting, settings
from agentft.config.overrides import Scope
from agentft.config.wording import first_line, unknown_option, unknown_setting, wrong_value
from agentft.errors import ConfigError


def compose_or_explain(scope: Scope, fixed: Sequence[str], first: Mapping[str, str]) -> DictConfig:
    """Compose `fixed` and the first value of each swept setting; `ConfigError` says what was refused."""
    lines = [*fixed, *(f"{key}={value}" for key, value in first.items())]
    try:
        return compose(scope.config_name, lines, scope.config_dir, with_hydra=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(_explain(error, scope)) from error


def _explain(error: Exception, scope: Scope) -> str:
    """What Hydra or OmegaConf refused, in one line."""
    choices = _choices(scope)
    known = settings(scope.root, choices, scope.folders)
    if of_override := _refused_override(error, scope, choices, known):
        return of_override
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_file(error)
    if isinstance(error, yaml.YAMLError):
        return f"not YAML: {error}"
    return _refused_value(error, scope, choices, known)


def _refused_override(
    error: Exception, scope: Scope, choices: Mapping[str, str], known: Mapping[str, Setting]
) -> str | None:
    for override in scope.overrides:
        key = override.key_or_group
        if key not in known and not key.startswith("hydra") and not options(key, scope.folders):
            return unknown_setting(key, scope.root, choices, scope.folders)
        if override.is_add() and f"already at '{key}'" in str(error):
            return f"{key}: is there already; leave out the +"
        if override.is_delete():
            return f"{key}: settings cannot be removed; {key}=null where that is allowed"
    return None


def _no_such_file(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return f"--config-name {option}: no such file in conf/ or --config-dir"
    return unknown_option(group, option, [o for o in error.options or () if not o.startswith("schema_")])


def _refused_value(error: Exception, scope: Scope, choices: Mapping[str, str], known: Mapping[str, Setting]) -> str:
    """What the innermost error says, for the key it names."""
    origin: BaseException = error
    while origin.__cause__ is not None:
        origin = origin.__cause__
    text = f"{error}\n{origin}"
    in_file = re.search(r"In '([^']+)'", text)
    where = f"{in_file[1]}.yaml: " if in_file else ""
    key = getattr(origin, "full_key", None) or next(iter(re.findall(r"full_key: (\S+)", text)), "")
    if key and re.search(r"Key '.*' (not in|is not in struct)", text):
        return where + unknown_setting(key, scope.root, choices, scope.folders)
    if key and (isinstance(origin, ValidationError) or "ValidationError" in text):
        return where + wrong_value(key, text, scope.overrides, known)
    if isinstance(origin, AssertionError):  # OmegaConf, for model.shape.hidden=8 while model.shape is null
        nested = [o.key_or_group for o in scope.overrides if o.key_or_group.count(".") > 1]
        return f"{', '.join(nested)}: what it belongs to is null; give the whole, <setting>={{<name>:<value>}}"
    return where + (f"{key}: " if key and key not in str(origin) else "") + first_line(origin)


def _choices(scope: Scope) -> dict[str, str]:
    """Chosen option of each group, from the overrides that name one; whatever else is wrong is left out."""
    chosen = [str(o.input_line) for o in scope.overrides if options(o.key_or_group, scope.folders)]
    for lines in (chosen, []):
        try:
            composed = compose(scope.config_name, lines, scope.config_dir, with_hydra=True)
        except Exception:
            continue
        return {str(group): str(option) for group, option in composed.hydra.runtime.choices.items()}
    return {}
