"""Rewrite checkpoints of architectures that transformers lacks as ones that it has, once, without running their code.

First-generation Qwen (`model_type: qwen`) is, up to `seq_length` positions, Qwen2 exactly: `attn.c_attn` holds the rows q | k |
v, with bias, and the feed-forward part is `c_proj(w1(x) * silu(w2(x)))`, each of the two half of `intermediate_size` wide.
Baichuan-7B is Llama with query, key and value in one matrix (`W_pack`); Baichuan-13B and Baichuan2 are refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agentft.cache import build_once, cache_root
from agentft.errors import ModelError
from agentft.model.shards import empty_model, holds_weights, read_json, rewrite_weights, weight_files

log = logging.getLogger(__name__)


class OldLayout(NamedTuple):
    """How the checkpoints of one old architecture are written."""

    target: str
    """Architecture of transformers that the checkpoint becomes."""
    version: int
    """Part of the key of a converted folder; raised when the conversion writes something else than before."""
    settings: Callable[[Mapping[str, Any], str], dict[str, Any]]
    """(config.json, origin) -> settings of the target's config class. Raises ModelError for what the target cannot express."""
    rename: Callable[[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]
    """Yields what a tensor becomes."""
    tokenizer: Callable[[Path], Any]
    """Folder -> fast tokenizer with the same ids. Raises ModelError where the file is missing or damaged."""


def needs_conversion(settings: Mapping[str, Any]) -> bool:
    """Return whether a model with this config.json has to be rewritten before transformers can load it."""
    return settings.get("model_type") in LAYOUTS


def converted_folder(
    source: Path, *, fingerprint: str, context: int, cache_dir: str | None, allow_pickle: bool = False
) -> Path:
    """Return a folder with the same model in the target's layout: safetensors, config.json, fast tokenizer.

    It is made once for each state of the source: `fingerprint`, and size and time of each weight file. Memory needed:
    one shard; disk: as much as the source.

    Raises:
        ModelError: the source is another variant than the layout's module can express exactly, it is incomplete, its
            weights are pickles and `allow_pickle` is false, `context` exceeds what it was made for, or the disk is full.
    """
    settings = read_json(source / "config.json")
    layout = LAYOUTS[settings["model_type"]]
    target_settings = layout.settings(settings, str(source))
    _check_context(source, settings, target_settings, context)
    files = weight_files(source, allow_pickle=allow_pickle)
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([fingerprint, states, layout.version]).encode()).hexdigest()[:16]
    folder_in_cache = cache_root(cache_dir) / "models" / f"{settings['model_type']}-{key}"

    def build(folder: Path) -> None:
        import transformers

        log.info("converting %s (%s -> %s)", source, settings["model_type"], layout.target)
        tokenizer = layout.tokenizer(source)
        values = {"eos_token_id": tokenizer.eos_token_id, **target_settings}
        if len(tokenizer) > values["vocab_size"]:
            raise ModelError(
                f"{source}: its tokenizer has {len(tokenizer)} ids; the model has {values['vocab_size']} embeddings"
            )
        hf_config = getattr(transformers, f"{layout.target}Config")(**values)
        hf_config.architectures = [f"{layout.target}ForCausalLM"]
        expected = {name: tuple(tensor.shape) for name, tensor in empty_model(hf_config).state_dict().items()}
        rewrite_weights(files, folder, layout.rename, expected)
        hf_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return build_once(folder_in_cache, build, is_whole=holds_weights)


def _check_context(source: Path, settings: Mapping[str, Any], target: Mapping[str, Any], context: int) -> None:
    """Beyond its length the original Qwen scales queries (log-n) and rotary angles (dynamic NTK); Qwen2 does neither."""
    length = target["max_position_embeddings"]
    if context > length:
        scaled = [name for name in ("use_logn_attn", "use_dynamic_ntk") if settings.get(name)]
        beyond = f" (beyond it the original changes its attention: {', '.join(scaled)})" if scaled else ""
        raise ModelError(
            f"model.context={context}: {source} was made for {length} positions, and the conversion is exact up to "
            f"there{beyond}; set model.context={length}"
        )


_QWEN_SPELLINGS = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "max_position_embeddings": ("seq_length", "n_positions", "max_position_embeddings"),
}
"""Setting -> its spellings over the releases; the first that is there counts."""

_QWEN_FIXED = {
    "apply_residual_connection_post_layernorm": False,
    "no_bias": True,
    "pos_emb": "rotary",
    "rotary_pct": 1.0,
    "activation": "swiglu",
    "tie_word_embeddings": False,
    "quantization_config": None,
}
"""Settings with which the old layout is Qwen2; every published checkpoint has them, bar the quantised ones."""

_QWEN_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}

_QWEN_NAMES_IN_LAYER = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}

_QWEN_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_QWEN_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|logn_tensor)")
"""Buffers that early releases saved; they follow from the settings."""


