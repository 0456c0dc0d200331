"""Turn rows into conversations and examples, in batches on all cores, and divide the conversations by what is kept of each.

Hashes of content decide a conversation's part and its place there: the order of a file and the sample size change nothing, so
every sample size has the same held-out conversations.

A weight is a number of showings in an epoch: 0.5 keeps half of a source's conversations, 2.5 shows each twice and half of
them a third time. A smaller sample is the beginning of a larger one; a greater weight adds showings and moves none.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from traceback import format_exc
from typing import Any, Generic, TypeVar

from agentft.data.config import SMALL_EXAM, DatasetConfig, Format, Split, TooLong
from agentft.data.conversation import Conversation
from agentft.data.prepared import PackedExample, from_line, pack, to_line
from agentft.data.records import Rejection
from agentft.data.sources import RawRow
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder
from agentft.data.truncation import Rendered, TruncationKind, Truncator
from agentft.errors import DataError
from agentft.signals import STOPS, die_with

BATCH_CONVERSATIONS, _BATCH_CHARACTERS = 64, 250_000

B = TypeVar("B")
R = TypeVar("R")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ConversationResult:
    """What became of a conversation that a part wants."""

    kind: TruncationKind
    examples: Sequence[PackedExample]
    """Until they are written."""
    notes: tuple[str, ...]
    tools: frozenset[str]
    change: dict[str, Any] | None
    """What of it is not used."""
    rejection: Rejection | None
    rows: range = range(0)
    """Numbers of its examples in the files of its part."""


@dataclass(slots=True, eq=False)
class Entry:
    """A conversation without its text: what the dataset is divided and ordered by, and what became of it."""

    id: str
    """Until it is known that no other has it."""
    source: str
    """The file or dataset that it comes from."""
    weight: float
    content_hash: str
    user_hash: str
    called_tools: frozenset[str]
    notices: Sequence[str]
    """Until they are counted."""
    line: bytes | None = None
    """The conversation as it is stored, until it is written; None where its examples are made at once."""
    part: str | None = None
    result: ConversationResult | None = None
    number: int = -1
    """Of a conversation that waits: its line."""


@dataclass(frozen=True, slots=True)
class RowWork:
    """The work on one batch, with all that decides its results."""

    config: DatasetConfig
    template: Layout
    encoder: SegmentEncoder
    keeps_all: bool = False
    """Keep the conversations that training examples render, too."""

    def read(
        self, rows: Sequence[RawRow | Rejection], form: Format, part: str | None, waits: bool, name: str | None = None
    ) -> list[Entry | Rejection]:
        """Read rows of one source as conversations, and make the examples of those that a part shows.

        Args:
            part: The part that the source is for; None: what a conversation says decides.
            waits: Make nothing yet, and give the conversations as they are stored.
            name: Id of the one conversation, in place of its own.
        """
        results: list[Entry | Rejection] = []
        wanted: list[tuple[Entry, Conversation]] = []
        for row in rows:
            found = row if isinstance(row, Rejection) else row.read(form, self.config.reasoning)
            if isinstance(found, Rejection):
                results.append(found)
                continue
            conversation, notices = found
            if name is not None:
                conversation = replace(conversation, id=name)
            hashes = conversation.content_hash, conversation.user_hash
            source, tools = conversation.origin.source, conversation.called_tools
            entry = Entry(conversation.id, source, conversation.weight, *hashes, tools, notices)
            results.append(entry)
            if waits:
                entry.line = to_line(conversation)
                continue
            held_out = is_held_out(entry.user_hash, self.config.seed, self.config.test_ratio)
            entry.part = part or ("heldout" if held_out else "train")
            if entry.part == "heldout" or entry.weight >= 1 or showing_keys(entry, self.config.seed):
                wanted.append((entry, conversation))
        made = self._make([(conversation, str(entry.part)) for entry, conversation in wanted])
        for (entry, _), result in zip(wanted, made, strict=True):
            entry.result = result
        return results

    def make(self, lines: Sequence[bytes], part: str) -> list[ConversationResult]:
        """Make the examples of stored conversations that a part wants."""
        return self._make([(from_line(line), part) for line in lines])

    def _make(self, wanted: Sequence[tuple[Conversation, str]]) -> list[ConversationResult]:
        truncator = Truncator(self.template, self.encoder, self.config.max_length)
        items = [
            (_to_ask(each) if part == "heldout" else each, policy_of(part, self.config.too_long))
            for each, part in wanted
        ]
        return [self._result(each, part) for each, (_, part) in zip(truncator.fit(items), wanted, strict=True)]

    def _result(self, made: Rendered, part: str) -> ConversationResult:
        keeps = part == "heldout" or self.keeps_all
        largest_id = self.encoder.largest_id
        change = None
        if made.outcome is not TruncationKind.whole:
            change = {
                "id": made.conversation.id,
                "part": part,
                "outcome": str(made.outcome),
                "tokens": made.tokens,
                "examples": [piece.conversation.id for piece in made.pieces],
                "shortened_observations": made.shortened_observations,
                "steps_left_out": list(made.steps_left_out),
            }
        return ConversationResult(
            made.outcome,
            [pack(piece.example, largest_id, piece.conversation if keeps else None) for piece in made.pieces],
            made.notes if made.problem is None else (),
            frozenset().union(*(piece.conversation.called_tools for piece in made.pieces)),
            change,
            made.problem and Rejection(made.conversation.origin, *made.problem, id=made.conversation.id),
        )


def policy_of(part: str, too_long: TooLong) -> TooLong:
    """Return what a part does with long conversations.

    A round that training would leave out is still asked in the evaluation: held-out conversations are split unless dropped.
    """
    return too_long if part == "train" or too_long is TooLong.drop else TooLong.split


def _to_ask(conversation: Conversation) -> Conversation:
    """Return a held-out conversation whose reasoning is part of what is asked: no prompt may show the thought of its step."""
    messages = tuple(replace(message, reasoning_trained=True) for message in conversation.messages)
    return replace(conversation, messages=messages)


def batches_of(rows: Iterable[RawRow | Rejection]) -> Iterator[list[RawRow | Rejection]]:
    """Cut a stream by number and, since whole batches are in memory, by characters."""
    batch: list[RawRow | Rejection] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += 0 if isinstance(row, Rejection) else _characters(row.value)
        if len(batch) == BATCH_CONVERSATIONS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(value: object, depth: int = 5) -> int:
    """Return about how much text a raw value holds; what lies deeper than a turn's fields counts nothing."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum([_characters(each, depth - 1) for each in inner]) if depth else 0


