"""Intervals over conversations, and the comparison of two runs on the same evaluation.

Steps of one conversation are alike, so the conversation is the unit that is resampled (Miller, arXiv 2411.00640): a
naive interval over steps covers 80 to 90 % where it says 95, see `benchmarks/interval_coverage.py`. Every metric is a
ratio of sums over conversations, and the ratio is recomputed in every resample.

Axes: G conversations (clusters), M metrics, D resamples. NaN stands for 0/0 in the functions on arrays only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentft.errors import EvaluationError
from agentft.evaluation.definitions import HEADLINE, METRICS, Floats, MetricDefinition, conversation_sums
from agentft.evaluation.scoring import StepScore

SIGNIFICANT = 0.05

INDICATIVE_BELOW = 100
"""With fewer conversations the 95 % interval covers less than it says (92 % at 50), so it is marked."""
CONFIDENCE = 0.95
MOST_EXACT_FLIPS = 20
"""Up to 2**20 sign patterns are enumerated; beyond, they are drawn."""

_CELLS_PER_CHUNK = 2_000_000
_TIE = 1e-12
"""Statistics nearer than this are equal: rounding must not decide a p value."""


def sum_pieces(rows_GM: Floats, wholes: Sequence[str]) -> Floats:
    """Add up the rows of equal `wholes`: pieces of one conversation are alike, and are drawn together."""
    _, group_G = np.unique(np.array(wholes, dtype=np.str_), return_inverse=True)
    sums = np.zeros((int(group_G.max(initial=-1)) + 1, rows_GM.shape[1]))
    np.add.at(sums, group_G, rows_GM)
    return sums


@dataclass(frozen=True, slots=True)
class RatioIntervals:
    """Estimate, 95 % interval and standard errors of M ratios, each an array [M]."""

    values: Floats
    low: Floats
    high: Floats
    se_cr0: Floats
    """Cluster-robust, without correction for few clusters."""
    se_cr1: Floats
    """Times sqrt(G/(G-1))."""
    clusters: NDArray[np.int64]
    """Conversations with a denominator above 0."""


def ratio_intervals(
    numerators_GM: Floats, denominators_GM: Floats, *, bootstrap_samples: int, seed: int
) -> RatioIntervals:
    """Bootstrap ratios of sums over conversations: percentile interval; resamples with a denominator of 0 are left out."""
    metrics = numerators_GM.shape[1]
    values_M = _ratio(numerators_GM.sum(axis=0), denominators_GM.sum(axis=0))
    clusters_M = (denominators_GM > 0).sum(axis=0)
    se_cr0_M, se_cr1_M = _clustered_errors(_influence(numerators_GM, denominators_GM), clusters_M)
    columns = np.hstack([numerators_GM, denominators_GM])
    sums_DK = np.concatenate(list(_resampled_sums(columns, bootstrap_samples, np.random.default_rng(seed))))
    low_M, high_M = _percentile_interval(_ratio(sums_DK[:, :metrics], sums_DK[:, metrics:]))
    return RatioIntervals(values_M, low_M, high_M, se_cr0_M, se_cr1_M, clusters_M)


@dataclass(frozen=True, slots=True)
class DifferenceIntervals:
    """Differences b - a of M ratios between two runs on the same conversations, each an array [M]."""

    differences: Floats
    low: Floats
    high: Floats
    se_cr1: Floats
    clusters: NDArray[np.int64]


def difference_intervals(
    a: tuple[Floats, Floats], b: tuple[Floats, Floats], *, bootstrap_samples: int, seed: int
) -> DifferenceIntervals:
    """Paired cluster bootstrap: every resample takes the same conversations from both runs.

    Args:
        a: Numerators and denominators of the first run, each [G, M].
        b: The same of the second run, conversations in the same order.
        bootstrap_samples: How many resamples are drawn.
        seed: Of their draw.
    """
    metrics = a[0].shape[1]
    columns = np.hstack([*a, *b])
    sums_DK = np.concatenate(list(_resampled_sums(columns, bootstrap_samples, np.random.default_rng(seed))))
    a_top, a_bottom, b_top, b_bottom = (sums_DK[:, k * metrics : (k + 1) * metrics] for k in range(4))
    low_M, high_M = _percentile_interval(_ratio(b_top, b_bottom) - _ratio(a_top, a_bottom))
    clusters_M = ((a[1] > 0) | (b[1] > 0)).sum(axis=0)
    se_cr1_M = _clustered_errors(_influence(*b) - _influence(*a), clusters_M)[1]
    values_a, values_b = (_ratio(top.sum(axis=0), bottom.sum(axis=0)) for top, bottom in (a, b))
    return DifferenceIntervals(values_b - values_a, low_M, high_M, se_cr1_M, clusters_M)


@dataclass(frozen=True, slots=True)
class FlipTest:
    """Two-sided p value of a sign-flip (exchange) test."""

    p: float
    exact: bool
    patterns: int
    """Sign patterns enumerated or drawn."""


def sign_flip_test(a_G2: Floats, b_G2: Floats, *, samples: int, seed: int) -> FlipTest:
    """Exchange the runs conversation by conversation and see how often the difference is as large as observed.

    Under the null hypothesis it does not matter which run said what within a conversation. For a metric whose
    denominator is given by the references this is the sign-flip test on per-conversation differences; exchanging
    numerator and denominator together extends it to the others.

    Args:
        a_G2: Numerator and denominator of each conversation in the first run.
        b_G2: The same in the second run.
        samples: Patterns drawn when more than `MOST_EXACT_FLIPS` conversations differ; p is then
            (1 + hits)/(1 + samples).
        seed: Of their draw.
    """
    # A conversation on which both runs agree cannot change the statistic: exchanging it is no pattern of its own.
    delta_K2 = (b_G2 - a_G2)[(a_G2 != b_G2).any(axis=1)]
    differing = len(delta_K2)
    a_sums, b_sums = a_G2.sum(axis=0), b_G2.sum(axis=0)
    observed = abs(float(_exchanged(a_sums, b_sums, np.zeros((1, 2)))[0]))
    if math.isnan(observed):
        return FlipTest(p=math.nan, exact=True, patterns=0)
    exact = differing <= MOST_EXACT_FLIPS
    patterns = 2**differing if exact else samples
    hits = valid = 0
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS_PER_CHUNK // max(1, differing))
    for start in range(0, patterns, chunk):
        size = min(chunk, patterns - start)
        if exact:
            flips = (np.arange(start, start + size)[:, None] >> np.arange(differing)) & 1
        else:
            flips = rng.integers(0, 2, size=(size, differing))
        statistics = np.abs(_exchanged(a_sums, b_sums, flips.astype(np.float64) @ delta_K2))
        valid += int(np.isfinite(statistics).sum())
        hits += int((statistics >= observed - _TIE).sum())
    return FlipTest(p=hits / valid if exact else (1 + hits) / (1 + valid), exact=exact, patterns=patterns)


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


def _resampled_sums(columns_GK: Floats, count: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield sums of each column over G conversations drawn with replacement, [D, K] in chunks that bound memory."""
    clusters = columns_GK.shape[0]
    chunk = max(1, _CELLS_PER_CHUNK // clusters)
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        drawn = rng.integers(0, clusters, size=(size, clusters)) + np.arange(size)[:, None] * clusters
        times_DG = np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters)
        yield times_DG.astype(np.float64) @ columns_GK


