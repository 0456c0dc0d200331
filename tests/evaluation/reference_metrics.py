"""The metrics once more, plainly: written from the text of the spec alone, and importing nothing of agentft.

It is slow and simple on purpose (every alignment is tried, LCS is the textbook table), so that it can be read beside the
spec row by row. `test_conformance.py` holds `python -m agentft.score` to it. Where the spec leaves room, this file follows
docs/metrics.md, and says so.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

Step = dict[str, Any]
Ratio = tuple[Fraction | float, int]
"""Numerator and denominator."""

CUTS = ("<|startofexec|>", "<|user|>", "<|im_start|>user", "<|im_end|>\n<|im_start|>")
ENDS = ("</s>", "<|endoftext|>", "<|im_end|>")
HEADER = "<|assistant|>:"


@dataclass
class Call:
    name: str
    parameters: dict[str, Any]
    url: Any = None


@dataclass
class Said:
    """One step's text, read: its calls in order, spans that are none, and the words around them."""

    calls: list[Call] = field(default_factory=list)
    malformed: int = 0
    text: str = ""

    @property
    def attempts(self) -> int:
        return len(self.calls) + self.malformed


def read(text: str) -> Said:
    """Strip the role header, cut, and take the non-greedy think spans."""
    text = text.strip()
    text = text.removeprefix(HEADER)
    for cut in CUTS:
        text = text.split(cut)[0]
    while text.rstrip().endswith(ENDS):
        text = text.rstrip()
        text = next(text.removesuffix(end) for end in ENDS if text.endswith(end))
    said = Said()
    for body in re.findall(r"<\|startofthink\|>(.*?)<\|endofthink\|>", text, re.DOTALL):
        found = read_calls(body)
        said.calls += found
        said.malformed += not found
    text = re.sub(r"<\|startofthink\|>.*?<\|endofthink\|>", " ", text, flags=re.DOTALL)
    before, opening, _ = text.partition("<|startofthink|>")
    said.malformed += bool(opening)
    said.text = before.strip()
    return said


