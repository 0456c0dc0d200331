"""Define the settings of each program, what does not go together among them, and the `config.yaml` of a run folder.

`config.yaml` holds the resolved values, without advanced settings at their defaults, below a defaults list of the schemas.
The list tells the reader which class each group had, and makes the file a primary config for Hydra: `python train.py
--config-dir <run folder> --config-name config` runs it again, in a new folder.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from agentft.data.config import DatasetConfig, HuggingFaceConfig, LocalConfig, ModelScopeConfig, SyntheticConfig
from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.errors import ConfigError, RunError
from agentft.evaluation.config import Engine, EvaluationConfig, Mode
from agentft.model.config import (
    ALL_LINEAR,
    Dtype,
    FreezeConfig,
    FullConfig,
    KernelChoice,
    LoraConfig,
    LoraStart,
    ModelConfig,
    QloraConfig,
    RandomShape,
    SftConfig,
    TrustConfig,
)
from agentft.runs import RunFolder, read_json
from agentft.settings import SEED, Settings, accepted, affects, default_of, hints_of, numbers
from agentft.tracking import TrackingConfig
from agentft.training.config import Resume, TrainingConfig
from agentft.training.run_fingerprint import described, differences

THREADS = {"minimum": 1, "maximum": 1024}
"""More would not compute faster on any machine, and a slip of some zeros stops one."""


@dataclass(kw_only=True)
class Program(Settings):
    """All settings of a program.

    Raises:
        ConfigError: some of them do not go together.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require_consistent(*vars(self).values(), self)


@dataclass(kw_only=True)
class TrainConfig(Program, affects="losses"):
    """`python train.py`: compose, preprocess, fine-tune, evaluate."""

    model: ModelConfig
    sft_type: SftConfig
    dataset: DatasetConfig
    distributed: DistributedConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig
    output_dir: str = field(default="runs", metadata={"affects": "nothing"})
    """Folder that run folders are made in."""
    run_dir: str = field(metadata={"affects": "nothing"})
    """This run's folder."""
    experiment: str | None = field(default=None, metadata={"affects": "nothing"})
    """Name of the experiment file in use, for grouping."""
    seed: int = field(default=42, metadata=SEED)
    """Seed of initial adapter weights, dropout and the order of training."""
    threads: int | None = field(default=None, metadata=THREADS)
    """CPU threads for torch; null: all cores. Recorded, since it decides the last bits of a loss."""


@dataclass(kw_only=True)
class EvaluateConfig(Program, affects="answers"):
    """`python evaluate.py run=<run folder>`: answer the held-out conversations again and score them."""

    run: str
    """Run folder that `train.py` made."""
    checkpoint: str = "final"
    """`final`, `best`, `last`, a step number, or `base` for the untrained model."""
    evaluation: EvaluationConfig | None = None
    """null: as the run was trained with; else `evaluation=default` or another option, with its values overridden."""
    tracking: TrackingConfig
    distributed: DistributedConfig = field(default_factory=lambda: DistributedConfig(name="single"))
    """Ranks among which the conversations are divided; each holds the whole model, whatever the engine."""
    threads: int | None = field(default=None, metadata=THREADS)
    """CPU threads for torch; null: as the run was trained with."""
    output: str | None = field(default=None, metadata={"affects": "nothing"})
    """Folder of answers and scores; null: the run's own. A job of a sweep has one to itself."""
    other_data: bool = field(default=False, metadata={"affects": "nothing"})
    """Score although the data is not that of the checkpoint's training, and may hold what the model has seen."""
    model: TrustConfig = field(default_factory=TrustConfig)
    """Of the run's model only what may be read or run: `model.allow_pickle`, `model.trust_remote_code`."""


@dataclass(kw_only=True)
class AuditOptions(Settings, group="audit", affects="results"):
    """What an audit looks for, and what it fails on."""

    fail_on: list[str] = field(default_factory=list)
    """Codes of findings that make the audit fail, besides broken invariants; docs/audit.md lists them."""
    similarity: float = field(default=0.8, metadata={"above": 0, "maximum": 1})
    """Share of common five-letter runs above which a held-out user turn nearly equals one of training."""
    page: bool = True
    """Write `audit.html`."""


