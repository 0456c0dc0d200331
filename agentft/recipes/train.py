"""The main job, top to bottom: prepare data, load the model, measure it, train it, measure it again, say what changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agentft import progress, runtime
from agentft.data.batches import StepPlan
from agentft.data.prepare import prepare_data
from agentft.data.prepared import write_manifest
from agentft.distributed.config import EngineKind, require_engine
from agentft.distributed.engines import loads_on_cpu
from agentft.distributed.launch import as_stop, rank_of, run_on_ranks, threads_of_rank
from agentft.errors import AgentftError, CheckpointError, ConfigError, RunError
from agentft.evaluation.config import EvaluationConfig
from agentft.model.adapters import count_parameters
from agentft.model.config import Dtype, QloraConfig, trains_weights
from agentft.model.load import choose_compute, load_chat_tokenizer
from agentft.model.quantization import require_dense
from agentft.model.sources import model_settings
from agentft.recipes.components import (
    MemoryPlan,
    TrainingComponents,
    load_components,
    loads_mapped,
    plan_memory,
    run_fingerprint,
    set_up_engine,
    workload,
)
from agentft.recipes.config import TrainConfig, changed_settings, config_from_yaml, config_to_yaml, deciding
from agentft.recipes.evaluation_run import (
    EvalResult,
    Evaluation,
    Validator,
    own_generator,
    own_identity,
    print_report,
    require_own_model,
    write_pages,
)
from agentft.recipes.export import write_final
from agentft.runs import RunFolder
from agentft.runtime import ALONE, HEARTBEAT_VARIABLE, World
from agentft.signals import StopSignal, StopSignals, requeue_slurm_job
from agentft.tracking import Tracker
from agentft.training.checkpoint import find_start
from agentft.training.engine import Engine
from agentft.training.guards import snapshot_on_out_of_memory
from agentft.training.loop import Job, TrainOutput, choose_row_tokens, describe_seconds, train_model
from agentft.training.run_fingerprint import described

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to."""

    run_dir: Path
    objective: float | None
    """The number a sweep sorts by: `arg_f1` of the answers after training; without them the best `evaluation.best_metric`."""
    summary: dict[str, Any]
    paused: bool = False
    """It has reached `training.pause_at_fraction` or `training.max_hours` and not its last step."""


def train(config: TrainConfig) -> TrainResult:
    """Run the main job in `config.run_dir` and return what it came to.

    Where `distributed` asks for ranks this starts them, and each runs the job with its share of the work.

    Raises:
        AgentftError: anything the user can act on; the run folder's status says so too, but of a start that is refused.
        StopSignal: a signal ended the run; what it had reached is saved, and the same command in its folder resumes.
    """
    with _another_turn_asked_for(), StopSignals.shared() as signals, signals.at_once():
        if config.distributed.engine is EngineKind.single:
            return _train_as(config, ALONE)
        result: TrainResult = run_on_ranks(
            train_rank,
            config_to_yaml(config),
            config.distributed,
            folder=config.run_dir,
            threads=config.threads,
            require=partial(_require_ranks, config),
        )
        return result


