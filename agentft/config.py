"""Composition of a run: the only module that knows Hydra and OmegaConf.

`compose_and_run` is what `train.py` and `evaluate.py` call. It composes `conf/` and the command line, checks the whole
against the dataclasses of the rooms, and only then calls the recipe, with plain dataclasses. Whatever is wrong with the
configuration is said in one line, before torch is imported and before a run folder is made; `HYDRA_FULL_ERROR=1` gives
the traceback instead.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
import yaml
from hydra import version
from hydra._internal import utils as hydra_utils
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException, ValidationError

from agentft import slurm
from agentft.errors import AgentftError, ConfigError
from agentft.recipes.config import AuditConfig, EvaluateConfig, ExportConfig, TrainConfig
from agentft.recipes.saved import ROOTS, SCHEMAS, config_from_yaml, config_to_yaml, saved_config
from agentft.runs import SWEEP_FOLDER_VARIABLE
from agentft.secrets import is_secret_name, redact_text

__all__ = [
    "AuditConfig",
    "EvaluateConfig",
    "ExportConfig",
    "TrainConfig",
    "compose",
    "compose_and_run",
    "conf_dir",
    "config_from_yaml",
    "config_to_yaml",
    "register_schemas",
    "saved_config",
    "settings",
    "to_config",
    "to_train_config",
]

C = TypeVar("C", TrainConfig, EvaluateConfig, AuditConfig, ExportConfig)

VERSION_BASE = "1.3"


def conf_dir() -> Path:
    """The folder of the config groups: inside an installed package, else beside it in the repository."""
    here = Path(__file__).resolve().parent
    return next(folder for folder in (here / "conf", here.parent / "conf") if folder.is_dir())


# --- Schemas and resolvers -------------------------------------------------------------------------------------------


def register_schemas() -> None:
    """Make the dataclasses known to Hydra as `schema_train`, `model/schema_model`, `sft_type/schema_lora`, ..."""
    plugins = str(Path(__file__).resolve().parent / "plugins")
    if plugins not in sys.path:  # Hydra finds our launcher in the namespace package `hydra_plugins` there.
        sys.path.append(plugins)
    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(name=name, node=root, provider="agentft")
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=name, node=schema, provider="agentft")
    _register_resolvers(swept=None)


def _register_resolvers(swept: frozenset[str] | None) -> None:
    OmegaConf.register_new_resolver("start_stamp", _start_stamp, replace=True)
    OmegaConf.register_new_resolver("run_slug", _run_slug, replace=True)
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


# --- Composing and checking ------------------------------------------------------------------------------------------


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
    return composed if with_hydra else _without_hydra(composed)


def to_train_config(composed: DictConfig) -> TrainConfig:
    """The composed settings of a training run as checked dataclasses; `ConfigError` says what is wrong."""
    return to_config(composed, TrainConfig)


def to_config(composed: DictConfig, root: type[C]) -> C:
    """The composed settings as `root`: no unknown key, no missing value, every value allowed by its room."""
    settings_only = _without_hydra(composed)
    _refuse_unknown_keys(settings_only, root)
    if missing := [key for key, value in _values_in(settings_only) if value == "???"]:
        raise ConfigError(_missing_value(missing, root))
    try:
        config = OmegaConf.to_object(settings_only)
    except OmegaConfBaseException as error:
        # What it says of an interpolation: `Interpolation key 'sft_type.lr' not found`.
        raise ConfigError(f"{error.full_key!s}: {_first_line(error)}") from error
    assert isinstance(config, root)
    return config


def _without_hydra(composed: DictConfig) -> DictConfig:
    settings_only = copy.deepcopy(composed)
    with open_dict(settings_only):
        settings_only.pop("hydra", None)
    return settings_only


def _refuse_unknown_keys(node: DictConfig, root: type) -> None:
    """A `+` adds keys even to a dataclass node: refuse whatever no dataclass has, and secrets by interpolation."""
    for key, container in _containers(node, ""):
        schema = OmegaConf.get_type(container)
        if schema is dict:
            continue  # another program's settings, given through
        known = {field.name for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else set()
        for name in container:
            if name not in known:
                raise ConfigError(_unknown_setting(_join(key, str(name)), root, _schemas_of(node)))
    for key, value in _values_in(node):
        if isinstance(value, str) and (found := re.search(r"\$\{oc\.env:([^},]+)", value)) and is_secret_name(found[1]):
            raise ConfigError(f"{key}: takes {found[1]} into the config; {_KEEP_IN_ENVIRONMENT}")


def _containers(node: DictConfig, key: str) -> Iterator[tuple[str, DictConfig]]:
    yield key, node
    for name, child in node.items_ex(resolve=False):
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _containers(child, _join(key, str(name)))


def _values_in(node: DictConfig) -> Iterator[tuple[str, Any]]:
    """Every value by its dotted name as it was written: `???` where missing, `${...}` where it refers to another."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        match value:
            case dict():
                for name, item in value.items():
                    yield from walk(item, _join(key, str(name)))
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


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


