"""Report an audit: in the terminal, as numbers, and as one HTML page that needs no network."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.audits.findings import CODES, Example, Finding, Level
from agentft.comparison.render import Plot, linear_scale, render_page, visible
from agentft.data.entries import policy_of
from agentft.data.render import TRAINED_KINDS, SpanKind
from agentft.data.sources import ReadReport
from agentft.data.tokens import IGNORE_INDEX, TokenText
from agentft.data.truncation import TruncationKind
from agentft.recipes.config import AuditConfig

if TYPE_CHECKING:
    from rich.console import Console

    from agentft.audits.audit import Audit, Fitting, GroupStats, Seen, Statistics

_STYLES: dict[SpanKind, tuple[str, str]] = {
    SpanKind.header: ("bright_black", "bright_black"),
    SpanKind.system: ("bright_black", "bright_black"),
    SpanKind.user: ("yellow", "yellow"),
    SpanKind.observation: ("magenta", "magenta"),
    SpanKind.reasoning: ("black on #d9c2f0", "black on #eadff7"),
    SpanKind.text: ("black on #8fc7ff", "black on #c4e2ff"),
    SpanKind.call: ("black on #7fd88f", "black on #b5ecc0"),
    SpanKind.call_syntax: ("black on #d5e8d8", "black on #e6f3e8"),
    SpanKind.stop: ("white on #c04040", "white on #c04040"),
}
"""Kind -> styles of its tokens, in turn, so that the borders of trained tokens can be seen."""


@dataclass(slots=True)
class Run:
    """Neighbouring tokens of one kind and one fate."""

    kind: SpanKind
    trained: bool
    start: int
    """Position of the first token."""
    pieces: list[tuple[str, int]] = field(default_factory=list)
    """Text and number of tokens: one token each, several where they share a character."""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.pieces)

    @property
    def title(self) -> str:
        """`+call 34`: trained or not, what it is, how many tokens."""
        return f"{'+' if self.trained else '-'}{self.kind.name} {self.tokens}"


def labelled_runs(seen: Seen, text: TokenText) -> Iterator[Run]:
    """Yield a conversation as runs. Trained is what has a label; the kind is what the text under it is."""
    ids, kinds, labelled = seen.example.input_ids, seen.kinds, seen.example.labels != IGNORE_INDEX
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop < len(ids) and (kinds[stop], labelled[stop]) == (kinds[start], labelled[start]):
            continue
        yield Run(SpanKind(int(kinds[start])), bool(labelled[start]), start, list(text.pieces(ids[start:stop])))
        start = stop


def print_conversation(seen: Seen, text: TokenText, console: Console, *, max_length: int) -> None:
    """Print every token, the trained ones on colour, with a margin that says the same in words."""
    from rich.table import Table
    from rich.text import Text

    conversation, example = seen.conversation, seen.example
    table = Table(show_header=False, box=None, padding=(0, 1), expand=True)
    table.add_column(justify="right", no_wrap=True, width=17)
    table.add_column(overflow="fold", ratio=1)
    trained = 0
    for run in labelled_runs(seen, text):
        line = Text()
        for number, (piece, _) in enumerate(run.pieces):
            shown = visible(piece).replace("\n", "⏎\n") if run.trained else visible(piece)
            line.append(shown, _STYLES[run.kind][number % 2] if run.trained else _STYLES[run.kind][0])
        trained += run.tokens if run.trained else 0
        table.add_row(Text(run.title, "bold" if run.trained else "bright_black"), line)
    console.print(f"{visible(conversation.id)}  {conversation.origin}", style="bold")
    console.print(table)
    length = len(example)
    over = f", over dataset.max_length={max_length}" if length > max_length else ""
    console.print(
        f"{length:,} tokens{over}, {trained:,} trained ({trained / max(length, 1):.0%}); {len(example.steps())} steps; "
        "+ is trained, - is masked"
    )


_BARS_UP_TO_LIMIT = 12
"""Bars of the length histogram below `dataset.max_length`; as many may follow above it."""

_LEVEL_STYLE = {"fails": "bold red", "broken": "bold red", "warning": "yellow", "note": "cyan"}
_PART_NAMES = {"train": "training", "heldout": "held out", "neither": "neither"}


@dataclass(frozen=True, slots=True)
class AuditReport:
    """An audit that is finished."""

    config: AuditConfig
    audit: Audit
    output: Path
    seconds: float

    @property
    def read(self) -> ReadReport:
        return self.audit.data.account.read

    @property
    def statistics(self) -> Statistics:
        return self.audit.statistics

    @property
    def failing(self) -> list[Finding]:
        """The findings that make the audit fail."""
        return self.audit.findings.failing(self.config.audit.fail_on)

    @property
    def kept_share(self) -> float:
        """Share of the rows that a training run could use."""
        kept = self.statistics.whole.conversations - len(self.audit.unfit)
        return kept / self.read.rows if self.read.rows else 0.0

    def shown_of(self, source: str) -> dict[str, int]:
        """Return the conversations of a source by part, in training as often as an epoch shows them."""
        return {part: counts[source] for part, counts in self.audit.data.account.by_source.items()}

    def level_of(self, finding: Finding) -> str:
        """`broken`, `fails` (chosen by `audit.fail_on`), `warning` or `note`."""
        chosen = finding.code in self.config.audit.fail_on and finding.level is not Level.broken
        return "fails" if chosen else finding.level.value

    def to_json(self) -> dict[str, Any]:
        """Every number of the report."""
        statistics = self.statistics
        return {
            "model": self.config.model.name,
            "dataset": self.config.dataset.name,
            "max_length": self.config.dataset.max_length,
            "seconds": round(self.seconds, 3),
            "rows": self.read.rows,
            "files": self.read.files,
            "blank_lines": self.read.blank_lines,
            "kept_share": self.kept_share,
            "set_aside": dict(self.read.rejected.most_common()),
            "set_aside_in_fitting": dict(Counter(rejection.reason for rejection in self.audit.unfit).most_common()),
            "too_long": self.config.dataset.too_long.value,
            "fitting": {part: dataclasses.asdict(made) for part, made in statistics.fitting.items()},
            "rewritten_history": dataclasses.asdict(statistics.rewritten_history),
            "in_neither_part": dict(self.audit.data.account.left_out),
            "sources_read": {
                name: dataclasses.asdict(count) | self.shown_of(name) for name, count in self.read.sources.items()
            },
            "notices": dict(self.read.notices.most_common()),
            "layout": dict(self.audit.data.account.layout.most_common()),
            "whole": dataclasses.asdict(statistics.whole),
            **{
                name: {key: dataclasses.asdict(tally) for key, tally in groups.items()}
                for name, groups in (
                    ("sources", statistics.by_source()),
                    ("files_read", statistics.by_file),
                    ("languages", statistics.by_language),
                    ("rounds", statistics.by_rounds),
                    ("parts", statistics.by_part),
                )
            },
            "steps": statistics.steps,
            "tokens": {kind.name: statistics.tokens_by_kind[kind] for kind in SpanKind},
            "lengths": {f"p{share:g}": statistics.length_at(share / 100) for share in (0, 5, 25, 50, 75, 95, 99, 100)},
            "tools_called": dict(statistics.tools_called.most_common(1000)),
            "tools_offered": len(statistics.tools_offered),
            "passed": not self.failing,
            "findings": [
                {
                    "code": finding.code,
                    "level": self.level_of(finding),
                    "meaning": finding.meaning,
                    "count": finding.count,
                    "conversations": finding.conversations,
                    "topics": dict(finding.topics.most_common(50)),
                    "examples": [
                        {"source": e.origin.source, "line": e.origin.line, "id": e.id, "detail": e.detail}
                        for e in finding.examples
                    ],
                }
                for finding in self.audit.findings.all()
            ],
        }

    def headline(self) -> str:
        """Return where the rows went, in one line."""
        whole = self.statistics.whole
        # What is a finding of its own stands below.
        quirks = {code: count for code, count in self.read.notices.most_common() if code not in CODES}
        noted = ", ".join(f"{count:,} {code}" for code, count in quirks.items())
        otherwise = ", ".join(f"{count:,} {code}" for code, count in self.audit.data.account.layout.most_common())
        return (
            f"{self.read.rows:,} rows: {whole.conversations:,} conversations read, {whole.too_long:,} of them longer "
            f"than {self.config.dataset.max_length:,} tokens; {self.read.rejected.total():,} set aside in reading, "
            f"{len(self.audit.unfit):,} in fitting. "
            f"{whole.tokens:,} tokens, {whole.trained:,} trained ({whole.share_trained:.1%}), in {self.seconds:.1f} s"
            + (f". Read with a notice: {noted}" if noted else "")
            + (f". Written otherwise by the layout: {otherwise}" if otherwise else "")
        )

    def verdict(self) -> str:
        """Passed or not, and why."""
        if not self.failing:
            if untraced := self.audit.findings["label_untraced"].conversations:
                return f"passed, but the labels of {untraced:,} conversations could not be traced to their records"
            return "passed: every label is on the agent's own words, and the parts of the split share no user side"
        return "failed: " + ", ".join(
            finding.code + (f" ({found})" if (found := extent(finding)) else "") for finding in self.failing
        )


def length_bars(lengths: Sequence[int], max_length: int) -> list[tuple[int, int, int]]:
    """(from, to, conversations) of a histogram with a border at `max_length`; the last bar holds all that is longer."""
    if not lengths:
        return []
    borders = [number * max_length // _BARS_UP_TO_LIMIT for number in range(2 * _BARS_UP_TO_LIMIT)]
    counts = Counter(bisect_left(borders, length) - 1 for length in lengths)
    last = max(counts)
    stops = [*borders[1 : last + 1], max(max(lengths), borders[last] + 1)]
    return [(borders[number] + 1, stop, counts[number]) for number, stop in enumerate(stops)]


def extent(finding: Finding) -> str:
    """Return how often and in how many conversations; nothing for what concerns the dataset as a whole."""
    if finding.last is not None and finding.last.line == 0 and finding.count == 1:
        return ""
    each = f"{finding.conversations:,} conversation{'s' if finding.conversations != 1 else ''}"
    return each if finding.count == finding.conversations else f"{finding.count:,} in {each}"


def place(example: Example) -> str:
    """`file:line id`, as far as there is one."""
    return " ".join(([str(example.origin)] if example.origin.line else []) + ([example.id] if example.id else []))


@dataclass(frozen=True, slots=True)
class Panel:
    """A heading, and below it a chart, shares of all tokens, a table, a sentence: those of them that are given."""

    heading: str
    words: str = ""
    bars: Sequence[tuple[int, int, int]] = ()
    """As `length_bars` returns them."""
    drawing: Plot | None = None
    shares: Sequence[tuple[str, str]] = ()
    """Name and width of each kind of text."""
    header: Sequence[str] = ()
    groups: Iterable[Sequence[Sequence[str]]] = ()
    """Rows of the table, with a line between the groups."""


def panels(report: AuditReport) -> Iterator[Panel]:
    """Yield what a dataset holds, one subject after the other."""
    statistics, account = report.statistics, report.audit.data.account
    if statistics.lengths:
        yield _lengths(statistics, report.config.dataset.max_length)
    if len(report.read.sources) > 1:
        rows = [
            [name, f"{count.weight:g}", f"{count.rows:,}", f"{count.kept:,}"]
            + [f"{report.shown_of(name).get(part, 0):,}" for part in ("train", "heldout")]
            for name, count in report.read.sources.items()
        ]
        yield Panel("Sources", header=("", "weight", "rows", "kept", "shown in an epoch", "held out"), groups=[rows])
    if statistics.fitting:
        policy = report.config.dataset.too_long
        words = f"dataset.too_long={policy.value}; held-out conversations: {policy_of('heldout', policy).value}"
        words += "".join(f"; in neither part: {count:,} {reason}" for reason, count in account.left_out.items())
        rows = _fitting_rows([statistics.fitting.get(part) for part in ("train", "heldout")])
        yield Panel("Fitting to max_length", words, header=("", "training", "held out"), groups=[rows])
    if (cost := statistics.rewritten_history).conversations:
        words = (
            f"The chat template rewrites history: {cost.conversations:,} conversations are {cost.examples:,} examples with "
            f"{cost.tokens:,} tokens, {cost.tokens / cost.tokens_of_the_longest:.1f} x those of one rendering of each; "
            "bounded by model.rewritten_history=stable or dataset.reasoning=drop"
        )
        yield Panel("Rewritten history", words)
    yield _tokens(statistics)
    by_rounds = sorted(statistics.by_rounds.items(), key=lambda item: int(item[0].split(" ", 1)[0].strip("(") or 0))
    groups = [
        [[name, *_cells(tally)] for name, tally in group]
        for group in (
            statistics.by_source().items(),
            statistics.by_language.items(),
            [(f"rounds: {name}", tally) for name, tally in by_rounds],
            [("all", statistics.whole)],
        )
    ]
    header = ("", "conversations", "rounds", "calls", "results", "tokens", "trained", "too long")
    yield Panel("Sources, languages, rounds", header=header, groups=groups)
    rows = [
        [words, f"{tally.conversations:,}", f"{tally.tokens:,}", f"{tally.too_long:,}"]
        for name, words in _PART_NAMES.items()
        if (tally := statistics.by_part.get(name)) is not None
    ]
    words = f"{statistics.heldout_turns_compared:,} held-out user turns were compared with those of training"
    yield Panel("Split", words, header=("part", "conversations", "tokens", "too long"), groups=[rows])
    words = (
        f"{len(statistics.tools_offered):,} tools offered, {len(statistics.tools_called):,} called; a conversation "
        f"offers {_mean(statistics.offered_per_conversation):.1f} and calls {_mean(statistics.called_per_conversation):.1f}"
    )
    most_called = statistics.tools_called.most_common(report.config.audit.tools)
    rows = [[name[:60], f"{calls:,}", f"{statistics.tools_offered[name]:,}"] for name, calls in most_called]
    yield Panel("Tools", words, header=("most called", "requests", "offered in"), groups=[rows])
    if report.read.rejected:
        rows = [[reason, f"{count:,}"] for reason, count in report.read.rejected.most_common()]
        yield Panel("Set aside in reading", "each of them in rejected.jsonl", header=("reason", "rows"), groups=[rows])


def _lengths(statistics: Statistics, limit: int) -> Panel:
    """Return a histogram of equal bars; the last stands for everything longer."""
    bars = length_bars(statistics.lengths, limit)
    points = ", ".join(f"{share:.0%} ≤ {statistics.length_at(share):,}" for share in (0.5, 0.9, 0.99, 1.0))
    words = f"{points}; {statistics.whole.too_long:,} are longer than dataset.max_length={limit:,}"
    width = limit / _BARS_UP_TO_LIMIT
    x = linear_scale([0.0, float(len(bars) * width)], "tokens of a conversation (the last bar: and more)")
    y = linear_scale([0.0, float(max(count for _, _, count in bars))], "conversations")
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
    return Panel("Length in tokens", words, bars, plot)


def _fitting_rows(parts: Sequence[Fitting | None]) -> list[list[str]]:
    """Return what becomes of the conversations of each part, and what comes of them: a name, and a cell for each part."""
    rows = {
        outcome.value.replace("_", " "): [f"{part.outcomes.get(outcome.value, 0):,}" if part else "0" for part in parts]
        for outcome in TruncationKind
    }
    rows["examples made of them"] = [f"{part.examples:,}" if part else "0" for part in parts]
    rows["their tokens"] = [f"{part.tokens:,}" if part else "0" for part in parts]
    rows["trained"] = [f"{part.trained / max(part.tokens, 1):.1%}" if part else "0.0%" for part in parts]
    rows["steps kept"] = [
        f"{part.steps - part.steps_left_out:,} of {part.steps:,}" if part else "0 of 0" for part in parts
    ]
    rows["results shortened"] = [f"{part.shortened_observations:,}" if part else "0" for part in parts]
    return [[name, *cells] for name, cells in rows.items()]


def _tokens(statistics: Statistics) -> Panel:
    whole, conversations = max(statistics.whole.tokens, 1), max(statistics.whole.conversations, 1)
    counts = [(kind, statistics.tokens_by_kind[kind]) for kind in SpanKind]
    rows = [
        [kind.name, f"{tokens:,}", f"{tokens / whole:.1%}"]
        + ["trained" if kind in TRAINED_KINDS else "masked", f"{tokens / conversations:,.1f}"]
        for kind, tokens in counts
    ]
    shares = [(kind.name, f"{100 * tokens / whole:.2f}%") for kind, tokens in counts]
    return Panel("Tokens", shares=shares, header=("kind", "tokens", "share", "", "per conversation"), groups=[rows])


def _cells(tally: GroupStats) -> list[str]:
    counts = (tally.conversations, tally.rounds, tally.calls, tally.observations, tally.tokens)
    return [*(f"{count:,}" for count in counts), f"{tally.share_trained:.1%}", f"{tally.too_long:,}"]


def _mean(counts: Counter[int]) -> float:
    """Return the mean of values that occur `counts` times each."""
    return sum(value * times for value, times in counts.items()) / max(counts.total(), 1)


def print_report(report: AuditReport, console: Console) -> None:
    """Print the whole report."""
    from rich.text import Text

    config = report.config
    console.rule(f"audit of {config.dataset.name} for {config.model.name} ({config.model.template})")
    console.print(visible(", ".join(report.read.files[:8]) or config.dataset.name))
    console.print(report.headline())
    for panel in panels(report):
        _print_panel(panel, config.dataset.max_length, console)
    for finding in report.audit.findings.all():
        _print_finding(finding, report.level_of(finding), console)
    console.print(Text(report.verdict(), "bold red" if report.failing else "bold green"))
    page = " · audit.html" if config.audit.page else ""
    console.print(f"{report.output}: report.txt · audit.json · rejected.jsonl{page} · {report.seconds:.1f} s")


def _print_panel(panel: Panel, limit: int, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(panel.heading, style="bold")
    if panel.header or panel.bars:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        first, *others = panel.header or ("from – to", "conversations", "")
        table.add_column(first, overflow="fold")
        for name in others:
            table.add_column(name, justify="right" if name else "left")
        for rows in panel.groups:
            for row in rows:
                table.add_row(*map(visible, row))
            table.add_section()
        highest = max((count for _, _, count in panel.bars), default=1)
        for start, stop, count in panel.bars:
            over = start > limit
            bar = ("▒" if over else "█") * round(40 * count / highest) or ("▏" if count else "")
            table.add_row(f"{start:,} – {stop:,}", f"{count:,}", bar, style="red" if over else None)
        console.print(table)
    if panel.words:
        console.print(visible(panel.words))


def _print_finding(finding: Finding, level: str, console: Console) -> None:
    from rich.text import Text

    line = Text()
    line.append(f"{level:<8}", _LEVEL_STYLE[level])
    line.append(finding.code, "bold")
    line.append(f"  {found}: {finding.meaning}" if (found := extent(finding)) else f"  {finding.meaning}")
    console.print(line)
    topics = ", ".join(f"{visible(topic)[:60]} {count:,}" for topic, count in finding.topics.most_common(5))
    if len(finding.topics) > 1:
        more = f", … {len(finding.topics):,} in all" if len(finding.topics) > 5 else ""
        console.print(Text(f"        by topic: {topics}{more}", "bright_black"))
    for example in finding.examples:
        words = ": ".join(part for part in (place(example), example.detail) if part)
        console.print(Text(visible(f"        {words}")), soft_wrap=True)


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
        panels=panels(report),
        shown=f"{len(shown)} of {report.statistics.whole.conversations:,}",
        conversations=(
            {
                "id": name,
                "anchor": anchors[name],
                "facts": _facts(seen),
                "codes": " ".join(codes),
                "runs": labelled_runs(seen, text),
            }
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


def _facts(seen: Seen) -> str:
    conversation, example = seen.conversation, seen.example
    share = example.trained_tokens / max(len(example), 1)
    return (
        f"{conversation.origin} · {conversation.language} · {conversation.rounds} rounds "
        f"· {len(conversation.tool_calls)} calls · {len(example):,} tokens, {example.trained_tokens:,} trained ({share:.0%}) "
        f"· {_PART_NAMES[seen.part]}"
    )
