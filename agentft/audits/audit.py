"""Audit a dataset: prepare it as a training run would, look at every conversation, report; nothing is trained or loaded.

Of a conversation that was looked at counts, digests and a small sample stay; the texts lie on the disk.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from agentft.audits.checks import Problem, check_calls, check_turns, trace_labels
from agentft.audits.findings import Findings
from agentft.audits.overlap import ConversationIndex
from agentft.audits.report import AuditReport, html_page, print_conversation, print_report
from agentft.data.config import DatasetConfig
from agentft.data.conversation import Conversation, Origin
from agentft.data.prepare import Preparation, look_at_every_conversation
from agentft.data.records import Rejection
from agentft.data.render import MsagentTemplate, SpanKind
from agentft.data.sources import ReadReport, open_rows, read_conversations
from agentft.data.template_choice import Layout, stop_tokens
from agentft.data.tokens import Example, SegmentEncoder, TokenText
from agentft.data.truncation import Rendered, TruncationKind, make_examples
from agentft.errors import DataError
from agentft.model.load import load_chat_tokenizer
from agentft.recipes.config import AuditConfig, AuditOptions

_WIDTH = 120
"""Columns of a report that does not go to a terminal."""

_MAX_SOURCES = 40
"""Id prefixes above which they are no sources but names; files count instead."""

_MAX_SHOWN_TOKENS = 20_000
"""A longer conversation is no example to look at."""

_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9]*(?=[-_:/.])")

_OF_REJECTIONS = {"duplicate": "duplicate", "observation_without_call": "exec_without_call"}
_OF_NOTICES = {"duplicate_id_renamed": "duplicate_id"}
"""What the reader has found already -> its code here."""


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What an audit came to."""

    passed: bool
    findings: int
    """Codes that make it fail."""
    output: Path | None
    """Folder of the report; None for a view, which writes nothing."""