def _ratio(numerators: Floats, denominators: Floats) -> Floats:
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators != 0)


def _percentile_interval(samples_DM: Floats) -> tuple[Floats, Floats]:
    tail = 100 * (1 - CONFIDENCE) / 2
    defined = np.isfinite(samples_DM)
    if defined.all():
        low_M, high_M = np.percentile(samples_DM, [tail, 100 - tail], axis=0)
        return low_M, high_M
    low_M, high_M = (np.full(samples_DM.shape[1], np.nan) for _ in range(2))
    for column in np.flatnonzero(defined.any(axis=0)):
        low_M[column], high_M[column] = np.percentile(samples_DM[defined[:, column], column], [tail, 100 - tail])
    return low_M, high_M


def _influence(numerators_GM: Floats, denominators_GM: Floats) -> Floats:
    """Return what each conversation adds to the error of the ratio, [G, M]: (n - ratio d) / sum d."""
    total_M = denominators_GM.sum(axis=0)
    ratio_M = _ratio(numerators_GM.sum(axis=0), total_M)
    residuals = numerators_GM - ratio_M * denominators_GM
    return _ratio(residuals, np.broadcast_to(total_M, residuals.shape))


def _clustered_errors(influence_GM: Floats, clusters_M: NDArray[np.int64]) -> tuple[Floats, Floats]:
    cr0_M = np.sqrt((influence_GM**2).sum(axis=0))
    correction_M = _ratio(clusters_M.astype(np.float64), np.maximum(clusters_M - 1, 0).astype(np.float64))
    return cr0_M, cr0_M * np.sqrt(correction_M)


