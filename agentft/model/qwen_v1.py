"""First-generation Qwen checkpoints (`model_type: qwen`) as Qwen2: the same function under other names.

Of the old layout, layer by layer: `attn.c_attn` holds query, key and value as one matrix, rows q | k | v, with bias;
the feed-forward part is `c_proj(w1(x) * silu(w2(x)))`, so `w2` is Qwen2's gate and `w1` its up-projection, each half of
`intermediate_size` wide; heads are not grouped; input and output embeddings are separate. Positions are rotary, the
norms RMSNorm. Up to `seq_length` positions that is Qwen2 exactly, in fp32 to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentft.errors import ModelError
from agentft.model.qwen_v1_tokenizer import RANKS_NAME, SPECIAL_TOKENS, end_of_text_id, fast_tokenizer

if TYPE_CHECKING:
    import torch

TARGET = "Qwen2"
"""Architecture of transformers that the checkpoint becomes."""

VERSION = 2
"""Part of the key of a converted folder; raised when this module writes something else than before."""

_SPELLINGS = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "max_position_embeddings": ("seq_length", "n_positions", "max_position_embeddings"),
}
"""Setting -> its spellings over the releases; the first that is there counts."""

_FIXED = {
    "apply_residual_connection_post_layernorm": False,
    "no_bias": True,
    "pos_emb": "rotary",
    "rotary_pct": 1.0,
    "activation": "swiglu",
    "tie_word_embeddings": False,
    "quantization_config": None,
}
"""Settings with which the old layout is Qwen2; every published checkpoint has them, bar the quantised ones."""

_PLAIN = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}

_IN_LAYER = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}

_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|logn_tensor)")
"""Buffers that early releases saved; they follow from the settings."""


def target_config(settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the settings of the `Qwen2Config` that computes what the old settings mean.

    Raises:
        ModelError: a setting is missing, or names a variant that Qwen2 cannot express.
    """
    for name, value in _FIXED.items():
        if settings.get(name, value) != value:
            raise ModelError(
                f"{origin}/config.json: {name} is {settings[name]!r}; converted to Qwen2 is {value!r} only"
            )
    found = {name: _whole(settings, spellings, origin) for name, spellings in _SPELLINGS.items()}
    head_size = found["hidden_size"] // found["num_attention_heads"]
    if settings.get("kv_channels", head_size) * found["num_attention_heads"] != found["hidden_size"]:
        raise ModelError(f"{origin}/config.json: kv_channels x heads is not the width {found['hidden_size']}")
    end_of_text = end_of_text_id(Path(origin) / RANKS_NAME)
    if end_of_text + len(SPECIAL_TOKENS) > found["vocab_size"]:
        raise ModelError(
            f"{origin}: {RANKS_NAME} needs {end_of_text + len(SPECIAL_TOKENS)} ids with its special tokens; "
            f"the model has {found['vocab_size']} embeddings"
        )
    return {
        **found,
        "intermediate_size": found["intermediate_size"] // 2,
        "num_key_value_heads": found["num_attention_heads"],
        "rms_norm_eps": float(settings.get("layer_norm_epsilon", 1e-6)),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(settings.get("rotary_emb_base", 10000))},
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "initializer_range": float(settings.get("initializer_range", 0.02)),
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        # Named here it would also freeze that row of the embeddings.
        "pad_token_id": None,
        "dtype": _dtype(settings),
    }


def rename(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a tensor of the old layout becomes: itself under another name, its three parts, or nothing."""
    if name in _PLAIN:
        yield _PLAIN[name], tensor
    elif (match := _LAYER.fullmatch(name)) and match[2] in _IN_LAYER:
        yield f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}", tensor
    elif match and match[2] in ("attn.c_attn.weight", "attn.c_attn.bias"):
        kind = match[2].rpartition(".")[2]
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield f"model.layers.{match[1]}.self_attn.{part}_proj.{kind}", rows
    elif not _COMPUTED.fullmatch(name):
        yield name, tensor


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the fast tokenizer that gives the ids of `qwen.tiktoken`.

    Raises:
        ModelError: the file is missing or damaged.
    """
    fast_tokenizer(source / RANKS_NAME).save_pretrained(folder)


def _whole(settings: Mapping[str, Any], spellings: tuple[str, ...], origin: str) -> int:
    value = next((settings[name] for name in spellings if settings.get(name) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{origin}/config.json: expected a positive whole number as {' or '.join(spellings)}")
    return value


def _dtype(settings: Mapping[str, Any]) -> str:
    for flag, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        if settings.get(flag):
            return name
    return str(settings.get("torch_dtype") or settings.get("params_dtype") or "bfloat16").removeprefix("torch.")
