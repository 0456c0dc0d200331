"""The audit as one HTML file that needs no network: findings, charts, and a sample of conversations with their labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from agentft.comparison.svg import Plot, linear_scale
from agentft.data.audit import Seen
from agentft.data.findings import Finding
from agentft.data.render import TRAINED_KINDS, Kind
from agentft.data.token_text import TokenText
from agentft.recipes.audit_report import (
    BARS_UP_TO_LIMIT,
    FITTING_COLUMNS,
    PART_NAMES,
    SOURCE_COLUMNS,
    TALLY_COLUMNS,
    AuditReport,
    by_rounds,
    extent,
    fitting_rows,
    length_bars,
    mean,
    most_called,
    place,
    source_rows,
    tally_cells,
)
from agentft.recipes.conversation_view import Run, labelled_runs, visible

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #68707f; --line: #d9dde4; --paper: #ffffff; --panel: #f7f8fa;
  --call: 34, 160, 90; --frame: 128, 178, 148;
  --text: 40, 120, 220; --stop: 200, 60, 50; --user: #9a6a00; --observation: #8d3fa3;
  --bad: #b3261e; --warn: #9a6a00; --note: #2a6f97; --good: #1f7a43; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #98a1b0; --line: #39404c; --paper: #14171c;
  --panel: #1c2027; --call: 70, 200, 130; --frame: 96, 140, 112; --text: 110, 170, 255; --stop: 240, 110, 95; --user: #e0b050;
  --observation: #d59be6; --bad: #ff8a80; --warn: #e0b050; --note: #7cc0e8; --good: #6fd39a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1280px; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
h3 { font-size: .92rem; margin: 0 0 .4rem; }
p { color: var(--soft); margin: .2rem 0; } .verdict { font-weight: 600; }
.pass { color: var(--good); } .fail { color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; } th:first-child, td:first-child, .words td, .words th { text-align: left; }
td:first-child { overflow-wrap: anywhere; } tbody + tbody tr:first-child td { border-top: 2px solid var(--line); }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; } .panel { background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; padding: .8rem 1rem; max-width: 100%; box-sizing: border-box; overflow-x: auto; }
.panel p { max-width: 34rem; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .label { fill: var(--ink); font-size: 12px; }
.axis { stroke: var(--soft); fill: none; } .grid { stroke: var(--line); fill: none; }
.bar { fill: rgb(var(--text)); } .bar.over { fill: rgb(var(--stop)); } .limit { stroke: var(--bad); stroke-dasharray: 4 3; }
.level { font-size: .75rem; font-weight: 600; } .broken, .fails { color: var(--bad); } .warning { color: var(--warn); }
.note { color: var(--note); } code { font-size: .85rem; }
details { border-bottom: 1px solid var(--line); padding: .25rem 0; } summary { cursor: pointer; }
summary small, small { color: var(--soft); } .places { margin: .3rem 0 .5rem 1.2rem; padding: 0; font-size: .82rem; }
.places li { overflow-wrap: anywhere; }
.share { display: flex; height: 1.3rem; border-radius: 4px; overflow: hidden; margin: .3rem 0 .8rem; }
.share i { display: block; }
input { font: inherit; width: 22rem; max-width: 100%; padding: .25rem .5rem; margin: .3rem 0; }
.run { display: grid; grid-template-columns: 8.5rem 1fr; gap: .7rem; font: 12.5px/1.55 ui-monospace, monospace; }
.run > b { text-align: right; font-weight: 400; color: var(--soft); } .run.on > b { font-weight: 700; color: var(--ink); }
.run > span { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto; }
.k-header > span, .k-system > span { color: var(--soft); } .k-user > span { color: var(--user); }
.k-observation > span { color: var(--observation); }
.on u { text-decoration: none; background: rgba(var(--c), .20); } .on u:nth-child(even) { background: rgba(var(--c), .38); }
.k-call { --c: var(--call); } .k-frame { --c: var(--frame); } .k-text { --c: var(--text); } .k-stop { --c: var(--stop); }
.on:not(.k-call):not(.k-frame):not(.k-text):not(.k-stop) { --c: var(--stop); outline: 2px solid var(--bad); }
"""

_SCRIPT = """
const wanted = document.querySelector('input');
const conversations = [...document.querySelectorAll('.conversation')];
wanted.addEventListener('input', () => {
  const words = wanted.value.toLowerCase();
  for (const one of conversations) one.hidden = !one.textContent.toLowerCase().includes(words);
});
function open() {
  const chosen = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (chosen) { chosen.open = true; chosen.scrollIntoView(); }
}
addEventListener('hashchange', open); open();
"""

