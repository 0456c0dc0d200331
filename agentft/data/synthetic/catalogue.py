"""Load the tools, chains and phrases of the dataset from `tools.yaml`, `chains.yaml`, `en.yaml` and `zh.yaml`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from agentft.data.synthetic.values import SLOT, Json, Language, Part, base_pool, plain_number, read_yaml

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


def phrasebook(language: Language) -> Mapping[str, Any]:
    """Return what is said in one language whatever the tool; `en.yaml` explains each."""
    phrases: Mapping[str, Any] = read_yaml(f"{language}.yaml")["phrases"]
    return phrases


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
    listed = [(*each, True) for each in entry["parameters"].items()]
    listed += [(*each, False) for each in entry.get("optional", {}).items()]
    return Tool(
        key,
        family,
        entry["names"],
        [
            Parameter(slot, of.get("pool", slot), of["names"], of.get(language, ""), needed)
            for slot, of, needed in listed
        ],
        {field: COMPUTED.get(source, source) for field, source in entry["returns"].items()},
        entry.get("again", ""),
        **entry[language],
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
        return tuple(chain for chain in chains(self.language) if self.by_key.keys() >= set(chain.tools))

    @cached_property
    def lookups(self) -> tuple[Tool, ...]:
        """Tools that may fail to find what they are asked for."""
        pools = read_yaml("tools.yaml")["looked_up"]
        return tuple(tool for tool in self.tools if tool.again and base_pool(tool.parameter(tool.again).pool) in pools)

    @cached_property
    def doubled(self) -> tuple[Tool, ...]:
        """Tools with a phrasing for two values at once."""
        return tuple(tool for tool in self.tools if tool.both)

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
                asks = tuple(ask for ask in tool.asks if _alone_in_brackets(ask, parameter.key))
                if parameter.required and asks:
                    found.append((tool, parameter.key, asks))
        return tuple(found)


def _alone_in_brackets(phrasing: str, key: str) -> bool:
    return any(segment.bracketed and segment.slots == {key} for segment in segments(phrasing))


@cache
def shelf(language: Language, part: Part, unseen_tools: bool) -> Shelf:
    """Return the tools of `language`; with `unseen_tools` only those of `part`."""
    chosen = tools(language)
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


@cache
def segments(phrasing: str) -> tuple[Segment, ...]:
    """Split a phrasing at its square brackets."""
    pieces = _BRACKETS.split(phrasing)
    return tuple(
        Segment(text, frozenset(SLOT.findall(text)), bracketed=index % 2 == 1)
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
