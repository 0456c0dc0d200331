"""Prepare a dataset: from its settings to tokenised training examples and held-out conversations, with every row accounted for.

Row -> conversation -> part -> examples, in batches that all cores share (`entries.py`). Where all conversations are wanted
each is made into examples as it is read. Where a sample is wanted, or the tools that are held out are to be counted first,
they wait in a file, and those of the sample are made in its order. An `Entry` of each stays in memory, less than a kilobyte.

Prepared data is cached under a key of all that decides it, see `key_ingredients`.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cached_property, partial
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from agentft.cache import build_once, cache_root, file_digest, is_sealed, mark_used, seal
from agentft.data.config import DatasetConfig, Format, LocalConfig, SpanWeights, Split
from agentft.data.conversation import Conversation
from agentft.data.entries import (
    BATCH_CONVERSATIONS,
    ConversationResult,
    Entry,
    Parts,
    RowWork,
    batches_of,
    divide,
    in_order,
    keep_apart,
    killed_worker_in_words,
)
from agentft.data.prepared import (
    ExampleWriter,
    PreparedData,
    RecordWriter,
    StoredConversations,
    StoredExamples,
    log_summary,
    open_prepared,
    write_about,
)
from agentft.data.records import Rejection
from agentft.data.render import MsagentTemplate
from agentft.data.sources import (
    Deduplicator,
    PreparationStats,
    RawRow,
    count_codes,
    is_large,
    open_rows,
    source_digests,
)
from agentft.data.template_choice import Layout
from agentft.data.tokens import Example, SegmentEncoder, encode_fast
from agentft.errors import DataError
from agentft.progress import progress_bar
from agentft.settings import affects

PARTS = {"train": "training", "heldout": "held-out"}
"""Their folders, and what messages call them."""
_WAITING = "waiting.jsonl"

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = ("tokenizers", "fastokens", "pyarrow", "zstandard", "datasets", "modelscope")
_NOT_IN_KEY = {name for name, what in affects(DatasetConfig).items() if what == "nothing"} | {"name"}
"""The same settings by another name give the same data."""
_STARTED = psutil.Process().create_time()
"""Taken on import: a process that is forked later goes on with the code of the one that imported it."""

T = TypeVar("T")

log = logging.getLogger(__name__)


def prepare_data(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> PreparedData:
    """Read, divide, sample and tokenise a dataset, or find it done before with the same settings.

    Raises:
        DataError: a source cannot be read, a part is empty, or more rows were set aside than `dataset.max_rejected`.
        ConfigError: the settings contradict each other.
    """
    started = time.perf_counter()
    prepared = _from_cache(config, template, encoder) if config.cache else None
    if prepared is None:
        with tempfile.TemporaryDirectory(prefix="agentft-data-") as folder:
            build_data(config, template, encoder, Path(folder))
            prepared = open_prepared(Path(folder), config)
    prepared.stats.check_losses(config)
    log_summary(prepared, time.perf_counter() - started)
    return prepared


def _from_cache(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> PreparedData | None:
    """Return the data from the cache, made there if need be; None where it cannot be kept."""
    root = Path(os.environ.get("AGENTFT_DATA_CACHE") or cache_root(None) / "data").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        log.warning("data: no cache, %s cannot be written: %s", root, error.strerror)
        return None
    ingredients = key_ingredients(config, template, encoder)
    if ingredients is None:
        return None
    if any(path.stat().st_mtime >= _STARTED for path in _code()):
        log.warning("data: not cached, the code in %s changed after this process began", _PACKAGE)
        return None
    built = False

    def build(folder: Path) -> None:
        nonlocal built
        build_data(config, template, encoder, folder)
        if ingredients != key_ingredients(config, template, encoder):
            raise DataError(
                "the files of the dataset, or the code that reads them, changed while they were read: start again"
            )
        seal(folder, ingredients)
        built = True

    key = sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:32]
    folder = build_once(root / key, build, is_whole=is_sealed)
    prepared = open_prepared(folder, config)
    log.info("data: %s the cache, %s", "kept in" if built else "from", folder)
    mark_used(folder, config.cache_limit_gb * 1e9)
    return prepared


def key_ingredients(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> dict[str, Any] | None:
    """Return everything that decides the data, as JSON; None where a source gives no bytes to know it by.

    Raises:
        DataError: a source cannot be read.
    """
    sources = source_digests(config)
    if sources is None:
        return None
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_IN_KEY}
    ingredients = {
        "sources": sources,
        "settings": {"class": type(config).__name__, **settings},
        "template": asdict(template) if isinstance(template, MsagentTemplate) else template.identity,
        "tokenizer": encoder.fingerprint(),
        "code": {str(path.relative_to(_PACKAGE)): file_digest(path) for path in _code()},
        "versions": {name: version(name) for name in _LIBRARIES if find_spec(name)}
        | {"python": platform.python_version()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(ingredients, default=str))
    return plain


def _code() -> list[Path]:
    return [path for kind in ("*.py", "*.yaml") for path in sorted((_PACKAGE / "data").rglob(kind))]


def build_data(config: DatasetConfig, template: Layout, encoder: SegmentEncoder, folder: Path) -> None:
    """Read, divide, sample and tokenise a dataset into an empty folder.

    Raises:
        DataError: a source cannot be read, a part is empty, or the disk is full.
        ConfigError: the settings contradict each other.
    """
    _build(config, template, encoder, folder, Preparation.write)


def look_at_every_conversation(
    config: DatasetConfig,
    template: Layout,
    encoder: SegmentEncoder,
    look: Callable[[Preparation, SegmentEncoder], T],
) -> T:
    """Prepare a dataset without samples and limits, keep every conversation, and return what `look` makes of all of them.

    Nothing is cached. `look` is given an encoder that is ready for much text; it may be asked again, from the start.

    Raises:
        DataError: a source cannot be read, or the disk is full. That a part is empty, or much is set aside, is no error here.
        ConfigError: the settings contradict each other.
    """
    config = replace(config, max_samples=-1, test_sample=-1)

    def work(preparation: Preparation) -> T:
        preparation.run()
        return look(preparation, preparation.work.encoder)

    with tempfile.TemporaryDirectory(prefix="agentft-data-") as folder:
        return _build(config, template, encoder, Path(folder), work, keeps_all=True)


def _build(
    config: DatasetConfig,
    template: Layout,
    encoder: SegmentEncoder,
    folder: Path,
    work: Callable[[Preparation], T],
    *,
    keeps_all: bool = False,
) -> T:
    def build(encoder: SegmentEncoder, waits: bool = keeps_all) -> T:
        for left in folder.iterdir():  # by an attempt that is given up
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return work(Preparation(RowWork(config, template, encoder, keeps_all), folder, waits=waits))

    collections = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)  # what is built here is large, and holds hardly any reference cycles
    try:
        with killed_worker_in_words():
            try:
                return encode_fast(encoder, build, much=is_large(config))
            except _FewHeldOutError:
                log.info("data: few conversations, read again to hold more of them out")
                return encode_fast(encoder, partial(build, waits=True), much=is_large(config))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"{folder}: no room for the prepared data ({error.strerror}); free some, or let AGENTFT_DATA_CACHE (without the "
            "cache: TMPDIR) name another folder"
        ) from error
    finally:
        gc.set_threshold(*collections)


class _FewHeldOutError(Exception):
    """Conversations that are trained examples already are held out, since there are few."""


class Preparation:
    """A dataset while it is prepared, and what became of each of its conversations."""

    def __init__(self, work: RowWork, folder: Path, *, waits: bool = False) -> None:
        """Begin the files of a prepared dataset in an empty folder; `waits`: divide before anything is tokenised."""
        self.work = work
        self.stats = PreparationStats()
        self.entries: list[Entry] = []
        """Every conversation, in the order of the sources."""
        self.used: dict[str, list[Entry]] = {}
        """Part -> its conversations in sample order, in training as often as an epoch shows it."""
        self.empty_parts: list[str] = []
        """Why a part is empty, where one is and all conversations are kept."""
        self._config = work.config
        may_be_few = (
            work.config.test_ratio is None and isinstance(work.config, LocalConfig) and not is_large(work.config)
        )
        self._waits = waits or may_be_few or work.config.max_samples >= 0
        self._folder = folder
        self._writers = {part: ExampleWriter(folder / part) for part in PARTS}
        self._waiting: RecordWriter | None = None
        """Where conversations are kept while they are read; None: each is made at once."""
        self._waited: StoredConversations | None = None
        self._shared: dict[Any, Any] = {}
        """One object for equal ones: sets of tools and notes repeat."""

    @property
    def conversations(self) -> StoredConversations:
        """Return every conversation, in the order of the entries, where all are kept."""
        assert self._waited is not None
        return self._waited

    @cached_property
    def _made(self) -> dict[str, tuple[StoredExamples, StoredConversations]]:
        examples = {part: StoredExamples(self._folder / part) for part in PARTS}
        return {part: (own, own.conversations()) for part, own in examples.items()}

    def examples(self, part: str) -> StoredExamples:
        """Return the examples of a part in their order."""
        return self._made[part][0]

    def made_of(self, entry: Entry) -> list[tuple[Conversation, Example]]:
        """Return the examples that were made of a conversation, each with the conversation that it renders."""
        if entry.result is None:
            return []
        rows = np.array(entry.result.rows, dtype=np.int64)
        examples, conversations = self._made[str(entry.part)]
        return list(zip(conversations.chosen(rows), examples.chosen(rows), strict=True))

    def write(self) -> None:
        """Prepare the dataset, and write what it holds beside the examples."""
        train_rows, heldout_rows = self.run()
        for part, name in PARTS.items():
            if not self.used[part] and not (part == "heldout" and self._config.test_ratio == 0):
                self.stats.check_losses(self._config)
                reasons = self.stats.reasons()
                raise DataError(f"no {name} conversation is left of {self.stats.rows} rows; set aside: {reasons}")
        train, heldout = self._writers.values()
        digests = [train.digests[row] for row in train_rows], [heldout.digests[row] for row in heldout_rows]
        weights = _weights_text(self._config.span_weights).encode()
        fingerprint = sha256(weights + b"heldout".join(map(b"".join, digests)))
        tools = frozenset[str]().union(*(_result(entry).tools for entry in self.used["train"]))
        hashes = [conversation.content_hash for conversation in self._made["heldout"][1]]
        write_about(self._folder, self.stats, fingerprint.hexdigest(), tools, hashes)

    def run(self) -> list[list[int]]:
        """Write the examples of both parts; return their numbers in order."""
        parts = self._divide(*self._read_sources())
        if self._waiting is not None:
            self._waiting.close()
            self._waited = StoredConversations(self._folder / _WAITING)
            for file in self._folder.glob(f"{_WAITING}*"):  # without a name it ends with this process, whatever happens
                file.unlink()
        self._sample("train", parts.train, self._config.max_samples)
        self._sample("heldout", parts.heldout, self._config.test_sample)
        self.stats.joined = sum(entry.user_hash in parts.joined for entry in self.used["heldout"])
        orders = [[row for entry in used for row in _result(entry).rows] for used in self.used.values()]
        for writer, order in zip(self._writers.values(), orders, strict=True):
            writer.close(order)
        return orders

    def _read_sources(self) -> tuple[list[Entry], list[Entry] | None]:
        """Read the training source and, where there is one, the held-out source."""
        config = self._config
        train_rows, heldout_rows, form = open_rows(config, self.stats)
        parts_are_known = config.split is Split.content or heldout_rows is not None
        if self._waits or not parts_are_known:
            self._waiting = RecordWriter(self._folder / _WAITING)
        train = self._read(train_rows, form, None if heldout_rows is None else "train")
        return train, None if heldout_rows is None else self._read(heldout_rows, form, "heldout")

    def _read(self, rows: Iterable[RawRow | Rejection], form: Format, part: str | None) -> list[Entry]:
        """Read one source; `part`: the one it is for."""
        waits = self._waiting is not None
        read = partial(self.work.read, form=form, part=part, waits=waits)
        # Reading alone needs no tokenizer; else processes are forked when it is loaded.
        ready = (lambda: True) if waits else self.work.encoder.settle
        deduplicator = Deduplicator(self.stats)
        first = len(self.entries)
        with progress_bar("reading", None) as bar:
            for batch, results in in_order(read, batches_of(rows), self._config.workers, ready):
                for row, found in zip(batch, results, strict=True):
                    if isinstance(found, Rejection):
                        deduplicator.reject(found)
                        continue
                    name = deduplicator.accept(row.origin, found.id, found.content_hash, found.notices)
                    if name == found.id:
                        self._keep(found)
                    elif isinstance(name, str):
                        (renamed,) = read([row], name=name)
                        assert isinstance(renamed, Entry)
                        self._keep(renamed)
                bar.advance(len(results))
        return self.entries[first:]

    def _keep(self, entry: Entry) -> None:
        """Keep an entry, and write down what was made of it."""
        entry.id, entry.notices = "", ()
        entry.weight, entry.called_tools = self._one(entry.weight), self._one(entry.called_tools)
        if self._waiting is not None and entry.line is not None:
            self._waiting.append(entry.line)
            entry.number, entry.line = len(self.entries), None
        if entry.result is not None:
            self._write_examples(entry, str(entry.part), entry.result)
        self.entries.append(entry)

    def _one(self, value: T) -> T:
        """Return the first of equal values: what many conversations share is held once."""
        shared: T = self._shared.setdefault(value, value)
        return shared

    def _write_examples(self, entry: Entry, part: str, result: ConversationResult) -> None:
        writer = self._writers[part]
        first = len(writer.digests)
        for example in result.examples:
            writer.append(example)
        result.rows, result.examples = range(first, len(writer.digests)), ()
        result.notes, result.tools = self._one(result.notes), self._one(result.tools)
        entry.part, entry.result = part, result

    def _divide(self, train: list[Entry], heldout: list[Entry] | None) -> Parts[Entry]:
        config, keeps_all = self._config, self.work.keeps_all
        if not keeps_all:
            self.stats.check_any()
        if heldout is not None:
            parts = keep_apart(train, heldout, seed=config.seed)
            empty = (part for part in PARTS if not getattr(parts, part))
            self.empty_parts = [f"no conversation is left for the {PARTS[part]} part" for part in empty]
        else:
            try:
                parts = divide(train, split=config.split, test_ratio=config.test_ratio, seed=config.seed)
            except DataError as error:
                if not keeps_all:
                    raise
                parts, self.empty_parts = Parts([], []), [str(error)]
            if any(entry.part == "train" for entry in parts.heldout):
                raise _FewHeldOutError
        self.stats.left_out.update(parts.set_aside)
        return parts

    def _sample(self, part: str, order: list[Entry], size: int) -> None:
        """Take conversations in sample order until enough of them fit; what does not fit is set aside and counted."""
        if size > len(order):
            text = "dataset: a sample of %d was asked for, the %s part has %d conversations"
            log.warning(text, size, part, len(order))
        wanted = len(order) if size < 0 else min(size, len(order))
        stats, outcomes = self.stats, Counter[str]()
        for source in stats.sources.values():
            source[part] = 0
        used: list[Entry] = []
        shown_before: set[Entry] = set()
        position = 0
        while len(used) < wanted and position < len(order):
            entries = order[position : position + wanted - len(used)]
            position += len(entries)
            if self._waited is not None:
                self._make(part, [entry for entry in dict.fromkeys(entries) if entry.result is None])
            for entry in entries:
                result = _result(entry)
                if entry not in shown_before:
                    outcomes[str(result.kind)] += 1
                    count_codes(result.notes, stats.layout)
                    if result.change is not None:
                        stats.changed.append(result.change)
                    if result.rejection is not None:
                        stats.rejections.append(result.rejection)
                shown_before.add(entry)
                if result.rejection is None:
                    used.append(entry)
                    stats.source(entry.source)[part] += 1
        self.used[part], stats.fitted[part] = used, outcomes

    def _make(self, part: str, entries: list[Entry]) -> None:
        """Make the examples of conversations that wait."""
        batches = (
            [self.conversations.record(entry.number) for entry in entries[at : at + BATCH_CONVERSATIONS]]
            for at in range(0, len(entries), BATCH_CONVERSATIONS)
        )
        unmade = iter(entries)
        with progress_bar(f"tokenising {part}", len(entries)) as bar:
            work = partial(self.work.make, part=part)
            for _, made in in_order(work, batches, self._config.workers, self.work.encoder.settle):
                for result in made:
                    self._write_examples(next(unmade), part, result)
                bar.advance(len(made))


def _result(entry: Entry) -> ConversationResult:
    assert entry.result is not None
    return entry.result


def _weights_text(weights: SpanWeights) -> str:
    """Return the weights as text; by the names and with the values that older fingerprints have."""
    text = f"text={weights.text!r}, call={weights.call!r}, frame={weights.call_syntax!r}, stop={weights.stop!r}"
    return f"SpanWeights({text}{'' if weights.reasoning == 1 else f', reasoning={weights.reasoning!r}'})"
