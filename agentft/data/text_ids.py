"""Text -> ids. `tokenizers` decides what they are; where there is much text `fastokens` finds the same ids sooner.

The faster one is not taken at its word: on the texts that came first the two are compared, id by id, and afterwards on
every 128th. Where it does not know a tokenizer, or differs at the start, it is not used; where it differs later
`TokenizersDisagree` is raised, and who asked begins again with `tokenizers` alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.int32]

CHECKED = 128
"""Of so many texts one is encoded by both."""

_WORTH_LOADING = 32
"""Characters an entry of the vocabulary that `tokenizers` encodes on two cores while the other is loaded."""

_LEAST_MUCH = 500_000
"""Characters, whatever the vocabulary: processes are forked then too."""

_PROOF = 100_000
"""Characters at the beginning, up to the end of their batch, that the two are compared on; fewer if it is loaded before."""

_SHORT_CHARACTERS = 16
_SHORT_TEXTS = 10_000

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


class ShortTexts:
    """Remembers the ids of the shortest texts, which are a layout's own and come again with every turn."""

    def __init__(self, encoder: TextIds) -> None:
        """Ask `encoder` for all others."""
        self._encoder = encoder
        self._known: dict[str, Ids] = {}

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text; arrays may be shared and are not to be written to."""
        known = self._known
        found = [known.get(text) for text in texts]
        new = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        encoded = self._encoder.encode(new)
        if len(known) < _SHORT_TEXTS:
            # Copies: what the encoder returns may be a part of the ids of a whole batch.
            short = ((t, ids.copy()) for t, ids in zip(new, encoded, strict=True) if len(t) <= _SHORT_CHARACTERS)
            known.update(short)
        rest = iter(encoded)
        return [next(rest) if ids is None else ids for ids in found]


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
