"""Render a page from its template, style sheet and script in `templates/`, as one file that needs no network."""

from __future__ import annotations

import re
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
