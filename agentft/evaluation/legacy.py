"""Compute what the old script's `evaluate()` would have printed, bug for bug. For comparison only.

Rewritten from its observed behaviour (`demo/tool_agent_finetune` of ModelScope-Agent) and of the package `rouge` 1.0.1
under it. Known to be wrong, and kept wrong here:

* greedy marks and braces: two calls in a step cannot be read, and in the *reference* they make the step a text;
* only the first `{` to the last `}` counts, line feeds are deleted, values compare as in Python (True == 1);
* a call without `parameters` enters twice, once right and once wrong, so the two rates have different denominators;
* a call where none was due costs nothing; a wrong tool with equal parameters scores input_em 1;
* ROUGE-L splits at blanks and full stops and counts *sets* of words, so one Chinese sentence is one word.

Where the original raises, a value is null here and the exception's name is kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_DEEPEST_RECURSION = 990
"""Frames that CPython's default limit of 1,000 left to the recursion inside `rouge`, called from the old script."""

_F_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class LegacyStep:
    """What one step adds to the lists of the old script."""

    actions: tuple[int, ...] = ()
    """0 or 1 each; (1, 0) where the double count strikes."""
    inputs: tuple[int, ...] = ()
    is_text: bool = False
    """The reference could not be read as a call, so the step goes to ROUGE."""
    rouge_l: float | None = None
    raised: str | None = None
    """The exception that ROUGE would have raised on this step."""


@dataclass(frozen=True, slots=True)
class LegacyMetric:
    """One value of the old script, or the reason why it had none."""

    value: float | None
    numerator: float
    denominator: int
    raised: str | None


def legacy_step(reference: str, prediction: str) -> LegacyStep:
    """Score one step of raw texts as the old script did."""
    try:
        expected = _first_call(reference)
    except Exception:  # the original's own `except Exception`: the bug that makes a broken reference a text
        return _legacy_text(reference, prediction)
    actions: list[int] = []
    try:
        found = _first_call(prediction)
        actions.append(int(found["api_name"] == expected["api_name"]))
        inputs = int(_same_parameters(expected["parameters"], found["parameters"]))
    except Exception:  # the same, and the double count: an entry made above is not taken back
        actions.append(0)
        inputs = 0
    return LegacyStep(actions=tuple(actions), inputs=(inputs,))


def legacy_metrics(steps: Sequence[LegacyStep]) -> dict[str, LegacyMetric]:
    """Return the three values over all steps, in the order in which the old script computed them.

    Its exceptions lost all three at once; here each value carries only its own.
    """
    texts = [step for step in steps if step.is_text]
    raised = next((step.raised for step in texts if step.raised), None if texts else "ZeroDivisionError")
    rouge_sum = sum(step.rouge_l for step in texts if step.rouge_l is not None)
    actions = [entry for step in steps for entry in step.actions]
    inputs = [entry for step in steps for entry in step.inputs]
    return {
        "legacy_rouge_l": LegacyMetric(None if raised else rouge_sum / len(texts), rouge_sum, len(texts), raised),
        "legacy_action_em": _mean(actions),
        "legacy_input_em": _mean(inputs),
    }


def _mean(entries: list[int]) -> LegacyMetric:
    if not entries:
        return LegacyMetric(None, 0, 0, "ZeroDivisionError")
    return LegacyMetric(sum(entries) / len(entries), sum(entries), len(entries), None)


def _first_call(text: str) -> Any:
    inside = _widest(_widest(text, "<|startofthink|>", "<|endofthink|>"), "{", "}")
    return json.loads("{" + inside.replace("\n", "") + "}")


def _widest(text: str, opening: str, closing: str) -> str:
    """Return what a greedy `opening([\\s\\S]+)closing` finds: from the first opening to the last closing mark."""
    start = text.find(opening)
    end = text.rfind(closing)
    if start < 0 or end <= start + len(opening):
        raise ValueError(f"no text between {opening} and {closing}")
    return text[start + len(opening) : end]


def _same_parameters(expected: Any, found: Any) -> bool:
    for key, value in expected.items():
        if key not in found.keys() or not found[key] == value:  # noqa: SIM118, SIM201 - a list must fail here, as it did
            return False
    return all(key in expected for key in found.keys())  # noqa: SIM118


def _legacy_text(reference: str, prediction: str) -> LegacyStep:
    try:
        score = _set_rouge_l(_sentences(prediction or " "), _sentences(reference))
    except (ValueError, RecursionError) as error:
        return LegacyStep(is_text=True, raised=type(error).__name__)
    return LegacyStep(is_text=True, rouge_l=score)


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _set_rouge_l(hypothesis: list[list[str]], reference: list[list[str]]) -> float:
    """ROUGE-L of `rouge` 1.0.1: union over sentences of the *set* of words on one LCS path, over sets of words."""
    if not hypothesis:
        raise ValueError("Hypothesis is empty.")
    if not reference:
        raise ValueError("Reference is empty.")
    union: set[str] = set()
    for reference_words in reference:
        for words in hypothesis:
            union |= _lcs_words(reference_words, words)
    recall = len(union) / len({word for words in reference for word in words})
    precision = len(union) / len({word for words in hypothesis for word in words})
    return 2.0 * ((precision * recall) / (precision + recall + _F_EPSILON))


def _lcs_words(left: list[str], right: list[str]) -> set[str]:
    """Return the words on the LCS path that `rouge` walks back (ties: leave a word of `right` first).

    Raises:
        RecursionError: the path is longer than the original's recursion could go.
    """
    if min(len(left), len(right)) >= _DEEPEST_RECURSION:
        raise RecursionError
    table = _lcs_table(left, right)
    i, j, frames = len(left), len(right), 1
    words: set[str] = set()
    while i and j:
        if left[i - 1] == right[j - 1]:
            words.add(left[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
        frames += 1
    if frames > _DEEPEST_RECURSION:
        raise RecursionError
    return words


def _lcs_table(left: list[str], right: list[str]) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Return LCS lengths of all prefixes, [len(left) + 1, len(right) + 1]; both fit int16 by the caller's check."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys((*left, *right)))}
    row_words = [numbers[word] for word in left]
    column_words = np.array([numbers[word] for word in right])
    table = np.zeros((len(left) + 1, len(right) + 1), dtype=np.int16)
    for i, word in enumerate(row_words):
        grown = np.maximum(table[i, 1:], table[i, :-1] + (column_words == word))
        np.maximum.accumulate(grown, out=table[i + 1, 1:])
    return table
