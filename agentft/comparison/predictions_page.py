"""Write a file of predictions as one HTML page: wrong answers first, by kind of error, with what is wrong in words."""

from __future__ import annotations

import dataclasses
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
from agentft.evaluation.scoring import OfferedTool, read_offered_tool

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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReadStep:
    """One step as the page shows it."""

    conversation_id: str
    step: int
    reference: str
    prediction: str
    scores: Mapping[str, Any]
    """The fields of `StepScore`."""
    user: str | None = None
    observations: Sequence[str] = ()
    offered: Sequence[OfferedTool] = ()
    finish: str | None = None

    @property
    def errors(self) -> list[str]:
        """Kinds of error, each once."""
        return list(self.scores.get("errors", ()))

    @property
    def kinds(self) -> list[str]:
        """What this step is found under."""
        side = "wrong" if self.errors else "right"
        return [side, "call" if self.scores.get("is_action") else "words", *self.errors]


def read_steps(rows: Sequence[Mapping[str, Any]]) -> list[ReadStep]:
    """Return the steps of scored prediction rows, as `agentft.recipes.evaluation_run` makes them."""
    return [
        ReadStep(
            **{name: row[name] for name in ("conversation_id", "step", "reference", "prediction", "scores")},
            user=_text_or_none(row.get("user")),
            observations=[each for each in row.get("observations") or () if isinstance(each, str)],
            offered=[tool for each in row.get("offered") or () if (tool := read_offered_tool(each)) is not None],
            finish=_text_or_none(row.get("finish")),
        )
        for row in rows
    ]


def predictions_page(steps: Sequence[ReadStep], title: str) -> str:
    """Return the page: filters by kind of error, then the steps, those with most errors first."""
    ordered = sorted(steps, key=_order)
    counts = Counter(kind for step in steps for kind in step.kinds)
    filters = {"wrong": "wrong", "right": "calls right", "call": "call steps", "words": "answer steps"} | KINDS
    cut = f"; the first {MOST_STEPS:,} are shown" if len(ordered) > MOST_STEPS else ""
    conversations = len({step.conversation_id for step in steps})
    return render_page(
        "predictions",
        title=title,
        summary=f"{conversations:,} conversations, {len(steps):,} steps, {counts['wrong']:,} with an error in a call{cut}.",
        filters=[(kind, f"{label} {counts[kind]:,}") for kind, label in filters.items() if counts[kind]],
        steps=ordered[:MOST_STEPS],
        error_words=KINDS,
        call_differences=call_differences,
        facts=_facts,
        offered=lambda step: "\n".join(map(_signature, step.offered)),
        cut=_cut,
        pieces=lambda text: _CALL.split(_cut(text)),
    )


def _order(step: ReadStep) -> tuple[float, float, str, int]:
    """Most errors first; then answers by how far they are from their reference; then what is right."""
    rouge = step.scores.get("rouge_l")
    return (-len(step.errors), 2.0 if rouge is None else rouge, step.conversation_id, step.step)


def _signature(tool: OfferedTool) -> str:
    return tool.name if tool.parameters is None else f"{tool.name}({', '.join(tool.parameters)})"


def _facts(step: ReadStep) -> str:
    scores = step.scores
    facts = []
    if scores.get("reference_failure"):
        facts.append(f"the reference cannot be read: {scores['reference_failure']}")
    if calls := scores.get("reference_calls"):
        facts.append(f"tool {scores['name_correct']}/{calls}, exact {scores['exact']}/{calls}")
        facts.append(f"argument F1 {scores['argument_f1'] / calls:.2f}")
    if scores.get("rouge_l") is not None:
        facts.append(f"ROUGE-L {scores['rouge_l']:.2f}")
    if step.finish in _FINISHES:
        facts.append(_FINISHES[step.finish])
    return " · ".join(facts)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def call_differences(reference: str, prediction: str) -> list[str]:
    """Return one line for each way in which the calls of `prediction` are not those of `reference`."""
    expected, reply = parse_reply(reference).requests, parse_reply(prediction)
    predicted = reply.requests
    pairs = align_calls(expected, predicted)
    lines: list[str] = []
    for pair in pairs:
        lines += _arguments(expected[pair.reference], predicted[pair.prediction])
    met, used = {pair.reference for pair in pairs}, {pair.prediction for pair in pairs}
    missing = [call for i, call in enumerate(expected) if i not in met]
    wrong = [call for j, call in enumerate(predicted) if j not in used]
    lines += _tools(missing, wrong)
    lines += [f"malformed: {attempt.failure.detail}" for attempt in reply.attempts if attempt.failure]
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
