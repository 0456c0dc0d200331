"""Read local files as the bytes they are: one value per line, array element or row, each with its number.

Lines end at the byte `\n` and nowhere else: U+2028 and U+0085 are text; `str.splitlines` would cut there.
A line that cannot be decoded or parsed is set aside alone; the file goes on. Memory is bounded by `MAX_LINE_BYTES`,
whatever a line or a compressed file holds.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from agentft.errors import DataError

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


MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is skipped in pieces and set aside: no genuine record comes near."""

READABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".arrow")
"""`.arrow`: a file of a folder that `save_to_disk` of `datasets` wrote."""
COMPRESSED_SUFFIXES = (".gz", ".zst")

LFS_ADVICE = "a Git LFS pointer, not the data: run `git lfs pull` in its repository, or download the file itself"

_TABLES = (".parquet", ".arrow")
_UTF8_BOM = b"\xef\xbb\xbf"
_PIECE_CHARACTERS = 1024 * 1024
_TABLE_ROWS_AT_ONCE = 256

FileItem = tuple[int, Any] | tuple[int, "FileFlaw"]
"""Line or row number, and the value or why there is none."""


@dataclass(frozen=True, slots=True)
class FileFlaw:
    """Why a line, a row or the rest of a file holds no value."""

    reason: str
    detail: str
    counted_only: bool = False
    """Blank: it needs no quarantine."""


def data_suffix(path: Path) -> str | None:
    """The suffix that says how to read the file, `.gz` and `.zst` looked through; None where it is not one of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
        if suffixes and suffixes[-1] in _TABLES:
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in READABLE_SUFFIXES else None


def read_file(path: Path) -> Iterator[FileItem]:
    """Values of one json, jsonl, csv or parquet file, `.gz` and `.zst` included, in file order.

    Raises:
        DataError: the file is missing, no regular file, empty, or of an unknown kind.
    """
    suffix = data_suffix(path)
    if not path.exists():
        raise DataError(
            f"{path}: no such file; give a path to {', '.join(READABLE_SUFFIXES)} (or .gz, .zst) or a folder"
        )
    if not path.is_file():
        raise DataError(f"{path}: not a regular file")
    if suffix is None:
        raise DataError(
            f"{path}: unknown kind of file; expected {', '.join(READABLE_SUFFIXES)}, the text ones also .gz or .zst"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if is_lfs_pointer(path):
        raise DataError(f"{path}: {LFS_ADVICE}")
    if suffix in _TABLES:
        return _read_table(path, suffix)
    return _read_text_file(path, suffix)


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file only names the data that Git LFS keeps elsewhere."""
    with path.open("rb") as stream:
        return stream.read(42) == b"version https://git-lfs.github.com/spec/v1"


def without_nulls(value: Any, *, top: bool = True) -> Any:
    """Return a row of Arrow without the nulls in its structs, which stand where other rows have a key and this one has none."""
    if isinstance(value, dict):
        return {key: without_nulls(each, top=False) for key, each in value.items() if top or each is not None}
    return [without_nulls(each, top=False) for each in value] if isinstance(value, list) else value


def _read_text_file(path: Path, suffix: str) -> Iterator[FileItem]:
    number = 0
    try:
        with _open_bytes(path) as stream:
            start = stream.peek(4)[:4]
            if encoding := _foreign_encoding(start):
                yield 0, FileFlaw("not_utf8", f"the whole file is {encoding}; convert it: iconv -f {encoding} -t UTF-8")
                return
            if start.startswith(_UTF8_BOM):
                stream.read(len(_UTF8_BOM))
            if suffix == ".csv":
                items = _read_csv(stream, path)
            else:
                items = _read_lines(stream) if _is_line_based(path, suffix) else _read_values(stream)
            for number, item in items:
                yield number, item
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield number + 1, FileFlaw("broken_compression", f"the compressed file cannot be read on: {error}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except DataError:
        raise
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # imported only where a .zst file is read
            raise
        yield number + 1, FileFlaw("broken_compression", f"the compressed file cannot be read on: {error}")


@contextmanager
def _open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    with path.open("rb") as plain:
        if path.suffix.lower() == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=plain))
        elif path.suffix.lower() == ".zst":
            import zstandard

            yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(plain, read_across_frames=True))
        else:
            yield plain


