"""Draw values by pool: what users say and tools return. Held-out records draw from other values than training records.

Word lists give every third entry to the held-out part, numbers in codes, amounts, dates and times those of one rest
modulo five. Small counts and enumerations are shared: there are too few of them to split. The words are in `en.yaml` and
`zh.yaml`.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import yaml

Json = Any
"""A value as `json.loads` returns it."""

Language = Literal["en", "zh"]
Part = Literal["train", "heldout"]
JsonType = Literal["string", "integer", "number", "boolean"]

Value = tuple[Json, str]
"""A value as the call holds it, and the words a user says for it."""

_HELDOUT_WORD_OF = 3
_HELDOUT_NUMBER_OF = 5
SLOT = re.compile(r"\{(\w+)\}")
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"

_COUNTS = ("minutes", "percent", "guests", "nights", "years", "days", "quantity", "principal", "height")
_TYPES: dict[str, JsonType] = {
    **dict.fromkeys(_COUNTS, "integer"),
    **dict.fromkeys(("amount", "interest", "kilograms", "measure", "setpoint", "budget", "mass"), "number"),
    **dict.fromkeys(("on_off", "lock_unlock", "with_without"), "boolean"),
}

# A tenth of the time of the loader in Python; both read every scalar as text, so that `on` stays a word.
_Loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


@cache
def read_yaml(name: str) -> Any:
    """Return the content of a file beside this module, to be left as it is; every scalar is a string."""
    return yaml.load((Path(__file__).parent / name).read_text(encoding="utf-8"), Loader=_Loader)


def base_pool(pool: str) -> str:
    """`city2` draws from `city`: the figure only says that the value differs from the first one."""
    return pool.removesuffix("2")


def plain_number(number: float) -> float | int:
    """Return `number` as an integer where it is whole: nobody says 21.0."""
    return int(number) if number == int(number) else number


def json_type(pool: str) -> JsonType:
    """Return the JSON type of a parameter that draws from `pool`."""
    return _TYPES.get(base_pool(pool), "string")


def enum_values(pool: str, language: Language) -> tuple[str, ...]:
    """Return all values of an enumeration; empty for other pools."""
    return tuple(read_yaml(f"{language}.yaml")["enumerations"].get(pool, ()))


@cache
def values_of(language: Language, part: Part) -> Values:
    """Return the pools of one language and part, made once."""
    return Values(language, part)


class Values:
    """Draws values by the name of a pool."""

    def __init__(self, language: Language, part: Part) -> None:
        self._heldout = part == "heldout"
        self._zh = language == "zh"
        words = read_yaml(f"{language}.yaml")
        split = words["split"] | ({"word": list(words["dictionary"])} if "dictionary" in words else {})
        self._lists: dict[str, Sequence[str]] = {pool: self._share(each) for pool, each in split.items()} | words[
            "shared"
        ]
        self._enumerations, self._booleans, self._composed = words["enumerations"], words["booleans"], words["composed"]
        self._makers = self._named_makers()

    def draw(self, pool: str, rng: random.Random) -> Value:
        """Draw from `pool`."""
        if words := self._lists.get(pool) or self._enumerations.get(pool):
            word = rng.choice(words)
            return word, word
        if pool in self._booleans:
            truth = rng.random() < 0.6
            return truth, self._booleans[pool][0 if truth else 1]
        value = self._compose(pool, rng) if pool in self._composed else self._makers[pool](rng)
        return value, str(value)

    def _compose(self, pool: str, rng: random.Random) -> str:
        """Say a value of several words; the file of the language explains how."""
        said: dict[str, str] = {}
        composed = self._composed[pool]
        for part in composed.get("first", ()):
            said[part] = self.draw(part, rng)[1]
        text: str = composed["say"][0]
        bounds = list(accumulate(map(float, composed.get("shares", ()))))
        if bounds:
            text = composed["say"][bisect(bounds, rng.random())]
        for part in SLOT.findall(text):
            if part not in said:
                said[part] = self.draw(part, rng)[1]
        return text.format_map(said)

    def pools(self) -> frozenset[str]:
        """Return the names that `draw` knows."""
        return frozenset({*self._lists, *self._enumerations, *self._booleans, *self._composed, *self._makers})

    def _share(self, words: Sequence[str]) -> tuple[str, ...]:
        return tuple(
            word
            for index, word in enumerate(words)
            if (index % _HELDOUT_WORD_OF == _HELDOUT_WORD_OF - 1) == self._heldout
        )

    def _integer(self, rng: random.Random, low: int, high: int) -> int:
        """Draw an integer in [low, high] whose rest modulo five is that of this part."""
        every = _HELDOUT_NUMBER_OF
        rest = every - 1 if self._heldout else rng.randrange(every - 1)
        first = low + (rest - low) % every
        return first + every * rng.randrange((high - first) // every + 1)

    def _code(self, rng: random.Random, letters: int, digits: int) -> str:
        number = self._integer(rng, 10 ** (digits - 1), 10**digits - 1)
        return "".join([rng.choice(_LETTERS) for _ in range(letters)]) + str(number)

    def _money(self, rng: random.Random, low: int, high: int) -> float | int:
        whole = self._integer(rng, low, high)
        return whole if rng.random() < 0.7 else whole + rng.choice((0.5, 0.25, 0.75, 0.4))

    def _named_makers(self) -> dict[str, Callable[[random.Random], Json]]:
        return {
            "host": lambda r: f"{r.choice(self._lists['host_role'])}-{self._integer(r, 10, 99)}",
            "email": self._email,
            "date": self._date,
            "time": lambda r: f"{r.randrange(6, 23):02d}:{self._integer(r, 0, 59):02d}",
            "symbol": lambda r: "".join(r.choice(_LETTERS[self._heldout :: 2]) for _ in range(r.choice((3, 4)))),
            "order": lambda r: self._code(r, r.choice((0, 1, 2)), 6),
            "parcel": lambda r: self._code(r, 2, 8),
            "flight": lambda r: self._code(r, 2, r.choice((3, 4))),
            "phone": lambda r: (
                f"1{r.choice('35789')}{self._integer(r, 10**8, 10**9 - 1)}"
                if self._zh
                else f"555-{self._integer(r, 1000, 9999)}"
            ),
            "account": lambda r: self._code(r, 0, 8),
            "card": lambda r: self._code(r, 0, 4),
            "event_id": lambda r: f"EV{self._integer(r, 100, 9999)}",
            "hotel_id": lambda r: f"H{self._integer(r, 100, 9999)}",
            "booking": lambda r: self._code(r, 2, 5),
            "note_id": lambda r: f"N{self._integer(r, 100, 9999)}",
            "product_id": lambda r: f"P-{self._integer(r, 1000, 99999)}",
            "song_id": lambda r: f"S{self._integer(r, 1000, 9999)}",
            "book_id": lambda r: f"B-{self._integer(r, 1000, 9999)}",
            "ticket": lambda r: f"T-{self._integer(r, 1000, 99999)}",
            "minutes": lambda r: self._integer(r, 3, 120),
            "percent": lambda r: self._integer(r, 5, 99),
            "guests": lambda r: r.randrange(2, 13),
            "nights": lambda r: r.randrange(1, 15),
            "years": lambda r: r.randrange(2, 31),
            "days": lambda r: r.randrange(3, 31),
            "quantity": lambda r: r.randrange(2, 20),
            "amount": lambda r: self._money(r, 20, 5000),
            "budget": lambda r: self._integer(r, 20, 400),
            "principal": lambda r: self._integer(r, 20, 900) * 1000,
            "interest": lambda r: plain_number(r.randrange(10, 90) / 10),
            "mass": lambda r: self._integer(r, 40, 130),
            "height": lambda r: r.randrange(150, 205),
            "kilograms": lambda r: plain_number(self._integer(r, 5, 300) / 10),
            "measure": lambda r: self._money(r, 3, 900),
            "setpoint": lambda r: plain_number(r.randrange(32, 52) / 2),
            "degrees": lambda r: r.randrange(-8, 38),
            "humidity": lambda r: r.randrange(20, 98),
            "index": lambda r: r.randrange(12, 190),
            "price": lambda r: plain_number(r.randrange(900, 60000) / 100),
            "fare": lambda r: r.randrange(30, 900),
            "rate": lambda r: r.randrange(200, 20000) / 10000,
            "kilometers": lambda r: plain_number(r.randrange(20, 9000) / 10),
            "count": lambda r: r.randrange(2, 9),
            "delay": lambda r: r.randrange(2, 12) * 5,
        }

    def _email(self, rng: random.Random) -> str:
        name = f"{rng.choice(self._lists['first_name'])}.{rng.choice(self._lists['last_name'])}".lower()
        return f"{name}@{rng.choice(('example.com', 'example.org', 'mail.test'))}"

    def _date(self, rng: random.Random) -> str:
        return f"{rng.randrange(2024, 2028)}-{rng.randrange(1, 13):02d}-{self._integer(rng, 1, 28):02d}"
