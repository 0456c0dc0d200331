"""Does successive halving find what the full grid finds, and for how much of its training?

    python benchmarks/halving.py                 27 configurations, 5 seeds: about 25 minutes of CPU
    python benchmarks/halving.py --seeds 1       a look, 5 minutes
    python benchmarks/halving.py --grid near     a grid whose best configurations cannot be told apart

For each seed 27 jobs are halved by `agentft.sweeping.halving`; then the jobs that it left at a rung are taken to their ends
in their folders, as the same sweep without halving does, and that is the grid. What is learned is `few_tools`: argument F1
decides, at equal values held-out loss. Jobs run in this process: what is compared are tokens and winners, not starts of
processes. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import logging
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import few_tools

from agentft.comparison.pairs import compare_runs
from agentft.comparison.runs import predictions_file, saved_scores
from agentft.config import compose, register_schemas, to_train_config
from agentft.errors import AgentftError
from agentft.evaluation.metrics import METRICS_BY_NAME
from agentft.recipes.train import train
from agentft.runs import read_json
from agentft.sweeping.halving import Halving, budget, rank_key, run_halving
from agentft.sweeping.jobs import Job


@dataclass(frozen=True)
class Grid:
    """27 configurations: three values each of learning rate, sample and one more setting, in one exam."""

    rates: tuple[float, ...]
    samples: tuple[int, ...]
    third: tuple[str, str, tuple[int, ...]]
    """What folders call the third setting, its name and its values."""
    heldout: int


GRIDS = {
    "apart": Grid(
        (5e-5, 3e-4, 2e-3), (100, 300, 900), ("batches", "training.gradient_accumulation_steps", (1, 4, 16)), 300
    ),
    "near": Grid((2e-4, 1e-3, 5e-3), (225, 450, 900), ("weight", "dataset.span_weights.call", (1, 2, 4)), 150),
}
"""`apart`: every setting matters, and one configuration is the best by more than the exam's error. `near`: one setting
hardly matters and two rates lie close, so that several configurations contend for the first place."""


@dataclass(frozen=True)
class Search:
    """One seed, searched both ways."""

    grid: list[Job]
    """All, the best first."""
    found: Job
    """The best of those that halving took to their ends."""
    share: float
    """Tokens of halving, of the grid's."""
    p: float
    """Of the difference of argument F1 between the found job and the grid's winner, by a paired test; 1 for the same job."""

    @property
    def place(self) -> int:
        """Of the found job in the grid, by argument F1 and then held-out loss."""
        return self.grid.index(self.found) + 1

    @property
    def better(self) -> int:
        """Jobs of the grid with a higher argument F1 than the found one."""
        return sum(_value(job) > _value(self.found) for job in self.grid)


def main() -> None:
    options = _parse_options()
    logging.disable(logging.INFO)
    register_schemas()
    folder = Path(options.folder) / options.grid
    base = few_tools.base_model(folder)
    searches = []
    for seed in options.seeds:
        searches.append(search(folder, base, seed, GRIDS[options.grid], Halving(options.eta, options.rungs)))
        print(f"seed {seed}: {_account(searches[-1])}", flush=True)
    count = len(searches)
    print(
        f"the grid's winner on {sum(each.place == 1 for each in searches)} of {count} seeds, "
        f"a job that a paired test does not tell from it on {sum(each.p >= 0.05 for each in searches)}, "
        f"with {statistics.mean(each.share for each in searches):.1%} of the tokens"
    )


def search(folder: Path, base: Path, seed: int, grid: Grid, halving: Halving) -> Search:
    """Halve the jobs of one seed, then take all to their ends."""
    jobs = make_jobs(folder, base, seed, grid)
    commands = {job.config_hash: list(job.command) for job in jobs}
    run_halving(jobs, halving, run, lambda text: print(f"  {text}", flush=True))
    spent = budget([job.rungs for job in jobs])[0]
    survivors = [job for job in jobs if "1" in job.rungs]
    left = [job for job in jobs if job.state != "finished"]
    for job in left:
        job.command = commands[job.config_hash]
    run(left)
    whole = sum(read_json(job.folder / "summary.json")["tokens"] for job in jobs)
    order = sorted(jobs, key=_final)
    found = min(survivors, key=_final)
    return Search(order, found, spent / whole, _difference(order[0], found))


