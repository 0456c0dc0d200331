"""Write records by number: a kind of dialogue is drawn by its share, and played out on a `Scene`."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, get_args

from agentft.data.calls import Json
from agentft.data.synthetic.catalogue import (
    Chain,
    Language,
    Part,
    Tool,
    Value,
    base_pool,
    enum_values,
    fill,
    json_type,
    read_yaml,
    shelf,
    value_pools,
)

DEFAULT_LANGUAGES: Mapping[str, float] = MappingProxyType({"en": 0.9, "zh": 0.1})

_HELDOUT_ONE_IN = 4
"""One in so many first user turns can only be held out, by its checksum; the others only be trained on."""

ANNOUNCED_SHARE = 0.08
"""Single calls with text before the call."""

TWICE_THE_SAME_SHARE = 0.6
"""Turns with several calls in which one tool is called twice; in the others two tools are."""

MORE_ROUNDS_SHARE = 0.25
"""How often a dialogue of several rounds goes on for another one."""


OPTIONAL_SHARE = 0.35
"""How often a user mentions an optional parameter."""

GREETING_SHARE = 0.15
INDENTED_SHARE = 0.1
"""Conversations whose JSON is written over several lines."""

_T = TypeVar("_T")
_ONSETS = ("b", "d", "f", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_RHYMES = ("a", "e", "i", "o", "u", "an", "el", "or", "ix")
_STYLES = {"snake": 34, "camel": 22, "capitalized": 14, "dotted": 12, "prefixed": 12, "versioned": 6}
"""How a conversation writes the names of its tools, and the weights."""


class ToolNames(NamedTuple):
    """The names that one conversation gives a tool and its parameters."""

    tool: str
    description: str
    parameters: dict[str, str]
    """Slot -> name."""


def _camel(words: Sequence[str]) -> str:
    return words[0] + "".join(word.capitalize() for word in words[1:])


class Request(NamedTuple):
    """A tool and the parameters that a user wants it called with."""

    tool: Tool
    parameters: dict[str, Value]

    @property
    def words(self) -> dict[str, str]:
        return words_of(self.parameters)


def values_of(drawn: Mapping[str, Value]) -> dict[str, Json]:
    """Return the values as a call and its result hold them."""
    return {name: value for name, (value, _) in drawn.items()}


def words_of(drawn: Mapping[str, Value]) -> dict[str, str]:
    """Return the words that people say for the values."""
    return {name: words for name, (_, words) in drawn.items()}


class Scene:
    """Draws everything that one conversation needs from one random stream and collects its turns."""

    def __init__(
        self, rng: random.Random, language: Language, part: Part, *, unseen_tools: bool, max_rounds: int
    ) -> None:
        self.rng = rng
        self.language: Language = language
        self.shelf = shelf(language, part, unseen_tools)
        self.phrases = read_yaml(f"{language}.yaml")["phrases"]
        self.max_rounds = max_rounds
        self.turns: list[str] = []
        self.at_once = False
        self._values = value_pools(language, part)
        self._style: str = rng.choices(list(_STYLES), list(_STYLES.values()))[0]
        self._prefix = "".join(rng.choice(_ONSETS) + rng.choice(_RHYMES) for _ in range(2))
        self._version = rng.randrange(2, 5)
        self._names: dict[str, ToolNames] = {}
        self.tools: list[Tool] = []
        """Those that are listed, in their order."""
        self._is_closed = False
        self._indent = 3 if rng.random() < INDENTED_SHARE else None

    def pick(self, options: Sequence[_T]) -> _T:
        """Return one of `options`."""
        return options[int(self.rng.random() * len(options))]

    def say(self, kind: str, **words: str) -> str:
        """Return one of the phrases of a kind, filled with words."""
        return str(self.pick(self.phrases[kind]).format(**words))

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
        self, tool: Tool, given: Mapping[str, Value] = MappingProxyType({}), *, optional: bool = True
    ) -> Request:
        """Draw the parameters of `tool` that are not `given`; some optional ones unless `optional` is false."""
        drawn: dict[str, Value] = {}
        taken: set[str] = set()
        for parameter in tool.parameters:
            if parameter.key in given:
                drawn[parameter.key] = given[parameter.key]
            elif parameter.required or (optional and self.chance(OPTIONAL_SHARE)):
                drawn[parameter.key] = self.value(parameter.pool, taken)
            else:
                continue
            if json_type(parameter.pool) == "string":
                taken.add(drawn[parameter.key][1])
        return Request(tool, drawn)

    def changed(self, request: Request, key: str, value: Value | None = None) -> Request:
        """Return the same request with another value of `key`."""
        if value is None:
            value = self.value(request.tool.parameter(key).pool, request.words.values())
        return Request(request.tool, {**request.parameters, key: value})

    def result(self, request: Request) -> dict[str, Value]:
        """Return the fields of what the tool returns."""
        known, result = dict(request.parameters), {}
        for name, source in request.tool.result.items():
            if isinstance(source, str):
                result[name] = self._returned(source, words_of(known).values())
            else:
                value = source(values_of(known))
                words = self.phrases["list_joint"].join(value) if isinstance(value, list) else str(value)
                result[name] = value, words
            known[name] = result[name]
        return result

    def _returned(self, pool: str, unlike: Iterable[str]) -> Value:
        if not pool.endswith("*2"):
            return self.value(pool, unlike if json_type(pool) == "string" else ())
        first = self.value(pool[:-2], unlike)
        second = self.value(pool[:-2], {*unlike, first[1]})
        return [first[0], second[0]], f"{first[1]}{self.phrases['list_joint']}{second[1]}"

    def user(self, text: str) -> None:
        """Append a user turn; the first may open with a greeting."""
        text = self._sentence(text)
        if not self.turns and self.chance(GREETING_SHARE):
            person, city = self.value("person")[1], self.value("city")[1]
            text = self.say("greetings", person=person, city=city) + text
        self.turns.append(text)

    def assistant(self, text: str) -> None:
        """Append an assistant turn."""
        self.turns.append(text)

    def answer(self, request: Request, before: str = "") -> dict[str, Value]:
        """Append a turn of a call, its result and the summary, after whatever it holds `before`; return the result."""
        result = self.result(request)
        self.assistant(before + self.executed(request, values_of(result)) + self.summary(request, result))
        return result

    def fail(self, request: Request, error: str) -> None:
        """Append a turn of a call that fails, and the assistant's words for it."""
        words = self.say("failures", goal=request.tool.goal, error=error)
        self.assistant(self.executed(request, {"error": error}) + words)

    def ask(self, request: Request) -> str:
        """Return the user's words for `request`."""
        return fill(self.pick(request.tool.asks), request.words)

    def summary(self, request: Request, result: Mapping[str, Value]) -> str:
        """Return the assistant's words for `result`."""
        return self._sentence(fill(self.pick(request.tool.summaries), {**request.words, **words_of(result)}))

    def call(self, request: Request) -> str:
        """Return the call between its marks."""
        names = self.names(request.tool)
        parameters = {names.parameters[key]: value for key, (value, _) in request.parameters.items()}
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

    def names(self, tool: Tool) -> ToolNames:
        """Return the names of `tool` here; from now on it is listed."""
        if tool.key not in self._names:
            taken = {names.tool for names in self._names.values()}
            description = self.pick(tool.descriptions)
            while (names := self._named(tool, description)).tool in taken:
                pass
            self._names[tool.key] = names
            self.tools.append(tool)
        return self._names[tool.key]

    def _named(self, tool: Tool, description: str) -> ToolNames:
        """Draw names for `tool` in the style of the conversation."""
        words = self.rng.choice(tool.names).split()
        snake, camel = "_".join(words), _camel(words)
        name = {
            "camel": camel,
            "capitalized": camel[0].upper() + camel[1:],
            "dotted": f"{tool.family}.{snake}",
            "prefixed": f"{self._prefix}_{snake}",
            "versioned": f"{snake}_v{self._version}",
        }.get(self._style, snake)
        parameters = {p.key: self.rng.choice(p.names) for p in tool.parameters}
        if self._style in ("camel", "capitalized"):
            parameters = {slot: _camel(written.split("_")) for slot, written in parameters.items()}
        return ToolNames(name, description, parameters)

    def close_list(self, beside: Iterable[str] = ()) -> None:
        """Add distractors, confusable ones first, and shuffle, once; none of the concepts `beside`."""
        if self._is_closed:
            return
        self._is_closed = True
        size = self.rng.choices((2, 3, 4), (80, 16, 4))[0]
        barred = {*beside, *self._names}
        families = {tool.family for tool in self.shelf.tools if tool.key in barred}
        tools = self.shelf.tools
        kin = [tool for family in sorted(families) for tool in tools if tool.family == family]
        while len(self.tools) < size:
            near = [tool for tool in kin if tool.key not in barred]
            if near and self.chance(0.6):
                distractor = self.pick(near)
            else:
                # The smaller of two: an unrelated tool teaches little, and its length costs time.
                distractor = min(self.pick(tools), self.pick(tools), key=lambda tool: len(tool.parameters))
            if distractor.key not in barred:
                self.names(distractor)
                barred.add(distractor.key)
        self.rng.shuffle(self.tools)

    def system(self) -> str:
        """Return the system value: an instruction and the numbered list of tools."""
        instruction = self.pick(self.phrases["instructions"])
        if self.at_once:
            instruction += self.phrases["at_once"]
        lines = [f"{number}. {self._entry(tool)}" for number, tool in enumerate(self.tools, 1)]
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


