"""Turn text into token ids and ids back into text, exactly.

The faster one is not taken at its word: on the texts that came first the two are compared, id by id, and afterwards on
every 128th. Where it does not know a tokenizer, or differs at the start, it is not used; where it differs later
`TokenizersDisagree` is raised, and who asked begins again with `tokenizers` alone.

A tokenizer's own `decode` drops leading spaces or replaces halves of a character; an audit that looks for labels in the
wrong place must see the very text under each token.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from agentft.data.render import Segment, SpanKind

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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


_MODEL = ',"model":{'
"""Within a string its quotes would be escaped, so it is found only where the model begins."""


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """What `Tokenizer.to_str()` writes; reading the model's vocabulary as well would take most of the time."""

    head: dict[str, Any]
    """Everything but the model."""
    model: str
    """The object of the model."""

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerJson:
        """The JSON of a `tokenizers.Tokenizer`."""
        text = tokenizer.to_str()
        head, found, model = text.partition(_MODEL)
        if found:
            return cls(json.loads(head + "}"), "{" + model[:-1])
        whole = json.loads(text)
        model = json.dumps(whole.pop("model"), ensure_ascii=False)
        return cls(whole, model)

    def with_special(self, is_special: Any) -> TokenizerJson:
        """The tokenizer with every added token that `is_special(content)` declared special."""
        added = [
            {**token, "special": token["special"] or is_special(token["content"])}
            for token in self.head["added_tokens"]
        ]
        return replace(self, head={**self.head, "added_tokens": added})

    def __str__(self) -> str:
        return json.dumps(self.head, ensure_ascii=False)[:-1] + _MODEL + self.model[1:] + "}"

    @property
    def keeps_every_byte(self) -> bool:
        """Return whether the ids of a text in NFC spell its bytes: byte-level BPE, nothing put before, stripped or replaced."""
        normalizers = {part["type"] for part in _parts(self.head["normalizer"], "normalizers")}
        splitters = list(_parts(self.head["pre_tokenizer"], "pretokenizers"))
        return (
            self.model.startswith('{"type":"BPE"')
            and normalizers <= {"NFC"}
            and any(part["type"] == "ByteLevel" for part in splitters)
            and not any(part.get("add_prefix_space") for part in splitters)
        )

    @property
    def cuts_anywhere(self) -> bool:
        """Return whether a border between two tokens cuts a text in two with the same ids alone: no pattern looks ahead."""
        return all(part["type"] == "Metaspace" for part in _parts(self.head["pre_tokenizer"], "pretokenizers"))


def _parts(stage: dict[str, Any] | None, of_sequence: str) -> Iterator[dict[str, Any]]:
    if stage is None:
        return
    if stage["type"] != "Sequence":
        yield stage
        return
    for part in stage[of_sequence]:
        yield from _parts(part, of_sequence)


Ids = npt.NDArray[np.int32]

CHECKED = 128
"""Of so many texts one is encoded by both."""

_WORTH_LOADING = 32
"""Characters an entry of the vocabulary that `tokenizers` encodes on two cores while the other is loaded."""

_LEAST_MUCH = 500_000
"""Characters, whatever the vocabulary: processes are forked then too."""

_PROOF = 100_000
"""Characters at the beginning, up to the end of their batch, that the two are compared on; fewer if it is loaded before."""

log = logging.getLogger(__name__)


class TokenizersDisagree(Exception):  # noqa: N818  # what happened, not whose error it is
    """The two tokenizers gave a text different ids."""

    def __str__(self) -> str:
        return f"fastokens and tokenizers encode {self.args[0]!r} differently"


class TextIds(Protocol):
    """Encodes texts."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, shape [T]. May be called by several threads."""


class ReferenceIds:
    """By `tokenizers`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer that cuts nothing and pads nothing; whether it reads special tokens in text is its own affair."""
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, with all cores."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(each.ids, dtype=np.int32) for each in encoded]


class FastIds:
    """By `tokenizers` until there is much text, then by `fastokens`, if that is found to give the same ids."""

    def __init__(self, reference: ReferenceIds, *, much: bool) -> None:
        """Begin with `reference`; `much`: more is to come than repays the loading. Else that has to show first."""
        self._reference = reference
        self._repaid = 0 if much else max(_WORTH_LOADING * reference.tokenizer.get_vocab_size(), _LEAST_MUCH)
        self._fast: _Fastokens | None = None
        self._proof: list[str] = []
        """Texts that came first."""
        self._characters = self._texts = 0
        self.is_settled = False
        """Whether it is known which of the two encodes what is to come."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text.

        Raises:
            TokenizersDisagree: of a text that was encoded by both.
        """
        if self._fast is not None:
            ids = self._fast.encode(texts)
            first = -self._texts % CHECKED
            self._texts += len(texts)
            _require_equal(texts[first::CHECKED], ids[first::CHECKED], self._reference)
            return ids
        if self._characters < _PROOF:
            self._proof += texts
        self._characters += sum(map(len, texts))
        return self._reference.encode(texts)

    def settle(self) -> bool:
        """Load the faster one if that is worth it by now, and say whether it is known which will be used from here on.

        To be called between two batches, by the thread that hands them out.
        """
        if not self.is_settled and self._proof and self._characters >= self._repaid:
            self._fast = self._load()
            self.is_settled, self._proof = True, []
        return self.is_settled

    def _load(self) -> _Fastokens | None:
        """The faster tokenizer, None where it cannot be had or differs on what came first."""
        try:
            fast = _Fastokens(self._reference.tokenizer)
            proof = list(self._proof)
            _require_equal(proof, fast.encode(proof), self._reference)
        except (ImportError, ValueError, RuntimeError, TokenizersDisagree) as error:
            log.warning("data: encoded by tokenizers alone, which is slower: %s", error)
            return None
        return fast


class _Fastokens:
    def __init__(self, tokenizer: Tokenizer) -> None:
        # Texts are shared out by those who ask for them. Threads of its own would be lost, and maybe missed, in a fork.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        from fastokens import Tokenizer as FastTokenizer

        self._splits = bool(tokenizer.encode_special_tokens)
        self._tokenizer = FastTokenizer.from_json_str(tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        ids_in_bytes, ends_in_bytes = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=self._splits)
        ids = np.frombuffer(ids_in_bytes, dtype="<u4").astype(np.int32)
        places = np.frombuffer(ends_in_bytes, dtype="<u8").tolist()
        return [ids[start:end] for start, end in zip(places, places[1:], strict=False)]


def _require_equal(texts: Sequence[str], found: Sequence[Ids], reference: ReferenceIds) -> None:
    for text, ours, theirs in zip(texts, found, reference.encode(texts), strict=True):
        if not np.array_equal(ours, theirs):
            raise TokenizersDisagree(text[:80])


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
        return np.array([segment.kind for segment in segments] or [SpanKind.header], dtype=np.int8)[at]
