"""Run an entry point: read the command line, check all that it would run, call the recipe, and report errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agentft.config.compose import (
    KEEP_IN_ENVIRONMENT,
    VERSION_BASE,
    C,
    check_keys,
    compose,
    conf_dir,
    old_names,
    options,
    register_resolvers,
    register_schemas,
    schemas_of,
    searching,
    to_config,
    with_keys_of_others,
    without_hydra,
)
from agentft.config.explain import explain, first_line, help_text, settings, unknown_option
from agentft.errors import AgentftError, ConfigError, DataError
from agentft.model.config import TrustConfig
from agentft.progress import outlive_console
from agentft.recipes.config import (
    RENAMED,
    SCHEMAS,
    EvaluateConfig,
    TrainConfig,
    primary_config,
    require_typed,
    saved_config,
)
from agentft.runs import DISTRIBUTION, SWEEP_FOLDER_VARIABLE, RunFolder, readable
from agentft.secrets import is_secret_name, redact_text
from agentft.settings import environment_variables
from agentft.sweeping.launcher import read_options
from agentft.training.config import Resume

# --- Flags ---

_HYDRA_ANSWERS = ("hydra_help", "info", "shell_completion", "version")
"""Flags that nothing is run for."""


class _Parser(argparse.ArgumentParser):
    """Hydra's flags; `hydra.main` reads them again."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        self.add_argument("overrides", nargs="*")
        for names in ("--help -h", "--help-all", "--hydra-help", "--version", "--resolve"):
            self.add_argument(*names.split(), action="store_true")
        for names in ("--config-name -cn", "--config-dir -cd", "--package -p"):
            self.add_argument(*names.split())
        one_of = self.add_mutually_exclusive_group()
        for names in ("--run -r", "--multirun -m", "--shell-completion -sc"):
            one_of.add_argument(*names.split(), action="store_true")
        one_of.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
        one_of.add_argument("--info", "-i", nargs="?", const="all")

    def error(self, message: str) -> NoReturn:
        """Refuse the command line; values stay out of the message, since one of them could be a key."""
        hint = "settings are written name=value; put flags such as --cfg or -m before all settings; see --help"
        raise ConfigError(re.sub(r"=\S*", "=...", message) + f"; {hint}")


def parse_arguments(root: type) -> argparse.Namespace:
    """Read `sys.argv`, and write into it what Hydra is to read: today's names for old ones, which are noted in `old_names`.

    Raises:
        ConfigError: agentft does not take a flag, or `--config-dir` is no folder.
    """
    words = with_keys_of_others(sys.argv[1:])
    for i, word in enumerate(words):
        for old, new in RENAMED.items():
            if (match := re.match(rf"(\+{{0,2}}){re.escape(old)}=", word)) is not None:
                words[i] = f"{match[1]}{new}={word[match.end() :]}"
                old_names[f"{old} is {new} now"] = None
        packaged = conf_dir().parent / word
        if i and words[i - 1] in ("--config-dir", "-cd") and not Path(word).is_dir() and packaged.is_dir():
            words[i] = str(packaged)  # `--config-dir sweeps`: the one that came with agentft
    if root is EvaluateConfig:
        words = with_evaluation_of_the_run(words)
    sys.argv[1:] = words
    arguments = _Parser().parse_args(words)
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        raise ConfigError(f"--config-dir {arguments.config_dir}: no such folder")
    return arguments


# --- What the command line asks for ---


def _parse_overrides(lines: Sequence[str]) -> list[Override]:
    """Return each line parsed; `ConfigError` names the setting whose line cannot be read."""
    parser = OverridesParser.create()
    parsed = []
    for line in lines:
        try:
            parsed += parser.parse_overrides([line])
        except HydraException as error:
            reason = f" ({first_line(error)})" if "=" in line and "Lexer" not in str(error) else ""
            quotes = "text with spaces, brackets or letters beyond ASCII in double quotes: 'name=\"a, b\"'"
            name = line.partition("=")[0]
            raise ConfigError(f"{name}: cannot be read{reason}; expected name=value; {quotes}") from error
    return parsed


def _values_of(override: Override) -> list[str]:
    """Return the values of a sweep; none for an interval, which only its sweeper can draw from.

    Raises:
        ConfigError: Hydra makes other values of a range than it says.
    """
    if not override.is_sweep_override():
        return [str(override.get_value_element_as_str())]
    values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    line = str(override.input_line)
    if isinstance(override.value(), RangeSweep) and ("reverse" in line or any(len(each) > 16 for each in values)):
        raise ConfigError(f"{line}: Hydra makes {', '.join(values[:6])} of this range; write the values with commas")
    return values