@dataclass(frozen=True, slots=True)
class DialogueType:
    """A kind of dialogue and its share of the records."""

    play: Callable[[Scene], None]
    share: float
    rounds: int = 1
    """Rounds it needs at least."""


def _asked(scene: Scene) -> Request:
    """Have the user ask for any tool."""
    request = scene.request(scene.pick(scene.shelf.tools))
    scene.user(scene.ask(request))
    return request


def _single_call(scene: Scene) -> None:
    request = _asked(scene)
    announced = scene.chance(ANNOUNCED_SHARE)
    scene.answer(request, scene.say("announcements", goal=request.tool.goal) + "\n" if announced else "")


def _call_without_result(scene: Scene) -> None:
    request = _asked(scene)
    scene.assistant(scene.call(request))
    scene.at_once = scene.chance(0.5)


def _result_without_summary(scene: Scene) -> None:
    request = _asked(scene)
    scene.assistant(scene.executed(request, values_of(scene.result(request))).rstrip("\n"))


def _several_calls(scene: Scene) -> None:
    requests = _two_requests(scene)
    answered = [(request, scene.result(request)) for request in requests]
    calls = [scene.executed(request, values_of(result)) for request, result in answered]
    summaries = [scene.summary(request, result) for request, result in answered]
    scene.assistant("".join(calls) + scene.phrases["between_summaries"].join(summaries))


