"""Code that comes with weights: found by reading the settings, and refused unless this run says otherwise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentft.errors import ModelError
from agentft.model.conversion import needs_conversion
from agentft.model.file_names import read_json

log = logging.getLogger(__name__)

SETTINGS_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
"""Files whose fields can make a loader import code."""

_ALWAYS = ("model_file", "custom_generate", "custom_pipelines")
"""Fields that exist to name code."""

_KERNELS = ("attn_implementation", "experts_implementation", "kernel_config")
"""Endings of fields that choose a kernel; a name with a slash is fetched from a hub and run."""


def check_remote_code(folder: Path, *, trusted: bool) -> None:
    """Refuse a model that wants to bring its own Python code, unless it is `trusted`.

    An `auto_map` is no reason where transformers or a conversion knows the architecture: then the code beside the
    weights is never imported.

    Raises:
        ModelError: naming the file, the field and the setting.
    """
    config = folder / "config.json"
    known = config.is_file() and _is_known(read_json(config))
    for name in SETTINGS_FILES:
        path = folder / name
        if not path.is_file():
            continue
        for field, value in _fields_naming_code(read_json(path)):
            if field == "auto_map" and known and not trusted:
                log.info("%s: auto_map is ignored; the code beside the weights is not needed", path)
                continue
            if not trusted:
                raise ModelError(
                    f"{path}: {field} is {str(value)[:80]!r}: the model wants to run Python code that comes with it; "
                    "refused. If you have read that code and trust it: model.trust_remote_code=true"
                )
            log.warning("%s: %s=%s: Python code that came with the model will run", path, field, value)


def _is_known(config: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return needs_conversion(config) or config.get("model_type") in CONFIG_MAPPING_NAMES


def _fields_naming_code(value: Any) -> Iterator[tuple[str, Any]]:
    """Every field, however deep, that names code: without recursion, since the depth is the file's choice."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case dict() as fields:
                for field, inner in fields.items():
                    if _names_code(str(field), inner):
                        yield str(field), inner
                    waiting.append(inner)
            case list() as items:
                waiting.extend(items)


def _names_code(field: str, value: Any) -> bool:
    if field == "auto_map" or field in _ALWAYS:
        return bool(value)
    return field.endswith(_KERNELS) and ("/" in str(value) or "kernel_config" in field) and bool(value)
