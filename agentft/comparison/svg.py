"""Plain SVG for the comparison page: scales, axes and marks; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 58, 16, 12, 42
"""Margins around the plotting area, in pixels."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Values of one axis onto 0..1, and the ticks that name them."""

    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]
    label: str


def linear_scale(
    values: Sequence[float], label: str, *, percent: bool = False, turned: bool = False, room: float = 0.05
) -> Scale:
    """Evenly spaced, with a margin of a share `room` and round ticks; `turned` has the low end on top."""
    low, high = min(values), max(values)
    margin = room * (high - low) or abs(high) * 0.05 or (0.05 if percent else 0.5)
    low, high = low - margin, high + margin
    ticks = [tick for tick in _round_ticks(low, high) if not percent or 0 <= tick <= 1]
    words = [f"{100 * t:g}" if percent else _short_number(t) for t in ticks]
    named = list(zip(ticks, words, strict=True))
    if turned:
        return Scale(lambda v: (high - v) / (high - low), named, label)
    return Scale(lambda v: (v - low) / (high - low), named, label)


def setting_scale(values: Sequence[float], label: str) -> Scale:
    """Ticks at the values themselves; logarithmic where they span a factor of 8 or more."""
    known = sorted(set(values))
    logarithmic = known[0] > 0 and known[-1] / known[0] >= 8
    place: Callable[[float], float] = math.log if logarithmic else float
    low, high = place(known[0]), place(known[-1])
    margin = 0.14 * (high - low) or 0.5  # room for runs side by side
    low, high = low - margin, high + margin
    thinned = known if len(known) <= 9 else known[:: math.ceil(len(known) / 9)]
    return Scale(
        lambda v: (place(v) - low) / (high - low),
        [(v, _short_number(v)) for v in thinned],
        label + (" (logarithmic)" if logarithmic else ""),
    )


def category_scale(names: Sequence[str], label: str) -> Scale:
    """One place for each name; its values are 0, 1, 2, ..."""
    count = len(names)
    return Scale(lambda v: (v + 0.5) / count, [(float(i), name) for i, name in enumerate(names)], label)


@dataclass
class Plot:
    """A chart under construction: two scales, and marks in data coordinates."""

    x: Scale
    y: Scale
    width: int = 420
    height: int = 270
    parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across, up = self.x.place(x), self.y.place(y)
        inner_width, inner_height = self.width - LEFT - RIGHT, self.height - TOP - BOTTOM
        return round(LEFT + across * inner_width, 1), round(TOP + (1 - up) * inner_height, 1)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        colour: str = "",
        run: str = "",
        kind: str = "",
        aside: Sequence[float] | None = None,
    ) -> None:
        """A line through points, each so many pixels to the right; `kind` is a class of the style sheet."""
        pixels = [self.at(x, y) for x, y in points]
        moved = zip(pixels, aside or [0.0] * len(pixels), strict=True)
        path = " ".join(f"{px + by:.1f},{py}" for (px, py), by in moved)
        self.parts.append(f'<polyline points="{path}"{_marks(f"line {kind}", colour, run)}</polyline>')
        if run:  # a thin line is hard to point at
            self.parts.append(f'<polyline points="{path}"{_marks("hit", "", run, run)}</polyline>')

    def dot(self, x: float, y: float, title: str, *, colour: str = "", run: str = "", aside: float = 0.0) -> None:
        """A point with a tooltip, `aside` pixels to the right."""
        px, py = self.at(x, y)
        place = f'cx="{px + aside:.1f}" cy="{py}" r="4"'
        self.parts.append(f"<circle {place}{_marks('dot', colour, run, title)}</circle>")

    def interval(
        self, x: float, low: float, high: float, *, colour: str = "", run: str = "", aside: float = 0.0
    ) -> None:
        """A vertical 95 % interval."""
        (px, bottom), (_, top) = self.at(x, low), self.at(x, high)
        path = f"M{px + aside:.1f},{bottom}V{top}m-3,0h6M{px + aside - 3:.1f},{bottom}h6"
        self.parts.append(f'<path d="{path}"{_marks("line", colour, run)}</path>')

    def svg(self) -> str:
        """The whole chart."""
        right, bottom = self.width - RIGHT, self.height - BOTTOM
        parts = []
        for value, words in self.y.ticks:
            y = round(TOP + (1 - self.y.place(value)) * (bottom - TOP), 1)
            if TOP - 1 <= y <= bottom + 1:
                parts.append(f'<path class="grid" d="M{LEFT},{y}H{right}"/>')
                parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{escape(words)}</text>')
        for value, words in self.x.ticks:
            x = round(LEFT + self.x.place(value) * (right - LEFT), 1)
            if LEFT - 1 <= x <= right + 1:
                parts.append(f'<path class="grid" d="M{x},{bottom}v4"/>')
                parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{escape(words[:24])}</text>')
        parts.append(f'<path class="axis" d="M{LEFT},{TOP}V{bottom}H{right}"/>')
        middle = (LEFT + right) / 2
        parts.append(
            f'<text class="label" x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(self.x.label)}</text>'
        )
        turned = f"translate(13,{(TOP + bottom) / 2}) rotate(-90)"
        parts.append(f'<text class="label" transform="{turned}" text-anchor="middle">{escape(self.y.label)}</text>')
        box = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        return f"<svg {box} role='img'>{''.join(parts + self.parts)}</svg>"


def colour_of(share: float) -> str:
    """The style of a run's colour, from 0, worst, to 1, best: told apart in grey and by the colour-blind too.

    It grows away from the paper: from pale to deep blue on white (`--c`), from dim violet to yellow on black (`--d`).
    """
    on_white = ((199, 209, 150), (86, 177, 140), (38, 130, 142), (49, 80, 137), (68, 1, 84))
    on_black = ((86, 74, 120), (58, 104, 156), (36, 152, 148), (112, 200, 90), (253, 231, 70))
    return f"--c:{_mixed(on_white, share)};--d:{_mixed(on_black, share)}"


def ramp(steps: int = 9) -> str:
    """The style of a legend's background: all colours, worst to best."""
    pairs = [colour_of(i / (steps - 1)).split(";") for i in range(steps)]
    columns = [", ".join(each.partition(":")[2] for each in column) for column in zip(*pairs, strict=True)]
    return ";".join(
        f"--{name}:linear-gradient(to right, {colours})" for name, colours in zip("cd", columns, strict=True)
    )


def _mixed(stops: Sequence[tuple[int, int, int]], share: float) -> str:
    place = min(1.0, max(0.0, share)) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(stops[i], stops[i + 1], strict=True))
    return "rgb({},{},{})".format(*mixed)


def _marks(kind: str, colour: str, run: str, title: str = "") -> str:
    """Class, colour, run and tooltip of a mark: the rest of its opening tag, `>` included."""
    style = f' style="{colour}"' if colour else ""
    name = f' data-run="{escape(run, quote=True)}"' if run else ""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f' class="{kind.strip()}"{style}{name}>{inner}'


def _round_ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _short_number(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:.4g}"
