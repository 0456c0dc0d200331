"""Start `train.py` and `evaluate.py`, installed as `agentft-train` and `agentft-evaluate`.

Signals are handled before anything is imported, which takes seconds; the work itself then ends at once, or saves.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from agentft.signals import StopSignals

if TYPE_CHECKING:
    from agentft.config import EvaluateConfig, TrainConfig


def train() -> None:
    """Fine-tune a model by the command line."""
    with StopSignals() as signals, signals.deferred():
        from agentft.config import TrainConfig, compose_and_run

        compose_and_run("train", TrainConfig, _train)


def evaluate() -> None:
    """Evaluate a run's held-out conversations again, by the command line."""
    with StopSignals() as signals, signals.deferred():
        from agentft.config import EvaluateConfig, compose_and_run

        compose_and_run("evaluate", EvaluateConfig, _evaluate)


def _train(config: TrainConfig) -> float | None:
    from agentft.recipes.config import objective_of_finished

    if (done := objective_of_finished(config)) is not None:
        sys.stderr.write(
            f"{config.run_dir}: this run is finished, nothing is left to do; evaluate.py and export read it\n"
        )
        return done[0]
    # Imported here: composing, refusing a typo and --help must not wait for torch.
    from agentft.recipes.train import train

    return train(config).objective


def _evaluate(config: EvaluateConfig) -> float | None:
    from agentft.recipes.evaluate import evaluate

    with StopSignals.shared() as signals, signals.at_once():
        return evaluate(config).objective
