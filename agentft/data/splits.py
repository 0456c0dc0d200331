"""Divide conversations: which are trained on, which are held out, and in which order.

Both answers come from hashes of content, so they do not depend on the order of a file, on the sample size or on what else
is in it. The held-out set is fixed before sampling: every sample size sits the same exam.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from agentft.data.config import Split
from agentft.data.sources import Divisible, hash_share, in_showing_order, sort_by_hash
from agentft.errors import DataError

D = TypeVar("D", bound=Divisible)


@dataclass(frozen=True, slots=True)
class Parts(Generic[D]):
    """A dataset divided, each part in its nested order: the first n of it are the sample of size n."""

    train: list[D]
    """As often as the weight of its source says, see `agentft.data.sources`."""
    heldout: list[D]
    """Each once."""
    set_aside: Counter[str] = field(default_factory=Counter)
    """Conversations in neither part, counted by reason."""


def divide(conversations: Iterable[D], *, split: Split, test_ratio: float, seed: int) -> Parts[D]:
    """Divide conversations into a training and a held-out part.

    Conversations with the same user side go to the same part, whatever the agent answered.

    Raises:
        DataError: a part would be empty.
    """
    pool = list(conversations)
    if split is Split.unseen_tools:
        parts = _divide_by_tools(pool, test_ratio, seed)
    else:
        chosen = [is_held_out(conversation.user_hash, seed, test_ratio) for conversation in pool]
        parts = Parts(
            train=[c for c, held in zip(pool, chosen, strict=True) if not held],
            heldout=[c for c, held in zip(pool, chosen, strict=True) if held],
        )
    if not parts.train or not parts.heldout:
        empty = "training" if not parts.train else "held-out"
        raise DataError(
            f"the {empty} part is empty: {len(pool)} conversations divided by {split} at test_ratio={test_ratio}; "
            "give more conversations or another dataset.test_ratio"
        )
    return _in_order(parts, seed)


def keep_apart(train: Iterable[D], heldout: Iterable[D], *, seed: int) -> Parts[D]:
    """Order two parts that have sources of their own; what the held-out users say too is not trained on."""
    held = list(heldout)
    users = {conversation.user_hash for conversation in held}
    given = list(train)
    parts = Parts([c for c in given if c.user_hash not in users], held)
    if len(parts.train) < len(given):
        parts.set_aside["held_out_too"] = len(given) - len(parts.train)
    return _in_order(parts, seed)


def _in_order(parts: Parts[D], seed: int) -> Parts[D]:
    train = in_showing_order(parts.train, seed)
    if left_out := len(parts.train) - len({id(conversation) for conversation in train}):
        parts.set_aside["left_out_by_weight"] = left_out
    return Parts(train, in_sample_order(parts.heldout, seed), parts.set_aside)


def in_sample_order(conversations: Sequence[D], seed: int) -> list[D]:
    """Order conversations so that the first n are the sample of size n: larger samples contain the smaller ones."""
    return sort_by_hash(conversations, key=lambda conversation: conversation.content_hash, seed=seed)


def _divide_by_tools(pool: list[D], test_ratio: float, seed: int) -> Parts[D]:
    """Hold tools out, by hash of the name, until about `test_ratio` of the calling conversations use them.

    A conversation that calls held-out and other tools alike belongs to neither part and is set aside.
    """
    called = [conversation.called_tools for conversation in pool]
    uses = Counter(name for names in called for name in names)
    target = test_ratio * sum(1 for names in called if names)
    heldout_tools: set[str] = set()
    covered = 0
    for name in sort_by_hash(sorted(uses), key=lambda tool: tool, seed=seed):
        if covered >= target:
            break
        heldout_tools.add(name)
        covered += uses[name]
    parts: Parts[D] = Parts(train=[], heldout=[])
    for conversation, names in zip(pool, called, strict=True):
        if not names:
            part = parts.heldout if is_held_out(conversation.user_hash, seed, test_ratio) else parts.train
            part.append(conversation)
        elif names <= heldout_tools:
            parts.heldout.append(conversation)
        elif names & heldout_tools:
            parts.set_aside["mixes_seen_and_unseen_tools"] += 1
        else:
            parts.train.append(conversation)
    return parts


def is_held_out(user_hash: str, seed: int, test_ratio: float) -> bool:
    """Whether `Split.content` holds out what this user says."""
    return hash_share(f"split-{seed}-{user_hash}") < test_ratio
