"""Write an audit as one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agentft.audits.checks import Seen
from agentft.audits.findings import Finding
from agentft.audits.report import (
    BARS_UP_TO_LIMIT,
    FITTING_COLUMNS,
    PART_NAMES,
    SOURCE_COLUMNS,
    TALLY_COLUMNS,
    AuditReport,
    by_rounds,
    extent,
    fitting_rows,
    labelled_runs,
    length_bars,
    mean,
    most_called,
    place,
    source_rows,
    tally_cells,
)
from agentft.comparison.render import Drawing, Plot, linear_scale, render_page
from agentft.data.render import TRAINED_KINDS, SpanKind
from agentft.data.text_ids import TokenText


def html_page(report: AuditReport, text: TokenText) -> str:
    """Return the page: what the terminal says, and conversations to open, token by token."""
    config = report.config
    shown = report.audit.shown()
    anchors = {name: f"c{number}" for number, name in enumerate(shown)}
    return render_page(
        "audit",
        title=f"Audit of {config.dataset.name} for {config.model.name}",
        files=", ".join(report.read.files[:8]),
        headline=report.headline(),
        verdict=report.verdict(),
        failed=bool(report.failing),
        findings=[_finding(finding, report, anchors) for finding in report.audit.findings.all()],
        panels=_panels(report),
        shown=f"{len(shown)} of {report.statistics.whole.conversations:,}",
        conversations=(
            _conversation(seen, codes, anchors[name], report.audit.part_of(name), text)
            for name, (seen, codes) in shown.items()
        ),
    )


def _finding(finding: Finding, report: AuditReport, anchors: dict[str, str]) -> dict[str, Any]:
    topics = ", ".join(f"{topic[:60]} {count:,}" for topic, count in finding.topics.most_common(8))
    return {
        "level": report.level_of(finding),
        "code": finding.code,
        "extent": extent(finding),
        "meaning": finding.meaning,
        "failing": finding in report.failing,
        "topics": topics if len(finding.topics) > 1 else "",
        "examples": [
            {"place": place(example), "anchor": anchors.get(example.id or ""), "detail": example.detail}
            for example in finding.examples
        ],
    }


@dataclass(frozen=True, slots=True)
class _Panel:
    """A heading, and below it a chart, shares of all tokens, a table, a sentence: those of them that are given."""

    heading: str
    words: str = ""
    drawing: Drawing | None = None
    shares: Sequence[tuple[str, str]] = ()
    """Name and width of each kind of text."""
    header: Sequence[str] = ()
    groups: Iterable[Sequence[Sequence[str]]] = ()
    """Rows of the table, with a line between the groups."""


def _panels(report: AuditReport) -> Iterator[_Panel]:
    statistics = report.statistics
    limit = report.config.dataset.max_length
    over = statistics.whole.too_long
    points = ", ".join(f"{share:.0%} ≤ {statistics.length_at(share):,}" for share in (0.5, 0.9, 0.99, 1.0))
    if statistics.lengths:
        words = f"{points}; {over:,} are longer than dataset.max_length={limit:,}"
        yield _Panel("Length in tokens", words, _histogram(length_bars(statistics.lengths, limit), limit))
    if rows := source_rows(report):
        yield _Panel("Sources", header=("", *SOURCE_COLUMNS), groups=[rows])
    if statistics.fitting:
        policy = report.config.dataset.too_long
        words = f"dataset.too_long={policy.value}; held-out conversations: {policy.of_heldout.value}"
        yield _Panel("Fitting to max_length", words, header=("", *FITTING_COLUMNS), groups=[fitting_rows(statistics)])
    yield _tokens(report)
    groups = [
        [[name, *tally_cells(tally)] for name, tally in group]
        for group in (
            statistics.by_source().items(),
            statistics.by_language.items(),
            [(f"rounds: {name}", tally) for name, tally in by_rounds(statistics)],
            [("all", statistics.whole)],
        )
    ]
    yield _Panel("Sources, languages, rounds", header=("", *TALLY_COLUMNS), groups=groups)
    parts = [
        [words, f"{tally.conversations:,}", f"{tally.tokens:,}", f"{tally.too_long:,}"]
        for name, words in PART_NAMES.items()
        if (tally := statistics.by_part.get(name)) is not None
    ]
    words = f"{statistics.heldout_turns_compared:,} held-out user turns were compared with those of training"
    yield _Panel("Split", words, header=("part", "conversations", "tokens", "too long"), groups=[parts])
    tools = most_called(statistics, report.config.audit.tools)
    words = (
        f"{len(statistics.tools_offered):,} tools offered, {len(statistics.tools_called):,} called; a conversation "
        f"offers {mean(statistics.offered_per_conversation):.1f} and calls {mean(statistics.called_per_conversation):.1f}"
    )
    rows = [[name[:60], f"{calls:,}", f"{offers:,}"] for name, calls, offers in tools]
    yield _Panel("Tools", words, header=("most called", "requests", "offered in"), groups=[rows])
    if report.audit.rejections:
        rows = [[reason, f"{count:,}"] for reason, count in report.audit.rejections.most_common()]
        yield _Panel("Set aside in reading", "each of them in rejected.jsonl", header=("reason", "rows"), groups=[rows])


def _tokens(report: AuditReport) -> _Panel:
    statistics = report.statistics
    whole = max(statistics.whole.tokens, 1)
    shares, rows = [], []
    for kind in SpanKind:
        tokens = statistics.tokens_by_kind[kind]
        shares.append((kind.name, f"{100 * tokens / whole:.2f}%"))
        fate = "trained" if kind in TRAINED_KINDS else "masked"
        each = tokens / max(statistics.whole.conversations, 1)
        rows.append([kind.name, f"{tokens:,}", f"{tokens / whole:.1%}", fate, f"{each:,.1f}"])
    header = ("kind", "tokens", "share", "", "per conversation")
    return _Panel("Tokens", shares=shares, header=header, groups=[rows])


def _histogram(bars: Sequence[tuple[int, int, int]], limit: int) -> Plot:
    """Draw bars of equal width; the last stands for everything longer."""
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
            box = {"width": f"{right - left - 1:.1f}", "height": f"{max(base - top, 1):.1f}"}
            title = f"{start:,} – {stop:,}: {count:,}"
            plot.draw("rect", class_=kind, x=f"{left + 0.5:.1f}", y=top, **box, title=title)
    edge, _ = plot.at(limit, 0)
    plot.draw("path", class_="limit", d=f"M{edge},12V{base}")
    return plot


def _conversation(seen: Seen, codes: Sequence[str], anchor: str, part: str, text: TokenText) -> dict[str, Any]:
    conversation, example = seen.conversation, seen.example
    share = example.trained_tokens / max(len(example), 1)
    facts = (
        f"{conversation.origin} · {conversation.language} · {conversation.rounds} rounds "
        f"· {len(conversation.tool_calls)} calls · {len(example):,} tokens, {example.trained_tokens:,} trained ({share:.0%}) "
        f"· {PART_NAMES[part]}"
    )
    return {
        "id": conversation.id,
        "anchor": anchor,
        "facts": facts,
        "codes": " ".join(codes),
        "runs": labelled_runs(seen, text),
    }
