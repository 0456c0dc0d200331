"""When two parameter values are the same: strictly, as JSON values, and leniently, as a tolerant tool would take them.

| | strict | lenient |
|---|---|---|
| objects, arrays | keys in any order, items in order | the same, with lenient values |
| strings | by code point | NFKC, trimmed, blanks collapsed; no case folding, no punctuation removed |
| numbers | one type: 1 = 1.0; integers never pass through float | decimal arithmetic, also for "1" = 1 = "1.0" |
| booleans | are not numbers | "true" = true |
| JSON inside a string | a string | compared as JSON; a JSON string in a string stays text, its quotes are punctuation |
| null | a value | "null" = null; null or "" as a parameter = the parameter is absent |
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from typing import Any

from agentft.data.calls import Json, JsonRefused, read_json

_BLANKS = re.compile(r"\s+")
# The exponent is bounded so that Decimal can hold every number that matches.
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,6})?")

_DEEPEST_OPENED_STRING = 32
"""JSON inside strings inside JSON ...: below this level a string stays text, which bounds the recursion."""


def strictly_equal(left: Json, right: Json) -> bool:
    """Whether two JSON values are equal under the strict column above."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return _numbers_equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return False
        return all(strictly_equal(value, right[key]) for key, value in left.items())
    if isinstance(left, list):
        if len(left) != len(right):
            return False
        return all(strictly_equal(one, other) for one, other in zip(left, right, strict=True))
    return bool(left == right)


def lenient_parameters(parameters: dict[str, Json]) -> dict[str, Any]:
    """Return parameters in a form that compares with `==` exactly as the lenient column says."""
    forms = {key: _lenient_form(value, 0) for key, value in parameters.items()}
    return {key: form for key, form in forms.items() if form not in (_NULL, _EMPTY_TEXT)}


def leniently_equal(left: Json, right: Json) -> bool:
    """Whether two parameter values are equal under the lenient column above."""
    return lenient_parameters({"": left}) == lenient_parameters({"": right})


def _numbers_equal(left: float, right: float) -> bool:
    if type(left) is type(right):
        return left == right
    return _decimal(left) == _decimal(right)


def _decimal(number: float) -> Decimal:
    # repr of a float is the shortest decimal that reads back as it: the number as written, not its binary tail.
    return Decimal(repr(number)) if isinstance(number, float) else Decimal(number)


_NULL = ("null", None)
_EMPTY_TEXT = ("text", "")


def _lenient_form(value: Json, depth: int) -> tuple[str, Any]:
    """Return a tagged value, so that `==` never mixes kinds (in Python True == 1)."""
    if isinstance(value, str):
        return _lenient_text(value, depth)
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, int | float):
        return ("number", _decimal(value))
    if isinstance(value, dict):
        members: dict[str, Any] = {}
        for key, member in value.items():
            members[key] = _lenient_form(member, depth + 1)
        return ("object", members)
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            items.append(_lenient_form(item, depth + 1))
        return ("array", items)
    return _NULL


def _lenient_text(text: str, depth: int) -> tuple[str, Any]:
    trimmed = text.strip()
    if trimmed[:1] in ("{", "[") and depth < _DEEPEST_OPENED_STRING:
        try:
            return _lenient_form(read_json(trimmed), depth + 1)
        except JsonRefused:
            pass
    plain = _BLANKS.sub(" ", unicodedata.normalize("NFKC", trimmed)).strip()
    if plain in ("true", "false"):
        return ("boolean", plain == "true")
    if plain == "null":
        return _NULL
    if _JSON_NUMBER.fullmatch(plain):
        return ("number", Decimal(plain))
    return ("text", plain)
