"""An exam that is killed goes on where it stopped, to the same file, and never with somebody else's answers."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import agentft.recipes.train as train_recipe
from agentft.config import compose, register_schemas, to_train_config
from agentft.evaluation.generate import Completion, GreedyGenerator, PredictionCache
from agentft.read import main as read
from agentft.recipes.config import EvaluateConfig, TrainConfig
from agentft.recipes.evaluate import evaluate
from agentft.recipes.evaluation_run import WithProgressBar
from agentft.recipes.train import train
from agentft.runs import read_json

REPOSITORY = Path(__file__).parent.parent.parent

QUICK = [
    "model=tiny",
    "dataset.conversations=8",
    "dataset.heldout=8",
    "training.gradient_accumulation_steps=4",
    "training.max_steps=2",
    "training.save_steps=1",
    "training.learning_rate=0.01",
    "evaluation.eval_steps=0",
    "evaluation.max_new_tokens=24",
    "evaluation.bootstrap_samples=50",
    "tracking=disabled",
    "threads=1",
]


def config(run_dir: Path, *overrides: str) -> TrainConfig:
    register_schemas()
    return to_train_config(compose("train", [*QUICK, *overrides, f"run_dir='{run_dir}'"]))


def predictions(run: Path, name: str) -> bytes:
    return (run / "predictions" / f"{name}.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    return train(config(tmp_path_factory.mktemp("runs") / "whole")).run_dir


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many steps the model was asked, exam by exam."""
    counts: list[int] = []
    original = GreedyGenerator.generate

    def generate(self, steps, on_completion=None):
        counts.append(len(steps))
        return original(self, steps, on_completion)

    monkeypatch.setattr(GreedyGenerator, "generate", generate)
    return counts


def test_the_page_in_a_run_folder_is_the_one_that_the_command_makes_of_its_file(whole, tmp_path):
    assert read([str(whole), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == (whole / "predictions" / "after.html").read_bytes()


def test_a_killed_exam_goes_on_to_the_same_bytes(whole, tmp_path, asked):
    """A real SIGKILL, in the middle of the exam before training."""
    run = tmp_path / "run"
    working = run / "predictions" / "before.partial.jsonl"
    command = [sys.executable, "train.py", *QUICK, f"run_dir={run}"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not working.exists() or working.read_bytes().count(b"\n") < 4:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = working.read_bytes().count(b"\n") - 1
    assert not (run / "predictions" / "before.jsonl").exists()
    train(config(run))
    steps = predictions(whole, "before").count(b"\n")
    assert 3 <= there < steps
    assert asked == [steps - there, steps]
    for name in ("before", "after"):
        assert predictions(run, name) == predictions(whole, name)
        assert (
            read_json(run / "metrics" / f"{name}.json")["metrics"]
            == (read_json(whole / "metrics" / f"{name}.json")["metrics"])
        )
    assert not list((run / "predictions").glob("*.partial.jsonl"))


class _FailsAfter:
    """Stops an exam from inside after a number of answers."""

    def __init__(self, answers: int) -> None:
        self.left = answers

    def __call__(self, answer: Completion) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("injected")


def test_an_exam_that_failed_goes_on_to_the_same_bytes_and_a_torn_line_is_asked_again(whole, tmp_path, asked):
    run = tmp_path / "run"
    original = WithProgressBar.generate

    def failing(self, steps):
        return original(self, steps, _FailsAfter(5) if self._name == "after" else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WithProgressBar, "generate", failing)
        with pytest.raises(RuntimeError, match="injected"):
            train(config(run))
    working = run / "predictions" / "after.partial.jsonl"
    content = working.read_bytes()
    working.write_bytes(content[:-7])
    answered = content.count(b"\n") - 2
    asked.clear()
    train(config(run))
    assert asked == [predictions(whole, "after").count(b"\n") - answered], "before and training are not repeated"
    assert predictions(run, "after") == predictions(whole, "after")


def _stopped_after_one_step(run: Path) -> None:
    original = train_recipe.train_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_recipe, "train_model", lambda job: original(dataclasses.replace(job, stop_requested=lambda: True))
        )
        train(config(run, "evaluation.after=false"))


def test_a_resumed_training_measures_the_untrained_model_and_not_the_trained_one(whole, tmp_path, asked):
    run = tmp_path / "run"
    _stopped_after_one_step(run)
    assert (run / "checkpoints" / "step-000001").is_dir()
    first = predictions(run, "before")
    steps = first.count(b"\n")
    asked.clear()
    train(config(run))
    assert asked == [steps], "only `after`: `before` is read from its file"
    assert predictions(run, "before") == first == predictions(whole, "before")
    assert predictions(run, "after") == predictions(whole, "after")

    # Without its file it is measured again: still the untrained weights, although there are checkpoints.
    (run / "predictions" / "before.jsonl").unlink()
    asked.clear()
    train(config(run))
    assert asked == [steps]
    assert predictions(run, "before") == first


def test_answers_of_other_weights_or_settings_are_never_taken_over(whole, tmp_path, asked):
    run = tmp_path / "run"
    _stopped_after_one_step(run)
    steps = predictions(run, "before").count(b"\n")
    trained = (whole / "predictions" / "after.jsonl").read_text(encoding="utf-8")
    (run / "predictions" / "before.jsonl").write_text(trained, encoding="utf-8")
    asked.clear()
    train(config(run, "evaluation.after=false"))
    assert asked == [steps], "a changed file is not what was measured"
    assert predictions(run, "before") == predictions(whole, "before")
    asked.clear()
    train(config(run, "evaluation.after=false", "evaluation.max_new_tokens=5"))
    assert asked == [steps], "shorter answers are other answers"


def test_a_finished_evaluation_asked_for_again_is_measured_again(whole, asked):
    saved = to_evaluate(whole)
    one, two = (evaluate(saved).metrics_file for _ in range(2))
    assert len(asked) == 2
    assert one == two


def to_evaluate(run: Path) -> EvaluateConfig:
    from agentft.recipes.config import saved_config

    return EvaluateConfig(run=str(run), tracking=saved_config(run).tracking)


def test_a_working_file_of_somebody_else_is_started_afresh(tmp_path):
    class Nobody:
        def generate(self, steps, on_completion=None):
            return []

    path = tmp_path / "x.partial.jsonl"
    with PredictionCache(path, Nobody(), {"weights": "a"}):
        pass
    mine = path.read_bytes()
    with path.open("ab") as file:
        file.write(json.dumps({"conversation_id": "c", "step": 0, "context_hash": "h", "text": "t"}).encode() + b"\n")
    with PredictionCache(path, Nobody(), {"weights": "b"}):
        pass
    assert path.read_bytes() == mine.replace(b'"a"', b'"b"')
