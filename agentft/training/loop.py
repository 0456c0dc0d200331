"""Train, in the open: batches, loss, backward, clip, step, log, evaluate, save.

One step's loss is the sum of its cross-entropies over the sum of its labelled tokens, whatever micro-batches and ranks they
fell on. Every rank runs this loop on its share of a step; rank 0 writes. Axes: M micro-batches of one rank's step.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from agentft.data.batches import Batch, StepPlan, collate, collate_packed, empty_batch, step_groups
from agentft.data.tokens import Example
from agentft.errors import ConfigError, TrainingError
from agentft.progress import duration, progress_bar
from agentft.runtime import memory_in_use_bytes, share_out
from agentft.signals import StopSignal
from agentft.training.checkpoint import (
    Start,
    clear_unfinished,
    find_start,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from agentft.training.config import TrainingConfig
from agentft.training.engine import Engine, build_schedule
from agentft.training.guards import report_nonfinite

log = logging.getLogger(__name__)

T = TypeVar("T")


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
    fingerprint: Mapping[str, Any]
    """What decides the losses besides the loop; a checkpoint of another run is refused."""
    evaluate: Callable[[int], Mapping[str, float]] = lambda step: {}
    """Step -> metrics on the held-out conversations. One that raises `StopSignal` is made after the resume."""
    evaluation_steps: int = 0
    """Steps between evaluations; 0: none."""
    best_metric: str = "loss"
    """Whose value at the best step is kept."""
    rank: Callable[[Mapping[str, float]], list[float] | None] = lambda metrics: None
    """What evaluations are ordered by, the larger the better; None: of no worth."""
    log: Callable[[Mapping[str, float], int], None] = lambda values, step: None
    on_start: Callable[[int, Mapping[str, str]], None] = lambda step, changes: None
    """Told the step that the loop starts from, and what differs from the run that saved it."""
    stop_requested: Callable[[], bool] = lambda: False
    """Asked after every step; when true the loop saves and returns."""
    fp16: bool = False
    row_tokens: int | None = None
    """Tokens in a packed row; None: micro-batches are padded."""
    deadline: float | None = None
    """Moment of `time.monotonic` after whose step the loop saves and pauses; None: never."""
    start: Start | None = None
    """Where `find_start` has found that it begins; None: it is asked when the loop starts."""


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
    paused_by: str | None = None
    """The setting that ended it before its last step, `training.pause_at_fraction` or `training.max_hours`; the run resumes."""


@dataclass
class Totals:
    """Sums over micro-batches of all ranks: of one step, of the steps between two log lines, or of this process."""

    loss: float = 0.0
    weight: float = 0.0
    targets: int = 0
    tokens: int = 0
    positions: int = 0

    def add(self, other: Totals) -> None:
        for kind in fields(self):
            setattr(self, kind.name, getattr(self, kind.name) + getattr(other, kind.name))


class Clock:
    """Adds up wall seconds by phase. On CUDA the phases show launch times: kernels run on after a phase ends."""

    def __init__(self, heartbeat: Callable[[str], None] = lambda phase: None) -> None:
        """`heartbeat` is called with the name of every phase that begins."""
        self._heartbeat = heartbeat
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the body to `name`."""
        self._heartbeat(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def describe_seconds(seconds: Mapping[str, float]) -> str:
    """Return one line: each phase with its seconds and share, longest first."""
    whole = sum(seconds.values()) or 1.0
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {spent:.1f} s ({spent / whole:.0%})" for name, spent in ordered)


def train_model(job: Job) -> TrainOutput:
    """Run the loop to its end, or until it is asked to stop.

    Raises:
        TrainingError: the loss or its gradient is not finite.
        CheckpointError: `resume` cannot be honoured.
    """
    total = job.plan.total_steps
    schedule = build_schedule(job.engine.optimizer, total, job.config)
    counters = _resume(job, schedule)
    world = job.engine.world
    clock = Clock(lambda phase: world.heartbeat(f"step {counters.step + 1}, {phase}"))
    of_process, window, logged_at = Totals(), Totals(), time.perf_counter()
    if counters.step and _evaluation_is_due(job, counters):
        # The run was stopped in the middle of it.
        with clock.phase("evaluation"):
            _evaluate(job, counters)
    if counters.step and world.any(job.stop_requested()):
        log.info("nothing to do: the training was stopped after step %d of %d", counters.step, total)
        return TrainOutput(counters, clock.seconds)
    first, end, warmed_up = counters.step, pause_step(total, job.config.pause_at_fraction), 0.0
    job.engine.model.train()
    with progress_bar("training", total, counters.step) as bar:
        while counters.step < end:
            batches, step, losses_M = _accumulate(job, counters, clock)
            with clock.phase("optimiser"):
                grad_norm = _update(job, counters, batches, step, losses_M)
            rate = float(schedule.get_last_lr()[0])
            schedule.step()
            _count(counters, step)
            window.add(step)
            of_process.add(step)
            last = counters.step == total
            if counters.step % job.config.logging_steps == 0 or counters.step == end:
                speed = window.tokens / (time.perf_counter() - logged_at)
                job.log(_log_values(job, counters, window, rate, grad_norm, speed), counters.step)
                window, logged_at = Totals(), time.perf_counter()
            bar.advance(1, **_bar_words(of_process, clock.seconds, step, memory_in_use_bytes(job.device.type)))
            if counters.step == first + 1:
                warmed_up = _training_seconds(clock.seconds)
            elif counters.step == first + 1 + _TIMED_STEPS and world.is_main:
                pace = (_training_seconds(clock.seconds) - warmed_up) / _TIMED_STEPS
                left = None if job.deadline is None else job.deadline - time.monotonic()
                log.info("%s", describe_pace(pace, counters.step, end, left))
            best = False
            if _evaluation_is_due(job, counters):
                with clock.phase("evaluation"), contextlib.suppress(StopSignal):
                    best = _evaluate(job, counters)
            asked = world.any(job.stop_requested())
            late = job.deadline is not None and world.any(time.monotonic() >= job.deadline)
            stop = (asked or late or counters.step == end) and not last
            if last or stop or best or (job.config.save_steps and counters.step % job.config.save_steps == 0):
                with clock.phase("saving"):
                    _save(job, counters, schedule)
            if stop:
                paused_by = None if asked else "training.max_hours" if counters.step < end else _PAUSE
                log.warning("%s: saved after step %d of %d", paused_by or "asked to stop", counters.step, total)
                return TrainOutput(counters, clock.seconds, paused_by)
    # Short of all steps only when the checkpoint had reached `end` before.
    return TrainOutput(counters, clock.seconds, _PAUSE if counters.step < total else None)


_PAUSE = "training.pause_at_fraction"

_TIMED_STEPS = 3
"""Steps that tell the time of all; the one before them, in which much is made once, does not count."""


def describe_pace(seconds: float, step: int, end: int, left: float | None) -> str:
    """Return one line: the time from `step` to `end` at so many seconds a step.

    Args:
        left: Seconds until `training.max_hours`; None: no limit.
    """
    needed = seconds * (end - step)
    line = f"{seconds:.2g} s a step: {duration(needed)} for the {end - step:,} steps left, without evaluations"
    if left is not None and left < needed:
        line += f"; training.max_hours ends it near step {step + max(0, round(left / seconds)):,}"
    return line


def pause_step(total: int, pause_at_fraction: float) -> int:
    """Return the step at which `training.pause_at_fraction` ends a training of `total` steps."""
    return max(1, min(total, round(pause_at_fraction * total)))


def choose_row_tokens(config: TrainingConfig, max_length: int, leak: str | None, *, cuda: bool) -> int | None:
    """Return the tokens of a packed row, or None for padded micro-batches, and say what `auto` took.

    Args:
        leak: What packed conversations do to each other in this model, in words; None: nothing.

    Raises:
        ConfigError: packing was asked for, and packed conversations would not be computed as if each were alone.
    """
    # On a CPU time goes with the tokens that are not padding, whatever row they are in.
    packs = config.packing == "true" or (config.packing == "auto" and cuda and leak is None)
    if config.packing == "true" and leak is not None:
        raise ConfigError(f"training.packing=true: {leak}; training.packing=false pads instead")
    if config.packing == "auto":
        log.info("training.packing=auto: %s", "packed rows" if packs else "one conversation a row")
    return max_length * config.per_device_batch_size if packs else None


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


def _measure(job: Job, batches: list[Batch]) -> Totals:
    names = ("weight", "targets", "tokens", "positions")
    sums = job.engine.world.totals([sum(getattr(batch, name) for batch in batches) for name in names])
    return Totals(0.0, sums[0], *(int(each) for each in sums[1:]))


def seed_micro_batch(seed: int, step: int, ids: Sequence[str]) -> None:
    """Let what one micro-batch draws, such as dropout, follow from its step and conversations: so on any rank, or resumed."""
    digest = hashlib.sha256(repr((seed, step, *ids)).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


_CPU_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: torch says it on a CPU in a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_WORDS)


def accumulate_within_memory(
    attempt: Callable[[int], T], size: int, zero_grad: Callable[[], None], *, step: int, alone: bool = True
) -> tuple[int, T]:
    """Run `attempt` on one step's micro-batches of `size`, or of half of it, and so on: (the size that fits, its result).

    `attempt` makes gradients and changes nothing else; `zero_grad` drops those of a failed one.

    Raises:
        TrainingError: one conversation at a time is too much, or other ranks wait in the middle of the step.
    """
    while True:
        try:
            return size, attempt(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            words = " ".join(str(error).split())[:200] or type(error).__name__
        # After the except clause: the traceback holds the tensors of the attempt.
        zero_grad()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found = f"step {step}: out of memory with training.per_device_batch_size={size} ({words})"
        if size == 1:
            raise TrainingError(
                f"step {step}: out of memory with one conversation, or one packed row, at a time ({words}). "
                "training.gradient_checkpointing=true, training.packing=false or a smaller dataset.max_length needs less"
            )
        if not alone:
            raise TrainingError(
                f"{found}; between several processes it is not halved by itself. training.per_device_batch_size={size // 2} "
                "with twice the training.gradient_accumulation_steps trains the same, from a new run folder"
            )
        size //= 2
        log.warning("%s; %d from here on, with the same conversations in a step", found, size)


def _accumulate(job: Job, counters: Counters, clock: Clock) -> tuple[list[Batch], Totals, torch.Tensor]:
    """Add up the gradients of one step: (micro-batches, sums over ranks, summed losses (M,) of this rank)."""
    engine = job.engine

    def attempt(per_device_batch_size: int) -> tuple[list[Batch], Totals, torch.Tensor]:
        with clock.phase("data"):
            batches = step_batches(job, counters.step, per_device_batch_size)
            step = _measure(job, batches)
        losses: list[torch.Tensor] = []
        for number, batch in enumerate(batches, start=1):
            seed_micro_batch(job.plan.seed, counters.step, batch.ids)
            with engine.micro_batch(last=number == len(batches)):
                with clock.phase("forward"):
                    loss = engine.loss(batch)
                with clock.phase("backward"):
                    engine.backward(loss / (step.weight or 1.0))
            losses.append(loss.detach())
        return batches, step, torch.stack(losses)

    wanted = counters.per_device_batch_size or job.config.per_device_batch_size
    fitting, made = accumulate_within_memory(
        attempt, wanted, engine.zero_grad, step=counters.step + 1, alone=engine.world.size == 1
    )
    if fitting != wanted:
        counters.per_device_batch_size = fitting
    return made


def _update(job: Job, counters: Counters, batches: list[Batch], step: Totals, losses_M: torch.Tensor) -> float:
    """Make one optimiser step, or leave it out; set the step's loss and return the gradient's norm before clipping."""
    engine = job.engine
    # One copy from the device for both: the only time in a step that the host waits for it.
    norm, total = engine.clip(job.config.max_grad_norm), engine.world.sum(losses_M.sum())
    grad_norm, step.loss = torch.stack([norm.to(total), total]).tolist()
    # Under fp16 a gradient that overflows is left to the gradient scaler, which skips the step and lowers its scale.
    if step.weight > 0 and math.isfinite(step.loss) and (math.isfinite(grad_norm) or job.fp16):
        counters.skipped_in_a_row = 0
        engine.step()
    else:
        counters.skipped += 1
        counters.skipped_in_a_row += 1
        report_nonfinite(
            engine, job.config, batches, losses_M, grad_norm, step=counters.step + 1, in_a_row=counters.skipped_in_a_row
        )
        engine.zero_grad()
    return float(grad_norm)


def _count(counters: Counters, step: Totals) -> None:
    counters.step += 1
    counters.tokens += step.tokens
    counters.targets += step.targets


def _log_values(
    job: Job, counters: Counters, window: Totals, rate: float, grad_norm: float, tokens_per_second: float
) -> dict[str, float]:
    values = {
        "train/loss": window.loss / (window.weight or math.nan),
        "train/learning_rate": rate,
        "train/grad_norm": grad_norm,
        "train/epoch": job.plan.epoch(counters.step),
        "train/tokens": counters.tokens,
        "train/tokens_per_second": tokens_per_second,
        "train/labelled_share": window.targets / window.tokens,
        "train/padding_share": 1 - window.tokens / window.positions,
    }
    if counters.skipped:
        values["train/skipped_steps"] = counters.skipped
    return values


def _training_seconds(seconds: Mapping[str, float]) -> float:
    """Return the seconds in which a training trains, and neither evaluates nor saves."""
    return sum(seconds.get(name, 0.0) for name in ("data", "forward", "backward", "optimiser"))


def _bar_words(of_process: Totals, seconds: Mapping[str, float], step: Totals, memory_bytes: int) -> dict[str, str]:
    """Return what stands beside the progress bar: all of this process, and the loss of the last step."""
    training = _training_seconds(seconds)
    return {
        "loss": f"loss {step.loss / (step.weight or math.nan):.3f}",
        "speed": f"{of_process.tokens / max(training, 1e-9):,.0f} tokens/s",
        "labelled": f"{of_process.targets / max(of_process.tokens, 1):.0%} labelled",
        "padding": f"{1 - of_process.tokens / max(of_process.positions, 1):.0%} padding",
        "memory": f"{memory_bytes / 1e9:.1f} GB",
    }


def _evaluation_is_due(job: Job, counters: Counters) -> bool:
    if not job.evaluation_steps or counters.evaluated == counters.step:
        return False
    return counters.step % job.evaluation_steps == 0 or counters.step == job.plan.total_steps


def _evaluate(job: Job, counters: Counters) -> bool:
    """Measure, log, and say whether this is the best step so far."""
    metrics = job.evaluate(counters.step)
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
    plain_schedule = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
    if not engine.world.is_main:
        # In the order in which rank 0 writes them.
        weights.join_collective()
        optimizer.join_collective()
        return
    save_checkpoint(
        job.checkpoints,
        counters.step,
        {"trained": weights, "optimizer": optimizer},
        {
            "counters": asdict(counters),
            "identity": dict(job.fingerprint),
            "engine": engine.settings(),
            "schedule": plain_schedule,
        },
    )
    prune_checkpoints(job.checkpoints, job.config.save_total_limit, counters.best_step)


def _resume(job: Job, schedule: torch.optim.lr_scheduler.LRScheduler) -> Counters:
    start = job.start or find_start(job.checkpoints, job.config, job.fingerprint, job.engine.world)
    if start.checkpoint is None:
        if job.engine.world.is_main:
            clear_unfinished(job.checkpoints, after=0)
        job.on_start(0, {})
        return Counters()
    checkpoint = load_checkpoint(start.checkpoint, check=False)
    state = checkpoint.state
    if job.engine.world.is_main:
        clear_unfinished(job.checkpoints, after=checkpoint.step)
    job.engine.load(checkpoint.tensors["trained"], checkpoint.tensors["optimizer"], state["engine"])
    lambdas = [None] * len(job.engine.optimizer.param_groups)
    schedule.load_state_dict(state["schedule"] | {"lr_lambdas": lambdas})
    log.info("resuming from %s", checkpoint.path)
    job.on_start(checkpoint.step, start.changes)
    return Counters(**state["counters"])
