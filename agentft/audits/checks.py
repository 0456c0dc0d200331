"""Check a dataset as a whole before anything is trained on it.

`Audit` takes conversations one at a time, keeps counts, digests and a small sample, and lets the texts go: its memory
grows by about a kilobyte a conversation. `finish` settles what only the whole can tell: duplicates and the split.
"""

from __future__ import annotations

import heapq
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any

import numpy as np

from agentft.audits.findings import Findings
from agentft.audits.label_trace import LabelProblem, trace_labels
from agentft.audits.overlap import ConversationIndex
from agentft.audits.tool_schemas import check_request
from agentft.data.config import DatasetConfig
from agentft.data.conversation import Conversation, Message, Origin
from agentft.data.grammar import Call
from agentft.data.records import Rejection
from agentft.data.render import Segment, SpanKind
from agentft.data.sources import ReadReport, bounded_code
from agentft.data.text_ids import TokenText
from agentft.data.tokens import IGNORE_INDEX, Example
from agentft.data.truncation import TruncationKind, TruncationResult

_MAX_SOURCES = 40
"""Id prefixes above which they are no sources but names; files count instead."""

_MAX_SHOWN_TOKENS = 20_000
"""A longer conversation is no example to look at."""

_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9]*(?=[-_:/.])")

_OF_REJECTIONS = {"duplicate": "duplicate", "observation_without_call": "exec_without_call"}
_OF_NOTICES = {"duplicate_id_renamed": "duplicate_id"}
"""What the reader has found already -> its code here."""


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


@dataclass(frozen=True, slots=True)
class Seen:
    """A conversation kept to be looked at, with its tokens."""

    conversation: Conversation
    segments: tuple[Segment, ...]
    example: Example


@dataclass(slots=True)
class Statistics:
    """What a dataset holds."""

    whole: GroupStats = field(default_factory=GroupStats)
    by_prefix: dict[str, GroupStats] = field(default_factory=dict)
    by_file: dict[str, GroupStats] = field(default_factory=dict)
    by_language: dict[str, GroupStats] = field(default_factory=dict)
    by_rounds: dict[str, GroupStats] = field(default_factory=dict)
    by_part: dict[str, GroupStats] = field(default_factory=dict)
    """`train`, `heldout` and `neither`, as a training run would divide."""
    tokens_by_kind: Counter[SpanKind] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("I"))
    """Tokens of each conversation."""
    tools_called: Counter[str] = field(default_factory=Counter)
    tools_offered: Counter[str] = field(default_factory=Counter)
    offered_per_conversation: Counter[int] = field(default_factory=Counter)
    called_per_conversation: Counter[int] = field(default_factory=Counter)
    steps: int = 0
    fitting: dict[str, Fitting] = field(default_factory=dict)
    """`train` and `heldout`: what fitting to `dataset.max_length` makes of them, as a training run would."""
    shown_by_source: dict[str, Counter[str]] = field(default_factory=dict)
    """Source as it was given -> part -> conversations, in training as often as an epoch shows them."""
    heldout_turns_compared: int = 0

    def by_source(self) -> dict[str, GroupStats]:
        """By id prefix where ids have few of them, else by file; commonest first."""
        few = 1 < len(self.by_prefix) <= _MAX_SOURCES
        return _by_size(self.by_prefix if few or len(self.by_file) == 1 else self.by_file)

    def length_at(self, share: float) -> int:
        """Tokens that `share` of the conversations do not exceed."""
        return int(np.quantile(self.lengths, share, method="inverted_cdf")) if self.lengths else 0


