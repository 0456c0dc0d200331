"""Load the tools, chains and phrases of the dataset from `tools.yaml`, `chains.yaml`, `en.yaml` and `zh.yaml`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

from agentft.data.synthetic.values import Json, Language, Part, base_pool, plain_number, read_yaml

Derived = Callable[[Mapping[str, Json]], Json]
"""Computes a field of an observation from the parameters and the fields before it."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a tool. Its pool (see `values.py`) gives both its values and its JSON type."""

    key: str
    """The slot it fills in phrasings; the name a conversation shows is one of `names`."""
    pool: str
    names: Sequence[str]
    """Synonyms in snake_case."""
    en: str
    zh: str = ""
    required: bool = True


@dataclass(frozen=True, slots=True)
class Wording:
    """How people speak about a tool in one language; the fields are explained in `tools.yaml`."""

    descriptions: Sequence[str]
    goal: str
    asks: Sequence[str]
    summaries: Sequence[str]
    both: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """One concept of the catalogue, in one or both languages."""

    key: str
    family: str
    names: Sequence[str]
    """Synonyms, words separated by blanks."""
    parameters: Sequence[Parameter]
    result: Mapping[str, str | Derived]
    """Fields of the observation: a pool, or a function of what is known."""
    en: Wording
    zh: Wording | None = None
    again: str = ""
    """The parameter that a follow-up question or a correction changes; empty where that would sound odd."""

    def wording(self, language: Language) -> Wording:
        """Return the phrasings in `language`; the caller has chosen a tool that speaks it."""
        wording = self.en if language == "en" else self.zh
        if wording is None:
            raise KeyError(f"tool {self.key!r} has no wording in {language!r}")
        return wording

    def parameter(self, key: str) -> Parameter:
        """Return the parameter filling slot `key`."""
        return next(parameter for parameter in self.parameters if parameter.key == key)


@dataclass(frozen=True, slots=True)
class Chain:
    """Two tools of which the second takes a value that the first returns."""

    tools: Sequence[str]
    links: Mapping[str, str]
    """Parameter of the second tool -> field of the first tool's observation."""
    en: Mapping[str, Sequence[str]]
    zh: Mapping[str, Sequence[str]] | None = None

    @property
    def first(self) -> str:
        """The concept that is called first."""
        return self.tools[0]

    @property
    def second(self) -> str:
        """The concept that is called with the result."""
        return self.tools[1]

    def phrasings(self, language: Language) -> Sequence[str]:
        """Return requests for both tools in one turn."""
        return ((self.en if language == "en" else self.zh) or {}).get("at_once", ())

    def then_phrasings(self, language: Language) -> Sequence[str]:
        """Return requests for the second tool in a later turn, after the first has answered."""
        return ((self.en if language == "en" else self.zh) or {}).get("then", ())


@dataclass(frozen=True, slots=True)
class Phrasebook:
    """What is said in one language whatever the tool. Slots are filled by `dialogues.py`."""

    instructions: Sequence[str]
    at_once: str
    """Added to the instruction where several calls stand in one turn without waiting for results."""
    plugins: str
    greetings: Sequence[str]
    announcements: Sequence[str]
    joints: Sequence[str]
    """Between two requests in one turn."""
    between_summaries: str
    list_joint: str
    name_joint: str
    again: Sequence[str]
    questions: Sequence[str]
    replies: Sequence[str]
    corrections: Sequence[str]
    refusals: Sequence[str]
    failures: Sequence[str]
    errors: Sequence[str]
    not_found: str
    unknown: str
    thanks: Sequence[Sequence[str]]
    """Pairs of what the user says and what the assistant replies, as in the next two."""
    abilities: Sequence[Sequence[str]]
    small_talk: Sequence[Sequence[str]]


@cache
def phrasebook(language: Language) -> Phrasebook:
    """Return the phrases of `language`."""
    return Phrasebook(**read_yaml(f"{language}.yaml")["phrases"])


@cache
def tools() -> tuple[Tool, ...]:
    """Return all tools, in the order of the file."""
    families = {name: group for name, group in read_yaml("tools.yaml").items() if name not in ("heldout", "shared")}
    return tuple(_tool(key, family, **entry) for family, group in families.items() for key, entry in group.items())


