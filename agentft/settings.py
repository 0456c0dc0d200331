"""Define the base of every dataclass of settings: a field says in its metadata what it may be, and another value is refused.

    rank: int = field(default=8, metadata={"minimum": 1, "maximum": 16384})

`minimum` and `maximum` belong to the range of a number, `above` and `below` do not; `also` is a value beside it (-1 for
"all"); `one_of` lists the values where there are few. Every number has a lower and an upper end, so that neither nan nor inf
is ever taken. `choices` are the words that a text may be, and a text with `json` is a JSON object.

`advanced` settings are left out of `--help`, and out of a run's `config.yaml` where they have their default.

`affects` is the first of these that another value changes: `data` (the examples), `losses` (of a training step), `answers`
(of a model to a step), `results` (scores, reports, exported files); or `nothing` of them. A class sets it for its fields,
`class X(Settings, affects="losses")`, and a field for itself. The name of an option affects what the option does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal

from agentft.errors import ConfigError

Affects = Literal["data", "losses", "answers", "results", "nothing"]

SEED = {"minimum": 0, "maximum": 2**32 - 1}
"""Range of a seed: what NumPy takes."""


@dataclass(frozen=True)
class Number:
    """What a field that holds a number allows."""

    whole: bool
    optional: bool
    range: Mapping[str, Any]

    def allows(self, value: object) -> bool:
        """Return whether the field may have this value."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        if "one_of" in self.range:
            return value in self.range["one_of"]
        if value == self.range.get("also"):
            return True
        is_high_enough = value > self.range["above"] if "above" in self.range else value >= self.range["minimum"]
        is_low_enough = value < self.range["below"] if "below" in self.range else value <= self.range["maximum"]
        return bool(is_high_enough and is_low_enough)

    def __str__(self) -> str:
        """Return the range in words: `a whole number from 1 to 1024 or null`."""
        if "one_of" in self.range:
            return " or ".join(map(str, self.range["one_of"]))
        if self.range.keys() >= {"minimum", "maximum"}:
            ends = f"from {self.range['minimum']:,} to {self.range['maximum']:,}"
        else:
            words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
            ends = " and ".join(f"{word} {self.range[key]:,}" for key, word in words.items() if key in self.range)
        beside = [str(self.range["also"])] if "also" in self.range else []
        kind = "a whole number" if self.whole else "a number"
        return " or ".join([f"{kind} {ends}", *beside, *(["null"] if self.optional else [])])


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; `dataclasses.MISSING` where a value has to be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


hints_of = functools.cache(typing.get_type_hints)
"""The types of a dataclass's fields, by name."""


@functools.cache
def numbers(schema: type) -> Mapping[str, Number]:
    """Return the fields of a dataclass that hold a number, by name."""
    hints = hints_of(schema)
    found = {}
    for field in dataclasses.fields(schema):
        kinds = set(typing.get_args(hints[field.name])) or {hints[field.name]}
        if kinds <= {int, float, type(None)}:
            found[field.name] = Number(float not in kinds, type(None) in kinds, field.metadata)
    return found


def members(hint: Any) -> list[str]:
    """Return the names that a setting of this type may have if it is an enumeration, else none."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, Enum):
            return list(part.__members__)
    return []


def accepted(hint: Any, number: Number | None = None) -> str:
    """Return what a setting of this type, and of this range, accepts, as a user reads it."""
    if number is not None:
        return str(number)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return f"{' or '.join(accepted(part) for part in parts)} or null"
    if typing.get_origin(hint) is list:
        return "a list like [a,b]"
    if names := members(hint):
        return f"one of {', '.join(names)}"
    return {bool: "true or false", str: "text"}.get(hint, "settings by name")


def affects(schema: type[Settings], group: str = "") -> dict[str, Affects]:
    """Return what each setting of a schema, of its subclasses and of the schemas inside it affects, by dotted name."""
    found: dict[str, Affects] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, name = hints[field.name], group + field.name
        parts = (hint, *typing.get_args(hint))
        inner = [part for part in parts if isinstance(part, type) and issubclass(part, Settings)]
        found |= affects(inner[0], f"{name}.") if inner else {name: field.metadata.get("affects", schema._affects)}
    for each in schema.__subclasses__():
        found |= affects(each, group)
    return found


@dataclass(kw_only=True)
class Settings:
    """A group of settings. `class X(Settings, group="model")` names the group for messages; a subclass inherits it.

    Raises:
        ConfigError: a value is not what its field may be.
    """

    _group = ""
    _affects: ClassVar[Affects]

    def __init_subclass__(cls, group: str | None = None, affects: Affects | None = None) -> None:
        if group is not None:
            cls._group = f"{group}."
        if affects is not None:
            cls._affects = affects

    def __post_init__(self) -> None:
        schema: type = type(self)
        for name, number in numbers(schema).items():
            if not number.allows(value := getattr(self, name)):
                raise ConfigError(f"{self._group}{name}={value}: expected {number}")
        for field in dataclasses.fields(self):
            name, value = f"{self._group}{field.name}", getattr(self, field.name)
            if choices := field.metadata.get("choices"):
                setattr(self, field.name, value := str(value).lower())  # a truth value of YAML comes as `True`
                if value not in choices:
                    raise ConfigError(f"{name}={value}: expected one of {', '.join(choices)}")
            if field.metadata.get("json") and value is not None:
                _require_object(name, value)


def _require_object(name: str, text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name}={text!r}: expected a JSON object")


def set_variables(values: Mapping[str, str | None]) -> None:
    """Set environment variables; those of value None are removed."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def environment_variables(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables, as `set_variables` does, inside the block."""
    before = {name: os.environ.get(name) for name in values}
    set_variables(values)
    try:
        yield
    finally:
        set_variables(before)
