"""The teaching recipe trains what the whole recipe trains."""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path

import pytest

from agentft.config import compose, register_schemas, to_train_config
from agentft.recipes import minimal, train
from agentft.tracking import read_metrics

TINY = [
    *("model=tiny", "model.shape.hidden=32", "dataset.conversations=24", "dataset.heldout=3", "threads=1"),
    *("training.gradient_accumulation_steps=3", "training.per_device_batch_size=2", "training.max_steps=5"),
    *("training.logging_steps=1", "training.learning_rate=0.01", "tracking=disabled"),
    *("evaluation.eval_steps=0", "evaluation.before=false", "evaluation.after=false"),
]


@pytest.mark.parametrize(
    "overrides",
    [
        ["sft_type=lora"],
        ["sft_type=full"],
        ["sft_type=full", "model.dtype=bf16"],
        ["sft_type=lora", "sft_type.learning_rate_ratio=4", "dataset.span_weights.call=2"],
    ],
    ids=" ".join,
)
def test_the_minimal_recipe_has_the_losses_of_the_whole_one(overrides, tmp_path):
    register_schemas()
    whole, small = (
        to_train_config(compose("train", [*TINY, *overrides, f"run_dir='{tmp_path}/{name}'"])) for name in ("a", "b")
    )
    train.train(whole)
    wanted = [row["train/loss"] for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "train/loss" in row]
    assert len(wanted) == 5
    assert minimal.train(small) == pytest.approx(wanted, rel=2e-6 if "model.dtype=bf16" not in overrides else 1e-3)
    assert {path.name for path in (tmp_path / "b" / "final").glob("*.safetensors")} == {
        path.name for path in (tmp_path / "a" / "final").glob("*.safetensors")
    }


def test_the_minimal_recipe_is_a_command_of_at_most_120_lines(tmp_path, monkeypatch, capsys, caplog):
    assert len(Path(minimal.__file__).read_text(encoding="utf-8").splitlines()) <= 120
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimal.py", *TINY, "training.max_steps=2", "run_dir=run"])
    monkeypatch.setattr(logging.root, "handlers", [])  # beside those of pytest the command would set up none
    with caplog.at_level(logging.INFO):
        runpy.run_path(minimal.__file__, run_name="__main__")
    assert "step 2 of 2: loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
