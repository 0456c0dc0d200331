"""Define every metric by name: what is counted above and below the line.

Each is a ratio of sums, of steps or of conversations; 0/0 is null, never 0. What the counts mean stands at the fields
of `StepScore`; names and formulae of the paper are those of arXiv 2309.00986, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from agentft.evaluation.scoring import StepScore

Floats = NDArray[np.float64]

HEADLINE = ("tool_acc", "param_em", "arg_f1", "step_em", "plan_acc", "rouge_l")
"""The family over which Holm's correction runs when two runs are compared."""

PAPER_NAMES = {"rouge_l": "rouge_l", "action_em": "tool_acc", "argument_f1": "arg_f1"}
"""Column of the paper's table 3 -> metric."""

LEGACY_NAMES = ("legacy_action_em", "legacy_input_em", "legacy_rouge_l")

Count = Callable[[StepScore], float]


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """A ratio of sums over steps."""

    name: str
    meaning: str
    numerator: Count
    denominator: Count
    quarantined_too: bool = False
    """Counts steps with a bad reference as well, as the old script did."""
    per_conversation: bool = False
    """A conversation counts 1, or 0 if its numerator falls short of its denominator."""


def _rouge(score: StepScore, *, where: bool) -> float:
    return score.rouge_l or 0.0 if where else 0.0


def _rouge_count(score: StepScore, *, where: bool) -> float:
    return score.rouge_l is not None and where


def _define(name: str, meaning: str, numerator: Count, denominator: Count, **flags: bool) -> MetricDefinition:
    return MetricDefinition(name, meaning, numerator, denominator, **flags)


