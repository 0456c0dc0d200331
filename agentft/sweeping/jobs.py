"""Record each job of a sweep in its `job.json`, and show how far all of them are.

What a run cannot know (that it was killed, that it never started) is there, beside `status.json`, which the run writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from agentft.errors import RunError
from agentft.progress import console, duration
from agentft.recipes.config import deciding
from agentft.runs import RunFolder, read_json
from agentft.secrets import redact_text

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

JobState = Literal["running", "failed", "stopped", "waiting", "paused", "finished"]
"""`paused`: it ended well at a share of its steps and was not sent further; see `agentft.sweeping.halving`."""

FILE = "job.json"
LOG = "job.log"


@dataclass(kw_only=True)
class Job:
    """One job. The fields are those of `job.json`, but for `folder`."""

    folder: Path
    number: int
    config_hash: str
    """Of the resolved settings: jobs that compute the same share it."""
    overrides: list[str]
    """Settings given on the command line or swept, as Hydra writes them."""
    swept: list[str]
    """Those of them in which the jobs of the sweep differ."""
    settings: dict[str, Any]
    """Every setting, resolved."""
    threads: int
    """CPU threads it is given."""
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    """What the launcher adds to the environment."""
    state: JobState = "waiting"
    attempts: int = 0
    exit_code: int | None = None
    signal: str | None = None
    """Name of the signal that ended it."""
    reason: str | None = None
    """Why it is not finished."""
    started: str | None = None
    ended: str | None = None
    seconds: float | None = None
    """Of the last attempt."""
    seconds_in_all: float = 0.0
    """Of all attempts: each resumes from the checkpoint of the one before."""
    pid: int | None = None
    rungs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Share of its steps -> its results there, in successive halving."""

    @property
    def is_done(self) -> bool:
        """Return whether it went as far as it was sent."""
        return self.state in ("finished", "paused")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> dict[str, Any]:
        """Return the run's own `status.json`; empty before there is one."""
        return read_or_empty(self.folder / "status.json")

    @property
    def summary(self) -> dict[str, Any]:
        """Return the run's own `summary.json`; empty before there is one."""
        return read_or_empty(self.folder / "summary.json")

    @property
    def outcome(self) -> str:
        """Return state and reason in a few words."""
        if self.reason is None or self.state == "stopped":
            return self.reason or self.state
        return f"{self.state}: {self.reason}"

    @property
    def objective(self) -> float | None:
        """Return the number that a sweeper optimises."""
        value = self.status.get("objective")
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def command_line(self) -> str:
        """Return the command for a shell, with its environment, that runs this job alone."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])

    def write(self) -> None:
        """Replace `job.json`."""
        record = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "folder"}
        RunFolder(self.folder).write_json(
            Path(FILE), {"name": self.name, "shell": self.command_line, "host": socket.gethostname(), **record}
        )

    def take_over(self, record: Mapping[str, Any]) -> None:
        """Resume from the `job.json` of an earlier launch."""
        kept = ("number", "state", "attempts", "exit_code", "signal", "reason", "rungs")
        for name in (*kept, "started", "ended", "seconds", "seconds_in_all"):
            setattr(self, name, record.get(name, getattr(self, name)))
        if self.attempts:
            # A checkpoint is resumed only with the same number of threads, so a job keeps the number it began with.
            self.threads = record.get("threads") or self.threads
        if self.state != "finished" and self.status.get("state") == "finished":
            self.state, self.reason = "finished", None  # by the printed command, by hand
        if self.state != "finished":
            self.state = "waiting"


def config_hash(settings: Mapping[str, Any]) -> str:
    """Return 16 hex digits that two jobs share if they compute the same."""
    text = json.dumps(deciding(settings), sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def earlier_jobs(sweep: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the jobs that earlier launches put into this sweep folder: config hash -> folder and `job.json`."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted([*sweep.glob(f"*/{FILE}"), *sweep.glob(f"*/*/{FILE}")]):
        record = read_or_empty(path)
        if isinstance(key := record.get("config_hash"), str):
            found.setdefault(key, (path.parent, record))
    return found


def last_error(log: Path) -> str:
    """Return why a job ended, from the last lines of its output, for a job without a status."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    words = [line.strip() for line in lines if re.search(r"\w", line) and not line.startswith("$ ")]
    errors = [line for line in words[-20:] if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return redact_text((errors or words or [""])[-1])[:300]


def varying(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return those of each job's overrides that not all jobs have."""
    everywhere = set(overrides[0]).intersection(*overrides[1:]) if len(overrides) > 1 else set()
    return [[override for override in job if override not in everywhere] for job in overrides]


def read_or_empty(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where the file is missing, damaged or holds something else."""
    try:
        value = read_json(path)
    except RunError:
        return {}
    return value if isinstance(value, dict) else {}


# --- Display ---

_LINE_SECONDS = 60.0
_COLOURS: dict[JobState, str] = {
    "running": "cyan",
    "failed": "red",
    "stopped": "yellow",
    "waiting": "dim",
    "paused": "yellow",
    "finished": "green",
}
"""In the order of the live table, which the terminal cuts off at its end."""
_COLUMNS = ("step", "loss", "held-out", "arg_f1", "time")


class Display:
    """Shows jobs while they run: a live table on a terminal, a line per event elsewhere; `say` prints at any time."""

    def __init__(self, sweep: Path, jobs: Sequence[Job], slots: int) -> None:
        self.console = console()
        self._sweep, self._jobs, self._slots = sweep, jobs, slots
        self._live: Live | None = None
        self._shown = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, transient=True, get_renderable=self._table, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def seen(self, job: Job) -> None:
        """Print that a job started or ended, where there is no live table."""
        if self._live is not None:
            return
        took = duration(job.seconds)
        match job.state:
            case "running":
                attempt = f" (attempt {job.attempts})" if job.attempts > 1 else ""
                words = f"started{attempt}: {' '.join(job.swept) or 'no overrides'}"
            case "finished" | "paused":
                objective = "" if job.objective is None else f", objective {job.objective:.4f}"
                words = f"{job.state} after {took}{objective}"
            case _:
                words = f"{job.outcome} (after {took})"
        done = sum(each.state not in ("running", "waiting") for each in self._jobs)
        self.say(f"[{done}/{len(self._jobs)}] {job.name} {words}")

    def tick(self) -> None:
        """Print a line about each running job once a minute, where there is no live table; called often."""
        if self._live is not None or time.monotonic() - self._shown < _LINE_SECONDS:
            return
        self._shown = time.monotonic()
        for job in self._jobs:
            if job.state == "running":
                cells = zip(_COLUMNS, _progress(job), strict=True)
                self.say(f"  {job.name}: " + ", ".join(f"{name} {value}" for name, value in cells if value))

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        counts: Counter[str] = Counter(job.state for job in self._jobs)
        title = ", ".join(f"{counts[state]} {state}" for state in _COLOURS if counts[state])
        table = Table(title=f"{self._sweep.name}: {title}{self._left()}", title_justify="left")
        for name in ("job", "overrides", "state", *_COLUMNS):
            table.add_column(name, justify="right" if name in _COLUMNS else "left")
        for job in sorted(self._jobs, key=lambda job: (list(_COLOURS).index(job.state), job.number)):
            swept = " ".join(map(short_override, job.swept))
            state = Text(job.outcome[:70], _COLOURS[job.state])
            table.add_row(str(job.number), Text(swept), state, *_progress(job))
        return table

    def _left(self) -> str:
        """Return the time to the end, from the jobs that have finished in this launch."""
        done = [job.seconds for job in self._jobs if job.state == "finished" and job.seconds]
        todo = sum(job.state in ("waiting", "running") for job in self._jobs)
        if not done or not todo:
            return ""
        return f"; about {duration(sum(done) / len(done) * todo / min(todo, self._slots))} left"


def short_override(override: str) -> str:
    """Return `training.learning_rate=0.001` as `learning_rate=0.001`."""
    key, equals, value = override.partition("=")
    return f"{key.rpartition('.')[2]}{equals}{value}"


def _progress(job: Job) -> list[str]:
    """Return step, losses, metric and time, from the run's own files."""
    if not (job.is_done or job.state == "running"):
        return [""] * len(_COLUMNS)
    status = job.status
    step, steps = status.get("step"), status.get("steps")
    if job.is_done:
        after = job.summary.get("after")
        metric = _number(after.get("arg_f1")) if isinstance(after, dict) else ""
        seconds = job.seconds_in_all or job.seconds
    else:
        # Of the few held-out conversations that are answered at an evaluation.
        metric = f"~{during}" if (during := _number(status.get("eval_arg_f1"))) else ""
        seconds = (datetime.now(UTC) - datetime.fromisoformat(job.started)).total_seconds() if job.started else None
    return [
        f"{step}/{steps}" if step is not None and steps else "",
        _number(status.get("train_loss")),
        _number(status.get("eval_loss")),
        metric,
        duration(seconds),
    ]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""