# --- Running ---------------------------------------------------------------------------------------------------------


def compose_and_run(config_name: str, root: type[C], recipe: Callable[[C], float]) -> None:
    """The whole of an entry point: compose `config_name` with the command line, check it, call `recipe`.

    A configuration that cannot run ends the program with exit code 2 and one line; an `AgentftError` of the recipe ends
    it with 1 and one line. `recipe` returns the number that a sweeper optimises.
    """
    program = Path(sys.argv[0]).name
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    register_schemas()
    try:
        arguments = _parse_arguments()
        if arguments.help:
            sys.stdout.write(help_text(program, config_name, arguments.config_dir))
            return
        sweep = _check(config_name, arguments, root)
    except ConfigError as error:
        if full_error:
            raise
        _leave(program, error, 2)
    _register_resolvers(sweep)

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
    sys.stderr.write(redact_text(f"{program}: {' '.join(str(message).split())}") + "\n")
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


def _parse_arguments() -> argparse.Namespace:
    parser = hydra_utils.get_args_parser()

    def refuse(message: str) -> NoReturn:
        # Values stay out of the message: one of them could be a key.
        raise ConfigError(re.sub(r"=\S*", "=...", message) + _hint_for_flags(message))

    parser.error = refuse  # type: ignore[method-assign]
    sys.argv[1:] = _with_packaged_folder(sys.argv[1:])
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


OLD_OPTIONS = {
    "model_type": "model",
    "sft_type": "sft_type",
    "output_dir": "output_dir",
    "dataset": "dataset",
    "dataset_sample": "dataset.sample",
    "dataset_test_ratio": "dataset.test_ratio",
    "max_length": "dataset.max_length",
    "dtype": "model.dtype",
    "lora_rank": "sft_type.rank",
    "lora_alpha": "sft_type.alpha",
    "lora_dropout_p": "sft_type.dropout",
    "batch_size": "training.micro_batch",
    "gradient_accumulation_steps": "training.accumulation",
    "learning_rate": "training.learning_rate",
    "eval_steps": "evaluation.steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.save_total_limit",
    "logging_steps": "training.logging_steps",
    "use_flash_attn": "model.attention",
}
"""Options of the script `llm_sft.py` that agentft replaces, and where each now is."""


def _hint_for_flags(message: str) -> str:
    found = re.search(r"unrecognized arguments: (?:--)?([\w.]+)", message)
    if found is None:
        return "; see --help"
    if found[1] in OLD_OPTIONS and "--" in message:
        return f"; --{found[1]} is now {OLD_OPTIONS[found[1]]}=..."
    if "--" not in message:
        return "; put flags such as --cfg or -m before all settings"
    return "; settings are written name=value, see --help"


# --- The check before a run ------------------------------------------------------------------------------------------


