"""Define the settings of the group `dataset`: what a dataset is and how it becomes training examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from agentft.settings import SEED, Settings

MAX_WEIGHT = 100
"""Of a token in the loss, and showings of a conversation in an epoch: more is a slip, and would fill the memory."""
SMALL_EXAM = 30
"""Held-out conversations below which intervals say little."""


class Split(StrEnum):
    """How the held-out part is chosen."""

    content = "content"
    """By a hash of the conversation's text: the same conversations are held out whatever the sample size."""
    unseen_tools = "unseen_tools"
    """Tools are held out: no tool that a held-out conversation calls is called in training."""


class TooLong(Enum):
    """Handling of a conversation of more than `max_length` tokens."""

    fit = "fit"
    """Long tool results are shortened, visibly; where that is not enough the oldest rounds are left out."""
    drop = "drop"
    """It is set aside."""
    split = "split"
    """Its rounds are spread over several examples, each with as much of the context before as fits."""


class Format(StrEnum):
    """How records are laid out; see `agentft.data.records`."""

    auto = "auto"
    """Every format that a record shows by its fields and roles."""
    msagent = "msagent"
    openai = "openai"
    sharegpt = "sharegpt"
    xlam = "xlam"
    toolace = "toolace"
    react = "react"


class Reasoning(StrEnum):
    """Handling of the reasoning in records."""

    keep = "keep"
    """It is trained, before the words it leads to."""
    drop = "drop"
    """It is left out, and counted."""
    context = "context"
    """It is shown, not trained."""


@dataclass(kw_only=True)
class SpanWeights(Settings, group="dataset.span_weights", affects="data"):
    """How much a labelled token counts in the loss, by what it is; the loss is divided by the sum of weights.

    A weight is positive: what is not trained at all is context, and `agentft.data.render` alone decides that.
    """

    reasoning: float = field(default=1.0, metadata={"above": 0, "maximum": MAX_WEIGHT})
    """Reasoning of the agent."""
    text: float = field(default=1.0, metadata={"above": 0, "maximum": MAX_WEIGHT})
    """Text before a call, answers and summaries."""
    call: float = field(default=1.0, metadata={"above": 0, "maximum": MAX_WEIGHT})
    """Names and parameters of calls. The paper of ModelScope-Agent weighs them 2."""
    call_syntax: float = field(default=1.0, metadata={"above": 0, "maximum": MAX_WEIGHT})
    """The rest of a call: marks, fence, braces, field names and other fields."""
    stop: float = field(default=1.0, metadata={"above": 0, "maximum": MAX_WEIGHT})
    """The token that ends a step."""


@dataclass(kw_only=True)
class DatasetConfig(Settings, group="dataset", affects="data"):
    """Settings that every dataset has."""

    name: str = field(metadata={"advanced": True})
    """The option of the group `dataset`; part of the run folder's name."""
    max_samples: int = field(default=-1, metadata={"minimum": 1, "maximum": 10**9, "also": -1})
    """Training conversations to use; -1: all. Samples are nested: the first 1,000 are among the first 5,000."""
    test_ratio: float | None = field(default=None, metadata={"minimum": 0, "below": 1})
    """Share of all conversations that is held out, before `max_samples` applies: every sample has the same test set; null:
    0.02, but at least 30 conversations or a fifth; 0: none."""
    test_sample: int = field(default=-1, metadata={"advanced": True, "minimum": 1, "maximum": 10**9, "also": -1})
    """Held-out conversations to use, nested like `max_samples`; -1: all."""
    split: Split = Split.content
    """How the held-out part is chosen."""
    seed: int = field(default=42, metadata=SEED)
    """Seed of the split and of the order of samples; separate from the seed of the training."""
    max_length: int = field(default=2048, metadata={"minimum": 16, "maximum": 10**7})
    """Maximum tokens of one example; `too_long` handles longer conversations."""
    too_long: TooLong = TooLong.split
    """Handling of longer conversations; each is counted. Held-out ones are split unless dropped, to keep every step."""
    span_weights: SpanWeights = field(default_factory=SpanWeights, metadata={"advanced": True})
    """Weights of the kinds of labelled tokens in the training loss; the held-out loss weighs all alike."""
    reasoning: Reasoning = Reasoning.keep
    """Handling of reasoning: keep trains it, drop leaves it out, context shows it untrained. The held-out loss counts it with
    context too, apart as loss_reasoning."""
    max_rejected: float = field(
        default=0.1, metadata={"advanced": True, "minimum": 0, "maximum": 1, "affects": "nothing"}
    )
    """Largest share of rows that may be set aside; above it the run stops and names the reasons."""
    cache: bool = field(default=True, metadata={"advanced": True, "affects": "nothing"})
    """Keep the tokenised data, and use what a run with the same data, settings, tokenizer and code has kept."""
    cache_limit_gb: float = field(
        default=20.0, metadata={"advanced": True, "above": 0, "maximum": 10**6, "affects": "nothing"}
    )
    """Size limit of that cache in 10^9 bytes; above it the data that was not used for longest is removed."""
    workers: int = field(default=0, metadata={"minimum": 0, "maximum": 1024, "affects": "nothing"})
    """Processes that read and tokenise large data; 0: one a core, at most 8; 1: only this one."""


