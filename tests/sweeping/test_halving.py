"""Successive halving: a job stopped at a rung is the beginning of its full training, and nothing that ran is run again."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agentft.config import compose, register_schemas, to_train_config
from agentft.errors import ConfigError
from agentft.recipes.config import TrainConfig
from agentft.recipes.train import train
from agentft.runs import read_json
from agentft.sweeping.halving import Halving, budget, rank_key, run_halving
from agentft.sweeping.jobs import Job, config_hash
from agentft.tracking import read_metrics
from agentft.training.checkpoint import load_checkpoint, newest_whole
from agentft.training.config import TrainingConfig
from agentft.training.loop import pause_step

REPOSITORY = Path(__file__).parents[2]
TINY = [
    *("model=tiny", "tracking=disabled", "dataset.conversations=12", "dataset.heldout=3", "dataset.max_length=8192"),
    *(
        "training.gradient_accumulation_steps=2",
        "training.logging_steps=1",
        "training.save_steps=0",
        "training.learning_rate=0.01",
    ),
    *(
        "evaluation.before=false",
        "evaluation.max_new_tokens=4",
        "evaluation.bootstrap_samples=100",
        "evaluation.eval_steps=2",
    ),
]


def tiny(run_dir: Path, **training: Any) -> TrainConfig:
    register_schemas()
    config = to_train_config(compose("train", [*TINY, "threads=1", f"run_dir='{run_dir}'"]))
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


# --- A rung is the beginning of the whole ---


def test_a_paused_training_is_the_beginning_of_the_whole_one(tmp_path: Path) -> None:
    whole = train(tiny(tmp_path / "whole"))
    shares = [0.2, 0.5, 1.0]
    results = [train(tiny(tmp_path / "rungs", pause_at_fraction=share)) for share in shares]
    assert [result.paused for result in results] == [True, True, False]
    assert [result.summary["steps"] for result in results] == [1, 3, 6]
    rows, rung_rows = (read_metrics(result.run_dir / "metrics.jsonl") for result in (whole, results[-1]))
    for name in ("train/loss", "train/learning_rate", "eval/loss"):
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        assert [(row["step"], row[name]) for row in rung_rows if name in row] == wanted
    weights, rung_weights = (
        load_checkpoint(newest_whole(result.run_dir / "checkpoints")).tensors for result in (whole, results[-1])
    )
    assert weights.keys() == rung_weights.keys()
    for group, tensors in weights.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, rung_weights[group][name]), f"{group}: {name}"
    assert results[-1].objective == whole.objective
    assert results[-1].summary["best_step"] == whole.summary["best_step"], "what was measured at a rung decides nothing"


def test_a_paused_run_says_so_and_examines_what_it_has(tmp_path: Path) -> None:
    result = train(tiny(tmp_path / "run", pause_at_fraction=0.5))
    status = read_json(result.run_dir / "status.json")
    assert (status["state"], status["step"], status["steps"]) == ("paused", 3, 6)
    measured = read_json(tmp_path / "run/metrics/after.json")["metrics"]["arg_f1"]["value"]
    assert status["objective"] == result.objective == measured
    assert status["eval_loss"] > 0
    first = read_json(tmp_path / "run/run.json")["run_id"]
    again = train(tiny(tmp_path / "run", pause_at_fraction=0.5, logging_steps=5))
    assert again.paused
    assert read_json(tmp_path / "run/run.json")["run_id"] == first, "W&B goes on with the same run"
    assert again.summary["steps"] == 3, "asked for the same share again, it trains no further"


def test_how_far_a_run_goes_is_no_part_of_what_it_is() -> None:
    settings = {"training": {"learning_rate": 1e-3, "pause_at_fraction": 0.1}, "seed": 1}
    assert config_hash(settings) == config_hash(
        {"training": {"learning_rate": 1e-3, "pause_at_fraction": 1.0}, "seed": 1}
    )
    assert config_hash(settings) == config_hash({"training": {"learning_rate": 1e-3}, "seed": 1}), (
        "older sweeps stay known"
    )
    assert config_hash(settings) != config_hash(
        {"training": {"learning_rate": 1e-2, "pause_at_fraction": 0.1}, "seed": 1}
    )


@pytest.mark.parametrize(("total", "share", "step"), [(9, 1 / 9, 1), (60, 0.333333, 20), (2, 0.1, 1), (7, 1.0, 7)])
def test_a_share_is_at_least_one_step_and_at_most_all(total: int, share: float, step: int) -> None:
    assert pause_step(total, share) == step


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"training\.pause_at_fraction"):
        TrainingConfig(learning_rate=1.0, pause_at_fraction=share)


# --- Which jobs are promoted ---


def test_rungs_are_shares_with_a_constant_factor() -> None:
    assert Halving(3, 3).shares == [0.111111, 0.333333, 1.0]
    assert Halving(2, 4).shares == [0.125, 0.25, 0.5, 1.0]
    assert [Halving(3, 3).survivors(jobs) for jobs in (27, 9, 4, 1)] == [9, 3, 2, 1]


def test_best_is_the_higher_objective_then_the_lower_loss() -> None:
    rows = [{"objective": 0.5, "loss": 2.0}, {"objective": None, "loss": 0.1}, {"objective": 0.5, "loss": 1.0}, {}]
    rows.append({"objective": 0.6})
    assert [rows.index(row) for row in sorted(rows, key=rank_key)] == [4, 2, 0, 1, 3]


class Play:
    """Jobs whose objective at a rung is their number times the share; some die the first time."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.ran: list[list[int]] = []
        self.lines: list[str] = []
        self.dies: set[int] = set()
        self.interrupted_at: int | None = None

    def jobs(self) -> list[Job]:
        jobs = []
        for n in range(self.count):
            folder = self.folder / str(n)
            job = Job(folder=folder, number=n, config_hash=f"id{n}", overrides=[], swept=[], settings={}, threads=1)
            job.command = ["train.py"]
            if (folder / "job.json").exists():
                job.take_over(read_json(folder / "job.json"))
            job.write()
            jobs.append(job)
        return jobs

    def run(self, due: Sequence[Job]) -> signal.Signals | None:
        self.ran.append([job.number for job in due])
        for job in due:
            if job.number == self.interrupted_at:
                self.interrupted_at = None
                return signal.SIGINT
            assert job.command[-1].startswith("training.pause_at_fraction=")
            assert len(job.command) == 2, "the share of this rung only"
            share = float(job.command[-1].partition("=")[2])
            job.attempts += 1
            job.state = "failed" if job.number in self.dies else "finished" if share == 1 else "paused"
            if job.is_done:
                status = {"state": job.state, "objective": job.number * share, "step": round(90 * share), "steps": 90}
                (job.folder / "status.json").write_text(json.dumps(status))
                (job.folder / "summary.json").write_text(json.dumps({"tokens": 900 * share}))
            job.write()
        return None

    def launch(self) -> tuple[list[Job], signal.Signals | None]:
        jobs = self.jobs()
        self.ran.clear()
        return jobs, run_halving(jobs, Halving(3, 3), self.run, self.lines.append)


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path, 9)


