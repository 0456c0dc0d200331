"""Trace labels back to the record they come from, without asking `render.py` what it meant to train.

The labelled runs of an example are decoded and compared with the words between the tool results in the record's own
assistant turns; the masked runs must hold what the system, the users and the tools said. If both hold for every run, no
label can lie on foreign text. White space is left out of the comparison: it is nobody's words.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from agentft.data.calls import ToolCall
from agentft.data.conversation import Conversation
from agentft.data.msagent import as_msagent
from agentft.data.render import thought_text, with_history
from agentft.data.text_ids import Ids, TokenText
from agentft.data.tokens import IGNORE_INDEX

_LEAST_LEAK = 16
"""Characters of foreign text that count as a leak where a template words the agent's turns anew."""


@dataclass(frozen=True, slots=True)
class LabelProblem:
    """A label that is not where it should be; `code` as in `agentft.audits.findings`."""

    code: str
    detail: str


@dataclass(slots=True)
class _Step:
    """What comes before the agent speaks, and what it says."""

    context: list[str] = field(default_factory=list)
    words: str = ""


def trace_labels(
    conversation: Conversation,
    input_ids: Ids,
    labels: Ids,
    text: TokenText,
    *,
    stop_token: str,
    verbatim: bool,
    context_rounds: int = 0,
) -> LabelProblem | None:
    """Compare the labels of an example with the texts of its conversation; None where every label is right.

    Args:
        verbatim: the template keeps the agent's words letter by letter, and ends each step with `stop_token`. Where it
            does not, only foreign text under a label is an error; what cannot be compared is `label_untraced`.
        context_rounds: Rounds at the start whose words have no labels here; another example of the conversation has them.
            Steps that the record itself does not want trained have none either.
    """
    labelled = labels != IGNORE_INDEX
    if not labelled.any():
        return LabelProblem("no_label", "no token of this conversation has a label")
    if not np.array_equal(labels[labelled], input_ids[labelled]):
        at = int(np.flatnonzero(labelled & (labels != input_ids))[0])
        return LabelProblem("label_in_context", f"the label at token {at} is another token than the one that is read")
    if text.unknown_id is not None and (input_ids == text.unknown_id).any():
        return LabelProblem("label_untraced", "the tokenizer does not know some characters")
    masked, trained = _runs(input_ids, labelled, text)
    conversation = as_msagent(conversation)
    steps = _steps(conversation, context_rounds)
    if verbatim:
        return _compare(masked, trained, steps, _squeeze(stop_token))
    return _search(masked, trained, steps, conversation)


def _runs(input_ids: Ids, labelled: np.ndarray, text: TokenText) -> tuple[list[str], list[str]]:
    """Masked and labelled runs in turn, squeezed: as many of the one as of the other, then the masked rest."""
    edges = [0, *(np.flatnonzero(np.diff(labelled)) + 1).tolist(), len(input_ids)]
    runs = [text.text(input_ids[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]
    if labelled[0]:
        runs.insert(0, "")
    if len(runs) % 2 == 0:
        runs.append("")
    squeezed = [_squeeze(run) for run in runs]
    return squeezed[0::2], squeezed[1::2]


def _steps(conversation: Conversation, context_rounds: int) -> list[_Step]:
    """The conversation as its record has it; the last step has no words, only what comes after the last ones."""
    steps = [_Step()]
    words: list[str] = []

    def context(source: str) -> None:
        if said := _squeeze("".join(words)):
            steps[-1].words = said
            steps.append(_Step())
        words.clear()
        steps[-1].context.append(_squeeze(source))

    for message, history in with_history(conversation, context_rounds):
        if message.role != "assistant" or history:
            context(message.source_text or message.text)
        else:
            thought = thought_text(message.reasoning_content) if message.reasoning_content else ""
            if thought and not message.reasoning_trained:
                context(thought)
                thought = ""
            words.append(thought + message.source_text)
    context("")
    return steps


def _compare(masked: list[str], trained: list[str], steps: list[_Step], stop: str) -> LabelProblem | None:
    expected = [step.words + stop for step in steps[:-1]]
    if trained != expected and _composed(trained) != _composed(expected):
        return _first_difference(trained, expected)
    for number, (run, step) in enumerate(zip(masked, steps, strict=True), 1):
        if (missing := _first_absent(step.context, run)) is not None:
            return LabelProblem(
                "label_in_context", f"before step {number}, {_shown(missing)} is not whole among the masked tokens"
            )
    return None


def _first_difference(trained: list[str], expected: list[str]) -> LabelProblem:
    """Labelled runs that are no step: parts of a step that is missing, or foreign text."""
    runs, steps = Counter(_composed(trained)), Counter(_composed(expected))
    missing = list((steps - runs).elements())
    for run in (runs - steps).elements():
        if not any(run in words for words in missing):
            return LabelProblem("label_in_context", f"labelled, though not what the agent says there: {_shown(run)}")
    words = missing[0] if missing else expected[0]
    return LabelProblem("label_missing", f"words of the agent are not labelled as a whole: {_shown(words)}")


def _search(masked: list[str], trained: list[str], steps: list[_Step], source: Conversation) -> LabelProblem | None:
    """Look for foreign text under the labels, and for it among the masked runs."""
    own = "".join(step.words for step in steps)
    own += "".join(map(_strings, source.tool_calls))
    under_labels = "\n".join(trained)
    foreign = [piece for step in steps for piece in step.context]
    for piece in foreign:
        if len(piece) >= _LEAST_LEAK and piece in under_labels and piece not in own:
            return LabelProblem("label_in_context", f"labelled, though not the agent's: {_shown(piece)}")
    context = "\n".join(masked)
    for message in source.messages:
        if message.role == "user" and _squeeze(message.text) not in context:
            return LabelProblem("label_untraced", f"not found among the masked tokens: {_shown(message.text)}")
    return None


def _strings(call: ToolCall) -> str:
    """Return all text values of a call's arguments, however they are nested."""
    found: list[str] = []
    open_values: list[object] = [call.arguments]
    while open_values:
        match open_values.pop():
            case str(value):
                found.append(_squeeze(value))
            case dict() as values:
                open_values.extend(values.values())
            case list() as items:
                open_values.extend(items)
    return "\n".join(found)


def _first_absent(pieces: list[str], run: str) -> str | None:
    at = 0
    for piece in pieces:
        found = run.find(piece, at)
        if found < 0:
            run = unicodedata.normalize("NFC", run)
            found = run.find(unicodedata.normalize("NFC", piece), at)
        if found < 0:
            return piece
        at = found + len(piece)
    return None


def _composed(texts: list[str]) -> list[str]:
    """Characters with their accents in one: some tokenizers normalise what they read."""
    return [unicodedata.normalize("NFC", text) for text in texts]


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
