"""Write a comparison as one HTML file that needs no network: the table, and every chart of a ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from agentft.comparison.ranking import (
    LOWER_IS_BETTER,
    Cell,
    Ranking,
    setting_text,
    short_names,
    table_cells,
    table_notes,
)
from agentft.comparison.render import (
    Plot,
    Scale,
    category_scale,
    linear_scale,
    render_page,
    setting_scale,
)
from agentft.comparison.runs import NUMBERS, ComparedRun, Score
from agentft.evaluation.metrics import METRICS_BY_NAME

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class SampleFit:
    """A fitted curve and its formula in words."""

    value: Callable[[float], float]
    words: str
    residual: float
    """Root mean square of what the curve misses, in the metric's unit."""


def fit_sample_curve(sizes: Sequence[float], values: Sequence[float]) -> SampleFit | None:
    """Fit `value = ceiling - d * size^-k`, the law of learning curves, k on a grid; below four sizes `a + b log2(size)`.

    None for fewer than three different sizes.
    """
    distinct = len(set(sizes))
    if distinct < 3:
        return None
    n, y = np.asarray(sizes, dtype=np.float64), np.asarray(values, dtype=np.float64)
    # A metric is a share: a law that climbs beyond 1 or falls with more data says nothing.
    exponents = [float(k) for k in np.arange(0.1, 2.01, 0.05)] if distinct >= 4 else []
    laws = [(*_least_squares(-(n**-k), y), k) for k in exponents]
    laws = [law for law in laws if law[1] >= 0 and law[0] <= 1]
    if laws:
        ceiling, drop, residual, k = min(laws, key=lambda law: law[2])
        words = f"{100 * ceiling:.1f} − {100 * drop:.3g} · n^−{k:.2f}"
        return SampleFit(lambda size: ceiling - drop * float(size) ** -k, words, residual)
    start, slope, residual = _least_squares(np.log2(n), y)
    words = f"{100 * slope:+.1f} points with each doubling"
    return SampleFit(lambda size: min(1.0, max(0.0, start + slope * math.log2(size))), words, residual)