def _check(config_name: str, arguments: argparse.Namespace, root: type[C]) -> frozenset[str] | None:
    """Compose and check everything that would run; the names of the swept settings, None for a single run.

    Of a sweep each value is composed once, not each combination.
    """
    if arguments.hydra_help or arguments.info is not None or arguments.shell_completion:
        return None
    scope = _Scope(arguments.config_name or config_name, arguments.config_dir, root, _parse(arguments.overrides))
    _refuse_secrets(scope.overrides, root)
    _refuse_unknown_options(scope)
    swept = {o.get_key_element(): _values(o) for o in scope.overrides if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in scope.overrides if not o.is_sweep_override()]

    def first_of(sweep: Mapping[str, Sequence[str]]) -> dict[str, str]:
        return {key: values[0] for key, values in sweep.items() if values}

    composed = scope.compose(fixed, first_of(swept))
    _refuse_foreign_calls(composed.hydra)
    if arguments.cfg is not None:
        _refuse_unknown_keys(_without_hydra(composed), root)
        return None
    if not (arguments.multirun or composed.hydra.mode == RunMode.MULTIRUN):
        if swept:
            name, values = next(iter(swept.items()))
            several = ",".join(values)
            raise ConfigError(
                f"{name}={several}: several values; -m before it makes a sweep, {name}=[{several}] is a list"
            )
        to_config(composed, root)
        return None
    given = {o.get_key_element() for o in scope.overrides}
    if "run_dir" in given:
        raise ConfigError("run_dir: names one folder, a sweep has many; give hydra.sweep.dir=<folder>")
    for override in _parse([f"{key}={value}" for key, value in (composed.hydra.sweeper.get("params") or {}).items()]):
        if override.get_key_element() not in given:
            swept[override.get_key_element()] = _values(override)
    for key, values in swept.items():
        for value in values:
            to_config(scope.compose(fixed, {**first_of(swept), key: value}), root)
    return frozenset(swept)


@dataclasses.dataclass
class _Scope:
    """What a command line composes, and from where."""

    config_name: str
    config_dir: str | None
    root: type
    overrides: list[Override]

    @property
    def folders(self) -> list[Path]:
        return [conf_dir()] + ([Path(self.config_dir)] if self.config_dir is not None else [])

    def compose(self, fixed: Sequence[str], first: Mapping[str, str]) -> DictConfig:
        lines = [*fixed, *(f"{key}={value}" for key, value in first.items())]
        try:
            return compose(self.config_name, lines, self.config_dir, with_hydra=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, AssertionError, ValueError, TypeError) as error:
            raise ConfigError(_explain(error, self)) from error


