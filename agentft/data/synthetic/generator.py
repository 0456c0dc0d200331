"""Records by number: the same arguments and number give the same record, whatever was generated before."""

from __future__ import annotations

import random
import zlib
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any, cast, get_args

from agentft.data.synthetic.dialogues import KINDS
from agentft.data.synthetic.scene import Scene
from agentft.data.synthetic.values import Language, Part
from agentft.errors import DataError

DEFAULT_LANGUAGES: Mapping[str, float] = MappingProxyType({"en": 0.9, "zh": 0.1})

_HELDOUT_ONE_IN = 4
"""One in so many first user turns can only be held out, by its checksum; the others only be trained on."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A conversation with what is known about how it came about."""

    kind: str
    language: Language
    conversation: list[dict[str, str]]


class Author:
    """Writes the conversations of one set of arguments, by number."""

    def __init__(
        self, *, seed: int, languages: Mapping[str, float], part: Part, unseen_tools: bool, max_rounds: int
    ) -> None:
        self._part: Part = part
        self._unseen_tools = unseen_tools
        self._max_rounds = max_rounds
        shares = _checked_languages(languages)
        self._languages = list(shares)
        self._language_bounds = list(accumulate(shares.values()))
        kinds = {name: kind for name, kind in KINDS.items() if kind.rounds <= max_rounds}
        self._kinds = list(kinds)
        self._kind_bounds = list(accumulate(kind.share for kind in kinds.values()))
        mix = ",".join(f"{language}={share!r}" for language, share in shares.items())
        self._stream = f"synthetic/{part}/{seed}/{unseen_tools}/{mix}/{max_rounds}"

    def draft(self, number: int) -> Draft:
        """Conversation `number`."""
        rng = random.Random(f"{self._stream}/{number}")
        language = self._languages[_drawn(rng, self._language_bounds)]
        kind = self._kinds[_drawn(rng, self._kind_bounds)]
        while True:
            scene = Scene(rng, language, self._part, unseen_tools=self._unseen_tools)
            KINDS[kind].play(scene, self._max_rounds)
            if part_of(scene.turns[0]) == self._part:
                break
        turns = [{"from": "system", "value": scene.system()}]
        for index, text in enumerate(scene.turns):
            turns.append({"from": "assistant" if index % 2 else "user", "value": text})
        return Draft(kind, language, turns)


def part_of(first_user_turn: str) -> Part:
    """The one part that a conversation beginning with this user turn can be in."""
    return "heldout" if zlib.crc32(first_user_turn.encode()) % _HELDOUT_ONE_IN == 0 else "train"


def generate(
    count: int,
    *,
    seed: int = 0,
    languages: Mapping[str, float] = DEFAULT_LANGUAGES,
    part: Part = "train",
    unseen_tools: bool = False,
    max_rounds: int = 3,
) -> Iterator[dict[str, Any]]:
    """Yield `count` records in the form of MSAgent-Bench.

    Record k depends on the keyword arguments and k alone, so a longer run begins with the records of a shorter one.

    Args:
        count: Number of records; memory does not depend on it.
        seed: Another seed, other records.
        languages: Weight of each language, `en` or `zh`.
        part: `train` and `heldout` share no first user turn, and draw names, places, codes and dates from other values.
        unseen_tools: Make the tools of the two parts disjoint too, whole families of similar tools at a time.
        max_rounds: Most user turns in a conversation; most conversations have one.

    Raises:
        DataError: an argument is out of range.
    """
    if count < 0:
        raise DataError(f"synthetic data: count is {count}, expected 0 or more")
    if max_rounds < 1:
        raise DataError(f"synthetic data: max_rounds is {max_rounds}, expected 1 or more")
    if part not in get_args(Part):
        raise DataError(f"synthetic data: part is {part!r}, expected one of {', '.join(get_args(Part))}")
    author = Author(seed=seed, languages=languages, part=part, unseen_tools=unseen_tools, max_rounds=max_rounds)
    return (
        {"id": f"synthetic-{part}-{seed}-{number:06d}", "conversations": author.draft(number).conversation}
        for number in range(count)
    )


def _drawn(rng: random.Random, bounds: list[float]) -> int:
    """An index, drawn by its share; `bounds` are the running sums of the shares."""
    return min(bisect(bounds, rng.random() * bounds[-1]), len(bounds) - 1)


def _checked_languages(languages: Mapping[str, float]) -> dict[Language, float]:
    known = get_args(Language)
    for language, share in languages.items():
        if language not in known:
            raise DataError(f"synthetic data: language {language!r} is unknown, expected one of {', '.join(known)}")
        if not 0 <= share < float("inf"):
            raise DataError(f"synthetic data: share of language {language!r} is {share}, expected 0 or more")
    positive = {cast("Language", language): float(languages[language]) for language in known if languages.get(language)}
    if not positive:
        raise DataError("synthetic data: no language has a share above 0, expected for example {'en': 0.9, 'zh': 0.1}")
    return positive