@dataclasses.dataclass
class Command:
    """What a command line composes, and from where."""

    config_name: str
    config_dir: str | None
    root: type
    overrides: list[Override]
    run: RunFolder | None = None
    """The run whose own settings take the place of the defaults."""

    @property
    def folders(self) -> list[Path]:
        """Folders of the config groups."""
        return [conf_dir()] + ([Path(self.config_dir)] if self.config_dir is not None else [])

    def compose(self, lines: Sequence[str]) -> DictConfig:
        """Compose, Hydra's own node included; `ConfigError` names what was refused."""
        try:
            return compose(self.config_name, lines, self.config_dir, with_hydra=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, AssertionError, ValueError, TypeError) as error:
            reason = explain(error, self.overrides, self.root, self._schemas(lines), self.folders)
            raise ConfigError(reason) from error

    def _schemas(self, lines: Sequence[str]) -> dict[str, str]:
        """Return the schema of each group: by the options in `lines`, or without the experiment where that is what fails."""
        chosen = [line for line in lines if line.partition("=")[0] in (*SCHEMAS, "experiment")]
        for some in (chosen, [line for line in chosen if not line.startswith("experiment=")], []):
            with contextlib.suppress(Exception):
                return schemas_of(compose(self.config_name, some, self.config_dir))
        return {}


OF_THE_RUN = "settings_of_the_run"
"""Name that a run's own settings are composed by."""

AS_TRAINED = ("evaluation=as_trained", f"evaluation={OF_THE_RUN}")
"""As one types it, and as a run's record has it."""


def with_evaluation_of_the_run(words: list[str]) -> list[str]:
    """Return a command line of `evaluate.py` that changes some `evaluation` settings and takes all others from the run.

    Hydra would otherwise have nothing to change: what is not chosen is null. A sweep leaves this to its jobs.

    Raises:
        ConfigError: `run=...` cannot be read.
    """
    chosen = [word for word in words if word.partition("=")[0].lstrip("+") == "evaluation"]
    changes = any(word.lstrip("+~").startswith("evaluation.") for word in words)
    if not {*chosen} <= {*AS_TRAINED} or not (changes or chosen):
        return words
    choice = AS_TRAINED[0]
    runs = _parse_overrides([word for word in words if word.startswith("run=")])
    if runs and not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.intersection(words):
        with contextlib.suppress(AgentftError):  # the evaluation itself says what is wrong with the run
            settings = primary_config(saved_config(str(runs[-1].value())))["evaluation"]
            node = {"defaults": ["schema_evaluation", "_self_"], **settings}
            ConfigStore.instance().store(group="evaluation", name=OF_THE_RUN, node=node, provider="agentft")
            choice = AS_TRAINED[1]
    return [*(word for word in words if word not in AS_TRAINED), choice]


def read_command(config_name: str, arguments: argparse.Namespace, root: type[C]) -> Command:
    """Return what to compose: with `run_dir=<run>` the run's own settings in place of the defaults.

    Typed with --config-name, settings come from there. How far to go and whether to resume are not the run's, but asked
    anew each time.

    Raises:
        ConfigError: an override or the run's settings cannot be read, or its experiment is another.
    """
    overrides = _parse_overrides(arguments.overrides)
    command = Command(arguments.config_name or config_name, arguments.config_dir, root, overrides)
    typed = {o.key_or_group: str(o.value()) for o in overrides if not o.is_sweep_override()}
    if root is not TrainConfig or arguments.config_name or arguments.multirun or not typed.get("run_dir"):
        return command
    run = RunFolder(typed["run_dir"])
    if not run.has_run():
        return command
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
    return dataclasses.replace(command, config_name=OF_THE_RUN, run=run)


# --- What may not be asked for ---


def _refuse_secrets(command: Command) -> None:
    """Refuse a name that looks like a secret and is no setting of ours: configs are saved."""
    for override in command.overrides:
        value = None if override.is_sweep_override() else override.value()
        for name in [*override.key_or_group.split("."), *_keys_and_names(value, override.key_or_group)]:
            if is_secret_name(name):
                known = {known.split(".")[-1] for known in settings(command.root)}
                if not difflib.get_close_matches(name, known, 1, 0.8):
                    raise ConfigError(f"{override.key_or_group}: looks like a secret; {KEEP_IN_ENVIRONMENT}")


