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

from agentft.data import synthetic
from agentft.data.config import DatasetConfig, LocalConfig, ModelScopeConfig, Split, SyntheticConfig
from agentft.data.records import Conversation, Origin, Rejection
from agentft.data.render import MsagentTemplate
from agentft.data.sources import RawRow, ReadReport, read_conversations, read_local
from agentft.data.splits import divide, in_sample_order
from agentft.data.tokens import Example, SegmentEncoder, tokenize
from agentft.errors import ConfigError, DataError
from agentft.progress import progress_bar
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


def prepare_data(config: DatasetConfig, template: MsagentTemplate, encoder: SegmentEncoder) -> PreparedData:
    """Read, divide, sample and tokenise a dataset.

    Raises:
        DataError: a source cannot be read, a part is empty, or more rows were set aside than `dataset.max_rejected`.
        ConfigError: the settings contradict each other.
    """
    started = time.perf_counter()
    account = Account()
    train_pool, heldout_pool = _read_parts(config, account)
    train = _fit(train_pool, config.sample, config.max_length, template, encoder, account, "train")
    heldout = _fit(heldout_pool, config.test_sample, config.max_length, template, encoder, account, "heldout")
    _check_losses(account, config)
    if not train or not heldout:
        raise DataError(
            f"no {'training' if not train else 'held-out'} conversation is left of {account.read.rows} rows; "
            f"set aside: {account.reasons()}"
        )
    examples = [example for _, example in train]
    heldout_examples = [example for _, example in heldout]
    prepared = PreparedData(
        train=examples,
        heldout=[conversation for conversation, _ in heldout],
        heldout_examples=heldout_examples,
        train_tools=frozenset(r.name for c, _ in train for call in c.calls for r in call.requests),
        fingerprint=_fingerprint(chain(examples, heldout_examples)),
        account=account,
    )
    _report(prepared, time.perf_counter() - started)
    return prepared


def _read_parts(config: DatasetConfig, account: Account) -> tuple[list[Conversation], list[Conversation]]:
    """Return the training and the held-out conversations, each in its nested sample order."""
    train_rows, heldout_rows = _rows(config, account)
    form = getattr(config, "form", "msagent")
    train = list(_accounted(train_rows, form, account))
    if heldout_rows is None:
        parts = divide(train, split=config.split, test_ratio=config.test_ratio, seed=config.seed)
        account.left_out.update(parts.set_aside)
        return parts.train, parts.heldout
    heldout = list(_accounted(heldout_rows, form, account))
    users = {conversation.user_hash for conversation in heldout}
    apart = [conversation for conversation in train if conversation.user_hash not in users]
    if len(apart) < len(train):
        account.left_out["held_out_too"] += len(train) - len(apart)
    return in_sample_order(apart, config.seed), in_sample_order(heldout, config.seed)


def _rows(
    config: DatasetConfig, account: Account
) -> tuple[Iterable[RawRow | Rejection], Iterable[RawRow | Rejection] | None]:
    """Return raw rows for training and, where the source has a part of its own for it, for the held-out set."""
    match config:
        case SyntheticConfig():
            return _synthetic(config, "train", config.conversations), _synthetic(config, "heldout", config.heldout)
        case LocalConfig():
            test = None if config.test_path is None else read_local(config.test_path, report=account.read)
            return read_local(config.path, report=account.read), test
        case ModelScopeConfig():
            from agentft.data.modelscope_rows import read_modelscope

            common = {"revision": config.revision, "cache_dir": config.cache_dir}
            test = None if config.test_split is None else read_modelscope(config.id, config.test_split, **common)
            return read_modelscope(config.id, config.train_split, **common), test
        case _:
            raise ConfigError(f"dataset={config.name}: no source reads {type(config).__name__}")


def _synthetic(config: SyntheticConfig, part: Any, count: int) -> Iterator[RawRow]:
    records = synthetic.generate(
        count,
        seed=config.seed,
        languages={"en": 1 - config.chinese, "zh": config.chinese},
        part=part,
        unseen_tools=config.split is Split.unseen_tools,
        max_rounds=config.max_rounds,
    )
    for number, record in enumerate(records, start=1):
        yield RawRow(Origin(f"synthetic-{part}", number), record)


def _accounted(rows: Iterable[RawRow | Rejection], form: Any, account: Account) -> Iterator[Conversation]:
    for item in read_conversations(rows, form=form, report=account.read):
        if isinstance(item, Rejection):
            account.rejections.append(item)
        else:
            yield item


def _fit(
    pool: list[Conversation],
    sample: int,
    max_length: int,
    template: MsagentTemplate,
    encoder: SegmentEncoder,
    account: Account,
    part: str,
) -> list[tuple[Conversation, Example]]:
    """Tokenise in sample order until `sample` conversations fit; what does not fit is set aside and counted."""
    if sample > len(pool):
        log.warning("dataset: a sample of %d was asked for, the %s part has %d conversations", sample, part, len(pool))
    wanted = len(pool) if sample < 0 else min(sample, len(pool))
    fitted: list[tuple[Conversation, Example]] = []
    with progress_bar(f"tokenising {part}", wanted) as bar:
        for conversation, example in zip(pool, tokenize(pool, template, encoder), strict=False):
            if len(fitted) == wanted:
                break
            problem = _problem(example, max_length)
            if problem is None:
                fitted.append((conversation, example))
                bar.advance()
            else:
                account.rejections.append(Rejection(conversation.origin, *problem, id=conversation.id))
    return fitted


def _problem(example: Example, max_length: int) -> tuple[str, str] | None:
    if len(example) > max_length:
        return "too_long", f"{len(example)} tokens, dataset.max_length is {max_length}"
    if not example.spans:
        return "no_label", "the agent says nothing in this conversation"
    return None


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
    return digest.hexdigest()


def _report(prepared: PreparedData, seconds: float) -> None:
    account = prepared.account
    tokens = sum(len(example) for example in prepared.train)
    trained = sum(example.trained_tokens for example in prepared.train)
    log.info(
        "data: %d rows -> %d training and %d held-out conversations; %s tokens to train on, %.0f %% of them labelled (%.1f s)",
        account.read.rows,
        len(prepared.train),
        len(prepared.heldout),
        f"{tokens:,}",
        100 * trained / tokens,
        seconds,
    )
    if account.rejections:
        log.warning("data: %d rows set aside: %s", len(account.rejections), account.reasons())
    if account.left_out:
        log.info("data: in neither part: %s", dict(account.left_out))
    if account.read.notices:
        log.info("data: kept, and noted: %s", dict(account.read.notices.most_common()))


def write_manifest(prepared: PreparedData, run: RunFolder) -> None:
    """Write what the run trains on and is measured by, and every row that was set aside, into the run folder."""
    account = prepared.account
    run.write_json(
        run.data_manifest,
        {
            "fingerprint": prepared.fingerprint,
            "rows": account.read.rows,
            "files": account.read.files,
            "skipped_files": account.read.skipped_files,
            "blank_lines": account.read.blank_lines,
            "set_aside": account.reasons(),
            "in_neither_part": dict(account.left_out),
            "notices": dict(account.read.notices),
            "train": {
                "conversations": len(prepared.train),
                "tokens": sum(len(e) for e in prepared.train),
                "labelled_tokens": sum(e.trained_tokens for e in prepared.train),
                "steps": sum(len(e.steps()) for e in prepared.train),
                "tools_called": len(prepared.train_tools),
                "ids": [e.id for e in prepared.train],
            },
            "heldout": {
                "conversations": len(prepared.heldout),
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
