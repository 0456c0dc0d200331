"""The digest of a large file, taken on all cores: what a dataset is known by, and what its cache is checked by."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 32 * 1024 * 1024


def block_digest(path: Path) -> str:
    """SHA-256 of the SHA-256 digests of a file's blocks of 32 MB, one after the other; hexadecimal."""
    starts = range(0, path.stat().st_size, BLOCK_BYTES)
    if len(starts) < 2:
        digests = [_digest_from(path, 0)]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing needs no lock of the interpreter
            digests = list(pool.map(lambda start: _digest_from(path, start), starts))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest_from(path: Path, start: int) -> bytes:
    """Of one block. Pieces are small, so that memory does not depend on the cores."""
    digest = hashlib.sha256()
    left = BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (piece := file.read(min(left, 1024 * 1024))):
            digest.update(piece)
            left -= len(piece)
    return digest.digest()
