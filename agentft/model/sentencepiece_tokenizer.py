"""A SentencePiece byte-pair model (`tokenizer.model`) as a fast tokenizer with the same ids.

The file is a protocol buffer; the few fields that matter are read here, so that no further package is needed:
`ModelProto { 1: pieces, 2: trainer_spec, 3: normalizer_spec }` of SentencePiece's `sentencepiece_model.proto`.
Byte-pair encoding there joins, of all neighbours whose concatenation is a piece, the one of highest score.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentft.errors import ModelError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Types of pieces that are not simply text (1) or a byte (6)."""

_BPE = 2
"""`trainer_spec.model_type` of byte-pair models."""


@dataclass(slots=True)
class SentencePieceModel:
    """The contents of a `tokenizer.model`, as far as they decide the ids."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    """Text, score and type of each id."""
    kind: int = 1
    byte_fallback: bool = False
    charsmap: bytes = b""
    """Character replacements, compiled; empty: none."""
    adds_dummy_prefix: bool = True
    removes_extra_whitespaces: bool = True


def read_model(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Raises:
        ModelError: missing, or not such a file.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(path.read_bytes()):
            match number, value:
                case 1, bytes():
                    piece: dict[int, Any] = {2: 0.0, 3: 1, **dict(_fields(value))}
                    model.pieces.append((piece[1].decode(), piece[2], piece[3]))
                case 2, bytes():
                    trainer = dict(_fields(value))
                    model.kind, model.byte_fallback = trainer.get(3, 1), bool(trainer.get(35, 0))
                case 3, bytes():
                    normalizer = dict(_fields(value))
                    model.charsmap = normalizer.get(2, b"")
                    model.adds_dummy_prefix = bool(normalizer.get(3, 1))
                    model.removes_extra_whitespaces = bool(normalizer.get(4, 1))
    except (OSError, ValueError, KeyError, IndexError, struct.error, AttributeError) as error:
        raise ModelError(f"{path}: not readable as a SentencePiece model: {error}") from error
    if not model.pieces or model.kind != _BPE:
        raise ModelError(f"{path}: expected a SentencePiece model by byte-pair encoding, with pieces")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields: whole numbers, floats, or bytes for everything longer."""
    at = 0
    while at < len(data):
        tag, at = _whole(data, at)
        match tag & 7:
            case 0:
                value, at = _whole(data, at)
                yield tag >> 3, value
            case 1:
                yield tag >> 3, struct.unpack_from("<d", data, at)[0]
                at += 8
            case 5:
                yield tag >> 3, struct.unpack_from("<f", data, at)[0]
                at += 4
            case 2:
                length, at = _whole(data, at)
                if at + length > len(data):
                    raise ValueError("it ends inside a field")
                yield tag >> 3, data[at : at + length]
                at += length
            case kind:
                raise ValueError(f"unknown kind of field {kind}")


def _whole(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def fast_tokenizer(path: Path) -> Any:
    """Build a `PreTrainedTokenizerFast` from a `tokenizer.model`; neither start nor end of text is added to ids.

    Raises:
        ModelError: see `read_model`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    model = read_model(path)
    vocabulary = {piece: number for number, (piece, _, _) in enumerate(model.pieces)}
    by_kind = {kind: [piece for piece, _, k in model.pieces if k == kind] for kind in (1, _UNKNOWN, _CONTROL, 4)}
    unknown = next(iter(by_kind[_UNKNOWN]), None)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(model),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.removes_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] if model.adds_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ending = [decoders.Strip(" ", 1, 0)] if model.adds_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in [*by_kind[_UNKNOWN], *by_kind[_CONTROL]]])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in by_kind[_USER_DEFINED]])
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
        **{role: piece for role, piece in roles.items() if piece in by_kind[_CONTROL]},
    )


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to cut a piece into two others; the best score first."""
    scores = {piece: score for piece, score, kind in model.pieces if kind in (1, _USER_DEFINED)}
    cuts = [
        (-scores[piece], piece[:at], piece[at:])
        for piece, _, kind in model.pieces
        if kind == 1
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    return [(left, right) for _, left, right in sorted(cuts, key=lambda cut: cut[0])]
