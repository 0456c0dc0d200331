"""Open the sources of a dataset: local files, a hub, or the generator; and read their rows as conversations.

    rows = read_local("train.jsonl", report=report)            # or a folder, or several with weights
    for item in read_conversations(rows, report=report):       # Conversation | Rejection
        ...

Nothing is dropped in silence: each row becomes a `Conversation` or a `Rejection`, and a `ReadReport` counts both.

A hub is read through its own client, which reads its settings from the environment when it is first imported. `datasets`:
`HF_ENDPOINT` (another hub), `HF_HOME` (where downloads go), `HF_TOKEN`, `HF_HUB_OFFLINE`. `modelscope`: `MODELSCOPE_ENDPOINT`,
`MODELSCOPE_CACHE`, `MODELSCOPE_API_TOKEN`; it downloads every split of a dataset and asks the hub at each load, so it fails
without the hub even where all files are cached. A copy read as `dataset=local` needs no hub. No code of a dataset is run.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from agentft.data import synthetic
from agentft.data.config import (
    DatasetConfig,
    Format,
    HubConfig,
    HuggingFaceConfig,
    LocalConfig,
    Reasoning,
    Split,
    SyntheticConfig,
)
from agentft.data.conversation import Conversation, Origin
from agentft.data.files import (
    LFS_ADVICE,
    READABLE_SUFFIXES,
    FileFlaw,
    block_digest,
    data_suffix,
    is_lfs_pointer,
    read_file,
    without_nulls,
)
from agentft.data.records import ParseWarning, Rejection, read_record
from agentft.errors import ConfigError, DataError

_NOTICES_SHOWN_PER_CODE = 20
_MAX_NAMES_NOTED = 40
"""Names of columns or fields under one code; a record with names of its own would fill the memory."""
_TRAIN_NAME = re.compile(r"train(?:ing)?(?:[-_.]|\Z)", re.IGNORECASE)
_HELDOUT_NAME = re.compile(r"(?:test|validation|valid|val|dev|eval)(?:[-_.]|\Z)", re.IGNORECASE)
"""How hubs call the files and folders of a split."""
_DESCRIPTIONS = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
"""What `datasets` writes beside the rows."""
_DATASET_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
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


Rows = Iterable[RawRow | Rejection]


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A file or folder with the relative weight of its conversations."""

    path: str | Path
    weight: float = 1.0
    part: Literal["all", "train", "heldout"] = "all"
    """Of a folder that is a snapshot of a hub: the files that it holds out itself, or the others."""


LocalSources = str | Path | LocalSource | Sequence[str | Path | LocalSource]


@dataclass(slots=True)
class SourceCount:
    """What one source gave."""

    weight: float = 1.0
    rows: int = 0
    kept: int = 0


