"""Rank runs: say which settings differ, which run is best, and which cannot be told from it; write that as a table.

"Tied" means that a paired test on the same held-out conversations finds no difference to the best run at 5 %, with
Holm's correction over all runs of the table. A run without predictions is not tested.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentft.comparison.pairs import SIGNIFICANT, compare_runs, holm
from agentft.comparison.runs import AFTER, NUMBERS, ComparedRun, saved_scores
from agentft.errors import ConfigError, EvaluationError
from agentft.evaluation.metrics import HEADLINE, INDICATIVE_BELOW, METRICS_BY_NAME
from agentft.evaluation.steps import StepScore
from agentft.progress import duration
from agentft.recipes.config import AFFECT_NOTHING

if TYPE_CHECKING:
    from rich.table import Table

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
    """Return the settings in which runs differ with their short names.

    Left out is what nobody set and another one decides: the choice of its group, or a swept setting beside it, as `rank`
    decides `alpha`.
    """
    known = [run for run in runs if run.settings]
    swept = frozenset().union(*(run.swept for run in known))
    keys = dict.fromkeys(key for run in known for key in run.settings if key not in AFFECT_NOTHING)
    texts = {key: [json.dumps(run.settings.get(key), sort_keys=True, default=str) for run in known] for key in keys}
    differing = [key for key in keys if len(set(texts[key])) > 1]
    swept_by_all = [key for key in differing if all(key in run.swept for run in known)]

    def follows(key: str) -> bool:
        group, beside = key.partition(".")[0], key.rpartition(".")[0]
        choice = [f"{group}.name"] if group in _GROUPS and key != f"{group}.name" else []
        deciding = [other for other in swept_by_all if beside and other.rpartition(".")[0] == beside]
        return any(
            1 < len(set(texts.get(other, ()))) == len(set(zip(texts[other], texts[key], strict=True)))
            for other in (*choice, *deciding)
        )

    shown = [key for key in differing if key in swept or not follows(key)]
    last = Counter(key.rpartition(".")[2] for key in shown)
    short = {key: key.rpartition(".")[2] for key in shown}
    return {
        key: key.removesuffix(".name") if name == "name" else name if last[name] == 1 else key
        for key, name in short.items()
    }


def _mark(ranking: Ranking) -> None:
    metric = ranking.metric
    ranked = [run for run in ranking.runs if run.number(metric) is not None]
    if not ranked:
        return
    best, others = ranked[0], ranked[1:]
    ranking.marks[best.name] = "best"
    if metric in METRICS_BY_NAME:
        _mark_by_test(ranking, best, others)
    else:
        ranking.marks |= {run.name: "tied" for run in others if run.number(metric) == best.number(metric)}


def _mark_by_test(ranking: Ranking, best: ComparedRun, others: Sequence[ComparedRun]) -> None:
    metric, own = ranking.metric, _scores_after(best)
    raw: dict[str, float] = {}
    untested = 0
    for run in others:
        theirs = _scores_after(run)
        if own is None or theirs is None:
            untested += 1
            continue
        definitions = (METRICS_BY_NAME[metric],)
        try:
            found = compare_runs(own, theirs, bootstrap_samples=BOOTSTRAP_SAMPLES, definitions=definitions)
        except EvaluationError:
            ranking.marks[run.name] = "other data"
            continue
        if (p := found.metrics[metric].p) is not None:
            raw[run.name] = p
    ranking.p = holm(raw)
    ranking.marks |= {name: "tied" if p >= SIGNIFICANT else "" for name, p in ranking.p.items()}
    fewest = min(run.scores[metric].conversations for run in [best, *others])
    notes = {
        f"tied: a paired test on {metric} over the held-out conversations finds no difference to the best run "
        f"(5 %, Holm's correction over {len(ranking.p)} comparisons)": ranking.p,
        f"{untested} run(s) not tested: their predictions, or those of the best run, are missing": untested,
        "other data: these runs were evaluated on other held-out conversations, so the values do not compare": (
            "other data" in ranking.marks.values()
        ),
        f"{fewest} conversations: the 95 % intervals are indicative": 0 < fewest < INDICATIVE_BELOW,
    }
    ranking.notes += [note for note, applies in notes.items() if applies]


def _scores_after(run: ComparedRun) -> list[StepScore] | None:
    """Return the scored steps of the evaluation after training; None where there are none."""
    try:
        return saved_scores(run.folder / "predictions" / f"{AFTER}.jsonl") or None
    except EvaluationError:
        return None


def rich_table(ranking: Ranking, width: int = 160) -> Table:
    """Return the table for the terminal: percentages with their 95 % intervals, the best value of each column bold.

    On a narrow terminal fewer metrics are shown; the files have all.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = 6 if width >= 150 else 4 if width >= 120 else 2 if width >= 96 else 1
    wanted = sorted(ranking.metrics, key=lambda name: name != ranking.metric)[:shown]
    header, rows = table_cells(ranking, [name for name in ranking.metrics if name in wanted], short=True)
    caption = "\n".join(table_notes(ranking))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    words = {"", "run", "state", *ranking.differing.values()}
    for name in header:
        alignment: Literal["left", "right"] = "left" if name in words else "right"
        least = len(name) if name in ranking.differing.values() else None  # a setting's name is not broken
        table.add_column(name, justify=alignment, overflow="fold", no_wrap=name not in words, min_width=least)
    for row in rows:
        table.add_row(*(Text(str(cell), "bold" if cell.best else "") for cell in row))
    return table


