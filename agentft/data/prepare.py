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
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agentft.data.cache import code_is_as_loaded, key_ingredients, key_of, open_cache
from agentft.data.config import DatasetConfig, SpanWeights, Split
from agentft.data.conversation import Origin
from agentft.data.preparation_stats import PreparationStats, read_account, write_account
from agentft.data.records import Rejection
from agentft.data.sources import Intake, RawRow, bounded_code, is_large, open_rows
from agentft.data.splits import divide, keep_apart
from agentft.data.store import (
    ConversationWriter,
    ExampleWriter,
    StoredConversations,
    StoredExamples,
    index_of,
    stored_id_type,
)
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder, encode_fast
from agentft.data.truncation import TruncationKind
from agentft.data.workers import (
    CONVERSATIONS_A_BATCH,
    LinesToMake,
    Made,
    RowsToRead,
    RowWork,
    Understood,
    Workers,
    batches_of,
    process_count,
)
from agentft.errors import DataError
from agentft.progress import progress_bar
from agentft.runs import RunFolder

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

    outcome: TruncationKind
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
        self._account = PreparationStats()
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
        at_once = config.max_samples < 0 and (config.split is Split.content or rows.heldout is not None)
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
        sample = self._config.max_samples if part == "train" else self._config.test_sample
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
            prepared = _open(Path(folder), config)
    prepared.account.check_losses(config)
    _report(prepared, time.perf_counter() - started)
    return prepared


def _cached(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> PreparedData | None:
    """The data from the cache, made there if need be; None where it cannot be kept."""
    cache = open_cache(config.cache_limit_gb)
    ingredients = None if cache is None else key_ingredients(config, template, encoder)
    if cache is None or ingredients is None:
        return None
    if not code_is_as_loaded():
        log.warning("data: not cached, the code in %s changed after this process began", Path(__file__).parent.parent)
        return None

    def about() -> dict[str, Any] | None:
        """What the key is made of, if that is still what it was."""
        return ingredients if ingredients == key_ingredients(config, template, encoder) else None

    return cache.fetch(
        key_of(ingredients),
        build=lambda folder: build_data(config, template, encoder, folder),
        open_=lambda folder: _open(folder, config),
        about=about,
    )


def _open(folder: Path, config: DatasetConfig) -> PreparedData:
    """Map the files of a prepared dataset; they may lose their names afterwards."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    examples = StoredExamples(folder)
    with np.load(folder / ORDER) as order:
        train, heldout, talks = (order[part] for part in ("train", "heldout", "talks"))
    return PreparedData(
        train=examples.chosen(train, config.span_weights),
        heldout=StoredConversations(folder / HELDOUT, talks),
        heldout_examples=examples.chosen(heldout),
        train_tools=frozenset(about["train_tools"]),
        fingerprint=about["fingerprint"],
        heldout_content_hashes=about["heldout_content_hashes"],
        account=read_account(folder / ACCOUNT),
    )


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


def _report(prepared: PreparedData, seconds: float) -> None:
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
    lines = (
        {"source": r.origin.source, "line": r.origin.line, "id": r.id, "reason": r.reason, "detail": r.detail}
        for r in account.rejections
    )
    run.write_text(run.rejected_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