def _foreign_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32 by their byte order mark, or by the zero bytes of ASCII text in them."""
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if len(start) == 4 and start[0] in b"{[" and start[1] == 0:
        return "UTF-32LE" if start[2:] == b"\0\0" else "UTF-16LE"
    if len(start) == 4 and start[0] == 0 and (start[1] in b"{[" or start == b"\0\0\0{"):
        return "UTF-16BE"
    return None


def _is_line_based(path: Path, suffix: str) -> bool:
    """False for an array or pretty-printed objects, judged by the first line that is not blank."""
    with _open_bytes(path) as stream:
        line = b"\n"
        while line and not line.strip(b" \t\r\n\0"):
            line = stream.readline(MAX_LINE_BYTES)
    line = line.removeprefix(_UTF8_BOM).strip()
    if line in (b"[", b"{", b"[{"):
        return False
    return suffix in (".jsonl", ".ndjson") or (
        not line.startswith(b"[") and not (line.startswith(b"{") and not line.endswith(b"}"))
    )


def _read_lines(stream: io.BufferedReader) -> Iterator[FileItem]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            length = len(line) + _skip_line(stream)
            yield number, FileFlaw("line_too_long", f"{length:,} bytes, at most {MAX_LINE_BYTES:,}")
            continue
        yield number, _read_line(line)


def _skip_line(stream: io.BufferedReader) -> int:
    skipped = 0
    while piece := stream.readline(_PIECE_CHARACTERS):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _read_line(line: bytes) -> Any:
    content = line.strip(b" \t\r\n")
    if not content:
        return FileFlaw("blank_line", "blank", counted_only=True)
    if content[-1] == 0 or content[0] == 0:
        content = content.strip(b"\0 \t\r\n")
        if not content:
            return FileFlaw("nul_padding", "NUL bytes only", counted_only=True)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        if not line.endswith(b"\n") and error.end >= len(content) - 3 and error.reason == "unexpected end of data":
            return FileFlaw("truncated_line", "the last line breaks off inside a character")
        return FileFlaw(
            "not_utf8", f"byte {error.start} is {content[error.start : error.end]!r}{_gb18030_hint(content)}"
        )
    try:
        return parse_json_value(text)
    except JsonTextError as error:
        if not line.endswith(b"\n") and error.reason == "not_json" and content[:1] in (b"{", b"[", b'"'):
            return FileFlaw("truncated_line", f"the last line has no line end and is no whole JSON value: {error}")
        return FileFlaw(error.reason, str(error))


def _gb18030_hint(content: bytes) -> str:
    try:
        content.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    return "; the line reads as GB18030: convert the file with iconv -f GB18030 -t UTF-8"


class JsonTextError(ValueError):
    """A text that is not exactly one JSON value with distinct keys."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def parse_json_value(text: str) -> Any:
    """Parse exactly one JSON value.

    Raises:
        JsonTextError: with the reason `not_json`, `two_values`, `duplicate_key`, `too_deep` or `number_too_long`.
    """
    try:
        return _DECODER.decode(text)
    except JsonTextError:
        raise
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            rest = text[error.pos : error.pos + 30]
            raise JsonTextError("two_values", f"after a whole JSON value comes {rest!r}; one value a line") from None
        near = text[max(0, error.pos - 20) : error.pos + 20]
        raise JsonTextError("not_json", f"{error.msg} at character {error.pos} (near {near!r})") from None
    except RecursionError:
        raise JsonTextError("too_deep", "nested too deep to be a record") from None
    except ValueError as error:
        raise JsonTextError("number_too_long", str(error)) from None


