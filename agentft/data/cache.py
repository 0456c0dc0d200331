"""Keep prepared data once for every run that would make the same, under a key of all that decides it.

The bytes of the sources, the settings, the layout, the tokenizer, the code that reads and writes, and the versions of what
it calls. Left out is what decides none of them: the name, where a hub's files lie, when to stop because of losses.

    <cache>/data/<key>/            the files of one prepared dataset; `manifest.json` holds their sizes and digests
    <cache>/data/.<key>.lock       locked by who builds
    <cache>/data/.<key>-<random>/  being built; of a killed process it is removed by the next that builds

`<cache>` is `$AGENTFT_CACHE`, else `~/.cache/agentft`; `$AGENTFT_DATA_CACHE` names another place for `<cache>/data`. A folder
gets its name when it is complete, and its files are checked against their digests each time, so neither a crash nor a damaged
disk gives wrong data. Nothing depends on the lock but who builds: without one several build, and the first wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import psutil

from agentft.cache import cache_root, only_builder
from agentft.data.config import DatasetConfig
from agentft.data.files import block_digest
from agentft.data.render import MsagentTemplate
from agentft.data.sources import source_digests
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder
from agentft.settings import affects

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = ("tokenizers", "fastokens", "pyarrow", "zstandard", "datasets", "modelscope")
_NOT_IN_KEY = {name for name, what in affects(DatasetConfig).items() if what == "nothing"} | {"name"}
"""The same settings by another name give the same data."""


def key_of(ingredients: dict[str, Any]) -> str:
    """Return the digest of what `key_ingredients` returned, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:32]


def key_ingredients(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> dict[str, Any] | None:
    """Return everything that decides the data, as JSON; None where a source gives no bytes to know it by.

    Raises:
        DataError: a source cannot be read.
    """
    sources = source_digests(config)
    if sources is None:
        return None
    ingredients = {
        "sources": sources,
        "settings": {name: value for name, value in _as_json(config).items() if name not in _NOT_IN_KEY},
        "template": template if isinstance(template, MsagentTemplate) else template.identity,
        "tokenizer": encoder.fingerprint(),
        "code": {str(path.relative_to(_PACKAGE)): hashlib.sha256(path.read_bytes()).hexdigest() for path in _code()},
        "versions": {name: _version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(ingredients, default=_as_json))
    return plain


def code_is_as_loaded() -> bool:
    """Return False where a source file is younger than this process, whose code may then be another than the file's."""
    return all(path.stat().st_mtime < _STARTED for path in _code())


def _code() -> Iterator[Path]:
    for pattern in ("*.py", "*.yaml"):
        yield from sorted((_PACKAGE / "data").rglob(pattern))


_STARTED = psutil.Process().create_time()
"""Taken on import: a process that is forked later goes on with the code of the one that imported it."""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _as_json(value: Any) -> Any:
    """Return a setting or a layout that `json` cannot write as one that it can; classes by name."""
    if isinstance(value, Enum):
        return value.name
    parts = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    return {"class": type(value).__qualname__, **parts}


T = TypeVar("T")

_MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


class _DamagedError(Exception):
    """An entry is not what was written; never leaves this module."""


@dataclass(frozen=True, slots=True)
class DataCache:
    """A folder of prepared datasets by key."""

    root: Path
    limit_bytes: float
    """Above it the entries that were not used for longest are removed."""

    def fetch(self, key: str, build: Callable[[Path], dict[str, Any]], open_: Callable[[Path], T]) -> T:
        """Return what `open_(folder)` makes of the entry `key`.

        Args:
            build: Makes the entry in an empty folder where it is not there; returns what the key was made of, kept for a
                reader's eyes.
        """
        opened = self._open(key, open_)
        if opened is None:
            with only_builder(self.root / key):
                opened = self._open(key, open_, discards=True)  # another process may have built it meanwhile
                if opened is None:
                    opened = self._build(key, build, open_)
        return opened

    def _open(self, key: str, open_: Callable[[Path], T], *, discards: bool = False) -> T | None:
        folder = self.root / key
        if not folder.is_dir():
            return None
        try:
            manifest = _checked(folder)
            opened = open_(folder)
        except (_DamagedError, OSError, ValueError, KeyError) as error:
            if discards:
                log.warning("data: the cache entry %s is damaged (%s) and is built anew", key[:12], error)
                _discard(folder)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / _MANIFEST)  # the entries that are used last stay longest
        log.info("data: from the cache %s, made at %s", key[:12], manifest["made"])
        return opened

    def _build(self, key: str, build: Callable[[Path], dict[str, Any]], open_: Callable[[Path], T]) -> T:
        for left in self.root.glob(f".{key}-*"):
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=self.root))
        try:
            size = _seal(work, build(work))
            folder = self.root / key
            with contextlib.suppress(OSError):  # where there are no locks, another process may have been first
                work.rename(folder)
            opened = open_(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._prune(keep=key)
        log.info("data: kept in the cache as %s, %.1f MB (%s)", key[:12], size / 1e6, self.root)
        return opened

    def _prune(self, keep: str) -> None:
        """Remove entries, the longest unused first, until the rest is within the limit. What is open keeps its bytes."""
        entries: list[tuple[float, Path]] = []
        sizes: dict[Path, int] = {}
        for manifest in self.root.glob(f"[!.]*/{_MANIFEST}"):
            with contextlib.suppress(OSError):  # another process has just removed it
                sizes[manifest.parent] = sum(file.stat().st_size for file in manifest.parent.iterdir())
                entries.append((manifest.stat().st_mtime, manifest.parent))
        for _, folder in sorted(entries):
            if sum(sizes.values()) <= self.limit_bytes:
                return
            if folder.name != keep:
                log.info("data: removed %s from the cache: above dataset.cache_limit_gb", folder.name[:12])
                _discard(folder)
                del sizes[folder]


def open_cache(limit_gb: float) -> DataCache | None:
    """Return the cache of this user; None, said aloud, where its folder cannot be written."""
    root = Path(os.environ.get("AGENTFT_DATA_CACHE") or cache_root(None) / "data").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        log.warning("data: no cache, %s cannot be written: %s", root, error.strerror)
        return None
    return DataCache(root, limit_gb * 1e9)


def _seal(folder: Path, ingredients: dict[str, Any]) -> int:
    """Write the manifest over the files that are there; return their bytes."""
    files = {
        file.name: {"bytes": file.stat().st_size, "digest": block_digest(file)} for file in sorted(folder.iterdir())
    }
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    (folder / _MANIFEST).write_text(
        json.dumps({"made": made, "files": files, "key": ingredients}, indent=1), encoding="utf-8"
    )
    return sum(file.stat().st_size for file in folder.iterdir())


def _checked(folder: Path) -> dict[str, Any]:
    """Return the manifest of an entry whose files are the ones that were written."""
    manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise _DamagedError(f"{name} is gone")
        if file.stat().st_size != expected["bytes"]:
            raise _DamagedError(f"{name} has {file.stat().st_size:,} bytes, expected {expected['bytes']:,}")
    for name, expected in manifest["files"].items():
        if block_digest(folder / name) != expected["digest"]:
            raise _DamagedError(f"{name} holds other bytes than were written")
    return manifest


def _discard(folder: Path) -> None:
    """Take an entry away at once, so that nobody finds half of it."""
    away = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    with contextlib.suppress(OSError):
        folder.rename(away / "old")
    shutil.rmtree(away, ignore_errors=True)
