"""A config as a file of its run folder: written without Hydra, read without Hydra, and yet runnable by Hydra.

`config.yaml` holds every value, resolved, below a defaults list that names the schema of each group. Read as plain
data, the list says which class each group had (`sft_type: schema_lora`); for Hydra it makes the file a primary config:
`python train.py --config-dir <run folder> --config-name config` runs it again, in a new folder.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from agentft.data.config import HuggingFaceConfig, LocalConfig, ModelScopeConfig, SyntheticConfig
from agentft.distributed.config import DistributedConfig
from agentft.errors import ConfigError, RunError
from agentft.evaluation.config import EvaluationConfig
from agentft.model.config import FreezeConfig, FullConfig, LoraConfig, ModelConfig, QloraConfig, TrustConfig
from agentft.recipes.config import AuditConfig, EvaluateConfig, ExportConfig, TrainConfig
from agentft.tracking import TrackingConfig
from agentft.training.config import TrainingConfig

C = TypeVar("C")

ROOTS: dict[str, type] = {
    "schema_train": TrainConfig,
    "schema_evaluate": EvaluateConfig,
    "schema_audit": AuditConfig,
    "schema_export": ExportConfig,
}
"""Schemas of the primary configs."""

SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"schema_model": ModelConfig},
    "sft_type": {
        "schema_lora": LoraConfig,
        "schema_qlora": QloraConfig,
        "schema_full": FullConfig,
        "schema_freeze": FreezeConfig,
    },
    "dataset": {
        "schema_synthetic": SyntheticConfig,
        "schema_local": LocalConfig,
        "schema_modelscope": ModelScopeConfig,
        "schema_huggingface": HuggingFaceConfig,
    },
    "distributed": {"schema_distributed": DistributedConfig},
    "training": {"schema_training": TrainingConfig},
    "evaluation": {"schema_evaluation": EvaluationConfig},
    "tracking": {"schema_tracking": TrackingConfig},
}
"""Config group -> schema name -> class. Each file in `conf/<group>/` names one of these first."""

FILE = "config.yaml"

_HEADER = """\
# Every setting of this run. Again, in a new folder:
#   python train.py --config-dir {folder} --config-name config
# Go on in this folder:
#   python train.py run_dir={folder}
"""


def primary_config(config: TrainConfig) -> dict[str, Any]:
    """Return a composed config as Hydra starts from it: a defaults list that names the schemas, and every value."""
    defaults: list[Any] = ["schema_train"]
    for group in SCHEMAS:
        defaults.append({group: _schema_name(group, type(getattr(config, group)))})
    # After the values, so that a rerun takes a folder of its own and not the one that is written down here.
    defaults += ["_self_", "run_folder"]
    return {"defaults": defaults, **_plain(config)}


def config_to_yaml(config: TrainConfig) -> str:
    """Text of `config.yaml` for a composed config; `config_from_yaml` gives an equal config back."""
    text: str = yaml.dump(primary_config(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return _HEADER.format(folder=config.run_dir) + text


def settings_to_yaml(config: EvaluateConfig) -> str:
    """Text of an evaluation's settings, for its ranks; `config_from_yaml` gives an equal config back."""
    text: str = yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


RENAMED = {
    "dataset.form": "dataset.format",
    "dataset.sample": "dataset.max_samples",
    "training.micro_batch": "training.per_device_batch_size",
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.stop_at": "training.pause_at_fraction",
    "evaluation.draws": "evaluation.bootstrap_samples",
    "evaluation.steps": "evaluation.eval_steps",
}
"""Settings that had another name in the version before; the old one is taken with a notice."""


