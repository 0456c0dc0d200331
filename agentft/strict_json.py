"""Write JSON that any reader takes, and the file that a command was told to write."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from agentft.errors import RunError


def json_text(value: Any, indent: int | None = None) -> str:
    """Strict JSON that any reader takes: NaN and the infinities, unknown to JSON, become the texts nan, inf, -inf."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    match value:
        case None | bool():
            return value
        case enum.Enum():
            return _plain(value.value)
        case str():
            return str(value)
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case Mapping():
            return {str(_plain(key)): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            return sorted((_plain(item) for item in value), key=str)
        case os.PathLike() | datetime():
            return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if callable(scalar := getattr(value, "item", None)):  # a number of numpy or torch
        return _plain(scalar())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r:.80}")


def write_out(path: Path, text: str) -> None:
    """Write `text` where the user said, also into a device or a pipe such as `/dev/stdout`; folders are made.

    Raises:
        RunError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
