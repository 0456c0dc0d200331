"""Open the sources of a dataset: local files, a hub, or the generator; read their rows as conversations, and count all.

Lines of local files end at the byte `\n` and nowhere else: U+2028 and U+0085 are text. A line that cannot be decoded or parsed
is set aside alone. Memory is bounded by `MAX_LINE_BYTES`, whatever a line or a compressed file holds.

A hub is read through its own client, and no code of a dataset is run. `modelscope` asks its hub at each load, so it fails
without the hub even where all files are cached.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from agentft.cache import file_digest
from agentft.data import synthetic
from agentft.data.calls import is_encodable
from agentft.data.config import (
    DatasetConfig,
    Format,
    HubConfig,
    HuggingFaceConfig,
    LocalConfig,
    Reasoning,
    Split,
    SyntheticConfig,
    WeightedPath,
)
from agentft.data.conversation import Conversation, Origin
from agentft.data.records import KNOWN, Rejection, read_record
from agentft.errors import ConfigError, DataError, FormatError

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is skipped in pieces and set aside: no genuine record comes near."""

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
"""`.arrow`: a file of a folder that `save_to_disk` of `datasets` wrote."""
_TABLES = (".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst")
_LFS_ADVICE = "a Git LFS pointer, not the data: run `git lfs pull` in its repository, or download the file itself"
_UTF8_BOM = b"\xef\xbb\xbf"
_PIECE_CHARACTERS = 1024 * 1024
_TABLE_ROWS_AT_ONCE = 256
_MAX_NAMES_NOTED = 40
"""Names of columns or fields under one code; a record with names of its own would fill the memory."""
_TRAIN_NAME = re.compile(r"train(?:ing)?(?:[-_.]|\Z)", re.IGNORECASE)
_HELDOUT_NAME = re.compile(r"(?:test|validation|valid|val|dev|eval)(?:[-_.]|\Z)", re.IGNORECASE)
"""How hubs call the files and folders of a split."""
_DESCRIPTIONS = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
"""What `datasets` writes beside the rows."""
_DATASET_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_LARGE_BYTES = 3_000_000
_SYNTHETIC_BYTES = 1_300
"""Of a conversation, about."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RawRow:
    """One value as a source holds it, not yet understood."""

    origin: Origin
    value: object
    weight: float = 1.0

    def read(self, form: Format, reasoning: Reasoning) -> tuple[Conversation, list[str]] | Rejection:
        """Read it as a conversation, with a code for each oddity."""
        return read_record(self.value, self.origin, form=form, weight=self.weight, reasoning=reasoning)


Rows = Iterable[RawRow | Rejection]
Source = str | Path | WeightedPath

# --- Where every row went ---


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
    joined: int = 0
    """Held-out conversations that a larger dataset may train on: there are few, so the threshold was raised."""
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


# --- Datasets ---


def open_rows(config: DatasetConfig, stats: PreparationStats) -> tuple[Rows, Rows | None, Format]:
    """Return the rows of the training source and, where it has one of its own, of the held-out source; and their format.

    Raises:
        DataError: a path is missing or holds nothing.
        ConfigError: no source reads this kind of dataset.
    """
    match config:
        case SyntheticConfig():
            return _synthetic(config, "train"), _synthetic(config, "heldout"), Format.msagent
        case LocalConfig():
            sources = _local_sources(config)
            own = any(heldout_files(Path(name)) for name, _ in _weighted(sources))
            if own and config.test_path is None:
                log.info("data: test and validation files beside training files are held out, and not trained on")
            train = read_local(sources, part="train", stats=stats)
            if config.test_path is not None:
                return train, read_local(config.test_path, stats=stats), config.format
            return train, read_local(sources, part="heldout", stats=stats) if own else None, config.format
        case HubConfig():
            train = read_hub(config, config.train_split)
            return train, None if config.test_split is None else read_hub(config, config.test_split), config.format
        case _:
            raise ConfigError(f"dataset={config.name}: no source reads {type(config).__name__}")


def is_large(config: DatasetConfig) -> bool:
    """Return whether a dataset is known, before it is read, to have much text tokenised: megabytes of it."""
    match config:
        case SyntheticConfig():
            return config.conversations * _SYNTHETIC_BYTES > _LARGE_BYTES
        case LocalConfig() if config.max_samples < 0:
            paths = [Path(name) for name, _ in _weighted(_local_sources(config))]
            files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
            return sum(file.stat().st_size for file in files if file.is_file()) > _LARGE_BYTES
        case _:
            return False


def source_digests(config: DatasetConfig) -> Any:
    """Return the bytes of the sources by name and digest, as JSON; None where a source shows no bytes.

    Equal ones give equal rows.

    Raises:
        DataError: a hub cannot be asked.
    """
    match config:
        case LocalConfig():
            test = None if config.test_path is None else _digest_local([config.test_path])
            return [_digest_local(_local_sources(config)), test]
        case HubConfig():
            splits = [config.train_split] if config.test_split is None else [config.train_split, config.test_split]
            tables = [getattr(_load_split(config, split), "cache_files", None) or [] for split in splits]
            if not all(tables):
                return None  # the client keeps no table of it on the disk
            return [[file_digest(Path(table["filename"])) for table in own] for own in tables]
        case _:
            return []  # made from the settings alone


def _digest_local(sources: Sequence[Source]) -> list[list[Any]]:
    """Return what `read_local` would read, by name and digest, in its order; files that it would skip or refuse by name."""
    found: list[list[Any]] = []
    for path in (Path(name) for name, _ in _weighted(sources)):
        skipped: list[str] = []
        for file in _folder_files(path, skipped) if path.is_dir() else [path]:
            refusal = _refusal(file, path if path.is_dir() else None)
            found.append([str(file), refusal or file_digest(file)])
        found.append([str(path), skipped])
    return found


def _synthetic(config: SyntheticConfig, part: Literal["train", "heldout"]) -> Iterator[RawRow]:
    records = synthetic.generate(
        config.conversations if part == "train" else config.heldout,
        seed=config.seed,
        languages={"en": 1 - config.chinese, "zh": config.chinese},
        part=part,
        unseen_tools=config.split is Split.unseen_tools,
        max_rounds=config.max_rounds,
    )
    for number, record in enumerate(records, start=1):
        yield RawRow(Origin(f"synthetic-{part}", number), record)


def _local_sources(config: LocalConfig) -> Sequence[Source]:
    return config.sources if config.path is None else [config.path]


def _weighted(paths: Source | Sequence[Source]) -> list[tuple[str, float]]:
    """Return each path with its weight."""
    given = [paths] if isinstance(paths, str | Path | WeightedPath) else paths
    return [(each.path, each.weight) if isinstance(each, WeightedPath) else (str(each), 1.0) for each in given]


def read_conversations(
    rows: Rows,
    *,
    form: Format = Format.auto,
    reasoning: Reasoning = Reasoning.keep,
    stats: PreparationStats | None = None,
) -> Iterator[Conversation | Rejection]:
    """Read rows one by one; duplicates by id are dropped (same content) or renamed `id#2` (other content)."""
    deduplicator = Deduplicator(stats if stats is not None else PreparationStats())
    for row in rows:
        found = row if isinstance(row, Rejection) else row.read(form, reasoning)
        if isinstance(found, Rejection):
            yield deduplicator.reject(found)
            continue
        conversation, notices = found
        name = deduplicator.accept(row.origin, conversation.id, conversation.content_hash, notices)
        yield name if isinstance(name, Rejection) else replace(conversation, id=name)


# --- Local files ---


def read_local(
    paths: Source | Sequence[Source], *, part: str = "all", stats: PreparationStats | None = None
) -> Iterator[RawRow | Rejection]:
    """Read rows of local files: json, jsonl, csv (also .gz and .zst), parquet and arrow; a folder stands for its files, sorted.

    Args:
        part: `heldout`: of folders that are a snapshot of a hub the files that they hold out; `train`: the others.

    Raises:
        DataError: a path is missing, empty, of an unknown kind, holds no row at all, or is given twice.
    """
    sources = _weighted(paths)
    if not sources:
        raise DataError("no path given")
    places = [Path(name).resolve() for name, _ in sources]
    for at, (name, _) in enumerate(sources):
        if not places[at].exists():
            kinds = ", ".join(_SUFFIXES)
            raise DataError(f"{name}: no such file or folder; expected {kinds} (or .gz, .zst) or a folder of them")
        # A file that two sources hold would have two weights, and be a duplicate of itself.
        for other, place in enumerate(places):
            if other != at and places[at].is_relative_to(place):
                where = "given twice" if places[at] == place else f"inside {sources[other][0]}, which is given too"
                raise DataError(f"{name}: {where}; name each file once")
    return _read_sources(sources, part, stats if stats is not None else PreparationStats())


def _read_sources(sources: list[tuple[str, float]], part: str, stats: PreparationStats) -> Iterator[RawRow | Rejection]:
    for source, weight in sources:
        path = Path(source)
        folder = path if path.is_dir() else None
        stats.source(source, weight)
        own = heldout_files(path) if part != "all" else []
        if part == "heldout":
            files = own
        elif folder is None:
            files = [path]
        else:
            files = [file for file in _folder_files(folder, stats.skipped_files) if file not in own]
            if not files:
                raise DataError(f"{path}: the folder holds no {', '.join(_SUFFIXES)} file")
        for file in files:
            yield from _read_source(file, folder, source, weight, stats)


def _read_source(
    file: Path, folder: Path | None, source: str, weight: float, stats: PreparationStats
) -> Iterator[RawRow | Rejection]:
    """Read one file; one of a folder that cannot be read costs itself alone."""
    # A file name that is no UTF-8 must not break the report that names it.
    name = str(file if folder else source).encode("utf-8", "backslashreplace").decode()
    stats.files.append(name)
    if folder:
        stats.source_of_file[name] = source
    rows = 0
    try:
        refusal = _refusal(file, folder)
        for line, item in () if refusal else _read_file(file):
            if item is _BLANK:
                stats.blank_lines += 1
                continue
            rows += 1
            origin = Origin(name, line)
            if isinstance(item, FormatError):
                yield Rejection(origin, item.reason, item.detail)
            else:
                yield RawRow(origin, item, weight)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error}") from error
    if rows == 0:
        reason, detail = refusal or ("empty_file", "the file holds no record")
        if folder is None:
            raise DataError(f"{name}: {detail}")
        yield Rejection(Origin(name, 0), reason, detail)


def heldout_files(path: Path) -> list[Path]:
    """Return the files of a folder that are held out by their names: `test-*` or `validation/*` beside others for training."""
    files = _folder_files(path, []) if path.is_dir() else []
    own = [file for file in files if any(_HELDOUT_NAME.match(part) for part in file.relative_to(path).parts)]
    return own if any(_TRAIN_NAME.match(part) for file in files for part in file.relative_to(path).parts) else []


def _folder_files(folder: Path, skipped: list[str]) -> list[Path]:
    """Return data files below a folder, sorted by path; hidden ones and other kinds are added to `skipped`."""
    files: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if name.startswith((".", "cache-")) or name in _DESCRIPTIONS or _data_suffix(path) is None:
                skipped.append(str(path))
            else:
                files.append(path)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _data_suffix(path: Path) -> str | None:
    """Return the suffix that says how to read the file, `.gz` and `.zst` looked through; None where it is not one of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] in _TABLES:
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in _SUFFIXES else None


