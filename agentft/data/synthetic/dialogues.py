"""The kinds of dialogue: each function plays one out on a `Scene` and leaves its user and assistant turns there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentft.data.synthetic.catalogue import Chain, Tool, fill
from agentft.data.synthetic.scene import Request, Result, Scene
from agentft.data.synthetic.values import Value

ANNOUNCED_SHARE = 0.08
"""Single calls with text before the call."""

TWICE_THE_SAME_SHARE = 0.6
"""Turns with several calls in which one tool is called twice; in the others two tools are."""

MORE_ROUNDS_SHARE = 0.25
"""How often a dialogue of several rounds goes on for another one."""


@dataclass(frozen=True, slots=True)
class DialogueType:
    """A kind of dialogue and its share of the records."""

    play: Callable[[Scene, int], None]
    """Takes the largest number of rounds."""
    share: float
    rounds: int = 1
    """Rounds it needs at least."""


def _single_call(scene: Scene, max_rounds: int) -> None:
    request = scene.request(scene.pick(scene.shelf.tools))
    scene.user(scene.ask(request))
    before = ""
    if scene.chance(ANNOUNCED_SHARE):
        before = scene.pick(scene.phrases.announcements).format(goal=scene.goal(request.tool)) + "\n"
    answer, _ = _answer(scene, request)
    scene.assistant(before + answer)
    scene.close_list()


def _call_without_result(scene: Scene, max_rounds: int) -> None:
    request = scene.request(scene.pick(scene.shelf.tools))
    scene.user(scene.ask(request))
    scene.assistant(scene.call(request))
    scene.at_once = scene.chance(0.5)
    scene.close_list()


def _result_without_summary(scene: Scene, max_rounds: int) -> None:
    request = scene.request(scene.pick(scene.shelf.tools))
    scene.user(scene.ask(request))
    scene.assistant(scene.executed(request, scene.result(request).observation).rstrip("\n"))
    scene.close_list()


def _several_calls(scene: Scene, max_rounds: int) -> None:
    requests = _two_requests(scene)
    results = [scene.result(request) for request in requests]
    calls = [scene.executed(request, result.observation) for request, result in zip(requests, results, strict=True)]
    summaries = [scene.summary(request.tool, result) for request, result in zip(requests, results, strict=True)]
    scene.assistant("".join(calls) + scene.phrases.between_summaries.join(summaries))
    scene.close_list()


def _several_calls_at_once(scene: Scene, max_rounds: int) -> None:
    scene.at_once = True
    scene.assistant("\n\n".join([scene.call(request) for request in _two_requests(scene)]))
    scene.close_list()


def _chained_calls(scene: Scene, max_rounds: int) -> None:
    chain = scene.pick(scene.shelf.chains)
    first = scene.request(scene.shelf.by_key[chain.first], optional=False)
    result = scene.result(first)
    second = _linked(scene, chain, result)
    scene.user(fill(scene.pick(chain.phrasings(scene.language)), {**first.spoken, **second.spoken}))
    answer, _ = _answer(scene, second, before=scene.executed(first, result.observation))
    scene.assistant(answer)
    scene.close_list()


def _several_rounds(scene: Scene, max_rounds: int) -> None:
    request = scene.request(scene.pick(scene.shelf.tools))
    scene.user(scene.ask(request))
    answer, result = _answer(scene, request)
    scene.assistant(answer)
    rounds = 2
    while rounds < max_rounds and scene.chance(MORE_ROUNDS_SHARE):
        rounds += 1
    tools_left = 4 - 1
    for _ in range(rounds - 1):
        chains = [chain for chain in scene.shelf.chains if chain.first == request.tool.key]
        choice = scene.rng.random()
        if chains and choice < 0.5 and tools_left:
            chain = scene.pick(chains)
            request = _linked(scene, chain, result)
            scene.user(fill(scene.pick(chain.then_phrasings(scene.language)), request.spoken))
            tools_left -= 1
        elif request.tool.again and choice < 0.7:
            request = scene.changed(request, request.tool.again)
            scene.user(scene.pick(scene.phrases.again).format(value=request.spoken[request.tool.again]))
        elif choice < 0.9 and tools_left:
            request = scene.request(scene.pick(scene.shelf.tools))
            scene.user(scene.ask(request))
            tools_left -= 1
        else:
            thanks, reply = scene.pick(scene.phrases.thanks)
            scene.user(thanks)
            scene.assistant(reply)
            break
        answer, result = _answer(scene, request)
        scene.assistant(answer)
    scene.close_list()


def _failed_call(scene: Scene, max_rounds: int) -> None:
    request = scene.request(scene.pick(scene.shelf.tools))
    scene.user(scene.ask(request))
    error = scene.pick(scene.phrases.errors)
    if request.tool in scene.shelf.lookups and scene.chance(0.4):
        error = _not_found(scene, request)
    scene.assistant(_failure(scene, request, error))
    scene.close_list()


def _corrected_by_tool(scene: Scene, max_rounds: int) -> None:
    tool, key = scene.pick(scene.shelf.misspellable)
    meant = scene.request(tool)
    wrong = _misspelt(scene, meant.spoken[key])
    said = scene.changed(meant, key, (wrong, wrong))
    scene.user(scene.ask(said))
    error = scene.phrases.unknown.format(what=scene.what(tool, key), value=wrong)
    refused = scene.executed(said, {"error": error, "did_you_mean": meant.values[key]})
    answer, _ = _answer(scene, meant, before=refused)
    scene.assistant(answer)
    scene.close_list()


def _corrected_by_user(scene: Scene, max_rounds: int) -> None:
    said = scene.request(scene.pick(scene.shelf.lookups))
    meant = scene.changed(said, said.tool.again)
    scene.user(scene.ask(said))
    scene.assistant(_failure(scene, said, _not_found(scene, said)))
    scene.user(scene.pick(scene.phrases.corrections).format(value=meant.spoken[meant.tool.again]))
    answer, _ = _answer(scene, meant)
    scene.assistant(answer)
    scene.close_list()


def _missing_parameter(scene: Scene, max_rounds: int) -> None:
    tool, key, asks = scene.pick(scene.shelf.incomplete)
    request = scene.request(tool)
    said = {slot: words for slot, words in request.spoken.items() if slot != key}
    scene.user(fill(scene.pick(asks), said))
    scene.assistant(scene.pick(scene.phrases.questions).format(what=scene.what(tool, key)))
    scene.user(scene.pick(scene.phrases.replies).format(value=request.spoken[key]))
    answer, _ = _answer(scene, request)
    scene.assistant(answer)
    scene.close_list()


def _unserved_request(scene: Scene, max_rounds: int) -> None:
    request = scene.request(scene.pick(scene.shelf.tools))
    scene.user(scene.ask(request))
    scene.assistant(scene.pick(scene.phrases.refusals).format(goal=scene.goal(request.tool)))
    scene.close_list(beside=[request.tool.key])


def _small_talk(scene: Scene, max_rounds: int) -> None:
    scene.close_list()
    if scene.chance(0.1):
        question, reply = scene.pick(scene.phrases.abilities)
        scene.user(question)
        scene.assistant(reply.format(names=scene.phrases.name_joint.join(scene.listed_names())))
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
    remark, reply = scene.pick(scene.phrases.small_talk)
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


def _answer(scene: Scene, request: Request, before: str = "") -> tuple[str, Result]:
    """The call, its result and the summary, after whatever the turn holds `before`."""
    result = scene.result(request)
    return before + scene.executed(request, result.observation) + scene.summary(request.tool, result), result


def _failure(scene: Scene, request: Request, error: str) -> str:
    reply = scene.pick(scene.phrases.failures).format(goal=scene.goal(request.tool), error=error)
    return scene.executed(request, {"error": error}) + reply


def _not_found(scene: Scene, request: Request) -> str:
    key = request.tool.again
    return scene.phrases.not_found.format(what=scene.what(request.tool, key), value=request.spoken[key])


def _two_requests(scene: Scene) -> tuple[Request, Request]:
    """Two requests that the user makes in one turn."""
    if scene.chance(TWICE_THE_SAME_SHARE):
        tool = scene.pick(scene.shelf.doubled)
        first = scene.request(tool, optional=False)
        second = scene.changed(first, tool.again)
        words = {**first.spoken, f"{tool.again}2": second.spoken[tool.again]}
        scene.user(fill(scene.pick(tool.wording(scene.language).both), words))
        return first, second
    first_tool = scene.pick(scene.shelf.tools)
    second_tool = _another(scene, first_tool)
    first, second = scene.request(first_tool), scene.request(second_tool)
    scene.user(scene.ask(first) + scene.pick(scene.phrases.joints) + scene.ask(second))
    return first, second


def _another(scene: Scene, tool: Tool) -> Tool:
    while True:
        other = scene.pick(scene.shelf.tools)
        if other.key != tool.key:
            return other


def _linked(scene: Scene, chain: Chain, result: Result) -> Request:
    """The request for the second tool of a chain, given what the first returned."""
    given: dict[str, Value] = {
        parameter: (result.observation[name], result.spoken[name]) for parameter, name in chain.links.items()
    }
    return scene.request(scene.shelf.by_key[chain.second], given=given, optional=False)


def _misspelt(scene: Scene, text: str) -> str:
    """A slip: in Chinese the suffix for a city too many, in English two neighbouring letters swapped."""
    if scene.language == "zh":
        return text + "市"
    places = [i for i in range(1, len(text) - 1) if text[i : i + 2].isalpha() and text[i : i + 2].islower()]
    places = [i for i in places if text[i] != text[i + 1]]
    if not places:
        return text + text[-1]
    at = scene.pick(places)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
