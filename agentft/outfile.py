"""The file that a command was told to write: `--csv FILE`, `--html FILE`."""

from __future__ import annotations

from pathlib import Path

from agentft.errors import RunError


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
