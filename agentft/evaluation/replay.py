"""Replay: a whole conversation with the model's own words in its history, as far as the record can answer them.

The user's turns and the tools' results are those of the record. A recorded result is fed only while the model's calls are
strictly those of the reference; at the first step where they are not, nobody knows what the tool would have said, and the
episode ends there. Words need not be those of the reference: they stay in the history as the model said them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentft.data.conversation import Conversation
from agentft.data.examples import make_examples
from agentft.data.grammar import GrammarError, Part, Text, parse_assistant
from agentft.data.msagent import as_msagent, step_message
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder
from agentft.evaluation.generate import Completion
from agentft.evaluation.metrics import Metric, signature
from agentft.evaluation.parse import own_words
from agentft.evaluation.predictions import Generator
from agentft.evaluation.resampling import ratio_intervals, sum_pieces
from agentft.evaluation.scoring import StepScore, score_step
from agentft.evaluation.steps import Step, StepPlace, step_places, steps_by_number

METRICS = ("steps_until_divergence", "conv_replay_success")


@dataclass(slots=True)
class Episode:
    """One conversation, replayed until it ends or leaves the record."""

    conversation: Conversation
    places: list[StepPlace]
    """Of the steps that are asked."""
    shown: int = 0
    """Steps before them that are context only."""
    words: list[str] = field(default_factory=list)
    """What stays in the history: the answers in MSAgent form, without words for others."""
    answers: list[Completion] = field(default_factory=list)
    """Of the steps that were reached, the one that left the record included."""
    scores: list[StepScore] = field(default_factory=list)
    diverged: str | None = None
    """Why the record cannot go on: the kinds of error of the last answer, `nothing_said`, or `no_such_layout`."""

    @property
    def is_open(self) -> bool:
        """Whether there is a step left to ask."""
        return self.diverged is None and len(self.answers) < len(self.places)

    @property
    def steps_until_divergence(self) -> int:
        """Steps answered before the first divergence; all of them where there is none."""
        return len(self.answers) - (self.diverged is not None)

    def take(self, answer: Completion, seen_tools: frozenset[str] | None) -> None:
        """Go one step on, or find that the record cannot."""
        record = answer.step.record(answer.text, seen_tools)
        score = score_step(record)
        self.answers.append(answer)
        self.words.append(own_words(record.prediction))
        self.scores.append(score)
        if not score.is_exact:
            self.diverged = " ".join(score.errors) or "reference_unreadable"
        elif not self.words[-1]:
            self.diverged = "nothing_said"


def replay(
    conversations: Sequence[Conversation],
    template: Layout,
    encoder: SegmentEncoder,
    answerer: Generator,
    *,
    seen_tools: frozenset[str] | None = None,
    shown_steps: Mapping[str, int] | None = None,
) -> list[Episode]:
    """Replay the conversations that hold a readable call, side by side, step by step; what is only shown stays."""
    conversations = [as_msagent(each) for each in conversations]
    shown = {each.id: (shown_steps or {}).get(each.id, 0) for each in conversations}
    episodes = [
        Episode(each, step_places(each)[shown[each.id] :], shown[each.id])
        for each in conversations
        if is_replayable(each)
    ]
    for index in range(max((len(episode.places) for episode in episodes), default=0)):
        asked = _next_steps([episode for episode in episodes if episode.is_open], index, template, encoder)
        for (episode, _), answer in zip(asked, answerer.answer([step for _, step in asked]), strict=True):
            episode.take(answer, seen_tools)
    return episodes


def is_replayable(conversation: Conversation) -> bool:
    """Whether there is a call to follow, and each can be read."""
    return bool(conversation.tool_calls) and not any(message.malformed_calls for message in conversation.messages)


def with_replies(conversation: Conversation, places: Sequence[StepPlace], replies: Sequence[str]) -> Conversation:
    """Return the conversation with the agent's first steps replaced; blanks around a step stay as they were."""
    messages = list(conversation.messages)
    for place, reply in zip(places, replies, strict=False):
        source = messages[place.at].source_text
        before, after = source[: len(source) - len(source.lstrip())], source[len(source.rstrip()) :]
        messages[place.at] = step_message((*_blank(before), *_parts(reply), *_blank(after)))
    return dataclasses.replace(conversation, messages=tuple(messages))


def replay_report(episodes: Sequence[Episode], conversations: int, *, draws: int, seed: int) -> dict[str, Any]:
    """Return `steps_until_divergence` and `conv_replay_success` with intervals over conversations, and where it ended."""
    wholes = [episode.conversation.piece_of or episode.conversation.id for episode in episodes]
    sums_EM = np.array([[e.steps_until_divergence, e.diverged is None] for e in episodes], dtype=np.float64)
    # Pieces of one conversation are replayed each on its own and drawn together.
    sums_GM = sum_pieces(sums_EM.reshape(-1, 2), wholes)
    counts_GM = sum_pieces(np.ones((len(wholes), 2)), wholes)
    metrics = {name: Metric(None, 0, 0, None, None, None) for name in METRICS}
    if episodes:
        found = ratio_intervals(sums_GM, counts_GM, draws=draws, seed=seed)
        for m, name in enumerate(METRICS):
            metrics[name] = Metric(
                value=float(found.values[m]),
                numerator=float(sums_GM[:, m].sum()),
                denominator=float(len(episodes)),
                low=float(found.low[m]),
                high=float(found.high[m]),
                se=float(found.se_cr1[m]) if len(sums_GM) > 1 else None,
                se_cr0=float(found.se_cr0[m]),
                conversations=len(sums_GM),
            )
    diverged = [episode for episode in episodes if episode.diverged is not None]
    return {
        "signature": signature(len(episodes), mode="replay"),
        "metrics": {name: metric.to_json() for name, metric in metrics.items()},
        "counts": {
            "conversations": len(episodes),
            "conversations_without_readable_calls": conversations - len(episodes),
            "steps": sum(len(episode.places) for episode in episodes),
            "steps_asked": sum(len(episode.answers) for episode in episodes),
            "diverged": len(diverged),
        },
        "diverged_at_step": dict(sorted(Counter(str(e.steps_until_divergence) for e in diverged).items())),
        "errors": dict(sorted(Counter(kind for e in diverged for kind in (e.diverged or "").split()).items())),
        "bootstrap": {"draws": draws, "seed": seed, "unit": "conversation", "interval": "percentile 95 %"},
    }


def _next_steps(
    episodes: Sequence[Episode], index: int, template: Layout, encoder: SegmentEncoder
) -> list[tuple[Episode, Step]]:
    """Return the next step of each episode; one whose words the layout cannot hold ends."""
    asked: list[tuple[Episode, Step]] = []
    for episode, made in zip(episodes, make_examples(map(_spoken, episodes), template, encoder), strict=True):
        number = episode.conversation.steps.index(episode.places[index].at)
        step = steps_by_number(made, template).get(number)
        if step is None:
            episode.diverged = "no_such_layout"
        else:
            asked.append((episode, dataclasses.replace(step, index=index)))
    return asked


def _spoken(episode: Episode) -> Conversation:
    return with_replies(episode.conversation, episode.places, episode.words)


def _parts(text: str) -> tuple[Part, ...]:
    try:
        return parse_assistant(text)
    except GrammarError:
        return (Text(text),)  # context is encoded as plain text, whatever it holds


def _blank(text: str) -> tuple[Part, ...]:
    return (Text(text),) if text else ()
