"""The check before a run: everything that would run is composed and checked first, each swept value once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields

from hydra.types import RunMode
from omegaconf import DictConfig

from agentft.config.checking import C, refuse_unknown_keys, to_config
from agentft.config.composing import without_hydra
from agentft.config.explaining import compose_or_explain
from agentft.config.overrides import Scope, parse_overrides, values_of
from agentft.config.refusals import (
    refuse_foreign_calls,
    refuse_secrets,
    refuse_settings_of_the_run,
    refuse_unknown_options,
)
from agentft.errors import ConfigError
from agentft.model.config import TrustConfig
from agentft.runs import RunFolder
from agentft.sweeping.options import read_options


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
        read_options(str(launcher.pop("place")), launcher)
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
