"""Write a config as a file of its run folder, read it back without Hydra, and compare it with what is asked of the folder.

`config.yaml` holds the resolved values below a defaults list that names the schema of each group; an advanced setting that
has its default is left out. The list tells the reader which class each group had (`sft_type: schema_lora`), and makes the
file a primary config for Hydra: `python train.py --config-dir <run folder> --config-name config` runs it again, in a new
folder.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from agentft.data.config import HuggingFaceConfig, LocalConfig, ModelScopeConfig, SyntheticConfig
from agentft.distributed.config import DistributedConfig
from agentft.errors import ConfigError, RunError
from agentft.evaluation.config import EvaluationConfig
from agentft.model.config import FreezeConfig, FullConfig, LoraConfig, ModelConfig, QloraConfig, TrustConfig
from agentft.recipes.config import AuditConfig, EvaluateConfig, ExportConfig, TrainConfig, deciding
from agentft.runs import RunFolder, read_json
from agentft.settings import accepted, numbers
from agentft.tracking import TrackingConfig
from agentft.training.config import Resume, TrainingConfig
from agentft.training.run_fingerprint import described, differences

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
# The settings of this run; advanced ones that are not here have their defaults. Run it again, in a new folder:
#   python train.py --config-dir {folder} --config-name config
# Resume it in this folder:
#   python train.py run_dir={folder}
"""

RENAMED = {
    "dataset.form": "dataset.format",
    "dataset.sample": "dataset.max_samples",
    "dataset.span_weights.frame": "dataset.span_weights.call_syntax",
    "training.micro_batch": "training.per_device_batch_size",
    "training.accumulation": "training.gradient_accumulation_steps",
    "training.stop_at": "training.pause_at_fraction",
    "evaluation.draws": "evaluation.bootstrap_samples",
    "evaluation.steps": "evaluation.eval_steps",
}
"""Settings that had another name in the version before; the old one is taken with a notice."""


def use_new_names(config: dict[str, Any]) -> list[str]:
    """Rename old settings of a config and of its sweep in place, and return a notice for each."""
    hydra = config.get("hydra") or {}
    swept = (hydra.get("sweeper") or {}).get("params")
    notices = []
    for old, new in RENAMED.items():
        *groups, name = old.split(".")
        owner: Any = config
        for group in groups:
            owner = owner.get(group) if isinstance(owner, dict) else None
        for node, before, now in ((owner, name, new.rpartition(".")[2]), (swept, old, new)):
            if isinstance(node, dict) and before in node:
                value = node.pop(before)
                node.setdefault(now, value)
                notices.append(f"{old} is {new} now")
    return notices


def primary_config(config: TrainConfig, *, brief: bool = False) -> dict[str, Any]:
    """Return a composed config as Hydra starts from it: a defaults list that names the schemas, and the values.

    `brief` leaves out the advanced settings that have their defaults.
    """
    defaults: list[Any] = ["schema_train"]
    for group, schemas in SCHEMAS.items():
        kind = type(getattr(config, group))
        defaults.append({group: next(name for name, schema in schemas.items() if schema is kind)})
    # After the values, so that a rerun takes a folder of its own and not the one that is written down here.
    defaults += ["_self_", "run_folder"]
    return {"defaults": defaults, **_plain(config, brief)}


def config_to_yaml(config: TrainConfig) -> str:
    """Return the text of `config.yaml`; `config_from_yaml` gives an equal config back."""
    return _HEADER.format(folder=config.run_dir) + OmegaConf.to_yaml(primary_config(config, brief=True))


def settings_to_yaml(config: EvaluateConfig) -> str:
    """Return the text of an evaluation's settings, for its ranks; `config_from_yaml` gives an equal config back."""
    return OmegaConf.to_yaml(_plain(config, brief=False))