@dataclass(kw_only=True)
class SyntheticConfig(DatasetConfig):
    """Conversations that agentft generates itself; see `agentft.data.synthetic`."""

    conversations: int = field(default=1000, metadata={"minimum": 1, "maximum": 10**7})
    """Training conversations to generate; the held-out ones are generated beside them."""
    heldout: int = field(default=60, metadata={"minimum": 1, "maximum": 10**7})
    """Held-out conversations to generate, from values (and on request tools) that training never shows."""
    chinese: float = field(default=0.1, metadata={"advanced": True, "minimum": 0, "maximum": 1})
    """Share of conversations in Chinese."""
    max_rounds: int = field(default=3, metadata={"advanced": True, "minimum": 1, "maximum": 100})
    """Most tool calls before an answer."""


@dataclass(kw_only=True)
class WeightedPath(Settings, group="dataset.sources", affects="data"):
    """One of several local sources."""

    path: str
    """A file or a folder, as `dataset.path`."""
    weight: float = field(default=1.0, metadata={"above": 0, "maximum": MAX_WEIGHT})
    """How often each of its training conversations is shown in an epoch: 0.5 keeps half of them, 2 shows each twice."""


@dataclass(kw_only=True)
class LocalConfig(DatasetConfig):
    """Conversations in local files."""

    path: str | None = None
    """A file (json, jsonl, csv, parquet; gz or zst) or a folder of such files."""
    sources: list[WeightedPath] = field(default_factory=list, metadata={"advanced": True})
    """In place of `path`: several files or folders, each with a weight, `[{path: a.jsonl, weight: 2}, {path: b}]`."""
    test_path: str | None = None
    """A file of held-out conversations; null: held out of `path` by `split` and `test_ratio`."""
    format: Format = Format.auto
    """Layout of the records: auto, msagent, openai, sharegpt, xlam, toolace or react."""


@dataclass(kw_only=True)
class HubConfig(DatasetConfig):
    """Conversations from a hub, loaded by its own client."""

    id: str
    """Name on the hub, `owner/name`."""
    train_split: str = "train"
    """Split of the hub that is trained on."""
    test_split: str | None = None
    """A split of the hub that is held out as a whole; null: held out of `train_split`."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    cache_dir: str | None = field(default=None, metadata={"advanced": True, "affects": "nothing"})
    """Folder for downloads; null: the client's own."""
    format: Format = Format.auto
    """Layout of the records, as of local files."""


@dataclass(kw_only=True)
class ModelScopeConfig(HubConfig):
    """Conversations from the ModelScope hub."""

    revision: str = "master"
    """Branch, tag or commit on the hub."""


@dataclass(kw_only=True)
class HuggingFaceConfig(HubConfig):
    """Conversations from the Hugging Face hub."""

    subset: str | None = None
    """Configuration of the dataset, where it has several; null: its default one."""
