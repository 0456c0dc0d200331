"""The ways of measuring beside the headline: replay and likelihood, each run and written down."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from agentft.data.template_choice import Layout
from agentft.data.tokens import Example, SegmentEncoder
from agentft.distributed.spread import spread_likelihood
from agentft.evaluation.answer_file import Answerer, OnAnswer
from agentft.evaluation.config import EvaluationConfig
from agentft.evaluation.generate import Answer
from agentft.evaluation.places import shown_steps
from agentft.evaluation.replay import replay, replay_report
from agentft.evaluation.steps import Step
from agentft.recipes.exam import Candidate, answer_all, keeping_answers, prediction_rows, write_results
from agentft.recipes.prepare import PreparedData
from agentft.runs import RunFolder
from agentft.world import ALONE, World

log = logging.getLogger(__name__)


def sit_replay(
    name: str,
    candidate: Candidate,
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
    report = replay_report(episodes, len(conversations), draws=config.draws, seed=config.seed)
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
    report = found.to_json(draws=config.draws, seed=config.seed, piece_of=piece_of)
    report["conversations"] = found.rows()
    run.write_json(run.metrics(name), report | {**(about or {}), "seconds": round(time.perf_counter() - started, 3)})
    for metric, value in report["metrics"].items():
        if value["value"] is not None:
            log.info("%s: %s %s", name, metric, _shown(value))
    return report


class _WithBar:
    """Shows a bar for each round of a replay."""

    def __init__(self, name: str, answerer: Answerer) -> None:
        self._name = name
        self._answerer = answerer

    def answer(self, steps: Sequence[Step], on_answer: OnAnswer | None = None) -> list[Answer]:
        return answer_all(self._name, self._answerer, steps)


def _shown(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "–"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
