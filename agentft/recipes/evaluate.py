"""Answer a run's held-out conversations again, with any of its checkpoints or a served model, and score the answers."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentft import progress, runtime
from agentft.data.prepare import prepare_data
from agentft.data.prepared import PreparedData
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder
from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.distributed.spread import lead
from agentft.errors import CheckpointError, ConfigError, RunError
from agentft.evaluation.config import Engine, EvaluationConfig, Mode
from agentft.evaluation.openai import OpenAIEngine, endpoint_of
from agentft.evaluation.predictions import Generator
from agentft.evaluation.steps import shown_steps
from agentft.evaluation.vllm import VllmEngine, VllmModel, require_vllm
from agentft.model.adapters import load_trained_state, save_final
from agentft.model.config import QloraConfig, SftConfig
from agentft.model.load import choose_compute, load_chat_tokenizer
from agentft.recipes.components import TrainingComponents, load_components
from agentft.recipes.config import EvaluateConfig, TrainConfig
from agentft.recipes.evaluation_run import (
    EvalModel,
    exam_steps,
    own_candidate,
    own_share,
    run_evaluation,
    sit_likelihood,
    sit_replay,
    write_exam,
)
from agentft.recipes.ranks import find_places, is_spread, rank_of, run_on_ranks, threads_of_rank
from agentft.recipes.report import show_exams
from agentft.recipes.saved import config_from_yaml, config_to_yaml, saved_config, settings_to_yaml, trained_config
from agentft.runs import RunFolder, RunState, read_json
from agentft.training.checkpoint import list_checkpoints, load_checkpoint, read_state
from agentft.world import ALONE, World

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """What an evaluation came to."""

    objective: float | None
    """`arg_f1`, `conv_replay_success` or minus the loss, by `evaluation.mode`; None where it is not defined."""
    metrics_file: Path


@dataclass(frozen=True, slots=True)
class _Desk:
    """What every way of measuring needs: the questions and how they are laid out."""

    template: Layout
    encoder: SegmentEncoder
    data: PreparedData


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Evaluate `config.checkpoint` of the run `config.run` on the run's own held-out conversations.

    With `evaluation.engine=openai` a served model answers instead, and no weights are loaded. With `output` the run's
    folder is only read. Where `distributed` asks for ranks this starts them, and each answers its share.

    Raises:
        ConfigError: ranks are asked for where another program answers.
        RunError: no such run, or its data is no longer what it was trained on.
        CheckpointError: no such checkpoint, or it is damaged.
        EvaluationError: the endpoint gives no answers, or vllm is asked for and not installed.
    """
    if not is_spread(config.distributed):
        return _evaluate_as(config, ALONE)
    engine = (config.evaluation or trained_config(RunFolder.open(config.run).path, config.model).evaluation).engine
    if engine is not Engine.transformers:
        raise ConfigError(
            f"distributed={config.distributed.name} with evaluation.engine={engine}: ranks share out what the run's model "
            "answers here; whoever serves the model spreads it over devices by itself. Choose distributed=single"
        )
    if config.distributed.engine is not EngineKind.ddp:
        progress.console().print(
            f"distributed={config.distributed.name}: answers need no gradients, so each rank holds the model whole, as with "
            "ddp",
            highlight=False,
        )
    folder = config.output or config.run
    places = find_places(config.distributed, folder)
    result: EvaluateResult = run_on_ranks(
        evaluate_rank, settings_to_yaml(config), places, config.distributed, folder=folder, threads=config.threads
    )
    return result


def evaluate_rank(payload: str) -> EvaluateResult:
    """Answer this process's share of an evaluation, whose settings are `payload`; other processes answer the others."""
    config = config_from_yaml(payload, EvaluateConfig)
    with rank_of(config.distributed, config.output or config.run) as world:
        return _evaluate_as(dataclasses.replace(config, threads=config.threads or threads_of_rank()), world)


def _evaluate_as(config: EvaluateConfig, world: World) -> EvaluateResult:
    source = RunFolder.open(config.run)
    trained = trained_config(source.path, config.model)
    settings = config.evaluation or trained.evaluation
    # No engine: each rank holds the model whole.
    alone = DistributedConfig(name="single")
    trained = dataclasses.replace(trained, threads=config.threads or trained.threads, distributed=alone)
    folder = config.output or source.path
    with RunFolder.create(folder) if world.is_main else RunFolder.follow(folder) as target:
        said = target.path / "evaluate.log" if world.is_main else target.rank_log(world.rank)
        progress.set_up_logging(said, held=True)
        if config.output is None:
            return _evaluate(config, trained, settings, source, target, world)
        return _evaluate_apart(config, trained, settings, source, target, world)


