"""Replay conversations with the model's own words in their history, as far as the record can answer them.

The user's turns and the tools' results are those of the record. A recorded result is fed only while the model's calls are
strictly those of the reference; at the first step where they are not, nobody knows what the tool would have said, and the
episode ends there. Words need not be those of the reference: they stay in the history as the model said them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from typing import Any

import numpy as np

from agentft.data.conversation import Conversation, Part, Text
from agentft.data.msagent import GrammarError, as_msagent, parse_assistant, step_message
from agentft.data.template_choice import Layout
from agentft.data.tokens import SegmentEncoder
from agentft.data.truncation import make_examples
from agentft.evaluation.generate import Completion, Generator
from agentft.evaluation.metrics import Metric, bootstrap_facts, interval_metrics, signature
from agentft.evaluation.parse import own_words
from agentft.evaluation.steps import Step, StepRecord, StepScore, conversation_steps, score_step

METRICS = ("steps_until_divergence", "conv_replay_success")


@dataclass(slots=True)
class Episode:
    """One conversation, replayed until it ends or leaves the record."""

    conversation: Conversation
    steps: list[Step]
    """The steps to be asked, as teacher forcing asks them."""
    asked: list[tuple[Completion, StepRecord, StepScore]] = field(default_factory=list)
    """The steps that were reached, the one that left the record included."""
    diverged: str | None = None
    """Why the record cannot continue: the kinds of error of the last step, `nothing_said`, or `no_such_layout`."""

    @property
    def is_open(self) -> bool:
        """Return whether there is a step left to ask."""
        return self.diverged is None and len(self.asked) < len(self.steps)

    @property
    def steps_until_divergence(self) -> int:
        """Steps completed before the first divergence; all of them where there is none."""
        return len(self.asked) - (self.diverged is not None)

    @property
    def words(self) -> list[str]:
        """What stays in the history: the completions in MSAgent form, up to where the model speaks for others."""
        return [own_words(record.prediction) for _, record, _ in self.asked]

    @property
    def thoughts(self) -> list[str]:
        """The reasoning of each, empty where there was none."""
        return [record.prediction_reply.reasoning if record.prediction_reply else "" for _, record, _ in self.asked]

    def take(self, completion: Completion, seen_tools: frozenset[str] | None) -> None:
        """Add the next step, or find that the record cannot continue."""
        record = completion.step.record(completion.text, seen_tools)
        score = score_step(record)
        self.asked.append((completion, record, score))
        if not score.is_exact:
            self.diverged = " ".join(score.errors) or "reference_unreadable"
        elif not self.words[-1]:
            self.diverged = "nothing_said"


def replay(
    steps: Sequence[Step],
    template: Layout,
    encoder: SegmentEncoder,
    generator: Generator,
    *,
    seen_tools: frozenset[str] | None = None,
) -> list[Episode]:
    """Replay the conversations of `steps` that hold a readable call, side by side, step by step."""
    by_conversation = (list(group) for _, group in groupby(steps, key=lambda step: step.conversation.id))
    episodes = [Episode(as_msagent(group[0].conversation), group) for group in by_conversation]
    episodes = [episode for episode in episodes if is_replayable(episode.conversation)]
    for index in range(max((len(episode.steps) for episode in episodes), default=0)):
        asked = _next_steps([episode for episode in episodes if episode.is_open], index, template, encoder)
        completions = generator.generate([step for _, step in asked])
        for (episode, _), completion in zip(asked, completions, strict=True):
            episode.take(completion, seen_tools)
    return episodes


def is_replayable(conversation: Conversation) -> bool:
    """Return whether there is a call to follow, and each can be read."""
    return bool(conversation.tool_calls) and not any(message.malformed_calls for message in conversation.messages)


def with_replies(
    conversation: Conversation, places: Sequence[int], replies: Sequence[str], thoughts: Sequence[str] = ()
) -> Conversation:
    """Return the conversation with the messages at the first of `places` replaced; blanks around them stay as they were."""
    messages = list(conversation.messages)
    for at, reply, thought in zip_longest(places[: len(replies)], replies, thoughts):
        source = messages[at].source_text
        before, after = source[: len(source) - len(source.lstrip())], source[len(source.rstrip()) :]
        blanks_before, blanks_after = ((Text(blank),) if blank else () for blank in (before, after))
        said = step_message((*blanks_before, *_parts(reply), *blanks_after))
        messages[at] = dataclasses.replace(said, reasoning_content=thought or None)
    return dataclasses.replace(conversation, messages=tuple(messages))


def replay_report(
    episodes: Sequence[Episode], conversations: int, *, bootstrap_samples: int, seed: int
) -> dict[str, Any]:
    """Return `steps_until_divergence` and `conv_replay_success` with intervals over conversations, and where it ended."""
    metrics = {name: Metric(None, 0, 0, None, None, None) for name in METRICS}
    if episodes:
        sums_E2 = np.array([[e.steps_until_divergence, e.diverged is None] for e in episodes], dtype=np.float64)
        metrics = interval_metrics(
            METRICS,
            sums_E2,
            np.ones_like(sums_E2),
            bootstrap_samples=bootstrap_samples,
            seed=seed,
            # Pieces of one conversation are replayed each on its own and drawn together.
            wholes=[episode.conversation.piece_of or episode.conversation.id for episode in episodes],
        )
    diverged = [episode for episode in episodes if episode.diverged is not None]
    return {
        "signature": signature(len(episodes), mode="replay"),
        "metrics": {name: metric.to_json() for name, metric in metrics.items()},
        "counts": {
            "conversations": len(episodes),
            "conversations_without_readable_calls": conversations - len(episodes),
            "steps": sum(len(episode.steps) for episode in episodes),
            "steps_asked": sum(len(episode.asked) for episode in episodes),
            "diverged": len(diverged),
        },
        "diverged_at_step": dict(sorted(Counter(str(e.steps_until_divergence) for e in diverged).items())),
        "errors": dict(sorted(Counter(kind for e in diverged for kind in (e.diverged or "").split()).items())),
        "bootstrap": bootstrap_facts(bootstrap_samples, seed),
    }


def _next_steps(
    episodes: Sequence[Episode], index: int, template: Layout, encoder: SegmentEncoder
) -> list[tuple[Episode, Step]]:
    """Return the next step of each episode; one whose words the layout cannot hold ends."""
    asked: list[tuple[Episode, Step]] = []
    histories = (
        with_replies(each.conversation, [step.at for step in each.steps], each.words, each.thoughts)
        for each in episodes
    )
    for episode, made in zip(episodes, make_examples(histories, template, encoder), strict=True):
        by_place = {
            step.at: step
            for piece in made.pieces
            for step in conversation_steps(piece.conversation, piece.example, template)
        }
        wanted = episode.steps[index]
        if wanted.at in by_place:
            asked.append((episode, dataclasses.replace(by_place[wanted.at], index=wanted.index)))
        else:
            episode.diverged = "no_such_layout"
    return asked


def _parts(text: str) -> tuple[Part, ...]:
    try:
        return parse_assistant(text)
    except GrammarError:
        return (Text(text),)  # context is encoded as plain text, whatever it holds
