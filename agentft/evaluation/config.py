"""What is measured, and how answers are generated: the settings of the group `evaluation`."""

from __future__ import annotations

from dataclasses import dataclass

from agentft.errors import ConfigError


@dataclass(kw_only=True)
class EvaluationConfig:
    """Greedy, teacher-forced evaluation of every step of the held-out conversations."""

    steps: int = 50
    """Training steps between evaluations of the held-out loss; 0: never during training."""
    before: bool = True
    """Measure the untrained model too, so that the run ends with a table before / after."""
    after: bool = True
    """Generate and score at the end of training."""
    conversations: int = -1
    """Held-out conversations that are answered, the first of the held-out order; -1: all."""
    batch: int = 8
    """Answers generated at once."""
    max_new_tokens: int = 512
    """An answer is cut here, which is counted."""
    best_metric: str = "loss"
    """What the best checkpoint is chosen by: `loss` on the held-out conversations (lower is better)."""
    draws: int = 10_000
    """Bootstrap draws over conversations for the 95 % intervals."""
    seed: int = 0
    """Seed of the bootstrap."""
    allow_bad_references: bool = False
    """Go on when a reference call cannot be read; it is listed and left out of the scores."""
    examples: int = 2
    """Example answers shown side by side at the end."""

    def __post_init__(self) -> None:
        for name in ("batch", "max_new_tokens", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name}={getattr(self, name)}: expected at least 1")
        if self.conversations < -1 or self.conversations == 0:
            raise ConfigError(f"evaluation.conversations={self.conversations}: expected -1 (all) or a positive number")
