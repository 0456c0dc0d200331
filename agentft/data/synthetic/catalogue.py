"""Load the tools, chains, phrases and pools of values of the dataset from the YAML files beside this module.

Held-out records draw from other values than training records: every third word of a list, and in codes, amounts, dates and
times the numbers of one rest modulo five. Small counts and enumerations are too few to be split.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import yaml

from agentft.data.calls import Json

Language = Literal["en", "zh"]
Part = Literal["train", "heldout"]
JsonType = Literal["string", "integer", "number", "boolean"]

Value = tuple[Json, str]
"""A value as the call holds it, and the words a user says for it."""

_HELDOUT_WORD_OF = 3
_HELDOUT_NUMBER_OF = 5
_SLOT = re.compile(r"\{(\w+)\}")
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"

BRACKETS = re.compile(r"\[([^\]]*)\]")
"""Parts of a phrasing that are said only where a word for each of their slots is there."""

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


@cache
def json_type(pool: str) -> JsonType:
    """Return the JSON type of a parameter that draws from `pool`."""
    types: Mapping[JsonType, list[str]] = read_yaml("numbers.yaml")["types"]
    return next((name for name, pools in types.items() if base_pool(pool) in pools), "string")


def enum_values(pool: str, language: Language) -> tuple[str, ...]:
    """Return all values of an enumeration; empty for other pools."""
    return tuple(read_yaml(f"{language}.yaml")["enumerations"].get(pool, ()))


Derived = Callable[[Mapping[str, Json]], Json]
"""Computes a field of an observation from the parameters and the fields before it."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a tool. Its pool (see `ValuePools`) gives both its values and its JSON type."""

    key: str
    """The slot it fills in phrasings; the name a conversation shows is one of `names`."""
    pool: str
    names: Sequence[str]
    """Synonyms in snake_case."""
    description: str
    required: bool


@dataclass(frozen=True, slots=True)
class Tool:
    """One concept of the catalogue, as people speak about it in one language; `tools.yaml` explains the fields."""

    key: str
    family: str
    names: Sequence[str]
    """Synonyms, words separated by blanks."""
    parameters: Sequence[Parameter]
    result: Mapping[str, str | Derived]
    """Fields of the observation: a pool, or a function of what is known."""
    again: str
    """The parameter that a follow-up question or a correction changes; empty where that would sound odd."""
    descriptions: Sequence[str]
    goal: str
    asks: Sequence[str]
    summaries: Sequence[str]
    both: Sequence[str] = ()

    def parameter(self, key: str) -> Parameter:
        """Return the parameter filling slot `key`."""
        return next(parameter for parameter in self.parameters if parameter.key == key)


@dataclass(frozen=True, slots=True)
class Chain:
    """Two tools of which the second takes a value that the first returns."""

    tools: Sequence[str]
    links: Mapping[str, str]
    """Parameter of the second tool -> field of the first tool's observation."""
    at_once: Sequence[str]
    """Requests for both in one turn."""
    then: Sequence[str] = ()
    """Requests for the second in a later turn, after the first has answered."""


@cache
def tools(language: Language) -> tuple[Tool, ...]:
    """Return all tools that people speak about in `language`, in the order of the file."""
    other = ("heldout", "looked_up", "shared")
    families = {name: group for name, group in read_yaml("tools.yaml").items() if name not in other}
    return tuple(
        _tool(key, family, language, entry)
        for family, group in families.items()
        for key, entry in group.items()
        if language in entry
    )


def heldout_families() -> frozenset[str]:
    """Return the families that `unseen_tools` keeps out of training."""
    return frozenset(read_yaml("tools.yaml")["heldout"])


@cache
def chains(language: Language) -> tuple[Chain, ...]:
    """Return all chains that can be asked for in `language`, in the order of the file."""
    entries = [entry for entry in read_yaml("chains.yaml") if language in entry]
    return tuple(Chain(entry["tools"], entry["links"], **entry[language]) for entry in entries)


