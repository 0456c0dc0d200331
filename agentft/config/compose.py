"""Compose settings by Hydra and turn them into checked dataclasses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from agentft.errors import ConfigError
from agentft.recipes.config import (
    AFFECT_NOTHING,
    ROOTS,
    SCHEMAS,
    AuditConfig,
    EvaluateConfig,
    ExportConfig,
    TrainConfig,
    use_new_names,
)
from agentft.secrets import is_secret_name
from agentft.signals import is_slurm_batch_job, slurm_job_id

VERSION_BASE = "1.3"
KEEP_IN_ENVIRONMENT = (
    "configs are saved: put it into the environment instead (WANDB_API_KEY, MODELSCOPE_API_TOKEN, HF_TOKEN)"
)
_SCHEME = "agentft"
"""Of the folder of `--config-dir` in Hydra's search path."""


def conf_dir() -> Path:
    """Return the folder of the config groups: inside an installed package, else beside it in the repository."""
    here = Path(__file__).resolve().parent.parent
    return next(folder for folder in (here / "conf", here.parent / "conf") if folder.is_dir())


def options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """Return the options of a group, the files of `conf/<group>/`; none if there is no such group."""
    if not group:
        return []
    return sorted({path.stem for folder in folders or [conf_dir()] for path in (folder / group).glob("*.yaml")})


OF_OTHERS = tuple(
    f"{group}.{each.name}."
    for group, schemas in SCHEMAS.items()
    for schema in schemas.values()
    for each in dataclasses.fields(schema)
    if each.default_factory is dict
)
"""What the settings begin with that another program names: `model.template_args.`, `distributed.deepspeed.`."""


