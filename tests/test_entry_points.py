"""`train.py` and `evaluate.py` as programs: quick, and light in what they import until the recipe starts."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from agentft.config import compose

REPOSITORY = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "wandb", "peft", "modelscope", "datasets", "numpy", "pyarrow")


def start(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program with `-X importtime`: its output, with what it imported on stderr."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", str(REPOSITORY / program), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


def test_showing_the_config_imports_nothing_heavy(tmp_path: Path) -> None:
    done = start("train.py", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, said(done)
    assert done.stdout.strip() == OmegaConf.to_yaml(compose("train")).strip(), (
        "tests/golden/configs.txt holds what is shown here"
    )
    assert "hydra" in imported(done), "the check below would prove nothing"
    assert imported(done).isdisjoint(HEAVY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "arguments", "expected"),
    [
        ("train.py", ["sft_type.rnak=4"], "train.py: sft_type.rnak: no such setting; did you mean sft_type.rank?"),
        ("train.py", ["sft_type.rank=0"], "train.py: sft_type.rank=0: expected a whole number from 1 to"),
        ("train.py", ["dataset=local"], "train.py: dataset.path: missing"),
        ("train.py", ["-m", "sft_type.rank=4,x"], "train.py: sft_type.rank=x: expected a whole number"),
        ("evaluate.py", [], "evaluate.py: run: missing; give run=<value>"),
    ],
)
def test_a_mistake_is_refused_before_torch_is_imported(
    program: str, arguments: list[str], expected: str, tmp_path: Path
) -> None:
    done = start(program, *arguments, cwd=tmp_path)
    (line,) = said(done)
    assert line.startswith(expected)
    assert done.returncode == 2
    assert imported(done).isdisjoint(HEAVY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_help_is_for_readers(program: str, tmp_path: Path) -> None:
    done = start(program, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python {program}")
    assert "Groups and their options" in done.stdout
    assert imported(done).isdisjoint(HEAVY)
