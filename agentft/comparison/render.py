"""Render a page from its template, style sheet and script in `templates/`, and the drawings on it.

A page is one file that needs no network. The classes of a drawing are those of the page's style sheet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"

# Control characters, turns of the writing direction, halves of a surrogate pair.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return `text` with signs in place of control characters: a dataset must not move the reader's cursor.

    Line breaks and tabs stay.
    """
    return _UNSEEN.sub(_sign, text)


def render_page(name: str, **values: Any) -> str:
    """Return the page `name` with `values` in its template; any text of theirs is shown as text, never as markup."""
    # Our own files, and the only markup that does not come out of a template.
    style, script = (Markup((_TEMPLATES / f"{name}.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    return _environment().get_template(f"{name}.html.j2").render(style=style, script=script, **values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _shown(value: Any) -> Any:
    """Return what a template writes, markup as markup, with every character to be seen."""
    if not isinstance(value, str):
        return value
    return Markup(visible(value)) if isinstance(value, Markup) else visible(value)


def _sign(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


LEFT, RIGHT, TOP, BOTTOM = 58, 16, 12, 42
"""Margins around the plotting area, in pixels."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Values of one axis onto 0..1, and the ticks that name them."""

    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]
    label: str


def linear_scale(values: Sequence[float], label: str, *, percent: bool = False, room: float = 0.05) -> Scale:
    """Return an evenly spaced scale, with a margin of a share `room` and round ticks."""
    low, high = min(values), max(values)
    margin = room * (high - low) or abs(high) * 0.05 or (0.05 if percent else 0.5)
    low, high = low - margin, high + margin
    ticks = [tick for tick in _round_ticks(low, high) if not percent or 0 <= tick <= 1]
    words = [f"{100 * t:g}" if percent else _short_number(t) for t in ticks]
    return Scale(lambda v: (v - low) / (high - low), list(zip(ticks, words, strict=True)), label)


def setting_scale(values: Sequence[float], label: str) -> Scale:
    """Return a scale with ticks at the values themselves; logarithmic where they span a factor of 8 or more."""
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
    """Return a scale with one place for each name; its values are 0, 1, 2, ..."""
    count = len(names)
    return Scale(lambda v: (v + 0.5) / count, [(float(i), name) for i, name in enumerate(names)], label)


@dataclass(frozen=True, slots=True)
class Mark:
    """An element of a drawing."""

    tag: str
    attributes: Mapping[str, object]
    """As in SVG; those that are None are left out."""
    text: str = ""
    title: str = ""
    """Its tooltip."""


class Plot:
    """A chart of two scales, so many pixels wide and high; `templates/drawing.j2` makes SVG of it.

    What is drawn later covers what was drawn before.
    """

    def __init__(self, x: Scale, y: Scale, width: int = 420, height: int = 270) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        self.marks: list[Mark] = []
        self._axes()

    def draw(self, tag: str, *, text: str = "", title: str = "", **attributes: object) -> None:
        """Add an element: `data_run` is its attribute `data-run`, `class_` its class; empty attributes are left out."""
        named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value != ""}
        self.marks.append(Mark(tag, named, text, title))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixels of a point."""
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
        """Draw a line through points, each so many pixels to the right; `kind` is a class of the style sheet."""
        pixels = [self.at(x, y) for x, y in points]
        moved = zip(pixels, aside or [0.0] * len(pixels), strict=True)
        path = " ".join(f"{px + by:.1f},{py}" for (px, py), by in moved)
        self.draw("polyline", points=path, class_=f"line {kind}".strip(), style=colour, data_run=run)
        if run:  # a thin line is hard to point at
            self.draw("polyline", points=path, class_="hit", data_run=run, title=run)

    def dot(self, x: float, y: float, title: str, *, colour: str = "", run: str = "", aside: float = 0.0) -> None:
        """Draw a point with a tooltip, `aside` pixels to the right."""
        px, py = self.at(x, y)
        across = f"{px + aside:.1f}"
        self.draw("circle", cx=across, cy=py, r=4, class_="dot", style=colour, data_run=run, title=title)

    def interval(
        self, x: float, low: float, high: float, *, colour: str = "", run: str = "", aside: float = 0.0
    ) -> None:
        """Draw a vertical 95 % interval."""
        (px, bottom), (_, top) = self.at(x, low), self.at(x, high)
        path = f"M{px + aside:.1f},{bottom}V{top}m-3,0h6M{px + aside - 3:.1f},{bottom}h6"
        self.draw("path", d=path, class_="line", style=colour, data_run=run)

    def _axes(self) -> None:
        right, bottom = self.width - RIGHT, self.height - BOTTOM
        for value, words in self.y.ticks:
            y = round(TOP + (1 - self.y.place(value)) * (bottom - TOP), 1)
            if TOP - 1 <= y <= bottom + 1:
                self.draw("path", class_="grid", d=f"M{LEFT},{y}H{right}")
                self.draw("text", x=LEFT - 6, y=y + 4, text_anchor="end", text=words)
        for value, words in self.x.ticks:
            x = round(LEFT + self.x.place(value) * (right - LEFT), 1)
            if LEFT - 1 <= x <= right + 1:
                self.draw("path", class_="grid", d=f"M{x},{bottom}v4")
                self.draw("text", x=x, y=bottom + 17, text_anchor="middle", text=words[:24])
        self.draw("path", class_="axis", d=f"M{LEFT},{TOP}V{bottom}H{right}")
        label = {"class_": "label", "text_anchor": "middle"}
        self.draw("text", x=(LEFT + right) / 2, y=self.height - 6, **label, text=self.x.label)
        self.draw("text", transform=f"translate(13,{(TOP + bottom) / 2}) rotate(-90)", **label, text=self.y.label)


def colour_of(share: float) -> str:
    """Return the style of a run's colour, from 0, worst, to 1, best: told apart in grey and by the colour-blind too.

    It grows away from the paper: from pale to deep blue on white (`--c`), from dim violet to yellow on black (`--d`).
    """
    on_white = ((199, 209, 150), (86, 177, 140), (38, 130, 142), (49, 80, 137), (68, 1, 84))
    on_black = ((86, 74, 120), (58, 104, 156), (36, 152, 148), (112, 200, 90), (253, 231, 70))
    return f"--c:{_mixed(on_white, share)};--d:{_mixed(on_black, share)}"


def ramp(steps: int = 9) -> str:
    """Return the style of a legend's background: all colours, worst to best."""
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
