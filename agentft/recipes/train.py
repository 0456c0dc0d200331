"""The main job, top to bottom: prepare data, load the model, measure it, train it, measure it again, say what changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from agentft import progress, runtime, slurm
from agentft.data.batches import StepPlan
from agentft.data.render import Template
from agentft.data.template_choice import choose_template
from agentft.data.tokens import SegmentEncoder
from agentft.distributed.engines import loads_on_cpu, make_engine
from agentft.distributed.spread import lead
from agentft.errors import RunError
from agentft.evaluation.answer_file import Answerer
from agentft.model.adapters import count_parameters, prepare_for_training, rate_factors
from agentft.model.config import FullConfig, trains_weights
from agentft.model.liger import LigerKernels
from agentft.model.light_imports import import_model_libraries
from agentft.model.load import (
    ModelFiles,
    choose_attention,
    choose_dtype,
    choose_kernels,
    load_model,
    load_tokenizer,
    locate_model,
)
from agentft.model.native import Kernels
from agentft.model.quantization import quantization_config
from agentft.recipes.config import TrainConfig
from agentft.recipes.exam import (
    Candidate,
    Exam,
    exam_steps,
    own_candidate,
    own_share,
    require_own_exam,
    sit_exam,
    write_exam,
)
from agentft.recipes.final import write_final
from agentft.recipes.identity import identity
from agentft.recipes.memory_check import check_memory
from agentft.recipes.prepare import PreparedData, prepare_data, write_manifest
from agentft.recipes.ranks import (
    is_spread,
    loads_mapped,
    on_ranks,
    rank_of,
    require_ranks,
    resolved,
    threads_of_rank,
)
from agentft.recipes.report import show_exams
from agentft.recipes.saved import config_to_yaml
from agentft.recipes.watch import Watch
from agentft.runs import RunFolder, RunState
from agentft.signals import StopSignal, StopSignals
from agentft.tracking import Tracker
from agentft.training.clock import describe_seconds
from agentft.training.compilation import compile_blocks
from agentft.training.engine import Engine
from agentft.training.loop import Job, Outcome, train_model
from agentft.training.loss import LabelledLoss
from agentft.training.memory_snapshot import snapshot_on_out_of_memory
from agentft.training.packing import choose_row_tokens
from agentft.world import ALONE, World

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to."""

    run_dir: Path
    objective: float | None
    """The number a sweep sorts by: `arg_f1` of the answers after training; without them the best `evaluation.best_metric`."""
    summary: dict[str, Any]
    paused: bool = False
    """It has reached `training.stop_at` and not its last step."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that is loaded for a run: where it computes, what it talks with, what it learns from."""

    device: runtime.Device
    dtype: torch.dtype
    files: ModelFiles
    tokenizer: Any
    template: Template
    stop_id: int
    data: PreparedData
    model: torch.nn.Module
    kernels: Kernels | LigerKernels | None = None
    """What computes row-wise parts in torch's place, where it serves."""

    @property
    def pad_id(self) -> int:
        """Any id serves: padding is masked in attention and loss by position, never by id."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_id


def train(config: TrainConfig) -> TrainResult:
    """Run the main job in `config.run_dir` and return what it came to.

    Where `distributed` asks for ranks this starts them, and each runs the job with its share of the work.

    Raises:
        AgentftError: anything the user can act on; the run folder's status says so too.
        StopSignal: a signal ended the run; what it had reached is saved, and the same command in its folder goes on.
    """
    if is_spread(config):
        result: TrainResult = on_ranks(train_rank, config)
        return result
    return _train_as(config, ALONE)


def train_rank(payload: str) -> TrainResult:
    """Run this process's part of the job, whose resolved settings are `payload`; other processes run the others."""
    config = resolved(payload)
    with rank_of(config.distributed, config.run_dir) as world:
        require_ranks(config, world.size)
        return _train_as(dataclasses.replace(config, threads=config.threads or threads_of_rank()), world)


