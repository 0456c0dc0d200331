"""Evaluate a run's held-out conversations again, with any of its checkpoints or a served model."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentft import progress, runtime
from agentft.data.prepare import prepare_data
from agentft.data.prepared import PreparedData
from agentft.distributed.config import DistributedConfig, EngineKind
from agentft.distributed.launch import rank_of, run_on_ranks, threads_of_rank
from agentft.errors import CheckpointError, ConfigError, RunError
from agentft.evaluation.config import Engine, Mode
from agentft.evaluation.generate import Generator
from agentft.evaluation.openai import OpenAIGenerator
from agentft.model.adapters import load_trained_state
from agentft.model.load import choose_compute, load_chat_tokenizer
from agentft.recipes.components import load_components
from agentft.recipes.config import (
    EvaluateConfig,
    config_from_yaml,
    config_to_yaml,
    saved_config,
    settings_to_yaml,
    trained_config,
)
from agentft.recipes.evaluation_run import Evaluation, own_generator, own_identity, print_report, write_pages
from agentft.runs import RunFolder, RunState, read_json
from agentft.runtime import ALONE, World
from agentft.training.checkpoint import list_checkpoints, load_checkpoint, read_state

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """The result of an evaluation."""

    objective: float | None
    """`arg_f1`, `conv_replay_success` or minus the loss, by `evaluation.mode`; None where it is not defined."""
    metrics_file: Path


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Evaluate `config.checkpoint` of the run `config.run` on the run's own held-out conversations.

    With `evaluation.engine=openai` a served model is asked instead, and no weights are loaded. With `output` the run's
    folder is only read. Where `distributed` asks for ranks this starts them, and each generates its share.

    Raises:
        ConfigError: ranks are asked for where another program generates.
        RunError: no such run, or its data is no longer what it was trained on.
        CheckpointError: no such checkpoint, or it is damaged.
        EvaluationError: the endpoint fails.
    """
    if config.distributed.engine is EngineKind.single:
        return _evaluate_as(config, ALONE)
    engine = (config.evaluation or trained_config(RunFolder.open(config.run).path, config.model).evaluation).engine
    if engine is not Engine.transformers:
        raise ConfigError(
            f"distributed={config.distributed.name} with evaluation.engine={engine}: ranks share the generation of the "
            "run's model in this process; another program spreads its model over devices by itself. Choose distributed=single"
        )
    if config.distributed.engine is not EngineKind.ddp:
        progress.console().print(
            f"distributed={config.distributed.name}: generation needs no gradients, so each rank holds the model unsharded, "
            "as with ddp",
            highlight=False,
        )
    folder = config.output or config.run
    result: EvaluateResult = run_on_ranks(
        evaluate_rank, settings_to_yaml(config), config.distributed, folder=folder, threads=config.threads
    )
    return result


def evaluate_rank(payload: str) -> EvaluateResult:
    """Run this process's share of an evaluation, whose settings are `payload`; other processes run the others."""
    config = config_from_yaml(payload, EvaluateConfig)
    with rank_of(config.distributed, config.output or config.run) as world:
        return _evaluate_as(dataclasses.replace(config, threads=config.threads or threads_of_rank()), world)


def _evaluate_as(config: EvaluateConfig, world: World) -> EvaluateResult:
    """Evaluate into the run's folder; with `output`, into a folder that looks like a run's, so that comparisons read it."""
    source = RunFolder.open(config.run)
    folder = config.output or source.path
    with RunFolder.create(folder) if world.is_main else RunFolder.follow(folder) as target:
        log_path = target.path / "evaluate.log" if world.is_main else target.rank_log(world.rank)
        progress.set_up_logging(log_path, held=True)
        if config.output is None:
            return _evaluate(config, source, target, world)
        if target.has_run() and "evaluated" not in read_json(target.record_file):
            raise ConfigError(f"output={config.output}: holds a training; choose another folder")
        try:
            result = _evaluate(config, source, target, world)
        except BaseException as error:
            if target.begun:
                state: RunState = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                target.update_status(state, error=f"{type(error).__name__}: {error}")
            raise
        target.update_status("finished", objective=result.objective)
        return result


