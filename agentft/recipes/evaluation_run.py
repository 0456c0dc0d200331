"""Run an evaluation: every step of the held-out conversations answered, scored, and written down."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agentft.comparison.predictions_page import predictions_page, read_steps
from agentft.data.prepared import PreparedData
from agentft.data.template_choice import Layout
from agentft.data.tokens import Example, SegmentEncoder
from agentft.distributed.spread import spread_likelihood
from agentft.errors import ConfigError, RunError
from agentft.evaluation.config import Engine, EvaluationConfig, Mode
from agentft.evaluation.generate import Completion, GreedyGenerator, StockGenerator
from agentft.evaluation.metrics import EvaluationReport, aggregate, score_records
from agentft.evaluation.predictions import Generator, OnCompletion, PredictionCache
from agentft.evaluation.replay import replay, replay_report
from agentft.evaluation.scoring import StepScore
from agentft.evaluation.steps import Step, all_steps, shown_steps, step_places
from agentft.model.adapters import trained_state
from agentft.progress import progress_bar
from agentft.runs import RunFolder, read_json
from agentft.world import ALONE, World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from agentft.recipes.components import TrainingComponents

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvalModel:
    """Who sits an exam."""

    answerer: Generator
    identity: dict[str, Any]
    """All that decides an answer beside its context; answers on the disk count for an equal identity only."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One candidate's answers to the held-out steps, and what they are worth."""

    name: str
    answers: list[Completion]
    scores: list[StepScore]
    report: EvaluationReport
    seconds: float
    identity: dict[str, Any]

    def value(self, metric: str) -> float | None:
        """Return a headline value, None where it is not defined."""
        return self.report.metrics[metric].value


class _OwnModel:
    """Answers with a model in this process; its mode is put back afterwards."""

    def __init__(self, model: nn.Module, generator: Generator) -> None:
        self._model = model
        self._generator = generator

    def answer(self, steps: Sequence[Step], on_answer: OnCompletion | None = None) -> list[Completion]:
        was_training = self._model.training
        self._model.eval()
        try:
            return self._generator.answer(steps, on_answer)
        finally:
            self._model.train(was_training)


def own_candidate(bench: TrainingComponents, config: EvaluationConfig) -> EvalModel:
    """Make a candidate of the bench's model as it is now."""
    model = bench.model
    parameter = next(model.parameters())
    identity = config.decides_answers() | {
        "model": bench.files.fingerprint,
        "weights": weights_digest(model),
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "stop_ids": list(bench.stop_ids),
    }
    return EvalModel(own_model(bench, config), identity)


def own_model(bench: TrainingComponents, config: EvaluationConfig) -> Generator:
    """Return what answers with the bench's model in this process."""
    model, tokenizer, stop_ids, new = bench.model, bench.tokenizer, bench.stop_ids, config.max_new_tokens
    if bench.ways.stock_answers:
        return _OwnModel(model, StockGenerator(model, tokenizer, stop_ids=stop_ids, max_new_tokens=new))
    generator = GreedyGenerator(
        model, tokenizer, stop_ids=stop_ids, slots=config.batch, max_new_tokens=new, speculation=config.speculation
    )
    return _OwnModel(model, generator)


def require_own_exam(config: EvaluationConfig) -> None:
    """Refuse settings that say what `evaluate.py` measures: a training measures its own model, by the headline.

    Raises:
        ConfigError: another mode or engine.
    """
    if config.mode is not Mode.teacher_forced or config.engine is not Engine.transformers:
        raise ConfigError(
            f"evaluation.mode={config.mode.value} evaluation.engine={config.engine.value} is for evaluate.py: a training "
            "answers with its own model, teacher-forced, and logs the likelihood at every evaluation.eval_steps"
        )