def _plain(value: Any, brief: bool) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):
        return value.replace("${", "\\${")  # OmegaConf would look it up
    if isinstance(value, list):
        return [_plain(item, brief) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, brief) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    shown = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if not (brief and field.metadata.get("advanced") and part == _default(field)):
            shown[field.name] = _plain(part, brief)
    return shown


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def config_from_yaml(text: str, root: type[C]) -> C:
    """Return the config that `config_to_yaml` wrote; what is not there has its default.

    Raises:
        ConfigError: it is not YAML, or does not fit the schemas.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"config is {type(data).__name__}, expected settings by name")
    use_new_names(data)
    config = OmegaConf.structured(root)
    for entry in data.pop("defaults", []):
        for group, name in entry.items() if isinstance(entry, dict) else ():
            if name not in SCHEMAS.get(group, {}):
                known = ", ".join(SCHEMAS.get(group, {})) or "none"
                raise ConfigError(f"defaults: {group}: {name} is not a schema; known are {known}")
            config[group] = SCHEMAS[group][name]
    try:
        return typing.cast("C", OmegaConf.to_object(OmegaConf.merge(config, data)))
    except OmegaConfBaseException as error:
        raise ConfigError(_refusal(error)) from error


def _refusal(error: OmegaConfBaseException) -> str:
    """Return what OmegaConf refuses of a saved config, in one line."""
    name, key, schema = error.key, error.full_key, typing.cast("type", error.object_type)
    fields = typing.get_type_hints(schema) if dataclasses.is_dataclass(schema) else {}
    match error:
        case ConfigKeyError():
            return f"{key}: no such setting; known are {', '.join(sorted(fields))}"
        case MissingMandatoryValue():
            return f"{key}: missing"
        case ValidationError() if name in fields:
            return f"{key}={error.value}: expected {accepted(fields[name], numbers(schema).get(name))}"
    return f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]


def saved_settings(text: str) -> dict[str, Any]:
    """Return the groups of a `config.yaml` as plain data, unchecked, and what was left out with its default.

    Many runs are read for one table: this takes a tenth of the time of `config_from_yaml`.
    """
    groups = yaml.safe_load(text)
    if not isinstance(groups, dict):
        return {}
    use_new_names(groups)
    for entry in groups.pop("defaults", []):
        for group, name in entry.items() if isinstance(entry, dict) else ():
            schema, values = SCHEMAS.get(group, {}).get(name), groups.get(group)
            if schema is not None and isinstance(values, dict):
                left_out = [field for field in dataclasses.fields(schema) if field.metadata.get("advanced")]
                groups[group] = {field.name: _plain(_default(field), brief=False) for field in left_out} | values
    return groups


def saved_config(run_dir: str | Path) -> TrainConfig:
    """Return the config of the run in `run_dir`, from its `config.yaml`.

    Raises:
        RunError: there is none.
        ConfigError: it cannot be read; the message names the file.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise RunError(f"{path}: not there; expected the folder of a run that train.py made")
    try:
        return config_from_yaml(path.read_text(encoding="utf-8"), TrainConfig)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def trained_config(run_dir: str | Path, typed: TrustConfig) -> TrainConfig:
    """Return the config of the run in `run_dir`, with the trust that this command line gives and not the folder's own.

    Raises:
        ConfigError: the folder allows code or pickles, which `typed` does not.
    """
    config = saved_config(run_dir)
    config.model.require_typed(typed, Path(run_dir) / FILE)
    trust = {each.name: getattr(typed, each.name) for each in dataclasses.fields(TrustConfig)}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **trust))


_DECIDED_LATER = (
    *("threads", "model.dtype", "model.attention", "model.kernels", "model.context", "model.learning_rate_scale"),
    *("model.source", "model.id", "model.modelscope_id", "model.huggingface_id", "model.revision", "model.path"),
    *(
        "evaluation",
        "experiment",
        "model.wheel",
        "dataset.path",
        "dataset.test_path",
        "dataset.sources",
        "dataset.id",
        "dataset.revision",
    ),
)
"""Settings whose change may change no training: the digests of what is loaded decide."""


def objective_of_finished(config: TrainConfig) -> tuple[float | None] | None:
    """Return the objective of the run in `config.run_dir` if it is finished and `config` asks for nothing else.

    Of another state, or where there is no run yet: None.

    Raises:
        ConfigError: the folder has checkpoints of another training; the settings that differ are named.
        RunError: a process trains in it.
    """
    run = RunFolder(config.run_dir)
    if not run.has_run():
        return None
    run.require_free()
    where = f"run_dir={config.run_dir}"
    if "evaluated" in read_json(run.record_file):
        raise ConfigError(f"{where}: holds an evaluation, not a training; choose another run_dir")
    changed = changed_settings(config, run)
    if any(run.checkpoints.glob("step-*")):
        if config.training.resume is Resume.never:
            raise ConfigError(f"{where} has checkpoints; training.resume=auto resumes from the newest")
        others = {name: change for name, change in changed.items() if not _is_below(name, _DECIDED_LATER)}
        if others and not config.training.allow_changes:
            raise ConfigError(
                f"{where} belongs to another training: {described(others)}. Give another run_dir, or resume anyway "
                "with training.allow_changes=true"
            )
    status = read_json(run.status_file) if run.status_file.is_file() else {}
    if changed or status.get("state") != "finished" or not run.final.is_dir():
        return None
    return (status.get("objective"),)


def changed_settings(config: TrainConfig, run: RunFolder) -> dict[str, str]:
    """Name the settings in which a run's own differ from `config`, but for those that change no training and no evaluation."""
    saved, now = deciding(primary_config(saved_config(run.path))), deciding(primary_config(config))
    return differences(dict(_own(saved, now)), dict(_own(now, saved)))


def _own(settings: dict[str, Any], others: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings, of a group that has another option only its name: the rest follows."""
    for group, values in settings.items():
        if group in ("defaults", "distributed"):  # it may resume elsewhere
            continue
        named = isinstance(values, dict) and "name" in values
        same = not named or values["name"] == others[group]["name"]
        yield group, values if same else values["name"]


def _is_below(name: str, groups: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in groups)
