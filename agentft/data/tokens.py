"""Encode segments into `input_ids` and labels.

A token that carries any character of a call's name or parameters is of that kind, its other characters notwithstanding:
`"Husum"}}` ends the parameters, and the braces behind them come along.

One batched call into the Rust tokenizer encodes the chunks of many conversations. A chunk is a run of segments with one
fate: context is encoded in one piece, as an inference server encodes a prompt, and what the agent says begins at a chunk
boundary, so the ids of a generation prompt are exactly a prefix of the training ids.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from agentft.data.config import SpanWeights
from agentft.data.conversation import Conversation
from agentft.data.render import MsagentTemplate, Segment, SpanKind
from agentft.data.text_ids import (
    FastIds,
    Ids,
    ReferenceIds,
    ShortTexts,
    TokenizerJson,
    TokenizersDisagree,
    byte_level_lengths,
)
from agentft.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from agentft.data.chat_tokens import RenderingEncoder

KindRun = tuple[int, int, SpanKind]
"""First token, the one after the last, and their kind."""

MixedChunk = tuple[str, Sequence[Segment], Ids]
"""The text of a chunk, what it consists of, and its ids."""


class MixedChunks:
    """Tells the kinds of tokens by counting the bytes of their ids or, where ids do not spell bytes, by their offsets."""

    def __init__(self, text_tokenizer: Tokenizer, byte_level: Any | None) -> None:
        """`byte_level`: the tokenizer of transformers, if the ids of a text in NFC spell its very bytes."""
        self._text_tokenizer = text_tokenizer
        self._byte_level = byte_level
        self._lengths: npt.NDArray[np.int64] | None = None

    def kind_runs(self, chunks: Sequence[MixedChunk]) -> list[list[KindRun]]:
        """The runs of one kind among the tokens of each chunk of frame and call."""
        stops = [self._stops(text, ids) for text, _, ids in chunks]
        by_offsets = [text for (text, _, _), found in zip(chunks, stops, strict=True) if found is None]
        encoded = iter(self._text_tokenizer.encode_batch(by_offsets, add_special_tokens=False) if by_offsets else ())
        runs: list[list[KindRun]] = []
        for (text, segments, _), found in zip(chunks, stops, strict=True):
            if found is None:
                offsets = next(encoded).offsets
                # A token without width stands for something that the tokenizer trimmed: it is what stands at its place.
                ends = [max(stop, start + 1) for start, stop in offsets]
                runs.append(_runs(segments, [len(s.text) for s in segments], [start for start, _ in offsets], ends))
            else:
                ascii_only = text.isascii()
                sizes = [len(s.text) if ascii_only else len(s.text.encode()) for s in segments]
                runs.append(_runs(segments, sizes, [0, *found][: len(found)], found))
        return runs

    def _stops(self, text: str, ids: Ids) -> list[int] | None:
        """Where in the bytes of the text each of its tokens ends; None where counting bytes says nothing."""
        if self._byte_level is None or not (text.isascii() or unicodedata.is_normalized("NFC", text)):
            return None
        if self._lengths is None:
            self._lengths = byte_level_lengths(self._byte_level)
        stops: list[int] = np.cumsum(self._lengths[ids]).tolist()
        size = len(text) if text.isascii() else len(text.encode())
        return stops if (stops[-1] if stops else 0) == size else None


def _runs(
    segments: Sequence[Segment], sizes: Sequence[int], starts: Sequence[int], stops: Sequence[int]
) -> list[KindRun]:
    """Runs of a chunk of frame and call: `sizes` of its segments and the places of its tokens, in the same unit."""
    runs: list[KindRun] = []
    end = done = 0
    for segment, size in zip(segments, sizes, strict=True):
        begin, end = end, end + size
        if segment.kind is not SpanKind.call or not size:
            continue
        first, last = max(bisect_right(stops, begin), done), bisect_left(starts, end)
        if first >= last:
            continue
        if runs and first == done:
            runs[-1] = (runs[-1][0], last, SpanKind.call)
        else:
            if first > done:
                runs.append((done, first, SpanKind.frame))
            runs.append((first, last, SpanKind.call))
        done = last
    if done < len(starts):
        runs.append((done, len(starts), SpanKind.frame))
    return runs


T = TypeVar("T")

IGNORE_INDEX = -100
"""Label of a position that is not trained; the default `ignore_index` of torch's cross-entropy."""

