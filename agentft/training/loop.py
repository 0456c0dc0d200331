"""The training loop, in the open: batches, loss, backward, clip, step, log, evaluate, save.

One step's loss is the sum of its cross-entropies over the sum of its labelled tokens, whatever micro-batches and ranks
they fell on; so 8 micro-batches of 1, 2 of 4, and 4 on each of 2 ranks are the same update. Every rank runs this loop; what
differs is the share of a step's micro-batches, and that rank 0 writes. M micro-batches of one rank's step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from agentft.data.batches import Batch, StepPlan, collate, collate_packed, empty_batch, step_groups
from agentft.data.tokens import Example
from agentft.errors import CheckpointError
from agentft.progress import progress_bar
from agentft.runtime import memory_in_use_bytes
from agentft.signals import StopSignal
from agentft.training import random_state
from agentft.training.checkpoint import (
    clear_unfinished,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from agentft.training.clock import Clock, Meter
from agentft.training.config import Resume, TrainingConfig
from agentft.training.engine import Engine
from agentft.training.guards import NumberGuard, accumulate_within_memory
from agentft.training.optim import build_schedule
from agentft.training.run_fingerprint import require_same
from agentft.world import World, share_out

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
    evaluate: Callable[[int], Mapping[str, float]] = lambda step: {}
    """Step -> metrics on the held-out conversations. One that raises `StopSignal` is made after the resume."""
    evaluation_steps: int = 0
    """Steps between evaluations; 0: none."""
    best_metric: str = "loss"
    """Whose value at the best step is kept."""
    rank: Callable[[Mapping[str, float]], list[float] | None] = lambda metrics: None
    """What evaluations are ordered by, the larger the better; None: of no worth."""
    log: Callable[[Mapping[str, float], int], None] = lambda values, step: None
    on_start: Callable[[int, list[str]], None] = lambda step, changes: None
    """Told the step that the loop starts from, and what differs from the run that saved it."""
    stop_requested: Callable[[], bool] = lambda: False
    """Asked after every step; when true the loop saves and returns."""
    fp16: bool = False
    row_tokens: int | None = None
    """Tokens in a packed row; None: micro-batches are padded."""
    start: Start | None = None
    """Where `find_start` has found that it begins; None: it is asked when the loop starts."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a training begins."""

    checkpoint: Path | None
    """Whole, and of this training; None: the first step."""
    changes: list[str]
    """What differs from the run that saved it, and may."""


@dataclass
class Counters:
    """Where a training stands. Saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    best_rank: list[float] | None = None
    best_value: float | None = None
    """Of `best_metric`; None where it has none, as 0/0."""
    best_loss: float | None = None
    best_step: int | None = None
    evaluated: int = 0
    """The last step that was evaluated."""
    per_device_batch_size: int = 0
    """Conversations in one forward pass, once a step did not fit into memory; 0: as configured."""
    skipped: int = 0
    """Steps left out because a number was not finite."""
    skipped_in_a_row: int = 0


@dataclass(frozen=True, slots=True)
class TrainOutput:
    """What a training came to."""

    counters: Counters
    seconds: dict[str, float]
    """Where this process's time went, by phase."""
    stopped: bool
    """The loop was asked to stop before its last step."""
    paused: bool = False
    """It stopped at `training.pause_at_fraction`, and a larger share goes on from there."""


@dataclass
class _Window:
    """Sums since the last logged step."""

    loss: float = 0.0
    weight: float = 0.0
    targets: int = 0
    tokens: int = 0
    positions: int = 0
    started: float = field(default_factory=time.perf_counter)


