"""The comparison as one HTML file that needs no network: the table, and every chart of `agentft.comparison.panels`."""

from __future__ import annotations

import re
from html import escape
from itertools import groupby

from agentft.comparison.page_style import SCRIPT, STYLE
from agentft.comparison.panels import Charts
from agentft.comparison.ranking import Ranking
from agentft.comparison.runs import ComparedRun
from agentft.comparison.svg import ramp
from agentft.comparison.tables import short_names, table_cells, table_notes


def html_page(ranking: Ranking, title: str) -> str:
    """One file: style, script and charts inside; pointing at a run shows it in every chart, a click keeps it."""
    charts = Charts(ranking)
    sections = "".join(
        f'<h2>{escape(name)}</h2><div class="panels">'
        + "".join(
            f'<section class="panel{" wide" if panel.wide else ""}"><h3>{escape(panel.heading)}</h3>{panel.body}'
            + (f"<p>{escape(panel.words)}</p>" if panel.words else "")
            + "</section>"
            for panel in panels
        )
        + "</div>"
        for name, panels in groupby(charts.panels(), lambda panel: panel.section)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table_notes(ranking))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{_legend(ranking)}"
        f'{_table(ranking, charts.colours)}<ul>{notes}</ul>{sections}<div id="words"></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _legend(ranking: Ranking) -> str:
    """What the colours mean, and what a reader can do."""
    count = len(ranking.runs)
    return (
        f"<p>{count} run{'s' if count != 1 else ''}. Colour: place by {escape(ranking.metric)}, worst"
        f'<span class="ramp" style="{ramp()}"></span>best; grey: no score yet. '
        "Point at a run to see it everywhere, click to keep it (Escape lets go); click a heading of the table to sort.</p>"
    )


def _table(ranking: Ranking, colours: dict[str, str]) -> str:
    header, rows = table_cells(ranking, ranking.metrics)
    words = {"", "run", "state"}
    kinds = ["text" if name in words else "" for name in header]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    lines = []
    numbers = short_names(ranking.runs)  # their settings stand beside them
    for run, number, row in zip(ranking.runs, numbers, rows, strict=True):
        row[1] = (number, False)
        values = [_sorted_by(run, name, text) for name, (text, _) in zip(header, row, strict=True)]
        cells = "".join(
            f'<td class="{kind}{" best" if best else ""}{_mark_class(i, text)}" data-value="{escape(value, quote=True)}">'
            + (_swatch(colours.get(run.name)) if i == 1 else "")
            + f"{_cell(text)}</td>"
            for i, ((text, best), kind, value) in enumerate(zip(row, kinds, values, strict=True))
        )
        name = escape(run.name, quote=True)
        lines.append(f'<tr data-run="{name}" title="{escape(_told(ranking, run), quote=True)}">{cells}</tr>')
    return f'<div class="scroll"><table class="sorted"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _swatch(colour: str | None) -> str:
    """The run's colour in all charts; none yet: grey."""
    return '<span class="swatch"' + (f' style="{colour}"' if colour else "") + "></span>"


def _cell(text: str) -> str:
    """An interval is set smaller than its value."""
    value, bracket, rest = text.partition(" [")
    return escape(value) + (f" <small>[{escape(rest)}</small>" if bracket else "")


def _sorted_by(run: ComparedRun, column: str, text: str) -> str:
    """What the table is sorted by at a click: the number, without unit and interval, else the words."""
    exact = {"time": run.seconds, "memory": run.peak_memory_bytes}
    if column in exact:
        return "" if exact[column] is None else str(exact[column])
    number = re.match(r"-?[\d.]+(e[-+]?\d+)?(?= \[|$)", text)
    return number.group() if number else text


def _told(ranking: Ranking, run: ComparedRun) -> str:
    """A run in one line, for who points at it."""
    parts = [run.name, run.state]
    if run.number(ranking.metric) is not None and ranking.metric in run.scores:
        parts.append(f"{ranking.metric} {100 * run.scores[ranking.metric].value:.1f}")
    if run.loss is not None:
        parts.append(f"held-out loss {run.loss:.4f}")
    return ", ".join([*parts, *([run.reason] if run.reason else [])])


def _mark_class(column: int, text: str) -> str:
    return "" if column else " mark first" if text == "best" else " mark"
