"""Text -> ids. `tokenizers` decides what they are; where there is much text `fastokens` finds the same ids sooner.

The faster one is never believed for its name: what `tokenizers` has encoded before it is there is encoded again and
compared, id by id, and afterwards every 64th text. Where it knows a tokenizer not, or differs at the start, it is not used;
where it differs later `TokenizersDisagree` is raised, and who asked begins again with `tokenizers` alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.int32]

CHECKED = 64
"""Of so many texts one is encoded by both."""

_WORTH_LOADING = 2
"""Characters an entry of the vocabulary after which it is loaded: `tokenizers` takes about as long for seven times as many."""

_SHORT_CHARACTERS = 16
_SHORT_TEXTS = 10_000

log = logging.getLogger(__name__)


class TokenizersDisagree(Exception):  # noqa: N818  # what happened, not whose error it is
    """The two tokenizers gave a text different ids."""

    def __init__(self, text: str) -> None:
        super().__init__(f"fastokens and tokenizers encode {text[:80]!r} differently")


class TextIds(Protocol):
    """Encodes texts, in which no special token is ever read."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, shape [T], with all cores. May be called by several threads."""


class ReferenceIds:
    """By `tokenizers`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer that reads no special tokens in text, cuts nothing and pads nothing."""
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(each.ids, dtype=np.int32) for each in encoded]


class FastIds:
    """By `tokenizers` at first; as soon as there is much text by `fastokens`, if that is found to give the same ids."""

    def __init__(self, reference: ReferenceIds, worth_loading: int | None = None) -> None:
        """Begin with `reference`; load the other after `worth_loading` characters, by default by the vocabulary's size."""
        self._reference = reference
        vocabulary = reference.tokenizer.get_vocab_size()
        self._characters_left = _WORTH_LOADING * vocabulary if worth_loading is None else worth_loading
        self._lock = threading.Lock()
        self._proof: list[tuple[Sequence[str], list[Ids]]] = []
        """What `tokenizers` encoded before the other was loaded."""
        self._loading = False
        self._fast: _Fastokens | None = None
        self._texts = 0

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text. One caller loads the faster tokenizer; the others do not wait for it.

        Raises:
            TokenizersDisagree: of a text that was encoded by both.
        """
        if self._to_be_loaded():
            self._fast = self._load()
        fast = self._fast
        if fast is None:
            ids = self._reference.encode(texts)
            self._remember(texts, ids)
            return ids
        ids = fast.encode(texts)
        first = -self._texts % CHECKED
        self._texts += len(texts)
        _require_equal(texts[first::CHECKED], ids[first::CHECKED], self._reference.encode(texts[first::CHECKED]))
        return ids

    @property
    def is_fast(self) -> bool:
        """Whether the faster tokenizer is at work."""
        return self._fast is not None

    def _to_be_loaded(self) -> bool:
        """True once, for the first caller after enough characters."""
        with self._lock:
            if self._loading or self._characters_left > 0:
                return False
            self._loading = True
            return True

    def _remember(self, texts: Sequence[str], ids: list[Ids]) -> None:
        with self._lock:
            if not self._loading:
                self._proof.append((texts, ids))
                self._characters_left -= sum(map(len, texts))

    def _load(self) -> _Fastokens | None:
        """The faster tokenizer, None where it cannot be had or differs on what was encoded so far."""
        proof, self._proof = self._proof, []
        try:
            fast = _Fastokens(self._reference.tokenizer)
            for texts, ids in proof:
                _require_equal(texts, fast.encode(texts), ids)
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
            known.update((t, ids) for t, ids in zip(new, encoded, strict=True) if len(t) <= _SHORT_CHARACTERS)
        rest = iter(encoded)
        return [next(rest) if ids is None else ids for ids in found]


class _Fastokens:
    def __init__(self, tokenizer: Tokenizer) -> None:
        from fastokens import Tokenizer as FastTokenizer

        self._tokenizer = FastTokenizer.from_json_str(tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        ids_in_bytes, ends_in_bytes = self._tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        ids = np.frombuffer(ids_in_bytes, dtype="<u4").astype(np.int32)
        places = np.frombuffer(ends_in_bytes, dtype="<u8").tolist()
        return [ids[start:end] for start, end in zip(places, places[1:], strict=False)]


def _require_equal(texts: Sequence[str], found: Sequence[Ids], expected: Sequence[Ids]) -> None:
    for text, ours, theirs in zip(texts, found, expected, strict=True):
        if not np.array_equal(ours, theirs):
            raise TokenizersDisagree(text)