_COLOURS = {
    Kind.header: "var(--line)",
    Kind.system: "#9aa3b2",
    Kind.user: "var(--user)",
    Kind.observation: "var(--observation)",
    Kind.text: "rgb(var(--text))",
    Kind.call: "rgb(var(--call))",
    Kind.stop: "rgb(var(--stop))",
    Kind.frame: "rgb(var(--frame))",
}


def html_page(report: AuditReport, text: TokenText) -> str:
    """One file, style and script inside: what the terminal says, and conversations to open, token by token."""
    config = report.config
    title = f"Audit of {config.dataset.name} for {config.model.name}"
    shown = report.audit.shown()
    anchors = {name: f"c{number}" for number, name in enumerate(shown)}
    conversations = "".join(
        _conversation(seen, codes, anchors[name], report.audit.part_of(name), text)
        for name, (seen, codes) in shown.items()
    )
    findings = "".join(_finding(finding, report, anchors) for finding in report.audit.findings.all())
    verdict = "fail" if report.failing else "pass"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><h1>{_text(title)}</h1>"
        f"<p>{_text(', '.join(report.read.files[:8]))}</p><p>{_text(report.headline())}</p>"
        f'<p class="verdict {verdict}">{_text(report.verdict())}</p>'
        f"<h2>Findings</h2>{findings or '<p>none</p>'}"
        f'<h2>What it holds</h2><div class="panels">{"".join(_panels(report))}</div>'
        f"<h2>Conversations</h2><p>{len(shown)} of {report.statistics.whole.conversations:,}: the first example of each "
        "finding, then a sample by content hash. On colour: trained, token by token; the rest is masked.</p>"
        f'<input type="search" placeholder="filter by id, language or word" aria-label="filter">{conversations}'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _finding(finding: Finding, report: AuditReport, anchors: dict[str, str]) -> str:
    level = report.level_of(finding)
    places = []
    for example in finding.examples:
        where = _text(place(example))
        if example.id in anchors:
            where = f'<a href="#{anchors[example.id]}">{where}</a>'
        places.append(f"<li>{where} <small>{_text(example.detail)}</small></li>")
    topics = ", ".join(f"{topic[:60]} {count:,}" for topic, count in finding.topics.most_common(8))
    about = f"<p><small>by topic: {_text(topics)}</small></p>" if len(finding.topics) > 1 else ""
    return (
        f'<details{" open" if finding in report.failing else ""}><summary><span class="level {level}">{level}</span> '
        f"<code>{finding.code}</code> <b>{extent(finding)}</b> <small>{_text(finding.meaning)}</small></summary>"
        f'{about}<ul class="places">{"".join(places)}</ul></details>'
    )


def _panels(report: AuditReport) -> Iterable[str]:
    statistics = report.statistics
    limit = report.config.dataset.max_length
    over = statistics.whole.too_long
    points = ", ".join(f"{share:.0%} ≤ {statistics.length_at(share):,}" for share in (0.5, 0.9, 0.99, 1.0))
    if statistics.lengths:
        words = f"{points}; {over:,} are longer than dataset.max_length={limit:,}"
        yield _panel("Length in tokens", _histogram(length_bars(statistics.lengths, limit), limit), words)
    if rows := source_rows(report):
        yield _panel("Sources", _table(("", *SOURCE_COLUMNS), [rows]))
    if statistics.fitting:
        policy = report.config.dataset.too_long
        words = f"dataset.too_long={policy.value}; held-out conversations: {policy.of_heldout.value}"
        yield _panel("Fitting to max_length", _table(("", *FITTING_COLUMNS), [fitting_rows(statistics)]), words)
    yield _panel("Tokens", _tokens(report))
    groups = [
        [[name, *tally_cells(tally)] for name, tally in group]
        for group in (
            statistics.by_source().items(),
            statistics.by_language.items(),
            [(f"rounds: {name}", tally) for name, tally in by_rounds(statistics)],
            [("all", statistics.whole)],
        )
    ]
    yield _panel("Sources, languages, rounds", _table(("", *TALLY_COLUMNS), groups))
    parts = [
        [words, f"{tally.conversations:,}", f"{tally.tokens:,}", f"{tally.too_long:,}"]
        for name, words in PART_NAMES.items()
        if (tally := statistics.by_part.get(name)) is not None
    ]
    words = f"{statistics.heldout_turns_compared:,} held-out user turns were compared with those of training"
    yield _panel("Split", _table(("part", "conversations", "tokens", "too long"), [parts]), words)
    tools = most_called(statistics, report.config.audit.tools)
    words = (
        f"{len(statistics.tools_offered):,} tools offered, {len(statistics.tools_called):,} called; a conversation "
        f"offers {mean(statistics.offered_per_conversation):.1f} and calls {mean(statistics.called_per_conversation):.1f}"
    )
    rows = [[name[:60], f"{calls:,}", f"{offers:,}"] for name, calls, offers in tools]
    yield _panel("Tools", _table(("most called", "requests", "offered in"), [rows]), words)
    if report.audit.rejections:
        rows = [[reason, f"{count:,}"] for reason, count in report.audit.rejections.most_common()]
        yield _panel("Set aside in reading", _table(("reason", "rows"), [rows]), "each of them in rejected.jsonl")