def audit(config: AuditConfig) -> AuditResult:
    """Audit a dataset, or show one conversation of it.

    Raises:
        DataError: a source cannot be read, or has no conversation `view`.
        ConfigError, ModelError: the settings contradict each other, or the tokenizer cannot be loaded.
    """
    started = time.perf_counter()
    chat = load_chat_tokenizer(config.model)
    layout, encoder, text = chat.template, chat.encoder, TokenText(chat.tokenizer)
    if config.view is not None:
        seen = _find(config.dataset, config.view, layout, encoder, text)
        print_conversation(seen, text, _screen(), max_length=config.dataset.max_length)
        return AuditResult(True, 0, None)
    looked = look_at_every_conversation(
        config.dataset,
        layout,
        encoder,
        lambda data, encoder: Audit(config.dataset, config.audit, data, layout, text).look(encoder),
    )
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    report = AuditReport(config, looked, output, time.perf_counter() - started)
    # utf-8 whatever the terminal: a report must not fail at the words it reports.
    with (output / "report.txt").open("w", encoding="utf-8", errors="backslashreplace") as file:
        for target in (_screen(), Console(file=file, width=_WIDTH, markup=False, emoji=False, highlight=False)):
            print_report(report, target)
    _write(output / "rejected.jsonl", looked.data.account.rejected_lines())
    _write(output / "audit.json", json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n")
    if config.audit.page:
        _write(output / "audit.html", html_page(report, text))
    return AuditResult(not report.failing, len(report.failing), output)


def _find(config: DatasetConfig, wanted: str, layout: Layout, encoder: SegmentEncoder, text: TokenText) -> Seen:
    """Read until the conversation of that id comes, and tokenise it."""
    read = ReadReport()
    rows = open_rows(config, read)
    for source in (rows.train, rows.heldout or ()):
        for item in read_conversations(source, form=rows.form, reasoning=config.reasoning, report=read):
            if item.id != wanted:
                continue
            if isinstance(item, Rejection):
                raise DataError(f"view={wanted}: {item.origin}: set aside, {item.reason}: {item.detail}")
            (made,) = make_examples([item], layout, encoder)
            return Seen.of(made, text)
    raise DataError(
        f"view={wanted}: none of {read.rows:,} conversations has that id; a report names ids beside file:line"
    )


def _screen() -> Console:
    # The dataset's words are shown as they are: no markup, no emoji codes.
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ  # rich reads it
    return Console(width=None if wide else _WIDTH, markup=False, emoji=False, highlight=False)


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


@dataclass(frozen=True, slots=True)
class Seen:
    """A conversation as a whole, whatever its length, with its tokens; of several examples the longest."""

    conversation: Conversation
    example: Example
    kinds: np.ndarray[tuple[int], np.dtype[np.int8]]
    """Shape [T]. Of a trained token its span's, of another that of the segment it begins in."""
    part: str = "neither"

    @classmethod
    def of(cls, made: Rendered, text: TokenText, part: str | None = None) -> Seen:
        """Return the longest example, an empty one where the layout cannot hold the conversation."""
        part = part or "neither"
        if not made.pieces:
            empty = Example(made.conversation.id, np.zeros(0, dtype=np.int32), ())
            return cls(made.conversation, empty, np.zeros(0, dtype=np.int8), part)
        longest = max(made.pieces, key=lambda piece: len(piece.example))
        kinds = text.kinds(longest.example.input_ids, longest.segments)
        for span in longest.example.spans:
            kinds[span.start : span.stop] = span.kind
        return cls(made.conversation, longest.example, kinds, part)


@dataclass(slots=True)
class GroupStats:
    """Sums over a group of conversations."""

    conversations: int = 0
    rounds: int = 0
    calls: int = 0
    observations: int = 0
    tokens: int = 0
    trained: int = 0
    too_long: int = 0

    @property
    def share_trained(self) -> float:
        return self.trained / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class Fitting:
    """What fitting to `dataset.max_length` makes of the conversations of one part."""

    outcomes: dict[str, int] = field(default_factory=dict)
    """Conversations by `agentft.data.truncation.TruncationKind`."""
    examples: int = 0
    tokens: int = 0
    """Of the examples."""
    trained: int = 0
    """Labelled tokens of the examples."""
    steps: int = 0
    """What the agents say, step by step, in all conversations of the part."""
    steps_left_out: int = 0
    shortened_observations: int = 0


@dataclass(slots=True)
class RewrittenHistory:
    """Conversations that are several examples, since the chat template rewrites their history; before fitting."""

    conversations: int = 0
    examples: int = 0
    tokens: int = 0
    tokens_of_the_longest: int = 0
    """Of the longest example of each: what one rendering would cost."""

    def add(self, lengths: Sequence[int]) -> None:
        """Count the examples of one conversation."""
        if len(lengths) > 1:
            self.conversations += 1
            self.examples += len(lengths)
            self.tokens += sum(lengths)
            self.tokens_of_the_longest += max(lengths)


@dataclass(slots=True)
class Statistics:
    """What a dataset holds."""

    whole: GroupStats = field(default_factory=GroupStats)
    by_prefix: dict[str, GroupStats] = field(default_factory=dict)
    by_file: dict[str, GroupStats] = field(default_factory=dict)
    by_language: dict[str, GroupStats] = field(default_factory=dict)
    by_rounds: dict[str, GroupStats] = field(default_factory=dict)
    by_part: dict[str, GroupStats] = field(default_factory=dict)
    """`train`, `heldout` and `neither`."""
    tokens_by_kind: Counter[SpanKind] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("I"))
    """Tokens of each conversation."""
    tools_called: Counter[str] = field(default_factory=Counter)
    tools_offered: Counter[str] = field(default_factory=Counter)
    offered_per_conversation: Counter[int] = field(default_factory=Counter)
    called_per_conversation: Counter[int] = field(default_factory=Counter)
    steps: int = 0
    fitting: dict[str, Fitting] = field(default_factory=dict)
    """For `train` and `heldout`, where the part is not empty."""
    rewritten_history: RewrittenHistory = field(default_factory=RewrittenHistory)
    heldout_turns_compared: int = 0

    def by_source(self) -> dict[str, GroupStats]:
        """Return groups by id prefix where ids have few of them, else by file; commonest first."""
        few = 1 < len(self.by_prefix) <= _MAX_SOURCES
        groups = self.by_prefix if few or len(self.by_file) == 1 else self.by_file
        return dict(sorted(groups.items(), key=lambda item: -item[1].conversations))

    def length_at(self, share: float) -> int:
        """Return the tokens that `share` of the conversations do not exceed."""
        return int(np.quantile(self.lengths, share, method="inverted_cdf")) if self.lengths else 0


