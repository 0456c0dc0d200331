"""Start `train.py` and `evaluate.py`, installed as `agentft-train` and `agentft-evaluate`.

Signals are handled before anything is imported, which takes seconds; the work itself then ends at once, or saves.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from agentft.errors import AgentftError
from agentft.signals import StopSignals

if TYPE_CHECKING:
    from agentft.config import EvaluateConfig, TrainConfig

AS_TRAINED = "evaluation=as_trained"


def train() -> None:
    """Fine-tune a model by the command line."""
    with StopSignals() as signals, signals.deferred():
        from agentft.config import TrainConfig, compose_and_run

        compose_and_run("train", TrainConfig, _train)


def evaluate() -> None:
    """Evaluate a run's held-out conversations again, by the command line."""
    with StopSignals() as signals, signals.deferred():
        from agentft.config import EvaluateConfig, compose_and_run

        sys.argv[1:] = with_run_settings(sys.argv[1:])
        compose_and_run("evaluate", EvaluateConfig, _evaluate)


def _train(config: TrainConfig) -> float | None:
    from agentft.recipes.saved import objective_of_finished

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


def with_run_settings(arguments: Sequence[str]) -> list[str]:
    """Put the run's own `evaluation` settings before those of the command line, where it changes some and names no option.

    `python evaluate.py run=<run> evaluation.mode=replay` so changes one setting and takes all others from the run. Hydra
    would otherwise have nothing to change: what is not chosen is null. A sweep over several runs leaves this to its jobs,
    each of which has one.
    """
    chosen = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") == "evaluation"]
    changes = any(argument.lstrip("+~").startswith("evaluation.") for argument in arguments)
    if chosen not in ([], [AS_TRAINED]) or not (changes or chosen):
        return list(arguments)
    from agentft.config import saved_config

    rest = [argument for argument in arguments if argument != AS_TRAINED]
    runs = [argument.removeprefix("run=") for argument in arguments if argument.startswith("run=")]
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"}.intersection(arguments) and "," in "".join(runs[-1:]):
        return _inserted([AS_TRAINED], rest)
    own: list[str] = []
    try:
        settings = saved_config(_unquoted(runs[-1])).evaluation if runs else None
    except AgentftError:
        settings = None  # the evaluation itself says what is wrong with the run
    if settings is not None:
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        own = [f"evaluation.{name}={_text(value)}" for name, value in values.items()]
    return _inserted(["evaluation=default", *own], rest)


def _inserted(settings: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Put settings before all others and behind the flags, which must stand first."""
    flags = next((at for at, each in enumerate(arguments) if "=" in each and not each.startswith("-")), len(arguments))
    return [*arguments[:flags], *settings, *arguments[flags:]]


def _text(value: Any) -> str:
    """Return a value as Hydra's command line reads it."""
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):
        # Backslashes count double before a quote and at the end; `${` would be looked up.
        body = re.sub(r'(\\*)("|\Z)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value.replace("${", "\\${"))
        return f'"{body}"'
    return json.dumps(value)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
