"""Read `qwen.tiktoken`, byte strings with the ranks by which pairs are joined, as a fast tokenizer with the same ids."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

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


def fast_tokenizer(path: Path) -> Any:
    """Build a `PreTrainedTokenizerFast` from a ranks file.

    Raises:
        ModelError: see `read_ranks`.
    """
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(path, pattern=PATTERN, extra_special_tokens=SPECIAL_TOKENS)
    # Its own reader needs tiktoken, which copies the file into the machine's temporary folder and trusts what lies there.
    converter.load_tiktoken_bpe = read_ranks
    backend = converter.converted()
    backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