def markdown(ranking: Ranking, title: str = "") -> str:
    """Return the same table as Markdown."""
    header, rows = table_cells(ranking, ranking.metrics)

    def line(cells: Sequence[Cell]) -> str:
        texts = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
        bold = [f"**{text}**" if cell.best else text for cell, text in zip(cells, texts, strict=True)]
        return f"| {' | '.join(bold)} |"

    lines = [f"# {title}", ""] if title else []
    lines += [line([Cell(name) for name in header]), "|" + "---|" * len(header), *map(line, rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in table_notes(ranking))]) + "\n"


def csv_text(ranking: Ranking) -> str:
    """Return every number in full, one row a run, best first."""
    metrics = list(dict.fromkeys([*ranking.metrics, *(name for run in ranking.runs for name in run.scores)]))
    costs = ("step", "tokens", "seconds", "peak_memory_bytes", "train_examples")
    bounds = [f"{name}{end}" for name in metrics for end in ("", "_low", "_high")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "state", "reason", "mark", "p", *ranking.differing, "loss", *bounds, *costs, "folder"])
    for run in ranking.runs:
        row: list[Any] = [run.name, run.state, run.reason, ranking.marks.get(run.name, ""), ranking.p.get(run.name)]
        row += [*(setting_text(run.settings.get(key)) for key in ranking.differing), run.loss]
        for name in metrics:
            score = run.scores.get(name)
            row += [None, None, None] if score is None else [score.value, score.low, score.high]
        here = Path.cwd()
        folder = run.folder.relative_to(here) if run.folder.is_relative_to(here) else run.folder
        writer.writerow([*row, *(getattr(run, cost) for cost in costs), folder])
    return out.getvalue()


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table."""

    text: str
    interval: str = ""
    sorted_by: float | None = None
    """What its column is sorted by; None: the text."""
    best: bool = False
    """It is the best of its column."""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".rstrip()


def table_cells(
    ranking: Ranking, metrics: Sequence[str], *, short: bool = False
) -> tuple[list[str], list[tuple[Cell, ...]]]:
    """Return header and rows."""
    runs = ranking.runs
    names = short_names(runs) if short else [run.name for run in runs]
    columns = [("", [Cell(ranking.marks.get(run.name, "")) for run in runs]), ("run", list(map(Cell, names)))]
    if not all(run.state == "finished" for run in runs):
        columns.append(("state", [Cell(_state(run)) for run in runs]))
    for key, name in ranking.differing.items():
        columns.append((name, [Cell(setting_text(run.settings.get(key))) for run in runs]))
    for name in metrics:
        columns.append((name, _marked([_score(run, name, 0 if short else 1) for run in runs], runs, name)))
    losses = [Cell("" if run.loss is None else f"{run.loss:.4f}") for run in runs]
    columns.append(("loss" if short else "held-out loss", _marked(losses, runs, "loss")))
    columns.append(("time", [Cell(duration(run.seconds), sorted_by=run.seconds) for run in runs]))
    sizes = [run.peak_memory_bytes for run in runs]
    if any(sizes) and not short:
        columns.append(("memory", [Cell("" if n is None else f"{n / 2**30:.2f} GiB", sorted_by=n) for n in sizes]))
    return [name for name, _ in columns], list(zip(*(cells for _, cells in columns), strict=True))


def _marked(cells: Sequence[Cell], runs: Sequence[ComparedRun], name: str) -> list[Cell]:
    """Return a column with its best cell marked, if there is something to be better than."""
    known = [(value, i) for i, run in enumerate(runs) if (value := run.number(name)) is not None]
    sign = 1 if name in LOWER_IS_BETTER else -1
    best = min(known, key=lambda item: (sign * item[0], item[1]))[1] if len(known) > 1 else None
    return [replace(cell, best=i == best) for i, cell in enumerate(cells)]


def table_notes(ranking: Ranking) -> list[str]:
    """Return what a reader must know to read the table."""
    notes = [f"in order of {ranking.metric}; metrics in percent with their 95 % intervals"] if ranking.metrics else []
    counts = Counter(run.state for run in ranking.runs)
    if counts["finished"] < len(ranking.runs):
        notes.append(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    return notes + ranking.notes


def _state(run: ComparedRun) -> str:
    if run.state in ("running", "paused") and run.step is not None and run.steps:
        return f"{run.state} {run.step}/{run.steps}"
    return run.state


def setting_text(value: Any) -> str:
    """Return a value as Hydra writes it."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case float():
            return f"{value:g}"
        case list():
            return "[" + ",".join(map(setting_text, value)) + "]"
        case _:
            return str(value)


def short_names(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the numbers of the jobs of one sweep, since their settings stand beside them; else names."""
    numbers = [run.name.partition("_")[0] for run in runs]
    return numbers if all(map(str.isdigit, numbers)) and len(set(numbers)) == len(runs) else [run.name for run in runs]


def _score(run: ComparedRun, name: str, digits: int) -> Cell:
    score = run.scores.get(name)
    if score is None:
        return Cell("")
    text = f"{100 * score.value:.1f}"
    if score.low is None or score.high is None:
        return Cell(text)
    return Cell(text, f"[{100 * score.low:.{digits}f}, {100 * score.high:.{digits}f}]")
