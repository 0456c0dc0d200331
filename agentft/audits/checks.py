"""Find what is wrong with a conversation: its labels, its calls and its turns; collect what was found.

Labels are traced without asking `render.py` what it meant to train: the labelled runs of an example are decoded and compared
with the words between the tool results in the record's own assistant turns; the masked runs must hold what the system, the
users and the tools said. If both hold for every run, no label can lie on foreign text. White space is left out of the
comparison, and characters are composed, as some tokenizers do.

A declaration of a tool is data from a stranger. Only the keywords of `_KEPT` reach the validator, each with a value of the
kind it expects: no references (they could fetch), no patterns (they could run for ever), no depth beyond `_MAX_DEPTH`.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from agentft.data.calls import Call, JsonRefused, ToolCall, read_json
from agentft.data.conversation import Conversation, Message, Origin
from agentft.data.msagent import as_msagent
from agentft.data.render import thought_text
from agentft.data.tokens import IGNORE_INDEX, Ids, TokenText
from agentft.data.tools import OfferedTool

# --- Findings ---


class Level(StrEnum):
    """How serious a kind of finding is."""

    broken = "broken"
    """An invariant of agentft does not hold: training on this data would be wrong. The audit fails."""
    warning = "warning"
    """A flaw of the data; the audit fails where `audit.fail_on` names it."""
    note = "note"
    """Worth knowing."""


CODES: dict[str, tuple[Level, str]] = {
    "label_in_context": (Level.broken, "a label lies on text that is not the agent's own"),
    "label_missing": (Level.broken, "words of the agent have no label"),
    "no_label": (Level.broken, "a conversation that trains nothing"),
    "user_side_straddles": (Level.broken, "the same user side in training and held-out part"),
    "content_straddles": (Level.broken, "the same conversation in training and held-out part"),
    "empty_part": (Level.broken, "the split leaves a part without conversations"),
    "too_many_set_aside": (Level.broken, "more rows set aside than dataset.max_rejected allows"),
    "label_untraced": (Level.warning, "labels that could not be traced back to the record's own text"),
    "unreadable_call": (Level.warning, "a call whose JSON cannot be read"),
    "unknown_tool": (Level.warning, "a call to a tool that the system text does not offer"),
    "call_without_tool_list": (Level.warning, "a call where the system text offers no tool at all"),
    "missing_parameter": (Level.warning, "a call without a parameter that its tool requires"),
    "undeclared_parameter": (Level.warning, "a call with a parameter that its tool does not declare"),
    "argument_breaks_schema": (Level.warning, "an argument that its declared type, range or choice does not allow"),
    "argument_as_text": (Level.note, "an argument of the declared type, but written as text"),
    "flawed_tool_entry": (Level.warning, "an entry of the tool list that is not in order"),
    "empty_summary": (Level.warning, "a turn that ends with a tool result: nothing is said to the user"),
    "ends_with_call": (Level.note, "a turn that ends with a call: it teaches calling, not summing up"),
    "untrained_step": (
        Level.note,
        "a step that its source does not want trained: shown as context, not asked in evaluation",
    ),
    "duplicate_content": (Level.warning, "the same content under another id"),
    "duplicate_user_side": (Level.note, "the same user side with other answers or tools"),
    "small_exam": (Level.warning, "few held-out conversations: their scores say little"),
    "near_duplicate_across_split": (Level.warning, "a held-out user turn that nearly equals one of training"),
    "too_long": (Level.warning, "longer than dataset.max_length"),
}
"""Code -> level and meaning, in the order of a report."""

MAX_EXAMPLES = 5
"""Places named for each code."""

_MAX_TOPICS = 10_000
"""Distinct topics counted for one code: bounds memory where every record has a tool name of its own."""


class Problem(NamedTuple):
    """What is wrong with a conversation."""

    code: str
    """As in `CODES`."""
    detail: str
    topic: str = ""
    """The tool or the reason that it is counted under."""


class Example(NamedTuple):
    """One place where something was found."""

    origin: Origin
    id: str | None
    detail: str

    @property
    def place(self) -> str:
        """Return `file:line id`, as far as there is one."""
        return " ".join(([str(self.origin)] if self.origin.line else []) + ([self.id] if self.id else []))


@dataclass(slots=True)
class Finding:
    """All places of one code: counted, and the first few kept."""

    code: str
    count: int = 0
    conversations: int = 0
    topics: Counter[str] = field(default_factory=Counter)
    examples: list[Example] = field(default_factory=list)
    """At most one a conversation."""
    last: Origin | None = None

    @property
    def level(self) -> Level:
        return CODES[self.code][0]

    @property
    def meaning(self) -> str:
        return CODES[self.code][1]

    @property
    def extent(self) -> str:
        """Return how often and in how many conversations; nothing for what concerns the dataset as a whole."""
        if self.last is not None and self.last.line == 0 and self.count == 1:
            return ""
        each = f"{self.conversations:,} conversation{'s' if self.conversations != 1 else ''}"
        return each if self.count == self.conversations else f"{self.count:,} in {each}"

    @property
    def commonest(self) -> str:
        """Return the commonest tools or reasons, counted; nothing where there is only one."""
        if len(self.topics) < 2:
            return ""
        more = f", … {len(self.topics):,} in all" if len(self.topics) > 5 else ""
        return ", ".join(f"{topic[:60]} {count:,}" for topic, count in self.topics.most_common(5)) + more

    def add(self, origin: Origin, name: str | None, detail: str, topic: str = "") -> bool:
        """Count one place in conversation `name`; return whether it became one of the examples."""
        self.count += 1
        if topic and (topic in self.topics or len(self.topics) < _MAX_TOPICS):
            self.topics[topic] += 1
        if self.last == origin:
            return False
        self.last = origin
        self.conversations += 1
        if len(self.examples) >= MAX_EXAMPLES:
            return False
        self.examples.append(Example(origin, name, detail))
        return True


def empty_findings() -> dict[str, Finding]:
    """Return a finding without places for every code: memory is bounded by their number."""
    return {code: Finding(code) for code in CODES}


# --- Turns and calls ---

_MAX_DEPTH = 12
_MAX_ERRORS = 20
"""Schema errors reported for one call."""

_TYPES = {
    **dict.fromkeys(("string", "str", "text", "date", "datetime", "time"), "string"),
    **dict.fromkeys(("integer", "int", "long", "int32", "int64"), "integer"),
    **dict.fromkeys(("number", "float", "double", "decimal"), "number"),
    **dict.fromkeys(("boolean", "bool"), "boolean"),
    **dict.fromkeys(("array", "list", "tuple", "set"), "array"),
    **dict.fromkeys(("object", "dict", "map", "json"), "object"),
    **dict.fromkeys(("null", "none"), "null"),
}
"""What declarations call a type -> its name in JSON schema; other names say nothing and are left out."""

_KEPT: dict[str, type | tuple[type, ...]] = {
    "enum": list,
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (int, float)),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), int),
    "additionalProperties": bool,
}
"""Keyword -> the values it may have here; `type`, `properties`, `items`, `required` and the unions are read apart."""


def check_turns(conversation: Conversation) -> Iterator[Problem]:
    """Yield turns that end without words to the user, and steps that are not trained."""
    messages = conversation.messages
    for number, (message, after) in enumerate(zip_longest(messages, messages[1:]), 1):
        if not message.trained:
            yield Problem("untrained_step", f"message {number}")
        if after is not None and after.role != "user":
            continue
        if message.role == "tool":
            yield Problem("empty_summary", f"message {number} is a tool result, and nothing is said on it")
        elif _ends_with_call(message):
            yield Problem("ends_with_call", f"message {number} ends with a call")


def _ends_with_call(message: Message) -> bool:
    said = [part for part in message.source or () if part.source.strip()]
    return isinstance(said[-1], Call) if said else bool(message.tool_calls)


def check_calls(conversation: Conversation) -> Iterator[Problem]:
    """Yield calls that cannot be read, or are not as the tools are declared, and flaws of the declarations."""
    for malformed in (call for message in conversation.messages for call in message.malformed_calls):
        assert malformed.failure is not None
        reason = malformed.failure.reason
        yield Problem("unreadable_call", f"{reason}: {malformed.failure.detail}", reason)
    for call in conversation.tool_calls:
        yield from check_request(call, conversation.offered)
    for tool in conversation.offered:
        if tool.problem:
            topic = tool.problem.partition(":")[0]
            yield Problem("flawed_tool_entry", f"tool {_shown(tool.name)}: {tool.problem}", topic)


def check_request(request: ToolCall, offered: Sequence[OfferedTool]) -> list[Problem]:
    """Return what is wrong with a request, given the tools that its system text offers.

    One tool can be listed several times, under several urls: the declaration that fits best counts.
    """
    name = request.name
    if not offered:
        return [Problem("call_without_tool_list", f"{_shown(name)} is called, no tool is offered", name)]
    declared = [tool for tool in offered if tool.name == name]
    if not declared:
        return [Problem("unknown_tool", f"{_shown(name)} is called, it is not in the tool list", name)]
    return min((_check_declared(request, tool.parameters) for tool in declared), key=len)


def schema_of(parameters: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON schema of an MSAgent parameter list, without `required`: a missing parameter has its own code."""
    properties = {parameter["name"]: _clean(parameter, _MAX_DEPTH, named=True) for parameter in parameters}
    return {"type": "object", "properties": properties}