def _exchanged(a_sums: Floats, b_sums: Floats, moved_D2: Floats) -> Floats:
    a_D2, b_D2 = a_sums + moved_D2, b_sums - moved_D2
    return _ratio(b_D2[:, 0], b_D2[:, 1]) - _ratio(a_D2[:, 0], a_D2[:, 1])


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
        return f"{self.name}: not shown, {interval}{self._why_not(self.p)}{self._advice}"

    def _why_not(self, p: float) -> str:
        """Return what to add where the metric alone would have passed."""
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
    references_hash: str
    """See `hash_references`."""
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
                f"{self.mcnemar_only_b} in B, p {p_text(self.mcnemar_p)} (it takes the steps of a conversation as independent)"
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
        fields = [name for name in MetricComparison.__dataclass_fields__ if name != "name"]
        return {
            "references_hash": self.references_hash,
            "conversations": self.conversations,
            "verdict": self.verdict,
            "metrics": {
                name: {field: getattr(metric, field) for field in fields} | {"real": metric.real, "words": metric.words}
                for name, metric in self.metrics.items()
            },
            "words": list(self.words),
            "mcnemar": {"only_a": self.mcnemar_only_a, "only_b": self.mcnemar_only_b, "p": self.mcnemar_p},
            "bootstrap": {"draws": self.bootstrap_samples, "seed": self.seed, "unit": "conversation", "paired": True},
        }


def p_text(value: float | None) -> str:
    """Return a p value as it is printed."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def compare_runs(
    a: Sequence[StepScore],
    b: Sequence[StepScore],
    *,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
    definitions: Sequence[MetricDefinition] = METRICS,
) -> RunComparison:
    """Compare two runs on the same evaluation; differences are b - a.

    Args:
        a: Steps of the first run, the baseline.
        b: Steps of the second run.
        bootstrap_samples: Resamples of the bootstrap, and sign patterns where they are drawn.
        seed: Of both.
        definitions: Metrics to compare.

    Raises:
        EvaluationError: the runs answered other conversations, steps or references.
    """
    _require_same_references(a, b)
    a, b = _with_same_pieces(a, b)
    ids, a_top, a_bottom = conversation_sums(a, definitions)
    _, b_top, b_bottom = conversation_sums(b, definitions)
    found = difference_intervals((a_top, a_bottom), (b_top, b_bottom), bootstrap_samples=bootstrap_samples, seed=seed)
    flips = {
        definition.name: sign_flip_test(
            np.column_stack([a_top[:, m], a_bottom[:, m]]),
            np.column_stack([b_top[:, m], b_bottom[:, m]]),
            samples=bootstrap_samples,
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
        references_hash=hash_references(a),
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )


def hash_references(scores: Sequence[StepScore]) -> str:
    """Return 16 hex digits that two runs share exactly if they answered the same references at the same steps."""
    lines = sorted(f"{score.conversation_id!r} {score.step} {score.reference_hash}" for score in scores)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _require_same_references(a: Sequence[StepScore], b: Sequence[StepScore]) -> None:
    if not a or not b:
        raise EvaluationError("nothing to compare: a run without scored steps")
    references = []
    for scores, run in ((a, "A"), (b, "B")):
        own = {(score.conversation_id, score.step): score.reference_hash for score in scores}
        if len(own) != len(scores):
            raise EvaluationError(f"run {run} scores a step more than once")
        references.append(own)
    left, right = references
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


def _with_same_pieces(a: Sequence[StepScore], b: Sequence[StepScore]) -> tuple[list[StepScore], list[StepScore]]:
    """Give both runs the `piece_of` that either knows; older runs did not write it."""
    wholes = {score.conversation_id: score.piece_of for score in (*a, *b) if score.piece_of is not None}

    def completed(run: Sequence[StepScore]) -> list[StepScore]:
        return [dataclasses.replace(score, piece_of=wholes.get(score.conversation_id)) for score in run]

    return completed(a), completed(b)


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
