"""The settings of a whole run: one field per config group, and nothing that a room does not own."""

from __future__ import annotations

from dataclasses import dataclass

from agentft.data.config import DatasetConfig
from agentft.errors import ConfigError
from agentft.evaluation.config import EvaluationConfig
from agentft.model.config import ModelConfig, SftConfig
from agentft.tracking import TrackingConfig
from agentft.training.config import DistributedConfig, TrainingConfig


@dataclass(kw_only=True)
class TrainConfig:
    """`python train.py`: compose, preprocess, fine-tune, evaluate."""

    model: ModelConfig
    sft_type: SftConfig
    dataset: DatasetConfig
    distributed: DistributedConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig
    output_dir: str = "runs"
    """Folder that run folders are made in."""
    run_dir: str
    """This run's folder."""
    experiment: str | None = None
    """Name of the experiment file in use, for grouping."""
    seed: int = 42
    """Seed of initial adapter weights, dropout and the order of training."""
    threads: int | None = None
    """CPU threads for torch; null: all cores. Recorded, since it decides the last bits of a loss."""

    def __post_init__(self) -> None:
        if self.dataset.max_length > self.model.context:
            raise ConfigError(
                f"dataset.max_length={self.dataset.max_length} exceeds model.context={self.model.context} "
                f"of model={self.model.name}"
            )


@dataclass(kw_only=True)
class EvaluateConfig:
    """`python evaluate.py run=<run folder>`: answer the held-out conversations again and score them."""

    run: str
    """Run folder that `train.py` made."""
    checkpoint: str = "final"
    """`final`, `best`, `last`, a step number, or `base` for the untrained model."""
    evaluation: EvaluationConfig | None = None
    """null: as the run was trained with; else choose `evaluation=default` or another and override its values."""
    tracking: TrackingConfig
    threads: int | None = None
    """CPU threads for torch; null: as the run was trained with."""
