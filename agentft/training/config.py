"""How the model is trained: the settings of the group `training`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agentft.errors import ConfigError


class Schedule(StrEnum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Resume(StrEnum):
    auto = "auto"
    """Go on from the newest valid checkpoint of the run folder; start afresh where there is none."""
    never = "never"
    """Start afresh; refuse a run folder that has checkpoints."""
    must = "must"
    """Go on from a checkpoint or refuse."""


class MemoryCheck(StrEnum):
    refuse = "refuse"
    """Say what is needed, and refuse what cannot fit by far."""
    warn = "warn"
    """Say it, and go on."""
    off = "off"


class NonFinite(StrEnum):
    stop = "stop"
    """End the training; the last checkpoint stays."""
    skip = "skip"
    """Leave the step out, with its conversations in the log, and count it."""


@dataclass(kw_only=True)
class TrainingConfig:
    """The loop. One step is one update of the weights, from `micro_batch x accumulation` conversations over all ranks."""

    epochs: float = 1.0
    """Passes over the sample; may be a fraction."""
    max_steps: int = -1
    """Stop after so many steps; -1: by `epochs`."""
    stop_at: float = 1.0
    """Pause at this share of all steps: save, examine, end. The schedule stays that of all steps; a larger share goes on."""
    micro_batch: int = 1
    """Conversations in one forward pass; packed, rows of `dataset.max_length` tokens in one. Halved, with the same
    conversations in a step, where memory runs out."""
    packing: str = "auto"
    """Lay several conversations end to end in a row, each seeing itself alone: true, false, or auto, which packs on CUDA,
    where it saves time, and not on the CPU, where it costs some. The update is the same; the choice is printed."""
    accumulation: int = 16
    """Forward passes in one step, shared out among the ranks. The loss is weighed by supervised tokens over all of them."""
    learning_rate: float
    """Peak rate, reached after the warm-up."""
    schedule: Schedule = Schedule.cosine
    """How the rate falls after the warm-up."""
    warmup: float = 0.1
    """Share of all steps in which the rate rises from 0."""
    min_learning_rate_ratio: float = 0.0
    """Rate at the end over the peak rate."""
    weight_decay: float = 0.01
    """Decoupled; on matrices only, never on biases, norms or embeddings of LoRA."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.999
    """AdamW's decay of the mean squared gradient."""
    epsilon: float = 1e-8
    """AdamW's addend in the denominator."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this L2 norm; 0: never."""
    nonfinite: NonFinite = NonFinite.stop
    """What a step does whose loss or gradient is NaN or infinite; it never changes the weights."""
    nonfinite_limit: int = 3
    """With `nonfinite=skip`: steps that may be left out in a row; one more ends the training."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass; null: on CUDA, where the estimated memory does not fit without it."""
    memory_check: MemoryCheck = MemoryCheck.refuse
    """Whether a training whose estimated memory exceeds the device's is refused before its weights are fetched."""
    compile: bool = False
    """Run torch's compiler over each block. It takes a minute at the start and a C++ compiler on a CPU, Triton on CUDA; not
    together with `model.kernels=compiled`, which fuses the same parts without it."""
    logging_steps: int = 20
    """Steps between lines of `metrics.jsonl` and of the log."""
    save_steps: int = 50
    """Steps between checkpoints; 0: only at the end."""
    save_total_limit: int = 2
    """Checkpoints to keep besides the best one."""
    resume: Resume = Resume.auto
    """What to do with the checkpoints of the run folder."""
    fallback: bool = True
    """Go on from the checkpoint before where the newest is damaged; false: refuse."""
    allow_changes: bool = False
    """Go on from a checkpoint although data, model, settings or threads differ; `run.json` names every difference."""

    def __post_init__(self) -> None:
        self.packing = self.packing.lower()
        if self.packing not in ("auto", "true", "false"):
            raise ConfigError(f"training.packing={self.packing}: expected auto, true or false")
        for name in ("micro_batch", "accumulation", "logging_steps", "save_total_limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)}: expected at least 1")
        if self.nonfinite_limit < 0:
            raise ConfigError(f"training.nonfinite_limit={self.nonfinite_limit}: expected 0 or more")
        if self.save_steps < 0:
            raise ConfigError(f"training.save_steps={self.save_steps}: expected 0 (at the end only) or more")
        if self.max_steps < -1 or self.max_steps == 0:
            raise ConfigError(f"training.max_steps={self.max_steps}: expected -1 (by epochs) or a positive number")
        if self.epochs <= 0:
            raise ConfigError(f"training.epochs={self.epochs}: expected a positive number")
        if not 0.0 < self.stop_at <= 1.0:
            raise ConfigError(f"training.stop_at={self.stop_at}: expected a share of all steps above 0, at most 1")
        if self.learning_rate <= 0:
            raise ConfigError(f"training.learning_rate={self.learning_rate}: expected a positive number")
        if not 0.0 <= self.warmup <= 1.0:
            raise ConfigError(f"training.warmup={self.warmup}: expected a share of all steps between 0 and 1")