def _object_with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonTextError(
            "duplicate_key", f"an object has the key {twice[:40]!r} twice: which one counts is undefined"
        )
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object_with_distinct_keys)


def _read_values(stream: BinaryIO) -> Iterator[FileItem]:
    """Elements of an array, or values one after the other; the number is the element's, from 1."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    buffer = text.read(_PIECE_CHARACTERS).lstrip(" \t\r\n\0")
    in_array = buffer.startswith("[")
    position = 1 if in_array else 0
    number = 0
    wanted = _PIECE_CHARACTERS
    ended = False
    while True:
        position = _skip_between(buffer, position)
        if in_array and buffer.startswith("]", position):
            return
        complete = position < len(buffer)
        if complete:
            try:
                value, end = _DECODER.raw_decode(buffer, position)
            except JsonTextError as error:
                yield number + 1, FileFlaw(error.reason, f"{error}; the rest of the file is not read")
                return
            except (ValueError, RecursionError) as error:
                complete, failure = False, str(error)
            else:
                # A number or word that ends with the buffer may go on in the next piece.
                complete = end < len(buffer) or ended
        else:
            failure = "the file ends inside an array"
        if complete:
            number += 1
            if _has_undecoded(buffer[position:end]):
                yield number, FileFlaw("not_utf8", "the element holds bytes that are no UTF-8")
            else:
                yield number, value
            position = end
            continue
        if ended:
            if position < len(buffer) or in_array:
                yield (
                    number + 1,
                    FileFlaw("not_json", f"element {number + 1}: {failure}; the rest of the file is not read"),
                )
            return
        if len(buffer) - position > MAX_LINE_BYTES:
            yield number + 1, FileFlaw("not_json", f"element {number + 1} is no JSON or longer than {MAX_LINE_BYTES:,}")
            return
        piece = text.read(wanted)
        wanted = min(2 * wanted, MAX_LINE_BYTES)  # doubled, so that a long element is not parsed many times over
        ended = not piece
        buffer = buffer[position:] + piece
        position = 0


def _skip_between(buffer: str, position: int) -> int:
    while position < len(buffer) and buffer[position] in " \t\r\n,\0":
        position += 1
    return position


def _has_undecoded(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_csv(stream: BinaryIO, path: Path) -> Iterator[FileItem]:
    """Rows as objects, numbered by the line they begin on; the first line names the columns."""
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.reader(text, strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, FileFlaw("bad_csv", str(error))
            continue
        if header is None:
            header = row
            _require_columns(path, header)
        elif not row:
            yield line, FileFlaw("blank_line", "blank", counted_only=True)
        elif len(row) != len(header):
            yield line, FileFlaw("bad_csv", f"{len(row)} fields, the first line names {len(header)} columns")
        elif any(_has_undecoded(field) for field in row):
            yield line, FileFlaw("not_utf8", "the row holds bytes that are no UTF-8")
        else:
            yield line, dict(zip(header, row, strict=True))


def _require_columns(path: Path, names: list[str]) -> None:
    if not {"conversations", "messages"} & set(names) and not {"query", "answers"} <= set(names):
        found = ", ".join(names)[:200]
        raise DataError(f"{path}: no column 'messages' or 'conversations' (nor 'query' and 'answers'), found {found!r}")


def _read_table(path: Path, suffix: str) -> Iterator[FileItem]:
    """Rows as objects, read in small batches."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) if suffix == ".parquet" else pyarrow.ipc.open_stream(path) as file:
            schema = file.schema_arrow if suffix == ".parquet" else file.schema
            _require_columns(path, schema.names)
            for batch in file.iter_batches(batch_size=_TABLE_ROWS_AT_ONCE) if suffix == ".parquet" else file:
                for start in range(0, len(batch), _TABLE_ROWS_AT_ONCE):
                    for row in batch.slice(start, _TABLE_ROWS_AT_ONCE).to_pylist():
                        number += 1
                        yield number, without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield number + 1, FileFlaw(f"broken_{suffix[1:]}", f"cannot be read on: {error}"[:300])
