"""Write a comparison as one HTML file that needs no network: the table, and every chart of a ranking."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from agentft.comparison.ranking import LOWER_IS_BETTER, Ranking
from agentft.comparison.render import (
    Drawing,
    Plot,
    Scale,
    category_scale,
    colour_of,
    linear_scale,
    ramp,
    render_page,
    setting_scale,
)
from agentft.comparison.runs import NUMBERS, ComparedRun
from agentft.comparison.tables import setting_text, short_names, table_cells, table_notes
from agentft.evaluation.metrics import METRICS_BY_NAME


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


def html_page(ranking: Ranking, title: str) -> str:
    """Return the page; pointing at a run shows it in every chart, a click keeps it."""
    charts = Charts(ranking)
    header, rows = table_cells(ranking, ranking.metrics)
    kinds = ["text" if name in ("", "run", "state") else "" for name in header]
    names = short_names(ranking.runs)  # their settings stand beside them
    return render_page(
        "comparison",
        title=title,
        metric=ranking.metric,
        ramp=ramp(),
        header=list(zip(header, kinds, strict=True)),
        runs=[
            {
                "name": run.name,
                "told": _told(ranking, run),
                "colour": charts.colours.get(run.name),
                "cells": _cells(run, header, kinds, [row[0], (name, False), *row[2:]]),
            }
            for run, name, row in zip(ranking.runs, names, rows, strict=True)
        ],
        notes=table_notes(ranking),
        sections=[(name, list(panels)) for name, panels in groupby(charts.panels(), lambda panel: panel.section)],
    )


def _cells(
    run: ComparedRun, header: Sequence[str], kinds: Sequence[str], row: Sequence[tuple[str, bool]]
) -> Iterator[dict[str, str]]:
    for i, (name, kind, (text, best)) in enumerate(zip(header, kinds, row, strict=True)):
        value, _, interval = text.partition(" [")
        mark = "" if i else " mark first" if text == "best" else " mark"
        yield {
            "kind": kind + (" best" if best else "") + mark,
            "sorted_by": _sorted_by(run, name, text),
            "value": value,
            "interval": interval,
        }


def _sorted_by(run: ComparedRun, column: str, text: str) -> str:
    """Return what the table is sorted by at a click: the number, without unit and interval, else the words."""
    exact = {"time": run.seconds, "memory": run.peak_memory_bytes}
    if column in exact:
        return "" if exact[column] is None else str(exact[column])
    number = re.match(r"-?[\d.]+(e[-+]?\d+)?(?= \[|$)", text)
    return number.group() if number else text


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
    drawing: Drawing | None
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
        self.colours = {run.name: colour_of(share[self._value(run)]) for run in self._scored}
        """Of each run that has a score."""

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
                colour = self.colours.get(name, "")
                plot.line(curve, colour=colour, run=name)
                plot.dot(*curve[-1], f"{name}: {curve[-1][1]:.4f} at step {curve[-1][0]:g}", colour=colour, run=name)
            yield Panel("How they learn", heading, plot, words)

    def _settings(self) -> Iterator[Panel]:
        if len(self._scored) < 2:
            return
        for key, short in self._ranking.differing.items():
            values = [run.settings.get(key) for run in self._scored]
            if len({setting_text(value) for value in values}) < 2:
                continue  # of an unfinished sweep: it will differ
            scale, place = _setting_axis(values, short)
            plot = Plot(scale, self._metric_scale(self._scored))
            by_place: dict[float, list[ComparedRun]] = {}
            for run in self._scored:
                by_place.setdefault(place(run.settings.get(key)), []).append(run)
            words = ["Bars: 95 % intervals."] if self._is_share else []
            words += self._joins(plot, key, by_place)
            for x, runs in by_place.items():
                self._marks(plot, runs, x)
            yield Panel("What each setting does", f"{self._metric} against {short}", plot, " ".join(words))

    def _joins(self, plot: Plot, key: str, by_place: dict[float, list[ComparedRun]]) -> list[str]:
        """Draw lines between runs that differ in nothing but `key`, and of the means; return what to say of them."""
        others = [other for other in self._ranking.differing if other != key]
        alike: dict[str, list[tuple[float, float, float]]] = {}
        surroundings = []
        for x, runs in sorted(by_place.items()):
            rest = [repr([run.settings.get(other) for other in others]) for run in runs]
            surroundings.append(sorted(rest))
            for run, same, aside in zip(runs, rest, _aside(len(runs)), strict=True):
                alike.setdefault(same, []).append((x, self._value(run), aside))
        joined = [points for points in alike.values() if len(points) > 1]
        for points in joined:
            plot.line([(x, y) for x, y, _ in points], kind="join", aside=[aside for *_, aside in points])
        words = ["Thin lines join runs that differ in nothing else."] if joined and others else []
        if all(each == surroundings[0] for each in surroundings):
            means = [(x, sum(map(self._value, runs)) / len(runs)) for x, runs in sorted(by_place.items())]
            plot.line(means, kind="mean")
            words.append("Thick line: means.")
        else:
            words.append("No means: not every value has been run with the same other settings.")
        return words

    def _sample_size(self) -> Iterator[Panel]:
        sized = [run for run in self._scored if run.train_examples]
        sizes = sorted({run.train_examples or 0 for run in sized})
        if len(sizes) < 3 or not self._is_share:
            return
        best = {size: max(self._value(r) for r in sized if r.train_examples == size) for size in sizes}
        fit = fit_sample_curve(list(best), list(best.values()))
        assert fit is not None
        ahead = 2 * sizes[-1]
        curve = [(n, fit.value(n)) for n in _between(sizes[0], ahead)]
        intervals = [value for run in sized for value in _ends(run, self._metric)]
        plot = Plot(
            setting_scale([*sizes, ahead], "training conversations"),
            linear_scale([*intervals, *(y for _, y in curve)], f"{self._metric} (%)", percent=True),
        )
        plot.line([point for point in curve if point[0] <= sizes[-1]], kind="mean")
        plot.line([point for point in curve if point[0] >= sizes[-1]], kind="mean ahead")
        for size in sizes:
            self._marks(plot, [run for run in sized if run.train_examples == size], float(size))
        yield Panel(
            "How they learn",
            f"{self._metric} against sample size",
            plot,
            f"Fit through the best run of each size: {fit.words} (misses by {100 * fit.residual:.1f} points). Dashed, as a "
            f"guess: {100 * fit.value(ahead):.1f} with {ahead:,} conversations.",
        )

    def _costs(self) -> Iterator[Panel]:
        costs: tuple[tuple[str, str, float], ...] = (
            ("seconds", "minutes of the whole run", 60.0),
            ("tokens", "tokens trained on", 1.0),
            ("peak_memory_bytes", "peak memory, GiB", 2.0**30),
        )
        for name, label, unit in costs:
            if name == self._metric:
                continue
            worth = 1 if self._least_is_best else -1
            known = [(run, cost / unit) for run in self._scored if (cost := run.number(name)) is not None]
            if len({round(cost, 3) for _, cost in known}) < 2:
                continue
            across = linear_scale([cost for _, cost in known], label, room=0.1)  # for equal costs side by side
            plot = Plot(across, self._metric_scale([run for run, _ in known]))
            frontier: list[tuple[float, float]] = []
            for cost, value in sorted(((c, self._value(r)) for r, c in known), key=lambda p: (p[0], worth * p[1])):
                if not frontier or worth * value < worth * frontier[-1][1]:
                    frontier += [(cost, frontier[-1][1])] if frontier else []
                    frontier.append((cost, value))
            plot.line(frontier, kind="mean")
            by_cost: dict[str, list[tuple[ComparedRun, float]]] = {}
            for run, cost in known:
                by_cost.setdefault(f"{cost:.3g}", []).append((run, cost))  # equal costs would hide each other
            for alike in by_cost.values():
                for (run, cost), aside in zip(alike, _aside(len(alike)), strict=True):
                    self._mark(plot, run, cost, aside)
            yield Panel(
                "What it costs", f"{self._metric} against {label}", plot, "Grey line: nothing is better for less."
            )

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
                "colour": self.colours.get(run.name),
                "counts": [(count, f"{count / most:.2f}") for count in (run.errors.get(kind, 0) for kind in kinds)],
            }
            for run in runs
        ]
        errors = {"kinds": [kind.replace("_", " ") for kind in kinds], "rows": rows}
        words = "Steps of the held-out conversations that show each kind of error; the deeper, the more."
        yield Panel("What goes wrong", "Errors by kind", None, words, errors)

    def _metric_scale(self, runs: Sequence[ComparedRun]) -> Scale:
        ends = [value for run in runs for value in _ends(run, self._metric)]
        return linear_scale(ends, f"{self._metric} (%)" if self._is_share else self._metric, percent=self._is_share)

    def _marks(self, plot: Plot, runs: Sequence[ComparedRun], x: float) -> None:
        """Draw runs of one value side by side, the best left."""
        for run, aside in zip(runs, _aside(len(runs)), strict=True):
            self._mark(plot, run, x, aside)

    def _mark(self, plot: Plot, run: ComparedRun, x: float, aside: float = 0.0) -> None:
        """Draw a run's metric with its interval, `aside` pixels beside its place."""
        score, colour, value = run.scores.get(self._metric), self.colours[run.name], self._value(run)
        if score is not None and score.low is not None and score.high is not None:
            plot.interval(x, score.low, score.high, colour=colour, run=run.name, aside=aside)
        words = f"{100 * value:.1f}" if self._is_share else f"{value:.4g}"
        plot.dot(x, value, f"{run.name}: {words}", colour=colour, run=run.name, aside=aside)


def _aside(count: int) -> list[float]:
    """Return the pixels by which so many runs of one value stand beside it."""
    gap = min(9.0, 60.0 / count)
    return [(i - (count - 1) / 2) * gap for i in range(count)]


def _ends(run: ComparedRun, metric: str) -> list[float]:
    score = run.scores.get(metric)
    ends = [run.number(metric)] if score is None else [score.low, score.value, score.high]
    return [value for value in ends if value is not None]


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