def _refusal(file: Path, folder: Path | None) -> tuple[str, str] | None:
    """Return reason and detail why a file, of a folder perhaps, is not read; None where it is."""
    if folder and file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
        return "link_out_of_folder", f"leads to {file.resolve()}; name that file itself to read it"
    if not file.is_file():
        return "not_a_file", "not a regular file"
    if _data_suffix(file) is None:
        return "unknown_kind", f"unknown kind of file; expected {', '.join(_SUFFIXES)}, the text ones also .gz or .zst"
    if file.stat().st_size == 0:
        return "empty_file", "the file is empty"
    with file.open("rb") as stream:
        is_pointer = stream.read(42) == b"version https://git-lfs.github.com/spec/v1"
    return ("git_lfs_pointer", _LFS_ADVICE) if is_pointer else None


_BLANK = object()
"""In place of a value: the line is blank, and needs no quarantine."""

FileItem = tuple[int, Any]
"""Line or row number, and the value, or `_BLANK`, or a FormatError that says why there is none."""


def _read_file(path: Path) -> Iterator[FileItem]:
    """Read the values of one file, in file order."""
    suffix = str(_data_suffix(path))
    if suffix in _TABLES:
        yield from _read_table(path, suffix)
        return
    number = 0
    try:
        with _open_bytes(path) as stream:
            start = stream.peek(4)[:4]
            encoding = json.detect_encoding(start).upper()
            if not encoding.startswith("UTF-8") and start.strip(b"\0"):
                encoding = encoding.replace("-LE", "LE").replace("-BE", "BE")  # as iconv spells it
                detail = f"the whole file is {encoding}; convert it: iconv -f {encoding} -t UTF-8"
                yield 0, FormatError("not_utf8", detail)
                return
            if start.startswith(_UTF8_BOM):
                stream.read(len(_UTF8_BOM))
            is_line_based = suffix != ".csv" and _is_line_based(path, suffix)
            read = _read_csv if suffix == ".csv" else _read_lines if is_line_based else _read_values
            for number, item in read(stream):
                yield number, item
    except Exception as error:
        # The one of zstandard by its name: it is imported only where a .zst file is read.
        if not isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)) and type(error).__name__ != "ZstdError":
            raise
        yield number + 1, FormatError("broken_compression", f"the compressed file cannot be read on: {error}")


