"""A Rust tokenizer as its JSON: the head, read, and the model, which is nearly all of it and stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

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
        """Whether the ids of a text in NFC spell its bytes: byte-level BPE, nothing put before, stripped or replaced."""
        normalizers = {part["type"] for part in _parts(self.head["normalizer"], "normalizers")}
        splitters = list(_parts(self.head["pre_tokenizer"], "pretokenizers"))
        return (
            self.model.startswith('{"type":"BPE"')
            and normalizers <= {"NFC"}
            and any(part["type"] == "ByteLevel" for part in splitters)
            and not any(part.get("add_prefix_space") for part in splitters)
        )


def _parts(stage: dict[str, Any] | None, of_sequence: str) -> Iterator[dict[str, Any]]:
    if stage is None:
        return
    if stage["type"] != "Sequence":
        yield stage
        return
    for part in stage[of_sequence]:
        yield from _parts(part, of_sequence)
