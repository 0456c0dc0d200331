"""What fitting makes of a dataset: each conversation under the policy of its part, summed up once the parts are known."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from agentft.data.fit import Fitted, Outcome


@dataclass(slots=True)
class Fitting:
    """Sums over the conversations of one part."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Conversations by `agentft.data.fit.Outcome`."""
    examples: int = 0
    tokens: int = 0
    """Of the examples."""
    trained: int = 0
    """Labelled tokens of the examples."""
    steps: int = 0
    """What the agents say, step by step, in all conversations of the part."""
    steps_left_out: int = 0
    shortened_observations: int = 0

    @property
    def steps_kept(self) -> int:
        """Steps that some example has labels for."""
        return self.steps - self.steps_left_out

    def to_json(self) -> dict[str, Any]:
        """Every sum by its name."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"outcomes": dict(self.outcomes)}


@dataclass(frozen=True, slots=True)
class _Summary:
    """A conversation that is not used whole."""

    outcome: Outcome
    examples: int
    tokens: int
    trained: int
    steps_left_out: int
    shortened_observations: int
    problem: tuple[str, str] | None


class FitAccount:
    """Takes conversations in their order; keeps a few numbers of each, and more of those that are not used whole."""

    def __init__(self) -> None:
        self._tokens = array("I")
        self._trained = array("I")
        self._steps = array("I")
        self._changed: dict[int, tuple[_Summary, _Summary]] = {}
        """Position -> what training and what the held-out part make of it."""

    def add(self, *, tokens: int, trained: int, steps: int, train: Fitted, heldout: Fitted) -> None:
        """Enter the next conversation: sums of it as a whole, and what becomes of it in either part."""
        if train.outcome is not Outcome.whole:
            self._changed[len(self._tokens)] = (_summary(train), _summary(heldout))
        self._tokens.append(tokens)
        self._trained.append(trained)
        self._steps.append(steps)

    def count(self, index: int, into: Fitting, *, heldout: bool, times: int = 1) -> None:
        """Add one conversation to the sums of its part, in training as often as an epoch shows it."""
        if index not in self._changed:
            summary = _Summary(Outcome.whole, 1, self._tokens[index], self._trained[index], 0, 0, None)
        else:
            summary = self._changed[index][heldout]
        into.outcomes[str(summary.outcome)] += 1
        into.examples += times * summary.examples
        into.tokens += times * summary.tokens
        into.trained += times * summary.trained
        into.steps += self._steps[index]
        into.steps_left_out += summary.steps_left_out
        into.shortened_observations += summary.shortened_observations

    def set_aside(self) -> Iterator[tuple[int, bool, tuple[str, str]]]:
        """(position, as held-out, reason and detail) of all that cannot be used, under either policy."""
        for index, summaries in self._changed.items():
            for heldout, summary in zip((False, True), summaries, strict=True):
                if summary.problem is not None:
                    yield index, heldout, summary.problem


def _summary(fitted: Fitted) -> _Summary:
    return _Summary(
        fitted.outcome,
        len(fitted.pieces),
        sum(len(piece.example) for piece in fitted.pieces),
        sum(piece.example.trained_tokens for piece in fitted.pieces),
        len(fitted.steps_left_out),
        fitted.shortened_observations,
        fitted.problem,
    )
