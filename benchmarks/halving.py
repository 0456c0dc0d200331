"""Does successive halving find what the full grid finds, and for how much of its training?

    python benchmarks/halving.py                            27 tiny configurations, 5 seeds: about 40 minutes (estimated)
    python benchmarks/halving.py --seeds 1 --conversations 96   a look, 3.5 minutes
    python benchmarks/halving.py model=smollm2-135m dataset.max_length=2048     any other settings

For each seed the grid is trained whole and by `agentft.sweeping.halving`, with the same settings, each in a folder of its
own; the winner is the best by arg_f1, then by held-out loss (a tiny model of bytes never gets an argument right, so there
the loss decides). Jobs run in this process: what is compared are tokens and winners, not starts of processes. The same
command again goes on where it was stopped.
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
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agentft.config import compose, register_schemas, to_train_config
from agentft.recipes.train import train
from agentft.runs import read_json
from agentft.sweeping.halving import Halving, budget, rank_key, run_halving
from agentft.sweeping.jobs import Job

SETTINGS = [
    *("model=tiny", "tracking=disabled", "dataset.max_length=8192", "dataset.heldout=24", "dataset.chinese=0"),
    *("evaluation.before=false", "evaluation.conversations=24", "evaluation.max_new_tokens=16", "evaluation.draws=10"),
    *(
        "evaluation.examples=0",
        "evaluation.best_metric=loss",
        "evaluation.steps=100000",
        "evaluation.batch=24",
        "training.save_steps=0",
        "threads=1",
    ),
    'sft_type.alpha="${product:2,${sft_type.rank}}"',
]
RANKS = (2, 8, 32)
RATES = (3e-3, 1e-2, 3e-2)
SHARES = (0.25, 0.5, 1.0)
"""Of the conversations: the sample sizes."""


@dataclass(frozen=True)
class Found:
    """What one way of searching came to."""

    winner: Job
    order: list[Job]
    tokens: float


def main() -> None:
    options = _parse_options()
    logging.disable(logging.INFO)
    register_schemas()
    same, shares = 0, []
    for seed in range(1, options.seeds + 1):
        whole = search(options, seed, None)
        halved = search(options, seed, Halving(options.eta, options.rungs))
        names = [job.name for job in whole.order]
        place = names.index(halved.winner.name) + 1
        same += place == 1
        shares.append(halved.tokens / whole.tokens)
        print(f"seed {seed}: grid {whole.winner.name} {_words(whole.winner)}, {whole.tokens:,.0f} tokens")
        print(
            f"  halving {halved.winner.name} {_words(halved.winner)}: place {place} of {len(names)} in the grid,",
            end=" ",
        )
        print(f"{shares[-1]:.1%} of the tokens", flush=True)
    print(f"same winner on {same} of {options.seeds} seeds with {sum(shares) / len(shares):.1%} of the tokens")


def search(options: argparse.Namespace, seed: int, halving: Halving | None) -> Found:
    """Train the grid of one seed, whole or by halving."""
    folder = Path(options.folder) / f"seed-{seed}-{'grid' if halving is None else 'halving'}"
    jobs = make_jobs(options, seed, folder)
    if halving is None:
        run([job for job in jobs if job.state != "finished"])
        spent = sum(read_json(job.folder / "summary.json")["tokens"] for job in jobs)
        order = sorted(jobs, key=_final)
    else:
        run_halving(jobs, halving, run, lambda text: print(f"  {text}", flush=True))
        spent = budget([job.rungs for job in jobs])[0]
        order = sorted((job for job in jobs if job.state == "finished"), key=_final)
    return Found(order[0], order, spent)


def make_jobs(options: argparse.Namespace, seed: int, folder: Path) -> list[Job]:
    """One job for each configuration; its command is its overrides."""
    jobs = []
    for number, (rank, rate, share) in enumerate(itertools.product(RANKS, RATES, SHARES)):
        sample = round(share * options.conversations)
        swept = [f"sft_type.rank={rank}", f"training.learning_rate={rate}", f"dataset.sample={sample}"]
        overrides = [
            *SETTINGS,
            f"dataset.conversations={options.conversations}",
            f"seed={seed}",
            *options.overrides,
            *swept,
        ]
        job = Job(
            folder=folder / f"rank-{rank}_rate-{rate:g}_sample-{sample}",
            number=number,
            identity=hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:16],
            overrides=overrides,
            swept=swept,
            settings={},
            threads=1,
            command=overrides,
        )
        if (job.folder / "job.json").exists():
            record = read_json(job.folder / "job.json")
            if record["identity"] != job.identity:
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


def _final(job: Job) -> tuple[float, float]:
    return rank_key({"objective": job.objective, "loss": job.status.get("eval_loss")})


def _words(job: Job) -> str:
    return f"(arg_f1 {job.objective:.3f}, loss {job.status['eval_loss']:.4f})"


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings as train.py takes them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--conversations", type=int, default=240, help="the largest sample")
    parser.add_argument("--eta", type=int, default=3)
    parser.add_argument("--rungs", type=int, default=3)
    parser.add_argument("--folder", default="runs/halving")
    return parser.parse_args()


if __name__ == "__main__":
    main()
