"""The digest of a file: other bytes, another digest, whatever the number of blocks and cores."""

from __future__ import annotations

import hashlib

import pytest

from agentft.data import files
from agentft.data.files import block_digest


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000, 1050])
def test_it_is_the_digest_of_the_digests_of_the_blocks(size, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)
    data = bytes(n * n % 251 for n in range(size))
    path = tmp_path / "file"
    path.write_bytes(data)
    blocks = [data[start : start + 100] for start in range(0, size, 100)] or [b""]
    expected = hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()
    assert block_digest(path) == expected


def test_one_byte_anywhere_changes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 64)
    path = tmp_path / "file"
    data = bytearray(300)
    path.write_bytes(data)
    seen = {block_digest(path)}
    for place in range(0, 300, 7):
        data[place] = 1
        path.write_bytes(data)
        seen.add(block_digest(path))
    path.write_bytes(data[:-1])
    seen.add(block_digest(path))
    assert len(seen) == 1 + len(range(0, 300, 7)) + 1


def test_a_file_larger_than_a_block_is_read_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\0" * (files.BLOCK_BYTES + 1))
    one = block_digest(path)
    with path.open("r+b") as file:
        file.seek(files.BLOCK_BYTES)
        file.write(b"\1")
    assert block_digest(path) != one
