"""Report an audit: in the terminal, as numbers, and as one HTML page that needs no network."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.audits.checks import CODES, Finding, Level
from agentft.comparison.render import render_page, visible
from agentft.data.entries import policy_of
from agentft.data.render import TRAINED_KINDS, SpanKind
from agentft.data.sources import PreparationStats
from agentft.data.tokens import IGNORE_INDEX, TokenText
from agentft.data.truncation import TruncationKind
from agentft.recipes.config import AuditConfig

if TYPE_CHECKING:
    from rich.console import Console

    from agentft.audits.audit import Audit, Seen, Statistics, Sums

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

_BARS_UP_TO_LIMIT = 12
"""Bars of the length histogram below `dataset.max_length`; as many may follow above it."""

_MOST_CALLED = 15
"""Tools that are listed."""

_LEVEL_STYLE = {"fails": "bold red", "broken": "bold red", "warning": "yellow", "note": "cyan"}
_PART_NAMES = {"train": "training", "heldout": "held out", "neither": "neither"}


# --- One conversation ---


@dataclass(slots=True)
class Run:
    """Neighbouring tokens of one kind and one fate."""

    kind: SpanKind
    trained: bool
    pieces: list[tuple[str, int]]
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
        if stop == len(ids) or (kinds[stop], labelled[stop]) != (kinds[start], labelled[start]):
            yield Run(SpanKind(int(kinds[start])), bool(labelled[start]), list(text.pieces(ids[start:stop])))
            start = stop


def print_conversation(seen: Seen, text: TokenText, console: Console, *, max_length: int) -> None:
    """Print every token, the trained ones on colour, with a margin that says the same in words."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 1), expand=True)
    table.add_column(justify="right", no_wrap=True, width=17)
    table.add_column(overflow="fold", ratio=1)
    for run in labelled_runs(seen, text):
        line = Text()
        for number, (piece, _) in enumerate(run.pieces):
            shown = visible(piece).replace("\n", "⏎\n") if run.trained else visible(piece)
            line.append(shown, _STYLES[run.kind][number % 2 if run.trained else 0])
        table.add_row(Text(run.title, "bold" if run.trained else "bright_black"), line)
    console.print(f"{visible(seen.conversation.id)}  {seen.conversation.origin}", style="bold")
    console.print(table)
    length, trained = len(seen.example), seen.example.trained_tokens
    over = f", over dataset.max_length={max_length}" if length > max_length else ""
    console.print(
        f"{length:,} tokens{over}, {trained:,} trained ({trained / max(length, 1):.0%}); {len(seen.example.steps())} "
        "steps; + is trained, - is masked"
    )


# --- The whole dataset ---