def _keys_and_names(value: Any, key: str) -> Iterator[str]:
    """Yield names inside a dict value; for `hydra.job.env_copy`, which writes values into files, its items too."""
    match value:
        case dict():
            for name, item in value.items():
                yield str(name)
                yield from _keys_and_names(item, key)
        case list():
            for item in value:
                yield from [str(item)] if key.endswith("env_copy") else _keys_and_names(item, key)


def _refuse_settings_of_the_run(command: Command) -> None:
    """Refuse `evaluate.py run=... model.dtype=fp32`: a setting that there is, and that is the run's."""
    if "run" not in command.root.__annotations__:
        return
    here, of_training = settings(command.root), settings(TrainConfig)
    for override in command.overrides:
        key = override.key_or_group
        if (key not in here and key in of_training) or key == "model":
            names = ", ".join(name for name in here if "." not in name)
            raise ConfigError(f"{key}: is the run's, which stays as it was trained; settings here: {names}")


def _refuse_unknown_options(command: Command) -> None:
    """Refuse `model=smolm2`. Hydra itself cannot: it skips an unknown option of an `optional` group in silence."""
    if any(override.key_or_group == "hydra.searchpath" for override in command.overrides):
        return
    for override in command.overrides:
        group = override.key_or_group
        found = options(group, command.folders)
        if not found or override.is_delete():
            continue
        for option in _values_of(override):
            if option.startswith(("{", "[")):
                raise ConfigError(
                    f"{group}={option}: {group} is a group; give {group}=<option> or {group}.<setting>=<value>"
                )
            if option not in {*found, *SCHEMAS.get(group, {}), OF_THE_RUN, "null"}:
                raise ConfigError(unknown_option(group, option, found))


_MAY_NAME = {
    "_target_": r"hydra\._internal\.core_plugins\.\w+\.\w+|hydra_plugins\.[\w.]+(Launcher|Sweeper)|optuna\.samplers\.\w+",
    "class": r"(logging|colorlog|rich\.logging)\..*",
    **dict.fromkeys(("()", "_partial_", "_args_", "custom_search_space"), r"None"),
}
"""Keys of Hydra's own node by which something is called, and what: launchers, sweepers, their samplers, classes of logging."""


