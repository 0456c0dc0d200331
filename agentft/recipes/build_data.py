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
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agentft.data.config import DatasetConfig, SpanWeights, Split
from agentft.data.conversation import Origin
from agentft.data.fit import Outcome
from agentft.data.records import Rejection
from agentft.data.row_work import CONVERSATIONS_A_BATCH, LinesToMake, Made, RowsToRead, RowWork, Understood, batches_of
from agentft.data.sources import Intake, RawRow, bounded_code
from agentft.data.splits import divide, keep_apart
from agentft.data.stored_conversations import ConversationWriter, StoredConversations, index_of
from agentft.data.stored_examples import ExampleWriter, stored_id_type
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder, encode_fast
from agentft.data.workers import Workers, process_count
from agentft.errors import DataError
from agentft.progress import progress_bar
from agentft.recipes.account import Account, write_account
from agentft.recipes.rows import is_large, open_rows

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
    called_tools: frozenset[str]

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


def build_data(config: DatasetConfig, template: Layout, encoder: SegmentEncoder, folder: Path) -> None:
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
            encode_fast(encoder, build, much=is_large(config))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"{folder}: no room for the prepared data ({error.strerror}); free some, or let AGENTFT_DATA_CACHE (without the "
            "cache: TMPDIR) name another folder"
        ) from error


class _Builder:
    def __init__(self, config: DatasetConfig, template: Layout, encoder: SegmentEncoder, folder: Path) -> None:
        self._config = config
        self._work = RowWork(config, template, encoder)
        self._encoder = encoder
        self._folder = folder
        self._account = Account()
        self._examples = ExampleWriter(folder, stored_id_type(encoder.largest_id))
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
        account.check_any()
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
        batches = (RowsToRead(batch, form, part, waiting=kept is not None) for batch in batches_of(rows))
        intake = Intake(self._account.read)
        with progress_bar("reading", None) as bar:
            for batch, results in self._workers(reading_only=kept is not None).in_order(self._work.read, batches):
                for row, result in zip(batch.rows, results, strict=True):
                    understood = self._admit(row, result, batch, intake)
                    if understood is not None:
                        yield self._line(row, understood, kept)
                bar.advance(len(results))

    def _workers(self, *, reading_only: bool = False) -> Workers:
        # Reading alone needs no tokenizer; else processes are forked when it is loaded.
        return Workers(process_count(self._config.workers), lambda: reading_only or self._encoder.settle())

    def _admit(
        self, row: RawRow | Rejection, result: Understood | Rejection, batch: RowsToRead, intake: Intake
    ) -> Understood | None:
        """Count a row; return what was understood under the id that is its own, None where the row is set aside."""
        if isinstance(result, Rejection) or isinstance(row, Rejection):
            assert isinstance(result, Rejection)
            self._account.rejections.append(intake.refuse(row, result))
            return None
        name = intake.admit(row, result.name, result.identity, result.notices)
        if isinstance(name, Rejection):
            self._account.rejections.append(name)
            return None
        if name == result.name:
            return result
        (renamed,) = self._work.read(replace(batch, rows=[row], name=name))
        assert isinstance(renamed, Understood)
        return renamed

    def _line(self, row: RawRow | Rejection, understood: Understood, kept: ConversationWriter | None) -> _Line:
        """Keep what the whole is divided and ordered by, and write down what was made."""
        number = self._lines
        self._lines += 1
        if kept is not None and understood.line is not None:
            kept.append(understood.line)
        if understood.made is not None:
            self._uses[number] = self._write(understood.made)
        names = understood.tools
        return _Line(
            number,
            row.origin.source,
            understood.weight,
            understood.content,
            understood.user,
            self._one(frozenset(names), names),
        )

    def _one(self, value: T, key: Hashable) -> T:
        """The first of the values with this key: what many conversations share is held once."""
        shared: T = self._shared.setdefault((type(value), key), value)
        return shared

    def _write(self, made: Made) -> _Use:
        """Write the examples of a conversation down; for the exam also the conversations that they render."""
        rows = [self._examples.append(example) for example in made.examples]
        talks = [self._heldout.append(line) for line in made.talks]
        self._hashes += made.content_hashes
        return _Use(
            made.outcome,
            rows[0] if rows else 0,
            talks[0] if talks else 0,
            len(rows),
            self._one(made.notes, made.notes),
            self._one(made.tools, made.tools),
            made.change,
            made.rejection,
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
        unmade = iter(numbers)
        batches = (
            LinesToMake([read.line(number) for number in batch], part)
            for batch in iter(lambda: list(islice(unmade, CONVERSATIONS_A_BATCH)), [])
        )
        waiting = iter(numbers)
        with progress_bar(f"tokenising {part}", len(numbers)) as bar:
            for _, made in self._workers().in_order(self._work.make, batches):
                for each in made:
                    self._uses[next(waiting)] = self._write(each)
                bar.advance(len(made))

    def _enter(self, use: _Use, part: str) -> None:
        """Account for a conversation when it is shown for the first time."""
        account = self._account
        account.fitted[part][str(use.outcome)] += 1
        for code in use.notes:
            account.layout[bounded_code(code, account.layout)] += 1
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
        digest = sha256(_said(self._config.span_weights).encode())
        for row in (*rows["train"], -1, *rows["heldout"]):
            digest.update(self._examples.digests[row] if row >= 0 else b"heldout")
        about = {
            "fingerprint": digest.hexdigest(),
            "train_tools": sorted(frozenset[str]().union(*(use.tools for use in train))),
            "heldout_content_hashes": [self._hashes[row] for row in talks],
        }
        (self._folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        write_account(account, self._folder / ACCOUNT)


def _said(weights: SpanWeights) -> str:
    """Return the weights as text; that of reasoning only where it counts otherwise, so that older fingerprints stay."""
    said = f"text={weights.text!r}, call={weights.call!r}, frame={weights.frame!r}, stop={weights.stop!r}"
    return f"SpanWeights({said}{'' if weights.reasoning == 1 else f', reasoning={weights.reasoning!r}'})"


@contextmanager
def _few_collections() -> Iterator[None]:
    """Let the collector of reference cycles come seldom: what is built here is large, and holds hardly any."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
