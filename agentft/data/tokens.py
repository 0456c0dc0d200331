"""Segments -> `input_ids` and labels.

One batched call into the Rust tokenizer encodes the chunks of many conversations. A chunk is a run of segments with one
fate: context is encoded in one piece, as an inference server encodes a prompt, and what the agent says begins at a chunk
boundary, so the ids of a generation prompt are exactly a prefix of the training ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

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

    def encode(
        self,
        conversations: Sequence[tuple[str, Sequence[Segment]]],
        context_rounds: int = 0,
        known: dict[str, list[int]] | None = None,
    ) -> list[Example]:
        """Tokenise (id, segments) pairs in one batched call.

        Args:
            context_rounds: noted in the examples.
            known: ids of chunks by text, read and added to: for texts that differ in a few places.
        """
        chunks = [list(_chunks(segments)) for _, segments in conversations]
        plain = [chunk for chunk_list in chunks for chunk in chunk_list if not (chunk[0].special or _mixed(chunk))]
        texts = ["".join(s.text for s in chunk) for chunk in plain]
        encoded = iter(self._encode_texts(texts) if known is None else self._encode_unknown(texts, known))
        mixed = iter(self._encode_mixed([chunk for chunk_list in chunks for chunk in chunk_list if _mixed(chunk)]))
        return [
            self._assemble(name, chunk_list, encoded, mixed, context_rounds)
            for (name, _), chunk_list in zip(conversations, chunks, strict=True)
        ]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._text_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_mixed(self, chunks: list[list[Segment]]) -> list[tuple[list[int], list[KindRun]]]:
        """Ids and runs of kinds of chunks that hold several kinds; the places of tokens in the text cost some speed."""
        texts = ["".join(segment.text for segment in chunk) for chunk in chunks]
        encodings = self._text_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(e.ids, kind_runs(chunk, e.offsets)) for e, chunk in zip(encodings, chunks, strict=True)]

    def _encode_unknown(self, texts: list[str], known: dict[str, list[int]]) -> list[list[int]]:
        unknown = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(unknown, self._encode_texts(unknown), strict=True))
        return [known[text] for text in texts]

    def _assemble(
        self,
        name: str,
        chunks: list[list[Segment]],
        encoded: Iterator[list[int]],
        mixed: Iterator[tuple[list[int], list[KindRun]]],
        context_rounds: int,
    ) -> Example:
        ids: list[int] = []
        spans: list[Span] = []
        for chunk in chunks:
            first = chunk[0]
            start = len(ids)
            runs: list[KindRun] = []
            if first.special:
                ids.append(self.special_id(first.text))
            elif _mixed(chunk):
                found, runs = next(mixed)
                ids.extend(found)
            else:
                ids.extend(next(encoded))
            if first.trained and len(ids) > start:
                runs = runs or [(0, len(ids) - start, first.kind)]
                spans.extend(Span(start + begin, start + end, kind) for begin, end, kind in runs)
        return Example(
            id=name, input_ids=np.asarray(ids, dtype=np.int32), spans=tuple(spans), context_rounds=context_rounds
        )


def _all_marks_special(tokenizer_json: str) -> str:
    """The tokenizer with every added token that is a mark declared special.

    Qwen adds `<tool_call>` and the like as ordinary tokens, which text reaches: a user who types one would type a control
    token.
    """
    tokenizer = json.loads(tokenizer_json)
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] or _MARKUP.fullmatch(token["content"]) is not None
    return json.dumps(tokenizer, ensure_ascii=False)


def _chunks(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Join neighbours that are encoded together: all context, or the agent's words of one kind; special tokens stand alone.

    The agent's words are cut alike whether an example trains them or shows them, so both give the same ids.
    """
    chunk: list[Segment] = []
    for segment in segments:
        if chunk and not _joins(chunk[-1], segment):
            yield chunk
            chunk = []
        chunk.append(segment)
    if chunk:
        yield chunk


def _joins(left: Segment, right: Segment) -> bool:
    if left.special or right.special or left.spoken != right.spoken:
        return False
    return not left.spoken or left.kind == right.kind or {left.kind, right.kind} <= CALL_KINDS


def _mixed(chunk: Sequence[Segment]) -> bool:
    """Whether the agent's words in a chunk are of several kinds."""
    return len(chunk) > 1 and chunk[0].spoken and any(segment.kind is not chunk[0].kind for segment in chunk)


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
