"""Token ids back to text, exactly: each id stands for bytes, and nothing is trimmed or cleaned up.

A tokenizer's own `decode` drops leading spaces or replaces halves of a character; an audit that looks for labels in the
wrong place must see the very text under each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from agentft.data.render import Kind, Segment
from agentft.data.text_ids import Ids
from agentft.data.vocabulary_bytes import vocabulary_bytes


class TokenText:
    """The bytes of every id of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Read the vocabulary of `tokenizer`, a fast tokenizer of transformers: byte-level or SentencePiece."""
        self._bytes = vocabulary_bytes(tokenizer)
        self._lengths = np.array([len(piece) for piece in self._bytes], dtype=np.int64)
        self.unknown_id: int | None = tokenizer.unk_token_id
        """Its text is lost: what stands under such a token cannot be traced."""

    def bytes_of(self, ids: Ids) -> bytes:
        """The bytes under a run of tokens."""
        table = self._bytes
        return b"".join([table[index] for index in ids.tolist()])

    def text(self, ids: Ids) -> str:
        """The text under a run of tokens."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def pieces(self, ids: Ids) -> Iterator[tuple[str, int]]:
        """(text, number of tokens), a token at a time; tokens that share a character come together."""
        held, count = b"", 0
        for index in ids.tolist():
            held, count = held + self._bytes[index], count + 1
            try:
                text = held.decode()
            except UnicodeDecodeError as error:
                # Cut within a character: wait for its rest. A character has at most four bytes.
                if error.end == len(held) and len(held) - error.start < 4:
                    continue
                text = held.decode("utf-8", "replace")
            yield text, count
            held, count = b"", 0
        if count:
            yield held.decode("utf-8", "replace"), count

    def kinds(self, ids: Ids, segments: Sequence[Segment]) -> np.ndarray[Any, np.dtype[np.int8]]:
        """The kind of the segment that each token begins in, by counting bytes.

        Where a tokenizer changes the text (a normaliser, a space put in front), positions are stretched to fit.
        """
        sizes = [len(s.text) if s.text.isascii() else len(s.text.encode()) for s in segments]
        ends = np.cumsum(sizes)
        lengths = self._lengths[ids]
        starts = np.cumsum(lengths) - lengths
        total = int(lengths.sum())
        if len(ends) and total and total != ends[-1]:
            starts = starts * ends[-1] // total
        at = np.minimum(np.searchsorted(ends, starts, side="right"), max(len(segments) - 1, 0))
        return np.array([segment.kind for segment in segments] or [Kind.header], dtype=np.int8)[at]
