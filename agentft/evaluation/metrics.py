"""Define every metric as a ratio of counts, and add up scored steps to a report with intervals.

A metric is a ratio of sums, of steps or of conversations; 0/0 is null, never 0. The counts are the fields of `StepScore`;
names and formulae of the paper are those of arXiv 2309.00986, section 4.1.

Steps of one conversation are alike, so the conversation is the unit that is resampled (Miller, arXiv 2411.00640): a
naive interval over steps covers 80 to 90 % where it says 95, see `benchmarks/interval_coverage.py`. The ratio is
recomputed in every resample.

Axes: G conversations (clusters), M metrics, D resamples. NaN stands for 0/0.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentft.errors import EvaluationError
from agentft.evaluation.matching import TOKENIZER_NAME, legacy_metrics
from agentft.evaluation.steps import StepRecord, StepScore, complete_records, score_step

Floats = NDArray[np.float64]

SCORING_VERSION = "v2"
"""Part of the signature; changes whenever any value changes on any input."""

HEADLINE = ("tool_acc", "param_em", "arg_f1", "step_em", "plan_acc", "rouge_l")
"""The family over which Holm's correction runs when two runs are compared."""

PAPER_NAMES = {"rouge_l": "rouge_l", "action_em": "tool_acc", "argument_f1": "arg_f1"}
"""Column of the paper's table 3 -> metric."""

INDICATIVE_BELOW = 100
"""With fewer conversations the 95 % interval covers less than it says (92 % at 50), so it is marked."""

CELLS_PER_CHUNK = 2_000_000
"""Of an array of resamples that is made at once."""


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """A ratio of sums over steps."""

    name: str
    meaning: str
    counts: Callable[[StepScore], tuple[float, float]]
    """What a step adds to numerator and denominator."""
    quarantined_too: bool = False
    """Counts steps with a bad reference as well, as the old script did."""
    per_conversation: bool = False
    """A conversation counts 1, or 0 if its numerator falls short of its denominator."""


def _rouge(score: StepScore, *, counts: bool = True) -> tuple[float, float]:
    return (0, 0) if score.rouge_l is None or not counts else (score.rouge_l, 1)


_define = MetricDefinition
METRICS: tuple[MetricDefinition, ...] = (
    _define("tool_acc", "right tool / reference calls", lambda s: (s.name_correct, s.reference_calls)),
    _define("tool_precision", "right tool / attempted calls", lambda s: (s.name_correct, s.attempts)),
    _define(
        "tool_f1",
        "2 right tool / (reference + attempted calls)",
        lambda s: (2 * s.name_correct, s.reference_calls + s.attempts),
    ),
    _define("param_em", "right tool, equal parameters / reference calls", lambda s: (s.exact, s.reference_calls)),
    _define("param_em_given_tool", "the same / right-tool calls", lambda s: (s.exact, s.name_correct)),
    _define("param_em_lenient", "param_em, lenient equality", lambda s: (s.lenient, s.reference_calls)),
    _define("arg_f1", "mean argument F1 of reference calls", lambda s: (s.argument_f1, s.reference_calls)),
    _define(
        "arg_f1_micro",
        "2 equal arguments / (reference + predicted arguments)",
        # Every predicted argument counts, those of wrong and spurious calls too: inventing a call costs precision.
        lambda s: (2 * s.full_matches, s.reference_arguments + s.predicted_arguments),
    ),
    _define("step_em", "exact action steps / action steps", lambda s: (s.is_action and s.is_exact, s.is_action)),
    _define(
        "conv_em",
        "conversations with all action steps exact / with one",
        lambda s: (s.is_action and s.is_exact, s.is_action),
        per_conversation=True,
    ),
    _define("plan_acc", "call or no call, as in the reference / steps", lambda s: (s.predicts_call == s.is_action, 1)),
    _define("call_wellformed_rate", "readable / attempted calls", lambda s: (s.wellformed, s.attempts)),
    _define(
        "thought_wellformed_rate",
        "thoughts opened and closed / steps that think",
        lambda s: (s.wellformed_thoughts, s.thoughts),
    ),
    _define(
        "hallucinated_tool_rate",
        "tools not offered / attempted calls",
        lambda s: (s.hallucinated_tools, s.offered_attempts),
    ),
    _define(
        "hallucinated_param_rate",
        "arguments not in the schema / predicted arguments",
        lambda s: (s.hallucinated_arguments, s.schema_arguments),
    ),
    _define("url_match", "equal url / right-tool calls with one", lambda s: (s.url_matches, s.url_references)),
    _define("rouge_l", "mean ROUGE-L F1 of answer steps", _rouge),
    _define(
        "rouge_l_after_call", "the same, summaries of tool results", lambda s: _rouge(s, counts=s.after_call is True)
    ),
    _define("rouge_l_no_call", "the same, answers without a tool", lambda s: _rouge(s, counts=s.after_call is False)),
    _define("tool_acc_repaired", "tool_acc, JSON mended", lambda s: (s.name_correct_repaired, s.reference_calls)),
    _define("param_em_repaired", "param_em, JSON mended", lambda s: (s.exact_repaired, s.reference_calls)),
    _define("arg_f1_repaired", "arg_f1, JSON mended", lambda s: (s.argument_f1_repaired, s.reference_calls)),
    _define("step_em_repaired", "step_em, JSON mended", lambda s: (s.is_action and s.is_exact_repaired, s.is_action)),
    _define(
        "legacy_action_em",
        "the old script's action_em, bugs and all",
        lambda s: (sum(s.legacy.actions), len(s.legacy.actions)),
        quarantined_too=True,
    ),
    _define(
        "legacy_input_em",
        "the old script's input_em",
        lambda s: (sum(s.legacy.inputs), len(s.legacy.inputs)),
        quarantined_too=True,
    ),
    _define(
        "legacy_rouge_l",
        "the old script's rouge",
        lambda s: (s.legacy.rouge_l or 0.0, s.legacy.is_text),
        quarantined_too=True,
    ),
)

