"""Divide conversations: which are trained on, which are held out, in which order and how often.

All of it comes from hashes of content, so nothing depends on the order of a file, on the sample size or on what else is in
it. The held-out set is fixed before sampling: every sample size has the same evaluation, and so has every mixture of sources.

A weight is a number of showings: 0.5 keeps half of a source's conversations, 2 shows each twice, 2.5 each twice and half of
them a third time. Both samples and weights are nested: a smaller sample is the beginning of a larger one, and a greater
weight adds showings without moving or dropping any.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from agentft.data.config import Split
from agentft.errors import DataError


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


@dataclass(frozen=True, slots=True)
class Parts(Generic[D]):
    """A dataset divided, each part in its nested order: the first n of it are the sample of size n."""

    train: list[D]
    """As often as the weight of its source says."""
    heldout: list[D]
    """Each once."""
    set_aside: Counter[str] = field(default_factory=Counter)
    """Conversations in neither part, counted by reason."""


def divide(conversations: Iterable[D], *, split: Split, test_ratio: float, seed: int) -> Parts[D]:
    """Divide conversations into a training and a held-out part.

    Conversations with the same user side go to the same part, whatever the agent answered. With `unseen_tools` one that calls
    held-out and other tools alike belongs to neither part and is set aside.

    Raises:
        DataError: a part would be empty.
    """
    pool = list(conversations)
    by_tools = split is Split.unseen_tools
    heldout_tools = _heldout_tools(pool, test_ratio, seed) if by_tools else frozenset()
    parts: Parts[D] = Parts([], [])
    for conversation in pool:
        names = conversation.called_tools
        if not by_tools or not names:
            held_out = is_held_out(conversation.user_hash, seed, test_ratio)
        elif names & heldout_tools and names - heldout_tools:
            parts.set_aside["mixes_seen_and_unseen_tools"] += 1
            continue
        else:
            held_out = names <= heldout_tools
        (parts.heldout if held_out else parts.train).append(conversation)
    if not parts.train or not parts.heldout:
        empty = "training" if not parts.train else "held-out"
        raise DataError(
            f"the {empty} part is empty: {len(pool)} conversations divided by {split} at test_ratio={test_ratio}; "
            "give more conversations or another dataset.test_ratio"
        )
    return _in_order(parts, seed)


def keep_apart(train: Iterable[D], heldout: Iterable[D], *, seed: int) -> Parts[D]:
    """Order two parts that have sources of their own; what the held-out users say too is not trained on."""
    given, held = list(train), list(heldout)
    users = {conversation.user_hash for conversation in held}
    parts = Parts([c for c in given if c.user_hash not in users], held)
    if len(parts.train) < len(given):
        parts.set_aside["held_out_too"] = len(given) - len(parts.train)
    return _in_order(parts, seed)


def _in_order(parts: Parts[D], seed: int) -> Parts[D]:
    train = in_showing_order(parts.train, seed)
    if left_out := len(parts.train) - len({id(conversation) for conversation in train}):
        parts.set_aside["left_out_by_weight"] = left_out
    return Parts(train, in_sample_order(parts.heldout, seed), parts.set_aside)


def _heldout_tools(pool: Sequence[Divisible], test_ratio: float, seed: int) -> frozenset[str]:
    """Hold tools out, by hash of the name, until about `test_ratio` of the calling conversations use them."""
    uses = Counter(name for conversation in pool for name in conversation.called_tools)
    target = test_ratio * sum(bool(conversation.called_tools) for conversation in pool)
    heldout: set[str] = set()
    covered = 0
    for name in _sort_by_hash(sorted(uses), key=lambda tool: tool, seed=seed):
        if covered >= target:
            break
        heldout.add(name)
        covered += uses[name]
    return frozenset(heldout)


def is_held_out(user_hash: str, seed: int, test_ratio: float) -> bool:
    """Return whether `Split.content` holds out what this user says."""
    return _hash_share(f"split-{seed}-{user_hash}") < test_ratio


def showing_keys(content_hash: str, weight: float, seed: int) -> list[bytes]:
    """Return a sort key for each showing of a conversation in an epoch; none where its source's weight leaves it out.

    The first showing has the key of an unweighted conversation: a weight of 1 changes nothing.
    """
    keys: list[bytes] = []
    while (left := weight - len(keys)) > 0:
        again = f"-{len(keys)}" if keys else ""
        # The last one is shown in full or, of a fraction, to as many conversations as it says.
        if left < 1 and _hash_share(f"weight-{seed}-{content_hash}{again}") >= left:
            break
        keys.append(_hash_key(f"order-{seed}-{content_hash}{again}"))
    return keys


def in_showing_order(conversations: Iterable[D], seed: int) -> list[D]:
    """Return the showings of an epoch, in an order whose first n are the sample of size n; a conversation can occur again."""
    showings = ((key, c) for c in conversations for key in showing_keys(c.content_hash, c.weight, seed))
    return [conversation for _, conversation in sorted(showings, key=lambda showing: showing[0])]


def in_sample_order(conversations: Sequence[D], seed: int) -> list[D]:
    """Order conversations so that the first n are the sample of size n: larger samples contain the smaller ones."""
    return _sort_by_hash(conversations, key=lambda conversation: conversation.content_hash, seed=seed)


def _sort_by_hash(items: Sequence[T], *, key: Callable[[T], str], seed: int) -> list[T]:
    """Sort by a seeded hash of each item's own key, equal keys in their given order."""
    return sorted(items, key=lambda item: _hash_key(f"order-{seed}-{key(item)}"))


def _hash_share(key: str) -> float:
    """Map a key to [0, 1), uniformly."""
    return int.from_bytes(_hash_key(key)[:8], "big") / 2**64


def _hash_key(text: str) -> bytes:
    """Return the SHA-256 of a text, by which things are put in an order that is nobody's."""
    return hashlib.sha256(text.encode()).digest()
