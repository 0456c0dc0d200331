"""Names of files that came from somewhere else: checked before anything is read or written under them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agentft.errors import ModelError

LONGEST_NAME = 1024
"""Characters in a path inside a repository; file systems take 255 in each part."""

_DRIVE = re.compile(r"[A-Za-z]:")


def check_file_names(names: Iterable[Any], origin: str) -> list[str]:
    """Return `names` if each is a plain relative path with forward slashes, inside the folder it is relative to.

    Raises:
        ModelError: a name that is absolute, climbs with `..`, names a drive or a network share, or hides a control
            character; the message names `origin`.
    """
    checked = []
    for name in names:
        if problem := _problem(name):
            raise ModelError(f"{origin}: refused the file name {str(name)[:120]!r}: {problem}; nothing was written")
        checked.append(str(name))
    return checked


def _problem(name: Any) -> str | None:
    if not isinstance(name, str):
        return "not text"
    if not name or len(name) > LONGEST_NAME:
        return f"expected 1 to {LONGEST_NAME} characters, found {len(name)}"
    if any(ord(character) < 32 or 0x7F <= ord(character) < 0xA0 for character in name):
        return "it holds a control character"
    if any(0xD800 <= ord(character) < 0xE000 for character in name):
        return "it is not Unicode text"
    if "\\" in name:
        return "it holds a backslash"
    parts = name.split("/")
    if parts[0] == "":
        return "it is absolute"
    if parts[0].startswith("~"):
        return "it names a home folder"
    if any(not part.rstrip(". ") for part in parts):
        return "a part of it is empty or dots, such as `..`"
    if any(_DRIVE.match(part) for part in parts):
        return "it names a drive"
    if any(len(part.encode()) > 255 for part in parts):
        return "a part of it is longer than 255 bytes"
    return None


def file_inside(folder: Path, name: str, origin: str) -> Path:
    """Return the file `name` of `folder`, which may be a symbolic link only inside the model's own storage.

    Raises:
        ModelError: the name is refused, there is no such file, or a link leads out of the folder.
    """
    check_file_names([name], origin)
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{origin}: names {name}, and there is no such file in {folder}")
    if not path.resolve().is_relative_to(_storage(folder)):
        raise ModelError(
            f"{path}: refused, a symbolic link that leaves the model's folder (to {path.resolve()}); "
            "put the file itself there"
        )
    return path


def shard_files(index: Path) -> list[Path]:
    """Return the weight files that a shard index (`*.index.json`) names, each checked and present.

    Raises:
        ModelError: the index is not JSON, or names a file outside its folder or one that is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected a `weight_map` from tensor to file")
    names = sorted(set(check_file_names(weight_map.values(), str(index))))
    return [file_inside(index.parent, name, str(index)) for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that came with a model.

    Raises:
        ModelError: not readable as a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _storage(folder: Path) -> Path:
    """Where a model's files may lie: its folder; in the Hugging Face cache also the store that snapshots link into."""
    real = folder.resolve()
    if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir():
        return real.parent.parent
    return real