def _several_calls_at_once(scene: Scene) -> None:
    scene.at_once = True
    scene.assistant("\n\n".join([scene.call(request) for request in _two_requests(scene)]))


def _chained_calls(scene: Scene) -> None:
    chain = scene.pick(scene.shelf.chains)
    first = scene.request(scene.shelf.by_key[chain.tools[0]], optional=False)
    result = scene.result(first)
    second = _linked(scene, chain, result)
    scene.user(fill(scene.pick(chain.at_once), {**first.words, **second.words}))
    scene.answer(second, scene.executed(first, values_of(result)))


def _several_rounds(scene: Scene) -> None:
    request = _asked(scene)
    result = scene.answer(request)
    rounds = 2
    while rounds < scene.max_rounds and scene.chance(MORE_ROUNDS_SHARE):
        rounds += 1
    tools_left = 3
    for _ in range(rounds - 1):
        chains = [chain for chain in scene.shelf.chains if chain.tools[0] == request.tool.key]
        choice = scene.rng.random()
        if chains and choice < 0.5 and tools_left:
            chain = scene.pick(chains)
            request = _linked(scene, chain, result)
            scene.user(fill(scene.pick(chain.then), request.words))
            tools_left -= 1
        elif request.tool.again and choice < 0.7:
            request = scene.changed(request, request.tool.again)
            scene.user(scene.say("again", value=request.words[request.tool.again]))
        elif choice < 0.9 and tools_left:
            request = _asked(scene)
            tools_left -= 1
        else:
            thanks, reply = scene.pick(scene.phrases["thanks"])
            scene.user(thanks)
            scene.assistant(reply)
            break
        result = scene.answer(request)


