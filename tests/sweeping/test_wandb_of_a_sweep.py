"""What W&B keeps of a sweep, read back from its files: one folder, one group, a run for each job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]

SETTINGS = [
    *(
        "model=tiny",
        "dataset.conversations=8",
        "dataset.heldout=2",
        "dataset.max_length=8192",
        "training.gradient_accumulation_steps=2",
    ),
    *("training.logging_steps=1", "training.max_steps=2", "evaluation.before=false", "evaluation.max_new_tokens=4"),
    *("evaluation.bootstrap_samples=100", "evaluation.best_metric=loss", "threads=1"),
]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_sweep_is_one_group_in_one_folder_that_one_line_uploads(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "offline", "WANDB__DISABLE_STATS": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        "-m",
        "sft_type.rank=2,4",
        *SETTINGS,
        "hydra.sweep.dir=grid",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr

    folders = sorted((tmp_path / "grid" / "wandb").glob("offline-run-*"))
    words = [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    assert "Would sync 2 run(s)" in done.stdout + done.stderr

    jobs = {path.parent.name: path.parent for path in (tmp_path / "grid").glob("*/job.json")}
    seen = [read_back(next(folder.glob("*.wandb"))) for folder in folders]
    assert {run["display_name"] for run, _ in seen} == set(jobs)
    assert {run["run_group"] for run, _ in seen} == {"grid"}
    assert {run["job_type"] for run, _ in seen} == {"train"}
    assert len({run["run_id"] for run, _ in seen}) == 2
    for run, overview in seen:
        folder = jobs[run["display_name"]]
        assert run["run_id"] == json.loads((folder / "run.json").read_text())["run_id"], "the same when it is resumed"
        assert overview["config"]["sft_type"]["rank"] == int(folder.name.rpartition("-")[2])
        assert overview["config"]["_agentft"]["sweep"] == str(tmp_path / "grid")
        assert {"tiny", "lora", "synthetic"} <= set(overview["tags"])
        assert {"after", "tokens", "seconds", "trained_parameters", "train/loss"} <= set(overview["summary"])
        assert (overview["state"], overview["exit_code"]) == ("finished", 0)


def read_back(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record that opens a run, and W&B's own overview of it."""

    def inspect(*options: str) -> str:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout

    records = [json.loads(line) for line in inspect("--json").splitlines()]
    return next(record["run"] for record in records if record["type"] == "run"), json.loads(
        inspect("--summary", "--json")
    )