def _check_declared(request: ToolCall, parameters: Sequence[dict[str, Any]] | None) -> list[Problem]:
    if parameters is None:
        return []
    given, tool = request.arguments, _shown(request.name)
    required = [parameter["name"] for parameter in parameters if _is_true(parameter.get("required"))]
    declared = {parameter["name"] for parameter in parameters}
    flaws = [("missing_parameter", "needs", name) for name in required if name not in given]
    flaws += [("undeclared_parameter", "does not declare", name) for name in given if name not in declared]
    problems = [Problem(code, f"{tool} {what} {_shown(name)}", f"{request.name}.{name}") for code, what, name in flaws]
    try:
        problems.extend(_schema_problems(request, parameters))
    except RecursionError:
        detail = "the arguments are nested too deeply to check"
        problems.append(Problem("argument_breaks_schema", detail, request.name))
    return problems


def _schema_problems(request: ToolCall, parameters: Sequence[dict[str, Any]]) -> Iterator[Problem]:
    validator = _validator(json.dumps(parameters, sort_keys=True, default=str))
    if validator is None:
        return
    for _, error in zip(range(_MAX_ERRORS), validator.iter_errors(request.arguments), strict=False):
        path = [str(part) for part in error.absolute_path]
        code = "argument_as_text" if _is_right_as_text(error) else "argument_breaks_schema"
        words = error.message if len(error.message) <= 160 else f"{error.message[:80]}...{error.message[-77:]}"
        detail = f"{_shown(request.name)}: {'.'.join(path)}: {words}"
        yield Problem(code, detail, f"{request.name}.{path[0] if path else ''}")


