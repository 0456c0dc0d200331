"""Intervals over conversations, and tests of the difference between two runs, on arrays.

Steps of one conversation are alike, so the conversation is the unit that is resampled (Miller, arXiv 2411.00640): a
naive interval over steps covers 80 to 90 % where it says 95, see `benchmarks/interval_coverage.py`. Every metric is a
ratio of sums over conversations, and the ratio is recomputed in every resample.

Axes: G conversations (clusters), M metrics, D resamples. NaN stands for 0/0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SIGNIFICANT = 0.05

INDICATIVE_BELOW = 100
"""With fewer conversations the 95 % interval covers less than it says (92 % at 50), so it is marked."""
CONFIDENCE = 0.95
MOST_EXACT_FLIPS = 20
"""Up to 2**20 sign patterns are enumerated; beyond, they are drawn."""

_CELLS_PER_CHUNK = 2_000_000
_TIE = 1e-12
"""Statistics nearer than this are equal: rounding must not decide a p value."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Values of M ratios, or of differences of ratios, with 95 % intervals and standard errors, each an array [M]."""

    values: Floats
    low: Floats
    high: Floats
    se_cr0: Floats
    """Cluster-robust, without correction for few clusters."""
    se_cr1: Floats
    """Times sqrt(G/(G-1))."""
    clusters: NDArray[np.int64]
    """Conversations with a denominator above 0."""


def ratio_intervals(numerators_GM: Floats, denominators_GM: Floats, *, bootstrap_samples: int, seed: int) -> Intervals:
    """Bootstrap ratios of sums over conversations: percentile interval; resamples with a denominator of 0 are left out."""
    runs = [(numerators_GM, denominators_GM)]
    (ratios_DM,) = _resampled_ratios(runs, bootstrap_samples, seed)
    values_M = _ratio(numerators_GM.sum(axis=0), denominators_GM.sum(axis=0))
    return _intervals(values_M, ratios_DM, _influence(*runs[0]), denominators_GM > 0)


def difference_intervals(
    a: tuple[Floats, Floats], b: tuple[Floats, Floats], *, bootstrap_samples: int, seed: int
) -> Intervals:
    """Bootstrap the differences b - a of two runs' (numerators, denominators), each [G, M], conversations in one order.

    Every resample takes the same conversations from both.
    """
    a_DM, b_DM = _resampled_ratios([a, b], bootstrap_samples, seed)
    value_a, value_b = (_ratio(top.sum(axis=0), bottom.sum(axis=0)) for top, bottom in (a, b))
    return _intervals(value_b - value_a, b_DM - a_DM, _influence(*b) - _influence(*a), (a[1] > 0) | (b[1] > 0))


def _intervals(values_M: Floats, samples_DM: Floats, influence_GM: Floats, counted_GM: NDArray[np.bool_]) -> Intervals:
    clusters_M = counted_GM.sum(axis=0)
    cr0_M = np.sqrt((influence_GM**2).sum(axis=0))
    correction_M = _ratio(clusters_M.astype(np.float64), np.maximum(clusters_M - 1, 0).astype(np.float64))
    tail = 100 * (1 - CONFIDENCE) / 2
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a metric without a defined resample
        low_M, high_M = np.nanpercentile(samples_DM, [tail, 100 - tail], axis=0)
    return Intervals(values_M, low_M, high_M, cr0_M, cr0_M * np.sqrt(correction_M), clusters_M)


def _resampled_ratios(runs: list[tuple[Floats, Floats]], count: int, seed: int) -> list[Floats]:
    """Return each run's ratios [D, M] over conversations drawn with replacement, the same ones for all runs."""
    columns_GK = np.hstack([part for run in runs for part in run])
    clusters, rng, sums = len(columns_GK), np.random.default_rng(seed), []
    chunk = max(1, _CELLS_PER_CHUNK // clusters)  # bounds memory
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        drawn = rng.integers(0, clusters, size=(size, clusters)) + np.arange(size)[:, None] * clusters
        times_DG = np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters)
        sums.append(times_DG.astype(np.float64) @ columns_GK)
    parts = np.split(np.concatenate(sums), 2 * len(runs), axis=1)
    return [_ratio(top, bottom) for top, bottom in zip(parts[::2], parts[1::2], strict=True)]


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


def _ratio(numerators: Floats, denominators: Floats) -> Floats:
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators != 0)


def _influence(numerators_GM: Floats, denominators_GM: Floats) -> Floats:
    """Return what each conversation adds to the error of the ratio, [G, M]: (n - ratio d) / sum d."""
    total_M = denominators_GM.sum(axis=0)
    ratio_M = _ratio(numerators_GM.sum(axis=0), total_M)
    residuals = numerators_GM - ratio_M * denominators_GM
    return _ratio(residuals, np.broadcast_to(total_M, residuals.shape))


def _exchanged(a_sums: Floats, b_sums: Floats, moved_D2: Floats) -> Floats:
    a_D2, b_D2 = a_sums + moved_D2, b_sums - moved_D2
    return _ratio(b_D2[:, 0], b_D2[:, 1]) - _ratio(a_D2[:, 0], a_D2[:, 1])