def _difference(winner: Job, found: Job) -> float:
    if winner is found:
        return 1.0
    try:
        scores = [saved_scores(predictions_file(job.folder)) for job in (winner, found)]
    except AgentftError:
        return 1.0
    p = compare_runs(*scores, definitions=(METRICS_BY_NAME["arg_f1"],)).metrics["arg_f1"].p
    return 1.0 if p is None else p


def make_jobs(folder: Path, base: Path, seed: int, grid: Grid) -> list[Job]:
    """One job for each configuration; its command is its overrides."""
    data, heldout = few_tools.write_data(folder, f"rare-words-{seed}", (max(grid.samples), grid.heldout), rare=True)
    files = [f"model.id={base}", f"dataset.path={data}", f"dataset.test_path={heldout}"]
    steps = ["training.per_device_batch_size=4", "training.warmup=0.05", f"seed={seed}"]
    jobs = []
    short, setting, values = grid.third
    for number, (rate, sample, value) in enumerate(itertools.product(grid.rates, grid.samples, values)):
        swept = [f"training.learning_rate={rate}", f"dataset.max_samples={sample}", f"{setting}={value}"]
        overrides = [*few_tools.SETTINGS, *files, *steps, *swept]
        job = Job(
            folder=folder / f"seed-{seed}" / f"rate-{rate:g}_sample-{sample}_{short}-{value}",
            number=number,
            config_hash=hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:16],
            overrides=overrides,
            swept=swept,
            settings={},
            threads=1,
            command=overrides,
        )
        if (job.folder / "job.json").exists():
            record = read_json(job.folder / "job.json")
            if record["config_hash"] != job.config_hash:
                sys.exit(f"{job.folder}: made with other settings; give another --folder")
            job.take_over(record)
        jobs.append(job)
    return jobs


def run(due: Sequence[Job]) -> signal.Signals | None:
    """Train jobs one after the other, in this process."""
    for job in due:
        config = to_train_config(compose("train", [*job.command, f"run_dir='{job.folder}'"]))
        with contextlib.redirect_stderr(io.StringIO()):  # the tables of the exams
            result = train(config)
        job.state = "paused" if result.paused else "finished"
        job.write()
    return None


def _account(each: Search) -> str:
    best, ties = each.grid[0], sum(_value(job) == _value(each.grid[0]) for job in each.grid)
    values = sorted((_value(job) for job in each.grid), reverse=True)
    return (
        f"grid {best.name} {_words(best)}, {ties} with that arg_f1; arg_f1 of the grid from {values[-1]:.3f} "
        f"over {statistics.median(values):.3f} to {values[0]:.3f}\n  halving {each.found.name} {_words(each.found)}: place "
        f"{each.place} of {len(each.grid)}, {each.better} with a higher arg_f1, "
        f"difference to the winner p = {each.p:.2f}, {each.share:.1%} of the tokens"
    )


def _value(job: Job) -> float:
    assert job.objective is not None, f"{job.name}: no argument F1"
    return job.objective


def _final(job: Job) -> tuple[float, float]:
    return rank_key({"objective": job.objective, "loss": job.status.get("eval_loss")})


def _words(job: Job) -> str:
    return f"(arg_f1 {_value(job):.3f}, loss {job.status['eval_loss']:.4f})"


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="SEED")
    parser.add_argument("--grid", choices=GRIDS, default="apart")
    parser.add_argument("--eta", type=int, default=3)
    parser.add_argument("--rungs", type=int, default=3)
    parser.add_argument("--folder", default="runs/halving")
    return parser.parse_args()


if __name__ == "__main__":
    main()