@lru_cache(maxsize=4096)
def _validator(parameters_json: str) -> Any:
    """Return the validator of a parameter list; None where its schema allows anything."""
    from jsonschema import Draft202012Validator

    schema = schema_of(json.loads(parameters_json))
    return Draft202012Validator(schema) if any(schema["properties"].values()) else None


def _clean(declared: object, depth: int, *, named: bool = False) -> dict[str, Any]:
    """Return the part of a declaration that is checked; `named` entries have a name and a truth value for `required`."""
    if not isinstance(declared, dict) or depth == 0:
        return {}
    schema: dict[str, Any] = {
        key: value
        for key, value in declared.items()
        if key in _KEPT and isinstance(value, _KEPT[key]) and (_KEPT[key] is bool or not isinstance(value, bool))
    }
    if not schema.get("enum", [None]):
        del schema["enum"]  # an empty choice is a declaration without one
    if types := _types(declared.get("type")):
        nullable = _is_true(declared.get("nullable")) or None in schema.get("enum", ())
        schema["type"] = [*types, "null"] if nullable and "null" not in types else types
    if isinstance(properties := declared.get("properties"), dict):
        schema["properties"] = {str(name): _clean(value, depth - 1) for name, value in properties.items()}
        required = declared.get("required_fields") if named else declared.get("required")
        names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        names += [
            name for name, value in properties.items() if isinstance(value, dict) and value.get("required") is True
        ]
        schema["required"] = names
    if isinstance(items := declared.get("items"), dict):
        schema["items"] = _clean(items, depth - 1)
    for union in ("anyOf", "oneOf", "allOf"):
        if isinstance(choices := declared.get(union), list) and choices:
            schema[union] = [_clean(choice, depth - 1) for choice in choices]
    return schema


def _types(declared: object) -> list[str]:
    """Return JSON-schema types; none where one of them is not known, since then anything might be meant."""
    names = declared if isinstance(declared, list) else [declared]
    types = [_TYPES.get(name.strip().lower()) if isinstance(name, str) else None for name in names]
    return [] if None in types else [name for name in types if name is not None]


def _is_true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.strip().lower() in ("true", "yes", "required", "是"))


def _is_right_as_text(error: Any) -> bool:
    """Return whether a text stands where its own value, read as JSON, would be right: "5" for an integer."""
    value = error.instance
    if error.validator != "type" or not isinstance(value, str):
        return False
    try:
        read = read_json(value.strip().lower() if value.strip().lower() in ("true", "false", "null") else value)
    except JsonRefused:
        return False
    from jsonschema import Draft202012Validator

    return not isinstance(read, str) and bool(Draft202012Validator(error.schema).is_valid(read))


# --- Labels ---

_LEAST_LEAK = 16
"""Characters of foreign text that count as a leak where a template words the agent's turns anew."""


@dataclass(slots=True)
class _Step:
    """What comes before the agent speaks, and what it says."""

    context: list[str] = field(default_factory=list)
    words: str = ""