def qwen_settings(settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the settings of the `Qwen2Config` that computes what the old settings mean.

    Raises:
        ModelError: a setting is missing, or names a variant that Qwen2 cannot express.
    """
    for name, value in _QWEN_FIXED.items():
        if settings.get(name, value) != value:
            raise ModelError(
                f"{origin}/config.json: {name} is {settings[name]!r}; converted to Qwen2 is {value!r} only"
            )
    found = {name: _whole(settings, spellings, origin) for name, spellings in _QWEN_SPELLINGS.items()}
    head_size = found["hidden_size"] // found["num_attention_heads"]
    if settings.get("kv_channels", head_size) * found["num_attention_heads"] != found["hidden_size"]:
        raise ModelError(f"{origin}/config.json: kv_channels x heads is not the width {found['hidden_size']}")
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
        # Named here it would also freeze that row of the embeddings.
        "pad_token_id": None,
        "dtype": _qwen_dtype(settings),
    }


def qwen_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a tensor of the old layout becomes: itself under another name, its three parts, or nothing."""
    if name in _QWEN_NAMES:
        yield _QWEN_NAMES[name], tensor
    elif (match := _QWEN_LAYER.fullmatch(name)) and match[2] in _QWEN_NAMES_IN_LAYER:
        yield f"model.layers.{match[1]}.{_QWEN_NAMES_IN_LAYER[match[2]]}", tensor
    elif match and match[2] in ("attn.c_attn.weight", "attn.c_attn.bias"):
        kind = match[2].rpartition(".")[2]
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield f"model.layers.{match[1]}.self_attn.{part}_proj.{kind}", rows
    elif not _QWEN_COMPUTED.fullmatch(name):
        yield name, tensor


def _whole(settings: Mapping[str, Any], spellings: tuple[str, ...], origin: str) -> int:
    value = next((settings[name] for name in spellings if settings.get(name) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{origin}/config.json: expected a positive whole number as {' or '.join(spellings)}")
    return value


def _qwen_dtype(settings: Mapping[str, Any]) -> str:
    for flag, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        if settings.get(flag):
            return name
    return str(settings.get("torch_dtype") or settings.get("params_dtype") or "bfloat16").removeprefix("torch.")


QWEN_RANKS = "qwen.tiktoken"

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pieces of text that are encoded on their own, after NFC."""

END_OF_TEXT = "<|endoftext|>"

QWEN_SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
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


def qwen_tokenizer(source: Path) -> Any:
    """Build the fast tokenizer that gives the ids of `qwen.tiktoken`."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(source / QWEN_RANKS, pattern=QWEN_PATTERN, extra_special_tokens=QWEN_SPECIAL_TOKENS)
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


_BAICHUAN_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)

_BAICHUAN_PACKED = re.compile(r"(model\.layers\.\d+\.self_attn\.)W_pack\.weight")


def baichuan_settings(settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
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
    if missing := [name for name in _BAICHUAN_NEEDED if not isinstance(settings.get(name), int)]:
        raise ModelError(f"{origin}/config.json: expected whole numbers as {', '.join(missing)}")
    return {
        **{name: settings[name] for name in _BAICHUAN_NEEDED},
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


def baichuan_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a tensor becomes: `W_pack` its three parts, saved rotary buffers nothing, the rest itself."""
    if match := _BAICHUAN_PACKED.fullmatch(name):
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{match[1]}{part}_proj.weight", rows
    elif not name.endswith("rotary_emb.inv_freq"):
        yield name, tensor


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Types of pieces in `sentencepiece_model.proto`."""

_BPE = 2
"""`trainer_spec.model_type` of byte-pair models."""


def read_sentencepiece(path: Path) -> Any:
    """Read a `tokenizer.model` as SentencePiece's `ModelProto`; raise ModelError where it is missing, or no byte-pair model."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto: Any = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise ModelError(f"{path}: not readable as a SentencePiece model: {error}") from error
    if not proto.pieces or proto.trainer_spec.model_type != _BPE:
        raise ModelError(f"{path}: expected a SentencePiece model by byte-pair encoding, with pieces")
    return proto


def baichuan_tokenizer(source: Path) -> Any:
    """Build the fast tokenizer that gives the ids of `tokenizer.model`; neither start nor end of text is added to ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    proto = read_sentencepiece(source / "tokenizer.model")
    rules = proto.normalizer_spec
    of_type = {kind: [p.piece for p in proto.pieces if p.type == kind] for kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)}
    unknown = next(iter(of_type[_UNKNOWN]), None)
    backend = Tokenizer(
        models.BPE(
            vocab={piece.piece: number for number, piece in enumerate(proto.pieces)},
            merges=_merges(proto),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] if rules.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ending = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in [*of_type[_UNKNOWN], *of_type[_CONTROL]]])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in of_type[_USER_DEFINED]])
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
        **{role: piece for role, piece in roles.items() if piece in of_type[_CONTROL]},
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return every way to cut a piece into two others; the best score first."""
    scores = {each.piece: each.score for each in proto.pieces if each.type in (_NORMAL, _USER_DEFINED)}
    cuts = [
        (-each.score, each.piece[:at], each.piece[at:])
        for each in proto.pieces
        if each.type == _NORMAL
        for at in range(1, len(each.piece))
        if each.piece[:at] in scores and each.piece[at:] in scores
    ]
    return [(left, right) for _, left, right in sorted(cuts, key=lambda cut: cut[0])]


LAYOUTS = {
    "qwen": OldLayout("Qwen2", 2, qwen_settings, qwen_tensors, qwen_tokenizer),
    "baichuan": OldLayout("Llama", 1, baichuan_settings, baichuan_tensors, baichuan_tokenizer),
}
"""`model_type` of the source -> its layout."""