def _train_as(config: TrainConfig, world: World) -> TrainResult:
    folder = RunFolder.create(config.run_dir) if world.is_main else RunFolder.follow(config.run_dir)
    with StopSignals() as signals, folder as run:
        said = run.log_file if world.is_main else run.rank_log(world.rank)
        said.parent.mkdir(parents=True, exist_ok=True)
        progress.set_up_logging(said)
        run.update_status("running", step=0)
        try:
            result = _train(config, run, signals, world)
        except BaseException as error:
            _conclude(error, run, world)
            raise
        run.update_status("paused" if result.paused else "finished", objective=result.objective)
        return result


def _conclude(error: BaseException, run: RunFolder, world: World) -> None:
    """Write down how a run ended that did not finish; nothing here may hide `error`."""
    asked = isinstance(error, KeyboardInterrupt)
    state: RunState = "stopped" if asked else "failed"
    log.error("%s: %s", type(error).__name__, error, exc_info=not asked)
    try:
        run.update_status(state, error=f"{type(error).__name__}: {error}")
    except (OSError, RunError) as second:  # a full disk, most likely the reason of the first
        log.error("%s cannot be written: %s", run.status_file, second)
    if isinstance(error, StopSignal) and error.asks_for_another_turn and world.is_main:
        slurm.requeue()