def _evaluate_apart(
    config: EvaluateConfig,
    trained: TrainConfig,
    settings: EvaluationConfig,
    source: RunFolder,
    target: RunFolder,
    world: World,
) -> EvaluateResult:
    """Evaluate into a folder that looks like a run's, so that tables and comparisons of runs read it."""
    if target.has_run() and "evaluated" not in read_json(target.record_file):
        raise ConfigError(f"output={config.output}: holds a training; choose another folder")

    def begin() -> None:
        trained_by = saved_config(source.path).distributed
        saved = dataclasses.replace(trained, evaluation=settings, run_dir=str(target.path), distributed=trained_by)
        target.write_record(
            config_yaml=config_to_yaml(saved),
            command=[sys.executable, *sys.argv],
            choices=None,
            extra={"evaluated": {"run": str(source.path), "checkpoint": config.checkpoint}},
        )
        target.update_status("running")

    try:
        result = _evaluate(config, trained, settings, source, target, world, name="after", begin=begin)
    except BaseException as error:
        if target.begun:
            state: RunState = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            target.update_status(state, error=f"{type(error).__name__}: {error}")
        raise
    target.update_status("finished", objective=result.objective)
    return result


def _evaluate(
    config: EvaluateConfig,
    trained: TrainConfig,
    settings: EvaluationConfig,
    source: RunFolder,
    target: RunFolder,
    world: World,
    name: str | None = None,
    begin: Callable[[], None] = lambda: None,
) -> EvaluateResult:
    """Load what answers and what it is asked; only when both belong to the run, `begin` and change the folder."""
    checkpoint = config.checkpoint
    if settings.engine is Engine.vllm:
        require_vllm()  # before weights are loaded
    if settings.engine is Engine.openai:
        # The same exam as the run's: its tokenizer decides which conversations fit.
        chat = load_chat_tokenizer(trained.model)
        desk = _Desk(chat.template, chat.encoder, prepare_data(trained.dataset, chat.template, chat.encoder))
        other = _other_data(desk.data, source, None, allowed=config.other_data)
        _begin(target, begin)
        candidate = _served(settings, desk.data, other)
        return _answer(name or _name(settings), candidate, desk, settings, target, world)
    name = name or _name(settings, checkpoint)
    with world.heartbeat("preparing data and model"):
        compute = choose_compute(trained.model, trained.sft_type, runtime.set_up(trained.threads))
        chat = world.first(lambda: load_chat_tokenizer(trained.model))
        data = prepare_data(trained.dataset, chat.template, chat.encoder)
        bench = load_components(trained.model, trained.sft_type, compute, chat, data, world, seed=trained.seed)
    path = None if checkpoint == "base" else find_checkpoint(source, checkpoint)
    other = _other_data(bench.data, source, path, allowed=config.other_data)
    if path is not None:
        load_trained_state(bench.model, load_checkpoint(path).tensors["trained"])
        log.info("weights: %s", path)
    _begin(target, begin)
    if settings.mode is Mode.likelihood:
        return _likelihood(name, bench, settings, target, world, other)
    candidate = own_candidate(bench, settings)
    candidate = EvalModel(candidate.answerer, candidate.identity | other)
    desk = _Desk(chat.template, chat.encoder, bench.data)
    if settings.engine is Engine.vllm:
        context = min(trained.model.context, trained.dataset.max_length + settings.max_new_tokens)
        with _by_vllm(
            candidate,
            trained.sft_type,
            bench,
            settings,
            target,
            context=context,
            trust_remote_code=trained.model.trust_remote_code,
        ) as candidate:
            return _answer(name, candidate, desk, settings, target, world)
    return _answer(name, candidate, desk, settings, target, world)


def _begin(target: RunFolder, begin: Callable[[], None]) -> None:
    target.begin()
    progress.open_log_file()
    begin()


def _name(settings: EvaluationConfig, checkpoint: str | None = None) -> str:
    prefix = "evaluate" if settings.mode is Mode.teacher_forced else settings.mode.value
    who = checkpoint if checkpoint is not None else f"{settings.engine.value}-{settings.served_model}"
    if settings.engine is Engine.vllm:
        who += "-vllm"
    plain = re.sub(r"[^\w.-]+", "-", who)
    return f"{prefix}-{plain}"


def _answer(
    name: str, candidate: EvalModel, desk: _Desk, settings: EvaluationConfig, run: RunFolder, world: World
) -> EvaluateResult:
    """Ask the candidate, teacher-forced or in replay; rank 0 scores the answers of all ranks and writes them down."""

    def sit(answerer: Generator) -> float | None:
        asked = EvalModel(answerer, candidate.identity)
        return _replay(name, asked, desk, settings, run) if replays else _exam(name, asked, desk, settings, run)

    replays = settings.mode is Mode.replay
    with own_share(name, candidate, run, world) as own:
        objective = lead(world, own, sit)
    log.info("metrics: %s", run.metrics(name))
    return EvaluateResult(objective, run.metrics(name))


def _replay(name: str, candidate: EvalModel, desk: _Desk, settings: EvaluationConfig, run: RunFolder) -> float | None:
    report = sit_replay(name, candidate, desk.data, desk.template, desk.encoder, settings, run=run)
    value: float | None = report["metrics"]["conv_replay_success"]["value"]
    return value