@dataclass(kw_only=True)
class AuditConfig(Program, affects="results"):
    """`python -m agentft.audit`: what a dataset would train, and what is wrong with it; loads no weights."""

    model: ModelConfig
    dataset: DatasetConfig
    audit: AuditOptions = field(default_factory=AuditOptions)
    """What is looked for, and what fails."""
    view: str | None = None
    """Id of one conversation: show it with its labels, token by token, and do nothing else."""
    output: str = field(metadata={"affects": "nothing"})
    """Folder for the page, the report, its numbers and the rows that were set aside."""


@dataclass(kw_only=True)
class ExportConfig(Program, affects="results"):
    """`python -m agentft.export run=<run folder>`: a folder that transformers, vLLM and the hubs load as it is."""

    run: str
    """Run folder that `train.py` made."""
    checkpoint: str = "final"
    """`final`, `best`, `last` or a step number."""
    merge: bool = True
    """Merge the adapter into its base, as a whole model; false: the adapter alone."""
    dtype: Dtype = Dtype.auto
    """Number format of the weights of a whole model; auto: that which the run computed in."""
    out: str | None = field(default=None, metadata={"affects": "nothing"})
    """Folder to write; null: `export` or `adapter` in the run folder."""
    push: str | None = None
    """`modelscope:owner/name` or `huggingface:owner/name`: upload the folder there, with the hub's own login."""
    private: bool = True
    """Make a repository that the upload creates private."""
    model: TrustConfig = field(default_factory=TrustConfig)
    """Of the run's model only what may be read or run: `model.allow_pickle`, `model.trust_remote_code`."""


# --- What does not go together ---


def require_consistent(*groups: object) -> None:
    """Refuse settings that do not go together, within a group or between those of a program. Raises ConfigError."""
    for group in groups:
        if (line := _contradiction(group)) is not None:
            raise ConfigError(line)


def _contradiction(group: object) -> str | None:
    """Return in one line what does not go together within a group, or between the groups of a program."""
    match group:
        case LocalConfig(path=None, sources=[]):
            return (
                "dataset.path: missing; give dataset.path=<value>. A file (json, jsonl, csv, parquet; gz or zst) or a "
                "folder of such files; several go into dataset.sources"
            )
        case LocalConfig(path=str(path), sources=[_, *_]):
            return f"dataset.path={path} and dataset.sources: expected one of them; name the path among the sources"
        case ModelConfig(shape=RandomShape(hidden=width, heads=heads)) if width % (2 * heads) or heads % max(
            heads // 2, 1
        ):
            needed = "expected an even number of heads, or 1, whose double divides model.shape.hidden"
            return f"model.shape.heads={heads}, model.shape.hidden={width}: {needed}"
        case TrackingConfig(project=""):
            return "tracking.project=: empty; expected the name of a W&B project, or tracking=disabled"
        case LoraConfig(targets=list(names)) if not names or (ALL_LINEAR in names and len(names) > 1):
            return f"sft_type.targets=[{','.join(names)}]: expected names of layers, or {ALL_LINEAR} alone"
        case LoraConfig(dora=True, start=LoraStart.pissa):
            return "sft_type.dora=true with sft_type.start=pissa: one of the two; both redefine the frozen part"
        case QloraConfig(dora=True, bits=8):
            return "sft_type.dora=true with sft_type.bits=8: peft cannot; use sft_type.bits=4"
        case FreezeConfig(layers=0, embeddings=False, head=False):
            return "sft_type.layers=0: nothing would be trained; expected at least 1"
        case DistributedConfig(engine=EngineKind.single) if (group.nproc or 1) * (group.nnodes or 1) > 1:
            ranks = f"{group.nproc or 1} x {group.nnodes or 1}"
            return f"distributed=single is one process; for {ranks} choose distributed=ddp, fsdp or one of deepspeed_*"
        case DistributedConfig(engine=engine) if group.deepspeed and engine is not EngineKind.deepspeed:
            return f"distributed.deepspeed: given, but distributed.engine={engine} does not read it"
        case EvaluationConfig(eval_steps=0, patience=patience) if patience:
            return f"evaluation.patience={patience}: nothing is measured with evaluation.eval_steps=0"
        case EvaluationConfig(engine=Engine.openai, base_url=url) if not (url or "").startswith(
            ("http://", "https://")
        ):
            needed = "evaluation.engine=openai needs the endpoint's address, such as http://localhost:8000/v1"
            return f"evaluation.base_url={url}: {needed}"
        case EvaluationConfig(engine=Engine.openai, served_model=None | ""):
            return "evaluation.served_model: evaluation.engine=openai needs the model's name at the endpoint"
        case EvaluationConfig(engine=engine, base_url=str(url)) if engine is not Engine.openai:
            return f"evaluation.base_url={url} is for evaluation.engine=openai"
        case EvaluationConfig(mode=Mode.likelihood, engine=engine) if engine is not Engine.transformers:
            return "evaluation.mode=likelihood needs the model's own numbers: evaluation.engine=transformers"
        case AuditOptions(fail_on=[_, *_] as codes):
            from agentft.audits.checks import CODES  # whose libraries take a second

            unknown = next((code for code in codes if code not in CODES), None)
            return unknown and f"audit.fail_on={unknown}: no such finding; known are {', '.join(CODES)}"
        case TrainConfig(training=TrainingConfig(compile=True), model=ModelConfig(kernels=KernelChoice.liger)):
            return (
                "training.compile=true with model.kernels=liger: torch's compiler fuses the same parts, and does not see "
                "into other compiled code; take one of them"
            )
        case TrainConfig() | AuditConfig() if group.dataset.max_length > group.model.context:
            return (
                f"dataset.max_length={group.dataset.max_length} exceeds model.context={group.model.context} "
                f"of model={group.model.name}"
            )
    return None


