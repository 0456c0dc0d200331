"""Baichuan-7B checkpoints as Llama: the same function, with query, key and value in one matrix (`W_pack`).

Baichuan-13B (ALiBi positions) and Baichuan2 (normalised output head) compute something else and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.errors import ModelError
from agentft.model.sentencepiece_tokenizer import fast_tokenizer

if TYPE_CHECKING:
    import torch

TARGET = "Llama"
"""Architecture of transformers that the checkpoint becomes."""

VERSION = 1
"""Part of the key of a converted folder; raised when this module writes something else than before."""

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

_PACKED = re.compile(r"(model\.layers\.\d+\.self_attn\.)W_pack\.weight")


def target_config(settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the settings of the `LlamaConfig` that computes what these settings mean.

    Raises:
        ModelError: a setting is missing, or the checkpoint is another member of the family.
    """
    if settings.get("max_position_embeddings") is None:
        raise ModelError(f"{origin}/config.json: no max_position_embeddings, so ALiBi (Baichuan-13B); 7B only")
    if "z_loss_weight" in settings or settings.get("vocab_size", 0) > 100_000:
        raise ModelError(f"{origin}/config.json: Baichuan2 normalises its output head, which Llama does not; 7B only")
    if settings.get("quantization_config") is not None:
        raise ModelError(f"{origin}/config.json: quantised weights cannot be converted")
    if missing := [name for name in _NEEDED if not isinstance(settings.get(name), int)]:
        raise ModelError(f"{origin}/config.json: expected whole numbers as {', '.join(missing)}")
    return {
        **{name: settings[name] for name in _NEEDED},
        "num_key_value_heads": settings["num_attention_heads"],
        "rms_norm_eps": float(settings.get("rms_norm_eps", 1e-6)),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": settings.get("hidden_act", "silu"),
        "tie_word_embeddings": bool(settings.get("tie_word_embeddings", False)),
        "bos_token_id": settings.get("bos_token_id", 1),
        "eos_token_id": settings.get("eos_token_id", 2),
        "pad_token_id": settings.get("pad_token_id", 0),
        "attention_bias": False,
        "dtype": str(settings.get("torch_dtype") or "float16"),
    }


def rename(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a tensor becomes: `W_pack` its three parts, saved rotary buffers nothing, the rest itself."""
    if match := _PACKED.fullmatch(name):
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{match[1]}{part}_proj.weight", rows
    elif not name.endswith("rotary_emb.inv_freq"):
        yield name, tensor


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the fast tokenizer that gives the ids of `tokenizer.model`.

    Raises:
        ModelError: the file is missing or damaged, or of another kind.
    """
    fast_tokenizer(source / "tokenizer.model").save_pretrained(folder)
