"""Two runs on one exam: what differs, whether the difference is real at this size, and what would show it.

Both are scored anew from their raw answers, by the same code, unless a file holds scores only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.errors import EvaluationError, RunError
from agentft.evaluation.definitions import HEADLINE
from agentft.evaluation.metrics import INDICATIVE_BELOW, score_records
from agentft.evaluation.scoring import StepScore
from agentft.evaluation.statistics import MetricComparison, RunComparison, compare_runs
from agentft.runs import RunFolder
from agentft.score import read_records

if TYPE_CHECKING:
    from rich.table import Table

ANSWERS = "after"
"""Which answers of a run folder are compared."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two files of predictions and what can be said about them."""

    a: Path
    b: Path
    found: RunComparison

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; never holds NaN."""
        return {"a": str(self.a), "b": str(self.b), **self.found.to_json(), "words": list(self.words())}

    def words(self) -> tuple[str, ...]:
        """What to conclude, for people who read no tables."""
        found = self.found
        discordant = found.mcnemar_only_a + found.mcnemar_only_b
        cross = (
            f"cross-check by McNemar's test on action steps exact in one run alone: {found.mcnemar_only_a} in A, "
            f"{found.mcnemar_only_b} in B, p {_p(found.mcnemar_p)} (it takes the steps of a conversation as independent)"
            if discordant
            else "cross-check by McNemar's test: the same action steps are exact in A and in B"
        )
        few = found.conversations < INDICATIVE_BELOW
        size = (
            (f"{found.conversations} conversations: below {INDICATIVE_BELOW} all intervals are indicative",)
            if few
            else ()
        )
        return (found.verdict, *found.words, cross, *size)


def names_one_exam(path: Path) -> bool:
    """Whether `path` is a file of predictions or a run folder that holds one."""
    return path.is_file() or (path / "predictions").is_dir()


def compare_pair(a: Path, b: Path, answers: str = ANSWERS, *, bootstrap_samples: int = 10_000, seed: int = 0) -> Pair:
    """Compare B with the baseline A; each a run folder or a file of predictions.

    Raises:
        EvaluationError: they are not answers to the same exam, or a file cannot be read.
        RunError: a run holds no such answers.
    """
    file_a, file_b = predictions_file(a, answers), predictions_file(b, answers)
    mode_a, mode_b = _mode(file_a), _mode(file_b)
    if mode_a != mode_b:
        raise EvaluationError(f"not the same evaluation: A was measured by {mode_a}, B by {mode_b}")
    return Pair(
        file_a,
        file_b,
        compare_runs(read_scores(file_a), read_scores(file_b), bootstrap_samples=bootstrap_samples, seed=seed),
    )


def predictions_file(path: Path, answers: str = ANSWERS) -> Path:
    """Return the file of predictions that `path` names or holds."""
    if path.is_file():
        return path
    file = RunFolder(path).predictions(answers)
    if not file.is_file():
        there = sorted(each.stem for each in file.parent.glob("*.jsonl") if ".partial" not in each.name)
        raise RunError(
            f"{file}: not there; this run holds {', '.join(there) or 'no predictions'}"
            + ("; choose with --answers" if there else "")
        )
    return file


def read_scores(file: Path) -> list[StepScore]:
    """Return the scored steps of a file of predictions."""
    first = _first_row(file)
    if "reference" in first or "scores" not in first:
        return score_records(read_records(file))
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return [StepScore.from_json(json.loads(line)["scores"]) for line in lines if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{file}: scores cannot be read: {type(error).__name__}: {error}") from None


def pair_table(pair: Pair) -> Table:
    """Return the headline metrics side by side."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"B against A on {pair.found.conversations} conversations",
        caption="difference in points with its paired 95 % interval by conversations; p: sign flips; Holm over these metrics",
    )
    for name in ("metric", "A", "B", "B - A", "95 % interval", "p", "p (Holm)", "real?"):
        table.add_column(name, justify="left" if name in ("metric", "real?") else "right")
    for name in HEADLINE:
        table.add_row(*_row(pair.found.metrics[name]))
    return table


def _row(metric: MetricComparison) -> tuple[str, ...]:
    interval = "–"
    if metric.low is not None and metric.high is not None:
        interval = f"{100 * metric.low:+.1f} to {100 * metric.high:+.1f}"
    verdict = {True: "yes", False: "not shown", None: "–"}[metric.real]
    difference = "–" if metric.difference is None else f"{100 * metric.difference:+.1f}"
    values = (_percent(metric.value_a), _percent(metric.value_b))
    return (metric.name, *values, difference, interval, _p(metric.p), _p(metric.p_holm), verdict)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _mode(file: Path) -> str:
    return str(_first_row(file).get("mode", "teacher_forced"))


def _first_row(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as lines:
            row = json.loads(next((line for line in lines if line.strip()), "{}"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file}:1: cannot be read: {error}") from None
    return row if isinstance(row, dict) else {}
