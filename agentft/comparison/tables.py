"""Write a ranking as a table: for the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentft.comparison.ranking import LOWER_IS_BETTER, Ranking
from agentft.comparison.runs import ComparedRun

if TYPE_CHECKING:
    from rich.table import Table


def rich_table(ranking: Ranking, width: int = 160) -> Table:
    """Return the table for the terminal: percentages with their 95 % intervals, the best value of each column bold.

    On a narrow terminal fewer metrics are shown; the files have all.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = 6 if width >= 150 else 4 if width >= 120 else 2 if width >= 96 else 1
    wanted = sorted(ranking.metrics, key=lambda name: (name != ranking.metric, ranking.metrics.index(name)))[:shown]
    header, rows = table_cells(ranking, [name for name in ranking.metrics if name in wanted], short=True)
    caption = "\n".join(table_notes(ranking))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    words = {"", "run", "state", *ranking.differing.values()}
    for name in header:
        alignment: Literal["left", "right"] = "left" if name in words else "right"
        least = len(name) if name in ranking.differing.values() else None  # a setting's name is not broken
        table.add_column(name, justify=alignment, overflow="fold", no_wrap=name not in words, min_width=least)
    for row in rows:
        table.add_row(*(Text(text, "bold" if is_best else "") for text, is_best in row))
    return table


def markdown(ranking: Ranking, title: str = "") -> str:
    """Return the same table as Markdown."""
    header, rows = table_cells(ranking, ranking.metrics)
    lines = [f"# {title}", ""] if title else []
    lines.append("| " + " | ".join(map(_escaped, header)) + " |")
    lines.append("|" + "---|" * len(header))
    for row in rows:
        cells = [f"**{_escaped(text)}**" if is_best and text else _escaped(text) for text, is_best in row]
        lines.append("| " + " | ".join(cells) + " |")
    notes = table_notes(ranking)
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def csv_text(ranking: Ranking) -> str:
    """Return every number in full, one row a run, best first."""
    metrics = list(dict.fromkeys([*ranking.metrics, *(name for run in ranking.runs for name in run.scores)]))
    header = ["run", "state", "reason", "mark", "p", *ranking.differing, "loss"]
    for name in metrics:
        header += [name, f"{name}_low", f"{name}_high"]
    costs = ("step", "tokens", "seconds", "peak_memory_bytes", "train_examples")
    header += [*costs, "folder"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for run in ranking.runs:
        row: list[Any] = [run.name, run.state, run.reason, ranking.marks.get(run.name, ""), ranking.p.get(run.name)]
        row += [setting_text(run.settings.get(key)) for key in ranking.differing]
        row.append(run.loss)
        for name in metrics:
            score = run.scores.get(name)
            row += [None, None, None] if score is None else [score.value, score.low, score.high]
        writer.writerow([*row, *(getattr(run, cost) for cost in costs), _readable(run.folder)])
    return out.getvalue()


def _readable(folder: Path) -> str:
    """Return a path relative to the working directory where it lies below it."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def table_cells(
    ranking: Ranking, metrics: Sequence[str], *, short: bool = False
) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Return header and rows; a cell is its text and whether it is the best of its column."""
    runs = ranking.runs
    all_finished = all(run.state == "finished" for run in runs)
    columns: list[tuple[str, list[str], int | None]] = [
        ("", [ranking.marks.get(run.name, "") for run in runs], None),
        ("run", short_names(runs) if short else [run.name for run in runs], None),
    ]
    if not all_finished:
        columns.append(("state", [_state(run) for run in runs], None))
    for key, name in ranking.differing.items():
        columns.append((name, [setting_text(run.settings.get(key)) for run in runs], None))
    for name in metrics:
        columns.append((name, [_score(run, name, 0 if short else 1) for run in runs], _best(ranking, name)))
    columns.append(
        ("loss" if short else "held-out loss", [_fixed(run.loss, 4) for run in runs], _best(ranking, "loss"))
    )
    columns.append(("time", [_duration(run.seconds) for run in runs], None))
    memory = [_memory(run.peak_memory_bytes) for run in runs]
    if any(memory) and not short:
        columns.append(("memory", memory, None))
    header = [name for name, _, _ in columns]
    rows = [[(cells[i], i == best) for _, cells, best in columns] for i in range(len(runs))]
    return header, rows


def _best(ranking: Ranking, name: str) -> int | None:
    values = [(run.number(name), i) for i, run in enumerate(ranking.runs)]
    known = [(value, i) for value, i in values if value is not None]
    if len(known) < 2:
        return None
    sign = 1 if name in LOWER_IS_BETTER else -1
    return min(known, key=lambda item: (sign * item[0], item[1]))[1]


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


def _score(run: ComparedRun, name: str, digits: int) -> str:
    score = run.scores.get(name)
    if score is None:
        return ""
    if score.low is None or score.high is None:
        return f"{100 * score.value:.1f}"
    return f"{100 * score.value:.1f} [{100 * score.low:.{digits}f}, {100 * score.high:.{digits}f}]"


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f} GiB"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
