"""Load a model: from its settings to a folder, a tokenizer and weights on a device, and log the choices made."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from agentft.data.template_choice import Layout, choose_template, stop_tokens
from agentft.data.tokens import SegmentEncoder
from agentft.errors import ModelError
from agentft.model.attention import FLEX, TILED, choose_attention, take_attention
from agentft.model.config import Dtype, KernelChoice, ModelConfig, RewrittenHistory, SftConfig
from agentft.model.fused import LIGER_INSTALL, LigerKernels, load_liger
from agentft.model.quantization import dense_again, import_peft, keep_weights_as_quantized, quantization_config
from agentft.model.shards import auto_class, read_json
from agentft.model.sources import ModelFiles, locate_model
from agentft.runtime import Device, computes_in_bf16

log = logging.getLogger(__name__)

_CANNOT_ATTEND = (KeyError, AttributeError, ImportError, ValueError)
"""Raised by models that do not know an implementation of attention."""


def load_tokenizer(files: ModelFiles, config: ModelConfig) -> Any:
    """Load the tokenizer; it must be a fast one, since labels are found by the Rust tokenizer.

    Raises:
        ModelError: the folder has no fast tokenizer.
    """
    from transformers import AutoTokenizer

    there = {path.name for path in files.folder.iterdir()}
    if "tekken.json" in there and not there & {"tokenizer.json", "tokenizer.model"}:
        raise ModelError(
            f"{files.folder}: tekken.json is the only tokenizer there, and is not read; take a repository of this model that "
            "has a tokenizer.json"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        lacking = "tokenizer.model" in there and "tokenizer.json" not in there and find_spec("sentencepiece") is None
        reason = (
            "tokenizer.model needs a package that is not installed: pip install sentencepiece" if lacking else error
        )
        raise ModelError(f"{files.folder}: cannot load the tokenizer: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{files.folder}: {type(tokenizer).__name__} is no fast tokenizer (no tokenizer.json)")
    return tokenizer


def resolve_dtype(requested: Dtype, device: Device) -> Dtype:
    """Return what is asked for, with `auto` as bf16 where the device computes in it, else fp32."""
    if requested is not Dtype.auto:
        return requested
    return Dtype.bf16 if computes_in_bf16(device) else Dtype.fp32


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """Return torch's own name of a number format, `auto` excepted."""
    return {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32}[dtype]


def choose_kernels(requested: KernelChoice, device: Device) -> LigerKernels | None:
    """Load Liger's kernels where they serve on this device, or None for torch's, and say what `auto` took.

    Raises:
        ModelError: `liger` was asked for and cannot run here.
    """
    if requested is KernelChoice.torch:
        return None
    liger = load_liger() if device.is_cuda else None
    if requested is KernelChoice.liger and liger is None:
        raise ModelError(
            f"model.kernels=liger needs a CUDA device and the package: {LIGER_INSTALL}; model.kernels=auto takes torch where "
            "one of them is missing"
        )
    if requested is KernelChoice.auto and device.is_cuda:
        log.info("model.kernels=auto: %s", KernelChoice.liger if liger else KernelChoice.torch)
    return liger


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how a model is computed, chosen before anything is loaded."""

    device: Device
    dtype: torch.dtype
    attention: str
    """What transformers knows the attention by."""
    liger: LigerKernels | None
    """What computes norms, rotary positions and activations in torch's place, where it serves."""
    quantization: Any
    """What transformers needs to load weights quantised, or None."""


def choose_compute(config: ModelConfig, sft: SftConfig, device: Device, *, compiles: bool = False) -> Compute:
    """Choose number format, attention and kernels for `device`, and say what each `auto` took.

    Args:
        compiles: torch's compiler will run over each block, and takes the place of Liger's kernels.

    Raises:
        ModelError: something that was asked for cannot run here.
    """
    import_peft()
    chosen = resolve_dtype(config.dtype, device)
    if config.dtype is Dtype.auto:
        log.info("model.dtype=auto: %s on %s", chosen, device.name)
    dtype = torch_dtype(chosen)
    attention = choose_attention(config.attention, device, dtype)
    quantization = quantization_config(sft, dtype)
    liger = None if compiles else choose_kernels(config.kernels, device)
    return Compute(device, dtype, attention, liger, quantization)


def choose_layout(config: ModelConfig, tokenizer: Any) -> Layout:
    """Return the layout that `config` names for a model with this tokenizer.

    Raises:
        ConfigError: there is none of that name, or the tokenizer lacks what it needs.
    """
    stable = config.rewritten_history is RewrittenHistory.stable
    return choose_template(config.template, tokenizer, config.stop_token, config.template_args, stable=stable)


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A model without its weights: what conversations become text and ids with."""

    files: ModelFiles
    tokenizer: Any
    template: Layout
    encoder: SegmentEncoder
    stop_ids: tuple[int, ...]
    """Of the tokens that end an answer."""

    @property
    def pad_id(self) -> int:
        """Any id serves: padding is masked in attention and loss by position, never by id."""
        pad_id: int | None = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad_id is None else pad_id


def load_chat_tokenizer(config: ModelConfig) -> ChatTokenizer:
    """Find or fetch the model's files, and load its tokenizer and chat template."""
    files = locate_model(config)
    tokenizer = load_tokenizer(files, config)
    layout, encoder = choose_layout(config, tokenizer), SegmentEncoder(tokenizer)
    return ChatTokenizer(files, tokenizer, layout, encoder, tuple(map(encoder.special_id, stop_tokens(layout))))


def load_model(
    files: ModelFiles,
    config: ModelConfig,
    *,
    device: Device,
    dtype: torch.dtype | None,
    attention: str,
    quantization: Any = None,
) -> torch.nn.Module:
    """Load the weights in `dtype` onto `device`, in evaluation mode; `quantization` from `quantization_config`.

    An `attention` that the model's own code does not know leaves it with eager attention, or with the only one it has. With
    `dtype` None the weights keep the files' own; on a CPU they are then the mapped files, which processes share.

    Raises:
        ModelError: the weights cannot be loaded, or some are missing.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    quantized = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": device.kind}}
    if plain := dense_again(read_json(files.folder / "config.json")):
        quantized = {"quantization_config": plain}

    def load(attention: str) -> Any:
        trust = {"trust_remote_code": config.trust_remote_code}
        loader = auto_class(AutoConfig.from_pretrained(files.folder, **trust))
        return loader.from_pretrained(
            files.folder,
            dtype=dtype or "auto",
            attn_implementation=attention,
            use_safetensors=None if config.allow_pickle else True,
            output_loading_info=True,
            **trust,
            **quantized,
        )

    # Models that do not ask transformers' interface would take our names for others of theirs, or end in a KeyError.
    ours = attention in (TILED, FLEX)
    try:
        try:
            model, loading = load("eager" if ours else attention)
        except _CANNOT_ATTEND:
            if ours or attention == "eager":
                raise
            model, loading = load("eager")
    except (OSError, *_CANNOT_ATTEND) as error:
        raise ModelError(f"{files.folder}: cannot load the model: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{files.folder}: its files lack {len(missing)} weights, such as {', '.join(missing[:3])}, which would be random; "
            "take a complete model"
        )
    if ours:
        with suppress(ValueError):
            take_attention(model, attention)
    # Packed or padded training rows must never meet a cache; generation passes its own.
    model.config.use_cache = False
    if quantization is None:
        model = model.to(device.kind)
    keep_weights_as_quantized(model)
    module: torch.nn.Module = model.eval()
    return module
