"""The comparison as one HTML file that needs no network: the table, and every chart of `agentft.comparison.panels`."""

from __future__ import annotations

from html import escape

from agentft.comparison.panels import Charts
from agentft.comparison.ranking import Ranking
from agentft.comparison.tables import short_names, table_cells, table_notes

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #68707f; --line: #d9dde4; --paper: #ffffff; --panel: #f7f8fa;
  --heat: 190, 60, 40; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #98a1b0; --line: #39404c; --paper: #14171c;
  --panel: #1c2027; --heat: 235, 110, 80; } .line, .dot { filter: brightness(1.45); } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto; max-width: 1480px;
  padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1rem; margin: 0 0 .4rem; }
p, li { color: var(--soft); margin: .2rem 0; } ul { padding-left: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; margin: 1rem 0; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; } td.text, th.text, .errors th:first-child { text-align: left; }
td.best { font-weight: 700; } .mark { color: var(--soft); } .mark.first { color: inherit; font-weight: 700; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1.5rem; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; max-width: 100%;
  box-sizing: border-box; }
.panel p { max-width: 420px; font-size: .82rem; } .panel svg { display: block; }
.panel table { margin: .3rem 0; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .label { fill: var(--ink); font-size: 12px; }
.halo { paint-order: stroke; stroke: var(--panel); stroke-width: 4px; }
.axis { stroke: var(--soft); fill: none; } .grid { stroke: var(--line); fill: none; }
.line { stroke: var(--c, #8a93a3); fill: none; stroke-width: 1.6; } .wide { stroke-width: 2.2; }
.mean { stroke: #8a93a3; stroke-width: 1.3; } .ahead { stroke-dasharray: 5 4; }
.dot { fill: var(--c, #8a93a3); stroke: var(--panel); stroke-width: 1; }
.heat { background: rgba(var(--heat), calc(var(--h) * .75)); text-align: center; }
.chosen .line[data-run]:not(.on), .chosen .dot[data-run]:not(.on) { opacity: .13; }
.chosen .line.on { stroke-width: 3; } tr.on { background: rgba(120, 140, 180, .18); }
"""

_SCRIPT = """
const marks = document.querySelectorAll('[data-run]');
let kept = null;
function choose(run) {
  document.body.classList.toggle('chosen', run !== null);
  for (const mark of marks) mark.classList.toggle('on', mark.dataset.run === run);
}
for (const mark of marks) {
  mark.addEventListener('mouseenter', () => choose(mark.dataset.run));
  mark.addEventListener('mouseleave', () => choose(kept));
  mark.addEventListener('click', () => { kept = kept === mark.dataset.run ? null : mark.dataset.run; choose(kept); });
}
"""


def html_page(ranking: Ranking, title: str) -> str:
    """One file: style, script and charts inside; pointing at a run shows it in every chart, a click keeps it."""
    panels = "".join(
        f'<section class="panel"><h2>{escape(panel.heading)}</h2>{panel.body}'
        + (f"<p>{escape(panel.words)}</p>" if panel.words else "")
        + "</section>"
        for panel in Charts(ranking).panels()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in table_notes(ranking))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{len(ranking.runs)} runs; the deeper the colour, the better the {escape(ranking.metric)}. "
        "Point at a run to see it everywhere; click to keep it.</p>"
        f'{_table(ranking)}<ul>{notes}</ul><div class="panels">{panels}</div><script>{_SCRIPT}</script></body></html>\n'
    )


def _table(ranking: Ranking) -> str:
    header, rows = table_cells(ranking, ranking.metrics)
    words = {"", "run", "state"}
    kinds = ["text" if name in words else "" for name in header]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    lines = []
    numbers = short_names(ranking.runs)  # their settings stand beside them
    for run, number, row in zip(ranking.runs, numbers, rows, strict=True):
        row[1] = (number, False)
        cells = "".join(
            f'<td class="{kind} {"best" if best else ""}{_mark_class(i, text)}">{escape(text)}</td>'
            for i, ((text, best), kind) in enumerate(zip(row, kinds, strict=True))
        )
        name = escape(run.name, quote=True)
        lines.append(f'<tr data-run="{name}" title="{name}">{cells}</tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _mark_class(column: int, text: str) -> str:
    return "" if column else " mark first" if text == "best" else " mark"
