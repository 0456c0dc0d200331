"""Report at the end of a run: before and after in numbers and in words, where the time went, where everything lies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentft.evaluation.generate import Completion
from agentft.progress import console
from agentft.recipes.evaluation_run import EvalResult
from agentft.runs import RunFolder

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

HEADLINE = {
    "tool_acc": "tool-name accuracy",
    "param_em": "parameter accuracy",
    "arg_f1": "argument F1",
    "rouge_l": "ROUGE-L",
    "plan_acc": "call or not",
    "call_wellformed_rate": "well-formed calls",
}
"""Metric -> its name in the table."""


def show_exams(exams: Sequence[EvalResult | None], run: RunFolder, *, examples: int, file: str = "report.txt") -> None:
    """Print the table of headline metrics and example answers, and write both to `file` in the run folder."""
    from rich.console import Console

    sat = [exam for exam in exams if exam is not None]
    if not sat:
        return
    with (run.path / file).open("w", encoding="utf-8") as report:
        for target in (console(), Console(file=report, width=110)):
            target.print(metrics_table(sat))
            for number, answers in enumerate(example_answers(sat, examples), start=1):
                target.print(_example_table(number, [exam.name for exam in sat], answers))


def metrics_table(exams: Sequence[EvalResult]) -> Table:
    """Return one row a metric, one column an exam, each value with its 95 % interval and its denominator."""
    from rich.table import Table

    first = exams[0].report
    table = Table(
        title=f"held-out: {first.counts['conversations']} conversations, {first.counts['steps']} steps",
        caption="value [95 % interval by conversations] of denominator; – where there is nothing to measure",
    )
    table.add_column("metric")
    for exam in exams:
        table.add_column(exam.name, justify="right")
    for name, words in HEADLINE.items():
        table.add_row(words, *(_cell(exam, name) for exam in exams))
    return table


def _cell(exam: EvalResult, name: str) -> str:
    metric = exam.report.metrics[name]
    if metric.value is None:
        return "–"
    interval = "" if metric.low is None else f" [{metric.low:.3f}, {metric.high:.3f}]"
    return f"{metric.value:.3f}{interval} of {metric.denominator:g}"


def example_answers(exams: Sequence[EvalResult], count: int) -> list[list[Completion]]:
    """Choose steps to show: the first call and the first summary of different conversations, then further ones."""
    by_step = list(zip(*(exam.answers for exam in exams), strict=True))
    calls = [group for group in by_step if "<|startofthink|>" in group[0].step.reference]
    words = [group for group in by_step if "<|startofthink|>" not in group[0].step.reference]
    mixed: list[tuple[Completion, ...]] = []
    for pair in zip(calls, words, strict=False):
        mixed.extend(pair)
    return [list(group) for group in (mixed or by_step)[:count]]


def _example_table(number: int, names: Sequence[str], answers: Sequence[Completion]) -> Table:
    from rich.table import Table

    step = answers[0].step
    users = [message.text for message in step.conversation.messages if message.role == "user"]
    table = Table(title=f"example {number}: {step.conversation.id}, step {step.index}", show_lines=True)
    for title in ("the user asked", *names, "reference"):
        table.add_column(title, overflow="fold", ratio=1)
    from rich.text import Text

    cells = [_cut(users[0]), *(_cut(answer.text) for answer in answers), _cut(step.reference)]
    table.add_row(*(Text(cell) for cell in cells))
    return table


def _cut(text: str, length: int = 400) -> str:
    text = text.strip()
    return text if len(text) <= length else f"{text[:length]} … ({len(text)} characters)"
