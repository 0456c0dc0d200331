"""`python evaluate.py run=<run> evaluation.mode=replay`: one setting changed, all others as the run was trained with."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from enum import Enum
from typing import Any

from agentft.errors import AgentftError
from agentft.recipes.saved import saved_config

AS_TRAINED = "evaluation=as_trained"


def with_run_settings(arguments: Sequence[str]) -> list[str]:
    """Put the run's own `evaluation` settings before those of the command line, where it changes some and names no option.

    Hydra would otherwise have nothing to change: what is not chosen is null. A sweep over several runs leaves this to its
    jobs, each of which has one.
    """
    chosen = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") == "evaluation"]
    changes = any(argument.lstrip("+~").startswith("evaluation.") for argument in arguments)
    if chosen not in ([], [AS_TRAINED]) or not (changes or chosen):
        return list(arguments)
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
    """A value as Hydra's command line reads it."""
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