def _exam(name: str, candidate: EvalModel, desk: _Desk, settings: EvaluationConfig, run: RunFolder) -> float | None:
    steps = exam_steps(desk.data, desk.template, settings.conversations)
    exam = run_evaluation(name, candidate, steps, settings, run=run, seen_tools=desk.data.train_tools)
    write_exam(exam, run, desk.data)
    show_exams([exam], run, examples=settings.examples, file=f"report-{name}.txt")
    return exam.value("arg_f1")


def _likelihood(
    name: str,
    bench: TrainingComponents,
    settings: EvaluationConfig,
    run: RunFolder,
    world: World,
    other: dict[str, str],
) -> EvaluateResult:
    count = settings.conversations
    examples = bench.data.heldout_examples if count < 0 else bench.data.heldout_examples[:count]
    report: dict[str, Any] = sit_likelihood(
        name,
        bench.model,
        examples,
        settings,
        pad_id=bench.pad_id,
        autocast=bench.objective.autocast,
        stock=bench.ways.stock_logits,
        run=run,
        world=world,
        piece_of={each.id: each.piece_of for each in bench.data.heldout if each.piece_of is not None},
        about=other,
    )
    log.info("metrics: %s", run.metrics(name))
    return EvaluateResult(-report["metrics"]["loss"]["value"], run.metrics(name))


def _served(settings: EvaluationConfig, data: PreparedData, other: dict[str, str]) -> EvalModel:
    endpoint = endpoint_of(settings)
    engine = OpenAIEngine(endpoint, shown_steps(data.heldout, data.heldout_examples))
    return EvalModel(engine, endpoint.identity() | other)


@contextmanager
def _by_vllm(
    own: EvalModel,
    sft: SftConfig,
    bench: TrainingComponents,
    settings: EvaluationConfig,
    run: RunFolder,
    *,
    context: int,
    trust_remote_code: bool,
) -> Iterator[EvalModel]:
    """Hand the weights over to vLLM by way of files, and make room for it on the device."""
    if isinstance(sft, QloraConfig):
        log.warning(
            "the run's base was in %d bits, vLLM loads it as it came, so answers differ from evaluation.engine=transformers",
            sft.bits,
        )
    with tempfile.TemporaryDirectory(prefix="vllm-", dir=run.path) as name:
        folder = Path(name)
        save_final(bench.model, sft, bench.tokenizer, folder)
        bench.model.to("cpu")
        torch.cuda.empty_cache()
        adapted = (folder / "adapter_config.json").is_file()
        model = VllmModel(
            folder=bench.files.folder if adapted else folder,
            adapter=folder if adapted else None,
            dtype=str(bench.dtype).removeprefix("torch."),
            context=context,
            trust_remote_code=trust_remote_code,
            options=settings.vllm_arguments(),
        )
        engine = VllmEngine(model, bench.tokenizer, stop_ids=bench.stop_ids, max_new_tokens=settings.max_new_tokens)
        changes = {"version": engine.version, "options": dict(model.options)}
        yield EvalModel(engine, own.identity | changes)


def _other_data(data: PreparedData, run: RunFolder, checkpoint: Path | None, *, allowed: bool) -> dict[str, str]:
    """Return nothing where the exam is of the data that the weights were trained with; else, if allowed, which it is.

    Raises:
        RunError: it is of other data, which may hold conversations of the training, and that is not `allowed`.
    """
    manifest = read_json(run.data_manifest)
    trained_on = manifest["fingerprint"] if checkpoint is None else read_state(checkpoint)["identity"]["data"]
    if trained_on == data.fingerprint:
        return {}
    seen = len(set(manifest["train"]["ids"]).intersection(data.heldout_examples.ids))
    new = len(set(data.heldout_content_hashes).difference(manifest["heldout"]["content_hashes"]))
    found = (
        f"{checkpoint or run.path} was trained with data {trained_on[:12]}, this exam is of data {data.fingerprint[:12]}: "
        f"of its {len(data.heldout)} held-out conversations {new} are not those of the run's {run.data_manifest.name}, and "
        f"{seen} have the id of one that it was trained on"
    )
    if not allowed:
        raise RunError(
            f"{found}. The dataset, its split or its tokenizer has changed; other_data=true scores it all the same"
        )
    log.warning("OTHER DATA: %s; the scores are not those of conversations held out from this training", found)
    return {"other_data": data.fingerprint}


def find_checkpoint(run: RunFolder, name: str) -> Path:
    """Return the folder of the checkpoint `final`, `best`, `last` or of a step.

    Raises:
        CheckpointError: not there.
    """
    paths = list_checkpoints(run.checkpoints)
    if not paths:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint; has the run saved one?")
    if name in ("final", "last"):
        return paths[-1]
    steps = {int(path.name.removeprefix("step-")): path for path in paths}
    wanted = read_json(run.summary_file).get("best_step") if name == "best" else name
    if wanted is not None and str(wanted).isdigit() and int(wanted) in steps:
        return steps[int(wanted)]
    raise CheckpointError(
        f"checkpoint={name}: not there; this run has steps {', '.join(map(str, steps))}; "
        "or give final, best, last or base"
    )
