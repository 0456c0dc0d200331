"""Evaluate a model on the held-out conversations: at the start and end of a training, during it, and by `evaluate.py`."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agentft.comparison.predictions_page import predictions_page
from agentft.data.prepared import PreparedData, small_exam
from agentft.data.template_choice import Layout
from agentft.distributed.evaluation import likelihood_on_ranks, run_on_main
from agentft.errors import ConfigError, RunError
from agentft.evaluation.config import Engine, EvaluationConfig, Mode
from agentft.evaluation.generate import (
    Completion,
    Generator,
    GreedyGenerator,
    OnCompletion,
    PredictionCache,
    StockGenerator,
    deciding_settings,
)
from agentft.evaluation.likelihood import Likelihood, measure_likelihood
from agentft.evaluation.metrics import METRICS, PAPER_NAMES, aggregate, conversation_sums, score_records
from agentft.evaluation.replay import replay, replay_report
from agentft.evaluation.steps import Step, StepRecord, StepScore, all_steps
from agentft.model.load import ChatTokenizer
from agentft.progress import console, progress_bar
from agentft.runs import RunFolder, read_json
from agentft.runtime import World
from agentft.tracking import read_metrics
from agentft.training.engine import Engine as TrainingEngine

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from agentft.recipes.components import TrainingComponents

log = logging.getLogger(__name__)

HEADLINE = {
    "tool_acc": "tool-name accuracy",
    "param_em": "parameter accuracy",
    "arg_f1": "argument F1",
    "rouge_l": "ROUGE-L",
    "plan_acc": "call or not",
    "call_wellformed_rate": "well-formed calls",
}
"""Metric -> its name in the table at the end of a run."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The completions of one model for the held-out steps, and their scores."""

    name: str
    report: dict[str, Any]
    """As in `metrics/<name>.json`."""
    completions: list[Completion]
    rows: list[dict[str, Any]]
    """As in `predictions/<name>.jsonl`, one plain object a step."""

    def value(self, metric: str) -> float | None:
        """Return a value of the report, None where it is not defined."""
        value: float | None = self.report["metrics"][metric]["value"]
        return value


class WithProgressBar:
    """Shows a progress bar over another generator's work."""

    def __init__(self, name: str, generator: Generator) -> None:
        self._name = name
        self._generator = generator

    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        """Complete all steps and return them in the order given."""
        started = time.perf_counter()
        tokens = 0
        with progress_bar(f"generating ({self._name})", len(steps)) as bar:

            def show(completion: Completion) -> None:
                nonlocal tokens
                tokens += completion.tokens
                bar.advance(1, speed=f"{tokens / (time.perf_counter() - started):,.0f} new tokens/s")
                if on_completion is not None:
                    on_completion(completion)

            return self._generator.generate(steps, show)


def own_identity(components: TrainingComponents, config: EvaluationConfig) -> dict[str, Any]:
    """Return all that decides a completion of the loaded model, with its weights as they are now, beside its context."""
    model = components.objective.model
    parameter = next(model.parameters())
    return deciding_settings(config) | {
        "model": components.chat.files.fingerprint,
        "weights": weights_digest(model),
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "stop_ids": list(components.chat.stop_ids),
    }


def own_generator(components: TrainingComponents, config: EvaluationConfig) -> Generator:
    """Return a generator with the loaded model in this process."""
    model, tokenizer, stop_ids = components.objective.model, components.chat.tokenizer, components.chat.stop_ids
    new = config.max_new_tokens
    if components.probed.stock_answers:
        return StockGenerator(model, tokenizer, stop_ids=stop_ids, max_new_tokens=new)
    return GreedyGenerator(
        model, tokenizer, stop_ids=stop_ids, batch=config.batch, max_new_tokens=new, speculation=config.speculation
    )


def require_own_model(config: EvaluationConfig) -> None:
    """Refuse settings that say what `evaluate.py` measures: a training measures its own model, teacher-forced.

    Raises:
        ConfigError: another mode or engine.
    """
    if config.mode is not Mode.teacher_forced or config.engine is not Engine.transformers:
        raise ConfigError(
            f"evaluation.mode={config.mode.value} evaluation.engine={config.engine.value} is for evaluate.py: a training "
            "evaluates its own model, teacher-forced, and logs the likelihood at every evaluation.eval_steps"
        )


