"""Rank runs: say which settings differ, which run is best, and which cannot be told from it.

"Tied" means that a paired test on the same held-out conversations finds no difference to the best run at 5 %, with
Holm's correction over all runs of the table. Where predictions are missing, overlapping 95 % intervals stand in for the
test, and the table says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agentft.comparison.pairs import compare_runs
from agentft.comparison.runs import ANSWERS, NUMBERS, ComparedRun, saved_scores
from agentft.errors import ConfigError, EvaluationError
from agentft.evaluation.metrics import HEADLINE, METRICS_BY_NAME
from agentft.evaluation.scoring import StepScore
from agentft.evaluation.statistics import INDICATIVE_BELOW, SIGNIFICANT, holm
from agentft.recipes.config import AFFECT_NOTHING

Mark = Literal["", "best", "tied", "other data"]

BOOTSTRAP_SAMPLES = 2000
"""Of each paired test: enough to tell p = 0.05 from 0.06, and 27 runs take seconds."""

LOWER_IS_BETTER = ("loss", "hallucinated_tool_rate", "hallucinated_param_rate", "seconds", "peak_memory_bytes")
_TIE_BREAKERS = ("arg_f1", "tool_acc", "loss")
_GROUPS = ("model", "sft_type", "dataset", "distributed", "training", "evaluation")


@dataclass(kw_only=True)
class Ranking:
    """Runs in order, best first, with what is known about the order."""

    metric: str
    runs: list[ComparedRun]
    differing: dict[str, str]
    """Setting in which runs differ -> its shortest unmistakable name."""
    marks: dict[str, Mark] = field(default_factory=dict)
    """Name of a run -> its mark."""
    p: dict[str, float] = field(default_factory=dict)
    """Name of a run -> p of its difference to the best, corrected."""
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """Return the columns: headline metrics, and the one that decides."""
        known = {name for run in self.runs for name in run.scores}
        columns = [name for name in HEADLINE if name in known]
        if self.metric in known and self.metric not in columns:
            columns.insert(0, self.metric)
        return columns


def rank(runs: Sequence[ComparedRun], metric: str = "arg_f1") -> Ranking:
    """Put runs in order by `metric`, then `arg_f1`, `tool_acc` and held-out loss; runs without results come last.

    Raises:
        ConfigError: no run can have such a metric.
    """
    if metric not in METRICS_BY_NAME and metric not in NUMBERS and not any(metric in run.scores for run in runs):
        raise ConfigError(f"--sort {metric}: expected one of {', '.join([*METRICS_BY_NAME, *NUMBERS])}")
    criteria = list(dict.fromkeys([metric, *_TIE_BREAKERS]))

    def position(run: ComparedRun) -> tuple[Any, ...]:
        keys: list[float] = []
        for name in criteria:
            value = run.number(name)
            sign = 1 if name in LOWER_IS_BETTER else -1
            keys += [1.0, 0.0] if value is None else [0.0, sign * value]
        return tuple(keys)

    ordered = sorted(runs, key=position)
    ranking = Ranking(metric=metric, runs=ordered, differing=differing_settings(runs))
    _mark(ranking)
    return ranking


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """Return the settings in which runs differ with their short names; what the choice of a group implies is left out."""
    known = [run for run in runs if run.settings]
    swept = frozenset().union(*(run.swept for run in known))
    keys = list(dict.fromkeys(key for run in known for key in run.settings if key not in AFFECT_NOTHING))
    differing = []
    for key in keys:
        values = {_hashable(run.settings.get(key)) for run in known}
        if len(values) > 1 and not (key not in swept and _follows_from_choice(key, known)):
            differing.append(key)
    differing = [key for key in differing if not _follows_from_swept(key, differing, known)]
    return {key: _short(key, differing) for key in differing}


def _follows_from_swept(key: str, differing: Sequence[str], runs: Sequence[ComparedRun]) -> bool:
    """Return whether nobody set it and a setting of its group that was swept decides it: `alpha` that follows `rank`."""
    if any(not run.swept or key in run.swept for run in runs):
        return False
    group = key.rpartition(".")[0]
    for other in differing:
        if group and other.rpartition(".")[0] == group and all(other in run.swept for run in runs):
            pairs = {(_hashable(run.settings.get(other)), _hashable(run.settings.get(key))) for run in runs}
            if len(pairs) == len({value for value, _ in pairs}):
                return True
    return False


def _follows_from_choice(key: str, runs: Sequence[ComparedRun]) -> bool:
    group, _, setting = key.partition(".")
    if group not in _GROUPS or setting == "name":
        return False
    by_option: dict[Any, set[Any]] = {}
    for run in runs:
        by_option.setdefault(run.settings.get(f"{group}.name"), set()).add(_hashable(run.settings.get(key)))
    return len(by_option) > 1 and all(len(values) == 1 for values in by_option.values())


def _short(key: str, keys: Sequence[str]) -> str:
    if key.endswith(".name"):
        return key.removesuffix(".name")
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _hashable(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _mark(ranking: Ranking) -> None:
    ranked = [run for run in ranking.runs if run.number(ranking.metric) is not None]
    if not ranked:
        return
    best, others = ranked[0], ranked[1:]
    ranking.marks[best.name] = "best"
    if ranking.metric not in METRICS_BY_NAME:
        for run in others:
            if run.number(ranking.metric) == best.number(ranking.metric):
                ranking.marks[run.name] = "tied"
        return
    _mark_by_test(ranking, best, others)


def _mark_by_test(ranking: Ranking, best: ComparedRun, others: Sequence[ComparedRun]) -> None:
    own = _scores_after(best)
    raw: dict[str, float] = {}
    by_overlap = []
    for run in others:
        theirs = _scores_after(run)
        if own is None or theirs is None:
            by_overlap.append(run)
            continue
        try:
            found = compare_runs(
                own, theirs, bootstrap_samples=BOOTSTRAP_SAMPLES, definitions=(METRICS_BY_NAME[ranking.metric],)
            )
        except EvaluationError:
            ranking.marks[run.name] = "other data"
            continue
        p = found.metrics[ranking.metric].p
        if p is not None:
            raw[run.name] = p
    ranking.p = holm(raw)
    for name, p in ranking.p.items():
        ranking.marks[name] = "tied" if p >= SIGNIFICANT else ""
    for run in by_overlap:
        mine, theirs_score = best.scores[ranking.metric], run.scores[ranking.metric]
        if mine.low is not None and theirs_score.high is not None and theirs_score.high >= mine.low:
            ranking.marks[run.name] = "tied"
    if ranking.p:
        ranking.notes.append(
            f"tied: a paired test on {ranking.metric} over the held-out conversations finds no difference to the best run "
            f"(5 %, Holm's correction over {len(ranking.p)} comparisons)"
        )
    if by_overlap:
        ranking.notes.append(
            f"{len(by_overlap)} run(s) without predictions: tied where the 95 % intervals overlap, a weaker test"
        )
    if "other data" in ranking.marks.values():
        ranking.notes.append(
            "other data: these runs were evaluated on other held-out conversations, so the values do not compare"
        )
    if 0 < (fewest := min(run.scores[ranking.metric].conversations for run in [best, *others])) < INDICATIVE_BELOW:
        ranking.notes.append(f"{fewest} conversations: the 95 % intervals are indicative")


def _scores_after(run: ComparedRun) -> list[StepScore] | None:
    """Return the scored steps of the evaluation after training; None where there are none."""
    try:
        return saved_scores(run.folder / "predictions" / f"{ANSWERS}.jsonl") or None
    except EvaluationError:
        return None