@dataclass(slots=True)
class ReadReport:
    """What became of everything that was read. Filled while the streams are consumed."""

    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason, duplicates included."""
    notices: Counter[str] = field(default_factory=Counter)
    """By code; the conversations they belong to were kept."""
    notices_shown: dict[str, list[ParseWarning]] = field(default_factory=dict)
    """The first few of each code."""
    files: list[str] = field(default_factory=list)
    sources: dict[str, SourceCount] = field(default_factory=dict)
    """Each source as it was given, a file, a folder or a dataset: what it gave."""
    source_of_file: dict[str, str] = field(default_factory=dict)
    """File of a folder -> the folder."""
    skipped_files: list[str] = field(default_factory=list)
    """Files of a folder whose names say that they hold no data."""
    blank_lines: int = 0
    """Blank lines and lines of NUL padding."""

    @property
    def rows(self) -> int:
        """Everything that was read, blank lines aside."""
        return self.kept + self.rejected.total()

    def source_of(self, origin: Origin) -> str:
        """Return the source, as it was given, that a row comes from."""
        return self.source_of_file.get(origin.source, origin.source)

    def count(self, row: RawRow | Rejection, *, kept: bool) -> None:
        """Count one row of its source."""
        source = self.sources.setdefault(self.source_of(row.origin), SourceCount(getattr(row, "weight", 1.0)))
        source.rows += 1
        source.kept += kept

    def note(self, notices: Iterable[ParseWarning]) -> None:
        """Count notices and keep the first few of each code."""
        for notice in notices:
            code = bounded_code(notice.code, self.notices)
            self.notices[code] += 1
            shown = self.notices_shown.setdefault(code, [])
            if len(shown) < _NOTICES_SHOWN_PER_CODE:
                shown.append(notice)


def bounded_code(code: str, counted: Counter[str]) -> str:
    """Return the code to count under: where one ends with a name, and many names are counted, one for all further names."""
    kind, colon, _ = code.partition(":")
    if not colon or code in counted or sum(known.startswith(kind + ":") for known in counted) < _MAX_NAMES_NOTED:
        return code
    return f"{kind}:other_names"


@dataclass(frozen=True, slots=True)
class DatasetRows:
    """Rows of the training source and, where the dataset has one of its own for it, of the held-out source."""

    train: Rows
    heldout: Rows | None
    form: Format


def open_rows(config: DatasetConfig, report: ReadReport) -> DatasetRows:
    """Open the source or sources of a dataset.

    Raises:
        DataError: a path is missing or holds nothing.
        ConfigError: no source reads this kind of dataset.
    """
    match config:
        case SyntheticConfig():
            train: Rows = _synthetic(config, "train", config.conversations)
            return DatasetRows(train, _synthetic(config, "heldout", config.heldout), Format.msagent)
        case LocalConfig():
            sources = _local_sources(config)
            own = any(heldout_files(Path(source.path)) for source in sources)
            if own and config.test_path is None:
                log.info("data: test and validation files beside training files are held out, and not trained on")
            test: Any = config.test_path or [replace(source, part="heldout") for source in sources]
            heldout = read_local(test, report=report) if own or config.test_path is not None else None
            train = read_local([replace(source, part="train") for source in sources], report=report)
            return DatasetRows(train, heldout, config.format)
        case HubConfig():
            heldout = None if config.test_split is None else read_hub(config, config.test_split)
            return DatasetRows(read_hub(config, config.train_split), heldout, config.format)
        case _:
            raise ConfigError(f"dataset={config.name}: no source reads {type(config).__name__}")


def is_large(config: DatasetConfig) -> bool:
    """Return whether a dataset is known, before it is read, to have much text tokenised: megabytes of it."""
    match config:
        case SyntheticConfig():
            return config.conversations * _SYNTHETIC_BYTES > _LARGE_BYTES
        case LocalConfig() if config.max_samples < 0:
            paths = [Path(source.path) for source in _local_sources(config)]
            files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
            return sum(file.stat().st_size for file in files if file.is_file()) > _LARGE_BYTES
        case _:
            return False


def source_digests(config: DatasetConfig) -> Any:
    """Return the bytes of the sources by name and digest, as JSON; None where a source shows no bytes. Equal ones give
    equal rows.

    Raises:
        DataError: a hub cannot be asked.
    """
    match config:
        case LocalConfig():
            test = None if config.test_path is None else _digest_local([LocalSource(config.test_path)])
            return [_digest_local(_local_sources(config)), test]
        case HubConfig():
            splits = [config.train_split] if config.test_split is None else [config.train_split, config.test_split]
            digests = [_digest_hub(config, split) for split in splits]
            return None if None in digests else digests
        case _:
            return []  # made from the settings alone


def _synthetic(config: SyntheticConfig, part: Any, count: int) -> Iterator[RawRow]:
    records = synthetic.generate(
        count,
        seed=config.seed,
        languages={"en": 1 - config.chinese, "zh": config.chinese},
        part=part,
        unseen_tools=config.split is Split.unseen_tools,
        max_rounds=config.max_rounds,
    )
    for number, record in enumerate(records, start=1):
        yield RawRow(Origin(f"synthetic-{part}", number), record)


def _local_sources(config: LocalConfig) -> list[LocalSource]:
    if config.path is not None:
        return [LocalSource(config.path)]
    return [LocalSource(source.path, source.weight) for source in config.sources]


def read_local(paths: LocalSources, *, report: ReadReport | None = None) -> Iterator[RawRow | Rejection]:
    """Read rows of local files: json, jsonl, csv (also .gz and .zst), parquet and arrow; a folder stands for its files, sorted.

    Raises:
        DataError: a path is missing, empty, of an unknown kind, holds no row at all, or is given twice.
    """
    given = [paths] if isinstance(paths, (str, Path, LocalSource)) else list(paths)
    sources = [source if isinstance(source, LocalSource) else LocalSource(source) for source in given]
    if not sources:
        raise DataError("no path given")
    for source in sources:
        if not source.weight > 0:
            raise DataError(f"{source.path}: weight {source.weight} is not positive")
        if not Path(source.path).exists():
            raise DataError(f"{source.path}: no such file or folder")
    _refuse_overlap(sources)
    return _read_sources(sources, report if report is not None else ReadReport())


def _refuse_overlap(sources: list[LocalSource]) -> None:
    """A file that two sources hold would have two weights, and be a duplicate of itself."""
    resolved = [(source.path, Path(source.path).resolve()) for source in sources]
    for at, (path, place) in enumerate(resolved):
        for other, above in resolved[:at] + resolved[at + 1 :]:
            if place.is_relative_to(above):
                where = "given twice" if place == above else f"inside {other}, which is given too"
                raise DataError(f"{path}: {where}; name each file once")


def _read_sources(sources: list[LocalSource], report: ReadReport) -> Iterator[RawRow | Rejection]:
    for source in sources:
        path = Path(source.path)
        in_folder = path.is_dir()
        report.sources.setdefault(str(source.path), SourceCount(source.weight))
        files = _files_of(source, report)
        if in_folder and not files and source.part != "heldout":
            raise DataError(f"{path}: the folder holds no {', '.join(READABLE_SUFFIXES)} file")
        for file in files:
            # A file name that is no UTF-8 must not break the report that names it.
            name = str(file if in_folder else source.path).encode("utf-8", "backslashreplace").decode()
            report.files.append(name)
            if in_folder:
                report.source_of_file[name] = str(source.path)
                if flaw := _unsafe_in_folder(file, path):
                    yield Rejection(Origin(name, 0), *flaw)
                    continue
            yield from _read_one(file, name, source.weight, report, alone=not in_folder)


def _read_one(file: Path, name: str, weight: float, report: ReadReport, *, alone: bool) -> Iterator[RawRow | Rejection]:
    items = 0
    for line, item in read_file(file):
        if isinstance(item, FileFlaw) and item.counted_only:
            report.blank_lines += 1
            continue
        items += 1
        origin = Origin(name, line)
        yield (
            Rejection(origin, item.reason, item.detail) if isinstance(item, FileFlaw) else RawRow(origin, item, weight)
        )
    if items == 0:
        if alone:
            raise DataError(f"{name}: the file holds no record")
        yield Rejection(Origin(name, 0), "empty_file", "the file holds no record")


def _files_of(source: LocalSource, report: ReadReport) -> list[Path]:
    path = Path(source.path)
    if not path.is_dir():
        return [] if source.part == "heldout" else [path]
    own = heldout_files(path) if source.part != "all" else []
    if source.part == "heldout":
        return own
    return [file for file in _folder_files(path, report) if file not in own]


def heldout_files(path: Path) -> list[Path]:
    """Return the files of a folder that are held out by their names: `test-*` or `validation/*` beside others for training."""
    files = _folder_files(path, ReadReport()) if path.is_dir() else []
    own = [file for file in files if any(_HELDOUT_NAME.match(part) for part in file.relative_to(path).parts)]
    return own if any(_TRAIN_NAME.match(part) for file in files for part in file.relative_to(path).parts) else []


def _folder_files(folder: Path, report: ReadReport) -> list[Path]:
    """Return data files below a folder, sorted by path; hidden ones and other kinds are listed as skipped."""
    files: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if name.startswith((".", "cache-")) or name in _DESCRIPTIONS or data_suffix(path) is None:
                report.skipped_files.append(str(path))
            else:
                files.append(path)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _unsafe_in_folder(file: Path, folder: Path) -> tuple[str, str] | None:
    """Return why a file found in a folder is not opened, or None."""
    if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
        return "link_out_of_folder", f"leads to {file.resolve()}; name that file itself to read it"
    if not file.is_file():
        return "not_a_file", "no regular file"
    if file.stat().st_size == 0:
        return "empty_file", "the file is empty"
    if is_lfs_pointer(file):
        return "git_lfs_pointer", LFS_ADVICE
    return None


def _digest_local(sources: Sequence[LocalSource]) -> list[list[Any]]:
    """Return what `read_local` would read, by name and digest, in its order; files that it would skip or refuse by name."""
    found: list[list[Any]] = []
    for path in (Path(source.path) for source in sources):
        report = ReadReport()
        for file in _folder_files(path, report) if path.is_dir() else [path]:
            flaw = _unsafe_in_folder(file, path) if file is not path else None
            found.append([str(file), flaw or (block_digest(file) if file.is_file() else None)])
        found.append([str(path), report.skipped_files])
    return found


def read_hub(config: HubConfig, split: str) -> Iterator[RawRow | Rejection]:
    """Read rows of one split; `conversations` may be a list or, as in MSAgent-Bench, the text of one.

    Raises:
        DataError: the id is no `owner/name`, or the client cannot load the split; the message says what it said.
    """
    _require_hub_id(config)
    return _read_split(config, split)


def _digest_hub(config: HubConfig, split: str) -> list[str] | None:
    """Return digests of the tables that the client keeps of a split; None where it keeps none on the disk."""
    _require_hub_id(config)
    tables = getattr(_load_split(config, split), "cache_files", None)
    return [block_digest(Path(table["filename"])) for table in tables] if tables else None


def _require_hub_id(config: HubConfig) -> None:
    if not _DATASET_ID.fullmatch(config.id):
        raise DataError(f"{config.id!r} is no dataset id; expected owner/name, such as damo/MSAgent-Bench")
    if Path(config.id).exists():
        raise DataError(f"{config.id}: a local path of this name would be read in place of the hub; use dataset=local")


def _read_split(config: HubConfig, split: str) -> Iterator[RawRow]:
    number = 0
    for number, row in enumerate(_load_split(config, split), 1):
        yield RawRow(Origin(config.id, number), without_nulls(row))
    if number == 0:
        raise DataError(f"{config.id}: split {split!r} holds no record")


def _load_split(config: HubConfig, split: str) -> Any:
    hub = "Hugging Face" if isinstance(config, HuggingFaceConfig) else "ModelScope"
    chosen = {} if config.cache_dir is None else {"cache_dir": config.cache_dir}
    try:
        if isinstance(config, HuggingFaceConfig):
            from datasets import load_dataset

            return load_dataset(config.id, config.subset, split=split, revision=config.revision, **chosen)
        from modelscope.msdatasets import MsDataset

        return MsDataset.load(config.id, split=split, version=config.revision, trust_remote_code=False, **chosen)
    except ImportError as error:
        wanted = "datasets" if isinstance(config, HuggingFaceConfig) else "'modelscope[datasets]'"
        raise DataError(f"the client of {hub} is not installed: pip install {wanted} ({error})") from error
    except Exception as error:  # the client, the hub and the reader of the files each raise types of their own
        cause = error.__cause__ or error  # `datasets` wraps what went wrong in "an error occurred"
        said = f"{type(cause).__name__}: {cause}".split("\n")[0][:300]
        offline = [
            name for name in _OFFLINE_VARIABLES if os.environ.get(name, "0").upper() in ("1", "ON", "YES", "TRUE")
        ]
        hint = f" {' and '.join(offline)} switched this client off too." if offline else ""
        raise DataError(
            f"{config.id}: split {split!r} at revision {config.revision!r} cannot be loaded from the {hub} hub ({said}).{hint} "
            "Check the id and split; if the hub is out of reach, read a downloaded copy with dataset=local"
        ) from error


def read_conversations(
    rows: Rows, *, form: Format = Format.auto, reasoning: Reasoning = Reasoning.keep, report: ReadReport | None = None
) -> Iterator[Conversation | Rejection]:
    """Read rows one by one; duplicates by id are dropped (same content) or renamed `id#2` (other content)."""
    intake = Intake(report if report is not None else ReadReport())
    for row in rows:
        if isinstance(row, Rejection):
            yield intake.refuse(row, row)
            continue
        outcome = read_record(row.value, row.origin, form=form, weight=row.weight, reasoning=reasoning)
        if isinstance(outcome, Rejection):
            yield intake.refuse(row, outcome)
            continue
        conversation, notices = outcome
        admitted = intake.admit(row, conversation.id, identity(conversation.content_hash), notices)
        yield admitted if isinstance(admitted, Rejection) else replace(conversation, id=admitted)


def identity(content_hash: str) -> int:
    """Return a number that is equal for conversations that say the same: the beginning of their content hash."""
    return int(content_hash[:15], 16)


class Intake:
    """Where rows come in, in their order: each is counted, and no two conversations get one id.

    Of a conversation its id and a 64-bit digest of its content are kept, about 150 bytes.
    """

    def __init__(self, report: ReadReport) -> None:
        self._report = report
        self._digests: dict[str, int] = {}
        self._renamed: dict[str, dict[int, int]] = {}
        """For an id met with several contents: content digest -> number of the copy."""

    def refuse(self, row: RawRow | Rejection, rejection: Rejection) -> Rejection:
        """Count a row that cannot be used, and return why."""
        self._report.rejected[rejection.reason] += 1
        self._report.count(row, kept=False)
        return rejection

    def admit(self, row: RawRow, name: str, identity: int, notices: Sequence[ParseWarning]) -> str | Rejection:
        """Count a row that was understood as a conversation, and return the id it gets; a repetition is refused."""
        unique_name = self._unique(name, identity)
        if unique_name is None:
            return self.refuse(row, Rejection(row.origin, "duplicate", "the same id and content came before", name))
        self._report.note(notices)
        if unique_name != name:
            detail = f"id {name!r} came before with other content; this one is {unique_name!r}"
            self._report.note([ParseWarning(row.origin, "duplicate_id_renamed", detail)])
        self._report.kept += 1
        self._report.count(row, kept=True)
        return unique_name

    def _unique(self, name: str, identity: int) -> str | None:
        """Return the id to use, or None for a repetition of what came before."""
        known = self._digests.get(name)
        if known is None:
            self._digests[name] = identity
            return name
        copies = self._renamed.setdefault(name, {})
        if identity == known or identity in copies:
            return None
        number = len(copies) + 2
        while (unique_name := f"{name}#{number}") in self._digests:
            number += 1
        copies[identity] = number
        self._digests[unique_name] = identity
        return unique_name
