"""Turns that their source shows and does not want trained: the fields by which today's formats say so, and what they mean here.

| field | known from |
|---|---|
| `weight`: 0 or 1 | OpenAI's fine-tuning format, on assistant messages |
| `loss`: true or false, `loss_scale`: 0 or 1 | ms-swift, on assistant messages |
| `train`: true or false | axolotl's `message_field_training`, on turns with `from` and `value` |

What the agent says is trained unless its turn says otherwise. A whole step is the unit, since its stop is one: where turns of
one step disagree, the step is not trained. Any other value of these fields is not understood, and noted as a field that is not used.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentft.data.grammar import Observation, Part

FIELDS = ("weight", "loss", "loss_scale", "train")


class MarkedTurn(dict[str, str]):
    """A turn in MSAgent form that another layout was converted to, with what of it is not to be trained."""

    untrained: tuple[int, ...] = ()
    """Steps of the turn, counted from 0."""


def untrained_field(turn: Mapping[Any, Any]) -> str | None:
    """`field value`, as the turn has it, by which a turn says that it is not to be trained; None where it does not."""
    for field in FIELDS:
        if _is_flag(turn.get(field)) and not turn[field]:
            return f"{field} {str(turn[field]).lower()}"
    return None


def understood_fields(turn: Mapping[Any, Any], *, agent: bool) -> frozenset[str]:
    """Which of `FIELDS` mean something here; on a turn that is not the agent's only that it is not trained."""
    return frozenset(f for f in FIELDS if turn.get(f) is None or (_is_flag(turn[f]) and (agent or not turn[f])))


def _is_flag(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def steps_with(positions: Iterable[int], parts: Sequence[Part]) -> tuple[int, ...]:
    """The steps that have one of the parts at `positions`."""
    wanted = set(positions)
    return tuple(number for number, step in enumerate(_places(parts)) if wanted.intersection(step))


def _places(parts: Sequence[Part]) -> list[list[int]]:
    """Positions of the parts of each step: runs between tool results, blank ones left out."""
    runs: list[list[int]] = [[]]
    for at, part in enumerate(parts):
        if isinstance(part, Observation):
            runs.append([])
        else:
            runs[-1].append(at)
    return [run for run in runs if any(parts[at].source.strip() for at in run)]
