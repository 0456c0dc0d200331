"""The bytes that each id of a vocabulary stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_SPACE = "▁"
"""How SentencePiece vocabularies write a space."""


def vocabulary_bytes(tokenizer: Any) -> list[bytes]:
    """By id, of a fast tokenizer of transformers: byte-level or SentencePiece."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    alphabet = byte_level_alphabet()
    spelt_in_bytes = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
    table = [b""] * (max(vocabulary.values(), default=0) + 1)
    for token, index in vocabulary.items():
        if index in added:
            table[index] = token.encode()
        elif spelt_in_bytes:
            table[index] = bytes([alphabet[c] for c in token if c in alphabet])
        else:
            table[index] = _sentencepiece_bytes(token)
    return table


def byte_level_lengths(tokenizer: Any) -> npt.NDArray[np.int64]:
    """By id, how many bytes it stands for in a byte-level vocabulary, where each character of a token is a byte."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values(), default=0) + 1, dtype=np.int64)
    lengths[list(vocabulary.values())] = list(map(len, vocabulary))
    for index, token in tokenizer.added_tokens_decoder.items():
        lengths[index] = len(str(token).encode())
    return lengths


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte in a byte-level vocabulary: printable bytes are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()