def _train(config: TrainConfig, run: RunFolder, signals: StopSignals, world: World) -> TrainResult:
    started, hours = time.monotonic(), config.training.max_hours
    require_own_model(config.evaluation)
    with world.keep_alive("preparing data and model"):
        memory, components = load_for_training(config, world)
    # One choice for all ranks: those that shard exchange weights in every pass, the second one too.
    checkpointing = world.broadcast(memory.checkpointing)
    engine = set_up_engine(config.distributed, config.training, components, world, checkpointing=checkpointing)
    plan = StepPlan(
        examples=len(components.data.train),
        examples_per_step=config.training.per_device_batch_size * config.training.gradient_accumulation_steps,
        epochs=config.training.epochs,
        max_steps=config.training.max_steps,
        seed=config.seed,
    )
    fingerprint = run_fingerprint(
        config.sft_type,
        config.training,
        components,
        seed=config.seed,
        total_steps=plan.total_steps,
        engine=config.distributed.name,
        ranks=world.size,
    )
    # What can be refused is refused before anything is written.
    try:
        start = find_start(run.checkpoints, config.training, fingerprint, world)
    except CheckpointError as error:
        if run.has_run() and (changed := changed_settings(config, run)):
            raise ConfigError(f"{error}. Settings that differ: {described(changed)}") from error
        raise
    job = Job(
        engine=engine,
        examples=components.data.train,
        plan=plan,
        config=config.training,
        pad_id=components.chat.pad_id,
        device=torch.device(components.device.kind),
        checkpoints=run.checkpoints,
        fingerprint=fingerprint,
        start=start,
        fp16=components.dtype is torch.float16,
        row_tokens=choose_row_tokens(
            config.training, config.dataset.max_length, components.probed.leak, cuda=components.device.is_cuda
        ),
        deadline=None if hours is None else started + 3600 * hours,
    )
    if not run.begun:
        _begin(run)
    write_manifest(components.data, run)
    run.write_record(
        config_yaml=config_to_yaml(config),
        command=[sys.executable, *sys.argv],
        choices=choices(config),
        extra=_computed_by(components, memory) | {"run_id": run_id(config)},
    )
    tracker = Tracker(
        config.tracking,
        run,
        config_tree=asdict(config),
        run_id=run_id(config),
        group=config.experiment,
        name=run.path.name,
        tags=list(choices(config).values()),
        enabled=world.is_main,
    )
    evaluate = partial(_evaluate, config=config.evaluation, components=components, engine=engine, run=run)
    with tracker:
        log.info("%s", describe_training(job, components, memory))
        # Adapters start at zero, so before training this is the model as it came.
        before = evaluate("before") if config.evaluation.before else None
        output = _fit(job, config.evaluation, components, run, tracker, signals)
        write_final(components.model, config.sft_type, components.chat.tokenizer, run, engine)
        after = evaluate("after") if config.evaluation.after else None
        summary = _summary(components, output, before, after)
        tracker.summary(summary)
        tracker.artifact(f"adapter-{run.path.name}", "model", run.final)
        tracker.artifact(f"data-{run.path.name}", "dataset", run.data_manifest.parent)
        for result in (before, after):
            if result is not None:
                tracker.log_predictions(result.name, result.rows)
        write_pages([before, after], run)
        print_report([before, after], run, examples=config.evaluation.examples)
        log.info("time: %s", describe_seconds(output.seconds))
        if output.paused_by:
            told = "the same command" if output.paused_by == "training.max_hours" else "a larger share"
            log.warning(
                "paused by %s after step %d of %d, and measured there: %s resumes",
                *(output.paused_by, output.counters.step, plan.total_steps, told),
            )
        log.info("run folder: %s", run.path)
    paused = output.paused_by is not None
    return TrainResult(run.path, _objective(output, after, config.evaluation.best_metric), summary, paused)


def load_for_training(config: TrainConfig, world: World) -> tuple[MemoryPlan, TrainingComponents]:
    """Load tokenizer and data first, then the model: a mistake in the data must not wait for the weights."""
    device = runtime.set_up(config.threads)
    require_dense(model_settings(config.model), config.sft_type)
    memory = plan_memory(
        config.model,
        config.sft_type,
        workload(config.distributed, config.training, max_length=config.dataset.max_length, device=device),
        device,
        check=config.training.memory_check,
        checkpointing=config.training.gradient_checkpointing,
    )
    compute = choose_compute(config.model, config.sft_type, device, compiles=config.training.compile)
    # What is fetched or converted is so once, by rank 0, and then found by the others.
    chat = world.main_process_first(lambda: load_chat_tokenizer(config.model))
    data = prepare_data(config.dataset, chat.template, chat.encoder)
    asks = config.evaluation
    if not len(data.heldout) and (asks.before or asks.after or asks.eval_steps):
        raise ConfigError(
            "dataset.test_ratio=0: nothing is held out, but evaluation asks for it; give dataset.test_path, or "
            "evaluation.before=false evaluation.after=false evaluation.eval_steps=0"
        )
    components = load_components(
        config.model,
        config.sft_type,
        compute,
        chat,
        data,
        world,
        seed=config.seed,
        sharded=loads_on_cpu(config.distributed),
        mapped=loads_mapped(config.sft_type, config.distributed),
    )
    return memory, components


def _evaluate(
    name: str, config: EvaluationConfig, components: TrainingComponents, engine: Engine, run: RunFolder
) -> EvalResult | None:
    """Evaluate the model as it is now with all ranks; rank 0 gets the result."""
    evaluation = Evaluation(name, config, components.data, components.chat, run, engine.world)
    with engine.unsharded():
        # Known by its weights: on resume, what was measured before training is read and never taken from trained weights.
        identity = own_identity(components, config)
        return evaluation.by_completions(own_generator(components, config), identity, reuse=True)


