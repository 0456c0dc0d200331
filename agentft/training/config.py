"""Define the settings of the group `training`: how the model is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from agentft.settings import Settings


class Schedule(StrEnum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Resume(StrEnum):
    auto = "auto"
    """Resume from the newest valid checkpoint of the run folder; start afresh where there is none."""
    never = "never"
    """Start afresh; refuse a run folder that has checkpoints."""
    must = "must"
    """Resume from a checkpoint or refuse."""


class MemoryCheck(StrEnum):
    refuse = "refuse"
    """Log what is needed, and refuse what cannot fit by far."""
    warn = "warn"
    """Log it, and continue."""
    off = "off"


class NonFinite(StrEnum):
    stop = "stop"
    """End the training; the last checkpoint stays."""
    skip = "skip"
    """Leave the step out, with its conversations in the log, and count it."""


@dataclass(kw_only=True)
class TrainingConfig(Settings, group="training", affects="losses"):
    """The loop. One step is one update. All ranks together take `per_device_batch_size` x
    `gradient_accumulation_steps` conversations for it."""

    epochs: float = field(default=1.0, metadata={"above": 0, "maximum": 10**6})
    """Passes over the sample; may be a fraction."""
    max_steps: int = field(default=-1, metadata={"minimum": 1, "maximum": 10**9, "also": -1})
    """Stop after so many steps; -1: by `epochs`."""
    pause_at_fraction: float = field(
        default=1.0, metadata={"advanced": True, "above": 0, "maximum": 1, "affects": "nothing"}
    )
    """Save, evaluate and end at this share of all steps. The schedule stays that of all steps; a larger share resumes."""
    max_hours: float | None = field(
        default=None, metadata={"advanced": True, "above": 0, "maximum": 10**4, "affects": "nothing"}
    )
    """Save, evaluate and end after the step at which this process has run for so many hours; the same command resumes, with as
    many again. null: no limit."""
    per_device_batch_size: int = field(default=1, metadata={"minimum": 1, "maximum": 10**5})
    """Conversations in one forward pass; packed, rows of `dataset.max_length` tokens. Halved, with the same conversations in a
    step, where memory runs out."""
    packing: str = field(default="auto", metadata={"choices": ("auto", "true", "false")})
    """Put several conversations into one row, each attending to itself alone: true, false, or auto, which packs on CUDA only.
    The update is the same; the choice is printed."""
    gradient_accumulation_steps: int = field(default=16, metadata={"minimum": 1, "maximum": 10**5})
    """Forward passes of one step, over all ranks together. The loss is weighted by supervised tokens over all of them."""
    learning_rate: float = field(metadata={"above": 0, "maximum": 1})
    """Peak rate, reached after the warm-up."""
    schedule: Schedule = Schedule.cosine
    """How the rate falls after the warm-up."""
    warmup: float = field(default=0.1, metadata={"minimum": 0, "maximum": 1})
    """Share of all steps in which the rate rises from 0."""
    min_learning_rate_ratio: float = field(default=0.0, metadata={"advanced": True, "minimum": 0, "maximum": 1})
    """Rate at the end over the peak rate."""
    weight_decay: float = field(default=0.01, metadata={"minimum": 0, "maximum": 10})
    """Decoupled; on matrices only, never on biases, norms or embeddings of LoRA."""
    beta1: float = field(default=0.9, metadata={"advanced": True, "minimum": 0, "below": 1})
    """AdamW's decay of the mean gradient."""
    beta2: float = field(default=0.999, metadata={"advanced": True, "minimum": 0, "below": 1})
    """AdamW's decay of the mean squared gradient."""
    epsilon: float = field(default=1e-8, metadata={"advanced": True, "above": 0, "maximum": 1})
    """AdamW's addend in the denominator."""
    max_grad_norm: float = field(default=1.0, metadata={"minimum": 0, "maximum": 10**6})
    """Gradients are scaled down to this L2 norm; 0: never."""
    nonfinite: NonFinite = field(default=NonFinite.stop, metadata={"advanced": True})
    """Handling of a step whose loss or gradient is NaN or infinite; it never changes the weights."""
    nonfinite_limit: int = field(default=3, metadata={"advanced": True, "minimum": 0, "maximum": 10**6})
    """With `nonfinite=skip`: steps in a row that may be skipped; one more ends the training."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass; null: on CUDA, where the estimated memory does not fit without it."""
    memory_check: MemoryCheck = field(default=MemoryCheck.refuse, metadata={"advanced": True, "affects": "nothing"})
    """Refuse a training whose estimated memory exceeds the device's, before its weights are fetched, or only warn."""
    compile: bool = field(default=False, metadata={"advanced": True})
    """Compile each block with torch's compiler: takes a minute at the start, and needs a C++ compiler on a CPU, Triton on CUDA.
    Not together with `model.kernels=liger`, which fuses the same parts without it."""
    logging_steps: int = field(default=20, metadata={"minimum": 1, "maximum": 10**9, "affects": "nothing"})
    """Steps between lines of `metrics.jsonl` and of the log."""
    save_steps: int = field(default=50, metadata={"minimum": 0, "maximum": 10**9, "affects": "nothing"})
    """Steps between checkpoints; 0: only at the end."""
    save_total_limit: int = field(default=2, metadata={"minimum": 1, "maximum": 10**6, "affects": "nothing"})
    """Checkpoints to keep besides the best one."""
    resume: Resume = field(default=Resume.auto, metadata={"affects": "nothing"})
    """Use of the checkpoints in the run folder."""
    fallback: bool = field(default=True, metadata={"advanced": True, "affects": "nothing"})
    """Resume from the previous checkpoint where the newest is damaged; false: refuse."""
    allow_changes: bool = field(default=False, metadata={"advanced": True, "affects": "nothing"})
    """Resume although data, model, settings or threads differ from the checkpoint's; `run.json` names every difference."""