@contextmanager
def _open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    with path.open("rb") as plain:
        if path.suffix.lower() == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=plain))
        elif path.suffix.lower() == ".zst":
            import zstandard

            yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(plain, read_across_frames=True))
        else:
            yield plain


def _is_line_based(path: Path, suffix: str) -> bool:
    """Return False for an array or pretty-printed objects, judged by the first line that is not blank."""
    with _open_bytes(path) as stream:
        line = b"\n"
        while line and not line.strip(b" \t\r\n\0"):
            line = stream.readline(MAX_LINE_BYTES)
    line = line.removeprefix(_UTF8_BOM).strip()
    if line in (b"[", b"{", b"[{"):
        return False
    return suffix in (".jsonl", ".ndjson") or (
        not line.startswith(b"[") and not (line.startswith(b"{") and not line.endswith(b"}"))
    )


def _read_lines(stream: io.BufferedReader) -> Iterator[FileItem]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        length = len(line)
        if length > MAX_LINE_BYTES:
            while not line.endswith(b"\n") and (line := stream.readline(_PIECE_CHARACTERS)):
                length += len(line)
            yield number, FormatError("line_too_long", f"{length:,} bytes, at most {MAX_LINE_BYTES:,}")
            continue
        try:
            item = _line_value(line)
        except FormatError as flaw:
            item = flaw
        yield number, item


