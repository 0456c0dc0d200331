"""Token ids back to text, exactly: each id stands for bytes, and nothing is trimmed or cleaned up.

A tokenizer's own `decode` drops leading spaces or replaces halves of a character; an audit that looks for labels in the
wrong place must see the very text under each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from agentft.data.render import Kind, Segment
from agentft.data.tokens import Ids

_SPACE = "▁"
"""How SentencePiece vocabularies write a space."""


class TokenText:
    """The bytes of every id of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Read the vocabulary of `tokenizer`, a fast tokenizer of transformers: byte-level or SentencePiece."""
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        alphabet = _byte_level_alphabet()
        spelt_in_bytes = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
        self._bytes: list[bytes] = [b""] * (max(vocabulary.values(), default=0) + 1)
        for token, index in vocabulary.items():
            if index in added:
                self._bytes[index] = token.encode()
            elif spelt_in_bytes:
                self._bytes[index] = bytes(alphabet[c] for c in token if c in alphabet)
            else:
                self._bytes[index] = _sentencepiece_bytes(token)
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


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte in a byte-level vocabulary: printable bytes are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()
