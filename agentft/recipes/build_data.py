"""Rows of a dataset -> the files of a prepared dataset, with bounded memory whatever their number.

A conversation is in memory while its batch is; what stays of it are two digests, the names of its tools and what became of
it, about a kilobyte. Which part it belongs to is a matter of its own content, so where all conversations are wanted each is
tokenised as it is read and written down in that order; afterwards the order of the sample is only a list of rows. Where
a sample is wanted, or the tools that are held out are to be counted first, conversations are kept in a file while they
are read, and those that are wanted are taken from it in the order of the sample: the others are never tokenised.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agentft.data.calls import ToolRequest
from agentft.data.config import DatasetConfig, Split, TooLong
from agentft.data.fit import Fitted, Outcome, fit_each
from agentft.data.grammar import Call
from agentft.data.records import Conversation, Origin, Rejection
from agentft.data.render import Template
from agentft.data.source_weights import showing_keys
from agentft.data.sources import RawRow, read_conversations
from agentft.data.splits import divide, is_held_out, keep_apart
from agentft.data.stored_conversations import ConversationWriter, StoredConversations, index_of
from agentft.data.stored_examples import ExampleWriter
from agentft.data.tokens import SegmentEncoder, encode_much
from agentft.errors import DataError
from agentft.progress import progress_bar
from agentft.recipes.account import Account, write_account
from agentft.recipes.rows import open_rows

T = TypeVar("T")

HELDOUT = "heldout.jsonl"
"""Conversations of the exam."""
ORDER = "order.npz"
"""Rows of the examples of both parts, and of the exam's conversations, each in its order."""
ABOUT = "about.json"
ACCOUNT = "account.json"
_READ = "read.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Line:
    """What is kept of a conversation to divide and order the whole by."""

    number: int
    source: str
    weight: float
    content: bytes
    user: bytes
    calls: tuple[Call, ...]

    @property
    def content_hash(self) -> str:
        return self.content.hex()

    @property
    def user_hash(self) -> str:
        return self.user.hex()


@dataclass(frozen=True, slots=True)
class _Use:
    """What became of a conversation, and where its examples are."""

    outcome: Outcome
    first_row: int
    """Of its examples, which lie one after the other."""
    first_talk: int
    """Of the conversations that those examples render; of a held-out one only."""
    pieces: int
    notes: tuple[str, ...]
    tools: frozenset[str]
    change: dict[str, Any] | None
    """What of it is not used."""
    rejection: Rejection | None

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + self.pieces)

    @property
    def talks(self) -> range:
        return range(self.first_talk, self.first_talk + self.pieces)


def build_data(config: DatasetConfig, template: Template, encoder: SegmentEncoder, folder: Path) -> None:
    """Read, divide, sample and tokenise a dataset into an empty folder.

    Raises:
        DataError: a source cannot be read, a part is empty, or the disk is full.
        ConfigError: the settings contradict each other.
    """

    def build(encoder: SegmentEncoder) -> None:
        for left in folder.iterdir():  # by an attempt that is given up
            left.unlink()
        _Builder(config, template, encoder, folder).build()

    try:
        with _few_collections():
            encode_much(encoder, build)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"{folder}: no room for the prepared data ({error.strerror}); free some, or let AGENTFT_DATA_CACHE (without the "
            "cache: TMPDIR) name another folder"
        ) from error