def _parse(lines: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for line in lines:
        try:
            parsed += parser.parse_overrides([line])
        except OverrideParseException as error:
            name = line.partition("=")[0]
            reason = f" ({_first_line(error)})" if "=" in line and "Lexer" not in str(error) else ""
            expected = (
                "name=value; text with spaces, brackets or letters beyond ASCII in double quotes: 'name=\"a, b\"'"
            )
            raise ConfigError(f"{name}: cannot be read{reason}; expected {expected}") from error
        except HydraException as error:
            raise ConfigError(f"{line.partition('=')[0]}: {_first_line(error)}") from error
    return parsed


def _values(override: Override) -> list[str]:
    """The values of a sweep; none for an interval, which only its sweeper can draw from."""
    if not override.is_sweep_override():
        return [str(override.get_value_element_as_str())]
    return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []


_KEEP_IN_ENVIRONMENT = (
    "configs are saved: put it into the environment instead (WANDB_API_KEY, MODELSCOPE_API_TOKEN, HF_TOKEN)"
)


def _refuse_secrets(overrides: Sequence[Override], root: type) -> None:
    known = {name.split(".")[-1] for name in settings(root)}
    for override in overrides:
        value = override._value if not override.is_sweep_override() else None
        for name in [*override.key_or_group.split("."), *_keys_and_names(value, override.key_or_group)]:
            if is_secret_name(name) and not difflib.get_close_matches(name, known, 1, 0.8):
                raise ConfigError(f"{override.key_or_group}: looks like a secret; {_KEEP_IN_ENVIRONMENT}")


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


def _refuse_foreign_calls(hydra_node: DictConfig) -> None:
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


# --- Saying what is wrong --------------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _refuse_unknown_options(scope: _Scope) -> None:
    """`model=smolm2`. Hydra's own check cannot do it: it skips an unknown option of an `optional` group in silence."""
    if any(override.key_or_group == "hydra.searchpath" for override in scope.overrides):
        return
    for override in scope.overrides:
        group = override.key_or_group
        found = options(group, scope.folders)
        if not found or override.is_delete():
            continue
        for option in _values(override):
            if option.startswith(("{", "[")):
                raise ConfigError(
                    f"{group}={option}: {group} is a group; give {group}=<option> or {group}.<setting>=<value>"
                )
            if option not in found and option not in SCHEMAS.get(group, {}) and option != "null":
                raise ConfigError(_unknown_option(group, option, found))


def _unknown_option(group: str, option: str, found: Sequence[str]) -> str:
    near = _nearest(option, found)
    hint = f"; did you mean {group}={near}?" if near else ""
    return f"{group}={option}: no such option{hint} ({group} has: {', '.join(found)})"


def _explain(error: Exception, scope: _Scope) -> str:
    """What Hydra or OmegaConf refused, in one line."""
    choices = _choices(scope)
    known = settings(scope.root, choices, scope.folders)
    for override in scope.overrides:
        key = override.key_or_group
        if key not in known and not key.startswith("hydra") and not options(key, scope.folders):
            return _unknown_setting(key, scope.root, choices, scope.folders)
        if override.is_add() and f"already at '{key}'" in str(error):
            return f"{key}: is there already; leave out the +"
        if override.is_delete():
            return f"{key}: settings cannot be removed; {key}=null where that is allowed"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if not group:
            return f"--config-name {option}: no such file in conf/ or --config-dir"
        return _unknown_option(group, option, [o for o in error.options or () if not o.startswith("schema_")])
    if isinstance(error, yaml.YAMLError):
        return f"not YAML: {error}"

    origin: BaseException = error
    while origin.__cause__ is not None:
        origin = origin.__cause__
    text = f"{error}\n{origin}"
    in_file = re.search(r"In '([^']+)'", text)
    where = f"{in_file[1]}.yaml: " if in_file else ""
    key = getattr(origin, "full_key", None) or next(iter(re.findall(r"full_key: (\S+)", text)), "")
    if key and re.search(r"Key '.*' (not in|is not in struct)", text):
        return where + _unknown_setting(key, scope.root, choices, scope.folders)
    if key and (isinstance(origin, ValidationError) or "ValidationError" in text):
        return where + _wrong_value(key, text, scope.overrides, known)
    if isinstance(origin, AssertionError):  # OmegaConf, for model.shape.hidden=8 while model.shape is null
        nested = [o.key_or_group for o in scope.overrides if o.key_or_group.count(".") > 1]
        return f"{', '.join(nested)}: what it belongs to is null; give the whole, <setting>={{<name>:<value>}}"
    return where + (f"{key}: " if key and key not in str(origin) else "") + _first_line(origin)


def _wrong_value(key: str, text: str, overrides: Sequence[Override], known: Mapping[str, Setting]) -> str:
    given = next((o for o in overrides if o.key_or_group == key and not o.is_sweep_override()), None)
    quoted = re.search(r"[Vv]alue '([^']*)'", text)
    value = given.get_value_element_as_str() if given is not None else quoted[1] if quoted else None
    shown = key if value is None else f"{key}={value}"
    if key not in known:
        return f"{shown}: {_first_line(Exception(text))}"
    near = _nearest(value or "", _members(known[key].hint))
    hint = f"; did you mean {key}={near}?" if near else ""
    return f"{shown}: expected {_in_words(known[key].hint)}{hint}"


def _unknown_setting(key: str, root: type, choices: Mapping[str, str], folders: Sequence[Path] = ()) -> str:
    """`sft_type.rnak: no such setting; did you mean sft_type.rank? (sft_type=lora has: alpha, dropout, ...)`"""
    if key.startswith("hydra."):
        return f"{key}: no such setting of Hydra; see --hydra-help and --cfg hydra"
    if key.split(".")[-1] == "_target_":
        return f"{key}: refused; agentft calls nothing that a config names"
    known = settings(root, choices, folders)
    group, _, rest = key.partition(".")
    owners = [
        f"{group}={option}"
        for option in options(group, folders)
        if group in SCHEMAS and key in settings(root, {**choices, group: option}, folders)
    ]
    if owners:
        return f"{key}: {rest} belongs to {' and '.join(owners)} ({_has(group, known, choices)})"
    # The deepest part that exists, and what is wrong below it.
    parent, _, name = key.rpartition(".")
    while parent and not any(other.startswith(f"{parent}.") for other in known):
        parent, _, name = parent.rpartition(".")
    last = key.rpartition(".")[2]
    by_name = {other.rpartition(".")[2]: other for other in reversed(known)}
    if near := _nearest(name, [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]):
        suggestion = _join(parent, near)
    elif last in OLD_OPTIONS:
        suggestion = OLD_OPTIONS[last]
    else:
        suggestion = by_name.get(_nearest(last, list(by_name)) or "", "")
    if not suggestion:
        return f"{key}: no such setting ({_has(parent, known, choices)})"
    listed = _has(parent, known, choices)
    # A long list hides the answer.
    return f"{key}: no such setting; did you mean {suggestion}?" + (f" ({listed})" if len(listed) < 100 else "")


def _has(parent: str, known: Mapping[str, Setting], choices: Mapping[str, str]) -> str:
    names = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent]
    chosen = choices.get(parent, "").removeprefix("schema_") if parent in SCHEMAS else ""
    owner = f"{parent}={chosen} has" if chosen else f"{parent} has" if parent else "there are"
    return f"{owner}: {', '.join(sorted(name for name in names if name != 'name'))}"


