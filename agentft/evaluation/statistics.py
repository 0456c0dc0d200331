"""Two runs on one exam: is the difference real, and if not, how many conversations would show it?

The array methods are in `agentft.evaluation.resampling`; the ones that callers use are named here again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentft.errors import EvaluationError
from agentft.evaluation.definitions import HEADLINE, METRICS, MetricDefinition, conversation_sums
from agentft.evaluation.resampling import (
    difference_intervals,
    holm,
    mcnemar_exact,
    needed_conversations,
    ratio_intervals,
    sign_flip_test,
)
from agentft.evaluation.scoring import StepScore

__all__ = [
    "MetricComparison",
    "RunComparison",
    "compare_runs",
    "difference_intervals",
    "exam_hash",
    "holm",
    "mcnemar_exact",
    "needed_conversations",
    "ratio_intervals",
    "sign_flip_test",
]

SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricComparison:
    """One metric in two runs, and what can be said about the difference."""

    name: str
    value_a: float | None
    value_b: float | None
    difference: float | None
    """b - a; None where either value is 0/0."""
    low: float | None
    """95 % interval of the difference, paired bootstrap over conversations."""
    high: float | None
    se: float | None
    """Clustered standard error CR1 of the difference."""
    p: float | None
    """Two-sided sign-flip test over conversations."""
    p_exact: bool
    """All sign patterns were enumerated."""
    p_holm: float | None
    """p corrected for the headline metrics; None for the others."""
    needed_conversations: int | None
    """Conversations that would show a true difference of this size with power 0.8; for a headline metric at the level
    that Holm asks of the clearest one, 5 % over their number."""
    conversations: int
    """Conversations on which either run counts."""

    @property
    def real(self) -> bool | None:
        """Whether the difference is real at this size: p, corrected where it is a headline metric, below 0.05."""
        p = self.p if self.p_holm is None else self.p_holm
        return None if p is None else p < SIGNIFICANT

    @property
    def words(self) -> str:
        """One sentence for people who read no tables."""
        if self.difference is None or self.low is None or self.high is None or self.p is None:
            return f"{self.name}: not defined in both runs"
        interval = f"{100 * self.difference:+.1f} points (95 % {100 * self.low:+.1f} to {100 * self.high:+.1f})"
        if self.real:
            side = "higher" if self.difference > 0 else "lower"
            return f"{self.name}: B is {side}, {interval}: a real difference on {self.conversations} conversations"
        if self.difference == 0:
            return f"{self.name}: no difference, {interval}"
        return f"{self.name}: not shown, {interval}{self._why_not(self.p)}{self._advice}"

    def _why_not(self, p: float) -> str:
        """What to say where the metric alone would have passed."""
        if self.p_holm is None or p >= SIGNIFICANT:
            return ""
        return (
            f"; alone it would pass (p {p:.3f}), among all headline metrics it does not (p {self.p_holm:.3f} by Holm)"
        )

    @property
    def _advice(self) -> str:
        needed, here = self.needed_conversations, self.conversations
        if needed is None:
            return ""
        if needed <= here:
            return f"; {here} conversations show a difference of this size about four times in five"
        return f"; about {needed:,} conversations would show a difference of this size, here are {here}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Run b against run a, step by step on the same references."""

    metrics: dict[str, MetricComparison]
    mcnemar_only_a: int
    """Action steps that only run a has exactly right."""
    mcnemar_only_b: int
    mcnemar_p: float
    """Exact McNemar test on `step_em`. A cross-check: it treats the steps of a conversation as independent."""
    conversations: int
    exam: str
    draws: int
    seed: int

    @property
    def verdict(self) -> str:
        """The conclusion in one sentence."""
        headline = [self.metrics[name] for name in HEADLINE if name in self.metrics]
        real = [metric for metric in headline if metric.real and metric.difference]
        higher = [metric.name for metric in real if (metric.difference or 0) > 0]
        lower = [metric.name for metric in real if metric.name not in higher]
        here = f"on these {self.conversations} conversations"
        if not real:
            return f"no difference between A and B can be claimed {here}"
        if higher and lower:
            return f"A and B differ {here}: B is higher in {', '.join(higher)}, and lower in {', '.join(lower)}"
        side = "better" if higher else "worse"
        rest = "" if len(real) == len(headline) else "; in the others no difference can be claimed"
        return f"B is {side} than A {here}, in {', '.join(higher or lower)}{rest}"

    @property
    def words(self) -> tuple[str, ...]:
        """One sentence per headline metric."""
        return tuple(self.metrics[name].words for name in HEADLINE if name in self.metrics)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; never holds NaN."""
        fields = [name for name in MetricComparison.__dataclass_fields__ if name != "name"]
        return {
            "exam": self.exam,
            "conversations": self.conversations,
            "verdict": self.verdict,
            "metrics": {
                name: {field: getattr(metric, field) for field in fields} | {"real": metric.real, "words": metric.words}
                for name, metric in self.metrics.items()
            },
            "mcnemar": {"only_a": self.mcnemar_only_a, "only_b": self.mcnemar_only_b, "p": self.mcnemar_p},
            "bootstrap": {"draws": self.draws, "seed": self.seed, "unit": "conversation", "paired": True},
        }


def compare_runs(
    a: Sequence[StepScore],
    b: Sequence[StepScore],
    *,
    draws: int = 10_000,
    seed: int = 0,
    definitions: Sequence[MetricDefinition] = METRICS,
) -> RunComparison:
    """Compare two runs on the same exam; differences are b - a.

    Args:
        a: Steps of the first run, the baseline.
        b: Steps of the second run.
        draws: Draws of bootstrap and sign flips.
        seed: Of both.
        definitions: Metrics to compare.

    Raises:
        EvaluationError: the runs did not sit the same exam (other conversations, steps or references).
    """
    _require_same_exam(a, b)
    a, b = _with_same_pieces(a, b)
    ids, a_top, a_bottom = conversation_sums(a, definitions)
    _, b_top, b_bottom = conversation_sums(b, definitions)
    found = difference_intervals((a_top, a_bottom), (b_top, b_bottom), draws=draws, seed=seed)
    flips = {
        definition.name: sign_flip_test(
            np.column_stack([a_top[:, m], a_bottom[:, m]]),
            np.column_stack([b_top[:, m], b_bottom[:, m]]),
            draws=draws,
            seed=seed,
        )
        for m, definition in enumerate(definitions)
    }
    p_values = {name: flips[name].p for name in HEADLINE if name in flips and not math.isnan(flips[name].p)}
    corrected = holm(p_values)
    metrics = {}
    strictest = SIGNIFICANT / max(1, len(p_values))
    for m, definition in enumerate(definitions):
        clusters, name = int(found.clusters[m]), definition.name
        metrics[name] = MetricComparison(
            name=name,
            value_a=_quotient(a_top[:, m].sum(), a_bottom[:, m].sum()),
            value_b=_quotient(b_top[:, m].sum(), b_bottom[:, m].sum()),
            difference=_or_none(found.differences[m]),
            low=_or_none(found.low[m]),
            high=_or_none(found.high[m]),
            se=_or_none(found.se_cr1[m]),
            p=_or_none(flips[name].p),
            p_exact=flips[name].exact,
            p_holm=corrected.get(name),
            needed_conversations=needed_conversations(
                found.differences[m],
                found.se_cr1[m],
                clusters,
                level=strictest if name in p_values else SIGNIFICANT,
            ),
            conversations=clusters,
        )
    only_a, only_b = _discordant_steps(a, b)
    return RunComparison(
        metrics=metrics,
        mcnemar_only_a=only_a,
        mcnemar_only_b=only_b,
        mcnemar_p=mcnemar_exact(only_a, only_b),
        conversations=len(ids),
        exam=exam_hash(a),
        draws=draws,
        seed=seed,
    )


def exam_hash(scores: Sequence[StepScore]) -> str:
    """Return 16 hex digits that two runs share exactly if they answered the same references at the same steps."""
    lines = sorted(f"{score.conversation_id!r} {score.step} {score.reference_hash}" for score in scores)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _require_same_exam(a: Sequence[StepScore], b: Sequence[StepScore]) -> None:
    if not a or not b:
        raise EvaluationError("nothing to compare: a run without scored steps")
    exams = []
    for scores, run in ((a, "A"), (b, "B")):
        exam = {(score.conversation_id, score.step): score.reference_hash for score in scores}
        if len(exam) != len(scores):
            raise EvaluationError(f"run {run} scores a step more than once")
        exams.append(exam)
    left, right = exams
    if left.keys() != right.keys():
        name, step = min(left.keys() ^ right.keys())
        raise EvaluationError(
            f"not the same exam: {len(left.keys() - right.keys())} step(s) only in A, "
            f"{len(right.keys() - left.keys())} only in B, such as {name!r} step {step}. "
            "Evaluate both runs on the same held-out conversations"
        )
    changed = sorted(key for key, digest in left.items() if right[key] != digest)
    if changed:
        name, step = changed[0]
        raise EvaluationError(
            f"not the same exam: {len(changed)} reference(s) differ, such as {name!r} step {step}. "
            "Evaluate both runs on the same version of the data"
        )


def _with_same_pieces(a: Sequence[StepScore], b: Sequence[StepScore]) -> tuple[list[StepScore], list[StepScore]]:
    """A run of before pieces were noted does not know its own; what one run knows holds for both."""
    wholes = {score.conversation_id: score.piece_of for score in (*a, *b) if score.piece_of is not None}
    left, right = (
        [dataclasses.replace(score, piece_of=wholes.get(score.conversation_id)) for score in run]
        if wholes
        else list(run)
        for run in (a, b)
    )
    return left, right


def _discordant_steps(a: Sequence[StepScore], b: Sequence[StepScore]) -> tuple[int, int]:
    exact_a: Mapping[tuple[str, int], bool] = {
        (score.conversation_id, score.step): score.is_exact for score in a if score.is_action
    }
    pairs = [
        (exact_a[score.conversation_id, score.step], score.is_exact)
        for score in b
        if (score.conversation_id, score.step) in exact_a
    ]
    return pairs.count((True, False)), pairs.count((False, True))


def _quotient(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def _or_none(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