def _train(config: TrainConfig, run: RunFolder, signals: StopSignals, world: World) -> TrainResult:
    require_own_exam(config.evaluation)
    plan = check_memory(config)
    estimate = plan.estimate
    with world.at_work("preparing data and model"):
        bench = set_up_bench(config, world)
    # One choice for all ranks: those that shard exchange weights in every pass, the second one too.
    engine = set_up_engine(config, bench, world, checkpointing=world.broadcast(plan.checkpointing))
    write_manifest(bench.data, run)
    run.write_record(
        config_yaml=config_to_yaml(config),
        command=[sys.executable, *sys.argv],
        choices=choices(config),
        extra={
            "device": bench.device.name,
            "threads": bench.device.threads,
            "dtype": str(bench.dtype).removeprefix("torch."),
            "model_fingerprint": bench.files.fingerprint,
            "model_commit": bench.files.commit,
            "estimated_memory_bytes": estimate and estimate.total,
            "data_fingerprint": bench.data.fingerprint,
            "run_id": run_id(config),
        },
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
    with tracker:
        before = _exam_before(config, bench, engine, run, tracker)
        outcome = _fit(config, bench, engine, run, tracker, signals)
        write_final(bench.model, config.sft_type, bench.tokenizer, run, engine)
        after = _examine("after", config, bench, engine, run, tracker) if config.evaluation.after else None
        summary = _summary(bench, outcome, before, after)
        tracker.summary(summary)
        tracker.artifact(f"adapter-{run.path.name}", "model", run.final)
        tracker.artifact(f"data-{run.path.name}", "dataset", run.data_manifest.parent)
        show_exams([before, after], run, examples=config.evaluation.examples)
        log.info("time: %s", describe_seconds(outcome.seconds))
        log.info("run folder: %s", run.path)
    return TrainResult(run.path, _objective(outcome, after, config.evaluation.best_metric), summary, outcome.paused)


def set_up_bench(config: TrainConfig, world: World = ALONE) -> Bench:
    """Load tokenizer and data first, then the model: a mistake in the data must not wait for the weights."""
    import_model_libraries()
    device = runtime.set_up(config.threads)
    runtime.seed_everything(config.seed)
    dtype = choose_dtype(config.model.dtype, device)
    attention = choose_attention(config.model.attention, device, dtype)
    quantization = quantization_config(config.sft_type, dtype)
    compiled = None if config.training.compile else choose_kernels(config.model, config.sft_type, device, dtype)
    # What is fetched or converted is so once, by rank 0, and then found by the others.
    files = world.first(lambda: locate_model(config.model))
    tokenizer = load_tokenizer(files, config.model)
    template = choose_template(config.model.template, tokenizer, config.model.stop_token)
    encoder = SegmentEncoder(tokenizer)
    data = prepare_data(config.dataset, template, encoder)
    # Weights that are trained stay in fp32, so a full fine-tuning loads them so; adapters are fp32 on a frozen base.
    mapped = loads_mapped(config)
    weights_dtype = torch.float32 if isinstance(config.sft_type, FullConfig) else dtype
    place = dataclasses.replace(device, kind="cpu") if loads_on_cpu(config.distributed) and world.size > 1 else device
    model = load_model(
        files,
        config.model,
        device=place,
        dtype=None if mapped else weights_dtype,
        attention=attention,
        quantization=quantization,
    )
    runtime.seed_everything(config.seed)
    model = prepare_for_training(model, config.sft_type, config.model, compiled, cast=not mapped)
    log.info("model: %s on %s, %s; %s", config.model.name, device.name, dtype, count_parameters(model))
    stop_id = encoder.special_id(template.stop_token)
    return Bench(device, dtype, files, tokenizer, template, stop_id, data, model, compiled)


def set_up_engine(config: TrainConfig, bench: Bench, world: World, *, checkpointing: bool) -> Engine:
    """Hand the loaded model to the engine of `distributed`."""
    mixed = trains_weights(config.sft_type) and bench.dtype != torch.float32
    # Engines that shard gather the head's weight only around a call of the head.
    sharded = loads_on_cpu(config.distributed)
    objective = LabelledLoss(
        bench.model,
        autocast=bench.dtype if mixed else None,
        rate_factors=rate_factors(config.sft_type),
        kernels=None if sharded or isinstance(bench.kernels, LigerKernels) else bench.kernels,
        reads_head=not sharded,
    )
    if checkpointing:
        bench.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if config.training.compile:
        compile_blocks(bench.model)
    fp16 = bench.dtype is torch.float16
    frozen = bench.dtype if loads_mapped(config) else None
    return make_engine(config.distributed, objective, config.training, world, fp16=fp16, frozen=frozen)


def _exam_before(config: TrainConfig, bench: Bench, engine: Engine, run: RunFolder, tracker: Tracker) -> Exam | None:
    """Measure the untrained model. Adapters start at zero, so this is the model as it came."""
    if not config.evaluation.before:
        return None
    return _examine("before", config, bench, engine, run, tracker)


def _examine(
    name: str, config: TrainConfig, bench: Bench, engine: Engine, run: RunFolder, tracker: Tracker
) -> Exam | None:
    """Sit an exam with the models of all ranks; rank 0 gets it."""
    steps = exam_steps(bench.data, bench.template, config.evaluation.conversations)
    with engine.whole():
        candidate = own_candidate(
            bench.model,
            bench.tokenizer,
            config.evaluation,
            stop_id=bench.stop_id,
            fingerprint=bench.files.fingerprint,
        )

        def sit(answerer: Answerer) -> Exam:
            # Known by its weights: on resume, what was measured before training is read and never taken from trained
            # weights.
            asked = Candidate(answerer, candidate.identity)
            seen = bench.data.train_tools
            return sit_exam(name, asked, steps, config.evaluation, run=run, seen_tools=seen, reuse=True)

        with own_share(name, candidate, run, engine.world) as own:
            exam = lead(engine.world, own, sit)
    if exam is not None:
        tracker.log_predictions(name, write_exam(exam, run, bench.data))
    return exam


def _fit(
    config: TrainConfig, bench: Bench, engine: Engine, run: RunFolder, tracker: Tracker, signals: StopSignals
) -> Outcome:
    """Train, with everything the loop needs to know said here."""
    training = config.training
    if bench.device.is_cuda:
        snapshot_on_out_of_memory(run.path)
    plan = StepPlan(
        examples=len(bench.data.train),
        examples_per_step=training.micro_batch * training.accumulation,
        epochs=training.epochs,
        max_steps=training.max_steps,
        seed=config.seed,
    )
    log.info(
        "training: %d steps of %d conversations, learning rate %g",
        plan.total_steps,
        plan.examples_per_step,
        training.learning_rate,
    )
    watch = Watch(config.evaluation, bench, engine, run, total_steps=plan.total_steps)

    def start(step: int, changes: list[str]) -> None:
        if step == 0 and run.was_started_before():
            log.warning("no checkpoint was saved before: the training starts at step 0 again")
        tracker.rewind(step)
        watch.resume(step)
        if changes:
            run.add_to_record(allowed_changes=changes)

    def evaluate(step: int) -> Mapping[str, float]:
        # Ranks that leave it at different places would wait for each other.
        with signals.at_once() if engine.world.size == 1 else nullcontext():
            return watch.evaluate(step)

    def record(values: Mapping[str, float], step: int) -> None:
        tracker.log(values, step=step)
        run.update_status(
            "running", step=step, steps=plan.total_steps, **{k.replace("/", "_"): v for k, v in values.items()}
        )
        if "train/loss" in values:
            log.info(
                "step %d of %d: loss %.4f, %s tokens/s",
                *(step, plan.total_steps, values["train/loss"]),
                f"{values['train/tokens_per_second']:,.0f}",
            )

    # Dropout draws from here on: what was measured before must not change the training.
    runtime.seed_everything(config.seed)
    job = Job(
        engine=engine,
        examples=bench.data.train,
        plan=plan,
        config=training,
        pad_id=bench.pad_id,
        device=runtime.torch_device(bench.device),
        checkpoints=run.checkpoints,
        identity=identity(config, bench, plan, ranks=engine.world.size),
        evaluate=evaluate,
        evaluation_steps=config.evaluation.steps,
        best_metric=config.evaluation.best_metric,
        rank=config.evaluation.rank,
        log=record,
        on_start=start,
        stop_requested=lambda: signals.is_requested() or watch.is_exhausted(),
        fp16=bench.dtype is torch.float16,
        row_tokens=choose_row_tokens(training, config.dataset.max_length, bench.model, cuda=bench.device.is_cuda),
    )
    with signals.deferred():
        outcome = train_model(job)
    steps = f"{outcome.counters.step} of {plan.total_steps}"
    signals.raise_if_requested(f" after step {steps}, which is saved; run_dir={run.path} goes on from there")
    if outcome.paused:
        # Not in metrics.jsonl, where it would count for `evaluation.patience` when the run goes on.
        run.update_status("running", step=outcome.counters.step, steps=plan.total_steps, eval_loss=watch.loss())
    return outcome


def choices(config: TrainConfig) -> dict[str, str]:
    """Return which option each group took."""
    groups = ("model", "sft_type", "dataset", "distributed")
    return {group: getattr(config, group).name for group in groups}


def run_id(config: TrainConfig) -> str:
    """Return a short id that stays the same when the run is resumed in its folder."""
    settings = asdict(config)
    del settings["training"]["stop_at"]  # it says how far to go this time
    del settings["distributed"], settings["threads"]  # nor does it matter where
    tree = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{Path(config.run_dir).resolve()}{tree}".encode()).hexdigest()[:12]


def _summary(bench: Bench, outcome: Outcome, before: Exam | None, after: Exam | None) -> dict[str, Any]:
    counters = outcome.counters
    parameters = count_parameters(bench.model)
    summary: dict[str, Any] = {
        "steps": counters.step,
        "tokens": counters.tokens,
        "labelled_tokens": counters.targets,
        "best_value": counters.best_value,
        "best_loss": counters.best_loss,
        "best_step": counters.best_step,
        "skipped_steps": counters.skipped,
        "trained_parameters": parameters.trained,
        "parameters": parameters.total,
        "peak_memory_bytes": runtime.peak_memory_bytes(bench.device),
        "seconds": {name: round(seconds, 3) for name, seconds in outcome.seconds.items()},
    }
    for exam in (before, after):
        if exam is not None:
            summary[exam.name] = {name: metric.value for name, metric in exam.report.metrics.items()}
    return summary


def _objective(outcome: Outcome, after: Exam | None, best_metric: str) -> float | None:
    """What a sweep ranks by, or None where nothing was measured: that is no score of 0."""
    if after is not None:
        return after.value("arg_f1")
    if best_metric != "loss":
        return outcome.counters.best_value
    loss = outcome.counters.best_loss
    return None if loss is None else -loss