def _missing_value(keys: Sequence[str], root: type) -> str:
    known = settings(root)
    key = keys[0]
    doc = known[key].doc.split("\n")[0] if key in known else ""
    others = f" (missing too: {', '.join(keys[1:])})" if keys[1:] else ""
    return f"{key}: missing; give {key}=<value>{others}" + (f". {doc}" if doc else "")


def _nearest(word: str, words: Sequence[str]) -> str | None:
    lowered = {candidate.lower(): candidate for candidate in words}
    if close := difflib.get_close_matches(word.lower(), lowered, 1, 0.6):
        return lowered[close[0]]
    parts = [candidate for candidate in words if len(word) > 2 and (word.lower() in candidate.lower())]
    return parts[0] if len(parts) == 1 else None


def _choices(scope: _Scope) -> dict[str, str]:
    """Chosen option of each group, from the overrides that name one; whatever else is wrong is left out."""
    chosen = [str(o.input_line) for o in scope.overrides if options(o.key_or_group, scope.folders)]
    for lines in (chosen, []):
        try:
            composed = compose(scope.config_name, lines, scope.config_dir, with_hydra=True)
        except Exception:
            continue
        return {str(group): str(option) for group, option in composed.hydra.runtime.choices.items()}
    return {}


# --- What there is to set --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: its type and the sentences below it in its dataclass."""

    hint: Any
    default: Any
    doc: str


def settings(
    root: type = TrainConfig, choices: Mapping[str, str] | None = None, folders: Sequence[Path] = ()
) -> dict[str, Setting]:
    """Every setting by its dotted name; of a group without a choice, those of all its schemas."""
    found: dict[str, Setting] = {}
    for field, setting in _fields(root):
        if field not in SCHEMAS:
            found[field] = setting
            for part in _dataclasses_in(setting.hint):
                found.update({f"{field}.{name}": inner for name, inner in _fields(part)})
            continue
        chosen = _schema_of(field, (choices or {}).get(field), folders or [conf_dir()])
        for schema in [chosen] if chosen is not None else SCHEMAS[field].values():
            for name, inner in _fields(schema):
                found.setdefault(f"{field}.{name}", inner)
                for deeper in _dataclasses_in(inner.hint):
                    found.update({f"{field}.{name}.{deepest}": s for deepest, s in _fields(deeper)})
        found.setdefault(field, setting)
    return found


def options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """The options of a group: the files of `conf/<group>/`; none if there is no such group."""
    if not group:
        return []
    return sorted({path.stem for folder in folders or [conf_dir()] for path in (folder / group).glob("*.yaml")})


def _schema_of(group: str, option: str | None, folders: Sequence[Path]) -> type | None:
    """Class of an option, by the defaults list of its file."""
    if option is None or option in SCHEMAS[group]:
        return SCHEMAS[group].get(option or "")
    for folder in folders:
        path = folder / group / f"{option}.yaml"
        if path.is_file():
            for base in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", []):
                if isinstance(base, str) and base not in ("_self_", option):
                    return _schema_of(group, base, folders)
    return None


def _fields(schema: type) -> Iterator[tuple[str, Setting]]:
    hints = typing.get_type_hints(schema)
    docs = _field_docs(schema)
    for field in dataclasses.fields(schema):
        yield field.name, Setting(hints[field.name], field.default, docs.get(field.name, ""))


