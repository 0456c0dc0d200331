"""The training loop, in the open: batches, loss, backward, clip, step, log, evaluate, save.

One step's loss is the sum of its cross-entropies over the sum of its labelled tokens, whatever micro-batches and ranks
they fell on; so 8 micro-batches of 1, 2 of 4, and 4 on each of 2 ranks are the same update. Every rank runs this loop; what
differs is the share of a step's micro-batches, and that rank 0 writes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from agentft.data.batches import Batch, StepPlan, collate, collate_packed, empty_batch, step_groups
from agentft.data.shares import share_out
from agentft.data.tokens import Example
from agentft.errors import CheckpointError, TrainingError
from agentft.progress import Bar, progress_bar
from agentft.training import random_state
from agentft.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    prune_checkpoints,
    save_checkpoint,
)
from agentft.training.clock import Clock
from agentft.training.config import Resume, TrainingConfig
from agentft.training.engine import Engine
from agentft.training.optim import build_schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a training needs; the loop reads it and changes only the model."""

    engine: Engine
    """Holds the model in training, alone or with other ranks."""
    examples: Sequence[Example]
    plan: StepPlan
    config: TrainingConfig
    pad_id: int
    device: torch.device
    checkpoints: Path
    identity: Mapping[str, Any]
    """What decides the losses besides the loop; a checkpoint of another identity is refused."""
    evaluate: Callable[[int], Mapping[str, float]]
    """Step -> metrics on the held-out conversations."""
    evaluation_steps: int
    best_metric: str
    log: Callable[[Mapping[str, float], int], None]
    on_resume: Callable[[int], None] = lambda step: None
    """Told the step that the loop goes on from."""
    stop_requested: Callable[[], bool] = lambda: False
    """Asked after every step; when true the loop saves and returns."""
    fp16: bool = False
    row_tokens: int | None = None
    """Tokens in a packed row; None: micro-batches are padded."""


@dataclass
class Counters:
    """Where a training stands. Saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    best_value: float | None = None
    best_step: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training came to."""

    counters: Counters
    seconds: dict[str, float]
    """Where this process's time went, by phase."""
    stopped: bool
    """The loop was asked to stop before its last step."""
    paused: bool = False
    """It stopped at `training.stop_at`, and a larger share goes on from there."""


@dataclass
class _Window:
    """Sums since the last logged step."""

    loss: float = 0.0
    weight: float = 0.0
    targets: int = 0
    tokens: int = 0
    positions: int = 0
    started: float = field(default_factory=time.perf_counter)


def train_model(job: Job) -> Outcome:
    """Run the loop to its end, or until it is asked to stop.

    Raises:
        TrainingError: the loss or its gradient is not finite.
        CheckpointError: `resume` cannot be honoured.
    """
    total = job.plan.total_steps
    schedule = build_schedule(job.engine.optimizer, total, job.config)
    counters = _resume(job, schedule)
    clock = Clock()
    window = _Window()
    world = job.engine.world
    if counters.step and world.any(job.stop_requested()):
        log.info("nothing to do: the training was stopped after step %d of %d", counters.step, total)
        return Outcome(counters, clock.seconds, stopped=True)
    end = pause_step(total, job.config.stop_at)
    job.engine.model.train()
    with progress_bar("training", total, counters.step) as bar:
        while counters.step < end:
            with clock.phase("data"):
                batches = step_batches(job, counters.step)
                size = _measure(job, batches)
            loss_sum, grad_norm = _update(job, batches, size.weight, clock)
            rate = float(schedule.get_last_lr()[0])
            schedule.step()
            counters.step += 1
            _count(counters, window, size, loss_sum)
            last = counters.step == total
            if counters.step % job.config.logging_steps == 0 or counters.step == end:
                _log_window(job, counters, window, rate, grad_norm)
                window = _Window()
            _show(bar, counters, loss_sum / size.weight, clock)
            best = False
            if job.evaluation_steps and (counters.step % job.evaluation_steps == 0 or last):
                with clock.phase("evaluation"):
                    best = _evaluate(job, counters)
            asked = world.any(job.stop_requested())
            stop = (asked or counters.step == end) and not last
            if last or stop or best or (job.config.save_steps and counters.step % job.config.save_steps == 0):
                with clock.phase("saving"):
                    _save(job, counters, schedule)
            if stop:
                log.warning(
                    "%s: saved after step %d of %d", "asked to stop" if asked else "paused", counters.step, total
                )
                return Outcome(counters, clock.seconds, stopped=True, paused=not asked)
    # Short of all steps only when the checkpoint had reached `end` before.
    return Outcome(counters, clock.seconds, stopped=counters.step < total, paused=counters.step < total)