def require_typed(model: TrustConfig, typed: TrustConfig, source: object) -> None:
    """Refuse what `source`, a file, allows and the command line does not.

    Raises:
        ConfigError: names the setting, and where it stands.
    """
    for each in dataclasses.fields(TrustConfig):
        if getattr(model, each.name) and not getattr(typed, each.name):
            raise ConfigError(
                f"model.{each.name}=true stands in {source} and counts from this command line only; refused. If you "
                f"trust where the weights come from, type model.{each.name}=true"
            )


# --- What a setting affects ---

AFFECT_NOTHING = frozenset(
    name
    for root in (TrainConfig, EvaluateConfig, AuditConfig, ExportConfig)
    for name, what in affects(root).items()
    if what == "nothing"
)
"""Dotted names of the settings that change no data, losses, answers or results: another value is still the same job."""


def deciding(settings: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Return the settings, in their groups, without those that affect nothing."""
    return {
        name: deciding(value, f"{group}{name}.") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if group + name not in AFFECT_NOTHING
    }


# --- A config as a file ---

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
    parts = {each: getattr(value, each.name) for each in dataclasses.fields(value)}
    return {
        each.name: _plain(part, brief)
        for each, part in parts.items()
        if not (brief and each.metadata.get("advanced") and part == default_of(each))
    }


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
    fields = hints_of(schema) if dataclasses.is_dataclass(schema) else {}
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
                left_out = [each for each in dataclasses.fields(schema) if each.metadata.get("advanced")]
                groups[group] = {each.name: _plain(default_of(each), brief=False) for each in left_out} | values
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
    require_typed(config.model, typed, Path(run_dir) / FILE)
    trust = {each.name: getattr(typed, each.name) for each in dataclasses.fields(TrustConfig)}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **trust))


# --- A start in the folder of a run ---

_DECIDED_LATER = (
    *("threads.", "model.dtype.", "model.attention.", "model.kernels.", "model.context.", "model.learning_rate_scale."),
    *("model.source.", "model.id.", "model.modelscope_id.", "model.huggingface_id.", "model.revision.", "model.path."),
    *("model.wheel.", "dataset.path.", "dataset.test_path.", "dataset.sources.", "dataset.id.", "dataset.revision."),
    *("evaluation.", "experiment."),
)
"""Settings and groups whose change may change no training, each with a dot: the digests of what is loaded decide."""


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
        others = {name: change for name, change in changed.items() if not f"{name}.".startswith(_DECIDED_LATER)}
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
