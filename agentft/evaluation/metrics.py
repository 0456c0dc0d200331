"""Add up scored steps to the report: every metric with numerator, denominator and interval, and what it breaks down into."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentft.errors import EvaluationError
from agentft.evaluation.definitions import LEGACY_NAMES, METRICS, PAPER_NAMES, Floats, conversation_sums
from agentft.evaluation.legacy import LegacyMetric, legacy_metrics
from agentft.evaluation.matching import TOKENIZER_NAME, jieba_tokenizer
from agentft.evaluation.scoring import StepRecord, StepScore, complete_records, score_step
from agentft.evaluation.statistics import INDICATIVE_BELOW, ratio_intervals

SCORING_VERSION = "v2"
"""Part of the signature; changes whenever any value changes on any input."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One value with all that is needed to read it."""

    value: float | None
    """None for 0/0."""
    numerator: float
    denominator: float
    low: float | None
    """95 % interval, percentile bootstrap over conversations."""
    high: float | None
    se: float | None
    """Clustered standard error CR1; None for a single conversation."""
    se_cr0: float | None = None
    conversations: int = 0
    """Conversations that count in the denominator."""

    @property
    def indicative(self) -> bool:
        """Return whether there are too few conversations to trust the interval's 95 %."""
        return self.conversations < INDICATIVE_BELOW

    def to_json(self) -> dict[str, Any]:
        """Return the fields, whole counts as integers."""
        counts = {"numerator": _tidy(self.numerator), "denominator": _tidy(self.denominator)}
        return dataclasses.asdict(self) | counts | {"indicative": self.indicative}