def pause_step(total: int, stop_at: float) -> int:
    """Return the step at which `training.stop_at` ends a training of `total` steps."""
    return max(1, min(total, round(stop_at * total)))


def step_batches(job: Job, number: int) -> list[Batch]:
    """Return this rank's micro-batches of one step, on the device; as many as every other rank has."""
    world = job.engine.world
    indices = job.plan.step(number)
    lengths = {i: len(job.examples[i]) for i in indices}
    groups = step_groups(indices, lengths, micro_batch=job.config.micro_batch, row_tokens=job.row_tokens)
    shares = share_out([sum(lengths[i] for i in group) for group in groups], world.size)
    batches = [_collate(job, groups[at]) for at in shares[world.rank]]
    idle = max(map(len, shares)) - len(batches)
    return [batch.to(job.device) for batch in [*batches, *(empty_batch(job.pad_id) for _ in range(idle))]]


def _collate(job: Job, group: list[int]) -> Batch:
    examples = [job.examples[i] for i in group]
    return collate(examples, job.pad_id) if job.row_tokens is None else collate_packed(examples)


@dataclass(frozen=True, slots=True)
class _Size:
    """What one step holds, over all ranks."""

    weight: float
    targets: int
    tokens: int
    positions: int


def _measure(job: Job, batches: list[Batch]) -> _Size:
    sums = job.engine.world.totals(
        [
            sum(batch.weight for batch in batches),
            sum(batch.targets for batch in batches),
            sum(batch.tokens for batch in batches),
            sum(batch.positions for batch in batches),
        ]
    )
    return _Size(sums[0], *(int(each) for each in sums[1:]))


def _update(job: Job, batches: list[Batch], weight: float, clock: Clock) -> tuple[float, float]:
    """Make one optimiser step and return the loss summed over all ranks and the gradient's norm before clipping."""
    engine = job.engine
    losses: list[torch.Tensor] = []
    for number, batch in enumerate(batches, start=1):
        with engine.micro_batch(last=number == len(batches)):
            with clock.phase("forward"):
                loss = engine.loss(batch)
            with clock.phase("backward"):
                engine.backward(loss / weight)
        losses.append(loss.detach())
    with clock.phase("optimiser"):
        grad_norm = float(engine.clip(job.config.max_grad_norm))
        loss_sum = float(engine.world.sum(torch.stack(losses).sum()))
        if not math.isfinite(loss_sum) or not (math.isfinite(grad_norm) or job.fp16):
            ids = ", ".join(name for batch in batches for name in batch.ids)
            raise TrainingError(
                f"loss {loss_sum / weight} with gradient norm {grad_norm}: not finite, so the weights were not "
                f"changed; conversations of this step: {ids}. A lower training.learning_rate or model.dtype=fp32 may help"
            )
        engine.step()
    return loss_sum, grad_norm


def _count(counters: Counters, window: _Window, size: _Size, loss_sum: float) -> None:
    counters.tokens += size.tokens
    counters.targets += size.targets
    window.loss += loss_sum
    window.weight += size.weight
    window.tokens += size.tokens
    window.targets += size.targets
    window.positions += size.positions


def _log_window(job: Job, counters: Counters, window: _Window, rate: float, grad_norm: float) -> None:
    values = {
        "train/loss": window.loss / window.weight,
        "train/learning_rate": rate,
        "train/grad_norm": grad_norm,
        "train/epoch": job.plan.epoch(counters.step),
        "train/tokens": counters.tokens,
        "train/tokens_per_second": window.tokens / (time.perf_counter() - window.started),
        "train/labelled_share": window.targets / window.tokens,
        "train/padding_share": 1 - window.tokens / window.positions,
    }
    job.log(values, counters.step)


