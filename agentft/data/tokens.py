"""Segments -> `input_ids` and labels.

One batched call into the Rust tokenizer encodes the chunks of many conversations. A chunk is a run of segments with one
fate: context is encoded in one piece, as an inference server encodes a prompt, and what the agent says begins at a chunk
boundary, so the ids of a generation prompt are exactly a prefix of the training ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from agentft.data.config import SpanWeights
from agentft.data.mixed_chunks import KindRun, kind_runs
from agentft.data.records import Conversation
from agentft.data.render import CALL_KINDS, Kind, Segment, Template
from agentft.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORE_INDEX = -100
"""Label of a position that is not trained; the default `ignore_index` of torch's cross-entropy."""

Ids = npt.NDArray[np.int32]

_ENCODE_BATCH = 512

_MARKUP = re.compile(r"<\S+>")
"""Names of added tokens that are marks of a layout, `<tool_call>` for example; runs of spaces and the like are not."""


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens of one trained kind: positions `start` to `stop`, exclusive."""

    start: int
    stop: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised conversation."""

    id: str
    input_ids: Ids
    """Shape [T]."""
    spans: tuple[Span, ...]
    """The trained runs, in order; everything outside them is context."""
    context_rounds: int = 0
    """Rounds at the start that are shown and not trained."""
    span_weights: tuple[float, ...] | None = None
    """What a token of each span counts in the loss; None: 1."""

    @property
    def labels(self) -> Ids:
        """Shape [T]: the id at trained positions, `IGNORE_INDEX` elsewhere; not shifted."""
        labels = np.full_like(self.input_ids, IGNORE_INDEX)
        for span in self.spans:
            labels[span.start : span.stop] = self.input_ids[span.start : span.stop]
        return labels

    @property
    def loss_weights(self) -> npt.NDArray[np.float32]:
        """Shape [T]: what each position counts in the loss as a label; 0 where it is none."""
        weights = np.zeros(len(self.input_ids), dtype=np.float32)
        for span, weight in zip(self.spans, self.span_weights or [1.0] * len(self.spans), strict=True):
            weights[span.start : span.stop] = weight
        return weights

    @property
    def trained_tokens(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    def steps(self) -> list[tuple[int, int]]:
        """Where the agent speaks: (first position, position after its stop token) of every step."""
        steps: list[tuple[int, int]] = []
        for span in self.spans:
            if steps and steps[-1][1] == span.start:
                steps[-1] = (steps[-1][0], span.stop)
            else:
                steps.append((span.start, span.stop))
        return steps

    def __len__(self) -> int:
        return len(self.input_ids)


class SegmentEncoder:
    """Encodes segments with a tokenizer whose special tokens are reached only by name, never through text."""

    def __init__(self, tokenizer: Any) -> None:
        """Take the Rust tokenizer out of `tokenizer`, a fast tokenizer of transformers."""
        from tokenizers import Tokenizer

        self._special_ids: dict[str, int] = dict(tokenizer.get_vocab())
        # A copy: the caller's tokenizer keeps reading special tokens in text, as its other users expect.
        self._text_tokenizer: Tokenizer = Tokenizer.from_str(_all_marks_special(tokenizer.backend_tokenizer.to_str()))
        self._text_tokenizer.encode_special_tokens = True
        self._text_tokenizer.no_truncation()
        self._text_tokenizer.no_padding()

    def fingerprint(self) -> str:
        """Digest of everything that decides the ids of a text."""
        return hashlib.sha256(self._text_tokenizer.to_str().encode()).hexdigest()

    def special_id(self, token: str) -> int:
        """Return the id of a special token.

        Raises:
            ConfigError: the vocabulary has no such token.
        """
        if token not in self._special_ids:
            raise ConfigError(
                f"{token!r} is not in the tokenizer's vocabulary; model.stop_token or model.template asks for it"
            )
        return self._special_ids[token]

    @property
    def largest_id(self) -> int:
        """The greatest id of the vocabulary, added tokens included."""
        return max(self._special_ids.values())

    def encode(self, conversations: Sequence[tuple[str, Sequence[Segment]]], context_rounds: int = 0) -> list[Example]:
        """Tokenise (id, segments) pairs in one batched call; `context_rounds` is noted in the examples."""
        drafts = [self.draft(name, segments, context_rounds) for name, segments in conversations]
        encoded = iter(self.encode_chunks([chunk for draft in drafts for chunk in draft.to_encode]))
        return [self.finish(draft, encoded) for draft in drafts]

    def draft(self, name: str, segments: Iterable[Segment], context_rounds: int = 0) -> Draft:
        """Cut segments into the chunks that are encoded each by itself."""
        return Draft(name, list(_chunks(segments)), context_rounds)

    def encode_chunks(self, chunks: Sequence[Chunk]) -> list[EncodedChunk]:
        """Ids and kinds of each chunk, with all cores. Other threads of this process run meanwhile."""
        # The places of tokens are asked for where they are needed: making them and throwing them away costs more than
        # the ids, and the throwing away is done under the interpreter's lock.
        tokenizer = self._text_tokenizer
        plain = [chunk.text for chunk in chunks if not chunk.mixed]
        mixed = [chunk.text for chunk in chunks if chunk.mixed]
        of_plain = iter(tokenizer.encode_batch_fast(plain, add_special_tokens=False))
        of_mixed = iter(tokenizer.encode_batch(mixed, add_special_tokens=False) if mixed else ())
        encoded: list[EncodedChunk] = []
        for chunk in chunks:
            if chunk.mixed:
                found = next(of_mixed)
                encoded.append((found.ids, kind_runs(chunk.mixed, found.offsets)))
            else:
                encoded.append((next(of_plain).ids, None))
        return encoded

    def finish(self, draft: Draft, encoded: Iterator[EncodedChunk]) -> Example:
        """Make the example of a draft; takes what its chunks became from `encoded`."""
        ids: list[int] = []
        spans: list[Span] = []
        for chunk in draft.chunks:
            start = len(ids)
            runs = None
            if chunk.special:
                ids.append(self.special_id(chunk.text))
            else:
                found, runs = next(encoded)
                ids.extend(found)
            if chunk.trained is not None and len(ids) > start:
                for begin, end, kind in runs or [(0, len(ids) - start, chunk.trained)]:
                    spans.append(Span(start + begin, start + end, kind))
        return Example(
            id=draft.name,
            input_ids=np.asarray(ids, dtype=np.int32),
            spans=tuple(spans),
            context_rounds=draft.context_rounds,
        )


EncodedChunk = tuple[list[int], list[KindRun] | None]
"""Ids, and where the chunk holds several kinds, which of them are of which."""


class Chunk(NamedTuple):
    """A run of text that the tokenizer takes in one piece."""

    special: bool
    trained: Kind | None
    """What its labels are, or the first of it; None for context."""
    text: str
    mixed: tuple[Segment, ...] = ()
    """Of what the chunk consists, where it is of several kinds."""

    @property
    def key(self) -> Hashable:
        """Equal for chunks that are encoded alike."""
        return (self.text, tuple((part.kind, len(part.text)) for part in self.mixed)) if self.mixed else self.text


@dataclass(frozen=True, slots=True)
class Draft:
    """A conversation cut into chunks that the tokenizer has not seen yet."""

    name: str
    chunks: list[Chunk]
    context_rounds: int

    @property
    def to_encode(self) -> list[Chunk]:
        """The chunks that are text, in order."""
        return [chunk for chunk in self.chunks if not chunk.special]

    def measure(self, encoded: Iterable[EncodedChunk]) -> tuple[int, bool]:
        """How many tokens its example would have, and whether any of them would be a label; `encoded` as in `finish`."""
        found = iter(encoded)
        tokens, labelled = 0, False
        for chunk in self.chunks:
            size = 1 if chunk.special else len(next(found)[0])
            tokens += size
            labelled = labelled or (size > 0 and chunk.trained is not None)
        return tokens, labelled


def _all_marks_special(tokenizer_json: str) -> str:
    """The tokenizer with every added token that is a mark declared special.

    Qwen adds `<tool_call>` and the like as ordinary tokens, which text reaches: a user who types one would type a control
    token.
    """
    tokenizer = json.loads(tokenizer_json)
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] or _MARKUP.fullmatch(token["content"]) is not None
    return json.dumps(tokenizer, ensure_ascii=False)