@dataclass(frozen=True, slots=True)
class AuditReport:
    """An audit that is finished."""

    config: AuditConfig
    audit: Audit
    output: Path
    seconds: float

    @property
    def stats(self) -> PreparationStats:
        return self.audit.data.stats

    @property
    def failing(self) -> list[Finding]:
        """The findings that make the audit fail: broken invariants, and the codes that the user chose."""
        chosen = self.config.audit.fail_on
        return [finding for finding in self.audit.found if finding.level is Level.broken or finding.code in chosen]

    def level_of(self, finding: Finding) -> str:
        """Return `broken`, `fails` (chosen by `audit.fail_on`), `warning` or `note`."""
        chosen = finding.code in self.config.audit.fail_on and finding.level is not Level.broken
        return "fails" if chosen else finding.level.value

    def to_json(self) -> dict[str, Any]:
        """Return every number of the report."""
        config, stats, statistics = self.config, self.stats, self.audit.statistics
        kept = statistics.whole["conversations"] - len(self.audit.unfit)
        return {
            "model": config.model.name,
            "dataset": config.dataset.name,
            "max_length": config.dataset.max_length,
            "seconds": round(self.seconds, 3),
            "rows": stats.rows,
            "files": stats.files,
            "blank_lines": stats.blank_lines,
            "kept_share": kept / stats.rows if stats.rows else 0.0,
            "set_aside": dict(stats.rejected.most_common()),
            "set_aside_in_fitting": dict(Counter(rejection.reason for rejection in self.audit.unfit).most_common()),
            "too_long": config.dataset.too_long.value,
            "fitting": statistics.fitting,
            "rewritten_history": statistics.rewritten_history,
            "in_neither_part": dict(stats.left_out),
            "sources_read": stats.sources,
            "notices": dict(stats.notices.most_common()),
            "layout": dict(stats.layout.most_common()),
            "whole": statistics.whole,
            **statistics.groups,
            "steps": statistics.steps.total(),
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
                        {"source": origin.source, "line": origin.line, "id": name, "detail": detail}
                        for origin, name, detail in finding.examples
                    ],
                }
                for finding in self.audit.found
            ],
        }

    def headline(self) -> str:
        """Return where the rows went, in one line."""
        whole = self.audit.statistics.whole
        # What is a finding of its own stands below.
        quirks = Counter({code: count for code, count in self.stats.notices.items() if code not in CODES})
        notes = (("Read with a notice", quirks), ("Written otherwise by the layout", self.stats.layout))
        return (
            f"{self.stats.rows:,} rows: {whole['conversations']:,} conversations read, {whole['too_long']:,} of them longer "
            f"than {self.config.dataset.max_length:,} tokens; {self.stats.rejected.total():,} set aside in reading, "
            f"{len(self.audit.unfit):,} in fitting. "
            f"{whole['tokens']:,} tokens, {whole['trained']:,} trained ({_share(whole)}), in {self.seconds:.1f} s"
        ) + "".join(
            f". {words}: " + ", ".join(f"{count:,} {code}" for code, count in counts.most_common())
            for words, counts in notes
            if counts
        )

    def verdict(self) -> str:
        """Return passed or not, and why."""
        if not self.failing:
            if untraced := self.audit.findings["label_untraced"].conversations:
                return f"passed, but the labels of {untraced:,} conversations could not be traced to their records"
            return "passed: every label is on the agent's own words, and the parts of the split share no user side"
        return "failed: " + ", ".join(
            finding.code + (f" ({finding.extent})" if finding.extent else "") for finding in self.failing
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


@dataclass(frozen=True, slots=True)
class Panel:
    """A heading, and below it shares of all tokens, a table, a sentence: those of them that are given."""

    heading: str
    words: str = ""
    header: Sequence[str] = ()
    groups: Iterable[Iterable[Sequence[object]]] = ()
    """Rows of the table, with a line between the groups."""
    shares: Sequence[tuple[str, str]] = ()
    """Name and width of each kind of text."""

    def table(self) -> Iterator[list[list[str]]]:
        """Yield the groups of rows as they are shown: 1,000 for a whole number."""
        for rows in self.groups:
            yield [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]


def panels(report: AuditReport) -> Iterator[Panel]:
    """Yield what a dataset holds, one subject after the other."""
    statistics, stats, config = report.audit.statistics, report.audit.data.stats, report.config.dataset
    whole, groups = statistics.whole, statistics.groups
    if statistics.lengths:
        bars = length_bars(statistics.lengths, config.max_length)
        highest = max(count for _, _, count in bars)
        points = ", ".join(f"{share:.0%} ≤ {statistics.length_at(share):,}" for share in (0.5, 0.9, 0.99, 1.0))
        words = f"{points}; {whole['too_long']:,} are longer than dataset.max_length={config.max_length:,}"
        rows = [
            [f"{a:,} – {b:,}", count, ("▒" if a > config.max_length else "█") * math.ceil(40 * count / highest)]
            for a, b, count in bars
        ]
        yield Panel("Length in tokens", words, ("from – to", "conversations", ""), [rows])
    if len(report.stats.sources) > 1:
        numbers = ((name, source.values()) for name, source in report.stats.sources.items())
        rows = [[name, f"{weight:g}", *map(int, counts)] for name, (weight, *counts) in numbers]
        yield Panel("Sources", "", ("", "weight", "rows", "kept", "shown in an epoch", "held out"), [rows])
    if statistics.fitting:
        words = f"dataset.too_long={config.too_long.value}; held-out conversations: "
        words += policy_of("heldout", config.too_long).value
        words += "".join(f"; in neither part: {count:,} {reason}" for reason, count in stats.left_out.items())
        parts = [_fitting(statistics.fitting.get(part)) for part in ("train", "heldout")]
        rows = [[name, *(part[name] for part in parts)] for name in parts[0]]
        yield Panel("Fitting to max_length", words, ("", "training", "held out"), [rows])
    if (cost := statistics.rewritten_history)["conversations"]:
        words = (
            f"The chat template rewrites history: {cost['conversations']:,} conversations are {cost['examples']:,} examples "
            f"with {cost['tokens']:,} tokens, {cost['tokens'] / cost['tokens_of_the_longest']:.1f} x those of one rendering "
            "of each; bounded by model.rewritten_history=stable or dataset.reasoning=drop"
        )
        yield Panel("Rewritten history", words)
    yield _tokens(statistics)
    by_rounds = sorted(groups["rounds"].items(), key=lambda item: int(item[0].split()[0]))
    listed = (
        groups["files_read"],
        groups["languages"],
        {f"rounds: {name}": sums for name, sums in by_rounds},
        {"all": whole},
    )
    names = ("conversations", "rounds", "calls", "observations", "tokens")
    table = [
        [[name, *(sums[each] for each in names), _share(sums), sums["too_long"]] for name, sums in group.items()]
        for group in listed
    ]
    header = ("", "conversations", "rounds", "calls", "results", "tokens", "trained", "too long")
    yield Panel("Files, languages, rounds", "", header, table)
    rows = [
        [words, sums["conversations"], sums["tokens"], sums["too_long"]]
        for name, words in _PART_NAMES.items()
        if (sums := groups["parts"].get(name)) is not None
    ]
    words = f"{statistics.heldout_turns_compared:,} held-out user turns were compared with those of training"
    yield Panel("Split", words, ("part", "conversations", "tokens", "too long"), [rows])
    called, offered, count = statistics.tools_called, statistics.tools_offered, max(whole["conversations"], 1)
    words = (
        f"{len(offered):,} tools offered, {len(called):,} called; a conversation offers {offered.total() / count:.1f} and "
        f"makes {called.total() / count:.1f} calls"
    )
    rows = [[name[:60], calls, offered[name]] for name, calls in called.most_common(_MOST_CALLED)]
    yield Panel("Tools", words, ("most called", "requests", "offered in"), [rows])
    if report.stats.rejected:
        rows = [list(each) for each in report.stats.rejected.most_common()]
        yield Panel("Set aside in reading", "each of them in rejected.jsonl", ("reason", "rows"), [rows])


def _fitting(part: dict[str, Any] | None) -> dict[str, object]:
    """Return what becomes of the conversations of a part, and what comes of them."""
    made: Any = Counter() if part is None else part
    outcomes = {} if part is None else part["outcomes"]
    return {
        **{outcome.value.replace("_", " "): outcomes.get(outcome.value, 0) for outcome in TruncationKind},
        "examples made of them": made["examples"],
        "their tokens": made["tokens"],
        "trained": _share(made),
        "steps kept": f"{made['steps'] - made['steps_left_out']:,} of {made['steps']:,}",
        "results shortened": made["shortened_observations"],
    }


def _tokens(statistics: Statistics) -> Panel:
    whole, conversations = max(statistics.whole["tokens"], 1), max(statistics.whole["conversations"], 1)
    rows = []
    for kind in SpanKind:
        tokens, fate = statistics.tokens_by_kind[kind], "trained" if kind in TRAINED_KINDS else "masked"
        rows.append([kind.name, tokens, f"{tokens / whole:.1%}", fate, f"{tokens / conversations:,.1f}"])
    shares = [(kind.name, f"{100 * statistics.tokens_by_kind[kind] / whole:.2f}%") for kind in SpanKind]
    return Panel("Tokens", "", ("kind", "tokens", "share", "", "per conversation"), [rows], shares=shares)


def _share(sums: Sums) -> str:
    """Return the trained share of tokens."""
    return f"{sums['trained'] / max(sums['tokens'], 1):.1%}"


def print_report(report: AuditReport, console: Console) -> None:
    """Print the whole report."""
    from rich.text import Text

    config = report.config
    console.rule(f"audit of {config.dataset.name} for {config.model.name} ({config.model.template})")
    console.print(visible(", ".join(report.stats.files[:8]) or config.dataset.name))
    console.print(report.headline())
    for panel in panels(report):
        _print_panel(panel, console)
    for finding in report.audit.found:
        level = report.level_of(finding)
        meaning = f"  {finding.extent}: {finding.meaning}" if finding.extent else f"  {finding.meaning}"
        console.print(Text.assemble((f"{level:<8}", _LEVEL_STYLE[level]), (finding.code, "bold"), meaning))
        if topics := finding.commonest:
            console.print(Text(visible(f"        by topic: {topics}"), "bright_black"))
        for example in finding.examples:
            words = ": ".join(part for part in (example.place, example.detail) if part)
            console.print(Text(visible(f"        {words}")), soft_wrap=True)
    console.print(Text(report.verdict(), "bold red" if report.failing else "bold green"))
    page = " · audit.html" if config.audit.page else ""
    console.print(f"{report.output}: report.txt · audit.json · rejected.jsonl{page} · {report.seconds:.1f} s")


def _print_panel(panel: Panel, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(panel.heading, style="bold")
    if panel.header:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for number, name in enumerate(panel.header):
            table.add_column(name, justify="right" if number and name else "left", overflow="fold")
        for rows in panel.table():
            for row in rows:
                table.add_row(*map(visible, row))
            table.add_section()
        console.print(table)
    if panel.words:
        console.print(visible(panel.words))


def html_page(report: AuditReport, text: TokenText) -> str:
    """Return the page: what the terminal says, and conversations to open, token by token."""
    config, shown = report.config, report.audit.shown()
    anchors = {name: f"c{number}" for number, name in enumerate(shown)}
    return render_page(
        "audit",
        title=f"Audit of {config.dataset.name} for {config.model.name}",
        report=report,
        files=", ".join(report.stats.files[:8]),
        anchors=anchors,
        panels=panels(report),
        shown=f"{len(shown)} of {report.audit.statistics.whole['conversations']:,}",
        conversations=(
            {"id": name, "anchor": anchors[name], "facts": _facts(seen), "codes": " ".join(codes)}
            | {"runs": labelled_runs(seen, text)}
            for name, (seen, codes) in shown.items()
        ),
    )


def _facts(seen: Seen) -> str:
    conversation, example = seen.conversation, seen.example
    share = example.trained_tokens / max(len(example), 1)
    return (
        f"{conversation.origin} · {conversation.language} · {conversation.rounds} rounds "
        f"· {len(conversation.tool_calls)} calls · {len(example):,} tokens, {example.trained_tokens:,} trained ({share:.0%}) "
        f"· {_PART_NAMES[seen.part]}"
    )
