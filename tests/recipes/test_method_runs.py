"""Each way of fine-tuning through the whole recipe: trains, is evaluated, stops, goes on to the same bits, saves."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from agentft.config import compose, register_schemas, to_train_config
from agentft.recipes.config import EvaluateConfig
from agentft.recipes.evaluate import evaluate
from agentft.recipes.train import train
from agentft.runs import read_json
from agentft.tracking import TrackingConfig, read_metrics

QUICK = [
    *("model=tiny", "model.shape.hidden=32", "model.shape.intermediate=64", "dataset.conversations=12"),
    *(
        "dataset.heldout=2",
        "training.gradient_accumulation_steps=4",
        "training.max_steps=4",
        "training.logging_steps=1",
    ),
    *("training.save_steps=2", "training.learning_rate=0.01", "evaluation.eval_steps=0", "evaluation.conversations=1"),
    *("evaluation.max_new_tokens=4", "evaluation.bootstrap_samples=20", "evaluation.before=false"),
    *("tracking=disabled", "threads=1"),
]


def config(run_dir, *overrides):
    register_schemas()
    return to_train_config(compose("train", [*QUICK, *overrides, f"run_dir='{run_dir}'"]))


def losses(run_dir) -> list[tuple[int, float]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


METHODS = {
    "pissa": ["sft_type.start=pissa", "sft_type.rslora=true", "sft_type.targets=[all-linear]"],
    "qlora": ["sft_type=qlora", "model.dtype=bf16"],
    "freeze": ["sft_type=freeze", "sft_type.layers=1", "sft_type.head=true", "model.dtype=bf16"],
    "dora": ["sft_type.dora=true", "sft_type.learning_rate_ratio=4"],
    "qlora8": ["sft_type=qlora", "sft_type.bits=8", "sft_type.start=pissa"],
}
BY_DEFAULT = ("qlora", "freeze")
"""The others are run by `make test-slow`; tests/model/test_methods.py holds their laws on one model."""


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in BY_DEFAULT else [pytest.mark.slow]) for name in METHODS]
)
def test_a_method_trains_is_evaluated_and_resumes_bit_for_bit(method: str, tmp_path):
    if method.startswith("qlora"):
        pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    whole = train(config(tmp_path / "whole", *METHODS[method]))
    assert len(losses(whole.run_dir)) == 4
    assert losses(whole.run_dir)[-1][1] < losses(whole.run_dir)[0][1]
    parts = tmp_path / "parts"
    assert train(config(parts, *METHODS[method], "training.pause_at_fraction=0.5")).paused
    train(config(parts, *METHODS[method]))
    assert losses(parts) == losses(whole.run_dir)
    ends = [load_file(run / "checkpoints" / "step-000004" / "trained.safetensors") for run in (whole.run_dir, parts)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    again = evaluate(EvaluateConfig(run=str(parts), tracking=TrackingConfig(name="disabled", mode="disabled")))
    before, after = (read_json(file) for file in (whole.run_dir / "metrics" / "after.json", again.metrics_file))
    assert before["metrics"] == after["metrics"]
    assert before["identity"]["weights"] == after["identity"]["weights"]
    assert list((parts / "final").glob("*.safetensors"))


@pytest.mark.parametrize("sft", ["lora", "full"])
def test_fp16_trains_with_a_loss_scale_that_is_kept(sft: str, tmp_path):
    run = train(config(tmp_path / "run", f"sft_type={sft}", "model.dtype=fp16", "evaluation.after=false")).run_dir
    assert all(math.isfinite(loss) for _, loss in losses(run))
    assert losses(run)[-1][1] < losses(run)[0][1]
    state = read_json(run / "checkpoints" / "step-000004" / "state.json")
    assert state["engine"]["scaler"]["scale"] >= 2.0