class Audit:
    """Collects statistics, findings and a sample of conversations to look at."""

    def __init__(
        self, config: DatasetConfig, text: TokenText, *, stop_token: str, verbatim: bool, examples: int, sample: int
    ) -> None:
        """Start an audit.

        Args:
            verbatim: as in `trace_labels`: the template keeps the agent's words letter by letter.
            examples: places kept for each finding.
            sample: conversations kept to look at, besides the first of each finding.
        """
        self.statistics = Statistics()
        self.findings = Findings(examples)
        self.rejections: Counter[str] = Counter()
        self.layout: Counter[str] = Counter()
        """What the layout writes otherwise than the source."""
        self._config = config
        self._text = text
        self._stop_token = stop_token
        self._verbatim = verbatim
        self._ledger = ConversationIndex()
        self._fits = FitAccount()
        self.unfit: list[Rejection] = []
        """Conversations that fitting sets aside; known when the audit is finished."""
        self._sample_size = sample
        self._sample: list[tuple[int, int, Seen]] = []
        self._exemplary: dict[str, Seen] = {}
        """Code -> the conversation of its first example."""

    def reject(self, rejection: Rejection) -> None:
        """Take note of a row that was set aside."""
        self.rejections[rejection.reason] += 1
        if rejection.reason in _OF_REJECTIONS:
            self.findings.add(_OF_REJECTIONS[rejection.reason], rejection.origin, rejection.id, rejection.detail)

    def add(self, seen: Seen, *, fitted: TruncationResult, as_heldout: TruncationResult, heldout: bool) -> None:
        """Take in one conversation.

        Args:
            seen: The conversation as a whole, whatever its length.
            fitted: What training would make of it.
            as_heldout: What the held-out part would.
            heldout: It comes from the held-out source of two.
        """
        conversation, example = seen.conversation, seen.example
        for code in fitted.notes:
            self.layout[bounded_code(code, self.layout)] += 1
        trained = int((example.labels != IGNORE_INDEX).sum())
        self._count(conversation, seen, trained)
        self._check_turns(seen)
        self._check_calls(seen)
        self._check_tools(seen)
        for number, message in enumerate(conversation.messages, 1):
            if not message.trained:
                self._find("untrained_step", seen, f"message {number}")
        if (problem := self._trace(fitted, trained)) is not None:
            self._find(problem.code, seen, problem.detail)
        self._ledger.add(conversation, heldout=heldout)
        self._fits.add(
            tokens=len(example), trained=trained, steps=len(example.steps()), train=fitted, heldout=as_heldout
        )
        self._keep_in_sample(seen)
        if len(example) > self._config.max_length:
            made = {TruncationKind.spread: f"split into {len(fitted.pieces)}"}.get(fitted.outcome, str(fitted.outcome))
            detail = f"{len(example):,} tokens, dataset.max_length is {self._config.max_length:,}; in training: {made}"
            self._find("too_long", seen, detail, topic=made.split(" into")[0])

    def _trace(self, fitted: TruncationResult, trained: int) -> LabelProblem | None:
        """Follow the labels that training would see back to the record: those of all examples made of it."""
        if not trained:
            if not all(message.trained for message in fitted.original.messages):
                return None  # as its source wants it: counted as `untrained_step`, set aside in fitting
            return LabelProblem("no_label", "no token of this conversation has a label")
        for piece in fitted.pieces:
            problem = trace_labels(
                piece.conversation,
                piece.example.input_ids,
                piece.example.labels,
                self._text,
                stop_token=self._stop_token,
                verbatim=self._verbatim,
                context_rounds=piece.example.context_rounds,
            )
            if problem is not None:
                return problem
        return None

    def finish(self, report: ReadReport, *, separate: bool, similarity: float) -> None:
        """Settle duplicates, split and losses; `separate`: the held-out part had a source of its own."""
        for notice_code, code in _OF_NOTICES.items():
            for notice in report.notices_shown.get(notice_code, []):
                self.findings.add(code, notice.origin, None, notice.detail)
            # The reader keeps the first few notices only, but counts all: one a conversation.
            finding = self.findings[code]
            finding.count = finding.conversations = report.notices[notice_code]
        config = self._config
        ledger = self._ledger
        ledger.assign_parts(
            self.findings, split=config.split, test_ratio=config.test_ratio, seed=config.seed, separate=separate
        )
        self._count_parts()
        self._count_fitting(report)
        ledger.find_duplicates(self.findings)
        self.statistics.heldout_turns_compared = ledger.find_near_duplicates(self.findings, similarity)
        self._check_losses(report.rows)

    @property
    def left_out(self) -> Counter[str]:
        """Usable conversations in neither part, by reason."""
        return self._ledger.left_out

    def part_of(self, name: str) -> str:
        """Where the split put the conversation of that id."""
        return self._ledger.part_of(self._ledger.ids.index(name))

    def shown(self) -> dict[str, tuple[Seen, list[str]]]:
        """Conversations to look at by id, each with the codes it is an example of; sample last."""
        kept: dict[str, tuple[Seen, list[str]]] = {}
        for code, seen in self._exemplary.items():
            kept.setdefault(seen.conversation.id, (seen, []))[1].append(code)
        for _, _, seen in sorted(self._sample, key=lambda entry: -entry[0]):
            kept.setdefault(seen.conversation.id, (seen, []))
        return kept

    def _find(self, code: str, seen: Seen, detail: str, *, topic: str = "") -> None:
        conversation = seen.conversation
        kept = self.findings.add(code, conversation.origin, conversation.id, detail, topic=topic)
        if kept and code not in self._exemplary and len(seen.example) <= _MAX_SHOWN_TOKENS:
            self._exemplary[code] = seen

    def _count(self, conversation: Conversation, seen: Seen, trained: int) -> None:
        observations = sum(message.role == "tool" for message in conversation.messages)
        names = [call.name for call in conversation.tool_calls]
        malformed = sum(len(message.malformed_calls) for message in conversation.messages)
        length = len(seen.example)
        too_long = length > self._config.max_length
        found = _PREFIX.match(conversation.id)
        statistics = self.statistics
        groups = (
            (statistics.by_prefix, found[0] if found else "(no prefix)"),
            (statistics.by_file, conversation.origin.source),
            (statistics.by_language, conversation.language),
            (statistics.by_rounds, str(conversation.rounds) if conversation.rounds < 10 else "10 and more"),
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
            tally.observations += observations
            tally.tokens += length
            tally.trained += trained
            tally.too_long += too_long
        statistics.lengths.append(length)
        statistics.steps += len(seen.example.steps())
        self._count_kinds(seen)
        statistics.tools_called.update(names)
        statistics.tools_offered.update({tool.name for tool in conversation.offered})
        statistics.offered_per_conversation[len(conversation.offered)] += 1
        statistics.called_per_conversation[len(set(names))] += 1

    def _count_kinds(self, seen: Seen) -> None:
        """Trained tokens by their spans, all others by the segment that they begin in."""
        example = seen.example
        kinds = self._text.kinds(example.input_ids, seen.segments)
        for span in example.spans:
            kinds[span.start : span.stop] = span.kind
        counts = np.bincount(kinds, minlength=len(SpanKind)).tolist()
        for kind in SpanKind:
            self.statistics.tokens_by_kind[kind] += counts[kind]

    def _check_turns(self, seen: Seen) -> None:
        messages = seen.conversation.messages
        for number, (message, after) in enumerate(zip_longest(messages, messages[1:]), 1):
            if after is not None and after.role != "user":
                continue
            if message.role == "tool":
                self._find("empty_summary", seen, f"message {number} is a tool result, and nothing is said on it")
            elif _ends_with_call(message):
                self._find("ends_with_call", seen, f"message {number} ends with a call")

    def _check_calls(self, seen: Seen) -> None:
        conversation = seen.conversation
        for malformed in (call for message in conversation.messages for call in message.malformed_calls):
            assert malformed.failure is not None
            reason = malformed.failure.reason
            self._find("unreadable_call", seen, f"{reason}: {malformed.failure.detail}", topic=reason)
        for call in conversation.tool_calls:
            for code, topic, detail in check_request(call, conversation.offered):
                self._find(code, seen, detail, topic=topic)

    def _check_tools(self, seen: Seen) -> None:
        for tool in seen.conversation.offered:
            if tool.problem:
                topic = tool.problem.partition(":")[0]
                self._find("flawed_tool_entry", seen, f"tool {tool.name[:60]!r}: {tool.problem}", topic=topic)

    def _keep_in_sample(self, seen: Seen) -> None:
        """The conversations with the smallest content hashes: a fair sample, and the same one every time."""
        if self._sample_size == 0 or len(seen.example) > _MAX_SHOWN_TOKENS:
            return
        entry = (-int(seen.conversation.content_hash[:15], 16), len(self._ledger), seen)
        if len(self._sample) < self._sample_size:
            heapq.heappush(self._sample, entry)
        elif entry > self._sample[0]:
            heapq.heapreplace(self._sample, entry)

    def _count_parts(self) -> None:
        lengths = self.statistics.lengths
        for index in range(len(self._ledger)):
            tally = self.statistics.by_part.setdefault(self._ledger.part_of(index), GroupStats())
            tally.conversations += 1
            tally.tokens += lengths[index]
            tally.too_long += lengths[index] > self._config.max_length

    def _count_fitting(self, report: ReadReport) -> None:
        """Sum up what fitting makes of each part, and list what it sets aside."""
        ledger, statistics = self._ledger, self.statistics
        for index in range(len(ledger)):
            part = ledger.part_of(index)
            times = 0 if part == "neither" else ledger.showings(index)
            if times:
                into = statistics.fitting.setdefault(part, Fitting())
                self._fits.count(index, into, heldout=part == "heldout", times=times)
            source = report.source_of(ledger.origin(index))
            statistics.shown_by_source.setdefault(source, Counter())[part] += times
        for index, as_heldout, (reason, detail) in self._fits.set_aside():
            if ledger.part_of(index) == ("heldout" if as_heldout else "train"):
                self.unfit.append(Rejection(ledger.origin(index), reason, detail, id=ledger.ids[index]))

    def _check_losses(self, rows: int) -> None:
        # As a training run counts: a repetition is no loss.
        lost = self.rejections.total() - self.rejections["duplicate"] + len(self.unfit)
        if rows and lost / rows > self._config.max_rejected:
            detail = (
                f"{lost:,} of {rows:,} rows ({lost / rows:.1%}), dataset.max_rejected={self._config.max_rejected} "
                f"allows {self._config.max_rejected:.1%}"
            )
            self.findings.add("too_many_set_aside", Origin("dataset", 0), None, detail)


def _ends_with_call(message: Message) -> bool:
    said = [part for part in message.source or () if part.source.strip()]
    return isinstance(said[-1], Call) if said else bool(message.tool_calls)


def _by_size(groups: dict[str, GroupStats]) -> dict[str, GroupStats]:
    return dict(sorted(groups.items(), key=lambda item: -item[1].conversations))


@dataclass(slots=True)
class Fitting:
    """Sums over the conversations of one part."""

    outcomes: Counter[str] = field(default_factory=Counter)
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

    @property
    def steps_kept(self) -> int:
        """Steps that some example has labels for."""
        return self.steps - self.steps_left_out

    def to_json(self) -> dict[str, Any]:
        """Every sum by its name."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"outcomes": dict(self.outcomes)}


@dataclass(frozen=True, slots=True)
class _Summary:
    """A conversation that is not used whole."""

    outcome: TruncationKind
    examples: int
    tokens: int
    trained: int
    steps_left_out: int
    shortened_observations: int
    problem: tuple[str, str] | None


class FitAccount:
    """Takes conversations in their order; keeps a few numbers of each, and more of those that are not used whole."""

    def __init__(self) -> None:
        self._tokens = array("I")
        self._trained = array("I")
        self._steps = array("I")
        self._changed: dict[int, tuple[_Summary, _Summary]] = {}
        """Position -> what training and what the held-out part make of it."""

    def add(self, *, tokens: int, trained: int, steps: int, train: TruncationResult, heldout: TruncationResult) -> None:
        """Enter the next conversation: sums of it as a whole, and what becomes of it in either part."""
        if train.outcome is not TruncationKind.whole:
            self._changed[len(self._tokens)] = (_summary(train), _summary(heldout))
        self._tokens.append(tokens)
        self._trained.append(trained)
        self._steps.append(steps)

    def count(self, index: int, into: Fitting, *, heldout: bool, times: int = 1) -> None:
        """Add one conversation to the sums of its part, in training as often as an epoch shows it."""
        if index not in self._changed:
            summary = _Summary(TruncationKind.whole, 1, self._tokens[index], self._trained[index], 0, 0, None)
        else:
            summary = self._changed[index][heldout]
        into.outcomes[str(summary.outcome)] += 1
        into.examples += times * summary.examples
        into.tokens += times * summary.tokens
        into.trained += times * summary.trained
        into.steps += self._steps[index]
        into.steps_left_out += summary.steps_left_out
        into.shortened_observations += summary.shortened_observations

    def set_aside(self) -> Iterator[tuple[int, bool, tuple[str, str]]]:
        """(position, as held-out, reason and detail) of all that cannot be used, under either policy."""
        for index, summaries in self._changed.items():
            for heldout, summary in zip((False, True), summaries, strict=True):
                if summary.problem is not None:
                    yield index, heldout, summary.problem


def _summary(fitted: TruncationResult) -> _Summary:
    return _Summary(
        fitted.outcome,
        len(fitted.pieces),
        sum(len(piece.example) for piece in fitted.pieces),
        sum(piece.example.trained_tokens for piece in fitted.pieces),
        len(fitted.steps_left_out),
        fitted.shortened_observations,
        fitted.problem,
    )