def with_keys_of_others(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which such a setting is added where it is not there yet: Hydra wants `++` for it."""
    return [f"++{override}" if override.startswith(OF_OTHERS) else override for override in overrides]


def dotted(parent: str, name: str) -> str:
    """Return the full name of `name` below `parent`, which is empty at the top."""
    return f"{parent}.{name}" if parent else name


@functools.cache
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
    for plugin in (_files_with_old_names(), AddedFolder):
        Plugins.instance().register(plugin)
    register_resolvers(swept=None)


class AddedFolder(SearchPathPlugin):
    """Searches the folder of `--config-dir` besides `conf/`.

    `hydra.searchpath` would not do: the primary config is looked for before it is read.
    """

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder that `searching` names."""
        if self.folder is not None:
            search_path.append("config-dir", f"{_SCHEME}://{self.folder}")


@contextlib.contextmanager
def searching(config_dir: str | Path | None) -> Iterator[None]:
    """Let Hydra search `config_dir` besides `conf/` for as long as this lasts."""
    AddedFolder.folder = None if config_dir is None else Path(config_dir).resolve()
    try:
        yield
    finally:
        AddedFolder.folder = None


old_names: dict[str, None] = {}
"""Notices of the old names of a command and of its files, in order."""


@functools.cache
def _files_with_old_names() -> type[ConfigSource]:
    """Return Hydra's source of files, which reads today's names in the place of old ones."""
    files: Any = next(source for source in Plugins.instance().discover(ConfigSource) if source.scheme() == "file")  # type: ignore[attr-defined]

    class FilesWithOldNames(files):  # type: ignore[misc]
        @staticmethod
        def scheme() -> str:
            return _SCHEME

        def load_config(self, config_path: str) -> ConfigResult:
            result: ConfigResult = super().load_config(config_path)
            tree: Any = OmegaConf.to_container(result.config, resolve=False)
            # A file of a group says `form` and means `dataset.form`.
            group = "" if result.header.get("package") else config_path.rpartition("/")[0]
            if renamed := use_new_names({group: tree} if group else tree):
                old_names.update(dict.fromkeys(renamed))
                result.config = OmegaConf.create(tree)
            return result

    return FilesWithOldNames


def register_resolvers(swept: frozenset[str] | None) -> None:
    """Register the resolvers of our YAML files; `swept` names the settings of a sweep, None where all overrides count."""
    OmegaConf.register_new_resolver("start_stamp", _start_stamp, replace=True)
    OmegaConf.register_new_resolver("run_slug", _run_slug, replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)
    OmegaConf.register_new_resolver("sweep_slug", functools.partial(_sweep_slug, swept), replace=True)
    # As text and back, 1e-4 x 10 is 0.001 and not 0.0010000000000000002.
    OmegaConf.register_new_resolver("product", lambda a, b: float(f"{a * b:.12g}"), replace=True)


def _start_stamp(now: str) -> str:
    """Return the time of the start; in a batch job of SLURM its id, which stays when the job is queued again."""
    return f"slurm-{slurm_job_id()}" if is_slurm_batch_job() else now


def _run_slug(*, _root_: DictConfig) -> str:
    """Return choices and overridden values, `smollm2-135m_lora_synthetic_rank-4`, for the name of a run folder."""
    names = [str(_root_[group]["name"]) for group in ("model", "sft_type", "dataset")]
    return _slug(names + _overridden(_root_, None))


def _sweep_name(*, _root_: DictConfig) -> str:
    """Return the program and, where one was chosen for all jobs, the experiment: `train_msagent_7b_lora`."""
    chosen = _root_.hydra.runtime.choices.get("experiment")
    return _slug([str(_root_.hydra.job.config_name), *([str(chosen)] if chosen else [])])


def _sweep_slug(swept: frozenset[str] | None, *, _root_: DictConfig) -> str:
    """Return the swept values of one job, `rank-4_learning_rate-0.001`."""
    return _slug(_overridden(_root_, swept))


def _overridden(composed: DictConfig, swept: frozenset[str] | None) -> list[str]:
    """Return `name-value` of the overrides in the order given: of the swept ones, or of all that affect something."""
    if "hydra" in composed:
        hydra_node = composed.hydra
    elif HydraConfig.initialized():
        hydra_node = HydraConfig.get()
    else:
        return []
    parts = []
    for text in hydra_node.overrides.task:
        key, _, value = str(text).lstrip("+~").partition("=")
        is_choice = key in hydra_node.runtime.choices
        if key in swept if swept is not None else not is_choice and key not in AFFECT_NOTHING:
            # A path says little, and its slashes would make folders.
            parts.append(value if is_choice else f"{key.split('.')[-1]}-{value.rstrip('/').split('/')[-1]}")
    return parts


def _slug(parts: Sequence[str]) -> str:
    clean = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._") for part in parts]
    return "_".join(part for part in clean if part)[:100].rstrip("-._") or "defaults"


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
    GlobalHydra.instance().clear()
    with searching(config_dir), hydra.initialize_config_dir(str(conf_dir()), config_name, VERSION_BASE):
        composed = hydra.compose(config_name, with_keys_of_others(overrides), return_hydra_config=True)
    return composed if with_hydra else without_hydra(composed)


def without_hydra(composed: DictConfig) -> DictConfig:
    """Return a copy without Hydra's own node."""
    settings_only = copy.deepcopy(composed)
    with open_dict(settings_only):
        settings_only.pop("hydra", None)
    return settings_only


C = TypeVar("C", TrainConfig, EvaluateConfig, AuditConfig, ExportConfig)


def to_train_config(composed: DictConfig) -> TrainConfig:
    """Return the composed settings of a training run as checked dataclasses; `ConfigError` names what is wrong."""
    return to_config(composed, TrainConfig)


def to_config(composed: DictConfig, root: type[C]) -> C:
    """Return the composed settings as `root`: no unknown key, no missing value, every value allowed by its schema.

    Raises:
        ConfigError: names what is wrong in one line.
    """
    settings_only = without_hydra(composed)
    if missing := check_keys(settings_only, root):
        from agentft.config.explain import missing_value  # which imports this module

        raise ConfigError(missing_value(missing, root))
    try:
        config = OmegaConf.to_object(settings_only)
    except OmegaConfBaseException as error:
        # OmegaConf's words of an interpolation: `Interpolation key 'sft_type.lr' not found`.
        raise ConfigError(f"{error.full_key!s}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, root):
        raise ConfigError(f"--config-name: names a {type(config).__name__}, this program takes a {root.__name__}")
    return config


def check_keys(settings_only: DictConfig, root: type) -> list[str]:
    """Return the names of the missing values.

    Raises:
        ConfigError: no dataclass has a key, which a `+` adds even to a dataclass node, or an interpolation takes a secret.
    """
    waiting = [("", settings_only)]
    while waiting:
        parent, node = waiting.pop()
        schema = OmegaConf.get_type(node)
        known = {field.name for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else set()
        for name in map(str, node):
            key = dotted(parent, name)
            if name not in known and schema is not dict:  # a dict holds another program's settings
                from agentft.config.explain import unknown_setting  # which imports this module

                raise ConfigError(unknown_setting(key, root, schemas_of(settings_only)))
            refers = OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name)
            if not refers and isinstance(node[name], DictConfig):
                waiting.append((key, node[name]))
    texts = dict(_texts_in(OmegaConf.to_container(settings_only, resolve=False), ""))
    for key, text in texts.items():
        if (found := re.search(r"\$\{oc\.env:([^},]+)", text)) and is_secret_name(found[1]):
            raise ConfigError(f"{key}: takes {found[1]} into the config; {KEEP_IN_ENVIRONMENT}")
    return [key for key, text in texts.items() if text == "???"]


def _texts_in(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text by its dotted name as it was written, interpolations included."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts_in(item, dotted(key, str(name)))


def schemas_of(composed: DictConfig) -> dict[str, str]:
    """Return the schema of each group in a composed config, from the classes of its nodes."""
    return {
        group: name
        for group, schemas in SCHEMAS.items()
        for name, schema in schemas.items()
        if group in composed and OmegaConf.get_type(composed, group) is schema
    }
