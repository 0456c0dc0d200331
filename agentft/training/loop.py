"""The training loop, in the open: batches, loss, backward, clip, step, log, evaluate, save.

One step's loss is the sum of its cross-entropies over the sum of its labelled tokens, whatever micro-batches they fell
into; so 8 micro-batches of 1 and 2 of 4 are the same update.
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

from agentft.data.batches import Batch, StepPlan, collate, micro_batches
from agentft.data.tokens import Example
from agentft.errors import CheckpointError, TrainingError
from agentft.model.adapters import load_trained_state, trained_state
from agentft.progress import Bar, progress_bar
from agentft.training import random_state
from agentft.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_newest,
    pack_optimizer,
    prune_checkpoints,
    save_checkpoint,
    unpack_optimizer,
)
from agentft.training.clock import Clock
from agentft.training.config import Resume, TrainingConfig
from agentft.training.loss import LabelledLoss
from agentft.training.optim import build_optimizer, build_schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a training needs; the loop reads it and changes only the model."""

    objective: LabelledLoss
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
    optimizer = build_optimizer(job.objective, job.config)
    schedule = build_schedule(optimizer, total, job.config)
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.fp16)
    counters = _resume(job, optimizer, schedule, scaler)
    clock = Clock()
    window = _Window()
    if counters.step and job.stop_requested():
        log.info("nothing to do: the training was stopped after step %d of %d", counters.step, total)
        return Outcome(counters, clock.seconds, stopped=True)
    end = pause_step(total, job.config.stop_at)
    job.objective.train()
    with progress_bar("training", total, counters.step) as bar:
        while counters.step < end:
            with clock.phase("data"):
                batches = step_batches(job, counters.step)
            loss_sum, grad_norm = _update(job, batches, optimizer, scaler, clock)
            rate = float(schedule.get_last_lr()[0])
            schedule.step()
            counters.step += 1
            _count(counters, window, batches, loss_sum)
            last = counters.step == total
            if counters.step % job.config.logging_steps == 0 or counters.step == end:
                _log_window(job, counters, window, rate, grad_norm)
                window = _Window()
            _show(bar, counters, loss_sum / sum(b.weight for b in batches), clock)
            best = False
            if job.evaluation_steps and (counters.step % job.evaluation_steps == 0 or last):
                with clock.phase("evaluation"):
                    best = _evaluate(job, counters)
            asked = job.stop_requested()
            stop = (asked or counters.step == end) and not last
            if last or stop or best or (job.config.save_steps and counters.step % job.config.save_steps == 0):
                with clock.phase("saving"):
                    _save(job, counters, optimizer, schedule, scaler)
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
    """Return the micro-batches of one step, on the device."""
    lengths = [len(example) for example in job.examples]
    groups = micro_batches(job.plan.step(number), lengths, job.config.micro_batch)
    return [collate([job.examples[i] for i in group], job.pad_id).to(job.device) for group in groups]


def _update(
    job: Job, batches: list[Batch], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clock: Clock
) -> tuple[float, float]:
    """Make one optimiser step and return the summed loss and the gradient's norm before clipping."""
    weight = sum(batch.weight for batch in batches)
    losses: list[torch.Tensor] = []
    for batch in batches:
        with clock.phase("forward"):
            loss = job.objective(batch)
        with clock.phase("backward"):
            scaler.scale(loss / weight).backward()
        losses.append(loss.detach())
    with clock.phase("optimiser"):
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = job.config.max_grad_norm or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        loss_sum = float(torch.stack(losses).sum())
        if not math.isfinite(loss_sum) or not (math.isfinite(grad_norm) or job.fp16):
            ids = ", ".join(name for batch in batches for name in batch.ids)
            raise TrainingError(
                f"loss {loss_sum / weight} with gradient norm {grad_norm}: not finite, so the weights were not "
                f"changed; conversations of this step: {ids}. A lower training.learning_rate or model.dtype=fp32 may help"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return loss_sum, grad_norm


def _count(counters: Counters, window: _Window, batches: list[Batch], loss_sum: float) -> None:
    tokens = sum(batch.tokens for batch in batches)
    targets = sum(batch.targets for batch in batches)
    counters.tokens += tokens
    counters.targets += targets
    window.loss += loss_sum
    window.weight += sum(batch.weight for batch in batches)
    window.tokens += tokens
    window.targets += targets
    window.positions += sum(batch.input_ids_BT.numel() for batch in batches)


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


def _save(
    job: Job,
    counters: Counters,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
) -> None:
    optimizer_tensors, groups = pack_optimizer(optimizer)
    random_tensors, random_plain = random_state.capture()
    plain_schedule = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
    save_checkpoint(
        job.checkpoints,
        counters.step,
        {"trained": trained_state(job.objective.model), "optimizer": optimizer_tensors, "random": random_tensors},
        {
            "counters": asdict(counters),
            "identity": dict(job.identity),
            "optimizer_groups": groups,
            "schedule": plain_schedule,
            "scaler": scaler.state_dict(),
            "random": random_plain,
        },
    )
    prune_checkpoints(job.checkpoints, job.config.save_total_limit, counters.best_step)


def _resume(
    job: Job,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
) -> Counters:
    mode = job.config.resume
    if mode is Resume.never:
        if list_checkpoints(job.checkpoints):
            raise CheckpointError(f"{job.checkpoints} has checkpoints; training.resume=auto goes on from the newest")
        return Counters()
    checkpoint = load_newest(job.checkpoints)
    if checkpoint is None:
        if mode is Resume.must:
            raise CheckpointError(f"{job.checkpoints}: no checkpoint to go on from; training.resume=auto starts afresh")
        return Counters()
    _refuse_other_identity(job, checkpoint)
    load_trained_state(job.objective.model, checkpoint.tensors["trained"])
    unpack_optimizer(optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer_groups"])
    schedule.load_state_dict(checkpoint.state["schedule"] | {"lr_lambdas": [None] * len(optimizer.param_groups)})
    scaler.load_state_dict(checkpoint.state["scaler"])
    random_state.restore(checkpoint.tensors["random"], checkpoint.state["random"])
    log.info("going on from %s", checkpoint.path)
    job.on_resume(checkpoint.step)
    return Counters(**checkpoint.state["counters"])


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