# --- Batches on all cores ---

MOST_PROCESSES = 8
"""Beyond so many, the one that reads the files and writes the results has enough to do."""
_BATCHES_AHEAD = 3
"""Batches a process."""


def process_count(asked: int) -> int:
    """Return how many processes to use where `asked` for, 0 meaning as many as make sense here."""
    if sys.platform != "linux":  # elsewhere a fork is not safe, or there is none
        if asked > 1:
            log.warning("dataset.workers=%d: processes are forked on Linux only, here one prepares the data", asked)
        return 1
    return asked or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def in_order(
    work: Callable[[B], R], batches: Iterable[B], workers: int, ready: Callable[[], bool]
) -> Iterator[tuple[B, R]]:
    """Yield each batch with its result.

    Args:
        workers: Processes, as of `dataset.workers`.
        ready: Asked between two batches until it is true: loads what much work needs, so that forked processes share it.

    Raises:
        DataError: a process was killed. What `work` raises is raised here.
    """
    batches, is_ready, processes = iter(batches), False, process_count(workers)
    for number, batch in enumerate(batches):
        is_ready = is_ready or (number > 0 and ready())
        if is_ready and processes > 1:
            yield from _in_processes(work, chain([batch], batches), processes)
        else:
            yield batch, work(batch)


def _in_processes(work: Callable[[B], R], batches: Iterator[B], processes: int) -> Iterator[tuple[B, R]]:
    import torch
    from torch.utils.data import DataLoader

    sent: deque[B] = deque()

    def noted() -> Iterator[B]:
        for batch in batches:
            sent.append(batch)
            yield batch

    loader: DataLoader[Any] = DataLoader(
        _Work(work),  # type: ignore[arg-type]  # it is asked for batches in place of indices
        sampler=noted(),
        batch_size=None,
        num_workers=processes,
        prefetch_factor=_BATCHES_AHEAD,
        collate_fn=lambda result: result,
        worker_init_fn=partial(_begin, os.getpid()),
        multiprocessing_context="fork",
        generator=torch.Generator(),  # else it would draw from the one that the training draws from
    )
    before = set(active_children())
    try:
        with killed_worker_in_words():
            for result in loader:
                if isinstance(result, Exception):
                    raise result
                yield sent.popleft(), result
    finally:
        _end(set(active_children()) - before)


