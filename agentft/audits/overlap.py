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
from typing import Any

import numpy as np

from agentft.audits.findings import Findings
from agentft.data.conversation import Conversation

SHORTEST_COMPARED = 20
"""Letters and digits of a user turn below which nearly equal says nothing: "Yes, please"."""

_SHINGLE = 5
_BUCKETS = 32
_BAND = 4
_CROWD = 200
"""Training turns compared for one equal band: bounds the work where a template made a million turns."""
_EMPTY = np.uint32(0xFFFFFFFF)
_NOT_WORDS = re.compile(r"[\W_]+")

Keys = np.ndarray[Any, np.dtype[np.uint64]]
Places = np.ndarray[Any, Any]


class ConversationIndex:
    """Digests and sketches of conversations, one after the other."""

    def __init__(self) -> None:
        self._contents = array("Q")
        self._said = array("Q")
        self._sketches = bytearray()
        self._owners = array("Q")
        """Of each sketch."""

    def __len__(self) -> int:
        return len(self._contents)

    def add(self, conversation: Conversation) -> None:
        """Enter the next conversation."""
        turns = [message.text for message in conversation.messages if message.role == "user"]
        # Not `user_hash`, which the split goes by: what is checked must not be what checks.
        said = hashlib.blake2b("\x1f".join(" ".join(turn.split()) for turn in turns).encode(), digest_size=8)
        self._said.append(int.from_bytes(said.digest(), "big"))
        self._contents.append(int(conversation.content_hash[:16], 16))
        for turn in turns:
            if (sketch := _sketch(turn)) is not None:
                self._sketches += sketch.tobytes()
                self._owners.append(len(self) - 1)

    def compare(
        self,
        conversations: Sequence[Conversation],
        part_of: Sequence[str | None],
        findings: Findings,
        similarity: float,
    ) -> int:
        """Find equal contents and user sides, within the whole and across the split, and held-out user turns that nearly
        equal one of training. Return the number of held-out turns that were compared.

        Args:
            conversations: Those that were entered, in their order.
            part_of: `train`, `heldout` or None for each.
            similarity: Share of common five-letter runs, case and punctuation aside; estimated within about 0.07.
        """

        def report(code: str, first: int, other: int, words: str) -> None:
            earlier, found = conversations[first], conversations[other]
            findings.add(code, found.origin, found.id, f"{words} {earlier.id!r} ({earlier.origin})")

        parts = np.array(
            [{"train": _TRAIN, "heldout": _HELDOUT}.get(part or "", -1) for part in part_of], dtype=np.int8
        )
        contents, said = (np.array(keys, dtype=np.uint64) for keys in (self._contents, self._said))
        same_content = set()
        for first, other in _repeated(contents):
            same_content.add(other)
            report("duplicate_content", first, other, "the same content as")
        for first, other in _repeated(said):
            if other not in same_content:
                report("duplicate_user_side", first, other, "the same user side as")
        for first, other in _straddling(contents, parts):
            report("content_straddles", first, other, "the same content as")
        for first, other in _straddling(said, parts):
            report("user_side_straddles", first, other, "the same user side as")
        owners = np.array(self._owners, dtype=np.int64)
        trained, held = (np.flatnonzero(parts[owners] == part) for part in (_TRAIN, _HELDOUT))
        for first, other, alike in self._near(trained, held):
            if alike >= similarity:
                words = f"about {alike:.0%} of a user turn as in"
                report("near_duplicate_across_split", int(owners[first]), int(owners[other]), words)
        return len(held)

    def _near(self, trained: Places, held: Places) -> Iterator[tuple[int, int, float]]:
        """Yield for each held-out turn that may be near one of training the nearest, and how alike both are."""
        sketches = np.frombuffer(bytes(self._sketches), dtype=np.uint32).reshape(-1, _BUCKETS)
        best: dict[int, tuple[float, int]] = {}
        for start in range(0, _BUCKETS, _BAND):
            for turn, other in _candidates(sketches[:, start : start + _BAND], trained, held):
                alike = _alike(sketches[turn], sketches[other])
                if alike > best.get(other, (0.0, 0))[0]:
                    best[other] = (alike, turn)
        for other in sorted(best):
            alike, turn = best[other]
            yield turn, other, alike


_TRAIN, _HELDOUT = 0, 1


def _repeated(keys: Keys) -> Iterator[tuple[int, int]]:
    """Yield (first, other) for every further place of a value."""
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    for index in np.flatnonzero(counts[inverse] > 1).tolist():
        if (origin := int(first[inverse[index]])) != index:
            yield origin, index


def _straddling(keys: Keys, parts: np.ndarray[Any, np.dtype[np.int8]]) -> Iterator[tuple[int, int]]:
    """Yield (first of training, held-out one) for each held-out conversation whose key training has too."""
    held, trained = np.flatnonzero(parts == _HELDOUT), np.flatnonzero(parts == _TRAIN)
    known, first = np.unique(keys[trained], return_index=True)
    for other in held[np.isin(keys[held], known)].tolist():
        yield int(trained[first[np.searchsorted(known, keys[other])]]), other


def _candidates(band: np.ndarray[Any, Any], trained: Places, held: Places) -> Iterator[tuple[int, int]]:
    """Yield (training turn, held-out turn) where a band of their sketches is equal; a crowd of equals is cut short."""
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
    """Return a one-permutation MinHash of the five-letter runs of a user turn; None for a short one."""
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
