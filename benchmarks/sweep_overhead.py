"""What a job of a sweep costs besides its training: one sweep of 12 jobs against 12 separate commands, in CPU seconds.

    python benchmarks/sweep_overhead.py              12 jobs of the tiny model, both ways: about 5 minutes of CPU
    python benchmarks/sweep_overhead.py --jobs 4     a look

Each way is run with 2 and with 12 steps a job. The difference is ten steps of pure training; what a job of 2 steps takes
beyond two of these is its overhead: starting, importing, composing, data, model, saving, and its share of the launcher.
No exam is held. Counted is the CPU time of all processes, so that other work on the machine hardly matters.
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
    *("dataset.chinese=0", "training.accumulation=4", "training.save_steps=0", "training.logging_steps=100"),
    *(
        "evaluation.before=false",
        "evaluation.after=false",
        "evaluation.steps=0",
        "evaluation.best_metric=loss",
        "threads=1",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=12)
    jobs = parser.parse_args().jobs
    print(f"{jobs} jobs of the tiny model, one thread each; CPU seconds")
    print(f"{'':<36}{f'{FEW} steps':>10}{f'{MANY} steps':>10}{'a step':>10}{'overhead a job':>16}")
    totals = {}
    for name, way in (
        ("one sweep", lambda folder, steps: sweep(jobs, folder, steps)),
        ("separate commands", lambda folder, steps: separate(jobs, folder, steps)),
    ):
        few, many = measure(way, FEW), measure(way, MANY)
        step = (many - few) / (MANY - FEW) / jobs
        totals[name] = few
        print(f"{name:<36}{few:>10.1f}{many:>10.1f}{step:>10.3f}{few / jobs - FEW * step:>16.2f}", flush=True)
    print(
        f"of {FEW} steps, the sweep takes {totals['one sweep'] / totals['separate commands']:.2f} x the separate commands"
    )


def measure(way: Callable[[Path, int], None], steps: int) -> float:
    """CPU seconds of everything that `way` starts."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        way(Path(folder), steps)
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
