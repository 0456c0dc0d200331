"""Print the report of an audit, with conversations and their labels, and give the same as numbers."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.audits.checks import Audit, Fitting, GroupStats, Seen, Statistics
from agentft.audits.findings import CODES, Example, Finding, Level
from agentft.comparison.render import visible
from agentft.data.render import TRAINED_KINDS, SpanKind
from agentft.data.sources import ReadReport
from agentft.data.text_ids import TokenText
from agentft.data.tokens import IGNORE_INDEX
from agentft.data.truncation import TruncationKind
from agentft.recipes.config import AuditConfig

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: dict[SpanKind, tuple[str, str]] = {
    SpanKind.header: ("bright_black", "bright_black"),
    SpanKind.system: ("bright_black", "bright_black"),
    SpanKind.user: ("yellow", "yellow"),
    SpanKind.observation: ("magenta", "magenta"),
    SpanKind.reasoning: ("black on #d9c2f0", "black on #eadff7"),
    SpanKind.text: ("black on #8fc7ff", "black on #c4e2ff"),
    SpanKind.call: ("black on #7fd88f", "black on #b5ecc0"),
    SpanKind.frame: ("black on #d5e8d8", "black on #e6f3e8"),
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
    """A conversation as runs. Trained is what has a label; the kind is what the text under it is."""
    example = seen.example
    labelled = example.labels != IGNORE_INDEX
    kinds = text.kinds(example.input_ids, seen.segments)
    for span in example.spans:
        kinds[span.start : span.stop] = span.kind
    start = 0
    for stop in range(1, len(example) + 1):
        at_end = stop == len(example)
        if not at_end and (kinds[stop], labelled[stop]) == (kinds[start], labelled[start]):
            continue
        pieces = list(text.pieces(example.input_ids[start:stop]))
        yield Run(SpanKind(int(kinds[start])), bool(labelled[start]), start, pieces)
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


BARS_UP_TO_LIMIT = 12
"""Bars of the length histogram below `dataset.max_length`; as many may follow above it."""

_LEVEL_STYLE = {"fails": "bold red", "broken": "bold red", "warning": "yellow", "note": "cyan"}
PART_NAMES = {"train": "training", "heldout": "held out", "neither": "neither"}


@dataclass(frozen=True, slots=True)
class AuditReport:
    """An audit that is finished."""

    config: AuditConfig
    read: ReadReport
    audit: Audit
    output: Path
    seconds: float

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
            "set_aside": dict(self.audit.rejections.most_common()),
            "set_aside_in_fitting": dict(Counter(rejection.reason for rejection in self.audit.unfit).most_common()),
            "too_long": self.config.dataset.too_long.value,
            "fitting": {part: made.to_json() for part, made in statistics.fitting.items()},
            "in_neither_part": dict(self.audit.left_out),
            "sources_read": {
                name: dataclasses.asdict(count) | dict(statistics.shown_by_source.get(name, {}))
                for name, count in self.read.sources.items()
            },
            "notices": dict(self.read.notices.most_common()),
            "layout": dict(self.audit.layout.most_common()),
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
        """Where the rows went, in one line."""
        whole = self.statistics.whole
        # What is a finding of its own stands below.
        quirks = {code: count for code, count in self.read.notices.most_common() if code not in CODES}
        noted = ", ".join(f"{count:,} {code}" for code, count in quirks.items())
        otherwise = ", ".join(f"{count:,} {code}" for code, count in self.audit.layout.most_common())
        return (
            f"{self.read.rows:,} rows: {whole.conversations:,} conversations read, {whole.too_long:,} of them longer "
            f"than {self.config.dataset.max_length:,} tokens; {self.audit.rejections.total():,} set aside in reading, "
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
    borders = [number * max_length // BARS_UP_TO_LIMIT for number in range(2 * BARS_UP_TO_LIMIT)]
    counts = Counter(bisect_left(borders, length) - 1 for length in lengths)
    last = max(counts)
    stops = [*borders[1 : last + 1], max(max(lengths), borders[last] + 1)]
    return [(borders[number] + 1, stop, counts[number]) for number, stop in enumerate(stops)]


def most_called(statistics: Statistics, count: int) -> list[tuple[str, int, int]]:
    """(tool, requests, conversations that offer it), most called first."""
    return [(name, calls, statistics.tools_offered[name]) for name, calls in statistics.tools_called.most_common(count)]


TALLY_COLUMNS = ("conversations", "rounds", "calls", "results", "tokens", "trained", "too long")


def tally_cells(tally: GroupStats) -> list[str]:
    """A group of conversations as the cells below `TALLY_COLUMNS`."""
    counts = (tally.conversations, tally.rounds, tally.calls, tally.observations, tally.tokens)
    return [*(f"{count:,}" for count in counts), f"{tally.share_trained:.1%}", f"{tally.too_long:,}"]


SOURCE_COLUMNS = ("weight", "rows", "kept", "shown in an epoch", "held out")


def source_rows(report: AuditReport) -> list[list[str]]:
    """A row for each of several sources, cells below `SOURCE_COLUMNS`; none where there is one."""
    if len(report.read.sources) < 2:
        return []
    rows = []
    for name, count in report.read.sources.items():
        shown = report.statistics.shown_by_source.get(name, Counter())
        counts = (count.rows, count.kept, shown["train"], shown["heldout"])
        rows.append([name, f"{count.weight:g}", *(f"{each:,}" for each in counts)])
    return rows


FITTING_COLUMNS = ("training", "held out")


def fitting_rows(statistics: Statistics) -> list[list[str]]:
    """What becomes of the conversations of each part, and what comes of them; cells below a name and `FITTING_COLUMNS`."""
    parts = [statistics.fitting.get(part, Fitting()) for part in ("train", "heldout")]
    rows = [
        [outcome.value.replace("_", " "), *(f"{part.outcomes[outcome.value]:,}" for part in parts)]
        for outcome in TruncationKind
    ]
    rows.append(["examples made of them", *(f"{part.examples:,}" for part in parts)])
    rows.append(["their tokens", *(f"{part.tokens:,}" for part in parts)])
    rows.append(["trained", *(f"{part.trained / max(part.tokens, 1):.1%}" for part in parts)])
    rows.append(["steps kept", *(f"{part.steps_kept:,} of {part.steps:,}" for part in parts)])
    rows.append(["results shortened", *(f"{part.shortened_observations:,}" for part in parts)])
    return rows


def by_rounds(statistics: Statistics) -> list[tuple[str, GroupStats]]:
    """Groups by number of rounds, fewest first."""
    return sorted(statistics.by_rounds.items(), key=lambda item: int(item[0].split(" ", 1)[0].strip("(") or 0))


def extent(finding: Finding) -> str:
    """How often and in how many conversations; nothing for what concerns the dataset as a whole."""
    if finding.last is not None and finding.last.line == 0 and finding.count == 1:
        return ""
    each = f"{finding.conversations:,} conversation{'s' if finding.conversations != 1 else ''}"
    return each if finding.count == finding.conversations else f"{finding.count:,} in {each}"


def place(example: Example) -> str:
    """`file:line id`, as far as there is one."""
    return " ".join(([str(example.origin)] if example.origin.line else []) + ([example.id] if example.id else []))


def mean(counts: Counter[int]) -> float:
    """Mean of values that occur `counts` times each."""
    return sum(value * times for value, times in counts.items()) / max(counts.total(), 1)


def print_report(report: AuditReport, console: Console) -> None:
    """Print the whole report."""
    from rich.text import Text

    config = report.config
    console.rule(f"audit of {config.dataset.name} for {config.model.name} ({config.model.template})")
    console.print(visible(", ".join(report.read.files[:8]) or config.dataset.name))
    console.print(report.headline())
    _print_groups(report, console)
    _print_sources(report, console)
    _print_fitting(report, console)
    _print_tokens(report, console)
    _print_lengths(report, console)
    _print_tools(report, console)
    _print_set_aside(report, console)
    _print_findings(report, console)
    console.print(Text(report.verdict(), "bold red" if report.failing else "bold green"))
    page = " · audit.html" if config.audit.page else ""
    console.print(f"{report.output}: report.txt · audit.json · rejected.jsonl{page} · {report.seconds:.1f} s")


def _print_groups(report: AuditReport, console: Console) -> None:
    statistics = report.statistics
    table = _table("", *TALLY_COLUMNS)
    rounds = [(f"rounds: {name}", tally) for name, tally in by_rounds(statistics)]
    for group in (statistics.by_source().items(), statistics.by_language.items(), rounds, [("all", statistics.whole)]):
        for name, tally in group:
            table.add_row(visible(name), *tally_cells(tally))
        table.add_section()
    console.print(table)
    parts = _table("split", "conversations", "tokens", "too long")
    for name, words in PART_NAMES.items():
        if name in statistics.by_part:
            tally = statistics.by_part[name]
            parts.add_row(words, f"{tally.conversations:,}", f"{tally.tokens:,}", f"{tally.too_long:,}")
    console.print(parts)


def _print_sources(report: AuditReport, console: Console) -> None:
    if rows := source_rows(report):
        table = _table("source", *SOURCE_COLUMNS)
        for cells in rows:
            table.add_row(*map(visible, cells))
        console.print(table)


def _print_fitting(report: AuditReport, console: Console) -> None:
    dataset = report.config.dataset
    table = _table(f"fitting to {dataset.max_length:,}", *FITTING_COLUMNS)
    for cells in fitting_rows(report.statistics):
        table.add_row(*cells)
    console.print(table)
    console.print(
        f"dataset.too_long={dataset.too_long.value}; held-out conversations: {dataset.too_long.of_heldout.value}"
        + "".join(f"; in neither part: {count:,} {reason}" for reason, count in report.audit.left_out.items())
    )


def _print_tokens(report: AuditReport, console: Console) -> None:
    statistics = report.statistics
    table = _table("tokens", "count", "share", "", "per conversation")
    whole = max(statistics.whole.tokens, 1)
    for kind in SpanKind:
        tokens = statistics.tokens_by_kind[kind]
        fate = "trained" if kind in TRAINED_KINDS else "masked"
        each = tokens / max(statistics.whole.conversations, 1)
        table.add_row(kind.name, f"{tokens:,}", f"{tokens / whole:.1%}", fate, f"{each:,.1f}")
    console.print(table)


def _print_lengths(report: AuditReport, console: Console) -> None:
    limit = report.config.dataset.max_length
    bars = length_bars(report.statistics.lengths, limit)
    highest = max((count for _, _, count in bars), default=1)
    table = _table("length in tokens", "conversations", "")
    table.columns[2].justify = "left"
    for start, stop, count in bars:
        over = start > limit
        bar = ("▒" if over else "█") * round(40 * count / highest) or ("▏" if count else "")
        table.add_row(f"{start:,} – {stop:,}", f"{count:,}", bar, style="red" if over else None)
    console.print(table)
    points = ", ".join(f"{s:.0%} ≤ {report.statistics.length_at(s):,}" for s in (0.5, 0.9, 0.99, 1.0))
    longer = report.statistics.whole.too_long
    console.print(f"{points}; dataset.max_length is {limit:,}, {longer:,} conversations are longer (▒)")


def _print_tools(report: AuditReport, console: Console) -> None:
    statistics = report.statistics
    offered, called = statistics.offered_per_conversation, statistics.called_per_conversation
    console.print(
        f"{len(statistics.tools_offered):,} tools offered, {len(statistics.tools_called):,} called; per conversation "
        f"{mean(offered):.1f} offered (most {max(offered, default=0)}), {mean(called):.1f} called "
        f"(most {max(called, default=0)}); {called[0]:,} conversations call none"
    )
    table = _table("most called", "requests", "offered in")
    for name, calls, offers in most_called(statistics, report.config.audit.tools):
        table.add_row(visible(name)[:60], f"{calls:,}", f"{offers:,}")
    if table.row_count:
        console.print(table)


def _print_set_aside(report: AuditReport, console: Console) -> None:
    if not report.audit.rejections:
        return
    table = _table("set aside", "rows")
    for reason, count in report.audit.rejections.most_common():
        table.add_row(reason, f"{count:,}")
    console.print(table)


def _print_findings(report: AuditReport, console: Console) -> None:
    from rich.text import Text

    for finding in report.audit.findings.all():
        level = report.level_of(finding)
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


def _table(first: str, *others: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table
