"""A job of two ranks whose every process is signalled: saved by all, the conventional code, nothing left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentft.training.checkpoint import find_damage, list_checkpoints

ROOT = Path(__file__).resolve().parents[2]
JOB = [
    *("model=tiny", "model.shape.hidden=32", "model.shape.intermediate=64", "sft_type.dropout=0"),
    *("dataset.conversations=12", "dataset.heldout=3", "distributed=ddp", "distributed.nproc=2"),
    *(
        "training.gradient_accumulation_steps=2",
        "training.max_steps=100000",
        "training.logging_steps=1",
        "training.save_steps=0",
    ),
    *("evaluation.eval_steps=0", "evaluation.before=false", "tracking=disabled"),
]
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}
pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc"),
]


def trials(full: int) -> list:
    """The first trial runs with every test, all with `make test-slow`."""
    return [pytest.param(seed, marks=pytest.mark.slow if seed else ()) for seed in range(full)]


@pytest.fixture
def job(tmp_path: Path):
    """`start(settings)` starts the job, in a session of its own, with its output in `train_output`; what is left is killed."""
    jobs: list[subprocess.Popen] = []

    def start(*settings: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
        with (tmp_path / "train_output").open("w") as log:
            jobs.append(
                subprocess.Popen(
                    [sys.executable, "train.py", *JOB, f"run_dir={tmp_path / 'run'}", *settings],
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (environment or {}),
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # under `nohup` too
                )
            )
        return jobs[-1]

    yield start
    for each in jobs:
        for pid in processes_of(each.pid):
            os.kill(pid, signal.SIGKILL)


def processes_of(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log_path: Path) -> None:
    while not condition():
        assert process.poll() is None, log_path.read_text()[-3000:]
        time.sleep(0.02)


def steps_logged(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count('"train/loss"')
    except OSError:
        return 0


def assert_gone(process: subprocess.Popen) -> None:
    """The server that ranks are forked from sees the end of the last one, and ends, a moment later."""
    deadline = time.monotonic() + 10
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(process.pid)


def all_output(folder: Path) -> str:
    """Return the output of the agent and of rank 0, and what the other ranks left in files."""
    return "\n".join(path.read_text() for path in [folder / "train_output", *(folder / "run").rglob("*.log")])


@pytest.mark.parametrize("seed", trials(10))
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGINT))],
    ids=lambda number: number.name,
)
def test_a_signal_to_the_group_is_saved_by_all_ranks(job, tmp_path, number, seed):
    run, draw = tmp_path / "run", random.Random(f"{number} {seed}")
    process = job()
    lines = draw.randrange(1, 12)
    wait_until(lambda: steps_logged(run) >= lines, process, tmp_path / "train_output")
    time.sleep(draw.uniform(0, 0.3))
    before = steps_logged(run)
    os.killpg(process.pid, number)
    if seed % 3 == 2:  # as schedulers do
        time.sleep(draw.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == CODES[number], all_output(tmp_path)[-3000:]
    status = json.loads((run / "status.json").read_text())
    (saved,) = list_checkpoints(run / "checkpoints")
    assert find_damage(saved) is None
    step = int(saved.name.removeprefix("step-"))
    assert before <= step
    assert (status["state"], status["error"]) == (
        "stopped",
        f"StopSignal: stopped by {number.name} after step {step} of 100000, which is saved; "
        f"run_dir={run} resumes from there",
    )
    assert "Traceback" not in all_output(tmp_path)
    assert (
        (tmp_path / "train_output")
        .read_text()
        .splitlines()[-1]
        .startswith(f"train.py: stopped by {number.name} after step")
    )
    assert_gone(process)


@pytest.mark.parametrize("seed", trials(5))
@pytest.mark.parametrize(
    "number",
    [signal.SIGUSR1, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))],
    ids=lambda number: number.name,
)
def test_a_signal_in_the_first_seconds_is_a_clean_stop(job, tmp_path, number, seed):
    if not seed % 2:  # the server, which imports torch, has been started
        until = lambda: len(processes_of(process.pid)) >= 3  # noqa: E731
    else:
        until = lambda: (tmp_path / "run").exists()  # noqa: E731
    process = job()
    wait_until(until, process, tmp_path / "train_output")
    time.sleep(random.Random(f"{number} {seed}").uniform(0, 1.0))
    os.killpg(process.pid, number)
    assert process.wait() == CODES[number], all_output(tmp_path)[-3000:]
    assert "Traceback" not in all_output(tmp_path)
    assert f"stopped by {number.name}" in (tmp_path / "train_output").read_text().splitlines()[-1]
    assert_gone(process)


@pytest.mark.parametrize("seed", trials(5))
def test_ranks_die_with_the_agent(job, tmp_path, seed):
    process = job()
    ranks = lambda: len(processes_of(process.pid)) >= 5  # noqa: E731  # beside agent, server and resource tracker
    wait_until(
        lambda: ranks() and (seed % 2 or steps_logged(tmp_path / "run") >= 1 + seed), process, tmp_path / "train_output"
    )
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(process.pid)


@pytest.mark.slow
def test_ctrl_c_twice_does_not_wait_for_a_save(job, tmp_path):
    """The agent is the process that the person started; its ranks are in the middle of a step when they are ended."""
    process = job()
    wait_until(lambda: steps_logged(tmp_path / "run") >= 2, process, tmp_path / "train_output")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    os.kill(status["pid"], signal.SIGSTOP)  # rank 0, which would never save
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130, all_output(tmp_path)[-3000:]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
    assert_gone(process)