def read_calls(body: str) -> list[Call]:
    """The calls of a span, or none at all where it is no JSON of calls."""
    body = re.sub(r"^\s*```\w*|```\s*$", "", body)
    try:
        value = json.loads(body, strict=False, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return []
    calls = []
    for each in value if isinstance(value, list) else [value]:
        parameters = each.get("parameters", {}) if isinstance(each, dict) else None
        if not isinstance(parameters, dict) or not isinstance(each.get("api_name"), str):
            return []
        calls.append(Call(each["api_name"], parameters, each.get("url")))
    return calls


def strict(left: Any, right: Any) -> bool:
    """JSON values; one number type; booleans are no numbers; objects unordered, arrays ordered."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return Decimal(repr(left)) == Decimal(repr(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(strict(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(strict, left, right))
    return type(left) is type(right) and left == right


def plain(value: Any) -> Any:
    """A value as lenient equality sees it: NFKC, blanks collapsed, JSON in a string is JSON, numbers as decimals."""
    if isinstance(value, str):
        words = " ".join(unicodedata.normalize("NFKC", value).split())
        try:
            inner = json.loads(words, parse_float=Decimal, parse_constant=lambda name: 1 / 0)
        except (ValueError, ZeroDivisionError):
            return ("text", words)
        return ("text", words) if isinstance(inner, str) else plain(inner)
    if isinstance(value, bool) or value is None:
        return ("word", value)
    if isinstance(value, int | float | Decimal):
        try:
            return ("number", Decimal(repr(value)) if not isinstance(value, Decimal) else value)
        except InvalidOperation:
            return ("text", str(value))
    if isinstance(value, list):
        return ("list", [plain(each) for each in value])
    return ("object", {key: plain(each) for key, each in value.items()})


def lenient(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Top-level null or "" is absent."""
    absent = (("word", None), ("text", ""))
    one, other = ({key: plain(v) for key, v in each.items() if plain(v) not in absent} for each in (left, right))
    return one == other


def matches(reference: Call, predicted: Call) -> tuple[int, int]:
    """HM (right argument, wrong value) and FM (right argument and value)."""
    shared = [key for key in reference.parameters if key in predicted.parameters]
    full = sum(strict(reference.parameters[key], predicted.parameters[key]) for key in shared)
    return len(shared) - full, full


def argument_f1(reference: Call, predicted: Call | None) -> Fraction:
    """2RP / (R + P) with R = (0.5 HM + FM) / |A| and P = (0.5 HM + FM) / |A*|; 1 when both are {}."""
    if predicted is None or predicted.name != reference.name:
        return Fraction(0)
    if not reference.parameters and not predicted.parameters:
        return Fraction(1)
    half, full = matches(reference, predicted)
    if half + full == 0:
        return Fraction(0)
    weight = Fraction(half, 2) + full
    recall, precision = weight / len(reference.parameters), weight / len(predicted.parameters)
    return 2 * recall * precision / (recall + precision)


Pairs = list[tuple[Call, Call | None]]


def alignments(references: list[Call], predictions: list[Call]) -> Iterator[Pairs]:
    """Every one-to-one pairing of all reference calls, each with a predicted call or with nothing."""
    slots: list[int | None] = [*range(len(predictions)), *([None] * len(references))]
    for chosen in set(itertools.permutations(slots, len(references))):
        yield [(ref, None if at is None else predictions[at]) for ref, at in zip(references, chosen, strict=True)]


def worth(pairs: Pairs) -> tuple[int, int, int, int]:
    """(names, strict parameters, FM, HM), to be as large as can be; order decides among equals."""
    named = [(ref, pred) for ref, pred in pairs if pred is not None and pred.name == ref.name]
    halves_fulls = [matches(ref, pred) for ref, pred in named]
    exact = sum(strict(ref.parameters, pred.parameters) for ref, pred in named)
    return len(named), exact, sum(full for _, full in halves_fulls), sum(half for half, _ in halves_fulls)


def best_alignments(references: list[Call], predictions: list[Call]) -> list[Pairs]:
    """All that are worth the most. The spec's last criterion, order, can matter to `arg_f1` and `param_em_lenient`."""
    every = list(alignments(references, predictions))
    most = max(map(worth, every))
    return [pairs for pairs in every if worth(pairs) == most]


def tokens(text: str) -> list[str]:
    """cjk-char-v2: NFKC, lower case; a Han, kana or hangul character each, any other run of letters, their marks, or digits."""
    words = [""]
    for character in unicodedata.normalize("NFKC", text).lower():
        if is_cjk_character(character):
            words += [character, ""]
        elif character.isalnum() or (words[-1] and is_mark(character)):
            words[-1] += character
        elif character not in "\u200c\u200d":
            words.append("")
    return [word for word in words if word]


def is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M") and "VARIATION SELECTOR" not in unicodedata.name(character)


def is_cjk_character(character: str) -> bool:
    name = unicodedata.name(character, "")
    return character in "々〇〻" or name.startswith(("CJK", "HANGZHOU", "HIRAGANA", "KATAKANA", "HANGUL"))


def rouge_l(reference: list[str], predicted: list[str]) -> float:
    """F1 of the longest common subsequence; 0 where either is empty."""
    row = [0] * (len(predicted) + 1)
    for token in reference:
        above = row
        row = [0]
        for column, other in enumerate(predicted):
            row.append(above[column] + 1 if token == other else max(above[column + 1], row[-1]))
    return 2 * row[-1] / (len(reference) + len(predicted)) if row[-1] else 0.0


def offered_names(steps: Iterable[Step]) -> dict[str, set[str]]:
    """conversation -> names offered in any of its steps; a conversation that names none is not in it."""
    names: dict[str, set[str]] = {}
    for step in steps:
        if step.get("offered") is not None:
            found = {tool if isinstance(tool, str) else tool["name"] for tool in step["offered"]}
            names.setdefault(step["conversation_id"], set()).update(found)
    return names


def declared(tool: Any) -> set[str] | None:
    """Names of a tool's parameters; None: its schema is not known."""
    if isinstance(tool, str) or not isinstance(tool.get("parameters"), list):
        return None
    return {each["name"] for each in tool["parameters"]}


def schemas(steps: Iterable[Step]) -> dict[str, dict[str, set[str]]]:
    """conversation -> tool -> names of its parameters, by all declarations that give them."""
    found: dict[str, dict[str, set[str]]] = {}
    for step in steps:
        for tool in step.get("offered") or []:
            names = declared(tool)
            if names is not None:
                found.setdefault(step["conversation_id"], {}).setdefault(tool["name"], set()).update(names)
    return found


@dataclass
class Expected:
    """Ratios by metric name; for `arg_f1` and `param_em_lenient` the least and the greatest numerator that order allows."""

    ratios: dict[str, Ratio] = field(default_factory=dict)
    ranges: dict[str, tuple[Fraction, Fraction, int]] = field(default_factory=dict)
    plan_table: dict[str, dict[str, int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    confused: int = 0
    by_conversation: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)


def expect(steps: list[Step], everything: list[Step] | None = None) -> Expected:
    """All rows of the table over `steps`; `everything` is the whole file where `steps` are a part of it."""
    whole = everything if everything is not None else steps
    reference_of = {(step["conversation_id"], step["step"]): read(step["reference"]) for step in whole}
    names_of, schemas_of = offered_names(whole), schemas(whole)
    sums: dict[str, list[Any]] = {}
    ranges: dict[str, list[Any]] = {"arg_f1": [Fraction(0), Fraction(0), 0], "param_em_lenient": [0, 0, 0]}
    clusters: dict[str, dict[str, list[float]]] = {}
    counts: Counter[str] = Counter()
    table: Counter[tuple[bool, bool]] = Counter()
    perfect: dict[str, list[bool]] = {}
    confused = 0

    for step in steps:
        conversation = step["conversation_id"]
        ref, pred = reference_of[conversation, step["step"]], read(step["prediction"])

        def add(name: str, numerator: Any, denominator: int, owner: str = conversation) -> None:
            total = sums.setdefault(name, [0, 0])
            mine = clusters.setdefault(name, {}).setdefault(owner, [0.0, 0.0])
            for held in (total, mine):
                held[0] += numerator
                held[1] += denominator

        best = best_alignments(ref.calls, pred.calls)
        right, exact, full, _ = worth(best[0])
        due, attempts = len(ref.calls), pred.attempts
        add("tool_acc", right, due)
        add("tool_precision", right, attempts)
        add("tool_f1", 2 * right, due + attempts)
        add("param_em", exact, due)
        add("param_em_given_tool", exact, right)
        arguments = sum(len(call.parameters) for call in (*ref.calls, *pred.calls))
        add("arg_f1_micro", 2 * full, arguments)
        scores = [sum((argument_f1(*pair) for pair in pairs), Fraction(0)) for pairs in best]
        loose = [
            sum(p is not None and p.name == r.name and lenient(r.parameters, p.parameters) for r, p in pairs)
            for pairs in best
        ]
        for name, values in (("arg_f1", scores), ("param_em_lenient", loose)):
            ranges[name][0] += min(values)
            ranges[name][1] += max(values)
            ranges[name][2] += due
        if due:
            is_perfect = exact == due == attempts
            add("step_em", is_perfect, 1)
            perfect.setdefault(conversation, []).append(is_perfect)
        add("plan_acc", bool(due) == bool(attempts), 1)
        table[bool(due), bool(attempts)] += 1
        add("call_wellformed_rate", len(pred.calls), attempts)
        if conversation in names_of:
            known = names_of[conversation] | {call.name for call in ref.calls}
            add("hallucinated_tool_rate", sum(call.name not in known for call in pred.calls), attempts)
        for call in pred.calls:
            if (schema := schemas_of.get(conversation, {}).get(call.name)) is not None:
                add("hallucinated_param_rate", sum(key not in schema for key in call.parameters), len(call.parameters))
        if not due:
            words = tokens(ref.text)
            counts["rouge_samples" if words else "rouge_skipped"] += 1
            if words:
                score = rouge_l(words, tokens(pred.text))
                add("rouge_l", score, 1)
                before = reference_of.get((conversation, step["step"] - 1))
                add("rouge_l_after_call" if before is not None and before.calls else "rouge_l_no_call", score, 1)
        counts["action_steps" if due else "answer_steps"] += 1
        counts["reference_calls"] += due
        counts["attempted_calls"] += attempts
        counts["wellformed_calls"] += len(pred.calls)
        counts["malformed_calls"] += pred.malformed
        confused += due - right

    for conversation, all_right in perfect.items():
        add("conv_em", all(all_right), 1, conversation)
    counts["steps"] = len(steps)
    counts["conversations"] = len({step["conversation_id"] for step in steps})
    words_of = {True: "call", False: "no_call"}
    return Expected(
        ratios={name: (top, bottom) for name, (top, bottom) in sums.items()},
        ranges={name: (low, high, due) for name, (low, high, due) in ranges.items()},
        plan_table={
            words_of[due]: {words_of[said]: table[due, said] for said in (True, False)} for due in (True, False)
        },
        counts=dict(counts),
        confused=confused,
        by_conversation={
            name: {owner: (top, bottom) for owner, (top, bottom) in each.items()} for name, each in clusters.items()
        },
    )


def cr0(contributions: Iterable[tuple[float, float]]) -> float:
    """Standard error of a ratio of sums, clustered by conversation, without small-sample factor (CR0)."""
    pairs = [(top, bottom) for top, bottom in contributions if bottom]
    total = sum(bottom for _, bottom in pairs)
    value = sum(top for top, _ in pairs) / total
    return float(sum((top - value * bottom) ** 2 for top, bottom in pairs)) ** 0.5 / total
