"""What is done with a batch of rows, in this process or in a forked one: from rows to what is written down of them.

It keeps no state between batches and asks for none, so batches can be worked on anywhere and in any order. What needs
their order, ids and duplicates and counts, is done with the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from agentft.data.config import DatasetConfig, Format, TooLong
from agentft.data.conversation import Conversation
from agentft.data.fit import Fitted, Fitter, Outcome
from agentft.data.records import Notice, Rejection, read_record
from agentft.data.source_weights import showing_keys
from agentft.data.sources import RawRow, identity
from agentft.data.splits import is_held_out
from agentft.data.stored_conversations import from_line, to_line
from agentft.data.stored_examples import PackedExample, pack, stored_id_type
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder

CONVERSATIONS_A_BATCH = 64
_CHARACTERS_A_BATCH = 250_000


class Made(NamedTuple):
    """What became of a conversation that a part wants."""

    outcome: Outcome
    examples: tuple[PackedExample, ...]
    talks: tuple[bytes, ...]
    """Of a held-out one the conversations that the examples render, as they are stored."""
    content_hashes: tuple[str, ...]
    """Of those."""
    notes: tuple[str, ...]
    tools: frozenset[str]
    change: dict[str, Any] | None
    """What of it is not used."""
    rejection: Rejection | None


class Understood(NamedTuple):
    """A row that was read as a conversation."""

    name: str
    identity: int
    notices: Sequence[Notice]
    weight: float
    content: bytes
    """SHA-256 of all its text."""
    user: bytes
    """SHA-256 of its user turns."""
    tools: tuple[str, ...]
    """Names of the tools it calls, sorted."""
    line: bytes | None
    """The conversation as it is stored, where it waits to be wanted."""
    made: Made | None
    """None where it waits, and where its source's weight leaves it out."""


@dataclass(frozen=True, slots=True)
class RowsToRead:
    """A batch of one source."""

    rows: Sequence[RawRow | Rejection]
    form: Format
    part: str | None
    """The part that the source is for; None: what a conversation says decides."""
    waiting: bool
    """Only read: conversations are stored, since which of them are wanted shows later."""
    name: str | None = None
    """Of the one conversation, in place of its own."""


@dataclass(frozen=True, slots=True)
class LinesToMake:
    """Stored conversations that a part wants."""

    lines: Sequence[bytes]
    part: str


@dataclass(frozen=True, slots=True)
class RowWork:
    """The work, with all that decides its results."""

    config: DatasetConfig
    template: Layout
    encoder: SegmentEncoder

    def read(self, batch: RowsToRead) -> list[Understood | Rejection]:
        """Read rows, and make what is wanted of them."""
        read = [self._read(row, batch) for row in batch.rows]
        made = iter(self._make([(r.conversation, r.part) for r in read if isinstance(r, _Read) and r.part is not None]))
        return [
            each if isinstance(each, Rejection) else each.understood(None if each.part is None else next(made))
            for each in read
        ]

    def _read(self, row: RawRow | Rejection, batch: RowsToRead) -> _Read | Rejection:
        if isinstance(row, Rejection):
            return row
        outcome = read_record(
            row.value, row.origin, form=batch.form, weight=row.weight, reasoning=self.config.reasoning
        )
        if isinstance(outcome, Rejection):
            return outcome
        conversation, notices = outcome
        if batch.name is not None:
            conversation = replace(conversation, id=batch.name)
        hashes = conversation.content_hash, conversation.user_hash
        part = None if batch.waiting else self._part(batch.part, conversation.weight, *hashes)
        return _Read(conversation, notices, *hashes, part, to_line(conversation) if batch.waiting else None)

    def make(self, batch: LinesToMake) -> list[Made]:
        """Make what is wanted of stored conversations."""
        return list(self._make([(from_line(line), batch.part) for line in batch.lines]))

    def _part(self, part: str | None, weight: float, content_hash: str, user_hash: str) -> str | None:
        """The part that a conversation belongs to; None where no epoch shows it."""
        seed = self.config.seed
        part = part or ("heldout" if is_held_out(user_hash, seed, self.config.test_ratio) else "train")
        return None if part == "train" and weight < 1 and not showing_keys(content_hash, weight, seed) else part

    def _make(self, wanted: Sequence[tuple[Conversation, str]]) -> Iterator[Made]:
        fitter = Fitter(self.template, self.encoder, self.config.max_length)
        fitted = fitter.fit([(conversation, self._too_long(part)) for conversation, part in wanted])
        id_type = stored_id_type(self.encoder.largest_id)
        for each, (_, part) in zip(fitted, wanted, strict=True):
            shown = each.pieces if part == "heldout" else ()
            yield Made(
                each.outcome,
                tuple([pack(piece.example, id_type) for piece in each.pieces]),
                tuple([to_line(piece.conversation) for piece in shown]),
                tuple([piece.conversation.content_hash for piece in shown]),
                each.notes if each.problem is None else (),
                frozenset().union(*(piece.conversation.called_tools for piece in each.pieces)),
                None if each.outcome is Outcome.whole else _change(each, part),
                each.problem and Rejection(each.original.origin, *each.problem, id=each.original.id),
            )

    def _too_long(self, part: str) -> TooLong:
        how = self.config.too_long
        return how if part == "train" else how.of_heldout


class _Read(NamedTuple):
    """A conversation before anything is made of it."""

    conversation: Conversation
    notices: list[Notice]
    content_hash: str
    user_hash: str
    part: str | None
    line: bytes | None

    def understood(self, made: Made | None) -> Understood:
        """What is handed on of it."""
        conversation = self.conversation
        return Understood(
            conversation.id,
            identity(self.content_hash),
            self.notices,
            conversation.weight,
            bytes.fromhex(self.content_hash),
            bytes.fromhex(self.user_hash),
            tuple(sorted(conversation.called_tools)),
            self.line,
            made,
        )


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


def batches_of(rows: Iterable[RawRow | Rejection]) -> Iterator[list[RawRow | Rejection]]:
    """Cut a stream by number and, since whole batches are in memory, by characters."""
    batch: list[RawRow | Rejection] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += 0 if isinstance(row, Rejection) else _characters(row.value)
        if len(batch) == CONVERSATIONS_A_BATCH or characters >= _CHARACTERS_A_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(value: object, depth: int = 5) -> int:
    """About how much text a raw value holds; what lies deeper than a turn's fields counts nothing."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum([_characters(each, depth - 1) for each in inner]) if depth else 0