def weights_digest(model: nn.Module) -> str:
    """Return 16 hex digits of what training has made of the trained parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad):
        digest.update(name.encode())
        # A copy: a storage that numpy has seen can never be freed, which sharded engines do between passes.
        digest.update(tensor.cpu().clone().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def heldout_steps(data: PreparedData, template: Layout, conversations: int) -> list[Step]:
    """Return the steps of the first `conversations` held-out conversations; -1: of all."""
    chosen = data.heldout if conversations < 0 else data.heldout[:conversations]
    return all_steps(chosen, data.heldout_examples, template)


def heldout_likelihood(components: TrainingComponents, config: EvaluationConfig, world: World) -> Likelihood:
    """Measure the references of the held-out conversations with the loaded model, each on one rank."""
    examples, count = components.data.heldout_examples, config.conversations
    measure = partial(
        measure_likelihood,
        components.model,
        batch=config.batch,
        pad_id=components.chat.pad_id,
        autocast=components.objective.autocast,
        stock=components.probed.stock_logits,
    )
    return likelihood_on_ranks(world, examples if count < 0 else examples[:count], measure)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of the held-out conversations, with its files in a run folder."""

    name: str
    config: EvaluationConfig
    data: PreparedData
    chat: ChatTokenizer
    run: RunFolder
    world: World

    def by_completions(
        self, generator: Generator, identity: Mapping[str, Any], *, reuse: bool = False
    ) -> EvalResult | None:
        """Complete the held-out steps, teacher-forced or in replay, score them and write the files.

        All ranks generate, and rank 0 gets the result. Completions are kept as they come, each rank's in a file of its own: an
        evaluation that is killed continues from all that have an equal `identity`. `reuse` reads a finished one again.

        Raises:
            EvaluationError: a reference cannot be read and `evaluation.allow_bad_references` is false.
        """
        if self.world.size == 1:
            return self._write(generator, identity, reuse)
        if self.world.is_main:
            return run_on_main(self.world, generator, lambda all_ranks: self._write(all_ranks, identity, reuse))
        with PredictionCache(self._working_file(f"-rank-{self.world.rank}"), generator, identity) as kept:
            return run_on_main(self.world, kept, lambda _: None)

    def by_likelihood(self, components: TrainingComponents, about: Mapping[str, Any]) -> dict[str, Any]:
        """Measure the loss of the references, write it with `about` into the file of metrics, and return the report."""
        started = time.perf_counter()
        found = heldout_likelihood(components, self.config, self.world)
        report = found.to_json(
            bootstrap_samples=self.config.bootstrap_samples,
            seed=self.config.seed,
            piece_of={each.id: each.piece_of for each in self.data.heldout if each.piece_of is not None},
        )
        seconds = round(time.perf_counter() - started, 3)
        self.run.write_json(self.run.metrics(self.name), {**report, **about, "seconds": seconds})
        for metric, value in report["metrics"].items():
            if value["value"] is not None:
                log.info("%s: %s %s", self.name, metric, _shown(value))
        return report

    def _write(self, generator: Generator, identity: Mapping[str, Any], reuse: bool) -> EvalResult:
        """Complete and score the steps, write predictions and metrics, then drop the working files."""
        started = time.perf_counter()
        steps = heldout_steps(self.data, self.chat.template, self.config.conversations)
        known, seconds = self._finished(identity) if reuse else ([], 0.0)
        own = self._working_file()
        working = [own, *sorted(own.parent.glob(f"{glob.escape(own.stem)}-rank-*.jsonl"))]
        with PredictionCache(own, generator, identity, others=working[1:], known=known) as kept:
            asked = WithProgressBar(self.name, kept)
            result = self._replayed(asked, steps) if self.config.mode is Mode.replay else self._scored(asked, steps)
        seconds += time.perf_counter() - started
        log.info("%s: %d steps in %.1f s", self.name, len(result.completions), seconds)
        file = self.run.predictions(self.name)
        self.run.write_text(file, "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in result.rows))
        about = {
            "seconds": round(seconds, 3),
            "identity": identity,
            # Of the file as it was written, secrets taken out.
            "predictions_sha256": _digest(file.read_text(encoding="utf-8")),
        }
        self.run.write_json(self.run.metrics(self.name), {**result.report, **about})
        for left in working:
            left.unlink(missing_ok=True)
        return result

    def _scored(self, generator: Generator, steps: Sequence[Step]) -> EvalResult:
        config, seen_tools = self.config, self.data.train_tools
        completions = generator.generate(steps)
        records = [each.step.record(each.text, seen_tools) for each in completions]
        scores = score_records(records)
        report = aggregate(
            scores,
            bootstrap_samples=config.bootstrap_samples,
            seed=config.seed,
            allow_bad_references=config.allow_bad_references,
        )
        finishes = Counter(each.finish for each in completions)
        log.info(
            "%s: %d new tokens; finish reason: stop %d, length %d (max_new_tokens=%d), tool result %d",
            *(self.name, sum(each.tokens for each in completions), finishes["stop"], finishes["length"]),
            *(config.max_new_tokens, finishes["text_stop"]),
        )
        if left_out := report["quarantined"]:
            log.warning("%d references cannot be read and are left out: %s", len(left_out), left_out[:5])
        scored = zip(completions, records, scores, strict=True)
        return EvalResult(self.name, report, completions, [_row(*each) for each in scored])

    def _replayed(self, generator: Generator, steps: Sequence[Step]) -> EvalResult:
        config, chat = self.config, self.chat
        episodes = replay(steps, chat.template, chat.encoder, generator, seen_tools=self.data.train_tools)
        conversations = len({step.conversation.id for step in steps})
        report = replay_report(episodes, conversations, bootstrap_samples=config.bootstrap_samples, seed=config.seed)
        counts, metrics = report["counts"], report["metrics"]
        log.info(
            "%s: %d of %d conversations replayed to their end (%s), %s steps until divergence of %.1f",
            *(self.name, counts["conversations"] - counts["diverged"], counts["conversations"]),
            *(_shown(metrics["conv_replay_success"]), _shown(metrics["steps_until_divergence"])),
            counts["steps"] / max(counts["conversations"], 1),
        )
        completions = [completion for episode in episodes for completion, *_ in episode.asked]
        rows = []
        for episode in episodes:
            rows += [_row(*each) | {"mode": "replay", "diverged": None} for each in episode.asked]
            if episode.asked:
                rows[-1]["diverged"] = episode.diverged
        return EvalResult(self.name, report, completions, rows)

    def _finished(self, identity: Mapping[str, Any]) -> tuple[list[dict[str, Any]], float]:
        """Return the rows of a finished evaluation of this model, and its seconds; none of another model or if edited."""
        try:
            report = read_json(self.run.metrics(self.name))
            text = self.run.predictions(self.name).read_text(encoding="utf-8")
        except (RunError, OSError):
            return [], 0.0
        if report.get("identity") != identity or report.get("predictions_sha256") != _digest(text):
            return [], 0.0
        rows = [json.loads(line) for line in text.split("\n") if line]
        return [row | {"text": row.get("raw", row["prediction"])} for row in rows], float(report["seconds"])

    def _working_file(self, rank: str = "") -> Path:
        return self.run.predictions(f"{self.name}.partial{rank}")


def _row(completion: Completion, record: StepRecord, score: StepScore) -> dict[str, Any]:
    """Return a step as a plain object: ids, what was asked, reference, prediction, scores.

    Reference and prediction are in MSAgent form; `raw` is there where the model wrote its calls in another.
    """
    step = completion.step
    return {
        "conversation_id": record.conversation_id,
        **({} if record.piece_of is None else {"piece_of": record.piece_of}),
        "step": record.step,
        "context_hash": step.context_hash,
        "user": step.user,
        "observations": step.observations,
        "reference": record.reference,
        "prediction": record.prediction,
        **({} if completion.text == record.prediction else {"raw": completion.text}),
        "offered": [{"name": name, "parameters": parameters} for name, parameters in step.offered] or None,
        "language": record.language,
        "rounds": record.rounds,
        "seen_tool": record.seen_tool,
        "finish": completion.finish,
        "tokens": completion.tokens,
        "scores": score.to_json(),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class Validator:
    """Measures at every `evaluation.eval_steps`, and keeps what decides on the best checkpoint."""

    def __init__(
        self,
        config: EvaluationConfig,
        components: TrainingComponents,
        engine: TrainingEngine,
        run: RunFolder,
        *,
        total_steps: int,
    ) -> None:
        self._config = config
        self._components = components
        self._run = run
        self._total_steps = total_steps
        self._engine = engine
        self._steps = heldout_steps(components.data, components.chat.template, config.generates_during_training or 1)
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
        return heldout_likelihood(self._components, self._config, self._engine.world)

    def _generate(self) -> dict[str, float]:
        world = self._engine.world
        completions = run_on_main(
            world,
            own_generator(self._components, self._config),
            lambda all_ranks: WithProgressBar("during training", all_ranks).generate(self._steps),
        )
        found = None
        if completions is not None:
            found = metric_values(score_records(each.step.record(each.text) for each in completions))
        return world.broadcast(found) or {}


def metric_values(scores: Sequence[StepScore]) -> dict[str, float]:
    """Return every defined metric of scored steps by name, without intervals and without those of the old script."""
    _, numerators_GM, denominators_GM = conversation_sums(scores)
    sums = zip(METRICS, numerators_GM.sum(0), denominators_GM.sum(0), strict=True)
    values = {each.name: float(top / bottom) for each, top, bottom in sums if bottom and not each.quarantined_too}
    return values | {alias: values[name] for alias, name in PAPER_NAMES.items() if name in values}


def write_pages(results: Sequence[EvalResult | None], run: RunFolder) -> None:
    """Write the predictions of each as a page beside their file."""
    for result in results:
        if result is not None:
            page = predictions_page(result.rows, f"{run.path.name}: {result.name}")
            run.write_text(run.predictions(result.name).with_suffix(".html"), page)


def print_report(
    results: Sequence[EvalResult | None], run: RunFolder, *, examples: int, file: str = "report.txt"
) -> None:
    """Print the table of headline metrics and example completions, and write both to `file` in the run folder."""
    from rich.console import Console

    there = [result for result in results if result is not None]
    if not there:
        return
    names = [result.name for result in there]
    with (run.path / file).open("w", encoding="utf-8") as report:
        for target in (console(), Console(file=report, width=110)):
            target.print(_metrics_table(there))
            if words := small_exam(there[0].report["counts"]["conversations"]):
                target.print(f"WARNING: {words}", style="bold", markup=False)
            for number, completions in enumerate(_examples(there, examples), start=1):
                target.print(_example_table(number, names, completions))


def _metrics_table(results: Sequence[EvalResult]) -> Table:
    """Return one row a metric, one column an evaluation, each value with its 95 % interval and its denominator."""
    from rich.table import Table

    counts = results[0].report["counts"]
    table = Table(
        title=f"held-out: {counts['conversations']} conversations, {counts['steps']} steps",
        caption="value [95 % interval by conversations] of denominator; – where there is nothing to measure",
    )
    table.add_column("metric")
    for result in results:
        table.add_column(result.name, justify="right")
    for name, words in HEADLINE.items():
        metrics = [result.report["metrics"][name] for result in results]
        table.add_row(words, *(_shown(each, f" of {each['denominator']:g}") for each in metrics))
    return table


def _shown(metric: Mapping[str, Any], denominator: str = "") -> str:
    if metric["value"] is None:
        return "–"
    interval = "" if metric["low"] is None else f" [{metric['low']:.3f}, {metric['high']:.3f}]"
    return f"{metric['value']:.3f}{interval}{denominator}"


def _examples(results: Sequence[EvalResult], count: int) -> list[tuple[Completion, ...]]:
    """Choose steps to show: the first call and the first summary of different conversations, then further ones."""
    by_step = list(zip(*(result.completions for result in results), strict=True))
    calls = [group for group in by_step if group[0].step.message.tool_calls]
    words = [group for group in by_step if not group[0].step.message.tool_calls]
    mixed = [group for pair in zip(calls, words, strict=False) for group in pair]
    return (mixed or by_step)[:count]


def _example_table(number: int, names: Sequence[str], completions: Sequence[Completion]) -> Table:
    from rich.table import Table
    from rich.text import Text

    step = completions[0].step
    table = Table(title=f"example {number}: {step.conversation.id}, step {step.index}", show_lines=True)
    for title in ("user", *names, "reference"):
        table.add_column(title, overflow="fold", ratio=1)
    texts = [step.user, *(each.text for each in completions), step.reference]
    table.add_row(*(Text(_cut(text.strip())) for text in texts))
    return table


def _cut(text: str, length: int = 400) -> str:
    return text if len(text) <= length else f"{text[:length]} … ({len(text)} characters)"