def _line_value(line: bytes) -> Any:
    """Return the value of a line, `_BLANK` where it holds white space and NUL padding alone.

    Raises:
        FormatError: it holds no UTF-8, or not exactly one JSON value.
    """
    content = line.strip(b" \t\r\n\0")
    if not content:
        return _BLANK
    breaks_off = not line.endswith(b"\n")
    try:
        return parse_json_value(content.decode())
    except UnicodeDecodeError as error:
        if breaks_off and error.end >= len(content) - 3 and error.reason == "unexpected end of data":
            raise FormatError("truncated_line", "the last line breaks off inside a character") from None
        found = content[error.start : error.end]
        hint = "convert a file in GB18030, for example, with iconv -f GB18030 -t UTF-8"
        raise FormatError("not_utf8", f"byte {error.start} is {found!r}; {hint}") from None
    except FormatError as error:
        if breaks_off and error.reason == "not_json" and content[:1] in (b"{", b"[", b'"'):
            detail = f"the last line has no line end and is no whole JSON value: {error.detail}"
            raise FormatError("truncated_line", detail) from None
        raise


def parse_json_value(text: str) -> Any:
    """Parse exactly one JSON value.

    Raises:
        FormatError: with the reason `not_json`, `two_values`, `duplicate_key`, `too_deep` or `number_too_long`.
    """
    try:
        return _DECODER.decode(text)
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            rest = text[error.pos : error.pos + 30]
            raise FormatError("two_values", f"after a whole JSON value comes {rest!r}; one value a line") from None
        near = text[max(0, error.pos - 20) : error.pos + 20]
        raise FormatError("not_json", f"{error.msg} at character {error.pos} (near {near!r})") from None
    except RecursionError:
        raise FormatError("too_deep", "nested too deep to be a record") from None
    except ValueError as error:
        raise FormatError("number_too_long", str(error)) from None


def _object_with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise FormatError("duplicate_key", f"an object has the key {twice[:40]!r} twice: which one counts is undefined")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object_with_distinct_keys)


