"""Signals: saved within one step, the conventional exit code, queued again once (rows F05, F06 of the matrix)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.harness import (
    STEPS,
    assert_equal,
    finish,
    kill,
    log_of,
    seeds,
    steps_logged,
    wait_until,
    whole_checkpoints,
)

CODES = {"SIGTERM": 143, "SIGUSR1": 138, "SIGINT": 130, "SIGHUP": 129}
ROOT = Path(__file__).resolve().parents[2]


def _status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.mark.parametrize("seed", seeds(sample=1, full=36))
def test_f05_a_signal_in_the_middle_of_a_step_saves_after_that_step(zygote, golden, ledger, tmp_path, seed):
    draw = random.Random(f"F05-{seed}")
    name, step = list(CODES)[seed % len(CODES)], draw.randrange(1, STEPS)
    run, times = tmp_path / "run", tmp_path / "time"
    sabotage = [f"signal_at_step:{step}:{name}", "time_of_save"]
    if seed % 3 == 2 and name != "SIGINT":
        sabotage.append(f"signal_in_save:{name}")  # a second one, while the checkpoint is written
    code = zygote.run(run, sabotage=sabotage, environment={"FAULT_TIMES": str(times)})
    assert code == CODES[name], log_of(run).read_text()[-2000:]
    assert max(whole_checkpoints(run)) == step
    assert _status(run)["state"] == "stopped"
    assert f"stopped by {name} after step {step} of {STEPS}, which is saved" in _status(run)["error"]
    seconds = float(Path(f"{times}.saved").read_text()) - float(times.read_text())
    ledger("F05", seed=seed, signal=name, saved_after_seconds=seconds)
    assert_equal(finish(zygote, run), golden())


@pytest.mark.parametrize("seed", seeds(sample=0, full=10, start=500))
def test_f05_a_signal_from_outside_at_a_random_moment(zygote, golden, ledger, tmp_path, seed):
    draw = random.Random(f"F05-{seed}")
    run, times = tmp_path / "run", tmp_path / "time"
    pid = zygote.start(run, sabotage=["time_of_save"], environment={"FAULT_TIMES": str(times)})
    lines = draw.randrange(1, STEPS - 2)
    wait_until(lambda: steps_logged(run) >= lines, pid)
    time.sleep(draw.uniform(0, 0.1))
    before, began = steps_logged(run), time.monotonic()
    kill(pid, signal.SIGTERM)
    code = zygote.wait()
    figures = {}
    if code == 143 and _status(run)["error"].endswith("resumes from there"):
        assert before <= max(whole_checkpoints(run)) <= before + 2
        figures["saved_after_seconds"] = float(Path(f"{times}.saved").read_text()) - began
    else:
        assert code in (0, 143)  # it had just finished its last step
    ledger("F05", seed=seed, signal="SIGTERM", **figures)
    assert_equal(finish(zygote, run), golden())


def test_f05_a_signal_during_an_evaluation_is_not_kept_waiting(zygote, golden, ledger, tmp_path):
    """The evaluation is left, the step is saved, and the evaluation is made after the resume, as if nothing had been."""
    run = tmp_path / "run"
    assert zygote.run(run, sabotage=["signal_in_evaluation:SIGTERM"]) == 143
    assert max(whole_checkpoints(run)) == 5
    assert '"eval/loss"' not in (run / "metrics.jsonl").read_text()
    ledger("F05", signal="SIGTERM")
    assert_equal(finish(zygote, run), golden())


@pytest.mark.faults
def test_f05_the_program_itself_ends_with_the_code(ledger, tmp_path):
    """`train.py` as a process of its own, told by a person who waits for the code."""
    from tests.faults.zygote_settings import BASE

    command = [sys.executable, str(ROOT / "train.py"), *BASE, "run_dir=run", "training.max_steps=400"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert wait_until(lambda: steps_logged(tmp_path / "run") >= 3, process.pid)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 143
    assert said.splitlines()[-1].startswith("train.py: stopped by SIGTERM after step")
    ledger("F05", signal="SIGTERM")


@pytest.mark.parametrize("array", [True, pytest.param(False, marks=pytest.mark.faults)], ids=["array", "plain"])
def test_f06_a_job_of_slurm_saves_and_is_queued_again_exactly_once(zygote, golden, ledger, tmp_path, array):
    calls, program = tmp_path / "calls", tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n')
    program.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "1240", "SLURM_PROCID": "0", "PATH": f"{program.parent}:{os.environ['PATH']}"}
    if array:
        slurm |= {"SLURM_ARRAY_JOB_ID": "1234", "SLURM_ARRAY_TASK_ID": "7"}
    run = tmp_path / "run"
    times = {"FAULT_TIMES": str(tmp_path / "time")}
    assert zygote.run(run, sabotage=["signal_at_step:8:SIGUSR1"], environment=slurm | times) == 138
    assert max(whole_checkpoints(run)) == 8
    assert calls.read_text().splitlines() == ["requeue 1234_7" if array else "requeue 1240"]
    ledger("F06", signal="SIGUSR1")
    assert_equal(finish(zygote, run), golden())


@pytest.mark.faults
def test_f06_a_sweep_is_queued_again_once_and_resumes_as_a_whole(ledger, tmp_path):
    """The launcher is told that the time is up: its jobs save, it asks once, and the same command finishes all of them."""
    from tests.faults.zygote_settings import BASE

    calls, program = tmp_path / "calls", tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n')
    program.chmod(0o755)
    environment = os.environ | {"SLURM_JOB_ID": "55", "PATH": f"{program.parent}:{os.environ['PATH']}"}
    settings = [s for s in BASE if not s.startswith(("run_dir", "threads"))]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *settings, "seed=1,2,3", "hydra.launcher.slots=1"]
    command += ["training.max_steps=60"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    (sweep,) = [tmp_path / "runs" / "slurm-55_train"]
    first = lambda: next(iter(sorted(sweep.glob("0_*"))), sweep)  # noqa: E731
    assert wait_until(lambda: steps_logged(first()) >= 5, process.pid)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(900) == 138
    assert calls.read_text().splitlines() == ["requeue 55"]
    saved = max(whole_checkpoints(first()))
    assert json.loads((first() / "status.json").read_text())["state"] == "stopped"
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    states = [json.loads(path.read_text())["state"] for path in sorted(sweep.glob("*/status.json"))]
    assert states == ["finished"] * 3
    assert f"step-{saved:06d}" in (first() / "train.log").read_text()
    assert len(calls.read_text().splitlines()) == 1
    ledger("F06", signal="SIGUSR1", jobs=3)