class _Builder:
    def __init__(self, config: DatasetConfig, template: Template, encoder: SegmentEncoder, folder: Path) -> None:
        self._config = config
        self._template = template
        self._encoder = encoder
        self._folder = folder
        self._account = Account()
        self._examples = ExampleWriter(folder, encoder.largest_id)
        self._heldout = ConversationWriter(folder / HELDOUT)
        self._hashes: list[str] = []
        """Content of each row of `heldout`."""
        self._uses: dict[int, _Use] = {}
        self._lines = 0
        self._shared: dict[Any, Any] = {}
        """One object for equal ones: sets of tools and notes repeat."""

    def build(self) -> None:
        account, config = self._account, self._config
        rows = open_rows(config, account.read)
        at_once = config.sample < 0 and (config.split is Split.content or rows.heldout is not None)
        kept = None if at_once else ConversationWriter(self._folder / _READ)
        train = list(self._read(rows.train, rows.form, None if rows.heldout is None else "train", kept))
        if rows.heldout is None:
            parts = divide(train, split=config.split, test_ratio=config.test_ratio, seed=config.seed)
        else:
            parts = keep_apart(train, self._read(rows.heldout, rows.form, "heldout", kept), seed=config.seed)
        account.left_out.update(parts.set_aside)
        read = self._reopen(kept)
        uses = {
            part: self._sample(lines, part, read)
            for part, lines in (("train", parts.train), ("heldout", parts.heldout))
        }
        self._finish(uses["train"], uses["heldout"])

    def _read(
        self, rows: Iterable[RawRow | Rejection], form: Any, part: str | None, kept: ConversationWriter | None
    ) -> Iterator[_Line]:
        """Read one source. `part`: the one it is for; `kept`: where its conversations wait, None to tokenise at once."""
        lines: deque[_Line] = deque()
        parts: deque[str] = deque()

        def wanted() -> Iterator[tuple[Conversation, TooLong]]:
            for conversation in self._sound(rows, form):
                line = self._line(conversation)
                lines.append(line)
                if kept is not None:
                    kept.append(conversation)
                    continue
                of = part or ("heldout" if is_held_out(line.user_hash, config.seed, config.test_ratio) else "train")
                if of == "train" and line.weight < 1 and not showing_keys(line.content_hash, line.weight, config.seed):
                    continue
                parts.append(of)
                numbers.append(line.number)
                yield conversation, self._too_long(of)

        config = self._config
        numbers: deque[int] = deque()
        with progress_bar("reading", None) as bar:
            for fitted in fit_each(wanted(), self._template, self._encoder, config.max_length):
                self._uses[numbers.popleft()] = self._write(fitted, parts.popleft())
                bar.advance()
        yield from lines

    def _sound(self, rows: Iterable[RawRow | Rejection], form: Any) -> Iterator[Conversation]:
        for item in read_conversations(rows, form=form, report=self._account.read):
            if isinstance(item, Rejection):
                self._account.rejections.append(item)
            else:
                yield item

    def _line(self, conversation: Conversation) -> _Line:
        self._lines += 1
        names = frozenset(request.name for call in conversation.calls for request in call.requests)
        return _Line(
            self._lines - 1,
            conversation.origin.source,
            conversation.weight,
            bytes.fromhex(conversation.content_hash),
            bytes.fromhex(conversation.user_hash),
            self._one(tuple(Call("", (ToolRequest(name, {}),), None) for name in sorted(names)), names),
        )

    def _one(self, value: T, key: Hashable) -> T:
        """The first of the values with this key: what many conversations share is held once."""
        shared: T = self._shared.setdefault((type(value), key), value)
        return shared

    def _too_long(self, part: str) -> TooLong:
        how = self._config.too_long
        return how if part == "train" else how.of_heldout

    def _write(self, fitted: Fitted, part: str) -> _Use:
        """Write the examples of a conversation down; for the exam also the conversations that they render."""
        rows = [self._examples.append(piece.example) for piece in fitted.pieces]
        talks = [self._heldout.append(piece.conversation) for piece in fitted.pieces] if part == "heldout" else []
        self._hashes += [piece.conversation.content_hash for piece in fitted.pieces] if talks else []
        names = frozenset(r.name for p in fitted.pieces for call in p.conversation.calls for r in call.requests)
        notes = tuple(self._template.notes(fitted.original)) if fitted.problem is None else ()
        problem = fitted.problem and Rejection(fitted.original.origin, *fitted.problem, id=fitted.original.id)
        return _Use(
            fitted.outcome,
            rows[0] if rows else 0,
            talks[0] if talks else 0,
            len(rows),
            self._one(notes, notes),
            self._one(names, names),
            None if fitted.outcome is Outcome.whole else _change(fitted, part),
            problem,
        )

    def _reopen(self, kept: ConversationWriter | None) -> StoredConversations | None:
        """Open what was kept and take its names away: it ends with this process, whatever happens."""
        if kept is None:
            return None
        kept.close()
        path = self._folder / _READ
        read = StoredConversations(path)
        path.unlink()
        index_of(path).unlink()
        return read

    def _sample(self, order: list[_Line], part: str, read: StoredConversations | None) -> list[_Use]:
        """Take conversations in sample order until enough of them fit; what does not fit is set aside and counted."""
        sample = self._config.sample if part == "train" else self._config.test_sample
        if sample > len(order):
            text = "dataset: a sample of %d was asked for, the %s part has %d conversations"
            log.warning(text, sample, part, len(order))
        wanted = len(order) if sample < 0 else min(sample, len(order))
        account = self._account
        account.fitted[part], account.by_source[part] = Counter(), Counter()
        shown_before: set[int] = set()
        uses: list[_Use] = []
        position = 0
        while len(uses) < wanted and position < len(order):
            lines = order[position : position + wanted - len(uses)]
            position += len(lines)
            if read is not None:
                self._tokenise(lines, part, read)
            for line in lines:
                use = self._uses[line.number]
                if line.number not in shown_before:
                    self._enter(use, part)
                shown_before.add(line.number)
                if use.rejection is None:
                    uses.append(use)
                    account.by_source[part][account.read.source_of(Origin(line.source, 0))] += 1
        return uses

    def _tokenise(self, lines: list[_Line], part: str, read: StoredConversations) -> None:
        numbers = [number for number in dict.fromkeys(line.number for line in lines) if number not in self._uses]
        items = ((read[number], self._too_long(part)) for number in numbers)
        fitted = fit_each(items, self._template, self._encoder, self._config.max_length)
        with progress_bar(f"tokenising {part}", len(numbers)) as bar:
            for number, each in zip(numbers, fitted, strict=True):
                self._uses[number] = self._write(each, part)
                bar.advance()

    def _enter(self, use: _Use, part: str) -> None:
        """Account for a conversation when it is shown for the first time."""
        account = self._account
        account.fitted[part][str(use.outcome)] += 1
        account.layout.update(use.notes)
        if use.change is not None:
            account.changed.append(use.change)
        if use.rejection is not None:
            account.rejections.append(use.rejection)

    def _finish(self, train: list[_Use], heldout: list[_Use]) -> None:
        account = self._account
        if not train or not heldout:
            account.check_losses(self._config)
            raise DataError(
                f"no {'training' if not train else 'held-out'} conversation is left of {account.read.rows} rows; "
                f"set aside: {account.reasons()}"
            )
        self._examples.close()
        self._heldout.close()
        rows = {
            part: [row for use in uses for row in use.rows] for part, uses in (("train", train), ("heldout", heldout))
        }
        talks = [row for use in heldout for row in use.talks]
        order = {name: np.asarray(of, dtype=np.int64) for name, of in (*rows.items(), ("talks", talks))}
        np.savez(self._folder / ORDER, train=order["train"], heldout=order["heldout"], talks=order["talks"])
        digest = sha256(repr(self._config.span_weights).encode())
        for row in (*rows["train"], -1, *rows["heldout"]):
            digest.update(self._examples.digests[row] if row >= 0 else b"heldout")
        about = {
            "fingerprint": digest.hexdigest(),
            "train_tools": sorted(frozenset[str]().union(*(use.tools for use in train))),
            "heldout_content_hashes": [self._hashes[row] for row in talks],
        }
        (self._folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        write_account(account, self._folder / ACCOUNT)


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


@contextmanager
def _few_collections() -> Iterator[None]:
    """Let the collector of reference cycles come seldom: what is built here is large, and holds hardly any."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
