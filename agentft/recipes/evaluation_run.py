"""Run an evaluation: every step of the held-out conversations completed, scored, and written down."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from agentft.comparison.predictions_page import predictions_page
from agentft.data.prepared import PreparedData
from agentft.data.template_choice import Layout
from agentft.data.tokens import Example, SegmentEncoder
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
)
from agentft.evaluation.metrics import EvaluationReport, aggregate, score_records
from agentft.evaluation.replay import replay, replay_report
from agentft.evaluation.scoring import StepScore
from agentft.evaluation.steps import Step, all_steps
from agentft.model.adapters import trained_state
from agentft.progress import console, progress_bar
from agentft.runs import RunFolder, read_json
from agentft.world import ALONE, World

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from agentft.recipes.components import TrainingComponents

log = logging.getLogger(__name__)

T = TypeVar("T")

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
class EvalModel:
    """A model that is evaluated."""

    generator: Generator
    identity: dict[str, Any]
    """All that decides a completion beside its context; completions on the disk count for an equal identity only."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The completions of one model for the held-out steps, and their scores."""

    name: str
    completions: list[Completion]
    report: EvaluationReport
    rows: list[dict[str, Any]]
    """What the file of predictions holds, one plain object a step."""

    def value(self, metric: str) -> float | None:
        """Return a headline value, None where it is not defined."""
        return self.report.metrics[metric].value


class _InEvalMode:
    """Generates with a model in this process; its mode is put back afterwards."""

    def __init__(self, model: nn.Module, generator: Generator) -> None:
        self._model = model
        self._generator = generator

    def generate(self, steps: Sequence[Step], on_completion: OnCompletion | None = None) -> list[Completion]:
        was_training = self._model.training
        self._model.eval()
        try:
            return self._generator.generate(steps, on_completion)
        finally:
            self._model.train(was_training)


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


def own_model(bench: TrainingComponents, config: EvaluationConfig) -> EvalModel:
    """Return the loaded model with its weights as they are now."""
    model = bench.objective.model
    parameter = next(model.parameters())
    identity = config.decides_completions() | {
        "model": bench.chat.files.fingerprint,
        "weights": weights_digest(model),
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "stop_ids": list(bench.chat.stop_ids),
    }
    return EvalModel(own_generator(bench, config), identity)