def _tool(key: str, family: str, language: Language, entry: Mapping[str, Any]) -> Tool:
    parameters = [
        Parameter(slot, of.get("pool", slot), of["names"], of.get(language, ""), kind == "parameters")
        for kind in ("parameters", "optional")
        for slot, of in entry.get(kind, {}).items()
    ]
    result = {field: COMPUTED.get(source, source) for field, source in entry["returns"].items()}
    return Tool(key, family, entry["names"], parameters, result, entry.get("again", ""), **entry[language])


_METERS = {"km": 1000.0, "miles": 1609.344, "m": 1.0, "feet": 0.3048, "inches": 0.0254, "cm": 0.01, "yards": 0.9144}


def _converted_length(known: Mapping[str, Json]) -> Json:
    return plain_number(round(known["measure"] * _METERS[known["source"]] / _METERS[known["target"]], 2))


def _monthly_payment(known: Mapping[str, Json]) -> Json:
    rate = known["interest"] / 1200
    return plain_number(round(known["principal"] * rate / (1 - (1 + rate) ** (-12 * known["years"])), 2))


COMPUTED: Mapping[str, Derived] = {
    "body_mass_index": lambda known: plain_number(round(known["kilograms"] / (known["height"] / 100) ** 2, 1)),
    "converted_amount": lambda known: plain_number(round(known["amount"] * known["rate"], 2)),
    "converted_length": _converted_length,
    "monthly_payment": _monthly_payment,
    "us_dollars": lambda _: "USD",
    "word_meaning": lambda known: read_yaml("en.yaml")["dictionary"][known["word"]][0],
    "word_synonyms": lambda known: read_yaml("en.yaml")["dictionary"][known["word"]][1:],
}
"""Fields of a result that follow from the call, by the name that stands in `tools.yaml`."""


@dataclass(frozen=True)
class Shelf:
    """The tools that a set of records may use, in one language."""

    language: Language
    tools: tuple[Tool, ...]

    @cached_property
    def by_key(self) -> dict[str, Tool]:
        """Tools by concept."""
        return {tool.key: tool for tool in self.tools}

    @cached_property
    def chains(self) -> tuple[Chain, ...]:
        """Chains of which both tools are here."""
        return tuple(chain for chain in chains(self.language) if self.by_key.keys() >= set(chain.tools))

    @cached_property
    def lookups(self) -> tuple[Tool, ...]:
        """Tools that may fail to find what they are asked for."""
        pools = read_yaml("tools.yaml")["looked_up"]
        return tuple(tool for tool in self.tools if tool.again and base_pool(tool.parameter(tool.again).pool) in pools)

    @cached_property
    def misspellable(self) -> tuple[tuple[Tool, str], ...]:
        """Tools and the parameter in which a user may err so that the tool can still guess what was meant."""
        pools = {"city", "person", "restaurant"} if self.language == "en" else {"city"}
        return tuple((tool, p.key) for tool in self.tools for p in tool.parameters if p.required and p.pool in pools)

    @cached_property
    def incomplete(self) -> tuple[tuple[Tool, str, tuple[str, ...]], ...]:
        """Tools, a required parameter that can go unsaid, and the phrasings that leave it out."""
        found = []
        for tool in self.tools:
            for key in (p.key for p in tool.parameters if p.required):
                asks = [ask for ask in tool.asks if any(slots_of(part) == {key} for part in BRACKETS.findall(ask))]
                found += [(tool, key, tuple(asks))] * bool(asks)
        return tuple(found)


@cache
def shelf(language: Language, part: Part, unseen_tools: bool) -> Shelf:
    """Return the tools of `language`; with `unseen_tools` only those of `part`."""
    chosen = tools(language)
    if unseen_tools:
        chosen = tuple(tool for tool in chosen if (tool.family in heldout_families()) == (part == "heldout"))
    return Shelf(language, chosen)


@cache
def slots_of(phrasing: str) -> frozenset[str]:
    """Return the slots in a phrasing."""
    return frozenset(_SLOT.findall(phrasing))


