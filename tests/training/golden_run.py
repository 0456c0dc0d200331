"""Print the losses of 20 steps of a tiny model, LoRA and full, as hexadecimal floats: run by test_golden_losses.py.

The environment must fix the kernels before torch starts; see `PORTABLE` there.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from agentft.config import compose, to_train_config
from agentft.recipes.train import train
from agentft.tracking import read_metrics

OVERRIDES = [
    "model=tiny",
    "model.shape.hidden=32",
    "model.shape.intermediate=64",
    "dataset.conversations=24",
    "dataset.heldout=3",
    "dataset.seed=7",
    "training.gradient_accumulation_steps=3",
    "training.per_device_batch_size=1",
    "training.max_steps=20",
    "training.logging_steps=1",
    "training.learning_rate=0.01",
    "evaluation.eval_steps=0",
    "evaluation.before=false",
    "evaluation.after=false",
    "tracking=disabled",
    "threads=1",
]


def losses(sft_type: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(to_train_config(compose("train", [*OVERRIDES, f"sft_type={sft_type}", f"run_dir='{run}'"])))
        rows = read_metrics(run / "metrics.jsonl")
    return [float(row["train/loss"]).hex() for row in rows if "train/loss" in row]


if __name__ == "__main__":
    print(json.dumps({sft_type: losses(sft_type) for sft_type in ("lora", "full")}))
