"""What a job of a sweep costs besides its training: one sweep of 12 jobs against 12 separate commands, in CPU seconds.

    python benchmarks/sweep_overhead.py              12 jobs of the tiny model, both ways: about 4 minutes of CPU
    python benchmarks/sweep_overhead.py --jobs 4     a look

A job makes two steps and holds one exam of four conversations. The same sweep with twelve steps a job tells what a step
costs; all else that a job takes is its overhead: starting, importing, composing, data, model, exam, saving, and its share
of the launcher. Counted is the CPU time of all processes, so that other work on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEW, MANY = 2, 12
SETTINGS = [
    *("model=tiny", "tracking=disabled", "dataset.conversations=48", "dataset.heldout=4", "dataset.max_length=8192"),
    *(
        "dataset.chinese=0",
        "training.gradient_accumulation_steps=4",
        "training.save_steps=0",
        "training.logging_steps=100",
    ),
    *(
        "evaluation.before=false",
        "evaluation.eval_steps=0",
        "evaluation.best_metric=loss",
        "evaluation.bootstrap_samples=200",
    ),
    *("evaluation.conversations=4", "evaluation.max_new_tokens=16", "threads=1"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=12)
    jobs = parser.parse_args().jobs
    print(f"{jobs} jobs of the tiny model, one thread each; CPU seconds of all processes")
    together = measure(lambda folder: sweep(jobs, folder, FEW))
    print(f"one sweep, {FEW} steps a job{together:>26.1f}", flush=True)
    longer = measure(lambda folder: sweep(jobs, folder, MANY))
    step = (longer - together) / (MANY - FEW) / jobs
    print(f"one sweep, {MANY} steps a job{longer:>25.1f}   so a step {step:.3f}", flush=True)
    apart = measure(lambda folder: separate(jobs, folder, FEW))
    print(f"separate commands, {FEW} steps a job{apart:>18.1f}")
    for name, total in (("in the sweep", together), ("apart", apart)):
        print(f"overhead of a job {name:<14}{total / jobs - FEW * step:>18.2f}")
    print(f"the sweep takes {together / apart:.2f} x the separate commands")


def measure(way: Callable[[Path], None]) -> float:
    """CPU seconds of everything that `way` starts."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        way(Path(folder))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sweep(jobs: int, folder: Path, steps: int) -> None:
    """All jobs by one command."""
    slots = ["hydra.launcher.slots=1", "hydra.launcher.threads_per_job=1", f"hydra.sweep.dir={folder}/sweep"]
    call("-m", f"seed=range({jobs})", *SETTINGS, f"training.max_steps={steps}", *slots)


def separate(jobs: int, folder: Path, steps: int) -> None:
    """Each job by a command of its own."""
    for seed in range(jobs):
        call(f"seed={seed}", *SETTINGS, f"training.max_steps={steps}", f"run_dir={folder}/{seed}")


def call(*arguments: str) -> None:
    """Run train.py; its words matter only if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])


if __name__ == "__main__":
    main()