_ENCODE_BATCH = 512

_MARKUP = re.compile(r"<\S+>")
"""Names of added tokens that are marks of a layout, `<tool_call>` for example; runs of spaces and the like are not."""

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """A run of tokens of one trained kind: positions `start` to `stop`, exclusive."""

    start: int
    stop: int
    kind: SpanKind


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

        self._tokenizer = tokenizer
        self._renderings: RenderingEncoder | None = None
        self._much: bool | None = None
        """Of one that comes to be faster: whether much text is known to come."""
        self._special_ids: dict[str, int] = dict(tokenizer.get_vocab())
        self._largest_id = max(self._special_ids.values())
        # Qwen adds `<tool_call>` and the like as ordinary tokens, which text reaches: a user who types one would type a
        # control token.
        marked = TokenizerJson.of(tokenizer.backend_tokenizer).with_special(_is_mark)
        # A copy: the caller's tokenizer keeps reading special tokens in text, as its other users expect.
        self._text_tokenizer: Tokenizer = Tokenizer.from_str(str(marked))
        self._text_tokenizer.encode_special_tokens = True
        self._text_tokenizer.no_truncation()
        self._text_tokenizer.no_padding()
        self._text_ids = ShortTexts(ReferenceIds(self._text_tokenizer))
        self._fast_ids: FastIds | None = None
        self._specials: dict[str, Ids] = {}
        """Shape [1] each."""
        self._mixed = MixedChunks(self._text_tokenizer, tokenizer if marked.keeps_every_byte else None)

    def renderings(self, control: re.Pattern[str]) -> RenderingEncoder:
        """Return the encoder of renderings of this tokenizer's chat template; `control` matches one control token."""
        if self._renderings is None:
            from agentft.data.chat_tokens import RenderingEncoder

            made = RenderingEncoder(self._tokenizer, control)
            self._renderings = made if self._much is None else made.for_much_text(much=self._much)
        return self._renderings

    def for_much_text(self, *, much: bool) -> SegmentEncoder:
        """One that gives the same ids and comes to be faster, at once where `much` text is known to come.

        What it does may raise `TokenizersDisagree`, see `text_ids`.
        """
        other = copy(self)
        other._fast_ids = FastIds(ReferenceIds(self._text_tokenizer), much=much)
        other._text_ids = ShortTexts(other._fast_ids)
        other._much, other._renderings = much, None
        return other

    def settle(self) -> bool:
        """Between two batches: load the faster tokenizer if that is worth it by now; whether no other will be loaded."""
        if self._renderings is not None:
            return self._renderings.settle()
        return self._fast_ids is None or self._fast_ids.settle()

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
        return self._largest_id

    def encode(self, conversations: Sequence[tuple[str, Sequence[Segment]]], context_rounds: int = 0) -> list[Example]:
        """Tokenise (id, segments) pairs in one batched call; `context_rounds` is noted in the examples."""
        drafts = [self.draft(name, segments, context_rounds) for name, segments in conversations]
        encoded = iter(self.encode_chunks([chunk for draft in drafts for chunk in draft.to_encode]))
        return [self.finish(draft, encoded) for draft in drafts]

    def draft(self, name: str, segments: Iterable[Segment], context_rounds: int = 0) -> Draft:
        """Cut segments into the chunks that are encoded each by itself."""
        return Draft(name, _chunks(segments), context_rounds)

    def encode_chunks(self, chunks: Sequence[Chunk]) -> list[EncodedChunk]:
        """Ids and kinds of each chunk. Other threads of this process run meanwhile."""
        found = self._text_ids.encode([chunk.text for chunk in chunks])
        mixed = [(chunk.text, chunk.mixed, ids) for chunk, ids in zip(chunks, found, strict=True) if chunk.mixed]
        runs = iter(self._mixed.kind_runs(mixed))
        return [(ids, next(runs) if chunk.mixed else None) for chunk, ids in zip(chunks, found, strict=True)]

    def finish(self, draft: Draft, encoded: Iterator[EncodedChunk]) -> Example:
        """Make the example of a draft; takes what its chunks became from `encoded`."""
        parts: list[Ids] = []
        spans: list[Span] = []
        end = 0
        for chunk in draft.chunks:
            found, runs = (self._special(chunk.text), None) if chunk.special else next(encoded)
            parts.append(found)
            start, end = end, end + len(found)
            if chunk.trained is not None and end > start:
                for first, last, kind in runs or [(0, end - start, chunk.trained)]:
                    spans.append(Span(start + first, start + last, kind))
        return Example(
            id=draft.name,
            input_ids=np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32),
            spans=tuple(spans),
            context_rounds=draft.context_rounds,
        )

    def _special(self, token: str) -> Ids:
        ids = self._specials.get(token)
        if ids is None:
            ids = self._specials[token] = np.array([self.special_id(token)], dtype=np.int32)
        return ids