def train_model(job: Job) -> TrainOutput:
    """Run the loop to its end, or until it is asked to stop.

    Raises:
        TrainingError: the loss or its gradient is not finite.
        CheckpointError: `resume` cannot be honoured.
    """
    total = job.plan.total_steps
    schedule = build_schedule(job.engine.optimizer, total, job.config)
    guard = NumberGuard(job.engine, job.config, fp16=job.fp16)
    counters = _resume(job, schedule)
    world = job.engine.world
    clock = Clock(lambda phase: world.mark(f"step {counters.step + 1}, {phase}"))
    meter = Meter()
    window = _Window()
    if counters.step and _evaluation_is_due(job, counters):
        # The run was stopped in the middle of it.
        with clock.phase("evaluation"):
            _evaluate(job, counters)
    if counters.step and world.any(job.stop_requested()):
        log.info("nothing to do: the training was stopped after step %d of %d", counters.step, total)
        return TrainOutput(counters, clock.seconds, stopped=True)
    end = pause_step(total, job.config.pause_at_fraction)
    job.engine.model.train()
    with progress_bar("training", total, counters.step) as bar:
        while counters.step < end:
            batches, size, losses_M = _accumulate(job, counters, clock)
            with clock.phase("optimiser"):
                loss_sum, grad_norm = _update(job, counters, guard, batches, size, losses_M)
            rate = float(schedule.get_last_lr()[0])
            schedule.step()
            counters.step += 1
            _count(counters, window, size, loss_sum)
            last = counters.step == total
            if counters.step % job.config.logging_steps == 0 or counters.step == end:
                _log_window(job, counters, window, rate, grad_norm)
                window = _Window()
            meter.add(tokens=size.tokens, targets=size.targets, positions=size.positions)
            memory = memory_in_use_bytes(job.device.type)
            bar.advance(1, **meter.words(clock, loss_sum / (size.weight or math.nan), memory))
            best = False
            if _evaluation_is_due(job, counters):
                with clock.phase("evaluation"), contextlib.suppress(StopSignal):
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
                return TrainOutput(counters, clock.seconds, stopped=True, paused=not asked)
    # Short of all steps only when the checkpoint had reached `end` before.
    return TrainOutput(counters, clock.seconds, stopped=counters.step < total, paused=counters.step < total)


def pause_step(total: int, pause_at_fraction: float) -> int:
    """Return the step at which `training.pause_at_fraction` ends a training of `total` steps."""
    return max(1, min(total, round(pause_at_fraction * total)))


def step_batches(job: Job, number: int, per_device_batch_size: int) -> list[Batch]:
    """Return this rank's micro-batches of one step, on the device; as many as every other rank has."""
    world = job.engine.world
    indices = job.plan.step(number)
    lengths = {i: len(job.examples[i]) for i in indices}
    row_tokens = job.row_tokens and job.row_tokens * per_device_batch_size // job.config.per_device_batch_size
    groups = step_groups(indices, lengths, per_device_batch_size=per_device_batch_size, row_tokens=row_tokens)
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


def _accumulate(job: Job, counters: Counters, clock: Clock) -> tuple[list[Batch], _Size, torch.Tensor]:
    """Add up the gradients of one step: (micro-batches, sums over ranks, summed losses (M,) of this rank)."""
    engine = job.engine

    def attempt(per_device_batch_size: int) -> tuple[list[Batch], _Size, torch.Tensor]:
        with clock.phase("data"):
            batches = step_batches(job, counters.step, per_device_batch_size)
            size = _measure(job, batches)
        losses: list[torch.Tensor] = []
        for number, batch in enumerate(batches, start=1):
            random_state.seed_masks(job.plan.seed, counters.step, batch.ids)
            with engine.per_device_batch_size(last=number == len(batches)):
                with clock.phase("forward"):
                    loss = engine.loss(batch)
                with clock.phase("backward"):
                    engine.backward(loss / (size.weight or 1.0))
            losses.append(loss.detach())
        return batches, size, torch.stack(losses)

    wanted = counters.per_device_batch_size or job.config.per_device_batch_size
    fitting, made = accumulate_within_memory(
        attempt, wanted, engine.discard, step=counters.step + 1, alone=engine.world.size == 1
    )
    if fitting != wanted:
        counters.per_device_batch_size = fitting
    return made


