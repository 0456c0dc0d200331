"""A file of predictions as one HTML file to read: wrong answers first, by kind of error; it needs no network."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from agentft.comparison.call_differences import call_differences
from agentft.evaluation.step_scores import OfferedTool, read_offered_tool

MOST_STEPS = 2_000
"""Steps on one page, the wrong ones first; a browser opens these at once."""

_LONGEST_TEXT = 12_000

KINDS = {
    "wrong_tool": "wrong tool",
    "missing_argument": "missing argument",
    "extra_argument": "extra argument",
    "wrong_value": "wrong value",
    "malformed": "malformed call",
    "spurious_call": "spurious call",
    "missed_call": "missed call",
    "missing_call": "one call of several missing",
    "extra_call": "one call too many",
    "hallucinated_tool": "hallucinated tool",
    "hallucinated_argument": "hallucinated argument",
}
"""Kind of error (see `StepScore.errors`) -> its words on the page."""

_FINISHES = {"length": "cut at the longest length", "text_stop": "went on past its part"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #68707f; --line: #d9dde4; --paper: #ffffff; --panel: #f7f8fa;
  --bad: #b3261e; --good: #1f7a43; --call: rgba(34, 160, 90, .16); }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #98a1b0; --line: #39404c; --paper: #14171c;
  --panel: #1c2027; --bad: #ff8a80; --good: #6fd39a; --call: rgba(70, 200, 130, .2); } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1480px; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } p, small { color: var(--soft); margin: .2rem 0; }
nav { position: sticky; top: 0; background: var(--paper); padding: .6rem 0; border-bottom: 1px solid var(--line); z-index: 1; }
button, input { font: inherit; font-size: .85rem; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 1rem; padding: .15rem .7rem; margin: .15rem .1rem; } button { cursor: pointer; }
button[aria-pressed=true] { background: var(--ink); color: var(--paper); } input { width: 18rem; max-width: 100%; }
article { border: 1px solid var(--line); border-radius: 8px; margin: .9rem 0; padding: .6rem .9rem; background: var(--panel);
  content-visibility: auto; contain-intrinsic-size: auto 260px; }
article[hidden] { display: none; }
header b { margin-right: .6rem; } .kind { color: var(--bad); font-size: .85rem; margin-right: .6rem; }
.right { color: var(--good); font-size: .85rem; }
.sides { display: grid; grid-template-columns: 2fr 3fr 3fr; gap: 1rem; margin-top: .4rem; }
@media (max-width: 900px) { .sides { grid-template-columns: 1fr; } }
h2 { font-size: .8rem; font-weight: 600; color: var(--soft); margin: 0; }
pre { font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 0;
  max-height: 24rem; overflow-y: auto; } pre mark { background: var(--call); color: inherit; }
ul { margin: .3rem 0 0; padding-left: 1.1rem; font-size: .87rem; } details { font-size: .85rem; }
"""

_SCRIPT = """
const cards = [...document.querySelectorAll('article')], buttons = [...document.querySelectorAll('button')];
const words = document.querySelector('input'), shown = document.getElementById('shown');
let kind = '';
function filter() {
  const wanted = words.value.toLowerCase();
  let count = 0;
  for (const card of cards) {
    const kinds = card.dataset.kinds.split(' ');
    card.hidden = !((kind === '' || kinds.includes(kind)) && (!wanted || card.textContent.toLowerCase().includes(wanted)));
    count += !card.hidden;
  }
  for (const button of buttons) button.setAttribute('aria-pressed', button.dataset.kind === kind);
  shown.textContent = count;
}
for (const button of buttons) button.addEventListener('click', () => {
  kind = button.dataset.kind === kind ? '' : button.dataset.kind; filter();
});
words.addEventListener('input', filter);
addEventListener('hashchange', () => document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView());
"""

_CALL = re.compile(r"(<\|startofthink\|>.*?(?:<\|endofthink\|>|\Z))", re.DOTALL)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReadStep:
    """One step as the page shows it."""

    conversation_id: str
    step: int
    reference: str
    prediction: str
    scores: Mapping[str, Any]
    """The fields of `StepScore`."""
    user: str | None = None
    observations: Sequence[str] = ()
    offered: Sequence[OfferedTool] = ()
    finish: str | None = None

    @property
    def errors(self) -> list[str]:
        """Kinds of error, each once."""
        return list(self.scores.get("errors", ()))

    @property
    def kinds(self) -> list[str]:
        """What this step is found under."""
        side = "wrong" if self.errors else "right"
        return [side, "call" if self.scores.get("is_action") else "words", *self.errors]