def _fit(
    job: Job,
    config: EvaluationConfig,
    components: TrainingComponents,
    run: RunFolder,
    tracker: Tracker,
    signals: StopSignals,
) -> TrainOutput:
    """Train: `job` with what is measured, logged and asked for on the way."""
    plan, engine = job.plan, job.engine
    if components.device.is_cuda:
        snapshot_on_out_of_memory(run.path)
    validator = Validator(config, components, engine, run, total_steps=plan.total_steps)

    def start(step: int, changes: Mapping[str, str]) -> None:
        engine.world.broadcast(None)  # rank 0 has made the files that the others read here
        if step == 0 and run.was_started_before():
            log.warning("no checkpoint was saved before: the training starts at step 0 again")
        tracker.rewind(step)
        validator.resume(step)
        if changes:
            run.add_to_record(allowed_changes=[f"{name}: {change}" for name, change in changes.items()])

    def evaluate(step: int) -> Mapping[str, float]:
        # Ranks that leave it at different places would wait for each other.
        with signals.at_once() if engine.world.size == 1 else nullcontext():
            return validator.evaluate(step)

    def record(values: Mapping[str, float], step: int) -> None:
        tracker.log(values, step=step)
        measured = {name.replace("/", "_"): value for name, value in values.items()}
        run.update_status("running", step=step, steps=plan.total_steps, **measured)
        if "train/loss" in values:
            speed = f"{values['train/tokens_per_second']:,.0f}"
            log.info("step %d of %d: loss %.4f, %s tokens/s", step, plan.total_steps, values["train/loss"], speed)

    job = dataclasses.replace(
        job,
        evaluate=evaluate,
        evaluation_steps=config.eval_steps,
        best_metric=config.best_metric,
        rank=config.rank,
        log=record,
        on_start=start,
        stop_requested=lambda: signals.is_requested() or validator.is_exhausted(),
    )
    # Dropout draws from here on: what was measured before must not change the training.
    runtime.seed_everything(plan.seed)
    with signals.deferred():
        output = train_model(job)
        signals.agree(engine.world.gather(signals.requested))  # told at different moments, ranks leave together
    reached = output.counters.step
    signals.raise_if_requested(
        f" after step {reached} of {plan.total_steps}, which is saved; run_dir={run.path} resumes from there"
    )
    if output.paused_by and len(components.data.heldout):
        # Not in metrics.jsonl, where it would count for `evaluation.patience` when the run resumes.
        run.update_status("running", step=reached, steps=plan.total_steps, eval_loss=validator.loss())
    return output


def describe_training(job: Job, components: TrainingComponents, memory: MemoryPlan) -> str:
    """Return one line before the first step: what is trained, in how much memory, on how many tokens, in how many steps."""
    plan, epochs = job.plan, job.plan.epoch(job.plan.total_steps)
    tokens = epochs * sum(map(len, job.examples))
    return (
        f"training: {count_parameters(components.model)}; {memory.words(components.device.name)}; about {tokens:,.0f} tokens, "
        f"{epochs:.3g} epochs, in {plan.total_steps:,} steps of {plan.examples_per_step} conversations at learning rate "
        f"{job.config.learning_rate:g}"
    )


def choices(config: TrainConfig) -> dict[str, str]:
    """Return which option each group took."""
    groups = ("model", "sft_type", "dataset", "distributed")
    return {group: getattr(config, group).name for group in groups}


def run_id(config: TrainConfig) -> str:
    """Return a short id that stays the same when the run is resumed in its folder."""
    settings = deciding(asdict(config))
    del settings["distributed"], settings["threads"]  # it may resume elsewhere, equal but for its last bits
    tree = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{Path(config.run_dir).resolve()}{tree}".encode()).hexdigest()[:12]


def _computed_by(components: TrainingComponents, memory: MemoryPlan) -> dict[str, Any]:
    """Return what run.json says of machine, model and data."""
    files = components.chat.files
    return {
        "device": components.device.name,
        "threads": components.device.threads,
        "dtype": str(components.dtype).removeprefix("torch."),
        "left_to_transformers": components.probed.left,
        "model_fingerprint": files.fingerprint,
        "model_commit": files.commit,
        "estimated_memory_bytes": memory.estimate and memory.estimate.total,
        "data_fingerprint": components.data.fingerprint,
    }