METRICS_BY_NAME = {definition.name: definition for definition in METRICS}


def conversation_sums(
    scores: Iterable[StepScore], definitions: Sequence[MetricDefinition] = METRICS
) -> tuple[list[str], Floats, Floats]:
    """Add up steps by conversation, the pieces of one together.

    Steps and conversations are put in order of their ids first, so every later sum is the same whatever the order of
    `scores`.

    Returns:
        Conversation ids, numerators [G, M] and denominators [G, M].
    """
    ordered = sorted(scores, key=lambda score: (score.whole_id, score.conversation_id, score.step))
    groups = {name: list(steps) for name, steps in groupby(ordered, key=lambda score: score.whole_id)}
    rows = [[_sums(steps, definition) for definition in definitions] for steps in groups.values()]
    sums_GM2 = np.array(rows, dtype=np.float64).reshape(len(groups), len(definitions), 2)
    return list(groups), sums_GM2[:, :, 0], sums_GM2[:, :, 1]


def _sums(steps: Sequence[StepScore], definition: MetricDefinition) -> tuple[float, float]:
    counts = [definition.counts(s) for s in steps if definition.quarantined_too or s.reference_failure is None]
    numerator, denominator = (float(sum(count[side] for count in counts)) for side in (0, 1))
    if definition.per_conversation:
        return float(denominator > 0 and numerator == denominator), float(denominator > 0)
    return numerator, denominator


@dataclass(frozen=True, slots=True)
class Intervals:
    """Values of M ratios, or of differences of ratios, with 95 % intervals and standard errors, each an array [M]."""

    values: Floats
    low: Floats
    high: Floats
    se_cr0: Floats
    """Cluster-robust, without correction for few clusters."""
    se_cr1: Floats
    """Times sqrt(G/(G-1))."""
    clusters: NDArray[np.int64]
    """Conversations with a denominator above 0."""


def ratio_intervals(numerators_GM: Floats, denominators_GM: Floats, *, bootstrap_samples: int, seed: int) -> Intervals:
    """Bootstrap ratios of sums over conversations: percentile interval; resamples with a denominator of 0 are left out."""
    runs = [(numerators_GM, denominators_GM)]
    (ratios_DM,) = _resampled_ratios(runs, bootstrap_samples, seed)
    values_M = ratio(numerators_GM.sum(axis=0), denominators_GM.sum(axis=0))
    return _intervals(values_M, ratios_DM, _influence(*runs[0]), denominators_GM > 0)


def difference_intervals(
    a: tuple[Floats, Floats], b: tuple[Floats, Floats], *, bootstrap_samples: int, seed: int
) -> Intervals:
    """Bootstrap the differences b - a of two runs' (numerators, denominators), each [G, M], conversations in one order.

    Every resample takes the same conversations from both.
    """
    a_DM, b_DM = _resampled_ratios([a, b], bootstrap_samples, seed)
    value_a, value_b = (ratio(top.sum(axis=0), bottom.sum(axis=0)) for top, bottom in (a, b))
    return _intervals(value_b - value_a, b_DM - a_DM, _influence(*b) - _influence(*a), (a[1] > 0) | (b[1] > 0))


