"""Render a page from its template, style sheet and script in `templates/`, and the drawings on it.

A page is one file that needs no network. The classes of a drawing are those of the page's style sheet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
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
    """A line or a dot of a drawing."""

    kind: str
    """Its classes in the style sheet."""
    at: str | tuple[float, float]
    """The path of a line, the middle of a dot."""
    style: str | None = None
    run: str | None = None
    title: str = ""
    """Its tooltip."""


class Plot:
    """A chart of two scales, in pixels; `templates/drawing.j2` makes SVG of it. Later marks cover earlier ones."""

    width, height = 420, 270
    left, right, top, bottom = 58, 404, 12, 228
    """Edges of the plotting area."""

    def __init__(self, x: Scale, y: Scale) -> None:
        self.x, self.y = x, y
        self.marks: list[Mark] = []

    def across(self, x: float, aside: float = 0.0) -> float:
        """Return the pixel of a value of the lower axis, or one `aside` pixels to its right."""
        return round(self.left + self.x.place(x) * (self.right - self.left) + aside, 1)

    def down(self, y: float) -> float:
        """Return the pixel of a value of the left axis."""
        return round(self.top + (1 - self.y.place(y)) * (self.bottom - self.top), 1)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        style: str | None = None,
        run: str | None = None,
        kind: str = "",
        aside: Sequence[float] | None = None,
    ) -> None:
        """Draw a line through points, each so many pixels to the right; `kind` is a class of the style sheet."""
        moved = zip(points, aside or [0.0] * len(points), strict=True)
        path = "M" + " ".join(f"{self.across(x, by)},{self.down(y)}" for (x, y), by in moved)
        self.marks.append(Mark(f"line {kind}".strip(), path, style, run))
        if run:  # a thin line is hard to point at
            self.marks.append(Mark("hit", path, None, run, run))

    def dot(self, x: float, y: float, title: str, *, style: str | None, run: str, aside: float = 0.0) -> None:
        """Draw a point with a tooltip, `aside` pixels to the right."""
        self.marks.append(Mark("dot", (self.across(x, aside), self.down(y)), style, run, title))

    def interval(self, x: float, low: float, high: float, *, style: str | None, run: str, aside: float) -> None:
        """Draw a vertical 95 % interval."""
        px, bottom = self.across(x, aside), self.down(low)
        self.marks.append(Mark("line", f"M{px},{bottom}V{self.down(high)}m-3,0h6M{px - 3:.1f},{bottom}h6", style, run))


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
