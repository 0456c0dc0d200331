"""Describe one job of a sweep: its settings, its command, and the record of it in `job.json`.

`status.json` is written by the run itself. What a run cannot know (that it was killed, its exit code, that it never started)
is in `job.json` beside it, which only the launcher writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agentft.errors import RunError
from agentft.recipes.config import deciding
from agentft.runs import RunFolder, read_json
from agentft.secrets import redact_text

JobState = Literal["waiting", "running", "finished", "failed", "stopped", "paused"]
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
        """Return the name of its folder."""
        return self.folder.name

    @property
    def status(self) -> dict[str, Any]:
        """Return the run's own `status.json`; empty before there is one."""
        return _read_or_empty(self.folder / "status.json")

    @property
    def outcome(self) -> str:
        """Return state and reason in a few words."""
        if self.reason is None or self.state == "stopped":
            return self.reason or self.state
        return f"{self.state}: {self.reason}"

    @property
    def objective(self) -> float | None:
        """Return the number a sweeper optimises, from the run's status or summary."""
        for record in (self.status, _read_or_empty(self.folder / "summary.json")):
            value = record.get("objective")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
        return None

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
        times = ("started", "ended", "seconds", "seconds_in_all")
        for name in (*kept, *times):
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
        record = _read_or_empty(path)
        key = record.get("config_hash", record.get("identity"))  # as older versions call it
        if isinstance(key, str):
            found.setdefault(key, (path.parent, record))
    return found


def free_folder(wanted: Path, key: str) -> Path:
    """Return `wanted`, or a name beside it if another job has it already."""
    if not wanted.exists() or not any(wanted.iterdir()):
        return wanted
    return wanted.with_name(f"{wanted.name}_{key[:6]}")


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


def _read_or_empty(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except RunError:
        return {}
    return value if isinstance(value, dict) else {}