def own_generator(bench: TrainingComponents, config: EvaluationConfig) -> Generator:
    """Return a generator with the loaded model in this process."""
    model, tokenizer, stop_ids = bench.objective.model, bench.chat.tokenizer, bench.chat.stop_ids
    new = config.max_new_tokens
    if bench.probed.stock_answers:
        return _InEvalMode(model, StockGenerator(model, tokenizer, stop_ids=stop_ids, max_new_tokens=new))
    generator = GreedyGenerator(
        model, tokenizer, stop_ids=stop_ids, batch=config.batch, max_new_tokens=new, speculation=config.speculation
    )
    return _InEvalMode(model, generator)


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
    for name, tensor in sorted(trained_state(model).items()):
        digest.update(name.encode())
        # A copy: a storage that numpy has seen can never be freed, which sharded engines do between passes.
        digest.update(tensor.cpu().clone().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def heldout_steps(data: PreparedData, template: Layout, conversations: int) -> list[Step]:
    """Return the steps of the first `conversations` held-out conversations; -1: of all."""
    chosen = data.heldout if conversations < 0 else data.heldout[:conversations]
    return all_steps(chosen, data.heldout_examples, template)


def on_all_ranks(name: str, model: EvalModel, run: RunFolder, world: World, work: Callable[[EvalModel], T]) -> T | None:
    """Run `work` on rank 0 with a model that all ranks generate with; return its result there, None elsewhere.

    Ranks other than 0, which keeps all completions, keep theirs in files of their own until it has them: an evaluation
    that is killed continues from all of them, on any number of ranks.
    """
    if world.size == 1:
        return work(model)
    own: Any = nullcontext(model.generator)
    if not world.is_main:
        own = PredictionCache(_file_of_rank(name, run, world.rank), model.generator, model.identity)
    with own as generator:
        return run_on_main(world, generator, lambda together: work(EvalModel(together, model.identity)))


def run_evaluation(
    name: str,
    model: EvalModel,
    steps: Sequence[Step],
    config: EvaluationConfig,
    *,
    run: RunFolder,
    seen_tools: frozenset[str],
    reuse: bool = False,
) -> EvalResult:
    """Complete `steps`, continuing a killed evaluation of the same model, score them and write the files.

    Args:
        name: Of the evaluation; its files in the run folder are called so.
        model: The model, and what its completions depend on.
        steps: What is asked.
        config: How it is scored.
        run: Where completions are kept while they come, and the results.
        seen_tools: Tools that training called.
        reuse: A finished evaluation of the same model and steps is read instead of repeated.

    Raises:
        EvaluationError: a reference cannot be read and `evaluation.allow_bad_references` is false.
    """
    started = time.perf_counter()
    found = _finished(name, model.identity, steps, run) if reuse else None
    if found is not None:
        completions, seconds = found
        log.info("%s: already evaluated by this run, read from %s", name, run.predictions(name))
    else:
        with _cache(name, model, run) as cache:
            completions = WithProgressBar(name, cache).generate(steps)
        seconds = time.perf_counter() - started
    scores = score_records(each.step.record(each.text, seen_tools) for each in completions)
    report = aggregate(
        scores,
        bootstrap_samples=config.bootstrap_samples,
        seed=config.seed,
        allow_bad_references=config.allow_bad_references,
    )
    finishes = Counter(each.finish for each in completions)
    log.info(
        "%s: %d steps in %.1f s (%d new tokens); finish reason: stop %d, length %d (max_new_tokens=%d), tool result %d",
        *(name, len(steps), seconds, sum(each.tokens for each in completions), finishes["stop"], finishes["length"]),
        *(config.max_new_tokens, finishes["text_stop"]),
    )
    if report.quarantined:
        log.warning(
            "%d references cannot be read and are left out: %s", len(report.quarantined), report.quarantined[:5]
        )
    rows = _prediction_rows(completions, scores, seen_tools)
    _write_results(name, rows, report.to_json(), run, seconds=seconds, identity=model.identity)
    return EvalResult(name, completions, report, rows)


def run_replay(
    name: str,
    model: EvalModel,
    steps: Sequence[Step],
    config: EvaluationConfig,
    *,
    template: Layout,
    encoder: SegmentEncoder,
    run: RunFolder,
    seen_tools: frozenset[str],
) -> dict[str, Any]:
    """Replay the conversations of `steps`, continuing a killed replay, write the files and return the report."""
    started = time.perf_counter()
    with _cache(name, model, run) as cache:
        episodes = replay(steps, template, encoder, WithProgressBar(name, cache), seen_tools=seen_tools)
    conversations = len({step.conversation.id for step in steps})
    report = replay_report(episodes, conversations, bootstrap_samples=config.bootstrap_samples, seed=config.seed)
    rows = []
    for episode in episodes:
        own = _prediction_rows(episode.completions, episode.scores, seen_tools)
        rows += [row | {"mode": "replay", "diverged": None} for row in own]
        if own:
            rows[-1]["diverged"] = episode.diverged
    seconds = time.perf_counter() - started
    _write_results(name, rows, report, run, seconds=seconds, identity=model.identity)
    counts, metrics = report["counts"], report["metrics"]
    log.info(
        "%s: %d of %d conversations replayed to their end (%s), %s steps until divergence of %.1f (%.1f s)",
        *(name, counts["conversations"] - counts["diverged"], counts["conversations"]),
        *(_shown(metrics["conv_replay_success"]), _shown(metrics["steps_until_divergence"])),
        *(counts["steps"] / max(counts["conversations"], 1), seconds),
    )
    return report


def run_likelihood(
    name: str,
    model: nn.Module,
    examples: Sequence[Example],
    config: EvaluationConfig,
    *,
    pad_id: int,
    autocast: torch.dtype | None,
    stock: bool,
    run: RunFolder,
    piece_of: Mapping[str, str],
    world: World = ALONE,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure the loss of the references, write the files, `about` among them, and return the report.

    `piece_of` is that of `Likelihood`.
    """
    started = time.perf_counter()
    found = likelihood_on_ranks(
        world, model, examples, batch=config.batch, pad_id=pad_id, autocast=autocast, stock=stock
    )
    report = found.to_json(bootstrap_samples=config.bootstrap_samples, seed=config.seed, piece_of=piece_of)
    report["conversations"] = found.rows()
    run.write_json(run.metrics(name), report | {**about, "seconds": round(time.perf_counter() - started, 3)})
    for metric, value in report["metrics"].items():
        if value["value"] is not None:
            log.info("%s: %s %s", name, metric, _shown(value))
    return report


def _cache(name: str, model: EvalModel, run: RunFolder) -> PredictionCache:
    """Return the model with a working file in the run folder, which `_write_results` removes."""
    return PredictionCache(_working_file(name, run), model.generator, model.identity, others=_files_of_ranks(name, run))


def _finished(
    name: str, identity: Mapping[str, Any], steps: Sequence[Step], run: RunFolder
) -> tuple[list[Completion], float] | None:
    """Return the completions of a finished evaluation and its seconds; None unless it was this model on these steps."""
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
    completions = [
        Completion(step, row.get("raw", row["prediction"]), row["tokens"], row["finish"])
        for step, row in zip(steps, rows, strict=True)
    ]
    return completions, float(report["seconds"])


def _prediction_rows(
    completions: Sequence[Completion], scores: Sequence[StepScore], seen_tools: frozenset[str]
) -> list[dict[str, Any]]:
    """Return one plain object a step: ids, what was asked, reference, prediction, scores.

    Reference and prediction are in MSAgent form; `raw` is there where the model wrote its calls in another.
    """
    rows = []
    for completion, score in zip(completions, scores, strict=True):
        step = completion.step
        record = step.record(completion.text, seen_tools)
        rows.append(
            {
                "conversation_id": record.conversation_id,
                **({} if record.piece_of is None else {"piece_of": record.piece_of}),
                "step": record.step,
                "context_hash": step.context_hash,
                "user": step.user,
                "observations": step.observations,
                "reference": record.reference,
                "prediction": record.prediction,
                **({} if completion.text == record.prediction else {"raw": completion.text}),
                "offered": None if record.offered is None else [dataclasses.asdict(tool) for tool in record.offered],
                "language": record.language,
                "rounds": record.rounds,
                "seen_tool": record.seen_tool,
                "finish": completion.finish,
                "tokens": completion.tokens,
                "scores": dataclasses.asdict(score),
            }
        )
    return rows


def _write_results(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    report: Mapping[str, Any],
    run: RunFolder,
    *,
    seconds: float,
    identity: Mapping[str, Any],
) -> None:
    """Write predictions, their page and metrics, then drop the working files: killed in between, nothing is lost."""
    page = predictions_page(rows, f"{run.path.name}: {name}")
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


def _shown(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "–"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


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
            for number, completions in enumerate(_examples(there, examples), start=1):
                target.print(_example_table(number, names, completions))


def _metrics_table(results: Sequence[EvalResult]) -> Table:
    """Return one row a metric, one column an evaluation, each value with its 95 % interval and its denominator."""
    from rich.table import Table

    counts = results[0].report.counts
    table = Table(
        title=f"held-out: {counts['conversations']} conversations, {counts['steps']} steps",
        caption="value [95 % interval by conversations] of denominator; – where there is nothing to measure",
    )
    table.add_column("metric")
    for result in results:
        table.add_column(result.name, justify="right")
    for name, words in HEADLINE.items():
        table.add_row(words, *(_cell(result, name) for result in results))
    return table


def _cell(result: EvalResult, name: str) -> str:
    metric = result.report.metrics[name]
    if metric.value is None:
        return "–"
    interval = "" if metric.low is None else f" [{metric.low:.3f}, {metric.high:.3f}]"
    return f"{metric.value:.3f}{interval} of {metric.denominator:g}"


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