def _least_squares(feature: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return offset, slope and root mean square of what they miss."""
    columns = np.column_stack([np.ones_like(feature), feature])
    solution = np.linalg.lstsq(columns, y, rcond=None)[0]
    residual = float(np.sqrt(np.mean((columns @ solution - y) ** 2)))
    return float(solution[0]), float(solution[1]), residual


def html_page(ranking: Ranking, title: str) -> str:
    """Return the page; pointing at a run shows it in every chart, a click keeps it."""
    charts = Charts(ranking)
    header, rows = table_cells(ranking, ranking.metrics)
    names = [Cell(name) for name in short_names(ranking.runs)]  # their settings stand beside them
    return render_page(
        "comparison",
        title=title,
        metric=ranking.metric,
        header=header,
        runs=[
            {
                "name": run.name,
                "told": _told(ranking, run),
                "style": charts.styles.get(run.name),
                "cells": list(zip(header, [row[0], name, *row[2:]], strict=True)),
            }
            for run, name, row in zip(ranking.runs, names, rows, strict=True)
        ],
        notes=table_notes(ranking),
        sections=[(name, list(panels)) for name, panels in groupby(charts.panels(), lambda panel: panel.section)],
    )


def _told(ranking: Ranking, run: ComparedRun) -> str:
    """Return a run in one line, for who points at it."""
    parts = [run.name, run.state]
    if run.number(ranking.metric) is not None and ranking.metric in run.scores:
        parts.append(f"{ranking.metric} {100 * run.scores[ranking.metric].value:.1f}")
    if run.loss is not None:
        parts.append(f"held-out loss {run.loss:.4f}")
    return ", ".join([*parts, *([run.reason] if run.reason else [])])


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart with its heading and what to read from it."""

    section: str
    heading: str
    drawing: Plot | None
    words: str = ""
    errors: dict[str, Any] | None = None
    """In place of a drawing: kinds of error and their counts by run, over the whole width of the page."""


CURVES = (
    (
        "eval/loss",
        "Held-out loss",
        "Lower is better. The dot is the last evaluation; a curve that climbs again has trained too long.",
    ),
    ("train/loss", "Training loss", "Of the steps between two lines of the log. The dot is where the run stands."),
)
"""Key of `metrics.jsonl`, heading, and what to look for."""

COSTS = (
    ("seconds", "minutes of the whole run", 60.0),
    ("tokens", "tokens trained on", 1.0),
    ("peak_memory_bytes", "peak memory, GiB", 2.0**30),
)
"""Number of a run, its label, and its unit."""


class Charts:
    """All charts of one ranking; a run has the same colour in each, by its place."""

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking
        known = [*ranking.metrics, *(name for name in NUMBERS if name == ranking.metric)]
        self._metric = ranking.metric if ranking.metric in known else next(iter(known), "")
        self._is_share = self._metric in METRICS_BY_NAME
        self._least_is_best = self._metric in LOWER_IS_BETTER
        self._scored = [run for run in ranking.runs if run.number(self._metric) is not None]
        # By place, not by value: one run that went astray would make all others look alike.
        order = sorted({self._value(run) for run in self._scored}, reverse=self._least_is_best)
        share = {value: i / (len(order) - 1) if len(order) > 1 else 0.6 for i, value in enumerate(order)}
        self.styles = {run.name: f"--s:{share[self._value(run)]:.2f}" for run in self._scored}
        """Of each run that has a score: its place from 0, worst, to 1, best, which the style sheet makes a colour of."""

    def _value(self, run: ComparedRun) -> float:
        value = run.number(self._metric)
        assert value is not None, "only of runs that have it"
        return value

    def panels(self) -> Iterator[Panel]:
        """Yield the charts in the order in which they are read."""
        yield from self._learning_curves()
        yield from self._sample_size()
        yield from self._settings()
        yield from self._costs()
        yield from self._errors()

    def _learning_curves(self) -> Iterator[Panel]:
        for key, heading, words in CURVES:
            curves = {
                run.name: [(row["step"], row[key]) for row in run.curve() if key in row and "step" in row]
                for run in reversed(self._ranking.runs)  # the best on top
            }
            curves = {name: points for name, points in curves.items() if points}
            if not curves:
                continue
            points = [point for curve in curves.values() for point in curve]
            plot = Plot(
                linear_scale([x for x, _ in points], "step"), linear_scale([y for _, y in points], heading.lower())
            )
            for name, curve in curves.items():
                style = self.styles.get(name)
                plot.line(curve, style=style, run=name)
                plot.dot(*curve[-1], f"{name}: {curve[-1][1]:.4f} at step {curve[-1][0]:g}", style=style, run=name)
            yield Panel("How they learn", heading, plot, words)

    def _settings(self) -> Iterator[Panel]:
        for key, short in self._ranking.differing.items():
            values = [run.settings.get(key) for run in self._scored]
            if len(set(map(setting_text, values))) < 2:
                continue  # of an unfinished sweep: it will differ
            scale, place = _setting_axis(values, short)
            plot = Plot(scale, self._metric_scale())
            points = [(run, place(value)) for run, value in zip(self._scored, values, strict=True)]
            words = ["Bars: 95 % intervals."] if self._is_share else []
            words += self._joins(plot, key, points)
            self._marks(plot, points)
            yield Panel("What each setting does", f"{self._metric} against {short}", plot, " ".join(words))

    def _joins(self, plot: Plot, key: str, points: Sequence[tuple[ComparedRun, float]]) -> list[str]:
        """Draw lines between runs that differ in nothing but `key`, and of the means; return what to say of them."""
        others = [other for other in self._ranking.differing if other != key]
        by_place = sorted(_grouped(points, lambda point: point[1]).items())
        alike: dict[str, list[tuple[float, float, float]]] = {}
        surroundings = []
        for x, group in by_place:
            rest = [repr([run.settings.get(other) for other in others]) for run, _ in group]
            surroundings.append(sorted(rest))
            for (run, _), same, aside in zip(group, rest, _aside(len(group)), strict=True):
                alike.setdefault(same, []).append((x, self._value(run), aside))
        joined = [line for line in alike.values() if len(line) > 1]
        for line in joined:
            plot.line([(x, y) for x, y, _ in line], kind="join", aside=[aside for *_, aside in line])
        words = ["Thin lines join runs that differ in nothing else."] if joined and others else []
        if any(each != surroundings[0] for each in surroundings):
            return [*words, "No means: not every value has been run with the same other settings."]
        plot.line([(x, sum(self._value(run) for run, _ in group) / len(group)) for x, group in by_place], kind="mean")
        return [*words, "Thick line: means."]

    def _sample_size(self) -> Iterator[Panel]:
        points = sorted(((run, float(run.train_examples or 0)) for run in self._scored), key=lambda point: point[1])
        points = [(run, size) for run, size in points if size]
        best = {
            size: max(self._value(run) for run, _ in group)
            for size, group in _grouped(points, lambda point: point[1]).items()
        }
        fit = fit_sample_curve(list(best), list(best.values())) if self._is_share else None
        if fit is None:
            return
        smallest, largest, ahead = min(best), max(best), 2 * max(best)
        curve = [(n, fit.value(n)) for n in _between(smallest, ahead)]
        plot = Plot(setting_scale([*best, ahead], "training conversations"), self._metric_scale([y for _, y in curve]))
        plot.line([point for point in curve if point[0] <= largest], kind="mean")
        plot.line([point for point in curve if point[0] >= largest], kind="mean ahead")
        self._marks(plot, points)
        yield Panel(
            "How they learn",
            f"{self._metric} against sample size",
            plot,
            f"Fit through the best run of each size: {fit.words} (misses by {100 * fit.residual:.1f} points). Dashed, as a "
            f"guess: {100 * fit.value(ahead):.1f} with {ahead:,.0f} conversations.",
        )

    def _costs(self) -> Iterator[Panel]:
        sign = 1 if self._least_is_best else -1
        for name, label, unit in COSTS:
            points = [(run, cost / unit) for run in self._scored if (cost := run.number(name)) is not None]
            if name == self._metric or len({round(cost, 3) for _, cost in points}) < 2:
                continue
            across = linear_scale([cost for _, cost in points], label, room=0.1)  # for equal costs side by side
            plot = Plot(across, self._metric_scale())
            frontier: list[tuple[float, float]] = []
            for cost, worse in sorted((cost, sign * self._value(run)) for run, cost in points):
                value = sign * worse
                if not frontier or worse < sign * frontier[-1][1]:
                    frontier += [(cost, height) for _, height in frontier[-1:]] + [(cost, value)]
            plot.line(frontier, kind="mean")
            self._marks(plot, points)
            words = "Grey line: nothing is better for less."
            yield Panel("What it costs", f"{self._metric} against {label}", plot, words)

    def _errors(self) -> Iterator[Panel]:
        runs = [run for run in self._ranking.runs if run.errors]
        kinds = sorted(
            {kind for run in runs for kind in run.errors}, key=lambda k: -sum(r.errors.get(k, 0) for r in runs)
        )
        if not kinds:
            return
        most = max(count for run in runs for count in run.errors.values()) or 1
        rows = [
            {
                "name": run.name,
                "style": self.styles.get(run.name),
                "counts": [(count, f"{count / most:.2f}") for count in (run.errors.get(kind, 0) for kind in kinds)],
            }
            for run in runs
        ]
        errors = {"kinds": [kind.replace("_", " ") for kind in kinds], "rows": rows}
        words = "Steps of the held-out conversations that show each kind of error; the deeper, the more."
        yield Panel("What goes wrong", "Errors by kind", None, words, errors)

    def _metric_scale(self, further: Sequence[float] = ()) -> Scale:
        scores = [run.scores.get(self._metric) or Score(self._value(run)) for run in self._scored]
        ends = [end for score in scores for end in (score.low, score.value, score.high) if end is not None]
        label = f"{self._metric} (%)" if self._is_share else self._metric
        return linear_scale([*ends, *further], label, percent=self._is_share)

    def _marks(self, plot: Plot, points: Sequence[tuple[ComparedRun, float]]) -> None:
        """Draw each run's metric with its interval; runs of one place, which would hide each other, side by side."""
        for group in _grouped(points, lambda point: f"{point[1]:.3g}").values():
            for (run, x), aside in zip(group, _aside(len(group)), strict=True):
                score, style, value = run.scores.get(self._metric), self.styles[run.name], self._value(run)
                if score is not None and score.low is not None and score.high is not None:
                    plot.interval(x, score.low, score.high, style=style, run=run.name, aside=aside)
                words = f"{100 * value:.1f}" if self._is_share else f"{value:.4g}"
                plot.dot(x, value, f"{run.name}: {words}", style=style, run=run.name, aside=aside)


def _aside(count: int) -> list[float]:
    """Return the pixels by which so many runs of one value stand beside it."""
    gap = min(9.0, 60.0 / count)
    return [(i - (count - 1) / 2) * gap for i in range(count)]


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _setting_axis(values: Sequence[object], label: str) -> tuple[Scale, Callable[[object], float]]:
    """Return an axis for a setting: by its numbers where all are numbers, else a place for each value."""
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        return setting_scale(numbers, label), float  # type: ignore[return-value]
    names = sorted({setting_text(value) for value in values})
    return category_scale(names, label), lambda value: float(names.index(setting_text(value)))


def _between(low: float, high: float, count: int = 40) -> list[float]:
    """Return points from `low` to `high` in equal factors, with the middle `high / 2` among them."""
    points = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    return sorted({*points[:-1], high, high / 2})
