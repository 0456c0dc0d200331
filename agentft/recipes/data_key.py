"""What decides the tokens of a dataset, and its digest: equal keys give equal data, bit for bit.

The bytes of the sources, the settings, the layout, the tokenizer, the code that reads and writes, and the versions of what
it calls. Left out is what decides none of them: the name, where a hub's files lie, when to stop because of losses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agentft.data.config import DatasetConfig
from agentft.data.render import MsagentTemplate
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder
from agentft.recipes.rows import source_digests
from agentft.settings import affects

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = ("tokenizers", "fastokens", "pyarrow", "zstandard", "datasets", "modelscope")
_ROOMS = (
    "data/**/*.py",
    "data/**/*.yaml",
    "recipes/account.py",
    "recipes/build_data.py",
    "recipes/data_key.py",
    "recipes/rows.py",
)


def key_of(ingredients: dict[str, Any]) -> str:
    """Digest of what `key_ingredients` returned, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:32]


def key_ingredients(config: DatasetConfig, template: Layout, encoder: SegmentEncoder) -> dict[str, Any] | None:
    """Everything that decides the data, as JSON; None where a source gives no bytes to know it by.

    Raises:
        DataError: a source cannot be read.
    """
    sources = source_digests(config)
    if sources is None:
        return None
    nothing = {name for name, what in affects(DatasetConfig).items() if what == "nothing"}
    # The same settings by another name give the same data.
    settings = {name: value for name, value in _plain(config).items() if name not in nothing | {"name"}}
    return {
        "sources": sources,
        "settings": settings,
        "template": _plain(template) if isinstance(template, MsagentTemplate) else _plain(template.identity),
        "tokenizer": encoder.fingerprint(),
        "code": {str(path.relative_to(_PACKAGE)): hashlib.sha256(path.read_bytes()).hexdigest() for path in _code()},
        "versions": {name: _version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
    }


def code_is_as_loaded() -> bool:
    """False where a source file is younger than this process, whose code may then be another than the file's."""
    return all(path.stat().st_mtime < _STARTED for path in _code())


def _code() -> Iterator[Path]:
    for pattern in _ROOMS:
        yield from sorted(_PACKAGE.glob(pattern))


def _process_start() -> float:
    """When this process began, in seconds of `time.time`; now where the system does not say it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


_STARTED = _process_start()
"""Taken on import: a process that is forked later goes on with the code of the one that imported it."""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """A setting or a layout as JSON; sets in one order, classes by name."""
    match value:
        case Enum():
            return value.name
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            return sorted(_plain(item) for item in value)
        case _ if dataclasses.is_dataclass(value):
            parts = {part.name: _plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
            return {"class": type(value).__qualname__, **parts}
        case _:
            return value
