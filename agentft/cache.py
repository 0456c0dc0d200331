"""Name the folder for what is downloaded or converted once and used by every run."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from agentft.errors import ModelError

log = logging.getLogger(__name__)


def cache_root(configured: str | None) -> Path:
    """Return `configured`, else `$AGENTFT_CACHE`, else `~/.cache/agentft`."""
    return Path(configured or os.environ.get("AGENTFT_CACHE") or Path.home() / ".cache" / "agentft").expanduser()


def build_once(target: Path, build: Callable[[Path], None], *, is_whole: Callable[[Path], bool]) -> Path:
    """Return `target`, made by `build(folder)` where it is not there yet or is not whole.

    Processes that need it at once wait for the one that builds. `build` fills a temporary folder beside `target`, which
    gets its name when it is complete and `is_whole` says so: nobody ever sees half a folder.

    Raises:
        ModelError: `build` has left the folder incomplete.
    """
    if is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_builder(target):
        if is_whole(target):
            return target
        if target.exists():
            log.warning("%s is incomplete, and is built again", target)
            shutil.rmtree(target)
        log.info("building %s once", target)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            build(work)
            if not is_whole(work):
                raise ModelError(f"{target}: incomplete although it was built; model.cache_dir names another place")
            try:
                work.rename(target)
            except OSError:  # built by another process meanwhile, where there are no locks
                if not is_whole(target):
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


@contextlib.contextmanager
def only_builder(target: Path) -> Iterator[None]:
    """Let one process at a time build `target`; the lock ends with the process that holds it, however that ends."""
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # some network file systems know no locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process, which builds %s", target)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