def _show(bar: Bar, counters: Counters, loss: float, clock: Clock) -> None:
    spent = sum(clock.seconds.get(name, 0.0) for name in ("data", "forward", "backward", "optimiser"))
    speed = clock.count("tokens", counters.tokens) / max(spent, 1e-9)
    bar.advance(1, loss=f"loss {loss:.3f}", speed=f"{speed:,.0f} tokens/s")


def _evaluate(job: Job, counters: Counters) -> bool:
    """Measure, log, and say whether this is the best step so far."""
    metrics = job.evaluate(counters.step)
    job.log({f"eval/{name}": value for name, value in metrics.items()}, counters.step)
    value = metrics.get(job.best_metric)
    if value is None:
        raise TrainingError(
            f"evaluation.best_metric={job.best_metric} has no value at step {counters.step}; measured: {', '.join(metrics)}"
        )
    better = counters.best_value is None or (
        value < counters.best_value if job.best_metric == "loss" else value > counters.best_value
    )
    if better:
        counters.best_value, counters.best_step = value, counters.step
    return better


def _save(job: Job, counters: Counters, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    engine = job.engine
    weights, optimizer = engine.weights(), engine.optimizer_state()
    random_tensors, random_plain = random_state.capture()
    plain_schedule = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
    if not engine.world.is_main:
        # In the order in which rank 0 writes them.
        weights.take_part()
        optimizer.take_part()
        return
    save_checkpoint(
        job.checkpoints,
        counters.step,
        {"trained": weights, "optimizer": optimizer, "random": random_tensors},
        {
            "counters": asdict(counters),
            "identity": dict(job.identity),
            "engine": engine.settings(),
            "schedule": plain_schedule,
            "random": random_plain,
        },
    )
    prune_checkpoints(job.checkpoints, job.config.save_total_limit, counters.best_step)


def _resume(job: Job, schedule: torch.optim.lr_scheduler.LRScheduler) -> Counters:
    checkpoint = _find_checkpoint(job)
    if checkpoint is None:
        return Counters()
    _refuse_other_identity(job, checkpoint)
    state = checkpoint.state
    job.engine.load(checkpoint.tensors["trained"], checkpoint.tensors["optimizer"], state["engine"])
    lambdas = [None] * len(job.engine.optimizer.param_groups)
    schedule.load_state_dict(state["schedule"] | {"lr_lambdas": lambdas})
    random_state.restore(checkpoint.tensors["random"], state["random"])
    log.info("going on from %s", checkpoint.path)
    job.on_resume(checkpoint.step)
    return Counters(**state["counters"])


def _find_checkpoint(job: Job) -> Checkpoint | None:
    """Return the checkpoint to go on from. Rank 0 looks for it and checks it, so that all take the same."""
    mode, world = job.config.resume, job.engine.world
    if mode is Resume.never:
        if list_checkpoints(job.checkpoints):
            raise CheckpointError(f"{job.checkpoints} has checkpoints; training.resume=auto goes on from the newest")
        return None
    path = world.broadcast(newest_whole(job.checkpoints) if world.is_main else None)
    if path is None:
        if mode is Resume.must:
            raise CheckpointError(f"{job.checkpoints}: no checkpoint to go on from; training.resume=auto starts afresh")
        return None
    return load_checkpoint(path, check=False)


def _refuse_other_identity(job: Job, checkpoint: Checkpoint) -> None:
    saved, current = checkpoint.state["identity"], dict(job.identity)
    changed = [
        f"{key} was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if changed and not job.config.allow_changes:
        raise CheckpointError(
            f"{checkpoint.path} belongs to another training: {'; '.join(changed)}. Use another run folder, "
            "or go on regardless with training.allow_changes=true"
        )
    for change in changed:
        log.warning("going on although %s", change)
