"""Validate during training: held-out loss by kind, metrics of completions where they decide, and early stopping."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from agentft.distributed.evaluation import likelihood_on_ranks, run_on_main
from agentft.evaluation.config import EvaluationConfig
from agentft.evaluation.definitions import METRICS, PAPER_NAMES, conversation_sums
from agentft.evaluation.likelihood import Likelihood
from agentft.evaluation.metrics import score_records
from agentft.evaluation.scoring import StepScore
from agentft.recipes.evaluation_run import WithProgressBar, heldout_steps, own_generator
from agentft.runs import RunFolder
from agentft.tracking import read_metrics
from agentft.training.engine import Engine

if TYPE_CHECKING:
    from agentft.recipes.components import TrainingComponents

log = logging.getLogger(__name__)


class Validator:
    """Measures at every `evaluation.eval_steps`, and keeps what decides on the best checkpoint."""

    def __init__(
        self, config: EvaluationConfig, bench: TrainingComponents, engine: Engine, run: RunFolder, *, total_steps: int
    ) -> None:
        self._config = config
        self._bench = bench
        self._run = run
        self._total_steps = total_steps
        self._engine = engine
        count = config.conversations
        self._examples = bench.data.heldout_examples if count < 0 else bench.data.heldout_examples[:count]
        self._steps = heldout_steps(bench.data, bench.chat.template, config.generates_during_training or 1)
        self._ranks: list[list[float]] = []
        """Of the evaluations so far; an empty one is below every other."""

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Return the values by name; the same on every rank."""
        with self._engine.unsharded():
            values = self._measure().losses()
            words = f"held-out loss {values['loss']:.4f}"
            if self._config.generates_during_training:
                values |= self._generate()
                value = values.get(self._config.best_metric)
                words += f", {self._config.best_metric} {'undefined (0/0)' if value is None else f'{value:.4f}'}"
        log.info("step %d of %d: %s", step, self._total_steps, words)
        self._ranks.append(self._config.rank(values) or [])
        if self.is_exhausted():
            log.info("early stopping: no better %s in %d evaluations", self._config.best_metric, self._config.patience)
        return values

    def loss(self) -> float:
        """Return the held-out loss as it is now; it does not count for `evaluation.patience`."""
        with self._engine.unsharded():
            return self._measure().loss

    def resume(self, step: int) -> None:
        """Read what was measured until `step`, from which the loop continues."""
        rows = [row for row in read_metrics(self._run.metrics_file) if row["step"] <= step and "eval/loss" in row]
        measured = [{name.removeprefix("eval/"): row[name] for name in row if row[name] is not None} for row in rows]
        self._ranks = [(self._config.rank(each) or []) if "loss" in each else [] for each in measured]

    def is_exhausted(self) -> bool:
        """Return whether `evaluation.patience` evaluations in a row have brought nothing better."""
        if not self._config.patience or not self._ranks:
            return False
        return len(self._ranks) - 1 - self._ranks.index(max(self._ranks)) >= self._config.patience

    def _measure(self) -> Likelihood:
        bench, engine = self._bench, self._engine
        batch, pad_id, autocast = self._config.batch, bench.chat.pad_id, engine.autocast
        stock = bench.probed.stock_logits
        return likelihood_on_ranks(
            engine.world, bench.model, self._examples, batch=batch, pad_id=pad_id, autocast=autocast, stock=stock
        )

    def _generate(self) -> dict[str, float]:
        world = self._engine.world
        own = own_generator(self._bench, self._config)
        completions = run_on_main(
            world, own, lambda together: WithProgressBar("during training", together).generate(self._steps)
        )
        found = None
        if completions is not None:
            found = metric_values(score_records(each.step.record(each.text) for each in completions))
        return world.broadcast(found) or {}


def metric_values(scores: Sequence[StepScore]) -> dict[str, float]:
    """Return every defined metric of scored steps by name, without intervals."""
    _, numerators_GM, denominators_GM = conversation_sums(scores)
    sums = zip(METRICS, numerators_GM.sum(0), denominators_GM.sum(0), strict=True)
    values = {
        definition.name: float(top / bottom)
        for definition, top, bottom in sums
        if bottom and not definition.name.startswith("legacy")
    }
    return values | {alias: values[name] for alias, name in PAPER_NAMES.items() if name in values}
