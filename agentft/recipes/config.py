"""Define the settings of each program: one field per config group, and what belongs to none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agentft.audits.findings import CODES
from agentft.data.config import DatasetConfig
from agentft.distributed.config import DistributedConfig
from agentft.errors import ConfigError
from agentft.evaluation.config import EvaluationConfig
from agentft.model.config import Dtype, KernelChoice, ModelConfig, SftConfig, TrustConfig
from agentft.settings import SEED, Settings, affects
from agentft.tracking import TrackingConfig
from agentft.training.config import TrainingConfig

THREADS = {"minimum": 1, "maximum": 1024}
"""More would not compute faster on any machine, and a slip of some zeros stops one."""


@dataclass(kw_only=True)
class TrainConfig(Settings, affects="losses"):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training.compile and self.model.kernels is KernelChoice.liger:
            raise ConfigError(
                f"training.compile=true with model.kernels={self.model.kernels}: torch's compiler fuses the same parts, and "
                "does not see into other compiled code; take one of them"
            )
        if self.dataset.max_length > self.model.context:
            raise ConfigError(
                f"dataset.max_length={self.dataset.max_length} exceeds model.context={self.model.context} "
                f"of model={self.model.name}"
            )


@dataclass(kw_only=True)
class EvaluateConfig(Settings, affects="answers"):
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
    """What an audit looks for, shows, and fails on."""

    fail_on: list[str] = field(default_factory=list)
    """Codes of findings that make the audit fail, besides broken invariants; docs/audit.md lists them."""
    examples: int = field(default=5, metadata={"minimum": 0, "maximum": 10**6})
    """Places named for each kind of finding."""
    sample: int = field(default=24, metadata={"minimum": 0, "maximum": 10**6})
    """Conversations in the page, chosen by content hash; the first example of each finding comes on top."""
    tools: int = field(default=15, metadata={"minimum": 0, "maximum": 10**6})
    """Most called tools that are listed."""
    similarity: float = field(default=0.8, metadata={"above": 0, "maximum": 1})
    """Share of common five-letter runs above which a held-out user turn nearly equals one of training."""
    page: bool = True
    """Write `audit.html`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for code in self.fail_on:
            if code not in CODES:
                raise ConfigError(f"audit.fail_on={code}: no such finding; known are {', '.join(CODES)}")


@dataclass(kw_only=True)
class AuditConfig(Settings, affects="results"):
    """`python -m agentft.audit`: what a dataset would train, and what is wrong with it; loads no weights."""

    model: ModelConfig
    dataset: DatasetConfig
    audit: AuditOptions = field(default_factory=AuditOptions)
    """What is looked for and shown."""
    view: str | None = None
    """Id of one conversation: show it with its labels, token by token, and do nothing else."""
    output: str = field(metadata={"affects": "nothing"})
    """Folder for the page, the report, its numbers and the rows that were set aside."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset.max_length > self.model.context:
            raise ConfigError(
                f"dataset.max_length={self.dataset.max_length} exceeds model.context={self.model.context} "
                f"of model={self.model.name}"
            )


@dataclass(kw_only=True)
class ExportConfig(Settings, affects="results"):
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
