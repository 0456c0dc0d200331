"""What more data would bring: a curve through metric against sample size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SampleFit:
    """A fitted curve and its formula in words."""

    value: Callable[[float], float]
    words: str
    residual: float
    """Root mean square of what the curve misses, in the metric's unit."""


def fit_sample_curve(sizes: Sequence[float], values: Sequence[float]) -> SampleFit | None:
    """Fit `value = ceiling - d * size^-k`, the law of learning curves; below four sizes `a + b log2(size)`.

    None for fewer than three different sizes. The exponent is searched on a grid and the rest by least squares, so the
    result is the same on every machine.
    """
    distinct = len(set(sizes))
    if distinct < 3:
        return None
    n, y = np.asarray(sizes, dtype=np.float64), np.asarray(values, dtype=np.float64)
    best: SampleFit | None = None
    if distinct >= 4:
        for k in np.arange(0.1, 2.01, 0.05):
            ceiling, drop, residual = _least_squares(-(n**-k), y)
            # A metric is a share: a law that climbs beyond 1 or falls with more data says nothing.
            if drop >= 0 and ceiling <= 1 and (best is None or residual < best.residual):
                best = SampleFit(
                    _power(ceiling, drop, float(k)),
                    f"{100 * ceiling:.1f} − {100 * drop:.3g} · n^−{k:.2f}",
                    residual,
                )
    if best is not None:
        return best
    start, slope, residual = _least_squares(np.log2(n), y)
    return SampleFit(
        lambda size: min(1.0, max(0.0, start + slope * float(np.log2(size)))),
        f"{100 * slope:+.1f} points with each doubling",
        residual,
    )


def _power(ceiling: float, drop: float, k: float) -> Callable[[float], float]:
    return lambda size: ceiling - drop * float(size) ** -k


def _least_squares(feature: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    columns = np.column_stack([np.ones_like(feature), feature])
    (first, second), *_ = np.linalg.lstsq(columns, y, rcond=None)
    residual = float(np.sqrt(np.mean((columns @ np.array([first, second]) - y) ** 2)))
    return float(first), float(second), residual