def _summary(
    components: TrainingComponents, output: TrainOutput, before: EvalResult | None, after: EvalResult | None
) -> dict[str, Any]:
    counters, parameters = output.counters, count_parameters(components.model)
    return {
        "steps": counters.step,
        "tokens": counters.tokens,
        "labelled_tokens": counters.targets,
        "best_value": counters.best_value,
        "best_loss": counters.best_loss,
        "best_step": counters.best_step,
        "skipped_steps": counters.skipped,
        "paused_by": output.paused_by,
        "trained_parameters": parameters.trained,
        "parameters": parameters.total,
        "peak_memory_bytes": runtime.peak_memory_bytes(components.device),
        "seconds": {name: round(seconds, 3) for name, seconds in output.seconds.items()},
        **{
            result.name: {name: each["value"] for name, each in result.report["metrics"].items()}
            for result in (before, after)
            if result is not None
        },
    }


def _objective(output: TrainOutput, after: EvalResult | None, best_metric: str) -> float | None:
    """Return what a sweep ranks by, or None where nothing was measured: that is no score of 0."""
    if after is not None:
        return after.value("arg_f1")
    best = output.counters
    if best_metric != "loss":
        return best.best_value
    return None if best.best_loss is None else -best.best_loss


def train_rank(payload: str) -> TrainResult:
    """Run this process's part of the job, whose resolved settings are `payload`; other processes run the others."""
    config = config_from_yaml(payload, TrainConfig)
    with rank_of(config.distributed, config.run_dir) as world:
        _require_ranks(config, world.size)
        own = dataclasses.replace(config, threads=config.threads or threads_of_rank())
        # Where they have an agent, it asks, when all have ended.
        with _another_turn_asked_for() if world.is_main and HEARTBEAT_VARIABLE not in os.environ else nullcontext():
            return _train_as(own, world)


@contextmanager
def _another_turn_asked_for() -> Iterator[None]:
    """Ask SLURM to queue the job again where the body is stopped because its time is up."""
    try:
        yield
    except StopSignal as stop:
        if stop.signal.name == "SIGUSR1":  # SIGUSR2 is submitit's, which queues the job again itself
            requeue_slurm_job()
        raise


def _train_as(config: TrainConfig, world: World) -> TrainResult:
    folder = RunFolder.create(config.run_dir) if world.is_main else RunFolder.follow(config.run_dir)
    with StopSignals.shared() as signals, folder as run:
        progress.set_up_logging(run.log_file if world.is_main else run.rank_log(world.rank), held=True)
        if not run.has_run():
            _begin(run)
        try:
            result = _train(config, run, signals, world)
        except BaseException as error:
            found = error if world.size == 1 else as_stop(error)
            _conclude(found, run)
            if found is error:
                raise
            raise found from error
        run.update_status("paused" if result.paused else "finished", objective=result.objective)
        return result


def _begin(run: RunFolder) -> None:
    """From here on the run folder changes: in that of an earlier run only when it is sure to be the same training."""
    run.begin()
    progress.open_log_file()
    run.update_status("running", step=0)


def _conclude(error: BaseException, run: RunFolder) -> None:
    """Write down how a run ended that did not finish; nothing here may hide `error`."""
    if not run.begun:
        return
    asked, told = isinstance(error, KeyboardInterrupt), f"{type(error).__name__}: {error}"
    # The caller shows an error that a user can act on; its traceback is for the log file.
    log.error("%s", told, exc_info=not asked, extra={progress.FILE_ONLY: isinstance(error, AgentftError)})
    try:
        run.update_status("stopped" if asked else "failed", error=told)
    except (OSError, RunError) as second:  # a full disk, most likely the reason of the first
        log.error("%s cannot be written: %s", run.status_file, second)


def _require_ranks(config: TrainConfig, ranks: int) -> None:
    """Refuse a training that cannot run on so many ranks.

    Raises:
        ConfigError: says what is missing, or which numbers do not go together.
    """
    sft, distributed, passes = config.sft_type, config.distributed, config.training.gradient_accumulation_steps
    fp16_weights = config.model.dtype is Dtype.fp16 and trains_weights(sft)
    require_engine(distributed, gpus=torch.cuda.device_count(), fp16_weights=fp16_weights)
    if isinstance(sft, QloraConfig) and loads_on_cpu(distributed):
        raise ConfigError(
            f"distributed={distributed.name} with sft_type={sft.name}: quantised weights cannot be cut into shards; "
            "choose distributed=ddp or deepspeed_zero2"
        )
    if passes % ranks:
        raise ConfigError(
            f"training.gradient_accumulation_steps={passes}: the forward passes of a step cannot be shared evenly by "
            f"{ranks} ranks; choose a multiple of {ranks} (a step stays the same whatever the number of ranks)"
        )