def _failed_call(scene: Scene) -> None:
    request = _asked(scene)
    error = scene.pick(scene.phrases["errors"])
    if request.tool in scene.shelf.lookups and scene.chance(0.4):
        error = _not_found(scene, request)
    scene.fail(request, error)


def _corrected_by_tool(scene: Scene) -> None:
    tool, key = scene.pick(scene.shelf.misspellable)
    meant = scene.request(tool)
    wrong = _misspelt(scene, meant.words[key])
    said = scene.changed(meant, key, (wrong, wrong))
    scene.user(scene.ask(said))
    error = scene.phrases["unknown"].format(what=tool.parameter(key).description, value=wrong)
    refused = scene.executed(said, {"error": error, "did_you_mean": meant.parameters[key][0]})
    scene.answer(meant, refused)


def _corrected_by_user(scene: Scene) -> None:
    said = scene.request(scene.pick(scene.shelf.lookups))
    meant = scene.changed(said, said.tool.again)
    scene.user(scene.ask(said))
    scene.fail(said, _not_found(scene, said))
    scene.user(scene.say("corrections", value=meant.words[meant.tool.again]))
    scene.answer(meant)


def _missing_parameter(scene: Scene) -> None:
    tool, key, asks = scene.pick(scene.shelf.incomplete)
    request = scene.request(tool)
    said = {slot: words for slot, words in request.words.items() if slot != key}
    scene.user(fill(scene.pick(asks), said))
    scene.assistant(scene.say("questions", what=tool.parameter(key).description))
    scene.user(scene.say("replies", value=request.words[key]))
    scene.answer(request)


def _unserved_request(scene: Scene) -> None:
    request = _asked(scene)
    scene.assistant(scene.say("refusals", goal=request.tool.goal))
    scene.close_list(beside=[request.tool.key])  # all that is offered is of no use


def _small_talk(scene: Scene) -> None:
    scene.close_list()  # whose names it may say
    if scene.chance(0.1):
        question, reply = scene.pick(scene.phrases["abilities"])
        scene.user(question)
        names = [scene.names(tool).tool for tool in scene.tools]
        scene.assistant(reply.format(names=scene.phrases["name_joint"].join(names)))
        return
    a, b = scene.rng.sample(range(2, 100), 2)
    person = scene.value("person")[1]
    words = {
        **{slot: scene.value(slot)[1] for slot in ("city", "sentence", "event")},
        "person": person,
        "surname": person.split(" ")[-1],
        "a": str(a),
        "b": str(b),
        "sum": str(a + b),
        "larger": str(max(a, b)),
    }
    if scene.language == "en":
        words["title"] = scene.value("title")[1]
        words["upper_title"] = words["title"].upper()
    remark, reply = scene.pick(scene.phrases["small_talk"])
    scene.user(fill(remark, words))
    scene.assistant(fill(reply, words))


KINDS: dict[str, DialogueType] = {
    "single_call": DialogueType(_single_call, 0.36),
    "call_without_result": DialogueType(_call_without_result, 0.03),
    "result_without_summary": DialogueType(_result_without_summary, 0.02),
    "several_calls": DialogueType(_several_calls, 0.08),
    "several_calls_at_once": DialogueType(_several_calls_at_once, 0.05),
    "chained_calls": DialogueType(_chained_calls, 0.07),
    "several_rounds": DialogueType(_several_rounds, 0.12, rounds=2),
    "failed_call": DialogueType(_failed_call, 0.04),
    "corrected_by_tool": DialogueType(_corrected_by_tool, 0.03),
    "corrected_by_user": DialogueType(_corrected_by_user, 0.03, rounds=2),
    "missing_parameter": DialogueType(_missing_parameter, 0.07, rounds=2),
    "unserved_request": DialogueType(_unserved_request, 0.05),
    "small_talk": DialogueType(_small_talk, 0.05),
}
"""All kinds by name; the shares sum to one."""


def _not_found(scene: Scene, request: Request) -> str:
    key, words = request.tool.again, str(scene.phrases["not_found"])
    return words.format(what=request.tool.parameter(key).description, value=request.words[key])


