"""Prepare a dataset: from its settings to tokenised training examples and held-out conversations, with every row accounted for.

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
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agentft.data.cache import code_is_as_loaded, key_ingredients, key_of, open_cache
from agentft.data.config import DatasetConfig, SpanWeights, Split
from agentft.data.conversation import Conversation, Origin
from agentft.data.prepared import (
    ABOUT,
    ACCOUNT,
    ORDER,
    PIECES,
    PreparationStats,
    PreparedData,
    log_summary,
    open_prepared,
    write_account,
)
from agentft.data.records import Rejection
from agentft.data.sources import Intake, RawRow, bounded_code, is_large, open_rows
from agentft.data.splits import Parts, divide, keep_apart
from agentft.data.store import (
    ConversationWriter,
    ExampleWriter,
    StoredConversations,
    StoredExamples,
    index_of,
    stored_id_type,
)
from agentft.data.template_choice import Layout
from agentft.data.tokens import Example, SegmentEncoder, encode_fast
from agentft.data.truncation import TruncationKind
from agentft.data.workers import (
    CONVERSATIONS_A_BATCH,
    LinesToMake,
    Made,
    RowsToRead,
    RowWork,
    Understood,
    batches_of,
    in_order,
    killed_worker_in_words,
    process_count,
)
from agentft.errors import DataError
from agentft.progress import progress_bar

B = TypeVar("B")
R = TypeVar("R")
T = TypeVar("T")

_READ = "read.jsonl"

log = logging.getLogger(__name__)


def prepare_data(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> PreparedData:
    """Read, divide, sample and tokenise a dataset, or find it done before with the same settings.

    Raises:
        DataError: a source cannot be read, a part is empty, or more rows were set aside than `dataset.max_rejected`.
        ConfigError: the settings contradict each other.
    """
    started = time.perf_counter()
    prepared = _cached(config, template, encoder) if config.cache else None
    if prepared is None:
        with tempfile.TemporaryDirectory(prefix="agentft-data-") as folder:
            build_data(config, template, encoder, Path(folder))
            prepared = open_prepared(Path(folder), config)
    prepared.account.check_losses(config)
    log_summary(prepared, time.perf_counter() - started)
    return prepared


def _cached(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> PreparedData | None:
    """Return the data from the cache, made there if need be; None where it cannot be kept."""
    cache = open_cache(config.cache_limit_gb)
    ingredients = None if cache is None else key_ingredients(config, template, encoder)
    if cache is None or ingredients is None:
        return None
    if not code_is_as_loaded():
        log.warning("data: not cached, the code in %s changed after this process began", Path(__file__).parent.parent)
        return None

    def build(folder: Path) -> dict[str, Any]:
        build_data(config, template, encoder, folder)
        if ingredients != key_ingredients(config, template, encoder):
            raise DataError(
                "the files of the dataset, or the code that reads them, changed while they were read: start again"
            )
        return ingredients

    return cache.fetch(key_of(ingredients), build=build, open_=lambda folder: open_prepared(folder, config))


def build_data(config: DatasetConfig, template: Layout, encoder: SegmentEncoder, folder: Path) -> None:
    """Read, divide, sample and tokenise a dataset into an empty folder.

    Raises:
        DataError: a source cannot be read, a part is empty, or the disk is full.
        ConfigError: the settings contradict each other.
    """
    _build(config, template, encoder, folder, _Builder.build)


@dataclass(frozen=True, slots=True)
class Use:
    """What became of a conversation, and where its examples are."""

    outcome: TruncationKind
    examples: int
    first_row: int
    """Of its examples, which lie one after the other."""
    first_piece: int
    """Of the conversations that those examples render, where these are kept."""
    notes: tuple[str, ...]
    tools: frozenset[str]
    change: dict[str, Any] | None
    """What of it is not used."""
    rejection: Rejection | None

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + self.examples)

    @property
    def pieces(self) -> range:
        return range(self.first_piece, self.first_piece + self.examples)


@dataclass(frozen=True, slots=True)
class EveryConversation:
    """All that a dataset holds and what becomes of each conversation, for who looks at the data itself."""

    conversations: StoredConversations
    """In the order of their sources."""
    part_of: list[str | None]
    """`train` or `heldout` for each; None: neither."""
    used: dict[str, list[Use]]
    """Part -> its conversations in sample order, in training as often as an epoch shows them."""
    account: PreparationStats
    empty_parts: list[str]
    """Why a part is empty, where one is."""
    _uses: dict[int, Use]
    _examples: StoredExamples
    _pieces: StoredConversations

    def use_of(self, index: int) -> Use | None:
        """Return what became of a conversation; None where no part wants it."""
        return self._uses.get(index)

    def made_of(self, index: int) -> list[tuple[Conversation, Example]]:
        """Return the examples that were made of a conversation, each with the conversation that it renders."""
        use = self._uses.get(index)
        rows = zip(use.pieces, use.rows, strict=True) if use else ()
        return [(self._pieces[piece], self._examples[row]) for piece, row in rows]

    def examples(self, part: str) -> StoredExamples:
        """Return the examples of a part in their order."""
        return self._examples.chosen(np.array([row for use in self.used[part] for row in use.rows], dtype=np.int64))


def look_at_every_conversation(
    config: DatasetConfig,
    template: Layout,
    encoder: SegmentEncoder,
    look: Callable[[EveryConversation, SegmentEncoder], T],
) -> T:
    """Prepare a dataset without samples and limits, keep every conversation, and return what `look` makes of all of them.

    Nothing is cached. `look` is given an encoder that is ready for much text; it may be asked again, from the start.

    Raises:
        DataError: a source cannot be read, or the disk is full. That a part is empty, or much is set aside, is no error here.
        ConfigError: the settings contradict each other.
    """
    config = replace(config, max_samples=-1, test_sample=-1)

    def work(builder: _Builder) -> T:
        return look(builder.build_every_conversation(), builder.encoder)

    with tempfile.TemporaryDirectory(prefix="agentft-data-") as folder:
        return _build(config, template, encoder, Path(folder), work, keeps_all=True)


def _build(
    config: DatasetConfig,
    template: Layout,
    encoder: SegmentEncoder,
    folder: Path,
    work: Callable[[_Builder], T],
    *,
    keeps_all: bool = False,
) -> T:
    def build(encoder: SegmentEncoder) -> T:
        for left in folder.iterdir():  # by an attempt that is given up
            left.unlink()
        return work(_Builder(config, template, encoder, folder, keeps_all=keeps_all))

    try:
        with _few_collections(), killed_worker_in_words():
            return encode_fast(encoder, build, much=is_large(config))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"{folder}: no room for the prepared data ({error.strerror}); free some, or let AGENTFT_DATA_CACHE (without the "
            "cache: TMPDIR) name another folder"
        ) from error


@contextmanager
def _few_collections() -> Iterator[None]:
    """Let the collector of reference cycles come seldom: what is built here is large, and holds hardly any."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


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


