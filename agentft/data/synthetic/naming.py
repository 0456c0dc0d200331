"""The names one conversation gives to tools and parameters, so that they must be read and cannot be learnt by heart."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from agentft.data.synthetic.tools import Tool

NameStyle = Literal["snake", "camel", "capitalized", "dotted", "prefixed", "versioned"]

_STYLES: tuple[NameStyle, ...] = ("snake", "camel", "capitalized", "dotted", "prefixed", "versioned")
_STYLE_WEIGHTS = (34, 22, 14, 12, 12, 6)
_ONSETS = ("b", "d", "f", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_RHYMES = ("a", "e", "i", "o", "u", "an", "el", "or", "ix")


@dataclass(frozen=True, slots=True)
class ToolNames:
    """What one conversation calls a tool and its parameters."""

    tool: str
    description: str
    parameters: dict[str, str]
    """Slot -> name."""


class Namer:
    """Names the tools of one conversation, all in one style."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._style: NameStyle = rng.choices(_STYLES, _STYLE_WEIGHTS)[0]
        self._prefix = "".join(rng.choice(_ONSETS) + rng.choice(_RHYMES) for _ in range(2))
        self._version = rng.randrange(2, 5)

    def name(self, tool: Tool, description: str) -> ToolNames:
        """Draw names for `tool`."""
        words = self._rng.choice(tool.names).split()
        parameters = {p.key: self._parameter(self._rng.choice(p.names.split())) for p in tool.parameters}
        return ToolNames(self._tool(words, tool.family), description, parameters)

    def _tool(self, words: list[str], family: str) -> str:
        snake = "_".join(words)
        match self._style:
            case "snake":
                return snake
            case "camel":
                return words[0] + "".join(word.capitalize() for word in words[1:])
            case "capitalized":
                return "".join(word.capitalize() for word in words)
            case "dotted":
                return f"{family}.{snake}"
            case "prefixed":
                return f"{self._prefix}_{snake}"
            case "versioned":
                return f"{snake}_v{self._version}"

    def _parameter(self, snake: str) -> str:
        if self._style not in ("camel", "capitalized"):
            return snake
        first, *others = snake.split("_")
        return first + "".join(word.capitalize() for word in others)
