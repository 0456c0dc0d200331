"""How often each training conversation of a weighted source is shown in an epoch, and where in the sample's order.

A weight is a number of showings: 0.5 keeps half of a source's conversations, 2 shows each twice, 2.5 each twice and half
of them a third time. Which half is decided by a hash of the content, so nothing depends on the order of files or on what
the other sources hold, and both samples and weights are nested: a smaller sample is the beginning of a larger one, and a
greater weight adds showings without moving or dropping any. The held-out part knows no weights: every mixture sits the
same exam.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar


class Divisible(Protocol):
    """What decides a conversation's part and its place there: a conversation, or what is kept of one."""

    @property
    def content_hash(self) -> str:
        """Digest of all its text, hexadecimal."""

    @property
    def user_hash(self) -> str:
        """Digest of its user turns, hexadecimal."""

    @property
    def weight(self) -> float:
        """Of its source."""

    @property
    def called_tools(self) -> frozenset[str]:
        """Names of the tools that it calls."""


T = TypeVar("T")
D = TypeVar("D", bound=Divisible)


def hash_share(key: str) -> float:
    """Map a key to [0, 1), uniformly."""
    return int.from_bytes(hash_key(key)[:8], "big") / 2**64


def hash_key(text: str) -> bytes:
    """SHA-256 of a text, by which things are put in an order that is nobody's."""
    return hashlib.sha256(text.encode()).digest()


def showing_keys(content_hash: str, weight: float, seed: int) -> list[bytes]:
    """One sort key for each showing of a conversation in an epoch; none where its source's weight leaves it out.

    The first showing has the key of an unweighted conversation: a weight of 1 changes nothing.
    """
    keys: list[bytes] = []
    while (left := weight - len(keys)) > 0:
        again = f"-{len(keys)}" if keys else ""
        # The last one is shown in full or, of a fraction, to as many conversations as it says.
        if left < 1 and hash_share(f"weight-{seed}-{content_hash}{again}") >= left:
            break
        keys.append(hash_key(f"order-{seed}-{content_hash}{again}"))
    return keys


def in_showing_order(conversations: Iterable[D], seed: int) -> list[D]:
    """The showings of an epoch, in an order whose first n are the sample of size n; a conversation can occur again."""
    showings = ((key, c) for c in conversations for key in showing_keys(c.content_hash, c.weight, seed))
    return [conversation for _, conversation in sorted(showings, key=lambda showing: showing[0])]


def sort_by_hash(items: Sequence[T], *, key: Callable[[T], str], seed: int) -> list[T]:
    """Sort by a seeded hash of each item's own key, equal keys in their given order."""
    return sorted(items, key=lambda item: hash_key(f"order-{seed}-{key(item)}"))
