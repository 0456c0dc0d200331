"""Count where every row of a dataset went, and keep the counts in a file."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from agentft.data.config import DatasetConfig
from agentft.data.formats import KNOWN
from agentft.data.records import Rejection
from agentft.data.sources import ReadReport
from agentft.data.truncation import TruncationKind
from agentft.errors import DataError


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
        lost = sum(rejection.reason != "duplicate" for rejection in self.rejections)
        rows = self.read.rows
        if rows and lost / rows > config.max_rejected:
            examples = "; ".join(f"{r.origin}: {r.reason}: {r.detail}" for r in self.rejections[:3])
            raise DataError(
                f"{lost} of {rows} rows were set aside, more than dataset.max_rejected={config.max_rejected} allows: "
                f"{self.reasons()}; for example {examples}"
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
    """What `_fields` made plain, as the type that its place declares."""
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
