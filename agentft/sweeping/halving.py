"""Successive halving: every job trains to the first rung, the best of them are promoted to the next, the others stay there.

A rung is a share of a job's own steps (`training.pause_at_fraction`), up to which it is exactly the beginning of its full
training. All jobs reach a rung before any is sent on, so the outcome does not depend on which machine was faster. (Jamieson
and Talwalkar, 2016, arXiv 1502.07943.)
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agentft.sweeping.jobs import Job, JobState


@dataclass(frozen=True, slots=True)
class Halving:
    """`hydra.launcher.eta` and `hydra.launcher.rungs`."""

    eta: int
    """One job in `eta` is promoted from a rung."""
    rungs: int
    """The last is the end of training."""

    @property
    def shares(self) -> list[float]:
        """Return the share of all steps at each rung: 1/9, 1/3, 1 for `eta=3`, `rungs=3`."""
        return [float(f"{self.eta ** (rung - self.rungs):.6g}") for rung in range(1, self.rungs + 1)]

    def survivors(self, jobs: int) -> int:
        """Return how many of so many jobs are promoted."""
        return math.ceil(jobs / self.eta)


def run_halving(
    jobs: Sequence[Job],
    halving: Halving,
    run: Callable[[Sequence[Job]], signal.Signals | None],
    say: Callable[[str], None],
) -> signal.Signals | None:
    """Take `jobs` up the rungs; `run` runs some of them and returns the signal that ended it early, as this does.

    Results at a rung stand in `job.json`, so the same call again repeats nothing. A failed job is left out of the choice.
    """
    # Those that an earlier sweep without halving has finished have nothing to win here.
    competing = [job for job in jobs if job.state != "finished" or job.rungs]
    commands = {job.config_hash: list(job.command) for job in competing}
    entered = []
    for number, share in enumerate(halving.shares, start=1):
        entered.append(len(competing))
        due = [job for job in competing if _measured(job, share) is None]
        before = f", {len(competing) - len(due)} were there before" if len(due) < len(competing) else ""
        say(f"rung {number} of {halving.rungs}: {len(competing)} jobs to {share:.3g} of their steps{before}")
        for job in due:
            job.command = [*commands[job.config_hash], f"training.pause_at_fraction={share:g}"]
            if job.state == "paused":
                _mark(job, "waiting")
        stopped = run(due)
        for job in due:
            if job.is_done:
                job.rungs[f"{share:g}"] = _results(job)
                job.write()
        if stopped is not None:
            return stopped
        if number < halving.rungs:
            competing = _best(competing, share, halving.survivors(len(competing)))
            say(f"  promoted: {', '.join(job.name for job in competing) or 'none'}")
    spent, whole = budget([job.rungs for job in jobs])
    saved = f"; {spent:,.0f} tokens, {spent / whole:.0%} of about {whole:,.0f} for all to the end" if whole else ""
    say(f"successive halving: {' -> '.join(map(str, entered))} jobs{saved}")
    return None


def _best(competing: Sequence[Job], share: float, count: int) -> list[Job]:
    """Return the best `count` of those that reached the rung; the others are marked as left there."""
    reached = [(job, measured) for job in competing if (measured := _measured(job, share)) is not None]
    reached.sort(key=lambda each: (*rank_key(each[1]), each[0].number))
    for job, _ in reached[count:]:
        if job.state == "waiting":  # it was at this rung in an earlier launch
            _mark(job, "paused")
    return sorted((job for job, _ in reached[:count]), key=lambda job: job.number)


def rank_key(measured: dict[str, Any]) -> tuple[float, float]:
    """Return a key that sorts the best first: by objective, then by held-out loss; what was not measured comes last."""
    objective, loss = measured.get("objective"), measured.get("loss")
    return (math.inf if objective is None else -objective, math.inf if loss is None else loss)


def _mark(job: Job, state: JobState) -> None:
    job.state = state
    job.write()


def _measured(job: Job, share: float) -> dict[str, Any] | None:
    """Return a job's results at a rung; of one that has finished and never stopped there, those at its end."""
    return job.rungs.get(f"{share:g}", _results(job) if job.state == "finished" else None)


def _results(job: Job) -> dict[str, Any]:
    """Return the results of the weights as they are now, from the run folder; None where one was not measured."""
    status = job.status
    found = {"step": status.get("step"), "steps": status.get("steps"), "tokens": job.summary.get("tokens")}
    found |= {"objective": job.objective, "loss": status.get("eval_loss")}
    return {name: value if isinstance(value, (int, float)) else None for name, value in found.items()}


def budget(rungs: Sequence[dict[str, dict[str, Any]]]) -> tuple[float, float]:
    """Return the tokens that jobs were trained on, and about how many all of them would have taken to their ends."""
    spent = whole = 0.0
    for reached in rungs:
        last = reached[max(reached, key=float)] if reached else {}
        if last.get("tokens") and last["step"] and last["steps"]:
            spent += last["tokens"]
            whole += last["tokens"] * last["steps"] / last["step"]
    return spent, whole