def _field_docs(schema: type) -> dict[str, str]:
    """The docstring below each field, of the class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match following:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[statement.target.id] = inspect.cleandoc(text)
    return docs


def _dataclasses_in(hint: Any) -> list[type]:
    return [
        part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part) and isinstance(part, type)
    ]


def _members(hint: Any) -> list[str]:
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, Enum):
            return list(part.__members__)
    return []


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return f"{' or '.join(_in_words(part) for part in parts)} or null"
    if typing.get_origin(hint) is list:
        return "a list like [a,b]"
    if members := _members(hint):
        return f"one of {', '.join(members)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, "settings by name")


# --- Help ------------------------------------------------------------------------------------------------------------

_EXAMPLES = {
    "train": """\
  python train.py                                        a small model on synthetic conversations, minutes on a laptop
  python train.py sft_type.rank=16 training.epochs=2     other values, by their dotted names
  python train.py dataset=local dataset.path=my.jsonl    your own conversations
  python train.py experiment=msagent_7b_lora             a whole setting from conf/experiment/
  python train.py -m sft_type.rank=4,16 training.learning_rate=1e-4,3e-4     a sweep, 2 x 2 jobs
  python train.py --config-dir sweeps --config-name lora_rank_lr             a sweep from a file
  python train.py --config-dir runs/<run> --config-name config               a finished run again, in a new folder
  python train.py run_dir=runs/<run>                     go on in the folder of an interrupted run
""",
    "evaluate": """\
  python evaluate.py run=runs/<run>                      the final weights of a run
  python evaluate.py run=runs/<run> checkpoint=best evaluation.conversations=50
""",
    "export": """\
  python -m agentft.export run=runs/<run>                        a whole model, for transformers, vLLM and the hubs
  python -m agentft.export run=runs/<run> merge=false out=mine   the adapter alone
  python -m agentft.export run=runs/<run> push=modelscope:owner/name         and upload it, private unless private=false
""",
    "audit": """\
  python -m agentft.audit dataset=local dataset.path=my.jsonl     what is in it, what is trained, what is wrong
  python -m agentft.audit dataset=local dataset.path=my.jsonl view=<id>       one conversation with its labels
  python -m agentft.audit dataset=local dataset.path=my.jsonl audit.fail_on=[unknown_tool,unreadable_call]
Exit code 0: all is well; 3: an invariant is broken, or a finding of audit.fail_on was made.
""",
}

_AS_MODULES = {"audit": "-m agentft.audit", "export": "-m agentft.export"}
"""Entry points inside the package, and how they are started."""


def help_text(program: str, config_name: str, config_dir: str | None = None) -> str:
    """What `--help` prints: the groups with their options, examples, flags."""
    folders = [conf_dir()] + ([Path(config_dir)] if config_dir is not None else [])
    defaults: dict[str, str] = {}
    for entry in yaml.safe_load((conf_dir() / f"{config_name}.yaml").read_text(encoding="utf-8"))["defaults"]:
        if isinstance(entry, dict):
            defaults.update({group.removeprefix("optional "): option for group, option in entry.items()})
    started = f"python {_AS_MODULES.get(config_name, program)}" if program.endswith(".py") else program
    lines = [f"usage: {started} [flags] [group=option ...] [setting=value ...]", ""]
    lines.append("Groups and their options (* is the default):")
    for group, default in defaults.items():
        for i, option in enumerate(options(group, folders)):
            path = next(p for folder in folders if (p := folder / group / f"{option}.yaml").is_file())
            star = "*" if option == default else " "
            words = textwrap.shorten(_first_sentence(path), 80, placeholder=" ...")
            lines.append(f"  {group if i == 0 else '':<12} {star}{option:<20} {words}")
    examples = _EXAMPLES.get(config_name, "").rstrip()
    if not program.endswith(".py"):
        examples = re.sub(r"python (-m agentft\.|)(\w+)(\.py|)(?= )", r"agentft-\2", examples)
    lines += ["", "Examples:", examples, ""]
    lines += [
        "Flags, before all settings:",
        "  --cfg job          print the composed settings and stop; with --resolve, references replaced",
        "  -m, --multirun     run once for each combination of values given as a,b,c",
        "  --config-dir DIR   search DIR besides conf/; --config-name NAME: another file to start from",
        "  --hydra-help       Hydra's own flags",
        "HYDRA_FULL_ERROR=1 in the environment: the traceback of an error instead of one line.",
        "",
        "Every setting, with its default and meaning: docs/configuration.md",
    ]
    return "\n".join(lines) + "\n"


def _first_sentence(path: Path) -> str:
    """First sentence of the comment that opens a config file."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.lstrip("# "))
    return re.split(r"(?<=[.!?])\s|:\s*$", " ".join(comment), maxsplit=1)[0]
