"""Hold prepared data: examples, held-out conversations, the account of every row; and write what a run tells of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import typing
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from agentft.data.config import DatasetConfig
from agentft.data.formats import KNOWN
from agentft.data.records import Rejection
from agentft.data.sources import ReadReport
from agentft.data.store import StoredConversations, StoredExamples
from agentft.data.truncation import TruncationKind
from agentft.errors import DataError
from agentft.runs import RunFolder

PIECES = "heldout.jsonl"
"""The held-out conversations; where everything is looked at, those of all examples."""
ORDER = "order.npz"
"""Rows of the examples of both parts, and of the held-out conversations, each in its order."""
ABOUT = "about.json"
ACCOUNT = "account.json"

log = logging.getLogger(__name__)


@dataclass
class PreparationStats:
    """Where every row went."""

    read: ReadReport = field(default_factory=ReadReport)
    rejections: list[Rejection] = field(default_factory=list)
    """Rows set aside, in reading or because they do not fit."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Usable conversations in neither part, by reason."""
    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    """Part -> conversations used by source; in training each as often as an epoch shows it."""
    fitted: dict[str, Counter[str]] = field(default_factory=dict)
    """Part -> what became of its conversations, see `agentft.data.truncation.TruncationKind`."""
    changed: list[dict[str, Any]] = field(default_factory=list)
    """Every conversation that is not used whole, and what of it is not used."""
    layout: Counter[str] = field(default_factory=Counter)
    """What the template writes otherwise than the source."""

    def reasons(self) -> dict[str, int]:
        """Rows set aside, by reason, commonest first."""
        return dict(Counter(rejection.reason for rejection in self.rejections).most_common())

    @property
    def lost(self) -> int:
        """Rows set aside; a repetition is no loss."""
        return sum(rejection.reason != "duplicate" for rejection in self.rejections)

    def used(self, part: str) -> int:
        """Conversations of a part that gave at least one example."""
        outcomes = self.fitted[part]
        return outcomes.total() - outcomes[str(TruncationKind.set_aside)]

    def check_any(self) -> None:
        """Refuse data of which every row was set aside in reading.

        Raises:
            DataError: the account of the rejections, and the formats that are known.
        """
        if self.read.kept or not self.rejections:
            return
        firsts = {rejection.reason: rejection for rejection in reversed(self.rejections)}
        shown = list(self.reasons().items())
        lines = [f"none of {self.read.rows:,} rows can be used; they were set aside for:"]
        lines += [
            f"  {count:,} {reason}, first {firsts[reason].origin}: {firsts[reason].detail};"
            for reason, count in shown[:3]
        ]
        if len(shown) > 3:
            lines.append("  " + ", ".join(f"{count:,} {reason}" for reason, count in shown[3:])[:300] + ";")
        lines.append(f"  known formats (dataset.format): {KNOWN}")
        raise DataError("\n".join(line[:400] for line in lines))

    def check_losses(self, config: DatasetConfig) -> None:
        """Refuse data of which too much is set aside.

        Raises:
            DataError: more than `dataset.max_rejected` of the rows, duplicates not counted.
        """
        rows = self.read.rows
        if rows and self.lost / rows > config.max_rejected:
            examples = "; ".join(f"{r.origin}: {r.reason}: {r.detail}" for r in self.rejections[:3])
            raise DataError(
                f"{self.lost} of {rows} rows were set aside, more than dataset.max_rejected={config.max_rejected} allows: "
                f"{self.reasons()}; for example {examples}"
            )


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What a run trains on and what it is measured by."""

    train: StoredExamples
    heldout: StoredConversations
    heldout_examples: StoredExamples
    train_tools: frozenset[str]
    """Names of the tools that training conversations call."""
    fingerprint: str
    """Digest of the training ids, labels and weights in their order, and of the held-out ones."""
    heldout_content_hashes: list[str]
    account: PreparationStats


def open_prepared(folder: Path, config: DatasetConfig) -> PreparedData:
    """Map the files of a prepared dataset; they may lose their names afterwards."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    examples = StoredExamples(folder)
    with np.load(folder / ORDER) as order:
        train, heldout, pieces = (order[part] for part in ("train", "heldout", "pieces"))
    return PreparedData(
        train=examples.chosen(train).weighed(config.span_weights),
        heldout=StoredConversations(folder / PIECES, pieces),
        heldout_examples=examples.chosen(heldout),
        train_tools=frozenset(about["train_tools"]),
        fingerprint=about["fingerprint"],
        heldout_content_hashes=about["heldout_content_hashes"],
        account=read_account(folder / ACCOUNT),
    )


def write_account(account: PreparationStats, path: Path) -> None:
    """Write an account as JSON."""
    path.write_text(json.dumps(account, ensure_ascii=False, default=_fields), encoding="utf-8")


