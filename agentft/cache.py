"""Keep what is downloaded, converted or prepared once for every run: one builds it, and nobody ever sees half of it.

<cache>/<folder>/<key>/            complete
<cache>/<folder>/.<key>.lock       locked by who builds
<cache>/<folder>/.<key>-<random>/  being built; of a killed process it is removed by the next that builds
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agentft.errors import ModelError

_MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


def cache_root(configured: str | None) -> Path:
    """Return `configured`, else `$AGENTFT_CACHE`, else `~/.cache/agentft`."""
    return Path(configured or os.environ.get("AGENTFT_CACHE") or Path.home() / ".cache" / "agentft").expanduser()


def build_once(target: Path, build: Callable[[Path], None], *, is_whole: Callable[[Path], bool]) -> Path:
    """Return `target`, made by `build(folder)` where it is not there yet or is not whole.

    Others wait for the process that builds: in a temporary folder, renamed when `is_whole` says so.

    Raises:
        ModelError: `build` has left the folder incomplete, or the cache cannot be written.
    """
    if is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        line = f"{target.parent}: cannot be written ({error.strerror}); AGENTFT_CACHE=<folder> names another place"
        raise ModelError(line) from error
    with _only_builder(target) as alone:
        if is_whole(target):
            return target
        if target.exists():
            log.warning("%s is incomplete or damaged, and is built again", target)
            shutil.rmtree(target)
        for left in target.parent.glob(f".{target.name}-*") if alone else ():
            shutil.rmtree(left, ignore_errors=True)
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
def _only_builder(target: Path) -> Iterator[bool]:
    """Let one process at a time build `target`, until it ends; False: this file system knows no locks."""
    locked = True
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which builds %s", target)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, about: Any) -> None:
    """Write the SHA-256 of the files of a folder beside them, and `about` for a reader's eyes."""
    manifest = {"files": _digests(folder), "key": about}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def is_sealed(folder: Path) -> bool:
    """Return whether a folder holds the files that `seal` found, byte for byte."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["files"] == _digests(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _MANIFEST]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing needs no lock of the interpreter
        return dict(zip([str(file.relative_to(folder)) for file in files], pool.map(file_digest, files), strict=True))


def mark_used(folder: Path, limit_bytes: float) -> None:
    """Note that a sealed folder is used now, and remove those beside it that were not used for longest above the limit.

    A file that is open keeps its bytes.
    """
    with contextlib.suppress(OSError):
        os.utime(folder / _MANIFEST)
    entries: list[tuple[float, Path, int]] = []
    for manifest in folder.parent.glob(f"[!.]*/{_MANIFEST}"):
        with contextlib.suppress(OSError):  # another process has just removed it
            size = sum(file.stat().st_size for file in manifest.parent.rglob("*") if not file.is_dir())
            entries.append((manifest.stat().st_mtime, manifest.parent, size))
    total = sum(size for _, _, size in entries)
    for _, other, size in sorted(entries):
        if total > limit_bytes and other != folder:
            log.info("removed %s from the cache: above its limit", other)
            shutil.rmtree(other, ignore_errors=True)
            total -= size
