"""Count where every row of a dataset went, and give no two conversations of a source one id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from agentft.data.config import DatasetConfig
from agentft.data.conversation import Origin
from agentft.data.records import KNOWN, Rejection
from agentft.errors import DataError

_MAX_NAMES_NOTED = 40
"""Names of columns or fields under one code; a record with names of its own would fill the memory."""


@dataclass(slots=True)
class PreparationStats:
    """Where every row went. What reading counts is there while the rows are read."""

    files: list[str] = field(default_factory=list)
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each source as it was given, file, folder or dataset: its `weight`, its `rows`, those `kept` as conversations, and
    how many of these each part uses, `train` as often as an epoch shows them."""
    source_of_file: dict[str, str] = field(default_factory=dict)
    """File of a folder -> the folder."""
    skipped_files: list[str] = field(default_factory=list)
    """Files of a folder whose names say that they hold no data."""
    blank_lines: int = 0
    """Blank lines and lines of NUL padding."""
    rejections: list[Rejection] = field(default_factory=list)
    """Rows set aside in reading, duplicates included; after them the conversations that do not fit."""
    notices: Counter[str] = field(default_factory=Counter)
    """Oddities of conversations that were read, by code."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Usable conversations in neither part, by reason."""
    fitted: dict[str, Counter[str]] = field(default_factory=dict)
    """Part -> what became of its conversations, see `agentft.data.truncation.TruncationKind`."""
    changed: list[dict[str, Any]] = field(default_factory=list)
    """Every conversation that is not used whole, and what of it is not used."""
    layout: Counter[str] = field(default_factory=Counter)
    """What the template writes otherwise than the source."""

    @property
    def rows(self) -> int:
        """Everything that was read, blank lines aside."""
        return int(sum(source["rows"] for source in self.sources.values()))

    @property
    def kept(self) -> int:
        """Rows that were read as conversations."""
        return int(sum(source["kept"] for source in self.sources.values()))

    @property
    def rejected(self) -> Counter[str]:
        """Rows set aside in reading, by reason."""
        return Counter(rejection.reason for rejection in self.rejections[: self.rows - self.kept])

    @property
    def lost(self) -> int:
        """Rows set aside, in reading or because they do not fit; a repetition is no loss."""
        return sum(rejection.reason != "duplicate" for rejection in self.rejections)

    def reasons(self) -> dict[str, int]:
        """Return the rows set aside by reason, commonest first."""
        return dict(Counter(rejection.reason for rejection in self.rejections).most_common())

    def used(self, part: str) -> int:
        """Return the conversations of a part that gave at least one example."""
        return self.fitted[part].total() - self.fitted[part]["set_aside"]

    def source(self, name: str, weight: float = 1.0) -> dict[str, float]:
        """Return the numbers of a source, or of the one that a file belongs to; `weight`: of one that is new."""
        return self.sources.setdefault(self.source_of_file.get(name, name), {"weight": weight, "rows": 0, "kept": 0})

    def check_any(self) -> None:
        """Refuse data of which every row was set aside in reading.

        Raises:
            DataError: the commonest reasons, each with its first row, and the formats that are known.
        """
        if self.kept or not self.rejections:
            return
        firsts = {rejection.reason: rejection for rejection in reversed(self.rejections)}
        lines = [f"none of {self.rows:,} rows can be used; they were set aside for:"]
        for reason, count in list(self.reasons().items())[:4]:
            lines.append(f"  {count:,} {reason}, first {firsts[reason].origin}: {firsts[reason].detail};"[:400])
        raise DataError("\n".join([*lines, f"  known formats (dataset.format): {KNOWN}"]))

    def check_losses(self, config: DatasetConfig) -> None:
        """Refuse data of which too much is set aside.

        Raises:
            DataError: more than `dataset.max_rejected` of the rows, duplicates not counted.
        """
        if self.rows and self.lost / self.rows > config.max_rejected:
            examples = "; ".join(f"{r.origin}: {r.reason}: {r.detail}" for r in self.rejections[:3])
            raise DataError(
                f"{self.lost} of {self.rows} rows were set aside, more than dataset.max_rejected={config.max_rejected} "
                f"allows: {self.reasons()}; for example {examples}"
            )

    def rejected_lines(self) -> str:
        """Return a line of JSON for every row that was set aside."""
        lines = (
            {"source": r.origin.source, "line": r.origin.line, "id": r.id, "reason": r.reason, "detail": r.detail}
            for r in self.rejections
        )
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def to_json(self) -> str:
        """Return all of it as JSON."""

        def named(value: Any) -> dict[str, Any]:
            return {part.name: getattr(value, part.name) for part in fields(value)}

        return json.dumps(self, ensure_ascii=False, default=named)

    @staticmethod
    def from_json(text: str) -> PreparationStats:
        """Read what `to_json` wrote: equal statistics, their counts in the same order."""
        values = json.loads(text)
        counters = {name: Counter(values[name]) for name in ("notices", "left_out", "layout")}
        fitted = {part: Counter(outcomes) for part, outcomes in values["fitted"].items()}
        rejections = [Rejection(**each | {"origin": Origin(**each["origin"])}) for each in values["rejections"]]
        return PreparationStats(**values | counters | {"fitted": fitted, "rejections": rejections})


def count_codes(codes: Iterable[str], counted: Counter[str]) -> None:
    """Count codes; where some end with a name, and many names are counted, all further names are one code."""
    for code in codes:
        kind, colon, _ = code.partition(":")
        if colon and code not in counted and sum(k.startswith(kind + ":") for k in counted) >= _MAX_NAMES_NOTED:
            code = f"{kind}:other_names"
        counted[code] += 1


class Deduplicator:
    """Counts the rows of a source in their order, and gives no two conversations one id."""

    def __init__(self, stats: PreparationStats) -> None:
        self._stats = stats
        self._contents: dict[str, str] = {}
        """Id -> content hash."""
        self._renamed: dict[str, set[str]] = {}
        """For an id met with several contents: the further ones."""

    def reject(self, rejection: Rejection) -> Rejection:
        """Count a row that cannot be used, and return why."""
        self._stats.rejections.append(rejection)
        self._stats.source(rejection.origin.source)["rows"] += 1
        return rejection

    def accept(self, origin: Origin, name: str, content_hash: str, notices: Iterable[str]) -> str | Rejection:
        """Count a row that was understood as a conversation, and return the id it gets; a repetition is refused."""
        unique = self._unique(name, content_hash)
        if unique is None:
            return self.reject(Rejection(origin, "duplicate", "the same id and content came before", name))
        count_codes([*notices, *["duplicate_id_renamed"] * (unique != name)], self._stats.notices)
        source = self._stats.source(origin.source)
        source["rows"] += 1
        source["kept"] += 1
        return unique

    def _unique(self, name: str, content_hash: str) -> str | None:
        """Return the id to use, or None for a repetition of what came before."""
        if name not in self._contents:
            self._contents[name] = content_hash
            return name
        copies = self._renamed.setdefault(name, set())
        if content_hash == self._contents[name] or content_hash in copies:
            return None
        number = len(copies) + 2
        while (unique := f"{name}#{number}") in self._contents:
            number += 1
        copies.add(content_hash)
        self._contents[unique] = content_hash
        return unique
