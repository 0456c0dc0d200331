"""The exam: every step of the held-out conversations answered, scored, and written down."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from agentft.data.render import MsagentTemplate
from agentft.evaluation.config import EvaluationConfig
from agentft.evaluation.generate import Answer, GreedyGenerator
from agentft.evaluation.metrics import EvaluationReport, aggregate, score_records
from agentft.evaluation.step_scores import StepScore
from agentft.evaluation.steps import Step, all_steps
from agentft.progress import progress_bar
from agentft.recipes.prepare import PreparedData
from agentft.runs import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exam:
    """One model's answers to the held-out steps, and what they are worth."""

    name: str
    answers: list[Answer]
    scores: list[StepScore]
    report: EvaluationReport
    seconds: float

    def value(self, metric: str) -> float | None:
        """Return a headline value, None where it is not defined."""
        return self.report.metrics[metric].value


def exam_steps(data: PreparedData, template: MsagentTemplate, conversations: int) -> list[Step]:
    """Return the steps of the first `conversations` held-out conversations; -1: of all."""
    chosen = data.heldout if conversations < 0 else data.heldout[:conversations]
    return all_steps(chosen, data.heldout_examples, template)


def sit_exam(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    steps: Sequence[Step],
    config: EvaluationConfig,
    *,
    stop_id: int,
    seen_tools: frozenset[str],
) -> Exam:
    """Answer `steps` greedily and score the answers; the model's mode is put back afterwards.

    Raises:
        EvaluationError: a reference cannot be read and `evaluation.allow_bad_references` is false.
    """
    started = time.perf_counter()
    generator = GreedyGenerator(
        model, tokenizer, stop_id=stop_id, slots=config.batch, max_new_tokens=config.max_new_tokens
    )
    was_training = model.training
    model.eval()
    tokens = 0
    with progress_bar(f"answering ({name})", len(steps)) as bar:

        def show(answer: Answer) -> None:
            nonlocal tokens
            tokens += answer.tokens
            bar.advance(1, speed=f"{tokens / (time.perf_counter() - started):,.0f} new tokens/s")

        answers = generator.answer(steps, show)
    model.train(was_training)
    scores = score_records(answer.step.record(answer.text, seen_tools) for answer in answers)
    report = aggregate(scores, draws=config.draws, seed=config.seed, allow_bad_references=config.allow_bad_references)
    seconds = time.perf_counter() - started
    finishes = Counter(answer.finish for answer in answers)
    log.info(
        "%s: %d steps answered in %.1f s (%d new tokens); %d ended by themselves, %d cut at %d tokens, %d cut at a tool result",
        *(name, len(steps), seconds, tokens, finishes["stop"], finishes["length"], config.max_new_tokens),
        finishes["text_stop"],
    )
    if report.quarantined:
        log.warning(
            "%d references cannot be read and are left out: %s", len(report.quarantined), report.quarantined[:5]
        )
    return Exam(name, answers, scores, report, seconds)


def prediction_rows(exam: Exam, seen_tools: frozenset[str]) -> list[dict[str, Any]]:
    """Return one plain object a step: ids, context, reference, raw answer, scores."""
    rows = []
    for answer, score in zip(exam.answers, exam.scores, strict=True):
        step = answer.step
        record = step.record(answer.text, seen_tools)
        rows.append(
            {
                "conversation_id": record.conversation_id,
                "step": record.step,
                "context_hash": step.context_hash,
                "reference": record.reference,
                "prediction": record.prediction,
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


def write_exam(exam: Exam, run: RunFolder, seen_tools: frozenset[str]) -> list[dict[str, Any]]:
    """Write predictions and metrics into the run folder and return the prediction rows."""
    rows = prediction_rows(exam, seen_tools)
    run.write_text(
        run.predictions(exam.name), "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    )
    run.write_json(run.metrics(exam.name), exam.report.to_json() | {"seconds": round(exam.seconds, 3)})
    return rows
