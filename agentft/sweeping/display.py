"""Show the progress of a sweep: a live table on a terminal, a line per event elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from agentft.progress import console
from agentft.runs import read_json
from agentft.sweeping.jobs import Job
from agentft.sweeping.runner import Slot

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

_LINE_SECONDS = 60.0
_COLOURS = {
    "running": "cyan",
    "finished": "green",
    "failed": "red",
    "paused": "yellow",
    "stopped": "yellow",
    "waiting": "dim",
}
_ORDER = ("running", "failed", "stopped", "waiting", "paused", "finished")


class Display:
    """Shows jobs while they run; `say` prints a line at any time."""

    def __init__(self, sweep: Path, jobs: Sequence[Job], slots: Sequence[Slot]) -> None:
        self.console: Console = console()
        self._sweep = sweep
        self._jobs = jobs
        self._slots = slots
        self._live: Live | None = None
        self._shown = time.monotonic()
        self._before = sum(job.state == "finished" for job in jobs)
        self._paces = Paces()

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        done = f", {self._before} finished before" if self._before else ""
        slot = self._slots[0]
        where = f"{len(slot.gpus)} GPU(s), " if slot.gpus else ""
        self.say(
            f"sweep of {len(self._jobs)} jobs{done}; {len(self._slots)} at a time, each with {where}{slot.threads} thread(s)"
        )
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, transient=True, get_renderable=self._table, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def seen(self, job: Job) -> None:
        """Print that a job started or ended, where there is no live table."""
        if self._live is not None:
            return
        done = sum(each.is_done or each.state in ("failed", "stopped") for each in self._jobs)
        match job.state:
            case "running":
                attempt = f" (attempt {job.attempts})" if job.attempts > 1 else ""
                words = f"started{attempt}: {' '.join(job.swept) or 'no overrides'}"
            case "finished" | "paused":
                objective = job.objective
                words = f"{job.state} after {_duration(job.seconds)}" + (
                    "" if objective is None else f", objective {objective:.4f}"
                )
            case _:
                words = f"{job.outcome} (after {_duration(job.seconds)})"
        self.say(f"[{done}/{len(self._jobs)}] {job.name} {words}")

    def tick(self) -> None:
        """Print a line about the running jobs once a minute, where there is no live table; called often."""
        if self._live is not None or time.monotonic() - self._shown < _LINE_SECONDS:
            return
        self._shown = time.monotonic()
        for job in self._jobs:
            if job.state == "running":
                how_far = {
                    name: value for name, value in zip(_COLUMNS, _progress(job, self._paces), strict=True) if value
                }
                self.say(f"  {job.name}: " + ", ".join(f"{name} {value}" for name, value in how_far.items()))

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        counts: Counter[str] = Counter(job.state for job in self._jobs)
        title = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
        table = Table(title=f"{self._sweep.name}: {title}{self._left()}", title_justify="left")
        for name in ("job", "overrides", "state", *_COLUMNS):
            table.add_column(name, justify="left" if name in ("job", "overrides", "state") else "right")
        room = max(4, self.console.height - 6)
        shown = list(self._jobs)
        if len(shown) > room:
            shown = sorted(shown, key=lambda job: (_ORDER.index(job.state), job.number))[: room - 1]
        for job in shown:
            how_far = _progress(job, self._paces) if job.is_done or job.state == "running" else [""] * len(_COLUMNS)
            swept = " ".join(map(short_override, job.swept))
            table.add_row(str(job.number), Text(swept), Text(job.outcome[:70], _COLOURS[job.state]), *how_far)
        if len(shown) < len(self._jobs):
            table.add_row("…", Text(f"{len(self._jobs) - len(shown)} more"), "", *[""] * len(_COLUMNS))
        return table

    def _left(self) -> str:
        """Return the time to the end, from the jobs that have finished in this launch."""
        done = [job.seconds for job in self._jobs if job.state == "finished" and job.seconds]
        todo = sum(job.state in ("waiting", "running") for job in self._jobs)
        if not done or not todo:
            return ""
        return f"; about {_duration(sum(done) / len(done) * todo / min(todo, len(self._slots)))} left"


def short_override(override: str) -> str:
    """Return `training.learning_rate=0.001` as `learning_rate=0.001`."""
    key, equals, value = override.partition("=")
    return f"{key.rpartition('.')[2]}{equals}{value}"


_COLUMNS = ("step", "loss", "held-out", "arg_f1", "time")


def _progress(job: Job, paces: Paces) -> list[str]:
    """Return step, losses, metric and time left, from the run's own files."""
    status = job.status
    step, steps = status.get("step"), status.get("steps")
    where = f"{step}/{steps}" if step is not None and steps else ""
    # While it trains, of the few held-out conversations that are answered at an evaluation.
    metric = f"~{during}" if (during := _number(status.get("eval_arg_f1"))) else ""
    if job.is_done:
        try:
            metric = _number(read_json(job.folder / "summary.json").get("after", {}).get("arg_f1"))
        except Exception:
            metric = ""
    return [
        where,
        _number(status.get("train_loss")),
        _number(status.get("eval_loss")),
        metric,
        paces.left(job, status) if job.state == "running" else _duration(job.seconds_in_all or job.seconds),
    ]


class Paces:
    """Estimates the time left of running jobs from their own times: a pause of the machine does not count as work."""

    def __init__(self) -> None:
        self._begun: dict[tuple[int, int], tuple[datetime, int]] = {}
        """Number and attempt of a job -> a time and the step it stood at."""

    def left(self, job: Job, status: Mapping[str, Any]) -> str:
        """Return the time to its last step; empty until two steps are known. A later attempt begins at a checkpoint."""
        step, steps, started = status.get("step"), status.get("steps"), status.get("started")
        updated = status.get("updated")
        if not step or not steps or not isinstance(started, str) or not isinstance(updated, str):
            return ""
        now = datetime.fromisoformat(updated)
        first = (datetime.fromisoformat(started), 0) if job.attempts < 2 else (now, step)
        since, before = self._begun.setdefault((job.number, job.attempts), first)
        if step == before:
            return ""
        return f"{_duration((now - since).total_seconds() / (step - before) * (steps - step))} left"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min" if minutes < 100 and rest == 0 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