def weights_digest(model: nn.Module) -> str:
    """Return 16 hex digits of what training has made of the trained parameters."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(trained_state(model).items()):
        digest.update(name.encode())
        # A copy: a storage that numpy has seen can never be freed, which sharded engines do between passes.
        digest.update(tensor.cpu().clone().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def exam_steps(data: PreparedData, template: Layout, conversations: int) -> list[Step]:
    """Return the steps of the first `conversations` held-out conversations; -1: of all."""
    chosen = data.heldout if conversations < 0 else data.heldout[:conversations]
    return all_steps(chosen, data.heldout_examples, template)


def run_evaluation(
    name: str,
    candidate: EvalModel,
    steps: Sequence[Step],
    config: EvaluationConfig,
    *,
    run: RunFolder,
    seen_tools: frozenset[str],
    reuse: bool = False,
) -> EvalResult:
    """Answer `steps`, going on where a killed exam of the same candidate stopped, and score the answers.

    Args:
        name: Of the exam; its files in the run folder are called so.
        candidate: Who answers.
        steps: What is asked.
        config: How it is scored.
        run: Where answers are kept while they come.
        seen_tools: Tools that training called.
        reuse: A finished exam of the same candidate and steps is read instead of repeated.

    Raises:
        EvaluationError: a reference cannot be read and `evaluation.allow_bad_references` is false.
    """
    started = time.perf_counter()
    found = finished_answers(name, candidate.identity, steps, run) if reuse else None
    if found is not None:
        answers, seconds = found
        log.info("%s: measured before by this run, read from %s", name, run.predictions(name))
    else:
        with keeping_answers(name, candidate, run) as answerer:
            answers = answer_all(name, answerer, steps)
        seconds = time.perf_counter() - started
    scores = score_records(answer.step.record(answer.text, seen_tools) for answer in answers)
    report = aggregate(
        scores, draws=config.bootstrap_samples, seed=config.seed, allow_bad_references=config.allow_bad_references
    )
    finishes = Counter(answer.finish for answer in answers)
    log.info(
        "%s: %d steps answered in %.1f s (%d new tokens); %d ended by themselves, %d cut at %d tokens, %d cut at a tool result",
        *(name, len(steps), seconds, sum(answer.tokens for answer in answers), finishes["stop"], finishes["length"]),
        *(config.max_new_tokens, finishes["text_stop"]),
    )
    if report.quarantined:
        log.warning(
            "%d references cannot be read and are left out: %s", len(report.quarantined), report.quarantined[:5]
        )
    return EvalResult(name, answers, scores, report, seconds, candidate.identity)


@contextmanager
def keeping_answers(name: str, candidate: EvalModel, run: RunFolder) -> Iterator[PredictionCache]:
    """Give the candidate a working file in the run folder; `write_exam` removes it."""
    kept = _working_file(name, run)
    with PredictionCache(kept, candidate.answerer, candidate.identity, others=_files_of_ranks(name, run)) as file:
        yield file


@contextmanager
def own_share(name: str, candidate: EvalModel, run: RunFolder, world: World) -> Iterator[Generator]:
    """Return who answers this rank's share. Ranks other than 0, which keeps all answers, keep theirs in files of their own
    until it has them: an exam that is killed goes on from all of them, on any number of ranks."""
    if world.is_main:
        yield candidate.answerer
        return
    with PredictionCache(_file_of_rank(name, run, world.rank), candidate.answerer, candidate.identity) as file:
        yield file


def answer_all(name: str, answerer: Generator, steps: Sequence[Step]) -> list[Completion]:
    """Answer steps under a bar."""
    started = time.perf_counter()
    tokens = 0
    with progress_bar(f"answering ({name})", len(steps)) as bar:

        def show(answer: Completion) -> None:
            nonlocal tokens
            tokens += answer.tokens
            bar.advance(1, speed=f"{tokens / (time.perf_counter() - started):,.0f} new tokens/s")

        return answerer.answer(steps, show)


def finished_answers(
    name: str, identity: Mapping[str, Any], steps: Sequence[Step], run: RunFolder
) -> tuple[list[Completion], float] | None:
    """Return the answers of a finished exam and its seconds; None unless it was this candidate on these steps."""
    try:
        report = read_json(run.metrics(name))
        text = run.predictions(name).read_text(encoding="utf-8")
    except (RunError, OSError):
        return None
    if report.get("identity") != identity or report.get("predictions_sha256") != _digest(text):
        return None
    rows = [json.loads(line) for line in text.split("\n") if line]
    if [(row["conversation_id"], row["step"], row["context_hash"]) for row in rows] != [
        (step.conversation.id, step.index, step.context_hash) for step in steps
    ]:
        return None
    answers = [
        Completion(step, row.get("raw", row["prediction"]), row["tokens"], row["finish"])
        for step, row in zip(steps, rows, strict=True)
    ]
    return answers, float(report["seconds"])


def prediction_rows(
    answers: Sequence[Completion], scores: Sequence[StepScore], data: PreparedData
) -> list[dict[str, Any]]:
    """Return one plain object a step: ids, what was asked, reference, answer, scores.

    Reference and answer are in MSAgent form; `raw` is there where the model wrote its calls in another.
    """
    shown = shown_steps(data.heldout, data.heldout_examples)
    rows = []
    for answer, score in zip(answers, scores, strict=True):
        step = answer.step
        record = step.record(answer.text, data.train_tools)
        place = step_places(step.conversation)[shown.get(step.conversation.id, 0) + step.index]
        rows.append(
            {
                "conversation_id": record.conversation_id,
                **({} if record.piece_of is None else {"piece_of": record.piece_of}),
                "step": record.step,
                "context_hash": step.context_hash,
                "user": place.user(step.conversation),
                "observations": [
                    each.source_text.strip() or each.text for each in place.observations(step.conversation)
                ],
                "reference": record.reference,
                "prediction": record.prediction,
                **({} if answer.text == record.prediction else {"raw": answer.text}),
                "offered": None
                if record.offered is None
                else [{"name": tool.name, "parameters": tool.parameters} for tool in record.offered],
                "language": record.language,
                "rounds": record.rounds,
                "seen_tool": record.seen_tool,
                "finish": answer.finish,
                "tokens": answer.tokens,
                "scores": dataclasses.asdict(score),
            }
        )
    return rows


def write_exam(exam: EvalResult, run: RunFolder, data: PreparedData) -> list[dict[str, Any]]:
    """Write predictions, their page and metrics into the run folder and return the prediction rows."""
    rows = prediction_rows(exam.answers, exam.scores, data)
    write_results(exam.name, rows, exam.report.to_json(), run, seconds=exam.seconds, identity=exam.identity)
    return rows


def write_results(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any],
    run: RunFolder,
    *,
    seconds: float,
    identity: Mapping[str, Any],
) -> None:
    """Write an exam's files, then drop its working file: killed in between, nothing is lost and nothing asked twice."""
    page = predictions_page(read_steps(rows), f"{run.path.name}: {name}")
    run.write_text(run.predictions(name).with_suffix(".html"), page)
    run.write_text(
        run.predictions(name), "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    )
    run.write_json(
        run.metrics(name),
        {
            **report,
            "seconds": round(seconds, 3),
            "identity": identity,
            # Of the file as it was written, secrets taken out.
            "predictions_sha256": _digest(run.predictions(name).read_text(encoding="utf-8")),
        },
    )
    for file in [_working_file(name, run), *_files_of_ranks(name, run)]:
        file.unlink(missing_ok=True)


def _working_file(name: str, run: RunFolder) -> Path:
    return run.predictions(f"{name}.partial")


def _file_of_rank(name: str, run: RunFolder, rank: int) -> Path:
    return run.predictions(f"{name}.partial-rank-{rank}")


def _files_of_ranks(name: str, run: RunFolder) -> list[Path]:
    first = _file_of_rank(name, run, 1)
    return sorted(first.parent.glob(glob.escape(first.stem.removesuffix("1")) + "*.jsonl"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sit_replay(
    name: str,
    candidate: EvalModel,
    data: PreparedData,
    template: Layout,
    encoder: SegmentEncoder,
    config: EvaluationConfig,
    *,
    run: RunFolder,
) -> dict[str, Any]:
    """Replay the held-out conversations, going on where a killed replay stopped, write the files and return the report."""
    started = time.perf_counter()
    count = config.conversations
    conversations = data.heldout if count < 0 else data.heldout[:count]
    with keeping_answers(name, candidate, run) as answerer:
        episodes = replay(
            conversations,
            template,
            encoder,
            _WithBar(name, answerer),
            seen_tools=data.train_tools,
            shown_steps=shown_steps(data.heldout, data.heldout_examples),
        )
    report = replay_report(episodes, len(conversations), draws=config.bootstrap_samples, seed=config.seed)
    rows = []
    for episode in episodes:
        for row in prediction_rows(episode.answers, episode.scores, data):
            last = row["step"] == episode.answers[-1].step.index
            rows.append(row | {"mode": "replay", "diverged": episode.diverged if last else None})
    seconds = time.perf_counter() - started
    write_results(name, rows, report, run, seconds=seconds, identity=candidate.identity)
    counts, metrics = report["counts"], report["metrics"]
    log.info(
        "%s: %d of %d conversations replayed to their end (%s), %s steps until divergence of %.1f (%.1f s)",
        *(name, counts["conversations"] - counts["diverged"], counts["conversations"]),
        *(_shown(metrics["conv_replay_success"]), _shown(metrics["steps_until_divergence"])),
        *(counts["steps"] / max(counts["conversations"], 1), seconds),
    )
    return report


def sit_likelihood(
    name: str,
    model: torch.nn.Module,
    examples: Sequence[Example],
    config: EvaluationConfig,
    *,
    pad_id: int,
    autocast: torch.dtype | None,
    stock: bool,
    run: RunFolder,
    piece_of: Mapping[str, str] | None = None,
    world: World = ALONE,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the loss of the references, write the files, `about` among them, and return the report.

    `piece_of` is that of `Likelihood`.
    """
    started = time.perf_counter()
    found = spread_likelihood(world, model, examples, batch=config.batch, pad_id=pad_id, autocast=autocast, stock=stock)
    report = found.to_json(draws=config.bootstrap_samples, seed=config.seed, piece_of=piece_of)
    report["conversations"] = found.rows()
    run.write_json(run.metrics(name), report | {**(about or {}), "seconds": round(time.perf_counter() - started, 3)})
    for metric, value in report["metrics"].items():
        if value["value"] is not None:
            log.info("%s: %s %s", name, metric, _shown(value))
    return report


class _WithBar:
    """Shows a bar for each round of a replay."""

    def __init__(self, name: str, answerer: Generator) -> None:
        self._name = name
        self._answerer = answerer

    def answer(self, steps: Sequence[Step], on_answer: OnCompletion | None = None) -> list[Completion]:
        return answer_all(self._name, self._answerer, steps)


def _shown(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "–"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