def heldout_families() -> frozenset[str]:
    """Return the families that `unseen_tools` keeps out of training."""
    return frozenset(read_yaml("tools.yaml")["heldout"])


@cache
def chains() -> tuple[Chain, ...]:
    """Return all chains, in the order of the file."""
    return tuple(Chain(**entry) for entry in read_yaml("chains.yaml"))


def _tool(
    key: str,
    family: str,
    *,
    names: Sequence[str],
    parameters: Mapping[str, Mapping[str, Any]],
    returns: Mapping[str, str],
    en: Mapping[str, Any],
    optional: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    zh: Mapping[str, Any] | None = None,
    again: str = "",
) -> Tool:
    """Return a tool from its entry in `tools.yaml`, whose keys are the arguments."""
    listed = [(slot, fields, True) for slot, fields in parameters.items()]
    listed += [(slot, fields, False) for slot, fields in optional.items()]
    return Tool(
        key,
        family,
        names,
        [Parameter(slot, required=required, **{"pool": slot, **fields}) for slot, fields, required in listed],
        {field: COMPUTED.get(source, source) for field, source in returns.items()},
        Wording(**en),
        Wording(**zh) if zh is not None else None,
        again,
    )


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

LOOKED_UP_POOLS = frozenset(
    {"city", "person", "room", "door", "place", "word", "dish", "email", "symbol", "host", "event"}
    | {"order", "parcel", "flight", "account", "card", "event_id", "note_id", "song_id", "book_id", "ticket", "booking"}
)
"""Values that a tool may fail to find."""


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
    def families(self) -> dict[str, tuple[Tool, ...]]:
        """Tools by family."""
        return {name: tuple(t for t in self.tools if t.family == name) for name in {t.family for t in self.tools}}

    @cached_property
    def chains(self) -> tuple[Chain, ...]:
        """Chains of which both tools are here."""
        return tuple(
            c for c in chains() if c.phrasings(self.language) and c.first in self.by_key and c.second in self.by_key
        )

    @cached_property
    def lookups(self) -> tuple[Tool, ...]:
        """Tools that may fail to find what they are asked for."""
        return tuple(t for t in self.tools if t.again and base_pool(t.parameter(t.again).pool) in LOOKED_UP_POOLS)

    @cached_property
    def doubled(self) -> tuple[Tool, ...]:
        """Tools with a phrasing for two values at once."""
        return tuple(tool for tool in self.tools if tool.wording(self.language).both)

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
            for parameter in tool.parameters:
                asks = tuple(ask for ask in tool.wording(self.language).asks if _alone_in_brackets(ask, parameter.key))
                if parameter.required and asks:
                    found.append((tool, parameter.key, asks))
        return tuple(found)


def _alone_in_brackets(phrasing: str, key: str) -> bool:
    return any(segment.bracketed and segment.slots == {key} for segment in segments(phrasing))


@cache
def shelf(language: Language, part: Part, unseen_tools: bool) -> Shelf:
    """Return the tools of `language`; with `unseen_tools` only those of `part`."""
    chosen = tuple(tool for tool in tools() if language == "en" or tool.zh is not None)
    if unseen_tools:
        chosen = tuple(tool for tool in chosen if (tool.family in heldout_families()) == (part == "heldout"))
    return Shelf(language, chosen)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a phrasing and the slots in it."""

    text: str
    slots: frozenset[str]
    bracketed: bool


_BRACKETS = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


@cache
def segments(phrasing: str) -> tuple[Segment, ...]:
    """Split a phrasing at its square brackets."""
    pieces = _BRACKETS.split(phrasing)
    return tuple(
        Segment(text, frozenset(_SLOT.findall(text)), bracketed=index % 2 == 1)
        for index, text in enumerate(pieces)
        if text
    )


def fill(phrasing: str, spoken: Mapping[str, str]) -> str:
    """Say `phrasing` with the words in `spoken`, leaving out the brackets for which a word is missing."""
    known = spoken.keys()
    return "".join(
        segment.text.format_map(spoken) if segment.slots else segment.text
        for segment in segments(phrasing)
        if not segment.bracketed or segment.slots <= known
    )