METRICS: tuple[MetricDefinition, ...] = (
    _define("tool_acc", "right tool / reference calls", lambda s: s.name_correct, lambda s: s.reference_calls),
    _define("tool_precision", "right tool / attempted calls", lambda s: s.name_correct, lambda s: s.attempts),
    _define(
        "tool_f1",
        "2 right tool / (reference + attempted calls)",
        lambda s: 2 * s.name_correct,
        lambda s: s.reference_calls + s.attempts,
    ),
    _define(
        "param_em", "right tool, equal parameters / reference calls", lambda s: s.exact, lambda s: s.reference_calls
    ),
    _define("param_em_given_tool", "the same / right-tool calls", lambda s: s.exact, lambda s: s.name_correct),
    _define("param_em_lenient", "param_em, lenient equality", lambda s: s.lenient, lambda s: s.reference_calls),
    _define("arg_f1", "mean argument F1 of reference calls", lambda s: s.argument_f1, lambda s: s.reference_calls),
    _define(
        "arg_f1_micro",
        "2 equal arguments / (reference + predicted arguments)",
        # Every predicted argument counts, those of wrong and spurious calls too: inventing a call costs precision.
        lambda s: 2 * s.full_matches,
        lambda s: s.reference_arguments + s.predicted_arguments,
    ),
    _define(
        "step_em", "exact action steps / action steps", lambda s: s.is_action and s.is_exact, lambda s: s.is_action
    ),
    _define(
        "conv_em",
        "conversations with all action steps exact / with one",
        lambda s: s.is_action and s.is_exact,
        lambda s: s.is_action,
        per_conversation=True,
    ),
    _define(
        "plan_acc",
        "call or no call, as in the reference / steps",
        lambda s: s.predicts_call == s.is_action,
        lambda s: 1,
    ),
    _define("call_wellformed_rate", "readable / attempted calls", lambda s: s.wellformed, lambda s: s.attempts),
    _define(
        "thought_wellformed_rate",
        "thoughts opened and closed / steps that think",
        lambda s: s.wellformed_thoughts,
        lambda s: s.thoughts,
    ),
    _define(
        "hallucinated_tool_rate",
        "tools not offered / attempted calls",
        lambda s: s.hallucinated_tools,
        lambda s: s.offered_attempts,
    ),
    _define(
        "hallucinated_param_rate",
        "arguments not in the schema / predicted arguments",
        lambda s: s.hallucinated_arguments,
        lambda s: s.schema_arguments,
    ),
    _define("url_match", "equal url / right-tool calls with one", lambda s: s.url_matches, lambda s: s.url_references),
    _define(
        "rouge_l",
        "mean ROUGE-L F1 of answer steps",
        lambda s: _rouge(s, where=True),
        lambda s: _rouge_count(s, where=True),
    ),
    _define(
        "rouge_l_after_call",
        "the same, summaries of tool results",
        lambda s: _rouge(s, where=s.after_call is True),
        lambda s: _rouge_count(s, where=s.after_call is True),
    ),
    _define(
        "rouge_l_no_call",
        "the same, answers without a tool",
        lambda s: _rouge(s, where=s.after_call is False),
        lambda s: _rouge_count(s, where=s.after_call is False),
    ),
    _define(
        "rouge_l_jieba",
        "rouge_l on jieba's words",
        lambda s: s.rouge_l_jieba or 0.0,
        lambda s: s.rouge_l_jieba is not None,
    ),
    _define(
        "tool_acc_repaired", "tool_acc, JSON mended", lambda s: s.name_correct_repaired, lambda s: s.reference_calls
    ),
    _define("param_em_repaired", "param_em, JSON mended", lambda s: s.exact_repaired, lambda s: s.reference_calls),
    _define("arg_f1_repaired", "arg_f1, JSON mended", lambda s: s.argument_f1_repaired, lambda s: s.reference_calls),
    _define(
        "step_em_repaired",
        "step_em, JSON mended",
        lambda s: s.is_action and s.is_exact_repaired,
        lambda s: s.is_action,
    ),
    _define(
        "legacy_action_em",
        "the old script's action_em, bugs and all",
        lambda s: sum(s.legacy.actions),
        lambda s: len(s.legacy.actions),
        quarantined_too=True,
    ),
    _define(
        "legacy_input_em",
        "the old script's input_em",
        lambda s: sum(s.legacy.inputs),
        lambda s: len(s.legacy.inputs),
        quarantined_too=True,
    ),
    _define(
        "legacy_rouge_l",
        "the old script's rouge",
        lambda s: s.legacy.rouge_l or 0.0,
        lambda s: s.legacy.is_text,
        quarantined_too=True,
    ),
)

METRICS_BY_NAME = {definition.name: definition for definition in METRICS}


def conversation_sums(
    scores: Sequence[StepScore], definitions: Sequence[MetricDefinition] = METRICS
) -> tuple[list[str], Floats, Floats]:
    """Add up steps by conversation, the pieces of one together.

    Steps and conversations are put in order of their ids first, so every later sum is the same whatever the order of
    `scores`.

    Returns:
        Conversation ids, numerators [G, M] and denominators [G, M].
    """
    ordered = sorted(scores, key=lambda score: (score.whole_id, score.conversation_id, score.step))
    ids: list[str] = []
    rows: list[list[tuple[float, float]]] = []
    for conversation_id, steps in groupby(ordered, key=lambda score: score.whole_id):
        members = list(steps)
        ids.append(conversation_id)
        rows.append([_sums(members, definition) for definition in definitions])
    sums_GM2 = np.array(rows, dtype=np.float64).reshape(len(ids), len(definitions), 2)
    return ids, sums_GM2[:, :, 0], sums_GM2[:, :, 1]


def _sums(steps: Sequence[StepScore], definition: MetricDefinition) -> tuple[float, float]:
    counted = [step for step in steps if definition.quarantined_too or step.reference_failure is None]
    numerator = sum(definition.numerator(step) for step in counted)
    denominator = sum(definition.denominator(step) for step in counted)
    if definition.per_conversation:
        return float(denominator > 0 and numerator == denominator), float(denominator > 0)
    return float(numerator), float(denominator)
