"""Read run folders for a comparison: settings, state and results of every run folder below the given ones.

Reads files only, of finished and unfinished runs alike, and needs neither torch nor Hydra.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from agentft.errors import EvaluationError, RunError
from agentft.evaluation.steps import StepScore
from agentft.recipes.config import saved_settings
from agentft.runs import RunFolder, read_json
from agentft.tracking import read_metrics

AFTER = "after"
"""The evaluation that runs are compared by, after training: its predictions are `predictions/after.jsonl`."""

_MARKS_OF_A_RUN = ("config.yaml", "status.json", "job.json")
_DEEPEST = 3
"""`runs/` holds sweeps, and those their jobs."""


@dataclass(frozen=True, slots=True)
class Score:
    """A metric with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None
    conversations: int = 0


@dataclass(kw_only=True)
class ComparedRun:
    """One run folder, read."""

    folder: Path
    name: str
    state: str
    """waiting, running, finished, failed, stopped or died (its process is gone without a word)."""
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Every setting by its dotted name."""
    swept: frozenset[str] = frozenset()
    scores: dict[str, Score] = field(default_factory=dict)
    """Of the evaluation after training."""
    errors: dict[str, int] = field(default_factory=dict)
    """Error kind -> steps that show it."""
    loss: float | None = None
    """Held-out loss, the latest."""
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    """Of all its attempts, by the launcher's clock; without one, by its own."""
    peak_memory_bytes: int | None = None
    train_examples: int | None = None
    """Conversations that were trained on, after the sample was taken."""

    def number(self, name: str) -> float | None:
        """Return a metric, `loss`, or a cost, by name."""
        if name in self.scores:
            return self.scores[name].value
        value = getattr(self, name, None) if name in NUMBERS else None
        return None if value is None else float(value)

    def curve(self) -> list[dict[str, float]]:
        """Return the lines of `metrics.jsonl`, their finite numbers only."""
        with contextlib.suppress(RunError):
            rows = read_metrics(self.folder / "metrics.jsonl")
            return [{key: float(value) for key, value in row.items() if _is_number(value)} for row in rows]
        return []


NUMBERS = ("loss", "seconds", "tokens", "peak_memory_bytes", "step")
"""What a run can be sorted by besides its metrics."""


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Return all runs in `paths`, each a run folder, a sweep folder or a folder of these.

    Raises:
        RunError: a path is not there, or no run is found.
    """
    folders: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path}: no such folder; expected a run folder or a folder of runs")
        folders += [folder for folder in _run_folders(path, _DEEPEST) if folder not in folders]
    if not folders:
        raise RunError(f"{', '.join(map(str, paths))}: no run there; expected folders that train.py made")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.parent.name}/{run.name}"
    return runs


def _run_folders(path: Path, depth: int) -> Iterable[Path]:
    if any((path / name).is_file() for name in _MARKS_OF_A_RUN):
        yield path.absolute()
    elif depth > 0:
        for child in sorted(path.iterdir(), key=_natural):
            if child.is_dir() and not child.name.startswith("."):
                yield from _run_folders(child, depth - 1)


def _natural(path: Path) -> tuple[int, str]:
    """Return a key that sorts `10_rank-4` after `9_rank-64`."""
    number = path.name.partition("_")[0]
    return (int(number) if number.isascii() and number.isdigit() else -1, path.name)


def read_run(folder: Path) -> ComparedRun:
    """Read one run folder; whatever is not there yet stays empty."""
    status, job = _read(folder / "status.json"), _read(folder / "job.json")
    summary, after = _read(folder / "summary.json"), _read(folder / "metrics" / "after.json")
    state, reason = _state(status, job)
    train = _read(folder / "data" / "manifest.json").get("train")
    seconds = None if job.get("seconds") is None else _number(job.get("seconds_in_all"), job["seconds"])
    if seconds is None:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            started, updated = (datetime.fromisoformat(status[name]) for name in ("started", "updated"))
            seconds = (updated - started).total_seconds()
    return ComparedRun(
        folder=folder,
        name=folder.name,
        state=state,
        reason=reason,
        settings=_settings(folder, job),
        swept=frozenset(str(text).lstrip("+~").partition("=")[0] for text in job.get("swept") or ()),
        scores={
            str(name): Score(
                float(metric["value"]),
                _number(metric.get("low")),
                _number(metric.get("high")),
                int(metric.get("conversations") or 0),
            )
            for name, metric in (after.get("metrics") or {}).items()
            if _is_number(metric.get("value"))
        },
        errors={str(kind): int(count) for kind, count in (after.get("errors") or {}).items()},
        loss=_number(status.get("eval_loss"), summary.get("best_loss")),
        step=_whole(summary.get("steps"), status.get("step")),
        steps=_whole(status.get("steps"), summary.get("steps")),
        tokens=_whole(summary.get("tokens"), status.get("train_tokens")),
        seconds=seconds,
        peak_memory_bytes=_whole(summary.get("peak_memory_bytes")),
        train_examples=_whole(train.get("conversations")) if isinstance(train, dict) else None,
    )


def _state(status: Mapping[str, Any], job: Mapping[str, Any]) -> tuple[str, str]:
    """Return state and reason; the launcher speaks for a job that could not any more."""
    own, reason = str(status.get("state") or "waiting"), str(status.get("error") or "")
    record = status if own == "finished" or not job else job
    state = str(record.get("state") or own)
    if state == "running" and _is_gone(record):
        return "died", "its process is gone"
    if record is job and state in ("failed", "stopped"):
        return state, str(job.get("reason") or reason)
    return state, "" if record is job and state == "waiting" else reason


def _is_gone(record: Mapping[str, Any]) -> bool:
    here = record.get("host") == socket.gethostname()
    return here and isinstance(record.get("pid"), int) and not psutil.pid_exists(record["pid"])


def _settings(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    try:
        tree = saved_settings((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        # Not started yet, or failed before it knew itself: the launcher's word.
        tree = dict(job.get("settings") or {})
        if "threads" in tree:
            tree["threads"] = job.get("threads")
    return dict(_flat(tree, ""))


def _flat(value: Any, key: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(*values: Any) -> float | None:
    return next((float(value) for value in values if _is_number(value)), None)


def _whole(*values: Any) -> int | None:
    return next((int(value) for value in values if _is_number(value)), None)


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(RunError):
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


def predictions_file(path: Path, name: str = AFTER) -> Path:
    """Return the file of predictions that `path` names or holds.

    Raises:
        RunError: the run holds no such predictions.
    """
    if path.is_file():
        return path
    file = RunFolder(path).predictions(name)
    if not file.is_file():
        there = sorted(each.stem for each in file.parent.glob("*.jsonl") if ".partial" not in each.name)
        raise RunError(
            f"{file}: not there; this run holds {', '.join(there) or 'no predictions'}"
            + ("; choose with --answers" if there else "")
        )
    return file


def saved_scores(file: Path) -> list[StepScore]:
    """Return the scores that a file of predictions holds.

    Raises:
        EvaluationError: they cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return [StepScore.from_json(json.loads(line)["scores"]) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{file}: scores cannot be read: {type(error).__name__}: {error}") from None
