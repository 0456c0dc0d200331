"""The small run that the experiments break: 18 steps over 4.5 epochs of eight conversations, a checkpoint every third."""

from __future__ import annotations

from pathlib import Path

BASE = [
    "model=tiny",
    "model.shape.hidden=16",
    "model.shape.intermediate=32",
    "dataset=local",
    f"dataset.path='{Path(__file__).resolve().parent / 'short.jsonl'}'",
    "dataset.test_ratio=0.2",
    "sft_type.dropout=0.1",
    "training.gradient_accumulation_steps=2",
    "training.per_device_batch_size=1",
    "training.max_steps=18",
    "training.logging_steps=1",
    "training.save_steps=3",
    "training.learning_rate=0.01",
    "evaluation.eval_steps=5",
    "evaluation.before=false",
    "evaluation.after=false",
    "tracking=disabled",
    "threads=1",
    "run_dir=runs/none",
]
