"""Answer a run's held-out conversations again, with any of its checkpoints, and score the answers."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from agentft import progress
from agentft.errors import CheckpointError, RunError
from agentft.model.adapters import load_trained_state
from agentft.recipes.config import EvaluateConfig
from agentft.recipes.exam import exam_steps, own_candidate, sit_exam, write_exam
from agentft.recipes.report import show_exams
from agentft.recipes.saved import saved_config
from agentft.recipes.train import Bench, set_up_bench
from agentft.runs import RunFolder, read_json
from agentft.training.checkpoint import list_checkpoints, load_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """What an evaluation came to."""

    objective: float
    """`arg_f1`, 0 where it is not defined."""
    metrics_file: Path


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Evaluate `config.checkpoint` of the run `config.run` on the run's own held-out conversations.

    Raises:
        RunError: no such run, or its data is no longer what it was trained on.
        CheckpointError: no such checkpoint, or it is damaged.
    """
    opened = RunFolder.open(config.run)
    trained = saved_config(opened.path)
    settings = config.evaluation or trained.evaluation
    with RunFolder.create(opened.path) as run:
        progress.set_up_logging(run.path / "evaluate.log")
        bench = set_up_bench(dataclasses.replace(trained, threads=config.threads or trained.threads))
        _refuse_other_data(bench, run)
        _load_weights(bench, run, config.checkpoint)
        candidate = own_candidate(
            bench.model, bench.tokenizer, settings, stop_id=bench.stop_id, fingerprint=bench.files.fingerprint
        )
        exam = sit_exam(
            f"evaluate-{config.checkpoint}",
            candidate,
            exam_steps(bench.data, bench.template, settings.conversations),
            settings,
            run=run,
            seen_tools=bench.data.train_tools,
        )
        write_exam(exam, run, bench.data.train_tools)
        show_exams([exam], run, examples=settings.examples)
        log.info("metrics: %s", run.metrics(exam.name))
        return EvaluateResult(exam.value("arg_f1") or 0.0, run.metrics(exam.name))


def _refuse_other_data(bench: Bench, run: RunFolder) -> None:
    saved = read_json(run.data_manifest)["fingerprint"]
    if saved != bench.data.fingerprint:
        raise RunError(
            f"{run.data_manifest}: the run was made with data {saved[:12]}, the same settings now give "
            f"{bench.data.fingerprint[:12]}: the files of the dataset have changed, so the exam would be another one"
        )


def _load_weights(bench: Bench, run: RunFolder, name: str) -> None:
    """Put the weights of a checkpoint into the model: `base` leaves it untrained."""
    if name == "base":
        return
    checkpoint = load_checkpoint(_find_checkpoint(run, name))
    load_trained_state(bench.model, checkpoint.tensors["trained"])
    log.info("weights: %s", checkpoint.path)


def _find_checkpoint(run: RunFolder, name: str) -> Path:
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