def _chunks(segments: Iterable[Segment]) -> Iterator[Chunk]:
    """Join neighbours that are encoded together: all context, or a text or call of the agent; special tokens stand alone.

    The agent's words are cut alike whether an example trains them or shows them, so both give the same ids.
    """
    joined: list[Segment] = []
    fate: Kind | None = None
    for segment in segments:
        own = (Kind.call if segment.kind in CALL_KINDS else segment.kind) if segment.spoken else None
        if joined and (segment.special or own is not fate):
            yield _join(joined)
            joined = []
        if segment.special:
            yield Chunk(True, segment.kind if segment.trained else None, segment.text)
            continue
        fate = own
        joined.append(segment)
    if joined:
        yield _join(joined)


def _join(segments: list[Segment]) -> Chunk:
    first = segments[0]
    trained = first.kind if first.trained else None
    if len(segments) == 1:
        return Chunk(False, trained, first.text)
    text = "".join([segment.text for segment in segments])
    mixed = first.spoken and any(segment.kind is not first.kind for segment in segments)
    return Chunk(False, trained, text, tuple(segments) if mixed else ())


def weigh(example: Example, weights: SpanWeights) -> Example:
    """Return the example with a weight for each span; unchanged where all count alike."""
    by_kind = {Kind.text: weights.text, Kind.call: weights.call, Kind.frame: weights.frame, Kind.stop: weights.stop}
    if set(by_kind.values()) == {1.0}:
        return example
    return replace(example, span_weights=tuple(by_kind[span.kind] for span in example.spans))


def tokenize(conversations: Iterable[Conversation], template: Template, encoder: SegmentEncoder) -> Iterator[Example]:
    """Render and encode conversations, a batch at a time, in order."""
    iterator = iter(conversations)
    while batch := list(islice(iterator, _ENCODE_BATCH)):
        yield from encoder.encode([(c.id, template.render(c)) for c in batch])