def _two_requests(scene: Scene) -> tuple[Request, Request]:
    """Ask for two things in one turn, and return both requests."""
    if scene.chance(TWICE_THE_SAME_SHARE):
        tool = scene.pick([tool for tool in scene.shelf.tools if tool.both])
        first = scene.request(tool, optional=False)
        second = scene.changed(first, tool.again)
        words = {**first.words, f"{tool.again}2": second.words[tool.again]}
        scene.user(fill(scene.pick(tool.both), words))
        return first, second
    tools = [scene.pick(scene.shelf.tools)] * 2
    while tools[1].key == tools[0].key:
        tools[1] = scene.pick(scene.shelf.tools)
    first, second = map(scene.request, tools)
    scene.user(scene.ask(first) + scene.pick(scene.phrases["joints"]) + scene.ask(second))
    return first, second


def _linked(scene: Scene, chain: Chain, result: Mapping[str, Value]) -> Request:
    """Return the request for the second tool of a chain, given what the first returned."""
    given = {key: result[name] for key, name in chain.links.items()}
    return scene.request(scene.shelf.by_key[chain.tools[1]], given, optional=False)


def _misspelt(scene: Scene, text: str) -> str:
    """Return a slip: in Chinese the suffix for a city too many, in English two neighbouring letters swapped."""
    if scene.language == "zh":
        return text + "市"
    places = [i for i in range(1, len(text) - 1) if text[i : i + 2].isalpha() and text[i : i + 2].islower()]
    places = [i for i in places if text[i] != text[i + 1]]
    if not places:
        return text + text[-1]
    at = scene.pick(places)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def draft(
    number: int, *, seed: int, languages: Mapping[str, float], part: Part, unseen_tools: bool, max_rounds: int
) -> tuple[str, list[dict[str, str]]]:
    """Return kind and turns of a conversation; they depend on the arguments alone."""
    known: tuple[Language, ...] = get_args(Language)
    chosen = {each: float(languages[each]) for each in known if languages.get(each)}
    kinds = {name: kind.share for name, kind in KINDS.items() if kind.rounds <= max_rounds}
    mix = ",".join(f"{language}={share!r}" for language, share in chosen.items())
    rng = random.Random(f"synthetic/{part}/{seed}/{unseen_tools}/{mix}/{max_rounds}/{number}")
    language, kind = _drawn(chosen, rng), _drawn(kinds, rng)
    while True:
        scene = Scene(rng, language, part, unseen_tools=unseen_tools, max_rounds=max_rounds)
        KINDS[kind].play(scene)
        scene.close_list()
        if _part_of(scene.turns[0]) == part:
            break
    roles = ("user", "assistant")
    turns = [{"from": roles[index % 2], "value": text} for index, text in enumerate(scene.turns)]
    return kind, [{"from": "system", "value": scene.system()}, *turns]


def _part_of(first_user_turn: str) -> Part:
    """Return the one part that a conversation beginning with this user turn can be in."""
    return "heldout" if zlib.crc32(first_user_turn.encode()) % _HELDOUT_ONE_IN == 0 else "train"


def generate(
    count: int,
    *,
    seed: int = 0,
    languages: Mapping[str, float] = DEFAULT_LANGUAGES,
    part: Part = "train",
    unseen_tools: bool = False,
    max_rounds: int = 3,
) -> Iterator[dict[str, Any]]:
    """Yield `count` records in the form of MSAgent-Bench.

    Record k depends on the keyword arguments and k alone, so a longer run begins with the records of a shorter one.

    Args:
        count: Number of records; memory does not depend on it.
        seed: Another seed, other records.
        languages: Weight of each language, `en` or `zh`.
        part: `train` and `heldout` share no first user turn, and draw names, places, codes and dates from other values.
        unseen_tools: Make the tools of the two parts disjoint too, whole families of similar tools at a time.
        max_rounds: Most user turns in a conversation; most conversations have one.
    """
    for number in range(count):
        _, turns = draft(
            number, seed=seed, languages=languages, part=part, unseen_tools=unseen_tools, max_rounds=max_rounds
        )
        yield {"id": f"synthetic-{part}-{seed}-{number:06d}", "conversations": turns}


def _drawn(shares: Mapping[_T, float], rng: random.Random) -> _T:
    return rng.choices(list(shares), list(shares.values()))[0]