def interval_metrics(
    names: Sequence[str], numerators_GM: Floats, denominators_GM: Floats, *, bootstrap_samples: int, seed: int
) -> dict[str, Metric]:
    """Return ratios of sums over conversations by name, with their bootstrap intervals."""
    found = ratio_intervals(numerators_GM, denominators_GM, bootstrap_samples=bootstrap_samples, seed=seed)
    return {
        name: Metric(
            value=_or_none(found.values[m]),
            numerator=float(numerators_GM[:, m].sum()),
            denominator=float(denominators_GM[:, m].sum()),
            low=_or_none(found.low[m]),
            high=_or_none(found.high[m]),
            se=_or_none(found.se_cr1[m]),
            se_cr0=_or_none(found.se_cr0[m]),
            conversations=int(found.clusters[m]),
        )
        for m, name in enumerate(names)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """What one run scored in one evaluation."""

    signature: str
    """What was measured and how; values are comparable only under equal signatures."""
    metrics: dict[str, Metric]
    """By name; includes the paper's names `action_em` and `argument_f1` and the `legacy_*` values."""
    counts: dict[str, int]
    breakdowns: dict[str, dict[str, dict[str, Metric]]]
    """Kind (language, rounds, seen_tool) -> group -> metrics; a kind is absent where no step tells it."""
    plan_table: dict[str, dict[str, int]]
    """Reference (call, no_call) -> prediction (call, no_call) -> steps."""
    confusion: tuple[tuple[str | None, str | None, int], ...]
    """(reference tool, predicted tool, calls), most frequent first; None: no call on that side."""
    errors: dict[str, int]
    """Error kind -> steps that show it."""
    legacy: dict[str, LegacyMetric]
    quarantined: tuple[tuple[str, int, str], ...]
    """(conversation id, step, reason) of references that cannot be read."""
    bootstrap_samples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; never holds NaN."""
        return {
            "signature": self.signature,
            "metrics": _metrics_to_json(self.metrics),
            "counts": self.counts,
            "paper": {name: self.metrics[name].value for name in PAPER_NAMES},
            "legacy": {name: dataclasses.asdict(old) for name, old in self.legacy.items()},
            "plan_table": self.plan_table,
            "confusion": [
                {"reference": expected, "predicted": predicted, "calls": calls}
                for expected, predicted, calls in self.confusion
            ],
            "errors": self.errors,
            "breakdowns": {
                kind: {group: _metrics_to_json(metrics) for group, metrics in groups.items()}
                for kind, groups in self.breakdowns.items()
            },
            "quarantined": [
                {"conversation_id": name, "step": step, "reason": reason} for name, step, reason in self.quarantined
            ],
            "bootstrap": bootstrap_facts(self.bootstrap_samples, self.seed),
        }


def bootstrap_facts(bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """Return what a report says about its intervals."""
    return {"draws": bootstrap_samples, "seed": seed, "unit": "conversation", "interval": "percentile 95 %"}


def score_records(
    records: Iterable[StepRecord], *, stop_texts: Sequence[str] = (), with_jieba: bool = False
) -> list[StepScore]:
    """Complete records by their conversations and score each, in order.

    Raises:
        EvaluationError: two records are the same step, or jieba is asked for and missing.
    """
    steps = list(records)
    _refuse_duplicates((record.conversation_id, record.step) for record in steps)
    jieba = jieba_tokenizer() if with_jieba else None
    return [score_step(record, stop_texts=stop_texts, jieba=jieba) for record in complete_records(steps)]


def aggregate(
    scores: Sequence[StepScore],
    *,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
    mode: str = "tf",
    allow_bad_references: bool = False,
) -> EvaluationReport:
    """Add up scored steps; the result does not depend on their order.

    Args:
        scores: Steps of whole conversations.
        bootstrap_samples: Resamples behind each interval.
        seed: Of their draw.
        mode: How predictions were made, for the signature: "tf" teacher-forced, "replay".
        allow_bad_references: Leave steps with an unreadable reference out, listed and counted, instead of refusing.

    Raises:
        EvaluationError: no step, a step twice, or an unreadable reference.
    """
    if not scores:
        raise EvaluationError("no step to score: the set of predictions is empty")
    _refuse_duplicates((score.conversation_id, score.step) for score in scores)
    ordered = sorted(scores, key=lambda score: (score.conversation_id, score.step))
    quarantined = tuple(
        (score.conversation_id, score.step, score.reference_failure) for score in ordered if score.reference_failure
    )
    if quarantined and not allow_bad_references:
        raise EvaluationError(_bad_reference_message(quarantined))
    usable = [score for score in ordered if score.reference_failure is None]
    legacy = legacy_metrics([score.legacy for score in ordered])
    metrics = _all_metrics(ordered, bootstrap_samples, seed)
    for name in LEGACY_NAMES:
        if legacy[name].value is None:
            metrics[name] = Metric(None, legacy[name].numerator, legacy[name].denominator, None, None, None)
    return EvaluationReport(
        signature=signature(len({score.whole_id for score in ordered}), mode=mode),
        metrics=metrics,
        counts=_counts(ordered, usable),
        breakdowns=_breakdowns(usable, bootstrap_samples, seed),
        plan_table=_plan_table(usable),
        confusion=_confusion(usable),
        errors=dict(sorted(Counter(kind for score in usable for kind in score.errors).items())),
        legacy=legacy,
        quarantined=quarantined,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )


def signature(conversations: int, *, mode: str = "tf") -> str:
    """Return what was measured and how, in one line after the manner of sacreBLEU."""
    return f"agentft-eval|{SCORING_VERSION}|{mode}|tok:{TOKENIZER_NAME}|rl:f1|param:strict|align:bip|n:{conversations}"


def _all_metrics(
    scores: Sequence[StepScore], bootstrap_samples: int, seed: int, *, plain_only: bool = False
) -> dict[str, Metric]:
    absent = {
        *(() if any(score.rouge_l_jieba is not None for score in scores) else ("rouge_l_jieba",)),
        *(() if any(score.thoughts for score in scores) else ("thought_wellformed_rate",)),
    }
    definitions = [
        definition
        for definition in METRICS
        if definition.name not in absent and not (plain_only and definition.quarantined_too)
    ]
    _, numerators_GM, denominators_GM = conversation_sums(scores, definitions)
    names = [definition.name for definition in definitions]
    metrics = interval_metrics(names, numerators_GM, denominators_GM, bootstrap_samples=bootstrap_samples, seed=seed)
    return metrics | {alias: metrics[name] for alias, name in PAPER_NAMES.items()}


def _breakdowns(
    scores: Sequence[StepScore], bootstrap_samples: int, seed: int
) -> dict[str, dict[str, dict[str, Metric]]]:
    kinds: dict[str, Callable[[StepScore], str | None]] = {
        "language": lambda score: score.language,
        "rounds": lambda score: None if score.rounds is None else _rounds_group(score.rounds),
        "seen_tool": lambda score: None if score.seen_tool is None else ("seen" if score.seen_tool else "unseen"),
    }
    breakdowns: dict[str, dict[str, dict[str, Metric]]] = {}
    for kind, group_of in kinds.items():
        groups: dict[str, list[StepScore]] = {}
        for score in scores:
            group = group_of(score)
            if group is not None:
                groups.setdefault(group, []).append(score)
        if groups:
            breakdowns[kind] = {
                group: _all_metrics(members, bootstrap_samples, seed, plain_only=True)
                for group, members in sorted(groups.items())
            }
    return breakdowns


def _rounds_group(rounds: int) -> str:
    return str(rounds) if rounds <= 3 else "4+"


def _counts(scores: Sequence[StepScore], usable: Sequence[StepScore]) -> dict[str, int]:
    actions = [score for score in usable if score.is_action]
    answers = [score for score in usable if not score.is_action]
    attempts = sum(score.attempts for score in usable)
    wellformed = sum(score.wellformed for score in usable)
    rouge_samples = sum(score.rouge_l is not None for score in answers)
    return {
        "conversations": len({score.whole_id for score in scores}),
        "steps": len(scores),
        "quarantined_references": len(scores) - len(usable),
        "action_steps": len(actions),
        "answer_steps": len(answers),
        "reference_calls": sum(score.reference_calls for score in actions),
        "attempted_calls": attempts,
        "wellformed_calls": wellformed,
        "malformed_calls": attempts - wellformed,
        "spurious_calls": sum(score.attempts for score in answers),
        "repaired_calls": sum(score.repaired_calls for score in usable),
        **({"thoughts": thoughts} if (thoughts := sum(score.thoughts for score in usable)) else {}),
        "calls_without_offered_tools": sum(score.attempts - score.offered_attempts for score in usable),
        "rouge_samples": rouge_samples,
        "rouge_skipped": len(answers) - rouge_samples,
        "rouge_samples_unplaced": sum(score.rouge_l is not None and score.after_call is None for score in answers),
    }


def _plan_table(scores: Sequence[StepScore]) -> dict[str, dict[str, int]]:
    cells = Counter((score.is_action, score.predicts_call) for score in scores)
    names = {"call": True, "no_call": False}
    return {
        row: {column: cells[is_action, predicts] for column, predicts in names.items()}
        for row, is_action in names.items()
    }


def _confusion(scores: Sequence[StepScore]) -> tuple[tuple[str | None, str | None, int], ...]:
    found = Counter(pair for score in scores for pair in score.confusions)
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0][0] or "", item[0][1] or ""))
    return tuple((expected, predicted, calls) for (expected, predicted), calls in ordered)


def _refuse_duplicates(keys: Iterable[tuple[str, int]]) -> None:
    twice = [key for key, times in Counter(keys).items() if times > 1]
    if twice:
        name, step = twice[0]
        more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
        raise EvaluationError(f"conversation {name!r} has step {step} more than once{more}: every step is scored once")


def _bad_reference_message(quarantined: Sequence[tuple[str, int, str]]) -> str:
    listed = "; ".join(f"{name!r} step {step} ({reason})" for name, step, reason in quarantined[:10])
    more = f"; and {len(quarantined) - 10} more" if len(quarantined) > 10 else ""
    return (
        f"{len(quarantined)} reference call(s) cannot be read: {listed}{more}. "
        "Mend the data, or allow bad references to leave these steps out"
    )


def _metrics_to_json(metrics: dict[str, Metric]) -> dict[str, Any]:
    return {name: metric.to_json() for name, metric in metrics.items()}


def _tidy(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _or_none(number: np.float64) -> float | None:
    return float(number) if np.isfinite(number) else None
