"""`evaluate.py` on two ranks: one process's file byte for byte, also when it was killed on the way, in every mode."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from agentft.config import compose, register_schemas, to_config, to_train_config
from agentft.errors import ConfigError, RankError
from agentft.recipes.config import EvaluateConfig
from agentft.recipes.evaluate import EvaluateResult, evaluate
from agentft.recipes.train import train
from agentft.runs import read_json
from tests.distributed.test_job import _ranks_of

pytestmark = pytest.mark.timeout(900)
RUN = [
    *("model=tiny", "model.shape.hidden=32", "model.shape.intermediate=64", "dataset.conversations=12"),
    *(
        "dataset.heldout=5",
        "training.gradient_accumulation_steps=2",
        "training.max_steps=2",
        "training.learning_rate=0.01",
    ),
    *("evaluation.eval_steps=0", "evaluation.before=false", "evaluation.after=false", "tracking=disabled", "threads=1"),
]
LONG = ["evaluation=default", "evaluation.max_new_tokens=120", "evaluation.batch=1", "evaluation.bootstrap_samples=50"]
"""Answers that leave time for a kill: one after the other, and the untrained model does not stop by itself."""
SHORT = ["evaluation=default", "evaluation.max_new_tokens=6", "evaluation.batch=2", "evaluation.bootstrap_samples=50"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    register_schemas()
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(to_train_config(compose("train", [*RUN, f"run_dir='{folder}'"]))).run_dir


def _evaluate(run: Path, output: Path, *settings: str) -> EvaluateResult:
    given = [f"run='{run}'", f"output='{output}'", "threads=1", "tracking=disabled", *settings]
    return evaluate(to_config(compose("evaluate", given), EvaluateConfig))


def _scores(result: EvaluateResult) -> dict:
    report = read_json(result.metrics_file)
    return {name: value for name, value in report.items() if name != "seconds"}


def test_two_ranks_write_the_file_of_one_process_although_they_were_killed(run, tmp_path):
    alone = _evaluate(run, tmp_path / "alone", *LONG)
    together, spread = tmp_path / "together", ["distributed=ddp", "distributed.nproc=2"]
    files = [together / "predictions" / f"after.{part}.jsonl" for part in ("partial", "partial-rank-1")]

    def answers(file: Path) -> int:
        return max(file.read_bytes().count(b"\n") - 1, 0) if file.exists() else 0

    def kill() -> None:
        while not all(answers(file) >= 2 for file in files):
            time.sleep(0.01)
        for rank in _ranks_of(os.getpid()):
            os.kill(rank, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(RankError, match="SIGKILL"):
        _evaluate(run, together, *LONG, *spread)
    kept = sum(map(answers, files))
    assert kept >= 4
    assert not (together / "predictions" / "after.jsonl").exists()

    result = _evaluate(run, together, *LONG, *spread)
    assert f"{kept} of " in (together / "evaluate.log").read_text(), "what both ranks had answered is not asked again"
    there, here = (folder / "predictions" / "after.jsonl" for folder in (tmp_path / "alone", together))
    assert here.read_bytes() == there.read_bytes()
    assert len(here.read_text().splitlines()) > kept
    assert not any(file.exists() for file in files)
    assert _scores(result) == _scores(alone)


@pytest.mark.parametrize("mode", ["replay", pytest.param("likelihood", marks=pytest.mark.slow)])
def test_other_modes_are_spread_too_and_a_sharded_engine_is_told_to_hold_the_model_whole(run, tmp_path, capsys, mode):
    settings = [*SHORT, f"evaluation.mode={mode}"]
    alone = _evaluate(run, tmp_path / "alone", *settings)
    result = _evaluate(run, tmp_path / "together", *settings, "distributed=fsdp", "distributed.nproc=2")
    assert (
        "distributed=fsdp: generation needs no gradients, so each rank holds the model unsharded"
        in capsys.readouterr().err
    )
    if mode == "replay":
        there, here = (tmp_path / folder / "predictions" / "after.jsonl" for folder in ("alone", "together"))
        assert here.read_bytes() == there.read_bytes()
    assert result.objective == pytest.approx(alone.objective, rel=1e-6)
    assert _flat(_scores(result)) == pytest.approx(_flat(_scores(alone)), rel=1e-5)


def _flat(value: object, name: str = "") -> dict[str, float]:
    """Return every number of a report by its path."""
    if isinstance(value, dict):
        return {key: number for part, inner in value.items() for key, number in _flat(inner, f"{name}.{part}").items()}
    if isinstance(value, list):
        return _flat(dict(enumerate(value)), name)
    return {name: float(value)} if isinstance(value, int | float) else {}


def test_ranks_and_a_served_model_do_not_go_together(run, tmp_path):
    with pytest.raises(ConfigError, match="distributed=single"):
        _evaluate(
            run,
            tmp_path / "served",
            *("evaluation=default", "evaluation.engine=openai", "evaluation.served_model=x"),
            *("evaluation.base_url=http://127.0.0.1:9/v1", "distributed=ddp", "distributed.nproc=2"),
        )
