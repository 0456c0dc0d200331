"""`training.max_hours` ends a run at a checkpoint, with what it has measured; the same command goes on to the same weights."""

from __future__ import annotations

from pathlib import Path

import torch

from agentft.config import compose, register_schemas, to_train_config
from agentft.recipes.train import TrainResult, train
from agentft.runs import read_json
from agentft.training.checkpoint import load_checkpoint, newest_whole
from agentft.training.loop import describe_pace

QUICK = [
    *("model=tiny", "dataset.conversations=12", "dataset.heldout=4", "training.gradient_accumulation_steps=2"),
    *("training.max_steps=3", "evaluation.before=false", "evaluation.eval_steps=0", "evaluation.max_new_tokens=8"),
    *("tracking=disabled", "threads=1"),
]


def run(folder: Path, *overrides: str) -> TrainResult:
    register_schemas()
    return train(to_train_config(compose("train", [*QUICK, f"run_dir='{folder}'", *overrides])))


def test_a_run_out_of_time_pauses_and_the_same_command_resumes(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    first = run(tmp_path / "cut", "training.max_hours=1e-9")
    told = (tmp_path / "cut" / "train.log").read_text(encoding="utf-8")
    assert "paused by training.max_hours after step 1 of 3, and measured there: the same command resumes" in told
    assert first.paused
    status, summary = (read_json(tmp_path / "cut" / name) for name in ("status.json", "summary.json"))
    assert (status["state"], status["step"], status["steps"]) == ("paused", 1, 3)
    assert (summary["paused_by"], summary["steps"]) == ("training.max_hours", 1)
    assert "arg_f1" in summary["after"], "the report is of the weights there"
    again = run(tmp_path / "cut", "training.max_hours=1e-9")
    assert (again.paused, again.summary["steps"]) == (True, 2), "each process has hours of its own"
    last = run(tmp_path / "cut", "training.max_hours=100")
    assert not last.paused
    assert read_json(tmp_path / "cut" / "summary.json")["paused_by"] is None
    weights, same = (load_checkpoint(newest_whole(r.run_dir / "checkpoints")).tensors["trained"] for r in (whole, last))
    assert weights.keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())


def test_the_first_steps_tell_the_time_left_and_whether_they_suffice() -> None:
    line = describe_pace(3.6, 4, 1004, None)
    assert line == "3.6 s a step: 60.0 min for the 1,000 steps left, without evaluations"
    assert describe_pace(3.6, 4, 1004, 7200.0) == line
    assert describe_pace(3.6, 4, 1004, 1800.0) == f"{line}; training.max_hours ends it near step 504"


def test_the_pace_is_logged_once_after_the_first_steps(tmp_path: Path) -> None:
    run(tmp_path / "run", "training.max_steps=6", "evaluation.after=false")
    lines = (tmp_path / "run" / "train.log").read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if "s a step" in line]
    assert len(told) == 1
    assert " s for the 2 steps left" in told[0]