EncodedChunk = tuple[Ids, list[KindRun] | None]
"""Ids, and where the chunk holds several kinds, which of them are of which."""


class Chunk(NamedTuple):
    """A run of text that the tokenizer takes in one piece."""

    special: bool
    trained: SpanKind | None
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


def _is_mark(content: str) -> bool:
    return _MARKUP.fullmatch(content) is not None


def _chunks(segments: Iterable[Segment]) -> list[Chunk]:
    """Join neighbours that are encoded together: all context, or a text or call of the agent; special tokens stand alone.

    The agent's words are cut alike whether an example trains them or shows them, so both give the same ids.
    """
    chunks: list[Chunk] = []
    joined: list[Segment] = []
    fate: SpanKind | None = None
    for segment in segments:
        own = segment.encoded_with
        if joined and (segment.special or own is not fate):
            chunks.append(_join(joined, fate))
            joined = []
        if segment.special:
            chunks.append(Chunk(True, segment.kind if segment.trained else None, segment.text))
        else:
            fate = own
            joined.append(segment)
    if joined:
        chunks.append(_join(joined, fate))
    return chunks


def _join(segments: list[Segment], fate: SpanKind | None) -> Chunk:
    first = segments[0]
    trained = first.kind if first.trained else None
    if len(segments) == 1:
        return Chunk(False, trained, first.text)
    text = "".join([segment.text for segment in segments])
    mixed = fate is SpanKind.call and any(segment.kind is not first.kind for segment in segments)
    return Chunk(False, trained, text, tuple(segments) if mixed else ())


def weigh(example: Example, weights: SpanWeights) -> Example:
    """Return the example with a weight for each span; unchanged where all count alike."""
    by_kind = {
        SpanKind.reasoning: weights.reasoning,
        SpanKind.text: weights.text,
        SpanKind.call: weights.call,
        SpanKind.frame: weights.frame,
        SpanKind.stop: weights.stop,
    }
    if set(by_kind.values()) == {1.0}:
        return example
    return replace(example, span_weights=tuple(by_kind[span.kind] for span in example.spans))


def encode_fast(encoder: SegmentEncoder, work: Callable[[SegmentEncoder], T], *, much: bool) -> T:
    """Do work with the tokenizer that is faster for much text; all of it again with `tokenizers` alone where they differ."""
    try:
        return work(encoder.for_much_text(much=much))
    except TokenizersDisagree as error:
        log.warning("data: %s; begun again with tokenizers alone", error)
        return work(encoder)


def tokenize(
    conversations: Iterable[Conversation], template: MsagentTemplate, encoder: SegmentEncoder
) -> Iterator[Example]:
    """Render and encode conversations, a batch at a time, in order."""
    iterator = iter(conversations)
    while batch := list(islice(iterator, _ENCODE_BATCH)):
        yield from encoder.encode([(c.id, template.render(c)) for c in batch])