def _intervals(values_M: Floats, samples_DM: Floats, influence_GM: Floats, counted_GM: NDArray[np.bool_]) -> Intervals:
    clusters_M = counted_GM.sum(axis=0)
    cr0_M = np.sqrt((influence_GM**2).sum(axis=0))
    correction_M = ratio(clusters_M.astype(np.float64), np.maximum(clusters_M - 1, 0).astype(np.float64))
    tail = 100 * (1 - 0.95) / 2
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a metric without a defined resample
        low_M, high_M = np.nanpercentile(samples_DM, [tail, 100 - tail], axis=0)
    return Intervals(values_M, low_M, high_M, cr0_M, cr0_M * np.sqrt(correction_M), clusters_M)


def _resampled_ratios(runs: list[tuple[Floats, Floats]], count: int, seed: int) -> list[Floats]:
    """Return each run's ratios [D, M] over conversations drawn with replacement, the same ones for all runs."""
    columns_GK = np.hstack([part for run in runs for part in run])
    clusters, rng, sums = len(columns_GK), np.random.default_rng(seed), []
    chunk = max(1, CELLS_PER_CHUNK // clusters)  # bounds memory
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        drawn = rng.integers(0, clusters, size=(size, clusters)) + np.arange(size)[:, None] * clusters
        times_DG = np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters)
        sums.append(times_DG.astype(np.float64) @ columns_GK)
    parts = np.split(np.concatenate(sums), 2 * len(runs), axis=1)
    return [ratio(top, bottom) for top, bottom in zip(parts[::2], parts[1::2], strict=True)]


def ratio(numerators: Floats, denominators: Floats) -> Floats:
    """Return quotients, NaN for 0/0."""
    return np.divide(numerators, denominators, out=np.full_like(numerators, np.nan), where=denominators != 0)


def _influence(numerators_GM: Floats, denominators_GM: Floats) -> Floats:
    """Return what each conversation adds to the error of the ratio, [G, M]: (n - ratio d) / sum d."""
    total_M = denominators_GM.sum(axis=0)
    ratio_M = ratio(numerators_GM.sum(axis=0), total_M)
    residuals = numerators_GM - ratio_M * denominators_GM
    return ratio(residuals, np.broadcast_to(total_M, residuals.shape))


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
    names: Sequence[str],
    numerators_GM: Floats,
    denominators_GM: Floats,
    *,
    bootstrap_samples: int,
    seed: int,
    wholes: Sequence[str] = (),
) -> dict[str, Metric]:
    """Return ratios of sums over conversations by name, with their bootstrap intervals.

    `wholes` names the conversation of each row; rows of one are pieces of it, and are drawn together.
    """
    if wholes:
        _, group_G = np.unique(np.array(wholes, dtype=np.str_), return_inverse=True)
        pieces, sums = (numerators_GM, denominators_GM), np.zeros((2, int(group_G.max()) + 1, len(names)))
        for part, total in zip(pieces, sums, strict=True):
            np.add.at(total, group_G, part)
        numerators_GM, denominators_GM = sums
    found = ratio_intervals(numerators_GM, denominators_GM, bootstrap_samples=bootstrap_samples, seed=seed)
    return {
        name: Metric(
            value=finite_or_none(found.values[m]),
            numerator=float(numerators_GM[:, m].sum()),
            denominator=float(denominators_GM[:, m].sum()),
            low=finite_or_none(found.low[m]),
            high=finite_or_none(found.high[m]),
            se=finite_or_none(found.se_cr1[m]),
            se_cr0=finite_or_none(found.se_cr0[m]),
            conversations=int(found.clusters[m]),
        )
        for m, name in enumerate(names)
    }


