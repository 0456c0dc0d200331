"""Intervals and tests over conversations, on plain arrays.

Steps of one conversation are alike, so the conversation is the unit that is resampled (Miller, arXiv 2411.00640): a
naive interval over steps covers 80 to 90 % where it says 95, see `benchmarks/interval_coverage.py`. Every metric is a
ratio of sums over conversations, and the ratio is recomputed in every draw.

Axes: G conversations (clusters), M metrics, D draws. NaN stands for 0/0 inside this module only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

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


def ratio_intervals(numerators_GM: Floats, denominators_GM: Floats, *, draws: int, seed: int) -> RatioIntervals:
    """Bootstrap ratios of sums over conversations: percentile interval, draws with a denominator of 0 left out."""
    metrics = numerators_GM.shape[1]
    values_M = _ratio(numerators_GM.sum(axis=0), denominators_GM.sum(axis=0))
    clusters_M = (denominators_GM > 0).sum(axis=0)
    se_cr0_M, se_cr1_M = _clustered_errors(_influence(numerators_GM, denominators_GM), clusters_M)
    columns = np.hstack([numerators_GM, denominators_GM])
    sums_DK = np.concatenate(list(_resampled_sums(columns, draws, np.random.default_rng(seed))))
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
    a: tuple[Floats, Floats], b: tuple[Floats, Floats], *, draws: int, seed: int
) -> DifferenceIntervals:
    """Paired cluster bootstrap: every draw takes the same conversations from both runs.

    Args:
        a: Numerators and denominators of the first run, each [G, M].
        b: The same of the second run, conversations in the same order.
        draws: Bootstrap draws.
        seed: Of the draws.
    """
    metrics = a[0].shape[1]
    columns = np.hstack([*a, *b])
    sums_DK = np.concatenate(list(_resampled_sums(columns, draws, np.random.default_rng(seed))))
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


def sign_flip_test(a_G2: Floats, b_G2: Floats, *, draws: int, seed: int) -> FlipTest:
    """Exchange the runs conversation by conversation and see how often the difference is as large as observed.

    Under the null hypothesis it does not matter which run said what within a conversation. For a metric whose
    denominator is given by the references this is the sign-flip test on per-conversation differences; exchanging
    numerator and denominator together extends it to the others.

    Args:
        a_G2: Numerator and denominator of each conversation in the first run.
        b_G2: The same in the second run.
        draws: Patterns drawn when more than `MOST_EXACT_FLIPS` conversations differ; p is then (1 + hits)/(1 + draws).
        seed: Of the draws.
    """
    # A conversation on which both runs agree cannot change the statistic: exchanging it is no pattern of its own.
    delta_K2 = (b_G2 - a_G2)[(a_G2 != b_G2).any(axis=1)]
    differing = len(delta_K2)
    a_sums, b_sums = a_G2.sum(axis=0), b_G2.sum(axis=0)
    observed = abs(float(_exchanged(a_sums, b_sums, np.zeros((1, 2)))[0]))
    if math.isnan(observed):
        return FlipTest(p=math.nan, exact=True, patterns=0)
    exact = differing <= MOST_EXACT_FLIPS
    patterns = 2**differing if exact else draws
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


def _resampled_sums(columns_GK: Floats, draws: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield sums of each column over G conversations drawn with replacement, [D, K] in chunks that bound memory."""
    clusters = columns_GK.shape[0]
    chunk = max(1, _CELLS_PER_CHUNK // clusters)
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = rng.integers(0, clusters, size=(size, clusters)) + np.arange(size)[:, None] * clusters
        times_DG = np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters)
        yield times_DG.astype(np.float64) @ columns_GK


def _ratio(numerators: Floats, denominators: Floats) -> Floats:
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators != 0)


def _percentile_interval(draws_DM: Floats) -> tuple[Floats, Floats]:
    tail = 100 * (1 - CONFIDENCE) / 2
    defined = np.isfinite(draws_DM)
    if defined.all():
        low_M, high_M = np.percentile(draws_DM, [tail, 100 - tail], axis=0)
        return low_M, high_M
    low_M, high_M = (np.full(draws_DM.shape[1], np.nan) for _ in range(2))
    for column in np.flatnonzero(defined.any(axis=0)):
        low_M[column], high_M[column] = np.percentile(draws_DM[defined[:, column], column], [tail, 100 - tail])
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