def _end(processes: set[BaseProcess]) -> None:
    """End workers whose loader an error keeps alive: it would wait at the exit for processes that ignore its SIGTERM."""
    for _ in range(2):
        with suppress(RuntimeError):  # the loader takes the first of these ends for an accident
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def killed_worker_in_words() -> Iterator[None]:
    """Say what it means that a worker was killed. The news comes as a signal, wherever this process is at the moment."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a process that prepares data was killed, by want of memory perhaps; dataset.workers=1 needs the least"
        ) from error


@dataclass(frozen=True, slots=True)
class _Work(Generic[B, R]):
    """Work as a dataset whose indices are batches. A `DataLoader` would raise an error anew, with other words in it."""

    work: Callable[[B], R]

    def __getitem__(self, batch: B) -> R | Exception:
        try:
            return self.work(batch)
        except Exception as error:
            error.add_note(f"in a process that prepares data:\n{format_exc()}")
            return error


def _begin(parent: int, _: int) -> None:
    # Sent to all processes of a job they ask the parent to end its work, and so its workers'; its handlers are for it alone.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    gc.freeze()  # a collection would touch, and so copy, every page that is shared with the parent
    die_with(parent)


# --- Which part, in which order, how often ---


D = TypeVar("D", Conversation, Entry)


@dataclass(frozen=True, slots=True)
class Parts(Generic[D]):
    """A dataset divided, each part in its nested order: the first n of it are the sample of size n."""

    train: list[D]
    """As often as the weight of its source says."""
    heldout: list[D]
    """Each once."""
    set_aside: Counter[str] = field(default_factory=Counter)
    """Conversations in neither part, counted by reason."""
    joined: frozenset[str] = frozenset()
    """Hashes of the held-out users whose conversations a larger dataset may train on."""


def divide(pool: Sequence[D], *, split: Split, test_ratio: float | None, seed: int) -> Parts[D]:
    """Divide conversations into a training and a held-out part.

    Conversations with the same user side go to the same part, whatever the agent answered. With `unseen_tools` one that calls
    held-out and other tools alike belongs to neither part and is set aside.

    Without a `test_ratio` a small dataset still has an exam: the users whose hashes come next join those below the threshold.

    Raises:
        DataError: a part would be empty.
    """
    by_tools = split is Split.unseen_tools
    heldout_tools = _heldout_tools(pool, test_ratio, seed) if by_tools else frozenset()
    joining = _joining(pool, seed) if test_ratio is None and not by_tools else frozenset()
    parts: Parts[D] = Parts([], [], joined=joining)
    for conversation in pool:
        names = conversation.called_tools
        if not by_tools or not names:
            held_out = is_held_out(conversation.user_hash, seed, test_ratio) or conversation.user_hash in joining
        elif names & heldout_tools and names - heldout_tools:
            parts.set_aside["mixes_seen_and_unseen_tools"] += 1
            continue
        else:
            held_out = names <= heldout_tools
        (parts.heldout if held_out else parts.train).append(conversation)
    if not parts.train or not (parts.heldout or test_ratio == 0):
        empty = "training" if not parts.train else "held-out"
        raise DataError(
            f"the {empty} part is empty: {len(pool)} conversations divided by {split} at test_ratio={_ratio(test_ratio)}; "
            "give more conversations or another dataset.test_ratio"
        )
    return _ordered(parts, seed)


def keep_apart(train: Sequence[D], heldout: Sequence[D], *, seed: int) -> Parts[D]:
    """Order two parts that have sources of their own; what the held-out users say too is not trained on."""
    users = {conversation.user_hash for conversation in heldout}
    parts = Parts([c for c in train if c.user_hash not in users], list(heldout))
    if len(parts.train) < len(train):
        parts.set_aside["held_out_too"] = len(train) - len(parts.train)
    return _ordered(parts, seed)


def _ordered(parts: Parts[D], seed: int) -> Parts[D]:
    train = in_showing_order(parts.train, seed)
    if left_out := len(parts.train) - len({id(conversation) for conversation in train}):
        parts.set_aside["left_out_by_weight"] = left_out
    return Parts(train, in_sample_order(parts.heldout, seed), parts.set_aside, parts.joined)


def _ratio(test_ratio: float | None) -> float:
    return 0.02 if test_ratio is None else test_ratio


def _least(conversations: int) -> int:
    """Return how many conversations are held out at least where no ratio is given."""
    return min(SMALL_EXAM, math.ceil(conversations / 5))


def _joining(pool: Sequence[D], seed: int) -> frozenset[str]:
    """Return the users above the threshold that are held out since too few are below it: those with the smallest hashes."""
    users = Counter(conversation.user_hash for conversation in pool)
    held_out = sum(count for user, count in users.items() if is_held_out(user, seed, None))
    joining: set[str] = set()
    for user in sorted(users, key=lambda user: _hash_key(f"split-{seed}-{user}")):
        if held_out >= _least(len(pool)):
            break
        if not is_held_out(user, seed, None) and held_out + users[user] <= len(pool) / 2:  # enough is left to train on
            joining.add(user)
            held_out += users[user]
    return frozenset(joining)


def _heldout_tools(pool: Sequence[D], test_ratio: float | None, seed: int) -> frozenset[str]:
    """Hold tools out, by hash of the name, until about `test_ratio` of the calling conversations use them."""
    calling = sum(bool(conversation.called_tools) for conversation in pool)
    uses = Counter(name for conversation in pool for name in conversation.called_tools)
    target = max(_ratio(test_ratio) * calling, _least(calling) if test_ratio is None else 0)
    heldout: set[str] = set()
    covered = 0
    for name in sorted(uses, key=lambda tool: _hash_key(f"order-{seed}-{tool}")):
        if covered >= target:
            break
        heldout.add(name)
        covered += uses[name]
    return frozenset(heldout)


def is_held_out(user_hash: str, seed: int, test_ratio: float | None) -> bool:
    """Return whether `Split.content` holds out what this user says, however many do."""
    return _hash_share(f"split-{seed}-{user_hash}") < _ratio(test_ratio)


def showing_keys(conversation: Conversation | Entry, seed: int) -> list[bytes]:
    """Return a sort key for each showing of a conversation in an epoch; none where its source's weight leaves it out.

    The first showing has the key of an unweighted conversation: a weight of 1 changes nothing.
    """
    keys: list[bytes] = []
    while (left := conversation.weight - len(keys)) > 0:
        showing = f"{seed}-{conversation.content_hash}" + (f"-{len(keys)}" if keys else "")
        # The last one is shown in full or, of a fraction, to as many conversations as it says.
        if left < 1 and _hash_share(f"weight-{showing}") >= left:
            break
        keys.append(_hash_key(f"order-{showing}"))
    return keys


def in_showing_order(conversations: Iterable[D], seed: int) -> list[D]:
    """Return the showings of an epoch, in an order whose first n are the sample of size n; a conversation can occur again."""
    showings = ((key, conversation) for conversation in conversations for key in showing_keys(conversation, seed))
    return [conversation for _, conversation in sorted(showings, key=lambda showing: showing[0])]


def in_sample_order(conversations: Sequence[D], seed: int) -> list[D]:
    """Order conversations so that the first n are the sample of size n: larger samples contain the smaller ones."""
    return sorted(conversations, key=lambda conversation: _hash_key(f"order-{seed}-{conversation.content_hash}"))


def _hash_share(key: str) -> float:
    """Map a key to [0, 1), uniformly."""
    return int.from_bytes(_hash_key(key)[:8], "big") / 2**64


def _hash_key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