def _update(
    job: Job, counters: Counters, guard: NumberGuard, batches: list[Batch], size: _Size, losses_M: torch.Tensor
) -> tuple[float, float]:
    """Make one optimiser step, or leave it out; return the loss over all ranks and the gradient's norm before clipping."""
    engine = job.engine
    # One copy from the device for both: the only time in a step that the host waits for it.
    norm, total = engine.clip(job.config.max_grad_norm), engine.world.sum(losses_M.sum())
    grad_norm, loss = torch.stack([norm.to(total), total]).tolist()
    if guard.refuses(counters.step + 1, batches, losses_M, weight=size.weight, loss=loss, grad_norm=grad_norm):
        counters.skipped += 1
        counters.skipped_in_a_row += 1
        guard.require_end(counters.skipped_in_a_row)
        engine.discard()
    else:
        counters.skipped_in_a_row = 0
        engine.step()
    return loss, grad_norm


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
        "train/loss": window.loss / (window.weight or math.nan),
        "train/learning_rate": rate,
        "train/grad_norm": grad_norm,
        "train/epoch": job.plan.epoch(counters.step),
        "train/tokens": counters.tokens,
        "train/tokens_per_second": window.tokens / (time.perf_counter() - window.started),
        "train/labelled_share": window.targets / window.tokens,
        "train/padding_share": 1 - window.tokens / window.positions,
    }
    if counters.skipped:
        values["train/skipped_steps"] = counters.skipped
    job.log(values, counters.step)


def _evaluation_is_due(job: Job, counters: Counters) -> bool:
    if not job.evaluation_steps or counters.evaluated == counters.step:
        return False
    return counters.step % job.evaluation_steps == 0 or counters.step == job.plan.total_steps


def _evaluate(job: Job, counters: Counters) -> bool:
    """Measure, log, and say whether this is the best step so far."""
    streams = random_state.torch_streams()
    try:
        metrics = job.evaluate(counters.step)
    finally:  # what is drawn in an evaluation, whole or cut off, must not change the training
        random_state.set_torch_streams(streams)
    counters.evaluated = counters.step
    job.log({f"eval/{name}": value for name, value in metrics.items()}, counters.step)
    rank = job.rank(metrics)
    better = rank is not None and (counters.best_rank is None or rank > counters.best_rank)
    if better:
        counters.best_rank, counters.best_step = rank, counters.step
        counters.best_value, counters.best_loss = metrics.get(job.best_metric), metrics.get("loss")
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
    start = job.start or find_start(job.checkpoints, job.config, job.identity, job.engine.world)
    if start.checkpoint is None:
        if job.engine.world.is_main:
            clear_unfinished(job.checkpoints, after=0)
        job.on_start(0, [])
        return Counters()
    checkpoint = load_checkpoint(start.checkpoint, check=False)
    state = checkpoint.state
    if job.engine.world.is_main:
        clear_unfinished(job.checkpoints, after=checkpoint.step)
    job.engine.load(checkpoint.tensors["trained"], checkpoint.tensors["optimizer"], state["engine"])
    lambdas = [None] * len(job.engine.optimizer.param_groups)
    schedule.load_state_dict(state["schedule"] | {"lr_lambdas": lambdas})
    random_state.restore(checkpoint.tensors["random"], state["random"])
    log.info("going on from %s", checkpoint.path)
    job.on_start(checkpoint.step, start.changes)
    return Counters(**state["counters"])


def find_start(checkpoints: Path, config: TrainingConfig, identity: Mapping[str, Any], world: World) -> Start:
    """Find where a training begins, and change nothing. Rank 0 looks and checks, so that all ranks take the same.

    Raises:
        CheckpointError: `resume` cannot be honoured, or the checkpoint belongs to another training.
    """
    if config.resume is Resume.never:
        if list_checkpoints(checkpoints):
            raise CheckpointError(f"{checkpoints} has checkpoints; training.resume=auto goes on from the newest")
        return Start(None, [])
    path = world.broadcast(newest_whole(checkpoints, fallback=config.fallback) if world.is_main else None)
    if path is None:
        if config.resume is Resume.must:
            raise CheckpointError(f"{checkpoints}: no checkpoint to go on from; training.resume=auto starts afresh")
        return Start(None, [])
    return Start(path, require_same(path, read_state(path)["identity"], identity, allow=config.allow_changes))
