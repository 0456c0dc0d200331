"""Compare two runs on the same evaluation: which differences are real, and how many conversations would show the others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from agentft.comparison.runs import AFTER, predictions_file, saved_scores
from agentft.errors import EvaluationError
from agentft.evaluation.metrics import (
    CELLS_PER_CHUNK,
    HEADLINE,
    INDICATIVE_BELOW,
    METRICS,
    Floats,
    MetricDefinition,
    conversation_sums,
    difference_intervals,
    finite_or_none,
    ratio,
    score_records,
)
from agentft.evaluation.steps import StepScore
from agentft.score import read_records

if TYPE_CHECKING:
    from rich.table import Table


SIGNIFICANT = 0.05

MOST_EXACT_FLIPS = 20
"""Up to 2**20 sign patterns are enumerated; beyond, they are drawn."""

_TIE = 1e-12
"""Statistics nearer than this are equal: rounding must not decide a p value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricComparison:
    """One metric in two runs, and whether the difference is real."""

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
        """Return whether the difference is real at this size: p, corrected where it is a headline metric, below 0.05."""
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
        reason = ""
        if self.p_holm is not None and self.p < SIGNIFICANT:
            reason = (
                f"; alone it would pass (p {self.p:.3f}), among all headline metrics it does not "
                f"(p {self.p_holm:.3f} by Holm)"
            )
        return f"{self.name}: not shown, {interval}{reason}{self._advice}"

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
    references_hash: str
    """Equal in two comparisons exactly if they are of the same references at the same steps."""
    bootstrap_samples: int
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
        """The verdict, one sentence per headline metric, and what to keep in mind: for people who read no tables."""
        cross = "cross-check by McNemar's test: the same action steps are exact in A and in B"
        if self.mcnemar_only_a or self.mcnemar_only_b:
            cross = (
                f"cross-check by McNemar's test on action steps exact in one run alone: {self.mcnemar_only_a} in A, "
                f"{self.mcnemar_only_b} in B, p {_p_text(self.mcnemar_p)} (it takes the steps of a conversation as independent)"
            )
        few = f"{self.conversations} conversations: below {INDICATIVE_BELOW} all intervals are indicative"
        return (
            self.verdict,
            *(self.metrics[name].words for name in HEADLINE if name in self.metrics),
            cross,
            *([few] if self.conversations < INDICATIVE_BELOW else []),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; never holds NaN."""
        return {
            "references_hash": self.references_hash,
            "conversations": self.conversations,
            "verdict": self.verdict,
            "metrics": {
                each.pop("name"): each | {"real": metric.real, "words": metric.words}
                for metric in self.metrics.values()
                for each in [dataclasses.asdict(metric)]
            },
            "words": list(self.words),
            "mcnemar": {"only_a": self.mcnemar_only_a, "only_b": self.mcnemar_only_b, "p": self.mcnemar_p},
            "bootstrap": {"draws": self.bootstrap_samples, "seed": self.seed, "unit": "conversation", "paired": True},
        }


def compare_pair(a: Path, b: Path, name: str = AFTER) -> RunComparison:
    """Compare B with the baseline A, each a run folder or a file of predictions.

    Both are scored anew from their texts, by the same code, unless a file holds scores only.

    Raises:
        EvaluationError: they are not of the same evaluation, or a file cannot be read.
        RunError: a run holds no such predictions.
    """
    files = [predictions_file(path, name) for path in (a, b)]
    rows = [_first_row(file) for file in files]
    mode_a, mode_b = (row.get("mode", "teacher_forced") for row in rows)
    if mode_a != mode_b:
        raise EvaluationError(f"not the same evaluation: A was measured by {mode_a}, B by {mode_b}")
    left, right = (
        score_records(read_records(file)) if "reference" in row or "scores" not in row else saved_scores(file)
        for file, row in zip(files, rows, strict=True)
    )
    return compare_runs(left, right)


def compare_runs(
    a: Sequence[StepScore],
    b: Sequence[StepScore],
    *,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
    definitions: Sequence[MetricDefinition] = METRICS,
) -> RunComparison:
    """Compare two runs on the same evaluation, `a` the baseline; differences are b - a.

    `bootstrap_samples` is also the number of sign patterns, where they are drawn.

    Raises:
        EvaluationError: the runs answered other conversations, steps or references.
    """
    _require_same_references(a, b)
    # Older runs did not write which conversations are pieces of one.
    wholes = {score.conversation_id: score.piece_of for score in (*a, *b) if score.piece_of is not None}
    a, b = ([dataclasses.replace(s, piece_of=wholes.get(s.conversation_id)) for s in run] for run in (a, b))
    ids, *sums_a = conversation_sums(a, definitions)
    _, *sums_b = conversation_sums(b, definitions)
    (a_top, a_bottom), (b_top, b_bottom) = sums_a, sums_b
    found = difference_intervals((a_top, a_bottom), (b_top, b_bottom), bootstrap_samples=bootstrap_samples, seed=seed)
    names = [definition.name for definition in definitions]
    flips = {
        name: sign_flip_test(
            np.column_stack([a_top[:, m], a_bottom[:, m]]),
            np.column_stack([b_top[:, m], b_bottom[:, m]]),
            samples=bootstrap_samples,
            seed=seed,
        )
        for m, name in enumerate(names)
    }
    p_values = {name: flips[name][0] for name in HEADLINE if name in flips and not math.isnan(flips[name][0])}
    corrected = holm(p_values)
    strictest = SIGNIFICANT / max(1, len(p_values))
    metrics = {
        name: MetricComparison(
            name=name,
            value_a=_quotient(a_top[:, m].sum(), a_bottom[:, m].sum()),
            value_b=_quotient(b_top[:, m].sum(), b_bottom[:, m].sum()),
            difference=finite_or_none(found.values[m]),
            low=finite_or_none(found.low[m]),
            high=finite_or_none(found.high[m]),
            se=finite_or_none(found.se_cr1[m]),
            p=finite_or_none(flips[name][0]),
            p_exact=flips[name][1],
            p_holm=corrected.get(name),
            needed_conversations=needed_conversations(
                found.values[m],
                found.se_cr1[m],
                int(found.clusters[m]),
                level=strictest if name in p_values else SIGNIFICANT,
            ),
            conversations=int(found.clusters[m]),
        )
        for m, name in enumerate(names)
    }
    exact_a = {score.key: score.is_exact for score in a if score.is_action}
    exact = Counter((exact_a[score.key], score.is_exact) for score in b if score.key in exact_a)
    lines = sorted(f"{score.conversation_id!r} {score.step} {score.reference_hash}" for score in a)
    return RunComparison(
        metrics=metrics,
        mcnemar_only_a=exact[True, False],
        mcnemar_only_b=exact[False, True],
        mcnemar_p=mcnemar_exact(exact[True, False], exact[False, True]),
        conversations=len(ids),
        references_hash=hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16],
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )


def _require_same_references(a: Sequence[StepScore], b: Sequence[StepScore]) -> None:
    if not a or not b:
        raise EvaluationError("nothing to compare: a run without scored steps")
    left, right = ({score.key: score.reference_hash for score in scores} for scores in (a, b))
    if len(left) != len(a) or len(right) != len(b):
        raise EvaluationError(f"run {'A' if len(left) != len(a) else 'B'} scores a step more than once")
    if left.keys() != right.keys():
        name, step = min(left.keys() ^ right.keys())
        raise EvaluationError(
            f"not the same evaluation: {len(left.keys() - right.keys())} step(s) only in A, "
            f"{len(right.keys() - left.keys())} only in B, such as {name!r} step {step}. "
            "Evaluate both runs on the same held-out conversations"
        )
    changed = sorted(key for key, digest in left.items() if right[key] != digest)
    if changed:
        name, step = changed[0]
        raise EvaluationError(
            f"not the same evaluation: {len(changed)} reference(s) differ, such as {name!r} step {step}. "
            "Evaluate both runs on the same version of the data"
        )


def _first_row(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as lines:
            row = json.loads(next((line for line in lines if line.strip()), "{}"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file}:1: cannot be read: {error}") from None
    return row if isinstance(row, dict) else {}


def _quotient(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def pair_table(found: RunComparison) -> Table:
    """Return the headline metrics side by side."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"B against A on {found.conversations} conversations",
        caption="difference in points with its paired 95 % interval by conversations; p: sign flips; Holm over these metrics",
    )
    for name in ("metric", "A", "B", "B - A", "95 % interval", "p", "p (Holm)", "real?"):
        table.add_column(name, justify="left" if name in ("metric", "real?") else "right")
    for name in HEADLINE:
        metric = found.metrics[name]
        interval = _points(metric.low), _points(metric.high)
        table.add_row(
            name,
            _points(metric.value_a, ""),
            _points(metric.value_b, ""),
            _points(metric.difference),
            "–" if "–" in interval else " to ".join(interval),
            _p_text(metric.p),
            _p_text(metric.p_holm),
            {True: "yes", False: "not shown", None: "–"}[metric.real],
        )
    return table


