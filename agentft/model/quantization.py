"""Frozen weights in 4 or 8 bits by bitsandbytes, which is an extra; and what those weights are as plain numbers."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from agentft.errors import ModelError
from agentft.model.config import QloraConfig, SftConfig

log = logging.getLogger(__name__)

INSTALL = "pip install bitsandbytes"


def require_bitsandbytes(sft: SftConfig) -> None:
    """Raise ModelError for a quantised base where the package is not installed."""
    if isinstance(sft, QloraConfig) and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"sft_type={sft.name} needs the package bitsandbytes: {INSTALL}")


def quantization_config(sft: SftConfig, dtype: torch.dtype) -> Any:
    """Return what transformers needs to load weights quantised; None where the base is not.

    Raises:
        ModelError: bitsandbytes is not installed, or does not start.
    """
    if not isinstance(sft, QloraConfig):
        return None
    require_bitsandbytes(sft)
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if sft.bits == 8:
        log.info("sft_type.bits=8: inputs of the quantised layers are rounded to fp16, then to 8 bits")
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=sft.kind.value,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=sft.double_quantization,
    )


_MADE_DENSE = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Ways in which weights are published quantised that transformers makes dense again: the way -> its settings."""


def published_as(settings: Mapping[str, Any]) -> str | None:
    """Return how the weights beside this config.json are quantised, or None."""
    text = settings.get("text_config") or {}
    found = settings.get("quantization_config") or text.get("quantization_config") or {}
    return str(found.get("quant_method", "an unnamed way")) if found else None


def require_dense(settings: Mapping[str, Any], sft: SftConfig) -> None:
    """Refuse to train weights that are published quantised, which could not be merged, bar those that are made dense again.

    Raises:
        ModelError: says what to take in their place.
    """
    way = published_as(settings)
    if way is None or (way in _MADE_DENSE and not isinstance(sft, QloraConfig)):
        return
    instead = (
        "sft_type=lora, which makes them dense" if way in _MADE_DENSE else "the original weights with sft_type=qlora"
    )
    raise ModelError(
        f"config.json: quantization_config says {way}: adapters of sft_type={sft.name} on weights that are quantised already "
        f"could not be merged; take {instead}"
    )


def dense_again(settings: Mapping[str, Any]) -> Any:
    """Return what transformers needs to load published quantised weights dense; None where they are not, or cannot be."""
    import transformers

    way = published_as(settings)
    if way not in _MADE_DENSE:
        return None
    log.info("the weights are published as %s and made dense: twice to four times their size on disk", way)
    return getattr(transformers, _MADE_DENSE[str(way)])(dequantize=True)


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without the kernels that it would fetch from a hub and run, or raise ModelError."""
    with _without_hub_kernels():
        try:
            import bitsandbytes
        except Exception as error:  # it looks for CUDA libraries while it is imported
            raise ModelError(f"bitsandbytes does not start: {error}; install it again: {INSTALL}") from error
    # Each product in 8 bits would say that it rounds its input to fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def import_peft() -> None:
    """Import peft, with it parts of transformers and, where installed, bitsandbytes, without kernels from a hub."""
    with _without_hub_kernels():
        importlib.import_module("peft")


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Keep bitsandbytes from fetching code with the package `kernels` and running it, which it has no setting against."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would advise to install that package
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def keep_weights_as_quantized(model: torch.nn.Module) -> None:
    """Keep 4-bit layers from repacking themselves in an evaluation on a CPU with bf16, which would round their scales."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dense_weight(layer: Any) -> torch.Tensor:
    """Return the weight that a linear layer computes with, quantised or not: fp32, shape [outputs, inputs]."""
    from transformers.pytorch_utils import Conv1D

    weight = layer.weight
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(layer)
    dense: torch.Tensor = weight.detach().float()
    return dense.T if isinstance(layer, Conv1D) else dense


def rounded_weight(weight: torch.Tensor, sft: QloraConfig) -> torch.Tensor:
    """Return `weight` as it is after quantising and back, in its own dtype: what a quantised base computes with."""
    bnb: Any = import_bitsandbytes()
    if sft.bits == 8:
        rows, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        restored: torch.Tensor = bnb.functional.int8_vectorwise_dequant(rows, scale)
        return restored.to(weight.dtype)
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type=sft.kind.value, compress_statistics=sft.double_quantization
    )
    restored = bnb.functional.dequantize_4bit(packed, state)
    return restored.to(weight.dtype)