def read_steps(rows: Sequence[Mapping[str, Any]]) -> list[ReadStep]:
    """Return the steps of scored prediction rows, as `agentft.recipes.exam` makes them."""
    return [
        ReadStep(
            **{name: row[name] for name in ("conversation_id", "step", "reference", "prediction", "scores")},
            user=_text_or_none(row.get("user")),
            observations=[each for each in row.get("observations") or () if isinstance(each, str)],
            offered=[tool for each in row.get("offered") or () if (tool := read_offered_tool(each)) is not None],
            finish=_text_or_none(row.get("finish")),
        )
        for row in rows
    ]


def predictions_page(steps: Sequence[ReadStep], title: str) -> str:
    """Return the page: filters by kind of error, then the steps, those with most errors first."""
    ordered = sorted(steps, key=_order)
    counts = Counter(kind for step in steps for kind in step.kinds)
    filters = {"wrong": "wrong", "right": "calls right", "call": "call steps", "words": "answer steps"} | KINDS
    buttons = "".join(
        f'<button data-kind="{kind}" aria-pressed="false">{label} {counts[kind]:,}</button>'
        for kind, label in filters.items()
        if counts[kind]
    )
    cut = f"; the first {MOST_STEPS:,} are shown" if len(ordered) > MOST_STEPS else ""
    conversations = len({step.conversation_id for step in steps})
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><h1>{_text(title)}</h1>"
        f"<p>{conversations:,} conversations, {len(steps):,} steps, {counts['wrong']:,} with an error in a call{cut}.</p>"
        f'<nav>{buttons}<input type="search" placeholder="filter by id or word" aria-label="filter"> '
        f'<small><span id="shown">{min(len(ordered), MOST_STEPS)}</span> shown</small></nav>'
        f"{''.join(map(_card, ordered[:MOST_STEPS]))}<script>{_SCRIPT}</script></body></html>\n"
    )


def _order(step: ReadStep) -> tuple[float, float, str, int]:
    """Most errors first; then answers by how far they are from their reference; then what is right."""
    rouge = step.scores.get("rouge_l")
    return (-len(step.errors), 2.0 if rouge is None else rouge, step.conversation_id, step.step)


def _card(step: ReadStep) -> str:
    kinds = "".join(f'<span class="kind">{_text(KINDS.get(kind, kind))}</span>' for kind in step.errors)
    name = f"{step.conversation_id} step {step.step}"
    differences = call_differences(step.reference, step.prediction) if step.errors else []
    listed = f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in differences)}</ul>" if differences else ""
    observed = "".join(f"<pre>{_text(_cut(text))}</pre>" for text in step.observations)
    below = f"<details><summary>tool results before</summary>{observed}</details>" if observed else ""
    if step.offered:
        tools = _text(_cut("\n".join(map(_signature, step.offered))))
        below += f"<details><summary>tools offered: {len(step.offered):,}</summary><pre>{tools}</pre></details>"
    user = "–" if step.user is None else _text(_cut(step.user))
    return (
        f'<article id="{escape(f"{step.conversation_id}/{step.step}", quote=True)}" data-kinds="{" ".join(step.kinds)}">'
        f"<header><b>{_text(name)}</b>{kinds}<small>{_text(_facts(step))}</small></header>{listed}"
        f'<div class="sides"><section><h2>the user</h2><pre>{user}</pre>{below}</section>'
        f"<section><h2>reference</h2><pre>{_marked(step.reference)}</pre></section>"
        f"<section><h2>answer</h2><pre>{_marked(step.prediction)}</pre></section></div></article>"
    )


def _signature(tool: OfferedTool) -> str:
    return tool.name if tool.parameters is None else f"{tool.name}({', '.join(tool.parameters)})"


def _facts(step: ReadStep) -> str:
    scores = step.scores
    facts = []
    if scores.get("reference_failure"):
        facts.append(f"the reference cannot be read: {scores['reference_failure']}")
    if calls := scores.get("reference_calls"):
        facts.append(f"tool {scores['name_correct']}/{calls}, exact {scores['exact']}/{calls}")
        facts.append(f"argument F1 {scores['argument_f1'] / calls:.2f}")
    if scores.get("rouge_l") is not None:
        facts.append(f"ROUGE-L {scores['rouge_l']:.2f}")
    if step.finish in _FINISHES:
        facts.append(_FINISHES[step.finish])
    return " · ".join(facts)


def _marked(text: str) -> str:
    pieces = _CALL.split(_cut(text))
    return "".join(f"<mark>{_text(piece)}</mark>" if i % 2 else _text(piece) for i, piece in enumerate(pieces))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _text(text: str) -> str:
    return escape(_UNPRINTABLE.sub("�", text))
