"""`metrics.jsonl`: one line for each time something was measured, whole after any death of the process."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from agentft.errors import RunError

_log = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, also of a running or killed run, with nan and inf as numbers again."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; expected the metrics of a run") from None
    lines = text.split("\n")
    unfinished = lines.pop()  # empty, or a line that is being written
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}:{number}: not JSON ({error}): {line[:60]!r}") from error
        rows.append(
            {key: _NUMBERS.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
        )
    if unfinished:
        _log.warning("%s: the last line is unfinished and left out", path)
    return rows


_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def open_metrics(path: Path) -> int:
    """The file to append to, without the half line that a full disk or a power cut may have left at its end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    size = os.fstat(handle).st_size
    tail = os.pread(handle, 1 << 20, max(0, size - (1 << 20)))
    unfinished = len(tail) - (tail.rfind(b"\n") + 1)
    if unfinished:
        _log.warning("%s: an unfinished last line of %d bytes is cut off", path, unfinished)
        os.ftruncate(handle, size - unfinished)
    return handle


def write_all(handle: int, content: bytes) -> None:
    """Write all of `content`, however little the system takes at a time."""
    while content:
        content = content[os.write(handle, content) :]