def _refuse_foreign_calls(hydra_node: DictConfig) -> None:
    """Refuse what Hydra would call by its own node: `_target_`, callbacks, and the `class` and `()` of logging.

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
            elif name in _MAY_NAME and not re.fullmatch(f"None|{_MAY_NAME[name]}", str(value), re.DOTALL):
                raise ConfigError(f"{where}={value}: refused; agentft calls nothing that a config names")


def check_command(command: Command, arguments: argparse.Namespace) -> frozenset[str] | None:
    """Compose and check everything that would run; return the names of the swept settings, None for a single run.

    Of a sweep each value is composed once, not each combination.
    """
    root, overrides = command.root, command.overrides
    _refuse_secrets(command)
    _refuse_settings_of_the_run(command)
    _refuse_unknown_options(command)
    swept = {o.get_key_element(): _values_of(o) for o in overrides if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    given = {o.get_key_element() for o in overrides}
    if {"run_dir", "hydra.run.dir"} <= given:
        raise ConfigError("run_dir and hydra.run.dir: two folders for one run; give run_dir=<folder> alone")
    typed = TrustConfig(**{each.name: f"model.{each.name}" in given for each in dataclasses.fields(TrustConfig)})
    file = f"a file of {command.config_dir}" if command.config_dir else "a config file"

    def composed_with(chosen: dict[str, str]) -> DictConfig:
        """Compose the first value of each swept setting, but those `chosen`."""
        values = {key: values[0] for key, values in swept.items() if values} | chosen
        return command.compose([*fixed, *(f"{key}={value}" for key, value in values.items())])

    def check(composed: DictConfig) -> None:
        require_typed(to_config(composed, root).model, typed, command.run.config_file if command.run else file)

    composed = composed_with({})
    _refuse_foreign_calls(composed.hydra)
    if arguments.cfg is not None:
        check_keys(without_hydra(composed), root)
        return None
    if not (arguments.multirun or composed.hydra.mode == RunMode.MULTIRUN):
        for name, values in swept.items():
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
    params = composed.hydra.sweeper.get("params") or {}
    for override in _parse_overrides([f"{key}={value}" for key, value in params.items()]):
        if override.get_key_element() not in given:
            swept[override.get_key_element()] = _values_of(override)
    for key, values in swept.items():
        for value in values:
            check(composed_with({key: value}))
    return frozenset(key.lstrip("+") for key in swept)


# --- Running ---

_ACCOUNT_LINES = 6
"""Of an error of data, on the terminal."""


def compose_and_run(config_name: str, root: type[C], recipe: Callable[[C], float | None]) -> None:
    """Run an entry point: compose `config_name` with the command line, check it, call `recipe`.

    A configuration that cannot run ends the program with exit code 2 and one line; an `AgentftError` of the recipe ends
    it with 1 and one line. `recipe` returns the number that a sweeper optimises.
    """
    outlive_console()
    program = Path(sys.argv[0]).name
    wants_traceback = os.environ.get(_FULL_ERROR) == "1"
    if clash := _other_agentft():
        sys.stderr.write(f"{program}: {clash}\n")
    register_schemas()
    old_names.clear()
    swept = None
    try:
        arguments = parse_arguments(root)
        if arguments.help or arguments.help_all:
            sys.stdout.write(help_text(program, config_name, arguments.config_dir, every=arguments.help_all))
            return
        if not any(getattr(arguments, flag) for flag in _HYDRA_ANSWERS):
            command = read_command(config_name, arguments, root)
            config_name = command.config_name
            swept = check_command(command, arguments)
    except ConfigError as error:
        if wants_traceback:
            raise
        leave(program, error, 2)
    if old_names:
        sys.stderr.write(f"{program}: {'; '.join(old_names)}; the old name is taken for this version\n")
    register_resolvers(swept)

    def task(composed: DictConfig) -> float | None:
        config = to_config(composed, root)
        run = HydraConfig.get()
        folder = readable(Path(run.runtime.output_dir))
        training: object = config  # mypy would take the three kinds of config for one
        if isinstance(training, TrainConfig):
            training.run_dir = folder
        if isinstance(training, EvaluateConfig) and Path(run.runtime.output_dir).absolute() != Path.cwd():
            training.output = training.output or folder
        if run.mode == RunMode.MULTIRUN:
            os.environ[SWEEP_FOLDER_VARIABLE] = str(Path(run.sweep.dir).absolute())
        try:
            with full_error():
                return recipe(config)
        except AgentftError as error:
            if wants_traceback or run.mode == RunMode.MULTIRUN:
                raise
            # Raised through Hydra, it would be announced in Hydra's words too.
            leave(program, error, 2 if isinstance(error, ConfigError) else 1)

    entry = hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=config_name)(task)
    try:
        with searching(arguments.config_dir), full_error("1"):
            entry()
    except (AgentftError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        leave(program, error, 2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt as error:
        leave(program, str(error) or "interrupted", getattr(error, "exit_code", 130))


def _other_agentft() -> str | None:
    """Return a line on another project's package `agentft`, where it is installed: it writes over files of this one."""
    for package in importlib.metadata.distributions(name="agentft"):
        # Only a wheel's record counts: this project's own package had the name too, installed as a link to a checkout.
        if re.search(r"^agentft/", package.read_text("RECORD") or "", flags=re.MULTILINE):
            return (
                f"the package agentft {package.version} of another project is installed and has the same import name: "
                f"pip uninstall agentft, then install {DISTRIBUTION} again"
            )
    return None


def leave(program: str, message: object, code: int) -> NoReturn:
    """End the program with a message in one line; an account of data that cannot be used keeps its lines."""
    lines = str(message).splitlines() if isinstance(message, DataError) else [" ".join(str(message).split())]
    sys.stderr.write(redact_text(f"{program}: " + "\n".join(lines[:_ACCOUNT_LINES])) + "\n")
    raise SystemExit(code)


_FULL_ERROR = "HYDRA_FULL_ERROR"
_GIVEN = os.environ.get(_FULL_ERROR)


def full_error(value: str | None = _GIVEN) -> contextlib.AbstractContextManager[None]:
    """Set the variable inside the block: with 1 Hydra raises errors, which it prints over many lines otherwise, and exits.

    The work itself and the jobs of a sweep, which inherit the environment, have it as it was given.
    """
    return environment_variables({_FULL_ERROR: value})
