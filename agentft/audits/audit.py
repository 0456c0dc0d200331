"""Audit a dataset: read it as a training run would, tokenise, check, report; nothing is trained or loaded."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from agentft import progress
from agentft.audits.checks import Audit, Seen
from agentft.audits.page import html_page
from agentft.audits.report import AuditReport, print_conversation, print_report
from agentft.data.config import DatasetConfig, TooLong
from agentft.data.conversation import Conversation
from agentft.data.examples import Piece, make_examples
from agentft.data.records import Rejection
from agentft.data.render import MsagentTemplate
from agentft.data.sources import ReadReport, is_large, open_rows
from agentft.data.template_choice import Layout, stop_tokens
from agentft.data.text_ids import TokenText
from agentft.data.tokens import Example, SegmentEncoder, encode_fast
from agentft.data.truncation import TruncationKind, TruncationResult, fit_conversations
from agentft.errors import DataError
from agentft.model.config import ModelConfig
from agentft.model.load import load_chat_tokenizer
from agentft.recipes.config import AuditConfig

log = logging.getLogger(__name__)

_BATCH = 256
"""Conversations that are tokenised, and held, at a time."""

_WIDTH = 120
"""Columns of a report that does not go to a terminal."""


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What an audit came to."""

    passed: bool
    findings: int
    """Codes that make it fail."""
    output: Path | None
    """Folder of the report; None for a view, which writes nothing."""


@dataclass(frozen=True, slots=True)
class _Desk:
    """What turns a conversation into tokens, and tokens into text."""

    template: Layout
    encoder: SegmentEncoder
    text: TokenText

    @property
    def stop_token(self) -> str:
        """The token that ends a text of the agent."""
        return stop_tokens(self.template)[0]

    def tokenize(self, conversations: list[Conversation]) -> list[Seen]:
        """Return each conversation as a whole, whatever its length; of several examples the longest."""
        return [
            _seen(made.conversation, made.pieces) for made in make_examples(conversations, self.template, self.encoder)
        ]

    def fit(
        self, conversations: list[Conversation], config: DatasetConfig
    ) -> Iterator[tuple[Seen, TruncationResult, TruncationResult]]:
        """Each conversation as a whole, what training makes of it, and what the held-out part does."""

        def fitted(members: list[Conversation], policy: TooLong) -> Iterator[TruncationResult]:
            return fit_conversations(members, self.template, self.encoder, config.max_length, policy)

        in_training = list(fitted(conversations, config.too_long))
        changed = [each.original for each in in_training if each.outcome is not TruncationKind.whole]
        wholes, heldout_policy = iter(self.tokenize(changed)), config.too_long.of_heldout
        others = fitted(changed, heldout_policy)
        for each in in_training:
            if each.outcome is TruncationKind.whole:
                yield _seen(each.original, each.pieces), each, each
            else:
                yield next(wholes), each, each if config.too_long is heldout_policy else next(others)


def _seen(conversation: Conversation, pieces: Sequence[Piece]) -> Seen:
    """Return a conversation and its longest example, an empty one where the layout cannot hold it."""
    if not pieces:
        return Seen(conversation, (), Example(conversation.id, np.zeros(0, dtype=np.int32), ()))
    longest = max(pieces, key=lambda piece: len(piece.example))
    return Seen(conversation, longest.segments, longest.example)


def audit(config: AuditConfig) -> AuditResult:
    """Audit a dataset, or show one conversation of it.

    Raises:
        DataError: a source cannot be read, or has no conversation `view`.
        ConfigError, ModelError: the settings contradict each other, or the tokenizer cannot be loaded.
    """
    started = time.perf_counter()
    desk = _set_up(config.model)
    if config.view is not None:
        _view(config, config.view, desk)
        return AuditResult(True, 0, None)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    report = encode_fast(
        desk.encoder,
        lambda encoder: _look_at_all(config, replace(desk, encoder=encoder), output, started),
        much=is_large(config.dataset),
    )
    # utf-8 whatever the terminal: a report must not fail at the words it reports.
    with (output / "report.txt").open("w", encoding="utf-8", errors="backslashreplace") as file:
        for target in (_screen(), Console(file=file, width=_WIDTH, markup=False, emoji=False, highlight=False)):
            print_report(report, target)
    _write(output / "audit.json", json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n")
    if config.audit.page:
        _write(output / "audit.html", html_page(report, desk.text))
    return AuditResult(not report.failing, len(report.failing), output)


def _set_up(config: ModelConfig) -> _Desk:
    chat = load_chat_tokenizer(config)
    return _Desk(chat.template, chat.encoder, TokenText(chat.tokenizer))


def _look_at_all(config: AuditConfig, desk: _Desk, output: Path, started: float) -> AuditReport:
    options = config.audit
    read = ReadReport()
    rows = open_rows(config.dataset, read)
    audit = Audit(
        config.dataset,
        desk.text,
        stop_token=desk.stop_token,
        verbatim=isinstance(desk.template, MsagentTemplate),
        examples=options.examples,
        sample=options.sample,
    )
    rejected = output / "rejected.jsonl"
    with rejected.open("w", encoding="utf-8") as quarantine, _counting() as show:

        def set_aside(rejection: Rejection) -> None:
            quarantine.write(json.dumps(_line(rejection), ensure_ascii=False) + "\n")

        for batch in _batches(rows.conversations(read), _BATCH):
            kept: list[tuple[Conversation, bool]] = []
            for item, heldout in batch:
                if isinstance(item, Rejection):
                    audit.reject(item)
                    set_aside(item)
                else:
                    kept.append((item, heldout))
            fits = desk.fit([conversation for conversation, _ in kept], config.dataset)
            for (seen, fitted, as_heldout), (_, heldout) in zip(fits, kept, strict=True):
                audit.add(seen, fitted=fitted, as_heldout=as_heldout, heldout=heldout)
            show(read.rows)
            desk.encoder.settle()
        audit.finish(read, separate=rows.heldout is not None, similarity=options.similarity)
        for rejection in audit.unfit:
            set_aside(rejection)
    return AuditReport(config, read, audit, output, time.perf_counter() - started)


def _view(config: AuditConfig, wanted: str, desk: _Desk) -> None:
    """Find one conversation and print it with its labels."""
    read = ReadReport()
    for item, _ in open_rows(config.dataset, read).conversations(read):
        if item.id != wanted:
            continue
        if isinstance(item, Rejection):
            raise DataError(f"view={wanted}: {item.origin}: set aside, {item.reason}: {item.detail}")
        (seen,) = desk.tokenize([item])
        print_conversation(seen, desk.text, _screen(), max_length=config.dataset.max_length)
        return
    raise DataError(
        f"view={wanted}: none of {read.rows:,} conversations has that id; a report names ids beside file:line"
    )


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _line(rejection: Rejection) -> dict[str, Any]:
    return {
        "source": rejection.origin.source,
        "line": rejection.origin.line,
        "id": rejection.id,
        "reason": rejection.reason,
        "detail": rejection.detail,
    }


def _screen() -> Console:
    # The dataset's words are shown as they are: no markup, no emoji codes.
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ  # rich reads it
    return Console(width=None if wide else _WIDTH, markup=False, emoji=False, highlight=False)


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


class _counting:  # noqa: N801  # reads as a verb: with _counting() as show
    """A line on a terminal that says how far the audit is; nothing elsewhere."""

    def __enter__(self) -> Callable[[int], None]:
        self._status = progress.console().status("reading") if progress.console().is_terminal else None
        if self._status is not None:
            self._status.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def _show(self, rows: int) -> None:
        if self._status is not None:
            self._status.update(f"{rows:,} rows read")
