"""Starts trainings that are going to be broken, and compares what they leave with an undisturbed run, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentft.tracking import read_metrics
from agentft.training.checkpoint import find_damage, list_checkpoints

HERE = Path(__file__).resolve().parent
STEPS = 18
SAVE_STEPS = 3


def seeds(sample: int, full: int, start: int = 0) -> list:
    """Seeds of the trials of an experiment: the first `sample` run with every test, all `full` in `make faults`."""
    return [
        pytest.param(start + i, id=f"seed{start + i}", marks=() if i < sample else pytest.mark.faults)
        for i in range(full)
    ]


class Zygote:
    """See zygote.py: one child at a time."""

    def __init__(self, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "WANDB_MODE": "disabled"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | fixed | dict(environment or {}),
            cwd=cwd,
            text=True,
        )
        assert self._line() == "ready"

    def start(self, run: Path, **request: object) -> int:
        """Fork a training into `run` and return its process id."""
        run.parent.mkdir(parents=True, exist_ok=True)
        request = {"run_dir": str(run), "log": str(log_of(run)), **request}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._line())["pid"]

    def wait(self) -> int:
        """Return the exit code of the child, negative for a signal."""
        return json.loads(self._line())["status"]

    def run(self, run: Path, **request: object) -> int:
        """Fork a training and wait for its end."""
        self.start(run, **request)
        return self.wait()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks trainings has ended: run tests/faults/zygote.py by hand")
        return line.rstrip("\n")


def log_of(run: Path) -> Path:
    """What a run's processes printed."""
    return run.with_name(f"{run.name}.log")


@dataclass(frozen=True)
class Result:
    """What a finished run computed, to the last bit."""

    losses: list[tuple[int, str]]
    evaluations: list[tuple[int, str]]
    digests: dict[str, str]


def result_of(run: Path) -> Result:
    """Read losses as hexadecimal floats, and digests of final weights and optimiser."""
    rows = read_metrics(run / "metrics.jsonl")
    last = list_checkpoints(run / "checkpoints")[-1]
    files = [*sorted(last.glob("*.safetensors")), *sorted((run / "final").glob("*.safetensors"))]
    return Result(
        losses=[(row["step"], float(row["train/loss"]).hex()) for row in rows if "train/loss" in row],
        evaluations=[(row["step"], float(row["eval/loss"]).hex()) for row in rows if "eval/loss" in row],
        digests={file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    )


def steps_logged(run: Path) -> int:
    """Lines with a loss so far."""
    try:
        return (run / "metrics.jsonl").read_text().count('"train/loss"')
    except OSError:
        return 0


def wait_until(condition: Callable[[], bool], pid: int, seconds: float = 900) -> bool:
    """Wait for something to happen to a running child; False when it ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not _is_running(pid):
            return False
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)
    return True


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_at_random(zygote: Zygote, run: Path, draw: random.Random, **request: object) -> bool:
    """Start or resume `run` and SIGKILL it at a random moment; False when it was too late and the run is finished."""
    lines = steps_logged(run)
    pid = zygote.start(run, **request)
    ahead = draw.randrange(0, max(2, STEPS - lines))
    wait_until(lambda: steps_logged(run) >= lines + ahead, pid)
    time.sleep(draw.uniform(0.0, 0.12) if ahead else draw.uniform(0.0, 0.6))
    kill(pid)
    return zygote.wait() == -signal.SIGKILL


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a child that may have ended in the meantime."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def unfinished_saves(run: Path) -> list[Path]:
    """Temporary folders of a save that was cut off."""
    return sorted((run / "checkpoints").glob(".step-*"))


def whole_checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints whose digests hold."""
    return [int(p.name.removeprefix("step-")) for p in list_checkpoints(run / "checkpoints") if find_damage(p) is None]


def finish(zygote: Zygote, run: Path, **request: object) -> Result:
    """Resume a broken run to its end."""
    code = zygote.run(run, **request)
    assert code == 0, log_of(run).read_text()[-3000:]
    return result_of(run)


def assert_equal(found: Result, golden: Result) -> None:
    """Every loss, every evaluation and every digest are those of the undisturbed run."""
    different = [(a, b) for a, b in zip(found.losses, golden.losses, strict=False) if a != b]
    assert not different, f"first divergence (found, golden): {different[0]}"
    assert found.losses == golden.losses, "steps are missing or doubled"
    assert found.evaluations == golden.evaluations
    assert found.digests == golden.digests


def diverges(found: Result, golden: Result) -> bool:
    """Whether any loss differs."""
    return found.losses != golden.losses


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]
