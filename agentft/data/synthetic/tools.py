"""What a tool of the catalogue is: its parameters, what it returns, and how people speak about it in each language."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Json = Any
"""A value as `json.loads` returns it."""

Language = Literal["en", "zh"]
Part = Literal["train", "heldout"]

Derived = Callable[[Mapping[str, Json]], Json]
"""Computes a field of an observation from the parameters and the fields before it."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a tool. Its pool (see `values.py`) gives both its values and its JSON type."""

    key: str
    """The slot it fills in phrasings; the name a conversation shows is one of `names`."""
    pool: str
    names: str
    """Synonyms in snake_case, separated by blanks."""
    en: str
    zh: str = ""
    required: bool = True


@dataclass(frozen=True, slots=True)
class Wording:
    """How people speak about a tool in one language.

    Phrasings hold slots such as `{city}`. A part in square brackets is said only when all its slots have a value:
    optional parameters always stand in brackets; a required one may, and can then be left out to be asked for.
    """

    descriptions: tuple[str, ...]
    goal: str
    """Completes "I could not ..." and "Let me ..."; in Chinese, "我来..."."""
    asks: tuple[str, ...]
    summaries: tuple[str, ...]
    both: tuple[str, ...] = ()
    """Requests for two values of the parameter `again`; the second fills the slot of that key with a 2 behind."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One concept of the catalogue, in one or both languages."""

    key: str
    family: str
    """Tools of a family are easily confused; a family as a whole is seen in training or held out."""
    names: tuple[str, ...]
    """Synonyms, words separated by blanks."""
    parameters: tuple[Parameter, ...]
    result: Mapping[str, str | Derived]
    """Fields of the observation: a pool, or a function of what is known."""
    en: Wording
    zh: Wording | None = None
    again: str = ""
    """The parameter that a follow-up question or a correction changes; empty where that would sound odd."""

    def wording(self, language: Language) -> Wording:
        """The phrasings in `language`; the caller has chosen a tool that speaks it."""
        wording = self.en if language == "en" else self.zh
        if wording is None:
            raise KeyError(f"tool {self.key!r} has no wording in {language!r}")
        return wording

    def parameter(self, key: str) -> Parameter:
        """The parameter filling slot `key`."""
        return next(parameter for parameter in self.parameters if parameter.key == key)


@dataclass(frozen=True, slots=True)
class Chain:
    """Two tools of which the second takes a value that the first returns."""

    first: str
    second: str
    links: Mapping[str, str]
    """Parameter of the second tool -> field of the first tool's observation."""
    en: tuple[str, ...]
    """Requests for both in one turn."""
    en_then: tuple[str, ...]
    """Requests for the second tool, after the first has answered."""
    zh: tuple[str, ...] = ()
    zh_then: tuple[str, ...] = ()

    def phrasings(self, language: Language) -> tuple[str, ...]:
        """Requests for both tools in one turn."""
        return self.en if language == "en" else self.zh

    def then_phrasings(self, language: Language) -> tuple[str, ...]:
        """Requests for the second tool in a later turn."""
        return self.en_then if language == "en" else self.zh_then


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