def _evaluate(config: EvaluateConfig, source: RunFolder, target: RunFolder, world: World) -> EvaluateResult:
    """Load model and data; the folder changes only when both belong to the run."""
    saved = trained_config(source.path, config.model)
    settings, checkpoint = config.evaluation or saved.evaluation, config.checkpoint
    trained = dataclasses.replace(
        saved,
        evaluation=settings,
        threads=config.threads or saved.threads,
        distributed=DistributedConfig(name="single"),  # no engine: each rank holds the model unsharded
    )

    def begin() -> None:
        target.begin()
        progress.open_log_file()
        if config.output is not None:
            distributed = saved_config(source.path).distributed
            target.write_record(
                config_yaml=config_to_yaml(
                    dataclasses.replace(trained, run_dir=str(target.path), distributed=distributed)
                ),
                command=[sys.executable, *sys.argv],
                choices=None,
                extra={"evaluated": {"run": str(source.path), "checkpoint": checkpoint}},
            )
            target.update_status("running")

    served = OpenAIGenerator(settings) if settings.engine is Engine.openai else None
    components = None
    device = runtime.set_up(trained.threads)
    with world.keep_alive("preparing data and model"):
        chat = world.main_process_first(lambda: load_chat_tokenizer(trained.model))
        data = prepare_data(trained.dataset, chat.template, chat.encoder)  # it decides which conversations fit
        if served is None:
            compute = choose_compute(trained.model, trained.sft_type, device)
            components = load_components(trained.model, trained.sft_type, compute, chat, data, world, seed=trained.seed)
    path = None if components is None or checkpoint == "base" else find_checkpoint(source, checkpoint)
    other = _other_data(data, source, path, allowed=config.other_data)
    if components is not None and path is not None:
        load_trained_state(components.model, load_checkpoint(path).tensors["trained"])
        log.info("weights: %s", path)
    begin()
    asked = checkpoint if served is None else f"openai-{settings.served_model}"
    name = "after" if config.output is not None else _name(settings.mode, asked)
    evaluation = Evaluation(name, settings, data, chat, target, world)
    if served is not None:
        objective = _measure(evaluation, served, served.identity | other)
    elif components is not None and settings.mode is Mode.likelihood:
        objective = -evaluation.by_likelihood(components, other)["metrics"]["loss"]["value"]
    elif components is not None:
        own = own_generator(components, settings)
        objective = _measure(evaluation, own, own_identity(components, settings) | other)
    log.info("metrics: %s", target.metrics(name))
    return EvaluateResult(objective, target.metrics(name))


def _measure(evaluation: Evaluation, generator: Generator, identity: dict[str, Any]) -> float | None:
    """Evaluate by completions and write what people read; return what a sweep ranks by, on rank 0."""
    settings = evaluation.config
    result = evaluation.by_completions(generator, identity)
    write_pages([result], evaluation.run)
    if result is None:
        return None
    if settings.mode is Mode.replay:
        return result.value("conv_replay_success")
    print_report([result], evaluation.run, examples=settings.examples, file=f"report-{evaluation.name}.txt")
    return result.value("arg_f1")


def _name(mode: Mode, model: str) -> str:
    """Return what the files of an evaluation are called in the run folder."""
    plain = re.sub(r"[^\w.-]+", "-", model)
    return f"{'evaluate' if mode is Mode.teacher_forced else mode.value}-{plain}"


def _other_data(data: PreparedData, run: RunFolder, checkpoint: Path | None, *, allowed: bool) -> dict[str, str]:
    """Return nothing where `data` is what the weights were trained with; else, if allowed, which it is.

    Raises:
        RunError: it is other data, which may hold conversations of the training, and that is not allowed.
    """
    manifest = read_json(run.data_manifest)
    trained_on = manifest["fingerprint"] if checkpoint is None else read_state(checkpoint)["identity"]["data"]
    if trained_on == data.fingerprint:
        return {}
    seen = len(set(manifest["train"]["ids"]).intersection(data.heldout_examples.ids))
    new = len(set(data.heldout_content_hashes).difference(manifest["heldout"]["content_hashes"]))
    found = (
        f"{checkpoint or run.path} was trained with data {trained_on[:12]}, this evaluation is of data "
        f"{data.fingerprint[:12]}: of its {len(data.heldout)} held-out conversations {new} are not those of the run's "
        f"{run.data_manifest.name}, and {seen} have the id of one that it was trained on"
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
