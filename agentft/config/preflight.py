"""Check a command line before anything runs: compose what would run, each swept value once, and refuse what may not be said."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from agentft.config.compose import C, compose, refuse_unknown_keys, to_config, without_hydra
from agentft.config.errors import KEEP_IN_ENVIRONMENT, first_line, unknown_option, unknown_setting, wrong_value
from agentft.config.settings import Setting, conf_dir, options, settings
from agentft.errors import ConfigError
from agentft.model.config import TrustConfig
from agentft.recipes.config import TrainConfig
from agentft.recipes.saved import SCHEMAS
from agentft.runs import RunFolder
from agentft.secrets import is_secret_name
from agentft.sweeping.launcher import read_options


@dataclasses.dataclass
class Scope:
    """What a command line composes, and from where."""

    config_name: str
    config_dir: str | None
    root: type
    overrides: list[Override]

    @property
    def folders(self) -> list[Path]:
        return [conf_dir()] + ([Path(self.config_dir)] if self.config_dir is not None else [])


def parse_overrides(lines: Sequence[str]) -> list[Override]:
    """Each line parsed; `ConfigError` names the setting whose line cannot be read."""
    parser = OverridesParser.create()
    parsed = []
    for line in lines:
        try:
            parsed += parser.parse_overrides([line])
        except OverrideParseException as error:
            name = line.partition("=")[0]
            reason = f" ({first_line(error)})" if "=" in line and "Lexer" not in str(error) else ""
            expected = (
                "name=value; text with spaces, brackets or letters beyond ASCII in double quotes: 'name=\"a, b\"'"
            )
            raise ConfigError(f"{name}: cannot be read{reason}; expected {expected}") from error
        except HydraException as error:
            raise ConfigError(f"{line.partition('=')[0]}: {first_line(error)}") from error
    return parsed


def values_of(override: Override) -> list[str]:
    """The values of a sweep; none for an interval, which only its sweeper can draw from."""
    if not override.is_sweep_override():
        return [str(override.get_value_element_as_str())]
    return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []


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


def check_command(
    config_name: str, arguments: argparse.Namespace, root: type[C], own: RunFolder | None = None
) -> frozenset[str] | None:
    """Compose and check everything that would run; the names of the swept settings, None for a single run.

    Of a sweep each value is composed once, not each combination. `own`: the run whose settings stand for the defaults.
    """
    if arguments.hydra_help or arguments.info is not None or arguments.shell_completion:
        return None
    scope = Scope(
        arguments.config_name or config_name, arguments.config_dir, root, parse_overrides(arguments.overrides)
    )
    refuse_secrets(scope.overrides, root)
    refuse_settings_of_the_run(scope)
    refuse_unknown_options(scope)
    swept = {o.get_key_element(): values_of(o) for o in scope.overrides if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in scope.overrides if not o.is_sweep_override()]

    def first_of(sweep: Mapping[str, Sequence[str]]) -> dict[str, str]:
        return {key: values[0] for key, values in sweep.items() if values}

    given = {o.get_key_element() for o in scope.overrides}
    if {"run_dir", "hydra.run.dir"} <= given:
        raise ConfigError("run_dir and hydra.run.dir: two folders for one run; give run_dir=<folder> alone")
    typed = TrustConfig(**{each.name: f"model.{each.name}" in given for each in fields(TrustConfig)})
    source = (
        own.config_file if own else f"a file of {arguments.config_dir}" if arguments.config_dir else "a config file"
    )

    def check(composed: DictConfig) -> None:
        to_config(composed, root).model.require_typed(typed, source)

    composed = compose_or_explain(scope, fixed, first_of(swept))
    refuse_foreign_calls(composed.hydra)
    if arguments.cfg is not None:
        refuse_unknown_keys(without_hydra(composed), root)
        return None
    if not (arguments.multirun or composed.hydra.mode == RunMode.MULTIRUN):
        if swept:
            name, values = next(iter(swept.items()))
            several = ",".join(values)
            raise ConfigError(
                f"{name}={several}: several values; -m before it makes a sweep, {name}=[{several}] is a list"
            )
        check(composed)
        return None
    launcher = {str(name): value for name, value in composed.hydra.launcher.items() if name != "_target_"}
    if "place" in launcher:  # one of ours
        read_options(launcher)
    if "run_dir" in given:
        raise ConfigError("run_dir: names one folder, a sweep has many; give hydra.sweep.dir=<folder>")
    for override in parse_overrides(
        [f"{key}={value}" for key, value in (composed.hydra.sweeper.get("params") or {}).items()]
    ):
        if override.get_key_element() not in given:
            swept[override.get_key_element()] = values_of(override)
    for key, values in swept.items():
        for value in values:
            check(compose_or_explain(scope, fixed, {**first_of(swept), key: value}))
    return frozenset(swept)
