"""`qwen.tiktoken` as a fast tokenizer with the same ids.

The file lists byte strings with their ranks: a byte-pair encoding in which, of all neighbours whose concatenation is
listed, the pair of lowest rank is joined first. A fast tokenizer wants the pairs themselves. Each listed string arises
from exactly one pair, the last two pieces left when it is encoded with the lower ranks alone; inside a longer text the
joins within its borders come in the same order, so the listed pairs are all that ever join.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentft.data.vocabulary_bytes import byte_level_alphabet
from agentft.errors import ModelError

RANKS_NAME = "qwen.tiktoken"

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pieces of text that are encoded on their own, after NFC."""

END_OF_TEXT = "<|endoftext|>"

SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
"""Their ids follow the ranks, in this order."""


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a ranks file: on each line a byte string in base64, a space, its rank; ranks count from 0 without gaps.

    Raises:
        ModelError: missing, or not such a file.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ModelError(f"{path}: cannot read the tokenizer: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ModelError(f"{path}:{number}: expected base64, a space and a rank, found {line[:60]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelError(f"{path}: ranks are not 0 to {len(ranks) - 1}, each once; is the file complete?")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ModelError(f"{path}: not every single byte has a rank")
    return ranks


def end_of_text_id(path: Path) -> int:
    """Id of the token that ends a text: the first after the ranks."""
    return len(read_ranks(path))


def merges_of(ranks: Mapping[bytes, int], origin: str) -> list[tuple[bytes, bytes]]:
    """Return the pairs that are joined, the first to be joined first.

    Raises:
        ModelError: a listed string that no pair gives, so the file is no byte-pair encoding.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        pieces = _pieces_below(token, rank, ranks)
        if len(pieces) != 2:
            raise ModelError(f"{origin}: {token!r} is not the join of two earlier tokens")
        merges.append((pieces[0], pieces[1]))
    return merges


def _pieces_below(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        joined = [ranks.get(a + b, limit) for a, b in zip(pieces, pieces[1:], strict=False)]
        lowest = min(joined)
        if lowest >= limit:
            break
        at = joined.index(lowest)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def fast_tokenizer(path: Path) -> Any:
    """Build a `PreTrainedTokenizerFast` from a ranks file.

    Raises:
        ModelError: the file is missing or no byte-pair encoding.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks = read_ranks(path)
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in merges_of(ranks, str(path))]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    by_byte = {byte: letter for letter, byte in byte_level_alphabet().items()}
    return [by_byte[byte] for byte in range(256)]
