"""What a command line may not say: secrets, unknown options, and names of things to call."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agentft.config.groups import options
from agentft.config.known_settings import settings
from agentft.config.overrides import Scope, values_of
from agentft.config.wording import KEEP_IN_ENVIRONMENT, unknown_option
from agentft.errors import ConfigError
from agentft.recipes.config import TrainConfig
from agentft.recipes.saved import SCHEMAS
from agentft.secrets import is_secret_name


def refuse_secrets(overrides: Sequence[Override], root: type) -> None:
    """`ConfigError` where a name looks like a secret and is no setting of ours: configs are saved."""
    known = {name.split(".")[-1] for name in settings(root)}
    for override in overrides:
        value = override._value if not override.is_sweep_override() else None
        for name in [*override.key_or_group.split("."), *_keys_and_names(value, override.key_or_group)]:
            if is_secret_name(name) and not difflib.get_close_matches(name, known, 1, 0.8):
                raise ConfigError(f"{override.key_or_group}: looks like a secret; {KEEP_IN_ENVIRONMENT}")


def _keys_and_names(value: Any, key: str) -> Iterator[str]:
    """Names inside a dict value; for `hydra.job.env_copy`, which writes values into files, its items too."""
    match value:
        case dict():
            for name, item in value.items():
                yield str(name)
                yield from _keys_and_names(item, key)
        case list():
            for item in value:
                yield from [str(item)] if key.endswith("env_copy") else _keys_and_names(item, key)


_CALLED_BY_HYDRA = (
    re.compile(r"hydra\._internal\.core_plugins\.\w+\.\w+"),
    re.compile(r"hydra_plugins\.[\w.]+(Launcher|Sweeper)"),
    re.compile(r"optuna\.samplers\.\w+"),
)
"""What a `_target_` of Hydra's own node may name: launchers, sweepers and their samplers."""


_LOGGING_CLASSES = ("logging.", "colorlog.", "rich.logging.")


def refuse_foreign_calls(hydra_node: DictConfig) -> None:
    """Hydra builds objects from its own node: by `_target_`, by callbacks, and by the `class` and `()` of logging.

    The names are looked at as text, before anything is imported for them.
    """
    if hydra_node.get("callbacks"):
        raise ConfigError("hydra.callbacks: refused; agentft calls nothing that a config names")
    # Resolved, so that no interpolation hides a name; what refers to a job that does not run yet is left as it is.
    waiting: list[tuple[str, Any]] = [("hydra", hydra_node)]
    while waiting:
        key, node = waiting.pop()
        names = list(node) if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            where = f"{key}.{name}"
            try:
                value = node[name]
            except OmegaConfBaseException:
                continue
            if OmegaConf.is_config(value):
                waiting.append((where, value))
            elif value is not None and _calls_something_else(str(name), str(value)):
                raise ConfigError(f"{where}={value}: refused; agentft calls nothing that a config names")


def _calls_something_else(name: str, value: str) -> bool:
    match name:
        case "_target_":
            return not any(allowed.fullmatch(value) for allowed in _CALLED_BY_HYDRA)
        case "class":
            return not value.startswith(_LOGGING_CLASSES)
        case "()" | "_partial_" | "_args_" | "custom_search_space":
            return True
    return False


def refuse_settings_of_the_run(scope: Scope) -> None:
    """`evaluate.py run=... model.dtype=fp32`: a setting that there is, and that is the run's."""
    if "run" not in scope.root.__annotations__:
        return
    here, of_training = settings(scope.root), settings(TrainConfig)
    for override in scope.overrides:
        key = override.key_or_group
        if (key not in here and key in of_training) or key == "model":
            names = ", ".join(name for name in here if "." not in name)
            raise ConfigError(f"{key}: is the run's, which stays as it was trained; settings here: {names}")


def refuse_unknown_options(scope: Scope) -> None:
    """`model=smolm2`. Hydra's own check cannot do it: it skips an unknown option of an `optional` group in silence."""
    if any(override.key_or_group == "hydra.searchpath" for override in scope.overrides):
        return
    for override in scope.overrides:
        group = override.key_or_group
        found = options(group, scope.folders)
        if not found or override.is_delete():
            continue
        for option in values_of(override):
            if option.startswith(("{", "[")):
                raise ConfigError(
                    f"{group}={option}: {group} is a group; give {group}=<option> or {group}.<setting>=<value>"
                )
            if option not in found and option not in SCHEMAS.get(group, {}) and option != "null":
                raise ConfigError(unknown_option(group, option, found))