class Audit:
    """Statistics, findings and a sample of conversations to look at."""

    def __init__(
        self, config: DatasetConfig, options: AuditOptions, data: Preparation, layout: Layout, text: TokenText
    ) -> None:
        """Take prepared data, whose examples are in `layout`."""
        self.data = data
        self.statistics = Statistics()
        self.findings = Findings(options.examples)
        self._config, self._options = config, options
        self._layout = layout
        self._text = text
        self._stop_token = stop_tokens(layout)[0]
        self._index = ConversationIndex()
        self._steps: Counter[str] = Counter()
        """By part."""
        self._sample: list[tuple[int, int, Seen]] = []
        self._exemplary: dict[str, Seen] = {}
        """Code -> the conversation of its first example."""

    @property
    def unfit(self) -> list[Rejection]:
        """Conversations that fitting sets aside: those after the ones that reading does."""
        return self.data.account.rejections[self.data.account.read.rejected.total() :]

    def look(self, encoder: SegmentEncoder) -> Audit:
        """Look at every conversation, then at all of them together."""
        for number, made in enumerate(make_examples(self.data.conversations, self._layout, encoder)):
            self.statistics.rewritten_history.add([len(piece.example) for piece in made.pieces])
            self._look_at(number, Seen.of(made, self._text, self.data.entries[number].part))
        self._note_what_reading_found()
        for reason in self.data.empty_parts:
            self.findings.add("empty_part", Origin("split", 0), None, reason)
        statistics, data = self.statistics, self.data
        statistics.heldout_turns_compared = self._index.compare(
            data.conversations, [entry.part for entry in data.entries], self.findings, self._options.similarity
        )
        statistics.fitting = {part: self._fitting(part) for part, outcomes in data.account.fitted.items() if outcomes}
        return self

    def shown(self) -> dict[str, tuple[Seen, list[str]]]:
        """Return conversations to look at by id, each with the codes it is an example of; sample last."""
        kept: dict[str, tuple[Seen, list[str]]] = {}
        for code, seen in self._exemplary.items():
            kept.setdefault(seen.conversation.id, (seen, []))[1].append(code)
        for _, _, seen in sorted(self._sample, key=lambda entry: -entry[0]):
            kept.setdefault(seen.conversation.id, (seen, []))
        return kept

    def _look_at(self, number: int, seen: Seen) -> None:
        self._count(seen)
        self._index.add(seen.conversation)
        self._keep_in_sample(number, seen)
        problems = [*check_turns(seen.conversation), *check_calls(seen.conversation)]
        if (problem := self._trace(number, seen)) is not None:
            problems.append(problem)
        if len(seen.example) > self._config.max_length:
            problems.append(self._too_long(number, seen))
        for problem in problems:
            self._add(problem, seen)

    def _trace(self, number: int, seen: Seen) -> Problem | None:
        """Follow the labels of all examples made of a conversation back to the record."""
        if not seen.example.spans:
            if not all(message.trained for message in seen.conversation.messages):
                return None  # as its source wants it: counted as `untrained_step`, set aside in fitting
            return Problem("no_label", "no token of this conversation has a label")
        problems = (
            trace_labels(
                conversation,
                example.input_ids,
                example.labels,
                self._text,
                stop_token=self._stop_token,
                verbatim=isinstance(self._layout, MsagentTemplate),
                context_rounds=example.context_rounds,
            )
            for conversation, example in self.data.made_of(self.data.entries[number])
        )
        return next((problem for problem in problems if problem is not None), None)

    def _too_long(self, number: int, seen: Seen) -> Problem:
        detail = f"{len(seen.example):,} tokens, dataset.max_length is {self._config.max_length:,}"
        result = self.data.entries[number].result
        if result is None:
            return Problem("too_long", f"{detail}; in neither part", seen.part)
        kind = str(result.kind)
        made = f"split into {len(result.rows)}" if result.kind is TruncationKind.spread else kind
        return Problem("too_long", f"{detail}; {'in training' if seen.part == 'train' else 'held out'}: {made}", kind)

    def _add(self, problem: Problem, seen: Seen) -> None:
        conversation = seen.conversation
        kept = self.findings.add(
            problem.code, conversation.origin, conversation.id, problem.detail, topic=problem.topic
        )
        if kept and problem.code not in self._exemplary and len(seen.example) <= _MAX_SHOWN_TOKENS:
            self._exemplary[problem.code] = seen

    def _count(self, seen: Seen) -> None:
        conversation, length = seen.conversation, len(seen.example)
        names = [call.name for call in conversation.tool_calls]
        results = sum(message.role == "tool" for message in conversation.messages)
        malformed = sum(len(message.malformed_calls) for message in conversation.messages)
        found = _PREFIX.match(conversation.id)
        statistics = self.statistics
        groups = (
            (statistics.by_prefix, found[0] if found else "(no prefix)"),
            (statistics.by_file, conversation.origin.source),
            (statistics.by_language, conversation.language),
            (statistics.by_rounds, str(conversation.rounds) if conversation.rounds < 10 else "10 and more"),
            (statistics.by_part, seen.part),
        )
        tallies = [statistics.whole]
        for group, key in groups:
            if key not in group and len(group) >= 10 * _MAX_SOURCES:
                key = "(others)"
            tallies.append(group.setdefault(key, GroupStats()))
        for tally in tallies:
            tally.conversations += 1
            tally.rounds += conversation.rounds
            tally.calls += len(names) + malformed
            tally.observations += results
            tally.tokens += length
            tally.trained += seen.example.trained_tokens
            tally.too_long += length > self._config.max_length
        statistics.lengths.append(length)
        steps = len(seen.example.steps())
        statistics.steps += steps
        self._steps[seen.part] += steps
        counts = np.bincount(seen.kinds, minlength=len(SpanKind)).tolist()
        statistics.tokens_by_kind.update({kind: counts[kind] for kind in SpanKind})
        statistics.tools_called.update(names)
        statistics.tools_offered.update({tool.name for tool in conversation.offered})
        statistics.offered_per_conversation[len(conversation.offered)] += 1
        statistics.called_per_conversation[len(set(names))] += 1

    def _keep_in_sample(self, number: int, seen: Seen) -> None:
        """Keep the conversations with the smallest content hashes: a fair sample, and the same one every time."""
        size = self._options.sample
        if size == 0 or len(seen.example) > _MAX_SHOWN_TOKENS:
            return
        entry = (-int(seen.conversation.content_hash[:15], 16), number, seen)
        if len(self._sample) < size:
            heapq.heappush(self._sample, entry)
        elif entry > self._sample[0]:
            heapq.heapreplace(self._sample, entry)

    def _note_what_reading_found(self) -> None:
        account = self.data.account
        for rejection in account.rejections:
            if code := _OF_REJECTIONS.get(rejection.reason):
                self.findings.add(code, rejection.origin, rejection.id, rejection.detail)
        for notice_code, code in _OF_NOTICES.items():
            for notice in account.read.notices_shown.get(notice_code, []):
                self.findings.add(code, notice.origin, None, notice.detail)
            # The reader keeps the first few notices only, but counts all: one a conversation.
            finding = self.findings[code]
            finding.count = finding.conversations = account.read.notices[notice_code]
        rows, allowed = account.read.rows, self._config.max_rejected
        if rows and account.lost / rows > allowed:
            share = f"{account.lost:,} of {rows:,} rows ({account.lost / rows:.1%})"
            detail = f"{share}, dataset.max_rejected={allowed} allows {allowed:.1%}"
            self.findings.add("too_many_set_aside", Origin("dataset", 0), None, detail)

    def _fitting(self, part: str) -> Fitting:
        account, examples = self.data.account, self.data.examples(part)
        changes = [change for change in account.changed if change["part"] == part]
        return Fitting(
            dict(account.fitted[part]),
            len(examples),
            int(examples.lengths.sum()),
            examples.trained_tokens,
            self._steps[part],
            sum(len(change["steps_left_out"]) for change in changes),
            sum(change["shortened_observations"] for change in changes),
        )
