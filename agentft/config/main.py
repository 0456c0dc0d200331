"""Run an entry point: compose, check, call the recipe, and say in one line what went wrong."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal import utils as hydra_utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from agentft.config.compose import VERSION_BASE, C, register_resolvers, register_schemas, to_config
from agentft.config.own_settings import OF_THE_RUN, own_settings
from agentft.config.preflight import check_command
from agentft.config.settings import OLD_OPTIONS, conf_dir
from agentft.errors import AgentftError, ConfigError, DataError
from agentft.progress import outlive_console
from agentft.provenance import other_agentft
from agentft.recipes.config import EvaluateConfig, TrainConfig
from agentft.recipes.saved import RENAMED
from agentft.runs import SWEEP_FOLDER_VARIABLE
from agentft.secrets import redact_text

_ACCOUNT_LINES = 6
"""Of an error of data, on the terminal."""


def parse_arguments() -> argparse.Namespace:
    """The flags and overrides of `sys.argv`, read by Hydra's parser; `ConfigError` for what agentft does not take."""
    parser = hydra_utils.get_args_parser()

    def refuse(message: str) -> NoReturn:
        # Values stay out of the message: one of them could be a key.
        raise ConfigError(re.sub(r"=\S*", "=...", message) + _hint_for_flags(message))

    parser.error = refuse  # type: ignore[method-assign]
    sys.argv[1:] = _with_new_names(_with_packaged_folder(sys.argv[1:]))
    arguments = parser.parse_args()
    if arguments.config_path is not None:
        raise ConfigError("--config-path: not supported; --config-dir adds a folder to conf/")
    if arguments.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun: not supported; use --config-dir <run folder> --config-name config")
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        raise ConfigError(f"--config-dir {arguments.config_dir}: no such folder")
    return arguments


def _with_packaged_folder(words: Sequence[str]) -> list[str]:
    """`--config-dir sweeps` where no such folder is here: the one that came with agentft."""
    found = list(words)
    for i, word in enumerate(found[:-1]):
        folder = conf_dir().parent / found[i + 1]
        if word in ("--config-dir", "-cd") and not Path(found[i + 1]).is_dir() and folder.is_dir():
            found[i + 1] = str(folder)
    return found


def _with_new_names(words: Sequence[str]) -> list[str]:
    """Put today's names in the place of old ones, and say all of them in one line on stderr."""
    found = list(words)
    said: list[str] = []
    for at, word in enumerate(found):
        for old, new in RENAMED.items():
            if (match := re.match(rf"(\+{{0,2}}){re.escape(old)}=", word)) is not None:
                found[at] = f"{match[1]}{new}={word[match.end() :]}"
                said.append(f"{old} is {new} now")
    if said:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {'; '.join(said)}; the old name is taken for this version\n")
    return found


def _hint_for_flags(message: str) -> str:
    found = re.search(r"unrecognized arguments: (?:--)?([\w.]+)", message)
    if found is None:
        return "; see --help"
    if found[1] in OLD_OPTIONS and "--" in message:
        return f"; --{found[1]} is now {OLD_OPTIONS[found[1]]}=..."
    if "--" not in message:
        return "; put flags such as --cfg or -m before all settings"
    return "; settings are written name=value, see --help"


def compose_and_run(config_name: str, root: type[C], recipe: Callable[[C], float | None]) -> None:
    """The whole of an entry point: compose `config_name` with the command line, check it, call `recipe`.

    A configuration that cannot run ends the program with exit code 2 and one line; an `AgentftError` of the recipe ends
    it with 1 and one line. `recipe` returns the number that a sweeper optimises.
    """
    outlive_console()
    program = Path(sys.argv[0]).name
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if clash := other_agentft():
        sys.stderr.write(f"{program}: {clash}\n")
    register_schemas()
    try:
        arguments = parse_arguments()
        if arguments.help:
            from agentft.config.help import help_text  # needed by nobody else

            sys.stdout.write(help_text(program, config_name, arguments.config_dir))
            return
        own = own_settings(arguments) if root is TrainConfig else None
        if own is not None:
            config_name = OF_THE_RUN
        sweep = check_command(config_name, arguments, root, own)
    except ConfigError as error:
        if full_error:
            raise
        _leave(program, error, 2)
    register_resolvers(sweep)

    failures: list[AgentftError] = []

    def task(composed: DictConfig) -> float | None:
        config = to_config(composed, root)
        run = HydraConfig.get()
        training: object = config  # mypy would take the three kinds of config for one
        if isinstance(training, TrainConfig):
            training.run_dir = _readable(run.runtime.output_dir)
        if isinstance(training, EvaluateConfig) and Path(run.runtime.output_dir).absolute() != Path.cwd():
            training.output = training.output or _readable(run.runtime.output_dir)
        if run.mode == RunMode.MULTIRUN:
            os.environ[SWEEP_FOLDER_VARIABLE] = str(Path(run.sweep.dir).absolute())
            return recipe(config)
        try:
            return recipe(config)
        except AgentftError as error:
            if full_error:
                raise
            failures.append(error)  # Raised through Hydra, it would be announced in Hydra's words too.
            return None

    task.__module__ = "agentft.config"  # Hydra calls the job `config`, after the last word.
    entry = hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=config_name)(task)
    try:
        with _errors_reach_us():
            entry()
    except (AgentftError, HydraException, OmegaConfBaseException) as error:
        if full_error:
            raise
        _leave(program, error, 2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt as error:
        _leave(program, str(error) or "interrupted", getattr(error, "exit_code", 130))
    for failure in failures:
        _leave(program, failure, 2 if isinstance(failure, ConfigError) else 1)


def _leave(program: str, message: object, code: int) -> NoReturn:
    """End the program with a message in one line; an account of data that cannot be used keeps its lines."""
    lines = str(message).splitlines() if isinstance(message, DataError) else [" ".join(str(message).split())]
    sys.stderr.write(redact_text(f"{program}: " + "\n".join(lines[:_ACCOUNT_LINES])) + "\n")
    raise SystemExit(code)


def _readable(folder: str) -> str:
    """Relative to the working directory where it lies below it."""
    path = Path(folder)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@contextlib.contextmanager
def _errors_reach_us() -> Iterator[None]:
    """Hydra prints errors over many lines and exits; let them come to `compose_and_run` instead."""
    report = hydra_utils.run_and_report
    hydra_utils.run_and_report = lambda func: func()
    try:
        yield
    finally:
        hydra_utils.run_and_report = report