def _points(value: float | None, sign: str = "+") -> str:
    return "–" if value is None else f"{100 * value:{sign}.1f}"


def _p_text(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


# --- Tests ---


def sign_flip_test(a_G2: Floats, b_G2: Floats, *, samples: int, seed: int) -> tuple[float, bool]:
    """Return the two-sided p of exchanging the runs conversation by conversation, and whether all patterns were tried.

    Where the references give the denominator this is the sign-flip test on per-conversation differences; exchanging
    numerator and denominator together, the two columns of `a_G2` and `b_G2`, extends it to the other metrics. Where more
    than `MOST_EXACT_FLIPS` conversations differ, `samples` patterns are drawn, and p is (1 + hits)/(1 + samples).
    """
    # A conversation on which both runs agree cannot change the statistic: exchanging it is no pattern of its own.
    delta_K2 = (b_G2 - a_G2)[(a_G2 != b_G2).any(axis=1)]
    differing = len(delta_K2)
    a_sums, b_sums = a_G2.sum(axis=0), b_G2.sum(axis=0)
    observed = abs(float(_exchanged(a_sums, b_sums, np.zeros((1, 2)))[0]))
    if math.isnan(observed):
        return math.nan, True
    exact = differing <= MOST_EXACT_FLIPS
    patterns = 2**differing if exact else samples
    hits = valid = 0
    rng = np.random.default_rng(seed)
    chunk = max(1, CELLS_PER_CHUNK // max(1, differing))
    for start in range(0, patterns, chunk):
        size = min(chunk, patterns - start)
        if exact:
            flips = (np.arange(start, start + size)[:, None] >> np.arange(differing)) & 1
        else:
            flips = rng.integers(0, 2, size=(size, differing))
        statistics = np.abs(_exchanged(a_sums, b_sums, flips.astype(np.float64) @ delta_K2))
        valid += int(np.isfinite(statistics).sum())
        hits += int((statistics >= observed - _TIE).sum())
    return hits / valid if exact else (1 + hits) / (1 + valid), exact


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided exact p of McNemar's test on steps that only the first, or only the second run has right."""
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p values: the k-th smallest times (count - k + 1), never decreasing, at most 1."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: (item[1], item[0]))):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def needed_conversations(
    difference: float, se: float, conversations: int, *, power: float = 0.8, level: float = 0.05
) -> int | None:
    """Return how many conversations would show `difference` at `level` (two-sided) with the given power.

    The spread per conversation is taken from the observed paired standard error `se` at `conversations`:
    n = conversations * ((z_(1 - level/2) + z_power) * se / difference)^2. None where that is not defined.
    """
    if difference == 0 or not math.isfinite(difference) or not math.isfinite(se) or se == 0:
        return None
    normal = NormalDist()
    effect = (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)) * se / difference
    return max(2, math.ceil(conversations * effect**2))


def _exchanged(a_sums: Floats, b_sums: Floats, moved_D2: Floats) -> Floats:
    a_D2, b_D2 = a_sums + moved_D2, b_sums - moved_D2
    return ratio(b_D2[:, 0], b_D2[:, 1]) - ratio(a_D2[:, 0], a_D2[:, 1])