def states(jobs: Sequence[Job]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for job in jobs:
        found.setdefault(job.state, []).append(job.number)
    return found


def test_the_best_third_goes_on_from_each_rung_and_nothing_runs_twice(play: Play) -> None:
    jobs, stopped = play.launch()
    assert stopped is None
    assert play.ran == [list(range(9)), [6, 7, 8], [8]]
    assert states(jobs) == {"paused": list(range(8)), "finished": [8]}
    assert [sorted(job.rungs) for job in jobs[5:]] == [
        ["0.111111"],
        *[["0.111111", "0.333333"]] * 2,
        ["0.111111", "0.333333", "1"],
    ]
    assert play.lines[-1] == "successive halving: 9 -> 3 -> 1 jobs; 2,100 tokens, 26% of about 8,100 for all to the end"
    jobs, _ = play.launch()
    assert play.ran == [[], [], []]
    assert states(jobs) == {"paused": list(range(8)), "finished": [8]}


def test_an_interrupted_rung_goes_on_where_it_was(play: Play) -> None:
    play.interrupted_at = 7
    jobs, stopped = play.launch()
    assert stopped == signal.SIGINT
    assert play.ran[-1] == [6, 7, 8] if len(play.ran) > 1 else play.ran == [list(range(9))]
    assert states(jobs) == {"paused": list(range(7)), "waiting": [7, 8]}
    jobs, stopped = play.launch()
    assert stopped is None
    assert play.ran == [[7, 8], [6, 7, 8], [8]]
    assert states(jobs)["finished"] == [8]


def test_a_job_that_failed_is_left_out_and_can_still_win_later(play: Play) -> None:
    play.dies = {8}
    jobs, _ = play.launch()
    assert play.ran == [list(range(9)), [5, 6, 7], [7]]
    assert states(jobs) == {"paused": list(range(7)), "finished": [7], "failed": [8]}
    play.dies = set()
    jobs, _ = play.launch()
    assert play.ran == [[8], [8], [8]], "the others were at these rungs before"
    assert states(jobs) == {"paused": list(range(7)), "finished": [7, 8]}


def test_jobs_that_an_earlier_sweep_finished_take_nobodys_place(play: Play) -> None:
    for job in play.jobs()[:3]:
        job.state = "finished"
        (job.folder / "status.json").write_text(json.dumps({"state": "finished", "objective": 100.0}))
        job.write()
    jobs, _ = play.launch()
    assert play.ran == [[3, 4, 5, 6, 7, 8], [7, 8], [8]]
    assert states(jobs) == {"finished": [0, 1, 2, 8], "paused": [3, 4, 5, 6, 7]}


def test_the_budget_counts_the_furthest_rung_of_each_job() -> None:
    near = {"0.5": {"tokens": 10, "step": 1, "steps": 2}}
    far = near | {"1": {"tokens": 30, "step": 2, "steps": 2}}
    assert budget([near, far, {}]) == (40.0, 50.0)


# --- The real program ---


@pytest.mark.slow
def test_a_halving_sweep_survives_a_kill_and_marks_where_each_job_was_left(tmp_path: Path) -> None:
    """Three tiny jobs to half their steps, the best to its end; one is killed at the first rung and tried again."""
    (tmp_path / "sitecustomize.py").write_text(KILL_ONCE)
    sweep = ["training.learning_rate=1e-5,1e-3,2e-2", "hydra.sweep.dir=sweep", "hydra.launcher.eta=3"]
    small = [word for word in TINY if "learning_rate" not in word] + ["training.max_steps=4"]
    options = ["hydra.launcher.rungs=2", "hydra.launcher.retry=1", "hydra.launcher.slots=2"]
    command = [sys.executable, str(REPOSITORY / "train.py"), "-m", *sweep, *small, *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}

    def launch() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
        )

    done = launch()
    assert done.returncode == 0, done.stderr
    jobs = {record["number"]: record for record in map(read_json, (tmp_path / "sweep").glob("*/job.json"))}
    assert jobs[1]["attempts"] == 2 + (jobs[1]["state"] == "finished"), "killed once"
    assert sorted(job["state"] for job in jobs.values()) == ["finished", "paused", "paused"]
    assert all(job["rungs"]["0.333333"]["step"] == 1 for job in jobs.values())
    (winner,) = (job for job in jobs.values() if job["state"] == "finished")
    assert winner["rungs"]["1"]["step"] == 4
    best = min(jobs.values(), key=lambda job: rank_key(job["rungs"]["0.333333"]))
    assert winner["number"] == best["number"]
    table = (tmp_path / "sweep/sweep.md").read_text()
    assert table.count("| paused 1/4 |") == 2
    assert "pause_at_fraction" not in table
    with (tmp_path / "sweep/sweep.csv").open() as file:
        left = sorted((row["state"], row["step"]) for row in csv.DictReader(file))
    assert left == [("finished", "4"), ("paused", "1"), ("paused", "1")]

    done = launch()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("started") == 0, "the same command again runs nothing"


KILL_ONCE = """
import os, signal, sys

def die(*_):
    if "training.learning_rate=0.001" in sys.argv and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

def arm():
    signal.signal(signal.SIGPROF, die)
    signal.setitimer(signal.ITIMER_PROF, 0.3)

os.register_at_fork(after_in_child=arm)
"""
"""Python runs `sitecustomize.py` at its start, in the process that jobs are forked from too."""