def read_account(path: Path) -> PreparationStats:
    """Read what `write_account` wrote: an equal account, its counts in the same order."""
    account: PreparationStats = _typed(json.loads(path.read_text(encoding="utf-8")), PreparationStats)
    return account


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass as JSON holds it; its values are asked for in their turn."""
    return {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}


def _typed(value: Any, hint: Any) -> Any:
    """Return what `_fields` made plain, as the type that its place declares."""
    if hint is Any or hint in (str, int, float) or value is None:
        return value
    kind = typing.get_origin(hint) or hint
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(kind):
        hints = _hints(typing.cast("type", kind))
        return typing.cast("type", kind)(**{name: _typed(part, hints[name]) for name, part in value.items()})
    if kind is Counter:
        return Counter(value)
    if kind is dict and arguments and arguments[1] is not Any:
        return {key: _typed(item, arguments[1]) for key, item in value.items()}
    return [_typed(item, arguments[0]) for item in value] if kind is list and arguments else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def rewritten_history(prepared: PreparedData) -> dict[str, int]:
    """Return what it costs that a chat template rewrites history: conversations of several renderings, their examples,
    their tokens, and the tokens of the longest rendering of each.
    """
    fitted = {name for change in prepared.account.changed for name in change["examples"]}
    lengths = dict(zip(prepared.train.ids, prepared.train.lengths.tolist(), strict=True))
    by_whole: dict[str, list[int]] = {}
    for name, tokens in lengths.items():
        whole, part, _ = name.rpartition("/part-")
        if part and name not in fitted:
            by_whole.setdefault(whole, []).append(tokens)
    return {
        "conversations": len(by_whole),
        "examples": sum(map(len, by_whole.values())),
        "tokens": sum(map(sum, by_whole.values())),
        "tokens_of_the_longest": sum(map(max, by_whole.values())),
    }


def log_summary(prepared: PreparedData, seconds: float) -> None:
    """Say in the log what was prepared, what was set aside and what it costs."""
    account = prepared.account
    tokens = int(prepared.train.lengths.sum())
    log.info(
        "data: %d rows%s -> %d training and %d held-out conversations; %s tokens, %.0f %% of them labelled (%.1f s)",
        account.read.rows,
        _of_files(account.read.files),
        account.used("train"),
        account.used("heldout"),
        f"{tokens:,}",
        100 * prepared.train.trained_tokens / tokens,
        seconds,
    )
    if account.rejections:
        log.warning("data: %d rows set aside: %s", len(account.rejections), account.reasons())
    for part, outcomes in account.fitted.items():
        if set(outcomes) - {str(TruncationKind.whole)}:
            steps = sum(len(change["steps_left_out"]) for change in account.changed if change["part"] == part)
            log.warning("data: fitting to dataset.max_length, %s: %s; %d steps left out", part, dict(outcomes), steps)
    if (cost := rewritten_history(prepared))["conversations"]:
        once = tokens - cost["tokens"] + cost["tokens_of_the_longest"]
        log.log(
            logging.WARNING if tokens > 1.5 * once else logging.INFO,
            "data: the chat template rewrites history, so %d conversations are %d examples: %.1f x the tokens of one "
            "rendering of each; bounded by model.rewritten_history=stable or dataset.reasoning=drop",
            cost["conversations"],
            cost["examples"],
            tokens / once,
        )
    if account.layout:
        log.info("data: written otherwise by model.template: %s", dict(account.layout.most_common()))
    if account.left_out:
        log.info("data: in neither part: %s", dict(account.left_out))
    if account.read.notices:
        log.info("data: kept, and noted: %s", dict(account.read.notices.most_common()))


def _of_files(files: list[str]) -> str:
    return f" of {files[0]}" + f" and {len(files) - 1} more files" * (len(files) > 1) if files else ""


def _sources(account: PreparationStats) -> list[dict[str, Any]]:
    """Return what each source gave and how much of it is used; `train` counts a conversation as often as an epoch shows it."""
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
            "rewritten_history": rewritten_history(prepared),
            "fitting": {"outcomes": account.fitted, "changed": account.changed},
            "train": {
                "examples": len(prepared.train),
                "conversations": account.used("train"),
                "tokens": int(prepared.train.lengths.sum()),
                "labelled_tokens": prepared.train.trained_tokens,
                "steps": prepared.train.steps,
                "tools_called": len(prepared.train_tools),
                "ids": prepared.train.ids,
            },
            "heldout": {
                "examples": len(prepared.heldout),
                "conversations": account.used("heldout"),
                "steps": prepared.heldout_examples.steps,
                "ids": prepared.heldout_examples.ids,
                "content_hashes": prepared.heldout_content_hashes,
            },
        },
    )
    run.write_text(run.rejected_file, rejected_lines(account))


def rejected_lines(account: PreparationStats) -> str:
    """Return a line of JSON for every row that was set aside."""
    lines = (
        {"source": r.origin.source, "line": r.origin.line, "id": r.id, "reason": r.reason, "detail": r.detail}
        for r in account.rejections
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