def trace_labels(
    conversation: Conversation,
    input_ids: Ids,
    labels: Ids,
    text: TokenText,
    *,
    stop_token: str,
    verbatim: bool,
    context_rounds: int = 0,
) -> Problem | None:
    """Compare the labels of an example with the texts of its conversation; None where every label is right.

    Args:
        verbatim: the template keeps the agent's words letter by letter, and ends each step with `stop_token`. Where it
            does not, only foreign text under a label is an error; what cannot be compared is `label_untraced`.
        context_rounds: Rounds at the start whose words have no labels here; another example of the conversation has them.
            Steps that the record itself does not want trained have none either.
    """
    labelled = labels != IGNORE_INDEX
    if not labelled.any():
        return Problem("no_label", "no token of this conversation has a label")
    if not np.array_equal(labels[labelled], input_ids[labelled]):
        at = int(np.flatnonzero(labelled & (labels != input_ids))[0])
        return Problem("label_in_context", f"the label at token {at} is another token than the one that is read")
    if text.unknown_id is not None and (input_ids == text.unknown_id).any():
        return Problem("label_untraced", "the tokenizer does not know some characters")
    masked, trained = _runs(input_ids, labelled, text)
    conversation = as_msagent(conversation)
    steps = _steps(conversation, context_rounds)
    if verbatim:
        return _compare(masked, trained, steps, _squeeze(stop_token))
    return _search(masked, trained, steps, conversation)


def _runs(input_ids: Ids, labelled: np.ndarray, text: TokenText) -> tuple[list[str], list[str]]:
    """Return masked and labelled runs in turn, squeezed: as many of the one as of the other, then the masked rest."""
    edges = [0, *(np.flatnonzero(np.diff(labelled)) + 1).tolist(), len(input_ids)]
    runs = [_squeeze(text.text(input_ids[start:stop])) for start, stop in zip(edges, edges[1:], strict=False)]
    if labelled[0]:
        runs.insert(0, "")
    if len(runs) % 2 == 0:
        runs.append("")
    return runs[0::2], runs[1::2]


def _steps(conversation: Conversation, context_rounds: int) -> list[_Step]:
    """Return the conversation as its record has it; the last step has no words, only what comes after the last ones."""
    steps = [_Step()]
    words: list[str] = []

    def context(source: str) -> None:
        if said := _squeeze("".join(words)):
            steps[-1].words = said
            steps.append(_Step())
        words.clear()
        steps[-1].context.append(_squeeze(source))

    for message, context_only in conversation.with_context_only(context_rounds):
        if message.role != "assistant" or context_only:
            context(message.source_text or message.text)
            continue
        thought = thought_text(message.reasoning_content) if message.reasoning_content else ""
        if thought and not message.reasoning_trained:
            context(thought)
            thought = ""
        words.append(thought + message.source_text)
    context("")
    return steps


def _compare(masked: list[str], trained: list[str], steps: list[_Step], stop: str) -> Problem | None:
    """Return the first labelled run that is no step, else a step without labels, else context that is not masked."""
    expected = [step.words + stop for step in steps[:-1]]
    if trained != expected:
        runs, words = Counter(trained), Counter(expected)
        missing = list((words - runs).elements())
        for run in (runs - words).elements():
            if not any(run in said for said in missing):
                return Problem("label_in_context", f"labelled, though not what the agent says there: {_shown(run)}")
        said = missing[0] if missing else expected[0]
        return Problem("label_missing", f"words of the agent are not labelled as a whole: {_shown(said)}")
    for number, (run, step) in enumerate(zip(masked, steps, strict=True), 1):
        at = 0
        for piece in step.context:
            if (found := run.find(piece, at)) < 0:
                detail = f"before step {number}, {_shown(piece)} is not whole among the masked tokens"
                return Problem("label_in_context", detail)
            at = found + len(piece)
    return None


def _search(masked: list[str], trained: list[str], steps: list[_Step], source: Conversation) -> Problem | None:
    """Look for foreign text under the labels, and for what the users say among the masked runs."""
    own = "".join(step.words for step in steps) + "".join(map(_strings, source.tool_calls))
    under_labels = "\n".join(trained)
    for piece in (piece for step in steps for piece in step.context):
        if len(piece) >= _LEAST_LEAK and piece in under_labels and piece not in own:
            return Problem("label_in_context", f"labelled, though not the agent's: {_shown(piece)}")
    context = "\n".join(masked)
    for message in source.messages:
        if message.role == "user" and _squeeze(message.text) not in context:
            return Problem("label_untraced", f"not found among the masked tokens: {_shown(message.text)}")
    return None


def _strings(call: ToolCall) -> str:
    """Return all text values of a call's arguments, however they are nested."""
    found: list[str] = []
    open_values: list[object] = [call.arguments]
    while open_values:
        match open_values.pop():
            case str(value):
                found.append(_squeeze(value))
            case dict() as values:
                open_values.extend(values.values())
            case list() as items:
                open_values.extend(items)
    return "\n".join(found)


def _squeeze(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
