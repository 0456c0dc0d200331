"""Draw one conversation: its tools and the names it gives them, the values, and the text of its turns."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from agentft.data.synthetic.catalogue import Tool, fill, phrasebook, shelf
from agentft.data.synthetic.values import Json, Language, Part, Value, base_pool, enum_values, json_type, values_of

OPTIONAL_SHARE = 0.35
"""How often a user mentions an optional parameter."""

GREETING_SHARE = 0.15
INDENTED_SHARE = 0.1
"""Conversations whose JSON is written over several lines."""

_T = TypeVar("_T")

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
        parameters = {p.key: self._parameter(self._rng.choice(p.names)) for p in tool.parameters}
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


@dataclass(frozen=True, slots=True)
class Request:
    """A tool and the parameters that a user wants it called with."""

    tool: Tool
    values: dict[str, Json]
    spoken: dict[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool returned, and the words for it together with those of its request."""

    observation: dict[str, Json]
    spoken: dict[str, str]


class Scene:
    """Draws everything that one conversation needs from one random stream and collects its turns."""

    def __init__(
        self, rng: random.Random, language: Language, part: Part, *, unseen_tools: bool, max_rounds: int
    ) -> None:
        self.rng = rng
        self.language: Language = language
        self.shelf = shelf(language, part, unseen_tools)
        self.phrases = phrasebook(language)
        self.max_rounds = max_rounds
        self.turns: list[str] = []
        self.at_once = False
        self._values = values_of(language, part)
        self._namer = Namer(rng)
        self._names: dict[str, ToolNames] = {}
        self._tools: list[Tool] = []
        self._is_closed = False
        self._indent = 3 if rng.random() < INDENTED_SHARE else None

    # Drawing

    def pick(self, options: Sequence[_T]) -> _T:
        """Return one of `options`."""
        return options[int(self.rng.random() * len(options))]

    def chance(self, share: float) -> bool:
        """Return true in `share` of the cases."""
        return self.rng.random() < share

    def value(self, pool: str, unlike: Iterable[str] = ()) -> Value:
        """Draw a value of `pool` whose words are not among `unlike`."""
        taken = set(unlike)
        for _ in range(100):
            value = self._values.draw(base_pool(pool), self.rng)
            if value[1] not in taken:
                break
        return value

    def request(
        self,
        tool: Tool,
        *,
        given: Mapping[str, Value] | None = None,
        optional: bool = True,
        unlike: Iterable[str] = (),
    ) -> Request:
        """Draw the parameters of `tool` that are not `given`; some optional ones unless `optional` is false."""
        values: dict[str, Json] = {}
        spoken: dict[str, str] = {}
        taken = set(unlike)
        for parameter in tool.parameters:
            if given is not None and parameter.key in given:
                value, words = given[parameter.key]
            elif parameter.required or (optional and self.chance(OPTIONAL_SHARE)):
                value, words = self.value(parameter.pool, taken)
            else:
                continue
            values[parameter.key], spoken[parameter.key] = value, words
            if json_type(parameter.pool) == "string":
                taken.add(words)
        return Request(tool, values, spoken)

    def changed(self, request: Request, key: str, value: Value | None = None) -> Request:
        """Return the same request with another value of `key`."""
        if value is None:
            value = self.value(request.tool.parameter(key).pool, request.spoken.values())
        return Request(request.tool, {**request.values, key: value[0]}, {**request.spoken, key: value[1]})

    def result(self, request: Request) -> Result:
        """Return what the tool returns."""
        known = dict(request.values)
        spoken = dict(request.spoken)
        observation: dict[str, Json] = {}
        for name, source in request.tool.result.items():
            if isinstance(source, str):
                value, words = self._returned(source, spoken.values())
            else:
                value = source(known)
                words = self.phrases["list_joint"].join(value) if isinstance(value, list) else str(value)
            observation[name] = known[name] = value
            spoken[name] = words
        return Result(observation, spoken)

    def _returned(self, pool: str, unlike: Iterable[str]) -> Value:
        if not pool.endswith("*2"):
            return self.value(pool, unlike if json_type(pool) == "string" else ())
        first = self.value(pool[:-2], unlike)
        second = self.value(pool[:-2], {*unlike, first[1]})
        return [first[0], second[0]], f"{first[1]}{self.phrases['list_joint']}{second[1]}"

    # Turns

    def user(self, text: str) -> None:
        """Append a user turn; the first may open with a greeting."""
        text = self._sentence(text)
        if not self.turns and self.chance(GREETING_SHARE):
            person, city = self.value("person")[1], self.value("city")[1]
            text = self.pick(self.phrases["greetings"]).format(person=person, city=city) + text
        self.turns.append(text)

    def assistant(self, text: str) -> None:
        """Append an assistant turn."""
        self.turns.append(text)

    def ask(self, request: Request) -> str:
        """Return the user's words for `request`."""
        return fill(self.pick(request.tool.asks), request.spoken)

    def summary(self, tool: Tool, result: Result) -> str:
        """Return the assistant's words for `result`."""
        return self._sentence(fill(self.pick(tool.summaries), result.spoken))

    def call(self, request: Request) -> str:
        """Return the call between its marks."""
        names = self.names(request.tool)
        parameters = {names.parameters[key]: value for key, value in request.values.items()}
        body = self._json({"api_name": names.tool, "parameters": parameters})
        return f"<|startofthink|>```JSON\n{body}\n```<|endofthink|>"

    def executed(self, request: Request, observation: Mapping[str, Json]) -> str:
        """Return the call and what its execution returned; text or another call may follow."""
        return f"{self.call(request)}\n\n<|startofexec|>```JSON\n{self._json(observation)}\n```<|endofexec|>\n"

    def _json(self, value: Json) -> str:
        return json.dumps(value, ensure_ascii=False, indent=self._indent)

    def _sentence(self, text: str) -> str:
        """Begin an English text with a capital, but keep names such as web-12 as they are."""
        first = text.split(" ", 1)[0]
        return text[0].upper() + text[1:] if first.isalpha() and first.isascii() else text

    # The system value

    def names(self, tool: Tool) -> ToolNames:
        """Return the names of `tool` here; from now on it is listed."""
        if tool.key not in self._names:
            taken = {names.tool for names in self._names.values()}
            names = self._namer.name(tool, self.pick(tool.descriptions))
            while names.tool in taken:
                names = self._namer.name(tool, names.description)
            self._names[tool.key] = names
            self._tools.append(tool)
        return self._names[tool.key]

    def listed_names(self) -> list[str]:
        """Return the names of the listed tools in the order of the list; only after `close_list`."""
        return [self._names[tool.key].tool for tool in self._tools]

    def close_list(self, beside: Iterable[str] = ()) -> None:
        """Add distractors, confusable ones first, and shuffle, once; none of the concepts `beside`."""
        if self._is_closed:
            return
        self._is_closed = True
        size = self.rng.choices((2, 3, 4), (80, 16, 4))[0]
        barred = {*beside, *self._names}
        families = {tool.family for tool in self.shelf.tools if tool.key in barred}
        kin = [tool for family in sorted(families) for tool in self.shelf.families.get(family, ())]
        tools = self.shelf.tools
        while len(self._tools) < size:
            near = [tool for tool in kin if tool.key not in barred]
            if near and self.chance(0.6):
                distractor = self.pick(near)
            else:
                # The smaller of two: an unrelated tool teaches little, and its length costs time.
                distractor = min(self.pick(tools), self.pick(tools), key=lambda tool: len(tool.parameters))
            if distractor.key not in barred:
                self.names(distractor)
                barred.add(distractor.key)
        self.rng.shuffle(self._tools)

    def system(self) -> str:
        """Return the system value: an instruction and the numbered list of tools."""
        instruction = self.pick(self.phrases["instructions"])
        if self.at_once:
            instruction += self.phrases["at_once"]
        lines = [f"{number}. {self._entry(tool)}" for number, tool in enumerate(self._tools, 1)]
        return "\n\n".join([instruction + self.phrases["plugins"], *lines])

    def _entry(self, tool: Tool) -> str:
        names = self._names[tool.key]
        parameters: list[dict[str, Json]] = []
        for parameter in tool.parameters:
            entry: dict[str, Json] = {
                "name": names.parameters[parameter.key],
                "description": parameter.description,
                "required": parameter.required,
                "type": json_type(parameter.pool),
            }
            if options := enum_values(parameter.pool, self.language):
                entry["enum"] = list(options)
            parameters.append(entry)
        listed = {"name": names.tool, "description": names.description, "parameters": parameters}
        return json.dumps(listed, ensure_ascii=False)