def _read_values(stream: io.BufferedReader) -> Iterator[FileItem]:
    """Read the elements of an array, or values one after the other; the number is the element's, from 1."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    buffer = text.read(_PIECE_CHARACTERS).lstrip(" \t\r\n\0")
    in_array = buffer.startswith("[")
    at = 1 if in_array else 0
    number, wanted, ended = 1, _PIECE_CHARACTERS, False
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,\0":
            at += 1
        if in_array and buffer.startswith("]", at):
            return
        problem = "the file ends inside an array"
        if at < len(buffer):
            try:
                value, end = _DECODER.raw_decode(buffer, at)
            except FormatError as flaw:
                yield number, FormatError(flaw.reason, f"{flaw.detail}; the rest of the file is not read")
                return
            except (ValueError, RecursionError) as error:
                problem = str(error)
            else:
                if end < len(buffer) or ended:  # a number or word that ends with the buffer may go on in the next piece
                    if not is_encodable(buffer[at:end]):
                        value = FormatError("not_utf8", "the element holds bytes that are no UTF-8")
                    yield number, value
                    number, at = number + 1, end
                    continue
        if ended or len(buffer) - at > MAX_LINE_BYTES:
            if in_array or at < len(buffer):
                limit = f"or longer than {MAX_LINE_BYTES:,}; the rest of the file is not read"
                yield number, FormatError("not_json", f"element {number}: {problem}, {limit}")
            return
        piece = text.read(wanted)
        wanted = min(2 * wanted, MAX_LINE_BYTES)  # doubled, so that a long element is not parsed many times over
        buffer, at, ended = buffer[at:] + piece, 0, not piece


def _read_csv(stream: io.BufferedReader) -> Iterator[FileItem]:
    """Read rows as objects, numbered by the line they begin on; the first line names the columns."""
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=""), strict=True)
    header: list[str] = []
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, FormatError("bad_csv", str(error))
            continue
        if not header:
            header = row
        elif not row:
            yield line, _BLANK
        elif len(row) != len(header):
            yield line, FormatError("bad_csv", f"{len(row)} fields, the first line names {len(header)} columns")
        elif not all(map(is_encodable, row)):
            yield line, FormatError("not_utf8", "the row holds bytes that are no UTF-8")
        else:
            yield line, dict(zip(header, row, strict=True))


def _read_table(path: Path, suffix: str) -> Iterator[FileItem]:
    """Read rows as objects, in small batches."""
    import pyarrow
    import pyarrow.parquet

    is_parquet, number = suffix == ".parquet", 0
    try:
        with pyarrow.parquet.ParquetFile(path) if is_parquet else pyarrow.ipc.open_stream(path) as file:
            for batch in file.iter_batches(batch_size=_TABLE_ROWS_AT_ONCE) if is_parquet else file:
                for start in range(0, len(batch), _TABLE_ROWS_AT_ONCE):
                    for row in batch.slice(start, _TABLE_ROWS_AT_ONCE).to_pylist():
                        number += 1
                        yield number, _without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield number + 1, FormatError(f"broken_{suffix[1:]}", f"cannot be read on: {error}"[:300])


def _without_nulls(value: Any, *, top: bool = True) -> Any:
    """Return a row of Arrow without the nulls in its structs, which stand where other rows have a key and this one has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(each, top=False) for key, each in value.items() if top or each is not None}
    return [_without_nulls(each, top=False) for each in value] if isinstance(value, list) else value


# --- Hubs ---


def read_hub(config: HubConfig, split: str) -> Iterator[RawRow]:
    """Load one split and return its rows; `conversations` may be a list or, as in MSAgent-Bench, the text of one.

    Raises:
        DataError: the id is no `owner/name`, or the client cannot load the split; the message says what it said.
    """
    rows = _load_split(config, split)
    if len(rows) == 0:
        raise DataError(f"{config.id}: split {split!r} holds no record")
    return (RawRow(Origin(config.id, number), _without_nulls(row)) for number, row in enumerate(rows, 1))


def _load_split(config: HubConfig, split: str) -> Any:
    if not _DATASET_ID.fullmatch(config.id):
        raise DataError(f"{config.id!r} is no dataset id; expected owner/name, such as damo/MSAgent-Bench")
    if Path(config.id).exists():
        raise DataError(f"{config.id}: a local path of this name would be read in place of the hub; use dataset=local")
    hub = "Hugging Face" if isinstance(config, HuggingFaceConfig) else "ModelScope"
    chosen = {} if config.cache_dir is None else {"cache_dir": config.cache_dir}
    try:
        if isinstance(config, HuggingFaceConfig):
            from datasets import load_dataset

            return load_dataset(config.id, config.subset, split=split, revision=config.revision, **chosen)
        from modelscope.msdatasets import MsDataset

        return MsDataset.load(config.id, split=split, version=config.revision, trust_remote_code=False, **chosen)
    except Exception as error:  # the client, the hub and the reader of the files each raise types of their own
        cause = error.__cause__ or error  # `datasets` wraps what went wrong in "an error occurred"
        said = f"{type(cause).__name__}: {cause}".split("\n")[0][:300]
        raise DataError(
            f"{config.id}: split {split!r} at revision {config.revision!r} cannot be loaded from the {hub} hub ({said}). "
            "Check the id and split; if the hub is out of reach, read a downloaded copy with dataset=local"
        ) from error
