"""What is wrong with the calls of an answer, in words: `city: "Rome" instead of "Paris"`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from agentft.data.calls import ToolCall
from agentft.evaluation.alignment import align_calls
from agentft.evaluation.equality import strictly_equal
from agentft.evaluation.parse import parse_reply

_LONGEST_VALUE = 160


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