def _tokens(report: AuditReport) -> str:
    statistics = report.statistics
    whole = max(statistics.whole.tokens, 1)
    strips, rows = [], []
    for kind in Kind:
        tokens = statistics.tokens_by_kind[kind]
        share = tokens / whole
        strips.append(f'<i style="width:{100 * share:.2f}%;background:{_COLOURS[kind]}" title="{kind.name}"></i>')
        fate = "trained" if kind in TRAINED_KINDS else "masked"
        each = tokens / max(statistics.whole.conversations, 1)
        rows.append([kind.name, f"{tokens:,}", f"{share:.1%}", fate, f"{each:,.1f}"])
    table = _table(("kind", "tokens", "share", "", "per conversation"), [rows])
    return f'<div class="share">{"".join(strips)}</div>{table}'


def _histogram(bars: Sequence[tuple[int, int, int]], limit: int) -> str:
    """Bars of equal width; the last stands for everything longer."""
    width = limit / BARS_UP_TO_LIMIT
    highest = max(count for _, _, count in bars)
    x = linear_scale([0.0, float(len(bars) * width)], "tokens of a conversation (the last bar: and more)")
    y = linear_scale([0.0, float(highest)], "conversations")
    plot = Plot(x, y, width=560, height=280)
    _, base = plot.at(0, 0)
    for number, (start, stop, count) in enumerate(bars):
        left, top = plot.at(number * width, count)
        right, _ = plot.at((number + 1) * width, count)
        if count:
            kind = "bar over" if start > limit else "bar"
            box = f'x="{left + 0.5:.1f}" y="{top}" width="{right - left - 1:.1f}" height="{max(base - top, 1):.1f}"'
            plot.parts.append(f'<rect class="{kind}" {box}><title>{start:,} – {stop:,}: {count:,}</title></rect>')
    edge, _ = plot.at(limit, 0)
    plot.parts.append(f'<path class="limit" d="M{edge},12V{base}"/>')
    return plot.svg()


def _conversation(seen: Seen, codes: Sequence[str], anchor: str, part: str, text: TokenText) -> str:
    conversation, example = seen.conversation, seen.example
    share = example.trained_tokens / max(len(example), 1)
    facts = (
        f"{conversation.origin} · {conversation.language} · {conversation.rounds} rounds "
        f"· {len(conversation.tool_calls)} calls · {len(example):,} tokens, {example.trained_tokens:,} trained ({share:.0%}) "
        f"· {PART_NAMES[part]}"
    )
    found = f" <code>{_text(' '.join(codes))}</code>" if codes else ""
    return (
        f'<details class="conversation" id="{anchor}"><summary>{_text(conversation.id)} <small>{_text(facts)}</small>'
        f"{found}</summary>{''.join(map(_run, labelled_runs(seen, text)))}</details>"
    )


def _run(run: Run) -> str:
    if run.trained:
        body = "".join(f"<u>{_text(piece)}</u>" for piece, _ in run.pieces)
    else:
        body = _text("".join(piece for piece, _ in run.pieces))
    return (
        f'<div class="run k-{run.kind.name}{" on" if run.trained else ""}"><b>{run.title}</b><span>{body}</span></div>'
    )


def _panel(heading: str, body: str, words: str = "") -> str:
    below = f"<p><small>{_text(words)}</small></p>" if words else ""
    return f'<section class="panel"><h3>{_text(heading)}</h3>{body}{below}</section>'


def _table(header: Sequence[str], groups: Iterable[Sequence[Sequence[str]]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    bodies = "".join(
        "<tbody>"
        + "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
        + "</tbody>"
        for rows in groups
    )
    return f"<table><thead><tr>{head}</tr></thead>{bodies}</table>"


def _text(text: str) -> str:
    return escape(visible(text))
