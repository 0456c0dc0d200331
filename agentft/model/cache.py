"""One folder for what is downloaded or converted once and used by every run."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root(configured: str | None) -> Path:
    """Return `configured`, else `$AGENTFT_CACHE`, else `~/.cache/agentft`."""
    return Path(configured or os.environ.get("AGENTFT_CACHE") or Path.home() / ".cache" / "agentft").expanduser()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, made by `build(folder)` if it is not there yet.

    `build` fills a temporary folder beside `target`, renamed when complete; of several processes that build at once the
    first to finish wins and the others use its result, so nobody ever sees half a folder.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