class _Builder:
    def __init__(
        self, config: DatasetConfig, template: Layout, encoder: SegmentEncoder, folder: Path, *, keeps_all: bool
    ) -> None:
        self._config = config
        self._work = RowWork(config, template, encoder, keeps_pieces=keeps_all)
        self._keeps_all = keeps_all
        self.encoder = encoder
        self._folder = folder
        self._account = PreparationStats()
        self._examples = ExampleWriter(folder, stored_id_type(encoder.largest_id))
        self._pieces = ConversationWriter(folder / PIECES)
        self._waiting: ConversationWriter | None = None
        """Where conversations are kept while they are read; None: each is tokenised at once."""
        self._hashes: list[str] = []
        """Content of each row of `_pieces`."""
        self._uses: dict[int, Use] = {}
        self._lines = 0
        self._shared: dict[Any, Any] = {}
        """One object for equal ones: sets of tools and notes repeat."""

    def build(self) -> None:
        """Write the files of a prepared dataset."""
        train, heldout = self._read_all()
        self._account.check_any()
        uses = self._sample_both(self._divide(train, heldout), self._reopen())
        self._finish(uses["train"], uses["heldout"])

    def build_every_conversation(self) -> EveryConversation:
        """Tokenise everything, whatever is wrong with it."""
        train, heldout = self._read_all()
        empty_parts: list[str] = []
        try:
            parts = self._divide(train, heldout)
        except DataError as error:
            parts = Parts([], [])
            empty_parts = [str(error)]
        if heldout is not None:
            named = (("training", parts.train), ("held-out", parts.heldout))
            empty_parts = [f"no conversation is left for the {name} part" for name, lines in named if not lines]
        read = self._reopen()
        assert read is not None
        used = self._sample_both(parts, read)
        part_of: list[str | None] = [None] * self._lines
        for part, lines in (("train", parts.train), ("heldout", parts.heldout)):
            for line in lines:
                part_of[line.number] = part
        self._close()
        examples, pieces = StoredExamples(self._folder), StoredConversations(self._folder / PIECES)
        return EveryConversation(read, part_of, used, self._account, empty_parts, self._uses, examples, pieces)

    def _read_all(self) -> tuple[list[_Line], list[_Line] | None]:
        """Read the training source and, where there is one, the held-out source."""
        rows = open_rows(self._config, self._account.read)
        parts_are_known = self._config.split is Split.content or rows.heldout is not None
        if self._keeps_all or self._config.max_samples >= 0 or not parts_are_known:
            self._waiting = ConversationWriter(self._folder / _READ)
        train = list(self._read(rows.train, rows.form, None if rows.heldout is None else "train"))
        return train, None if rows.heldout is None else list(self._read(rows.heldout, rows.form, "heldout"))

    def _divide(self, train: list[_Line], heldout: list[_Line] | None) -> Parts[_Line]:
        config = self._config
        if heldout is None:
            parts = divide(train, split=config.split, test_ratio=config.test_ratio, seed=config.seed)
        else:
            parts = keep_apart(train, heldout, seed=config.seed)
        self._account.left_out.update(parts.set_aside)
        return parts

    def _read(self, rows: Iterable[RawRow | Rejection], form: Any, part: str | None) -> Iterator[_Line]:
        """Read one source; `part`: the one it is for."""
        waiting = self._waiting is not None
        batches = (RowsToRead(batch, form, part, waiting) for batch in batches_of(rows))
        intake = Intake(self._account.read)
        with progress_bar("reading", None) as bar:
            # Reading alone needs no tokenizer; else processes are forked when it is loaded.
            ready = self.encoder.settle if not waiting else lambda: True
            for batch, results in self._on_all_cores(self._work.read, batches, ready):
                for row, result in zip(batch.rows, results, strict=True):
                    understood = self._admit(row, result, batch, intake)
                    if understood is not None:
                        yield self._line(row, understood)
                bar.advance(len(results))

    def _on_all_cores(
        self, work: Callable[[B], R], batches: Iterable[B], ready: Callable[[], bool]
    ) -> Iterator[tuple[B, R]]:
        return in_order(work, batches, processes=process_count(self._config.workers), ready=ready)

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

    def _line(self, row: RawRow | Rejection, understood: Understood) -> _Line:
        """Keep what the whole is divided and ordered by, and write down what was made."""
        number = self._lines
        self._lines += 1
        if self._waiting is not None and understood.line is not None:
            self._waiting.append(understood.line)
        if understood.made is not None:
            self._uses[number] = self._write(understood.made)
        tools = self._one(frozenset(understood.tools))
        return _Line(number, row.origin.source, understood.weight, understood.content, understood.user, tools)

    def _one(self, value: T) -> T:
        """Return the first of equal values: what many conversations share is held once."""
        shared: T = self._shared.setdefault(value, value)
        return shared

    def _write(self, made: Made) -> Use:
        """Write the examples of a conversation down; for held-out ones also the conversations that they render."""
        rows = [self._examples.append(example) for example in made.examples]
        pieces = [self._pieces.append(line) for line in made.pieces]
        self._hashes += made.content_hashes
        return Use(
            made.outcome,
            len(rows),
            rows[0] if rows else 0,
            pieces[0] if pieces else 0,
            self._one(made.notes),
            self._one(made.tools),
            made.change,
            made.rejection,
        )

    def _reopen(self) -> StoredConversations | None:
        """Open what was kept and take its names away: it ends with this process, whatever happens."""
        if self._waiting is None:
            return None
        self._waiting.close()
        path = self._folder / _READ
        read = StoredConversations(path)
        path.unlink()
        index_of(path).unlink()
        return read

    def _sample_both(self, parts: Parts[_Line], read: StoredConversations | None) -> dict[str, list[Use]]:
        samples = (
            ("train", parts.train, self._config.max_samples),
            ("heldout", parts.heldout, self._config.test_sample),
        )
        return {part: self._sample(lines, part, size, read) for part, lines, size in samples}

    def _sample(self, order: list[_Line], part: str, size: int, read: StoredConversations | None) -> list[Use]:
        """Take conversations in sample order until enough of them fit; what does not fit is set aside and counted."""
        if size > len(order):
            text = "dataset: a sample of %d was asked for, the %s part has %d conversations"
            log.warning(text, size, part, len(order))
        wanted = len(order) if size < 0 else min(size, len(order))
        account = self._account
        account.fitted[part], account.by_source[part] = Counter(), Counter()
        shown_before: set[int] = set()
        uses: list[Use] = []
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
        unmade, waiting = iter(numbers), iter(numbers)
        batches = (
            LinesToMake([read.line(number) for number in batch], part)
            for batch in iter(lambda: list(islice(unmade, CONVERSATIONS_A_BATCH)), [])
        )
        with progress_bar(f"tokenising {part}", len(numbers)) as bar:
            for _, made in self._on_all_cores(self._work.make, batches, self.encoder.settle):
                for each in made:
                    self._uses[next(waiting)] = self._write(each)
                bar.advance(len(made))

    def _enter(self, use: Use, part: str) -> None:
        """Account for a conversation when it is shown for the first time."""
        account = self._account
        account.fitted[part][str(use.outcome)] += 1
        for code in use.notes:
            account.layout[bounded_code(code, account.layout)] += 1
        if use.change is not None:
            account.changed.append(use.change)
        if use.rejection is not None:
            account.rejections.append(use.rejection)

    def _close(self) -> None:
        self._examples.close()
        self._pieces.close()

    def _finish(self, train: list[Use], heldout: list[Use]) -> None:
        account = self._account
        if not train or not heldout:
            account.check_losses(self._config)
            raise DataError(
                f"no {'training' if not train else 'held-out'} conversation is left of {account.read.rows} rows; "
                f"set aside: {account.reasons()}"
            )
        self._close()
        train_rows, heldout_rows = ([row for use in uses for row in use.rows] for uses in (train, heldout))
        pieces = [piece for use in heldout for piece in use.pieces]
        train_order, heldout_order, piece_order = (
            np.asarray(order, dtype=np.int64) for order in (train_rows, heldout_rows, pieces)
        )
        np.savez(self._folder / ORDER, train=train_order, heldout=heldout_order, pieces=piece_order)
        digest = sha256(_written(self._config.span_weights).encode())
        for row in (*train_rows, -1, *heldout_rows):
            digest.update(self._examples.digests[row] if row >= 0 else b"heldout")
        about = {
            "fingerprint": digest.hexdigest(),
            "train_tools": sorted(frozenset[str]().union(*(use.tools for use in train))),
            "heldout_content_hashes": [self._hashes[piece] for piece in pieces],
        }
        (self._folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        write_account(account, self._folder / ACCOUNT)


def _written(weights: SpanWeights) -> str:
    """Return the weights as text; by the names and with the values that older fingerprints have."""
    text = f"text={weights.text!r}, call={weights.call!r}, frame={weights.call_syntax!r}, stop={weights.stop!r}"
    return f"SpanWeights({text}{'' if weights.reasoning == 1 else f', reasoning={weights.reasoning!r}'})"
