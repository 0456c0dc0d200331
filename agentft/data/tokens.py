"""Segments -> `input_ids` and labels.

One batched call into the Rust tokenizer encodes the chunks of many conversations. A chunk is a run of segments with one
fate: context is encoded in one piece, as an inference server encodes a prompt, and what the agent says begins at a chunk
boundary, so the ids of a generation prompt are exactly a prefix of the training ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from agentft.data.records import Conversation
from agentft.data.render import Kind, MsagentTemplate, Segment
from agentft.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORE_INDEX = -100
"""Label of a position that is not trained; the default `ignore_index` of torch's cross-entropy."""

Ids = npt.NDArray[np.int32]

_ENCODE_BATCH = 512


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

    @property
    def labels(self) -> Ids:
        """Shape [T]: the id at trained positions, `IGNORE_INDEX` elsewhere; not shifted."""
        labels = np.full_like(self.input_ids, IGNORE_INDEX)
        for span in self.spans:
            labels[span.start : span.stop] = self.input_ids[span.start : span.stop]
        return labels

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
        self._text_tokenizer: Tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
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
            raise ConfigError(f"model.stop_token={token!r} is not in the tokenizer's vocabulary")
        return self._special_ids[token]

    def encode(self, conversations: Sequence[tuple[str, Sequence[Segment]]]) -> list[Example]:
        """Tokenise (id, segments) pairs in one batched call."""
        chunks = [list(_chunks(segments)) for _, segments in conversations]
        texts = [
            "".join(s.text for s in chunk) for chunk_list in chunks for chunk in chunk_list if not chunk[0].special
        ]
        encoded = iter(self._text_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [
            self._assemble(name, chunk_list, encoded)
            for (name, _), chunk_list in zip(conversations, chunks, strict=True)
        ]

    def _assemble(self, name: str, chunks: list[list[Segment]], encoded: Iterator[Any]) -> Example:
        ids: list[int] = []
        spans: list[Span] = []
        for chunk in chunks:
            first = chunk[0]
            start = len(ids)
            if first.special:
                ids.append(self.special_id(first.text))
            else:
                ids.extend(next(encoded).ids)
            if first.trained and len(ids) > start:
                spans.append(Span(start, len(ids), first.kind))
        return Example(id=name, input_ids=np.asarray(ids, dtype=np.int32), spans=tuple(spans))


def _chunks(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Join neighbours that are encoded together: all context, or trained text of one kind; special tokens stand alone."""
    chunk: list[Segment] = []
    for segment in segments:
        if chunk and not _joins(chunk[-1], segment):
            yield chunk
            chunk = []
        chunk.append(segment)
    if chunk:
        yield chunk


def _joins(left: Segment, right: Segment) -> bool:
    if left.special or right.special or left.trained != right.trained:
        return False
    return not left.trained or left.kind == right.kind


def tokenize(
    conversations: Iterable[Conversation], template: MsagentTemplate, encoder: SegmentEncoder
) -> Iterator[Example]:
    """Render and encode conversations, a batch at a time, in order."""
    iterator = iter(conversations)
    while batch := list(islice(iterator, _ENCODE_BATCH)):
        yield from encoder.encode([(c.id, template.render(c)) for c in batch])