def fill(phrasing: str, words: Mapping[str, str]) -> str:
    """Put `words` into the slots of `phrasing`, leaving out the brackets for which one is missing."""
    known = words.keys()
    return BRACKETS.sub(lambda found: found[1] if slots_of(found[1]) <= known else "", phrasing).format_map(words)


@cache
def value_pools(language: Language, part: Part) -> ValuePools:
    """Return the pools of one language and part, made once."""
    return ValuePools(language, part)


class ValuePools:
    """Draws values by the name of a pool."""

    def __init__(self, language: Language, part: Part) -> None:
        self._heldout = part == "heldout"
        self._zh = language == "zh"
        words, numbers = read_yaml(f"{language}.yaml"), read_yaml("numbers.yaml")
        split = words["split"] | ({"word": list(words["dictionary"])} if "dictionary" in words else {})
        lists: dict[str, Sequence[str]] = {pool: self._share(each) for pool, each in split.items()}
        self._lists = lists | words["shared"] | words["enumerations"]
        self._booleans: dict[str, list[str]] = words["booleans"]
        self._makers = self._named_makers()
        for pool, (low, high) in numbers["shared"].items():
            self._makers[pool] = partial(random.Random.randint, a=int(low), b=int(high))
        for pool, (low, high) in numbers["split"].items():
            self._makers[pool] = partial(self._integer, low=int(low), high=int(high))
        for pool, entry in (words["composed"] | numbers["composed"]).items():
            self._makers[pool] = partial(self._compose, entry)
        for pool, each in self._lists.items():
            self._makers[pool] = partial(random.Random.choice, seq=each)

    def draw(self, pool: str, rng: random.Random) -> Value:
        """Draw from `pool`."""
        if pool in self._booleans:
            truth = rng.random() < 0.6
            return truth, self._booleans[pool][0 if truth else 1]
        value = self._makers[pool](rng)
        return value, str(value)

    def pools(self) -> frozenset[str]:
        """Return the names that `draw` knows."""
        return frozenset({*self._booleans, *self._makers})

    def _compose(self, composed: Mapping[str, Any], rng: random.Random) -> str:
        """Put a value together from others; the file of the language explains how."""
        said = {part: self.draw(part, rng)[1] for part in composed.get("first", ())}
        text: str = composed["say"][0]
        if "shares" in composed:
            text = composed["say"][bisect(list(accumulate(map(float, composed["shares"]))), rng.random())]
        for part in _SLOT.findall(text):
            if part not in said:
                said[part] = self.draw(part, rng)[1]
        return text.format_map(said)

    def _share(self, words: Sequence[str]) -> tuple[str, ...]:
        every = _HELDOUT_WORD_OF
        heldout = tuple(words[every - 1 :: every])
        return heldout if self._heldout else tuple(word for at, word in enumerate(words) if at % every != every - 1)

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
            "booking": lambda r: self._code(r, 2, 5),
            "amount": lambda r: self._money(r, 20, 5000),
            "principal": lambda r: self._integer(r, 20, 900) * 1000,
            "interest": lambda r: plain_number(r.randrange(10, 90) / 10),
            "kilograms": lambda r: plain_number(self._integer(r, 5, 300) / 10),
            "measure": lambda r: self._money(r, 3, 900),
            "setpoint": lambda r: plain_number(r.randrange(32, 52) / 2),
            "price": lambda r: plain_number(r.randrange(900, 60000) / 100),
            "rate": lambda r: r.randrange(200, 20000) / 10000,
            "kilometers": lambda r: plain_number(r.randrange(20, 9000) / 10),
            "delay": lambda r: r.randrange(2, 12) * 5,
        }

    def _email(self, rng: random.Random) -> str:
        name = f"{rng.choice(self._lists['first_name'])}.{rng.choice(self._lists['last_name'])}".lower()
        return f"{name}@{rng.choice(('example.com', 'example.org', 'mail.test'))}"

    def _date(self, rng: random.Random) -> str:
        return f"{rng.randrange(2024, 2028)}-{rng.randrange(1, 13):02d}-{self._integer(rng, 1, 28):02d}"
