"""Write a file of predictions as one HTML page: wrong answers first, by kind of error, with what is wrong in words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from agentft.comparison.render import render_page
from agentft.data.calls import ToolCall
from agentft.evaluation.matching import align_calls, strictly_equal
from agentft.evaluation.parse import parse_reply
from agentft.evaluation.steps import read_offered_tool

MOST_STEPS = 2_000
"""Steps on one page, the wrong ones first; a browser opens these at once."""

_LONGEST_TEXT = 12_000
_LONGEST_VALUE = 160

KINDS = {
    "wrong_tool": "wrong tool",
    "missing_argument": "missing argument",
    "extra_argument": "extra argument",
    "wrong_value": "wrong value",
    "malformed": "malformed call",
    "spurious_call": "spurious call",
    "missed_call": "missed call",
    "missing_call": "one call of several missing",
    "extra_call": "one call too many",
    "hallucinated_tool": "hallucinated tool",
    "hallucinated_argument": "hallucinated argument",
}
"""Kind of error (see `StepScore.errors`) -> its words on the page."""

_FINISHES = {"length": "cut at the longest length", "text_stop": "went on past its part"}

_CALL = re.compile(r"(<\|startofthink\|>.*?(?:<\|endofthink\|>|\Z))", re.DOTALL)


def predictions_page(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return the page: filters by kind of error, then the steps, those with most errors first.

    `rows` are scored; besides ids, texts and `scores` every field may be missing.
    """
    ordered = sorted(rows, key=_order)
    counts = Counter(kind for row in rows for kind in _kinds(row))
    filters = {"wrong": "wrong", "right": "calls right", "call": "call steps", "words": "answer steps"} | KINDS
    cut = f"; the first {MOST_STEPS:,} are shown" if len(ordered) > MOST_STEPS else ""
    conversations = len({row["conversation_id"] for row in rows})
    return render_page(
        "predictions",
        title=title,
        summary=f"{conversations:,} conversations, {len(rows):,} steps, {counts['wrong']:,} with an error in a call{cut}.",
        filters=[(kind, f"{label} {counts[kind]:,}") for kind, label in filters.items() if counts[kind]],
        steps=[_shown_step(row) for row in ordered[:MOST_STEPS]],
    )


def _shown_step(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step as the template shows it."""
    errors = row["scores"]["errors"]
    offered = [tool for each in row.get("offered") or () if (tool := read_offered_tool(each)) is not None]
    signatures = [name if names is None else f"{name}({', '.join(names)})" for name, names in offered]
    user = row.get("user")
    return {
        "conversation_id": row["conversation_id"],
        "step": row["step"],
        "kinds": _kinds(row),
        "errors": [KINDS.get(kind, kind) for kind in errors],
        "facts": _facts(row),
        "differences": call_differences(row["reference"], row["prediction"]) if errors else [],
        "user": _cut(user) if isinstance(user, str) else "–",
        "observations": [_cut(each) for each in row.get("observations") or () if isinstance(each, str)],
        "offered": len(offered),
        "signatures": _cut("\n".join(signatures)),
        "reference": _CALL.split(_cut(row["reference"])),
        "prediction": _CALL.split(_cut(row["prediction"])),
    }


def _kinds(row: Mapping[str, Any]) -> list[str]:
    """Return the filters that a step is found under."""
    scores = row["scores"]
    side = "wrong" if scores["errors"] else "right"
    return [side, "call" if scores["is_action"] else "words", *scores["errors"]]


def _order(row: Mapping[str, Any]) -> tuple[float, float, str, int]:
    """Most errors first; then answers by how far they are from their reference; then what is right."""
    rouge = row["scores"]["rouge_l"]
    return (-len(row["scores"]["errors"]), 2.0 if rouge is None else rouge, row["conversation_id"], row["step"])


def _facts(row: Mapping[str, Any]) -> str:
    scores = row["scores"]
    facts = []
    if scores["reference_failure"]:
        facts.append(f"the reference cannot be read: {scores['reference_failure']}")
    if calls := scores["reference_calls"]:
        facts.append(f"tool {scores['name_correct']}/{calls}, exact {scores['exact']}/{calls}")
        facts.append(f"argument F1 {scores['argument_f1'] / calls:.2f}")
    if scores["rouge_l"] is not None:
        facts.append(f"ROUGE-L {scores['rouge_l']:.2f}")
    if (finish := str(row.get("finish"))) in _FINISHES:
        facts.append(_FINISHES[finish])
    return " · ".join(facts)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"


def call_differences(reference: str, prediction: str) -> list[str]:
    """Return one line for each way in which the calls of `prediction` are not those of `reference`."""
    expected, reply = parse_reply(reference).calls, parse_reply(prediction)
    predicted = reply.calls
    pairs = align_calls(expected, predicted)
    lines: list[str] = []
    for pair in pairs:
        lines += _arguments(expected[pair.reference], predicted[pair.prediction])
    met, used = {pair.reference for pair in pairs}, {pair.prediction for pair in pairs}
    missing = [call for i, call in enumerate(expected) if i not in met]
    wrong = [call for j, call in enumerate(predicted) if j not in used]
    lines += _tools(missing, wrong)
    lines += [f"malformed: {failure.detail}" for failure in reply.failures]
    return lines


def _arguments(expected: ToolCall, predicted: ToolCall) -> Iterator[str]:
    wanted, given = expected.arguments, predicted.arguments
    for key, value in wanted.items():
        if key not in given:
            yield f"{expected.name}: {key} is missing, expected {_shown(value)}"
        elif not strictly_equal(value, given[key]):
            yield f"{expected.name}: {key} is {_shown(given[key])} instead of {_shown(value)}"
    for key, value in given.items():
        if key not in wanted:
            yield f"{expected.name}: {key} is extra, {_shown(value)}"


def _tools(missing: Sequence[ToolCall], wrong: Sequence[ToolCall]) -> Iterator[str]:
    for call, other in zip_longest(missing, wrong):
        if call is None:
            yield f"calls {other.name}, which the reference does not"
        elif other is None:
            # With its arguments: of several calls to one tool they alone tell which is meant.
            given = ", ".join(f"{key} {_shown(value)}" for key, value in call.arguments.items())
            yield f"does not call {call.name}" + (f" with {given}" if given else "")
        else:
            yield f"calls {other.name} instead of {call.name}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} …"
