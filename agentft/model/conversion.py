"""Checkpoints of architectures that transformers lacks, rewritten once as ones that it has, without running their code."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentft.cache import build_once, cache_root
from agentft.errors import ModelError
from agentft.model import baichuan, qwen_v1
from agentft.model.file_names import read_json
from agentft.model.shards import check_free_disk, holds_weights, rewrite_weights, weight_files

log = logging.getLogger(__name__)

LAYOUTS = {"qwen": qwen_v1, "baichuan": baichuan}
"""`model_type` of the source -> the module that knows its layout.

Each has `TARGET`, `target_config`, `rename` and `write_tokenizer`."""

RECORD = "agentft_conversion.json"
"""File in a converted folder that says what it was made from."""


def needs_conversion(settings: Mapping[str, Any]) -> bool:
    """Whether a model with this config.json has to be rewritten before transformers can load it."""
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
    _check_context(source, settings, layout.target_config(settings, str(source)), context)
    files = weight_files(source, allow_pickle=allow_pickle)
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([fingerprint, states, layout.VERSION]).encode()).hexdigest()[:16]
    target = cache_root(cache_dir) / "models" / f"{settings['model_type']}-{key}"

    def build(folder: Path) -> None:
        log.info("converting %s (%s -> %s)", source, settings["model_type"], layout.TARGET)
        check_free_disk(folder, sum(size for _, size, _ in states), "the converted copy")
        convert(source, files, folder, fingerprint)

    return build_once(target, build, is_whole=holds_weights)


def convert(source: Path, files: list[Path], folder: Path, fingerprint: str = "") -> None:
    """Write the model of `source`, whose weights are `files`, into `folder` in the target's layout.

    Raises:
        ModelError: see `converted_folder`.
    """
    import transformers

    settings = read_json(source / "config.json")
    layout = LAYOUTS[settings["model_type"]]
    config = getattr(transformers, f"{layout.TARGET}Config")(**layout.target_config(settings, str(source)))
    config.architectures = [f"{layout.TARGET}ForCausalLM"]
    rewrite_weights(files, folder, layout.rename, _expected_shapes(f"{layout.TARGET}ForCausalLM", config))
    config.save_pretrained(folder)
    layout.write_tokenizer(source, folder)
    record = {"from": settings["model_type"], "to": config.model_type, "source_fingerprint": fingerprint}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


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


def _expected_shapes(class_name: str, hf_config: Any) -> dict[str, tuple[int, ...]]:
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, class_name)(hf_config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
