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

from collections.abc import Mapping
from typing import Any

FIELDS = ("weight", "loss", "loss_scale", "train")


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
