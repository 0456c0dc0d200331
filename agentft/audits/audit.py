"""Audit a dataset: prepare it as a training run would, look at every conversation, report; nothing is trained or loaded.

Of a conversation that was looked at counts, digests and a small sample stay; the texts lie on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from agentft.audits.checks import Finding, Problem, check_calls, check_turns, empty_findings, trace_labels
from agentft.audits.report import AuditReport, html_page, print_conversation, print_report
from agentft.data.config import DatasetConfig
from agentft.data.conversation import Conversation, Origin
from agentft.data.prepare import Preparation, look_at_every_conversation
from agentft.data.prepared import small_exam
from agentft.data.records import Rejection
from agentft.data.render import MsagentTemplate, SpanKind
from agentft.data.sources import PreparationStats, open_rows, read_conversations
from agentft.data.template_choice import Layout, stop_tokens
from agentft.data.tokens import Example, SegmentEncoder, TokenText
from agentft.data.truncation import Rendered, TruncationKind, make_examples
from agentft.errors import DataError
from agentft.model.load import load_chat_tokenizer
from agentft.recipes.config import AuditConfig, AuditOptions

_WIDTH = 120
"""Columns of a report that does not go to a terminal."""

_MAX_GROUPS = 400
"""Files, above which the others count together."""

_SAMPLE = 24
"""Conversations in the page besides the first example of each finding."""

_MAX_SHOWN_TOKENS = 20_000
"""A longer conversation is no example to look at."""


def audit(config: AuditConfig) -> list[Finding]:
    """Audit a dataset and write its report, or show one conversation of it; return the findings that make it fail.

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
        return []

    def look(data: Preparation, encoder: SegmentEncoder) -> Audit:
        return Audit(config.dataset, config.audit, data, layout, text).look(encoder)

    looked = look_at_every_conversation(config.dataset, layout, encoder, look)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    report, screen = AuditReport(config, looked, output, time.perf_counter() - started), _screen()
    print_report(report, screen)
    _write(output / "report.txt", screen.export_text())
    _write(output / "rejected.jsonl", looked.data.stats.rejected_lines())
    _write(output / "audit.json", json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n")
    if config.audit.page:
        _write(output / "audit.html", html_page(report, text))
    return report.failing


def _find(config: DatasetConfig, wanted: str, layout: Layout, encoder: SegmentEncoder, text: TokenText) -> Seen:
    """Read until the conversation of that id comes, and tokenise it."""
    stats = PreparationStats()
    train, heldout, form = open_rows(config, stats)
    for source in (train, heldout or ()):
        for item in read_conversations(source, form=form, reasoning=config.reasoning, stats=stats):
            if item.id != wanted:
                continue
            if isinstance(item, Rejection):
                raise DataError(f"view={wanted}: {item.origin}: set aside, {item.reason}: {item.detail}")
            (made,) = make_examples([item], layout, encoder)
            return Seen.of(made, text)
    raise DataError(f"view={wanted}: none of {stats.rows:,} conversations has that id; a report names ids")


def _screen() -> Console:
    # The dataset's words are shown as they are: no markup, no emoji codes.
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ  # rich reads it
    return Console(width=None if wide else _WIDTH, markup=False, emoji=False, highlight=False, record=True)


def _write(path: Path, text: str) -> None:
    # utf-8 whatever the terminal: a report must not fail at the words it reports.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


@dataclass(frozen=True, slots=True)
class Seen:
    """A conversation as a whole, whatever its length, with its tokens; of several examples the longest."""

    conversation: Conversation
    example: Example
    kinds: np.ndarray[tuple[int], np.dtype[np.int8]]
    """Shape [T]. Of a trained token its span's, of another that of the segment it begins in."""
    part: str

    @classmethod
    def of(cls, made: Rendered, text: TokenText, part: str | None = None) -> Seen:
        """Return the longest example, an empty one where the layout cannot hold the conversation."""
        example, kinds = Example(made.conversation.id, np.zeros(0, dtype=np.int32), ()), np.zeros(0, dtype=np.int8)
        if made.pieces:
            longest = max(made.pieces, key=lambda piece: len(piece.example))
            example, kinds = longest.example, text.kinds(longest.example.input_ids, longest.segments)
            for span in example.spans:
                kinds[span.start : span.stop] = span.kind
        return cls(made.conversation, example, kinds, part or "neither")


Sums = Counter[str]
"""Of a group of conversations, by what was counted."""


def _zeros(*names: str) -> Sums:
    return Counter(dict.fromkeys(names, 0))


@dataclass(slots=True)
class Statistics:
    """What a dataset holds."""

    whole: Sums = field(
        default_factory=lambda: _zeros(
            "conversations", "rounds", "calls", "observations", "tokens", "trained", "too_long"
        )
    )
    groups: dict[str, dict[str, Sums]] = field(
        default_factory=lambda: {name: {} for name in ("files_read", "languages", "rounds", "parts")}
    )
    """Sums by file, language, number of rounds, and part: `train`, `heldout` and `neither`."""
    tokens_by_kind: Counter[SpanKind] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("I"))
    """Tokens of each conversation."""
    tools_called: Counter[str] = field(default_factory=Counter)
    tools_offered: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    """What the agents say, step by step, in all conversations of a part."""
    fitting: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What fitting to `dataset.max_length` makes of `train` and `heldout`, where the part is not empty."""
    rewritten_history: Sums = field(
        default_factory=lambda: _zeros("conversations", "examples", "tokens", "tokens_of_the_longest")
    )
    """Conversations that are several examples, since the chat template rewrites their history; the longest example of each
    is what one rendering would cost."""
    heldout_turns_compared: int = 0

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
        self.findings = empty_findings()
        self._config, self._options = config, options
        self._layout = layout
        self._text = text
        self._stop_token = stop_tokens(layout)[0]
        self._sample: list[Seen] = []
        self._exemplary: dict[str, Seen] = {}
        """Code -> the conversation of its first example."""

    @property
    def unfit(self) -> list[Rejection]:
        """Conversations that fitting sets aside: those after the ones that reading does."""
        return self.data.stats.rejections[self.data.stats.rejected.total() :]

    @property
    def found(self) -> list[Finding]:
        """What was found, in the order of the codes."""
        return [finding for finding in self.findings.values() if finding.count]

    def look(self, encoder: SegmentEncoder) -> Audit:
        """Look at every conversation, then at all of them together."""
        statistics, data = self.statistics, self.data
        for number, made in enumerate(make_examples(data.conversations, self._layout, encoder)):
            lengths = [len(piece.example) for piece in made.pieces]
            if len(lengths) > 1:
                cost = {"examples": len(lengths), "tokens": sum(lengths), "tokens_of_the_longest": max(lengths)}
                statistics.rewritten_history.update(cost, conversations=1)
            self._look_at(number, Seen.of(made, self._text, data.entries[number].part))
        self._check_what_is_set_aside()
        if data.entries and not data.empty_parts and not data.used["train"]:
            data.empty_parts.append(f"no training conversation is left; set aside: {data.stats.reasons()}")
        for reason in data.empty_parts:
            self.findings["empty_part"].add(Origin("split", 0), None, reason)
        self._check_exam()
        parts = [entry.part for entry in data.entries]
        compared = compare(data.conversations, parts, self.findings, self._options.similarity)
        statistics.heldout_turns_compared = compared
        statistics.fitting = {part: self._fitting(part) for part, outcomes in data.stats.fitted.items() if outcomes}
        return self

    def shown(self) -> dict[str, tuple[Seen, list[str]]]:
        """Return conversations to look at by id, each with the codes it is an example of; sample last."""
        kept: dict[str, tuple[Seen, list[str]]] = {}
        for code, seen in self._exemplary.items():
            kept.setdefault(seen.conversation.id, (seen, []))[1].append(code)
        for seen in _smallest(self._sample):
            kept.setdefault(seen.conversation.id, (seen, []))
        return kept

    def _look_at(self, number: int, seen: Seen) -> None:
        self._count(seen)
        if len(seen.example) <= _MAX_SHOWN_TOKENS:
            self._sample.append(seen)
            if len(self._sample) > 4 * _SAMPLE:
                self._sample = _smallest(self._sample)
        problems = [*check_turns(seen.conversation), *check_calls(seen.conversation)]
        if (problem := self._trace(number, seen)) is not None:
            problems.append(problem)
        if len(seen.example) > self._config.max_length:
            problems.append(self._too_long(number, seen))
        for code, detail, topic in problems:
            kept = self.findings[code].add(seen.conversation.origin, seen.conversation.id, detail, topic)
            if kept and len(seen.example) <= _MAX_SHOWN_TOKENS:
                self._exemplary.setdefault(code, seen)

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

    def _count(self, seen: Seen) -> None:
        conversation, length, statistics = seen.conversation, len(seen.example), self.statistics
        names = [call.name for call in conversation.tool_calls]
        sums = {
            "conversations": 1,
            "rounds": conversation.rounds,
            "calls": len(names) + sum(len(message.malformed_calls) for message in conversation.messages),
            "observations": sum(message.role == "tool" for message in conversation.messages),
            "tokens": length,
            "trained": seen.example.trained_tokens,
            "too_long": int(length > self._config.max_length),
        }
        rounds = str(conversation.rounds) if conversation.rounds < 10 else "10 and more"
        keys = (conversation.origin.source, conversation.language, rounds, seen.part)
        statistics.whole.update(sums)
        for group, key in zip(statistics.groups.values(), keys, strict=True):
            known = key if key in group or len(group) < _MAX_GROUPS else "(others)"
            group.setdefault(known, Counter()).update(sums)
        statistics.lengths.append(length)
        statistics.steps[seen.part] += len(seen.example.steps())
        counts = np.bincount(seen.kinds, minlength=len(SpanKind)).tolist()
        statistics.tokens_by_kind.update({kind: counts[kind] for kind in SpanKind})
        statistics.tools_called.update(names)
        statistics.tools_offered.update({tool.name for tool in conversation.offered})

    def _check_what_is_set_aside(self) -> None:
        stats = self.data.stats
        rows, allowed = stats.rows, self._config.max_rejected
        if rows and stats.lost / rows > allowed:
            share = f"{stats.lost:,} of {rows:,} rows ({stats.lost / rows:.1%})"
            detail = f"{share}, dataset.max_rejected={allowed} allows {allowed:.1%}"
            self.findings["too_many_set_aside"].add(Origin("dataset", 0), None, detail)

    def _check_exam(self) -> None:
        if self.data.empty_parts:
            return  # a finding of its own
        if words := small_exam(self.data.stats.used("heldout")):
            self.findings["small_exam"].add(Origin("split", 0), None, words)

    def _fitting(self, part: str) -> dict[str, Any]:
        stats, examples = self.data.stats, self.data.examples(part)
        changes = [change for change in stats.changed if change["part"] == part]
        return {
            "outcomes": dict(stats.fitted[part]),
            "examples": len(examples),
            "tokens": int(examples.lengths.sum()),
            "trained": examples.trained_tokens,
            "steps": self.statistics.steps[part],
            "steps_left_out": sum(len(change["steps_left_out"]) for change in changes),
            "shortened_observations": sum(change["shortened_observations"] for change in changes),
        }


def _smallest(sample: list[Seen]) -> list[Seen]:
    """Return the conversations with the smallest content hashes: a fair sample, and the same one every time."""
    return sorted(sample, key=lambda seen: seen.conversation.content_hash)[:_SAMPLE]


# --- What conversations share ---

SHORTEST_COMPARED = 20
"""Letters and digits of a user turn below which nearly equal says nothing: "Yes, please"."""

_SHINGLE = 5
_BUCKETS = 32
_BAND = 4
_CROWD = 200
"""Training turns compared for one equal band: bounds the work where a template made a million turns."""
_EMPTY = np.uint32(0xFFFFFFFF)
_NOT_WORDS = re.compile(r"[\W_]+")


_Turn = tuple[int, np.ndarray[Any, np.dtype[np.uint32]]]
"""Number of the conversation, and sketch of a user turn."""


def compare(
    conversations: Sequence[Conversation],
    part_of: Sequence[str | None],
    findings: dict[str, Finding],
    similarity: float,
) -> int:
    """Find equal contents and user sides, and held-out user turns that nearly equal one of training; count those compared.

    Digests and sketches are kept, about a kilobyte of each conversation at most, and never texts.

    Args:
        part_of: `train`, `heldout` or None for each.
        similarity: Share of common five-letter runs, case and punctuation aside; estimated within about 0.07.
    """
    contents, said = array("Q"), array("Q")
    turns: dict[str | None, list[_Turn]] = defaultdict(list)
    for number, conversation in enumerate(conversations):
        texts = [message.text for message in conversation.messages if message.role == "user"]
        # Not `user_hash`, which the split goes by: what is checked must not be what checks.
        side = hashlib.blake2b("\x1f".join(" ".join(text.split()) for text in texts).encode(), digest_size=8)
        contents.append(int(conversation.content_hash[:16], 16))
        said.append(int.from_bytes(side.digest(), "big"))
        sketches = (sketch(text) for text in texts if part_of[number] is not None)
        turns[part_of[number]] += [(number, each) for each in sketches if each is not None]

    def report(code: str, first: int, other: int, words: str) -> None:
        earlier, found = conversations[first], conversations[other]
        findings[code].add(found.origin, found.id, f"{words} {earlier.id!r} ({earlier.origin})")

    repeated: set[int] = set()
    for what, words, keys in (("content", "content", contents), ("user_side", "user side", said)):
        first: dict[int, int] = {}
        trained: dict[int, int] = {}
        for number, key in enumerate(keys):
            if (origin := first.setdefault(key, number)) != number and number not in repeated:
                repeated.add(number)
                report(f"duplicate_{what}", origin, number, f"the same {words} as")
            if part_of[number] == "train":
                trained.setdefault(key, number)
        for number, key in enumerate(keys):
            if part_of[number] == "heldout" and key in trained:
                report(f"{what}_straddles", trained[key], number, f"the same {words} as")
    for turn, (alike, owner) in sorted(_nearest(turns["train"], turns["heldout"]).items()):
        if alike >= similarity:
            words = f"about {alike:.0%} of a user turn as in"
            report("near_duplicate_across_split", owner, turns["heldout"][turn][0], words)
    return len(turns["heldout"])


def _nearest(trained: Sequence[_Turn], held: Sequence[_Turn]) -> dict[int, tuple[float, int]]:
    """Return how alike the nearest training turn is, and whose, of each held-out turn with an equal band of the sketch."""
    best: dict[int, tuple[float, int]] = {}
    for start in range(0, _BUCKETS, _BAND):
        bands: dict[bytes, list[int]] = defaultdict(list)
        for turn, (_, other) in enumerate(held):
            bands[other[start : start + _BAND].tobytes()].append(turn)
        bands.pop(_EMPTY.tobytes() * _BAND, None)  # which says nothing
        met: Counter[bytes] = Counter()
        for owner, one in trained:
            band = one[start : start + _BAND].tobytes()
            if band not in bands or met[band] == _CROWD:
                continue
            met[band] += 1
            for turn in bands[band]:
                other = held[turn][1]
                alike = float((one == other)[(one != _EMPTY) | (other != _EMPTY)].mean())
                if alike > best.get(turn, (0.0, 0))[0]:
                    best[turn] = (alike, owner)
    return best


def sketch(turn: str) -> np.ndarray[Any, np.dtype[np.uint32]] | None:
    """Return a one-permutation MinHash of the five-letter runs of a user turn; None for a short one."""
    letters = _NOT_WORDS.sub("", unicodedata.normalize("NFKC", turn).casefold())
    if len(letters) < SHORTEST_COMPARED:
        return None
    points = np.frombuffer(letters.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    hashes = np.zeros(len(points) - _SHINGLE + 1, dtype=np.uint64)
    for offset in range(_SHINGLE):
        hashes = hashes * np.uint64(0x100000001B3) + points[offset : offset + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    values = (hashes >> np.uint64(32)).astype(np.uint32)
    lowest = np.full(_BUCKETS, _EMPTY, dtype=np.uint32)
    np.minimum.at(lowest, ((hashes >> np.uint64(27)) & np.uint64(_BUCKETS - 1)).astype(np.int64), values)
    return lowest
