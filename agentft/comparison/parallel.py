"""Parallel coordinates: one vertical axis a setting or result, one line a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from agentft.comparison.runs import ComparedRun
from agentft.comparison.svg import Scale

Axis = tuple[Scale, Callable[[ComparedRun], float | None]]
"""Where a value lies, and a run's value; a run without one has no point on the axis."""

TOP, HEIGHT, GAP, LEFT = 34, 250, 150, 80


def parallel_svg(runs: Sequence[ComparedRun], axes: Sequence[Axis], colours: Mapping[str, str]) -> str:
    """The chart; `runs` come best first, and the best is drawn on top."""
    width = 2 * LEFT + GAP * (len(axes) - 1)
    lines = [_line(run, axes, colours[run.name]) for run in reversed(runs)]
    below = [f'<path class="axis" d="M{LEFT + i * GAP},{TOP}v{HEIGHT}"/>' for i in range(len(axes))]
    words = [_words(scale, LEFT + i * GAP) for i, (scale, _) in enumerate(axes)]
    height = TOP + HEIGHT + 12
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role=\'img\'>'
        f"{''.join([*below, *lines, *words])}</svg></div>"
    )


def _y(scale: Scale, value: float) -> float:
    return round(TOP + (1 - scale.place(value)) * HEIGHT, 1)


def _line(run: ComparedRun, axes: Sequence[Axis], colour: str) -> str:
    places = [(LEFT + i * GAP, scale, found) for i, (scale, get) in enumerate(axes) if (found := get(run)) is not None]
    points = " ".join(f"{x},{_y(scale, value)}" for x, scale, value in places)
    name = escape(run.name, quote=True)
    return (
        f'<polyline points="{points}" class="line wide-line" style="{colour}" data-run="{name}"/>'
        f'<polyline points="{points}" class="hit" data-run="{name}"><title>{escape(run.name)}</title></polyline>'
    )


def _words(scale: Scale, x: int) -> str:
    """The name of an axis and of its ticks, over the lines."""
    parts = [f'<text class="label" x="{x}" y="18" text-anchor="middle">{escape(scale.label.split(" (log")[0])}</text>']
    for value, words in scale.ticks:
        if TOP - 1 <= (y := _y(scale, value)) <= TOP + HEIGHT + 1:
            parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end" class="halo">{escape(words[:16])}</text>')
    return "".join(parts)
