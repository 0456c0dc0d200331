"""Dataset settings -> tokenised training examples and held-out conversations, with every row accounted for."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from agentft.data.config import DatasetConfig, TooLong
from agentft.data.fit import Fitted, Outcome, Piece, fit_conversations
from agentft.data.records import Conversation, Rejection
from agentft.data.render import Template
from agentft.data.sources import RawRow, ReadReport, read_conversations
from agentft.data.splits import divide, keep_apart
from agentft.data.tokens import Example, SegmentEncoder, weigh
from agentft.errors import DataError
from agentft.progress import progress_bar
from agentft.recipes.rows import open_rows
from agentft.runs import RunFolder

log = logging.getLogger(__name__)


@dataclass
class Account:
    """Where every row went."""

    read: ReadReport = field(default_factory=ReadReport)
    rejections: list[Rejection] = field(default_factory=list)
    """Rows set aside, in reading or because they do not fit."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Usable conversations in neither part, by reason."""
    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    """Part -> conversations used by source; in training each as often as an epoch shows it."""
    fitted: dict[str, Counter[str]] = field(default_factory=dict)
    """Part -> what became of its conversations, see `agentft.data.fit.Outcome`."""
    changed: list[dict[str, Any]] = field(default_factory=list)
    """Every conversation that is not used whole, and what of it is not used."""
    layout: Counter[str] = field(default_factory=Counter)
    """What the template writes otherwise than the source."""

    def reasons(self) -> dict[str, int]:
        """Rows set aside, by reason, commonest first."""
        return dict(Counter(rejection.reason for rejection in self.rejections).most_common())


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What a run trains on and what it is measured by."""

    train: list[Example]
    heldout: list[Conversation]
    heldout_examples: list[Example]
    train_tools: frozenset[str]
    """Names of the tools that training conversations call."""
    fingerprint: str
    """Digest of the training ids and labels in their order, and of the held-out ones."""
    account: Account


def prepare_data(config: DatasetConfig, template: Template, encoder: SegmentEncoder) -> PreparedData:
    """Read, divide, sample and tokenise a dataset.

    Raises:
        DataError: a source cannot be read, a part is empty, or more rows were set aside than `dataset.max_rejected`.
        ConfigError: the settings contradict each other.
    """
    started = time.perf_counter()
    account = Account()
    train_pool, heldout_pool = _read_parts(config, account)
    train = _fit(train_pool, config, template, encoder, account, "train")
    heldout = _fit(heldout_pool, config, template, encoder, account, "heldout")
    _check_losses(account, config)
    if not train or not heldout:
        raise DataError(
            f"no {'training' if not train else 'held-out'} conversation is left of {account.read.rows} rows; "
            f"set aside: {account.reasons()}"
        )
    examples = [weigh(piece.example, config.span_weights) for piece in train]
    heldout_examples = [piece.example for piece in heldout]
    prepared = PreparedData(
        train=examples,
        heldout=[piece.conversation for piece in heldout],
        heldout_examples=heldout_examples,
        train_tools=frozenset(r.name for p in train for call in p.conversation.calls for r in call.requests),
        fingerprint=_fingerprint(chain(examples, heldout_examples)),
        account=account,
    )
    _report(prepared, time.perf_counter() - started)
    return prepared


def _read_parts(config: DatasetConfig, account: Account) -> tuple[list[Conversation], list[Conversation]]:
    """Return the training and the held-out conversations, each in its nested sample order."""
    rows = open_rows(config, account.read)
    train = list(_accounted(rows.train, rows.form, account))
    if rows.heldout is None:
        parts = divide(train, split=config.split, test_ratio=config.test_ratio, seed=config.seed)
    else:
        parts = keep_apart(train, _accounted(rows.heldout, rows.form, account), seed=config.seed)
    account.left_out.update(parts.set_aside)
    return parts.train, parts.heldout


def _accounted(rows: Iterable[RawRow | Rejection], form: Any, account: Account) -> Iterator[Conversation]:
    for item in read_conversations(rows, form=form, report=account.read):
        if isinstance(item, Rejection):
            account.rejections.append(item)
        else:
            yield item


def _fit(
    pool: list[Conversation],
    config: DatasetConfig,
    template: Template,
    encoder: SegmentEncoder,
    account: Account,
    part: str,
) -> list[Piece]:
    """Tokenise in sample order until enough conversations fit; what does not fit is set aside and counted."""
    sample, too_long = config.sample, config.too_long
    if part == "heldout":
        # A round that training would leave out is still a question of the exam.
        sample, too_long = config.test_sample, TooLong.drop if too_long is TooLong.drop else TooLong.split
    if sample > len(pool):
        log.warning("dataset: a sample of %d was asked for, the %s part has %d conversations", sample, part, len(pool))
    wanted = len(pool) if sample < 0 else min(sample, len(pool))
    outcomes = account.fitted[part] = Counter()
    by_source = account.by_source[part] = Counter()
    shown_before: set[str] = set()
    pieces: list[Piece] = []
    used = 0
    with progress_bar(f"tokenising {part}", wanted) as bar:
        for fitted in fit_conversations(pool, template, encoder, config.max_length, too_long):
            if used == wanted:
                break
            original = fitted.original
            again = original.weight > 1 and original.id in shown_before
            shown_before.add(original.id)
            if not again:
                outcomes[str(fitted.outcome)] += 1
                account.layout.update(template.notes(original) if fitted.problem is None else ())
            if fitted.outcome is not Outcome.whole and not again:
                account.changed.append(_change(fitted, part))
            if fitted.problem is not None:
                if not again:
                    account.rejections.append(Rejection(original.origin, *fitted.problem, id=original.id))
                continue
            pieces += fitted.pieces
            used += 1
            by_source[account.read.source_of(original.origin)] += 1
            bar.advance()
    return pieces


def _change(fitted: Fitted, part: str) -> dict[str, Any]:
    return {
        "id": fitted.original.id,
        "part": part,
        "outcome": str(fitted.outcome),
        "tokens": fitted.tokens,
        "examples": [piece.conversation.id for piece in fitted.pieces],
        "shortened_observations": fitted.shortened_observations,
        "steps_left_out": list(fitted.steps_left_out),
    }


def _check_losses(account: Account, config: DatasetConfig) -> None:
    lost = sum(rejection.reason != "duplicate" for rejection in account.rejections)
    rows = account.read.rows
    if rows and lost / rows > config.max_rejected:
        examples = "; ".join(f"{r.origin}: {r.reason}: {r.detail}" for r in account.rejections[:3])
        raise DataError(
            f"{lost} of {rows} rows were set aside, more than dataset.max_rejected={config.max_rejected} allows: "
            f"{account.reasons()}; for example {examples}"
        )


def _fingerprint(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.id.encode())
        digest.update(example.input_ids.tobytes())
        digest.update(repr(example.spans).encode())
        if example.span_weights is not None:
            digest.update(repr(example.span_weights).encode())
    return digest.hexdigest()


def _report(prepared: PreparedData, seconds: float) -> None:
    account = prepared.account
    tokens = sum(len(example) for example in prepared.train)
    trained = sum(example.trained_tokens for example in prepared.train)
    log.info(
        "data: %d rows -> %d training and %d held-out conversations; %s tokens to train on, %.0f %% of them labelled (%.1f s)",
        account.read.rows,
        _used(account, "train"),
        _used(account, "heldout"),
        f"{tokens:,}",
        100 * trained / tokens,
        seconds,
    )
    if account.rejections:
        log.warning("data: %d rows set aside: %s", len(account.rejections), account.reasons())
    for part, outcomes in account.fitted.items():
        if set(outcomes) - {str(Outcome.whole)}:
            steps = sum(len(change["steps_left_out"]) for change in account.changed if change["part"] == part)
            log.warning("data: fitting to dataset.max_length, %s: %s; %d steps left out", part, dict(outcomes), steps)
    if account.layout:
        log.info("data: written otherwise by model.template: %s", dict(account.layout.most_common()))
    if account.left_out:
        log.info("data: in neither part: %s", dict(account.left_out))
    if account.read.notices:
        log.info("data: kept, and noted: %s", dict(account.read.notices.most_common()))


def _used(account: Account, part: str) -> int:
    """Conversations of a part that gave at least one example."""
    outcomes = account.fitted[part]
    return outcomes.total() - outcomes[str(Outcome.set_aside)]


def _sources(account: Account) -> list[dict[str, Any]]:
    """What each source gave and how much of it is used; `train` counts a conversation as often as an epoch shows it."""
    return [
        {"source": name, "weight": source.weight, "rows": source.rows, "kept": source.kept}
        | {part: used[name] for part, used in account.by_source.items()}
        for name, source in account.read.sources.items()
    ]


def write_manifest(prepared: PreparedData, run: RunFolder) -> None:
    """Write what the run trains on and is measured by, and every row that was set aside, into the run folder."""
    account = prepared.account
    run.write_json(
        run.data_manifest,
        {
            "fingerprint": prepared.fingerprint,
            "rows": account.read.rows,
            "files": account.read.files,
            "sources": _sources(account),
            "skipped_files": account.read.skipped_files,
            "blank_lines": account.read.blank_lines,
            "set_aside": account.reasons(),
            "in_neither_part": dict(account.left_out),
            "notices": dict(account.read.notices),
            "layout": dict(account.layout),
            "fitting": {"outcomes": account.fitted, "changed": account.changed},
            "train": {
                "examples": len(prepared.train),
                "conversations": _used(account, "train"),
                "tokens": sum(len(e) for e in prepared.train),
                "labelled_tokens": sum(e.trained_tokens for e in prepared.train),
                "steps": sum(len(e.steps()) for e in prepared.train),
                "tools_called": len(prepared.train_tools),
                "ids": [e.id for e in prepared.train],
            },
            "heldout": {
                "examples": len(prepared.heldout),
                "conversations": _used(account, "heldout"),
                "steps": sum(len(e.steps()) for e in prepared.heldout_examples),
                "ids": [c.id for c in prepared.heldout],
                "content_hashes": [c.content_hash for c in prepared.heldout],
            },
        },
    )
    lines = (
        {"source": r.origin.source, "line": r.origin.line, "id": r.id, "reason": r.reason, "detail": r.detail}
        for r in account.rejections
    )
    run.write_text(run.rejected_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