def config_from_yaml(text: str, root: type[C]) -> C:
    """The config that `config_to_yaml` wrote. Raises `ConfigError` for anything that does not fit the schemas."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"config is {type(data).__name__}, expected settings by name")
    classes: dict[str, type] = {}
    for entry in data.pop("defaults", []):
        if isinstance(entry, dict):
            for group, schema in entry.items():
                if schema not in SCHEMAS.get(group, {}):
                    raise ConfigError(f"defaults: {group}: {schema} is not a schema; known are {_known(group)}")
                classes[group] = SCHEMAS[group][schema]
    for old, new in RENAMED.items():
        group, name = old.split(".")
        if isinstance(data.get(group), dict) and name in data[group]:
            data[group].setdefault(new.split(".")[1], data[group].pop(name))
    return typing.cast("C", _build(data, root, "", classes))


def saved_config(run_dir: str | Path) -> TrainConfig:
    """The config of the run in `run_dir`, from its `config.yaml`."""
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise RunError(f"{path}: not there; expected the folder of a run that train.py made")
    try:
        return config_from_yaml(path.read_text(encoding="utf-8"), TrainConfig)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def trained_config(run_dir: str | Path, typed: TrustConfig) -> TrainConfig:
    """The config of the run in `run_dir`, with the trust that this command line gives and not the folder's own.

    Raises:
        ConfigError: the folder allows code or pickles, which `typed` does not.
    """
    config = saved_config(run_dir)
    config.model.require_typed(typed, Path(run_dir) / FILE)
    trust = {each.name: getattr(typed, each.name) for each in dataclasses.fields(TrustConfig)}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **trust))


class _Dumper(yaml.SafeDumper):
    """Quotes what PyYAML takes for text and OmegaConf for a number: the revision `1234e56`."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    looks_like_number = re.match(r"[-+.]?\d|[-+]?\.?(inf|nan)", text, flags=re.IGNORECASE) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if looks_like_number else None)


_Dumper.add_representer(str, _represent_text)


def _plain(value: Any) -> Any:
    match value:
        case Enum():
            return value.name
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case _ if dataclasses.is_dataclass(value):
            return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        case _:
            return value


def _schema_name(group: str, wanted: type) -> str:
    for name, schema in SCHEMAS[group].items():
        if schema is wanted:
            return name
    raise ConfigError(f"{group}: {wanted.__name__} is not registered; known are {_known(group)}")


def _known(group: str) -> str:
    return ", ".join(SCHEMAS.get(group, {})) or "none"


def _build(value: Any, expected: Any, key: str, classes: Mapping[str, type]) -> Any:
    """`value` as `expected`, checked at every level; `key` is its dotted name."""
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(expected):
            return None
        (expected,) = (part for part in typing.get_args(expected) if part is not type(None))
    if typing.get_origin(expected) is list:
        if not isinstance(value, list):
            raise _wrong(key, value, "a list")
        (item_type,) = typing.get_args(expected)
        return [_build(item, item_type, f"{key}[{i}]", {}) for i, item in enumerate(value)]
    if typing.get_origin(expected) is dict:
        if not isinstance(value, dict):
            raise _wrong(key, value, "settings by name")
        return value
    if dataclasses.is_dataclass(expected):
        return _build_dataclass(value, typing.cast("type", expected), key, classes)
    if issubclass(expected, Enum):
        if value not in expected.__members__:
            raise _wrong(key, value, f"one of {', '.join(expected.__members__)}")
        return expected[value]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected in (int, float):
        return value  # the schema refuses what is none, and says the range
    if type(value) is not expected:
        raise _wrong(key, value, expected.__name__)
    return value


def _build_dataclass(value: Any, schema: type, key: str, classes: Mapping[str, type]) -> Any:
    if not isinstance(value, dict):
        raise _wrong(key, value, "settings by name")
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for name in value:
        if name not in fields:
            raise ConfigError(f"{_join(key, str(name))}: no such setting; known are {', '.join(sorted(fields))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{_join(key, name)}: missing")
    return schema(
        **{
            name: _build(part, hints[name] if key else classes.get(name, hints[name]), _join(key, name), {})
            for name, part in value.items()
        }
    )


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _wrong(key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{key}={value!r}: expected {expected}")
