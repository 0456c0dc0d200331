"""Where in the text of a call its name and its parameters stand; everything else of a call is its frame."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from agentft.data.calls import strip_fence
from agentft.data.grammar import THINK_CLOSE, THINK_OPEN, Call

_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"[ \t\r\n]*")

Place = tuple[int, int]
"""First character and the one after the last."""


def call_places(call: Call) -> list[Place]:
    """Names, without their quotes, and parameters of the requests of a call, as places in its source, in order.

    In a call that cannot be read nothing can be told apart: its body is one place.
    """
    text = strip_fence(call.body)
    start = call.source.index(text, len(THINK_OPEN))
    if call.failure is not None:
        return [(len(THINK_OPEN), len(call.source) - len(THINK_CLOSE))]
    return [(start + first, start + last) for first, last in _places(text)]


def _places(text: str) -> Iterator[Place]:
    """The places in the JSON text of one request or of a list of them; the text is known to be sound."""
    at = 0
    if text.startswith("["):
        at = _after_space(text, 1)
    while text.startswith("{", at):
        places, at = _object_places(text, at)
        yield from sorted(places.values())
        at = _after_space(text, at)
        if text.startswith(",", at):
            at = _after_space(text, at + 1)


def _object_places(text: str, at: int) -> tuple[dict[str, Place], int]:
    """By key the places of one request, and where its object ends. Of a key given twice the last counts, as in reading."""
    places: dict[str, Place] = {}
    at = _after_space(text, at + 1)
    while not text.startswith("}", at):
        key, at = _DECODER.raw_decode(text, at)
        start = _after_space(text, _after_space(text, at) + 1)  # behind the colon
        _, at = _DECODER.raw_decode(text, start)
        if key == "api_name":
            places[key] = (start + 1, at - 1)
        elif key == "parameters":
            places[key] = (start, at)
        at = _after_space(text, at)
        if text.startswith(",", at):
            at = _after_space(text, at + 1)
    return places, at + 1


def _after_space(text: str, at: int) -> int:
    if text[at : at + 1] not in " \t\r\n":  # most often there is none; beyond the end "" is in every text
        return at
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()