def bootstrap_facts(bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """Return what a report says about its intervals."""
    return {"draws": bootstrap_samples, "seed": seed, "unit": "conversation", "interval": "percentile 95 %"}


def score_records(records: Iterable[StepRecord]) -> list[StepScore]:
    """Complete records by their conversations and score each, in order.

    Raises:
        EvaluationError: two records are the same step.
    """
    steps = list(records)
    _refuse_duplicates((record.conversation_id, record.step) for record in steps)
    return list(map(score_step, complete_records(steps)))


def aggregate(
    scores: Sequence[StepScore],
    *,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
    allow_bad_references: bool = False,
) -> dict[str, Any]:
    """Add up scored steps of whole conversations to a report, a JSON object without NaN; their order does not matter.

    | key | holds |
    |---|---|
    | `signature` | what was measured and how; values are comparable only under equal signatures |
    | `metrics` | `Metric.to_json` by name, with the paper's names `action_em` and `argument_f1` and the `legacy_*` values |
    | `paper`, `legacy` | values under the paper's names; those of the old script, with what it raised |
    | `plan_table` | reference (call, no_call) -> prediction (call, no_call) -> steps |
    | `confusion` | reference and predicted tool, most frequent first; None: no call on that side |
    | `errors` | kind of error -> steps that show it |
    | `breakdowns` | language, rounds, seen_tool -> group -> metrics; a kind is absent where no step tells it |
    | `quarantined` | references that cannot be read, left out with `allow_bad_references` instead of refused |

    Raises:
        EvaluationError: no step, a step twice, or an unreadable reference.
    """
    if not scores:
        raise EvaluationError("no step to score: the set of predictions is empty")
    _refuse_duplicates(score.key for score in scores)
    ordered = sorted(scores, key=lambda score: score.key)
    quarantined = [(*score.key, score.reference_failure) for score in ordered if score.reference_failure]
    if quarantined and not allow_bad_references:
        raise EvaluationError(_bad_reference_message(quarantined))
    usable = [score for score in ordered if score.reference_failure is None]
    legacy = legacy_metrics([score.legacy for score in ordered])
    metrics = _all_metrics(ordered, bootstrap_samples, seed)
    for name, old in legacy.items():
        if old.value is None:
            metrics[name] = Metric(None, old.numerator, old.denominator, None, None, None).to_json()
    return {
        "signature": signature(len({score.whole_id for score in ordered})),
        "metrics": metrics,
        "counts": _counts(ordered, usable),
        "paper": {name: metrics[name]["value"] for name in PAPER_NAMES},
        "legacy": {name: dataclasses.asdict(old) for name, old in legacy.items()},
        "plan_table": _plan_table(usable),
        "confusion": _confusion(usable),
        "errors": dict(sorted(Counter(kind for score in usable for kind in score.errors).items())),
        "breakdowns": _breakdowns(usable, bootstrap_samples, seed),
        "quarantined": [
            {"conversation_id": name, "step": step, "reason": reason} for name, step, reason in quarantined
        ],
        "bootstrap": bootstrap_facts(bootstrap_samples, seed),
    }


def signature(conversations: int, *, mode: str = "tf") -> str:
    """Return what was measured and how, in one line after the manner of sacreBLEU."""
    return f"agentft-eval|{SCORING_VERSION}|{mode}|tok:{TOKENIZER_NAME}|rl:f1|param:strict|align:bip|n:{conversations}"


def _all_metrics(
    scores: Sequence[StepScore], bootstrap_samples: int, seed: int, *, plain_only: bool = False
) -> dict[str, dict[str, Any]]:
    thinks = any(score.thoughts for score in scores)
    definitions = [
        definition
        for definition in METRICS
        if (thinks or definition.name != "thought_wellformed_rate") and not (plain_only and definition.quarantined_too)
    ]
    _, numerators_GM, denominators_GM = conversation_sums(scores, definitions)
    names = [definition.name for definition in definitions]
    found = interval_metrics(names, numerators_GM, denominators_GM, bootstrap_samples=bootstrap_samples, seed=seed)
    metrics = {name: metric.to_json() for name, metric in found.items()}
    return metrics | {alias: metrics[name] for alias, name in PAPER_NAMES.items()}


def _breakdowns(scores: Sequence[StepScore], bootstrap_samples: int, seed: int) -> dict[str, dict[str, Any]]:
    kinds: dict[str, Callable[[StepScore], str | None]] = {
        "language": lambda score: score.language,
        "rounds": lambda score: None if score.rounds is None else str(score.rounds) if score.rounds <= 3 else "4+",
        "seen_tool": lambda score: None if score.seen_tool is None else ("seen" if score.seen_tool else "unseen"),
    }
    breakdowns: dict[str, dict[str, Any]] = {}
    for kind, group_of in kinds.items():
        groups: dict[str, list[StepScore]] = {}
        for score in scores:
            if (group := group_of(score)) is not None:
                groups.setdefault(group, []).append(score)
        if groups:
            breakdowns[kind] = {
                group: _all_metrics(members, bootstrap_samples, seed, plain_only=True)
                for group, members in sorted(groups.items())
            }
    return breakdowns


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
    return {row: {column: cells[names[row], names[column]] for column in names} for row in names}


def _confusion(scores: Sequence[StepScore]) -> list[dict[str, Any]]:
    found = Counter(pair for score in scores for pair in score.confusions)
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0][0] or "", item[0][1] or ""))
    return [{"reference": expected, "predicted": predicted, "calls": calls} for (expected, predicted), calls in ordered]


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


def _tidy(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def finite_or_none(number: float) -> float | None:
    """Return a number as JSON can hold it."""
    return float(number) if np.isfinite(number) else None
