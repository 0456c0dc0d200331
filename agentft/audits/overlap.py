"""Find what conversations share: duplicates, near duplicates, and a split that leaks.

Kept for each conversation are digests and sketches, never its text: about a kilobyte at most, whatever its length.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from agentft.audits.findings import Findings
from agentft.data.config import Split
from agentft.data.conversation import Conversation, Origin
from agentft.data.splits import divide, keep_apart, showing_keys
from agentft.errors import DataError

Part = Literal["train", "heldout", "neither"]

SHORTEST_COMPARED = 20
"""Letters and digits of a user turn below which nearly equal says nothing: "Yes, please"."""

_SHINGLE = 5
_BUCKETS = 32
_BAND = 4
_CROWD = 200
"""Training turns compared for one equal band: bounds the work where a template made a million turns."""
_EMPTY = np.uint32(0xFFFFFFFF)
_NOT_WORDS = re.compile(r"[\W_]+")


class ConversationIndex:
    """One line for each conversation; `divide` divides the lines as it would the conversations."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._sources: dict[str, int] = {}
        self._names: list[str] = []
        self._source_of = array("I")
        self._line_of = array("Q")
        self._given = bytearray()
        self._weights = array("d")
        self._users = bytearray()
        self._contents = bytearray()
        self._said = bytearray()
        self._tools: list[frozenset[str]] = []
        self._known_tools: dict[frozenset[str], frozenset[str]] = {}
        self._sketches = bytearray()
        self._sketched = array("Q")
        self.parts = np.zeros(0, dtype=np.int8)
        self.left_out: Counter[str] = Counter()
        """Conversations in neither part, by reason."""
        self._seed = 0

    def add(self, conversation: Conversation, *, heldout: bool) -> None:
        """Enter a conversation; `heldout`: its source is the held-out one of two."""
        origin = conversation.origin
        self.ids.append(conversation.id)
        if origin.source not in self._sources:
            self._sources[origin.source] = len(self._names)
            self._names.append(origin.source)
        self._source_of.append(self._sources[origin.source])
        self._line_of.append(origin.line)
        self._given.append(heldout)
        self._weights.append(conversation.weight)
        self._users += bytes.fromhex(conversation.user_hash)
        self._contents += bytes.fromhex(conversation.content_hash)
        turns = [message.text for message in conversation.messages if message.role == "user"]
        # Not `user_hash`, which the split goes by: what is checked must not be what checks.
        self._said += hashlib.blake2b("\x1f".join(" ".join(t.split()) for t in turns).encode(), digest_size=8).digest()
        names = conversation.called_tools
        self._tools.append(self._known_tools.setdefault(names, names))
        for turn in turns:
            if (sketch := _sketch(turn)) is not None:
                self._sketches += sketch.tobytes()
                self._sketched.append(len(self.ids) - 1)

    def __len__(self) -> int:
        return len(self.ids)

    def origin(self, index: int) -> Origin:
        """Where a conversation comes from."""
        return Origin(self._names[self._source_of[index]], self._line_of[index])

    def assign_parts(self, findings: Findings, *, split: Split, test_ratio: float, seed: int, separate: bool) -> None:
        """Divide as a training run would; `separate`: the held-out part has a source of its own."""
        self._seed = seed
        lines = cast("Sequence[Conversation]", [_Line(self, index) for index in range(len(self))])
        self.parts = np.full(len(self), _NEITHER, dtype=np.int8)
        try:
            if separate:
                given = [
                    [line for line, held in zip(lines, self._given, strict=True) if held == part] for part in (0, 1)
                ]
                parts = keep_apart(*given, seed=seed)
            else:
                parts = divide(lines, split=split, test_ratio=test_ratio, seed=seed)
        except DataError as error:
            findings.add("empty_part", Origin("split", 0), None, str(error))
            return
        self.left_out = parts.set_aside
        for number, part in ((_TRAIN, parts.train), (_HELDOUT, parts.heldout)):
            self.parts[[line.index for line in cast("Sequence[_Line]", part)]] = number
        for number, name in ((_TRAIN, "training"), (_HELDOUT, "held-out")):
            if separate and not (self.parts == number).any():
                findings.add("empty_part", Origin("split", 0), None, f"no conversation is left for the {name} part")

    def part_of(self, index: int) -> Part:
        """Where the split put a conversation."""
        return _PARTS[int(self.parts[index])]

    def showings(self, index: int) -> int:
        """How often an epoch shows a conversation; in the held-out part each is shown once."""
        if self.parts[index] == _HELDOUT:
            return 1
        content = self._contents[32 * index : 32 * index + 32].hex()
        return len(showing_keys(content, self._weights[index], self._seed))

    def find_duplicates(self, findings: Findings) -> None:
        """Equal contents and equal user sides: within the whole, and across the split."""
        contents = _short_keys(self._contents)
        said = np.frombuffer(bytes(self._said), dtype=np.uint64)
        same_content = set()
        for first, other in _repeated(contents):
            same_content.add(other)
            self._report(findings, "duplicate_content", first, other, "the same content as")
        for first, other in _repeated(said):
            if other not in same_content:
                self._report(findings, "duplicate_user_side", first, other, "the same user side as")
        for first, other in self._straddling(contents):
            self._report(findings, "content_straddles", first, other, "the same content as")
        for first, other in self._straddling(said):
            self._report(findings, "user_side_straddles", first, other, "the same user side as")

    def find_near_duplicates(self, findings: Findings, similarity: float) -> int:
        """Held-out user turns that nearly equal one of training; the number of held-out turns that were compared.

        Sketches estimate the share of common five-letter runs, case and punctuation aside, within about 0.07.
        """
        sketches = np.frombuffer(bytes(self._sketches), dtype=np.uint32).reshape(-1, _BUCKETS)
        owners = np.frombuffer(self._sketched.tobytes(), dtype=np.uint64).astype(np.int64)
        part = self.parts[owners]
        held, trained = np.flatnonzero(part == _HELDOUT), np.flatnonzero(part == _TRAIN)
        best: dict[int, tuple[float, int]] = {}
        for start in range(0, _BUCKETS, _BAND):
            for turn, other in _candidates(sketches[:, start : start + _BAND], trained, held):
                alike = _alike(sketches[turn], sketches[other])
                if alike > best.get(other, (0.0, 0))[0]:
                    best[other] = (alike, turn)
        for other in sorted(best):
            alike, turn = best[other]
            if alike >= similarity:
                words = f"about {alike:.0%} of a user turn as in"
                self._report(findings, "near_duplicate_across_split", int(owners[turn]), int(owners[other]), words)
        return len(held)

    def _straddling(self, keys: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
        """(first of training, held-out one) for each held-out conversation whose key training has too."""
        held, trained = np.flatnonzero(self.parts == _HELDOUT), np.flatnonzero(self.parts == _TRAIN)
        known, first = np.unique(keys[trained], return_index=True)
        for other in held[np.isin(keys[held], known)].tolist():
            yield int(trained[first[np.searchsorted(known, keys[other])]]), other

    def _report(self, findings: Findings, code: str, first: int, other: int, words: str) -> None:
        detail = f"{words} {self.ids[first]!r} ({self.origin(first)})"
        findings.add(code, self.origin(other), self.ids[other], detail)


_TRAIN, _HELDOUT, _NEITHER = 0, 1, 2
_PARTS: tuple[Part, Part, Part] = ("train", "heldout", "neither")


@dataclass(frozen=True, slots=True)
class _Line:
    """What `divide` asks of a conversation, read from the ledger."""

    ledger: ConversationIndex
    index: int

    @property
    def user_hash(self) -> str:
        return self.ledger._users[32 * self.index : 32 * self.index + 32].hex()

    @property
    def content_hash(self) -> str:
        return self.ledger._contents[32 * self.index : 32 * self.index + 32].hex()

    @property
    def weight(self) -> float:
        return self.ledger._weights[self.index]

    @property
    def called_tools(self) -> frozenset[str]:
        return self.ledger._tools[self.index]


def _short_keys(digests: bytearray) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first 64 bits of each 32-byte digest: enough to tell millions apart."""
    return np.frombuffer(bytes(digests), dtype=np.uint64).reshape(-1, 4)[:, 0].copy()


def _repeated(keys: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """(first, other) for every further place of a value."""
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    for index in np.flatnonzero(counts[inverse] > 1).tolist():
        if (origin := int(first[inverse[index]])) != index:
            yield origin, index


def _candidates(
    band: np.ndarray[Any, Any], trained: np.ndarray[Any, Any], held: np.ndarray[Any, Any]
) -> Iterator[tuple[int, int]]:
    """(training turn, held-out turn) where a band of their sketches is equal; a crowd of equals is cut short."""
    pairs = np.ascontiguousarray(band).view(np.uint64)
    keys = pairs[:, 0] * np.uint64(0x9E3779B97F4A7C15) + pairs[:, 1]
    says_something = (band != _EMPTY).any(axis=1)
    by_key: dict[int, list[int]] = {}
    for turn in held[says_something[held]].tolist():
        by_key.setdefault(int(keys[turn]), []).append(turn)
    met: Counter[int] = Counter()
    for turn in trained[np.isin(keys[trained], keys[held]) & says_something[trained]].tolist():
        key = int(keys[turn])
        met[key] += 1
        if met[key] <= _CROWD:
            for other in by_key.get(key, ()):
                yield turn, other


def _sketch(turn: str) -> np.ndarray[Any, np.dtype[np.uint32]] | None:
    """One-permutation MinHash of the five-letter runs of a user turn; None for a short one."""
    letters = _NOT_WORDS.sub("", unicodedata.normalize("NFKC", turn).casefold())
    if len(letters) < SHORTEST_COMPARED:
        return None
    points = np.frombuffer(letters.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    hashes = np.zeros(len(points) - _SHINGLE + 1, dtype=np.uint64)
    for offset in range(_SHINGLE):
        hashes = hashes * np.uint64(0x100000001B3) + points[offset : offset + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    values = (hashes >> np.uint64(32)).astype(np.uint32)
    sketch = np.full(_BUCKETS, _EMPTY, dtype=np.uint32)
    np.minimum.at(sketch, ((hashes >> np.uint64(27)) & np.uint64(_BUCKETS - 1)).astype(np.int64), values)
    return sketch


def _alike(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    filled = (one != _EMPTY) | (other != _EMPTY)
    return float((one == other)[filled].mean())
